"""The model card (README.md) of an expert on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..experts.formats.peft import AdapterHeader
from ..experts.gates import GateSet
from ..experts.kinds import AVERAGE_ACTIVATION, INSTRUCTION, SIGMOID_GATE
from ..files.counting import counted

TAGS = ("moerge", "lora", "mixture-of-experts")
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
_EMPTY_TITLE = re.compile(
    r"\A(---\n.*?\n---\s*)?(<!--.*?-->\s*)?# Model Card for Model ID\s*$", re.DOTALL | re.MULTILINE
)
_METHODS = {
    SIGMOID_GATE: "a trained gate per layer, for `phatgoose` and, with the description, `glider`",
    AVERAGE_ACTIVATION: "the mean input of every layer, for `average_activation`",
    INSTRUCTION: "the task's description, embedded, for `glider`",
}


def is_untouched(text: str) -> bool:
    """Whether a README.md is the card that PEFT writes beside an adapter, with nothing filled in."""
    return _EMPTY_TITLE.search(text) is not None


def card(
    header: AdapterHeader,
    repo_id: str,
    base: str | None,
    embedders: list[str],
    prompts: list[str],
    revision: str | None,
) -> str:
    """The card's text, its metadata in front. base: the base model's id on the hub."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        library_name="peft",
        tags=list(TAGS),
        pipeline_tag=PIPELINES.get(str(header.config.get("task_type"))),
    )
    ranks = sorted({module.rank for module in header.modules.values()})
    span = "-".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))
    where = f"{repo_id}@{revision}" if revision else repo_id
    peft_revision = f', revision="{revision}"' if revision else ""
    name = base or "the base model"
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {header.name}\n",
        f"A LoRA expert for {name}: rank {span} on {counted(len(header.modules), 'module')}.",
        *_beside(header.gates, embedders, prompts),
        "\n## Use\n",
        "```python",
        "import moerge_ext as moerge",
        "from transformers import AutoModelForCausalLM\n",
        f'model = AutoModelForCausalLM.from_pretrained("{base or "path/to/base"}")',
        f'experts = moerge.load_experts(["{where}", "another/expert"])',
        f'handle = moerge.patch(model, experts, method="{_method(header.gates)}", top_k=2)',
        "```\n",
        f'It is a normal PEFT adapter as well: `PeftModel.from_pretrained(model, "{repo_id}"{peft_revision})`.',
        "`moerge_manifest.json` holds the SHA-256 of every file.\n",
    ]
    return "\n".join(lines)


def _beside(gates: Mapping[str, GateSet], embedders: list[str], prompts: list[str]) -> list[str]:
    """What lies beside the adapter, as a list."""
    said = [f"- `{kind}`: {_METHODS.get(kind, 'gates')}" for kind in gates]
    said += [f"- embedded examples of its data, by `{name}`, for `retrieval` and its kin" for name in embedders]
    if not said:
        said = ["- nothing: `arrow` and the merges need nothing"]
    text = gates[INSTRUCTION].metadata.get("instruction") if INSTRUCTION in gates else None
    described = [f"\nWhat it is for: {_plain(text)}"] if text else []
    trained = [f"\nTrained with: `{_plain(form)}`" for form in prompts]
    return ["\nBeside the adapter:\n", *said, *described, *trained]


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").replace("<", "&lt;").split())


def _method(gates: Mapping[str, GateSet]) -> str:
    if SIGMOID_GATE in gates:
        return "phatgoose"
    return "average_activation" if AVERAGE_ACTIVATION in gates else "arrow"
