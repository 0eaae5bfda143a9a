"""The ops run on two threads, whatever the machine and the processes beside these tests leave them."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
