"""Whole models behind a router, and probabilities of experts mixed by one."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, completion, fake_embedder, letters, server

import moerge_ext as moerge
from moerge_ext.ensemble.judge import exact
from moerge_ext.ensemble.weighed import plain_experts
from moerge_ext.queries.endpoint import Endpoint, EndpointError
from moerge_ext.queries.load_text_router import load_text_router
from moerge_ext.queries.routoo import train_routoo
from moerge_ext.queries.tfidf import train_tfidf
from moerge_ext.queries.zooter import train_zooter

pytest.importorskip("sklearn")
QUESTIONS = [f"{word} {i}" for word in WORDS.values() for i in range(4)]


def counted(text, tokens):
    status, body = completion(text)
    return status, body | {"usage": {"total_tokens": tokens}}


def test_local_model_and_endpoint_behind_one_router(tmp_path):
    model, tokenizer = cases.build("llama"), letters()
    with server(counted("digging", 7)) as (url, seen):
        pool = moerge.ModelPool(
            [
                moerge.PoolModel.endpoint("far", Endpoint(url, "m"), cost_per_token=2.0),
                moerge.PoolModel.local("near", model, tokenizer, cost_per_token=0.5, max_new_tokens=3),
            ]
        )
        golds = ["digging" if "digging" in q else pool.models[1].answer(q).text for q in QUESTIONS]
        table, costs = pool.judged(QUESTIONS, golds, exact, progress=False)
        assert table.scores.tolist() == [[1, 0]] * 4 + [[0, 1]] * 8 and costs["far"] == 14.0
        assert costs["near"] < 14
        train_routoo(table, pool.names, fake_embedder(), tmp_path, costs=costs)
        router = load_text_router(tmp_path, pool.names, fake_embedder())
        before = len(seen)
        free = pool.answer(["digging z", "flying z"], router, "routoo", progress=False)
        assert [answer.model for answer in free] == ["far", "near"] and len(seen) == before + 1
        assert free[0].text == "digging" and free[0].cost == 14.0 and free[0].tokens == 7
        said = tokenizer(free[1].text, add_special_tokens=False).input_ids
        assert free[1].tokens == len(tokenizer("flying z").input_ids) + len(said)
        cheap = pool.answer(["digging z"], router, "routoo", budget=costs["near"] + 0.01, progress=False)
        assert cheap[0].model == "near"
        with pytest.raises(ValueError, match="takes a router by zooter, got one by routoo"):
            pool.answer(["x"], router, "zooter")
        other = moerge.ModelPool(pool.models[:1])
        with pytest.raises(ValueError, match="needs a router of far, got RoutooRouter of far, near"):
            other.answer(["x"], router, "routoo")
        train_zooter(table, pool.names, fake_embedder(), tmp_path / "z")
        chosen = pool.answer(
            ["digging q"], load_text_router(tmp_path / "z", pool.names, fake_embedder()), "zooter", progress=False
        )
        assert chosen[0].model == "far"


def test_what_a_pool_refuses():
    with server(completion("no count")) as (url, _):
        silent = moerge.PoolModel.endpoint("silent", Endpoint(url, "m"), cost_per_token=1.0)
        with pytest.raises(EndpointError, match="usage.total_tokens"):
            silent.answer("x")
    with pytest.raises(ValueError, match="distinct names"):
        moerge.ModelPool([silent, silent])
    with pytest.raises(ValueError, match="cost per token"):
        moerge.PoolModel("x", lambda q: (q, 1), -1.0)


def test_probabilities_are_mixed_with_the_routers_weights(tmp_path):
    """The first token's distribution against that of every expert alone."""
    model, tokenizer = cases.build("llama"), letters()
    folders = cases.builders.random_experts(model, tmp_path, cases.NAMES, cases.DECODER)
    bank = moerge.load_experts(folders)
    train_tfidf({name: [f"{word} one", f"{word} two"] for name, word in WORDS.items()}, bank, tmp_path / "router")
    router = load_text_router(tmp_path / "router", bank)
    question = "flying digging two"
    ids = torch.tensor([tokenizer(question).input_ids])
    alone = []
    for name in cases.NAMES:
        with moerge.patch(model, bank, f"expert:{name}"):
            alone.append(cases.logits(model, input_ids=ids)[0, -1].double().softmax(-1))
    weighed = moerge.WeighedExperts(router, "weight_tfidf")
    weights = router.scores([question], {"keep": None})[0].double()
    with moerge.patch(model, bank, "given") as handle:
        plain = plain_experts(handle.names)
        ensemble = moerge.PromptEnsemble(model, tokenizer, plain, weighed, handle=handle)
        answer = ensemble.answer([question], top_k=3, max_new_tokens=1)
    assert weighed.probabilities([question]).sum() == pytest.approx(1)
    best = int(sum(w * p for w, p in zip(weights, alone, strict=True)).argmax())
    assert answer == [tokenizer.decode([best], skip_special_tokens=True).strip()]
    with pytest.raises(ValueError, match="unknown option"):
        moerge.WeighedExperts(router, "weight_tfidf", temperature=2)
