"""Every scenario makes requests that the API itself accepts, over HTTP and over gRPC, and the same ones each time."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from ernie_cluster.api.body import parse_object
from ernie_cluster.api.grpc_body import chat_body
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.schemas import ChatBody, parse_body
from ernie_cluster.api.unknown import refuse_unknown
from ernie_cluster.bench.grpc_asking import chat_request
from ernie_cluster.bench.scenarios import AGENTS, CHAT, MIXED, SCENARIOS, find
from ernie_cluster.bench.traces import PACKAGED, Trace, read
from ernie_cluster.errors import ConfigError

LIMITS = ApiLimits()


def body_of(name: str, number: int, *, seed: int = 3, shrink: float = 1.0, **options: bool) -> dict[str, Any]:
    return find(name).shrunk(shrink).choose(seed, number).body("tiny", seed, number, **options)


def words_of(body: dict[str, Any]) -> list[str]:
    contents = [m["content"] for m in body["messages"]]
    texts = [c if isinstance(c, str) else "".join(p.get("text", "") for p in c) for c in contents]
    return " ".join(texts).split()


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("is_plain", [False, True])
def test_the_api_takes_every_request(name: str, is_plain: bool) -> None:
    for number in range(3):
        body = body_of(name, number, is_plain=is_plain)
        raw = json.dumps(body).encode()
        assert len(raw) <= LIMITS.max_body_bytes
        parsed = parse_object(raw, LIMITS)
        refuse_unknown(ChatBody, parsed)
        assert parse_body(ChatBody, parsed).stream


@pytest.mark.parametrize("name", SCENARIOS)
def test_grpc_asks_the_same(name: str) -> None:
    body = body_of(name, 1)
    over_http = parse_body(ChatBody, body)
    over_grpc = chat_body(chat_request(body), LIMITS, is_stream=True).body
    assert isinstance(over_grpc, ChatBody)
    assert (over_grpc.max_tokens, over_grpc.seed, over_grpc.ignore_eos) == (
        over_http.max_tokens,
        over_http.seed,
        over_http.ignore_eos,
    )
    assert over_grpc.thinking == over_http.thinking
    assert [m.role for m in over_grpc.messages] == [m.role for m in over_http.messages]
    assert len(over_grpc.offered_tools) == len(over_http.offered_tools)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_request_is_a_function_of_seed_and_number(name: str) -> None:
    assert body_of(name, 1) == body_of(name, 1)
    prompts = [body_of(name, number, seed=seed)["messages"][-1] for seed in (1, 2) for number in range(3)]
    assert all(prompts.count(prompt) == 1 for prompt in prompts)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_request_is_longer_than_its_scenario_says(name: str) -> None:
    for number in range(20):
        source = find(name)
        scenario = source.choose(5, number).shrunk(10)
        body = scenario.body("tiny", 5, number)
        assert len(words_of(body)) + body["max_tokens"] <= scenario.most_tokens
        assert body["max_tokens"] >= 1


def test_agents_of_one_group_share_their_beginning_and_no_others_do() -> None:
    mine, mine_later, other = (AGENTS.body("tiny", 3, n)["messages"] for n in (0, 8, 1))
    assert mine[0] == mine_later[0] != other[0]
    shared = min(len(mine), len(mine_later)) - 1
    assert mine[:shared] == mine_later[:shared]
    assert mine[-1] != mine_later[-1]


def test_a_mix_has_all_its_parts_in_about_their_shares() -> None:
    names = [MIXED.choose(0, number).name for number in range(2000)]
    total = sum(weight for weight, _ in MIXED.parts)
    for weight, scenario in MIXED.parts:
        assert names.count(scenario.name) / 2000 == pytest.approx(weight / total, abs=0.05)


def test_only_plain_requests_keep_to_the_fields_of_openai() -> None:
    ours = {"ignore_eos", "chat_template_kwargs"}
    assert ours <= body_of("chat", 0).keys()
    assert not ours & body_of("chat", 0, is_plain=True).keys()


def test_an_unknown_name_is_told_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="'chatt' is none of chat, long"):
        find("chatt")
    assert find("chat").choose(0, 0) == CHAT


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_traces_are_in_order_and_ask_for_their_lengths(name: str) -> None:
    arrivals = read(name)
    assert len(arrivals) > 400
    assert all(a.arrived_s <= b.arrived_s for a, b in itertools.pairwise(arrivals))
    trace = Trace("trace", arrivals)
    body = trace.choose(1, 5).body("tiny", 1, 5)
    assert len(words_of(body)) == arrivals[5].prompt_tokens
    assert body["max_tokens"] == arrivals[5].output_tokens
    assert trace.choose(1, len(arrivals)) == trace.choose(1, 0)
    assert trace.shrunk(4).choose(1, 5).words[0] == max(1, round(arrivals[5].prompt_tokens / 4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrived_s,prompt_tokens,output_tokens\n", "no requests"),
        ("a,b\n1,2\n", "columns are arrived_s"),
        ("arrived_s,prompt_tokens,output_tokens\nnan,1,1\n", "line 2"),
        ("arrived_s,prompt_tokens,output_tokens\n1,1,1\n2,0,1\n", "line 3"),
        ("arrived_s,prompt_tokens,output_tokens\n1,x,1\n", "invalid literal"),
    ],
)
def test_a_trace_that_is_none_is_refused_by_name(tmp_path: Any, text: str, words: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read(str(path))
    assert "mine.csv" in str(caught.value)


def test_a_trace_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="packaged ones: azure-chat, azure-code"):
        read("azure-chatt")
