"""What every client of ours knows of an OpenAI-compatible server: its address, its models, and its ways to refuse."""

from __future__ import annotations

import httpx

from ernie_cluster.errors import ErnieClusterError

DEFAULT_URL = "http://127.0.0.1:8000"


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
        return printable(
            f"{base_url} cannot be reached ({reason}); is the server running? Name another one with --url."
        )
    return printable(str(error))


def printable(text: str) -> str:
    """Without control characters, with which a model could rule the terminal; line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())
