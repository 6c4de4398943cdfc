"""Pictures with writing in them: numbers, words, sums, and signs too small to read."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from ernie_cluster.skills import phrases
from ernie_cluster.skills.glyphs import draw_text
from ernie_cluster.skills.looking import Question, fractions
from ernie_cluster.skills.paint import grainy, worn
from ernie_cluster.skills.sample import Box, Language, Picture, Thing
from ernie_cluster.skills.scene import Backdrop, backdrop, canvas_size, draw_scene, place, random_kinds
from ernie_cluster.skills.words import COLOURS, WORDS, spoken

_CONTRAST = 260.0
"""Least `distance` of writing from its background: thin lines need more than shapes."""


def random_number(rng: random.Random) -> str:
    """1 to 4 digits, no leading zero but in "0"."""
    digits = rng.randint(1, 4)
    return str(rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))


def random_word(rng: random.Random) -> str:
    return rng.choice((str.lower, str.upper, str.title))(rng.choice(WORDS))


def write(rng: random.Random, text: str) -> Picture:
    """The text on a backdrop, its digits and capitals at least 14 pixels high."""
    size = canvas_size(rng)
    drop = backdrop(rng, size)
    image = drop.image
    widest = 0.9 * size[0]
    height = rng.uniform(15, max(18.0, min(70.0, 0.5 * size[1], 1.6 * widest / len(text))))
    colours = [c for c in COLOURS if drop.is_seen(c, _CONTRAST)]
    colour = COLOURS[rng.choice(colours)][0]
    room_x = max(0.0, size[0] - 0.75 * height * len(text)) / 2.4
    room_y = max(0.0, size[1] - 2 * height) / 2.4
    centre = (size[0] / 2 + rng.uniform(-room_x, room_x), size[1] / 2 + rng.uniform(-room_y, room_y))
    reach = 2 * min(centre[0], size[0] - centre[0]) - 6
    things = draw_text(rng, image, text, colour, centre, height, max_width=min(widest, reach))
    return Picture(worn(rng, image), things)


def ask_number(rng: random.Random, number: str, language: Language) -> Question:
    text = spoken(rng, rng.choice(phrases.READ_NUMBER[language]), language)
    return Question(text, number, f"The digits are {number}." if language == "en" else f"数字是{number}。")


def ask_word(rng: random.Random, word: str, language: Language) -> Question:
    text = spoken(rng, rng.choice(phrases.READ_WORD[language]), language)
    return Question(text, word, f"The letters are {word}." if language == "en" else f"字母是{word}。")


def describe_writing(rng: random.Random, written: str, language: Language) -> Question:
    """What a picture of a number or word shows."""
    text = spoken(rng, rng.choice(phrases.DESCRIBE[language]), language)
    if language == "en":
        kind = "number" if written.isdigit() else "word"
        return Question(text, f"The {kind} {written}.", f"I see a {kind}.")
    kind = "数字" if written.isdigit() else "单词"
    return Question(text, f"{kind}{written}。", f"我看到{kind}。")


@dataclass(frozen=True, slots=True)
class Sum:
    """Two numbers and what is done with them."""

    left: int
    sign: str
    """ "+", "-" or "×"."""
    right: int

    @property
    def text(self) -> str:
        return f"{self.left}{self.sign}{self.right}"

    @property
    def result(self) -> int:
        return {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "×": self.left * self.right,
        }[self.sign]

    @property
    def steps(self) -> str:
        """The way to the result, tens first: 27+45 gives "20+40=60, 7+5=12, 60+12=72"."""
        a, b, one = self.left, self.right, f"{self.text}={self.result}"
        if max(a, b) < 10 or (self.sign == "×" and a < 10) or (self.sign == "-" and b < 10):
            return one
        if self.sign == "+":
            tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
            return f"{a // 10 * 10}+{b // 10 * 10}={tens}, {a % 10}+{b % 10}={ones}, {tens}+{ones}={self.result}"
        if self.sign == "-":
            rest = a - b // 10 * 10
            return f"{a}-{b // 10 * 10}={rest}, {rest}-{b % 10}={self.result}"
        tens, ones = a // 10 * 10 * b, a % 10 * b
        return f"{a // 10 * 10}×{b}={tens}, {a % 10}×{b}={ones}, {tens}+{ones}={self.result}"


def easy_sum(rng: random.Random, *, has_steps: bool) -> Sum:
    """One to be done in the head: up to 20 for + and -, up to 9 for ×; with steps up to 99."""
    sign = rng.choice("+-×")
    if sign == "×":
        return Sum(rng.randint(11, 19) if has_steps and rng.random() < 0.5 else rng.randint(1, 9), sign, rng.randint(1, 9))  # fmt: skip
    most = rng.choice((9, 20)) if not has_steps else rng.choice((20, 99))
    a, b = rng.randint(0, most), rng.randint(0, most)
    return Sum(max(a, b), sign, min(a, b)) if sign == "-" else Sum(a, sign, b)


def drawn_form(rng: random.Random, text: str) -> str:
    """A sum as it stands in a picture: close or spaced, with or without "="."""
    spaced = "".join(f" {c} " if c in "+-×" else c for c in text)
    return rng.choice((text, text, spaced, text + "=", spaced + " ="))


def ask_sum(rng: random.Random, total: Sum, language: Language) -> Question:
    """About a sum that is drawn."""
    text = spoken(rng, rng.choice(phrases.SUM_DRAWN[language]), language)
    return Question(text, str(total.result), total.steps + ".")


def typed_form(rng: random.Random, text: str) -> str:
    """A sum as it is typed."""
    times = rng.choice("×*x*")
    return "".join(rng.choice((c, f" {c} ")) if c in "+-" else f"{times}" if c == "×" else c for c in text)


def ask_typed_sum(rng: random.Random, total: Sum, language: Language) -> Question:
    """About a sum in the question itself."""
    text = rng.choice(phrases.SUM_TYPED[language]).format(sum=typed_form(rng, total.text))
    return Question(text if text[0].isdigit() else spoken(rng, text, language), str(total.result), total.steps + ".")


def draw_sign(rng: random.Random, number: str) -> tuple[Picture, Question]:
    """A large picture with a number on it, whose digits are a few pixels high once the whole is shrunk."""
    size = (rng.randint(560, 720), rng.randint(560, 720))
    drop = backdrop(rng, size)
    kinds = random_kinds(rng, drop, rng.randint(1, 3))
    boxes = place(rng, size, len(kinds) + 1, 100, 230)
    picture = draw_scene(rng, drop, kinds, boxes[1:], is_worn=False)
    x0, y0, x1, y1 = boxes[0]
    height = rng.uniform(27.0, 31.0) * max(size) / 640
    width, tall = sign_size(rng, number, height)
    left = min(max(rng.uniform(x0, max(x1 - width, x0 + 1)), 2.0), size[0] - width - 2)
    top = rng.uniform(y0, y1 - tall)
    sign = draw_number(rng, picture.image, drop, number, (left, top, left + width, top + tall), height)
    image = grainy(rng, picture.image, rng.uniform(1, 5)) if rng.random() < 0.3 else picture.image
    picture = Picture(image, (*picture.things, sign))
    text = spoken(rng, rng.choice(phrases.SIGN["en"]), "en")
    reasoning = "The sign is too small to read. I zoom in."
    return picture, Question(text, number, reasoning, fractions(sign.box, picture))


def sign_size(rng: random.Random, number: str, height: float) -> tuple[float, float]:
    """Width and height of what a number with digits of that height takes."""
    return len(number) * height * 0.75 + height * rng.uniform(1.0, 1.6), height * rng.uniform(1.6, 2.0)


def draw_number(rng: random.Random, image: Image.Image, drop: Backdrop, number: str, box: Box, height: float) -> Thing:
    """The number within a box, as one thing."""
    name = rng.choice([c for c in COLOURS if drop.is_seen(c, _CONTRAST)])
    centre, width = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), 0.85 * (box[2] - box[0])
    draw_text(rng, image, number, COLOURS[name][0], centre, height, max_width=width, is_upright=True)
    return Thing("sign", name, box)
