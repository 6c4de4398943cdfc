"""Work that lasts as long as imagined, on a clock that stands still unless somebody sleeps or works."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.actors.encoder import EmulatedEncoder, Encoder
from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.engine.emulate import EmulatedRunner, Patience
from tests.tiny import CPU, make_image, make_request, make_worker, tiny_vision

SECONDS = EmulateConfig(
    chunk_s=1, token_s=0.1, step_s=0.5, sequence_s=0.02, kv_token_s=0.003, picture_s=2, media_token_s=0.25
)
COUNTS = st.integers(0, 10_000)


@dataclass
class Time:
    """A clock, and a way to let it run, which lasts too long by `oversleeps_s`."""

    now_s: float = 100.0
    oversleeps_s: float = 0.0
    slept: list[float] = field(default_factory=list)

    def patience(self) -> Patience:
        return Patience(lambda: self.now_s, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds + self.oversleeps_s


@settings(max_examples=50)
@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_a_step_with_more_in_it_never_lasts_less(prompt: int, more: int, sequences: int, kv: int) -> None:
    lasts = SECONDS.of_step(prompt, sequences, kv)
    assert SECONDS.of_step(prompt + more, sequences, kv) >= lasts
    assert SECONDS.of_step(prompt, sequences + more, kv) >= lasts
    assert SECONDS.of_step(prompt, sequences, kv + more) >= lasts


def test_the_parts_of_a_step_add_up() -> None:
    assert SECONDS.of_step(30, 0, 0) == pytest.approx(1 + 3)
    assert SECONDS.of_step(0, 5, 200) == pytest.approx(0.5 + 0.1 + 0.6)
    assert SECONDS.of_step(30, 5, 200) == pytest.approx(1 + 3 + 0.1 + 0.6)
    assert SECONDS.of_picture(4) == 3


@settings(max_examples=50)
@given(st.floats(0, 100), st.floats(0, 100))
def test_work_lasts_as_long_as_imagined_or_as_long_as_it_takes(takes_s: float, imagined_s: float) -> None:
    time = Time()
    time.now_s += takes_s
    time.patience().until(100.0, imagined_s)
    assert time.now_s == pytest.approx(100 + max(takes_s, imagined_s))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 0.4), st.floats(0, 0.6)), min_size=1, max_size=30))
def test_many_pieces_one_after_the_other_last_as_long_as_imagined(pieces: list[tuple[float, float]]) -> None:
    time = Time()
    patience = time.patience()
    for takes_s, time.oversleeps_s in pieces:
        start_s = time.now_s
        time.now_s += takes_s
        patience.until(start_s, 1.0)
    late_s = time.now_s - 100 - len(pieces)
    assert 0 <= round(late_s, 6) <= 0.6


def test_what_was_overslept_is_forgotten_in_a_pause() -> None:
    time = Time(oversleeps_s=0.5)
    patience = time.patience()
    patience.until(time.now_s, 1.0)
    time.now_s += 3
    patience.until(time.now_s, 1.0)
    assert time.slept == [1, 1]


def test_a_stall_is_made_up_for_by_one_piece_at_most() -> None:
    time = Time()
    patience = time.patience()
    time.now_s += 60
    patience.until(100, 1.0)
    for _ in range(2):
        patience.until(time.now_s, 1.0)
    assert time.slept == [1]


def test_work_that_takes_longer_is_told_of_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    patience = time.patience()
    with caplog.at_level(logging.WARNING):
        for _ in range(90):
            time.now_s += 1
            patience.until(time.now_s - 1, 0.5)
    assert patience.num_late == 90
    assert [r.message for r in caplog.records] == [
        "engine.emulate imagines 500.0 ms for what took 1000.0 ms (1 times so far): imagine slower hardware, or fewer "
        "replicas on this machine",
        "engine.emulate imagines 500.0 ms for what took 1000.0 ms (61 times so far): imagine slower hardware, or fewer "
        "replicas on this machine",
    ]


def test_an_engine_answers_as_ever_and_each_step_takes_its_time() -> None:
    prompts = ([5, 6, 7, 8, 9], list(range(20, 30)))

    def answers(emulate: EmulateConfig | None, time: Time) -> dict[str, list[int]]:
        worker, outcomes = make_worker()
        worker.engine.runner = EmulatedRunner.of(worker.engine.runner, emulate, time.patience())
        for i, prompt in enumerate(prompts):
            worker.open_prefill(make_request(prompt, f"r{i}", max_tokens=3), 0, None)
        while worker.engine.step():
            pass
        return outcomes.tokens

    time = Time()
    assert answers(SECONDS, time) == answers(None, time)
    expected = [
        1 + 15 * 0.1,  # both prompts
        0.5 + 2 * 0.02 + (6 + 11) * 0.003,
        0.5 + 2 * 0.02 + (7 + 12) * 0.003,
    ]
    assert time.slept == pytest.approx(expected)


def test_a_picture_takes_its_time_once() -> None:
    time, picture = Time(), make_image(0)
    encoder = EmulatedEncoder(tiny_vision(), CPU, SECONDS, time.patience())
    for _ in range(2):
        rows, _ = encoder.embed(picture)
    assert time.slept == [SECONDS.of_picture(picture.num_tokens)]
    assert (rows == Encoder(tiny_vision(), CPU).embed(picture)[0]).all()


def test_without_a_wish_nothing_is_in_between() -> None:
    runner = make_worker()[0].engine.runner
    assert EmulatedRunner.of(runner, None) is runner
