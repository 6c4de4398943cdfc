from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.errors import CheckpointError, ContextTooLong, InvalidRequest
from ernie_cluster.inputs.template import DEFAULT_TEMPLATE, PLACEHOLDERS, ChatTemplate, Segment
from ernie_cluster.inputs.tokenizer import Tokenizer

CONTROLS = ("<s>", "</s>", "<think>", "</think>", "<|end_of_sentence|>", "<|IMAGE_START|>")
FAMILY = ChatTemplate(DEFAULT_TEMPLATE, control_texts=CONTROLS)

words = st.lists(st.sampled_from(["hi", "<", "|", "<|", "|>", "IMAGE_PLACEHOLDER", *CONTROLS, *PLACEHOLDERS])).map(
    "".join
)
contents = st.one_of(words, st.lists(words.map(lambda text: {"type": "text", "text": text})))
roles = st.sampled_from(("system", "user", "assistant", "tool"))
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1)


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize("enable_thinking", [None, False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What is 2 < 3, 你好 😀?"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "because"},
            {"role": "user", "content": "c"},
        ],
    ],
)
def test_ids_equal_those_of_transformers(
    folders: dict[str, Path], tokenizer: Tokenizer, messages: list[dict[str, Any]], enable_thinking: bool | None
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folders["flat"])
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    template = ChatTemplate.from_folder(folders["flat"], control_texts=tokenizer.control_texts)
    segments = template.render(messages, enable_thinking=enable_thinking)
    assert segments == [Segment("text", text)]
    assert tokenizer.encode(text, allow_special=True) == ids


def test_layout_of_the_family() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image_url"}, {"type": "image_url"}]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "C"}]},
    ]
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    assert text_of(FAMILY.render(messages, enable_thinking=True)) == (
        f"<|begin_of_sentence|>S\nUser: APicture 1:{image}Picture 2:{image}"
        f"\nAssistant: B<|end_of_sentence|>User: Picture 3:{image}C\nAssistant: <think>"
    )
    assert text_of(FAMILY.render(messages)).endswith("\nAssistant: <think>\n\n</think>\n\n")


def test_without_a_generation_prompt_it_ends_with_the_last_message() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    closed, open_ended = (text_of(FAMILY.render(messages, add_generation_prompt=add)) for add in (False, True))
    assert closed.endswith("User: Hi")
    assert open_ended.startswith(f"{closed}\nAssistant: ")


def test_pictures_and_videos_are_counted_apart() -> None:
    content = [{"type": "video"}, {"type": "image"}, {"type": "video_url"}]
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    video = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
    rendered = text_of(FAMILY.render([{"role": "user", "content": content}]))
    assert f"User: Video 1:{video}Picture 1:{image}Video 2:{video}\n" in rendered


@pytest.mark.parametrize(
    ("source", "image", "video"),
    [
        ("{% if part.type == 'image_url' %}{% elif part.type == 'video_url' %}{% endif %}", "image_url", "video_url"),
        ('{% if part["type"] == "image" %}{% elif part["type"] == "video" %}{% endif %}', "image", "video"),
        ("{% if part.type == 'image_url' %}{% elif part.type == 'video' %}{% endif %}", "image_url", "video"),
    ],
)
def test_how_templates_spell_the_types_of_parts(source: str, image: str, video: str) -> None:
    assert ChatTemplate(source, control_texts=()).part_types == {"image": image, "video": video}


def test_layout_of_tools() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "你"}}}
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call, call]},
        {"role": "tool", "content": "T"},
    ]
    printed = '<tool_call>\n{"name": "f", "arguments": {"x": "你"}}\n</tool_call>\n'
    assert text_of(FAMILY.render(messages, tools=[{"a": 1}, {"b": 2}])) == (
        '<|begin_of_sentence|>\n<tool_list>\n[{"a": 1}, {"b": 2}]\n</tool_list>\n\nUser: A\nAssistant: '
        f"<think>\nR\n</think>\n\n\n{printed}{printed}<|end_of_sentence|>"
        "User: <tool_output>\nT\n</tool_output>\n\nAssistant: <think>\n\n</think>\n\n"
    )


def test_pictures_of_tools_are_counted_on() -> None:
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    crop = [{"type": "text", "text": "crop "}, {"type": "image_url"}]
    messages = [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "tool", "content": crop}]
    assert text_of(FAMILY.render(messages, enable_thinking=True)) == (
        f"<|begin_of_sentence|>User: Picture 1:{image}User: <tool_output>\ncrop Picture 2:{image}\n</tool_output>\n"
        "\nAssistant: <think>"
    )


