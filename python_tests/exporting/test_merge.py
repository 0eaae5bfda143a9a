"""A merge of experts as a PEFT folder and as a full model, against PEFT and against our own routed merge."""

from __future__ import annotations

import copy
import shutil

import builders
import patch_cases as cases
import pytest
import torch
from patch_cases import batch, error, logits
from torch import nn

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.experts.prompt_notes import note_of_prompt, noted_prompts
from moerge_ext.exporting import full_model as exporting
from moerge_ext.exporting import merge as exporting_merge
from moerge_ext.exporting.products import METHODS

peft = pytest.importorskip("peft")
RANKS = {"ant": 4, "bee": 2, "cat": 8}
WEIGHTS = {"ant": 0.7, "bee": -0.2, "cat": 1.5}


def pool(family, folder, **options):
    model = cases.build(family)
    return model, cases.bank(family, model, folder, rank=RANKS, gates=False, **options)


def routed(model, experts, method, family):
    with moerge.patch(model, experts, method):
        return logits(model, **batch(family))


def by_peft(model, folder, family):
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), **batch(family))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_peft_loads_it_and_equals_our_merge(family, method, tmp_path):
    model, experts = pool(family, tmp_path)
    want = routed(model, experts, method, family)
    assert error(want, logits(model, **batch(family))) > 1e-2
    made = moerge.merge_experts(experts, tmp_path / "out", method=method)
    assert set(made.ranks.values()) == {14 if method == "merged" else 8} and made.error == 0 and made.worst is None
    assert error(by_peft(model, tmp_path / "out", family), want) < 1e-5
    again = moerge.load_experts(tmp_path / "out")
    assert error(routed(model, again, "expert:out", family), want) < 1e-5 and again.base_model == "tiny"
    moerge.merge_experts(experts, tmp_path / "full", method=method, model=model, full=True)
    assert error(logits(type(model).from_pretrained(tmp_path / "full"), **batch(family)), want) < 1e-5
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    files = [file for folder in ("out", "full") for file in (tmp_path / folder).iterdir()]
    assert len({file.stat().st_mode for file in files}) == 1  # safetensors writes private files


def test_the_model_is_left_as_it_was(tmp_path):
    model, experts = pool("llama", tmp_path)
    before = cases.snapshot(model)
    moerge.merge_experts(experts, tmp_path / "full", model=model, full=True)
    assert cases.same(before, cases.snapshot(model))


@pytest.mark.parametrize("method", METHODS)
def test_weights(tmp_path, method):
    """Against the sum written down with what `load_experts` has of each expert."""
    model, experts = pool("llama", tmp_path)
    moerge.merge_experts(experts, tmp_path / "out", method=method, weights=WEIGHTS)
    got = moerge.load_experts(tmp_path / "out")
    each = torch.tensor(list(WEIGHTS.values()))
    for path, module in experts.modules.items():
        a, b = module.lora_A, module.lora_B
        if method == "merged":
            want = torch.einsum("e,eor,erd->od", each, b, a)
        else:
            want = torch.einsum("e,eor->or", each, b) @ torch.einsum("e,erd->rd", each, a)
        assert torch.allclose(got.modules[path].lora_B[0] @ got.modules[path].lora_A[0], want, atol=1e-5)
    moerge.merge_experts(experts, tmp_path / "one", method=method, weights={"ant": 0, "bee": 1, "cat": 0})
    alone = routed(model, experts, "expert:bee", "llama")
    assert error(by_peft(model, tmp_path / "one", "llama"), alone) < 1e-5


