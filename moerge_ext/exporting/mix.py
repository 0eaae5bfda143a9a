"""`mix_models`: whole models as the experts of one, Branch-Train-Mix.

Source: arXiv 2403.07816 (its abstract, and the MoErging survey's section 3.21). At every layer l

    FFN_mix(x) = sum over e in the top_k of W_l x of  softmax over these (W_l x)_e  FFN_e(x)

with the FFNs of the N models as they are, a new router W_l [N,D], and all other weights the mean of the models'.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files.atomic import check_new_folder, write_folder_atomically
from ..files.listing import grouped
from ..files.safefile import FLOATS, file_inside
from ..files.shard_writer import ShardWriter
from ..models.stored import MIX_FILE
from ..models.weights import StoredModel, open_model, tokens_differ
from .mixtures import Mixture, ffn_of, mixed_config, mixture_of

GENERATION = "generation_config.json"
_CHUNK = 1 << 23  # values that are averaged at a time
# fields of a config that say nothing of what the weights compute
_FREE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class Mix:
    """What was written. names: the models in the order of the experts; parameters: of all weights, active: of those
    that one token uses; agreement: |mean of the averaged weights|^2 / mean of |weights|^2, 1 for equal models, about
    1/N for unrelated ones.
    """

    path: Path
    architecture: str
    names: tuple[str, ...]
    top_k: int
    parameters: int
    active: int
    agreement: float


def mix_models(
    models: Mapping[str, str | os.PathLike] | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    top_k: int = 2,
    seed: int = 0,
    dtype: str | None = None,
    progress: bool = True,
) -> Mix:
    """Write whole models as one mixture of experts that transformers loads by itself (Mixtral and its kin).

    The result is a start: its routers are random (normal, the config's `initializer_range`) until `train_mix`.

    Args:
        models: folders or hub ids, {name: path} or paths (the names are then their last parts): two or more fine-tuned
            copies of one model. The paper takes that model itself as one of them too: name it as well.
        output: a folder that is empty or not there yet; it is written whole or not at all.
        top_k: experts per token, in the config: it can be changed there.
        dtype: "float32", "bfloat16" or "float16"; default: what the models are stored in.

    No model is loaded: memory is for one tensor of each and for a part of 2 GB of what is written. Means are taken in
    float64 and rounded once. The tokenizer, the generation config and the ids of special tokens are those of the first.

    Raises ValueError, before anything is written, for fewer than two models, names given twice, architectures that have
    no mixture (`mixtures.py`), and, listed with names, all in which the models differ: config, tensors, tokens, types;
    OSError for a folder that cannot be written. Warns of weights so unlike that the models have no common origin.
    """
    named = _named(models)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(named):
        raise ValueError(f"mix: top_k must be from 1 to {len(named)}, the number of models, got {top_k!r}")
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"mix: dtype must be float32, bfloat16 or float16, got {dtype!r}")
    target = check_new_folder(output)
    with ExitStack() as stack:
        stored = [stack.enter_context(open_model(name, path)) for name, path in named.items()]
        mixture, keys = _checked(stored, dtype)
        config = mixed_config(stored[0].config, mixture, len(stored), top_k)
        config.dtype = _dtype_of(stored, dtype)
        run = _Mixing(stored, mixture, config, keys, seed, progress)
        write_folder_atomically(target, run.write)
    mix = Mix(target, mixture.model_type, tuple(named), top_k, run.parameters, run.active(top_k), run.agreement())
    if mix.agreement < (1 + 1 / len(named)) / 2:
        warnings.warn(
            f"mix: the averaged weights agree by {mix.agreement:.2f} (1: equal, {1 / len(named):.2f}: unrelated): are "
            f"{', '.join(named)} fine-tuned from one model? The mean of others computes nothing",
            stacklevel=2,
        )
    return mix


def last_part(path: str) -> str:
    """What a model is called that is given no name."""
    return Path(path.rstrip("/")).name


def _named(models: Mapping[str, Any] | Sequence[Any]) -> dict[str, str]:
    if isinstance(models, (str, os.PathLike)):
        raise ValueError(f"mix: models must be several folders or hub ids, got {os.fspath(models)!r}")
    if isinstance(models, Mapping):
        named = {name: os.fspath(path) for name, path in models.items()}
    else:
        paths = [os.fspath(path) for path in models]
        names = [last_part(path) for path in paths]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mix: several models are called {', '.join(twice)}: name them, {{name: path}}")
        named = dict(zip(names, paths, strict=True))
    if len(named) < 2:
        raise ValueError(f"mix: two models or more are needed, got {len(named)}")
    return named


def _dtype_of(stored: list[StoredModel], dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return getattr(torch, dtype)
    return FLOATS[next(iter(stored[0].headers.values())).dtype]


def _checked(stored: list[StoredModel], dtype: str | None) -> tuple[Mixture, list[str]]:
    """(the mixture, the keys to write); one ValueError with all in which the models do not fit together."""
    first = stored[0]
    mixture = mixture_of(first.config)
    expected, tied = _expected(first.config)
    problems = []
    for model in stored:
        problems += [f"{model.name}: {problem}" for problem in _tensor_problems(model, expected, tied)]
    base = first.config.to_dict()
    for model in stored[1:]:
        other = model.config.to_dict()
        for name in sorted((base.keys() | other.keys()) - _FREE - _IDS):
            if base.get(name) != other.get(name):
                said = f"{base.get(name)!r} in {first.name}, {other.get(name)!r} in {model.name}"
                problems.append(f"config: {name} is {said}")
    if why := tokens_differ([(model.name, model.tokenizer) for model in stored]):
        problems.append(why)
    kinds = {model.name: sorted({header.dtype for header in model.headers.values()}) for model in stored}
    if dtype is None and len({kind for found in kinds.values() for kind in found}) > 1:
        said = ", ".join(f"{name} in {'/'.join(found)}" for name, found in kinds.items())
        problems.append(f"the weights are stored in several types ({said}): say dtype= (--dtype)")
    if problems:
        raise ValueError("the models cannot be mixed:\n- " + "\n- ".join(grouped(problems)))
    for model in stored[1:]:
        if ids := [name for name in sorted(_IDS) if base.get(name) != model.config.to_dict().get(name)]:
            warnings.warn(f"mix: {', '.join(ids)} of {model.name} differ: those of {first.name} are kept", stacklevel=4)
    return mixture, [key for key in expected if key not in tied]


def _expected(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """{key: shape} of a dense model of this config, and the keys that are tied to others."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}, tied


def _tensor_problems(model: StoredModel, expected: dict[str, tuple[int, ...]], tied: set[str]) -> list[str]:
    found = model.headers
    problems = [f"there is no {key}" for key in expected if key not in found and key not in tied]
    problems += [f"{key} is no tensor of its architecture" for key in found
                 if key not in expected and not key.endswith("rotary_emb.inv_freq")]  # fmt: skip
    return problems + [
        f"{key} is {list(found[key].shape)}, expected {list(shape)} by its config"
        for key, shape in expected.items()
        if key in found and found[key].shape != shape
    ]


class _Mixing:
    """The writing of one mixture, and what was seen of the weights."""

    def __init__(
        self, stored: list[StoredModel], mixture: Mixture, config: Any, keys: list[str], seed: int, progress: bool
    ):
        self.stored, self.mixture, self.config, self.keys = stored, mixture, config, keys
        self.seed, self.progress = seed, progress
        self.parameters = self.of_experts = 0
        self._of_mean = self._of_each = 0.0

    def write(self, folder: Path) -> None:
        """Everything into an empty folder."""
        writer, layers = ShardWriter(folder), {}
        for key in tqdm(self.keys, desc="mix", unit="tensor", disable=not self.progress):
            if (ffn := ffn_of(key)) is None:
                self._add(writer, key, self._mean(key))
                continue
            layer, part = ffn
            layers[layer] = None
            for expert, model in enumerate(self.stored):
                self.of_experts += math.prod(model.headers[key].shape)
                # a copy: what is read may alias a file that is closed before the part is written
                self._add(writer, self.mixture.key(layer, expert, part), model.read(key).clone())
        random = torch.Generator().manual_seed(self.seed)
        for layer in layers:
            router = torch.randn(
                len(self.stored), self.config.hidden_size, generator=random, dtype=torch.float32, device="cpu"
            )
            self._add(writer, self.mixture.router.format(layer=layer), router * self.config.initializer_range)
            for key, shape in self.mixture.added(layer, self.config):
                self._add(writer, key, torch.zeros(shape, dtype=torch.float32, device="cpu"))
        writer.finish()
        self._beside(folder)

    def _add(self, writer: ShardWriter, key: str, tensor: Tensor) -> None:
        self.parameters += tensor.numel()
        made = tensor.to(self.config.dtype)
        if made.dtype != tensor.dtype and not made.isfinite().all():
            raise ValueError(f"mix: {key} has values that {made.dtype} cannot hold: choose another dtype")
        writer.add(key, made)

    def _mean(self, key: str) -> Tensor:
        """The mean of a tensor over the models, in the type that is written."""
        shape = self.stored[0].headers[key].shape
        made = torch.empty(shape, dtype=self.config.dtype, device="cpu")
        step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            total = torch.zeros(stop - start, *shape[1:], dtype=torch.float64, device="cpu")
            for model in self.stored:
                rows = model.rows(key, start, stop).double()
                square = float(rows.square().sum())
                if not math.isfinite(square):
                    raise ValueError(f"mix: {key} of {model.name} has values that are not finite")
                self._of_each += square / len(self.stored)
                total += rows
            total /= len(self.stored)
            self._of_mean += float(total.square().sum())
            made[start:stop] = total.to(made.dtype)
        if not made.isfinite().all():
            raise ValueError(f"mix: the mean of {key} leaves the range of {made.dtype}: choose another dtype")
        return made

    def _beside(self, folder: Path) -> None:
        """Config, tokenizer, generation config, and who the experts are."""
        from transformers import AutoModelForCausalLM

        first = self.stored[0]
        self.config.architectures = [AutoModelForCausalLM._model_mapping[type(self.config)].__name__]
        self.config.save_pretrained(folder)
        if first.tokenizer is not None:
            first.tokenizer.save_pretrained(folder)
        if (first.folder / GENERATION).exists():
            shutil.copyfile(file_inside(first.folder, GENERATION), folder / GENERATION)
        said = {"method": "branch_train_mix", "experts": [model.name for model in self.stored], "seed": self.seed}
        (folder / MIX_FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    def active(self, top_k: int) -> int:
        """The weights that one token uses."""
        return self.parameters - self.of_experts + self.of_experts * top_k // len(self.stored)

    def agreement(self) -> float:
        """|mean|^2 / mean of |each|^2 over all averaged weights."""
        return self._of_mean / self._of_each if self._of_each else 1.0
