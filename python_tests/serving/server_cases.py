"""A real server of a tiny model: `moerge serve` in a process of its own, and what its clients send."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
import transformers
from serving_cases import LINEARS
from tokenizers import Tokenizer, models, pre_tokenizers

START = 1800  # seconds that a server may take on a slow machine


def tiny(root: Path, names: Sequence[str], others: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """(folder of a model with a tokenizer of words, those of the experts `names`), in `root`; `others` are made too."""
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2))
    model.float().save_pretrained(root / "model")
    word_tokenizer().save_pretrained(root / "model")
    made = builders.random_experts(model, root / "experts", (*names, *others), LINEARS)
    return root / "model", [str(made[name]) for name in names]


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """w3 .. w95, each a token."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@contextmanager
def server(
    root: Path, model: Path, experts: list[str], ours: Sequence[str] = (), theirs: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen]]:
    """(the address of a running server, its process); ours, theirs: more arguments of `moerge serve`, of vLLM."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    words = [sys.executable, "-m", "moerge_ext", "serve", "--model", str(model), "--experts", *experts, *ours, "--"]
    words += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    words += ["--max-model-len", "256", *theirs]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment.pop("VLLM_PLUGINS", None)
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks may be more than NUMA nodes
    with (root / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait(port, process, root / "log")
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):  # whatever it has left, such as workers of a start that was cut off
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(port: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    pytest.fail(f"no server after {START} s:\n" + log.read_text()[-4000:])


def said(**routing: Any) -> dict[str, Any]:
    """The extra argument of a request that says this of its routing."""
    return {"vllm_xargs": {"moerge": json.dumps(routing)}}


def answer(client: Any, **more: Any) -> str:
    """What the server says to an openai client."""
    asked = {"model": "tiny", "prompt": "w5 w6 w7 w8", "max_tokens": 8, "temperature": 0}
    asked |= {key: more.pop(key) for key in list(more) if key in asked}
    return client.completions.create(**asked, extra_body=more).choices[0].text
