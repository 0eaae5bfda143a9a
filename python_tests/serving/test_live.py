"""Experts that join, are replaced and leave a server: as if it had been started with those that are left."""

from __future__ import annotations

import builders
import pytest
import torch
from serving_cases import DOWN, LINEARS, NAMES, Packed, RowParallel, folders, served, tables_of, tokens

from moerge_ext.routing.shares import share_of_plan
from moerge_ext.serving.live import Change, LivePool
from moerge_ext.serving.requests import Choice
from moerge_ext.serving.settings import Settings

METHODS = {"arrow": {}, "glider_code": {}}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("experts"))


class Worker:
    """A stand-in for a worker that serves some experts on a packed layer and on one whose input is shared out."""

    def __init__(self, paths, spare=0, method="phatgoose", **said):
        self.spare, said = spare, {"methods": METHODS, "method": method} | said
        self.pool = served(paths, **said, spare=spare)
        self.tables = tables_of(self.pool, spare=spare)
        model = builders.tiny_llama()
        self.packed = Packed(model, self.pool, self.tables, spare=spare)
        self.row = RowParallel(model, self.pool, self.tables, 0, 1, lambda sums: sums, spare=spare)
        branches = {branch.path: branch for branch in (*self.packed.branches, self.row.branch)}
        shares = self.packed.shares | {DOWN: self.row.share}

        def share(module, plan):
            return share_of_plan(plan, shares[module])

        settings = Settings.parse({"experts": paths} | said | {"spare": spare})
        kept = (self.pool.names, self.pool.sizes, self.pool.modules, branches, self.tables, share)
        self.live = LivePool(settings, None, model, *kept)

    def change(self, name, source=None):
        self.live.prepare(Change(name, source))
        return self.live.commit()

    def outputs(self):
        """Of a step of the default alone, and of one of requests of every kind."""
        count, x, wide = len(self.live.names), tokens(12, 32), tokens(12, 48, seed=1)
        affinities = tuple((0.9, 0.1, 0.5, -0.3)[:count])
        said = [None, Choice(None, weights=affinities), Choice("arrow"), Choice("glider_code", affinities=affinities)]
        found = []
        for choices, lengths in (([None, None], [5, 7]), ([*said, Choice(None)], [3, 2, 4, 2, 1])):
            self.tables.begin(choices, lengths)
            found += [self.packed(x), self.row(wide)]
        return found

    def contents(self):
        tensors = [t for b in self.live._branches.values() for held in b.stacked().values() for t in held.values()]
        return self.live.names, [tensor.clone() for tensor in tensors], self.outputs()


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_as_started_anew(experts):
    """Whatever joins, is replaced and leaves: the same bits as a server that was started with the experts there are."""
    where = dict(zip(NAMES, experts, strict=True))
    worker = Worker(experts[:2], spare=2)
    addresses = [t.data_ptr() for b in worker.live._branches.values() for t in b.stacked()[""].values()]
    assert same(worker.outputs(), Worker(experts[:2]).outputs()), "spare slots change something"
    for change, names in (
        (("cat", where["cat"]), ("ant", "bee", "cat")),
        (("dog", where["dog"]), NAMES),
        (("ant",), ("bee", "cat", "dog")),
        (("ant", where["ant"]), ("bee", "cat", "dog", "ant")),
        (("cat",), ("bee", "dog", "ant")),
        (("ant",), ("bee", "dog")),
    ):
        assert worker.change(*change) == names
        assert same(worker.outputs(), Worker([where[name] for name in names]).outputs())
    worker.change("bee", where["cat"])  # another in its place, under its name
    assert worker.live.names == ("bee", "dog")
    assert same(worker.outputs(), Worker({"bee": where["cat"], "dog": where["dog"]}).outputs())
    assert addresses == [t.data_ptr() for b in worker.live._branches.values() for t in b.stacked()[""].values()]


def test_a_method_with_all_experts_takes_the_new_one(experts):
    """Its top_k and scale follow the number of experts."""
    worker = Worker(experts[:2], spare=1, method="arrow_mttl", methods={}, top_k=None)
    worker.change("cat", experts[2])
    anew = Worker(experts[:3], method="arrow_mttl", methods={}, top_k=None)
    for one in (worker, anew):
        one.tables.begin([None], [12])
    x = tokens(12, 32)
    assert torch.equal(worker.packed(x), anew.packed(x))


