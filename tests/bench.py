#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Measure what it costs to name a sender, next to what else there is, in one run; it reports and judges nothing.

    /usr/bin/python3 -B tests/bench.py [--quick] [--beside SCRIPT] [SECTION...]

    lookups     one lookup, beside 0, 1,000 and 5,000 unrelated processes
    sockets     one lookup, beside 0, 1,000 and 10,000 unrelated sockets
    throughput  messages a second through Postfix to a discard transport, 10 and 100 connections at once, through
                this milter and through others, OpenDKIM among them; and what is aimed at, next to what was reached
    submit      messages a second through sendmail(1), without and with a milter
    steps       what is said between MTA and milter for one message
    start       from the start of the script to the first message that is served
    profile     where the processor time of one message goes, by callback
    memory      milter and helper before and after 100,000 messages

As root, in about half an hour; with --quick smaller and shorter, in about three minutes. Everything else on the
machine counts, so compare within a run. What is compared takes turns, so that a disturbance meets all. It needs what
tests/run installs, and has it install opendkim, opendkim-tools and nftables where they are missing (these stay); the
rule for sudo, the users' processes and the mail servers it makes are gone when it ends.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import functools
import importlib.util
import itertools
import json
import operator
import os
import pathlib
import pwd
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

import psutil

import mta

BESIDE: Optional[pathlib.Path] = None  # another version of the script; see --beside
CLIENT = pathlib.Path("/nonexistent")  # the cgroup that mail is sent from; see counted
SENDER, STRANGER = "daemon", "nobody"  # users that every Debian has
LSOF = "/usr/bin/lsof"
CLONE_NEWNET = 0x40000000  # linux/sched.h
CONTAINER_NETWORK, HOST_ADDRESS, CONTAINER_ADDRESS = "172.17.0.0/16", "172.17.0.1", "172.17.0.5"
NAMESPACES = 50  # beside the container's
DIALLED, CLIENT_ADDRESS = "203.0.113.5", "198.51.100.1"  # in a network namespace of its own; RFC 5737
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
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
connection.send(b"x")
print(connection.getsockname()[1], flush=True)
os.read(0, 1)
'''

# An MTA that accepts one connection of a listener it was given and reads something, until its standard input ends.
ACCEPT = r'''
import os, socket, sys
accepted, client = socket.socket(fileno=int(sys.argv[1])).accept()
accepted.recv(1)
print(client[1], flush=True)
os.read(0, 1)
'''

# Containers: processes in network namespaces of their own, whose lo is up, until its standard input ends.
CONTAINERS = r'''
import ctypes, fcntl, os, socket, struct, sys
children = []
for _ in range(int(sys.argv[1])):
    ready, done = os.pipe()
    children.append(os.fork())
    if children[-1] == 0:
        if ctypes.CDLL(None).unshare(0x40000000) == 0:
            fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
            os.write(done, b"x")
        os.close(done)
        os.read(0, 1)
        os._exit(0)
    os.close(done)
    if not os.read(ready, 1):
        sys.exit("no network namespace")
print(children[-1], flush=True)
os.read(0, 1)
for child in children:
    os.waitpid(child, 0)
