#!/usr/bin/env python3
"""Tests of the test tools themselves: pictures, mirrors, the guest's command line. Needs no VM cache."""

import pathlib
import struct
import sys
import tempfile
import unittest
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import guest  # noqa: E402
import mirror  # noqa: E402
import picture  # noqa: E402


def noise(width, height):
    return picture.Picture(width, height, bytes((i * i * 7 + i // 5) & 255 for i in range(width * height * 3)))


def filtered_png(source, kind, channels):
    """A PNG of SOURCE whose rows all use filter KIND, written straight from the specification."""
    stride, packed, above = source.width * channels, b"", bytes(source.width * channels)
    for y in range(source.height):
        row = b"".join(bytes(source.pixel(x, y)) + b"\x80" * (channels - 3) for x in range(source.width))
        coded = bytearray([kind])
        for i in range(stride):
            left = row[i - channels] if i >= channels else 0
            corner = above[i - channels] if i >= channels else 0
            nearest = min((abs(left + above[i] - corner - v), n, v) for n, v in enumerate((left, above[i], corner)))[2]
            guess = (0, left, above[i], (left + above[i]) // 2, nearest)[kind]
            coded.append((row[i] - guess) & 255)
        packed += coded
        above = row

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", source.width, source.height, 8, 2 if channels == 3 else 6, 0, 0, 0)
    data = zlib.compress(packed)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data[:50]) + chunk(b"IDAT", data[50:])
            + chunk(b"IEND", b""))


class PictureTest(unittest.TestCase):
    def test_png_of_every_filter_has_the_same_pixels(self):
        source = noise(13, 7)
        for channels in (3, 4):
            for kind in range(5):
                with self.subTest(channels=channels, kind=kind):
                    self.assertEqual(picture.decode_png(filtered_png(source, kind, channels)).rgb, source.rgb)

    def test_png_and_ppm_written_here_read_back(self):
        source = noise(5, 3)
        self.assertEqual(picture.decode_png(picture.encode_png(source)).hash(), source.hash())
        self.assertEqual(picture.decode_ppm(picture.encode_ppm(source)).hash(), source.hash())

    def test_ppm_with_a_comment_reads(self):
        self.assertEqual(picture.decode_ppm(b"P6\n# a comment\n1 1\n255\nabc").rgb, b"abc")

    def test_differences_are_counted_and_the_first_is_named(self):
        source = noise(5, 3)
        changed = bytearray(source.rgb)
        changed[3 * (1 * 5 + 2)] ^= 1
        changed[-1] ^= 1
        self.assertEqual(source.differences(picture.Picture(5, 3, changed)), (2, (2, 1)))
        self.assertEqual(source.differences(noise(5, 3)), (0, None))

    def test_damage_is_an_error(self):
        good = picture.encode_png(noise(5, 3))
        for bad in (good[:60], good[:50] + b"\xff" + good[51:], good[:8]):
            with self.assertRaises(picture.PictureError):
                picture.decode_png(bad)
        with self.assertRaises(picture.PictureError):
            picture.decode_ppm(b"P6 2 2 255\nabc")


class MirrorTest(unittest.TestCase):
    def mirror_of(self, name, text):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return mirror.find_mirror(pathlib.Path(folder))

    def test_one_line_sources_with_options_and_comments(self):
        text = ("# deb http://no.example/debian bookworm main\n"
                "deb http://a.example/debian-security bookworm-security main\n"
                "deb [ arch=amd64 signed-by=/k ] http://a.example/debian/ bookworm main # here\n")
        self.assertEqual(self.mirror_of("sources.list", text), "http://a.example/debian")

    def test_deb822_sources_skip_disabled_stanzas(self):
        text = ("Enabled: no\nTypes: deb\nURIs: http://no.example/debian\nSuites: trixie\n\n"
                "Types: deb deb-src\n# a comment\nURIs:\n http://b.example/debian\nSuites: trixie trixie-updates\n")
        self.assertEqual(self.mirror_of("sources.list.d/debian.sources", text), "http://b.example/debian")

    def test_no_debian_suite_is_none(self):
        self.assertIsNone(self.mirror_of("sources.list", "deb http://c.example/ubuntu noble main\n"))


class GuestTest(unittest.TestCase):
    def test_vfio_user_device_and_shared_memory(self):
        line = guest.Guest(device="vfio-user", socket="/run/s", memory="256M", properties={"x-msg-timeout": 9},
                           extra=["-S"]).command_line(3, 4)
        self.assertIn('{"driver": "vfio-user-pci", "id": "gpu", "socket": {"type": "unix", "path": "/run/s"}, '
                      '"x-msg-timeout": 9}', line)
        self.assertIn("memory-backend-memfd,id=m,size=256M,share=on", line)
        self.assertEqual(line[-1], "-S")

    def test_a_program_is_a_task_of_its_own(self):
        line = guest.Guest(device="none", program="/x/prove", append="mvgpu.argument=all").command_line(3, 4)
        self.assertIn("mvgpu.task=program mvgpu.argument=all", line[line.index("-append") + 1])
        self.assertNotIn("vfio-user-pci", " ".join(line))

    def test_private_memory_has_no_backend(self):
        line = guest.Guest(device="vfio-user", socket="/run/s", memory="256M", shared=False).command_line(3, 4)
        self.assertNotIn("memory-backend", " ".join(line))
        self.assertEqual(line[line.index("-m") + 1], "256M")

    def test_wrong_arguments_are_named(self):
        for arguments in ({"kernel": "5.10", "socket": "s"}, {"device": "vfio-user"}, {"task": "dance", "socket": "s"}):
            with self.assertRaises(guest.GuestError):
                guest.Guest(**arguments)


if __name__ == "__main__":
    unittest.main()
