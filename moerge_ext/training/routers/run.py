"""One run: routers put into the model, trained by `fit`, written as one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...experts.bank import ExpertBank
from ...experts.instructions import instructions_of
from ...experts.routers import ROUTERS_FILE, Routers, marks_of
from ...files.atomic import check_writable
from ...methods.base import Method
from ...methods.learned import NewRouters
from ...routing.patch import Handle, patch
from ..batches import BatchSource, model_device
from ..checkpointing import gradients_pass_checkpoints
from ..encoding import Prepared
from ..frozen import Frozen, frozen
from ..left_out import NOT_REACHED
from ..loop import discard_state, fit, kept_step, saving
from ..options import TrainingOptions, TrainingResult, finished_before, note_of, settings_of
from ..ranks import current_ranks
from ..state import TrainingState
from .data import single_examples
from .fisher import fisher_diagonal, nearest_experts
from .objective import OBJECTIVES
from .place import any_trainable, by_place, kept_as_begun, layers_of, trainable

NUMBERS = ("balance", "z", "dropout", "sparsity")  # of the objective
STATE_FILE = "moerge_routers.checkpoint.safetensors"


class Run:
    """One training of the routers of a row.

    options: the method's own; own: the numbers of `train_routers` that are not `TrainingOptions`; joint: whether A and
    B are trained too; target: the folder of the file; note: what else its header says.
    """

    state_files: tuple[str, ...] = (STATE_FILE,)

    def __init__(
        self,
        row: Method,
        options: dict[str, Any],
        own: dict[str, Any],
        joint: bool,
        target: Path,
        training: TrainingOptions,
        note: dict[str, str],
    ):
        self.row, self.options, self.own, self.joint = row, options, own, joint
        self.target, self.training, self.note = target, training, note
        self.common: dict[str, Tensor] | None = None
        if "routers" in options:
            raise ValueError("train_routers begins routers: leave routers out of options")

    def choose(self, model: nn.Module, experts: ExpertBank, by_expert: Mapping[str, Prepared]) -> None:
        """Leaves out all but the target's expert and those nearest to it."""
        asked = {**self.row.options, **self.options}
        self.row.learned.check(self.row.name, asked)
        target = asked["target"]
        if target not in experts.names:
            raise ValueError(
                f"method '{self.row.name}': target must name the expert of the task among {', '.join(experts.names)}, "
                f"got {target!r}"
            )
        if asked["without"] is not None:
            raise ValueError(f"method '{self.row.name}' finds out who to leave out: leave `without` out")
        fishers = {
            name: fisher_diagonal(model, experts, name, single_examples(part), progress=self.training.progress)
            for name, part in by_expert.items()
        }
        kept = nearest_experts(fishers, target, asked["nearest"])
        similar = {name: f"{float(fishers[name] @ fishers[target]):.4f}" for name in experts.names}
        self.note = self.note | {"fisher_cosine": json.dumps(similar)}
        self.options["without"] = ",".join(name for name in experts.names if name not in kept) or None

    def prompt(self, model: nn.Module, experts: ExpertBank, tokenizer: Any) -> None:
        """Begins the prompts: the model's embeddings of what the task's description and the experts' say."""
        said = self.row.configure(**self.options)[2]["description"]
        if said is None:
            raise ValueError(
                f"method '{self.row.name}' needs description, a sentence of what the task asks for: "
                'options={"description": "..."} (--option description="...")'
            )
        if tokenizer is None:
            raise ValueError(f"method '{self.row.name}' reads descriptions: pass tokenizer=, the model's")
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"{type(model).__name__} has no input embeddings: expected a model of transformers")
        embed = model.get_input_embeddings()
        texts = [said, *instructions_of(experts).values()]
        with torch.no_grad():
            ids = [torch.tensor(tokenizer(text).input_ids, device=model_device(model)) for text in texts]
            target, *sources = (embed(row).detach().to("cpu", torch.float32) for row in ids)
        self.common = self.row.learned.common.begin(target, sources)

    def on(
        self, model: nn.Module, experts: ExpertBank, sources: tuple[BatchSource, BatchSource | None]
    ) -> TrainingResult:
        """The routers, trained and saved."""
        ranks, file, flags = (
            current_ranks(),
            self.target / ROUTERS_FILE,
            [(p, p.requires_grad) for p in model.parameters()],
        )
        modes = [(module, module.training) for module in model.modules()]
        with frozen(model) as still, gradients_pass_checkpoints(model):
            try:
                for p, _ in flags:
                    p.requires_grad_(False)
                with self._patched(model, experts) as handle:
                    marks = marks_of(layers_of(handle))
                    settings = settings_of(self.training, *sources, self._facts(marks))
                    done = ranks.from_first(
                        lambda: finished_before(self.training, settings, file, file=file, state_file=STATE_FILE)
                    )
                    if done is not None:
                        return done
                    with ranks.together():
                        check_writable(self.target)
                    result = self._train(handle, sources, still, settings, marks, file)
            finally:
                for p, flag in flags:
                    p.requires_grad_(flag)
                for module, mode in modes:
                    module.training = mode
        for name in self.state_files:
            discard_state(self.training, name)
        return result

    def _check(self, handle: Handle) -> None:
        """ValueError for what cannot be learned with these options."""
        weighers = handle.options["routers"].weighers.values()
        if not any_trainable(handle, self.joint):
            raise ValueError(
                f"there is nothing to train: no module has a router of '{self.row.name}' with these options"
            )
        if not handle.options["routers"].width and any(weigher.read_width() is not None for weigher in weighers):
            raise ValueError(
                f"'{self.row.name}' has routers that read a layer's input, and the model's config says not how wide "
                "that is: it has no hidden_size"
            )
        if self.own["z"] and any(weigher.reads is not None for weigher in weighers):
            raise ValueError(
                f"z is for routers of single modules; '{self.row.name}' has one router for several modules"
            )
        layers = layers_of(handle).values()
        if any(l.gates is not None and l.route_options["top_k"] == 1 and len(handle.names) > 1 for l in layers):
            raise ValueError(f"top_k=1 of '{self.row.name}' gives every choice the weight 1: its gates learn nothing")

    def _patched(self, model: nn.Module, experts: ExpertBank) -> Handle:
        width = _width(model) if self.common is None else self.common["target"].shape[1]
        start = NewRouters(self.row.learned, width, self.training.seed, self.common)
        handle = patch(model, experts, self.row.name, routers=start, **self.options)
        self._refuse_stacked(handle)
        try:
            self._check(handle)
        except ValueError:
            handle.remove()
            raise
        return handle

    def _refuse_stacked(self, handle: Handle) -> None:
        """ValueError for experts of stacked parameters; the patch is then removed."""
        if not handle.parameters:
            return
        named = ", ".join(handle.parameters[:3])
        handle.remove()
        raise ValueError(
            f"method '{self.row.name}' has routers for linear layers, and these experts have LoRA on stacked "
            f"parameters of fused experts ({named}): load_experts(..., modules=...) leaves them out"
        )

    def _facts(self, marks: Mapping[str, Tensor]) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path, mark in sorted(marks.items()):
            digest.update(path.encode() + mark.numpy().tobytes())
        kept = {name: str(value) for name, value in self.options.items()}
        for name, tensor in sorted((self.common or {}).items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        numbers = {name: self.own[name] for name in NUMBERS}
        return {"method": self.row.name, "options": kept, "experts": digest.hexdigest(), "joint": self.joint, **numbers}

    def _train(
        self,
        handle: Handle,
        sources: tuple[BatchSource, BatchSource | None],
        still: Frozen,
        settings: dict[str, Any],
        marks: dict[str, Tensor],
        file: Path,
    ) -> TrainingResult:
        parameters = trainable(handle, self.joint)
        objective = OBJECTIVES[self.row.learned.loss]
        loss = objective(handle, **{name: self.own[name] for name in NUMBERS})
        state = fit(
            handle.model, parameters, sources[0], self.training, still=still, state_file=STATE_FILE,
            settings=settings, validation=sources[1], label=f"routers of {self.row.name}", loss=loss,
        )  # fmt: skip
        width = handle.options["routers"].width
        learned = self.row.learned
        kept = {name: handle.options[name] for name in (*learned.kept, *(("without",) if learned.leaves_out else ()))}
        tensors = parameters | kept_as_begun(handle)
        return self._write(handle, state, tensors, settings, marks, file, kept, width)

    def _write(
        self,
        handle: Handle,
        state: TrainingState,
        parameters: Mapping[str, Tensor],
        settings: dict[str, Any],
        marks: dict[str, Tensor],
        file: Path,
        kept: dict[str, Any],
        width: int,
    ) -> TrainingResult:
        """The file, by the first rank."""
        idle = [key for key, p in parameters.items() if p.requires_grad and key not in state.adam_step]
        result = TrainingResult(file, state.step, kept_step(state), state.losses, state.validation)
        note = self._metadata(state, idle) | note_of(result, settings) | self.note
        routers = Routers(self.row.name, handle.names, by_place(parameters), marks, kept, width, note)
        with current_ranks().together(), saving(state, self.training, STATE_FILE):
            if current_ranks().first:
                routers.save(file)
        return result

    def _metadata(self, state: TrainingState, idle: list[str]) -> dict[str, str]:
        facts = {"steps": self.training.steps, "lr": self.training.lr, "seed": self.training.seed}
        facts |= {"best_step": kept_step(state), "train_loss": f"{state.losses[-1]:.6g}"}
        if idle:
            facts["untrained"] = f"{len(idle)} tensors stay as they began: {NOT_REACHED}: {', '.join(idle[:5])}"
        return {name: str(value) for name, value in facts.items()}


def _width(model: nn.Module) -> int:
    """Features of what the model's layers read, 0 where its config does not say."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else 0
