"""The limits of CONTRIBUTING.md on the size of files and functions, and the rule about the top-level folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("render", "encodings", "representations", "datasets", "train", "export", "viewer")
FOLDERS = (*PACKAGES, "src", "tests", "benchmarks", "examples")
SUFFIXES = {".py", ".cpp", ".h", ".ts"}
MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 600, 80, 12


def source_files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and not {"node_modules", "static"} & set(path.parts):
                yield path


def test_files_are_short() -> None:
    files = list(source_files())
    assert len(files) > 50
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert not {name: count for name, count in lines.items() if count >= MAX_LINES}


def test_functions_are_short_and_public_ones_take_few_arguments() -> None:
    too_long, too_many = {}, {}
    for path in source_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            if length >= MAX_FUNCTION_LINES:
                too_long[where] = length
            if count >= MAX_ARGUMENTS and not node.name.startswith("_"):
                too_many[where] = count
    assert not too_long
    assert not too_many


def test_no_init_in_the_top_level_folders() -> None:
    """With one, a folder named `encodings` or `datasets` on the path replaces Python's own or Hugging Face's."""
    assert not [name for name in (*PACKAGES, "tests", "benchmarks", "docs") if (ROOT / name / "__init__.py").exists()]
