"""What a newcomer gets wrong first, and what is said of it."""

from __future__ import annotations

import json

import pytest
from builders import make_tokenizer, random_experts
from gate_builders import (
    llama,
    one_thread,  # noqa: F401 (used by being here)
)
from safetensors.torch import load_file, save_file

from moerge_ext.commands import main as cli
from moerge_ext.commands.main import COMMANDS, FOREIGN, parser

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    model = llama()
    model.save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    random_experts(model, folder, ["a", "b"], ["q_proj"])
    for task in ("one", "two"):
        (folder / "tasks" / task).mkdir(parents=True)
        (folder / "tasks" / task / "test.jsonl").write_text(json.dumps({"input": "a:", "target": "b"}))
    (folder / "list.json").write_text(json.dumps([{"input": "a:", "target": "b"}] * 2, indent=1))
    return folder


@pytest.fixture
def refused(there, monkeypatch, capsys):
    """words -> what the command says when it refuses, before a model is read."""

    def call(words: str) -> str:
        with monkeypatch.context() as patched:
            patched.chdir(there)
            patched.setattr(
                "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("the model was read")
            )
            assert cli.main(words.split()) == 2
        return capsys.readouterr().err

    return call


TRAIN = "--output made --device cpu --no-progress --steps 1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"train-expert model --data tasks/one {TRAIN}", "tasks/one is a folder, expected a file: JSON lines"),
        (f"train-expert model --data tasks/one {TRAIN}", "; it holds test.jsonl"),
        (f"train-expert model --data list.json {TRAIN}", "is one JSON document (a list of 2), not JSON lines"),
        ("generate --prompts list.json --model model", "list.json is one JSON document (a list of 2)"),
        ("eval --model model --tasks tasks --methods base", "is no task but holds 2 (one, two): pass them, tasks/*"),
        ("eval --model model --tasks tasks/one --split dev --methods base", "holds no dev.jsonl: a task is a"),
        ("explain hello model --experts a", "PROMPT is the folder of a model, 'model', and MODEL is none"),
        (f"train-expert model --data tasks/one/test.jsonl {TRAIN} --target-modules nope",
         "--target-modules nope: no layer of LlamaForCausalLM is called so; its linear layers are q_proj, k_proj"),
        ("new-expert model --output made --target-modules .*nope",
         "--target-modules .*nope: no layer of LlamaForCausalLM is called so"),
        (f"train-routers model --experts a b --method pemt --data tasks/one/test.jsonl {TRAIN}",
         "an instruction of a, b: `moerge describe --adapter DIR --embedder MODEL --instruction TEXT`"),
        ("describe --adapter a --embedder model",
         "pass --examples FILE and --writer MODEL, or --instruction TEXT, or --examples FILE and --index N"),
        ("describe --adapter a", "model, or with --mean-pool any encoder; and pass --examples FILE"),
        ("generate a --model model --method arrow", "method 'arrow' needs --experts DIR ..."),
    ],
)  # fmt: skip
def test_it_is_said(refused, words, said):
    assert said in refused(words)


def test_a_name_among_others_is_warned_of(there, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(there)
    with pytest.warns(UserWarning, match="nope: no layer of LlamaForCausalLM is called so"):
        assert cli.main(["new-expert", "model", "--output", "x", "--target-modules", "q_proj", "nope"]) == 0


def test_a_model_alone_answers(there, monkeypatch, capsys):
    monkeypatch.chdir(there)
    words = ["generate", "copy a:", "--model", "model", "--max-new-tokens", "4", "--no-progress"]
    assert cli.main(words) == 0
    alone = capsys.readouterr().out
    assert cli.main([*words, "--method", "base", "--experts", "a"]) == 0 and capsys.readouterr().out == alone
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].strip() == alone.strip()


