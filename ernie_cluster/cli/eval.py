"""`ernie-cluster eval`: accuracy per skill of whatever model an OpenAI-compatible server serves."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import httpx

from ernie_cluster import __version__
from ernie_cluster.cli.eval_report import Key, Report, Result, compare, difference_lines, score, score_lines
from ernie_cluster.cli.eval_run import SEED_STEP, Examiner, plan, save_failures
from ernie_cluster.cli.remote import (
    DEFAULT_URL,
    add_ca_argument,
    add_key_argument,
    base_url_of,
    explain,
    first_model_of,
    key_headers,
    printable,
    trust,
)
from ernie_cluster.errors import ConfigError, ErnieClusterError
from ernie_cluster.skills.catalog import CHINESE_SKILLS, SKILLS

CONNECT_TIMEOUT_S = 5.0

_EPILOG = f"""\
Pictures and questions are drawn anew from seeds that no training of ours has used; the same --seed gives the same
questions everywhere, so two servers, or two versions of one, can be compared question by question. Answers are greedy.
Where a question needs a tool, its call is run here and the model asked on; a question is right when its last answer is.

skills: {", ".join(SKILLS)}
in Chinese too: {", ".join(CHINESE_SKILLS)}
zoom_blind is zoom without its tool: what guessing gives. It does not count in the total.

examples:
  ernie-cluster eval                                      all skills, 100 questions of each and language
  ernie-cluster eval --skills count,ground --samples 500 --save-failures wrong/
  ernie-cluster eval --json before.json                   then change something, and
  ernie-cluster eval --compare before.json --same-answers
                                                          exit 1 unless every answer is the same word for word (in
                                                          bf16 a near tie may fall otherwise in another batch: ask
                                                          both times with --concurrency 1)
  ernie-cluster eval --url https://server/v1 --api-key KEY --model some-model --fail-under 80
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--url", default=DEFAULT_URL, help="server (default: %(default)s)")
    parser.add_argument("--model", help="served model name (default: the first that the server lists)")
    add_key_argument(parser)
    add_ca_argument(parser)
    parser.add_argument("--skills", metavar="A,B,...", default=",".join(SKILLS), help="what to ask (default: all)")
    parser.add_argument(
        "--samples", metavar="N", type=_count, default=100, help="questions per skill and language (default 100)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="another number, other questions (default 0)"
    )
    parser.add_argument("--concurrency", metavar="N", type=_count, default=8, help="questions at a time (default 8)")
    parser.add_argument("--max-tokens", metavar="N", type=_count, default=256, help="per answer (default 256)")
    parser.add_argument("--timeout", metavar="SECONDS", type=_seconds, default=120.0, help="per answer (default 120)")
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="also write all questions and answers there; without FILE to standard output, and the tables to the other",
    )
    parser.add_argument(
        "--save-failures", metavar="DIR", type=Path, help="write failures.jsonl and the pictures that it names"
    )
    parser.add_argument("--compare", metavar="FILE", type=Path, help="an earlier --json: show what has changed since")
    parser.add_argument(
        "--same-answers", action="store_true", help="with --compare: exit 1 when any answer is another, or none is"
    )
    parser.add_argument(
        "--fail-under",
        metavar="PERCENT",
        type=float,
        help="exit 1 when fewer of all questions were answered right; low accuracy alone is no failure",
    )


def main(args: argparse.Namespace) -> int:
    """The `eval` command: 0, or 1 as the options say, or when nothing was answered."""
    return run(args)


def run(args: argparse.Namespace, transport: httpx.AsyncBaseTransport | None = None) -> int:
    """`main`, with the way to the server handed in."""
    if args.same_answers and args.compare is None:
        raise ConfigError("--same-answers needs --compare FILE: the same as what?")
    questions: list[Key] = [*plan(_skills(args.skills), args.samples, args.seed)]
    earlier = read_results(args.compare) if args.compare else None
    _prepare(args)
    base_url = base_url_of(args.url)
    results: list[Result] = []
    is_interrupted, model = False, args.model
    try:
        model = asyncio.run(_ask(args, base_url, questions, results, transport))
    except KeyboardInterrupt:
        is_interrupted = True
    except (ErnieClusterError, httpx.HTTPError, httpx.InvalidURL) as e:
        print(explain(e, base_url), file=sys.stderr)
        return 1
    place = {question: i for i, question in enumerate(questions)}
    results.sort(key=lambda r: place[r.key])
    report = score(results)
    out = sys.stderr if args.json == "-" else sys.stdout
    print("", *map(printable, score_lines(report)), sep="\n", file=out)
    is_failed = _deliver(args, results, earlier, out, {"url": base_url, "model": model})
    if is_interrupted:
        return 130
    return int(is_failed or not any(r.num for r in report.rows) or _is_under(report, args.fail_under))


