"""What the paper's tables hold: every expert, the ensembles of k, the baselines, the oracle; a column per dataset."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation import identity
from ..evaluation.evaluate import Score
from ..evaluation.metrics import paired_difference
from ..evaluation.store import Answers
from ..files.atomic import write_atomically
from ..models.pretrained import context_of
from ..queries.cache import TextCache
from .config import BASELINE
from .judge import Judge, final_answer, is_right
from .mixture import PromptEnsemble
from .prompts import PromptExpert
from .questions import Question
from .router import PromptRouter, select, warn_of_other_experts

ORACLE, MIXED, SINGLE = "oracle_question", "top-", "single-label top-"
ITEMS = "items.jsonl.gz"
SINGLE_KS = (1, 2)  # of the single-label router, Table 2


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

    They lie in `<output>/answers/<label>.<digest>.jsonl`; what is there of the same model, and of experts with the same
    `PromptExpert.facts`, by content, and of the same `facts` and choice, is not asked again. Sampled answers of answer
    prompting lie in `<output>/samples`.
    """
    ids, weights = choice
    settings = {"label": label, "questions": list(questions), **(facts or {}), **options}
    used = [ensemble.experts[e] for e in ids.unique().tolist()]
    settings["choice"] = [
        [[ensemble.names[e] for e in row] for row in ids.tolist()],
        [[round(w, 6) for w in row] for row in weights.tolist()],
    ]
    settings["experts"] = {expert.name: identity.of_text([dict(expert.facts), expert.lora]) for expert in used}
    settings["chat"] = ensemble.form.chat
    if any(expert.needs_samples for expert in used):
        settings["sampled_with"] = ensemble.sampler.seed
    if output is not None:
        # once for an ensemble, whose model does not change between its answers
        if "model" not in (known := vars(ensemble).setdefault("_identity", {})):
            known["model"] = identity.of_model(ensemble.asked.model, ensemble.asked.tokenizer)
        settings |= known
        ensemble.sampler.keep(TextCache(output / "samples"), identity.of_text(known))
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
    ones = torch.ones(len(questions), 1, dtype=torch.float32, device="cpu")
    columns = [
        answers_of(ensemble, name, questions, (torch.full((len(questions), 1), e, device="cpu"), ones), **options)
        for e, name in enumerate(ensemble.names)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def measure(
    ensemble: PromptEnsemble,
    questions: Sequence[Question],
    judge: Judge | Mapping[str, Judge],
    *,
    router: PromptRouter,
    single_label: PromptRouter | None = None,
    few_shot: Mapping[str, PromptExpert] | None = None,
    top_ks: Sequence[int] = (1, 2, 3, 4),
    answer_after: str | None = None,
    **options: Any,
) -> list[Score]:
    """The rows of PELMo's Tables 1 and 2 and the points of its Figure 5: a score for each row and dataset.

    `specific few-shot`: each question by the expert of its dataset in `few_shot`, outside the pool; each expert alone;
    `top-<k>` of the multi-label router; `single-label top-1` and `-2` of the other router; `oracle_question`: right
    when any expert is (an upper bound for choosing one). With `output` all answers, and which are right, lie in
    `<output>/items.jsonl.gz`. The means over the datasets, the macro-averages, are in the tables that
    `evaluation.report` makes of the scores.

    Args:
        judge: one, or {dataset: one}; it gets what follows `answer_after`, where an answer has that.
        options: as in `answers_of`. Everything is checked before the first answer: routers, datasets, and whether the
            prompts fit the model's context.
    """
    texts = [question.text for question in questions]
    judges = _check(ensemble, questions, judge, (router, single_label), few_shot, top_ks)
    check_lengths(ensemble, texts, options.get("max_new_tokens", 64))
    answered = {}
    if few_shot:
        answered[BASELINE] = _specific(ensemble, questions, few_shot, options)
    by_expert = answers_by_experts(ensemble, texts, **options)
    answered |= {name: [row[e] for row in by_expert] for e, name in enumerate(ensemble.names)}
    for prefix, who, ks in ((MIXED, router, top_ks), (SINGLE, single_label, SINGLE_KS)):
        for k in [k for k in ks if k in top_ks] if who is not None else ():
            ids, weights = select(who.probabilities(texts), k)
            label = f"{prefix}{k}"
            if k == 1:  # one expert alone, who has answered
                answered[label] = [row[e] for row, e in zip(by_expert, ids[:, 0].tolist(), strict=True)]
            else:
                answered[label] = answers_of(ensemble, label, texts, (ids, weights), **options)
    bars = {"leave": False, "unit": "a", "total": len(questions), "disable": not options.get("progress", True)}
    right = {
        label: [
            is_right(judges[q.dataset], q.text, final_answer(a, answer_after), q.golds)
            for q, a in tqdm(zip(questions, given, strict=True), desc=f"judging {label}", **bars)
        ]
        for label, given in answered.items()
    }
    right[ORACLE] = [any(right[name][m] for name in ensemble.names) for m in range(len(questions))]
    if options.get("output") is not None:
        _keep_items(options["output"] / ITEMS, questions, answered, right)
    return _scores(questions, right)


def _keep_items(path: Path, questions: Sequence[Question], answered, right) -> None:
    """A line for every question, from which the whole table can be made again."""
    lines = [
        {
            "dataset": question.dataset,
            "question": question.text,
            "golds": question.golds,
            "answers": {label: given[m] for label, given in answered.items()},
            "right": {label: said[m] for label, said in right.items()},
        }
        for m, question in enumerate(questions)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_atomically(path, lambda file: file.write_bytes(gzip.compress(text, mtime=0)))


def _scores(questions: Sequence[Question], right: Mapping[str, Sequence[bool]]) -> list[Score]:
    datasets = list(dict.fromkeys(question.dataset for question in questions))
    scores = []
    for label, said in right.items():
        for name in datasets:
            items = tuple(value for question, value in zip(questions, said, strict=True) if question.dataset == name)
            scores.append(Score(label, name, "", "judge", len(items), sum(items), None, items))
    return scores


def _check(ensemble, questions, judge, routers, few_shot, top_ks) -> Mapping[str, Judge]:
    """{dataset: judge}; ValueError for what does not fit together."""
    for router in routers:
        if router is not None:
            if router.names != ensemble.names:
                raise ValueError(f"a router for {', '.join(router.names)} cannot serve {', '.join(ensemble.names)}")
            warn_of_other_experts(router, ensemble.form, ensemble.experts)
    if not questions:
        raise ValueError("no questions to answer: expected at least one")
    wrong = [k for k in top_ks if not 1 <= k <= len(ensemble.names)]
    if wrong:
        raise ValueError(f"top_k must be between 1 and the number of experts, {len(ensemble.names)}; got {wrong[0]}")
    taken = [n for n in ensemble.names if n in (BASELINE, ORACLE) or n.startswith((MIXED, SINGLE))]
    if taken:
        raise ValueError(f"an expert cannot be called {taken[0]!r}: other rows of the table are called so")
    datasets = list(dict.fromkeys(question.dataset for question in questions))
    judges = {name: judge for name in datasets} if callable(judge) else judge
    for what, known in (("judge", judges), ("few-shot baseline", few_shot or dict.fromkeys(datasets))):
        lacking = [name for name in datasets if name not in known]
        if lacking:
            raise ValueError(f"there is no {what} for {', '.join(lacking)}; only for {', '.join(known)}")
    return judges


def check_lengths(ensemble: PromptEnsemble, questions: Sequence[str], limit: int, *, only: str | None = None) -> None:
    """ValueError for the experts whose longest prompt, without sampled answers, does not fit the model's context.

    only: the name of one expert.
    """
    context, asked = context_of(ensemble.asked.model.config), ensemble.asked
    if context is None:
        return
    problems = []
    for expert in [expert for expert in ensemble.experts if only in (None, expert.name)]:
        lengths = [len(asked.prompt_ids(ensemble.put(expert.turns(q, lambda *_: ())))) for q in questions]
        longest = max(lengths) + (0 if asked.seq2seq else limit)
        if longest > context:
            problems.append(
                f"expert '{expert.name}': {longest} tokens, question {lengths.index(max(lengths))} (from 0)"
            )
    if problems:
        raise ValueError(
            f"prompts with their answers do not fit the context of {context} tokens; lower the experts' count, "
            "passages or samples, those of the demonstrations first, or --max-new-tokens:\n- " + "\n- ".join(problems)
        )


def _specific(ensemble: PromptEnsemble, questions: Sequence[Question], few_shot, options) -> list[str]:
    """Every question by the few-shot prompt of its dataset."""
    names = list(few_shot)
    asked = ensemble.asked
    other = PromptEnsemble(
        asked.model, asked.tokenizer, [few_shot[n] for n in names], handle=ensemble.handle, form=ensemble.form
    )
    texts = [question.text for question in questions]
    check_lengths(other, texts, options.get("max_new_tokens", 64))
    ids = torch.tensor([[names.index(question.dataset)] for question in questions], device="cpu")
    return answers_of(
        other, BASELINE, texts, (ids, torch.ones(len(texts), 1, dtype=torch.float32, device="cpu")), **options
    )


def macro(scores: Sequence[Score], method: str) -> float:
    """The mean of a row over the datasets."""
    values = [score.value for score in scores if score.method == method]
    return sum(values) / len(values)


def macro_difference(scores: Sequence[Score], ours: str, theirs: str) -> tuple[float, float, float]:
    """(mean, low, high) of the difference of two rows' macro-averages, paired by question, with its 95 % interval.

    The datasets are fixed, their questions samples: the half-widths h_d of the D datasets give sqrt(sum h_d^2) / D.
    """
    rows = [{score.task: score for score in scores if score.method == name} for name in (ours, theirs)]
    pairs = [paired_difference(rows[0][task].items, rows[1][task].items) for task in rows[0]]
    mean = sum(pair[0] for pair in pairs) / len(pairs)
    half = math.hypot(*(pair[2] - pair[0] for pair in pairs)) / len(pairs)
    return mean, mean - half, mean + half
