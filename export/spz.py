"""The .spz of Niantic: planes of fixed-point and 8-bit values, compressed. Versions 1 to 4 are read, 3 and 4 written.

Versions 1 to 3 are one gzip stream of a header of 16 bytes and the planes; version 4 has a header of 32 bytes and
a Zstandard stream for each plane. (github.com/nianticlabs/spz, README and load-spz.cc at 21715c3.)

The format's axes are right, up, back ("RUB"), those of a .ply right, down, forward ("RDF"): half a turn about x lies between.
It is made here in both directions, as splat-transform 2.7.1 does; an extension in the file may name other axes.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from prismfield.export import smallest_three
from prismfield.export.assets import SplatAsset
from prismfield.export.reading import check_ratio, gunzip, gunzip_rest, naming
from prismfield.export.rows import morton_order, pieces
from prismfield.export.verify import write_verified

_MAGIC = 0x5053474E
_HEADER = struct.Struct("<IIIBBBB")  # magic, version, count, degree, fractional bits, flags, streams (version 4)
_ANTIALIASED, _EXTENDED = 1, 2
_AXES_EXTENSION = 0xADBE0003
_MAX_EXTENSIONS = 1 << 16
_COLOR = 0.15  # of 1 in f_dc to 255
_HALF_TURN = np.diag([1.0, -1.0, -1.0])
_TERMS = (0, 3, 8, 15, 24)  # harmonics above degree 0
# By the number that the extension gives them: what x, y and z are, of right/left, up/down, back/front
_AXES = (
    None,
    "LDB",
    "RDB",
    "LUB",
    "RUB",
    "LDF",
    "RDF",
    "LUF",
    "RUF",
    "LFD",
    "RFD",
    "LFU",
    "RFU",
    "LBD",
    "RBD",
    "LBU",
    "RBU",
)
_DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "D": (0, 1, 0), "U": (0, -1, 0), "F": (0, 0, 1), "B": (0, 0, -1)}


@dataclass(frozen=True)
class _Head:
    version: int
    count: int
    degree: int
    fractional_bits: int
    flags: int

    @property
    def widths(self) -> list[int]:
        """Bytes for each Gaussian of positions, opacities, colours, scales, rotations, harmonics."""
        position, rotation = 6 if self.version == 1 else 9, 4 if self.version >= 3 else 3
        return [position, 1, 3, 3, rotation, 3 * _TERMS[self.degree]]


def write_spz(path: Path, asset: SplatAsset, version: Literal[3, 4] = 3, sh_bits: tuple[int, int] = (5, 4)) -> None:
    """Write along a Z-order curve, read back and compare before it takes the name `path`.

    Positions are multiples of a power of two that is at most 1/4096 of a unit and an eighth of a middling Gaussian, if they
    are near enough to the origin for 24 bits. Scales have steps of 6 % from 4.5e-5 to 376, harmonics above degree 0 stay
    within -1 and 1; what lies beyond is clipped. `up` is lost.

    Args:
        path: the file.
        asset: what to write.
        version: 3, which most programs read, or 4, which is smaller.
        sh_bits: of harmonics of degree 1, and of higher ones, 1 to 8.

    Raises:
        ValueError: the asset is empty, too far away, or an option is out of range.
        OSError: the file could not be written, or came back different.
    """
    if version not in (3, 4) or not all(1 <= bits <= 8 for bits in sh_bits):
        raise ValueError(f"expected version 3 or 4 and 1 to 8 bits, got version {version}, bits {sh_bits}")
    if len(asset):
        asset = asset.take(morton_order(asset.means))
    bits = _fractional_bits(asset)
    scales = asset.scales.clip(np.exp(-10), np.exp(255 / 16 - 10)).astype(np.float32)
    held = replace(asset, scales=scales, up=None, extra={})
    for band, most in ((held.sh[:, :1], 0.5 / _COLOR), (held.sh[:, 1:], 1)):  # in place: `take` has copied them
        band.clip(-most, most, out=band)
    steps = [2.0 ** (8 - b) for b in (sh_bits[0] if asset.sh_degree else 8, sh_bits[1] if asset.sh_degree > 1 else 8)]
    tolerances = {
        "means": 0.5 * 2.0**-bits + 1e-6 * float(np.abs(held.means).max(initial=0)),
        "quats": smallest_three.rounding(smallest_three.LARGEST / 511),
        "scales": 0.51 / 16,
        "opacities": 0.51 / 255,
        "sh": max(0.51 / 255 / _COLOR, (max(steps) / 2 + 0.51) / 128),
        "antialiased": 0.0,
    }

    def write(target: Path, held: SplatAsset) -> None:
        head = _Head(version, len(held), held.sh_degree, bits, _ANTIALIASED * held.antialiased)
        turned = held.moved(_HALF_TURN)
        with target.open("wb") as file:
            (_write_gzip if version == 3 else _write_zstd)(file, head, _encoders(turned, bits, sh_bits))

    write_verified(path, held, write, read_spz, tolerances)


def read_spz(path: Path) -> SplatAsset:
    """Read an .spz of version 1 to 4 and turn it from the file's axes to those of a .ply. Degree 4 is cut to 3.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    with naming(path):
        data = path.read_bytes()
        head, planes, extensions = _read_gzip(data) if data[:2] == b"\x1f\x8b" else _read_zstd(data)
        columns = [np.frombuffer(p, np.uint8).reshape(head.count, -1) for p in planes]
        asset = SplatAsset.from_stored(
            _means(columns[0], head),
            _quats(columns[4]),
            columns[3] / 16 - 10,
            _logits(columns[1][:, 0]),
            _harmonics(columns[2], columns[5], head.degree),
            antialiased=bool(head.flags & _ANTIALIASED),
        )
        return asset.moved(_to_ply_axes(extensions))


