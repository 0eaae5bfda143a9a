"""What adapters say of their base: PEFT's own loading of the same folder is the judge."""

import copy
import json
import warnings
from inspect import getsource

import peft
import pytest
import torch
import transformers
from builders import _DECODER, _build, tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen2, write_adapter
from patch_cases import error
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.routing.patch import check_patch
from moerge_ext.training.gated_lora import gated_model

IDS = torch.arange(3, 20)[None]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tiny_tied():
    return _build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER, tie_word_embeddings=True))


def save(make, folder, **fields):
    """An adapter as PEFT saves it after some training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves embeddings, that heads are tied, ...
        model = peft.get_peft_model(make(), LoraConfig(**{"r": 3, "lora_alpha": 5} | fields))
        random = torch.Generator().manual_seed(len(str(fields)))
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def by_peft(make, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(make(), str(folder)))


def routed(make, folder, method="expert:e", **options):
    """The logits of a patched model; and nothing of it is left afterwards."""
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with moerge.patch(model, moerge.load_experts({"e": folder}), method, **options):
            assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in before.items()}
            found = logits(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return found


def refused(make, folder, *words, method="merged"):
    model, bank = make(), moerge.load_experts({"e": folder})
    modules = dict(model.named_modules())
    for check in (moerge.patch, check_patch):
        with pytest.raises(ValueError) as caught:
            check(model, bank, method)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert dict(model.named_modules()) == modules


def known_to_peft(fields) -> bool:
    init = fields.get("init_lora_weights", "")
    return fields.keys() <= LoraConfig.__dataclass_fields__.keys() and init in getsource(LoraConfig)


PARTS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(
    "make, fields",
    [
        (tiny_llama, {"init_lora_weights": "pissa", "target_modules": PARTS}),
        (tiny_llama, {"init_lora_weights": "olora", "target_modules": PARTS}),
        (
            tiny_llama,
            {"init_lora_weights": "pissa", "target_modules": PARTS, "use_rslora": True, "rank_pattern": {"q_proj": 7}},
        ),
        (tiny_llama, {"init_lora_weights": "olora", "target_modules": PARTS, "alpha_pattern": {"v_proj": 2}}),
        (tiny_gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (tiny_gpt2, {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
        (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
        (tiny_tied, {"target_modules": ["q_proj", "lm_head"]}),
        (tiny_tied, {"target_modules": ["q_proj"], "ensure_weight_tying": True}),
        (tiny_qwen2, {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
        (tiny_qwen2, {"target_modules": ["o_proj"], "bias": "lora_only"}),
        (tiny_llama, {"target_modules": ["q_proj"], "velora_config": {"num_groups": 4}}),
        (tiny_llama, {"target_modules": ["q_proj"], "monteclora_config": {"num_samples": 4}}),
        (tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    ],
    ids=lambda value: " ".join(str(v) for v in value.values())[:40] if isinstance(value, dict) else value.__name__,
)
def test_equals_peft(make, fields, tmp_path):
    if not known_to_peft(fields):
        pytest.skip("needs a newer PEFT: this one has no such LoRA")
    folder, base = save(make, tmp_path / "e", **fields), logits(make())
    want = by_peft(make, folder)
    assert error(want, base) > 0.1
    for method in ("expert:e", "merged"):
        assert error(routed(make, folder, method), want) < 1e-5
    assert error(routed(make, folder, "arrow", top_k=1), want) < 1e-5


@pytest.mark.parametrize("make, target", [(tiny_bert, "query"), (tiny_llama, "q_proj")], ids=["classifier", "head"])
def test_an_expert_with_a_module_of_its_own(make, target, tmp_path):
    """PEFT saves a classifier of its own accord, any module when asked."""
    task = {"task_type": "SEQ_CLS"} if make is tiny_bert else {"modules_to_save": ["lm_head"]}
    folder = save(make, tmp_path / "e", target_modules=[target], **task)
    want, base = by_peft(make, folder), logits(make())
    assert error(routed(make, folder), want) < 1e-5
    own = "classifier.bias, classifier.weight" if make is tiny_bert else "lm_head.weight"
    refused(make, folder, f"expert 'e': it was trained with its own {own}", "modules=", "'expert:e'")
    model = make()
    with moerge.patch(model, moerge.load_experts({"e": folder}), "expert:e") as handle:
        with handle.disabled():
            assert torch.equal(logits(model), base)
        twin = copy.deepcopy(model)
        assert error(logits(twin), want) < 1e-5
        assert error(logits(model.double()), want) < 1e-5
        model.float()
    # the user may also load it into the model: then any method will do
    live = load_file(folder / WEIGHTS)
    for name in own.split(", "):
        model.get_parameter(name).data.copy_(live[f"base_model.model.{name}"])
    with moerge.patch(model, moerge.load_experts({"e": folder}), "merged"):
        assert error(logits(model), want) < 1e-5


def test_buffers_that_the_model_computes_are_its_own(tmp_path):
    """A state dict of an older version holds the angles of rotary embeddings, which PEFT passes over too."""
    folder = save(tiny_llama, tmp_path / "e", target_modules=["q_proj"])
    held = {"base_model.model.model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(folder / WEIGHTS) | held, folder / WEIGHTS)
    for method in ("expert:e", "merged"):
        assert error(routed(tiny_llama, folder, method), by_peft(tiny_llama, folder)) < 1e-5


def test_the_lora_without_the_head(tmp_path):
    folder = save(tiny_bert, tmp_path / "e", target_modules=["query"], task_type="SEQ_CLS")
    model, theirs = tiny_bert(), peft.PeftModel.from_pretrained(tiny_bert(), str(folder))
    with moerge.patch(model, moerge.load_experts({"e": folder}, modules="query"), "merged"):
        theirs.base_model.model.classifier = model.classifier
        assert error(logits(model), logits(theirs)) < 1e-5


def test_saved_parameters_and_starts_move_with_their_modules(tmp_path):
    """A text model inside of another class: the same weights under other paths."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, ids):
            return self.inner(ids)

    fields = {"target_modules": PARTS, "init_lora_weights": "pissa"}
    folder, ours = save(tiny_llama, tmp_path / "e", **fields), tiny_llama()
    same = {"base_model.model.model.embed_tokens.weight": ours.model.embed_tokens.weight.detach()}
    edit(folder, lambda tensors: tensors.update(same))
    want = by_peft(tiny_llama, folder)
    for rename in ({"": "inner"}, None):
        model = Wrapper()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patch says what it renamed
            handle = moerge.patch(model, moerge.load_experts({"e": folder}, rename=rename), "merged")
        assert error(logits(model), want) < 1e-5
        handle.remove()
    edit(folder, lambda tensors: tensors.update({key: tensor + 1 for key, tensor in same.items()}))
    with pytest.raises(ValueError, match="its own inner.model.embed_tokens.weight"):
        moerge.patch(Wrapper(), moerge.load_experts({"e": folder}, rename={"": "inner"}), "merged")


