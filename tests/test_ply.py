"""The INRIA .ply: our own values come back, independent readers agree, and no damaged file gets through."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import plyfile
import pytest
import torch

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import SplatAsset
from prismfield.export.ply import read_ply, write_ply
from prismfield.export.verify import differences, write_verified

CLOSE = {"means": 0.0, "quats": 1e-6, "scales": 1e-5, "opacities": 1e-6, "sh": 0.0, "up": 1e-6, "antialiased": 0.0}


def make_asset(count: int = 37, degree: int = 3, seed: int = 0) -> SplatAsset:
    rng = np.random.default_rng(seed)
    return SplatAsset.from_stored(
        rng.normal(size=(count, 3)),
        rng.normal(size=(count, 4)),
        rng.normal(-4, 2, (count, 3)),
        rng.normal(0, 3, count),
        rng.normal(size=(count, (degree + 1) ** 2, 3)),
        up=(0.0, -0.6, 0.8),
        antialiased=degree % 2 == 1,
    )


def assert_same(a: SplatAsset, b: SplatAsset) -> None:
    found = differences(a, b)
    assert all(found[name] <= CLOSE[name] for name in CLOSE), found


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_what_is_written_comes_back(tmp_path: Path, degree: int) -> None:
    asset = make_asset(degree=degree)
    write_ply(tmp_path / "new folder" / "scene.ply", asset)
    assert_same(asset, read_ply(tmp_path / "new folder" / "scene.ply"))
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["scene.ply"]


def test_more_rows_than_are_written_at_once(tmp_path: Path) -> None:
    asset = make_asset(count=70_001, degree=0)
    write_ply(tmp_path / "a.ply", asset)
    assert_same(asset, read_ply(tmp_path / "a.ply"))


def test_plyfile_reads_the_layout_of_the_original(tmp_path: Path) -> None:
    asset = make_asset(degree=2)
    write_ply(tmp_path / "a.ply", asset)
    rows = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    names = [p.name for p in rows.properties]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    np.testing.assert_array_equal(np.stack([rows[n] for n in "xyz"], 1), asset.means)
    for channel in range(3):
        np.testing.assert_array_equal(rows[f"f_dc_{channel}"], asset.sh[:, 0, channel])
        for term in range(8):  # all red, then all green, then all blue
            np.testing.assert_array_equal(rows[f"f_rest_{8 * channel + term}"], asset.sh[:, term + 1, channel])
    np.testing.assert_allclose(1 / (1 + np.exp(-rows["opacity"].astype(float))), asset.opacities, atol=1e-6)
    np.testing.assert_allclose(np.exp(np.stack([rows[f"scale_{i}"] for i in range(3)], 1)), asset.scales, rtol=1e-5)
    np.testing.assert_array_equal(np.stack([rows[f"rot_{i}"] for i in range(4)], 1), asset.quats)


@pytest.mark.parametrize("text", [False, True])
def test_reads_what_plyfile_writes(tmp_path: Path, text: bool) -> None:
    """Other order, other types, other properties and other elements around it."""
    asset = make_asset(degree=1)
    values = {f"rot_{i}": 3 * asset.quats[:, i] for i in range(4)}
    values |= {f"scale_{i}": asset.log_scales[:, i] for i in range(3)}
    values |= {"red": np.full(len(asset), 7, np.uint8), "opacity": asset.logits}
    rest = asset.sh[:, 1:].transpose(0, 2, 1).reshape(len(asset), 9)
    values |= {f"f_rest_{i}": rest[:, i] for i in range(9)} | {f"f_dc_{i}": asset.sh[:, 0, i] for i in range(3)}
    values |= {name: asset.means[:, i] for i, name in enumerate("xyz")}
    table = np.empty(len(asset), [(name, value.dtype.str) for name, value in values.items()])
    for name, value in values.items():
        table[name] = value
    before = np.array([(1, 2.5), (3, 4.5)], [("id", "i4"), ("weight", "f8")])
    elements = [plyfile.PlyElement.describe(before, "camera"), plyfile.PlyElement.describe(table, "vertex")]
    faces = np.empty(2, [("indices", "O")])
    faces["indices"] = [np.array([0, 1, 2], np.int32)] * 2
    elements.append(plyfile.PlyElement.describe(faces, "face"))
    plyfile.PlyData(elements, text=text, byte_order="<").write(tmp_path / "a.ply")
    read = read_ply(tmp_path / "a.ply")
    assert read.up is None and not read.antialiased
    np.testing.assert_allclose(read.quats, asset.quats, atol=1e-6)
    np.testing.assert_allclose(read.scales, asset.scales, rtol=1e-5)
    np.testing.assert_allclose(read.opacities, asset.opacities, atol=1e-6)
    np.testing.assert_allclose(read.means, asset.means, atol=1e-6)
    np.testing.assert_allclose(read.sh, asset.sh, atol=1e-6)


def test_a_file_of_another_program(shared_data: Path) -> None:
    path = shared_data / "splats" / "flowers_lod3_inria.ply"
    asset = read_ply(path)
    assert len(asset) == 26_895 and asset.sh_degree == 3
    assert (asset.sh[:, 9:] == 0).all() and asset.sh[:, 1:9].std() > 0.01
    rows = plyfile.PlyData.read(path)["vertex"]
    np.testing.assert_array_equal(asset.sh[:, 3, 1], rows["f_rest_17"])
    # The .splat beside it holds the same scene: position, linear scale, rgba, quaternion in 32 bytes.
    record = [("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)]
    splats = np.fromfile(shared_data / "splats" / "flowers_lod3.splat", record)
    ours = asset.means[np.lexsort(asset.means.T)]
    order = np.lexsort(splats["mean"].T)
    np.testing.assert_allclose(ours, splats["mean"][order], atol=1e-6)
    np.testing.assert_allclose(np.sort(asset.opacities), np.sort(splats["rgba"][:, 3] / 255), atol=0.003)
    np.testing.assert_allclose(np.sort(asset.scales, None), np.sort(splats["scale"], None), rtol=1e-4)


def test_frames_are_undone_exactly_enough() -> None:
    frame = SceneFrame(center=(100.0, -20.0, 3.0), scale=0.125, up=(0.0, 1.0, 0.0))
    asset = make_asset(degree=2)
    moved = dataclasses.replace(asset, means=asset.means + np.array(frame.center, np.float32))
    tensors = moved.to_tensors(frame)
    torch.testing.assert_close(tensors["means"], torch.from_numpy(asset.means) * 0.125, atol=1e-5, rtol=0)
    torch.testing.assert_close(tensors["log_scales"].exp(), torch.from_numpy(asset.scales) * 0.125)
    back = SplatAsset.from_tensors(tensors, frame, antialiased=moved.antialiased)
    assert back.up == frame.up
    np.testing.assert_allclose(back.means, moved.means, atol=2e-5)
    np.testing.assert_allclose(back.scales, moved.scales, rtol=1e-5)
    np.testing.assert_allclose(back.opacities, moved.opacities, atol=1e-6)
    np.testing.assert_array_equal(back.sh, moved.sh)


def test_to_tensors_pads_or_cuts_harmonics() -> None:
    asset = make_asset(degree=1)
    assert asset.to_tensors(SceneFrame(), sh_degree=0)["shN"].shape == (37, 0, 3)
    padded = asset.to_tensors(SceneFrame(), sh_degree=3)["shN"]
    assert padded.shape == (37, 15, 3) and (padded[:, 3:] == 0).all()
    np.testing.assert_array_equal(padded[:, :3].numpy(), asset.sh[:, 1:])


def test_saturated_values_stay_finite(tmp_path: Path) -> None:
    asset = make_asset(count=3)
    asset.opacities[:] = [0.0, 1.0, 0.5]
    asset.scales[0] = 0.0
    write_ply(tmp_path / "a.ply", asset)
    rows = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert all(np.isfinite(rows[p.name]).all() for p in rows.properties)
    np.testing.assert_allclose(read_ply(tmp_path / "a.ply").opacities, asset.opacities, atol=1e-6)


def test_an_infinite_logit_is_an_opacity_of_one() -> None:
    asset = make_asset(count=2)
    stored = [asset.means, asset.quats, asset.log_scales, np.array([np.inf, -np.inf]), asset.sh]
    assert SplatAsset.from_stored(*stored).opacities.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("means", np.full((4, 3), np.nan, np.float32), "means: 4 of 4 Gaussians"),
        ("scales", -np.ones((4, 3), np.float32), "scales: expected none below 0"),
        ("opacities", np.full(4, 1.5, np.float32), "opacities: expected 0..1"),
        ("quats", np.full((4, 4), 2, np.float32), "quats: expected unit length"),
        ("quats", np.ones((4, 4)), "quats: expected float32"),
        ("sh", np.zeros((4, 5, 3), np.float32), "sh: expected"),
        ("opacities", np.zeros(5, np.float32), r"opacities: expected float32 \[4\]"),
    ],
)
def test_an_asset_refuses_what_it_cannot_be(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_asset(count=4), **{name: value})


def test_nothing_is_written_for_an_empty_scene(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Gaussians"):
        write_ply(tmp_path / "a.ply", make_asset(count=0))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_went_wrong_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(b"old")

    def write(target: Path, asset: SplatAsset) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_verified(path, make_asset(), write, read_ply, CLOSE)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_a_file_that_reads_back_different_is_not_kept(tmp_path: Path) -> None:
    other = make_asset(seed=1)
    with pytest.raises(OSError, match="came back off"):
        write_verified(tmp_path / "a.ply", make_asset(), lambda p, _: p.write_bytes(b""), lambda _: other, CLOSE)
    assert list(tmp_path.iterdir()) == []


def header_of(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    end = data.index(b"end_header\n") + len(b"end_header\n")
    return data[:end], data[end:]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"plx\n", "does not begin with the line 'ply'"),
        (b"binary_little_endian", b"binary_big_endian", "expected format .* got 'binary_big_endian'"),
        (b"format binary_little_endian 1.0\n", b"", "got 'none'"),
        (b"element vertex 37", b"element vertex 38", "cut short: 38 Gaussians need"),
        (b"element vertex 37", b"element vertex 999999999999", "cut short"),
        (b"element vertex 37", b"element vertex -1", "not understood"),
        (b"element vertex 37", b"element vertex 0", "no Gaussians"),
        (b"element vertex 37", b"element point 37", "no element 'vertex'"),
        (b"property float opacity", b"property float opaque", "opacity missing"),
        (b"property float rot_3", b"property float rot_2", "'rot_2' twice"),
        (b"property float rot_3", b"property half rot_3", "not understood"),
        (b"property float rot_3", b"property list uchar int rot_3", "rot_3 missing"),
        (b"property float nx", b"property list uchar int nx", "list property"),
        (b"property float f_rest_44", b"property float f_rest_45", "expected f_rest_0 onwards"),
        (b"property float nx", b"property float packed_position", "compressed .ply"),
        (b"end_header\n", b"end_haeder\n", "no line 'end_header'|not understood"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "a.ply"
    write_ply(path, make_asset())
    header, body = header_of(path)
    assert old in header
    path.write_bytes(header.replace(old, new, 1) + body)
    with pytest.raises(ValueError, match=message) as caught:
        read_ply(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    write_ply(path, make_asset())
    header, body = header_of(path)
    path.write_bytes(header + np.float32(np.nan).tobytes() + body[4:])
    with pytest.raises(ValueError, match="means: 1 of 37 Gaussians"):
        read_ply(path)


def test_truncated_and_scrambled_files_only_raise_value_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    write_ply(path, make_asset(count=3, degree=1))
    header, body = header_of(path)
    whole = header + body
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            read_ply(path)
    rng = np.random.default_rng(0)
    for text in (False, True):
        start = header.replace(b"binary_little_endian", b"ascii") + b"1 " * 60 if text else whole
        for _ in range(400):
            data = bytearray(start)
            for position in rng.integers(0, len(data), rng.integers(1, 8)):
                data[position] = rng.integers(0, 256)
            path.write_bytes(data)
            try:
                read_ply(path)
            except ValueError as error:
                assert str(path) in str(error)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_ply(tmp_path / "none.ply")
