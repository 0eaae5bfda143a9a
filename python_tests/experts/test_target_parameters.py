"""PEFT's `target_parameters`: LoRA on stacked parameters, taken apart, and gates of such parameters."""

import warnings

import pytest
import torch
from adapter_cases import refused
from builders import write_adapter
from safetensors.torch import load_file

from moerge_ext import load_experts
from moerge_ext.experts.convert import convert_adapter
from moerge_ext.experts.formats.peft import read_adapter
from moerge_ext.experts.gates import write_gates

EXPERTS = "model.layers.0.mlp.experts"
N, R, D, I = 3, 2, 8, 5
GATED = {"gate_up_proj": D, "down_proj": I}


def stacked(width: int, out: int, r: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N * r, width), torch.randn(out, r * N)


def write(folder, modules=None, **config):
    modules = modules or {f"{EXPERTS}.base_layer": stacked(D, 2 * I), EXPERTS: stacked(I, D)}
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}
    return write_adapter(folder, modules, **{"r": R, "alpha": 2 * R} | targets | config), modules


def test_rows_of_a_are_by_base_expert_and_columns_of_b_by_rank(tmp_path):
    folder, modules = write(tmp_path)
    found = read_adapter("ant", folder).modules
    names = {"gate_up_proj": modules[f"{EXPERTS}.base_layer"], "down_proj": modules[EXPERTS]}
    assert set(found) == {f"{EXPERTS}.{j}.{name}" for j in range(N) for name in names}
    for name, (a, b) in names.items():
        for j in range(N):
            lora = found[f"{EXPERTS}.{j}.{name}"]
            assert torch.equal(lora.lora_A, a[j * R : (j + 1) * R])
            assert torch.equal(lora.lora_B, torch.stack([b[:, i * N + j] for i in range(R)], 1))
            assert lora.scaling == 2.0
    bank = load_experts({"ant": folder})
    assert torch.equal(bank.modules[f"{EXPERTS}.1.down_proj"].lora_B[0], 2 * found[f"{EXPERTS}.1.down_proj"].lora_B)


def test_patterns_name_the_parameter(tmp_path):
    modules = {f"{EXPERTS}.base_layer": stacked(D, 2 * I, 4), EXPERTS: stacked(I, D)}
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {"gate_up_proj": 16}}
    found = read_adapter("ant", write(tmp_path, modules, **patterns)[0]).modules
    assert found[f"{EXPERTS}.0.gate_up_proj"].lora_A.shape == (4, D)
    assert found[f"{EXPERTS}.0.gate_up_proj"].scaling == 4.0
    assert found[f"{EXPERTS}.0.down_proj"].scaling == 2.0


def test_one_parameter_has_no_nesting(tmp_path):
    folder, _ = write(tmp_path, {EXPERTS: stacked(I, D)}, target_parameters=["down_proj"])
    assert set(read_adapter("ant", folder).modules) == {f"{EXPERTS}.{j}.down_proj" for j in range(N)}


