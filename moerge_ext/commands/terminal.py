"""The console of the commands' tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(width: int = 160, *, stderr: bool = False) -> Console:
    """rich's console; `width` where it writes into no terminal. A reader who has gone away is told to `main`."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 (rich calls it where it has caught a BrokenPipeError)

    made = Plain(stderr=stderr)
    return made if made.is_terminal else Plain(width=width, stderr=stderr)
