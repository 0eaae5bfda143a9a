"""OwnModule: a module of the model that computes with the parameters one expert brings (PEFT's `modules_to_save`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .stand_in import StandIn
from .state import RoutingState


class OwnModule(StandIn):
    """`base_layer` with some of its parameters replaced, as long as the handle is not disabled.

    The original module stays as it is, in the state dict too; what replaces it are buffers outside of the state dict,
    in the original's type. Attributes of the original can be read through this one.
    """

    def __init__(self, base_layer: nn.Module, own: Mapping[str, Tensor], state: RoutingState):
        super().__init__(base_layer)
        self.state = state
        self._own = tuple(own)
        for name, tensor in own.items():
            ours = base_layer.get_parameter(name) if name in base_layer._parameters else base_layer.get_buffer(name)
            self.register_buffer(
                f"own_{name}", tensor.detach().to(ours.device, ours.dtype, copy=True), persistent=False
            )
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names (accelerate's hooks) belong to the module that carries them
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.state.of_forward().enabled:
            return self.base_layer(*args, **kwargs)
        own = {name: getattr(self, f"own_{name}") for name in self._own}
        return functional_call(self.base_layer, own, args, kwargs)
