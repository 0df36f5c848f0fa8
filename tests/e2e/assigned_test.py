#!/usr/bin/env python3
"""The accounts of a VM with one assigned device and one vgpu: a stock QEMU with vfio-pci and vfio-user-pci, in a guest
whose kernel has VFIO type1, an (emulated) Intel IOMMU and QEMU's edu device.

    assigned_test.py PROGRAMS VGPU_GUEST     PROGRAMS: folder with mvgpu-backend and mvgpu-audit

The VM's own guest is VGPU_GUEST (tests/vm/vgpu_guest), since an operating system takes minutes under two emulations.
"""

import json
import pathlib
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vm"))

from guest import Guest, ready  # noqa: E402

PROGRAMS = pathlib.Path()
VGPU_GUEST = pathlib.Path()
RAM_PAGES = 32768       # 128 MiB
PICTURE_PAGES = 300     # 640x480; at PICTURE, tests/vm/vgpu_guest/virtio_gpu.h
PICTURE = 0x1000000
PATIENCE = 150          # seconds for one step on a busy machine
QEMU = (
    "qemu-system-x86_64 -nodefaults -no-user-config -display none -vga none -accel tcg,tb-size=32"
    " -machine pc,memory-backend=ram -m 128M -object memory-backend-memfd,id=ram,size=128M,share=on"
    " -chardev pipe,id=serial,path=/tmp/serial -serial chardev:serial"
    " -chardev pipe,id=qmp,path=/tmp/qmp -qmp chardev:qmp -kernel /host/vgpu_guest"
    """ -device '{"driver":"vfio-user-pci","id":"gpu","socket":{"type":"unix","path":"/tmp/gpu.sock"}}'""")


