"""Modules of an expert that get no gate, because training or averaging never reached them."""

from __future__ import annotations

import warnings
from collections.abc import Collection

NOT_REACHED = "they did not run on this data, or the loss does not depend on them"
MAX_NAMED = 20  # modules that a warning or an error names


def warn_of_left_out(name: str, paths: Collection[str], total: int) -> None:
    """One warning for the modules of an expert that get no gate; none when there are none."""
    if not paths:
        return
    shown = ", ".join(sorted(paths)[:MAX_NAMED])
    more = f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    warnings.warn(
        f"no gate is written for {len(paths)} of {total} modules of '{name}', and patch masks the expert there, "
        f"because {NOT_REACHED}: {shown}{more}",
        stacklevel=3,
    )
