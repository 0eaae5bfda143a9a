"""Prompt experts: the four strategies, their demonstrations, retrievers, and the file that describes an ensemble."""

from __future__ import annotations

import json

import pytest
import torch
from query_cases import fake_embedder

import moerge_ext as moerge
from moerge_ext.ensemble.config import read_experts, read_parts
from moerge_ext.ensemble.passages import FoundPassages, PassageIndex, read_passages
from moerge_ext.ensemble.prompts import Template, answer_prompting, chain_of_thought, few_shot, retrieval_augmented
from moerge_ext.models.prompt import PromptFormat

ROWS = [{"input": f"q{i}", "target": f"a{i}", "rationale": f"because {i}."} for i in range(20)]
SHORT = Template(question="{input}:", answer="{target}.")


def shown(expert):
    return [(row["input"], row["target"]) for row in expert.facts["demonstrations"]]


def test_demonstrations_are_drawn_at_random():
    experts = [few_shot("plain", ROWS, seed=seed) for seed in (0, 0, 1)]
    first, again, other = map(shown, experts)
    assert first == again != other and len(set(first)) == 16
    assert sorted(first) != sorted(other), "another seed must draw other rows, not only another order"
    assert first != [(row["input"], row["target"]) for row in ROWS[:16]]
    everywhere = [0] * 20
    for seed in range(200):
        for question, _ in shown(few_shot("plain", ROWS, count=4, seed=seed)):
            everywhere[int(question[1:])] += 1
    assert min(everywhere) > 20 and max(everywhere) < 60  # 40 expected, standard deviation 5.7


def test_plain_and_reasoning():
    plain = few_shot("plain", ROWS)
    question, answer = shown(plain)[-1]
    assert plain.prompt("new").count("Question:") == 17
    assert plain.prompt("new").endswith(f"Question: {question}\nAnswer: {answer}\n\nQuestion: new\nAnswer:")
    thought = chain_of_thought("cot", ROWS[:1], count=1)
    assert thought.prompt("new") == "Question: q0\nAnswer: because 0. The answer is a0.\n\nQuestion: new\nAnswer:"
    assert thought.turns("new").shots == (("Question: q0\nAnswer:", " because 0. The answer is a0.\n\n"),)
    assert few_shot("bare", count=0, template=SHORT).prompt("new") == "new:"
    odd = [{"input": "{target} {knowledge}", "rationale": "{target}", "target": "{input}"}]
    assert chain_of_thought("odd", odd, count=1).prompt("{rationale}") == (
        "Question: {target} {knowledge}\nAnswer: {target} The answer is {input}.\n\nQuestion: {rationale}\nAnswer:"
    )


def test_every_demonstration_carries_its_passages():
    seen = []

    def search(question):
        seen.append(question)
        return [f"{question} {i}" for i in range(12)]

    rag = retrieval_augmented("rag", search, ROWS, count=2)
    text, demonstrations = rag.prompt("new"), [question for question, _ in shown(rag)]
    assert text.count("Passage: ") == 30 and text.endswith("Passage: new 9\nQuestion: new\nAnswer:")
    for question, answer in shown(rag):
        assert f"Passage: {question} 9\nQuestion: {question}\nAnswer: {answer}\n\n" in text
    rag.prompt("another")
    assert seen == [*demonstrations, "new", "another"], "the demonstrations' passages are found once"
    fewer = retrieval_augmented("rag", search, ROWS, count=2, passages=3, demonstration_passages=1)
    assert fewer.prompt("new").count("Passage: ") == 5
    assert (
        retrieval_augmented("rag", search, ROWS, count=2, demonstration_passages=0).prompt("n").count("Passage") == 10
    )
    placed = Template(question="{input}\n{knowledge}A:", answer="{target}.", passage="[{passage}]")
    found = retrieval_augmented("rag", lambda q: ["{input}"], ROWS[:1], count=1, template=placed)
    assert found.prompt("new") == "q0\n[{input}]A:a0.new\n[{input}]A:"
    assert few_shot("plain", count=0, template=placed).prompt("new") == "new\nA:"


