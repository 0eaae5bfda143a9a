"""handle.add_expert and handle.drop_expert: a patched model's experts come and go as if it were patched anew."""

from __future__ import annotations

import copy
import pickle

import builders
import patch_cases
import pytest
import torch

import moerge_ext as moerge

NAMES = ("ant", "bee", "cat", "dog")
METHODS = {
    "phatgoose": {},
    "arrow": {},
    "arrow_peft": {"aggregation": "factored"},
    "glider": {"threshold": 0.5},  # its scale depends on E
    "given": {},  # its top_k is E
    "average_activation_mttl": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    model = patch_cases.build("llama")
    where = tmp_path_factory.mktemp("changes")
    made = builders.random_experts(model, where, NAMES, patch_cases.DECODER)
    for name, folder in made.items():
        bank = moerge.load_experts({name: folder})
        gates = {path: gate + 0.1 for path, gate in bank.get_gates(name).items()}
        bank.save_gates(kind="average-activation", gates={name: gates})
    return made


def patched(folders, names, method="phatgoose", model=None, **options):
    bank = moerge.load_experts({name: folders[name] for name in names})
    return moerge.patch(patch_cases.build("llama") if model is None else model, bank, method, **options)


def outputs(handle, seed=0):
    """Of a forward, with affinities where the method takes them."""
    ids = patch_cases.tokens(seed=seed)
    if handle.method.bias is None:
        return patch_cases.logits(handle.model, input_ids=ids)
    affinity = {"ant": 0.9, "bee": -0.2, "cat": 0.6, "dog": 0.7, "eel": 0.1}
    with handle.affinities(torch.tensor([affinity[name] for name in handle.names])):
        return patch_cases.logits(handle.model, input_ids=ids)


def addresses(handle):
    return {
        (name, key): tensor.data_ptr()
        for name in handle.modules
        for key, tensor in handle.model.get_submodule(name).named_buffers()
    }


def contents(handle):
    buffers = dict(handle.model.named_buffers())
    return handle.names, handle._slots.free, {name: tensor.clone() for name, tensor in buffers.items()}


def same_contents(before, after):
    return before[:2] == after[:2] and all(torch.equal(before[2][key], after[2][key]) for key in before[2])


@pytest.mark.filterwarnings("ignore:patch. method")
@pytest.mark.parametrize("method", METHODS)
def test_as_patched_anew(folders, method):
    handle = patched(folders, ("ant", "bee"), method, spare=2, **METHODS[method])
    where = addresses(handle)
    for change, names in (
        (lambda: handle.add_expert(folders["cat"]), ("ant", "bee", "cat")),
        (lambda: handle.add_expert(moerge.load_experts([folders["dog"]])), NAMES),
        (lambda: handle.drop_expert("ant"), ("bee", "cat", "dog")),
        (lambda: handle.add_expert(folders["ant"]), ("bee", "cat", "dog", "ant")),
        (lambda: handle.drop_expert("ant"), ("bee", "cat", "dog")),
        (lambda: handle.drop_expert("dog"), ("bee", "cat")),
    ):
        change()
        anew = patched(folders, names, method, **METHODS[method])
        assert handle.names == names and torch.equal(outputs(handle), outputs(anew))
        assert handle.model.get_submodule(handle.modules[0]).route_options == (
            anew.model.get_submodule(anew.modules[0]).route_options
        )
    assert addresses(handle) == where


def test_spare_slots_change_nothing(folders):
    assert torch.equal(outputs(patched(folders, NAMES, spare=3)), outputs(patched(folders, NAMES)))


def test_records_and_explains(folders):
    handle = patched(folders, NAMES[:2], spare=2)
    handle.add_expert(folders["cat"], name="eel")
    with handle.record(tokens=True) as trace:
        outputs(handle)
    assert trace.names == handle.names == ("ant", "bee", "eel")
    assert trace.share().shape == (3,) and float(trace.share()[2]) > 0
    assert all(int(experts.max()) < 3 for calls in trace.calls.values() for _, experts in calls)
    assert "3 experts (and 1 spare slots)" in str(handle.explain()) and "3 experts" in repr(handle)


def test_a_token_of_nan_reaches_no_spare_slot(folders):
    handle = patched(folders, NAMES[:2], spare=2)
    name = handle.modules[0]
    layer = handle.model.get_submodule(name)
    with handle.record(tokens=True) as trace, torch.no_grad():
        layer(torch.full((1, 3, layer.in_features), torch.nan))
    assert int(trace.calls[name][0][1].max()) < 2


def test_refusals_leave_everything_as_it_was(folders, tmp_path):
    model = patch_cases.build("llama")
    wide = builders.random_experts(model, tmp_path / "wide", ("wide",), patch_cases.DECODER, rank=8)["wide"]
    bare = builders.random_experts(model, tmp_path / "bare", ("bare",), patch_cases.DECODER, gates=False)["bare"]
    head = builders.random_experts(model, tmp_path / "head", ("head",), ("lm_head",))["head"]
    other = patch_cases.build("gpt2")
    gpt = builders.random_experts(other, tmp_path / "gpt", ("gpt",), ("c_attn",))["gpt"]
    path = next(iter(builders.linear_sizes(model, ("q_proj",))))[0]
    parts = (torch.ones(4, 32), torch.ones(32, 4), torch.ones(32))
    biased = builders.write_adapter(tmp_path / "biased", {path: parts}, lora_bias=True)
    handle = patched(folders, ("ant", "bee"), spare=1)
    before = contents(handle)
    for given, said in (
        (wide, "rank 8, the layer has room for rank 4"),
        (bare, "expected a gate of kind 'sigmoid-gate'"),
        (head, "'lm_head'.*no expert had them when the model was patched"),
        (gpt, "are not in LlamaForCausalLM"),
        (biased, "gate|output bias"),
        (folders["ant"], "there is an expert 'ant' already"),
        (tmp_path / "nowhere", "nowhere"),
        (moerge.load_experts([folders["cat"], folders["dog"]]), "takes one expert, got a bank of 2"),
        (7, "got int"),
    ):
        with pytest.raises(ValueError, match=said):
            handle.add_expert(given)
        assert same_contents(before, contents(handle))
    handle.add_expert(folders["cat"])
    before = contents(handle)
    with pytest.raises(ValueError, match="all slots are taken, by ant, bee, cat"):
        handle.add_expert(folders["dog"])
    with pytest.raises(ValueError, match="no expert 'dog'; there are ant, bee, cat"):
        handle.drop_expert("dog")
    with handle.record(), pytest.raises(RuntimeError, match="a block of this handle is open"):
        handle.drop_expert("cat")
    assert same_contents(before, contents(handle))


def test_what_must_stay(folders):
    with pytest.raises(ValueError, match="top_k=2 is more than the 1 expert"):
        patched(folders, NAMES[:2], spare=1, top_k=2).drop_expert("ant")
    handle = patched(folders, NAMES[:2], spare=1)
    handle.drop_expert("ant")  # the method's own top_k follows
    with pytest.raises(ValueError, match="'bee' is the last expert"):
        handle.drop_expert("bee")
    handle.remove()
    with pytest.raises(ValueError, match="this handle was removed"):
        handle.add_expert(folders["cat"])


def test_layers_that_were_taken_out_since(folders):
    handle = patched(folders, NAMES[:2], spare=1)
    owner, _, name = handle.modules[-1].rpartition(".")
    layer = getattr(handle.model.get_submodule(owner), name)
    before = contents(handle)
    setattr(handle.model.get_submodule(owner), name, layer.base_layer)
    for change in (lambda: handle.add_expert(folders["cat"]), lambda: handle.drop_expert("ant")):
        with pytest.raises(RuntimeError, match=rf"_expert: {handle.modules[-1]} was replaced since .*got Linear"):
            change()
    setattr(handle.model.get_submodule(owner), name, layer)
    assert same_contents(before, contents(handle))
    handle.add_expert(folders["cat"])


def test_who_has_no_slots(folders):
    with pytest.raises(ValueError, match=r"patch\(..., spare=4\)"):
        patched(folders, NAMES[:2]).add_expert(folders["cat"])
    for spare, method, said in (
        (2, "merged", "routes nothing"),
        (-1, "arrow", "0 or more"),
        (True, "arrow", "got True"),
    ):
        with pytest.raises(ValueError, match=said):
            patched(folders, NAMES[:2], method, spare=spare)


def test_an_expert_without_some_modules(folders, tmp_path):
    model = patch_cases.build("llama")
    part = builders.random_experts(model, tmp_path, ("part",), ("q_proj", "v_proj"), rank=2)["part"]
    for absent in ("mask", "base"):
        handle = patched(folders, NAMES[:2], spare=1, absent=absent)
        handle.add_expert(part)
        anew = patched(folders | {"part": part}, (*NAMES[:2], "part"), absent=absent)
        assert torch.equal(outputs(handle), outputs(anew))


def test_copies_and_other_types(folders):
    handle = patched(folders, NAMES[:2], spare=1, model=patch_cases.build("llama").bfloat16())
    handle.model.bfloat16()  # the experts' factors too
    twin = moerge.get_handle(copy.deepcopy(handle.model))
    read = moerge.get_handle(pickle.loads(pickle.dumps(handle.model)))
    before = outputs(handle)
    for one in (twin, read):
        one.add_expert(folders["cat"])
        assert one.names == NAMES[:3] and handle.names == NAMES[:2] and handle._slots.free == 1
    assert torch.equal(outputs(handle), before) and torch.equal(outputs(twin), outputs(read))
    assert not torch.equal(outputs(twin), before)


def test_added_in_inference_mode_and_removed(folders):
    model = patch_cases.build("llama")
    before = patch_cases.snapshot(model)
    with torch.inference_mode():
        handle = patched(folders, NAMES[:2], spare=1, model=model)
        handle.add_expert(folders["cat"])
    handle.drop_expert("bee")
    handle.remove()
    assert patch_cases.same(before, patch_cases.snapshot(model))


def test_what_cannot_be_added_alone_has_no_spare_slots(folders):
    """Its plan of an expert depends on the others: adding one would give another model than patching anew."""
    with pytest.raises(ValueError, match="spare=1: method 'twin_merging' makes of every expert what depends on"):
        patched(folders, NAMES[:2], "twin_merging", spare=1)
