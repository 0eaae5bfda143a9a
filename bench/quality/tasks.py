"""What the quality table is made of; `data` is a folder with base_lm/ and tasks/ (see README.md)."""

from __future__ import annotations

import re
from pathlib import Path

TEMPLATE = "{input}\n"
HELD_IN = (
    "babi_qa01_one_fact",
    "babi_qa06_yesno",
    "babi_qa15_deduction",
    "blimp_morphology",
    "clinc_banking",
    "clinc_home",
    "clinc_kitchen_and_dining",
    "clinc_travel",
    "query_wellformed",
    "snips_AddToPlaylist",
)
HELD_OUT = (
    "babi_qa02_two_facts",
    "babi_qa12_conjunction",
    "clinc_credit_cards",
    "clinc_work",
    "snips_SearchCreativeWork",
)


def base(data: Path) -> Path:
    return data / "base_lm" / "stories260K" / "hf"


def folders(data: Path) -> list[Path]:
    """The task folders, held-in first."""
    return [data / "tasks" / "train" / name for name in HELD_IN] + [
        data / "tasks" / "heldout" / name for name in HELD_OUT
    ]


def fill(name: str, text: str) -> None:
    """Replace the block `name` of this folder's README.md."""
    readme = Path(__file__).parent / "README.md"
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    whole, count = block.subn(lambda m: f"{m[1]}{text}\n\n{m[2]}", readme.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{readme} must have one block '{name}', it has {count}")
    readme.write_text(whole, encoding="utf-8")
