"""PEFT's other kinds of adapters as LoRA: against what PEFT computes with the adapter itself."""

import json
import warnings

import builders
import pytest
import torch
from patch_cases import error, logits, tokens
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.commands.main import main
from moerge_ext.experts.formats.foreign import MERGES
from moerge_ext.experts.to_lora import best_product, convert_to_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TARGETS = ["q_proj", "down_proj"]
SETTINGS = {
    "LOHA": {"r": 2, "alpha": 4},
    "LOKR": {"r": 2, "alpha": 4, "decompose_factor": 4},
    "VERA": {"r": 3, "target_modules": ["q_proj"]},
    "HIRA": {"r": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PVERA": {"target_modules": ["q_proj"]},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "target_modules": ["q_proj"]},
    "WAVEFT": {"n_frequency": 20},
}


def config_of(kind):
    """Skips where PEFT does not know the kind."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN

    if kind == "DoRA":
        return peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS)
    if kind not in KNOWN:
        pytest.skip(f"needs a newer PEFT: this one has no {kind}")
    return KNOWN[kind](**{"target_modules": TARGETS} | SETTINGS.get(kind, {}))


def adapter(kind, folder, build=builders.tiny_llama, config=None, answer=None):
    """(the folder, PEFT's logits with it, or what `answer` takes of its output)"""
    model = peft.get_peft_model(build(), config or config_of(kind))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if answer is not None:
        return folder, answer(model.eval()(input_ids=tokens())).detach()
    return folder, logits(model.eval(), input_ids=tokens())


def routed(folder, model):
    with moerge.patch(model, moerge.load_experts({"x": folder}), "expert:x"):
        return logits(model, input_ids=tokens())


def reads_what_it_saved(kind, folder) -> bool:
    model = peft.get_peft_model(builders.tiny_llama(), config_of(kind))
    return not peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors")).unexpected_keys


@pytest.mark.parametrize("kind, rank", [("LOHA", 4), ("LOKR", 8), ("VERA", 3)])
def test_what_has_a_small_rank_is_exact(kind, rank, tmp_path):
    folder, want = adapter(kind, tmp_path / "own")
    if not reads_what_it_saved(kind, folder):
        pytest.skip("needs a newer PEFT: this one leaves out the projections of a file")
    model = builders.tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = convert_to_lora(folder, tmp_path / "lora", model, progress=False)
    assert made.kind == kind and set(made.ranks.values()) == {rank} and made.worst[1] < 1e-6
    assert error(routed(made.path, model), want) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["HIRA", "DoRA"])
def test_what_changes_the_weight_itself_is_bounded(kind, tmp_path):
    folder, want = adapter(kind, tmp_path / "own")
    model = builders.tiny_llama()
    with pytest.raises(ValueError, match="more numbers than the matrix has") as caught:
        convert_to_lora(folder, tmp_path / "lora", model, progress=False)
    assert "down_proj" in str(caught.value) and not (tmp_path / "lora").exists()
    errors = []
    for rank in (2, 8, 32):
        made = convert_to_lora(folder, tmp_path / f"lora{rank}", model, rank=rank, progress=False)
        errors.append((made.worst[1], error(routed(made.path, model), want)))
    assert errors[0][0] > errors[1][0] > errors[2][0] and errors[2][0] < 1e-6 and errors[2][1] < 1e-5
    assert errors[0][1] > errors[2][1]
    made = convert_to_lora(folder, tmp_path / "bounded", model, max_error=0.3, progress=False)
    assert made.worst[1] <= 0.3 and max(made.ranks.values()) < 32
    with pytest.raises(ValueError, match="rank 1 leaves a relative error of .*, more than 0.01"):
        convert_to_lora(folder, tmp_path / "no", model, rank=1, max_error=0.01, progress=False)


@pytest.mark.parametrize("kind", sorted(MERGES - {"LOHA", "LOKR", "VERA", "HIRA"}))
def test_every_kind_that_merges_becomes_a_lora(kind, tmp_path):
    folder, want = adapter(kind, tmp_path / "own")
    model = builders.tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = convert_to_lora(folder, tmp_path / "lora", model, rank=32, progress=False)
    assert made.worst[1] < 1e-6 and error(routed(made.path, model), want) < 1e-5
    assert error(logits(model, input_ids=tokens()), want) > 1e-3  # the adapter changes something
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("kind", ["ROAD", "GLORA"])
def test_a_change_of_the_bias_is_refused(kind, tmp_path):
    """Their layers change the bias too, where there is one; the merged weight alone says nothing of it."""

    def biased():
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        model.model.layers[0].self_attn.q_proj.bias.data.normal_()
        return model

    folder, _ = adapter(kind, tmp_path / "own", biased)
    with pytest.raises(ValueError, match="q_proj: PEFT changes more than the weight here, such as the bias"):
        convert_to_lora(folder, tmp_path / "lora", biased(), rank=32, progress=False)
    assert not (tmp_path / "lora").exists()


def test_a_dora_of_conv1d(tmp_path):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)
    folder, want = adapter("DoRA", tmp_path / "own", builders.tiny_gpt2, config)
    model = builders.tiny_gpt2()
    made = convert_to_lora(folder, tmp_path / "lora", model, rank=96, progress=False)
    assert error(routed(made.path, model), want) < 1e-5


