"""Which token ends an answer: training writes it, generation waits for it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from moerge_ext.evaluation.answers import Answerer
from moerge_ext.models.end_tokens import end_tokens, target_ids, turn_ends
from moerge_ext.models.prompt import Prompt, PromptFormat
from moerge_ext.training.encoding import encode


class Tokenizer:
    """A token a character; an encoder-decoder's ends targets itself."""

    def __init__(self, end):
        self.eos_token_id = end

    def __call__(self, text=None, *, text_target=None, add_special_tokens=True):
        ids = [ord(c) for c in (text if text_target is None else text_target)]
        return SimpleNamespace(input_ids=ids + ([self.eos_token_id] if text_target is not None else []))

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


def model(generation=None, config=None):
    return SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation), config=SimpleNamespace(eos_token_id=config)
    )


@pytest.mark.parametrize(
    ("own", "generation", "config", "ends"),
    [
        (1, 1, 9, (1,)),
        (1, [2, 1, 3], None, (1, 2, 3)),
        (1, None, 1, (1,)),
        (1, None, None, (1,)),
        (None, [2, 3], None, (2, 3)),
        (None, None, None, ()),
    ],
)
def test_ends(own, generation, config, ends):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert end_tokens(model(generation, config), Tokenizer(own)) == ends
    assert target_ids(Tokenizer(own), "a", ends, seq2seq=False) == [97, *ends[:1]]


def test_one_warning_with_both_where_they_differ():
    with pytest.warns(UserWarning, match=r"with 1 \('<1>'\).*waits for 2 \('<2>'\), 3 .*answers end with 2"):
        ends = end_tokens(model([2, 3]), Tokenizer(1))
    assert ends == (2, 3)
    assert target_ids(Tokenizer(1), "a", ends, seq2seq=False) == [97, 2]
    assert target_ids(Tokenizer(1), "a", ends, seq2seq=True) == [97, 2]
    assert target_ids(Tokenizer(2), "a", ends, seq2seq=True) == [97, 2]


def test_an_answer_that_brings_its_end_has_no_second():
    assert target_ids(Tokenizer(98), "ab", (98, 99), seq2seq=False) == [97, 98]
    assert target_ids(Tokenizer(98), "ac", (98, 99), seq2seq=False) == [97, 99]
    assert target_ids(Tokenizer(98), "", (98,), seq2seq=False) == [98]


def test_an_answer_of_a_chat_ends_with_the_turn():
    """Of all that generation waits for, what the template writes; the tokenizer's own everywhere else."""

    class Chats(Tokenizer):
        def apply_chat_template(self, messages, tokenize):
            assert not tokenize
            return "".join(f"<{m['role']}>{m['content']}|\n" for m in messages) + "%"

    turn, other = ord("|"), ord("?")
    assert turn_ends(Chats(1), (1, turn, other)) == (turn, 1, other)
    assert turn_ends(Chats(1), (1, other)) == (1, other) and turn_ends(Tokenizer(1), (1, turn)) == (1, turn)
    tokenizer = Chats(1)
    answers = SimpleNamespace(tokenizer=tokenizer, ends=(1, turn), seq2seq=False)
    assert Answerer.target_ids(answers, "a", Prompt("q", special=True)) == [97, turn]
    assert Answerer.target_ids(answers, "a", Prompt("q")) == Answerer.target_ids(answers, "a", "q") == [97, 1]
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.apply_chat_template = lambda messages, **_: "".join(f"<{m['role']}>{m['content']}?" for m in messages)
    row = {"input": "q", "target": "a"}
    for chat, end in ((True, other), (False, 1)):
        said = PromptFormat(chat=chat)
        learned = encode(row, tokenizer, 99, seq2seq=False, ends=(1, turn, other), prompt=said)["labels"]
        assert learned[-2:] == [97, end]
