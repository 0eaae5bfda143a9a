"""What the plugin asks of an engine, with stand-ins for vLLM's parts."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from moerge_ext.serving.requests import Choice, Rules
from moerge_ext.serving.settings import Settings
from moerge_ext.serving.tables import Tables
from moerge_ext.serving.traces import Traces
from moerge_ext.serving.vllm import frontend, startup
from moerge_ext.serving.vllm.layers import take_place
from moerge_ext.serving.vllm.overflow import Overflow
from moerge_ext.serving.vllm.plugin import _wrap
from moerge_ext.serving.vllm.steps import CHECKED, TRACED, Steps
from moerge_ext.serving.vllm.unsupported import problems_of_layers
from moerge_ext.serving.watching import Watcher

METHODS = {"phatgoose": None, "arrow": None}


def tables() -> Tables:
    return Tables(3, METHODS, max_requests=4, max_tokens=16, device=torch.device("cpu"))


def scheduled(new: dict[str, Choice | None] | None = None, finished: tuple[str, ...] = ()) -> SimpleNamespace:
    asked = {name: None if c is None else {CHECKED: c.as_dict()} for name, c in (new or {}).items()}
    requests = [
        SimpleNamespace(
            req_id=name,
            sampling_params=SimpleNamespace(extra_args=extra),
            prompt_token_ids=[1] * 20,
            num_computed_tokens=8,
        )
        for name, extra in asked.items()
    ]
    known = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    return SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set(finished), scheduled_cached_reqs=known)


class FirstRunner:
    """Of vLLM's first kind: the batch's own order of requests."""

    def __init__(self, order: list[str]):
        self.input_batch, self.calls = SimpleNamespace(req_ids=order), []

    def execute_model(self, said, *rest):
        self.calls.append("execute")
        return self._prepare_inputs(said, self.lengths)

    def _prepare_inputs(self, said, lengths):
        self.calls.append("prepare")
        return "inputs"


class SecondRunner:
    """Of the second: the order comes with the step."""

    def __init__(self, order: list[str]):
        self.order, self.calls = order, []

    def execute_model(self, said):
        state = SimpleNamespace(req_ids=self.order, num_scheduled_tokens=self.lengths)
        return self.prepare_inputs(said, state, None, num_active_loras=0)

    def prepare_inputs(self, said, state, description, num_active_loras):
        return "inputs"


@pytest.mark.parametrize("kind", (FirstRunner, SecondRunner))
def test_tokens_find_their_request(kind):
    """Requests come, are put in another order, and go; what they ask for goes with them."""
    held, runner = tables(), kind(["b", "a"])
    Steps(held).watch(runner)
    runner.lengths = [2, 3]
    assert runner.execute_model(scheduled({"a": Choice(None, weights=(1.0, 0.0, 0.5)), "b": None})) == "inputs"
    assert held.rows(7).tolist() == [0, 0, 1, 1, 1, 4, 4] and not held.plain
    assert held.weights[:2].tolist() == [[0, 0, 0], [1, 0, 0.5]]
    assert held.allowed("phatgoose", None)[:, 0].tolist() == [True, False, False, False, False]
    assert held.used == {"phatgoose": True, "arrow": False}
    runner.lengths = [1, 1]
    runner.execute_model(scheduled())  # it is remembered while it runs
    assert held.weights[1].tolist() == [1, 0, 0.5]
    runner.lengths = [1]
    runner.execute_model(scheduled(finished=("a",)))
    assert held.plain
    runner.lengths = [1, 1]
    runner.execute_model(scheduled({"a": None}))  # another of the same name
    assert held.plain


@pytest.mark.parametrize("kind", (FirstRunner, SecondRunner))
def test_a_model_that_does_not_use_its_layers_is_noticed(kind, caplog):
    """After the first step with tokens, and never again; a model with an encoder of images may leave some out."""
    used, idle = SimpleNamespace(ran=True, name="q"), SimpleNamespace(ran=False, name="k")
    part = "took no part in the first step: k"
    for methods, sometimes, words in (
        ([used, idle], True, part),
        ([used, idle], False, ""),
        ([used], False, None),
        ([idle], True, ""),
    ):
        runner = kind(["a"])
        Steps(tables(), methods, sometimes=sometimes).watch(runner)
        runner.lengths = [1]
        caplog.clear()
        if words == "":
            with pytest.raises(RuntimeError, match="the model answered without layers that have experts: k"):
                runner.execute_model(scheduled())
        else:
            runner.execute_model(scheduled())
            assert [words] == [record.message.partition("experts ")[2] for record in caplog.records] or words is None
        caplog.clear()
        runner.execute_model(scheduled())
        assert not caplog.records


@pytest.mark.parametrize("put_aside", (False, True))
def test_blocks_of_a_request_that_overflowed_are_cleared(put_aside):
    """Before the next step, in which others may have them; nothing is read of the caches while all is finite."""
    model, asked = SimpleNamespace(compute_logits=lambda hidden, *rest: hidden.sum(-1)), []
    caches = [torch.full((2, 3), 2.0, dtype=torch.float16), [torch.full((2,), torch.inf), None], torch.ones(2).int()]
    overflow = Overflow(model, lambda: asked.append(1) or caches, torch.device("cpu"))
    held, runner = tables(), FirstRunner(["a"])
    Steps(held, overflow=overflow).watch(runner)
    runner.lengths = [1]
    runner.execute_model(scheduled({"a": Choice(None, weights=(100.0, 0.0, 0.0))}))
    assert model.compute_logits(torch.ones(2, 4)).tolist() == [4, 4]
    runner.execute_model(scheduled({"a": Choice(None, weights=(100.0, 0.0, 0.0))}, finished=("a",)))
    assert not asked
    caches[0][1, 2] = model.compute_logits(torch.tensor([[1.0, torch.nan], [0.0, 0.0]]))[0]
    runner.execute_model(scheduled())
    assert not asked, "it runs, and its blocks are its own"
    gone = scheduled(finished=() if put_aside else ("a",))
    gone.preempted_req_ids = {"a"} if put_aside else None
    runner.execute_model(gone)
    assert asked and caches[0].tolist() == [[2, 2, 2], [2, 2, 0]] and caches[1][0].tolist() == [0, 0]
    runner.execute_model(scheduled(finished=("b",)))
    assert len(asked) == 1, "once"
    Overflow(SimpleNamespace(), lambda: [], torch.device("cpu")).clear(True)  # a model without logits


def test_a_name_that_ends_and_begins_in_one_step():
    held, runner = tables(), FirstRunner(["a"])
    Steps(held).watch(runner)
    runner.lengths = [2]
    runner.execute_model(scheduled({"a": Choice(None, weights=(1.0, 0.0, 0.0))}))
    runner.execute_model(scheduled({"a": Choice(None, weights=(0.0, 0.0, 1.0))}, finished=("a",)))
    assert not held.plain and held.weights[0].tolist() == [0.0, 0.0, 1.0]


class Whole:
    """A layer of vLLM's whose x has a batch of one before its tokens."""

    output_partition_sizes = (2,)

    def __init__(self):
        self.quant_method = SimpleNamespace(apply=lambda layer, x, bias: x[..., :2] * 2)


