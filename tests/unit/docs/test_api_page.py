"""`docs/api.md` and `/openapi.json` have the same routes."""

from __future__ import annotations

import re

from ernie_cluster.api.routes import OPERATIONS
from tests.unit.docs.pages import ROOT

NOT_TOLD = {("GET", "/"), ("GET", "/openapi.json")}
"""Routes that OpenAPI's document does not tell of: a page for people, and itself."""


def test_the_page_has_every_route_and_no_other() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(GET|POST|DELETE) (/[^\s`?]*)`", text))
    assert told == {(o.method.upper(), o.path) for o in OPERATIONS} | NOT_TOLD
