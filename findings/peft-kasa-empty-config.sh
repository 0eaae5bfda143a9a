#!/usr/bin/env bash
# "kasa_config": {} in adapter_config.json turns KaSA on and changes the output and the base.
#
# Versions: torch 2.13.0, peft 0.21.2.
#
# Expected: an empty dict says nothing, as it does in the fields that PEFT itself writes so in every LoRA config
#   ("loftq_config": {}, "rank_pattern": {}) and in others with a null ("eva_config", "corda_config",
#   "lora_ga_config"): all of these load the same adapter with null or {}.
# What happens: with {} the field becomes a KasaConfig of defaults, and whether it is not None is the switch. KaSA cuts
#   the smallest singular values off the base weight and scales the branch by a diagonal that the file does not
#   hold, so it starts at random: two loads of one folder differ. The base stays changed when the adapter is disabled.
#   The only sign is a warning of missing keys.
# Affected: tools that write adapter_config.json and fill unused fields with {} in place of null; readers of the file
#   that take a falsy value as "off".
# Way around: null, or leave the field out.
#
# Output seen:
#   kasa_config None: off by 0.0000; two loads differ by 0.0000; base weight changed by 0.0000
#   kasa_config {}:   off by 1.8278; two loads differ by 1.4800; base weight changed by 0.0140
#   eva_config, corda_config, lora_ga_config, loftq_config {}: off by 0.0000
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
from torch import nn

warnings.simplefilter("ignore")
folder = pathlib.Path(sys.argv[1]) / "adapter"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32, bias=False)
        self.b = nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def base():
    torch.manual_seed(0)
    return Model()


torch.manual_seed(5)
x = torch.randn(64, 32)
made = get_peft_model(base(), LoraConfig(r=4, target_modules=["a"], init_lora_weights=False))
made.save_pretrained(folder)
file = folder / "adapter_config.json"
config = json.loads(file.read_text())
assert config["kasa_config"] is None and config["loftq_config"] == {}


@torch.no_grad()
def load(seed, **fields):
    file.write_text(json.dumps({**config, **fields}))
    model = base()
    torch.manual_seed(seed)
    model = PeftModel.from_pretrained(model, folder)
    return model(x), (model.base_model.model.a.base_layer.weight - base().a.weight).abs().max().item()


@torch.no_grad()
def distances(**fields):
    one, changed = load(1, **fields)
    two, _ = load(2, **fields)
    return (one - made(x)).abs().max().item(), (one - two).abs().max().item(), changed


off = distances(kasa_config=None)
on = distances(kasa_config={})
for name, d in (("None:", off), ("{}:  ", on)):
    print(f"kasa_config {name} off by {d[0]:.4f}; two loads differ by {d[1]:.4f}; base weight changed by {d[2]:.4f}")
others = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")
inert = max(max(distances(**{name: {}})) for name in others)
print(f"{', '.join(others)} {{}}: off by {inert:.4f}")

same = max(off) < 1e-6 and on[0] > 0.1 and on[1] > 0.1 and on[2] > 1e-3 and inert < 1e-6
sys.exit(0 if same else "the behaviour has changed")
PYTHON
