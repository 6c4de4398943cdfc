"""One streamed chat completion, line by line as it comes, whoever brings the lines. Knows no socket and reads no clock."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ernie_cluster.bench.record import Record

CUT = "stream cut off"
"""Kind of error: it ended without [DONE] or without a reason."""
IN_STREAM = "error in stream"
"""Kind of error: the server said, after it had begun, that it cannot go on."""


@dataclass(slots=True)
class Reading:
    """What has been read so far."""

    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    """What the server said in the place of more."""
    is_done: bool = False
    times_s: list[float] = field(default_factory=list)
    """When each piece of text, thought or call came, on the clock of `feed`."""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return self.is_done and self.finish_reason is not None and not self.error

    def feed(self, line: str, now_s: float) -> None:
        """One line of server-sent events.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: it is none of a chat completion.
        """
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            self.is_done = True
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            self.error = str(event["error"].get("message"))[:300]
        for choice in event.get("choices") or ():
            delta = choice["delta"]
            text = delta.get("content") or ""
            if text or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
                self.times_s.append(now_s)
            self.text += text
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.usage = event.get("usage") or self.usage

    def record(self, scenario: str, *, start_s: float, end_s: float, began_s: float) -> Record:
        """What it comes to, now that the stream has ended.

        Args:
            start_s, end_s: on the clock of `feed`.
            began_s: the same moment as `start_s`, since the epoch.
        """
        error = IN_STREAM if self.error else "" if self.is_whole else CUT
        detail = self.error or ("" if self.is_whole else f"after {len(self.times_s)} pieces of text")
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Record(
            scenario,
            began_s,
            end_s - start_s,
            ttft_s=self.times_s[0] - start_s if self.times_s else None,
            gaps_s=tuple(b - a for a, b in pairwise(self.times_s)),
            num_tokens=self.usage.get("completion_tokens") or len(self.times_s),
            num_prompt_tokens=self.usage.get("prompt_tokens") or 0,
            num_cached_tokens=cached or 0,
            error=error,
            detail=detail,
        )