HEADS = {
    "saved": {"modules_to_save": ["lm_head"], "target_modules": PARTS},
    "with LoRA": {"target_modules": [*PARTS, "lm_head"]},
}


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_a_head_stays_where_the_prefix_of_the_others_changes(fields, tmp_path):
    folder = save(tiny_llama, tmp_path / "e", **fields)
    want = by_peft(tiny_llama, folder)
    tensors = load_file(folder / WEIGHTS)
    moved = {key.replace("base_model.model.model.", "base_model.model."): tensor for key, tensor in tensors.items()}
    save_file(moved, folder / WEIGHTS)
    model, bank = tiny_llama(), moerge.load_experts({"e": folder})
    with pytest.warns(UserWarning, match="were renamed"), moerge.patch(model, bank, "expert:e"):
        assert error(logits(model), want) < 1e-5


@pytest.mark.parametrize(
    "rename", [{"out": "lm_head"}, lambda path: path.replace("out", "lm_head")], ids=["map", "call"]
)
def test_rename_reaches_a_head_saved_beside(rename, tmp_path):
    folder = save(tiny_llama, tmp_path / "e", **HEADS["saved"])
    want = by_peft(tiny_llama, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace("lm_head", "out"): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    with pytest.warns(UserWarning, match="modules_to_save"):
        bank = moerge.load_experts({"e": folder}, rename=rename)
    model = tiny_llama()
    with moerge.patch(model, bank, "expert:e"):
        assert error(logits(model), want) < 1e-5


NAMES = {
    "no prefix": lambda key, tensor: {key.removeprefix("base_model.model."): tensor},
    "state_dict": lambda key, tensor: (
        {
            key.replace("lm_head.", "lm_head.modules_to_save.ant."): tensor,
            key.replace("lm_head.", "lm_head.original_module."): 2 * tensor,
        }
        if "lm_head" in key
        else {key.replace(".weight", ".ant.weight"): tensor}
    ),
}


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_a_head_of_a_file_with_other_names(change, tmp_path):
    """What the LoRA's keys may lack or have besides, those of the head may as well."""
    folder = save(tiny_llama, tmp_path / "e", **HEADS["saved"])
    want = by_peft(tiny_llama, folder)
    changed = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        changed |= change(key, tensor)
    save_file(changed, folder / WEIGHTS)
    assert error(routed(tiny_llama, folder), want) < 1e-5


def test_a_module_of_a_live_model(tmp_path):
    config = LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    live = peft.get_peft_model(tiny_bert(), config)
    for parameter in live.base_model.model.classifier.parameters():
        parameter.data += 0.3
    model = tiny_bert()
    with moerge.patch(model, moerge.load_experts(live), "expert:default"):
        assert error(logits(model), logits(live)) < 1e-5


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "key, tensor, words",
    [
        ("lm_head.base_layer.weight", torch.ones(96, 32), ["trained with its own lm_head.weight"]),
        ("model.embed_tokens.weight", torch.ones(99, 32), ["[99, 32], the model's is [96, 32]", "resized"]),
        ("model.embed_tokens.weight", torch.ones(96, 32), ["save_embedding_layers=False"]),
        ("score.weight", torch.ones(2, 32), ["score.weight [2, 32], which LlamaForCausalLM does not have", "modules="]),
        ("lm_head.weight", torch.ones(5, 32), ["[5, 32], the model's is [96, 32]", "other classes", "modules="]),
        ("model.norm.weight", torch.zeros(32), ["trained with its own model.norm.weight"]),
        ("model.norm.modules_to_save.weight", torch.zeros(32), ["trained with its own model.norm.weight"]),
    ],
)
def test_saved_parameters_that_are_not_the_models(key, tensor, words, tmp_path):
    folder = save(tiny_llama, tmp_path / "e", target_modules=["q_proj"])
    edit(folder, lambda tensors: tensors.update({f"base_model.model.{key}": tensor}))
    refused(tiny_llama, folder, "expert 'e'", *words)
    with pytest.raises(ValueError, match="does not fit"), gated_model(tiny_llama(), folder):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_parameters_that_are_the_models(dtype, tmp_path):
    folder, ours = save(tiny_llama, tmp_path / "e", target_modules=["q_proj"]), tiny_llama()
    saved = {"model.embed_tokens.weight": ours.model.embed_tokens.weight, "model.norm.weight": ours.model.norm.weight}
    added = {f"base_model.model.{key}": tensor.detach().to(dtype) for key, tensor in saved.items()}
    edit(folder, lambda tensors: tensors.update(added))
    assert error(routed(tiny_llama, folder), by_peft(tiny_llama, folder)) < 1e-2


