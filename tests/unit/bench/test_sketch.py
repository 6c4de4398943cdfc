"""Laws of the sketch: merging parts is the whole, and percentiles are within the promised error of the true ones."""

from __future__ import annotations

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.bench.sketch import ERROR, LEAST_S, Sketch

DURATIONS = st.lists(st.floats(LEAST_S, 1e4), max_size=60)
SHARES = st.sampled_from([0.01, 0.1, 0.5, 0.51, 0.9, 0.99, 1.0])


def sketch_of(values: list[float]) -> Sketch:
    sketch = Sketch()
    sketch.extend(values)
    return sketch


@settings(max_examples=50)
@given(st.lists(DURATIONS, max_size=5))
def test_parts_in_any_order_add_up_to_the_whole(parts: list[list[float]]) -> None:
    whole = sketch_of([value for part in parts for value in part])
    for order in (parts, parts[::-1]):
        found = Sketch()
        for part in order:
            found.merge(Sketch.from_json(json.loads(json.dumps(sketch_of(part).to_json()))))
        assert found == whole


@settings(max_examples=50)
@given(DURATIONS.filter(bool), SHARES)
def test_a_percentile_is_near_the_nearest_rank(values: list[float], share: float) -> None:
    rank = max(1, math.ceil(share * len(values) - 1e-9))
    true = sorted(values)[rank - 1]
    found = sketch_of(values).percentile(share)
    assert found is not None
    assert abs(found - true) <= (ERROR + 1e-9) * true


@settings(max_examples=50)
@given(DURATIONS.filter(bool))
def test_percentiles_rise_to_the_maximum(values: list[float]) -> None:
    sketch = sketch_of(values)
    found = [sketch.percentile(share / 20) or 0.0 for share in range(1, 21)]
    assert found == sorted(found)
    assert found[-1] <= sketch.max_s == max(values)


def test_nothing_has_no_percentile_and_no_mean() -> None:
    assert Sketch().percentile(0.5) is None
    assert Sketch().mean_s is None


def test_mean_and_count_are_exact() -> None:
    sketch = sketch_of([0.1, 0.2, 0.6])
    assert (len(sketch), sketch.mean_s) == (3, 0.3)