def test_a_rank_is_the_best_of_its_rank_and_says_its_error(tmp_path):
    model, experts = pool("llama", tmp_path)
    made = moerge.merge_experts(experts, tmp_path / "out", rank=5)
    assert set(made.ranks.values()) == {5}
    got, lost, whole, shares = moerge.load_experts(tmp_path / "out"), 0.0, 0.0, {}
    for path, module in experts.modules.items():
        exact = (module.lora_B.double() @ module.lora_A.double()).mean(0)
        left = exact - got.modules[path].lora_B[0].double() @ got.modules[path].lora_A[0].double()
        best = torch.linalg.svdvals(exact)[5:].square().sum()
        assert torch.allclose(left.square().sum(), best, rtol=1e-4)
        lost, whole = lost + left.square().sum(), whole + exact.square().sum()
        shares[path] = (left.norm() / exact.norm()).item()
    assert made.error == pytest.approx(float(lost / whole) ** 0.5, rel=1e-4) and 0.05 < made.error < 0.95
    assert made.worst == (max(shares, key=shares.get), pytest.approx(max(shares.values()), rel=1e-4))
    assert moerge.merge_experts(experts, tmp_path / "enough", rank=14).error == 0
    assert error(by_peft(model, tmp_path / "out", "llama"), routed(model, got, "expert:out", "llama")) < 1e-5


def test_biases_absent_modules_and_sixteen_bits(tmp_path):
    """Each expert has its own modules, one of them an output bias, all in float16."""
    model = cases.build("qwen2")
    random = torch.Generator().manual_seed(0)
    sizes = {path: (d, o) for path, d, o in builders.linear_sizes(model, ["q_proj", "v_proj", "up_proj"])}
    halves = lambda *shape: torch.randn(*shape, generator=random).half() / 4  # noqa: E731
    for name, leaf in (("a", "q_proj"), ("b", "v_proj"), ("c", "")):
        modules = {path: (halves(4, d), halves(o, 4)) for path, (d, o) in sizes.items() if path.endswith(leaf)}
        if name == "a":
            modules = {path: (*pair, halves(sizes[path][1])) for path, pair in modules.items()}
        builders.write_adapter(tmp_path / name, modules, alpha=6, lora_bias=name == "a")
    experts = moerge.load_experts([tmp_path / name for name in "abc"], dtype=torch.float16)
    for method in METHODS:
        want = routed(model, experts, method, "qwen2")
        moerge.merge_experts(experts, tmp_path / method, method=method)
        assert error(by_peft(model, tmp_path / method, "qwen2"), want) < 2e-3
        with pytest.raises(ValueError, match="brings? an output bias, and the layer has none|up_proj"):
            moerge.merge_experts(moerge.load_experts([tmp_path / method]), tmp_path / "no", model=model, full=True)
    biased = moerge.load_experts([tmp_path / "a", tmp_path / "b"])
    moerge.merge_experts(biased, tmp_path / "full", model=model, full=True)  # q and v have biases of their own
    full = type(model).from_pretrained(tmp_path / "full")
    assert error(logits(full, **batch("qwen2")), routed(model, biased, "merged", "qwen2")) < 1e-5


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"method": "mean", "rank": 0}, ["method must be one of merged, merged_factors", "rank must be a positive"]),
        ({"weights": {"ant": 1.0, "dog": 1.0}}, ["weights for dog", "no weight for bee, cat"]),
        ({"weights": WEIGHTS | {"ant": float("nan")}}, ["finite numbers, got ant=nan"]),
        ({"weights": dict.fromkeys(WEIGHTS, 0.0)}, ["all weights are 0"]),
        ({"full": True}, ["pass the model"]),
    ],
)
def test_arguments(tmp_path, options, texts):
    _, experts = pool("llama", tmp_path)
    with pytest.raises(ValueError) as caught:
        moerge.merge_experts(experts, tmp_path / "out", **options)
    assert all(text in str(caught.value) for text in texts) and not (tmp_path / "out").exists()


