"""One expert's (IA)3 vector behind a learned gate, as `GatedLoRA` has a LoRA.

    y_t = W u_t + g_t (expert(u_t) - W u_t),  g_t = sigmoid(v . u_t)

    on the output    y_t = (1 + g_t (l - 1)) * (W u_t + b)
    on the input     y_t = W ((1 + g_t (l - 1)) * u_t) + b

The gate multiplies what the expert adds to the layer, as PHATGOOSE's does (arXiv 2402.05859, section 3); the paper
writes it out for LoRA alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..experts.formats.adapter import ScaleWeights
from ..routing.layers import execution_device
from ..routing.stand_in import StandIn


class GatedScale(StandIn):
    """A linear layer with one (IA)3 vector l [D] or [O] and its gate v [D], a float32 parameter that starts at zero.

    Computed in float32 (float64 for a float64 u) outside of autocast and rounded once. `gate=False` leaves the sigmoid
    out (the plain expert).
    """

    def __init__(self, base_layer: nn.Module, weights: ScaleWeights, *, gate: bool = True) -> None:
        super().__init__(base_layer)
        self.on_input, self.width = weights.on_input, weights.in_features
        device = execution_device(base_layer)
        wide = torch.promote_types(weights.scale.dtype, torch.float32)
        self.register_buffer("change", weights.scale.to(device, wide) - 1, persistent=False)
        zeros = torch.zeros(self.width, dtype=torch.float32, device=device)
        self.gate = nn.Parameter(zeros) if gate else None
        self.ran = False  # whether a token came through while gradients were on

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names (accelerate's hooks) belong to the module that carries them
            if name in ("base_layer", "change", "gate") or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.numel() == 0:  # an expert of a mixture that got no token: it has nothing to learn from
            return self.base_layer(x, *args, **kwargs)
        if torch.is_grad_enabled():
            self.ran = True
        if self.on_input:
            return self.base_layer(self._scaled(x, x), *args, **kwargs)
        return self._scaled(self.base_layer(x, *args, **kwargs), x)

    def _scaled(self, values: Tensor, u: Tensor) -> Tensor:
        """values * (1 + sigmoid(v . u) (l - 1)), in their own dtype."""
        with torch.autocast(u.device.type, enabled=False):
            dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
            change = self.change.to(dtype)
            if self.gate is not None:
                change = change * torch.sigmoid(u.to(dtype) @ self.gate.to(dtype)).unsqueeze(-1)
            return (values.to(dtype) * (1 + change)).to(values.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters: its gate."""
        return {} if self.gate is None else {"gate": self.gate}
