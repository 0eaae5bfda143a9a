"""One expert's LoRA behind a learned gate, put into a model for as long as the gates are trained.

    y_t = W u_t + s B A u_t * sigmoid(v . u_t)                PHATGOOSE, arXiv 2402.05859, section 3

`GatedLoRA` is that layer; `gated_model` places one at every module the adapter names and takes all of them
out again, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..experts.formats.peft import Adapter, LoraWeights, read_adapter, write_gates
from ..experts.kinds import SIGMOID_GATE
from ..files.atomic import write_atomically
from ..routing.layers import execution_device, linear_features, replace_module

if TYPE_CHECKING:
    from .callback import GateTrainerCallback

_PEFT_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}


class GatedLoRA(nn.Module):
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
        super().__init__()
        self.base_layer = base_layer
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
        zeros = torch.zeros(lora.lora_A.shape[1], dtype=torch.float32, device=device)
        self.gate = nn.Parameter(zeros) if gate else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names (accelerate's hooks) belong to the module that carries them
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
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
        return {name: p for name, p in self._parameters.items() if p is not None}


class GatedModel:
    """What `gated_model` yields: the wrapped layers and what can be done with them.

    `model` is the caller's model (changed in place until the context ends), `adapter` what was read,
    `layers` one `GatedLoRA` per module path.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, layers: dict[str, GatedLoRA], *, joint: bool = False
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.layers = layers
        self.joint = joint

    @property
    def folder(self) -> Path:
        return Path(self.adapter.folder)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: "<module path>/gate" -> [D], with joint training also ".../lora_A" and so on."""
        return {f"{path}/{n}": p for path, layer in self.layers.items() for n, p in layer.trainable().items()}

    def gates(self) -> dict[str, Tensor]:
        """A copy of the gates as they are now: module path -> [D], float32, on the CPU."""
        return {
            path: layer.gate.detach().to("cpu", torch.float32, copy=True)
            for path, layer in self.layers.items()
            if layer.gate is not None
        }

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of everything that is trained, under the names of `parameters`, on its own device."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Put a `snapshot` back. ValueError when it names other parameters."""
        parameters = self.parameters()
        if parameters.keys() != snapshot.keys():
            different = sorted(parameters.keys() ^ snapshot.keys())
            raise ValueError(f"the snapshot is of another model; in one of the two only: {', '.join(different)}")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(snapshot[name])

    def save(self, folder: str | Path | None = None, *, metadata: dict[str, Any] | None = None) -> Path:
        """Write the gates beside the adapter (or into `folder`) and return the file written.

        After joint training the LoRA is written too: `adapter_model.safetensors` with the trained A and B
        (float32) and a copy of `adapter_config.json`. Every file appears whole or not at all.
        """
        self.check_target(folder)
        target = Path(folder) if folder is not None else self.folder
        target.mkdir(parents=True, exist_ok=True)
        if self.joint:
            self._write_adapter(target)
        facts = {key: str(value) for key, value in (metadata or {}).items()}
        return write_gates(target, self.gates(), kind=SIGMOID_GATE, base_model=self.adapter.base_model, metadata=facts)

    def check_target(self, folder: str | Path | None) -> None:
        """ValueError when `save` would overwrite the adapter without having been told to."""
        if self.joint and folder is None:
            raise ValueError(
                "joint training changes the adapter's weights: say in which folder to write them "
                f"({self.folder} itself to overwrite it)"
            )

    def _write_adapter(self, target: Path) -> None:
        tensors = {}
        for path, layer in self.layers.items():
            for name, key in _PEFT_KEYS.items():
                value = getattr(layer, name)
                if value is not None:
                    tensors[f"base_model.model.{path}.{key}"] = value.detach().cpu().contiguous()
        config = (self.folder / "adapter_config.json").read_bytes()
        write_atomically(target / "adapter_model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
        # the config last: without it the folder is not yet an adapter
        write_atomically(target / "adapter_config.json", lambda file: file.write_bytes(config))

    def callback(self, **options: Any) -> GateTrainerCallback:
        """A transformers `TrainerCallback` that keeps the best gates and writes them when training ends."""
        # transformers' Trainer takes seconds to import: only who asks for it pays
        from .callback import GateTrainerCallback

        return GateTrainerCallback(self, **options)


@contextmanager
def gated_model(
    model: nn.Module, adapter_folder: str | Path, *, gate: bool = True, joint: bool = False
) -> Iterator[GatedModel]:
    """Put `model` into gate training with the adapter in `adapter_folder`, for the length of a `with` block.

    Inside the block every module that the adapter names is a `GatedLoRA`, every parameter of the model is
    frozen and only the gates (with `joint=True` also A and B) require a gradient. Afterwards the original
    modules, their `requires_grad` flags and training modes are back, also after an exception; the base
    weights are never written.

    The model is the base model, not a `PeftModel`. `save_pretrained` inside the block would write the wrapped
    layers' names: give a Trainer `save_strategy="no"` and take the gates from `GatedModel.save` or its
    callback.

        with gated_model(model, "experts/a") as gated:
            Trainer(model=model, args=args, train_dataset=data, callbacks=[gated.callback()]).train()

    Errors: ValueError listing every module of the adapter that is missing in the model, is no linear layer,
    is already wrapped, or has other sizes (both shapes). Nothing is wrapped then.
    """
    folder = Path(adapter_folder)
    adapter = read_adapter(folder.name, folder)
    targets = _matching_layers(model, adapter)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    layers = {
        path: GatedLoRA(base, adapter.modules[path], gate=gate, train_lora=joint) for path, base in targets.items()
    }
    hooks: list[Any] = []
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for path, layer in layers.items():
            layer.train(targets[path].training)
            replace_module(model, path, layer)
        hooks = _inputs_require_grad(model)
        yield GatedModel(model, adapter, layers, joint=joint)
    finally:
        for hook in hooks:
            hook.remove()
        for path, base in targets.items():
            replace_module(model, path, base)
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _matching_layers(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The model's layer for every module of the adapter; one ValueError with all that does not fit."""
    found: dict[str, nn.Module] = {}
    problems: list[str] = []
    for path, lora in adapter.modules.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            problems.append(f"{path}: the model has no such module")
            continue
        if hasattr(layer, "base_layer"):
            problems.append(f"{path}: already wrapped by {type(layer).__name__}; remove that first")
            continue
        features = linear_features(layer)
        wanted = (lora.lora_A.shape[1], lora.lora_B.shape[0])
        if features is None:
            problems.append(f"{path}: {type(layer).__name__} is not a linear layer")
        elif features != wanted:
            problems.append(
                f"{path}: the adapter is for a weight of shape {list(wanted[::-1])} [out, in], the model's is "
                f"{list(features[::-1])}"
            )
        elif execution_device(layer).type == "meta":
            problems.append(f"{path}: its weights are on the meta device: load them before training")
        found[path] = layer
    if not adapter.modules:
        problems.append("the adapter has no LoRA module")
    if problems:
        raise ValueError(
            f"adapter '{adapter.name}' does not fit {type(model).__name__} (pass the base model the adapter "
            "was trained on, without a PEFT wrapper):\n- " + "\n- ".join(problems)
        )
    return found


def _inputs_require_grad(model: nn.Module) -> list[Any]:
    """Reentrant gradient checkpointing drops the gradient of a block none of whose inputs require one,
    which is every block of a frozen model: let the embeddings' output require it."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not checkpointing or not hasattr(model, "get_input_embeddings"):
        return []

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    return [model.get_input_embeddings().register_forward_hook(hook)]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
