"""The demo: its tasks, its shipped files, and that routing finds the experts."""

import json
import random

import pytest
import torch

pytest.importorskip("transformers")

from moerge_ext.demo import corpus  # noqa: E402
from moerge_ext.demo.tasks import TASKS, TEST_WORDS, held_in, held_out, is_test_word  # noqa: E402


def test_rules():
    rules = {
        "reverse": ("stone", "enots"),
        "shout": ("stone", "STONE"),
        "consonants": ("stone", "stn"),
        "stutter": ("cat", "ccaatt"),
        "title": ("stone", "Stone"),
        "spell": ("cat", "c-a-t"),
        "twice": ("cat", "cat cat"),
    }
    for name, (text, answer) in rules.items():
        assert TASKS[name].rule(text) == answer
    plurals = {"dog": "dogs", "fox": "foxes", "city": "cities", "boy": "boys", "beach": "beaches", "bush": "bushes"}
    assert {word: TASKS["plural"].rule(word) for word in plurals} == plurals


def test_generators_are_deterministic():
    assert held_in(5) == held_in(5) != held_in(5, seed=1)
    assert held_out(9) == held_out(9) != held_out(9, seed=1)
    task = TASKS["spell"]
    assert corpus.expert_turns(task, random.Random(3)) == corpus.expert_turns(task, random.Random(3))
    tokenizer = corpus.build_tokenizer()
    documents = [corpus.base_document(tokenizer, random.Random(4), 72) for _ in range(2)]
    assert documents[0] == documents[1]
    assert len(documents[0][0]) == len(documents[0][1]) == 72


def inputs_of(conversation):
    """The inputs in the requests of a conversation: what is left when the wording is taken away."""
    words = {w for task in TASKS.values() for wording in task.wordings for w in wording.replace("{}", "").split()}
    for request, _ in conversation.turns:
        for word in request.replace(",", "").split():
            if word not in words and word != "{previous}":
                yield word


def test_held_out_inputs_are_never_in_training_data():
    asked = {x for suite in {**held_in(60), **held_out(60)}.values() for c in suite for x in inputs_of(c)}
    assert asked == set(TEST_WORDS) and all(is_test_word(x) for x in asked)
    rng = random.Random(0)
    trained = {task.draw(rng) for task in TASKS.values() for _ in range(2000)}
    assert not any(is_test_word(x) for x in trained)


def test_experts_read_one_skill_and_compositions_need_two():
    rng = random.Random(0)
    for name, task in TASKS.items():
        foreign = [w.split()[0] for other in TASKS.values() if other.name != name for w in other.wordings]
        openings = {w.split()[0] for w in task.wordings}
        for _ in range(200):
            for request, _ in corpus.expert_turns(task, rng):
                for part in request.split(", "):
                    assert part.split()[0] in openings and part.split()[0] not in foreign
    for suite in held_out(50).values():
        assert all(len(set(c.skills)) == 2 for c in suite)


def test_the_base_never_reads_a_rule():
    rng = random.Random(0)
    right = asked = 0
    for _ in range(4000):
        kind, request, answer = corpus._request_and_form(rng)
        if kind in TASKS:
            asked += 1
            right += any(TASKS[kind].rule(word) == answer for word in request.split()[-1:] if word.isalnum())
    assert right <= asked * 0.01  # the other input may be the same word by chance


def test_relay_works_on_the_own_answer():
    for conversation in held_out(20)["relay"]:
        (_, first), (request, second) = conversation.turns
        assert request.count("{previous}") == 1
        assert TASKS[conversation.skills[1]].rule(first) == second


def test_tokenizer_round_trip(tmp_path):
    from transformers import AutoTokenizer

    corpus.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "> double letters of roof\nrroooff\n> after 39\n40\nTHE SEA, spell s-e-a.\n"
    ids = corpus.encode(tokenizer, text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(corpus.encode(tokenizer, "double")) == 1 and len(corpus.encode(tokenizer, "doubles")) == 7


@pytest.fixture(scope="module")
def assets():
    from moerge_ext.demo.embedded import load_assets

    return load_assets()


def test_assets_are_small_and_whole(assets):
    from moerge_ext.demo.assets import ASSETS, SIZE_LIMIT

    _, _, experts = assets
    files = [f for f in ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < SIZE_LIMIT
    assert set(experts.names) == set(TASKS)
    for module in experts.modules.values():
        assert module.present.all() and module.has_gate["sigmoid-gate"].all()
    assert not any(str(f.parent) in f.read_text() for f in files if f.suffix == ".json")


def test_every_expert_knows_its_skill_and_the_router_finds_it(assets):
    from moerge_ext.demo.embedded import patched
    from moerge_ext.demo.evaluate import accuracies

    model, tokenizer, experts = assets
    suites = held_in(8)
    before = model(torch.tensor([[1, 5, 9, 40]])).logits
    base = accuracies(model, tokenizer, suites)
    with patched(model, experts, "merged"):
        merged = accuracies(model, tokenizer, suites)
    with patched(model, experts, "phatgoose"):
        routed = accuracies(model, tokenizer, suites)
    oracle = {}
    for name in suites:
        with patched(model, experts, f"expert:{name}"):
            oracle[name] = accuracies(model, tokenizer, {name: suites[name]})[name]
    mean = {k: sum(v.values()) / len(v) for k, v in dict(b=base, m=merged, r=routed, o=oracle).items()}
    assert mean["b"] < 0.1
    assert mean["o"] > 0.85
    assert mean["r"] > 0.75 * mean["o"]
    assert mean["r"] > mean["m"] + 0.15
    assert torch.equal(model(torch.tensor([[1, 5, 9, 40]])).logits, before)


def test_the_command(assets, tmp_path, capsys):
    from moerge_ext.commands.main import main

    pytest.importorskip("matplotlib")
    numbers = tmp_path / "numbers.json"
    assert main(["demo", "--samples", "2", "--out", str(tmp_path), "--json", str(numbers)]) == 0
    assert set(json.loads(numbers.read_text())["held_in"]["PHATGOOSE"]) == set(TASKS)
    text = capsys.readouterr().out
    for word in ("PHATGOOSE", "k=4", "k=2", "uniform merge", "compositions", "tokens/s", "routing.png"):
        assert word in text
    assert (tmp_path / "routing.png").read_bytes()[:4] == b"\x89PNG"
