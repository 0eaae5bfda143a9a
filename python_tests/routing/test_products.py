"""Experts at the product inside of a module's forward: the routers of mixtures of experts."""

from __future__ import annotations

import guard_cases as cases
import patch_cases
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moerge_ext as moerge
from moerge_ext.routing.products import Products, is_product, layer_features

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {**cases.DECODER, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MOE = {**SMALL, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
MODELS = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "head_dim": 8, "num_experts": 4}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**SMALL, "head_dim": 8, "num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**MOE, **LATENT, **GROUPED}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**SMALL, "num_local_experts": 4}),
    # whose forward takes a bias besides, and which holds it in a module of its own
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**SMALL, "head_dim": 8, "num_local_experts": 4}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_layer_end_index": -1},
    ),
}


def model_of(family: str) -> nn.Module:
    if family == "llama4":
        return cases.llama4()
    kind, config, fields = MODELS[family]
    model = cases.make(kind, config, **fields)
    for path in routers(model):
        nn.init.normal_(model.get_submodule(path).weight)  # the choices of tokens are clear
    return model


def routers(model: nn.Module) -> list[str]:
    return [path for path, layer in model.named_modules() if is_product(layer)]


@pytest.mark.parametrize("family", [*MODELS, "llama4"])
def test_a_routers_expert_is_its_update_of_the_weight(family):
    model, x = model_of(family), cases.ids(2, 5)
    paths = routers(model)
    assert paths and all(path.rpartition(".")[2] in ("gate", "router") for path in paths)
    bank, before = cases.experts(model, paths), patch_cases.snapshot(model)
    plain = model(x).logits
    with moerge.patch(model, bank, "expert:ant") as handle:
        got, generated = model(x).logits, model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert handle.explain()
    assert patch_cases.same(before, patch_cases.snapshot(model)) and torch.equal(model(x).logits, plain)
    with torch.no_grad():
        for path in paths:
            module = bank.modules[path]
            model.get_submodule(path).weight += module.lora_B[0] @ module.lora_A[0]
    want = model(x).logits
    assert patch_cases.error(want, plain) > 1e-3 and patch_cases.error(got, want) < 1e-5
    assert torch.equal(generated, model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0))


def test_routing_weights_of_rows_gates_and_graphs(tmp_path):
    model, x = model_of("mixtral"), cases.ids(2, 5)
    bank = cases.experts(model, [*routers(model), "model.layers.0.self_attn.q_proj"])
    with moerge.patch(model, bank, "given") as handle, torch.no_grad():
        with handle.affinities([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]):
            both = model(x).logits
        for row, weights in enumerate(([1.0, 0.0, 0.5], [0.0, 2.0, 0.0])):
            with handle.affinities(weights):
                assert patch_cases.error(model(x[row : row + 1]).logits[0], both[row]) < 1e-5
    with moerge.patch(model, bank, "arrow", top_k=2) as handle, torch.no_grad():
        want = model(x).logits
        with handle.record() as trace:
            assert patch_cases.error(model(x).logits, want) < 1e-6
        assert set(routers(model)) <= set(trace.load()), "of every router too"


def test_gates_of_a_router_are_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = model_of("mixtral"), cases.ids(2, 5)
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    tuned = peft.get_peft_model(model_of("mixtral"), config)
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    tuned.base_model.model.load_state_dict(model.state_dict(), strict=False)
    tuned.eval().save_pretrained(tmp_path)
    if not any(path in moerge.load_experts([tmp_path]).modules for path in routers(model)):
        pytest.skip("this PEFT trains no routers by all-linear")
    moerge.train_gates(model, tmp_path, [{"input_ids": x, "labels": x}], steps=2, progress=False)
    bank = moerge.load_experts({"a": tmp_path, "b": tmp_path})
    gates = bank.get_gates("a")
    assert all(gates[path].any() for path in routers(model))
    with moerge.patch(model, bank, "phatgoose", top_k=1), torch.no_grad():
        assert patch_cases.error(model(x).logits, tuned(x).logits) < 1e-5


def test_a_router_under_its_name_of_transformers_4(tmp_path):
    model, x = model_of("mixtral"), cases.ids(2, 5)
    old = {path: path.replace(".mlp.", ".block_sparse_moe.") for path in routers(model)}
    bank = cases.experts(model, old)
    with moerge.patch(model, bank, "expert:ant"):
        want = model(x).logits
    renamed = moerge.ExpertBank(bank.names, {old[path]: module for path, module in bank.modules.items()})
    with moerge.patch(model, renamed, "expert:ant"):
        assert torch.equal(model(x).logits, want)


def test_a_merge_in_the_weights_of_routers(tmp_path):
    model, x = model_of("mixtral"), cases.ids(2, 5)
    bank = cases.experts(model, routers(model))
    with moerge.patch(model, bank, "merged"):
        want = model(x).logits
    moerge.merge_experts(bank, tmp_path / "full", model=model, full=True, progress=False)
    assert patch_cases.error(type(model).from_pretrained(tmp_path / "full").eval()(x).logits, want) < 1e-5


def test_what_counts_as_a_product():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return F.linear(x, self.weight) + F.linear(-x, self.weight)

    class By(Twice):
        def forward(self, x):
            return (x @ self.weight.T,)

    class Cast(Twice):
        def forward(self, x):
            return F.linear(input=x.double(), weight=self.weight.to(torch.float64)), 1

    class ByToken(Twice):
        def forward(self, x, ids):
            return F.linear(x, self.weight) + nn.functional.one_hot(ids, 3)

    assert layer_features(nn.Linear(8, 3)) == layer_features(Cast()) == layer_features(ByToken()) == (8, 3)
    assert [layer_features(layer) for layer in (Twice(), By(), nn.Embedding(3, 8), nn.LayerNorm(8))] == [None] * 4
    assert is_product(Cast()) and not is_product(nn.Linear(8, 3))
    layer = Cast()
    layer.register_forward_hook(lambda *_: pytest.fail("it was called"))
    assert is_product(layer) and layer.weight.device.type == "cpu"
    layer = Cast()
    with Products(layer.weight, lambda y, x: y + x.sum(-1, keepdim=True)):
        y, _ = layer(torch.ones(1, 8))
    torch.testing.assert_close(y, layer(torch.ones(1, 8))[0] + 8)


def test_other_experts_at_a_router_are_refused_by_name():
    model = model_of("mixtral")
    bank = cases.experts(model, routers(model))
    module = next(iter(bank.modules.values()))
    module._lora_A, module._lora_B = module._lora_A[:, :, :0], module._lora_B[:, :0]
    with pytest.raises(ValueError, match="in a MixtralTopKRouter only LoRA experts are routed"):
        moerge.patch(model, bank, "expert:ant")
