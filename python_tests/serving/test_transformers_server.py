"""transformers' own server with a routed model, over HTTP: its real app, its real client."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from importlib.util import find_spec

import builders
import pytest
import torch
from query_cases import wide_tokenizer

import moerge_ext as moerge
from moerge_ext.serving.settings import Settings
from moerge_ext.serving.transformers import launch
from moerge_ext.serving.transformers.checks import checked

NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")
if lost := [name for name in NEEDED if find_spec(name) is None]:
    pytest.skip(f"needs {', '.join(lost)}: pip install 'moerge_ext[serve]'", allow_module_level=True)

import openai  # noqa: E402

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = ("the cat sat", "a", "of dogs and of birds: ", "zz. zz. zz.")
TOKENS = 12
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
BATCHING = ("--continuous-batching", "--cb-num-blocks", "2")  # of 256 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the model's folder, those of its experts)."""
    root = tmp_path_factory.mktemp("server")
    model = builders.tiny_llama()
    tokenizer = wide_tokenizer(root / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "model")
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # so that every answer has its length
    model.save_pretrained(root / "model")
    experts = builders.random_experts(model, root / "experts", ("ant", "bee", "cat"), LINEARS)
    return str(root / "model"), [str(path) for path in experts.values()]


def serve(folders, port: int, *words: str, method: str = "phatgoose", **more):
    model, experts = folders
    settings = Settings.parse({"experts": experts, "method": method} | more)
    found = checked(settings, model)
    context = launch.options_of(model, ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *words])
    served = launch.start(settings, model, *found, context)
    end = time.monotonic() + 60
    while not served.server.started and served._thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert served.server.started
    return served


def free_port() -> int:
    import socket

    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", params=[(), BATCHING], ids=["one by one", "continuous batching"])
def server(request, folders):
    """(transformers' Serve, the openai client of it)."""
    port = free_port()
    served = serve(folders, port, *request.param)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield served, client
    launch.stop(served)
    assert not served._thread.is_alive()


def wanted(folders, prompt: str, method: str | None = "phatgoose", tokens: int = TOKENS) -> str:
    """What the patched model (None: the base) writes after a prompt by itself."""
    model, tokenizer = builders.tiny_llama().eval(), wide_tokenizer(folders[0] + "-wanted")
    if method is not None:
        moerge.patch(model, moerge.load_experts(folders[1]), method)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def asked(client, model: str, prompt: str, stream: bool = False, tokens: int = TOKENS) -> str:
    said = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=stream)
    return "".join(part.choices[0].text or "" for part in said) if stream else said.choices[0].text


def posted(client, path: str, body: dict) -> tuple[int, str]:
    said = client._client.post(str(client.base_url).removesuffix("/v1/") + path, json=body)
    return said.status_code, said.text


