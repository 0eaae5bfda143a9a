"""`moerge train-gates`: gates for one expert from a file of examples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Batch, Collate

IGNORED = -100  # the label that no loss counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("model", help="folder (or hub id) of the base model, with its tokenizer")
    add("adapter", type=Path, help="the expert's PEFT LoRA folder")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines: {"input": ..., "target": ...} (the loss is on the target) or {"text": ...}',
    )
    add("--validation", type=Path, metavar="FILE", help="the same; the gates with the lowest loss are kept")
    add(
        "--kind",
        choices=("sigmoid-gate", "average-activation"),
        default="sigmoid-gate",
        help="train gates, or take every module's mean input (default: %(default)s)",
    )
    add("--output", type=Path, metavar="DIR", help="where to write (default: the adapter's folder)")
    add("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    add("--lr", type=float, default=5e-3, help="AdamW's rate (default: %(default)s)")
    add("--warmup-ratio", type=float, default=0.06, help="share of the steps (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences per forward (default: %(default)s)")
    add(
        "--accumulate",
        type=int,
        default=128,
        help="forwards per step (default: %(default)s; 8 x 128 sequences are the paper's batch)",
    )
    add("--max-length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    add("--eval-every", type=int, default=100, help="steps between validations (default: %(default)s)")
    add("--joint", action="store_true", help="train the LoRA as well; needs --output")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the base model",
    )
    add("--device", help="such as cuda:0 or cpu (default: cuda when there is one)")
    add("--seed", type=int, default=0, help="of the shuffle and of dropout (default: %(default)s)")
    add("--resume", action="store_true", help="go on where a killed run stopped")
    add("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    if args.max_length < 2:
        raise ValueError(f"--max-length must be at least 2, got {args.max_length}")
    if args.joint and args.output is None:
        raise ValueError("--joint changes the adapter's weights: pass --output DIR")
    rows = read_rows(args.data)
    validation = read_rows(args.validation) if args.validation is not None else None
    model, tokenizer = _load(args)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    collate = collator(tokenizer)
    features = [encode(row, tokenizer, args.max_length, seq2seq=seq2seq) for row in rows]
    common = {"collate_fn": collate, "batch_size": args.batch_size, "output_dir": args.output}
    common["progress"] = not args.no_progress

    if args.kind == "average-activation":
        from .activation import average_activation

        print(f"wrote {average_activation(model, args.adapter, features, **common)}")
        return 0

    from .gates import train_gates

    held_out = None
    if validation is not None:
        held_out = [encode(row, tokenizer, args.max_length, seq2seq=seq2seq) for row in validation]
    result = train_gates(
        model,
        args.adapter,
        features,
        steps=args.steps,
        lr=args.lr,
        warmup_ratio=args.warmup_ratio,
        accumulate=args.accumulate,
        validation=held_out,
        eval_every=args.eval_every,
        joint=args.joint,
        resume=args.resume,
        seed=args.seed,
        **common,
    )
    print(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} in {result.steps} steps")
    if result.validation:
        print(f"validation loss {result.validation[result.best_step]:.4f} at step {result.best_step}, kept")
    print(f"wrote {result.path}")
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    # these take seconds to import, and `moerge --help` needs neither
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    config = AutoConfig.from_pretrained(args.model)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(args.model, dtype=args.dtype)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), AutoTokenizer.from_pretrained(args.model)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The examples of a JSON lines file; one ValueError with every line that is none."""
    rows, problems = [], []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"line {number}: not JSON ({error.msg})")
                continue
            if isinstance(row, dict) and any(
                all(isinstance(row.get(key), str) for key in keys) for keys in (("input", "target"), ("text",))
            ):
                rows.append(row)
            else:
                problems.append(f'line {number}: expected {{"input": str, "target": str}} or {{"text": str}}')
    if not rows and not problems:
        problems.append("the file has no examples")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems[:20] + more))
    return rows


def encode(row: dict[str, str], tokenizer: Any, max_length: int, *, seq2seq: bool) -> dict[str, list[int]]:
    """One example as token ids: "input_ids" and "labels".

    Decoder-only: input and target in one sequence, as they are, with an end-of-sequence token; labels on
    the target (on everything for a "text" row). Over `max_length` tokens the beginning of the input goes
    first, then the end of the target. Encoder-decoder: the input to the encoder, the target as labels, each
    cut at `max_length`.
    """
    if seq2seq:
        if "input" not in row:
            raise ValueError('an encoder-decoder model needs rows with "input" and "target", not "text"')
        return {
            "input_ids": tokenizer(row["input"]).input_ids[:max_length],
            "labels": tokenizer(text_target=row["target"]).input_ids[:max_length],
        }
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "input" not in row:
        ids = (_without_end(tokenizer(row["text"]).input_ids, end) + end)[:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    given = _without_end(tokenizer(row["input"]).input_ids, end)
    target = (tokenizer(row["target"], add_special_tokens=False).input_ids + end)[: max_length - 1]
    given = given[max(0, len(given) + len(target) - max_length) :]
    return {"input_ids": given + target, "labels": [IGNORED] * len(given) + target}


def _without_end(ids: list[int], end: list[int]) -> list[int]:
    """Some tokenizers end every text by themselves."""
    return ids[:-1] if end and ids[-1:] == end else ids


def collator(tokenizer: Any) -> Collate:
    """A function that pads encoded examples on the right into a batch of tensors."""
    import torch

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        longest = max(len(ids) for ids in lists)
        return torch.tensor([ids + [value] * (longest - len(ids)) for ids in lists])

    def collate(features: list[dict[str, list[int]]]) -> Batch:
        inputs = [feature["input_ids"] for feature in features]
        return {
            "input_ids": padded(inputs, pad),
            "attention_mask": padded([[1] * len(ids) for ids in inputs], 0),
            "labels": padded([feature["labels"] for feature in features], IGNORED),
        }

    return collate
