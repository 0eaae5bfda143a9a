"""RoutedExperts: LoRA experts on the stacked parameters of a model's own experts.

To the LoRA experts a stacked parameter is one linear layer. It has one router, under the parameter's path, and whoever
is selected for a token brings its factors for the base expert j that the token passes:

    y_tj = W_j x_tj + sum over the selected experts e of  w_te B_ej A_ej x_tj

gate_up_proj (or up_proj) scores the token as the experts module gets it; down_proj scores what reaches it, the
activation of each (token, base expert) pair. Prototypes that are made from the factors (Arrow) differ by base expert,
and then each pair is scored by those of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..experts.module_bank import whole_vectors
from ..files.counting import counted
from ..files.listing import listed
from ..methods.base import Method, Plan, Routing
from .absent import with_absent
from .fused_experts import BRANCHES, Pairs
from .generation import NOT_SET
from .layers import execution_device
from .parameter_banks import ParameterBank, Piece, Placement, are_turned
from .routed_linear import BACKENDS
from .state import RoutingState, for_graph
from .ways import Way


class ParameterBranch(nn.Module):
    """The E experts of one stacked parameter with n base experts; expert e of base expert j lies at j * E + e.

    plans: one for each base expert, of the same method. The tensors are buffers outside the state dict; they follow the
    model's `.to()` and `.half()`, but gates and fixed weights stay float32.
    """

    _float32 = ("gates", "weights")

    def __init__(
        self,
        plans: Sequence[Plan],
        routing: Routing | None,
        *,
        name: str,
        device: torch.device,
        factored: bool = False,
        needs_bias: bool = False,
        state: RoutingState,
        backend: str = "native",
    ):
        super().__init__()
        self.name, self.factored, self.needs_bias, self.state, self.backend = name, factored, needs_bias, state, backend
        first = plans[0]
        self.num_experts, _, width = first.lora_A.shape
        self.route_options = None
        if first.gates is not None:
            self.route_options = {
                "top_k": self.num_experts if routing.top_k is None else routing.top_k,
                "normalize": routing.normalize,
                "absolute": routing.absolute,
                "scale": routing.resolved_scale(width, self.num_experts),
                "top_p": routing.top_p,
                "weighting": routing.weighting,
            }
        gates, mask = _shared_or_own(plans)
        for key, tensor in (
            ("lora_A", _side_by_side([plan.lora_A for plan in plans])),
            ("lora_B", _side_by_side([plan.lora_B for plan in plans])),
            ("lora_bias", None if first.lora_bias is None else torch.cat([plan.lora_bias for plan in plans])),
            ("gates", gates),
            ("mask", mask),
            ("weights", None if first.weights is None else first.weights.float()),
        ):
            self.register_buffer(key, None if tensor is None else tensor.to(device), persistent=False)
        self._lay_out()

    def _apply(self, fn, recurse=True):
        kept = {key: getattr(self, key) for key in self._float32}
        super()._apply(fn, recurse)
        for key, tensor in kept.items():
            moved = getattr(self, key)
            if moved is not None and moved.dtype != torch.float32:
                setattr(self, key, tensor.to(moved.device))
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        if self.lora_A.device.type != "cpu":
            self.lora_A, self.lora_B = whole_vectors(self.lora_A, self.lora_B)

    def forward(self, y: Tensor, x: Tensor, pairs: Pairs, copies: bool) -> Tensor:
        """y [S,O] with the branch of x [S,D]; `copies`: x are rows of `pairs.tokens`, by `pairs.token`."""
        kernels = BACKENDS[self.backend]
        if self.route_options is None:
            weights = self.weights.expand(len(x), -1)
            experts = torch.arange(self.num_experts, device=x.device).expand(len(x), -1)
        else:
            weights, experts = self._choose(kernels, x, pairs, copies)
        slots = (pairs.base[:, None] * self.num_experts + experts).int()
        bank = (self.lora_A, self.lora_B, weights.contiguous(), slots)
        options = {"lora_bias": self.lora_bias, "factored": self.factored}
        if torch.is_grad_enabled():
            return kernels.lora_apply(y, x, *bank, **options)
        kernels.lora_apply_(y, x, *bank, **options)
        return y

    def _choose(self, kernels, x: Tensor, pairs: Pairs, copies: bool) -> tuple[Tensor, Tensor]:
        """weights and experts [S,K] of the pairs."""
        weights, experts = self.scored(kernels, x, pairs, copies, self.route_options)
        request, of_tokens = self.state.of_forward(), copies and self.gates.dim() == 2
        if request.trace is not None:
            real = None if request.tokens is None else request.tokens.mask(pairs.tokens)
            real = real if real is None or of_tokens else real[pairs.token]
            request.trace.add(self.name, weights, experts, real, pairs.tokens, None if of_tokens else pairs.token)
        return (weights[pairs.token], experts[pairs.token]) if of_tokens else (weights, experts)

    def scored(
        self, kernels, x: Tensor, pairs: Pairs, copies: bool, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """weights and experts of whatever is scored: [T,K] for the tokens, where x are copies of them, else [S,K]."""
        if self.gates.dim() == 3:
            return self._scored_by_base(kernels, x, pairs, options)
        bias = self._score_bias(x.device)
        rows = None if bias is None else self._rows(len(bias), pairs, copies)
        return kernels.route(pairs.tokens if copies else x, self.gates, mask=self.mask, bias=bias, rows=rows, **options)

    def _rows(self, count: int, pairs: Pairs, copies: bool) -> Tensor | None:
        """Which of `count` rows what is scored belongs to, [T] or [S] int32; None: T/count adjacent tokens per row."""
        affinities = self.state.of_forward().affinities
        rows = None if affinities is None else affinities.rows
        of_tokens = None if rows is None else rows.of(self.name, pairs.tokens)
        if copies:
            return of_tokens
        # pairs are not in the order of the tokens
        return (pairs.token * count // len(pairs.tokens)).int() if of_tokens is None else of_tokens[pairs.token]

    def _scored_by_base(self, kernels, x: Tensor, pairs: Pairs, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """[S,K], by the gates of each pair's base expert."""
        counts = torch.bincount(pairs.base, minlength=len(self.gates)).tolist()
        parts = [
            kernels.route(part, self.gates[j], mask=self.mask[j], **options)
            for j, part in enumerate(x.split(counts))
            # one call at least, for the shapes
            if len(part) or j == 0
        ]
        return torch.cat([weights for weights, _ in parts]), torch.cat([experts for _, experts in parts])

    def _score_bias(self, device: torch.device) -> Tensor | None:
        if not self.needs_bias:
            return None
        bias = self.state.of_forward().bias
        if bias is None:
            raise RuntimeError(f"{self.name}: {NOT_SET}")
        return for_graph(bias).to(device)

    def extra_repr(self) -> str:
        total, rank, _ = self.lora_A.shape
        return (
            f"experts={self.num_experts}, base_experts={total // self.num_experts}, rank={rank}, "
            f"routing={self.route_options}, factored={self.factored}"
        )


