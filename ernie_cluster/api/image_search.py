"""Finds pictures of the operator's folder that look like one of a conversation.

The picture is prepared here, encoded on the vision pool, and compared with the index here. What is found joins the
conversation under a URL of its own, which no client can send; only names relative to the folder leave this module.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from ernie_cluster.api.backend import Backend
from ernie_cluster.api.media import Fetched
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.schemas import ChatBody, GenerationBody
from ernie_cluster.api.tool_schemas import OwnTool
from ernie_cluster.builtin.base import Search, ToolResult, failed
from ernie_cluster.builtin.pictures import Shown
from ernie_cluster.builtin.search import ImageSearch
from ernie_cluster.errors import InvalidRequest, Overloaded, ReplicaError
from ernie_cluster.inputs.image_folder import ImageFolder
from ernie_cluster.inputs.image_index import Entry, Hit, ImageIndex, Vector

_log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEME = "image-search:"
"""Of the URLs of found pictures, before their names."""
_SPARES = 16
"""Further pictures that are looked at in place of those that are gone or have changed."""


class Run(Protocol):
    """`Workers.run`."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]: ...


class Found(NamedTuple):
    """What came of a search."""

    result: ToolResult
    content: Fetched
    """The files of the result's pictures."""


@dataclass(frozen=True, slots=True)
class ImageSearcher:
    """One folder and its index; safe to share."""

    index: ImageIndex
    folder: ImageFolder
    processor: Processor
    """Of the model that the index was made with."""
    max_results: int = 4
    max_pixels: int = 200_704
    """Of a found picture, as a model sees it."""

    async def find(
        self, wanted: Search, fetched: Fetched, cache_salt: bytes, *, backend: Backend, run: Run, timeout_s: float
    ) -> Found:
        """Search; what cannot be found the result says, in words for the model.

        Args:
            wanted: names a picture of a conversation.
            fetched: files of that conversation.
            cache_salt: whose it is.
            backend: encodes the picture.
            run: does CPU work in a thread.
            timeout_s: for the encoding.

        Raises:
            DeadlineExceeded: it took longer.
        """
        given = _given(wanted.picture, fetched)
        try:
            media = await run(partial(self.processor.picture, given, cache_salt=cache_salt))
            vector = await backend.embed(self.processor.served_name, media, timeout_s)
            return await run(partial(self._found, wanted, vector))
        except InvalidRequest as e:
            return Found(failed(e.message), {})
        except (Overloaded, ReplicaError) as e:  # whose words may name addresses
            _log.warning("a search for pictures failed: %s", e)
            return Found(failed("the search is not available now"), {})

    def _found(self, wanted: Search, vector: Vector) -> Found:
        count = min(wanted.top_k, self.max_results)
        hits: list[Hit] = []
        content: dict[Any, bytes] = {}
        for hit in self.index.nearest(vector, count + _SPARES):
            if len(hits) < count and (file := self._file(hit.entry)) is not None:
                hits.append(hit)
                content["image", SCHEME + hit.entry.name] = file
        lines = [f"{i}. {hit.entry.name} (score {hit.score:.3f})" for i, hit in enumerate(hits, start=1)]
        told = [{"name": hit.entry.name, "score": round(hit.score, 4)} for hit in hits]
        result = ToolResult(
            "\n".join(lines) or "Nothing was found.",
            tuple(Shown(SCHEME + hit.entry.name, max_pixels=self.max_pixels) for hit in hits),
            {**wanted.details, "found": told},
        )
        return Found(result, content)

    def _file(self, entry: Entry) -> bytes | None:
        """A picture as it was indexed; None when it is gone, or another one by now."""
        try:
            file = self.folder.read(entry.name)
        except InvalidRequest:
            return None
        return file if hashlib.sha256(file).hexdigest() == entry.sha256 else None


def check_offer(body: GenerationBody, searcher: ImageSearcher | None) -> None:
    """Refuse what the operator has not set up; raises InvalidRequest."""
    for i, tool in enumerate(body.tools or () if isinstance(body, ChatBody) else ()):
        if isinstance(tool, OwnTool) and tool.type == ImageSearch.name and searcher is None:
            raise InvalidRequest(
                f"tools[{i}].type: {tool.type} is not on offer here; its operator has to name an index of pictures in "
                "api.image_search.index",
                f"tools[{i}].type",
            )


def _given(picture: Shown, fetched: Fetched) -> dict[str, Any]:
    """The picture as an `image_url` of messages, with its file where it is known; not shrunk, as those of the index."""
    given: Mapping[str, Any] = replace(picture, max_pixels=None).part["image_url"]
    content = fetched.get(("image", picture.url))
    return dict(given) if content is None else {**given, "content": content}