def test_tokens_that_come_as_a_batch_of_one():
    class Added:
        def add(self, y, x):
            assert x.shape == (6, 4)
            y += x[:, 2:]

    layer = Whole()
    method = take_place(layer, "q", [Added()], {})
    x = torch.arange(24.0).view(1, 6, 4)
    assert torch.equal(method.compute(layer, x, None), x[..., :2] * 2 + x[..., 2:])


def test_layers_that_cannot_know_the_request():
    held, asked = config({}), {"experts": ["a"]}
    held.model_config.use_mla = True
    tower, absorbed = "visual.qkv", "model.layers.0.self_attn.kv_b_proj"
    for said in ({}, {"requests": False, "metrics": True}):
        (problem,) = problems_of_layers(held, Settings.parse(asked | said), [tower], [tower])
        assert "module 'visual.qkv': outside of the language model" in problem or tower in problem
    alike = Settings.parse(asked | {"requests": False})
    assert problems_of_layers(held, alike, [tower], [tower]) == []
    (problem,) = problems_of_layers(held, alike, [], [absorbed])
    assert absorbed in problem and "VLLM_MLA_DISABLE=1" in problem


def test_a_runner_of_another_kind_is_refused():
    with pytest.raises(RuntimeError, match="SimpleNamespace is no model runner that this version of moerge knows"):
        Steps(tables()).watch(SimpleNamespace(execute_model=lambda said: None))


