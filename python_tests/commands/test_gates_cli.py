"""The command that trains gates."""

from __future__ import annotations

import argparse
import inspect
import json

import pytest
import torch
from builders import make_tokenizer, write_adapter
from gate_builders import (
    MODELS,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
)

from moerge_ext.commands.main import main
from moerge_ext.commands.train_gates import BOTH, add_arguments, run
from moerge_ext.commands.training_options import TRAINING, defaults, plan
from moerge_ext.experts.formats.peft import read_gates
from moerge_ext.training.gates import train_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def parser():
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


def command(*words):
    args = parser().parse_args([str(word) for word in words])
    args.rest = []
    args.settle(args, pytest.fail)
    return run(args)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_command(name, tmp_path, capsys):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    folder = make_adapter(model, tmp_path / "expert")
    data = tmp_path / "data.jsonl"
    rows = [{"input": f"copy {c}:", "target": c * 3} for c in "abcdefg"]
    rows += [] if name == "t5" else [{"text": "some text"}]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    common = (
        tmp_path / "model",
        folder,
        "--data",
        data,
        "--device",
        "cpu",
        "--batch-size",
        4,
        "--no-progress",
    )
    training = ("--accumulate", 1, "--steps", 3, "--validation", data)
    assert command(*common, *training) == 0
    assert command(*common, "--kind", "average-activation", "--max-length", 6, "--samples", 3, "--seed", 1) == 0
    assert read_gates(folder)["average-activation"].metadata["samples"] == "3"
    assert read_gates(folder).keys() == {"sigmoid-gate", "average-activation"}
    out = capsys.readouterr().out
    examples = len(rows)
    plan = f"3 steps of up to 4 sequences (batch size 4, accumulate 1): {examples + 4} sequences in all"
    assert out.startswith(plan) and out.count("wrote ") == 2
    some = sorted(read_gates(folder)["sigmoid-gate"].gates)[0]
    assert command(*common, *training, "--modules", f"^{some}$", "--output", tmp_path / "some") == 0
    assert read_gates(tmp_path / "some")["sigmoid-gate"].gates.keys() == {some}


GIVEN = {
    "--steps": "5",
    "--lr": "0.1",
    "--warmup-ratio": "0.5",
    "--accumulate": "2",
    "--eval-every": "3",
    "--checkpoint-every": "3",
    "--validation": "missing.jsonl",
    "--joint": None,
    "--resume": None,
}


@pytest.mark.parametrize("options", [*([option] for option in GIVEN), list(GIVEN)], ids=" ".join)
def test_average_activation_refuses_the_options_of_training(options):
    words = [word for option in options for word in (option, GIVEN[option]) if word is not None]
    with pytest.raises(ValueError) as caught:
        command("model", "expert", "--data", "missing.jsonl", "--kind", "average-activation", *words)
    text = str(caught.value)
    assert "--kind average-activation" in text and "--kind sigmoid-gate" in text
    assert [option for option in GIVEN if option in text] == [option for option in GIVEN if option in options]


def test_samples_are_for_average_activations():
    words = ("model", "expert", "--data", "missing.jsonl")
    with pytest.raises(ValueError, match="--samples is for --kind average-activation"):
        command(*words, "--samples", 5)
    with pytest.raises(ValueError, match="--samples must be at least 1, got 0"):
        command(*words, "--kind", "average-activation", "--samples", 0)


def test_every_training_option_is_known():
    declared = {name for name in (*TRAINING, "joint") if f"--{name.replace('_', '-')}" in parser().format_help()}
    assert {f"--{name.replace('_', '-')}" for name in declared - set(BOTH)} == set(GIVEN)
    assert set(TRAINING) - declared == {"weight_decay"}


def test_the_commands_defaults_are_the_functions(monkeypatch, tmp_path):
    args = parser().parse_args(["model", "expert", "--data", "file"])
    assert not [name for name in TRAINING if hasattr(args, name)]
    default = {name: p.default for name, p in inspect.signature(train_gates).parameters.items()}
    assert args.batch_size == default["batch_size"]
    sequences = default["batch_size"] * default["accumulate"]
    assert plan(10_000, default, batch_size=args.batch_size).startswith(
        f"{default['steps']} steps of up to {sequences} sequences"
    )
    text = " ".join(parser().format_help().split())
    assert (
        f"forwards per step (default: {default['accumulate']}); 128, with --batch-size 8, are the paper's 1024" in text
    )


