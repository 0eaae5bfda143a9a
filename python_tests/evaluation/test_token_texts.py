"""The texts of tokens: whole characters, in order, and nothing that steers a terminal."""

from __future__ import annotations

import builders
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moerge_ext.evaluation.token_texts import pieces, visible

TEXTS = (
    "How many [red]users[/red]?\n\n日本語 🙂👨‍👩‍👧 café",
    "<script>alert(1)</script>  two  spaces\tand \x1b[31m",
    " lead",
    "",
    "𓀀𓂀ठ",
)


def bytewise():
    """A byte-level BPE without merges: each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_are_one_piece(text):
    tokenizer = bytewise()
    found = pieces(tokenizer(text).input_ids, tokenizer)
    assert [piece.text for piece in found] == list(text)
    assert [piece.stop - piece.start for piece in found] == [len(character.encode()) for character in text]


def test_special_tokens_and_broken_bytes():
    tokenizer = bytewise()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    smile = tokenizer("🙂").input_ids
    ids = [start, *smile[:2], start, *smile, *smile[:3]]
    found = pieces(ids, tokenizer)
    assert [(p.text, p.special) for p in found if "\ufffd" not in p.text] == [
        ("<|im_start|>", True),
        ("<|im_start|>", True),
        ("🙂", False),
    ]
    assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])] and found[-1].stop == len(ids)
    nonsense = smile[1:2] * 9  # bytes that continue a character, which none begins
    assert sum(p.stop - p.start for p in pieces(nonsense, tokenizer)) == 9


@pytest.mark.parametrize("text", TEXTS)
def test_sentence_pieces_and_words(text, shared, tmp_path):
    """Spaces that a decoder drops at the begin of a text stay where they are inside of it."""
    path = shared / "data" / "base_lm" / "stories260K" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(p.text for p in pieces(ids, tokenizer)) == tokenizer.decode(ids)
    letters = builders.make_tokenizer(tmp_path)
    ids = letters("ab. c").input_ids
    assert [p.text.strip() for p in pieces(ids, letters)] == ["a", "b", ".", "", "c"]


def test_visible():
    assert visible("a\n\tb [red] 👨‍👩‍👧 é") == "a⏎\n⇥b [red] 👨‍👩‍👧 é"
    assert visible("\x1b[31m\r\x07\x9b\u202e\u2028\ud800") == "\\x1b[31m\\x0d\\x07\\x9b\\u202e\\u2028\\ud800"
