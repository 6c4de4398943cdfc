from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_cluster.errors import CheckpointError, ContextTooLong, InvalidRequest
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.images import PreparedMedia
from ernie_cluster.inputs.messages import Media, PromptLimits, Settings, check_text
from ernie_cluster.inputs.template import ChatTemplate
from ernie_cluster.request import GenerationRequest, SamplingParams

DataUrl = Callable[..., str]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str, **wishes: object) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **wishes}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def chat(processor: ChatProcessor, content: object, **options: Any) -> GenerationRequest:
    sampling = options.pop("sampling", SamplingParams(max_tokens=8))
    return processor.chat([{"role": "user", "content": content}], request_id="r", sampling=sampling, **options)


def decoded(processor: ChatProcessor, request: GenerationRequest) -> str:
    return processor.tokenizer.decode(request.prompt_token_ids.tolist(), skip_special=False)


def patch_id(processor: ChatProcessor) -> int:
    assert processor.config.token_ids
    return processor.config.token_ids.image_patch


def test_text(processor: ChatProcessor) -> None:
    sampling = SamplingParams(max_tokens=8, seed=5)
    request = chat(processor, "你好", sampling=sampling, timeout_s=3.0, cache_salt=b"s", enable_thinking=True)
    assert decoded(processor, request) == "<|begin_of_sentence|>User: 你好\nAssistant: <think>"
    assert request.prompt_token_ids.dtype == np.int32
    assert request.positions.tolist() == [list(range(request.num_prompt_tokens))] * 3
    assert request.eos_token_ids == (2, processor.tokenizer.token_id("<|end_of_sentence|>"))
    assert (request.model, request.request_id, request.sampling) == ("tiny", "r", sampling)
    assert (request.timeout_s, request.cache_salt, request.media) == (3.0, b"s", ())


def test_one_picture(processor: ChatProcessor, data_url: DataUrl) -> None:
    request = chat(processor, [picture(data_url((112, 84))), text("What?")])
    (media,) = request.media
    assert (media.kind, media.grid_thw, media.num_tokens) == ("image", (1, 6, 8), 12)
    places = np.flatnonzero(request.prompt_token_ids == patch_id(processor))
    assert places.tolist() == list(range(media.offset, media.end))
    assert request.positions[:, media.offset : media.end].T.tolist() == [
        [media.offset, media.offset + row, media.offset + column] for row in range(3) for column in range(4)
    ]
    assert request.positions[:, media.end].tolist() == [media.offset + 4] * 3
    assert request.position_delta == 4 - 12
    patches = "<|IMAGE_PLACEHOLDER|>" * 12
    assert f"User: Picture 1:<|IMAGE_START|>{patches}<|IMAGE_END|>What?" in decoded(processor, request)


def test_a_picture_by_itself_is_that_of_a_prompt(processor: ChatProcessor, data_url: DataUrl) -> None:
    regions = ((0, 0, 500, 500),)
    for given in ({"url": data_url((112, 84))}, {"url": data_url((280, 280)), "regions": regions, "max_pixels": 7000}):
        alone = processor.picture(given)
        (media,) = chat(processor, [{"type": "image_url", "image_url": given}]).media
        assert (alone.media_hash, alone.grid_thw, alone.num_tokens) == (
            media.media_hash,
            media.grid_thw,
            media.num_tokens,
        )
    with pytest.raises(InvalidRequest, match="not a data URL"):
        processor.picture({"url": "x"})


@pytest.mark.parametrize("max_pixels", [784, 1000, 7000, 10**9])
def test_a_found_picture_is_shrunk(max_pixels: int, processor: ChatProcessor, data_url: DataUrl) -> None:
    whole = processor.picture({"url": data_url((280, 280))})
    found = processor.picture({"url": data_url((280, 280)), "max_pixels": max_pixels})
    assert 784 <= found.num_pixels <= max_pixels
    assert found.num_pixels == whole.num_pixels or max_pixels < whole.num_pixels


