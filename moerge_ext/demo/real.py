"""The demo on a model that can speak: SmolLM2-135M-Instruct, six small experts, and questions of all six mixed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.utils import logging as transformers_logging

from ..evaluation.answers import Answerer
from ..evaluation.evaluate import Settings
from ..evaluation.heatmaps import draw as draw_heatmaps
from ..evaluation.inspect import Inspection, inspect
from ..evaluation.metrics import paired_difference
from ..evaluation.report import records, terminal
from ..evaluation.runs import Run
from ..evaluation.scores import Score
from ..evaluation.tasks import Task
from ..experts.bank import ExpertBank, load_experts
from ..methods.fixed import PREFIX
from ..models import smollm2
from ..models.prompt import PromptFormat
from ..routing.patch import patch
from .questions import SKILLS, rows
from .run import Say

EXPERTS = Path(__file__).parent / "real_experts"
# The model's chat, without the system prompt that its template adds to every conversation: that says the same of all
# tasks, and would be most of what a short question's tokens are.
FORM = PromptFormat("<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n")
SAMPLES = 12
BATCH = 24
LONGEST = 36  # tokens of an answer
PICTURED = 4  # questions of a skill whose routing is drawn
BASE, ORACLE = "base", "oracle"
ROUTED = ("merged", "phatgoose")
COLUMNS = (BASE, *ROUTED, ORACLE)
SEED = 1  # of the questions that are measured; the examples are of another


@dataclass(frozen=True)
class Question:
    skill: str
    text: str
    right: str


@dataclass
class Results:
    """questions; answers {column: one per question}; found: the routing of every skill's questions."""

    questions: list[Question]
    answers: dict[str, list[str]]
    found: list[Inspection]

    def scores(self) -> list[Score]:
        """One per column and skill."""
        return scores(self.questions, self.answers)


def load(say: Say) -> tuple[nn.Module, Any, ExpertBank]:
    """SmolLM2, in its first run from its package, and the experts that ship with ours, all in float32."""
    if not EXPERTS.is_dir():
        raise FileNotFoundError(f"no experts in {EXPERTS}: train them with `make demo-real-assets`")
    transformers_logging.disable_progress_bar()
    say("loading SmolLM2-135M-Instruct (the first time its package is read, and downloaded if it is not there) ...")
    model, tokenizer = smollm2.load("float32")
    folders = sorted(folder for folder in EXPERTS.iterdir() if folder.is_dir())
    return model, tokenizer, load_experts(folders, dtype=torch.float32)


@contextmanager
def routed(model: nn.Module, experts: ExpertBank, method: str) -> Iterator[None]:
    """The model routed by `method` inside the block; "base" leaves it alone."""
    handle = None if method == BASE else patch(model, experts, method=method)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def ask(answerer: Answerer, questions: Sequence[Question]) -> list[str]:
    """An answer to each, greedily, in mixed batches of questions about as long as each other."""
    prompts = [FORM.prompt({"input": question.text}, answerer.tokenizer) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(answerer.prompt_ids(prompts[i])))
    answers = [""] * len(prompts)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        for i, answer in zip(some, answerer.generate([prompts[i] for i in some], LONGEST), strict=True):
            answers[i] = answer
    return answers


def plain(text: str) -> str:
    """An answer without what does not make it another one: case, white space, a fence of code, a last '.' or ';'."""
    text = re.sub(r"^```\w*\s*|\s*```$", "", text.strip())
    return " ".join(text.split()).strip("`").rstrip(".; ").casefold()


def check(samples: int) -> None:
    """ValueError when a skill has fewer questions."""
    for skill in SKILLS:
        rows(skill, samples, test=True, seed=SEED)


def drawn(experts: ExpertBank, samples: int, seed: int) -> list[Question]:
    """`samples` questions of every skill that has an expert."""
    return [
        Question(skill, row["input"], row["target"])
        for skill in SKILLS
        if skill in experts.names
        for row in rows(skill, samples, test=True, seed=seed)
    ]


