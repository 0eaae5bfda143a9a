#!/usr/bin/env bash
# A ViT adapter of transformers 4 cannot be loaded on transformers 5, which reads and writes the ViT itself as before.
#
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2.
#
# Expected: the modules of ViT have new names in transformers 5 (encoder.layer.0.attention.attention.query is
#   layers.0.attention.q_proj), but its model files keep the old ones: save_pretrained writes them and from_pretrained
#   reads them. PEFT converts older adapters of other renamed models (Mixtral), their target_modules included, so an
#   adapter with target_modules ["query", "value"] should load.
# What happens: PEFT raises NoMatchingPeftModuleError, "Target modules ... not found in the base model". Whoever then
#   corrects target_modules to ["q_proj", "v_proj"] gets a model, a warning of missing keys, and the base's
#   output, since the tensors are still not renamed. The same names that stand in the model's file are refused
#   as target_modules of a new adapter.
# Affected: adapters of ViT classifiers and encoders made with transformers 4; scripts that choose target_modules from
#   the names in a model file.
# Way around: correct target_modules and give key_mapping, as below.
#
# Output seen:
#   a name in the model file: vit.encoder.layer.0.attention.attention.query.weight
#   the module's name:        vit.layers.0.attention.q_proj
#   a new adapter with target_modules ["query", "value"]: NoMatchingPeftModuleError
#   as it is: NoMatchingPeftModuleError
#   target_modules corrected: effect 0.0000; warned of missing keys: True
#   and with key_mapping:     effect 1.0998; warned of missing keys: False
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
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

"$python" - "$work" <<'PYTHON'
import json, pathlib, sys, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

work = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
made = ViTForImageClassification(ViTConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    num_labels=3, initializer_range=0.2)).eval()
image = torch.randn(1, 3, 8, 8)
made.save_pretrained(work / "model")
in_file = next(k for k in sorted(load_file(work / "model" / "model.safetensors")) if "query.weight" in k)
module = next(n for n, _ in made.named_modules() if n.endswith("q_proj"))
print("a name in the model file:", in_file)
print("the module's name:       ", module)

tensors = {}
for layer in range(2):
    for name in ("query", "value"):
        key = f"base_model.model.vit.encoder.layer.{layer}.attention.attention.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 16)
        tensors[f"{key}.lora_B.weight"] = torch.randn(16, 4)


def load(targets, **options):
    folder = work / "adapter"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=targets)))
    base = ViTForImageClassification.from_pretrained(work / "model").eval()
    with torch.no_grad():
        want = base(image).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder, **options).eval()
    with torch.no_grad():
        effect = (model(image).logits - want).abs().max().item()
    return effect, any("missing adapter keys" in str(w.message) for w in caught)


def refusal(call):
    try:
        call()
        return "none"
    except Exception as error:
        return type(error).__name__


new = refusal(lambda: get_peft_model(
    ViTForImageClassification.from_pretrained(work / "model"), LoraConfig(target_modules=["query", "value"])))
print('a new adapter with target_modules ["query", "value"]:', new)
refused = refusal(lambda: load(["query", "value"]))
print("as it is:", refused)
corrected = load(["q_proj", "v_proj"])
print(f"target_modules corrected: effect {corrected[0]:.4f}; warned of missing keys: {corrected[1]}")
mapped = load(["q_proj", "v_proj"], key_mapping={
    r"encoder\.layer\.(\d+)\.attention\.attention\.query": r"layers.\1.attention.q_proj",
    r"encoder\.layer\.(\d+)\.attention\.attention\.value": r"layers.\1.attention.v_proj"})
print(f"and with key_mapping:     effect {mapped[0]:.4f}; warned of missing keys: {mapped[1]}")

same = ("encoder.layer.0" in in_file and "encoder" not in module and new == refused == "NoMatchingPeftModuleError"
        and corrected[0] < 1e-6 and corrected[1] and mapped[0] > 0.01 and not mapped[1])
sys.exit(0 if same else "the behaviour has changed")
PYTHON
