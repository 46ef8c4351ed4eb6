"""Making radiance fields small: files of several steps, compared with the field, for the search that Gaussians have too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from prismfield.export.compression.compress import Compressor, Likeness, Result, seeing_cameras
from prismfield.export.compression.field_finetune import finetune_field
from prismfield.export.compression.field_importance import PASSES, importance
from prismfield.export.compression.field_pfz import FieldAsset, decode_field
from prismfield.export.compression.field_pfz_write import encode_field
from prismfield.export.compression.field_quantise import MOST, Quantiser, asset_of_field

SINGLE = 4
"""Bytes of a number as a training stores it."""


class FieldCompressor(Compressor):
    """A field, what matters of it, and files made of it."""

    shares = (0.0,)  # what nothing depends on costs next to nothing at any steps
    usual = (1.0, 1.0)

    def __init__(self, likeness: Likeness, *, drop: bool = True) -> None:
        """Measures what matters: seconds to a minute.

        Args:
            likeness: to compare with; its scene is the field's.
            drop: whether numbers on which no picture depends may become what is cheapest.
        """
        scene = likeness.scene
        self.likeness, self.drop = likeness, drop
        self.original = asset_of_field(scene)
        field = self.original.field()
        cameras = [scene.frame.cameras_to_scene(camera) for camera in seeing_cameras(scene)]
        self.quantiser = Quantiser(field, self.original, importance(field, cameras, PASSES))

    def encode(self, factor: float, share: float = 0.0) -> tuple[bytes, float]:
        """The file with steps `factor` times as coarse as usual; and the seconds that took."""
        began = time.perf_counter()
        data = encode_field(self.original, self.quantiser.by_distortion(factor, self.drop))
        return data, time.perf_counter() - began

    def result(self, factor: float, share: float = 0.0) -> Result:
        """The file, read back and compared."""
        data, seconds = self.encode(factor)
        return self.measured(data, {"factor": factor}, 0.0, seconds)

    def result_of_bits(self, bits: Literal[4, 6, 8]) -> Result:
        """The file with so many bits for each number of all tables, read back and compared."""
        began = time.perf_counter()
        data = encode_field(self.original, self.quantiser.by_bits(bits, self.drop))
        return self.measured(data, {"bits": bits}, 0.0, time.perf_counter() - began)

    def finetuned(self, found: Result, steps: int, tell: Callable[[int, float], None]) -> Result:
        """`found` after so many steps of training on the photographs of the field's run.

        Raises:
            ValueError: the field was in no run.
            FileNotFoundError: its photographs are not there any more.
        """
        run = self.likeness.scene.run
        if run is None:
            raise ValueError(
                f"--finetune-steps: {self.likeness.scene.path} is a file, which has no photographs; take the run"
            )
        bits = found.steps.get("bits")
        if bits is None:
            tables, most = self.quantiser.by_distortion(found.steps["factor"], self.drop), MOST
        else:
            tables, most = self.quantiser.by_bits(bits, self.drop), 2 ** (bits - 1) - 1
        began = time.perf_counter()
        asset, tables = finetune_field(run, self.original, tables, most, steps, tell)
        data = encode_field(asset, tables)
        steps_taken = found.steps | {"finetune_steps": steps}
        return self.measured(data, steps_taken, 0.0, time.perf_counter() - began)

    def decode(self, data: bytes) -> FieldAsset:
        """What is read back."""
        return decode_field(data)


def single_bytes(asset: FieldAsset) -> int:
    """What a field's tables and networks take in single precision."""
    return SINGLE * len(asset)
