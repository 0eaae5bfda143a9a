"""Gates of LoRAs on the fused experts of mixture-of-experts models: trained, averaged, and routed by."""

import moe_cases as cases
import patch_cases
import pytest
import torch
from gate_builders import quiet  # noqa: F401 (used by being here)
from patch_cases import error, logits

import moerge_ext as moerge
from moerge_ext.experts.gates import read_gates
from moerge_ext.training.gated_lora import gated_model

UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def batches(count: int = 3, padded: int = 0) -> list[dict[str, torch.Tensor]]:
    made = []
    for seed in range(count):
        ids = patch_cases.tokens(seed=seed)
        mask = torch.ones_like(ids)
        mask[:, :padded] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return made


@pytest.fixture(params=["apart", "whole"])
def trained(request, tmp_path):
    """(model, adapter folder, its deltas)."""
    model = cases.build("mixtral")
    deltas = cases.adapter("mixtral", model, tmp_path / "ant", 1, layout=request.param, linear="q_proj")
    return model, tmp_path / "ant", deltas


def test_without_gates_it_is_the_plain_lora_and_with_zero_gates_half_of_it(trained):
    model, folder, deltas = trained
    before, ids = patch_cases.snapshot(model), patch_cases.tokens()
    for gate, strength in ((False, 1.0), (True, 0.5)):
        with gated_model(model, folder, gate=gate):
            got = logits(model, input_ids=ids)
        assert error(got, logits(cases.changed("mixtral", deltas, strength), input_ids=ids)) < 1e-5
    assert patch_cases.same(before, patch_cases.snapshot(model))


def test_the_gradient_of_a_gate_is_that_of_finite_differences(trained):
    model, folder, _ = trained
    model.double().set_experts_implementation("eager")  # grouped_mm has no float64
    (batch,) = batches(1)
    loss = lambda: model(input_ids=batch["input_ids"]).logits.square().mean()  # noqa: E731
    with gated_model(model, folder) as gated:
        loss().backward()
        for path in (UP, DOWN):
            gate = gated.layers[path].gate
            step = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0))
            losses = []
            for sign in (1e-3, -1e-3):
                with torch.no_grad():
                    gate.add_(step, alpha=sign)
                    losses.append(loss())
                    gate.sub_(step, alpha=sign)
            slope = (losses[0] - losses[1]) / 2e-3
            assert torch.isclose(slope, (gate.grad * step).sum().double(), rtol=1e-3), path


def test_trained_gates_lie_under_the_parameters_and_are_routed_by(trained):
    model, folder, _ = trained
    before = patch_cases.snapshot(model)
    moerge.train_gates(model, folder, batches(), steps=3, lr=0.1, progress=False)
    assert patch_cases.same(before, patch_cases.snapshot(model))
    gates = read_gates(folder)["sigmoid-gate"].gates
    assert {UP, DOWN} <= set(gates) and all(gate.abs().max() > 0 for gate in gates.values())
    bank = moerge.load_experts({"ant": folder})
    with moerge.patch(model, bank, top_k=1) as handle, handle.record() as trace:
        logits(model, input_ids=patch_cases.tokens())
    assert {UP, DOWN} <= set(trace.counts())


def test_gates_that_somebody_else_trains_are_saved(trained):
    """As a Trainer does: no one says which of them took part."""
    model, folder, _ = trained
    with gated_model(model, folder) as gated:
        assert gated.untrained() == list(gated.layers)
        model(**batches(1)[0]).loss.backward()
        assert gated.untrained() == []
        with torch.no_grad():
            for layer in gated.layers.values():
                layer.gate += 1
        gated.save()
    assert read_gates(folder)["sigmoid-gate"].gates.keys() == gated.layers.keys()


def test_average_activations_leave_padding_out(trained):
    model, folder, deltas = trained
    seen: dict[str, list[torch.Tensor]] = {UP: [], DOWN: []}
    reference = cases.changed("mixtral", deltas)
    reference.set_experts_implementation("batched_mm")
    experts = reference.model.layers[0].mlp.experts
    gate = experts._apply_gate
    experts._apply_gate = lambda u: seen[DOWN].append(gate(u)) or seen[DOWN][-1]
    experts.register_forward_pre_hook(lambda module, args: seen[UP].append(args[0]))
    for batch in batches(padded=2):
        logits(reference, **batch)
    real = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches(padded=2)])
    moerge.average_activation(model, folder, batches(padded=2), progress=False)
    gates = read_gates(folder)["average-activation"].gates
    assert torch.allclose(gates[UP], torch.cat(seen[UP])[real].mean(0), atol=1e-5)
    assert torch.allclose(gates[DOWN], torch.cat(seen[DOWN])[real.repeat_interleave(2)].mean(0), atol=1e-5)


def test_joint_training_is_refused(trained, tmp_path):
    model, folder, _ = trained
    with pytest.raises(ValueError, match="joint=True trains the LoRA of linear layers.*fused experts"):
        moerge.train_gates(model, folder, batches(), steps=1, joint=True, output_dir=tmp_path / "out")


def test_a_patched_model_is_refused(trained):
    model, folder, _ = trained
    with moerge.patch(model, moerge.load_experts({"ant": folder}, modules="experts"), "expert:ant"):
        want = logits(model, input_ids=patch_cases.tokens())
        with pytest.raises(ValueError, match="already: remove that patch first"), gated_model(model, folder):
            pass
        assert torch.equal(logits(model, input_ids=patch_cases.tokens()), want)
