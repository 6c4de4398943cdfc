"""A client of the gRPC API: synchronous, with the errors that the server itself raises.

    with Client("localhost:9000") as client:
        for chunk in client.stream_chat("ernie-pocket", [user("What is this?", image("photo.png"))]):
            print("".join(choice.text for choice in chunk.choices), end="")

What is sent and received are the messages of `ernie_cluster/proto/v1/inference.proto`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from ernie_cluster.errors import (
    Aborted,
    ConfigError,
    DeadlineExceeded,
    ErnieClusterError,
    InvalidRequest,
    Overloaded,
    RateLimited,
    ReplicaError,
    Unauthorized,
    UnknownModel,
)
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.proto.v1.inference_pb2_grpc import InferenceStub

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0

_UNLIMITED = -1


def image(source: str | Path | bytes) -> pb.Part:
    """A picture: a file's content, its path, or a URL (http, https, data, file) for the server."""
    if isinstance(source, str) and _is_url(source):
        return pb.Part(image=pb.Image(url=source))
    return pb.Part(image=pb.Image(data=_content(source)))


def video(source: str | Path | bytes, **wishes: Any) -> pb.Part:
    """A video, see `image`; `fps`, `min_frames`, `max_frames` say which of its frames the model is to see."""
    if isinstance(source, str) and _is_url(source):
        return pb.Part(video=pb.Video(url=source, **wishes))
    return pb.Part(video=pb.Video(data=_content(source), **wishes))


def user(*parts: str | pb.Part) -> pb.Message:
    """What the user says and shows, in order."""
    return pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=p) if isinstance(p, str) else p for p in parts])


def system(text: str) -> pb.Message:
    """What the model is told beforehand."""
    return pb.Message(role=pb.ROLE_SYSTEM, text=text)


def tool_result(call: pb.ToolCall, *parts: str | pb.Part) -> pb.Message:
    """What a tool answers to a call."""
    answer = user(*parts)
    answer.role, answer.tool_call_id = pb.ROLE_TOOL, call.id
    return answer


class Client:
    """One connection to a server. Closed by `close`, or at the end of a `with` block.

    All methods raise what the server raised: `InvalidRequest` with the field at fault, `UnknownModel`, `Unauthorized`,
    `Overloaded` and `RateLimited` with the time to wait, `DeadlineExceeded`, `Aborted`, `ReplicaError` (also when
    nobody listens there); `ErnieClusterError` for all else.

    Args:
        target: `host:port`.
        api_key: where the server asks for one.
        timeout_s: of each call, until its last message.
        ca_file: for TLS: PEM file of the CA that has signed the server's certificate, or of that certificate itself.
        credentials: for TLS of any other kind, as of `grpc.ssl_channel_credentials`; with neither it is plain text.

    Raises:
        ConfigError: `ca_file` cannot be read, or `credentials` are given, too.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        ca_file: str | Path | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if ca_file is not None:
            credentials = _trusting(ca_file, credentials)
        options = [("grpc.max_receive_message_length", _UNLIMITED)]
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._call = {
            "metadata": [] if api_key is None else [("authorization", f"Bearer {api_key}")],
            "timeout": timeout_s,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        self._channel.close()

    def chat(self, model: str, messages: Sequence[pb.Message], **fields: Any) -> pb.ChatResponse:
        """The whole answer; `fields` are those of `ChatRequest`: `sampling={"max_tokens": 100}`, `tools=[...]`."""
        return self._one(pb.ChatResponse, self._stub.Chat, pb.ChatRequest(model=model, messages=messages, **fields))

    def stream_chat(self, model: str, messages: Sequence[pb.Message], **fields: Any) -> Iterator[pb.ChatChunk]:
        """The answer as it comes; closing the iterator cancels it."""
        return self._many(self._stub.StreamChat, pb.ChatRequest(model=model, messages=messages, **fields))

    def generate(self, model: str, prompt: str | Sequence[int], **fields: Any) -> pb.GenerateResponse:
        """How a text, or a list of token ids, goes on; `fields` are those of `GenerateRequest`."""
        return self._one(pb.GenerateResponse, self._stub.Generate, _prompt(model, prompt, fields))

    def stream_generate(self, model: str, prompt: str | Sequence[int], **fields: Any) -> Iterator[pb.GenerateChunk]:
        """The same as it comes; closing the iterator cancels it."""
        return self._many(self._stub.StreamGenerate, _prompt(model, prompt, fields))

    def tokenize(self, model: str, prompt: str | Sequence[pb.Message], **fields: Any) -> pb.TokenizeResponse:
        """The prompt that a text or a conversation makes."""
        if isinstance(prompt, str):
            request = pb.TokenizeRequest(generate=_prompt(model, prompt, fields))
        else:
            request = pb.TokenizeRequest(chat=pb.ChatRequest(model=model, messages=prompt, **fields))
        return self._one(pb.TokenizeResponse, self._stub.Tokenize, request)

    def models(self) -> Sequence[pb.Model]:
        """What is served."""
        models: Sequence[pb.Model] = self._one(
            pb.ListModelsResponse, self._stub.ListModels, pb.ListModelsRequest()
        ).models
        return models

    def _one(self, kind: type[T], method: Callable[..., T], request: Any) -> T:
        """The answer, which is of this kind."""
        with _translated():
            answer: T = method(request, **self._call)
        return answer

    def _many(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        call = method(request, **self._call)
        try:
            with _translated():
                yield from call
        finally:
            call.cancel()


def _trusting(ca_file: str | Path, other: grpc.ChannelCredentials | None) -> grpc.ChannelCredentials:
    if other is not None:
        raise ConfigError("give ca_file or credentials, not both")
    try:
        return grpc.ssl_channel_credentials(Path(ca_file).read_bytes())
    except OSError as e:
        raise ConfigError(f"ca_file {ca_file} cannot be read: {e.strerror}") from None


def _prompt(model: str, prompt: str | Sequence[int], fields: dict[str, Any]) -> pb.GenerateRequest:
    given = {"text": prompt} if isinstance(prompt, str) else {"tokens": pb.TokenIds(ids=prompt)}
    return pb.GenerateRequest(model=model, **given, **fields)


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://", "data:", "file://"))


def _content(source: str | Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as e:
        raise _error_of(e) from None


def _error_of(failed: grpc.RpcError) -> ErnieClusterError:
    """The error of ours that a call's status stands for."""
    code, message = failed.code(), failed.details() or ""
    told = dict(failed.trailing_metadata() or ())
    param, word = told.get("error-param"), told.get("error-code")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(message, param, word)
    if code is grpc.StatusCode.NOT_FOUND:
        return UnknownModel(message, param, word)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthorized(message, param, word)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "retry-after" in told:
        return (RateLimited if word == RateLimited.code else Overloaded)(message, float(told["retry-after"]))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # by gRPC itself: waiting does not help
        return InvalidRequest(message, None, "request_too_large")
    plain = {
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.CANCELLED: Aborted,
        grpc.StatusCode.UNAVAILABLE: ReplicaError,
    }
    return plain.get(code, ErnieClusterError)(message)
