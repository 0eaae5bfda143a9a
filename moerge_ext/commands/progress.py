"""--no-progress: no bar, neither this package's nor that of a library that works for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument("--no-progress", action="store_true", help="no progress bar, of no library either")


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """A block in which progress bars are shown, or none is.

    Every library used here draws its bars with tqdm (transformers, huggingface_hub, datasets, sentence-transformers),
    and their own switches reach only some of them: transformers' leaves those of GGUF files.
    """
    if shown:
        yield
        return
    from tqdm import tqdm

    begin = tqdm.__init__

    def begin_hidden(self: tqdm, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs | {"disable": True})

    tqdm.__init__ = begin_hidden
    try:
        yield
    finally:
        tqdm.__init__ = begin