def test_the_best_of_a_rank():
    delta = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(delta)
    a, b, lost = best_product(delta, 3, None)
    assert a.shape == (3, 7) and b.shape == (9, 3)
    assert lost == pytest.approx((values[3:].norm() / values.norm()).item(), rel=1e-5)
    a, b, lost = best_product(torch.zeros(9, 7, dtype=torch.float64), None, None)
    assert a.shape == (1, 7) and not (b @ a).any() and lost == 0


def test_refusals(tmp_path):
    folder, _ = adapter("LOHA", tmp_path / "own")
    model = builders.tiny_llama()
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    stored, said = load_file(weights), json.loads(config.read_text())

    def refused(words, tensors=stored, base=model, **fields):
        save_file(tensors, weights)
        config.write_text(json.dumps(said | fields))
        with pytest.raises(ValueError, match=words):
            convert_to_lora(folder, tmp_path / "out", base, progress=False)
        assert not (tmp_path / "out").exists()

    first = next(iter(stored))
    refused("is not in the file", {key: tensor for key, tensor in stored.items() if key != first})
    refused("belongs to no layer", stored | {"base_model.model.other.hada_w1_a": torch.ones(1)})
    refused("NaN or infinite", stored | {first: torch.full_like(stored[first], torch.nan)})
    refused("modules_to_save must be a list of names, got lm_head", modules_to_save="lm_head")
    head = "base_model.model.lm_head.weight"
    refused(r"lm_head.weight is \[3\] in the file, ", stored | {head: torch.ones(3)}, modules_to_save=["lm_head"])
    refused("got 'LN_TUNING'", peft_type="LN_TUNING")
    refused("to a LoRA: it is a LoRA already: load it as it is$", peft_type="LORA", init_lora_weights="pissa")
    refused("it is .IA.3, which experts can be: load it", base=None, peft_type="IA3")
    refused("it takes base=MODEL", base=None)
    with pytest.raises(ValueError, match="rank must be a positive integer.*max_error must be between"):
        convert_to_lora(folder, tmp_path / "out", model, rank=0, max_error=2)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="safetensors is missing"):
        convert_to_lora(folder, tmp_path / "out", model)


