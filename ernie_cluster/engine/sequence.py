"""One request in flight on one engine: its tokens, blocks and place in life.

    WAITING ──► RUNNING ──► FINISHED
       ▲  └─preempted─┘
       HANDING_OVER: prompt done here, KV on its way to a decode replica; blocks pinned, nothing to compute

Knows no scheduler; holds no tensor but the embeddings that came for it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from torch import Tensor

from ernie_cluster.engine.grammar import Constraint
from ernie_cluster.request import FinishReason, GenerationRequest, Span


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    HANDING_OVER = "handing over"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one request."""

    request: GenerationRequest
    hashes: list[bytes]
    """Content hash of each full block of the prompt, and of the answer where it is computed; none without a prefix cache."""
    blocks: list[int] = field(default_factory=list)
    """Logical block index -> block id."""
    num_computed: int = 0
    """Tokens whose K and V are in the blocks."""
    num_cached: int = 0
    """Prompt tokens that came from the prefix cache when the request was taken in."""
    is_prefill_only: bool = False
    """The first token ends the work here; decode goes on elsewhere."""
    is_answering: bool = False
    """Its first token is out, and the others follow here; also while it is computed again."""
    epoch: int = 0
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list)
    """Prompt and output."""
    is_aborted: bool = False
    turn: int = 0
    """Smaller for those that a scheduler took in before; a preempted sequence keeps its own."""
    arrived_s: float = 0.0
    """Engine clock."""
    deadline_s: float = float("inf")
    spans: list[Span] = field(default_factory=list)
    embeds: dict[int, Tensor] = field(default_factory=dict)
    """Media index -> embeddings [tokens, hidden]."""
    arriving: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Media index -> (embeddings so far, bool [tokens]: the rows that have come)."""
    awaited_media: frozenset[int] = frozenset()
    """Pictures whose embeddings were asked for; the prefix cache covered the others."""
    first_scheduled_s: float | None = None
    prefill_done_s: float | None = None
    read_tokens: int = 0
    """Computed here in chunks, of the prompt or replay that is under way."""
    read_s: float = 0.0
    """Their share of the steps."""
    num_preemptions: int = 0
    num_published: int = 0
    constraint: Constraint | None = None
    """Of a request with a grammar; made when an engine takes the sequence in."""

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = [*self.request.prompt_token_ids.tolist(), *self.request.output_token_ids]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Exactly one token, the newest, has no K and V yet. A replay that is handed over is a prompt to its end."""
        return self.num_uncomputed == 1 and self.num_computed >= self.num_prompt and not self.is_prefill_only

    @property
    def num_ready(self) -> int:
        """Tokens that could be computed next: up to the first picture whose embeddings have not come.

        None while its grammar is not there yet.
        """
        if self.constraint is not None and not self.constraint.is_ready:
            return 0
        for i, media in enumerate(self.request.media):
            if media.end > self.num_computed and i not in self.embeds:
                return max(0, media.offset - self.num_computed)
        return self.num_uncomputed

    def needs_media(self, index: int) -> bool:
        """Whether the embeddings of a picture are still wanted; not so when the prefix cache covers it."""
        return self.request.media[index].end > self.num_computed

    @property
    def can_replay(self) -> bool:
        """Whether all pictures are here, or on their way, to compute the whole prompt again without a cache."""
        return all(i in self.embeds or i in self.awaited_media for i in range(len(self.request.media)))

    @property
    def forced_token(self) -> int | None:
        """The next output token, where it is not the model's to choose."""
        limit = self.request.sampling.thinking
        return None if limit is None else limit.next_token(self.tokens, self.num_prompt)

    def append(self, token: int) -> FinishReason | None:
        """Add an output token; the reason when it was the last one."""
        self.tokens.append(token)
        sampling = self.request.sampling
        if self.constraint is not None and (token in self.request.eos_token_ids or self.constraint.advance(token)):
            return FinishReason.STOP
        is_end = token in sampling.stop_token_ids or (not sampling.ignore_eos and token in self.request.eos_token_ids)
        if is_end and self.num_output > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output >= sampling.max_tokens else None

    def media_slice(self, start: int, end: int) -> tuple[list[int], list[Tensor]]:
        """Token indices in [start, end) that take an embedding, and the embeddings."""
        rows: list[int] = []
        parts: list[Tensor] = []
        for i, media in enumerate(self.request.media):
            first, last = max(start, media.offset), min(end, media.end)
            if first < last:
                rows.extend(range(first, last))
                parts.append(self.embeds[i][first - media.offset : last - media.offset])
        return rows, parts
