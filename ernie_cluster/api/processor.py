"""What the API needs of the input side: numbers from messages, and text from numbers.

The API is handed one `Processor` per served model. It imports neither tokenizer nor image code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ernie_cluster.request import GenerationRequest, MediaInput, SamplingParams, ThinkingLimit


class Detokenizer(Protocol):
    """Text of one answer, token by token; holds back characters that are not complete yet."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that these tokens complete; may be empty."""
        ...

    def flush(self) -> str:
        """Text still held back, at the end of the answer."""
        ...


class Processor(Protocol):
    """Turns one model's input into a `GenerationRequest`. Methods are CPU work and are called from worker threads."""

    @property
    def served_name(self) -> str:
        """What clients put into `model`."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids lie in [0, vocab_size)."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer and are no part of its text."""
        ...

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        request_id: str,
        sampling: SamplingParams,
        enable_thinking: bool | None,
        tools: list[dict[str, Any]] | None,
        timeout_s: float,
        add_generation_prompt: bool = True,
        cache_salt: bytes = b"",
    ) -> GenerationRequest:
        """Apply the chat template.

        Args:
            messages: OpenAI's form; content is a string, None, or parts of type `text`, `image_url` and `video_url`.
                What was fetched stands as `content` beside its `url`, and where a tool zoomed in or found it, so do
                `regions` and `max_pixels`.
            request_id: unique among all requests.
            sampling: carried over; its `max_tokens` is 1, the caller settles it when the prompt's length is known.
            enable_thinking: True or False where the model can think aloud or not; None leaves it to the template.
            tools: function definitions for the template.
            timeout_s: the request's deadline.
            add_generation_prompt: let the prompt end where an answer begins, not where the last message ends.
            cache_salt: whose request this is, see `GenerationRequest`.

        Raises:
            InvalidRequest: a picture or message that cannot be used; ContextTooLong: the prompt alone is too long.
        """
        ...

    def completion(
        self, prompt: str | list[int], *, request_id: str, sampling: SamplingParams, timeout_s: float
    ) -> GenerationRequest:
        """Take a prompt as it is, text or token ids; errors as in `chat`, and InvalidRequest for a foreign token id."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 that a token stands for, maybe a part of a character; b"" for an id that is no token."""
        ...

    def picture(self, given: dict[str, Any], *, cache_salt: bytes = b"") -> MediaInput:
        """A picture by itself, as it would stand in a prompt.

        Args:
            given: an `image_url` as in messages of `chat`.
            cache_salt: as there.

        Raises:
            InvalidRequest: it cannot be used.
        """
        ...

    def thumbnail(self, media: MediaInput) -> str:
        """A small picture for people, of a picture that the model sees; a data URL."""
        ...

    def opens_reasoning(self, request: GenerationRequest) -> bool:
        """Whether the prompt ends where the model's reasoning begins, so that the answer goes on inside it."""
        ...

    def thinking_limit(self, max_tokens: int) -> ThinkingLimit:
        """The limit that ends the reasoning as the model's template does."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A new one, for one answer."""
        ...
