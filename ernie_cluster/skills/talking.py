"""A little conversation, so that a first "hello" gets a sensible reply."""

from __future__ import annotations

import random
from collections.abc import Mapping

from ernie_cluster.skills.sample import Language
from ernie_cluster.skills.words import spoken

_HELLO = "Hello! Send me a picture and ask me about it."
_WHO = "I am a pocket-sized ERNIE model. I look at simple pictures."
_WHAT = "I name colours and shapes, count, read numbers and words, add, compare, find things, and watch short videos."
_HOW = "I am fine. Show me a picture!"
_THANKS = "You are welcome!"
_BYE = "Goodbye!"
_LARGE = "I am too small to know that. Ask me about a picture."

TALK: Mapping[Language, Mapping[str, tuple[str, ...]]] = {
    "en": {
        _HELLO: ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Hello there", "Good morning", "Good evening!", "Hallo", "Hello, ERNIE!", "hey there", "Greetings"),
        _WHO: ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.", "Are you an AI?", "Which model are you?", "Who am I talking to?", "What model is this?"),
        _WHAT: ("What can you do?", "Help", "What are you good at?", "How can you help me?", "What can I ask you?", "Tell me what you can do.", "What are your skills?", "How do I use you?", "What do you do?"),
        _HOW: ("How are you?", "How are you doing?", "How is it going?", "What's up?", "Are you well?", "How do you feel today?", "All good?", "How are things?"),
        _THANKS: ("Thanks", "Thank you!", "Thank you very much.", "Great, thanks!", "Cool", "Well done!", "Very good!", "Nice work", "Perfect"),
        _BYE: ("Bye", "Goodbye!", "See you later.", "Good night", "That is all.", "See you", "Bye bye", "I have to go."),
        _LARGE: ("Write a poem.", "What is the capital of France?", "Tell me a joke.", "Write a Python program.", "Who is the president?", "What is the meaning of life?", "Translate this into German.", "Tell me a story.", "Explain quantum physics.", "What happened in 1969?", "Write an essay about cats.", "Why is the sky blue?", "How old is the universe?", "Can you write code?"),
    },
    "zh": {
        "你好！发一张图片来问我吧。": ("你好", "你好！", "您好", "嗨", "早上好", "晚上好！", "哈喽", "大家好"),
        "我是一个小小的文心模型，会看简单的图片。": ("你是谁？", "你叫什么名字？", "介绍一下你自己。", "你是什么模型？", "请自我介绍。", "你是人工智能吗？", "你是机器人吗？", "你是哪个模型？"),
        "我会认颜色和形状、数数、读数字和单词、做加减法、找东西。": ("你会做什么？", "你能做什么？", "你有什么功能？", "怎么用你？", "帮助", "你擅长什么？", "我可以问你什么？", "你能帮我什么？"),
        "不客气！": ("谢谢", "谢谢你！", "太好了！", "多谢", "非常感谢", "真棒！", "很好", "厉害"),
        "再见！": ("再见", "拜拜", "晚安", "回头见", "下次见！", "我走了", "就这样吧", "再会"),
        "我太小了，不知道这个。请问我图片的问题。": ("写一首诗。", "法国的首都是哪里？", "讲个笑话。", "写一个程序。", "天空为什么是蓝色的？", "讲个故事。", "帮我写作文。", "今天天气怎么样？"),
    },
}  # fmt: skip
"""Language -> answer -> what it answers."""


def talk(rng: random.Random, language: Language) -> tuple[str, str]:
    """What somebody says, and the reply."""
    answer = rng.choice(list(TALK[language]))
    return spoken(rng, rng.choice(TALK[language][answer]), language), answer
