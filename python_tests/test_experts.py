"""ExpertBank and load_experts: stacking, names, dtypes, PEFT models, hub ids, gates."""

import os
import re
import time
import warnings
from pathlib import Path

import builders
import huggingface_hub
import pytest
import torch
from builders import random_experts, tiny_gpt2, tiny_llama, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model

from moerge_ext.adapters import AdapterError, read_gates, write_gates
from moerge_ext.experts import ExpertBank, ModuleBank, load_experts
from moerge_ext.hub import find_adapter

Q, K = "layers.0.q_proj", "layers.0.k_proj"


def factors(d=8, o=6, r=4, dtype=torch.float32):
    return torch.randn(r, d).to(dtype), torch.randn(o, r).to(dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def two(tmp_path):
    """Experts a (rank 2; q and k) and b (rank 3; q alone), with the factors they were made of."""
    made = {"a": {Q: factors(r=2), K: factors(r=2)}, "b": {Q: factors(r=3)}}
    for name, modules in made.items():
        rank = next(iter(modules.values()))[0].shape[0]
        write_adapter(tmp_path / name, modules, r=rank, alpha=2 * rank)
    return tmp_path, made


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
    # the kernels rely on O being the contiguous dimension
    assert q.lora_B.stride() == (18, 1, 6) and q.lora_A.is_contiguous()
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
    write_adapter(folder / "c", {Q: factors(r=2)}, r=2, use_dora=True, bias="all")
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
        "there is no folder",
    ):
        assert word in text
    assert not re.search(r"expert '[ab]'", text) and len(caught.value.problems) == 5


def test_experts_for_different_layers(two):
    folder, _ = two
    write_adapter(folder / "c", {Q: factors(d=8, o=7), K: factors(d=9, o=6)})
    with pytest.raises(ValueError) as caught:
        load_experts([folder / name for name in "abc"])
    assert "1 of 3" in str(caught.value) and "'c'" in str(caught.value)
    assert "[O=7, D=8], 2 other expert(s) for [O=6, D=8]" in str(caught.value)


def test_nan_is_found_while_stacking(two):
    folder, made = two
    made["a"][K][1][0, 0] = torch.inf
    write_adapter(folder / "a", made["a"], r=2)
    with pytest.raises(ValueError, match=re.escape(f"expert 'a': {K}: lora_B holds NaN or infinite values")):
        load_experts([folder / "a", folder / "b"])


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
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
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
    monkeypatch.setattr("moerge_ext.loading.FREE_PADDING", 0)
    monkeypatch.setattr("moerge_ext.loading.MAX_PADDING", 4)
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
    from moerge_ext import loading

    folder, _ = two
    inspect = loading.inspect_adapter

    def swap(name, path):
        header = inspect(name, path)
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


# --- gates ----------------------------------------------------------------------------------------


def test_gates_of_experts_are_stacked(two):
    folder, _ = two
    write_gates(folder / "a", {Q: torch.full((8,), 2.0)}, kind="sigmoid-gate")
    write_gates(folder / "b", {Q: torch.ones(8)}, kind="average-activation", global_vector=torch.arange(3.0))
    bank = load_experts([folder / "a", folder / "b"])
    q = bank.modules[Q]
    assert bank.gate_kinds == ("average-activation", "sigmoid-gate")
    assert q.gates["sigmoid-gate"][:, 0].tolist() == [2.0, 0.0]
    assert q.has_gate["sigmoid-gate"].tolist() == [True, False]
    assert q.has_gate["average-activation"].tolist() == [False, True]
    assert bank.modules[K].gates == {}
    assert torch.equal(bank.global_vectors["average-activation"]["b"], torch.arange(3.0))
    assert bank.get_gates("a").keys() == {Q} and bank.get_gates(1) == {}


def test_set_and_save_gates(two):
    folder, _ = two
    bank = load_experts([folder / "a", folder / "b"])
    bank.set_gates("a", {Q: torch.ones(8), K: torch.zeros(8)}, global_vector=torch.ones(2))
    bank.set_gates(1, {Q: torch.full((8,), 3.0)})
    assert bank.save_gates() == [(folder / name / "moerge_gates.safetensors").resolve() for name in "ab"]
    read = read_gates(folder / "a")["sigmoid-gate"]
    assert read.gates.keys() == {Q, K} and read.metadata["base_model"] == "tiny"
    assert torch.equal(read.global_vector, torch.ones(2))
    again = load_experts([folder / "a", folder / "b"])
    assert torch.equal(again.modules[Q].gates["sigmoid-gate"], bank.modules[Q].gates["sigmoid-gate"])
    bank.save_gates(folder / "out", metadata={"steps": "3"})
    assert read_gates(folder / "out" / "b")["sigmoid-gate"].metadata["steps"] == "3"
    bank.save_gates({"b": folder / "other"}, gates={"b": {Q: torch.zeros(8)}})
    assert not read_gates(folder / "other")["sigmoid-gate"].gates[Q].any()
    one = load_experts(folder / "a")
    assert one.save_gates(folder / "single") == [folder / "single" / "moerge_gates.safetensors"]


