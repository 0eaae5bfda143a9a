"""Fixed experts, one expert and merges against PEFT's own forward on the same folders, float32, 1e-5."""

from __future__ import annotations

import copy
from pathlib import Path

import builders
import patch_cases as cases
import peft
import pytest
import torch
from patch_cases import DECODER, FAMILIES, batch, error, logits

import moerge_ext as moerge

pytestmark = [
    # PEFT takes the biases of lora_bias for pieces of a sharded tensor
    pytest.mark.filterwarnings("ignore:.*(lora_bias|invalid shape).*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3, "down_proj": 40}},
    "both_patterns_rslora": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 3, "gate_proj": 6},
        "alpha_pattern": {"o_proj": 5},
    },
    "lora_bias": {"lora_bias": True},
    "lora_bias_rslora": {"lora_bias": True, "use_rslora": True},
    "one_layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["q_proj"]},
}


@pytest.fixture
def llama():
    return cases.build("llama")


def lora(family="llama", r=4, alpha=8.0, **options) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(FAMILIES[family][1]),
        fan_in_fan_out=family == "gpt2",
        **options,
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """B = 0 of a fresh LoRA would hide everything; large factors would blow rounding up beyond the bound."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.15


def peft_model(base: torch.nn.Module, configs: dict[str, peft.LoraConfig]) -> peft.PeftModel:
    """A copy of `base` inside PEFT with one random adapter per config; the first one is active."""
    (first, config), *rest = configs.items()
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=first)
    for name, config in rest:
        model.add_adapter(name, config)
    randomize(model, 1)
    return model.eval()


def saved(model: peft.PeftModel, folder: Path) -> dict[str, Path]:
    model.save_pretrained(folder)
    return {name: folder / name if name != "default" else folder for name in model.peft_config}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_one_expert_of_weight_one(llama, tmp_path, options):
    theirs = peft_model(llama, {"only": lora(**options)})
    want = logits(theirs, **batch("llama"))
    experts = moerge.load_experts(saved(theirs, tmp_path))
    assert error(want, logits(llama, **batch("llama"))) > 0.01
    for path, module in experts.modules.items():
        experts.set_gates("only", {path: torch.randn(module.in_features)})
    for method, arguments in {
        "expert:only": {},
        "phatgoose": {"top_k": 1},
        "arrow": {"top_k": 1},
        "merged": {},
    }.items():
        with moerge.patch(llama, experts, method=method, **arguments):
            assert error(logits(llama, **batch("llama")), want) < 1e-5, method


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_expert_equals_set_adapter(family, tmp_path):
    """Three adapters of different ranks, from folders and from the live PEFT model."""
    model = cases.build(family)
    biases = family != "gpt2" and cases.saves_its_own_biases()
    configs = {
        "ant": lora(family),
        "bee": lora(family, r=7, alpha=3.0, use_rslora=True),
        "cat": lora(family, r=1, alpha=2.0, lora_bias=biases),
    }
    theirs = peft_model(model, configs)
    banks = [moerge.load_experts(saved(theirs, tmp_path)), moerge.load_experts(theirs)]
    plain = logits(model, **batch(family))
    for name in configs:
        theirs.set_adapter(name)
        want = logits(theirs, **batch(family))
        assert error(want, plain) > 0.01
        for bank in banks:
            with moerge.patch(model, bank, method=f"expert:{name}"):
                assert error(logits(model, **batch(family)), want) < 1e-5
    assert torch.equal(logits(model, **batch(family)), plain)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"r": 5, "alpha": 7.0, "use_rslora": True}, {"r": 8, "alpha": 16.0}], ids=str)
def test_adapters_in_16_bits(llama, tmp_path, stored, options):
    """PEFT computes with them in float32."""
    for parameter in (model := peft_model(llama, {"only": lora(**options)})).parameters():
        parameter.data = parameter.data.to(stored)
    folder = saved(model, tmp_path)["only"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), folder, adapter_name="only").eval()
    want = logits(theirs, **batch("llama"))
    assert error(want, logits(llama, **batch("llama"))) > 0.01
    with moerge.patch(llama, moerge.load_experts({"only": folder}), method="expert:only"):
        assert error(logits(llama, **batch("llama")), want) < 1e-5


def test_generate_equals_peft(llama, tmp_path):
    theirs = peft_model(llama, {"only": lora()})
    ids = batch("llama")
    want = theirs.generate(**ids, max_new_tokens=8, do_sample=False)
    with moerge.patch(llama, moerge.load_experts(saved(theirs, tmp_path)), method="expert:only"):
        assert torch.equal(llama.generate(**ids, max_new_tokens=8, do_sample=False), want)


def test_merged_equals_pefts_exact_merge(llama, tmp_path):
    """The mean of the outer products: add_weighted_adapter(..., "cat") of PEFT, and the deltas added to the weights."""
    configs = {"ant": lora(), "bee": lora(r=7, use_rslora=True), "cat": lora(r=2, alpha=1.0)}
    theirs = peft_model(llama, configs)
    experts = moerge.load_experts(saved(theirs, tmp_path))
    theirs.add_weighted_adapter(list(configs), [1 / 3] * 3, "mean", combination_type="cat")
    theirs.set_adapter("mean")
    with moerge.patch(llama, experts, method="merged"):
        got = logits(llama, **batch("llama"))
    assert error(got, logits(theirs, **batch("llama"))) < 1e-5
    for method in ("merged", "merged_factors"):
        by_hand = copy.deepcopy(llama)
        for path, module in experts.modules.items():
            a, b = module.lora_A.double(), module.lora_B.double()
            delta = (b @ a).mean(0) if method == "merged" else b.mean(0) @ a.mean(0)
            by_hand.get_submodule(path).weight.data += delta.float()
        with moerge.patch(llama, experts, method=method):
            assert error(logits(llama, **batch("llama")), logits(by_hand, **batch("llama"))) < 1e-5, method


@pytest.mark.parametrize("method", ["phatgoose", "arrow", "arrow_mttl", "merged", "merged_factors", "expert:ant"])
def test_mixed_ranks_equal_zero_padding(llama, tmp_path, method):
    ranks = {"ant": 1, "bee": 6, "cat": 3}
    mixed = builders.random_experts(llama, tmp_path / "mixed", ranks, DECODER, rank=ranks)
    padded = {}
    for name, folder in mixed.items():
        adapter = moerge.load_experts(folder)
        modules = {}
        for path, module in adapter.modules.items():
            extra = 6 - module.rank
            modules[path] = (
                torch.nn.functional.pad(module.lora_A[0], (0, 0, 0, extra)),
                torch.nn.functional.pad(module.lora_B[0], (0, extra)),
            )
        padded[name] = builders.write_adapter(tmp_path / "padded" / name, modules, r=6, alpha=6)
    experts = moerge.load_experts(mixed)
    zeros = moerge.load_experts(padded)
    for name in ranks:
        zeros.set_gates(name, experts.get_gates(name))
    options = {"top_k": 2} if "arrow" in method else {}
    outputs = []
    for bank in (experts, zeros):
        with moerge.patch(llama, bank, method=method, **options):
            outputs.append(logits(llama, **batch("llama")))
    assert error(outputs[0], outputs[1]) < 1e-5


def test_routing_is_a_weighted_sum_of_pefts_experts(llama, tmp_path):
    """One routed layer: the recorded weights times PEFT's own branch of each expert."""
    path = "model.layers.0.self_attn.q_proj"
    configs = {name: peft.LoraConfig(r=r, lora_alpha=5, target_modules=[path]) for name, r in (("ant", 2), ("bee", 5))}
    theirs = peft_model(llama, configs)
    experts = moerge.load_experts(saved(theirs, tmp_path))
    for seed, name in enumerate(experts):
        experts.set_gates(name, {path: torch.randn(32, generator=torch.Generator().manual_seed(seed))})
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(9))
    layer = theirs.base_model.model.get_submodule(path)
    base, branches = layer.base_layer(x), []
    for name in experts:
        theirs.set_adapter(name)
        branches.append(layer(x) - base)
    with moerge.patch(llama, experts) as handle, handle.record(tokens=True) as trace:
        got = llama.get_submodule(path)(x)
    weights, ids = trace.calls[path][0]
    dense = torch.zeros(9, 2).scatter_add(1, ids.long(), weights)
    want = base + sum(dense[:, e, None] * branch for e, branch in enumerate(branches))
    assert error(got.detach(), want.detach()) < 1e-5 and dense.min() > 0.01
