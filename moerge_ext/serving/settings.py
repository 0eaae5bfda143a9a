"""What a server is told of its experts: the dict under "moerge", checked.

    {"experts": ["path/a", "path/b"], "method": "phatgoose", "top_k": 2}

Every key that is not one of `Settings` is an option of the method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..experts.bank import ExpertBank, load_experts
from ..experts.gate_files import global_parts
from ..experts.selection import Selection
from ..experts.sources import collect_sources
from ..methods import get_method
from ..methods.base import is_integer
from .queries import Queries, embedder_problems

KEY = "moerge"  # in vLLM's additional_config, and in the extra arguments of a request
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """Which experts are served, and how.

    experts: folders, files or hub ids, or {name: where}; the other fields of `load_experts` and `patch` as there
    methods: {method that a request may name: its options}
    requests: False refuses every request that says anything of its routing
    spare: slots for experts that join while the server runs
    metrics: True counts what is chosen, for the server's metrics
    traces: how many requests' traces are kept; 0 refuses requests that ask for one
    embedder: the model that embeds a request's text for methods that need its affinities, as `queries.py` says
    """

    experts: list[str] | dict[str, str]
    method: str = "phatgoose"
    options: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: bool = True
    absent: str = "mask"
    missing: str = "error"
    dtype: str | None = None
    names: list[str] | None = None
    modules: str | None = None
    rename: dict[str, str] | None = None
    spare: int = 0
    metrics: bool = False
    traces: int = 0
    embedder: str | dict[str, Any] | None = None

    @classmethod
    def parse(cls, said: Any) -> Settings:
        """ValueError that lists everything wrong with the dict `said`."""
        if not isinstance(said, Mapping):
            raise ValueError(f'"{KEY}" must be an object such as {{"experts": ["path/a", "path/b"]}}, got {said!r}')
        known = {f.name for f in fields(cls)} - {"options"}
        given = {key: value for key, value in said.items() if key in known}
        if isinstance(given.get("experts"), str):
            given["experts"] = [given["experts"]]
        if _texts(given.get("methods")):  # the default among them has its options already
            default = given.get("method", cls.method)
            given["methods"] = {name: {} for name in given["methods"] if name != default}
        options = {key: value for key, value in said.items() if key not in known}
        if problems := _problems(given, options):
            raise ValueError(f'"{KEY}" cannot be served:\n' + "\n".join(f"  - {problem}" for problem in problems))
        return cls(options=options, **given)

    def as_dict(self) -> dict[str, Any]:
        """What `parse` makes these settings of."""
        defaults = {f.name: f.default for f in fields(self)}
        said = {"experts": self.experts, "method": self.method, **self.options}
        if self.methods:
            said["methods"] = self.methods
        rest = ("requests", "absent", "missing", "dtype", "names", "modules", "rename", "spare", "metrics", "traces")
        rest += ("embedder",)
        return said | {name: value for name in rest if (value := getattr(self, name)) != defaults[name]}

    @property
    def answers_more(self) -> bool:
        """Whether a server gets routes or metrics of ours."""
        return bool(self.spare or self.metrics or self.traces)

    def variants(self) -> dict[str, dict[str, Any]]:
        """{method: its options}, the one of requests that name none first."""
        return {self.method: self.options, **self.methods}

    def load(self, base: Any) -> ExpertBank:
        """The experts, by `load_experts` and its checks; base: the folder or config of the base model."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        chosen = {"names": self.names, "modules": self.modules, "rename": self.rename}
        return load_experts(self.experts, dtype, base=base, **chosen)

    def expert_folders(self, base: Any, experts: Any = None) -> dict[str, str]:
        """{expert: its folder} in the order of their ids; reads headers only. ValueError as by `load_experts`.

        experts: others than the settings', of which all are taken.
        """
        names = self.names if experts is None else None
        asked = self.experts if experts is None else experts
        sources, _ = collect_sources(asked, Selection(self.modules, self.rename, names), base)
        return {source.name: str(source.folder) for source in sources}

    def queries(self, base: Any) -> Queries | None:
        """What embeds the requests' texts, of experts whose weights are not read; None without an embedder.

        ValueError for experts that cannot be routed by a text, and as by `expert_folders`.
        """
        if self.embedder is None:
            return None
        sources, _ = collect_sources(self.experts, Selection(self.modules, self.rename, self.names), base)
        vectors, facts = global_parts(sources, torch.device("cpu"))
        folders = [source.folder for source in sources]
        names = [source.name for source in sources]
        outline = ExpertBank(names, {}, folders=folders, global_vectors=vectors, global_metadata=facts)
        return Queries(self.embedder, self.variants(), outline)

    def load_one(self, name: str, source: str, base: Any) -> ExpertBank:
        """One more expert, by the same checks."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return load_experts({name: source}, dtype, base=base, modules=self.modules, rename=self.rename)


def _problems(given: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    problems = []
    experts = given.get("experts")
    if not (_texts(experts) or _text_map(experts)) or not experts:
        problems.append(f'experts must be a list of folders or hub ids, or {{"name": folder}}, got {experts!r}')
    for key, kind, said in (
        ("requests", bool, "true or false"),
        ("metrics", bool, "true or false"),
        ("modules", str, "a regular expression"),
        ("method", str, "the name of a method"),
    ):
        if key in given and not isinstance(given[key], kind) and not (key == "modules" and given[key] is None):
            problems.append(f"{key} must be {said}, got {given[key]!r}")
    for key, what in (("spare", "a number of experts"), ("traces", "a number of requests")):
        if key in given and not (is_integer(given[key]) and given[key] >= 0):
            problems.append(f"{key} must be {what}, 0 or more, got {given[key]!r}")
    for key, values in (("absent", ("mask", "base")), ("missing", ("error", "drop")), ("dtype", (None, *DTYPES))):
        if key in given and given[key] not in values:
            problems.append(f"{key} must be one of {', '.join(map(json.dumps, values))}, got {given[key]!r}")
    if given.get("names") is not None and not _texts(given["names"]):
        problems.append(f"names must be a list of names, got {given['names']!r}")
    if given.get("rename") is not None and not _text_map(given["rename"]):
        problems.append(f'rename must be {{"old": "new"}}, got {given["rename"]!r}')
    methods = given.get("methods", {})
    if not (isinstance(methods, Mapping) and all(isinstance(value, Mapping) for value in methods.values())):
        problems.append(f'methods must be a list of names, or {{"name": {{option: value}}}}, got {methods!r}')
        methods = {}
    method = given.get("method", Settings.method)
    if isinstance(method, str) and dict(methods.get(method, options)) != dict(options):
        problems.append(
            f"methods has the default method {method!r} once more, with {dict(methods[method])}: it has the options "
            f"beside it, {dict(options)}"
        )
    asked = {method: options} if isinstance(method, str) else {}
    rows = []
    for name, values in (dict(methods) | asked).items():
        if not _texts([name, *values]):
            problems.append(f"names of methods and options must be texts, got {name!r}: {dict(values)!r}")
            continue
        try:
            rows.append(get_method(name))
            rows[-1].configure(**values)
        except ValueError as error:
            problems.append(str(error))
    if (embedder := given.get("embedder")) is not None:
        problems += embedder_problems(embedder, rows, given.get("spare"))
    return problems


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)


def _text_map(value: Any) -> bool:
    return isinstance(value, Mapping) and _texts(list(value)) and _texts(list(value.values()))