def test_answers_are_those_of_the_patched_model(server, folders):
    """Together, streamed and whole: the tokens of the patched model asked one by one."""
    _, client = server
    want = [wanted(folders, prompt) for prompt in PROMPTS]
    assert want != [wanted(folders, prompt, None) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        for stream in (False, True):
            got = pool.map(lambda prompt, how=stream: asked(client, folders[0], prompt, how), PROMPTS * 2)
            assert list(got) == want * 2
    messages = [{"role": "user", "content": "hello"}]
    said = client.chat.completions.create(model=folders[0], messages=messages, max_tokens=TOKENS, temperature=0)
    assert said.choices[0].message.content == wanted(folders, "u:hello.a:") and said.model == folders[0]


def test_there_is_one_model(server, folders):
    served, client = server
    assert [model.id for model in client.models.list().data] == [folders[0]]
    with pytest.raises(openai.BadRequestError) as refused:
        asked(client, "gpt", "a")
    assert "requested 'gpt'" in refused.value.response.text
    for name in ("gpt", folders[1][0], f"{folders[0]}@other", f"{folders[0]}:x.gguf"):
        status, said = posted(client, "/load_model", {"model": name})
        assert status == 404 and "this server has one model" in said, said
    status, said = posted(client, "/load_model", {"model": folders[0]})
    assert status == 200 and "ready" in said
    assert list(served._model_manager.loaded_models) == [folders[0]]


def test_a_model_that_was_unloaded_comes_back_routed(server, folders):
    served, client = server
    before = served._model_manager.handle
    assert posted(client, "/reset", {})[0] == 200 and not served._model_manager.loaded_models
    assert asked(client, folders[0], "a") == wanted(folders, "a")
    assert served._model_manager.handle is not before
    (timed,) = served._model_manager.loaded_models.values()
    calls, forward = [], timed.model.forward
    timed.model.forward = lambda *args, **said: calls.append(1) or forward(*args, **said)
    assert asked(client, folders[0], "a") == wanted(folders, "a")
    timed.model.forward = forward
    assert calls, "another model answered"


def test_a_request_says_nothing_of_its_routing(server, folders):
    _, client = server
    body = {"model": folders[0], "prompt": "a", "max_tokens": 2, "moerge": {"expert": "ant"}}
    status, said = posted(client, "/v1/completions", body)
    assert status == 422 and "moerge" in said


def test_a_client_that_leaves_keeps_nobody_waiting(server, folders):
    _, client = server
    long = {"max_tokens": 400, "temperature": 0, "stream": True}
    with client.completions.create(model=folders[0], prompt="a", **long) as stream:
        next(iter(stream))
    assert asked(client, folders[0], "zz", tokens=3) == wanted(folders, "zz", tokens=3)


@pytest.mark.alone
def test_an_answer_without_stream_ends_when_its_client_leaves(server, folders):
    """Also one that waits for its turn; the answer of who stays is whole."""
    served, client = server
    assert asked(client, folders[0], "zz", tokens=3)  # the model is there
    (timed,) = served._model_manager.loaded_models.values()
    calls, forward = [], timed.model.forward

    def slow(*args, **said):
        calls.append(time.monotonic())
        time.sleep(0.1)
        return forward(*args, **said)

    timed.model.forward = slow
    try:
        impatient = client.with_options(timeout=0.5)
        with ThreadPoolExecutor(3) as pool:
            gone = [pool.submit(asked, impatient, folders[0], prompt, tokens=100) for prompt in ("a", "of")]
            stays = pool.submit(asked, client, folders[0], "zz", tokens=12)
            for answer in gone:
                assert isinstance(answer.exception(), openai.APITimeoutError), (answer.result(), len(calls))
            assert stays.result() == wanted(folders, "zz", tokens=12)
        while time.monotonic() - calls[-1] < 1:  # until nothing runs any more
            time.sleep(0.1)
        assert len(calls) < 60
    finally:
        timed.model.forward = forward


@pytest.mark.parametrize("server", [()], indirect=True, ids=["one by one"])
def test_an_answer_ends_with_the_context(server, folders):
    """Of 128 positions."""
    _, client = server
    said = client.completions.create(model=folders[0], prompt="a" * 100, max_tokens=100_000, temperature=0)
    assert said.usage.completion_tokens == 28 and said.choices[0].finish_reason == "length"
    assert said.choices[0].text == wanted(folders, "a" * 100, tokens=28)
    status, text = posted(client, "/v1/completions", {"model": folders[0], "prompt": "a" * 128, "max_tokens": 1})
    assert status == 400 and "has 128 tokens, which leave no room in the context of 128" in text
    body = {"model": folders[0], "prompt": "a" * 200, "stream": True}
    assert "leave no room" in posted(client, "/v1/completions", body)[1]


def test_a_stream_says_that_it_is_whole(server, folders):
    _, client = server
    messages = [{"role": "user", "content": "a"}]
    for path, asks in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": messages})):
        body = {"model": folders[0], "max_tokens": 3, "stream": True, **asks}
        status, said = posted(client, path, body)
        *events, last = said.strip().split("\n\n")
        assert status == 200 and last == "data: [DONE]" and len(events) > 1 and "[DONE]" not in "".join(events)


@pytest.mark.parametrize("number", [0, -5])
def test_no_tokens_are_refused(server, folders, number):
    _, client = server
    status, said = posted(client, "/v1/completions", {"model": folders[0], "prompt": "a", "max_tokens": number})
    assert status == 400 and f"max_tokens must be at least 1, got {number}" in said, (status, said[:300])


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_prompt_is_refused(server, folders, stream):
    _, client = server
    said = posted(client, "/v1/completions", {"model": folders[0], "prompt": "", "max_tokens": 3, "stream": stream})[1]
    assert "moerge: the prompt has no tokens" in said, said[:300]
    assert asked(client, folders[0], "a") == wanted(folders, "a")


@pytest.mark.parametrize("stream", [False, True])
def test_what_makes_no_sense_is_refused(server, folders, stream):
    _, client = server

    def refused(path: str, **body) -> str:
        status, said = posted(client, path, {"model": folders[0], "max_tokens": 3, "stream": stream, **body})
        assert status == 400, (status, said[:300])
        return json.loads(said)["detail"]

    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, rest in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", chat)):
        assert refused(path, **rest, temperature=-1) == 'moerge: "temperature" must be a number from 0, got -1'
        said = refused(path, **rest, top_p=1.5, seed="x")
        assert '"top_p" must be a number above 0 and at most 1, got 1.5; "seed" must be an integer, got \'x\'' in said
    assert refused("/v1/completions") == 'moerge: "prompt" must be a text, the request has none'
    assert "got ['a', 'b']" in refused("/v1/completions", prompt=["a", "b"])
    assert refused("/v1/completions", **chat).endswith("none; messages are for /v1/chat/completions")
    assert (
        posted(client, "/v1/completions", {"model": folders[0], "prompt": "a", "max_tokens": 3, "top_p": 1})[0] == 200
    )


@pytest.mark.parametrize("server", [BATCHING], indirect=True, ids=["continuous batching"])
def test_a_request_larger_than_the_cache_is_refused_alone(server, folders):
    """transformers ends its batching, for all requests, at one that does not fit."""
    _, client = server
    for stream in (False, True):
        body = {"model": folders[0], "prompt": "a", "max_tokens": 600, "stream": stream}
        status, said = posted(client, "/v1/completions", body)
        assert status == 400 and "has 1 token, and 600 more do not fit the cache of 512" in said
    body = {"model": folders[0], "prompt": "a" * 600, "max_tokens": 2}
    assert posted(client, "/v1/completions", body)[0] == 400
    assert asked(client, folders[0], "a") == wanted(folders, "a")
    asked(client, folders[0], "a" * 500, tokens=12)  # all that there is
    assert client._client.get(str(client.base_url).removesuffix("/v1/") + "/health").status_code == 200


@pytest.mark.alone
@pytest.mark.parametrize("words", [(), BATCHING], ids=["one by one", "continuous batching"])
def test_it_stops_while_answers_run(folders, words):
    port = free_port()
    served = serve(folders, port, *words)
    long = {"model": folders[0], "prompt": "a", "max_tokens": 500, "temperature": 0}
    ended = []

    def ask(stream: bool) -> None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            try:
                said = client.completions.create(**long, stream=stream)
                ended.extend(said if stream else [said])
            except openai.OpenAIError as error:
                ended.append(error)

    model = served._model_manager.loaded_models[folders[0]].model
    running = threading.Event()
    model.register_forward_pre_hook(lambda *_: (running.set(), time.sleep(0.02))[0])
    asking = [threading.Thread(target=ask, args=(stream,), daemon=True) for stream in (False, True)]
    for thread in asking:
        thread.start()
    assert running.wait(30)
    begun = time.monotonic()
    launch.stop(served)
    assert time.monotonic() - begun < 8 and not served._thread.is_alive()
    for thread in asking:
        thread.join(10)
        assert not thread.is_alive()
    assert ended


@pytest.mark.alone
def test_a_stream_that_gets_no_token_ends_with_the_server(folders):
    """Such a one came to transformers' batching after it had refused those that waited, and before it was dead."""
    port = free_port()
    served = serve(folders, port, *BATCHING)
    ended = threading.Event()
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        assert asked(client, folders[0], "a")
        served._generation_state._cb_manager._cb.add_request = lambda *_, request_id, **__: request_id
        stream = client.completions.create(model=folders[0], prompt="a", stream=True)

        def read() -> None:
            with suppress(Exception):  # the connection was closed
                list(stream)
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        launch.stop(served)
        assert ended.wait(5)


@pytest.mark.parametrize("method", ["arrow", "merged", "expert:bee"])
def test_other_methods(folders, method):
    port = free_port()
    served = serve(folders, port, *BATCHING, method=method)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        with client, ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda prompt: asked(client, folders[0], prompt), PROMPTS))
        assert got == [wanted(folders, prompt, method) for prompt in PROMPTS]
    finally:
        launch.stop(served)


def test_what_answers_is_json(server, folders):
    """The usage that clients are billed by."""
    _, client = server
    status, said = posted(client, "/v1/completions", {"model": folders[0], "prompt": "abc", "max_tokens": 4})
    usage = json.loads(said)["usage"]
    assert status == 200 and usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
