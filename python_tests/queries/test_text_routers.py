"""Routers trained on judged answers: their equations by hand, what they save, and what they refuse."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, bag_of_words, fake_embedder
from torch.nn.functional import kl_div, logsigmoid, normalize

import moerge_ext as moerge
from moerge_ext.methods import get_method
from moerge_ext.queries.benchmark import smoothed, train_benchmark
from moerge_ext.queries.classifier import train_classifier_of_data
from moerge_ext.queries.judged import Judged
from moerge_ext.queries.load_text_router import load_text_router
from moerge_ext.queries.routoo import price_for, train_routoo
from moerge_ext.queries.strong_weak import train_classifier, train_factorization, won_pairs
from moerge_ext.queries.zooter import smoothed_rewards, train_zooter

pytest.importorskip("sklearn")
OTHERS = "abcdefgh"


def judged(base=False):
    """Each expert is right on texts with its own word; the base, when there is one, on those with "h" alone."""
    texts = [f"{word} {other}" for word in WORDS.values() for other in OTHERS]
    right = torch.eye(3).repeat_interleave(len(OTHERS), 0)
    names = cases.NAMES
    if base:
        right = torch.cat([right, torch.tensor([[float(text.endswith("h"))] for text in texts])], 1)
        names = (*names, "base")
    tasks = [word for word in WORDS.values() for _ in OTHERS]
    return Judged(texts, right, names, tasks)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    model = cases.build("llama")
    folders = cases.builders.random_experts(model, tmp_path_factory.mktemp("bank"), cases.NAMES, cases.DECODER)
    return model, moerge.load_experts(folders), folders


def vectors(texts):
    return normalize(bag_of_words(list(texts)), dim=1)


def spread(texts):
    """As `bag_of_words`, but no two texts are equally near to a third."""
    rows = bag_of_words(texts)
    for row, text in zip(rows, texts, strict=True):
        row += 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(sum(map(ord, text)) + 1000 * len(text)))
    return rows


def options(method, **overrides):
    return get_method(method).configure(**overrides)[2]


TRAINERS = {
    "benchmark_routing": train_benchmark,
    "benchmark_routing_query": train_benchmark,
    "zooter": train_zooter,
    "routoo": train_routoo,
    "routellm_mf": lambda *args: train_factorization(*args, epochs=30, lr=0.01, progress=False),
    "routellm_classifier": lambda *args: train_classifier(*args, strong="bee", weak="ant", c=100.0),
}


@pytest.mark.parametrize("method", TRAINERS)
def test_routes_the_experts_of_a_real_model(method, setup, tmp_path):
    """Trained, saved, loaded: tokens go to the expert that was right on such texts, as if it were fixed."""
    model, bank, _ = setup
    TRAINERS[method](judged(), bank, fake_embedder(), tmp_path)
    extra = {"routellm_mf": {"strong": "bee", "weak": "ant"}, "benchmark_routing": {"estimator": "s2"}}.get(method, {})
    inputs = cases.batch("llama", rows=1)
    with moerge.patch(model, bank, "expert:bee"):
        want = cases.logits(model, **inputs)
    with moerge.patch(model, bank, method, **extra) as handle:
        handle.router = load_text_router(tmp_path, bank, fake_embedder())
        with handle.queries(["flying q"]):
            assert cases.error(cases.logits(model, **inputs), want) < 1e-5


def test_a_router_may_choose_the_base_alone(setup, tmp_path):
    model, bank, _ = setup
    train_benchmark(judged(base=True), bank, fake_embedder(), tmp_path, neighbours=1)
    inputs = cases.batch("llama", rows=2)
    want = cases.logits(model, **inputs)
    table = judged(base=True)
    scores = table.scores * torch.tensor([0.0, 0.0, 0.0, 1.0])
    train_benchmark(Judged(table.texts, scores, table.names, table.tasks), bank, fake_embedder(), tmp_path)
    with moerge.patch(model, bank, "benchmark_routing_query", neighbours=1) as handle:
        handle.router = load_text_router(tmp_path, bank, fake_embedder())
        with handle.queries(["flying h", "purring h"]):
            assert cases.error(cases.logits(model, **inputs), want) < 1e-6


def test_benchmark_estimators_by_hand(setup, tmp_path):
    _, bank, _ = setup
    embedder = moerge.Embedder(spread, name="spread")
    generator = torch.Generator().manual_seed(0)
    table = judged()
    right = (torch.rand(24, 3, generator=generator) > 0.4).float()
    train_benchmark(Judged(table.texts, right, table.names, table.tasks), bank, embedder, tmp_path)
    router = load_text_router(tmp_path, bank, embedder)
    queries = ["flying z", "digging q", "purring flying"]
    cosines = normalize(spread(queries), dim=1) @ normalize(spread(table.texts), dim=1).T
    near = cosines.topk(5, 1).indices
    g = right[near].mean(1)
    torch.testing.assert_close(router.values(queries, options("benchmark_routing_query")), g)
    torch.testing.assert_close(router.values(queries, options("benchmark_routing", estimator="s1"))[0], g.mean(0))
    above = (g > 0.5).float().mean(0)
    torch.testing.assert_close(router.values(queries, options("benchmark_routing", estimator="s2"))[0], above)
    # the reliability: each data set from the neighbours of the others
    every, accuracies, distances = normalize(spread(table.texts), dim=1), [], []
    for task in dict.fromkeys(table.tasks):
        inside = torch.tensor([other == task for other in table.tasks])
        found = (every[inside] @ every[~inside].T).topk(5, 1)
        estimate = right[~inside][found.indices].mean(1) > 0.5
        accuracies.append((estimate == (right[inside] > 0.5)).float().mean(0))
        distances.append((1 - found.values).mean())
    u = (1 - cosines.topk(5, 1).values).mean()
    weights = torch.exp(-0.5 * ((u - torch.stack(distances)) / 0.1) ** 2)
    p = (weights[:, None] * torch.stack(accuracies)).sum(0) / weights.sum()
    s3 = p * above + (1 - p) * (1 - above)
    got = router.values(queries, options("benchmark_routing", confidence=0.0))[0]
    torch.testing.assert_close(got, s3, rtol=1e-4, atol=1e-5)
    sure = router.values(queries, options("benchmark_routing", confidence=1.0))[0]
    assert sure.argmax() == right.mean(0).argmax()  # nothing is that certain: the best of the benchmark stays
    assert smoothed(torch.tensor(9.0), torch.tensor([0.0, 1.0]), torch.eye(2), 0.01).tolist() == [0, 1]


def test_benchmark_refuses_what_it_cannot_estimate(setup, tmp_path):
    _, bank, _ = setup
    table = judged()
    train_benchmark(Judged(table.texts, table.scores, table.names, ["one"] * 24), bank, fake_embedder(), tmp_path)
    router = load_text_router(tmp_path, bank, fake_embedder())
    with pytest.raises(ValueError, match="train it on two or more, or pass estimator=s1"):
        router.settings("benchmark_routing", options("benchmark_routing"))
    train_benchmark(table, bank, fake_embedder(), tmp_path)
    router = load_text_router(tmp_path, bank, fake_embedder())
    with pytest.raises(ValueError, match="measured with neighbours=5"):
        router.settings("benchmark_routing", options("benchmark_routing", neighbours=3))


def test_zooter_is_the_optimum_of_its_loss(setup, tmp_path):
    _, bank, _ = setup
    table = judged()
    rewards = table.scores * 3 + torch.rand(24, 3, generator=torch.Generator().manual_seed(1))
    tags = [("x", "y") if i % 2 else ("y",) for i in range(23)] + [()]
    table = Judged(table.texts, rewards, table.names, tags=tags)
    r = smoothed_rewards(table, 0.3)
    of_x, of_y = rewards[1:23:2].mean(0), rewards[:23].mean(0)
    torch.testing.assert_close(r[1], 0.3 * rewards[1] + 0.7 * (of_x + of_y) / 2)
    torch.testing.assert_close(r[0], 0.3 * rewards[0] + 0.7 * of_y)
    assert torch.equal(r[23], rewards[23])
    train_zooter(table, bank, fake_embedder(), tmp_path)
    stored = load_text_router(tmp_path, bank, fake_embedder()).stored
    weight, bias = (stored.tensors[key].double().requires_grad_() for key in ("weight", "bias"))
    logits = vectors(table.texts).double() @ weight.T + bias
    loss = kl_div(logits.log_softmax(1), r.double().softmax(1), reduction="sum") + weight.square().sum() / 2
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_routoo_predicts_and_keeps_to_the_budget(setup, tmp_path):
    _, bank, _ = setup
    table = judged()
    costs = {"ant": 1.0, "bee": 2.0, "cat": 4.0}
    train_routoo(table, bank, fake_embedder(), tmp_path, costs=costs)
    router = load_text_router(tmp_path, bank, fake_embedder())
    stored = router.stored.tensors
    weight, bias = (stored[key].double().requires_grad_() for key in ("weight", "bias"))
    logits = vectors(table.texts).double() @ weight.T + bias
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, table.scores.double(), reduction="sum")
    (loss + weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    free = router.settings("routoo", options("routoo"))
    assert router.chosen(table.texts, free).tolist() == [0] * 8 + [1] * 8 + [2] * 8  # mean cost 7 / 3
    spent = []
    for budget in (1.0, 1.5, 2.0, 2.3, 3.0):
        choice = router.chosen(table.texts, router.settings("routoo", options("routoo", budget=budget)))
        spent.append(stored["costs"][choice].mean().item())
        assert spent[-1] <= budget + 1e-6
    assert spent == sorted(spent) and spent[-1] == pytest.approx(7 / 3)
    with pytest.raises(ValueError, match="below the cheapest expert's cost, 1"):
        router.settings("routoo", options("routoo", budget=0.5))
    # no smaller price would do: against every price of a fine grid
    predicted, prices = torch.rand(40, 3, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, 2.0, 4.0])
    found = price_for(predicted, prices, 1.7)
    mean = [prices[(predicted - p * prices).argmax(1)].mean().item() for p in torch.linspace(0, found, 500)[:-1]]
    assert min(mean) > 1.7 >= prices[(predicted - found * prices).argmax(1)].mean()


def test_routellm_by_hand(setup, tmp_path):
    _, bank, _ = setup
    table = judged()
    assert len(won_pairs(table.scores)) == 48 and [0, 0, 1] in won_pairs(table.scores).tolist()
    trained = dict(epochs=30, lr=0.01, progress=False)
    for folder in ("a", "b"):
        train_factorization(table, bank, fake_embedder(), tmp_path / folder, **trained)
    router, again = (load_text_router(tmp_path / folder, bank, fake_embedder()) for folder in ("a", "b"))
    assert all(map(torch.equal, router.tensors, again.tensors))
    held = router.stored.tensors
    queries = ["flying z", "digging z", "purring z"]

    def d(expert):
        u = held["experts"][expert] / held["experts"][expert].norm()
        return torch.stack([(held["classify"] * u * (held["project"] @ v)).sum() for v in vectors(queries)])

    settings = router.settings("routellm_mf", options("routellm_mf", strong="cat", weak="bee"))
    rates = router.win_rates(vectors(queries), settings)
    torch.testing.assert_close(rates, (d(2) - d(1)).sigmoid())
    assert router.chosen(queries, settings).tolist() == [1, int(2 if rates[1] >= 0.5 else 1), 2]
    for share in (0.0, 0.25, 1.0):  # of the training questions, at most one question more than asked for
        settings = router.settings("routellm_mf", options("routellm_mf", strong="cat", weak="bee", share=share))
        taken = (router.chosen(table.texts, settings) == 2).float().mean()
        assert share <= taken <= share + 2 / 24
    with pytest.raises(ValueError, match="two of ant, bee, cat; got 'dog' and 'bee'"):
        router.settings("routellm_mf", options("routellm_mf", strong="dog", weak="bee"))


def test_routellm_classifier_is_the_optimum_of_its_loss(setup, tmp_path):
    _, bank, _ = setup
    table = judged()
    train_classifier(table, bank, fake_embedder(), tmp_path, strong="bee", weak="ant")
    router = load_text_router(tmp_path, bank, fake_embedder())
    weight, bias = (router.stored.tensors[key].double().requires_grad_() for key in ("weight", "bias"))
    logits = vectors(table.texts).double() @ weight + bias
    better = (table.scores[:, 1] > table.scores[:, 0]).double()
    (-(better * logsigmoid(logits) + (1 - better) * logsigmoid(-logits)).sum() + weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    with pytest.raises(ValueError, match="trained with strong = 'bee', got 'cat'"):
        router.settings("routellm_classifier", options("routellm_classifier", strong="cat"))
    with pytest.raises(ValueError, match="never: nothing to learn"):
        table = Judged(table.texts, torch.zeros(24, 3), table.names)
        train_classifier(table, bank, fake_embedder(), tmp_path, strong="bee", weak="ant")


def test_classifier_of_data_is_the_optimum_of_its_loss(setup, tmp_path):
    model, bank, _ = setup
    data = {name: [f"{word} {other}" for other in OTHERS[: e + 2]] for e, (name, word) in enumerate(WORDS.items())}
    train_classifier_of_data(data, bank, fake_embedder(), tmp_path)
    router = load_text_router(tmp_path, bank, fake_embedder())
    weight, bias = (router.stored.tensors[key].double().requires_grad_() for key in ("weight", "bias"))
    loss = weight.square().sum() / 2
    for e, texts in enumerate(data.values()):
        logits = vectors(texts).double() @ weight.T + bias
        loss = loss - logits.log_softmax(1)[:, e].mean() * 9 / 3  # each of the three counts as a third of the nine
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    logits = vectors(["flying z"]).double() @ weight.T + bias
    torch.testing.assert_close(router.scores("flying z", {}), logits.softmax(1).float())
    inputs = cases.batch("llama", rows=1)
    with moerge.patch(model, bank, "twin_merging") as handle:
        handle.router = router
        with handle.queries("flying z"):
            got = cases.logits(model, **inputs)
        with handle.affinities(logits.softmax(1).float()):
            assert torch.equal(got, cases.logits(model, **inputs))
    with pytest.raises(ValueError, match="none for bee"):
        train_classifier_of_data({**data, "bee": []}, bank, fake_embedder(), tmp_path)


def test_a_router_says_how_much_its_embedder_read(setup, tmp_path):
    _, bank, _ = setup
    train_zooter(judged(), bank, fake_embedder(max_length=8), tmp_path)
    load_text_router(tmp_path, bank, fake_embedder())  # which does not say how much it reads
    with pytest.raises(ValueError, match="which read 8 tokens of a text, not 9"):
        load_text_router(tmp_path, bank, fake_embedder(max_length=9))


def test_routers_of_others_are_refused_by_name(setup, tmp_path):
    model, bank, folders = setup
    file = train_zooter(judged(), bank, fake_embedder(), tmp_path)
    before = file.read_bytes()
    two = moerge.load_experts({name: folders[name] for name in ("ant", "bee")})
    with pytest.raises(ValueError, match="cat unknown here"):
        load_text_router(tmp_path, two, fake_embedder())
    renamed = moerge.load_experts({"ant": folders["ant"], "bee": folders["bee"], "dog": folders["cat"]})
    with pytest.raises(ValueError, match="dog missing; cat unknown here"):
        load_text_router(tmp_path, renamed, fake_embedder())
    swapped = moerge.load_experts({"ant": folders["bee"], "bee": folders["ant"], "cat": folders["cat"]})
    with pytest.raises(ValueError, match="trained with other experts called ant, bee"):
        load_text_router(tmp_path, swapped, fake_embedder())
    turned = moerge.load_experts({name: folders[name] for name in ("cat", "ant", "bee")})
    moved = load_text_router(tmp_path, turned, fake_embedder())
    same = load_text_router(tmp_path, bank, fake_embedder())
    torch.testing.assert_close(moved.values(["flying"], {})[0, [1, 2, 0]], same.values(["flying"], {})[0])
    with pytest.raises(ValueError, match="trained with embedder 'bag', got 'sack'"):
        load_text_router(tmp_path, bank, fake_embedder("sack"))
    other = moerge.Embedder(lambda texts: bag_of_words(texts).flip(1), name="bag")
    with pytest.raises(ValueError, match="is not the model that the router was trained with"):
        load_text_router(tmp_path, bank, other)
    with (
        moerge.patch(model, bank, "routoo") as handle,
        pytest.raises(ValueError, match="by routoo .* got one by zooter"),
        handle.queries("flying", same),
    ):
        pass
    with pytest.raises(ValueError, match=r"cat missing: names=\['ant', 'bee'\] \(--names ant bee\) loads"):
        table = judged()
        train_zooter(Judged(table.texts, table.scores[:, :2], ("ant", "bee")), bank, fake_embedder(), tmp_path)
    with pytest.raises(ValueError, match="got -1 to 1; rewards are for zooter"):
        train_routoo(Judged(("a", "b"), [[1, 0, -1], [0, 1, 0]], cases.NAMES), bank, fake_embedder(), tmp_path)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("damage", (b"", b"no tensors", "cut"))
def test_damaged_files_are_errors(damage, setup, tmp_path):
    _, bank, _ = setup
    file = train_zooter(judged(), bank, fake_embedder(), tmp_path)
    file.write_bytes(file.read_bytes()[:-40] if damage == "cut" else damage)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_text_router(tmp_path, bank, fake_embedder())
    file.unlink()
    with pytest.raises(ValueError, match="train-query-router"):
        load_text_router(tmp_path, bank, fake_embedder())


@pytest.mark.parametrize(
    ("method", "wrong", "text"),
    [
        ("benchmark_routing", {"estimator": "s4"}, "one of s1, s2, s3, query"),
        ("benchmark_routing", {"neighbours": 0}, "neighbours must be a positive integer"),
        ("benchmark_routing", {"bandwidth": 0}, "bandwidth must be positive"),
        ("routoo", {"budget": "much"}, "budget must be a mean cost"),
        ("routellm_mf", {"threshold": 2}, "threshold must be between 0 and 1"),
        ("routellm_mf", {"strong": 3}, "strong must be the name"),
    ],
)
def test_options_out_of_range(method, wrong, text):
    with pytest.raises(ValueError, match=text):
        get_method(method).configure(**wrong)


def test_experts_in_another_type_are_the_same(setup, tmp_path):
    _, bank, folders = setup
    train_zooter(judged(), bank, fake_embedder(), tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        load_text_router(tmp_path, moerge.load_experts(folders, dtype=dtype), fake_embedder())
    with pytest.raises(ValueError, match="other experts called ant, bee, cat"):
        load_text_router(tmp_path, moerge.load_experts(folders, modules=".*q_proj"), fake_embedder())


def test_routoo_keeps_to_the_budget_where_predictions_are_equal(setup, tmp_path, monkeypatch):
    _, bank, _ = setup
    monkeypatch.setattr(Judged, "check_differing", lambda *_: None)
    table = judged()
    same = table.scores[:, :1].expand(-1, 3)
    train_routoo(
        Judged(table.texts, same, table.names),
        bank,
        fake_embedder(),
        tmp_path,
        costs={"ant": 5.0, "bee": 2.0, "cat": 1.0},
    )
    router = load_text_router(tmp_path, bank, fake_embedder())
    settings = router.settings("routoo", options("routoo", budget=2.0))
    assert router.chosen([*table.texts, "flying anew"], settings).tolist() == [2] * 25


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("train", [train_benchmark, train_zooter, train_routoo, train_factorization])
def test_answers_that_are_all_alike_teach_no_router(setup, tmp_path, train, score):
    _, bank, _ = setup
    table = judged()
    alike = Judged(table.texts, torch.full_like(table.scores, score), table.names)
    with pytest.raises(ValueError, match="learns from questions on which experts differ, and here there is none"):
        train(alike, bank, fake_embedder(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_routellm_takes_another_pair_where_shares_are_equal(setup, tmp_path):
    _, bank, _ = setup
    train_factorization(judged(), bank, fake_embedder(), tmp_path, epochs=1, progress=False)
    router = load_text_router(tmp_path, bank, fake_embedder())
    assert router.pair(options("routellm_mf")) == ("ant", "cat")
    assert router.pair(options("routellm_mf", strong="cat")) == ("cat", "bee")
    assert router.pair(options("routellm_mf", weak="ant")) == ("bee", "ant")


def test_a_regression_of_two_experts_is_the_optimum_too(tmp_path):
    table = judged()
    rewards = torch.rand(24, 2, generator=torch.Generator().manual_seed(2)) * 3
    train_zooter(Judged(table.texts, rewards, ("ant", "bee")), ("ant", "bee"), fake_embedder(), tmp_path, c=0.3)
    stored = load_text_router(tmp_path, ("ant", "bee"), fake_embedder()).stored
    weight, bias = (stored.tensors[key].double().requires_grad_() for key in ("weight", "bias"))
    logits = vectors(table.texts).double() @ weight.T + bias
    loss = kl_div(logits.log_softmax(1), rewards.double().softmax(1), reduction="sum") + weight.square().sum() / 0.6
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
