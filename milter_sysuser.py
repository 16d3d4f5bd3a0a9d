#!/usr/bin/python3
# SPDX-License-Identifier: MIT
# mypy: disable-error-code="var-annotated"
"""Say which system user and which program sent each message that a local user hands to the MTA.

A milter for Postfix and Sendmail. Every such message, by SMTP to this host or by sendmail(1), gets
a header and a line in the log:

    X-Sender-Process-Info: user=stefan program=telnet

    4Zb9Xk1c2Tz3: client=127.0.0.1:43210 user=stefan uid=1001 program=telnet pid=4711
    exe=/usr/bin/telnet dir=/home/stefan unit=session-3.scope from=stefan@example.org rcpts=1
    action=tag                                                                     (one line)

The user is the one who made the client's socket, as the kernel's sock_diag says it: blocking and
limits rest on that alone. The program is what holds the socket at the time: a description, never a
credential. Who called sendmail(1) is what Postfix wrote into the queue, and no program is left to
describe then. What is not known is written "?", and is never turned into root or somebody else.
What cannot be known, as who is behind a relay on this host, is listed in README.md.

To see who is named, read in this order: SysuserMilter (connect, confirm, identify),
KernelLookup.find_client_socket, why_not_root, find_container_client, read_submitter,
look_up_account. Who is refused: SysuserMilter.judge and what it calls. What has privilege:
fork_helper, serve, Finder, Namespaces. The rest describes the process.
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.stderr.write("milter_sysuser: needs Python 3.9 or newer, this is %s\n" % sys.version.split()[0])
    sys.exit(78)

import argparse
import ast
import contextlib
import ctypes
import errno
import fcntl
import functools
import grp
import ipaddress
import itertools
import json
import operator
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
import tempfile
import threading
import time
import traceback
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, NoReturn, Optional, Union, cast

try:
    import Milter
    import psutil
    from Milter import Base, noreply
    MISSING = "" if hasattr(Base, "header_bytes") else "pymilter is older than 1.0.5"
except ImportError as missing:  # --help and --version do without them; see main
    MISSING, Base, noreply = str(missing), object, lambda callback: callback

VERSION = "3.0"

# ====================================================================================== settings
# Leave these lines here. Put such lines into the file that settings_file names: it outlives an
# upgrade. Then run "milter_sysuser.py --check", and reload the milter.

# The unix socket that the MTA connects to: an absolute path of at most 107 bytes, in a directory
# that run_as_user may write to. If systemd hands the socket over, ListenStream= of its unit counts.
# The trap: Postfix's smtpd may be chrooted. A path below /var/spool/postfix works either way, if
# main.cf names it without that prefix. Example: "/run/milter_sysuser/milter.sock", for Sendmail
socketname = "/var/spool/postfix/private/milter.sock"

# The seconds after which the milter drops an MTA that sends nothing; 0: never (24 days). The trap:
# with default_action=accept in the MTA, a slower message passes unseen. Example: 7200
timeout = 0

# The user to become for good if started as root: the one that the MTA's smtpd runs as. None: stay
# as started. The trap: started as root with None, the process that faces the mail stays root, and
# only root may connect to its socket. Example: "milter-sysuser"
run_as_user = "postfix"

# Who may not send mail: user names (also with blanks), uids, "@group" for all in a group. The trap:
# digits in quotes are a uid, and the user of that name. Example: ["bob", 1004, "@suspended"]
blocked_mailusers = []

# A file with one such entry a line; "#", first or after a blank, begins a comment. A change counts
# at once. Only the owner (root or run_as_user) may have the right to write to it. The trap: a file
# edited in place is empty for a moment; rename (mv) a new one. Example: "/etc/milter_sysuser.blocked"
blocked_mailusers_file = None

# Who alone may send mail: a list of such entries, or None for everyone. All others are blocked, and
# the block lists apply as well. The trap: mailing lists, content filters and root send mail, too.
# Example: ["@customers", "root"]
allowed_mailusers = None

# What happens to a blocked user's mail: "reject" (550), "tempfail" (450: the sender tries again),
# "quarantine" (the MTA's hold queue) or "log" (a trial: it passes, and the log says so). Mail by
# sendmail(1) is held and not refused. The trap: a program without a queue loses mail by "tempfail",
# too. Example: "quarantine"
blocked_action = "reject"

# What happens to local mail whose owner is unknown: "accept" (tagged user=?), "tempfail",
# "quarantine" or "reject" (550, or 450 if the client is not at fault). The trap: a blocked user can
# close early to be unknown, and "accept" lets him pass. The others also stop a client that is only
# hasty. Example: "quarantine"
unidentified_action = "accept"

# How many recipients a user may address in any hour, by SMTP and by sendmail(1) together: by name
# or uid, "*" for everyone else, None for no limit. The trap: "*" counts root and content filters,
# too, and a restart begins the counts anew. Example: {"*": 200, "www-data": 1000, "root": None}
hourly_limits = {}

# The same for any day, in steps of an hour. The trap: a restart begins a new day, also for a user
# over his limit. Example: {"*": 1000, "newsletter": 50000, "root": None}
daily_limits = {}

# The networks of this host's containers (docker, podman, LXC). Their clients are named, too, by the
# kernel's uid as a number. It takes the helper. The trap: a container without a user namespace has
# the host's uids, and its root is uid 0. Example: ["172.17.0.0/16", "fd00:17::/64"]
container_networks = []

# The name of the header that is added, and removed wherever else it comes from. The trap: with a
# new name, anyone can forge the old one. Example: "X-Local-Sender"
header_name = "X-Sender-Process-Info"

# What the header says, in this order: user, uid, program, pid, exe, args (the command line), dir
# (working directory), unit (systemd unit or container). []: none is added; forged ones still go.
# The trap: the header leaves with the mail, and args can hold passwords. Example: ["user"]
header_fields = ["user", "program"]

# The same choice for the log. The trap: the README's recipes expect the fields as delivered.
# Example: ["user", "uid", "program", "args"]
log_fields = ["user", "uid", "program", "pid", "exe", "dir", "unit"]

# How to call lsof if the milter is not started as root; sudoers.example has the rule for it. []:
# never. The trap: with neither the helper nor lsof, other users' programs are "?", and so is root.
# Example: ["/usr/bin/lsof"]
lsof_command = ["sudo", "-n", "/usr/bin/lsof"]

# A file of lines "name = value" that override the settings above, if it exists; None: no file. It
# is never executed. Only its owner (root, or who starts this) may have the right to write to it.
# The trap: a value there counts, whatever stands here. Example: "/usr/local/etc/milter.conf"
settings_file = "/etc/milter_sysuser.conf"
# =============================================================================== end of settings

FIELDS = ("user", "uid", "program", "pid", "exe", "args", "dir", "unit")
REFUSALS = {"reject": ("550", "5.7.1"), "tempfail": ("450", "4.7.1")}  # RFC 5321 4.2.3, 3463 3.8
UNIDENTIFIED = "Sender process could not be identified"
# Of all headers. A hundred hops (RFC 5321, 6.3) and fifty ARC sets of three (RFC 8617, 4.2.1) leave
# as much again and more for programs. To remove n forged ones takes the MTA n * n steps.
MOST_HEADERS, MOST_FORGED = 1000, 100
RIVAL_SECONDS = 0.3  # what a session waits at most for another's queue id
LINUX = sys.platform.startswith("linux")
LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL: calls keep the interpreter's lock
SET_STACK_LIMITS = getattr(ctypes.pythonapi, "PyUnstable_ThreadState_SetStackProtection", None)
ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p


# ------------------------------------------------------------------------------------- the milter
class SysuserMilter(Base):  # type: ignore[misc]
    """One session of the MTA with a client; several messages may come through it.

    connect asks the kernel whose the client's socket is, and claims it. hello confirms that while
    the client waits for the answer: one that goes on was still connected. envrcpt has the process
    described, while the client waits, too. eom decides, acts and logs.
    """

    # Set once, at the start, for all sessions.
    lookup: Lookup
    directory: Directory
    blocked: UserList
    allowed: Optional[UserList] = None
    limits: Limits
    describer: Describer
    path = ""  # of the socket that libmilter listens on
    queue = ""  # Postfix's queue_directory, where who called sendmail(1) is read
    # Sessions by the cookie of the MTA's end that each took for its own: two cannot both be right.
    claims: dict[Any, list[SysuserMilter]] = {}
    claims_lock = threading.Lock()
    this_thread = threading.local()  # whose session; pymilter keeps one thread state for each

    def __init__(self) -> None:
        self.client: Optional[str] = None  # address and port, as the log has them
        self.owner = unknown("error")
        self.submitted = False  # whether the message is from sendmail(1), or the MTA's own
        self.confirmed = False
        self.shaken = 0  # how many rivals have ended
        self.settled = 0  # how many had when the MTA's end was looked at
        self.facts: Facts = {"why": "error"}  # of the process
        self.account: Optional[Account] = None  # the owner as NSS had him at the first recipient
        self.sender, self.recipients, self.queue_id = "", 0, None
        self.commands, self.headers = 0, 0
        self.forged: list[str] = []
        self.refused: Optional[Verdict] = None  # for its headers

    def negotiate(self, opts: list[int]) -> int:
        """Ask the MTA for the server's end (pymilter's own symlist fails on Python 3)."""
        # pymilter takes one thread state from thread to thread. Python 3.14 keeps the limits of the
        # first stack, and ends the process outside of them (cpython gh-139653); here is no outside.
        if SET_STACK_LIMITS:
            this_state = ctypes.c_void_p(ctypes.pythonapi.PyThreadState_Get())
            SET_STACK_LIMITS(this_state, ctypes.c_void_p(4096), ctypes.c_size_t(1 << 20))
        if opts[0] & Milter.SETSYMLIST:
            self._ctx.setsymlist(Milter.M_CONNECT, "{daemon_addr} {daemon_port}")
        return int(Base.negotiate(self, opts))

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        """Ask the kernel who has connected. The MTA waits for this before it greets the client."""
        self.this_thread.session = self
        if isinstance(hostaddr, str) or (hostaddr and not hostaddr[1]):
            # The MTA's emulation of a client; where the server has a port, by XCLIENT, from afar.
            self.submitted = self.getsymval("{daemon_port}") in (None, "", "0")
            self.owner, self.facts = REMOTE, {"why": "submitted"}
        elif hostaddr is None:
            self.owner = unknown("closed")  # gone before the MTA asked for its address
        else:
            self.client = ("[%s]:%d" if ":" in hostaddr[0] else "%s:%d") % tuple(hostaddr[:2])
            self.owner = self.find_owner(endpoint(hostaddr[0], hostaddr[1]))
        if self.owner.uid is not None:
            with self.claims_lock:
                self.claims.setdefault(self.owner.mta_end.cookie, []).append(self)
        return int(Milter.CONTINUE)

    def find_owner(self, client: Endpoint) -> ClientSocket:
        """Find the client's socket."""
        server: Optional[Endpoint] = None
        with contextlib.suppress(ValueError):
            port = int(self.getsymval("{daemon_port}") or 0)
            server = endpoint(self.getsymval("{daemon_addr}") or "", port)
        try:
            owner = self.lookup.find_client_socket(client, server)
            if owner is REMOTE and container_networks:
                owner = find_container_client(self.lookup, self.describer, client, server)
            return owner
        except (OSError, psutil.Error) as error:
            complain("the owner of a connection could not be asked for", str(error))
            return unknown("error")

    def hello(self, hostname: str) -> int:
        """Confirm the owner: behind EHLO's answer a client can send all the rest and reset."""
        if self.owner.uid is not None:
            with contextlib.suppress(OSError, psutil.Error):  # at the end it is tried again
                self.confirm()
        return self.answer()

    def answer(self) -> int:
        """Go on; at each hundredth command make room: there may be no pause between them."""
        self.commands += 1
        if self.commands % 100 == 0:
            make_room()
        return int(Milter.CONTINUE)

    def envfrom(self, sender: str, *parameters: str) -> int:
        """Begin a message, forget the last; confirm the owner for a client that said no EHLO."""
        self.sender, self.recipients, self.queue_id = sender, 0, None
        self.headers, self.forged, self.refused, self.account = 0, [], None, None
        if self.submitted:
            self.owner = REMOTE  # until the message is complete
        return self.hello(sender)

    # The MTA waits for the answer to a recipient, a header and a command that it does not know. Did it
    # not, a client could let it write half a command, or have the next one there for as long as he
    # likes; see make_room.
    def envrcpt(self, recipient: str, *parameters: str) -> int:
        """Count a recipient; with the first, have the process described, and the user looked up."""
        self.recipients += 1
        if self.account is None and self.owner.uid is not None:
            # A process of root's can become somebody else's between two messages.
            if "pid" not in self.facts or self.owner.uid == 0:
                self.facts = self.describer.describe(self.owner)
            self.account = self.directory.account(self.owner.uid, self.owner.in_container)
        return self.answer()

    def unknown(self, command: str) -> int:
        """Answer a command that the MTA does not know; that is all."""
        return self.answer()

    @noreply  # type: ignore[untyped-decorator]
    def data(self) -> int:
        """Note the queue id, which a message has from now on; see "confirm"."""
        self.queue_id = self.getsymval("i")
        return int(Milter.CONTINUE)

    def header(self, name: str, value: str) -> int:
        """Note a header of our name, also behind a bare CR, which some take for a line's end."""
        self.headers += 1
        if len(self.forged) <= MOST_FORGED and name.strip().lower() == header_name.lower():
            self.forged.append(name)
            if len(self.forged) > MOST_FORGED:
                self.refused = Verdict("reject", "forged", f"More than {MOST_FORGED} {header_name} headers")
        if "\r" in name + value and re.search(
                rf"[\r\n]{re.escape(header_name)}[\x00-\x20]*:", f"{name}:{value}", re.IGNORECASE):
            self.refused = Verdict("reject", "forged", f"A {header_name} header behind a bare CR")
        if self.headers > MOST_HEADERS:
            self.refused = Verdict("reject", "headers", f"More than {MOST_HEADERS} headers")
            if not self.submitted:  # else it can only be held, at its end
                return self.eom()
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        """Decide, act and log."""
        sender, verdict = Sender(None, "error"), Verdict("tempfail", "unidentified", UNIDENTIFIED)
        try:
            if self.submitted:
                self.owner = read_submitter(str(self.getsymval("i")), self.queue)
            sender = self.identify()
            verdict = self.judge(sender)
        except Exception:
            report_exception(*sys.exc_info())
            # No fault of ours lets a blocked user pass. If this fails, too, it stays tempfail.
            with contextlib.suppress(Exception):
                uid = self.owner.uid
                seen = self.account or (None if uid is None else Account(uid, uid))
                verdict = self.judge(Sender(None, "error", {}, seen), lambda users: users.made[1])
        if self.submitted and verdict.action in REFUSALS:
            # A refusal would bounce to a sender that can be made up, or stay in maildrop.
            verdict = verdict._replace(action="quarantine")
        for step in (self.act, self.write_log):
            try:
                step(verdict, sender)
            except Milter.error as error:  # the MTA has gone, its mail with it
                complain("the MTA did not take an answer", str(error))
            except Exception:
                report_exception(*sys.exc_info())
        answers = {"reject": Milter.REJECT, "tempfail": Milter.TEMPFAIL}
        return int(answers.get(verdict.action, Milter.CONTINUE))

    def close(self) -> int:
        """Give the socket back."""
        with self.claims_lock:
            cookie = self.owner.mta_end.cookie
            others = [session for session in self.claims.get(cookie, []) if session is not self]
            for rival in others:
                rival.shaken += not (self.queue_id and rival.queue_id == self.queue_id)
            self.claims[cookie] = others  # only now: "confirm" looks here, and then at "shaken"
            if not others:
                del self.claims[cookie]
        return int(Milter.CONTINUE)

    def confirm(self) -> str:
        """Say why the owner cannot be believed, or "" once he can be: for good, without rivals.

        Between accept(2) and the look at the kernel, a client can reset and let another user's
        connection take its four endpoints. While the MTA's end lives, the client's end cannot
        change hands. So the MTA's end must still be the one that was looked at, by its cookie. And
        the MTA must have read from it since: from a newer connection's end it reads nothing until it
        has announced that, too. Then two sessions, rivals, claim one end, and what was read before
        proves nothing for either.
        """
        if self.confirmed and not self.rivals() and self.settled == self.shaken:
            return ""
        self.confirmed, shaken = False, self.shaken
        before, now = self.owner.mta_end, self.lookup.look_again(self.owner.mta_end)
        if now is None:
            return "closed"
        # Rivals are asked for after the look: what was read by then had been announced before.
        if now.cookie != before.cookie or self.rivals():
            return "reused"
        if self.settled != shaken:
            self.owner, self.settled = self.owner._replace(mta_end=now), shaken
        elif self.shaken == shaken and now.read > before.read:
            self.confirmed = True
            return ""
        return "reused"

    def rivals(self) -> list[SysuserMilter]:
        """Give the other sessions with the same claim, but not the same session of the MTA's.

        The MTA can announce one connection twice: by XCLIENT, or where the milter is listed twice.
        The message then has one queue id in both, from DATA on, which is waited for.
        """
        deadline = time.monotonic() + (RIVAL_SECONDS if self.queue_id else 0.0)
        while True:
            rivals = [session for session in self.claims.get(self.owner.mta_end.cookie, [])
                      if session is not self and not (self.queue_id and session.queue_id == self.queue_id)]
            if not rivals or time.monotonic() >= deadline:
                return rivals
            time.sleep(0.002)

    def identify(self) -> Sender:
        """Say who sent the message, or who it may have been."""
        owner, facts = self.owner, self.facts
        if owner.uid is None:
            return Sender(None, "" if owner is REMOTE else owner.why)
        account = self.account or self.directory.account(owner.uid, owner.in_container)
        uid = facts.get("holder_uid", owner.uid)
        holder = account if uid == owner.uid else self.directory.account(uid, owner.in_container)
        other = holder if holder.uid != account.uid else None
        why = self.why_not_named(account)
        if why:
            return Sender(None, why, {}, account, other)
        return Sender(account, str(facts.get("why", "")), facts, None, other)

    def why_not_named(self, account: Account) -> str:
        """Say in a word why the owner must not be named, or ""."""
        if self.submitted:
            return account.doubt
        try:
            why = self.confirm() or account.doubt
            if self.owner.uid == 0 and not why and not self.owner.process:
                why = why_not_root(self.owner.mta_end.destination.port, self.facts)
            return why
        except (OSError, psutil.Error) as error:
            complain("the owner of a connection could not be asked for", str(error))
            return "error"

    def judge(self, sender: Sender, read: Callable[[UserList], Entries] = lambda users: users.now()) -> Verdict:
        """Say what becomes of the message; read: gives what a list says now, or said last."""
        if self.refused:
            return self.refused
        if self.owner is REMOTE:
            return Verdict("pass")
        blocked, *allowed = map(read, filter(None, (self.blocked, self.allowed)))
        suspects = (sender.account,) if sender.account else (sender.maybe, sender.holder)
        for suspect in filter(None, suspects):
            refused = refusal_of(suspect, blocked, *allowed)
            if refused:
                return refused
        if sender.account is None:
            return unidentified(sender.lookup)
        if unidentified_action != "accept" and is_unsaid(sender.account, blocked):
            return unidentified("error")
        return self.limits.verdict(sender.account, self.recipients) or passed()

    def act(self, verdict: Verdict, sender: Sender) -> None:
        """Have the MTA do it."""
        if verdict.action in REFUSALS:
            self.setreply(*REFUSALS[verdict.action], verdict.text.replace("%", "\\x25"))
            return
        if verdict.action == "quarantine":
            self.quarantine(verdict.text)
        for index in range(len(self.forged), 0, -1):
            self.chgheader(self.forged[index - 1], index, "")
        if self.owner is not REMOTE and header_fields:
            words = key_values(sender.values(header_fields))
            self.addheader(header_name, fold(words, len(header_name) + 2))

    def write_log(self, verdict: Verdict, sender: Sender) -> None:
        """Write the message's one line."""
        pairs: list[tuple[str, Any]] = [("client", self.client)]
        pairs += sender.values(log_fields) if self.owner is not REMOTE else []
        pairs += [("from", self.sender.strip("<>")), ("rcpts", self.recipients), ("action", verdict.action)]
        pairs += [("reason", verdict.reason)] if verdict.reason else []
        pairs += [("lookup", sender.lookup)] if sender.lookup else []
        for key, account in ("maybe", sender.maybe), ("holder", sender.holder):
            pairs += [(key, account.name or account.uid)] if account else []
        say(INFO, f"{quote(self.getsymval('i'))}: {' '.join(key_values(pairs))}")


