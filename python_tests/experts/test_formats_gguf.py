"""GGUF adapters of llama.cpp: rows, names, scaling, number types, and every file that is refused."""

import struct

import pytest
import torch
from adapter_cases import factors
from builders import tiny_llama, tiny_mistral, tiny_qwen2, write_adapter
from format_cases import ADAPTER, GGUF_NAMES, gguf_bytes, gguf_tensors, pairs_from_halves, write_gguf
from test_formats import random_modules, same_bank

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.convert import convert_adapter
from moerge_ext.experts.formats.gguf import ARCHITECTURES, halves_from_pairs
from moerge_ext.routing.patch import patch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QWEN = {"general.architecture": "qwen2"}


@pytest.mark.parametrize(
    "build, architecture, heads",
    [(tiny_llama, "llama", (4, 2)), (tiny_mistral, "llama", (4, 2)), (tiny_qwen2, "qwen2", None)],
)
def test_gguf_equals_the_peft_folder(tmp_path, build, architecture, heads):
    """Folder -> llama.cpp's file -> bank; -> converted folder -> bank: the numbers never change."""
    model = build()
    modules = random_modules(model, [*TARGETS, "lm_head"])
    whole = load_experts(write_adapter(tmp_path / "peft", modules, alpha=6))
    file = write_gguf(tmp_path / "ours.gguf", modules, architecture, 6.0, heads)
    bank = load_experts(file, base=model)
    assert bank.names == ("ours",) and bank.folders == (None,)
    same_bank(bank, whole)
    same_bank(load_experts(convert_adapter(file, tmp_path / "out", base=model)), whole)
    with patch(model, bank, "expert:ours"):
        pass


