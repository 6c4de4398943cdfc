"""Whether the device's kernels say what plain torch says, before anybody asks how fast they say it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import torch

from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.graphs import CudaRecorder, GraphedDecoder
from ernie_cluster.engine.runner import Runner
from ernie_cluster.model.cuda_ops import CudaOps, fused, plainly
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.step import KVCache
from gpu_parts import models
from gpu_parts.report import Row

_BLOCK = 256
_ROOT = Path(__file__).parents[3]

STEPS = ([(20, 20), (300, 300)], [(1, 21), (300, 600)], [(1, 22), (1, 601)])
"""(tokens in the step, tokens afterwards) of two sequences: prompts of one block and of two, then a decode beside a later
chunk, then only decodes."""
_WIDTH = 3


class PlainAttention(TorchOps):
    """`TorchOps.attention` as `CudaOps` takes it; for float32, which the GPU's attention does not know."""

    __call__ = TorchOps.attention

    def check(self, block_size: int) -> None:
        pass


def with_ops(decoder: Decoder, ops: TorchOps, dtype: torch.dtype) -> Decoder:
    """A copy that runs on other kernels."""
    twin = copy.deepcopy(decoder)
    for module in twin.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    router = {id(p) for name, p in twin.named_parameters() if ".router." in name}  # float32 always
    for p in twin.parameters():
        p.data = p.data if id(p) in router else p.data.to(dtype)
    return twin


@torch.inference_mode()
def logits_of(decoder: Decoder) -> list[torch.Tensor]:
    """Of each step, float32 on the host; the cache goes from one to the next."""
    text, embed = decoder.config, decoder.embed
    kv = KVCache.allocate(
        text.num_layers, 2 * _WIDTH + 1, _BLOCK, text.num_kv_heads, text.head_dim, embed.dtype, embed.device
    )
    steps = (
        models.step_of(parts, _BLOCK, embed.device, vocab_size=text.vocab_size, width=_WIDTH, seed=i)
        for i, parts in enumerate(STEPS)
    )
    return [decoder(step, kv).cpu() for step in steps]


def error_of(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest over the steps, relative to the logits' spread."""
    return max(float((g - e).abs().max() / e.std()) for g, e in zip(got, exact, strict=True))


def in_float32(device: torch.device) -> Row:
    """Grouped experts and small operations, fused on a GPU; raises AssertionError when one is wrong."""
    decoder = models.random_decoder(models.small_config(), "decode", torch.bfloat16, device)
    ops = CudaOps(PlainAttention(), fused if device.type == "cuda" else plainly)
    got, exact = (logits_of(with_ops(decoder, o, torch.float32)) for o in (ops, TorchOps()))
    return _verdict("float32, experts and small operations beside plain torch", error_of(got, exact), 2e-3)


def in_bfloat16(device: torch.device) -> Row:
    """Everything that a GPU runs, beside what plain torch makes of the same weights in float32."""
    decoder = models.random_decoder(models.small_config(), "decode", torch.bfloat16, device)
    exact = logits_of(with_ops(decoder, TorchOps(), torch.float32))
    plain = error_of(logits_of(with_ops(decoder, TorchOps(), torch.bfloat16)), exact)
    what = f"bfloat16, attention too, where plain torch is off by {plain:.2g}"
    return _verdict(what, error_of(logits_of(decoder), exact), 2 * plain + 0.02)


def _verdict(what: str, error: float, bound: float) -> Row:
    assert error <= bound, f"{what}: off by {error:.3g} of the logits' spread, at most {bound:.3g} is rounding"
    return Row(f"check, {what}", f"off by {error:.2g} of the spread", note="ok")


@torch.inference_mode()
def graphs(device: torch.device, num_steps: int = 16) -> Row:
    """Greedy tokens of padded decode steps, as graphs and without: the same kernels, so the same tokens."""
    decoder = models.random_decoder(models.small_config(), "decode", torch.bfloat16, device)
    buckets = DecodeBuckets((2, 4), width=2)
    tokens: list[list[list[int]]] = []
    for is_graphed in (False, True):
        text = decoder.config
        kv = KVCache.allocate(
            text.num_layers, 9, _BLOCK, text.num_kv_heads, text.head_dim, torch.bfloat16, device
        )  # fmt: skip
        graphed = GraphedDecoder(decoder, kv, buckets, CudaRecorder()) if is_graphed else None
        runner = Runner(decoder, kv, Crew(), graphed)
        said = []
        for i in range(num_steps):
            batch = 4 if i % 3 else 2
            step = models.step_of(
                [(1, 250 + i)] * batch, _BLOCK, device, vocab_size=text.vocab_size, width=buckets.width, seed=i
            )
            said.append(runner.run(step, [models.GREEDY] * batch).tokens)
        tokens.append(said)
    assert tokens[0] == tokens[1], f"graphs say {tokens[1]}, the decoder itself {tokens[0]}"
    return Row("check, tokens of graphs beside eager steps", f"{num_steps} steps equal", note="ok")


def marked_tests() -> Row:
    """Everything in tests/ that is marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"tests marked gpu fail:\n{done.stdout[-4000:]}"
    return Row("check, tests marked gpu", done.stdout.strip().splitlines()[-1].strip("= "), note="ok")
