"""Adapters of MLX-LM, in parts, in 8 bits and in pickles: what is read, what is refused, and their PEFT folders."""

import json
import pickle
import warnings

import pytest
import torch
from adapter_cases import CONFIG, UP, WEIGHTS, Q, factors, refused
from builders import PREFIX, linear_sizes, random_experts, tiny_llama, tiny_qwen2, write_adapter
from format_cases import write_mlx
from safetensors.torch import load_file, save_file

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.convert import convert_adapter
from moerge_ext.experts.formats import inspect_adapter
from moerge_ext.experts.formats.peft import write_gates
from moerge_ext.files.safefile import AdapterError
from moerge_ext.routing.patch import patch


def random_modules(model, targets=("q_proj", "k_proj", "down_proj"), rank=4):
    """{module path: (A, B)} for the layers of a model."""
    return {path: (torch.randn(rank, d), torch.randn(o, rank)) for path, d, o in linear_sizes(model, targets)}


def same_bank(one, other):
    """Both banks hold the same numbers under the same paths."""
    assert one.modules.keys() == other.modules.keys()
    for path, module in one.modules.items():
        twin = other.modules[path]
        assert module.dtype == twin.dtype and module.ranks == twin.ranks
        assert torch.equal(module.lora_A, twin.lora_A) and torch.equal(module.lora_B, twin.lora_B), path
        assert (module.lora_bias is None) == (twin.lora_bias is None)
        assert module.lora_bias is None or torch.equal(module.lora_bias, twin.lora_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mlx_equals_its_forward(tmp_path, dtype):
    """mlx-lm 0.32.2, tuner/lora.py: y = linear(x) + scale * (x @ lora_a) @ lora_b."""
    model = tiny_qwen2()
    folder = write_mlx(
        tmp_path / "m", {p: (a.to(dtype), b.to(dtype)) for p, (a, b) in random_modules(model).items()}, 2.5
    )
    stored = load_file(folder / "adapters.safetensors")
    bank = load_experts(folder)
    assert bank.base_model == "mlx-community/tiny" and bank.folders == (folder,)
    for path, module in bank.modules.items():
        x = torch.randn(5, module.in_features, dtype=torch.float64)
        expected = 2.5 * (x @ stored[f"{path}.lora_a"].double()) @ stored[f"{path}.lora_b"].double()
        torch.testing.assert_close(
            x @ module.lora_A[0].double().T @ module.lora_B[0].double().T, expected, rtol=1e-6, atol=1e-5
        )


def test_mlx_gates_and_ranks(tmp_path):
    folder = write_mlx(tmp_path / "m", {Q: factors(r=2), UP: factors(8, 12, 5)}, 3.0)
    write_gates(folder, {Q: torch.ones(8)}, kind="sigmoid-gate")
    header = inspect_adapter("e", folder)
    assert {path: (m.rank, m.scaling) for path, m in header.modules.items()} == {Q: (2, 3.0), UP: (5, 3.0)}
    assert set(header.gates) == {"sigmoid-gate"}
    same_bank(load_experts(folder), load_experts(convert_adapter(folder, tmp_path / "peft")))
    assert load_experts(tmp_path / "peft").gate_kinds == ("sigmoid-gate",)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"fine_tune_type": "dora"}, ["fine_tune_type", "DoRA"]),
        ({"fine_tune_type": "full"}, ["whole layers"]),
        ({"fine_tune_type": ["x"]}, ["fine_tune_type"]),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, ["lora_parameters.scale"]),
        ({"lora_parameters": None}, ["lora_parameters.scale"]),
        ({"lora_parameters": {"scale": True}}, ["finite number"]),
        ({"lora_parameters": {"scale": 10**400}}, ["finite number"]),
        ({"lora_parameters": {"scale": "20"}}, ["finite number"]),
    ],
)
def test_refused_mlx_configs(tmp_path, fields, words):
    refused(write_mlx(tmp_path / "m", {Q: factors()}, **fields), *words)


@pytest.mark.parametrize(
    "key, tensor, words",
    [
        (f"{Q}.m", torch.ones(6), "DoRA"),
        (f"{Q}.A", torch.ones(8, 4), "mlx-vlm"),
        ("model.embed_tokens.lora_a", torch.ones(96, 4), "embedding"),
        (f"{UP}.lora_a", torch.ones(3, 4, 8), "experts of a mixture"),
        (f"{UP}.weight", torch.ones(3, 4), "not a LoRA weight of MLX-LM"),
        (f"{UP}.lora_a", torch.ones(8, 4), "lora_B.weight is missing"),
        (f"{UP}.lora_a", torch.ones(8), "must be [R, D]"),
        ("a..b.lora_a", torch.ones(8, 2), "not a module path"),
    ],
)
def test_refused_mlx_tensors(tmp_path, key, tensor, words):
    folder = write_mlx(tmp_path / "m", {Q: factors()})
    tensors = load_file(folder / "adapters.safetensors")
    save_file(tensors | {key: tensor}, folder / "adapters.safetensors")
    refused(folder, words)


