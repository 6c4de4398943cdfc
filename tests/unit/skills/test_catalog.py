"""Laws of the questions: same seed, same question; the right answer is judged right, and can be carried to the end."""

from __future__ import annotations

import pytest

from ernie_cluster.skills.catalog import CHINESE_SKILLS, HELD_OUT, SKILLS, draw
from ernie_cluster.skills.judge import judge
from ernie_cluster.skills.sample import Language, Sample
from ernie_cluster.skills.tools import next_turn

POSED: list[tuple[str, Language]] = [(s, "en") for s in SKILLS] + [(s, "zh") for s in CHINESE_SKILLS]
SEEDS = range(HELD_OUT, HELD_OUT + 12)


def samples(skill: str, language: Language) -> list[Sample]:
    return [draw(skill, seed, language) for seed in SEEDS]


@pytest.mark.parametrize(("skill", "language"), POSED)
def test_the_same_seed_poses_the_same_question(skill: str, language: Language) -> None:
    first, second = draw(skill, 7, language), draw(skill, 7, language)
    assert first.wire_messages() == second.wire_messages()
    assert (first.answer, first.tool_call, first.reasoning) == (second.answer, second.tool_call, second.reasoning)


@pytest.mark.parametrize(("skill", "language"), POSED)
def test_seeds_pose_different_questions(skill: str, language: Language) -> None:
    assert len({str(sample.wire_messages()) for sample in samples(skill, language)}) > 8


@pytest.mark.parametrize(("skill", "language"), POSED)
def test_the_right_reply_is_judged_right_at_every_turn(skill: str, language: Language) -> None:
    for sample in samples(skill, language):
        if sample.tool_call is not None:
            assert judge(sample, "", [sample.tool_call])
            assert not judge(sample, sample.answer)
            following = next_turn(sample, [sample.tool_call])
            assert following is not None
            sample = following
        assert judge(sample, sample.answer)
        assert not judge(sample, "something else")


@pytest.mark.parametrize(("skill", "language"), POSED)
def test_things_lie_within_their_picture(skill: str, language: Language) -> None:
    for sample in samples(skill, language):
        for picture in sample.pictures:
            width, height = picture.image.size
            for thing in picture.things:
                x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
                assert 0 <= x <= width, thing
                assert 0 <= y <= height, thing


def test_pictures_and_videos_travel_as_data_urls() -> None:
    kinds = set()
    for skill in ("colour", "motion"):
        for part in draw(skill, 1).wire_messages()[0]["content"]:
            if part["type"] != "text":
                kinds.add(part[part["type"]]["url"].partition(",")[0])
    assert kinds == {"data:image/png;base64", "data:video/jpeg;base64"}


@pytest.mark.parametrize(("skill", "language"), [("juggling", "en"), ("motion", "zh")])
def test_unknown_skills_are_refused_by_name(skill: str, language: Language) -> None:
    with pytest.raises(ValueError, match=f"no skill '{skill}' in '{language}'"):
        draw(skill, 0, language)
