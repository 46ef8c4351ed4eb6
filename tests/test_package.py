"""The package as a user meets it: installed in both ways, imported, asked for help, told what is missing."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
SCRIPTS: dict[str, str] = PROJECT["project"]["scripts"]

LAYERS = ("cli", "render", "encodings", "representations", "datasets", "train", "export", "viewer")
"""Each imports only itself and those before it. `cli`, in src, is what every command shares."""

IMPORT_NAMES = {
    "fast-simplification": "fast_simplification",
    "imageio-ffmpeg": "imageio_ffmpeg",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
}


def run_python(code: str, python: str | Path = sys.executable, **env: str) -> str:
    """The output of a program in a new process, outside the repository."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PRISMFIELD", "SKBUILD"))}
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, env=inherited | env, cwd=Path(sys.executable).parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def package_files() -> Iterator[tuple[str, Path]]:
    """(module name, path) of every module in the package."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*package.split("/"), *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(path: Path, *, anywhere: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of the imports in a file: those at its top level, or `anywhere` also those inside functions."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "prismfield":
                yield from ((f"prismfield.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno
        if anywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def test_the_repository_on_the_path_hides_no_package(tmp_path: Path) -> None:
    """`encodings` is Python's own (or nothing would start), and `datasets` that of whoever has a real one."""
    real = tmp_path / "datasets"
    real.mkdir()
    (real / "__init__.py").touch()
    code = "import encodings, datasets; print(encodings.__file__); print(datasets.__file__)"
    lines = run_python(code, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}").split("\n")
    assert Path(lines[0]).is_relative_to(sysconfig.get_path("stdlib"))
    assert lines[1] == str(real / "__init__.py")
    assert run_python(code, PYTHONPATH=str(ROOT)).split("\n")[1] == "None"  # a bare folder, as any is


def test_imports_point_one_way() -> None:
    """At import time. Inside a function, `train` may reach for the viewer that a flag asks for."""
    astray = []
    for module, path in package_files():
        layer = module.removeprefix("prismfield").removeprefix(".").split(".")[0]
        for name, line in imports(path, anywhere=False):
            target = name.removeprefix("prismfield").removeprefix(".").split(".")[0]
            if name.startswith("prismfield") and LAYERS.index(target) > (LAYERS.index(layer) if layer else -1):
                astray.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not astray


def test_every_import_is_a_declared_dependency() -> None:
    """What a module needs to be imported is in the dependencies; what a function reaches for, at least in an extra."""

    def names(requirements: list[str]) -> set[str]:
        bare = [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements]
        return {IMPORT_NAMES.get(name, name) for name in bare} | set(sys.stdlib_module_names) | {"prismfield"}

    base: list[str] = PROJECT["project"]["dependencies"]
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    with_extras = names(base + [r for extra, requirements in extras.items() if extra != "dev" for r in requirements])
    undeclared, used = [], set()
    for module, path in package_files():
        # A program of its own may need an extra to start; the kernels for GPUs are imported where there is one.
        alone = "__main__" in path.read_text(encoding="utf-8") or path.parent.name == "gpu"
        for anywhere in (False, True):
            for name, line in imports(path, anywhere=anywhere):
                root = name.split(".")[0]
                used.add(root)
                if root not in (with_extras if anywhere or alone else names(base)):
                    undeclared.append(f"{module}:{line} imports {root}")
    assert not undeclared
    unused = names(base) - set(sys.stdlib_module_names) - used - {"prismfield", "tensorboard"}  # torch imports the last
    assert not unused


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_does_not_import_torch(command: str) -> None:
    """It takes seconds to import, and `--help` answers in under one."""
    module, function = SCRIPTS[command].split(":")
    text = run_python(f"""
import sys
from {module} import {function} as main
sys.argv = ["{command}", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("LOADED", sorted({{"torch", "scipy", "cv2", "viser"}} & set(sys.modules)))
""")
    assert command in text
    assert text.strip().endswith("LOADED []")


