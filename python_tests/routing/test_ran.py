"""Did it run: what the first forward passed by is named, once; what it had no use for is said; then nothing is left."""

from __future__ import annotations

import copy
import pickle
import warnings

import builders
import guard_cases as cases
import pytest
import torch
from torch import nn

import moerge_ext as moerge
from moerge_ext.training.gated_lora import gated_model

ALL = ["block.up", "block.down", "block.side", "other.up"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def said(model: nn.Module, paths, forward, **options) -> list[str]:
    """What the first forward of the patched model warns of; the second must be silent, with no hook left."""
    with moerge.patch(model, cases.experts(model, paths), **options), torch.no_grad():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            forward(model)
        assert hooks(model) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forward(model)
    return [str(w.message) for w in caught if "first forward" in str(w.message)]


def test_a_layer_that_was_passed_by_and_those_without_use():
    passed_by, unused = said(cases.Net(), ALL, lambda model: model(torch.randn(2, 8)))
    assert "did not call these layers with experts: block.down. Block ran" in passed_by
    assert "did not use these layers with experts: block.side, other." in unused


def test_strict_is_an_error():
    model = cases.Net()
    with moerge.patch(model, cases.experts(model, ALL), strict=True):
        with pytest.raises(RuntimeError, match=r"did not call these layers with experts: block\.down"):
            model(torch.randn(2, 8))
        assert hooks(model) == 0
    with moerge.patch(model, cases.experts(model, ["block.up", "other.up"]), strict=True), pytest.warns(UserWarning):
        model(torch.randn(2, 8))  # no use for `other` is no error


def test_no_layer_at_all():
    model = cases.Net()
    handle = moerge.patch(model, cases.experts(model, ["other.up"]), strict=True)
    with handle, pytest.raises(RuntimeError, match="called none of the 1 layers with experts"):
        model(torch.randn(2, 8))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_ordinary_models_are_silent(family):
    model = builders.tiny_llama() if family == "llama" else builders.tiny_t5()
    if family == "t5":
        # the encoder runs before the first forward of the whole model
        assert said(model, cases.linears(model), lambda m: m.generate(cases.ids(2, 5), max_new_tokens=3)) == []
    else:
        assert said(model, cases.linears(model), lambda m: m(cases.ids(2, 5)), strict=True) == []


def test_text_alone_through_a_model_with_images():
    model = cases.llava()
    [text] = said(model, cases.linears(model), lambda m: m(cases.ids(2, 5)), strict=True)
    assert "did not use these layers with experts: model.vision_tower, model.multi_modal_projector." in text


def test_experts_of_a_mixture_that_no_token_chose():
    model = cases.switch()
    inputs = {"input_ids": cases.ids(1, 3), "decoder_input_ids": cases.ids(1, 2)}
    [text] = said(model, cases.linears(model), lambda m: m(**inputs), strict=True)
    assert "encoder.block.*.layer.*.mlp.experts.expert_* (" in text


def test_a_failed_forward_does_not_count():
    model = cases.Net()
    with moerge.patch(model, cases.experts(model, ALL)):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 9))
        with pytest.warns(UserWarning, match=r"block\.down"):
            model(torch.randn(2, 8))


def test_parts_that_ran_alone_are_judged_at_the_end():
    model = cases.Net()
    handle = moerge.patch(model, cases.experts(model, ALL))
    model.block(torch.randn(2, 8))
    with pytest.warns(UserWarning, match=r"did not call these layers with experts: block\.down"):
        handle.remove()
    assert hooks(model) == 0


def test_copies_watch_for_themselves():
    model = cases.Net()
    moerge.patch(model, cases.experts(model, ALL))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = hooks(model)
        with pytest.warns(UserWarning, match=r"block\.down"):
            other(torch.randn(2, 8))
        assert hooks(other) == 0 and hooks(model) == before > 0
    moerge.get_handle(model).remove()
    assert hooks(model) == 0


def test_compiled_before_the_first_forward():
    model = cases.Net()
    with moerge.patch(model, cases.experts(model, ALL)), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = torch.randn(2, 8)
        with pytest.warns(UserWarning, match=r"block\.down"):
            first = compiled(x)
        assert torch.equal(first, compiled(x)) and torch.allclose(first, model(x), atol=1e-6)
    model = builders.tiny_llama()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with warnings.catch_warnings(), moerge.patch(model, cases.experts(model, cases.linears(model)), strict=True):
        warnings.simplefilter("error", UserWarning)
        with torch.no_grad():
            model(cases.ids(2, 5))


def adapter_on(model: nn.Module, paths, folder):
    sizes = {path: model.get_submodule(path) for path in paths}
    modules = {p: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2)) for p, m in sizes.items()}
    return builders.write_adapter(folder, modules, r=2)


def test_gate_training_says_it_too(tmp_path):
    model = cases.Net()
    folder = adapter_on(model, ["block.up", "block.down"], tmp_path)
    text = r"layers whose gates are trained: block\.down"
    with gated_model(model, folder), pytest.warns(UserWarning, match=text):
        model(torch.randn(2, 8))
    assert hooks(model) == 0


def test_gate_training_refuses_what_is_never_called(tmp_path):
    model = cases.mamba()
    folder = adapter_on(model, ["backbone.layers.0.mixer.dt_proj"], tmp_path)
    with pytest.raises(ValueError, match="MambaMixer reads its weight"), gated_model(model, folder):
        pass


def test_expert_training(tmp_path):
    pytest.importorskip("peft")
    model, x = cases.llama4(), cases.ids(1, 4)
    with pytest.warns(UserWarning, match=r"all-linear leaves out model\.layers\.0\.feed_forward\.router"):
        moerge.train_expert(model, [{"input_ids": x, "labels": x}], tmp_path / "a", rank=2, steps=1, progress=False)
    assert hooks(model) == 0
    bank = moerge.load_experts([tmp_path / "a"])
    assert "model.layers.0.self_attn.q_proj" in bank.modules and not any("router" in name for name in bank.modules)
    with pytest.raises(ValueError, match=r"target_modules names:\n- backbone\.layers\.0\.mixer\.dt_proj"):
        moerge.train_expert(
            cases.mamba(), [{"input_ids": x, "labels": x}], tmp_path / "b", rank=2, steps=1, progress=False,
            target_modules=["in_proj", "dt_proj"],
        )  # fmt: skip


class Plain(nn.Module):
    """As PEFT wants a model that is not of transformers, with a loss."""

    def __init__(self):
        super().__init__()
        self.net = cases.Net()

    def forward(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(loss=self.net(x).square().mean())


def test_expert_training_names_what_it_passed_by(tmp_path):
    pytest.importorskip("peft")
    data = [{"x": torch.randn(2, 8)}]
    with pytest.warns(UserWarning, match=r"layers whose LoRA is trained: .*block\.down"):
        moerge.train_expert(Plain(), data, tmp_path, rank=2, steps=1, progress=False, target_modules=["up", "down"])
