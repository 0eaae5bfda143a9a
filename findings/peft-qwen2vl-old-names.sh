#!/usr/bin/env bash
# An adapter of Qwen2-VL made before transformers 4.52 loads as if it were not there.
#
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2.
#
# Expected: transformers 4.52 moved the language model of its vision-language classes one level down
#   (model.layers -> model.language_model.layers). transformers 5 still reads model files with the old names, and
#   PEFT renames the keys of older adapters with transformers' own tables. So an older adapter should act as before;
#   for Llava it does.
# What happens: for Qwen2-VL nothing is renamed. Loading returns a model, warns of missing keys, and the output is
#   the bare base model's. PEFT asks for the renaming table of config.model_type ("qwen2_vl"), finds none
#   and goes no further; transformers keeps the table of this model under its class name.
# Affected: adapters of Qwen2-VL (and others whose table is kept by class name; Qwen2.5-VL does the same) trained
#   with transformers 4.51 or older and used with transformers 5.
# Way around: give the renaming by hand, PeftModel.from_pretrained(..., key_mapping={...}) as below, and treat
#   "Found missing adapter keys" as an error.
#
# Output seen:
#   Qwen2-VL: layer names in the file that save_pretrained writes: model.layers
#   Qwen2-VL: today's names: effect 0.3739, off by 0.0000; warned of missing keys: False
#   Qwen2-VL: old names:     effect 0.0000, off by 0.3739; warned of missing keys: True
#   Qwen2-VL: key_mapping:   effect 0.3739, off by 0.0000; warned of missing keys: False
#   Llava:    old names:     effect 0.3384, off by 0.0000; warned of missing keys: False
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
import pathlib, re, sys, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
    Qwen2VLConfig, Qwen2VLForConditionalGeneration,
)

work = pathlib.Path(sys.argv[1])
text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=100, max_position_embeddings=64)
tokens = torch.arange(3, 13)[None]


def qwen():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, patch_size=2)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=dict(text, rope_parameters=rope, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        vision_config=vision, image_token_id=90, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93)).eval()


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=2, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**text), vision_config=vision, image_token_index=90)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens).logits


def adapter(make, folder, old, targets):
    """Trains nothing: an adapter of random weights, saved with today's names and with the `old` ones."""
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=targets)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(folder / "today")
    model.save_pretrained(folder / "old")
    file = folder / "old" / "adapter_model.safetensors"
    keys = load_file(file)
    assert all("model.language_model.layers" in k for k in keys)
    save_file({k.replace("model.language_model.layers", old): v for k, v in keys.items()}, file, {"format": "pt"})
    return logits(model)


def load(label, make, folder, want, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = logits(PeftModel.from_pretrained(make(), folder, **options).eval())
    effect = (got - logits(make())).abs().max().item()
    off = (got - want).abs().max().item()
    missing = any("missing adapter keys" in str(w.message) for w in caught)
    print(f"{label} effect {effect:.4f}, off by {off:.4f}; warned of missing keys: {missing}")
    return effect, off, missing


qwen().save_pretrained(work / "model")
names = {re.match(r"(.*layers)\.\d", k).group(1) for k in load_file(work / "model" / "model.safetensors")
         if re.match(r".*layers\.\d", k)}
print("Qwen2-VL: layer names in the file that save_pretrained writes:", *sorted(names))
want = adapter(qwen, work / "qwen", "model.layers", ["q_proj", "v_proj"])
today = load("Qwen2-VL: today's names:", qwen, work / "qwen" / "today", want)
old = load("Qwen2-VL: old names:    ", qwen, work / "qwen" / "old", want)
mapped = load("Qwen2-VL: key_mapping:  ", qwen, work / "qwen" / "old", want,
              key_mapping={r"^model\.layers": "model.language_model.layers"})
other = load("Llava:    old names:    ", llava, work / "llava" / "old",
             adapter(llava, work / "llava", "language_model.model.layers",
                     r".*language_model.*\.(q_proj|v_proj)"))  # not the vision tower's

same = (today[1] < 1e-6 and today[0] > 0.01 and old[0] < 1e-6 and old[2]
        and mapped[1] < 1e-6 and other[1] < 1e-6 and other[0] > 0.01
        and not other[2])
sys.exit(0 if same else "the behaviour has changed")
PYTHON
