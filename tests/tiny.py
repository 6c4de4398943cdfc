"""A tiny checkpoint and engines around it, shared by the tests of model, engine and actors."""

from __future__ import annotations

import functools
import itertools
import queue
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.grammar.compile import Compiler, Vocabulary
from ernie_cluster.inputs.positions import mrope_positions
from ernie_cluster.inputs.tokenizer import Tokenizer
from ernie_cluster.model.build import Role, build_decoder, build_vision
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.vision import VisionEncoder
from ernie_cluster.model.weights import load_decoder, load_vision
from ernie_cluster.request import (
    GenerationRequest,
    MediaInput,
    RequestFailed,
    SamplingParams,
    TokenLogprobs,
    hash_media,
)

BLOCK_SIZE = 4
CPU = torch.device("cpu")
_numbers = itertools.count()


@functools.cache
def tiny_folder(form: str = "flat", tie: bool = True) -> str:
    """Folder of a tiny float32 checkpoint, written once per process."""
    folder = Path(tempfile.mkdtemp(prefix="ernie-tiny-")) / form
    write_tiny_checkpoint(folder, form=form, tie=tie)  # type: ignore[arg-type]
    return str(folder)


@functools.cache
def tiny_config() -> ModelConfig:
    return ModelConfig.from_folder(tiny_folder())


@functools.cache
def tiny_decoder(role: Role = "mixed", kv_dtype: str = "auto") -> torch.nn.Module:
    decoder = build_decoder(tiny_config(), role, dtype=torch.float32, device=CPU, kv_dtype=kv_dtype)
    load_decoder(decoder, tiny_config(), Checkpoint(tiny_folder()), has_vision_experts=role != "decode")
    return decoder


@functools.cache
def tiny_vision() -> VisionEncoder:
    encoder = build_vision(tiny_config(), dtype=torch.float32, device=CPU)
    load_vision(encoder, tiny_config(), Checkpoint(tiny_folder()))
    return encoder


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder())


@functools.cache
def tiny_compiler() -> Compiler:
    return Compiler(Vocabulary(tiny_tokenizer().text_bytes(tiny_config().text.vocab_size), (2,)))


class Outcomes:
    """Collects what a worker emits, by request."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Outcome] = queue.Queue()
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.reasons: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}

    def __call__(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._queue.put(outcome)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take in one outcome (waiting up to `timeout_s`) and all that are there; False when nothing came."""
        try:
            self._take(self._queue.get(timeout=timeout_s) if timeout_s else self._queue.get_nowait())
            while True:
                self._take(self._queue.get_nowait())
        except queue.Empty:
            return not self._queue.empty()

    def wait_for(self, request_ids: Iterable[str], timeout_s: float = 60.0) -> None:
        """Until each of them has ended."""
        for request_id in request_ids:
            while request_id not in self.reasons and request_id not in self.errors:
                self._take(self._queue.get(timeout=timeout_s))

    def _take(self, outcome: Outcome) -> None:
        if isinstance(outcome, RequestFailed):
            assert outcome.request_id not in self.reasons, "a request ended twice"
            self.errors[outcome.request_id] = outcome.error
            return
        got = self.tokens.setdefault(outcome.request_id, [])
        assert outcome.index == len(got), f"index {outcome.index} after {len(got)} tokens"
        got.extend(outcome.token_ids)
        self.logprobs.setdefault(outcome.request_id, []).extend(outcome.logprobs)
        if outcome.finish_reason is not None:
            assert outcome.request_id not in self.reasons, "a request ended twice"
            self.reasons[outcome.request_id] = outcome.finish_reason


def make_worker(
    role: Role = "mixed", *, num_blocks: int = 256, kv_dtype: str = "auto", **settings: object
) -> tuple[Worker, Outcomes]:
    """A worker on the tiny model; not started."""
    outcomes = Outcomes()
    values: dict[str, object] = {
        "block_size": BLOCK_SIZE,
        "max_batch_tokens": 64,
        "max_num_seqs": 16,
        "enable_prefix_cache": True,
        "reserve_output_tokens": 8,
        "lease_timeout_s": 20.0,
        "piece_bytes": 1 << 20,
        "can_encode": role != "decode",
        **settings,
    }
    runner = Runner.around(tiny_decoder(role, kv_dtype), num_blocks=num_blocks, block_size=BLOCK_SIZE)  # type: ignore[arg-type]
    worker = Worker(runner, tiny_config(), WorkerSettings(**values), outcomes, tiny_compiler)  # type: ignore[arg-type]
    return worker, outcomes


def make_image(seed: int, grid: tuple[int, int, int] = (1, 4, 6), offset: int = 0) -> MediaInput:
    """Random patches of a picture (t = 1) or a video."""
    t, h, w = grid
    patches = np.random.default_rng(seed).integers(0, 256, (t * h * w, 588), dtype=np.uint8)
    kind = "image" if t == 1 else "video"
    return MediaInput(kind, hash_media(kind, grid, patches), grid, offset, max(1, t // 2) * h * w // 4, patches)


def make_request(
    prompt: Iterable[int | MediaInput], request_id: str | None = None, **sampling: object
) -> GenerationRequest:
    """A request from token ids and pictures, which become runs of placeholder tokens between START and END."""
    special = tiny_config().token_ids
    assert special is not None
    ids: list[int] = []
    media: list[MediaInput] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
            continue
        ids.append(special.image_start)
        media.append(MediaInput(item.kind, item.media_hash, item.grid_thw, len(ids), item.num_tokens, item.patches))
        ids.extend([special.image_patch] * item.num_tokens)
        ids.append(special.image_end)
    values: dict[str, object] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id=request_id or f"r{next(_numbers)}",
        model="tiny",
        prompt_token_ids=np.array(ids, dtype=np.int32),
        positions=mrope_positions(len(ids), media),
        sampling=SamplingParams(**values),  # type: ignore[arg-type]
        media=tuple(media),
        eos_token_ids=(2,),
    )


@torch.inference_mode()
def encode(media: MediaInput) -> torch.Tensor:
    """Embeddings of a picture, as the vision replica makes them."""
    return tiny_vision()(torch.from_numpy(media.patches), [media.grid_thw])


def give_embeds(worker: Worker, request: GenerationRequest) -> None:
    """Hand the pictures of an opened request to its worker directly, without a transport."""
    with worker.engine.lock:
        sequence = worker.engine.sequences[request.request_id]
        for i, media in enumerate(request.media):
            if sequence.needs_media(i):
                sequence.embeds[i] = encode(media)
        worker.engine.lock.notify_all()


def run_mixed(worker: Worker, requests: list[GenerationRequest]) -> None:
    """Open requests on a worker that is not started, and step until nothing is left."""
    engine = worker.engine
    for request in requests:
        worker.open_prefill(request, 0, None)
        give_embeds(worker, request)
    while engine.step() or _wait_for_grammars(worker):
        worker.check()


def _wait_for_grammars(worker: Worker) -> bool:
    """Whether sequences waited for their grammars, and have them now."""
    engine = worker.engine
    with engine.lock:
        is_waiting = any(s.constraint is not None and not s.constraint.is_ready for s in engine.sequences.values())
        return is_waiting and engine.lock.wait_for(engine.has_work, 60.0)
