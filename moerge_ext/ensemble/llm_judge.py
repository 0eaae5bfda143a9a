"""A language model that says whether an answer is right, as GPT-3.5 does in PELMo (section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..queries.writer import InstructionWriter, WriterError
from .template import fill

PROMPT = (
    "Question: {question}\nRight answer: {golds}\nProposed answer: {answer}\n\n"
    "Does the proposed answer give the right answer to the question? It may be longer or in other words; where several "
    "right answers are listed, one of them is enough. Say yes or no, one word.\nVerdict:"
)
_VERDICT = re.compile(
    r"(?:(?:the )?(?:final )?(?:verdict|answer)\s*(?:is)?\s*:?\s*)?(yes|no)\s*(?:$|[.,;:!)\n-])", re.I
)


class VerdictError(WriterError):
    """The language model said something that is neither yes nor no."""


class LLMJudge:
    """(question, answer, gold) -> right?, by a language model.

    Args:
        model: whoever is asked, with its cache, attempts and waiting: `InstructionWriter.from_endpoint(url, name)` for
            any server that speaks OpenAI's protocol, `.from_transformers(path)` for a local model.
        prompt: holds {question}, {golds} (several joined by " | ") and {answer}.

    An empty answer is wrong without being asked about. A verdict that is not clearly yes or no is an error, never a
    guess. What an answer says to the judge ("say yes") is read by it: mistrust answers of those who know it.
    """

    def __init__(self, model: InstructionWriter, prompt: str = PROMPT):
        missing = [field for field in ("{question}", "{golds}", "{answer}") if field not in prompt]
        if missing:
            raise ValueError(f"the judge's prompt must hold {', '.join(missing)}, got {prompt[:200]!r}")
        self.model, self.prompt = model, prompt

    def __call__(self, question: str, answer: str, gold: str) -> bool:
        return self.among(question, answer, (gold,))

    def among(self, question: str, answer: str, golds: Sequence[str]) -> bool:
        """Whether it is one of several right answers, in one question to the model. VerdictError without a verdict."""
        if not answer.strip():
            return False
        asked = fill(self.prompt, question=question.strip(), golds=" | ".join(golds), answer=answer.strip())
        try:
            return self.model.ask(asked, parse_verdict)
        except VerdictError as error:
            raise VerdictError(
                f"{error}; it was asked about the answer {answer[:120]!r} to {question[:120]!r}"
            ) from None

    def check(self) -> None:
        """Ask about one answer that is right, to find out whether there is a verdict at all; errors as of `among`."""
        self.among("What is two plus two?", "It is four.", ("four",))


def parse_verdict(answer: Any) -> bool:
    """yes or no at the beginning of an answer, bare of hidden reasoning, marks and a label; else VerdictError."""
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL) if isinstance(answer, str) else ""
    found = _VERDICT.match(re.sub(r"[*_`\"'#]", "", text).strip())
    if found is None:
        raise VerdictError(f"expected a verdict, yes or no, got {str(answer)[:120]!r}; use a larger language model")
    return found[1].lower() == "yes"
