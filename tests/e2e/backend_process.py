"""Runs mvgpu-backend, mvgpu-replay and mvgpu-audit for tests and for the live demo.

    with Backend(BIN, record=True) as backend:
        ...                                  # a VMM connects to backend.socket
        backend.wait_line("the vm is gone")

Everything it writes lies in one temporary folder, which goes when the block is left without an error.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time

NOTHING_LEFT = "0 pages mapped, 0 pinned, 0 charged, 0 cached, 0 resources left"


class BackendError(Exception):
    """The backend did not do what was asked; the message carries its standard error."""


class Backend:
    def __init__(self, programs, folder=None, record=False, options=()):
        self.programs = pathlib.Path(programs)
        self.folder = pathlib.Path(folder or tempfile.mkdtemp(prefix="mvgpu-e2e-"))
        self._keep = folder is not None
        self.socket = self.folder / "gpu.sock"
        self.screenshot = self.folder / "screen.png"
        self.trace = self.folder / "session.mvtrace"
        self.runtime_dir = self.folder / "run"
        self.runtime_dir.mkdir(mode=0o700, exist_ok=True)
        self._command = [self.programs / "mvgpu-backend", f"--socket-path={self.socket}",
                         f"--screenshot={self.screenshot}", f"--runtime-dir={self.runtime_dir}", *options]
        if record:
            self._command.append(f"--record={self.trace}")
        self.lines = []
        self._seen = 0
        self._news = threading.Condition()
        self.process = None

    def __enter__(self):
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_line("waiting for a vmm")
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()
        if kind is None and not self._keep:
            shutil.rmtree(self.folder)

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def wait_line(self, pattern, timeout=20):
        """The next line that matches; lines before it are not looked at again."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                while self._seen < len(self.lines):
                    line = self.lines[self._seen]
                    self._seen += 1
                    if re.search(pattern, line):
                        return line
                left = deadline - time.monotonic()
                if left <= 0 or not self._news.wait(left):
                    raise BackendError(f"no line matches {pattern!r} within {timeout} s; standard error:\n  "
                                       + "\n  ".join(self.lines))

    def take_screenshot(self):
        self.process.send_signal(signal.SIGUSR1)
        self.wait_line("screenshot written")
        return self.screenshot

    def leave(self):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    def open_descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def audit(self):
        """The report of `mvgpu-audit show --json`."""
        done = subprocess.run([self.programs / "mvgpu-audit", "show", "--json",
                               f"--runtime-dir={self.runtime_dir}"],
                              capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def replay(self, trace=None, *options):
        """(exit code, report) of `mvgpu-replay run --json`."""
        done = subprocess.run([self.programs / "mvgpu-replay", "run", "--json", trace or self.trace, *options],
                              capture_output=True, text=True, check=False)
        if not done.stdout:
            raise BackendError(f"mvgpu-replay: {done.stderr.strip()}")
        return done.returncode, json.loads(done.stdout)

    def locked_kilobytes(self):
        """VmLck of the backend: what the kernel says it has locked."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"^VmLck:\s+(\d+) kB", status, re.M).group(1))
