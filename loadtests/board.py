"""What the users of a Locust run have seen: one book per process, which the master adds up.

Owns the book. Hooks of Locust bring records from users, parts of the book from workers, and the tab "Tokens" into the
web UI; at the end the figures go to the terminal, to FILE_tokens.csv beside Locust's own (`--csv FILE`), and to an SVG.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

from flask import Response, request
from locust import events
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.web import WebUI

from ernie_cluster.bench.course import plotted
from ernie_cluster.bench.options import slo_of
from ernie_cluster.bench.record import Record
from ernie_cluster.bench.report import Side, lines
from ernie_cluster.bench.sketch import Sketch
from ernie_cluster.bench.tally import Book, Tally

KEY = "ernie_book"
"""Of the book's part in a worker's report."""
TAB = "tokens"
COLUMNS: tuple[tuple[str, str], ...] = (
    ("name", "Scenario"),
    ("requests", "# Requests"),
    ("errors", "# Errors"),
    ("ttft50", "TTFT p50 (ms)"),
    ("ttft90", "TTFT p90 (ms)"),
    ("ttft99", "TTFT p99 (ms)"),
    ("itl50", "ITL p50 (ms)"),
    ("itl99", "ITL p99 (ms)"),
    ("tpot50", "TPOT p50 (ms)"),
    ("tpot90", "TPOT p90 (ms)"),
    ("latency50", "E2E p50 (ms)"),
    ("latency99", "E2E p99 (ms)"),
    ("tokens", "Tokens/s"),
    ("goodput", "Goodput/s"),
    ("good", "Within SLO (%)"),
)
"""Key and heading; letters and digits only, because the web UI rewrites keys with underscores."""


class Board:
    """The book of one process, and what is to be sent of it to the master."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new run begins."""
        self.book, self._unsent = Book(), Book()
        self.examples: dict[str, str] = {}
        self._start_s = time.time()
        self._end_s: float | None = None

    def stop(self) -> None:
        """The run is over: rates are taken over its length."""
        self._end_s = self._end_s or time.time()

    def add(self, environment: Environment, record: Record) -> None:
        """Count a request here, and in Locust's own statistics under its scenario."""
        slo = slo_of(environment.parsed_options)
        if isinstance(environment.runner, WorkerRunner):
            self._unsent.add(record, slo)
        else:
            self.book.add(record, slo)
        if record.error:
            self.examples.setdefault(record.error, record.detail)
        environment.events.request.fire(
            request_type="chat",
            name=record.scenario,
            response_time=record.latency_s * 1e3,
            response_length=record.num_tokens,
            exception=RuntimeError(record.error) if record.error else None,
            context={},
            start_time=record.began_s,
        )

    def report(self, data: dict[str, Any]) -> None:
        """On a worker: what the master does not know yet."""
        data[KEY] = self._unsent.to_json() | {"examples": self.examples}
        self._unsent = Book()

    def hear(self, data: dict[str, Any]) -> None:
        """On the master: a worker's report."""
        raw = data.get(KEY)
        if raw is not None:
            self.book.merge(Book.from_json(raw))
            self.examples = raw["examples"] | self.examples

    @property
    def duration_s(self) -> float:
        return max((self._end_s or time.time()) - self._start_s, 1e-3)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each scenario, and one for all."""
        named = [*sorted(self.book.scenarios.items()), ("Aggregated", self.book.total)]
        return [self._row(name, tally) for name, tally in named]

    def _row(self, name: str, tally: Tally) -> dict[str, Any]:
        shares = {
            key: _ms(getattr(tally, key[:-2]), int(key[-2:])) for key, _ in COLUMNS if key[-2:] in ("50", "90", "99")
        }
        return {
            "name": name,
            "requests": tally.num_requests,
            "errors": tally.num_errors,
            **shares,
            "tokens": round(tally.num_tokens / self.duration_s, 1),
            "goodput": round(tally.num_good / self.duration_s, 2),
            "good": round(100 * tally.num_good / max(1, tally.num_requests), 1),
        }

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(heading for _, heading in COLUMNS)
        writer.writerows([row[key] for key, _ in COLUMNS] for row in self.rows())
        return out.getvalue()

    def text(self, url: str) -> str:
        side = Side(url, "", self.book.total, self.duration_s, self.examples, Sketch())
        return "\n".join(lines([side]))


def _ms(sketch: Sketch, percent: int) -> float | None:
    value_s = sketch.percentile(percent / 100)
    return None if value_s is None else round(value_s * 1e3, 1)


BOARD = Board()
"""Of this process; Locust's users and events know no other way to it."""


@events.init.add_listener
def _on_init(environment: Environment, **_: Any) -> None:
    environment.events.quit.add_listener(lambda **_: _finish(environment))
    if environment.web_ui is not None:
        _extend(environment.web_ui)


def _extend(web: WebUI) -> None:
    """The tab "Tokens", and its figures as CSV and as an SVG."""
    web.template_args |= {
        "extended_tabs": [{"title": "Tokens", "key": TAB}],
        "extended_tables": [{"key": TAB, "structure": [{"key": key, "title": title} for key, title in COLUMNS]}],
        "extended_csv_files": [{"href": "tokens/csv", "title": "Download tokens CSV"}],
    }

    @web.app.after_request
    def _with_tokens(response: Response) -> Response:
        if request.path.endswith("/stats/requests") and response.is_json:
            told = response.get_json() | {"extended_stats": [{"key": TAB, "data": BOARD.rows()}]}
            response.set_data(web.app.json.dumps(told))
        return response

    def _csv() -> Response:
        headers = {"content-disposition": "attachment;filename=tokens.csv"}
        return Response(BOARD.csv(), mimetype="text/csv", headers=headers)

    web.app.add_url_rule("/tokens/csv", "tokens_csv", web.auth_required_if_enabled(_csv))
    web.app.add_url_rule(
        "/tokens/svg",
        "tokens_svg",
        web.auth_required_if_enabled(lambda: Response(plotted(BOARD.book.seconds), mimetype="image/svg+xml")),
    )


@events.test_start.add_listener
def _on_test_start(**_: Any) -> None:
    BOARD.clear()


@events.reset_stats.add_listener
def _on_reset(**_: Any) -> None:
    BOARD.clear()


@events.test_stop.add_listener
def _on_test_stop(**_: Any) -> None:
    BOARD.stop()


@events.report_to_master.add_listener
def _on_report(client_id: str, data: dict[str, Any], **_: Any) -> None:
    BOARD.report(data)


@events.worker_report.add_listener
def _on_worker_report(client_id: str, data: dict[str, Any], **_: Any) -> None:
    BOARD.hear(data)


def _finish(environment: Environment) -> None:
    """At the end of the process that leads the run."""
    options = environment.parsed_options
    if isinstance(environment.runner, WorkerRunner) or not BOARD.book.scenarios:
        return
    print("\n" + BOARD.text(environment.host or ""), file=sys.stderr)
    if options.csv_prefix:
        Path(f"{options.csv_prefix}_tokens.csv").write_text(BOARD.csv(), encoding="utf-8")
    if options.svg:
        Path(options.svg).write_text(plotted(BOARD.book.seconds), encoding="utf-8")
