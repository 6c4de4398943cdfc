"""What can be told of the real binding where there is no GPU: the remedy when it is missing."""

from __future__ import annotations

import sys
import types

import pytest

from ernie_cluster.errors import ConfigError
from ernie_cluster.transport.gpu import import_cupy


def put(monkeypatch: pytest.MonkeyPatch, *, available: bool) -> types.ModuleType:
    """A cupy of which only the shape is there."""
    cupy, cuda, nccl = (types.ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.nccl"))
    nccl.available = available  # type: ignore[attr-defined]
    cuda.nccl, cupy.cuda = nccl, cuda  # type: ignore[attr-defined]
    for module in (cupy, cuda, nccl):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return cupy


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"pip install cupy-cuda13x, or cupy-cuda12x"):
        import_cupy()


def test_without_its_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, available=False)
    with pytest.raises(ConfigError, match=r"libnccl\.so\.2.*pip install nvidia-nccl-cu13"):
        import_cupy()


def test_with_both_it_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = put(monkeypatch, available=True)
    assert import_cupy() is cupy
