#!/usr/bin/env bash
# After /reset, `transformers serve --continuous-batching` loads the model anew and answers with the one before.
#
# Versions: torch 2.13.0, transformers 5.23.0, fastapi 0.165.0, uvicorn 0.54.0, openai 3.57.0.
#
# Expected: /reset unloads the model; the next request reads its folder again and answers with what is there. Without
#   --continuous-batching it does.
# What happens: the folder is read again, and the batching goes on with the model that was "unloaded": its answers are
#   those of the old weights.
# Affected: who replaces the weights of a served model and resets the server.
# Way around: end the process; or stop `Serve._generation_state._cb_manager` and set it to None beside each /reset.
#
# Output seen:
#   one by one: answers before and after other weights were saved and /reset: differ; as the new weights say: True
#   continuous batching: answers before and after other weights were saved and /reset: the same; as the new weights say: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "transformers[serving]==5.23.0" "fastapi==0.165.0" "uvicorn==0.54.0" \
    "openai==3.57.0" "numpy==2.4.6"
fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

"$python" - "$work/model" <<'PYTHON'
import json
import logging
import socket
import sys
import time
import urllib.request

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cli.serve import Serve
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
logging.disable(logging.WARNING)
folder = sys.argv[1]
config = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None,
    initializer_range=0.5, max_position_embeddings=256,
)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="!")


def saved(seed):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def told(model):
    ids = torch.tensor([tokenizer("one two").input_ids])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def posted(port, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


found = []
for name, options in (
    ("one by one", {}),
    ("continuous batching", {"continuous_batching": True, "cb_num_blocks": 4, "cb_max_batch_tokens": 64}),
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    saved(0)
    server = Serve(host="127.0.0.1", port=port, device="cpu", non_blocking=True, log_level="error", **options)
    for _ in range(600):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    asks = {"model": folder, "prompt": "one two", "max_tokens": 8, "temperature": 0}
    before = posted(port, "/v1/completions", asks)["choices"][0]["text"]
    saved(1)
    posted(port, "/reset", {})
    after = posted(port, "/v1/completions", asks)["choices"][0]["text"]
    new = after == told(LlamaForCausalLM.from_pretrained(folder).eval())
    how = "the same" if before == after else "differ"
    print(f"{name}: answers before and after other weights were saved and /reset: {how}; as the new weights say: {new}")
    found.append((before == after, new))
    server.kill_server()
sys.exit(0 if found == [(False, True), (True, False)] else "the behaviour has changed")
PYTHON