def progress_text(results: Sequence[Result], num_questions: int, elapsed_s: float) -> str:
    """How far it is, for one line: counts, and the time that the rest will take at this pace."""
    num_right, num_errors = sum(r.is_right for r in results), sum(bool(r.error) for r in results)
    left_s = round(elapsed_s / max(1, len(results)) * (num_questions - len(results)))
    errors = f", {num_errors:,} errors" if num_errors else ""
    return f"{len(results):,}/{num_questions:,} questions, {num_right:,} right{errors}, {left_s // 60}:{left_s % 60:02} to go"


async def _ask(
    args: argparse.Namespace,
    base_url: str,
    questions: Sequence[Key],
    results: list[Result],
    transport: httpx.AsyncBaseTransport | None,
) -> str:
    """Fill `results`; returns the model's name."""
    client = httpx.AsyncClient(
        base_url=base_url,
        headers=key_headers(args.api_key),
        verify=trust(args.ca_file),
        timeout=httpx.Timeout(args.timeout, connect=min(CONNECT_TIMEOUT_S, args.timeout)),
        limits=httpx.Limits(max_connections=args.concurrency),
        transport=transport,
    )
    async with client:
        listed = await client.get("/v1/models")  # also with a name: a server that is down is said once, and now
        model: str = args.model or first_model_of(listed)
        line = _Line(f"asking {model} at {base_url}: ", len(questions), results)
        examiner = Examiner(client, model, args.max_tokens, args.timeout)
        await examiner.examine_all(questions, args.concurrency, line.add)
    line.close()
    return model


class _Line:
    """The progress on standard error: one line that is rewritten on a terminal, else one per tenth of the way."""

    def __init__(self, heading: str, num_questions: int, results: list[Result]) -> None:
        self._results, self._num_questions = results, num_questions
        self._is_terminal = sys.stderr.isatty()
        self._heading, self._start = printable(heading), time.monotonic()

    def add(self, result: Result) -> None:
        """Keep it, and say how far that is."""
        self._results.append(result)
        done, total = len(self._results), self._num_questions
        if self._is_terminal or done == 1 or done * 10 // total != (done - 1) * 10 // total:
            text = self._heading + progress_text(self._results, total, time.monotonic() - self._start)
            print(f"\r\x1b[K{text}" if self._is_terminal else text, end="" if self._is_terminal else "\n", file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        if self._is_terminal:
            print(file=sys.stderr)


def _deliver(
    args: argparse.Namespace,
    results: Sequence[Result],
    earlier: Sequence[Result] | None,
    out: TextIO,
    about: dict[str, str | None],
) -> bool:
    """Comparison, failures and JSON, where they are asked for; whether answers differ that must not."""
    is_failed = False
    if earlier is not None:
        differences = compare(earlier, results)
        print(f"\ncompared with {args.compare}:\n", *difference_lines(differences), sep="\n", file=out)
        total = differences[-1]
        is_failed = args.same_answers and (total.num_different > 0 or total.num == 0)
    if args.save_failures:
        num = save_failures(args.save_failures, results)
        print(f"\n{num:,} failures are in {args.save_failures}", file=out)
    if args.json:
        options = {"seed": args.seed, "samples": args.samples, "max_tokens": args.max_tokens}
        whole = {"version": __version__, **about, **options, "results": [dataclasses.asdict(r) for r in results]}
        text = json.dumps(whole, ensure_ascii=False, indent=1) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text, encoding="utf-8")
    return is_failed


def read_results(path: Path) -> list[Result]:
    """The results in a file that `--json` has written; raises ConfigError."""
    try:
        return [Result(**result) for result in json.loads(path.read_text(encoding="utf-8"))["results"]]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ConfigError(f"--compare {path}: not what --json writes ({e})") from None


def _prepare(args: argparse.Namespace) -> None:
    """Learn before the questions, not after, that something cannot be written."""
    try:
        if args.save_failures:
            args.save_failures.mkdir(parents=True, exist_ok=True)
        if args.json and args.json != "-":
            Path(args.json).open("a").close()
    except OSError as e:
        raise ConfigError(f"{e.filename}: cannot be written: {e.strerror}") from None


def _is_under(report: Report, percent: float | None) -> bool:
    return percent is not None and 100 * report.total.share_of_asked < percent


def _skills(text: str) -> list[str]:
    skills = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in skills if name not in SKILLS]
    if unknown or not skills:
        raise ConfigError(
            f"--skills: unknown {', '.join(map(repr, unknown)) or repr(text)}; known: {', '.join(SKILLS)}"
        )
    return list(dict.fromkeys(skills))


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= SEED_STEP:
        raise argparse.ArgumentTypeError(f"{number} must be between 1 and {SEED_STEP:,}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{number:g} must be greater than 0")
    return number
