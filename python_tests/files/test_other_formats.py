"""Files that hold no JSON lines are said to be what they are, with a way to JSON lines that works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moerge_ext.files.rows import read_json, read_prompts, read_rows
from moerge_ext.models.prompt import PromptFormat
from moerge_ext.queries.judged import read_judged


def refused(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read_rows(path, **options)
    return str(caught.value)


def done(told: str, folder) -> None:
    """Does what the message says."""
    command = re.search(r'JSON lines of it: (python -c ".*?" < (?:\'.*?\'|\S+) > (?:\'.*?\'|[^\s;]+))', told)[1]
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    ("name", "text", "said", "rows"),
    [
        ("a.csv", 'question,answer\n"How, many?",3\nWhy?,so\n', "CSV with the columns question, answer",
         [("How, many?", "3"), ("Why?", "so")]),
        ("a.tsv", "id\tinput\ttarget\n1\tx\ty\n", "TSV with the columns id, input, target", [("x", "y")]),
        ("a.txt", "q;a\nx;y\n", "CSV (with semicolons) with the columns q, a", [("x", "y")]),
        ("a.csv", 'input,target\n"two\nlines",y\n', "CSV with the columns input, target", [("two\nlines", "y")]),
    ],
)  # fmt: skip
def test_tables(tmp_path, monkeypatch, name, text, said, rows):
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    told = refused(Path(name))
    assert f"{name} looks like {said}" in told and 'what is read are JSON lines {"input": str' in told
    done(told, tmp_path)
    assert [(row["input"], row["target"]) for row in read_rows(tmp_path / "a.jsonl")] == rows


def test_a_command_never_writes_into_what_it_reads(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("first line\nsecond line\n")
    done(refused(path, text=True), tmp_path)
    assert path.read_text() == "first line\nsecond line\n"
    assert [row["text"] for row in read_rows(tmp_path / "a-rows.jsonl", text=True)] == ["first line", "second line"]
    path.write_bytes(b"PAR1" + bytes(20))
    assert f"to_json('{tmp_path}/a-rows-2.jsonl')" in refused(path)


def test_text(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    path.write_text("One line, with a comma.\n\nAnother one.\n")
    assert "looks like plain text; what is read are" in refused(path)
    told = refused(path, text=True)
    done(told, tmp_path)
    assert [row["text"] for row in read_rows(tmp_path / "notes.jsonl", text=True)] == [
        "One line, with a comma.", "Another one."
    ]  # fmt: skip
    assert [row["input"] for row in read_prompts(path)] == ["One line, with a comma.", "Another one."]


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (b"PAR1\x15\x04\x15", "looks like Parquet; JSON lines of it: python -c"),
        (b"PK\x03\x04", "looks like a zip archive or a spreadsheet"),
        (b"\x1f\x8b\x08", "looks like a file compressed by gzip: unpack it first"),
        ("\ufeff{}".encode("utf-16-le"), "looks like UTF-16 text: save it as UTF-8"),
        (b"\x80\x81", "is not UTF-8 text"),
    ],
)
def test_binary_files(tmp_path, first, said):
    path = tmp_path / "rows.data"
    path.write_bytes(first + bytes(20))
    assert said in refused(path)
    with pytest.raises(ValueError, match=re.escape(said.partition(";")[0])):
        read_prompts(path)


def test_parquet_as_it_is_told(tmp_path):
    pytest.importorskip("datasets").Dataset.from_dict({"input": ["x"], "target": ["y"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    command = re.search(r'python -c ".*?"', refused(tmp_path / "a.parquet"))[0].replace("python", sys.executable, 1)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    subprocess.run(command, shell=True, check=True, env=environment, timeout=120)
    assert read_rows(tmp_path / "a.jsonl")[0]["target"] == "y"


def test_nothing_of_the_file_is_put_into_a_command_that_a_shell_would_run(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("$(touch x),`b`\n1,2\n")
    assert "CSV with the columns $(touch x), `b`" in (told := refused(path)) and "python -c" not in told


def test_lines_of_json_are_listed_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "a", "target": "b"}\noops, yes\n')
    assert "line 2: not JSON" in refused(path)
    path.write_text('{"input": "a",\n')
    assert "line 1: not JSON" in refused(path)


def test_the_mark_of_some_editors_and_other_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"input": "a\u2028b", "target": "c", "scores": {"x": 1}}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_rows(path)[0]["input"] == "a\u2028b"
    assert read_judged(path).texts == ("a\u2028b",)


PROSE = "The dog, a big one, ran home.\nThe cat, a small one, sat down.\n"


def test_sentences_with_as_many_commas_each_are_plain_text(tmp_path):
    path = tmp_path / "my notes.txt"
    path.write_text(PROSE)
    assert "looks like plain text; if it is CSV, call it my notes.csv; what is read are" in refused(path)
    told = refused(path, text=True)
    done(told, tmp_path)
    assert [row["text"] for row in read_rows(tmp_path / "my notes.jsonl", text=True)] == PROSE.splitlines()
    path.rename(path.with_suffix(".csv"))
    assert "looks like CSV with the columns The dog,  a big one" in refused(path.with_suffix(".csv"), text=True)


def test_what_may_be_a_table_or_text_is_told_as_both(tmp_path):
    (tmp_path / "a.txt").write_text("red, the hue\nblue, sky\n")
    told = refused(tmp_path / "a.txt", text=True)
    done(told.partition("or like plain text")[2], tmp_path)
    assert read_rows(tmp_path / "a.jsonl", text=True)[1]["text"] == "blue, sky"
    done(refused(tmp_path / "a.txt", text=True), tmp_path)  # beside what is there now
    assert read_rows(tmp_path / "a-rows.jsonl")[0] == {"input": "blue", "target": " sky"}


def test_a_command_writes_over_no_file(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\nx,y\n")
    for name in ("a.jsonl", "a-rows.jsonl"):
        (tmp_path / name).write_text("mine")
    done(refused(tmp_path / "a.csv"), tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "a-rows.jsonl").read_text() == "mine"
    assert read_rows(tmp_path / "a-rows-2.jsonl")[0]["target"] == "y"


def test_rows_of_two_layouts_say_where_the_second_begins(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n\n' + '{"question": "c", "answer": "d"}\n' * 5)
    told = refused(path)
    assert "a.jsonl cannot be used (line 3 is the first that is not like line 1, of 'input', 'target'):" in told
    assert told.count("expected") == 1 and "lines 3, 4, 5 and 2 more: expected" in told


def test_prompts_of_which_some_are_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('What is {"a": 1}?\n{"a": 1}\n')
    assert [row["input"] for row in read_prompts(path)] == ['What is {"a": 1}?', '{"a": 1}']
    path.write_text('One?\n\n{"input": "Two?"}\n')
    with pytest.raises(ValueError, match="its first one is no JSON and line 3 is a row: expected a prompt in every"):
        read_prompts(path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"input": ' * 100_000, "1" * 5000], ids=["list", "object", "number"])
def test_what_python_has_no_room_for_is_no_json(tmp_path, line):
    """A prompt as any other where lines are prompts, and a line that is named where they are rows."""
    prompts, rows = tmp_path / "prompts.txt", tmp_path / "rows.jsonl"
    prompts.write_text(f"Why?\n{line}\n")
    assert [example["input"] for example in read_prompts(prompts)] == ["Why?", line]
    prompts.write_text(f"{line}\nWhy?\n")
    assert len(read_prompts(prompts)) == 2
    rows.write_text(f'{{"input": "a", "target": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2: not JSON \((nested too deep|a number with too many digits)\)"):
        read_rows(rows)
    prompts.write_text(line)
    with pytest.raises(ValueError, match="is not JSON"):
        read_json(prompts, "an object")
    with pytest.raises(ValueError, match="not JSON"):
        read_judged(rows)
    with pytest.raises(ValueError, match="nested too deep|digits"):
        PromptFormat.from_json(line)
