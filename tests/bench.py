#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Measure what it costs to name a sender, next to what else there is, in one run; it reports and judges nothing.

    /usr/bin/python3 -B tests/bench.py [--quick] [SECTION...]

    lookups     one lookup, beside 0, 1,000 and 5,000 unrelated processes
    sockets     one lookup, beside 0, 1,000 and 10,000 unrelated sockets
    throughput  messages a second through Postfix to a discard transport, 10 and 100 connections at once
    steps       what is said between MTA and milter for one message
    memory      milter and helper before and after 100,000 messages

As root, in about 15 minutes; with --quick smaller and shorter, in about three. Everything else on the machine counts,
so compare within a run. What is compared takes turns, so that a disturbance meets all. It needs what tests/run
installs; the rule for sudo, the users' processes and the mail servers it makes are gone when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import operator
import os
import pathlib
import pwd
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional

import psutil

import mta

SENDER, STRANGER = "daemon", "nobody"  # users that every Debian has
LSOF = "/usr/bin/lsof"
SUDOERS = pathlib.Path("/etc/sudoers.d/milter-sysuser-bench")
BARE_RULE = "Cmnd_Alias MILTER_BENCH_BARE = /usr/bin/lsof ^-p [0-9]+$\nDefaults!MILTER_BENCH_BARE !syslog, " \
            "!pam_session, !use_pty, !requiretty\npostfix ALL = (root) NOPASSWD: MILTER_BENCH_BARE\n"

# Forks processes that have descriptors open and do nothing, until its standard input ends.
CROWD = r'''
import gc, os, resource, sys
processes, descriptors, uid = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
gc.disable()
gc.freeze()
kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(descriptors - 3)]  # and the standard three
made = 0
try:
    for made in range(1, processes + 1):
        if os.fork() == 0:
            os.read(0, 1)
            os._exit(0)
except OSError as error:
    made -= 1
    sys.stderr.write("a crowd of %d only: %s\n" % (made, error))
print(made, flush=True)
os.read(0, 1)
while made:
    os.wait()
    made -= 1
'''

# Holds connections to itself, both ends, until its standard input ends.
SOCKETS = r'''
import os, resource, socket, struct, sys
sockets, _, uid = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
listener = socket.create_server(("127.0.0.1", 0), backlog=16)
kept = []
for _ in range(sockets // 2):
    kept += [socket.create_connection(listener.getsockname()), listener.accept()[0]]
    for one in kept[-2:]:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves no TIME_WAIT behind
print(len(kept), flush=True)
os.read(0, 1)
os._exit(0)
'''

# A client that has connected and sent something, until its standard input ends.
CLIENT = r'''
import os, socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.send(b"x")
print(connection.getsockname()[1], flush=True)
os.read(0, 1)
'''

# The way through sudo, as whoever runs this: a milter that was started under postfix's uid.
BY_LSOF = r'''
import json, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import milter_sysuser as m
uid, inode, pid, rounds = map(int, sys.argv[2:6])
command = json.loads(sys.argv[6])
m.lsof_command = command
describer, owner = m.Describer(None, True, m.Workers(1, 1)), m.Owner(uid, "", inode)
samples = {"ours": [], "bare": []}
for _ in range(rounds):
    began = time.perf_counter()
    question = describer.ask(owner)
    facts = describer.wait(question)
    describer.forget(question)
    samples["ours"].append(time.perf_counter() - began)
    began = time.perf_counter()
    bare = subprocess.run(command + ["-p", str(pid)], stdin=subprocess.DEVNULL, capture_output=True)
    samples["bare"].append(time.perf_counter() - began)
print(json.dumps({**samples, "ok": [facts.get("pid") == pid or facts.get("why"), b"TCP" in bare.stdout]}))
'''

# What the milter is compared with: the least that adds a header.
NULL = r'''
import os, sys
import Milter
class Null(Milter.Base):
    def eom(self):
        self.addheader("X-Sender-Process-Info", "user=nobody program=null")
        return Milter.CONTINUE
os.umask(0)
Milter.factory = Null
Milter.set_flags(Milter.ADDHDRS)
Milter.runmilter("null", "unix:" + sys.argv[1], 600)
'''

