"""Whose turn it is on a channel: requests take turns, and each one's jobs keep their order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.transport.base import PieceHeader
from ernie_cluster.transport.outbox import Call, Outbox, Push
from ernie_cluster.transport.wire import decode_json

JOBS = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40)


def an_outbox() -> Outbox:
    return Outbox(lambda: None, 1 << 20, 30.0)


def push(outbox: Outbox, request_id: str, piece: int) -> None:
    outbox.push(PieceHeader(request_id, 0, piece, 1, (0,)), lambda _: None)


def call(outbox: Outbox, request_id: str, piece: int) -> None:
    outbox.call({"type": "commit", "request_id": request_id, "piece": piece}, 1e9)


def taken(outbox: Outbox) -> tuple[str, int] | None:
    """The next job: whose it is, and its number among those."""
    job = outbox.head()
    if job is None:
        return None
    assert outbox.head() is job
    assert outbox.take(job)
    if isinstance(job, Push):
        return job.header.request_id, job.header.piece
    assert isinstance(job, Call)
    message = decode_json(job.body)
    return str(message["request_id"]), int(message["piece"])  # type: ignore[arg-type]


@given(JOBS, st.lists(st.integers(0, 5), max_size=40))
def test_jobs_of_a_request_go_out_in_their_order_and_none_is_lost(
    jobs: list[tuple[str, bool]], takes: list[int]
) -> None:
    outbox, sent, out = an_outbox(), {"a": 0, "b": 0, "c": 0}, list[tuple[str, int]]()
    for i, (request_id, is_call) in enumerate(jobs):
        (call if is_call else push)(outbox, request_id, sent[request_id])
        sent[request_id] += 1
        for _ in range(takes[i] if i < len(takes) else 0):
            job = taken(outbox)
            out += [job] if job else []
    while job := taken(outbox):
        out.append(job)
    for request_id, count in sent.items():
        assert [piece for owner, piece in out if owner == request_id] == list(range(count))


@settings(max_examples=30)
@given(giants=st.integers(1, 5), num_pieces=st.integers(1, 10))
def test_a_small_hand_over_waits_for_one_piece_of_each_giant_per_piece_of_its_own(giants: int, num_pieces: int) -> None:
    outbox = an_outbox()
    for giant in range(giants):
        for piece in range(60):
            push(outbox, f"giant-{giant}", piece)
    for piece in range(num_pieces):
        push(outbox, "small", piece)
    call(outbox, "small", num_pieces)
    place, seen = 0, 0
    while seen <= num_pieces:
        job = taken(outbox)
        assert job is not None
        place += 1
        seen += job[0] == "small"
    assert place <= (num_pieces + 1) * (giants + 1)
