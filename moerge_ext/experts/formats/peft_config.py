"""adapter_config.json of a PEFT LoRA: read as data, checked field by field, never obeyed.

Nothing in the file is imported, downloaded or evaluated. A field is either used, known to be without effect
on the adapter's function, or refused with the reason; a field nobody here knows is accepted only while it is
off.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peft_patterns import MAX_WORK, LayerNumbers, ModuleNames, ModulePattern

MAX_CONFIG_BYTES = 4 << 20
MAX_PATTERN_PAIRS = 50_000_000  # (patterns) x (modules), some seconds of matching

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
show = _short.repr

# Fields without effect on what a stored adapter computes: bookkeeping, training-time choices, and the
# settings of initializations (whether an initialization changed the base is decided by init_lora_weights
# alone).
_INERT = frozenset(
    [
        "task_type",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "peft_version",
        "revision",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
    ]
)
_USED = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "auto_mapping",
        "megatron_core",
        "base_model_name_or_path",
    ]
)
_REFUSED = {
    "use_dora": "DoRA rescales the whole weight, which a routed sum of experts cannot do",
    "use_qalora": "QALoRA pools the layer's input",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA switches on at an invocation string",
    "alora_invocation_string": "aLoRA switches on at an invocation string",
    "modules_to_save": "whole modules saved with the adapter replace parts of the base model",
    "trainable_token_indices": "trained token embeddings replace rows of the base model",
    "target_parameters": "LoRA on bare parameters is not LoRA on a linear layer",
    "layer_replication": "the adapter expects a base model with repeated layers",
    "megatron_config": "Megatron layers are not supported",
    "arrow_config": "the file describes an Arrow router, not one expert",
    "kasa_config": "KaSA changes the base weights and has singular values of its own",
    "velora_config": "VeLoRA keeps state of its own",
    "monteclora_config": "MonteCLoRA samples its weights",
    "ensure_weight_tying": "tied adapters share weights between layers",
    "enable_lora": "this is the MergedLinear layout from before PEFT settled; train or convert it again",
}
# Initializations that leave the base weights as they were.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraRules:
    """What a checked LoRA config says about its modules."""

    rank: int
    alpha: float
    rslora: bool
    lora_bias: bool
    rank_pattern: tuple[tuple[ModulePattern, int], ...]
    alpha_pattern: tuple[tuple[ModulePattern, float], ...]
    targets: ModuleNames | None
    excluded: ModuleNames | None
    layers: LayerNumbers | None
    base_model: str | None

    def rank_of(self, path: str) -> tuple[int, str]:
        """(rank, where it was said) for a module; the first matching pattern wins, as in PEFT."""
        for pattern, rank in self.rank_pattern:
            if pattern.matches(path):
                return rank, f"rank_pattern {show(pattern.key)}"
        return self.rank, "r"

    def scaling_of(self, path: str, rank: int) -> float:
        """alpha/r, or alpha/sqrt(r) with rslora (Kalajdzievski 2023, arXiv 2312.03732)."""
        alpha = next((a for pattern, a in self.alpha_pattern if pattern.matches(path)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def left_out(self, paths: Collection[str]) -> dict[str, str]:
        """{module path: why the config gives it no weights}, for the paths that have weights all the same."""
        reasons: dict[str, str] = {}
        if self.layers is not None:
            whole = self.targets.names if self.targets is not None and self.targets.names else ()
            # PEFT asks for the layer of modules that are named by their ends, not of whole paths
            for path in paths:
                if path not in whole and not self.layers.match(path):
                    reasons[path] = "layers_to_transform leaves its layer out"
        if self.excluded is not None and self.excluded.knows(paths):
            reasons |= {path: "exclude_modules names it" for path in paths if self.excluded.match(path)}
        if self.targets is not None and self.targets.knows(paths):
            reasons |= {path: "target_modules does not name it" for path in paths if not self.targets.match(path)}
        return reasons

    def notes(self, paths: Collection[str]) -> list[str]:
        """What the config says of modules that are not there: odd, but PEFT itself writes such configs."""
        found = []
        names = self.targets.unused(paths) if self.targets is not None else []
        if self.excluded is not None and self.excluded.knows(names):
            names = [name for name in names if not self.excluded.match(name)]
        if names:
            found.append(f"target_modules names {show(names)}, of which the file has no weights")
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            keys = [p.key for p, _ in patterns if not any(p.matches(path) for path in paths)]
            if keys:
                found.append(f"{field} has {show(keys)}, which fits none of the file's modules")
        return found

    def work_problems(self, paths: Collection[str]) -> list[str]:
        """A reason to refuse when matching every pattern against every module would take too long."""
        patterns = [p for p, _ in self.rank_pattern] + [p for p, _ in self.alpha_pattern]
        work = sum(len(p.key) for p in patterns if p.is_complex) * sum(len(path) for path in paths)
        if work > MAX_WORK or len(patterns) * len(paths) > MAX_PATTERN_PAIRS:
            return [
                f"rank_pattern and alpha_pattern hold {len(patterns)} patterns for {len(paths)} modules: "
                "too many to match"
            ]
        return []


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. ValueError with the reason for everything else."""
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} has {size} bytes; expected at most {MAX_CONFIG_BYTES}")
    try:
        text = path.read_bytes().decode("utf-8")
        config = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        text.encode("utf-8")
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON in UTF-8: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(config).__name__}")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"a key stands twice: {show(twice)}")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def check_config(config: Mapping[str, Any]) -> tuple[LoraRules | None, list[str]]:
    """(rules, problems): the rules of a LoRA config, or None with every reason why it cannot be used."""
    kind = config.get("peft_type")
    if kind != "LORA":
        expected = "peft_type must be 'LORA', the only kind of adapter that can be an expert"
        got = f"got {show(kind)}" if "peft_type" in config else "the config has none"
        return None, [f"{expected}; {got}"]
    problems: list[str] = []
    _check_refusals(config, problems)
    rules = LoraRules(
        rank=_rank(config.get("r"), "r", problems),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha", problems),
        rslora=_flag(config, "use_rslora", problems),
        lora_bias=_flag(config, "lora_bias", problems),
        rank_pattern=_patterns(config, "rank_pattern", _rank, problems),
        alpha_pattern=_patterns(config, "alpha_pattern", _alpha, problems),
        targets=_names(config.get("target_modules"), "target_modules", problems),
        excluded=_names(config.get("exclude_modules"), "exclude_modules", problems),
        layers=_layers(config, problems),
        base_model=_base_model(config.get("base_model_name_or_path"), problems),
    )
    return (None if problems else rules), problems


