"""The parts of the live benchmarks: the client's clock, what is read of `/admin/status`, loads and pictures."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.api.operator import ClusterView, ModelView, ReplicaView
from ernie_cluster.config.convert import plain
from ernie_cluster.policy.replay.machine import Job

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    path = sys.path[:]
    sys.path.insert(0, str(SCRIPTS))
    import live_prefixes
    import live_roles
    import prefixes
    import two_models
    from live import client, server

    from ernie_cluster.bench import plot

    shared = SimpleNamespace(chats=live_prefixes.chats, token_ids=live_prefixes.token_ids, trace=prefixes.make_trace)
    yield SimpleNamespace(shared=shared, roles=live_roles, two=two_models, client=client, plot=plot, server=server)
    sys.path[:] = path


def answered(bench: SimpleNamespace, *writes: bytes) -> SimpleNamespace:
    """What the client sees of a server that writes these, one after the other, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(json.loads(await reader.readexactly(length)))
        for piece in writes:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def run() -> list[SimpleNamespace]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await bench.client.play([Job(7, "m", 0.0, 5, 3)], server.sockets[0].getsockname()[1], 10.0)

    asked: list[dict[str, object]] = []
    (seen,) = asyncio.run(run())
    assert (len(asked[0]["prompt"]), asked[0]["max_tokens"]) == (5, 3)  # type: ignore[arg-type]
    return seen


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)] + [b""]
    return b"".join(f"{len(p):x}\r\n".encode() + p + b"\r\n" for p in pieces)


OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = b"".join(
    b"data: " + json.dumps(event).encode() + b"\n\n"
    for event in (
        {"choices": [{"text": "a"}]},
        {"choices": [{"text": "bc"}]},
        {"choices": [], "usage": {"completion_tokens": 3}},
    )
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_whole_however_it_is_cut(bench: SimpleNamespace, size: int) -> None:
    seen = answered(bench, OK, chunked(EVENTS + b"data: [DONE]\n\n", size))
    assert seen.is_whole, seen
    assert 0 <= seen.sent_s <= seen.first_s <= seen.last_s
    assert seen.keeps(10, 10)
    assert not seen.keeps(seen.ttft_s / 2, 10)


@pytest.mark.parametrize(
    ("writes", "is_refused", "words"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull"], True, "full"),
        ([OK, chunked(EVENTS, 50)[:60]], False, "Incomplete"),
        ([OK, chunked(EVENTS + b'data: {"error": {"message": "lost"}}\n\n', 50)], False, "lost"),
        ([b""], False, "Incomplete"),
    ],
)
def test_what_is_not_whole_says_why(bench: SimpleNamespace, writes: list[bytes], is_refused: bool, words: str) -> None:
    seen = answered(bench, *writes)
    assert not seen.is_whole
    assert seen.is_refused == is_refused
    assert words in seen.error
    assert not seen.keeps(10, 10)


@settings(max_examples=30)
@given(st.integers(2, 16), st.floats(0.3, 1.0), st.floats(1.1, 8.0))
def test_both_phases_are_as_much_work_and_differ_in_its_kind(
    bench: SimpleNamespace, replicas: int, load: float, shift: float
) -> None:
    phases = bench.roles.phases_of(replicas, load, shift, 50.0, 2)
    work = [[p.requests_per_s * s for s in bench.roles.work_s(p.prompt_tokens, p.output_tokens)] for p in phases]
    assert [sum(w) for w in work] == pytest.approx([load * replicas] * 2)
    assert work[0][0] / work[0][1] / (work[1][0] / work[1][1]) == pytest.approx(shift, rel=1e-3)


def test_each_split_is_too_small_for_a_phase_on_paper(bench: SimpleNamespace) -> None:
    phases = bench.roles.phases_of(8, 0.9, 3.0, 30.0, 2)
    jobs = list(bench.roles.jobs_of(phases, 1))
    shares = {k: bench.roles.row_of(str(k), bench.roles.replayed(str(k), 8, jobs), phases).by_phase for k in (3, 5)}
    assert shares[3][0] < 0.5 < shares[5][0]
    assert shares[5][1] < 0.5


def test_a_fragment_is_laid_over_a_configuration(bench: SimpleNamespace) -> None:
    base = {"models": [{"name": "a", "pools": [{"role": "prefill"}, {"role": "decode"}]}], "api": {"port": 1}}
    more = {"models": [{"pools": [{"max_replicas": 7}]}], "scaling": {"budget": 8}}
    assert bench.roles.overlaid(base, more) == {
        "models": [{"name": "a", "pools": [{"role": "prefill", "max_replicas": 7}, {"role": "decode"}]}],
        "api": {"port": 1},
        "scaling": {"budget": 8},
    }


def status(used: float, *replicas: tuple[str, str, str]) -> dict[str, object]:
    views = tuple(ReplicaView(f"{m}/{i}", m, "mixed", r, p, "n", 0.0) for i, (m, r, p) in enumerate(replicas))  # type: ignore[arg-type]
    models = (ModelView("first", True, "", 0), ModelView("second", True, "", 0))
    return plain(ClusterView(models, views, True, 4.0, used, "cores", ()))  # type: ignore[no-any-return]


def recorded(bench: SimpleNamespace, used: float) -> tuple[list[SimpleNamespace], list[SimpleNamespace]]:
    """Three looks at two models, during which one request of the first ends well and one badly."""
    good = bench.client.Seen("first", 0.5, 0.5, 10, 3, 200, 0.75, 1.0, 3)
    bad = bench.client.Seen("first", 0.6, 0.6, 10, 3, 500, error="broken")
    jobs = [Job(0, "first", 0.5, 10, 3), Job(1, "first", 0.6, 10, 3)]
    recorder = bench.two.Recorder(jobs)
    quiet = status(2, ("first", "prefill", "ready"), ("second", "decode", "ready"))
    recorder.note(0.0, bench.server.Fleet.of(quiet))
    recorder.ended(good)
    busy = status(
        used, ("first", "prefill", "ready"), ("first", "decode", "switching"), ("first", "decode", "starting")
    )
    recorder.note(1.0, bench.server.Fleet.of(busy))
    recorder.ended(bad)
    recorder.note(2.0, bench.server.Fleet.of(busy))
    return recorder.seconds, [good, bad]


def test_each_second_has_its_replicas_and_requests(bench: SimpleNamespace) -> None:
    seconds, _ = recorded(bench, 3)
    rows = bench.two.rows_of(seconds)
    assert [(r["first.prefill"], r["first.decode"], r["first.starting"], r["first.switching"]) for r in rows] == [
        (1, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1),
    ]  # fmt: skip
    assert [(r["first.offered"], r["first.finished"], r["first.failed"]) for r in rows] == [
        (0, 0, 0),
        (2, 1, 0),
        (0, 0, 1),
    ]
    assert [r["first.ttft_p90_s"] for r in rows] == ["", 0.25, ""]


def test_a_failure_and_a_broken_budget_are_found(bench: SimpleNamespace) -> None:
    seconds, seen = recorded(bench, 5)
    said = bench.two.faults(seconds, seen)
    assert said[0] == "1 of 2 requests failed; the first, at 1 s: 500 broken"
    assert said[1:] == [f"at {s} s 5 cores were in use, the budget is 4" for s in (1, 2)]
    seconds, seen = recorded(bench, 4)
    assert bench.two.faults(seconds, seen[:1]) == []


def test_the_picture_is_xml_with_all_that_is_there(bench: SimpleNamespace) -> None:
    seconds, _ = recorded(bench, 3)
    svg = bench.plot.drawn([s.at_s for s in seconds], bench.two.panels_of(seconds), [(0.5, 1.5, "burst & more")])
    words = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"first: replicas", "second: replicas", "starting", "requests per second", "burst & more"} <= set(words)
    assert "mixed" not in words


def test_chats_are_taken_whole_and_in_the_time_there_is(bench: SimpleNamespace) -> None:
    trace = bench.shared.trace(400)
    taken = bench.shared.chats(trace, 4, 60.0)
    assert (taken[0].time_s, taken[-1].time_s) == (0.0, pytest.approx(60.0))
    heads = {a.chain[:2] for a in taken}
    assert len(taken) == sum(a.chain[:2] in heads for a in trace)
    assert 50 < len(taken) < 150


def test_prompts_share_as_many_tokens_as_their_chains_share_blocks(bench: SimpleNamespace) -> None:
    trace = bench.shared.trace(60)
    for a, b in itertools.combinations(trace[:25], 2):
        blocks, tokens = num_shared(a.chain, b.chain), num_shared(*map(bench.shared.token_ids, (a, b)))
        shorter = min(a.num_tokens, b.num_tokens)
        assert min(16 * blocks, shorter) <= tokens < 16 * blocks + 4
        assert len(bench.shared.token_ids(a)) == a.num_tokens


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first items are equal."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
