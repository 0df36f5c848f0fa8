#!/usr/bin/env python3
"""Includes go one way only, headers are guarded, and the top level stays small.

Usage: include_direction_test.py REPOSITORY
Checks the repository, and on small trees of its own that each rule can fail.
"""

import pathlib
import re
import sys
import tempfile
import unittest

# folder -> folders that it may include, itself aside. Nobody but the tests includes tests/.
MAY_INCLUDE = {
    "apionly-domain": [],
    "dma-cache": ["apionly-domain"],
    "gpu-model": ["dma-cache", "apionly-domain"],
    "vmm-glue": ["gpu-model", "dma-cache", "apionly-domain"],
    "backend": ["vmm-glue", "gpu-model", "dma-cache", "apionly-domain"],
    "tests": ["backend", "vmm-glue", "gpu-model", "dma-cache", "apionly-domain"],
}
# Names that begin with a dot are the tools' business. compile_commands.json is not in git: editors
# look for it here.
TOP_LEVEL = {*MAY_INCLUDE, "cmake", "CMakeLists.txt", "CMakePresets.json", "README.md",
             "ARCHITECTURE.md", "build", "compile_commands.json"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include(?:_next)?[ \t]*(["<])([^">\n]*)[">]', re.MULTILINE)
PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once\b", re.MULTILINE)


def sources(root, folder):
    return sorted(p for p in (root / folder).rglob("*") if p.suffix in (".h", ".cc", ".S"))


def problem_of_include(root, folder, quote, target):
    parts = target.split("/")
    if ".." in parts or "." in parts:
        return f"includes {target}: name it by its path from the root"
    if parts[0] in MAY_INCLUDE and len(parts) > 1:
        if parts[0] != folder and parts[0] not in MAY_INCLUDE[folder]:
            allowed = ", ".join([folder, *MAY_INCLUDE[folder]])
            return f"includes {target}, but {folder} may use only {allowed}"
        if quote == "<":
            return f"includes <{target}>: our own headers stand in double quotes"
        if not (root / target).is_file():
            return f"includes {target}, which does not exist"
    elif quote == '"':
        return f"includes {target}: name it by its path from the root, or in <> if it is not ours"
    return None


def problems(root):
    """One line for each rule that is broken."""
    found = []
    for entry in sorted(root.iterdir()):
        if entry.name not in TOP_LEVEL and not entry.name.startswith("."):
            found.append(f"{entry.name}: does not belong on the top level")
    for folder in MAY_INCLUDE:
        for path in sources(root, folder):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(root)
            for match in INCLUDE.finditer(text):
                problem = problem_of_include(root, folder, match[1], match[2])
                if problem:
                    line = text.count("\n", 0, match.start()) + 1
                    found.append(f"{name}:{line}: {problem}")
            if path.suffix == ".h" and not PRAGMA_ONCE.search(text):
                found.append(f"{name}: has no #pragma once")
    return found


class TheRepository(unittest.TestCase):
    root = None  # from the command line

    def test_keeps_the_rules(self):
        self.assertEqual(problems(self.root), [])

    def test_was_really_looked_at(self):
        for folder in MAY_INCLUDE:
            self.assertGreater(len(sources(self.root, folder)), 3, folder)


class TheRules(unittest.TestCase):
    """Each rule on a tree that keeps it, and with one thing wrong."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        for folder, allowed in MAY_INCLUDE.items():
            self.write(f"{folder}/sub/own.h", "#pragma once\n")
            self.write(f"{folder}/a.cc", "#include <vector>\n#include <png.h>\n" + "".join(
                f'#include "{other}/sub/own.h"\n' for other in [folder, *allowed]))
        self.write("README.md", "")
        self.write(".ci/run", "")

    def write(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def expect_problem(self, *words):
        found = problems(self.root)
        self.assertEqual(len(found), 1, found)
        for word in words:
            self.assertIn(word, found[0])

    def test_a_tree_in_order_has_no_problem(self):
        self.assertEqual(problems(self.root), [])

    def test_every_direction_that_is_not_allowed_is_found(self):
        for folder, allowed in MAY_INCLUDE.items():
            for other in MAY_INCLUDE:
                if other == folder or other in allowed:
                    continue
                for suffix in (".h", ".cc", ".S"):
                    path = f"{folder}/sub/wrong{suffix}"
                    self.write(path, f'#pragma once\n#include "{other}/sub/own.h"\n')
                    with self.subTest(folder=folder, other=other, suffix=suffix):
                        self.expect_problem(f"{path}:2:", other)
                    (self.root / path).unlink()

    def test_angle_brackets_and_odd_spelling_do_not_hide_it(self):
        for spelling in ("#include <backend/sub/own.h>", '#  include  "backend/sub/own.h"',
                         ' #include"backend/sub/own.h"'):
            self.write("gpu-model/a.cc", spelling + "\n")
            with self.subTest(spelling):
                self.expect_problem("gpu-model/a.cc:1:", "backend")

    def test_own_headers_stand_in_quotes_and_exist(self):
        self.write("backend/a.cc", "#include <backend/sub/own.h>\n")
        self.expect_problem("double quotes")
        self.write("backend/a.cc", '#include "backend/sub/gone.h"\n')
        self.expect_problem("does not exist")

    def test_includes_by_another_path_than_from_the_root_are_found(self):
        for target in ("own.h", "sub/own.h", "../backend/sub/own.h", "backend/../backend/sub/own.h",
                       "./own.h"):
            self.write("backend/a.cc", f'#include "{target}"\n')
            with self.subTest(target):
                self.expect_problem("path from the root")

    def test_a_header_without_pragma_once_is_found(self):
        self.write("vmm-glue/sub/own.h", "#ifndef OWN_H\n#endif  // #pragma once\n")
        self.expect_problem("vmm-glue/sub/own.h", "#pragma once")

    def test_a_stranger_on_the_top_level_is_found(self):
        self.write("notes.txt", "")
        self.expect_problem("notes.txt", "top level")


if __name__ == "__main__":
    TheRepository.root = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main()
