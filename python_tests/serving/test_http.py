"""`moerge serve` and its clients: a real server of a tiny model. Needs vLLM and openai: `make test-serve`."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from server_cases import answer, said, server, tiny
from serving_cases import NAMES

import moerge_ext as moerge

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="needs vLLM: make test-serve")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("http")


@pytest.fixture(scope="module")
def address(root):
    """That of a running server."""
    ours = ["--methods", "arrow", "--live-experts", "1", "--routing-metrics", "--traces", "4"]
    model, experts = tiny(root, NAMES, ("eel",))
    with server(root, model, experts, ours) as (address, _):
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


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
        (said(weights={"dog": 1e20}), "moerge: weights must be between -100 and 100, got 1e+20"),
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
        words = words if "use_beam_search" not in more else "Streaming is not currently supported with beam search"
        with pytest.raises(openai.BadRequestError, match=re.escape(words)):
            client.completions.create(model="tiny", prompt="w5 w6", max_tokens=4, stream=True, extra_body=more)
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


def run(*words: str) -> str:
    """What another program of this environment prints."""
    made = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    return made.stdout


def test_lm_eval_scores_choices_as_the_patched_model_does(address, root, tmp_path):
    """Its `local-completions`, on a multiple-choice task of its own: the same accuracy."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: make test-serve")
    choices, rows = [" w10", " w20 w21", " w30"], []
    for i in range(24):
        rows.append({"text": f"w{3 + i} w{90 - i} w{5 + 2 * i}", "choices": choices, "gold": i % 3})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = {"task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.json"}}}
    task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "gold"}
    task |= {"doc_to_choice": "{{choices}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # YAML holds JSON
    said = f"model=tiny,base_url={address}/completions,tokenizer={root / 'model'},num_concurrent=4,max_length=256"
    asked = ("run", "--model", "local-completions", "--model_args", said, "--tasks", "tiny")
    run("-m", "lm_eval", *asked, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"))
    (found,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(found.read_text())["results"]["tiny"]["acc,none"]
    right = [best(root, row["text"], choices) == row["gold"] for row in rows]
    assert accuracy == pytest.approx(sum(right) / len(right)) and 0 < accuracy < 1


def best(root, text: str, choices: list[str]) -> int:
    """The likeliest choice after a text by the patched model of transformers."""
    model, tokenizer = patched(root)
    values = []
    for choice in choices:
        start, whole = (tokenizer(part, return_tensors="pt").input_ids for part in (text, text + choice))
        with torch.no_grad():
            scores = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
        values.append(scores[start.shape[1] - 1 :].sum().item())
    return values.index(max(values))


@functools.cache
def patched(root):
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    moerge.patch(model, moerge.load_experts([root / "experts" / name for name in NAMES]))
    return model, transformers.AutoTokenizer.from_pretrained(root / "model")


def test_vllm_bench_serve(address, root):
    length = ("--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "24", "--max-concurrency", "8")
    said = ("--base-url", address.removesuffix("/v1"), "--model", "tiny", "--tokenizer", str(root / "model"))
    way = ("-m", "moerge_ext.serving.vllm.launch", "bench", "serve", "--backend", "openai", "--dataset-name", "random")
    printed = run(*way, *said, *length)
    assert re.search(r"Successful requests: +24\b", printed), printed
