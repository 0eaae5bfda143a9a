"""The experts on the model of one of vLLM's workers, put there after its weights were loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...routing.planning import listing
from ..branch import Branch, PartialBranch, Variant, route_options
from ..pool import CANNOT, Pool, pool_of
from ..settings import KEY, Settings
from ..slices import Share, share_of_plan
from ..tables import Tables
from .layers import find, routed, take_place
from .steps import Steps
from .unsupported import problems_of

logger = logging.getLogger("vllm.moerge_ext")  # vLLM's handlers print it


def settings_of(vllm_config: Any) -> Settings | None:
    """The settings in a config of vLLM's; None where it says nothing of experts."""
    held = vllm_config.additional_config
    said = held.get(KEY) if isinstance(held, dict) else None
    return None if said is None else Settings.parse(said)


def install(worker: Any) -> dict[str, Any] | None:
    """Puts the experts on a worker's model and says what was done; None where the config says nothing of experts.

    ValueError that lists everything in the way; RuntimeError if no layer was found to put them on.
    """
    config = worker.vllm_config
    settings = settings_of(config)
    if settings is None:
        return None
    begin = time.perf_counter()
    if problems := problems_of(config):
        raise ValueError(listing(CANNOT.format(settings.method), problems))
    pool = pool_of(settings, config.model_config.hf_config, config.model_config.model)
    model, device = worker.get_model(), worker.device
    tables = _tables(pool, config, device)
    found, problems = find(model, pool.sizes, pool.modules)
    if problems:
        raise ValueError(listing(CANNOT.format(settings.method), problems))
    if not found and config.parallel_config.pipeline_parallel_size == 1:
        raise RuntimeError("moerge: no layer of the model has experts, so it would be served without them")
    for name, (layer, shares) in found.items():
        branches = [_branch(pool, module, share, layer, tables, device) for module, share in shares.items()]
        take_place(layer, name, branches, config.compilation_config.static_forward_context)
    Steps(tables).watch(worker.model_runner)
    worker.moerge = said = {
        "experts": list(pool.names),
        "methods": [made.method.name for made in pool.methods],
        "layers": len(found),
        "modules": sum(len(shares) for _, shares in found.values()),
        "ways": _ways(model, config.model_config.dtype),
    }
    took = time.perf_counter() - begin
    logger.info(
        "moerge: %s over %d experts in %d layers (%d modules), ready in %.2f s; %s",
        *(" and ".join(said["methods"]), len(pool.names), said["layers"], said["modules"], took),
        "; ".join(said["ways"]),
    )
    return said


def _tables(pool: Pool, config: Any, device: torch.device) -> Tables:
    graphs = getattr(config.compilation_config.cudagraph_mode, "name", "NONE") != "NONE"
    return Tables(
        len(pool.names),
        {made.method.name: made.bias for made in pool.methods},
        max_requests=config.scheduler_config.max_num_seqs,
        max_tokens=config.scheduler_config.max_num_batched_tokens,
        device=device,
        fixed=graphs and device.type != "cpu",
    )


def _branch(pool: Pool, module: str, share: Share, layer: nn.Module, tables: Tables, device: torch.device) -> Branch:
    in_features, variants = pool.sizes[module][0], []
    adds_bias = share.columns is None or layer.tp_rank == 0
    for made in pool.methods:
        plan = share_of_plan(made.plans[module], share, adds_bias=adds_bias)
        options = route_options(made.routing, in_features, plan.lora_A.shape[0])
        variants.append(Variant(made.method.name, plan, options, made.factored))
    if share.columns is None:
        return Branch(module, share, variants, tables, device)
    gates = {made.method.name: made.plans[module].gates for made in pool.methods}
    sums = {name: g.double().sum(1) for name, g in gates.items() if g is not None}
    kept = {"whole": in_features, "gate_sums": sums, "reduce": _reduce()}
    return PartialBranch(module, share, variants, tables, device, **kept)


def _reduce() -> Callable[[Tensor], Tensor]:
    from vllm.distributed import get_tp_group

    group = get_tp_group().device_group

    def reduce(sums: Tensor) -> Tensor:
        torch.distributed.all_reduce(sums, group=group)
        return sums

    return reduce


def _ways(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Which kernels the branches run, and why not faster ones."""
    said: dict[str, None] = {}
    for method in routed(model):
        for branch in method.branches:
            said.update(dict.fromkeys(branch.ways(dtype)))
    return list(said)