def test_gates_that_do_not_fit(two):
    folder, _ = two
    bank = load_experts([folder / "a", folder / "b"])
    bad = {"nowhere": torch.ones(8), Q: torch.ones(9), K: torch.ones(8)}
    with pytest.raises(ValueError) as caught:
        bank.set_gates("b", bad)
    for words in ("nowhere is not a module", "[D=8], got [9]", "expert 'b' has no LoRA here"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="NaN"):
        bank.set_gates("a", {Q: torch.full((8,), torch.nan)})
    with pytest.raises(IndexError):
        bank.set_gates(2, {})
    assert bank.gate_kinds == ()
    with pytest.raises(ValueError, match="'a' has no gates of kind 'sigmoid-gate'; expert 'b' has no gates"):
        bank.save_gates()
    nameless = ExpertBank(["x/y", "b"], bank.modules)
    nameless.set_gates(0, {Q: torch.ones(8)})
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        nameless.save_gates()
    with pytest.raises(ValueError, match="cannot be folder names"):
        nameless.save_gates(folder)


# --- PEFT -----------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"k_proj": 2, r"layers.1.*v_proj": 7},
        "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 3, "v_proj": 11},
    },
    "bias": {"r": 3, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian", "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def peft_model():
    """A tiny Llama with five PEFT adapters of random weights."""
    model = None
    for name, fields in VARIANTS.items():
        # lora_bias warns that the base has no bias, which concerns merging alone
        config = LoraConfig(**{"target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = get_peft_model(tiny_llama(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_()
    return model


def assert_equals_peft(bank, model):
    checked = 0
    for path, module in bank.modules.items():
        layer = model.get_submodule("base_model.model." + path)
        for e, name in enumerate(bank.names):
            assert bool(module.present[e]) == (name in layer.lora_A)
            if not module.present[e]:
                continue
            delta = layer.get_delta_weight(name)
            torch.testing.assert_close(module.lora_B[e] @ module.lora_A[e], delta, rtol=1e-6, atol=1e-6)
            bias = layer.lora_B[name].bias
            if bias is not None:
                torch.testing.assert_close(module.lora_bias[e], bias * layer.scaling[name], rtol=1e-6, atol=1e-6)
            checked += 1
    assert checked == 3 * 6 + 4 + 3


def test_folders_equal_peft(peft_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes lora_B.bias for a broken matrix
        peft_model.save_pretrained(tmp_path)
    bank = load_experts({name: tmp_path / name for name in VARIANTS})
    assert_equals_peft(bank, peft_model)


def test_live_model_equals_peft(peft_model):
    before = {key: value.clone() for key, value in peft_model.state_dict().items()}
    bank = load_experts(peft_model)
    assert bank.names == tuple(VARIANTS) and bank.folders == (None,) * 5
    assert_equals_peft(bank, peft_model)
    bank.modules["model.layers.0.self_attn.q_proj"].lora_A.zero_()
    after = peft_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_live_model_refusals():
    config = {"r": 2, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), LoraConfig(**config), adapter_name="good")
    model.add_adapter("dora", LoraConfig(**config, use_dora=True))
    model.add_adapter("saves", LoraConfig(**config, modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError) as caught:
        load_experts(model)
    assert "2 of 3" in str(caught.value) and "DoRA" in str(caught.value) and "'saves'" in str(caught.value)
    merged = get_peft_model(tiny_llama(), LoraConfig(**config))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        load_experts(merged)
    embedding = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ValueError, match="embed_tokens: LoRA on an embedding"):
        load_experts(embedding)


def test_transformers_model_with_adapters():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    bank = load_experts(model)
    assert bank.names == ("one",) and "model.layers.0.self_attn.q_proj" in bank.modules


def test_conv1d_base_equals_peft(tmp_path):
    model = tiny_gpt2()
    folders = random_experts(model, tmp_path, ["a"], ["c_attn", "c_fc", "c_proj"])
    bank = load_experts(folders)
    peft = PeftModel.from_pretrained(model, str(folders["a"]), adapter_name="a")
    for path, module in bank.modules.items():
        layer = peft.get_submodule("base_model.model." + path)
        delta = layer.lora_B["a"].weight @ layer.lora_A["a"].weight * layer.scaling["a"]
        torch.testing.assert_close(module.lora_B[0] @ module.lora_A[0], delta, rtol=1e-6, atol=1e-6)
    assert bank.modules["transformer.h.0.attn.c_attn"].out_features == 96


@pytest.mark.parametrize("name", [name for name in dir(builders) if name.startswith("tiny_")])
def test_tiny_models(name, tmp_path):
    model = getattr(builders, name)()
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    targets = [path for path, _, _ in builders.linear_sizes(model, ["q_proj", "q", "query", "c_attn"])]
    assert len(targets) >= 2
    bank = load_experts(random_experts(model, tmp_path, ["a", "b"], targets, rank={"a": 2, "b": 5}))
    assert list(bank.modules) == sorted(targets) and bank.modules[targets[0]].ranks == (2, 5)
    assert bank.modules[targets[0]].has_gate["sigmoid-gate"].all()


# --- hub ------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hand-made cache of hub repository user/repo, with its adapter at the top and in a folder; no
    network.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repo = tmp_path / "cache" / "models--user--repo"
    write_adapter(tmp_path / "source", {Q: factors()})
    write_gates(tmp_path / "source", {Q: torch.ones(8)}, kind="sigmoid-gate")
    (repo / "blobs").mkdir(parents=True)
    for ref in ("main", "v2"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(COMMIT)
    for inner in ("", "nested/expert"):
        folder = repo / "snapshots" / COMMIT / inner
        folder.mkdir(parents=True, exist_ok=True)
        for file in (tmp_path / "source").iterdir():
            blob = repo / "blobs" / (f"{inner.replace('/', '')}{file.name}".encode().hex())
            blob.write_bytes(file.read_bytes())
            (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    return repo


@pytest.mark.parametrize(
    "source, name",
    [
        ("user/repo", "repo"),
        ("user/repo@v2", "repo"),
        (f"user/repo@{COMMIT}", "repo"),
        ("user/repo/nested/expert", "expert"),
        ("user/repo/nested/expert@main", "expert"),
    ],
)
def test_hub_ids(hub_cache, source, name):
    bank = load_experts([source])
    assert bank.names == (name,) and bank.modules[Q].has_gate["sigmoid-gate"].all()
    assert bank.folders[0].is_relative_to(hub_cache / "snapshots")


@pytest.mark.parametrize(
    "source",
    [
        "user/repo@gone",
        "user/other",
        "user/repo/missing",
        "user/../repo",
        "user",
        "user/repo@",
        "/user/repo",
        "a/b/*",
    ]
    + [
        "user/repo/nested/expert/adapter_config.json",
        Path("user/repo"),
        "user/re po",
        "https://huggingface.co/user",
    ],
)
def test_hub_ids_that_are_not_found(hub_cache, source):
    with pytest.raises(ValueError, match="hub|not a folder"):
        load_experts([source])


def test_local_folders_win_over_the_hub(hub_cache, tmp_path):
    write_adapter(tmp_path / "user" / "repo", {K: factors()})
    assert list(load_experts("user/repo").modules) == [K]
    assert find_adapter("user/repo")[1] == Path("user/repo")


def test_hub_links_to_another_repository_are_refused(hub_cache, tmp_path):
    other = tmp_path / "cache" / "models--user--other" / "blobs"
    other.mkdir(parents=True)
    link = hub_cache / "snapshots" / COMMIT / "adapter_model.safetensors"
    link.resolve().rename(other / "weights")
    link.unlink()
    link.symlink_to(other / "weights")
    with pytest.raises(ValueError, match="link out of its folder"):
        load_experts("user/repo")


def test_only_the_adapters_files_are_fetched(monkeypatch, tmp_path):
    asked = {}

    def fake(repo, **options):
        asked.update(options, repo=repo)
        return str(write_adapter(tmp_path / "sub", {Q: factors()}).parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    load_experts("user/repo/sub@refs/pr/3")
    assert asked["repo"] == "user/repo" and asked["revision"] == "refs/pr/3"
    assert asked["allow_patterns"] == [
        "sub/adapter_config.json",
        "sub/adapter_model.safetensors",
        "sub/moerge_gates*.safetensors",
    ]


# --- time -----------------------------------------------------------------------------------------


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
