"""LoRA on the experts of mixture-of-experts models, against what the adapters' tensors mean and against PEFT."""

import copy
import json
import pickle
import shutil

import moe_cases as cases
import patch_cases
import pytest
import torch
import transformers
from moe_cases import D, I, N
from patch_cases import error, logits
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.ops import reference
from moerge_ext.routing import fused_experts

# transformers 4 had gpt-oss fused as well
APART = [(name, "apart") for name in cases.MODELS if name != "gpt_oss"]
WHOLE = [(name, "whole") for name in cases.MODELS]
# PEFT converts these; with rslora its scaling of gate_up_proj is not the file's
CONVERTED = [("mixtral", "apart"), ("qwen3_moe", "apart")]
KERNELS = ("grouped_mm", "batched_mm", "eager")


@pytest.fixture
def qwen(tmp_path):
    """(model, bank of ant, bee and cat with gates, their deltas, their gates); ranks and layouts differ."""
    model = cases.build("qwen3_moe")
    folders, deltas, gates = {}, {}, {}
    for seed, (name, layout) in enumerate((("ant", "apart"), ("bee", "whole"), ("cat", "apart"))):
        folder = folders[name] = tmp_path / name
        deltas[name] = cases.adapter("qwen3_moe", model, folder, seed, layout=layout, rank=2 + seed)
        gates[name] = cases.gates(model, folder, seed)
    return model, moerge.load_experts(folders), deltas, gates


@pytest.mark.parametrize(("name", "layout"), APART + WHOLE)
@pytest.mark.parametrize("rslora", [False, True])
def test_one_expert_is_its_deltas_in_the_weights(name, layout, rslora, tmp_path):
    model = cases.build(name)
    deltas = cases.adapter(name, model, tmp_path, 1, layout=layout, linear="q_proj", use_rslora=rslora)
    ids = patch_cases.tokens()
    base, want = logits(model, input_ids=ids), logits(cases.changed(name, deltas), input_ids=ids)
    assert error(base, want) > 0.1
    bank = moerge.load_experts({"ant": tmp_path})
    for kernel in KERNELS:
        model.set_experts_implementation(kernel)
        with moerge.patch(model, bank, "expert:ant") as handle:
            assert error(logits(model, input_ids=ids), want) < 1e-5
            assert set(handle.parameters) == {path for path in deltas if "experts" in path}
            with handle.disabled():
                alone = logits(model, input_ids=ids)
        assert torch.equal(logits(model, input_ids=ids), alone)


@pytest.mark.parametrize(("name", "layout"), CONVERTED + WHOLE)
def test_one_expert_is_peft(name, layout, tmp_path):
    peft = pytest.importorskip("peft", "0.19.1")  # which first told [n,O,D] from [n,D,O]
    model = cases.build(name)
    cases.adapter(name, model, tmp_path, 1, layout=layout, linear="q_proj" if layout == "whole" else "")
    ids = patch_cases.tokens()
    theirs = peft.PeftModel.from_pretrained(cases.build(name), tmp_path)
    want = logits(theirs, input_ids=ids)
    for experts in (moerge.load_experts({"default": tmp_path}), moerge.load_experts(theirs)):
        with moerge.patch(model, experts, "expert:default"):
            assert error(logits(model, input_ids=ids), want) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_files_of_peft_before_019_have_a_and_b_exchanged(name, tmp_path):
    """They took a weight [n,O,D] for [n, in, out]; OLMoE's gate_up_proj is square, and its down_proj tells."""
    model, ids = cases.build(name), patch_cases.tokens()
    deltas = cases.adapter(name, model, tmp_path, 1, layout="whole")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        rank = a.shape[0] // N
        tensors[key] = b.unflatten(1, (rank, N)).permute(2, 1, 0).flatten(0, 1).contiguous()
        tensors[key.replace("lora_A", "lora_B")] = a.unflatten(0, (N, rank)).permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, file)
    with moerge.patch(model, moerge.load_experts({"ant": tmp_path}), "expert:ant"):
        assert error(logits(model, input_ids=ids), logits(cases.changed(name, deltas), input_ids=ids)) < 1e-5


