"""Other implementations' numbers (../shared/conformance) through the public API: experts written as PEFT folders with
gate sidecars, `load_experts`, `patch`, a forward of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import write_adapter
from patch_cases import error, logits
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import moerge_ext as moerge
from moerge_ext.experts.formats.peft import write_gates

SIGMOID, AVERAGE = "sigmoid-gate", "average-activation"
BOUND = 1e-5


@pytest.fixture(scope="module")
def conformance(shared):
    return lambda name: load_file(shared / "conformance" / f"{name}.safetensors")


def layer(weight: Tensor) -> nn.Module:
    """A model of one linear layer, at the path "block.proj"."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})})
    model.block.proj.weight.data = weight.clone()
    return model


def bank(folder: Path, a, b, *, alpha: float | list[float], gates=None, kind=SIGMOID) -> moerge.ExpertBank:
    """Experts a [E,R,D], b [E,O,R] of the one layer, by way of PEFT folders."""
    folders = []
    for e in range(len(a)):
        scale = alpha[e] if isinstance(alpha, list) else alpha
        folders.append(write_adapter(folder / f"e{e}", {"block.proj": (a[e], b[e])}, r=a.shape[1], alpha=scale))
        if gates is not None:
            write_gates(folders[-1], {"block.proj": gates[e]}, kind=kind)
    return moerge.load_experts(folders)


@torch.no_grad()
def run(model, x, experts, affinities=None, **options) -> tuple[Tensor, Tensor, Tensor]:
    """(output, weights [..., E] dense, experts [..., K]) of the one layer."""
    with moerge.patch(model, experts, **options) as handle, handle.record(tokens=True) as trace:
        if affinities is None:
            out = model.block.proj(x)
        else:
            with handle.affinities(affinities):
                out = model.block.proj(x)
    weights, ids = trace.calls["block.proj"][0]
    dense = torch.zeros(len(weights), len(experts)).scatter_add(1, ids.long(), weights)
    return out, dense.view(*x.shape[:-1], -1), ids.view(*x.shape[:-1], -1)


def test_phatgoose_layer(conformance, tmp_path):
    data = conformance("phatgoose_layer")
    a, b, model = data["layer1"].transpose(1, 2), data["layer2"].transpose(1, 2), layer(data["W"])
    experts = bank(tmp_path / "gates", a, b, alpha=1, gates=data["gates"])
    out, *_ = run(model, data["x"], experts)
    assert error(out, data["out_top2"]) <= BOUND
    _, weights, _ = run(model, data["x"], experts, top_k=None)
    assert error(weights, data["weights_full_softmax"]) <= BOUND
    # the authors' Arrow baseline on the stored vectors
    vectors = bank(tmp_path / "vectors", a, b, alpha=1, gates=data["gates"], kind=AVERAGE)
    options = {"gate_norm": "none", "normalize": "none", "absolute": True, "scale": 1 / (10 * 64**0.5)}
    _, weights, _ = run(model, data["x"], vectors, method="average_activation", top_k=None, **options)
    assert error(weights, data["arrow_weights_T10"]) <= BOUND


def test_glider_layer(conformance, tmp_path):
    data = conformance("glider_layer")
    model = layer(data["W"])
    experts = bank(tmp_path, data["A"], data["B"], alpha=1, gates=data["gates_raw"])
    for alpha in (0, 3, 100):
        out, *_ = run(model, data["x"], experts, data["global_cos"], method="glider_code", alpha=alpha)
        assert error(out, data[f"out_scale{alpha}"]) <= BOUND, alpha
    for top_p in (0.25, 0.5, 0.75):
        out, *_ = run(model, data["x"], experts, top_k=None, top_p=top_p)
        assert error(out, data[f"out_topp{top_p}"]) <= BOUND, top_p


def test_peft_arrow(conformance, tmp_path):
    data = conformance("peft_arrow")
    model = layer(torch.zeros(48, 64))
    alpha = [scale * 8 for scale in data["scaling"].tolist()]
    experts = bank(tmp_path / "arrow", data["A"], data["B"], alpha=alpha)
    out, *_ = run(model, data["x"], experts, method="arrow_peft", seed=7)
    assert error(out, data["delta"]) <= BOUND


