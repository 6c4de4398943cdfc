"""Vision -> prefill -> decode in one process over the local transport, on the tiny model: the same tokens as one engine.

And what happens to the books of both sides when something on the way goes wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType

import pytest

from ernie_cluster.errors import ErnieClusterError, ReplicaLost, TransferFailed
from ernie_cluster.request import GenerationRequest, TokenEvent
from ernie_cluster.transport.local import Faults, LocalChannel, LocalReceiver
from tests.tiny import Outcomes, make_request, make_worker
from tests.unit.engine.handover_path import show
from tests.unit.engine.test_laws import answers, requests

TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """One engine does it all."""
    return answers(*make_worker(max_batch_tokens=1024), requests())


class Path:
    """Two running workers and the channels to them; at the end nothing may be left anywhere.

    Args:
        faults: of the way from prefill to decode.
        prefill, decode: settings of the workers.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        prefill: Mapping[str, object] | None = None,
        decode: Mapping[str, object] | None = None,
    ) -> None:
        self.prefill, self.prefilled = make_worker("prefill", **(prefill or {}))  # type: ignore[arg-type]
        self.decode, self.decoded = make_worker("decode", **(decode or {}))  # type: ignore[arg-type]
        self.kv = self.new_channel(faults)
        self.embeds = LocalChannel(LocalReceiver(self.prefill.inbox), "vision")
        self._channels = [self.kv, self.embeds]

    def new_channel(self, faults: Faults | None = None) -> LocalChannel:
        """Another way from prefill to decode."""
        channel = LocalChannel(LocalReceiver(self.decode.inbox), "prefill", faults, stall_timeout_s=0.3)
        self._channels = [*getattr(self, "_channels", []), channel]
        return channel

    def open(self, request: GenerationRequest, epoch: int = 0, channel: LocalChannel | None = None) -> None:
        """What a backend does for each request: everything at once."""
        self.decode.open_decode(request, epoch)
        self.prefill.open_prefill(request, epoch, channel or self.kv)
        show(self.embeds, request, epoch)

    def run(self, some: list[GenerationRequest]) -> dict[str, list[int]]:
        """Tokens of requests that all go well."""
        for request in some:
            # decode's first event bears index 1
            self.decoded.tokens[request.request_id] = [-1]
            self.open(request)
        self.decoded.wait_for([r.request_id for r in some], TIMEOUT_S)
        self.prefilled.drain()
        assert not self.prefilled.errors
        assert not self.decoded.errors
        return {r.request_id: self.prefilled.tokens[r.request_id] + self.decoded.tokens[r.request_id][1:] for r in some}

    def failure(self, request_id: str) -> Exception:
        """How a request failed on the prefill side; nobody decodes it."""
        self.prefilled.wait_for([request_id], TIMEOUT_S)
        self.decoded.drain()
        assert self.decoded.tokens.get(request_id, [-1]) == [-1]
        return self.prefilled.errors.pop(request_id)

    def __enter__(self) -> Path:
        self.prefill.start()
        self.decode.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for channel in self._channels:
            channel.close()
        for worker in (self.prefill, self.decode):
            worker.stop()
            if kind is None:
                assert worker.failure is None
                assert worker.check()
                assert worker.pool.num_used == 0


@pytest.mark.parametrize(
    ("piece_bytes", "prefill_budget", "decode_budget"),
    [(1 << 20, 1024, 64), (2048, 64, 64), (5000, 7, 16), (1 << 20, 3, 64)],
    ids=["one piece", "a block and layer each", "odd pieces, small chunks", "chunks below a block"],
)
def test_three_workers_give_what_one_gives(
    expected: dict[str, list[int]], piece_bytes: int, prefill_budget: int, decode_budget: int
) -> None:
    prefill = {"piece_bytes": piece_bytes, "max_batch_tokens": prefill_budget}
    with Path(prefill=prefill, decode={"max_batch_tokens": decode_budget}) as path:
        assert path.run(requests()) == expected
        assert path.decode.snapshot().kv_bytes_received == path.prefill.snapshot().kv_bytes_sent > 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_kv_in_8_bits_travels_with_its_scales(expected: dict[str, list[int]], kv_dtype: str) -> None:
    one = answers(*make_worker(max_batch_tokens=1024, kv_dtype=kv_dtype), requests())
    assert one != expected
    with Path(prefill={"kv_dtype": kv_dtype, "piece_bytes": 2048}, decode={"kv_dtype": kv_dtype}) as path:
        assert path.run(requests()) == one


def renamed(some: list[GenerationRequest], prefix: str) -> list[GenerationRequest]:
    return [dataclasses.replace(r, request_id=prefix + r.request_id) for r in some]


def test_prefixes_that_both_sides_hold_are_not_sent_again(expected: dict[str, list[int]]) -> None:
    with Path() as path:
        path.run(requests())
        sent = path.prefill.snapshot().kv_bytes_sent
        again = path.run(renamed(requests(), "again-"))
        assert again == {"again-" + key: tokens for key, tokens in expected.items()}
        assert path.prefill.snapshot().kv_bytes_sent - sent < sent / 2


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_prefix_that_one_side_holds(expected: dict[str, list[int]], side: str) -> None:
    """The other side has no cache: all is sent though little was computed, or little though all was."""
    other = {"prefill": "decode", "decode": "prefill"}[side]
    with Path(**{other: {"enable_prefix_cache": False}}) as path:  # type: ignore[arg-type]
        path.run(requests())
        before = path.prefill.snapshot()
        again = path.run(renamed(requests(), "again-"))
        after = path.prefill.snapshot()
    assert again == {"again-" + key: tokens for key, tokens in expected.items()}
    num_computed, num_sent = after.prompt_tokens - before.prompt_tokens, after.kv_bytes_sent - before.kv_bytes_sent
    if side == "prefill":
        assert (num_computed < before.prompt_tokens / 2, num_sent) == (True, before.kv_bytes_sent)
    else:
        assert (num_computed, num_sent < before.kv_bytes_sent / 2) == (before.prompt_tokens, True)


