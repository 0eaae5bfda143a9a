"""Who decides for the rows that need more than tokens: everything that is described, indexed or trained over a pool.

What is trained over the pool sees the same rows of every held-in task once, at the method's own learning rate: POOLED,
or DENSE where a step asks all experts. Routers of texts are trained on POOLED inputs of each task, or on the answers of
every expert to JUDGED validation rows of each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bench.quality import real, real_tasks
from bench.quality.real_batches import batches, collate
from bench.quality.real_written import Written
from moerge_ext import Embedder, average_activation, describe, index_examples, load_experts, train_routers
from moerge_ext.ensemble.co_llm import CoLLM
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.judged_answers import judged_answers
from moerge_ext.evaluation.runs import Run, parse_run
from moerge_ext.evaluation.tasks import Task, load_task
from moerge_ext.experts.bank import ExpertBank
from moerge_ext.experts.gates import gates_file, read_gates
from moerge_ext.experts.kinds import AVERAGE_ACTIVATION, SIGMOID_GATE
from moerge_ext.experts.routers import ROUTERS_FILE, read_routers
from moerge_ext.methods import get_method
from moerge_ext.methods.base import HIDDEN_STATES
from moerge_ext.methods.fixed import PREFIX
from moerge_ext.models import smollm2
from moerge_ext.queries.benchmark import train_benchmark
from moerge_ext.queries.calibration import calibrate_threshold
from moerge_ext.queries.classifier import train_classifier_of_data
from moerge_ext.queries.example_router import ExampleRouter
from moerge_ext.queries.index import index_file
from moerge_ext.queries.likelihood import LikelihoodRouter
from moerge_ext.queries.load_text_router import load_text_router
from moerge_ext.queries.retriever import train_retriever
from moerge_ext.queries.router import AskRouter, QueryRouter
from moerge_ext.queries.routoo import train_routoo
from moerge_ext.queries.strong_weak import train_classifier, train_factorization
from moerge_ext.queries.text_router import FILE
from moerge_ext.queries.tfidf import train_tfidf
from moerge_ext.queries.writer import InstructionWriter
from moerge_ext.queries.zooter import train_zooter
from moerge_ext.training.encoding import Encoder
from moerge_ext.training.lorahub import LoraHubRouter

ACTIVATIONS, INDEXED, HIDDEN_INDEXED, CALIBRATION = 32, 200, 64, 20  # examples per expert
POOLED, DENSE, JUDGED = 24, 8, 6  # rows of every held-in task
SPARSE = ("lora_flow", "meteora")
HIDDEN_LAYER = -2
WHOLE_POOL = "Answer the question, or do what the instruction says."  # what all tasks together ask for


class OwnInstructions:
    """In place of a writer: what a query's task asks for, as its meta.json says it."""

    name = "the tasks' own instructions"
    similar = None
    templates = ()

    def __init__(self, tasks: Sequence[Task]):
        self.known = {row["input"]: row["instruction"] for task in tasks for row in (*task.rows, *task.examples())}

    def query(self, text: str, similar: Sequence[dict] = ()) -> str:
        return self.known[text]

    def task(self, examples: Sequence[dict]) -> str:
        return self.known[examples[0]["input"]]


