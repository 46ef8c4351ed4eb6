"""The same search for the formats of other programs: fewer Gaussians and harmonics, the rounding is the format's own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.compression.compress import (
    PRUNED,
    Compressor,
    Likeness,
    Result,
    cut_harmonics,
    pruned_rows,
    taken,
)
from prismfield.export.compression.pfz_grid import PfzSteps
from prismfield.export.formats import FORMATS, Format, WriteOptions, ending

_TRIES = 5  # of a share, for each degree: each is a file written and, for a likeness, drawn
_CLOSE = 0.03  # of the size that is asked for


def packed_formats() -> dict[str, Format]:
    """By ending: files of one piece, as small or smaller than what they are made of, that can be read back."""
    able = (".compressed.ply", ".spz", ".sog", ".splat")
    return {end: FORMATS["gaussians"][end] for end in able}


class PackingCompressor(Compressor):
    """Files that `export/formats.py` writes."""

    def __init__(self, asset: SplatAsset, importance: NDArray, likeness: Likeness, path: Path) -> None:
        """Nothing is written yet; the ending of `path` says which format.

        Raises:
            ValueError: it is none of `packed_formats`.
        """
        super().__init__(asset, importance, likeness, PfzSteps())
        end = ending(path, packed_formats())
        if end is None:
            raise ValueError(f"{path}: expected a name that ends with {', '.join(packed_formats())}")
        self.format, self._name = packed_formats()[end], f"a{end}"
        self._whole = cut_harmonics(asset, self.format.max_degree)

    def encode(self, factor: float, share: float) -> tuple[bytes, float]:
        """The file without the least important `share`, and the seconds that took; `factor` is of no use."""
        return self._at_degree(share, self._whole.sh_degree)

    def decode(self, data: bytes) -> SplatAsset:
        """What is read back."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self._name
            path.write_bytes(data)
            assert self.format.read is not None
            asset = self.format.read(path)
        assert isinstance(asset, SplatAsset)
        return asset

    def result(self, factor: float, share: float) -> Result:
        """The file, read back and compared."""
        data, seconds = self.encode(factor, share)
        return self.measured(data, None, share, seconds)

    def to_size(self, limit: int, tell: Callable[[Result], None], shares: Sequence[float] = PRUNED) -> Result:
        """The likest file of at most `limit` bytes: of each degree, with as many Gaussians as fit.

        Args:
            limit: bytes.
            tell: called with each candidate.
            shares: the first is the least that is left out.

        Raises:
            ValueError: none is so small.
        """
        best: Result | None = None
        smallest = 0
        for degree in range(self._whole.sh_degree, -1, -1):
            share, size = self._share_for(limit, degree, shares[0])
            if size > limit:
                smallest = size
                continue
            data, seconds = self._at_degree(share, degree)
            found = self.measured(data, None, share, seconds)
            tell(found)
            if best is not None and found.psnr < best.psnr:
                break
            best = found
        if best is None:
            raise ValueError(
                f"--target-mb: {limit / 1e6:g} MB is too small, the smallest tried is {smallest / 1e6:.3f} MB"
            )
        return best

    def to_psnr(self, limit: float, tell: Callable[[Result], None], shares: Sequence[float] = PRUNED) -> Result:
        """The smallest file at least `limit` decibels like the original: of each degree, with as few Gaussians as will do.

        Args:
            limit: decibels.
            tell: called with each candidate.
            shares: the first is the least that is left out.

        Raises:
            ValueError: the format cannot.
        """
        best: Result | None = None
        nearest = 0.0
        for degree in range(self._whole.sh_degree, -1, -1):
            low, high, found = shares[0], 1.0, None
            for turn in range(_TRIES):
                share = low if turn == 0 else (low + high) / 2
                data, seconds = self._at_degree(share, degree)
                tried = self.measured(data, None, share, seconds)
                nearest = max(nearest, tried.psnr)
                if tried.psnr >= limit:
                    low, found = share, tried
                elif turn == 0:
                    break
                else:
                    high = share
            if found is None:
                break
            tell(found)
            if best is None or len(found.data) < len(best.data):
                best = found
        if best is None:
            raise ValueError(f"--target-psnr: {limit:g} dB is out of reach, the finest tried has {nearest:.1f} dB")
        return best

    def sweep(self) -> Iterator[Result]:
        """From all Gaussians to few."""
        for share in (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75):
            yield self.result(1.0, share)

    def _share_for(self, limit: int, degree: int, least: float) -> tuple[float, int]:
        """The smallest share, nearly, whose file has at most `limit` bytes, and its size: nearly proportional to what is left."""
        share, size = least, len(self._at_degree(least, degree)[0])
        good: tuple[float, int] | None = (share, size) if size <= limit else None
        for _ in range(_TRIES):
            if good is not None and (good[0] == least or good[1] > (1 - _CLOSE) * limit):
                return good
            share = 1 - max((1 - share) * (1 - _CLOSE / 2) * limit / size, 1 / len(self._whole))
            size = len(self._at_degree(share, degree)[0])
            if size <= limit and (good is None or size > good[1]):
                good = share, size
            elif good is not None or (1 - share) * len(self._whole) <= 1:
                break
        return good or (share, size)

    def _at_degree(self, share: float, degree: int) -> tuple[bytes, float]:
        began = time.perf_counter()
        asset = taken(cut_harmonics(self._whole, degree), pruned_rows(self.importance, share))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self._name
            assert self.format.write is not None
            self.format.write(path, asset, WriteOptions())
            data = path.read_bytes()
        return data, time.perf_counter() - began
