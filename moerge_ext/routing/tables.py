"""Tables of renamed modules, transformers' own and others', as functions from their paths to those in this model.

A class whose modules were renamed between versions of transformers carries a table by which its old checkpoints are
read. The same table serves adapters, as PEFT 0.21 uses it (`peft.utils.transformers_weight_conversion`). An entry that
changes tensors (fused experts, split q/k/v) renames nothing here: a LoRA on the old module is none on the new one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import nn

from ..experts.keys import bare_path

UNEMBED = "unembed_tokens"  # what Tinker calls the head in the PEFT folders that it exports, inside of the text model

# {path: new path}; None for a module that this version of the model has fused or split
Renames = Callable[[Iterable[str]], dict[str, str | None]]


def renaming_tables(model: nn.Module) -> dict[str, Renames]:
    """{what the table is called: what it makes of paths}, for the transformers models in `model`; may be empty."""
    tables: dict[str, Renames] = {}
    for path, part in _pretrained(model):
        prefix, name = f"{bare_path(path)}." if bare_path(path) else "", type(part).__name__
        if conversions := _conversions(part):
            tables[f"transformers' table for {name}"] = partial(_within, prefix, partial(_convert, conversions))
        patterns = getattr(part, "_checkpoint_conversion_mapping", None)
        if isinstance(patterns, Mapping) and patterns:
            tables[f"the table in {name}"] = partial(_within, prefix, partial(_substitute, patterns))
        if head := _head(path, part):
            tables["Tinker's name of the head"] = partial(_with_head, head)
    return tables


def _head(path: str, model: nn.Module) -> str | None:
    """The bare path of the layer that makes logits, if there is one."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # models with code of their own
        return None
    found = (name for name, module in model.named_modules(prefix=path) if head is not None and module is head)
    return next(map(bare_path, found), None)


def _with_head(head: str, paths: Iterable[str]) -> dict[str, str | None]:
    return {path: head if path.rpartition(".")[2] == UNEMBED else path for path in paths}


def _pretrained(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, model) of the outermost transformers models."""
    from transformers import PreTrainedModel

    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((path, module))
    return found


def _conversions(model: nn.Module) -> list:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def _within(prefix: str, renames: Renames, paths: Iterable[str]) -> dict[str, str | None]:
    """`renames` for a model that lies at `prefix`."""
    inner = {path.removeprefix(prefix): path for path in paths}
    made = renames(inner)
    return {path: None if made[short] is None else prefix + made[short] for short, path in inner.items()}


def _convert(conversions: list, paths: Iterable[str]) -> dict[str, str | None]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    made: dict[str, str | None] = {}
    for path in paths:
        key, converter = rename_source_key(path + ".weight", renamings, converters)
        made[path] = key.removesuffix(".weight") if converter is None and key.endswith(".weight") else None
    return made


def _substitute(patterns: Mapping[str, str], paths: Iterable[str]) -> dict[str, str | None]:
    """The tables of transformers 4, which models with code of their own still bring: the first match is replaced."""
    made: dict[str, str | None] = {}
    for path in paths:
        tried = (re.subn(old, new.lstrip("^"), path) for old, new in patterns.items())
        made[path] = next((new for new, count in tried if count), path)
    return made
