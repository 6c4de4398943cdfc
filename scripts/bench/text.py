"""What the API adds to a request's words: from a JSON body to token ids, and from token ids to events.

    python scripts/bench/text.py --prompt-tokens 1000 --answer-tokens 400
    python scripts/bench/text.py --pieces 8000

The CPU time of one thread: the packaged model's template, no pictures, no server. Prompts and answer are Python's own
documentation. Of the tokenizer's words some are known already, so a request is measured in three states: the first text
that a process sees, a text that is new after others, and one that is sent again. The answer is given token by token, each
as an event of its own: the dearest way. Goals: 1 ms per request of 1,000 tokens, 20 us per streamed token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from http_stream import IdleBackend
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ernie_cluster.api.answer import Answer, ChoiceText
from ernie_cluster.api.body import parse_object
from ernie_cluster.api.dialect import Heading
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.openai import CHAT
from ernie_cluster.api.prepare import Job, prepare
from ernie_cluster.config.presets import POCKET
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.tokenizer import Tokenizer
from ernie_cluster.request import TokenEvent

LIMITS = ApiLimits()
PROSE = "\n".join(topics[name] for name in sorted(topics))
NUM_TURNS = 17
NUM_OTHER_TEXTS = 50
"""That a process has seen before one that is new."""


def read(processor: ChatProcessor, raw: bytes) -> Job:
    """Parse, validate, fill the template, tokenise."""
    asked = CHAT.read(parse_object(raw, LIMITS))
    return prepare(asked.body, processor, LIMITS, response_id="bench", seed=1, timeout_s=60.0)


def bodies(processor: ChatProcessor, num_tokens: int) -> list[bytes]:
    """Streaming chats of several turns whose prompts have about so many tokens each; no two hold the same prose."""
    num_chars = num_tokens * len(PROSE) // len(processor.tokenizer.encode(PROSE, allow_special=False))
    return [body(PROSE[at : at + num_chars]) for at in range(0, len(PROSE) - num_chars, num_chars)]


def body(text: str) -> bytes:
    """A streaming chat of several turns that says this."""
    size = -(-len(text) // NUM_TURNS)
    turns = [text[at : at + size] for at in range(0, len(text), size)]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return json.dumps({"model": "bench", "messages": messages, "stream": True, "max_tokens": 512}).encode()


def sentencepiece(num_pieces: int, controls: Sequence[str]) -> str:
    """A tokenizer.json of the kind that the published SentencePiece model becomes, trained on the same prose."""
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=num_pieces, show_progress=False)
    learner.train_from_iterator(PROSE.splitlines(), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [(left, right) for left, right in learned["merges"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(controls))
    return str(backend.to_str())


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


def taken_s(work: Callable[..., object], *args: object) -> float:
    """CPU time of this thread."""
    start = time.thread_time()
    work(*args)
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--answer-tokens", type=int, default=400)
    parser.add_argument("--pieces", type=int, help="of a tokenizer like SentencePiece's; default: the packaged model's")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    packaged = ChatProcessor.from_folder(POCKET, served_name="bench", max_model_len=10**6)
    spec = Path(POCKET, "tokenizer.json").read_text(encoding="utf-8")
    if args.pieces is not None:
        spec = sentencepiece(args.pieces, sorted(packaged.tokenizer.control_texts))

    def unused() -> ChatProcessor:
        """One that has seen no text yet."""
        return replace(packaged, tokenizer=Tokenizer(Backend.from_str(spec)))

    processor = unused()
    raws = bodies(processor, args.prompt_tokens)
    others, news = raws[:NUM_OTHER_TEXTS], raws[NUM_OTHER_TEXTS : NUM_OTHER_TEXTS + args.repeats]
    assert news, "there is not enough prose for so long prompts"
    for raw in others * 2:  # the interpreter's own specialisation, too
        job = read(processor, raw)
    answer = processor.tokenizer.encode(PROSE, allow_special=False)[: args.answer_tokens]
    num_bytes = write(processor, job, answer)
    first_s = [taken_s(read, unused(), others[0]) for _ in range(5)]
    new_s = [taken_s(read, processor, raw) for raw in news]
    again_s = [taken_s(read, processor, raw) for raw in news]
    writing_s = [taken_s(write, processor, job, answer) for _ in range(args.repeats)]
    print(f"request of {job.num_prompt_tokens} tokens, {len(raws[0])} bytes:")
    for name, times_s in (("first of a process", first_s), ("new text", new_s), ("sent again", again_s)):
        print(f"  {name}: {statistics.median(times_s) * 1e3:.2f} ms")
    num_answered = len(answer)
    print(
        f"per streamed token: {statistics.median(writing_s) / num_answered * 1e6:.1f} us, {num_bytes / num_answered:.0f} bytes"
    )


if __name__ == "__main__":
    main()
