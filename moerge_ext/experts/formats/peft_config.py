"""adapter_config.json of a PEFT LoRA: read as data, checked field by field, never obeyed.

Nothing in the file is imported, downloaded or evaluated. A field is either used, known to be without effect
on the adapter's function, or refused with the reason; a field nobody here knows is accepted only while it is
off. Where the tensors can tell, they decide and not the field.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files.safefile import what_it_is
from ..keys import bare_pattern
from .foreign import what_kind
from .peft_patterns import LayerNumbers, ModuleNames, ModulePattern
from .peft_rules import LoraRules, PatternRow, finite_number, show
from .peft_targets import Targets

MAX_CONFIG_BYTES = 4 << 20
DEFAULT_ALPHA = 8.0  # PEFT's, for a config without lora_alpha

# Fields without effect on what a stored adapter computes: bookkeeping, notes for loading a model (nothing is imported
# here), training-time choices, and the settings of initializations (whether an initialization changed the base is
# decided by init_lora_weights alone). VeLoRA differs in the backward pass alone and MonteCLoRA samples in training
# alone (PEFT 0.21.2); tied adapters, if there are any, are tensors of the file.
_INERT = frozenset(
    [
        "task_type",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "merge_weights",
        "peft_version",
        "revision",
        "auto_mapping",
        "megatron_core",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "velora_config",
        "monteclora_config",
        "ensure_weight_tying",
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
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "base_model_name_or_path",
    ]
)
TOKENS = "trainable_token_indices"
_REFUSED = {
    "use_dora": "DoRA rescales the whole weight: moerge convert FOLDER OUT --to-lora --model MODEL --rank R",
    "use_qalora": "QALoRA pools the layer's input",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA switches on at an invocation string",
    "alora_invocation_string": "aLoRA switches on at an invocation string",
    TOKENS: "trained token embeddings replace rows of the base; load_experts(..., modules=...) takes the LoRA alone",
    "layer_replication": "the adapter expects a base model with repeated layers",
    "megatron_config": "Megatron layers are not supported",
    "arrow_config": "the file describes an Arrow router, not one expert",
    "kasa_config": "KaSA changes the base weights and has singular values of its own",
    "enable_lora": "this is the MergedLinear layout from before PEFT settled; train or convert it again",
}
_ON_WHEN_EMPTY = frozenset(["arrow_config", "kasa_config"])  # PEFT fills {} with defaults and switches them on
# Initializations that leave the base weights as they were.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
_MOVED_INTO_FACTORS = ("pissa", "olora")  # and these can be computed again from the base
_BASE_CHANGING = {
    "pissa": "its fast SVD depends on the random state of the training run",
    "olora": "it is not PEFT's OLoRA",
    "corda": "it was made from activations of the training data",
    "loftq": "the base was quantized for it",
    "lora_ga": "it was made from gradients of the training data",
}


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
        what = what_it_is(path)
        reason = f"it is {what}" if what else str(error)
        raise ValueError(f"{path.name} is not valid JSON in UTF-8: {reason}") from None
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
        expected = "peft_type must be 'LORA', 'ADALORA' or 'IA3', the kinds of adapter that can be experts as they are"
        got = f"got {show(kind)}" if "peft_type" in config else "the config has none"
        return None, [f"{expected}; {got}{what_kind(kind)}"]
    problems: list[str] = []
    _check_refusals(config, problems)
    says = (
        [] if "lora_alpha" in config else [f"the config has no lora_alpha: {DEFAULT_ALPHA:g}, PEFT's default, is used"]
    )
    rules = LoraRules(
        rank=_rank(config["r"], "r", problems) if "r" in config else None,
        alpha=finite_number(config.get("lora_alpha", DEFAULT_ALPHA), "lora_alpha", problems),
        rslora=_flag(config, "use_rslora", problems),
        lora_bias=_flag(config, "lora_bias", problems),
        rank_pattern=_patterns(config, "rank_pattern", _rank, problems),
        alpha_pattern=_patterns(config, "alpha_pattern", finite_number, problems),
        targets=Targets(
            named=_names(config.get("target_modules"), "target_modules", problems),
            excluded=_names(config.get("exclude_modules"), "exclude_modules", problems),
            layers=_layers(config, problems),
        ),
        init=_init(config.get("init_lora_weights", True), problems),
        modules_to_save=_modules_to_save(config.get("modules_to_save"), problems),
        base_model=_base_model(config.get("base_model_name_or_path"), problems),
        says=tuple(says),
        parameters=_parameters(config.get("target_parameters"), problems),
    )
    return (None if problems else rules), problems


def of_modules(config: Mapping[str, Any], keep: object) -> Mapping[str, Any]:
    """The config of the modules that are taken: trained tokens are of an embedding alone, as the tensors' names say."""
    return config if keep is None else {key: value for key, value in config.items() if key != TOKENS}


