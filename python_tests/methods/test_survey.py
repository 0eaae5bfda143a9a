"""The survey's 29 methods and their nine fields: what the rows print is what its infoboxes say."""

from __future__ import annotations

import re
from dataclasses import astuple, fields

import pytest

from moerge_ext.commands.main import main
from moerge_ext.methods import METHODS
from moerge_ext.methods.base import Taxonomy
from moerge_ext.methods.survey import SURVEY
from moerge_ext.methods.table import rows

# read off the infoboxes by hand, in the order of Taxonomy's fields
INFOBOXES = {
    1: "Standard Private Target Step Module Dense Output ID Full",  # AdapterFusion
    2: "Custom Private None Task Model Sparse None OOD Zero-Shot",  # Retrieval of Experts
    3: "Custom Private None Task Model Sparse Parameter OOD Few-Shot",  # AdapterSoup
    4: "Custom Private Target Task Model Sparse Parameter OOD Multiple",  # π-Tuning
    5: "Custom Private Target Example Module Dense Output ID Full",  # MixDA
    6: "Custom Private None Example Model Dense Parameter OOD Zero-Shot",  # Mo'LoRA
    7: "Standard Private Target Task Model Sparse Parameter OOD Few-Shot",  # LoraHub
    8: "Multiple Private None Example Model Sparse None Multiple Zero-Shot",  # Airoboros and LlamaIndex
    9: "Standard Private General Task Model Sparse None OOD Zero-Shot",  # Routing with Benchmark Datasets
    10: "Standard Private General Example Model Sparse None OOD Zero-Shot",  # Zooter
    11: "Custom Private None Step Model Dense Parameter ID Zero-Shot",  # Token-Level Adaptation of LoRA Adapters
    12: "Standard Multiple Multiple Task N/A None Output Multiple Full",  # CALM
    13: "Standard Multiple Multiple Example Module Sparse Multiple OOD Zero-Shot",  # What the Weight?
    14: "Standard Private Multiple Example Model Sparse None OOD Few-Shot",  # Routoo
    15: "Standard Private Target Example Module Dense Parameter Multiple Zero-Shot",  # Weight-Ensembling MoE
    16: "Custom Private None Step Module Sparse Output OOD Zero-Shot",  # PHATGOOSE
    17: "Standard Shared Expert Example Model Sparse Multiple Multiple Full",  # LoraRetriever
    18: "Standard Private Target Step Module Dense Output OOD Few-Shot",  # LoRA-Flow
    19: "Custom Private Target Task Module Dense Output OOD Multiple",  # PEMT
    20: "Custom Private Target Step Model Sparse None ID Full",  # Co-LLM
    21: "Standard Shared Expert Step Module Sparse Output ID Multiple",  # Branch-Train-Mix
    22: "Custom Private None Example Model Dense Parameter ID Zero-Shot",  # Dynamic Adapter Merging
    23: "Standard Private Target Step Module Dense Output Multiple Few-Shot",  # Mixture of LoRA Experts (MoLE)
    24: "Standard Private None Step Module Sparse Parameter OOD Zero-Shot",  # Arrow
    25: "Standard Shared Expert Step Module Sparse Output ID Full",  # MeteoRA
    26: "Standard Shared Expert N/A Module Dense Parameter ID Full",  # PWE MoE
    27: "Standard Private Multiple Example Model Sparse None Multiple Zero-Shot",  # RouteLLM
    28: "Standard Shared Target Example Model Dense Parameter Multiple Full",  # Twin-Merging
    29: "Standard Shared Expert Step Module Dense Parameter Multiple Zero-Shot",  # RAMoLE
}
LONG = {"OOD": "Out-of-Distribution", "ID": "In-Distribution"}
SECTION = {
    "phatgoose": 16, "arrow": 24, "arrow_mttl": 24, "arrow_peft": 24, "arrow_phatgoose": 24, "lorahub": 7,
    "retrieval_task": 2, "adapter_soup": 3, "centroid": 6, "knn": 8, "retrieval": 8, "ask_llm": 8, "token_level": 11,
    "dam": 22, "lora_flow": 18, "mole": 23, "meteora": 25, "ramole": 29, "adapter_fusion": 1, "pi_tuning": 4,
    "we_moe": 15, "pwe_moe": 26, "mixda": 5, "co_llm": 20, "pemt": 19,
}  # fmt: skip


@pytest.mark.parametrize("number", INFOBOXES)
def test_every_value_is_the_surveys(number):
    want = tuple(LONG.get(value, value) for value in INFOBOXES[number].split())
    assert astuple(SURVEY[number].taxonomy) == want and SURVEY[number].name and SURVEY[number].citation


def test_rows_name_their_number_and_print_its_values():
    assert list(SURVEY) == list(range(1, 30))
    printed = {row["name"]: row for row in rows()}
    for name, number in SECTION.items():
        assert METHODS[name].survey == number and printed[name]["survey"] == str(number)
    for name, method in METHODS.items():
        if method.survey is not None:
            assert tuple(printed[name]["taxonomy"].values()) == astuple(SURVEY[method.survey].taxonomy), name
        else:
            assert printed[name]["survey"] == "-"
    ours = {"average_activation", "average_activation_mttl", "merged", "merged_factors", "given"}
    assert not any(METHODS[name].survey for name in ours | {name for name in METHODS if name.startswith("glider")})


def test_the_rows_cover_the_survey():
    """12, CALM, and 21, Branch-Train-Mix, are no routers over LoRA."""
    assert set(SURVEY) - {method.survey for method in METHODS.values()} <= {12, 21}


def test_the_command_prints_section_fields_and_departures(capsys):
    assert main(["methods", "-v"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("dam ") and "22" in line)
    assert " ".join(line.split()) == "dam 22 Custom Private None Example Model Dense Parameter ID Zero-Shot"
    assert "OOD: Out-of-Distribution, ID: In-Distribution" in text
    assert "differs: keeps 2 experts at T = 0.01 as the published script does" in text


def test_what_a_row_does_otherwise_is_said():
    """Where the fields of the row itself are not those of the survey, `differs` is not empty."""
    for name, method in METHODS.items():
        if method.survey is None:
            continue
        taxonomy = method.taxonomy
        all_experts = method.routing is not None and method.routing.top_k is None and method.options.get("keep") is None
        other = taxonomy.aggregation == "Parameter" and method.aggregation == "output"
        other |= taxonomy.selection == "Dense" and not all_experts
        assert method.differs or not other, name


def test_the_infoboxes_of_the_text(shared):
    text = (shared / "seeds" / "survey.txt").read_text(encoding="utf-8")
    heads = [(m.start(), int(m[1])) for m in re.finditer(r"^3\.(\d+) ?\S.*$", text, re.MULTILINE)]
    labels = "Expert Training|Expert Data|Routing Dataset|Input Granularity|Depth Granularity|Expert Selection|Expert "
    labels += "Aggregation|Generalization|User Dataset"
    found = {}
    for box in re.finditer(r"^Expert Training: \w.*\n.*\n.*$", text, re.MULTILINE):
        number = [n for start, n in heads if start < box.start()][-1]
        found[number] = tuple(re.findall(rf"(?:{labels}): ([\w/-]+)", box[0]))
    assert found == {n: astuple(method.taxonomy) for n, method in SURVEY.items()}
    assert len(fields(Taxonomy)) == 9
