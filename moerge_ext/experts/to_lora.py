"""Adapters of PEFT's other kinds as a LoRA: exact where what they add to a weight has a small rank, else the best of a
rank, with what is lost.

    delta W = W' - W,  W' the weight that PEFT merges the adapter into      U S V^T = delta W,  B A = U_r S_r V_r^T

The best product of rank r in the Frobenius norm (Eckart and Young 1936), computed in float64. VeRA has the rank of its
projections, LoHa at most the product of its two ranks, LoKr rank(w1) * rank(w2); what multiplies the weight (DoRA,
HiRA, OFT) has a delta W that depends on the base and is of full rank in general. Whether W' x + b is what PEFT
computes is looked at in every layer: some kinds change the bias too.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files.atomic import check_new_folder, write_atomically
from ..files.listing import grouped
from ..files.safefile import file_inside
from ..files.shards import has_weights, open_weights
from ..models.linear import linear_features
from ..models.pretrained import load_adapted
from .formats.foreign import MERGES
from .formats.peft import CONFIG_FILE, WEIGHTS_FILE
from .formats.peft_config import read_config
from .formats.peft_keys import base_path
from .formats.peft_rules import lies_in
from .formats.view import peft_config
from .hub import find_adapter
from .keys import PREFIX, bare_path

AS_THEY_ARE = {"IA3": "(IA)3, which experts can be", "ADALORA": "AdaLoRA, which is read as a LoRA"}
DORA = "DoRA"
FITS = 1e-4  # relative difference below which a merged weight is what the layer computes, some of which use float32
EXACT = 1e-6  # relative error below which a conversion counts as exact: what float32 factors hold
_COMMON = ("task_type", "base_model_name_or_path", "revision")


@dataclass(frozen=True)
class Conversion:
    """What became of an adapter.

    ranks: {module path: rank}; errors: {module path: |delta W - B A| / |delta W|}, Frobenius norms.
    """

    path: Path
    kind: str
    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """(module path, its error) of the module that lost most."""
        return max(self.errors.items(), key=lambda pair: pair[1])


def convert_to_lora(
    source: str | os.PathLike,
    output: str | os.PathLike,
    base: nn.Module | str | os.PathLike | None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    progress: bool = True,
) -> Conversion:
    """Write the adapter `source`, of a kind in MERGES or a DoRA, as a PEFT LoRA folder `output`.

    base: the model it was trained on (left as it was), or its folder or hub id, loaded as the adapter's task_type says
    (a classifier with as many labels as its saved head): some kinds multiply its weights.
    rank: at most this rank in every module. max_error: the smallest rank whose relative error (Frobenius norm of what
    is lost over that of delta W, in each module) is at most this; with `rank` too, a module that needs more is refused.
    Neither: exact (an error of 1e-6 at most). Factors are float32 and hold the scaling (alpha = r). A module to which
    the adapter adds nothing gets rank 1 and zeros. Whole modules beside it (`modules_to_save`) are kept as they are.

    Raises ValueError, before anything is written, for an adapter of another kind, layers that are not linear, tensors
    that are missing, left over or of another shape than the model's, biases beside it, layers that change more than
    their weight, and, naming each module with the rank it needs, where factors that keep the bound are not smaller than
    the matrix.
    """
    _check_bounds(rank, max_error)
    name, folder = find_adapter(source)
    target = check_new_folder(output)
    config = _checked_config(name, folder)
    if base is None:
        raise ValueError("convert_to_lora: it takes base=MODEL (--model MODEL), which the adapter was trained on")
    kind = DORA if config["peft_type"] == "LORA" else config["peft_type"]
    whole = config.get("modules_to_save")
    stored, saved = _read(folder, whole or ())
    model, fresh = base, set()
    if not isinstance(base, nn.Module):
        shapes = {path: tensor.shape for path, tensor in saved.items()}
        model, fresh = load_adapted(os.fspath(base), config.get("task_type"), shapes)
    _check_saved(model, name, saved)
    tensors = {f"{PREFIX}{path}": tensor for path, tensor in saved.items()}
    ranks, errors, problems = {}, {}, []
    for path, delta, fits in _deltas(model, name, stored, config, progress):
        if not fits:
            problems.append(f"{path}: PEFT changes more than the weight here, such as the bias")
            continue
        if f"{path}.weight" in fresh:
            problems.append(
                f"{path}: the base's folder has no weights of it; convert_to_lora takes the model itself too"
            )
            continue
        a, b, errors[path] = best_product(delta, rank, max_error)
        ranks[path] = len(a)
        problems += [f"{path}: {why}" for why in _bound_problems(delta, len(a), errors[path], rank, max_error)]
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    if problems:
        raise ValueError(f"{kind} adapter {name!r} has no such LoRA:\n- " + "\n- ".join(grouped(problems)))
    fields = peft_config(ranks, dict(ranks), None) | {key: config[key] for key in _COMMON if key in config}
    fields |= {"modules_to_save": whole} if whole else {}
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / WEIGHTS_FILE, lambda file: save_file(tensors, file, {"format": "pt"}))
    # the config last: without it the folder is not yet an adapter
    write_atomically(target / CONFIG_FILE, lambda file: file.write_text(json.dumps(fields, indent=2) + "\n"))
    return Conversion(target, kind, ranks, errors)


def best_product(delta: Tensor, rank: int | None, max_error: float | None) -> tuple[Tensor, Tensor, float]:
    """(A [r,D], B [O,r] float32, relative error of B A) of delta [O,D] float64; r at most `rank`, and the smallest that
    keeps `max_error`."""
    u, values, v = torch.linalg.svd(delta, full_matrices=False)
    # what is lost with the first r kept, for r = 0, 1, ...
    left = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)]).sqrt()
    if not left[0]:
        return (
            torch.zeros(1, delta.shape[1], dtype=torch.float32, device="cpu"),
            torch.zeros(delta.shape[0], 1, dtype=torch.float32, device="cpu"),
            0.0,
        )
    lost = left / left[0]
    bound = EXACT / 10 if max_error is None else max_error
    needed = max(1, int((lost > bound).sum()))
    kept = needed if rank is None else min(needed, rank)
    root = values[:kept].sqrt()
    a, b = (root[:, None] * v[:kept]).float(), (u[:, :kept] * root).float()
    error = torch.linalg.matrix_norm(delta - b.double() @ a.double()) / left[0]
    return a.contiguous(), b.contiguous(), error.item()


def _check_bounds(rank: int | None, max_error: float | None) -> None:
    problems = []
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(f"rank must be a positive integer or None, got {rank!r}")
    if max_error is not None and not (isinstance(max_error, (int, float)) and 0 < max_error < 1):
        problems.append(f"max_error must be between 0 and 1, got {max_error!r}")
    if problems:
        raise ValueError("convert_to_lora: " + "; ".join(problems))


def _bound_problems(delta: Tensor, kept: int, error: float, rank: int | None, max_error: float | None) -> list[str]:
    out, width = delta.shape
    if max_error is not None and error > max(max_error, EXACT):
        return [f"rank {kept} leaves a relative error of {error:.3g}, more than {max_error:g}: allow a larger rank"]
    if rank is None and max_error is None and kept * (out + width) >= out * width:
        return [
            f"an exact one takes rank {kept} for [{out}, {width}], more numbers than the matrix has: allow a loss by "
            "rank=R (--rank R) or max_error=E (--max-error E)"
        ]
    return []


def _checked_config(name: str, folder: Path) -> dict[str, Any]:
    """The config of an adapter that can be converted."""
    problems, head = [], f"adapter {name!r} in {folder} cannot be converted to a LoRA"
    config = read_config(file_inside(folder.resolve(), CONFIG_FILE)) if folder.is_dir() else {}
    kind = config.get("peft_type")
    if (kind == "LORA" and config.get("use_dora") is not True) or kind in AS_THEY_ARE:
        # no more is said of it: nothing of it stands in the way
        raise ValueError(f"{head}: it is {AS_THEY_ARE.get(kind, 'a LoRA already')}: load it as it is")
    if kind != "LORA" and not (isinstance(kind, str) and kind in MERGES):
        problems.append(f"peft_type must be {', '.join(sorted(MERGES))}, or LORA with use_dora, got {str(kind)[:80]!r}")
    if not has_weights(folder, WEIGHTS_FILE):
        problems.append(f"{WEIGHTS_FILE} is missing (adapter_model.bin is not opened here)")
    if config.get("bias", "none") not in ("none", None) or config.get("lora_bias"):
        problems.append("it trained biases, which the LoRA that is to be written has no place for")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(word, str) and word for word in saved):
        problems.append(f"modules_to_save must be a list of names, got {str(saved)[:80]}")
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] not in ("gaussian", "eva"):
        problems.append(f"init_lora_weights {config['init_lora_weights'][:80]!r} may have changed the base")
    if problems:
        raise ValueError(f"{head}:\n- " + "\n- ".join(problems))
    return config


def _read(folder: Path, whole: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({key: tensor} of the file, {path: tensor} of the modules that it saved whole)."""
    with open_weights(folder, WEIGHTS_FILE) as stored:
        tensors = {key: stored.read(key).clone() for key in stored.headers}
    saved = [key for key in tensors if any(lies_in(bare_path(key), name) for name in whole)]
    return tensors, {base_path(bare_path(key)): tensors[key] for key in saved}


