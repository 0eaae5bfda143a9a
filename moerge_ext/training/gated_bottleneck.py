"""One expert's bottleneck adapter behind a learned gate, as `GatedLoRA` has a LoRA.

y_t = h_t + sigmoid(v . u_t) * scaling * (up f(down z_t))          h = W u + b, z: see `formats/bottleneck.py`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..experts.branches import AFTER, stacked_branches
from ..experts.formats.adapter import BottleneckWeights
from ..routing.bottleneck import Residual, bottleneck, unwatch, watch_residual
from ..routing.layers import execution_device
from ..routing.stand_in import StandIn

_PARTS = ("down", "down_bias", "up", "up_bias")


class GatedBottleneck(StandIn):
    """A linear layer with the adapter behind it and its gate v [D], a float32 parameter that starts at zero.

    Computed in float32 (float64 for a float64 u) outside of autocast and rounded once. `gate=False` leaves the sigmoid
    out (the plain expert).
    """

    def __init__(self, base_layer: nn.Module, weights: BottleneckWeights, *, gate: bool = True) -> None:
        super().__init__(base_layer)
        device = execution_device(base_layer)
        ((self.kind, branch),) = stacked_branches({0: weights}, 1, device).items()
        for part in _PARTS:
            self.register_buffer(part, branch.tensors[part][0], persistent=False)
        self.width, self.activation = weights.in_features, weights.activation
        zeros = torch.zeros(self.width, dtype=torch.float32, device=device)
        self.gate = nn.Parameter(zeros) if gate else None
        self.residual: Residual | None = None
        self.ran = False  # whether a token came through while gradients were on

    def take_place(self, model: nn.Module, path: str) -> None:
        super().take_place(model, path)
        if self.kind.endswith(AFTER):
            self.residual = watch_residual(model, path)

    def give_back(self, model: nn.Module, path: str) -> None:
        super().give_back(model, path)
        unwatch(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names (accelerate's hooks) belong to the module that carries them
            if name in ("base_layer", "gate", *_PARTS) or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = self.base_layer(x, *args, **kwargs)
        z = h if self.residual is None else self.residual.added_to(h)
        if torch.is_grad_enabled() and x.numel():
            self.ran = True
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            own = {part: getattr(self, part).to(dtype) for part in _PARTS}
            change = bottleneck(z.to(dtype), own, self.activation)
            if self.gate is not None:
                change = change * torch.sigmoid(x.to(dtype) @ self.gate.to(dtype)).unsqueeze(-1)
            return (h.to(dtype) + change).to(h.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters: its gate."""
        return {} if self.gate is None else {"gate": self.gate}