def test_a_bank_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="must be an ExpertBank, from load_experts"):
        moerge.merge_experts([tmp_path], tmp_path / "out")


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    _, experts = pool("llama", tmp_path)
    with pytest.raises(ValueError, match="is there already"):
        moerge.merge_experts(experts, tmp_path / "ant")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out"):
        moerge.merge_experts(experts, tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()

    def full_disk(*_args, **_options):
        raise OSError(28, "No space left on device", "some.tmp")

    with monkeypatch.context() as patched:
        patched.setattr("moerge_ext.exporting.merge.save_file", full_disk)
        with pytest.raises(OSError, match="No space left.*empty"):
            moerge.merge_experts(experts, tmp_path / "empty")
    assert not any((tmp_path / "empty").iterdir()) and not [f for f in tmp_path.iterdir() if f.name[0] == "."]
    moerge.merge_experts(experts, tmp_path / "empty")
    assert moerge.load_experts(tmp_path / "empty").names == ("empty",)


def test_layers_that_cannot_take_it(tmp_path):
    model, experts = pool("llama", tmp_path)
    other, _ = pool("gpt2", tmp_path / "other")
    with pytest.raises(
        ValueError, match="cannot be merged on this model: .*were made for 'tiny'; this model is a GPT2"
    ):
        moerge.merge_experts(experts, tmp_path / "out", model=other)
    (down,) = [p for p in experts.modules if p.endswith("1.mlp.down_proj")]
    layer = model.get_submodule(down)
    sizes = (layer.in_features, layer.out_features, False)
    scaled = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})(*sizes)
    codes = type("Codes", (nn.Linear,), {})(*sizes)
    codes.weight = nn.Parameter(codes.weight.char(), requires_grad=False)
    refused = {
        nn.Bilinear(2, *sizes): "it is a .*Bilinear, no plain linear layer .quantized",
        scaled: "it is a .*Scaled, which does not compute x W",
        codes: "its weight cannot be changed: it is stored as torch.int8",
    }
    for other_layer, text in refused.items():
        model.set_submodule(down, other_layer)
        with pytest.raises(ValueError, match=f"{down}: {text}"):
            exporting.check_can_hold(model, {down: False})
    model.set_submodule(down, layer)
    up = down.replace("down", "up").replace("1", "0")
    model.get_submodule(up).weight = model.get_submodule(up.replace("up", "gate")).weight
    with pytest.raises(ValueError, match="its weight is shared with"):
        moerge.merge_experts(experts, tmp_path / "out", model=model, full=True)
    assert not (tmp_path / "out").exists()


