"""Several requests of one model at once, in threads and asyncio tasks: what a block sets is for who is inside of it."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import patch_cases as cases
import pytest
import torch
from patch_cases import batch, logits
from torch import nn

import moerge_ext as moerge

TIMEOUT = 30
EYE = torch.eye(3)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return cases.bank("llama", cases.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def glider(experts):
    model = cases.build("llama")
    return model, moerge.patch(model, experts, "glider_code", alpha=1000)


@pytest.fixture
def phatgoose(experts):
    model = cases.build("llama")
    return model, moerge.patch(model, experts)


def answers(model, handle, **inputs):
    """What each one-hot row of affinities answers alone."""
    found = []
    for row in EYE:
        with handle.affinities(row):
            found.append(logits(model, **inputs))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    return found


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(TIMEOUT)


# ---- side by side ----------------------------------------------------------------------------------------------------


def test_threads_have_rows_of_their_own(glider):
    model, handle = glider
    want, together = answers(model, handle, **batch("llama")), threading.Barrier(3)

    def ask(row):
        for _ in range(5):
            with handle.affinities(EYE[row]):
                together.wait(TIMEOUT)
                assert torch.equal(logits(model, **batch("llama")), want[row])
                together.wait(TIMEOUT)
        with pytest.raises(RuntimeError, match="none is set"):
            logits(model, **batch("llama"))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, range(3), timeout=4 * TIMEOUT))
    assert not handle._state.busy


def test_tasks_have_rows_of_their_own(glider):
    model, handle = glider
    want = answers(model, handle, **batch("llama"))

    async def ask(row):
        for step in range(6):
            with handle.affinities(EYE[row]):
                await asyncio.sleep(0)
                assert torch.equal(logits(model, **batch("llama")), want[row])
                await asyncio.sleep(0.001 * ((row + step) % 3))
                inside = await asyncio.to_thread(logits, model, **batch("llama"))
                assert torch.equal(inside, want[row])
            with pytest.raises(RuntimeError, match="none is set"):
                logits(model, **batch("llama"))

    async def all_of_them():
        await asyncio.gather(*map(ask, range(3)))

    asyncio.run(all_of_them())


def test_disabled_and_record_are_for_one_request(phatgoose):
    model, handle = phatgoose
    routed = logits(model, **batch("llama"))
    with handle.disabled():
        base = logits(model, **batch("llama"))
    inside, done = threading.Event(), threading.Event()

    def hold(block):
        with block as trace:
            inside.set()
            assert done.wait(TIMEOUT)
            return trace, logits(model, **batch("llama"))

    for block, want in ((handle.disabled(), base), (handle.record(), routed)):
        inside.clear(), done.clear()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(hold, block)
            assert inside.wait(TIMEOUT)
            with handle.record() as mine:
                assert torch.equal(logits(model, **batch("llama")), routed)
            assert torch.equal(in_thread(lambda: logits(model, **batch("llama"))), routed)
            done.set()
            theirs, got = other.result(TIMEOUT)
        assert torch.equal(got, want)
        assert all(counts.sum() == 2 * 14 for counts in mine.counts().values())
        if theirs is not None:
            assert all(counts.sum() == 2 * 14 for counts in theirs.counts().values())


def test_two_records_at_once(phatgoose):
    model, handle = phatgoose

    async def ask(rows):
        with handle.record() as trace:
            for _ in range(3):
                await asyncio.sleep(0)
                logits(model, **batch("llama", rows=rows))
        return trace

    async def both():
        return await asyncio.gather(ask(1), ask(3))

    for rows, trace in zip((1, 3), asyncio.run(both()), strict=True):
        assert all(counts.sum() == 3 * 2 * 7 * rows for counts in trace.counts().values())


def test_the_batch_is_checked_for_its_own_request(glider):
    model, handle = glider

    def other():
        with handle.affinities(EYE[:1]):
            return logits(model, **batch("llama", rows=3))

    with handle.affinities(EYE[:2]):
        assert in_thread(other).shape[0] == 3
        with pytest.raises(ValueError, match="2 rows of affinities are set and the model got a batch of 3"):
            logits(model, **batch("llama", rows=3))


# ---- begun inside of a block -----------------------------------------------------------------------------------------


def test_who_is_begun_inside_is_inside_to_the_end(glider):
    model, handle = glider
    want, got, go = answers(model, handle, **batch("llama")), [], threading.Event()

    def late():
        assert go.wait(TIMEOUT)
        got.append(logits(model, **batch("llama")))

    with handle.affinities(EYE[0]):
        thread = threading.Thread(target=late)
        thread.start()
    with handle.affinities(EYE[1]):  # does not write where the thread reads
        go.set()
        thread.join(TIMEOUT)
        assert torch.equal(logits(model, **batch("llama")), want[1])
    assert torch.equal(got[0], want[0])


def test_a_pool_serves_whoever_hands_in(glider):
    model, handle = glider
    want = answers(model, handle, **batch("llama"))
    with ThreadPoolExecutor(1) as pool:
        for row in (0, 2):
            with handle.affinities(EYE[row]):
                assert torch.equal(pool.submit(logits, model, **batch("llama")).result(TIMEOUT), want[row])
            with pytest.raises(RuntimeError, match="none is set"):
                pool.submit(logits, model, **batch("llama")).result(TIMEOUT)


def test_threads_in_one_record_add_up(phatgoose):
    model, handle = phatgoose
    with handle.record() as trace, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: logits(model, **batch("llama")), range(12)))
    assert all(counts.sum() == 12 * 2 * 14 for counts in trace.counts().values())


def test_left_elsewhere_than_entered(glider):
    model, handle = glider
    block = handle.affinities(EYE[0])
    in_thread(block.__enter__)
    block.__exit__(None, None, None)
    assert not handle._state.busy
    with pytest.raises(RuntimeError, match="none is set"):
        logits(model, **batch("llama"))


# ---- generate's threads ----------------------------------------------------------------------------------------------


def streamed(model, begin):
    """The text that another thread generates; begin(thread) starts it."""
    transformers = pytest.importorskip("transformers")
    from query_cases import letters

    streamer = transformers.TextIteratorStreamer(letters(), timeout=TIMEOUT)
    inputs = {**batch("llama", rows=1), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=inputs | {"streamer": streamer})
    begin(thread)
    text = "".join(streamer)
    thread.join(TIMEOUT)
    return text


def test_a_streamer_reads_what_its_block_routes(glider):
    model, handle = glider
    texts, left = [], []
    for row in EYE:
        with handle.affinities(row):
            texts.append(streamed(model, threading.Thread.start))

        def begin(thread, row=row):
            with handle.affinities(row):
                thread.start()

        left.append(streamed(model, begin))  # the block has ended while it generates
    assert texts == left and len(set(texts)) == 3


def test_a_thread_begun_too_late_says_so_and_its_reader_ends(glider, monkeypatch):
    model, handle = glider
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: said.append(str(failure.exc_value)))
    with handle.affinities(EYE[0]):
        pass
    assert streamed(model, threading.Thread.start) == ""
    assert len(said) == 1 and "none is set" in said[0] and "belongs to the block in which it was started" in said[0]
    with handle.affinities(EYE[:2]):  # any other failure ends the reader too
        streamed(model, threading.Thread.start)
    assert "2 rows of affinities" in said[1]


def continuous(model, rows, **options):
    config = pytest.importorskip("transformers").generation.ContinuousBatchingConfig(num_blocks=16, block_size=16)
    found = model.generate_batch(
        [ids.tolist() for ids in cases.tokens(rows)], continuous_batching_config=config, max_new_tokens=4, **options
    )
    return [found[key].generated_tokens for key in found]


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching(glider, phatgoose):
    model, handle = glider
    model.generation_config.eos_token_id = -1
    for row in EYE:
        with handle.affinities(row):
            want = model.generate(cases.tokens(2), max_new_tokens=4, do_sample=False)[:, 7:].tolist()
            assert continuous(model, 2) == want
    with handle.affinities(EYE[:2]), pytest.raises(ValueError, match="2 rows of affinities.*give one query for all"):
        continuous(model, 2)
    with pytest.raises(RuntimeError, match="none is set"):
        continuous(model, 2)
    model, handle = phatgoose
    model.generation_config.eos_token_id = -1
    with handle.record() as trace:
        continuous(model, 1)
    assert all(counts.sum() == 2 * (7 + 3) for counts in trace.counts().values())


# ---- copies ----------------------------------------------------------------------------------------------------------


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_made_inside_begin_clean(glider, phatgoose, duplicate):
    model, handle = glider
    want = answers(model, handle, **batch("llama"))
    with handle.affinities(EYE[:2]):
        twin = duplicate(model)
        with pytest.raises(RuntimeError, match="none is set"):
            logits(twin, **batch("llama", rows=3))
        with moerge.get_handle(twin).affinities(EYE[2]):
            assert torch.equal(logits(twin, **batch("llama")), want[2])
            assert twin.generate(cases.tokens(3), max_new_tokens=2).shape == (3, 9)
    moerge.get_handle(twin).remove()
    assert "generate" not in vars(twin) and "generate" in vars(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())
    model, handle = phatgoose
    routed = logits(model, **batch("llama"))
    with handle.record() as trace, handle.disabled():
        twin = duplicate(model)
        assert torch.equal(logits(twin, **batch("llama")), routed)
    assert trace.counts() == {}


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(experts):
    """(a model of one layer, its handle, an input)."""
    layer = nn.Sequential(nn.Linear(32, 48))
    one = moerge.ExpertBank(experts.names, {"0": experts.modules["model.layers.0.mlp.up_proj"]})
    torch._dynamo.reset()
    yield layer, moerge.patch(layer, one, "glider_code", alpha=1000), torch.randn(2, 3, 32)
    torch._dynamo.reset()


def test_a_compiled_model_keeps_requests_apart(small):
    model, handle, x = small
    compiled, together, want = torch.compile(model, backend="eager"), threading.Barrier(2), []
    whole = torch.compile(model, backend="eager", fullgraph=True)
    for row in EYE:
        with handle.affinities(row):
            want.append(model(x))
            assert torch.equal(compiled(x), want[-1]) and torch.equal(whole(x), want[-1])

    def ask(row):
        with handle.affinities(EYE[row]):
            together.wait(TIMEOUT)
            assert torch.equal(compiled(x), want[row]) and torch.equal(whole(x), want[row])
            together.wait(TIMEOUT)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, (1, 2)))

    async def task(row):
        with handle.affinities(EYE[row]):
            await asyncio.sleep(0)
            assert torch.equal(compiled(x), want[row])
            assert torch.equal(await asyncio.to_thread(compiled, x), want[row])
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(task(0), task(2))

    asyncio.run(both())

    async def refused():
        with handle.affinities(EYE[0]):
            whole(x)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot tell which of them this forward is of"):
        asyncio.run(refused())


def test_a_captured_graph_has_one_reader(glider, monkeypatch):
    """A CUDA graph reads the buffer that it was captured with; the CPU stands in for the device."""
    model, handle = glider
    state = handle._state
    with handle.affinities(EYE[0]):
        address = state.bias.data_ptr()
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            state.current().affinities.note_capture()
    with handle.affinities(EYE[1]):
        assert state.bias.data_ptr() == address

        def other():
            with handle.affinities(EYE[2]):
                pass

        with pytest.raises(RuntimeError, match="a CUDA graph was captured with the rows"):
            in_thread(other)
        with handle.affinities(EYE):  # of another shape
            assert state.bias.data_ptr() != address
    with handle.affinities(EYE[2]):
        assert state.bias.data_ptr() == address
