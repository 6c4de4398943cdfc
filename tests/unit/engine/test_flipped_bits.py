"""Bits that flip between prefill and decode: noticed, repeated, and the answer is the calm one. Without the checksum it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from numpy.typing import NDArray

from ernie_cluster.config.faults import FaultRule, FaultsConfig
from ernie_cluster.errors import TransferFailed
from ernie_cluster.faults import FaultOrder, Faults
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport import inbox
from ernie_cluster.transport.base import PieceHeader
from ernie_cluster.transport.faulty import FaultyChannel
from tests.tiny import make_request, make_worker, run_mixed
from tests.unit.engine.test_handover import Path

pytestmark = pytest.mark.timeout(120)

LENGTHS = (70, 90)


def asked() -> list[GenerationRequest]:
    return [make_request(range(9, 9 + length), f"c{length}", max_tokens=12) for length in LENGTHS]


@pytest.fixture(scope="module")
def calm() -> dict[str, list[int]]:
    worker, outcomes = make_worker(max_batch_tokens=1024)
    run_mixed(worker, asked())
    outcomes.drain()
    return {r.request_id: outcomes.tokens[r.request_id] for r in asked()}


def corrupting(path: Path, **how: float) -> Faults:
    """Wraps the way of KV."""
    rule = FaultRule("transport.push", "corrupt", **how)  # type: ignore[arg-type]
    faults = Faults("prefill", "p", FaultsConfig(True, 3, (rule,)))
    path.kv = FaultyChannel(path.kv, faults)  # type: ignore[assignment]
    return faults


def num_struck(faults: Faults) -> int:
    return sum(state.num_struck for state in faults.obey(FaultOrder("list")))


def attempted(path: Path, request: GenerationRequest) -> TransferFailed | None:
    """Until one attempt is over; None when its answer is whole."""
    path.open(request)
    while True:
        path.prefilled.drain(0.01)
        path.decoded.drain(0.01)
        error = path.prefilled.errors.pop(request.request_id, None)
        assert error is None or isinstance(error, TransferFailed)
        if error is not None or request.request_id in path.decoded.reasons:
            return error


def answered(path: Path, request: GenerationRequest) -> list[int]:
    """As the API's side does it: a new attempt goes on from the tokens that the client has."""
    tokens: list[int] = []
    for number in range(5):
        attempt = replace(request, request_id=f"{request.request_id}#{number}", output_token_ids=tuple(tokens))
        key, unknown = attempt.request_id, len(tokens)
        path.prefilled.tokens[key], path.decoded.tokens[key] = [-1] * unknown, [-1] * (unknown + 1)
        error = attempted(path, attempt)
        tokens += path.prefilled.tokens[key][unknown:]
        if error is None:
            return tokens + path.decoded.tokens[key][unknown + 1 :]
        path.decode.abort(key)
    raise AssertionError("it failed again and again")


def test_attempts_are_repeated_and_the_answer_is_the_calm_one(calm: dict[str, list[int]]) -> None:
    with Path(prefill={"piece_bytes": 8192}) as path:
        faults = corrupting(path, times=3)
        assert {r.request_id: answered(path, r) for r in asked()} == calm
        assert num_struck(faults) == 3


def test_without_the_checksum_a_wrong_answer_appears(
    calm: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above proves something."""
    real = inbox.accept

    def blind(sink: object, header: PieceHeader, digest: int, payload: NDArray) -> str | None:  # type: ignore[type-arg]
        return real(sink, header, inbox.checksum(payload), payload)  # type: ignore[arg-type]

    monkeypatch.setattr(inbox, "accept", blind)
    with Path(prefill={"piece_bytes": 8192}) as path:
        faults = corrupting(path)
        answers = path.run(asked())
        assert num_struck(faults) > 0
        assert answers != calm
