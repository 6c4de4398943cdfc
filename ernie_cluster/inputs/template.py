"""Messages to the text of a prompt, by the checkpoint's own chat template, or the family's where it ships none.

A template mixes control tokens with text of strangers, and the result is one string. To tell them apart afterwards,
every letter that could begin a control token (`<`) is replaced in the strangers' text by a letter that occurs nowhere
else, one for one, before rendering. Where such a letter stands at the start of a control token in the result, the
token's spelling came from outside and is text. This holds even if the spelling was scattered over parts that the
template joins. Knows no token ids and no pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ernie_cluster.errors import CheckpointError, ContextTooLong, InvalidRequest
from ernie_cluster.request import MediaKind

PLACEHOLDERS: Mapping[str, MediaKind] = {
    "<|IMAGE_PLACEHOLDER|>": "image",
    "<|image@placeholder|>": "image",
    "<|VIDEO_PLACEHOLDER|>": "video",
    "<|video@placeholder|>": "video",
}
"""What a template puts where a picture or video goes; those with `@` are no tokens."""

_REASONING_MARKUP = ("<think>", "</think>")

# Layout of the published instruct models; tools as in the thinking model. Text-only models never think.
DEFAULT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0, tools_told=false) -%}
{%- macro tell_tools() -%}
  {%- if tools and not seen.tools_told -%}
    {%- set seen.tools_told = true -%}
    {{- '\\n<tool_list>\\n' + tools | tojson + '\\n</tool_list>\\n\\n' -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro parts(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type == 'text' -%}
        {{- part.text -}}
      {%- elif part.type in ('image', 'image_url') -%}
        {%- set seen.images = seen.images + 1 -%}
        {{- 'Picture ' ~ seen.images ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
      {%- elif part.type in ('video', 'video_url') -%}
        {%- set seen.videos = seen.videos + 1 -%}
        {{- 'Video ' ~ seen.videos ~ ':<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
  {%- if message.role in ('system', 'developer') -%}
    {{- parts(message.content) + '\\n' -}}
    {{- tell_tools() -}}
  {%- else -%}
    {{- tell_tools() -}}
    {%- if message.role == 'assistant' -%}
      {{- '\\nAssistant: ' -}}
      {%- if message.reasoning_content -%}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' -}}
      {%- endif -%}
      {{- parts(message.content) -}}
      {%- for call in message.tool_calls or [] -%}
        {{- ('\\n\\n' if loop.first else '') + '<tool_call>\\n' -}}
        {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
        {{- '\\n</tool_call>\\n' -}}
      {%- endfor -%}
      {{- '<|end_of_sentence|>' -}}
    {%- elif message.role == 'tool' -%}
      {{- 'User: <tool_output>\\n' + parts(message.content) + '\\n</tool_output>\\n' -}}
    {%- else -%}
      {{- 'User: ' + parts(message.content) -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '\\nAssistant: ' -}}
  {%- if enable_thinking -%}
    {{- '<think>' -}}
  {%- elif not is_text_only -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}"""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered prompt."""

    kind: Literal["text", "literal", "image", "video"]
    """text: may hold control tokens. literal: spelled like a control token, but is text. Else a placeholder."""
    text: str


class ChatTemplate:
    """A compiled chat template; safe to share between threads.

    Args:
        source: Jinja text.
        control_texts: spellings that only the template may write.
        variables: what the template may look up beside the messages (`bos_token`, ...).
        now: clock behind the template function `strftime_now`.

    Raises:
        CheckpointError: the template is not valid.
    """

    def __init__(
        self,
        source: str,
        *,
        control_texts: Iterable[str],
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        controls = sorted({*control_texts, *PLACEHOLDERS}, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, controls)))
        self._first_letters = "".join(sorted({text[0] for text in controls}))
        self._variables = dict(variables or {})
        self._letters = frozenset(source)
        self.part_types: Mapping[MediaKind, str] = {kind: _part_type(kind, source) for kind in ("image", "video")}
        """How this template spells the types of pictures and videos among a message's parts."""
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateError as e:
            raise CheckpointError(f"chat template: {e}; the checkpoint's template must be valid Jinja") from None

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, control_texts: Iterable[str], is_multimodal: bool = True
    ) -> ChatTemplate:
        """The template in `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, in this order;
        else `DEFAULT_TEMPLATE`."""
        tokenizer_config = _read_json(Path(folder) / "tokenizer_config.json")
        variables: dict[str, Any] = {"is_text_only": not is_multimodal}
        for key, value in tokenizer_config.items():
            if key.endswith("_token") and value:
                variables[key] = value["content"] if isinstance(value, dict) else value
        source = _shipped_template(Path(folder), tokenizer_config) or DEFAULT_TEMPLATE
        return cls(source, control_texts=control_texts, variables=variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        max_chars: int = 4_000_000,
    ) -> list[Segment]:
        """The prompt of a conversation.

        Args:
            messages: OpenAI-shaped; every string in them is taken for a stranger's.
            tools: OpenAI-shaped tool definitions.
            enable_thinking: passed on when not None; else the template's own default holds.
            add_generation_prompt: let the prompt end where an answer begins, not where the last message ends.
            max_chars: the rendering stops with an error beyond this.

        Raises:
            InvalidRequest: the template refuses these messages.
            ContextTooLong: more than `max_chars`.
        """
        masks = self._masks(messages, tools or ())
        context: dict[str, Any] = {
            **self._variables,
            "messages": [_mask_message(message, masks) for message in messages],
            "tools": _mask(list(tools), masks) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            context["enable_thinking"] = enable_thinking
        masked = self._run(context, max_chars)
        return self._split(masked, _translate(masked, {mask: letter for letter, mask in masks.items()}))

    def _masks(self, *inputs: object) -> dict[str, str]:
        """For each first letter of a control token a private-use letter that the inputs and the template lack."""
        used = self._letters.union(*(text for value in inputs for text in _strings(value) if not text.isascii()))
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        try:
            return {letter: next(free) for letter in self._first_letters}
        except StopIteration:
            raise InvalidRequest("the messages hold every private-use letter of Unicode", "messages") from None

    def _run(self, context: dict[str, Any], max_chars: int) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise ContextTooLong(f"the prompt has more than {max_chars} characters; shorten it")
        except ContextTooLong:
            raise
        except jinja2.TemplateError as e:
            raise InvalidRequest(f"the model's chat template refuses these messages: {e}", "messages") from None
        except Exception as e:  # a template is a program; given odd messages it fails as programs do
            raise InvalidRequest(
                f"the model's chat template cannot render these messages ({type(e).__name__}); check their fields",
                "messages",
            ) from None
        return "".join(pieces)

    def _split(self, masked: str, text: str) -> list[Segment]:
        """Cut at placeholders and at control tokens that came from outside; both strings have the same length."""
        segments: list[Segment] = []
        done = 0
        for match in self._controls.finditer(text):
            start, end = match.span()
            is_foreign = masked[start] != text[start]
            kind = "literal" if is_foreign else PLACEHOLDERS.get(match.group())
            if kind is None:
                continue
            segments += [Segment("text", text[done:start]), Segment(kind, match.group())]
            done = end
        segments.append(Segment("text", text[done:]))
        return [segment for segment in segments if segment.text]


class _Sandbox(ImmutableSandboxedEnvironment):
    """The library's, but quicker to look into a message: it would ask a dict for an attribute first, and fail."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


_DICT_ATTRIBUTES = frozenset(dir(dict))


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json  # Jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda spelling: now().strftime(spelling)
    return environment


def _part_type(kind: MediaKind, source: str) -> str:
    spelling = f"{kind}_url"
    return spelling if f"'{spelling}'" in source or f'"{spelling}"' in source else kind


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _translate(text: str, letters: Mapping[str, str]) -> str:
    """`str.translate`, which is slow, for letters none of which becomes another one of them."""
    for letter, other in letters.items():
        text = text.replace(letter, other)
    return text


def _mask(value: Any, masks: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _translate(value, masks)
    if isinstance(value, Mapping):
        return {_mask(key, masks): _mask(inner, masks) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(inner, masks) for inner in value]
    return value


def _mask_message(message: Mapping[str, Any], masks: Mapping[str, str]) -> dict[str, Any]:
    """Masked all over, but for reasoning marks in the assistant's own text: templates look for them there."""
    masked: dict[str, Any] = _mask(message, masks)
    content = masked.get("content")
    if message.get("role") == "assistant" and isinstance(content, str):
        for mark in _REASONING_MARKUP:
            content = content.replace(_translate(mark, masks), mark)
        masked["content"] = content
    return masked


def _shipped_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    for source in (_read_json(folder / "chat_template.json"), tokenizer_config):
        shipped = source.get("chat_template")
        if isinstance(shipped, list):  # several under names
            shipped = {entry["name"]: entry["template"] for entry in shipped}.get("default")
        if shipped:
            return str(shipped)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """Content of an optional file; {} when it is absent."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not an object")
    return raw
