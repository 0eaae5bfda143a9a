"""(IA)3 experts beside LoRA: against PEFT where one is alone, against the equation where several are routed."""

import copy

import builders
import pytest
import torch
from patch_cases import batch, error, logits, tokens
from torch.nn.functional import layer_norm

import moerge_ext as moerge

NAMES = ("first", "second", "lora")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two (IA)3 experts and a LoRA on some of their layers and on others."""
    root, model = tmp_path_factory.mktemp("mixed"), builders.tiny_llama()
    made = {name: builders.ia3_expert(model, root / name, seed) for seed, name in enumerate(NAMES[:2])}
    return made | builders.random_experts(model, root, ("lora",), ("v_proj", "down_proj", "q_proj"))


@pytest.fixture
def mixed(folders):
    model = builders.tiny_llama()
    return model, moerge.load_experts(folders, base=model)


def of_peft(folder, model=None):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(builders.tiny_llama() if model is None else model, folder).eval()


def test_one_expert_is_what_peft_computes(folders, mixed):
    model, bank = mixed
    want = {name: logits(of_peft(folder), input_ids=tokens()) for name, folder in folders.items()}
    for name in NAMES:
        with moerge.patch(model, bank, f"expert:{name}"):
            assert error(logits(model, input_ids=tokens()), want[name]) < 1e-6
    rows = torch.eye(3)[[1, 2]]
    with moerge.patch(model, bank, "given", top_k=1) as handle, handle.affinities(rows):
        got = logits(model, input_ids=tokens())
    assert error(got[0], want["second"][0]) < 1e-6 and error(got[1], want["lora"][1]) < 1e-6


def test_conv1d_and_an_encoder_decoder_as_peft(tmp_path):
    peft = pytest.importorskip("peft")
    for build, targets, inputs in (
        (builders.tiny_gpt2, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        (builders.tiny_t5, ["k", "v", "wo"], ["wo"]),
        (builders.tiny_bert, ["key", "output.dense"], ["output.dense"]),
    ):
        config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs)
        adapted = peft.get_peft_model(build(), config)
        torch.manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.data.add_(0.5 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / build.__name__)
        model = build()
        inputs = batch(build.__name__.removeprefix("tiny_"))
        bank = moerge.load_experts(tmp_path / build.__name__, base=model)
        with moerge.patch(model, bank, f"expert:{bank.names[0]}"):
            assert error(logits(model, **inputs), logits(adapted.eval(), **inputs)) < 1e-6


def expected(layer, module, u, weights, experts):
    """y of one layer by the equation, token by token and expert by expert, in float64."""
    weight, bias = layer.weight.double(), 0.0 if layer.bias is None else layer.bias.double()
    out = torch.empty(len(u), weight.shape[0], dtype=torch.float64)
    for t, (token, w, ids) in enumerate(zip(u.double(), weights.double(), experts.tolist(), strict=True)):
        base = weight @ token + bias
        y = base.clone()
        for share, e in zip(w, ids, strict=True):
            alone = base
            for kind, branch in module.branches.items():
                if branch.present[e]:
                    scale = branch.tensors["scale"][e].double()
                    alone = scale * base if kind == "scale_out" else weight @ (scale * token) + bias
            if module.ranks[e]:
                alone = base + module.lora_B[e].double() @ (module.lora_A[e].double() @ token)
            y += share * (alone - base)
        out[t] = y
    return out


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "weighting": "softmax_all", "top_p": 0.7}, {"top_k": 1}])
def test_experts_of_two_kinds_share_one_softmax(mixed, options):
    model, bank = mixed
    for path in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        module, layer = bank.modules[path], copy.deepcopy(model.get_submodule(path))
        u = torch.randn(2, 9, module.in_features, generator=torch.Generator().manual_seed(5))
        handle = moerge.patch(model, bank, "phatgoose", **options)
        with handle.record(tokens=True) as trace:
            y = model.get_submodule(path)(u)
        handle.remove()
        ((weights, experts),) = trace.calls[path]
        gates = layer_norm(module.gates["sigmoid-gate"], [module.in_features])
        scores = layer_norm(u.flatten(0, 1), [module.in_features]) @ gates.T / module.in_features**0.5
        scores[:, ~module.present] = -torch.inf
        top = scores.topk(min(options.get("top_k", 2), int(module.present.sum())))
        if not options.get("top_p"):
            got = weights[:, : top.values.shape[1]]
            assert torch.allclose(got, top.values.softmax(-1), atol=1e-5)
            assert torch.equal(experts[:, : top.values.shape[1]].long(), top.indices)
        assert error(y.flatten(0, 1), expected(layer, module, u.flatten(0, 1), weights, experts)) < 1e-5


@torch.no_grad()
def test_vectors_on_both_sides_of_one_layer(tmp_path):
    model = builders.tiny_llama()
    folders = {
        "input": builders.ia3_expert(model, tmp_path / "input", 1, outputs=(), inputs=("down_proj",)),
        "output": builders.ia3_expert(model, tmp_path / "output", 2, outputs=("down_proj",), inputs=()),
    }
    bank = moerge.load_experts(folders, base=model)
    path = "model.layers.1.mlp.down_proj"
    layer, u = copy.deepcopy(model.get_submodule(path)), torch.randn(4, 48)
    with moerge.patch(model, bank, "given") as handle, handle.affinities([0.3, 0.6]):
        y = model.get_submodule(path)(u)
    want = expected(layer, bank.modules[path], u, torch.tensor([[0.3, 0.6]] * 4), torch.tensor([[0, 1]] * 4))
    assert error(y, want) < 1e-6


def test_remove_gradients_types_and_generate(mixed):
    model, bank = mixed
    before = logits(model, input_ids=tokens())
    handle = moerge.patch(model, bank, "phatgoose")
    routed = logits(model, input_ids=tokens())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    text = model.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 8) and "no LoRA" in str(handle.explain())
    with handle.disabled():
        assert torch.equal(logits(model, input_ids=tokens()), before)
    saved = copy.deepcopy(model)
    assert torch.equal(logits(saved, input_ids=tokens()), routed)
    assert not any("branch" in key for key in model.state_dict())
    model.to(torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert all(t.dtype == torch.float32 for name, t in buffers.items() if "branch_scale" in name)
    assert error(logits(model, input_ids=tokens()).float(), routed) < 0.1
    model.float()
    handle.remove()
    assert not torch.equal(routed, before)


def test_compiled(mixed):
    model, bank = mixed
    with moerge.patch(model, bank, "phatgoose"):
        want = logits(model, input_ids=tokens())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(logits(compiled, input_ids=tokens()), want) < 1e-5


def test_methods_of_lora_alone_say_so(mixed):
    model, bank = mixed
    for method in ("arrow", "arrow_peft", "merged", "merged_factors"):
        for call in (moerge.patch, moerge.routing.patch.check_patch):
            with pytest.raises(ValueError, match=r"\(IA\)3 experts among them, and method '" + method):
                call(model, bank, method)


def test_a_merge_refuses_them(mixed, tmp_path):
    with pytest.raises(ValueError, match=r"'first' \(\(IA\)3\), 'second' \(\(IA\)3\) are no LoRA"):
        moerge.merge_experts(mixed[1], tmp_path / "merged")
