"""A real server over thousands of requests, and one whose worker is killed. Needs vLLM: `make test-serve`."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_cases import answer, said, server, tiny
from serving_cases import NAMES

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="needs vLLM: make test-serve")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

EARLY, LATE, ROOM = 200, 2000, 1.05  # requests; how much more memory may be held after the later ones
KINDS = (
    {},
    said(routing=False),
    said(expert="ant"),
    said(method="arrow"),
    said(weights={"bee": 0.5}),
    said(trace=True),
)
PATIENCE = 120  # seconds in which everything must have ended


def family(process: subprocess.Popen) -> list:
    mother = psutil.Process(process.pid)
    return [mother, *mother.children(recursive=True)]


def resident(process: subprocess.Popen) -> int:
    """Bytes of a server with its workers."""
    return sum(one.memory_info().rss for one in family(process))


def test_memory_does_not_grow_with_requests(tmp_path):
    """Of all kinds, sixteen at once, no two prompts the same."""
    model, experts = tiny(tmp_path, NAMES)
    ours = ["--methods", "arrow", "--routing-metrics", "--traces", "8", "--live-experts", "1"]
    with server(tmp_path, model, experts, ours) as (address, process), ThreadPoolExecutor(16) as pool:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

        def ask(i: int) -> bool:
            prompt = " ".join(f"w{3 + (i * 13 + j * (1 + i // 90)) % 90}" for j in range(20))
            return bool(answer(client, prompt=prompt, max_tokens=4, ignore_eos=True, **KINDS[i % len(KINDS)]))

        assert all(pool.map(ask, range(EARLY)))
        early = resident(process)
        assert all(pool.map(ask, range(EARLY, LATE)))
        late = resident(process)
    print(f"{early / 2**20:.0f} MiB after {EARLY} requests, {late / 2**20:.0f} MiB after {LATE}")
    assert late <= ROOM * early, f"{early / 2**20:.0f} MiB after {EARLY} requests, {late / 2**20:.0f} after {LATE}"


def test_a_killed_worker_leaves_nobody_waiting(tmp_path):
    """One of two ranks dies amid requests: all of them end with an error, later ones too, and so does the server."""
    model, experts = tiny(tmp_path, NAMES)
    theirs = ["--tensor-parallel-size", "2"]
    with server(tmp_path, model, experts, (), theirs) as (address, process), ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=PATIENCE)
        workers = [one for one in family(process) if "Worker" in one.name()]
        assert len(workers) == 2, [one.name() for one in family(process)]
        everybody = family(process)

        def ask(_: int) -> type | None:
            try:
                answer(client, max_tokens=240, ignore_eos=True)
            except openai.OpenAIError as error:
                return type(error)
            return None

        begun = [pool.submit(ask, i) for i in range(8)]
        with client.completions.create(
            model="tiny", prompt="w5", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))
            workers[-1].kill()
            with pytest.raises(Exception):  # noqa: B017 (an error in the stream, or a connection that breaks off)
                for part in stream:
                    assert getattr(part, "error", None) is None
        ended = [one.result(PATIENCE) for one in begun]
        assert sum(error is not None for error in ended) > 0 and openai.APITimeoutError not in ended
        assert ask(0) is not None
        process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while left := [one for one in everybody if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < end, left
            time.sleep(1)