def processed(said, salt=None, rules=None) -> SimpleNamespace:
    """A request as it leaves the front end."""
    made = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=said), cache_salt=salt, request_id="cmpl-1-0")
    return frontend._read(made, rules)


def test_the_front_end_checks_a_request_and_keys_its_cache():
    rules = Rules(("ant", "bee"), {"phatgoose": False})
    plain = processed({"other": 1}, "mine", rules)
    assert plain.sampling_params.extra_args == {"other": 1} and plain.cache_salt == "moerge-default:mine"
    assert processed({"other": 1}, None, rules).cache_salt is None
    one, two = (processed({"moerge": {"expert": name}}, "mine", rules) for name in ("ant", "bee"))
    assert one.sampling_params.extra_args == {CHECKED: Choice(None, weights=(1.0, 0.0)).as_dict()}
    assert one.cache_salt != two.cache_salt and one.cache_salt.endswith(":mine")
    assert processed({"moerge": {"expert": "ant"}}, None, rules).cache_salt not in (None, one.cache_salt)
    with pytest.raises(ValueError, match="is no argument of requests"):
        processed({CHECKED: {"method": None}}, None, rules)
    with pytest.raises(ValueError, match="this server has no experts"):
        processed({"moerge": {"routing": False}}, None, None)


def test_no_salt_of_a_client_is_the_key_of_another_routing():
    """Also where it is made to look like one."""
    rules = Rules(("ant", "bee"), {"phatgoose": False})
    bee = processed({"moerge": {"expert": "bee"}}, None, rules).cache_salt
    salts = [None, bee, bee.removeprefix("moerge:"), "moerge-default", f"{bee}:{bee}", ""]
    said = [None, *({"moerge": {"expert": name}} for name in rules.names)]
    keys = {(i, salt): processed(one, salt, rules).cache_salt for i, one in enumerate(said) for salt in salts}
    assert len(set(keys.values())) == len(keys)


def test_a_request_over_http_is_checked_before_it_streams(monkeypatch):
    monkeypatch.setattr(frontend, "_refusal", lambda: ValueError)

    class Processor:
        pass

    processor, asked = Processor(), SimpleNamespace(vllm_xargs={"moerge": {"expert": "cow"}})
    theirs = lambda request, *args: "params"  # noqa: E731
    assert frontend.sampling(theirs, asked) == "params", "no engine here yet"
    setattr(processor, frontend.RULES, Rules(("ant", "bee"), {"glider": True, "phatgoose": False}, reads=("glider",)))
    monkeypatch.setattr(frontend, "_SERVING", [weakref.ref(processor)])
    with pytest.raises(ValueError, match="no expert 'cow'; there are ant, bee"):
        frontend.sampling(theirs, asked)
    for fine in (None, {}, {"moerge": {"expert": "bee"}}, {"moerge": '{"query": "moo"}'}):
        assert frontend.sampling(theirs, SimpleNamespace(vllm_xargs=fine)) == "params"


def test_traces_are_found_by_the_id_of_the_answer():
    """vLLM counts the prompts of a request behind its id: cmpl-x-1, resp_x_0."""
    traces = Traces(("ant", "bee"), 8)
    for key in ("cmpl-x-0", "cmpl-x-1", "resp_x_0", "cmpl-x2-0", "chatcmpl-y"):
        traces.open(f"inner {key}", key, 3)
    counts = {name: len(traces.read(name)) for name in ("cmpl-x", "cmpl-x-1", "resp_x", "resp", "cmpl", "chatcmpl-y")}
    assert counts == {"cmpl-x": 2, "cmpl-x-1": 1, "resp_x": 1, "resp": 0, "cmpl": 0, "chatcmpl-y": 1}


