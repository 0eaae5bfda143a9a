"""Train the routers of a method over a frozen bank of experts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...experts.bank import ExpertBank
from ...experts.prompt_notes import note_of_prompt
from ...experts.routers import ROUTERS_FILE, Routers, marks_of
from ...files.atomic import check_writable
from ...methods import METHODS, get_method
from ...methods.base import Method
from ...methods.learned import NewRouters
from ...models.prompt import PromptFormat
from ...models.wrappers import trainable_inside
from ...routing.patch import Handle, patch
from ..batches import BatchSource, Collate
from ..checkpointing import gradients_pass_checkpoints
from ..encoding import MAX_LENGTH, Prepared, prepare
from ..frozen import Frozen, frozen
from ..left_out import NOT_REACHED
from ..loop import discard_state, fit, kept_step, saving
from ..options import TrainingOptions, TrainingResult, finished_before, note_of, settings_of
from ..ranks import current_ranks
from ..state import TrainingState
from .data import check_data, prepared_by_expert, side_by_side, single_examples
from .fisher import fisher_diagonal, nearest_experts
from .objective import OBJECTIVES
from .place import any_trainable, by_place, layers_of, trainable

STATE_FILE = "moerge_routers.checkpoint.safetensors"
CHECKPOINT_FOLDER = ".moerge-train-routers"
# where neither the caller nor the method says otherwise
DEFAULTS = {"steps": 250, "lr": 1e-3, "batch_size": 8, "balance": 0.0, "z": 0.0, "dropout": 0.0}


def train_routers(
    model: nn.Module,
    experts: ExpertBank,
    data: Iterable[Any] | None,
    output_dir: str | Path,
    *,
    method: str,
    expert_data: Mapping[str, Iterable[Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    balance: float | None = None,
    z: float | None = None,
    dropout: float | None = None,
    train_experts: bool | None = None,
    warmup_ratio: float = 0.06,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train the routers of `method` over `experts` and write them as `output_dir`/moerge_routers.safetensors.

        y_t = W u_t + sum_e w_e(u_t; router) B_e A_e u_t           the row of `method` says w

    Base and experts are frozen, unless the method (or `train_experts`) trains A and B too, which the file then keeps;
    the folders of the experts are never written. Use the file with `patch(model, experts, method, routers=FILE)`.

    method          a row of `METHODS` that is trained (lora_flow, mole, meteora, ...)
    options         the method's own, such as {"reads": "input"} of mole; those that shape the router go into the file
    data            as in `train_gates`: what the method is trained on, the task's few examples or the experts' own data
                    together; None for pwe_moe, which takes expert_data
    expert_data     {expert: its own data}, for pwe_moe, and for pi_tuning to find the nearest experts
    steps, lr, ...  None takes the method's own
    balance, z      coefficients of the losses of `objective.py`; dropout: the share of experts that sits out a step
    the rest        as in `train_gates`; the state of an unfinished run lies in `.moerge-train-routers`

    The model is as before afterwards, also after an exception. Errors: ValueError for arguments, data, a method that is
    not trained, and all that `patch` refuses; as in `train_gates` otherwise.
    """
    row = _trained_row(method)
    own = _chosen(row, steps=steps, lr=lr, batch_size=batch_size, balance=balance, z=z, dropout=dropout)
    joint = row.learned.experts if train_experts is None else train_experts
    target = Path(output_dir)
    training = TrainingOptions(
        steps=own["steps"], lr=own["lr"], warmup_ratio=warmup_ratio, accumulate=accumulate, weight_decay=weight_decay,
        eval_every=eval_every, seed=seed, checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER),
        checkpoint_every=checkpoint_every, resume=resume, progress=progress,
    )  # fmt: skip
    check_data(row, experts.names, data, expert_data)
    encoding = {"tokenizer": tokenizer, "max_length": max_length, "collate_fn": collate_fn, "prompt": prompt}
    by_expert = {} if expert_data is None else prepared_by_expert(model, experts.names, expert_data, **encoding)
    if row.learned.loss == "tasks":
        if validation is not None:
            raise ValueError(f"method '{method}' keeps its last routers: leave validation out")
        sources = side_by_side(by_expert, own["batch_size"], shuffle, seed), None
        note = note_of_prompt(next(iter(by_expert.values())).prompt)
    else:
        prepared = prepare(model, data, validation, **encoding)
        sources, note = prepared.sources(own["batch_size"], shuffle, seed), note_of_prompt(prepared.prompt)
    run = _Run(row, dict(options or {}), own, joint, target, training, note)
    if by_expert and row.learned.own_data:
        run.choose(trainable_inside(model), experts, by_expert)
    return run.on(trainable_inside(model), experts, sources)


def _trained_row(method: str) -> Method:
    row = get_method(method)
    if row.learned is None:
        known = ", ".join(name for name, other in METHODS.items() if other.learned is not None)
        raise ValueError(f"method '{method}' has no router to train; those that have: {known}")
    return row


def _chosen(row: Method, **given: float | None) -> dict[str, Any]:
    """The caller's numbers, else the method's, else DEFAULTS; ValueError for those out of range."""
    own = DEFAULTS | row.learned.training | {name: value for name, value in given.items() if value is not None}
    problems = [f"{name} must not be negative, got {own[name]}" for name in ("balance", "z") if not own[name] >= 0]
    if not 0 <= own["dropout"] < 1:
        problems.append(f"dropout must be in [0, 1), got {own['dropout']}")
    weigher = row.learned.weigher
    for name in ("balance", "z"):
        if own[name] and weigher is not None and not weigher.softmaxed:
            problems.append(f"{name} is for weights that are a softmax of scores, and those of '{row.name}' are not")
    if problems:
        raise ValueError("train_routers: " + "; ".join(problems))
    return own


class _Run:
    """One training of the routers of a row."""

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
        discard_state(self.training, STATE_FILE)
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
        start = NewRouters(self.row.learned, _width(model), self.training.seed)
        handle = patch(model, experts, self.row.name, routers=start, **self.options)
        if handle.parameters:
            handle.remove()
            raise ValueError(
                f"method '{self.row.name}' has routers for linear layers, and these experts have LoRA on stacked "
                f"parameters of fused experts ({', '.join(handle.parameters[:3])}): load_experts(..., modules=...) "
                "leaves them out"
            )
        try:
            self._check(handle)
        except ValueError:
            handle.remove()
            raise
        return handle

    def _facts(self, marks: Mapping[str, Tensor]) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path, mark in sorted(marks.items()):
            digest.update(path.encode() + mark.numpy().tobytes())
        kept = {name: str(value) for name, value in self.options.items()}
        numbers = {name: self.own[name] for name in ("balance", "z", "dropout")}
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
        loss = objective(handle, balance=self.own["balance"], z=self.own["z"], dropout=self.own["dropout"])
        state = fit(
            handle.model, parameters, sources[0], self.training, still=still, state_file=STATE_FILE,
            settings=settings, validation=sources[1], label=f"routers of {self.row.name}", loss=loss,
        )  # fmt: skip
        idle = [key for key in parameters if key not in state.adam_step]
        result = TrainingResult(file, state.step, kept_step(state), state.losses, state.validation)
        routers = Routers(
            self.row.name, handle.names, by_place(parameters), marks,
            {name: handle.options[name] for name in self.row.learned.kept}, handle.options["routers"].width,
            self._metadata(state, idle) | note_of(result, settings) | self.note,
        )  # fmt: skip
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
