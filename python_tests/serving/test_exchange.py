"""Experts exchanged in an engine with several workers: on all of them or on none, and never under a running request."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from serving_cases import NAMES, folders

from moerge_ext.serving.live import Change
from moerge_ext.serving.pool import rules
from moerge_ext.serving.settings import Settings
from moerge_ext.serving.vllm.exchange import Busy, Exchange
from moerge_ext.serving.vllm.frontend import RULES
from moerge_ext.serving.vllm.served import ASKED


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return dict(zip(NAMES, folders(tmp_path_factory.mktemp("experts")), strict=True))


class Worker:
    """What a worker answers; `wrong` {what: what it says instead, or the error that it raises}."""

    def __init__(self, names, **wrong):
        self.names, self.wrong, self.prepared, self.asked = list(names), wrong, None, []

    def answer(self, what, *said):
        self.asked.append(what)
        if isinstance(found := self.wrong.get(what), Exception):
            raise found
        if found is not None:
            return found
        if what == "prepare":
            self.prepared = said
            return {"digest": str(said)}
        if what == "abandon":
            self.prepared = None
            return None
        (name, source), self.prepared = self.prepared, None
        self.names = [one for one in self.names if one != name] + ([] if source is None else [name])
        return self.names


class Engine:
    """Stands in for `AsyncLLM`: requests take `seconds`; says what happened in which order."""

    def __init__(self, settings, workers, seconds=0.0):
        self.workers, self.seconds, self.said, self.running, self.paused = workers, seconds, [], 0, False
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=None))
        self.input_processor = SimpleNamespace(**{RULES: rules(settings, ("ant", "bee"))})
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: self.running)

    async def add_request(self, name):
        await asyncio.sleep(0)
        assert not self.paused, "a request came in while the experts changed"
        self.running += 1
        self.said.append(f"{name} with {', '.join(getattr(self.input_processor, RULES).names)}")
        asyncio.ensure_future(self._run(name))

    async def _run(self, name):
        await asyncio.sleep(self.seconds)
        self.running -= 1
        self.said.append(f"{name} done")

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "wait" and clear_cache and not self.running
        self.paused = True
        self.said.append("paused")

    async def resume_generation(self):
        self.paused = False
        self.said.append("resumed")

    async def collective_rpc(self, method, args):
        assert method == ASKED
        assert args[0] != "commit" or self.paused
        await asyncio.sleep(0)
        return [worker.answer(*args) for worker in self.workers]


def made(experts, *workers, seconds=0.0, **said):
    settings = Settings.parse({"experts": [experts["ant"], experts["bee"]], "spare": 1} | said)
    engine = Engine(settings, workers or (Worker(NAMES[:2]), Worker(NAMES[:2])), seconds)
    return engine, Exchange(engine, settings, {name: experts[name] for name in NAMES[:2]})


def test_a_change_waits_for_requests_and_requests_for_it(experts):
    async def run():
        engine, exchange = made(experts, seconds=0.5)
        await engine.add_request("first")
        change = asyncio.ensure_future(exchange.change(Change("cat", experts["cat"])))
        while exchange._open.is_set() and not change.done():
            await asyncio.sleep(0.001)
        await asyncio.gather(engine.add_request("second"), change)
        return engine, change.result()

    engine, said = asyncio.run(run())
    names = "ant, bee, cat"
    assert engine.said[:5] == ["first with ant, bee", "first done", "paused", "resumed", f"second with {names}"]
    assert [one["name"] for one in said["data"]] == ["ant", "bee", "cat"] and said["spare"] == 0
    assert all(worker.names == ["ant", "bee", "cat"] for worker in engine.workers)


def test_all_workers_or_none(experts):
    """One refuses, or has read something else: none changes, nobody waits."""
    for wrong, words in (({"refused": "cat: no"}, "cat: no"), ({"digest": "other"}, "have read different experts")):
        engine, exchange = made(experts, Worker(NAMES[:2]), Worker(NAMES[:2], prepare=wrong))
        with pytest.raises(ValueError, match=words):
            asyncio.run(exchange.change(Change("cat", experts["cat"])))
        assert all(w.asked == ["prepare", "abandon"] and w.names == ["ant", "bee"] for w in engine.workers)
        assert engine.said == [] and exchange.listed()["spare"] == 1 and exchange._open.is_set()


def test_a_worker_that_fails_in_the_change_ends_the_serving(experts):
    async def run():
        engine, exchange = made(experts, Worker(NAMES[:2]), Worker(NAMES[:2], commit=OSError("gone")))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="may have different ones since: start the server again"):
                await exchange.change(Change("cat", experts["cat"]))
            with pytest.raises(RuntimeError, match="start the server again"):
                await engine.add_request("first")
        return engine

    assert not asyncio.run(run()).paused


def test_requests_that_run_too_long(experts):
    async def run():
        engine, exchange = made(experts, seconds=0.3)
        await engine.add_request("first")
        with pytest.raises(Busy, match="1 request still runs, so the experts were left as they are"):
            await exchange.change(Change("ant"), wait=0.05)
        await engine.add_request("second")
        return engine, exchange

    engine, exchange = asyncio.run(run())
    assert engine.said[1] == "second with ant, bee" and list(exchange.folders) == ["ant", "bee"]
    assert all(worker.prepared is None for worker in engine.workers)


def test_changes_come_one_after_the_other(experts):
    async def run():
        engine, exchange = made(experts)
        changes = (Change("cat", experts["cat"]), Change("ant"), Change("dog", experts["dog"]))
        await asyncio.gather(*map(exchange.change, changes))
        return engine, exchange

    engine, exchange = asyncio.run(run())
    assert list(exchange.folders) == list(getattr(engine.input_processor, RULES).names) == ["bee", "cat", "dog"]


@pytest.mark.parametrize(
    "change, words",
    [
        (Change("eel"), "no expert 'eel'; there are ant, bee"),
        (Change("cat", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_what_needs_no_worker_to_be_refused(experts, change, words):
    engine, exchange = made(experts)
    with pytest.raises(ValueError, match=words):
        asyncio.run(exchange.change(change))
    assert all(worker.asked == [] for worker in engine.workers)
