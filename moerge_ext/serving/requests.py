"""What a request says of its routing: {"moerge": {...}} in its extra arguments.

{"weights": {"news": 0.7, "code": 0.3}}     these experts with these weights, one per expert or by name
{"expert": "news"}                          one expert alone
{"routing": false}                          the base model alone
{"method": "arrow"}                         another of the methods that the server was started with
{"affinities": {"news": 0.9}}               of a method that adds the query's affinities to its scores
{"query": "Who won?"}                       the same, found for this text; without either, for the prompt's own
{"trace": true}                             besides any of these: keep which experts answered
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..methods.base import is_finite_number

SHOWN = 5  # unknown names in an error
MOST = 100.0  # a weight or an affinity, whatever its sign: what it makes stays finite, and so what is cached of it
KEYS = ("weights", "expert", "routing", "method", "affinities", "query", "trace")


@dataclass(frozen=True)
class Choice:
    """A request's routing, checked. `method` None: no method routes it, `weights` do, or nothing where they are None.

    weights, affinities: [E] numbers
    """

    method: str | None
    weights: tuple[float, ...] | None = None
    affinities: tuple[float, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data that a message to another process can carry; `Choice(**...)` reads it back."""
        return {"method": self.method, "weights": self.weights, "affinities": self.affinities}

    def key(self) -> str:
        """Equal for requests that are routed alike: what a cache of their tokens must be kept apart by."""
        return "moerge:" + hashlib.sha256(json.dumps(self.as_dict()).encode()).hexdigest()


