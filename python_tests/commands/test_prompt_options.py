"""One way to say a prompt: trained with, noted, asked with, compared; and refused before any work."""

from __future__ import annotations

import json
import warnings

import builders
import pytest
import torch
from builders import chat_tokenizer, make_tokenizer, random_experts
from gate_builders import llama
from safetensors import safe_open

from moerge_ext import PromptFormat, load_experts
from moerge_ext.commands import main as cli
from moerge_ext.experts.prompt_notes import noted_prompts
from moerge_ext.training.encoding import encode

pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing|rows are longer|ends texts|never right)")

ROWS = [{"input": f"copy {c}:", "target": c * 3, "n": c} for c in "abcdef"]
FORM = ["--template", "{instruction} {input}={n}", "--chat"]
FILES = ["adapter_model.safetensors", "moerge_gates.average-activation.safetensors", "moerge_gates.safetensors"]


@pytest.fixture
def folder(tmp_path):
    """A model whose tokenizer has a chat template, a task with an instruction, and no experts yet."""
    llama().save_pretrained(tmp_path / "model")
    chat_tokenizer(tmp_path / "model")
    (tmp_path / "task").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "task" / f"{split}.jsonl", ROWS)
    (tmp_path / "task" / "meta.json").write_text('{"instruction": "do"}')
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(*words):
    return cli.main([*map(str, words)])


def trained(folder, *form):
    data, expert = ["--data", folder / "task" / "train.jsonl"], folder / "expert"
    more = ["--device", "cpu", "--no-progress", "--overwrite", *form]
    assert call("train-expert", folder / "model", *data, "--output", expert, "--rank", 2, "--steps", 1, *more) == 0
    assert call("train-gates", folder / "model", expert, *data, "--steps", 1, *more) == 0
    assert call("train-gates", folder / "model", expert, *data, "--kind", "average-activation", *more) == 0
    return expert


def evaluated(folder, expert, *more, command="eval"):
    words = [
        command,
        "--overwrite",
        "--model",
        folder / "model",
        "--experts",
        expert,
        "--tasks",
        folder / "task",
        "--no-progress",
    ]
    return call(*words, "--output", folder / "out", "--methods", "phatgoose", "--top-k", 1, *more)


