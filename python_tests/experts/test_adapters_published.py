"""Adapters and configs that people published, in ../shared/data."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from adapter_cases import CONFIG, WEIGHTS, factors, refused
from builders import write_adapter
from safetensors.torch import load_file

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats.peft import AdapterError, inspect_adapter
from moerge_ext.experts.formats.peft_patterns import ModuleNames

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def published(shared):
    folder = shared / "data" / "adapters"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/adapters, which is not here")
    return folder


def test_published_gpt2_adapters(published):
    folders = sorted(published.glob("gpt2_*"))
    # its config has targets that GPT-2 does not have
    with pytest.warns(UserWarning) as caught:
        bank = load_experts(folders)
    assert len(caught) == 1
    assert "'gpt2_review_shibbir24': target_modules names ['q_proj', 'v_proj']" in str(caught[0].message)
    assert len(bank) == 5 and bank.base_model == "gpt2" and bank.names == tuple(f.name for f in folders)
    attention = bank.modules["transformer.h.0.attn.c_attn"]
    assert (attention.in_features, attention.out_features, attention.rank) == (768, 2304, 8)
    projection = bank.modules["transformer.h.11.mlp.c_proj"]
    review = bank.index("gpt2_review_shibbir24")
    assert not projection.present[review] and projection.ranks[review] == 0
    stored = load_file(folders[-1] / WEIGHTS)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert torch.equal(attention.lora_B[4], stored * 4.0)


def test_published_fp16_adapter(published):
    bank = load_experts(published / "opencalm1b_r1_fp16")
    assert all(module.dtype == torch.float16 and module.rank == 1 for module in bank.modules.values())
    assert load_experts(published / "opencalm1b_r1_fp16", dtype=torch.float32).nbytes == 2 * bank.nbytes


def test_demo_experts():
    """Their target_modules is a regular expression."""
    folders = sorted(path for path in (ROOT / "moerge_ext" / "demo" / "assets" / "experts").iterdir() if path.is_dir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_experts(folders)) == len(folders) > 0
    header = inspect_adapter("e", folders[0])
    targets = ModuleNames(header.config["target_modules"])
    assert targets.knows(header.modules) and all(targets.match(path) for path in header.modules)
    assert not targets.match("model.layers.0.self_attn.q_proj")


def test_published_legacy_adapter_is_refused(published):
    refused(published / "bloom560m_legacy_mergedlinear", "MergedLinear", "adapter_model.bin is a pickle")


ACCEPTED = {
    "MetaMathQA__lora__llama-3.2-3B-rank10-target-mlp",
    "MetaMathQA__lora__llama-3.2-3B-rank32-lorafa",
    "MetaMathQA__lora__llama-3.2-3B-rank32-mica",
    "MetaMathQA__lora__llama-3.2-3B-rank32-riemannian",
    "MetaMathQA__lora__llama-3.2-3B-rank32",
    "MetaMathQA__lora__llama-3.2-3B-rank64-rslora",
    "MetaMathQA__lora__llama-3.2-3B-rank64",
    "image-gen__lora__flux2-klein-default",
    "image-gen__lora__flux2-klein-rank64",
    "text_generation_benchmark__lora__lora_r8",
}


def test_published_configs(published, tmp_path):
    """Of 103 configs of many kinds, only plain LoRA can be an expert; the others are refused by name."""
    accepted, configs = set(), sorted((published / "peft_configs").glob("*.json"))
    for path in configs:
        config = json.loads(path.read_text())
        target = (config.get("target_modules") or ["q_proj"])[0]
        write_adapter(tmp_path, {f"layers.0.{target}": factors(r=config.get("r", 8) or 8)})
        shutil.copyfile(path, tmp_path / CONFIG)
        try:
            inspect_adapter(path.stem, tmp_path)
            accepted.add(path.stem.removesuffix("__adapter_config"))
        except AdapterError as error:
            lora = config["peft_type"] == "LORA"
            assert ("use_dora" in str(error) or "kasa" in str(error) or "bdlora" in str(error)) or not lora
            assert lora or repr(config["peft_type"]) in str(error)
    assert len(configs) == 103 and accepted == ACCEPTED
