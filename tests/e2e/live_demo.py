#!/usr/bin/env python3
"""The live part of backend/demo.sh --vm: QEMU and a Debian guest draw through mvgpu-backend.

    live_demo.py PROGRAMS OUTPUT     PROGRAMS: folder with mvgpu-backend, OUTPUT: folder for what is written
"""

import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vm"))

from backend_process import Backend  # noqa: E402
from guest import Guest  # noqa: E402


def main():
    programs, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    with Backend(programs, folder=output, record=True) as backend:
        with Guest(kernel="6.12", device="vfio-user", socket=str(backend.socket),
                   log=str(output / "guest.log")) as guest:
            print(f"  QEMU boots Linux 6.12 (serial log: {output / 'guest.log'}) ...", flush=True)
            guest.start()
            guest.wait_marker("pattern up", 120)
            print(f"  driver {guest.value('driver')}, modetest shows its pattern after "
                  f"{guest.timings['pattern up']:.1f} s")
            time.sleep(0.5)  # the driver does not wait for its last flush
            print(f"  SIGUSR1: picture written to {backend.take_screenshot()}")
            print("  mvgpu-audit show:", flush=True)
            subprocess.run([programs / "mvgpu-audit", "show", f"--runtime-dir={backend.runtime_dir}"], check=True)
            guest.kill()  # with the pattern on the screen: the trace ends with it
        print("  " + backend.wait_line("the vm is gone").removeprefix("mvgpu-backend: "))
        backend.leave()


if __name__ == "__main__":
    main()
