"""Which architecture of transformers computes exactly a mixture of the FFNs of dense models, and how it is stored.

    dense           mixture           what is added
    llama, mistral  mixtral
    qwen2           qwen2_moe         its shared expert, with weights of 0: it adds 0, and its gradients are 0
    qwen3           qwen3_moe
    olmo2           flex_olmo

All compute y = sum over the top_k of softmax over these (W_router x)_e FFN_e(x), and the rest as the dense model does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_FFN = re.compile(r"(?P<layer>model\.layers\.\d+)\.mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
_OF_THE_FILE = ("model_type", "architectures", "transformers_version", "_name_or_path")
SHARED_WIDTH = 64  # of a shared expert that adds nothing
Added = Iterator[tuple[str, tuple[int, ...]]]


def _nothing(layer: str, config: Any) -> Added:
    return iter(())


def _silent_shared_expert(layer: str, config: Any) -> Added:
    """The tensors of zeros of one layer: (key, shape)."""
    width = config.hidden_size
    yield f"{layer}.mlp.shared_expert_gate.weight", (1, width)
    yield f"{layer}.mlp.shared_expert.gate_proj.weight", (SHARED_WIDTH, width)
    yield f"{layer}.mlp.shared_expert.up_proj.weight", (SHARED_WIDTH, width)
    yield f"{layer}.mlp.shared_expert.down_proj.weight", (width, SHARED_WIDTH)


@dataclass(frozen=True)
class Mixture:
    """One architecture of mixtures. The strings are for `format(layer=, expert=, part=)`."""

    model_type: str
    experts: str = "num_experts"  # the config's field of their number
    router: str = "{layer}.mlp.gate.weight"
    expert: str = "{layer}.mlp.experts.{expert}.{part}.weight"
    parts: dict[str, str] = field(default_factory=dict)  # another name of a part of an FFN
    settings: Callable[[Any], dict[str, Any]] = lambda config: {}
    added: Callable[[str, Any], Added] = _nothing

    def key(self, layer: str, expert: int, part: str) -> str:
        """Where a part of an expert's FFN is stored."""
        return self.expert.format(layer=layer, expert=expert, part=self.parts.get(part, part))


def _moe_width(config: Any) -> dict[str, Any]:
    return {"moe_intermediate_size": config.intermediate_size, "norm_topk_prob": True, "decoder_sparse_step": 1}


MIXTRAL = Mixture(
    "mixtral",
    experts="num_local_experts",
    router="{layer}.block_sparse_moe.gate.weight",
    expert="{layer}.block_sparse_moe.experts.{expert}.{part}.weight",
    parts={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    settings=lambda config: {"sliding_window": getattr(config, "sliding_window", None)},
)
MIXTURES: dict[str, Mixture] = {
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "qwen2": Mixture(
        "qwen2_moe",
        settings=lambda config: _moe_width(config) | {"shared_expert_intermediate_size": SHARED_WIDTH},
        added=_silent_shared_expert,
    ),
    "qwen3": Mixture("qwen3_moe", settings=_moe_width),
    "olmo2": Mixture("flex_olmo", settings=lambda config: {"norm_topk_prob": True}),
}
# fields of a dense config whose other values the mixture has no counterpart of, with the one that it has
PLAIN = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
}


def mixture_of(config: Any) -> Mixture:
    """The mixture for a dense config; ValueError for one that has none, and for settings that it could not keep."""
    kind = config.model_type
    if kind not in MIXTURES:
        raise ValueError(
            f"models of type '{kind}' have no mixture in transformers that computes the same; those that have: "
            + ", ".join(f"{dense} -> {mixture.model_type}" for dense, mixture in MIXTURES.items())
        )
    mixture = MIXTURES[kind]
    if odd := [f"{n}={getattr(config, n)!r}" for n, v in PLAIN.get(kind, {}).items() if getattr(config, n, v) != v]:
        raise ValueError(f"{mixture.model_type} cannot keep what this '{kind}' has: {', '.join(odd)}")
    return mixture


def ffn_of(key: str) -> tuple[str, str] | None:
    """(layer, part) of a dense model's key that is of an FFN, such as ("model.layers.3", "up_proj"); else None."""
    match = _FFN.fullmatch(key)
    return None if match is None else (match["layer"], match["part"])


def mixed_config(config: Any, mixture: Mixture, experts: int, top_k: int) -> Any:
    """The mixture's config, with all that it shares with the dense one."""
    from transformers import AutoConfig

    ours = AutoConfig.for_model(mixture.model_type)
    known = ours.to_dict().keys() - set(_OF_THE_FILE)
    kept = {name: value for name, value in config.to_dict().items() if name in known}
    for name in ("head_dim", "dtype"):
        if getattr(config, name, None) is not None:
            kept[name] = getattr(config, name)
    kept |= mixture.settings(config)
    kept |= {mixture.experts: experts, "num_experts_per_tok": top_k, "output_router_logits": False}
    return AutoConfig.for_model(mixture.model_type, **kept)
