"""What the API adds to a request's words: from a JSON body to token ids, and from token ids to events.

    python scripts/bench/text.py --prompt-tokens 1000 --answer-tokens 400

One thread, the packaged model's tokenizer and template, no pictures, no server. The answer is given token by token, each
as an event of its own: the dearest way. Goals: 1 ms per request of 1,000 tokens, 20 us per streamed token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from http_stream import IdleBackend

from ernie_cluster.api.answer import Answer, ChoiceText
from ernie_cluster.api.body import parse_object
from ernie_cluster.api.dialect import Heading
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.openai import CHAT
from ernie_cluster.api.prepare import Job, prepare
from ernie_cluster.config.presets import POCKET
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.request import TokenEvent

LIMITS = ApiLimits()
WORDS = "How many red circles are left of the blue star in picture 27, and what is 12 + 30? "


def read(processor: ChatProcessor, raw: bytes) -> Job:
    """Parse, validate, fill the template, tokenise."""
    asked = CHAT.read(parse_object(raw, LIMITS))
    return prepare(asked.body, processor, LIMITS, response_id="bench", seed=1, timeout_s=60.0)


def body(processor: ChatProcessor, num_tokens: int) -> bytes:
    """A streaming chat of several turns whose prompt has about so many tokens."""
    turn = len(processor.tokenizer.encode(WORDS * 2, allow_special=False))
    turns = [("user", "assistant")[i % 2] for i in range(max(1, num_tokens // turn) // 2 * 2 + 1)]
    messages = [{"role": role, "content": WORDS * 2} for role in turns]
    return json.dumps({"model": "bench", "messages": messages, "stream": True, "max_tokens": 512}).encode()


def write(processor: ChatProcessor, job: Job, tokens: list[int]) -> int:
    """Detokenise, parse, and make the events of a stream; how many bytes they have."""
    answer = Answer(IdleBackend(), job, processor)
    text: ChoiceText = answer.choices[0].last
    look = CHAT.read({"model": "bench", "messages": [{"role": "user", "content": "x"}]}).present(
        Heading("bench", 0, "bench"), job, []
    )
    size = 0
    for i, token in enumerate(tokens):
        size += sum(map(len, look.news([text.push(TokenEvent("bench-0", i, (token,)))])))
    return size


def median_s(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--answer-tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    processor = ChatProcessor.from_folder(POCKET, served_name="bench", max_model_len=10**6)
    raw = body(processor, args.prompt_tokens)
    job = read(processor, raw)
    answer = processor.tokenizer.encode(WORDS * 100, allow_special=False)[: args.answer_tokens]
    num_bytes = write(processor, job, answer)
    for _ in range(5):  # caches and the interpreter's own specialisation
        read(processor, raw)
        write(processor, job, answer)
    reading_s = median_s(lambda: read(processor, raw), args.repeats)
    writing_s = median_s(lambda: write(processor, job, answer), args.repeats)
    print(f"request of {job.num_prompt_tokens} tokens, {len(raw)} bytes: {reading_s * 1e3:.2f} ms")
    print(f"per streamed token: {writing_s / len(answer) * 1e6:.1f} us, {num_bytes / len(answer):.0f} bytes")


if __name__ == "__main__":
    main()
