"""One line per record, with the request's id."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.observe.log import (
    JsonFormatter,
    LineFormatter,
    bind_caller,
    bind_request_id,
    bound_request_id,
    setup_logging,
)
from ernie_cluster.observe.trace_context import TraceContext, bind_trace


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    logger = logging.getLogger("ernie_cluster")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_line_has_time_level_name_and_request() -> None:
    stream = io.StringIO()
    setup_logging("info", stream)
    log = logging.getLogger("ernie_cluster.somewhere")
    with bind_request_id("req-1"):
        log.info("took %d blocks", 3)
    log.debug("not shown")
    log.warning("outside")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO ernie_cluster.somewhere \[req-1\] took 3 blocks", first
    )
    assert second.endswith("WARNING ernie_cluster.somewhere [-] outside")


def test_a_known_caller_is_named() -> None:
    stream = io.StringIO()
    log = setup_logging("INFO", stream)
    with bind_request_id("req-1"), bind_caller("alice"):
        assert bound_request_id() == "req-1"
        log.info("one")
    with bind_request_id("req-2"), bind_caller(""):
        log.info("two")
    assert bound_request_id() == ""
    assert ["[req-1 alice] one" in stream.getvalue(), "[req-2] two" in stream.getvalue()] == [True, True]


@given(st.text())
def test_no_message_can_break_its_line(message: str) -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "%s", (f"a{message}b",), None)
    assert len(LineFormatter().format(record).splitlines()) == 1


def test_a_traceback_stays_on_its_line() -> None:
    stream = io.StringIO()
    log = setup_logging("INFO", stream)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"ValueError: first\nsecond")


def test_concurrent_requests_keep_their_own_ids() -> None:
    stream = io.StringIO()
    log = setup_logging("INFO", stream)

    async def serve(request_id: str) -> None:
        with bind_request_id(request_id):
            await asyncio.sleep(0)
            log.info("served %s", request_id)

    async def both() -> None:
        await asyncio.gather(serve("a"), serve("b"))

    asyncio.run(both())
    assert [line.split("[")[1] for line in stream.getvalue().splitlines()] == ["a] served a", "b] served b"]


def test_calling_again_replaces_the_setup() -> None:
    setup_logging("INFO", io.StringIO())
    stream = io.StringIO()
    setup_logging("ERROR", stream).error("once")
    assert stream.getvalue().count("once") == 1


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="'LOUD' must be one of DEBUG, INFO, WARNING, ERROR"):
        setup_logging("LOUD")


def test_a_json_line_has_all_that_is_known() -> None:
    stream = io.StringIO()
    log = setup_logging("INFO", stream, "json")
    with bind_request_id("req-1"), bind_caller("alice"), bind_trace(TraceContext("ab" * 16, "cd" * 8)):
        log.warning("took %d blocks", 3)
    log.info("outside")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "WARNING",
        "logger": "ernie_cluster",
        "message": "took 3 blocks",
        "request_id": "req-1",
        "caller": "alice",
        "trace_id": "ab" * 16,
    }
    assert second.keys() == {"time", "level", "logger", "message"}


@given(st.text())
def test_json_keeps_every_message_whole_and_on_its_line(message: str) -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "%s", (message,), None)
    (line,) = JsonFormatter().format(record).splitlines()
    assert json.loads(line)["message"] == message


def test_json_has_the_traceback_in_a_field() -> None:
    stream = io.StringIO()
    log = setup_logging("INFO", stream, "json")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: first\nsecond")


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="'xml' must be one of text, json"):
        setup_logging("INFO", form="xml")
