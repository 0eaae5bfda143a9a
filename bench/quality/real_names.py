"""How the tables call their rows."""

from __future__ import annotations

NAMES = {
    "glider (zero-shot)": "glider, zero-shot (the tasks' own instructions)",
    "glider (no writer)": "glider (the query itself)",
    "phatgoose/top_k=1": "phatgoose, k = 1",
    "phatgoose": "phatgoose, k = 2",
    "phatgoose/top_k=3": "phatgoose, k = 3",
    "phatgoose/top_k=none": "phatgoose, all experts",
    "phatgoose/scale=0.2": "phatgoose, a sharper softmax (scale 0.2)",
    "phatgoose/scale=0.01": "phatgoose, a flatter softmax (scale 0.01)",
    "arrow": "arrow, k = 4",
    "arrow_phatgoose": "arrow_phatgoose, k = 2",
    "base/few-shot": "base, with solved examples",
    "glider_softmax_all (zero-shot)": "glider_softmax_all, zero-shot (the tasks' own instructions)",
    "glider_code (zero-shot)": "glider_code, zero-shot (the tasks' own instructions)",
    "glider (zero-shot)/written": "glider, zero-shot (instructions that the base writes)",
    "multitask": "one LoRA of all held-in tasks",
}


def shown_name(row: str) -> str:
    return NAMES.get(row, row)
