"""What is chosen, counted and traced: against what the patched model records, and at no cost of the answers."""

from __future__ import annotations

import math

import builders
import pytest
import torch
from serving_cases import DOWN, NAMES, QKV, Packed, RowParallel, folders, layers, patched, served, tables_of, tokens

from moerge_ext.serving.counts import Counts
from moerge_ext.serving.requests import Choice
from moerge_ext.serving.traces import Traces
from moerge_ext.serving.watching import Watcher


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("experts"))


class Server:
    """A step of one layer of three modules, and of one whose input is shared out."""

    def __init__(self, experts, traces=0, **said):
        pool = served(experts, **said)
        self.tables = tables_of(pool)
        model = builders.tiny_llama()
        self.packed = Packed(model, pool, self.tables)
        self.row = RowParallel(model, pool, self.tables, 0, 1, lambda sums: sums)
        self.counts = Counts(pool.names, len(pool.names))
        self.traces = Traces(pool.names, traces) if traces else None
        self.watcher = Watcher(self.tables, self.counts, self.traces)

    def step(self, choices, lengths, x, wide, watched=True, at=None):
        names = [f"r{i}" for i in range(len(choices))]
        self.tables.begin(choices, lengths)
        if self.traces is not None:
            self.traces.at(at or dict.fromkeys(names, 0))
        if watched:
            self.watcher.begin(names, lengths, dict(zip(names, choices, strict=True)))
        found = self.packed(x), self.row(wide)
        self.watcher.end()
        return found


CHOICES = [None, Choice(None, weights=(0.5, 0.0, -1.0, 0.0)), Choice("arrow"), Choice(None), None]
LENGTHS = [3, 2, 4, 2, 1]


@pytest.mark.parametrize("choices", ([None] * 5, CHOICES), ids=("default", "mixed"))
def test_watched_steps_answer_the_same(experts, choices):
    server = Server(experts, methods=["arrow"])
    x, wide = tokens(12, 32), tokens(12, 48)
    plain = server.step(choices, LENGTHS, x, wide, watched=False)
    assert not server.counts.read()["tokens"]
    for one, other in zip(plain, server.step(choices, LENGTHS, x, wide), strict=True):
        assert torch.equal(one, other)
    assert server.tables.seen is None


def test_counts_are_those_of_the_patched_model(experts):
    """Of the default alone, over the modules; padding behind the step's tokens does not count."""
    server = Server(experts)
    x, wide = tokens(14, 32), tokens(14, 48)
    for _ in range(2):
        server.step([None] * 5, LENGTHS, x, wide)
    model, handle = patched(experts, "phatgoose")
    with handle.record(tokens=True) as trace:
        layers(model, QKV, x[:12])
        layers(model, (DOWN,), wide[:12])
    said = server.counts.read()
    load, counts = sum(trace.load().values()), sum(trace.counts().values())
    for i, name in enumerate(NAMES):
        assert said["experts"][name] == pytest.approx([2 * float(load[i]), 2 * int(counts[i])], rel=1e-5)
    weights = torch.cat([w for calls in trace.calls.values() for w, _ in calls])
    entropy = float(torch.special.entr(weights).sum())
    assert said["entropy"] == pytest.approx(2 * entropy, rel=1e-5) and 0 < entropy < 48 * math.log(2)
    assert (said["routed"], said["candidates"], said["masked"]) == (96, 384, 0)
    assert said["tokens"] == {"phatgoose": 24} and server.counts.read() == said


def test_counts_know_what_was_not_chosen(experts, tmp_path):
    """Weights of requests are no choice of a router; an expert without a module is masked there."""
    part = str(builders.random_experts(builders.tiny_llama(), tmp_path, ("part",), ("q_proj", "down_proj"))["part"])
    server = Server([*experts[:2], part], methods=["arrow"], missing="drop")
    choices = [Choice(None, weights=(0.0, 0.0, 1.0)), Choice(None), None]
    server.step(choices, [5, 4, 3], tokens(12, 32), tokens(12, 48))
    said = server.counts.read()
    assert said["tokens"] == {"given": 5, "none": 4, "phatgoose": 3}
    assert (said["routed"], said["candidates"], said["masked"]) == (12, 36, 6)


