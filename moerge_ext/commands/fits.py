"""What `patch` would refuse, refused before the weights of the model are read."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..methods.fixed import PREFIX, unknown_expert
from .expert_options import placing_of

if TYPE_CHECKING:
    from ..evaluation.runs import Run
    from ..experts.bank import ExpertBank


def check_fits(args: argparse.Namespace, experts: ExpertBank, method: str, options: Mapping[str, Any]) -> None:
    """ValueError where the method cannot be patched on --model with these experts, as far as names and sizes tell."""
    _check(_skeleton(args, experts), args, experts, method, options)


def check_runs_fit(args: argparse.Namespace, experts: ExpertBank, runs: Iterable[Run]) -> None:
    """The same of the first run that patches the model and cannot."""
    patching = [run for run in runs if run.method is not None and not run.apart]
    model = _skeleton(args, experts) if patching else None
    for run in patching:
        _check(model, args, experts, run.method, run.options)


def _check(model: Any, args: argparse.Namespace, experts: ExpertBank, method: str, options: Mapping[str, Any]) -> None:
    from ..routing.patch import check_patch

    if model is not None:
        check_patch(model, experts, method, loaded=False, **placing_of(args), **options)
        return
    problems = unknown_expert(experts, expert=method.removeprefix(PREFIX)) if method.startswith(PREFIX) else []
    if isinstance(top_k := options.get("top_k"), int) and top_k > len(experts):
        problems.append(f"top_k={top_k} is more than the number of experts, E={len(experts)}")
    if problems:
        raise ValueError("; ".join(problems))


def _skeleton(args: argparse.Namespace, experts: ExpertBank) -> Any:
    """The model without weights; None where they, or what a quantizer makes of its layers, have a say in what fits."""
    from ..models.linear import skeleton_to_train
    from ..models.pretrained import load_config

    if any(claims.saved or claims.init is not None for claims in experts.claims.values()):
        return None
    if getattr(load_config(args.model), "quantization_config", None) is not None:
        return None
    return skeleton_to_train(args.model)
