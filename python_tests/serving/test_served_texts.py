"""Requests routed by their texts: the affinities of `handle.queries`, and what is refused. No vLLM."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import builders
import pytest
import torch
from query_cases import bag_of_words, fake_embedder, letters
from serving_cases import NAMES, folders, tables_of

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.serving.pool import planned, rules
from moerge_ext.serving.queries import Prompts, Queries
from moerge_ext.serving.requests import Rules
from moerge_ext.serving.settings import KEY, Settings
from moerge_ext.serving.vllm import frontend
from moerge_ext.serving.vllm.steps import CHECKED

WORDS = dict(zip(NAMES, ("digging", "flying", "purring", "barking"), strict=True))
TEXTS = ("please do flying", "purring and a little barking", "digging", "something else")
METHODS = {
    "glider_code": {},
    "glider": {"threshold": 0.5},
    "retrieval": {},
    "knn": {"neighbours": 2},
    "centroid": {"temperature": 0.3},
    "adapter_soup": {"keep": 2},
    "weight_sentsim": {},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Experts that are described and indexed."""
    made = folders(tmp_path_factory.mktemp("experts"))
    for name, folder in zip(NAMES, made, strict=True):
        moerge.describe(folder, [], fake_embedder(), instruction=f"please do {WORDS[name]}")
        rows = [{"input": f"{WORDS[name]} {more}"} for more in ("now", "again and again", "please")]
        moerge.index_examples(folder, rows, fake_embedder())
    return made


@pytest.fixture(autouse=True)
def bag(monkeypatch):
    """The embedder of a server is that of the experts, whatever model is named."""

    def load(path, **options):
        if path == "missing":
            raise OSError("'missing' is no model")
        return moerge.Embedder(bag_of_words, name=options["name"] or path, prefix=options["prefix"])

    monkeypatch.setattr(moerge.Embedder, "from_sentence_transformers", staticmethod(load))


def settings(experts, **said):
    return Settings.parse({"experts": experts, "method": "retrieval", "embedder": "bag"} | said)


