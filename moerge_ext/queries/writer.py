"""InstructionWriter: a language model that says in one sentence what a task asks for (GLIDER, arXiv 2410.07172)."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .cache import TextCache, model_identity, model_name
from .endpoint import Endpoint, EndpointError

# appendix A.1 of the paper, the number of pairs left open
TEMPLATE = (
    "The following are {count} pairs of input-output examples from one task. Generate the task instruction in one "
    "sentence that is most possibly used to command a language model to produce them. In the instruction, remember to "
    "point out the skill or knowledge required for the task to guide the language model.\n{examples}"
)
# the same of a query alone, which the paper does not do
QUERY_TEMPLATE = (
    "The following is one input of a task. Generate the task instruction in one sentence that is most possibly used to "
    "command a language model to answer it. In the instruction, remember to point out the skill or knowledge required "
    "for the task to guide the language model.\n{examples}"
)
CHOICE_TEMPLATE = (
    "Input: {input}\n\nWhich of these tasks does the input belong to?\n{instructions}\n\n"
    "Answer with one number from 1 to {count}.\nNumber:"
)
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_INSTRUCTION = 600  # characters; more is no sentence
ECHO = 20  # characters of a text that an instruction may not hold
Example = Mapping[str, str]


class WriterError(ValueError):
    """The language model wrote something that is no instruction."""


class InstructionWriter:
    """Writes one-sentence task instructions with a language model.

    Args:
        generate: prompt -> text, any callable.
        name: of the model, recorded beside what it wrote.
        cache: where instructions are kept, by the hash of model and prompt; None keeps none (a callable can change
            without its name changing).
        identity: what the cache knows the model by; default `name`.
        template: what the model is asked, with {examples}, the pairs "- Input: ...", "- Output: ..." in lines, and
            perhaps {count}, their number as a word. The paper's (appendix A.1) by default; its threshold of 0.8 belongs
            to it. For a query with similar solved examples the query stands behind them as an input without output:
            where the paper has it, it does not say.
        query_template: the same for a query without examples, which is then all of {examples}.
        attempts, backoff: how often a failing endpoint or an unusable answer is tried, waiting `backoff` seconds
            before the second attempt and twice as long before each further one. Nothing of a failure is cached.
    """

    def __init__(
        self,
        generate: Callable[[str], str],
        *,
        name: str,
        cache: TextCache | None = None,
        identity: str | None = None,
        attempts: int = 1,
        backoff: float = 1.0,
        template: str = TEMPLATE,
        query_template: str = QUERY_TEMPLATE,
    ):
        if not callable(generate):
            raise ValueError(f"generate must be a callable prompt -> text, got {type(generate).__name__}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self.generate, self.name, self.cache = generate, name, cache
        self.identity, self.attempts, self.backoff = identity or name, attempts, backoff
        self.asked: Counter[str] = Counter()  # "texts": how many were asked for, those of the cache too
        self.templates = template, query_template
        for text in self.templates:
            check_template(text)

    @classmethod
    def from_endpoint(
        cls,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        backoff: float = 1.0,
        cache: TextCache | None = None,
        **templates: str,
    ) -> InstructionWriter:
        """A writer over any OpenAI-compatible server: `base_url` such as "http://localhost:8000/v1".

        templates: template, query_template.
        """
        endpoint = Endpoint(base_url, model, api_key, timeout)
        return cls(
            endpoint,
            name=model,
            cache=TextCache() if cache is None else cache,
            identity=f"{base_url} {model}",
            attempts=attempts,
            backoff=backoff,
            **templates,
        )

    @classmethod
    def from_transformers(
        cls,
        path: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        max_new_tokens: int = 64,
        cache: TextCache | None = None,
        **templates: str,
    ) -> InstructionWriter:
        """A writer over a transformers model, causal (its chat template is used when it has one) or seq2seq; greedy.

        templates: template, query_template.
        """
        from ..models.pretrained import load_model, load_tokenizer, usable_device

        device = usable_device(device)
        generate = TransformersGenerator(
            load_model(path, dtype=dtype, device=device), load_tokenizer(path), max_new_tokens
        )
        cache = TextCache() if cache is None else cache
        identity = f"{model_identity(path)} {dtype} {max_new_tokens}"
        return cls(generate, name=model_name(path), cache=cache, identity=identity, **templates)

    def task(self, examples: Sequence[Example]) -> str:
        """The instruction of the task that `examples` ({"input", "target"}) belong to."""
        if not examples:
            raise ValueError("no examples: an instruction is written from at least one {'input', 'target'}")
        shown = [_shown(example) for example in examples]
        return self._write(self._asked(self.templates[0], shown, len(shown)), partial(self._clean, shown=shown))

    def query(self, text: str, examples: Sequence[Example] = ()) -> str:
        """The instruction of the task behind one query, from the query and similar solved examples if there are any."""
        if not text.strip():
            raise ValueError("an empty query has no task: expected some text")
        shown = [*map(_shown, examples), f"- Input: {text.strip()}"]
        template = self.templates[0 if examples else 1]
        return self._write(self._asked(template, shown, len(examples)), self._clean)

    def _asked(self, template: str, shown: Sequence[str], count: int) -> str:
        number = COUNTS[count] if count < len(COUNTS) else str(count)
        return fill(template, count=number, examples="\n".join(shown))

    def _clean(self, answer: Any, shown: Sequence[str] = ()) -> str:
        return clean(answer, shown, self.templates)

    def choose(self, text: str, instructions: Sequence[str], template: str | None = None) -> int:
        """The number (from 0) of the instruction that fits a query, as the model picks it from a list.

        template: what it is asked, with {input}, {instructions} (numbered from 1, in lines) and perhaps {count}.
        """
        if not text.strip():
            raise ValueError("an empty query fits no task: expected some text")
        template = CHOICE_TEMPLATE if template is None else template
        if "{input}" not in template or "{instructions}" not in template:
            raise ValueError(f"a template must hold {{input}} and {{instructions}}, got {template!r:.200}")
        shown = "\n".join(f"{i}. {instruction}" for i, instruction in enumerate(instructions, 1))
        prompt = fill(template, input=text.strip(), instructions=shown, count=str(len(instructions)))
        return self._write(prompt, lambda answer: parse_choice(answer, len(instructions)))

    def ask(self, prompt: str, parse: Callable[[Any], Any]) -> Any:
        """What `parse` finds in the model's answer to any prompt; a WriterError of it is worth another attempt."""
        return self._write(prompt, parse)

    def _write(self, prompt: str, parse: Callable[[Any], Any]) -> Any:
        """What `parse` finds in the model's answer to `prompt`."""
        self.asked["texts"] += 1
        if self.cache is not None and (known := self.cache.get("instruction", self.identity, prompt)) is not None:
            return known
        for attempt in range(1, self.attempts + 1):
            try:
                instruction = parse(self.generate(prompt))
                break
            except (EndpointError, WriterError) as error:
                if attempt == self.attempts or not getattr(error, "transient", True):
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    raise type(error)(f"writer '{self.name}': {error}{tried}") from error
            time.sleep(self.backoff * 2 ** (attempt - 1))
        if self.cache is not None:
            self.cache.put(instruction, "instruction", self.identity, prompt)
        return instruction


