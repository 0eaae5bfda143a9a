"""Rows in every form that they may have."""

from __future__ import annotations

import io
import json

import pytest

from moerge_ext.files.examples import as_example, as_prompt
from moerge_ext.files.meta import read_instructed_rows, read_meta
from moerge_ext.files.rows import read_prompts, read_rows

USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"input": "ask", "target": "say"}, None),
        ({"prompt": "ask", "completion": "say"}, None),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER, USER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER]),
        ({"input": "ask", "target": "say", "messages": [SYSTEM]}, None),  # what it says of itself comes first
    ],
)
def test_every_form_has_input_and_target(row, conversation):
    example = as_example({**row, "id": 7})
    assert (example["input"], example["target"], example["id"]) == ("ask", "say", 7)
    assert example.conversation == conversation and as_example(example) is example


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input": "a"}, "got keys ['input']"),
        ({"text": "a"}, "got keys ['text']"),
        ({"prompt": "a", "completion": [ANSWER]}, "got keys"),
        ({"input": 3, "target": None}, "got keys ['input', 'target'], of which input is int, target is NoneType"),
        ({"question": "a", "answer": "b"}, "; `jq -c '.input = .question | .target = .answer' FILE` makes such rows"),
        ({"input": "a", "output": "b"}, "; `jq -c '.target = .output' FILE` makes such rows"),
        ({"prompt": "a", "target": "b"}, "; `jq -c '.input = .prompt' FILE` makes such rows"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "; `jq -c '.target = .output' FILE` makes such rows; --template '{instruction}\\n\\n{input}' puts both",
        ),
        ({"messages": []}, "the last message must be the assistant's"),
        ({"messages": [USER]}, "the roles are ['user']"),
        ({"messages": [SYSTEM, ANSWER]}, "must hold one of the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "message 0 must be"),
        ({"messages": [{"role": "human", "content": "a"}, ANSWER]}, "one of system, developer, user"),
        ({"messages": [{"from": "human", "value": "a"}, ANSWER]}, "message 0 must be"),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "must be one message of the assistant, got 3"),
        (["a"], "got list"),
    ],
)
def test_what_is_no_example_is_said(row, said):
    with pytest.raises(ValueError) as caught:
        as_example(row)
    assert said in str(caught.value)


def test_no_names_are_proposed_where_it_is_not_plain_which():
    for row in ({"question": "a", "answer": "b", "output": "c"}, {"question": "a", "answer": 3}, {"answer": "b"}, {}):
        with pytest.raises(ValueError) as caught:
            as_example(row)
        assert "jq" not in str(caught.value)
    with pytest.raises(ValueError, match=r"; `jq -c '.input = .question' FILE` makes such rows$"):
        as_prompt({"question": "a", "answer": "b"})


def test_text_only_where_it_is_taken():
    assert as_example({"text": "a"}, text=True) == {"text": "a"}
    with pytest.raises(ValueError, match=r'or \{"text": str\}, got keys \[\]'):
        as_example({}, text=True)


def test_all_bad_lines_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "a", "completion": "b"}, {"messages": [USER]}, {"x": 1}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"line 2: the last message(.|\n)*line 3: expected"):
        read_rows(path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.txt"
    path.write_text("one\ntwo\n", encoding="utf-8-sig")
    assert [row["input"] for row in read_prompts(path)] == ["one", "two"]
    path.write_text('{"input": "a", "target": "b"}\n', encoding="utf-8-sig")
    assert read_rows(path)[0]["target"] == "b"
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone"))
    assert read_prompts(None)[0]["input"] == "one"


def test_the_instruction_of_meta_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n{"input": "a", "target": "b", "instruction": "own"}\n')
    assert "instruction" not in read_instructed_rows(path)[0]
    (tmp_path / "meta.json").write_text('{"instruction": "of all"}')
    assert [row["instruction"] for row in read_instructed_rows(path)] == ["of all", "own"]
    (tmp_path / "meta.json").write_text('{"instruction": 3}')
    with pytest.raises(ValueError, match='"instruction", if any, a text'):
        read_meta(tmp_path / "meta.json")
