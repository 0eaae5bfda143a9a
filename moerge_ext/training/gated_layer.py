"""One expert's LoRA behind a learned gate, at one linear layer.

y_t = W u_t + s B A u_t * sigmoid(v . u_t)                PHATGOOSE, arXiv 2402.05859, section 3
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..experts.formats.adapter import LoraWeights
from ..routing.layers import execution_device
from ..routing.products import Products
from ..routing.stand_in import StandIn

_NAMES = ("lora_A", "lora_B", "lora_bias", "gate")


class GatedLoRA(StandIn):
    """A linear layer with one LoRA expert and, optionally, its gate.

        y[..., O] = base_layer(u[..., D]) + s (B A u + b) * sigmoid(v . u)

    The second term is computed in float32 (float64 for a float64 u) outside of autocast and rounded once to
    the base output's dtype. The gate v [D] is a float32 parameter that starts at zero, so that every token
    begins with half the LoRA. `gate=False` leaves the sigmoid out (the plain LoRA). A [R, D], B [O, R] and
    b [O] are constants unless `train_lora=True`.

    Attributes of the base layer (`weight`, `bias`, `in_features`, ...) can be read through this one.
    """

    def __init__(
        self, base_layer: nn.Module, lora: LoraWeights, *, gate: bool = True, train_lora: bool = False
    ) -> None:
        super().__init__(base_layer)
        self.scaling = float(lora.scaling)
        device = execution_device(base_layer)
        factors = {"lora_A": lora.lora_A, "lora_B": lora.lora_B, "lora_bias": lora.bias}
        for name, value in factors.items():
            if value is not None:
                # a copy: what the adapter holds must stay as it was read, also when training writes here
                value = value.detach().to(device, _compute_dtype(value.dtype), copy=True)
            if train_lora and value is not None:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)
        self.width = lora.in_features
        zeros = torch.zeros(self.width, dtype=torch.float32, device=device)
        self.gate = nn.Parameter(zeros) if gate else None
        self.ran = False  # whether a token came through while gradients were on

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names (accelerate's hooks) belong to the module that carries them
            if name == "base_layer" or name in _NAMES or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._add(self.base_layer(x, *args, **kwargs), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        """y with the gated LoRA of x."""
        if x.numel() == 0:  # an expert of a mixture that got no token: it has nothing to learn from
            return y
        if torch.is_grad_enabled():
            self.ran = True
        with torch.autocast(x.device.type, enabled=False):
            dtype = _compute_dtype(x.dtype)
            u = x.to(dtype)
            h = u @ self.lora_A.to(dtype).T * self.scaling
            strength = None if self.gate is None else torch.sigmoid(u @ self.gate.to(dtype)).unsqueeze(-1)
            if strength is not None:
                # on the R columns of A u rather than on the O of B A u: the same product, and less to keep
                # for backward
                h = h * strength
            delta = h @ self.lora_B.to(dtype).T
            if self.lora_bias is not None:
                bias = self.lora_bias.to(dtype) * self.scaling
                delta = delta + (bias if strength is None else bias * strength)
        return y + delta.to(y.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters: "gate" and, when trained, "lora_A", "lora_B", "lora_bias"."""
        values = {name: getattr(self, name) for name in _NAMES}
        return {name: value for name, value in values.items() if isinstance(value, nn.Parameter)}


class GatedProduct(GatedLoRA):
    """The same at the product by its weight inside of a module (`routing.products`)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with Products(self.base_layer.weight, self._add):
            return self.base_layer(x, *args, **kwargs)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
