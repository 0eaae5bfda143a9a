"""`merge_experts`: many experts as one PEFT adapter, or as a model with the merge in its weights."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..experts.branches import kind_name
from ..experts.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from ..experts.formats.peft_config import read_config
from ..experts.formats.view import peft_config
from ..experts.keys import PREFIX
from ..experts.prompt_notes import note_of_prompt, noted_prompts
from ..files.atomic import check_new_folder, write_folder_atomically
from ..files.listing import grouped, listed
from ..files.safefile import file_inside
from ..models.wrappers import unwrapped
from ..routing.base_model import carried
from ..routing.fitting import on_model
from .full_model import check_can_hold, save_merged
from .products import METHODS, Product, mean_of_factors, mean_of_products, truncated

PROGRESS_AFTER = 2.5  # seconds
OTHERS = r"^(?!.*\.experts\.)"  # modules that are not of fused experts
_OF_A_MIXTURE = re.compile(r"(?:.+\.)?experts\.[0-9]+\..+")


@dataclass(frozen=True)
class Merge:
    """What was written. ranks: {module path: rank}; error: |merge - what was written| / |merge|, in the Frobenius norm
    over all modules, 0 when it is exact; worst: (module path, the same of that module).
    """

    path: Path
    ranks: dict[str, int]
    error: float = 0.0
    worst: tuple[str, float] | None = None


def merge_experts(
    experts: ExpertBank,
    output: str | os.PathLike,
    *,
    method: str = "merged",
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
    model: nn.Module | None = None,
    full: bool = False,
    tokenizer: Any = None,
    progress: bool = True,
) -> Merge:
    """Write a merge of experts as a PEFT folder, or (`full`) as a model with the merge in its weights.

        merged          y = W u + sum_e w_e B_e A_e u             w_e = 1/E unless given
        merged_factors  y = W u + (sum_e w_e B_e) (sum_e w_e A_e) u

    which are the methods of `patch` by these names (PHATGOOSE, arXiv 2402.05859, appendix C).

    Args:
        output: a folder that is empty or not there yet; it is written whole or not at all.
        weights: {expert name: w_e}, one for every expert, as they are (their sum may be anything).
        rank: at most this many, by singular values, with `Merge.error`; None is exact. The rank of a module is then the
            sum of the experts', under `merged_factors` the largest of them.
        model: the base model, to hold the experts against it: their modules, what was saved beside their LoRA, and the
            start of PiSSA and OLoRA. It stays as it is. Needed for `full`, and for experts that depend on it.
        tokenizer: saved beside a full model.

    Raises ValueError, before anything is written, for arguments out of range, experts that do not fit the model, LoRA
    on fused experts, parameters of the base that experts bring and no model to compare them with, and under `full` for
    layers whose weights cannot take the merge (quantized, tied, a bias that the layer lacks); OSError for a folder that
    cannot be written.
    """
    each = check_arguments(experts, method, weights, rank, model is not None, full)
    target = check_new_folder(output)
    name = experts.base_model
    if model is not None:
        model = unwrapped(model)
        experts = _on_this_model(model, experts)
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or name
    if full:
        biased = {path: module.lora_bias is not None for path, module in experts.modules.items()}
        check_can_hold(model, biased)
    products, merge = _products(experts, target, method, each, rank, progress)
    if full:
        write_folder_atomically(target, lambda folder: save_merged(model, products, folder, tokenizer))
    else:
        write_folder_atomically(target, lambda folder: _write_adapter(folder, products, experts, name))
    return merge


def check_arguments(
    experts: ExpertBank,
    method: str,
    weights: Mapping[str, float] | None,
    rank: int | None,
    has_model: bool,
    full: bool,
) -> Tensor | None:
    """The weights [E] float64, or None; one ValueError with everything that is wrong with the arguments."""
    if not isinstance(experts, ExpertBank):
        raise ValueError(f"merge: experts must be an ExpertBank, from load_experts(...), got {type(experts).__name__}")
    problems, each = [], None
    if method not in METHODS:
        problems.append(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(f"rank must be a positive integer or None (exact), got {rank!r}")
    if full and not has_model:
        problems.append("a full model is the base with the merge in its weights: pass the model (--model)")
    if weights is not None:
        unknown = [name for name in weights if name not in experts.names]
        missing = [name for name in experts.names if name not in weights]
        wrong = [name for name, w in weights.items() if not (isinstance(w, (int, float)) and math.isfinite(w))]
        if unknown:
            problems.append(f"weights for {', '.join(unknown)}, and the experts are {', '.join(experts.names)}")
        if missing:
            problems.append(f"no weight for {', '.join(missing)}: give one to every expert, or none at all (1/E each)")
        if wrong:
            problems.append(f"weights must be finite numbers, got {', '.join(f'{n}={weights[n]!r}' for n in wrong)}")
        if not (unknown or missing or wrong):
            each = torch.tensor([float(weights[name]) for name in experts.names], dtype=torch.float64, device="cpu")
            if not each.any():
                problems.append("all weights are 0: nothing would be left")
    if others := _no_lora(experts):
        verb, them = ("is", "it") if len(others) == 1 else ("are", "them")
        problems.append(
            f"{listed(others)} {verb} no LoRA and cannot be merged: leave {them} out by load_experts(..., names=[...])"
        )
    if not has_model:
        problems += _needs_model(experts)
    if problems:
        raise ValueError("merge: " + "; ".join(problems))
    return each


def _no_lora(experts: ExpertBank) -> list[str]:
    """The experts that are no LoRA somewhere, with what they are."""
    found = {
        e: kind_name(branch.kind)
        for module in experts.modules.values()
        for branch in module.branches.values()
        for e in branch.present.nonzero().flatten().tolist()
    }
    return [f"{experts.names[e]!r} ({found[e]})" for e in sorted(found)]


def _needs_model(experts: ExpertBank) -> list[str]:
    """What of the experts can only be merged with the base model at hand."""
    pass_it = "pass the base model (--model)"
    problems, routed = [], frozenset(experts.modules)
    if fused := [path for path in experts.modules if _OF_A_MIXTURE.fullmatch(path)]:
        rest = _without_fused(experts)
        problems.append(f"{listed(fused, 'module')} may be parts of fused experts: {pass_it}{rest}")
    for name, claims in experts.claims.items():
        if claims.saved:
            way = "leave these layers out" if carried(claims.saved, routed) else "take the LoRA alone"
            problems.append(
                f"expert {name!r} brings its own {listed(list(claims.saved))}, which a merge cannot hold: {pass_it} to "
                f"compare them, or {way} by load_experts(..., modules=...) (--modules)"
            )
        if claims.init is not None:
            problems.append(f"expert {name!r} began with a part of the base's weights ({claims.init}): {pass_it}")
    return problems


def _without_fused(experts: ExpertBank) -> str:
    """The way out for LoRA on fused experts."""
    if all(".experts." in path for path in experts.modules):
        return "; they have nothing besides"
    return f", or take the rest alone by load_experts(..., modules='{OTHERS}') (--modules '{OTHERS}')"


def _on_this_model(model: nn.Module, experts: ExpertBank) -> ExpertBank:
    """The experts as plain LoRA under the model's own paths; ValueError with all that does not fit."""
    fitted, base = on_model(model, experts, "merged", None, "error")
    problems = list(fitted.problems)
    if fused := list(fitted.placement.parameters):
        rest = _without_fused(experts)
        problems.append(
            f"LoRA on fused experts ({listed(fused)}) cannot be merged: PEFT has no mean of such layers{rest}"
        )
    if problems:
        head = f": {fitted.made_for}" if fitted.made_for else ""
        raise ValueError(f"the experts cannot be merged on this model{head}:\n- " + "\n- ".join(grouped(problems)))
    for note in fitted.notes:
        warnings.warn(f"merge: {note}", stacklevel=3)
    return base.bank()


