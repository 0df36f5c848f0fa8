#!/usr/bin/env python3
"""A device that does DMA goes to the addresses that the cache returns, and the kernel counts what the ledger says, in
a guest with QEMU's edu device.

    dma_test.py PROGRAM TEST...     PROGRAM: dma_proof

The guest's kernel is the host here: it has VFIO type1 and an (emulated) Intel IOMMU, or no IOMMU at all.
"""

import pathlib
import re
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

    def assert_said(self, facts, checks):
        """These have been checked, and were true."""
        for check in checks:
            self.assertIn(check, facts["ok"])

    def assert_revoked(self, facts, what):
        self.assert_said(facts, [f"{what}: {fact}" for fact in (
            "before, the mapping is valid", "all of it was unmapped", "the user was told, once",
            "the mapping is not valid any more", "nothing is read through it",
            "a new use says that nothing is mapped")])

    def assert_out_of_reach(self, facts, what):
        for fact in ("a write at device 0x[0-9a-f]+ changes no byte of the guest",
                     "a read at device 0x[0-9a-f]+ brings nothing", "nothing else has changed",
                     "the kernel logged the fault at 0x[0-9a-f]+"):
            found = [check for check in facts["ok"] if re.fullmatch(f"{what}: {fact}", check)]
            self.assertEqual(len(found), 1, (what, fact))

    def test_iommu(self):
        facts = self.prove("iommu", ["-device", "intel-iommu", *EDU], "intel_iommu=on")
        self.assertIn("DMA Write", facts["fault"][0])
        self.assert_revoked(facts, "revoked")
        self.assert_out_of_reach(facts, "revoked")
        self.assert_said(facts, ["what was not revoked is reached", "memory that came back is reached"])
        self.assert_out_of_reach(facts, "came back elsewhere")
        # At the addresses of a device that is assigned to the same VM. type1 counts its 40 pages, mlock 16 of the
        # cache's and later one.
        self.assert_revoked(facts, "shared")
        self.assert_out_of_reach(facts, "shared")
        self.assert_said(facts, [f"shared: {step}: VmLck is {pages} of {pages} pages" for step, pages in (
            ("nothing is used", 40), ("16 are used", 56), ("16 are gone", 24), ("one is used again", 41))])
        self.assert_said(facts, ["shared: nobody uses the addresses any more",
                                 "shared: memory that came back has the guest's address",
                                 "shared: memory that came back is reached"])
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
        self.assert_revoked(facts, "physical")
        self.assert_revoked(facts, "physical, other memory")
        self.assert_said(facts, [
            f"physical: {step}: VmPin is {pages} of {pages} pages, the domain says {pages}" for step, pages in (
                ("32 are used", 32), ("16 are revoked", 16), ("none is used", 0), ("other memory is revoked", 0),
                ("16 are used again", 16))])
        self.assert_said(facts, ["physical: what was not revoked is reached",
                                 "physical: other memory is reached, and no byte of what was there before",
                                 "physical: memory that came back is reached", "nothing is pinned any more"])


def main():
    global PROGRAM
    PROGRAM = pathlib.Path(sys.argv[1]).resolve()
    missing = ready()
    if missing is not None:
        sys.exit(f"dma_test.py: {missing}; run tests/vm/fetch.sh")
    unittest.main(argv=[sys.argv[0], *(f"DmaTest.{name}" for name in sys.argv[2:])], verbosity=2)


if __name__ == "__main__":
    main()
