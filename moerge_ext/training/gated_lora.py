"""One expert behind learned gates, put into a model for as long as the gates are trained.

`gated_model` places a `GatedLoRA` (`gated_layer.py`) at every module the adapter names and takes all of them out
again, whatever happens in between.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..experts.fingerprint import note_of_adapter, with_tensors
from ..experts.formats import read_adapter
from ..experts.formats.adapter import Adapter, BottleneckWeights, LoraWeights, ModuleWeights, ScaleWeights
from ..experts.formats.peft import write_gates
from ..experts.gates import gates_file
from ..experts.hub import find_adapter
from ..experts.kinds import SIGMOID_GATE
from ..experts.prompt_notes import PROMPT_KEY
from ..experts.selection import Modules, Selection
from ..files.atomic import write_atomically
from ..files.listing import grouped, listed
from ..files.safefile import in_hub_cache
from ..models.wrappers import trainable_inside
from ..routing.base_model import saved_problems
from ..routing.base_start import init_problems, on_base
from ..routing.bottleneck import residual_problems
from ..routing.fitting import renamed_note
from ..routing.fused_experts import close_door, open_door
from ..routing.layers import execution_device
from ..routing.naming import ModelPaths
from ..routing.parameter_banks import Placement, place
from ..routing.products import is_product, layer_features
from ..routing.provenance import made_for, name_of_base, other_base_note
from ..routing.ran import FirstForward
from ..routing.refusals import no_effect, parallel_problems
from .checkpointing import gradients_pass_checkpoints
from .frozen import Frozen, frozen
from .gated_bottleneck import GatedBottleneck
from .gated_experts import GatedParameter, gated_experts, gated_parameters
from .gated_layer import GatedLoRA, GatedProduct
from .gated_scale import GatedScale
from .left_out import NOT_REACHED, warn_of_left_out
from .ranks import current_ranks, whole

if TYPE_CHECKING:
    from .callback import GateTrainerCallback

_PEFT_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}


class GatedModel:
    """What `gated_model` yields: the wrapped layers and what can be done with them.

    `model` is the caller's model (changed in place until the context ends), `adapter` what was read,
    `layers` one `GatedLoRA`, `GatedScale` or `GatedBottleneck` per module path and one `GatedParameter` per stacked
    parameter of fused experts, `still` what holds the rest of the model as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        layers: dict[str, GatedLoRA | GatedScale | GatedBottleneck | GatedParameter],
        still: Frozen,
        *,
        joint: bool = False,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.layers = layers
        self.still = still
        self.joint = joint

    @property
    def base_model(self) -> str | None:
        """The name of the model that the gates are made on."""
        return name_of_base(self.model, self.adapter.base_model)

    @property
    def folder(self) -> Path:
        if self.adapter.folder is None or in_hub_cache(self.adapter.folder):
            raise ValueError(f"adapter {self.adapter.name!r} has no folder that can be written to: say where to write")
        return self.adapter.folder

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: "<module path>/gate" -> [D], with joint training also ".../lora_A" and so on."""
        return {f"{path}/{n}": p for path, layer in self.layers.items() for n, p in layer.trainable().items()}

    def gates(self) -> dict[str, Tensor]:
        """A copy of the gates as they are now: module path -> [D], float32, on the CPU.

        Under FSDP2 (`fully_shard`) they are gathered, so that every rank must ask.
        """
        return {
            path: whole(layer.gate).to("cpu", torch.float32, copy=True)
            for path, layer in self.layers.items()
            if layer.gate is not None
        }

    def untrained(self) -> list[str]:
        """Paths of the layers that no token came through while gradients were on, and whose gate is still zero."""
        return [path for path, gate in self.gates().items() if not self.layers[path].ran and not gate.any()]

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

    def save(
        self,
        folder: str | Path | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        untrained: Iterable[str] | None = None,
    ) -> Path:
        """Write the gates beside the adapter (or into `folder`) and return the file.

        The gates of `untrained` modules (paths; by default what the method of that name says) are left out, with a
        warning that names them, and `patch` masks the expert there.

        After joint training the LoRA is written too: `adapter_model.safetensors` with the trained A and B
        (float32) and the adapter's config as PEFT has it. Every file appears whole or not at all. Of several processes
        rank 0 writes; under FSDP2 (`fully_shard`) every rank must call this. ValueError when none is left.
        """
        self.check_target(folder)
        target = Path(folder) if folder is not None else self.folder
        left_out, gates = set(self.untrained() if untrained is None else untrained), self.gates()
        if untrained is None and left_out == gates.keys():
            warnings.warn(f"no gate of '{self.adapter.name}' was trained: all that are written are zero", stacklevel=2)
            left_out.clear()
        gates = {path: gate for path, gate in gates.items() if path not in left_out}
        lora = self._lora() if self.joint else None
        if not gates:
            raise ValueError(f"no gate of '{self.adapter.name}' was trained: {NOT_REACHED}")
        if not current_ranks().first:
            return gates_file(target, SIGMOID_GATE)
        warn_of_left_out(self.adapter.name, left_out, len(self.layers))
        facts = {key: str(value) for key, value in (metadata or {}).items()}
        facts |= note_of_adapter(self.adapter.name, with_tensors(self.adapter.modules, lora or {}))
        target.mkdir(parents=True, exist_ok=True)
        if lora is not None:
            self._write_adapter(target, lora, {key: text for key, text in facts.items() if key == PROMPT_KEY})
        return write_gates(target, gates, kind=SIGMOID_GATE, base_model=self.base_model, metadata=facts)

    def check_target(self, folder: str | Path | None) -> None:
        """ValueError when `save` would overwrite the adapter without having been told to, or has no folder."""
        own = self.folder if folder is None else None
        if self.joint and own is not None:
            raise ValueError(
                f"joint training changes the adapter's weights: say in which folder to write them ({own} itself to "
                "overwrite it)"
            )

    def _lora(self) -> dict[str, Tensor]:
        """The trained factors under PEFT's names; a collective call under FSDP2."""
        return {
            f"base_model.model.{path}.{key}": whole(value).cpu().contiguous()
            for path, layer in self.layers.items()
            for name, key in _PEFT_KEYS.items()
            if (value := getattr(layer, name)) is not None
        }

    def _write_adapter(self, target: Path, tensors: dict[str, Tensor], note: dict[str, str]) -> None:
        config, header = json.dumps(self.adapter.config, indent=2).encode(), {"format": "pt", **note}
        write_atomically(target / "adapter_model.safetensors", lambda file: save_file(tensors, file, header))
        # the config last: without it the folder is not yet an adapter
        write_atomically(target / "adapter_config.json", lambda file: file.write_bytes(config))

    def callback(self, **options: Any) -> GateTrainerCallback:
        """A transformers `TrainerCallback` that keeps the best gates and writes them when training ends."""
        # transformers' Trainer takes seconds to import: only who asks for it pays
        from .callback import GateTrainerCallback

        return GateTrainerCallback(self, **options)


