"""Structure from motion with pycolmap, one stage a process: `python -P sfm_worker.py JOB`, JOB being JSON.

It runs apart from the command that shows its progress: pycolmap's zlib and Pillow's crash each other in one process,
Ctrl-C must stop it at once, and a crash in native code must end in a message. Nothing but numpy is imported here.
Prints one JSON object a line; what COLMAP says goes to stderr. Ends when its standard input does, so with its parent.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from numpy.typing import NDArray

_NEIGHBOURS = 10  # matched on either side of a frame of a video
_LOOPS = 10  # most similar frames of a video, beyond its neighbours
_SIMILAR = 30  # most similar photographs matched with each
_REFINED_FROM = 15  # images of one camera, from which its lens may have two focal lengths and four distortions
_SQUARE = 0.02  # how far these focal lengths may differ, relatively: pixels are square
_PREVIEW_FEATURES = 256  # of each image, the largest, by which similarity is judged


def say(**values: Any) -> None:
    """Tell the parent process."""
    print(json.dumps(values), flush=True)


def extract(job: dict[str, Any]) -> None:
    """Detect SIFT features; each group of image names shares one camera. Images already in the database are skipped."""
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.max_image_size = job["max_image_size"]
    extraction.sift.max_num_features = job["max_features"]
    for group in job["groups"]:
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = job["camera_model"]
        if (camera := _camera_of(job["database"], group)) is not None:
            reader.existing_camera_id = camera
        pycolmap.extract_features(
            job["database"], job["images"], group, pycolmap.CameraMode.SINGLE, reader, extraction, pycolmap.Device.cpu
        )


def _camera_of(database: str, names: list[str]) -> int | None:
    """The camera that an interrupted run gave to images of the group."""
    if not Path(database).exists():
        return None
    with pycolmap.Database.open(database) as db:
        known = {image.name: image.camera_id for image in db.read_all_images()}
    return next((known[name] for name in names if name in known), None)


def match(job: dict[str, Any]) -> None:
    """Match and verify the pairs that `job["matching"]` asks for. Pairs already in the database are skipped."""
    with pycolmap.Database.open(job["database"]) as db:
        images = sorted(db.read_all_images(), key=lambda image: image.name)
        pairs = choose_pairs(db, [image.image_id for image in images], job["matching"])
    names = [image.name for image in images]
    listing = Path(job["database"]).with_suffix(".pairs.txt")
    listing.write_text("".join(f"{names[i]} {names[j]}\n" for i, j in pairs))
    say(pairs=len(pairs))
    matching = pycolmap.FeatureMatchingOptions()
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = listing
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = 0
    pycolmap.match_image_pairs(job["database"], matching, pairing, verification, pycolmap.Device.cpu)
    listing.unlink()


def choose_pairs(db: Any, image_ids: list[int], matching: str) -> list[tuple[int, int]]:
    """Index pairs (i < j) to match, of images in the order of their names."""
    count = len(image_ids)
    if matching == "exhaustive":
        return list(itertools.combinations(range(count), 2))
    pairs: set[tuple[int, int]] = set()
    gaps = range(1, 4) if matching == "similar" else [*range(1, _NEIGHBOURS + 1), *(2**k for k in range(4, 8))]
    for gap in gaps:
        pairs.update((i, i + gap) for i in range(count - gap))
    votes = similarity(db, image_ids)
    for i, row in enumerate(votes):
        best = np.argsort(-row, kind="stable")[: _SIMILAR if matching == "similar" else _LOOPS]
        pairs.update((min(i, int(j)), max(i, int(j))) for j in best if row[j] >= 3)
    return sorted(pairs)


def similarity(db: Any, image_ids: list[int]) -> NDArray[np.int32]:
    """[N, N] how many of the largest features of two images match each other and nothing else as well.

    Few large features foretell which pairs will match (preemptive matching: Wu, 3DV 2013), at a thousandth of the cost.
    """
    count = len(image_ids)
    features = np.zeros((count, _PREVIEW_FEATURES, 128), np.float32)
    for i, image_id in enumerate(image_ids):
        keypoints, descriptors = db.read_keypoints(image_id), db.read_descriptors(image_id).data
        size = np.abs(keypoints[:, 2] * keypoints[:, 5] - keypoints[:, 3] * keypoints[:, 4])
        largest = descriptors[np.argsort(-size, kind="stable")[:_PREVIEW_FEATURES]].astype(np.float32)
        features[i, : len(largest)] = largest / np.maximum(np.linalg.norm(largest, axis=1, keepdims=True), 1.0)
    votes = np.zeros((count, count), np.int32)
    rows = np.arange(_PREVIEW_FEATURES)
    for i in range(count):
        for j in range(i + 1, count):
            cosines = features[i] @ features[j].T
            there, back = cosines.argmax(1), cosines.argmax(0)
            best = cosines[rows, there]
            cosines[rows, there] = -1.0
            distinct = np.arccos(np.clip(best, -1, 1)) < 0.85 * np.arccos(np.clip(cosines.max(1), -1, 1))
            votes[i, j] = votes[j, i] = int(np.count_nonzero((back[there] == rows) & distinct & (best > 0.5)))
    return votes


def reconstruct(job: dict[str, Any]) -> None:
    """Incremental mapping; writes `sparse/0` (most images), `sparse/1`, ... and reports each model."""
    sparse, work = Path(job["sparse"]), Path(job["sparse"] + ".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = 0
    options.min_model_size = 3
    registered = 0

    def progress(*, first: bool) -> None:
        nonlocal registered
        registered = 2 if first else registered + 1
        say(registered=registered)

    models = pycolmap.incremental_mapping(
        job["database"],
        job["images"],
        work,
        options,
        initial_image_pair_callback=lambda: progress(first=True),
        next_image_callback=lambda: progress(first=False),
    )
    found = sorted(models.values(), key=lambda model: -model.num_reg_images())
    shutil.rmtree(work, ignore_errors=True)
    reports = []
    for index, model in enumerate(found):
        if job["refine"] and index == 0:
            model = refined(model)
        folder = work / str(index)
        folder.mkdir(parents=True)
        model.write(folder)
        reports.append(_describe(model))
    if found:
        shutil.rmtree(sparse, ignore_errors=True)
        work.rename(sparse)
    say(models=reports)


def refined(model: Any) -> Any:
    """The reconstruction with an OPENCV lens for each camera that took enough of its images, everything adjusted once more.

    Mapping with this lens from the start goes wrong where images share little: two focal lengths and four distortions
    make up for wrong poses. Here they start from poses that one focal length and one distortion explained. The model comes
    back as it was if the lens would not be a real one, or explains no more.
    """
    trial = pycolmap.Reconstruction(model)
    counts = collections.Counter(trial.image(image_id).camera_id for image_id in trial.reg_image_ids())
    changed = [camera for camera in trial.cameras.values() if counts[camera.camera_id] >= _REFINED_FROM]
    for camera in changed:
        f, cx, cy, k = camera.params
        camera.model = pycolmap.CameraModelId.OPENCV
        camera.params = [f, f, cx, cy, k, 0.0, 0.0, 0.0]
    if not changed:
        return model
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    pycolmap.bundle_adjustment(trial, options)
    trial.update_point_3d_errors()
    square = all(abs(camera.params[0] / camera.params[1] - 1) < _SQUARE for camera in changed)
    better = trial.compute_mean_reprojection_error() < model.compute_mean_reprojection_error()
    return trial if square and better else model


def _describe(model: Any) -> dict[str, Any]:
    return {
        "images": sorted(model.image(image_id).name for image_id in model.reg_image_ids()),
        "points": model.num_points3D(),
        "error": model.compute_mean_reprojection_error(),
        "track": model.compute_mean_track_length(),
        "cameras": [
            {
                "model": camera.model.name,
                "width": camera.width,
                "height": camera.height,
                "params": [float(p) for p in camera.params],
            }
            for _, camera in sorted(model.cameras.items())
        ],
    }


def end_with_parent() -> None:
    """Stop at once when the parent is gone, even killed: a stage may take hours, and the next run uses the same database."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: a thread that waits in it makes Python's own exit fail
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    pycolmap.logging.minloglevel = pycolmap.logging.WARNING.value
    task = json.loads(sys.argv[1])
    {"extract": extract, "match": match, "map": reconstruct}[task["stage"]](task)