def make_room() -> None:
    """Have libmilter start another thread; for a session that may keep its own for long.

    libmilter's pool of threads (worker.c, in Debian's build) can give several sessions to one idle
    thread, which stays with the first while that has a command. The others wait until a thread
    looks for work, as one does that is started for a new connection, be it closed at once.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        probe.connect(SysuserMilter.path)


def report_exception(kind: Any, error: Any, trace: Any) -> None:
    """Log a traceback. pymilter calls this, too, as sys.excepthook, for bytes that it cannot decode.

    If they stand behind EHLO, hello is not called, and the owner is confirmed here.
    """
    session = getattr(SysuserMilter.this_thread, "session", None)
    if kind is UnicodeDecodeError and session and not session.confirmed:
        session.hello("")
    if complain(f"a callback failed: {kind.__name__}") and kind is not UnicodeDecodeError:
        for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
            say(ERROR, "  " + line.encode("ascii", "backslashreplace").decode())


# ---------------------------------------------------------------------------------- values, the log
VALUE_CHARACTERS, LINE_OCTETS = 256, 998  # of a value; of a header's line (RFC 5322, 2.1.1)
MOST_REMEMBERED = 10_000  # entries in each memory
Facts = dict[str, Any]  # of one process: FIELDS, and "holder_uid"; or "why" they are unknown
Lookup = Union["KernelLookup", "PsutilLookup"]


class Endpoint(NamedTuple):
    """One end of a TCP connection; a v4-mapped address is the four bytes it stands for."""

    address: bytes
    port: int


class Diag(NamedTuple):
    """What the kernel says of one socket (struct inet_diag_msg and attributes)."""

    state: int
    source: Endpoint
    destination: Endpoint
    uid: int
    inode: int
    cookie: Any = None  # the kernel's number of this one socket, never used again
    cgroup: int = 0  # inode number of the cgroup v2 directory; 0: not known (before Linux 5.8)
    read: int = 0  # bytes that were received and that a process has taken; 0 before Linux 4.1
    received: int = 0  # 0 before Linux 4.1
    sent: int = 0  # 0 before Linux 4.19
    interface: int = 0  # the index of the device that it is bound to; 0: none

    def can_be_behind(self, mta_end: Diag) -> bool:
        """Tell whether a socket that dialled the same can be the client of the MTA's end."""
        return self.received <= mta_end.sent and (self.inode > 0 or self.state != FIN_WAIT2)


class ClientSocket(NamedTuple):
    """The client's end of a connection: whose it is; and the MTA's end, as it was then."""

    uid: Optional[int]  # of whoever made it; None: not known
    why: str = ""  # one word, where uid is None
    inode: int = 0  # 0: no process has it open any more
    cgroup: int = 0
    mta_end: Diag = Diag(0, Endpoint(b"", 0), Endpoint(b"", 0), 0, 0)
    process: Optional[psutil.Process] = None  # that has it; only where there is no sock_diag
    in_container: bool = False  # whether the uid's name is the container's own, not this host's


REMOTE = ClientSocket(None, "remote")  # what the client of another host has, or no client at all


def unknown(why: str) -> ClientSocket:
    """Stand for a socket of this host whose owner is not known; why: one word."""
    return ClientSocket(None, why)


class Sender(NamedTuple):
    """Who sent a message, and with what."""

    account: Optional[Account]  # None: not known
    lookup: str  # one word, why something is not known, or ""
    facts: Facts = {}
    maybe: Optional[Account] = None  # who was seen, and could not be confirmed
    holder: Optional[Account] = None  # who has the socket, if that is somebody else

    def values(self, fields: Iterable[str]) -> list[tuple[str, Any]]:
        """Give the fields of a header or log line with their values, None where one is unknown."""
        account = self.account
        user = (account.name or account.uid) if account else None
        known = {**self.facts, "user": user, "uid": account.kernel_uid if account else None}
        return [(field, known.get(field)) for field in fields]


class Verdict(NamedTuple):
    """What becomes of a message."""

    action: str
    reason: str = ""
    text: str = ""  # of the reply


def escape(data: bytes, unsafe: bytes) -> bytes:
    r"""Write every byte of a class of a regular expression as \xNN."""
    return re.sub(unsafe, lambda byte: b"\\x%02x" % byte[0][0], data, flags=re.DOTALL)


@functools.lru_cache(maxsize=1024)  # the same few stand in every line
def quote(value: Any) -> str:
    """Make a value fit for a header, a reply or a log line; None is written "?"."""
    if value is None:
        return "?"
    try:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other lone surrogates than those that stand for bytes
        data = str(value).encode("utf-8", "surrogatepass")
    if len(data) <= VALUE_CHARACTERS and re.fullmatch(rb"[A-Za-z0-9._+@/:-]+", data):
        return data.decode()
    text = escape(data[:VALUE_CHARACTERS + 1], rb'[^ !#-\[\]-~]').decode()
    if len(text) > VALUE_CHARACTERS:  # cut, but never within an escape
        text = re.sub(r"\\(x[0-9a-f]?)?$", "", text[:VALUE_CHARACTERS - 3]) + "..."
    return f'"{text}"'


