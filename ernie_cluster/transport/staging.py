"""Memory that two processes share by descriptor, and proof of who is at the other end of a socket. Linux only."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from pathlib import Path

import numpy as np

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.base import Payload


class Staging:
    """A mapped memory file as uint8 [nbytes]; pages exist from their first use on, and go with the last mapping.

    Args:
        fd: memory file; stays the caller's, who may close it at once.
        nbytes: how much of it to map.
        writable: the receiver maps it read-only.

    Raises:
        TransferFailed: the file is smaller; reading beyond its end would kill the process.
    """

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        size = os.fstat(fd).st_size
        if not 0 < nbytes <= size:
            raise TransferFailed(
                f"staging memory has {size} bytes, {nbytes} were announced; is the peer of this version?"
            )
        self._map = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self.bytes: Payload = np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Unmap; put off until the last view of `bytes` is gone."""
        self.bytes = self.bytes[:0].copy()
        with contextlib.suppress(BufferError):
            self._map.close()


def create_memory(nbytes: int) -> int:
    """Descriptor of a new memory file without a name, whose size nobody can change; the caller closes it."""
    fd = os.memfd_create("ernie-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def check_peer_uid(sock: socket.socket) -> None:
    """Raises TransferFailed unless the process at the other end of a Unix socket runs under our uid."""
    credentials = struct.Struct("3i")
    _, uid, _ = credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    if uid != os.getuid():
        raise TransferFailed(f"peer runs under uid {uid}, this process under {os.getuid()}; start both as one user")


def host_id() -> str:
    """Equal exactly for processes that can reach each other's sockets: one boot, network and user namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return "/".join([boot, os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user")])
