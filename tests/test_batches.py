"""Training images in random order: each once an epoch, resumable, blended, cut out and shrunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import View, Views
from prismfield.train.batches import Batches, cut_out, make_batch

from .tiny_captures import CX, CY, FX, FY, HEIGHT, WIDTH, camtoworlds, transforms, write_image, write_transforms


def make_views(folder: Path, *, channels: int = 3, count: int = 6) -> Views:
    for index in range(count):
        write_image(folder / "images" / f"{index:03d}.png", index, channels=channels)
    table = transforms(count)
    assert len(camtoworlds(count)) == len(table["frames"])
    return Views(load_scene(str(write_transforms(folder, table)), eval_every_nth=0).train)


def half_mask() -> torch.Tensor:
    mask = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, : WIDTH // 2 + 1] = False
    return mask


def test_every_image_comes_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    batches = Batches(make_views(tmp_path), background=0.0, seed=3)
    epochs = [[batches.next(1).index for _ in range(6)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    views = make_views(tmp_path, channels=4)
    first = Batches(views, background=1.0, random_background=True, seed=5)
    for _ in range(4):
        first.next(1)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second = Batches(views, background=1.0, random_background=True, seed=99)
    second.load_state_dict(state)
    for _ in range(9):
        a, b = first.next(1), second.next(1)
        assert a.index == b.index
        assert torch.equal(a.background, b.background) and torch.equal(a.rgb, b.rgb)


def test_transparent_images_lie_over_the_background(tmp_path: Path) -> None:
    views = make_views(tmp_path, channels=4)
    fixed = Batches(views, background=1.0).next(1)
    view = views[fixed.index]
    alpha = view.alpha.float()[..., None] / 255
    wanted = view.rgb.float() / 255 * alpha + (1 - alpha)
    assert (fixed.rgb_float[0] - wanted).abs().max() <= 0.51 / 255
    drawn = [Batches(views, background=1.0, random_background=True, seed=seed).next(1) for seed in (0, 1)]
    assert not torch.equal(drawn[0].background, drawn[1].background)


def test_masked_pixels_do_not_count_at_any_size(tmp_path: Path) -> None:
    view = replace(make_views(tmp_path)[0], mask=half_mask())
    black = torch.zeros(1, 3)
    full = make_batch(view, 0, black)
    assert torch.equal(full.mask[0], half_mask())
    small = make_batch(view, 0, black, 2)
    assert torch.equal(small.mask[0], half_mask().view(HEIGHT // 2, 2, WIDTH // 2, 2).all(3).all(1))
    assert make_batch(view, 0, black, use_masks=False).mask is None


def test_shrinking_averages_and_keeps_the_geometry(tmp_path: Path) -> None:
    view = make_views(tmp_path)[0]
    batch = make_batch(view, 0, torch.zeros(1, 3), 4)
    wanted = view.rgb.float().view(HEIGHT // 4, 4, WIDTH // 4, 4, 3).mean((1, 3))
    assert (batch.rgb[0].float() - wanted).abs().max() <= 0.51
    K = torch.tensor([[FX / 4, 0, CX / 4], [0, FY / 4, CY / 4], [0, 0, 1]])
    torch.testing.assert_close(batch.cameras.Ks[0], K)
    assert (batch.cameras.width, batch.cameras.height) == (WIDTH // 4, HEIGHT // 4)


@pytest.mark.parametrize("channels", [3, 4])
def test_cut_out_makes_what_the_mask_leaves_out_empty(tmp_path: Path, channels: int) -> None:
    plain = make_views(tmp_path, channels=channels)[0]
    view = cut_out(replace(plain, mask=half_mask()))
    assert view.mask is None
    assert (view.alpha[~half_mask()] == 0).all()
    kept = torch.full_like(plain.rgb[..., 0], 255) if plain.alpha is None else plain.alpha
    assert torch.equal(view.alpha[half_mask()], kept[half_mask()])
    assert cut_out(plain) is plain
    green = torch.tensor([[0.0, 1.0, 0.0]])
    assert (make_batch(view, 0, green).rgb[0][~half_mask()] == torch.tensor([0, 255, 0])).all()


def test_cut_out_views_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(tmp_path)
    decoded = Views.__getitem__

    def masked(self: Views, index: int) -> View:
        return replace(decoded(self, index), mask=half_mask())

    monkeypatch.setattr(Views, "__getitem__", masked)
    assert Batches(views, background=0.0).next(1).mask is not None
    batch = Batches(views, background=0.5, cut_out=True).next(1)
    assert batch.mask is None
    assert (batch.rgb[0][~half_mask()] == 128).all()
