from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from ernie_cluster.cli.tiny_tokenizer import train_tokenizer
from ernie_cluster.errors import CheckpointError
from ernie_cluster.inputs.tokenizer import IncrementalDecoder, Tokenizer, end_token_ids

BYTE_LEVEL = Tokenizer(train_tokenizer(2048))


def _byte_fallback(*more_steps: decoders.Decoder) -> Tokenizer:
    """The kind that SentencePiece models become: words with a mark for the space, and a token for each byte."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁hello", "hello", "▁world", "好", "a", "▁a"]
    vocab = {text: i for i, text in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more_steps]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


BYTE_FALLBACK = _byte_fallback(decoders.Strip(" ", 1, 0))
CONVERTED = _byte_fallback()
"""As the family's models are: no space is put in front of a text, and none taken from it."""


def _fallback_ids(letter: str) -> list[int]:
    ids = [BYTE_FALLBACK.token_id(f"<0x{byte:02X}>") for byte in letter.encode()]
    return [i for i in ids if i is not None]


def _flat(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("你好世界图片😀🎉👍🏽é ñ\n<s>0")))
any_ids = st.lists(st.integers(0, 2100), max_size=120)  # some are beyond the vocabulary
runs_of_broken_bytes = st.lists(st.sampled_from([BYTE_LEVEL.token_id(c) for c in "âĢ¦ðŁĺĤ"]), min_size=40, max_size=90)


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip_special: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special)
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [decoder.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, decoder.flush()]


@given(texts, st.lists(st.integers(0, 1000)))
def test_streamed_text_is_the_text(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text, allow_special=False)
    assert BYTE_LEVEL.decode(ids) == text
    pieces = stream(BYTE_LEVEL, ids, cuts)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(texts)
def test_the_bytes_of_tokens_make_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, allow_special=True)
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == text.encode()


@given(st.lists(st.sampled_from([[i] for i in range(3, 10)]) | st.sampled_from("é🙂a").map(_fallback_ids)).map(_flat))
def test_the_bytes_of_tokens_make_the_text_with_byte_fallback(ids: list[int]) -> None:
    spelled = b"".join(map(BYTE_FALLBACK.token_bytes, ids)).decode()
    assert spelled.removeprefix(" ") == BYTE_FALLBACK.decode(ids)


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (BYTE_LEVEL, "<s>", b"<s>"),
        (BYTE_LEVEL, "<think>", b"<think>"),
        (BYTE_LEVEL, "\u0120", b" "),
        (BYTE_LEVEL, "\u00f0", b"\xf0"),
        (BYTE_FALLBACK, "\u2581hello", b" hello"),
        (BYTE_FALLBACK, "<0xF0>", b"\xf0"),
    ],
)
def test_bytes_of_a_token(tokenizer: Tokenizer, text: str, expected: bytes) -> None:
    token_id = tokenizer.token_id(text)
    assert token_id is not None
    assert tokenizer.token_bytes(token_id) == expected


def test_special_tokens_are_no_text_but_markup_is() -> None:
    text = BYTE_LEVEL.text_bytes(3000)
    assert len(text) == 3000
    assert {text[i] for i in BYTE_LEVEL.special_ids} == {b""}
    think = BYTE_LEVEL.token_id("</think>")
    assert think is not None
    assert text[think] == b"</think>"
    assert text[-1] == b""


def test_an_id_that_is_no_token_has_no_bytes() -> None:
    assert BYTE_LEVEL.token_bytes(5000) == BYTE_FALLBACK.token_bytes(5000) == b""


@settings(max_examples=300)
@given(st.one_of(any_ids, runs_of_broken_bytes), st.lists(st.integers(0, 1000)), st.booleans())
def test_streaming_equals_decoding_at_once_for_any_tokens(ids: list[int], cuts: list[int], skip: bool) -> None:
    assert "".join(stream(BYTE_LEVEL, ids, cuts, skip)) == BYTE_LEVEL.decode(ids, skip)


@pytest.mark.parametrize("num_broken", range(26, 40))
def test_a_character_after_many_broken_bytes(num_broken: int) -> None:
    """The window is cut somewhere here, once in the middle of the character."""
    broken, letter = (BYTE_LEVEL.encode(text, allow_special=False) for text in ("½", "𝄞"))
    assert len(letter) == 4
    ids = broken[-1:] * num_broken + letter
    assert "".join(stream(BYTE_LEVEL, ids, list(range(len(ids))))) == "\ufffd" * num_broken + "𝄞"


@pytest.mark.parametrize("tokenizer", [BYTE_FALLBACK, CONVERTED])
@given(text=st.text("hello world 好😀é你a"), leading_space=st.booleans(), cuts=st.lists(st.integers(0, 1000)))
def test_streaming_with_byte_fallback(tokenizer: Tokenizer, text: str, leading_space: bool, cuts: list[int]) -> None:
    ids: list[int] = [BYTE_FALLBACK.token_id("▁")] if leading_space else []  # type: ignore[list-item]
    for letter in text:
        token = BYTE_FALLBACK.token_id("▁" if letter == " " else letter)
        in_bytes = [BYTE_FALLBACK.token_id(f"<0x{byte:02X}>") for byte in letter.encode()]
        ids += in_bytes if token is None else [token]  # type: ignore[list-item, arg-type]
    assert "".join(stream(tokenizer, ids, cuts)) == tokenizer.decode(ids)


ODD_PIECES = ["<s>", "▁", "▁hello", "好", "\ufffd", "é<", "<0x41>", "<0xE5>", "<0xA5>", "<0xBD>", "<0x+1>", "<0xzz>"]