def test_the_plan_counts_what_is_read():
    own = defaults(train_gates)
    assert "7 steps of up to 8 sequences (batch size 4, accumulate 2): 49 sequences in all" in plan(
        7, own, batch_size=4, steps=7, accumulate=2
    )
    assert "1 step of up to 1024 sequences" in plan(5000, own, batch_size=8, steps=1, accumulate=128)
    assert "2 steps of up to 3 sequences (batch size 8, accumulate 1): 6 sequences in all, from 3 examples" in plan(
        3, own, batch_size=8, steps=2
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ("--batch-size", 0, "--steps", 0),
            "--batch-size must be at least 1, got 0; --steps must be at least 1, got 0",
        ),
        (("--max-length", 1), "--max-length must be at least 2, got 1"),
        (("--joint",), "--joint changes the adapter's weights: pass --output DIR"),
    ],
)
def test_command_checks_its_arguments_first(words, text):
    with pytest.raises(ValueError) as caught:
        command("model", "expert", "--data", "missing.jsonl", *words)
    assert text in str(caught.value)


def test_command_checks_the_device_before_the_model(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}')
    expert = write_adapter(tmp_path / "expert", {"up": (torch.ones(2, 8), torch.ones(4, 2))}, r=2)
    with pytest.raises(ValueError, match="device 'meta' cannot be used here"):
        command("no/such-model", expert, "--data", data, "--device", "meta")


def test_command_checks_the_adapter_before_the_model(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="no local folder .*nowhere"):
        command("no/such-model", tmp_path / "nowhere", "--data", data)


def test_command_says_where_gates_from_elsewhere_are_used(tmp_path, capsys):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a b"}')
    expert = make_adapter(model, tmp_path / "expert")
    words = (tmp_path / "model", expert, "--data", data, "--device", "cpu", "--no-progress", "--output", tmp_path / "o")
    for more in (("--steps", 1), ("--kind", "average-activation")):
        assert command(*words, *more) == 0
        assert f"use them with --gates expert={tmp_path / 'o'}" in capsys.readouterr().out
    assert not read_gates(expert) and len(read_gates(tmp_path / "o")) == 2
    generate = ["generate", "a", "--model", tmp_path / "model", "--experts", expert, "--max-new-tokens", 1]
    generate = [*map(str, generate), "--top-k", "1"]
    assert main(generate) == 2 and "train-gates" in capsys.readouterr().err
    assert main([*generate, "--gates", f"expert={tmp_path / 'o'}"]) == 0
    assert main([*generate, "--gates", "expert"]) == 2 and "--gates takes NAME=DIR" in capsys.readouterr().err
    assert main([*generate, "--gates", "other=x"]) == 2 and "gates for 'other', which is" in capsys.readouterr().err
    assert main([*generate, "--gates", "a=x", "--gates", "a=y"]) == 2 and "given twice" in capsys.readouterr().err


def test_command_encodes_and_refuses(tmp_path):
    from moerge_ext.files.rows import read_rows
    from moerge_ext.training.encoding import collator, encode

    tokenizer = make_tokenizer(tmp_path)
    ids = lambda text: tokenizer(text).input_ids  # noqa: E731
    row = encode({"input": "abc", "target": "de"}, tokenizer, 5, seq2seq=False)
    assert row == {"input_ids": ids("bcde") + [1], "labels": [-100, -100] + ids("de") + [1]}
    assert encode({"text": "abc"}, tokenizer, 9, seq2seq=False)["labels"] == ids("abc") + [1]
    batch = collator(tokenizer)([row, {"input_ids": [5], "labels": [5]}])
    assert batch["attention_mask"].sum(1).tolist() == [5, 1]
    assert batch["labels"][1].tolist() == [5] + [-100] * 4
    with pytest.raises(ValueError, match='rows with "input" and "target"'):
        encode({"text": "abc"}, tokenizer, 9, seq2seq=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "a"}\n\nnonsense\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected(.|\n)*line 3: not JSON"):
        read_rows(bad, text=True)
    bad.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(bad)
    with pytest.raises(ValueError, match=r"no file .*nosuch.jsonl: expected JSON lines .* or \{\"text\": str\}"):
        read_rows(tmp_path / "nosuch.jsonl", text=True)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_command_says_why_speech_is_for_python(tokenizer, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small = {"d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 60, "pad_token_id": 0}
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **small)).save_pretrained(tmp_path / "speech")
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **image)).save_pretrained(tmp_path / "image")
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "a", "target": "b"}')
    expert = write_adapter(tmp_path / "expert", {"up": (torch.ones(2, 8), torch.ones(4, 2))}, r=2)
    for name, why in {
        "speech": "WhisperForConditionalGeneration, which reads input_features, not text",
        "image": "ViTForImageClassification, which reads pixel_values, not text",
    }.items():
        if tokenizer:
            make_tokenizer(tmp_path / name)
        with pytest.raises(ValueError, match=f"{why}.*moerge_ext.train_gates"):
            command(tmp_path / name, expert, "--data", data, "--device", "cpu")
