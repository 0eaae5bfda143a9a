"""PromptExpert: a named way to put a question to the model (PELMo, ICIC 2024), and the strategies of the paper."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from .template import Row, Template, Turns

DEMONSTRATIONS = 16  # of the paper, for every strategy
PASSAGES = 10  # retrieval-augmented: what Contriever returned in the paper
SAMPLES = 10  # answer prompting: the model's own answers

Ask = Callable[..., Sequence[str]]  # (prompt, n[, most tokens of one]) -> n sampled answers of the model
Retriever = Callable[[str], Sequence[str]]  # question -> passages, best first


@dataclass(frozen=True)
class PromptExpert:
    """One expert: `build(question, ask)` is its prompt.

    lora names the LoRA expert that answers, None the base. facts: what its prompts are made of, as JSON can hold it;
    answers and routers are kept with it, so that an expert of the same name that asks otherwise is noticed.
    """

    name: str
    build: Callable[[str, Ask | None], Turns | str]
    lora: str | None = None
    needs_samples: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def turns(self, question: str, ask: Ask | None = None) -> Turns:
        """The prompt for one question. ValueError for an empty question, and for a strategy that lacks `ask`."""
        if not question.strip():
            raise ValueError("an empty question cannot be answered: expected some text")
        if self.needs_samples and ask is None:
            raise ValueError(f"expert '{self.name}' needs the model's own answers: use it through a PromptEnsemble")
        made = self.build(question, ask)
        return Turns((), made) if isinstance(made, str) else made

    def prompt(self, question: str, ask: Ask | None = None) -> str:
        """The same as one text, as a model without a chat template is given it."""
        return self.turns(question, ask).text


def few_shot(
    name: str,
    rows: Sequence[Row] = (),
    *,
    count: int = DEMONSTRATIONS,
    seed: int = 0,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """`count` random rows {"input", "target"}, then the question: the paper's baseline. count=0 asks at once."""
    template = template or Template()
    chosen = _drawn(name, rows, count, seed, ("input", "target"))
    shots = tuple(template.solved(row, template.answer) for row in chosen)
    facts = _facts("few-shot", chosen, template)
    return PromptExpert(name, lambda question, ask: Turns(shots, template.ask(question)), lora, facts=facts)


