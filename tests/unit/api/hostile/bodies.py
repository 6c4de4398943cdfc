"""What is wrong before any field is read: bodies, headers, paths and methods."""

from __future__ import annotations

import gzip
import json

from tests.unit.api.client import COMPLETION_URL, chat_body
from tests.unit.api.hostile.row import LIMITS, Row

GOOD = json.dumps(chat_body()).encode()


def with_number(number: bytes) -> bytes:
    return b'{"model": "tiny", "prompt": "p", "temperature": ' + number + b"}"


BODIES: list[tuple[str, bytes, int, str | None]] = [
    ("nothing", b"", 400, None),
    ("white space", b" \n ", 400, None),
    ("half an object", b"{", 400, None),
    ("a list", b"[]", 400, None),
    ("null", b"null", 400, None),
    ("text", b'"model"', 400, None),
    ("a number", b"7", 400, None),
    ("a form", b"model=tiny&messages=hi", 400, None),
    ("no UTF-8", b"\xff\xfe", 400, None),
    ("no UTF-8 in a text", b'{"model": "\xc3\x28"}', 400, None),
    ("overlong UTF-8", b'{"model": "\xc0\xaf"}', 400, None),
    ("UTF-16", GOOD.decode().encode("utf-16"), 400, None),
    ("a byte order mark", b"\xef\xbb\xbf" + GOOD, 400, None),
    ("two objects", b'{"model": "tiny"} {}', 400, None),
    ("a comma too many", b'{"model": "tiny",}', 400, None),
    ("a comment", b'{"model": "tiny" /* */}', 400, None),
    ("single quotes", b"{'model': 'tiny'}", 400, None),
    ("a key that is no text", b"{1: 2}", 400, None),
    ("a number of 6000 digits", b'{"seed": ' + b"9" * 6000 + b"}", 400, None),
    ("half a surrogate pair", b'{"user": "\\ud800"}', 400, None),
    ("half a surrogate pair as a key", b'{"\\udfff": 1}', 400, None),
    ("a NUL outside of a text", b'{"model": "tiny"}\x00', 400, None),
    ("a bare NUL in a text", b'{"model": "ti\x00ny"}', 400, None),
    ("too deep", b'{"x": ' + b"[" * 33 + b"]" * 33 + b"}", 400, None),
    ("far too deep", b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", 400, None),
    ("far too deep and not closed", b'{"x":' * 1900, 400, None),
    ("too many items", b'{"x": [' + b"1," * 2000 + b"1]}", 400, None),
    ("too many bytes", b'{"x": "' + b"y" * LIMITS.max_body_bytes + b'"}', 413, None),
    ("NaN where nobody looks", b'{"x": {"y": [1, NaN]}}', 400, "x.y[1]"),
    ("NaN under a long key", b'{"' + b"k" * 500 + b'": -Infinity}', 400, "k" * 64),
    ("gzip without its header", gzip.compress(GOOD), 400, None),
    ("the last of two keys counts", GOOD[:-1] + b', "model": "other"}', 404, "model"),
    ("a key twice", GOOD[:-1] + b', "seed": 1, "seed": 1}', 200, None),
    ("a key of prototypes", GOOD[:-1] + b', "__proto__": {"n": 9}, "constructor": {}}', 200, None),
]

HEADERS: list[tuple[dict[str, str], int]] = [
    ({"content-type": "text/plain"}, 415),
    ({"content-type": ""}, 415),
    ({"content-type": "application/jsonp"}, 415),
    ({"content-type": "text/html; application/json"}, 415),
    ({"content-type": "multipart/form-data; boundary=x"}, 415),
    ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ({"content-type": "x" * 3000}, 415),
    ({"content-type": "Application/JSON; charset=utf-8"}, 200),
    ({"content-encoding": "gzip"}, 415),
    ({"content-encoding": "br"}, 415),
    ({"content-encoding": "identity, gzip"}, 415),
    ({"content-encoding": "y" * 3000}, 415),
    ({"content-length": str(LIMITS.max_body_bytes + 1)}, 413),
    ({"content-length": "9" * 30}, 413),
    ({"content-length": "-1"}, 413),
    ({"content-length": "0x10"}, 413),
    ({"content-length": "1, 1"}, 413),
    ({"content-length": ""}, 413),
    ({f"x-{i}": "" for i in range(100)}, 431),
    ({"x-big": "y" * 65_536}, 431),
    ({"x-http-method-override": "DELETE", "x-original-url": "/metrics", "x-forwarded-for": "127.0.0.1"}, 200),
    ({"x-request-id": "a\tb"}, 200),
    ({"transfer-encoding": "chunked", "expect": "100-continue", "upgrade": "h2c", "connection": "upgrade"}, 200),
    ({"authorization": "Bearer " + "k" * 5000, "cookie": "a=b"}, 200),
    ({"range": "bytes=0-1", "if-match": "*", "accept": "image/png", "accept-encoding": "gzip;q=0"}, 200),
]

ROUTES: list[tuple[str, str, int, str | None]] = [
    ("GET", "/nothing", 404, None),
    ("GET", "/v1", 404, None),
    ("GET", "/health/", 404, None),
    ("GET", "//health", 404, None),
    ("GET", "/%2e%2e/etc/passwd", 404, None),
    ("GET", "/docs", 404, None),
    ("GET", "/v1/models/", 404, "model"),
    ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd", 404, "model"),
    ("GET", "/v1/models/tiny%00", 404, "model"),
    ("GET", "/v1/models/%ff%fe", 404, "model"),
    ("GET", "/v1/models/" + "m" * 5000, 404, "model"),
    ("GET", "/v1/models/{{7*7}}", 404, "model"),
    ("GET", "/v1/models/tiny?name=../x#y", 200, None),
    ("GET", "/health?" + "a=b&" * 1000, 200, None),
    ("POST", "/v1/chat/completions/", 404, None),
    ("POST", "/V1/CHAT/COMPLETIONS", 404, None),
    ("POST", "/v1/chat/completions?stream=true&model=x", 200, None),
    ("GET", "/v1/chat/completions", 405, None),
    ("HEAD", "/v1/chat/completions", 405, None),
    ("OPTIONS", "/v1/chat/completions", 405, None),
    ("DELETE", "/v1/models/tiny", 405, None),
    ("PUT", "/v1/messages", 405, None),
    ("PATCH", "/tokenize", 405, None),
    ("TRACE", "/health", 405, None),
    ("POST", "/health", 405, None),
    ("POST", "/openapi.json", 405, None),
    ("BREW", "/metrics", 405, None),
    ("GET", "/admin/decisions?limit=0", 400, "limit"),
    ("GET", "/admin/decisions?limit=1e3", 400, "limit"),
    ("GET", "/admin/decisions?limit=%D9%A3", 400, "limit"),
    ("GET", "/admin/decisions?limit=" + "9" * 5000, 400, "limit"),
    ("GET", "/admin/replicas/x/drain", 405, None),
    ("POST", "/admin/replicas/..%2f..%2fetc/drain", 404, "replica"),
    ("POST", "/admin/replicas//undrain", 404, "replica"),
    ("POST", "/admin/replicas/drain", 404, None),
    ("POST", "/admin/replicas/%00/drain", 404, "replica"),
    ("POST", "/admin/replicas/x/role", 400, "role"),
    ("POST", "/admin/status", 405, None),
]

ROWS = [
    *(Row(f"body: {name}", body, status, param) for name, body, status, param in BODIES),
    *(
        Row(f"number: {number.decode()}", with_number(number), 400, "temperature", COMPLETION_URL)
        for number in (b"NaN", b"-Infinity", b"1e400", b"-1e400")
    ),
    *(
        Row(f"header {i}: {next(iter(headers))}", GOOD, status, headers=headers)
        for i, (headers, status) in enumerate(HEADERS)
    ),
    *(Row(f"{method} {path[:40]}", GOOD, status, param, path, method) for method, path, status, param in ROUTES),
]
