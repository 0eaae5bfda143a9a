"""Serving: vLLM with routed experts beside plain vLLM, its own LoRA and `model.generate`. Suite `serve` of run.py.

Engines of one process, on the same requests in turn: C requests come at once, each of `PROMPT` tokens and answered by
`ANSWER` more. Every engine's answers are first compared with those of the patched model of transformers.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moerge_ext.models import smollm2

from .results import Recorder

MODEL, EXPERTS, RANK = "SmolLM2-135M-Instruct", 8, 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONCURRENT, PROMPT, ANSWER = (1, 8, 32), 32, 32
PLAIN, AGAIN, ROUTED, LORA, GENERATE = "plain", "plain_again", "ours", "vllm_lora", "generate"
NARROW = "ours_bfloat16"  # with experts in that type, as most adapters are stored
BLOCKS = 64  # of each engine's cache, of 128 tokens on a CPU: every request has one
SIZE = 0.15  # of an expert's B: enough to change what is said
LOG_PROB = 1e-3  # what a log-probability may differ from the patched model's


def prepare(folder: Path) -> tuple[Path, list[str]]:
    """(the model's folder, those of the experts), written once."""
    model, experts = smollm2.base(), [str(folder / f"expert{e}") for e in range(EXPERTS)]
    for e, path in enumerate(experts):
        if not (Path(path) / "adapter_config.json").exists():
            _write_expert(model, Path(path), e)
    return model, experts


def _write_expert(model: Path, folder: Path, seed: int) -> None:
    """A random expert on all linear layers, as PEFT would save it, with a gate."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from moerge_ext import load_experts

    random, tensors = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    for path, layer in base.named_modules():
        if path.rpartition(".")[2] in LINEARS:
            key = f"base_model.model.{path}"
            d, o = layer.in_features, layer.out_features
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, d, generator=random) / math.sqrt(d)
            tensors[f"{key}.lora_B.weight"] = torch.randn(o, RANK, generator=random) * SIZE / math.sqrt(RANK)
    named = {"target_modules": list(LINEARS), "base_model_name_or_path": str(model)}
    LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", **named).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    bank = load_experts([folder])
    gates = {path: torch.randn(module.in_features, generator=random) for path, module in bank.modules.items()}
    bank.set_gates(0, gates)
    bank.save_gates()


class Engine:
    """One vLLM in this process."""

    def __init__(self, model: Path, **options: Any):
        import vllm

        sizes = {"max_model_len": 512, "max_num_seqs": max(CONCURRENT), "dtype": "float32"}
        sizes["num_gpu_blocks_override"] = BLOCKS
        options = {"enable_prefix_caching": False, "skip_tokenizer_init": True} | sizes | options
        self.engine = vllm.LLM(model=str(model), **options).llm_engine
        self._count = 0

    def answer(self, prompts: list[list[int]], adapters: list[str] | None = None) -> dict[str, Any]:
        """Seconds and answers of requests that come at once; adapters: the LoRA folder of each."""
        import vllm
        from vllm.lora.request import LoRARequest

        params = vllm.SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
        begin, cpu, first, last, found = time.perf_counter(), time.process_time(), {}, {}, {}
        for i, ids in enumerate(prompts):
            self._count += 1
            lora = None if adapters is None else LoRARequest(adapters[i], int(adapters[i][-1]) + 1, adapters[i])
            self.engine.add_request(f"{i}.{self._count}", {"prompt_token_ids": ids}, params, lora_request=lora)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                i = int(output.request_id.partition(".")[0])
                last[i] = time.perf_counter() - begin
                first.setdefault(i, last[i])
                found[i] = output.outputs[0]
        tokens = (ANSWER - 1) * len(prompts)
        return {
            "seconds": max(last.values()),
            "cpu": time.process_time() - cpu,
            "first": statistics.median(first.values()),
            "each": sum(last[i] - first[i] for i in last) / tokens,
            "answers": [found[i] for i in range(len(prompts))],
        }


def engines(model: Path, experts: list[str], eager: bool) -> dict[str, Callable[[list[list[int]]], dict[str, Any]]]:
    """{candidate: what answers prompts}."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # LoRA first: vLLM 0.32 cannot start it in a process that has another engine
    way = {"enforce_eager": eager}
    lora = Engine(model, **way, enable_lora=True, max_loras=EXPERTS, max_lora_rank=RANK, max_cpu_loras=EXPERTS)
    said = {"experts": experts, "requests": False}
    routed, narrow = (
        Engine(model, **way, additional_config={"moerge": said | more}) for more in ({}, {"dtype": "bfloat16"})
    )
    plain = Engine(model, **way)

    def by_lora(prompts: list[list[int]]) -> dict[str, Any]:
        return lora.answer(prompts, [experts[i % EXPERTS] for i in range(len(prompts))])

    return {PLAIN: plain.answer, ROUTED: routed.answer, NARROW: narrow.answer, AGAIN: plain.answer, LORA: by_lora}


class Generate:
    """`model.generate` of the patched model, one request at a time."""

    def __init__(self, model: Path, experts: list[str], dtype: torch.dtype | None = None):
        from transformers import AutoModelForCausalLM

        from moerge_ext import load_experts, patch

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        patch(self.model, load_experts(experts, dtype))

    @torch.no_grad()
    def answer(self, prompts: list[list[int]]) -> dict[str, Any]:
        asked = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
        begin, cpu = time.perf_counter(), time.process_time()
        for ids in prompts:
            self.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **asked)
        return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}

    def worst(self, prompts: list[list[int]], answers: list[Any]) -> float:
        """The largest difference of a log-probability of `answers`; infinite where a token is not a best one.

        Experts whose scores differ in the last bits are chosen by rounding, and that differs with how many tokens are
        read at once: an answer that the whole text makes wrong is compared with beginnings of it too.
        """
        worst = 0.0
        for ids, answer in zip(prompts, answers, strict=True):
            off = self.off(ids, answer, len(answer.token_ids))
            if off.max() > LOG_PROB:
                for n in range(1, len(off)):
                    off[:n] = torch.minimum(off[:n], self.off(ids, answer, n))
            worst = max(worst, off.max().item())
        return worst

    @torch.no_grad()
    def off(self, ids: list[int], answer: Any, n: int) -> Tensor:
        """[n]: how far the first n log-probabilities are off where the model reads the text up to there."""
        mine = list(answer.token_ids)[:n]
        scores = self.model(torch.tensor([ids + mine])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        chosen = scores[torch.arange(n), torch.tensor(mine)]
        said = torch.tensor([row[i].logprob for row, i in zip(answer.logprobs, mine, strict=False)])
        return torch.where(scores.amax(-1) - chosen > 1e-4, math.inf, (said - chosen).abs())


def prompts_of(count: int, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40000, (PROMPT,), generator=random).tolist() for _ in range(count)]


