"""The command that trains gates."""

from __future__ import annotations

import json

import pytest
from gate_builders import (
    MODELS,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
)

from moerge_ext.adapters import read_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def make_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .:="]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


def command(*words):
    import argparse

    from moerge_ext.training.cli import add_arguments, run

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


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
    assert command(*common, "--kind", "average-activation", "--max-length", 6) == 0
    assert read_gates(folder).keys() == {"sigmoid-gate", "average-activation"}
    assert capsys.readouterr().out.count("wrote ") == 2


def test_command_encodes_and_refuses(tmp_path):
    from moerge_ext.training.cli import collator, encode, read_rows

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
        read_rows(bad)
    bad.write_text("\n")
    with pytest.raises(ValueError, match="no examples"):
        read_rows(bad)
