"""Published adapters and tasks (../shared/data): five GPT-2 experts as their authors put them on the hub, and experts
trained here on real tasks over a real small Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from patch_cases import error, logits
from torch import Tensor, nn

import moerge_ext as moerge

GPT2 = ("legal_parikshit", "medical_parikshit", "sports_parikshit", "review_shibbir24", "tigrinya")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost time on a model of 0.26M parameters."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(shared) -> Path:
    if not (shared / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return shared / "data"


# ---- five GPT-2 adapters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    """GPT-2 small as published, 768 wide and 12 layers, with random weights and a small vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, bos_token_id=1, eos_token_id=2)).eval()


@pytest.fixture(scope="module")
def folders(data) -> dict[str, Path]:
    return {name: data / "adapters" / f"gpt2_{name}" for name in GPT2}


def test_gpt2_experts_load_and_route(gpt2, folders):
    experts = moerge.load_experts(folders)
    assert len(experts) == 5 and {module.rank for module in experts.modules.values()} == {8}
    ids = {"input_ids": torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))}
    plain = logits(gpt2, **ids)
    for method, options in {"arrow": {}, "arrow_phatgoose": {}, "merged": {}, "expert:legal_parikshit": {}}.items():
        got = {}
        for backend in ("native", "reference"):
            with moerge.patch(gpt2, experts, method=method, backend=backend, **options):
                got[backend] = logits(gpt2, **ids)
        assert error(got["native"], got["reference"]) < 1e-5, method
        assert error(got["native"], plain) > 1e-4, method
    assert torch.equal(logits(gpt2, **ids), plain)
    with moerge.patch(gpt2, experts, method="arrow") as handle, handle.record() as trace:
        gpt2.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    review = GPT2.index("review_shibbir24")  # c_attn alone
    for module, counts in trace.counts().items():
        assert not module.endswith("c_proj") or counts[review] == 0, module
        assert counts.sum() == 4 * 2 * (8 + 3), module
    assert sum(counts[review] for counts in trace.counts().values()) > 0


@pytest.mark.filterwarnings("ignore")
def test_each_gpt2_expert_equals_peft(gpt2, folders):
    from peft import PeftModel

    experts = moerge.load_experts(folders)
    ids = {"input_ids": torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(1))}
    for name, folder in folders.items():
        with moerge.patch(gpt2, experts, method=f"expert:{name}"):
            got = logits(gpt2, **ids)
        theirs = PeftModel.from_pretrained(gpt2, folder).eval()
        want = logits(theirs, **ids)
        theirs.unload()
        assert error(got, want) < 1e-5, name


def test_gpt2_experts_lack_gates(gpt2, folders):
    with pytest.raises(ValueError, match="train-gates"):
        moerge.patch(gpt2, moerge.load_experts(folders), method="phatgoose")


# ---- experts of our own on a real Llama ------------------------------------------------------------------------------

TASKS = ("clinc_travel", "clinc_banking")
STEPS = {"expert": 200, "gates": 20}