def test_two_pictures_keep_their_order(processor: ChatProcessor, data_url: DataUrl) -> None:
    red, blue = data_url((56, 56), "red"), data_url((140, 28), "blue")
    content = [text("a"), picture(red), text("b"), picture(blue), text("c")]
    request = chat(processor, content)
    first, second = request.media
    assert (first.num_tokens, second.num_tokens) == (4, 5)
    assert first.patches is not None
    assert second.patches is not None
    assert first.patches[0, 0] == 255
    assert second.patches[0, 0] == 0
    assert second.offset > first.end
    ids = request.prompt_token_ids.tolist()
    start, end = (processor.tokenizer.token_id(f"<|IMAGE_{end}|>") for end in ("START", "END"))
    for media in request.media:
        assert ids[media.offset - 1] == start
        assert ids[media.end] == end
    with ThreadPoolExecutor(2) as pool:
        pooled = chat(replace(processor, map_media=pool.map), content)
    assert [m.media_hash for m in pooled.media] == [m.media_hash for m in request.media]
    assert pooled.prompt_token_ids.tolist() == ids


def test_one_video(processor: ChatProcessor, gif_url: DataUrl) -> None:
    request = chat(processor, [video(gif_url(5)), text("What?")])
    (media,) = request.media
    assert (media.kind, media.grid_thw, media.num_tokens) == ("video", (6, 4, 6), 18)
    assert processor.config.token_ids
    places = np.flatnonzero(request.prompt_token_ids == processor.config.token_ids.video_patch)
    assert places.tolist() == list(range(media.offset, media.end))
    assert request.positions[:, media.offset : media.end].T.tolist() == [
        [media.offset + pair, media.offset + row, media.offset + column]
        for pair in range(3)
        for row in range(2)
        for column in range(3)
    ]
    assert "User: Video 1:<|VIDEO_START|>" in decoded(processor, request)


def test_a_video_as_a_list_of_frames(processor: ChatProcessor, data_url: DataUrl) -> None:
    frames = [data_url((84, 56), colour).partition(",")[2] for colour in ("red", "green", "blue", "red")]
    url = "data:video/jpeg;base64," + ",".join(frames)
    (media,) = chat(processor, [video(url)]).media
    assert (media.kind, media.grid_thw) == ("video", (4, 4, 6))
    slow = chat(processor, [video(url, source_fps=0.5)]).media[0]
    assert slow.media_hash != media.media_hash, "other times are drawn"
    unmarked = replace(processor, video=replace(processor.video, draw_timestamps=False))
    assert len({chat(unmarked, [video(url, **w)]).media[0].media_hash for w in ({}, {"source_fps": 0.5})}) == 1


def test_a_client_chooses_frames(processor: ChatProcessor, gif_url: DataUrl) -> None:
    url = gif_url(20)  # 2 seconds

    def num_frames(**wishes: object) -> int:
        return chat(processor, [video(url, **wishes)]).media[0].grid_thw[0]

    assert num_frames() == 16
    assert num_frames(min_frames=1) == 4
    assert num_frames(min_frames=1, fps=3) == 6
    assert num_frames(max_frames=2) == 2


def test_pictures_and_videos_keep_their_order(processor: ChatProcessor, data_url: DataUrl, gif_url: DataUrl) -> None:
    content = [video(gif_url(2)), picture(data_url()), text("a"), video(gif_url(6)), picture(data_url((56, 56)))]
    request = chat(processor, content)
    assert [(m.kind, m.num_tokens) for m in request.media] == [("video", 6), ("image", 12), ("video", 18), ("image", 4)]
    with ThreadPoolExecutor(2) as pool:
        pooled = chat(replace(processor, map_media=pool.map), content)
    assert [m.media_hash for m in pooled.media] == [m.media_hash for m in request.media]


def test_media_are_prepared_under_the_salt_of_their_request(processor: ChatProcessor, data_url: DataUrl) -> None:
    salts = []

    def spy(settings: Settings, media: Iterable[Media]) -> Iterable[PreparedMedia]:
        salts.append(settings.cache_salt)
        return map(settings, media)

    chat(replace(processor, map_media=spy), [picture(data_url())], cache_salt=b"mine")
    assert salts == [b"mine"]


