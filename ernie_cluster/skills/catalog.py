"""All skills by name: `draw` poses one question, the same for the same skill, seed and language.

Seeds from `HELD_OUT` on are for evaluation; training stays below.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from ernie_cluster.skills import looking, moving, reading, talking, tools
from ernie_cluster.skills.looking import Question
from ernie_cluster.skills.sample import Clip, Language, Picture, Sample, ToolCall, user

HELD_OUT = 1 << 40
"""The first seed of evaluation."""

THINKING_SHARE = 0.15
"""Of the samples ask for reasoning, in skills where it is not the point."""


def sample(
    rng: random.Random,
    skill: str,
    language: Language,
    shown: Sequence[Picture | Clip],
    question: Question,
    *,
    offered: Sequence[tools.Tool] = (),
    call: ToolCall | None = None,
    thinking_share: float = THINKING_SHARE,
) -> Sample:
    """A one-turn conversation: what is shown, then the question; at times with the wish to think first."""
    is_thinking = rng.random() < thinking_share
    return Sample(
        skill=skill,
        language=language,
        messages=(user(*shown, question.text),),
        answer=question.answer,
        tools=tuple(offered),
        tool_call=call,
        enable_thinking=is_thinking,
        reasoning=question.reasoning if is_thinking else "",
        target=question.target,
    )


def _look(skill: str) -> Callable[[random.Random, Language], Sample]:
    def draw_one(rng: random.Random, language: Language) -> Sample:
        while True:
            picture = looking.look(rng, skill)
            question = looking.ASK[skill](rng, picture, language)
            if question is not None:
                return sample(rng, skill, language, [picture], question)

    return draw_one


def _read(rng: random.Random, language: Language) -> Sample:
    if rng.random() < 0.65:
        number = reading.random_number(rng)
        return sample(rng, "read", language, [reading.write(rng, number)], reading.ask_number(rng, number, language))
    word = reading.random_word(rng)
    return sample(rng, "read", language, [reading.write(rng, word)], reading.ask_word(rng, word, language))


def _arithmetic(rng: random.Random, language: Language) -> Sample:
    is_thinking = rng.random() < 0.4
    total = reading.easy_sum(rng, has_steps=is_thinking)
    share = 1.0 if is_thinking else 0.0
    if rng.random() < 0.25:
        return sample(
            rng, "arithmetic", language, [], reading.ask_typed_sum(rng, total, language), thinking_share=share
        )
    picture = reading.write(rng, reading.drawn_form(rng, total.text))
    return sample(rng, "arithmetic", language, [picture], reading.ask_sum(rng, total, language), thinking_share=share)


def _compare(rng: random.Random, language: Language) -> Sample:
    pictures, question = looking.compare(rng)
    return sample(rng, "compare", language, pictures, question)


def _motion(rng: random.Random, language: Language) -> Sample:
    clip, question = (moving.film_motion if rng.random() < 0.55 else moving.film_colours)(rng)
    return sample(rng, "motion", language, [clip], question)


def offer(rng: random.Random, *needed: tools.Tool) -> list[tools.Tool]:
    """The tools needed among others."""
    others = [t for t in (tools.CALCULATOR, tools.ZOOM, tools.WEATHER) if t not in needed and rng.random() < 0.25]
    offered = [*needed, *others]
    rng.shuffle(offered)
    return offered


def _tool(rng: random.Random, language: Language) -> Sample:
    kind = rng.random()
    if kind < 0.45:
        total = tools.hard_sum(rng)
        question, call = tools.ask_hard_sum(rng, total, is_drawn=False)
        return sample(rng, "tool", "en", [], question, offered=offer(rng, tools.CALCULATOR), call=call)
    if kind < 0.65:
        total = tools.hard_sum(rng)
        question, call = tools.ask_hard_sum(rng, total, is_drawn=True)
        picture = reading.write(rng, reading.drawn_form(rng, total.text))
        return sample(rng, "tool", "en", [picture], question, offered=offer(rng, tools.CALCULATOR), call=call)
    if kind < 0.8:
        question, call = tools.ask_weather(rng)
        return sample(rng, "tool", "en", [], question, offered=offer(rng, tools.WEATHER), call=call)
    offered = offer(rng, rng.choice((tools.CALCULATOR, tools.WEATHER)))  # and not needed
    if kind < 0.87:
        question = reading.ask_typed_sum(rng, reading.easy_sum(rng, has_steps=False), "en")
        return sample(rng, "tool", "en", [], question, offered=offered, thinking_share=0.0)
    if kind < 0.93:
        text, answer = talking.talk(rng, "en")
        return sample(rng, "tool", "en", [], Question(text, answer, ""), offered=offered, thinking_share=0.0)
    picture = looking.look(rng, "describe")
    described = looking.ask_describe(rng, picture, "en")
    assert described is not None
    return sample(rng, "describe", "en", [picture], described, offered=offered)


def _zoom(rng: random.Random, language: Language) -> Sample:
    number = str(rng.randint(10, 9999))
    picture, question = reading.draw_sign(rng, number)
    assert question.target is not None
    call = tools.zoom_call(question.target)
    return sample(rng, "zoom", "en", [picture], question, offered=offer(rng, tools.ZOOM), call=call)


def _zoom_blind(rng: random.Random, language: Language) -> Sample:
    picture, question = reading.draw_sign(rng, str(rng.randint(10, 9999)))
    question = Question(question.text, question.answer, "The sign is very small. I guess.")
    return sample(rng, "zoom_blind", "en", [picture], question)


def _talk(rng: random.Random, language: Language) -> Sample:
    text, answer = talking.talk(rng, language)
    return sample(rng, "talk", language, [], Question(text, answer, ""), thinking_share=0.0)


_DRAW: Mapping[str, Callable[[random.Random, Language], Sample]] = {
    "colour": _look("colour"),
    "shape": _look("shape"),
    "count": _look("count"),
    "describe": _look("describe"),
    "ground": _look("ground"),
    "compare": _compare,
    "read": _read,
    "arithmetic": _arithmetic,
    "motion": _motion,
    "tool": _tool,
    "zoom": _zoom,
    "zoom_blind": _zoom_blind,
    "talk": _talk,
}

SKILLS: tuple[str, ...] = tuple(_DRAW)
"""Names; "zoom_blind" is "zoom" without its tool, on which a model can only guess."""

CHINESE_SKILLS: tuple[str, ...] = ("colour", "shape", "count", "describe", "read", "arithmetic", "talk")
"""Skills that are also posed in Chinese."""


def draw(skill: str, seed: int, language: Language = "en") -> Sample:
    """One question of a skill.

    Args:
        skill: one of `SKILLS`.
        seed: the same one gives the same question.
        language: "zh" for `CHINESE_SKILLS` only.

    Raises:
        ValueError: no such skill in that language.
    """
    if skill not in _DRAW or (language != "en" and skill not in CHINESE_SKILLS):
        raise ValueError(f"no skill {skill!r} in {language!r}; known: {', '.join(SKILLS)}, in Chinese {', '.join(CHINESE_SKILLS)}")  # fmt: skip
    return _DRAW[skill](random.Random(f"{skill}:{language}:{seed}"), language)
