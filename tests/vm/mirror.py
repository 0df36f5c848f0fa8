#!/usr/bin/env python3
"""Prints the URI of the Debian mirror that this host's apt already uses.

Reads sources.list and sources.list.d/*.{list,sources}; the first enabled entry that
serves a plain Debian suite (not -security, -updates or -backports) wins.
Usage: mirror.py [ETC_APT_FOLDER]
"""

import pathlib
import sys

SUITES = {"bullseye", "bookworm", "trixie", "forky", "sid",
          "oldoldstable", "oldstable", "stable", "testing", "unstable"}


def one_line_entries(text):
    """Yields (uris, suites) of `deb [options] URI SUITE COMPONENT...` lines."""
    for line in text.splitlines():
        words = line.split("#", 1)[0].split()
        if not words or words[0] != "deb":
            continue
        words = words[1:]
        if words and words[0].startswith("["):
            while words and not words.pop(0).endswith("]"):
                pass
        if len(words) >= 2:
            yield [words[0]], [words[1]]


def deb822_entries(text):
    """Yields (uris, suites) of enabled deb822 stanzas of type deb."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in "\n".join(line if line.strip() else "" for line in lines).split("\n\n"):
        fields, name = {}, None
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += line.split()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.split()
        if fields.get("enabled", ["yes"])[0].lower() in ("no", "false", "0"):
            continue
        if "deb" in fields.get("types", []):
            yield fields.get("uris", []), fields.get("suites", [])


def find_mirror(etc_apt):
    parts = etc_apt / "sources.list.d"
    files = [etc_apt / "sources.list"] + sorted(parts.glob("*.sources")) + sorted(parts.glob("*.list"))
    for path in files:
        if not path.is_file():
            continue
        entries = deb822_entries if path.suffix == ".sources" else one_line_entries
        for uris, suites in entries(path.read_text(errors="replace")):
            if uris and SUITES & set(suites):
                return uris[0].rstrip("/")
    return None


def main():
    etc_apt = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "/etc/apt")
    mirror = find_mirror(etc_apt)
    if not mirror:
        sys.exit(f"mirror.py: no Debian suite in {etc_apt}/sources.list or sources.list.d; "
                 "set MVGPU_DEBIAN_MIRROR to the URI of a Debian mirror")
    print(mirror)


if __name__ == "__main__":
    main()
