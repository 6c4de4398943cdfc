"""Whether what a model said is right. Lenient on spelling and wrapping, strict on content."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ernie_cluster.builtin.calculator import calculate
from ernie_cluster.skills.sample import Box, Sample, ToolCall

MIN_IOU = 0.5
"""Least overlap of a box with the right one."""

MIN_INSIDE = 0.9
"""Least share of what a zoom must show."""

MAX_REGION = 0.2
"""Largest share of the picture that a zoom may show."""


def judge(sample: Sample, text: str, tool_calls: Sequence[ToolCall] = ()) -> bool:
    """Whether a reply is what `sample` waits for: its call if it has one, else its answer.

    Args:
        text: the answer's content, without reasoning and without markup of calls.
        tool_calls: the calls in the reply, with parsed arguments.
    """
    if sample.tool_call is not None:
        return len(tool_calls) == 1 and _is_right_call(sample, sample.tool_call, tool_calls[0])
    if tool_calls:
        return False
    if sample.skill == "ground":
        box = read_box(text)
        return box is not None and sample.target is not None and iou(box, sample.target) >= MIN_IOU
    if sample.skill == "describe":
        return _parts(text) == _parts(sample.answer)
    return _plain(text) == _plain(sample.answer)


def read_box(text: str) -> Box | None:
    """The box, as fractions, in an answer of the form {"bbox_2d":[x1,y1,x2,y2],...}; None when there is none."""
    try:
        values = json.loads(text[text.index("{") : text.rindex("}") + 1])["bbox_2d"]
        x0, y0, x1, y1 = (float(v) / 1000 for v in values)
    except (ValueError, LookupError, TypeError):
        return None
    return x0, y0, x1, y1


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for empty boxes."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _is_right_call(sample: Sample, wanted: ToolCall, call: ToolCall) -> bool:
    if call.name != wanted.name:
        return False
    if sample.target is not None:
        box = read_box(json.dumps(dict(call.arguments)))
        return box is not None and _shows(box, sample.target)
    if "expression" in wanted.arguments:
        return _is_same_sum(str(call.arguments.get("expression")), wanted.arguments["expression"])
    return dict(call.arguments) == dict(wanted.arguments)


def _shows(box: Box, target: Box) -> bool:
    """It holds nearly all of the target, and but a part of the picture."""
    inside = _area((max(box[0], target[0]), max(box[1], target[1]), min(box[2], target[2]), min(box[3], target[3])))
    return inside >= MIN_INSIDE * _area(target) and _area(box) <= MAX_REGION


def _is_same_sum(given: str, wanted: str) -> bool:
    try:
        return calculate(given) == calculate(wanted)
    except ValueError:
        return False


def _plain(text: str) -> str:
    """Lower case, without spaces and marks at either end, American and British spellings alike."""
    return (
        re.sub(r"\s+", " ", text).strip(" \"'“”`.。!！").casefold().replace("color", "colour").replace("gray", "grey")
    )


def _parts(text: str) -> list[str]:
    """The things of a description, in any order."""
    return sorted(part for part in re.split(r",\s*|\s+and\s+|、|和", _plain(text)) if part)
