#!/usr/bin/python3
# SPDX-License-Identifier: MIT
# mypy: disable-error-code="var-annotated"
"""Say which system user and which program sent each message that came in by SMTP to localhost.

A milter for Postfix and Sendmail. Every message from a local SMTP client gets a header and a log line:

    X-Sender-Process-Info: user=stefan program=telnet

    4Zb9Xk1c2Tz3: client=127.0.0.1:43210 user=stefan uid=1001 program=telnet pid=4711 exe=/usr/bin/telnet
    dir=/home/stefan unit=session-3.scope from=stefan@example.org rcpts=1 action=tag      (one line)

The user is the one who made the client's socket, as the kernel's sock_diag says it: blocking and limits rest
on that alone. The program is what holds the socket at the time: a description, never a credential. What is
not known is written "?", and is never turned into root or into somebody else.

It cannot know who is behind a relay on this host (docker-proxy, another network namespace, XCLIENT or PROXY),
and it promises nothing against root. README.md has the whole list.
"""
import sys

if sys.version_info < (3, 9):
    sys.stderr.write("milter_sysuser: needs Python 3.9 or newer, this is %s\n" % sys.version.split()[0])
    sys.exit(78)

import argparse
import contextlib
import ctypes
import errno
import functools
import grp
import ipaddress
import itertools
import json
import os
import pwd
import queue
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future, TimeoutError as LateError, wait as wait_for
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Optional

try:
    import Milter
    import psutil
except ImportError as missing:
    sys.stderr.write("milter_sysuser: %s: install pymilter and psutil "
                     "(Debian: python3-milter python3-psutil)\n" % missing)
    sys.exit(78)

VERSION = "1.0"

# =============================================================================================== settings
# Plain values, one name each. Edit, then run "milter_sysuser.py --check", then restart the milter.

# The unix socket the MTA connects to: an absolute path, at most 107 bytes, in a directory that run_as_user may
# write to. Only that user (and root) may connect to it. Postfix's smtpd is chrooted on some systems: a path
# below /var/spool/postfix works either way, named without that prefix in main.cf (unix:private/milter.sock).
socketname = "/var/spool/postfix/private/milter.sock"

# Seconds to wait for the MTA to go on with a message before its connection is dropped. An SMTP client that
# thinks for longer than this between two commands finds its next message untagged. 0: 24 days, the longest there is.
timeout = 600

# The user to become when started as root, for good; the user the MTA's smtpd runs as. Already being that user
# is fine. None: stay as started, which for root means root in the process that faces the mail, and a socket that
# only root may connect to.
run_as_user = "postfix"

# Who may not send mail: user names, numeric uids, "@group" for everyone in a group.
# Example: ["bob", 1004, "@suspended"]
blocked_mailusers = []

# A file with one such entry a line, "#" begins a comment; read again when it changes, without a restart. It must
# belong to root or run_as_user and be writable by its owner only. Put a new one in place by rename (mv): a file
# edited in place is empty for a moment. Example: "/etc/milter_sysuser.blocked"
blocked_mailusers_file = None

# What happens to a blocked user's mail: "reject" (550), "tempfail" (450: the sender tries again), "quarantine"
# (the MTA's hold queue), or "log" (passed and tagged, and the log says what would have been done: a dry run).
blocked_action = "reject"

# What happens to local mail whose owner is unknown: "accept" (tagged user=?), "tempfail", "quarantine" or
# "reject". The trap: a user can arrange to be unknown by closing the connection early, so with "accept" a
# blocked user's mail can still pass that way, unnamed; with the others a client that is merely hasty is refused.
unidentified_action = "accept"

# How many recipients a user may address in any hour: by name, "*" for everyone else, None for no limit. The
# count is lost at a restart. Example: {"*": 200, "www-data": 1000, "root": None}
hourly_limits = {}

# The name of the header that is added, and removed wherever else it comes from.
header_name = "X-Sender-Process-Info"

# What the header says, in this order: user, uid, program, pid, exe, args (the command line, which can hold
# passwords), dir (working directory), unit (systemd unit or container). The header leaves with the mail.
# []: no header is added; forged ones are still removed.
header_fields = ["user", "program"]

# The same choice for the log.
log_fields = ["user", "uid", "program", "pid", "exe", "dir", "unit"]

# How lsof is called where this is not started as root; sudoers.example has the rule it needs.
# []: never; the program is then "?" for other users' processes.
lsof_command = ["sudo", "-n", "/usr/bin/lsof"]
# ========================================================================================== end of settings

FIELDS = ("user", "uid", "program", "pid", "exe", "args", "dir", "unit")
WANTED = tuple(field for field in FIELDS  # a setting that is no list is reported later
               if any(isinstance(chosen, list) and field in chosen for chosen in (header_fields, log_fields)))
ERROR, WARNING, INFO = 3, 4, 6  # syslog(3)
LEVELS = {ERROR: "ERROR", WARNING: "WARNING", INFO: "INFO"}
REFUSALS = {"reject": ("550", "5.7.1"), "tempfail": ("450", "4.7.1")}  # RFC 5321, 4.2.3; RFC 3463, 3.8

EX_CONFIG = 78  # sysexits.h
STOP_SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
LONGEST_TIMEOUT = 2_147_483  # seconds; libmilter gives poll(2) milliseconds in an int
MOST_FORGED = 100  # removing n headers takes the MTA n * n steps
HELPER_SECONDS = 0.3  # what a connection waits at most for its description, its turn included
MOST_WAITING = 1000  # questions that the helper has taken and not answered yet
SEARCH_SECONDS, SEARCH_LINKS = 0.2, 300_000  # what one search may cost; a descriptor is listed, and then read
HOT_SECONDS = 2.0  # how long a user whose search ran over that waits for the next, so that others get theirs
LSOF_SECONDS, LSOF_PROCESSES, LSOF_PIDS = 2.0, 4, 4000  # 4,000 pids are 32 kB; one argument may be 128 KiB
ARGS_SECONDS = 0.05  # reading a command line can be made to hang
FACT_BYTES = 512  # of each fact from the process table
VALUE_CHARACTERS = 256  # of each value in a header, reply or log line
LINE_OCTETS = 998  # RFC 5322, 2.1.1
LINE_BYTES = 4000  # of a line in the log: a pipe that is ready takes a page
NAME_SECONDS, REFRESH_SECONDS = 0.3, 60  # to wait for a name that is not known yet; to believe one that is
MOST_REMEMBERED = 10_000  # users or sockets in each memory; the longest unused is forgotten first
MOST_FILE_BYTES = 1 << 20
MOST_FILES = 65536  # open at once; each connection takes a few, and lsof closes as many one by one before it begins

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, linux/tcp.h, net/tcp_states.h
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 0x1, 0x300, 2, 3
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
INET_DIAG_INFO, INET_DIAG_CGROUP_ID = 2, 21
TCPI_BYTES_RECEIVED = 128  # offset in struct tcp_info, since Linux 4.1
# ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING: the states in which a message may be under way
STATES = {1, 4, 5, 8, 9, 11}
LOOPBACK = 1  # LOOPBACK_IFINDEX in net/flow.h: the index of lo, in every network namespace
OVERFLOW_UID = 65534  # what a user namespace shows for a uid it does not map (user_namespaces(7))
# linux/capability.h, linux/prctl.h, linux/exportfs.h
CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE = 2, 19  # both, to see what files other users' processes have open
LINUX_CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
FILEID_KERNFS = 0xFE
M_ARENA_MAX = -8  # malloc.h of glibc

LINUX = sys.platform.startswith("linux")
LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL: calls keep the interpreter's lock, see sock_diag
LIBC_UNLOCKED = ctypes.CDLL(None, use_errno=True)  # CDLL: they give it up
idle_netlink: deque[int] = deque()  # the socket to ask the kernel through, while no thread does
ENTRY = re.compile(r"@?[^\s\x00-\x1f\x7f\ud800-\udfff@:#*][^\s\x00-\x1f\x7f\ud800-\udfff:#*]*")


# ------------------------------------------------------------------------------------------------- values
class Endpoint(NamedTuple):
    """One end of a TCP connection; a v4-mapped address is stored as the four bytes it stands for."""

    address: bytes
    port: int


class Diag(NamedTuple):
    """What the kernel says of one socket (struct inet_diag_msg and attributes)."""

    state: int
    source: Endpoint
    destination: Endpoint
    uid: int
    inode: int
    cookie: int  # the kernel's number of this one socket, never used again
    cgroup: int  # inode number of the cgroup v2 directory; 0 where the kernel does not say (before 5.8)
    read: Optional[int]  # bytes that were received and that a process has taken; None where the kernel does not say


class Owner(NamedTuple):
    """Whose the client's end of a connection is."""

    uid: Optional[int]  # None: not known
    why: str = ""  # one word, where uid is None
    inode: int = 0  # 0: no process has it open any more
    cgroup: int = 0
    cookie: Any = None  # of the MTA's end, which is one connection's and no other's; see Diag
    server: Endpoint = Endpoint(b"", 0)  # the MTA's end
    interface: int = 0  # the index under which the kernel found it
    read: int = 0  # bytes the MTA had read from the connection when this was asked
    process: Optional[psutil.Process] = None  # that has it; only where there is no sock_diag


class Person(NamedTuple):
    """A user as the directory service (NSS) knows it."""

    uid: int  # of the account; for a delegated uid that of the user it was delegated to
    name: Optional[str] = None  # None: no such user, or not known yet
    gid: Optional[int] = None
    settled: bool = False  # whether the directory has answered


class Entries(NamedTuple):
    """A block list, resolved."""

    uids: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    gids: frozenset[int] = frozenset()
    unresolved: frozenset[str] = frozenset()


Facts = dict[str, Any]  # of one process: FIELDS less user and uid, "holders" (uids), or "why" they are unknown


class Sender(NamedTuple):
    """Who sent a message, and with what."""

    person: Optional[Person]  # None: not known
    uid: Optional[int]  # as the kernel gave it
    facts: Facts
    why: str  # one word, where something is not known
    suspects: tuple[Person, ...]  # the person; or whoever it may have been
    holder: Optional[Person] = None  # who has the socket, if that is somebody else


class Verdict(NamedTuple):
    """What becomes of a message."""

    action: str
    reason: str = ""
    text: str = ""  # of the reply


class BusyError(Exception):
    """A search has used up its budget."""


