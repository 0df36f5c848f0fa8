#!/usr/bin/env python3
"""SEED_VECTORS.md is complete, and its tests exist and have the values in them.

Usage: seed_vectors_test.py REPOSITORY
Checks the repository's table, and on small tables of its own that each rule can fail.
"""

import pathlib
import re
import sys
import tempfile
import unittest

from test_tables import NAMED, rows_in, tests_in

TABLE = "tests/apionly-domain/SEED_VECTORS.md"
# heading -> how many vectors its system has
TABLES = {"zPCI": 12, "VT-d": 14, "SMMUv3": 9, "coIOMMU": 5, "KVMGT": 4, "Importers": 3}

EXCUSE = re.compile(r"^later: \S.+$")
INCLUDE = re.compile(r'^#include "(tests/[^"]+)"', re.MULTILINE)
# As C++ and as scripts write it, in any case, with digits apart.
NUMBER = re.compile(r"\b0x([0-9a-f']+)(?=[ul]*\b)", re.IGNORECASE)


def numbers_in(text):
    return {int(digits.replace("'", ""), 16) for digits in NUMBER.findall(text)}


def numbers_of(root, path, seen):
    """Of a source file and of what it includes from tests/."""
    if path in seen or not path.is_file():
        return set()
    seen.add(path)
    text = path.read_text(encoding="utf-8")
    numbers = numbers_in(text)
    for included in INCLUDE.findall(text):
        numbers |= numbers_of(root, root / included, seen)
    return numbers


def problems_of_row(root, cells, tests):
    if len(cells) != 4 or not all(cells):
        return ["not four cells that say something"]
    _, _, values, shown_by = cells
    if EXCUSE.match(shown_by):
        return []
    named = [f"{suite}.{name}" for suite, name in NAMED.findall(shown_by)]
    if not named:
        return [f"neither a test nor an excuse: {shown_by}"]
    found = [f"there is no test {name}" for name in named if name not in tests]
    wanted = [int(word, 16) for word in values.split() if word.startswith("0x")]
    if not wanted:
        found.append("no values")
    there = set().union(*(numbers_of(root, tests[name], set()) for name in named if name in tests))
    found += [f"{value:#x} stands in none of its tests" for value in wanted if value not in there]
    return found


def problems(root, text, tests):
    """One line for each rule that is broken."""
    found = []
    rows = rows_in(text)
    for heading, count in TABLES.items():
        lines = rows.get(heading, [])
        if [cells[0] for cells in lines] != [str(n + 1) for n in range(count)]:
            found.append(f"{heading}: not one line for each of {count} in order")
        for cells in lines:
            found += [f"{heading} {cells[0]}: {problem}"
                      for problem in problems_of_row(root, cells, tests)]
    return found


class TheTable(unittest.TestCase):
    root = None  # from the command line

    def test_is_complete_and_its_tests_have_the_values(self):
        text = (self.root / TABLE).read_text(encoding="utf-8")
        self.assertEqual(problems(self.root, text, tests_in(self.root)), [])


class TheRules(unittest.TestCase):
    """Each rule on a table that keeps it, and with one thing wrong."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        (self.root / "tests").mkdir()
        (self.root / "tests/a_test.cc").write_text(
            '#include "tests/a.h"\nTEST(Suite, Works) { use(0x1\'2aB0); }\n', encoding="utf-8")
        (self.root / "tests/a.h").write_text("constexpr auto k = 0x77;", encoding="utf-8")

    def table(self, row="| it | 0x12ab0 0x77 | `Suite.Works` |", skip=None):
        text = ""
        for heading, count in TABLES.items():
            text += f"## {heading}\n| a | b | c | d |\n|---|---|---|---|\n"
            for number in range(1, count + 1):
                if (heading, number) != skip:
                    text += f"| {number} {row}\n"
        return text

    def found(self, text):
        return problems(self.root, text, tests_in(self.root))

    def expect_problem(self, text, words):
        found = self.found(text)
        self.assertTrue(found)
        for line in found:
            self.assertIn(words, line)

    def test_a_table_in_order_has_no_problem(self):
        self.assertEqual(self.found(self.table()), [])
        self.assertEqual(self.found(self.table("| it | - | later: not yet |")), [])

    def test_a_missing_line_is_found(self):
        self.expect_problem(self.table(skip=("VT-d", 14)), "VT-d: not one line for each of 14")

    def test_a_missing_table_is_found(self):
        self.expect_problem(self.table().split("## Importers")[0], "Importers: not one line")

    def test_a_value_that_no_test_has_is_found(self):
        self.expect_problem(self.table("| it | 0x12ab1 | `Suite.Works` |"), "0x12ab1 stands in none")

    def test_a_line_without_values_is_found(self):
        self.expect_problem(self.table("| it | - | `Suite.Works` |"), "no values")

    def test_a_test_that_does_not_exist_is_found(self):
        self.expect_problem(self.table("| it | 0x77 | `Suite.Works`, `Suite.Gone` |"),
                            "no test Suite.Gone")

    def test_an_excuse_says_something(self):
        for shown_by in ("later:", "later", "yes"):
            self.expect_problem(self.table(f"| it | 0x77 | {shown_by} |"),
                                "neither a test nor an excuse")

    def test_an_empty_cell_is_found(self):
        self.expect_problem(self.table("|  | 0x77 | `Suite.Works` |"), "four cells")


if __name__ == "__main__":
    TheTable.root = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main()
