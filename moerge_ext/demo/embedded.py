"""The embedded demo: one small model, eight experts, and a router that finds the right one for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ..experts.bank import ExpertBank, load_experts
from ..routing.patch import patch
from . import heatmap
from .evaluate import accuracies, converse, tokens_per_second
from .tasks import Conversation, held_in, held_out

ASSETS = Path(__file__).parent / "assets"
SAMPLES = 25  # conversations per row
# column: method; PHATGOOSE and GLIDER compare with Arrow at the two experts per token that they use themselves
ROUTED = {
    "uniform merge": "merged",
    "Arrow k=4": "arrow",
    "Arrow k=2": "arrow_phatgoose",
    "PHATGOOSE": "phatgoose",
}
BEST = "best expert"

Suites = dict[str, list[Conversation]]
Scores = dict[str, float]


@dataclass
class Results:
    """What the demo measured: accuracies by column and row (0..1), tokens/s, and the routing of every skill."""

    held_in: dict[str, Scores] = field(default_factory=dict)  # column -> {skill: accuracy}
    held_out: dict[str, Scores] = field(default_factory=dict)  # column -> {composition: accuracy}
    best: dict[str, str] = field(default_factory=dict)  # row -> the expert behind its best score
    plain_speed: float = 0.0
    patched_speed: float = 0.0
    panels: dict[str, torch.Tensor] = field(default_factory=dict)  # skill -> [modules, experts]
    modules: list[str] = field(default_factory=list)

    def mean(self, column: str, part: str = "held_in") -> float:
        """The mean accuracy of a column over the rows of `part`."""
        scores = getattr(self, part)[column]
        return sum(scores.values()) / len(scores)


def check(samples: int) -> None:
    """Conversations are drawn anew for any number."""


def load(say: Callable[[str], None]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, ExpertBank]:
    """What ships with the package."""
    say("loading ...")
    return load_assets()


def load_assets(folder: Path = ASSETS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, ExpertBank]:
    """The demo's base model and bank of experts, in float32, and the tokenizer."""
    if not (folder / "base").is_dir():
        raise FileNotFoundError(f"no demo assets in {folder}: train them with `make demo-assets`")
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    experts = load_experts(sorted(p for p in (folder / "experts").iterdir() if p.is_dir()), dtype=torch.float32)
    model.config._name_or_path = experts.base_model  # what it was called in training, not the folder's name
    return model, tokenizer, experts


@contextmanager
def patched(model: LlamaForCausalLM, experts: ExpertBank, method: str) -> Iterator:
    """The model routed by `method` inside the block, as it was after it."""
    handle = patch(model, experts, method=method)
    try:
        yield handle
    finally:
        handle.remove()


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    experts: ExpertBank,
    samples: int,
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """Score every column on `samples` conversations per held-in skill and per held-out composition.

    The best expert of a skill is the one trained on it; of a composition, the one with the highest score.
    """
    say("measuring ...")
    inside, outside = held_in(samples), held_out(samples)
    rows: Suites = {**inside, **outside}
    scores = {"base": accuracies(model, tokenizer, rows)}
    for column, method in ROUTED.items():
        with patched(model, experts, method):
            scores[column] = accuracies(model, tokenizer, rows)
    forced: dict[str, Scores] = {}
    for name in experts.names:
        with patched(model, experts, f"expert:{name}"):
            forced[name] = accuracies(model, tokenizer, {name: inside[name], **outside})
    best = {row: max(forced, key=lambda name, row=row: forced[name][row]) for row in outside}
    results = Results(best={**{row: row for row in inside}, **best})
    scores[BEST] = {row: forced[name][row] for row, name in results.best.items()}
    results.held_in = {column: {row: s[row] for row in inside} for column, s in scores.items()}
    results.held_out = {column: {row: s[row] for row in outside} for column, s in scores.items()}
    measure_speed(model, tokenizer, experts, inside, results)
    measure_routing(model, tokenizer, experts, inside, results)
    return results


def measure_speed(model, tokenizer, experts: ExpertBank, suites: Suites, results: Results) -> None:
    """Tokens/s of one batch of all held-in prompts, without the patch and with PHATGOOSE."""
    prompts = [f"> {c.turns[0][0]}\n" for suite in suites.values() for c in suite[:16]]
    results.plain_speed = tokens_per_second(model, tokenizer, prompts)
    with patched(model, experts, "phatgoose"):
        results.patched_speed = tokens_per_second(model, tokenizer, prompts)


