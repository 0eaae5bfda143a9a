"""How transformers' server ends; `test_transformers_server.py` has the real one."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest
from query_cases import wide_tokenizer

from moerge_ext.serving.transformers import launch
from moerge_ext.serving.transformers.context import hold_to_template


class Served:
    """What `launch` asks of transformers' `Serve`: a server in a thread, which ends when it is killed."""

    def __init__(self, started: bool = True):
        self.ended = threading.Event()
        self.model = SimpleNamespace(forward=lambda: "an answer")
        self.server = SimpleNamespace(started=started, config=SimpleNamespace(timeout_graceful_shutdown=None))
        self._model_manager = SimpleNamespace(loaded_models={"base": SimpleNamespace(model=self.model)})
        self._thread = threading.Thread(target=self.ended.wait, daemon=True)
        self._thread.start()

    def kill_server(self) -> None:
        if self._thread.is_alive():  # as theirs does
            self.ended.set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server(number):
    """Also under Python 3.11, where a thread whose join is interrupted counts as dead and would run on."""
    served, before = Served(), signal.getsignal(number)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
    timer.start()
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            launch.wait(served)
    else:
        assert launch.wait(served) == 128 + signal.SIGTERM
    assert served.ended.is_set() and served.server.config.timeout_graceful_shutdown == launch.GRACE
    with pytest.raises(RuntimeError, match="the server is stopping"):
        served.model.forward()
    assert signal.getsignal(number) == before


def test_a_server_that_could_not_start_is_status_1():
    served = Served(started=False)
    served.ended.set()
    assert launch.wait(served) == 1


def test_a_chat_without_a_template_is_http_400(tmp_path):
    exceptions = pytest.importorskip("fastapi").HTTPException
    tokenizer = wide_tokenizer(tmp_path)
    hold_to_template(tokenizer)
    with pytest.raises(exceptions) as refused:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert refused.value.status_code == 400 and "no chat template" in refused.value.detail
    tokenizer = wide_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    hold_to_template(tokenizer)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


def test_a_tokenizer_that_puts_no_chat_is_warned_of(tmp_path, recwarn):
    tokenizer = wide_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match=r"no chat template.*/v1/completions answers"):
        launch.warn_of_chats(str(tmp_path))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    recwarn.clear()
    launch.warn_of_chats(str(tmp_path))
    assert not [warning for warning in recwarn if "chat" in str(warning.message)]
