"""`ernie-cluster chat`: a chat in the terminal with any server that speaks OpenAI's API.

Without a server it serves the packaged model for as long as the chat lasts.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ernie_cluster.cli.local import server_or_pocket
from ernie_cluster.cli.remote import (
    DEFAULT_URL,
    add_ca_argument,
    add_key_argument,
    base_url_of,
    explain,
    first_model_of,
    key_headers,
    printable,
    refusal,
    trust,
)
from ernie_cluster.errors import ErnieClusterError, InvalidRequest

HELP = "Type a message. /image PATH or /video PATH puts one into the next message, /new starts over, /quit leaves."
_EXAMPLES = """\
examples:
  ernie-cluster chat                                    the server on port 8000, or else the packaged model
  ernie-cluster chat --image photo.png "What is this?" --once
  ernie-cluster chat --video film.mp4 --url http://server:8000/v1 --model ernie-4.5-vl-28b-a3b
"""
_VIDEOS = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".png": "image/png",
    ".apng": "image/apng",
}
TIMEOUT = httpx.Timeout(600.0, connect=5.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `chat` command; their values are what `run` takes."""
    parser.epilog = _EXAMPLES
    parser.add_argument("prompt", nargs="?", help="first message; asked for when absent")
    parser.add_argument(
        "--url",
        help=f"server (default: {DEFAULT_URL}; when nothing listens there, the packaged model is served for this chat)",
    )
    parser.add_argument("--model", help="served model name (default: the first that the server lists)")
    add_key_argument(parser)
    add_ca_argument(parser)
    parser.add_argument("--image", dest="images", action="append", default=[], metavar="PATH", help="may be repeated")
    parser.add_argument(
        "--video",
        dest="videos",
        action="append",
        default=[],
        metavar="PATH",
        help="MP4, WebM, animated GIF, WebP or PNG, or a folder of JPEG frames in order of their names; may be repeated",
    )
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, default=1024, help="per answer (default: %(default)s)")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="let the model think aloud, or not")
    parser.add_argument("--once", action="store_true", help="leave after the first answer")


def main(args: argparse.Namespace) -> int:
    """The `chat` command."""
    with server_or_pocket(args.url, args.model) as url:
        return run(
            url,
            args.model,
            args.images,
            args.prompt,
            args.system,
            args.max_tokens,
            args.thinking,
            args.once,
            videos=args.videos,
            api_key=args.api_key,
            ca_file=args.ca_file,
        )


def run(
    url: str,
    model: str | None = None,
    images: Sequence[str] = (),
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int = 1024,
    thinking: bool | None = None,
    once: bool = False,
    *,
    videos: Sequence[str] = (),
    api_key: str | None = None,
    ca_file: str | None = None,
    transport: httpx.BaseTransport | None = None,
) -> int:
    """Chat until the user has enough.

    Returns:
        Exit code: 0, or 1 when the server cannot be reached, a picture or video cannot be read, or (`once`) there is no answer.

    Raises:
        ErnieClusterError: see `key_headers` and `trust`.
    """
    base_url = base_url_of(url)
    headers = key_headers(api_key)
    options: dict[str, Any] = {"timeout": TIMEOUT, "verify": trust(ca_file), "transport": transport}
    with httpx.Client(base_url=base_url, headers=headers, **options) as client:
        try:
            chat = Chat(client, model or first_model_of(client.get("/v1/models")), system, max_tokens, thinking)
            for path in images:
                chat.attach(path)
            for path in videos:
                chat.attach_video(path)
        except (ErnieClusterError, httpx.HTTPError, OSError) as e:
            return _complain(e, base_url)
        if not once:
            print(f"{chat.model} at {base_url}. {HELP}")
        return _converse(chat, prompt, base_url, once)


def _converse(chat: Chat, prompt: str | None, base_url: str, once: bool) -> int:
    while True:
        line = prompt or _read_line()
        prompt = None
        if line is None or line == "/quit":
            return 0
        code = _obey(chat, line, base_url)
        if once:
            return code