def run(
    recorder: Recorder, folder: Path, rounds: int, concurrent: tuple[int, ...] = CONCURRENT, eager: bool = False
) -> list[str]:
    """Measures and records; the answers of ours that are wrong."""
    model, experts = prepare(folder)
    reference, other = Generate(model, experts), Generate(model, experts, torch.bfloat16)
    answers = engines(model, experts, eager)
    problems = []
    for count in concurrent:
        way = "eager" if eager else "compiled"
        cell = {
            "suite": "serve",
            "mode": f"C={count} {way}",
            "size": MODEL,
            "E": EXPERTS,
            "R": RANK,
            "dtype": "float32",
            "load": round(os.getloadavg()[0], 1),
        }
        asked = prompts_of(count, seed=count)
        worst = reference.worst(asked, answers[ROUTED](asked)["answers"])
        worst = max(worst, other.worst(asked, answers[NARROW](asked)["answers"]))
        if worst > LOG_PROB:
            problems.append(f"{count} requests: log-probabilities of ours are off by {worst:.1e}")
            continue
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*answers, GENERATE)}
        for i in range(rounds):
            asked = prompts_of(count, seed=1000 * count + i)
            for name, answer in answers.items():
                gc.collect()
                found[name].append(answer(asked))
            if count == 1 or i == 0:
                found[GENERATE].append(reference.answer(asked[:4]) | {"requests": min(count, 4)})
        rows = rows_of(found, count)
        recorder.add(cell, [row | {"error": worst} for row in rows])
        print(f"{count} concurrent requests, {way}, log-probabilities within {worst:.1e}")
        for row in rows:
            print("   " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return problems


def rows_of(found: dict[str, list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """Medians over rounds; ratios to plain are taken round by round.

    cpu: what the process computed (an engine on one thread), which neighbours on the machine disturb least.
    """
    rows = []
    for name, runs in found.items():
        speeds = [run.get("requests", count) * ANSWER / run["seconds"] for run in runs]
        row = {"candidate": name, "rounds": len(runs), "tokens_per_second": round(statistics.median(speeds), 2)}
        costs = [1e3 * run["cpu"] / (run.get("requests", count) * ANSWER) for run in runs]
        row["cpu_ms_per_token"] = round(statistics.median(costs), 3)
        plain = found[PLAIN][: len(runs)]
        if name not in (PLAIN, GENERATE):
            for key in ("seconds", "cpu", "first", "each"):
                ratios = sorted(run[key] / other[key] for run, other in zip(runs, plain, strict=True))
                row[f"{key}_ratio"] = round(statistics.median(ratios), 4)
                row[f"{key}_ratio_range"] = [round(ratios[0], 4), round(ratios[-1], 4)]
        for key in ("first", "each"):
            if key in runs[0]:
                row[f"{key}_ms"] = round(1e3 * statistics.median(run[key] for run in runs), 2)
        rows.append(row)
    return rows
