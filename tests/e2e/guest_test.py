#!/usr/bin/env python3
"""End to end: a stock QEMU, a Debian kernel and its virtio_gpu driver draw through mvgpu-backend.

    guest_test.py PROGRAMS KERNEL TEST...     PROGRAMS: folder with mvgpu-backend, KERNEL: 6.1 or 6.12
"""

import pathlib
import subprocess
import sys
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vm"))

import picture  # noqa: E402
from backend_process import NOTHING_LEFT, Backend  # noqa: E402
from guest import Guest, ready  # noqa: E402

PROGRAMS = pathlib.Path()
KERNEL = ""
PATTERN_PAGES = 1024 * 768 * 4 // 4096


def same_picture(a, b):
    return picture.load(a).hash() == picture.load(b).hash()


def wait_for_picture(backend, wanted, timeout=10):
    """Screenshots until one is the wanted picture: the driver does not wait for its last flush."""
    deadline = time.monotonic() + timeout
    while not same_picture(backend.take_screenshot(), wanted):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


class GuestDrawsTest(unittest.TestCase):
    def guest(self, backend, **options):
        return Guest(kernel=KERNEL, device="vfio-user", socket=str(backend.socket),
                     log=str(backend.folder / "guest.log"), **options)

    def start_pattern(self, guest):
        guest.start()
        guest.wait_marker("pattern up", 90)
        self.assertEqual(guest.value("driver"), "virtio_gpu")
        self.assertEqual(guest.value("result"), "ok")
        self.assertEqual(guest.value("dmesg-errors"), "0")

    def qemus_own_picture(self, folder, mode="1024x768"):
        """The same pattern in the same guest on QEMU's own virtio-gpu-pci."""
        path = folder / f"qemu-{mode}.ppm"
        with Guest(kernel=KERNEL, device="virtio-gpu", append=f"mvgpu.mode={mode}",
                   log=str(folder / "qemu-guest.log")) as guest:
            guest.start()
            guest.wait_marker("pattern up", 90)
            guest.screendump(path)
            guest.quit()
        return path

    def assert_vm_left_nothing(self, backend):
        self.assertIn(NOTHING_LEFT, backend.wait_line("the vm is gone"))
        self.assertEqual(backend.locked_kilobytes(), 0)
        self.assertEqual(backend.audit()["vms"], [])

    def test_picture_is_qemus_and_replays(self):
        with Backend(PROGRAMS, record=True) as backend:
            wanted = self.qemus_own_picture(backend.folder)
            with self.guest(backend) as guest:
                self.start_pattern(guest)
                self.assertIn("1024x768", guest.value("modes"))
                self.assertEqual(guest.value("preferred"), "1280x800")
                self.check_edid(guest.value("edid"))
                self.assertTrue(wait_for_picture(backend, wanted), "the screenshot is not QEMU's picture")
                self.check_accounts(backend)
                backend.screenshot.unlink()
                guest.kill()
            backend.wait_line("screenshot written")  # when the VMM left
            self.assertTrue(same_picture(backend.screenshot, wanted))
            self.assert_vm_left_nothing(backend)
            self.check_replay(backend, wanted)
            self.assertEqual(backend.leave(), 0)
            self.assertFalse(backend.socket.exists())

    def check_edid(self, edid):
        done = subprocess.run(["edid-decode", "--check"], input=bytes.fromhex(edid), capture_output=True,
                              check=False)
        self.assertNotIn(b"FAIL", done.stdout, done.stdout.decode(errors="replace"))
        self.assertIn(b"EDID conformity: PASS", done.stdout)

    def check_accounts(self, backend):
        """While the pattern stands, its pages are pinned: the device says so, and the kernel agrees."""
        vms = backend.audit()["vms"]
        self.assertEqual(len(vms), 1)
        (row,) = vms[0]["domains"]
        self.assertGreaterEqual(row["unique_pages"], PATTERN_PAGES)
        self.assertEqual(row["unique_pages"], row["charged_pages"])
        self.assertEqual(row["pinned_pages"], row["unique_pages"])  # each page was pinned once
        self.assertGreater(row["mapped_pages"], 100000)             # nearly all of 512 MiB
        self.assertLess(row["unique_pages"], row["mapped_pages"] // 20)
        self.assertEqual(row["locked_pages"] * 4, backend.locked_kilobytes())

    def check_replay(self, backend, wanted):
        again = backend.folder / "replayed.png"
        code, report = backend.replay(None, f"--screenshot={again}")
        self.assertEqual((code, report["described"]), (0, []))
        self.assertTrue(report["ok"] and report["complete"] and report["all_released"])
        self.assertGreater(report["counters"]["frames"], 0)
        self.assertGreater(report["counters"]["dma_hit_pages"], 0)
        self.assertGreaterEqual(report["counters"]["pages_pinned"], PATTERN_PAGES)
        self.assertEqual(report["frame_hashes"][-1], report["counters"]["final_picture"])
        self.assertTrue(same_picture(again, wanted))

    def test_memory_without_a_file_shows_the_same_picture(self):
        with Backend(PROGRAMS, record=True) as backend:
            wanted = self.qemus_own_picture(backend.folder)
            with self.guest(backend, shared=False) as guest:
                self.start_pattern(guest)
                backend.wait_line("has no file.*memory-backend-memfd,share=on")
                self.assertTrue(wait_for_picture(backend, wanted, 30), "the screenshot is not QEMU's picture")
                (row,) = backend.audit()["vms"][0]["domains"]
                self.assertEqual(row["unique_pages"], 0)  # there is nothing to pin
                guest.kill()
            self.assert_vm_left_nothing(backend)
            said = [line for line in backend.lines if "has no file" in line]
            self.assertEqual(len(said), 1, "it is said once")
            self.assert_no_trouble(backend)
            again = backend.folder / "replayed.png"
            code, report = backend.replay(None, f"--screenshot={again}")
            self.assertEqual((code, report["described"]), (0, []))
            self.assertTrue(report["ok"] and report["complete"] and report["all_released"])
            self.assertTrue(same_picture(again, wanted))

    def assert_no_trouble(self, backend):
        for word in ("refused", "stands still", "waits until"):
            self.assertNotIn(word, "\n".join(backend.lines))

    def test_backend_survives_its_vmms(self):
        with Backend(PROGRAMS) as backend:
            with self.guest(backend) as guest:
                self.start_pattern(guest)
                guest.send("reboot")  # the firmware unmaps memory with the guest's resources attached
                guest.wait_marker("pattern up", 90)
                guest.quit()
            self.assert_vm_left_nothing(backend)
            idle = backend.open_descriptors()
            with self.guest(backend) as guest:
                self.start_pattern(guest)
                guest.kill()
            self.assert_vm_left_nothing(backend)
            self.assertEqual(backend.open_descriptors(), idle)
            self.assertEqual(backend.leave(), 0)

    def test_modes_come_and_go(self):
        with Backend(PROGRAMS, record=True) as backend:
            wanted = self.qemus_own_picture(backend.folder, "800x600")
            with self.guest(backend, task="redraw") as guest:
                guest.start()
                guest.wait_marker("redraw done", 120)
                guest.send("mode 800x600")
                guest.wait_marker("pattern up", 60)
                self.assertTrue(wait_for_picture(backend, wanted), "800x600 is not QEMU's picture")
                guest.send("reboot")
                guest.wait_marker("redraw done", 120)
                guest.quit()
            self.assert_vm_left_nothing(backend)
            code, report = backend.replay()
            self.assertEqual((code, report["described"]), (0, []))
            self.assertEqual(report["counters"]["failed_commands"], 0)

    def test_pin_limit_is_an_error_for_the_guest_only(self):
        # Enough for the console's picture, not for a larger one beside it.
        with Backend(PROGRAMS, record=True, options=["--pin-limit=5M"]) as backend:
            with self.guest(backend, append="mvgpu.mode=1920x1080") as guest:
                guest.start()
                guest.wait_marker("pattern (up|failed)", 90)
                backend.wait_line("a guest command was refused: .* raise --pin-limit to at least")
                guest.send("mode 640x480")
                guest.wait_marker("pattern (up|failed)", 60)
                (row,) = backend.audit()["vms"][0]["domains"]
                self.assertLessEqual(row["unique_pages"] * 4096, 5 << 20)
                guest.quit()
            self.assert_vm_left_nothing(backend)
            code, report = backend.replay()  # the limit travels with the trace
            self.assertEqual((code, report["described"]), (0, []))
            self.assertGreater(report["counters"]["failed_commands"], 0)


def main():
    global PROGRAMS, KERNEL
    PROGRAMS, KERNEL = pathlib.Path(sys.argv[1]), sys.argv[2]
    missing = ready()
    if missing is not None:
        sys.exit(f"guest_test.py: {missing}; run tests/vm/fetch.sh")
    unittest.main(argv=[sys.argv[0], *(f"GuestDrawsTest.{name}" for name in sys.argv[3:])], verbosity=2)


if __name__ == "__main__":
    main()
