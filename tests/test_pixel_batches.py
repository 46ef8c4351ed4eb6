"""Random pixels of random images: the right ones, as many as asked for, resumable, within the byte budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import View, Views
from prismfield.train.batches import Batch, ImageError, PixelBatches

from .tiny_captures import HEIGHT, WIDTH, transforms, write_image, write_transforms


def make_views(folder: Path, *, channels: int = 3, count: int = 6) -> Views:
    for index in range(count):
        write_image(folder / "images" / f"{index:03d}.png", index, channels=channels)
    return Views(load_scene(str(write_transforms(folder, transforms(count))), eval_every_nth=0).train)


def truth(views: Views, batch: Batch, name: str = "rgb") -> torch.Tensor:
    """What the views have at the pixels of a batch."""
    assert batch.pixels is not None
    return torch.stack([getattr(views[v], name)[row, column] for v, column, row in batch.pixels.tolist()])


def test_pixels_are_those_of_their_images(tmp_path: Path) -> None:
    views = make_views(tmp_path)
    batch = PixelBatches(views, background=0.0, samples=1 << 18).next()
    assert batch.pixels is not None and isinstance(batch.index, torch.Tensor)
    assert batch.rgb.shape == batch.pixels.shape == (1024, 3) and batch.mask is None and batch.depth is None
    assert torch.equal(batch.rgb, truth(views, batch))
    assert torch.equal(batch.index, batch.pixels[:, 0])
    assert set(batch.index.tolist()) == set(range(6))
    low, high = batch.pixels.amin(0).tolist(), batch.pixels.amax(0).tolist()
    assert low == [0, 0, 0] and high == [5, WIDTH - 1, HEIGHT - 1]
    for index in range(6):
        assert torch.equal(batch.cameras.viewmats[index], views.camera(index).viewmats[0])
        assert torch.equal(batch.cameras.Ks[index], views.camera(index).Ks[0])


def test_images_of_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(tmp_path)
    decoded, size = Views.__getitem__, Views.size
    width, height = WIDTH // 2 - 1, HEIGHT // 2 + 1

    def cut(self: Views, index: int) -> View:
        view = decoded(self, index)
        return replace(view, rgb=view.rgb[:height, :width]) if index % 2 else view

    monkeypatch.setattr(Views, "__getitem__", cut)
    monkeypatch.setattr(Views, "size", lambda self, index: (width, height) if index % 2 else size(self, index))
    batch = PixelBatches(views, background=0.0, samples=1 << 18).next()
    assert torch.equal(batch.rgb, truth(views, batch))


@pytest.mark.parametrize("random", [False, True])
def test_transparent_pixels_lie_over_the_background_of_their_image(tmp_path: Path, random: bool) -> None:
    views = make_views(tmp_path, channels=4)
    batches = PixelBatches(views, background=0.75, random_background=random, samples=1 << 17)
    batch, other = batches.next(), batches.next()
    assert isinstance(batch.index, torch.Tensor)
    alpha = truth(views, batch, "alpha").float()[:, None] / 255
    wanted = alpha * truth(views, batch).float() / 255 + (1 - alpha) * batch.background[batch.index]
    torch.testing.assert_close(batch.rgb_float, wanted)
    assert 0 < alpha.min() < alpha.max()
    assert random == (len(batch.background.unique()) > 1) == (not torch.equal(batch.background, other.background))


def test_masks_and_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(tmp_path)
    decoded = Views.__getitem__
    mask = torch.rand(HEIGHT, WIDTH) > 0.5

    def one_masked(self: Views, index: int) -> View:
        view = decoded(self, index)
        return replace(view, mask=mask, depth=torch.full((HEIGHT, WIDTH), 3.0)) if index == 4 else view

    monkeypatch.setattr(Views, "__getitem__", one_masked)
    batch = PixelBatches(views, background=0.0, samples=1 << 17, with_depth=True).next()
    assert batch.pixels is not None and batch.mask is not None and batch.depth is not None
    is_fourth = batch.pixels[:, 0] == 4
    assert torch.equal(batch.mask, ~is_fourth | mask[batch.pixels[:, 2], batch.pixels[:, 1]])
    assert torch.equal(batch.depth, torch.where(is_fourth, 3.0, 0.0))
    plain = PixelBatches(views, background=0.0, samples=1 << 17, use_masks=False).next()
    assert plain.mask is None and plain.depth is None
    cut = PixelBatches(views, background=0.5, samples=1 << 17, cut_out=True).next()
    assert cut.pixels is not None and cut.mask is None
    gone = (cut.pixels[:, 0] == 4) & ~mask[cut.pixels[:, 2], cut.pixels[:, 1]]
    assert gone.any() and (cut.rgb[gone] == 0.5).all()


def test_the_number_of_rays_follows_the_number_of_samples(tmp_path: Path) -> None:
    batches = PixelBatches(make_views(tmp_path), background=0.0, samples=40_000)
    for per_ray in (400, 50, 7):
        for _ in range(8):
            rays = len(batches.next().rgb)
            batches.adapt(rays * per_ray)
        assert len(batches.next().rgb) == pytest.approx(40_000 / per_ray, rel=0.02)
    batches.adapt(None)
    rays = batches.rays
    batches.adapt(0)
    assert batches.rays == 2 * rays  # by no more than twice: the next image may be full
    for _ in range(10):
        batches.adapt(0)
    assert batches.rays == 1 << 16
    batches.adapt(10**9)
    assert batches.rays == 64


@pytest.mark.parametrize("places", [6, 2])
def test_goes_on_where_it_was_saved(tmp_path: Path, places: int) -> None:
    views, budget = make_views(tmp_path, channels=4), places * 8 * WIDTH * HEIGHT
    first = PixelBatches(views, background=1.0, random_background=True, samples=1 << 16, seed=5, byte_budget=budget)
    for _ in range(4):
        first.adapt(200 * len(first.next().rgb))
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second = PixelBatches(views, background=1.0, random_background=True, samples=1 << 16, seed=9, byte_budget=budget)
    second.load_state_dict(state)
    for _ in range(9):
        a, b = first.next(), second.next()
        assert a.pixels is not None and b.pixels is not None
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.rgb, b.rgb)
        assert torch.equal(a.background, b.background)
    fewer = PixelBatches(views, background=1.0, samples=1 << 16, byte_budget=0)
    with pytest.raises(ValueError, match=rf"^--data.cache-mb: expected memory for {places} images, .* got 1$"):
        fewer.load_state_dict(state)


def test_images_take_turns_where_not_all_fit(tmp_path: Path) -> None:
    views = make_views(tmp_path)
    batches = PixelBatches(views, background=0.0, samples=1 << 17, byte_budget=2 * 8 * WIDTH * HEIGHT)
    seen = []
    for _ in range(5):
        batch = batches.next()
        assert isinstance(batch.index, torch.Tensor)
        assert torch.equal(batch.rgb, truth(views, batch))
        seen.append(set(batch.index.tolist()))
    assert all(len(images) == 2 for images in seen)
    assert all(len(a - b) == 1 for a, b in zip(seen[1:], seen[:-1], strict=True))
    assert set.union(*seen) == set(range(6))


def test_a_damaged_image_is_named_and_asked_for_again(tmp_path: Path) -> None:
    views = make_views(tmp_path)
    path = tmp_path / "images" / "003.png"
    content = path.read_bytes()
    path.write_bytes(content[:40])
    batches = PixelBatches(views, background=0.0, samples=1 << 16, seed=2)
    with pytest.raises(ImageError, match=r"003\.png"):
        batches.next()
    path.write_bytes(content)
    mended = batches.next()
    whole = PixelBatches(views, background=0.0, samples=1 << 16, seed=2).next()
    assert torch.equal(mended.rgb, whole.rgb)
