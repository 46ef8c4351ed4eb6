"""Decoded views: pixels, cameras, cache."""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from prismfield.datasets import views as views_module
from prismfield.datasets.images import decode
from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import Views

from .tiny_captures import CX, CY, FX, FY, HEIGHT, WIDTH, transforms, write_image, write_transforms


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files decoded so far, in order."""
    names: list[str] = []

    def spy(path: Path, data: bytes | None = None) -> np.ndarray:
        names.append(path.name)
        return decode(path, data)

    monkeypatch.setattr(views_module, "decode", spy)
    return names


def test_view_of_a_pinhole_image_is_the_file(tmp_path: Path) -> None:
    frames = load_scene(str(write_transforms(tmp_path))).train
    views = Views(frames)
    view = views[2]
    assert view.rgb.dtype == torch.uint8
    np.testing.assert_array_equal(view.rgb, decode(frames[2].image_path))
    assert (view.alpha, view.mask, view.depth) == (None, None, None)
    torch.testing.assert_close(view.camera.Ks, frames[2].camera.Ks)
    torch.testing.assert_close(view.camera.viewmats, frames[2].camera.viewmats)
    assert views.size(2) == (WIDTH, HEIGHT) and len(views) == 7 and views[-1].camera is views.camera(6)
    assert [v.rgb.shape for v in views[1:3]] == [view.rgb.shape] * 2
    with pytest.raises(IndexError):
        views[7]
    assert views.source == "images as they are"


def test_downscale_cuts_the_rest_and_keeps_the_geometry(tmp_path: Path) -> None:
    frames = load_scene(str(write_transforms(tmp_path))).train
    views = Views(frames, downscale=3)
    view = views[0]
    assert views.size(0) == (13, 8) == (view.camera.width, view.camera.height)
    np.testing.assert_allclose(view.camera.Ks[0], [[FX / 3, 0, CX / 3], [0, FY / 3, CY / 3], [0, 0, 1]], rtol=1e-6)
    expected = decode(frames[0].image_path)[:24, :39].reshape(8, 3, 13, 3, 3).mean((1, 3))
    assert np.abs(view.rgb.numpy() - expected).max() <= 0.51
    assert "averaged over 3x3" in views.source
    with pytest.raises(ValueError, match="downscale"):
        Views(frames, downscale=0)
    with pytest.raises(ValueError, match="nothing would be left"):
        Views(frames, downscale=25)


def test_ready_made_copies_are_used_if_their_size_fits(tmp_path: Path) -> None:
    frames = load_scene(str(write_transforms(tmp_path))).train
    for i, frame in enumerate(frames):
        write_image(tmp_path / "images_3" / frame.name, 100 + i, size=(14, 8))  # 13.3 rounded up
        write_image(tmp_path / "images_2" / frame.name, 100 + i, size=(13, 8))
    thirds, halves = Views(frames, downscale=3), Views(frames, downscale=2)
    np.testing.assert_array_equal(thirds[0].rgb, decode(tmp_path / "images_3" / frames[0].name))
    assert thirds.source == "the capture's own images_3"
    ratio = 14 / WIDTH
    np.testing.assert_allclose(thirds[0].camera.Ks[0, 0], [FX * ratio, 0, CX * ratio], rtol=1e-6)
    assert halves.size(0) == (20, 12) and "averaged" in halves.source
    (tmp_path / "images_3" / frames[1].name).unlink()
    mixed = Views(frames, downscale=3)
    assert mixed.size(0) == (14, 8) and mixed.size(1) == (13, 8) and "6 of 7 from images_3" in mixed.source


def test_alpha_and_masks(tmp_path: Path) -> None:
    table = transforms()
    random = np.random.default_rng(0)
    masks, pixels = [], []
    for i, frame in enumerate(table["frames"]):
        frame["mask_path"] = f"masks/{i:03d}.png"
        masks.append(cv2.resize(random.integers(0, 2, (4, 6), dtype=np.uint8), (WIDTH, HEIGHT), interpolation=0))
        pixels.append(write_image(tmp_path / f"images/{i:03d}.png", i, channels=4))
        (tmp_path / "masks").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"masks/{i:03d}.png"), masks[i] * 255)
    data = load_scene(str(write_transforms(tmp_path, table)))
    view = Views(data.train)[0]
    assert view.alpha is not None and view.mask is not None
    np.testing.assert_array_equal(view.alpha, pixels[1][..., 3])
    np.testing.assert_array_equal(view.mask, masks[1] == 1)
    small = Views(data.train, downscale=5)[0]
    assert small.mask is not None
    whole = masks[1][:20, :40].reshape(4, 5, 8, 5).min((1, 3)) == 1
    np.testing.assert_array_equal(small.mask, whole)


def test_depth_comes_in_scene_units(tmp_path: Path) -> None:
    table = transforms(depth_scale=0.002)
    values = np.random.default_rng(0).integers(1, 60000, (HEIGHT, WIDTH), dtype=np.uint16)
    values[:10, :10] = 0
    for frame in table["frames"]:
        frame["depth_file_path"] = "depth.png"
    cv2.imwrite(str(tmp_path / "depth.png"), values)
    data = load_scene(str(write_transforms(tmp_path, table)))
    scale = data.frame.scale
    depth = Views(data.test, scale=scale)[0].depth
    assert depth is not None
    np.testing.assert_allclose(depth, values * 0.002 * scale, rtol=1e-5)
    small = Views(data.test, scale=scale, downscale=4)[0].depth
    assert small is not None and small.shape == (6, 10)
    block = values[8:12, 8:12]  # unknown in a quarter of its pixels
    assert float(small[2, 2]) == pytest.approx(block[block > 0].mean() * 0.002 * scale, rel=1e-4)
    assert (small[:2, :2] == 0).all()


def test_16_bit_images_are_float(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    (tmp_path / "images").mkdir()
    for i in range(9):
        cv2.imwrite(str(tmp_path / f"images/{i:03d}.png"), values[..., ::-1])
    rgb = Views(load_scene(str(write_transforms(tmp_path))).train)[0].rgb
    assert rgb.dtype == torch.float32
    np.testing.assert_allclose(rgb, values / 65535, atol=1e-6)


def test_distorted_frames_become_pinhole_views(shared_data: Path) -> None:
    data = load_scene(str(shared_data / "fox"))
    views = Views(data.test)
    assert views.size(0) == (270, 480)
    view = views[0]
    assert view.camera.model == "pinhole" and view.camera.distortion is None and view.mask is None
    K, frame = data.test[0].camera.Ks[0].numpy(), data.test[0]
    assert frame.camera.distortion is not None
    k = frame.camera.distortion[0].numpy().astype(float)
    maps = cv2.initUndistortRectifyMap(
        K.astype(float), k, np.eye(3), _shift(view.camera.Ks[0].numpy()), (270, 480), cv2.CV_32FC1
    )  # fmt: skip
    # OpenCV's pixel centres are whole numbers on both sides
    K_cv = _shift(K)
    maps = cv2.initUndistortRectifyMap(K_cv, k, np.eye(3), _shift(view.camera.Ks[0].numpy()), (270, 480), cv2.CV_32FC1)
    expected = cv2.remap(decode(frame.image_path), *maps, cv2.INTER_LINEAR)
    difference = np.abs(view.rgb.numpy().astype(int) - expected)[2:-2, 2:-2]
    assert difference.mean() < 0.1 and difference.max() <= 16


def _shift(K: np.ndarray) -> np.ndarray:
    """The same camera with pixel centres at whole numbers."""
    moved = K.astype(np.float64).copy()
    moved[:2, 2] -= 0.5
    return moved


def test_validity_of_a_wide_lens_reaches_the_mask(tmp_path: Path) -> None:
    table = transforms(camera_model="OPENCV", k1=-0.6, fl_x=25.0, fl_y=25.0)
    data = load_scene(str(write_transforms(tmp_path, table)))
    view = Views(data.train)[0]
    assert view.mask is not None and 0.3 < float(view.mask.float().mean()) < 1
    small = Views(data.train, downscale=2)[0]
    assert small.mask is not None
    height, width = small.mask.shape
    blocks = view.mask.numpy()[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
    np.testing.assert_array_equal(small.mask, blocks.all((1, 3)))


def test_everything_that_fits_is_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    views = Views(load_scene(str(write_transforms(tmp_path))).train)
    for _ in range(3):
        for i in range(len(views)):
            assert views[i] is views[i]
    assert len(decoded) == len(views) == 7
    assert views.nbytes == 7 * WIDTH * HEIGHT * 3


def test_cache_stays_within_its_budget(tmp_path: Path, decoded: list[str]) -> None:
    image = WIDTH * HEIGHT * 3
    frames = load_scene(str(write_transforms(tmp_path))).train
    budget = 4 * image
    views = Views(frames, byte_budget=budget)
    for i in [0, 1, 2, 3, 0, 4, 5, 6, 0, 1]:
        np.testing.assert_array_equal(views[i].rgb, decode(frames[i].image_path))
        assert views.nbytes <= budget
    assert decoded.count("001.png") > 1, "two images fit beside the files: the rest is decoded again"
    assert len(views._files) > 0


def test_least_recently_used_view_leaves_first(tmp_path: Path, decoded: list[str]) -> None:
    image = WIDTH * HEIGHT * 3
    views = Views(load_scene(str(write_transforms(tmp_path))).train, byte_budget=6 * image)  # three decoded ones
    for i in (0, 1, 2, 0, 3):
        _ = views[i]
    before = len(decoded)
    _ = views[0]
    assert len(decoded) == before
    _ = views[1]
    assert len(decoded) == before + 1


def test_compressed_bytes_are_not_read_twice(tmp_path: Path) -> None:
    frames = load_scene(str(write_transforms(tmp_path))).train
    views = Views(frames, byte_budget=5 * WIDTH * HEIGHT * 3)
    first = views[0].rgb.clone()
    for i in range(1, 7):
        _ = views[i]
    frames[0].image_path.unlink()
    assert 0 not in views._decoded
    torch.testing.assert_close(views[0].rgb, first)


def test_budget_smaller_than_one_image_still_works(tmp_path: Path) -> None:
    views = Views(load_scene(str(write_transforms(tmp_path))).train, byte_budget=100)
    assert views[0].rgb.shape == (HEIGHT, WIDTH, 3) and views.nbytes <= 100


def test_threads_share_one_decoding(tmp_path: Path, decoded: list[str]) -> None:
    views = Views(load_scene(str(write_transforms(tmp_path))).train)
    start = threading.Barrier(8)
    found: list[object] = []

    def read() -> None:
        start.wait()
        found.extend(views[i] for i in range(len(views)))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 7 and len(set(map(id, found))) == 7


def test_prefetch_decodes_in_the_background(tmp_path: Path, decoded: list[str]) -> None:
    views = Views(load_scene(str(write_transforms(tmp_path))).train)
    views.prefetch(3)
    views.prefetch(3)
    _ = views[3]
    assert decoded == ["004.png"]


@pytest.mark.parametrize("prefetched", [False, True])
def test_truncated_image_is_an_error_that_names_it(tmp_path: Path, prefetched: bool) -> None:
    frames = load_scene(str(write_transforms(tmp_path))).train
    data = frames[2].image_path.read_bytes()
    frames[2].image_path.write_bytes(data[: len(data) // 2])
    views = Views(frames)
    if prefetched:
        views.prefetch(2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"003\.png: truncated"):
            _ = views[2]
    assert views[3].rgb.shape == (HEIGHT, WIDTH, 3)


def test_file_exchanged_after_loading_is_an_error(tmp_path: Path) -> None:
    frames = load_scene(str(write_transforms(tmp_path))).train
    views = Views(frames)
    write_image(frames[0].image_path, 0, size=(WIDTH + 2, HEIGHT))
    with pytest.raises(ValueError, match=r"001\.png: image of 42x24, expected 40x24"):
        _ = views[0]
