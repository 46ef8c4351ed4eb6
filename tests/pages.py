"""The code in the repository's pages. A block is marked with its language and the section that it belongs to: ```python op."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(python|cpp) (\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: str, language: str, section: str) -> str:
    """The code of a section of the page at this path, each line where the page has it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language and match[2] == section]
    assert found, f"no {language} block of {section} in {page}"
    code = ""
    for match in found:
        code += "\n" * (text.count("\n", 0, match.start(3)) - code.count("\n")) + match[3]
    return code


def run_example(page: str, section: str) -> ModuleType:
    """A section's Python as a module."""
    module = ModuleType(f"example_{section}")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(blocks(page, "python", section), str(ROOT / page), "exec"), module.__dict__)
    return module


def marked_blocks(page: str) -> set[tuple[str, str]]:
    """Language and section of all blocks that have a language."""
    return set(re.findall(r"^```(\w+) ?(\w*)$", (ROOT / page).read_text(encoding="utf-8"), re.M))
