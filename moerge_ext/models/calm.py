"""CALM as a model of transformers: an anchor and an augmenting model, both frozen, with cross attention between them.

A folder holds the cross attention alone, the names of the two models and digests of their weights; `register` makes
transformers' Auto classes know it, which `load_model` has done.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..files.hub import model_options
from .cross_attention import CompositionCache, CrossAttention, decoder_layers, evenly, seen_positions
from .stored import COMPOSITION, WEIGHTS, digest_of


class CalmConfig(PreTrainedConfig):
    """anchor, augmenting: folders or hub ids; *_digest: `digest_of` them; connections: [[anchor's layer, augmenting's
    layer]]; heads: of every connection. The other fields are the anchor's."""

    model_type = COMPOSITION

    def __init__(
        self,
        anchor: str = "",
        augmenting: str = "",
        anchor_digest: str = "",
        augmenting_digest: str = "",
        connections: Sequence[Sequence[int]] = (),
        heads: int = 1,
        **kwargs: Any,
    ):
        self.anchor, self.augmenting = anchor, augmenting
        self.anchor_digest, self.augmenting_digest = anchor_digest, augmenting_digest
        self.connections, self.heads = [list(pair) for pair in connections], heads
        super().__init__(**kwargs)


class CalmForCausalLM(PreTrainedModel, GenerationMixin):
    """The composition. `anchor`, `augmenting`: the two models; `cross`: one `CrossAttention` per connection.

    The augmenting model reads the same tokens first; behind every connected layer of the anchor its hidden states are
    attended to. Generation caches the keys and values of all three.
    """

    config_class = CalmConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: CalmConfig, anchor: PreTrainedModel, augmenting: PreTrainedModel):
        super().__init__(config)
        self.anchor, self.augmenting = anchor.requires_grad_(False), augmenting.requires_grad_(False)
        widths = augmenting.config.get_text_config().hidden_size, anchor.config.get_text_config().hidden_size
        self.cross = nn.ModuleList(CrossAttention(*widths, config.heads) for _ in config.connections)
        self.generation_config = anchor.generation_config
        self._reads_positions = [
            "position_ids" in inspect.signature(model.forward).parameters for model in (anchor, augmenting)
        ]

    @classmethod
    def compose(
        cls,
        anchor: str,
        augmenting: str,
        connections: int | Sequence[Sequence[int]],
        heads: int,
        seed: int,
        dtype: Any,
    ) -> CalmForCausalLM:
        """A composition that begins. ValueError for models and connections that do not fit."""
        models = [_decoder(path, dtype) for path in (anchor, augmenting)]
        depths = [len(decoder_layers(model)) for model in models]
        pairs = evenly(connections, *depths) if isinstance(connections, int) else _checked(connections, depths)
        config = CalmConfig(
            _absolute(anchor), _absolute(augmenting), digest_of(anchor), digest_of(augmenting), pairs, heads,
            **_of_anchor(models),
        )  # fmt: skip
        made = cls(config, *models)
        generator = torch.Generator().manual_seed(seed)
        for cross in made.cross:
            cross.begin(generator)
        return made.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CompositionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [N,T], attention_mask [N,T'] over all tokens so far -> the anchor's output: loss, logits, cache.

        ValueError for another cache than this model's own, and a mask of another shape.
        """
        cache = past_key_values
        if cache is None and use_cache:
            caches = (DynamicCache(config=model.config) for model in (self.anchor, self.augmenting))
            cache = CompositionCache(*caches, len(self.cross))
        if cache is not None and not isinstance(cache, CompositionCache):
            raise ValueError(f"expected the cache that a composition returns, got {type(cache).__name__}")
        past = 0 if cache is None else cache.get_seq_length()
        mask = seen_positions(input_ids.shape[1], past, attention_mask, len(input_ids), input_ids.device)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": cache is not None}
        states = self._augmented({**given, **self._positions(1, position_ids)}, cache)
        with ExitStack() as stack:
            layers = decoder_layers(self.anchor)
            for index, (layer, _) in enumerate(self.config.connections):
                hook = _Adding(self.cross[index], states[index], mask, cache and cache.cross, index)
                stack.callback(layers[layer].register_forward_hook(hook).remove)
            out = self.anchor(
                **given, **self._positions(0, position_ids), past_key_values=cache and cache.anchor, labels=labels,
                logits_to_keep=logits_to_keep, **{k: v for k, v in kwargs.items() if k != "return_dict"},
            )  # fmt: skip
        if cache is not None:
            out["past_key_values"] = cache
        return out

    @torch.no_grad()
    def _augmented(self, given: Mapping[str, Any], cache: CompositionCache | None) -> list[Tensor]:
        """The augmenting model's hidden states [N,T,D_A] behind its connected layers."""
        states: dict[int, Tensor] = {}
        with ExitStack() as stack:
            layers = decoder_layers(self.augmenting)
            for _, layer in self.config.connections:
                stack.callback(layers[layer].register_forward_hook(_Keeping(states, layer)).remove)
            self.augmenting.base_model(**given, past_key_values=cache and cache.augmenting)
        return [states[layer] for _, layer in self.config.connections]

    def _positions(self, index: int, position_ids: Tensor | None) -> dict[str, Tensor]:
        there = position_ids is not None and self._reads_positions[index]
        return {"position_ids": position_ids} if there else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.anchor.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.anchor.get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes one that fits

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained: {name: parameter}."""
        return {name: p for name, p in self.named_parameters() if name.startswith("cross.")}

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, metadata: Mapping[str, str] | None = None, **_: Any
    ) -> None:
        """The cross attention, config and generation config; neither model. metadata: of the weights' header."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.trained().items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt", **(metadata or {})})
        self.config.architectures = [type(self).__name__]
        self.generation_config.save_pretrained(folder)
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        anchor: str | None = None,
        augmenting: str | None = None,
        config: CalmConfig | None = None,
        dtype: Any = "auto",
        **kwargs: Any,
    ) -> CalmForCausalLM:
        """The composition of a folder. anchor, augmenting: where the models lie, where that is elsewhere than noted.

        ValueError for models that are others than those it was trained with, and weights that do not fit.
        """
        if asked := [name for name in ("device_map", "quantization_config") if kwargs.get(name) is not None]:
            raise ValueError(f"a composition takes no {', '.join(asked)}: load it and move it with .to(device)")
        folder = Path(pretrained_model_name_or_path)
        config = config or CalmConfig.from_pretrained(folder)
        models = []
        for role, path in (("anchor", anchor), ("augmenting", augmenting)):
            if path is not None:
                setattr(config, role, _absolute(os.fspath(path)))
            path = getattr(config, role)
            try:
                digest = digest_of(path)
            except ValueError as error:
                raise ValueError(
                    f"{folder}: its {role} model cannot be read: {error}; say where it is (from_pretrained(..., "
                    f"{role}=DIR), or {role} in its config.json)"
                ) from error
            if digest != getattr(config, f"{role}_digest"):
                raise ValueError(f"{folder} was trained with another {role} model than what lies in {path!r} today")
            models.append(_decoder(path, dtype))
        made = cls(config, *models)
        made._read(folder)
        if (folder / "generation_config.json").is_file():
            made.generation_config = GenerationConfig.from_pretrained(folder)
        return made.eval()

    def _read(self, folder: Path) -> None:
        tensors, parameters = load_file(folder / WEIGHTS), self.trained()
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: list(p.shape) for name, p in parameters.items()}
        if found != wanted:
            odd = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
            said = ", ".join(f"{n}: {found.get(n)} (expected {wanted.get(n)})" for n in odd[:3])
            raise ValueError(f"{folder / WEIGHTS} does not fit its config: {said}")
        for name, p in parameters.items():
            p.data = tensors[name]


