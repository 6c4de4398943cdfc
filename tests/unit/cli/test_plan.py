"""`ernie-cluster plan`: what it prints, its exit codes, and that what it prints can be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_cluster.cli.main import main
from ernie_cluster.config.load import load_config

WHOLE_28B = ("--model", "28b", "--gpu", "h100-80g")
PRESET_28B = ("--set", "models.0.preset=28b", "--set", "models.0.path=/nowhere", "--model", "28b")


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """(exit code, what was printed)."""
    code = main(["plan", *argv])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def plan_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code, shown = plan(capsys, *argv, "--json")
    found: dict[str, Any] = json.loads(shown)
    assert code == (0 if found["fits"] else 1)
    return found


def test_a_model_that_fits_is_shown_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = plan(capsys, *WHOLE_28B)
    assert code == 0
    assert "28b: bfloat16 weights, bfloat16 KV, on 1 x H100 SXM 80 GB: it fits" in shown
    for word in (
        "text_experts 40.8 GB",
        "57.3 GB",
        "KV tokens",
        "first token of a lone prompt",
        "a picture of 6,177 tokens",
    ):
        assert word in shown


def test_one_that_does_not_fit_gets_a_reason_and_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = plan(capsys, "--model", "424b", "--gpu", "h100-80g", "--count", "8")
    assert code == 1
    assert "it does not fit\n  mixed (tp 8 x dp 1), rank 0: weights 105.9 + " in shown
    assert all(way in shown for way in ("--quantization wint8", "--count 16", "--gpu h200-141g"))
    assert "first token" not in shown


def test_the_printed_configuration_plans_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, shown = plan(capsys, *WHOLE_28B, "--count", "4", "--layout", "split")
    file = tmp_path / "cluster.yaml"
    file.write_text(shown[shown.index("models:") :].partition("\nnote:")[0], encoding="utf-8")
    (model,) = load_config(file, {}).models
    assert [(p.role, p.num_replicas) for p in model.pools] == [("vision", 2), ("prefill", 2), ("decode", 2)]
    again = plan_json(capsys, str(file), "--model", "28b", "--gpu", "h100-80g")["models"][0]
    first = plan_json(capsys, *WHOLE_28B, "--count", "4", "--layout", "split")["models"][0]
    assert again["fits"]
    assert [p["ranks"] for p in again["pools"]] == [p["ranks"] for p in first["pools"]]
    assert again["num_gpus"] == pytest.approx(first["num_gpus"])


def test_json_has_every_rank_and_both_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "--model", "424b", "--gpu", "h200", "--count", "8")["models"][0]
    (mixed,) = (p for p in found["pools"] if p["role"] == "mixed")
    assert len(mixed["ranks"]) == mixed["tp"] * mixed["dp"] == 8
    for rank in mixed["ranks"]:
        assert sum(rank["weights"].values()) + rank["scales"] + rank["activations"] + rank["reserve"] == rank["total"]
        assert rank["total"] + mixed["kv_cache_bytes"] <= mixed["memory_bytes"]
    assert found["kv_bytes_per_token"] == 8 * mixed["kv_bytes_per_token"] == 221_184
    assert all(e["seconds"] > 0 for e in (*found["estimates"]["ttft"], *found["estimates"]["tpot"]))


def test_a_refusal_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "--model", "28b", "--gpu", "l40s", "--count", "1")
    assert not found["fits"]
    assert found["models"][0]["estimates"] is None
    assert {"change": "wint8 weights on these GPUs", "options": "--quantization wint8"} in found["models"][0]["nearest"]


def test_a_configuration_on_cpu_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = plan(capsys, "--set", "models.0.preset=pocket")
    assert code == 0
    assert "ernie-pocket: bfloat16 weights, bfloat16 KV, on CPU: it fits" in shown


def test_a_configuration_is_checked_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, *PRESET_28B, "--gpu", "h100-80g")[0] == 0
    code, shown = plan(capsys, *PRESET_28B, "--gpu", "h100-80g", "--set", "models.0.engine.kv_cache_bytes=40GiB")
    assert code == 1
    assert "KV 42.9 = " in shown
    assert "set engine.kv_cache_bytes to at most" in shown


def test_option_and_argument_name_the_same_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("models: [{preset: pocket}]", encoding="utf-8")
    assert plan(capsys, "--config", str(file)) == plan(capsys, str(file))


def test_bf16_is_bfloat16_and_quantised_plans_can_be_served(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan(capsys, *WHOLE_28B, "--quantization", "bf16", "--kv-dtype", "bf16") == plan(capsys, *WHOLE_28B)
    code, shown = plan(capsys, *WHOLE_28B, "--quantization", "wint4", "--kv-dtype", "fp8")
    assert code == 0
    assert "planned only" not in shown
    file = tmp_path / "cluster.yaml"
    file.write_text(shown[shown.index("models:") :].partition("\n\n")[0], encoding="utf-8")
    model = load_config(file, {}).models[0]
    assert (model.quantization, model.engine.kv_dtype) == ("wint4", "fp8")
    assert "planned only" in plan(capsys, *WHOLE_28B, "--kv-dtype", "float32")[1]


def test_gpus_that_make_no_gang_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, "--model", "424b", "--gpu", "h200", "--count", "11")["models"][0]["num_idle_gpus"] == 3


def test_thinking_has_the_pictures_of_its_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a picture of 16,384 tokens" in plan(capsys, "--model", "28b-thinking", "--gpu", "h100-80g")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "name a configuration, or --model and --gpu"),
        (("--model", "28b"), "name a configuration, or --model and --gpu"),
        (("--model", "29b", "--gpu", "h100"), "--model: unknown model '29b'; did you mean '28b'?"),
        (("--model", "/nowhere/29b", "--gpu", "h100"), "/nowhere/29b/config.json: not found"),
        (("--model", "28b", "--gpu", "h101-80g"), "unknown GPU 'h101-80g'; did you mean h100-80g?"),
        (("--model", "28b", "--gpu", "h100", "--count", "0"), "0 GPUs: layout mixed takes 1 to"),
        (("--model", "28b", "--gpu", "h100", "--tp", "0"), "tp = 0 must be at least 1"),
        (("--model", "28b", "--gpu", "h100", "--count", "8", "--tp", "8"), "num_heads % tp = 20 % 8 = 4, must be 0"),
        (("--model", "424b", "--gpu", "h100", "--count", "8", "--tp", "16"), "num_kv_heads % tp = 8 % 16 = 8"),
        (("--model", "28b", "--gpu", "h100", "--max-model-len", "0"), "max_model_len = 0 must be at least 2"),
        (("--model", "28b", "--gpu", "h100", "--max-model-len", "200000"), "for 131072 positions at most"),
        (
            ("--model", "28b", "--gpu", "h100", "--max-num-seqs", "64", "--max-batch-tokens", "8"),
            "max_batch_tokens = 8",
        ),
        (("--model", "28b", "--gpu", "h100", "--image-max-pixels", "0"), "image_max_pixels = 0 must be"),
        (("--model", "28b", "--gpu", "h100", "--video-frames", "-1"), "video_frames = -1 must be"),
        (
            ("--model", "28b", "--gpu", "a100-80g", "--quantization", "fp8"),
            "they need a Hopper GPU or a newer one; use wint8",
        ),
        ((*PRESET_28B,), "some pools have GPUs: say which by --gpu"),
        ((*PRESET_28B, "--gpu", "h100", "--count", "8"), "--count beside a configuration"),
    ],
)
def test_what_makes_no_sense_is_one_line(argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = plan(capsys, *argv)
    assert code == 2
    assert words in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(
        word in shown for word in ("tp x dp", "experts are spread", "424b", "h200-141g", "Exit code 0", "--json")
    )
