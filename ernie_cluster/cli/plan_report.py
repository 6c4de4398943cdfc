"""What `ernie-cluster plan` prints: a table for people, or all numbers for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_cluster.config.kv_layout import SCALE_BYTES
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.units import MIB
from ernie_cluster.policy.sizing import speed
from ernie_cluster.policy.sizing.memory import kv_layout
from ernie_cluster.policy.sizing.pools import PoolSizing, Setting, gigabytes
from ernie_cluster.policy.sizing.speed import Prompt

_LARGEST_PICTURE_PROMPT = 256
"""Tokens of text beside the picture."""
_BATCHES = (1, 8, 32, 64, 256)
_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Report:
    """The plan of one model."""

    title: str
    setting: Setting
    pools: tuple[PoolSizing, ...]
    problem: str
    """Why it does not fit; "" when it does."""
    nearest: tuple[tuple[str, str], ...] = ()
    """(what would fit, the options that ask for it)."""
    configs: tuple[PoolConfig, ...] = ()
    """Pools that the plan chose; none when the configuration was given."""
    num_gpus: int = 0
    """GPUs asked about; 0 when a configuration was given."""
    num_idle: int = 0

    @property
    def fits(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class Estimates:
    """Rooflines of a plan that fits."""

    ttft_s: tuple[tuple[str, float], ...]
    """(prompt in words, seconds)."""
    context: int
    tpot_s: tuple[tuple[int, float], ...]
    """(sequences at a time, seconds per token)."""


def estimates(report: Report) -> Estimates | None:
    """None on CPU, and for what does not fit."""
    setting = report.setting
    first = next((p for p in report.pools if p.role in ("prefill", "mixed")), None)
    then = next((p for p in report.pools if p.role in ("decode", "mixed")), None)
    if not report.fits or setting.gpu is None or first is None or then is None or not (first.share and then.share):
        return None
    prompts = [(f"{n:,} tokens", Prompt(n)) for n in (1024, 8192, 32_768)]
    vision = setting.model.vision
    if vision is not None:
        tokens = setting.image_max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
        text = f"a picture of {tokens:,} tokens + {_LARGEST_PICTURE_PROMPT}"
        prompts.append((text, Prompt(_LARGEST_PICTURE_PROMPT, tokens)))
    ttft = []
    for words, prompt in prompts:
        if prompt.tokens <= setting.max_model_len:
            encoding = speed.encode_s(setting, prompt.image_tokens) if prompt.image_tokens else 0.0
            ttft.append((words, encoding + speed.prefill_s(setting, first.dims, first.role, prompt)))
    context = min(_CONTEXT, setting.max_model_len)
    most = min(setting.engine.max_num_seqs, then.concurrency(context))
    steps = ((b, speed.decode_step_s(setting, then.dims, then.role, b, context)) for b in _BATCHES if b <= most)
    return Estimates(tuple(ttft), context, tuple(steps))


def as_text(reports: Sequence[Report]) -> str:
    """Tables, one after the other."""
    return "\n\n\n".join("\n\n".join(part for part in _parts(r) if part) for r in reports)


def _parts(report: Report) -> Iterable[str]:
    yield _headline(report)
    yield _pool_table(report)
    yield _holdings(report)
    yield _estimate_table(report)
    yield _configuration(report)
    yield "\n".join(_notes(report))


def _headline(report: Report) -> str:
    s = report.setting
    where = "on CPU" if s.gpu is None else f"on {report.num_gpus or _gpus(report):g} x {s.gpu.title}"
    lines = [
        f"{report.title}: {s.weights.name} weights, {s.kv} KV, {where}: {'it fits' if report.fits else 'it does not fit'}"
    ]
    if report.problem:
        lines.append(f"  {report.problem}")
        lines += [f"  fits: {words:44} {options}".rstrip() for words, options in report.nearest]
    return "\n".join(lines)


def _gpus(report: Report) -> float:
    return round(sum(p.num_gpus for p in report.pools), 2)


def _pool_table(report: Report) -> str:
    length = f"x {report.setting.max_model_len:,}"
    head = [
        "pool",
        "replicas",
        "tp x dp",
        "GPU/rank",
        "weights",
        "activations",
        "reserve",
        "KV",
        "KV tokens",
        length,
        "host",
    ]
    return _table([head, *map(_pool_row, report.pools)]) + (
        "\nbytes are those of the fullest rank; KV tokens, and sequences of the length above, those of a replica"
    )  # fmt: skip


def _pool_row(pool: PoolSizing) -> list[str]:
    rank, kv = pool.heaviest, pool.kv_layout is not None
    return [
        pool.role,
        str(pool.num_replicas),
        f"{pool.dims.tp} x {pool.dims.dp}",
        f"{pool.share:g}" if pool.share else "CPU",
        gigabytes(rank.weight_bytes),
        gigabytes(rank.activations),
        gigabytes(rank.reserve) if pool.share else "-",
        gigabytes(pool.kv_cache_bytes) if kv else "-",
        f"{pool.kv_tokens:,}" if kv else "-",
        str(pool.concurrency(pool.max_model_len)) if kv else "-",
        gigabytes(pool.host_bytes),
    ]


def _holdings(report: Report) -> str:
    """Each pool's weights by part."""
    lines = []
    for pool in report.pools:
        rank = pool.heaviest
        parts = [f"{part} {gigabytes(num)}" for part, num in rank.weights.items() if num >= 1e6]
        parts += [f"scales {gigabytes(rank.scales)}"] if rank.scales else []
        lines.append(f"a {pool.role} rank holds " + ", ".join(parts or [gigabytes(rank.weight_bytes)]))
    return "\n".join(lines)


