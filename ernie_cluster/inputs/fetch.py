"""Where a picture or video may be fetched from: decisions only, and the reading of local files.

A URL is read once, strictly, and the parts that were checked are those that are used: a checker and a fetcher that read
the same text differently let strangers in. A name is checked against the operator's list, the address that it stands
for against the ranges that are nobody else's business. Messages name no address: they would be a map of the network.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urljoin

from ernie_cluster.config.api import MEDIA_HOST
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.request import MediaKind

MAX_URL_CHARS = 8192

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[\w.~:/@!$&'()*+,;=%|\[\]-]*)?(?P<query>\?[\w.~:/?@!$&'()*+,;=%|\[\]-]*)?(?:#.*)?",
    re.ASCII | re.IGNORECASE,
)
_PORTS = {"http": 80, "https": 443}

_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
"""Where clouds hand out credentials, beside link-local addresses: AWS, Alibaba, Azure, Oracle."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class FetchRules:
    """What the operator allows. By default nothing is fetched."""

    hosts: tuple[str, ...] = ()
    """`images.example.com`, `*.example.com` (its subdomains) or `*` (all), each maybe with `:port`; without one, 80 and
    443 are meant."""
    folder: str | None = None
    """Folder below which `file://` may read; None refuses all."""
    allow_private: bool = False
    """Whether the hosts may have private and loopback addresses; link-local ones never."""
    max_image_bytes: int = 20 * 2**20
    max_video_bytes: int = 20 * 2**20
    max_total_bytes: int = 32 * 2**20
    """Of all that one request has fetched."""
    max_urls: int = 36
    """Per request."""
    timeout_s: float = 20.0
    """For one URL, from the look-up of its name to its last byte."""
    max_redirects: int = 3

    def max_bytes(self, kind: MediaKind) -> int:
        return self.max_image_bytes if kind == "image" else self.max_video_bytes


@dataclass(frozen=True, slots=True)
class WebSource:
    """An allowed URL, in parts."""

    scheme: str
    host: str
    """In lower case; an IPv6 address without its brackets."""
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """Host, and port where it is not the scheme's own; what the Host header says."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True)
class FileSource:
    """An allowed file, as steps from the folder."""

    steps: tuple[str, ...]


def check_url(url: str, rules: FetchRules) -> WebSource | FileSource:
    """The source that a URL names.

    Raises:
        InvalidRequest: not allowed, or not a URL that can be read in one way only.
    """
    if not rules.hosts and rules.folder is None:
        raise _refused("this server fetches nothing; send the file itself as a data URL")
    if len(url) > MAX_URL_CHARS:
        raise _refused(f"the URL has {len(url)} characters, the limit is {MAX_URL_CHARS}; shorten it")
    if url[:7].lower() == "file://":
        return FileSource(_steps(url[7:], rules))
    match = _URL.fullmatch(url)
    if match is None:
        raise _refused("not a plain URL; send http(s)://host/path without a user name, other characters as %XX")
    scheme, host = match["scheme"].lower(), match["host"].lower().strip("[]")
    port = int(match["port"] or _PORTS[scheme])
    if not any(_matches(pattern, host, port, scheme) for pattern in rules.hosts):
        raise _refused(
            f"nothing is fetched from {host[:100]} port {port}; its operator may allow it in api.media_hosts"
        )
    return WebSource(scheme, host, port, (match["path"] or "/") + (match["query"] or ""))


def check_redirect(source: WebSource, location: str, rules: FetchRules) -> WebSource:
    """The source to which a server sends us on; raises InvalidRequest as `check_url` does."""
    try:
        there = urljoin(f"{source.scheme}://{source.authority}{source.target}", location)
    except ValueError:
        raise _refused("the server redirects to what is no URL") from None
    found = check_url(there, rules)
    if isinstance(found, FileSource):
        raise _refused("the server redirects to a file")
    return found


def check_address(address: str, rules: FetchRules) -> None:
    """Raise InvalidRequest for an IP address to which no connection may be made."""
    ip = _innermost(ipaddress.ip_address(address))
    is_forbidden = ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in _METADATA or _is_reserved(ip)
    if is_forbidden or not (_is_public(ip) or rules.allow_private):
        raise _refused("the host has no public address; send the file itself as a data URL")


def read_file(source: FileSource, rules: FetchRules, kind: MediaKind) -> bytes:
    """Content of a file below the folder, reached without a symbolic link. Blocks.

    Raises:
        InvalidRequest: no such file, not a plain one, a link on the way, or too large.
    """
    assert rules.folder is not None, "a file source that nobody allowed"
    here = os.open(rules.folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for i, step in enumerate(source.steps):
            is_last = i == len(source.steps) - 1
            flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_NONBLOCK if is_last else os.O_DIRECTORY)
            there = os.open(step, flags, dir_fd=here)
            os.close(here)
            here = there
        if not stat.S_ISREG(os.fstat(here).st_mode):
            raise OSError
        with os.fdopen(os.dup(here), "rb") as file:
            content = file.read(rules.max_bytes(kind) + 1)
    except OSError:
        raise _refused("there is no such plain file, or a symbolic link leads to it") from None
    finally:
        os.close(here)
    if len(content) > rules.max_bytes(kind):
        raise too_many_bytes(kind, rules.max_bytes(kind))
    return content


def too_many_bytes(kind: MediaKind, limit: int) -> InvalidRequest:
    """The error for what is larger than may be fetched."""
    return InvalidRequest(f"the {kind} has more than {limit} bytes; send a smaller file", code=f"{kind}_too_large")


def _refused(what: str) -> InvalidRequest:
    return InvalidRequest(what, code="media_not_fetched")


def _matches(pattern: str, host: str, port: int, scheme: str) -> bool:
    match = MEDIA_HOST.fullmatch(pattern.lower())
    assert match is not None, f"the configuration let {pattern!r} pass"
    name = match["name"].strip("[]")
    is_host = name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))
    return is_host and port == int(match["port"] or _PORTS[scheme])


def _steps(path: str, rules: FetchRules) -> tuple[str, ...]:
    """From the folder to `path`, which is absolute and percent-encoded."""
    if rules.folder is None:
        raise _refused("no files are read here; send the file itself as a data URL")
    steps = _split(os.fsdecode(unquote_to_bytes(path)))
    folder = _split(os.path.abspath(rules.folder))
    if not path.startswith("/") or steps[: len(folder)] != folder or len(steps) == len(folder) or ".." in steps:
        raise _refused("the file is not below the folder that api.media_folder allows")
    if any("\0" in step for step in steps):
        raise _refused("a file's name cannot hold a NUL")
    return tuple(steps[len(folder) :])


def _split(path: str) -> Sequence[str]:
    return [step for step in path.split("/") if step not in ("", ".")]


def _innermost(ip: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64 or (int(ip) >> 32 == 0 and int(ip) > 1):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)


def _is_public(ip: Address) -> bool:
    return ip.is_global and (isinstance(ip, ipaddress.IPv4Address) or ip in _GLOBAL_UNICAST)


def _is_reserved(ip: Address) -> bool:
    """Nobody's: neither public, nor private, nor this machine's own."""
    return not (_is_public(ip) or ip.is_loopback or _is_private(ip))


_PRIVATE = [
    ipaddress.ip_network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]


def _is_private(ip: Address) -> bool:
    return any(ip in network for network in _PRIVATE)
