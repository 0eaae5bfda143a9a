"""Scores of "What the Weight?", and the rows that average parameters by them."""

from __future__ import annotations

from dataclasses import replace

import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, bag_of_words, fake_embedder, letters

import moerge_ext as moerge
from moerge_ext.evaluation import identity
from moerge_ext.methods import get_method
from moerge_ext.queries.load_text_router import load_text_router
from moerge_ext.queries.tfidf import kept, train_tfidf

DATA = {name: [f"{word} {other}" for other in ("one", "two", "three")] for name, word in WORDS.items()}
QUERIES = ["flying one", "purring flying two"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    model = cases.build("llama")
    folders = cases.builders.random_experts(model, tmp_path_factory.mktemp("bank"), cases.NAMES, cases.DECODER)
    for name, folder in folders.items():
        moerge.index_examples(folder, [{"input": text} for text in DATA[name]], fake_embedder())
    return model, moerge.load_experts(folders)


def test_kept_weights():
    scores = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(kept(scores, None), torch.tensor([[0.75, 0, 0.25], [1 / 3] * 3]))
    for keep in (1, 2):
        want = [[1.0, 0, 0], [0.75, 0, 0.25]][keep - 1]
        torch.testing.assert_close(kept(scores, keep), torch.tensor([want, [1 / 3] * 3]), msg="no expert is the first")


def test_tfidf_by_scikit_learn_itself(setup, tmp_path):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    _, bank = setup
    train_tfidf(DATA, bank, tmp_path)
    router = load_text_router(tmp_path, bank)
    fitted = text.TfidfVectorizer().fit([t for texts in DATA.values() for t in texts])
    queries = fitted.transform([*QUERIES, "nothing known"])
    want = torch.stack(
        [torch.from_numpy((queries @ fitted.transform(texts).T).toarray()).mean(1) for texts in DATA.values()], 1
    ).float()
    torch.testing.assert_close(router.values([*QUERIES, "nothing known"], {}), want)
    stored = replace(router.stored, facts=router.stored.facts | {"words": router.stored.facts["words"][::-1]})
    assert identity.of_router(type(router)(bank, None, stored)) != identity.of_router(router), "other words, one digest"
    weights = router.scores([*QUERIES, "nothing known"], {"keep": None})
    torch.testing.assert_close(weights[:2], want[:2] / want[:2].sum(1, keepdim=True))
    torch.testing.assert_close(weights[2], torch.full((3,), 1 / 3))
    with pytest.raises(ValueError, match="none for bee"):
        train_tfidf({**DATA, "bee": []}, bank, tmp_path)


def test_unknown_words_weigh_all_alike_whatever_is_kept(setup, tmp_path):
    pytest.importorskip("sklearn")
    model, bank = setup
    router, inputs = load_text_router(train_tfidf(DATA, bank, tmp_path).parent, bank), cases.batch("llama", rows=1)
    with moerge.patch(model, bank, "weight_uniform"):
        want = cases.logits(model, **inputs)
    for keep in (1, 2, None):
        with moerge.patch(model, bank, "weight_tfidf", keep=keep) as handle, handle.queries("nothing known", router):
            assert cases.error(cases.logits(model, **inputs), want) < 1e-4


def test_likelihoods_of_each_expert_alone(setup):
    model, bank = setup
    tokenizer = letters()
    likelihoods, entropies = [], []
    for name in cases.NAMES:
        with moerge.patch(model, bank, f"expert:{name}"):
            rows = []
            for text in QUERIES:
                ids = torch.tensor([tokenizer(text).input_ids])
                logs = cases.logits(model, input_ids=ids)[0].double().log_softmax(-1)
                rows.append((-torch.nn.functional.nll_loss(logs[:-1], ids[0, 1:], reduction="sum"), logs[:-1]))
            likelihoods.append(torch.stack([row[0] for row in rows]))
            entropies.append(torch.stack([torch.special.entr(row[1].exp()).sum(1).mean() for row in rows]))
    router = moerge.LikelihoodRouter(model, tokenizer, cases.NAMES)
    with pytest.raises(ValueError, match="patch the model with the experts ant, bee, cat"):
        router.measured(QUERIES)
    with moerge.patch(model, bank, "weight_prior") as handle:
        got = router.measured(QUERIES)
        torch.testing.assert_close(got[0], torch.stack(likelihoods, 1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got[1], torch.stack(entropies, 1), rtol=1e-5, atol=1e-5)
        prior = router.scores(QUERIES, {"score": "prior", "keep": None})
        odds = torch.stack(likelihoods, 1)
        torch.testing.assert_close(prior.double(), (odds.exp() / odds.exp().sum(1, keepdim=True)), rtol=1e-3, atol=1e-5)
        inverse = 1 / torch.stack(entropies, 1)
        found = router.scores(QUERIES, {"score": "entropy", "keep": 2})
        lowest = inverse.argmin(1)
        want = inverse.scatter(1, lowest[:, None], 0.0)
        torch.testing.assert_close(found.double(), want / want.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
        for score in ("prior", "entropy"):  # one token: nothing is predicted, so that nobody is likelier or surer
            alone = router.scores(["a", *QUERIES], {"score": score, "keep": None})
            torch.testing.assert_close(alone[0], torch.full((3,), 1 / 3))
            torch.testing.assert_close(alone[1:], router.scores(QUERIES, {"score": score, "keep": None}))
        with pytest.raises(ValueError, match="a text without tokens"):
            router.scores("", {"score": "prior", "keep": None})
        handle.router = router
        with handle.queries(QUERIES):
            routed = cases.logits(model, **cases.batch("llama", rows=2))
        with handle.affinities(prior):
            assert torch.equal(routed, cases.logits(model, **cases.batch("llama", rows=2)))
    with pytest.raises(ValueError, match="needs a decoder"):
        moerge.LikelihoodRouter(cases.build("t5"), tokenizer, cases.NAMES)


def test_every_row_averages_parameters(setup, tmp_path):
    """The model with (sum w B)(sum w A) added to its weights by hand."""
    pytest.importorskip("sklearn")
    model, bank = setup
    train_tfidf(DATA, bank, tmp_path)
    routers = {
        "weight_sentsim": moerge.ExampleRouter(bank, fake_embedder()),
        "weight_tfidf": load_text_router(tmp_path, bank),
        "weight_entropy": moerge.LikelihoodRouter(model, letters(), cases.NAMES),
        "weight_uniform": None,
    }
    inputs, query = cases.batch("llama", rows=1), QUERIES[1]
    for name, router in routers.items():
        with moerge.patch(model, bank, name) as handle:
            if router is None:
                weights, got = torch.full((3,), 1 / 3), cases.logits(model, **inputs)
            else:
                weights = router.bias([query], handle.method, handle.options, handle.names)[0]
                with handle.queries(query, router):
                    got = cases.logits(model, **inputs)
        kept_weights = {}
        for path, module in bank.modules.items():
            layer = model.get_submodule(path)
            kept_weights[path] = layer.weight.data
            a, b = torch.einsum("e,erd->rd", weights, module.lora_A), torch.einsum("e,eor->or", weights, module.lora_B)
            layer.weight.data = layer.weight.data + b @ a
        want = cases.logits(model, **inputs)
        for path, weight in kept_weights.items():
            model.get_submodule(path).weight.data = weight
        assert weights.sum() == pytest.approx(1) and cases.error(got, want) < 1e-4, name
    similar = bag_of_words([query]) / bag_of_words([query]).norm()
    cosines = []
    for texts in DATA.values():
        examples = torch.nn.functional.normalize(bag_of_words(texts), dim=1)
        cosines.append((similar @ examples.T).mean())
    want = torch.stack(cosines) / sum(cosines)
    method = get_method("weight_sentsim")
    got = routers["weight_sentsim"].bias([query], method, method.configure()[2], cases.NAMES)[0]
    torch.testing.assert_close(got, want)


def test_wrong_keep():
    with pytest.raises(ValueError, match="keep must be a positive integer or None .* got 0; score must be"):
        get_method("weight_prior").configure(keep=0, score="x")