def test_methods_that_route_nothing(experts):
    """One expert is that expert, by default or by request; of merged ones nothing is chosen."""
    x, wide = tokens(3, 32), tokens(3, 48)
    for said, choice in (({"method": "expert:dog"}, None), ({"methods": ["expert:dog"]}, Choice("expert:dog"))):
        server = Server(experts, traces=1, **said)
        server.traces.open("r0", "a", 3)
        server.step([choice], [3], x, wide)
        assert server.counts.read()["experts"] == {"ant": [0, 0], "bee": [0, 0], "cat": [0, 0], "dog": [12, 12]}
        assert server.traces.read("a")[0]["tokens"] == [[0, 0, 0, 1]] * 3
    server = Server(experts, traces=1, method="merged")
    server.traces.open("r0", "a", 3)
    server.step([None], [3], x, wide)
    said = server.counts.read()
    assert not any(map(sum, said["experts"].values())) and said["tokens"] == {"merged": 3}
    assert server.traces.read("a")[0]["tokens"] == []


def test_a_mean_over_tokens_that_were_computed_twice(experts):
    server = Server(experts, traces=1)
    server.traces.open("r0", "a", 3)
    x, wide = tokens(3, 32), tokens(3, 48)
    server.step([None], [3], x, wide)
    once = server.traces.read("a")
    server.step([None], [3], x, wide)  # put back
    assert server.traces.read("a") == once


def test_counts_follow_the_experts():
    counts = Counts(("ant", "bee"), 3)
    chosen = torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]], dtype=torch.int32)
    from moerge_ext.serving.watching import Step

    for names, later in ((("ant", "bee"), ("ant", "cat")), (("ant", "cat"), ("cat",))):
        step = Step(["r"], [1])
        step.add("q", "phatgoose", *chosen)
        counts.add(step)
        counts.rename(later)
        assert counts.read()["experts"][names[1]] == [1.0, 1]
    assert counts.read()["experts"] == {"ant": [0.0, 0], "bee": [1.0, 1], "cat": [1.0, 1]}
    assert counts.read()["candidates"] == 4.0


def test_a_trace_says_what_the_patched_model_records(experts):
    server = Server(experts, traces=2, methods=["arrow"])
    server.traces.open("r2", "cmpl-7-0", 4)
    server.traces.open("r1", "cmpl-7-1", 2)
    x, wide = tokens(12, 32), tokens(12, 48)
    server.step(CHOICES, LENGTHS, x, wide)
    one, other = server.traces.read("cmpl-7")
    assert one["experts"] == list(NAMES) and one["prompt_tokens"] == 4 and one["start"] == 0
    model, handle = patched(experts, "arrow")
    with handle.record(tokens=True) as trace:
        layers(model, QKV, x[5:9])
        layers(model, (DOWN,), wide[5:9])
    wanted = torch.zeros(4, 4)
    for calls in trace.calls.values():
        for weights, ids in calls:
            wanted.scatter_add_(1, ids.long(), weights)
    torch.testing.assert_close(torch.tensor(one["tokens"]), wanted / len(one["modules"]))
    load = trace.load()
    assert set(one["modules"]) == set(load)
    for module, sums in one["modules"].items():
        torch.testing.assert_close(torch.tensor(sums) * 4, load[module].float())  # of four tokens
    torch.testing.assert_close(torch.tensor(other["tokens"]), torch.tensor([[0.5, 0.0, -1.0, 0.0]] * 2))
    assert server.traces.read("cmpl-7-1") == [other] and server.traces.read("cmpl") == server.traces.read("cmpl-") == []


def test_traces_go_on_are_put_back_and_make_room(experts):
    server = Server(experts, traces=1)
    server.traces.open("r0", "a", 3)
    x, wide = tokens(3, 32), tokens(3, 48)
    rows = {}
    for at, part in (
        (2, slice(0, 2)),
        (4, slice(2, 3)),
        (1, slice(0, 2)),
    ):  # last: put back, less cached
        server.step([None], [part.stop - part.start], x[part], wide[part], at={"r0": at})
        (said,) = server.traces.read("a")
        rows |= {at + i: row for i, row in enumerate(said["tokens"][at - said["start"] :])}
    assert said["start"] == 1 and len(said["tokens"]) == 4
    assert [rows[i] for i in range(1, 5)] == said["tokens"]
    server.traces.open("r0", "b", 1)  # makes room
    assert server.traces.read("a") == [] and server.traces.read("b")[0]["tokens"] == []
    server.step([None], [3], x, wide)
    server.traces.open("r9", "c", 1)
    server.step([None], [3], x, wide)  # r0 runs on, without a trace
    assert server.traces.read("b") == [] and server.traces.read("c")[0]["tokens"] == []