class OwnForward(nn.Linear):
    """As FalconLinear: the same numbers by other words."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def test_a_linear_layer_with_its_own_forward_takes_it(tmp_path):
    model, experts = pool("llama", tmp_path)
    down = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(down)
    own = OwnForward(layer.in_features, layer.out_features, bias=False)
    own.weight = layer.weight
    model.set_submodule(down, own)
    want = routed(model, experts, "merged", "llama")
    moerge.merge_experts(experts, tmp_path / "full", model=model, full=True)
    assert error(logits(type(model).from_pretrained(tmp_path / "full"), **batch("llama")), want) < 1e-5


def test_experts_that_need_their_base(tmp_path):
    """A head of its own, a start taken from the base, parts of fused experts."""
    model = cases.build("llama")
    path = "model.layers.0.mlp.up_proj"
    pair = (torch.randn(4, 32) / 6, torch.randn(48, 4) / 2)
    builders.write_adapter(tmp_path / "pissa", {path: pair}, alpha=4, init_lora_weights="pissa")
    moe = "model.layers.0.mlp.experts.3.up_proj"
    builders.write_adapter(tmp_path / "moe", {moe: pair})
    for name, text in (("pissa", "began with a part of the base's weights .pissa."), ("moe", "parts of fused experts")):
        with pytest.raises(ValueError, match=text):
            moerge.merge_experts(moerge.load_experts(tmp_path / name), tmp_path / "out")
    bank = moerge.load_experts(tmp_path / "pissa")
    made = moerge.merge_experts(bank, tmp_path / "out", model=model)
    assert made.ranks == {path: 8}
    want = routed(model, bank, "merged", "llama")
    assert error(by_peft(model, tmp_path / "out", "llama"), want) < 1e-5
    assert error(by_peft(model, tmp_path / "pissa", "llama"), want) < 1e-4


def test_the_prompt_that_all_were_trained_with_is_noted(tmp_path):
    from safetensors.torch import load_file, save_file

    _, experts = pool("llama", tmp_path)
    form = moerge.PromptFormat("Q: {input}")
    for count, name in enumerate(RANKS, 1):
        file = tmp_path / name / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt", **note_of_prompt(form)})
        moerge.merge_experts(experts, tmp_path / f"out{count}")
        noted = noted_prompts(tmp_path / f"out{count}")
        assert list(noted.values()) == ([form] if count == len(RANKS) else [])


def test_command(tmp_path, capsys):
    model, experts = pool("llama", tmp_path)
    model.save_pretrained(tmp_path / "model")
    builders.make_tokenizer(tmp_path / "model")
    words = ["merge", "--experts", *(tmp_path / name for name in RANKS), "--no-progress"]

    def run(*more):
        return cli.main([*map(str, [*words, *more])])

    assert run("--output", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}: 14 modules, rank 14 (exact)\n"
    assert run("--output", tmp_path / "r3", "--rank", 3, "--method", "merged_factors") == 0
    assert "rank 3 (" in (said := capsys.readouterr().out) and "% off in all, " in said
    assert run("--output", tmp_path / "full", "--full") == 2
    assert "pass the --model" in capsys.readouterr().err
    assert run("--output", tmp_path / "full", "--full", "--model", tmp_path / "model") == 0
    full = type(model).from_pretrained(tmp_path / "full")
    assert error(logits(full, **batch("llama")), routed(model, experts, "merged", "llama")) < 1e-5
    assert (tmp_path / "full" / "tokenizer.json").exists()
    weights = [word for name, w in WEIGHTS.items() for word in ("--weight", f"{name}={w}")]
    assert run("--output", tmp_path / "w", *weights, "--modules", "q_proj") == 0
    assert "2 modules, rank 14" in capsys.readouterr().out
    assert run("--output", tmp_path / "x", "--weight", "ant=much") == 2
    assert "--weight takes NAME=W, a number, got 'much'" in capsys.readouterr().err
    assert run("--output", tmp_path / "out") == 2 and "is there already" in capsys.readouterr().err


def test_fused_experts_and_what_is_no_lora_come_with_a_way_out(tmp_path, capsys):
    import moe_cases

    model = moe_cases.build("mixtral")
    for name, linear in (("with", "q_proj"), ("alone", "")):
        moe_cases.adapter("mixtral", model, tmp_path / name, 0, layout="apart", linear=linear)
    model.save_pretrained(tmp_path / "model")
    words = ["merge", "--no-progress", "--output", str(tmp_path / "out"), "--experts"]
    with_model = [str(tmp_path / "with"), "--model", str(tmp_path / "model")]
    for call in (with_model[:1], with_model):
        assert cli.main([*words, *call]) == 2
        out = capsys.readouterr().err.rpartition("or take the rest alone by --modules ")[2]
        assert out == f"'{exporting_merge.OTHERS}'\n"
        assert cli.main([*words, *call, "--modules", out.strip()[1:-1]]) == 0
        assert "2 modules" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "out")
    assert cli.main([*words, str(tmp_path / "alone")]) == 2
    assert "they have nothing besides" in capsys.readouterr().err
    llama = cases.build("llama")
    builders.ia3_expert(llama, tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"'ia3' \(\(IA\)3\) is no LoRA and cannot be merged: leave it out"):
        moerge.merge_experts(moerge.load_experts(tmp_path / "ia3", base=llama), tmp_path / "out")
    assert cli.main([*words, str(tmp_path / "ia3")]) == 2
    assert "is not in the file: pass --model, the base model" in capsys.readouterr().err
