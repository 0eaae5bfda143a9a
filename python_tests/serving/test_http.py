"""`moerge serve` and its clients: a real server of a tiny model. Needs vLLM and openai: `make test-serve`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import builders
import pytest
import torch
import transformers
from serving_cases import LINEARS, NAMES
from tokenizers import Tokenizer, models, pre_tokenizers

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="needs vLLM: make test-serve")
openai = pytest.importorskip("openai")

START = 600  # seconds that a server may take on a slow machine


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("http")


@pytest.fixture(scope="module")
def address(root):
    """That of a running server."""
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2))
    model.float().save_pretrained(root / "model")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(root / "model")
    experts = builders.random_experts(model, root / "experts", (*NAMES, "eel"), LINEARS)
    experts.pop("eel")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    ours = ["--model", str(root / "model"), "--experts", *map(str, experts.values()), "--methods", "arrow"]
    ours += ["--live-experts", "1", "--routing-metrics", "--traces", "4"]
    theirs = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    words = [sys.executable, "-m", "moerge_ext", "serve", *ours, "--", *theirs, "--max-model-len", "256"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment.pop("VLLM_PLUGINS", None)
    log = (root / "log").open("w")
    server = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        wait(port, server, root / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait(port: int, server: subprocess.Popen, log) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    pytest.fail(f"no server after {START} s:\n" + log.read_text()[-4000:])


def said(**routing) -> dict:
    return {"vllm_xargs": {"moerge": json.dumps(routing)}}


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


def answer(client, **more) -> str:
    asked = {"model": "tiny", "prompt": "w5 w6 w7 w8", "max_tokens": 8, "temperature": 0}
    asked |= {key: more.pop(key) for key in list(more) if key in asked}
    return client.completions.create(**asked, extra_body=more).choices[0].text


def test_the_openai_client_and_what_it_may_say(client):
    routed, base = answer(client), answer(client, **said(routing=False))
    one = answer(client, **said(expert="dog"))
    assert len({routed, base, one}) == 3
    assert answer(client, **said(weights={"dog": 1})) == one and answer(client, **said(method="phatgoose")) == routed
    stream = client.completions.create(
        model="tiny", prompt="w5 w6 w7 w8", max_tokens=8, temperature=0, stream=True, extra_body=said(expert="dog")
    )
    assert "".join(part.choices[0].text for part in stream) == one


@pytest.mark.parametrize(
    "more, words",
    [
        (said(expert="eel"), "moerge: no expert 'eel'; there are ant, bee, cat, dog"),
        (said(weights=[1]), "moerge: weights must have E=4 numbers, got 1"),
        ({"vllm_xargs": {"moerge": '{"weights": [NaN, 0, 0, 0]}'}}, "moerge: weights must be finite numbers"),
        (said(method="retrieval"), "moerge: no method 'retrieval' on this server"),
        (said(routing=False) | {"use_beam_search": True}, "beam search carries no routing"),
    ],
)
def test_what_is_wrong_is_400_and_touches_no_other(client, more, words):
    before = answer(client)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(answer, client) for _ in range(7)]
        with pytest.raises(openai.BadRequestError) as refused:
            answer(client, **more)
        assert words in str(refused.value)
        assert [other.result() for other in others] == [before] * 7


def test_many_clients_and_some_that_leave(client):
    """200 at once, each with its own routing; a tenth hangs up after the first token."""
    kinds = [{}, said(routing=False), said(expert="ant"), said(method="arrow")]
    wanted = [answer(client, **kind) for kind in kinds]

    def ask(i: int) -> bool:
        kind = i % len(kinds)
        if i % 10 == 9:
            asked = {"model": "tiny", "prompt": "w5 w6", "max_tokens": 200, "stream": True}
            with client.completions.create(**asked, extra_body=kinds[kind]) as stream:
                next(iter(stream))
            return True
        return answer(client, **kinds[kind]) == wanted[kind]

    with ThreadPoolExecutor(200) as pool:
        assert all(pool.map(ask, range(200)))
    assert [answer(client, **kind) for kind in kinds] == wanted


LONG = " ".join(f"w{3 + 7 * i % 90}" for i in range(160))  # more than a block of the cache


def asked(address, method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_experts_come_and_go_under_requests(address, client, root):
    """Each answer is that of the pool with the new expert or of that without it; no cache mixes them."""
    source = str(root / "experts" / "eel")
    without = answer(client, prompt=LONG)
    status, found = asked(address, "POST", "/moerge/experts", {"name": "eel", "source": source})
    assert status == 200 and found["data"][-1] == {"name": "eel", "source": source} and found["spare"] == 0
    within, alone = answer(client, prompt=LONG), answer(client, **said(expert="eel"))
    assert within != without and alone != answer(client)
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(lambda: [answer(client, prompt=LONG) for _ in range(4)]) for _ in range(8)]
        for _ in range(2):
            assert asked(address, "DELETE", "/moerge/experts/eel")[0] == 200
            assert answer(client, prompt=LONG) == without
            assert asked(address, "POST", "/moerge/experts", {"name": "eel", "source": source})[0] == 200
            assert answer(client, prompt=LONG) == within
        assert {text for other in others for text in other.result()} <= {within, without}
    for method, path, body, words in (
        ("POST", "", {"name": "fox", "source": source}, "all 5 slots are taken"),
        ("POST", "", {"name": "eel", "source": str(root)}, "eel"),
        ("POST", "", {"name": "eel"}, "moerge: expected"),
        ("DELETE", "/fox", None, "no expert 'fox'; there are ant, bee, cat, dog, eel"),
        ("DELETE", "/eel?wait=long", None, "wait must be a number of seconds"),
    ):
        status, refused = asked(address, method, "/moerge/experts" + path, body)
        assert status == 400 and words in refused["error"]["message"]
    assert answer(client, prompt=LONG) == within
    assert asked(address, "DELETE", "/moerge/experts/eel")[1]["spare"] == 1
    assert answer(client, prompt=LONG) == without
    with pytest.raises(openai.BadRequestError, match="no expert 'eel'"):
        answer(client, **said(expert="eel"))


def test_a_trace_of_a_request(address, client):
    """One line for every token that was computed; the weights of phatgoose sum to 1 in every module."""
    request = {
        "model": "tiny",
        "prompt": "w9 w8 w7",
        "max_tokens": 5,
        "extra_body": {"ignore_eos": True} | said(trace=True),
    }
    made = client.completions.create(**request)
    status, found = asked(address, "GET", f"/moerge/traces/{made.id}")
    (trace,) = found["data"]
    assert status == 200 and trace["experts"] == list(NAMES) and trace["prompt_tokens"] == 3
    assert len(trace["tokens"]) == 7 and all(sum(row) == pytest.approx(1) for row in trace["tokens"])
    assert len(trace["modules"]) == 14
    assert asked(address, "GET", "/moerge/traces/cmpl-none")[0] == 404


def test_metrics_count_what_was_routed(address, client):
    def read():
        with urllib.request.urlopen(address.removesuffix("/v1") + "/metrics", timeout=60) as found:
            lines = [line.rsplit(" ", 1) for line in found.read().decode().splitlines() if line.startswith("moerge_")]
        return {name: float(value) for name, value in lines}

    before = read()
    answer(client, max_tokens=4, ignore_eos=True, **said(expert="dog"))
    answer(client, max_tokens=4, ignore_eos=True)
    grown = {name: value - before.get(name, 0.0) for name, value in read().items()}
    assert grown['moerge_tokens_total{method="given"}'] == grown['moerge_tokens_total{method="phatgoose"}'] == 7
    assert grown["moerge_routed_token_modules_total"] == 7 * 14
    assert sum(v for name, v in grown.items() if name.startswith("moerge_expert_weight")) == pytest.approx(7 * 14)
