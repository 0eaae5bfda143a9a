"""Gates of a bank: stacked, set in memory, saved beside the adapters."""

import pytest
import torch
from adapter_cases import two_experts

from moerge_ext.experts.bank import ExpertBank, load_experts
from moerge_ext.experts.formats.peft import read_gates, write_gates
from moerge_ext.experts.prompt_notes import note_of_prompt, noted_prompts
from moerge_ext.models.prompt import PromptFormat

Q, K = "layers.0.q_proj", "layers.0.k_proj"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def two(tmp_path):
    """(parent folder, factors) of experts a and b of `two_experts`."""
    return tmp_path, two_experts(tmp_path)


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
    for wrong in ("zz", 2, -1, True, None, 0.0):
        with pytest.raises(ValueError, match=r"set_gates: no expert .*; expected 0 \.\. 1 or one of a, b"):
            bank.set_gates(wrong, {})
        with pytest.raises(ValueError, match="get_gates: no expert"):
            bank.get_gates(wrong)
    with pytest.raises(ValueError, match="save_gates: no expert 'zz'"):
        bank.save_gates({"zz": folder})
    with pytest.raises(ValueError, match="set_gates: no expert 'zz'"):
        bank.save_gates(folder, gates={"zz": {}})
    assert bank.gate_kinds == ()
    with pytest.raises(ValueError, match="'a' has no gates of kind 'sigmoid-gate'; expert 'b' has no gates"):
        bank.save_gates()
    nameless = ExpertBank(["x/y", "b"], bank.modules)
    nameless.set_gates(0, {Q: torch.ones(8)})
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        nameless.save_gates()
    with pytest.raises(ValueError, match="cannot be folder names"):
        nameless.save_gates(folder)


def test_saved_gates_keep_what_is_noted_of_their_prompt(two):
    """And gates that are set anew are not said to be of that prompt."""
    folder, _ = two
    note = note_of_prompt(PromptFormat("Q: {input}"))
    write_gates(folder / "a", {Q: torch.ones(8)}, kind="sigmoid-gate", metadata=note)
    loaded = load_experts([folder / "a"])
    loaded.save_gates(folder / "copy")
    assert list(noted_prompts(folder / "copy").values()) == [PromptFormat("Q: {input}")]
    loaded.set_gates("a", {Q: torch.ones(8)})
    loaded.save_gates(folder / "anew")
    assert noted_prompts(folder / "anew") == {}
