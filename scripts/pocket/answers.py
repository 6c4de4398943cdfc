"""Asks a checkpoint through the engine that serves it, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ernie_cluster.api.markup import AnswerParser, Markup
from ernie_cluster.api.stops import StopStringFilter
from ernie_cluster.config.quantization import Quantization
from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.model.build import build_vision, torch_dtype
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.weights import load_vision
from ernie_cluster.request import GenerationRequest, RequestFailed, SamplingParams
from ernie_cluster.skills.sample import Sample, ToolCall
from ernie_cluster.skills.tools import read_calls

MAX_TOKENS = 96
_BLOCK_SIZE = 16


class Respondent:
    """A checkpoint that answers greedily; owns its weights.

    Args:
        folder: the checkpoint.
        quantization: see `ModelDeployment`.
        kv_dtype: see `EngineConfig`.
    """

    def __init__(
        self, folder: Path, quantization: Literal["auto", Quantization] = "auto", kv_dtype: str = "auto"
    ) -> None:
        self.processor = ChatProcessor.from_folder(folder, served_name="pocket")
        config = self.processor.config
        cpu = torch.device("cpu")
        self._vision = build_vision(config, dtype=torch_dtype(config.dtype), device=cpu)
        load_vision(self._vision, config, Checkpoint(folder))
        runner = Runner.load(str(folder), config, "mixed", dtype=config.dtype, device=cpu, num_blocks=4096, block_size=_BLOCK_SIZE, quantization=quantization, kv_dtype=kv_dtype)  # fmt: skip
        settings = WorkerSettings(
            block_size=_BLOCK_SIZE, max_batch_tokens=2048, max_num_seqs=64, enable_prefix_cache=False,
            reserve_output_tokens=8, lease_timeout_s=3600.0, piece_bytes=1 << 20, can_encode=True,
        )  # fmt: skip
        self._tokens: dict[str, list[int]] = {}
        self._worker = Worker(runner, config, settings, self._take)
        self._numbers = itertools.count()

    def ask(self, samples: Sequence[Sample]) -> list[tuple[str, list[ToolCall], str]]:
        """(content, tool calls, reasoning) of the reply to each sample."""
        requests = [self._request(sample) for sample in samples]
        for request in requests:
            self._worker.open_prefill(request, 0, None)
            self._give_embeds(request)
        while self._worker.engine.step():
            pass
        return [self._read(s, self._tokens.pop(r.request_id)) for s, r in zip(samples, requests, strict=True)]

    def _request(self, sample: Sample) -> GenerationRequest:
        request = self.processor.chat(
            sample.wire_messages(),
            request_id=f"r{next(self._numbers)}",
            sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
            tools=sample.tools or None,
            enable_thinking=sample.enable_thinking,
        )
        self._tokens[request.request_id] = []
        return request

    @torch.inference_mode()
    def _give_embeds(self, request: GenerationRequest) -> None:
        engine = self._worker.engine
        with engine.lock:
            sequence = engine.sequences[request.request_id]
            for i, media in enumerate(request.media):
                assert media.patches is not None
                sequence.embeds[i] = self._vision(torch.from_numpy(media.patches), [media.grid_thw])

    def _take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, RequestFailed):
                raise outcome.error
            self._tokens[outcome.request_id] += outcome.token_ids

    def _read(self, sample: Sample, tokens: list[int]) -> tuple[str, list[ToolCall], str]:
        text = self.processor.tokenizer.decode(tokens)
        markup = Markup("open" if sample.enable_thinking else "none", has_tools=bool(sample.tools))
        parser = AnswerParser(markup, StopStringFilter(()))
        pieces = parser.push(text)
        pieces.add(parser.flush())
        return (
            pieces.content,
            read_calls([(call.name or "", call.arguments) for call in pieces.calls]),
            pieces.reasoning,
        )
