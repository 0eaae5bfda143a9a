"""What `train-router` and `ensemble` share: prompts, questions, judges, and what is made of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..ensemble.config import Config, read_experts
from ..ensemble.judge import JUDGES, Judge, is_right
from ..ensemble.llm_judge import LLMJudge
from ..ensemble.questions import Question, named_file, question_of
from ..evaluation import identity
from ..evaluation.runs import Run
from ..evaluation.tasks import Task
from ..files.counting import counted
from ..files.listing import at_rows
from ..files.meta import read_instructed_rows
from ..queries.cache import TextCache
from ..queries.embedder import Embedder, load_embedder
from ..queries.writer import InstructionWriter
from .model_options import add_model
from .options import KEY, add_embedder, build_embedder, load
from .progress import add_progress
from .prompt_options import add_prompt, prompt_of

LLM = "llm"  # the judge that is a language model
NEW_TOKENS = 64


def add_prompts_and_model(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    add = parser.add_argument
    add_model(parser)
    add("--prompts", required=True, type=Path, metavar="FILE", help="the prompt experts, see docs/ensemble.md")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="[NAME=]FILE",
        help='JSON lines {"input": question, "target": answer}, perhaps "targets": [...], "dataset"; a dataset a file '
        "(default name: the file's, or of nq/test.jsonl nq)",
    )
    add(
        "--judge",
        nargs="+",
        default=["exact"],
        metavar="[NAME=]JUDGE",
        help=f"when an answer is right: {', '.join(JUDGES)} or {LLM}, of all datasets or of one (default: exact)",
    )
    add("--judge-model", metavar="MODEL", help=f"of --judge {LLM}: a transformers model, or a model of --judge-url")
    add(
        "--judge-url",
        metavar="URL",
        help=f"an OpenAI-compatible server, such as http://localhost:8000/v1 (its key is read from ${KEY})",
    )
    add("--judge-timeout", type=float, default=60.0, metavar="S", help="seconds per verdict (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N questions of every file (default: all)")
    add("--max-new-tokens", type=int, help=f"of an answer (default: what --prompts says, else {NEW_TOKENS})")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; \\n is a line end; repeatable")
    add("--batch-size", type=int, default=16, help="questions at a time (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the backbone")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add_progress(parser)
    add_prompt(parser)
    add_embedder(parser)


def read_questions(args: argparse.Namespace) -> list[Question]:
    """The questions of every file; ValueError for arguments out of range, or with what is wrong with each file."""
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    form, questions, problems = prompt_of(args), [], []
    for dataset, path in map(named_file, args.data):
        rows = read_instructed_rows(path)[: args.limit]
        wrong = form.problems(rows)
        wrong += [
            f"{at_rows([i])}: a prompt expert is asked one question, got {counted(len(row.conversation), 'message')}"
            for i, row in enumerate(rows)
            if row.conversation is not None and len(row.conversation) > 1
        ]
        for i, row in enumerate(rows if not wrong else ()):
            try:
                questions.append(question_of(row, form.text(row), dataset))
            except ValueError as error:
                wrong.append(f"{at_rows([i])}: {error}")
        if wrong:
            problems.append(f"{path} cannot be asked:\n- " + "\n- ".join(wrong))
    if problems:
        raise ValueError("\n".join(problems))
    return questions


def build_judges(args: argparse.Namespace, questions: Sequence[Question]) -> dict[str, Judge]:
    """{dataset: judge}, each tried: on the gold answers, a language model on one question; ValueError if it fails."""
    said = {dataset: name for name, _, dataset in (text.rpartition("=")[::-1] for text in args.judge)}
    datasets = list(dict.fromkeys(question.dataset for question in questions))
    unknown = [name for name in said.values() if name not in (*JUDGES, LLM)]
    strange = [name for name in said if name and name not in datasets]
    if unknown or strange:
        raise ValueError(
            f"--judge takes {', '.join(JUDGES)} or {LLM}, alone or as NAME=JUDGE for the datasets "
            f"{', '.join(datasets)}; got {' '.join(args.judge)}"
        )
    chosen = {name: said.get(name, said.get("", "exact")) for name in datasets}
    model = _llm_judge(args) if LLM in chosen.values() else None
    judges = {name: model if kind == LLM else JUDGES[kind] for name, kind in chosen.items()}
    counts: dict[str, int] = {}
    for question in questions:
        row = counts[question.dataset] = counts.get(question.dataset, -1) + 1
        if judges[question.dataset] is not model:
            try:
                is_right(judges[question.dataset], question.text, question.golds[0], question.golds)
            except ValueError as error:
                raise ValueError(f"dataset {question.dataset}, row {row} (from 0): {error}") from error
    if model is not None:
        model.check()
    return judges


def _llm_judge(args: argparse.Namespace) -> LLMJudge:
    if not args.judge_model:
        raise ValueError(f"--judge {LLM} needs --judge-model MODEL, and for a model of a server --judge-url URL")
    if args.judge_timeout <= 0:
        raise ValueError(f"--judge-timeout must be positive, got {args.judge_timeout:g}")
    if args.judge_url:
        options = {"api_key": os.environ.get(KEY), "timeout": args.judge_timeout}
        return LLMJudge(InstructionWriter.from_endpoint(args.judge_url, args.judge_model, **options))
    return LLMJudge(InstructionWriter.from_transformers(args.judge_model, device=args.device))


def read_config(args: argparse.Namespace, path: Path | None = None) -> Config:
    """What --prompts says, or the file at `path`, its passages indexed."""

    def embedder(entry: Mapping[str, Any]) -> Embedder:
        if "embedder" not in entry:
            return build_embedder(args, args.device)
        options = {"prefix": entry.get("embedder_prefix", ""), "device": args.device}
        return load_embedder(entry["embedder"], mean_pool=bool(entry.get("mean_pool")), **options)

    return read_experts(path or args.prompts, embedder, prompt_of(args))


def build_ensemble(args: argparse.Namespace, config: Config) -> Any:
    """The ensemble of --model and a config, without a router."""
    from .. import load_experts, patch
    from ..ensemble.mixture import PromptEnsemble

    model, tokenizer = load(args)
    handle = patch(model, load_experts(config.loras), method="given", top_k=1) if config.loras else None
    return PromptEnsemble(model, tokenizer, config.experts, handle=handle, form=prompt_of(args))


def answering(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The options of `answers_of`."""
    return {
        "output": args.output,
        "batch_size": args.batch_size,
        "progress": not args.no_progress,
        "max_new_tokens": args.max_new_tokens or config.max_new_tokens or NEW_TOKENS,
        "stop": [text.replace("\\n", "\n") for text in args.stop] or list(config.stop),
    }


