"""LangChain's `ChatOpenAI` and the packaged model, as programs use it that were written for OpenAI."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from ernie_cluster.cli.local import is_packaged
from tests.e2e.application import Application
from tests.e2e.shown import ASK_COLOUR, ASK_WEATHER, CITY, MODEL, TOOL, WEATHER_THERE, circle

pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")


class Seen(BaseModel):
    """What is in a picture."""

    colour: Literal["red", "green", "blue"]
    shape: Literal["circle", "square"]


def model(app: Application, **options: Any) -> ChatOpenAI:
    fixed = {"temperature": 0, "timeout": 60, "max_retries": 0}
    return ChatOpenAI(model=MODEL, base_url=f"{app.url}/v1", api_key="none", max_tokens=256, **(fixed | options))  # type: ignore[arg-type]


def shown() -> HumanMessage:
    """A picture in LangChain's own spelling, and a question."""
    picture = {"type": "image", "base64": circle().partition(",")[2], "mime_type": "image/png"}
    return HumanMessage([picture, {"type": "text", "text": ASK_COLOUR}])


@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}], ids=["chat", "responses"])
def test_a_picture_whole_and_streamed(app: Application, options: dict[str, Any]) -> None:
    llm = model(app, stream_usage=True, **options)
    whole = llm.invoke([shown()])
    assert whole.text == "red"
    assert whole.usage_metadata is not None
    streamed: Any = None
    for chunk in llm.stream([shown()]):
        assert isinstance(chunk, AIMessageChunk)
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.text == "red"
    assert streamed.usage_metadata is not None
    assert streamed.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(app: Application, method: Any) -> None:
    assert isinstance(model(app).with_structured_output(Seen, method=method).invoke([shown()]), Seen)


def test_a_call_and_what_came_of_it(app: Application) -> None:
    llm = model(app).bind_tools([TOOL])
    question = HumanMessage(ASK_WEATHER)
    called = llm.invoke([question])
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": CITY})
    streamed: Any = None
    for chunk in llm.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [("get_weather", {"city": CITY})]
    answer = llm.invoke([question, called, ToolMessage(WEATHER_THERE, tool_call_id=call["id"])])
    assert WEATHER_THERE.split()[0] in answer.text


def test_a_call_about_a_picture(app: Application) -> None:
    llm = model(app).bind_tools([Seen], tool_choice="Seen", strict=True)
    called = llm.invoke([shown()])
    assert isinstance(called, AIMessage)
    assert [call["name"] for call in called.tool_calls] == ["Seen"]
    Seen.model_validate(called.tool_calls[0]["args"])


def test_errors_are_those_of_the_client_below(app: Application) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        model(app, temperature=9).invoke("Hello")
