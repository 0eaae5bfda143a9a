"""Judged answers: their file, and several of them together."""

from __future__ import annotations

import json

import pytest

from moerge_ext.queries.judged import Judged, joined, read_judged


def test_judged_answers_of_files(tmp_path):
    path = tmp_path / "judged.jsonl"
    rows = [
        {"input": "a", "scores": {"x": 1, "y": 0.5}, "task": "t", "tags": ["m"]},
        {"input": "b", "scores": {"y": -2, "x": 3}, "task": "u", "tags": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_judged(path)
    assert found.names == ("x", "y") and found.tasks == ("t", "u") and found.tags == (("m",), ())
    assert found.scores.tolist() == [[1, 0.5], [3, -2]]
    both = joined([found, Judged(("c",), [[7, 8]], ("y", "x"))])
    assert both.scores[2].tolist() == [8, 7] and both.tasks == ()
    bad = [
        ("{}", "line 1: expected"),
        (json.dumps({"input": "a", "scores": {}}), "must be numbers by name"),
        (json.dumps({"input": "a", "scores": {"x": float("nan")}}), "must be numbers by name"),
        (json.dumps(rows[0]) + "\n" + json.dumps({"input": "b", "scores": {"x": 1}}), "line 2: scores of x, where"),
        ("[", "not JSON"),
        ("", "no rows"),
    ]
    for text, message in bad:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_judged(path)
    with pytest.raises(ValueError, match=r"\[M=1, E=2\], got \[1, 1\]"):
        Judged(("a",), [[1]], ("x", "y"))


def test_judged_answers_as_other_programs_write_them(tmp_path):
    """A byte-order mark, ends of lines of other systems in a text, tags for some questions alone."""
    path, scores = tmp_path / "judged.jsonl", {"x": 1, "y": 0}
    rows = [{"input": "a\u2028b\x85c", "scores": scores, "tags": ["m"]}, {"input": "d", "scores": scores}]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    found = read_judged(path)
    assert found.texts == ("a\u2028b\x85c", "d") and found.tags == (("m",), ())
    path.write_text("\n".join(json.dumps(row | {"task": "t"} if "tags" in row else row) for row in rows))
    with pytest.raises(ValueError, match='line 2: it has no "task", and the first line has one'):
        read_judged(path)
