"""What a run has made is not replaced without a word."""

from __future__ import annotations

import os
from pathlib import Path


def check_replaced(file: str | os.PathLike, what: str = "", *, overwrite: bool | None = False) -> None:
    """ValueError where `file`, the result of a run that was finished, would be replaced and nobody said `overwrite`.

    what: more about the result that is there, after a comma; overwrite None: it is never replaced.
    """
    if overwrite or not os.path.lexists(file):
        return
    ways = ["name another folder (--output)"]
    if overwrite is not None:
        ways.insert(0, "pass overwrite=True (--overwrite) to replace it")
    raise ValueError(f"{Path(file)} is there already{what and f', {what}'}: {', or '.join(ways)}")
