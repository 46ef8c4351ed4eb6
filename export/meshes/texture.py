"""A texture for a mesh: its faces laid out flat by xatlas, and each texel coloured where it lies on the surface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from prismfield.export.meshes.files import MeshAsset
from prismfield.export.meshes.picture import rasterize_triangles
from prismfield.export.meshes.shape import vertex_normals

_PADDING = 3  # texels between charts: more than bilinear filtering reaches

Colors = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Colours [P, 3] 0..1 of positions [P, 3] with normals [P, 3]."""


def check_texture() -> None:
    """Raise a ValueError if xatlas is not installed."""
    try:
        import xatlas  # noqa: F401
    except ImportError as error:
        raise ValueError("--texture needs xatlas, which is not installed: pip install 'prismfield[meshes]'") from error


def textured(mesh: MeshAsset, size: int, colors: Colors) -> MeshAsset:
    """The mesh with a texture of at most `size` by `size` texels instead of colours at its vertices, which are split along the
    edges of charts.

    Args:
        mesh: in the frame that `colors` takes.
        size: texels.
        colors: what colours a texel.

    Raises:
        ValueError: the texture is too small for so many faces.
    """
    rows, faces, places, width, height = _unfold(mesh, size)
    vertices, normals = mesh.vertices[rows], vertex_normals(mesh.vertices, mesh.faces)[rows]
    face, share = rasterize_triangles(places[faces], np.ones((len(faces), 3)), width, height)
    hit = face >= 0
    corners = faces[face[hit]]
    position, normal = ((share[hit][..., None] * values[corners]).sum(1) for values in (vertices, normals))
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    texture = np.zeros((height, width, 3), np.uint8)
    texture[hit] = np.rint(255 * colors(position, normal).clip(0, 1))
    if hit.any():  # what no face covers takes the colour next to it, so that filtering brings in no other
        _, nearest = distance_transform_edt(~hit, return_indices=True)
        texture = texture[tuple(nearest)]
    uvs = np.stack([places[:, 0] / width, 1 - places[:, 1] / height], 1)
    white = np.ones((len(vertices), 4))
    return replace(mesh, vertices=vertices, faces=faces, colors=white, normals=normals, uvs=uvs, texture=texture)


def _unfold(mesh: MeshAsset, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], int, int]:
    """Rows of the old vertices [V'], faces [F, 3], places [V', 2] in texels from the upper left, width and height."""
    import xatlas

    middle, extent = mesh.vertices.mean(0), max(float(np.ptp(mesh.vertices, 0).max()), 1e-30)
    atlas = xatlas.Atlas()
    atlas.add_mesh(((mesh.vertices - middle) / extent).astype(np.float32), mesh.faces.astype(np.uint32))
    options = xatlas.PackOptions()
    options.resolution, options.padding, options.bilinear = size, _PADDING, True
    atlas.generate(pack_options=options)
    if atlas.atlas_count != 1:
        raise ValueError(f"--texture {size}: too small for {len(mesh):,} faces; decimate them with --faces")
    rows, faces, uvs = atlas.get_mesh(0)
    # It comes out a little larger or smaller than it was asked for
    scale = size / max(atlas.width, atlas.height)
    width, height = max(1, round(scale * atlas.width)), max(1, round(scale * atlas.height))
    places = uvs.astype(np.float64) * [width, height]
    return rows.astype(np.int64), faces.astype(np.int64), places, width, height
