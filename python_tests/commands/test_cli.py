"""The `moerge` command, run as functions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import random_experts, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moerge_ext import METHODS, load_experts, patch
from moerge_ext.commands import main as cli
from moerge_ext.methods.option_text import parse_option


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama with a word tokenizer on disk, and two experts."""
    root = tmp_path_factory.mktemp("cli")
    model = tiny_llama()
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    model.save_pretrained(root / "model")
    fast.save_pretrained(root / "model")
    experts = random_experts(model, root / "experts", ["cat", "dog"], ["q_proj", "up_proj"])
    return root / "model", [str(p) for p in experts.values()]


def generate(folders, *more: str, prompt: str = "w5 w6 w7") -> int:
    model, experts = folders
    return cli.main(["generate", prompt, "--model", str(model), "--experts", *experts, "--max-new-tokens", "6", *more])


def test_generate_streams_the_routed_models_text(folders, capsys):
    assert generate(folders) == 0
    printed = capsys.readouterr().out.split()
    model = tiny_llama()
    patch(model, load_experts(folders[1]))
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:]
    assert printed == [f"w{i}" for i in ids.tolist() if i > 2]


def test_generate_takes_all_experts(folders, capsys):
    said = []
    for more in (["--top-k", "all"], ["--option", "top_k=none"], ["--top-k", "2"], ["--top-k", "1"]):
        assert generate(folders, "--method", "arrow", "--option", "temperature=10.0", "--trace", *more) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != said[3]


def test_generate_traces_and_takes_options(folders, capsys):
    assert generate(folders, "--method", "arrow", "--top-k", "1", "--option", "temperature=0.5", "--trace") == 0
    out = capsys.readouterr().out
    assert "share of the routing weight" in out and "cat" in out and "dog" in out


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--method", "nonsense"], "phatgoose"),
        (["--method", "avrage_activation"], "did you mean 'average_activation'?"),
        (["--method", "average_activation"], "or choose a method that needs no gates, such as arrow"),
        (["--top-k", "9"], "top_k=9 is more than the number of experts, E=2"),
        (["--option", "oops"], "NAME=VALUE"),
        (["--top-k", "1", "--option", "top_k=2"], "not both"),
        (["--option", "bogus=1"], "unknown option(s) bogus"),
        (["--temperature", "2"], "--sample"),
        (
            ["--sample", "--temperature", "0"],
            "--temperature must be positive and finite, got 0",
        ),
        (["--chat"], "no chat template"),
        (["--option", "top_p=abc"], "top_p must be a number in (0, 1] or none, got 'abc'"),
        (["--option", "scale=abc"], "scale must be a finite number"),
        (["--option", "backend=reference"], "unknown option(s) backend"),
        (["--option", "self=1"], "unknown option(s) self"),
        (["--method", "arrow", "--option", "scale_by_width=2"], "scale_by_width must be true or false, got 2"),
        (["--method", "glider"], "glider cannot route yet; it needs:\n- --embedder MODEL"),
        (["--method", "knn"], "- indexed examples of cat, dog: `moerge describe"),
        (["--method", "base", "--top-k", "1"], "the model alone, routes nothing: leave --top-k out"),
        (["--method", "model:other"], "here another model is --model other, without --experts"),
        (["--method", "oracle_dataset"], "is a row of `moerge eval`"),
        (["--method", "given"], "method 'given' takes weights from you"),
        (["--method", "ask_llm"], "ask_llm cannot route yet; it needs:\n- --writer MODEL"),
        (
            ["--method", "zooter"],
            "- --query-router DIR, made by `moerge train-query-router zooter`\n- --embedder MODEL",
        ),
        (
            ["--method", "glider_code"],
            "--embedder MODEL, a sentence-transformers model, or with --mean-pool any encoder\n"
            "- a description of cat, dog: `moerge describe",
        ),
        (["--method", "merged", "--trace"], "routes nothing; leave --trace out"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--method", "lorahub"], "use `moerge eval`, or moerge_ext.lorahub"),
    ],
)
def test_generate_explains_what_is_wrong(folders, capsys, more, text):
    assert generate(folders, *more) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nosuch", "no/such"])
