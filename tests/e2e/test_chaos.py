"""A short experiment with faults on purpose, and what the command `chaos` makes of it; tests/chaos has the long form."""

from __future__ import annotations

import re

import pytest

from ernie_cluster.chaos.blows import AtPoint
from ernie_cluster.chaos.stages import STAGES, Wound
from ernie_cluster.config.faults import Action
from tests.chaos.runner import experiment
from tests.e2e.application import Application

pytestmark = pytest.mark.timeout(240)


def wound(action: Action, role: str, stage: str) -> list[AtPoint]:
    (found,) = (s for s in STAGES if (s.role, s.name) == (role, stage))
    return [AtPoint(Wound(found, action))]


def retries(app: Application) -> float:
    found = re.findall(r'^ernie_request_retries_total{model="tiny".*} (\S+)$', app.get("/metrics").text, re.M)
    return sum(map(float, found))


def test_flipped_bits_on_the_way_change_no_answer(whole_app: Application) -> None:
    before = retries(whole_app)
    volleys = [wound("corrupt", "prefill", "mid-transfer"), wound("corrupt", "vision", "mid-transfer")]
    report = experiment(whole_app, volleys, calm_s=2.0)
    assert [fault.did_strike for fault in report.faults] == [True, True], report.text()
    assert report.objections == [], report.text()
    assert retries(whole_app) > before, "nobody counted what had to be done again"


def test_a_decode_process_that_dies_in_the_middle_of_answers_is_not_missed(whole_app: Application) -> None:
    report = experiment(whole_app, [wound("kill", "decode", "mid-decode")], calm_s=2.0)
    assert [fault.did_strike for fault in report.faults] == [True], report.text()
    assert report.objections == [], report.text()
