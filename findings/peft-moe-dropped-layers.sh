#!/usr/bin/env bash
# Loading a mixture's adapter of the old layout, PEFT drops layers: DeepSeek-V3's dense MLPs, Qwen2-MoE's experts.
#
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2.
#
# Expected: in transformers 4 every expert of a mixture was an MLP with linears gate_proj, up_proj and down_proj, and
#   target_modules of these names put a LoRA on the routed experts, the shared experts and the dense MLPs alike.
#   transformers 5 has one parameter for all routed experts, and PEFT converts such adapters on loading. Afterwards
#   every layer that the file has weights for should have its LoRA, or an error or a warning should name those that
#   have not, as for any other key that finds no place.
# What happens: DeepSeek-V3: the routed experts have their LoRA, the dense MLPs and the shared experts have none.
#   Qwen2-MoE: the shared experts have theirs, the routed experts have none. No warning names what was left out: of
#   Qwen2-MoE there is none at all, of DeepSeek-V3 two about rank_pattern and alpha_pattern keys that were "ignored".
#   The outputs are off by as much as below, against the base with the adapter merged into it by hand.
# Cause, as read: the conversion takes the names for those of the routed experts, moves them to target_parameters and
#   takes them out of target_modules, whoever else has them; for model_type "qwen2_moe" there is no conversion of keys.
# Affected: such adapters trained with transformers 4 and used with transformers 5.
# Way around: compare the layers that the loaded model has a LoRA on with those of the file, as below.
#
# Output seen (error relative to the size of the adapter's effect on the logits):
#   deepseek_v3: the file has a LoRA for 18 linears: 3 dense, 3 shared, 12 of routed experts
#     loaded on: layers.1.mlp.experts; no LoRA left for: dense, shared; warnings with their names: 0
#     error 0.9646 of the effect
#   qwen2_moe: the file has a LoRA for 15 linears: 3 shared, 12 of routed experts
#     loaded on: layers.0.mlp.shared_expert; no LoRA left for: routed; warnings with their names: 0
#     error 0.8880 of the effect
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "safetensors==0.8.0" \
    "accelerate==1.15.0" "numpy==2.4.6"
fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1 OMP_NUM_THREADS=1

"$python" - "$work" <<'PYTHON'
import json, pathlib, sys, warnings
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

work = pathlib.Path(sys.argv[1])
hidden, inner, dense, experts, rank, alpha = 32, 16, 48, 4, 4, 8
tokens = torch.arange(1, 13)[None]
common = dict(vocab_size=96, hidden_size=hidden, intermediate_size=dense, num_attention_heads=4,
              moe_intermediate_size=inner, num_experts_per_tok=2, initializer_range=0.2)


def deepseek():
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        **common, num_hidden_layers=2, first_k_dense_replace=1, num_key_value_heads=4, n_routed_experts=experts,
        n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8)).eval()


def qwen():
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **common, num_hidden_layers=1, num_key_value_heads=2, num_experts=experts,
        shared_expert_intermediate_size=inner)).eval()


def mlp(path, width):
    """The linears of one MLP: {path: (in, out)}."""
    return {f"{path}.gate_proj": (hidden, width), f"{path}.up_proj": (hidden, width), f"{path}.down_proj": (width, hidden)}


def merged(model, products):
    """The base with the products B A added to its weights, where transformers 5 keeps them."""
    with torch.no_grad():
        for path, product in products.items():
            layer, _, leaf = path.rpartition(".")
            if ".experts." not in path:
                model.get_submodule(path).weight += product
                continue
            layer, _, e = layer.rpartition(".")
            held = model.get_submodule(layer)
            if leaf == "down_proj":
                held.down_proj[int(e)] += product
            else:
                half = slice(0, inner) if leaf == "gate_proj" else slice(inner, 2 * inner)
                held.gate_up_proj[int(e), half] += product
    return model


CASES = {
    "deepseek_v3": (deepseek, {"dense": ("model.layers.0.mlp", dense), "shared": ("model.layers.1.mlp.shared_experts", inner)},
                    "model.layers.1.mlp.experts", ["dense", "shared"]),
    "qwen2_moe": (qwen, {"shared": ("model.layers.0.mlp.shared_expert", inner)}, "model.layers.0.mlp.experts", ["routed"]),
}
for name, (make, alone, routed, lost) in CASES.items():
    groups = {group: mlp(path, width) for group, (path, width) in alone.items()}
    groups["routed"] = {k: v for e in range(experts) for k, v in mlp(f"{routed}.{e}", inner).items()}
    torch.manual_seed(1)
    tensors, products = {}, {}  # as transformers 4 and PEFT wrote them
    for path, (inp, out) in {k: v for linears in groups.values() for k, v in linears.items()}.items():
        a, b = torch.randn(rank, inp) * 0.2, torch.randn(out, rank) * 0.2
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        products[path] = alpha / rank * b @ a
    folder = work / name
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": ["gate_proj", "up_proj", "down_proj"]}))
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(make(), folder).eval()
        base, right, got = (m(tokens).logits for m in (make(), merged(make(), products), loaded))
    holders = {key.split(".lora_A")[0].removeprefix("base_model.model.").replace(".base_layer", "")
               for key, _ in loaded.named_parameters() if ".lora_A" in key}
    left = [group for group, linears in groups.items()
            if not any(path in holders or path.rpartition(".")[0].rpartition(".")[0] in holders for path in linears)]
    said = sum(any(path in str(w.message) for path in products) for w in seen)
    error = ((got - right).norm() / (right - base).norm()).item()
    print(f"{name}: the file has a LoRA for {len(products)} linears: "
          + ", ".join(f"{len(v)} {'of routed experts' if k == 'routed' else k}" for k, v in groups.items()))
    places = sorted({p.removeprefix("model.").removesuffix(".gate_proj").removesuffix(".up_proj").removesuffix(".down_proj")
                     for p in holders})
    print(f"  loaded on: {', '.join(places)}; no LoRA left for: {', '.join(left)}; warnings with their names: {said}")
    print(f"  error {error:.4f} of the effect")
    assert left == lost and said == 0 and error > 0.1, "it is otherwise now"
PYTHON