def by_hand(module, path, state, gates, deltas, x, index, weights, *, top_k=2):
    """The experts module's output for x [T,D], token by token in float64: deltas {name: {path: [n,O,D]}}."""
    module, x = copy.deepcopy(module).double(), x.double()
    out = torch.zeros_like(x)

    def layer(parameter, j, u):
        matrix = getattr(module, parameter)[j]
        vectors = torch.stack([gates[name][f"{path}.{parameter}"] for name in gates]).double()
        vectors = (vectors - vectors.mean(1, keepdim=True)) / (vectors.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        chosen = reference.route(u[None], vectors, top_k=top_k)
        y = matrix @ u
        for weight, e in zip(*(part[0].tolist() for part in chosen), strict=True):
            y = y + weight * deltas[list(gates)[e]][f"{path}.{parameter}"][j].double() @ u
        return y

    for t in range(len(x)):
        for j, weight in zip(index[t].tolist(), weights[t].double(), strict=True):
            u = module._apply_gate(layer("gate_up_proj", j, x[t])[None])[0]
            out[t] += weight * layer("down_proj", j, u)
    return out


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tokens_are_routed_by_the_gates_of_each_parameter(qwen, backend):
    model, bank, deltas, gates = qwen
    path, module = next(iter(cases.expert_modules(model).items()))
    x, index = torch.randn(9, D), torch.stack([torch.randperm(N)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    with torch.no_grad():
        want = by_hand(module, path, None, gates, deltas, x, index, weights)
        with moerge.patch(model, bank, top_k=2, backend=backend) as handle, handle.record() as trace:
            assert error(module(x, index, weights), want) < 1e-5
            assert module(x[:0], index[:0], weights[:0]).shape == (0, D)
    assert int(trace.counts()[f"{path}.gate_up_proj"].sum()) == 9 * 2
    assert int(trace.counts()[f"{path}.down_proj"].sum()) == 9 * 2 * 2


def test_merged_is_the_mean_of_the_deltas(qwen):
    model, bank, deltas, _ = qwen
    want = cases.build("qwen3_moe")
    for added in deltas.values():
        cases.changed("qwen3_moe", added, 1 / 3, want)
    ids = patch_cases.tokens()
    with moerge.patch(model, bank, "merged"):
        assert error(logits(model, input_ids=ids), logits(want, input_ids=ids)) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_given_weights_of_each_sequence(qwen, kernel):
    """Each row of the batch mixes its own experts, at both parameters."""
    model, bank, deltas, _ = qwen
    model.set_experts_implementation(kernel)
    rows, ids = torch.tensor([[1.0, 0, 0], [0, 0.5, -0.25]]), patch_cases.tokens()
    want = []
    for row, sequence in zip(rows, ids, strict=True):
        mixed = cases.build("qwen3_moe")
        for weight, added in zip(row.tolist(), deltas.values(), strict=True):
            cases.changed("qwen3_moe", added, weight, mixed)
        want.append(logits(mixed, input_ids=sequence[None])[0])
    with moerge.patch(model, bank, "given") as handle, handle.affinities(rows):
        assert error(logits(model, input_ids=ids), torch.stack(want)) < 1e-5
        with torch.no_grad():
            generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, num_beams=2)
    assert generated.shape[0] == 2


def test_arrow_scores_a_pair_by_the_prototypes_of_its_base_expert(qwen):
    """The prototype of expert e in base expert j is the top input direction of its delta there."""
    model, bank, deltas, _ = qwen
    path, module = next(iter(cases.expert_modules(model).items()))
    x, index, weights = torch.randn(6, D), torch.randint(0, N, (6, 1)), torch.ones(6, 1)
    with moerge.patch(model, bank, "arrow", top_k=1) as handle, handle.record(tokens=True) as trace, torch.no_grad():
        module(x, index, weights)
    got = trace.calls[f"{path}.gate_up_proj"][0][1].flatten()
    by_base = index.flatten().sort(stable=True).indices
    for slot, t in enumerate(by_base.tolist()):
        j = int(index[t])
        directions = [torch.linalg.svd(deltas[name][f"{path}.gate_up_proj"][j]).Vh[0] for name in deltas]
        assert int(torch.stack([(x[t] @ v).abs() for v in directions]).argmax()) == int(got[slot])


def test_a_removed_patch_leaves_no_trace(qwen):
    model, bank, *_ = qwen
    before, ids = patch_cases.snapshot(model), patch_cases.tokens()
    plain, config = logits(model, input_ids=ids), model.model.layers[0].mlp.experts.config
    handle = moerge.patch(model, bank)
    assert list(model.state_dict()) == list(before["state"])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before["storage"]]
    assert error(logits(model, input_ids=ids), plain) > 0.01
    assert "gate_up_proj of Qwen3MoeExperts" in str(handle.explain())
    handle.remove()
    assert patch_cases.same(before, patch_cases.snapshot(model))
    assert torch.equal(logits(model, input_ids=ids), plain)
    assert model.model.layers[0].mlp.experts.config is config


def test_copies_have_branches_of_their_own(qwen):
    model, bank, *_ = qwen
    ids = patch_cases.tokens()
    plain = logits(model, input_ids=ids)
    with moerge.patch(model, bank):
        want = logits(model, input_ids=ids)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, input_ids=ids), want)
            moerge.get_handle(other).remove()
            assert torch.equal(logits(other, input_ids=ids), plain)
        assert torch.equal(logits(model, input_ids=ids), want)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_compiled_experts_are_one_graph(qwen, kernel):
    if kernel == "grouped_mm" and not hasattr(transformers.integrations.moe, "_grouped_mm"):
        pytest.skip("needs a newer transformers: torch's own grouped_mm is compiled in bfloat16 alone")
    model, bank, *_ = qwen
    model.set_experts_implementation(kernel)
    module = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(9, D), torch.stack([torch.randperm(N)[:2] for _ in range(9)]), torch.rand(9, 2)
    with moerge.patch(model, bank), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert error(compiled(x, index, weights), module(x, index, weights)) < 1e-5