def deciding_answerers(runs: Sequence[Run], experts: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """{label: who answers} of the runs of methods that decode."""
    from ..ensemble.co_llm import CoLLM

    mine = [run for run in runs if run.method is not None and run.apart]
    return {run.label: CoLLM(model, tokenizer, experts, **run.options) for run in mine}


def read_configs(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Config]:
    """{file: what it says} of the runs of `moerge eval` that are ensembles, each read once; ValueError, with the run,
    for a file that cannot be used."""
    configs: dict[str, Config] = {}
    for run in [run for run in runs if run.ensemble is not None and run.ensemble not in configs]:
        try:
            configs[run.ensemble] = read_config(args, Path(run.ensemble))
        except ValueError as error:
            raise ValueError(f"{run.label}: {error}") from error
    return configs


def build_answerers(
    args: argparse.Namespace,
    runs: Sequence[Run],
    tasks: Sequence[Task],
    model: Any,
    tokenizer: Any,
    configs: Mapping[str, Config],
) -> dict[str, Any]:
    """{label: who answers} of the runs of `moerge eval` that are ensembles, whose files are those of `read_configs`.

    ValueError, with the run, for what is missing, and for tasks whose prompts do not fit the context.
    """
    from .. import load_experts, patch
    from ..ensemble.mixture import PromptEnsemble
    from ..ensemble.router import PromptRouter
    from ..ensemble.rows import EnsembleAnswerer

    made, known, form = {}, {}, prompt_of(args)
    for run in [run for run in runs if run.ensemble is not None]:
        try:
            if run.ensemble not in known:
                config = configs[run.ensemble]
                router = PromptRouter.load(config.router, device=args.device) if config.router is not None else None
                bank = load_experts(config.loras, base=args.model) if config.loras else None
                with patch(model, bank, method="given", top_k=1) if bank is not None else nullcontext() as handle:
                    ensemble = PromptEnsemble(model, tokenizer, config.experts, router, handle=handle, form=form)
                if any(expert.needs_samples for expert in config.experts):
                    content = identity.of_text(identity.of_model(model, tokenizer))
                    ensemble.sampler.keep(TextCache(args.output / "samples"), content)
                known[run.ensemble] = ensemble, bank, config
            ensemble, bank, config = known[run.ensemble]
            made[run.label] = EnsembleAnswerer(
                ensemble,
                bank=bank,
                top_k=int(run.options.get("top_k", config.top_k)),
                expert=run.options.get("expert"),
                stop=config.stop,
                answer_after=config.answer_after,
                max_new_tokens=config.max_new_tokens,
            )
            made[run.label].check(tasks, form, args.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{run.label}: {error}") from error
    return made