@pytest.mark.parametrize("step", [None, decoders.Strip(" ", 1, 0), decoders.Replace("a", "b")])
@given(before=st.lists(st.integers(0, len(ODD_PIECES)), max_size=12), last=st.integers(0, len(ODD_PIECES)))
def test_a_text_of_its_own_is_the_text_among_others(
    step: decoders.Decoder | None, before: list[int], last: int
) -> None:
    """With any decoder: what stands behind whole characters adds this text, whatever the library knows about it."""
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(ODD_PIECES)}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if step is None else [*steps, step])
    tokenizer = Tokenizer(backend)
    text = tokenizer.decode(before, skip_special=False)
    if tokenizer.own_texts[last] and "\ufffd" not in text:
        assert tokenizer.decode([*before, last], skip_special=False) == text + tokenizer.own_texts[last]


def test_which_tokens_have_a_text_of_their_own() -> None:
    ids = BYTE_LEVEL.encode(" hello", allow_special=False)
    assert "".join(BYTE_LEVEL.own_texts[i] for i in ids) == " hello"
    assert {BYTE_LEVEL.own_texts[i] for i in BYTE_LEVEL.encode("𝄞", allow_special=False)} == {""}
    world, byte = CONVERTED.token_id("▁world"), CONVERTED.token_id("<0x41>")
    assert world is not None
    assert byte is not None
    assert (CONVERTED.own_texts[world], CONVERTED.own_texts[byte], CONVERTED.own_texts[5000]) == (" world", "", "")
    assert BYTE_FALLBACK.own_texts[world] == ""  # its decoder takes a first space away


def test_a_character_comes_with_its_last_byte() -> None:
    ids = BYTE_LEVEL.encode("𝄞好", allow_special=False)
    decoder = IncrementalDecoder(BYTE_LEVEL)
    pushed = [decoder.push([i]) for i in ids]
    assert [p for p in pushed if p] == ["𝄞", "好"]
    assert len(pushed) > 4
    assert decoder.flush() == ""


def test_flush_gives_a_cut_off_character_and_starts_anew() -> None:
    ids = BYTE_LEVEL.encode("𝄞", allow_special=False)
    decoder = IncrementalDecoder(BYTE_LEVEL)
    assert decoder.push(ids[:-1]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ids) == "𝄞"


def test_cost_of_a_token_does_not_grow_with_the_answer() -> None:
    class Counting(Tokenizer):
        num_decoded = 0

        def decode(self, ids, skip_special=True):  # type: ignore[no-untyped-def]
            ids = list(ids)
            Counting.num_decoded += len(ids)
            return super().decode(ids, skip_special)

    tokenizer = Counting(train_tokenizer(2048))
    lone = BYTE_LEVEL.token_id("Ģ")
    assert lone is not None
    for ids in ([lone] * 2000, BYTE_LEVEL.encode("describe the picture 你好 " * 200, allow_special=False)):
        Counting.num_decoded = 0
        decoder = IncrementalDecoder(tokenizer)
        for i in ids:
            decoder.push([i])
        assert Counting.num_decoded < 40 * len(ids)


@given(st.lists(st.one_of(texts, st.sampled_from(sorted(BYTE_LEVEL.control_texts)))))
def test_text_of_a_user_never_becomes_a_control_token(parts: list[str]) -> None:
    text = "".join(parts)
    ids = BYTE_LEVEL.encode(text, allow_special=False)
    assert not {BYTE_LEVEL.token_id(control) for control in BYTE_LEVEL.control_texts} & set(ids)
    assert BYTE_LEVEL.decode(ids) == text


def test_a_vocabulary_that_can_spell_a_control_token_is_not_let() -> None:
    vocab = {"<unk>": 0, "<": 1, "s": 2, ">": 3, "<s": 4, "<s>": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">")], unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("<s>", allow_special=True) == [5]
    assert tokenizer.encode("<s>", allow_special=False) == [1, 2, 3]


def test_tags_are_control_tokens_though_not_marked_special() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "a": 1, "<": 2, "|": 3, ">": 4}, [], unk_token="<unk>"))
    backend.add_tokens(["<|a|>", "<a>", "</think>", "aa"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.control_texts == {"<|a|>", "<a>", "</think>"}
    assert tokenizer.encode("<|a|><a>", allow_special=False) == [2, 3, 1, 3, 4, 2, 1, 4]
    assert tokenizer.special_ids == {tokenizer.token_id("<|a|>")}


def test_control_tokens_are_tokens_where_allowed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|IMAGE_START|><think>42</s>", allow_special=True)
    expected = [tokenizer.token_id(t) for t in ("<|IMAGE_START|>", "<think>", "4", "2", "</s>")]
    assert ids == expected
    assert tokenizer.decode(ids) == "<think>42"  # markup stays for the parsers
    assert tokenizer.decode(ids, skip_special=False) == "<|IMAGE_START|><think>42</s>"


def test_digits_and_specials_have_the_family_s_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(t) for t in ("<unk>", "<s>", "</s>", *"0123456789")] == list(range(13))
    assert tokenizer.vocab_size == 2048
    assert tokenizer.token_id("no such token") is None


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not found"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_sentencepiece_model_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xffnothing")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: cannot be converted"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("generation", "expected"), [({"eos_token_id": [7, 2]}, (7, 2, 2028)), (None, (2, 2028))])
def test_end_tokens(tokenizer: Tokenizer, tmp_path: Path, generation: object, expected: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')  # the training's number, not to be trusted
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_token_ids(tmp_path, tokenizer) == expected


def test_without_any_end_token_the_checkpoint_is_refused(tmp_path: Path) -> None:
    bare = Tokenizer(tokenizers.Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        end_token_ids(tmp_path, bare)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert end_token_ids(tmp_path, bare) == (5,)
