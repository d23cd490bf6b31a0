"""Optimizers that keep their state in few bits, or in the memory of the host: bitsandbytes and torchao.

Their factors are large enough to be quantized.
"""

import torch
from bitsandbytes import optim as bnb
from torchao import optim as torchao

from tests.inner_optimizers.row import Row, row

LARGE = {"dtype": torch.float32, "shape": (256, 272, 16)}

HOST_COPIES = {
    "follows": "It needs a GPU, and this table was made on a CPU. By its source it holds copies of A and B in the "
    "host's memory; such an optimizer is refused, as the inner one has to hold A and B themselves."
}

BITSANDBYTES = {
    bnb.AdamW: {},
    bnb.Adam8bit: {},
    bnb.AdamW8bit: {},
    bnb.Lion8bit: {"lr": 0.001},
    bnb.AdEMAMix8bit: {},
    bnb.LAMB8bit: {},
    bnb.RMSprop8bit: {"lr": 0.001},
    bnb.SGD8bit: {"momentum": 0.9},
    bnb.PagedAdamW: {},
    bnb.PagedAdamW8bit: {},
    bnb.PagedLion8bit: {"lr": 0.001},
}

ROWS: list[Row] = [
    *[row("bitsandbytes", kind, **{"lr": 0.01, **options}, **LARGE) for kind, options in BITSANDBYTES.items()],
    *[
        row("torchao", kind, lr=0.01, **LARGE)
        for kind in (torchao.Adam8bit, torchao.AdamW8bit, torchao.AdamW4bit, torchao.AdamWFp8)
    ],
    row("torchao", torchao.CPUOffloadOptimizer, lr=0.01, notes=HOST_COPIES, **LARGE),
]
