"""Other models in the real vLLM: rows that it loads in another order, and a model that it runs as transformers'."""

from __future__ import annotations

from pathlib import Path

import builders
import pytest
import torch
import transformers
from serving_cases import NAMES
from vllm_engine import LENGTH, Engine, Reference, prompts

pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": LENGTH}
GROUPED = {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False}
MODELS = {
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=96, hidden_size=128, n_layer=2, n_head=4, initializer_range=0.2, eos_token_id=2
    ),
    "falcon": lambda: transformers.FalconConfig(**SIZES, **GROUPED, initializer_range=0.1),
    "falcon, one k and v": lambda: transformers.FalconConfig(
        **SIZES, multi_query=True, new_decoder_architecture=False, initializer_range=0.1
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=128, n_layer=2, n_head=4, n_positions=LENGTH, initializer_range=0.2
    ),
    # vLLM has no model of its own for it, and runs transformers'
    "smollm3": lambda: transformers.SmolLM3Config(
        **SIZES, **ENDS, num_key_value_heads=2, intermediate_size=192, initializer_range=0.2
    ),
}
LINEARS = {
    "bloom": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "smollm3": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_another_model_answers_as_patched(kind, tmp_path, monkeypatch):
    """By default, with weights of a request, and without experts, in one batch.

    In a process of its own: vLLM changes the classes of transformers' models that it runs.
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).float()
    folder = tmp_path / "model"
    made.save_pretrained(folder)
    linears = LINEARS.get(kind, LINEARS["bloom"])
    experts = builders.random_experts(made, tmp_path / "experts", NAMES, linears)
    paths = [str(Path(experts[name])) for name in NAMES]
    said = [None, {"weights": {"dog": 1.0}}, {"routing": False}]
    with Engine(folder, paths) as engine:
        outputs = engine.answers(prompts(9), said * 3)
    reference = Reference(folder, paths)
    reference.check(outputs[::3])
    reference.check(outputs[1::3], {"weights": {"dog": 1.0}}, "given")
    reference.check(outputs[2::3], {"routing": False})
