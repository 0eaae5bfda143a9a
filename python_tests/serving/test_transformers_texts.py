"""transformers' server with requests that are routed by the text of their prompts, over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import builders
import pytest
import torch
from query_cases import bag_of_words, fake_embedder
from server_cases import word_tokenizer
from test_transformers_server import BATCHING, LINEARS, asked, free_port, openai, posted, serve

import moerge_ext as moerge
from moerge_ext.serving.transformers import launch, texts

PROMPTS = {"ant": "w3 w4 w5", "bee": "w10 w11", "cat": "w20 w21 w22 w23"}
# begins like another, by more than a block of the cache, and is routed otherwise
LONG = ["w50 " * 300 + word for word in ("w3 w4", "w10 w11")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    model = builders.tiny_llama()
    word_tokenizer().save_pretrained(root / "model")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.config.max_position_embeddings = 512
    model.save_pretrained(root / "model")
    made = builders.random_experts(model, root / "experts", tuple(PROMPTS), LINEARS)
    for name, folder in made.items():
        moerge.index_examples(folder, [{"input": PROMPTS[name]}], fake_embedder())
    return str(root / "model"), [str(path) for path in made.values()]


@pytest.fixture(scope="module", params=[(), BATCHING[:1] + ("--cb-num-blocks", "6")], ids=["one by one", "batching"])
def client(request, folders):
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        made = moerge.Embedder(bag_of_words, name="bag")
        patch.setattr(moerge.Embedder, "from_sentence_transformers", staticmethod(lambda path, **_: made))
        served = serve(folders, port, *request.param, method="retrieval", embedder="bag")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
    launch.stop(served)


def wanted(folders, prompt: str, tokens: int = 12) -> str:
    """What the patched model writes for a prompt that is its own query."""
    model, tokenizer = builders.tiny_llama().eval(), word_tokenizer()
    bank = moerge.load_experts(folders[1])
    handle = moerge.patch(model, bank, "retrieval")
    handle.router = moerge.ExampleRouter(bank, fake_embedder())
    ids = torch.tensor([tokenizer(prompt).input_ids])
    with handle.queries(prompt):
        made = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_prompt_routes_its_own_answer(client, folders):
    """Together and one after the other; none has blocks of the cache of another that begins alike."""
    prompts = [*PROMPTS.values(), *LONG]
    want = [wanted(folders, prompt) for prompt in prompts]
    assert len(set(want)) == len(prompts)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda prompt: asked(client, folders[0], prompt), prompts * 2))
    assert got == want * 2
    assert [asked(client, folders[0], prompt, stream=True) for prompt in prompts] == want


def test_a_prompt_without_text_is_refused(client, folders):
    body = {"model": folders[0], "prompt": "</s>", "max_tokens": 3}
    status, said = posted(client, "/v1/completions", body)
    assert status == 400 and "routed by the text of its prompt" in said and "ask with some text" in said
    assert asked(client, folders[0], PROMPTS["ant"]) == wanted(folders, PROMPTS["ant"])


def test_affinities_that_were_let_go_are_found_again(monkeypatch):
    monkeypatch.setattr(texts, "KEPT", 2)
    found = []
    held = texts.Held(None, None, lambda ids: found.append(ids) or (float(ids[0]), 0.0))
    add = held.add(lambda ids, request_id, **_: request_id)
    for i in range(3):
        add([i], request_id=str(i))
    state = type("State", (), {"request_id": "0", "initial_tokens": [0, 9], "_true_initial_tokens": 1})
    assert held._of(state) == (0.0, 0.0) and found == [[0], [1], [2], [0]]
    assert texts.padded([(1.0, 2.0)], 3).tolist() == [[1, 2], [0, 0], [0, 0]]


def test_a_name_that_a_client_uses_again_has_the_affinities_of_its_last_prompt():
    """Before the batch, which another thread computes, can take the request."""
    held = texts.Held(None, None, lambda ids: (float(ids[0]),))
    seen = []
    state = type("State", (), {"request_id": "mine", "initial_tokens": [], "_true_initial_tokens": 0})
    add = held.add(lambda ids, request_id, **_: seen.append(held._of(state)))
    for number in (1, 2):
        add([number], request_id="mine")
    assert seen == [(1.0,), (2.0,)]


def test_batches_without_options_share_nothing():
    """Where the server says nothing of its batching, as on an accelerator without options of --cb."""
    seen = {}

    class Model:
        generate = forward = staticmethod(lambda *_, **__: None)

        @staticmethod
        def init_continuous_batching(**said):
            seen.update(said)
            return type("Batching", (), {"add_request": None, "batch_processor": None})()

    model = Model()
    texts.route_by_texts(model, type("Handle", (), {"disabled": staticmethod(nullcontext)}), None)
    model.init_continuous_batching(generation_config=None, continuous_batching_config=None)
    assert seen["continuous_batching_config"].allow_block_sharing is False
