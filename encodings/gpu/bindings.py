"""The encodings' part of the table of Triton kernels (see `render/gpu/bindings.py`)."""

from prismfield.encodings.gpu.grid import grid_backward as grid_backward
from prismfield.encodings.gpu.grid import grid_forward as grid_forward
from prismfield.encodings.gpu.mlp import mlp_backward as mlp_backward
from prismfield.encodings.gpu.mlp import mlp_forward as mlp_forward