def test_the_weight_of_a_linear_layer_is_that_layer(tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    factors = torch.randn(R, D), torch.randn(6, R)
    folder = write_adapter(tmp_path, {path: factors}, r=R, target_parameters=["q_proj.weight"], target_modules=[])
    assert torch.equal(read_adapter("ant", folder).modules[path].lora_B, factors[1])


def test_a_name_without_a_dot_is_of_no_layer_that_target_modules_names(tmp_path):
    """What PEFT 0.21 writes of a mixture with "all-linear", or with the names of transformers 4."""
    attention, router = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"
    modules = {
        f"{EXPERTS}.base_layer": stacked(D, 2 * I, 2 * R),
        EXPERTS: stacked(I, D),
        attention: (torch.randn(R, D), torch.randn(6, R)),
        router: (torch.randn(R, D), torch.randn(N, R)),
    }
    folder, _ = write(
        tmp_path,
        modules,
        target_parameters=["down_proj", "gate.weight", "gate_up_proj"],
        target_modules=["q_proj"],
        rank_pattern={r".*\.gate_up_proj": 2 * R},
        alpha_pattern={r".*\.gate_up_proj": 4 * R},
    )
    found = read_adapter("ant", folder).modules
    parts = {f"{EXPERTS}.{j}.{name}" for j in range(N) for name in ("gate_up_proj", "down_proj")}
    assert set(found) == parts | {attention, router}
    assert torch.equal(found[attention].lora_A, modules[attention][0])
    assert torch.equal(found[router].lora_B, modules[router][1])
    assert found[f"{EXPERTS}.2.gate_up_proj"].lora_A.shape == (2 * R, D)
    assert found[f"{EXPERTS}.2.down_proj"].scaling == found[f"{EXPERTS}.2.gate_up_proj"].scaling == 2.0


def test_one_name_without_a_dot_is_of_the_experts_alone(tmp_path):
    attention = "model.layers.0.self_attn.q_proj"
    modules = {EXPERTS: stacked(I, D), attention: (torch.randn(R, D), torch.randn(6, R))}
    folder, _ = write(tmp_path, modules, target_parameters=["down_proj"], target_modules=["q_proj"])
    assert set(read_adapter("ant", folder).modules) == {attention} | {f"{EXPERTS}.{j}.down_proj" for j in range(N)}


@pytest.mark.parametrize(
    ("modules", "config", "words"),
    [
        ({EXPERTS: stacked(I, D)}, {}, ["gate_up_proj, down_proj", "LoRA for 1"]),
        (
            {EXPERTS: (torch.ones(5, I), torch.ones(D, 5))},
            {"target_parameters": ["down_proj"]},
            ["n * r", "r = 2", "5"],
        ),
        (
            {EXPERTS: (torch.ones(6, I), torch.ones(D, 4))},
            {"target_parameters": ["down_proj"]},
            ["r * n columns", "got 6 and 4"],
        ),
        (None, {"target_parameters": "experts.down_proj"}, ["target_parameters must be a list"]),
        (None, {"target_parameters": [1]}, ["target_parameters must be a list"]),
    ],
)
def test_layouts_that_do_not_add_up(modules, config, words, tmp_path):
    refused(write(tmp_path, modules, **config)[0], *words)


def test_a_target_without_weights_is_noted(tmp_path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "other.experts.w"]
    with pytest.warns(UserWarning, match="target_parameters names .*other.experts.w"):
        load_experts({"ant": write(tmp_path, target_parameters=targets)[0]})


def test_a_converted_adapter_has_the_stacked_tensors(tmp_path):
    folder, _ = write(tmp_path / "e")
    converted = convert_adapter(folder, tmp_path / "out")
    stored, found = load_file(folder / "adapter_model.safetensors"), load_file(converted / "adapter_model.safetensors")
    assert found.keys() == stored.keys() and all(torch.equal(found[key], stored[key]) for key in stored)
    assert list(load_experts(converted).modules) == list(load_experts(folder).modules)


def test_live_adapters_are_read_like_their_folders(tmp_path):
    peft = pytest.importorskip("peft", "0.20")  # which first has two of them on one model
    torch.manual_seed(0)

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(N, 2 * I, D))
            self.down_proj = torch.nn.Parameter(torch.randn(N, D, I))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    def config(r):
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        fields = {"lora_alpha": 5, "use_rslora": True, "init_lora_weights": False, "task_type": "FEATURE_EXTRACTION"}
        return peft.LoraConfig(r=r, target_modules=[], target_parameters=targets, **fields)

    model = peft.get_peft_model(Model(), config(2), adapter_name="ant")
    model.add_adapter("bee", config(4))
    model.save_pretrained(tmp_path)
    live, stored = load_experts(model), load_experts({name: tmp_path / name for name in ("ant", "bee")})
    assert list(live.modules) == list(stored.modules)
    for path, bank in live.modules.items():
        assert bank.ranks == stored.modules[path].ranks == (2, 4)
        assert torch.equal(bank.lora_A, stored.modules[path].lora_A)
        assert torch.equal(bank.lora_B, stored.modules[path].lora_B)
    part = load_experts(model, modules="^(?!.*gate_up)", names=["bee"])
    assert list(part.modules) == [f"experts.{j}.down_proj" for j in range(N)]
    assert torch.equal(part.modules["experts.2.down_proj"].lora_B[0], live.modules["experts.2.down_proj"].lora_B[1])
    delta = model.base_model.model.experts.get_delta_weight("ant")
    bank = live.modules["experts.1.down_proj"]
    assert torch.allclose(bank.lora_B[0] @ bank.lora_A[0], delta[1], atol=1e-5)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("gate_up_proj", lambda path: path.endswith("gate_up_proj")),
        ("^(?!.*down_proj)", lambda path: path.endswith("gate_up_proj")),
        (r"\.2\.", lambda path: ".2." in path),
        (lambda path: path == f"{EXPERTS}.1.down_proj", lambda path: path == f"{EXPERTS}.1.down_proj"),
    ],
    ids=["one", "not the other", "a base expert", "a function"],
)
def test_modules_tell_the_parameters_of_one_module_apart(taken, left, tmp_path):
    folder, _ = write(tmp_path)
    write_gates(folder, {f"{EXPERTS}.{p}": torch.ones(w) for p, w in GATED.items()}, kind="sigmoid-gate")
    whole, part = load_experts({"ant": folder}), load_experts({"ant": folder}, modules=taken)
    assert list(part.modules) == [path for path in whole.modules if left(path)]
    for path, bank in part.modules.items():
        assert torch.equal(bank.lora_A, whole.modules[path].lora_A)
        assert torch.equal(bank.lora_B, whole.modules[path].lora_B)
    kept = {f"{EXPERTS}.{path.rpartition('.')[2]}" for path in part.modules}
    assert set(part.get_gates("ant")) == kept


