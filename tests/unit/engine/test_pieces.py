"""What arrives at a worker: pieces of KV, commits, pictures. What does not belong is refused and writes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ernie_cluster.engine.sequence import Status
from ernie_cluster.engine.slices import EMBED_PIECE, KV_PIECE
from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport.base import Message, PieceHeader
from tests.tiny import make_image, make_request
from tests.unit.engine.pair import BLOCK_SIZE, PROMPT, Pair, committing
from tests.unit.engine.toy import NUM_LAYERS, answer, picture_pieces

# ---- pieces and commits


def kv_piece(epoch: int, number: int, detail: tuple[int, int, int, int], num_bytes: int | None = None) -> PieceHeader:
    size = detail[1] * detail[3] * 2 * BLOCK_SIZE * 8 if num_bytes is None else num_bytes
    return PieceHeader("a", epoch, number, size, (KV_PIECE, *detail))


def payload(header: PieceHeader) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.full(header.nbytes, 7, np.uint8)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (kv_piece(0, 0, (0, 1, 1, 1)), "attempt 0 is fenced off, attempt 1 holds the lease"),
        (kv_piece(2, 0, (0, 1, 1, 1)), "attempt 2 is fenced off, attempt 1 holds the lease"),
        (dataclasses.replace(kv_piece(1, 0, (0, 1, 1, 1)), request_id="b"), "no lease; it ended or ran out"),
        (kv_piece(1, 9, (0, 1, 1, 1)), "piece 9 came twice"),
        (kv_piece(1, 0, (0, 1, 0, 1)), "does not fit the lease"),  # the cached prefix, which others read
        (kv_piece(1, 0, (0, 1, 3, 2)), "does not fit the lease"),
        (kv_piece(1, 0, (NUM_LAYERS - 1, 2, 1, 1)), "does not fit the lease"),
        (kv_piece(1, 0, (0, 0, 1, 1)), "does not fit the lease"),
        (kv_piece(1, 0, (-1, 1, 1, 1)), "does not fit the lease"),
        (kv_piece(1, 0, (0, 1, 1, 1), num_bytes=8), "does not fit the lease"),
        (PieceHeader("a", 1, 0, 8, (5,)), "unknown kind 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_piece_that_does_not_belong_is_refused_and_writes_nothing(header: PieceHeader, reason: str) -> None:
    pair = Pair()
    pair.decode.open_prefill(make_request([*PROMPT[:4], 1], "cached", max_tokens=1), 0, None)
    while pair.decode.engine.step():
        pass
    pair.decode.open_decode(make_request(PROMPT, "a", max_tokens=1), 1)
    assert pair.decode.leases.find("a", 1).num_shared == 1
    first = kv_piece(1, 9, (0, 1, 2, 1))
    pair.decode.inbox.accept(first, payload(first))
    before, received = pair.decode.engine.runner.kv.data.clone(), pair.decode.inbox.bytes_received
    with pytest.raises(TransferFailed, match=reason):
        pair.decode.inbox.accept(header, payload(header))
    assert pair.decode.engine.runner.kv.data.equal(before)
    assert pair.decode.inbox.bytes_received == received


@pytest.mark.parametrize("error", [TransferFailed("lost"), ReplicaLost("gone")])
def test_a_commit_whose_piece_is_missing_is_refused(error: TransferFailed | ReplicaLost) -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    committing(pair)
    pair.channel.fail(error)
    pair.run()
    assert "1 of 3 pieces did not arrive" in str(pair.prefill_errors["a"])
    assert pair.prefill.pool.num_used == 0
    assert pair.decode.snapshot().num_leases == 1
    pair.open(request, 1)
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert pair.is_empty()


def test_a_commit_that_leaves_blocks_unfilled_is_refused() -> None:
    """Even when its count of pieces is right."""
    pair = Pair()
    pair.decode.open_decode(make_request(PROMPT, "a"), 0)
    piece = kv_piece(0, 0, (0, NUM_LAYERS, 0, 2))
    pair.decode.inbox.accept(piece, payload(piece))
    commit: Message = {"type": "commit", "request_id": "a", "epoch": 0, "num_pieces": 1, "output": [1]}
    with pytest.raises(TransferFailed, match="256 bytes arrived, 9 tokens have 384"):
        pair.decode.inbox.handle(commit, lambda reply: None)
    assert pair.decode.snapshot().num_leases == 1
    assert pair.decode.abort("a")
    assert pair.is_empty()


def test_a_commit_counts_once() -> None:
    pair, request = Pair(), make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    committing(pair)
    message = pair.channel.jobs[-1].message
    pair.channel.deliver_all()
    with pytest.raises(TransferFailed, match="no lease"):
        pair.decode.inbox.handle(message, lambda reply: None)
    pair.run()
    assert pair.tokens("a") == answer(request)


# ---- pictures


def test_rows_of_a_picture_count_once() -> None:
    """A picture is whole when all its rows are there, not when as many have come."""
    pair = Pair()
    request = make_request([7, make_image(1, (1, 4, 4)), 8], "a", max_tokens=3)
    pair.prefill.open_prefill(request, 0, None)
    pieces = picture_pieces(request, 0, 0, 2)
    for _ in range(2):
        pair.prefill.inbox.accept(*pieces[0])
    pair.run()
    assert pair.prefill.engine.sequences["a"].num_computed == 2
    for piece in (pieces[1], *pieces):
        pair.prefill.inbox.accept(*piece)
    assert not pair.prefill.engine.sequences["a"].arriving
    pair.run()
    assert pair.tokens("a") == answer(request)
    assert pair.is_empty()


@pytest.mark.parametrize("is_opened", [True, False])
def test_two_vision_replicas_may_bring_the_same_picture(is_opened: bool) -> None:
    """Both are told that it is wanted, as long as it is not there; rows are taken from whoever brings them first."""
    pair = Pair()
    request = make_request([7, make_image(1, (1, 4, 4)), 8], "a", max_tokens=3)
    replies: list[Message] = []

    def claim() -> None:
        pair.prefill.inbox.handle({"type": "claim", "request_id": "a", "epoch": 0, "media": [0]}, replies.append)

    if is_opened:
        pair.prefill.open_prefill(request, 0, None)
    claim()
    claim()
    if not is_opened:
        assert not replies
        pair.prefill.open_prefill(request, 0, None)
    assert replies == [{"media": [0]}] * 2
    slow, fast = picture_pieces(request, 0, 0, 3), picture_pieces(request, 0, 0, 2)
    for piece in (slow[0], *fast):
        pair.prefill.inbox.accept(*piece)
    claim()
    assert replies[2:] == [{"media": []}]
    pair.prefill.inbox.accept(*slow[1])
    pair.run()
    assert pair.tokens("a") == answer(request)
    with pytest.raises(TransferFailed, match="no prompt waits"):
        pair.prefill.inbox.accept(*slow[1])
    assert pair.is_empty()


@pytest.mark.parametrize(
    ("epoch", "detail", "reason"),
    [
        (1, (EMBED_PIECE, 0, 0, 2), "no prompt waits for attempt 1's picture"),
        (0, (EMBED_PIECE, 1, 0, 2), "no prompt waits"),
        (0, (EMBED_PIECE, -1, 0, 2), "no prompt waits"),
        (0, (EMBED_PIECE, 0, 3, 2), "2 rows from 3 do not fit 4"),
        (0, (EMBED_PIECE, 0, 0, 1), "1 rows from 0 do not fit 4"),
    ],
)
def test_rows_that_do_not_belong_are_refused(epoch: int, detail: tuple[int, ...], reason: str) -> None:
    pair = Pair()
    request = make_request([7, make_image(1, (1, 4, 4)), 8], "a")
    pair.prefill.open_prefill(request, 0, None)
    header, rows = picture_pieces(request, 0, 0, 2)[0]
    with pytest.raises(TransferFailed, match=reason):
        pair.prefill.inbox.accept(dataclasses.replace(header, epoch=epoch, detail=detail), rows)
    assert not pair.prefill.engine.sequences["a"].arriving


@pytest.mark.parametrize("end", ["abort", "deadline", "new attempt"])
def test_half_a_picture_goes_with_its_sequence(end: str) -> None:
    pair = Pair()
    request = dataclasses.replace(make_request([7, make_image(1, (1, 4, 4)), 8], "a", max_tokens=3), timeout_s=5.0)
    pair.prefill.open_prefill(request, 0, None)
    old = pair.prefill.engine.sequences["a"]
    pieces = picture_pieces(request, 0, 0, 2)
    pair.prefill.inbox.accept(*pieces[0])
    if end == "abort":
        pair.prefill.abort("a")
    elif end == "deadline":
        pair.now = 5.0
    else:
        pair.prefill.open_prefill(request, 1, None)
    pair.prefill.engine.step()
    assert (old.status, old.arriving) == (Status.FINISHED, {})
    with pytest.raises(TransferFailed, match="no prompt waits"):
        pair.prefill.inbox.accept(*pieces[1])
    if end == "new attempt":
        for piece in picture_pieces(request, 0, 1, 2):
            pair.prefill.inbox.accept(*piece)
        pair.run()
        assert pair.tokens("a") == answer(request)
    assert pair.is_empty()
