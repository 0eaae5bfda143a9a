"""What a folder holds instead of an adapter that can be read, and what to do with it."""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
from pathlib import Path

from ...files.safefile import file_inside, open_tensors, what_it_is

PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")
# what other tools write, by a name (with wildcards): whose it is, and the way out
_TOOLS = {
    "adapter_model.pt": "is a pickle: if torch.save wrote it, rename it to adapter_model.bin and use "
    "`moerge convert FOLDER OUT --allow-pickle`",
    "adapter_[0-9]*.pt": "is of torchtune, whose HF checkpointer writes PEFT's adapter_model.safetensors too: pass "
    "the folder of that",
    "*.pth.lora": "is of LitGPT, whose names and fused layers are not read: train it with PEFT, or merge it "
    "(litgpt merge_lora)",
    "zero_to_fp32.py": "is of a DeepSpeed checkpoint, whose shards are not read: save the adapter by "
    "model.save_pretrained",
    "pytorch_model_fsdp_*": "is of an FSDP checkpoint, whose shards are not read: `accelerate merge-weights`, or save "
    "the adapter by model.save_pretrained",
    "pytorch_model.bin": "is a pickle, of a whole model or of a library whose adapters are not read",
    "*.nemo": "is an archive of NeMo: export the adapter to PEFT's layout with it",
}
# PEFT's methods (0.21) of which a LoRA can be made, by what they do to a weight, and that have no layer of their own
MERGES = frozenset(
    [
        "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR",
        "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
        "UNILORA", "VBLORA", "VERA", "WAVEFT"
    ]
)  # fmt: skip
_NO_LAYER = frozenset(
    ["ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]
)
# what the others do to the base instead
_DOES = {
    "LN_TUNING": "trains the norms of the base",
    "TRAINABLE_TOKENS": "replaces rows of the base's embedding",
    **dict.fromkeys(["POLY", "XLORA"], "routes among LoRAs of its own and is not one"),
}
# what trainers write beside a LoRA of other parameters that they trained: PEFT does not read it either
_BESIDE = {
    "non_lora_trainables.bin": "LLaVA's trainer writes it",
    "non_lora_state_dict.bin": "trainers of vision-language models write it",
    "trainable_params.bin": "LongLoRA writes it of embeddings and norms",
    "vit.safetensors": "ms-swift writes it of the image tower",
}
MAX_SCANNED = 1000  # entries of a folder
MAX_MODEL_CONFIG = 4 << 20  # bytes
_CONVERT = "convert it once with `moerge convert FOLDER OUT --allow-pickle` (torch.load, weights only)"


def what_kind(kind: object) -> str:
    """A clause for an error about PEFT's other methods: what this one is, and whether it can become a LoRA."""
    if not isinstance(kind, str):
        return ""
    if kind in MERGES:
        return f"; a LoRA can be made of {kind}: moerge convert FOLDER OUT --to-lora --model MODEL [--rank R]"
    if kind in _NO_LAYER:
        return f"; {kind} trains tokens or activations and adds to no layer"
    if kind == "IA3":
        return "; an (IA)3 is read from its folder: save_pretrained(FOLDER) of the live model first"
    if kind in _DOES:
        return f"; {kind} {_DOES[kind]}: a routed sum of experts cannot do this"
    return ""


def what_model(folder: Path) -> str | None:
    """The reason to refuse a model's folder in place of an adapter's; None for anything else."""
    if os.path.lexists(folder / "adapter_config.json") or any(folder.glob("*.pth.lora")):
        return None
    try:
        with open(file_inside(folder.resolve(), "config.json"), "rb") as opened:
            config = json.loads(opened.read(MAX_MODEL_CONFIG).decode("utf-8"))
        kind, architectures = config.get("model_type"), config.get("architectures")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if not isinstance(kind, str):
        return None
    known = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    name = architectures[0] if known else kind
    return f"it is a model ({name[:80]}), not an adapter: experts are put on it. Were model and adapter swapped?"


def what_else(folder: Path) -> str:
    """A clause for an error about missing weights: what the folder holds in their place; "" when nothing is known."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in itertools.islice(entries, MAX_SCANNED)}
    except OSError:  # a hint is not worth an error of its own
        return ""
    for name in PICKLES:
        if name in names:
            if (what := what_it_is(folder / name)) and "pickle" not in what:
                return f"; {name} is {what}"
            return f"; {name} is a pickle, which can run code when it is opened, and is never read here: {_CONVERT}"
    for pattern, reason in _TOOLS.items():
        if found := sorted(fnmatch.filter(names, pattern)):
            return f"; {found[0]} {reason}"
    if "adapters.npz" in names:
        return (
            "; adapters.npz is of an old MLX-LM: save it as adapters.safetensors "
            "(mx.save_safetensors(path, mx.load(npz)))"
        )
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return f"; it holds GGUF files: pass the file itself, such as {folder / ggufs[0]}"
    tensors = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("moerge_"))
    for name in tensors:
        if reason := _layout_of(folder / name):
            return f"; {name} {reason}"
    if tensors:
        return f"; it holds {', '.join(tensors[:3])}"
    return ""


def trained_beside(folder: Path) -> list[str]:
    """Notes on files with parameters that were trained together with the LoRA and are not read."""
    return [
        f"{name} is not read: parameters that were trained beside the LoRA ({who}). Load them into the model first, "
        "without them this is not what was trained"
        for name, who in _BESIDE.items()
        if os.path.lexists(folder / name)
    ]


def what_file(path: Path) -> str:
    """The same for a file that was passed in place of a folder."""
    if path.suffix != ".safetensors":
        if reason := next((said for name, said in _TOOLS.items() if fnmatch.fnmatch(path.name, name)), ""):
            return f"; {path.name} {reason}"
        return "; expected a folder with adapter_config.json, or a .gguf file"
    if (path.parent / "adapter_config.json").exists():
        return f"; pass the folder of the file, {path.parent}"
    reason = _layout_of(path)
    return f"; {path.name} {reason}" if reason else "; expected a folder with adapter_config.json beside the weights"


def _layout_of(path: Path) -> str | None:
    """The layout of a safetensors file that is no PEFT adapter, by its keys."""
    try:
        with open_tensors(path) as handle:
            keys = list(handle.headers)
    except ValueError as error:
        return f"cannot be read either ({str(error)[:200]})"
    kohya = any(key.endswith((".lora_down.weight", ".lora_up.weight")) for key in keys)
    diffusers = any(key.startswith(("unet.", "transformer.", "text_encoder")) and "lora" in key for key in keys)
    if kohya or diffusers:
        whose = "kohya's sd-scripts" if kohya else "diffusers"
        return (
            f"is an adapter of an image model in the layout of {whose}: load it with diffusers "
            "(pipeline.load_lora_weights) and pass the model inside, such as pipeline.transformer, to load_experts"
        )
    if any(".lora_A." in key for key in keys):
        return "holds LoRA weights: rename it to adapter_model.safetensors, with its adapter_config.json beside it"
    if keys and not any("lora" in key.lower() for key in keys):
        return "holds whole layers, not an adapter: the base model, or a model that the adapter was merged into"
    return None