@contextmanager
def gated_model(
    model: nn.Module, adapter_folder: str | Path, *, gate: bool = True, joint: bool = False, modules: Modules = None
) -> Iterator[GatedModel]:
    """Put `model` into gate training with the adapter in `adapter_folder` (or hub id), for a `with` block.

    Inside the block every module that the adapter names is a `GatedLoRA` (or what its kind has), every parameter
    of the model is frozen and only the gates (with `joint=True` also A and B) require a gradient; norms with running
    statistics stay in `.eval()` mode. Afterwards the original modules, their `requires_grad` flags and training modes
    are back, also after an exception; the base's weights are never written and its buffers are bit-identical.

    modules: which of the adapter's modules, as for `load_experts`; the others are left out, LoRA and all.

    The model is the base model, not a `PeftModel`; `torch.compile` and DistributedDataParallel are looked through.
    What `save_pretrained` or a Trainer's checkpoint writes inside the block is the model under its own names, and
    beside it "<module path>.gate" (with `joint=True` ".lora_A" and so on): the model loads from it as ever, and the
    Trainer resumes from it. `GatedModel.save` or its callback writes the file that `load_experts` reads.

        with gated_model(model, "experts/a") as gated:
            Trainer(model=model, args=args, train_dataset=data, callbacks=[gated.callback()]).train()

    Errors: ValueError where `modules` takes none, or leaves some out with `joint`, which writes a whole adapter; else
    listing every module of the adapter that is missing in the model, is no linear layer, is already wrapped, or has
    other sizes (both shapes). Nothing is wrapped then.
    """
    name, folder = find_adapter(adapter_folder)
    model = trainable_inside(model)
    adapter = read_adapter(name, folder, model)
    taken = _taken(adapter, modules, joint)
    placement = place(model, taken.modules)
    linears = replace(taken, modules=placement.linears)
    places = _places(model, linears)
    if not joint:
        linears = _within_reach(model, linears, places)
        places = {path: places[path] for path in linears.modules if path in places}
    problems = _stacked_problems(taken, placement, joint) + _other_problems(model, linears, places, joint)
    targets = _matching_layers(model, linears, places, problems)
    weights = _on_base(model, linears, places, joint)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    layers = {path: _gated(base, weights[path], gate, joint) for path, base in targets.items()}
    branches = gated_experts(model, placement, gate=gate)
    with frozen(model) as still, gradients_pass_checkpoints(model):
        try:
            for p, _ in flags:
                p.requires_grad_(False)
            for path, layer in layers.items():
                layer.train(targets[path].training)
                layer.take_place(model, places[path])
            for owner, branch in branches.items():
                open_door(model.get_submodule(owner), branch)
            watched = [*(places[path] for path in layers), *branches]
            with FirstForward(model, watched, what="layers whose gates are trained"):
                yield GatedModel(model, adapter, layers | gated_parameters(branches), still, joint=joint)
        finally:
            for path, layer in layers.items():
                if layer.placed:
                    layer.give_back(model, places[path])
            for owner, branch in branches.items():
                close_door(model.get_submodule(owner), branch)
            for p, flag in flags:
                p.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


