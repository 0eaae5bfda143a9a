"""`bench/run.py --threads N` sets the threads of its process, here that of all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
