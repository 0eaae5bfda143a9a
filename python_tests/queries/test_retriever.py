"""LoraRetriever: a small encoder is trained, the experts are indexed, and queries find them."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, letters

import moerge_ext as moerge
from moerge_ext.methods import get_method
from moerge_ext.queries.load_text_router import load_text_router
from moerge_ext.queries.retriever import INSTRUCTION, index_retriever, pairs_of, train_retriever
from moerge_ext.queries.text_router import FILE

DATA = {name: [f"{word} {other}" for other in "abcdef"] for name, word in WORDS.items()}
QUERIES = ["flying z", "digging y"]


def encoder(folder):
    """A random BERT of two layers as a sentence-transformers model."""
    library = pytest.importorskip("sentence_transformers")
    bert, tokenizer = cases.builders.tiny_bert(), letters()
    bert.bert.save_pretrained(folder / "bert")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "bert")
    library.SentenceTransformer(str(folder / "bert"), device="cpu").save(str(folder / "st"))  # with mean pooling
    return str(folder / "st")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    for library in ("datasets", "accelerate"):
        pytest.importorskip(library)
    root = tmp_path_factory.mktemp("retriever")
    model, base = cases.build("llama"), encoder(root)
    folders = cases.builders.random_experts(model, root / "experts", cases.NAMES, cases.DECODER)
    bank = moerge.load_experts(folders)
    train_retriever(base, DATA, bank, root / "router", rounds=30, lr=1e-3, samples=6, progress=False)
    return root, model, folders, bank, base


def test_a_round_has_two_texts_of_every_task():
    made = list(pairs_of(DATA, 3, 0))
    assert len(made) == 9 and made == list(pairs_of(DATA, 3, 0)) != list(pairs_of(DATA, 3, 1))
    for number, (first, second) in enumerate(made):
        texts = list(DATA.values())[number % 3]
        assert first != second and first in texts and second in texts


def test_scores_are_cosines_to_the_mean_of_the_examples(setup):
    root, _, _, bank, _ = setup
    library = pytest.importorskip("sentence_transformers")
    router = load_text_router(root / "router", bank)
    model = library.SentenceTransformer(str(root / "router" / "encoder"), device="cpu")

    def embed(texts):
        vectors = model.encode([INSTRUCTION + text for text in texts], convert_to_tensor=True)
        return torch.nn.functional.normalize(vectors, dim=1)

    centroids = torch.stack([embed(texts).mean(0) for texts in DATA.values()])  # six samples of six
    want = torch.nn.functional.cosine_similarity(embed(QUERIES)[:, None], centroids[None], dim=-1)
    torch.testing.assert_close(router.scores(QUERIES, {}), want, rtol=1e-4, atol=1e-5)
    assert router.scores(QUERIES, {}).argmax(1).tolist() == [1, 0]
    assert sorted(path.name for path in (root / "router").iterdir()) == ["encoder", FILE]


@pytest.mark.parametrize("method", ("lora_retriever", "lora_retriever_fusion", "lora_retriever_selection"))
def test_mixture_fusion_selection(method, setup):
    root, model, _, bank, _ = setup
    router = load_text_router(root / "router", bank)
    row = get_method(method)
    options = row.configure(**({} if method.endswith("selection") else {"keep": 2}))[2]
    best = router.scores(QUERIES, {}).topk(options["keep"], 1).indices
    weights = torch.zeros(2, 3).scatter(1, best, 1 / options["keep"])
    assert torch.equal(router.bias(QUERIES, row, options, bank.names), weights)
    inputs = cases.batch("llama", rows=2)
    with moerge.patch(model, bank, method, **options) as handle:
        handle.router = router
        with handle.queries(QUERIES):
            got = cases.logits(model, **inputs)
    aggregation = "factored" if method.endswith("fusion") else "output"
    with moerge.patch(model, bank, "given", aggregation=aggregation) as handle, handle.affinities(weights):
        assert cases.error(got, cases.logits(model, **inputs)) < 1e-5


def test_other_experts_and_later_ones(setup, tmp_path):
    root, _, folders, bank, base = setup
    two = moerge.load_experts({name: folders[name] for name in ("ant", "bee")})
    with pytest.raises(ValueError, match="cat unknown here"):
        load_text_router(root / "router", two)
    with pytest.raises(ValueError, match="holds a router already"):
        train_retriever(base, DATA, bank, root / "router")
    with pytest.raises(ValueError, match="fewer than two texts for bee"):
        train_retriever(base, {**DATA, "bee": ["one", "one"]}, bank, tmp_path / "x")
    with pytest.raises(ValueError, match="held out but unknown: dog"):
        train_retriever(base, DATA, bank, tmp_path / "x", held_out=["dog"])
    assert not (tmp_path / "x").exists()
    options = {"rounds": 2, "progress": False, "held_out": ["cat"]}
    train_retriever(base, DATA, bank, tmp_path / "r", **options)
    index_retriever(tmp_path / "r", {name: DATA[name] for name in ("ant", "bee")}, two)
    assert load_text_router(tmp_path / "r", two).names == ("ant", "bee")
    with pytest.raises(ValueError, match="keep must be a positive integer"):
        get_method("lora_retriever").configure(keep=None)
