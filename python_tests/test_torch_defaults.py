"""What a program has told torch to do by default (types, devices, autocast, gradients) changes no result."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gate_builders
import moe_cases
import patch_cases
import pytest
import torch
from builders import random_experts, tiny_llama
from query_cases import described, fake_embedder, fake_writer

import moerge_ext as moerge

ROOT = Path(moerge.__file__).parent
MADE = ("zeros", "ones", "empty", "eye", "rand", "randn", "linspace")  # of the default type
OTHERS = ("full", "tensor", "as_tensor", "arange", "randint", "randperm")
# "meta" stands for the device of a GPU: what is made there by mistake holds no values
DEFAULTS = [("dtype", torch.bfloat16), ("dtype", torch.float64), ("device", "meta")]
OPTIONS = {"merged": {}, "glider": {"top_k": 2, "threshold": 0.5}}


@contextmanager
def default(what: str, value) -> Iterator[None]:
    change = torch.set_default_dtype if what == "dtype" else torch.set_default_device
    change(value)
    try:
        yield
    finally:
        change(torch.float32 if what == "dtype" else None)


def letters(texts: list[str]) -> list[list[float]]:
    """How often each letter is in a text: plain numbers, as an endpoint sends them."""
    return [[0.1 + text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def test_every_new_tensor_says_where_and_of_which_type():
    silent = []
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
                continue
            if function.value.id != "torch" or function.attr not in (*MADE, *OTHERS):
                continue
            needed = {"device", "dtype"} if function.attr in MADE else {"device"}
            if missing := needed - {keyword.arg for keyword in node.keywords}:
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno}: torch.{function.attr} without {missing}")
    assert not silent, "\n".join(silent)


def test_the_package_can_be_imported_then():
    code = "import torch; torch.set_default_device('meta'); torch.set_default_dtype(torch.bfloat16); import moerge_ext"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("what", "value"), DEFAULTS)
@pytest.mark.parametrize("method", ["phatgoose", "arrow_peft", "arrow_mttl", "merged", "given", "glider"])
def test_patched_models_compute_the_same(method, what, value, tmp_path):
    model, ids = tiny_llama(), patch_cases.tokens()
    folders = random_experts(model, tmp_path, ("ant", "bee", "cat"), ("q_proj", "down_proj"))
    embedder = moerge.Embedder(letters, name="letters")
    if method == "glider":
        described(folders, embedder)

    def results() -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        bank = moerge.load_experts(folders)
        handle = moerge.patch(own, bank, method, **OPTIONS.get(method, {"top_k": 2}))
        if method == "merged":
            return [patch_cases.logits(own, input_ids=ids)]
        if method == "given":
            block = handle.affinities([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
        elif method == "glider":
            handle.router = moerge.QueryRouter(bank, embedder, fake_writer())
            block = handle.queries(["a cat", "two ants"])
        else:
            block = handle.record()
        with block as trace:
            got = [patch_cases.logits(own, input_ids=ids)]
        return got if trace is None else [*got, *trace.load().values()]

    want = results()
    with default(what, value):
        got = results()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(("what", "value"), DEFAULTS)
def test_experts_of_a_mixture_too(what, value, tmp_path):
    model, ids = moe_cases.build("qwen3_moe"), patch_cases.tokens()
    for seed, (name, layout) in enumerate((("ant", "whole"), ("bee", "apart"))):
        moe_cases.adapter("qwen3_moe", model, tmp_path / name, seed, layout=layout)
        moe_cases.gates(model, tmp_path / name, seed)

    def result() -> torch.Tensor:
        with moerge.patch(model, moerge.load_experts([tmp_path / "ant", tmp_path / "bee"]), top_k=2):
            return patch_cases.logits(model, input_ids=ids)

    want = result()
    with default(what, value):
        got = result()
    assert torch.equal(got, want)


@pytest.mark.parametrize(("what", "value"), DEFAULTS)
def test_gates_are_trained_alike(what, value, tmp_path):
    model = gate_builders.llama()
    folder = gate_builders.make_adapter(model, tmp_path / "ant")
    rows = [{"input_ids": batch["input_ids"][0]} for batch in gate_builders.batches(count=6)]

    def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([feature["input_ids"] for feature in features])
        return {"input_ids": ids, "labels": ids}

    def losses(target: Path) -> list[float]:
        options = {"steps": 3, "batch_size": 2, "collate_fn": collate, "progress": False}
        return moerge.train_gates(copy.deepcopy(model), folder, rows, output_dir=target, **options).losses

    want = losses(tmp_path / "want")
    with default(what, value):
        got = losses(tmp_path / "got")
    assert got == want


def test_queries_are_scored_as_without_autocast(tmp_path):
    model, ids = tiny_llama(), patch_cases.tokens()
    experts = described(random_experts(model, tmp_path, ("ant", "bee", "cat"), ("q_proj", "down_proj")))
    handle = moerge.patch(model, experts, "glider_code", top_k=2)
    handle.router = moerge.QueryRouter(experts, fake_embedder(), fake_writer())

    def answer(enabled: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            block = handle.queries(["flying after digging and purring", "digging while flying twice"])
            block.__enter__()
        got = patch_cases.logits(model, input_ids=ids)
        block.__exit__(None, None, None)
        return got

    assert torch.equal(answer(True), answer(False))