def test_the_order_of_rows_is_transformers():
    """Two independent readings: the writer in format_cases, and transformers' own reader of GGUF models."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = torch.randn(24, 3)
    for heads in (1, 2, 3, 6):
        stored = pairs_from_halves(rows, heads)
        assert torch.equal(halves_from_pairs(stored, heads), rows)
        theirs = LlamaTensorProcessor()._reverse_permute_weights(stored.numpy(), heads, heads)
        assert torch.equal(torch.from_numpy(theirs), rows)


def test_the_base_can_be_a_model_a_config_a_folder_or_a_dict(tmp_path):
    model = tiny_llama()
    modules = random_modules(model)
    whole = load_experts(write_adapter(tmp_path / "peft", modules))
    file = write_gguf(tmp_path / "a.gguf", modules, "llama", heads=(4, 2))
    model.config.save_pretrained(tmp_path / "base")
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    for base in (model, model.config, tmp_path / "base", str(tmp_path / "base"), fields, {"text_config": fields}):
        same_bank(load_experts(file, base=base), whole)


@pytest.mark.parametrize(
    "base, words",
    [
        (None, "pass base="),
        ({"hidden_size": 32, "num_attention_heads": 4}, "16 rows, the base's config says 4 heads of 8"),
        ({"hidden_size": 32}, "num_attention_heads"),
        ({"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 2}, "32 rows"),
        (3, "got int"),
        ("/nowhere/at/all", "needs the base's config"),
    ],
)
def test_the_base_is_missing_or_another(tmp_path, base, words):
    file = write_gguf(tmp_path / "a.gguf", random_modules(tiny_llama()), "llama", heads=(4, 2))
    with pytest.raises(ValueError, match=words):
        load_experts(file, base=base)
    assert load_experts(write_gguf(tmp_path / "b.gguf", random_modules(tiny_llama(), ["down_proj"]), "llama"))


@pytest.mark.parametrize("alpha, ranks, scalings", [(8.0, (2, 4), (4.0, 2.0)), (0.0, (2, 4), (1.0, 1.0))])
def test_scaling(tmp_path, alpha, ranks, scalings):
    """llama_adapter_lora_weight::get_scale: alpha / rank of the tensor, or 1 without alpha."""
    from moerge_ext.experts.formats import inspect_adapter

    paths = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    modules = {path: factors(r=r) for path, r in zip(paths, ranks, strict=True)}
    file = write_gguf(tmp_path / "a.gguf", modules, alpha=alpha)
    header = inspect_adapter("e", file)
    assert tuple(header.modules[path].scaling for path in paths) == scalings
    same_bank(load_experts(file), load_experts(convert_adapter(file, tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_number_types(tmp_path, dtype):
    path = "model.layers.0.mlp.up_proj"
    a, b = factors(dtype=dtype)
    module = load_experts(write_gguf(tmp_path / "a.gguf", {path: (a, b)}, alpha=8.0)).modules[path]
    assert module.dtype == dtype and torch.equal(module.lora_A[0], a) and torch.equal(module.lora_B[0], 2 * b)


def test_q8_0(tmp_path):
    """Blocks of 32: a float16 scale, 32 signed bytes."""
    scales, steps = torch.rand(6, 2).half(), torch.randint(-127, 128, (6, 2, 32)).to(torch.int8)
    raw = b"".join(
        s.view(torch.uint8).numpy().tobytes() + q.view(torch.uint8).numpy().tobytes()
        for s, q in zip(scales.reshape(-1, 1), steps.reshape(-1, 32), strict=True)
    )
    key = "blk.0.ffn_up.weight.lora_"
    tensors = {key + "a": raw, key + "b": torch.randn(5, 6)}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(tensors, ADAPTER | QWEN, {key + "a": ((6, 64), 8)}))
    module = load_experts(tmp_path / "a.gguf").modules["model.layers.0.mlp.up_proj"]
    assert torch.equal(module.lora_A[0], (scales[..., None].float() * steps.float()).reshape(6, 64))


def test_a_folder_with_one_file(tmp_path):
    from moerge_ext.experts.formats.peft import write_gates

    modules = {"model.layers.0.mlp.up_proj": factors()}
    write_gguf(tmp_path / "task" / "adapter.gguf", modules)
    write_gates(tmp_path / "task", {"model.layers.0.mlp.up_proj": torch.ones(8)}, kind="sigmoid-gate")
    bank = load_experts([tmp_path / "task"])
    assert bank.names == ("task",) and bank.gate_kinds == ("sigmoid-gate",) and bank.folders == (tmp_path / "task",)
    write_gguf(tmp_path / "task" / "another.gguf", modules)
    with pytest.raises(ValueError, match="pass the file itself, such as .*adapter.gguf"):
        load_experts([tmp_path / "task"])


def make(tensors=None, version=3, magic=b"GGUF", **values):
    up = {"model.layers.0.mlp.up_proj": factors()}
    tensors = gguf_tensors(up) | (tensors or {})
    values = {key: value for key, value in (ADAPTER | QWEN | values).items() if value is not None}
    return magic + struct.pack("<I", version) + gguf_bytes(tensors, values)[8:]


LATER = {"adapter.alora.invocation_tokens": ["x"]}


@pytest.mark.parametrize(
    "content, words",
    [
        (make(magic=b"GGML"), "does not begin with GGUF"),
        (make(version=1), "version is 1"),
        (make(version=3 << 24), "big-endian"),
        (make(**{"general.type": "model"}), "of type 'model', not an adapter"),
        (make(**{"general.type": None}), "of type None, not an adapter"),
        (make(**{"adapter.type": "control_vector"}), "adapter.type must be 'lora', got 'control_vector'"),
        (make(**{"general.architecture": "mamba"}), "an adapter for 'mamba'; .* known for arcee"),
        (make(**{"adapter.lora.alpha": "8"}), "adapter.lora.alpha must be a number"),
        (make(**{"adapter.lora.alpha": float("nan")}), "finite number"),
        (make(**LATER), "aLoRA"),
        (make(**{"general.alignment": 3}), "multiple of 8"),
        (make({"token_embd.weight.lora_a": torch.ones(4, 8)}), "embedding"),
        (make({"blk.0.attn_norm.weight": torch.ones(8)}), "replace a part of the base"),
        (make({"blk.0.ffn_up_exps.weight.lora_a": torch.ones(2, 4, 8)}), "experts of a mixture"),
        (make({"blk.0.ssm_in.weight.lora_a": torch.ones(4, 8)}), "no layer of that name"),
        (make({"blk.0.ffn_up.weight.lora_a": torch.ones(3, 8)}), "ranks disagree"),
        (make({"blk.1.ffn_up.weight.lora_a": torch.ones(3, 8)}), "lora_B.weight is missing"),
        (make({"blk.0.ffn_up.weight.lora_b": torch.full((6, 4), torch.inf)}), "NaN or infinite"),
        (make()[:-40], "the file was cut short"),
        (make()[:100], "ends within its header"),
        (b"", "ends within its header"),
    ],
    ids=range(21),
)
def test_refused_files(tmp_path, content, words):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_experts(tmp_path / "bad.gguf")


def header_of(pairs=b"", tensors=b"", counts=(0, 1)):
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + pairs + tensors


@pytest.mark.parametrize(
    "content",
    [
        header_of(counts=(0, 1 << 60)),
        header_of(counts=(1 << 60, 0)),
        header_of(struct.pack("<Q", 1 << 62)),
        header_of(struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 60)),  # an array of numbers
        header_of(struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 1 << 60)),  # of strings
        header_of(struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 1 << 40)),  # of arrays
        header_of(struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77)),
        header_of(struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 1)),
        header_of(tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<I", 1 << 30), counts=(1, 0)),
        header_of(
            tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), counts=(1, 0)
        ),
        header_of(tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 4, 12, 0), counts=(1, 0)) + bytes(64),
    ],
    ids=range(11),
)
def test_headers_that_claim_more_than_there_is(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="is not a valid GGUF file"):
        load_experts(tmp_path / "bad.gguf")


def test_tensors_that_share_bytes(tmp_path):
    """A small file must not stand for a large bank."""
    a = torch.ones(4, 8)
    tensors = {f"blk.{i}.ffn_up.weight.lora_{x}": b"" for i in range(50) for x in "ab"}
    kinds = {key: ((4, 8) if key.endswith("a") else (8, 4), 0) for key in tensors}
    content = gguf_bytes(tensors, ADAPTER | QWEN, kinds) + a.numpy().tobytes()
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="share bytes|cut short"):
        load_experts(tmp_path / "a.gguf")


def test_against_the_gguf_package(tmp_path):
    """llama.cpp's own package: its names of layers, and files that its writer made."""
    gguf = pytest.importorskip("gguf")
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for architecture, (names, _) in ARCHITECTURES.items():
        table = gguf.get_tensor_name_map(numbers[architecture], 3)
        for ours, path in names.items():
            assert table.get_name(f"model.layers.2.{path}") == f"blk.2.{ours}", (architecture, path)
        assert table.get_name("lm_head") in ("output", None)  # None: always tied to the embedding
    assert {GGUF_NAMES[path] for path in GGUF_NAMES} == set(ARCHITECTURES["llama"][0])
    model = tiny_llama()
    modules = random_modules(model, TARGETS)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 6.0)
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/tiny")
    writer.add_array("general.tags", ["lora", "x"])
    for key, tensor in gguf_tensors(modules, (4, 2)).items():
        if tensor.shape[-1] % 32 == 0:  # as convert_lora_to_gguf --outtype q8_0 does
            writer.add_tensor(
                key,
                gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        else:
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bank = load_experts(tmp_path / "a.gguf", base=model)
    assert bank.base_model == "org/tiny"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for path, module in bank.modules.items():
        assert torch.equal(module.lora_B[0], modules[path][1] * 1.5)
        entry = stored[next(iter(gguf_tensors({path: modules[path]})))]
        assert torch.equal(module.lora_A[0], torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type)))


def test_one_line_a_cause(tmp_path):
    tensors = {f"blk.{i}.ffn_up_exps.weight.lora_{x}": torch.ones(2, 4, 8) for i in range(9) for x in "ab"}
    (tmp_path / "a.gguf").write_bytes(make(tensors))
    with pytest.raises(ValueError, match="and 15 more: 3 sizes: LoRA on the experts") as caught:
        load_experts(tmp_path / "a.gguf")
    assert len(caught.value.problems) == 1


def test_a_file_that_changes_after_the_check(tmp_path):
    from moerge_ext.experts.formats import inspect_adapter

    file = write_gguf(tmp_path / "a.gguf", {"model.layers.0.mlp.up_proj": factors()})
    header = inspect_adapter("e", file)
    for content in (make()[:-8], make({"blk.1.ffn_up.weight.lora_a": torch.ones(1, 1)}), b""):
        file.write_bytes(content)
        with pytest.raises(ValueError):
            list(header.read())
