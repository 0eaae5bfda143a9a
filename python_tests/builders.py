"""Small things that many tests need: adapters written by hand, and tiny random models of every supported
family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moerge_ext.experts.formats.peft import write_gates

PREFIX = "base_model.model."


def lora_config(r: int = 4, alpha: float = 8, **fields) -> dict:
    """The fields of a PEFT LoRA config that matter, plus `fields`."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": r,
        "lora_alpha": alpha,
        "bias": "none",
        "target_modules": None,
        "task_type": "CAUSAL_LM",
    }
    return config | fields


def write_adapter(
    folder: str | Path, modules: Mapping[str, tuple[Tensor, ...]], r: int = 4, alpha: float = 8, **config
) -> Path:
    """Write a PEFT folder by hand from {module path: (A [R,D], B [O,R])} or (A, B, bias [O]); returns it.

    target_modules is the list of the paths unless given, so that PEFT can load the folder as well.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, parts in modules.items():
        keys = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
        for key, part in zip(keys, parts, strict=False):
            tensors[f"{PREFIX}{path}.{key}"] = part.detach().contiguous().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora_config(r, alpha, **{"target_modules": sorted(modules)} | config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def linear_sizes(model: nn.Module, targets: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """(module path, D, O) of every nn.Linear and Conv1D whose path ends with one of `targets`."""
    targets = tuple(targets)
    for path, module in model.named_modules():
        if not any(path == target or path.endswith("." + target) for target in targets):
            continue
        if isinstance(module, nn.Linear):
            yield path, module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            yield path, module.weight.shape[0], module.weight.shape[1]


def random_experts(
    model: nn.Module,
    folder: str | Path,
    names: Iterable[str],
    targets: Iterable[str],
    rank: int | Mapping[str, int] = 4,
    gates: bool | str = True,
    seed: int = 0,
) -> dict[str, Path]:
    """Write random adapters for `model` and return {name: folder}.

    rank: one for all, or {name: rank}. gates: True writes "sigmoid-gate" sidecars, a string another kind. The
    factors are scaled so that an expert moves a layer's output by about as much as the layer itself.
    """
    sizes = list(linear_sizes(model, targets))
    if not sizes:
        raise ValueError(f"no linear layer ends with {list(targets)}")
    transposed = any(isinstance(model.get_submodule(path), Conv1D) for path, _, _ in sizes)
    folders = {}
    for index, name in enumerate(names):
        random = torch.Generator().manual_seed(seed * 1000 + index)
        r = rank[name] if isinstance(rank, Mapping) else rank
        modules = {
            path: (
                torch.randn(r, d, generator=random) / math.sqrt(d),
                torch.randn(o, r, generator=random) / math.sqrt(r),
            )
            for path, d, o in sizes
        }
        folders[name] = write_adapter(Path(folder) / name, modules, r=r, alpha=r, fan_in_fan_out=transposed)
        if gates:
            kind = gates if isinstance(gates, str) else "sigmoid-gate"
            vectors = {path: torch.randn(d, generator=random) for path, d, _ in sizes}
            write_gates(folders[name], vectors, kind=kind, base_model="tiny")
    return folders


def ia3_expert(
    model: nn.Module, folder: str | Path, seed: int = 0, outputs=("k_proj", "v_proj"), inputs=("down_proj",)
):
    """Write a random (IA)3 adapter with gates for `model` as PEFT does, and return its folder."""
    random, folder = torch.Generator().manual_seed(seed), Path(folder)
    folder.mkdir(parents=True)
    tensors, gates = {}, {}
    for path, d, o in linear_sizes(model, (*outputs, *inputs)):
        shape = (1, d) if inputs and path.endswith(tuple(inputs)) else (o, 1)
        tensors[f"base_model.model.{path}.ia3_l"] = 1 + 0.5 * torch.randn(shape, generator=random)
        gates[path] = torch.randn(d, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "IA3", "target_modules": [*outputs, *inputs], "feedforward_modules": [*inputs]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_gates(folder, gates, kind="sigmoid-gate", base_model="tiny")
    return folder


def bottleneck_expert(model: nn.Module, folder: str | Path, seed: int = 0, pfeiffer: bool = False, **config) -> Path:
    """Write a random bottleneck adapter with gates as the library adapters does (1.3), and return its folder."""
    random, folder = torch.Generator().manual_seed(seed), Path(folder)
    folder.mkdir(parents=True)
    kind, width, inner = model.config.model_type, model.config.hidden_size, 6 + seed
    blocks = {
        "bert": {"output": "output.dense", "attention.output": "attention.output.dense"},
        "gpt2": {"output_adapters": "mlp.c_proj", "attention_adapters": "attn.c_proj"},
        "llama": {"output_adapters": "mlp.down_proj", "attention_adapters": "self_attn.o_proj"},
    }[kind]
    ends = list(blocks.values())[: 1 if pfeiffer else 2]
    tensors, gates = {}, {}
    for path, d, o in linear_sizes(model, ends):
        layer = ".".join(path.split(".")[: 1 + next(i for i, part in enumerate(path.split(".")) if part.isdigit())])
        place = next(place for place, end in blocks.items() if path == f"{layer}.{end}")
        start = f"{layer}.{place}.adapters.own.adapter"
        tensors[f"{start}_down.0.weight"] = torch.randn(inner, o, generator=random) / math.sqrt(o)
        tensors[f"{start}_down.0.bias"] = torch.randn(inner, generator=random)
        tensors[f"{start}_up.weight"] = torch.randn(width, inner, generator=random) / math.sqrt(inner)
        tensors[f"{start}_up.bias"] = torch.randn(width, generator=random)
        gates[path] = torch.randn(d, generator=random)
    save_file(tensors, folder / "adapter.safetensors", {"format": "pt"})
    fields = {"original_ln_before": pfeiffer, "original_ln_after": True, "residual_before_ln": True, "scaling": 1.0}
    fields |= {"non_linearity": "relu" if pfeiffer else "swish", "mh_adapter": not pfeiffer, "output_adapter": True}
    said = {"config": fields | config, "model_type": kind, "model_name": "tiny", "hidden_size": width}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    write_gates(folder, gates, kind="sigmoid-gate", base_model="tiny")
    return folder


def _build(model_class: type, config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    return model.float().eval()


_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def tiny_llama() -> nn.Module:
    """LlamaForCausalLM, hidden 32, 2 layers, vocabulary 96; pad 0, bos 1, eos 2 (as all decoders here)."""
    return _build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER))


def tiny_qwen2() -> nn.Module:
    """Qwen2ForCausalLM; its q, k and v have biases."""
    return _build(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**_DECODER))


def tiny_qwen3() -> nn.Module:
    """Qwen3ForCausalLM, with a head size that differs from hidden/heads."""
    return _build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**_DECODER, head_dim=16))


def tiny_mistral() -> nn.Module:
    """MistralForCausalLM with a sliding window of 16."""
    return _build(transformers.MistralForCausalLM, transformers.MistralConfig(**_DECODER, sliding_window=16))


def tiny_gpt2() -> nn.Module:
    """GPT2LMHeadModel; its linears are Conv1D."""
    config = transformers.GPT2Config(
        vocab_size=96,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return _build(transformers.GPT2LMHeadModel, config)


def tiny_t5() -> nn.Module:
    """T5ForConditionalGeneration, gated feed-forward, 2 + 2 layers."""
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _build(transformers.T5ForConditionalGeneration, config)


def tiny_bert() -> nn.Module:
    """BertForSequenceClassification with three classes."""
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        num_labels=3,
        initializer_range=0.2,
    )
    return _build(transformers.BertForSequenceClassification, config)


def make_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .:="]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


def chat_tokenizer(folder):
    """`make_tokenizer` with a chat template: user "x" -> "u:x.a:"."""
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
