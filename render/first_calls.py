"""Importing this makes torch's results on the CPU the same in each run.

torch hands square roots, exponentials and the like of many numbers to Intel's MKL, from several threads. MKL (2024.2, which
torch 2.13 brings) chooses the code of each such function on its first call, and where threads make that call at the same time,
one of them may get its share with errors of 3e-4 (https://github.com/pytorch/pytorch/issues/188792). So the first calls are made
here, by one thread.
"""

import torch

FUNCTIONS = [
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "rsqrt",
    "sigmoid",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]
"""Of one number each, and not as simple as a sign."""

for dtype in (torch.float32, torch.float64):
    for name in FUNCTIONS:
        getattr(torch, name)(torch.ones(1, dtype=dtype))
