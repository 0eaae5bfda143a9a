"""Many problems in few lines: what is wrong in the same way in many places is said once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .counting import counted

NAMED = 3  # places named of those with one problem
# "expert 'a' (folder): file.safetensors: " + the place + what is wrong with it
_PROBLEM = re.compile(
    r"(?P<start>(?:expert '[^'\n]*'(?: \([^()\n]*\))?[:,] )?(?:[^\s:]+\.safetensors: )?)"
    r"(?P<place>[^\s:']+:|'[^'\n]+') (?P<said>.*)",
    re.DOTALL,
)


def grouped(problems: Sequence[str]) -> list[str]:
    """One line for each cause, in the order of their first; the first three places that have it are named."""
    causes: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        match = _PROBLEM.fullmatch(problem)
        if match is None:
            causes.setdefault((problem, "", ""), [])
        else:
            place = match["place"]
            colon = ":" if place.endswith(":") else ""
            causes.setdefault((match["start"], colon, match["said"]), []).append(place.removesuffix(":"))
    lines = []
    for (start, colon, said), places in causes.items():
        beyond = len(places) - NAMED
        more = f" ({counted(beyond, 'more problem')} like this)" if beyond > 0 else ""
        lines.append(f"{start}{', '.join(places[:NAMED])}{colon} {said}{more}" if places else start)
    return lines


def listed(names: Sequence[str], what: str = "") -> str:
    """a, b, c and 5 more; `what` is what one name is of."""
    beyond = len(names) - NAMED
    more = f" and {counted(beyond, f'more {what}') if what else f'{beyond} more'}" if beyond > 0 else ""
    return ", ".join(names[:NAMED]) + more


def at_rows(numbers: Sequence[int]) -> str:
    """Where in a list of rows something is; their numbers are those of Python and of the answers' files."""
    return f"row{'s' * (len(numbers) > 1)} {listed([str(n) for n in numbers])} (from 0)"
