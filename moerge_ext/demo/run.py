"""What happens in a demo: questions of several kinds, one patched model that is not told which, a table, a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from rich.console import Console
from rich.table import Table

from .._version import __version__
from ..evaluation.canvas import check_matplotlib
from ..experts.bank import ExpertBank
from ..files.atomic import write_atomically

Say = Callable[[str], None]  # what is being done, while it is


class Demo(Protocol):
    """A demo is a module with these names: `embedded.py`, `real.py`."""

    SAMPLES: int  # questions of each kind, unless told otherwise

    def check(self, samples: int) -> None:
        """ValueError when there are not so many questions of a kind."""

    def load(self, say: Say) -> tuple[Any, Any, ExpertBank]:
        """(model, tokenizer, experts)"""

    def show_examples(self, console: Console, model: Any, tokenizer: Any, experts: ExpertBank) -> None:
        """Prints a few questions with the routed model's answers."""

    def measure(self, model: Any, tokenizer: Any, experts: ExpertBank, samples: int, say: Say) -> Any:
        """What it is all about, as results that the rest reads."""

    def table(self, results: Any) -> Table:
        """The one table."""

    def summary(self, results: Any) -> Sequence[str]:
        """The findings in sentences."""

    def draw(self, results: Any, experts: ExpertBank, out: Path) -> Sequence[Path]:
        """Pictures of the routing, written into `out`."""

    def facts(self, results: Any) -> dict[str, Any]:
        """The measured numbers as plain data."""


def show(demo: Demo, samples: int | None, out: Path, json_file: Path | None = None) -> None:
    """Prints examples, the table and the findings; draws the heatmap into `out`, writes the numbers to `json_file`."""
    start, cpu = time.perf_counter(), time.process_time()
    check_matplotlib()
    samples = demo.SAMPLES if samples is None else samples
    demo.check(samples)
    console = Console()
    with console.status("loading ...") as status:
        model, tokenizer, experts = demo.load(status.update)
        status.update("answering ...")
        demo.show_examples(console, model, tokenizer, experts)
        results = demo.measure(model, tokenizer, experts, samples, status.update)
    console.print(demo.table(results))
    for line in demo.summary(results):
        console.print(line, highlight=False)
    for path in demo.draw(results, experts, out):
        console.print(f"routing heatmap: {path.resolve()}", highlight=False, soft_wrap=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if json_file is not None:
        found = as_json(demo.facts(results), samples, experts) | {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
        }
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(json_file, lambda file: file.write_text(text, encoding="utf-8"))
    console.print(f"{seconds:.0f} seconds", highlight=False)


def as_json(facts: dict[str, Any], samples: int, experts: ExpertBank) -> dict[str, Any]:
    """The measured numbers with what they were measured on."""
    return {
        "samples": samples,
        "experts": list(experts.names),
        **facts,
        "versions": {"moerge_ext": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }
