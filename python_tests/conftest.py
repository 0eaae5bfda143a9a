"""Fixtures for every test, and two ways to run the op tests over the CUDA kernels.

`--simt LIBRARY` runs them in the emulator of csrc/simt, `--cuda` on a GPU.
"""

import os
import signal
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

# what the CPU kernels promise and the CUDA kernels do not, by name of the test
NOT_ON_CUDA = {
    "experts high": "ids out of range are skipped",
    "experts low": "ids out of range are skipped",
    "rows negative": "values of rows cannot be checked without waiting for the device",
    "rows high": "values of rows cannot be checked without waiting for the device",
    "rows value": "values of rows cannot be checked without waiting for the device",
    "test_backward_ops_check_the_ids_they_are_given": "ids out of range are skipped",
    "test_a_token_without_experts_keeps_its_bits": "zero is added to it",
    "test_no_intermediate_is_larger_than_the_contract": "scores have a workspace [T, E]",
    "test_any_number_of_threads_gives_the_same_bits": "about threads of the CPU",
    "test_a_call_of_one_token_frees_few_pieces": "about what the CPU kernels take of the heap",
}


def pytest_addoption(parser):
    parser.addoption("--simt", metavar="LIBRARY", help="run the ops of this build of csrc/simt in place of the CPU's")
    parser.addoption("--cuda", action="store_true", help="run the ops on the GPU in place of the CPU's")


def pytest_configure(config):
    # a shell tells its jobs in the background to ignore Ctrl-C, and so what these start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--cuda"):
        import cuda_roundtrip
        import torch

        import moerge_ext  # noqa: F401

        cuda_roundtrip.install(torch.device("cuda"))
    library = config.getoption("--simt")
    if library:
        import torch

        import moerge_ext  # noqa: F401  (registers the ops whose CPU kernels are replaced)

        torch.ops.load_library(os.fspath(Path(library).resolve()))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--simt") and not config.getoption("--cuda"):
        for item in items:
            if item.path.name == "test_cuda.py":
                item.add_marker(pytest.mark.skip(reason="about the CUDA kernels: needs --simt or --cuda"))
        return
    for item in items:
        for name, reason in NOT_ON_CUDA.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=f"a promise of the CPU kernels: {reason}"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of conformance tensors and real data beside the repository; tests that need it are skipped
    without.
    """
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def texts_of_tests(tmp_path_factory):
    """What models said of texts is kept where the tests are, not in the user's own cache."""
    from moerge_ext.queries import cache

    before, folder = cache.default_folder, tmp_path_factory.mktemp("texts")
    cache.default_folder = lambda: folder
    yield
    cache.default_folder = before


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """A test leaves the settings that every later one runs under as it found them."""
    import numpy as np
    import torch

    def found():
        torch_s = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
        return (*torch_s, torch.are_deterministic_algorithms_enabled(), np.geterr())

    before = found()
    yield
    assert found() == before, "threads, dtype, gradients, determinism, NumPy's errors: one of them was left changed"
