"""Where the package keeps what can be made again."""

import os
from pathlib import Path


def default_folder() -> Path:
    """$MOERGE_CACHE, or moerge_ext in the user's cache folder."""
    if os.environ.get("MOERGE_CACHE"):
        return Path(os.environ["MOERGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moerge_ext"
