"""What the routes of the server make of what the workers say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from moerge_ext.serving.vllm.endpoints import WAIT, seconds, traces
from moerge_ext.serving.vllm.metrics import Refreshing, RoutingMetrics, total


def trace(tokens, modules):
    return {"experts": ["ant", "bee"], "prompt_tokens": 2, "start": 0, "tokens": tokens, "modules": modules}


def test_a_trace_is_a_mean_over_the_modules_of_all_stages():
    stages = [
        [trace([[1.0, 0.0], [0.5, 0.5]], {"a": [0.5, 0.5], "b": [1.0, 0.0]}), trace([], {})],
        [trace([[0.0, 1.0], [0.5, 0.5]], {"c": [0.25, 0.75]}), trace([], {})],
    ]
    one, other = traces(stages)
    assert one["tokens"] == [[pytest.approx(2 / 3), pytest.approx(1 / 3)], [0.5, 0.5]]
    assert one["modules"] == {"a": [0.5, 0.5], "b": [1.0, 0.0], "c": [0.25, 0.75]}
    assert other["tokens"] == [] and other["modules"] == {}
    assert traces([[], []]) == [] and traces([]) == []


def test_how_long_a_change_may_wait():
    assert (seconds(None), seconds("0"), seconds("2.5")) == (WAIT, 0.0, 2.5)
    for said in ("", "soon", "-1", "nan", "inf", "1e9"):
        with pytest.raises(ValueError, match="wait must be a number of seconds"):
            seconds(said)


def counts(weight, tokens=5):
    sums = {"entropy": 0.5, "routed": 4, "candidates": 8, "masked": 1}
    return {"experts": {"ant": [weight, 2], "bee": [1.0, 1]}, "tokens": {"phatgoose": tokens}} | sums


class Engine:
    def __init__(self):
        self.said, self.wait, self.calls = [counts(1.0), None], asyncio.Event(), 0

    async def collective_rpc(self, method, args):
        self.calls += 1
        await self.wait.wait()
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_counts_of_stages_are_added_and_their_tokens_are_not():
    said = total([counts(1.0), None, counts(3.0)])
    assert said["experts"] == {"ant": [4.0, 4], "bee": [2.0, 2]} and said["tokens"] == {"phatgoose": 5}
    assert (said["entropy"], said["routed"], said["candidates"], said["masked"]) == (1.0, 8, 16, 2)


def test_metrics_never_wait_long_and_never_fail(monkeypatch):
    """An engine that computes is asked once; its counts come with a later look."""
    monkeypatch.setattr("moerge_ext.serving.vllm.metrics.PATIENCE", 0.01)

    async def run():
        engine = Engine()
        metrics = RoutingMetrics(engine)
        held, passed = SimpleNamespace(), []

        async def app(scope, receive, send):
            passed.append(scope["path"])

        layer = Refreshing(app, held)
        await layer({"type": "http", "path": "/metrics"}, None, None)  # no engine yet
        held.moerge_metrics = metrics
        await layer({"type": "http", "path": "/v1/models"}, None, None)
        assert engine.calls == 0
        for _ in range(2):
            await layer({"type": "http", "path": "/metrics"}, None, None)
        assert engine.calls == 1 and metrics._said is None
        engine.wait.set()
        await layer({"type": "http", "path": "/metrics/"}, None, None)
        assert engine.calls == 1 and metrics._said["experts"]["ant"] == [1.0, 2]
        engine.said = RuntimeError("dead")
        await layer({"type": "http", "path": "/metrics"}, None, None)
        assert engine.calls == 2 and metrics._said["experts"]["ant"] == [1.0, 2]
        assert passed == ["/metrics", "/v1/models", "/metrics", "/metrics", "/metrics/", "/metrics"]
        return metrics

    metrics = asyncio.run(run())
    prometheus = pytest.importorskip("prometheus_client", reason="vLLM brings it")
    registry = prometheus.CollectorRegistry()
    registry.register(metrics)
    text = prometheus.generate_latest(registry).decode()
    for line in (
        'moerge_expert_weight_total{expert="bee"} 1.0',
        'moerge_expert_chosen_total{expert="ant"} 2.0',
        'moerge_tokens_total{method="phatgoose"} 5.0',
        "moerge_routing_entropy_nats_total 0.5",
        "moerge_routed_token_modules_total 4.0",
        "moerge_expert_candidates_total 8.0",
        "moerge_expert_candidates_masked_total 1.0",
    ):
        assert line in text
