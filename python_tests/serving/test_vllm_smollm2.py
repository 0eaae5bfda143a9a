"""A model that speaks and experts that were trained, in the real vLLM: the answers of the patched model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from vllm_engine import LENGTH, Engine, Reference

import moerge_ext.demo
from moerge_ext.demo.questions import SKILLS, rows
from moerge_ext.models import smollm2

pytestmark = pytest.mark.slow
APART = ("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # engines in processes of their own
EXPERTS = sorted(str(path) for path in (Path(moerge_ext.demo.__file__).parent / "real_experts").iterdir())


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return smollm2.base()
    except Exception as error:
        pytest.skip(f"needs SmolLM2-135M-Instruct: {error}")


@pytest.fixture(scope="module")
def asked(model) -> list[list[int]]:
    """64 questions as chats."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [row["input"] for i in range(64) for row in rows(list(SKILLS)[i % len(SKILLS)], 1, test=True, seed=i)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def test_answers_in_batches_and_from_the_cache(model, asked, monkeypatch):
    """64 x 64 tokens, 32 at once; the same again, from blocks that are kept; by eights and one by one."""
    monkeypatch.setenv(*APART)
    longest = max(map(len, asked))
    options = {"max_num_seqs": 32, "max_model_len": longest + 64, "block_size": 32}
    with Engine(model, EXPERTS, **options) as engine:
        (said,) = engine.llm.collective_rpc("moerge_status")
        outputs = engine.answers(asked, count=64)
        again = engine.answers(asked, count=64)
        few = [output for ids in (asked[:8], asked[8:9]) for output in engine.answers(ids, count=64)]
    assert said["modules"] == 210 and said["seconds"] < 2
    assert all(output.num_cached_tokens >= 32 for output in again)
    reference = Reference(model, EXPERTS)
    for found in (outputs, again, few):
        reference.check(found, ties=4)  # of 4096; two scores of layer 7's o_proj are 1.4e-6 apart, of 5.7


def test_answers_of_three_ranks(model, asked, monkeypatch):
    """9 heads and 3 of k and v: a third for each."""
    monkeypatch.setenv(*APART)
    torch.manual_seed(0)
    with Engine(model, EXPERTS, tensor_parallel_size=3, distributed_executor_backend="mp") as engine:
        outputs = engine.answers([ids for ids in asked if len(ids) < LENGTH - 16][:8], count=16)
    Reference(model, EXPERTS).check(outputs)
