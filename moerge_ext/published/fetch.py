"""A collection's tasks as folders that `moerge eval` reads, loaded with the library `datasets`, each written whole."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files.atomic import check_can_write, write_atomically
from ..files.hub import unreached
from ..files.meta import META_FILE
from ..files.rows import read_json
from .collections import COLLECTIONS, Collection, Source
from .layouts import check_columns

SCORES = "*_score_eval"  # P3's other form of the same examples, a row per choice
WITHOUT = "where there is no hub, give copies of the repositories (--from DIR, `copies`)"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Fetched:
    """A task folder; rows: {split: how many}; already: it was there."""

    folder: Path
    rows: dict[str, int]
    already: bool = False


def fetch(
    collection: str,
    output: Path,
    *,
    tasks: Sequence[str] | None = None,
    copies: Path | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Fetched]:
    """Write <output>/<task>/{train,validation,test}.jsonl and meta.json for every task of a collection, one by one.

    Args:
        tasks: some of its tasks, or optional ones; default all but the optional.
        copies: a folder with copies of the repositories, `copies`/<path>, to load instead of the hub's.
        sizes: rows at most of every split, drawn at random with `seed`, the same number of each prompt.

    A task that is there already is not loaded again. Before anything is loaded: ValueError for unknown names, tasks of
    which the repository has no configuration, and a folder of another draw; ImportError without `datasets`.
    """
    row = COLLECTIONS.get(collection)
    if row is None:
        raise ValueError(f"unknown collection {collection!r}; expected one of {', '.join(COLLECTIONS)}")
    sizes = {"train": 10_000, "validation": 500, "test": 1000, **(sizes or {})}
    chosen = _chosen(row, tasks)
    library = _library()
    check_can_write(output)
    if copies is None and (why := unreached()) is not None:
        raise ConnectionError(f"the hub cannot be reached ({why}): {WITHOUT}; HF_HUB_OFFLINE=1 goes by the cache alone")
    if not progress:
        library.disable_progress_bars()
    with _reached():
        configurations = _configurations(library, chosen, copies)
    for name in tqdm(chosen, desc=collection, unit="task", disable=not progress):
        source, found = chosen[name], configurations[name]
        drawn = {"path": source.path, "configurations": found, "sizes": sizes, "seed": seed}
        folder = Path(output) / name
        if (already := _already(folder, drawn)) is not None:
            yield already
            continue
        with _reached():
            parts = _load(library, source, found, copies, sizes, random.Random(seed))
        if not parts["test"]:
            raise ValueError(f"{source.path}: no row of {', '.join(found)} can be used for task {name}")
        yield _write(folder, name, row.part, source, parts, drawn)


def _chosen(collection: Collection, tasks: Sequence[str] | None) -> dict[str, Source]:
    if tasks is None:
        return dict(collection.tasks)
    every = {**collection.tasks, **collection.optional}
    unknown = [name for name in tasks if name not in every]
    if unknown:
        near = [match for name in unknown for match in get_close_matches(name, every, 1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"no task {', '.join(unknown)} among {', '.join(every)}{hint}")
    return {name: every[name] for name in tasks}


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('fetching tasks needs datasets: pip install "moerge_ext[tasks]"') from error
    return datasets


@contextmanager
def _reached() -> Iterator[None]:
    """A hub that cannot be reached inside is an error that says what to do without it."""
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"{error}: {WITHOUT}") from error


def _place(source: Source, copies: Path | None) -> str:
    """What `load_dataset` is given: the hub's name, or the folder of a copy."""
    if copies is None:
        return source.path
    folder = Path(copies) / source.path
    if not folder.is_dir():
        raise ValueError(
            f"there is no copy of {source.path} in {folder}: make it with `hf download --repo-type dataset "
            f"{source.path} --local-dir {folder}`"
        )
    return str(folder)


def _configurations(library: Any, chosen: Mapping[str, Source], copies: Path | None) -> dict[str, list[str]]:
    """{task: the configurations of its repository that its pattern matches}; of files the pattern itself."""
    listed: dict[str, list[str]] = {}
    made, missing = {}, []
    for name, source in chosen.items():
        place = _place(source, copies)
        if source.files:
            made[name] = [source.pattern]
            continue
        if place not in listed:
            listed[place] = library.get_dataset_config_names(place)
        found = [c for c in listed[place] if fnmatchcase(c, source.pattern) and not fnmatchcase(c, SCORES)]
        if not found:
            missing.append(f"{name}: {source.path} has no configuration {source.pattern}")
        made[name] = found
    if missing:
        raise ValueError("these tasks are not there; name the others:\n- " + "\n- ".join(missing))
    return made


