"""Make the bundled scene `garden`: build it, path-trace it, write images, cameras, a point cloud and depth.

    pip install mitsuba pyoidn
    python datasets/make_garden.py --out datasets/garden

Mitsuba 3 (with LLVM for speed) and Open Image Denoise are needed by this script alone and are imported where it
renders; the geometry, the textures and the cameras are plain NumPy. The same seed gives the same scene.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.datasets import garden_objects as objects
from prismfield.datasets import garden_plants as plants
from prismfield.datasets import garden_textures as textures
from prismfield.datasets.garden_geometry import Array, Mesh, unit

SEED = 20
WIDTH, HEIGHT = 480, 320
FOCAL = 412.0
PRINCIPAL = (237.0, 162.5)
"""Pixels, off the middle (240, 160) on purpose: a loader that assumes the middle is wrong by 3 and 2.5 pixels."""
RINGS = (
    # cameras, radius, height, height of the point looked at (metres)
    (28, 2.45, 1.32, 0.80),
    (26, 2.15, 1.85, 0.70),
    (18, 1.55, 1.50, 0.84),
)
TEST_EVERY, TEST_FIRST = 9, 4
DEPTH_SCALE = 0.002
"""Metres per unit of the 16-bit depth images."""
SKY_DISTANCE = 25.0
"""Metres at which sky pixels enter the point cloud."""
EXPOSURE = 0.68
QUALITY = {False: 80, True: 90}
"""JPEG quality of training and of test views: scores are read off the test views, so they are kept better."""
GUIDE_SPP = 36
LENS_BLUR = 0.6
"""Standard deviation in pixels of the blur that a lens gives; the box-filtered picture is harsher than any photograph."""
MIXED_PIXEL = 1.04
"""Depth is unknown (0) where what a pixel covers differs in depth by more than this ratio, as among leaves."""


@dataclass(frozen=True)
class Shot:
    """One camera of the scene."""

    name: str
    camtoworld: Array
    """[4, 4] OpenGL axes: x right, y up, looking along -z."""
    test: bool


def build(seed: int = SEED) -> dict[str, Mesh]:
    """The whole scene: one mesh for each material, metres, +z up, the table at the origin."""
    # One generator for each part, so that a change to one leaves the others as they are.
    rngs = iter(np.random.default_rng(seed).spawn(32))
    parts: list[objects.Parts] = [
        objects.table(),
        objects.vase(),
        objects.tableware(next(rngs)),
        objects.paving(next(rngs)),
        objects.pebbles(next(rngs)),
        objects.wall(next(rngs)),
        objects.bench(next(rngs)),
        objects.watering_can((1.02, -0.98, 0.0), 2.5),
        plants.hedge(next(rngs)),
    ]
    growing = (plants.bouquet, plants.lawn, plants.joint_moss, plants.ivy, plants.border, plants.trees)
    parts.extend({"foliage": [grow(next(rngs))]} for grow in growing)
    pots: list[tuple[str, float, float, float, float, tuple[float, float, float] | None]] = [
        # plant, radius and height of the pot, distance and angle from the table, glaze
        ("topiary", 0.24, 0.36, 3.05, 0.35, None),
        ("hydrangea", 0.26, 0.34, 2.95, 1.02, (0.20, 0.36, 0.50)),
        ("lavender", 0.20, 0.26, 3.05, 2.42, None),
        ("grass", 0.22, 0.40, 3.10, 2.80, (0.30, 0.33, 0.33)),
        ("topiary", 0.24, 0.36, 3.05, 3.55, None),
        ("geranium", 0.22, 0.28, 2.95, 4.05, None),
        ("fern", 0.24, 0.34, 3.10, 4.62, (0.62, 0.58, 0.48)),
        ("agave", 0.21, 0.26, 3.00, 5.25, None),
        ("geranium", 0.18, 0.22, 1.10, 2.15, None),
        ("lavender", 0.16, 0.20, 1.18, 5.75, (0.66, 0.42, 0.22)),
    ]
    for kind, radius, height, away, angle, glazed in pots:
        foot = np.array([np.cos(angle) * away, np.sin(angle) * away, 0.0])
        rng = next(rngs)
        parts.append(objects.pot(radius, height, foot, glazed))
        parts.append({"foliage": [plants.potted(rng, kind, foot + 0.93 * height * plants.UP, radius)]})
    return objects.joined(parts)


def bitmaps(seed: int = SEED) -> dict[str, textures.Bitmap]:
    """The texture of each material that has one."""
    rngs = iter(np.random.default_rng(seed + 1).spawn(9))
    stones = [(0.62, 0.58, 0.52), (0.54, 0.53, 0.52), (0.68, 0.61, 0.50), (0.58, 0.50, 0.44), (0.50, 0.51, 0.54)]
    bricks = [(0.62, 0.34, 0.26), (0.56, 0.29, 0.22), (0.68, 0.42, 0.31), (0.50, 0.30, 0.26), (0.64, 0.46, 0.38)]
    return {
        "table_wood": textures.wood(next(rngs), objects.TABLE_BOARDS, (0.66, 0.47, 0.30)),
        "bench_wood": textures.wood(next(rngs), objects.BENCH_BOARDS, (0.60, 0.54, 0.46), 0.7),
        "stone": textures.mineral_atlas(next(rngs), stones, 0.045),
        "brick": textures.mineral_atlas(next(rngs), bricks, 0.06),
        "soil": textures.ground(next(rngs), (0.36, 0.29, 0.22), 0.16, (0.52, 0.45, 0.36), 0.12),
        "gravel": textures.ground(next(rngs), (0.56, 0.51, 0.44), 0.20, (0.74, 0.70, 0.64), 0.25),
        "turf": textures.ground(next(rngs), (0.30, 0.42, 0.17), 0.12, (0.42, 0.46, 0.22), 0.20),
        "terracotta": textures.terracotta(next(rngs), (0.74, 0.42, 0.28)),
        "glaze": textures.glaze(next(rngs)),
    }


def shots() -> list[Shot]:
    """All cameras, ring by ring; every ninth is a test view with training views on both sides of it."""
    found: list[Shot] = []
    for ring, (count, radius, height, focus) in enumerate(RINGS):
        for k in range(count):
            angle = 2 * np.pi * (k + 0.37 * ring) / count
            # A hand-held walk: slow sways, the same every time.
            r = radius + 0.14 * np.sin(3 * angle + ring) + 0.05 * np.sin(7 * angle)
            z = height + 0.10 * np.sin(2 * angle + 2 * ring) + 0.04 * np.cos(5 * angle)
            eye = np.array([r * np.cos(angle), r * np.sin(angle), z])
            target = np.array(
                [0.16 * np.sin(4 * angle), 0.16 * np.cos(3 * angle), focus + 0.06 * np.sin(5 * angle + ring)]
            )
            back = unit(eye - target)
            roll = 0.025 * np.sin(6 * angle + ring)
            right = unit(np.cross([0.0, 0.0, 1.0], back))
            up = np.cross(back, right)
            pose = np.eye(4)
            pose[:3, 0] = np.cos(roll) * right + np.sin(roll) * up
            pose[:3, 1] = np.cos(roll) * up - np.sin(roll) * right
            pose[:3, 2], pose[:3, 3] = back, eye
            index = len(found)
            found.append(Shot(f"{index:03d}", pose, index % TEST_EVERY == TEST_FIRST))
    return found


def _through(x: Array, y: Array) -> Array:
    """[..., 3] directions in OpenGL camera axes, of depth 1, through positions in the full-size picture."""
    return np.stack([(x - PRINCIPAL[0]) / FOCAL, -(y - PRINCIPAL[1]) / FOCAL, -np.ones_like(x, dtype=float)], -1)


def tone_map(radiance: Array) -> NDArray[np.uint8]:
    """sRGB picture of linear radiance: a softened filmic curve (Narkowicz's fit of ACES), then the sRGB encoding."""
    x = np.maximum(radiance, 0) ** 0.9 * EXPOSURE
    x = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    encoded = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return (encoded * 255 + 0.5).astype(np.uint8)


class Studio:
    """The scene inside Mitsuba, with one camera that is moved from shot to shot."""

    def __init__(
        self, meshes: dict[str, Mesh], maps: dict[str, textures.Bitmap], scale: float, spp: int, variant: str
    ) -> None:
        import mitsuba as mi

        mi.set_variant(variant)
        self.mi: Any = mi
        self.width, self.height, self.spp = round(WIDTH * scale), round(HEIGHT * scale), spp
        light = textures.sky(np.random.default_rng(SEED + 2)).astype(np.float32)
        sky = {"type": "envmap", "bitmap": mi.Bitmap(light), "to_world": mi.ScalarTransform4f().rotate([1, 0, 0], 90)}
        contents = {
            "type": "scene",
            "integrator": {"type": "path", "max_depth": 5, "rr_depth": 4},
            "sky": sky,
            "sensor": self._sensor(),
        }
        self.scene = mi.load_dict(
            contents | {name: self._shape(name, mesh, maps.get(name)) for name, mesh in meshes.items()}
        )
        self.camera = mi.traverse(self.scene)
        self.guides = mi.load_dict({"type": "aov", "aovs": "albedo:albedo,normal:sh_normal"})

    def _sensor(self) -> dict[str, Any]:
        mi = self.mi
        film = {
            "type": "hdrfilm",
            "width": self.width,
            "height": self.height,
            "rfilter": {"type": "box"},
            "pixel_format": "rgb",
        }
        return {
            "type": "perspective",
            "fov": float(np.degrees(2 * np.arctan(WIDTH / 2 / FOCAL))),
            "fov_axis": "x",
            "near_clip": 0.01,
            # Mitsuba's offset moves the window over the picture, so it has the opposite sign.
            "principal_point_offset_x": 0.5 - PRINCIPAL[0] / WIDTH,
            "principal_point_offset_y": 0.5 - PRINCIPAL[1] / HEIGHT,
            "to_world": mi.ScalarTransform4f(),
            "film": film,
            "sampler": {"type": "multijitter", "sample_count": self.spp},
        }

    def _material(self, name: str, bitmap: textures.Bitmap | None) -> dict[str, Any]:
        """How a material reflects; leaves also let light through."""
        mi = self.mi
        if bitmap is None:
            color: dict[str, Any] = {"type": "mesh_attribute", "name": "vertex_color"}
        else:
            color = {"type": "bitmap", "bitmap": mi.Bitmap(bitmap), "filter_type": "bilinear"}
        if name == "foliage":
            return {"type": "principledthin", "base_color": color, "diff_trans": 0.8, "roughness": 0.55, "eta": 1.3}
        if name == "zinc":
            return {
                "type": "twosided",
                "bsdf": {
                    "type": "roughconductor",
                    "material": "none",
                    "specular_reflectance": {"type": "rgb", "value": [0.62, 0.65, 0.67]},
                    "alpha": 0.28,
                },
            }
        if name in ("glaze", "glossy"):
            return {
                "type": "twosided",
                "bsdf": {"type": "principled", "base_color": color, "roughness": 0.16, "specular": 0.5},
            }
        if name == "table_wood":
            return {
                "type": "twosided",
                "bsdf": {"type": "roughplastic", "diffuse_reflectance": color, "alpha": 0.35, "int_ior": 1.35},
            }
        return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": color}}

    def _shape(self, name: str, mesh: Mesh, bitmap: textures.Bitmap | None) -> Any:
        mi = self.mi
        props = mi.Properties()
        props["mesh_bsdf"] = mi.load_dict(self._material(name, bitmap))
        smooth = mesh.normals is not None
        shape = mi.Mesh(
            name,
            len(mesh.vertices),
            len(mesh.faces),
            has_vertex_normals=smooth,
            has_vertex_texcoords=mesh.uvs is not None,
            props=props,
        )
        params = mi.traverse(shape)
        params["vertex_positions"] = mesh.vertices.astype(np.float32).ravel()
        params["faces"] = mesh.faces.astype(np.uint32).ravel()
        if mesh.normals is not None:
            params["vertex_normals"] = mesh.normals.astype(np.float32).ravel()
        if mesh.uvs is not None:
            # Mitsuba's bitmaps have v = 0 in the first row.
            params["vertex_texcoords"] = (mesh.uvs * (1, -1) + (0, 1)).astype(np.float32).ravel()
        params.update()
        if mesh.colors is not None:
            shape.add_attribute("vertex_color", 3, mesh.colors.astype(np.float32).ravel())
        return shape

    def look(self, camtoworld: Array) -> None:
        """Put the camera somewhere; Mitsuba's looks along +z with x to the left."""
        pose = camtoworld @ np.diag([-1.0, 1.0, -1.0, 1.0])
        self.camera["sensor.to_world"] = self.mi.Transform4f(pose)
        self.camera.update()
        for x, y in ((0.0, 0.0), (WIDTH, HEIGHT / 2), PRINCIPAL):
            ray, _ = self.scene.sensors()[0].sample_ray(
                0.0, 0.5, self.mi.Point2f(x / WIDTH, y / HEIGHT), self.mi.Point2f(0.5)
            )
            expected = unit(_through(np.array(x), np.array(y)) @ camtoworld[:3, :3].T)
            assert np.allclose(np.asarray(ray.d).ravel(), expected, atol=2e-6), (
                "Mitsuba's camera is not the one that is written"
            )

    def picture(self, seed: int, passes: int = 1) -> Array:
        """[H, W, 3] denoised linear radiance."""
        mi = self.mi
        total = sum(
            np.asarray(mi.render(self.scene, spp=self.spp, seed=seed * 64 + k), dtype=np.float64) for k in range(passes)
        )
        # Primary rays alone are cheap, so the denoiser's guides are free of noise and every texel and leaf edge survives.
        guides = np.asarray(
            mi.render(self.scene, integrator=self.guides, spp=GUIDE_SPP, seed=seed * 64 + 63), dtype=np.float64
        )
        return _blurred(_denoise(np.asarray(total / passes), guides[..., :3], guides[..., 3:6]), LENS_BLUR)

    def depth(self, camtoworld: Array) -> Array:
        """[H, W] camera z at each pixel's centre; 0 where it is sky, where the pixel's nine ninths disagree, and in even rows.

        Every other row is left out because dense depth would take a quarter of the scene's 4 MB.
        """
        fine, _ = self.hits(camtoworld, 3 * self.width, 3 * self.height)
        ninths = fine.reshape(self.height, 3, self.width, 3)
        near, far = ninths.min((1, 3)), ninths.max((1, 3))
        odd = np.arange(self.height)[:, None] % 2 == 1
        return np.where(odd & (near > 0) & (far < MIXED_PIXEL * near), ninths[:, 1, :, 1], 0.0)

    def hits(self, camtoworld: Array, width: int, height: int) -> tuple[Array, Array]:
        """Camera z [H, W] (0: sky) and world position [H, W, 3] of what the centre of each pixel sees."""
        mi = self.mi
        x, y = np.meshgrid((np.arange(width) + 0.5) * WIDTH / width, (np.arange(height) + 0.5) * HEIGHT / height)
        dirs = _through(x, y).reshape(-1, 3) @ camtoworld[:3, :3].T
        origin = np.broadcast_to(camtoworld[:3, 3], dirs.shape)
        ray = mi.Ray3f(mi.Point3f(*origin.T.astype(np.float32)), mi.Vector3f(*dirs.T.astype(np.float32)))
        t = np.asarray(self.scene.ray_intersect_preliminary(ray, coherent=True).t, dtype=np.float64).reshape(
            height, width
        )
        # Directions have camera z 1, so the ray's parameter is the depth.
        z = np.where(np.isfinite(t) & (t < 1e4), t, 0.0)
        return z, camtoworld[:3, 3] + dirs.reshape(height, width, 3) * z[..., None]


def _blurred(image: Array, sigma: float) -> Array:
    """[H, W, 3] under a Gaussian of `sigma` pixels, edges repeated."""
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="edge")
    rows = sum(tap * padded[k : k + image.shape[0]] for k, tap in enumerate(taps))
    return np.asarray(sum(tap * rows[:, k : k + image.shape[1]] for k, tap in enumerate(taps)))


