"""ExpertBank and load_experts: stacking, names, dtypes, devices."""

import re
import time
import warnings

import builders
import pytest
import torch
from adapter_cases import factors, two_experts
from builders import random_experts, write_adapter

from moerge_ext.experts.bank import ExpertBank, ModuleBank, load_experts
from moerge_ext.experts.formats.peft import AdapterError, write_gates

Q, K = "layers.0.q_proj", "layers.0.k_proj"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def two(tmp_path):
    """(parent folder, factors) of experts a and b of `two_experts`."""
    return tmp_path, two_experts(tmp_path)


def test_stacks_pads_and_scales(two):
    folder, made = two
    bank = load_experts([folder / "a", folder / "b"])
    q, k = bank.modules[Q], bank.modules[K]
    assert bank.names == ("a", "b") and len(bank) == 2 and list(bank.modules) == [K, Q]
    assert q.lora_A.shape == (2, 3, 8) and q.lora_B.shape == (2, 6, 3) and q.ranks == (2, 3)
    assert k.present.tolist() == [True, False] and k.ranks == (2, 0) and q.present.all()
    for e, name in enumerate("ab"):
        a, b = made[name][Q]
        assert torch.equal(q.lora_A[e, : len(a)], a) and torch.equal(q.lora_B[e, :, : len(a)], 2 * b)
    assert not q.lora_A[0, 2:].any() and not q.lora_B[0, :, 2:].any() and not k.lora_A[1].any()
    assert q.lora_bias is None and q.gates == {}
    # the kernels are fast for rows of R of A and rows of O of B
    assert q.lora_A.stride() == (24, 1, 3) and q.lora_B.stride() == (18, 1, 6)
    assert (q.in_features, q.out_features, q.num_experts, q.rank) == (8, 6, 2, 3)
    assert bank.nbytes == sum(m.lora_A.nbytes + m.lora_B.nbytes for m in bank.modules.values())


def test_names_and_index(two):
    folder, _ = two
    bank = load_experts({"x": folder / "b", "y": str(folder / "a")})
    assert bank.names == ("x", "y") and bank.index("y") == 1 and list(bank) == ["x", "y"]
    assert bank.folders == ((folder / "b").resolve(), (folder / "a").resolve())
    with pytest.raises(KeyError, match="no expert 'z'; there are x, y"):
        bank.index("z")
    assert load_experts(folder / "a").names == ("a",)
    text = repr(bank)
    assert "2 experts [x, y]" in text and "rank 2-3" in text and "base_model: tiny" in text
    assert "present 1" in repr(bank.modules[K]) and "0 modules" in repr(ExpertBank(["a"], {}))


@pytest.mark.parametrize(
    "wrong",
    [[], {}, 5, None, torch.nn.Linear(2, 2), [None], {1: "a"}, {"": "a"}, ["\0"], ["nowhere"], "", "~\0"],
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="load_experts"):
        load_experts(wrong)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_wrong_dtype(two, dtype):
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_experts(two[0] / "a", dtype=dtype)


def test_duplicate_names(two):
    folder, _ = two
    with pytest.raises(ValueError, match="2 experts have this name.*to name them apart"):
        load_experts([folder / "a", folder / "b" / ".." / "a"])


def test_every_bad_expert_is_named(two):
    folder, _ = two
    write_adapter(folder / "c", {Q: factors(r=2)}, r=2, use_dora=True, bias="some")
    (folder / "d").mkdir()
    with pytest.raises(AdapterError) as caught:
        load_experts([folder / name for name in "abcd"] + [folder / "e"])
    text = str(caught.value)
    assert "3 of 5 experts" in text
    for word in (
        "'c'",
        "DoRA",
        "bias must be",
        "'d'",
        "adapter_config.json is missing",
        "there is no local folder",
    ):
        assert word in text
    assert not re.search(r"expert '[ab]'", text) and len(caught.value.problems) == 4


def test_experts_for_different_layers(two):
    folder, _ = two
    write_adapter(folder / "c", {Q: factors(d=8, o=7), K: factors(d=9, o=6)})
    with pytest.raises(ValueError) as caught:
        load_experts([folder / name for name in "abc"])
    assert "1 of 3" in str(caught.value) and "'c'" in str(caught.value)
    assert "[O=6, D=9], in 1 other expert(s) for [O=6, D=8]; 2 of its 2 modules differ" in str(caught.value)
    assert "expert 'c': made for tiny, the others for tiny: layers.0" in str(caught.value)
    write_adapter(folder / "d", {Q: factors(d=8, o=9)}, base_model_name_or_path="another/model")
    with pytest.raises(ValueError) as caught:  # what cannot be read and what does not fit, in one error
        load_experts([folder / name for name in "abcde"])
    said = str(caught.value)
    assert "3 of 5" in said and "expert 'd':\n  - " in said and "no local folder" in said
    assert "expert 'd':\n  - made for another/model, the others for tiny: " in said