def test_gradients_reach_the_base_through_the_branch(qwen):
    model, bank, *_ = qwen
    ids, found = patch_cases.tokens(), {}
    for backend in ("native", "reference"):
        with moerge.patch(model, bank, backend=backend):
            model.zero_grad()
            model(input_ids=ids).logits.square().mean().backward()
            found[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("experts" in name for name in found["native"])
    for name, grad in found["native"].items():
        assert error(grad, found["reference"][name]) < 1e-4, name


def test_half_precision_keeps_gates_in_float32(qwen):
    model, bank, *_ = qwen
    with moerge.patch(model, bank):
        model.to(torch.bfloat16)
        branch = model.model.layers[0].mlp.experts.moerge_branches["gate_up_proj"]
        assert (branch.gates.dtype, branch.lora_A.dtype) == (torch.float32, torch.bfloat16)
        assert logits(model, input_ids=patch_cases.tokens()).isfinite().all()


@pytest.mark.parametrize("method", ["phatgoose", "arrow"])
def test_the_probe_sees_what_the_record_does(qwen, method):
    from moerge_ext.evaluation.probe import probe

    model, bank, *_ = qwen
    ids = patch_cases.tokens()
    with moerge.patch(model, bank, method, top_k=2) as handle, handle.record() as trace, probe(model) as sums:
        logits(model, input_ids=ids)
    for path, load in trace.load().items():
        assert torch.allclose(sums[path].weight, load, atol=1e-4)
        assert torch.allclose(sums[path].distribution.sum(), load.sum(), atol=1e-4)


def refused(model, bank, *words, method="merged", **options):
    """Both check_patch and patch refuse with all words, and the model is as before."""
    before = patch_cases.snapshot(model)
    for attempt in (moerge.patch, moerge.routing.patch.check_patch):
        with pytest.raises(ValueError) as caught:
            attempt(model, bank, method, **options)
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))
    assert patch_cases.same(before, patch_cases.snapshot(model))
    return str(caught.value)


def test_what_cannot_be_right_is_refused_by_name(qwen, tmp_path):
    model, bank, *_ = qwen
    config = model.config
    config._experts_implementation = "sonicmoe"
    message = refused(model, bank, "Qwen3MoeExperts", "'sonicmoe'", "set_experts_implementation('grouped_mm')")
    assert message.count("\n") == 1  # one line for all layers
    config._experts_implementation = "grouped_mm"
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    refused(model, bank, "expert parallelism")
    model.model.layers[0].mlp.experts._is_expert_parallel = False
    experts = model.model.layers[1].mlp.experts
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    refused(model, bank, "Qwen3MoeExperts", "float8_e4m3fn")


def test_adapters_of_another_size_are_refused(qwen):
    _, bank, *_ = qwen
    name, config, fields = cases.MODELS["qwen3_moe"]
    import transformers

    def other(**changed):
        return getattr(transformers, name)(getattr(transformers, config)(**cases._COMMON | fields | changed))

    refused(other(num_experts=2), bank, "base expert 3", "the model has 2")
    refused(other(moe_intermediate_size=16), bank, f"D={D} -> O=32", f"D={D} -> O={I}", f"D={D} -> O={2 * I}")


def test_missing_gates_are_named_with_their_parameter(qwen, tmp_path):
    model, _, *_ = qwen
    cases.adapter("qwen3_moe", model, tmp_path / "dog", 5, layout="apart", linear="q_proj")
    bank = moerge.load_experts([tmp_path / "dog"])
    refused(model, bank, "self_attn.q_proj", "sigmoid-gate", "'dog'", "and 3 more modules", method="phatgoose")


def test_gates_of_each_base_experts_layers_are_refused(tmp_path):
    """Made with transformers 4: to leave the experts out for the want of a gate would be silent."""
    model = cases.build("qwen3_moe")
    cases.adapter("qwen3_moe", model, tmp_path, 5, layout="apart")
    bank = moerge.load_experts({"dog": tmp_path})
    bank.set_gates("dog", {path: torch.ones(module.in_features) for path, module in bank.modules.items()})
    with pytest.raises(ValueError, match="'dog' have gates of kind 'sigmoid-gate' for layers of each base expert"):
        moerge.patch(model, bank, top_k=1)
    with moerge.patch(model, bank, "expert:dog"):
        pass


