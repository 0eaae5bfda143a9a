"""What a model is wrapped in is looked through: by load_experts, patch and get_handle."""

from types import SimpleNamespace

import pytest
import torch
from builders import random_experts, tiny_bert, tiny_llama
from torch import nn

from moerge_ext.experts.bank import load_experts
from moerge_ext.models.wrappers import unwrapped
from moerge_ext.routing.patch import get_handle, patch

TARGETS = ["q_proj", "down_proj"]


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compiled(model)),
    "nothing": lambda model: model,
}


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_wrapped_model_is_patched_inside(tmp_path, tokens, wrap, ran_before):
    bank = load_experts(random_experts(tiny_llama(), tmp_path, ["a", "b"], TARGETS))
    plain = tiny_llama()
    with torch.no_grad():
        base = plain(tokens).logits
        with patch(plain, bank):
            expected = plain(tokens).logits
        model = tiny_llama()
        wrapped = wrap(model)
        if ran_before:
            torch.testing.assert_close(wrapped(tokens).logits, base)
        handle = patch(wrapped, bank)
        assert get_handle(wrapped) is get_handle(model) is handle and handle.model is model
        torch.testing.assert_close(wrapped(tokens).logits, expected)
        with handle.record() as trace:
            wrapped(tokens)
        assert trace.share().sum() == pytest.approx(1)
        handle.remove()
        torch.testing.assert_close(wrapped(tokens).logits, base)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_peft_model_gives_its_experts(wrap):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    bank, plain = load_experts(wrap(model)), load_experts(model)
    assert bank.modules.keys() == plain.modules.keys()
    assert all(torch.equal(bank.modules[path].lora_B, plain.modules[path].lora_B) for path in plain.modules)


def sentence_transformer(folder):
    """A SentenceTransformer over a tiny BERT, from files."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(**{**tiny_bert().config.to_dict(), "num_labels": 1})
    BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_a_sentence_transformer(tmp_path):
    """Its adapters are saved under the paths of the transformers model inside."""
    from peft import LoraConfig

    model = sentence_transformer(tmp_path / "model")
    inside = unwrapped(model)
    assert type(inside).__name__ == "BertModel"
    bank = load_experts(random_experts(inside, tmp_path, ["a", "b"], ["query", "value"]))
    before = model.encode("a b c")
    with patch(model, bank, top_k=1) as handle:
        assert get_handle(model) is handle
        assert abs(model.encode("a b c") - before).max() > 1e-3
    assert (model.encode("a b c") == before).all()
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    live = load_experts(model)
    assert set(live.modules) == {path for path in bank.modules if path.endswith("query")}


def test_what_cannot_be_looked_through(tmp_path):
    bank = load_experts(random_experts(tiny_llama(), tmp_path, ["a"], TARGETS))
    scripted = torch.jit.script(nn.Linear(2, 2))
    for use in (lambda model: patch(model, bank), get_handle, unwrapped):
        with pytest.raises(ValueError, match="TorchScript"):
            use(scripted)
        with pytest.raises(ValueError, match="torch module, got SimpleNamespace: pass its .model"):
            use(SimpleNamespace(model=nn.Linear(2, 2)))
        with pytest.raises(ValueError, match="torch module, got str"):
            use("model")
    with pytest.raises(ValueError, match="TorchScript"):
        load_experts(scripted)