def _estimate_table(report: Report) -> str:
    found = estimates(report)
    if found is None:
        return ""
    fractions = f"{speed.COMPUTE_FRACTION:.0%} of peak FLOPs, {speed.BANDWIDTH_FRACTION:.0%} of bandwidth"
    ttft = [["first token of a lone prompt", "at best"], *([w, f"{1e3 * s:,.0f} ms"] for w, s in found.ttft_s)]
    tpot = [[f"sequences of {found.context:,} tokens", "per token", "tokens/s of a replica"]]
    tpot += [[str(batch), f"{1e3 * s:,.1f} ms", f"{batch / s:,.0f}"] for batch, s in found.tpot_s]
    return f"rooflines at {fractions}; no queue, no network:\n{_table(ttft)}\n\n{_table(tpot)}"


def _configuration(report: Report) -> str:
    """YAML for `serve`, where a configuration can say it."""
    s = report.setting
    if not (report.fits and report.configs) or not _is_servable(s):
        return ""
    kv = min(p.kv_cache_bytes for p in report.pools if p.kv_layout is not None) // MIB
    lines = ["models:", f"  - name: ernie-{report.title}" if "/" not in report.title else "  - name: my-model"]
    lines += [f"    path: {report.title if '/' in report.title else '/models/FOLDER'}", "    pools:"]
    for p in report.configs:
        split = "" if p.dims.world == 1 else f", tp: {p.tp}, dp: {p.dp}"
        lines.append(
            f"      - {{role: {p.role}, num_replicas: {p.num_replicas}, num_cpus: {p.num_cpus:g}, num_gpus: {p.num_gpus:g}{split}}}"
        )
    e = s.engine
    if s.weights.is_quantised:
        lines.append(f"    quantization: {s.weights.name}")
    lines += [
        "    engine:",
        f"      block_size: {e.block_size}",
        f"      kv_cache_bytes: {kv}MiB",
        f"      max_batch_tokens: {e.max_batch_tokens}",
        f"      max_num_seqs: {e.max_num_seqs}",
        f"      max_model_len: {e.max_model_len}",
        *([f"      kv_dtype: {s.kv}"] if s.kv in SCALE_BYTES else []),
    ]
    return "\n".join(lines)


def _is_servable(setting: Setting) -> bool:
    """Whether a configuration can ask for this: KV of the model's own type, or in 8 bits."""
    own = setting.weights.name if not setting.weights.is_quantised else setting.model.dtype
    return setting.kv == own or setting.kv in SCALE_BYTES


def _notes(report: Report) -> Iterable[str]:
    if report.num_idle:
        yield f"note: {report.num_idle} GPUs are left over: no further gang can be made of them"
    if report.fits and not _is_servable(report.setting):
        yield "note: `serve` keeps KV in the weights' type, or in 8 bits; other types can be planned only"
    narrow = [report.setting.weights.name] if report.setting.weights.is_quantised else []
    narrow += [f"{report.setting.kv} KV"] if report.setting.kv in SCALE_BYTES else []
    if narrow and report.setting.gpu is not None:
        yield f"note: GPUs unpack {' and '.join(narrow)} in each step: this saves memory, and costs time"


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """All numbers; bytes and seconds."""
    return {"fits": all(r.fits for r in reports), "models": [_model_json(r) for r in reports]}


def _model_json(report: Report) -> dict[str, Any]:
    s, found = report.setting, estimates(report)
    return {
        "model": report.title,
        "weights": s.weights.name,
        "kv": s.kv,
        "gpu": None if s.gpu is None else s.gpu.name,
        "num_gpus": report.num_gpus or _gpus(report),
        "num_idle_gpus": report.num_idle,
        "fits": report.fits,
        "problem": report.problem,
        "nearest": [{"change": words, "options": options} for words, options in report.nearest],
        "kv_bytes_per_token": kv_layout(s.model, s.engine.block_size, s.kv, 1).bytes_per_token,
        "pools": [_pool_json(p) for p in report.pools],
        "estimates": None
        if found is None
        else {
            "ttft": [{"prompt": words, "seconds": seconds} for words, seconds in found.ttft_s],
            "context": found.context,
            "tpot": [{"batch": batch, "seconds": seconds} for batch, seconds in found.tpot_s],
        },
    }


def _pool_json(pool: PoolSizing) -> dict[str, Any]:
    return {
        "role": pool.role,
        "num_replicas": pool.num_replicas,
        "tp": pool.dims.tp,
        "dp": pool.dims.dp,
        "num_gpus": pool.share,
        "memory_bytes": pool.memory_bytes,
        "kv_cache_bytes": pool.kv_cache_bytes,
        "kv_bytes_per_token": None if pool.kv_layout is None else pool.kv_layout.bytes_per_token,
        "kv_tokens": pool.kv_tokens,
        "max_model_len": pool.max_model_len,
        "num_sequences": pool.concurrency(pool.max_model_len),
        "host_bytes": pool.host_bytes,
        "problem": pool.problem,
        "ranks": [
            {
                "weights": dict(rank.weights),
                "scales": rank.scales,
                "activations": rank.activations,
                "reserve": rank.reserve,
                "total": rank.total,
            }
            for rank in pool.ranks
        ],
    }


def _table(rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