def test_what_is_not_there_is_named(folders, capsys, monkeypatch, name):
    def nothing(*_args, **_kwargs):
        raise OSError("the hub says no\nand much more")

    monkeypatch.setattr("moerge_ext.files.hub.unreached", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", nothing)
    told = "was not found: there is no local folder of that name, and the hub has no such {} for you (the hub says no)"
    for config, what in ((lambda *_: "there", "tokenizer"), (nothing, "model")):
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", config)
        assert generate(folders, "--model", name) == 2
        assert f"{what} '{name}' " + told.format(what) in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    assert generate(folders, "--experts", name) == 2
    assert f"there is no local folder '{name}', and " in capsys.readouterr().err
    assert generate(folders, "--model", str(folders[0].parent)) == 2  # a folder without a model
    assert "holds no tokenizer that transformers can load" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--option", "top_p=abc"], ["--method", "glider"], ["--device", "meta"], ["--chat"]])
def test_generate_refuses_before_the_model_is_read(folders, monkeypatch, more):
    def read(*_args, **_kwargs):
        pytest.fail("the model was read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    assert generate(folders, *more) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_generate_on_a_device_that_is_not_there(folders, capsys):
    assert generate(folders, "--device", "cuda") == 2
    error = capsys.readouterr().err
    assert "device 'cuda' cannot be used here" in error and "expected a device such as cpu" in error


@pytest.mark.parametrize("prompt", ["", "  "])
def test_generate_without_a_token(folders, capsys, prompt):
    assert generate(folders, prompt=prompt) == 2
    assert f"the prompt {prompt!r} has no token" in capsys.readouterr().err


def test_generate_takes_the_prompt_anywhere_and_experts_repeated(folders, capsys):
    model, (cat, dog) = str(folders[0]), folders[1]
    assert generate(folders) == 0
    want = capsys.readouterr().out
    short = ["--max-new-tokens", "6"]
    for words in (
        ["--model", model, "--experts", cat, dog, "--method", "phatgoose", *short, "w5 w6 w7"],
        ["--model", model, "--experts", cat, "--experts", dog, *short, "w5 w6 w7"],
        ["--model", model, *short, "--experts", cat, dog, "--", "w5 w6 w7"],
        ["--model", model, "w5 w6 w7", "--experts", cat, *short, "--experts", dog],
    ):
        assert cli.main(["generate", *words]) == 0
        assert capsys.readouterr().out == want


def test_generate_says_where_a_swallowed_prompt_went(folders, capsys):
    model, experts = folders
    assert cli.main(["generate", "--model", str(model), "--experts", *experts, "w5 w6 w7"]) == 2
    error = capsys.readouterr().err
    assert "no prompt: put it first" in error and "after another option" in error and "'w5 w6 w7'" in error


def test_a_missing_library_is_a_message(folders, capsys, monkeypatch):
    def missing(_args):
        raise ImportError('the heatmap needs matplotlib: pip install "moerge_ext[plot]"')

    monkeypatch.setattr("moerge_ext.commands.generate.run", missing)
    assert generate(folders) == 2
    assert capsys.readouterr().err == 'moerge generate: the heatmap needs matplotlib: pip install "moerge_ext[plot]"\n'


def test_parse_option():
    assert parse_option("a=1") == ("a", 1)
    assert parse_option("a=1.5") == ("a", 1.5)
    assert parse_option("a=none") == ("a", None)
    assert parse_option("a=True") == ("a", True)
    assert parse_option("a=factored") == ("a", "factored")
    assert parse_option("neighbours=all") == ("neighbours", "all") and parse_option("top_k=all") == ("top_k", None)


def test_methods_lists_every_row(capsys):
    assert cli.main(["methods", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS) and "expert:<name>" in out
    for text in ("gamma=100.0, beta=3.0; top_k=2, normalize=standardize", "top_p=None", "embedder: all-MiniLM-L6-v2"):
        assert text in out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for command in ("doctor", "methods", "generate", "train-gates", "describe", "demo"):
        assert command in out


def test_help_needs_no_torch(tmp_path):
    """`moerge --help` answers at once; another program with the same words still gets the whole package."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import moerge_ext\nassert callable(moerge_ext.patch)\n")
    (tmp_path / "program" / "__main__.py").write_text("print('ran')\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=os.environ | paths, timeout=300, check=True
        )
        return done.stdout + done.stderr

    said = run("-X", "importtime", "-m", "moerge_ext", "--help")
    assert "train-router" in said and not re.search(r"\|\s+torch\b", said)
    assert run("-m", "program", "--help") == "ran\n"


def test_methods_can_be_named(capsys):
    assert cli.main(["methods", "glider", "expert:cat", "calm", "glider"]) == 0
    out = capsys.readouterr().out
    assert "Out-of-Distribution" in out and "arXiv 2410.07172" in out and "phatgoose" not in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("glider", "expert:<name>", "calm"))] == (
        ["glider", "expert:<name>", "calm"] * 3
    )
    assert cli.main(["methods", "phatgoos"]) == 2
    assert "did you mean 'phatgoose'?" in capsys.readouterr().err


def test_doctor_explains_the_layers_of_a_model(tmp_path, capsys):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folders = random_experts(model, tmp_path, ["cat", "dog"], ["q_proj", "up_proj"]).values()
    assert cli.main(["doctor", "--model", str(tmp_path / "base"), "--experts", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "All fits." in out and " x Linear " in out and "not base layer and branch in one op: " in out
    assert cli.main(["doctor", "--model", str(tmp_path / "base")]) == 2
    assert "--model and --experts go together" in capsys.readouterr().err
