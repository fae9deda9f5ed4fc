"""The code of docs/recipes.md, so that what a test runs is what the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SIDES = ("torch", "ours")  # of a block that is a diff: the program before the change, and after


class Recipe:
    """One section of the page, whose code blocks are run in the order in which they stand.

    Args:
        title: of the section.

    Attributes:
        blocks: the code blocks, each a program for "torch" and one for "ours".
    """

    def __init__(self, title: str) -> None:
        sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
        (text,) = (part for part in sections if part.startswith(f"{title}\n"))
        self.title = title
        self.blocks = [
            dict.fromkeys(SIDES, code) if language == "python" else _sides(code)
            for language, code in re.findall(r"^```(python|diff)\n(.*?)^```$", text, re.M | re.S)
        ]

    def run(self, number: int, side: str, names: dict[str, Any]) -> dict[str, Any]:
        """Executes a block in the namespace `names`, which is returned."""
        code = compile(self.blocks[number][side], f"{PAGE.name}: {self.title} [{side}]", "exec")
        exec(code, names)
        return names


def _sides(diff: str) -> dict[str, str]:
    """The two programs of a diff whose lines begin with ``-``, ``+`` or a space."""
    lines = diff.splitlines()
    return {
        side: "\n".join(line[1:] for line in lines if not line.startswith(other)) + "\n"
        for side, other in zip(SIDES, "+-", strict=True)
    }