def refused_fields(config: Mapping[str, Any]) -> dict[str, str]:
    """{field: why} of the fields that are on and must not be."""
    refused = {}
    for key, value in config.items():
        if key in _INERT or key in _USED:
            continue
        if _is_off(value) and not (key in _ON_WHEN_EMPTY and value == {}):
            continue
        if key == "use_bdlora" and isinstance(value, dict) and value.get("nblocks", 1) == 1:
            continue  # one block is the whole matrix
        if key in _REFUSED or not _says_nothing(value):
            refused[key] = _REFUSED.get(key, "unknown field, and it is not off")
    return refused


def _check_refusals(config: Mapping[str, Any], problems: list[str]) -> None:
    problems += [f"{show(key)} = {show(config[key])}: {reason}" for key, reason in refused_fields(config).items()]
    bias = config.get("bias")
    # what "all" and "lora_only" trained is in the file, if the base has biases
    if not _is_off(bias) and bias not in ("none", "all", "lora_only"):
        problems.append(f"bias must be 'none', 'all' or 'lora_only', got {show(bias)}")


def _init(init: Any, problems: list[str]) -> str | None:
    """The initialization, if it moved a part of the base into the factors and can be computed again."""
    if init is None or isinstance(init, bool):
        return None
    name = init.lower() if isinstance(init, str) else ""
    if name in _INITS:
        return None
    if name in _MOVED_INTO_FACTORS:
        return name
    if kind := next((kind for kind in _BASE_CHANGING if name.startswith(kind)), None):
        problems.append(
            f"init_lora_weights = {show(init)} changed the base weights, and cannot be computed again from them: "
            f"{_BASE_CHANGING[kind]}; convert the adapter first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    else:
        expected = "true, false, " + ", ".join(repr(name) for name in (*_INITS, *_MOVED_INTO_FACTORS))
        problems.append(f"init_lora_weights must be one of {expected}, got {show(init)}")
    return None


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict, int, float)) and not value)


def _says_nothing(value: Any) -> bool:
    """Whether a field that nobody here knows is off: a group of settings that are, or the word for it."""
    if isinstance(value, dict):
        return all(_is_off(part) or _says_nothing(part) for part in value.values())
    return isinstance(value, str) and value.lower() == "none"


def _flag(config: Mapping[str, Any], key: str, problems: list[str]) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        problems.append(f"{key} must be true or false, got {show(value)}")
    return value is True


def _rank(value: Any, where: str, problems: list[str]) -> int:
    if isinstance(value, float) and value.is_integer():  # JSON of other languages
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problems.append(f"{where} must be a positive integer, got {show(value)}")
        return 1
    return value


def _patterns(config: Mapping[str, Any], field: str, check: Any, problems: list[str]) -> tuple[PatternRow, ...]:
    value = config.get(field)
    if _is_off(value):
        return ()
    if not isinstance(value, dict):
        problems.append(f"{field} must be an object of pattern: number, got {show(value)}")
        return ()
    rows = []
    for key, number in value.items():
        number = check(number, f"{field}[{show(key)}]", problems)
        try:
            rows.append(PatternRow(key, number, ModulePattern(bare_pattern(key), wide=True)))
        except ValueError:  # valid for PEFT all the same
            rows.append(PatternRow(key, number, None))
    return tuple(rows)


def _names(value: Any, field: str, problems: list[str]) -> ModuleNames | None:
    if value is None or isinstance(value, str):
        return ModuleNames(bare_pattern(value)) if value else None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ModuleNames([bare_pattern(name) for name in value]) if value else None
    problems.append(f"{field} must be a list of names or a string, got {show(value)}")
    return None


def _parameters(value: Any, problems: list[str]) -> tuple[str, ...]:
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        problems.append(f"target_parameters must be a list of names or null, got {show(value)}")
        return ()
    return tuple(value or ())


def _layers(config: Mapping[str, Any], problems: list[str]) -> LayerNumbers | None:
    numbers, names = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = [numbers] if isinstance(numbers, (int, float)) else [] if numbers is None else numbers
    if isinstance(numbers, list):
        numbers = [int(n) if isinstance(n, float) and n.is_integer() else n for n in numbers]
    names = [names] if isinstance(names, str) and names else names or []
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        problems.append(f"layers_to_transform must be layer numbers, got {show(numbers)}")
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"layers_pattern must be a string or a list of strings, got {show(names)}")
        return None
    return LayerNumbers(numbers, names) if numbers else None


def _modules_to_save(value: Any, problems: list[str]) -> tuple[str, ...]:
    if _is_off(value):
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"modules_to_save must be a list of names, got {show(value)}")
        return ()
    return tuple(names)


def _base_model(value: Any, problems: list[str]) -> str | None:
    if value is not None and not isinstance(value, str):
        problems.append(f"base_model_name_or_path must be a string or null, got {show(value)}")
        return None
    return value or None
