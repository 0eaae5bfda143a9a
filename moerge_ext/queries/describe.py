"""The contributor's side of GLIDER: an expert's task in one sentence, embedded, stored beside the adapter."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..experts.fingerprint import note_of_file
from ..experts.formats import inspect_adapter
from ..experts.formats.peft import write_gates
from ..experts.hub import find_adapter, output_folder
from ..experts.kinds import INSTRUCTION
from ..files.counting import counted
from .embedder import Embedder
from .writer import TEMPLATE, Example, InstructionWriter

EXAMPLES = 3  # of the paper
BY_HAND = "by hand"  # the writer of an instruction that the contributor gave


@dataclass(frozen=True)
class Description:
    """What `describe` wrote: the file, the instruction, and its embedding [G]."""

    path: Path
    instruction: str
    vector: Tensor


def describe(
    adapter: str | os.PathLike,
    examples: Sequence[Example],
    embedder: Embedder,
    writer: InstructionWriter | None = None,
    *,
    instruction: str | None = None,
    count: int = EXAMPLES,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
) -> Description:
    """Give an expert its global vector: embed(instruction), the instruction written from a few of its examples.

    GLIDER, arXiv 2410.07172, section 4.1: three random examples -> a language model writes the task's instruction ->
    an embedding model -> the vector. It becomes `__global__` [G] of a sidecar of kind "instruction-embedding" in
    the adapter's folder (or `output_dir`), with the instruction, the writer and the embedder in the metadata.

    Args:
        adapter: the expert's folder, which stays untouched, or with `output_dir` its hub id.
        examples: {"input", "target"} rows of its training data, `count` of which are drawn with `seed`.
        instruction: the sentence itself, instead of `examples` and `writer`.

    Raises ValueError for a folder that is no adapter, too few examples, and whatever writer and embedder refuse
    (EndpointError for an endpoint that fails); nothing is written then.
    """
    header, target = inspect_adapter(*find_adapter(adapter)), output_folder(adapter, output_dir)
    facts = {"embedder": embedder.name}
    if instruction is not None:
        if writer is not None:
            raise ValueError("give either an instruction or a writer, not both")
        if not instruction.strip():
            raise ValueError("the instruction is empty: say in one sentence what the expert's task asks for")
        instruction, facts["writer"] = instruction.strip(), BY_HAND
    else:
        if writer is None:
            raise ValueError("expected a writer (a language model that writes the instruction) or instruction=...")
        chosen = draw(examples, count, seed)
        instruction = writer.task(chosen)
        template = writer.templates[0]
        asked = "GLIDER, appendix A.1" if template == TEMPLATE else template
        facts |= {"writer": writer.name, "examples": str(count), "seed": str(seed), "template": asked}
    vector = embedder([instruction])[0]
    target.mkdir(parents=True, exist_ok=True)
    path = write_gates(
        target,
        {},
        kind=INSTRUCTION,
        base_model=header.base_model,
        global_vector=vector,
        metadata={"instruction": instruction, **facts, **note_of_file(header)},
    )
    return Description(path, instruction, vector)


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` different rows of `examples`, by `seed`; ValueError when there are fewer, or one has no "input"."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if len(examples) < count:
        raise ValueError(f"expected at least {counted(count, 'example')}, got {len(examples)}")
    chosen = random.Random(seed).sample(list(examples), count)
    if any("input" not in row or "target" not in row for row in chosen):
        raise ValueError('an instruction is written from rows with "input" and "target", not "text"')
    return chosen