def test_the_tied_head_leaves_the_embedding_alone(tmp_path):
    folder, model = save(tiny_tied, tmp_path / "e", target_modules=["lm_head"]), tiny_tied()
    embedded = model.model.embed_tokens(IDS)
    with moerge.patch(model, moerge.load_experts({"e": folder}), "merged"):
        assert torch.equal(model.model.embed_tokens(IDS), embedded)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(model))


def test_several_starts_on_one_base(tmp_path):
    """PEFT starts a second adapter from what the first has left; here each starts from the base itself."""
    folders = {
        "p": save(tiny_llama, tmp_path / "p", target_modules=PARTS, init_lora_weights="pissa", r=2),
        "q": save(tiny_llama, tmp_path / "q", target_modules=["q_proj"], init_lora_weights="pissa", r=5),
        "o": save(tiny_llama, tmp_path / "o", target_modules=["q_proj"], init_lora_weights="olora"),
        "n": save(tiny_llama, tmp_path / "n", target_modules=["q_proj", "k_proj"]),
    }
    bank, model = moerge.load_experts(folders), tiny_llama()
    ranks = bank.modules[Q].ranks
    for name, folder in folders.items():
        with moerge.patch(model, bank, f"expert:{name}"):
            assert error(logits(model), by_peft(tiny_llama, folder)) < 1e-5
    assert bank.modules[Q].ranks == ranks == (2, 5, 3, 3)
    with (
        moerge.patch(model, bank, "arrow", top_k=2),
        moerge.patch(tiny_llama(), bank.to(dtype=torch.bfloat16), "merged"),
    ):
        assert torch.isfinite(logits(model)).all()


