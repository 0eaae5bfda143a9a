"""How a prompt expert writes: the words of its prompts, and a prompt as the turns that it is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FIELD = re.compile(r"\{(\w+)\}")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Turns:
    """A prompt before it is put to a model: solved questions, (question, answer) each, and the one to be answered.

    As one text they follow each other; a chat model gets them as a conversation (`PromptFormat.turns`).
    """

    shots: tuple[tuple[str, str], ...]
    question: str

    @property
    def text(self) -> str:
        return "".join(part for shot in self.shots for part in shot) + self.question


@dataclass(frozen=True)
class Template:
    """The words of a prompt.

    question holds {input}, and may hold {knowledge}, the place of passages or sampled answers, which else stand before
    it; answer holds {target}; thought {rationale} and {target}; passage {passage}; samples {answers}.
    """

    question: str = "Question: {input}\nAnswer:"
    answer: str = " {target}\n\n"
    thought: str = " {rationale} The answer is {target}.\n\n"
    passage: str = "Passage: {passage}\n"
    samples: str = "Some answers, not all of them right: {answers}\n"

    def ask(self, question: str, knowledge: str = "") -> str:
        """The question, with what is known about it."""
        if "{knowledge}" in self.question:
            return fill(self.question, input=question, knowledge=knowledge)
        return knowledge + fill(self.question, input=question)

    def solved(self, row: Row, form: str, knowledge: str = "") -> tuple[str, str]:
        """A row as a solved question; form: `answer` or `thought`."""
        said = {key: row[key] for key in ("rationale", "target") if key in row}
        return self.ask(row["input"], knowledge), fill(form, **said)


def fill(form: str, **values: str) -> str:
    """The form with its {fields}; in one pass, as what looks like a field in a value is none."""
    return _FIELD.sub(lambda found: values.get(found[1], found[0]), form)
