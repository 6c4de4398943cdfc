"""The playground: a page to try the models in a browser. Static files, the same for everybody; knows no model.

The page holds nothing that is worth a key: what it shows, it asks of the API with the key that its user typed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FOLDER = Path(__file__).parent
_PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

PATHS: Mapping[str, str] = {
    "/": _PAGE,
    **{f"/playground/{p.name}": p.name for p in _FOLDER.iterdir() if p.suffix in _MEDIA_TYPES and p.name != _PAGE},
}
"""Route to file name."""

_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data: blob:",
    "media-src data: blob:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
"""What the page may do: load and ask of its own server, and show what its user gave it. No text becomes markup."""

_HEADERS = {
    "cache-control": "no-cache",  # kept, but asked for each time: all files are then of one version
    "content-security-policy": "; ".join(_POLICY),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_playground(app: FastAPI) -> None:
    """Serve the page at `/`. It is for everybody to see: a guard of the app is to know `PATHS` as open."""
    for path, name in PATHS.items():
        app.add_route(path, StaticFile(name).respond, methods=["GET", "HEAD"], include_in_schema=False)


class StaticFile:
    """One file of this folder, read once."""

    def __init__(self, name: str) -> None:
        self._content = (_FOLDER / name).read_bytes()
        self._etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        self._media_type = _MEDIA_TYPES[Path(name).suffix]

    async def respond(self, request: Request) -> Response:
        """The file; its headers only for HEAD; 304 for a client that has it."""
        headers = {**_HEADERS, "etag": self._etag}
        if is_known(self._etag, request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        headers["content-length"] = str(len(self._content))
        content = b"" if request.method == "HEAD" else self._content
        return Response(content, headers=headers, media_type=self._media_type)


def is_known(etag: str, if_none_match: str) -> bool:
    """Whether the header names this version; proxies that compress mark it as weak."""
    return etag in (given.strip().removeprefix("W/") for given in if_none_match.split(","))
