"""Phrasings of the questions; `{...}` are filled in by the skill that asks."""

from __future__ import annotations

from collections.abc import Mapping

from ernie_cluster.skills.sample import Language

Phrasings = Mapping[Language, tuple[str, ...]]

COLOUR: Phrasings = {
    "en": (
        "What colour is the {shape}?",
        "What color is the {shape}?",
        "Which colour does the {shape} have?",
        "Tell me the color of the {shape}.",
        "The {shape}: what colour is it?",
        "Name the colour of the {shape}.",
        "What is the colour of the {shape}?",
        "Can you tell what color the {shape} is?",
        "What is the color of the {shape} in the picture?",
        "The {shape} in this picture is what color?",
    ),
    "zh": (
        "{shape}是什么颜色？",
        "图中的{shape}是什么颜色的？",
        "请问{shape}的颜色是什么？",
        "这个{shape}是哪种颜色？",
        "{shape}的颜色？",
        "图片里{shape}是什么颜色？",
        "说出{shape}的颜色。",
        "告诉我{shape}是什么颜色。",
    ),
}
COLOUR_OF_ALL: Phrasings = {
    "en": (
        "What colour is it?",
        "What color is this?",
        "Which colour is this shape?",
        "What colour is the object?",
        "What color do you see?",
        "Name the color.",
        "What is the color of the object?",
        "Tell me the colour.",
    ),
    "zh": ("这是什么颜色？", "图中的物体是什么颜色？", "你看到什么颜色？", "它是什么颜色的？"),
}
SHAPE: Phrasings = {
    "en": (
        "What shape is {colour}?",
        "Which shape is {colour}?",
        "What is the shape of the {colour} object?",
        "Name the shape of the {colour} thing.",
        "The {colour} object: what shape is it?",
        "What shape does the {colour} one have?",
        "What {colour} shape is in the picture?",
        "Tell me the shape of the {colour} figure.",
        "What is the {colour} thing?",
        "Which shape do you see in {colour}?",
    ),
    "zh": (
        "{colour}的是什么形状？",
        "哪个形状是{colour}的？",
        "图中{colour}的物体是什么形状？",
        "{colour}的图形是什么？",
        "请问{colour}的东西是什么形状？",
        "{colour}的形状是什么？",
        "说出{colour}物体的形状。",
        "图片里{colour}的是什么？",
    ),
}
SHAPE_OF_ALL: Phrasings = {
    "en": (
        "What shape is it?",
        "What shape is this?",
        "Which shape do you see?",
        "What is the shape of the object?",
        "Name the shape.",
        "What is this shape called?",
        "Tell me the shape.",
        "What kind of shape is in the picture?",
    ),
    "zh": ("这是什么形状？", "图中是什么形状？", "你看到什么形状？", "它是什么形状的？"),
}
COUNT: Phrasings = {
    "en": (
        "How many {things} are there?",
        "How many {things} do you see?",
        "Count the {things}.",
        "How many {things} are in the picture?",
        "What is the number of {things}?",
        "Tell me how many {things} there are.",
        "Number of {things}?",
        "How many {things} can you count?",
        "How many {things}?",
        "Please count the {things} in this image.",
    ),
    "zh": (
        "有几个{things}？",
        "图中有几个{things}？",
        "图片里一共有多少个{things}？",
        "请数一数有几个{things}。",
        "{things}有多少个？",
        "{things}的数量是多少？",
        "你看到几个{things}？",
        "数一下{things}。",
    ),
}
DESCRIBE: Phrasings = {
    "en": (
        "Describe the picture.",
        "What do you see?",
        "What is in this picture?",
        "Describe this image.",
        "What is shown here?",
        "Please describe what you see.",
        "What's in the image?",
        "Tell me what is in the picture.",
        "What is this?",
        "Explain the image.",
    ),
    "zh": ("描述这张图片。", "图里有什么？", "你看到了什么？", "请描述图片。", "这是什么？", "图片里有什么东西？"),
}
GROUND: Phrasings = {
    "en": (
        "Where is the {thing}?",
        "Find the {thing}.",
        "Locate the {thing} in the picture.",
        "Give the bounding box of the {thing}.",
        "Where in the picture is the {thing}? Answer with a box.",
        "Return the bbox of the {thing}.",
        "Draw a box around the {thing}.",
        "Show me where the {thing} is.",
        "Bounding box of the {thing}?",
        "Point out the {thing}.",
    ),
}
COMPARE: Mapping[str, tuple[str, ...]] = {
    "larger": (
        "Which picture shows the larger {shape}?",
        "In which picture is the {shape} larger?",
        "Which picture has the bigger {shape}?",
        "Where is the {shape} bigger?",
        "Compare the two: which {shape} is larger?",
        "Which of the pictures contains the largest {shape}?",
        "The larger {shape} is in which picture?",
        "In which image is the {shape} bigger?",
    ),
    "more": (
        "Which picture shows more objects?",
        "Which picture has more things?",
        "In which picture are there more shapes?",
        "Which one has more objects?",
        "Where do you see more shapes?",
        "Compare the two: which has more objects?",
        "Which image contains more objects?",
        "More objects are in which picture?",
    ),
    "with": (
        "Which picture has the {shape}?",
        "Which picture shows a {shape}?",
        "In which picture is the {shape}?",
        "Where is the {shape}, in picture 1 or 2?",
        "Which image contains the {shape}?",
        "The {shape} is in which picture?",
        "Which of the two has a {shape}?",
        "In which one do you see a {shape}?",
    ),
}
READ_NUMBER: Phrasings = {
    "en": (
        "What number is this?",
        "Which number do you see?",
        "Read the number.",
        "What number is in the picture?",
        "What is the number?",
        "Tell me the number shown.",
        "Please read the number in the image.",
        "What number is written here?",
        "What does it say?",
        "Read it.",
    ),
    "zh": (
        "这是什么数字？",
        "图中的数字是多少？",
        "请读出数字。",
        "图片里写的是什么数字？",
        "数字是多少？",
        "你看到什么数字？",
        "上面写着什么？",
        "读出来。",
    ),
}
READ_WORD: Phrasings = {
    "en": (
        "What word is this?",
        "Which word do you see?",
        "Read the word.",
        "What word is in the picture?",
        "What is written here?",
        "Tell me the word shown.",
        "Please read the text in the image.",
        "What does the sign say?",
        "What does it say?",
        "Read it.",
    ),
    "zh": (
        "这是什么单词？",
        "图中的单词是什么？",
        "请读出单词。",
        "图片里写的是什么？",
        "你看到什么单词？",
        "上面写着什么？",
        "读出来。",
        "这里写的什么字？",
    ),
}
SUM_DRAWN: Phrasings = {
    "en": (
        "What is the result?",
        "Solve it.",
        "Calculate this.",
        "How much is it?",
        "What does this come to?",
        "Work out the sum in the picture.",
        "Please compute what is written.",
        "What is the answer?",
        "Solve the problem in the image.",
        "What does it equal?",
    ),
    "zh": (
        "结果是多少？",
        "等于多少？",
        "请计算。",
        "算一算。",
        "图中的算式等于几？",
        "答案是什么？",
        "请算出图片里的算式。",
        "计算结果是什么？",
    ),
}
SUM_TYPED: Phrasings = {
    "en": (
        "What is {sum}?",
        "How much is {sum}?",
        "Calculate {sum}.",
        "{sum}=?",
        "{sum}",
        "Compute {sum}.",
        "Please work out {sum}.",
        "Solve {sum}.",
        "Tell me the result of {sum}.",
    ),
    "zh": ("{sum}等于多少？", "{sum}等于几？", "请计算{sum}。", "{sum}=？", "算一下{sum}。", "{sum}是多少？", "帮我算{sum}。", "{sum}"),
}  # fmt: skip
MOTION: Mapping[str, tuple[str, ...]] = {
    "direction": (
        "In which direction does the object move?",
        "Which way does it move?",
        "Where does the {shape} go?",
        "In what direction is the {shape} moving?",
        "Which direction does the {shape} move in?",
        "Does it move left, right, up or down?",
        "Tell me the direction of motion.",
        "Which way is the {colour} {shape} moving?",
        "What happens in the video: which direction?",
        "How does the {shape} move?",
    ),
    "first": (
        "Which colour comes first?",
        "What color is shown first?",
        "Which colour appears first?",
        "What is the first colour?",
        "Which color do you see at the start?",
        "Name the first colour in the video.",
        "What colour does it begin with?",
        "At the beginning, what color is it?",
    ),
    "last": (
        "Which colour comes last?",
        "What color is shown last?",
        "Which colour appears last?",
        "What is the last colour?",
        "Which color do you see at the end?",
        "Name the last colour in the video.",
        "What colour does it end with?",
        "At the end, what color is it?",
    ),
}
SIGN: Phrasings = {
    "en": (
        "What number is on the sign?",
        "Read the number on the sign.",
        "Which number is on the small sign?",
        "What does the sign say?",
        "There is a small sign. What number does it show?",
        "Tell me the number on the plate.",
        "What number does the little sign show?",
        "Please read the small sign.",
    ),
}