# ------------------------------------------------------------------------------------------ pure functions
def escape(data: bytes) -> str:
    """Write every control, non-ASCII and undecodable byte as backslash, x and two hexadecimal digits."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data)


def quote(value: Any) -> str:
    """Make a value fit for a header, a reply or a log line; None is written "?"."""
    return "?" if value is None else quoted(value if isinstance(value, bytes) else str(value))


@functools.lru_cache(maxsize=1024)  # the same few stand in every line
def quoted(text: "bytes | str") -> str:
    """Do what quote does, for bytes and text."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape" if not re.search(
        "[\ud800-\udc7f\udd00-\udfff]", text) else "surrogatepass")
    if len(data) <= VALUE_CHARACTERS and re.fullmatch(rb"[A-Za-z0-9._+@/:-]+", data):
        return data.decode()
    pieces = [escape(b"\\" + bytes([b]) if b in b'"\\' else bytes([b])) for b in data[:VALUE_CHARACTERS + 1]]
    lengths = list(itertools.accumulate(map(len, pieces)))
    if lengths and lengths[-1] > VALUE_CHARACTERS:
        pieces = [piece for piece, length in zip(pieces, lengths) if length <= VALUE_CHARACTERS - 3] + ["..."]
    return '"' + "".join(pieces) + '"'


def key_values(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """Write pairs as key=value, values quoted."""
    return [f"{key}={quote(value)}" for key, value in pairs]


def fold(words: list[str], taken: int) -> str:
    """Join words with blanks, breaking lines between them so that none passes 998 octets; taken: the name's."""
    lines, room = [""], LINE_OCTETS - taken
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
            room = LINE_OCTETS - 1
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n\t".join(lines)


def endpoint(address: str, port: int) -> Endpoint:
    """Read an address as an MTA writes it ("IPv6:::1", "[::1]", "fe80::1%eth0"); ValueError if it is none."""
    return Endpoint(packed(address), port)


@functools.lru_cache(maxsize=1024)
def packed(address: str) -> bytes:
    """Give an address as its four or sixteen bytes; ValueError if it is none."""
    ip = ipaddress.ip_address(re.sub(r"^\[?(?i:IPv6:)?|\]$|%.*$", "", address))
    return (getattr(ip, "ipv4_mapped", None) or ip).packed


def diag_request(source: Endpoint, destination: Endpoint, interface: int, flags: int = 0) -> bytes:
    """Build a struct nlmsghdr and inet_diag_req_v2 for one socket, given by both ends."""
    family = socket.AF_INET6 if len(source.address or destination.address) == 16 else socket.AF_INET
    states = sum(1 << state for state in STATES)
    return (struct.pack("=IHHII", 72, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | flags, 0, 0)
            + struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0, states)
            + struct.pack(">HH16s16s", source.port, destination.port, source.address, destination.address)
            + struct.pack("=IQ", interface, 0xFFFFFFFFFFFFFFFF))  # INET_DIAG_NOCOOKIE twice


def diag_replies(data: bytes) -> Iterator[Optional[Diag]]:
    """Read the kernel's messages; None is the end of a dump; OSError with the errno the kernel gives."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if kind == NLMSG_ERROR:
            code = -struct.unpack_from("=i", data, at + 16)[0]
            raise OSError(code, os.strerror(code))
        if kind == NLMSG_DONE:
            yield None
            return
        if length < 88 or at + length > len(data):
            raise OSError(0, "sock_diag gave a message that is cut short")
        yield diag_message(data[at + 16:at + length])
        at += (length + 3) & ~3


def diag_message(body: bytes) -> Diag:
    """Read one struct inet_diag_msg with its attributes."""
    family, state, sport, dport, source, destination, _, cookie = struct.unpack_from("=BB2x2s2s16s16sIQ", body)
    unread, _, uid, inode = struct.unpack_from("=IIII", body, 56)  # idiag_rqueue, idiag_wqueue
    mapped = b"\0" * 10 + b"\xff\xff"
    ends = []
    for address, port in ((source, sport), (destination, dport)):
        short = address[:4] if family == socket.AF_INET else address[12:] if address.startswith(mapped) else address
        ends.append(Endpoint(short, int.from_bytes(port, "big")))
    cgroup, read, at = 0, None, 72
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if kind == INET_DIAG_CGROUP_ID:
            cgroup = struct.unpack_from("=Q", body, at + 4)[0]
        elif kind == INET_DIAG_INFO and length >= 4 + TCPI_BYTES_RECEIVED + 8:
            read = struct.unpack_from("=Q", body, at + 4 + TCPI_BYTES_RECEIVED)[0] - unread
        at += max((length + 3) & ~3, 4)
    return Diag(state, ends[0], ends[1], uid, inode, cookie, cgroup, read)


def unit_of(cgroups: str) -> Optional[str]:
    """Find the first .service or .scope from the root in /proc/PID/cgroup; users can make others below theirs."""
    paths = [line.split(":", 2)[2] for line in cgroups.splitlines() if re.match(r"0::|\d+:name=systemd:", line)]
    for part in "/".join(paths).split("/"):
        if part.endswith((".service", ".scope")):
            return part
    return next((path for path in paths if path.strip("/")), None)


def lsof_holder(output: bytes, inode: int) -> Optional[int]:
    """Find in the output of lsof -Fpd the process that has the socket with that inode; None if there is none."""
    pid = None
    for line in output.split(b"\n"):
        if line[:1] == b"p" and line[1:].isdigit():
            pid = int(line[1:])
        elif line == b"d%d" % inode:
            return pid
    return None


def is_blocked(person: Person, uid: Optional[int], entries: Entries) -> Optional[bool]:
    """Match by uid, the person's or the one that the kernel gave, name and group; None: this cannot be told yet."""
    if person.uid in entries.uids or uid in entries.uids or person.name in entries.names or person.gid in entries.gids:
        return True
    doubtful = person.name is None and (entries.unresolved or entries.gids or not person.settled) and any(entries)
    return None if doubtful else False


def entry_problem(entry: Any) -> Optional[str]:
    """Say what is wrong with an entry of a block list, None if it is well."""
    number = int(entry) if isinstance(entry, str) and re.fullmatch("[0-9]{1,10}", entry) else entry
    if whole(number) and number < 1 << 32:
        return None
    if isinstance(entry, str) and ENTRY.fullmatch(entry) and not entry.isdigit():  # such as "²", which is no number
        return None
    return f"{entry!r} is not a user name, a numeric uid or \"@group\""


def whole(value: Any) -> bool:
    """Tell whether it is a whole number that is not negative; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    """Put an entry at the end of a memory that is bounded; what was put there the longest ago is forgotten first."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > MOST_REMEMBERED:
        del memory[next(iter(memory))]


# ------------------------------------------------------------------------- settings: every rule in one place
def settings_problems(values: dict[str, Any]) -> Iterator[str]:
    """Check all settings; yield one sentence a problem, naming the setting, its value and the rule."""
    for name, problem in itertools.chain(path_problems(values), list_problems(values), user_problems(values)):
        yield f"{name} = {values[name]!r}: {problem}"
    if not whole(values["timeout"]) or values["timeout"] > LONGEST_TIMEOUT:
        yield f"timeout = {values['timeout']!r}: must be a whole number of seconds from 0 to {LONGEST_TIMEOUT}"
    for name, actions in (("blocked_action", ("reject", "tempfail", "quarantine", "log")),
                          ("unidentified_action", ("accept", "tempfail", "quarantine", "reject"))):
        if values[name] not in actions:
            yield f"{name} = {values[name]!r}: must be one of " + ", ".join(map(repr, actions))
    header = values["header_name"]
    if not isinstance(header, str) or not re.fullmatch(r"[!-9;-~]{1,76}", header):
        yield f"header_name = {header!r}: must be 1 to 76 printable ASCII characters, no blank, no colon (RFC 5322)"


