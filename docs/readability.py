"""Check the words of what people read: `python docs/readability.py [FILE ...]`.

Our own list comes first, then proselint. Code, addresses and the changelog are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from proselint import checks
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).parents[1]
LONGEST = 40
"""Words of a sentence."""
WORDS = {
    r"\bBack comes\b": "begin with the subject: you get",
    r"\bloses [\d.]+ points[^.]*? to itself\b": "name the two things that are compared",
    r"\bends ends\b": "one verb for each subject",
    r"\bby heart\b": "memorises",
    r"\bhas stayed one\b": "the present state: is still available",
    r"\b(is|are) told\b": "is reported",
    r"\bin passing\b": "while reading",
    r"\bfor lack of\b": "without",
    r"\b(mend|mends|mended)\b": "repair",
    r"\brooms?\b": "package",
    r", for (it|they|he|she|such)\b": "since",
    r"\bif need be\b": "if necessary",
    r"\bas it were\b": "leave it out",
    r"\b(used to be|formerly|was once|was open once)\b": "the present state; history is for the changelog",
    r"\bbrings (nothing|next to nothing)\b": "adds nothing",
    r"\bin one go\b": "together",
}
"""What our pages must not say, to what says it better."""
_LEFT_TO_US = ("typography", "restricted", "spelling", "dates_times", "lexical_illusions", "weasel_words")
_CHECKS = {name: on and name not in _LEFT_TO_US for name, on in DEFAULT["checks"].items()}
CheckRegistry().register_many(checks.__register__)
_CODE = re.compile(r"^```.*?^```|<!--.*?-->|`[^`\n]*`|^:::.*$|^--8<--.*$|https?://\S+", re.M | re.S)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def read_pages() -> list[Path]:
    """List what people read, the generated pages included."""
    written = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "changelog.md"]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *written]


def find_faults(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of each passage that is hard to read."""
    prose = _CODE.sub(_blank, text)
    prose = _LINK.sub(r"\1", prose)
    lines = prose.splitlines()
    for number, line in enumerate(lines, 1):
        for pattern, better in WORDS.items():
            if found := re.search(pattern, line):
                yield number, f"{found[0]!r}: {better}"
    for number, sentence in _sentences(lines):
        if (count := len(re.findall(r"[^\W\d_]{2,}", sentence))) > LONGEST:
            yield number, f"a sentence of {count} words, {LONGEST} at most: {' '.join(sentence.split())[:60]}..."
    for result in LintFile("page", prose or " ").lint({**DEFAULT, "checks": _CHECKS}):
        yield result.pos[0], f"{result.check_result.check_path}: {result.check_result.message}"


def _blank(found: re.Match[str]) -> str:
    """Keep the lines of what is left out, so that the others keep their numbers."""
    return "X" + "\n" * found[0].count("\n") if not found[0].startswith("```") else "\n" * found[0].count("\n")


def _sentences(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield each sentence of running text with the line on which its paragraph begins; a table's cell is one, too."""
    start, paragraph = 1, ""
    for number, line in enumerate([*lines, ""], 1):
        begins = not line.strip() or re.match(r"\s*([-*|#>]|\d+\.)\s?", line)
        if begins:
            yield from ((start, one) for one in re.split(r"(?<=[.!?:;])\s+|\s\|\s", paragraph))
            start, paragraph = number, ""
        paragraph += f" {line}"


def main() -> None:
    """Exit with every fault of the pages, or of the files that the command names."""
    pages = [Path(name) for name in sys.argv[1:]] or read_pages()
    faults = [
        f"{page}:{number}: {fault}" for page in pages for number, fault in find_faults(page.read_text(encoding="utf-8"))
    ]
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
