"""Examples from JSON lines files: what training, evaluation and ensembles read."""

from __future__ import annotations

import json
from pathlib import Path

MAX_LISTED = 20  # bad lines that are shown
FORMS = (("input", "target"), ("text",))


def read_rows(path: Path, *, text: bool = False) -> list[dict]:
    """The rows {"input": str, "target": str, ...} of a file, with `text` also {"text": str}.

    One ValueError for a file that is not there or has no rows, or with every bad line.
    """
    forms = FORMS if text else FORMS[:1]
    expected = " or ".join("{" + ", ".join(f'"{key}": str' for key in keys) + "}" for keys in forms)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected JSON lines {expected}")
    rows, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        if isinstance(row, dict) and any(all(isinstance(row.get(key), str) for key in keys) for keys in forms):
            rows.append(row)
        else:
            problems.append(f"line {number}: expected {expected}")
    if not rows and not problems:
        problems.append("the file has no rows")
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems[:MAX_LISTED] + more))
    return rows
