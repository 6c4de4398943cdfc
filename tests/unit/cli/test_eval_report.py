"""Scores, intervals, comparisons and tables, without a server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.cli.eval_report import Result, compare, difference_lines, score, score_lines, wilson

TRIALS = st.integers(1, 5000).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num)))


def result(skill: str = "count", seed: int = 0, language: str = "en", **values: object) -> Result:
    return replace(Result(skill, language, seed, "How many?", "3"), **values)  # type: ignore[arg-type]


RIGHT = {"is_right": True, "got": "3"}
ERROR = {"error": "no room (HTTP 429)"}


@given(TRIALS)
def test_the_interval_holds_the_share_and_mirrors(trials: tuple[int, int]) -> None:
    num_right, num = trials
    low, high = wilson(num_right, num)
    assert 0 <= low <= num_right / num + 1e-12
    assert num_right / num - 1e-12 <= high <= 1
    mirrored = wilson(num - num_right, num)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-9)


@given(TRIALS)
def test_more_trials_narrow_the_interval(trials: tuple[int, int]) -> None:
    num_right, num = trials
    (low, high), (closer_low, closer_high) = wilson(num_right, num), wilson(4 * num_right, 4 * num)
    assert closer_high - closer_low < high - low


def test_known_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)  # Source: Wilson 1927's formula by hand
    assert wilson(0, 0) == (0.0, 1.0)


def test_rows_count_answers_and_errors_apart() -> None:
    report = score(
        [
            result(seed=1, **RIGHT, latency_s=1.0),
            result(seed=2, got="4", latency_s=3.0),
            result(seed=3, **ERROR),
            result("tool", **RIGHT, num_calls_due=1, num_calls_formed=1, latency_s=2.0),
            result("tool", seed=1, num_calls_due=1, latency_s=2.0),
            result("ground", is_right=True, iou=0.9, latency_s=2.0),
            result("ground", seed=1, iou=0.1, latency_s=2.0),
        ]
    )
    count, tool, ground = report.rows
    assert (count.num, count.num_right, count.num_errors, count.accuracy) == (2, 1, 1, 0.5)
    assert count.median_latency_s == 2.0
    assert count.share_of_asked == pytest.approx(1 / 3)
    assert (tool.num_calls_due, tool.num_calls_formed) == (2, 1)
    assert (count.mean_iou, ground.mean_iou) == (None, pytest.approx(0.5))
    assert (report.total.num, report.total.num_right, report.total.num_errors) == (6, 3, 1)
    assert report.first_error == "no room (HTTP 429)"


def test_languages_are_rows_and_controls_do_not_count() -> None:
    report = score([result(**RIGHT), result(language="zh"), result("zoom_blind", seed=5)])
    assert [(r.skill, r.language) for r in report.rows] == [("count", "en"), ("count", "zh"), ("zoom_blind", "en")]
    assert (report.total.num, report.total.num_right) == (2, 1)


def test_the_table_is_aligned_and_has_no_empty_column() -> None:
    results = [result(seed=i, is_right=i > 2, latency_s=0.25) for i in range(12)]
    lines = score_lines(score([*results, result("zoom_blind"), result("ground", iou=0.5)]))
    assert lines[0].split() == [
        "skill",
        "language",
        "right",
        "accuracy",
        "95",
        "%",
        "interval",
        "mean",
        "IoU",
        "median",
    ]
    assert lines[2].split()[:5] == ["count", "en", "9/12", "75.0", "%"]
    end = lines[0].index("right") + len("right")
    assert all(line[end : end + 2].strip() == "" for line in lines)
    assert [line.split()[0] for line in lines if "-" not in line] == ["skill", "count", "ground", "all", "zoom_blind"]


def test_the_first_error_is_told_below() -> None:
    assert score_lines(score([result(**ERROR)]))[-1] == "first error: no room (HTTP 429)"
    assert score_lines(score([])) == []


def test_comparing_takes_what_both_have() -> None:
    before = [result(seed=1, **RIGHT), result(seed=2, got="4"), result(seed=3), result("talk", **RIGHT)]
    after = [result(seed=1, **RIGHT), result(seed=2, **RIGHT), result(seed=9), result("talk", got="3", thought="hm")]
    count, talk, total = compare(before, after)
    assert (count.num, count.accuracy_before, count.accuracy, count.num_different) == (2, 0.5, 1.0, 1)
    assert (talk.accuracy_before, talk.accuracy, talk.num_different) == (1.0, 0.0, 1)
    assert (total.skill, total.num, total.num_different) == ("all", 3, 2)
    lines = difference_lines([count, talk, total])
    assert lines[2].split() == ["count", "en", "2", "50.0", "%", "100.0", "%", "+50.0", "1"]


def test_nothing_in_common() -> None:
    (total,) = compare([result(seed=1)], [result(seed=2)])
    assert (total.num, total.num_different) == (0, 0)
