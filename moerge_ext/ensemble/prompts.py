"""PromptExpert: a named way to put a question to the model (PELMo, ICIC 2024), and the strategies of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

DEMONSTRATIONS = 16  # of the paper, for every strategy
PASSAGES = 10  # retrieval-augmented: what Contriever returned in the paper
SAMPLES = 10  # answer prompting: the model's own answers

Row = Mapping[str, str]
Ask = Callable[[str, int], Sequence[str]]  # (prompt, n) -> n sampled answers of the model
Retriever = Callable[[str], Sequence[str]]  # question -> passages, best first


@dataclass(frozen=True)
class PromptExpert:
    """One expert: `build(question, ask)` is its prompt; `lora` names the LoRA expert that answers, None the base."""

    name: str
    build: Callable[[str, Ask | None], str]
    lora: str | None = None
    needs_samples: bool = False

    def prompt(self, question: str, ask: Ask | None = None) -> str:
        """The prompt for one question. ValueError for an empty question, and for a strategy that lacks `ask`."""
        if not question.strip():
            raise ValueError("an empty question cannot be answered: expected some text")
        if self.needs_samples and ask is None:
            raise ValueError(f"expert '{self.name}' needs the model's own answers: use it through a PromptEnsemble")
        return self.build(question, ask)


@dataclass(frozen=True)
class Template:
    """How a prompt is written. `question` holds {input}; `answer` {target}; `thought` {rationale} and {target}."""

    question: str = "Question: {input}\nAnswer:"
    answer: str = " {target}\n\n"
    thought: str = " {rationale} The answer is {target}.\n\n"
    passage: str = "Passage: {passage}\n"
    samples: str = "Some answers, not all of them right: {answers}\n"

    def ask(self, question: str) -> str:
        return self.question.replace("{input}", question)

    def solved(self, row: Row, form: str) -> str:
        for key in ("rationale", "target"):
            if "{" + key + "}" in form:
                form = form.replace("{" + key + "}", row[key])
        return self.ask(row["input"]) + form


def _demonstrations(name: str, rows: Sequence[Row], count: int, keys: tuple[str, ...]) -> list[Row]:
    if count < 0:
        raise ValueError(f"expert '{name}': count must not be negative, got {count}")
    chosen = list(rows[:count])
    if len(chosen) < count:
        raise ValueError(
            f"expert '{name}': expected {count} demonstrations, got {len(chosen)}; "
            f"pass count={len(chosen)} to use those"
        )
    for i, row in enumerate(chosen):
        missing = [key for key in keys if not isinstance(row.get(key), str)]
        if missing:
            raise ValueError(f"expert '{name}': demonstration {i} (from 0) has no {', '.join(missing)}")
    return chosen


def few_shot(
    name: str,
    rows: Sequence[Row] = (),
    *,
    count: int = DEMONSTRATIONS,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """`count` solved rows {"input", "target"}, then the question: the paper's baseline. count=0 asks at once."""
    template = template or Template()
    chosen = _demonstrations(name, rows, count, ("input", "target"))
    head = "".join(template.solved(row, template.answer) for row in chosen)
    return PromptExpert(name, lambda question, ask: head + template.ask(question), lora)


def chain_of_thought(
    name: str,
    rows: Sequence[Row],
    *,
    count: int = DEMONSTRATIONS,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """Solved rows {"input", "rationale", "target"} that show the reasoning before the answer."""
    template = template or Template()
    chosen = _demonstrations(name, rows, count, ("input", "rationale", "target"))
    head = "".join(template.solved(row, template.thought) for row in chosen)
    return PromptExpert(name, lambda question, ask: head + template.ask(question), lora)


def retrieval_augmented(
    name: str,
    retriever: Retriever,
    rows: Sequence[Row] = (),
    *,
    passages: int = PASSAGES,
    count: int = DEMONSTRATIONS,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """Solved rows, then the first `passages` that `retriever` finds for the question, then the question."""
    template = template or Template()
    head = "".join(
        template.solved(row, template.answer) for row in _demonstrations(name, rows, count, ("input", "target"))
    )

    def build(question: str, ask: Ask | None) -> str:
        found = list(retriever(question))[:passages]
        if not found:
            raise ValueError(f"expert '{name}': the retriever returned no passage for {question[:80]!r}")
        shown = "".join(template.passage.replace("{passage}", passage) for passage in found)
        return head + shown + template.ask(question)

    return PromptExpert(name, build, lora)


def answer_prompting(
    name: str,
    rows: Sequence[Row] = (),
    *,
    samples: int = SAMPLES,
    count: int = DEMONSTRATIONS,
    template: Template | None = None,
    lora: str | None = None,
) -> PromptExpert:
    """As few-shot, with the model's own `samples` answers to that prompt put before the question."""
    template = template or Template()
    plain = few_shot(name, rows, count=count, template=template)
    head = plain.build("", None)[: -len(template.ask(""))]

    def build(question: str, ask: Ask | None) -> str:
        answers = ask(plain.build(question, None), samples)
        shown = template.samples.replace("{answers}", "; ".join(answer.strip() for answer in answers))
        return head + shown + template.ask(question)

    return PromptExpert(name, build, lora, needs_samples=True)


def check_experts(experts: Sequence[PromptExpert]) -> tuple[str, ...]:
    """The experts' names; ValueError when there is none or two share a name."""
    names = tuple(expert.name for expert in experts)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompt experts need distinct names, at least one; got {list(names)}")
    return names
