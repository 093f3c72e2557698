"""Which files a .gitignore names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from functools import cache

MAX_BYTES = 64 << 10
"""Of the .gitignore that is looked at."""
_MAX_RULES = 500


def matcher(text: str) -> Callable[[str], bool]:
    """A function that says of a path whether the .gitignore text at the top of the repository ignores it."""
    rules = [rule for line in text[:MAX_BYTES].splitlines() if (rule := _Rule.parse(line))][:_MAX_RULES]

    def ignored(path: str) -> bool:
        found = False
        for rule in rules:
            if found == rule.negated and rule.matches(path.split("/")):
                found = not rule.negated
        return found

    return ignored


class _Rule:
    """One line: globs for the parts of a path; None stands for `**`."""

    def __init__(self, globs: list[re.Pattern[str] | None], *, negated: bool, folder: bool) -> None:
        self._globs = globs
        self.negated = negated
        self._folder = folder

    @classmethod
    def parse(cls, line: str) -> _Rule | None:
        """The rule of a line; None for a comment or an empty one."""
        line = re.sub(r"(?<!\\)\s+$", "", line)
        if not line or line.startswith("#"):
            return None
        negated, line = line.startswith("!"), line.removeprefix("!")
        folder, line = line.endswith("/"), line.rstrip("/")
        parts = line.removeprefix("/").split("/")
        if "/" not in line:
            parts.insert(0, "**")
        if not parts[-1] or len(parts) > 64:
            return None
        globs = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in parts]
        return cls(globs, negated=negated, folder=folder)

    def matches(self, parts: list[str]) -> bool:
        """Whether the rule names the file or a folder that it is in."""

        @cache
        def match(at: int, part: int) -> bool:
            if at == len(self._globs):
                return part < len(parts) or not self._folder
            glob = self._globs[at]
            if glob is None:
                return match(at + 1, part) or (part < len(parts) and match(at, part + 1))
            return part < len(parts) and glob.match(parts[part]) is not None and match(at + 1, part + 1)

        return match(0, 0)