def test_modules_that_take_no_parameter_are_told_their_names(tmp_path):
    with pytest.raises(ValueError, match=rf"one of them: {EXPERTS}\.0\.gate_up_proj"):
        load_experts({"ant": write(tmp_path)[0]}, modules="q_proj")


def test_gates_of_a_parameter_are_read_set_and_written(tmp_path):
    folder, _ = write(tmp_path / "ant")
    path, gate = f"{EXPERTS}.gate_up_proj", torch.randn(D)
    write_gates(folder, {path: gate}, kind="sigmoid-gate")
    bank = load_experts([folder])
    assert torch.equal(bank.get_gates("ant")[path], gate) and bank.gate_kinds == ("sigmoid-gate",)
    bank.set_gates("ant", {f"{EXPERTS}.down_proj": torch.ones(I)})
    assert set(bank.to(dtype=torch.bfloat16).get_gates("ant")) == {path, f"{EXPERTS}.down_proj"}
    bank.save_gates()
    assert torch.equal(load_experts([folder]).get_gates("ant")[f"{EXPERTS}.down_proj"], torch.ones(I))
    with pytest.raises(ValueError, match="not a module of the bank"):
        bank.set_gates("ant", {"model.layers.0.mlp.gate_up_proj": torch.ones(D)})
    with pytest.raises(ValueError, match="NaN"):
        bank.set_gates("ant", {path: torch.full((D,), torch.nan)})
    write_gates(folder, {"model.layers.0.mlp.up_proj": gate}, kind="sigmoid-gate")
    refused(folder, "without LoRA weights")


def test_a_file_that_does_not_tell_its_orientation_is_noted(tmp_path):
    square = {EXPERTS: stacked(D, D)}
    for version, told in (("0.18.1", False), (None, False), ("0.19.0", False), ("0.19.1", True), ("0.21.2", True)):
        fields = {"target_parameters": ["down_proj"], "peft_version": version}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_experts({"ant": write(tmp_path / str(version), square, **fields)[0]})
        assert any("PEFT 0.19.1" in str(warning.message) for warning in caught) is not told, version
