"""Adapters of other formats, written by hand: MLX-LM folders and GGUF files of llama.cpp."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

# llama.cpp's names of a Llama's layers
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGML_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30, torch.float64: 28}


def write_mlx(folder: Path, modules, scale=20.0, **fields) -> Path:
    """An MLX-LM folder from {module path: (A [R,D], B [O,R])}: stored as [D,R] and [R,O]."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(modules.values()))[0].shape[0] if modules else 8
    tensors = {}
    for path, (a, b) in modules.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = a.T.contiguous(), b.T.contiguous()
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "model": "mlx-community/tiny",
        "lora_parameters": {"rank": rank, "dropout": 0.0, "scale": scale},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def gguf_name(path: str) -> str:
    """ "model.layers.3.self_attn.q_proj" -> "blk.3.attn_q"."""
    if path == "lm_head":
        return "output"
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}"


def pairs_from_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: row (half h, pair i) of a head goes to (i, h)."""
    wide = rows.shape[0] // heads
    order = [
        head * wide + half * (wide // 2) + pair for head in range(heads) for pair in range(wide // 2) for half in (0, 1)
    ]
    return rows[order]


def gguf_tensors(modules, heads=None):
    """{llama.cpp's key: tensor} of {module path: (A, B)}; heads: (of q, of k) for models whose rows are reordered."""
    tensors = {}
    for path, (a, b) in modules.items():
        name = gguf_name(path)
        if heads and name.endswith(("attn_q", "attn_k")):
            b = pairs_from_halves(b, heads[name.endswith("attn_k")])
        tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"] = a, b
    return tensors


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value) -> bytes:
    """The type and the value of a string, a whole number, a float, or a list of one of these."""
    if isinstance(value, list):
        items = [_value(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", 8)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def gguf_bytes(tensors, values, kinds=None, alignment=32) -> bytes:
    """A GGUF file of {key: tensor or raw bytes with a shape in `kinds`} and {key: value}."""
    kinds = kinds or {}
    head, data = b"", b""
    for key, tensor in tensors.items():
        shape, kind = kinds.get(key) or (tuple(tensor.shape), GGML_TYPES[tensor.dtype])
        raw = tensor if isinstance(tensor, bytes) else tensor.contiguous().view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % alignment)
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += _text(key) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(data))
        data += raw
    pairs = b"".join(_text(key) + _value(value) for key, value in values.items())
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + pairs + head
    return start + bytes(-len(start) % alignment) + data


ADAPTER = {"general.type": "adapter", "adapter.type": "lora"}


def write_gguf(path: Path, modules, architecture="qwen2", alpha=8.0, heads=None, **values) -> Path:
    """A LoRA of llama.cpp from {module path: (A [R,D], B [O,R])}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = ADAPTER | {"general.architecture": architecture, "adapter.lora.alpha": alpha} | values
    path.write_bytes(gguf_bytes(gguf_tensors(modules, heads), facts))
    return path
