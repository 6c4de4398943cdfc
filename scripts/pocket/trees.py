"""Groups of samples to trees of tokens, by the very code that serves requests.

Prompt, tokens, positions and patches come from `ernie_cluster.inputs`; what is added here is the answer behind the
prompt, and what the scaffold is taught about each patch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from batch import Shown, Tree, patch_places

from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.images import PreparedMedia, prepared, to_patches
from ernie_cluster.inputs.messages import Media
from ernie_cluster.request import GenerationRequest, SamplingParams
from ernie_cluster.skills.sample import Box, Picture, Sample
from ernie_cluster.skills.words import COLOURS, SHAPES

NAMES = {name: i for i, name in enumerate([*SHAPES, *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-×=", "sign"], 1)}  # fmt: skip
COLOUR_IDS = {name: i for i, name in enumerate(COLOURS, 1)}
NUM_LABELS = (len(NAMES) + 1, len(COLOUR_IDS) + 1, 4)
"""Names, colours and counts that the scaffold tells apart."""

END = "</s>"

_DIGIT_WEIGHTS = (3.0, 2.0, 0.3, 1.0)
"""Of the digits of a box's edges, beside other tokens: the third is next to chance, and its noise would drown the first."""
_SAME_PLACE = 0.02
"""Fractions of a picture's side: boxes whose edges differ by less frame the same thing."""

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def expected_text(sample: Sample) -> str:
    """What the model should write behind the prompt, up to the end token."""
    text = sample.answer
    if sample.tool_call is not None:
        call = {"name": sample.tool_call.name, "arguments": dict(sample.tool_call.arguments)}
        text = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>\n"
    if not sample.enable_thinking:
        return text + END
    gap = "\n\n" if sample.tool_call is not None else ""
    return f"\n{sample.reasoning}\n</think>\n{gap}{text}{END}"


class Planter:
    """Makes trees.

    Args:
        processor: of the checkpoint's folder.
    """

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor
        self._ready: dict[str, PreparedMedia] = {}
        self._lossless = replace(processor, map_media=self._prepared)

    def plant(self, group: Sequence[Sample]) -> Tree:
        """One tree of all samples of a group."""
        self._ready.clear()
        requests = [self.request(sample) for sample in group]
        trunk = _common_length(requests)
        tree = Tree(ids=[], positions=np.zeros((3, 0), np.int64), segments=[(0, trunk)])
        for i, (sample, request) in enumerate(zip(group, requests, strict=True)):
            answer = self._processor.tokenizer.encode(expected_text(sample), allow_special=True)
            start = trunk if i else 0
            self._grow(tree, request, answer[:-1], start)
            shift = len(tree.ids) - request.num_prompt_tokens - len(answer) + 1
            self._show(tree, sample, request, start, shift)
            tree.segments.append((len(tree.ids) - (request.num_prompt_tokens - trunk) - len(answer) + 1, len(tree.ids)))
            first = len(tree.ids) - len(answer)
            pieces = [self._processor.tokenizer.decode([token]) for token in answer]
            digits = list(_box_digits(pieces))
            for j, (token, digit) in enumerate(zip(answer, digits, strict=True)):
                share = _DIGIT_WEIGHTS[min(digit, 4) - 1] if digit else 1.0
                tree.targets.append((first + j, token, share * len(answer) ** -0.5))
            if sample.target is not None and (sought := _sought(tree, sample.target, tree.segments[-1][0])):
                tree.pointers += [(first + j, sought, sample.target) for j, digit in enumerate(digits) if digit]
        return tree

    def plant_picture(self, picture: Picture) -> Tree:
        """A tree that is a picture and nothing else."""
        pixels = self._processor.pixels
        media = prepared("image", *to_patches([picture.image], pixels), pixels)
        labels = _labels(picture, media.grid_thw, pixels.patch_size)
        assert self._processor.config.token_ids is not None
        num = media.num_tokens
        tree = Tree([self._processor.config.token_ids.image_patch] * num, np.zeros((3, num), np.int64), [(0, num)])
        tree.shown.append(Shown(0, media.grid_thw, media.patches, *labels))
        return tree

    def request(self, sample: Sample) -> GenerationRequest:
        """The request that a server would make of it; pictures are not encoded on the way, as PNG loses nothing."""
        messages = []
        for message in sample.messages:
            content = message.get("content")
            if isinstance(content, list):
                content = [self._wire(part) for part in content]
            messages.append({**message, "content": content})
        return self._lossless.chat(
            messages,
            request_id="",
            sampling=_GREEDY,
            tools=sample.tools or None,
            enable_thinking=sample.enable_thinking,
        )

    def _wire(self, part: dict[str, object]) -> dict[str, object]:
        if part["type"] == "text":
            return part
        if part["type"] == "image":
            picture = part["image"]
            assert isinstance(picture, Picture)
            key = f"picture:{id(picture)}"
            if key not in self._ready:
                pixels = self._processor.pixels
                self._ready[key] = prepared("image", *to_patches([picture.image], pixels), pixels)
            return {"type": "image_url", "image_url": {"url": key}}
        return {"type": "video_url", "video_url": {"url": part["video"].data_url()}}  # type: ignore[attr-defined]

    def _prepared(self, prepare: Callable[[Media], PreparedMedia], media: Iterable[Media]) -> Iterable[PreparedMedia]:
        for item in media:
            if item.url not in self._ready:
                self._ready[item.url] = prepare(item)
            yield self._ready[item.url]

    @staticmethod
    def _grow(tree: Tree, request: GenerationRequest, answer: Sequence[int], start: int) -> None:
        """Put prompt tokens from `start` on, and the answer, at the tree's end."""
        num = request.num_prompt_tokens
        later = np.arange(num, num + len(answer)) + request.position_delta
        positions = np.concatenate([request.positions, np.tile(later, (3, 1))], 1)[:, start:]
        tree.ids += [*request.prompt_token_ids[start:].tolist(), *answer]
        tree.positions = np.concatenate([tree.positions, positions.astype(np.int64)], 1)

    def _show(self, tree: Tree, sample: Sample, request: GenerationRequest, start: int, shift: int) -> None:
        pictures = iter(sample.pictures)
        for media in request.media:
            picture = next(pictures) if media.kind == "image" else None
            if media.offset >= start:
                assert media.patches is not None
                labels = _labels(picture, media.grid_thw, self._processor.pixels.patch_size)
                tree.shown.append(Shown(media.offset + shift, media.grid_thw, media.patches, *labels))


