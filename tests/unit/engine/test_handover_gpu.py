"""The hand-over of `test_handover`, with KV and embeddings crossing between (twins of) GPUs."""

from __future__ import annotations

from contextlib import ExitStack, closing

import pytest

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.gpu_channel import GpuChannel
from ernie_cluster.transport.gpu_side import Deadlines, GpuSide
from ernie_cluster.transport.ipc import open_ipc
from ernie_cluster.transport.nccl import open_nccl
from tests.tiny import make_request, make_worker
from tests.unit.engine.test_handover import Path
from tests.unit.engine.test_laws import answers, requests
from tests.unit.transport.conformance import TIMEOUT_S
from tests.unit.transport.gpu_ends import PATIENT, new_receiver
from tests.unit.transport.gpu_twin import TwinGpu
from tests.unit.transport.nccl_twin import Mishaps


class GpuPath(Path):
    """Three replicas with a GPU each.

    Args:
        mishaps: of NCCL on the prefill side.
    """

    def __init__(
        self, stack: ExitStack, transport: str, mishaps: Mishaps | None = None, deadlines: Deadlines = PATIENT
    ) -> None:
        super().__init__(prefill={"piece_bytes": 4096, "max_batch_tokens": 16})
        vision, prefill, decode = (
            GpuSide(TwinGpu(f"gpu-{n}", m), pytest.fail, deadlines) for n, m in enumerate((None, mishaps, None))
        )
        connect = open_nccl if transport == "nccl" else open_ipc
        to_prefill = stack.enter_context(closing(new_receiver(self.prefill.inbox, prefill)))
        to_decode = stack.enter_context(closing(new_receiver(self.decode.inbox, decode)))
        self.embeds: GpuChannel = stack.enter_context(closing(connect(to_prefill.address, "vision", vision)))  # type: ignore[assignment]
        self.kv: GpuChannel = stack.enter_context(closing(connect(to_decode.address, "prefill", prefill)))  # type: ignore[assignment]


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_three_replicas_give_what_one_gives(transport: str) -> None:
    expected = answers(*make_worker(max_batch_tokens=1024), requests())
    with ExitStack() as stack, GpuPath(stack, transport) as path:
        assert path.run(requests()) == expected
        assert path.decode.snapshot().kv_bytes_received == path.prefill.snapshot().kv_bytes_sent > 0


def test_an_attempt_whose_way_breaks_fails_and_the_next_one_succeeds() -> None:
    request = make_request(range(200, 240), "doomed", max_tokens=10)
    expected = answers(*make_worker(), [request])["doomed"]
    with ExitStack() as stack, GpuPath(stack, "nccl", Mishaps({"launch": {2: "raise"}})) as path:
        path.open(request)
        assert isinstance(path.failure("doomed"), TransferFailed)
        path.prefilled.drain()  # the first token of the attempt that failed
        path.prefilled.tokens.clear()
        path.decoded.tokens["doomed"] = [-1]
        path.open(request, epoch=1)
        path.decoded.wait_for(["doomed"], TIMEOUT_S)
        path.prefilled.drain()
        assert path.prefilled.tokens["doomed"] + path.decoded.tokens["doomed"][1:] == expected