def check_template(text: str) -> None:
    """ValueError for a template without {examples}."""
    if not isinstance(text, str) or "{examples}" not in text:
        raise ValueError(f"a template must hold {{examples}}, and perhaps {{count}}, got {text!r:.200}")


def fill(template: str, **values: str) -> str:
    """The template with its fields replaced at once; whatever else stands in braces stays."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda found: values[found[1]], template)


def _shown(example: Example) -> str:
    return f"- Input: {example['input'].strip()}\n- Output: {example['target'].strip()}"


def clean(answer: Any, shown: Sequence[str] = (), templates: Sequence[str] = (TEMPLATE, QUERY_TEMPLATE)) -> str:
    """The sentence in a model's answer about the examples `shown`: its first line, bare of label and hidden reasoning.

    WriterError for what is none: not text, no two words, longer than a sentence, or an echo of the prompt.
    """
    if not isinstance(answer, str):
        raise WriterError(f"expected an instruction as text, got {type(answer).__name__}")
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    label = re.compile(
        r"^[\s#*_\"'`]*(the )?(task )?instruction[\s*_]*:", re.IGNORECASE
    )  # perhaps in a line of its own
    lines = (label.sub("", line).strip(" \"'*_`") for line in text.splitlines())
    line = next((line for line in lines if line), "")
    if len(re.findall(r"[^\W\d_]{2,}", line)) < 2 or len(line) > MAX_INSTRUCTION:
        raise WriterError(
            f"expected one sentence of at most {MAX_INSTRUCTION} characters, got {answer[:120]!r}; "
            "use a larger language model, or give the instruction yourself"
        )
    if echoes(line, shown, templates):
        raise WriterError(
            f"expected a sentence about the task, got an echo of the prompt: {line[:120]!r}; use a larger language "
            "model, or give the instruction yourself"
        )
    return line


def echoes(line: str, shown: Sequence[str], templates: Sequence[str]) -> bool:
    """Whether a line repeats what was asked, or what stands in some of the examples and not in all of them.

    What all of them say can be the instruction that the task's inputs begin with.
    """

    def bare(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    said = bare(line)
    asked = [bare(part) for text in templates for part in re.split(r"[.\n]|\{\w+\}", text) if bare(part)]
    if any(said in part or (len(part) >= ECHO and part in said) for part in asked):
        return True
    examples = [bare(text) for text in shown]
    repeats = [said in text or (len(text) >= ECHO and text in said) for text in examples]
    return any(repeats) and (len(repeats) == 1 or not all(repeats))


def parse_choice(answer: Any, count: int) -> int:
    """The first whole number of an answer, from 0; WriterError when it has none in 1 .. count."""
    found = (
        re.search(r"\d+", re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL))
        if isinstance(answer, str)
        else None
    )
    if found is None or not 1 <= int(found[0]) <= count:
        raise WriterError(
            f"expected a number from 1 to {count}, got {str(answer)[:120]!r}; use a larger language model"
        )
    return int(found[0]) - 1


class TransformersGenerator:
    """prompt -> greedy continuation by a transformers model.

    ValueError for a prompt that does not fit the model's context.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def __call__(self, prompt: str) -> str:
        import torch

        from ..models.pretrained import context_of, is_seq2seq
        from ..models.prompt import PromptFormat, encode

        chat, seq2seq = bool(getattr(self.tokenizer, "chat_template", None)), is_seq2seq(self.model.config)
        asked = PromptFormat(chat=chat).around(prompt, self.tokenizer)
        inputs = encode(self.tokenizer, asked, seq2seq=seq2seq).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        context = context_of(self.model.config)
        needed = length + (0 if seq2seq else self.max_new_tokens)
        if context is not None and needed > context:
            raise ValueError(
                f"the prompt has {length} tokens and the answer needs {self.max_new_tokens}, more than the model's "
                f"context of {context}: use fewer or shorter examples, or a model with a longer context"
            )
        with torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.tokenizer.decode(ids[0, 0 if seq2seq else length :], skip_special_tokens=True)