def key_values(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """Write pairs as key=value, values quoted."""
    return [f"{key}={quote(value)}" for key, value in pairs]


def fold(words: list[str], taken: int) -> str:
    """Join words, breaking lines so that none passes 998 octets; taken: octets of the name."""
    text, room = "", LINE_OCTETS - taken + 1
    for word in words:
        fits = len(word) < room
        room = (room if fits else LINE_OCTETS) - len(word) - 1
        text += (" " if fits else "\n\t") + word
    return text[1:]


def remember(memory: dict[Any, Any], key: Any, value: Any, most: int = MOST_REMEMBERED) -> None:
    """Put an entry into a bounded memory; what was put there the longest ago is forgotten first."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:
        del memory[next(iter(memory))]


LEVELS = {3: "ERROR", 4: "WARNING", 6: "INFO"}  # syslog(3)
ERROR, WARNING, INFO = LEVELS
LINE_BYTES = 4000  # below PIPE_BUF, so that a pipe takes all of a line or nothing
COMPLAINT_SECONDS = 60  # between two lines that complain of the same
COMPLAINTS: dict[str, tuple[float, int]] = {}  # by text: when it was logged, how often it was not


@functools.lru_cache(maxsize=1)
def log_target() -> tuple[int, bool]:
    """Give the descriptor to log to, and whether the journal reads it (systemd.exec(5)).

    A pipe or terminal is opened anew, so that no write waits, and no other writer notices.
    """
    status = os.fstat(2)
    journalled = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        with contextlib.suppress(OSError):
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), journalled
    return 2, journalled


def say(level: int, text: str) -> None:
    """Write one line, with its level for journald (sd-daemon(3)), else with time and level."""
    with contextlib.suppress(OSError):  # a full disk or pipe must not reach the mail
        descriptor, journalled = log_target()
        stamp = f"<{level}>" if journalled else time.strftime(f"%Y-%m-%d %H:%M:%S {LEVELS[level]} ")
        data = escape((stamp + text).encode("utf-8", "backslashreplace"), rb"[\x00-\x1f\x7f]")[:LINE_BYTES]
        try:
            if select.select([], [descriptor], [], 0)[1]:  # else nobody reads: the line is lost
                os.write(descriptor, data + b"\n")
        except ConnectionError:
            if journalled:  # a journald that was stopped does not take its streams up again
                # systemd.io/JOURNAL_NATIVE_PROTOCOL; the facility is mail, as in the unit
                fields = b"PRIORITY=%d\nSYSLOG_FACILITY=2\nSYSLOG_IDENTIFIER=milter_sysuser\nMESSAGE=%b\n"
                native = fields % (level, data[len(stamp):])
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
                    journal.sendto(native, socket.MSG_DONTWAIT, "/run/systemd/journal/socket")


def complain(text: str, *details: str, level: int = ERROR) -> bool:
    """Log what may repeat for every message, once a minute with a count; tell whether it was."""
    last, count = COMPLAINTS.get(text, (float("-inf"), 0))
    if time.monotonic() - last < COMPLAINT_SECONDS:
        COMPLAINTS[text] = last, count + 1
        return False
    remember(COMPLAINTS, text, (time.monotonic(), 0))
    more = f" ({count} more before)" if count else ""
    say(level, ": ".join([text, *map(quote, details)]) + more)
    return True


# -------------------------------------------------------------------- lookup: whose a connection is
# linux/netlink.h, sock_diag.h, rtnetlink.h; net/flow.h
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 0x1, 0x300, 2, 3
NETLINK_ROUTE, NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 0, 4, 20
RTM_GETROUTE, RTA_DST, RTN_LOCAL, RTN_ANYCAST = 26, 1, 2, 4
LOOPBACK = 1  # LOOPBACK_IFINDEX: the index of lo, in every network namespace
NETLINK_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: size, kind, flags, number, port
V4_MAPPED = bytes(10) + b"\xff\xff"  # how IPv6 has IPv4
FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}  # by the length of an address
# What RTM_GETROUTE says of an address that no route leads to, or whose family the kernel lacks.
NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP,
            errno.EAFNOSUPPORT}


def endpoint(address: str, port: int) -> Endpoint:
    """Put together an end of a connection as an MTA gives it; ValueError."""
    return Endpoint(packed(address), port)


@functools.lru_cache(maxsize=1024)  # the same few come with each connection
def packed(address: str) -> bytes:
    """Read an address as MTAs write it ("IPv6:::1", "[::1]", "fe80::1%eth0"); ValueError."""
    bare = re.sub(r"^\[?(?i:IPv6:)?|\]$|%.*$", "", address)
    return ipaddress.ip_address(bare).packed.removeprefix(V4_MAPPED)


class KernelLookup:
    """Ask the kernel, without privilege: sock_diag(7), and rtnetlink(7) for what is local."""

    name = "sock_diag"

    def __init__(self, what_was_dialled: Callable[[Diag], Union[Endpoint, str]]) -> None:
        """Open the sockets; what_was_dialled: by a redirected client, or why that is not known."""
        self.what_was_dialled, self.lock, self.number = what_was_dialled, threading.Lock(), 0
        self.buffer = ctypes.create_string_buffer(32768)
        # Later there may be no descriptors left.
        self.sock_diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        self.rtnetlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)

    def find_client_socket(self, client: Endpoint, server: Optional[Endpoint]) -> ClientSocket:
        """Say whose the client's end is; server: None where the MTA did not say. OSError."""
        server = whole_end(server, client, lambda: (diag[1:3] for diag in self.dump(0, client.port)
                                                    if diag.inode))
        client_end = self.find(client, server) if server else None
        if client_end is None and not self.is_local(client.address):
            return REMOTE
        if server is None:
            return unknown("closed")
        client_end = client_end or self.find_on_any_device(client, server)
        if client_end is None:
            return self.find_redirected(client, server)
        return client_socket(client_end, self.find(server, client, client_end.interface))

    def find_redirected(self, client: Endpoint, server: Endpoint) -> ClientSocket:
        """Say whose the client's end is, which NAT hides: by what it dialled.

        NAT changes a source port, too, where two connections would else be the same. It may then be
        that of somebody who dialled the same and was not redirected. So of all sockets that dialled
        it and have not received more than the MTA has sent, none may be another user's: one is the
        client's, since one that was closed with nothing left to send would show at the MTA's end.
        """
        mta_end = self.find(server, client)
        if mta_end is None or not mta_end.inode:
            return unknown("closed")
        dialled = self.what_was_dialled(mta_end)
        if isinstance(dialled, str):
            return unknown(dialled)
        dialling = [diag for diag in self.dump(0, dialled.port) if diag.destination == dialled]
        client_end = next((diag for diag in dialling if diag.source == client), None)
        uids = {diag.uid for diag in dialling if diag.can_be_behind(mta_end)}
        now = self.find(server, client)
        if client_end is None or now is None or now.state != ESTABLISHED:
            return unknown("closed")
        return client_socket(client_end, mta_end if uids == {client_end.uid} else None)

    def look_again(self, end: Diag) -> Optional[Diag]:
        """Give the MTA's end as it is now; None if it is closed."""
        return self.find(end.source, end.destination, end.interface)

    def find(self, source: Endpoint, destination: Endpoint, interface: int = 0) -> Optional[Diag]:
        """Ask for one socket by both ends, and the index of the device it is bound to; or None."""
        question = diag_request(source, destination, interface or LOOPBACK)
        try:
            diag = read_diag(self.ask(self.sock_diag, SOCK_DIAG_BY_FAMILY, question)[0])
        except FileNotFoundError:
            return None
        found = diag.source, diag.destination, diag.state in STATES
        return diag if found == (source, destination, True) else None  # it may offer a listener

    def find_on_any_device(self, source: Endpoint, destination: Endpoint) -> Optional[Diag]:
        """Look for one socket by both ends in the list; None if there is none, or several."""
        # Of those with the same ends, bound to a device or not, "find" sees one, in any state.
        found = [diag for diag in self.dump(source.port, destination.port)
                 if (diag.source, diag.destination) == (source, destination)]
        return found[0] if len(found) == 1 else None

    def dump(self, source_port: int, destination_port: int) -> list[Diag]:
        """List the TCP sockets with these ports (0: any) whose state counts; takes milliseconds."""
        found: list[Diag] = []
        for address in b"\0" * 4, b"\0" * 16:
            question = diag_request(Endpoint(address, source_port), Endpoint(address, destination_port), 0)
            found += map(read_diag, self.ask(self.sock_diag, SOCK_DIAG_BY_FAMILY, question, NLM_F_DUMP))
        return found

    def is_local(self, address: bytes) -> bool:
        """Tell whether the routing table has an address as this host's own; OSError."""
        question = struct.pack("=BB10xHH", FAMILIES[len(address)], 8 * len(address), 4 + len(address), RTA_DST)
        try:
            route = self.ask(self.rtnetlink, RTM_GETROUTE, question + address)[0]
        except OSError as error:
            if error.errno in NO_ROUTE:
                return False
            raise
        return route[7] in (RTN_LOCAL, RTN_ANYCAST)  # rtm_type of struct rtmsg

    def ask(self, netlink: socket.socket, kind: int, question: bytes, flags: int = 0) -> list[bytes]:
        """Send one request; give the body of its answer, or of each for NLM_F_DUMP; OSError.

        ctypes keeps the interpreter's lock: the answer is there when send(2) returns, and to give
        the lock up costs several times as much under load.
        """
        bodies = []
        with self.lock:
            self.number = number = (self.number + 1) & 0xFFFFFFFF
            size = NETLINK_HEADER.size + len(question)
            request = NETLINK_HEADER.pack(size, kind, NLM_F_REQUEST | flags, number, 0) + question
            checked(LIBC.send(netlink.fileno(), request, size, 0))
            while flags or not bodies:
                size = checked(LIBC.recv(netlink.fileno(), self.buffer, len(self.buffer), socket.MSG_DONTWAIT))
                answers = ctypes.string_at(self.buffer, size)
                while answers:
                    size, kind, _, answered, _ = NETLINK_HEADER.unpack_from(answers)
                    body, answers = answers[NETLINK_HEADER.size:size], answers[max(16, (size + 3) & ~3):]
                    if answered != number:  # left from a question that failed
                        continue
                    code = -struct.unpack_from("=i", body)[0] if kind in (NLMSG_ERROR, NLMSG_DONE) else 0
                    if code:
                        raise OSError(code, os.strerror(code))
                    if kind == NLMSG_DONE:
                        return bodies
                    bodies.append(body)
        return bodies


def client_socket(client_end: Diag, mta_end: Optional[Diag]) -> ClientSocket:
    """Put together what the kernel says of both ends, unless the owner cannot be known from it."""
    if not client_end.uid and not client_end.inode:
        return unknown("closed")  # an orphan: the kernel has forgotten whose it was
    if client_end.uid == OVERFLOW_UID and mapped_uids() < ALL_UIDS:
        return unknown("error")
    if mta_end is None or not mta_end.inode:
        # The MTA asks about an accepted connection. An end without an inode is of a later one.
        return unknown("reused")
    return ClientSocket(client_end.uid, "", client_end.inode, client_end.cgroup, mta_end)


def whole_end(server: Optional[Endpoint], client: Endpoint,
              pairs: Callable[[], Iterable[Any]]) -> Optional[Endpoint]:
    """Give the MTA's end; if the MTA does not say all of it, that of the pairs with this peer, or None."""
    port = server.port if server else 0
    if server and port and any(server.address):
        return server
    ends = {near for near, far in pairs() if far == client and port in (0, near.port)}
    return ends.pop() if len(ends) == 1 else None


def checked(result: int) -> int:
    """Pass on what a C function returned; OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# linux/inet_diag.h, tcp.h; net/tcp_states.h
INET_DIAG_INFO, INET_DIAG_CGROUP_ID, ANY_COOKIE = 2, 21, 0xFFFFFFFFFFFFFFFF
ESTABLISHED, FIN_WAIT2 = 1, 5
STATES = {ESTABLISHED, 4, FIN_WAIT2, 8, 9, 11}  # and FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING
STATES_MASK = sum(1 << state for state in STATES)  # a message may be under way
# struct inet_diag_req_v2: family, protocol, attributes, states, ports, addresses, device, cookie
DIAG_REQUEST = struct.Struct("=BBBxI2s2s16s16sIQ")
# struct inet_diag_msg: family, state, ports, addresses, device, cookie, bytes not read, uid, inode
DIAG = struct.Struct("=BB2x2s2s16s16sIQ4xI4xII")
TCP_INFO = struct.Struct("=128xQ64xQ")  # struct tcp_info: bytes received (Linux 4.1), sent (4.19)


def diag_request(source: Endpoint, destination: Endpoint, interface: int) -> bytes:
    """Build a question for one socket, given by both ends."""
    return DIAG_REQUEST.pack(
        FAMILIES[len(source.address)], socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), STATES_MASK,
        source.port.to_bytes(2, "big"), destination.port.to_bytes(2, "big"),
        source.address, destination.address, interface, ANY_COOKIE)


def read_diag(body: bytes) -> Diag:
    """Read one answer with its attributes; OSError if it is cut short."""
    if len(body) < DIAG.size:
        raise OSError(0, "sock_diag gave a message that is cut short")
    family, state, near_port, far_port, near, far, interface, cookie, unread, uid, inode = DIAG.unpack_from(body)
    cgroup, info, at = 0, b"", DIAG.size
    while at + 4 <= len(body):
        size, kind = struct.unpack_from("=HH", body, at)  # struct nlattr
        if kind == INET_DIAG_CGROUP_ID:
            cgroup = int.from_bytes(body[at + 4:at + size], sys.byteorder)
        elif kind == INET_DIAG_INFO:
            info = body[at + 4:at + size]
        at += max((size + 3) & ~3, 4)
    received, sent = TCP_INFO.unpack_from(info.ljust(TCP_INFO.size, b"\0"))
    if family == socket.AF_INET:
        near, far = near[:4], far[:4]
    source = Endpoint(near.removeprefix(V4_MAPPED), int.from_bytes(near_port, "big"))
    destination = Endpoint(far.removeprefix(V4_MAPPED), int.from_bytes(far_port, "big"))
    return Diag(state, source, destination, uid, inode, cookie, cgroup, max(0, received - unread), received,
                sent, interface)


class PsutilLookup:
    """Do what KernelLookup does, without sock_diag: slowly, with the holder for the owner."""

    name = "psutil (holders, not owners)"

    def find_client_socket(self, client: Endpoint, server: Optional[Endpoint]) -> ClientSocket:
        """Say who has the client's end; psutil.Error, OSError."""
        found = {(endpoint(*one.laddr), endpoint(*one.raddr)): one.pid
                 for one in psutil.net_connections("tcp") if one.raddr}
        server = whole_end(server, client, lambda: found)
        if (client, server) not in found:
            local = ipaddress.ip_address(client.address) in own_addresses()
            return unknown("closed") if local or client.address[:1] == b"\x7f" else REMOTE
        pid = found[client, cast(Endpoint, server)]
        if pid is None:  # psutil.Process(None) would be this process
            return unknown("not-permitted")
        holder = psutil.Process(pid)
        mta_end = Diag(ESTABLISHED, cast(Endpoint, server), client, 0, 0, (client, pid))
        return ClientSocket(holder.uids().effective, mta_end=mta_end, process=holder)

    def look_again(self, end: Diag) -> Optional[Diag]:
        """Look for the holder once more. What the MTA has read is not known, and counts as more."""
        now = self.find_client_socket(end.destination, end.source)
        return None if now.uid is None else now.mta_end._replace(read=end.read + 1)


def own_addresses() -> set[Any]:
    """Give the addresses of this host's interfaces."""
    return {ipaddress.ip_address(one.address.split("%")[0])
            for nics in psutil.net_if_addrs().values() for one in nics
            if one.family in (socket.AF_INET, socket.AF_INET6)}


def choose_lookup(what_was_dialled: Callable[[Diag], Union[Endpoint, str]]) -> tuple[Lookup, str]:
    """Try the kernel on a connection of our own; give what works, and what is wrong; OSError.

    Where users have taken every port, it goes untried: they must not keep the milter from starting.
    """
    if not LINUX:
        return PsutilLookup(), "there is no sock_diag here"
    try:
        lookup = KernelLookup(what_was_dialled)
        lookup.dump(1, 1)
        local = lookup.is_local(socket.inet_aton("127.0.0.1"))
    except OSError as error:
        cure = " (is the tcp_diag module there?)" if isinstance(error, FileNotFoundError) else ""
        return PsutilLookup(), f"sock_diag: {error.strerror}{cure}"
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname()) as connection:
            diag = lookup.find(endpoint(*connection.getsockname()), endpoint(*connection.getpeername()))
            expected = os.geteuid(), os.fstat(connection.fileno()).st_ino
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            return lookup, f"sock_diag could not be tried, all ports are taken: {error.strerror}"
        raise
    if local and diag and (diag.uid, diag.inode) == expected:
        return lookup, ""
    return PsutilLookup(), "sock_diag or rtnetlink is wrong about a connection of our own"


# user_namespaces(7): what shows for a uid that is not mapped; how many a host maps, and we need
OVERFLOW_UID, ALL_UIDS, ENOUGH_UIDS = 65534, (1 << 32) - 1, 65536


@functools.lru_cache(maxsize=1)  # it is written once
def mapped_uids() -> int:
    """Count the uids that this process's user namespace maps; ALL_UIDS on the host itself."""
    try:
        return sum(int(line.split()[2]) for line in read_file("/proc/self/uid_map").splitlines())
    except FileNotFoundError:  # a kernel without user namespaces
        return ALL_UIDS


def why_not_root(port: int, facts: Facts) -> str:
    """Say why root must not be named for a socket that root made, or "".

    Root's programs leave sockets to processes of others, who can disconnect them and dial with
    them. A listener still has its server's port, none that the kernel gives to clients by itself.
    Who has an accepted one is for the description to say: "holder_uid".
    """
    low, high = map(int, read_file("/proc/sys/net/ipv4/ip_local_port_range").split())
    if not low <= port <= high:
        return "handed-down"
    if "holder_uid" not in facts:
        return str(facts.get("why", "error"))
    return "" if facts["holder_uid"] == 0 else "handed-down"


# --------------------------------------------------------------- the queue: who called sendmail(1)
# Postfix does not tell milters. But the first header of such a message is its pickup(8)'s, with the
# uid that the kernel gave the file in maildrop, and with the message's queue id in the next line.
# header_checks can remove it. Then a header that the user wrote comes first, which may look the
# same; but what the user writes is written before there is a queue id. The MTA's own mail (a bounce)
# has no uid there, and has in its envelope what postdrop(1) lets nobody write.
FIRST_HEADER = re.compile(rb"Received: by [^\n]+ \([^\n]+?(?:, from userid (\d{1,10}))?\)\n\tid (\w+); ")
MOST_RECORD_BYTES, MOST_JUMPS = 1 << 16, 10_000  # line_length_limit is 2048; record.c of Postfix


def find_queue() -> str:
    """Give Postfix's queue_directory: the socket lies in it, or postconf names it; or ""."""
    above = os.path.dirname(os.path.dirname(socketname))
    if os.path.isdir(f"{above}/maildrop"):
        return above
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        return postconf("-xh", "queue_directory")[0]
    return ""


def read_submitter(queue_id: str, queue: str) -> ClientSocket:
    """Say who called sendmail(1) for a message that is complete; REMOTE if it is the MTA's own."""
    try:
        with open(open_queue_file(queue_id, queue), "rb", MOST_RECORD_BYTES) as file:
            is_own, top = read_top(read_records(file))
        match = FIRST_HEADER.match(top)
        if match is None or match[2] != queue_id.encode() or not (match[1] or is_own):
            raise ValueError("the first header is not Postfix's own: do header_checks change it?")
        return ClientSocket(int(match[1])) if match[1] else REMOTE
    except (OSError, ValueError) as error:
        complain("who called sendmail(1) is not known", str(error))
        return unknown("error")


def read_top(records: Iterator[tuple[bytes, bytes]]) -> tuple[bool, bytes]:
    """Tell whether the MTA itself wrote a message, and what it begins with; ValueError."""
    envelope = itertools.takewhile(lambda record: record[0] != b"M", records)
    is_own = operator.countOf(envelope, (b"A", b"log_message_origin=local")) > 0
    first = next(records, (b"", b""))
    head = [first, *itertools.islice(records, 99)]
    top = b"\n".join(data for kind, data in head if kind in (b"N", b"L"))
    if first[0] == b"p":  # other milters have put headers above the first
        top = top[top.find(b"Received:"):]
    return is_own, top


