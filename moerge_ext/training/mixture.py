"""Train a mixture of whole models: its routers, or everything (Branch-Train-Mix, after `mix_models`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.prompt_notes import note_of_prompt
from ..models.prompt import PromptFormat
from ..models.stored import MIX_FILE, MODEL_CONFIG
from ..models.wrappers import trainable_inside
from ..routing.layers import values_problem
from .batches import Batch, Collate
from .encoding import MAX_LENGTH, prepare
from .loop import batch_loss
from .options import TrainingOptions, TrainingResult
from .whole import WholeRun, mark_of

STATE_FILE = "moerge_mix.checkpoint.safetensors"
CHECKPOINT_FOLDER = ".moerge-train-mix"
RATES = {"router": 1e-3, "all": 2e-5}


def train_mix(
    model: nn.Module,
    data: Iterable[Any],
    output_dir: str | Path,
    *,
    train: str = "router",
    balance: float = 0.01,
    steps: int = 500,
    lr: float | None = None,
    warmup_ratio: float = 0.06,
    batch_size: int = 8,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a mixture of experts of transformers, such as `mix_models` writes, and save it as a model in `output_dir`.

        loss = the model's + balance * sum over layers of  N sum_e f_e p_e

    f_e: the share of the chosen (token, expert) pairs that are of e, p_e: the mean of softmax(W_l x)_e; padding counts
    in neither (Switch Transformer, arXiv 2101.03961, eq. 4 to 6, whose f_e has no gradient). Branch-Train-Mix, arXiv
    2403.07816, trains all weights on the data of all experts together.

    train           "router": the W_l [N,D] alone; "all": every weight, as the paper does
    balance         of the loss above, in training alone: on validation data the model's own loss is measured
    lr              default: 1e-3 for the routers, 2e-5 for all (ours; the paper's could not be had)
    dtype           of what is written; default: as the model is
    the rest        as in `train_gates`; the state of an unfinished run lies in `.moerge-train-mix`

    `model` is trained in place, in float32 or float64. Errors: ValueError for arguments or data, a model without such
    routers, one expert per token (its weight is 1 whatever the router says), weights in 16 bits, a folder with a model
    in it; as in `train_gates` otherwise.
    """
    if train not in RATES:
        raise ValueError(f"train_mix: train must be one of {', '.join(RATES)}, got {train!r}")
    if not balance >= 0:
        raise ValueError(f"train_mix: balance must not be negative, got {balance}")
    target = Path(output_dir)
    options = TrainingOptions(
        steps=steps, lr=RATES[train] if lr is None else lr, warmup_ratio=warmup_ratio, accumulate=accumulate,
        weight_decay=weight_decay, eval_every=eval_every, seed=seed,
        checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER), checkpoint_every=checkpoint_every,
        resume=resume, progress=progress,
    )  # fmt: skip
    model = trainable_inside(model)
    parameters = _trained(model, train)
    prepared = prepare(
        model, data, validation, tokenizer=tokenizer, max_length=max_length, collate_fn=collate_fn, prompt=prompt
    )
    sources = prepared.sources(batch_size, shuffle, seed)
    facts = {"train": train, "balance": balance, "model": mark_of(model)}
    save = _Saving(model, dtype, tokenizer, facts | note_of_prompt(prepared.prompt))
    run = WholeRun(model, parameters, target, options, STATE_FILE, MIX_FILE, save)
    return run.go(sources, facts, label="mixture", loss=Balanced(model, balance))


def routers_in(model: nn.Module) -> dict[str, nn.Module]:
    """{path: router} of the mixtures in a model: modules with a weight [experts, D] beside their `experts`."""
    found = {}
    for path, module in model.named_modules():
        gate = getattr(module, "gate", None)
        if isinstance(getattr(module, "experts", None), nn.Module) and isinstance(gate, nn.Module):
            weight = getattr(gate, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 2:
                found[f"{path}.gate"] = gate
    return found


def _trained(model: nn.Module, train: str) -> dict[str, nn.Parameter]:
    routers = routers_in(model)
    if not routers:
        raise ValueError(
            f"{type(model).__name__} is no mixture of experts whose routers are known here: make one with "
            "moerge_ext.mix_models (moerge mix)"
        )
    if (top_k := getattr(model.config, "num_experts_per_tok", None)) == 1:
        raise ValueError(
            f"num_experts_per_tok={top_k}: the one expert of a token has weight 1, and its router learns nothing; set "
            "2 or more in the config"
        )
    named = {name: p for name, p in model.named_parameters() if train == "all" or name.rpartition(".")[0] in routers}
    for name, p in named.items():
        if why := values_problem(p):
            raise ValueError(f"{name} cannot be trained: {why}")
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {p.dtype}, in which small steps are lost: load the model in float32")
    return named


class Balanced:
    """The loss of a batch, in training with the balance of the routers."""

    def __init__(self, model: nn.Module, balance: float):
        self.balance, self.routers, self.top_k = balance, routers_in(model), model.config.num_experts_per_tok

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if not (model.training and self.balance):
            return batch_loss(model, batch)
        terms: list[Tensor] = []
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        real = None if mask is None else mask.flatten() != 0

        def watch(router: nn.Module, args: tuple) -> None:
            if torch._C._current_graph_task_id() == -1:  # else a checkpoint's recomputation
                terms.append(self.of_layer(args[0].flatten(0, -2), router.weight, real))

        with ExitStack() as stack:
            for router in self.routers.values():
                stack.callback(router.register_forward_pre_hook(watch).remove)
            loss = batch_loss(model, batch)
        return loss + self.balance * torch.stack([term.to(loss.device) for term in terms]).sum()

    def of_layer(self, x: Tensor, weight: Tensor, real: Tensor | None) -> Tensor:
        """N sum_e f_e p_e of tokens x [T,D], those where `real` [T] is False left out."""
        scores = nn.functional.linear(x, weight).float()
        scores = scores if real is None else scores[real.to(scores.device)]
        chosen = scores.topk(self.top_k, -1).indices
        shares = torch.zeros_like(scores).scatter_(1, chosen, 1.0).mean(0) / self.top_k
        return len(weight) * (shares * scores.softmax(-1).mean(0)).sum()


class _Saving:
    """How a trained mixture is written: in `dtype`, with what is said of it in a file of its own."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, tokenizer: Any, said: dict[str, Any]):
        self.model, self.dtype, self.tokenizer = model, dtype, tokenizer
        self.said = _said_of(model) | said

    def __call__(self, folder: Path, note: dict[str, str]) -> None:
        if self.dtype is None:
            self.model.save_pretrained(folder)
        else:
            self._in_dtype(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        (folder / MIX_FILE).write_text(json.dumps(self.said | note, indent=2) + "\n", encoding="utf-8")

    def _in_dtype(self, folder: Path) -> None:
        made: dict[tuple, Tensor] = {}  # tied weights stay one tensor
        state = {
            name: made.setdefault((t.data_ptr(), t.shape), t.to(self.dtype) if t.is_floating_point() else t)
            for name, t in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=state)
        config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _said_of(model: nn.Module) -> dict[str, Any]:
    """What lay beside the model: which models its experts are."""
    path = Path(str(getattr(model.config, "_name_or_path", ""))) / MIX_FILE
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {name: said[name] for name in ("method", "experts", "seed") if name in said} if isinstance(said, dict) else {}
    )
