"""The same request over a connection of the standard library: for threads, and for greenlets that are patched in there."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ernie_cluster.bench.asking import NO_CONNECTION, NO_STREAM, PATH, TIMED_OUT, concluded, explanation
from ernie_cluster.bench.reading import Reading
from ernie_cluster.bench.record import Record
from ernie_cluster.errors import ConfigError, ErnieClusterError


class Asker:
    """Owns one connection, which is made anew where it broke. For one request at a time.

    Args:
        url: of the server, without `/v1`; a path before that stays.
        headers: that show a key.
        timeout_s: an answer that takes longer is given up; so is one that pauses for as long.
        ca_file: PEM file of an https server's CA; None trusts those of the system.

    Raises:
        ConfigError: the URL is none of http.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float, ca_file: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address such as http://127.0.0.1:8000")
        self._prefix, self._timeout_s = parts.path.rstrip("/").removesuffix("/v1"), timeout_s
        self._headers = {**headers, "content-type": "application/json"}
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=ca_file)
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)

    def close(self) -> None:
        self._connection.close()

    def models(self) -> list[dict[str, Any]]:
        """The cards of all models; raises ErnieClusterError."""
        try:
            self._connection.request("GET", self._prefix + "/v1/models", headers=self._headers)
            response = self._connection.getresponse()
            text = response.read().decode(errors="replace")
            if response.status != 200:
                raise ErnieClusterError(f"HTTP {response.status}: {explanation(text)}")
            cards: list[dict[str, Any]] = json.loads(text)["data"]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
            self.close()
            raise ErnieClusterError(f"the server does not list its models: {e!r}") from None
        return cards

    def ask(self, scenario: str, body: Mapping[str, Any]) -> Record:
        """Ask, and read to the end; never raises for what the server or the network does."""
        raw = json.dumps(body).encode()
        began_s, start_s = time.time(), time.perf_counter()
        reading, error, detail = Reading(), "", ""
        try:
            self._connection.request("POST", self._prefix + PATH, raw, self._headers)
            response = self._connection.getresponse()
            if response.status == 200:
                self._read(response, reading, start_s)
            else:
                text = response.read().decode(errors="replace")
                error, detail = f"HTTP {response.status}", explanation(text)
        except TimeoutError:
            error, detail = TIMED_OUT, f"no end within {self._timeout_s:g} s"
        except (OSError, http.client.HTTPException) as e:
            error, detail = NO_CONNECTION, repr(e)[:300]
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            error, detail = NO_STREAM, repr(e)[:300]
        if error or not reading.is_whole:
            self.close()
        return concluded(reading, scenario, start_s, began_s, error, detail)

    def _read(self, response: http.client.HTTPResponse, reading: Reading, start_s: float) -> None:
        for line in response:
            now_s = time.perf_counter()
            if now_s - start_s > self._timeout_s:
                raise TimeoutError
            reading.feed(line.decode().rstrip("\r\n"), now_s)