def open_queue_file(queue_id: str, queue: str) -> int:
    """Open a message's file, however deep below incoming it lies (hash_queue_depth); OSError."""
    places = [f"{queue}/incoming"] if re.fullmatch("[0-9A-Za-z]{6,64}", queue_id) else []
    for place in places:
        try:
            descriptor = os.open(f"{place}/{queue_id}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            # It grows while it is gone through: hash_queue_names makes a directory of each digit.
            places += [entry.path for entry in os.scandir(place) if len(entry.name) == 1]
            continue
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and os.geteuid() in (0, status.st_uid):
            return descriptor
        os.close(descriptor)
    raise OSError(f"{queue_id} is not a message in {queue}/incoming, or not ours")


def read_records(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Give type and data of a queue file's records in order, up to one that is cut; ValueError."""
    for _ in range(MOST_JUMPS):
        kind = data = b""
        while kind != b"p" or not int(data):  # which says where a milter's change stands
            kind, size, shift, byte = file.read(1), 0, 0, 0x80
            while byte & 0x80 and shift < 28:  # seven bits a byte, the lowest first
                byte = int.from_bytes(file.read(1), "big")
                size, shift = size | (byte & 0x7F) << shift, shift + 7
            data = file.read(min(size, MOST_RECORD_BYTES))
            if not kind or len(data) < size:
                return
            yield kind, data
        file.seek(int(data))


# --------------------------------------------------------- policy: who that is, and what he may do
FIRST_SECONDS, AGAIN_SECONDS = 3.0, 0.3  # to wait for NSS: about someone new, about someone known
REFRESH_SECONDS = 60  # to believe what NSS said
MOST_QUESTIONS = 100  # that NSS has not answered yet; each has a thread
NO_GID, NGROUPS_MAX = (1 << 32) - 1, 65536  # no group's, chown(2); of a process, linux/limits.h
NSS = ctypes.CDLL(None)  # CDLL: a call gives up the interpreter's lock, as one that may hang has to


class Account(NamedTuple):
    """A user as the directory service (NSS) knows it."""

    kernel_uid: int  # as the kernel gave it
    uid: int  # of the account; for a delegated uid that of the user it was delegated to
    name: Optional[str] = None  # None: no such user, or not known yet
    gids: frozenset[int] = frozenset()
    answered: bool = False  # whether NSS has said so, now or before
    stale: bool = False  # whether NSS was asked again, and has not answered yet
    local: bool = False  # whether /etc/passwd has the name
    doubt: str = ""  # one word, where this may be the wrong account


NOT_ASKED = float("-inf"), threading.Event()  # when a question was put, and the event of its answer
NOT_ANSWERED = None, float("-inf"), None  # what NSS said, when it was asked, the state of the files then


class Directory:
    """What the directory service (NSS) says, remembered.

    Each question has a thread of its own, since NSS may hang. Whoever needs the answer waits 0.3 s
    if there is an older one, else 3 s, counted from when the question was put: so one that hangs is
    waited for once, and stands before no other.
    """

    def __init__(self) -> None:
        self.lock, self.ending = threading.Lock(), False
        # By function and key: answers, and questions that are not answered yet.
        self.answers: dict[Any, dict[Any, tuple[Any, float, Any]]] = {}
        self.asked: dict[Any, tuple[float, threading.Event]] = {}

    def account(self, uid: int, in_container: bool = False) -> Account:
        """Say who has a uid; in a container that is its number."""
        if in_container:
            return Account(uid, uid, str(uid), answered=True)
        account: Optional[Account]
        account, is_current = self.ask(look_up_account, uid, state_of_files())
        if account is None:
            complain("the directory service (NSS) is slow: users who are new here are given by number")
            return said_by_subuid(uid)
        if is_current:
            return account
        # What NSS said before still holds, but for a name that /etc/passwd had and has no more.
        gone = account.local and account.name not in local_file("/etc/passwd")[1].get(account.uid, {})
        return account._replace(name=None if gone else account.name, stale=True)

    def ask(self, function: Callable[[Any, Any], Any], key: Any, state: Any,
            in_session: bool = True) -> tuple[Any, bool]:
        """Give NSS's answer (None: none yet), and whether it is to this state, of this minute."""
        answers = self.answers.setdefault(function, {})
        patience = AGAIN_SECONDS if key in answers or self.ending else FIRST_SECONDS
        until = time.monotonic() + patience
        for tries_left in 2, 1, 0:  # the first question may have been put before the state changed
            value, asked_at, state_then = answers.get(key, NOT_ANSWERED)
            is_current = state_then == state and time.monotonic() - asked_at < REFRESH_SECONDS
            if is_current or not tries_left:
                break
            asked_at, answered = self.begin(function, key, state)
            if in_session:
                make_room()
            if not answered.wait(max(0.0, min(until, asked_at + patience) - time.monotonic())):
                break
        return value, is_current

    def begin(self, function: Callable[[Any, Any], Any], key: Any, state: Any) -> tuple[float, threading.Event]:
        """Ask function(key, last answer), unless that is under way; NOT_ASKED if it cannot be."""
        with self.lock:
            if (function, key) not in self.asked and len(self.asked) < MOST_QUESTIONS:
                asked = time.monotonic(), threading.Event()
                try:
                    threading.Thread(target=self._look_up, args=(function, key, state, *asked), daemon=True).start()
                    self.asked[function, key] = asked
                except RuntimeError as error:  # the system has no more threads
                    complain("the directory service (NSS) could not be asked", str(error))
            return self.asked.get((function, key), NOT_ASKED)

    def _look_up(self, function: Any, key: Any, state: Any, asked_at: float, answered: threading.Event) -> None:
        answers = self.answers.setdefault(function, {})
        try:
            value = function(key, answers.get(key, NOT_ANSWERED)[0])
            with self.lock:
                remember(answers, key, (value, asked_at, state))
        except Exception as error:
            complain("the directory service (NSS) could not be asked", str(error))
        with self.lock:
            del self.asked[function, key]
        answered.set()

    def end(self) -> None:
        """Let nobody wait for long any more, as the milter is told to end."""
        with self.lock:
            self.ending = True
            for _, answered in self.asked.values():
                answered.set()


LACKING: dict[str, float] = {}  # what NSS had, and does not find although no file says so; and when


def note_lack(what: str, lacks: bool) -> None:
    """Note whether NSS lacks something; log when it begins to, and when it has all again.

    What was not asked for in the last two minutes is forgotten.
    """
    lacked, now = bool(LACKING), time.monotonic()
    LACKING[what] = now if lacks else float("-inf")
    for noted, noted_at in list(LACKING.items()):
        if now - noted_at > 2 * REFRESH_SECONDS:
            LACKING.pop(noted, None)
    if lacked != bool(LACKING):
        say(WARNING, "the directory service (NSS) " + (
            f"lacks what it had ({quote(what)}): users keep their groups, and nobody is refused for good for being in "
            "no group" if LACKING else "has again what it had"))


def state_of_files() -> tuple[Any, ...]:
    """Give what changes when a file of accounts does."""
    return tuple(map(state_of, ("/etc/passwd", "/etc/group", "/etc/subuid")))


def state_of(path: str) -> Any:
    """Give what changes when a file does; None if it is not to be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def local_file(path: str) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
    """Read a file of accounts: numbers by name; by number, in order, the names, with the number behind. OSError.

    /etc/passwd has the gid behind the uid, and /etc/subuid, subuid(5), how many uids from the first.
    """
    return read_local_file(path, state_of(path))


@functools.lru_cache(maxsize=3)
def read_local_file(path: str, state: Any) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
    """Read such a file once for each of its states; it never hangs or fails as a directory does."""
    names, text = {}, b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        text = file.read()
    named, digits = rb"^\s*([^\s:@][^:\n]*):", rb"(\d{1,10})"  # "@" would stand for a group
    password = b"" if path == "/etc/subuid" else rb"[^:\n]*:"
    pattern = named + password + digits + b":(?:" + digits + rb"(?![^:\s]))?"
    lines = re.findall(pattern, text, re.MULTILINE)
    entries = [(int(number), os.fsdecode(name), int(behind or 0)) for name, number, behind in lines]
    for number, name, behind in sorted(entries):
        names.setdefault(number, {})[name] = behind
    # Of several lines with one name the first counts.
    return {name: number for number, name, _ in reversed(entries)}, names


def look_up_account(uid: int, last: Optional[Account]) -> Account:
    """Ask NSS who has a uid, or whom it is delegated to; last: what it said before. OSError."""
    account = account_of(uid, uid, last)
    # A range of the account's own, or root's, takes nothing away from it.
    local_names = local_file("/etc/passwd")[1].get(uid, {})
    delegates = delegated_to(uid, {account.name, str(uid), *local_names})
    if len({account.name, *delegates} - {None}) > 1:  # more than one user's
        return account._replace(doubt="error")
    if delegates:
        delegate = look_up_entry(delegates[0], None)
        account = said_by_subuid(uid) if delegate is None else account_of(uid, delegate, last)
    if last is None or (account.name and not account.doubt):
        return account
    if last.local:  # the account is gone, which does not unblock its groups
        return account._replace(gids=last.gids, local=True)
    if last.name and delegates in ([], [last.name]):  # a directory may be down
        return last
    return account


def account_of(kernel_uid: int, uid: int, last: Optional[Account]) -> Account:
    """Ask NSS for the account of a uid and its groups; without a name if there is none."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account(kernel_uid, uid, answered=True)
    local_names = local_file("/etc/passwd")[1].get(uid, {})  # a uid can have two
    names = {**local_names, entry.pw_name: entry.pw_gid}
    said = {gid for name in names for gid in groups_of(name)}
    gids = said | set(names.values())
    local_groups = local_file("/etc/group")[1].keys()  # which show who is in them
    lost: frozenset[int] = frozenset()
    if last and last.uid == uid and last.name in names:
        lost = last.gids - gids - local_groups
    gids |= kept_groups(entry.pw_name, lost, not said <= local_groups)
    return Account(kernel_uid, uid, entry.pw_name, frozenset(gids), True, local=entry.pw_name in local_names)


def groups_of(name: str) -> set[int]:
    """Ask NSS for a user's groups but the first (os.getgrouplist keeps the interpreter's lock)."""
    gids, count = (ctypes.c_uint32 * NGROUPS_MAX)(), ctypes.c_int(NGROUPS_MAX)
    NSS.getgrouplist(os.fsencode(name), ctypes.c_uint32(NO_GID), gids, ctypes.byref(count))
    return set(gids[:count.value]) - {NO_GID}


def kept_groups(name: str, lost: frozenset[int], is_up: bool) -> set[int]:
    """Give which groups a user keeps of those that he had and NSS gives him no more.

    getgrouplist(3) does not say that a directory has failed, it gives fewer groups. So he keeps a
    group that cannot be found either, and one that still names him. The groups of some directories
    name nobody: he keeps those, too, unless a directory gave other groups of his, and so is up.
    """
    found = {}
    for gid in lost:
        with contextlib.suppress(KeyError):
            found[gid] = grp.getgrgid(gid).gr_mem
    still_his = {gid for gid, members in found.items() if name in members or not (members or is_up)}
    note_lack(f"groups of {name}", bool(still_his))
    return still_his | (lost - found.keys())


def account_by_name(name: Any) -> Optional[pwd.struct_passwd]:
    """Ask NSS for the account of a name; None if there is none."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return pwd.getpwnam(name)
    return None


def delegated_to(uid: int, own: Iterable[Optional[str]] = ()) -> list[str]:
    """Give the users (names or numbers) a uid is delegated to; [] if only root or these. OSError."""
    ranges = itertools.takewhile(lambda one: one[0] <= uid, local_file("/etc/subuid")[1].items())
    delegates = {name for first, users in ranges for name, count in users.items() if uid < first + count}
    return sorted(delegates) if delegates - {"root", "0", *own} else []


def said_by_subuid(uid: int) -> Account:
    """Give what /etc/subuid alone says of a uid: a name he may be blocked by, and no more."""
    delegates: list[str] = []
    with contextlib.suppress(OSError):
        delegates = delegated_to(uid)
    name = delegates[0] if len(delegates) == 1 else None
    return Account(uid, uid, name, doubt="error" if delegates else "")


class Entries(NamedTuple):
    """A list of users as it is at a moment."""

    uids: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    gids: frozenset[int] = frozenset()
    unresolved: frozenset[str] = frozenset()  # entries that NSS does not know


class UserList:
    """A setting and a file of users as one list."""

    def __init__(self, directory: Directory, setting: str, entries: list[Any],
                 path: Optional[str] = None) -> None:
        self.directory, self.setting, self.path = directory, setting, path
        self.fixed = [str(unquoted(entry)) for entry in entries]
        self.listed = self.fixed
        self.lock, self.file_state, self.problem = threading.Lock(), None, ""
        self.made: tuple[Any, Entries] = None, Entries()  # of what, and the list
        self.warned: set[str] = set()

    def now(self) -> Entries:
        """Give the list as it is now; uids and names count at once, groups when NSS answers."""
        with self.lock:  # under which NSS is not asked
            if self.path:
                self._reread(self.path)
            listed = self.listed
        numbers = None
        if listed:
            numbers, _ = self.directory.ask(self.look_up, None, (state_of_files(), listed))
        made_of, entries = self.made
        if made_of != (listed, numbers):
            entries = make_entries(listed, numbers or {})
            self.made = (listed, numbers), entries
        return entries

    def look_up(self, key: None, last: Any) -> dict[str, Optional[int]]:
        """Find the uid or gid of each name that is listed; None if it has none."""
        state, groups = state_of_files(), local_file("/etc/group")[0]
        local = {**local_file("/etc/passwd")[0], **{f"@{name}": gid for name, gid in groups.items()}}
        numbers = {entry: local.get(entry) for entry in self.listed if not entry.isdigit()}
        others = [entry for entry, number in numbers.items() if number is None]
        for entry in others[:MOST_QUESTIONS // 2]:  # before the first is waited for; the rest is senders'
            self.directory.begin(look_up_entry, entry, state)
        for entry in others:
            numbers[entry], is_current = self.directory.ask(look_up_entry, entry, state, in_session=False)
            if is_current and numbers[entry] is None:
                self.warn(entry)
        return numbers

    def warn(self, entry: str) -> None:
        """Log once that an entry is not found."""
        if entry not in self.warned:
            self.warned.add(entry)
            where = self.setting if entry in self.fixed else self.path
            say(WARNING, f"{where}: {quote(entry)} is not found; it is looked for again every minute")

    def _reread(self, path: str) -> None:
        state, problem = state_of(path), ""
        if state and state == self.file_state:
            return
        try:
            listed = self.fixed + read_entries(path, os.geteuid())
            if listed != self.listed:
                self.listed = listed
        except (OSError, ValueError) as error:
            problem, state = str(error), state if isinstance(error, ValueError) else None
            if problem != self.problem:
                what = "the last good list stays in force" if self.made[0] else "cannot be read"
                say(ERROR, f"{self.setting}_file: {what}: {quote(problem)}")
        # A file written in this very moment may change again without its time stamp telling.
        rested = state and abs(time.time() - state[-1] / 1e9) > 1
        self.file_state, self.problem = state if rested else None, problem


def make_entries(listed: list[str], numbers: dict[str, Optional[int]]) -> Entries:
    """Put a list together from its entries, and the uids and gids of those that are names."""
    names = {entry for entry in listed if not entry.startswith("@")}  # also digits: a user can be called that
    uids: set[Any] = {int(name) if name.isdigit() else numbers.get(name) for name in names}
    gids: set[Any] = {numbers.get(entry) for entry in listed if entry.startswith("@")}
    unresolved = {entry for entry in listed if not entry.isdigit() and numbers.get(entry) is None}
    return Entries(frozenset(uids - {None}), frozenset(names), frozenset(gids - {None}), frozenset(unresolved))


def look_up_entry(entry: str, last: Optional[int]) -> Optional[int]:
    """Ask NSS for a name's uid or "@group"'s gid; the last one, if a directory may be down."""
    if entry.isdigit():
        return int(entry)
    if entry.startswith("@"):
        gid = None
        with contextlib.suppress(KeyError):
            gid = grp.getgrnam(entry[1:]).gr_gid
        note_lack(entry, gid is None and last is not None)
        return last if gid is None else gid
    account = account_by_name(entry)
    if account is None and last is not None:
        with contextlib.suppress(KeyError):  # nobody has that uid
            return last if pwd.getpwuid(last).pw_name == entry else None  # else somebody else's
    return account.pw_uid if account else last


def is_listed(account: Account, entries: Entries) -> bool:
    """Tell whether a list has an account: by uid (also the kernel's), by name or by group."""
    return (not entries.uids.isdisjoint((account.uid, account.kernel_uid))
            or account.name in entries.names or not entries.gids.isdisjoint(account.gids))


def is_unsaid(account: Account, entries: Entries) -> bool:
    """Tell whether a list may turn out to have an account, as NSS has not said all of it yet."""
    if account.answered:
        return account.name is None and any((entries.gids, entries.unresolved))
    return any(entries)


def refusal_of(account: Account, blocked: Entries, allowed: Optional[Entries] = None) -> Optional[Verdict]:
    """Refuse a user whom the lists do not let send, for now if NSS has not said all; or None."""
    reason = "blocked"
    if not is_listed(account, blocked):
        if allowed is None or is_listed(account, allowed):
            return None
        group_is_unknown = bool(LACKING) or any(entry.startswith("@") for entry in allowed.unresolved)
        if account.stale or group_is_unknown or is_unsaid(account, allowed):
            return unidentified("error", "tempfail")
        reason = "not-allowed"
    user = quote(account.name or account.uid)
    return Verdict(blocked_action, reason, f"User {user} is blocked from sending mail")


ENTRY = re.compile(r"""@?[^\s\x00-\x1f\x7f\ud800-\udfff@:*"]
                       (?:[^\s\x00-\x1f\x7f\ud800-\udfff:*"]|[ ])*(?<![ ])""", re.VERBOSE)
# A line of the file: an entry, in quotes or not; a comment, which no "#" between letters begins.
LINE = re.compile(r"""\s*(@?"[^"]*"|(?:[^#]|(?<=[^\s"])\#(?=\S))*)\s*(?:\#.*)?\Z""", re.VERBOSE)
MOST_FILE_BYTES = 1 << 20  # of a list of users


def whole(value: Any, most: int = 1 << 63) -> bool:
    """Tell whether it is a whole number from 0 to most; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_text(pattern: Union[str, re.Pattern[str]], value: Any) -> bool:
    """Tell whether it is a text that matches a pattern as a whole."""
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def entry_problems(entries: Iterable[Any]) -> Iterator[str]:
    """Say what is wrong with the entries of a list of users."""
    for entry in entries:
        number = int(entry) if is_text("[0-9]{1,10}", entry) else entry
        is_name = is_text(ENTRY, entry) and not entry.isdigit()
        if not is_name and not whole(number, (1 << 32) - 1):
            yield f"{shown(entry)} is not a user name, a numeric uid or \"@group\""


def unquoted(entry: Any) -> Any:
    r"""Give an entry that was pasted from the log, quoted and with \xNN, as it was."""
    if not is_text(r'@?"(?:[^"\\]|\\x[0-9a-f]{2})+(?<!\.\.\.)"', entry):
        return entry
    data = entry.replace('"', "").encode("utf-8", "surrogatepass")
    data = re.sub(rb"\\x(..)", lambda code: bytes([int(code[1], 16)]), data)
    return data.decode("utf-8", "surrogateescape")


def read_entries(path: str, trusted_uid: int) -> list[str]:
    """Read a file of users, which root or that uid must own; OSError, ValueError."""
    entries = []
    for number, line in enumerate(read_trusted(path, trusted_uid).split("\n"), 1):
        entry = unquoted(LINE.findall(line)[0].strip())
        entries.append(entry)
        for problem in entry_problems(filter(None, [entry])):
            raise ValueError(f"{path}, line {number}: {problem}")
    return list(filter(None, entries))


def read_trusted(path: str, trusted_uid: int) -> str:
    """Read a text that root or that uid must own; OSError, ValueError if it cannot be trusted."""
    # non-blocking: it may be a FIFO
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if status.st_uid not in (0, trusted_uid) or status.st_mode & 0o022:
            owners = f"root or uid {trusted_uid}" if trusted_uid else "root"
            raise ValueError(f"{path} must belong to {owners} and be writable by its owner only")
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MOST_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


FOR_NOW = {"reject": "tempfail"}  # what stands for an action where it must not be for good
PERIODS = {60: (60, "an hour"), 3600: (24, "a day")}  # by the seconds of a step: steps, in words


class Limits:
    """Recipients of each uid in the last hour and day, in steps of a minute and of an hour."""

    def __init__(self, hourly: dict[Any, Optional[int]], daily: dict[Any, Optional[int]]) -> None:
        self.limits, self.lock = {60: dict(hourly), 3600: dict(daily)}, threading.Lock()
        self.counts: dict[tuple[int, int], dict[int, int]] = {}  # by uid and step

    def look_up(self, key: None, last: None) -> None:
        """Ask NSS for the uids of names, as one uid can have several; say which nobody has."""
        for setting, limits in zip(("hourly_limits", "daily_limits"), self.limits.values()):
            for name in [name for name in limits if is_text("[^*].*", name)]:
                entry = account_by_name(name)
                if entry:
                    limits[entry.pw_uid] = limits[name]
                else:
                    say(WARNING, f"{setting}: {quote(name)} is not found: correct the name, or restart when "
                                 "there is that user")

    def used(self, uid: int, step: int) -> int:
        """Count what a uid addressed in this step and the period before: none is missed."""
        oldest, counts = time.monotonic() // step - PERIODS[step][0], self.counts.get((uid, step), {})
        for old in [then for then in counts if then < oldest]:
            del counts[old]
        return sum(counts.values())

    def of(self, account: Account) -> dict[int, int]:
        """Give the limits that a user has, by step."""
        limits = {step: of_users.get(account.uid, of_users.get(account.name, of_users.get("*")))
                  for step, of_users in self.limits.items()}
        return {step: limit for step, limit in limits.items() if limit is not None}

    def verdict(self, account: Account, recipients: int) -> Optional[Verdict]:
        """Count a message, unless it is refused; None if its user is over no limit."""
        uid, user, limits = account.uid, quote(account.name or account.uid), self.of(account)
        action = FOR_NOW.get(blocked_action, blocked_action)
        with self.lock:
            sums = {step: self.used(uid, step) + recipients for step in limits}
            over = [step for step in limits if sums[step] > limits[step]]
            if not over or action != "tempfail":
                for step in limits:
                    counts, now = self.counts.get((uid, step), {}), int(time.monotonic() // step)
                    counts[now] = counts.get(now, 0) + recipients
                    remember(self.counts, (uid, step), counts, 2 * MOST_REMEMBERED)
        if over:
            what = f"{user} is over the limit of {limits[over[0]]} recipients {PERIODS[over[0]][1]}"
            complain(f"user={what}", level=WARNING)
            return Verdict(action, "limit", f"User {what}")
        for step, limit in limits.items():
            if sums[step] - recipients < 0.8 * limit <= sums[step]:
                say(WARNING, f"user={user} has addressed {sums[step]} of {limit} recipients {PERIODS[step][1]}")
        return None


def passed() -> Verdict:
    """Let a message through, tagged if a header is wanted."""
    return Verdict("tag" if header_fields else "pass")


def unidentified(why: str, accept: str = "accept") -> Verdict:
    """Do what unidentified_action says ("accept": as told); for now, where the fault is ours."""
    action = {"accept": accept}.get(unidentified_action, unidentified_action)
    if action == "accept":
        return passed()
    if why in ("busy", "container", "error", "no-helper", "not-permitted", "timeout"):  # none is the client's doing
        action = FOR_NOW.get(action, action)
    return Verdict(action, "unidentified", UNIDENTIFIED)


# ------------------------------------------------------- description: which process has the socket
# The helper is asked in this form, and with nothing else: number, kind, uid, inode, cgroup, ENDS. It
# answers in JSON: the number, and facts about one process or an address and a port.
QUESTION = struct.Struct("=QBIQQ36s")
WHO_HAS, WHAT_WAS_DIALLED, WHOSE_IN_CONTAINERS = 1, 2, 3
HELPER_SECONDS = 0.3  # what a session waits at most for the helper, its turn included
BRIEF_SECONDS = 0.02  # of these before libmilter is to start another thread, which costs 0.1 ms
LSOF_SECONDS, LSOF_PROCESSES, LSOF_PIDS = 2.0, 4, 4000  # 4,000 pids are 32 kB; 128 KiB is the most
Helper = NamedTuple("Helper", [("channel", socket.socket), ("pid", int)])  # it may see others' processes


class Describer:
    """Have processes described by the helper, asked one thing at a time, or else by sudo lsof."""

    def __init__(self, helper: Optional[Helper], by_lsof: bool = False) -> None:
        """Make one; by_lsof: whether sudo allows it, which is asked when the helper has ended."""
        self.helper, self.by_lsof, self.why_nobody = helper, by_lsof, "not-permitted"
        self.lock, self.number = threading.Lock(), 0
        self.owed_until = 0.0  # when the last question's answer is overdue; 0: it has come
        self.running: list[subprocess.Popen[bytes]] = []  # calls of lsof, also those past their time
        self.started = 0.0  # the last of them, on the monotonic clock
        if helper:
            threading.Thread(target=self._watch, args=(helper,), daemon=True).start()

    def describe(self, owner: ClientSocket) -> Facts:
        """Say which process has a socket, and what it is; {"why": word} if that is not known."""
        try:
            if owner.process:
                return describe_psutil(owner.process)
            if owner.inode == 0:
                return {"why": "gone"}
            if self.helper or not self.by_lsof:
                return self._ask_helper(WHO_HAS, owner.uid or 0, owner.inode, owner.cgroup)
            return self._ask_lsof(owner)
        except psutil.Error:
            return {"why": "gone"}
        except OSError as error:  # no process, no descriptor, no sudo
            complain("a process could not be described", str(error))
            return {"why": "error"}

    def what_was_dialled(self, mta_end: Diag) -> Union[Endpoint, str]:
        """Say what the client of the MTA's end dialled before NAT redirected it; or why not."""
        facts = self._ask_helper(WHAT_WAS_DIALLED, mta_end.uid, mta_end.inode, mta_end.cgroup)
        if "address" in facts:
            return endpoint(facts["address"], facts["port"])
        return str(facts["why"]) if facts.get("why") in ("busy", "timeout", "no-helper") else "redirected"

    def find_in_containers(self, client: Endpoint, server: Endpoint) -> Facts:
        """Say whose a container's socket is, by both ends: uid, inode and cgroup."""
        ends = [(V4_MAPPED + end.address)[-16:] + end.port.to_bytes(2, "big") for end in (client, server)]
        return self._ask_helper(WHOSE_IN_CONTAINERS, 0, 0, 0, b"".join(ends))

    def _ask_helper(self, kind: int, uid: int, inode: int, cgroup: int, ends: bytes = b"") -> Facts:
        helper, deadline = self.helper, time.monotonic() + HELPER_SECONDS
        if helper is None:
            return {"why": self.why_nobody}
        if not self.lock.acquire(timeout=BRIEF_SECONDS):
            make_room()
            if not self.lock.acquire(timeout=HELPER_SECONDS - BRIEF_SECONDS):
                return {"why": "busy"}
        try:
            # Whoever asked before has given up; his answer may come until it is overdue.
            channel, overdue = helper.channel, min(deadline, self.owed_until)
            if self.owed_until and self._receive(channel, overdue) is None:
                return {"why": "timeout"}
            self.number, self.owed_until = self.number + 1, time.monotonic() + HELPER_SECONDS
            channel.send(QUESTION.pack(self.number, kind, uid, inode, cgroup, ends), socket.MSG_DONTWAIT)
            return self._receive(channel, deadline) or {"why": "timeout"}
        except OSError:  # it has ended just now, which _watch says
            return {"why": "no-helper"}
        finally:
            self.lock.release()

    def _receive(self, channel: socket.socket, deadline: float) -> Optional[Facts]:
        """Give the answer to the last question; None if it has not come by then."""
        for _ in range(100):  # a helper gone mad must not keep anyone here
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([channel], [], [], wait)[0]:
                return None
            data = channel.recv(65536, socket.MSG_DONTWAIT)
            if not data:
                raise ConnectionError
            try:
                facts = dict(json.loads(data))
                number, port = facts.pop("number"), facts["port"] if "address" in facts else 0
                numbers = [facts.get(name, 0) for name in ("holder_uid", "uid", "inode", "cgroup")]
                struct.pack("=QIIQQH", number, *numbers, port)
                endpoint(facts.get("address", "::"), port)
            except (ValueError, KeyError, TypeError, RecursionError, struct.error):
                complain("the helper gave an answer that is none")
                continue
            if number == self.number:  # else it was late
                self.owed_until = 0.0
                return facts
        return None

    def _watch(self, helper: Helper) -> None:
        os.waitpid(helper.pid, 0)
        self.helper, self.by_lsof, self.why_nobody = None, lsof_allowed(), "no-helper"
        programs = "come through lsof" if self.by_lsof else "and root stay unknown"
        say(ERROR, f"the helper has ended: users are still identified, programs {programs}; restart the milter")

    def _ask_lsof(self, owner: ClientSocket) -> Facts:
        # For root's sockets all. Held on to, so that another process that gets a number is noticed.
        processes: dict[int, psutil.Process] = {}
        for pid in psutil.pids():
            with contextlib.suppress(psutil.Error, OSError):
                if owner.uid in (0, os.stat(f"/proc/{pid}").st_uid):
                    processes[pid] = psutil.Process(pid)
        if not processes:  # an empty list would mean every process
            return {"why": "not-found"}
        if owner.uid == 0 and len(processes) > LSOF_PIDS:  # another may be among those left out
            return {"why": "busy"}
        command = lsof_command + lsof_arguments(list(processes)[:LSOF_PIDS])
        deadline, pipe, null = time.monotonic() + LSOF_SECONDS, subprocess.PIPE, subprocess.DEVNULL
        environment = {**os.environ, "LC_ALL": "C"}
        make_room()
        while True:
            with self.lock:
                self.running = [lsof for lsof in self.running if lsof.poll() is None]
                if len(self.running) < LSOF_PROCESSES:
                    lsof = subprocess.Popen(command, cwd="/", env=environment, stdin=null, stdout=pipe, stderr=pipe)
                    self.running.append(lsof)
                    self.started = time.monotonic()
                    break
            # While the last call that was started may still end in time, there may be a place.
            if time.monotonic() > min(deadline, self.started + LSOF_SECONDS):
                return {"why": "busy"}
            time.sleep(0.01)
        return read_lsof(lsof, owner, processes)


PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38  # linux/prctl.h


def fork_helper(user: Optional[pwd.struct_passwd]) -> Helper:
    """Fork the helper: the milter's uid, and the privilege it takes to see open files."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent, child = os.getpid(), os.fork()
    if child:
        far.close()
        return Helper(near, child)
    try:
        near.close()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.closerange(3, far.fileno())
        os.closerange(far.fileno() + 1, 1 + max(map(int, os.listdir("/proc/self/fd"))))
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it ends when the milter does
        LIBC.prctl(PR_SET_KEEPCAPS, 1)
        become(user)
        set_capabilities(CAPS_TO_SEE_OTHERS)
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the uid would forget this
        if os.getppid() == parent:
            serve(far, Finder(header_fields + log_fields))
    except (ConnectionError, PermissionError):
        pass  # the milter has ended; or it cannot become the user either, and says so
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def serve(channel: socket.socket, finder: Finder) -> None:
    """Answer questions until the milter's end is closed; what is not a question gets no answer."""
    for data in iter(lambda: channel.recv(QUESTION.size + 1), b""):
        if len(data) == QUESTION.size:
            number, *question = QUESTION.unpack(data)
            answer = {"number": number, **finder.answer(*question)}
            with contextlib.suppress(BlockingIOError):  # a milter that does not read does without
                channel.send(json.dumps(answer).encode(), socket.MSG_DONTWAIT)


SEARCH_SECONDS, SEARCH_LINKS = 0.2, 300_000  # what one search may cost
MOST_RECENT = 16  # places of a user's last sockets
# What a payer may take of the helper's processor time: this share, so many seconds of it ahead. So
# much of each question is free: if Postfix's hundred sessions all take it, the last waits 0.2 s.
SHARE, AHEAD_SECONDS, FREE_SECONDS = 0.1, 0.15, 0.002
ROOT_FREE_SECONDS = 0.006  # for which each process in its cgroup is looked at
ARGS_SECONDS, FACT_BYTES = 0.05, 512  # to read a command line, which may hang; of each fact


class BusyError(Exception):
    """A search has used up its budget."""


class Finder:
    """Find the process that has a socket open; runs in the helper, for one question at a time.

    Links read in /proc/PID/fd are the only evidence; memory only says where to look first.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self.wanted = tuple(wanted)
        self.recent: dict[int, list[tuple[int, str]]] = {}  # by uid: where his last sockets were
        self.debts: dict[Any, tuple[float, float]] = {}  # by payer: seconds, and when he owed them
        self.cgroups = cgroup_mount()
        self.uid, self.target, self.cgroup = 0, "", 0  # of the socket that is looked for
        self.deadline, self.links = 0.0, 0  # what is left of its budget
        self.namespaces = Namespaces(self.charge)

    def answer(self, kind: int, uid: int, inode: int, cgroup: int, ends: bytes = b"") -> Facts:
        """Search at the payer's expense and read what is asked for; {"why": word} if that fails.

        He owes the processor time that it takes, and a debt shrinks by a tenth of the time that
        passes. While he owes too much he is told so at once, and the helper has time for others.
        """
        self.uid, self.target, self.cgroup = uid, f"socket:[{inode}]", cgroup
        payer, free = self.payer(kind, ends)
        began, now = time.process_time(), time.monotonic()
        owed, then = self.debts.get(payer, (0.0, now))
        owed = max(0.0, owed - SHARE * (now - then))
        if owed > AHEAD_SECONDS:
            return {"why": "busy"}
        self.deadline, self.links = now + SEARCH_SECONDS, SEARCH_LINKS
        try:
            return self.find_and_read(kind, ends)
        except BusyError:
            return {"why": "busy"}
        except PermissionError:
            return {"why": "not-permitted"}
        except (OSError, struct.error):
            return {"why": "gone"}
        finally:
            cost = time.process_time() - began
            if "args" in self.wanted and time.monotonic() - now > cost + ARGS_SECONDS:
                cost += ARGS_SECONDS  # others have waited for a command line that hangs
            if cost > free:
                remember(self.debts, payer, (owed + cost - free, now))

    def payer(self, kind: int, ends: bytes) -> tuple[Any, float]:
        """Say who pays for a search, and how many seconds of it are free."""
        if kind == WHOSE_IN_CONTAINERS:  # their namespaces; new ones as one
            return tuple(self.namespaces.places.get(ends[:16], ())), FREE_SECONDS
        if self.uid == 0:  # others may have crowded root's cgroup, so root pays in that one only
            return (0, self.cgroup), ROOT_FREE_SECONDS
        delegates: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            delegates = delegated_to(self.uid)
        return min(delegates, default=self.uid), FREE_SECONDS  # who has many uids delegated pays as one

    def find_and_read(self, kind: int, ends: bytes) -> Facts:
        """Do what is asked within the budget; OSError, BusyError."""
        if kind == WHOSE_IN_CONTAINERS:
            return self.find_in_containers(ends)
        read = self.read_destination if kind == WHAT_WAS_DIALLED else self.read_holder
        for _ in range(3):  # what has it may end, or move it, and another may have it still
            found = self.find_holder()
            if found is None:
                return {"why": "not-found"}
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                return read(*found)
        return {"why": "gone"}

    def read_holder(self, pid: int, link: str) -> Facts:
        """Say what process has the socket behind a link; OSError if it has it no more."""
        # What is read here is of one process, even if its number is given to another now.
        with closing(os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)) as directory:
            if os.readlink(link, dir_fd=directory) != self.target:
                raise FileNotFoundError
            holder_uid = os.fstat(directory).st_uid  # of one that has ended this is 0; what follows then fails
            facts = read_process(directory, self.wanted, link.rpartition("fd/")[0])
            if self.uid == 0:  # all its uids must be root's, and nobody else may have the socket
                holder_uid = highest_uid("status", directory) or self.find_other_holder()
            return {"pid": pid, **facts, "holder_uid": holder_uid}

    def read_destination(self, pid: int, link: str) -> Facts:
        """Say what the client of the accepted socket behind a link dialled; OSError as above."""
        with copy_of_socket(pid, int(os.path.basename(link))) as copy:
            if f"socket:[{os.fstat(copy.fileno()).st_ino}]" != self.target:
                raise FileNotFoundError  # the number of the process or descriptor is another's now
            return original_destination(copy)

    def find_in_containers(self, ends: bytes) -> Facts:
        """Give uid, inode and cgroup of a container's socket; else {"why": word}."""
        found, cgroup = self.namespaces.find(ends[:18], ends[18:]), 0
        if found is None:
            return {"why": "container"}
        uid, inode, pid = found
        self.uid, self.target = uid, f"socket:[{inode}]"
        if uid == 0:  # see find_other_holder: that looks in the cgroup of whoever has the socket
            pid, _ = self.find_holder() or (0, "")
        with contextlib.suppress(OSError):
            path = re.search(r"^0::/(.*)$", read_file(f"/proc/{pid}/cgroup"), re.MULTILINE)
            if path and self.cgroups is not None:
                cgroup = os.stat(path[1] or ".", dir_fd=self.cgroups).st_ino
        return {"uid": uid, "inode": inode, "cgroup": cgroup}

    def find_holder(self) -> Optional[tuple[int, str]]:
        """Find a process that has the socket, and the link below its directory, or None.

        PermissionError if it is not found where this may look, and there is more.
        """
        recent = self.recent.get(self.uid, [])
        found = next((place for place in recent if self.is_target(*place)), None) or self.search(recent)
        if found:
            remember(self.recent, self.uid, list(dict.fromkeys([found, *recent]))[:MOST_RECENT])
        return found

    def is_target(self, pid: int, link: str) -> bool:
        """Tell whether a link leads to the socket."""
        try:
            return os.readlink(f"/proc/{pid}/{link}") == self.target
        except OSError:  # there is none now, or none to be seen
            return False

    def search(self, recent: list[tuple[int, str]]) -> Optional[tuple[int, str]]:
        """Look in all places but the recent ones; as find_holder."""
        denied = None
        for pid, place in self.likely_places(recent):
            try:
                link = self.link_to_target(pid, place)
            except PermissionError as error:
                denied, link = error, None
            if link:
                return pid, link
        if denied:
            raise denied
        return None

    def likely_places(self, recent: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Give processes and, below their directories, links or descriptor tables to look at.

        The user's own come first, of these the newest and the oldest. Workers have their sockets
        under the same numbers: the last ones are tried before any table, which may be long.
        """
        own: dict[int, bool] = {}  # by pid: whether it is the user's

        def is_own(pid: int) -> bool:
            if pid not in own:
                self.charge(1)
                own[pid] = False
                with contextlib.suppress(OSError):
                    own[pid] = os.stat(f"/proc/{pid}").st_uid == self.uid
            return own[pid]
        had_one, links = zip(*recent) if recent else ((), ())
        for source in (lambda: had_one, lambda: cgroup_pids(self.cgroups, self.cgroup), psutil.pids):
            pids = source()
            from_both_ends = dict.fromkeys(itertools.chain.from_iterable(zip(reversed(pids), pids)))
            new = [pid for pid in from_both_ends if pid not in own]
            for places in filter(None, (set(links), ["fd"])):
                yield from ((pid, place) for pid in new if is_own(pid) for place in places
                            if (pid, place) not in recent)
        for pid in filter(own.get, own):
            self.charge(1)
            yield from ((pid, table) for table in thread_tables(pid))
        yield from ((pid, "fd") for pid in own if not own[pid])

    def find_other_holder(self) -> int:
        """Give a uid other than root's that has it, too, in its cgroup or, without that, anywhere; 0: none."""
        for pid in cgroup_pids(self.cgroups, self.cgroup) or psutil.pids():
            self.charge(1)
            try:  # a setuid program has its real uid in status alone
                uid = os.stat(f"/proc/{pid}").st_uid or highest_uid(f"/proc/{pid}/status")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if uid and any(self.link_to_target(pid, table) for table in ["fd", *thread_tables(pid)]):
                return uid
        return 0

    def link_to_target(self, pid: int, place: str) -> Optional[str]:
        """Give the link to the socket, which a place is or a table has, or None; OSError."""
        if not place.endswith("fd"):
            return place if self.is_target(pid, place) else None
        # A process that has ended has none. What else goes wrong must not hide a holder.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with closing(os.open(f"/proc/{pid}/{place}", os.O_RDONLY | os.O_DIRECTORY)) as directory:
                if os.fstat(directory).st_size > self.links:  # how many there are, since Linux 6.2
                    raise BusyError
                descriptors = os.listdir(directory)  # what was opened last stands last
                for index, descriptor in enumerate(reversed(descriptors)):
                    if index % 1000 == 0:
                        self.charge(min(1000, len(descriptors) - index))
                    try:
                        if os.readlink(descriptor, dir_fd=directory) == self.target:
                            return f"{place}/{descriptor}"
                    except OSError:
                        pass  # closed meanwhile, or not to be seen
        return None

    def charge(self, links: int) -> None:
        """Take links off the budget of this search; BusyError if it is used up."""
        self.links -= links
        if self.links < 0 or time.monotonic() > self.deadline:
            raise BusyError


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor in the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def highest_uid(path: str, directory: Optional[int] = None) -> int:
    """Give the highest of real, effective and saved uid in /proc/PID/status; OSError."""
    uids = re.search(r"\nUid:\t(\d+)\t(\d+)\t(\d+)", read_file(path, directory))
    if uids is None:
        raise FileNotFoundError
    return max(map(int, uids.groups()))


# asm/unistd_64.h, asm-generic/unistd.h; linux/kcmp.h
KCMP, KCMP_FILES = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine, -1), 2


def thread_tables(pid: int) -> list[str]:
    """Give the tables of a process's other threads that are not its first one's, too (kcmp(2))."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if os.stat(f"/proc/{pid}/task").st_nlink > 3:
            return [f"task/{thread}/fd" for thread in os.listdir(f"/proc/{pid}/task")
                    if thread != str(pid) and LIBC.syscall(KCMP, pid, int(thread), KCMP_FILES, 0, 0)]
    return []


def read_process(directory: int, wanted: Iterable[str], thread: str = "") -> Facts:
    """Say what a process is, given its open directory in /proc; OSError if it has ended.

    thread: path from there to the one that has the socket; the first, "", may have ended. Nothing is
    read through the process's memory, as psutil may: its owner can make that hang for ever.
    """
    readers: dict[str, Callable[[], Optional[str]]] = {
        "program": lambda: read_file("comm", directory)[:-1],
        "exe": lambda: os.readlink(thread + "exe", dir_fd=directory)[:FACT_BYTES],
        "dir": lambda: os.readlink(thread + "cwd", dir_fd=directory)[:FACT_BYTES],
        "unit": lambda: unit_of(read_file("cgroup", directory)),
        "args": lambda: read_args(directory)}
    facts: Facts = {}
    for field in set(wanted) & set(readers):
        with contextlib.suppress(OSError):  # not there, or not to be seen from here
            facts[field] = readers[field]()
    os.stat("comm", dir_fd=directory)  # which is there as long as the process is
    return facts


def describe_psutil(process: psutil.Process) -> Facts:
    """Say what a process is that psutil found; psutil.Error, OSError if it has ended."""
    if LINUX:
        with closing(os.open(f"/proc/{process.pid}", os.O_PATH | os.O_DIRECTORY)) as directory:
            facts = read_process(directory, set(header_fields + log_fields) - {"args"})
    else:
        facts = {"program": process.name(), "exe": process.exe(), "dir": process.cwd()}
    if not process.is_running():
        raise psutil.NoSuchProcess(process.pid)
    return {"pid": process.pid, **facts}


@functools.lru_cache(maxsize=256)  # many processes are in one
def unit_of(cgroups: str) -> Optional[str]:
    """Find the first .service or .scope in /proc/PID/cgroup; users make others below."""
    paths = re.findall(r"(?m)^(?:0:|\d+:name=systemd):(.*)", cgroups)
    found = re.search(r"/(lxc/[^/]+|lxc\.payload[^/]*|[^/]*\.(?:service|scope))(?=/|$)", "".join(paths))
    if found:
        return found[1]
    return next((path for path in paths if path.strip("/")), None)


def read_file(path: str, directory: Optional[int] = None) -> str:
    """Read a small file of the process table, its bytes kept as surrogates."""
    with closing(os.open(path, os.O_RDONLY, dir_fd=directory)) as descriptor:
        return os.read(descriptor, 65536).decode("utf-8", "surrogateescape")


def read_args(directory: int) -> Optional[str]:
    """Read a command line in a child that is killed when late; None if it was, or has none."""
    near, far = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            words = read_file("cmdline", directory)[:FACT_BYTES].replace("\0", " ")
            far.send(words.encode("utf-8", "surrogateescape"))
        finally:
            os._exit(0)
    far.close()
    with near:
        came = select.select([near], [], [], ARGS_SECONDS)[0]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # before Linux 5.3 one that hangs cannot be killed
        said = near.recv(FACT_BYTES) if came else b""
    return said.rstrip(b" ").decode("utf-8", "surrogateescape") or None


# asm-generic/unistd.h; linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h, in.h, in6.h
PIDFD_OPEN, PIDFD_GETFD = 434, 438
SO_ORIGINAL_DST, IP_PKTINFO, IP_PKTOPTIONS, IPV6_MULTICAST_IF = 80, 8, 9, 17


def copy_of_socket(pid: int, descriptor: int) -> socket.socket:
    """Take a copy of a socket of a process (pidfd_getfd(2)); OSError, also before Linux 5.6."""
    with closing(checked(LIBC.syscall(PIDFD_OPEN, pid, 0))) as pidfd:
        return socket.socket(fileno=checked(LIBC.syscall(PIDFD_GETFD, pidfd, descriptor, 0)))


def original_destination(accepted: socket.socket) -> Facts:
    """Say what the client of an accepted socket dialled before a NAT rule changed it; OSError.

    Only what came in through lo was sent by this network namespace: a client of another can have
    the same address, port and destination. The interface is where multicast keeps its own.
    """
    v6 = accepted.family == socket.AF_INET6
    if v6:
        interface = accepted.getsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_IF)
    else:
        accepted.setsockopt(socket.SOL_IP, IP_PKTINFO, 1)  # does nothing to TCP but for what follows
        try:
            options = accepted.getsockopt(socket.SOL_IP, IP_PKTOPTIONS, 64)
        finally:
            accepted.setsockopt(socket.SOL_IP, IP_PKTINFO, 0)
        *_, interface = struct.unpack_from("@Niii", options)  # struct cmsghdr and in_pktinfo
    if interface != LOOPBACK:
        return {"why": "redirected"}
    if v6 and not accepted.getpeername()[0].startswith("::ffff:"):
        name = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)  # struct sockaddr_in6
        address = socket.inet_ntop(socket.AF_INET6, name[8:24])
    else:
        name = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)  # struct sockaddr_in
        address = socket.inet_ntop(socket.AF_INET, name[4:8])
    return {"address": address, "port": int.from_bytes(name[2:4], "big")}


def cgroup_mount() -> Optional[int]:
    """Open a place where cgroup v2 is mounted; None if there is none that can be reached."""
    for mount in psutil.disk_partitions(all=True):
        with contextlib.suppress(OSError):  # in a directory closed to us
            if mount.fstype == "cgroup2" and os.path.exists(f"{mount.mountpoint}/cgroup.controllers"):
                return os.open(mount.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    return None


def cgroup_pids(mount: Optional[int], cgroup: int) -> list[int]:
    """List the processes of a cgroup by its id (open_by_handle_at(2)); [] if that fails."""
    if mount is None or not cgroup:
        return []
    handle = struct.pack("=IiQ", 8, 0xFE, cgroup)  # FILEID_KERNFS, linux/exportfs.h
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with contextlib.suppress(OSError), \
            closing(checked(LIBC.open_by_handle_at(mount, handle, flags))) as directory, \
            open(os.open("cgroup.procs", os.O_RDONLY, dir_fd=directory), "rb") as file:
        # 0 stands for each process of another namespace.
        return [int(pid) for pid in file.read().split() if pid != b"0"]
    return []


def lsof_arguments(pids: Iterable[int]) -> list[str]:
    """Give the arguments that sudoers.example allows: the sockets of these processes, by field."""
    return ["-nPw", "-a", "-iTCP", "-p", ",".join(str(int(pid)) for pid in pids), "-Fpd"]


def read_lsof(lsof: subprocess.Popen[bytes], owner: ClientSocket, processes: dict[int, psutil.Process]) -> Facts:
    """Describe the process that lsof finds; {"why": word} if that fails."""
    try:
        output, complaint = lsof.communicate(timeout=LSOF_SECONDS)
    except subprocess.TimeoutExpired:
        by_sudo = os.path.basename(lsof_command[0]) == "sudo"
        with contextlib.suppress(PermissionError):
            # sudo passes TERM on; killed, it leaves lsof running. Others start with TERM blocked.
            lsof.send_signal(signal.SIGTERM if by_sudo else signal.SIGKILL)
        return {"why": "timeout"}
    holders = [pid for pid in lsof_holders(output, owner.inode) if pid in processes]
    if not holders:
        refused = re.search(rb"password is required|not allowed|may not run|sudoers|no new priv|account", complaint)
        return {"why": "timeout" if lsof.returncode < 0 else "not-permitted" if refused else "not-found"}
    uids = [processes[pid].uids() for pid in holders]
    holder_uid = max(map(max, uids)) if owner.uid == 0 else uids[0].effective  # a setuid program's real uid, too
    return {**describe_psutil(processes[holders[0]]), "holder_uid": holder_uid}


def lsof_holders(output: bytes, inode: int) -> list[int]:
    """Find in the output of lsof -Fpd the processes that have the inode."""
    parts = [part.split(b"\n") for part in re.split(rb"(?m)^p(?=[0-9]+$)", output)[1:]]
    return [int(pid) for pid, *fields in parts if b"d%d" % inode in fields]


def lsof_allowed() -> bool:
    """Ask sudo whether the rule is there; a refused try would be logged, and mailed to root."""
    if not lsof_command or shutil.which(lsof_command[0]) is None:
        return False
    if os.path.basename(lsof_command[0]) != "sudo":
        return True
    question = [lsof_command[0], "-n", "-l", *lsof_command[1:], *lsof_arguments([1])]
    null = subprocess.DEVNULL
    sudo = subprocess.Popen(question, stdin=null, stdout=null, stderr=null)
    try:
        return sudo.wait(5) == 0
    except subprocess.TimeoutExpired:
        with contextlib.suppress(PermissionError):  # and then it is not waited for, as "run" would
            sudo.kill()
        return False


# ---------------------------------- containers: clients in other network namespaces of this host
NEVER_CONTAINERS = [ipaddress.ip_network(text) for text in ("127.0.0.0/8", "::1", "::ffff:0:0/96")]
ABSENT_SECONDS = 1.0  # before an address whose client was not found is looked for everywhere again
MOST_ADDRESS_BYTES = 1 << 16  # to read of one namespace's; a container has some 1,000
NS_GET_USERNS, NS_GET_OWNER_UID = 0xB701, 0xB704  # linux/nsfs.h
# What follows both ends in a row of /proc/PID/net/tcp (net/ipv4/tcp_ipv4.c): state, uid, inode.
ROW = rb"([0-9A-F]{2})(?: [0-9A-F]+:[0-9A-F]+){2} [0-9A-F]+ +(\d+) +\d+ (\d+) \d+ \S{8,} .*\n"


def find_container_client(lookup: Lookup, describer: Describer, client: Endpoint,
                          server: Optional[Endpoint]) -> ClientSocket:
    """Say whose the client's end in a container is; REMOTE if there is none on this host; OSError.

    The MTA's end is looked at first: while it lives, the client's end cannot change hands, and
    "confirm" looks whether it has lived since.
    """
    networks = map(ipaddress.ip_network, container_networks)
    if isinstance(lookup, PsutilLookup) or not any(ipaddress.ip_address(client.address) in one for one in networks):
        return REMOTE
    dump = lookup.dump
    server = whole_end(server, client, lambda: (one[1:3] for one in dump(0, client.port) if one.inode))
    if server is None:
        return unknown("closed")
    mta_end = lookup.find_on_any_device(server, client)
    if mta_end is None:
        return unknown("closed") if lookup.is_local(server.address) else REMOTE
    facts = describer.find_in_containers(client, mta_end.source)
    if "uid" not in facts:
        return unknown(facts["why"] if facts["why"] in ("busy", "timeout") else "container")
    client_end = mta_end._replace(uid=facts["uid"], inode=facts["inode"], cgroup=facts["cgroup"])
    return client_socket(client_end, mta_end)._replace(in_container=not delegated_to(client_end.uid))


class Namespaces:
    """Find a client's socket in the network namespaces of this host; runs in the helper.

    A namespace counts if root made the user namespace that it belongs to: whoever else makes one can
    give it any address and any socket. Memory only says where to look first.
    """

    def __init__(self, charge: Callable[[int], None]) -> None:
        self.charge = charge
        self.places: dict[bytes, dict[int, int]] = {}  # by address: namespaces, and a process in each
        self.absent: dict[bytes, float] = {}  # by address: when a client was looked for in vain

    def find(self, client: bytes, server: bytes) -> Optional[tuple[int, int, int]]:
        """Give uid and inode of the client's socket, and a process of its namespace; BusyError.

        None if there is no such socket, or more than one. Ends are 16 bytes of address, 2 of port.
        """
        found, now = self.look(self.places.get(client[:16], {}), client, server), time.monotonic()
        if not found and now - self.absent.get(client[:16], -ABSENT_SECONDS) >= ABSENT_SECONDS:
            found = self.look(self.walk(), client, server)
            if not found:
                remember(self.absent, client[:16], now)
        return found.pop() if len(found) == 1 else None

    def walk(self) -> dict[int, int]:
        """Give all network namespaces but this one, each with a process that is in it."""
        processes: dict[int, int] = {}
        for pid in psutil.pids():
            self.charge(1)
            with contextlib.suppress(OSError):
                processes.setdefault(os.stat(f"/proc/{pid}/ns/net").st_ino, pid)
        processes.pop(os.stat("/proc/self/ns/net").st_ino, None)
        return processes

    def look(self, processes: dict[int, int], client: bytes, server: bytes) -> set[tuple[int, int, int]]:
        """Give the sockets with these ends in namespaces that count and have the client's address.

        A process can leave its namespace for one that does not count, and cannot come back: it must
        be in the same before and after.
        """
        found = set()
        for namespace, pid in processes.items():
            with contextlib.suppress(OSError):
                before = namespace_that_counts(pid)
                addresses = self.addresses(pid) if before else set()
                rows = self.rows(pid, client, server) if client[:16] in addresses else []
                if before == namespace == namespace_that_counts(pid):
                    found.update((int(uid), int(inode), pid) for state, uid, inode in rows if int(state, 16) in STATES)
                    for address in addresses:
                        remember(self.places, address, {**self.places.get(address, {}), namespace: pid})
        return found

    def addresses(self, pid: int) -> set[bytes]:
        """Give the addresses of a process's namespace."""
        trie = self.read(pid, "fib_trie", MOST_ADDRESS_BYTES)
        v4 = re.findall(rb"\|-- ([0-9.]+)\n(?: +/.*\n)*? +/32 host LOCAL\n", trie)
        v6 = re.findall(rb"(?m)^[0-9a-f]{32}", self.read(pid, "if_inet6", MOST_ADDRESS_BYTES))
        mapped = {V4_MAPPED + socket.inet_aton(text.decode()) for text in v4}
        return mapped | {bytes.fromhex(text.decode()) for text in v6}

    def rows(self, pid: int, *ends: bytes) -> list[tuple[bytes, bytes, bytes]]:
        """Give state, uid and inode of the sockets with these ends in a process's namespace."""
        rows: list[tuple[bytes, bytes, bytes]] = []
        for table, words in ("tcp", 1), ("tcp6", 4):
            if not rows and (words == 4 or ends[0].startswith(V4_MAPPED)):
                both = b" ".join(b"%08X" * words % struct.unpack("=4I", end[:16])[-words:] + b":%02X%02X" % (*end[16:],)
                                 for end in ends)
                rows = re.findall(b": %s " % both + ROW, self.read(pid, table, sys.maxsize))
        return rows

    def read(self, pid: int, name: str, most: int) -> bytearray:
        """Read a file of a process's namespace up to so many bytes; BusyError."""
        data, part = bytearray(), b"?"
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/net/{name}", "rb", buffering=0) as file:
            while part and len(data) < most:
                part = file.read(1 << 16)
                self.charge(1 + len(part) // 100)  # a row has 150 bytes
                data += part
        return data


def namespace_that_counts(pid: int) -> int:
    """Give a process's network namespace; 0 if root did not make its user namespace; OSError."""
    with open(f"/proc/{pid}/ns/net", "rb", buffering=0) as network, \
            open(fcntl.ioctl(network, NS_GET_USERNS), "rb", buffering=0) as users:
        made_by_root = fcntl.ioctl(users, NS_GET_OWNER_UID, bytes(4)) == bytes(4)
        return os.fstat(network.fileno()).st_ino if made_by_root else 0


# --------------------------------------------------------------- settings: every rule in one place
class Rule(NamedTuple):
    """What a setting is as delivered, and what else it may be."""

    default: Any
    is_well: Callable[[Any], Any]  # tells whether a value is of the right kind
    sentence: str  # said of one that is not
    # Says what else is wrong: with parts of it, or on this host for the account of run_as_user.
    problems: Callable[[Any, Optional[pwd.struct_passwd]], Iterable[str]] = lambda value, user: ()


def socket_problems(path: str, user: Optional[pwd.struct_passwd]) -> Iterator[str]:
    """Check what is at the socket's path, and its directory."""
    directory = os.path.dirname(path)
    if "LISTEN_FDS" in os.environ:
        return  # the service manager has the socket
    if not os.path.isdir(directory):
        yield f"there is no directory {directory}"
    elif os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        yield "there is something at that path that is not a socket"
    elif user and not sockets_at(path, "01") and not may_write(directory, user):
        # One that listens there was made for this user, by the service manager.
        yield f"user {user.pw_name} may not write to {directory}"


def may_write(directory: str, user: pwd.struct_passwd) -> bool:
    """Ask the kernel, in a child that becomes the user, whether he may make files there."""
    child = os.fork()
    if child == 0:
        try:
            become(user)
            os._exit(not os.access(directory, os.W_OK | os.X_OK))
        finally:  # that the milter may not become the user is told elsewhere
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def file_problems(path: Optional[str], user: Optional[pwd.struct_passwd]) -> Iterator[str]:
    """Check a file of users."""
    try:
        if path:
            read_entries(path, getattr(user, "pw_uid", os.geteuid()))
    except (OSError, ValueError) as error:
        yield str(error)


def network_problems(networks: list[Any], user: Any) -> Iterator[str]:
    """Check container_networks."""
    for network in networks:
        with contextlib.suppress(ValueError):
            if not any(map(ipaddress.ip_network(str(network)).overlaps, NEVER_CONTAINERS)):
                continue
        yield (f'{shown(network)} is not a network, like "172.17.0.0/16", '
               "with no host bits set and no loopback in it")


def limit_problems(limits: dict[Any, Any], user: Any) -> Iterator[str]:
    """Check limits; a name that is not found may be of a user who has gone: see "Limits"."""
    for key, limit in limits.items():
        is_name = is_text(ENTRY, key) and not re.match(r"@|\d+$", key)
        if key != "*" and not is_name and not whole(key) and account_by_name(key) is None:
            yield f"there is no user {shown(key)}"
        if limit is not None and not whole(limit):
            yield f"{shown(key)}: a limit is a whole number of recipients, or None"


def one_of(*words: str) -> Rule:
    """Make the rule of a setting that is one of some words, as delivered the first."""
    return Rule(words[0], words.__contains__, "must be one of " + ", ".join(map(repr, words)))


LONGEST_TIMEOUT = 2_147_483  # seconds; libmilter gives poll(2) milliseconds in an int
PATH = Rule(None, lambda value: value is None or is_text(r"/[^\0]*", value),
            "must be an absolute path, or None")
USERS = Rule([], lambda value: isinstance(value, list), 'must be a list, like ["bob"]',
             lambda users, _: entry_problems(map(unquoted, users or [])))
LIMITS = Rule({}, lambda value: isinstance(value, dict), 'must be like {"*": 200, "root": None}', limit_problems)
SOME_FIELDS = Rule([], lambda value: isinstance(value, list) and all(
    value.count(field) == 1 and field in FIELDS for field in value),
    "must be a list of " + ", ".join(FIELDS) + ", none of them twice")
RULES = {  # of every setting, as they stand at the top
    "socketname": Rule(
        "/var/spool/postfix/private/milter.sock",
        lambda value: is_text("/.*", value) and value.isprintable() and len(os.fsencode(value)) <= 107,
        "must be an absolute path of at most 107 bytes, all printable", socket_problems),
    "timeout": Rule(0, lambda value: whole(value, LONGEST_TIMEOUT),
                    f"must be a whole number of seconds from 0 to {LONGEST_TIMEOUT}"),
    "run_as_user": Rule("postfix", lambda value: value is None or account_by_name(value),
                        "there is no such user", lambda name, user: [
                            f"started under uid {os.geteuid()}, which is neither root nor that user"
                        ] if user and os.geteuid() not in (0, user.pw_uid) else []),
    "blocked_mailusers": USERS,
    "blocked_mailusers_file": PATH._replace(problems=file_problems),
    "allowed_mailusers": USERS._replace(
        default=None, is_well=lambda value: value is None or isinstance(value, list)),
    "blocked_action": one_of("reject", "tempfail", "quarantine", "log"),
    "unidentified_action": one_of("accept", "tempfail", "quarantine", "reject"),
    "hourly_limits": LIMITS,
    "daily_limits": LIMITS,
    "container_networks": USERS._replace(
        sentence='must be a list, like ["172.17.0.0/16"]', problems=network_problems),
    "header_name": Rule("X-Sender-Process-Info", lambda value: is_text("[!-9;-~]{1,76}", value),
                        "must be 1 to 76 printable ASCII characters, no blank, no colon (RFC 5322)"),
    "header_fields": SOME_FIELDS._replace(default=["user", "program"]),
    "log_fields": SOME_FIELDS._replace(default=["user", "uid", "program", "pid", "exe", "dir", "unit"]),
    "lsof_command": Rule(
        ["sudo", "-n", "/usr/bin/lsof"],
        lambda value: isinstance(value, list) and all(is_text(r"[^\0]+", word) for word in value),
        "must be a list of words, or []"),
    "settings_file": PATH._replace(default="/etc/milter_sysuser.conf"),
}


def settings_problems(values: dict[str, Any], sources: dict[str, str]) -> Iterator[str]:
    """Check all settings; yield a sentence a problem: where, setting, value, rule."""
    user = account_by_name(values["run_as_user"])
    for name, rule in RULES.items():
        value, where = values[name], f"{sources[name]}: " if name in sources else ""
        for problem in rule.problems(value, user) if rule.is_well(value) else [rule.sentence]:
            yield f"{where}{name} = {shown(value)}: {problem}"


def shown(value: Any) -> str:
    """Write a value as it stands in the settings, short enough for a line of the log."""
    try:
        text = repr(value)
    except ValueError:  # see sys.set_int_max_str_digits
        return "(a number of too many digits)"
    return text if len(text) <= 1000 else text[:1000] + "..."


def take_settings_file(values: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Override settings by those of settings_file; give where each stands, and what is wrong."""
    path, sources, problems = values["settings_file"], {}, []
    try:
        text = read_trusted(path, os.geteuid()) if path and PATH.is_well(path) else ""
    except (OSError, ValueError) as error:
        # No file is well; a link that leads nowhere is not, maybe in this unit only (ProtectHome=).
        is_none = isinstance(error, FileNotFoundError) and not os.path.lexists(path)
        return {}, [] if is_none else [f"settings_file = {path!r}: {error}"]
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line and line[0] != "#":
            where = f"{path}, line {number}"
            try:
                name, value = read_setting(line, sources)
                values[name], sources[name] = value, where
            except ValueError as problem:
                problems.append(f"{where}: {shown(line)}: {problem}")
    return sources, problems


def read_setting(line: str, sources: dict[str, str]) -> tuple[str, Any]:
    """Read a line of settings_file, never executed; ValueError says what is wrong."""
    name, equals, text = (part.strip() for part in line.partition("="))
    if not equals or name not in RULES or name == "settings_file":
        raise ValueError("must be name = value, with the name of a setting (and not of this file)")
    if name in sources:
        raise ValueError(f"is there twice, see {sources[name]}")
    try:
        value = ast.literal_eval(text)
        repr(value)  # ValueError if a number has too many digits to be written
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("must be a plain value on one line: a text, a number, None, a list or a mapping") from None
    return name, value


# ---------------------------------------------------------------------------------------- --check
CURES = {
    "the helper": "start the milter as root, or allow it both CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
    "sudo lsof": "install lsof and the rule of sudoers.example; if sudo is sudo-rs, start as root",
}
KERNEL_CURE = "modprobe tcp_diag; in a unit, allow AF_NETLINK and set no PrivateUsers=; see README, Troubleshooting"
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1  # linux/sched.h, sockios.h, if.h
SOCKET_CURE = "systemctl stop milter_sysuser.socket milter_sysuser; systemctl start milter_sysuser"
REPORTED: set[str] = set()  # what --check has said: "warn", "FAIL"


def warn(what: str, problem: str, cure: str, state: str = "warn") -> None:
    """Print what something does, or is, that is not well, and what to do about it."""
    REPORTED.add(state)
    print(f"{state}  {what}: {problem}\n      -> {cure}", flush=True)


def report(is_well: bool, what: str, problem: str, cure: str, state: str = "warn") -> None:
    """Print that something is well, or warn of it."""
    if is_well:
        print(f"ok    {what}", flush=True)
    else:
        warn(what, problem, cure, state)


def check(sources: dict[str, str]) -> int:
    """Show on one screen whether this will work, and log what a start logs; give the exit status."""
    print("ok    settings, and the socket's directory")
    for name, rule in RULES.items():
        value, source = globals()[name], sources.get(name, "the script")
        if value != rule.default:
            print(f"      {name} = {shown(value)}, from {source}; as delivered: {rule.default!r}")
    check_postfix()
    if is_lost(socketname):
        warn(socketname, "is not the socket any more that a milter listens on: mail passes", SOCKET_CURE)
    try:
        # Both take the privilege that "prepare" drops.
        connection = connection_made()
        container = container_made() if container_networks else None
        problem, way = prepare(account_by_name(run_as_user))
        works = isinstance(SysuserMilter.lookup, KernelLookup)
        report(not problem, "users: the kernel (sock_diag)", problem, KERNEL_CURE, "warn" if works else "FAIL")
        if works:
            check_programs(way, check_users(connection))
            if container_networks:
                check_containers(container)
        check_files()
    except (OSError, RuntimeError, ValueError) as error:
        warn("start as run_as_user", f"fails: {error}",
             "mend what the line names; to become that user takes CAP_SETUID and CAP_SETGID", "FAIL")
    return EX_CONFIG if "FAIL" in REPORTED else 0


def postconf(*arguments: str) -> list[str]:
    """Ask Postfix for its settings; OSError, SubprocessError, ValueError if it gives none."""
    command = shutil.which("postconf", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")
    if command is None:
        raise FileNotFoundError("there is no postconf to ask")
    ran = subprocess.run([command, *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                         timeout=10, check=False)
    if ran.returncode:
        raise ValueError(f"postconf says {quote(ran.stderr.strip())}")
    return ran.stdout.decode("utf-8", "replace").splitlines()


def check_postfix() -> None:
    """Look whether Postfix uses this socket, and lets no one here make up a client's address."""
    try:
        # In the second, of services in master.cf, a name is SERVICE/TYPE/NAME.
        lines, services = postconf("-x") + postconf("-Px"), map(str.split, postconf("-M"))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        warn("Postfix", str(error), "if the MTA is Postfix, mend what it says; if it is Sendmail, see README, Sendmail")
        return
    settings = dict(re.findall(r"^\s*(\S+) = *(.*?)\s*$", "\n".join(lines), re.MULTILINE))
    # Columns of master.cf(5): the fifth is chroot ("-": no, since Postfix 3.0), the eighth the command.
    check_milters(settings, any(fields[4:8:3] == ["y", "smtpd"] for fields in services))
    early = settings.get("smtpd_forbid_unauth_pipelining", "")
    report(early not in ("", "no"), "Postfix: smtpd_forbid_unauth_pipelining",
           "is off, or not there in this Postfix", "postconf -e smtpd_forbid_unauth_pipelining=yes")
    for name, value in filter(all, settings.items()):
        if name.endswith(("smtpd_authorized_xclient_hosts", "_upstream_proxy_protocol")):
            warn(f"Postfix: {name} = {value}", "lets who may use it choose the client's endpoints",
                 "allow it only to addresses that no user of this host can have, on its own port")
        if name.endswith("smtpd_proxy_filter"):
            warn(f"Postfix: {name} = {value}", "shows milters no message that comes in there",
                 "give local clients a listener with content_filter; see README, Content filters")


def check_milters(settings: dict[str, str], chrooted: bool) -> None:
    """Look whether Postfix names this socket for both doors, once, where a chrooted smtpd finds it."""
    spool, mapped = settings.get("queue_directory", "/"), settings.get("smtpd_milter_maps")
    relative = os.path.relpath(socketname, spool)
    this = re.compile(rf"unix:({re.escape(socketname)}|{re.escape(relative)})(?![^\s,{{}}])")
    # In main.cf, and in master.cf for services that have their own.
    named = [this.findall(value) for name, value in settings.items() if re.search(r"\bsmtpd_milters$", name)]
    problem, beside = "", ", beside what is there now"
    cure = f"postconf -e 'smtpd_milters = {{ unix:{relative}, default_action=accept }}'{beside}"
    if not any(named):
        problem = "does not name this socket"
        cure = f"look whether smtpd_milter_maps does: {mapped}" if mapped else cure
    elif max(map(len, named)) > 1:
        problem = "names this socket twice"
    elif chrooted and [socketname] in named:
        problem = f"names this socket by its whole path, but smtpd is chrooted to {spool}"
    report(not problem, "Postfix: smtpd_milters", problem, cure)
    report(bool(this.search(settings.get("non_smtpd_milters", ""))), "Postfix: non_smtpd_milters",
           "does not name this socket, and mail of sendmail(1) passes",
           f"postconf -e 'non_smtpd_milters = $smtpd_milters'{beside}")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Call a function; give its result, and how long it took."""
    began = time.perf_counter()
    return function(*arguments), f"{(time.perf_counter() - began) * 1e6:.0f} us"


def check_users(connection: Optional[tuple[Endpoint, Endpoint, int]]) -> Optional[ClientSocket]:
    """Find the owner of a connection; None if that fails."""
    what = "users: a connection made for this"
    if connection is None:
        warn(what, "was not tried, nor was its program", "give root CAP_SETUID and CAP_SETGID")
        return None
    client, server, uid = connection
    owner: ClientSocket
    owner, took = timed(SysuserMilter.lookup.find_client_socket, client, server)
    report(owner.uid == uid, f"{what}, {took}", f"has uid={quote(owner.uid)} lookup={owner.why}",
           "run this again; in a unit or container, give it the host's network and users", "FAIL")
    return owner if owner.uid == uid else None


def check_programs(way: str, owner: Optional[ClientSocket]) -> None:
    """Find the program of that connection, and say what this way cannot do."""
    report(cgroup_mount() is not None, "programs: cgroup v2", "is not mounted: all processes are searched",
           "if there are thousands of processes: mount -t cgroup2 none /sys/fs/cgroup/unified")
    if way and owner:
        facts, took = timed(SysuserMilter.describer.describe, owner)
        report("why" not in facts, f"programs: {way}, {took}: {quote(facts.get('program'))}",
               f"is not found ({facts.get('why')})", CURES[way])
    else:
        report(bool(way), f"programs: {way or 'sudo lsof'}", "is not allowed: programs and root are unknown",
               CURES["sudo lsof"])
    if way != "the helper":
        lost = "redirected clients are unknown"
        warn("programs: the helper", f"is not there, {UNPRIVILEGED}: {lost}", CURES["the helper"])
    with contextlib.suppress(FileNotFoundError):
        scope = read_file("/proc/sys/kernel/yama/ptrace_scope").strip()
        if scope == "3":
            warn("kernel.yama.ptrace_scope = 3", "keeps the helper from asking what clients dialled",
                 "set it to 2 in /etc/sysctl.d and reboot; until then they are lookup=redirected")


def check_containers(end: Optional[Endpoint]) -> None:
    """Look whether the helper finds a connection in another namespace; None: there is none."""
    what = "containers: a connection in another network namespace"
    if end is None:
        warn(what, "was not tried, because none can be made here", CURES["the helper"])
        return
    facts, took = timed(SysuserMilter.describer.find_in_containers, end, end)
    report(facts.get("uid") == 0, f"{what}, {took}", f"is not found ({facts.get('why')})", CURES["the helper"])


def check_files() -> None:
    """Set up lists and limits, and look whether the queue can be read; OSError."""
    delegated_to(0)
    prepare_policy()
    incoming = os.path.join(find_queue(), "incoming")
    report(os.access(incoming, os.R_OK | os.X_OK), f"users: of sendmail(1), from {incoming}", "cannot be read",
           "set run_as_user to Postfix's mail_owner, and put socketname below its queue_directory")


def connection_made() -> Optional[tuple[Endpoint, Endpoint, int]]:
    """Have a process connect to this one, for root another user's; give both ends and its uid, or None."""
    uid, identity = os.geteuid(), cast(dict[str, Any], {})
    if uid == 0:
        # In a container that does not map all uids, 65534 stands for the others.
        user = pwd.getpwnam("nobody" if mapped_uids() == ALL_UIDS else "daemon")
        uid, identity = user.pw_uid, {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    listener, null = socket.create_server(("127.0.0.1", 0)), subprocess.DEVNULL
    listener.settimeout(10)
    server = listener.getsockname()
    code = f"import socket; socket.create_connection({server}).recv(1)"  # until --check ends
    try:
        subprocess.Popen([sys.executable, "-Ic", code], stdin=null, stderr=null, cwd="/", **identity)
        accepted, client = listener.accept()  # before, it is nobody's, see client_socket
    except OSError:
        return None
    accepted.detach()
    return endpoint(*client), endpoint(*server), uid


def container_made() -> Optional[Endpoint]:
    """Have a process connect to itself in a network namespace of its own; give its end, or None."""
    near, far = socket.socketpair()
    if os.fork() == 0:
        try:
            near.close()
            checked(LIBC.unshare(CLONE_NEWNET))
            connection = socket.socket()
            fcntl.ioctl(connection, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
            connection.bind(("127.0.0.1", 0))
            connection.connect(connection.getsockname())
            far.send(str(connection.getsockname()[1]).encode())
            far.recv(1)  # until --check ends, and the other end with it
        finally:
            os._exit(0)
    far.close()
    port = near.recv(8)
    near.detach()
    return endpoint("127.0.0.1", int(port)) if port else None


# ------------------------------------------------------------------------------- privilege, start
EX_FAILED, EX_RESTART, EX_CONFIG = 1, 75, 78  # sysexits.h: EX_TEMPFAIL, EX_CONFIG
STOP_SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
STOP_SECONDS = 10.0  # for open sessions to end
MOST_FILES = 65536  # open at once; lsof closes as many one by one before it begins
M_ARENA_MAX = -8  # malloc.h of glibc
# linux/capability.h
CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, LINUX_CAPABILITY_VERSION_3 = 2, 19, 0x20080522
CAPS_TO_SEE_OTHERS = 1 << CAP_DAC_READ_SEARCH | 1 << CAP_SYS_PTRACE  # what their processes have open
HANDED_OVER = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
UNPRIVILEGED = "without the privilege to see other users' processes"


def set_capabilities(wanted: int) -> None:
    """Keep, of the capabilities this process has, only those of a mask; OSError."""
    mask = wanted & status_mask("CapPrm")
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    # struct __user_cap_data_struct: effective, permitted, inheritable; then the same above 31
    if LIBC.capset(header, struct.pack("=6I", mask, mask, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def status_mask(field: str, of: str = "self") -> int:
    """Read a mask of /proc/PID/status: CapPrm, permitted capabilities; SigBlk, blocked signals."""
    match = re.search(rf"^{field}:\s*(\w+)", read_file(f"/proc/{of}/status"), re.MULTILINE)
    return int(match[1], 16) if match else 0


def become(user: Optional[pwd.struct_passwd]) -> None:
    """Drop groups, gid and uid for good; None: stay. OSError."""
    if user is None or os.geteuid() == user.pw_uid != 0:
        return
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


@functools.lru_cache(maxsize=1)  # it stays as it was at the start
def handed_over() -> bool:
    """Tell whether the service manager hands a socket over; ValueError if it cannot be used."""
    count, pid = os.environ.get("LISTEN_FDS"), os.environ.get("LISTEN_PID")
    if count is None and pid is None:
        return False
    if pid != str(os.getpid()):
        raise ValueError(f"LISTEN_PID = {pid!r}: must be {os.getpid()}, this process, as the service manager sets it")
    if count != "1":
        raise ValueError(f"LISTEN_FDS = {count!r}: must be 1, from a socket unit with one ListenStream=")
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(HANDED_OVER)) as given:
        kind = given.family, given.type, given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if kind == (socket.AF_UNIX, socket.SOCK_STREAM, 1):
            return True
    raise ValueError(f"descriptor {HANDED_OVER} of LISTEN_FDS: must be a unix stream socket that listens")


def is_served(path: str) -> bool:
    """Tell whether somebody listens on a unix socket; OSError if that cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)  # one that does not accept is still there
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):  # left over, or none
            probe.connect(path)
            return True
    return False


def prepare(user: Optional[pwd.struct_passwd]) -> tuple[str, str]:
    """Choose the look-ups, fork the helper, drop privilege for good; OSError, RuntimeError.

    Give what is wrong with sock_diag, or "", and who finds programs: "the helper", "sudo lsof" or "".
    """
    if mapped_uids() < ENOUGH_UIDS:
        raise RuntimeError("this user namespace maps too few uids to tell users apart (PrivateUsers=?)")
    try:
        lookup, lack = choose_lookup(lambda mta_end: SysuserMilter.describer.what_was_dialled(mta_end))
    except OSError as error:  # it may pass: no reason to do without sock_diag until the next start
        raise RuntimeError(f"a connection to 127.0.0.1, to try sock_diag on: {error}") from error
    sees_others = LINUX and status_mask("CapPrm") & CAPS_TO_SEE_OTHERS == CAPS_TO_SEE_OTHERS
    helper = fork_helper(user) if sees_others else None
    become(user)
    if user and LINUX:  # None is to stay as started: without sock_diag, psutil needs the privilege
        set_capabilities(0)
    by_lsof = helper is None and lsof_allowed()
    SysuserMilter.lookup, SysuserMilter.describer = lookup, Describer(helper, by_lsof)
    SysuserMilter.queue = find_queue()
    return lack, "the helper" if helper else "sudo lsof" if by_lsof else ""


def prepare_policy() -> None:
    """Set up the lists and limits that sessions share."""
    milter, directory = SysuserMilter, Directory()
    milter.directory, milter.limits = directory, Limits(hourly_limits, daily_limits)
    milter.blocked = UserList(directory, "blocked_mailusers", blocked_mailusers, blocked_mailusers_file)
    if allowed_mailusers is not None:
        milter.allowed = UserList(directory, "allowed_mailusers", allowed_mailusers)
    directory.ask(milter.limits.look_up, None, None)
    for users in filter(None, (milter.blocked, milter.allowed)):
        users.now()
    if milter.blocked.problem:  # root could read the file, run_as_user cannot
        end(EX_CONFIG)
    limited = any((blocked_mailusers, blocked_mailusers_file, hourly_limits, daily_limits, milter.allowed))
    if limited and unidentified_action == "accept":
        say(WARNING, "unidentified_action is accept: a blocked user who arranges to be unknown is not refused")


def run() -> NoReturn:
    """Serve the MTA until told to stop."""
    # Threads begin in "prepare", and none may take these: the main thread waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    doing = socketname
    try:
        if not handed_over() and os.path.lexists(socketname):
            if is_served(socketname):
                end(EX_FAILED, f"another milter is already serving {socketname}")
            os.unlink(socketname)
        doing = f"could not start as {run_as_user}"
        lack, way = prepare(account_by_name(run_as_user))
    except OSError as error:
        end(EX_FAILED, f"{doing}: {error}")
    except (RuntimeError, ValueError) as error:
        end(EX_FAILED, str(error))
    if lack:
        by_psutil = isinstance(SysuserMilter.lookup, PsutilLookup)
        say(WARNING, lack + (": psutil is used, and names the holder of a socket, not its owner" if by_psutil else ""))
    ways = f"version {VERSION}: users from {SysuserMilter.lookup.name}; programs " + (
        f"through {way}" if way else f"are unknown, {UNPRIVILEGED} and without sudo lsof")
    say(INFO, ways)
    prepare_policy()
    os.chdir("/")
    sys.excepthook = report_exception
    serve_mta(ways)


def serve_mta(ways: str) -> NoReturn:
    """Serve sessions until a signal comes, and end as it says."""
    Milter.factory = SysuserMilter
    Milter.set_flags(Milter.ADDHDRS | Milter.CHGHDRS | Milter.QUARANTINE | Milter.SETSYMLIST)
    Milter.set_exception_policy(Milter.CONTINUE)  # what pymilter cannot decode is unidentified
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: signals.put(number))
    # libmilter waits for the same signals in a thread of its own. One that the main thread does not
    # block goes to the main thread, but see "takes_signals".
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        beside = None if handed_over() or len(socketname) > 80 else os.path.dirname(socketname)
        with tempfile.TemporaryDirectory(dir=beside) as directory:
            path, aside = listen(f"{directory}/socket", signals)
    except (OSError, Milter.error) as error:
        end(EX_FAILED, f"{socketname}: {error}")
    SysuserMilter.path = path
    announce(path, ways)
    stop(path, aside, signals)


def listen(hidden: str, signals: queue.SimpleQueue[int]) -> tuple[str, tuple[int, int]]:
    """Have libmilter serve a socket that nobody can reach, then ours in its place; OSError, Milter.error.

    Only Debian's takes a descriptor; each accepts from what is under its socket's number. Give the
    path of ours, and, to undo this, a copy of libmilter's own socket and its number.
    """
    Milter.milter.register("milter_sysuser")
    Milter.milter.setconn("unix:" + hidden)
    Milter.milter.opensocket(False)  # runmilter goes on with this socket
    me = psutil.Process()
    sockets = getattr(me, "net_connections", None) or me.connections  # before psutil 6.0
    number = next((one.fd for one in sockets("unix") if one.laddr == hidden), -1)
    if number < 0:
        raise OSError(errno.EBADF, "libmilter's socket is not found")
    aside = os.dup(number), number
    thread = threading.Thread(target=run_libmilter, args=(hidden,), daemon=True)
    thread.start()
    signal.signal(signal.SIGURG, lambda *_: None)
    latest = time.monotonic() + 5  # to serve, whatever is seen of libmilter's thread
    while signals.empty() and not takes_signals() and time.monotonic() < latest:
        time.sleep(0.005)
    with socket.socket(fileno=os.dup(HANDED_OVER)) if handed_over() else socket.socket(socket.AF_UNIX) as ours:
        if not handed_over():
            os.umask(0o177)  # the socket's mode, as bind(2) takes it
            ours.bind(socketname)
            ours.listen(socket.SOMAXCONN)
        os.dup2(ours.fileno(), number, inheritable=False)
        # A signal ends its poll(2), which would go on with the hidden one, for 5 s. pthread_kill(3) of
        # glibc blocks all signals meanwhile: one for us could go to libmilter's thread.
        if hasattr(LIBC, "tgkill"):
            LIBC.tgkill(os.getpid(), thread.native_id, signal.SIGURG)
        return ours.getsockname(), aside


def run_libmilter(path: str) -> None:
    """Have libmilter serve sessions until it fails."""
    try:
        Milter.runmilter("milter_sysuser", "unix:" + path, timeout or LONGEST_TIMEOUT, rmsock=False)
    except Milter.error as error:
        end(EX_FAILED, f"{socketname}: {error}")
    os.kill(os.getpid(), signal.SIGHUP)  # libmilter has had a signal, and does not say which


def takes_signals() -> bool:
    """Tell whether libmilter's own thread waits for signals.

    Just when it begins to, it may take one that is on its way to the main thread.
    """
    ours, term = {thread.native_id for thread in threading.enumerate()}, 1 << signal.SIGTERM - 1
    with contextlib.suppress(OSError):  # a thread has ended; or there is no such directory
        others = set(map(int, os.listdir("/proc/self/task"))) - ours
        return any(not status_mask("SigBlk", f"self/task/{thread}") & term for thread in others)
    return not LINUX


def announce(path: str, ways: str) -> None:
    """Say that sessions can begin, to the service manager as well (sd_notify(3))."""
    given = handed_over()
    say(INFO, f"listening on {f'fd:{HANDED_OVER}' if given else path}")
    if given and is_lost(path):
        say(WARNING, f"{path} is not the service manager's socket any more, and mail passes unseen: {SOCKET_CURE}")
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.connect("\0" + name[1:] if name[0] == "@" else name)
                manager.send(f"READY=1\nSTATUS={ways}".encode())
        except OSError as error:
            say(ERROR, f"NOTIFY_SOCKET: {error}")


def is_lost(path: str) -> bool:
    """Tell whether somebody listens on a socket whose path leads elsewhere now."""
    with contextlib.suppress(OSError):  # many wait there; or it cannot be told
        return sockets_at(path, "01") > is_served(path)
    return False


def sockets_at(path: str, *states: str) -> int:
    """Count the sockets that were bound to a path, by their states in /proc/net/unix (linux/net.h).

    01: listens; 02: has connected, and waits to be accepted; 03: accepted.
    """
    with contextlib.suppress(FileNotFoundError), open("/proc/net/unix", errors="surrogateescape") as table:
        return sum(line.endswith(f" {path}\n") and line.split()[5] in states for line in table)
    return 0


def stop(path: str, aside: tuple[int, int], signals: queue.SimpleQueue[int]) -> NoReturn:
    """Wait for a signal; take no new sessions, let those that are open end, and end.

    In a session that is cut off the MTA would go on without us. A second signal does that at once.
    """
    told, left = [signals.get()], 1
    threading.Timer(AGAIN_SECONDS, SysuserMilter.directory.end).start()
    SysuserMilter.path = ""
    deadline = time.monotonic() + STOP_SECONDS
    if handed_over():  # new ones wait with the service manager
        os.dup2(*aside, inheritable=False)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
    while left and len(told) == 1 and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            told.append(signals.get(timeout=0.03))  # also the time for an accept(2) that has begun
        left = sockets_at(path, "03", "" if handed_over() else "02")
    if left:
        say(WARNING, f"{left} sessions are still open: their mail passes as without a milter")
    restart = set(told) == {signal.SIGHUP}
    say(INFO, "stopped, to be started again" if restart else "stopped")
    end(EX_RESTART if restart else 0)


def end(status: int, *problems: str) -> NoReturn:
    """Log problems, and end at once: libmilter's own stop destroys a mutex in use, and hangs.

    The MTA shall not wait on the service manager's socket until a setting is mended: nobody can
    connect to it any more, and who has connected is dropped, until there is nobody (OSError).
    """
    for problem in problems:
        say(ERROR, problem)
    with contextlib.suppress(ValueError, OSError):
        if status == EX_CONFIG and handed_over():
            given = socket.socket(fileno=HANDED_OVER)
            given.shutdown(socket.SHUT_RDWR)
            while True:
                given.accept()[0].close()
    os._exit(status)


def main() -> int:
    """Read and check the settings, then do what the command line says."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tag local mail with the system user and program that sent it.\n"
                    f"The settings are in {settings_file}. The top of the script explains each.",
        epilog="example:\n  %(prog)s --check && systemctl reload milter_sysuser\n\nexit status:\n"
               "  0   It was told to stop (TERM, INT).\n"
               "  1   It could not start or go on. The last line of the log says why.\n"
               "  75  It was told to start again with the settings of now (HUP).\n"
               "  78  A setting is wrong, or Python, pymilter or psutil is missing or too old.")
    parser.add_argument("--check", action="store_true", help="check the settings and show what works here")
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args()
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # one of these that was closed must not become a socket of ours
    log_target()  # now, while it may still be opened anew
    if MISSING:
        end(EX_CONFIG, f"{MISSING}: install pymilter 1.0.5 or newer and psutil "
                       "(Debian 12 or newer: python3-milter python3-psutil)")
    values = {name: globals()[name] for name in RULES}
    sources, problems = take_settings_file(values)
    problems += settings_problems(values, sources)
    globals().update(values)
    if problems:
        end(EX_CONFIG, *problems)
    if arguments.check:
        return check(sources)
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if hasattr(LIBC, "mallopt"):  # glibc: else each thread has its own heap, and memory creeps up
        LIBC.mallopt(M_ARENA_MAX, 1)
    run()


if __name__ == "__main__":
    sys.exit(main())
