"""PEFT's `target_parameters`: LoRA on stacked 3-D parameters, taken apart into one module per base expert.

PEFT 0.21.2 nests a ParamWrapper per targeted parameter around the module that holds them: the first parameter of the
module is the innermost, and each further one takes a ".base_layer" off the key.

    <experts>.base_layer.lora_A.weight [n*r, D], <experts>.base_layer.lora_B.weight [O, r*n]     gate_up_proj
    <experts>.lora_A.weight            [n*r, I], <experts>.lora_B.weight            [D, r*n]     down_proj

A's rows are ordered [n, r], B's columns [r, n]. Base expert j of gate_up_proj is shown as the module
"<experts>.<j>.gate_up_proj". A "<linear>.weight" as target is LoRA on that linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...files.safefile import TensorHeader
from .peft_rules import LoraRules, show

_BASE = ".base_layer"
# as the experts modules of transformers register them; other names follow by their own order
_ORDER = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Slice:
    """Where the factors of one base expert lie: `index` of `count` in the tensors of the module `stored`."""

    stored: str
    index: int
    count: int

    def of(self, part: str, tensor: Tensor) -> Tensor:
        """The rows of lora_A [n*r, D] ("A") or the columns of lora_B [O, r*n] ("B")."""
        if part == "A":
            return tensor.unflatten(0, (self.count, -1))[self.index]
        return tensor.unflatten(1, (-1, self.count))[..., self.index]


@dataclass(frozen=True)
class StackedLora:
    """The LoRA of one targeted parameter, as stored."""

    stored: str  # the module path of its keys
    path: str  # of the parameter
    count: int  # n, the base experts; 1 for a 2-D parameter
    rank: int  # r
    keep: Callable[[str], bool] | None = None  # which module paths are taken; None: all

    def modules(self) -> dict[str, Slice]:
        """{module path: its slice} of those that are taken."""
        found = self.all_modules()
        return found if self.keep is None else {path: part for path, part in found.items() if self.keep(path)}

    def all_modules(self) -> dict[str, Slice]:
        owner, _, name = self.path.rpartition(".")
        if self.count == 1 and name == "weight":
            return {owner: Slice(self.stored, 0, 1)}
        return {f"{owner}.{j}.{name}": Slice(self.stored, j, self.count) for j in range(self.count)}


def targeted_parameters(
    stored: Iterable[str], targets: Iterable[str], layers: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """({module path of the keys: parameter path}, {module path of keys: problem}), for the paths that
    `target_parameters` explains.

    layers: those of the paths that `target_modules` names. A target without a dot ("down_proj", as PEFT writes for
    "all-linear") is of any module that has such a parameter, which no file tells: it is not of one of `layers`.
    """
    bare = {target for target in targets if "." not in target}
    dotted = set(targets) - bare
    nested: dict[str, list[str]] = {}
    for path in stored:
        nested.setdefault(path.replace(_BASE, ""), []).append(path)
    found, problems = {}, {}
    for module, paths in nested.items():
        sure = {t.rpartition(".")[2] for t in dotted if f".{module}.{t.rpartition('.')[2]}".endswith(f".{t}")}
        names = sure if len(sure) == len(paths) else sure | bare
        if not names or (not sure and module in layers):
            continue
        inner_first = sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
        if len(names) != len(paths):
            named = ", ".join(inner_first)
            said = f"{module}: target_parameters names {named} of it, the file has LoRA for {len(paths)}"
            problems |= dict.fromkeys(paths, said)
            continue
        # the outermost wrapper has no ".base_layer"
        ordered = zip(sorted(paths, key=len, reverse=True), inner_first, strict=True)
        found |= {path: f"{module}.{name}" for path, name in ordered}
    return found, problems


def unused_targets(parameters: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The targets that fit none of the parameters."""
    dotted = ["." + path for path in parameters]
    return [target for target in targets if not any(path.endswith("." + target) for path in dotted)]


def square_note(loras: Iterable[StackedLora], sizes: Mapping[str, tuple[int, int]], version: object) -> str | None:
    """What to say of LoRAs whose orientation the file does not tell: `sizes` are (D, O) by parameter.

    Up to 0.18 PEFT read a weight [n,O,D] as [n, in, out], which exchanges A and B, and 0.19.0 a weight [n,D,O] as
    [n, out, in] besides; other shapes show it.
    """
    paths = [lora.path for lora in loras if lora.count > 1]
    old = re.match(r"0\.(\d+)\.(\d+)", f"{version or '0.0.0'}")
    if not paths or old is None or (int(old[1]), int(old[2])) >= (19, 1) or any(d != o for d, o in sizes.values()):
        return None
    return (
        f"LoRA on the parameter(s) {', '.join(paths[:3])} is square and was saved before PEFT 0.19.1: where the "
        "model stores [experts, out, in], such files have A and B exchanged (those of 0.19.0 where it stores [experts, "
        "in, out] too), and nothing in this one tells; it is read as PEFT 0.19.1 reads it"
    )


def find_stacked(
    parts: Mapping[str, Mapping[str, TensorHeader]],
    rules: LoraRules | None,
    keep: Callable[[str], bool] | None = None,
) -> tuple[dict[str, StackedLora], dict[str, str]]:
    """({module path of the keys: the LoRA of a parameter}, {module path of keys: problem}).

    `parts` are by the modules of the keys, those of the whole file: how many there are says which parameter is which.
    """
    if rules is None or not rules.parameters:
        return {}, {}
    parameters, problems = targeted_parameters(parts, rules.parameters, rules.targets.wanted(list(parts)))
    loras: dict[str, StackedLora] = {}
    for stored, path in parameters.items():
        found = parts[stored]
        rank = rules.first_rank(path)
        a, b = (found[part].shape if part in found else () for part in "AB")
        if rank is None or len(a) != 2 or len(b) != 2 or "bias" in found:
            continue  # to be refused as any module would be
        if a[0] != b[1] or not a[0] or a[0] % rank:
            problems[stored] = (
                f"{path}: lora_A must have n * r rows and lora_B r * n columns, r = {rank}; got {a[0]} and {b[1]}"
            )
        else:
            loras[stored] = StackedLora(stored, path, a[0] // rank, rank, keep)
    return loras, problems


def take_stacked(
    parts: Mapping[str, Mapping[str, TensorHeader]], loras: Mapping[str, StackedLora]
) -> tuple[dict[str, Mapping[str, TensorHeader]], dict[str, StackedLora]]:
    """(parts by module, the LoRAs by parameter path) of the `parts` by the modules of their keys.

    In the result the LoRA of a parameter stands under the parameter's path, with the shapes of one base expert's slice.
    """
    plain = {path: found for path, found in parts.items() if path not in loras}
    taken = {lora.path: lora for stored, lora in loras.items() if stored in parts}
    for path, lora in taken.items():
        a, b = (parts[lora.stored][part] for part in "AB")
        plain[path] = {
            "A": TensorHeader((lora.rank, a.shape[1]), a.dtype),
            "B": TensorHeader((b.shape[0], lora.rank), b.dtype),
        }
    return plain, taken


def stacked_notes(loras: Mapping[str, StackedLora], parts: Mapping, rules: LoraRules, version: object) -> list[str]:
    """What is odd about the LoRAs of stacked parameters and no reason to refuse."""
    sizes = {lora.path: (parts[lora.path]["A"].shape[1], parts[lora.path]["B"].shape[0]) for lora in loras.values()}
    notes = [square_note(loras.values(), sizes, version)]
    if unused := unused_targets(loras, rules.parameters):
        notes.append(f"target_parameters names {show(unused)}, of which the file has no weights")
    return [note for note in notes if note]
