"""PELMo as rows of `moerge eval`, in one table with methods that route among LoRA experts."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager

import builders
import patch_cases as cases
import pytest
import torch
from query_cases import wide_tokenizer

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.ensemble.figure import plot_top_k
from moerge_ext.ensemble.measure import MIXED
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import Template, few_shot
from moerge_ext.ensemble.router import FORMAT, PromptRouter
from moerge_ext.ensemble.rows import EnsembleAnswerer
from moerge_ext.evaluation.runs import parse_run, with_top_k
from moerge_ext.evaluation.scores import Score

NAMES = ("x", "why", "z:")


def ensemble(folder, **options):
    experts = [few_shot(name, count=0, template=Template(question=name + " {input}")) for name in NAMES]
    return PromptEnsemble(cases.build("llama"), wide_tokenizer(folder), experts, **options)


def test_the_likelihood_of_an_answer_is_that_of_the_mixture(tmp_path):
    mix = ensemble(tmp_path)
    questions, answers = ["abc", "de"], ["no", "hello there"]
    ids, weights = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    want = []
    for question, answer, experts, shares in zip(questions, answers, ids.tolist(), weights.tolist(), strict=True):
        target = mix.asked.target_ids(answer)
        total = 0
        for t, token in enumerate(target):
            mean = 0
            for e, share in zip(experts, shares, strict=True):
                start = mix.asked.prompt_ids(mix.experts[e].prompt(question))
                logits = cases.logits(mix.asked.model, input_ids=torch.tensor([[*start, *target[:t]]]))
                mean += share * logits[0, -1].double().softmax(-1)[token]
            total += mean.log()
        want.append((float(total), float(total) / len(target)))
    for k, length_norm in enumerate((False, True)):
        got = mix.log_likelihoods(questions, answers, select=(ids, weights), length_norm=length_norm)
        torch.testing.assert_close(got, torch.tensor([w[k] for w in want], dtype=torch.float64), atol=1e-5, rtol=1e-5)
    alone = mix.log_likelihoods(questions, answers, select=(ids, torch.tensor([[1.0, 0.0]] * 2)), length_norm=False)
    prompts = [mix.experts[e].prompt(q) for e, q in zip((0, 1), questions, strict=True)]
    torch.testing.assert_close(
        alone, mix.asked.log_likelihoods(prompts, answers, length_norm=False), atol=1e-5, rtol=1e-5
    )


def test_the_words_of_a_run():
    run = parse_run("pelmo:a/b=c/p.json/top_k=3")
    assert (run.method, run.ensemble, run.options) == (None, "a/b=c/p.json", {"top_k": "3"})
    assert parse_run("pelmo:p.json/expert=x").options == {"expert": "x"} and parse_run("pelmo:p.json").options == {}
    assert with_top_k(["pelmo:p.json", "phatgoose"], 3) == ["pelmo:p.json", "phatgoose/top_k=3"]
    for wrong in ("pelmo:", "pelmo:/top_k=1", "pelmo:p/top_k=x", "pelmo:p/top_k=0", "pelmo:p/top_k=1/expert=x"):
        with pytest.raises(ValueError, match="expected pelmo:FILE"):
            parse_run(wrong)


@pytest.fixture
def folder(tmp_path):
    """A base with two LoRA experts, an ensemble of a prompt and one of them with its router, two tasks."""
    model = cases.build("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer = wide_tokenizer(tmp_path / "model")
    builders.random_experts(model, tmp_path, ["ant", "bee"], cases.DECODER)
    encoder = cases.build("bert")  # three outputs
    encoder.save_pretrained(tmp_path / "router")
    tokenizer.save_pretrained(tmp_path / "router")
    note = {"format": FORMAT, "experts": list(NAMES), "max_length": 16}
    (tmp_path / "router" / "moerge_router.json").write_text(json.dumps(note))
    entries = [{"name": name, "template": {"question": name + " {input}"}} for name in NAMES]
    entries[1]["lora"] = "ant"
    (tmp_path / "prompts.json").write_text(json.dumps({"experts": entries, "router": "router"}))
    for name, metric in (("open", "exact_match"), ("closed", "rank")):
        (tmp_path / name).mkdir()
        rows = [{"input": c * 3, "target": c, "choices": ["a", "b", "c"]} for c in "abc"]
        (tmp_path / name / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / name / "meta.json").write_text(json.dumps({"metric": metric}))
    return tmp_path


def evaluate(folder, methods, *more):
    words = [
        "eval",
        "--overwrite",
        "--model",
        folder / "model",
        "--experts",
        folder / "ant",
        folder / "bee",
        "--no-progress",
    ]
    words += ["--tasks", folder / "open", folder / "closed", "--max-new-tokens", 4, "--output", folder / "out"]
    return cli.main([str(word) for word in [*words, "--methods", methods, *more]])


def test_all_systems_stand_in_one_table(folder, capsys):
    file = folder / "prompts.json"
    runs = [f"pelmo:{file}", f"pelmo:{file}/top_k=1", f"pelmo:{file}/expert=why", "base", "merged"]
    assert evaluate(folder, ",".join(runs)) == 0
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert list(dict.fromkeys(row["method"] for row in rows)) == runs
    answers = {}
    for path in (folder / "out" / "answers").glob("*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        answers[lines[0]["settings"]["run"], path.parent.name] = [line["answer"] for line in lines[1:]]
    model = cases.build("llama")
    bank = moerge.load_experts({"ant": folder / "ant"})
    questions = ["aaa", "bbb", "ccc"]
    with moerge.patch(model, bank, "given", top_k=1) as handle:
        experts = [
            few_shot(n, count=0, template=Template(n + " {input}"), lora="ant" if n == "why" else None) for n in NAMES
        ]
        router = PromptRouter.load(folder / "router")
        mix = PromptEnsemble(model, wide_tokenizer(folder), experts, router, handle=handle)
        for run, want in (
            (runs[0], mix.answer(questions, max_new_tokens=4)),
            (runs[1], mix.answer(questions, top_k=1, max_new_tokens=4)),
            (runs[2], mix.answer_by("why", questions, max_new_tokens=4)),
        ):
            assert answers[run, "open"] == want and any(want)
        for i, question in enumerate(questions):
            likely = mix.log_likelihoods([question] * 3, ["a", "b", "c"])
            assert answers[runs[0], "closed"][i] == "abc"[int(likely.argmax())]
    assert answers[runs[2], "open"] != answers["base", "open"] != answers["merged", "open"]
    capsys.readouterr()
    assert evaluate(folder, ",".join(runs)) == 0 and "30 stored answers reused" in capsys.readouterr().out
    text = file.read_text().replace("z: {input}", "z= {input}")
    file.write_text(text)
    assert evaluate(folder, ",".join(runs)) == 0 and "18 stored answers reused" in capsys.readouterr().out


def test_rows_explain_what_is_missing(folder, capsys, monkeypatch):
    file = folder / "prompts.json"
    long = json.loads(file.read_text())
    (folder / "long.json").write_text(json.dumps({**long, "max_new_tokens": 126}))
    del long["router"]
    (folder / "none.json").write_text(json.dumps(long))
    for run, text in (
        (f"pelmo:{folder}/nosuch.json", "there is no file"),
        (f"pelmo:{folder}/none.json", "needs a router to answer"),
        (f"pelmo:{file}/top_k=4", "top_k must be between 1 and the number of experts, 3; got 4"),
        (f"pelmo:{file}/expert=me", "no prompt expert named 'me'; there are: x, why, z:"),
        (f"pelmo:{folder}/long.json", "task open: prompts with their answers do not fit the context of 128"),
        (f"pelmo:{file}/top_k=no", "expected pelmo:FILE"),
    ):
        assert evaluate(folder, run) == 2
        assert text in capsys.readouterr().err
    words = [
        "inspect",
        "--overwrite",
        "--model",
        folder / "model",
        "--experts",
        folder / "ant",
        "--tasks",
        folder / "open",
    ]
    assert cli.main([str(word) for word in [*words, "--methods", f"pelmo:{file}"]]) == 2
    assert "this model routes nothing" in capsys.readouterr().err


def test_an_answer_follows_its_cue(tmp_path):
    mix = ensemble(tmp_path)
    whole = EnsembleAnswerer(mix, expert="x", max_new_tokens=12).generate(["abc"], 1)[0]
    assert len(whole) > 2, "the ensemble's own limit counts"
    cut = EnsembleAnswerer(mix, expert="x", max_new_tokens=12, answer_after=whole[0], stop=()).generate(["abc"], 1)[0]
    assert cut == whole.rpartition(whole[0])[2].strip().removesuffix(".").strip()


@contextmanager
def files_up_to(size):
    """In place of a full disk: no file can grow beyond `size` bytes, not even for root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_picture_and_keeps_the_answers(folder, capsys):
    pytest.importorskip("matplotlib")
    words = [
        "ensemble",
        "--overwrite",
        "--model",
        folder / "model",
        "--prompts",
        folder / "prompts.json",
        "--no-progress",
    ]
    words += ["--data", folder / "open" / "test.jsonl", "--max-new-tokens", 2, "--output", folder / "made"]
    with files_up_to(6000):
        assert cli.main([*map(str, words)]) == 2
    assert f"'{folder / 'made' / 'results.png'}'" in capsys.readouterr().err
    made = {path.name: path.stat().st_mtime_ns for path in (folder / "made").rglob("*.json*")}
    assert "results.json" in made and not list((folder / "made").rglob(".*.tmp"))
    assert cli.main([*map(str, words)]) == 0 and (folder / "made" / "results.png").stat().st_size > 6000
    answers = list((folder / "made" / "answers").iterdir())
    assert answers and all(made[path.name] == path.stat().st_mtime_ns for path in answers)
    old = (folder / "made" / "top_k.png").read_bytes()
    scores = [Score(name, "open", "train", "exact_match", 2, 1.0, None, (1.0, 0.0)) for name in (f"{MIXED}1", "x")]
    with files_up_to(6000), pytest.raises(OSError, match="top_k.png"):
        plot_top_k(scores, ["x"], folder / "made" / "top_k.png")
    assert (folder / "made" / "top_k.png").read_bytes() == old