def test_every_demonstration_carries_sampled_answers():
    asked = []

    def ask(prompt, count, *limit):
        asked.append((prompt.text, count, *limit))
        return ["x ", "", "y"]

    own = answer_prompting("own", ROWS, count=2, samples=3, template=SHORT)
    (q1, a1), (q2, a2) = shown(own)
    text = own.prompt("new", ask)
    # a row's answers are sampled after the other rows: its own answer is not shown to the model
    assert asked == [(f"{q2}:{a2}.{q1}:", 3), (f"{q1}:{a1}.{q2}:", 3), (f"{q1}:{a1}.{q2}:{a2}.new:", 3)]
    said = "Some answers, not all of them right: x; y\n"
    assert text == f"{said}{q1}:{a1}.{said}{q2}:{a2}.{said}new:"
    asked.clear()
    plain = answer_prompting("own", ROWS, count=2, samples=3, demonstration_samples=0, template=SHORT)
    assert plain.prompt("new", ask) == f"{q1}:{a1}.{q2}:{a2}.{said}new:" and len(asked) == 1
    asked.clear()
    short = answer_prompting("own", count=0, samples=3, sample_tokens=5, template=SHORT)
    assert short.prompt("new", ask) == f"{said}new:" and asked == [("new:", 3, 5)]
    assert short.facts["samples"] != answer_prompting("own", count=0, samples=3, template=SHORT).facts["samples"]


