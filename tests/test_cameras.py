"""Cameras: what the numbers mean, and which are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prismfield.render.cameras import Cameras
from prismfield.render.ops.project import project_reference

from .raster_fixtures import make_cameras


def make_doubles(count: int = 3) -> Cameras:
    return make_cameras(count, 70, 45, torch.float64)


def lens(count: int = 3) -> Cameras:
    distortion = torch.arange(8.0 * count, dtype=torch.float64).view(count, 8)
    return replace(make_doubles(count), model="opencv", distortion=distortion)


def test_centers_and_inverses() -> None:
    cameras = make_doubles()
    homogeneous = torch.cat([cameras.centers, torch.ones(3, 1)], -1)[..., None]
    expected = homogeneous.new_tensor([0, 0, 0, 1]).expand(3, 4)
    torch.testing.assert_close((cameras.viewmats @ homogeneous).squeeze(-1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(cameras.camtoworlds[:, :3, 3], cameras.centers)
    again = Cameras.from_camtoworlds(cameras.camtoworlds, cameras.Ks, 70, 45)
    torch.testing.assert_close(again.viewmats, cameras.viewmats)


def test_a_point_on_a_ray_projects_to_its_pixel() -> None:
    """Rays and the rasterizer agree on what a pixel is, for every camera and in the corners."""
    cameras = make_doubles()
    pixels = torch.tensor([(c, x, y) for c in range(3) for x, y in ((0, 0), (69, 44), (0, 44), (31, 7))])
    origins, dirs = cameras.rays(pixels)
    torch.testing.assert_close(dirs.norm(dim=-1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(origins, cameras.centers[pixels[:, 0]])
    points = origins + 2.5 * dirs
    size = torch.full((12, 3), 1e-3, dtype=torch.float64)
    quats = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).expand(12, 4)
    opacities = torch.ones(12, dtype=torch.float64)
    params, _, radii = project_reference(points, quats, size, opacities, cameras.viewmats, cameras.Ks, 70, 45, False)
    rows = torch.arange(12)
    assert (radii[pixels[:, 0], rows] > 0).all()
    torch.testing.assert_close(params[pixels[:, 0], rows, :2], pixels[:, 1:].double() + 0.5, rtol=0, atol=1e-9)


def test_resizing_keeps_the_view() -> None:
    """The same relative place in the picture sees the same direction, though the ratios of the two axes differ."""
    cameras = make_doubles()
    small = cameras.resized(14, 15)
    assert (small.width, small.height) == (14, 15)
    # Pixel (2, 4) of 14x15 has its centre at that of the block of 5x3 pixels around (12, 13)
    _, wanted = cameras.rays(torch.tensor([[1, 12, 13]]))
    _, got = small.rays(torch.tensor([[1, 2, 4]]))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(cameras.Ks, make_doubles().Ks)  # the original is left alone


@pytest.mark.parametrize(("index", "chosen"), [(0, [0]), (-1, [2]), (-3, [0]), (slice(1, None), [1, 2])])
def test_indexing_gives_a_batch(index: int | slice, chosen: list[int]) -> None:
    cameras = lens()
    picked = cameras[index]
    assert len(picked) == len(chosen) and picked.model == "opencv"
    for name in ("viewmats", "Ks", "distortion"):
        assert torch.equal(getattr(picked, name), getattr(cameras, name)[chosen]), name


def test_index_by_mask_and_stack_again() -> None:
    cameras = lens()
    parts = [cameras[torch.tensor([True, False, False])], cameras[torch.tensor([1, 2])]]
    again = Cameras.stack(parts)
    for name in ("viewmats", "Ks", "distortion"):
        assert torch.equal(getattr(again, name), getattr(cameras, name)), name
    assert (again.width, again.height, again.model) == (70, 45, "opencv")
    assert Cameras.stack([make_doubles()[0]]).distortion is None


def test_stacking_what_does_not_fit() -> None:
    plain = make_doubles()
    for pair in ([plain, plain.resized(45, 70)], [plain, lens()], [lens(), replace(plain, model="opencv")]):
        with pytest.raises(ValueError, match=r"^cameras: expected one image size and one camera model"):
            Cameras.stack(pair)


def test_to_device(device: torch.device) -> None:
    cameras = lens().to(device)
    assert {t.device.type for t in (cameras.viewmats, cameras.Ks, cameras.distortion)} == {device.type}
    pixels = torch.tensor([[0, 3, 4]], device=device)
    torch.testing.assert_close(make_doubles().to(device).rays(pixels)[1].cpu(), make_doubles().rays(pixels.cpu())[1])


def test_what_is_refused() -> None:
    cameras = make_doubles()
    with pytest.raises(ValueError, match=r"^viewmats: expected \[C, 4, 4\], got \(3, 3, 4\)"):
        replace(cameras, viewmats=cameras.viewmats[:, :3])
    with pytest.raises(ValueError, match=r"^Ks: expected \[3, 3, 3\] like viewmats, got \(2, 3, 3\)"):
        replace(cameras, Ks=cameras.Ks[:2])
    with pytest.raises(ValueError, match=r"^image size: expected at least 1x1, got 70x0"):
        replace(cameras, height=0)
    with pytest.raises(ValueError, match=r"^rays: expected pinhole cameras, got 'opencv'"):
        lens().rays(torch.tensor([[0, 1, 2]]))
