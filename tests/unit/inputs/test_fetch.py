from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.fetch import (
    FetchRules,
    FileSource,
    WebSource,
    check_address,
    check_redirect,
    check_url,
    read_file,
)

RULES = FetchRules(hosts=("images.example.com", "*.cdn.example", "store.internal:9000", "[2001:db8::1]"))


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("https://images.example.com/a.png", WebSource("https", "images.example.com", 443, "/a.png")),
        ("HTTP://Images.Example.com", WebSource("http", "images.example.com", 80, "/")),
        ("http://images.example.com:80?a=1&b=%20#part", WebSource("http", "images.example.com", 80, "/?a=1&b=%20")),
        ("https://a.b.cdn.example/x", WebSource("https", "a.b.cdn.example", 443, "/x")),
        ("http://store.internal:9000/x", WebSource("http", "store.internal", 9000, "/x")),
        ("http://[2001:db8::1]/x", WebSource("http", "2001:db8::1", 80, "/x")),
    ],
)
def test_allowed_urls(url: str, source: WebSource) -> None:
    assert check_url(url, RULES) == source


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "https://cdn.example/x",
        "https://evilcdn.example/x",
        "https://images.example.com.evil.org/",
        "https://images.example.com:8443/",
        "http://store.internal/x",
        "https://images.example.com@evil.org/",
        "https://evil.org#@images.example.com/",
        "https://user:pass@images.example.com/",
        "https://images.example.com\\@evil.org/",
        "https://evil.org\\.images.example.com/",
        "https://images.example.com./",
        "https://images.example.com/a b",
        "https://images.example.com/\r\nHost: evil.org",
        "https://images.example.com\n",
        "https://images.example.com/ä",
        "https://imаges.example.com/",  # a Cyrillic letter
        "https:images.example.com",
        "https:///images.example.com/",
        "//images.example.com/a.png",
        "ftp://images.example.com/",
        "gopher://images.example.com/",
        "https://images.example.com:99999999/",
        "https://images.example.com/" + "a" * 9000,
        "file:///etc/passwd",
        "http://0x7f.1/",
        "http://2130706433/",
        "",
    ],
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_url(url, RULES)
    assert caught.value.code == "media_not_fetched"


def test_without_configuration_nothing_is_fetched() -> None:
    for url in ("https://images.example.com/", "file:///tmp/a.png"):
        with pytest.raises(InvalidRequest, match="fetches nothing; send the file itself as a data URL"):
            check_url(url, FetchRules())


@given(
    st.text(st.characters(codec="utf-8"), max_size=60), st.sampled_from(["", "http://", "https://images.example.com"])
)
def test_whatever_is_let_through_stands_in_the_text(text: str, prefix: str) -> None:
    """Read strictly, there is nothing that a second reader could take for another host."""
    try:
        source = check_url(prefix + text, FetchRules(hosts=("*",)))
    except InvalidRequest:
        return
    assert isinstance(source, WebSource)
    assert (prefix + text).lower().startswith(f"{source.scheme}://{source.host}")
    assert not set("\\@ \r\n\t") & set(source.host)
    assert source.target.startswith("/")
    assert source.target.isascii()
    assert source.target.isprintable()


def test_redirects_are_checked_like_urls() -> None:
    here = WebSource("https", "images.example.com", 443, "/a/b?c")
    assert check_redirect(here, "../d.png", RULES) == WebSource("https", "images.example.com", 443, "/d.png")
    assert check_redirect(here, "//x.cdn.example/e", RULES) == WebSource("https", "x.cdn.example", 443, "/e")
    for bad in (
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "https://evil.org/",
        "\\\\evil.org\\",
        "http://[",
        "//\u2100.example/",
    ):
        with pytest.raises(InvalidRequest):
            check_redirect(here, bad, FetchRules(RULES.hosts, folder="/etc"))


PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
PRIVATE = ["10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "127.8.8.8", "100.64.0.1", "::1", "fd00::1"]
PRIVATE += ["::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2002:7f00:1::"]
NEVER = ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"]
NEVER += ["0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "240.0.0.1", "ff02::1", "fec0::1", "fd00:ec2::254"]
NEVER += ["100.100.100.200", "168.63.129.16", "192.0.0.192", "0.1.2.3", "2001:db8::1", "fe80::1%1", "::7f00:1:1"]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    check_address(address, FetchRules())
    check_address(address, FetchRules(allow_private=True))


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_take_a_switch(address: str) -> None:
    with pytest.raises(InvalidRequest, match="has no public address") as caught:
        check_address(address, FetchRules())
    assert address not in caught.value.message
    check_address(address, FetchRules(allow_private=True))


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_never_allowed(address: str) -> None:
    for allow_private in (False, True):
        with pytest.raises(InvalidRequest, match="has no public address"):
            check_address(address, FetchRules(allow_private=allow_private))


@given(st.ip_addresses())
def test_what_is_let_through_is_global(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    try:
        check_address(str(ip), FetchRules())
    except InvalidRequest:
        return
    inner = ip if isinstance(ip, ipaddress.IPv4Address) else ip.ipv4_mapped or ip.sixtofour or ip
    assert inner.is_global or ip in ipaddress.ip_network("64:ff9b::/96")
    assert not inner.is_multicast


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`media/a.png`, `media/deep/b c.png`, links out of it and inside it, and a secret beside it."""
    media = tmp_path / "media"
    (media / "deep").mkdir(parents=True)
    (media / "a.png").write_bytes(b"a")
    (media / "deep" / "b c.png").write_bytes(b"bc")
    (tmp_path / "secret").write_bytes(b"secret")
    (media / "out").symlink_to(tmp_path / "secret")
    (media / "up").symlink_to(tmp_path)
    (media / "inside").symlink_to(media / "a.png")
    os.mkfifo(media / "pipe")
    return media


def read(url: str, rules: FetchRules) -> bytes:
    source = check_url(url, rules)
    assert isinstance(source, FileSource)
    return read_file(source, rules, "image")


def test_files_below_the_folder(folder: Path) -> None:
    rules = FetchRules(folder=str(folder))
    assert read(f"file://{folder}/a.png", rules) == b"a"
    assert read(f"FILE://{folder}//./deep/b%20c.png", rules) == b"bc"
    with pytest.raises(InvalidRequest, match="more than 1 bytes"):
        read(f"file://{folder}/deep/b%20c.png", FetchRules(folder=str(folder), max_image_bytes=1))


@pytest.mark.parametrize(
    "path", ["out", "up/secret", "inside", "pipe", "deep", "none.png", "../secret", "%2e%2e/secret", "", ".", "deep/%00", "a.png/x"]
)  # fmt: skip
def test_nothing_else_is_read(folder: Path, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(f"file://{folder}/{path}", FetchRules(folder=str(folder)))
    assert "secret" not in caught.value.message


def test_other_folders_are_refused(folder: Path) -> None:
    rules = FetchRules(folder=str(folder))
    for url in (
        f"file://{folder}x/a.png",
        "file:///etc/passwd",
        "file://host/a.png",
        f"file://localhost{folder}/a.png",
    ):
        with pytest.raises(InvalidRequest, match="not below the folder"):
            check_url(url, rules)
    with pytest.raises(InvalidRequest, match="no files are read here"):
        check_url(f"file://{folder}/a.png", RULES)