def test_mttl_layer(conformance, tmp_path):
    data = conformance("mttl_layer")
    x, model = data["x"], layer(data["Wbase"])
    a, b = data["A"].transpose(1, 2), data["B"].transpose(1, 2)
    phatgoose = bank(tmp_path / "phat", a, b, alpha=16, gates=data["protos"])
    _, weights, ids = run(model, x, phatgoose)
    assert torch.equal(ids.long(), data["phat_idx"])
    assert error(weights.gather(-1, ids.long()), data["phat_w"]) <= BOUND
    vectors = bank(tmp_path / "vectors", a, b, alpha=16, gates=data["protos"], kind=AVERAGE)
    _, weights, _ = run(model, x, vectors, method="average_activation_mttl")
    assert error(weights, data["avgact_w"]) <= BOUND
    arrow = {"method": "average_activation", "gate_norm": "none", "normalize": "none", "absolute": True, "scale": 1.0}
    after, weights, ids = run(model, x, vectors, **arrow)
    before, *_ = run(model, x, vectors, aggregation="factored", **arrow)
    assert torch.equal(ids.long(), data["arrow_idx"])
    assert error(weights.gather(-1, ids.long()), data["arrow_w"]) <= BOUND
    assert error(after - before, data["out_merge_after_True"] - data["out_merge_after_False"]) <= BOUND


@pytest.fixture
def tiny_t5(shared):
    """(T5 with the stored base weights, every tensor of the file, the number of experts, the rank)."""
    from transformers import T5Config, T5ForConditionalGeneration

    path = shared / "conformance" / "phatgoose_tiny_t5.safetensors"
    data = load_file(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    model = T5ForConditionalGeneration(T5Config(**json.loads(facts["cfg"]))).eval()
    state = {k[3:]: v for k, v in data.items() if k.startswith("sd.") and "_addons" not in k}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(k.endswith(("embed_tokens.weight", "lm_head.weight")) for k in missing)
    model.tie_weights()
    return model, data, int(facts["E"]), int(facts["r"])


def test_phatgoose_tiny_t5(tiny_t5, tmp_path):
    model, data, count, rank = tiny_t5
    modules = sorted(key[3:] for key in data if key.startswith("rw."))
    assert len(modules) == 36
    folders = []
    for e in range(count):
        addons = {m: f"sd.{m}._addons" for m in modules}
        factors = {m: tuple(data[f"{key}.expert_lora.layer{i}__{e}"].T for i in (1, 2)) for m, key in addons.items()}
        folders.append(write_adapter(tmp_path / f"e{e}", factors, r=rank, alpha=1, task_type="SEQ_2_SEQ_LM"))
        gates = {m: data[f"{key}.router.expert_embeddings__{e}"] for m, key in addons.items()}
        write_gates(folders[-1], gates, kind=SIGMOID)
    experts = moerge.load_experts(folders)
    inputs = {"input_ids": data["in.ids"], "attention_mask": data["in.mask"], "decoder_input_ids": data["in.dec"]}
    plain = logits(model, **inputs)
    for backend in ("native", "reference"):
        with moerge.patch(model, experts, backend=backend) as handle, handle.record(tokens=True) as trace:
            full = scores_of_all(model, handle)
            got = logits(model, **inputs)
        assert (got - data["out.logits"]).abs().max() <= 1e-4
        assert error(got, plain) > 0.01
        for module in modules:
            stored = data[f"rw.{module}"].reshape(-1, count)  # before the top-2
            assert error(full[module], stored) <= BOUND, module
            ((weights, ids),) = trace.calls[module]
            # what is recorded is without the padding, of which the decoder has none here
            of_encoder = module.startswith("encoder.") or module.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            best, order = (stored[data["in.mask"].bool().flatten()] if of_encoder else stored).topk(2)
            assert torch.equal(ids.long(), order), module
            assert error(weights, best / best.sum(-1, keepdim=True)) <= BOUND, module


def scores_of_all(model, handle) -> dict[str, Tensor]:
    """Module -> [T,E], filled by the next forward: the softmax over all experts at the layer's own input."""
    full: dict[str, Tensor] = {}

    def hook(routed, args):
        x = args[0].reshape(-1, routed.in_features)
        weights, ids = moerge.ops.route(x, routed.gates, top_k=len(handle.names))
        full[routed.name] = torch.zeros_like(weights).scatter(1, ids.long(), weights)

    for module in handle.modules:
        model.get_submodule(module).register_forward_pre_hook(hook)
    return full
