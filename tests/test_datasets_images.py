"""Image files: kinds, damage, shrinking."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from prismfield.datasets.images import decode, find_image, read_depth, read_info, read_mask, shrink, srgb_encode

from .tiny_captures import write_image


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".jpg"])
def test_8_bit_colour(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    expected = write_image(path, 0)
    pixels = decode(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (24, 40, 3)
    lossy = suffix in (".jpg", ".webp")
    assert np.abs(pixels.astype(int) - expected).mean() < (6 if lossy else 1e-9)  # a swap of red and blue is above 60
    info = read_info(path)
    assert (info.width, info.height, info.has_alpha, info.is_float, info.rotated) == (40, 24, False, False, False)


def test_straight_alpha(tmp_path: Path) -> None:
    expected = write_image(tmp_path / "a.png", 1, channels=4)
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), expected)
    assert read_info(tmp_path / "a.png").has_alpha


def test_16_bit_png_is_float_in_0_to_1(tmp_path: Path) -> None:
    values = np.arange(24 * 40 * 3, dtype=np.uint16).reshape(24, 40, 3) * 22
    cv2.imwrite(str(tmp_path / "a.png"), values[..., ::-1])
    pixels = decode(tmp_path / "a.png")
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, values / 65535, atol=1e-7)
    assert read_info(tmp_path / "a.png").is_float


def test_grey_and_grey_with_alpha(tmp_path: Path) -> None:
    grey = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(decode(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(np.stack([grey, 255 - grey], -1), mode="LA").save(tmp_path / "la.png")
    pixels = decode(tmp_path / "la.png")
    np.testing.assert_array_equal(pixels[..., 1], grey)
    np.testing.assert_array_equal(pixels[..., 3], 255 - grey)


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "a.png", 2)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=98, subsampling=0)
    info = read_info(tmp_path / "a.jpg")
    assert (info.width, info.height, info.rotated) == (40, 24, True)
    assert np.abs(decode(tmp_path / "a.jpg").astype(int) - pixels).mean() < 3


def test_exr_is_srgb_encoded_with_straight_alpha(tmp_path: Path) -> None:
    exr = pytest.importorskip("OpenEXR", reason="EXR files need the OpenEXR package")
    random = np.random.default_rng(0)
    rgb, alpha = random.random((24, 40, 3)).astype(np.float32), random.random((24, 40)).astype(np.float32)
    alpha[:3] = 0
    channels = {c: np.ascontiguousarray(rgb[..., i] * alpha) for i, c in enumerate("RGB")} | {"A": alpha}
    path = tmp_path / "a.exr"
    exr.File({"type": exr.scanlineimage, "compression": exr.ZIP_COMPRESSION}, channels).write(str(path))
    info = read_info(path)
    assert (info.width, info.height, info.has_alpha, info.is_float) == (40, 24, True, True)
    pixels = decode(path)
    np.testing.assert_allclose(pixels[..., 3], alpha)
    np.testing.assert_allclose(pixels[3:, :, :3], srgb_encode(rgb[3:]), atol=1e-4)
    assert (pixels[:3] == 0).all()


def test_real_exr_has_the_known_size(shared_data: Path) -> None:
    pytest.importorskip("OpenEXR", reason="EXR files need the OpenEXR package")
    pixels = decode(shared_data / "image" / "albert.exr")
    assert pixels.shape == (1024, 1024, 4) and pixels.dtype == np.float32
    assert 0 <= pixels.min() < 0.05 and 0.9 < pixels.max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_file_is_an_error_that_names_it(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"half{suffix}"
    write_image(path, 0, size=(160, 100))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=f"half\\{suffix}.*(truncated|empty|damaged)"):
        decode(path)


def test_damaged_png_and_text_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(path, 0, size=(160, 100))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: damaged PNG"):
        decode(path)
    path.write_text("not an image at all")
    with pytest.raises(ValueError, match=r"a\.png"):
        decode(path)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        read_info(path)


def test_find_image_adds_extensions(tmp_path: Path) -> None:
    write_image(tmp_path / "r_1.png", 0)
    write_image(tmp_path / "b.JPG", 0)
    assert find_image(tmp_path / "r_1") == tmp_path / "r_1.png"
    assert find_image(tmp_path / "b") == tmp_path / "b.JPG"
    assert find_image(tmp_path / "r_1.png") == tmp_path / "r_1.png"
    assert find_image(tmp_path / "r_2") is None


def test_mask_threshold_suits_0_1_and_0_255(tmp_path: Path) -> None:
    expected = np.zeros((24, 40), bool)
    expected[5:9, 3:30] = True
    for peak in (1, 255):
        cv2.imwrite(str(tmp_path / "m.png"), expected.astype(np.uint8) * peak)
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), expected)
    cv2.imwrite(str(tmp_path / "m.png"), np.zeros((24, 40), np.uint8))
    assert not read_mask(tmp_path / "m.png").any()


def test_depth_file_in_its_unit(tmp_path: Path) -> None:
    values = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 60
    cv2.imwrite(str(tmp_path / "d.png"), values)
    np.testing.assert_allclose(read_depth(tmp_path / "d.png", 0.002), values * 0.002, rtol=1e-6)


def test_shrink_averages_blocks_and_drops_the_rest() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (26, 41, 3), dtype=np.uint8)
    expected = pixels[:24, :39].reshape(8, 3, 13, 3, 3).mean((1, 3))
    assert np.abs(shrink(pixels, 3) - expected).max() <= 0.51
    with pytest.raises(ValueError, match="nothing would be left"):
        shrink(pixels, 27)


def test_shrink_weighs_colours_by_alpha() -> None:
    pixels = np.array([[[200, 100, 0, 255], [0, 0, 255, 0]], [[100, 200, 0, 255], [0, 0, 255, 0]]], np.uint8)
    np.testing.assert_array_equal(shrink(pixels, 2)[0, 0], [150, 150, 0, 128])
