#!/usr/bin/env python3
"""Runs one test guest under QEMU: a Debian kernel, tests/vm/init, one virtio-gpu.

    with Guest(kernel="6.12", device="vfio-user", socket="/run/x/gpu.sock") as guest:
        guest.start()
        guest.wait_marker("pattern up", timeout=60)
        assert guest.value("driver") == "virtio_gpu"
        guest.send("reboot")                      # commands: see tests/vm/init
        guest.wait_marker("pattern up", timeout=60)
        guest.quit()

Every wait has a time limit, and its error carries the ends of the serial log and of QEMU's
stderr. QEMU dies with the `with` block, and with this process. Not thread-safe.
"""

import argparse
import collections
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
KERNELS = ("6.1", "6.12")
TASKS = ("pattern", "redraw", "probe", "shell", "program", "host")
PREFIX = "MVGPU-GUEST: "
TAIL_LINES = 40
PR_SET_PDEATHSIG = 1


class GuestError(Exception):
    """A guest did not do what was asked; the message carries both logs' ends."""


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(os.environ.get("MVGPU_CACHE") or os.path.join(base, "mvgpu"))


def qemu_program():
    """The QEMU to run: MVGPU_QEMU, or the one that fetch.sh chose."""
    return os.environ.get("MVGPU_QEMU") or str(cache_folder() / "qemu" / "run")


def ready():
    """None if guests can run here, else one line that says what is missing."""
    check = subprocess.run([HERE / "fetch.sh", "--check"], capture_output=True, text=True, check=False)
    return None if check.returncode == 0 else check.stderr.strip()


