"""Readers of adapter formats, one file each, and which of them reads what.

    adapter_config.json, adapter_model.safetensors (whole or in parts)      peft.py
    the same, peft_type ADALORA                                             adalora.py
    the same, peft_type IA3                                                 ia3.py
    adapter_config.json, adapter.safetensors                                bottleneck.py, the library adapters
    adapter_config.json, adapters.safetensors                               mlx.py, MLX-LM
    <file>.gguf, or a folder with one and no config                         gguf.py, llama.cpp

Every reader makes a view of the adapter as PEFT would have saved it (`view.py`), and `peft.py` checks all views alike.
A reader trusts nothing: it checks names, sizes and values first. `foreign.py` has the reasons for what none of them
reads; `pickled.py` reads `adapter_model.bin` for `moerge convert` alone, where the user asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files.safefile import AdapterError
from ...files.shards import has_weights
from . import bottleneck, foreign, gguf, ia3, mlx, peft, pickled
from .adapter import Adapter, AdapterHeader
from .layer_sizes import fill_sizes
from .peft_config import read_config

__all__ = ["format_of", "inspect_adapter", "read_adapter"]


def inspect_adapter(
    name: str,
    path: str | os.PathLike,
    base: Any = None,
    *,
    keep: Callable[[str], bool] | None = None,
    allow_pickle: bool = False,
) -> AdapterHeader:
    """Check an adapter of any format without reading its tensors.

    base: the base model, its config or the folder of either, for formats that need to know it (GGUF). keep: which
    module paths to look at (None: all). allow_pickle: open `adapter_model.bin` where a PEFT folder has nothing else;
    see `pickled.py` first.

    Raises AdapterError with every problem of the config, of the tensors' names, shapes and dtypes, of their
    agreement with the config, and of the gates beside it. Widths of layers that the file does not hold are 0, see
    `layer_sizes.py`.
    """
    found = peft.resolve(name, path)
    folder = found if found.is_dir() else None
    if folder is not None and bottleneck.is_bottleneck(folder):
        return bottleneck.inspect_bottleneck(
            name, folder, keep, heading=peft.heading(name, found), allow_pickle=allow_pickle
        )
    try:
        if folder is not None and _is_mlx(folder):
            view = mlx.view_mlx(folder)
        elif (file := _gguf_of(found)) is not None:
            view = gguf.view_gguf(file, base)
        elif folder is None:
            raise ValueError(f"it is not a folder{foreign.what_file(found)}")
        elif (model := foreign.what_model(folder)) is not None:
            raise ValueError(model)
        elif allow_pickle and not has_weights(folder, peft.WEIGHTS_FILE):
            view = peft.view_peft(folder, lambda: pickled.open_pickle(folder))
        else:
            view = peft.view_peft(folder)
    except (ValueError, OSError) as error:
        raise AdapterError([str(error)], peft.heading(name, found)) from None
    if folder is not None and (view.config or {}).get("peft_type") == ia3.KIND:
        headers = peft.read_headers(view, view.problems)
        said = {"heading": peft.heading(name, found), "file": peft.WEIGHTS_FILE}
        return ia3.inspect_ia3(name, folder, view, headers, keep, **said)
    return peft.inspect_view(name, found, folder, view, keep)


def read_adapter(name: str, path: str | os.PathLike, base: Any = None) -> Adapter:
    """`inspect_adapter`, with the tensors in memory: as stored, unscaled. Raises AdapterError with every problem."""
    header = inspect_adapter(name, path, base)
    if unknown := fill_sizes([header], base):
        raise AdapterError(unknown[name], peft.heading(name, header.folder))
    return peft.into_memory(header)


def format_of(path: Path) -> str:
    """The name of the format of an adapter that `inspect_adapter` has taken."""
    if path.is_dir() and _is_mlx(path):
        return "MLX-LM"
    if path.is_dir() and bottleneck.is_bottleneck(path):
        return "adapters"
    if _gguf_of(path) is not None:
        return "GGUF"
    kind = read_config(path.resolve() / peft.CONFIG_FILE).get("peft_type")
    return "PEFT" if kind == "LORA" else f"PEFT {kind}"


def _is_mlx(folder: Path) -> bool:
    return os.path.lexists(folder / mlx.WEIGHTS_FILE) and not has_weights(folder, peft.WEIGHTS_FILE)


def _gguf_of(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that it holds as its only adapter."""
    if path.is_file():
        return path if gguf.is_gguf(path) else None
    if not path.is_dir() or os.path.lexists(path / peft.CONFIG_FILE):
        return None
    files = [name for name in os.listdir(path) if name.endswith(".gguf")]
    return peft.file_inside(path, files[0]) if len(files) == 1 else None