def test_starts_that_cannot_be_computed(tmp_path):
    folder = save(tiny_tied, tmp_path / "tied", target_modules=["lm_head"], init_lora_weights="pissa")
    edit(folder, lambda tensors: tensors.pop("base_model.model.lm_head.base_layer.weight"))
    refused(tiny_tied, folder, "module 'lm_head'", "shared with model.embed_tokens.weight")
    folder = save(tiny_llama, tmp_path / "e", target_modules=["q_proj"], init_lora_weights="olora")

    def quantized():
        model = tiny_llama()
        layer = model.get_submodule(Q)
        layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
        return model

    def offloaded():
        model = tiny_llama()
        model.get_submodule(Q).to("meta")
        return model

    refused(quantized, folder, f"module '{Q}'", "int8", "convert the adapter")
    refused(offloaded, folder, "on the meta device")


def test_gates_are_trained_on_the_start_of_the_expert(tmp_path):
    folder = save(tiny_llama, tmp_path / "e", target_modules=PARTS, init_lora_weights="pissa")
    model = tiny_llama()
    with gated_model(model, folder, gate=False):
        assert error(logits(model), by_peft(tiny_llama, folder)) < 1e-5
    with pytest.raises(ValueError, match="joint=True would write"), gated_model(model, folder, joint=True):
        pass


def test_a_layer_missing_from_the_file(tmp_path):
    """PEFT warns of it; a target that no layer of the file has is said when it is loaded, and once."""
    folder = save(tiny_llama, tmp_path / "e", target_modules=["q_proj", "v_proj"])
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1.self_attn.v_proj" in key])
    bank = moerge.load_experts({"e": folder, "twin": folder})
    with pytest.warns(UserWarning) as caught, moerge.patch(tiny_llama(), bank, "merged"):
        pass
    assert len(caught) == 1 and caught[0].filename == __file__
    said = "model.layers.1.self_attn.v_proj: targeted by the config of 'e', 'twin', whose file holds no weights"
    assert said in str(caught[0].message)
    config = json.loads((folder / CONFIG).read_text()) | {"layers_to_transform": [0]}
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1." in key])
    (folder / CONFIG).write_text(json.dumps(config))
    routed(tiny_llama, folder, "merged")
    part = tiny_llama().get_submodule(V)
    write_adapter(
        tmp_path / "odd",
        {V: (torch.randn(4, part.in_features), torch.randn(part.out_features, 4))},
        target_modules=["layers.0.self_attn.v_proj", "gate_proj"],
    )
    with pytest.warns(UserWarning, match="gate_proj"):
        bank = moerge.load_experts(tmp_path / "odd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moerge.patch(tiny_llama(), bank, "merged")


@pytest.mark.parametrize("targets", [["query", "dense"], ["query", "classifier"]])
def test_a_head_that_is_saved_whole_misses_no_lora(targets, tmp_path):
    """PEFT gives a module that it saves whole no LoRA, whatever target_modules say."""
    config = tiny_bert().config

    def make():
        torch.manual_seed(0)
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**config.to_dict())).eval()

    kind = make if "dense" in targets else tiny_bert
    folder = save(kind, tmp_path / "e", target_modules=targets, task_type="SEQ_CLS")
    assert error(routed(kind, folder), by_peft(kind, folder)) < 1e-5  # without a warning
