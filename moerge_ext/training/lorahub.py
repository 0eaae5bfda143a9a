"""LoraHub (arXiv 2307.13269): fixed weights for one task, found without gradients from a few of its examples."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..models.prompt import INPUT, PromptFormat
from ..routing.patch import Handle, patch
from .batches import Batch, Collate
from .encoding import MAX_LENGTH, Encoder, collator, prepare
from .loop import batch_loss

OPTIMIZERS = ("nevergrad", "cobyla")


@dataclass(frozen=True)
class LoraHubResult:
    """weights [E] float32 (0 for experts that were not drawn), their objective, and that of every evaluation."""

    weights: Tensor
    objective: float
    history: list[float]


def lorahub(
    model: nn.Module,
    experts: ExpertBank,
    data: Iterable[Any],
    *,
    count: int = 20,
    budget: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    optimizer: str = "nevergrad",
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LoraHubResult:
    """Weights w for `count` random experts that minimize, within +-bound,

        loss(data; (sum_e w_e B_e)(sum_e w_e A_e)) + l1 * mean |w|          LoraHub, section 3, with its code's numbers

    by nevergrad's NGOpt, as the authors do, or by scipy's COBYLA ("cobyla", our alternative). At most `budget`
    evaluations, the first at w = 0 (the base). Use the result with
    `patch(model, experts, "lorahub")` and `with handle.affinities(result.weights):`.

    `data` and what it is made into batches by (`tokenizer` for rows of text) are as in `train_gates`. The model is as
    before afterwards. Errors: ImportError with the install line; ValueError for arguments out of range, empty data, and
    what `patch` refuses.
    """
    _check(count=count, budget=budget, bound=bound, batch_size=batch_size, l1=l1, optimizer=optimizer)
    data = data if isinstance(data, Sequence) else list(data)
    if not data:
        raise ValueError("lorahub: data is empty: a few examples of the task are needed")
    prepared = prepare(
        model, data, None, tokenizer=tokenizer, max_length=max_length, collate_fn=collate_fn, prompt=prompt
    )
    batches = list(prepared.sources(batch_size, False, seed)[0].epoch())
    with patch(model, experts, "lorahub") as handle:
        return _search(
            handle,
            batches,
            count=count,
            budget=budget,
            bound=bound,
            l1=l1,
            optimizer=optimizer,
            seed=seed,
            progress=progress,
        )


def _search(
    handle: Handle,
    batches: Sequence[Batch],
    *,
    count: int,
    budget: int,
    bound: float,
    l1: float,
    optimizer: str,
    seed: int,
    progress: bool,
) -> LoraHubResult:
    """The weights on a patched model, whose mode of training is as before afterwards."""
    model, size = handle.model, len(handle.names)
    drawn = sorted(random.Random(seed).sample(range(size), min(count, size)))
    nothing = torch.zeros(size, dtype=torch.float32, device="cpu")
    history, best, was_training = [], (float("inf"), nothing), model.training
    model.eval()
    try:
        with tqdm(total=budget, desc="lorahub", disable=not progress) as bar, torch.no_grad():

            def objective(values: Any) -> float:
                nonlocal best
                chosen = torch.as_tensor(values, dtype=torch.float32, device="cpu")
                weights = torch.zeros(size, dtype=torch.float32, device="cpu")
                weights[drawn] = chosen
                with handle.affinities(weights):
                    loss = sum(batch_loss(model, batch).item() for batch in batches) / len(batches)
                history.append(loss + l1 * chosen.abs().mean().item())
                if history[-1] < best[0]:
                    best = (history[-1], weights)
                bar.update()
                return history[-1]

            objective([0.0] * len(drawn))
            if budget > 1:
                search = _nevergrad if optimizer == "nevergrad" else _cobyla
                search(objective, len(drawn), bound, budget - 1, seed)
    finally:
        model.train(was_training)
    return LoraHubResult(best[1], best[0], history)


class LoraHubRouter:
    """Finds the weights of method `lorahub` for a task from a few solved examples; what `moerge eval` asks.

    tokenizer: the model's; template, chat: of `PromptFormat`.
    """

    source = "few-shot"
    task_examples = 5  # of the paper

    def __init__(self, tokenizer: Any, template: str = INPUT, *, chat: bool = False, max_length: int = 512):
        self.tokenizer, self.template, self.chat, self.max_length = tokenizer, template, chat, max_length

    def settings(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The method's options; ValueError for those out of range."""
        _check(**{name: value for name, value in options.items() if name != "seed"})
        return dict(options)

    def task_affinities(self, examples: Sequence[Mapping[str, str]], handle: Handle) -> Tensor:
        """Solved examples {"input", "target"} of one task -> weights [1,E], by `handle.options`."""
        encoder = Encoder(handle.model, self.tokenizer, self.max_length, PromptFormat(self.template, self.chat))
        features = encoder.features(examples, "the task's examples")
        encoder.warn_of_cut(len(features))
        found = _search(handle, [collator(self.tokenizer)(features)], progress=False, **handle.options)
        return found.weights[None]


def _check(*, l1: float, optimizer: str, **positive: float) -> None:
    problems = [f"{name} must be positive, got {value}" for name, value in positive.items() if not value > 0]
    if not l1 >= 0:
        problems.append(f"l1 must not be negative, got {l1}")
    if optimizer not in OPTIMIZERS:
        problems.append(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if problems:
        raise ValueError("lorahub: " + "; ".join(problems))


def _nevergrad(objective: Callable[[Any], float], size: int, bound: float, budget: int, seed: int) -> None:
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError(
            'lorahub needs nevergrad: pip install "moerge_ext[lorahub]", or pass optimizer="cobyla"'
        ) from error
    space = nevergrad.p.Array(init=[0.0] * size, lower=[-bound] * size, upper=[bound] * size)
    space.random_state.seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="COBYLA: Invalid")  # what NGOpt asks of scipy with a small budget
        nevergrad.optimizers.NGOpt(parametrization=space, budget=budget).minimize(objective)


def _cobyla(objective: Callable[[Any], float], size: int, bound: float, budget: int, seed: int) -> None:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError('optimizer="cobyla" needs scipy: pip install "moerge_ext[lorahub]"') from error
    left = budget

    def limited(values: Any) -> float:
        nonlocal left
        if left == 0:  # COBYLA insists on as many evaluations as there are unknowns, and two
            raise _BudgetSpent
        left -= 1
        return objective(values.clip(-bound, bound))

    try:
        options = {"maxiter": max(budget, size + 2), "rhobeg": bound / 3}
        minimize(limited, [0.0] * size, method="COBYLA", bounds=[(-bound, bound)] * size, options=options)
    except _BudgetSpent:
        pass


class _BudgetSpent(Exception):
    pass
