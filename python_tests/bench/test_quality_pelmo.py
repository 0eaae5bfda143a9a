"""The script of PELMo's own setting: its demonstrations, and its tables from the kept items alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from bench_checkout import REPO  # first: bench is importable after it

from bench.quality import pelmo
from moerge_ext.ensemble.measure import ORACLE


def item(kind, row, golds, **answers):
    """A line as `run` keeps it, judged."""
    judge = pelmo.JUDGES[pelmo.KINDS[kind]["judge"]]
    right = {name: judge("", pelmo.final_answer(answer, pelmo.AFTER), golds) for name, answer in answers.items()}
    return {"dataset": kind, "row": row, "answers": answers, "right": right | {ORACLE: right["one"] or right["two"]}}


@pytest.fixture
def kept(tmp_path):
    rows = {"gsm8k": ["7", "8"], "bbq_age": ["C", "A"]}
    for kind, golds in rows.items():
        folder = tmp_path / "tasks" / pelmo.KINDS[kind]["folder"] / kind
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps({"input": "q", "target": g}) + "\n" for g in golds))
    methods = ["specific few-shot", "one", "two", "top-1", "top-2", "top-4", "single-label top-1", "single-label top-2"]
    said = {"gsm8k": ["so 6. The answer is 7.", "8"], "bbq_age": ["(C) me", "B"]}
    items = [
        item(kind, row, golds[row], **{name: said[kind][row] if name != "two" else "x" for name in methods})
        for kind, golds in rows.items()
        for row in (0, 1)
    ]
    return tmp_path, items


def test_tables_from_the_items(kept, monkeypatch):
    data, items = kept
    monkeypatch.setattr(pelmo, "KINDS", {kind: pelmo.KINDS[kind] for kind in ("gsm8k", "bbq_age")})
    pelmo.check(items, data, ["one", "two"])
    text = pelmo.tables(pelmo.scores_of(items), ["one", "two"])
    assert "| gsm8k (n=2) | bbq_age (n=2) |" in text and "| one | 75.0 " in text and "| two | 0.0 " in text
    assert "| top-2 above one | +0.0 points, +0.0 to +0.0 |" in text
    assert "| top-2 above specific few-shot |" in text and text.count("| single-label top-2 |") == 1
    renamed = [
        replace(score, method="gsm8k expert") if score.method == "one" else score for score in pelmo.scores_of(items)
    ]
    own = pelmo.tables(renamed, ["gsm8k expert", "two"])
    assert "| gsm8k expert above specific few-shot on gsm8k | +0.0 points" in own and "few-shot on bbq_age" not in own
    items[0]["right"]["one"] = False
    with pytest.raises(SystemExit, match="gsm8k, row 0: kept"):
        pelmo.check(items, data, ["one", "two"])


def test_the_kept_results_say_what_they_said():
    """The table in the README, made again from them."""
    if not (pelmo.RESULTS / "pelmo_items.jsonl.gz").is_file():
        pytest.skip("bench/results has no pelmo_items.jsonl.gz: bench/quality/pelmo.py was not run")
    facts = json.loads((pelmo.RESULTS / "pelmo.json").read_text())
    text = pelmo.block(facts, pelmo.scores_of(pelmo.read_items(pelmo.RESULTS)))
    assert f"<!-- pelmo -->\n{text}\n\n<!-- /pelmo -->" in (REPO / "bench" / "quality" / "README.md").read_text()


def test_demonstrations_have_sound_rationales(tmp_path):
    for text in pelmo.RATIONALES:
        for sum_ in text.replace(",", " ").split(". "):
            left, equals, right = sum_.rpartition(" = ")
            words = left.split(" = ")[-1].split() if equals else []
            terms = [word for word in words if word in "+-*/" or word.replace(".", "").isdigit()]
            if terms:
                start = max(
                    i for i in range(len(terms)) if i == 0 or (terms[i - 1] not in "+-*/" and terms[i] not in "+-*/")
                )
                assert eval(" ".join(terms[start:])) == pytest.approx(float(right.split()[0].rstrip("."))), sum_
    story = "Cats are afraid of mice. Wolves are afraid of sheep. Emily is a wolf. What is emily afraid of?"
    row = {"input": story, "target": "sheep"}
    assert pelmo.rationale("babi_qa15_deduction", 0, row) == "Emily is a wolf. Wolves are afraid of sheep."
    assert pelmo.rationale("bbq_age", 0, row) is None
    with pytest.raises(SystemExit, match="row 0 of gsm8k is another one"):
        pelmo.rationale("gsm8k", 0, {"input": "q", "target": "3"})


def test_no_question_lies_in_two_places(tmp_path, monkeypatch):
    monkeypatch.setattr(pelmo, "RATIONALES", ())
    for kind, facts in pelmo.KINDS.items():
        folder = tmp_path / "tasks" / facts["folder"] / kind
        folder.mkdir(parents=True)
        story = "Cats are afraid of mice. Emily is a cat. What is emily afraid of? {}"
        for split, count in (("train", 90), ("test", 9)):
            rows = [{"input": f"{story.format(f'{split} {i}')}", "target": "mouse"} for i in range(count)]
            pelmo.write_lines(folder / f"{split}.jsonl", rows)
    pelmo.prepare(tmp_path, tmp_path / "cache", 10, 5)
    path = pelmo.write_prompts(tmp_path / "cache", 2)
    assert [entry["dataset"] for entry in json.loads(path.read_text())["experts"]] == list(pelmo.KINDS)
    for kind in pelmo.KINDS:
        folder, seen = tmp_path / "cache" / kind, []
        for name in ("demonstrations", "train", "test"):
            seen += [json.loads(line)["input"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        if kind == "clinc_banking":
            seen += [line.rpartition(": ")[0] for line in (folder / "passages.txt").read_text().splitlines()]
        assert len(seen) == len(set(seen))
        chosen = json.loads((folder / "rows.json").read_text())
        tests = [json.loads(line)["input"] for line in (folder / "test.jsonl").read_text().splitlines()]
        assert [f"test {i}" in text for i, text in zip(chosen, tests, strict=True)] == [True] * 5