def test_no_default_is_none(capsys):
    for name in COMMANDS.keys() - set(FOREIGN):
        with pytest.raises(SystemExit):
            parser(name).parse_args([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "default: None" not in text and "(None" not in text, name
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parser("train-routers").parse_args(["train-routers", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps (default: 250 for lora_flow; 400 for mole, ramole; 500 for" in text and "else 8)" in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--embedder model", "--embedder-name NAME, such as all-MiniLM-L6-v2: --embedder model does not say which"),
        ("--embedder model", "--adapter DIR --embedder model --embedder-name NAME --instruction TEXT`"),
        ("--embedder model --embedder-name mini --embedder-prefix q: --mean-pool",
         "--embedder model --embedder-name mini --embedder-prefix q: --mean-pool --instruction TEXT`"),
        ("--embedder org/mini", "--adapter DIR --embedder org/mini --instruction TEXT`"),
    ],
)  # fmt: skip
def test_describe_is_told_with_the_embedder_of_the_call(refused, more, said):
    told = refused(f"eval --model model --experts a b --tasks tasks/one --methods glider --output out {more}")
    assert said in told, told


def test_what_makes_the_routers_is_said(refused):
    for command in ("generate x", "explain x"):
        told = refused(f"{command} --model model --method mole --experts a b")
        assert "'mole' needs --routers FILE, which `moerge train-routers --method mole` writes" in told
    told = refused("eval --model model --experts a b --tasks tasks/one --methods mole --output out")
    assert "mole needs --routers FILE, from `moerge train-routers --method mole`" in told
    told = refused("generate x --model model --experts a b --method mole --routers model")
    assert "`moerge train-routers` writes such files" in told


TASK = "--tasks tasks/one --output out --methods"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate x --model model --experts a b --method expert:nope", "no expert named 'nope'; there are: a, b"),
        (
            "generate x --model model --experts a b --top-k 3",
            "top_k=3 is more than the number of experts, E=2: pass --top",
        ),
        ("generate x --model model --experts a b --option top_k=3", "top_k=3 is more than the number of experts"),
        ("generate x --model model --experts a b --method average_activation", "compute it with `moerge train-gates"),
        ("generate x --model model --experts a other", "on_proj"),
        ("explain x --model model --experts a b --top-k 3", "top_k=3 is more than the number of experts"),
        ("doctor --model model --experts a b --method expert:nope", "no expert named 'nope'"),
        (f"eval --model model --experts a b {TASK} phatgoose/top_k=3", "top_k=3 is more than the number of experts"),
        (f"eval --model model --experts a b {TASK} expert:nope", "no expert named 'nope'"),
        (f"eval --model model --experts a b {TASK} average_activation", "compute it with `moerge train-gates"),
        (f"inspect --model model --experts a b {TASK} average_activation", "compute it with `moerge train-gates"),
    ],
)
def test_what_does_not_fit_is_said_before_the_weights_are_read(refused, there, words, said):
    if not (there / "other").exists():
        other = llama()
        for layer in other.model.layers:
            layer.self_attn.on_proj = layer.self_attn.v_proj
            del layer.self_attn.v_proj
        random_experts(other, there, ["other"], ["on_proj"])
    assert said in refused(words)


def test_the_weights_have_a_say_where_an_expert_brings_some_of_its_own(there, monkeypatch, capsys):
    """Such an expert is held against the model's values, which are read for it."""
    monkeypatch.chdir(there)
    random_experts(llama(), there, ["own"], ["q_proj"])
    weights, head = there / "own" / "adapter_model.safetensors", llama().lm_head.weight.detach()
    save_file(load_file(weights) | {"base_model.model.lm_head.weight": head.contiguous()}, weights)
    config = json.loads((there / "own" / "adapter_config.json").read_text())
    (there / "own" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    words = ["generate", "a:", "--model", "model", "--experts", "a", "own", "--max-new-tokens", "1", "--no-progress"]
    assert cli.main(words) == 0, capsys.readouterr().err
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("read"))
    assert cli.main([*words, "--top-k", "3"]) == 2
    assert "top_k=3 is more than the number of experts, E=2" in capsys.readouterr().err


def test_what_may_be_meant_is_said(refused):
    assert "did you mean 'model'?" in refused("generate x --model modle --experts a b")
    assert "did you mean 'tasks/one'?" in refused("generate x --model model --experts a tasks/oen")
    assert "did you mean 'tasks/one'?" in refused("generate x --model model --experts a taks/one")
    assert "did you mean" not in refused("generate x --model model --experts a taks/nothing")
    for command in ("eval", "inspect"):
        told = refused(f"{command} --model model --experts a b --tasks tasks/one --output out --methods arrw")
        assert "unknown method 'arrw'; did you mean 'arrow'?" in told


def test_no_command_lists_them(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr().err
    assert all(f"\n    {name} " in told for name in COMMANDS if len(name) < 18)