def path_problems(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the socket's path and directory."""
    path = values["socketname"]
    if not isinstance(path, str) or not path.startswith("/") or not path.isprintable() or len(os.fsencode(path)) > 107:
        yield "socketname", "must be an absolute path of at most 107 bytes, all printable"
    elif not os.path.isdir(os.path.dirname(path)):
        yield "socketname", f"there is no directory {os.path.dirname(path)}"
    else:
        user = account(values["run_as_user"])
        directory = os.stat(os.path.dirname(path))
        if user and not may_write(directory, user):
            yield "socketname", f"user {user.pw_name} may not write to {os.path.dirname(path)}"
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            yield "socketname", "there is something at that path that is not a socket"


def list_problems(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the settings that are lists."""
    for name in ("header_fields", "log_fields"):
        if not isinstance(values[name], list) or any(field not in FIELDS for field in values[name]):
            yield name, "must be a list of " + ", ".join(FIELDS)
        elif len(set(values[name])) < len(values[name]):
            yield name, "names a field twice"
    if not isinstance(values["blocked_mailusers"], list):
        yield "blocked_mailusers", 'must be a list, like ["bob"]'
    else:
        for problem in filter(None, map(entry_problem, values["blocked_mailusers"])):
            yield "blocked_mailusers", problem
    command = values["lsof_command"]
    if not isinstance(command, list) or not all(isinstance(w, str) and w and "\0" not in w for w in command):
        yield "lsof_command", "must be a list of words, or []"


def user_problems(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check run_as_user, the block list's file and the limits."""
    user, name = account(values["run_as_user"]), values["run_as_user"]
    if name is not None and user is None:
        yield "run_as_user", "there is no such user"
    elif user and os.geteuid() not in (0, user.pw_uid):
        yield "run_as_user", f"started under uid {os.geteuid()}, which is neither root nor that user"
    file = values["blocked_mailusers_file"]
    if isinstance(file, str) and file.startswith("/"):
        try:
            read_entries(file, user.pw_uid if user else os.geteuid())
        except (OSError, ValueError) as error:
            yield "blocked_mailusers_file", str(error)
    elif file is not None:
        yield "blocked_mailusers_file", "must be an absolute path, or None"
    limits = values["hourly_limits"]
    if not isinstance(limits, dict):
        yield "hourly_limits", 'must be like {"*": 200, "root": None}'
        return
    for key, limit in limits.items():
        if key != "*" and not whole(key) and account(key) is None:
            yield "hourly_limits", f"there is no user {key!r}"
        if limit is not None and not whole(limit):
            yield "hourly_limits", f"{key!r}: a limit is a whole number of recipients, or None"


def account(name: Any) -> Optional[pwd.struct_passwd]:
    """Look a user up by name; None if there is none of that name."""
    try:
        return pwd.getpwnam(name)
    except (KeyError, TypeError, ValueError):
        return None


def may_write(directory: os.stat_result, user: pwd.struct_passwd) -> bool:
    """Tell whether a user, without supplementary groups, may make files in a directory."""
    mode = directory.st_mode >> (6 if directory.st_uid == user.pw_uid else 3 if directory.st_gid == user.pw_gid else 0)
    return user.pw_uid == 0 or mode & 3 == 3


def read_entries(path: str, owner: int) -> list[Any]:
    """Read a block list's file, which root or that owner must own; OSError or ValueError if it may not be trusted."""
    # non-blocking: it may be a FIFO
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if status.st_uid not in (0, owner) or status.st_mode & 0o022:
            raise ValueError(f"{path} must belong to root or run_as_user and be writable by its owner only")
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MOST_FILE_BYTES} bytes")
    entries = [line.split("#", 1)[0].strip() for line in data.decode("utf-8").split("\n")]
    for number, entry in enumerate(entries, 1):
        problem = entry and entry_problem(entry)
        if problem:
            raise ValueError(f"{path}, line {number}: {problem}")
    return [entry for entry in entries if entry]


# ---------------------------------------------------------------------------------------------------- log
saying = threading.RLock()  # a signal's handler may speak while the same thread does


def say(level: int, text: str) -> None:
    """Write one line, quoted by the caller, to stderr: for journald with its level (sd-daemon(3)), else with time."""
    # A full disk or a closed pipe must not reach the mail; and a pipe that takes one line might not take two.
    with contextlib.suppress(OSError), saying:
        status = os.fstat(2)  # which is there, see main; the journal's are in JOURNAL_STREAM (systemd.exec(5))
        journalled = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        stamp = f"<{level}>" if journalled else f"{time.strftime('%Y-%m-%d %H:%M:%S')} {LEVELS[level]} "
        data = (stamp + text).encode("utf-8", "backslashreplace")[:LINE_BYTES] + b"\n"
        if select.select([], [2], [], 0)[1]:  # else nobody reads, and the line is lost
            os.write(2, data)


class Complaints:
    """Log a fault that may repeat for every connection once a minute, with a count."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, int]] = {}

    def __call__(self, text: str, detail: str = "") -> bool:
        """Log an error unless the same text was logged in the last minute; tell whether it was."""
        last, count = self.seen.get(text, (float("-inf"), 0))
        if time.monotonic() - last < REFRESH_SECONDS:
            self.seen[text] = last, count + 1
            return False
        self.seen[text] = time.monotonic(), 0
        say(ERROR, text + (f": {quote(detail)}" if detail else "") + (f" ({count} more before)" if count else ""))
        return True


complain = Complaints()


def report_exception(kind: Any, error: Any, trace: Any) -> None:
    """Log a traceback; pymilter's own, from bytes it could not decode, come here as sys.excepthook."""
    if complain(f"a callback failed: {kind.__name__}"):
        for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
            say(ERROR, "  " + escape(line.encode("utf-8", "backslashreplace")))


# -------------------------------------------------------------------------------------- the kernel's answer
def sock_diag(request: bytes) -> list[Diag]:
    """Ask the kernel; [] if it has no such socket, OSError with its errno if it refuses. Takes no privilege, and 10 us.

    Through ctypes, which keeps the interpreter's lock: the answer is there when send(2) returns, and to give the
    lock up and get it back costs several times as much where many connections are under way. A dump goes through all
    sockets of the host, which takes up to milliseconds, and gives it up.
    """
    found: list[Diag] = []
    dump = struct.unpack_from("=H", request, 6)[0] & NLM_F_DUMP
    answer = ctypes.create_string_buffer(16384 if dump else 2048)
    try:
        netlink = idle_netlink.pop()
    except IndexError:
        netlink = checked(LIBC.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG))
    try:
        library = LIBC_UNLOCKED if dump else LIBC
        checked(library.send(netlink, request, len(request), 0))
        more = True
        while more:
            length = checked(library.recv(netlink, answer, len(answer), socket.MSG_DONTWAIT))
            replies = list(diag_replies(ctypes.string_at(answer, length)))
            found += filter(None, replies)
            more = bool(dump) and None not in replies
    except FileNotFoundError:
        pass  # an answer like any other
    except BaseException:
        LIBC.close(netlink)  # what is left in it would be taken for the answer to the next question
        raise
    if dump or idle_netlink:  # many can be under way at once, and as many sockets would be kept
        LIBC.close(netlink)
    else:
        idle_netlink.append(netlink)
    return found


def checked(result: int) -> int:
    """Pass on what a C function returned; OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def find_socket(source: Endpoint, destination: Endpoint, interface: int) -> Optional[Diag]:
    """Ask for one socket by both ends; None if there is none, and never a listener that the kernel offers instead."""
    for diag in sock_diag(diag_request(source, destination, interface)):
        if diag.source == source and diag.destination == destination and diag.state in STATES:
            return diag
    return None


def own_end(client: Endpoint, port: int) -> Optional[Endpoint]:
    """Read the server's end from the MTA's accepted socket; None if there is none, or several; port: 0 if not known."""
    ends = {diag.source for address in (b"\0" * 4, b"\0" * 16)
            for diag in sock_diag(diag_request(Endpoint(address, port), Endpoint(b"", client.port), 0, NLM_F_DUMP))
            if diag.destination == client and diag.inode and port in (0, diag.source.port)}  # inode: it is accepted
    return ends.pop() if len(ends) == 1 else None


def is_local(address: bytes) -> bool:
    """Tell whether an address is this host's, by binding it; OSError if that cannot be told."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    text = socket.inet_ntop(family, address)
    with contextlib.suppress(FileNotFoundError):
        with open(f"/proc/sys/net/ipv{4 if len(address) == 4 else 6}/ip_nonlocal_bind", "rb") as file:
            if file.read().strip() != b"0":  # then everything can be bound
                own = {a.address.split("%")[0] for nics in psutil.net_if_addrs().values() for a in nics}
                return text in own or ipaddress.ip_address(address).is_loopback
    scopes = [index for index, _ in socket.if_nameindex()] if address[:1] == b"\xfe" else [0]
    for scope in scopes:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((text, 0) if family == socket.AF_INET else (text, 0, 0, scope))
                return True
            except OSError as error:
                if error.errno == errno.EADDRINUSE:  # no port is free, but the address is ours
                    return True
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EINVAL):
                    raise
    return False


def find_owner(client: Endpoint, server: Optional[Endpoint]) -> Optional[Owner]:
    """Ask the kernel whose the client's end is; None if the client is not on this host.

    server: None where the MTA did not say. Raises OSError if the kernel refuses to answer.
    """
    if server is None or not server.port or not any(server.address):
        server = own_end(client, server.port if server else 0)
    if server is None:
        return Owner(None, "closed") if is_local(client.address) else None
    # A socket bound to a device is found under that device's index only, any other under every index.
    interface, diag = LOOPBACK, find_socket(client, server, LOOPBACK)
    if diag is None and not is_local(client.address):
        return None
    for index, _ in socket.if_nameindex() if diag is None else ():
        interface, diag = index, find_socket(client, server, index)
        if diag:
            break
    if diag is None:
        accepted = find_socket(server, client, 0)
        return Owner(None, "redirected" if accepted and accepted.inode else "closed")
    if not diag.uid and not diag.inode:
        return Owner(None, "closed")  # an orphan: the kernel has forgotten whose it was
    if diag.uid == OVERFLOW_UID and mapped_uids() < 1 << 32:
        return Owner(None, "error")
    accepted = find_socket(server, client, interface)
    if accepted is None or not accepted.inode:  # the MTA has accepted the one it asks about: this is a later one
        return Owner(None, "reused")
    return Owner(diag.uid, "", diag.inode, diag.cgroup, accepted.cookie, server, interface, accepted.read or 0)


def same_socket(client: Endpoint, owner: Owner) -> str:
    """Ask again, when the message is complete; give the reason why the owner must not be believed, or "".

    Only the MTA's end is asked about: while it lives, the client's end cannot change hands. A pair that has come in
    their place since the first look has another cookie. From one that came before it the MTA reads nothing (past a TLS
    handshake at once) until it has shown that one to the milter, too, and then both are known to be shared.
    """
    accepted = find_socket(owner.server, client, owner.interface)
    if accepted is None:
        return "closed"
    return "" if accepted.cookie == owner.cookie and (accepted.read or 0) > owner.read else "reused"


def find_owner_psutil(client: Endpoint, server: Optional[Endpoint]) -> Optional[Owner]:
    """Do what find_owner does where there is no sock_diag: it gives the holder for the owner, and takes long."""
    connections = [(endpoint(*c.laddr), endpoint(*c.raddr), c.pid)
                   for c in psutil.net_connections("tcp") if c.raddr]
    if server is None or not server.port or not any(server.address):
        ends = {near for near, far, _ in connections if far == client}
        server = ends.pop() if len(ends) == 1 else None
    for near, far, pid in connections:
        if server and (near, far) == (client, server):
            if pid is None:  # psutil.Process(None) would be this process
                return Owner(None, "not-permitted")
            holder = psutil.Process(pid)
            return Owner(holder.uids().effective, "", 0, 0, (client, pid), server, 0, 0, holder)
    return Owner(None, "closed") if is_local(client.address) else None


def same_socket_psutil(client: Endpoint, owner: Owner) -> str:
    """Do what same_socket does where there is no sock_diag."""
    again = find_owner_psutil(client, owner.server)
    return "" if again and again.cookie == owner.cookie else "reused"


def kernel_problem() -> str:
    """Try sock_diag on a connection of our own; give what is wrong, or ""; OSError if there can be no connection."""
    if not LINUX:
        return "there is no sock_diag here"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as connection:
            client, server = endpoint(*connection.getsockname()), endpoint(*connection.getpeername())
            try:
                diag = find_socket(client, server, LOOPBACK)
            except OSError as error:
                return f"sock_diag: {error.strerror}"
            if diag is None:
                return "sock_diag does not find a connection that exists (is the tcp_diag module there?)"
            if (diag.uid, diag.inode) != (os.geteuid(), os.fstat(connection.fileno()).st_ino):
                return "sock_diag gives a wrong owner for a connection of our own"
            return "" if diag.read is not None else "sock_diag does not count bytes received (Linux 4.1 does)"


@functools.lru_cache(maxsize=1)  # it is written once
def mapped_uids() -> int:
    """Count the uids that this process's user namespace maps; 1 << 32 is all of them, as on the host itself."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return sum(int(line.split()[2]) for line in file) + 1
    except FileNotFoundError:  # a kernel without user namespaces
        return 1 << 32


# ------------------------------------------------------------------------------------------- the directory
class Workers:
    """A few threads for calls that can take long: a fixed number, behind a queue that has an end."""

    def __init__(self, threads: int, waiting: int) -> None:
        self.jobs: queue.Queue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.Queue(waiting)
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a function called; queue.Full if too many wait for that."""
        future: Future[Any] = Future()
        self.jobs.put_nowait((future, function, arguments))
        return future

    def _work(self) -> None:
        while True:
            future, function, arguments = self.jobs.get()
            try:
                future.set_result(function(*arguments))
            except Exception as error:  # it belongs to whoever waits for the result
                future.set_exception(error)