class Deciders:
    """Routers of one pool over one base, each made when it is first asked for and kept in the cache."""

    def __init__(self, places: real.Places, names: Sequence[str], encoder: str, model: nn.Module, tokenizer: Any):
        self.places, self.names, self.encoder = places, tuple(names), encoder
        self.model, self.tokenizer = model, tokenizer
        self.embedder = Embedder.from_sentence_transformers(encoder, name=real.EMBEDDER)
        self.base = Embedder.from_hidden_states(model, tokenizer, layer=HIDDEN_LAYER, name=smollm2.NAME)
        for name in names:
            self._describe(name)
        self.pool = load_experts([places.expert(name) for name in names])
        self._written: Written | None = None

    def of(self, places: real.Places) -> Deciders:
        """The same of experts that lie elsewhere."""
        return Deciders(places, self.names, self.encoder, self.model, self.tokenizer)

    def _describe(self, name: str) -> None:
        """Describe an expert by its task's instruction, index its examples, take the mean inputs of its layers."""
        folder, rows = self.places.expert(name), self.places.rows(name, "train")
        if not (folder / index_file(self.embedder.name)).is_file():
            describe(folder, [], self.embedder, instruction=self.places.instruction(name))
            index_examples(folder, random.Random(0).sample(rows, min(INDEXED, len(rows))), self.embedder)
        if AVERAGE_ACTIVATION not in read_gates(folder):
            rows = random.Random(1).sample(rows, ACTIVATIONS)
            made = Encoder(self.model, self.tokenizer, prompt=real.FORM).features(rows)
            parts = [collate(made[i : i + 16], self.tokenizer.pad_token_id) for i in range(0, len(made), 16)]
            average_activation(self.model, folder, parts)

    def known(self, pool: ExpertBank | None = None) -> dict[str, Any]:
        """By the query itself; pool: these experts, loaded in another way."""
        pool = pool or self.pool
        return {
            "instruction": self._calibrated(QueryRouter(pool, self.embedder)),
            "examples": ExampleRouter(pool, self.embedder),
        }

    def told(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """By the instruction of the query's task."""
        return {"instruction": self._calibrated(QueryRouter(self.pool, self.embedder, OwnInstructions(tasks)))}

    def _calibrated(self, router: QueryRouter) -> QueryRouter:
        held_in = {}
        for name in self.names:
            rows = random.Random(0).sample(self.places.rows(name, "validation"), CALIBRATION)
            if isinstance(router.writer, OwnInstructions):
                router.writer.known |= {row["input"]: row["instruction"] for row in rows}
            held_in[name] = [row["input"] for row in rows]
        calibrate_threshold(router, held_in)
        return router

    def written(self) -> Written:
        """The pool with the base's own instructions."""
        if self._written is None:
            self._written = Written(self.places, self.names, self.embedder)
        return self._written

    def multitask(self) -> ExpertBank:
        """The one LoRA of all tasks (`real_train.py --multitask`)."""
        return load_experts([self.places.multitask()])

    def more_facts(self) -> dict[str, Any]:
        """Of rows that not every table has."""
        found = {} if self._written is None else {"written": self._written.facts()}
        notes = self.places.multitask() / "facts.json"
        return found | ({"multitask": json.loads(notes.read_text())} if notes.is_file() else {})

    def other_gates(self) -> list[str]:
        """Steps of gate training, as --gate-steps has them, by which all experts have gates."""
        folders = sorted(self.places.cache.glob(real.OTHER_GATES.format("*")))
        whole = [f for f in folders if all(gates_file(f / name, SIGMOID_GATE).is_file() for name in self.names)]
        return [folder.name.partition("-")[2] for folder in whole]

    def with_gates(self, steps: str) -> ExpertBank:
        """The experts with the gates of one of `other_gates`."""
        return load_experts([self.places.cache / real.OTHER_GATES.format(steps) / name for name in self.names])

    def pooled(self, count: int = POOLED) -> dict[str, list[dict]]:
        """{task: the first of the rows that everything learned over the pool sees}."""
        return {name: random.Random(2).sample(self.places.rows(name, "train"), POOLED)[:count] for name in self.names}

    def learned(self, method: str) -> Any:
        """What a method learns over the frozen pool from all its tasks together."""
        folder = self.places.routers(method)
        if not (folder / ROUTERS_FILE).is_file():
            count = POOLED if method in SPARSE else DENSE
            data, by_task = self._batches(count), get_method(method).learned.loss == "tasks"
            prompted = get_method(method).learned.common is not None
            options = {"description": WHOLE_POOL} if prompted else {}
            options |= {"init_steps": len(data["data"])} if get_method(method).decodes else {}
            if method not in SPARSE:  # the outputs of all experts in all modules are 14 GB for the backward
                self.model.train().gradient_checkpointing_enable()
            train_routers(
                self.model, self.pool, None if by_task else data["data"], folder, method=method,
                expert_data=data["expert_data"] if by_task else None, steps=count if by_task else len(data["data"]),
                options=options,
                tokenizer=self.tokenizer if prompted else None,
                checkpoint_every=20, resume=True,
            )  # fmt: skip
            self.model.eval().gradient_checkpointing_disable()
        return read_routers(folder / ROUTERS_FILE)

    def _batches(self, count: int) -> dict[str, Any]:
        """The pooled rows as batches of the recipe's size, and one by one of every task."""
        encoder, pad = Encoder(self.model, self.tokenizer, prompt=real.FORM), self.tokenizer.pad_token_id
        features = {name: encoder.features(rows) for name, rows in self.pooled(count).items()}
        together = [feature for found in features.values() for feature in found]
        return {
            "data": batches(together, real.Recipe().batch_size, pad),
            "expert_data": {name: batches(found, 1, pad) for name, found in features.items()},
        }

    def decoder(self, run: Run) -> CoLLM:
        return CoLLM(self.model, self.tokenizer, self.pool, **run.options)

    def slow(self, method: str) -> dict[str, Any]:
        """Of a row that asks for many passes for a text."""
        kind = get_method(method).router
        if kind == "likelihood":
            return {kind: LikelihoodRouter(self.model, self.tokenizer, self.pool.names)}
        if kind == "few-shot":
            return {kind: LoraHubRouter(self.tokenizer, real.TEMPLATE)}
        if kind == "ask":
            writer = InstructionWriter.from_transformers(str(smollm2.base(self.places.cache)))
            return {kind: AskRouter(self.pool, writer)}
        return self.known()

    def trained(self, method: str) -> dict[str, Any]:
        """{kind: the router of texts}, or the index of the base's hidden states, of a row that has one."""
        kind = get_method(method).router
        if kind is None:
            return {}
        if kind == HIDDEN_STATES:
            return {kind: self._hidden()}
        folder = self.places.routers(kind)
        if not (folder / FILE).is_file():
            self._train(kind, folder)
        return {kind: load_text_router(folder, self.pool, self.embedder)}

    def _hidden(self) -> ExampleRouter:
        for name in self.names:
            folder, rows = self.places.expert(name), self.places.rows(name, "train")
            if not (folder / index_file(self.base.name)).is_file():
                index_examples(folder, random.Random(0).sample(rows, min(HIDDEN_INDEXED, len(rows))), self.base)
        return ExampleRouter(self.pool, self.base)

    def _train(self, kind: str, folder: Path) -> None:
        texts = {name: [row["input"] for row in rows] for name, rows in self.pooled().items()}
        if kind == "retriever":
            train_retriever(self.encoder, texts, self.pool, folder)
        elif kind == "tfidf":
            train_tfidf(texts, self.pool, folder)
        elif kind == "classifier":
            train_classifier_of_data(texts, self.pool, self.embedder, folder)
        else:
            judged, options = self._judged(), {}
            if kind == "routellm-classifier":
                means = dict(zip(judged.names, judged.scores.mean(0).tolist(), strict=True))
                order = sorted(means, key=means.get)
                options = {"strong": order[-1], "weak": order[0]}
            JUDGING[kind](judged, self.pool, self.embedder, folder, **options)

    def _judged(self) -> Any:
        """How right every expert is on validation rows of every task."""
        folders = [real_tasks.write_task(self.places, name, 0, JUDGED, "validation") for name in self.names]
        tasks, output = [load_task(folder) for folder in folders], self.places.cache / f"judged-{len(self.names)}"
        runs = [parse_run(PREFIX + name) for name in self.names]
        settings = Settings(template=real.TEMPLATE, batch_size=JUDGED)
        evaluate(self.model, self.tokenizer, self.pool, runs, tasks, settings, output=output)
        return judged_answers(output, tasks, self.names)


JUDGING = {
    "benchmark": train_benchmark,
    "zooter": train_zooter,
    "routoo": train_routoo,
    "routellm-mf": train_factorization,
    "routellm-classifier": train_classifier,
}
