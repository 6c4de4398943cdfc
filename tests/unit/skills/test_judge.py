"""What counts as a right answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ernie_cluster.skills.judge import iou, judge, read_box
from ernie_cluster.skills.sample import Sample, ToolCall, user

ASKED = Sample("colour", "en", (user("What colour is it?"),), "grey")


@pytest.mark.parametrize("text", ["grey", "Grey.", " gray\n", "GRAY!"])
def test_spelling_and_marks_do_not_matter(text: str) -> None:
    assert judge(ASKED, text)


@pytest.mark.parametrize("text", ["", "green", "grey or green", "not grey"])
def test_other_words_do(text: str) -> None:
    assert not judge(ASKED, text)


def test_an_uncalled_for_call_is_wrong() -> None:
    assert not judge(ASKED, "grey", [ToolCall("calculator", {"expression": "1+1"})])


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("A blue square and a red circle.", True),
        ("a red circle, a blue square", True),
        ("A red circle.", False),
        ("A red circle and a blue ring.", False),
    ],
)
def test_descriptions_may_come_in_any_order(text: str, is_right: bool) -> None:
    assert judge(replace(ASKED, skill="describe", answer="A red circle and a blue square."), text) == is_right


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ('{"bbox_2d":[100,200,300,400],"label":"ring"}', True),
        ('It is here: {"bbox_2d": [110, 205, 300, 400]}', True),
        ('{"bbox_2d":[500,200,700,400],"label":"ring"}', False),
        ('{"bbox_2d":[100,200,300],"label":"ring"}', False),
        ("[100,200,300,400]", False),
    ],
)
def test_a_box_must_overlap_by_half(text: str, is_right: bool) -> None:
    assert judge(replace(ASKED, skill="ground", target=(0.1, 0.2, 0.3, 0.4)), text) == is_right


def test_overlap_is_intersection_over_union() -> None:
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((1, 1, 0, 0), (1, 1, 0, 0)) == 0
    assert read_box('{"bbox_2d":[0,250,500,1000]}') == (0, 0.25, 0.5, 1)


@pytest.mark.parametrize(
    ("expression", "is_right"), [("12*34", True), ("12 * 34", True), ("34*12", True), ("12+34", False), ("12*", False)]
)
def test_an_expression_must_have_the_right_value(expression: str, is_right: bool) -> None:
    sample = replace(ASKED, skill="tool", tool_call=ToolCall("calculator", {"expression": "12*34"}))
    assert judge(sample, "", [ToolCall("calculator", {"expression": expression})]) == is_right
    assert not judge(sample, "", [ToolCall("abacus", {"expression": expression})])
    assert not judge(sample, "", [ToolCall("calculator", {})])


@pytest.mark.parametrize(
    ("bbox", "is_right"),
    [([390, 390, 510, 460], True), ([0, 0, 1000, 1000], False), ([390, 390, 440, 460], False), ([1], False)],
)
def test_a_zoom_must_show_the_sign_and_little_else(bbox: list[int], is_right: bool) -> None:
    sample = replace(ASKED, target=(0.4, 0.4, 0.5, 0.45), tool_call=ToolCall("image_zoom_in_tool", {}))
    assert judge(sample, "", [ToolCall("image_zoom_in_tool", {"bbox_2d": bbox})]) == is_right