def test_what_was_trained_is_noted_and_compared(folder, capsys, recwarn):
    expert = trained(folder, *FORM)
    noted = noted_prompts(expert)
    assert list(noted) == FILES and set(noted.values()) == {PromptFormat(FORM[1], chat=True)}
    with safe_open(expert / FILES[0], "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    generate = ["generate", "x", "--model", folder / "model", "--experts", expert, "--top-k", 1, "--max-new-tokens", 2]
    calls = [
        lambda *form: evaluated(folder, expert, "--limit", 1, *form),
        lambda *form: evaluated(folder, expert, "--limit", 1, *form, command="inspect"),
        lambda *form: call(*generate, *(["--instruction", "do"] if form else []), *form),
    ]
    told = "experts are asked with another prompt"
    for ask in calls:
        recwarn.clear()
        asked = FORM if ask is not calls[2] else ["--template", "{instruction} {input}", "--chat"]
        assert ask(*asked) == 0, capsys.readouterr().err
        said = [str(w.message) for w in recwarn if told in str(w.message)]
        assert bool(said) == (ask is calls[2])
        recwarn.clear()
        assert ask() == 0
        (said,) = [str(w.message) for w in recwarn if told in str(w.message)]
        assert "(--template '{input}')" in said
        assert said.endswith(f"\n- --template '{FORM[1]}' --chat: expert")


def test_joint_training_notes_it_in_both_files(folder):
    expert = trained(folder)
    words = ["train-gates", folder / "model", expert, "--data", folder / "task" / "train.jsonl", "--joint"]
    assert call(*words, "--output", folder / "j", "--steps", 1, "--device", "cpu", "--no-progress", *FORM) == 0
    assert list(noted_prompts(folder / "j").items()) == [(file, PromptFormat(FORM[1], True)) for file in FILES[::2]]


def test_texts_have_no_prompt_and_batches_none_that_is_known(folder):
    write(folder / "task" / "train.jsonl", [{"text": "abc"}])
    assert noted_prompts(trained(folder)) == {}
    random = random_experts(llama(), folder, ["plain"], ["q_proj"])["plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_experts([random])
    assert noted_prompts(random) == {}


def test_the_same_ids_in_training_evaluation_and_generation(folder, monkeypatch):
    """Rows of every form, with and without --chat."""
    from moerge_ext.evaluation.answers import Answerer

    model, tokenizer = llama(), chat_tokenizer(folder / "model")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for row, form in (
        (ROWS[0], PromptFormat("q {input}", chat=True)),
        (ROWS[0], PromptFormat("q {input}")),
        ({"messages": messages}, PromptFormat()),
        ({"prompt": messages[:1], "completion": messages[1:]}, PromptFormat("q {input}")),
        ({"prompt": "hi", "completion": "yo"}, PromptFormat("{prompt} {input}", chat=True)),
    ):
        from moerge_ext.files.examples import as_example

        feature = encode(row, tokenizer, 60, seq2seq=False, prompt=form)
        asked = Answerer(model, tokenizer).prompt_ids(form.prompt(as_example(row), tokenizer))
        target = [label for label in feature["labels"] if label != -100]
        assert feature["input_ids"] == asked + target and feature["labels"][: len(asked)] == [-100] * len(asked)
        assert tokenizer.decode(target[:-1]).replace(" ", "") == as_example(row)["target"]


def test_rows_of_a_dialogue_train_and_are_evaluated(folder, capsys):
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    for split in ("train", "test"):
        write(folder / "task" / f"{split}.jsonl", [{"messages": said}, {"prompt": said[:1], "completion": said[1:]}])
    expert = trained(folder)
    assert set(noted_prompts(expert).values()) == {PromptFormat(chat=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="experts are asked with another prompt")
        assert evaluated(folder, expert) == 0, capsys.readouterr().err
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert [row["n"] for row in rows] == [2]


def test_stored_answers_depend_on_the_prompt(folder, capsys):
    expert = trained(folder)
    for form in ([], ["--chat"], ["--template", "{n}"], FORM):
        for reused in (0, 6):
            assert evaluated(folder, expert, *form) == 0
            assert f"{reused} stored answers reused" in capsys.readouterr().out or not reused
    assert len(list((folder / "out" / "answers" / "task").glob("*.jsonl"))) == 4
    tokenizer = chat_tokenizer(folder / "model")
    tokenizer.chat_template = tokenizer.chat_template.replace("a:", "b:")
    tokenizer.save_pretrained(folder / "model")
    assert evaluated(folder, expert, "--chat") == 0
    assert "stored answers reused" not in capsys.readouterr().out


def no_model(*_args, **_kwargs):
    pytest.fail("the model was read")


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_all_tasks_are_refused_before_the_model_is_read(folder, capsys, monkeypatch, command):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    expert = random_experts(llama(), folder, ["expert"], ["q_proj"])["expert"]
    (folder / "other").mkdir()
    write(folder / "other" / "test.jsonl", ROWS[:2])
    template = ["--tasks", folder / "other", "--template", "{instruction}{m}"]
    assert evaluated(folder, expert, *template, command=command) == 2
    error = capsys.readouterr().err
    assert "task task: rows 0, 1, 2 and 3 more (from 0): the template asks for {m}, and the row has only in" in error
    assert "task other: rows 0, 1 (from 0): the template asks for {instruction}, and" in error
    make_tokenizer(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    assert evaluated(folder, expert, "--chat", command=command) == 2
    assert "--chat: this tokenizer has no chat template" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_prompts_that_do_not_fit_are_all_said_before_the_first_answer(folder, capsys, monkeypatch, command):
    monkeypatch.setattr("moerge_ext.evaluation.answers.Answerer.generate", no_model)
    monkeypatch.setattr("moerge_ext.evaluation.answers.Answerer.log_likelihoods", no_model)
    expert = random_experts(llama(), folder, ["expert"], ["q_proj"])["expert"]
    long = {"input": "a" * 62, "target": "bcd"}
    write(folder / "task" / "test.jsonl", [*ROWS, {**long, "target": "b", "choices": ["b", "cde"]}])
    (folder / "other").mkdir()
    write(folder / "other" / "test.jsonl", [{"input": "", "target": "b"}, long])
    assert evaluated(folder, expert, "--tasks", folder / "other", command=command) == 2
    error = capsys.readouterr().err
    longest = {"eval": 62 + 4, "inspect": 62 + 2}[command]
    if command == "eval":
        assert f"task task: row 6 (from 0): a prompt with its answer has {longest} tokens, more than the cont" in error
    assert "task other: row 0 (from 0): the prompt '' has no token" in error
    assert "task other: row 1 (from 0): a prompt with its answer has 66 tokens" in error


@pytest.mark.parametrize("command", ["train-expert", "train-gates"])
def test_training_refuses_before_the_model_is_read(folder, capsys, monkeypatch, command):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    data = folder / "task" / "train.jsonl"
    expert = random_experts(llama(), folder, ["expert"], ["q_proj"])["expert"]
    words = [command, folder / "model", *([expert] if command == "train-gates" else [])]
    words += ["--data", data, "--output", folder / "e", "--device", "cpu"]
    assert call(*words, "--template", "{m}") == 2
    assert "rows 0, 1, 2 and 3 more (from 0): the template asks for {m}" in capsys.readouterr().err
    assert call(*words, "--template", "m") == 2
    assert "the template must contain {input}" in capsys.readouterr().err
    make_tokenizer(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(data, [ROWS[0], {"messages": messages}])
    assert call(*words) == 2
    told = capsys.readouterr()
    assert f"{data} cannot be used:\n- row 1 (from 0): rows of messages: this tokenizer has no chat temp" in told.err
    assert not told.out, "the plan of a run that does not begin"
    write(data, [{"text": "abc"}])
    assert call(*words, "--chat") == 2
    assert 'a chat template needs "input" and "target"' in capsys.readouterr().err
    (folder / "task" / "meta.json").write_text("[]")  # somebody else's, of which nothing is asked
    with pytest.raises(pytest.fail.Exception, match="the model was read"):
        call(*words, "--template", "{text}{text}")


def test_generate_takes_the_template_and_fits_the_context(folder, capsys):
    expert = random_experts(llama(), folder, ["expert"], ["q_proj"])["expert"]

    def generate(prompt, *more):
        code = call("generate", prompt, "--model", folder / "model", "--experts", expert, "--top-k", 1, *more)
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    six = ["--max-new-tokens", "6"]
    assert generate("x", "--template", "q {input}\\n", *six) == generate("q x\n", *six) != generate("x", *six)
    assert generate("x", "--template", "{instruction}{input}", "--instruction", "a", *six) == generate("ax", *six)
    assert generate("x", "--chat", *six) == generate("u:x.a:", *six)
    assert "or --instruction" in generate("x", "--template", "{instruction}{input}", *six)
    assert "the prompt has 64 tokens, and the model's context is 64: shorten" in generate("a" * 64)
    assert "pass --max-new-tokens 4 at most, or shorten" in generate("a" * 60, *six)
    for length in (1, 60):
        assert "context" not in generate("a" * length)  # with as many as fit


def test_the_prompts_of_an_ensemble(folder, capsys, monkeypatch):
    from moerge_ext.commands.ensemble import add_arguments
    from moerge_ext.commands.ensemble_options import build_ensemble, read_config, read_questions

    (folder / "prompts.json").write_text(json.dumps([{"name": "one", "template": {"question": "q {input}"}}]))
    words = ["--model", folder / "model", "--prompts", folder / "prompts.json", "--router", folder / "none"]
    parser = cli.argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([*map(str, words), "--data", str(folder / "task" / "test.jsonl"), *FORM])
    assert read_questions(args)[0].text == "do copy a:=a"
    mix, seen = build_ensemble(args, read_config(args)), []
    real = mix.asked.generate
    mix.asked.generate = lambda prompts, *a, **o: seen.extend(prompts) or real(prompts, *a, **o)
    mix.answer_by("one", ["x"], max_new_tokens=2)
    assert [prompt.text for prompt in seen] == ["u:q x.a:"]
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    write(folder / "task" / "test.jsonl", [{"messages": said}, {"messages": said * 2}])
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): a prompt expert is asked one question, got 3 messages"):
        read_questions(args)


def test_a_prompt_without_a_tokenizer_is_refused(tmp_path):
    from moerge_ext import train_expert

    with pytest.raises(ValueError, match="pass tokenizer= and rows of text with it"):
        train_expert(builders.tiny_llama(), [{"input_ids": torch.ones(1, 2).long()}], tmp_path, prompt=PromptFormat())