def test_whole_modules_are_kept(tmp_path):
    """Of a classifier, whose head PEFT saves unasked; the base keeps its own."""
    config = peft.LoHaConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS", modules_to_save=["pooler"])
    folder, want = adapter("LOHA", tmp_path / "own", builders.tiny_bert, config)
    assert "classifier" in json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    model = builders.tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert_to_lora(folder, tmp_path / "lora", model, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert error(routed(tmp_path / "lora", model), want) < 1e-5
    adapted = peft.PeftModel.from_pretrained(builders.tiny_bert(), tmp_path / "lora").eval()
    assert error(logits(adapted, input_ids=tokens()), want) < 1e-5


def test_whole_modules_by_the_end_of_their_names(tmp_path):
    """PEFT keeps input_layernorm too where "layernorm" is named."""
    config = peft.LoHaConfig(r=2, target_modules=TARGETS, modules_to_save=["layernorm"])
    folder, want = adapter("LOHA", tmp_path / "own", config=config)
    convert_to_lora(folder, tmp_path / "lora", builders.tiny_llama(), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of "layernorm" the file holds nothing
        assert error(routed(tmp_path / "lora", builders.tiny_llama()), want) < 1e-5


@pytest.mark.parametrize("task", ["SEQ_CLS", None, "FEATURE_EXTRACTION"])
def test_the_command_loads_the_class_that_the_adapter_is_of(task, tmp_path, capsys):
    """Also where the folder has another number of labels, or is a text model, whose head the adapter replaces."""
    auto = transformers.AutoModel if task == "FEATURE_EXTRACTION" else transformers.AutoModelForSequenceClassification
    stored = builders.tiny_llama()
    if task is None:  # then the folder says which class
        stored = transformers.LlamaForSequenceClassification(stored.config)
    stored.save_pretrained(tmp_path / "base")

    def build():
        torch.manual_seed(2)
        more = {} if auto is transformers.AutoModel else {"num_labels": 5, "ignore_mismatched_sizes": True}
        return auto.from_pretrained(tmp_path / "base", **more)

    config = peft.LoHaConfig(r=2, target_modules=TARGETS, task_type=task)
    if task is None:
        config.modules_to_save = ["score"]
    folder, want = adapter("LOHA", tmp_path / "own", build, config, lambda out: out[0])
    words = ["convert", "--to-lora", folder, tmp_path / "out", "--model", tmp_path / "base", "--no-progress"]
    assert main([*map(str, words)]) == 0
    assert "newly" not in capsys.readouterr().err
    adapted = peft.PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    assert error(adapted(input_ids=tokens())[0].detach(), want) < 1e-5


def test_layers_that_the_folder_of_the_base_lacks_are_refused(tmp_path):
    transformers.BertForMaskedLM(builders.tiny_bert().config).save_pretrained(tmp_path / "base")  # without a pooler
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["query", "pooler.dense"], task_type="SEQ_CLS")
    folder, _ = adapter("DoRA", tmp_path / "own", builders.tiny_bert, config)
    with pytest.raises(ValueError, match=r"- bert.pooler.dense: the base's folder has no weights of it"):
        convert_to_lora(folder, tmp_path / "out", tmp_path / "base", rank=2, progress=False)


def test_a_folder_by_a_relative_path(tmp_path, monkeypatch):
    folder, model = adapter("LOHA", tmp_path / "own")[0], builders.tiny_llama()
    monkeypatch.chdir(folder.parent)
    assert convert_to_lora(folder.name, "out", model, progress=False).kind == "LOHA"
    monkeypatch.chdir(folder)
    assert convert_to_lora(".", tmp_path / "again", model, progress=False).kind == "LOHA"


def test_the_command(tmp_path, capsys):
    folder, _ = adapter("LOHA", tmp_path / "own")
    builders.tiny_llama().save_pretrained(tmp_path / "base")
    call = ["convert", str(folder), str(tmp_path / "out"), "--to-lora"]
    assert main(call) != 0 and "convert: it takes --model MODEL, which the" in capsys.readouterr().err
    assert main([*call, "--base", "base", "--rank", "0"]) != 0
    assert capsys.readouterr().err == "moerge convert: --rank must be a positive integer, got 0\n"
    assert main([*call, "--base", str(tmp_path / "base"), "--rank", "2", "--no-progress"]) == 0
    assert "LOHA of 4 modules as LoRA of rank 2; largest relative error 0." in capsys.readouterr().out


def test_the_command_says_its_options_by_name_and_what_it_only_copied(tmp_path, capsys):
    folder, _ = adapter("DoRA", tmp_path / "own")
    builders.tiny_llama().save_pretrained(tmp_path / "base")
    call = ["convert", str(folder), str(tmp_path / "out"), "--to-lora", "--model", str(tmp_path / "base")]
    assert main([*call, "--no-progress"]) == 2
    assert (said := capsys.readouterr().err).endswith("allow a loss by --rank R or --max-error E\n")
    assert "is_gradient" not in said
    for init, told in (("pissa", "copied as it was: it still needs the base that its pissa start"), (True, "a PEFT")):
        config = peft.LoraConfig(r=2, init_lora_weights=init, target_modules=TARGETS)
        source, _ = adapter("DoRA", tmp_path / f"{init}", config=config)
        assert main(["convert", str(source), str(tmp_path / f"{init}-out")]) == 0
        assert told in capsys.readouterr().out
