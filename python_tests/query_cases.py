"""Offline stand-ins for language and embedding models, and experts that were described with them."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch

import moerge_ext as moerge

WORDS = {"ant": "digging", "bee": "flying", "cat": "purring"}  # expert: the word its instruction is about


def bag_of_words(texts):
    """[N,32]: every word adds one to a place of its own (by hash)."""
    rows = torch.zeros(len(texts), 32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[hashlib.sha256(word.encode()).digest()[0] % 32] += 1
    return rows


def fake_embedder(name="bag", **options) -> moerge.Embedder:
    return moerge.Embedder(bag_of_words, name=name, **options)


def fake_writer(**options) -> moerge.InstructionWriter:
    """Repeats the last input of the prompt as the instruction."""

    def generate(prompt):
        return "Instruction: please do " + prompt.split("Input: ")[-1].split("\n")[0]

    return moerge.InstructionWriter(generate, name="echo", **options)


def described(folders, embedder=None):
    """Give each expert of {name: folder} the global vector of its word; returns the loaded bank."""
    for name, folder in folders.items():
        moerge.describe(folder, [], embedder or fake_embedder(), instruction=f"please do {WORDS[name]}")
    return moerge.load_experts(folders)


@contextmanager
def server(*answers):
    """A chat server on this machine that gives `answers` in turn: (status, body); the last one for ever.

    Yields (base_url, the requests it got as dicts).
    """
    seen, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, answer = left.pop(0) if len(left) > 1 else left[0]
            answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/other")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", seen
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def completion(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def wide_tokenizer(folder):
    """The tokenizer `letters`, saved in a folder."""
    tokenizer = letters()
    tokenizer.save_pretrained(folder)
    return tokenizer


def letters():
    """One character per id of the tiny models (96), so that whatever they write can be read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .:=", *(chr(0x4E00 + i) for i in range(63))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