def test_a_file_in_place_of_its_url(processor: ChatProcessor, data_url: DataUrl, gif_url: DataUrl) -> None:
    """What the API has fetched gives what the same file in a data URL gives."""
    for kind, url in (("image", data_url()), ("video", gif_url())):
        content = base64.b64decode(url.partition(",")[2])
        inline = chat(processor, [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}])
        given = {"url": "http://example.org/a", "content": content}
        fetched = chat(processor, [{"type": f"{kind}_url", f"{kind}_url": given}])
        assert fetched.media[0].media_hash == inline.media[0].media_hash


def test_the_same_picture_has_the_same_hash(processor: ChatProcessor, data_url: DataUrl) -> None:
    request = chat(processor, [picture(data_url(colour="red")), picture(data_url(colour="red"))])
    assert len({media.media_hash for media in request.media}) == 1


@pytest.mark.parametrize("spelling", ["<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>", "<|end_of_sentence|>", "<s>"])
def test_control_text_of_a_user_is_harmless(processor: ChatProcessor, data_url: DataUrl, spelling: str) -> None:
    alone = chat(processor, f"a {spelling} b")
    assert processor.tokenizer.token_id(spelling) not in alone.prompt_token_ids[1:].tolist()
    assert f"a {spelling} b" in decoded(processor, alone)
    beside = chat(processor, [text(spelling), picture(data_url()), text(spelling)])
    (media,) = beside.media
    assert (beside.prompt_token_ids == patch_id(processor)).sum() == media.num_tokens
    assert (beside.prompt_token_ids[media.offset : media.end] == patch_id(processor)).all()


@pytest.mark.parametrize("thinking", [True, False, None])
def test_a_prompt_that_opens_the_reasoning_is_known(processor: ChatProcessor, thinking: bool | None) -> None:
    request = chat(processor, "<think>", enable_thinking=thinking)
    assert processor.opens_reasoning(request) is (thinking is True)


@pytest.mark.parametrize(
    ("ending", "opens"), [("<think>\n", True), ("\n<think>\n\n</think>\n\n", False), ("", False), ("think>", False)]
)
def test_reasoning_opens_by_the_template_s_last_words(processor: ChatProcessor, ending: str, opens: bool) -> None:
    template = ChatTemplate("User: 你 Assistant: " + ending, control_texts=processor.tokenizer.control_texts)
    ids = chat(replace(processor, template=template), "x").prompt_token_ids.tolist()
    letters = processor.tokenizer.encode(processor.tokenizer.decode(ids, skip_special=False), allow_special=False)
    for prompt in (ids, letters):  # `<think>` as one token, and letter by letter
        request = processor.completion(prompt, request_id="r", sampling=SamplingParams(max_tokens=1))
        assert processor.opens_reasoning(request) is opens


def test_a_call_without_arguments_is_printed_as_an_object(processor: ChatProcessor) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    request = processor.chat(messages, request_id="r", sampling=SamplingParams(max_tokens=8))
    assert '{"name": "f", "arguments": {}}' in decoded(processor, request)