def _taken(adapter: Adapter, modules: Modules, joint: bool) -> Adapter:
    """The adapter with those of its modules that are asked for."""
    keeps = Selection(modules).keeps
    if keeps is None:
        return adapter
    if joint:
        raise ValueError("joint training (--joint) writes a whole adapter: modules (--modules) cannot leave some out")
    taken = {path: weights for path, weights in adapter.modules.items() if keeps(path)}
    if not taken:
        some = listed(list(adapter.modules)[:3])
        raise ValueError(f"modules={modules!r} takes none of the {len(adapter.modules)} of '{adapter.name}', as {some}")
    return replace(adapter, modules=taken)


def _within_reach(model: nn.Module, adapter: Adapter, places: dict[str, str]) -> Adapter:
    """The adapter without the layers that no branch can reach and where it changes nothing, which is warned of."""
    idle = {
        places[path]: path
        for path, weights in adapter.modules.items()
        if path in places and isinstance(weights, LoraWeights) and weights.idle
    }
    lost = {idle[place]: why for place, why in no_effect(model, idle).items()}
    for path, why in lost.items():
        warnings.warn(f"no gate for {path}, where '{adapter.name}' changes nothing: {why}", stacklevel=5)
    return replace(adapter, modules={path: w for path, w in adapter.modules.items() if path not in lost})


