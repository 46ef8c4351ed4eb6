"""The Triton kernels under the names that the compiled ones have (`csrc/bindings.cpp`): nothing but the table."""

from prismfield.render.gpu.adam import adam_step as adam_step
from prismfield.render.gpu.bin import bin_count as bin_count
from prismfield.render.gpu.bin import bin_sort as bin_sort
from prismfield.render.gpu.composite import composite_backward as composite_backward
from prismfield.render.gpu.composite import composite_forward as composite_forward
from prismfield.render.gpu.composite import tile_size as tile_size
from prismfield.render.gpu.march import composite_samples_backward as composite_samples_backward
from prismfield.render.gpu.march import composite_samples_forward as composite_samples_forward
from prismfield.render.gpu.march import distortion_backward as distortion_backward
from prismfield.render.gpu.march import distortion_forward as distortion_forward
from prismfield.render.gpu.march import march_count as march_count
from prismfield.render.gpu.march import march_fill as march_fill
from prismfield.render.gpu.project import project_backward as project_backward
from prismfield.render.gpu.project import project_forward as project_forward
from prismfield.render.gpu.project_convexes import project_convexes_backward as project_convexes_backward
from prismfield.render.gpu.project_convexes import project_convexes_forward as project_convexes_forward
from prismfield.render.gpu.sh import sh_backward as sh_backward
from prismfield.render.gpu.sh import sh_forward as sh_forward
from prismfield.render.gpu.ssim import photometric_loss as photometric_loss
