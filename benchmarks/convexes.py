"""Smooth convexes beside Gaussians: the op at equal footprints, trainings at equal time and at equal bytes, and boxes.

    python benchmarks/convexes.py [speed] [scenes] [boxes] [--data FOLDER] [--scenes lego ...] [--contenders convexes ...]
        [--runs-folder FOLDER] [--list]

Each training is the command that a user types. Writes results/convexes.json, and the picture of the boxes to
docs/images/boxes.jpg. FOLDER holds the captures; by default $PRISMFIELD_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from quality import train
from scenes import SIZES, make_scene
from timing import measure

import prismfield as pf
from prismfield.render.ops.project import project, rotation_matrices
from prismfield.render.ops.project_convexes import project_convexes
from prismfield.render.rasterize import rasterize_convexes, rasterize_gaussians

HERE = Path(__file__).resolve().parent
TABLE, PICTURE = HERE / "results" / "convexes.json", HERE.parent / "docs" / "images" / "boxes.jpg"
SCENES = {
    "garden": "--scene garden",
    "lego": "--scene DATA/lego",
    "fox": "--scene DATA/fox",
    "dtu_scan65": "--scene DATA/dtu_scan65 --downscale 2 --data.cut-out --data.random-background",
    "bonsai": "--scene DATA/bonsai --downscale 2",
}
MINUTES = 1.0
CONVEXES = 40_000
BYTES = {"convexes": 4 * 69, "gaussians": 4 * 59}
"""Of one primitive with harmonics of degree 3."""
CONTENDERS = {
    "convexes": f"--representation convexes --max-primitives {CONVEXES}",
    "gaussians, equal bytes": f"--max-primitives {CONVEXES * BYTES['convexes'] // BYTES['gaussians']}",
    "gaussians, equal time": "",
}
BOXES, BOX_PRIMITIVES, BOX_MINUTES = 14, 500, 1.0


def speed(runs: int = 11) -> dict[str, Any]:
    """Milliseconds of forward and backward passes over primitives of the same footprint, the full op."""
    result = {}
    for name, size in SIZES.items():
        scene = make_scene(*size)
        axes = (rotation_matrices(scene.quats) * scene.scales[:, None]).mT
        width = scene.scales.prod(1).pow(1 / 3)
        shape = {"points": None, "deltas": 6 / width, "sigmas": torch.ones_like(width)}
        screen = (scene.cameras.viewmats, scene.cameras.Ks, size[1:])
        radii = project(scene.means, scene.quats, scene.scales, scene.opacities, *screen)[2]
        wanted = radii[radii > 0].mean()
        low, high = 0.5, 4.0
        for _ in range(12):  # octahedra as wide as makes the mean footprint that of the Gaussians
            reach = (low + high) / 2
            shape["points"] = scene.means[:, None] + reach * torch.cat([axes, -axes], 1)
            footprint = project_convexes(*shape.values(), scene.opacities, *screen)[2]
            low, high = (low, reach) if footprint[footprint > 0].mean() > wanted else (reach, high)
        gaussians, convexes = [scene.means, scene.quats, scene.scales], list(shape.values())
        contenders = {
            "gaussians": partial(_pass, rasterize_gaussians, gaussians, scene),
            "convexes": partial(_pass, rasterize_convexes, convexes, scene),
        }
        times = measure(contenders, runs)
        result[name] = times | {"ratio": round(times["convexes"] / times["gaussians"], 2), "reach": round(reach, 3)}
        print(name, result[name], flush=True)
    return result


def _pass(rasterize: Any, shape: list[torch.Tensor], scene: Any) -> None:
    leaves = [t.detach().requires_grad_() for t in (*shape, scene.opacities, scene.sh0, scene.shN)]
    *primitives, sh0, shN = leaves
    out = rasterize(*primitives, (sh0, shN), scene.cameras, scene.background, sh_degree=3, extras=("depth",))
    (out.rgb.sum() + out.alpha.sum() + out.depth.sum()).backward()


def make_boxes(folder: Path, views: int = 60, width: int = 240, height: int = 180) -> None:
    """A capture of boxes with flat faces, ray traced with 4x4 samples a pixel: `transforms_{train,test}.json` and images."""
    generator = np.random.default_rng(5)
    centers = generator.uniform(-1, 1, (BOXES, 3)) * [0.8, 0.8, 0.5]
    halves = generator.uniform(0.08, 0.35, (BOXES, 3))
    turns = rotation_matrices(torch.from_numpy(generator.normal(size=(BOXES, 4)))).numpy()
    faces = generator.uniform(0.05, 1, (BOXES, 1, 3)) * generator.uniform(0.4, 1, (BOXES, 6, 1))
    focal, frames = 1.1 * width, []
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(views):
        height_of = 0.9 * (2 * (view * 0.618034 % 1) - 1)
        around = view * 2.399963
        flat = math.sqrt(1 - height_of**2)
        eye = 3.2 * np.array([flat * math.cos(around), flat * math.sin(around), height_of])
        back = eye / np.linalg.norm(eye)
        right = np.cross([0, 0, 1.0], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :4] = np.stack([right, np.cross(back, right), back, eye], 1)
        frames.append({"file_path": f"{view:03d}.png", "transform_matrix": pose.tolist()})
        image = _trace(pose, (width, height, focal), (centers, halves, turns, faces))
        imageio.imwrite(folder / f"{view:03d}.png", (image * 255 + 0.5).astype(np.uint8))
    lens = {"camera_angle_x": 2 * math.atan(width / (2 * focal)), "w": width, "h": height}
    for split, chosen in (("train", [f for i, f in enumerate(frames) if i % 6]), ("test", frames[::6])):
        (folder / f"transforms_{split}.json").write_text(json.dumps(lens | {"frames": chosen}))


def _trace(
    pose: np.ndarray, lens: tuple[int, int, float], boxes: tuple[np.ndarray, ...], samples: int = 4
) -> np.ndarray:
    """[H, W, 4] colour and alpha in 0..1, by the slab test."""
    width, height, focal = lens
    centers, halves, turns, faces = boxes
    at = (np.arange(samples * max(width, height)) + 0.5) / samples
    x, y = np.meshgrid((at[: samples * width] - width / 2) / focal, -(at[: samples * height] - height / 2) / focal)
    dirs = np.stack([x, y, -np.ones_like(x)], -1) @ pose[:3, :3].T
    nearest, color = np.full(x.shape, np.inf), np.zeros((*x.shape, 4))
    for center, half, turn, shades in zip(centers, halves, turns, faces, strict=True):
        origin, local = (pose[:3, 3] - center) @ turn, dirs @ turn
        near, far = ((-np.sign(local) * half - origin) / local, (np.sign(local) * half - origin) / local)
        enter, leave = near.max(-1), far.min(-1)
        hit = (enter < leave) & (enter > 0) & (enter < nearest)
        axis = near.argmax(-1)
        face = 2 * axis + (np.take_along_axis(local, axis[..., None], -1)[..., 0] > 0)
        color[hit] = np.concatenate([shades, np.ones((6, 1))], 1)[face[hit]]
        nearest[hit] = enter[hit]
    mean = color.reshape(height, samples, width, samples, 4).mean((1, 3))
    return np.concatenate([mean[..., :3] / mean[..., 3:].clip(1e-6), mean[..., 3:]], -1)


def boxes(runs: Path) -> dict[str, Any]:
    """Train both on the boxes with as many primitives, and draw a test view of each beside the truth."""
    make_boxes(runs / "boxes")
    common = f"--scene {runs / 'boxes'} --minutes {BOX_MINUTES} --max-primitives {BOX_PRIMITIVES}"
    common += f" --data.points random --data.initial-points {BOX_PRIMITIVES // 2}"
    result, pictures = {}, []
    for name in ("gaussians", "convexes"):
        result[name] = train(f"{common} --representation {name}", runs, runs / f"boxes_{name}", 3)
        result[name]["command"] = result[name]["command"].replace(str(runs), "FOLDER")
        scene = pf.load(runs / f"boxes_{name}")
        camera = scene.cameras("test")[3]
        with torch.no_grad():
            pictures.append(pf.render(scene, camera).rgb[0].clamp(0, 1).numpy())
    truth = imageio.imread(runs / "boxes" / "018.png").astype(np.float64) / 255
    pictures.append(truth[..., :3] * truth[..., 3:] + 1 - truth[..., 3:])
    picture = (np.concatenate(pictures, 1) * 255 + 0.5).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    imageio.imwrite(PICTURE, picture, quality=90)
    return result


def main() -> None:
    """Measure what is asked for; the rest of the table stays."""
    shared = Path(os.environ.get("PRISMFIELD_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["speed", "scenes", "boxes"])
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--scenes", nargs="*", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--runs-folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the results so far")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = (options.runs_folder or Path(temporary)).resolve()
        if "speed" in options.what and not options.list:
            table["speed"] = speed()
        if "boxes" in options.what and not options.list:
            table["boxes"] = boxes(runs)
        for scene in options.scenes if "scenes" in options.what and not options.list else []:
            for name in options.contenders:
                command = f"{SCENES[scene]} --minutes {MINUTES} {CONTENDERS[name]}"
                run = train(command, options.data.resolve(), runs / f"{scene}_{name.replace(', ', '_')}", 3)
                kind = "convexes" if name == "convexes" else "gaussians"
                run["bytes"] = BYTES[kind] * run["primitives"]
                table.setdefault("scenes", {}).setdefault(scene, {})[name] = run
                TABLE.write_text(json.dumps(table, indent=1) + "\n")
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    for scene, rows in (table.get("scenes", {}) | {"boxes": table.get("boxes", {})}).items():
        for name, run in rows.items():
            reached = f"{run['psnr']:.2f} dB, SSIM {run['ssim']:.4f}, {run['primitives']:,} primitives"
            print(f"{scene:12s} {name:24s} {reached}, {run['steps']} steps, {run['seconds']:.0f} s")


if __name__ == "__main__":
    main()
