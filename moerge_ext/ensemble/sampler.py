"""The model's own answers, as answer prompting samples them: once for a prompt, the same whenever they are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

from ..queries.cache import TextCache
from .prompts import Ask
from .template import Turns


@dataclass(frozen=True)
class Wish:
    """`count` sampled answers to one prompt, of at most `limit` tokens, drawn with a seed of its own."""

    prompt: Turns
    count: int
    limit: int
    seed: int


class _NotYet(BaseException):
    """A prompt needs answers that are still to be sampled; no expert's own `except Exception` is to catch it."""


class Sampler:
    """Prompts that need sampled answers, made with them.

    Every prompt is sampled with a seed of its own, from `seed` and its text: what it gets does not depend on the
    questions beside it or before it, nor on whether a run was interrupted (but for the last bits of logits, which may
    differ in a batch of another shape). The same prompt is sampled once: the expert alone and the ensembles that it is
    part of share its answers.

    marks: what else the answers depend on, beside the model: how a prompt is put to it.
    sample: (wishes of one limit, stop) -> the answers of each wish, all of them in one batch.
    """

    def __init__(
        self, sample: Callable[[list[Wish], Sequence[str]], list[list[str]]], seed: int, marks: Sequence[str] = ()
    ):
        self.sample, self.seed, self.marks = sample, seed, tuple(marks)
        self.kept: dict[str, list[str]] = {}
        self.cache: TextCache | None = None
        self.identity = ""

    def keep(self, cache: TextCache, identity: str) -> None:
        """Keep the answers on disk as well, as those of the model of this identity."""
        self.cache, self.identity = cache, identity

    def made(
        self, makers: Sequence[Callable[[Ask], Turns]], *, rows: int, limit: int, stop: tuple[str, ...] = ()
    ) -> list[Turns]:
        """What each of `makers` makes with the answers that it asks for, of at most `limit` tokens, or fewer where it
        says so.

        The samples of several prompts are drawn together, at most `rows` at a time or those of one prompt.
        """
        done: list[Turns | None] = [None] * len(makers)
        while True:
            wanted: dict[str, Wish] = {}

            def ask(prompt: Turns, count: int, most: int = limit, *, wanted: dict[str, Wish] = wanted) -> list[str]:
                most = min(most, limit)
                asked = json.dumps([astuple(prompt), count, most, stop, self.seed, *self.marks])
                answers = self._known(asked)
                if answers is None:
                    wanted[asked] = Wish(prompt, count, most, int(_digest(asked)[:15], 16))
                    raise _NotYet
                return answers

            for i, make in enumerate(makers):
                if done[i] is None:
                    try:
                        done[i] = make(ask)
                    except _NotYet:
                        continue
            if not wanted:
                return [turns for turns in done if turns is not None]
            self._draw(wanted, rows, stop)

    def _known(self, asked: str) -> list[str] | None:
        if (digest := _digest(asked)) not in self.kept and self.cache is not None:
            answers = self.cache.get("samples", self.identity, asked)
            if answers is not None:
                self.kept[digest] = answers
        return self.kept.get(digest)

    def _draw(self, wanted: dict[str, Wish], rows: int, stop: tuple[str, ...]) -> None:
        for part in _batches(wanted, rows):
            answers = self.sample([wanted[asked] for asked in part], stop)
            for asked, own in zip(part, answers, strict=True):
                self.kept[_digest(asked)] = own
                if self.cache is not None:
                    self.cache.put(own, "samples", self.identity, asked)


def _digest(asked: str) -> str:
    return hashlib.sha256(asked.encode()).hexdigest()


def _batches(wanted: dict[str, Wish], rows: int) -> Iterator[list[str]]:
    """Keys of `wanted` in order, those of a batch of one limit, with as many samples as `rows`, or one key."""
    part: list[str] = []
    for asked, wish in wanted.items():
        full = sum(wanted[key].count for key in part) + wish.count > rows
        if part and (full or wanted[part[0]].limit != wish.limit):
            yield part
            part = []
        part.append(asked)
    yield part
