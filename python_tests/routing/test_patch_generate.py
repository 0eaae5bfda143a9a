"""generate() and torch.compile on patched models: every decoding mode gives what the plain torch backend gives."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from patch_cases import CAUSAL, batch, error, logits, tokens

import moerge_ext as moerge

DECODING = {
    "greedy": {},
    "no_cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}
EVERY_DECODING = [(family, decoding) for family in ("llama", "t5") for decoding in DECODING]
OTHERS = [(family, decoding) for family in CAUSAL[1:] for decoding in ("greedy", "beam_sampling")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost time on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """family -> (model, experts), made once."""
    made = {}

    def get(family):
        if family not in made:
            model = cases.build(family)
            made[family] = model, cases.bank(family, model, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@torch.no_grad()
def generate(model, inputs, **options):
    torch.manual_seed(0)
    kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return model.generate(**kept, **LENGTH | options)


@pytest.mark.parametrize("family, decoding", EVERY_DECODING + OTHERS)
def test_same_tokens_as_the_reference_backend(setup, family, decoding):
    model, experts = setup(family)
    inputs, options = batch(family), DECODING[decoding]
    plain = generate(model, inputs, **options)
    with moerge.patch(model, experts):
        native = generate(model, inputs, **options)
    with moerge.patch(model, experts, backend="reference"):
        reference = generate(model, inputs, **options)
    assert torch.equal(native, reference) and not torch.equal(native, plain)


@pytest.mark.parametrize("family", ["mistral", "gpt2", "t5"])
def test_cache_or_not_is_the_same(setup, family):
    model, experts = setup(family)
    with moerge.patch(model, experts):
        outputs = [
            generate(model, batch(family), **DECODING[decoding]) for decoding in ("greedy", "no_cache", "static")
        ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("family", CAUSAL)
def test_left_padded_batch_equals_single_rows(setup, family):
    model, experts = setup(family)
    rows = [tokens(1, length, seed=length) for length in (3, 7, 5)]
    ids = torch.cat([torch.nn.functional.pad(row, (7 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (7 - row.shape[1], 0)) for row in rows])
    options = {"output_logits": True, "return_dict_in_generate": True}
    with moerge.patch(model, experts):
        together = generate(model, {"input_ids": ids, "attention_mask": mask}, **options)
        for i, row in enumerate(rows):
            alone = generate(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}, **options)
            assert torch.equal(together.sequences[i, 7:], alone.sequences[0, row.shape[1] :])
            for got, want in zip(together.logits, alone.logits, strict=True):
                assert error(got[i], want[0]) < 1e-4


def test_cross_attention_routes_the_encoders_tokens(setup):
    model, experts = setup("t5")
    with moerge.patch(model, experts) as handle, handle.record(tokens=True) as trace:
        logits(model, **batch("t5", rows=2, length=7))
        for module, counts in trace.counts().items():
            decoder = module.startswith("decoder") and not module.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            assert counts.sum() == 2 * 2 * (5 if decoder else 7), module
    with moerge.patch(model, experts) as handle, handle.record() as trace:
        generate(model, batch("t5"))
    counts = {module: count.sum().item() for module, count in trace.counts().items()}
    assert counts["decoder.block.0.layer.1.EncDecAttention.k"] == 2 * 14  # once, then cached
    assert counts["decoder.block.0.layer.1.EncDecAttention.q"] == 2 * 2 * 6


def test_record_counts_the_tokens_of_generate(setup):
    model, experts = setup("llama")
    with moerge.patch(model, experts) as handle, handle.record() as trace:
        generate(model, batch("llama"))
    assert all(count.sum() == 2 * 2 * (7 + 5) for count in trace.counts().values())


# ---- one row of affinities per sequence ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, decoding",
    [("llama", "no_cache"), ("llama", "beams"), ("llama", "static"), ("gpt2", "greedy"), ("t5", "beams")],
)
def test_each_sequence_has_its_own_affinities(setup, family, decoding):
    """Rows with gamma 100 and one sure expert are forced to it: each sequence decodes as under that expert alone."""
    model, experts = setup(family)
    options = DECODING[decoding]
    inputs = batch(family, rows=3)
    rows = torch.eye(3)[[2, 0, 1]]
    with moerge.patch(model, experts, method="glider", top_k=1) as handle, handle.affinities(rows):
        got = generate(model, inputs, **options)
    for i, name in enumerate(("cat", "ant", "bee")):
        with moerge.patch(model, experts, method=f"expert:{name}"):
            alone = generate(model, {key: value[i : i + 1] for key, value in inputs.items()}, **options)
        assert torch.equal(got[i], alone[0])


def test_one_row_serves_all_and_contexts_nest(setup):
    model, experts = setup("llama")
    inputs = batch("llama")
    first, second = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0])
    with moerge.patch(model, experts, method="glider") as handle:
        with handle.affinities(first):
            outer = logits(model, **inputs)
            with handle.affinities(second):
                inner = logits(model, **inputs)
            assert torch.equal(logits(model, **inputs), outer)
            with handle.affinities(torch.stack([second, second])):
                assert torch.equal(logits(model, **inputs), inner)
            assert torch.equal(logits(model, **inputs), outer)
            with pytest.raises(KeyError), handle.affinities(second):
                raise KeyError
            assert torch.equal(logits(model, **inputs), outer)
        assert error(outer, inner) > 0.01
        with pytest.raises(RuntimeError, match="affinit"):
            logits(model, **inputs)
    with moerge.patch(model, experts, method="glider", backend="reference") as handle, handle.affinities(first):
        assert error(outer, logits(model, **inputs)) < 1e-5


def test_affinities_in_and_out_of_inference_mode(setup):
    model, experts = setup("llama")
    with moerge.patch(model, experts, method="glider_code") as handle:
        with torch.inference_mode(), handle.affinities(torch.tensor([1.0, 0, 0])):
            first = model(**batch("llama")).logits.clone()
        with handle.affinities(torch.tensor([0, 1.0, 0], requires_grad=True)):
            second = model(**batch("llama")).logits
        with torch.inference_mode(), handle.affinities(torch.tensor([1.0, 0, 0])):
            assert torch.equal(model(**batch("llama")).logits, first)
    assert error(second.detach(), first) > 0.01


def test_affinities_by_name(setup):
    model, experts = setup("llama")
    with moerge.patch(model, experts, method="given") as handle:
        with handle.affinities([0.0, 0.5, 2.0]):
            want = model(**batch("llama")).logits
        with handle.affinities({"cat": 2, "bee": 0.5}):
            assert torch.equal(model(**batch("llama")).logits, want)


def test_affinities_are_written_in_place(setup):
    """A captured graph reads the buffer that it was captured with."""
    model, experts = setup("llama")
    with moerge.patch(model, experts, method="glider") as handle:
        addresses = set()
        for row in torch.eye(3):
            with handle.affinities(row):
                addresses.add(handle._state.bias.data_ptr())
    assert len(addresses) == 1


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """(model, experts) with one layer: tracing takes seconds a layer."""
    model = cases.build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model, cases.bank("llama", model, tmp_path_factory.mktemp("shallow"))


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["phatgoose", "merged"])
def test_compile_fullgraph(shallow, dynamo, method):
    model, experts = shallow
    with moerge.patch(model, experts, method=method):
        want = logits(model, **batch("llama"))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(logits(compiled, **batch("llama")), want) < 1e-5


def test_compile_with_affinities_and_record(shallow, dynamo):
    model, experts = shallow
    inputs = batch("llama")
    with moerge.patch(model, experts, method="glider") as handle:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for row in torch.eye(3):
            with handle.affinities(row):
                assert error(logits(compiled, **inputs), logits(model, **inputs)) < 1e-5
        with handle.affinities(row):
            with handle.record() as plain:
                logits(model, **inputs)
            with handle.record() as twice:
                logits(compiled, **inputs)
                logits(compiled, **inputs)
    for module, load in plain.load().items():
        assert torch.equal(twice.load()[module], 2 * load)


def test_static_cache_with_the_librarys_own_compile(shallow, dynamo):
    from transformers import CompileConfig

    model, experts = shallow
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    with moerge.patch(model, experts):
        want = generate(model, batch("llama"))
        got = generate(model, batch("llama"), cache_implementation="static", compile_config=config)
        assert model._compiled_call is not None
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_inductor(setup, dynamo, family):
    from transformers import CompileConfig

    model, experts = setup(family)
    config = CompileConfig(fullgraph=True, mode=None)
    config._compile_all_devices = True
    with moerge.patch(model, experts):
        compiled = torch.compile(model, fullgraph=True)
        assert error(logits(compiled, **batch(family)), logits(model, **batch(family))) < 1e-4
        want = generate(model, batch(family))
        got = generate(model, batch(family), cache_implementation="static", compile_config=config)
    assert torch.equal(got, want)
