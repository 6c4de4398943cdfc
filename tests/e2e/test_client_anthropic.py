"""Anthropic's official client and the packaged model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from ernie_cluster.cli.local import is_packaged
from tests.e2e.application import Application
from tests.e2e.shown import ASK_COLOUR, ASK_SUM, ASK_WEATHER, CITY, MODEL, SUM, TOOL, WEATHER_THERE, circle, written

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")

GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 128, "extra_body": {"temperature": 0}}
"""The client has no word for the temperature any more; the server takes it as ever."""
TOOLS: Any = [
    {
        "name": TOOL["function"]["name"],
        "description": TOOL["function"]["description"],
        "input_schema": TOOL["function"]["parameters"],
    }
]


@pytest.fixture(scope="module")
def client(app: Application) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=app.url, api_key="none", timeout=60, max_retries=0) as client:
        yield client


def shown(url: str, text: str) -> Any:
    """One message, in a list."""
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": text}]}]


def test_a_picture_whole_streamed_and_counted(client: anthropic.Anthropic) -> None:
    messages = shown(circle(), ASK_COLOUR)
    whole = client.messages.create(**GREEDY, messages=messages)
    (block,) = whole.content
    assert block.type == "text"
    assert (block.text, whole.stop_reason) == ("red", "end_turn")
    with client.messages.stream(**GREEDY, messages=messages) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert (text, final.stop_reason) == ("red", "end_turn")
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = client.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    usage = whole.usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_thought(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = GREEDY | {
        "max_tokens": 2048,
        "messages": shown(written(SUM), ASK_SUM),
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    thought, text = client.messages.create(**asked).content
    assert (thought.type, text.type) == ("thinking", "text")
    assert "+" in thought.thinking
    with client.messages.stream(**asked) as stream:
        assert [block.type for block in stream.get_final_message().content] == ["thinking", "text"]


def test_a_call_and_what_came_of_it(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": ASK_WEATHER}]
    asked: dict[str, Any] = GREEDY | {"tools": TOOLS}
    with client.messages.stream(**asked, messages=messages) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    call: Any = first.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": CITY})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": WEATHER_THERE}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**asked, messages=messages)
    assert second.stop_reason == "end_turn"
    assert WEATHER_THERE.split()[0] in "".join(block.text for block in second.content if block.type == "text")

    demanded = client.messages.create(
        **asked, messages=shown(circle(), ASK_COLOUR), tool_choice={"type": "tool", "name": "get_weather"}
    )
    assert [block.type for block in demanded.content] == ["tool_use"]


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="none", max_tokens=8, messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].source.data"):
        client.messages.create(**GREEDY, messages=shown("data:image/png;base64,AAAA", ASK_COLOUR))
