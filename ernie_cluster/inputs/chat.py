"""From what a client wrote to a `GenerationRequest`: template, tokens, pictures, positions, limits.

One processor per served model. Everything here runs on CPU and blocks, so the API calls it from a worker thread.
Knows no wire format beyond OpenAI-shaped messages, and no model beyond its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.errors import CheckpointError, ContextTooLong, InvalidRequest
from ernie_cluster.inputs.frames import VideoConfig
from ernie_cluster.inputs.images import PixelConfig, PreparedMedia
from ernie_cluster.inputs.messages import (
    MapMedia,
    Message,
    Picture,
    PromptLimits,
    Settings,
    check_text,
    read_messages,
)
from ernie_cluster.inputs.positions import mrope_positions
from ernie_cluster.inputs.template import ChatTemplate, Segment
from ernie_cluster.inputs.thumbnail import thumbnail_url
from ernie_cluster.inputs.tokenizer import IncrementalDecoder, Tokenizer, end_token_ids
from ernie_cluster.request import GenerationRequest, MediaInput, SamplingParams, ThinkingLimit

_TAIL_TOKENS = 16
"""Enough for `<think>` letter by letter, and some white space behind it."""


@dataclass(frozen=True, slots=True, eq=False)
class ChatProcessor:
    """Makes requests for one served model; immutable, and safe to share between threads."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    pixels: PixelConfig
    video: VideoConfig
    served_name: str
    """The model's name in requests."""
    max_model_len: int
    """Most tokens of prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    limits: PromptLimits = PromptLimits()
    map_media: MapMedia = map

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        served_name: str,
        max_model_len: int | None = None,
        limits: PromptLimits | None = None,
        map_media: MapMedia = map,
    ) -> ChatProcessor:
        """Read everything but weights from a checkpoint folder.

        Args:
            folder: with config.json, tokenizer.json and what else the checkpoint ships.
            served_name: the model's name in requests.
            max_model_len: most tokens of prompt and answer together; None takes the model's own limit.
            limits: see `PromptLimits`, whose defaults None takes.
            map_media: see `MapMedia`.

        Raises:
            CheckpointError: a file is absent or unusable, or two files contradict each other.
        """
        config = ModelConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
        pixels = PixelConfig.from_folder(folder)
        vision = config.vision
        if vision and (vision.patch_size, vision.spatial_merge_size) != (pixels.patch_size, pixels.merge_size):
            raise CheckpointError(
                f"{folder}: config.json has patches of {vision.patch_size} merged by {vision.spatial_merge_size}, the "
                f"preprocessor of {pixels.patch_size} merged by {pixels.merge_size}; they must agree"
            )
        template = ChatTemplate.from_folder(
            folder, control_texts=tokenizer.control_texts, is_multimodal=config.is_multimodal
        )
        return cls(
            config=config,
            tokenizer=tokenizer,
            template=template,
            pixels=pixels,
            video=VideoConfig.from_folder(folder),
            served_name=served_name,
            max_model_len=max_model_len or config.text.max_position_embeddings,
            eos_token_ids=end_token_ids(folder, tokenizer),
            limits=limits or PromptLimits(),
            map_media=map_media,
        )

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows lie in [0, vocab_size)."""
        return self.config.text.vocab_size

    def detokenizer(self) -> IncrementalDecoder:
        """A new decoder, for one answer."""
        return IncrementalDecoder(self.tokenizer)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        return self.tokenizer.token_bytes(token_id)

    def picture(self, given: Message, *, cache_salt: bytes = b"") -> MediaInput:
        """A picture by itself, prepared as for a prompt; raises InvalidRequest.

        Args:
            given: see `Picture.of`.
            cache_salt: whose it is.
        """
        (prepared,) = self.map_media(self._settings(cache_salt), [Picture.of(given, "image_url")])
        return _placed(prepared, 0)

    def thumbnail(self, media: MediaInput) -> str:
        """See `thumbnail_url`."""
        return thumbnail_url(media, self.pixels)

    def opens_reasoning(self, request: GenerationRequest) -> bool:
        """Whether the prompt ends where the model's reasoning begins, so that the answer goes on inside it.

        Read off the prompt itself: whether a model thinks is its template's decision as much as the client's.
        """
        tail = self.tokenizer.decode(request.prompt_token_ids[-_TAIL_TOKENS:].tolist(), skip_special=False)
        return tail.rstrip().endswith("<think>")

    def thinking_limit(self, max_tokens: int) -> ThinkingLimit:
        """The limit that ends the reasoning after so many tokens, with the line breaks of the family's templates."""
        breaks, mark, more = (tuple(self.tokenizer.encode(t, allow_special=True)) for t in ("\n", "</think>", "\n\n"))
        return ThinkingLimit(max_tokens, mark, breaks + mark + more)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        request_id: str,
        sampling: SamplingParams,
        enable_thinking: bool | None = None,
        tools: Sequence[Message] | None = None,
        timeout_s: float = 600.0,
        cache_salt: bytes = b"",
        add_generation_prompt: bool = True,
    ) -> GenerationRequest:
        """Request for the next turn of a conversation.

        Args:
            messages: OpenAI-shaped and type-checked; `content` is a string, None, or a list of `text`, `image_url`
                and `video_url` parts, the latter two with data URLs, or with the file itself as `content`.
            request_id, sampling, timeout_s, cache_salt: go into the request as they are.
            enable_thinking: None leaves it to the template.
            tools: OpenAI-shaped definitions, for the template.
            add_generation_prompt: see `ChatTemplate.render`.

        Raises:
            InvalidRequest: something cannot be served; `param` names it, as in `messages[2].content[1].image_url.url`.
            ContextTooLong: the prompt alone does not fit.
        """
        part_types = self.template.part_types if self.config.is_multimodal else {}
        rendered, unprepared = read_messages(messages, self.limits, part_types=part_types, model=self.served_name)
        check_text(tools, "tools", self.limits.max_prompt_chars)
        segments = self.template.render(
            rendered,
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            max_chars=self.limits.max_prompt_chars,
        )
        prepared = list(self.map_media(self._settings(cache_salt), unprepared))
        ids, media = self._fill_in(segments, prepared)
        self._check_length(len(ids), sampling.max_tokens, "messages")
        return self._request(request_id, ids, media, sampling, timeout_s, cache_salt)

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str,
        sampling: SamplingParams,
        timeout_s: float = 600.0,
        cache_salt: bytes = b"",
    ) -> GenerationRequest:
        """Request that continues a raw prompt.

        A raw prompt is in the client's hands altogether: spellings of control tokens become those tokens.

        Raises:
            InvalidRequest: empty, an id outside the vocabulary, or placeholders of pictures.
            ContextTooLong: the prompt alone does not fit.
        """
        if isinstance(prompt, str):
            check_text(prompt, "prompt", self.limits.max_prompt_chars)
            ids = self.tokenizer.encode(prompt, allow_special=True)
        else:
            ids = list(prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty; send at least one token", "prompt")
        self._check_length(len(ids), sampling.max_tokens, "prompt")
        self._check_ids(ids)
        return self._request(request_id, ids, (), sampling, timeout_s, cache_salt)

    def _settings(self, cache_salt: bytes) -> Settings:
        return Settings(self.pixels, self.video, self.limits, self.max_model_len, cache_salt)

    def _fill_in(
        self, segments: Sequence[Segment], prepared: Sequence[PreparedMedia]
    ) -> tuple[list[int], tuple[MediaInput, ...]]:
        """Encode the text, and put as many placeholder tokens as each picture or video needs."""
        kinds = [segment.kind for segment in segments if segment.kind in ("image", "video")]
        if kinds != [media.kind for media in prepared]:
            raise InvalidRequest(
                f"the model's chat template has {len(kinds)} places for {len(prepared)} pictures and videos; "
                "move them to user messages",
                "messages",
            )
        ids: list[int] = []
        media: list[MediaInput] = []
        waiting = iter(prepared)
        for segment in segments:
            if segment.kind in ("text", "literal"):
                ids += self.tokenizer.encode(segment.text, allow_special=segment.kind == "text")
            else:
                media.append(_placed(next(waiting), len(ids)))
                ids += [self._patch_id(media[-1])] * media[-1].num_tokens
        return ids, tuple(media)

    def _patch_id(self, media: MediaInput) -> int:
        tokens = self.config.token_ids
        assert tokens is not None, "a text-only model got a picture"
        return tokens.image_patch if media.kind == "image" else tokens.video_patch

    def _check_length(self, num_tokens: int, max_tokens: int, param: str) -> None:
        room = self.max_model_len - num_tokens
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {num_tokens} tokens; {self.served_name} holds {self.max_model_len} with the answer; "
                "shorten the prompt or send smaller pictures",
                param,
            )
        if max_tokens > room:
            raise InvalidRequest(
                f"{num_tokens} prompt tokens and max_tokens {max_tokens} exceed the context of {self.max_model_len}; "
                f"ask for at most {room}",
                "max_tokens",
                "context_length_exceeded",
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        tokens = self.config.token_ids
        placeholders = () if tokens is None else (tokens.image_patch, tokens.video_patch)
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary; send 0 to {self.vocab_size - 1}", f"prompt[{i}]"
                )
            if token_id in placeholders:
                raise InvalidRequest(
                    f"token {i} of the prompt stands for a picture, which completions do not take; use chat", "prompt"
                )

    def _request(
        self,
        request_id: str,
        ids: Sequence[int],
        media: tuple[MediaInput, ...],
        sampling: SamplingParams,
        timeout_s: float,
        cache_salt: bytes,
    ) -> GenerationRequest:
        merge, temporal_merge = self.pixels.merge_size, self.pixels.temporal_merge_size
        return GenerationRequest(
            request_id=request_id,
            model=self.served_name,
            prompt_token_ids=np.array(ids, np.int32),
            positions=mrope_positions(len(ids), media, spatial_merge=merge, temporal_merge=temporal_merge),
            sampling=sampling,
            media=media,
            eos_token_ids=self.eos_token_ids,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
        )


def _placed(picture: PreparedMedia, offset: int) -> MediaInput:
    return MediaInput(
        kind=picture.kind,
        media_hash=picture.media_hash,
        grid_thw=picture.grid_thw,
        offset=offset,
        num_tokens=picture.num_tokens,
        patches=picture.patches,
    )
