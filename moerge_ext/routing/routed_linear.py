"""RoutedLinear: a linear layer with its experts."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .. import ops
from ..experts.module_bank import whole_vectors
from ..methods.base import Plan, Routing
from ..ops import reference
from ..ops.options import BRANCH, filled
from . import ways
from .generation import NOT_SET
from .layers import execution_device
from .outside_graphs import outside_of_graphs
from .products import layer_features
from .slots import with_spare
from .stand_in import StandIn
from .state import AMBIGUOUS, IDLE, Request, RoutingState, for_graph
from .threads import REQUESTS
from .ways import against_fast_kernels, against_fused, against_in_place, against_kept, against_short, most_fused

DEFAULTS = tuple(BRANCH.values())
BACKENDS = {"native": ops, "reference": reference}
BUFFERS = ("lora_A", "lora_B", "lora_bias", "gates", "mask", "weights", "experts")
FEW_EXPERTS = 8  # up to so many, the gates are stored expert by expert on every device
_BRANCH = ("gates", "lora_A", "lora_B", "mask", "lora_bias")
ANY_AUTOCAST = torch._C._is_any_autocast_enabled


class RoutedLinear(StandIn):
    """A linear layer and its experts: y = base_layer(x) + sum over the selected experts of w_e B_e A_e x.

    `base_layer` is the original module, called as it is: quantized, sharded and offloaded layers keep working. In a
    patched model its parameters have the names that they have without the patch. The bank's tensors are buffers
    outside the state dict; they follow the model's `.to()` and `.half()`, but gates and fixed weights stay float32.
    `weight`, `bias`, `in_features` and `out_features` are the base layer's.
    """

    unrouted = "the method routes nothing: its weights are fixed"  # why there is no `route_options`
    _float32 = ("gates", "weights")
    _kept: tuple | None = None  # (what these are made from, what `_kept_arguments` returns)

    def __init__(
        self,
        base_layer: nn.Module,
        plan: Plan,
        routing: Routing | None,
        *,
        name: str,
        factored: bool = False,
        needs_bias: bool = False,
        state: RoutingState | None = None,
        backend: str = "native",
        spare: int = 0,
    ):
        super().__init__(base_layer)
        self.name, self.factored, self.needs_bias, self.backend = name, factored, needs_bias, backend
        self.state = RoutingState() if state is None else state
        self.in_features, self.out_features = layer_features(base_layer)
        n_experts = plan.lora_A.shape[0]
        self.route_options = None
        self.resize(n_experts, None if plan.gates is None else routing)
        plan = with_spare(plan, spare)
        weights = None if plan.weights is None else plan.weights.float()[None]
        experts = None if weights is None else torch.arange(n_experts, dtype=torch.int32, device="cpu")[None]
        device = execution_device(base_layer)
        for key, tensor in (
            *zip(("lora_A", "lora_B"), bank_laid_out(plan.lora_A, plan.lora_B, device), strict=True),
            ("lora_bias", plan.lora_bias),
            # copied: the bank's set_gates must not reach a patched model
            ("gates", None if plan.gates is None else laid_out(plan.gates, device, copy=True)),
            ("mask", plan.mask),
            ("weights", weights),
            ("experts", experts),
        ):
            self.register_buffer(key, None if tensor is None else tensor.to(device), persistent=False)
        self._warn_of_mixed_types()
        self.training = base_layer.training  # not .train(): the flags below base_layer stay as they are

    def resize(self, num_experts: int, routing: Routing | None) -> None:
        """Says how many slots have experts, the first ones, and routes among that many (None: nothing is routed)."""
        self.num_experts = num_experts
        if routing is not None:
            self.route_options = {
                "top_k": num_experts if routing.top_k is None else routing.top_k,
                "normalize": routing.normalize,
                "absolute": routing.absolute,
                "scale": routing.resolved_scale(self.in_features, num_experts),
                "top_p": routing.top_p,
                "weighting": routing.weighting,
            }

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_kept"] = None
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        kept = {key: getattr(self, key) for key in self._float32}
        super()._apply(fn, recurse)
        for key, tensor in kept.items():
            moved = getattr(self, key)
            if moved is not None and moved.dtype != torch.float32:
                setattr(self, key, tensor.to(moved.device))
        self.lora_A, self.lora_B = bank_laid_out(self.lora_A, self.lora_B, self.lora_A.device)
        if self.gates is not None:
            self.gates = laid_out(self.gates, self.gates.device)
        self.__dict__["_kept"] = None
        self._warn_of_mixed_types()
        return self

    def _warn_of_mixed_types(self) -> None:
        for reason in against_fast_kernels(self):
            warnings.warn(reason, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] -> [..., O], in the dtype of the base layer's output."""
        if torch.compiler.is_compiling():
            return self._compiled_forward(x, *args, **kwargs)
        base, state, requests = self.base_layer, self.state, REQUESTS.get()
        if requests or state.busy:
            request = state.current()
        else:
            request = IDLE
        # The short way, where y is all that is asked for of an nn.Linear as torch made it. By plain dictionaries and
        # the cheapest calls: once the weights of a layer have passed through the caches, each call and each object
        # costs. One token of SmolLM2 (float32, one thread, no_grad, plain 79 ms) takes 92; 99 with all of
        # `against_fused` asked and y taken from what `routed_linear` returns; 88 with nothing asked.
        if not args and not kwargs and not against_short(base, x, request):
            parameters = base.__dict__["_parameters"]
            weight, bias = parameters["weight"], parameters["bias"]
            made, most, dtype = self._kept_arguments(request, weight)
            if made and (request.affinities is None or self.rows_of(x, request) is None):
                # `against_fused`
                if x.numel() <= most and x.dtype is dtype and not (ANY_AUTOCAST() and against_fused(x, weight)):
                    try:
                        return ops.ROUTED_LINEAR_Y(x, weight, bias, *made)
                    except RuntimeError as error:
                        raise ops.explained(error, ops.ROUTED_LINEAR_Y, (x, weight, bias, *made)) from None
                y = nn.functional.linear(x, weight, bias)
                try:
                    ops.ROUTED_LORA_(y, x, *made)
                except RuntimeError as error:
                    raise ops.explained(error, ops.ROUTED_LORA_, (y, x, *made)) from None
                return y
        return self._with_request(x, request, *args, **kwargs)

    def _with_request(self, x: Tensor, request: Request, *args: Any, **kwargs: Any) -> Tensor:
        """forward by no short way."""
        return self._add_branch(self.base_layer(x, *args, **kwargs), x, request)

    def _compiled_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """forward inside of a graph, where the short way is one op or none."""
        base, request = self.base_layer, self.state.shown()
        if request is None:
            return self._outside_of_graphs(x, *args, **kwargs)
        # the device first: all that is read becomes a guard, 0.9 microseconds a layer and call together
        device = x.device.type
        may_fuse = device in ways.FUSED_DEVICES or (device == "cpu" and not torch.compiler.is_exporting())
        if may_fuse and not args and not kwargs:
            made = self._branch_arguments(request)
            plain = made and not against_short(base, x, request) and self.rows_of(x, request) is None
            if plain and not against_fused(x, base.weight):
                return ops.ROUTED_LINEAR_Y(x, base.weight, base.bias, *made)
        return self._with_request(x, request, *args, **kwargs)

    @outside_of_graphs(AMBIGUOUS)
    def _outside_of_graphs(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # not by forward: torch says in every thread that it compiles while one does
        return self._with_request(x, self.state.current(), *args, **kwargs)

    def _kept_arguments(self, request: Request, weight: Tensor) -> tuple[tuple, float, torch.dtype]:
        """(`_branch_arguments`, `most_fused`, the weight's type), made again only after what they are made from was
        replaced."""
        held, kept = self._held() if self._renamed else self._buffers, self._kept
        bias = None if request.affinities is None else request.affinities.bias
        if bias is not None and bias.is_cuda:
            request.affinities.note_capture()
        if kept is not None:
            source, found = kept
            if (
                source[0] is held["gates"]
                and source[1] is held["lora_A"]
                and source[2] is held["lora_B"]
                and source[3] is held["mask"]
                and source[4] is held["lora_bias"]
                and source[5] == self.route_options
                and source[6] is bias
                and source[7]() is weight
            ):
                return found
        # what it is made from first: another thread's change in between is then seen by the next call
        options = None if self.route_options is None else dict(self.route_options)
        # the weight held weakly: of an offloaded layer there is a new one in every forward
        source = (*(held[key] for key in _BRANCH), options, bias, ref(weight))
        alike = held["lora_A"].device == weight.device
        found = (self._branch_arguments(request), most_fused(weight, self.in_features) if alike else -1, weight.dtype)
        self.__dict__["_kept"] = (source, found)  # at once, and not read again: other threads write here too
        return found

    def _held(self) -> dict[str, Tensor | None]:
        """This module's buffers, by their names as attributes."""
        if not self._renamed:
            return self._buffers
        return {name: self._buffers[self._renamed.get(name, name)] for name in BUFFERS}

    def _branch_arguments(self, request: Request) -> tuple:
        """The arguments of routed_lora_ after base and x; empty where they change from call to call."""
        if against_kept(self, request):
            return ()
        tensors = self._held()
        bias = request.bias if self.needs_bias else None
        made = (tensors["gates"], tensors["lora_A"], tensors["lora_B"], *filled(BRANCH, self._options(bias)).values())
        # what is left to the op's own defaults costs no time
        while not isinstance(made[-1], Tensor) and made[-1] == DEFAULTS[len(made) - 4]:
            made = made[:-1]
        return made

    def _options(self, bias: Tensor | None) -> dict[str, Any]:
        """The options of the branch, with the score bias of the current rows."""
        held = self._held()
        kept = {"bias": bias, "mask": held["mask"], "lora_bias": held["lora_bias"]}
        return self.route_options | kept | {"factored": self.factored}

    def _add_branch(self, base: Tensor, x: Tensor, request: Request) -> Tensor:
        """What forward does with the base layer's output in general."""
        if not request.enabled:
            return base
        self._check_result(base)
        in_place = not against_in_place(self, request)
        if self.route_options is None:
            return self._add_fixed(base, x, in_place)
        kernels, tensors = BACKENDS[self.backend], self._held()
        bank = (tensors["gates"], tensors["lora_A"], tensors["lora_B"])
        options = self._options(self.score_bias(x.device, request)) | {"rows": self.rows_of(x, request)}
        if in_place and base.is_contiguous() and x.is_contiguous():
            kernels.routed_lora_(base, x, *bank, **options)
            return base
        tokens, y = x.reshape(-1, self.in_features), base.reshape(-1, base.shape[-1])
        y, weights, experts = kernels.routed_lora(y, tokens, *bank, **options)
        if request.trace is not None:
            real = None if request.tokens is None else request.tokens.mask(x)
            request.trace.add(self.name, weights, experts, real, x)
        return y.view(base.shape)

    def _check_result(self, base: object) -> None:
        if not isinstance(base, Tensor):
            raise TypeError(
                f"{self.name}: {type(self.base_layer).__name__} returned a {type(base).__name__}, and experts can only "
                "be added to the one tensor of a linear layer; leave this module out of the experts"
            )

    def _add_fixed(self, base: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """base with the experts of a method that does not route, by their fixed weights."""
        kernels, tensors = BACKENDS[self.backend], self._held()
        slots = (tensors["lora_A"], tensors["lora_B"], tensors["weights"], tensors["experts"])
        options = {"lora_bias": tensors["lora_bias"], "factored": self.factored}
        tokens = x.reshape(-1, self.in_features)
        if in_place and base.is_contiguous():
            # base, not the view: torch.export would find that only some lengths have its shape
            kernels.lora_apply_(base.view(-1, base.shape[-1]), tokens, *slots, **options)
            return base
        y = kernels.lora_apply(base.reshape(-1, base.shape[-1]), tokens, *slots, **options)
        return y.view(base.shape)

    def score_bias(self, device: torch.device, request: Request | None = None) -> Tensor | None:
        """What the handle adds to the scores of the current rows, [N,E]; None for a method without such a part."""
        if not self.needs_bias:
            return None
        bias = (self.state.current() if request is None else request).bias
        if bias is None:
            raise RuntimeError(f"{self.name}: {NOT_SET}")
        return for_graph(bias).to(device)

    def rows_of(self, x: Tensor, request: Request | None = None) -> Tensor | None:
        """The row of every token of x [..., D], [T] int32; None where T/N adjacent tokens share one."""
        affinities = (self.state.current() if request is None else request).affinities
        return None if affinities is None or affinities.rows is None else affinities.rows.of(self.name, x)

    def extra_repr(self) -> str:
        slots, rank, _ = self.lora_A.shape
        said = f"experts={self.num_experts}, slots={slots}, rank={rank}"
        return f"{said}, routing={self.route_options}, factored={self.factored}"


def laid_out(gates: Tensor, device: torch.device, copy: bool = False) -> Tensor:
    """[E,D] as the kernels of the device read it fastest: the features side by side, but on the CPU the experts where
    there are enough of them to fill its vectors (figures in csrc/cpu/route.h).
    """
    transposed = device.type == "cpu" and gates.shape[0] > FEW_EXPERTS
    stored = gates.t() if transposed else gates
    stored = stored.clone(memory_format=torch.contiguous_format) if copy else stored.contiguous()
    return stored.t() if transposed else stored


def bank_laid_out(lora_A: Tensor, lora_B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return (lora_A, lora_B) if device.type == "cpu" else whole_vectors(lora_A, lora_B)