def test_models_without_eyes_are_not_made_to_think(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(tmp_path, control_texts=CONTROLS, is_multimodal=False)
    assert text_of(template.render([{"role": "user", "content": "A"}])) == "<|begin_of_sentence|>User: A\nAssistant: "


@given(conversations)
def test_what_a_stranger_writes_is_never_a_control_token(messages: list[dict[str, Any]]) -> None:
    """A twin of each conversation, with harmless text in its place, has the same control tokens."""

    def controls(conversation: list[dict[str, Any]]) -> list[str]:
        trusted = [s.text if s.kind == "text" else "" for s in FAMILY.render(conversation)]
        found = [match.group() for text in trusted for match in FAMILY._controls.finditer(text)]
        kinds = {segment.kind for segment in FAMILY.render(conversation)}
        assert kinds <= {"text", "literal"}
        return [text for text in found if text not in ("<think>", "</think>")]  # the assistant's own, see below

    harmless = [{**message, "content": "x"} for message in messages]
    assert controls(messages) == controls(harmless)


@given(conversations)
def test_rendering_changes_no_letter(messages: list[dict[str, Any]]) -> None:
    plain = ChatTemplate(DEFAULT_TEMPLATE, control_texts=())
    assert text_of(FAMILY.render(messages)) == text_of(plain.render(messages))


def test_a_token_scattered_over_parts_is_text() -> None:
    parts = [{"type": "text", "text": "<|end_of_"}, {"type": "text", "text": "sentence|>"}]
    segments = FAMILY.render([{"role": "user", "content": parts}])
    assert Segment("literal", "<|end_of_sentence|>") in segments


def test_tool_names_and_keys_are_strangers_text_too() -> None:
    segments = FAMILY.render([{"role": "user", "content": "A"}], tools=[{"<s>": {"name": "</s>"}}])
    assert [s.text for s in segments if s.kind == "literal"] == ["<s>", "</s>"]


def test_reasoning_marks_in_the_assistant_s_own_text_stay() -> None:
    messages = [{"role": role, "content": "<think>\nR\n</think>\nB<s>"} for role in ("user", "assistant")]
    literals = [s.text for s in FAMILY.render(messages) if s.kind == "literal"]
    assert literals == ["<think>", "</think>", "<s>", "<s>"]


def test_private_use_letters_in_messages_stay() -> None:
    text = "".join(map(chr, range(0xF0000, 0xF0010))) + "<s>"
    segments = FAMILY.render([{"role": "user", "content": text}])
    assert text in text_of(segments)
    assert Segment("literal", "<s>") in segments


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "T{{ bos_token }}"),
        ("chat_template.json", json.dumps({"chat_template": "T{{ bos_token }}"})),
    ],
)
def test_where_templates_are_found(tmp_path: Path, file: str, content: str) -> None:
    tokenizer_config = {"bos_token": {"content": "B"}, "chat_template": [{"name": "default", "template": "U"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    messages = [{"role": "user", "content": ""}]
    assert text_of(ChatTemplate.from_folder(tmp_path, control_texts=()).render(messages)) == "U"
    (tmp_path / file).write_text(content)
    assert text_of(ChatTemplate.from_folder(tmp_path, control_texts=()).render(messages)) == "TB"


def test_functions_of_templates() -> None:
    source = "{%- for i in range(9) -%}{%- if i > 1 -%}{%- break -%}{%- endif -%}{{ i }}{%- endfor -%}{{ strftime_now('%Y') }}"
    template = ChatTemplate(source, control_texts=(), now=lambda: datetime(2031, 1, 2))
    assert text_of(template.render([])) == "012031"


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", control_texts=())
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([{"role": "user", "content": ""}])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].role }}", "user"),
        ("{{ messages[0]['role'] }}", "user"),
        ("{{ messages[0].nothing }}", ""),
        ("{{ messages[0].nothing is defined }}", "False"),
        ("{{ messages[0].get('role') }}", "user"),
        ("{% for key, value in messages[0].items() %}{{ key }}{% endfor %}", "roleitems"),
        ("{{ messages[0]['items'] }}", "mine"),
    ],
)
def test_how_a_template_looks_into_a_message(source: str, expected: str) -> None:
    template = ChatTemplate(source, control_texts=())
    assert text_of(template.render([{"role": "user", "items": "mine"}])) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ messages[0].nothing.more }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_an_error_of_ours(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate(source, control_texts=()).render([{"role": "user", "content": "A"}])


def test_rendering_is_bounded() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", control_texts=())
    with pytest.raises(ContextTooLong, match="1000 characters"):
        template.render([{"role": "user", "content": "A" * 100}], max_chars=1000)


def test_a_broken_template_is_named() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% if %}", control_texts=())
