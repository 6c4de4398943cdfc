"""What the commands for operators share: where the server is, the admin key, and how to name a replica."""

from __future__ import annotations

import argparse
import ssl
from dataclasses import asdict
from urllib.parse import quote

import httpx

from ernie_cluster.api.operator import ClusterView, FaultsView, Order, ReplicaView
from ernie_cluster.api.views import view_of
from ernie_cluster.cli.remote import (
    DEFAULT_URL,
    add_ca_argument,
    base_url_of,
    explain,
    key_headers,
    printable,
    refusal,
    trust,
)
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.faults import FaultOrder

KEY_VARIABLE = "ERNIE_ADMIN_KEY"
TIMEOUT_S = 15.0
"""For one answer; longer than the API waits for its router."""
_MAX_LISTED = 10
_MAX_S = 1_000_000


class Unreachable(ErnieClusterError):
    """No answer now; the same question may get one later."""


class Cluster:
    """A running server, as its operator asks it.

    Args:
        url: of the server, with or without "/v1".
        headers: that show the admin key.
        transport: for tests; None = the network.
        verify: see `remote.trust`.
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        *,
        transport: httpx.BaseTransport | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.url = base_url_of(url)
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_S, transport=transport, verify=verify)

    def view(self) -> ClusterView:
        """How things are; raises as `_ask` does."""
        return view_of(ClusterView, self._ask("GET", "/admin/status"))

    def metrics(self) -> str:
        """What the process of the API that answers has counted, in Prometheus' text format; raises as `_ask` does."""
        return self._ask("GET", "/metrics").decode(errors="replace")

    def order(self, order: Order) -> ReplicaView:
        """The replica as it is then; raises as `_ask` does."""
        given = {"role": order.role, "within_s": order.within_s}
        body = {key: value for key, value in given.items() if value is not None}
        path = f"/admin/replicas/{quote(order.replica, safe='')}/{order.action}"
        return view_of(ReplicaView, self._ask("POST", path, body))

    def faults(self, order: FaultOrder) -> FaultsView:
        """All faults on purpose, after an order about them; raises as `_ask` does, also where they are off."""
        method = {"add": "POST", "clear": "DELETE", "list": "GET"}[order.kind]
        body = None if order.rule is None else {**asdict(order.rule), "for_s": order.for_s}
        return view_of(FaultsView, self._ask(method, "/admin/faults", body))

    def _ask(self, method: str, path: str, body: object = None) -> bytes:
        """The body of a good answer.

        Raises:
            Unreachable: there is no server now, or not all of it.
            ErnieClusterError: it refuses, and the message says what to do.
        """
        try:
            response = self._client.request(method, f"{self.url}{path}", json=body)
        except (httpx.TransportError, httpx.InvalidURL) as e:
            raise Unreachable(f"{explain(e, self.url)} `ernie-cluster serve cluster.yaml` starts one.") from None
        if response.is_success:
            return response.content
        words = printable(refusal(response))
        if response.status_code == 401:
            raise ErnieClusterError(
                f"{self.url} wants its admin key, the one whose hash is its api.admin_key_sha256 (clients' keys do not "
                f"open this): give it as --admin-key or in {KEY_VARIABLE}; the server says: {words}"
            )
        if response.status_code == 404 and path == "/admin/status":
            raise ErnieClusterError(f"{self.url} has no {path}: it is another server, or an older version: {words}")
        if response.status_code in (502, 503, 504):
            raise Unreachable(f"{self.url} cannot tell now: {words}")
        raise ErnieClusterError(words)


def add_replica_argument(parser: argparse.ArgumentParser) -> None:
    """What `find_replica` takes."""
    parser.add_argument("replica", metavar="REPLICA", help="id of a replica, its last part, or the beginning of either")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `connect` takes."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"address of the server (default {DEFAULT_URL})")
    parser.add_argument(
        "--admin-key",
        metavar="KEY",
        help=f"the key behind the server's api.admin_key_sha256 (default: the environment's {KEY_VARIABLE})",
    )
    add_ca_argument(parser)


def connect(args: argparse.Namespace) -> Cluster:
    """The server that the options name; raises ErnieClusterError for a key or a CA that cannot be used."""
    return Cluster(args.url, key_headers(args.admin_key, "--admin-key", KEY_VARIABLE), verify=trust(args.ca_file))


def seconds(text: str) -> float:
    """Value of an option that takes a time; raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, {_MAX_S:,} at most")
    return value


def seconds_or_zero(text: str) -> float:
    """As `seconds`, and 0 for at once."""
    return 0.0 if text == "0" else seconds(text)


def find_replica(given: str, view: ClusterView) -> ReplicaView:
    """The one replica whose id, or the last part of it, is `given` or else begins with it.

    Raises:
        ErnieClusterError: there is none, or several; lists them.
    """
    for fits in (str.__eq__, str.startswith):
        found = [r for r in view.replicas if fits(r.replica, given) or fits(short_name(r.replica), given)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ErnieClusterError(f"{given!r} may be any of {len(found)} replicas; say more of it:{_listed(found)}")
    listed = _listed(view.replicas) if view.replicas else " none at all"
    raise ErnieClusterError(f"no replica is called {given!r}, or begins so; there are:{listed}")


def short_name(replica: str) -> str:
    """The last part of an id: `m/prefill/abc123` is `abc123`."""
    return replica.rpartition("/")[2]


def work_of(replica: ReplicaView) -> str:
    """In words, what a replica has to do."""
    return f"{replica.num_running:,} running, {replica.num_waiting:,} waiting, {replica.waiting_tokens:,} tokens to compute"


def _listed(replicas: list[ReplicaView] | tuple[ReplicaView, ...]) -> str:
    lines = [f"\n  {printable(r.replica)}  ({r.role}, {r.phase})" for r in replicas[:_MAX_LISTED]]
    more = len(replicas) - len(lines)
    return "".join(lines) + (f"\n  and {more} more; `ernie-cluster status --all` shows them" if more else "")