def _fractional_bits(asset: SplatAsset) -> int:
    reach = float(np.abs(asset.means).max(initial=0))
    size = float(np.median(asset.scales.max(1))) if len(asset) else 1.0
    wanted = max(12, int(np.ceil(-np.log2(max(size / 8, 1e-9)))))
    fitting = 23 if reach == 0 else int(np.floor(np.log2(((1 << 23) - 1) / reach)))
    if fitting < 0:
        raise ValueError(f"a position is {reach:.3g} units from the origin, the format reaches {1 << 23:,}")
    return min(wanted, fitting, 23)


Encoder = Callable[[slice], NDArray]


def _encoders(asset: SplatAsset, bits: int, sh_bits: tuple[int, int]) -> list[Encoder]:
    """For each plane what makes rows of it, each of bytes."""
    log_scales = asset.log_scales

    def positions(rows: slice) -> NDArray:
        fixed = np.rint(asset.means[rows].astype(np.float64) * 2.0**bits).astype("<i4")
        return fixed.view(np.uint8).reshape(-1, 3, 4)[..., :3]

    def rotations(rows: slice) -> NDArray:
        index, three = smallest_three.split(asset.quats[rows][:, [1, 2, 3, 0]])
        size = np.rint(np.abs(three) * (511 / smallest_three.LARGEST)).clip(0, 511).astype(np.uint32)
        words = size | (three < 0).astype(np.uint32) << 9
        packed = index.astype(np.uint32) << 30 | words[:, 0] << 20 | words[:, 1] << 10 | words[:, 2]
        return packed.astype("<u4").view(np.uint8)

    def harmonics(rows: slice) -> NDArray:
        steps = np.full(asset.sh.shape[1] - 1, 1 << (8 - sh_bits[1]))
        steps[:3] = 1 << (8 - sh_bits[0])
        values = np.rint(asset.sh[rows, 1:] * 128 + 128).clip(0, 255).astype(np.int64)
        return ((values + steps[:, None] // 2) // steps[:, None] * steps[:, None]).clip(0, 255)

    return [
        positions,
        lambda rows: np.rint(255 * asset.opacities[rows]),
        lambda rows: np.rint(255 * (_COLOR * asset.sh[rows, 0] + 0.5)).clip(0, 255),
        lambda rows: np.rint(16 * (log_scales[rows] + 10)).clip(0, 255),
        rotations,
        harmonics,
    ]


def _rows_of(encode: Encoder, count: int) -> Iterator[bytes]:
    return (encode(rows).astype(np.uint8).tobytes() for rows in pieces(count))


def _write_gzip(file: BinaryIO, head: _Head, encoders: list[Encoder]) -> None:
    with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        packed.write(_HEADER.pack(_MAGIC, 3, head.count, head.degree, head.fractional_bits, head.flags, 0))
        for encode in encoders:
            for piece in _rows_of(encode, head.count):
                packed.write(piece)


def _write_zstd(file: BinaryIO, head: _Head, encoders: list[Encoder]) -> None:
    widths = [width for width in head.widths if width]
    fields = (_MAGIC, 4, head.count, head.degree, head.fractional_bits, head.flags, len(widths))
    file.write(_HEADER.pack(*fields) + struct.pack("<I12x", 32) + bytes(16 * len(widths)))
    sizes = []
    for width, encode in zip(widths, encoders, strict=False):  # without harmonics there is no stream of them
        start = file.tell()
        # The size in the frame: other readers allocate by it
        stream = zstandard.ZstdCompressor(level=12).compressobj(size=width * head.count)
        for piece in _rows_of(encode, head.count):
            file.write(stream.compress(piece))
        file.write(stream.flush())
        sizes.append((file.tell() - start, width * head.count))
    file.seek(32)
    file.write(b"".join(struct.pack("<QQ", *pair) for pair in sizes))


def _parse_head(fields: tuple[int, ...], packed: int, versions: range) -> _Head:
    magic, version, count, degree, bits, flags, _ = fields
    if magic != _MAGIC or version not in versions:
        raise ValueError("not an .spz of version 1 to 4")
    if not count or degree >= len(_TERMS) or bits > 24:
        raise ValueError(f"expected Gaussians of degree 0 to 4, got {count} of degree {degree}, {bits} fractional bits")
    head = _Head(version, count, degree, bits, flags)
    check_ratio(count * sum(head.widths), packed)
    return head


def _read_gzip(data: bytes) -> tuple[_Head, list[bytes], bytes]:
    start, stream = gunzip(data, _HEADER.size)
    head = _parse_head(_HEADER.unpack(start), len(data), range(1, 4))
    body, after = gunzip_rest(stream, head.count * sum(head.widths), _MAX_EXTENSIONS)
    ends = np.cumsum([width * head.count for width in head.widths])
    planes = [body[end - width * head.count : end] for end, width in zip(ends, head.widths, strict=True)]
    return head, planes, after if head.flags & _EXTENDED else b""


def _read_zstd(data: bytes) -> tuple[_Head, list[bytes], bytes]:
    if len(data) < 32:
        raise ValueError("not an .spz, or cut short")
    fields = _HEADER.unpack_from(data)
    head = _parse_head(fields, len(data), range(4, 5))
    streams, start = fields[6], struct.unpack_from("<I", data, 16)[0]
    sizes = [width * head.count for width in head.widths]
    expected = [size for size in sizes if size]
    at = start + 16 * streams
    if streams not in (len(expected), len(sizes)) or start < 32 or at > len(data):
        raise ValueError(
            f"expected {len(expected)} streams after their table, got {streams} at {at:,} of {len(data):,}"
        )
    planes = []
    for i, size in enumerate(sizes[:streams]):
        packed, raw = struct.unpack_from("<QQ", data, start + 16 * i)
        if raw != size or packed > len(data) - at:
            raise ValueError(
                f"stream {i}: {raw:,} bytes in {packed:,}, expected {size:,} in at most {len(data) - at:,}"
            )
        planes.append(_unzstd(data[at : at + packed], size))
        at += packed
    return head, planes + [b""] * (len(sizes) - len(planes)), data[32:start] if head.flags & _EXTENDED else b""


def _unzstd(data: bytes, size: int) -> bytes:
    if not size:
        return b""
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
        plane = reader.read(size)
        if len(plane) != size or reader.read(1):
            raise ValueError(f"a stream does not hold the {size:,} bytes that it should")
    except zstandard.ZstdError as error:
        raise ValueError(f"a stream cannot be decompressed ({error})") from error
    return plane


def _means(plane: NDArray[np.uint8], head: _Head) -> NDArray:
    if head.version == 1:
        return plane.view("<f2").astype(np.float32)
    wide = np.zeros((head.count, 3, 4), np.uint8)
    wide[..., 1:] = plane.reshape(-1, 3, 3)
    return (wide.view("<i4")[..., 0] >> 8) * 2.0**-head.fractional_bits


def _quats(plane: NDArray[np.uint8]) -> NDArray:
    """[N, 4] wxyz."""
    if plane.shape[1] == 3:
        xyz = plane / 127.5 - 1
        return np.concatenate([np.sqrt(np.clip(1 - (xyz**2).sum(1, keepdims=True), 0, None)), xyz], 1)
    words = plane.copy().view("<u4")[:, 0]
    three = np.stack([words >> 20, words >> 10, words], 1)
    size = (three & 511) * (smallest_three.LARGEST / 511)
    return smallest_three.join(words >> 30, np.where(three & 512, -size, size))[:, [3, 0, 1, 2]]


def _logits(plane: NDArray[np.uint8]) -> NDArray:
    with np.errstate(divide="ignore"):  # 0 and 255 become infinite, and 0 and 1 again
        return np.log(plane / 255) - np.log1p(plane / -255)


def _harmonics(colors: NDArray[np.uint8], rest: NDArray[np.uint8], degree: int) -> NDArray:
    kept = _TERMS[min(degree, 3)]
    sh = np.empty((len(colors), 1 + kept, 3), np.float32)
    sh[:, 0] = (colors / 255 - 0.5) / _COLOR
    for rows in pieces(len(colors)):
        sh[rows, 1:] = (rest[rows].reshape(len(sh[rows]), -1, 3)[:, :kept].astype(np.float32) - 128) / 128
    return sh


def _to_ply_axes(extensions: bytes) -> NDArray:
    """[3, 3] rotation: half a turn about x, unless an extension names the axes."""
    at = 0
    while at + 8 <= len(extensions):
        kind, size = struct.unpack_from("<II", extensions, at)
        at += 8
        if kind == _AXES_EXTENSION and size >= 4 and at + 4 <= len(extensions):
            (number,) = struct.unpack_from("<I", extensions, at)
            name = _AXES[number] if number < len(_AXES) else None
            if name is None:
                break
            rotation = np.array([_DIRECTIONS[letter] for letter in name], np.float64).T
            if np.linalg.det(rotation) < 0:
                raise ValueError(f"its axes {name} are mirrored, which no rotation undoes")
            return rotation
        at += size
    return _HALF_TURN
