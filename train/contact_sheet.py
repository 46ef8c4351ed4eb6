"""A page of pictures: each view as it was rendered, as it was photographed, and where the two differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL_WIDTH, _CELL_HEIGHT, _LEAST_WIDTH = 400, 400, 240  # the least for what is written above the pictures
_GAP, _LINE, _FONT_SIZE = 6, 24, 14
_PAPER, _INK, _FAINT = (18, 18, 20), (235, 235, 235), (160, 160, 165)
_HEADS = ("render", "photograph", "error (FLIP: black 0, yellow 1)")


@dataclass(frozen=True)
class Row:
    """One view, small enough to be shown."""

    name: str
    words: str
    """Its scores."""
    pictures: tuple[NDArray[np.uint8], ...]
    """Render, photograph and error, [H, W, 3] each."""


def check_picture(path: Path) -> None:
    """Raise a ValueError if `path` does not name a picture that can be written."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"{path}: expected a picture's name ending in .jpg or .png")


def make_row(name: str, words: str, rgb: Tensor, truth: Tensor, errors: Tensor) -> Row:
    """Shrink a view to the sheet's size.

    Args:
        name: of the view.
        words: its scores.
        rgb: [H, W, 3] rendered, 0..1.
        truth: the photograph, the same.
        errors: [H, W] in 0..1.
    """
    colored = cv2.applyColorMap(_bytes(errors), cv2.COLORMAP_INFERNO)[..., ::-1].astype(np.uint8)
    return Row(name, words, tuple(_shrunk(picture) for picture in (_bytes(rgb), _bytes(truth), colored)))


def contact_sheet(rows: list[Row], title: str) -> Tensor:
    """[H, W, 3] in 0..1: `title`, the heads of the columns, then the rows."""
    width = max(_LEAST_WIDTH, *(row.pictures[0].shape[1] for row in rows))
    height = 2 * _LINE + sum(_LINE + row.pictures[0].shape[0] + _GAP for row in rows)
    page = Image.new("RGB", (3 * width + 4 * _GAP, height), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_SIZE)
    lefts = [_GAP + column * (width + _GAP) for column in range(3)]
    draw.text((_GAP, 4), title, _INK, font)
    for left, head in zip(lefts, _HEADS, strict=True):
        draw.text((left, _LINE + 4), head, _FAINT, font)
    top = 2 * _LINE
    for row in rows:
        draw.text((lefts[0], top + 4), row.name, _INK, font)
        draw.text((lefts[1], top + 4), row.words, _FAINT, font)
        top += _LINE
        for left, picture in zip(lefts, row.pictures, strict=True):
            page.paste(Image.fromarray(picture), (left, top))
        top += row.pictures[0].shape[0] + _GAP
    return torch.from_numpy(np.asarray(page).astype(np.float32) / 255)


def _bytes(image: Tensor) -> NDArray[np.uint8]:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _shrunk(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most as large as a cell of the sheet; small ones stay as they are."""
    height, width = picture.shape[:2]
    factor = min(1.0, _CELL_WIDTH / width, _CELL_HEIGHT / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