def test_a_trace_is_asked_for_without_a_cache_of_its_own():
    rules = Rules(("ant", "bee"), {"phatgoose": False}, traces=True)
    plain = processed({"moerge": {"trace": True}}, "mine", rules)
    assert plain.sampling_params.extra_args == {TRACED: "cmpl-1-0"}
    assert plain.cache_salt == processed(None, "mine", rules).cache_salt
    one, other = (processed({"moerge": {"expert": "ant", "trace": on}}, None, rules) for on in (True, False))
    assert one.cache_salt == other.cache_salt and TRACED not in other.sampling_params.extra_args
    with pytest.raises(ValueError, match="is no argument of requests"):
        processed({TRACED: "cmpl-2"}, None, rules)


@pytest.mark.parametrize("kind", (FirstRunner, SecondRunner))
def test_steps_are_watched_while_they_run(kind):
    held, runner = tables(), kind(["b", "a"])
    traces = Traces(("x", "y", "z"), 1)
    Steps(held, (), Watcher(held, None, traces)).watch(runner)
    runner.lengths = [2, 3]
    new = scheduled({"a": None, "b": None})
    new.scheduled_new_reqs[0].sampling_params.extra_args = {TRACED: "cmpl-1-0"}
    prepare = runner.prepare_inputs if kind is SecondRunner else runner._prepare_inputs

    def choose(*args, **options):
        found = prepare(*args, **options)
        assert held.seen is not None and held.seen.requests == ["b", "a"]
        held.seen.add("q", "phatgoose", torch.ones(5, 1), torch.tensor([[0], [0], [1], [2], [2]], dtype=torch.int32))
        return found

    setattr(runner, "prepare_inputs" if kind is SecondRunner else "_prepare_inputs", choose)
    runner.execute_model(new)
    assert held.seen is None
    (trace,) = traces.read("cmpl-1")
    assert trace["start"] == 8 and trace["tokens"] == [[0, 1, 0], [0, 0, 1], [0, 0, 1]] and trace["prompt_tokens"] == 20


def config(said) -> SimpleNamespace:
    parallel = SimpleNamespace(data_parallel_size=2, _api_process_count=2)
    model = SimpleNamespace(runner_type="generate")
    graphs = SimpleNamespace(cudagraph_mode=SimpleNamespace(name="FULL"))
    held = {"additional_config": said, "parallel_config": parallel, "model_config": model, "lora_config": None}
    held["cache_config"] = SimpleNamespace(kv_sharing_fast_prefill=False)
    return SimpleNamespace(**held, compilation_config=graphs, device_config=SimpleNamespace(device_type="cuda"))


class Executor:
    def __init__(self, vllm_config, said):
        self.vllm_config, self.said = vllm_config, said

    def collective_rpc(self, name):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


@pytest.mark.parametrize("said", ([], [{"layers": 4}, None], AttributeError("no moerge_status")))
def test_no_engine_starts_with_a_worker_without_experts(said):
    with pytest.raises(RuntimeError, match="a worker has not loaded the plugin"):
        start(said)


def start(said, asked={"moerge": {"experts": ["a"]}}, lora=None):  # noqa: B006
    held = config(asked)
    held.lora_config = lora
    executor = object.__new__(Executor)
    startup.check_workers(Executor.__init__, executor, held, said)
    return executor


def test_engines_start_with_experts_on_every_worker_or_when_none_are_asked_for():
    assert start([{"layers": 4}, {"layers": 4}]).said and start([None], {}).said
    with pytest.raises(RuntimeError, match="no layer of the model has experts"):
        start([{"layers": 0}])
    with pytest.raises(ValueError, match="--enable-lora"):
        start([{"layers": 4}], lora=object())
    with pytest.raises(ValueError, match="metrics or traces with CUDA graphs"):
        start([{"layers": 4}], {"moerge": {"experts": ["a"], "traces": 1}})
    with pytest.raises(ValueError) as refused:
        start([{"layers": 4}], {"moerge": {"experts": ["a"], "spare": 1}})
    for words in ("--data-parallel-size", "--api-server-count", "CUDA graphs"):
        assert words in str(refused.value)


def test_places_are_taken_once():
    """vLLM may load a plugin twice in one process."""

    class Owner:
        def name(self):
            return "theirs"

    for _ in range(2):
        _wrap(Owner, "name", lambda theirs, self: f"ours of {theirs(self)}")
        _wrap(Owner, "more", lambda theirs, self: theirs)
    assert Owner().name() == "ours of theirs" and Owner().more() is None
