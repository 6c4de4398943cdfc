"""The rules of conftest.py, on a small tree of its own with a stand-in for Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

RAY = """
is_up = False
def init(): globals().update(is_up=True)
def is_initialized(): return is_up
def shutdown(): globals().update(is_up=False)
"""


@pytest.fixture
def tree(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n    slow: minutes\n    gpu: needs a GPU\n")
    pytester.makepyfile(ray=RAY, torch="class cuda:\n    is_available = staticmethod(lambda: False)\n")
    return pytester


def run(tree: pytest.Pytester, files: dict[str, str], *options: str) -> tuple[dict[str, int], str]:
    """(how many tests ended how, what pytest printed)."""
    for name, source in files.items():
        path = tree.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    result = tree.runpytest_subprocess("-p", "no:cacheprovider", "-rs", *options)
    return dict(result.parseoutcomes()), result.stdout.str()


def test_a_unit_test_that_starts_ray_fails_alone(tree: pytest.Pytester) -> None:
    source = "import ray\ndef test_a(): ray.init()\ndef test_b(): assert not ray.is_initialized()\n"
    counts, shown = run(tree, {"unit/test_x.py": source})
    assert counts == {"failed": 1, "passed": 1}
    assert "a unit test started Ray" in shown


def test_an_integration_test_may_start_ray(tree: pytest.Pytester) -> None:
    counts, _ = run(tree, {"integration/test_x.py": "import ray\ndef test_a(): ray.init()\n"})
    assert counts == {"passed": 1}


@pytest.mark.parametrize(("options", "outcome"), [([], "skipped"), (["--slow"], "passed")])
def test_slow_tests_run_when_asked_for(tree: pytest.Pytester, options: list[str], outcome: str) -> None:
    counts, _ = run(tree, {"unit/test_x.py": "import pytest\n@pytest.mark.slow\ndef test_a(): pass\n"}, *options)
    assert counts == {outcome: 1}


def test_gpu_tests_are_skipped_with_the_reason(tree: pytest.Pytester) -> None:
    counts, shown = run(tree, {"gpu/test_x.py": "def test_a(): assert False\n"})
    assert counts == {"skipped": 1}
    assert "needs an NVIDIA GPU" in shown


def test_folders_can_be_selected_by_mark(tree: pytest.Pytester) -> None:
    files = {"unit/test_x.py": "def test_a(): pass\n", "e2e/test_y.py": "def test_b(): pass\n"}
    counts, _ = run(tree, files, "-m", "e2e")
    assert counts == {"passed": 1, "deselected": 1}