'''

# A host that sends everyone's outgoing port 25 to its own MTA.
REDIRECT = """
table ip milter_bench {
    chain output {
        type nat hook output priority -100
        tcp dport 25 redirect to :%d
    }
}
"""

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

# One that is told what ours is told, and does no more with it than the one above.
TOLD = NULL.replace("    def eom", r'''    def negotiate(self, opts):
        if opts[0] & Milter.SETSYMLIST:
            self._ctx.setsymlist(Milter.M_CONNECT, "{daemon_addr} {daemon_port}")
        return Milter.Base.negotiate(self, opts)
    def connect(self, name, family, address):
        return Milter.CONTINUE
    def hello(self, name):
        return Milter.CONTINUE
    def envfrom(self, sender, *parameters):
        return Milter.CONTINUE
    def envrcpt(self, recipient, *parameters):
        return Milter.CONTINUE
    def unknown(self, command):
        return Milter.CONTINUE
    @Milter.noreply
    def data(self):
        return Milter.CONTINUE
    def header(self, name, value):
        return Milter.CONTINUE
    def eom''').replace("(Milter.ADDHDRS)", "(Milter.ADDHDRS | Milter.SETSYMLIST)")

# And one that answers neither a recipient nor a header: what these answers cost, which no flood can do without.
UNANSWERED = re.sub(r"(?m)^(    def (?:envrcpt|header)\()", r"    @Milter.noreply\n\1", TOLD)

# And the way of the script of 2013: everyone's sockets listed by lsof, the client's port looked for.
ORIGINAL = NULL.replace("    def eom", r'''    def connect(self, name, family, address):
        import pwd, subprocess
        lines = subprocess.run(["lsof", "-nPi"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
        for line in lines.splitlines():
            if ":%d->" % address[1] in line:
                self.found = "user=%s program=%s" % (line.split()[2], line.split()[0])
        return Milter.CONTINUE
    def eom''').replace('"user=nobody program=null"', 'getattr(self, "found", "user=? program=?")')

# OpenDKIM's settings; it logs nothing, so that the host's log is not filled, and its key is in a directory of ours.
OPENDKIM = """
Mode s
Domain {domain}
Selector bench
KeyFile {directory}/bench.private
RequireSafeKeys no
Canonicalization relaxed/simple
OversignHeaders From
Socket local:{path}
UMask 007
Syslog no
"""

# Goes into a copy of the script: times the calls of the milter's callbacks, and of the public methods of the script's
# classes, in memory that bench.py shares; each has calls, processor time, processor time less that of the timed calls
# it makes, and time that passed (in ns), and all of them a second time for what runs in the helper.
PROFILE = r'''
def time_calls(path: str) -> None:
    import inspect, mmap
    memory = open(path, "r+b")
    slots = memoryview(mmap.mmap(memory.fileno(), 0)).cast("Q")
    names, lock, below, milter = [], threading.Lock(), threading.local(), os.getpid()

    def timed(name, function):
        first = 4 * len(names)
        names.append(name)

        @functools.wraps(function)
        def call(*arguments, **named):
            outer, below.cpu = getattr(below, "cpu", 0), 0
            passed, cpu = time.perf_counter_ns(), time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                cpu, passed = time.thread_time_ns() - cpu, time.perf_counter_ns() - passed
                at = first + (0 if os.getpid() == milter else len(slots) // 2)
                with lock:
                    slots[at] += 1
                    slots[at + 1] += cpu
                    slots[at + 2] += cpu - below.cpu
                    slots[at + 3] += passed
                below.cpu = outer + cpu
        return call

    for owner in [kind for kind in globals().values() if isinstance(kind, type) and kind.__module__ == __name__
                  and not issubclass(kind, (tuple, BaseException))]:
        for name, value in list(vars(owner).items()):
            function = value.__func__ if isinstance(value, staticmethod) else value
            if inspect.isgeneratorfunction(function) or not inspect.isfunction(function):
                continue
            if not name.startswith("_") or name == "__init__" and owner is SysuserMilter:
                wrapper = timed(owner.__name__ + "." + name, function)
                setattr(owner, name, staticmethod(wrapper) if isinstance(value, staticmethod) else wrapper)
    for name in FUNCTIONS:
        if inspect.isfunction(globals().get(name)):
            globals()[name] = timed(name, globals()[name])
    with open(path + ".names", "w") as file:
        file.write("\n".join(names))


'''
CALLBACKS = "__init__", "negotiate", "connect", "hello", "envfrom", "envrcpt", "header", "eom", "close"  # as the MTA goes on
FUNCTIONS = "say", "sock_diag"  # of the script, to be timed as well if it has them


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
def running(code: str, *arguments: Any, user: Optional[str] = None, cgroup: Optional[pathlib.Path] = None,
            descriptors: Sequence[int] = (), enter: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Run a snippet that prints a number and then waits for the end of its input; give its pid and the number."""
    begin = "import os; os.read(0, 1)\n"  # when it is where it belongs: a socket keeps the cgroup it was made in
    with subprocess.Popen([*enter, mta.PYTHON, "-c", begin + code, *map(str, arguments)], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, start_new_session=True,  # an interrupt is for us alone
                          pass_fds=descriptors, **(mta.identity(user) if user else {})) as process:
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


def in_child(function: Callable[[], Any], user: Optional[str] = None, network: bool = False) -> Any:
    """Call a function in a child, as a user or in a network namespace of its own; None if it failed.

    What it returns has to go through JSON.
    """
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir("/")
            if network and ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            if user:
                identity = mta.identity(user)
                os.setgroups(identity["extra_groups"])
                os.setgid(identity["group"])
                os.setuid(identity["user"])
            os.write(far, json.dumps(function()).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(far)
    try:
        with open(near, "rb") as answer:
            return json.loads(answer.read() or b"null")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.waitpid(child, 0)


def provided(programs: Mapping[str, str]) -> str:
    """Have the packages (values) of programs that are missing (keys) installed; give why they are not there, or ""."""
    missing = [package for program, package in programs.items() if not shutil.which(program, path=mta.SYSTEM_PATH)]
    if not missing:
        return ""
    install = subprocess.run([mta.SCRIPT.parent / "tests/run", "--install", *missing], stdin=subprocess.DEVNULL,
                             capture_output=True, text=True, check=False)
    return "" if install.returncode == 0 else (install.stderr.strip() or "not installed").splitlines()[-1]


# --- the script's own parts -----------------------------------------------------------------------------------
# What the lookups ask of the script: but for endpoint(), its functions and classes are named here and nowhere below.

def kernel_lookup(m: Any, describer: Any = None) -> Callable[[Any, Any], Any]:
    """Give what finds the client's socket by both ends; describer: who can tell what a redirected client dialled."""
    return m.KernelLookup(getattr(describer, "what_was_dialled", lambda mta_end: "redirected")).find_client_socket


def why_unknown(found: Any) -> str:
    """Give the word for why the kernel's answer names no user, or ""."""
    return "" if found and found.uid is not None else getattr(found, "why", "") or "not-found"


def container_lookup(m: Any, describer: Any) -> Callable[[Any, Any], Any]:
    """Give what finds a container's client by both ends."""
    m.container_networks = [CONTAINER_NETWORK]
    lookup = m.KernelLookup(lambda mta_end: "redirected")
    return lambda near, far: m.find_container_client(lookup, describer, near, far)


class InProcess:
    """What has a container's client found as the helper does it, but here, and as if it had never seen a container."""

    def __init__(self, m: Any) -> None:
        self.m = m

    def find_in_containers(self, near: Any, far: Any) -> dict:
        """Find the socket."""
        self.finder = finder_of(self.m)
        ends = [(self.m.V4_MAPPED + end.address)[-16:] + end.port.to_bytes(2, "big") for end in (near, far)]
        return self.finder.answer(self.m.WHOSE_IN_CONTAINERS, 0, 0, 0, b"".join(ends))

    def describe(self, found: Any) -> dict:
        """Find the process that has it."""
        return self.finder.answer(self.m.WHO_HAS, found.uid, found.inode, found.cgroup)


def finder_of(m: Any) -> Any:
    """Make what searches for the process, as the helper has it."""
    return m.Finder(m.header_fields + m.log_fields)


def search(m: Any, finder: Any, found: Any, fresh: bool) -> dict:
    """Have the process found that holds a socket; fresh: as if its user had not sent before."""
    finder.debts.clear()  # who has used up his share is not made to wait here
    if fresh:
        finder.recent.clear()
    return finder.answer(m.WHO_HAS, found.uid, found.inode, found.cgroup)


def by_helper(m: Any) -> Any:
    """Make what has processes described by a helper, which ends when we do."""
    return m.Describer(m.fork_helper(pwd.getpwnam("postfix")))


def by_lsof(m: Any, command: list[str]) -> Any:
    """Make what has processes described by lsof."""
    m.lsof_command = command
    return m.Describer(None, True)


def description(describer: Any, found: Any) -> dict:
    """Have the process described that holds a socket; {"why": word} if that is not known."""
    why = why_unknown(found)
    return {"why": why} if why else describer.describe(found)


# --- one lookup -----------------------------------------------------------------------------------------------

class Client(NamedTuple):
    """A process with a connection to us."""

    pid: int
    near: Any  # its end, as the milter has it
    far: Any
    found: Any  # its socket, as the kernel has it


@contextlib.contextmanager
def client(m: Any, cgroup: Optional[pathlib.Path] = None) -> Iterator[Client]:
    """Have the sender connect."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with running(CLIENT, "127.0.0.1", port, user=SENDER, cgroup=cgroup) as (pid, own), \
                listener.accept()[0] as accepted:
            accepted.recv(1)
            near, far = m.endpoint("127.0.0.1", own), m.endpoint("127.0.0.1", port)
            yield Client(pid, near, far, kernel_lookup(m)(near, far))


@contextlib.contextmanager
def redirected_client(m: Any) -> Iterator[Client]:
    """Have the sender dial port 25 of another host, and a rule send it to an MTA here; in a network of its own."""
    for command in ("link set lo up", f"address add {CLIENT_ADDRESS}/32 dev lo",
                    f"route add {DIALLED}/32 dev lo src {CLIENT_ADDRESS}"):
        subprocess.run(["ip", *command.split()], check=True, env={"PATH": mta.SYSTEM_PATH})
    with own_cgroup("mta") as there, own_cgroup("client") as here, \
            socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        subprocess.run(["nft", "-f", "-"], input=REDIRECT % port, text=True, check=True,
                       env={"PATH": mta.SYSTEM_PATH})
        with running(CLIENT, DIALLED, 25, user=SENDER, cgroup=here) as (pid, own), \
                running(ACCEPT, listener.fileno(), user="postfix", cgroup=there, descriptors=[listener.fileno()]):
            yield Client(pid, m.endpoint(CLIENT_ADDRESS, own), m.endpoint("127.0.0.1", port), None)


@contextlib.contextmanager
def container_client(m: Any) -> Iterator[Client]:
    """Have a sender in a container dial an MTA here, beside other containers; in a network of its own."""
    with running(CONTAINERS, 1) as (_, container), running(CONTAINERS, NAMESPACES), \
            own_cgroup("container") as own, socket.create_server(("", 0)) as listener:
        inside, port = ["nsenter", f"--target={container}", "--net"], listener.getsockname()[1]
        for command in ("ip link add br0 type bridge", f"ip address add {HOST_ADDRESS}/16 dev br0", "ip link set br0 up",
                        f"ip link add g0 type veth peer name eth0 netns {container}", "ip link set g0 master br0 up"):
            subprocess.run(command.split(), check=True, env={"PATH": mta.SYSTEM_PATH})
        for command in f"ip address add {CONTAINER_ADDRESS}/16 dev eth0", "ip link set eth0 up":
            subprocess.run([*inside, *command.split()], check=True, env={"PATH": mta.SYSTEM_PATH})
        sender = pwd.getpwnam(SENDER)
        enter = [*inside, "setpriv", f"--reuid={sender.pw_uid}", f"--regid={sender.pw_gid}", "--clear-groups"]
        with running(CLIENT, HOST_ADDRESS, port, cgroup=own, enter=enter) as (pid, own_port), listener.accept()[0]:
            yield Client(pid, m.endpoint(CONTAINER_ADDRESS, own_port), m.endpoint(HOST_ADDRESS, port), None)


def measure(rows: dict[str, Callable[[], Any]], seconds: float, most: int = 300) -> dict[str, Any]:
    """Call the rows in turn, each for so many seconds or times; give medians in us, or the word of a failure.

    A row returns True if it found the right process; what else it returns is why not.
    """
    samples: dict[str, list[float]] = {name: [] for name in rows}
    failed: dict[str, str] = {}
    for round_ in range(-1, most):  # the first round is to warm up
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


def by_sudo(m: Any, sender: Client, rounds: int) -> dict[str, Any]:
    """Measure the way through sudo and lsof as postfix, next to sudo and lsof alone; without a rule, as root."""
    ruled = SUDOERS.exists()
    command, names = [LSOF], ["through lsof, as root", "bare: lsof -p PID"]
    if ruled:
        command, names = ["sudo", "-n", LSOF], ["through sudo lsof", "bare: sudo -n lsof -p PID"]

    def ways() -> dict[str, Any]:
        lookup, describer = kernel_lookup(m), by_lsof(m, command)
        calls = (lambda: holds(description(describer, lookup(sender.near, sender.far)), sender),
                 lambda: by_output([*command, "-p", str(sender.pid)], sender, "TCP"))
        return measure(dict(zip(names, calls)), 60, rounds)
    return in_child(ways, "postfix" if ruled else None) or dict.fromkeys(names, "error")


def by_redirect(m: Any, seconds: float) -> dict[str, Any]:
    """Measure the lookup of a client that the firewall has sent here, as the helper can tell what it dialled."""
    name = "through the helper, redirected by the firewall"
    if lack := provided({"nft": "nftables", "ip": "iproute2"}):
        sys.stderr.write(f"{name}: {lack}\n")
        return {name: "no-nft"}

    def ways() -> dict[str, Any]:
        anew = script.__wrapped__(os.path.dirname(m.__file__))  # a netlink socket that m keeps is of the other network
        with redirected_client(anew) as sender:
            describer = by_helper(anew)
            lookup = kernel_lookup(anew, describer)
            return measure({name: lambda: holds(description(describer, lookup(sender.near, sender.far)), sender)},
                           seconds)
    return in_child(ways, network=True) or {name: "error"}


def by_container(m: Any, seconds: float) -> dict[str, Any]:
    """Measure the lookup of a client in a container beside others: the first of all, and those that follow."""
    names = (f"in process, in a container, the first, {NAMESPACES} others", "through the helper, in a container, seen before")

    def ways() -> dict[str, Any]:
        anew = script.__wrapped__(os.path.dirname(m.__file__))
        with container_client(anew) as sender:
            helper, calls = by_helper(anew), []
            for describer in InProcess(anew), helper:
                lookup = container_lookup(anew, describer)
                calls.append(lambda describer=describer, lookup=lookup: holds(
                    description(describer, lookup(sender.near, sender.far)), sender))
            # So few that a container does not use up its share of the helper's time.
            return {**measure({names[0]: calls[0]}, seconds, 30), **measure({names[1]: calls[1]}, seconds, 20)}
    return in_child(ways, network=True) or dict.fromkeys(names, "error")


def lookups(m: Any, seconds: float, crowded: bool) -> dict[str, Any]:
    """Measure every way of looking up at this moment; crowded: the cases that depend on processes, too."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(own_cgroup("sender"))
        sender = stack.enter_context(client(m, own))
        neighbour = stack.enter_context(client(m))  # where the crowd is

        lookup = kernel_lookup(m)

        def find(one: Client, fresh: bool) -> Callable[[], Any]:
            finder = finder_of(m)
            return lambda: holds(search(m, finder, lookup(one.near, one.far), fresh), one)

        def owner() -> Any:
            found = lookup(sender.near, sender.far)
            return why_unknown(found) or found.inode == sender.found.inode

        found = measure({
            "owner only": owner,
            "owner only, asked again at once": owner,  # what the others pushed out of the processor's caches is back
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
        describer = by_helper(m)

        def ask(one: Client) -> Callable[[], Any]:
            return lambda: holds(description(describer, lookup(one.near, one.far)), one)

        found.update(measure({
            "through the helper, cgroup of its own": ask(sender) if own else lambda: "no-cgroup",
            "through the helper, sent lately": ask(neighbour)}, seconds))
        if crowded:
            found.update(by_redirect(m, seconds))
            found.update(by_container(m, seconds))
        # By themselves, too: what starts a process leaves whoever comes next a cold machine.
        found.update(measure({
            "psutil.net_connections": lambda: by_psutil(sender),
            "ss -tnpe": lambda: by_output(["ss", "-tnpe"], sender, r":%(port)d .*pid=%(pid)d,"),
            "lsof -nPi, the whole list": lambda: by_output(["lsof", "-nPi"], sender, r"\b%(pid)d .*:%(port)d->"),
        }, seconds))
        return {**found, **by_sudo(m, sender, 5 if seconds < 1 else 15)}


def lookup_tables(title: str, code: str, sizes: Iterable[int], quick: bool, directory: str) -> None:
    """Measure the lookups beside crowds of each size."""
    m, results, made = script(directory), [], []
    sys.stdout.flush()
    for size in sizes:
        with contextlib.ExitStack() as stack:
            made.append(stack.enter_context(running(code, size, 20, pwd.getpwnam(STRANGER).pw_uid))[1])
            results.append(lookups(m, 0.3 if quick else 2, code is CROWD))
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
    global CLIENT
    with own_cgroup("mail") as cgroup:
        if cgroup is None:
            yield lambda: 0.0
            return
        CLIENT = cgroup / "client"
        was = re.search(r"^0::/(.*)$", pathlib.Path("/proc/self/cgroup").read_text(), re.M)[1]
        (cgroup / "cgroup.procs").write_text("0")
        CLIENT.mkdir()
        try:
            yield lambda: int((cgroup / "cpu.stat").read_text().split()[1]) / 1e6  # usage_usec
        finally:
            CLIENT.rmdir()
            (cgroup.parent / was / "cgroup.procs").write_text("0")


def drained(postfix: mta.Postfix) -> bool:
    """Tell whether the queue is empty."""
    return not any(files for name in ("maildrop", "incoming", "active", "deferred")
                   for _, _, files in os.walk(postfix.directory / "queue" / name))


def send(postfix: mta.Postfix, port: int, messages: int, *options: str, user: str = SENDER) -> float:
    """Send messages and wait until they are gone; give the seconds that sending took."""
    command = ["smtp-source", *options, "-m", str(messages), "-f", f"from@{mta.DOMAIN}", "-t", f"to@{mta.DOMAIN}",
               f"127.0.0.1:{port}"]
    began = time.perf_counter()
    # In a cgroup of its own, as a session, a cron job or a web server is: not among the processes of the MTA.
    enter = f'[ ! -d "{CLIENT}" ] || echo $$ >"{CLIENT}/cgroup.procs"; exec setpriv --reuid={user} --regid={user} --init-groups "$@"'
    sent = subprocess.run(["sh", "-c", enter, "sh", *command], capture_output=True, text=True, timeout=1800,
                          env={"PATH": mta.SYSTEM_PATH})
    seconds = time.perf_counter() - began
    assert sent.returncode == 0, sent.stderr
    mta.wait_for(lambda: drained(postfix), 300, "the queue to be empty")
    return seconds


class Way(NamedTuple):
    """A way for mail to go through Postfix."""

    port: int
    pids: list[int]  # of the processes that work for it
    sender: str = SENDER
    share: int = 1  # of the messages it gets: 1 of so many, where it is slow


@contextlib.contextmanager
def other_milter(path: str, command: Sequence[str], user: Optional[str]) -> Iterator[int]:
    """Run a milter to compare with; give its pid."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                          **(mta.identity(user) if user else {"cwd": "/"})) as process:
        try:
            mta.wait_for(lambda: pathlib.Path(path).is_socket(), 20, path)
            yield process.pid
        finally:
            process.kill()


def opendkim_command(directory: pathlib.Path, path: str) -> list[str]:
    """Make OpenDKIM a key and settings; give the command that runs it, to serve that socket."""
    directory.mkdir()
    made = subprocess.run(["opendkim-genkey", "-b", "2048", "-d", mta.DOMAIN, "-s", "bench", "-D", directory],
                          capture_output=True, text=True, env={"PATH": mta.SYSTEM_PATH}, check=False)
    assert made.returncode == 0, made.stderr
    os.chown(directory / "bench.private", pwd.getpwnam("postfix").pw_uid, -1)
    settings = OPENDKIM.format(domain=mta.DOMAIN, directory=directory, path=path)
    (directory / "opendkim.conf").write_text(settings)
    return [shutil.which("opendkim", path=mta.SYSTEM_PATH) or "opendkim", "-f", "-x",
            str(directory / "opendkim.conf")]


def signs(path: str) -> bool:
    """Tell whether the milter that serves a socket adds a DKIM signature to a message from here."""
    with mta.Wire(path) as wire:
        wire.connect("127.0.0.1", 12345, daemon_addr="127.0.0.1", daemon_port="25")
        wire.helo()
        headers = [("From", f"from@{mta.DOMAIN}"), ("Subject", "test")]
        return any("DKIM-Signature" in reply for reply in wire.message(headers=headers))


@contextlib.contextmanager
def milters(*names: str, **sockets: str) -> Iterator[tuple[mta.Postfix, mta.Milter, dict[str, Way]]]:
    """Run a Postfix with a port for each of these ways; more sockets: of milters that are run elsewhere."""
    files = {name: f"private/{name}.sock" for name in names} | {"none": "", "ours": "private/milter.sock"} | sockets
    services = {name: {"smtpd_milters": path and f"{{ unix:{path}, default_action=accept }}"}
                for name, path in files.items() if name in names or name in sockets}
    with mta.Postfix(discard=True, services=services) as postfix, mta.Milter(postfix) as milter, \
            contextlib.ExitStack() as stack:
        def run(name: str, command: Sequence[str], user: Optional[str] = "postfix", share: int = 1) -> None:
            pid = stack.enter_context(other_milter(socket_of(postfix, name), command, user))
            ways[name] = Way(postfix.ports[name], [pid], share=share)

        ways = {name: Way(port, []) for name, port in postfix.ports.items()}
        for name, code, user, share in (("null", NULL, "postfix", 1), ("told", TOLD, "postfix", 1),
                                        ("unanswered", UNANSWERED, "postfix", 1), ("original", ORIGINAL, None, 10)):
            if name in names:
                run(name, [mta.PYTHON, "-Bc", code, socket_of(postfix, name)], user, share)
        if "ours" in names:
            ways["ours"] = Way(postfix.ports["ours"], [milter.pid, *milter.helper_pids()])
        if "before" in names:
            directory = postfix.directory / "before"
            (directory / "private").mkdir(parents=True)
            older = mta.Milter(directory, script=BESIDE, socketname=socket_of(postfix, "before")).start()
            stack.callback(older.stop)
            ways["before"] = Way(postfix.ports["before"], [older.pid, *older.helper_pids()])
        if "opendkim" in names:
            path = socket_of(postfix, "opendkim")
            run("opendkim", opendkim_command(postfix.directory / "opendkim", path), share=3)
            assert signs(path), "OpenDKIM does not sign"
        yield postfix, milter, ways


def socket_of(postfix: mta.Postfix, name: str) -> str:
    """Give the path of a milter's socket."""
    return f"{postfix.directory}/queue/private/{'milter' if name == 'ours' else name}.sock"


class Samples(NamedTuple):
    """What was measured of one way, in the order of the rounds."""

    rates: list[float]  # messages a second
    own: list[float]  # us of processor time a message, of the milter with its helper
    everyone: list[float]  # and of all


Load = dict[str, Samples]  # by way


def of(mine: Sequence[float], others: Sequence[float]) -> float:
    """Give the median of the rounds' ratios."""
    return statistics.median(map(operator.truediv, mine, others))


# What is aimed at, and how it is computed from a load; a KeyError: a way was skipped.
TARGETS: dict[tuple[str, str], Callable[[Load], float]] = {
    ("messages/s of the milter that is told the same", "at least 0.85"):
        lambda load: of(load["ours"].rates, load["told"].rates),
    ("processor time of the milter that is told the same", "at most 2.0"):
        lambda load: of(load["ours"].own, load["told"].own),
    ("processor time of OpenDKIM", "at most 0.30"): lambda load: of(load["ours"].own, load["opendkim"].own),
    ("root's messages/s of others'", "at least 0.95"):
        lambda load: of(load["ours, root sends"].rates, load["ours"].rates),
}


def measure_load(postfix: mta.Postfix, ways: dict[str, Way], rounds: int, messages: int, options: Sequence[str],
                 used_by_all: Callable[[], float]) -> Load:
    """Send through each way in turn."""
    load = {name: Samples([], [], []) for name in ways}
    for round_ in range(-1, rounds):  # the first is to warm up
        for name in ways if round_ % 2 else reversed(ways):
            way = ways[name]
            n = (messages if round_ >= 0 else messages // 5) // way.share
            before, before_all = cpu_seconds(way.pids), used_by_all()
            rate = n / send(postfix, way.port, n, *options, user=way.sender)
            if round_ >= 0:
                load[name].rates.append(rate)
                load[name].own.append((cpu_seconds(way.pids) - before) / n * 1e6)
                load[name].everyone.append((used_by_all() - before_all) / n * 1e6)
    return load


def load_row(name: str, load: Load, milter: bool) -> tuple[str, ...]:
    """Give a way's line of the table; milter: whether it has one."""
    mine, null, told = load[name], load["null"], load["told"]
    counted_all = any(mine.everyone)
    return (f"milter: {name}", number(statistics.median(mine.rates)), f"{of(mine.rates, null.rates):.2f}",
            f"{of(mine.rates, told.rates):.2f}", number(statistics.median(mine.own)) if milter else "-",
            number(statistics.median(mine.everyone)) if counted_all else "no-cgroup",
            number(statistics.median(map(operator.sub, mine.everyone, null.everyone))) if counted_all else "-")


def throughput(quick: bool) -> None:
    """Send as fast as it goes through each milter in turn."""
    rounds, messages = (3, 600) if quick else (9, 2000)
    loads = {"10 connections at once, one message each": ("-s", "10"),
             "100 connections at once, one message each": ("-s", "100"),
             "10 connections at once, kept for all messages": ("-s", "10", "-d")}
    lack = provided({"opendkim": "opendkim", "opendkim-genkey": "opendkim-tools"})
    names = ["none", "null", "unanswered", "told", "ours", *(["before"] if BESIDE else []),
             *(["opendkim"] if not lack else []), "original"]
    measured: dict[str, Load] = {}
    with counted() as used_by_all, milters(*names) as (postfix, milter, served):
        ways = {}
        for name in names:
            ways[name] = served[name]
            if name == "ours":
                ways["ours, root sends"] = ways[name]._replace(sender="root")
        same = told_the_same(postfix)
        for title, options in loads.items():
            measured[title] = load = measure_load(postfix, ways, rounds, messages, options, used_by_all)
            table(f"Messages a second through Postfix: smtp-source {' '.join(options)}, {title}",
                  ["/s", "of null", "of told", "CPU: milter", "all", "more than null"],
                  [load_row(name, load, bool(ways[name].pids)) for name in ways])
        named = {user: sum("lookup=" not in line for line in milter.lines(f" user={user} "))
                 for user in (SENDER, "root")}
    sent = (messages // 5 + rounds * messages) * len(loads)
    print(f"  {messages:,} messages at a time (opendkim a third, original a tenth), {rounds} times each, taking "
          "turns.\n"
          "  of null, of told: the medians of the rounds' ratios; null: a pymilter that adds a constant header\n"
          f"  told: the same, and told {'what ours is told' if same else 'OTHER THAN OURS, see steps'}; unanswered: "
          "told, and answers neither recipients nor headers\n"
          f"  opendkim: {lack or 'signs with a key of 2,048 bits, logs nothing'}\n"
          "  original: lsof -nPi for every connection, as the script of 2013 did\n"
          "  CPU: us a message, of the milter with its helper, and of Postfix, smtp-source and milter together\n"
          f"  ours named user and program for {named[SENDER]:,} of {SENDER}'s {sent:,} messages, {named['root']:,} of "
          f"root's {sent:,}")
    rows = []
    for (what, target), reached in TARGETS.items():
        cells = ["skipped" if lack and "OpenDKIM" in what else f"{reached(load):.2f}" for load in measured.values()]
        rows.append((what, target, *cells))
    table("Ours: what is aimed at, and what was reached", ["aimed at", *(" ".join(o) for o in loads.values())], rows)


def submit(quick: bool) -> None:
    """Hand messages to sendmail(1), four at a time, until all are gone from the queue; through each milter in turn."""
    rounds, messages = (3, 200) if quick else (9, 1000)
    call = f"seq {messages} | xargs -P 4 -n 1 sh -c 'echo | sendmail -f from@{mta.DOMAIN} to@{mta.DOMAIN}'"
    rates: dict[str, list[float]] = {"none": [], "null": [], "ours": []}
    used: dict[str, float] = dict.fromkeys(rates, 0.0)
    with contextlib.ExitStack() as stack:
        postfixes, pids = {}, {}
        for name in rates:
            main_cf = {"non_smtpd_milters": f"unix:private/{'milter' if name == 'ours' else name}.sock"}
            postfixes[name] = stack.enter_context(mta.Postfix(discard=True, main_cf=main_cf if name != "none" else {}))
            path = socket_of(postfixes[name], name)
            pids[name] = [] if name == "none" else \
                [stack.enter_context(other_milter(path, [mta.PYTHON, "-Bc", NULL, path], "postfix"))] if name == "null" else \
                [stack.enter_context(mta.Milter(postfixes[name])).pid]
        for round_, (name, postfix) in itertools.product(range(-1, rounds), postfixes.items()):  # the first is to warm up
            before, began = cpu_seconds(pids[name]), time.perf_counter()
            subprocess.run(mta.on_this_postfix(postfix, ["sh", "-c", call], SENDER), env={"PATH": mta.SYSTEM_PATH}, check=True)
            mta.wait_for(lambda: drained(postfix), 300, "the queue to be empty")  # noqa: B023
            if round_ >= 0:
                rates[name].append(messages / (time.perf_counter() - began))
                used[name] += (cpu_seconds(pids[name]) - before) / messages / rounds * 1e6
    table("Messages a second through sendmail(1), four at once", ["/s", "of none", "of null", "CPU: milter"],
          [(name, number(statistics.median(rates[name])), f"{of(rates[name], rates['none']):.2f}",
            f"{of(rates[name], rates['null']):.2f}", number(used[name])) for name in rates],
          [f"{messages:,} messages at a time, {rounds} times each, taking turns; CPU in us a message; none: no milter",
           "null: a pymilter that adds a constant header; Postfix's one pickup process takes them one by one"])


# What is said for one message, by the letters of the protocol (mta.STEPS).
WORDS = dict(zip("CHMRTLNBUE", "connect helo mail rcpt data header eoh body unknown eom".split()))


def said(path: str) -> dict[str, str]:
    """Give how each step is said to the milter that serves a socket, from the negotiated protocol."""
    with mta.Wire(path) as wire:
        return {**{step: "not sent" if wire.protocol & unwanted else
                   "sent, no answer" if wire.protocol & silent else "round trip"
                   for step, (unwanted, silent) in mta.STEPS.items()}, "bits": f"{wire.protocol:#x}"}


def told_the_same(postfix: mta.Postfix) -> bool:
    """Tell whether the milter that should be told what ours is told is."""
    told, ours = (said(socket_of(postfix, name)) for name in ("told", "ours"))
    return all(told[step] == ours[step] for step in WORDS)


def steps(quick: bool) -> None:
    """Show from the negotiated protocol what each milter is told, and what it has to answer."""
    del quick
    names = "null", "told", "ours"
    with milters(*names) as (postfix, _, _):
        columns = [said(socket_of(postfix, name)) for name in names]
    rows = [(word, *(column[step] for column in columns)) for step, word in WORDS.items()]
    trips = [sum(value == "round trip" for value in column.values()) + 1 for column in columns]
    table("What is said between MTA and milter", names,
          [("negotiation", *["round trip"] * len(names)), *rows, ("round trips in all", *trips),
           ("protocol bits", *(column["bits"] for column in columns))])


# --- start ----------------------------------------------------------------------------------------------------

def first_message(path: str, clients: mta.Clients) -> str:
    """Pass one message as soon as a milter serves a socket; give its header's value."""
    deadline = time.monotonic() + 20
    while True:
        try:
            wire = mta.Wire(path)
            break
        except OSError:
            assert time.monotonic() < deadline, f"nobody serves {path}"
            time.sleep(0.0005)
    accepted, address = clients.accepted.pop()
    with accepted:
        wire.connect(*address, daemon_addr="127.0.0.1", daemon_port=str(clients.port))
        accepted.recv(100)
        return mta.outcome(wire)


def start_of_ours(clients: mta.Clients) -> float:
    """Start the milter; give the seconds until the first message was served."""
    milter = mta.Milter()
    try:
        began = time.perf_counter()
        milter.start(wait=False)
        value = first_message(milter.socketname, clients)
        seconds = time.perf_counter() - began
    finally:
        milter.stop()
    assert value.startswith(f"user={SENDER} "), f"the first message was tagged {value}"
    return seconds


def start_of_null(clients: mta.Clients) -> float:
    """Do the same with the milter that does nothing."""
    with tempfile.TemporaryDirectory(prefix="milter-bench.") as directory:
        began = time.perf_counter()
        with subprocess.Popen([mta.PYTHON, "-c", NULL, f"{directory}/null.sock"], cwd="/") as process:
            try:
                first_message(f"{directory}/null.sock", clients)
                return time.perf_counter() - began
            finally:
                process.kill()


def start_of_python(code: str) -> float:
    """Have the interpreter run something; give the seconds it took."""
    began = time.perf_counter()
    subprocess.run([mta.PYTHON, "-c", code, str(mta.SCRIPT)], stdin=subprocess.DEVNULL, check=True, cwd="/")
    return time.perf_counter() - began


def imports_of(source: str) -> str:
    """Give the script's import statements, those in an if or a try as well, but none in a function."""
    nodes, found = list(ast.parse(source).body), []
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(ast.unparse(node))
        elif isinstance(node, (ast.If, ast.Try)):
            nodes[:0] = node.body
    return "\n".join(sorted(found, key=lambda line: "__future__" not in line)) + "\n"


def start(quick: bool) -> None:
    """Start the milter some times, and see when it serves."""
    imports = imports_of(mta.SCRIPT.read_text())
    rows: dict[str, tuple[str, list[float]]] = {
        name: (target, []) for name, target in {
            "python3, nothing else": "", "python3, and what the script imports": "",
            "python3, that, and the script compiled": "", "null: until the first message is served": "",
            "ours: until the first message is served": "at most 150"}.items()}
    rounds = 5 if quick else 25
    with mta.Clients(SENDER, 2 * (1 + rounds)) as clients:
        calls = [lambda: start_of_python("pass"), lambda: start_of_python(imports),
                 lambda: start_of_python(imports + "import sys\ncompile(open(sys.argv[1]).read(), 'it', 'exec')"),
                 lambda: start_of_null(clients), lambda: start_of_ours(clients)]
        for round_ in range(-1, rounds):  # the first is to warm up
            for (_, samples), call in zip(rows.values(), calls):
                samples += [call() * 1000] * (round_ >= 0)
    table(f"Time from start in ms, {rounds} times, taking turns", ["median", "fastest", "slowest", "aimed at"],
          [(name, *map(number, (statistics.median(samples), min(samples), max(samples))), target)
           for name, (target, samples) in rows.items()])


# --- profile --------------------------------------------------------------------------------------------------

Call = tuple[int, ...]  # how often; then ns: processor time, that of its own, time that passed


def with_timing(source: str, path: pathlib.Path) -> str:
    """Put what times its calls into the script's text, for a result in a file."""
    head, main_, tail = source.rpartition('\nif __name__ == "__main__":\n')
    assert main_, "the script does not end by calling main()"
    code = PROFILE.replace("FUNCTIONS", repr(FUNCTIONS))
    return f"{head}\n{code}\ntime_calls({str(path)!r})\n{main_}{tail}"


def calls_in(path: pathlib.Path) -> tuple[dict[str, Call], dict[str, Call]]:
    """Read what was counted up to now, in the milter and in the helper."""
    names = pathlib.Path(f"{path}.names").read_text().splitlines()
    slots = memoryview(path.read_bytes()).cast("Q").tolist()
    milter, helper = ({name: tuple(slots[at + 4 * n:at + 4 * n + 4]) for n, name in enumerate(names)}
                      for at in (0, len(slots) // 2))
    return milter, helper


def per_message(before: dict[str, Call], after: dict[str, Call], messages: int) -> dict[str, list[float]]:
    """Give what was added for each message, the times in us; only what was called."""
    added = {name: [new - old for old, new in zip(before[name], after[name])] for name in after}
    return {name: [calls / messages, *(ns / messages / 1000 for ns in times)]
            for name, (calls, *times) in added.items() if calls}


def call_rows(calls: dict[str, list[float]], first: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Write what was called: the named ones in their order, then the others, the dearest first."""
    names = [name for name in first if name in calls]
    names += sorted(calls.keys() - set(names), key=lambda name: -calls[name][2])
    return [(f"  {name}", f"{calls[name][0]:.2f}", *map(number, calls[name][1:])) for name in names
            if name in first or calls[name][1] >= 0.1]


def profile(quick: bool) -> None:
    """Send through a copy of the script that times its calls, and show where a message's processor time goes."""
    messages, rounds = (1000, 2) if quick else (3000, 5)
    with tempfile.TemporaryDirectory(prefix="milter-bench.") as directory, contextlib.ExitStack() as stack:
        path, copy = pathlib.Path(directory) / "calls", pathlib.Path(directory) / "milter_sysuser.py"
        path.write_bytes(bytes(2 * 4 * 8 * 256))  # two times 256 functions
        copy.write_text(with_timing(mta.SCRIPT.read_text(), path))
        timed = mta.Milter(script=copy)
        stack.callback(timed.stop)
        timed.start()
        postfix, _, ways = stack.enter_context(milters("told", "ours", timed=timed.socketname))
        pids = {"told": ways["told"].pids, "ours": ways["ours"].pids[:1], "its helper": ways["ours"].pids[1:],
                "timed": [timed.pid], "its helper, timed": timed.helper_pids()}
        used: dict[str, list[float]] = {name: [] for name in pids}
        for round_ in range(-1, rounds):  # the first is to warm up
            if round_ == 0:
                first = calls_in(path)
            before = {name: cpu_seconds(pids[name]) for name in pids}
            for name in "told", "ours", "timed":
                send(postfix, postfix.ports[name], messages if round_ >= 0 else messages // 5, "-s", "10")
            for name in pids:
                used[name] += [(cpu_seconds(pids[name]) - before[name]) / messages * 1e6] * (round_ >= 0)
        last = calls_in(path)
    total = {name: statistics.mean(samples) for name, samples in used.items()}
    milter, helper = (per_message(*both, messages * rounds) for both in zip(first, last))
    rest = total["timed"] - sum(values[2] for values in milter.values())
    rest_helper = total["its helper, timed"] - sum(values[2] for values in helper.values())
    callbacks = [f"SysuserMilter.{name}" for name in CALLBACKS]
    table("Where the processor time of one message goes (10 connections at once, one message each)",
          ["calls", "CPU", "of its own", "passed"],
          [("a pymilter that is told the same", "", number(total["told"]), "", ""),
           ("ours, as it is: milter", "", number(total["ours"]), "", ""),
           ("ours, as it is: helper", "", number(total["its helper"]), "", ""),
           ("ours, timed: milter", "", number(total["timed"]), "", ""),
           *call_rows(milter, callbacks),
           ("  outside of these: pymilter, libmilter, the kernel", "", "", number(rest), ""),
           ("ours, timed: helper", "", number(total["its helper, timed"]), "", ""),
           *call_rows(helper), ("  outside of these: receiving, sending", "", "", number(rest_helper), "")],
          ["us a message; of its own: less what the other timed calls in it took; passed: with waiting for others",
           f"{messages:,} messages at a time, {rounds} times each, taking turns; the timing itself costs what the "
           "timed copy takes more"])


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
    sections = "lookups", "sockets", "throughput", "submit", "steps", "start", "profile", "memory"
    parser = argparse.ArgumentParser(description="Measure what naming a sender costs, next to what else there is.")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter")
    parser.add_argument("section", nargs="*", metavar="SECTION", help=f"{', '.join(sections)}; all if none is named")
    parser.add_argument("--beside", metavar="SCRIPT", type=pathlib.Path,
                        help="another version of the script, for throughput: before")
    options = parser.parse_args()
    global BESIDE
    BESIDE = options.beside
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
        for section in throughput, submit, steps, start, profile, memory:
            if section.__name__ in wanted:
                section(options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