class RoutedExperts(nn.ModuleDict):
    """The branches of one experts module, by parameter; see `fused_experts.open_door`."""

    def __init__(self, branches: dict[str, ParameterBranch], state: RoutingState):
        super().__init__(branches)
        self.state = state

    @property
    def running(self) -> bool:
        return self.state.of_forward().enabled

    def add_branch(self, parameter: str, y: Tensor, x: Tensor, pairs: Pairs, copies: bool) -> Tensor:
        return self[parameter](y, x, pairs, copies) if parameter in self else y


def routed_experts(
    model: nn.Module,
    experts: ExpertBank,
    placement: Placement,
    method: Method,
    routing: Routing | None,
    settings: Mapping[str, Any],
    absent: str,
    **options: Any,
) -> tuple[dict[str, RoutedExperts], list[str]]:
    """(what to place in each experts module, what keeps it from being placed); `options` are `ParameterBranch`'s."""
    branches: dict[str, dict[str, ParameterBranch]] = {}
    problems: list[str] = []
    if placement.problems:
        return {}, problems
    for owner, parameter, pieces in placement.paths():
        module, path = model.get_submodule(owner), f"{owner}.{parameter}"
        try:
            turned = are_turned(module, placement.parameters[owner])
            bank = ParameterBank(experts, owner, module, parameter, pieces, turned)
            if reason := _gates_of_layers(experts, bank, pieces, method.gate_kind):
                problems.append(f"module '{path}': {reason}")
                continue
            plans = [method.plan(experts, bank.of(j), path, settings) for j in range(len(bank))]
            if plans[0].weigher is not None:
                problems.append(f"module '{path}': method '{method.name}' weighs the experts of linear layers alone")
                continue
            if absent == "base":
                plans = [with_absent(plan, bank.of(j)) for j, plan in enumerate(plans)]
        except ValueError as error:
            problems.append(str(error) if path in str(error) else f"module '{path}': {error}")
            continue
        device = execution_device(module)
        branch = ParameterBranch(plans, routing, name=path, device=device, **options)
        branches.setdefault(owner, {})[parameter] = branch
    return {owner: RoutedExperts(found, options["state"]) for owner, found in branches.items()}, problems


