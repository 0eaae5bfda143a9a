"""What can be refused of tasks before the first answer: prompts that cannot be made, or do not fit the context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..files.listing import at_rows
from ..models.pretrained import context_of
from ..models.prompt import PromptFormat
from .answers import Answerer
from .tasks import Task


def check_fields(tasks: Iterable[Task], form: PromptFormat) -> None:
    """One ValueError for every task whose rows lack what the template asks for; needs no model."""
    _refuse([f"task {task.name}: {line}" for task in tasks for line in form.problems(task.rows)])


def check_prompts(
    answerer: Answerer, tasks: Sequence[Task], form: PromptFormat, max_new_tokens: int | None, *, given: bool = False
) -> None:
    """One ValueError for all tasks with prompts that cannot be made, have no token, or do not fit with their answer.

    given: the answer is the row's target, in place of generated tokens or choices.
    """
    problems = []
    for task in tasks:
        wrong = form.problems(task.rows, answerer.tokenizer) or _too_long(answerer, task, form, max_new_tokens, given)
        problems += [f"task {task.name}: {line}" for line in wrong]
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("the tasks cannot be asked:\n- " + "\n- ".join(problems))


def token_limit(answerer: Answerer, task: Task, max_new_tokens: int | None) -> int | None:
    """Tokens that an answer may have: as given, else those of the longest target; None for choices, which have ends."""
    if max_new_tokens is None and task.metric != "rank":
        return max(len(answerer.target_ids(row["target"])) for row in task.rows)
    return max_new_tokens


def _too_long(answerer: Answerer, task: Task, form: PromptFormat, max_new_tokens: int | None, given: bool) -> list[str]:
    context = context_of(answerer.model.config)
    longest, which, empty = 0, 0, []
    limit = 0 if given or task.metric == "rank" else token_limit(answerer, task, max_new_tokens)
    for number, row in enumerate(task.rows):
        try:
            length = len(answerer.prompt_ids(form.prompt(row, answerer.tokenizer)))
        except ValueError as error:
            empty.append(f"{at_rows([number])}: {error}")
            continue
        if not answerer.seq2seq:
            choices = [row["target"]] if given else task.choices_of(row) if task.metric == "rank" else []
            ends = [len(answerer.target_ids(choice)) + answerer.room for choice in choices]
            length += max(ends, default=limit)
        if length > longest:
            longest, which = length, number
    if context is not None and longest > context:
        parts = "a prompt" if answerer.seq2seq else "a prompt with its answer"
        empty.append(
            f"{at_rows([which])}: {parts} has {longest} tokens, more than the context of {context}: shorten the inputs "
            "or the template, lower --max-new-tokens, or leave the task out"
        )
    return empty
