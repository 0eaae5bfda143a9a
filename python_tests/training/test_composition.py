"""`train_calm`: what of a composition is trained, resumption, refusals."""

from __future__ import annotations

import pytest
import torch
from builders import tiny_llama
from calm_cases import anchor_and_augmenting, batch, composition

import moerge_ext as moerge
from moerge_ext.models.pretrained import load_model
from moerge_ext.training.composition import CHECKPOINT_FOLDER


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return anchor_and_augmenting(tmp_path_factory.mktemp("calm"))[2]


def test_the_cross_attention_is_trained_and_nothing_else(paths, tmp_path):
    model = composition(paths, trained=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = moerge.train_calm(model, [batch()], tmp_path, steps=12, lr=0.02, validation=[batch()], progress=False)
    assert result.validation[12] < result.validation[0] - 0.2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("cross."), name
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    again = load_model(str(tmp_path), dtype="auto", device="cpu")
    with torch.no_grad():
        assert again(**batch()).loss.item() == pytest.approx(result.validation[12], rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_numbers(paths, tmp_path):
    def run(folder, data, **more):
        options = {"steps": 6, "lr": 0.02, "progress": False, **more}
        return moerge.train_calm(composition(paths, trained=False), data, tmp_path / folder, **options)

    def killed():
        yield from [batch()] * 3
        raise KeyboardInterrupt

    whole = run("whole", [batch()])
    with pytest.raises(KeyboardInterrupt):
        run("cut", killed())
    assert [file.name for file in (tmp_path / "cut").iterdir()] == [CHECKPOINT_FOLDER]
    resumed = run("cut", [batch()], resume=True)
    assert resumed.losses == whole.losses and not resumed.already
    assert run("cut", [batch()], resume=True).already
    with pytest.raises(ValueError, match="config.json is there already: name another folder"):
        run("cut", [batch()])
    with pytest.raises(ValueError, match="LlamaForCausalLM is no composition: make one with"):
        moerge.train_calm(tiny_llama(), [batch()], tmp_path / "no", progress=False)