@functools.lru_cache(maxsize=1)
def delegated_ranges(state: tuple[int, ...]) -> list[tuple[int, int, str]]:
    """Read /etc/subuid (subuid(5)): first uid, count, user name or number; state: of the file when it was read."""
    with open("/etc/subuid", encoding="utf-8", errors="surrogateescape") as file:
        parts = [line.strip().split(":") for line in file]
    return [(int(part[1]), int(part[2]), part[0]) for part in parts
            if len(part) == 3 and part[1].isdigit() and part[2].isdigit()]


def delegated_to(uid: int) -> list[str]:
    """Give the users (names or numbers) to whom a uid is delegated; [] if only to root, who can take any without."""
    try:
        status = os.stat("/etc/subuid")
    except FileNotFoundError:
        return []
    ranges = delegated_ranges((status.st_ino, status.st_size, status.st_mtime_ns))
    owners = [owner for first, count, owner in ranges if first <= uid < first + count]
    return owners if set(owners) - {"root", "0"} else []


def delegates(uid: int) -> tuple[Person, ...]:
    """Give those users as they stand in the file: they may be blocked even while the directory does not answer."""
    with contextlib.suppress(OSError, ValueError):
        return tuple(Person(int(owner) if owner.isdigit() else uid, owner) for owner in delegated_to(uid))
    return ()


def by_uid(uid: int) -> Person:
    """Ask the directory for the account with a uid."""
    try:
        entry = pwd.getpwuid(uid)
        return Person(uid, entry.pw_name, entry.pw_gid, True)
    except KeyError:
        return Person(uid, settled=True)


def find_person(uid: int) -> Optional[Person]:
    """Ask the directory who has a uid; None if it could be either of two. May take as long as the directory."""
    person, owners = by_uid(uid), delegated_to(uid)
    if not owners:
        return person
    uids = {int(owner) if owner.isdigit() else getattr(account(owner), "pw_uid", -1) for owner in owners}
    return by_uid(uids.pop()) if len(uids) == 1 and -1 not in uids and person.name is None else None


def resolve_entry(entry: Any, found: dict[Any, Entries]) -> Entries:
    """Look one entry of a block list up; KeyError if the directory does not find it."""
    if whole(entry) or entry.isdigit():
        return Entries(frozenset([int(entry)]))
    if entry.startswith("@"):
        group = grp.getgrnam(entry[1:])
        # By uid as well: who they are must not depend on the directory later.
        members = resolve([name for name in group.gr_mem if not name.startswith("@")], found)
        return Entries(members.uids, frozenset(group.gr_mem), frozenset([group.gr_gid]))
    uid = pwd.getpwnam(entry).pw_uid
    return Entries(frozenset([uid]), frozenset(filter(None, (entry, by_uid(uid).name))))  # a uid can have two names


def resolve(entries: list[Any], found: dict[Any, Entries]) -> Entries:
    """Look a block list up; what is not found counts as it was found last: a directory that is down unblocks nobody."""
    for entry in entries:
        try:
            found[entry] = resolve_entry(entry, found)
        except (KeyError, ValueError):
            known = found.get(entry, Entries())
            if not known.gids and any(by_uid(uid).name not in {None, *known.names} for uid in known.uids):
                del found[entry]  # not a directory that is down: the uid is somebody else's now
    return merge(found.get(entry, literal(entry)) for entry in entries)


def literal(entry: Any) -> Entries:
    """Take an entry as it stands, before any directory has been asked."""
    if whole(entry) or entry.isdigit():
        return Entries(frozenset([int(entry)]))
    return Entries(names=frozenset([entry]), unresolved=frozenset([entry]))


def merge(lists: Iterable[Entries]) -> Entries:
    """Make one list of several."""
    return Entries(*(frozenset().union(*sets) for sets in zip(*lists)))


class Directory:
    """Who has which uid, asked at most once a minute for each, by threads that no other connection waits for."""

    def __init__(self, workers: Workers) -> None:
        self.workers, self.lock = workers, threading.Lock()
        self.people: dict[int, tuple[float, Optional[Future[Any]], Optional[Person]]] = {}

    def ask(self, uid: int) -> tuple[Optional[Future[Any]], Optional[Person]]:
        """Begin to look a uid up where it is time to; give the answer to come and the last one."""
        with self.lock:
            asked, future, last = self.people.get(uid, (0.0, None, Person(uid)))
            if future is None or future.done() and time.monotonic() - asked > REFRESH_SECONDS:
                if future is not None and future.exception() is None and not (
                        last and last.name and future.result() and future.result().name is None):
                    last = future.result()
                try:
                    future, asked = self.workers.submit(find_person, uid), time.monotonic()
                except queue.Full:
                    complain("the directory service (NSS) is slow: users without a known name are given by number")
            remember(self.people, uid, (asked, future, last))
            return future, last

    def person(self, uid: int, seconds: float = NAME_SECONDS) -> Optional[Person]:
        """Say who has a uid; None if it could be either of two; a directory that takes longer gives the number."""
        future, last = self.ask(uid)
        if future is None:
            return last
        try:
            new: Optional[Person] = future.result(0 if last is None or last.settled else seconds)
        except LateError:
            return last
        except (OSError, ValueError) as error:
            complain("a user could not be looked up", str(error))
            return last
        return last if new and new.name is None and last and last.name else new


class BlockList:
    """The two settings as one list, resolved anew once a minute and when the file changes."""

    def __init__(self, fixed: list[Any], path: Optional[str], owner: int, workers: Workers) -> None:
        self.fixed, self.path, self.owner, self.workers = fixed, path, owner, workers
        self.lock, self.asked, self.entries, self.problem = threading.Lock(), float("-inf"), Entries(), ""
        self.signature: Optional[tuple[int, ...]] = None
        self.future: Optional[Future[Entries]] = None
        self.from_file: list[Any] = []
        self.found: dict[Any, Entries] = {}  # by entry, as the directory last had it
        self.unresolved: frozenset[str] = frozenset()

    def now(self) -> Entries:
        """Give the list as it is at this moment; waits only just after the directory was asked, and not long."""
        with self.lock:
            if self.future and self.future.done():
                if self.future.exception():
                    complain("the block list could not be looked up", repr(self.future.exception()))
                else:
                    self.entries = self.future.result()
            if self.path and self._reread(self.path) or self.future is None:  # what is written out counts at once
                self.entries = merge(self.found.get(entry, literal(entry)) for entry in self.fixed + self.from_file)
                self.future = None  # its answer would be to an older list
            if self.future is None or self.future.done() and time.monotonic() - self.asked > REFRESH_SECONDS:
                try:
                    self.future = self.workers.submit(self._resolve, self.fixed + self.from_file)
                    self.asked = time.monotonic()
                except queue.Full:
                    return self.entries  # asked again for the next message
            future, last, wait = self.future, self.entries, self.asked + NAME_SECONDS - time.monotonic()
        if not future.done():
            wait_for([future], max(0.0, wait))
        return future.result() if future.done() and not future.exception() else last

    def _resolve(self, entries: list[Any]) -> Entries:
        resolved = resolve(entries, self.found)
        if resolved.unresolved - self.unresolved:
            names = quote(" ".join(sorted(resolved.unresolved)))
            say(WARNING, f"block list: not found, tried again every minute: {names}")
        self.unresolved = resolved.unresolved
        return resolved

    def _reread(self, path: str) -> bool:
        try:
            status = os.stat(path)
            signature = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if signature == self.signature:
                return False
            # A file written in this very moment may change again without its time stamp telling.
            self.signature = signature if abs(time.time() - status.st_ctime) > 1 else None
            entries, self.problem = read_entries(path, self.owner), ""
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                self.signature = None  # it may pass without a change of the file
            if str(error) != self.problem:
                self.problem = str(error)
                say(ERROR, f"blocked_mailusers_file: the last good list stays in force: {quote(self.problem)}")
            return False
        changed, self.from_file = entries != self.from_file, entries
        return changed