class _Keeping:
    """A forward hook that keeps a layer's output."""

    def __init__(self, states: dict[int, Tensor], layer: int):
        self.states, self.layer = states, layer

    def __call__(self, layer: nn.Module, args: tuple, out: Any) -> None:
        self.states[self.layer] = out[0] if isinstance(out, tuple) else out


class _Adding:
    """A forward hook that adds a connection's cross attention to a layer's output."""

    def __init__(self, cross: CrossAttention, states: Tensor, mask: Tensor, cache: Any, index: int):
        self.cross, self.states, self.mask, self.cache, self.index = cross, states, mask, cache, index

    def __call__(self, layer: nn.Module, args: tuple, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        states, mask = self.states.to(hidden.device), self.mask.to(hidden.device)
        hidden = hidden + self.cross(hidden, states, mask, self.cache, self.index)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def _decoder(path: str, dtype: Any) -> PreTrainedModel:
    options = model_options(path)
    config = AutoConfig.from_pretrained(path, **options)
    if config.is_encoder_decoder or config.model_type == COMPOSITION:
        raise ValueError(f"{path!r} is of type '{config.model_type}': a composition is of two plain decoders")
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def _checked(connections: Sequence[Sequence[int]], depths: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of layers that are there, each of the anchor's once."""
    pairs = [tuple(pair) for pair in connections]
    right = pairs and all(
        len(pair) == 2 and all(0 <= layer < depth for layer, depth in zip(pair, depths, strict=True)) for pair in pairs
    )
    if not right or len({anchor for anchor, _ in pairs}) != len(pairs):
        raise ValueError(
            f"connections must be pairs (anchor's layer, augmenting's layer) of layers 0 to {depths[0] - 1} and 0 to "
            f"{depths[1] - 1}, each of the anchor's once, got {pairs}"
        )
    return pairs


def _of_anchor(models: Sequence[PreTrainedModel]) -> dict[str, Any]:
    """What others ask of a config: the anchor's, and the context that both have."""
    config = models[0].config.get_text_config()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id")
    contexts = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    known = [context for context in contexts if context]
    more = {"max_position_embeddings": min(known)} if known else {}
    return {name: getattr(config, name, None) for name in names} | more


def _absolute(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def register() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know the folders of compositions."""
    AutoConfig.register(COMPOSITION, CalmConfig, exist_ok=True)
    AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM, exist_ok=True)
