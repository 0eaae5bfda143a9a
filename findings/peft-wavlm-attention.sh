#!/usr/bin/env bash
# LoRA on the attention of WavLM never runs: no gradient, no effect, no warning.
#
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2.
#
# Expected: LoRA on q_proj and v_proj trains and acts in WavLM as in Wav2Vec2, which has modules of the same names.
# What happens: WavLM's attention hands q_proj.weight, v_proj.weight and so on to
#   torch.nn.functional.multi_head_attention_forward and never calls the modules. PEFT's wrapper has a .weight, the
#   base's, so everything runs, and LoRA is not part of it: its parameters get no gradient, and random LoRA weights
#   leave the output as it was. With a trained classification head, the usual case, backward raises nothing, since the
#   head has gradients. Merged, the adapter acts: the merged model is another than the one evaluated.
# Affected: LoRA on q_proj, k_proj, v_proj or out_proj of WavLM (speaker and emotion recognition).
# Way around: target the feed-forward linears (intermediate_dense, output_dense); check after the first
#   backward that every trainable parameter has a gradient.
#
# Output seen:
#   Wav2Vec2, q_proj, v_proj: gradient in 8 of 8 LoRA tensors; effect 0.1372; merged 0.1372
#   WavLM, q_proj, v_proj: gradient in 0 of 8 LoRA tensors; effect 0.0000; merged 0.1084
#   WavLM, out_proj: gradient in 0 of 4 LoRA tensors; effect 0.0000; merged 0.1596
#   WavLM, intermediate_dense: gradient in 4 of 4 LoRA tensors; effect 0.1336; merged 0.1336
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
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1

"$python" - <<'PYTHON'
import sys, warnings
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Wav2Vec2Config, Wav2Vec2ForSequenceClassification, WavLMConfig, WavLMForSequenceClassification,
)

torch.manual_seed(1)
sound = torch.randn(2, 800)
shape = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
    conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2, classifier_proj_size=16, num_labels=3, apply_spec_augment=False,
    initializer_range=0.2)


def run(name, kind, config, targets):
    def base():
        torch.manual_seed(0)
        return kind(config).eval()

    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base(), LoraConfig(
            target_modules=targets, modules_to_save=["classifier"], init_lora_weights=False)).eval()
        model(sound, labels=torch.tensor([0, 2])).loss.backward()
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    with_gradient = sum(p.grad is not None for p in lora)
    with torch.no_grad():
        plain = base()(sound).logits
        effect = (model(sound).logits - plain).abs().max().item()
        merged = (model.merge_and_unload()(sound).logits - plain).abs().max().item()
    print(f"{name}, {', '.join(targets)}: gradient in {with_gradient} of {len(lora)} LoRA tensors; "
          f"effect {effect:.4f}; merged {merged:.4f}")
    return with_gradient, len(lora), effect, merged


attention = ["q_proj", "v_proj"]
wavlm = (WavLMForSequenceClassification, WavLMConfig(num_buckets=8, max_bucket_distance=16, **shape))
other = run("Wav2Vec2", Wav2Vec2ForSequenceClassification, Wav2Vec2Config(**shape), attention)
silent = run("WavLM", *wavlm, attention)
out = run("WavLM", *wavlm, ["out_proj"])
dense = run("WavLM", *wavlm, ["intermediate_dense"])

same = (all(r[0] == r[1] and r[2] > 1e-3 and abs(r[3] - r[2]) < 1e-4 for r in (other, dense))
        and all(r[0] == 0 and r[2] < 1e-6 and r[3] > 1e-3 for r in (silent, out)))
sys.exit(0 if same else "the behaviour has changed")
PYTHON