def test_readme_has_the_commands_that_ci_runs() -> None:
    """`.ci/run` takes them from there, so that what the README tells is what is tested."""
    patterns = re.findall(r"grep -E '(.+?)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(patterns) == 2
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    for pattern in patterns:
        found = [line for line in lines if re.search(pattern, line)]
        assert len(found) == 1
        assert "-c constraints.txt" in found[0]  # versions that nobody has tried


def test_documents_link_to_files_that_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)[)#]", page.read_text(encoding="utf-8"))
    ]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 10
    assert not [f"{page.name}: {link}" for page, link in local if not (page.parent / link).exists()]


def make_environment(folder: Path) -> Path:
    """The Python of a new virtual environment that sees the packages of this one, but not how prismfield is installed in it."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = run_python("import sysconfig; print(sysconfig.get_path('purelib'))", python).strip()
    (Path(site) / "parent.pth").write_text(sysconfig.get_path("purelib"))
    return python


def install(python: Path, build: Path, *options: str, **env: str) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*pip, *options, "-C", f"build-dir={build}"], capture_output=True, text=True, env=dict(os.environ) | env
    )
    assert done.returncode == 0, done.stdout + done.stderr


LOOK_AROUND = """
import importlib.util, logging, sys
from pathlib import Path
logging.basicConfig(format="LOG %(message)s")
import prismfield, torch
from prismfield.render.kernels import use_kernel
assert not any(use_kernel(torch.zeros(2)) for _ in range(2))
print("MISSING", [name for name in sys.argv[1:] + NAMES if importlib.util.find_spec(name) is None])
import prismfield.datasets.scenes as scenes
print("PACKAGE", Path(prismfield.__file__).parent)
print("SCENE", len(list((Path(scenes.__file__).parent / "garden" / "images").iterdir())) > 60)
"""


@pytest.fixture(scope="module")
def build_tools() -> None:
    for name in ("scikit_build_core", "nanobind", "cmake", "ninja"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev]'")


def look_around(python: Path) -> str:
    return run_python(LOOK_AROUND.replace("NAMES", repr([name for name, _ in package_files()])), python)


@pytest.mark.skipif(os.name == "nt", reason="takes the compilers away by way of PATH")
@pytest.mark.usefixtures("build_tools")
def test_it_installs_where_nothing_compiles(tmp_path: Path) -> None:
    """A wheel built without a compiler has every module and the bundled scene, trains, and says once what is missing."""
    python = make_environment(tmp_path / "env")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "uname", "ninja"):
        (tools / tool).symlink_to(
            shutil.which(tool, path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}") or ""
        )
    install(python, tmp_path / "build", str(ROOT), PATH=str(tools), CC="", CXX="")

    text = look_around(python)
    assert "MISSING []" in text
    assert "SCENE True" in text
    assert text.count("LOG slow reference instead of the C++ kernels: no working C++ compiler") == 1
    package = Path(re.search(r"PACKAGE (.*)", text)[1])  # type: ignore[index]
    assert package.is_relative_to(tmp_path)
    assert not [str(path) for path in package.rglob("*") if path.suffix in (".cpp", ".h", ".so")]

    options = "--downscale 16 --steps 2 --max-primitives 500 --eval-every-nth 0 --log.tests 0 --out run"
    command = [python.parent / "render-train", "--scene", "garden", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.md").exists()
    assert done.stderr.count("slow reference instead of the C++ kernels: no working C++ compiler") == 1


@pytest.mark.usefixtures("build_tools")
def test_it_installs_editable(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    install(python, tmp_path / "build", "-C", "cmake.define.PRISMFIELD_KERNELS=OFF", "--editable", str(ROOT))
    text = look_around(python)
    assert "MISSING []" in text
    assert "SCENE True" in text
    assert f"PACKAGE {ROOT / 'src' / 'prismfield'}" in text
    assert text.count("LOG slow reference instead of the C++ kernels: this installation was built with") == 1