# ---------------------------------------------------------------------------------------------- the limits
class Limits:
    """Recipients of each uid in the last hour, in steps of a minute; after 10,000 users the longest silent goes."""

    def __init__(self, limits: dict[Any, Optional[int]]) -> None:
        self.everyone, self.lock = limits.get("*"), threading.Lock()
        users = ((key if whole(key) else getattr(account(key), "pw_uid", None), limit) for key, limit in limits.items())
        self.limits = {uid: limit for uid, limit in users if uid is not None}
        self.counts: dict[int, dict[int, int]] = {}

    def used(self, uid: int, minute: int) -> int:
        """Count what a uid addressed in this minute and the sixty before, so that no period of an hour is missed."""
        counts = self.counts.get(uid, {})
        for old in [then for then in counts if then < minute - 60]:
            del counts[old]
        return sum(counts.values())

    def take(self, person: Person, recipients: int, refuse: bool) -> Optional[int]:
        """Count a message; give the limit if it goes over it (and, if refuse, do not count it), else None."""
        limit, minute = self.limits.get(person.uid, self.everyone), int(time.monotonic() // 60)
        if limit is None:
            return None
        with self.lock:
            used = self.used(person.uid, minute)
            over = used + recipients > limit
            if not (over and refuse):
                counts = self.counts.get(person.uid, {})
                counts[minute] = counts.get(minute, 0) + recipients
                remember(self.counts, person.uid, counts)
        if not over and used < 0.8 * limit <= used + recipients:
            say(WARNING, f"user={quote(person.name or person.uid)} has addressed {used + recipients} "
                         f"of {limit} recipients an hour")
        return limit if over else None


# ----------------------------------------------------------------------------------- finding the process
class Finder:
    """Find the process that has a socket open, and describe it; runs in the helper, for one question at a time.

    Links read in /proc/PID/fd are the only evidence; everything remembered only says where to look first.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self.wanted = tuple(wanted)
        self.recent: dict[int, list[int]] = {}  # uid: processes that had a socket of his lately
        self.hot: dict[int, float] = {}  # uid: until when it is not searched for
        self.cgroups = cgroup_mount()
        self.deadline, self.links, self.denied = 0.0, 0, False

    def answer(self, uid: int, inode: int, cgroup: int) -> Facts:
        """Find and describe; {"why": word} if nothing is found."""
        now = time.monotonic()
        if self.hot.get(uid, 0.0) > now:
            return {"why": "busy"}
        self.hot = {hot: until for hot, until in self.hot.items() if until > now}
        self.deadline, self.links, self.denied = now + SEARCH_SECONDS, SEARCH_LINKS, False
        target = f"socket:[{inode}]"
        facts = self._search(uid, target, cgroup)
        if facts.get("why") == "gone":  # ended, but another may have it still; or moved it to another descriptor
            tries = (self._search(uid, target, cgroup) for _ in range(2))
            facts = next((again for again in tries if "why" not in again), facts)
        return facts

    def _search(self, uid: int, target: str, cgroup: int) -> Facts:
        try:
            link = self._first(uid, target, cgroup)
            if link is None:
                return {"why": "not-permitted" if self.denied else "not-found"}
            pid, path = link
            # What is read through this directory is of one process, even if its number is given to another now.
            process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)
            try:
                holder = os.fstat(process).st_uid  # first: of one that has ended it says 0
                if os.readlink(path, dir_fd=process) != target:
                    return {"why": "gone"}
                holders = {holder} | (self._strangers(target) if uid == 0 else set())
                return {"pid": pid, **describe(process, self.wanted), "holders": sorted(holders)[:FACT_BYTES]}
            finally:
                os.close(process)
        except BusyError:
            self.hot[uid] = time.monotonic() + HOT_SECONDS
            return {"why": "busy"}
        except (OSError, psutil.Error):
            return {"why": "gone"}

    def _first(self, uid: int, target: str, cgroup: int) -> Optional[tuple[int, str]]:
        recent = self.recent.get(uid, [])
        for pid, table in self._tables(uid, cgroup, recent):
            link = self._link(pid, table, target)
            if link:
                remember(self.recent, uid, [pid] + [old for old in recent if old != pid][:7])
                return pid, link
        return None

    def _tables(self, uid: int, cgroup: int, recent: list[int]) -> Iterator[tuple[int, str]]:
        """Give descriptor tables, of processes and below their directories, in the order of their likelihood."""
        seen: dict[int, bool] = {}  # by pid: whether it is the user's
        sources: list[Callable[[], Iterable[int]]] = [
            lambda: recent, lambda: cgroup_pids(self.cgroups, cgroup), psutil.pids]
        for source in sources:
            for pid in source():
                if pid not in seen:
                    self._spend()
                    seen[pid] = owner_of(pid) == uid
                    if seen[pid]:
                        yield pid, "fd"
        yield from ((pid, table) for pid, own in seen.items() if own for table in thread_tables(pid))
        yield from ((pid, "fd") for pid, own in seen.items() if not own)

    def _strangers(self, target: str) -> set[int]:
        """Give the uids other than root's that have the socket, real ones of setuid programs too: see handed_down."""
        found: set[int] = set()
        for pid in psutil.pids():
            if any(self._link(pid, table, target) for table in itertools.chain(["fd"], thread_tables(pid))):
                found |= set(psutil.Process(pid).uids()) - {0}
        return found

    def _link(self, pid: int, table: str, target: str) -> Optional[str]:
        """Give the link to the target in a descriptor table; None if it has none, or is not to be seen."""
        self._spend()
        try:
            directory = os.open(f"/proc/{pid}/{table}", os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:
            self.denied = True
            return None
        except (FileNotFoundError, ProcessLookupError):
            return None  # it has ended; what else goes wrong must not hide a holder
        try:
            descriptors = []
            with os.scandir(directory) as entries:
                for entry in entries:
                    self._spend()
                    descriptors.append(entry.name)
            for descriptor in reversed(descriptors):  # what was opened last stands last
                self._spend()
                try:
                    if os.readlink(descriptor, dir_fd=directory) == target:
                        return f"{table}/{descriptor}"
                except OSError:
                    pass  # closed meanwhile; or not ours to see, which must not count as a reason to believe in root
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
        finally:
            os.close(directory)
        return None

    def _spend(self) -> None:
        self.links -= 1
        if self.links < 0 or self.links % 64 == 0 and time.monotonic() > self.deadline:
            raise BusyError


def owner_of(pid: int) -> Optional[int]:
    """Give the effective uid of a process; None if it has ended."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def thread_tables(pid: int) -> Iterator[str]:
    """Give the descriptor tables of a process's other threads: its first may have ended, or not share its own."""
    try:
        threads = os.listdir(f"/proc/{pid}/task") if os.stat(f"/proc/{pid}/task").st_nlink > 3 else []
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
    yield from (f"task/{thread}/fd" for thread in threads if thread != str(pid))


def describe(process: int, wanted: Iterable[str]) -> Facts:
    """Say what a process is, given its open directory in /proc; OSError if it has ended.

    Never through its memory, as psutil's name() and exe() may, for its owner can make that hang for ever.
    """
    facts: Facts = {}
    for field in wanted:
        try:
            if field == "program":
                facts[field] = read_file("comm", process)[:-1]
            elif field in ("exe", "dir"):
                facts[field] = os.readlink("exe" if field == "exe" else "cwd", dir_fd=process)[:FACT_BYTES]
            elif field == "unit":
                facts[field] = unit_of(read_file("cgroup", process))
            elif field == "args":
                facts[field] = read_args(process)
        except PermissionError:
            pass  # not to be seen from here: it stays unknown
        except OSError:
            if field == "program":  # which is there as long as the process is; the others can be missing
                raise
    return facts


def describe_psutil(process: psutil.Process, wanted: Iterable[str]) -> Facts:
    """Say what a process is that psutil found; psutil.Error if its number was given to another meanwhile."""
    facts: Facts = {"pid": process.pid}
    if LINUX:
        directory = os.open(f"/proc/{process.pid}", os.O_PATH | os.O_DIRECTORY)
        try:
            facts.update(describe(directory, set(wanted) - {"args"}))
        finally:
            os.close(directory)
    else:
        facts.update(program=process.name(), exe=process.exe(), dir=process.cwd())
    if not process.is_running():
        raise psutil.NoSuchProcess(process.pid)
    return facts


def read_file(path: str, directory: Optional[int] = None) -> str:
    """Read a small file of the process table, its bytes kept as surrogates."""
    descriptor = os.open(path, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(descriptor, 65536).decode("utf-8", "surrogateescape")
    finally:
        os.close(descriptor)


def read_args(process: int) -> Optional[str]:
    """Read a command line in a child that is killed when it is late; None if it was, or there is none."""
    near, far = socket.socketpair()
    with near, far:
        child = os.fork()
        if child == 0:
            try:
                words = read_file("cmdline", process)[:FACT_BYTES].replace("\0", " ")
                far.send(words.encode("utf-8", "surrogateescape"))
            finally:
                os._exit(0)
        far.close()
        near.settimeout(ARGS_SECONDS)
        try:
            return near.recv(FACT_BYTES).rstrip(b" ").decode("utf-8", "surrogateescape") or None
        except socket.timeout:
            return None
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # before Linux 5.3 one that hangs cannot be killed, and the helper hangs with it


def cgroup_mount() -> Optional[int]:
    """Open a place where cgroup v2 is mounted; None if there is none that can be reached."""
    places: list[str] = []
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        places = [line.split()[1] for line in mounts if line.split()[2] == "cgroup2"]
    for place in places:
        with contextlib.suppress(OSError):  # it may be in a directory that is closed to us, or below another mount
            os.stat(os.path.join(place, "cgroup.controllers"))  # in every cgroup v2 directory, and in no other
            return os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    return None


def cgroup_pids(mount: Optional[int], cgroup: int) -> list[int]:
    """List the processes of a cgroup, by its id as a file handle (open_by_handle_at(2)); [] if that fails."""
    if mount is None or not cgroup:
        return []
    handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, FILEID_KERNFS, cgroup))
    directory = LIBC.open_by_handle_at(mount, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if directory < 0:
        return []
    try:
        with open(os.open("cgroup.procs", os.O_RDONLY, dir_fd=directory), "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
    finally:
        os.close(directory)


# ------------------------------------------------------------------------------------------ the helper
QUESTION = struct.Struct("=QIQQ")  # number, uid, inode, cgroup; the answer is JSON: the number and the facts


def serve(channel: socket.socket, finder: Finder) -> None:
    """Answer questions until the milter's end of the channel is closed; what is not a question is not answered."""
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        while len(waiting) < MOST_WAITING:
            try:
                data = channel.recv(QUESTION.size + 1, socket.MSG_DONTWAIT if waiting else 0)
            except BlockingIOError:
                break
            if not data:
                return
            if len(data) == QUESTION.size:
                waiting.append((time.monotonic(), data))
        came, data = waiting.popleft()
        number, uid, inode, cgroup = QUESTION.unpack(data)
        late = time.monotonic() - came > HELPER_SECONDS  # nobody waits: many such would hold up the next for seconds
        facts = {"why": "busy"} if late else finder.answer(uid, inode, cgroup)
        with contextlib.suppress(BlockingIOError):  # a milter that does not read its answers does without
            channel.send(json.dumps({"number": number, **facts}).encode(), socket.MSG_DONTWAIT)


def set_capabilities(wanted: Iterable[int]) -> None:
    """Keep, of the capabilities this process has, only those named; OSError if the kernel refuses."""
    mask = sum(1 << number for number in wanted) & capabilities()
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    # struct __user_cap_data_struct: effective, permitted, inheritable; capabilities above 31 are in the second
    if LINUX and LIBC.capset(header, struct.pack("=6I", mask, mask, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def capabilities() -> int:
    """Give the permitted capabilities of this process as a mask; 0 where there are none to read."""
    if not LINUX:
        return 0
    match = re.search(r"^CapPrm:\s*([0-9a-f]+)", read_file("/proc/self/status"), re.MULTILINE)
    return int(match.group(1), 16) if match else 0


def sees_others() -> bool:
    """Tell whether this process may see what files other users' processes have open."""
    needed = 1 << CAP_SYS_PTRACE | 1 << CAP_DAC_READ_SEARCH
    return capabilities() & needed == needed


def become(user: Optional[pwd.struct_passwd]) -> None:
    """Drop groups, gid and uid for good, if started as root; None: stay. RuntimeError if there is a way back."""
    if user is None or os.geteuid() == user.pw_uid and user.pw_uid:
        return
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    if user.pw_uid and (os.getresuid() != (user.pw_uid,) * 3 or os.getresgid() != (user.pw_gid,) * 3):
        raise RuntimeError("could not drop root for good")


def fork_helper(user: Optional[pwd.struct_passwd]) -> socket.socket:
    """Fork the helper: the uid of the milter, and of root's privilege only what it takes to see open files."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork():
        far.close()
        return near
    try:
        near.close()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.closerange(3, far.fileno())
        os.closerange(far.fileno() + 1, 1 + max(map(int, os.listdir("/proc/self/fd" if LINUX else "/dev/fd"))))
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it ends when the milter does
        if LINUX:
            LIBC.prctl(PR_SET_KEEPCAPS, 1)
        become(user)
        set_capabilities((CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH))
        if LINUX:
            LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the uid: a change of it forgets this
        if os.getppid() == parent:
            serve(far, Finder(WANTED))
    except (ConnectionError, PermissionError):
        pass  # the milter has ended between question and answer; or it cannot become the user either, and says so
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


class Question(NamedTuple):
    """A description that has been asked for."""

    number: int
    deadline: float  # on the monotonic clock, in seconds


class Describer:
    """Have processes described by whoever may see them: the helper while there is one, else sudo lsof.

    Answers are fetched by whoever waits for one, and kept until their connection ends.
    """

    def __init__(self, channel: Optional[socket.socket], lsof: Optional[bool], workers: Workers) -> None:
        """Make one; lsof: whether sudo allows it, None: it is asked when the helper has ended."""
        self.channel, self.lsof, self.workers = channel, lsof, workers
        self.numbers, self.late = itertools.count(1), False
        self.answers: dict[int, list[Facts]] = {}  # by the question's number; the first counts
        if channel:
            threading.Thread(target=self._watch, args=(channel,), daemon=True).start()

    def ask(self, owner: Owner) -> Question:
        """Ask for a description, without waiting for it."""
        number, seconds, why, channel = next(self.numbers), HELPER_SECONDS, "", self.channel
        self.answers[number] = []
        try:
            if owner.process:
                self._settle(number, describe_psutil(owner.process, WANTED))
            elif owner.inode == 0:
                why = "gone"
            elif channel:
                self._fetch(0.0)  # connections that idle or have ended do not: their answers would fill the channel
                channel.send(QUESTION.pack(number, owner.uid, owner.inode, owner.cgroup), socket.MSG_DONTWAIT)
            elif self.lsof:
                seconds = LSOF_SECONDS
                self.workers.submit(self._ask_lsof, number, owner)
            else:
                why = "no-helper"
        except (BlockingIOError, queue.Full):
            why = "busy"
        except (OSError, psutil.Error):  # the helper has just ended, or that process has
            why = "gone" if owner.process else "no-helper"
        if why:
            self._settle(number, {"why": why})
        return Question(number, time.monotonic() + seconds)

    def _ask_lsof(self, number: int, owner: Owner) -> None:
        if number not in self.answers:
            return  # its connection has ended
        facts: Facts = {"why": "error"}
        try:
            facts = ask_lsof(owner)
        except OSError as error:  # no process, no descriptor, no sudo
            complain("lsof could not be run", str(error))
        self._settle(number, facts)

    def wait(self, question: Question) -> Facts:
        """Give the description, or why there is none, before the deadline."""
        in_time = time.monotonic() < question.deadline
        while not self.answers.get(question.number):
            remaining = 0.0 if self.late else question.deadline - time.monotonic()
            self._fetch(min(remaining, 0.002))  # another may fetch this answer meanwhile
            if self.late or time.monotonic() > question.deadline:
                break
        answers = self.answers.get(question.number)
        if not answers and in_time:
            self.late = self.channel is not None  # then nobody waits until an answer has been had
        return answers[0] if answers else {"why": "timeout"}

    def forget(self, question: Question) -> None:
        """Note that nobody will wait for an answer."""
        self.answers.pop(question.number, None)

    def _settle(self, number: int, facts: Facts) -> None:
        answers = self.answers.get(number)
        if answers == []:  # else it is late, and must not describe another connection
            answers.append(facts)

    def _fetch(self, seconds: float) -> None:
        channel = self.channel
        if channel is None:
            time.sleep(max(0.0, seconds))
            return
        for _ in range(1000):  # more than the channel holds: a helper gone mad must not keep anyone here
            try:
                data = channel.recv(65536, socket.MSG_DONTWAIT)
                answer = json.loads(data)
                if not all(whole(uid) and uid < 1 << 32 for uid in answer.get("holders", ())):
                    raise ValueError
                self._settle(answer.pop("number"), answer)
                self.late, seconds = False, 0.0
            except BlockingIOError:
                if seconds <= 0 or not select.select([channel], [], [], seconds)[0]:
                    return
            except OSError:
                return
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if not data:
                    return
                complain("the helper gave an answer that is none")

    def _watch(self, channel: socket.socket) -> None:
        poll = select.poll()
        poll.register(channel, 0)  # nothing but its end
        poll.poll()
        self.channel, self.late = None, False
        self.lsof = lsof_allowed() if self.lsof is None else self.lsof
        say(ERROR, "the helper has ended: users are still identified, programs "
                   f"{'come through lsof' if self.lsof else 'stay unknown'}; restart the milter")
        for number in [number for number, answers in list(self.answers.items()) if not answers]:
            self._settle(number, {"why": "no-helper"})


def lsof_arguments(pids: Iterable[int]) -> list[str]:
    """Give the arguments that sudoers.example allows: sockets of the named processes, no name service, by field."""
    return ["-nPw", "-a", "-iTCP", "-p", ",".join(str(int(pid)) for pid in pids), "-Fpd"]


def run_lsof(pids: Iterable[int]) -> Optional[subprocess.CompletedProcess[bytes]]:
    """Have lsof list the sockets of processes; None if it was late, and then so is this: we may not kill it."""
    with subprocess.Popen(lsof_command + lsof_arguments(pids), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd="/", env={**os.environ, "LC_ALL": "C"}) as lsof:
        try:
            output, complaint = lsof.communicate(timeout=LSOF_SECONDS)
            return subprocess.CompletedProcess([], lsof.returncode, output, complaint)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):
                # sudo passes TERM on, killed it would leave lsof running; others have it blocked, as this thread has
                lsof.send_signal(signal.SIGTERM if os.path.basename(lsof_command[0]) == "sudo" else signal.SIGKILL)
            lsof.communicate()  # keeps this thread until sudo has ended: never more than LSOF_PROCESSES run
            return None


def ask_lsof(owner: Owner) -> Facts:
    """Find the process through lsof, and describe it; {"why": word} if that fails."""
    own, others = [], []
    for pid in psutil.pids():
        (own if owner_of(pid) == owner.uid else others).append(pid)
    # Root's sockets may have been handed down: everyone is asked about. Else its owner's processes are enough.
    pids = (own + (others if owner.uid == 0 else []))[:LSOF_PIDS]
    if not pids:  # an empty list would mean every process
        return {"why": "not-found"}
    if owner.uid == 0 and len(own + others) > len(pids):  # a stranger may be among those that were left out
        return {"why": "busy"}
    processes = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            processes[pid] = psutil.Process(pid)
    lsof = run_lsof(pids)
    if lsof is None:
        return {"why": "timeout"}
    holders = [pid for pid in (lsof_holder(part, owner.inode) for part in re.split(rb"(?m)^(?=p\d)", lsof.stdout))
               if pid in processes]
    if not holders:
        refused = re.search(rb"password is required|not allowed|may not run|sudoers|no new privileges", lsof.stderr)
        return {"why": "timeout" if lsof.returncode < 0 else "not-permitted" if refused else "not-found"}
    try:
        uids = set().union(*(processes[pid].uids() for pid in holders))  # a setuid program's real one, too
        return {**describe_psutil(processes[holders[0]], WANTED), "holders": sorted(uids)}
    except (OSError, psutil.Error):
        return {"why": "gone"}


def lsof_allowed() -> bool:
    """Ask sudo whether the rule is there; trying it instead would have a refusal logged and mailed to root."""
    if not lsof_command or shutil.which(lsof_command[0]) is None:
        return False
    if os.path.basename(lsof_command[0]) != "sudo":
        return True
    question = [lsof_command[0], "-n", "-l", *lsof_command[1:], *lsof_arguments([1])]
    null = subprocess.DEVNULL
    try:
        sudo = subprocess.Popen(question, stdin=null, stdout=null, stderr=null)
    except OSError:
        return False
    try:
        return sudo.wait(5) == 0
    except subprocess.TimeoutExpired:
        with contextlib.suppress(PermissionError):  # and then it is not waited for, as "run" would
            sudo.kill()
        return False


# ----------------------------------------------------------------------------------------------- the milter
class Claims:
    """Which connection has which socket: each may have one only, or nobody knows whose a message is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.live: dict[Any, "SysuserMilter"] = {}
        self.past: dict[Any, None] = {}

    def claim(self, cookie: Any, connection: "SysuserMilter") -> None:
        """Note that a connection was found to be this socket; both are marked if another was."""
        with self.lock:
            other = self.live.setdefault(cookie, connection)
            if other is not connection or cookie in self.past and isinstance(cookie, int):  # psutil's come again
                other.shared = connection.shared = True

    def release(self, cookie: Any, connection: "SysuserMilter") -> None:
        """Note that a connection has ended; its socket may linger, and must not be taken for another's."""
        with self.lock:
            if self.live.get(cookie) is connection:
                del self.live[cookie]
            remember(self.past, cookie, None)


class SysuserMilter(Milter.Base):  # type: ignore[misc]
    """One connection to the MTA; several messages may come through it."""

    # Set once, in "run", for all connections.
    directory: Directory
    block_list: BlockList
    limits: Limits
    describer: Describer
    find_owner: Callable[..., Optional[Owner]] = staticmethod(find_owner)
    same_socket: Callable[..., str] = staticmethod(same_socket)
    claims = Claims()

    def __init__(self) -> None:
        self.client: Optional[str] = None
        self.peer: Optional[Endpoint] = None
        self.owner: Optional[Owner] = Owner(None, "error")  # None: not a local client
        self.question: Optional[Question] = None
        self.shared = False  # set by Claims: the socket was taken for another connection's, too
        self.sender, self.recipients = "", 0
        self.forged: list[str] = []

    def negotiate(self, opts: list[int]) -> int:
        """Ask the MTA for the server's end of the connection (pymilter's own symlist fails on Python 3)."""
        if opts[0] & Milter.SETSYMLIST:
            self._ctx.setsymlist(Milter.M_CONNECT, "{daemon_addr} {daemon_port}")
        return int(Milter.Base.negotiate(self, opts))

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        """Ask the kernel who has connected. The MTA waits for this: its greeting must come after the answer."""
        if isinstance(hostaddr, str) or hostaddr and not hostaddr[1]:
            self.owner = None  # the MTA's own emulation, for mail from sendmail(1)
        elif hostaddr is None:
            self.owner = Owner(None, "closed")  # gone before the MTA could ask for its address
        else:
            self.client = ("[%s]:%d" if ":" in hostaddr[0] else "%s:%d") % tuple(hostaddr[:2])
            self.peer = endpoint(hostaddr[0], hostaddr[1])
            self.owner = self.ask_kernel(self.peer)
            if self.owner and self.owner.uid is not None:
                self.claims.claim(self.owner.cookie, self)
                self.question = self.describer.ask(self.owner)
                self.directory.ask(self.owner.uid)
        return int(Milter.CONTINUE)

    def ask_kernel(self, client: Endpoint) -> Optional[Owner]:
        """Find the owner, with the server's end as the MTA knows it."""
        try:
            server = endpoint(self.getsymval("{daemon_addr}") or "", int(self.getsymval("{daemon_port}") or 0))
        except ValueError:
            server = None
        try:
            return self.find_owner(client, server)
        except (OSError, psutil.Error) as error:
            complain("the owner of a connection could not be asked for", str(error))
            return Owner(None, "error")

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envfrom(self, sender: str, *parameters: str) -> int:
        """Begin a message: nothing of an earlier one stays."""
        self.sender, self.recipients, self.forged = sender, 0, []
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envrcpt(self, recipient: str, *parameters: str) -> int:
        """Count a recipient."""
        self.recipients += 1
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def header(self, name: str, value: str) -> int:
        """Note a header that only we may write."""
        if len(self.forged) <= MOST_FORGED and name.strip().lower() == header_name.lower():
            self.forged.append(name)
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        """Decide, log and act, the message being complete."""
        # A fault of ours must neither lose mail nor let a blocked user pass.
        uid = self.owner.uid if self.owner else None
        suspects = () if uid is None else (Person(uid),)
        sender = Sender(None, None, {}, "error", suspects)
        verdict = unidentified()
        try:
            if self.owner:
                sender = self.identify(self.owner)
        except Exception:
            report_exception(*sys.exc_info())
        try:
            verdict = self.judge(sender)
        except Exception:
            report_exception(*sys.exc_info())
            entries = self.block_list.entries
            refused = (blocked(suspect) for suspect in sender.suspects if is_blocked(suspect, uid, entries))
            verdict = next(refused, verdict)
        answer = {"reject": Milter.REJECT, "tempfail": Milter.TEMPFAIL}.get(verdict.action, Milter.CONTINUE)
        for step in (self.act, self.write_log):
            try:
                step(verdict, sender)
            except Milter.error as error:  # the MTA has gone, its mail with it
                complain("the MTA did not take an answer", str(error))
            except Exception:
                report_exception(*sys.exc_info())
        return int(answer)

    def close(self) -> int:
        """Give the socket back."""
        if self.owner and self.owner.uid is not None:
            self.claims.release(self.owner.cookie, self)
        if self.question:
            self.describer.forget(self.question)
        return int(Milter.CONTINUE)

    def identify(self, owner: Owner) -> Sender:
        """Say who sent the message: the owner, if the connection still has the socket it was found to have."""
        if owner.uid is None:
            return Sender(None, None, {}, owner.why, ())
        try:
            why = self.same_socket(self.peer, owner) or ("reused" if self.shared else "")
        except (OSError, psutil.Error) as error:
            complain("the owner of a connection could not be asked for", str(error))
            why = "error"
        facts = self.describer.wait(self.question) if self.question else {}
        person = self.directory.person(owner.uid)
        deadline = time.monotonic() + NAME_SECONDS
        holders = [self.directory.person(uid, max(0.0, deadline - time.monotonic())) or Person(uid)
                   for uid in facts.get("holders", ()) if uid != owner.uid]
        stranger = next((holder for holder in holders if not person or holder.uid != person.uid), None)
        delegated = delegates(owner.uid) if person is None or not person.settled else ()
        if person is None or delegated:  # a delegated uid that is an account, too; or its user is not known yet
            person, why = None, why or "error"
        if owner.uid == 0 and not why and not owner.process and self.peer:
            why = handed_down(self.peer.port, facts)
        suspects = (person or Person(owner.uid), *delegated, *holders)
        if why or person is None:
            return Sender(None, None, {}, why, suspects, stranger)
        return Sender(person, owner.uid, facts, facts.get("why", ""), suspects[:1], stranger)

    def judge(self, sender: Sender) -> Verdict:
        """Say what becomes of the message."""
        if len(self.forged) > MOST_FORGED:
            return Verdict("reject", "forged", f"More than {MOST_FORGED} {header_name} headers")
        if self.owner is None:
            return Verdict("pass")
        entries = self.block_list.now()
        answers = [is_blocked(suspect, self.owner.uid, entries) for suspect in sender.suspects]
        if True in answers:
            return blocked(sender.suspects[answers.index(True)])
        if sender.person is None or None in answers and unidentified_action != "accept":
            return unidentified()
        limit = self.limits.take(sender.person, self.recipients, blocked_action in REFUSALS)
        if limit is None:
            return passed()
        text = f"User {quote(sender.person.name or sender.person.uid)} is over the limit of {limit} recipients an hour"
        return Verdict("tempfail" if blocked_action in REFUSALS else blocked_action, "limit", text)

    def write_log(self, verdict: Verdict, sender: Sender) -> None:
        """Write the message's one line."""
        pairs: list[tuple[str, Any]] = [("client", self.client)]
        if self.owner:
            pairs += sender_values(sender, log_fields)
        pairs += [("from", self.sender.strip("<>")), ("rcpts", self.recipients), ("action", verdict.action)]
        pairs += [("reason", verdict.reason)] if verdict.reason else []
        if self.owner:
            pairs += [("lookup", sender.why)] if sender.why else []
            pairs += [("holder", sender.holder.name or sender.holder.uid)] if sender.holder else []
        say(INFO, f"{quote(self.getsymval('i'))}: {' '.join(key_values(pairs))}")

    def act(self, verdict: Verdict, sender: Sender) -> None:
        """Have the MTA do it."""
        if verdict.action in REFUSALS:
            self.setreply(*REFUSALS[verdict.action], verdict.text.replace("%", "\\x25"))
            return
        if verdict.action == "quarantine":
            self.quarantine(verdict.text)
        for index in range(len(self.forged), 0, -1):
            self.chgheader(self.forged[index - 1], index, "")
        if self.owner and header_fields:
            words = key_values(sender_values(sender, header_fields))
            self.addheader(header_name, fold(words, len(header_name) + 2))


def sender_values(sender: Sender, fields: Iterable[str]) -> list[tuple[str, Any]]:
    """Give the fields of a header or a log line with their values, None where one is unknown."""
    person = sender.person
    values = {**sender.facts, "uid": sender.uid, "user": None if person is None else person.name or person.uid}
    return [(field, values.get(field)) for field in fields]


def handed_down(port: int, facts: Facts) -> str:
    """Say why root must not be named, or "": root's programs leave sockets they made to others, who can reuse them.

    A listener or an accepted socket has its server's port; and whoever has it now, where that can be seen, is root.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        low, high = map(int, file.read().split())  # the ports that the kernel gives to clients by itself
    if not low <= port <= high or set(facts.get("holders", (0,))) != {0}:
        return "handed-down"
    return "" if "holders" in facts or facts.get("why") in ("not-permitted", "no-helper") else str(facts.get("why"))


def passed() -> Verdict:
    """Let a message through, tagged if a header is wanted."""
    return Verdict("tag" if header_fields else "pass")


def blocked(person: Person) -> Verdict:
    """Do what blocked_action says."""
    return Verdict(blocked_action, "blocked", f"User {quote(person.name or person.uid)} is blocked from sending mail")


def unidentified() -> Verdict:
    """Do what unidentified_action says."""
    if unidentified_action == "accept":
        return passed()
    return Verdict(unidentified_action, "unidentified", "Sender process could not be identified")


# ------------------------------------------------------------------------------------------------- --check
HELPER_CURE = "start as root, or allow CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH (both) to the container or unit"
LSOF_CURE = "install lsof, and the rule of sudoers.example; not needed where this is started as root"


class Report:
    """The lines of --check, and whether all is well."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, what: str, problem: str = "", cure: str = "", fatal: bool = False) -> None:
        """Print one line; problem: what is not well, "" if all is; cure: what to do about it."""
        self.failed |= fatal
        print(f"{'FAIL' if fatal else 'warn' if problem else 'ok  '}  {what}" + (f": {problem}" if problem else ""))
        if problem and cure:
            print(f"      -> {cure}")


def stranger_connection() -> Optional[tuple[Endpoint, Endpoint, int]]:
    """Give the ends and the uid of a connection of another user: nobody's if this is root, else any there is."""
    nobody = account("nobody")
    if os.geteuid() or nobody is None:
        found = sock_diag(diag_request(Endpoint(b"\0" * 4, 0), Endpoint(b"", 0), 0, NLM_F_DUMP))
        found.sort(key=lambda diag: diag.uid == 0)  # root's last: for those everyone is looked at
        return next(((diag.source, diag.destination, diag.uid) for diag in found
                     if diag.uid != os.geteuid() and diag.inode
                     and find_socket(diag.destination, diag.source, LOOPBACK)), None)
    listener = socket.create_server(("127.0.0.1", 0))
    near, far = os.pipe()
    if os.fork() == 0:
        try:
            become(nobody)
            signal.alarm(30)
            with socket.create_connection(listener.getsockname()) as connection:
                listener.close()
                os.write(far, str(connection.getsockname()[1]).encode())
                connection.recv(1)  # until --check ends, and the listener with it
        finally:
            os._exit(0)
    os.close(far)  # else a child that fails would be waited for
    server, port = endpoint(*listener.getsockname()), os.read(near, 8)
    if port:
        listener.accept()[0].detach()  # one that is not accepted is nobody's, see find_owner
    listener.detach()
    return (endpoint("127.0.0.1", int(port)), server, nobody.pw_uid) if port else None


def check_lookups(report: Report, user: Optional[pwd.struct_passwd]) -> None:
    """Try each way of looking up, in the uid the milter will have, on another user's connection."""
    problem = kernel_problem()
    cure = "modprobe tcp_diag; in a unit, allow AF_NETLINK and set no PrivateUsers=; see README, Troubleshooting"
    if mapped_uids() <= 65536:
        problem = "this user namespace maps too few uids to tell users apart"
    report("users: the kernel (sock_diag)", problem, cure, bool(problem))
    if problem:
        return
    stranger = stranger_connection()
    privileged = os.geteuid() == 0 or sees_others()
    channel = fork_helper(user) if privileged else None
    become(user)
    set_capabilities(())
    report("programs: cgroup v2, to find them as fast on a crowded machine as on an empty one",
           "" if cgroup_mount() is not None else "not mounted, all processes are searched",
           "with thousands of processes, mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")
    if stranger is None:
        report("users and programs of others", "not tried, no other user has a connection now",
               "run this as root" + (", with CAP_SETUID" if privileged else ""))
        if not channel:
            report("programs: sudo lsof", "" if lsof_allowed() else "not allowed", LSOF_CURE)
        return
    owner = check_owner(report, stranger)
    if owner:
        check_programs(report, owner, channel)


def check_owner(report: Report, stranger: tuple[Endpoint, Endpoint, int]) -> Optional[Owner]:
    """Find the owner of another user's connection; None if that fails."""
    for _ in range(5):  # one that is not ours can end meanwhile
        began = time.perf_counter()
        owner = find_owner(*stranger[:2])
        took = (time.perf_counter() - began) * 1e6
        if owner and owner.uid == stranger[2]:
            report(f"users: another user's connection, {took:.0f} us")
            return owner
        stranger = stranger_connection() or stranger
    report("users: another user's connection",
           f"not found ({owner.why or 'wrong uid' if owner else 'taken for remote'})",
           "run this again; in a unit or container, give it the host's network and users", True)
    return None


def check_programs(report: Report, owner: Owner, channel: Optional[socket.socket]) -> None:
    """Find the program as the milter will: through the helper (channel) or through sudo lsof."""
    facts, took = {"why": "not there"}, 0.0
    if channel or lsof_allowed():  # with a helper, sudo is not asked: a refusal is mailed to root
        describer = Describer(channel, not channel, Workers(1, 1))
        began = time.perf_counter()
        facts = describer.wait(describer.ask(owner))
        took = (time.perf_counter() - began) * 1e6
    way, cure = ("programs: the helper", HELPER_CURE) if channel else ("programs: sudo lsof", LSOF_CURE)
    found = f"{way}, {took:.0f} us: {quote(facts.get('program', facts.get('pid')))}"
    report(way if "why" in facts else found, facts.get("why", ""), cure)
    if not channel and "why" in facts:
        report("programs: the helper", "not there", HELPER_CURE)
    elif not channel:
        report("programs: the helper, not there and not needed")


def postconf(*arguments: str) -> dict[str, str]:
    """Ask Postfix for its settings; {} where it is not installed or does not answer."""
    try:
        output = subprocess.run(["postconf", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.partition(" = ") for line in output.decode("utf-8", "replace").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def check_postfix(report: Report) -> None:
    """Look whether Postfix uses this socket, and gives no one here the right to make up a client's address."""
    settings = postconf("-x")
    if not settings:
        report("Postfix", "postconf is not there to ask", "with Postfix, run this with /usr/sbin in PATH")
        return
    settings.update(postconf("-Px"))  # of services in master.cf, as SERVICE/TYPE/NAME
    milters = " ".join(value for name, value in settings.items() if name.split("/")[-1] == "smtpd_milters")
    spool = settings.get("queue_directory", "/")
    used = any(os.path.join(spool, path) == socketname for path in re.findall(r"unix:([^\s,{}]+)", milters))
    short = os.path.relpath(socketname, spool)
    mapped = settings.get("smtpd_milter_maps")
    report("Postfix: smtpd_milters names this socket", "" if used else "it does not",
           f"look whether smtpd_milter_maps does: {mapped}" if mapped else
           f"postconf -e 'smtpd_milters = {{ unix:{short}, default_action=accept }}', beside what is there now")
    early = settings.get("smtpd_forbid_unauth_pipelining", "") not in ("", "no")
    report("Postfix: smtpd_forbid_unauth_pipelining", "" if early else "is off, or this Postfix does not have it",
           "postconf -e smtpd_forbid_unauth_pipelining=yes")
    for name, value in settings.items():
        kind = name.split("/")[-1]
        if value and (kind.endswith("_upstream_proxy_protocol") or
                      kind == "smtpd_authorized_xclient_hosts" and may_be_local(value)):
            report(f"Postfix: {name} = {value}", "users on this host can pretend to be any client",
                   "allow it to addresses only that users of this host cannot have, on a port of its own")
        elif value and kind == "smtpd_proxy_filter":
            report(f"Postfix: {name} = {value}", "milters see no message that comes in there",
                   "give local clients a listener with content_filter instead; see README, Content filters")


def may_be_local(hosts: str) -> bool:
    """Tell whether a list of hosts can include an address of this host; a table or a host name can."""
    own = {ipaddress.ip_address(a.address.split("%")[0]) for nics in psutil.net_if_addrs().values() for a in nics
           if a.family in (socket.AF_INET, socket.AF_INET6)} | set(map(ipaddress.ip_address, ("127.0.0.1", "::1")))
    try:
        networks = [ipaddress.ip_network(re.sub(r"[\[\]]", "", word), strict=False)
                    for word in re.split(r"[\s,]+", hosts) if word]
    except ValueError:
        return True
    return any(network.is_loopback or address in network for network in networks for address in own)


def check(problems: list[str]) -> int:
    """Show on one screen whether this will work, before any mail depends on it; give the exit status."""
    report = Report()
    for problem in problems:
        report("setting", problem, fatal=True)
    if not problems:
        report("settings, and the socket's directory")
        check_postfix(report)
        try:
            check_lookups(report, account(run_as_user))
            delegated_to(0)  # now as the user the milter will be
            if blocked_mailusers_file:
                read_entries(blocked_mailusers_file, os.geteuid())
        except (OSError, ValueError) as error:
            cure = "allow CAP_SETUID and CAP_SETGID, and the user to read what is named"
            report("as run_as_user", str(error), cure, True)
    return EX_CONFIG if report.failed else 0


# ---------------------------------------------------------------------------------------------------- main
def start_problem() -> str:
    """Say why the milter cannot start here although its settings are well, or ""."""
    if mapped_uids() <= 65536:
        return "this user namespace maps too few uids to tell users apart (PrivateUsers= in the unit?)"
    if os.path.lexists(socketname):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)  # one that does not accept is still there
            try:
                with contextlib.suppress(ConnectionRefusedError):  # left over from one that was killed
                    probe.connect(socketname)
                    return f"another milter is already serving {socketname}"
                os.unlink(socketname)
            except OSError as error:
                return f"{socketname}: {error}"
    return ""


def announce() -> None:
    """Tell the service manager that the socket is there (sd_notify(3)), when it is."""
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(socketname):
            time.sleep(0.02)
    say(INFO, f"listening on {socketname}")
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            say(ERROR, f"NOTIFY_SOCKET: {error}")


def prepare(user: Optional[pwd.struct_passwd]) -> None:
    """Fork the helper, drop privilege, and set up what all connections share; in this order."""
    privileged = sees_others()
    by_lsof = None if os.geteuid() == 0 else lsof_allowed()
    channel = None if by_lsof and not privileged else fork_helper(user)
    become(user)
    if user:  # None is to stay as started: psutil needs the privilege where there is no sock_diag
        set_capabilities(())
    # Threads begin below, and none may take these: they are the main thread's, see "run".
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    users = "sock_diag" if SysuserMilter.find_owner is find_owner else "psutil (holders, not owners)"
    programs = "the helper" if privileged else "sudo lsof" if channel is None else (
        "the helper without the privilege to see other users' processes")
    say(INFO, f"version {VERSION}: users from {users}; programs through {programs}")
    SysuserMilter.directory = Directory(Workers(4, MOST_REMEMBERED))
    SysuserMilter.block_list = BlockList(blocked_mailusers, blocked_mailusers_file, os.geteuid(), Workers(1, 2))
    SysuserMilter.limits = Limits(hourly_limits)
    SysuserMilter.describer = Describer(channel, by_lsof, Workers(LSOF_PROCESSES, 8 * LSOF_PROCESSES))
    SysuserMilter.block_list.now()
    if SysuserMilter.block_list.problem:  # root could read it, run_as_user cannot
        sys.exit(EX_CONFIG)
    if (blocked_mailusers or blocked_mailusers_file or hourly_limits) and unidentified_action == "accept":
        say(WARNING, "unidentified_action is accept: a blocked user who arranges to be unknown is not refused")


def run() -> int:
    """Serve the MTA until told to stop; give the exit status."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    problem, lack = start_problem(), ""
    try:
        lack = kernel_problem()
    except OSError as error:  # it may pass: not a reason to do without sock_diag until the next start
        problem = problem or f"a connection to 127.0.0.1, to try sock_diag on: {error}"
    if problem:
        say(ERROR, problem)
        return 1
    if lack:
        say(WARNING, f"{lack}: psutil is used, which names the holder of a socket for its owner")
        SysuserMilter.find_owner = staticmethod(find_owner_psutil)
        SysuserMilter.same_socket = staticmethod(same_socket_psutil)
    if hasattr(LIBC, "mallopt"):  # glibc: else each thread gets a heap of its own, and memory creeps up
        LIBC.mallopt(M_ARENA_MAX, 1)
    prepare(account(run_as_user))
    os.umask(0o177)  # the socket's mode, as bind(2) takes it
    os.chdir("/")
    sys.excepthook = report_exception
    Milter.factory = SysuserMilter
    Milter.set_flags(Milter.ADDHDRS | Milter.CHGHDRS | Milter.QUARANTINE | Milter.SETSYMLIST)
    Milter.set_exception_policy(Milter.CONTINUE)  # what pymilter cannot decode goes on, as unidentified
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    threading.Thread(target=announce, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # before libmilter waits for them
    return int(Workers(1, 1).submit(serve_mta).result())


def serve_mta() -> int:
    """Have libmilter serve connections until it fails; give the exit status."""
    try:
        Milter.runmilter("milter_sysuser", "unix:" + socketname, timeout or LONGEST_TIMEOUT, rmsock=False)
    except Milter.error as error:
        say(ERROR, f"{socketname}: {error}")
        return 1
    return 0


def stop(number: int, frame: Any) -> NoReturn:
    """End at once. libmilter's own stop takes up to 5 s, and under load hangs (it destroys a mutex in use)."""
    say(INFO, "stopped")
    try:
        os.unlink(socketname)
    finally:
        os._exit(0)


def main() -> int:
    """Check the settings, then do what the command line says."""
    parser = argparse.ArgumentParser(description="Tag local mail with the system user and program that sent it.",
                                     epilog="There is one place to configure: the settings at the top of the script.")
    parser.add_argument("--check", action="store_true", help="check the settings and show what works here")
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args()
    for number in range(3):  # one that was closed must not become a socket of ours
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number
    problems = list(settings_problems(globals()))
    if arguments.check:
        return check(problems)
    for problem in problems:
        say(ERROR, problem)
    return EX_CONFIG if problems else run()


if __name__ == "__main__":
    sys.exit(main())
