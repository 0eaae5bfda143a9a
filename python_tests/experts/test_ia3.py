"""(IA)3 folders of PEFT: what is read, what is refused, and the widths that a file does not hold."""

import json
import warnings

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file

from moerge_ext import ExpertBank, load_experts
from moerge_ext.evaluation.identity import of_experts
from moerge_ext.experts.convert import convert_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
K, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path):
    return builders.ia3_expert(builders.tiny_llama(), tmp_path / "ia3", seed=1)


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def refused(folder, *words, **options):
    with pytest.raises(ValueError) as caught:
        load_experts(folder, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_vectors_are_those_of_the_file(folder):
    bank, stored = load_experts(folder, base=builders.tiny_llama()), load_file(folder / WEIGHTS)
    assert set(bank.modules[K].branches) == {"scale_out"} and set(bank.modules[DOWN].branches) == {"scale_in"}
    for path, kind in ((K, "scale_out"), (DOWN, "scale_in")):
        module = bank.modules[path]
        assert torch.equal(
            module.branches[kind].tensors["scale"][0], stored[f"base_model.model.{path}.ia3_l"].flatten()
        )
        assert module.rank == 0 and module.present.tolist() == [True]


def test_widths_come_from_the_base_its_folder_gates_or_other_experts(folder, tmp_path):
    model = builders.tiny_llama()
    want = {path: (m.in_features, m.out_features) for path, m in load_experts(folder, base=model).modules.items()}
    model.config.save_pretrained(tmp_path / "base")
    lora = builders.random_experts(model, tmp_path, ("lora",), ("k_proj", "v_proj", "down_proj"))
    for bank in (
        load_experts(folder, base=tmp_path / "base"),
        load_experts(folder, base=model.config),
        load_experts([folder, lora["lora"]]),
        load_experts(folder, modules="k_proj"),  # by its gates
    ):
        for path, module in bank.modules.items():
            assert (module.in_features, module.out_features) == want[path]
    refused(folder, "width of its output is not in the file", "pass load_experts(..., base=)")
    refused(folder, "no linear layer of this name", base=builders.tiny_gpt2())


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: t.update({f"base_model.model.{K}.ia3_l": torch.ones(3)}), "must be [O, 1] or [1, D], got [3]"),
        (lambda t: t.update({f"base_model.model.{K}.ia3_l": torch.ones(1, 1)}), "nobody can tell"),
        (lambda t: t.update({f"base_model.model.{K}.ia3_l": torch.ones(9, 1, dtype=torch.int32)}), "got I32"),
        (lambda t: t.update({f"base_model.model.{K}.ia3_l": torch.ones(1, 32)}), "scales the input"),
        (lambda t: t[f"base_model.model.{K}.ia3_l"].fill_(torch.nan), "NaN or infinite"),
        (lambda t: t.update({f"base_model.model.{K}.lora_A.weight": torch.ones(2, 32)}), "has LoRA weights"),
        (lambda t: t.update({"junk": torch.ones(1)}), "'junk' is not"),
        (lambda t: [t.pop(key) for key in list(t)[1:]] and t.update(x=t.pop(next(iter(t)))), "no (IA)3 vector"),
    ],
)
def test_what_is_refused(folder, edit, words):
    change(folder, edit)
    refused(folder, words, base=builders.tiny_llama())


def test_configs(folder):
    model = builders.tiny_llama()
    configure(folder, odd_field=3)
    refused(folder, "odd_field", base=model)
    configure(folder, odd_field=None, exclude_modules=["down_proj"])
    refused(folder, "exclude_modules names it", base=model)
    configure(folder, exclude_modules=None, feedforward_modules="regular.*expression")
    assert load_experts(folder, base=model)


def test_an_idle_expert_is_said(folder):
    change(folder, lambda tensors: [tensor.fill_(1) for tensor in tensors.values()])
    with pytest.warns(UserWarning, match="changes nothing in 6 of 6 modules \\(its vector is 1\\)"):
        load_experts(folder, base=builders.tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_experts(
            builders.ia3_expert(builders.tiny_llama(), folder.parent / "b", seed=2), base=builders.tiny_llama()
        )


def test_convert_moves_and_identity(folder, tmp_path):
    model = builders.tiny_llama()
    out = convert_adapter(folder, tmp_path / "out")
    bank, again = load_experts(folder, base=model), load_experts({"ia3": out}, base=model)
    assert of_experts(bank, bank.names) == of_experts(again, again.names)
    moved = bank.to(dtype=torch.float16)
    assert moved.modules[K].branches["scale_out"].tensors["scale"].dtype == torch.float32
    change(out, lambda tensors: tensors[f"base_model.model.{K}.ia3_l"].add_(1))
    other = load_experts({"ia3": out}, base=model)
    assert of_experts(bank, bank.names) != of_experts(other, other.names)
    assert isinstance(moved, ExpertBank) and moved.nbytes > 0
