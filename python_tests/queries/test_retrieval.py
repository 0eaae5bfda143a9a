"""The retrieval family: indices beside experts, similarities, weights per query and per task."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, bag_of_words, fake_embedder, letters
from safetensors.torch import save_file

import moerge_ext as moerge
from moerge_ext.methods import get_method
from moerge_ext.methods.retrieval import ROWS
from moerge_ext.queries.index import index_file, read_index
from moerge_ext.queries.similar import indexed_examples

DATA = {name: [{"input": f"{word} {other}", "target": ""} for other in "abcdef"] for name, word in WORDS.items()}
QUERIES = ["flying z", "digging z"]
TOKENIZER = letters()


@pytest.fixture
def folders(tmp_path):
    made = cases.builders.random_experts(cases.build("llama"), tmp_path, cases.NAMES, cases.DECODER)
    for name, folder in made.items():
        moerge.index_examples(folder, DATA[name], fake_embedder())
    return made


@pytest.fixture
def router(folders):
    return moerge.ExampleRouter(moerge.load_experts(folders), fake_embedder())


def test_index_is_beside_the_adapter(folders):
    index = read_index(folders["bee"], "bag")
    assert index.vectors.shape == (6, 32) and index.embedder == "bag"
    torch.testing.assert_close(index.vectors.norm(dim=1), torch.ones(6))
    path = moerge.index_examples(folders["bee"], DATA["bee"], fake_embedder(), samples=2, seed=1)
    assert path.name == "moerge_examples.bag.safetensors" and len(read_index(folders["bee"], "bag").vectors) == 2
    moerge.index_examples(folders["bee"], DATA["bee"], fake_embedder("an/other: one"))  # a file of its own
    assert len(read_index(folders["bee"], "an/other: one").vectors) == 6
    before = path.read_bytes()
    for rows, options, text in (([], {}, "no examples"), (DATA["bee"], {"samples": 0}, "samples must be at least 1")):
        with pytest.raises(ValueError, match=text):
            moerge.index_examples(folders["bee"], rows, fake_embedder(), **options)
    assert path.read_bytes() == before


def test_similarities_by_hand(router, folders):
    queries = torch.nn.functional.normalize(bag_of_words(QUERIES), dim=1)
    for e, name in enumerate(cases.NAMES):
        examples = torch.nn.functional.normalize(bag_of_words([row["input"] for row in DATA[name]]), dim=1)
        cosines = (queries @ examples.T).sort(1, descending=True).values
        centroid = torch.nn.functional.cosine_similarity(queries, examples.mean(0), dim=1)
        wants = {1: cosines[:, 0], 3: cosines[:, :3].mean(1), 50: cosines.mean(1), "all": cosines.mean(1)}
        for neighbours, want in (wants | {"centroid": centroid}).items():
            got = router.scores(QUERIES, {"neighbours": neighbours, "samples": None})
            torch.testing.assert_close(got[:, e], want)
        first = read_index(folders[name], "bag").vectors[:1]
        one = router.scores(QUERIES, {"neighbours": "all", "samples": 1})
        torch.testing.assert_close(one[:, e], queries @ first[0])


def test_mixture_finds_the_experts_data(router):
    pytest.importorskip("sklearn")
    scores = router.scores([*QUERIES, "purring a"], {"neighbours": "mixture", "samples": None})
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    assert scores.argmax(1).tolist() == [1, 0, 2]
    assert torch.equal(router.scores(["purring a"], {"neighbours": "mixture", "samples": None})[0], scores[2])


def weights(name, scores, **overrides):
    method = get_method(name)
    _, _, options = method.configure(**overrides)
    return method.bias(torch.tensor(scores), options)


def test_weights_of_every_row():
    scores = [[0.2, 0.8, 0.4], [0.5, 0.1, 0.5], [0.9, 0.3, -0.2]]
    one_hot = [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    for name in ("retrieval", "knn"):
        assert weights(name, scores).tolist() == one_hot
    assert weights("retrieval_task", scores).tolist() == [[1, 0, 0]]  # two of three queries
    assert weights("adapter_soup", scores, keep=2).tolist() == [[0.5, 0.5, 0]]
    torch.testing.assert_close(weights("adapter_soup", scores), torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(weights("centroid", scores), (torch.tensor(scores) / 0.1).softmax(1))
    plain = weights("centroid", scores, weights="plain")
    torch.testing.assert_close(plain[0], torch.tensor([0.2, 0.8, 0.4]) / 1.4)
    torch.testing.assert_close(plain[2], torch.tensor([0.9, 0.3, 0.0]) / 1.2)
    two = torch.tensor([[0.8, 0.4], [0.5, 0.5], [0.9, 0.3]]).div(0.01).softmax(1)
    torch.testing.assert_close(weights("dam", scores)[0, 1:], two[0])
    torch.testing.assert_close(weights("dam", scores)[1], torch.tensor([0.5, 0.0, 0.5]))
    boosted = torch.tensor([[0.2, 4 * 0.8, 0.4], [4 * 0.5, 0.1, 0.5], [4 * 0.9, 0.3, -0.2]])
    torch.testing.assert_close(weights("token_level", scores), boosted.softmax(1).sqrt())
    wrong = {"neighbours": 0, "keep": -1, "pool": "max", "weights": "x", "temperature": 0, "samples": 0, "boost": -1}
    with pytest.raises(ValueError) as caught:
        get_method("retrieval").configure(**wrong)
    assert all(f"{name} must be" in str(caught.value) for name in wrong)
    for name, option in (("retrieval_task", "queries"), ("token_level", "every")):
        with pytest.raises(ValueError, match=f"{option} must be a positive integer, got 0"):
            get_method(name).configure(**{option: 0})


def test_adapter_soup_compares_averages(router):
    """As the survey describes it: the mean embedding of a task's samples against that of every expert's, parameters
    of the nearest averaged.
    """
    method = get_method("adapter_soup")
    routing, aggregation, options = method.configure(keep=2)
    queries = ["flying a", "flying b digging", "flying c"]
    task = torch.nn.functional.normalize(bag_of_words(queries), dim=1).mean(0)
    means = [
        torch.nn.functional.normalize(bag_of_words([row["input"] for row in DATA[name]]), dim=1).mean(0)
        for name in cases.NAMES
    ]
    similarity = torch.stack([torch.nn.functional.cosine_similarity(task, mean, dim=0) for mean in means])
    want = torch.zeros(1, 3).scatter(1, similarity.topk(2).indices[None], 0.5)
    assert torch.equal(method.bias(router.scores(queries, options), options), want)
    assert aggregation == "factored" and routing.weighting == "score"


def test_an_index_of_another_embedder_of_the_name_is_refused(folders):
    bank = moerge.load_experts(folders)
    turned = moerge.Embedder(lambda texts: bag_of_words(texts).flip(1), name="bag")
    with pytest.raises(ValueError) as caught:
        moerge.ExampleRouter(bank, turned)
    assert str(caught.value).count("was made by another embedder called 'bag', which gave another vector") == 3
    moerge.index_examples(folders["bee"], DATA["bee"], fake_embedder(max_length=8))
    moerge.ExampleRouter(bank, fake_embedder(max_length=8))
    with pytest.raises(ValueError, match="'bee': .*which read 8 tokens of a text, not 9: use that one, or index again"):
        moerge.ExampleRouter(bank, fake_embedder(max_length=9))
    moerge.index_examples(folders["ant"], [{"input": "a", "target": "b"}] * 3, fake_embedder(), texts=True)
    with pytest.raises(ValueError, match="which gave another vector"):
        indexed_examples(bank, turned)


def test_an_index_without_a_probe_goes_by_the_name(folders):
    known = {row["input"]: vector for row in DATA["ant"] for vector in bag_of_words([row["input"]])}
    listed = moerge.Embedder(lambda texts: torch.stack([known[text] for text in texts]), name="listed")
    for folder in folders.values():  # its texts are all that this embedder knows
        moerge.index_examples(folder, DATA["ant"], listed)
    bank = moerge.load_experts(folders)
    moerge.ExampleRouter(bank, fake_embedder("listed"))
    listed.name = "bag"
    assert len(moerge.ExampleRouter(bank, listed).indices) == 3


def base_router(model, experts, folders):
    embedder = moerge.Embedder.from_hidden_states(model, TOKENIZER, name="base")
    for name, folder in folders.items():
        moerge.index_examples(folder, DATA[name], embedder)
    return moerge.ExampleRouter(experts, embedder)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.source == "examples"])
def test_every_row_routes_a_model(name, folders, router):
    model = cases.build("llama")
    experts = moerge.load_experts(folders)
    inputs = cases.batch("llama", rows=2)
    got = {}
    for backend in ("native", "reference"):
        with moerge.patch(model, experts, name, backend=backend) as handle:
            handle.router = base_router(model, experts, folders) if name == "dam" else router
            with handle.queries(QUERIES, tokenizer=TOKENIZER):
                got[backend] = cases.logits(model, **inputs)
    assert cases.error(got["native"], got["reference"]) < 1e-5
    if name in ("retrieval", "knn"):
        for row, expert in enumerate(("bee", "ant")):
            with moerge.patch(model, experts, f"expert:{expert}"):
                want = cases.logits(model, **{key: value[row : row + 1] for key, value in inputs.items()})
            assert cases.error(got["native"][row : row + 1], want) < 1e-5


def test_what_cannot_be_routed_is_named(folders, router):
    (folders["cat"] / index_file("bag")).unlink()
    moerge.index_examples(folders["bee"], DATA["bee"], fake_embedder("other"))
    (folders["bee"] / index_file("bag")).unlink()
    save_file({"x": torch.ones(2)}, folders["ant"] / index_file("bag"))
    with pytest.raises(ValueError) as caught:
        moerge.ExampleRouter(moerge.load_experts(folders), fake_embedder())
    for text in (
        "'ant': ",
        "is no index of examples",
        "'bee': its examples are indexed only by other, and the queries' embedder is 'bag'",
        "'cat': its examples are indexed not at all",
        "index_examples",
    ):
        assert text in str(caught.value)
    layer = fake_embedder("tiny hidden state -2")
    for embedder, words in ((fake_embedder(), "MODEL`"), (layer, "BASE --hidden-layer -2`")):
        with pytest.raises(ValueError, match=f"--examples ROWS.jsonl --index 1000 --embedder {words}"):
            moerge.ExampleRouter(moerge.load_experts(folders), embedder)
    wider = moerge.Embedder(lambda texts: torch.ones(len(texts), 7), name="bag")
    router.embedder = wider
    with pytest.raises(ValueError, match="vectors of 7 numbers, the indices have 32"):
        router.scores(["a"], {"neighbours": 1, "samples": None})
    model = cases.build("llama")
    handle = moerge.patch(model, moerge.load_experts(folders), "glider", threshold=0.5)
    with pytest.raises(ValueError, match="takes a router by instruction .* got one by examples"):
        handle.queries(["a"], router).__enter__()