def _denoise(radiance: Array, albedo: Array, normal: Array) -> Array:
    """Open Image Denoise, guided by albedo and normals; without it, the picture as it came."""
    try:
        import pyoidn
    except ImportError:
        print("pyoidn is not installed: pictures keep their noise; raise --spp", file=sys.stderr)
        return radiance
    layers = [np.ascontiguousarray(layer, dtype=np.float32) for layer in (radiance, albedo, normal)]
    return np.asarray(pyoidn.denoise(*layers, hdr=True, clean_aux=True), dtype=np.float64)


def point_cloud(
    hits: list[tuple[Array, Array]], images: list[NDArray[np.uint8]], poses: list[Array], count: int
) -> tuple[Array, NDArray[np.uint8]]:
    """Coloured points seen by the training views: surfaces, thinned where they are dense, and some sky.

    Args:
        hits: depth and world position of each pixel of each view.
        images: [H, W, 3] of the same views.
        poses: [4, 4] camera to world of the same views.
        count: how many to keep, about a thirtieth of them sky.
    """
    rng = np.random.default_rng(SEED + 3)
    solid_xyz, solid_rgb, sky_xyz, sky_rgb = [], [], [], []
    for (z, xyz), image, pose in zip(hits, images, poses, strict=True):
        solid = np.flatnonzero(z.ravel() > 0)
        # Half as likely at twice the depth: otherwise the far hedge takes most of the points.
        weight = 1.0 / np.clip(z.ravel()[solid], 0.5, None)
        chosen = rng.choice(solid, min(len(solid), 4 * count // len(poses)), replace=False, p=weight / weight.sum())
        solid_xyz.append(xyz.reshape(-1, 3)[chosen])
        solid_rgb.append(image.reshape(-1, 3)[chosen])
        empty = np.flatnonzero(z.ravel() == 0)
        chosen = rng.choice(empty, min(len(empty), 2 * count // 30 // len(poses)), replace=False)
        row, column = np.divmod(chosen, image.shape[1])
        ahead = _through((column + 0.5) * WIDTH / image.shape[1], (row + 0.5) * HEIGHT / image.shape[0])
        dirs = unit(ahead @ pose[:3, :3].T)
        sky_xyz.append(dirs * SKY_DISTANCE)
        sky_rgb.append(image.reshape(-1, 3)[chosen])
    sky_count = min(count // 30, sum(map(len, sky_xyz)))
    groups = [(solid_xyz, solid_rgb, count - sky_count, 0.02), (sky_xyz, sky_rgb, sky_count, 0.8)]
    kept = [
        _thinned(np.concatenate(xyz), np.concatenate(rgb), number, voxel, rng) for xyz, rgb, number, voxel in groups
    ]
    return np.concatenate([xyz for xyz, _ in kept]), np.concatenate([rgb for _, rgb in kept])


def _thinned(
    xyz: Array, rgb: NDArray[np.uint8], count: int, voxel: float, rng: np.random.Generator
) -> tuple[Array, NDArray[np.uint8]]:
    """At most one point in each voxel (metres), then `count` of them at random."""
    order = rng.permutation(len(xyz))
    _, first = np.unique(np.floor(xyz[order] / voxel).astype(np.int64), axis=0, return_index=True)
    chosen = order[rng.permutation(first)[:count]]
    return xyz[chosen], rgb[chosen]


def write_ply(path: Path, xyz: Array, rgb: NDArray[np.uint8]) -> None:
    """Binary little-endian PLY: x y z float, red green blue uchar."""
    names = [("x", "float"), ("y", "float"), ("z", "float"), ("red", "uchar"), ("green", "uchar"), ("blue", "uchar")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(xyz)}"]
    header += [f"property {kind} {name}" for name, kind in names]
    rows = np.empty(len(xyz), dtype=[(name, "<f4" if kind == "float" else "u1") for name, kind in names])
    for k, (name, kind) in enumerate(names):
        rows[name] = xyz[:, k] if kind == "float" else rgb[:, k - 3]
    path.write_bytes("\n".join([*header, "end_header\n"]).encode() + rows.tobytes())


def write_transforms(out: Path, taken: list[Shot]) -> None:
    """`transforms.json` with every view, and one file for each split."""
    shared = {
        "camera_model": "PINHOLE",
        "fl_x": FOCAL,
        "fl_y": FOCAL,
        "cx": PRINCIPAL[0],
        "cy": PRINCIPAL[1],
        "w": WIDTH,
        "h": HEIGHT,
    }
    shared |= {"depth_scale": DEPTH_SCALE, "ply_file_path": "points.ply"}
    frames = []
    for shot in taken:
        frame: dict[str, Any] = {"file_path": f"images/{shot.name}.jpg"}
        if shot.test:
            frame["depth_file_path"] = f"depth/{shot.name}.png"
        frames.append(frame | {"transform_matrix": shot.camtoworld.tolist()})
    splits = {"train": [not shot.test for shot in taken], "test": [shot.test for shot in taken]}
    for name, keep in {"": [True] * len(taken), **{f"_{split}": keep for split, keep in splits.items()}}.items():
        chosen = [frame for frame, wanted in zip(frames, keep, strict=True) if wanted]
        lines = ",\n".join("  " + json.dumps(frame) for frame in chosen)
        head = json.dumps(shared, indent=1)[:-2]
        (out / f"transforms{name}.json").write_text(f'{head},\n "frames": [\n{lines}\n ]\n}}\n')


def write_image(path: Path, image: NDArray[np.uint8] | NDArray[np.uint16], quality: int = 0) -> None:
    """A JPEG with chroma at full resolution (4:4:4), or a 16-bit PNG for depth."""
    import cv2

    jpeg = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpeg += [cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    options = (
        jpeg
        if image.ndim == 3
        else [cv2.IMWRITE_PNG_COMPRESSION, 9, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB]
    )
    if not cv2.imwrite(str(path), image if image.ndim == 2 else image[..., ::-1], options):
        raise OSError(f"{path}: could not be written")


def make(out: Path, spp: int, passes: int, scale: float, every: int, variant: str, points: int) -> None:
    """Render the scene into `out`; `every` > 1 renders only each such shot, without a point cloud."""
    start = time.perf_counter()
    studio = Studio(build(), bitmaps(), scale, spp, variant)
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    for folder in ("images", "depth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    taken = shots()[::every]
    hits, images, poses = [], [], []
    for number, shot in enumerate(taken):
        studio.look(shot.camtoworld)
        image = tone_map(studio.picture(int(shot.name), passes))
        write_image(out / "images" / f"{shot.name}.jpg", image, QUALITY[shot.test])
        if shot.test:
            write_image(
                out / "depth" / f"{shot.name}.png",
                np.round(studio.depth(shot.camtoworld) / DEPTH_SCALE).astype(np.uint16),
            )
        else:
            hits.append(studio.hits(shot.camtoworld, studio.width, studio.height))
            images.append(image)
            poses.append(shot.camtoworld)
        print(f"{number + 1}/{len(taken)}  {shot.name}  {time.perf_counter() - start:.1f} s", flush=True)
    if every == 1:
        xyz, rgb = point_cloud(hits, images, poses, points)
        write_ply(out / "points.ply", xyz, rgb)
    write_transforms(out, taken)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{len(taken)} views, {size / 1e6:.2f} MB in {out}")


def main() -> None:
    """Read the command line and make the scene."""
    parser = argparse.ArgumentParser(description="Path-trace the bundled scene `garden`.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--spp", type=int, default=12, help="samples a pixel in one pass")
    parser.add_argument("--passes", type=int, default=1, help="passes averaged; memory grows with --spp only")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the pictures, for previews")
    parser.add_argument("--every", type=int, default=1, help="render only every n-th view, for previews")
    parser.add_argument("--points", type=int, default=18_000, help="size of the point cloud")
    parser.add_argument("--variant", default="llvm_ad_rgb", help="Mitsuba variant; scalar_rgb needs no LLVM")
    options = parser.parse_args()
    make(options.out, options.spp, options.passes, options.scale, options.every, options.variant, options.points)


if __name__ == "__main__":
    main()
