"""What every client of ours knows of an OpenAI-compatible server: its address, key, models, and its ways to refuse."""

from __future__ import annotations

import argparse
import os
import ssl

import httpx

from ernie_cluster.errors import ConfigError, ErnieClusterError

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "ERNIE_API_KEY"


def add_key_argument(parser: argparse.ArgumentParser) -> None:
    """The option whose value `key_headers` takes."""
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"sent as a bearer token (default: the environment's {KEY_VARIABLE})"
    )


def key_headers(api_key: str | None, option: str = "--api-key", variable: str = KEY_VARIABLE) -> dict[str, str]:
    """What shows a key to a server: the given one, else the environment's.

    Args:
        api_key: as the option had it.
        option, variable: where a key can come from, for the error.

    Raises:
        ErnieClusterError: it cannot stand in a header.
    """
    key = api_key or os.environ.get(variable, "")
    if not (key.isascii() and key.isprintable()):
        raise ErnieClusterError(f"the API key is not plain ASCII; check {option} and {variable}")
    return {"authorization": f"Bearer {key}"} if key else {}


def add_ca_argument(parser: argparse.ArgumentParser) -> None:
    """The option whose value `trust` takes."""
    parser.add_argument(
        "--ca-file",
        metavar="FILE",
        help="PEM file of the CA that has signed an https server's certificate (default: those that the system trusts)",
    )


def trust(ca_file: str | None) -> ssl.SSLContext | bool:
    """httpx' `verify`; raises ConfigError."""
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as e:  # SSLError is one
        raise ConfigError(f"--ca-file {ca_file} cannot be used: {e.strerror or e}; give a PEM file") from None


def base_url_of(url: str) -> str:
    """The address without "/v1", which users give or not."""
    return url.rstrip("/").removesuffix("/v1")


def first_model_of(response: httpx.Response) -> str:
    """Name of the first model in the answer to `GET /v1/models`.

    Raises:
        ErnieClusterError: the server refused, or lists none.
    """
    if response.status_code != 200:
        raise ErnieClusterError(refusal(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ErnieClusterError("the server lists no model; name one with --model") from None


def refusal(response: httpx.Response) -> str:
    """What an error response says, with its status."""
    try:
        text = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        text = response.text[:200] or "no explanation"
    return f"{text} (HTTP {response.status_code})"


def explain(error: Exception, base_url: str) -> str:
    """One line for the terminal about why a server gave no answer."""
    if isinstance(error, (httpx.TransportError, httpx.InvalidURL)):
        reason = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            return printable(f"{base_url} is not trusted ({reason}); name its CA with --ca-file.")
        return printable(
            f"{base_url} cannot be reached ({reason}); is the server running? Name another one with --url."
        )
    return printable(str(error))


def printable(text: str) -> str:
    """Without control characters, with which a model could rule the terminal; line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())
