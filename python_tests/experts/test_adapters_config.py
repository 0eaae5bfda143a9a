"""adapter_config.json: the fields that count, those that are refused, and its agreement with the tensors."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from adapter_cases import CONFIG, UP, Q, factors, good_adapter, refused, set_config, set_tensors
from builders import lora_config, write_adapter

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats import peft_config
from moerge_ext.experts.formats.peft import inspect_adapter, read_adapter


@pytest.fixture
def folder(tmp_path):
    return good_adapter(tmp_path / "expert")


@pytest.mark.parametrize(
    "fields, rank, scaling",
    [
        ({}, 4, 8 / 4),
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"lora_alpha": 1.5}, 4, 1.5 / 4),
        ({"rank_pattern": {"q_proj": 2}}, 2, 8 / 2),
        ({"alpha_pattern": {"q_proj": 3}}, 4, 3 / 4),
        ({"rank_pattern": {"^q_proj": 2}}, 4, 8 / 4),
        ({"rank_pattern": {f"^{Q}": 2}, "use_rslora": True}, 2, 8 / math.sqrt(2)),
        ({"rank_pattern": {r"layers\.\d+\..*(q|k)_proj": 2}}, 2, 8 / 2),
        ({"alpha_pattern": {"proj": 5, "q_proj": 6, ".*": 7}}, 4, 6 / 4),
        ({"alpha_pattern": {r"(?!.*mlp).*\.0{1,2}\..*_proj": 6}}, 4, 6 / 4),
        ({"alpha_pattern": {r"(?<!self_attn\.)q_proj": 6}}, 4, 8 / 4),
        ({"alpha_pattern": {"(?i)Q_PROJ": 8}}, 4, 8 / 4),  # not read, and it would change nothing
        ({"rank_pattern": {"(?!x).*q_proj": 2}}, 2, 8 / 2),
        ({"rank_pattern": {"(?i)Q_PROJ": 2}}, 2, 8 / 2),
        ({"rank_pattern": {"q_proj": 2.0}, "r": 8.0, "alpha": 6}, 2, 6 / 2),
        ({"rank_pattern": {"a.very.special.key": 2, ".*": 4, "q_proj": 2}}, 2, 8 / 2),
    ],
)
def test_scaling_rules(tmp_path, fields, rank, scaling):
    folder = write_adapter(tmp_path, {Q: factors(r=rank)}, **{"r": 4, "alpha": 8} | fields)
    assert inspect_adapter("e", folder).modules[Q].scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["k_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {
            "init_lora_weights": False,
            "fan_in_fan_out": True,
            "revision": "main",
            "megatron_core": "megatron.core",
        },
        {"target_modules": ["q_proj", "mlp.up_proj", "never_there"]},
        {"target_modules": r"^(?!.*vision).*(a+)+proj$"},
        {"loftq_config": {}, "modules_to_save": None, "layer_replication": [], "qalora_group_size": 16},
        {"from_the_future": None, "another": False, "third": [], "fourth": {}, "fifth": 0},
        {"auto_mapping": {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama"}},
        {"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__", "unsloth_fixed": True}},
        {"auto_mapping": {"custom": "some.module"}, "megatron_core": "some.module"},
        {"auto_mapping": ["anything"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": False},
        {"ensure_weight_tying": True},
        {"r": 4.0, "lora_alpha": 8.5},
        {"modules_to_save": [], "trainable_token_indices": [], "rank_pattern": None, "alpha_pattern": []},
        {"merge_weights": True, "use_qalora": False, "target_parameters": []},
        {"velora_config": {"num_groups": 4}, "monteclora_config": {"num_samples": 8}},
        {"use_bdlora": {"nblocks": 1, "target_modules_bd_a": ["q_proj"]}},
        {"sixth": {"on": False, "inside": {"on": None}}, "seventh": "none"},
        {"layers_to_transform": [0.0], "init_lora_weights": "Gaussian"},
    ],
)
def test_harmless_fields_are_accepted(folder, fields):
    set_config(folder, **fields)
    assert set(inspect_adapter("e", folder).modules) == {Q, UP}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"peft_type": "OFT"}, ["peft_type", "OFT"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"use_dora": True}, ["DoRA"]),
        ({"use_qalora": True}, ["QALoRA"]),
        ({"use_bdlora": {"nblocks": 2}}, ["BD-LoRA"]),
        ({"alora_invocation_tokens": [1, 2]}, ["aLoRA"]),
        ({"trainable_token_indices": [5]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 4], [2, 5]]}, ["layer_replication"]),
        ({"kasa_config": {"beta": 1e-4}}, ["KaSA"]),
        ({"arrow_config": {"top_k": 3}}, ["Arrow"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["random state", "convert"]),
        ({"init_lora_weights": "lora_ga"}, ["gradients", "convert"]),
        ({"bias": "some"}, ["bias must be 'none', 'all' or 'lora_only', got 'some'"]),
        ({"modules_to_save": {"lm_head": 1}}, ["modules_to_save must be a list of names"]),
        ({"kasa_config": {}}, ["KaSA"]),  # PEFT fills it with defaults
        ({"use_bdlora": {"nblocks": 2}}, ["BD-LoRA"]),
        ({"alpha_pattern": {"(?i)Q_PROJ": 4}}, ["(?i)Q_PROJ", "would change its scaling"]),
        ({"rank_pattern": {"(?i)Q_PROJ": 2}, "r": 3}, ["the config says rank 3 (r), the tensors have 4"]),
        ({"r": 4.5}, ["r must be a positive integer, got 4.5"]),
        ({"init_lora_weights": "corda"}, ["convert"]),
        ({"init_lora_weights": "loftq"}, ["convert"]),
        ({"init_lora_weights": "something"}, ["init_lora_weights must be one of"]),
        ({"init_lora_weights": ["gaussian"]}, ["init_lora_weights must be one of"]),
        ({"brand_new_field": {"on": True}}, ["brand_new_field", "unknown"]),
        ({"enable_lora": [True, False, True]}, ["MergedLinear"]),
        ({"megatron_config": {"a": 1}}, ["megatron"]),
        ({"r": 0}, ["r must be a positive integer, got 0"]),
        ({"r": -4}, ["r must be"]),
        ({"r": "4"}, ["r must be"]),
        ({"r": True}, ["r must be"]),
        ({"r": None}, ["r must be"]),
        ({"lora_alpha": "8"}, ["lora_alpha must be a finite number"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": True}, ["lora_alpha"]),
        ({"lora_alpha": 10**400}, ["lora_alpha"]),
        ({"use_rslora": "yes"}, ["use_rslora must be true or false"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern must be an object"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']"]),
        ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern['q_proj']"]),
        ({"r": 8}, [f"{Q}: the config says rank 8 (r), the tensors have 4"]),
        ({"rank_pattern": {"up_proj": 2}}, [f"{UP}: the config says rank 2 (rank_pattern 'up_proj')"]),
        ({"lora_bias": True}, ["lora_bias true", "lacks lora_B.bias"]),
        (
            {"target_modules": ["q_proj"]},
            [f"{UP}: the file has weights for it, target_modules does not name it"],
        ),
        ({"target_modules": {"q_proj": 1}}, ["target_modules must be a list"]),
        ({"exclude_modules": 5}, ["exclude_modules must be a list of names or a string"]),
        ({"layers_to_transform": ["0"]}, ["layers_to_transform must be layer numbers, got ['0']"]),
        ({"layers_to_transform": True}, ["layers_to_transform must be layer numbers"]),
        ({"layers_pattern": {"a": 1}}, ["layers_pattern must be a string or a list"]),
        ({"base_model_name_or_path": {"a": 1}}, ["base_model_name_or_path must be a string"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_configs(folder, fields, words):
    set_config(folder, **fields)
    refused(folder, *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b"\xff\xfe{}", ["UTF-8"]),
        (b"[1, 2]", ["JSON object"]),
        (b'"LORA"', ["JSON object"]),
        (b"[" * 200_000, ["nested too deeply"]),
        (b'{"a":' * 100_000, ["nested too deeply"]),
        (b'{"r": 4, "r": 8}', ["stands twice", "'r'"]),
        (b'{"lora_alpha": NaN}', ["NaN"]),
        (b'{"lora_alpha": -Infinity}', ["Infinity"]),
        (b'{"r": 1' + b"0" * 5000 + b"}", ["not valid JSON"]),
        (b'{"base_model_name_or_path": "\\ud800", "peft_type": "OFT"}', ["peft_type"]),
        (b" " * (5 << 20), ["at most"]),
    ],
    ids=range(13),
)
def test_refused_json(folder, content, words):
    (folder / CONFIG).write_bytes(content)
    refused(folder, *words)


def test_infinite_alpha(folder):
    text = json.dumps(lora_config()).replace('"lora_alpha": 8', '"lora_alpha": 1e999')
    (folder / CONFIG).write_text(text)
    refused(folder, "lora_alpha must be a finite number, got inf")


@pytest.mark.parametrize(
    "fields, rank, scaling, words",
    [
        # trained with the general key first; PEFT sorts them when it saves
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8}}, 8, 8 / 8, []),
        (
            {
                "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 16},
            },
            8,
            16 / 8,
            ["ambiguous", "'q_proj' (16) is taken, as the rank of the tensors says", "'layers.0.self_attn.q_proj' (4)"],
        ),
        (
            {"alpha_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 16}},
            4,
            4 / 4,
            [
                f"ambiguous for {Q}",
                "'layers.0.self_attn.q_proj' (4) is taken, as PEFT does",
                "'q_proj' (16) matches too",
            ],
        ),
        # the rank says that the order of the file is that of the training
        (
            {
                "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 16},
            },
            2,
            4 / 2,
            [],
        ),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 4}}, 4, 4 / 4, []),
    ],
)
def test_the_order_of_patterns(tmp_path, fields, rank, scaling, words):
    folder = write_adapter(tmp_path, {Q: factors(r=rank)}, **fields)
    assert inspect_adapter("e", folder).modules[Q].scaling == pytest.approx(scaling)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_experts(folder)
    assert len(caught) == bool(words) and all(word in str(caught[0].message) for word in words)


@pytest.mark.parametrize(
    "gone, scaling, words", [("r", 2.0, ""), ("lora_alpha", 2.0, "no lora_alpha: 8, PEFT's default")]
)
def test_a_field_that_is_not_there(folder, gone, scaling, words):
    config = lora_config()
    del config[gone]
    (folder / CONFIG).write_text(json.dumps(config))
    header = inspect_adapter("e", folder)
    assert header.modules[Q].scaling == scaling and words in "".join(header.notes)


@pytest.mark.parametrize(
    "fields, tensors, words",
    [
        ({"use_dora": True}, {f"{Q}.lora_magnitude_vector": [6], f"{UP}.lora_magnitude_vector": [12]}, "DoRA"),
        ({}, {f"{Q}.lora_magnitude_vector": [6], f"{UP}.lora_magnitude_vector": [12]}, "DoRA"),
        ({"kasa_config": {"beta": 1}}, {f"{Q}.lora_diag": [4], f"{UP}.lora_diag": [4]}, "KaSA"),
        ({"trainable_token_indices": [3]}, {"embed.token_adapter.trainable_tokens_delta": [1, 8]}, "token embeddings"),
        ({"peft_type": "OFT"}, {f"{Q}.oft_R": [6, 1], f"{UP}.oft_R": [12, 1], "junk.lora_x": [1]}, "OFT"),
        ({"r": 8}, {}, f"{UP}, {Q}: the config says rank 8 (r), the tensors have 4"),
        ({"lora_bias": True}, {}, f"{UP}, {Q}: the config says lora_bias true"),
        ({}, {f"embed.lora_embedding_{x}": [4, 9] for x in "AB"} | {"embed.base_layer.weight": [9, 4]}, "embedding"),
    ],
)
def test_one_line_a_cause(folder, fields, tensors, words):
    set_config(folder, **fields)
    added = {f"base_model.model.{key}": torch.zeros(shape) for key, shape in tensors.items()}
    set_tensors(folder, lambda stored: stored.update(added))
    assert str(refused(folder, words)).count("\n") == 1


def test_every_field_of_peft_is_known():
    """A field of a later version is refused while it is on, until somebody has looked at what it does."""
    from peft import LoraConfig

    known = peft_config._INERT | peft_config._USED | peft_config._REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


def test_state_of_the_training_is_passed_over(folder):
    keys = ["lora_velora_embed", "lora_monteclora_sampler.expert_weights"]
    set_tensors(folder, lambda stored: stored.update({f"base_model.model.{Q}.{key}": torch.zeros(3) for key in keys}))
    header = inspect_adapter("e", folder)
    assert set(header.modules) == {Q, UP} and not header.claims.saved


K0, Q1 = "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj"
MOE = "model.layers.1.experts.3.w1"


@pytest.mark.parametrize(
    "fields, path, reason",
    [
        ({"target_modules": "q_proj"}, Q, "target_modules"),
        ({"target_modules": r".*\.(k|v)_proj"}, Q, "target_modules"),
        ({"target_modules": r"model\.layers\.0\..*"}, Q1, "target_modules"),
        ({"target_modules": ["self_attn.q_proj"]}, K0, "target_modules"),
        ({"exclude_modules": ["q_proj"]}, Q1, "exclude_modules"),
        ({"exclude_modules": [Q]}, Q, "exclude_modules"),
        ({"exclude_modules": r".*\.0\..*q_proj"}, Q, "exclude_modules"),
        ({"layers_to_transform": [0]}, Q1, "layers_to_transform"),
        ({"layers_to_transform": 0}, Q1, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]}, Q1, "layers_to_transform"),
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, Q1, "layers_to_transform"),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, MOE, "layers_to_transform"),
        ({"layers_to_transform": [2]}, MOE, "layers_to_transform"),
        ({"layers_to_transform": [0]}, "lm_head.q_proj", "layers_to_transform"),
    ],
)
def test_weights_that_the_config_leaves_out(tmp_path, fields, path, reason):
    config = {"target_modules": ["q_proj", "k_proj", "w1"]} | fields
    folder = write_adapter(tmp_path, {path: factors()}, **config)
    refused(folder, f"{path}: the file has weights for it, {reason}")
    fields = {key: None for key in fields}
    write_adapter(folder, {path: factors()}, **{"target_modules": ["q_proj", "k_proj", "w1"]} | fields)
    assert set(inspect_adapter("e", folder).modules) == {path}


@pytest.mark.parametrize(
    "fields, path",
    [
        ({"target_modules": r".*\.(q|k)_proj"}, Q),
        ({"target_modules": f"^{Q}$"}, Q),
        ({"target_modules": "all-linear"}, Q),
        ({"target_modules": "(?:language|text).*?attn.{1,3}"}, Q),  # not a pattern that is read here
        ({"target_modules": [Q1], "layers_to_transform": [0]}, Q1),  # named as a whole, as in PEFT
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7], "layers_pattern": "model.layers"}, Q1),
        ({"target_modules": ["w1"], "layers_to_transform": [1]}, MOE),
        ({"target_modules": ["w1"], "layers_to_transform": [3]}, MOE),  # PEFT took the last number once
        ({"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": "layers"}, MOE),
        ({"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": "(a+)+"}, MOE),
        ({"target_modules": ["q_proj"], "layers_to_transform": [], "exclude_modules": []}, Q),
        ({"target_modules": ["q_proj"], "exclude_modules": ["proj", "attn.q_proj"]}, Q),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, Q),
    ],
)
def test_weights_that_the_config_allows(tmp_path, fields, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(load_experts(write_adapter(tmp_path, {path: factors()}, **fields)).modules) == {path}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "target_modules names ['v_proj']"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names ['lm_head'], of which the file holds nothing"),
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern has ['v_proj'], which fits none"),
        ({"alpha_pattern": {"q_proj": 2, r".*\.9\..*": 3}}, r"alpha_pattern has ['.*\\.9\\..*'], which fits none"),
    ],
)
def test_modules_that_are_not_there_are_pointed_out(folder, fields, words):
    set_config(folder, **fields)
    other = write_adapter(folder.parent / "other", {Q: factors()})
    with pytest.warns(UserWarning) as caught:
        load_experts({"odd": folder, "fine": other})
    assert len(caught) == 1 and f"expert 'odd': {words}" in str(caught[0].message)
    assert "fine" not in str(caught[0].message) and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="adapter 'odd' in"):
        read_adapter("odd", folder)


def test_the_warning_is_bounded(tmp_path):
    for i in range(40):
        write_adapter(tmp_path / f"e{i}", {Q: factors()}, target_modules=["q_proj", "gone"])
    with pytest.warns(UserWarning) as caught:
        load_experts([tmp_path / f"e{i}" for i in range(40)])
    assert len(caught) == 1 and str(caught[0].message).endswith("... and 20 more")
