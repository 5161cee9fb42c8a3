"""What every test gets: few threads, a fixed seed, no network, and a skip where a GPU is needed and missing."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# No test may depend on a network: huggingface_hub reads this when it is first imported, and then refuses at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# The tensors here are small: beyond a few threads, handing out the work costs more than the work.
torch.set_num_threads(min(4, torch.get_num_threads()))

# No deadline: a first call traces or compiles. Derandomised: a failure is seen by everybody or by nobody.
hypothesis.settings.register_profile("diffloss", deadline=None, derandomize=True)
hypothesis.settings.load_profile("diffloss")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's global generators before each test and return the seed."""
    value = 20240629
    torch.manual_seed(value)
    return value