def test_mlx_scale_that_versions_read_differently(tmp_path):
    """Until 0.14.1 mlx-lm multiplied the scale by alpha / rank; the field stayed in configs for long."""
    parameters = {"rank": 8, "alpha": 16.0, "scale": 10.0}
    old = write_mlx(tmp_path / "old", {Q: factors()}, fine_tune_type="lora", lora_parameters=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_adapter("e", old).modules[Q].scaling == 10.0
        load_experts(old)
    config = json.loads((old / CONFIG).read_text())
    (old / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key != "fine_tune_type"}))
    with pytest.warns(UserWarning, match="set scale to 20 and remove alpha"):
        load_experts(old)


def in_parts(folder, parts=2, index="model.safetensors.index.json"):
    """Split the weights of a PEFT folder as transformers does."""
    tensors = load_file(folder / WEIGHTS)
    keys, names = sorted(tensors), {}
    for i in range(parts):
        name = f"adapter_model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({key: tensors[key] for key in keys[i::parts]}, folder / name, {"format": "pt"})
        names |= dict.fromkeys(keys[i::parts], name)
    (folder / WEIGHTS).unlink()
    if index:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("index", ["model.safetensors.index.json", f"{WEIGHTS}.index.json", None])
def test_weights_in_parts(tmp_path, index):
    modules = random_modules(tiny_llama())
    whole = load_experts(write_adapter(tmp_path / "whole", modules))
    folder = in_parts(write_adapter(tmp_path / "parts", modules), 3, index)
    same_bank(load_experts(folder), whole)
    same_bank(load_experts(convert_adapter(folder, tmp_path / "out")), whole)
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_parts_as_transformers_writes_them(tmp_path):
    from peft import LoraConfig

    model = tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    same_bank(load_experts(tmp_path / "parts"), load_experts(tmp_path / "whole"))