def test_assistant_turns_without_content_and_tool_calls(processor: ChatProcessor) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    broken = [{"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"x": '}}]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "b", "tool_call_id": "1"},
        {"role": "assistant", "content": None, "tool_calls": broken},
    ]
    request = processor.chat(messages, request_id="r", sampling=SamplingParams(max_tokens=8))
    assert '{"name": "f", "arguments": {"x": 1}}' in decoded(processor, request)
    assert '{"name": "g", "arguments": "{\\"x\\": "}' in decoded(processor, request)


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        (picture("https://example.org/a.png"), ".image_url.url", "not a data URL"),
        (picture("data:text/html;base64,QUJD"), ".image_url.url", "text/html"),
        (picture("data:image/png;base64,QUJD"), ".image_url.url", "cannot be decoded"),
        (picture("data:image/png;base64,QU*D"), ".image_url.url", "not valid base64"),
        (video("https://example.org/a.gif"), ".video_url.url", "not a data URL"),
        (video("data:video/mp4;base64,QUJD"), ".video_url.url", "of no kind that is served; send MP4"),
        (video("data:image/gif;base64,QU*D"), ".video_url.url", "not valid base64"),
        (video("data:video/jpeg;base64,"), ".video_url.url", "0 frames"),
        (video("data:video/jpeg;base64," + "," * 100_000), ".video_url.url", "more than 5000 frames"),
        (video("data:image/gif;base64," + "QUFB" * 8_000_000), ".video_url.url", "more than 20971520 bytes"),
        (video("data:video/jpeg;base64,QUJD", source_fps=0.0), ".video_url.source_fps", "above 0"),
        (video("data:video/jpeg;base64,QUJD", fps=float("nan")), ".video_url.fps", "fps is nan"),
        (video("data:video/jpeg;base64,QUJD", max_frames=1000), ".video_url.max_frames", "send 1 to 180"),
        (video("data:video/jpeg;base64,QUJD", min_frames=0), ".video_url.min_frames", "send 1 to 180"),
        ({"type": "input_audio"}, ".type", "'input_audio' are not served; send text, image_url or video_url"),
        (text("\ud800"), ".text", "surrogate"),
    ],
)
def test_refused_parts_are_named(processor: ChatProcessor, part: dict[str, Any], param: str, words: str) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [text("a"), part]}]
    with pytest.raises(InvalidRequest, match=words) as caught:
        processor.chat(messages, request_id="r", sampling=SamplingParams())
    assert caught.value.param == f"messages[1].content[1]{param}"


def test_too_many_pictures(processor: ChatProcessor, data_url: DataUrl) -> None:
    with pytest.raises(InvalidRequest, match="5 pictures, the limit is 4") as caught:
        chat(processor, [picture(data_url())] * 5)
    assert caught.value.param == "messages[0].content[4].image_url.url"


def test_too_many_videos(processor: ChatProcessor, data_url: DataUrl, gif_url: DataUrl) -> None:
    two = replace(processor, limits=PromptLimits(max_images=4, max_videos=2))
    media = [*[picture(data_url())] * 4, *[video(gif_url(2))] * 2]
    assert len(chat(two, media).media) == 6, "either has a count of its own"
    with pytest.raises(InvalidRequest, match="3 videos, the limit is 2") as caught:
        chat(two, [*media, video(gif_url(2))])
    assert caught.value.param == "messages[0].content[6].video_url.url"


def test_a_video_longer_than_the_context(processor: ChatProcessor, gif_url: DataUrl) -> None:
    with pytest.raises(ContextTooLong, match="6 frames of the video take 18 tokens, the context holds 17") as caught:
        chat(replace(processor, max_model_len=17), [video(gif_url(6))])
    assert caught.value.param == "messages[0].content[0].video_url.url"


def test_no_messages(processor: ChatProcessor) -> None:
    with pytest.raises(InvalidRequest, match="no messages"):
        processor.chat([], request_id="r", sampling=SamplingParams())


def test_text_only_models_refuse_pictures_and_videos(
    processor: ChatProcessor, data_url: DataUrl, gif_url: DataUrl
) -> None:
    blind = replace(processor, config=replace(processor.config, vision=None, token_ids=None))
    assert chat(blind, "a").num_prompt_tokens > 0
    for part in (picture(data_url()), video(gif_url())):
        with pytest.raises(InvalidRequest, match="tiny reads text only") as caught:
            chat(blind, [part])
        assert caught.value.param == "messages[0].content[0]"


def test_a_template_that_loses_pictures_is_noticed(processor: ChatProcessor, data_url: DataUrl) -> None:
    deaf = replace(processor, template=ChatTemplate("{{ messages[0].role }}", control_texts=()))
    with pytest.raises(InvalidRequest, match="0 places for 1 pictures"):
        chat(deaf, [picture(data_url())])


