"""`--model moerge` of lm-evaluation-harness: its numbers are those of the patched model."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import builders
import pytest
import torch
from query_cases import fake_embedder

import moerge_ext as moerge
from moerge_ext.commands import main as cli

ASKED = ["ab", "hello there", "xyz", "a b c"]
CHOICES = ["cd", "efg", "h"]
KINDS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n",
    "written": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\nmetric_list:\n  - metric: exact_match\n"
    "generation_kwargs:\n  until: ['~']\n  max_gen_toks: 5\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_target: '{{q}}'\n"
    "metric_list:\n  - metric: word_perplexity\n",
}


def test_without_lm_eval_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "moerge_ext.commands.harness", raising=False)
    assert cli.main(["lm-eval", "run", "--model", "moerge"]) == 2
    assert 'pip install "moerge_ext[lm-eval]"' in capsys.readouterr().err


def test_only_lm_eval_takes_arguments_that_are_not_ours(capsys):
    with pytest.raises(SystemExit):
        cli.main(["methods", "--oops"])
    said = capsys.readouterr().err
    assert said.startswith("usage: moerge methods ") and "unrecognized arguments: --oops" in said


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    root = tmp_path_factory.mktemp("lm_eval")
    model = builders.tiny_llama()
    model.save_pretrained(root / "model")
    tokenizer = builders.make_tokenizer(root / "model")
    folders = builders.random_experts(model, root / "experts", ["ant", "bee"], ["q_proj", "up_proj"])
    (root / "tasks").mkdir()
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": text, "choices": CHOICES}) + "\n" for text in ASKED))
    for name, rest in KINDS.items():
        text = "" if name == "rolling" else "{{q}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n"
        (root / "tasks" / f"{name}.yaml").write_text(f"{head}doc_to_text: '{text}'\n{rest}")
    return root, model, tokenizer, folders


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def asked(ready, tmp_path, tasks, *model_args, model="moerge"):
    """{task: lm-eval's samples}, by the real command."""
    root = ready[0]
    words = ["lm-eval", "run", "--model", model, "--tasks", tasks, "--include_path", root / "tasks", "--batch_size", 3]
    words += ["--device", "cpu", "--log_samples", "--output_path", tmp_path / "out"]
    assert cli.main([*map(str, words), "--model_args", ",".join([f"pretrained={root / 'model'}", *model_args])]) == 0
    found = {}
    for task in tasks.split(","):
        (path,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        found[task] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found


def experts_of(ready):
    return f"experts={ready[0]}/experts/*"


def sums(ready, prompt, answer):
    """log p(answer | prompt) of the model as it is, and of the whole text."""
    _, model, tokenizer, _ = ready
    whole, start = tokenizer(prompt + answer).input_ids, len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    each = logs[:-1].gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    return each[start - 1 :].sum().item()


def compare(ready, samples, per_prompt):
    """The log-likelihoods and the texts of `samples` against the patched model, asked one by one."""
    _, model, tokenizer, _ = ready
    for sample, prompt in zip(samples.get("choice", ()), ASKED, strict=True):
        with per_prompt(prompt):
            want = [sums(ready, prompt, " " + choice) for choice in CHOICES]
        got = [float(value) for ((value, _),) in sample["resps"]]
        assert got == pytest.approx(want, abs=1e-3), prompt
    for sample, prompt in zip(samples.get("written", ()), ASKED, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with per_prompt(prompt):
            out = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert sample["resps"] == [[tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]]


@pytest.mark.slow
def test_numbers_are_the_patched_models(ready, tmp_path):
    import contextlib

    _, model, _, folders = ready
    every = "choice,written,rolling"
    samples = asked(ready, tmp_path / "routed", every, experts_of(ready), "method=phatgoose/top_k=1")
    with moerge.patch(model, moerge.load_experts(folders), top_k=1):
        compare(ready, samples, lambda prompt: contextlib.nullcontext())
    base = asked(ready, tmp_path / "base", every, "method=base")
    compare(ready, base, lambda prompt: contextlib.nullcontext())
    theirs = asked(ready, tmp_path / "hf", every, model="hf")
    for task in every.split(","):
        same = [a["resps"] == b["resps"] for a, b in zip(base[task], theirs[task], strict=True)]
        assert all(same), task
        assert samples[task] != base[task]


@pytest.mark.slow
def test_queries_are_the_contexts_of_the_batch(ready, tmp_path, monkeypatch, capsys):
    """Batches of three, sorted by length and grouped as lm-eval likes, each row routed by its own context."""
    _, model, _, folders = ready
    for i, folder in enumerate(folders.values()):
        moerge.index_examples(folder, [{"input": text} for text in ASKED[2 * i : 2 * i + 2]], fake_embedder())
    monkeypatch.setattr("moerge_ext.commands.options.build_embedder", lambda *_: fake_embedder())
    args = (experts_of(ready), "method=centroid", "embedder=bag")
    samples = asked(ready, tmp_path, "choice,written", *args)
    experts = moerge.load_experts(folders)
    with moerge.patch(model, experts, "centroid") as handle:
        handle.router = moerge.ExampleRouter(experts, fake_embedder())
        compare(ready, samples, handle.queries)
    for more, text in (
        (("rolling", *args), "this task has requests without one"),
        (("choice", experts_of(ready), "method=lorahub"), "decides for a whole task"),
        (("choice", "method=phatgoose"), "needs experts=DIR:DIR"),
        (("choice", "experts=/nowhere/*"), "experts=/nowhere/*: there is no such folder"),
        (("choice", "method=oracle_dataset"), "by `moerge eval`"),
    ):
        root = ready[0]
        words = ["lm-eval", "run", "--model", "moerge", "--tasks", more[0], "--include_path", root / "tasks"]
        words += ["--device", "cpu", "--model_args", ",".join([f"pretrained={root / 'model'}", *more[1:]])]
        assert cli.main([*map(str, words)]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.slow
def test_lm_eval_finds_it_by_itself_where_it_looks(ready):
    """The entry point names the class; versions that read no entry points have `moerge lm-eval`."""
    code = (
        "from moerge_ext.commands import harness; from lm_eval.api.registry import get_model as g; print(g('moerge'))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600).stdout
    assert "moerge_ext.commands.harness.MoergeLM" in said
    found = [e for e in importlib.metadata.entry_points(group="lm_eval.models") if e.name == "moerge"]
    assert not found or found[0].load().__name__ == "MoergeLM"
