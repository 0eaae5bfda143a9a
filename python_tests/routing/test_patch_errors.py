"""Refusals of patch: one ValueError with everything wrong in it, and a model that nothing has touched."""

from __future__ import annotations

import builders
import patch_cases as cases
import pytest
import torch
from patch_cases import NAMES, snapshot
from torch import nn

import moerge_ext as moerge

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama():
    return cases.build("llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory, llama):
    return cases.bank("llama", llama, tmp_path_factory.mktemp("experts"))


def refused(model, *args, **options) -> str:
    """The text of the ValueError; the model must be as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        moerge.patch(model, *args, **options)
    assert cases.same(before, snapshot(model))
    return str(caught.value)


def one_module(path: str, d: int, o: int, names=NAMES) -> moerge.ExpertBank:
    parts = moerge.ModuleBank(
        torch.randn(len(names), 2, d),
        torch.randn(len(names), o, 2),
        gates={"sigmoid-gate": torch.randn(len(names), d)},
    )
    return moerge.ExpertBank(names, {path: parts})


@pytest.mark.parametrize(
    "options, texts",
    [
        ({"method": "phatgose"}, ["phatgose", "did you mean 'phatgoose'", "moerge methods"]),
        ({"method": None}, ["None", "phatgoose"]),
        ({"method": "expert:dog"}, ["no expert named 'dog'", "ant, bee, cat"]),
        ({"top_k": 4}, ["top_k=4", "E=3"]),
        ({"top_k": 0}, ["top_k must be a positive integer", "0"]),
        ({"topk": 2, "tmp": 1}, ["unknown option(s) tmp, topk", "top_k"]),
        ({"method": "merged", "top_k": 2}, ["unknown option(s) top_k"]),
        ({"weighting": "hard", "normalize": "l2"}, ["weighting must be", "'hard'", "normalize must be", "'l2'"]),
        ({"aggregation": "sum"}, ["'output' or 'factored'", "'sum'"]),
        ({"backend": "cuda"}, ["'native' or 'reference'", "'cuda'"]),
        ({"method": "arrow", "top_k": 4}, ["top_k=4 is more than the number of experts, E=3"]),
        (
            {"method": "average_activation"},
            ["module 'model.layers.0.mlp.down_proj'", "average-activation", "'ant'", "moerge"],
        ),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_arguments(llama, experts, options, texts):
    message = refused(llama, experts, **options)
    assert all(text in message for text in texts), message


def test_shapes_and_paths_are_listed_together(llama, experts):
    modules = {
        DOWN: one_module(DOWN, 48, 33).modules[DOWN],
        "model.layers.7.mlp.up_proj": one_module("a", 32, 48).modules["a"],
        "layers.0.mlp.up_proj": one_module("a", 32, 48).modules["a"],
        "model.embed_tokens": one_module("a", 96, 32).modules["a"],
        "model.layers.0.mlp": one_module("a", 32, 32).modules["a"],
    }
    message = refused(llama, moerge.ExpertBank(NAMES, modules), top_k=5)
    for text in (
        "top_k=5",
        f"module '{DOWN}': the layer is D=48 -> O=32, the experts are D=48 -> O=33",
        "'model.layers.7.mlp.up_proj' of the experts is not in LlamaForCausalLM",
        "it has 'model.layers.0.mlp.up_proj'",
        "'model.embed_tokens' is not a linear layer but Embedding",
        "'model.layers.0.mlp' is not a linear layer but LlamaMLP",
    ):
        assert text in message, (text, message)


def test_one_line_for_each_cause(llama, experts):
    modules = {f"nowhere.{i}": one_module("a", 4, 4).modules["a"] for i in range(50)}
    message = refused(llama, moerge.ExpertBank(NAMES, modules))
    assert message.count("\n") == 1 and "'nowhere.0'" in message and "and 47 more modules" in message
    assert "rename=" in message and 'missing="drop"' in message and "modules=" in message


def test_a_long_list_is_cut(llama, experts, monkeypatch):
    """Every layer is of another wrong size: as many causes."""
    monkeypatch.setattr("moerge_ext.routing.planning._SHOWN", 5)
    paths = [path for path, layer in llama.named_modules() if isinstance(layer, nn.Linear)]
    modules = {path: one_module("a", 100 + i, 7).modules["a"] for i, path in enumerate(paths)}
    message = refused(llama, moerge.ExpertBank(NAMES, modules))
    assert message.count("\n") == 6 and f"... and {len(paths) - 5} more" in message


def test_experts_of_another_model(tmp_path, llama, monkeypatch):
    """The first line says which model they were made for and which this is."""
    monkeypatch.setattr(llama.config, "_name_or_path", "hub/llama")
    bank = cases.bank("gpt2", cases.build("gpt2"), tmp_path)
    for method in ("phatgoose", "merged"):
        first, *lines = refused(llama, bank, method=method).splitlines()
        assert first.endswith(
            ": 'ant', 'bee', 'cat' were made for 'tiny'; this model is 'hub/llama' (LlamaForCausalLM):"
        ), first
        assert "transformer.h.0.attn.c_attn" in lines[0]


def test_experts_for_other_sizes(tmp_path, llama):
    """Also where the names fit and the shapes do not; not where the model is not what is wrong."""
    other = builders._build(type(llama), type(llama.config)(**builders._DECODER | {"hidden_size": 64}))
    bank = cases.bank("llama", other, tmp_path)
    assert "'cat' were made for 'tiny'; this model is a LlamaForCausalLM:\n" in refused(llama, bank)
    with pytest.raises(ValueError, match="made for 'tiny'; this model is a LlamaForCausalLM") as caught:
        moerge.average_activation(llama, tmp_path / "ant", [{"input_ids": torch.ones(1, 2).long()}], progress=False)
    assert "[out, in], the model's is" in str(caught.value)
    assert "made for" not in refused(other, bank, top_k=9)


def test_no_module_at_all(llama):
    assert "no LoRA module" in refused(llama, moerge.ExpertBank(NAMES, {}))


def test_missing_gates_name_every_expert_and_module(llama, tmp_path):
    folders = builders.random_experts(llama, tmp_path, ["ant"], ("q_proj",))
    folders |= builders.random_experts(llama, tmp_path, ["bee", "cat"], ("q_proj",), gates=False)
    message = refused(llama, moerge.load_experts(folders))
    for text in ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "'bee'", "'cat'", "train-gates"):
        assert text in message
    assert "'ant'" not in message


def test_patched_twice(llama, experts):
    with moerge.patch(llama, experts):
        assert "patched already" in refused(llama, experts, method="merged")
        assert "patched already" in refused(llama.model, experts)


def test_shared_layers():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, shared)
    modules = {path: one_module(path, 8, 8).modules[path] for path in "01"}
    assert "'0' and '1' are one shared layer" in refused(model, moerge.ExpertBank(NAMES, modules))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_weights_on_meta(experts, backend):
    with torch.device("meta"):
        model = cases.build("llama")
    with pytest.raises(ValueError, match="meta device"):
        moerge.patch(model, experts, backend=backend)
    assert not any(isinstance(module, moerge.RoutedLinear) for module in model.modules())


def test_a_failure_halfway_leaves_the_model_alone(llama, experts, monkeypatch):
    calls = []
    original = moerge.RoutedLinear.__init__

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("out of memory, say")
        original(self, *args, **options)

    monkeypatch.setattr(moerge.RoutedLinear, "__init__", failing)
    assert "say" in refused(llama, experts)


# ---- affinities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, text",
    [
        (torch.zeros(2, 4), r"\[N, E=3\] or \[E=3\], got \[2, 4\]"),
        (torch.zeros(0, 3), r"got \[0, 3\]"),
        (torch.zeros(1, 2, 3), r"got \[1, 2, 3\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.tensor([0.0, float("nan"), 0.0]), "finite"),
        (torch.tensor([0.0, float("inf"), 0.0]), "finite"),
        ({"ant": 1.0, "wasp": 2.0}, "no expert 'wasp'; expected some of ant, bee, cat"),
        ({"ant": "much"}, r"must be numbers \[N, E=3\] or \[E=3\], or {name: number}, got \['much', 0.0, 0.0\]"),
        ("ant", "must be numbers .*, got 'ant'"),
        ({}, "names no expert; expected some of ant, bee, cat"),
    ],
)
def test_wrong_affinities(llama, experts, scores, text):
    with moerge.patch(llama, experts, method="glider") as handle:
        with pytest.raises(ValueError, match=text), handle.affinities(scores):
            pass
        with pytest.raises(RuntimeError, match=r"handle\.affinities"):
            cases.logits(llama, **cases.batch("llama"))


def test_affinities_need_a_method_that_takes_them(llama, experts):
    text = "'phatgoose' takes no affinities: 'given' takes any weights"
    with (
        moerge.patch(llama, experts) as handle,
        pytest.raises(ValueError, match=text),
        handle.affinities(torch.ones(3)),
    ):
        pass


def test_rows_must_share_the_tokens_evenly(llama, experts):
    patched = moerge.patch(llama, experts, method="glider")
    with patched as handle, handle.affinities(torch.zeros(3, 3)), pytest.raises(ValueError, match="batch of 2"):
        cases.logits(llama, **cases.batch("llama", rows=2))


def test_paths_instead_of_a_bank(llama):
    assert "experts must be an ExpertBank, from load_experts(...), got list" in refused(llama, ["path/a"])


def test_a_top_k_beyond_the_experts_says_what_to_pass(llama, experts):
    assert "pass top_k=3, or None for all" in refused(llama, experts, method="arrow", top_k=4)


def test_the_same_problem_in_many_modules_is_one_line(llama, experts):
    assert refused(llama, experts, method="expert:dog").count("no expert named 'dog'") == 1
    text = refused(llama, experts, method="average_activation")
    assert text.count("\n") == 1 and f"and {len(experts.modules) - 3} more modules" in text


def test_a_removed_handle_says_so(llama, experts):
    handle = moerge.patch(llama, experts, method="glider")
    handle.remove()
    with pytest.raises(ValueError, match="this handle was removed"), handle.record():
        pass
    with pytest.raises(ValueError, match="this handle was removed"), handle.affinities(torch.ones(3)):
        pass
