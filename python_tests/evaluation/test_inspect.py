"""The probe beside a routed layer, KL to the oracle, heatmaps, and `moerge inspect`."""

from __future__ import annotations

import json
import math

import builders
import patch_cases as cases
import pytest
import torch
from builders import make_tokenizer
from test_evaluation import make_task

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.evaluation.composition import report, top_experts
from moerge_ext.evaluation.inspect import Inspection, correlations, inspect, pearson
from moerge_ext.evaluation.probe import ModuleSums, probe
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import load_task


def test_probe_sees_the_whole_softmax(tmp_path):
    model = cases.build("llama")
    experts = cases.bank("llama", model, tmp_path)
    inputs = {"input_ids": cases.tokens(1, 9)}
    with moerge.patch(model, experts, top_k=1) as handle:
        plain = cases.logits(model, **inputs)
        seen = []
        layer = model.get_submodule(handle.modules[0])
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        with probe(model) as sums, handle.record() as trace:
            assert torch.equal(cases.logits(model, **inputs), plain)
        hook.remove()
        standard = torch.nn.functional.layer_norm(seen[0][0].double(), (layer.in_features,))
        p = (standard @ layer.gates.double().T / math.sqrt(layer.in_features)).softmax(-1)
        got = sums[layer.name]
        torch.testing.assert_close(got.distribution, p.sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.weight, trace.load()[layer.name], rtol=1e-5, atol=1e-6)
        assert got.tokens == 9 and got.entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
        assert got.token_divergence(2) == pytest.approx(-p[:, 2].log().mean().item(), rel=1e-5)
    with moerge.patch(model, experts, method="merged"), pytest.raises(ValueError, match="routes nothing"):
        probe(model).__enter__()


def test_uniform_routing_is_log_e_from_every_oracle(tmp_path):
    model = cases.build("llama")
    experts = cases.bank("llama", model, tmp_path)
    for module in experts.modules.values():
        module.gates["sigmoid-gate"].zero_()
    task = load_task(make_task(tmp_path / "tasks", "bee", rows=2))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    (found,) = inspect(model, tokenizer, experts, [parse_run("phatgoose")], [task], progress=False)
    assert found.oracle == "bee"  # the expert of the task's name
    assert found.divergence == pytest.approx(math.log(3), rel=1e-5)
    assert found.entropy == pytest.approx(math.log(3), rel=1e-5)
    (named,) = inspect(
        model, tokenizer, experts, [parse_run("phatgoose")], [task], oracles={"bee": "cat"}, progress=False
    )
    assert named.oracle == "cat" and named.to_oracle == 0  # ties go to the lower ids
    with pytest.raises(ValueError, match="there is no dog among ant, bee, cat"):
        inspect(model, tokenizer, experts, [], [task], oracles={"bee": "dog"})


def test_kl_to_the_oracle_averages_the_probabilities_first():
    """Tokens that go to different experts: KL of the mean, not the mean of the KLs; modules by their tokens."""

    def sums(*rows):
        p = torch.tensor(rows, dtype=torch.float64)
        return ModuleSums(p.sum(0), p.sum(0), p.log().sum(0), 0.0, len(rows))

    modules = {"a": sums([0.9, 0.1], [0.1, 0.9]), "b": sums([0.2, 0.8], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8])}
    found = Inspection("m", "t", ("x", "y"), "x", modules)
    assert found.divergence == pytest.approx(-math.log((0.9 + 0.1 + 0.2 + 0.4 + 0.4 + 0.2) / 6))
    each = [-(math.log(0.9) + math.log(0.1)) / 2, -(math.log(0.2) + math.log(0.4)) / 2]
    assert found.token_divergence == pytest.approx(sum(each) / 2) and found.token_divergence > found.divergence
    never = Inspection(
        "m", "t", ("x", "y"), "x", {"a": ModuleSums(*torch.tensor([[0.0, 1], [0, 1], [-87, 0]]), tokens=1)}
    )
    assert 80 < never.divergence < 90
    # the coefficient is of that KL: with shares of 0.5, 0.25 and 0.125 it is linear in log2
    three = [Inspection("m", str(i), ("x", "y"), "x", {"a": sums([0.5**i, 1 - 0.5**i])}) for i in (1, 2, 3)]
    assert correlations(three, {("m", str(i)): i / 10 for i in (1, 2, 3)})["m"] == pytest.approx(1)


