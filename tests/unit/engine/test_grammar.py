"""Laws of constrained answers, on a model with random weights: they fit, however they are computed, and bother nobody."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.engine.grammar import Constraint
from ernie_cluster.engine.sampler import SamplerRow, sample
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.grammar import write
from ernie_cluster.grammar.compile import Compiler
from ernie_cluster.request import GenerationRequest, SamplingParams
from tests.tiny import Outcomes, make_image, make_request, make_worker, run_mixed, tiny_config, tiny_tokenizer
from tests.unit.engine.test_handover import TIMEOUT_S, Path

VOCAB = tiny_config().text.vocab_size
EOS = 2
NO_BLANKS = tuple((i, -100.0) for i, text in enumerate(tiny_tokenizer().text_bytes(VOCAB)) if text and text.isspace())
"""Random weights like blanks as much as brackets."""

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPTS: list[Any] = [
    [5, 900, 77, 1040, 12],
    [50, make_image(1, (1, 6, 8)), 70, 80, 90],
    list(range(100, 140)),
    [9],
    [50, make_image(2), 60, 70],
]
GRAMMARS = [
    write.grammar(write.json_body(PERSON)),
    write.grammar(write.choice_body(["yes", "no", "perhaps"])),
    "",
    write.grammar(write.regex_body("[a-c]{3}-[0-9]{8}")),
    write.grammar(write.json_body(PERSON)),
]


def constrained(grammar: str, request_id: str, prompt: Any = (5, 900, 77), **sampling: object) -> GenerationRequest:
    values = {"temperature": 5.0, "max_tokens": 200, "logit_bias": NO_BLANKS, "ignore_eos": False, **sampling}
    return make_request(prompt, request_id, grammar=grammar, **values)


def requests() -> list[GenerationRequest]:
    return [
        constrained(grammar, f"g{i}", prompt, seed=i, max_tokens=30 if i == 2 else 120)
        for i, (grammar, prompt) in enumerate(zip(GRAMMARS, PROMPTS, strict=True))
    ]


def answers(worker: Worker, outcomes: Outcomes, some: list[GenerationRequest]) -> dict[str, list[int]]:
    run_mixed(worker, some)
    outcomes.drain()
    assert not outcomes.errors
    assert worker.pool.num_used == 0
    return outcomes.tokens


def text_of(tokens: list[int]) -> str:
    return tiny_tokenizer().decode(tokens)


# ---- what comes out fits

_leaves = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "x y"}, {"enum": [1, "two", None]}])
    | st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n})
    | st.tuples(st.integers(-99, 0), st.integers(1, 5000)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
    )
)


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3))
    objects = st.builds(
        lambda properties, num_required: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:num_required],
            "additionalProperties": False,
        },
        st.dictionaries(st.sampled_from(["a", "b c", "ß", '"']), inner, max_size=3),
        st.integers(0, 3),
    )
    return arrays | objects | st.lists(inner, min_size=2, max_size=2).map(lambda options: {"anyOf": options})


schemas = st.recursive(_leaves, _nested, max_leaves=6)


@settings(max_examples=12)
@given(st.lists(schemas, min_size=4, max_size=4), st.integers(0, 1000))
def test_answers_fit_their_schemas(some: list[dict[str, Any]], seed: int) -> None:
    worker, outcomes = make_worker()
    answers(
        worker,
        outcomes,
        [
            constrained(write.grammar(write.json_body(schema)), f"s{i}", seed=seed + i, max_tokens=400)
            for i, schema in enumerate(some)
        ],
    )
    for i, schema in enumerate(some):
        assert outcomes.reasons[f"s{i}"] == "stop"
        jsonschema.validate(json.loads(text_of(outcomes.tokens[f"s{i}"])), schema)


def test_a_choice_is_one_of_them_and_ends_with_its_last_letter() -> None:
    choices = ["yes", "no", "no\nreally", 'say "é"']
    worker, outcomes = make_worker()
    some = [constrained(write.grammar(write.choice_body(choices)), f"c{i}", seed=i) for i in range(12)]
    got = {text_of(tokens) for tokens in answers(worker, outcomes, some).values()}
    assert got <= set(choices)
    assert len(got) > 1
    assert set(outcomes.reasons.values()) == {"stop"}
    assert not any(EOS in tokens and text_of(tokens) != "no" for tokens in outcomes.tokens.values())


def test_thoughts_are_free_and_the_rest_is_not() -> None:
    think_end = tiny_tokenizer().token_id("</think>")
    assert think_end is not None
    grammar = write.grammar(write.choice_body(["yes", "no"]), after_thinking=True)
    worker, outcomes = make_worker()
    bias = ((think_end, 22.0),)
    some = [constrained(grammar, f"t{i}", seed=i, temperature=2.0, logit_bias=bias) for i in range(4)]
    for tokens in answers(worker, outcomes, some).values():
        _, _, rest = text_of(tokens).partition("</think>")
        assert rest.lstrip("\n") in ("yes", "no")
        assert EOS not in tokens
    assert any(text_of(t).partition("</think>")[0] for t in outcomes.tokens.values())


# ---- however it is computed


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for request in requests():
        out |= answers(*make_worker(enable_prefix_cache=False, max_batch_tokens=1024), [request])
    jsonschema.validate(json.loads(text_of(out["g0"])), PERSON)
    return out


def test_batch_equals_singles(expected: dict[str, list[int]]) -> None:
    assert answers(*make_worker(max_batch_tokens=1024), requests()) == expected


def test_chunked_equals_one_shot(expected: dict[str, list[int]]) -> None:
    assert answers(*make_worker(max_batch_tokens=3), requests()) == expected


def test_preemption_changes_nothing(expected: dict[str, list[int]]) -> None:
    worker, outcomes = make_worker(num_blocks=34, reserve_output_tokens=0, enable_prefix_cache=False)
    answers(worker, outcomes, requests())  # grammars take a while to be read, and who has one begins later
    outcomes.tokens.clear()
    outcomes.reasons.clear()
    assert answers(worker, outcomes, requests()) == expected
    assert worker.engine.counters.preemptions > 0


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_continuing_elsewhere_gives_the_same_tokens(expected: dict[str, list[int]], cut: int) -> None:
    worker, outcomes = make_worker()
    whole = [r for r in requests() if len(expected[r.request_id]) > cut]
    replays = [dataclasses.replace(r, output_token_ids=tuple(expected[r.request_id][:cut])) for r in whole]
    for r in replays:
        outcomes.tokens[r.request_id] = list(r.output_token_ids)
    assert answers(worker, outcomes, replays) == {r.request_id: expected[r.request_id] for r in whole}


def test_three_workers_give_what_one_gives(expected: dict[str, list[int]]) -> None:
    with Path() as path:
        assert path.run(requests()) == expected


def test_kv_that_comes_before_its_grammar_is_read_waits_for_it(expected: dict[str, list[int]]) -> None:
    """As on a replica that has just started, whose first grammar takes a second."""
    bound, free = requests()[0], requests()[2]
    may_compile, has_come = threading.Event(), threading.Event()
    with Path() as path:
        engine = path.decode.engine
        make, add = engine.grammars._make_compiler, engine.add
        assert make is not None

        def make_late() -> Compiler:
            assert may_compile.wait(TIMEOUT_S)
            return make()

        def add_and_tell(sequence: Sequence) -> None:
            add(sequence)
            has_come.set()

        engine.grammars._make_compiler = make_late
        engine.add = add_and_tell  # type: ignore[method-assign]
        path.decoded.tokens[bound.request_id] = [-1]
        path.open(bound)
        assert has_come.wait(TIMEOUT_S)
        assert path.run([free]) == {free.request_id: expected[free.request_id]}, "many steps go by"
        assert path.decoded.tokens[bound.request_id] == [-1]
        may_compile.set()
        path.decoded.wait_for([bound.request_id], TIMEOUT_S)
        got = path.prefilled.tokens[bound.request_id] + path.decoded.tokens[bound.request_id][1:]
    assert got == expected[bound.request_id]


def test_a_grammar_that_fails_between_reaping_and_the_step_stops_nobody() -> None:
    constraint = Constraint(make_worker()[0].engine.grammars._masks)
    constraint.error = InvalidRequest("no such grammar")
    constraint.is_ready = True
    assert constraint.allowed() is None, "what is not bound by it is thrown away with the sequence"


# ---- neighbours


def test_an_unconstrained_row_is_the_same_to_the_bit() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    free = SamplerRow(SamplingParams(seed=4), 2, (), (), (EOS,))
    bound = dataclasses.replace(free, allowed=lambda: np.arange(50) == 7)
    alone, beside = logits.clone(), logits.clone()
    tokens, others = sample(alone, [free, free, free]), sample(beside, [free, bound, free])
    assert others == [tokens[0], 7, tokens[2]]
    assert torch.equal(alone[[0, 2]], beside[[0, 2]])


@pytest.mark.parametrize("grammar", ["start: /[/", "start: thinking", write.grammar(write.regex_body(r"[^\s\S]"))])
def test_a_grammar_that_fails_ends_its_own_sequence_only(grammar: str) -> None:
    free, bound = constrained("", "free", max_tokens=5), constrained(grammar, "bound")
    worker, outcomes = make_worker()
    run_mixed(worker, [bound, free])
    outcomes.drain()
    assert isinstance(outcomes.errors["bound"], InvalidRequest)
    assert outcomes.errors["bound"].code == "invalid_grammar"
    assert len(outcomes.tokens["free"]) <= 5
    assert outcomes.reasons.keys() == {"free"}
    assert worker.pool.num_used == 0
    assert worker.check()


def test_a_grammar_that_fails_on_the_way_ends_its_own_sequence_only() -> None:
    """Behind the first letter nothing can follow."""
    bound = constrained(write.grammar("/a/ " + write.regex_body(r"[^\s\S]")), "bound")
    worker, outcomes = make_worker()
    run_mixed(worker, [bound, constrained("", "free", max_tokens=5)])
    outcomes.drain()
    assert isinstance(outcomes.errors["bound"], InvalidRequest)
    assert outcomes.reasons.keys() == {"free"}
    assert worker.pool.num_used == 0


# ---- how it meets other ways to end


def test_ignore_eos_does_not_outlive_a_grammar_that_has_ended() -> None:
    worker, outcomes = make_worker()
    run_mixed(worker, [constrained(write.grammar("/a{1,3}/"), "a", ignore_eos=True, logit_bias=((EOS, 100.0),))])
    outcomes.drain()
    assert outcomes.reasons == {"a": "stop"}
    assert text_of(outcomes.tokens["a"]) == "a"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (3, "aaa"), (9, "aaaaaa")])
def test_min_tokens_holds_as_long_as_the_grammar_can_go_on(min_tokens: int, text: str) -> None:
    letters = [i for i, b in enumerate(tiny_tokenizer().text_bytes(VOCAB)) if b.startswith(b"aa")]
    bias = ((EOS, 100.0), *((i, -100.0) for i in letters))
    worker, outcomes = make_worker()
    run_mixed(worker, [constrained(write.grammar("/a{0,6}/"), "a", min_tokens=min_tokens, logit_bias=bias)])
    outcomes.drain()
    assert outcomes.reasons == {"a": "stop"}
    assert text_of(outcomes.tokens["a"]) == text


def test_the_limit_of_tokens_holds() -> None:
    worker, outcomes = make_worker()
    run_mixed(worker, [constrained(write.grammar("/[ab]{50}/"), "a", max_tokens=4)])
    outcomes.drain()
    assert outcomes.reasons == {"a": "length"}
    assert len(outcomes.tokens["a"]) == 4


def test_a_worker_without_vocabulary_says_so() -> None:
    worker, outcomes = make_worker()
    worker.engine.grammars._make_compiler = None
    run_mixed(worker, [constrained("start: /a/", "a")])
    outcomes.drain()
    assert "no vocabulary" in str(outcomes.errors["a"])