def test_context_bounds(processor: ChatProcessor) -> None:
    n = chat(processor, "a b c").num_prompt_tokens
    exact = replace(processor, max_model_len=n + 8)
    assert chat(exact, "a b c").max_total_tokens == n + 8
    with pytest.raises(InvalidRequest, match="at most 8") as caught:
        chat(exact, "a b c", sampling=SamplingParams(max_tokens=9))
    assert caught.value.param == "max_tokens"
    assert not isinstance(caught.value, ContextTooLong)
    with pytest.raises(ContextTooLong, match=f"the prompt has {n} tokens"):
        chat(replace(processor, max_model_len=n), "a b c")


def test_long_or_deep_text_is_refused_before_it_is_tokenised(processor: ChatProcessor) -> None:
    small = replace(processor, limits=PromptLimits(max_prompt_chars=200))
    with pytest.raises(ContextTooLong, match="201 characters"):
        chat(small, "x" * 201)
    deep: Any = "x"
    for _ in range(70):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested deeper"):
        chat(processor, "a", tools=[{"x": deep}])


def test_long_keys_are_spelled_out_in_errors_only_and_there_in_part() -> None:
    """A path for each of the items would be gigabytes."""
    value = {"k" * 1_000_000: [[0]] * 20_000 + ["\ud800"]}
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        check_text([value], "tools", 10**9)
    assert caught.value.param == f"tools[0].{'k' * 64}[20000]"


def test_completion(processor: ChatProcessor) -> None:
    sampling = SamplingParams(max_tokens=4)
    by_text = processor.completion("hello</s>42", request_id="r", sampling=sampling)
    assert by_text.prompt_token_ids[-3:].tolist() == [2, 7, 5]
    by_ids = processor.completion(by_text.prompt_token_ids.tolist(), request_id="r", sampling=sampling)
    assert by_ids.prompt_token_ids.tolist() == by_text.prompt_token_ids.tolist()
    assert by_ids.positions.tolist() == by_text.positions.tolist()


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        ("", "prompt", "empty"),
        ([], "prompt", "empty"),
        ([5, 2048], r"prompt[1]", "2048 is outside"),
        ([-1], "prompt[0]", "-1 is outside"),
        ("a<|IMAGE_PLACEHOLDER|>", "prompt", "stands for a picture"),
        ("\udc00", "prompt", "surrogate"),
    ],
)
def test_refused_completions(processor: ChatProcessor, prompt: str | list[int], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        processor.completion(prompt, request_id="r", sampling=SamplingParams(max_tokens=4))
    assert caught.value.param == param


def test_completion_too_long(processor: ChatProcessor) -> None:
    with pytest.raises(ContextTooLong) as caught:
        processor.completion([5] * 4096, request_id="r", sampling=SamplingParams(max_tokens=1))
    assert caught.value.param == "prompt"


def test_what_the_api_asks_for(processor: ChatProcessor) -> None:
    assert (processor.served_name, processor.max_model_len, processor.vocab_size) == ("tiny", 4096, 2048)
    decoder = processor.detokenizer()
    assert decoder.push(processor.tokenizer.encode("好</think>a</s>", allow_special=True)) == "好</think>a"


def test_files_that_contradict_each_other(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["flat"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    with pytest.raises(CheckpointError, match="patches of 14 merged by 2, the preprocessor of 16"):
        ChatProcessor.from_folder(tmp_path, served_name="tiny")


def test_picture_errors_carry_no_decoder_text(processor: ChatProcessor) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"junk" * 9).decode()
    with pytest.raises(InvalidRequest) as caught:
        chat(processor, [picture(url)])
    assert "0x" not in caught.value.message
    assert caught.value.code == "invalid_image"


def test_a_thinking_limit_ends_as_the_template_does(processor: ChatProcessor) -> None:
    limit = processor.thinking_limit(12)
    assert limit.max_tokens == 12
    assert limit.mark == (processor.tokenizer.token_id("</think>"),)
    assert processor.tokenizer.decode(limit.ending) == "\n</think>\n\n"
    assert set(limit.mark) <= set(limit.ending)
