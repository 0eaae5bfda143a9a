"""Options that take folders, some or all of them with a name: [NAME=]DIR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def split_name(text: str) -> tuple[str | None, str]:
    """(name, folder) of NAME=DIR; (None, text) of a folder alone, which one that is there always is."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or "/" in name or _exists(text):
        return None, text
    return name, folder


def named_dirs(texts: Sequence[str], option: str, name_of: Callable[[str], str]) -> list[str] | dict[str, str]:
    """The folders, or {name: folder} where some have a name; name_of: of those that have none.

    ValueError for a name given twice, and for an empty one or an empty folder.
    """
    pairs = [split_name(text) for text in texts]
    for name, text in pairs:
        if name is None and "" in text.partition("=")[::2] and "=" in text and not _exists(text):
            raise ValueError(f"{option} takes [NAME=]DIR, got {text!r}")
    if all(name is None for name, _ in pairs):
        return list(texts)
    found: dict[str, str] = {}
    for given, folder in pairs:
        name = name_of(folder) if given is None else given
        if name in found:
            raise ValueError(
                f"{option}: {found[name]!r} and {folder!r} are both called {name!r}: name them apart, NAME=DIR"
            )
        found[name] = folder
    return found


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name, no home folder
        return False
