#!/usr/bin/env python3
"""KERNEL_ANCHORS.md is complete, and every test that it names exists.

Usage: kernel_anchors_test.py REPOSITORY
Checks the repository's table, and on small tables of its own that each rule can fail.
"""

import pathlib
import re
import sys
import unittest

from test_tables import NAMED, rows_in, tests_in

TABLE = "tests/apionly-domain/KERNEL_ANCHORS.md"
# heading -> the numbers that its table has a line for; None: names instead of numbers
TABLES = {"Behaviours": range(1, 78), "Lessons": range(1, 36), "Kernel fixtures": None}

EXCUSE = re.compile(r"^(does not apply: \S.+|later: issue [456]\b.*)$")


def problems(text, tests):
    """One line for each rule that is broken."""
    found = []
    rows = rows_in(text)
    for heading, numbers in TABLES.items():
        lines = rows.get(heading, [])
        if numbers is not None:
            wanted, there = [str(n) for n in numbers], [cells[0] for cells in lines]
            if there != wanted:
                odd = sorted(set(wanted) ^ set(there)) or "another order"
                found.append(f"{heading}: not one line for each number in order: {odd}")
        elif not lines:
            found.append(f"{heading}: no lines")
        for cells in lines:
            shown_by = cells[-1]
            if len(cells) != 4 or not all(cells):
                found.append(f"{heading} {cells[0]}: not four cells that say something")
            if not EXCUSE.match(shown_by) and not NAMED.search(shown_by):
                found.append(f"{heading} {cells[0]}: neither a test nor an excuse: {shown_by}")
            for suite, name in NAMED.findall(" ".join(cells)):
                if f"{suite}.{name}" not in tests:
                    found.append(f"{heading} {cells[0]}: there is no test {suite}.{name}")
    return found


class TheTable(unittest.TestCase):
    root = None  # from the command line

    def test_is_complete_and_names_tests_that_exist(self):
        text = (self.root / TABLE).read_text(encoding="utf-8")
        self.assertEqual(problems(text, tests_in(self.root)), [])

    def test_tests_were_really_found(self):
        self.assertGreater(len(tests_in(self.root)), 200)


class TheRules(unittest.TestCase):
    """Each rule on a table that keeps it, and with one thing wrong."""

    def table(self, shown_by="`Suite.Works`", skip=None):
        text = ""
        for heading, numbers in TABLES.items():
            text += f"## {heading}\n| a | b | c | d |\n|---|---|---|---|\n"
            for number in numbers or ["area"]:
                if number != skip:
                    text += f"| {number} | it | so | {shown_by} |\n"
        return text

    def expect_problem(self, text, words):
        found = problems(text, {"Suite.Works"})
        self.assertTrue(found)
        for line in found:
            self.assertIn(words, line)

    def test_a_table_in_order_has_no_problem(self):
        for shown_by in ("`Suite.Works`", "does not apply: no hardware", "later: issue 5",
                         "`Suite.Works`; the rest later"):
            self.assertEqual(problems(self.table(shown_by), {"Suite.Works"}), [])

    def test_a_missing_number_is_found(self):
        self.expect_problem(self.table(skip=35), "35")

    def test_a_missing_table_is_found(self):
        self.expect_problem(self.table().split("## Kernel fixtures")[0], "no lines")

    def test_a_test_that_does_not_exist_is_found(self):
        self.expect_problem(self.table("`Suite.Gone`"), "no test Suite.Gone")

    def test_an_excuse_says_why_or_until_when(self):
        for shown_by in ("does not apply:", "later", "later: issue 9", "yes"):
            self.expect_problem(self.table(shown_by), "neither a test nor an excuse")

    def test_an_empty_cell_is_found(self):
        self.expect_problem(self.table().replace("| it |", "|  |"), "four cells")


if __name__ == "__main__":
    TheTable.root = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main()
