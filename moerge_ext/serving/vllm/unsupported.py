"""What of vLLM does not go with experts, by name."""

from __future__ import annotations

from typing import Any

from ..settings import Settings


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
    if settings.spare:
        if config.parallel_config.data_parallel_size > 1:
            problems.append("spare slots with --data-parallel-size: several engines, which would not change at once")
        if getattr(config.parallel_config, "_api_process_count", 1) > 1:
            problems.append("spare slots with --api-server-count: several processes, which would not change at once")
        graphs = getattr(config.compilation_config.cudagraph_mode, "name", "NONE") != "NONE"
        if graphs and config.device_config.device_type != "cpu":
            problems.append("spare slots with CUDA graphs, which hold what a change replaces: add --enforce-eager")
    return problems