def test_refused_parts(tmp_path):
    def folder(name):
        return in_parts(write_adapter(tmp_path / name, {Q: factors(), UP: factors(8, 12)}), 2)

    lacking = folder("lacking")
    (lacking / "adapter_model-00002-of-00002.safetensors").unlink()
    refused(lacking, "parts of adapter_model.safetensors are not complete", "without number 2")
    twice = folder("twice")
    (twice / "adapter_model-00002-of-00002.safetensors").write_bytes(
        (twice / "adapter_model-00001-of-00002.safetensors").read_bytes()
    )
    refused(twice, "in two parts")
    mixed = folder("mixed")
    (mixed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": "x"}}))
    refused(mixed, "lists 1 tensor ", "gone")
    for text in ("{", "[]", '{"weight_map": 3}', "[" * 100_000):
        (mixed / "model.safetensors.index.json").write_text(text)
        refused(mixed, "not an index")
    link = folder("link")
    part = link / "adapter_model-00002-of-00002.safetensors"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    refused(link, "link out of its folder")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_read_exactly(tmp_path, dtype):
    a, b = (part.to(dtype) for part in factors())
    bank = load_experts(write_adapter(tmp_path / "e", {Q: (a, b)}, r=4, alpha=8))
    module = bank.modules[Q]
    assert module.dtype == torch.bfloat16
    assert torch.equal(module.lora_A[0].float(), a.float()) and torch.equal(module.lora_B[0].float(), 2 * b.float())
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.float().isfinite()
    assert torch.equal(every[finite].bfloat16().float(), every[finite].float())


def test_8_bit_floats_of_a_live_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    path, module = next(iter(load_experts(model).modules.items()))
    stored = model.get_submodule("base_model.model." + path).lora_A["default"].weight
    assert module.dtype == torch.bfloat16 and torch.equal(module.lora_A[0].float(), stored.float())


def as_pickle(folder, content=None):
    """A PEFT folder whose weights are a pickle."""
    torch.save(load_file(folder / WEIGHTS) if content is None else content, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def test_pickles_are_read_by_convert_alone(tmp_path):
    modules = {Q: factors(), UP: factors(8, 12)}
    whole = load_experts(write_adapter(tmp_path / "whole", modules))
    folder = as_pickle(write_adapter(tmp_path / "old", modules))
    refused(folder, "adapter_model.bin is a pickle", "moerge convert", "--allow-pickle")
    with pytest.raises(ValueError, match="pickle"):
        convert_adapter(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same_bank(load_experts(convert_adapter(folder, tmp_path / "out", allow_pickle=True)), whole)


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_what_stands_in_the_place_of_a_pickle(tmp_path):
    folder = as_pickle(write_adapter(tmp_path / "p", {Q: factors()}))
    (folder / "adapter_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(AdapterError, match="adapter_model.bin is a Git-LFS pointer.*git lfs pull"):
        load_experts(folder)


def test_refused_pickles(tmp_path):
    def convert(**content):
        folder = write_adapter(tmp_path / "p", {Q: factors()})
        if "raw" in content:
            (folder / WEIGHTS).unlink()
            (folder / "adapter_model.bin").write_bytes(content["raw"])
        else:
            as_pickle(folder, content["tensors"])
        with pytest.raises(AdapterError) as caught:
            convert_adapter(folder, tmp_path / "out", allow_pickle=True)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    key = f"{PREFIX}{Q}.lora_A.weight"
    assert "cannot be read as weights alone" in convert(tensors={key: Code()})
    assert "not a file of torch.save" in convert(raw=pickle.dumps({key: 1}))
    assert "not a file of torch.save" in convert(raw=b"")
    assert "dict of tensors" in convert(tensors=[torch.ones(2)])
    assert "dict of tensors" in convert(tensors={key: 3})
    assert "for tensors of" in convert(tensors={key: torch.ones(1, 1).expand(1 << 12, 1 << 12)})
    assert "no values" in convert(tensors={key: torch.empty(4, 8, device="meta")})
    assert "lora_B.weight is missing" in convert(tensors={key: torch.ones(4, 8)})


def test_a_broken_config_beside_a_pickle(tmp_path):
    folder = as_pickle(write_adapter(tmp_path / "p", {Q: factors()}))
    (folder / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        convert_adapter(folder, tmp_path / "out", allow_pickle=True)


def test_convert_refuses_before_it_writes(tmp_path):
    folder = write_adapter(tmp_path / "e", {Q: factors()})
    with pytest.raises(ValueError, match="is there already"):
        convert_adapter(folder, folder)
    (tmp_path / "empty").mkdir()
    same_bank(load_experts(convert_adapter(folder, tmp_path / "empty")), load_experts(folder))
    bad = write_mlx(tmp_path / "bad", {Q: (torch.full((4, 8), torch.nan), torch.ones(6, 4))})
    with pytest.raises(AdapterError, match="NaN"):
        convert_adapter(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converted_folder_is_peft_s(tmp_path):
    """PEFT applies the converted adapter as we apply the MLX one."""
    from peft import PeftModel

    torch.manual_seed(0)
    model = tiny_qwen2()
    modules = {path: (a / 8, b / 8) for path, (a, b) in random_modules(model).items()}
    folder = write_mlx(tmp_path / "m", modules, 2.0)
    tokens = torch.randint(3, 90, (2, 7))
    peft_model = PeftModel.from_pretrained(tiny_qwen2(), convert_adapter(folder, tmp_path / "out"))
    with patch(model, load_experts(folder), "expert:m"), torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, peft_model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_is_saved_beside_the_lora_comes_along(tmp_path):
    """A head in parts, in a pickle, converted: the same bytes under the same key."""
    modules, head = {Q: factors()}, {f"{PREFIX}score.weight": torch.randn(3, 8), f"{PREFIX}norm.seen": torch.tensor(3)}

    def folder(name):
        made = write_adapter(tmp_path / name, modules, modules_to_save=["score"])
        save_file(load_file(made / WEIGHTS) | head, made / WEIGHTS)
        return made

    for name, change, options in (("parts", in_parts, {}), ("pickle", as_pickle, {"allow_pickle": True})):
        converted = convert_adapter(change(folder(name)), tmp_path / ("out-" + name), **options)
        assert torch.equal(load_file(converted / WEIGHTS)[f"{PREFIX}score.weight"], head[f"{PREFIX}score.weight"])
    claims = inspect_adapter("e", tmp_path / "parts").claims
    assert all(torch.equal(saved.read(), head[PREFIX + path]) for path, saved in claims.saved.items()) and claims.saved


def test_tied_parameters_in_a_pickle(tmp_path):
    """torch.save writes what an embedding and its head share once."""
    folder = write_adapter(tmp_path / "p", {Q: factors()})
    shared = torch.randn(200, 8)
    saved = {f"{PREFIX}{name}.weight": shared for name in ("model.embed_tokens", "lm_head")}
    converted = convert_adapter(
        as_pickle(folder, load_file(folder / WEIGHTS) | saved), tmp_path / "out", allow_pickle=True
    )
    tensors = load_file(converted / WEIGHTS)
    assert all(torch.equal(tensors[key], shared) for key in saved)


def test_gates_are_trained_for_any_format(tmp_path):
    from moerge_ext.training.gated_lora import gated_model

    model = tiny_llama()
    folder = write_mlx(tmp_path / "m", random_modules(model), 2.0)
    with gated_model(model, folder, joint=True) as gated:
        gated.save(tmp_path / "joint")
        gated.joint = False
        gated.save()
    assert load_experts(folder).gate_kinds == ("sigmoid-gate",)
    same_bank(load_experts(tmp_path / "joint"), load_experts(folder))


def test_experts_of_several_formats_are_one_bank(tmp_path):
    model = tiny_llama()
    folders = random_experts(model, tmp_path, ["a"], ["q_proj"], gates=False)
    write_mlx(tmp_path / "b", random_modules(model, ["q_proj"]), model="tiny")
    bank = load_experts([folders["a"], tmp_path / "b"])
    assert bank.names == ("a", "b") and all(module.present.all() for module in bank.modules.values())
