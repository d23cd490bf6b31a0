"""The product is added in blocks of any size, to weights of any stride, and rounded once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaopt import rounding
from deltaopt.rounding import add_product_

sides = st.integers(1, 12)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(sides, sides, st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stacked", [False, True])
def test_blocks_add_up_to_the_whole(dtype, stacked, c, d, k, block, turned, seed):
    lead = (2,) if stacked else ()
    W = random(*lead, d, c, seed=seed, dtype=dtype).mT if turned else random(*lead, c, d, seed=seed, dtype=dtype)
    U, V = random(*lead, c, k, seed=seed + 1), random(*lead, k, d, seed=seed + 2)
    exact = W.double() + 0.7 * (U.double() @ V.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "BLOCK_ELEMENTS", block)
        add_product_(W, U, V, 0.7)
    spacing = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    noise = 1e-6 * (U.double().abs() @ V.double().abs())
    assert bool(((W.double() - exact).abs() <= 0.51 * spacing + noise).all())
