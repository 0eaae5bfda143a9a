"""Instructions that the base itself writes, in place of the tasks' own: of every expert, and of every query."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.quality import real
from moerge_ext import Embedder, describe, load_experts
from moerge_ext.experts.bank import ExpertBank
from moerge_ext.models import smollm2
from moerge_ext.queries.cache import TextCache
from moerge_ext.queries.calibration import calibrate_threshold
from moerge_ext.queries.router import QueryRouter
from moerge_ext.queries.writer import Example, InstructionWriter, WriterError

CALIBRATION = 5  # queries of every expert
SUFFIX = "/written"  # behind the names of rows with such instructions
FILES = ("adapter_model.safetensors", "adapter_config.json", "moerge_gates*.safetensors")


class BaseWrites:
    """The base as the writer; where it writes no instruction, the text itself stands for one."""

    similar = None

    def __init__(self, cache: Path):
        self.writer = InstructionWriter.from_transformers(
            str(smollm2.base(cache)), cache=TextCache(cache / "written-texts")
        )
        self.name, self.templates = self.writer.name, self.writer.templates
        self.asked: dict[str, bool] = {}  # query: whether the base wrote an instruction for it

    def query(self, text: str, similar: Sequence[Example] = ()) -> str:
        try:
            said = self.writer.query(text, similar)
        except WriterError:
            said = text
        self.asked[text] = said != text
        return said

    def task(self, examples: Sequence[Example]) -> str:
        try:
            return self.writer.task(examples)
        except WriterError:
            return examples[0]["input"]


class Written:
    """The pool with instructions that the base wrote from three examples of each expert, and GLIDER's router over it,
    its threshold from CALIBRATION held-in queries of each."""

    def __init__(self, places: real.Places, names: Sequence[str], embedder: Embedder):
        self.writes, self.instructions = BaseWrites(places.cache), {}
        folders = [places.cache / "written" / name for name in names]
        for name, folder in zip(names, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            for file in (file for pattern in FILES for file in places.expert(name).glob(pattern)):
                shutil.copy2(file, folder / file.name)
            rows = random.Random(0).sample(places.rows(name, "train"), 3)
            self.instructions[name] = describe(folder, rows, embedder, self.writes).instruction
        self.pool: ExpertBank = load_experts(folders)
        self.router = QueryRouter(self.pool, embedder, self.writes)
        held_in = {name: random.Random(1).sample(places.rows(name, "validation"), CALIBRATION) for name in names}
        calibrate_threshold(self.router, {name: [row["input"] for row in rows] for name, rows in held_in.items()})
        self.writes.asked.clear()

    def facts(self) -> dict:
        """What the table says of it: the experts' instructions, and of how many queries none was written."""
        asked = list(self.writes.asked.values())
        return {"instructions": self.instructions, "queries": len(asked), "none": asked.count(False)}
