"""RoutedLinear: a linear layer with its experts, and the state that all layers of a patched model read."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..experts.module_bank import whole_vectors
from ..methods.base import Plan, Routing
from ..ops import reference
from ..ops.options import BRANCH, filled
from . import ways
from .layers import execution_device, linear_features
from .trace import Trace
from .ways import against_fast_kernels, against_fused, against_in_place, against_kept, against_short

DEFAULTS = tuple(BRANCH.values())
BACKENDS = {"native": ops, "reference": reference}
_BRANCH = ("gates", "lora_A", "lora_B", "mask", "lora_bias")


class RoutingState:
    """What the handle sets and every RoutedLinear of a model reads: the current rows' score bias, the recorder."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None  # [N,E] float32
        self.active = False
        self.enabled = True  # False: every layer is its base alone
        self.trace: Trace | None = None

    def set_bias(self, bias: Tensor) -> None:
        """Written in place while the shape stays, so that a captured graph sees the new values."""
        # a tensor made in inference mode could not be written again outside of it
        with torch.inference_mode(False), torch.no_grad():
            if self.bias is not None and self.bias.shape == bias.shape and self.bias.device == bias.device:
                self.bias.copy_(bias)
            else:
                self.bias = bias.detach().clone()
        self.active = True


class RoutedLinear(nn.Module):
    """A linear layer and its experts: y = base_layer(x) + sum over the selected experts of w_e B_e A_e x.

    `base_layer` is the original module, called as it is: quantized, sharded and offloaded layers keep working. The
    bank's tensors are buffers outside the state dict; they follow the model's `.to()` and `.half()`, but gates and
    fixed weights stay float32. `weight`, `bias`, `in_features` and `out_features` are the base layer's.
    """

    _float32 = ("gates", "weights")
    _arguments: tuple = ()  # of the op, made from these buffers
    _made_from: tuple | None = None
    _may_fuse = False

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
    ):
        super().__init__()
        self.base_layer = base_layer
        self.name, self.factored, self.needs_bias, self.backend = name, factored, needs_bias, backend
        self.state = RoutingState() if state is None else state
        self.in_features, self.out_features = linear_features(base_layer)
        n_experts = plan.lora_A.shape[0]
        self.route_options = None
        if plan.gates is not None:
            self.route_options = {
                "top_k": n_experts if routing.top_k is None else routing.top_k,
                "normalize": routing.normalize,
                "absolute": routing.absolute,
                "scale": routing.resolved_scale(self.in_features, n_experts),
                "top_p": routing.top_p,
                "weighting": routing.weighting,
            }
        weights = None if plan.weights is None else plan.weights.float()[None]
        experts = None if weights is None else torch.arange(n_experts, dtype=torch.int32)[None]
        device = execution_device(base_layer)
        for key, tensor in (
            *zip(("lora_A", "lora_B"), _bank_laid_out(plan.lora_A, plan.lora_B, device), strict=True),
            ("lora_bias", plan.lora_bias),
            # copied: the bank's set_gates must not reach a patched model
            ("gates", None if plan.gates is None else _laid_out(plan.gates.clone(), device)),
            ("mask", plan.mask),
            ("weights", weights),
            ("experts", experts),
        ):
            self.register_buffer(key, None if tensor is None else tensor.to(device), persistent=False)
        self._warn_of_mixed_types()
        keep_base_keys(self)
        self.training = base_layer.training  # not .train(): the flags below base_layer stay as they are

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        # as model.tie_weights() does
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            self.__dict__["_made_from"] = None
            super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        kept = {key: getattr(self, key) for key in self._float32}
        super()._apply(fn, recurse)
        for key, tensor in kept.items():
            moved = getattr(self, key)
            if moved is not None and moved.dtype != torch.float32:
                setattr(self, key, tensor.to(moved.device))
        self.lora_A, self.lora_B = _bank_laid_out(self.lora_A, self.lora_B, self.lora_A.device)
        if self.gates is not None:
            self.gates = _laid_out(self.gates, self.gates.device)
        self._made_from = None
        self._warn_of_mixed_types()
        return self

    def _warn_of_mixed_types(self) -> None:
        for reason in against_fast_kernels(self):
            warnings.warn(reason, stacklevel=2)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] -> [..., O], in the dtype of the base layer's output."""
        if torch.compiler.is_compiling():
            return self._compiled_forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        # The short way, where y is all that is asked for of an nn.Linear as torch made it. By plain dictionaries: once
        # the weights of a layer have passed through the caches, each call and each object costs.
        # It takes 50 of 190 microseconds off one token's branch (2048 -> 2048, float32, cold, on a CPU).
        made = () if args or kwargs else self._kept_arguments()
        if made and not against_short(self, base, x):
            parameters = base.__dict__["_parameters"]
            weight, bias = parameters["weight"], parameters["bias"]
            if self._may_fuse and not against_fused(x, weight):
                return ops.call(ops.ROUTED_LINEAR, x, weight, bias, *made)[0]
            y = nn.functional.linear(x, weight, bias)
            try:
                ops.ROUTED_LORA_(y, x, *made)
            except RuntimeError as error:
                raise ops.explained(error, ops.ROUTED_LORA_, (y, x, *made)) from None
            return y
        return self._add_branch(base(x, *args, **kwargs), x)

    def _compiled_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """forward inside of a graph, where the short way is one op or none."""
        base = self._modules["base_layer"]
        # the device first: all that is read becomes a guard, 0.9 microseconds a layer and call together
        if x.device.type in ways.FUSED_DEVICES and not args and not kwargs:
            made = self._branch_arguments()
            if made and not against_short(self, base, x) and not against_fused(x, base.weight):
                return ops.ROUTED_LINEAR(x, base.weight, base.bias, *made)[0]
        return self._add_branch(base(x, *args, **kwargs), x)

    def _kept_arguments(self) -> tuple:
        """`_branch_arguments`, made again only after what they are made from was replaced."""
        held, source = self._buffers, self._made_from
        if (
            source is None
            or source[0] is not held["gates"]
            or source[1] is not held["lora_A"]
            or source[2] is not held["lora_B"]
            or source[3] is not held["mask"]
            or source[4] is not held["lora_bias"]
            or source[5] != self.route_options
            or source[6] is not (self.state.bias if self.state.active else None)
        ):
            # what it is made from first: another thread's change in between is then seen by the next call
            options = None if self.route_options is None else dict(self.route_options)
            bias = self.state.bias if self.state.active else None
            source = (*(held[key] for key in _BRANCH), options, bias)
            self.__dict__["_arguments"] = self._branch_arguments()
            self.__dict__["_may_fuse"] = held["lora_A"].device.type in ways.FUSED_DEVICES
            self.__dict__["_made_from"] = source
        return self._arguments

    def _branch_arguments(self) -> tuple:
        """The arguments of routed_lora_ after base and x; empty where they change from call to call."""
        if against_kept(self):
            return ()
        tensors = self._buffers
        bias = self.state.bias if self.needs_bias else None
        made = (tensors["gates"], tensors["lora_A"], tensors["lora_B"], *filled(BRANCH, self._options(bias)).values())
        # what is left to the op's own defaults costs no time
        while not isinstance(made[-1], Tensor) and made[-1] == DEFAULTS[len(made) - 4]:
            made = made[:-1]
        return made

    def _options(self, bias: Tensor | None) -> dict[str, Any]:
        """The options of the branch, with the score bias of the current rows."""
        kept = {"bias": bias, "mask": self._buffers["mask"], "lora_bias": self._buffers["lora_bias"]}
        return self.route_options | kept | {"factored": self.factored}

    def _add_branch(self, base: Tensor, x: Tensor) -> Tensor:
        """What forward does with the base layer's output in general."""
        if not self.state.enabled:
            return base
        in_place = not against_in_place(self)
        if self.route_options is None:
            return self._add_fixed(base, x, in_place)
        kernels, tensors = BACKENDS[self.backend], self._buffers
        bank = (tensors["gates"], tensors["lora_A"], tensors["lora_B"])
        options = self._options(self.score_bias(x.device))
        if in_place and base.is_contiguous() and x.is_contiguous():
            kernels.routed_lora_(base, x, *bank, **options)
            return base
        tokens, y = x.reshape(-1, self.in_features), base.reshape(-1, self.out_features)
        y, weights, experts = kernels.routed_lora(y, tokens, *bank, **options)
        if self.state.trace is not None:
            self.state.trace.add(self.name, weights, experts)
        return y.view(base.shape)

    def _add_fixed(self, base: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """base with the experts of a method that does not route, by their fixed weights."""
        kernels, tensors = BACKENDS[self.backend], self._buffers
        slots = (tensors["lora_A"], tensors["lora_B"], tensors["weights"], tensors["experts"])
        options = {"lora_bias": tensors["lora_bias"], "factored": self.factored}
        tokens, y = x.reshape(-1, self.in_features), base.reshape(-1, self.out_features)
        if in_place:
            kernels.lora_apply_(y, tokens, *slots, **options)
        else:
            y = kernels.lora_apply(y, tokens, *slots, **options)
        return y.view(base.shape)

    def score_bias(self, device: torch.device) -> Tensor | None:
        """What the handle adds to the scores of the current rows, [N,E]; None for a method without such a part."""
        if not self.needs_bias:
            return None
        if not self.state.active:
            raise RuntimeError(
                f"{self.name}: this method adds a global affinity per sequence, and none is set; run the model inside "
                "`with handle.queries(texts):` or `with handle.affinities(s):`, s [N, E]"
            )
        return self.state.bias.to(device)

    def extra_repr(self) -> str:
        n_experts, rank, _ = self.lora_A.shape
        return f"experts={n_experts}, rank={rank}, routing={self.route_options}, factored={self.factored}"


def _laid_out(gates: Tensor, device: torch.device) -> Tensor:
    """[E,D] as the kernels of the device read it fastest: the experts side by side on the CPU, else the features."""
    return gates.t().contiguous().t() if device.type == "cpu" else gates.contiguous()


def _bank_laid_out(lora_A: Tensor, lora_B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return (lora_A, lora_B) if device.type == "cpu" else whole_vectors(lora_A, lora_B)


def keep_base_keys(module: nn.Module) -> None:
    """The state dict of `module`, which wraps its `base_layer`, has the keys it has without the wrapper."""
    module.register_state_dict_post_hook(_strip_base_layer)
    module.register_load_state_dict_pre_hook(_insert_base_layer)


def _strip_base_layer(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The base's tensors keep the keys they have without the patch."""
    inner = prefix + "base_layer."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _insert_base_layer(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    inner = prefix + "base_layer."
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(inner)]:
        state[inner + key[len(prefix) :]] = state.pop(key)