def _check_refusals(config: Mapping[str, Any], problems: list[str]) -> None:
    for key, value in config.items():
        if key in _INERT or key in _USED or _is_off(value):
            continue
        reason = _REFUSED.get(key, "unknown field, and it is not off")
        problems.append(f"{show(key)} = {show(value)}: {reason}")
    bias = config.get("bias")
    if bias not in (None, "none"):
        problems.append(f"bias must be 'none', got {show(bias)}: base biases trained with the adapter")
    _check_init(config.get("init_lora_weights", True), problems)
    mapping, core = config.get("auto_mapping"), config.get("megatron_core")
    if not (_is_off(mapping) or _is_known_class(mapping)):
        problems.append(
            f"auto_mapping names Python code, {show(mapping)}; expected a class of transformers "
            f"or torch, or null "
            "(it is never imported: set it to null if the adapter is yours)"
        )
    if not _is_off(core) and core != "megatron.core":
        problems.append(f"megatron_core names a Python module, {show(core)}; expected 'megatron.core' or null")


def _check_init(init: Any, problems: list[str]) -> None:
    if init is None or isinstance(init, bool) or init in _INITS:
        return
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights = {show(init)} changed the base weights; convert the adapter first (PEFT: "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    else:
        expected = "true, false, " + ", ".join(repr(name) for name in _INITS)
        problems.append(f"init_lora_weights must be one of {expected}, got {show(init)}")


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict, int, float)) and not value)


def _is_known_class(mapping: Any) -> bool:
    """Whether this is the note PEFT itself leaves about a base model's class. It is read by nobody here."""
    if not isinstance(mapping, dict) or not set(mapping) <= {"base_model_class", "parent_library"}:
        return False
    library = mapping.get("parent_library")
    if not all(value is None or isinstance(value, str) for value in mapping.values()):
        return False
    return library is None or library.split(".")[0] in ("transformers", "torch")


def _flag(config: Mapping[str, Any], key: str, problems: list[str]) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        problems.append(f"{key} must be true or false, got {show(value)}")
    return value is True


def _rank(value: Any, where: str, problems: list[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problems.append(f"{where} must be a positive integer, got {show(value)}")
        return 1
    return value


def _alpha(value: Any, where: str, problems: list[str]) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float
        pass
    problems.append(f"{where} must be a finite number, got {show(value)}")
    return 1.0


def _patterns(config: Mapping[str, Any], field: str, check: Any, problems: list[str]) -> tuple:
    value = config.get(field)
    if value is None:
        return ()
    if not isinstance(value, dict):
        problems.append(f"{field} must be an object of pattern: number, got {show(value)}")
        return ()
    rows = []
    for key, number in value.items():
        try:
            rows.append((ModulePattern(key), check(number, f"{field}[{show(key)}]", problems)))
        except ValueError as error:
            problems.append(f"{field} key {show(key)} cannot be used: {error}")
    return tuple(rows)


def _names(value: Any, field: str, problems: list[str]) -> ModuleNames | None:
    if value is None or isinstance(value, str):
        return ModuleNames(value) if value else None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ModuleNames(value) if value else None
    problems.append(f"{field} must be a list of names or a string, got {show(value)}")
    return None


def _layers(config: Mapping[str, Any], problems: list[str]) -> LayerNumbers | None:
    numbers, names = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = [numbers] if isinstance(numbers, int) else [] if numbers is None else numbers
    names = [names] if isinstance(names, str) and names else names or []
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        problems.append(f"layers_to_transform must be layer numbers, got {show(numbers)}")
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"layers_pattern must be a string or a list of strings, got {show(names)}")
        return None
    return LayerNumbers(numbers, names) if numbers else None


def _base_model(value: Any, problems: list[str]) -> str | None:
    if value is not None and not isinstance(value, str):
        problems.append(f"base_model_name_or_path must be a string or null, got {show(value)}")
        return None
    return value or None