def test_the_base_decides_which_expert_is_for_other_layers(tmp_path):
    llama = builders.tiny_llama()
    for name, d in (("wide", 9), ("right", llama.config.hidden_size)):
        write_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": factors(d=d, o=llama.config.hidden_size)})
    with pytest.raises(ValueError, match=r"'wide': made for .*, D=9\], the model has \[O=") as caught:
        load_experts([tmp_path / "wide", tmp_path / "right"], base=llama.config)
    assert "expert 'right'" not in str(caught.value)


def test_a_module_in_place_of_a_path_is_not_printed():
    with pytest.raises(ValueError, match=r"expert <Linear>: an expert must be a path or a hub id, got Linear \(a Peft"):
        load_experts([torch.nn.Linear(2, 2)])


def test_nan_is_found_while_stacking(two):
    folder, made = two
    made["a"][K][1][0, 0] = torch.inf
    write_adapter(folder / "a", made["a"], r=2)
    found = f"{K}: lora_B holds NaN or infinite values"
    with pytest.raises(ValueError, match=re.escape(f"expert 'a': {found}")):
        load_experts([folder / "a", folder / "b"])
    with pytest.raises(AdapterError) as caught:  # beside what is wrong with the others
        load_experts([folder / "a", folder / "b", folder / "nowhere"])
    said = str(caught.value)
    assert "2 of 3" in said and f"expert 'a':\n  - {found}" in said and "nowhere" in said and "'b'" not in said


def test_overflow_in_the_cast_names_expert_and_module(two):
    folder, made = two
    write_adapter(folder / "a", {Q: (made["a"][Q][0], made["a"][Q][1] + 100)}, r=2, alpha=2000)
    bank = load_experts([folder / "a", folder / "b"])
    words = re.escape(f"'a': {Q}: lora_B does not fit torch.float16 (scaling 1000")
    with pytest.raises(ValueError, match=words):
        load_experts([folder / "a", folder / "b"], dtype=torch.float16)
    with pytest.raises(ValueError, match=re.escape(f"'a', {Q}: values do not fit torch.float16")):
        bank.to(dtype=torch.float16)


@pytest.mark.parametrize(
    "first, second, common",
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes(tmp_path, first, second, common):
    pairs = {"a": factors(dtype=first), "b": factors(dtype=second)}
    paths = {name: write_adapter(tmp_path / name, {Q: pair}, alpha=12) for name, pair in pairs.items()}
    bank = load_experts(paths).modules[Q]
    assert bank.dtype == bank.lora_B.dtype == common
    assert torch.equal(bank.lora_A[0], pairs["a"][0].to(common))
    # 3 * B is formed in float32 and rounded once
    wide = pairs["a"][1].to(torch.promote_types(first, torch.float32))
    assert torch.equal(bank.lora_B[0], (wide * 3.0).to(common))
    assert load_experts(paths, dtype=torch.bfloat16).modules[Q].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dtype, alphas, exact",
    [
        (torch.float16, (8, 4), True),
        (torch.float16, (-16, 0), True),
        (torch.float16, (8, 2), False),  # halving loses the last bit of subnormal numbers
        (torch.float16, (8, 7), False),
        (torch.bfloat16, (1, 64), True),
        (torch.bfloat16, (4, 12), False),
    ],
)
def test_16_bits_stay_when_folding_is_exact(tmp_path, dtype, alphas, exact):
    for name, alpha in zip("ab", alphas, strict=True):
        a, b = factors(dtype=dtype)
        b[0, 0] = 2.0**-24  # the smallest float16
        write_adapter(tmp_path / name, {Q: (a, b)}, r=4, alpha=alpha)
    module = load_experts([tmp_path / "a", tmp_path / "b"]).modules[Q]
    wide = load_experts([tmp_path / "a", tmp_path / "b"], dtype=torch.float32).modules[Q]
    assert module.dtype == (dtype if exact else torch.float32)
    assert torch.equal(module.lora_A.float(), wide.lora_A) and torch.equal(module.lora_B.float(), wide.lora_B)
    assert load_experts(tmp_path / "a", dtype=dtype).modules[Q].dtype == dtype


@pytest.mark.parametrize("device", ["meta", "cuda:77", "nonsense", "", 3.5])
def test_devices_that_cannot_be_used(two, device):
    with pytest.raises(ValueError, match="load_experts: device .* cannot be used"):
        load_experts(two[0] / "a", device=device)
    with pytest.raises(ValueError, match="ExpertBank.to: device .* cannot be used"):
        load_experts(two[0] / "a", device="cpu").to(device)


def test_the_parent_of_adapters(two):
    folder, _ = two
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"it is no adapter but holds 2 adapter folders \(a, b\): pass those, such as "
    ) as caught:
        load_experts(folder)
    assert str(caught.value).count("expert '") == 1
    for i in range(30):
        write_adapter(folder / f"c{i:02}", {Q: factors()})
    with pytest.raises(ValueError, match=r"holds 32 adapter folders \(a, b, c00, .*c07 and 22 more\):"):
        load_experts(folder)
    with pytest.raises(ValueError) as caught:
        load_experts(folder / "empty")
    assert "adapter_config.json is missing, and so is adapter_model.safetensors" in str(caught.value)


