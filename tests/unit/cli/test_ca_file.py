"""The terminal clients and a server behind https."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ernie_cluster.cli import chat
from ernie_cluster.cli.main import main
from ernie_cluster.errors import ConfigError
from tests.certificates import Authority

EVENTS = b'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\ndata: [DONE]\n\n'


class Handler(BaseHTTPRequestHandler):
    """Serves one model, which always says the same."""

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(EVENTS)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def url(ca: Authority) -> Iterator[str]:
    files, context = ca.issue(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_chat_trusts_the_ca_that_is_named(url: str, ca: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "hi", "--once", "--url", url, "--ca-file", str(ca.file)]) == 0
    assert capsys.readouterr().out == "Hello\n"


@pytest.mark.parametrize("command", [["chat", "hi", "--once"], ["eval", "--samples", "1"]])
def test_a_server_that_is_not_trusted_is_not_asked(
    command: list[str], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--url", url]) == 1
    told = capsys.readouterr().err
    assert "is not trusted" in told
    assert "--ca-file" in told


def test_eval_trusts_the_ca_that_is_named(url: str, ca: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["eval", "--url", url, "--ca-file", str(ca.file), "--skills", "count", "--samples", "1"])
    assert (code, "asking tiny" in capsys.readouterr().err) == (1, True)  # it answers what no question asked


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_file_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--ca-file .*ca\.pem cannot be used"):
        chat.run("https://127.0.0.1:1", prompt="hi", once=True, ca_file=str(path))
