"""Described experts, queries in a batch, thresholds: GLIDER from text to routed tokens."""

from __future__ import annotations

import json

import patch_cases as cases
import pytest
import torch
from builders import make_tokenizer
from query_cases import WORDS, bag_of_words, described, fake_embedder, fake_writer
from safetensors import safe_open
from safetensors.torch import save_file

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.evaluation.identity import of_router
from moerge_ext.experts.formats.peft import read_gates
from moerge_ext.queries.index import read_index

KIND = "instruction-embedding"
QUERIES = ["flying", "digging"]


@pytest.fixture
def folders(tmp_path):
    model = cases.build("llama")
    return cases.builders.random_experts(model, tmp_path, cases.NAMES, cases.DECODER)


@pytest.fixture
def experts(folders):
    return described(folders)


def router(experts, **options):
    return moerge.QueryRouter(experts, fake_embedder(), fake_writer(), **options)


# ---- describe --------------------------------------------------------------------------------------------------------


def test_describe_writes_beside_the_gates(folders):
    before = read_gates(folders["ant"])["sigmoid-gate"]
    rows = [{"input": f"number {i}", "target": "x"} for i in range(9)]
    made = moerge.describe(folders["ant"], rows, fake_embedder(), fake_writer(), seed=3)
    assert made.path.name == f"moerge_gates.{KIND}.safetensors"
    sets = read_gates(folders["ant"])
    assert all(torch.equal(sets["sigmoid-gate"].gates[k], v) for k, v in before.gates.items())
    assert torch.equal(sets[KIND].global_vector, bag_of_words([made.instruction])[0])
    facts = sets[KIND].metadata
    assert facts["instruction"] == made.instruction and facts["embedder"] == "bag" and facts["writer"] == "echo"
    assert facts["examples"] == "3" and facts["seed"] == "3" and facts["base_model"] == "tiny"
    assert facts["template"] == "GLIDER, appendix A.1"
    assert moerge.describe(folders["ant"], rows, fake_embedder(), fake_writer(), seed=3).instruction == made.instruction


