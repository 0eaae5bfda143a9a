"""A tiny model, experts and batches for the tests of trained routers, and their equations layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import patch_cases as cases
import torch
from torch import Tensor, nn

import moerge_ext as moerge
from moerge_ext.experts.routers import Routers

E = len(cases.NAMES)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [cases.batch("llama", seed=seed, labels=True) for seed in range(count)]


def trained(model: nn.Module, experts: moerge.ExpertBank, folder, method: str, data=None, **options) -> Routers:
    """Routers after a few steps at a high rate."""
    training = {"steps": 8, "lr": 0.05, "progress": False, "overwrite": True} | options
    result = moerge.train_routers(model, experts, data or batches(), folder, method=method, **training)
    return moerge.read_routers(result.path)


def products(experts: moerge.ExpertBank, path: str) -> Tensor:
    """[E,O,D] float64: every expert's B A."""
    bank = experts.modules[path]
    return bank.lora_B.double() @ bank.lora_A.double()


@contextmanager
def by_hand(
    model: nn.Module, experts: moerge.ExpertBank, weights: Callable, finish: Callable | None = None
) -> Iterator[None]:
    """The model with sum_e w_e B_e A_e u added to every layer, in plain torch; `finish`(path, sum) may change that.

    weights(path, u, h, outputs [..., E, O]) -> [..., E]; u is the layer's input, h that of its transformer layer.
    """
    hooks, inputs = [], {}

    def of_block(name: str):
        return lambda module, args, kwargs: inputs.update({name: args[0] if args else kwargs["hidden_states"]})

    def of_layer(path: str):
        deltas, block = products(experts, path), ".".join(path.split(".")[:3])

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            outputs = torch.einsum("eod,...d->...eo", deltas, args[0].double())
            w = weights(path, args[0].double(), inputs[block].double(), outputs)
            summed = (w[..., None] * outputs).sum(-2)
            return output + (summed if finish is None else finish(path, summed)).to(output.dtype)

        return add

    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(of_block(f"model.layers.{i}"), with_kwargs=True))
    hooks += [model.get_submodule(path).register_forward_hook(of_layer(path)) for path in experts.modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_error(
    model: nn.Module,
    experts: moerge.ExpertBank,
    routers: Routers,
    weights: Callable,
    finish: Callable | None = None,
    **options,
):
    """The relative difference of the patched model's logits from those computed by hand, and from the base's."""
    inputs = cases.batch("llama", rows=3, length=6, seed=9)
    base = cases.logits(model, **inputs)
    with by_hand(model, experts, weights, finish):
        want = cases.logits(model, **inputs)
    with moerge.patch(model, experts, routers.method, routers=routers, **options):
        got = cases.logits(model, **inputs)
    assert torch.equal(base, cases.logits(model, **inputs))
    return cases.error(got, want), cases.error(got, base)


def top(scores: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of [..., E], 0 elsewhere."""
    values, ids = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, ids, values.softmax(-1))