def _obey(chat: Chat, line: str, base_url: str) -> int:
    """Do what one line says; exit code if it were the last."""
    command, _, argument = line.partition(" ")
    try:
        if command in ("/image", "/video"):
            attach = chat.attach if command == "/image" else chat.attach_video
            attach(argument.strip())
            print(f"The next message shows {argument.strip()}.")
        elif command == "/new":
            chat.restart()
        elif command.startswith("/"):
            print(HELP)
        elif line.strip():
            for text in chat.say(line):
                print(printable(text), end="", flush=True)
            print()
    except KeyboardInterrupt:
        print(" (stopped)")
    except (ErnieClusterError, httpx.HTTPError, OSError) as e:
        return _complain(e, base_url)
    return 0


@dataclass
class Chat:
    """One conversation. A turn that fails leaves no trace in it."""

    client: httpx.Client
    model: str
    system: str | None = None
    max_tokens: int = 1024
    thinking: bool | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    """Parts that wait for the next message, videos too."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.pictures = []

    def attach(self, path: str) -> None:
        """Put a picture into the next message.

        Raises:
            InvalidRequest: not the name of a picture; OSError: the file cannot be read.
        """
        kind = mimetypes.guess_type(path)[0]
        if kind is None or not kind.startswith("image/"):
            raise InvalidRequest(f"{path!r} is not a picture by its name; use for example .png or .jpg")
        data = _base64(Path(path).expanduser())
        self.pictures.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})

    def attach_video(self, path: str) -> None:
        """Put a video file, or a folder of JPEG frames, into the next message.

        Raises:
            InvalidRequest: not the name of a video, or a folder without frames; OSError: a file cannot be read.
        """
        source = Path(path).expanduser()
        if source.is_dir():
            frames = sorted(frame for frame in source.iterdir() if frame.suffix.lower() in (".jpg", ".jpeg"))
            if not frames:
                raise InvalidRequest(f"{path!r} holds no .jpg files; put the frames of a video there")
            kind, data = "video/jpeg", ",".join(map(_base64, frames))
        elif kind := _VIDEOS.get(source.suffix.lower(), ""):
            data = _base64(source)
        else:
            raise InvalidRequest(
                f"{path!r} is no {', '.join(_VIDEOS)} or folder of .jpg frames; turn the video into one"
            )
        self.pictures.append({"type": "video_url", "video_url": {"url": f"data:{kind};base64,{data}"}})

    def say(self, text: str) -> Iterator[str]:
        """Send a message; yields what to show of the answer as it comes. Only its content stays in the conversation.

        Raises:
            ErnieClusterError: the server refused, or the answer broke off.
        """
        content: Any = [*self.pictures, {"type": "text", "text": text}] if self.pictures else text
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = ""
        heading: str | None = None
        for delta in self._stream(messages):
            answer += delta.get("content") or ""
            for part, text in _parts(delta):
                if part != heading:
                    yield part if heading is None else f"\n{part}"
                heading = part
                yield text
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.pictures = []

    def _stream(self, messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "stream": True,
        }
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ErnieClusterError(refusal(response))
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield from _deltas(json.loads(line[6:]))
        raise ErnieClusterError("the answer broke off; ask again")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _deltas(event: dict[str, Any]) -> list[dict[str, Any]]:
    if "error" in event:
        raise ErnieClusterError(str(event["error"].get("message", event["error"])))
    return [choice["delta"] for choice in event["choices"]]


def _parts(delta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts of an answer in a delta: heading and text, which goes on where the heading is the one before."""
    if reasoning := delta.get("reasoning_content"):
        yield "thinking: ", reasoning
    if content := delta.get("content"):
        yield "", content
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        name = f"{function['name']} " if function.get("name") else ""
        yield f"call {call['index'] + 1}: ", name + (function.get("arguments") or "")


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _complain(error: Exception, base_url: str) -> int:
    print(explain(error, base_url), file=sys.stderr)
    return 1
