"""Fail unless every build of the kernels that this kind of processor can have is installed, and one of them loads."""

import platform
from importlib.util import find_spec

from prismfield.render.kernels import LEVELS, description, kernels

builds = [f"_kernels_{level}" for level in LEVELS] if platform.machine() in ("x86_64", "AMD64") else ["_kernels"]
missing = [name for name in builds if find_spec(f"prismfield.{name}") is None]
print(", ".join([description, *(f"no {name}" for name in missing)]))
raise SystemExit(kernels is None or bool(missing))