def test_experts_that_transformers_runs_otherwise_are_refused_by_name(tmp_path):
    """Llama 4 multiplies all tokens by all experts: no door for a branch."""
    import transformers

    fields = {"intermediate_size": I, "intermediate_size_mlp": I, "num_local_experts": N, "num_experts_per_tok": 1}
    config = transformers.Llama4TextConfig(**cases._COMMON | fields, head_dim=8, interleave_moe_layer_step=1)
    model = transformers.Llama4ForCausalLM(config).eval()
    from builders import write_adapter

    path = "model.layers.0.feed_forward.experts"
    factors = torch.randn(2 * N, D), torch.randn(2 * I, 2 * N)
    targets = {"target_parameters": ["feed_forward.experts.gate_up_proj"], "target_modules": []}
    write_adapter(tmp_path, {path: factors}, r=2, **targets)
    message = refused(model, moerge.load_experts({"ant": tmp_path}), "Llama4TextExperts", "experts interface")
    assert message.count("\n") == 1


@pytest.mark.parametrize("idle", [False, True])
def test_experts_that_carry_a_peft_adapter_are_refused_by_name(qwen, idle):
    peft = pytest.importorskip("peft")
    model, bank, *_ = qwen
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model.add_adapter(config, "mine")
    if idle:
        model.disable_adapters()
    message = refused(model, bank, "lora.ParamWrapper", "model.delete_adapter('mine')", "layers.0.mlp.experts")
    assert "missing=" not in message


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_offloaded_experts(qwen, where, tmp_path):
    """accelerate's hooks stand before the experts' forward, and fetch their weights."""
    accelerate = pytest.importorskip("accelerate")
    model, bank, *_ = qwen
    ids, plain = patch_cases.tokens(), logits(model, input_ids=patch_cases.tokens())
    with moerge.patch(model, bank):
        want = logits(model, input_ids=ids)
    options = {"execution_device": "cpu"} | ({"offload_dir": str(tmp_path / "disk")} if where[0] == "d" else {})
    getattr(accelerate, where)(model, **options)
    with moerge.patch(model, bank):
        assert torch.allclose(logits(model, input_ids=ids), want, atol=1e-6)
    assert torch.equal(logits(model, input_ids=ids), plain)


def test_adapters_of_another_class_of_the_model(qwen, tmp_path):
    """Trained on the text model alone: its paths lack the container, and a warning says so."""
    model, *_ = qwen
    deltas = cases.adapter("qwen3_moe", model, tmp_path / "whole", 7, layout="apart", linear="q_proj")
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    cut = {key.replace("base_model.model.model.", "base_model.model."): tensor for key, tensor in tensors.items()}
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "text")
    save_file(cut, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ids = patch_cases.tokens()
    with pytest.warns(UserWarning, match="LoRA on fused experts has other names in this model"):
        handle = moerge.patch(model, moerge.load_experts([folder]), "expert:text")
    with handle:
        assert error(logits(model, input_ids=ids), logits(cases.changed("qwen3_moe", deltas), input_ids=ids)) < 1e-5


def test_an_initialization_that_took_from_the_base_is_refused(qwen, tmp_path):
    model, *_ = qwen
    cases.adapter("qwen3_moe", model, tmp_path, 7, layout="whole", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="began its LoRA on fused experts with pissa"):
        moerge.patch(model, moerge.load_experts({"ant": tmp_path}), "expert:ant")


@pytest.mark.slow
def test_every_experts_class_of_transformers_computes_the_same_through_the_door():
    """All classes that the experts interface computes, found by their decorator: none is known by its name."""
    classes = list(cases.experts_classes())
    assert len(classes) > 20
    for kind in classes:
        module = cases.experts_of(kind)
        width = module.down_proj.shape[2 if module.is_transposed else 1]
        x, index = torch.randn(9, width), torch.stack([torch.randperm(N)[:2] for _ in range(9)])
        weights = torch.rand(9, 2)
        with torch.no_grad():
            want, config = module(x, index, weights), module.config
            assert fused_experts.why_unsupported(module) is None, kind
            for kernel in KERNELS:
                config._experts_implementation = kernel
                fused_experts.open_door(module, NoBranches())
                assert error(module(x, index, weights), want) < 1e-5, (kind, kernel)
                fused_experts.close_door(module)
                assert module.config is config


class NoBranches(torch.nn.Module):
    running = True

    def add_branch(self, parameter, y, x, pairs, copies):
        return y
