"""Request bodies of OpenAI's chat and text completions; those of other APIs are translated into the first.

Bounds that need the configuration or the model are checked in `prepare.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, SkipValidation, Tag

from ernie_cluster.api.formats import Choices, Regex, ResponseFormat, StructuredOutputs, ToolChoice
from ernie_cluster.api.tool_schemas import AnyTool, check_tool_names
from ernie_cluster.api.unsupported import UNSUPPORTED
from ernie_cluster.api.validate import Strict, Unread, list_tag, refuse_unsupported, shortened, type_tag, validated
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.frames import MAX_FPS

MediaUrl = Annotated[str, Field(pattern="^([Dd][Aa][Tt][Aa]:|[Hh][Tt][Tt][Pp][Ss]?://|[Ff][Ii][Ll][Ee]://)")]
"""Whether it is fetched at all is up to the operator, see `inputs/fetch.py`."""
Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Priority = Annotated[int, Field(ge=-100, le=100)]
Rate = Annotated[float, Field(gt=0, le=MAX_FPS)]
Name = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
B = TypeVar("B", bound="GenerationBody")


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class TemplateOptions(Strict):
    """What a client may tell the chat template."""

    enable_thinking: bool | None = None


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class GenerationBody(Strict):
    """What both routes share. None means: not given."""

    model: str
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """OpenAI's newer name; counts before `max_tokens`."""
    min_tokens: Token | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    """Token id, as decimal digits, to what is added to its logit. A zero before them would be a second name of a token."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[StopString],
        Field(fail_fast=True),
        BeforeValidator(_as_list, json_schema_input_type=StopString | list[StopString] | None),
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[dict[str, Any] | str | None, SkipValidation] = None
    """A JSON schema, or its text."""
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    user: str | None = None
    priority: Priority | None = None
    """vLLM's: lower numbers come first, see `GenerationRequest`; 0 by default."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """vLLM's: cached prompts and pictures are shared only between requests with the same one."""
    include_timeline: bool | None = None
    """Ours: attach the stages of the request's journey to the answer."""
    return_token_ids: bool | None = None
    """vLLM's: tell the token ids of prompt and answer."""
    allow_smaller_model: bool | None = None
    """Ours: where `model` stands for several, a smaller one may answer when the one that suits would be late."""

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report with each token; None when no log-probabilities are asked for."""
        return None

    @property
    def has_format(self) -> bool:
        """Whether the answer's form is bound, so that preparing the request takes a while."""
        formats = (self.structured_outputs, self.guided_json, self.guided_regex, self.guided_choice)
        is_json = self.response_format is not None and self.response_format.type != "text"
        return is_json or any(value is not None for value in formats)

    @property
    def asked_max_tokens(self) -> tuple[str, int | None]:
        """Name and value of the field that bounds the answer."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class ImageUrl(Strict):
    """A picture, inside its URL or where the operator lets us fetch it."""

    url: MediaUrl


class VideoUrl(Strict):
    """A file, by its URL or inside it, or frames separated by commas; what else is given chooses those the model sees.

    How many frames there may be depends on the model, and is checked where they are chosen.
    """

    url: MediaUrl
    fps: Rate | None = None
    """Frames per second that the model is to see."""
    min_frames: Count | None = None
    """Frames that it is to see of a short video."""
    max_frames: Count | None = None
    """Frames that it is to see of a long video."""
    source_fps: Rate | None = None
    """Rate at which the frames of a list were taken; files have times of their own."""


class TextPart(Strict):
    """Words."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(Strict):
    """A video."""

    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")],
    Discriminator(
        type_tag,
        custom_error_type="part_type",
        custom_error_message="a part must be an object whose type is text, image_url or video_url",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Field(min_length=1, fail_fast=True), Tag("<list>")],
    Discriminator(list_tag),
]


class CalledFunction(Strict):
    """A function as the model called it; `arguments` is JSON text."""

    name: str
    arguments: str | None = None


class ToolCall(Strict):
    """A call in an earlier turn of the assistant."""

    id: str | None = None
    type: Literal["function"]
    function: CalledFunction


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """What the assistant thought in that turn; whether the model sees it again is up to its template."""
    refusal: Unread = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    """Which call a tool's message answers."""


class ChatBody(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: Annotated[list[AnyTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """False: at most one call."""
    logprobs: bool | None = None
    """Report the log-probability of each content token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """OpenAI's; these models know no degrees, only with and without."""
    max_thinking_tokens: Annotated[
        int | None,
        Field(
            ge=0, validation_alias=AliasChoices("max_thinking_tokens", "thinking_token_budget", "reasoning_max_tokens")
        ),
    ] = None
    """A thought that is longer is ended; also in vLLM's and FastDeploy's spelling. Without a thought it does nothing."""
    include_tool_results: bool | None = None
    """Ours: attach the pictures that our own tools made for the model, small."""

    @property
    def dumped_messages(self) -> list[dict[str, Any]]:
        """The messages as a processor takes them."""
        return [message.model_dump(exclude_none=True) for message in self.messages]

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think; None leaves it to the template. Of several fields the most literal counts."""
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        if self.enable_thinking is not None:
            return self.enable_thinking
        return None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be calls of tools, and nothing else."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def has_format(self) -> bool:
        return self.must_call or super().has_format

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[AnyTool]:
        """Those that the model is told of and may call."""
        return [] if self.tool_choice == "none" else self.tools or []


Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Token], Field(min_length=1)]
Prompts = Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1)]


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[Prompts, SkipValidation]  # `prompts_of` checks it, in plainer words than a union's
    """A text, a list of token ids, or a list of these."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def parse_body(kind: type[B], raw: dict[str, Any]) -> B:
    """Check types and ranges.

    Raises:
        InvalidRequest: names the first field at fault.
    """
    refuse_unsupported(raw, UNSUPPORTED)
    body = validated(kind, raw)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only for stream: true", "stream_options")
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs is only for logprobs: true", "top_logprobs")
        _check_contents(body.messages)
        _check_tool_answers(body.messages)
        check_tool_names(body.tools or [])
    return body


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request: a string, a list of token ids, or a list of either.

    Raises:
        InvalidRequest: anything else, or an empty prompt.
    """
    many = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    if not many:
        raise InvalidRequest("prompt is an empty list; give at least one prompt", "prompt")
    for i, one in enumerate(many):
        if not one or not (isinstance(one, str) or _are_tokens(one)):
            param = "prompt" if many is not prompt else f"prompt[{i}]"
            raise InvalidRequest(
                f"{param}: give a non-empty string, a list of token ids, or a list of these (got {shortened(one)})",
                param,
            )
    return many


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and abs(i) < 2**31 for i in value)


def _check_contents(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidRequest(f"messages[{i}].content is missing", f"messages[{i}].content")


def _check_tool_answers(messages: Sequence[Message]) -> None:
    """A tool's message must name a call that an assistant's message before it made."""
    call_ids: set[str | None] = set()
    for i, message in enumerate(messages):
        if message.role == "assistant":
            call_ids.update(call.id for call in message.tool_calls or () if call.id is not None)
        elif message.role == "tool" and message.tool_call_id not in call_ids:
            param = f"messages[{i}].tool_call_id"
            raise InvalidRequest(
                f"{param}: {shortened(message.tool_call_id)} answers no call; give the id of one of tool_calls in an "
                "assistant message before it",
                param,
            )
