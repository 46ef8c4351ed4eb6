"""The cutoffs stand once in Python and once in C++."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prismfield.render.ops import constants

from .raster_fixtures import usable_levels

NAMES = [name for name in vars(constants) if name.isupper()]


@pytest.mark.parametrize("module", usable_levels())
def test_kernels_use_the_same_constants(module: Any) -> None:
    assert len(NAMES) == 6
    for name in NAMES:
        assert getattr(module, name) == torch.tensor(getattr(constants, name)).item(), name
    assert torch.tensor(math.log(constants.ALPHA_MIN)).item() == module.LOG_ALPHA_MIN
