"""patch, the handle and the routed layers on tiny models: what the forward computes, what remove() brings back, and
every refusal."""

from __future__ import annotations

import copy
import io
import pickle

import builders
import patch_cases as cases
import pytest
import torch
from patch_cases import FAMILIES, NAMES, batch, error, logits, same, snapshot
from torch import nn

import moerge_ext as moerge
from moerge_ext.routing.layers import linear_features

METHODS = ["phatgoose", "arrow", "arrow_mttl", "merged", "merged_factors", "expert:bee"]
UP = "model.layers.0.mlp.up_proj"


def top_k(method):
    return {"top_k": 2} if method.startswith("arrow") else {}


@pytest.fixture
def llama():
    return cases.build("llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return cases.bank("llama", cases.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_native_equals_reference_and_remove_restores(family, tmp_path):
    model = cases.build(family)
    experts = cases.bank(family, model, tmp_path)
    inputs = batch(family)
    plain, before = logits(model, **inputs), snapshot(model)
    for method in METHODS:
        got = {}
        for backend in ("native", "reference"):
            handle = moerge.patch(model, experts, method=method, backend=backend, **top_k(method))
            assert handle.modules == tuple(experts.modules) and moerge.get_handle(model) is handle
            got[backend] = logits(model, **inputs)
            handle.remove()
            handle.remove()
        assert error(got["native"], got["reference"]) < 1e-5, method
        assert error(got["native"], plain) > 0.05, method
    assert same(before, snapshot(model))
    assert torch.equal(logits(model, **inputs), plain)
    with pytest.raises(ValueError, match="not patched"):
        moerge.get_handle(model)


def test_one_layer_is_the_equation(experts):
    """PHATGOOSE by hand, token by token, in float64."""
    base = nn.Linear(32, 48, bias=True)
    holder = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict()])})})
    holder["model"]["layers"][0]["mlp"] = nn.ModuleDict({"up_proj": base})
    one = moerge.ExpertBank(experts.names, {UP: experts.modules[UP]})
    moerge.patch(holder, one)
    x = torch.randn(2, 5, 32)
    got = holder.get_submodule(UP)(x)
    parts = experts.modules[UP]
    for row, token in enumerate(x.reshape(-1, 32).double()):
        gates = parts.gates["sigmoid-gate"].double()
        score = torch.nn.functional.layer_norm(gates, (32,)) @ torch.nn.functional.layer_norm(token, (32,)) / 32**0.5
        best = score.topk(2)
        want = base(token.float()).double()
        for weight, e in zip(best.values.softmax(0), best.indices, strict=True):
            want = want + weight * (parts.lora_B[e].double() @ (parts.lora_A[e].double() @ token))
        assert error(got.reshape(-1, 48)[row], want) < 1e-5


def test_training_flags_and_hooks_come_back(llama, experts):
    llama.train()
    llama.model.layers[1].eval()
    layer = llama.get_submodule(UP)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    before = snapshot(llama)
    with moerge.patch(llama, experts):
        assert [m.training for m in llama.model.layers] == [True, False]
        assert not llama.model.layers[1].mlp.up_proj.training
        logits(llama, **batch("llama"))
    assert same(before, snapshot(llama)) and len(seen) == 1
    handle = moerge.patch(llama, experts)
    llama.eval()
    handle.remove()
    assert not any(module.training for module in llama.modules())


def test_remove_when_a_layer_was_replaced_since(llama, experts):
    handle = moerge.patch(llama, experts)
    routed = llama.model.layers[0].mlp.up_proj
    llama.model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    with pytest.raises(RuntimeError, match="up_proj was replaced since"):
        handle.remove()
    llama.model.layers[0].mlp.up_proj = routed
    handle.remove()
    assert not any(isinstance(m, moerge.RoutedLinear) for m in llama.modules())


def test_remove_when_layers_were_taken_out_doubled_or_exchanged_since(llama, experts):
    plain, handle, layers = logits(llama, **batch("llama")), moerge.patch(llama, experts), llama.model.layers
    first, second = layers
    for changed, got in (([first], "no module"), ([first, first], "RoutedLinear")):
        llama.model.layers = nn.ModuleList(changed)
        with pytest.raises(RuntimeError, match=rf"layers\.1.* was replaced since \(expected its own .*, got {got}\)"):
            handle.remove()
        assert isinstance(first.mlp.up_proj, moerge.RoutedLinear)
        with pytest.raises(RuntimeError, match=rf"^cannot explain the layers: .*layers\.1.*got {got}"):
            handle.explain()
    llama.model.layers = nn.ModuleList([second, first])
    handle.remove()
    llama.model.layers = layers
    assert torch.equal(logits(llama, **batch("llama")), plain)


