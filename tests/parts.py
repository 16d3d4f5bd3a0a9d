# SPDX-License-Identifier: MIT
"""Run all tests in parts side by side, each with a share of the files; the arguments are pytest's command.

Each part has processes, a network and an /etc of its own, where the tests' users are. Where such namespaces cannot be
made, the command is run once, as it is.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import mta
from sendmail import Sendmail

PARTS = 3  # on two processors, too: a test mostly waits
OWN = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", """
mount -t tmpfs -o mode=755 tmpfs "$0"
cp -a /etc "$0"
mount --bind "$0/etc" /etc
ip link set lo up
ip link add mst0 type veth peer name mst1  # for clients that dial the host's address, or a link-local one
ip address add 198.18.0.1/32 dev mst0
ip link set mst0 up
ip link set mst1 up
"$@" || exit
"""]


class Part:
    """One of the parts: its output is kept, and of its progress the dots are shown."""

    def __init__(self, command: list[str]) -> None:
        self.output = b""
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Read to the end of its output."""
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            self.output += data
            print(data.decode() if not data.strip(b".s") else "", end="", flush=True)


def run(command: list[str]) -> int:
    """Run the parts, show whole what failed, then what was skipped and the sum; give the exit status."""
    by_size = sorted(pathlib.Path("tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)  # so by time
    began, parts, counts = time.monotonic(), [], collections.Counter()
    try:
        for number in range(PARTS):
            parts.append(Part([*command, *map(str, by_size[number::PARTS])]))
        statuses = [abs(part.process.wait()) for part in parts]
    finally:
        for part in parts:
            if part.process.poll() is None:
                os.killpg(part.process.pid, signal.SIGTERM)  # which for pytest is an interrupt
        for part in parts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.process.wait(60)
            part.process.kill()  # and with it the first process of its namespace, and so all
    for part, status in zip(parts, statuses):
        part.reader.join()
        text = part.output.decode(errors="replace")
        for number, what in re.findall(r"(\d+) ([a-z]+)(?=,| in )", text.rstrip().rpartition("\n")[2]):
            counts[what] += int(number)
        print("\n" + (text if status else "\n".join(re.findall("^SKIPPED .*", text, re.M))), end="")
    sums = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"\n{sums} in {time.monotonic() - began:.2f}s")
    return max(statuses)


if __name__ == "__main__":
    mta.leave_chroot()
    for caught in signal.SIGINT, signal.SIGTERM:
        signal.signal(caught, lambda number, frame: (signal.signal(number, signal.SIG_IGN), sys.exit(128 + number)))
    Sendmail.missing()  # fetches its packages now: in the parts there is no way out
    with tempfile.TemporaryDirectory(prefix="milter-test.") as directory:
        tried = subprocess.run([*OWN, directory, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            sys.exit(run([*OWN, directory, *sys.argv[1:]]))
    print("The tests run one after the other here, not in parts:", tried.stderr.strip(), flush=True)
    os.execv(sys.argv[1], sys.argv[1:])
