"""Templates, chat templates, and the token ids that come of them."""

from __future__ import annotations

import pytest
from builders import chat_tokenizer, make_tokenizer

from moerge_ext import PromptFormat
from moerge_ext.files.examples import as_example
from moerge_ext.models.prompt import Prompt, encode

USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}


def test_fields_are_filled_once():
    row = {"input": "{target}", "target": "t", "n": 3, "instruction": "do"}
    assert PromptFormat().text(row) == "{target}"
    assert PromptFormat("{instruction}: {input}={n}\n").text(row) == "do: {target}=3\n"
    assert PromptFormat('{"a": {"b": "{input}"}} {{n}}').text(row) == '{"a": {"b": "{target}"}} {n}'


def test_a_template_without_a_field_and_fields_that_are_not_there():
    for template in ("Q", "", "{{input}}", "{a b}"):
        with pytest.raises(ValueError, match=r"must contain \{input\}"):
            PromptFormat(template)
    with pytest.raises(ValueError) as caught:
        PromptFormat("{a} {b} {instruction} {a}").text({"input": "x", "b": ["y"]})
    assert str(caught.value).count("asks for {a}, and the row has only b, input") == 1
    assert "asks for {b}, a list, not a text" in str(caught.value) and "meta.json" in str(caught.value)


def test_chat(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    form = PromptFormat("q {input}", chat=True)
    assert form.prompt({"input": "x"}, tokenizer) == Prompt("u:q x.a:", special=True)
    assert PromptFormat(chat=True).around("x", tokenizer).text == "u:x.a:"
    with pytest.raises(ValueError, match="--chat: this tokenizer has no chat template; leave --chat out"):
        form.prompt({"input": "x"}, make_tokenizer(tmp_path / "plain"))
    with pytest.raises(ValueError, match='a chat template needs "input" and "target"'):
        form.whole({"text": "x"})


def test_messages_go_through_the_chat_template_in_any_case(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    row = as_example({"messages": [USER, ANSWER, {**USER, "content": "more"}, ANSWER]})
    for chat in (False, True):
        assert PromptFormat(chat=chat).prompt(row, tokenizer).text == "u:ask.a:say.u:more.a:"
    assert PromptFormat("q {input}").prompt(row, tokenizer).text == "u:ask.a:say.u:q more.a:"
    assert PromptFormat().problems([row, row], make_tokenizer(tmp_path / "plain")) == [
        "rows 0, 1 (from 0): rows of messages: this tokenizer has no chat template; give the rows "
        '"input" and "target", or take the tokenizer of a chat model'
    ]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        PromptFormat().prompt(row, tokenizer)


def test_special_tokens_are_put_once(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer(tmp_path)
    ends = [("</s>", 1), ("<pad>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A </s>", special_tokens=ends)
    plain = tokenizer("ab", add_special_tokens=False).input_ids
    assert Prompt("ab").ids(tokenizer, (1,), seq2seq=False) == [0, *plain]
    assert Prompt("ab").ids(tokenizer, (1,), seq2seq=True) == [0, *plain, 1]
    assert Prompt("ab", special=True).ids(tokenizer, (1,), seq2seq=False) == plain
    assert encode(tokenizer, Prompt("ab"))["input_ids"].tolist() == [[0, *plain]]


def test_what_is_noted_comes_back():
    form = PromptFormat("é {input}\n", chat=True)
    assert PromptFormat.from_json(form.to_json()) == form != PromptFormat("é {input}\n")
    for text in ("nonsense", "[]", "{}", '{"template": "x", "chat": false}'):
        with pytest.raises(ValueError):
            PromptFormat.from_json(text)
    pair, text = {"input": "a", "target": "b"}, {"text": "a"}
    assert PromptFormat().seen_in([pair, text]) == PromptFormat() and PromptFormat().seen_in([text]) is None
    assert PromptFormat().seen_in([{"messages": [USER, ANSWER]}]) == PromptFormat(chat=True)