def _gated(base: nn.Module, weights: ModuleWeights, gate: bool, joint: bool) -> nn.Module:
    if isinstance(weights, ScaleWeights):
        return GatedScale(base, weights, gate=gate)
    if isinstance(weights, BottleneckWeights):
        return GatedBottleneck(base, weights, gate=gate)
    kind = GatedProduct if is_product(base) else GatedLoRA
    return kind(base, weights, gate=gate, train_lora=joint)


def _places(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """{module path of the adapter: path in the model}, as `patch` finds them; gates are kept under the former."""
    sizes = {path: (weights.in_features, weights.out_features) for path, weights in adapter.modules.items()}
    naming = ModelPaths(model).naming(sizes)
    base = other_base_note(model, [adapter.name], [(adapter.base_model, adapter.config.get("revision"))])
    for note in filter(None, (renamed_note([adapter.name], [naming]), base)):
        warnings.warn(note, stacklevel=4)
    return naming.paths


def _stacked_problems(adapter: Adapter, placement: Placement, joint: bool) -> list[str]:
    """What keeps gates of LoRA on fused experts from being trained."""
    problems, owners = list(placement.problems), listed(list(placement.parameters))
    if not adapter.modules:
        problems.append("the adapter has no LoRA module")
    if owners and joint:
        problems.append(
            f"joint=True trains the LoRA of linear layers, and this adapter has fused experts too ({owners})"
        )
    if owners and adapter.claims.init is not None:
        problems.append(
            f"LoRA on fused experts ({owners}) that began with {adapter.claims.init} cannot be computed again: convert "
            "the adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return problems


def _other_problems(model: nn.Module, adapter: Adapter, places: dict[str, str], joint: bool) -> list[str]:
    """What keeps gates of experts that are no LoRA from being trained."""
    problems, after = [], []
    for path, weights in adapter.modules.items():
        if joint and not isinstance(weights, LoraWeights):
            problems.append(f"{path}: joint=True trains LoRA, and this expert is none")
        if isinstance(weights, BottleneckWeights) and weights.after_residual and path in places:
            after.append(places[path])
    return problems + residual_problems(model, after)


def _matching_layers(
    model: nn.Module, adapter: Adapter, places: dict[str, str], problems: list[str]
) -> dict[str, nn.Module]:
    """The model's layer for every module of the adapter; one ValueError with `problems` and all that does not fit."""
    found: dict[str, nn.Module] = {}
    for path, weights in adapter.modules.items():
        if path not in places:
            problems.append(f"{path}: the model has no such module")
            continue
        layer = model.get_submodule(places[path])
        if hasattr(layer, "base_layer"):
            problems.append(f"{path}: already wrapped by {type(layer).__name__}; remove that first")
            continue
        features = layer_features(layer)
        wanted = (weights.in_features, weights.out_features)
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
    problems += parallel_problems(model)
    problems += [f"{path}: {why}" for path, why in no_effect(model, places.values()).items()]
    if problems:
        made = made_for(model, [adapter.name], [(adapter.base_model, None)])
        raise ValueError(
            f"the adapter does not fit: {made} (pass the base model the adapter was trained on, without a PEFT "
            "wrapper):\n- " + "\n- ".join(grouped(problems))
        )
    return found


def _on_base(model: nn.Module, adapter: Adapter, places: dict[str, str], joint: bool) -> dict[str, ModuleWeights]:
    """The adapter's modules as plain LoRA on this model; one ValueError with what its base had and this model lacks."""
    claims = {adapter.name: adapter.claims.renamed(places, there=dict(model.named_modules()))}
    problems = saved_problems(model, claims, places.values()) + init_problems(model, claims)
    init = adapter.claims.init
    if init is not None and joint:
        problems.append(
            f"joint=True would write factors that begin with {init}: convert the adapter first (PEFT: "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if problems:
        raise ValueError(f"adapter '{adapter.name}' does not fit {type(model).__name__}:\n- " + "\n- ".join(problems))
    if init is None:
        return adapter.modules
    return {path: on_base(lora, model.get_submodule(places[path]), init) for path, lora in adapter.modules.items()}
