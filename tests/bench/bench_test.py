#!/usr/bin/env python3
"""mvgpu-bench runs all its rows, says so in JSON, and refuses wrong arguments.

Usage: bench_test.py MVGPU_BENCH [--no-vulkan]      --no-vulkan: built without Vulkan's headers
The figures of --quick say nothing, so none is checked against its target.
"""

import json
import pathlib
import re
import subprocess
import sys
import unittest

# The lines of the speed table: what rows' names begin with, and how many there are with a target.
DOMAIN = {
    "translate, ": 5,
    "pin + release, batch of 64, ": 2,
    "pin + release, batch of 1, ": 1,
    "pin + release, 64 contiguous pages": 1,
    "pin + release, 512 contiguous pages": 1,
    "two threads, ": 2,
    "first pin + last release, isolated page, ": 2,
    "first pin + last release, 64 contiguous pages, ": 2,
    "isolated pages held at a time, ": 2,
    "memory ": 2,
    "map + unmap of 2 MiB, ": 6,
}
ACCOUNTS = {
    "charge + release, 64 pages that ": 2,
    "charge + release, one random page": 2,
    "memory per page and owner": 1,
    "memory per shared page": 1,
    "verify, ": 1,
    "hand-over ": 1,
}
CACHE = {
    "map + unmap, batch of 64, all pages, ": 4,
    "map + unmap, batch of 64, 4096 hot pages, ": 2,
    "map + unmap, 64 contiguous pages": 1,
    "two threads, map + unmap, different memory, ": 2,
    "reverse lookup": 1,
    "miss, ": 2,
    "memory per cached page, ": 2,
}
VULKAN = {"vulkan mapper, vulkan calls for pages of imported pieces": 1}
# Rows without a target, which are there to be compared with.
CACHE_PEERS = {
    "flat_hash_map + mutex, map + unmap, ": 1,
    "KVMGT's two trees (model), map + unmap, ": 1,
}
VULKAN_PEERS = {
    "vulkan mapper, page of an imported piece": 1,
    "vulkan mapper, first and last page of a piece": 1,
}
SEEDS = {
    "refresh, ": 4,
    "fault to ": 2,
    "maps that tell nobody, ": 2,
    "peak pinned, ": 1,
    "notifications, ": 1,
}


def has_lavapipe():
    """Whether Mesa's Vulkan device on the CPU is installed, whatever the loader makes of it."""
    return any(any(pathlib.Path(folder).glob("lvp_icd*.json"))
               for folder in ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"))


# Where a process may not use io_uring, or has no Vulkan device, the row says so instead of figures.
MAY_FAIL = re.compile("io-uring" if has_lavapipe() else "io-uring|vulkan")


def bench(*arguments):
    return subprocess.run([bench.path, *arguments], capture_output=True, text=True, timeout=300)


class TableChecks:
    """What is true of every table. `table` and `topics` are the class's own."""

    @classmethod
    def setUpClass(cls):
        done = bench(f"--table={cls.table}", "--quick", "--json")
        assert done.returncode == 0, done.stderr
        cls.report = json.loads(done.stdout)

    def test_names_the_machine(self):
        machine = self.report["machine"]
        self.assertTrue(machine["kernel"].startswith("Linux "))
        self.assertGreaterEqual(machine["cores"], 1)

    def assert_rows(self, topics, with_target):
        for topic, count in topics.items():
            found = [row["name"] for row in self.report["rows"]
                     if row["name"].startswith(topic) and (row["target"] is not None) == with_target]
            self.assertEqual(len(found), count, (topic, found))

    def test_has_every_line_of_the_speed_table(self):
        self.assert_rows(self.topics, with_target=True)

    def test_every_row_has_figures_in_order(self):
        for row in self.report["rows"]:
            with self.subTest(row["name"]):
                if "failure" in row:
                    self.assertRegex(row["name"], MAY_FAIL, row["failure"])
                    continue
                self.assertGreaterEqual(row["median"], 0)
                self.assertLessEqual(row["min"], row["median"])
                self.assertLessEqual(row["median"], row["max"])

    def test_ok_says_whether_the_target_is_met(self):
        for row in self.report["rows"]:
            if "failure" in row or row["target"] is None:
                continue
            met = (row["median"] <= row["target"]["at_most"] if "at_most" in row["target"]
                   else row["median"] >= row["target"]["at_least"])
            self.assertEqual(row["ok"], met, row)


class TheDomainTable(TableChecks, unittest.TestCase):
    table = "domain"
    topics = DOMAIN


class TheAccountsTable(TableChecks, unittest.TestCase):
    table = "accounts"
    topics = ACCOUNTS

    def test_a_page_costs_an_owner_one_bit(self):
        row = next(row for row in self.report["rows"] if row["name"].startswith("memory per page"))
        self.assertLessEqual(row["median"], 1)


class TheCacheTable(TableChecks, unittest.TestCase):
    table = "cache"
    topics = CACHE

    def test_has_the_rows_of_peers(self):
        self.assert_rows(CACHE_PEERS, with_target=False)

    def test_has_the_rows_of_vulkan(self):
        if not bench.has_vulkan:
            self.skipTest("mvgpu-bench was built without Vulkan's headers")
        self.assert_rows(VULKAN, with_target=True)
        self.assert_rows(VULKAN_PEERS, with_target=False)

    def test_pages_of_imported_pieces_cost_no_vulkan_call(self):
        for row in self.report["rows"]:
            if row["name"] in VULKAN and "failure" not in row:
                self.assertEqual(row["median"], 0)


class TheSeedsTable(TableChecks, unittest.TestCase):
    table = "seeds"
    topics = SEEDS

    def test_a_fault_is_shown_step_by_step(self):
        steps = [row for row in self.report["rows"] if row["name"].startswith("step of a fault: ")]
        self.assertEqual([row["name"].split(": ")[1].split(",")[0] for row in steps],
                         ["report", "queue", "pin", "map", "resume"])
        for row in steps:
            if "failure" not in row:
                self.assertEqual(row["unit"], "ns")
                self.assertGreater(row["median"], 0)


class TheCommandLine(unittest.TestCase):
    def test_rows_selects_by_name(self):
        done = bench("--quick", "--json", "--rows=8 mappings, dep")
        self.assertEqual([row["name"] for row in json.loads(done.stdout)["rows"]],
                         ["translate, 8 mappings, dependent"])

    def test_text_has_a_line_for_each_row(self):
        done = bench("--quick", "--rows=8 mappings, ")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(sum(line.startswith("translate, ") for line in done.stdout.splitlines()), 2)

    def test_wrong_arguments_are_refused(self):
        for wrong in ("--table=nothing", "--rows=nothing", "--repetitions=8", "--repetitions=x", "--what"):
            with self.subTest(wrong):
                done = bench("--quick", wrong)
                self.assertEqual(done.returncode, 2)
                self.assertEqual(done.stdout, "")
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)


if __name__ == "__main__":
    bench.path = sys.argv.pop(1)
    bench.has_vulkan = sys.argv[1:2] != ["--no-vulkan"]
    if not bench.has_vulkan:
        sys.argv.pop(1)
    unittest.main()