def test_lora_bias_is_scaled(tmp_path):
    bias = torch.randn(6)
    write_adapter(tmp_path / "a", {Q: (*factors(), bias)}, alpha=12, lora_bias=True)
    write_adapter(tmp_path / "b", {Q: factors()})
    module = load_experts([tmp_path / "a", tmp_path / "b"]).modules[Q]
    assert torch.equal(module.lora_bias, torch.stack([bias * 3.0, torch.zeros(6)]))


def test_to_makes_a_new_bank(two):
    folder, _ = two
    write_gates(folder / "a", {Q: torch.ones(8)}, kind="sigmoid-gate", global_vector=torch.ones(3))
    bank = load_experts([folder / "a", folder / "b"])
    half = bank.to(dtype=torch.bfloat16, device="cpu")
    assert half.modules[Q].dtype == torch.bfloat16 and bank.modules[Q].dtype == torch.float32
    assert half.modules[Q].gates["sigmoid-gate"].dtype == torch.float32
    assert half.modules[Q].lora_B.stride() == bank.modules[Q].lora_B.stride()
    assert half.names == bank.names and half.folders == bank.folders and half.nbytes < bank.nbytes
    half.set_gates("a", {Q: torch.zeros(8)})
    assert bank.modules[Q].gates["sigmoid-gate"][0].sum() == 8


def test_a_huge_rank_cannot_inflate_the_bank(tmp_path, monkeypatch):
    monkeypatch.setattr("moerge_ext.experts.sources.FREE_PADDING", 0)
    monkeypatch.setattr("moerge_ext.experts.sources.MAX_PADDING", 4)
    for i in range(9):
        write_adapter(tmp_path / f"e{i}", {Q: factors(r=1)}, r=1)
    load_experts([tmp_path / f"e{i}" for i in range(9)])
    write_adapter(tmp_path / "huge", {Q: factors(r=500)}, r=500)
    with pytest.raises(ValueError, match="expert 'huge': .*its rank 500"):
        load_experts([tmp_path / f"e{i}" for i in range(9)] + [tmp_path / "huge"])


def test_different_base_models_are_pointed_out(tmp_path):
    for name, base in (("a", "one"), ("b", "two"), ("c", None)):
        write_adapter(tmp_path / name, {Q: factors()}, base_model_name_or_path=base)
    with pytest.warns(UserWarning, match="different base models: one, two"):
        assert load_experts([tmp_path / name for name in "abc"]).base_model is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_experts([tmp_path / "a", tmp_path / "c"]).base_model == "one"


def test_a_file_that_changes_after_the_check(two, monkeypatch):
    from moerge_ext.experts import sources as loading

    folder, _ = two
    inspect = loading.inspect_adapter

    def swap(name, path, *base):
        header = inspect(name, path, *base)
        write_adapter(path, {Q: factors(r=2, dtype=torch.float64), K: factors(r=2)}, r=2)
        return header

    monkeypatch.setattr(loading, "inspect_adapter", swap)
    with pytest.raises(ValueError, match="expert 'a': .*changed while it was being read"):
        load_experts(folder / "a")


def test_module_bank_checks_shapes():
    with pytest.raises(ValueError, match="differ in E or R"):
        ModuleBank(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"lora_bias must be \[E, O\] = \[2, 5\]"):
        ModuleBank(torch.zeros(2, 3, 4), torch.zeros(2, 5, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="E, R, D"):
        ModuleBank(torch.zeros(3, 4), torch.zeros(5, 3))
    bank = ModuleBank(torch.zeros(2, 3, 4), torch.zeros(2, 5, 3))
    assert bank.present.all() and bank.ranks == (3, 3) and bank.lora_B.stride() == (15, 1, 5)
    with pytest.raises(ValueError, match="ExpertBank: .*distinct.*; m holds 2 experts, expected 3"):
        ExpertBank(["a", "b", "a"], {"m": bank})


@pytest.mark.alone
def test_time_is_linear_in_the_number_of_experts(tmp_path):
    modules = {f"model.layers.{i}.self_attn.{p}": factors(64, 64) for i in range(12) for p in ("q_proj", "v_proj")}
    folders = [write_adapter(tmp_path / f"e{i}", modules) for i in range(60)]

    def seconds(count):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            assert len(load_experts(folders[:count])) == count
            best = min(best, time.perf_counter() - start)
        return best

    seconds(2)
    assert seconds(60) < 3 * seconds(20) * 2 + 0.1


@pytest.mark.parametrize("name", [name for name in dir(builders) if name.startswith("tiny_")])
def test_tiny_models(name, tmp_path):
    model = getattr(builders, name)()
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    targets = [path for path, _, _ in builders.linear_sizes(model, ["q_proj", "q", "query", "c_attn"])]
    assert len(targets) >= 2
    bank = load_experts(random_experts(model, tmp_path, ["a", "b"], targets, rank={"a": 2, "b": 5}))
    assert list(bank.modules) == sorted(targets) and bank.modules[targets[0]].ranks == (2, 5)
    assert bank.modules[targets[0]].has_gate["sigmoid-gate"].all()