@dataclass(frozen=True)
class Rules:
    """What requests may say to a server.

    names: the experts; methods: {method: whether it needs affinities}, the default first; whole: whether the experts
    are there one by one (not merged); open: False when no request may say anything; traces: whether any are kept;
    reads: the methods whose affinities are found for a text
    """

    names: tuple[str, ...]
    methods: Mapping[str, bool]
    whole: bool = True
    open: bool = True
    traces: bool = False
    reads: Sequence[str] = ()

    @property
    def default(self) -> str:
        return next(iter(self.methods))

    def read(self, said: Any, found: Callable[[str, str | None], tuple[float, ...]] | None = None) -> Choice | None:
        """The choice of a request; None for the default. ValueError says what was expected and what came.

        found: (one of `reads`, query) -> its affinities [E]; query None: of the request's prompt
        """
        if said is None:
            if self.default in self.reads:
                return Choice(self.default, affinities=found(self.default, None))
            if self.methods[self.default]:
                raise ValueError(
                    f"moerge: the method '{self.default}' needs the affinities of the request to the experts: send "
                    f'{{"affinities": {{{self._example()}: 0.9}}}} in its "moerge" argument, or name another method'
                )
            return None
        if not self.open:
            raise ValueError("moerge: this server takes no routing from requests (it was started with requests=false)")
        said = _object(said)
        if said.get("routing") is True:  # what a request that leaves it out gets
            return self.read({key: value for key, value in said.items() if key != "routing"}, found)
        problems = self._problems(said)
        if problems:
            raise ValueError("moerge: " + "; ".join(problems))
        if said.get("routing") is False:
            return Choice(None)
        if "expert" in said:
            return Choice(None, weights=tuple(float(name == said["expert"]) for name in self.names))
        if "weights" in said:
            return Choice(None, weights=self._numbers(said["weights"]))
        method = said.get("method", self.default)
        affinities = self._numbers(said["affinities"]) if "affinities" in said else None
        if affinities is None and method in self.reads:
            affinities = found(method, said.get("query"))
        choice = Choice(method, affinities=affinities)
        return None if choice == Choice(self.default) else choice

    def traced(self, said: Any) -> bool:
        """Whether a request that `read` has taken wants to know which experts answered."""
        return said is not None and bool(_object(said).get("trace", False))

    def _problems(self, said: Mapping[str, Any]) -> list[str]:
        problems = []
        if unknown := [key for key in said if key not in KEYS]:
            problems.append(f"unknown {', '.join(map(_shown, unknown))}; a request may say {', '.join(KEYS)}")
        alone = [key for key in ("weights", "expert", "routing") if key in said]
        if len(alone) > 1 or (alone and {"method", "affinities", "query"} & set(said)):
            problems.append(f"{alone[0]!r} stands alone, got {', '.join(map(_shown, said))}")
        for key in ("routing", "trace"):
            if not isinstance(said.get(key, True), bool):
                problems.append(f"{key} must be true or false, got {_shown(said[key])}")
        if said.get("trace") is True and not self.traces:
            problems.append("this server keeps no traces (it was started without traces)")
        if "expert" in said and said["expert"] not in self.names:
            problems.append(f"no expert {_shown(said['expert'])}; there are {', '.join(self.names)}")
        if {"expert", "weights"} & set(said) and not self.whole:
            problems.append(f"the method '{self.default}' has the experts merged, and none of them by itself")
        for key in ("weights", "affinities"):
            if key in said:
                problems += self._number_problems(key, said[key])
        method = said.get("method", self.default)
        if method not in list(self.methods):  # it may be anything, unhashable too
            problems.append(f"no method {_shown(method)} on this server; there are {', '.join(self.methods)}")
        elif not alone:
            problems += self._affinity_problems(method, said)
        return problems

    def _affinity_problems(self, method: str, said: Mapping[str, Any]) -> list[str]:
        """Of affinities and query, of which a method takes one at most."""
        problems = []
        if "query" in said:
            if not _is_text(said["query"]):
                problems.append(f"query must be a text, got {_shown(said['query'])}")
            if "affinities" in said:
                problems.append("affinities and query say the same twice: send one of them")
            if not self.methods[method]:
                problems.append(f"the method {method!r} takes no query")
            elif not self.reads:
                problems.append("this server has no embedder for a query (it was started without): send affinities")
            elif method not in self.reads:
                problems.append(f"the method {method!r} reads no query: send affinities")
        elif "affinities" in said and not self.methods[method]:
            problems.append(f"the method {method!r} takes no affinities")
        elif "affinities" not in said and self.methods[method] and method not in self.reads:
            problems.append(f"the method {method!r} needs affinities")
        return problems

    def _number_problems(self, key: str, value: Any) -> list[str]:
        if isinstance(value, Mapping):
            unknown = [name for name in value if name not in self.names]
            said = [*map(_shown, unknown[:SHOWN]), *([f"{len(unknown) - SHOWN} more"] if len(unknown) > SHOWN else [])]
            problems = [f"{key}: no expert {', '.join(said)}; there are {', '.join(self.names)}"] if unknown else []
            numbers: Sequence[Any] = list(value.values())
        elif isinstance(value, list | tuple):
            right = len(value) == len(self.names)
            problems = [] if right else [f"{key} must have E={len(self.names)} numbers, got {len(value)}"]
            numbers = value
        else:
            wanted = f"{{{self._example()}: 1.0}} or a list of E={len(self.names)} numbers"
            return [f"{key} must be {wanted}, got {_shown(value)}"]
        if bad := [number for number in numbers if not is_finite_number(number)]:
            problems.append(f"{key} must be finite numbers, got {_shown(bad[0])}")
        elif huge := [number for number in numbers if abs(number) > MOST]:
            problems.append(f"{key} must be between -{MOST:g} and {MOST:g}, got {_shown(huge[0])}")
        return problems

    def _numbers(self, value: Any) -> tuple[float, ...]:
        if isinstance(value, Mapping):
            return tuple(float(value.get(name, 0.0)) for name in self.names)
        return tuple(map(float, value))

    def _example(self) -> str:
        return json.dumps(self.names[0])


def _is_text(value: Any) -> bool:
    """Whether it is a text with something in it, all of which can be written down (no half of a surrogate pair)."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _object(said: Any) -> Mapping[str, Any]:
    """The object, which may come as JSON text: some ways in carry only text and numbers."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"moerge: expected an object or its JSON text, got {said[:100]!r} ({error})") from None
    if not isinstance(said, Mapping):
        raise ValueError(f'moerge: expected an object such as {{"routing": false}}, got {_shown(said)}')
    return said


def _shown(value: Any) -> str:
    """A value of a request, as much of it as belongs into an error."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