def test_describe_refuses_and_writes_nothing(folders, tmp_path):
    def describe(rows=(), writer=None, folder=folders["bee"], embedder=None, **options):
        moerge.describe(folder, rows, embedder or fake_embedder(), writer, **options)

    bad = moerge.Embedder(lambda texts: torch.zeros(1, 4), name="zeros")
    for call, text in [
        (lambda: describe([], fake_writer()), "at least 3 examples, got 0"),
        (lambda: describe([{"text": "a"}] * 3, fake_writer()), '"input" and "target"'),
        (lambda: describe(), "expected a writer"),
        (lambda: describe(instruction=" "), "instruction is empty"),
        (lambda: describe(writer=fake_writer(), instruction="do it"), "not both"),
        (lambda: describe(folder=tmp_path / "nowhere", instruction="do it"), "nowhere"),
        (lambda: describe(embedder=bad, instruction="do it"), "zero or not finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    assert KIND not in read_gates(folders["bee"])


def test_the_bank_keeps_what_the_files_say(experts, tmp_path):
    assert experts.global_metadata[KIND]["bee"]["instruction"] == "please do flying"
    moved = experts.to("cpu", torch.float32)
    assert moved.global_metadata == experts.global_metadata
    experts.save_gates({"bee": tmp_path / "copy"}, kind=KIND)
    assert read_gates(tmp_path / "copy")[KIND].metadata["instruction"] == "please do flying"
    experts.set_gates("bee", {}, KIND, torch.ones(32), {"instruction": "new"})
    assert experts.global_metadata[KIND]["bee"] == {"instruction": "new"}


# ---- affinities ------------------------------------------------------------------------------------------------------


def test_affinities_are_cosines_of_instructions(experts):
    scores = router(experts).affinities(QUERIES)
    assert scores.shape == (2, 3) and scores.argmax(1).tolist() == [1, 0]
    torch.testing.assert_close(scores.amax(1), torch.ones(2))
    vectors = bag_of_words(["please do flying", "please do purring"])
    want = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
    torch.testing.assert_close(scores[0, 2], want)


def test_variants_are_labelled(experts):
    def similar(text):
        return [{"input": "a", "target": "b"}] * 3

    assert router(experts).variant == "zero-shot"
    assert router(experts, similar=similar).variant == "few-shot"
    assert router(experts, similar=similar).affinities(QUERIES).shape == (2, 3)
    bare = moerge.QueryRouter(experts, fake_embedder())
    assert bare.variant == "no writer" and bare.describe("flying") == ["flying"]
    with pytest.raises(ValueError, match="pass a writer"):
        moerge.QueryRouter(experts, fake_embedder(), similar=similar)
    rows = [{"input": "flying", "target": "x"}] * 3
    assert router(experts).task_affinities(rows).argmax().item() == 1
    assert bare.task_affinities(rows).shape == (1, 3)


def test_mismatched_experts_and_embedders_are_named(folders, experts):
    with pytest.raises(ValueError) as caught:
        moerge.QueryRouter(experts, fake_embedder("other"))
    assert all(
        f"'{name}' was described with embedder 'bag', the queries' is 'other'" in str(caught.value) for name in WORDS
    )
    changed = moerge.Embedder(lambda texts: bag_of_words([text[::-1] for text in texts]), name="bag")
    with pytest.raises(ValueError, match=r"is not the model .*the instruction of '\w+' has cosine 0.\d+"):
        moerge.QueryRouter(experts, changed)
    longer = moerge.Embedder(lambda texts: torch.ones(len(texts), 7), name="bag")
    with pytest.raises(ValueError, match="vectors of 7 numbers, the experts' have 32"):
        moerge.QueryRouter(experts, longer)
    next(folders["cat"].glob(f"*{KIND}*")).unlink()
    with pytest.raises(ValueError, match="no global vector for cat: make it with `moerge describe"):
        moerge.QueryRouter(moerge.load_experts(folders), fake_embedder())


# ---- the handle ------------------------------------------------------------------------------------------------------


def patched(experts, method="glider_code", **options):
    model = cases.build("llama")
    handle = moerge.patch(model, experts, method=method, **options)
    handle.router = router(experts)
    return model, handle


def test_every_sequence_is_routed_by_its_own_query(experts):
    model, handle = patched(experts, alpha=1000)
    inputs = cases.batch("llama", rows=2)
    with handle.queries(QUERIES), handle.record() as trace:
        got = cases.logits(model, **inputs)
    assert trace.share()[:2].min() > 0.49 and trace.share()[2] < 0.01
    for row, query in enumerate(QUERIES):
        with handle.queries(query):  # one text serves all rows
            alone = cases.logits(model, **{key: value[row : row + 1] for key, value in inputs.items()})
        assert cases.error(got[row : row + 1], alone) < 1e-5


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_keeps_rows_and_beams_together(experts, decoding):
    model, handle = patched(experts, alpha=1000)
    inputs = {"input_ids": cases.tokens(2), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **decoding}
    with handle.queries(QUERIES):
        got = model.generate(**inputs, **options)
    per_row = len(got) // 2
    for row, query in enumerate(QUERIES):
        with handle.queries(query):
            alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **options)
        assert torch.equal(got[row * per_row : (row + 1) * per_row], alone)


def test_queries_that_do_not_fit_are_refused(experts):
    model, handle = patched(experts)
    before = len(model._forward_pre_hooks)
    with handle.queries(QUERIES), pytest.raises(ValueError, match="2 rows of affinities .* batch of 3: give as many"):
        model(cases.tokens(3, length=8))  # 24 tokens would divide among 2 rows
    with pytest.raises(RuntimeError, match="handle.queries"):
        model(cases.tokens(2))
    assert len(model._forward_pre_hooks) <= before
    handle.router = None
    with pytest.raises(ValueError, match="handle.router = moerge_ext.QueryRouter"), handle.queries(QUERIES):
        pass
    handle.remove()
    with pytest.raises(ValueError, match="removed"), handle.queries(QUERIES):
        pass
    handle = moerge.patch(model, experts, method="phatgoose")  # without a router
    with pytest.raises(ValueError, match="'phatgoose' does not read queries"), handle.queries(QUERIES):
        pass
    handle.remove()
    some = moerge.load_experts(dict(zip(experts.names[:2], experts.folders[:2], strict=True)))
    handle = moerge.patch(model, some, method="glider", threshold=0.5, top_k=1)
    with pytest.raises(ValueError, match="over the experts ant, bee; got one .* ant, bee, cat"):
        handle.queries(QUERIES, router(experts)).__enter__()


def test_nested_queries_come_back(experts):
    model, handle = patched(experts, alpha=1000)
    inputs = cases.batch("llama", rows=2)
    with handle.queries(QUERIES):
        before = cases.logits(model, **inputs)
        with handle.queries("purring"):
            inner = cases.logits(model, **inputs)
        assert torch.equal(cases.logits(model, **inputs), before) and not torch.equal(inner, before)


# ---- a language model picks the expert -------------------------------------------------------------------------------


def test_ask_llm_routes_by_the_picked_number(experts):
    prompts = []

    def pick(prompt):
        prompts.append(prompt)
        return "<think>1?</think> Task 2." if "flying" in prompt.split("\n")[0] else "1"

    asked = moerge.AskRouter(experts, moerge.InstructionWriter(pick, name="picker"))
    model = cases.build("llama")
    handle = moerge.patch(model, experts, "ask_llm")
    inputs = cases.batch("llama", rows=3)
    with handle.queries([*QUERIES, "flying"], asked):
        got = cases.logits(model, **inputs)
    assert len(prompts) == 2 and "2. please do flying\n3. please do purring" in prompts[0]
    own = moerge.AskRouter(experts, asked.writer, template="{count}|{input}|{instructions}")
    assert own.scores(["flying {count}"], {}).argmax() == 1
    assert prompts.pop() == "3|flying {count}|1. please do digging\n2. please do flying\n3. please do purring"
    with pytest.raises(ValueError, match=r"a template must hold \{input\} and \{instructions\}, got 'pick'"):
        moerge.AskRouter(experts, asked.writer, template="pick").scores(["x"], {})
    handle.remove()
    for row, expert in enumerate(("bee", "ant", "bee")):
        with moerge.patch(model, experts, f"expert:{expert}"):
            want = cases.logits(model, **{key: value[row : row + 1] for key, value in inputs.items()})
        assert cases.error(got[row : row + 1], want) < 1e-5
    for nonsense in ("none of them", "7", None):
        asked.writer = moerge.InstructionWriter(lambda _, said=nonsense: said, name="picker")
        with pytest.raises(ValueError, match="writer 'picker': expected a number from 1 to 3, got"):
            asked.scores(["x"], {})
    experts.global_metadata[KIND]["ant"] = {}
    with pytest.raises(ValueError, match="no instruction for ant: write it with `moerge describe"):
        moerge.AskRouter(experts, asked.writer)


def test_similar_examples_are_the_nearest_others():
    rows = [{"input": text, "target": "x"} for text in ("a b", "a c", "d e", "a b c")]
    nearest = moerge.similar_examples(fake_embedder(), rows, 2)
    assert [row["input"] for row in nearest("a b")] == ["a b c", "a c"]
    with pytest.raises(ValueError, match="at least 3 solved examples, got 2"):
        moerge.similar_examples(fake_embedder(), rows[:2])
    assert nearest.digest != moerge.similar_examples(fake_embedder(), rows[::-1], 2).digest


def test_indexed_texts_make_the_router_few_shot(folders):
    """GLIDER's setting: the writer sees the three indexed examples that are most like the query, of all experts."""
    prompts = []

    def spy(prompt):
        prompts.append(prompt)
        return "please do " + prompt.split("Input: ")[-1]

    writer, embedder = moerge.InstructionWriter(spy, name="spy"), fake_embedder()
    rows = {name: [{"input": f"{word} {i}", "target": f"{word}!"} for i in "ab"] for name, word in WORDS.items()}
    for name, folder in folders.items():
        moerge.index_examples(folder, rows[name], embedder)
    experts = described(folders, embedder)
    assert moerge.QueryRouter(experts, embedder, writer).variant == "zero-shot"  # vectors alone show nothing
    for name in ("ant", "bee"):
        moerge.index_examples(folders[name], rows[name], embedder, texts=True)
    router = moerge.QueryRouter(experts, embedder, writer)
    assert router.variant == "few-shot" and router.affinities(["flying"]).argmax() == 1
    pairs = [f"- Input: flying {i}\n- Output: flying!" for i in "ab"]
    assert all(pair in prompts[-1] for pair in pairs) and prompts[-1].count("- Output:") == 3
    assert prompts[-1].endswith("- Input: flying")
    assert moerge.QueryRouter(experts, embedder, writer, similar=None).variant == "zero-shot"
    assert moerge.QueryRouter(experts, embedder).variant == "no writer"
    assert of_router(router) != of_router(moerge.QueryRouter(experts, embedder, writer, similar=None))
    other = moerge.InstructionWriter(spy, name="spy", template="Say what to do: {examples}")
    assert of_router(router) != of_router(moerge.QueryRouter(experts, embedder, other))
    with pytest.raises(ValueError, match="similar must be a callable .* 'indexed' or None, got 'index'"):
        moerge.QueryRouter(experts, embedder, writer, similar="index")


@pytest.mark.parametrize("said", [b"[[1, 2], [3, 4]]", b"{", b'[["a", "b"]]', b"[" * 100_000])
def test_texts_of_an_index_that_are_none_are_refused(said, folders):
    path = moerge.index_examples(folders["ant"], [{"input": "a", "target": "b"}] * 2, fake_embedder(), texts=True)
    assert read_index(folders["ant"], "bag").rows == ({"input": "a", "target": "b"},) * 2
    with safe_open(path, "pt") as file:
        metadata, vectors = file.metadata(), file.get_tensor("embeddings")
    texts = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    save_file({"embeddings": vectors, "texts": texts}, path, metadata)
    with pytest.raises(ValueError, match="its texts are not the 2 pairs of input and target"):
        read_index(folders["ant"], "bag")
    with pytest.raises(ValueError, match='texts=True keeps solved examples: every row needs "input" and "target"'):
        moerge.index_examples(folders["ant"], [{"text": "a"}], fake_embedder(), texts=True)


# ---- the threshold ---------------------------------------------------------------------------------------------------


def test_a_threshold_belongs_to_its_embedder(experts, folders):
    model, handle = patched(experts, method="glider")
    with pytest.raises(ValueError, match=r"0.8 belongs to nomic-embed-text-v1.5.*call calibrate_threshold"):
        handle.queries(QUERIES).__enter__()
    handle.router.threshold = 0.6
    assert handle.router.settings("glider", handle.options)["threshold"] == 0.6
    assert handle.router.settings("glider", {"threshold": 0.7})["threshold"] == 0.7
    with handle.queries(QUERIES):
        bias = handle._state.bias
    torch.testing.assert_close(bias.amax(1), torch.full((2,), 103.0))
    paper = fake_embedder("nomic-embed-text-v1.5")
    own = moerge.QueryRouter(described(folders, paper), paper)
    assert own.settings("glider", {"threshold": None})["threshold"] is None  # the method's 0.8
    assert own.settings("glider_code", {"alpha": 3.0}) == {"alpha": 3.0}


def test_experts_that_say_the_same_are_named(folders):
    """One sentence for all tasks: warned of when the router is made, and seen in the calibration."""
    embedder = fake_embedder()
    first, *rest = folders
    described(folders, embedder)
    moerge.describe(folders[rest[0]], [], embedder, instruction=f"please do {WORDS[first]}")
    with pytest.warns(UserWarning, match=f"the instructions of '{first}' and '{rest[0]}' mean nearly the same"):
        router = moerge.QueryRouter(moerge.load_experts(folders), embedder)
    asked = {name: [f"please do {WORDS[name]}"] * 3 for name in folders}
    assert moerge.calibrate_threshold(router, asked).own == {name: float(name != rest[0]) for name in folders}


def test_calibration(experts, tmp_path, monkeypatch):
    mine = router(experts)
    held_in = {name: [word] * 9 + ["something else"] for name, word in WORDS.items()}
    found = moerge.calibrate_threshold(mine, held_in, {"unknown": ["weather report", "tall towers"]}, keep=0.85)
    assert mine.threshold == found.threshold < 1
    share = found.above()
    assert all(share[name] >= 0.8 for name in WORDS) and share["unknown"] == 0
    assert found.held_in["ant"].shape == (10, 3) and found.held_out["unknown"].shape == (2, 3)
    assert found.by_expert()["ant"]["bee"] == pytest.approx(mine.affinities(held_in["ant"])[:, 1].mean().item())
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, scatter = [], axes.scatter
    monkeypatch.setattr(axes, "scatter", lambda self, x, y, **o: drawn.append(x) or scatter(self, x, y, **o))
    assert found.plot(tmp_path / "plots" / "scores.png").stat().st_size > 5000
    experts_of = [dots for dots in drawn if len(dots) == 3]
    assert experts_of == [list(row.values()) for row in found.by_expert().values()]  # every expert of every task
    assert [dots for dots in drawn if len(dots) == 1] == [[found.by_expert()[name][name]] for name in WORDS]
    for queries, text in (({}, "got none for any"), ({"ant": []}, "got none for ant")):
        with pytest.raises(ValueError, match=text):
            moerge.calibrate_threshold(mine, queries)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\), got 1"):
        moerge.calibrate_threshold(mine, held_in, keep=1)


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOERGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny-bert"
    cases.build("bert").save_pretrained(folder)
    make_tokenizer(folder)
    return ["--embedder", str(folder), "--mean-pool"]


