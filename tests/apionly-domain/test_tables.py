"""Tables in Markdown that name tests, for the tests that hold them against the sources."""

import re

HEADING = re.compile(r"^## (.+)$")
TEST = re.compile(r"^TEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\)", re.MULTILINE)
NAMED = re.compile(r"`(\w+)\.(\w+)`")


def tests_in(root):
    """Suite.Test of every test in the sources -> the file that it is in."""
    return {f"{suite}.{name}": path
            for path in (root / "tests").rglob("*.cc")
            for suite, name in TEST.findall(path.read_text(encoding="utf-8"))}


def rows_in(text):
    """heading -> lines of its table, as lists of cells."""
    rows, heading = {}, None
    for line in text.splitlines():
        if match := HEADING.match(line):
            heading = match[1]
            rows[heading] = []
        elif heading and line.startswith("|"):
            rows[heading].append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: lines[2:] for heading, lines in rows.items()}  # without the table's head
