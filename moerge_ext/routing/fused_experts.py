"""The fused experts of a mixture-of-experts model: what they are, and their forward with branches on the parameters.

transformers 5 keeps the base experts of a layer in one module, their weights stacked in 3-D parameters, and lets
`ALL_EXPERTS_FUNCTIONS` compute them (transformers.integrations.moe). With n base experts and, for a token x, the pairs
(x, j) of the token and each base expert j that the model's own router chose:

    u = W1_j x + branch(x, j)        W1 is gate_up_proj [n, 2I, D], or up_proj [n, I, D] where there is no gate
    y = W2_j f(u) + branch(f(u), j)  W2 is down_proj [n, D, I]; f splits and gates u, or is the activation alone

Whoever adds branches places a module with `add_branch` inside the experts module (`open_door`); the module's own
parameters, names and forward stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

GATED = "gate_up_proj"  # W1 where there is a gate
BRANCHES = "moerge_branches"  # the child of an experts module that adds to its parameters
_NAME = "moerge"  # the key in ALL_EXPERTS_FUNCTIONS
_grouped_mm: Callable = torch.nn.functional.grouped_mm
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Pairs:
    """The (token, base expert) pairs of one forward, sorted by base expert: S = tokens x base experts per token."""

    base: Tensor  # [S] int64, the base expert j
    token: Tensor  # [S] int64, the place of the token in `tokens`
    tokens: Tensor  # [T,D], the experts module's input


class Branches(Protocol):
    """What `open_door` places."""

    @property
    def running(self) -> bool:
        """False: the base alone, by the model's own implementation."""

    def add_branch(self, parameter: str, y: Tensor, x: Tensor, pairs: Pairs, copies: bool) -> Tensor:
        """y [S,O] with the branch of x [S,D]; `copies`: x are rows of `pairs.tokens`, by `pairs.token`."""


class Door:
    """An experts module's config that sends its forward through the branches. All else is the config's."""

    def __init__(self, config: Any, branches: Branches):
        self.config, self.branches = config, branches

    @property
    def _experts_implementation(self) -> str | None:
        return _NAME if self.branches.running else self.config._experts_implementation

    def __getattr__(self, name: str) -> Any:
        # before __init__, as while a copy is made, there is no config to ask
        if name.startswith("__") or "config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.config, name)


def is_dispatched(module: nn.Module) -> bool:
    """Whether the module's forward is computed by `ALL_EXPERTS_FUNCTIONS`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    forward = type(module).forward
    own = vars(module).get("_old_forward", vars(module).get("forward"))  # what accelerate's hooks (offload) call
    replaced = own is not None and getattr(own, "__func__", None) is not forward
    if replaced or not inspect.isfunction(forward):
        return False
    outside = inspect.getclosurevars(forward)  # transformers 5.0 reads the table as a global
    return any(x is ALL_EXPERTS_FUNCTIONS for x in (*outside.nonlocals.values(), *outside.globals.values()))


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own 3-D parameters."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def parameter_sizes(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(base experts n, in features D, out features O) of a stacked parameter of a dispatched module."""
    n, first, second = getattr(module, parameter).shape
    return (n, first, second) if module.is_transposed else (n, second, first)


def first_parameter(module: nn.Module) -> str:
    """The name of W1."""
    return GATED if hasattr(module, GATED) else "up_proj"


def halves_apart(module: nn.Module) -> bool:
    """Whether the gate's rows of gate_up_proj come before all of up's; else they alternate."""
    from transformers.integrations.moe import _default_apply_gate

    # transformers 5.0 tells it by the function alone
    usual = type(module)._apply_gate is _default_apply_gate
    return getattr(module, "is_concatenated", usual)