# And the way of the script of 2013: everyone's sockets listed by lsof, the client's port looked for.
ORIGINAL = NULL.replace("    def eom", r'''    def connect(self, name, family, address):
        import pwd, subprocess
        lines = subprocess.run(["lsof", "-nPi"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
        for line in lines.splitlines():
            if ":%d->" % address[1] in line:
                self.found = "user=%s program=%s" % (line.split()[2], line.split()[0])
        return Milter.CONTINUE
    def eom''').replace('"user=nobody program=null"', 'getattr(self, "found", "user=? program=?")')


# --- what all sections use ------------------------------------------------------------------------------------

def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], notes: Iterable[str] = ()) -> None:
    """Print a table, its first column to the left."""
    lines = [[str(cell) for cell in row] for row in ([("", *columns)] + [tuple(row) for row in rows])]
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    print(f"\n{title}\n")
    for line in lines:
        print("  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip())
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


def number(value: Any) -> str:
    """Write a number with three digits that count; a word as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@contextlib.contextmanager
def running(code: str, *arguments: Any, user: Optional[str] = None, cgroup: Optional[pathlib.Path] = None
            ) -> Iterator[tuple[int, int]]:
    """Run a snippet that prints a number and then waits for the end of its input; give its pid and the number."""
    begin = "import os; os.read(0, 1)\n"  # when it is where it belongs: a socket keeps the cgroup it was made in
    with subprocess.Popen([mta.PYTHON, "-c", begin + code, *map(str, arguments)], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, start_new_session=True,  # an interrupt is for us alone
                          **(mta.identity(user) if user else {})) as process:
        if cgroup:
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(60)


@contextlib.contextmanager
def own_cgroup(name: str) -> Iterator[Optional[pathlib.Path]]:
    """Make a cgroup of version 2 and remove it afterwards; None where that cannot be."""
    root = mta.cgroup_v2()
    if root is None:
        yield None
        return
    path = root / f"milter-bench-{os.getpid()}-{name}"
    try:
        path.mkdir()
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        mta.wait_for(lambda: not (path / "cgroup.procs").read_text(), 60, f"{path} to be empty")
        path.rmdir()


@functools.lru_cache
def script(directory: str) -> Any:
    """Import the milter from a directory that other users can read."""
    path = pathlib.Path(directory) / "milter_sysuser.py"
    spec = importlib.util.spec_from_file_location("milter_sysuser", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["milter_sysuser"] = module
    spec.loader.exec_module(module)
    return module


# --- one lookup -----------------------------------------------------------------------------------------------

class Client(NamedTuple):
    """A process with a connection to us."""

    pid: int
    near: Any  # its end, as the milter has it
    far: Any
    owner: Any


@contextlib.contextmanager
def client(m: Any, cgroup: Optional[pathlib.Path] = None) -> Iterator[Client]:
    """Have the sender connect."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with running(CLIENT, port, user=SENDER, cgroup=cgroup) as (pid, own), listener.accept()[0] as accepted:
            accepted.recv(1)
            near, far = m.endpoint("127.0.0.1", own), m.endpoint("127.0.0.1", port)
            yield Client(pid, near, far, m.find_owner(near, far))


def measure(rows: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Call the rows in turn, each for so many seconds or 300 times; give medians in us, or the word of a failure.

    A row returns True if it found the right process; what else it returns is why not.
    """
    samples: dict[str, list[float]] = {name: [] for name in rows}
    failed: dict[str, str] = {}
    for round_ in range(-1, 300):  # the first round is to warm up
        for name, call in rows.items():
            if name not in failed and (round_ < 3 or sum(samples[name]) < seconds):
                began = time.perf_counter()
                answer = call()
                samples[name] += [time.perf_counter() - began] * (round_ >= 0)
                if answer is not True:
                    failed[name] = str(answer or "not-found")
    return {**{name: statistics.median(values) * 1e6 for name, values in samples.items() if values}, **failed}


def holds(facts: dict, sender: Client) -> Any:
    """Tell whether the right process was found; if not, why not."""
    return facts.get("pid") == sender.pid or facts.get("why", "another")


def by_psutil(sender: Client) -> bool:
    """Find the holder as everything does that rests on psutil."""
    return any(c.pid == sender.pid for c in psutil.net_connections("tcp")
               if c.laddr.port == sender.near.port and c.raddr and c.raddr.port == sender.far.port)


def by_output(command: list[str], sender: Client, pattern: str) -> bool:
    """Find the holder in the output of a command, by the client's port."""
    output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout
    return bool(re.search(pattern % {"pid": sender.pid, "port": sender.near.port}, output))


def by_sudo(m: Any, directory: str, sender: Client, rounds: int) -> dict[str, Any]:
    """Measure the way through sudo and lsof as postfix, next to sudo and lsof alone; without a rule, as root."""
    ruled = SUDOERS.exists()
    names = ["through lsof, as root", "bare: lsof -p PID"]
    if ruled:
        names = ["through sudo lsof", "bare: sudo -n lsof -p PID"]
    arguments = [directory, sender.owner.uid, sender.owner.inode, sender.pid, rounds,
                 json.dumps(["sudo", "-n", LSOF] if ruled else [LSOF])]
    run = mta.run_as("postfix" if ruled else "root", [mta.PYTHON, "-Bc", BY_LSOF, *map(str, arguments)], timeout=300)
    if run.returncode:
        sys.stderr.write(run.stderr)
        return dict.fromkeys(names, "error")
    result = json.loads(run.stdout)
    return {name: statistics.median(values) * 1e6 if ok is True else ok or "not-found"
            for name, values, ok in zip(names, (result["ours"], result["bare"]), result["ok"])}


def lookups(m: Any, directory: str, seconds: float, crowded: bool) -> dict[str, Any]:
    """Measure every way of looking up at this moment; crowded: the cases that depend on processes, too."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(own_cgroup("sender"))
        sender = stack.enter_context(client(m, own))
        neighbour = stack.enter_context(client(m))  # where the crowd is

        def find(one: Client, fresh: bool) -> Callable[[], Any]:
            finder = m.Finder(m.header_fields + m.log_fields)

            def call() -> Any:
                finder.hot.clear()  # who has used up his budget is not made to wait here
                if fresh:
                    finder.recent.clear()
                owner = m.find_owner(one.near, one.far)
                return holds(finder.answer(owner.uid, owner.inode, owner.cgroup), one)
            return call

        def owner() -> bool:
            return m.find_owner(sender.near, sender.far) == sender.owner

        found = measure({
            "owner only": owner,
            "owner only, asked again at once": owner,  # what the others have pushed out of the processor's caches is back
            "in process, cgroup of its own": find(sender, True) if own else lambda: "no-cgroup",
            "in process, sent lately": find(neighbour, False)}, seconds)
        if crowded:
            # By itself: it goes through everything, and would leave the others cold caches that grow with the crowd.
            found.update(measure({"in process, first mail, cgroup of all": find(neighbour, True)}, seconds))
            with own_cgroup("family") as family, client(m, family) as first, \
                    running(CROWD, 500, 50, pwd.getpwnam(SENDER).pw_uid, cgroup=family), client(m, family) as last:
                found.update(measure({
                    "in process, one of 500 of the sender's, the first": find(first, True),
                    "in process, one of 500 of the sender's, the last": find(last, True),
                    "in process, one of 500 of the sender's, sent lately": find(last, False)}, seconds))
        # The helper ends when we do; one that ended now would be reported as a fault.
        describer = m.Describer(m.fork_helper(pwd.getpwnam("postfix")), False, m.Workers(1, 1))

        def ask(one: Client) -> Callable[[], Any]:
            def call() -> Any:
                question = describer.ask(m.find_owner(one.near, one.far))
                facts = describer.wait(question)
                describer.forget(question)
                return holds(facts, one)
            return call

        found.update(measure({
            "through the helper, cgroup of its own": ask(sender) if own else lambda: "no-cgroup",
            "through the helper, sent lately": ask(neighbour)}, seconds))
        # By themselves, too: what starts a process leaves whoever comes next a cold machine.
        found.update(measure({
            "psutil.net_connections": lambda: by_psutil(sender),
            "ss -tnpe": lambda: by_output(["ss", "-tnpe"], sender, r":%(port)d .*pid=%(pid)d,"),
            "lsof -nPi, the whole list": lambda: by_output(["lsof", "-nPi"], sender, r"\b%(pid)d .*:%(port)d->"),
        }, seconds))
        return {**found, **by_sudo(m, directory, sender, 5 if seconds < 1 else 15)}


def lookup_tables(title: str, code: str, sizes: Iterable[int], quick: bool, directory: str) -> None:
    """Measure the lookups beside crowds of each size."""
    m, results, made = script(directory), [], []
    sys.stdout.flush()
    for size in sizes:
        with contextlib.ExitStack() as stack:
            made.append(stack.enter_context(running(code, size, 20, pwd.getpwnam(STRANGER).pw_uid))[1])
            results.append(lookups(m, directory, 0.3 if quick else 2, code is CROWD))
    rows = [(name, *(number(result[name]) for result in results), *(
        "-" if isinstance(result[name], str) or isinstance(results[0][name], str) else
        number(result[name] / results[0][name]) for result in results[1:])) for name in results[0]]
    notes = ["medians in us, the kernel's answer included; then how many times the first column; a word: why not"]
    if "no-cgroup" in results[0].values():
        notes.append("no-cgroup: there is no cgroup v2 that can be written to here")
    if not SUDOERS.exists():
        notes.append("no sudo that takes the rule of sudoers.example here: lsof was called as root")
    table(title, [f"{n:,}" for n in made] + [f"x {n:,}" for n in made[1:]], rows, notes)


@contextlib.contextmanager
def sudo_rule() -> Iterator[None]:
    """Put the rule of sudoers.example in force, and one for the bare call; not where visudo refuses it."""
    rule = (mta.SCRIPT.parent / "sudoers.example").read_text().replace("MILTER_SYSUSER", "MILTER_BENCH") + BARE_RULE
    try:
        if subprocess.run(["visudo", "-c", "-f", "-"], input=rule, capture_output=True, text=True,
                          env={"PATH": mta.SYSTEM_PATH}, check=False).returncode == 0:
            SUDOERS.write_text(rule)
            SUDOERS.chmod(0o440)
        yield
    finally:
        SUDOERS.unlink(missing_ok=True)


# --- messages a second ----------------------------------------------------------------------------------------

def cpu_seconds(pids: Iterable[int]) -> float:
    """Add up what processes and their ended children have used."""
    return sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in pids)


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], float]]:
    """Be in a cgroup of our own; give what counts the seconds that everything in it has used (always 0 without)."""
    with own_cgroup("mail") as cgroup:
        if cgroup is None:
            yield lambda: 0.0
            return
        was = re.search(r"^0::/(.*)$", pathlib.Path("/proc/self/cgroup").read_text(), re.M)[1]
        (cgroup / "cgroup.procs").write_text("0")
        try:
            yield lambda: int((cgroup / "cpu.stat").read_text().split()[1]) / 1e6  # usage_usec
        finally:
            (cgroup.parent / was / "cgroup.procs").write_text("0")


def drained(postfix: mta.Postfix) -> bool:
    """Tell whether the queue is empty."""
    return not any(files for name in ("maildrop", "incoming", "active", "deferred")
                   for _, _, files in os.walk(postfix.directory / "queue" / name))


def send(postfix: mta.Postfix, port: int, messages: int, *options: str) -> float:
    """Send messages and wait until they are gone; give the seconds that sending took."""
    command = ["smtp-source", *options, "-m", str(messages), "-f", f"from@{mta.DOMAIN}", "-t", f"to@{mta.DOMAIN}",
               f"127.0.0.1:{port}"]
    began = time.perf_counter()
    sent = mta.run_as(SENDER, command, timeout=1800, env={"PATH": mta.SYSTEM_PATH})
    seconds = time.perf_counter() - began
    assert sent.returncode == 0, sent.stderr
    mta.wait_for(lambda: drained(postfix), 300, "the queue to be empty")
    return seconds


@contextlib.contextmanager
def other_milter(postfix: mta.Postfix, name: str, code: str, user: Optional[str]) -> Iterator[int]:
    """Run a milter to compare with; give its pid."""
    path = f"{postfix.directory}/queue/private/{name}.sock"
    with subprocess.Popen([mta.PYTHON, "-Bc", code, path], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          start_new_session=True, **(mta.identity(user) if user else {"cwd": "/"})) as process:
        try:
            mta.wait_for(lambda: pathlib.Path(path).is_socket(), 20, f"{name}'s socket")
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def milters(**settings: Any) -> Iterator[tuple[mta.Postfix, mta.Milter, dict[str, list[int]]]]:
    """Run a Postfix with a port for each milter, and these; give the pids that work for each."""
    names = {"none": "", "null": "null.sock", "ours": "milter.sock", "original": "original.sock"}
    services = {name: {"smtpd_milters": path and f"{{ unix:private/{path}, default_action=accept }}"}
                for name, path in names.items()}
    with mta.Postfix(discard=True, services=services) as postfix, mta.Milter(postfix, **settings) as milter, \
            other_milter(postfix, "null", NULL, "postfix") as null, \
            other_milter(postfix, "original", ORIGINAL, None) as original:
        yield postfix, milter, {"none": [], "null": [null], "ours": [milter.pid, *milter.helper_pids()],
                                "original": [original]}


def throughput(quick: bool) -> None:
    """Send as fast as it goes through each milter in turn."""
    rounds, messages, few = (3, 1000, 100) if quick else (9, 3000, 300)
    loads = {"10 connections at once, one message each": ("-s", "10"),
             "100 connections at once, one message each": ("-s", "100"),
             "10 connections at once, kept for all messages": ("-s", "10", "-d")}
    with counted() as used_by_all, milters() as (postfix, milter, pids):
        for load, options in loads.items():
            rates, own, everyone = ({name: [] for name in pids} for _ in range(3))
            for round_ in range(-1, rounds):  # the first is to warm up
                for name in pids if round_ % 2 else reversed(pids):
                    n = few if name == "original" else messages if round_ >= 0 else messages // 5
                    before, before_all = cpu_seconds(pids[name]), used_by_all()
                    rate = n / send(postfix, postfix.ports[name], n, *options)
                    if round_ >= 0:
                        rates[name].append(rate)
                        own[name].append((cpu_seconds(pids[name]) - before) / n * 1e6)
                        everyone[name].append((used_by_all() - before_all) / n * 1e6)
            rows = [(f"milter: {name}", number(statistics.median(rates[name])),
                     f"{statistics.median(map(operator.truediv, rates[name], rates['null'])):.2f}",
                     number(statistics.median(own[name])) if pids[name] else "-",
                     number(statistics.median(everyone[name])) if any(everyone[name]) else "no-cgroup",
                     number(statistics.median(map(operator.sub, everyone[name], everyone["null"]))))
                    for name in pids]
            table(f"Messages a second through Postfix: smtp-source {' '.join(options)}, {load}",
                  ["/s", "of null", "CPU: milter", "all", "more than null"], rows)
        unknown, total = len(milter.lines("lookup=")), len(milter.lines("action="))
    print(f"  {messages:,} messages at a time (original: {few:,}), {rounds} times each, taking turns.\n"
          "  of null: the median of the rounds' ratios; null: a pymilter that adds a constant header\n"
          "  original: lsof -nPi for every connection, as the script of 2013 did\n"
          "  CPU: us a message, of the milter with its helper, and of Postfix, smtp-source and milter together\n"
          f"  ours named user and program for {total - unknown:,} of {total:,} messages")


def steps(quick: bool) -> None:
    """Show from the negotiated protocol what each milter is told, and what it has to answer."""
    del quick
    words = dict(zip("CHMRTLNBUE", "connect helo mail rcpt data header eoh body unknown eom".split()))
    with milters() as (postfix, _, _):
        said = {}
        for name, path in ("null", "null.sock"), ("ours", "milter.sock"):
            with mta.Wire(f"{postfix.directory}/queue/private/{path}") as wire:
                said[name] = {step: "not sent" if wire.protocol & unwanted else
                              "sent, no answer" if wire.protocol & silent else "round trip"
                              for step, (unwanted, silent) in mta.STEPS.items()}
                said[name]["bits"] = f"{wire.protocol:#x}"
    rows = [(word, said["null"][step], said["ours"][step]) for step, word in words.items()]
    trips = [sum(value == "round trip" for value in one.values()) + 1 for one in said.values()]
    table("What is said between MTA and milter", ["null", "ours"],
          [("negotiation", "round trip", "round trip"), *rows, ("round trips in all", *trips),
           ("protocol bits", said["null"]["bits"], said["ours"]["bits"])])


# --- memory ---------------------------------------------------------------------------------------------------

class Size(NamedTuple):
    """What a process takes."""

    rss: float  # MB
    pss: float  # MB; shared pages count by their share
    threads: int
    descriptors: int


def size_of(pid: int) -> Size:
    """Read what a process takes now."""
    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    rss, pss = (int(re.search(rf"^{word}:\s+(\d+)", rollup, re.M)[1]) / 1024 for word in ("Rss", "Pss"))
    process = psutil.Process(pid)
    return Size(rss, pss, process.num_threads(), process.num_fds())


def settled(pids: dict[str, int]) -> dict[str, Size]:
    """Wait until the threads of past connections have ended, and give the sizes."""
    counts: list[int] = []

    def still() -> bool:
        counts.append(sum(psutil.Process(pid).num_threads() for pid in pids.values()))
        time.sleep(0.1)
        return len(counts) > 30 and len(set(counts[-30:])) == 1
    mta.wait_for(still, 60, "the milter to be idle")
    return {name: size_of(pid) for name, pid in pids.items()}


def memory(quick: bool) -> None:
    """Send many messages and see what has grown."""
    messages = 10_000 if quick else 100_000
    stages = {"at the start": 0, "after 1,000 messages": 1000, f"after {messages // 2:,}": messages // 2 - 1000,
              f"after {messages:,}": messages // 2}
    rows = []
    with mta.Postfix(discard=True) as postfix, mta.Milter(postfix) as milter:
        pids = {"milter": milter.pid, **dict(zip(["helper"], milter.helper_pids()))}
        for stage, n in stages.items():
            if n:
                send(postfix, postfix.port, n, "-s", "10")
            sizes = settled(pids)
            rows.append((stage, *(cell for size in sizes.values() for cell in (
                f"{size.rss:.1f}", f"{size.pss:.1f}", size.threads, size.descriptors)),
                f"{sum(size.rss for size in sizes.values()):.1f}", f"{sum(size.pss for size in sizes.values()):.1f}"))
    table("Memory in MB, threads and descriptors (through Postfix, 10 connections at once, one message each)",
          [f"{name}: {word}" if n == 0 else word for name in pids
           for n, word in enumerate(("RSS", "PSS", "threads", "fds"))] + ["all: RSS", "PSS"], rows)


# --- the program ----------------------------------------------------------------------------------------------

def interrupted(number: int, frame: Any) -> None:
    """Clean up, and be in no hurry about it."""
    del frame
    for caught in signal.SIGINT, signal.SIGTERM:
        signal.signal(caught, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    """Run the sections that were asked for."""
    sections = "lookups", "sockets", "throughput", "steps", "memory"
    parser = argparse.ArgumentParser(description="Measure what naming a sender costs, next to what else there is.")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter")
    parser.add_argument("section", nargs="*", metavar="SECTION", help=f"{', '.join(sections)}; all if none is named")
    options = parser.parse_args()
    if wrong := set(options.section) - set(sections):
        parser.error(f"no such section: {' '.join(wrong)}")
    if os.geteuid():
        parser.error("run this as root: it makes processes of other users, and a Postfix of its own")
    for caught in signal.SIGINT, signal.SIGTERM:
        signal.signal(caught, interrupted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    print(f"Linux {os.uname().release}, Python {sys.version.split()[0]}, psutil {psutil.__version__}, "
          f"{os.cpu_count()} CPUs, {len(psutil.pids())} processes, load {os.getloadavg()[0]:.1f}"
          + (f"; without {' and '.join(missing)}" if (missing := mta.missing_capabilities()) else ""))
    wanted = options.section or sections
    with tempfile.TemporaryDirectory(prefix="milter-bench.") as directory, sudo_rule():
        os.chmod(directory, 0o755)
        (pathlib.Path(directory) / "milter_sysuser.py").write_text(mta.SCRIPT.read_text())
        if "lookups" in wanted:
            lookup_tables("One lookup beside so many unrelated processes, 20 descriptors each", CROWD,
                          (0, 200, 1000) if options.quick else (0, 1000, 5000), options.quick, directory)
        if "sockets" in wanted:
            lookup_tables("One lookup beside so many unrelated sockets", SOCKETS,
                          (0, 1000) if options.quick else (0, 1000, 10000), options.quick, directory)
        for section in throughput, steps, memory:
            if section.__name__ in wanted:
                section(options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
