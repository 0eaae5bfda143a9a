"""What vLLM loads in every process, and perhaps twice: the places in it where experts come in."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

_DONE = "_moerge_ext"
REQUESTS = {
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}
BEAMS = {
    "vllm.entrypoints.generate.beam_search.online": "BeamSearchOnlineMixin",
    "vllm.entrypoints.generate.beam_search.offline": "BeamSearchOfflineMixin",
}


def register() -> None:
    """The entry point of `vllm.general_plugins`."""
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from .frontend import beam_search, beams, prepare, process_inputs, sampling
    from .served import ASKED, asked
    from .startup import check_workers, load_model, status

    _wrap(WorkerWrapperBase, "load_model", load_model)
    _wrap(WorkerWrapperBase, "moerge_status", status)
    _wrap(WorkerWrapperBase, ASKED, asked)
    _wrap(Executor, "__init__", check_workers)
    _wrap(InputProcessor, "__init__", prepare)
    _wrap(InputProcessor, "process_inputs", process_inputs)
    for module, name in REQUESTS.items():
        if module in sys.modules:  # where HTTP comes in
            request = getattr(sys.modules[module], name)
            _wrap(request, "to_sampling_params", sampling)
            if hasattr(request, "to_beam_search_params"):
                _wrap(request, "to_beam_search_params", beam_search)
    for module, name in BEAMS.items():
        if module in sys.modules:
            _wrap(getattr(sys.modules[module], name), "beam_search", beams)


def _wrap(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """owner.name becomes ours(its own before or None, self, ...), once a process."""
    theirs = owner.__dict__.get(name)
    if getattr(theirs, _DONE, False):
        return

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(theirs, self, *args, **kwargs)

    method = functools.wraps(theirs)(method) if theirs is not None else method
    setattr(method, _DONE, True)
    setattr(owner, name, method)
