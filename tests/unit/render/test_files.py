"""What lies in the repository is what `render` writes; each file opens with what to change first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ernie_cluster import __version__
from ernie_cluster.cli.main import main
from ernie_cluster.errors import ConfigError
from ernie_cluster.render.files import checked_in, kuberay_files
from ernie_cluster.render.options import RAY_VERSION, Options
from ernie_cluster.render.setup import preset_setup
from tests.unit.render.consistency import ROOT, pin, service_faults
from tests.unit.render.schemas import problem

FILES = checked_in(__version__)
OWN = "--set models.0.preset=pocket"
OPEN = f"{OWN} --set api.host=0.0.0.0 --set api.listen_on=every_node"


def test_the_repository_has_what_render_writes() -> None:
    stale = [
        p for p, f in FILES.items() if not (ROOT / p).is_file() or (ROOT / p).read_text(encoding="utf-8") != f.text
    ]
    assert stale == [], "run `ernie-cluster render --all --out .`"


def test_the_repository_has_nothing_else_there() -> None:
    there = [p for folder in ("deploy", "k8s") for p in (ROOT / folder).rglob("*") if p.is_file()]
    assert {str(p.relative_to(ROOT)) for p in there} == {*FILES, "k8s/README.md"}


def test_every_file_says_what_to_change_first() -> None:
    for path, file in FILES.items():
        if path.endswith(".json"):  # which has no comments
            continue
        head = "".join(line for line in file.text.splitlines(keepends=True) if line.startswith("#"))
        assert head.startswith("# "), path
        assert "hange first:" in head or "Nothing to change" in head or path == "k8s/base/kustomization.yaml", path


def test_texts_read_back_as_their_documents() -> None:
    for path, file in FILES.items():
        assert list(yaml.safe_load_all(file.text)) == list(file.documents), path


def test_what_kustomize_is_told_of_is_there() -> None:
    for path, file in FILES.items():
        if path.endswith("kustomization.yaml"):
            folder = (ROOT / path).parent
            for resource in file.documents[0]["resources"]:
                target = (folder / resource).resolve()
                assert target.is_file() or (target / "kustomization.yaml").is_file(), f"{path}: {resource}"


def commands(text: str) -> list[str]:
    """Of the lines of a shell, without what is said behind them."""
    return [line.partition("  #")[0].strip() for line in text.splitlines() if line.strip()]


def test_the_page_on_deploying_gives_the_commands_of_the_file_for_one_machine() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    told = [c for block in re.findall(r"```sh\n(.*?)```", page, flags=re.S) for c in commands(block)]
    header = FILES["deploy/ray-up.local-cpu.pocket.yaml"].header.partition("Run, ")[2].partition("\n\n")[0]
    again = "serve deploy deploy/serve.pocket.yaml"
    expected = commands(header.partition("\n")[2])
    assert expected.count(again) == 2
    expected.reverse()
    expected.remove(again)
    assert told == ["pip install .", *reversed(expected)]


def test_rays_version_is_the_pinned_one() -> None:
    assert RAY_VERSION.startswith(f"{pin('ray[serve]')}.")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--preset 28b", "--target is missing"),
        ("--target serve", "name a --preset, or else a CONFIG"),
        ("--preset 28b --target monitoring", "the same for every setup"),
        ("--preset 28b --target serve --cloud aws", "where `ray up` gets machines"),
        ("--preset 28b --target ray-up --cloud local-cpu", "take pocket"),
        ("--preset 424b --target ray-up --cloud aws --machine p5.4xlarge", "fits on no machine"),
        (f"{OWN} --target kuberay", "set it to 0.0.0.0"),
        (f"{OWN} --target ray-up", "set it to 0.0.0.0"),
        (f"{OPEN} --target kuberay --set api.listen_on=head", "set it to every_node"),
        (f"{OPEN} --target kuberay --set api.keys_file=/k.yaml", "set it to that"),
        ("--preset 28b --set api.port=80 --target serve", "or else a CONFIG"),
    ],
)
def test_what_makes_no_sense_is_said(capsys: pytest.CaptureFixture[str], argv: str, words: str) -> None:
    assert main(["render", *argv.split()]) == 2
    assert words in capsys.readouterr().err


def test_one_file_is_printed_and_several_are_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--preset", "pocket", "--target", "serve"]) == 0
    assert capsys.readouterr().out == FILES["deploy/serve.pocket.yaml"].text
    assert main(["render", "--preset", "pocket", "--target", "kuberay", "--image", "here/it:1"]) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    kinds = [d["kind"] for d in shown]
    assert kinds.count("RayService") == 1
    assert "Kustomization" not in kinds
    (service,) = [d for d in shown if d["kind"] == "RayService"]
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["image"] == "here/it:1"


def test_files_of_ones_own_configuration_are_written_below_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", *OPEN.split(), "--target", "kuberay", "--name", "mine", "--out", str(tmp_path)]) == 0
    written = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert written == {p for p in tmp_path.rglob("*") if p.is_file()}
    found = [d for p in written for d in yaml.safe_load_all(p.read_text(encoding="utf-8"))]
    assert [problem(d) for d in found if problem(d)] == []
    assert "GRPCRoute" not in {d["kind"] for d in found}, "there is no gRPC port"
    (service,) = [d for d in found if d["kind"] == "RayService"]
    assert service_faults(service, 8000) == []
    (model,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["models"]
    assert (model["preset"], "path" in model) == ("pocket", False), "folders of this machine are none of the pods'"


def test_checkpoints_outside_of_the_volume_are_refused() -> None:
    setup = preset_setup("28b", "/elsewhere")
    with pytest.raises(ConfigError, match="not below /models"):
        kuberay_files(setup, Options(__version__))
    assert kuberay_files(setup, Options(__version__, models_folder="/elsewhere"))
