"""What a vision replica does, without Ray: claim, encode what is wanted, push in pieces of whole rows."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch

from ernie_cluster.engine.slices import EMBED_PIECE
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport.base import Channel, PieceHeader
from tests.tiny import encode

TIMEOUT_S = 30.0


def show(channel: Channel, request: GenerationRequest, epoch: int, rows_each: int = 4) -> None:
    """Send a request's pictures to the prefill worker at the channel's other end, and wait until they are there."""
    if not request.media:
        return
    claim = channel.call({"type": "claim", "request_id": request.request_id, "epoch": epoch}, TIMEOUT_S)
    wanted = claim.result(TIMEOUT_S)["media"]
    assert isinstance(wanted, list)
    pushes: list[Future[None]] = []
    for index in wanted:
        assert isinstance(index, int)
        rows = encode(request.media[index]).view(torch.uint8).numpy()
        for first in range(0, len(rows), rows_each):
            part = rows[first : first + rows_each].reshape(-1)
            num_rows = len(part) // rows.shape[1]
            header = PieceHeader(
                request.request_id, epoch, len(pushes), part.nbytes, (EMBED_PIECE, index, first, num_rows)
            )
            pushes.append(channel.push(header, lambda out, part=part: np.copyto(out, part)))  # type: ignore[misc]
    for push in pushes:
        push.result(TIMEOUT_S)
