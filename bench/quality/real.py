"""What the table on SmolLM2-135M-Instruct is made of: the base, the tasks, how they are put, where everything lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moerge_ext.evaluation.runs import MULTITASK
from moerge_ext.files.rows import read_rows
from moerge_ext.models import smollm2
from moerge_ext.models.prompt import PromptFormat

TEMPLATE = "{instruction}\n{input}\n"
FEW_SHOT_TEMPLATE = "{instruction}\n{shots}{input}\n"
FORM = PromptFormat(TEMPLATE)
EMBEDDER = "all-MiniLM-L6-v2"
# In the order in which they join the pool: 4, 8 and all 16 are its sizes.
HELD_IN = (
    "clinc_banking", "babi_qa01_one_fact", "name_language", "clinc_home",
    "snips_AddToPlaylist", "clinc_travel", "query_wellformed", "nl_regex",
    "babi_qa06_yesno", "blimp_morphology", "snips_BookRestaurant", "scan_simple",
    "babi_qa15_deduction", "clinc_kitchen_and_dining", "django_code", "babi_qa16_induction",
)  # fmt: skip
# Join them in the largest pool, which is asked the held-out tasks alone: all there are but those set aside.
MORE = (
    "clinc_auto_and_commute", "babi_qa07_counting", "snips_GetWeather", "blimp_semantics", "babi_qa20_motivation",
    "g2p_english", "nlg_restaurant", "bbq_age", "wikisql", "cogs", "nlg_tv", "disfl_qa",
)  # fmt: skip
POOL = HELD_IN + MORE
HELD_OUT = (
    "clinc_credit_cards", "babi_qa12_conjunction", "clinc_work", "nl_regex_synth", "snips_SearchCreativeWork",
    "clinc_small_talk", "scan_jump", "snips_SearchScreeningEvent", "bbq_nationality",
)  # fmt: skip
OTHERS = (  # the held-out tasks that are asked by themselves
    "babi_qa02_two_facts", "babi_qa08_lists", "e2e_nlg", "gsm8k", "nlg_hotel", "p2g_english", "sql_advising",
)  # fmt: skip
VARIED = (  # the held-out tasks on which rows are told from chance or, by ROUGE, from each other
    "clinc_credit_cards", "babi_qa12_conjunction", "clinc_work", "clinc_small_talk",
    "babi_qa02_two_facts", "babi_qa08_lists", "e2e_nlg", "nlg_hotel",
)  # fmt: skip
SET_ASIDE = ("clinc_utility", "snips_RateBook")  # the recipe was chosen on these; no expert of the pool is made of them
OTHER_GATES = "gates-{}"  # folder of the experts with gates of so many steps: 30, or 30x16 in batches of 16
EXPERTS, OTHER_RATE = "experts", "experts-lr-{}"  # folders of experts: the recipe's, and at another rate
CHOICES = 4  # of a held-out intent: the right one and three others, drawn once
FEW_CHOICES = 3  # a task with at most so many answers is one of choices
CLOSED = 32  # distinct answers of a closed set


@dataclass(frozen=True)
class Recipe:
    """How an expert and its gates are made."""

    rank: int = 16
    alpha: float = 1.0
    lr: float = 5e-3
    steps: int = 48
    batch_size: int = 8
    gate_lr: float = 5e-3
    gate_steps: int = 48
    gate_batch_size: int = 4


@dataclass(frozen=True)
class Places:
    """data: holds tasks/{train,heldout}; cache: everything that is made, outside it; experts: their folder in there."""

    data: Path
    cache: Path
    experts: str = EXPERTS

    def expert(self, name: str) -> Path:
        return self.cache / self.experts / name

    def multitask(self) -> Path:
        return self.cache / "multitask" / MULTITASK

    def routers(self, method: str) -> Path:
        return self.cache / "routers" / method

    def source(self, name: str) -> Path:
        part = "heldout" if name in HELD_OUT + OTHERS else "train"
        return self.data / "tasks" / part / name

    def instruction(self, name: str) -> str:
        return json.loads((self.source(name) / "meta.json").read_text(encoding="utf-8"))["instruction"]

    def rows(self, name: str, split: str) -> list[dict]:
        instruction = self.instruction(name)
        return [{**row, "instruction": instruction} for row in read_rows(self.source(name) / f"{split}.jsonl")]


def load_base(places: Places) -> tuple[nn.Module, Any]:
    """(model in bfloat16, tokenizer). LoRA and gates are float32 over it."""
    return smollm2.load("bfloat16", places.cache)