def chain_of_thought(
    name: str,
    rows: Sequence[Row],
    *,
    count: int = DEMONSTRATIONS,
    seed: int = 0,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """Random rows {"input", "rationale", "target"} that show the reasoning before the answer."""
    template = template or Template()
    chosen = _drawn(name, rows, count, seed, ("input", "rationale", "target"))
    shots = tuple(template.solved(row, template.thought) for row in chosen)
    facts = _facts("chain-of-thought", chosen, template)
    return PromptExpert(name, lambda question, ask: Turns(shots, template.ask(question)), lora, facts=facts)


def retrieval_augmented(
    name: str,
    retriever: Retriever,
    rows: Sequence[Row] = (),
    *,
    passages: int = PASSAGES,
    demonstration_passages: int | None = None,
    count: int = DEMONSTRATIONS,
    seed: int = 0,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """Random rows with the passages that `retriever` finds for each, then the question with its own.

    passages: how many, the first ones. demonstration_passages: with every row, default as many as with the question, as
    in the paper; fewer, or 0, where the model's context is short. An attribute `identity` of the retriever is noted in
    the expert's facts.
    """
    template = template or Template()
    chosen = _drawn(name, rows, count, seed, ("input", "target"))
    shown = _number(name, "demonstration_passages", demonstration_passages, passages)

    def found(question: str, most: int) -> str:
        texts = list(retriever(question))[:most] if most else []
        if most and not texts:
            raise ValueError(f"expert '{name}': the retriever returned no passage for {question[:80]!r}")
        return "".join(template.passage.replace("{passage}", text) for text in texts)

    @cache
    def shots() -> tuple[tuple[str, str], ...]:
        return tuple(template.solved(row, template.answer, found(row["input"], shown)) for row in chosen)

    def build(question: str, ask: Ask | None) -> Turns:
        return Turns(shots(), template.ask(question, found(question, passages)))

    facts = _facts("retrieval", chosen, template) | {"passages": [passages, shown]}
    return PromptExpert(name, build, lora, facts=facts | {"retriever": getattr(retriever, "identity", None)})


def answer_prompting(
    name: str,
    rows: Sequence[Row] = (),
    *,
    samples: int = SAMPLES,
    demonstration_samples: int | None = None,
    sample_tokens: int | None = None,
    count: int = DEMONSTRATIONS,
    seed: int = 0,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """As few-shot, with the model's own `samples` answers to that prompt put before the question and every row.

    demonstration_samples: with every row, default as many as with the question, as in the paper. For those the model
    sees the other rows, never the row's own answer. sample_tokens: at most so many in each, where answers are short but
    a model may not find their end; None takes as many as in the final answer.
    """
    template = template or Template()
    chosen = _drawn(name, rows, count, seed, ("input", "target"))
    plain = tuple(template.solved(row, template.answer) for row in chosen)
    shown = _number(name, "demonstration_samples", demonstration_samples, samples)
    limit = [] if sample_tokens is None else [_number(name, "sample_tokens", sample_tokens, samples, least=1)]

    def sampled(ask: Ask, shots: tuple[tuple[str, str], ...], question: str, most: int) -> str:
        if not most:
            return ""
        answers = [answer.strip() for answer in ask(Turns(shots, template.ask(question)), most, *limit)]
        return template.samples.replace("{answers}", "; ".join(answer for answer in answers if answer))

    def build(question: str, ask: Ask | None) -> Turns:
        shots = tuple(
            template.solved(row, template.answer, sampled(ask, plain[:i] + plain[i + 1 :], row["input"], shown))
            for i, row in enumerate(chosen)
        )
        return Turns(shots, template.ask(question, sampled(ask, plain, question, samples)))

    facts = _facts("answer-prompting", chosen, template) | {"samples": [samples, shown, *limit]}
    return PromptExpert(name, build, lora, needs_samples=True, facts=facts)


def check_experts(experts: Sequence[PromptExpert]) -> tuple[str, ...]:
    """The experts' names; ValueError when there is none or two share a name."""
    names = tuple(expert.name for expert in experts)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompt experts need distinct names, at least one; got {list(names)}")
    return names


def _drawn(name: str, rows: Sequence[Row], count: int, seed: int, keys: tuple[str, ...]) -> list[Row]:
    """`count` random rows, in the order in which they were drawn, each with all keys."""
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"expert '{name}': count must be a whole number, not negative, got {count!r}")
    if len(rows) < count:
        raise ValueError(
            f"expert '{name}': expected {count} demonstrations, got {len(rows)}: a count of {len(rows)} uses those"
        )
    for i, row in enumerate(rows if count else ()):
        missing = [key for key in keys if not isinstance(row.get(key), str)]
        if missing:
            raise ValueError(f"expert '{name}': demonstration {i} (from 0) has no {', '.join(missing)}")
    return random.Random(seed).sample(list(rows), count)


def _number(name: str, what: str, value: int | None, default: int, least: int = 0) -> int:
    value = default if value is None else value
    if not isinstance(value, int) or value < least or not isinstance(default, int) or default < 1:
        wanted = "at least 1" if least else "not negative"
        raise ValueError(
            f"expert '{name}': expected at least 1 with the question and {what} {wanted}, got {default!r} and {value!r}"
        )
    return value


def _facts(kind: str, rows: Sequence[Row], template: Template) -> dict[str, Any]:
    shown = [{key: row[key] for key in ("input", "rationale", "target") if key in row} for row in rows]
    return {"kind": kind, "demonstrations": shown, "template": asdict(template)}
