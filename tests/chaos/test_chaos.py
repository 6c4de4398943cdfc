"""Whatever process dies or stands still, at whatever stage: nothing is lost, wrong or hung, and everything comes back.

    pytest tests/chaos --slow -k "decode and kill"

Each scenario is an experiment of its own, with its own calm run. Takes a quarter of an hour on two quiet cores.
"""

from __future__ import annotations

import time

import pytest

from tests.chaos.processes import footprint
from tests.chaos.runner import experiment
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.e2e.application import Application, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

BACK_S = 10.0


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_nobody_notices(whole_app: Application, scenario: Scenario) -> None:
    experiment(whole_app, [], calm_s=0.5)  # every link has been made once, and counts as calm
    calm = footprint()
    report = experiment(whole_app, [scenario.blows], may_break=scenario.may_break)
    ended_s = time.monotonic()
    print(report.text(), report.objections, footprint().objection(calm), sep="\n")
    assert [fault.did_strike for fault in report.faults] == [True], report.text()
    assert report.objections == [], report.text()
    eventually(lambda: footprint().objection(calm), BACK_S - (time.monotonic() - ended_s))
