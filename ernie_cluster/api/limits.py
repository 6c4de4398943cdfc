"""Bounds that the API holds a request to before any work is done for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ernie_cluster.errors import ConfigError

MAX_UNREAD_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """How much one client, and all clients together, may ask for."""

    max_headers: int = 100
    max_header_bytes: int = 64 * 2**10
    """All names and values together."""
    max_body_bytes: int = 32 * 2**20
    """Largest request body; pictures travel in it as base64, a third larger than the files."""
    max_bodies_bytes: int = 2**30
    """Of the bodies of all requests that are being read or prepared; who brings more is told to come back."""
    body_timeout_s: float = 60.0
    """A body must have arrived whole within this."""
    max_json_depth: int = 32
    """Deepest nesting of lists and objects."""
    max_json_items: int = 500_000
    """Most `[`, `{` and `,` in a body: a list of three bytes costs 64 bytes once it is parsed."""
    max_messages: int = 1024
    max_prompts: int = 64
    """Most prompts in one completion request."""
    max_tools: int = 128
    max_n: int = 8
    """Most answers per prompt."""
    max_stop: int = 16
    """Most stop strings."""
    max_grammar_bytes: int = 65_536
    """Longest schema, regular expression or list of choices that an answer must fit."""
    max_tool_rounds: int = 6
    """Times that one answer may call tools that run here, and go on."""
    max_tool_pixels: int = 16_000_000
    """Of all pictures together, as the model sees them, that these tools may add to one answer's prompt."""
    default_max_tokens: int | None = None
    """Answer length when the client names none, all rounds together; never more than the rest of the context, which None
    gives to chats. Texts get 256 then, for few of them come to an end by themselves."""
    request_timeout_s: float = 600.0
    """From the request's first byte to the answer's last."""
    client_idle_timeout_s: float = 60.0
    """Longest that one write may wait for the client to read; then the request ends, and its connection."""
    max_unread_tokens: int = MAX_UNREAD_TOKENS
    """Most that one answer may hold that its client has not taken; beyond it the request ends."""
    keep_alive_s: float | None = 30.0
    """A stream that is silent for so long sends a comment, so that no proxy takes it for dead; None sends none."""
    preprocess_threads: int = 2
    """Threads that parse bodies, decode pictures and tokenise."""
    media_threads: int = 8
    """Further ones for requests with pictures, which decode them, or wait for the processes that do."""
    max_preparing: int = 256
    """Requests waiting for those threads or on them; the next one is told to come back."""
    max_in_flight: int = 1024
    """Requests being read, prepared or answered; the next one is told to come back."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(f"api.{field.name} is {value}; it must be above 0")
