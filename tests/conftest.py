"""Fixtures that every test file may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Several tests run at a time: torch's threads must not spin for others whose turn it is not. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

from .commands import trained_once

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background, and commands that a test starts would inherit it: those that are sent Ctrl-C never ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)


if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when a kernel is defined: Triton's then run on the CPU, slowly


def _with_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    from prismfield.render import kernels

    try:
        module, _ = kernels.load_kernels(name)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "kernels", module)
    return name


@pytest.fixture(params=["v4", "v3", "v2"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor has and that was built."""
    return _with_kernels(request.param, monkeypatch)


@pytest.fixture(params=["reference", "v4", "v3", "v2"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """No kernels, and each instruction set that this processor has and that was built."""
    return _with_kernels(request.param, monkeypatch)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the Triton kernels run, and from now on all ops: a GPU, or without one the CPU, interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    from prismfield.render import kernels

    monkeypatch.setattr(kernels, "kernels", kernels.gpu_table())
    return torch.device("cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real captures: `data` in $PRISMFIELD_SHARED, by default in `shared` beside the repository."""
    default = Path(__file__).resolve().parent.parent.parent / "shared"
    folder = Path(os.environ.get("PRISMFIELD_SHARED", default)) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real captures at {folder}: set PRISMFIELD_SHARED")
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test of device-independent code runs on. Nothing else skips for a missing GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the bundled scene, small and of few steps. Not to be written to: copy it first."""
    words = "--scene garden --downscale 4 --steps 30 --log.tests 0 --log.checkpoint-steps 20"
    return trained_once(tmp_path_factory, "garden", *words.split())
