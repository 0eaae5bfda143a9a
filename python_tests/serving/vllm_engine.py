"""An engine of the real vLLM in the tests' process, and what it must agree with; importing it skips without vLLM."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from serving_cases import NAMES

import moerge_ext as moerge

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

LENGTH = 256


class Engine:
    """vLLM in this process, let go of at the end of a block."""

    def __init__(self, model: Path, experts: list[str] | None, said: dict | None = None, **options):
        config = {} if experts is None else {"moerge": {"experts": experts} | (said or {})}
        sizes = {"max_model_len": LENGTH, "max_num_seqs": 8, "dtype": "float32", "skip_tokenizer_init": True}
        options = {"enforce_eager": True} | sizes | options
        self.llm = vllm.LLM(model=str(model), additional_config=config, disable_log_stats=False, **options)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def answers(self, prompts: list[list[int]], said: list[dict | None] | dict | None = None, count: int = 12, **more):
        """The outputs of greedy decoding; `said` is what each request says of its routing."""
        said = said if isinstance(said, list) else [said] * len(prompts)
        params = [
            vllm.SamplingParams(
                max_tokens=count,
                temperature=0,
                logprobs=1,
                detokenize=False,
                ignore_eos=True,
                extra_args=None if one is None else {"moerge": one},
                **more,
            )
            for one in said
        ]
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def prompts(count: int, length: int = 40, seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length, (count,), generator=random).tolist()
    return [torch.randint(3, 96, (n,), generator=random).tolist() for n in lengths]


class Reference:
    """The patched model of transformers."""

    def __init__(self, model: Path, experts: list[str]):
        self.model, self.experts = model, experts

    def check(self, outputs, said: dict | None = None, method: str = "phatgoose", ties: int = 0, **options) -> None:
        """Every token is the best one, or as good within 1e-4; its log-probability is right within 1e-3.

        ties: so many tokens may be off by up to 1e-2: behind one for which two experts' scores are equal to the last
        bits of float32, so that each engine's rounding chooses another.
        """
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        handle = moerge.patch(model, moerge.load_experts(self.experts), method, **options)
        rows = None
        for key in ("weights", "affinities"):
            if said is not None and key in said:
                rows = torch.tensor([said[key].get(name, 0.0) for name in NAMES])
        for output in outputs:
            ids, asked = list(output.outputs[0].token_ids), list(output.prompt_token_ids)
            whole = torch.tensor([asked + ids])
            with torch.no_grad(), handle.disabled() if rows is None and said else _rows(handle, rows):
                scores = model(whole).logits[0, len(asked) - 1 : -1].log_softmax(-1)
            mine = scores[torch.arange(len(ids)), torch.tensor(ids)]
            given = torch.tensor([row[i].logprob for row, i in zip(output.outputs[0].logprobs, ids, strict=True)])
            off = (given - mine).abs()
            ties -= int((off >= 1e-3).sum())
            assert (scores.amax(-1) - mine).max() < 1e-4 and off.max() < 1e-2 and ties >= 0, off.max()


def _rows(handle, rows):
    return nullcontext() if rows is None else handle.affinities(rows)
