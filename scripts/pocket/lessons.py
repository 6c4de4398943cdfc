"""What the model is taught: groups of samples that begin alike, drawn from a mixture of skills.

Seeds stay below `catalog.HELD_OUT`, from which evaluation draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ernie_cluster.skills import catalog, looking, moving, reading, talking, tools
from ernie_cluster.skills.catalog import sample
from ernie_cluster.skills.looking import Question
from ernie_cluster.skills.sample import Language, Sample

Group = list[Sample]

_SYSTEM = ("You are a helpful assistant.", "You are ERNIE.", "Answer shortly.", "你是一个有用的助手。")


def draw_group(seed: int, ease: float = 0.0) -> Group:
    """A few samples with a common beginning; the same for the same arguments.

    Args:
        seed: below `catalog.HELD_OUT`.
        ease: share of lessons with one or two things to see, or one or two digits to read. What colour the circle is
            can be learned once "what colour is it" is known, and hardly before.
    """
    assert 0 <= seed < catalog.HELD_OUT, f"seed {seed} is for evaluation"
    rng = random.Random(f"lesson:{seed}")
    is_easy = rng.random() < ease
    shares = {name: share for name, (share, _) in _MIXTURE.items() if ease < _LATE_EASE or name not in _LATE}
    group = rng.choices(list(shares), list(shares.values()))[0]
    samples = _EASY[group](rng) if is_easy and group in _EASY else _MIXTURE[group][1](rng)
    if rng.random() < 0.05:
        system = {"role": "system", "content": rng.choice(_SYSTEM)}
        samples = [replace(s, messages=(system, *s.messages)) for s in samples]
    if rng.random() < 0.05:
        samples = [_picture_last(s) for s in samples[:2]]
    return samples


def _language(rng: random.Random) -> Language:
    return "zh" if rng.random() < 0.25 else "en"


def _scene(rng: random.Random) -> Group:
    return _ask_about_scene(rng, rng.randint(1, 9) if rng.random() < 0.55 else rng.randint(1, 4))


def _easy_scene(rng: random.Random) -> Group:
    return _ask_about_scene(rng, rng.choice((1, 1, 2)))


def _ask_about_scene(rng: random.Random, count: int) -> Group:
    picture = looking.random_scene(rng, count)
    wanted = ["count", "ground", rng.choice(("colour", "shape")), rng.choice(("count", "ground"))]
    if count <= 4:
        wanted += ["colour", "shape", "describe"]
    group: Group = []
    for skill in wanted:
        language: Language = "en" if skill == "ground" else _language(rng)
        question = looking.ASK[skill](rng, picture, language)
        if question is not None:
            new = sample(rng, skill, language, [picture], question, thinking_share=0.12)
            group.append(_after(rng, group, new))
    return group


def _after(rng: random.Random, group: Group, new: Sample) -> Sample:
    """At times the second question of a conversation about the same picture."""
    earlier = [s for s in group if len(s.messages) == 1]
    if not earlier or rng.random() > 0.12:
        return new
    first = rng.choice(earlier)
    question = new.messages[0]["content"][-1]["text"]
    talk = (*first.messages, {"role": "assistant", "content": first.answer}, {"role": "user", "content": question})
    return replace(new, messages=talk)


def _read(rng: random.Random) -> Group:
    is_number = rng.random() < 0.6
    return _ask_about_text(rng, reading.random_number(rng) if is_number else reading.random_word(rng))


def _easy_read(rng: random.Random) -> Group:
    return _ask_about_text(rng, str(rng.randint(0, rng.choice((9, 9, 99)))))


def _ask_about_text(rng: random.Random, text: str) -> Group:
    is_number = text.isdigit()
    picture = reading.write(rng, text)
    ask = reading.ask_number if is_number else reading.ask_word
    group: Group = []
    for language in ("en", "zh"):
        group.append(sample(rng, "read", language, [picture], ask(rng, text, language)))  # type: ignore[arg-type]
    if rng.random() < 0.4:
        language = _language(rng)
        group.append(sample(rng, "describe", language, [picture], reading.describe_writing(rng, text, language)))
    return group


def _sum(rng: random.Random) -> Group:
    has_steps = rng.random() < 0.35
    total = reading.easy_sum(rng, has_steps=has_steps)
    picture = reading.write(rng, reading.drawn_form(rng, total.text))
    group = []
    for language, share in (("en", 1.0), (_language(rng), 1.0 if has_steps else 0.0)):
        question = reading.ask_sum(rng, total, language)  # type: ignore[arg-type]
        group.append(sample(rng, "arithmetic", language, [picture], question, thinking_share=share))  # type: ignore[arg-type]
    return group


def _typed_sum(rng: random.Random) -> Group:
    group = []
    for _ in range(5):
        has_steps = rng.random() < 0.35
        language = _language(rng)
        question = reading.ask_typed_sum(rng, reading.easy_sum(rng, has_steps=has_steps), language)
        group.append(sample(rng, "arithmetic", language, [], question, thinking_share=1.0 if has_steps else 0.0))
    return group


def _compare(rng: random.Random) -> Group:
    pictures, question = looking.compare(rng)
    return [sample(rng, "compare", "en", pictures, question)]


def _motion(rng: random.Random) -> Group:
    clip, question = (moving.film_motion if rng.random() < 0.55 else moving.film_colours)(rng)
    return [sample(rng, "motion", "en", [clip], question)]


def _typed_tool(rng: random.Random) -> Group:
    """Several requests to one list of tools; some need none of them."""
    offered = [t for t in (tools.CALCULATOR, tools.WEATHER, tools.ZOOM) if rng.random() < 0.5] or [tools.CALCULATOR]
    rng.shuffle(offered)
    group: Group = []
    for _ in range(4):
        kind = rng.random()
        if tools.CALCULATOR in offered and kind < 0.55:
            question, call = tools.ask_hard_sum(rng, tools.hard_sum(rng), is_drawn=False)
        elif tools.WEATHER in offered and kind < 0.75:
            question, call = tools.ask_weather(rng)
        elif kind < 0.88:
            question = reading.ask_typed_sum(rng, reading.easy_sum(rng, has_steps=False), "en")
            group.append(sample(rng, "tool", "en", [], question, offered=offered, thinking_share=0.0))
            continue
        else:
            text, answer = talking.talk(rng, _language(rng))
            group.append(sample(rng, "talk", "en", [], Question(text, answer, ""), offered=offered, thinking_share=0.0))
            continue
        new = sample(rng, "tool", "en", [], question, offered=offered, call=call)
        group += [new, *_called(rng, new)][: 1 if rng.random() < 0.6 else 2]
    return group


def _called(rng: random.Random, asking: Sample) -> Group:
    """The turn after the right call."""
    assert asking.tool_call is not None
    later = tools.next_turn(asking, [asking.tool_call], reasoning=asking.reasoning if rng.random() < 0.5 else "")
    assert later is not None, asking.tool_call
    return [later]


def _drawn_tool(rng: random.Random) -> Group:
    total = tools.hard_sum(rng)
    question, call = tools.ask_hard_sum(rng, total, is_drawn=True)
    picture = reading.write(rng, reading.drawn_form(rng, total.text))
    new = sample(rng, "tool", "en", [picture], question, offered=catalog.offer(rng, tools.CALCULATOR), call=call)
    return [new, *_called(rng, new)]


def _look_with_tools(rng: random.Random) -> Group:
    """Plain questions while tools are on offer."""
    offered = catalog.offer(rng, rng.choice((tools.CALCULATOR, tools.WEATHER, tools.ZOOM)))
    return [replace(s, tools=tuple(offered)) for s in rng.choice((_scene, _read))(rng)[:4]]


_MISSED = 0.07
"""By how much the region that was zoomed into may lie beside the sign: the model does not hit its middle either."""


def _zoom(rng: random.Random) -> Group:
    picture, question = reading.draw_sign(rng, str(rng.randint(10, 9999)))
    assert question.target is not None
    offered = catalog.offer(rng, tools.ZOOM)
    new = sample(rng, "zoom", "en", [picture], question, offered=offered, call=tools.zoom_call(question.target))
    shift = rng.uniform(-_MISSED, _MISSED), rng.uniform(-_MISSED, _MISSED)
    missed = replace(new, tool_call=tools.zoom_call(question.target, shift))
    return [new, *_called(rng, missed)]


def _zoom_blind(rng: random.Random) -> Group:
    return [catalog.draw("zoom_blind", rng.randrange(catalog.HELD_OUT))]


def _talk(rng: random.Random) -> Group:
    group = []
    for _ in range(5):
        language = _language(rng)
        text, answer = talking.talk(rng, language)
        group.append(sample(rng, "talk", language, [], Question(text, answer, ""), thinking_share=0.1))
    return group


_MIXTURE: Mapping[str, tuple[float, Callable[[random.Random], Group]]] = {
    "scene": (0.36, _scene),
    "read": (0.18, _read),
    "sum": (0.10, _sum),
    "typed_sum": (0.07, _typed_sum),
    "compare": (0.07, _compare),
    "motion": (0.06, _motion),
    "typed_tool": (0.03, _typed_tool),
    "drawn_tool": (0.03, _drawn_tool),
    "look_with_tools": (0.01, _look_with_tools),
    "zoom": (0.1, _zoom),
    "zoom_blind": (0.01, _zoom_blind),
    "talk": (0.01, _talk),
}
"""Name -> share of the groups, and how one is drawn."""

_LATE = {"typed_tool", "drawn_tool", "look_with_tools", "zoom", "zoom_blind"}
_LATE_EASE = 0.65
"""Long prompts, a third of all tokens, which teach little before the pictures are seen: not while lessons are easy."""

_EASY: Mapping[str, Callable[[random.Random], Group]] = {"scene": _easy_scene, "read": _easy_read}


def _picture_last(s: Sample) -> Sample:
    """The same with the question before what is shown."""

    def turned(message: Mapping[str, Any]) -> Mapping[str, Any]:
        parts = message.get("content")
        if message["role"] != "user" or not isinstance(parts, list):
            return message
        return {**message, "content": [parts[-1], *parts[:-1]]}

    return replace(s, messages=tuple(turned(m) for m in s.messages))
