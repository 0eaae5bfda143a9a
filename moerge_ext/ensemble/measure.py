"""What the paper's tables hold: every expert, the ensembles of k, the single-label router, the oracle per question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation import identity
from ..evaluation.evaluate import Score
from ..evaluation.store import Answers
from .judge import Judge
from .mixture import PromptEnsemble
from .router import PromptRouter, select

ORACLE = "oracle_question"


def answers_of(
    ensemble: PromptEnsemble,
    label: str,
    questions: Sequence[str],
    choice: tuple[Tensor, Tensor],
    *,
    output: Path | None = None,
    facts: dict[str, Any] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> list[str]:
    """Answers [M] with the experts of `choice` (ids [M,k], weights [M,k]); resumable when `output` is given.

    They lie in `<output>/answers/<label>.<digest>.jsonl`; what is there of the same model, by content, and the same
    `facts` and choice is not asked again.
    """
    ids, weights = choice
    settings = {"label": label, "questions": list(questions), **(facts or {}), **options}
    settings["choice"] = [ids.tolist(), [[round(w, 6) for w in row] for row in weights.tolist()]]
    if output is not None:
        # once for an ensemble, whose model does not change between its answers
        if "model" not in (known := vars(ensemble).setdefault("_identity", {})):
            known["model"] = identity.of_model(ensemble.asked.model, ensemble.asked.tokenizer)
        settings |= known
    stored = Answers(output / "answers" if output is not None else None, label, settings)
    with tqdm(total=len(questions), initial=len(stored.items), desc=label, unit="q", disable=not progress) as bar:
        for part in _parts(len(stored.items), len(questions), batch_size):
            given = ensemble.answer(questions[part], select=(ids[part], weights[part]), **options)
            stored.add([{"answer": answer} for answer in given])
            bar.update(len(given))
    return [item["answer"] for item in stored.items]


def _parts(start: int, end: int, size: int) -> Iterator[slice]:
    while start < end:
        yield slice(start, min(end, start + size))
        start += size


def answers_by_experts(ensemble: PromptEnsemble, questions: Sequence[str], **options: Any) -> list[list[str]]:
    """[M][N]: every expert's answer to every question; options as in `answers_of`."""
    ones = torch.ones(len(questions), 1)
    columns = [
        answers_of(ensemble, name, questions, (torch.full((len(questions), 1), e), ones), **options)
        for e, name in enumerate(ensemble.names)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def measure(
    ensemble: PromptEnsemble,
    questions: Sequence[str],
    golds: Sequence[str],
    judge: Judge,
    *,
    router: PromptRouter,
    single_label: PromptRouter | None = None,
    top_ks: Sequence[int] = (1, 2, 3, 4),
    task: str = "questions",
    **options: Any,
) -> list[Score]:
    """The rows of PELMo's Tables 1 and 2 and the points of its Figure 5, as scores over the same questions.

    Each expert alone; `top-<k>` of the multi-label router; `single-label`, the first expert of the other router;
    `oracle_question`: right when any expert is (an upper bound for choosing one). options as in `answers_of`.
    """
    for other in (router, single_label):
        if other is not None and other.names != ensemble.names:
            raise ValueError(f"a router for {', '.join(other.names)} cannot serve {', '.join(ensemble.names)}")
    if len(questions) != len(golds) or not questions:
        raise ValueError(f"expected as many golds as questions, at least one; got {len(golds)} and {len(questions)}")
    wrong = [k for k in top_ks if not 1 <= k <= len(ensemble.names)]
    if wrong:
        raise ValueError(f"top_k must be between 1 and the number of experts, {len(ensemble.names)}; got {wrong[0]}")
    answered = {}
    by_expert = answers_by_experts(ensemble, questions, **options)
    for e, name in enumerate(ensemble.names):
        answered[name] = [row[e] for row in by_expert]
    probabilities = router.probabilities(questions)
    for k in top_ks:
        answered[f"top-{k}"] = answers_of(ensemble, f"top-{k}", questions, select(probabilities, k), **options)
    if single_label is not None:
        first = select(single_label.probabilities(questions), 1)[0][:, 0].tolist()
        answered["single-label"] = [row[e] for row, e in zip(by_expert, first, strict=True)]
    right = {
        label: tuple(judge(q, a, g) for q, a, g in zip(questions, given, golds, strict=True))
        for label, given in answered.items()
    }
    right[ORACLE] = tuple(any(right[name][m] for name in ensemble.names) for m in range(len(questions)))
    return [Score(label, task, "", "judge", len(items), sum(items), None, items) for label, items in right.items()]


def plot_top_k(scores: Sequence[Score], names: Sequence[str], path: Path) -> Path:
    """Write a PNG: the score against the number of experts mixed, 1, 2, ..., the best single expert dashed (Figure 5).

    Errors: ImportError, with the install line, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "moerge_ext[plot]"') from error
    mixed = [score for score in scores if score.method.startswith("top-")]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    ks, values = [int(s.method.removeprefix("top-")) for s in mixed], [100 * s.value for s in mixed]
    # not below 0 by rounding
    errors = [
        [max(0.0, v - 100 * s.interval[0]) for v, s in zip(values, mixed, strict=True)],
        [max(0.0, 100 * s.interval[1] - v) for v, s in zip(values, mixed, strict=True)],
    ]
    axis.errorbar(ks, values, yerr=errors, marker="o", capsize=3, label="ensemble")
    best = max((s for s in scores if s.method in names), key=lambda s: s.value)
    axis.axhline(100 * best.value, ls="--", color="gray", label=f"best expert: {best.method}")
    axis.set_xticks(ks)
    axis.set_xlabel("experts mixed per question")
    axis.set_ylabel("% right")
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