def _load(
    library: Any,
    source: Source,
    found: Sequence[str],
    copies: Path | None,
    sizes: Mapping[str, int],
    generator: random.Random,
) -> dict[str, list[dict]]:
    """{split: its rows}: the same number of every configuration, no row twice."""
    place = _place(source, copies)
    pools: dict[str, list[dict]] = {"train": [], "test": []}
    share = {split: -(-size // len(found)) for split, size in sizes.items()}
    for configuration in found:
        test = _first_split(library, source, place, configuration, source.test)
        wanted = share["train"] + share["validation"] + (share["test"] if test is None else 0)
        if test is not None:
            pools["test"] += _drawn(source, test, share["test"], generator, configuration)
        train = _first_split(library, source, place, configuration, ("train",) if source.train else ())
        if train is not None:
            pools["train"] += _drawn(source, train, wanted, generator, configuration)
    test, seen = _distinct(pools["test"], set())
    train, _ = _distinct(pools["train"], seen)
    generator.shuffle(test)
    generator.shuffle(train)
    if not test:
        test, train = train[: sizes["test"]], train[sizes["test"] :]
    enough = len(train) >= sizes["train"] + sizes["validation"]
    held = sizes["validation"] if enough else min(sizes["validation"], len(train) // 10)
    return {
        "train": train[held:][: sizes["train"]],
        "validation": train[:held],
        "test": test[: sizes["test"]],
    }


def _first_split(library: Any, source: Source, place: str, configuration: str, splits: Sequence[str]) -> Any:
    """The data set of the first of `splits` that is there, None when none is; its columns are checked."""
    for split in splits:
        if source.files:
            pattern = configuration.format(split=split)
            try:
                data = library.load_dataset(place, data_files={"rows": pattern}, split="rows")
            except FileNotFoundError as error:
                if isinstance(error, library.exceptions.DatasetNotFoundError):
                    raise
                continue
        else:
            if not set(split.split("+")) <= set(library.get_dataset_split_names(place, configuration)):
                continue
            data = library.load_dataset(place, configuration, split=split)
        check_columns(source.layout, list(data.column_names), f"{source.path}, {configuration}, split {split}")
        return data
    return None


def _drawn(source: Source, data: Any, count: int, generator: random.Random, where: str) -> list[dict]:
    """Up to `count` random rows of a data set that can be used."""
    rows: list[dict] = []
    for index in generator.sample(range(len(data)), len(data)):
        if len(rows) == count:
            break
        row = source.layout(data[index])
        if row is not None and (not source.ranked or "choices" in row):
            rows.append({**row, "prompt": where} if source.layout.__name__ == "p3" else row)
    return rows


def _distinct(rows: Sequence[dict], seen: set[tuple[str, str]]) -> tuple[list[dict], set[tuple[str, str]]]:
    """The rows whose input and target are not in `seen` and came once, and what has been seen then."""
    kept, seen = [], set(seen)
    for row in rows:
        key = (row["input"], row["target"])
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept, seen


def _already(folder: Path, drawn: Mapping[str, Any]) -> Fetched | None:
    """What an earlier call wrote there; ValueError when it was drawn otherwise, or is no task of ours."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / META_FILE).is_file():
        if {file.name for file in folder.iterdir()} <= {f"{split}.jsonl" for split in SPLITS}:
            return None  # a call that was cut off
        raise ValueError(f"{folder} holds files that are no task: choose another --output")
    meta = read_json(folder / META_FILE, "a task's meta.json")
    if not isinstance(meta, dict) or meta.get("source") != json.loads(json.dumps(drawn)):
        raise ValueError(f"{folder} holds another task, or one drawn otherwise: remove it, or choose another --output")
    return Fetched(folder, meta["rows"], already=True)


def _write(
    folder: Path, name: str, part: str, source: Source, parts: Mapping[str, list[dict]], drawn: Mapping[str, Any]
) -> Fetched:
    """The task's files, meta.json last: without it there is no task yet."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {split: rows for split in SPLITS if (rows := parts[split])}
    for split, rows in made.items():
        text = "".join(json.dumps({**row, "dataset": name}, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{split}.jsonl", lambda file, text=text: file.write_text(text, encoding="utf-8"))
    ranked = all("choices" in row for split, rows in made.items() if split != "train" for row in rows)
    meta = {
        "task": name,
        "split": part,
        "metric": "rank" if ranked else source.metric,
        "source": drawn,
        "rows": {split: len(rows) for split, rows in made.items()},
    }
    text = json.dumps(meta, indent=1) + "\n"
    write_atomically(folder / META_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    return Fetched(folder, meta["rows"])