def _products(
    experts: ExpertBank, target: Path, method: str, each: Tensor | None, rank: int | None, progress: bool
) -> tuple[dict[str, Product], Merge]:
    """({module path: LoRA}, what there is to say of them). ValueError for numbers that leave their type's range."""
    mean = mean_of_products if method == "merged" else mean_of_factors
    products: dict[str, Product] = {}
    losses: dict[str, tuple[float, float]] = {}
    options = {"delay": PROGRESS_AFTER, "leave": False, "disable": not progress}
    for path, module in tqdm(experts.modules.items(), "merging", **options):
        product = mean(module, each)
        if product is None:
            continue
        if rank is not None and product.rank > rank:
            product, lost, whole = truncated(product, rank)
            losses[path] = (lost, whole)
        else:
            losses[path] = (0.0, 0.0 if rank is None else _norm(product))
        products[path] = product
    parts = {path: (product.lora_A, product.lora_B, product.bias) for path, product in products.items()}
    wrong = [path for path, some in parts.items() if not all(p is None or torch.isfinite(p).all() for p in some)]
    if wrong:
        raise ValueError(f"merge: {listed(wrong, 'module')} leave the range of their type: load in float32")
    ranks = {path: product.rank for path, product in products.items()}
    lost, whole = (sum(column) for column in zip(*losses.values(), strict=True))
    if not lost:
        return products, Merge(target, ranks)
    shares = {path: math.sqrt(part / all_) for path, (part, all_) in losses.items() if all_}
    worst = max(shares, key=shares.get)
    return products, Merge(target, ranks, math.sqrt(lost / whole), (worst, shares[worst]))


def _norm(product: Product) -> float:
    """|s B A|^2, in the Frobenius norm."""
    a, b = product.lora_A.double(), product.lora_B.double() * product.scaling
    return ((b.T @ b) * (a @ a.T)).sum().item()


def _write_adapter(folder: Path, products: Mapping[str, Product], experts: ExpertBank, base: str | None) -> None:
    biased = any(product.bias is not None for product in products.values())
    tensors = {}
    for path, product in products.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = product.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = product.lora_B
        if biased:
            bias = product.bias if product.bias is not None else product.lora_B.new_zeros(product.lora_B.shape[0])
            tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    ranks = {path: product.rank for path, product in products.items()}
    alphas = {path: product.rank * product.scaling for path, product in products.items()}
    config = peft_config(ranks, alphas, base) | _agreed(experts) | ({"lora_bias": True} if biased else {})
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt", **_prompt_note(experts)})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _agreed(experts: ExpertBank) -> dict[str, Any]:
    """What PEFT wants to know beside the LoRA: the experts' task_type if it is one, and whether weights are [D,O]."""
    configs = []
    for folder in filter(None, experts.folders):
        if (folder / CONFIG_FILE).exists():
            configs.append(read_config(file_inside(folder, CONFIG_FILE)))
    tasks = {config.get("task_type") for config in configs}
    turned = any(config.get("fan_in_fan_out") is True for config in configs)
    return {"task_type": tasks.pop() if len(tasks) == 1 else None, "fan_in_fan_out": turned}


def _prompt_note(experts: ExpertBank) -> dict[str, str]:
    """The note of the prompt that all experts were trained with, if it is one."""
    forms = [set(noted_prompts(folder).values()) if folder is not None else set() for folder in experts.folders]
    together = set().union(*forms)
    return note_of_prompt(together.pop()) if len(together) == 1 and all(forms) else {}
