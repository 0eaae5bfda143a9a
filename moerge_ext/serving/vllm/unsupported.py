"""What of vLLM does not go with experts, by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...files.listing import listed
from ..settings import Settings

MULTIPLE = "PROMETHEUS_MULTIPROC_DIR"


def problems_of(config: Any, settings: Settings) -> list[str]:
    """Why a config of vLLM's cannot be served with experts."""
    problems = []
    if config.lora_config is not None:
        problems.append("--enable-lora: vLLM's own adapters on top of routed experts; give them to moerge as experts")
    if config.model_config.runner_type != "generate":
        problems.append(f"--runner {config.model_config.runner_type}: only generating models are served with experts")
    if getattr(config.parallel_config, "enable_dbo", False):
        problems.append("--enable-dbo: a step in two halves, whose tokens cannot be told apart")
    if getattr(config.parallel_config, "prefill_context_parallel_size", 1) > 1:
        problems.append("--prefill-context-parallel-size: a request's tokens on several ranks")
    if getattr(config.model_config, "enable_sleep_mode", False):
        problems.append("--enable-sleep-mode: the experts would stay where they are")
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        problems.append("--kv-sharing-fast-prefill: layers that see some of a step's tokens, not told which")
    return problems + (_problems_of_more(config, settings) if settings.answers_more else [])


def problems_of_layers(config: Any, settings: Settings, towers: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Why experts in these modules cannot be served.

    towers: those outside of the language model; modules: all
    """
    problems = []
    if towers and (settings.requests or settings.metrics or settings.traces):
        problems.append(
            f"{listed(list(towers), 'module')}: outside of the language model, where nobody can tell which request a "
            'token is of: start with --no-requests ("requests": false), without metrics and traces, so that all '
            "requests are routed alike, or leave these modules out (modules)"
        )
    absorbed = [module for module in modules if module.rpartition(".")[2] == "kv_b_proj"]
    if absorbed and getattr(config.model_config, "use_mla", False):
        problems.append(
            f"{listed(absorbed, 'module')}: vLLM's latent attention takes this weight into others when it decodes, so "
            "that experts of it would count for prompts alone: leave it out (modules), or set VLLM_MLA_DISABLE=1"
        )
    return problems


def _problems_of_more(config: Any, settings: Settings) -> list[str]:
    """The same of a server that is asked for more than answers."""
    problems = []
    if config.parallel_config.data_parallel_size > 1:
        problems.append("spare slots, metrics or traces with --data-parallel-size: one of several engines is asked")
    if getattr(config.parallel_config, "_api_process_count", 1) > 1 and (settings.spare or settings.metrics):
        problems.append("spare slots or metrics with --api-server-count: processes that do not know of one another")
    elif settings.metrics and MULTIPLE in os.environ:
        problems.append(f"metrics with {MULTIPLE}: vLLM's server then shows those of files alone; unset it")
    graphs = getattr(config.compilation_config.cudagraph_mode, "name", "NONE") != "NONE"
    if graphs and config.device_config.device_type != "cpu":
        if settings.spare:
            problems.append("spare slots with CUDA graphs, which hold what a change replaces: add --enforce-eager")
        if settings.metrics or settings.traces:
            problems.append("metrics or traces with CUDA graphs, which run nothing of ours: add --enforce-eager")
    return problems
