"""From the key of a tensor to its module, whatever the adapter was wrapped in when it was saved.

base_model.model.<module>.lora_A.weight                     PEFT
base_model.model.base_model.model.<module>...               a PeftModel around a PeftModel
<module>.lora_A.<adapter>.weight                            state_dict() instead of save_pretrained()
module. / _orig_mod. / _fsdp_wrapped_module. /              DistributedDataParallel and DeepSpeed, torch.compile,
_checkpoint_wrapped_module.                                 FSDP, activation checkpointing
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."
WRAPPERS = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)")
# as they stand in names and in regular expressions, whose dots may be escaped
_WRAPPED = re.compile(rf"(?:(?<!\w)(?:{'|'.join(sorted(WRAPPERS))})|(?<![^^|(])base_model\\?\.model)\\?\.")
_PARTS = {("A", "weight"): "A", ("B", "weight"): "B", ("B", "bias"): "bias"}


class LoraKey(NamedTuple):
    """What the key of a LoRA tensor says."""

    path: str  # of the module
    part: str  # "A", "B" or "bias"
    adapter: str | None  # the adapter's name, where the key has one


def bare_path(path: str) -> str:
    """`path` without what PEFT and the wrappers of torch put into it: the path in the model as it was built."""
    parts = [part for part in path.split(".") if part not in WRAPPERS]
    while len(parts) > 1:
        if parts[:2] == ["base_model", "model"] and len(parts) > 2:
            del parts[:2]
        elif parts[0] == "module":
            del parts[0]
        else:
            break
    return ".".join(parts)


def bare_pattern(pattern: str) -> str:
    """A name or regular expression of a config without the wrappers that it names: for bare paths."""
    return _WRAPPED.sub("", pattern)


# experts of one model have the same keys
@lru_cache(maxsize=1 << 14)
def lora_key(key: str) -> LoraKey | None:
    """The parts of `key`; None when it is no LoRA weight of a linear layer."""
    match = _LORA.fullmatch(key)
    part = _PARTS.get((match["factor"], match["kind"])) if match else None
    return None if part is None else LoraKey(bare_path(match["path"]), part, match["adapter"])


@lru_cache(maxsize=1 << 14)
def module_of(key: str) -> str:
    """The module that a tensor of any kind belongs to, as far as its key tells."""
    return bare_path(re.split(r"\.lora_|\.(?:weight|bias)$|\.modules_to_save\.|\.base_layer\.", key, maxsplit=1)[0])
