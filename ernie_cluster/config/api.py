"""The front door, and what it lets in."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.checks import check_labels, check_positive, check_range, check_unique
from ernie_cluster.config.image_search import ImageSearchConfig
from ernie_cluster.config.keys import is_sha256
from ernie_cluster.config.tracing import TracingConfig
from ernie_cluster.config.units import GIB, MIB
from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files, the same absolute paths where `serve` runs and on each node with an API replica.

    A pair that is renewed counts for the connections that come after."""

    certificate: str
    """The server's certificate, and behind it those that lead to its CA."""
    key: str
    """Private key of that certificate, not encrypted."""
    client_ca: str | None = None
    """CAs, one of which must have signed a certificate that each client has to show; None = clients show none."""

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "client_ca"):
            path = getattr(self, name)
            if path is not None and not os.path.isabs(path):
                raise ConfigError(f"{name} = {path!r} must be an absolute path: each API replica reads it")


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """The front door, and what it lets in."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all interfaces."""
    port: int = 8000
    """HTTP port, 1 to 65535."""
    grpc_port: int | None = None
    """gRPC port on each machine with an API replica, 1 to 65535, another one than `port`; None = no gRPC."""
    grpc_tls: TlsConfig | None = None
    """What gRPC is encrypted with; None = not at all. HTTP goes through Serve's proxy, which speaks no TLS: for HTTPS set a
    proxy of your own before `port`."""
    num_replicas: int = 1
    """API replicas, at least 1."""
    node_labels: tuple[str, ...] = ()
    """Labels, each as `key=value`, of the nodes that API replicas and the router run on; none = any node."""
    listen_on: Literal["head", "every_node"] = "head"
    """Whose `port` takes requests: the head node's alone, or that of every node with a replica, too, for a balancer before
    them. What comes in by a node's port is lost with that node."""
    max_body_bytes: int = 32 * MIB
    """Largest request body, at least 1."""
    max_image_bytes: int = 20 * MIB
    """Largest encoded picture, fetched or inline; at least 1."""
    max_image_pixels: int = 50_000_000
    """Largest picture by width * height before decoding, at least 1."""
    max_images: int = 32
    """Most pictures per request; 0 refuses all."""
    max_video_bytes: int = 20 * MIB
    """Largest encoded video, at least 1."""
    max_video_frames: int = 5000
    """Most frames of a video, before sampling; at least 2."""
    max_videos: int = 4
    """Most videos per request; 0 refuses all."""
    max_json_depth: int = 32
    """Deepest nesting of a request body, at least 8: chat messages with tools need that much."""
    request_timeout_s: float = 600.0
    """Deadline of a request that brings none, and the most that one may ask for; more than 0."""
    client_idle_timeout_s: float = 60.0
    """A client that is sent an answer and reads nothing of it for so long is parted with, and its request ends; more than 0."""
    keep_alive_s: float | None = 30.0
    """A stream with nothing to tell sends a comment this often, more than 0, so that proxies do not cut it; an error after the
    first one comes as an event, not as a status. None = never."""
    default_max_tokens: int | None = None
    """Most output tokens of a request that does not say, at least 1, all rounds of tools together; None = what is left of
    the context for a chat, 256 for a text without a template, which seldom comes to an end by itself."""
    preprocess_threads: int = 2
    """Threads per API replica that parse and tokenise (and decode, see `decode_processes`), at least 1."""
    decode_processes: int = 1
    """Processes per API replica that decode and resize pictures and videos; 0 leaves it to `preprocess_threads`, where
    nothing bounds the time and memory of one file."""
    decode_timeout_s: float = 30.0
    """Most that one picture or video may take to decode, more than 0."""
    decode_memory_bytes: int = 2 * GIB
    """Address space of a decoding process, at least 512 MiB: the libraries take 300 MB of it."""
    media_cache_bytes: int = 256 * MIB
    """Patches of pictures and videos kept per API replica for when they come again; 0 keeps none."""
    media_hosts: tuple[str, ...] = ()
    """Hosts from which http(s) URLs are fetched, as `images.example.com`, `*.example.com` (its subdomains), `*` (all) or
    `store.internal:9000`; none: nothing is fetched."""
    media_folder: str | None = None
    """Folder below which `file://` URLs may read, an absolute path on each node with an API replica; None = no files."""
    media_allow_private: bool = False
    """Whether `media_hosts` may have private and loopback addresses."""
    media_timeout_s: float = 20.0
    """Most that fetching one URL may take, more than 0."""
    builtin_tools: tuple[Literal["image_zoom_in_tool", "calculator", "image_search"], ...] = ()
    """Tools that the server runs itself, offered to the model in chats that say nothing of tools; others ask for them by
    name."""
    max_tool_rounds: int = 6
    """Times that one answer may call such tools and go on, at least 1."""
    max_tool_pixels: int = 16_000_000
    """Pixels of all pictures that they may add to one answer's prompt, as the model sees them; at least 1."""
    image_search: ImageSearchConfig | None = None
    """What the tool `image_search` finds; None = it is not on offer."""
    tracing: TracingConfig | None = None
    """Where spans of requests go; None = nowhere."""
    keys_file: str | None = None
    """YAML list of `ApiKey`, an absolute path on each node with an API replica; a change of it counts after a second.
    None = no key is needed."""
    admin_key_sha256: str | None = None
    """SHA-256 of the key that `/metrics`, `/debug` and `/admin` need, as `ernie-cluster key` prints it; None = they need none,
    and orders to replicas are taken as `takes_keyless_orders` says."""
    isolate_prefix_cache: bool = False
    """Cache each key's prompts and pictures for it alone, so that no answer's speed tells what others have sent."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the API from a browser, such as https://chat.example; "*" = all, empty = none."""
    playground: bool = True
    """Serve a page to try the models in a browser, at `/`; it is open to see, and asks its user for a key."""

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host is empty; use 127.0.0.1, or 0.0.0.0 for all interfaces")
        check_range(self, 1, "port", "grpc_port", high=65535)
        if self.grpc_tls is not None and self.grpc_port is None:
            raise ConfigError(
                "grpc_tls is for gRPC, and grpc_port is not set; set it, or for HTTPS a proxy of your own before port = "
                f"{self.port}: Serve's speaks no TLS"
            )
        if self.grpc_port == self.port:
            raise ConfigError(f"grpc_port = {self.grpc_port} is the HTTP port, too; choose another")
        check_labels(self, "node_labels")
        check_range(self, 1, "num_replicas", "max_body_bytes", "max_image_bytes", "max_image_pixels", "max_video_bytes")
        check_range(self, 2, "max_video_frames")
        check_range(self, 1, "default_max_tokens", "preprocess_threads", "max_tool_rounds", "max_tool_pixels")
        check_unique("builtin_tools:", self.builtin_tools)
        if "image_search" in self.builtin_tools and self.image_search is None:
            raise ConfigError("builtin_tools has image_search, which needs image_search.index and image_search.folder")
        check_range(self, 0, "max_images", "max_videos", "decode_processes", "media_cache_bytes")
        check_range(self, 512 * MIB, "decode_memory_bytes")
        check_range(self, 8, "max_json_depth")
        check_positive(self, "request_timeout_s", "decode_timeout_s", "media_timeout_s", "client_idle_timeout_s")
        if self.keep_alive_s is not None:
            check_positive(self, "keep_alive_s")
        for host in self.media_hosts:
            if not MEDIA_HOST.fullmatch(host):
                raise ConfigError(
                    f"media_hosts has {host!r}; a host is named as images.example.com, *.example.com or host:port, "
                    "without http:// and path"
                )
        if self.media_folder is not None and not os.path.isabs(self.media_folder):
            raise ConfigError(
                f"media_folder = {self.media_folder!r} must be an absolute path: each API replica reads it"
            )
        self._check_access()

    def _check_access(self) -> None:
        if self.keys_file is not None and not os.path.isabs(self.keys_file):
            raise ConfigError(f"keys_file = {self.keys_file!r} must be an absolute path: each API replica reads it")
        if self.admin_key_sha256 is not None and not is_sha256(self.admin_key_sha256):
            raise ConfigError(
                "admin_key_sha256 must be 64 hexadecimal digits, not the key itself; `ernie-cluster key` prints them"
            )
        if self.isolate_prefix_cache and self.keys_file is None:
            raise ConfigError("isolate_prefix_cache = true needs keys_file: without keys all clients are one")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f'cors_origins: {origin!r} must be like https://chat.example:8443, or "*"')

    @property
    def media_threads(self) -> int:
        """Threads for requests with pictures: where processes decode, they only wait, each for its request's turn."""
        return max(self.preprocess_threads, 8 if self.decode_processes else 1)

    @property
    def is_open_to_strangers(self) -> bool:
        """Anybody who can reach this machine may use the models."""
        return self.keys_file is None and not is_loopback(self.host)

    @property
    def takes_keyless_orders(self) -> bool:
        """Orders to replicas need no key: only this machine can send them, and nothing else needs one."""
        return self.admin_key_sha256 is None and self.keys_file is None and is_loopback(self.host)


MEDIA_HOST = re.compile(
    r"(?P<name>\*|\[[0-9A-Fa-f:.]+\]|(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)(?::(?P<port>[0-9]{1,5}))?"
)
"""An entry of `ApiConfig.media_hosts`."""

_ORIGIN = re.compile(r"https?://[^/\s?#@]+")


def is_loopback(host: str) -> bool:
    """Whether only its own machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
