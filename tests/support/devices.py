"""Devices that a test runs on: the CPU, and with `make test-gpu` a CUDA device."""

import pytest
import torch


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU)))
