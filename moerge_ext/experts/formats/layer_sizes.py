"""The sizes of layers that an adapter's file does not hold: from the other experts, or from the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...models.linear import linear_features, skeleton
from ..keys import bare_path

Sizes = dict[str, tuple[int, int]]  # {module path: (D, O)}


def fill_sizes(sources: Sequence[Any], base: Any = None) -> dict[str, list[str]]:
    """Sets the widths that are 0 in the headers of `sources`; {source's name: why one stays unknown}.

    base: the base model, its config, or the folder or hub id of either.
    """
    known, unknown = _known(sources), {}
    missing = {
        (source.name, path): (source.modules, header)
        for source in sources
        for path, header in source.modules.items()
        if not (header.in_features and header.out_features)
    }
    layers: Sizes = {}
    reason = "pass load_experts(..., base=) the base model, its folder or its hub id"
    if any(path not in known for _, path in missing) and base is not None:
        try:
            layers = {bare_path(path): size for path, size in _sizes(base).items()}
            reason = "the base model that was given has no linear layer of this name"
        except ValueError as error:
            reason = str(error)
    for (name, path), (modules, header) in missing.items():
        size = known.get(path) or _found(layers, path)
        if size is None:
            lacks = "input" if header.out_features else "output"
            unknown.setdefault(name, []).append(f"{path}: the width of its {lacks} is not in the file: {reason}")
        else:
            modules[path] = replace(
                header, in_features=header.in_features or size[0], out_features=header.out_features or size[1]
            )
    return unknown


def _known(sources: Sequence[Any]) -> Sizes:
    """From the headers that hold both."""
    return {
        path: (header.in_features, header.out_features)
        for source in sources
        for path, header in source.modules.items()
        if header.in_features and header.out_features
    }


def layer_size(base: Any) -> Callable[[str], tuple[int, int] | None]:
    """(D, O) of the base's layer by a path of an expert's; None where it is not known, or no base is given."""
    try:
        layers = {} if base is None else {bare_path(path): size for path, size in _sizes(base).items()}
    except (ValueError, OSError):  # said by who needs it
        layers = {}
    return lambda path: _found(layers, path)


def _sizes(base: Any) -> Sizes:
    return {
        path: size for path, module in skeleton(base).named_modules() if (size := linear_features(module)) is not None
    }


def _found(layers: Mapping[str, tuple[int, int]], path: str) -> tuple[int, int] | None:
    """Of the layer at `path`, or at the only path that ends alike: classes of one model differ in their prefix."""
    if path in layers:
        return layers[path]
    alike = {size for name, size in layers.items() if name.endswith("." + path) or path.endswith("." + name)}
    return next(iter(alike)) if len(alike) == 1 else None
