"""The 29 methods of the MoErging survey (Yadav et al. 2024, arXiv 2408.07057) with the nine fields of its infoboxes.

`SURVEY[n]` is the method of section 3.n. The rows of METHODS and of `whole_models.py` that are one name their n and
have its taxonomy, also where they depart from its paper: their `differs` says in what. "Multiple" and "N/A" are the
survey's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Taxonomy

PAPER = "A Survey on Model MoErging, arXiv 2408.07057"


@dataclass(frozen=True)
class Surveyed:
    """One method of the survey: its name there, the work it cites, its infobox."""

    name: str
    citation: str
    taxonomy: Taxonomy


def _as_in(name: str, citation: str, infobox: str) -> Surveyed:
    """`infobox`: the nine values in the order of `Taxonomy`'s fields, the generalization as OOD or ID."""
    long = {"OOD": "Out-of-Distribution", "ID": "In-Distribution"}
    return Surveyed(name, citation, Taxonomy(*(long.get(value, value) for value in infobox.split())))


# training, data, routing dataset, input granularity, depth, selection, aggregation, generalization, user dataset
SURVEY: dict[int, Surveyed] = {
    1: _as_in("AdapterFusion", "Pfeiffer et al. 2021", "Standard Private Target Step Module Dense Output ID Full"),
    2: _as_in("Retrieval of Experts", "Jang et al. 2023", "Custom Private None Task Model Sparse None OOD Zero-Shot"),
    3: _as_in(
        "AdapterSoup", "Chronopoulou et al. 2023", "Custom Private None Task Model Sparse Parameter OOD Few-Shot"
    ),
    4: _as_in("π-Tuning", "Wu et al. 2023", "Custom Private Target Task Model Sparse Parameter OOD Multiple"),
    5: _as_in("MixDA", "Diao et al. 2023", "Custom Private Target Example Module Dense Output ID Full"),
    6: _as_in("Mo'LoRA", "Maxine 2023", "Custom Private None Example Model Dense Parameter OOD Zero-Shot"),
    7: _as_in("LoraHub", "Huang et al. 2024", "Standard Private Target Task Model Sparse Parameter OOD Few-Shot"),
    8: _as_in(
        "Airoboros and LlamaIndex",
        "Durbin 2024; Liu 2024",
        "Multiple Private None Example Model Sparse None Multiple Zero-Shot",
    ),
    9: _as_in(
        "Routing with Benchmark Datasets",
        "Shnitzer et al. 2023",
        "Standard Private General Task Model Sparse None OOD Zero-Shot",
    ),
    10: _as_in("Zooter", "Lu et al. 2023a", "Standard Private General Example Model Sparse None OOD Zero-Shot"),
    11: _as_in(
        "Token-Level Adaptation of LoRA Adapters",
        "Belofsky 2023",
        "Custom Private None Step Model Dense Parameter ID Zero-Shot",
    ),
    12: _as_in("CALM", "Bansal et al. 2024", "Standard Multiple Multiple Task N/A None Output Multiple Full"),
    13: _as_in(
        "What the Weight?",
        "Holtermann et al. 2024",
        "Standard Multiple Multiple Example Module Sparse Multiple OOD Zero-Shot",
    ),
    14: _as_in(
        "Routoo", "Mohammadshahi et al. 2024", "Standard Private Multiple Example Model Sparse None OOD Few-Shot"
    ),
    15: _as_in(
        "Weight-Ensembling MoE",
        "Tang et al. 2024c",
        "Standard Private Target Example Module Dense Parameter Multiple Zero-Shot",
    ),
    16: _as_in("PHATGOOSE", "Muqeeth et al. 2024", "Custom Private None Step Module Sparse Output OOD Zero-Shot"),
    17: _as_in(
        "LoraRetriever", "Zhao et al. 2024b", "Standard Shared Expert Example Model Sparse Multiple Multiple Full"
    ),
    18: _as_in("LoRA-Flow", "Wang et al. 2024", "Standard Private Target Step Module Dense Output OOD Few-Shot"),
    19: _as_in("PEMT", "Lin et al. 2024", "Custom Private Target Task Module Dense Output OOD Multiple"),
    20: _as_in("Co-LLM", "Shen et al. 2024", "Custom Private Target Step Model Sparse None ID Full"),
    21: _as_in(
        "Branch-Train-Mix", "Sukhbaatar et al. 2024", "Standard Shared Expert Step Module Sparse Output ID Multiple"
    ),
    22: _as_in(
        "Dynamic Adapter Merging", "Cheng et al. 2024", "Custom Private None Example Model Dense Parameter ID Zero-Shot"
    ),
    23: _as_in("MoLE", "Wu et al. 2024", "Standard Private Target Step Module Dense Output Multiple Few-Shot"),
    24: _as_in("Arrow", "Ostapenko et al. 2024", "Standard Private None Step Module Sparse Parameter OOD Zero-Shot"),
    25: _as_in("MeteoRA", "Xu et al. 2024", "Standard Shared Expert Step Module Sparse Output ID Full"),
    26: _as_in("PWE MoE", "Tang et al. 2024b", "Standard Shared Expert N/A Module Dense Parameter ID Full"),
    27: _as_in("RouteLLM", "Ong et al. 2024", "Standard Private Multiple Example Model Sparse None Multiple Zero-Shot"),
    28: _as_in("Twin-Merging", "Lu et al. 2024", "Standard Shared Target Example Model Dense Parameter Multiple Full"),
    29: _as_in("RAMoLE", "Zhao et al. 2024a", "Standard Shared Expert Step Module Dense Parameter Multiple Zero-Shot"),
}