def _gates_of_layers(experts: ExpertBank, bank: ParameterBank, pieces: Iterable[Piece], kind: str | None) -> str | None:
    """Why gates are refused that were made for the linear layers of each base expert; None when there are none."""
    for piece in pieces:
        made = piece.factors.has_gate.get(kind, torch.zeros_like(bank.present))
        if names := [experts.names[e] for e in (made & ~bank.has_gate.get(kind, ~made)).nonzero().flatten().tolist()]:
            return (
                f"{listed([repr(name) for name in names], 'expert')} have gates of kind '{kind}' for layers of each "
                f"base expert ({piece.source}), and this model routes all of them by one: make them again with it"
            )
    return None


def ways_of(model: nn.Module, parameters: Iterable[str], grad: bool) -> list[Way]:
    """How the branches of stacked parameters are computed, one entry per kind."""
    kinds: dict[str, list[str]] = {}
    for path in parameters:
        owner, _, parameter = path.rpartition(".")
        module = model.get_submodule(owner)
        branch = getattr(module, BRANCHES)[parameter]
        total, rank, width = branch.lora_A.shape
        base, bank = (str(t.dtype).removeprefix("torch.") for t in (getattr(module, parameter), branch.lora_A))
        described = (
            f"{parameter} of {type(module).__name__} {width} -> {branch.lora_B.shape[1]}, {base} on "
            f"{branch.lora_A.device.type}, {counted(branch.num_experts, 'expert')} of rank {rank} in {bank} for each "
            f"of {total // branch.num_experts} base experts"
        )
        kinds.setdefault(described, []).append(path)
    way = "its base experts one matrix product each or grouped, the branch "
    way += "in a result of its own" if grad else "written into their result"
    return [Way(tuple(paths), described, way, (), ()) for described, paths in kinds.items()]


def _shared_or_own(plans: Sequence[Plan]) -> tuple[Tensor | None, Tensor | None]:
    """gates [E,D] and mask [E] or None where all base experts have the same; else [n,E,D] and [n,E]."""
    first = plans[0]
    if first.gates is None:
        return None, None
    masks = [torch.ones_like(plan.gates[:, 0], dtype=torch.bool) if plan.mask is None else plan.mask for plan in plans]
    pairs = zip(plans, masks, strict=True)
    alike = all(torch.equal(first.gates, plan.gates) and torch.equal(masks[0], mask) for plan, mask in pairs)
    # copied: the bank's set_gates must not reach a patched model
    return (first.gates.clone(), first.mask) if alike else (torch.stack([p.gates for p in plans]), torch.stack(masks))


def _side_by_side(factors: Sequence[Tensor]) -> Tensor:
    """[E,.,.] of every base expert -> [n*E,.,.], the middle axis contiguous as the CPU kernels read it."""
    stacked = torch.stack([f.mT for f in factors])
    return stacked.flatten(0, 1).mT
