"""render-export: what is in the file, in the user's frame; what a training makes of it; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import plyfile
import pytest
import torch
from safetensors.torch import load_file

from prismfield.export.cli import ExportConfig, export
from prismfield.export.library import load
from prismfield.export.ply import ply_bytes, read_ply

from .commands import command, refused


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The .ply of the run, in a folder of its own, and what was printed."""
    path = tmp_path_factory.mktemp("export") / "new" / "scene.ply"
    done = command("export.cli", tiny_run, "--to", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_the_file_is_the_checkpoint_in_the_users_frame(tiny_run: Path, exported: tuple[Path, str]) -> None:
    path, _ = exported
    tensors = load_file(tiny_run / "checkpoints/step_00000030/tensors.safetensors")
    frame = json.loads((tiny_run / "checkpoints/step_00000030/state.json").read_text())["frame"]
    assert abs(frame["scale"] - 1) > 0.1  # or a mistake would not show
    rows = plyfile.PlyData.read(path)["vertex"]

    def columns(*names: str) -> np.ndarray:
        return np.stack([rows[name] for name in names], 1)

    means = tensors["scene.means"].double().numpy() / frame["scale"] + np.array(frame["center"])
    np.testing.assert_allclose(columns("x", "y", "z"), means, atol=1e-5)
    log_scales = tensors["scene.log_scales"].numpy() - np.log(frame["scale"])
    np.testing.assert_allclose(columns("scale_0", "scale_1", "scale_2"), log_scales, atol=1e-5)
    quats = torch.nn.functional.normalize(tensors["scene.quats"], dim=-1).numpy()
    np.testing.assert_allclose(columns("rot_0", "rot_1", "rot_2", "rot_3"), quats, atol=1e-6)
    np.testing.assert_allclose(rows["opacity"], tensors["scene.opacity_logits"].numpy(), atol=1e-4)
    np.testing.assert_array_equal(columns("f_dc_0", "f_dc_1", "f_dc_2"), tensors["scene.sh0"].numpy()[:, 0])
    rest = columns(*(f"f_rest_{i}" for i in range(45))).reshape(-1, 3, 15).transpose(0, 2, 1)
    np.testing.assert_array_equal(rest, tensors["scene.shN"].numpy())


def test_what_is_printed(exported: tuple[Path, str]) -> None:
    path, printed = exported
    assert [p.name for p in path.parent.iterdir()] == ["scene.ply"]
    size = path.stat().st_size
    assert size == ply_bytes(read_ply(path))
    assert f"{size:,} bytes" in printed
    assert f"{len(read_ply(path)):,} Gaussians of degree 3" in printed
    assert re.search(r"read back and rendered: (100 dB PSNR or more|[6-9]\d\.\d dB PSNR) to the scene itself", printed)


def test_a_training_goes_on_from_the_file_where_the_run_was(
    tiny_run: Path, exported: tuple[Path, str], tmp_path: Path
) -> None:
    words = ["--scene", "garden", "--downscale", 4, "--steps", 1, "--init", exported[0], "--strategy", "fixed"]
    for name in ("means", "quats", "log-scales", "opacity-logits", "sh0", "shN"):
        words += [f"--gaussians.{name}-lr", 0]  # where a step would take it depends on the rates of the day
    done = command("train.cli", *words, "--out", tmp_path / "warm")
    assert done.returncode == 0, done.stderr
    pattern = r"test PSNR \| ([\d.]+) dB"
    before, after = (
        float(re.search(pattern, (run / "report.md").read_text())[1])  # type: ignore[index]
        for run in (tiny_run, tmp_path / "warm")
    )
    assert after == pytest.approx(before, abs=0.011)  # of two decimals


def test_a_ply_is_exported_again(exported: tuple[Path, str], tmp_path: Path) -> None:
    export(ExportConfig(exported[0], tmp_path / "again.PLY"))
    first, again = read_ply(exported[0]), read_ply(tmp_path / "again.PLY")
    np.testing.assert_allclose(again.means, first.means, atol=1e-5)
    np.testing.assert_allclose(again.scales, first.scales, rtol=1e-5)
    assert again.up == pytest.approx(first.up)


def test_an_earlier_step(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(ExportConfig(tiny_run, tmp_path / "a.ply", step=20))
    tensors = load_file(tiny_run / "checkpoints/step_00000020/tensors.safetensors")
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply").sh[:, 0], tensors["scene.sh0"].numpy()[:, 0])
    with pytest.raises(ValueError, match="no checkpoint of step 21; there are 20, 30"):
        export(ExportConfig(tiny_run, tmp_path / "b.ply", step=21))


def test_a_run_whose_capture_was_moved_away_is_exported_all_the_same(tiny_run: Path, tmp_path: Path) -> None:
    scene = load(tiny_run)
    assert scene.run is not None
    object.__setattr__(scene.run, "source", str(tmp_path / "gone"))
    from prismfield.export.convert import verify

    psnr, cameras = verify(scene, scene.asset(), tmp_path / "a.ply")
    assert psnr > 60
    assert cameras == 3
    wrong = scene.asset()
    wrong.sh[:, 0] += 0.1
    assert verify(scene, wrong, tmp_path / "a.ply")[0] < 40


def test_an_unknown_suffix_is_refused_with_those_that_are_known(tiny_run: Path, tmp_path: Path) -> None:
    line = refused("export.cli", tiny_run, "--to", tmp_path / "a.png")
    assert "'.png'" in line
    assert "expected one of .ply" in line
    with pytest.raises(ValueError, match="unknown suffix ''"):
        export(ExportConfig(tiny_run, tmp_path / "a"))


def test_bad_input_is_refused_in_one_line(tiny_run: Path, tmp_path: Path) -> None:
    assert "no such run" in refused("export.cli", tmp_path / "nowhere", "--to", tmp_path / "a.ply")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        export(ExportConfig(tmp_path, tmp_path / "a.ply"))
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(state.read_text()[:-20])
    with pytest.raises(ValueError, match="no whole checkpoint"):
        export(ExportConfig(run, tmp_path / "a.ply"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a run's folder or a"):
        export(ExportConfig(tmp_path / "file", tmp_path / "a.ply"))
    assert "file" in refused("export.cli", tiny_run, "--to", tmp_path / "file" / "a.ply")
    assert not (tmp_path / "a.ply").exists()
