"""The experts on the model of one of vLLM's workers, put there after its weights were loaded."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...routing.planning import listing
from ..branch import Branch, PartialBranch
from ..pool import CANNOT, Pool, gate_sums, pool_of, variants
from ..settings import KEY, Settings
from ..tables import Tables
from .layers import find, outside, routed, take_place
from .overflow import Overflow
from .served import Held, Served, planning
from .steps import Steps
from .unsupported import problems_of_layers

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
    with planning(config):
        pool = pool_of(settings, config.model_config.hf_config, config.model_config.model)
    model, device = worker.get_model(), worker.device
    tables = _tables(pool, config, device)
    found, problems = find(model, pool.sizes, pool.modules)
    towers = _towers(model, found)
    problems += problems_of_layers(config, settings, [m for name in towers for m in found[name][1]], pool.modules)
    if problems:
        raise ValueError(listing(CANNOT.format(settings.method), problems))
    if not found and config.parallel_config.pipeline_parallel_size == 1:
        raise RuntimeError("moerge: no layer of the model has experts, so it would be served without them")
    held, context = _held(found), config.compilation_config.static_forward_context
    branches = {module: _branch(pool, module, one, tables, settings.spare, device) for module, one in held.items()}
    methods = [
        take_place(layer, name, [branches[module] for module in shares], context)
        for name, (layer, shares) in found.items()
    ]
    # what a compiled graph depends on, and vLLM's cache of them would not know
    config.additional_config[KEY + "_layers"] = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
    leads = worker.rank % config.parallel_config.tensor_parallel_size == 0
    worker.moerge_pool = served = Served(settings, config, pool, branches, held, tables, leads)
    watched = [method for method in methods if method.name not in towers]
    sometimes = config.model_config.is_multimodal_model or config.model_config.is_encoder_decoder
    overflow = Overflow(model, lambda: worker.model_runner.kv_caches, device)
    Steps(tables, watched, served.watcher, overflow=overflow, sometimes=sometimes).watch(worker.model_runner)
    worker.moerge = said = {
        "experts": list(pool.names),
        "methods": [made.method.name for made in pool.methods],
        "layers": len(found),
        "modules": sum(len(shares) for _, shares in found.values()),
        "ways": _ways(model, config.model_config.dtype),
    }
    said["seconds"] = took = time.perf_counter() - begin
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
        spare=settings_of(config).spare,
    )


def _towers(model: nn.Module, found: dict[str, Any]) -> set[str]:
    """The names of layers outside of the language model."""
    others = outside(model)
    return {name for name, (layer, _) in found.items() if layer in others}


def _held(found: dict[str, Any]) -> dict[str, Held]:
    """{module: what this rank holds of it} of what `find` found."""
    return {
        module: Held(share, share.columns is None or layer.tp_rank == 0)
        for layer, shares in found.values()
        for module, share in shares.items()
    }


def _branch(pool: Pool, module: str, held: Held, tables: Tables, spare: int, device: torch.device) -> Branch:
    found = variants(pool, module, held.share, adds_bias=held.adds_bias, spare=spare)
    if held.share.columns is None:
        return Branch(module, held.share, found, tables, device)
    kept = {"whole": pool.sizes[module][0], "gate_sums": gate_sums(pool, module, spare), "reduce": _reduce()}
    return PartialBranch(module, held.share, found, tables, device, **kept)


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
