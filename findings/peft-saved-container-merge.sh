#!/usr/bin/env bash
# merge_and_unload() raises for every kind but LoRA when modules_to_save names a module that holds others.
#
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.23.0.
#
# Expected: an adapter with modules_to_save=["pooler"] (BERT's: a module with a linear layer inside) trains, is saved,
#   loaded and merged, whatever its kind. With a plain linear layer, ["classifier"], it does.
# What happens: LoRA merges. LoHa, LoKr, OFT, BOFT, HRA, C3A, VeRA, FourierFT, RandLoRA and (IA)3 train, save and load,
#   and then merge_and_unload() and unload() raise AttributeError: 'BertPooler' object has no attribute 'weight'. The
#   replacement of the wrapper takes its .weight, which only a layer has. What stands after that module in the model
#   stays wrapped.
# Affected: any such adapter whose head is a block: BERT's pooler, RoBERTa's and wav2vec2's classifiers, own heads.
# Way around: set the trained module in place of the wrapper by hand, then merge:
#   model.base_model.model.set_submodule("bert.pooler", wrapper.modules_to_save["default"]).
#
# Output seen:
#   LORA: pooler merged; classifier merged
#   LOHA, LOKR, OFT, BOFT, HRA, C3A, VERA, FOURIERFT, RANDLORA, IA3: pooler AttributeError; classifier merged; by hand merged
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
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$python" - <<'PYTHON'
import sys

import torch
import transformers
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

MORE = {
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
}
KINDS = ("LOHA", "LOKR", "OFT", "BOFT", "HRA", "C3A", "VERA", "FOURIERFT", "RANDLORA", "IA3")
ids = torch.arange(8)[None]


def adapted(kind, saved):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    settings = {"target_modules": ["query"], "modules_to_save": [saved], **MORE.get(kind, {})}
    model = transformers.BertForSequenceClassification(config).eval()
    return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings)).eval()


def merged(model):
    want = model(ids).logits
    try:
        got = model.merge_and_unload()(ids).logits
    except AttributeError as error:
        return type(error).__name__ if str(error).endswith("has no attribute 'weight'") else str(error)
    return "merged" if torch.allclose(got, want, atol=1e-4) else "merged into another model"


def by_hand(model):
    inner = model.base_model.model
    inner.set_submodule("bert.pooler", inner.bert.pooler.modules_to_save["default"])
    return merged(model)


seen = {}
for kind in ("LORA", *KINDS):
    said = f"pooler {merged(adapted(kind, 'pooler'))}; classifier {merged(adapted(kind, 'classifier'))}"
    if kind != "LORA":
        said += f"; by hand {by_hand(adapted(kind, 'pooler'))}"
    seen.setdefault(said, []).append(kind)
for said, kinds in seen.items():
    print(f"{', '.join(kinds)}: {said}")
expected = {
    "pooler merged; classifier merged": ["LORA"],
    "pooler AttributeError; classifier merged; by hand merged": list(KINDS),
}
sys.exit(0 if seen == expected else "the behaviour has changed")
PYTHON
