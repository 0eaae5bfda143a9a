"""Messages as the shell shows them: what the library says in Python is said in flags, and a warning is one line.

A message that is the commands' as well as Python's names both, as in "resume=True (--resume)", of which the flag is
kept; ways out that many messages share are in the table.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

FUNCTIONS = (
    "load_experts|patch|add_expert|drop_expert|save_gates|convert_to_lora|train_routers|train_mix|ExpertBank|ModuleBank"
)
OTHERS = "(--names NAME ... loads the others without them)"
# what a message says: what the shell says; in this order
WORDS = (
    # what a message of a function begins with; an argument that is at fault comes next
    (r"(?m)(^|: )load_experts: (rename|modules|names|gates)\b", r"\1--\2"),
    (r"(?m)(^|: )load_experts: (?=no expert named)", r"\1--names: "),
    (r"(?m)(^|: )train_mix: (?=train |balance )", r"\1--"),
    (rf"(?m)(^|: )(?:{FUNCTIONS}): ", r"\1"),
    # both are named: an argument with its value, or by its name alone
    (r"\b(?:[a-z_]+=(?:[\w.\"']+|\{[^{}]*\}|\[[^][]*\])|[a-z]+_[a-z_]+) \((--[a-z][^():;]*)\)", r"\1"),
    (r"\b([a-z]+) \((--\1\b[^():;]*)\)", r"\2"),
    (r"\((?:output_dir|base_model=ID), (--[a-z][^()]*)\)", r"(\1)"),
    (r"load_experts\(\.\.\., gates=\{name: DIR\}\) or --gates", "--gates"),
    (r"(`moerge [^`]+`) or moerge_ext\.\w+\([^()]*\)", r"\1"),
    (r"moerge_ext\.\w+ \((moerge [^()]+)\)", r"`\1`"),
    (r"\(names=\[\.\.\.\] loads the others without them\)", OTHERS),
    (r"(?:load_experts\(\.\.\., )?names=\[\.\.\.\]\)?", "--names"),
    (r"load_experts\(\.\.\., modules=\.\.\.\) --modules", "--modules PATTERN"),
    (r"load_experts\(\.\.\., modules=('[^']*')\) \(--modules \1\)", r"--modules \1"),
    (r"pass load_experts\(\.\.\., base=\) the base model", "pass --model, the base model"),
    (r"load_experts\(\.\.\., modules=\.\.\.\)", "--modules PATTERN"),
    (r"\bmodules=\.\.\.", "--modules"),
    (r"load_experts\(\.\.\., rename=\{'?([^':}]*)'?: '?([^'}]*)'?\}\)", r"--rename \1=\2"),
    (r"pass \{name: path\} to name them apart", "name one of them, --experts NAME=DIR"),
    (r"name them, \{name: path\}", "name them, NAME=DIR"),
    (r"load_experts\(\{name: path\}\) gives names", "--experts NAME=DIR gives names"),
    (r"patch\(\.\.\., missing=\"drop\"\)", "--missing drop"),
    (r"patch\(\.\.\., backend=\"reference\"\)|\bbackend=\"reference\"", "--backend reference"),
    (r"\babsent=\"base\"", "--absent base"),
    (r"(?:load_experts\(\.\.\., )?\bdtype=torch\.(\w+)\)?", r"--expert-dtype \1"),
    (r"\bjoint=True\b", "--joint"),
    (r"\btexts=True\b", "--index-texts"),
    (r"\bpass resume=False\b", "leave out --resume"),
    (r"pass top_k=(\d+), or None for all", r"pass --top-k \1, or all"),
    (r"call calibrate_threshold\([^()]*\), or pass threshold=\.\.\.", "pass --calibrate DIR, or the option threshold"),
    (r"\b(\w+)=\"(\w+)\"", r"\1=\2"),  # an option of a method
    (r"Leave `with handle\.disabled\(\):`, and choose", "Choose"),
    (
        r"(?<![\w-])(lr|steps|epochs|accumulate|rank|alpha|balance|z|sparsity|dropout|samples|seed|limit|count) must",
        r"--\1 must",
    ),
    (r"(--(?:rank|max-error) must be [^;,\n]*?) or None\b", r"\1"),  # an option is left out
    (r"\bTrue or False\b", "true or false"),
    (r"(?<!')\bNone\b(?!')", "none"),
)

NO_FLAGS = ("repo_id", "top_k")  # a place, and what is set by --option as well


def said(text: str, names: Iterable[str] = ()) -> str:
    """The message in the words of the shell. names: of the command's arguments, such as batch_size of --batch-size."""
    names = set(names)
    for pattern, words in WORDS:
        text = re.sub(pattern, words, text)
    if names and "names" not in names:  # a hint at an option that the command has not
        text = text.replace(f"\n{OTHERS}", "")
    if names and "calibrate" not in names:
        found = "(`moerge eval --calibrate DIR` finds one)"
        option = "--option threshold=T" if "option" in names else "the option threshold"
        text = text.replace("pass --calibrate DIR, or the option threshold", f"pass {option} {found}")
    if names and "routers" not in names:  # a command without --routers takes them as an option of the method
        text = text.replace("--routers FILE", "--option routers=FILE")
    if found := sorted(name for name in names if "_" in name and name not in NO_FLAGS):
        bare = rf"(?<![\w/.'\"`{{-])(?:{'|'.join(found)})(?![\w.'\"`(-])"
        text = re.sub(bare, lambda match: f"--{match[0].replace('_', '-')}", text)
    return text


def _begun(text: str) -> str:
    """The text of a warning; a list whose head was a function's name as one line, or under a head of its own."""
    if not text.startswith("\n"):
        return text
    return text.strip().removeprefix("- ") if text.count("\n") == 1 else f"of the experts:{text}"


@contextmanager
def plain_warnings(names: Iterable[str] = ()) -> Iterator[None]:
    """A block whose warnings are printed as "warning: ...", without the line of code that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {_begun(said(str(message), names))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
