"""Gates of stacked parameters: one for each parameter of fused base experts, whatever base expert a token passes.

An adapter holds the LoRA of such a parameter in one module per base expert ("...mlp.experts.3.gate_proj"); its router
is one, under the parameter's path in the model ("...mlp.experts.gate_up_proj").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_INDEXED = re.compile(r"(?:.+\.)?(?P<experts>[^.]+)\.[0-9]+\.[^.]+")


class ParameterGates(dict[str, dict[str, dict[str, Tensor]]]):
    """{kind: {parameter path: {expert name: [D] float32}}}."""

    def set(self, kind: str, path: str, expert: str, gate: Tensor) -> None:
        self.setdefault(kind, {}).setdefault(path, {})[expert] = gate

    def of_expert(self, kind: str, expert: str) -> dict[str, Tensor]:
        """{parameter path: [D]} of one expert."""
        return {path: gates[expert] for path, gates in self.get(kind, {}).items() if expert in gates}

    def experts(self, kind: str) -> set[str]:
        return {expert for gates in self.get(kind, {}).values() for expert in gates}

    def paths(self) -> set[str]:
        return {path for kind in self.values() for path in kind}

    def to(self, device: torch.device | None) -> ParameterGates:
        moved = ParameterGates()
        for kind, paths in self.items():
            for path, gates in paths.items():
                for expert, gate in gates.items():
                    moved.set(kind, path, expert, gate.to(device))
        return moved

    def stack(
        self, paths: Sequence[str], names: Sequence[str], width: int, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({kind: [E,width]}, {kind: [E] bool}) as in ModuleBank, for a parameter that goes by any of `paths`.

        ValueError naming the experts whose gate has another width.
        """
        gates, has_gate, wrong = {}, {}, []
        for kind, stored in self.items():
            gates[kind] = torch.zeros(len(names), width, device=device, dtype=torch.float32)
            has_gate[kind] = torch.zeros(len(names), dtype=torch.bool, device="cpu")
            for path in reversed(paths):  # the first wins
                for name, gate in stored.get(path, {}).items():
                    if gate.shape != (width,):
                        wrong.append(f"'{name}' {list(gate.shape)}")
                        continue
                    gates[kind][names.index(name)] = gate
                    has_gate[kind][names.index(name)] = True
        if wrong:
            raise ValueError(f"a gate must be [D={width}], got {', '.join(wrong)}")
        return gates, has_gate


def is_stacked_parameter(path: str, modules: Iterable[str]) -> bool:
    """Whether `path` can be the stacked parameter of base experts that `modules` have LoRAs for, one by one."""
    experts, _, leaf = path.rpartition(".")
    last = experts.rpartition(".")[2]
    if leaf not in PARAMETERS or not last:
        return False
    return any(match["experts"] == last for match in map(_INDEXED.fullmatch, modules) if match)


def has_slices(path: str, modules: Iterable[str]) -> bool:
    """Whether `modules` have slices of the stacked parameter `path`, which go by the numbers of the base experts."""
    experts, _, leaf = path.rpartition(".")
    one = re.compile(rf"{re.escape(experts)}\.[0-9]+\.{re.escape(leaf)}")
    return leaf in PARAMETERS and any(map(one.fullmatch, modules))


def parameter_gate_problems(path: str, gate: Tensor) -> list[str]:
    """What is wrong with a gate of which only the model knows the width."""
    if gate.dim() != 1:
        return [f"{path}: a gate must be a vector, got {list(gate.shape)}"]
    return [] if torch.isfinite(gate).all() else [f"{path}: the gate holds NaN or infinite values"]
