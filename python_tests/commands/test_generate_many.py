"""`moerge generate --prompts FILE --json`: many prompts, in batches, as lines of JSON."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import make_tokenizer, random_experts, tiny_llama
from query_cases import fake_embedder

import moerge_ext as moerge
from moerge_ext.commands import main as cli

ASKED = ["abc", "a", "hello there", "x y z", "the end"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    model = tiny_llama()
    model.save_pretrained(root / "model")
    tokenizer = make_tokenizer(root / "model")
    folders = random_experts(model, root / "experts", ["ant", "bee"], ["q_proj", "up_proj"])
    return root, model, tokenizer, folders


def words(setup, *more):
    root, _, _, folders = setup
    return [str(word) for word in ("generate", "--model", root / "model", "--experts", *folders.values(), *more)]


def answers(setup, capsys, *more):
    assert cli.main(words(setup, "--json", "--max-new-tokens", 5, *more)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def one_by_one(setup, prompts, around):
    """What the patched model writes after each prompt alone."""
    _, model, tokenizer, _ = setup
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with around(prompt), torch.no_grad():
            out = model.generate(ids, max_new_tokens=5, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_batches_answer_as_one_by_one(setup, tmp_path, capsys, monkeypatch):
    """From plain lines, JSON lines of every form and standard input alike, with the shares of each prompt alone."""
    _, model, _, folders = setup
    shares = []
    with moerge.patch(model, moerge.load_experts(folders), top_k=1) as handle:
        for prompt in ASKED:
            with handle.record() as trace:
                one_by_one(setup, [prompt], lambda _: torch.no_grad())
            shares.append(trace.share().tolist())
        want = one_by_one(setup, ASKED, lambda _: torch.no_grad())
    assert len(set(want)) > 1
    rows = [{"input": ASKED[0], "target": "t"}, {"prompt": ASKED[1], "id": 7}, *({"input": text} for text in ASKED[2:])]
    (tmp_path / "plain.txt").write_text("\n".join(ASKED[:2]) + "\n\n" + "\r\n".join(ASKED[2:]))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(ASKED)))
    for source, size in ((tmp_path / "plain.txt", 2), (tmp_path / "rows.jsonl", 16), ("-", 1)):
        got = answers(setup, capsys, "--prompts", source, "--batch-size", size, "--top-k", 1, "--trace")
        assert [(line["row"], line["prompt"], line["text"]) for line in got] == list(
            zip(range(5), ASKED, want, strict=True)
        )
        for line, share in zip(got, shares, strict=True):
            assert list(line["experts"].values()) == pytest.approx(share, abs=1e-3)
    (alone,) = answers(setup, capsys, ASKED[0], "--top-k", 1)
    assert alone == {"row": 0, "prompt": ASKED[0], "text": want[0]}
    assert cli.main(words(setup, "--prompts", tmp_path / "plain.txt", "--max-new-tokens", 5, "--top-k", 1)) == 0
    assert capsys.readouterr().out.startswith(f"[0] {ASKED[0]}\n{want[0]}\n[1] {ASKED[1]}\n{want[1]}\n")


def test_every_prompt_is_a_query_of_its_own(setup, tmp_path, capsys, monkeypatch):
    _, model, _, folders = setup
    for i, folder in enumerate(folders.values()):
        moerge.index_examples(folder, [{"input": text} for text in ASKED[2 * i : 2 * i + 2]], fake_embedder())
    monkeypatch.setattr("moerge_ext.commands.options.build_embedder", lambda *_: fake_embedder())
    (tmp_path / "plain.txt").write_text("\n".join(ASKED))
    more = ["--prompts", tmp_path / "plain.txt", "--embedder", "x", "--batch-size", 3]
    experts = moerge.load_experts(folders)
    for method in ("centroid", "retrieval_task"):
        got = [line["text"] for line in answers(setup, capsys, *more, "--method", method)]
        with moerge.patch(model, experts, method) as handle:
            handle.router = moerge.ExampleRouter(experts, fake_embedder())
            queries = handle.queries if method == "centroid" else lambda _: handle.queries(ASKED)  # noqa: B023
            assert got == one_by_one(setup, ASKED, queries), method


def test_templates_and_messages(setup, tmp_path, capsys):
    rows = [{"input": "a", "instruction": "own"}, {"input": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--prompts", tmp_path / "rows.jsonl", "--template", "{instruction}: {input}"]
    with moerge.patch(setup[1], moerge.load_experts(setup[3])):
        want = one_by_one(setup, ["own: a", "said: b"], lambda _: torch.no_grad())
    assert [line["text"] for line in answers(setup, capsys, *more, "--instruction", "said")] == want
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert cli.main(words(setup, *more[:2])) == 2
    assert "this tokenizer has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("", [], "the file has no rows"),
        ('{"oops": 1}\n{"input": "x"}', [], "line 1: expected"),
        ('{"input": "x"}\nplain', [], "line 2: not JSON"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', [], "must not be the assistant's"),
        ("a\nb", ["--template", "{oops}"], "prompt 0 (from 0): the template asks for {oops}"),
        ("a\n" + "b" * 200, [], "prompt 1 (from 0): the prompt has 20"),
        ("a\n" + "b" * 120, ["--max-new-tokens", "20"], "20 more do not fit the model's context of 128"),
        ("a", ["prompt"], "give one prompt or --prompts FILE, not both"),
        ("a", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (None, [], "there is no file"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_model_is_read(
    setup, tmp_path, capsys, monkeypatch, content, more, said
):
    monkeypatch.setattr("moerge_ext.models.pretrained.load_model", lambda *_, **__: pytest.fail("the model was read"))
    if content is not None:
        (tmp_path / "prompts").write_text(content)
    assert cli.main(words(setup, "--prompts", tmp_path / "prompts", *more)) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


def test_answers_are_shorter_where_the_longest_prompt_leaves_less(setup, tmp_path, capsys):
    (tmp_path / "prompts").write_text("a\n" + "b" * 120)
    assert cli.main(words(setup, "--prompts", tmp_path / "prompts", "--json")) == 0
    assert re.search("answers end after [78] tokens, what the longest prompt leaves", capsys.readouterr().err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_standard_output_is_one_line(setup, tmp_path):
    (tmp_path / "prompts").write_text("a\nb")
    for more in (["--prompts", tmp_path / "prompts", "--json"], ["a prompt"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "moerge_ext", *words(setup, "--max-new-tokens", 2, *more)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=300,
                env=os.environ | {"PYTHONPATH": str(Path(moerge.__file__).parents[1])},
            )
        lines = [line for line in done.stderr.splitlines() if line.startswith(("moerge", "Exception", "Traceback"))]
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert "standard output cannot be written" in lines[0] and "No space left on device" in lines[0]