def test_a_task_is_told_by_its_experts_and_their_examples(tmp_path):
    """GLIDER's appendix B: the two experts with most of the applied weight, an example of each where there is one."""
    experts = cases.bank("llama", cases.build("llama"), tmp_path)
    experts.set_gates("cat", {}, "instruction-embedding", torch.ones(4), {"instruction": "Purr."})
    tasks = [load_task(make_task(tmp_path / "tasks", name, rows=2)) for name in ("new", "bee")]

    def sums(*weight):
        weight = torch.tensor(weight, dtype=torch.float64)
        return ModuleSums(torch.ones(3), weight, torch.ones(3), tokens=10)

    modules = {"a": sums(1.0, 4.0, 5.0), "b": sums(0.0, 3.0, 7.0)}
    found = [
        Inspection("m", "new", experts.names, None, modules),
        Inspection("m", "bee", experts.names, "bee", modules),
    ]
    assert top_experts(found[0]) == [("cat", pytest.approx(0.6)), ("bee", pytest.approx(0.35))]
    text = report(found, tasks, experts)
    assert "## new\n\n> Question: new x\n>\n> Answer: ab\n\n- m: cat 60.0%, bee 35.0%\n" in text
    assert "### expert cat: Purr.\n\n### expert bee\n\n> Question: bee x\n" in text
    assert "- m: cat 60.0%, bee 35.0% (the best expert: bee)" in text and text.count("### expert bee") == 1


def test_correlation():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    x, y = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double()
    assert pearson(x.tolist(), y.tolist()) == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item())
    assert pearson([1, 2], [1, 2]) is None and pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([0.7] * 5, [0.1, 0.2, 0.4, 0.9, 0.3]) is None and pearson([0, 0, 0], [1, 2, 3]) is None
    unknown = Inspection("m", "t", ("a",), None, {})
    assert correlations([unknown], {("m", "t"): 0.5}) == {"m": None}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_inspect_command(family, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = cases.build(family)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    folders = builders.random_experts(model, tmp_path / "experts", cases.NAMES, cases.FAMILIES[family][1])
    tasks = [make_task(tmp_path / "tasks", name) for name in ("ant", "bee", "other")]
    results = tmp_path / "results.json"
    rows = [("phatgoose", "ant", 0.1), ("phatgoose", "bee", 0.5), ("phatgoose", "other", 0.2)]
    rows += [("expert:ant", "other", 0.1), ("expert:cat", "other", 0.4), ("expert:cat", "bee", 0.0)]
    rows += [("expert:bee", "ant", 0.2), ("expert:cat", "ant", 0.2)]  # none is best: the task's name says it
    results.write_text(json.dumps([{"method": m, "task": t, "score": s} for m, t, s in rows]))
    words = [
        "inspect",
        "--overwrite",
        "--model",
        tmp_path / "model",
        "--experts",
        *folders.values(),
        "--tasks",
        *tasks,
        "--limit",
        2,
    ]
    words += ["--results", results, "--oracle", "bee=bee", "--no-progress", "--output", tmp_path / "out"]
    assert cli.main([str(w) for w in [*words, "--methods", "phatgoose,arrow", "--top-k", "2"]]) == 0
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    oracles = {row["task"]: row["oracle"] for row in report["rows"]}
    assert oracles == {"ant": "ant", "bee": "bee", "other": "cat"}
    assert -1 <= report["pearson_kl_score"]["phatgoose"] <= 1 and report["pearson_kl_score"]["arrow/top_k=2"] is None
    for row in report["rows"]:
        assert all(sum(shares) == pytest.approx(1, abs=1e-5) for shares in row["modules"].values())
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    parts = ("-decoder", "-encoder") if family == "t5" else ("",)
    assert pictures == [f"routing-{m}{part}.png" for m in ("arrow_top_k=2", "phatgoose") for part in parts]
    assert "Pearson" in capsys.readouterr().out
    text = (tmp_path / "out" / "composition.md").read_text()
    assert (
        "## other\n\n> Question: other x\n>\n> Answer: ab\n\n- phatgoose: " in text and "(the best expert: cat)" in text
    )
    assert cli.main([str(w) for w in [*words, "--methods", "merged"]]) == 2
    assert "routes nothing" in capsys.readouterr().err
    results.write_text("{}")
    for more, text in (
        (["--oracle", "x"], "TASK=EXPERT, got 'x'"),
        (["--methods", "oracle_dataset"], "methods that route"),
    ):
        assert cli.main([str(w) for w in [*words, *more]]) == 2
        assert text in capsys.readouterr().err
