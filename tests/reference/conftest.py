"""One thread, whatever ran before: LayerNorm's weight gradient and some sums depend on the number."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