def die_with_parent(parent):
    """A preexec_fn: the child is killed when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


class Lines:
    """The lines of one stream, gathered by a thread of its own; safe to read from others."""

    def __init__(self, stream, log, echo):
        self.lines = []  # (time.monotonic(), text)
        self.changed = threading.Condition()
        self.closed = False
        self._log = log
        self._echo = echo
        self._thread = threading.Thread(target=self._gather, args=(stream,), daemon=True)
        self._thread.start()

    def _gather(self, stream):
        with stream, self._log:
            for raw in stream:
                text = raw.decode("utf-8", "replace").rstrip("\r\n").replace("\r", "")
                self._log.write(text + "\n")
                self._log.flush()
                if self._echo:
                    print(text, flush=True)
                with self.changed:
                    self.lines.append((time.monotonic(), text))
                    self.changed.notify_all()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def tail(self, count=TAIL_LINES):
        with self.changed:
            return [text for _, text in self.lines[-count:]]

    def join(self, timeout):
        self._thread.join(timeout)


class Guest:
    """One QEMU and its guest.

    kernel   6.1 or 6.12
    memory   QEMU size; a shared memfd, or with shared=False QEMU's own private memory (plain -m)
    device   vfio-user (needs socket=), virtio-gpu (QEMU's own), or none
    task     pattern, redraw, probe or shell; append= adds words to the kernel line
    program  a file to run in the guest, with append="mvgpu.argument=WORD"; sets the task
    host     files that lie in the guest's /host beside a QEMU; programs, in its /host/bin; sets the task
    extra    more QEMU arguments; properties= more properties of the device
    log      file for the serial lines (default: a temporary one); QEMU's stderr goes to LOG.qemu
    """

    def __init__(self, kernel="6.12", memory="512M", device="vfio-user", socket=None, task="pattern",
                 extra=(), append="", properties=None, log=None, echo=False, cpu="qemu64", smp=1,
                 shared=True, program=None, host=()):
        if program:
            task = "program"
        if host:
            task = "host"
        if kernel not in KERNELS:
            raise GuestError(f"kernel {kernel!r}: not one of {', '.join(KERNELS)}")
        if task not in TASKS:
            raise GuestError(f"task {task!r}: not one of {', '.join(TASKS)}")
        if device == "vfio-user" and not socket:
            raise GuestError("device vfio-user: needs socket=PATH, the backend's socket")
        self.kernel, self.memory, self.device, self.task = kernel, memory, device, task
        self.socket, self.extra, self.append, self.echo = socket, list(extra), append, echo
        self.cpu, self.smp, self.shared, self.program, self.host = cpu, smp, shared, program, host
        self._image = str(cache_folder() / "guest" / kernel / "initramfs.gz")
        self.properties = dict(properties or {})
        self._temp = None
        if log is None:
            self._temp = tempfile.mkdtemp(prefix="mvgpu-guest-")
            log = os.path.join(self._temp, "serial.log")
        self.log = str(log)
        self.timings = {}  # line that a wait matched, without PREFIX -> seconds since start(), first time
        self.matched_at = None  # the same for the latest match, for what comes again after a reboot
        self.process = None
        self._read_from = 0
        self._serial = self._stderr = self._console = self._qmp = None

    # --- life ---------------------------------------------------------------------------

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.kill()
        if self._temp and kind is None:
            shutil.rmtree(self._temp, ignore_errors=True)

    def start(self):
        """Starts QEMU; returns when its monitor answers, so the device has been realized."""
        if self.process:
            raise GuestError("start: this guest has run already; make a new Guest for the next QEMU")
        self._build_image()
        console, console_far = socket.socketpair()
        monitor, monitor_far = socket.socketpair()
        with console_far, monitor_far:
            command = self.command_line(console_far.fileno(), monitor_far.fileno())
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(console_far.fileno(), monitor_far.fileno()),
                preexec_fn=die_with_parent(os.getpid()))
        self._console = console
        self._serial = Lines(console.makefile("rb"), open(self.log, "w", encoding="utf-8"), self.echo)
        self._stderr = Lines(self.process.stdout, open(self.log + ".qemu", "w", encoding="utf-8"), self.echo)
        self._qmp = Monitor(monitor, self)
        self._qmp.greet(timeout=30)
        if self.host:
            os.unlink(self._image)  # 100 MB, which QEMU has read
        self.timings["realized"] = round(time.monotonic() - self.started, 3)
        return self

    @property
    def pid(self):
        return self.process.pid

    def running(self):
        return self.process is not None and self.process.poll() is None

    def wait(self, timeout=30):
        """Waits until QEMU has ended; returns its exit status (negative: a signal)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"QEMU still runs after {timeout} s") from None
        self._close()
        return status

    def quit(self, timeout=30):
        """Asks the guest to power off; QEMU must then end with status 0."""
        self.send("quit")
        status = self.wait(timeout)
        if status != 0:
            raise self.error(f"QEMU ended with status {status} after `quit`, not 0")

    def kill(self):
        """kill -9; does nothing if QEMU has ended."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._close()

    def _close(self):
        for lines in (self._serial, self._stderr):
            if lines:
                lines.join(5)
        for end in (self._console, self._qmp):
            if end:
                end.close()

    # --- the guest ----------------------------------------------------------------------

    def send(self, line):
        """One command line for tests/vm/init."""
        try:
            self._console.sendall(line.encode() + b"\n")
        except OSError as problem:
            raise self.error(f"cannot send {line!r} to the guest: {problem}") from None

    def wait_marker(self, pattern, timeout=60):
        """Waits for a marker line that the regex finds, after the last one waited for.

        Returns the match; the time since start() goes to timings[<what matched>].
        """
        return self._wait_line(re.compile(re.escape(PREFIX) + ".*?" + f"(?:{pattern})"), pattern, timeout)

    def wait_line(self, pattern, timeout=60):
        """As wait_marker, for any line of the console (kernel messages too)."""
        return self._wait_line(re.compile(pattern), pattern, timeout)

    def _wait_line(self, regex, shown, timeout):
        deadline = time.monotonic() + timeout
        serial = self._serial
        with serial.changed:
            while True:
                while self._read_from < len(serial.lines):
                    at, text = serial.lines[self._read_from]
                    self._read_from += 1
                    match = regex.search(text)
                    if match:
                        self.matched_at = round(at - self.started, 3)
                        self.timings.setdefault(text.removeprefix(PREFIX), self.matched_at)
                        return match
                left = deadline - time.monotonic()
                if serial.closed or left <= 0:
                    break
                serial.changed.wait(left)
        why = "the guest's console has closed" if serial.closed else f"not seen in {timeout} s"
        raise self.error(f"waiting for {shown!r}: {why}")

    def values(self, key):
        """All values so far of the markers `key=value`, oldest first."""
        start = PREFIX + key + "="
        with self._serial.changed:
            return [text[len(start):] for _, text in self._serial.lines if text.startswith(start)]

    def value(self, key):
        """The latest value of the marker `key=value`, or None."""
        return (self.values(key) or [None])[-1]

    def markers(self):
        """{key: [values]} of all markers so far."""
        found = collections.defaultdict(list)
        for text in self.serial():
            key, equals, value = text.removeprefix(PREFIX).partition("=")
            if text.startswith(PREFIX) and equals:
                found[key].append(value)
        return dict(found)

    def serial(self):
        with self._serial.changed:
            return [text for _, text in self._serial.lines]

    def run(self, command, timeout=30):
        """Runs a shell command in the guest (its prompt must be free); returns (status, lines)."""
        with self._serial.changed:
            begin = self._read_from = len(self._serial.lines)
        self.send("run " + command)
        match = self.wait_marker(r"exit=(\d+)", timeout)
        return int(match.group(1)), self.serial()[begin:self._read_from - 1]

    # --- QEMU ---------------------------------------------------------------------------

    def qmp(self, command, timeout=30, **arguments):
        """A QMP command (`_` in names of arguments becomes `-`); returns its `return`."""
        return self._qmp.ask(command, {key.replace("_", "-"): value for key, value in arguments.items()}, timeout)

    def screendump(self, path):
        """Writes what QEMU's own display shows as PPM, or as PNG if PATH ends so."""
        path = str(pathlib.Path(path).resolve())
        self.qmp("screendump", filename=path, format="png" if path.endswith(".png") else "ppm")
        return path

    def command_line(self, serial_fd, monitor_fd):
        cache = cache_folder()
        line = [qemu_program(), "-name", "mvgpu-guest", "-nodefaults", "-no-user-config", "-display", "none",
                "-vga", "none", "-nic", "none", "-accel", "tcg", "-cpu", self.cpu, "-smp", str(self.smp),
                *self._memory_arguments(),
                "-chardev", f"socket,id=serial,fd={serial_fd}", "-serial", "chardev:serial",
                "-chardev", f"socket,id=monitor,fd={monitor_fd}", "-qmp", "chardev:monitor",
                "-kernel", str(cache / "kernels" / self.kernel / "vmlinuz"),
                "-initrd", self._image,
                "-append", f"console=ttyS0 quiet panic=-1 no_timer_check mvgpu.task={self.task} {self.append}".strip()]
        return line + self._device_arguments() + self.extra

    def _memory_arguments(self):
        if not self.shared:
            return ["-machine", "q35", "-m", self.memory]
        return ["-machine", "q35,memory-backend=m", "-m", self.memory,
                "-object", f"memory-backend-memfd,id=m,size={self.memory},share=on"]

    def _device_arguments(self):
        if self.device == "none":
            return []
        if self.device == "vfio-user":
            device = {"driver": "vfio-user-pci", "id": "gpu",
                      "socket": {"type": "unix", "path": str(pathlib.Path(self.socket).absolute())}}
        elif self.device == "virtio-gpu":
            device = {"driver": "virtio-gpu-pci", "id": "gpu"}
        else:
            raise GuestError(f"device {self.device!r}: not vfio-user, virtio-gpu or none")
        device.update(self.properties)
        return ["-device", json.dumps(device)]

    def _build_image(self):
        command = [HERE / "build_initramfs.sh", self.kernel]
        if self.program:
            command[1:1] = ["--program", str(self.program)]
        if self.host:
            self._image = self.log + ".image"
            command[1:] = ["--host", self._image, self.kernel, *(str(file) for file in self.host)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0 or not os.access(qemu_program(), os.X_OK):
            raise GuestError(f"guest {self.kernel}: {built.stderr.strip() or qemu_program() + ' is missing'}; "
                             "run tests/vm/fetch.sh")
        if self.program:
            self._image = built.stdout.strip()

    def error(self, text):
        """A GuestError with the ends of both logs."""
        status = None if self.process is None else self.process.poll()
        state = "QEMU runs" if status is None else f"QEMU ended with status {status}"
        if status is not None and self._stderr:
            self._stderr.join(1)
        parts = [f"guest {self.kernel}, {self.device}, {self.task}: {text} ({state}; logs: {self.log}, {self.log}.qemu)"]
        for name, lines in (("serial", self._serial), ("QEMU", self._stderr)):
            if lines:
                parts.append(f"--- last lines of {name}")
                parts += lines.tail()
        return GuestError("\n".join(parts))


class Monitor:
    """The QMP side of one QEMU; events are kept in `events`."""

    def __init__(self, end, guest):
        self._end = end
        self._guest = guest
        self._pending = b""
        self.events = []

    def close(self):
        self._end.close()

    def greet(self, timeout):
        self._receive(lambda message: "QMP" in message, "greeting", timeout)
        self.ask("qmp_capabilities", {}, timeout)

    def ask(self, command, arguments, timeout):
        request = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            self._end.sendall(json.dumps(request).encode() + b"\n")
        except OSError as problem:
            raise self._guest.error(f"QMP {command}: {problem}") from None
        answer = self._receive(lambda message: "return" in message or "error" in message, command, timeout)
        if "error" in answer:
            raise self._guest.error(f"QMP {command} {arguments}: {answer['error'].get('desc')}")
        return answer["return"]

    def _receive(self, wanted, shown, timeout):
        deadline = time.monotonic() + timeout
        while True:
            line, newline, rest = self._pending.partition(b"\n")
            if newline:
                self._pending = rest
                message = json.loads(line)
                if wanted(message):
                    return message
                self.events.append(message)
                continue
            self._pending += self._read(shown, deadline, timeout)

    def _read(self, shown, deadline, timeout):
        self._end.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            data = self._end.recv(65536)
        except TimeoutError:
            raise self._guest.error(f"QMP {shown}: no answer in {timeout} s") from None
        except ConnectionError:
            data = b""
        except OSError as problem:
            raise self._guest.error(f"QMP {shown}: {problem}") from None
        if not data:
            try:
                self._guest.process.wait(5)  # the error shall name its exit status
            except subprocess.TimeoutExpired:
                pass
            raise self._guest.error(f"QMP {shown}: QEMU has closed its monitor")
        return data


# --- command line ---------------------------------------------------------------------------

END_MARKER = {"pattern": r"pattern (up|failed)", "redraw": "redraw done", "probe": "powering off", "shell": "shell"}


def parse(arguments):
    parser = argparse.ArgumentParser(description="Runs one test guest; prints its facts and times as JSON.")
    parser.add_argument("--kernel", choices=KERNELS, default="6.12")
    parser.add_argument("--memory", default="512M", help="guest memory, a shared memfd (default %(default)s)")
    parser.add_argument("--device", choices=("vfio-user", "virtio-gpu", "none"), default="virtio-gpu")
    parser.add_argument("--socket", help="the backend's socket, for --device vfio-user")
    parser.add_argument("--task", choices=TASKS, default="pattern")
    parser.add_argument("--append", default="", help="more words for the kernel line, as mvgpu.mode=1280x800")
    parser.add_argument("--screendump", metavar="FILE", help="QEMU's own picture when the task is done: .ppm or .png")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until the task must be done")
    parser.add_argument("--log", help="keep the serial lines here, QEMU's stderr in LOG.qemu")
    parser.add_argument("--quiet", action="store_true", help="do not show the console")
    parser.add_argument("--interactive", action="store_true", help="then pass lines of stdin to the guest until it ends")
    parser.add_argument("extra", nargs="*", help="more QEMU arguments, after --")
    return parser.parse_args(arguments)


def converse(guest):
    """Passes stdin to the guest until QEMU ends."""
    def pump():
        for line in sys.stdin:
            guest.send(line.rstrip("\n"))
    threading.Thread(target=pump, daemon=True).start()
    guest.wait(timeout=None)


def main():
    options = parse(sys.argv[1:])
    try:
        with Guest(options.kernel, options.memory, options.device, options.socket, options.task,
                   extra=options.extra, append=options.append, log=options.log, echo=not options.quiet) as guest:
            guest.start()
            guest.wait_marker(END_MARKER[options.task], options.timeout)
            if options.screendump:
                guest.screendump(options.screendump)
            if options.interactive or options.task == "shell":
                converse(guest)
            elif options.task == "probe":
                guest.wait()
            else:
                guest.quit()
            facts = {key: values[-1] if len(values) == 1 else values for key, values in guest.markers().items()}
            print(json.dumps({"timings": guest.timings, "seconds": round(time.monotonic() - guest.started, 3),
                              "markers": facts}, indent=2))
            return 0 if "failed" not in guest.values("result") else 1
    except GuestError as problem:
        print(f"guest.py: error: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
