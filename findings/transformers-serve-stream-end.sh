#!/usr/bin/env bash
# A stream of `transformers serve` ends without `data: [DONE]`.
#
# Versions: torch 2.13.0, transformers 5.23.0, fastapi 0.165.0, uvicorn 0.54.0, openai 3.57.0.
#
# Expected: /v1/completions and /v1/chat/completions are OpenAI's, whose streams are "terminated by a data: [DONE]
#   message"; vLLM, SGLang and llama.cpp's server send it.
# What happens: the last event is the chunk with finish_reason, then the connection closes.
# Affected: clients that tell a whole answer from one that was cut off by that line. The openai package takes the end of
#   the connection for it.
# Way around: wrap the handlers' `body_iterator` and send the line after the last event.
#
# Output seen:
#   /v1/completions: 2 events, the last with finish_reason length; [DONE]: False
#   /v1/chat/completions: 3 events, the last with finish_reason length; [DONE]: False
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
import socket
import sys
import time
import urllib.request

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cli.serve import Serve

folder = sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None
)
LlamaForCausalLM(config).eval().save_pretrained(folder)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="!")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
tokenizer.save_pretrained(folder)

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = Serve(force_model=folder, host="127.0.0.1", port=port, device="cpu", non_blocking=True, log_level="error")
found = []
for _ in range(600):
    with socket.socket() as tried:
        if tried.connect_ex(("127.0.0.1", port)) == 0:
            break
    time.sleep(0.1)
for path, asks in (
    ("/v1/completions", {"prompt": "one"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "one"}]}),
):
    body = {"model": folder, "max_tokens": 3, "stream": True, "temperature": 0, **asks}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        events = answer.read().decode().strip().split("\n\n")
    reason = json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"]
    done = any("[DONE]" in event for event in events)
    print(f"{path}: {len(events)} events, the last with finish_reason {reason}; [DONE]: {done}")
    found.append((reason, done))
server.kill_server()
sys.exit(0 if found == [("length", False)] * 2 else "the behaviour has changed")
PYTHON
