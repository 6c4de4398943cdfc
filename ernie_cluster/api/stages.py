"""Metrics of the stages behind the API, taken from the timelines of answers when they end: replicas record nothing."""

from __future__ import annotations

from collections.abc import Iterable

from ernie_cluster.observe.metrics import Metrics
from ernie_cluster.request import Span

_SECONDS = {"queue": "ernie_queue_seconds", "prefill": "ernie_prefill_seconds", "encode": "ernie_encode_seconds"}
_HANDED_OVER = {"transfer": "kv", "embeddings": "embeddings"}


def record_stages(metrics: Metrics, model: str, spans: Iterable[Span]) -> None:
    """Put how long stages took, and what they moved, into histograms; stages without one are passed over.

    Args:
        model: served name.
        spans: of one answer, all its attempts included. A picture that was in a cache was not encoded.
    """
    for span in spans:
        detail, took_s = dict(span.detail), max(0.0, span.duration_s)  # a wall clock may be set back
        if span.name in _SECONDS and not (span.name == "encode" and detail.get("cached")):
            metrics.observe(_SECONDS[span.name], took_s, model=model)
        elif span.name in _HANDED_OVER:
            kind, num_bytes = _HANDED_OVER[span.name], float(detail.get("bytes", 0))
            metrics.observe("ernie_transfer_seconds", took_s, kind=kind)
            metrics.observe("ernie_transfer_size_bytes", num_bytes, kind=kind)
            metrics.inc("ernie_transfer_bytes_total", num_bytes, kind=kind)
        elif span.name == "fetch":
            metrics.inc("ernie_prefix_fetches_total", model=model, outcome=str(detail.get("failed", "fetched")))
            metrics.inc("ernie_fetched_blocks_total", int(detail.get("blocks", 0)), model=model)