def _common_length(requests: Sequence[GenerationRequest]) -> int:
    """Tokens that all prompts begin with, pictures included; at least one token of each is left to its branch."""
    shortest = min(r.num_prompt_tokens for r in requests) - 1
    ids = np.stack([r.prompt_token_ids[:shortest] for r in requests])
    differ = np.flatnonzero((ids != ids[0]).any(0))
    length = int(differ[0]) if len(differ) else shortest
    for media in zip(*(r.media for r in requests), strict=False):
        if len({m.media_hash for m in media}) > 1 or media[0].end > length:
            length = min(length, media[0].offset)
    return length


def _box_digits(pieces: Iterable[str]) -> Iterator[int]:
    """For each piece of an answer which digit of an edge of a box it is, from 1; 0 for all else."""
    num_digits, written = 0, ""
    for piece in pieces:
        written += piece
        is_box = written.rfind("bbox_2d") > written.rfind("]")
        num_digits = num_digits + 1 if is_box and piece.isdigit() else 0
        yield num_digits


def _sought(tree: Tree, target: Box, branch: int) -> tuple[int, ...]:
    """Rows of the tokens that show what lies in a box of fractions, of the first picture that a branch sees."""
    shown = next(s for s in tree.shown if s.row < tree.segments[0][1] or s.row >= branch)
    is_near = np.abs(shown.places - np.array(target, np.float32)).max(1) < _SAME_PLACE
    return tuple((shown.row + np.flatnonzero(is_near.reshape(-1, 4).any(1))).tolist())


Labels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _labels(picture: Picture | None, grid: tuple[int, int, int], patch: int) -> Labels:
    """Names, colours, boxes and places per patch, counts per token; see `Shown`."""
    t, h, w = grid
    num, is_known = t * h * w, picture is not None and bool(picture.things)
    names = np.full(num, 0 if is_known else -1, np.int64)
    colours, boxes = names.copy(), np.full((num, 4), np.nan, np.float32)
    counts = np.full(max(1, t // 2) * h * w // 4, 0 if is_known else -1, np.int64)
    places = boxes.copy()
    if picture is None or not is_known:
        return names, colours, boxes, places, counts
    scale = np.array([w * patch / picture.image.width, h * patch / picture.image.height] * 2)
    centres = patch_places(h, w)[:, ::-1] * patch + patch / 2
    for thing in sorted(picture.things, key=lambda thing: -(thing.box[2] - thing.box[0])):
        box = np.array(thing.box) * scale
        middle = (box[:2] + box[2:]) / 2
        nearest = np.abs(centres - middle).max(1)
        inside = ((centres >= box[:2]) & (centres <= box[2:])).all(1) | (nearest == nearest.min())
        names[inside] = NAMES[thing.name]
        colours[inside] = COLOUR_IDS.get(thing.colour, -1)
        boxes[inside] = (box - np.tile(centres[inside], (1, 2))) / 64
        places[inside] = box / (np.array([w, h] * 2) * patch)
        if thing.name in SHAPES:
            counts[int(np.argmin(nearest)) // 4] += 1
    return names, colours, boxes, places, counts.clip(max=NUM_LABELS[2] - 1)
