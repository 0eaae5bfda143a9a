"""What a worker is asked while it serves: to change its experts, for its counts, for a request's trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...methods.base import Plan
from ...routing.shares import Share, share_of_plan
from ..branch import Branch
from ..counts import Counts
from ..live import Change, LivePool
from ..pool import Pool, meta_model
from ..settings import Settings
from ..tables import Tables
from ..traces import Traces
from ..watching import Watcher

ASKED = "moerge_served"  # the method of vLLM's workers that is asked


@dataclass(frozen=True)
class Held:
    """What a rank holds of a module; adds_bias: whether it is the one that adds the experts' output biases."""

    share: Share
    adds_bias: bool


@contextmanager
def planning(config: Any) -> Iterator[None]:
    """While a model of transformers is made beside vLLM's own: where vLLM runs such a model, it has changed its class,
    which asks for a config then and would compile what it makes."""
    from vllm.config import CompilationMode, set_current_vllm_config

    bare, compilation = copy.copy(config), copy.copy(config.compilation_config)
    object.__setattr__(compilation, "mode", CompilationMode.NONE)
    object.__setattr__(bare, "compilation_config", compilation)
    with set_current_vllm_config(bare):
        yield


class Served:
    """The experts of one worker, and what is kept of what they do."""

    def __init__(
        self,
        settings: Settings,
        config: Any,
        pool: Pool,
        branches: Mapping[str, Branch],
        held: Mapping[str, Held],
        tables: Tables,
        leads: bool,
    ):
        """config: vLLM's; leads: whether this rank speaks for those that hold parts of the same modules."""
        self._leads = leads
        self._counts = Counts(pool.names, len(pool.names) + settings.spare) if settings.metrics else None
        self._traces = Traces(pool.names, settings.traces) if settings.traces else None
        kept = self._counts is not None or self._traces is not None
        self.watcher = Watcher(tables, self._counts, self._traces) if kept else None
        self._live = None
        if settings.spare:

            def share(module: str, plan: Plan) -> Plan:
                return share_of_plan(plan, held[module].share, adds_bias=held[module].adds_bias)

            with planning(config):
                model = meta_model(config.model_config.hf_config)
            base = config.model_config.model
            kept = (pool.names, pool.sizes, pool.modules, branches, tables, share)
            self._live = LivePool(settings, base, model, *kept)

    def answer(self, what: str, *said: Any) -> Any:
        """`prepare` name, source; `commit`; `abandon`; `count`; `trace` request:, in plain data."""
        found: Callable[..., Any] = getattr(self, f"_{what}")
        return found(*said)

    def _prepare(self, name: str, source: str | None) -> dict[str, str]:
        try:
            return {"digest": self._live.prepare(Change(name, source))}
        except (ValueError, OSError, MemoryError) as error:
            self._live.abandon()
            return {"refused": str(error) or repr(error)}

    def _commit(self) -> list[str]:
        names = self._live.commit()
        if self._counts is not None:
            self._counts.rename(names)
        if self._traces is not None:
            self._traces.names = names
        return list(names)

    def _abandon(self) -> None:
        self._live.abandon()

    def _count(self) -> dict[str, Any] | None:
        return self._counts.read() if self._leads and self._counts is not None else None

    def _trace(self, request: str) -> list[dict[str, Any]] | None:
        return self._traces.read(request) if self._leads and self._traces is not None else None


def asked(theirs: Callable[..., Any] | None, wrapper: Any, what: str, *said: Any) -> Any:
    """`WorkerWrapperBase.moerge_served`."""
    return wrapper.worker.moerge_pool.answer(what, *said)