def _check_saved(model: nn.Module, name: str, saved: Mapping[str, Tensor]) -> None:
    """ValueError for parameters of whole modules that are not this model's."""
    own = model.state_dict(keep_vars=True)
    problems = [f"{path} of the file is no parameter of the model" for path in saved if path not in own]
    problems += [
        f"{path} is {list(saved[path].shape)} in the file, {list(own[path].shape)} in the model"
        for path in saved
        if path in own and own[path].shape != saved[path].shape
    ]
    if problems:
        raise ValueError(f"adapter {name!r} does not fit {type(model).__name__}:\n- " + "\n- ".join(grouped(problems)))


def _deltas(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], config: dict[str, Any], progress: bool
) -> Iterator[tuple[str, Tensor, bool]]:
    """(module path, W' - W [O,D] float64, whether that is all the layer adds) of every layer with the adapter; the
    model is as before afterwards."""
    try:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
    except ImportError:
        raise ImportError("converting needs PEFT: pip install 'moerge_ext[train]'") from None
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        settings = PeftConfig.from_peft_type(**{key: value for key, value in config.items() if key != "auto_mapping"})
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks transformers by the name that it had before version 5
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = get_peft_model(model, settings)
    except Exception as error:  # whatever a config that is wrong provokes in PEFT
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"adapter {name!r} cannot be put on {type(model).__name__} by PEFT: {reason}") from None
    own = {
        path: module.original_module
        for path, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    try:
        found = set_peft_model_state_dict(adapted, dict(tensors))
        missing = _missing(adapted, set(found.missing_keys))
        problems = [f"{key} is not in the file" for key in missing]
        problems += [f"{key} of the file belongs to no layer of the model" for key in found.unexpected_keys]
        problems += [f"{key} holds NaN or infinite values" for key, t in tensors.items() if not t.isfinite().all()]
        layers = {path: layer for path, layer in adapted.named_modules() if isinstance(layer, BaseTunerLayer)}
        for path, layer in layers.items():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if linear_features(layer.get_base_layer()) is None or type(weight) is not nn.Parameter:
                problems.append(f"{path}: {type(layer.get_base_layer()).__name__} is no plain linear layer")
        if problems or not layers:
            said = grouped(problems) or ["no layer of the model carries it"]
            raise ValueError(f"adapter {name!r} does not fit {type(model).__name__}:\n- " + "\n- ".join(said))
        for path, layer in tqdm(layers.items(), "converting", unit="layer", disable=not progress, leave=False):
            yield bare_path(path), *_delta(layer)
    finally:
        # first, since PEFT leaves the trained ones in their place, or raises
        for path, module in own.items():
            model.set_submodule(path, module)
        adapted.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _missing(adapted: nn.Module, absent: set[str]) -> list[str]:
    """Parameters of the adapter that no name loads: layers may share one, as VB-LoRA's do their bank."""
    names: dict[int, list[str]] = {}
    for key, parameter in adapted.named_parameters(remove_duplicate=False):
        if adapted.base_model.prefix in key:
            names.setdefault(id(parameter), []).append(key)
    return sorted(keys[0] for keys in names.values() if absent.issuperset(keys))


@torch.no_grad()
def _delta(layer: Any) -> tuple[Tensor, bool]:
    """(W' - W [O,D] of one of PEFT's layers, in float64; whether the layer computes W' x + b)"""
    twin = copy.deepcopy(layer).double().eval()
    base = twin.get_base_layer()
    before, width = base.weight.detach().clone(), linear_features(base)[0]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    x = x.to(before.device)
    added = twin(x) - base(x)
    twin.merge()
    delta = base.weight.detach() - before
    delta = delta.T if hasattr(base, "nf") else delta
    lost = torch.linalg.norm(added - x @ delta.T)
    return delta, bool(lost <= FITS * torch.linalg.norm(added) + 1e-12 * torch.linalg.norm(x))
