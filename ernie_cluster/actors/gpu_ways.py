"""The GPU of one rank as others reach it, and as it reaches others. Imported on ranks with a GPU only: torch is here."""

from __future__ import annotations

import logging

import torch

from ernie_cluster.actors import process
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError
from ernie_cluster.transport.base import Channel, Sink
from ernie_cluster.transport.choose import GpuEndpoint, TransportKind
from ernie_cluster.transport.gpu import CudaGpu
from ernie_cluster.transport.gpu_receiver import GpuReceiver, MakeFetcher
from ernie_cluster.transport.gpu_side import GpuSide
from ernie_cluster.transport.ipc import IpcFetcher, Regions, open_ipc
from ernie_cluster.transport.nccl import NcclFetcher, open_nccl

log = logging.getLogger(__name__)


class GpuWays:
    """Owns the receiver of this rank's GPU.

    Args:
        sink: of the rank.
        device: where its model is.
        host: this node's address, as other nodes reach it.
        config: see there.

    Raises:
        ConfigError: NCCL or IPC is asked for by name, and cupy is missing.
    """

    def __init__(self, sink: Sink, device: torch.device, host: str, config: TransportConfig) -> None:
        self._receiver: GpuReceiver | None = None
        try:
            self._side = GpuSide(CudaGpu(device), process.give_up)
        except ConfigError as e:
            if config.kind in ("ipc", "nccl"):
                raise ConfigError(f"transport.kind = {config.kind}: {e}") from e
            log.warning("bytes to and from this GPU go through host memory: %s", e)
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self.endpoint = GpuEndpoint(uuid, None, str(e))
            return
        regions = Regions()
        ways: dict[str, MakeFetcher] = {
            "nccl": NcclFetcher,
            "ipc": lambda side, nbytes: IpcFetcher(side, nbytes, regions),
        }
        self._receiver = GpuReceiver(sink, self._side, host, ways, config.staging_bytes)
        self.endpoint = GpuEndpoint(self._side.gpu.id, self._receiver.address)

    def open(self, kind: TransportKind, address: str, peer: str) -> Channel:
        """A channel to another rank's GPU; raises as `GpuChannel` does."""
        return (open_nccl if kind == "nccl" else open_ipc)(address, peer, self._side)

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