@pytest.mark.parametrize("budget", [1, 4, 64])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_continued_request_is_handed_over_whole(expected: dict[str, list[int]], cut: int, budget: int) -> None:
    """What was generated elsewhere is a prompt here, to its last token."""
    replays = [dataclasses.replace(r, output_token_ids=tuple(expected[r.request_id][:cut])) for r in requests()]
    with Path(prefill={"max_batch_tokens": budget, "max_num_seqs": 1}) as path:
        for request in replays:
            path.prefilled.tokens[request.request_id] = list(request.output_token_ids)
            path.decoded.tokens[request.request_id] = [-1] * (cut + 1)
            path.open(request)
        path.decoded.wait_for([r.request_id for r in replays], TIMEOUT_S)
        path.prefilled.drain()
        for request_id, tokens in expected.items():
            assert path.prefilled.tokens[request_id] + path.decoded.tokens[request_id][cut + 1 :] == tokens


def test_text_that_decode_preempts_is_computed_again_there(expected: dict[str, list[int]]) -> None:
    text = [r for r in requests() if not r.media]
    with Path(decode={"num_blocks": 18, "reserve_output_tokens": 0, "enable_prefix_cache": False}) as path:
        got = path.run(text)
        assert path.decode.snapshot().preemptions > 0
    assert got == {r.request_id: expected[r.request_id] for r in text}


def test_a_first_token_that_is_the_last_leaves_a_lease_to_be_ended() -> None:
    with Path() as path:
        path.open(make_request([5, 6, 7], "a", max_tokens=1))
        path.prefilled.wait_for(["a"], TIMEOUT_S)
        assert path.prefilled.reasons == {"a": "length"}
        assert path.decode.snapshot().num_leases == 1
        assert path.decode.abort("a")


@pytest.fixture
def request_for_faults() -> GenerationRequest:
    return requests()[2]  # 40 tokens of text: 10 blocks in 4 layers, 40 pieces of one block and layer each


@pytest.mark.parametrize("mishap", ["corrupt", "fail", "lose", "drop"])
@pytest.mark.parametrize("piece", [0, 17, 39])
def test_a_mishap_fails_the_attempt_and_the_next_one_succeeds(
    mishap: str, piece: int, request_for_faults: GenerationRequest, expected: dict[str, list[int]]
) -> None:
    faults = Faults()
    getattr(faults, mishap)(piece)
    kind: type[ErnieClusterError] = ReplicaLost if mishap in ("lose", "drop") else TransferFailed
    with Path(faults, prefill={"piece_bytes": 2048, "max_batch_tokens": 16}) as path:
        request, request_id = request_for_faults, request_for_faults.request_id
        path.open(request)
        assert isinstance(path.failure(request_id), kind)
        assert path.prefill.snapshot().free_blocks == path.prefill.snapshot().total_blocks
        first = path.prefilled.tokens.pop(request_id, [])
        assert first == expected[request_id][: len(first)]
        path.decoded.tokens[request_id] = [-1]
        path.open(request, 1, path.new_channel())
        path.decoded.wait_for([request_id], TIMEOUT_S)
        path.prefilled.drain()
        assert path.prefilled.tokens[request_id] + path.decoded.tokens[request_id][1:] == expected[request_id]


def test_a_late_piece_of_a_lost_attempt_is_refused(
    request_for_faults: GenerationRequest, expected: dict[str, list[int]]
) -> None:
    """It arrives while the next attempt decodes in the very same blocks."""
    faults = Faults()
    release = faults.hold(5)
    request, request_id = request_for_faults, request_for_faults.request_id
    with Path(faults, prefill={"piece_bytes": 2048}) as path:
        path.open(request)
        assert isinstance(path.failure(request_id), ReplicaLost)  # by its stall timeout
        path.prefilled.tokens.clear()
        path.decoded.tokens[request_id] = [-1]
        received = path.decode.inbox.bytes_received
        path.open(request, 1, path.new_channel())
        release()
        path.decoded.wait_for([request_id], TIMEOUT_S)
        path.prefilled.drain()
        assert path.prefilled.tokens[request_id] + path.decoded.tokens[request_id][1:] == expected[request_id]
        assert path.decode.inbox.bytes_received - received == 40 * 2048  # the new attempt's alone


def test_the_timeline_names_each_stage(request_for_faults: GenerationRequest) -> None:
    events: list[TokenEvent] = []
    with Path() as path:
        for outcomes in (path.prefilled, path.decoded):
            keep_events(outcomes, events)
        path.run([request_for_faults])
    names = {span.name: dict(span.detail) for event in events for span in event.spans}
    assert names["prefill"] == {"tokens": 40, "cached_tokens": 0}
    assert names["transfer"]["bytes"] == 10 * path.decode.layout.block_bytes
    assert names["decode"] == {"tokens": 9}


def keep_events(outcomes: Outcomes, events: list[TokenEvent]) -> None:
    take = outcomes._take

    def kept(outcome: object) -> None:
        if isinstance(outcome, TokenEvent):
            events.append(outcome)
        take(outcome)  # type: ignore[arg-type]

    outcomes._take = kept  # type: ignore[method-assign]