def served_by_text(experts, **said):
    """(what reads a request, the same with what finds affinities for its prompt)."""
    made = settings(experts, **said)
    queries, known = made.queries(None), rules(made, NAMES)
    return lambda request, prompt: known.read(
        request, lambda method, query: queries.affinities(method, prompt if query is None else query)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_text_weighs_as_with_the_patched_model(experts, method):
    """Bit for bit, whether it is the query of a request or its prompt; one key for one text."""
    made = settings(experts, method="phatgoose", methods={method: METHODS[method]})
    read = served_by_text(experts, method="phatgoose", methods={method: METHODS[method]})
    model = builders.tiny_llama()
    bank = moerge.load_experts(experts)
    handle = moerge.patch(model, bank, method, **METHODS[method])
    router = moerge.QueryRouter if handle.method.source == "instruction" else moerge.ExampleRouter
    handle.router = router(bank, fake_embedder())
    tables = tables_of(planned(made, made.load(None), builders.tiny_llama()))
    keys = set()
    for text in TEXTS:
        choice = read({"method": method, "query": text}, "no such prompt")
        assert choice == read({"method": method}, text)
        tables.begin([choice], [3])
        with handle.queries(text):
            expected = handle._state.current().affinities.bias
        assert torch.equal(tables.bias[method][:1], expected[:1].cpu()), text
        keys.add(choice.key())
    assert len(keys) == len(TEXTS)


def test_requests_that_say_nothing_are_routed_by_their_prompt(experts):
    read = served_by_text(experts, methods=["phatgoose", "given"])
    by_text = read({"query": "flying"}, "digging")
    assert by_text == read(None, "flying") == read({}, "flying") != read(None, "digging")
    assert by_text.affinities.index(max(by_text.affinities)) == 1
    assert read({"affinities": [1, 0, 0, 0]}, "flying").affinities == (1, 0, 0, 0)
    assert read({"method": "given", "affinities": [1, 0, 0, 0]}, "flying").method == "given"
    assert read({"routing": False}, "flying").affinities is None and read({"method": "phatgoose"}, "").key()
    assert served_by_text(experts, requests=False)(None, "flying") == by_text


@pytest.mark.parametrize(
    "said, words",
    [
        ({"query": 3}, "query must be a text, got 3"),
        ({"query": " "}, "query must be a text, got ' '"),
        ({"query": "\ud800"}, "query must be a text"),
        ({"query": "a", "affinities": [1, 0, 0, 0]}, "affinities and query say the same twice: send one of them"),
        ({"query": "a", "method": "phatgoose"}, "the method 'phatgoose' takes no query"),
        ({"query": "a", "method": "given"}, "the method 'given' reads no query: send affinities"),
        ({"method": "given"}, "the method 'given' needs affinities"),
        ({"query": "a", "expert": "ant"}, "'expert' stands alone"),
    ],
)
def test_queries_that_are_refused(experts, said, words):
    with pytest.raises(ValueError) as refused:
        served_by_text(experts, methods=["phatgoose", "given"])(said, "flying")
    assert words in str(refused.value) and str(refused.value).startswith("moerge: ")


def test_a_query_without_an_embedder():
    with pytest.raises(ValueError, match="this server has no embedder for a query .*: send affinities"):
        Rules(NAMES, {"retrieval": True}).read({"query": "flying"})


@pytest.mark.parametrize(
    "said, words",
    [
        ({"embedder": 3}, "embedder must be a sentence-transformers model, folder or hub id"),
        ({"embedder": {"name": "bag"}}, "embedder must be"),
        ({"embedder": {"model": "bag", "mean_pool": 1}}, "embedder must be"),
        ({"method": "phatgoose"}, "embedder: phatgoose reads no text of a request"),
        ({"method": "ask_llm"}, "method 'ask_llm' asks a language model about every text: leave the method out"),
        ({"method": "dam"}, "method 'dam' embeds by the base model, which the engine has"),
        ({"methods": ["weight_prior"]}, "method 'weight_prior' reads every text with the model"),
        ({"methods": ["lorahub"]}, "method 'lorahub' searches its weights with solved examples"),
        ({"methods": ["zooter"]}, "method 'zooter' has a router that was trained, which a server does not read"),
        ({"spare": 1}, "spare=1: the embedder would not know"),
    ],
)
def test_settings_that_do_not_go_with_an_embedder(experts, said, words):
    with pytest.raises(ValueError) as refused:
        settings(experts, **said)
    assert words in str(refused.value)


def test_an_embedder_is_kept_as_it_was_said(experts):
    for embedder in ("bag", {"model": "bags/", "name": "bag", "prefix": "", "mean_pool": False}):
        made = settings(experts, embedder=embedder)
        assert made.as_dict()["embedder"] == embedder and Settings.parse(made.as_dict()) == made
        assert isinstance(made.queries(None), Queries)
    assert settings(experts, embedder=None).queries(None) is None


def test_no_threads_are_started_before_an_engine_is_forked(experts, monkeypatch):
    """One that torch has started in this process would be missing in the engine's, which waits for it."""
    seen = []

    def load(path, **options):
        return moerge.Embedder(lambda texts: seen.append(torch.get_num_threads()) or bag_of_words(texts), name=path)

    monkeypatch.setattr(moerge.Embedder, "from_sentence_transformers", staticmethod(load))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        settings(experts, methods=["glider_code"]).queries(None)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_prompts_are_read_without_special_tokens():
    prompts = Prompts(letters())
    assert prompts.text("Caps are unknown", None) == "Caps are unknown"
    assert prompts.text(None, [3, 4, 1]) == prompts.text("ab</s>", [3, 4, 1]) == letters().decode([3, 4])
    for given, ids in ((None, [1]), ("</s>", [1]), (" ", [29]), (None, None)):
        with pytest.raises(ValueError, match='moerge: .*: send {"query": "..."}'):
            prompts.text(given, ids)
    assert Prompts(None).text("as it is", None) == "as it is"
    with pytest.raises(ValueError, match="came without one that could be read"):
        Prompts(None).text(None, [3])


class Processor:
    """Stands in for vLLM's `InputProcessor`."""

    def __init__(self, said):
        model = SimpleNamespace(model=None)
        self.vllm_config = SimpleNamespace(additional_config={KEY: said}, model_config=model)
        self.tokenizer = letters()
        frontend.prepare(lambda processor: None, self)

    def process(self, prompt, said=None, ids=(3, 4)):
        params = SimpleNamespace(extra_args=None if said is None else {KEY: said})
        made = SimpleNamespace(sampling_params=params, cache_salt=None, prompt_token_ids=ids, request_id="1")
        return frontend.process_inputs(lambda *_: made, self, "1", prompt, params)


@pytest.fixture
def refusals(monkeypatch):
    monkeypatch.setattr(frontend, "_refusal", lambda: ValueError)


def test_the_front_end_embeds_once_and_salts_the_cache(experts, monkeypatch, refusals):
    seen = []
    monkeypatch.setattr(Queries, "affinities", lambda self, method, text: seen.append(text) or (1.0, 0.0, 0.0, 0.0))
    processor = Processor({"experts": experts, "method": "retrieval", "embedder": "bag"})
    made = processor.process({"type": "token", "prompt": "as typed", "prompt_token_ids": [3, 4]})
    assert made.cache_salt.startswith("moerge:")
    assert made.sampling_params.extra_args[CHECKED]["affinities"] == (1.0, 0.0, 0.0, 0.0)
    for prompt, ids in (("raw", None), ({"type": "token"}, [3, 4, 1]), ({"prompt": "a</s>"}, [3, 1])):
        processor.process(prompt, ids=ids)
    processor.process({"type": "embeds"}, {"query": "brought"}, ids=None)
    decoded = [letters().decode(ids) for ids in ([3, 4], [3])]
    assert seen == ["as typed", "raw", *decoded, "brought"]
    with pytest.raises(ValueError, match="routed by the text of its prompt"):
        processor.process({"type": "embeds"}, ids=None)
    with pytest.raises(ValueError, match="no expert 'eel'"):
        processor.process({"prompt": "text"}, {"expert": "eel"})
    assert len(seen) == 5


def test_beams_are_refused_where_prompts_route(experts, refusals):
    for method, words in (("retrieval", "which vLLM's beam search makes longer"), ("phatgoose", None)):
        said = {"experts": experts, "method": method, "methods": ["centroid"], "embedder": "bag"}
        engine = SimpleNamespace(input_processor=Processor(said))
        for asked in (SimpleNamespace(engine_client=engine), SimpleNamespace(llm_engine=engine)):
            if words is None:
                assert frontend.beams(lambda *_: "beams", asked) == "beams"
            else:
                with pytest.raises(ValueError, match=words):
                    frontend.beams(lambda *_: "beams", asked)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    builders.tiny_llama().save_pretrained(folder)
    return str(folder)


def checked(base, experts, capsys, *more):
    words = ["serve", "--engine", "vllm", "--check", "--model", base, "--experts", *experts, "--method", "retrieval"]
    status = cli.main([*words, *more])
    return status, "".join(capsys.readouterr())


def test_serve_checks_the_embedder_with_everything_else(base, experts, tmp_path, capsys):
    assert checked(base, experts, capsys, "--embedder", "bag")[0] == 0
    bare = str(shutil.copytree(experts[0], tmp_path / "bare"))
    for file in (tmp_path / "bare").glob("moerge_examples*"):
        file.unlink()
    for more, words in (
        (["--embedder", "missing"], ["'missing' is no model"]),
        (["--embedder", "other"], ["'ant': its examples are indexed only by bag, and the queries'"]),
        (["--embedder", "bag", "--experts", bare], ["'bare': its examples are indexed not at all"]),
        (["--embedder", "bag", "--methods", "glider"], ["pass --option threshold=T", "its threshold of 0.8"]),
        (
            ["--embedder", "bag", "--live-experts", "1"],
            ["the embedder would not know what an expert that joins is for"],
        ),
        (["--embedder", "other", "--top-k", "9"], ["top_k=9 is more than", "embedder is 'other'"]),
        (["--embedder", base + "/.."], ["--embedder-name"]),
        (["--embedder-name", "bag"], ["are for --embedder MODEL"]),
        (["--method", "phatgoose", "--engine", "transformers", "--embedder", "bag"], ["phatgoose reads no text"]),
        (["--engine", "transformers"], ["with --embedder they are found for the prompt's text"]),
        (["--engine", "transformers", "--embedder", "other"], ["indexed only by bag"]),
    ):
        status, said = checked(base, experts, capsys, *more)
        assert status == 2 and all(word in said for word in words), said


def test_serve_without_the_library_of_the_embedder(base, experts, capsys, monkeypatch):
    def load(path, **options):
        raise ImportError('this embedder needs sentence-transformers: pip install "moerge_ext[embed]"')

    monkeypatch.setattr(moerge.Embedder, "from_sentence_transformers", staticmethod(load))
    status, said = checked(base, experts, capsys, "--embedder", "bag", "--top-k", "9")
    assert status == 2 and "needs sentence-transformers: pip install" in said and "top_k=9" in said


def test_serve_hands_the_embedder_on(base, experts, monkeypatch):
    from moerge_ext.commands import serve

    started = []
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(serve.os, "execv", lambda *words: started.append(words[1]))
    more = ["--embedder", "bags", "--embedder-name", "bag", "--embedder-prefix", ""]
    cli.main(["serve", "--engine", "vllm", "--model", base, "--experts", *experts, "--method", "centroid", *more])
    said = json.loads(started[0][started[0].index("--additional-config") + 1])["moerge"]
    assert said["embedder"] == {"model": "bags", "name": "bag"}
