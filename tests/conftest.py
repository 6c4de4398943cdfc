"""Marks by folder, and what each folder must not do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

FOLDERS = {
    "unit": "no Ray, no network, no GPU",
    "integration": "local Ray on CPU, or several processes",
    "e2e": "the whole application over HTTP and gRPC",
    "chaos": "the same while its processes are killed and stopped; with --slow only",
    "gpu": "needs an NVIDIA GPU",
    "multinode": "the application on several machines, which are network namespaces; only with -m multinode, as root",
}


settings.register_profile("busy-machine", deadline=None)  # another process's load is no failure of ours
settings.load_profile("busy-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in FOLDERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(tests).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if folder == "multinode" and "multinode" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="minutes, and as root: run with -m multinode"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    yield
    ray = sys.modules.get("ray")
    if item.get_closest_marker("unit") and ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("a unit test started Ray; move it to tests/integration, or hand in a twin", pytrace=False)


@pytest.fixture(autouse=True)
def _log_as_before() -> Generator[None, None, None]:
    """Who sets our log up in a test, sets it up for that test alone."""
    log = logging.getLogger("ernie_cluster")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
