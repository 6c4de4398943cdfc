"""`scripts/walk` on pages that start nothing of ours; the quick start itself is walked in tests/integration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.docs.pages import ROOT, Page

GOOD = """
```sh install
exit 1
```

```yaml
# some.yaml
port: 8000
```

```sh
grep -q 'port: 4321' some.yaml
echo "first
second"
```

```python
print(open("some.yaml").read())
```

```text
anything
```
"""


def walk(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/walk"), "--page", str(page), "--port", "4321", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_page_is_walked_to_its_end(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(GOOD)
    done = walk(page)
    assert done.returncode == 0, done.stderr
    assert "port: 4321" in done.stdout
    assert "5 steps did what the page says" in done.stdout


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("```sh\nfalse\necho on\n```", "ended with 1"),
        ("```sh\ncat missing | cat missing\n```", "ended with 1"),
        ("```python\nraise SystemExit(3)\n```", "ended with 3"),
        ("```python\nx = 1\n```", "printed nothing"),
        ("```yaml\nport: 1\n```", "say its name"),
        ("```sh server\nexit 4\n```", "before it was ready"),
        ("```sh later\ntrue\n```", "none of"),
    ],
)
def test_what_fails_is_told(tmp_path: Path, block: str, why: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"words\n\n{block}\n\n```sh\ntouch {tmp_path}/after\n```\n")
    done = walk(page)
    assert done.returncode == 1
    assert why in done.stderr
    assert "line 3" in done.stderr
    assert not (tmp_path / "after").exists(), "the walk went on"


def test_the_quick_start_can_be_walked() -> None:
    done = walk(ROOT / "docs/quick-start.md", "--list")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(Page(ROOT / "docs/quick-start.md").blocks)
