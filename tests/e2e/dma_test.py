#!/usr/bin/env python3
"""A device that does DMA goes to the addresses that the cache returns, and the kernel counts what the ledger says, in
a guest with QEMU's edu device.

    dma_test.py PROGRAM TEST...     PROGRAM: dma_proof

The guest's kernel is the host here: it has VFIO type1 and an (emulated) Intel IOMMU, or no IOMMU at all.
"""

import pathlib
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vm"))

from guest import Guest, ready  # noqa: E402

PROGRAM = pathlib.Path()
# All addresses: without it the device counts to 2^28.
EDU = ["-device", "edu,dma_mask=0xffffffffffffffff"]


class DmaTest(unittest.TestCase):
    def prove(self, mode, devices, append=""):
        """Runs the program in a guest; its facts, after all its checks have held."""
        with Guest(kernel="6.12", memory="1G", device="none", program=PROGRAM, extra=devices,
                   append=f"mvgpu.argument={mode} {append}") as guest:
            guest.start()
            guest.wait_marker("exit=", 120)
            self.assertEqual(guest.wait(), 0)
            facts = guest.markers()
            self.assertEqual(facts.get("failed", []), [], "\n".join(guest.serial()))
            self.assertEqual(facts["exit"], ["0"], "\n".join(guest.serial()))
            self.assertEqual(facts["checks"], [str(len(facts["ok"]))])
            for key, values in facts.items():
                print(key, *values, sep="\n  ")
            return facts

    def test_iommu(self):
        facts = self.prove("iommu", ["-device", "intel-iommu", *EDU], "intel_iommu=on")
        self.assertIn("DMA Write", facts["fault"][0])
        self.assertTrue(any("revoked" in check for check in facts["ok"]))
        # 8 pages, locked by the pin and counted again by type1.
        self.assertEqual(facts["locked-pages-of-8-pinned-and-mapped"], ["16"])

    def test_accounts(self):
        facts = self.prove("accounts", ["-device", "intel-iommu", *EDU], "intel_iommu=on")
        mib = 1 << 20

        def counted(scenario, step):
            """VmLck after a step, as the guest said it."""
            found = [line for line in facts["account"] if line.startswith(f"{scenario}: {step}: process of vgpu: ")]
            self.assertEqual(len(found), 1, f"{scenario}: {step}")
            return int(found[0].split("VmLck ")[1].split()[0]) // mib

        steps = ["1 MiB is pinned", "a device is assigned", "the same at a second iova", "the second iova goes",
                 "the pin is released", "1 MiB is pinned again", "the device is detached", "the device is unplugged"]
        # Locked and mapped, a page counts once; without the hand-over the kernel counts both.
        self.assertEqual([counted("deduplicated", step) for step in steps], [1, 16, 32, 16, 16, 16, 1, 1])
        self.assertEqual([counted("plain", step) for step in steps], [1, 17, 33, 17, 16, 17, 1, 1])
        # What cannot be avoided: type1 counts each mapping of a page.
        self.assertEqual(len(facts["counted-again"]), 2)
        for line in facts["counted-again"]:
            self.assertIn(f"edu: {16 * mib} bytes", line)
        self.assertIn("RLIMIT_MEMLOCK is 8388608", facts["refused"][0])

    def test_physical(self):
        facts = self.prove("physical", EDU)
        self.assertEqual(sum("bytes from iova" in check for check in facts["ok"]), 5)


def main():
    global PROGRAM
    PROGRAM = pathlib.Path(sys.argv[1]).resolve()
    missing = ready()
    if missing is not None:
        sys.exit(f"dma_test.py: {missing}; run tests/vm/fetch.sh")
    unittest.main(argv=[sys.argv[0], *(f"DmaTest.{name}" for name in sys.argv[2:])], verbosity=2)


if __name__ == "__main__":
    main()