class AssignedTest(unittest.TestCase):
    def setUp(self):
        self.asked = 0
        self.host = Guest(kernel="6.12", memory="1G", device="none", smp=2,
                          host=[PROGRAMS / "mvgpu-backend", PROGRAMS / "mvgpu-audit", VGPU_GUEST],
                          append="intel_iommu=on",
                          extra=["-device", "intel-iommu", "-device", "edu,dma_mask=0xffffffffffffffff"])

    def test_assigned_and_vgpu(self):
        with self.host:
            self.host.start()
            self.host.wait_marker("host up", 2 * PATIENCE)
            self.start_vm()
            self.attach_and_register()
            self.explain_a_page_of_both()
            self.charges_follow_the_vgpu()
            self.unplug()
            self.kill()
            self.host.quit()

    # --- the host -------------------------------------------------------------------------

    def run_here(self, command, status=0):
        got, lines = self.host.run(command, PATIENCE)
        self.assertEqual(got, status, "\n".join([command, *lines]))
        return lines

    def wait_for(self, text, file):
        """The lines with the text, as soon as the file has one."""
        return self.run_here(f"n=0; until grep '{text}' {file}; do n=$((n + 1)); [ $n -lt 600 ] || break; sleep 0.1; done;"
                             f" grep -q '{text}' {file} || {{ cat {file}; false; }}")

    def audit(self, words, status=0):
        return self.run_here(f"mvgpu-audit {words} --runtime-dir=/tmp/run", status)

    def accounts(self):
        """{kind: row} and the totals of the only VM; what is charged is what is held, and verify agrees."""
        self.audit("verify")
        (vm,) = json.loads("\n".join(self.audit("show --json")))["vms"]
        rows = {row["kind"]: row for row in vm["domains"]}
        self.assertEqual(len(rows), len(vm["domains"]))
        unique = vm["totals"]["unique_pages"]
        self.assertEqual(sum(row["charged_pages"] for row in rows.values()), unique)
        self.assertEqual(vm["totals"]["charged_pages"], unique)
        return rows, unique

    def locked(self, program):
        """VmLck of a process, in kB."""
        lines = self.run_here(f"grep VmLck /proc/$(pidof {program})/status")
        return int(lines[0].split()[1])

    def show(self, title, lines):
        print(f"--- {title}", *lines, sep="\n")

    # --- the VM ---------------------------------------------------------------------------

    def start_vm(self):
        self.run_here("mkdir -m 700 /tmp/run; for f in serial qmp; do mkfifo /tmp/$f.in /tmp/$f.out; done")
        # Both ends stay open: neither QEMU nor the readers see an end of file.
        self.run_here("for f in serial qmp; do (exec 4<>/tmp/$f.in 5<>/tmp/$f.out; exec cat <&5 >>/tmp/$f) & done")
        self.run_here("mvgpu-backend --socket-path=/tmp/gpu.sock --runtime-dir=/tmp/run --vm-uuid="
                      "6e1f0a52-9c1b-4d55-8a60-0d6b3f6f2a11 2>>/tmp/backend &")
        self.wait_for("waiting for a vmm", "/tmp/backend")
        edu = self.host.value("edu")
        self.run_here(f"{QEMU} -device vfio-pci,id=nic,host={edu} >/tmp/qemu.log 2>&1 &")
        self.wait_for("vgpu up$", "/tmp/serial")
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self.asked += 1
        request = json.dumps({"execute": command, "arguments": arguments, "id": self.asked})
        self.run_here(f"echo '{request}' >/tmp/qmp.in")
        (answer,) = self.wait_for(f'"id": {self.asked}[,}}]', "/tmp/qmp")
        self.assertNotIn("error", answer)

    def tell_guest(self, letter, answer):
        self.run_here(f": >/tmp/serial; printf {letter} >/tmp/serial.in")
        self.wait_for(answer + "$", "/tmp/serial")

    # --- steps ----------------------------------------------------------------------------

    def attach_and_register(self):
        self.tell_guest("a", "attached")
        rows, unique = self.accounts()
        self.show("show, before the device is registered", self.audit("show"))
        self.assertEqual((list(rows), unique), (["api-only"], PICTURE_PAGES))
        # The kernel holds all of the memory for the device, whether the ledger knows or not; and the firmware.
        self.assertGreaterEqual(self.locked("qemu-system-x86_64"), RAM_PAGES * 4)
        self.assertLess(self.locked("qemu-system-x86_64"), RAM_PAGES * 4 + 4096)
        self.show("register", self.audit("register --pid=$(pidof qemu-system-x86_64)"))
        self.show("show", self.audit("show"))
        self.show("verify", self.audit("verify"))
        rows, unique = self.accounts()
        self.assertEqual(unique, RAM_PAGES)
        self.assertEqual(rows["api-only"]["charged_pages"], PICTURE_PAGES)  # it came first
        self.assertEqual(rows["assigned"]["unique_pages"], RAM_PAGES)
        self.assertEqual(rows["assigned"]["charged_pages"], RAM_PAGES - PICTURE_PAGES)
        self.assertEqual(rows["assigned"]["name"], "qemu-system-x86")
        self.assertEqual(self.locked("mvgpu-backend"), PICTURE_PAGES * 4)

    def explain_a_page_of_both(self):
        self.show("explain", self.audit(f"explain {PICTURE:#x}"))
        (vm,) = json.loads("\n".join(self.audit(f"explain {PICTURE:#x} --json")))["vms"]
        (place,) = vm["places"]
        self.assertEqual([holder["kind"] for holder in place["holders"]], ["api-only", "assigned"])
        self.assertEqual([holder["pays"] for holder in place["holders"]], [True, False])
        ours, qemus = place["mappings"]
        self.assertEqual((ours["first"], ours["last"]), (qemus["first"], qemus["last"]))
        self.assertEqual((place["payer"], place["next_payer"]), (ours["row"], qemus["row"]))

    def charges_follow_the_vgpu(self):
        """The charge goes to QEMU's row when the vgpu lets go; what QEMU pays for, the vgpu does not."""
        self.tell_guest("d", "detached")
        rows, unique = self.accounts()
        self.assertEqual((rows["api-only"]["unique_pages"], unique), (0, RAM_PAGES))
        self.assertEqual(rows["assigned"]["charged_pages"], RAM_PAGES)
        self.assertEqual(self.locked("mvgpu-backend"), 0)
        self.tell_guest("a", "attached")
        rows, unique = self.accounts()
        self.assertEqual((rows["api-only"]["unique_pages"], unique), (PICTURE_PAGES, RAM_PAGES))
        self.assertEqual(rows["api-only"]["charged_pages"], 0)
        self.assertEqual(self.locked("mvgpu-backend"), PICTURE_PAGES * 4)

    def unplug(self):
        """QEMU lets go of everything; the row, of which it knows nothing, is found wrong and taken out."""
        self.ask("device_del", id="nic")
        self.wait_for("DEVICE_DELETED", "/tmp/qmp")
        self.wait_for("VmLck:[^1-9]*0 kB", "/proc/$(pidof qemu-system-x86_64)/status")  # it closes VFIO's files last
        found = self.audit("verify", status=1)
        self.show("verify, after the device was unplugged", found)
        self.assertIn("the kernel counts 0 kB (VmLck); if its devices were unplugged", "\n".join(found))
        self.audit("register --undo --pid=$(pidof qemu-system-x86_64)")
        rows, unique = self.accounts()
        self.assertEqual((list(rows), unique), (["api-only"], PICTURE_PAGES))
        self.assertEqual(rows["api-only"]["charged_pages"], PICTURE_PAGES)
        self.audit("register --pid=$(pidof qemu-system-x86_64)", status=1)  # there is no device

    def kill(self):
        self.run_here("kill -9 $(pidof qemu-system-x86_64)")
        self.wait_for("0 pages mapped, 0 pinned, 0 charged, 0 cached, 0 resources left", "/tmp/backend")
        self.assertEqual(json.loads("\n".join(self.audit("show --json")))["vms"], [])


def main():
    global PROGRAMS, VGPU_GUEST
    PROGRAMS, VGPU_GUEST = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    missing = ready()
    if missing is not None:
        sys.exit(f"assigned_test.py: {missing}; run tests/vm/fetch.sh")
    unittest.main(argv=[sys.argv[0]], verbosity=2)


if __name__ == "__main__":
    main()
