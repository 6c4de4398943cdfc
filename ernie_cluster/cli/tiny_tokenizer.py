"""Tokenizer and chat template of the tiny checkpoint: a byte-level BPE trained on a text made here.

The published tokenizer has about 100,000 pieces; this one keeps its leading ids (0 <unk>, 1 <s>, 2 </s>, 3..12 the
digits), its special tokens and the family's prompt layout. Training is deterministic and takes a tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ernie_cluster.inputs.template import DEFAULT_TEMPLATE

HEAD_TOKENS = ("<unk>", "<s>", "</s>", *"0123456789")
SPECIAL_TOKENS = (
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<mask:1>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|AUDIO_PLACEHOLDER|>",
    "<|LOC_BEGIN|>",
    "<|LOC_END|>",
    "<|LOC_SEP|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<|VIDEO_PLACEHOLDER|>",
)
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_list>",
    "</tool_list>",
    "<tool_output>",
    "</tool_output>",
)


def train_tokenizer(vocab_size: int, texts: Iterable[str] | None = None) -> Tokenizer:
    """Byte-level BPE over `texts`, or a text made here, its ids laid out as in the family."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    num_added = len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    num_learned = vocab_size - num_added - (len(HEAD_TOKENS) - 10)  # the digits are in the alphabet already
    trainer = trainers.BpeTrainer(vocab_size=num_learned, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_training_text() if texts is None else texts, trainer)
    learned = json.loads(trained.to_str())["model"]
    words = [*HEAD_TOKENS, *(w for w in sorted(learned["vocab"], key=learned["vocab"].get) if w not in HEAD_TOKENS)]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    specials = [*HEAD_TOKENS[:3], *SPECIAL_TOKENS]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKUP_TOKENS])
    assert tokenizer.get_vocab_size() <= vocab_size, tokenizer.get_vocab_size()
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Lines apart, every digit alone, then bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


_STEMS = """
time year day thing man world life hand part child eye place week case point number group problem fact water room
area story month right study book word house side kind head friend power line end city name team minute idea body
back face level door health art war history party result change reason research girl moment air force light picture
image video colour shape paint draw write read speak think know see look find give tell work call try ask need feel
become leave put mean keep let begin help talk turn start show hear play run move live believe hold bring happen
provide sit stand lose pay meet include continue set learn lead understand watch follow stop create allow add spend
grow open walk win offer remember love consider appear buy wait serve die send expect build stay fall cut reach kill
remain suggest raise pass sell require report decide pull cluster replica token prompt answer model server request
""".split()  # noqa: SIM905 (readable)
_ENDINGS = ("", "s", "ed", "ing", "er", "ers", "ly", "ness", "able", "ful")
_SMALL_WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or".split()  # noqa: SIM905
_CHINESE = (
    "你好，世界。请描述这张图片。图片里有什么？我看到一只小猫在窗边睡觉。谢谢你的回答！今天的天气很好，我们去公园散步。"
    "模型把文字和图像放在一起思考，然后一步一步地写出答案。中文和英文都可以。"
)


def _training_text() -> Iterator[str]:
    """A few thousand lines that give the trainer words of very different frequency."""
    for i, stem in enumerate(_STEMS):
        for j, ending in enumerate(_ENDINGS):
            small = _SMALL_WORDS[(3 * i + j) % len(_SMALL_WORDS)]
            for _ in range(1 + (7 * i + 3 * j) % 5):
                yield f"{small} {stem}{ending} {_SMALL_WORDS[(i + 5 * j) % len(_SMALL_WORDS)]}, {stem.title()}."
    for size in (2, 3, 5, 8):
        for start in range(0, len(_CHINESE) - size):
            yield _CHINESE[start : start + size]
    yield from ("User: Picture 1:\nAssistant: \n\n", "def main(argv):\n    return 0\n", "😀🎉👍 {} [] \"'") * 5


def tokenizer_config(*, is_flat: bool, max_length: int) -> dict[str, Any]:
    """Content of tokenizer_config.json; the flat form marks pictures by text that is no token, as published."""
    template = DEFAULT_TEMPLATE
    if is_flat:
        template = template.replace("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>")
        template = template.replace("<|VIDEO_PLACEHOLDER|>", "<|video@placeholder|>")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
