"""The surface of a trained scene as a mesh: depths fused for what is made of primitives, marching cubes for fields."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export.meshes.bricks import Bricks, marching_cubes
from prismfield.export.meshes.config import SurfaceConfig
from prismfield.export.meshes.field_bricks import density_bricks, field_colors
from prismfield.export.meshes.files import MeshAsset
from prismfield.export.meshes.fusion import Fusion
from prismfield.export.meshes.shape import colors_from_views, decimated, largest_parts, open_edges, vertex_normals
from prismfield.export.meshes.texture import check_texture, textured
from prismfield.export.meshes.views import SceneViews
from prismfield.representations.fields import Field

if TYPE_CHECKING:
    from prismfield.export.library import Scene

_TEXTURED = 100_000  # faces: unfolding many more takes minutes
_HALF_OPAQUE = 5e-3  # of the box's diagonal is at the threshold: on fields of the lego the least biased


@dataclass(frozen=True)
class Surface:
    """A mesh and what is to be said about it."""

    mesh: MeshAsset
    """In the user's frame."""
    method: str
    """How it was found, in words."""
    voxel: float
    """User units."""
    found: int
    """Faces before any were left out."""
    parts_left_out: int
    open_edges: int
    """0 if it is watertight."""


def find_surface(scene: Scene, config: SurfaceConfig) -> Surface:
    """The mesh of a scene, in the user's frame.

    Raises:
        FileNotFoundError: the capture, whose cameras it takes, is not there any more.
        ValueError: an option makes no sense, it takes more memory than allowed, or there is no surface.
    """
    config.check()
    if config.texture is not None:
        check_texture()
    finder = _Finder(scene, config)
    bricks = finder.density() if finder.by_density else finder.fuse()
    vertices, faces = marching_cubes(bricks)
    found = len(faces)
    if not found:
        raise ValueError(f"{scene.path}: there is no surface {finder.where}")
    vertices, faces, left_out = largest_parts(vertices, faces, config.smallest_part)
    count = _TEXTURED if config.faces is None and config.texture is not None else config.faces
    if count is not None:
        vertices, faces = decimated(vertices, faces, count)
    mesh = MeshAsset(vertices, faces, np.ones((len(vertices), 4)), up=scene.frame.up)
    if config.texture is None:
        mesh.colors[:, :3] = finder.colors(vertices, vertex_normals(vertices, faces))
    else:
        mesh = textured(mesh, config.texture, finder.colors)
    mesh = replace(mesh, vertices=mesh.vertices / scene.frame.scale + np.array(scene.frame.center))
    return Surface(mesh, finder.about, finder.voxel / scene.frame.scale, found, left_out, open_edges(faces))


class _Finder:
    """A scene on its way to a surface, in the frame of its representation."""

    def __init__(self, scene: Scene, config: SurfaceConfig) -> None:
        self.scene, self.config = scene, config
        field: Any = scene.representation
        self.field: Field | None = field if isinstance(field, Field) else None
        if config.method == "density" and self.field is None:
            raise ValueError(f"--method density: {scene.path} has no density; it is not a field")
        self.by_density = self.field is not None and config.method != "fusion"
        self.views = None if self.by_density else SceneViews(scene, config.depth, config.views)
        self.box = self._box()
        side = float((self.box[1] - self.box[0]).max())
        if config.voxel is not None:
            self.voxel = config.voxel * scene.frame.scale
            if not side / 8192 <= self.voxel <= side / 2:
                unit = side / scene.frame.scale
                raise ValueError(
                    f"--voxel: expected {unit / 8192:.3g} to {unit / 2:.3g} in this box, got {config.voxel:g}"
                )
        else:
            self.voxel = max(side / config.resolution, 0.0 if self.views is None else self.views.footprint())
        self.threshold = np.log(2) / (_HALF_OPAQUE * float(np.linalg.norm(self.box[1] - self.box[0])))
        if config.threshold is not None:
            self.threshold = config.threshold / scene.frame.scale
        if self.by_density:
            self.where = f"of density {self.threshold * scene.frame.scale:.3g} per unit"
            self.about = f"the field's surface {self.where}"
        else:
            self.where = f"that {config.least_views} views see"
            self.about = f"{config.depth} depths of {len(self.views or ())} views fused"

    def fuse(self) -> Bricks:
        """Signed distances from the views' depths."""
        assert self.views is not None
        fusion = Fusion(self.box, self.voxel, self.config.truncation * self.voxel)
        try:
            fusion.allocate(self.views, self.config.memory_mb << 20, unit=1 / self.scene.frame.scale)
        except ValueError as error:
            raise ValueError(f"{self.scene.path}: {error}") from error
        return fusion.fuse(self.views, least_views=self.config.least_views)

    def density(self) -> Bricks:
        """Logarithms of threshold over density, in the occupied cells of the box."""
        assert self.field is not None
        try:
            return density_bricks(self.field, self.box, self.voxel, self.threshold, self.config.memory_mb << 20)
        except ValueError as error:
            raise ValueError(f"{self.scene.path}: {error}") from error

    def colors(self, vertices: NDArray[np.float64], normals: NDArray[np.float64]) -> NDArray[np.float64]:
        """[V, 3] display-referred."""
        if self.by_density:
            assert self.field is not None
            return field_colors(self.field, vertices, normals)
        assert self.views is not None
        return colors_from_views(vertices, normals, self.views, self.config.truncation * self.voxel)

    def _box(self) -> NDArray[np.float64]:
        """[2, 3] scene units."""
        if self.config.box is not None:
            box = np.array(self.config.box, np.float64).reshape(2, 3)
            return (box - np.array(self.scene.frame.center)) * self.scene.frame.scale
        if self.views is not None:
            return self.views.box()
        assert self.field is not None
        return self.field.grid.aabb.double().cpu().numpy()