def test_describe_and_generate_commands(folders, encoder, tmp_path, capsys):
    writer = tmp_path / "writer"  # random weights
    cases.build("llama").save_pretrained(writer)
    make_tokenizer(writer)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"input": f"a {i}", "target": "b"}) for i in "xyz"))
    for name, folder in folders.items():
        words = ["--adapter", str(folder), "--instruction", f"please do {WORDS[name]}", *encoder]
        assert cli.main(["describe", "--overwrite", *words, "--examples", str(data), "--index", "2"]) == 0
    assert "instruction: please do purring" in capsys.readouterr().out
    words = ["generate", "abc", "--model", str(writer), "--method", "glider", "--max-new-tokens", "3", "--trace"]
    words += ["--experts", *map(str, folders.values())]
    assert cli.main([*words, "--option", "threshold=0.5", *encoder]) == 0
    assert "share of the routing weight" in capsys.readouterr().out
    as_nearest = ["retrieval" if word == "glider" else word for word in words]
    assert cli.main([*as_nearest, *encoder]) == 0
    assert "100.0%" in capsys.readouterr().out
    assert cli.main([*words, *encoder]) == 2
    assert "belongs to nomic-embed-text-v1.5" in capsys.readouterr().err
    before = read_gates(folders["ant"])[KIND].metadata
    words = ["--adapter", str(folders["ant"]), "--examples", str(data), "--writer", str(writer)]
    assert cli.main(["describe", "--overwrite", *words, *encoder]) == 2
    assert "more than the model's context of 128" in capsys.readouterr().err
    assert read_gates(folders["ant"])[KIND].metadata == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "pass --examples FILE and --writer MODEL, or --instruction TEXT"),
        (["--instruction", "x", "--writer", "y"], "leave --writer out"),
        (["--instruction", "x", "--index", "5"], "--index takes the number of --examples to embed"),
        (["--instruction", "x", "--writer-url", "http://y"], "--writer-url needs --writer MODEL"),
        (["--instruction", "x", "--writer-timeout", "0"], "--writer-timeout must be positive and finite, got 0"),
        (["--writer", "x"], "--writer writes from examples: pass --examples FILE"),
        (["--instruction", "x", "--hidden-layer", "-2"], "--hidden-layer is for --index alone"),
    ],
)
def test_describe_command_explains(folders, words, text, capsys):
    assert cli.main(["describe", "--adapter", str(folders["ant"]), "--embedder", "none", *words]) == 2
    assert text in capsys.readouterr().err
