"""Routers that were trained over a bank of experts, as one file: tensors per module or layer, and of which experts.

`moerge_routers.safetensors`: "<path>/<name>" are the tensors of the router at a module, layer or block;
"marks/<module>" [E,4] tells the experts apart by their factors, whatever type they are held in. The header names the
method, the experts in the order of their ids, the options that training decided, and the width of what layers read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import write_atomically
from ..files.listing import listed
from ..files.rows import parse_json
from ..files.safefile import open_tensors, read_headers, read_tensor
from .bank import ExpertBank
from .selection import alone

ROUTERS_FILE = "moerge_routers.safetensors"
_FORMAT = "moerge-routers"
_MARKS = "marks"
_CLOSE = 0.02  # of a factor's norm: a change of type moves a mark by less, another training by more


@dataclass
class Routers:
    """Trained routers of one method over the experts `names`.

    tensors: {path: {name: float32 tensor}}; options: those of the method that training decided; width: of a layer's
    input, 0 when no router reads one; marks: {module path: [E,4]}, `marks_of` the bank; metadata: more texts.
    """

    method: str
    names: tuple[str, ...]
    tensors: dict[str, dict[str, Tensor]]
    marks: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    width: int = 0
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        stored = {f"{_MARKS}/{module}": marks for module, marks in self.marks.items()}
        stored |= {f"{path}/{name}": t for path, named in self.tensors.items() for name, t in named.items()}
        facts = {"method": self.method, "names": list(self.names), "options": self.options, "width": self.width}
        header = {**self.metadata, "format": _FORMAT, "version": "1", "routers": json.dumps(facts)}
        tensors = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in stored.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: save_file(tensors, file, header))

    def problems(self, method: str, bank: ExpertBank) -> list[str]:
        """Why these routers are not for `method` over `bank`, by name; empty when they are."""
        if self.method != method:
            return [f"the routers were trained for method '{self.method}', not for '{method}'"]
        if self.names != bank.names:
            return [self._other_names(bank)]
        return self._other_experts(bank)

    def _other_names(self, bank: ExpertBank) -> str:
        said = f"the routers are for the experts {', '.join(self.names)}, in this order; got {', '.join(bank.names)}"
        if sorted(self.names) == sorted(bank.names):
            return f"{said}: load them in that order, as {alone(self.names)} does"
        if set(self.names) < set(bank.names):
            return f"{said}: {alone(self.names)} loads those, or train routers for these"
        renamed = []
        here = marks_of(bank.modules)
        for old in sorted(set(self.names) - set(bank.names)):
            same = [new for new in bank.names if new not in self.names and not self._differing(old, new, bank, here)]
            renamed += [f"'{same[0]}' is their '{old}'"] if same else []
        hint = f" ({'; '.join(renamed)}: load_experts({{name: path}}) gives names)" if renamed else ""
        return f"{said}{hint}: load those, or train routers for these"

    def _other_experts(self, bank: ExpertBank) -> list[str]:
        here, problems = marks_of(bank.modules), []
        if lost := sorted(self.marks.keys() - here.keys()):
            problems.append(f"the routers' experts have modules that these lack: {listed(lost)}")
        if new := sorted(here.keys() - self.marks.keys()):
            problems.append(f"these experts have modules that the routers' lack: {listed(new)}")
        for name in bank.names:
            if changed := self._differing(name, name, bank, here):
                problems.append(
                    f"expert '{name}' is not the one that the routers were trained with; its factors differ in "
                    f"{len(changed)} of {len(here)} modules ({listed(changed)}): train them again"
                )
        return problems

    def _differing(self, old: str, new: str, bank: ExpertBank, here: Mapping[str, Tensor]) -> list[str]:
        """The modules where the file's expert `old` is not the bank's `new`."""
        i, j = self.names.index(old), bank.names.index(new)
        shared = [path for path in self.marks if path in here]
        return [path for path in shared if not _alike(self.marks[path][i], here[path][j])]


def marks_of(modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """{module path: [E,4] float32}: norm and a fixed linear form of A, then of B (scaling folded in).

    modules: {path: whatever has lora_A [E,R,D] and lora_B [E,O,R]}.
    """
    return {path: torch.cat([_mark(m.lora_A), _mark(m.lora_B)], 1) for path, m in modules.items()}


def _mark(factor: Tensor) -> Tensor:
    """[E,.,.] -> [E,2]: norm, and the sum over v_i cos(1 + i) of what is not padding (zeros add nothing)."""
    flat = factor.detach().to("cpu", torch.float64)
    wave = torch.cos(
        1
        + torch.arange(flat.shape[1], device="cpu")[:, None] * 0.7
        + torch.arange(flat.shape[2], device="cpu")[None] * 1.3
    ).double()
    return torch.stack([flat.square().sum((1, 2)).sqrt(), (flat * wave).sum((1, 2))], 1).float()


def _alike(a: Tensor, b: Tensor) -> bool:
    sizes = torch.maximum(a, b)[[0, 0, 2, 2]]
    return bool(((a - b).abs() <= _CLOSE * sizes).all())


def read_routers(path: str | Path) -> Routers:
    """The routers in a file, or in the folder that holds `moerge_routers.safetensors`.

    ValueError for what is no such file, is damaged, or of another version.
    """
    path = Path(path)
    file = path / ROUTERS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: `moerge train-routers` writes such files")
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {}
        if (metadata.get("format"), metadata.get("version")) != (_FORMAT, "1"):
            found = f"{metadata.get('format')} {metadata.get('version')}"
            raise ValueError(f"{file} is no file of routers: expected {_FORMAT} 1 in its header, got {found}")
        tensors = {key: read_tensor(opened, key, header) for key, header in read_headers(opened).items()}
    try:
        facts = parse_json(metadata.pop("routers"))
        names, options, width = tuple(map(str, facts["names"])), dict(facts["options"]), int(facts["width"])
        method = str(facts["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: its header does not say of what its routers are ({error})") from None
    routers = Routers(method, names, {}, {}, options, width, metadata)
    for key, tensor in tensors.items():
        if key.startswith(f"{_MARKS}/"):
            routers.marks[key.removeprefix(f"{_MARKS}/")] = tensor
        else:
            place, _, name = key.rpartition("/")
            routers.tensors.setdefault(place, {})[name] = tensor
    bad = [path for path, marks in routers.marks.items() if marks.shape != (len(names), 4)]
    bad += [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{file} is damaged: {listed(sorted(bad))} have another shape or are not finite")
    return routers
