"""Every error that a user or the world can cause, in one tree.

    ErnieClusterError
    ├── ConfigError             a configuration that cannot work; names the key, the value and the remedy
    │   └── CheckpointError     a checkpoint that cannot be used; names the tensor or file
    ├── RequestError            one request cannot be served; the others are untouched
    │   ├── InvalidRequest      the client's fault; `param` names the field
    │   │   ├── ContextTooLong  prompt (plus output) exceeds what the model can hold
    │   │   ├── Unauthorized    no key, or not one that opens this
    │   │   ├── Forbidden       this server is not set up to let anybody do it
    │   │   ├── UnknownModel    no such model is served here
    │   │   ├── UnknownReplica  an operator named a replica that is not there
    │   │   └── OrderRefused    an operator asked for what a replica cannot do
    │   ├── Overloaded          no room now; `retry_after_s` says when to come back
    │   │   └── RateLimited     the client has used up what it may use for now
    │   ├── DeadlineExceeded    the request's own deadline has passed
    │   └── Aborted             the client left, or asked us to stop
    │       └── SlowClient      it is there and does not read its answer
    └── ReplicaError            something of ours broke
        ├── ReplicaLost         the process that worked on the request is gone
        ├── ReplicaDraining     a replica that leaves parts with a request, unharmed; another one goes on with it
        ├── Evicted             a replica gave a request's blocks back and cannot compute them again itself
        ├── TransferFailed      bytes did not arrive whole, or came for a lease that is no longer valid
        │   └── PeerSilent      the replica that they go to has not replied in time
        └── EngineFailed        the engine stopped; the replica must be replaced

Bugs of ours are `assert`s, not members of this tree. Errors cross process boundaries by pickle inside
Ray's own channel, therefore every constructor argument is also an attribute and `args`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ernie_cluster.request import Span


class ErnieClusterError(Exception):
    """Base of all errors that are meant for a user's eyes."""

    journey: tuple[Span, ...] = ()
    """How far the request had come that this ends, where that is known; stays in its process."""


class ConfigError(ErnieClusterError):
    """The configuration cannot work; the message names key, value and remedy."""


class CheckpointError(ConfigError):
    """A checkpoint folder cannot be used; the message names the tensor or the file."""


class RequestError(ErnieClusterError):
    """One request cannot be served."""


class InvalidRequest(RequestError):
    """The client sent something that can never be served.

    Args:
        message: what is wrong, with value and bound.
        param: the request field at fault, in the client's spelling (`messages[0].content`), or None.
        code: a short machine-readable reason, or None.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class ContextTooLong(InvalidRequest):
    """Prompt, or prompt plus `max_tokens`, does not fit the context."""

    def __init__(
        self, message: str, param: str | None = "messages", code: str | None = "context_length_exceeded"
    ) -> None:
        super().__init__(message, param, code)


class Unauthorized(InvalidRequest):
    """The request bears no key that opens what it asks for."""


class Forbidden(InvalidRequest):
    """As this server is set up nobody may do this; the message says what to set."""


class UnknownModel(InvalidRequest):
    """The `model` field names nothing that is served here."""

    def __init__(self, message: str, param: str | None = "model", code: str | None = "model_not_found") -> None:
        super().__init__(message, param, code)


class UnknownReplica(InvalidRequest):
    """There is no replica of this name; the message lists those that are."""

    def __init__(self, message: str, param: str | None = "replica", code: str | None = "replica_not_found") -> None:
        super().__init__(message, param, code)


class OrderRefused(InvalidRequest):
    """What an operator asked of a replica cannot be done; the message says why."""

    def __init__(self, message: str, param: str | None = None, code: str | None = "order_refused") -> None:
        super().__init__(message, param, code)


class Overloaded(RequestError):
    """No room now.

    Args:
        message: which resource is short.
        retry_after_s: seconds after which a retry is worth while; at least 0.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class RateLimited(Overloaded):
    """The client has used up what its key may use for now."""

    code = "rate_limit_exceeded"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before it was finished."""


class Aborted(RequestError):
    """The request was ended on the client's wish."""


class SlowClient(Aborted):
    """The client is there and does not read its answer."""


class ReplicaError(ErnieClusterError):
    """Something of ours broke; the request may be tried again elsewhere."""


class ReplicaLost(ReplicaError):
    """A process that worked on the request is gone."""


class ReplicaDraining(ReplicaError):
    """A replica that is about to leave has parted with a request after its last token; nothing has failed."""


class Evicted(ReplicaError):
    """Out of KV blocks, a replica let go of a request that it cannot compute again itself; another one can."""


class TransferFailed(ReplicaError):
    """KV or embeddings did not arrive whole, or came for a lease that is not valid any more."""


class PeerSilent(TransferFailed):
    """The replica that a hand-over goes to has not replied in time: it hangs, or the network between the two is down."""


class EngineFailed(ReplicaError):
    """An engine stopped on an unexpected exception; its replica must be replaced."""


class GangBroken(EngineFailed):
    """A rank of a gang is gone or did not answer in time; the gang's replica must be replaced."""
