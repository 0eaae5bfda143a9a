"""Train what the demo ships: a small Llama-shaped base, one LoRA expert per skill, and the experts' gates.

    python -m moerge_ext.demo.assets [--out DIR] [--workers 2]

Everything is seeded and every process computes on one thread, so a machine gives the same files every time.
Weights are stored as float16 (gates as float32); each stage is trained on the stored weights of the one before.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import IGNORE, KINDS, base_document, build_tokenizer, expert_example
from .stored import size_of, store_as, tidy
from .tasks import TASKS

ASSETS = Path(__file__).parent / "assets"
SIZE_LIMIT = 6_000_000  # bytes, all files together

# All seven linears, except the first layer's q, k and v: they see bare token embeddings, from which no router can
# tell what the line is about.
TARGETS = (
    r".*layers\.([1-9]\d*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    r"|0\.(self_attn\.o_proj|mlp\.(gate|up|down)_proj))"
)


HARD = ("reverse",)


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the three trainings."""

    hidden: int = 192
    intermediate: int = 384
    layers: int = 3
    heads: int = 6
    base_steps: int = 1200
    base_batch: int = 24
    base_length: int = 72
    base_lr: float = 3e-3
    topic_weight: float = 0.3  # of the topic loss (see topic_loss)
    rank: int = 8
    alpha: float = 16.0
    expert_steps: int = 300
    expert_lr: float = 2e-3
    expert_decay: float = 0.1  # small updates bear being mixed with another expert's
    hard_steps: int = 500  # for the skills in HARD
    batch: int = 32
    gate_steps: int = 8  # few and large: a gate is saturated early, and what small batches add is noise
    gate_lr: float = 5e-3
    gate_batch: int = 128
    gate_accumulate: int = 8


def topic_loss(hidden_states: tuple[torch.Tensor, ...], prototypes: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, over layers and labelled tokens, of telling what a token's line is about.

    hidden_states: L+1 tensors [N,S,D] (the embeddings first); prototypes [L,C,D]; kinds [N,S] in 0..C-1 or IGNORE.
    The logits are 6 cos(layer_norm(h), prototype). The prototypes are thrown away after training. Large models
    represent the topic of a text in every layer; one of a million weights has no need to, and routing by hidden
    states lives on it.
    """
    keep = kinds != IGNORE
    losses = []
    for states, heads in zip(hidden_states[1:], prototypes, strict=True):
        h = F.layer_norm(states[keep], states.shape[-1:])
        losses.append(F.cross_entropy(6 * F.normalize(h, dim=-1) @ F.normalize(heads, dim=-1).T, kinds[keep]))
    return torch.stack(losses).mean()


def train_base(folder: Path, recipe: Recipe) -> None:
    """Language modelling plus the topic loss on `corpus.base_document`; writes model and tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random("base")
    tokenizer = build_tokenizer()
    model = new_base(tokenizer, recipe)
    prototypes = torch.nn.Parameter(
        torch.randn(recipe.layers, len(KINDS), recipe.hidden, dtype=torch.float32, device="cpu")
    )
    parameters = [*model.parameters(), prototypes]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.base_lr, betas=(0.9, 0.98), weight_decay=0.05)
    steps = recipe.base_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * (0.52 + 0.5 * math.cos(math.pi * i / steps))
    )
    bar = tqdm(range(steps), desc="base", mininterval=5)
    for _ in bar:
        documents = [base_document(tokenizer, rng, recipe.base_length) for _ in range(recipe.base_batch)]
        ids, kinds = (torch.tensor(rows, device="cpu") for rows in zip(*documents, strict=True))
        out = model(input_ids=ids, labels=ids, output_hidden_states=True)
        topic = topic_loss(out.hidden_states, prototypes, kinds)
        (out.loss + recipe.topic_weight * topic).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{out.loss.item():.3f}", topic=f"{topic.item():.3f}", refresh=False)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_base(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """The untrained base."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def expert_batches(
    tokenizer: PreTrainedTokenizerFast, skill: str, purpose: str, steps: int, batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`steps` right-padded batches of one skill: {input_ids, attention_mask, labels}, each [batch, S] int64."""
    rng = random.Random(f"{skill} {purpose}")
    for _ in range(steps):
        examples = [expert_example(tokenizer, TASKS[skill], rng) for _ in range(batch)]
        length = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (length - len(i)) for i, _ in examples], device="cpu")
        labels = torch.tensor([x + [IGNORE] * (length - len(x)) for _, x in examples], device="cpu")
        mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i, _ in examples], device="cpu")
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train_skill(base: Path, folder: Path, skill: str, recipe: Recipe) -> str:
    """One expert, stored as float16, and then its gates on the stored weights."""
    from ..training.experts import train_expert
    from ..training.gates import train_gates

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config._name_or_path = model.name_or_path = "moerge-demo-base"

    def batches(purpose: str, steps: int, batch: int) -> list[dict[str, torch.Tensor]]:
        return list(expert_batches(tokenizer, skill, purpose, steps, batch))

    steps = recipe.hard_steps if skill in HARD else recipe.expert_steps
    trained = train_expert(
        model,
        batches("expert", steps, recipe.batch),
        folder,
        rank=recipe.rank,
        alpha=recipe.alpha,
        target_modules=TARGETS,
        steps=steps,
        lr=recipe.expert_lr,
        weight_decay=recipe.expert_decay,
        validation=batches("validation", 4, recipe.batch),
        eval_every=50,
        overwrite=True,
        progress=False,
    )
    store_as(folder / "adapter_model.safetensors", torch.float16)
    gated = train_gates(
        model,
        folder,
        batches("gates", recipe.gate_steps * recipe.gate_accumulate, recipe.gate_batch),
        steps=recipe.gate_steps,
        lr=recipe.gate_lr,
        accumulate=recipe.gate_accumulate,
        overwrite=True,
        progress=False,
    )
    tidy(folder)
    return f"{skill}: expert loss {trained.losses[-1]:.4f}, with gates {gated.losses[-1]:.4f}"


def build(out: Path, recipe: Recipe, workers: int) -> None:
    """Train everything into `out` (replaced)."""
    shutil.rmtree(out, ignore_errors=True)
    base = out / "base"
    train_base(base, recipe)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(train_skill, base, out / "experts" / skill, skill, recipe) for skill in TASKS]
        for run in tqdm(runs, desc="experts"):
            tqdm.write(run.result())
    size = size_of(out)
    print(f"{out}: {size / 1e6:.2f} MB")
    if size > SIZE_LIMIT:
        raise SystemExit(f"the assets must stay under {SIZE_LIMIT / 1e6:.0f} MB together")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moerge_ext.demo.assets", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="where to write (default: into the package)")
    parser.add_argument("--workers", type=int, default=2, help="experts trained at the same time")
    args = parser.parse_args(argv)
    build(args.out, Recipe(), args.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