def measure(model: nn.Module, tokenizer: Any, experts: ExpertBank, samples: int, say: Say) -> Results:
    """Every column's answers to `samples` questions of each skill, and where PHATGOOSE sends their tokens.

    The oracle is told the skill, and asks the expert that was trained on it.
    """
    questions, answerer = drawn(experts, samples, SEED), Answerer(model, tokenizer)
    answers = {}
    for column in (BASE, *ROUTED):
        say(f"{len(questions)} questions to {column} ...")
        with routed(model, experts, column):
            answers[column] = ask(answerer, questions)
    answers[ORACLE] = []
    for skill in dict.fromkeys(question.skill for question in questions):
        say(f"{samples} questions to the expert for {skill} ...")
        with routed(model, experts, PREFIX + skill):
            answers[ORACLE] += ask(answerer, [question for question in questions if question.skill == skill])
    say("where the tokens go ...")
    tasks = [_task(skill, questions) for skill in dict.fromkeys(question.skill for question in questions)]
    run, settings = Run("phatgoose", "phatgoose"), Settings(template=FORM.template)
    found = inspect(model, tokenizer, experts, [run], tasks, settings, progress=False)
    return Results(questions, answers, found)


def _task(skill: str, questions: Sequence[Question]) -> Task:
    mine = [{"input": q.text, "target": q.right} for q in questions if q.skill == skill][:PICTURED]
    return Task(skill, tuple(mine), "exact_match", None, "", EXPERTS / skill, "")


def scores(questions: Sequence[Question], answers: dict[str, Sequence[str]]) -> list[Score]:
    """One per column and skill: `plain` answers that are the right one."""
    made = []
    for column, given in answers.items():
        for skill in dict.fromkeys(question.skill for question in questions):
            items = tuple(
                float(plain(answer) == plain(question.right))
                for question, answer in zip(questions, given, strict=True)
                if question.skill == skill
            )
            made.append(Score(column, skill, "", "exact_match", len(items), sum(items), None, items))
    return made


def table(results: Results) -> Table:
    """Skills by columns, with 95 % intervals."""
    return terminal(results.scores())


def summary(results: Results) -> list[str]:
    """What was found, what of it is only the form of an answer, and what the router did."""
    held = [plain(q.right) in plain(a) for q, a in zip(results.questions, results.answers[BASE], strict=True)]
    weight = sum(inspection.to_oracle for inspection in results.found) / len(results.found)
    return [
        *compared(results),
        f"{sum(held)} of the base's {len(held)} answers hold the right one, as they are or among other words",
        f"{weight:.0%} of phatgoose's routing weight goes to the expert trained on the question's kind",
    ]


def compared(results: Results) -> list[str]:
    """Paired differences over all questions, with their 95 % intervals."""
    made = results.scores()
    items = {column: [item for score in made if score.method == column for item in score.items] for column in COLUMNS}
    lines = []
    for other in (BASE, "merged", ORACLE):
        mean, low, high = paired_difference(items["phatgoose"], items[other])
        lines.append(f"phatgoose minus {other}: {100 * mean:+.1f} points ({100 * low:+.0f} to {100 * high:+.0f})")
    return lines


def draw(results: Results, experts: ExpertBank, out: Path) -> list[Path]:
    """The routing of every skill, written into `out`."""
    return draw_heatmaps(results.found, out)[0]


def show_examples(console: Console, model: nn.Module, tokenizer: Any, experts: ExpertBank) -> None:
    """One question of every skill with the routed model's answer and the base's."""
    questions, answerer, given = drawn(experts, 1, SEED + 1), Answerer(model, tokenizer), {}
    for method in ("phatgoose", BASE):
        with routed(model, experts, method):
            given[method] = ask(answerer, questions)
    console.print(f"[bold]One model, {len(experts)} experts, nobody says which:[/bold]")
    for question, answer, before in zip(questions, *given.values(), strict=True):
        same = plain(answer) == plain(question.right)
        should = "" if same else f"    (should be {question.right})"
        console.print(Text(f"  {question.text}"), soft_wrap=True)
        console.print(Text(f"  {_line(answer)}{should}", "green" if same else "red"), soft_wrap=True)
        console.print(Text(f"  without experts: {_line(before)}\n", "dim"), soft_wrap=True)


def _line(answer: str) -> str:
    """An answer on one line of the terminal."""
    text = " ".join(answer.split())
    return text if len(text) <= 90 else text[:87] + "..."


def facts(results: Results) -> dict[str, Any]:
    """The table's rows, every answer they are made of, and the routing of every skill."""
    made = results.scores()
    return {
        "scores": [{name: value for name, value in row.items() if value is not None} for row in records(made)],
        "routing": {i.task: {"to_oracle": i.to_oracle, "kl_oracle_routing": i.divergence} for i in results.found},
        "items": [
            {"skill": q.skill, "question": q.text, "right": q.right, **{c: a[i] for c, a in results.answers.items()}}
            for i, q in enumerate(results.questions)
        ],
    }