def test_prompts_explain_what_is_missing():
    for make, text in (
        (lambda: few_shot("a", ROWS[:3]), "expected 16 demonstrations, got 3: a count of 3 uses those"),
        (lambda: few_shot("a", ROWS, count=-1), "count must be a whole number, not negative, got -1"),
        (lambda: few_shot("a", ROWS, count="4"), "count must be a whole number, not negative, got '4'"),
        (lambda: chain_of_thought("a", [{"input": "", "target": ""}], count=1), "demonstration 0 .* has no rationale"),
        (lambda: few_shot("a", count=0).prompt(" "), "empty question"),
        (lambda: answer_prompting("a", count=0).prompt("q"), "needs the model's own answers"),
        (lambda: answer_prompting("a", count=0, samples=0), "expected at least 1 with the question"),
        (lambda: answer_prompting("a", count=0, sample_tokens=0), "sample_tokens at least 1, got 10 and 0"),
        (lambda: retrieval_augmented("a", lambda q: [], count=0).prompt("q"), "the retriever returned no passage"),
        (lambda: retrieval_augmented("a", lambda q: [], count=0, demonstration_passages=-1), "not negative"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


# ---- retrievers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_index_finds_what_all_products_say(similarity):
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    table = {f"t{i}": torch.randn(8, generator=generator) * (1 + i % 7) for i in range(200)}
    embedder = moerge.Embedder(lambda texts: torch.stack([table[t] for t in texts]), name="table")
    passages, questions = [f"t{i}" for i in range(150)], [f"t{i}" for i in range(150, 200)]
    index = PassageIndex(embedder, passages, count=10, similarity=similarity)
    rows, asked = torch.stack([table[p] for p in passages]), torch.stack([table[q] for q in questions])
    if similarity == "cosine":
        rows = rows / rows.norm(dim=1, keepdim=True)
    for question, products in zip(questions, asked @ rows.T, strict=True):
        assert index(question) == [passages[i] for i in products.argsort(descending=True)[:10].tolist()]
    other = PassageIndex(embedder, passages[:-1], count=10, similarity=similarity)
    assert index.identity != other.identity and len(PassageIndex(embedder, ["t1"], count=10)("t0")) == 1
    with pytest.raises(ValueError, match="no passages"):
        PassageIndex(embedder, [], count=1)
    with pytest.raises(ValueError, match="similarity must be one of cosine, dot, got 'l2'"):
        PassageIndex(embedder, passages, count=1, similarity="l2")


def test_passages_that_were_found_elsewhere(tmp_path):
    file = tmp_path / "found.jsonl"
    file.write_text('{"input": "who? ", "passages": ["a", "b"]}\n\n')
    found = read_passages(file)
    assert isinstance(found, FoundPassages) and found("who?") == ["a", "b"]
    file.write_text('{"input": "who\u2028?", "passages": ["a\x85"]}\r\n', encoding="utf-8-sig")
    assert read_passages(file)("who\u2028?") == ["a\x85"]
    (tmp_path / "found.txt").write_text("one\u2028 and\x0c on\r\n\ntwo")
    assert read_passages(tmp_path / "found.txt") == ["one\u2028 and\x0c on", "two"]
    with pytest.raises(ValueError, match="no passages were found beforehand for 'when.'"):
        found("when?")
    for content, text in (
        ("", "the file has no rows"),
        (
            '{"input": "a", "passages": "b"}\n{"input": 1, "passages": []}\nx',
            "(?s)line 1: expected .*line 2.*line 3: not",
        ),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=text):
            read_passages(file)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_an_ensemble_from_a_file(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "texts.txt").write_text("flying bees\n\ndigging ants\n")
    entries = [
        {"name": "plain", "demonstrations": "rows.jsonl", "template": {"question": "{input}?"}},
        {"name": "cot", "kind": "chain-of-thought", "demonstrations": "rows.jsonl", "count": 2, "dataset": "maths"},
        {"name": "rag", "kind": "retrieval", "passages": "texts.txt", "passage_count": 1, "embedder": "bag"},
        {"name": "own", "kind": "answer-prompting"},
        {"name": "tuned", "lora": "adapters/sql"},
    ]
    (tmp_path / "experts.json").write_text(json.dumps(entries))
    asked = []
    config = read_experts(tmp_path / "experts.json", lambda entry: asked.append(entry["embedder"]) or fake_embedder())
    assert config.names == ["plain", "cot", "rag", "own", "tuned"] and config.experts[-1].lora == "sql"
    assert config.loras == {"sql": tmp_path / "adapters" / "sql"} and config.by_dataset == {"maths": "cot"}
    assert config.experts[0].prompt("new").count("?") == 17 and asked == ["bag"]
    assert "Passage: digging ants\nQ" in config.experts[2].prompt("digging")
    assert (config.router, config.top_k, config.stop, config.few_shot) == (None, 2, (), {})
    parts = {"experts": entries[:1], "router": "out/router", "top_k": 1, "stop": ["\n"], "answer_after": "is"}
    parts["few_shot"] = {"demonstrations": {"maths": "rows.jsonl"}, "count": 3, "seed": 5}
    (tmp_path / "whole.json").write_text(json.dumps(parts))
    config = read_experts(tmp_path / "whole.json", None, PromptFormat("do {input}"))
    assert (config.router, config.top_k, config.stop) == (tmp_path / "out" / "router", 1, ("\n",))
    assert config.few_shot["maths"].prompt("new").count("Question: do q") == 3  # in the form of the questions
    assert shown(config.few_shot["maths"]) != shown(few_shot("x", ROWS, count=3))


def test_files_explain_what_is_wrong(tmp_path):
    file = tmp_path / "experts.json"
    bad = [
        {"name": "a", "kind": "x"},
        {"name": "b", "oops": 1},
        {"name": "c", "template": {"x": ""}},
        {"name": "e", "samples": 3},
        {"name": "d", "kind": "retrieval"},
    ]
    file.write_text(json.dumps({"experts": bad, "few_shot": {"demonstrations": "rows.jsonl"}}))
    with pytest.raises(ValueError) as caught:
        read_experts(file, fake_embedder)
    for text in (
        "kind must be one of",
        "unknown key(s) oops",
        "template takes",
        '"passages"',
        "samples of kind 'few-s",
    ):
        assert text in str(caught.value)
    assert "few_shot: expected" in str(caught.value)
    for content, text in (
        ('[{"name": "a"}, {"kind": "few-shot"}]', r'expected a "name" for every expert; number 1 \(from 0\) has none'),
        ("{oops", "is not JSON"),
        ('{"name": "a"}', "must hold a list of objects"),
        ('{"experts": [], "stop": "x", "top_k": 0, "oops": 1}', "(?s)unknown part 'oops'.*stop must.*top_k must"),
        ('[{"name": "a", "dataset": "x"}, {"name": "b", "dataset": "x"}]', "names the one expert that is made for it"),
        ('[{"name": "a", "kind": "retrieval", "passages": "nosuch.txt"}]', "there is no file .*nosuch.txt"),
        ('[{"name": "a", "demonstrations": "nosuch.jsonl"}]', "there is no file .*nosuch.jsonl"),
        ('[{"name": "a"}, {"name": "a"}]', "distinct names"),
        ('[{"name": "a", "demonstrations": 3, "count": "4"}]', "demonstrations must be a text, got 3; count must be a"),
        ('[{"name": "a", "kind": "retrieval", "passages": "x", "passage_count": "x"}]', "at least 1, got 'x'"),
        ('{"experts": [{"name": "a"}], "few_shot": {"demonstrations": {"nq": 3}}}', "few_shot: expected"),
        ('{"experts": [{"name": "a"}], "top_k": 2}', "top_k is 2, and there is 1 expert"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=text):
            read_experts(file, fake_embedder)
    with pytest.raises(ValueError, match="there is no file .*nosuch.json: expected a list of prompt experts"):
        read_parts(tmp_path / "nosuch.json")
