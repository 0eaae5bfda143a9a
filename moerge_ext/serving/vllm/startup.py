"""No engine starts of which a worker would serve the model without experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...routing.planning import listing
from ..pool import CANNOT
from .unsupported import problems_of
from .worker import install, settings_of


def load_model(theirs: Callable[..., Any] | None, wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """`WorkerWrapperBase.load_model`, with the experts."""
    result = wrapper.worker.load_model(*args, **kwargs) if theirs is None else theirs(wrapper, *args, **kwargs)
    install(wrapper.worker)
    return result


def status(theirs: Callable[..., Any] | None, wrapper: Any) -> dict[str, Any] | None:
    """`WorkerWrapperBase.moerge_status`: what the worker serves; None for a model without experts."""
    return getattr(wrapper.worker, "moerge", None)


def check_workers(theirs: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
    """`Executor.__init__`, which ends with ValueError for what does not go with experts, before any worker starts, and
    with RuntimeError if a worker serves the model without them.
    """
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    settings = settings_of(config)
    if settings is not None and (problems := problems_of(config, settings)):
        raise ValueError(listing(CANNOT.format(settings.method), problems))
    theirs(executor, *args, **kwargs)
    if settings is None:
        return
    try:
        said = executor.collective_rpc("moerge_status")
    except Exception as error:
        raise RuntimeError(f"{_LACKING} ({error})") from error
    if not said or any(one is None for one in said):
        raise RuntimeError(_LACKING)
    if not any(one["layers"] for one in said):
        raise RuntimeError("moerge: no layer of the model has experts, so it would be served without them")


_LACKING = (
    "moerge: a worker has not loaded the plugin, so the model would be served without experts: install moerge_ext "
    "where that worker runs, and leave VLLM_PLUGINS unset or let it name moerge"
)
