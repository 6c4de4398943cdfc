"""The application over gRPC: the same answers as over HTTP, and nothing left of a call that ended early."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ernie_cluster.client import Client, image, user
from ernie_cluster.errors import DeadlineExceeded, InvalidRequest, Overloaded, UnknownModel
from tests.e2e.application import Application, eventually, picture_url

QUESTION = "What is in this picture?"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def client(app: Application) -> Iterator[Client]:
    with Client(app.grpc_target, timeout_s=60) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny", "mixed"])
def test_the_same_answer_as_over_http_whole_and_streamed(app: Application, client: Client, model: str) -> None:
    picture = base64.b64decode(picture_url(7).partition(",")[2])
    messages = [user(image(picture), QUESTION)]
    asked: dict[str, Any] = {"sampling": {"max_tokens": 20, **GREEDY}, "include_timeline": True}
    whole = client.chat(model, messages, **asked)
    chunks = list(client.stream_chat(model, messages, **asked))
    streamed = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert whole.choices[0].message.text == streamed == app.text(model, QUESTION, picture=7, max_tokens=20) != ""
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    assert {"preprocess", "route", "prefill"} <= {stage.name for stage in whole.timeline}


def test_generate_goes_on_from_token_ids_as_from_their_text(client: Client) -> None:
    sampling = {"max_tokens": 8, **GREEDY}
    ids = client.tokenize("tiny", "Once upon a time").token_ids
    texts = [client.generate("tiny", prompt, sampling=sampling).choices[0].text for prompt in (ids, "Once upon a time")]
    assert texts[0] == texts[1] != ""


def test_what_is_left_early_is_given_back(app: Application, client: Client) -> None:
    long = {"max_tokens": 2000, **GREEDY}
    chunks: Any = client.stream_chat("tiny", [user("Tell me everything.")], sampling=long)
    assert next(chunks).choices
    chunks.close()
    eventually(app.objection_to_rest, 30)
    # who is known to be too late is turned away at once; which of the two it is depends on what was measured before
    with Client(app.grpc_target, timeout_s=0.5) as hurried, pytest.raises((DeadlineExceeded, Overloaded)):
        hurried.chat("tiny", [user("Tell me more.")], sampling=long)
    eventually(app.objection_to_rest, 30)


def test_errors_name_what_is_wrong(client: Client) -> None:
    with pytest.raises(InvalidRequest) as bad:
        client.chat("tiny", [user("hi")], sampling={"top_p": 2})
    assert bad.value.param == "sampling.top_p"
    with pytest.raises(UnknownModel, match="served: tiny, mixed, small"):
        client.chat("none", [user("hi")])
    with pytest.raises(InvalidRequest, match="larger"):
        client.chat("tiny", [user(image(bytes(5 * 2**20)))])


def test_models_health_and_reflection(app: Application, client: Client) -> None:
    assert [model.name for model in client.models()] == [model.name for model in app.config.models]
    with grpc.insecure_channel(app.grpc_target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (
            health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        )
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=10)
    assert "ernie_cluster.v1.Inference" in {service.name for service in answer.list_services_response.service}