@pytest.fixture(scope="module")
def stories(data):
    """(model, tokenizer); the stop token is <s>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data / "base_lm" / "stories260K" / "hf"
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


def rows(data: Path, task: str, split: str, count: int) -> list[dict[str, str]]:
    lines = (data / "tasks" / "train" / task / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def prompt(tokenizer, text: str) -> list[int]:
    return [1, *tokenizer.encode(text + "\n", add_special_tokens=False)]


def collate(tokenizer):
    """Features -> a right-padded batch; the loss is taken on the target and the stop token."""

    def made(features: list[dict[str, str]]) -> dict[str, Tensor]:
        ids, labels = [], []
        for feature in features:
            start = prompt(tokenizer, feature["input"])
            answer = [*tokenizer.encode(feature["target"], add_special_tokens=False), 1]
            ids.append(torch.tensor(start + answer))
            labels.append(torch.tensor([-100] * len(start) + answer))
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        return {
            "input_ids": pad(ids, batch_first=True),
            "attention_mask": mask,
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    return made


@torch.no_grad()
def exact_match(model, tokenizer, examples: list[dict[str, str]]) -> float:
    """Greedy answers in one left-padded batch."""
    starts = [prompt(tokenizer, example["input"]) for example in examples]
    width = max(map(len, starts))
    ids = torch.tensor([[0] * (width - len(start)) + start for start in starts])
    mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return sum(a.strip() == e["target"] for a, e in zip(answers, examples, strict=True)) / len(examples)


@pytest.fixture(scope="module")
def trained(data, stories, tmp_path_factory) -> dict[str, Path]:
    """{task: PEFT folder with gates}, trained once for the tests of this file."""
    pytest.importorskip("peft")
    from moerge_ext.training.experts import train_expert
    from moerge_ext.training.gates import train_gates

    model, tokenizer = stories
    folders = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    for task, folder in folders.items():
        options = {"collate_fn": collate(tokenizer), "batch_size": 16, "progress": False}
        examples = rows(data, task, "train", 5000)
        train_expert(model, examples, folder, steps=STEPS["expert"], **options)
        train_gates(model, folder, examples, steps=STEPS["gates"], **options)
    return folders


@pytest.mark.slow
def test_routed_experts_answer_real_tasks(data, stories, trained):
    """Nobody tells the routed model the task; the oracle is each task's own expert."""
    model, tokenizer = stories
    experts = moerge.load_experts(trained)
    tests = {task: rows(data, task, "test", 100) for task in TASKS}
    scores: dict[str, dict[str, float]] = {"base": {}, "oracle": {}, "merged": {}, "arrow": {}, "phatgoose": {}}
    for task, examples in tests.items():
        scores["base"][task] = exact_match(model, tokenizer, examples)
        with moerge.patch(model, experts, method=f"expert:{task}"):
            scores["oracle"][task] = exact_match(model, tokenizer, examples)
        for method, options in {"merged": {}, "arrow": {"top_k": 2}, "phatgoose": {}}.items():
            with moerge.patch(model, experts, method=method, **options):
                scores[method][task] = exact_match(model, tokenizer, examples)
    print("\nexact match", json.dumps(scores, indent=1))
    mean = {name: sum(values.values()) / len(TASKS) for name, values in scores.items()}
    assert mean["base"] < 0.05
    assert min(scores["oracle"].values()) > 0.3
    # two experts, two selected, and few gate steps: far from the oracle, but ahead of the uniform merge
    assert mean["phatgoose"] > max(mean["merged"], mean["base"])


@pytest.mark.slow
def test_routed_backends_agree_on_real_experts(data, stories, trained):
    model, tokenizer = stories
    experts = moerge.load_experts(trained)
    inputs = collate(tokenizer)(rows(data, TASKS[0], "test", 8))
    got = {}
    for backend in ("native", "reference"):
        with moerge.patch(model, experts, backend=backend):
            got[backend] = logits(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert error(got["native"], got["reference"]) < 1e-5


def test_an_expert_and_gates_in_seconds(data, stories, tmp_path):
    """The whole path, too short to learn much: the loss falls, the gates are there, routed generation runs."""
    pytest.importorskip("peft")
    from moerge_ext.training.experts import train_expert
    from moerge_ext.training.gates import train_gates

    model, tokenizer = stories
    options = {"collate_fn": collate(tokenizer), "batch_size": 4, "progress": False}
    folders = {}
    for task in TASKS:
        examples = rows(data, task, "train", 40)
        result = train_expert(model, examples, tmp_path / task, steps=12, **options)
        assert sum(result.losses[-3:]) < sum(result.losses[:3])
        train_gates(model, tmp_path / task, examples, steps=2, **options)
        folders[task] = tmp_path / task
    with moerge.patch(model, moerge.load_experts(folders)) as handle, handle.record() as trace:
        assert 0 <= exact_match(model, tokenizer, rows(data, TASKS[0], "test", 4)) <= 1
    assert trace.share().sum().item() == pytest.approx(1) and len(trace.load()) == 7 * 5
