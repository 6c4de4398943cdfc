"""What a decision is about: replicas as they describe themselves, what a request needs, and what it was promised."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.config.experts import ExpertUse
from ernie_cluster.config.pool import Role


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a replica works, in seconds, as it measured. What stands here is a guess for one that has not worked yet:
    the same for all, so that it favours none."""

    chunk_s: float = 0.01
    """A step with tokens of prompts, however few."""
    token_s: float = 0.0002
    """Each of those tokens on top."""
    step_s: float = 0.02
    """A step in which sequences get one token each, however few."""
    sequence_s: float = 0.0005
    """Each of those sequences on top."""
    picture_s: float = 0.01
    """A picture to encode, however small."""
    media_token_s: float = 0.0005
    """Each of its tokens on top."""


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica, as it described itself."""

    replica_id: str
    """The same after a restart."""
    model: str
    role: Role
    node_id: str
    incarnation: str
    """Another after each restart; what was promised of an earlier one is void."""
    is_ready: bool
    is_draining: bool
    """Finishes what it has and takes no more."""
    num_running: int
    num_waiting: int
    waiting_tokens: int
    """Prompt tokens not yet computed; media tokens not yet encoded on a vision replica."""
    free_blocks: int
    """KV blocks that nothing holds, leases, or waits for; what a prefix cache could evict counts as free."""
    total_blocks: int
    """KV blocks in all; 0 on a vision replica, or while not yet known."""
    block_size: int
    """Tokens per KV block."""
    age_s: float = 0.0
    """Seconds since it was taken, at most; a caller that asked for it counts from the asking."""
    experts: ExpertUse | None = None
    """For status pages; None without experts."""
    rates: Rates = Rates()
    max_running: int = 0
    """Sequences that get a token in one step; 0 = no bound is known."""
    token_bytes: int = 0
    """What one token weighs on its way from here: its K and V, on a vision replica a row of embeddings. 0 = not told."""

    @property
    def is_usable(self) -> bool:
        """Whether new work may be sent."""
        return self.is_ready and not self.is_draining


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture or video of a prompt."""

    item: int
    """`short_hash` of its content."""
    end: int
    """One past its last token in the prompt."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request needs."""

    model: str
    num_prompt_tokens: int
    """With one per media token; at least 1."""
    max_tokens: int
    """Most output tokens, at least 1."""
    num_media: int = 0
    """Pictures and videos to encode."""
    media_tokens: int = 0
    """Their tokens in the prompt."""
    chain: tuple[int, ...] = ()
    """`short_hash` of each full block that a prefix cache could cover; the block of the last token never is one."""
    pictures: tuple[Picture, ...] = ()
    """What is to be encoded, in prompt order; empty where nobody knows more than the two numbers above."""
    priority: int = 0
    """Lower is more urgent; above 0 is batch work, which may wait for a place."""
    tenant: str = ""
    """Whose request it is; tenants share what there is."""
    timeout_s: float = 600.0
    """When its answer must be finished, from now."""

    def __post_init__(self) -> None:
        assert self.num_prompt_tokens >= 1, f"num_prompt_tokens = {self.num_prompt_tokens}"
        assert self.max_tokens >= 1, f"max_tokens = {self.max_tokens}"
        assert 0 <= self.media_tokens <= self.num_prompt_tokens, f"media_tokens = {self.media_tokens}"


@dataclass(frozen=True, slots=True)
class Promise:
    """What one decision takes of one replica."""

    replica_id: str
    blocks: int = 0
    """KV blocks to be leased."""
    tokens: int = 0
    """Prompt tokens to be computed."""
    media_tokens: int = 0
    """Media tokens to be encoded."""
    items: tuple[int, ...] = ()
    """What its cache will hold then, and does not yet: links of the demand's chain, or pictures."""