@pytest.mark.parametrize("absent", ("mask", "base"))
def test_an_expert_without_some_modules(experts, tmp_path, absent):
    part = str(builders.random_experts(builders.tiny_llama(), tmp_path, ("part",), ("q_proj", "down_proj"))["part"])
    worker = Worker(experts[:2], spare=1, methods={}, absent=absent)
    worker.change("part", part)
    anew = Worker([*experts[:2], part], methods={}, absent=absent)
    for choices in ([None], [Choice(None, weights=(0.5, 0.0, 1.0))], [Choice("phatgoose")]):
        for one in (worker, anew):
            one.tables.begin(choices, [12])
        assert torch.equal(worker.packed(tokens(12, 32)), anew.packed(tokens(12, 32)))
        assert torch.equal(worker.row(tokens(12, 48)), anew.row(tokens(12, 48)))


def test_refusals_leave_everything_as_it_was(experts, tmp_path):
    model = builders.tiny_llama()
    made = {
        "wide": builders.random_experts(model, tmp_path, ("wide",), LINEARS, rank=8)["wide"],
        "bare": builders.random_experts(model, tmp_path, ("bare",), LINEARS, gates=False)["bare"],
        "head": builders.random_experts(model, tmp_path, ("head",), ("lm_head",))["head"],
    }
    path = next(iter(builders.linear_sizes(model, ("q_proj",))))[0]
    parts = (torch.full((4, 32), torch.nan), torch.ones(32, 4))
    made["nan"] = builders.write_adapter(tmp_path / "nan", {path: parts})
    worker = Worker(experts[:2], spare=1)
    before = worker.contents()
    for change, said in (
        (Change("wide", str(made["wide"])), "rank 8, the layer has room for rank 4"),
        (Change("bare", str(made["bare"])), "expected a gate of kind 'sigmoid-gate'"),
        (Change("head", str(made["head"])), "lm_head: an engine computes the head in a way of its own"),
        (Change("nan", str(made["nan"])), "NaN"),
        (Change("none", str(tmp_path / "nowhere")), "nowhere"),
        (Change("eel"), "no expert 'eel'; there are ant, bee"),
    ):
        with pytest.raises(ValueError, match=said):
            worker.live.prepare(change)
        with pytest.raises(RuntimeError, match="no change of the experts was prepared"):
            worker.live.commit()
    after = worker.contents()
    assert before[0] == after[0] and same(before[1], after[1]) and same(before[2], after[2])
    worker.live.prepare(Change("cat", experts[2]))
    worker.live.abandon()
    assert same(worker.contents()[1], before[1])
    worker.change("cat", experts[2])
    with pytest.raises(ValueError, match="all 3 slots are taken, by ant, bee, cat: drop one first"):
        worker.live.prepare(Change("dog", experts[3]))


def test_what_must_stay(experts):
    worker = Worker(experts[:2], spare=1, methods={}, top_k=2)
    with pytest.raises(ValueError, match="'ant' cannot leave: top_k=2 is more than the 1 expert that would be left"):
        worker.live.prepare(Change("ant"))
    worker = Worker(experts[:1], spare=1, methods={}, top_k=1)
    with pytest.raises(ValueError, match="'ant' is the last expert"):
        worker.live.prepare(Change("ant"))


def test_methods_without_slots(experts):
    with pytest.raises(ValueError, match="spare=2: method 'merged' routes nothing"):
        served(experts, method="merged", spare=2)


def test_digests_are_of_what_was_read(experts):
    worker, other = Worker(experts[:2], spare=1), Worker(experts[:2], spare=1)
    first = worker.live.prepare(Change("new", experts[2]))
    assert other.live.prepare(Change("new", experts[2])) == first
    assert other.live.prepare(Change("new", experts[3])) != first


@pytest.mark.parametrize(
    "said",
    (
        None,
        [],
        {"name": "a"},
        {"name": "a", "source": "b", "more": 1},
        {"name": "", "source": "b"},
        {"name": 1, "source": "b"},
        {"name": "a", "source": "  "},
        {"name": "\ud800", "source": "b"},
    ),
)
def test_what_a_change_must_say(said):
    with pytest.raises(ValueError, match="moerge: "):
        Change.read(said)