def why_unsupported(module: nn.Module) -> str | None:
    """What keeps branches from being added to a module with stacked parameters; None when nothing does."""
    kind = type(module).__name__
    if not is_dispatched(module):
        return (
            f"LoRA on the experts of {kind} cannot be routed: transformers does not compute them through its experts "
            "interface (ALL_EXPERTS_FUNCTIONS); load_experts(..., modules=...) takes a part that can, as attention"
        )
    if BRANCHES in module._modules:
        return f"LoRA is on the experts of {kind} already: remove that patch first"
    if getattr(module, "_is_expert_parallel", False):
        return f"LoRA on the experts of {kind} cannot be routed under expert parallelism"
    types = {str(p.dtype).removeprefix("torch.") for p in stacked(module).values() if p.dtype not in _FLOATS}
    if types:
        return f"LoRA on the experts of {kind} cannot be routed while their weights are {', '.join(sorted(types))}"
    implementation = module.config._experts_implementation
    if implementation not in _LINEARS:
        return (
            f"LoRA on the experts of {kind} cannot be routed with experts_implementation={implementation!r}, whose "
            "kernels leave no place for it: call model.set_experts_implementation('grouped_mm') first (or "
            "'batched_mm', 'eager')"
        )
    return None


def open_door(module: nn.Module, branches: nn.Module) -> None:
    """Sends the module's forward through `branches`, which becomes a child of it; `close_door` undoes it."""
    from transformers.integrations import moe

    global _grouped_mm  # a graph can read it, and cannot look for a name that may not be there
    _grouped_mm = getattr(moe, "_grouped_mm", _grouped_mm)  # transformers 5.0 has no name for torch's
    moe.ALL_EXPERTS_FUNCTIONS.register(_NAME, forward_with_branches)
    branches.training = module.training
    module.add_module(BRANCHES, branches)
    module.config = Door(module.config, branches)


def close_door(module: nn.Module, branches: nn.Module | None = None) -> None:
    """The module as it was before `open_door`; does nothing where other `branches` are in place, or none."""
    placed = module._modules.get(BRANCHES)
    if placed is not None and branches in (None, placed):
        delattr(module, BRANCHES)
        module.config = module.config.config


def forward_with_branches(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module, registered in `ALL_EXPERTS_FUNCTIONS`: [T,D], [T,k], [T,k] -> [T,D]."""
    branches, linear = getattr(self, BRANCHES), _LINEARS[self.config.config._experts_implementation]
    per_token = top_k_index.shape[-1]
    base, order = top_k_index.reshape(-1).sort(stable=True)
    pairs = Pairs(base, order // per_token, hidden_states)
    x, first = hidden_states[pairs.token], first_parameter(self)
    u = branches.add_branch(first, _linear(self, first, x, base, linear), x, pairs, True)
    u = self._apply_gate(u) if first == GATED else self.act_fn(u)
    y = branches.add_branch("down_proj", _linear(self, "down_proj", u, base, linear), u, pairs, False)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    # back in the tokens' order before they are summed: a sum by index is not deterministic on CUDA
    y = torch.empty_like(y).index_copy(0, order, y)
    return y.view(*top_k_index.shape, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _linear(module: nn.Module, parameter: str, x: Tensor, base: Tensor, linear: Callable) -> Tensor:
    """W_j x [S,O] (+ bias) of each pair."""
    weight = getattr(module, parameter)
    y = linear(x, weight if module.is_transposed else weight.mT, base)
    return y + getattr(module, parameter + "_bias")[base] if module.has_bias else y


def _one_by_one(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """x [S,D], weight [n,D,O], base [S] sorted -> [S,O], a matrix product per base expert that was chosen."""
    counts = torch.bincount(base, minlength=weight.shape[0]).tolist()
    parts = [part @ weight[j] for j, part in enumerate(x.split(counts)) if len(part)]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[2])


def _batched(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), weight[base]).squeeze(1)


def _grouped(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    ends = torch.arange(weight.shape[0], device=base.device)
    return _grouped_mm(x, weight, offs=torch.searchsorted(base, ends, right=True, out_int32=True))


# by experts_implementation; None: a module made without a model, which transformers runs like "eager"
_LINEARS = {None: _one_by_one, "eager": _one_by_one, "batched_mm": _batched, "grouped_mm": _grouped}
