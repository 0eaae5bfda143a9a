"""Whether an answer is right, and the label matrix that a router learns from."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.metrics import exact_match
from ..queries.embedder import Embedder
from ..queries.vectors import unit

Judge = Callable[[str, str, str], bool]  # (question, answer, gold) -> right?
Golds = Sequence[str]  # the answers that are right, at least one: an entity has several names
_LETTER = re.compile(r"[*_`]*\(?([A-Za-z])(?:[).:,*_`\n]|$)|([B-HJ-Z])\s")  # "A" and "I" before a space may be words
_BRACKETED = re.compile(r"\(([A-Za-z])\)")
_NUMBER = re.compile(r"((?<![\w.,)\]])[-\u2212])?[$\u20ac\u00a3]?(\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")
_SIGN = "####"  # before the final answer of GSM8K's solutions


def exact(question: str, answer: str, gold: str) -> bool:
    """The same text, apart from white space at the ends."""
    return exact_match(answer, gold)


def numeric(question: str, answer: str, gold: str) -> bool:
    """The last number of the answer equals that of the gold answer; behind "####", as in GSM8K, the first."""
    mine, right = number(answer), number(gold)
    if right is None:
        raise ValueError(f"the numeric judge needs a number in the gold answer, got {gold[:80]!r}; use another judge")
    return mine == right


def contains(question: str, answer: str, gold: str) -> bool:
    """The words of the gold answer stand in the answer, one after another; case and punctuation do not count.

    A stand-in for a language model that judges, where answers are whole sentences. It takes "not Paris" for Paris.
    """
    said, wanted = _words(answer), _words(gold)
    if not wanted.strip():
        raise ValueError(f"the judge 'contains' needs a word in the gold answer, got {gold[:80]!r}; use another judge")
    return wanted in said


def choice(question: str, answer: str, gold: str) -> bool:
    """The letter that the answer to a multiple choice begins with ("B", "b.", "B) because"), else its first "(B)"."""
    right = _letter(gold)
    if right is None:
        raise ValueError(f"the judge 'choice' needs a letter as gold answer, got {gold[:80]!r}; use another judge")
    return _letter(answer) == right


def _letter(text: str) -> str | None:
    """The letter of a multiple choice that a text names, in upper case."""
    begins, bracketed = _LETTER.match(text.strip()), _BRACKETED.search(text)
    if begins is not None and begins[0].upper() in ("A,", "I,") and bracketed is not None:
        begins = None  # "I, for one, say (C)"
    found = begins or bracketed
    return None if found is None else next(filter(None, found.groups())).upper()


def _words(text: str) -> str:
    """The words in lower case, a space around each; vowel signs are of their word, a number with its point is one."""
    text = unicodedata.normalize("NFC", text.casefold())
    kept = []
    for i, c in enumerate(text):
        inside = c in ".," and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit()
        kept.append(c if inside or c.isalnum() or unicodedata.category(c).startswith("M") else " ")
    return f" {' '.join(''.join(kept).split())} "


def number(text: str) -> float | None:
    """The last number in a text ("$1,200.50." -> 1200.5), the first behind "####"; None without one."""
    _, sign, final = text.partition(_SIGN)
    found = _NUMBER.findall(final if sign else text)
    if not found:
        return None
    minus, digits = found[0 if sign else -1]
    return float(("-" if minus else "") + digits.replace(",", ""))


def final_answer(text: str, after: str | None) -> str:
    """What follows the last `after` ("The answer is"), without a final full stop; all of a text that has none."""
    if after is None or after not in text:
        return text
    return text.rpartition(after)[2].strip().removesuffix(".").strip()


JUDGES: dict[str, Judge] = {"exact": exact, "numeric": numeric, "contains": contains, "choice": choice}


def is_right(judge: Judge, question: str, answer: str, golds: Golds) -> bool:
    """Whether an answer is one of the right ones; a judge with a method `among` is shown them all at once.

    ValueError when there is none, and when the judge says anything but True or False.
    """
    golds = (golds,) if isinstance(golds, str) else tuple(golds)
    if not golds:
        raise ValueError(f"no gold answer to {question[:80]!r}: expected at least one")
    among = getattr(judge, "among", None)
    said = [among(question, answer, golds)] if among else [judge(question, answer, gold) for gold in golds]
    wrong = [value for value in said if not isinstance(value, bool)]
    if wrong:
        raise ValueError(f"a judge must answer True or False, got {wrong[0]!r}")
    return any(said)


def judged(
    judge: Judge | Sequence[Judge],
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    golds: Sequence[str | Golds],
    *,
    progress: bool = False,
) -> Tensor:
    """[M,N] bool: whether expert n answered question m right; answers: M lists of N; judge: one, or one a question.

    ValueError when the lists do not fit, or the judge says anything but True or False.
    """
    counts = {len(row) for row in answers}
    if not len(questions) == len(answers) == len(golds) or len(counts) != 1:
        raise ValueError(
            f"expected as many questions as answers and golds, and equally many answers to each; got {len(questions)}, "
            f"{len(answers)}, {len(golds)}, answers per question {sorted(counts)}"
        )
    judges = [judge] * len(questions) if callable(judge) else judge
    return torch.tensor(
        [
            [is_right(who, question, answer, gold) for answer in given]
            for who, question, given, gold in tqdm(
                zip(judges, questions, answers, golds, strict=True),
                total=len(questions),
                desc="judging",
                unit="q",
                leave=False,
                disable=not progress,
            )
        ],
        device="cpu",
    )


def label_matrix(
    right: Tensor,
    answers: Sequence[Sequence[str]],
    golds: Sequence[str | Golds],
    names: Sequence[str],
    *,
    embedder: Embedder | None = None,
    theta: float | None = None,
) -> Tensor:
    """right [M,N] bool -> labels [M,N] bool in which every row has an expert.

    Rows in which nobody is right, and only those, get PELMo's fallback: answers and gold are embedded; an answer whose
    cosine to the gold (the most similar of several) is above theta counts as right, and when there is none, the most
    similar one does (section 2.2, eq. 1).

    theta depends on the embedder, so it has no default: ValueError when it (or the embedder) is needed and missing.
    Warns of experts that are never right: weak ones, which stay.
    """
    if right.dim() != 2 or right.shape != (len(golds), len(names)):
        raise ValueError(f"labels must be [M={len(golds)}, N={len(names)}], got {list(right.shape)}")
    weak = [name for name, column in zip(names, right.T, strict=True) if not column.any()]
    if weak:
        warnings.warn(f"never right on these questions: {', '.join(weak)}; weak experts, kept", stacklevel=2)
    lost = (~right.any(1)).nonzero().flatten().tolist()
    if not lost:
        return right.clone()
    if embedder is None or theta is None:
        raise ValueError(
            f"in {len(lost)} of {len(golds)} questions no expert is right: pass an embedder and theta, the similarity "
            "above which an answer counts as right (it depends on the embedder)"
        )
    if not -1 <= theta <= 1:
        raise ValueError(f"theta is a cosine and must be in [-1, 1], got {theta}")
    labels = right.clone()
    for m in lost:
        similar = _similarities(embedder, answers[m], golds[m])
        chosen = similar > theta
        if not chosen.any():
            chosen[similar.argmax()] = True
        labels[m] = chosen
    return labels


def _similarities(embedder: Embedder, answers: Sequence[str], golds: str | Golds) -> Tensor:
    """[N] cosines of the answers to the nearest of the golds; -1 for an empty answer, which has no embedding."""
    golds = (golds,) if isinstance(golds, str) else tuple(golds)
    given = [i for i, answer in enumerate(answers) if answer.strip()]
    similar = torch.full((len(answers),), -1.0, dtype=torch.float32, device="cpu")
    if given:
        vectors = unit(embedder([*golds, *(answers[i] for i in given)]))
        similar[given] = (vectors[len(golds) :] @ vectors[: len(golds)].T).amax(1)
    return similar
