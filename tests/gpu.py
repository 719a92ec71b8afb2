"""What tests for a GPU wait for."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU is shown to the tests (MMTUNE_TEST_GPU=1 does)"
)
