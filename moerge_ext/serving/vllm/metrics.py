"""Counts of the routing among the metrics of vLLM's server, read from the workers when `/metrics` is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from .served import ASKED

PATH = "/metrics"
PATIENCE = 2.0  # seconds to wait for an engine that computes; after that the counts are those of last time
SUMS = {
    "entropy": ("moerge_routing_entropy_nats", "Entropy of the weights of a token in a module, summed over both"),
    "routed": ("moerge_routed_token_modules", "Tokens times modules for which experts were chosen"),
    "candidates": ("moerge_expert_candidates", "Experts times tokens times modules for which experts were chosen"),
    "masked": ("moerge_expert_candidates_masked", "Those of them that could not be chosen, as their module is absent"),
}


class RoutingMetrics:
    """A collector of prometheus_client, and the middleware that brings it up to date."""

    def __init__(self, engine: Any):
        self._engine, self._reading, self._said = engine, None, None

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        said = self._said
        if said is None:
            return
        load = CounterMetricFamily("moerge_expert_weight", "Routing weight of an expert, summed", labels=["expert"])
        picks = CounterMetricFamily("moerge_expert_chosen", "Times that an expert was chosen", labels=["expert"])
        for name, (weight, count) in said["experts"].items():
            load.add_metric([name], weight)
            picks.add_metric([name], count)
        tokens = CounterMetricFamily("moerge_tokens", "Tokens by what routes them", labels=["method"])
        for how, count in said["tokens"].items():
            tokens.add_metric([how], count)
        yield from (load, picks, tokens)
        for key, (name, text) in SUMS.items():
            yield CounterMetricFamily(name, text, value=said[key])

    async def refresh(self) -> None:
        """Asks the workers, as long as one is patient."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._engine.collective_rpc(ASKED, args=("count",)))
        done, _ = await asyncio.wait({self._reading}, timeout=PATIENCE)
        if done:
            reading, self._reading = self._reading, None
            if reading.exception() is None:
                self._said = total(reading.result())


def total(counts: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The sum of the workers' counts; tokens pass through all of them, and count once."""
    found = [one for one in counts if one is not None]
    experts: dict[str, list[float]] = {}
    for one in found:
        for name, pair in one["experts"].items():
            experts[name] = [a + b for a, b in zip(experts.get(name, [0.0, 0]), pair, strict=True)]
    return {"experts": experts, "tokens": found[0]["tokens"]} | {key: sum(one[key] for one in found) for key in SUMS}


class Refreshing:
    """The ASGI middleware: metrics are refreshed before they are read."""

    def __init__(self, app: Any, held: Any):
        """held: the app's state, which has the metrics as `moerge_metrics` once the engine is there."""
        self._app, self._held = app, held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        metrics = getattr(self._held, "moerge_metrics", None)
        if metrics is not None and scope["type"] == "http" and scope["path"].rstrip("/").endswith(PATH):
            await metrics.refresh()
        await self._app(scope, receive, send)
