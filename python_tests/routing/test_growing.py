"""Routers that read the base model's hidden states, and text that `generate` makes longer."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, fake_embedder, letters

import moerge_ext as moerge
from moerge_ext.queries.cache import TextCache
from moerge_ext.queries.hidden import base_name

TOKENIZER = letters()
DATA = {name: [{"input": f"{word} {other}", "target": ""} for other in "abc"] for name, word in WORDS.items()}
QUERIES = ["flying z", "digging z"]


@pytest.fixture
def folders(tmp_path):
    return cases.builders.random_experts(cases.build("llama"), tmp_path, cases.NAMES, cases.DECODER)


@pytest.fixture
def experts(folders):
    return moerge.load_experts(folders)


# ---- the base as embedder --------------------------------------------------------------------------------------------


def test_a_base_has_one_name_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "llama-x" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "llama-x")
    snapshot = "/hub/models--org--llama-x/snapshots/0123abcd"
    assert {base_name(path) for path in ("base", "./base", ".", "../llama-x", str(tmp_path / "llama-x/base"))} == {
        "llama-x"
    }
    assert base_name("org/llama-x") == base_name(snapshot) == "llama-x" and base_name("") == "model"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_hidden_states_are_the_mean_over_the_texts_tokens(family):
    model = cases.build(family)
    embed = moerge.Embedder.from_hidden_states(model, TOKENIZER, name="tiny")
    assert embed.name == "tiny hidden state -2" and embed.cache is None
    got = embed(["ab", "a longer text"])  # padded together
    inner = model.get_encoder() if family == "t5" else model
    for row, text in zip(got, ["ab", "a longer text"], strict=True):
        ids = torch.tensor([TOKENIZER(text).input_ids])
        with torch.no_grad():
            want = inner(input_ids=ids, output_hidden_states=True).hidden_states[-2][0].mean(0)
        torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"layer must be in -3 .. 2 for this model, got 7"):
        moerge.Embedder.from_hidden_states(model, TOKENIZER, layer=7)(["a"])


def test_hidden_states_leave_the_experts_out(folders, experts):
    model = cases.build("llama")
    embed = moerge.Embedder.from_hidden_states(model, TOKENIZER, name="tiny")
    alone = embed(QUERIES)
    for name, folder in folders.items():
        moerge.index_examples(folder, DATA[name], embed)
    handle = moerge.patch(model, experts, "dam")
    assert torch.equal(embed(QUERIES), alone)
    handle.router = moerge.ExampleRouter(experts, embed)
    inputs = cases.batch("llama", rows=2)
    with handle.queries(QUERIES):
        first = cases.logits(model, **inputs)
        with handle.disabled():
            base = cases.logits(model, **inputs)
        assert torch.equal(cases.logits(model, **inputs), first)
    handle.remove()
    assert torch.equal(cases.logits(model, **inputs), base) and not torch.equal(first, base)
    text = fake_embedder()
    for name, folder in folders.items():
        moerge.index_examples(folder, DATA[name], text)
    handle = moerge.patch(model, experts, "dam")
    with pytest.raises(ValueError, match="'dam' routes by the base model's hidden states: index the experts with"):
        handle.queries(QUERIES, moerge.ExampleRouter(experts, text)).__enter__()


# ---- text that grows -------------------------------------------------------------------------------------------------


@pytest.fixture
def spied(folders):
    """(model, handle, the lists of texts that were embedded); the prefix decides between two experts by its length."""
    seen = []

    def embed(texts):
        seen.append(list(texts))
        return torch.tensor([[1.0, 0.0] if len(text) % 2 else [0.0, 1.0] for text in texts])

    embedder = moerge.Embedder(embed, name="parity")
    for name, folder in folders.items():
        moerge.index_examples(folder, [{"input": "odd" if name == "ant" else "even"}], embedder)
    model, experts = cases.build("llama"), moerge.load_experts(folders)
    handle = moerge.patch(model, experts, "token_level", temperature=0.01)
    handle.router = moerge.ExampleRouter(experts, embedder)
    seen.clear()
    return model, handle, seen


def ask(model, rows=2, **options):
    inputs = {"input_ids": cases.tokens(rows), "attention_mask": torch.ones(rows, 7, dtype=torch.long)}
    return model.generate(**inputs, **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options})


def grown(got, steps):
    return [[q + TOKENIZER.decode(row[7 : 7 + n]) for q, row in zip(QUERIES, got, strict=True)] for n in steps]


def test_every_new_token_is_routed_by_the_text_so_far(spied):
    model, handle, seen = spied
    before = set(vars(model))
    with handle.queries(QUERIES, tokenizer=TOKENIZER):
        out = ask(model, output_logits=True, return_dict_in_generate=True)
        assert seen == grown(out.sequences, range(4))
        again = ask(model)  # begins with the queries alone
    assert torch.equal(again, out.sequences) and seen[4] == QUERIES and set(vars(model)) == before
    ids, past = cases.tokens(2), None
    for n, texts in enumerate(grown(out.sequences, range(4))):
        scores = handle.router.scores(texts, handle.options)
        with handle.affinities(scores), torch.no_grad():
            step = model(ids if n == 0 else out.sequences[:, 6 + n : 7 + n], past_key_values=past, use_cache=True)
        past = step.past_key_values
        assert cases.error(out.logits[n], step.logits[:, -1]) < 1e-5


@pytest.mark.parametrize("decoding", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_every_beam_has_its_own_text(spied, decoding):
    model, handle, seen = spied
    with handle.queries(QUERIES, tokenizer=TOKENIZER):
        got = ask(model, **decoding)
    assert len(seen[-1]) == 2 * decoding["num_beams"]
    ids, per_row = cases.tokens(2), len(got) // 2
    for row, query in enumerate(QUERIES):
        with handle.queries(query, tokenizer=TOKENIZER):
            alone = model.generate(
                ids[row : row + 1],
                attention_mask=torch.ones(1, 7, dtype=torch.long),
                **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **decoding},
            )
        assert torch.equal(got[row * per_row : (row + 1) * per_row], alone)


def test_the_text_is_read_again_after_so_many_tokens(folders, spied, tmp_path):
    model, handle, seen = spied
    handle.router.embedder.cache = TextCache(tmp_path / "cache")
    handle.options["every"] = 2
    with handle.queries(QUERIES, tokenizer=TOKENIZER):
        got = ask(model)
    assert seen == grown(got, (0, 2)) and not (tmp_path / "cache").exists()  # prefixes are not kept on disk
    with pytest.raises(ValueError, match="reads the text again as it grows: pass handle.queries"):
        handle.queries(QUERIES).__enter__()


def test_an_encoder_decoder_reads_its_own_words(tmp_path):
    model = cases.build("t5")
    made = cases.builders.random_experts(model, tmp_path, cases.NAMES, cases.FAMILIES["t5"][1])
    for name, folder in made.items():
        moerge.index_examples(folder, DATA[name], fake_embedder())
    experts, seen = moerge.load_experts(made), []
    handle = moerge.patch(model, experts, "token_level")
    handle.router = moerge.ExampleRouter(experts, fake_embedder())
    real = handle.router.embedder.embed
    handle.router.embedder.embed = lambda texts: seen.append(texts) or real(texts)
    with handle.queries(QUERIES, tokenizer=TOKENIZER):
        got = model.generate(cases.tokens(2), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen[-1] == [q + TOKENIZER.decode(row[1:3]) for q, row in zip(QUERIES, got, strict=True)]


@pytest.mark.parametrize(
    "option",
    [
        {"assistant_model": cases.build("llama")},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda option: next(iter(option)),
)
def test_decoding_of_several_tokens_at_once_is_refused(spied, option):
    model, handle, seen = spied
    (name,) = option
    with handle.queries(QUERIES[:1], tokenizer=TOKENIZER):
        with pytest.raises(ValueError, match=f"'token_level' reads the text again at every token, and with {name}"):
            ask(model, rows=1, **option)
        if name != "assistant_model":
            config = copy.deepcopy(model.generation_config)
            setattr(config, *next(iter(option.items())))
            with pytest.raises(ValueError, match=f"and with {name}"):
                ask(model, rows=1, generation_config=config)
        ask(model, rows=1)


def test_continuous_batching_is_refused(spied):
    model, handle, seen = spied
    with handle.queries(QUERIES[:1], tokenizer=TOKENIZER):
        for begin in (model.generate_batch, model.init_continuous_batching):
            with pytest.raises(ValueError, match=r"'token_level' reads the text again.*generate_batch.*use generate"):
                begin(cases.tokens(1).tolist())


def test_texts_of_two_threads_grow_apart(spied):
    model, handle, seen = spied
    want = []
    for query in QUERIES:
        with handle.queries(query, tokenizer=TOKENIZER):
            want.append(ask(model, rows=1))

    def run(query):
        with handle.queries(query, tokenizer=TOKENIZER):
            return [ask(model, rows=1) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for row, answers in enumerate(pool.map(run, QUERIES)):
            assert all(torch.equal(answer, want[row]) for answer in answers)