@torch.no_grad()
def measure_routing(model, tokenizer, experts: ExpertBank, suites: Suites, results: Results, texts: int = 8) -> None:
    """Where PHATGOOSE sends the tokens of every skill: prompts with the model's own answers, unpadded."""
    with patched(model, experts, "phatgoose") as handle:
        for skill, suite in suites.items():
            answers = converse(model, tokenizer, suite[:texts])
            with handle.record() as trace:
                for conversation, (answer,) in zip(suite[:texts], answers, strict=True):
                    text = f"<s>> {conversation.turns[0][0]}\n{answer}\n"
                    model(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))
            load = trace.load()
            results.modules = list(load)
            results.panels[skill] = heatmap.shares(load)


def table(results: Results) -> Table:
    """The one table: held-in and held-out rows apart, a column per way to use the experts."""
    columns = list(results.held_in)
    view = Table(title="Accuracy (%): answers given without being told the task", title_justify="left")
    view.add_column("", no_wrap=True)
    for column in columns:
        # what cannot be broken is not cut off where there are 80 columns
        style = "bold" if column == "PHATGOOSE" else None
        view.add_column(column, justify="right", style=style, no_wrap=" " not in column)
    for part, heading in (("held_in", "held-in skills"), ("held_out", "compositions")):
        view.add_row(f"[bold]{heading}[/bold]")
        scores = getattr(results, part)
        for row in scores[columns[0]]:
            view.add_row(f"  {row}", *(f"{100 * scores[column][row]:.0f}" for column in columns))
        means = (f"{100 * results.mean(column, part):.1f}" for column in columns)
        view.add_row("  [italic]mean[/italic]", *means, end_section=True)
    return view


def summary(results: Results) -> list[str]:
    """The findings in sentences: the share of the oracle, the lead over merging, the speed."""
    routed, merged, oracle = (results.mean(c) for c in ("PHATGOOSE", "uniform merge", BEST))
    ratio = results.patched_speed / results.plain_speed
    return [
        f"held-in: PHATGOOSE reaches {100 * routed / max(oracle, 1e-9):.1f} % of the best expert per task and is "
        f"{100 * (routed - merged):+.1f} points from the uniform merge",
        f"held-out: PHATGOOSE {100 * results.mean('PHATGOOSE', 'held_out'):.1f} %, "
        f"best single expert {100 * results.mean(BEST, 'held_out'):.1f} %",
        f"speed: {results.plain_speed:,.0f} tokens/s plain, {results.patched_speed:,.0f} patched ({ratio:.2f}x)",
    ]


def show_examples(console: Console, model, tokenizer, experts: ExpertBank) -> None:
    """A few conversations of two skills with the routed model's answers."""
    suite = held_out(3, seed=1)
    conversations = [suite["two turns"][0], suite["relay"][1], suite["one line"][2]]
    with patched(model, experts, "phatgoose"):
        given = converse(model, tokenizer, conversations)
    console.print("[bold]One model, eight experts, nobody says which:[/bold]")
    for conversation, answers in zip(conversations, given, strict=True):
        for i, ((request, right), answer) in enumerate(zip(conversation.turns, answers, strict=True)):
            console.print("  > " + request.replace("{previous}", answers[i - 1]), highlight=False, markup=False)
            mark = "" if answer == right else f"    (should be {right})"
            console.print(f"  {answer}{mark}", style="green" if answer == right else "red", highlight=False)
        console.print()


def facts(results: Results) -> dict[str, Any]:
    """The measured numbers as plain data."""
    return {
        "held_in": results.held_in,
        "held_out": results.held_out,
        "means": {part: {c: results.mean(c, part) for c in results.held_in} for part in ("held_in", "held_out")},
        "tokens_per_second": {"plain": results.plain_speed, "patched": results.patched_speed},
    }


def draw(results: Results, experts: ExpertBank, out: Path) -> list[Path]:
    """The heatmap, written into `out`."""
    title = "PHATGOOSE: where the tokens of a skill go"
    return [heatmap.draw(out / "routing.png", results.panels, results.modules, list(experts.names), title)]