def test_routed_linear_looks_like_its_base(llama, experts):
    base = llama.get_submodule(UP)
    moerge.patch(llama, experts)
    routed = llama.get_submodule(UP)
    assert routed.base_layer is base and routed.weight is base.weight and routed.bias is None
    assert (routed.in_features, routed.out_features) == (32, 48)
    assert "experts=3" in repr(routed)
    new = nn.Parameter(torch.zeros_like(base.weight))
    routed.weight = new
    assert base.weight is new and routed._parameters is base._parameters


@pytest.mark.parametrize("layer, features", [(nn.Linear(3, 5), (3, 5)), (nn.Embedding(3, 5), None)])
def test_linear_features(layer, features):
    assert linear_features(layer) == features


# ---- state dicts, copies, dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_state_dict_save_and_load(family, tmp_path):
    model = cases.build(family)
    experts = cases.bank(family, model, tmp_path / "experts")
    plain, state = logits(model, **batch(family)), copy.deepcopy(model.state_dict())
    moerge.patch(model, experts)
    patched = model.state_dict()
    assert list(patched) == list(state)
    assert all(torch.equal(patched[key], state[key]) for key in state)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, **batch(family)), plain)
    other = {key: value + 1 for key, value in state.items()}
    given = dict(other)
    result = model.load_state_dict(other)
    assert not result.missing_keys and not result.unexpected_keys and list(other) == list(given)
    moerge.get_handle(model).remove()
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_tied_head_can_be_routed(tmp_path):
    model = cases.build("gpt2")
    experts = moerge.load_experts(builders.random_experts(model, tmp_path, NAMES, ("lm_head",)))
    before = snapshot(model)
    with moerge.patch(model, experts):
        model.tie_weights()
        assert model.lm_head.base_layer.weight is model.transformer.wte.weight
        model.save_pretrained(tmp_path / "saved")
    assert same(before, snapshot(model))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, **batch("gpt2")), logits(model, **batch("gpt2")))


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["phatgoose", "arrow", "glider", "expert:ant"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_have_their_own_handle(llama, experts, method, duplicate):
    handle = moerge.patch(llama, experts, method=method, **top_k(method))
    twin = duplicate(llama)
    other = moerge.get_handle(twin)
    assert other is not handle and other.model is twin and other.modules == handle.modules
    if method != "glider":
        assert torch.equal(logits(twin, **batch("llama")), logits(llama, **batch("llama")))
    else:
        with other.affinities(torch.eye(3)[:2]):
            logits(twin, **batch("llama"))
            with pytest.raises(RuntimeError, match="affinit"):
                logits(llama, **batch("llama"))
    other.remove()
    assert isinstance(llama.get_submodule(UP), moerge.RoutedLinear)
    assert not isinstance(twin.get_submodule(UP), moerge.RoutedLinear)


@pytest.mark.parametrize(
    "move, dtype",
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16).float(), torch.float32),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
    ],
)
@pytest.mark.parametrize("method", ["phatgoose", "merged"])
def test_the_bank_follows_the_model(llama, experts, move, dtype, method):
    moerge.patch(llama, experts, method=method)
    gates = None if method == "merged" else llama.get_submodule(UP).gates.clone()
    move(llama)
    routed = llama.get_submodule(UP)
    assert routed.lora_A.dtype == routed.lora_B.dtype == routed.weight.dtype == dtype
    assert routed.lora_B.transpose(1, 2).is_contiguous()
    if method == "merged":
        assert routed.weights.dtype == torch.float32 and routed.experts.dtype == torch.int32
    else:
        assert routed.gates.dtype == torch.float32 and torch.equal(routed.gates, gates)
    assert experts.modules[UP].dtype == torch.float32, "the caller's bank changed"
    assert logits(llama, **batch("llama")).isfinite().all()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_base_and_bank_are_independent(llama, experts, base, stored):
    llama.to(base)
    moerge.patch(llama, experts.to(dtype=stored))
    assert llama.get_submodule(UP).lora_A.dtype == stored
    out = logits(llama, **batch("llama"))
    assert out.dtype == base and out.isfinite().all()


def test_autocast(llama, experts):
    inputs = batch("llama")
    with moerge.patch(llama, experts), torch.autocast("cpu", torch.bfloat16):
        native = logits(llama, **inputs)
    with moerge.patch(llama, experts, backend="reference"), torch.autocast("cpu", torch.bfloat16):
        reference = logits(llama, **inputs)
    assert native.dtype == torch.bfloat16 and error(native, reference) < 0.02


def test_later_gates_do_not_reach_a_patched_model(tmp_path):
    model, kind = cases.build("llama"), "average-activation"
    experts = cases.bank("llama", model, tmp_path, gates=kind)
    with moerge.patch(model, experts, method="average_activation_mttl"):
        before = logits(model, **batch("llama"))
        experts.set_gates("ant", {UP: torch.full((32,), 50.0)}, kind=kind)
        assert torch.equal(logits(model, **batch("llama")), before)


# ---- experts that lack modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["phatgoose", "arrow"])
def test_an_expert_is_never_selected_where_it_is_missing(llama, tmp_path, method):
    folders = builders.random_experts(llama, tmp_path, NAMES[:2], ("q_proj", "v_proj"))
    folders |= builders.random_experts(llama, tmp_path, ["cat"], ("q_proj",), seed=5)
    experts = moerge.load_experts(folders)
    with moerge.patch(llama, experts, method=method, top_k=3) as handle, handle.record() as trace:
        logits(llama, **batch("llama"))
    for module, counts in trace.counts().items():
        assert counts.tolist() == ([14, 14, 14] if "q_proj" in module else [14, 14, 0])
    plain = logits(llama, **batch("llama"))
    alone = moerge.load_experts({"cat": folders["cat"], "ant": folders["ant"]})
    with moerge.patch(llama, alone, method="expert:cat"):
        missing = llama.model.layers[0].self_attn.v_proj
        x = torch.randn(3, 32)
        assert torch.equal(missing(x), missing.base_layer(x))
        assert error(logits(llama, **batch("llama")), plain) > 0.01


# ---- offload ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu_offload", "disk", "dispatch"])
def test_accelerate_first_then_patch(llama, experts, tmp_path, where):
    accelerate = pytest.importorskip("accelerate")
    with moerge.patch(llama, experts):
        want = logits(llama, **batch("llama"))
    plain = logits(llama, **batch("llama"))
    if where == "cpu_offload":
        accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    elif where == "disk":
        accelerate.disk_offload(llama, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(llama, {"": "cpu"}, force_hooks=True)
    with moerge.patch(llama, experts):
        if where != "dispatch":
            assert llama.get_submodule(UP).weight.device.type == "meta"
        assert llama.get_submodule(UP).lora_A.device.type == "cpu"
        assert torch.equal(logits(llama, **batch("llama")), want)
    assert torch.equal(logits(llama, **batch("llama")), plain)


# ---- record ----------------------------------------------------------------------------------------------------------


def test_record_counts_every_token_once(llama, experts):
    with moerge.patch(llama, experts) as handle:
        logits(llama, **batch("llama"))
        with handle.record(tokens=True) as trace:
            logits(llama, **batch("llama", rows=3, length=4))
            with torch.inference_mode():
                llama(**batch("llama"))
            logits(llama, **batch("llama"))
        logits(llama, **batch("llama"))
    total = 12 + 14 + 14
    assert set(trace.load()) == set(experts.modules) == set(trace.counts())
    for module, load in trace.load().items():
        assert load.sum().item() == pytest.approx(total, rel=1e-5)
        assert trace.counts()[module].sum() == 2 * total
        weights, ids = (torch.cat(parts) for parts in zip(*trace.calls[module], strict=True))
        assert weights.shape == ids.shape == (total, 2)
        dense = torch.zeros(total, 3).scatter_add(1, ids.long(), weights).double()
        assert torch.allclose(dense.sum(0), load, atol=1e-4)
    assert trace.share().sum().item() == pytest.approx(1) and "14 modules" in repr(trace)


def test_record_refuses_nesting_and_unrouted_methods(llama, experts):
    with moerge.patch(llama, experts) as handle:
        with handle.record() as outer:
            with pytest.raises(ValueError, match="already active"), handle.record():
                pass
            logits(llama, **batch("llama"))
        assert outer.share().sum() > 0
        with pytest.raises(KeyError), handle.record():
            raise KeyError
        with handle.record() as empty:
            pass
        assert empty.load() == {} and empty.share().tolist() == [0, 0, 0]
    handle = moerge.patch(llama, experts, method="merged")
    with pytest.raises(ValueError, match="'merged' routes nothing"), handle.record():
        pass
