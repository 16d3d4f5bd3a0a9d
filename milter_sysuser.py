#!/usr/bin/python3
# SPDX-License-Identifier: MIT
# mypy: disable-error-code="var-annotated"
"""Say which system user and which program sent each message that came in by SMTP to localhost.

A milter for Postfix and Sendmail. Every message from a local SMTP client gets a header and a line
in the log:

    X-Sender-Process-Info: user=stefan program=telnet

    4Zb9Xk1c2Tz3: client=127.0.0.1:43210 user=stefan uid=1001 program=telnet pid=4711
    exe=/usr/bin/telnet dir=/home/stefan unit=session-3.scope from=stefan@example.org rcpts=1
    action=tag                                                                     (one line)

The user is the one who made the client's socket, as the kernel's sock_diag says it: blocking and
limits rest on that alone. The program is what holds the socket at the time: a description, never a
credential. What is not known is written "?", and is never turned into root or somebody else.

It cannot know who is behind a relay on this host (docker-proxy, another network namespace, XCLIENT
or PROXY), and it promises nothing against root. README.md has the whole list.

To see who is named, read in this order: SysuserMilter (connect, confirm, identify),
KernelLookup.find_client_socket, why_not_root, look_up_account. Who is refused: SysuserMilter.judge
and what it calls. What has privilege: fork_helper, serve, Finder. The rest describes the process.
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
import functools
import grp
import ipaddress
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
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Optional, Union, cast

try:
    import Milter
    import psutil
    from Milter import Base, noreply
    MISSING = "" if hasattr(Base, "header_bytes") else "pymilter is older than 1.0.5"
except ImportError as missing:  # --help and --version do without them; see main
    MISSING, Base, noreply = str(missing), object, lambda callback: callback

VERSION = "2.0"

# ====================================================================================== settings
# Plain values, one name each. Leave them here, and put such lines into the file that settings_file
# names, where they outlive an upgrade. Then "milter_sysuser.py --check", then restart the milter.

# The unix socket the MTA connects to: an absolute path, at most 107 bytes, in a directory that
# run_as_user may write to. Where systemd hands the socket over, ListenStream= of its unit counts.
# The trap: Postfix's smtpd may be chrooted. A path below /var/spool/postfix works either way, if
# main.cf names it without that prefix. Example: "/run/milter_sysuser/milter.sock", for Sendmail
socketname = "/var/spool/postfix/private/milter.sock"

# Seconds to wait for the MTA to go on with a message before its connection is dropped; 0: never
# (24 days, the longest there is). The trap: where the MTA has default_action=accept, whoever sends
# more slowly than this is let through unseen, forged header and all. Example: 7200
timeout = 0

# The user to become when started as root, for good: the one the MTA's smtpd runs as. Already being
# that user is fine. None: stay as started. The trap: started as root with None, the mail-facing
# process stays root, and only root may connect to its socket. Example: "milter-sysuser"
run_as_user = "postfix"

# Who may not send mail: user names, numeric uids, "@group" for everyone in a group. Names may
# contain blanks. The trap: digits in quotes are a uid, and also the user of that name if there is
# one. Example: ["bob", 1004, "@suspended"]
blocked_mailusers = []

# A file with one such entry a line, "#" begins a comment; read again when it changes, without a
# restart. It must belong to root or run_as_user and be writable by its owner only. The trap: a file
# edited in place is empty for a moment; rename (mv) a new one. Example: "/etc/milter_sysuser.blocked"
blocked_mailusers_file = None

# Who alone may send mail: a list of such entries, or None for everyone. Everyone else is treated as
# blocked, and the block lists apply as well. The trap: mailing lists, content filters and root send
# mail, too. Example: ["@customers", "root"]
allowed_mailusers = None

# What happens to a blocked user's mail: "reject" (550), "tempfail" (450: the sender tries again),
# "quarantine" (the MTA's hold queue) or "log" (a dry run: passed and tagged, and the log says what
# would have been done). The trap: a program without a queue loses mail by "tempfail", too.
# Example: "quarantine"
blocked_action = "reject"

# What happens to local mail whose owner is unknown: "accept" (tagged user=?), "tempfail",
# "quarantine" or "reject" (550; 450 where the client is not at fault). The trap: a user can arrange
# to be unknown by closing early. With "accept" a blocked user's mail can pass that way, unnamed; with
# the others a client that is merely hasty is refused. Example: "quarantine"
unidentified_action = "accept"

# How many recipients a user may address in any hour: by name or uid, "*" for everyone else, None
# for no limit. The trap: "*" counts root and content filters, too, and the count is lost at a
# restart. Example: {"*": 200, "www-data": 1000, "root": None}
hourly_limits = {}

# The name of the header that is added, and removed wherever else it comes from. The trap: a new
# name leaves the old one to forgers. Example: "X-Local-Sender"
header_name = "X-Sender-Process-Info"

# What the header says, in this order: user, uid, program, pid, exe, args (the command line), dir
# (working directory), unit (systemd unit or container). []: no header is added, forged ones are
# still removed. The trap: the header leaves with the mail, and args can hold passwords.
# Example: ["user"]
header_fields = ["user", "program"]

# The same choice for the log. The trap: the README's recipes expect the fields as delivered.
# Example: ["user", "uid", "program", "args"]
log_fields = ["user", "uid", "program", "pid", "exe", "dir", "unit"]

# How lsof is called where this is not started as root; sudoers.example has the rule it needs. []:
# never. The trap: with neither the helper nor this, other users' programs are "?", and so is root.
# Example: ["/usr/bin/lsof"]
lsof_command = ["sudo", "-n", "/usr/bin/lsof"]

# A file of lines "name = value" that override the settings above, if it exists; None: no file. It
# is never executed. It must belong to root, or to whoever starts this, and be writable by its owner
# only. The trap: a value there counts, whatever stands here. Example: "/usr/local/etc/milter.conf"
settings_file = "/etc/milter_sysuser.conf"
# =============================================================================== end of settings

DEFAULTS: dict[str, Any] = {  # the settings as delivered
    "socketname": "/var/spool/postfix/private/milter.sock", "timeout": 0, "run_as_user": "postfix",
    "blocked_mailusers": [], "blocked_mailusers_file": None, "allowed_mailusers": None,
    "blocked_action": "reject", "unidentified_action": "accept", "hourly_limits": {},
    "header_name": "X-Sender-Process-Info", "header_fields": ["user", "program"],
    "log_fields": ["user", "uid", "program", "pid", "exe", "dir", "unit"],
    "lsof_command": ["sudo", "-n", "/usr/bin/lsof"], "settings_file": "/etc/milter_sysuser.conf"}
FIELDS = ("user", "uid", "program", "pid", "exe", "args", "dir", "unit")
BLOCKED_ACTIONS = ("reject", "tempfail", "quarantine", "log")
UNIDENTIFIED_ACTIONS = ("accept", "tempfail", "quarantine", "reject")
REFUSALS = {"reject": ("550", "5.7.1"), "tempfail": ("450", "4.7.1")}  # RFC 5321 4.2.3, RFC 3463 3.8
UNIDENTIFIED = "Sender process could not be identified"
# Why an owner is unknown where that was not the client's doing: no reason to refuse for good.
OUR_FAULTS = {"busy", "error", "no-helper", "not-permitted", "timeout"}
ERROR, WARNING, INFO = 3, 4, 6  # syslog(3)
LEVELS = {ERROR: "ERROR", WARNING: "WARNING", INFO: "INFO"}

EX_FAILED, EX_RESTART, EX_CONFIG = 1, 75, 78  # sysexits.h: EX_TEMPFAIL, EX_CONFIG
STOP_SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
HANDED_OVER = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
LONGEST_TIMEOUT = 2_147_483  # seconds; libmilter gives poll(2) milliseconds in an int
MOST_FORGED = 100  # headers; to remove n takes the MTA n * n steps
# Of all headers. A hundred hops (RFC 5321, 6.3) and fifty ARC sets of three (RFC 8617, 4.2.1) leave
# as much again and more for what programs add.
MOST_HEADERS = 1000
RIVAL_SECONDS = 0.3  # what a session waits at most for another's queue id
HELPER_SECONDS = 0.3  # what a session waits at most for the helper, its turn included
SEARCH_SECONDS, SEARCH_LINKS = 0.2, 300_000  # what one search may cost
PAUSE_SECONDS = 2.0  # for the user whose search ran over that, so that others get their turn
LSOF_SECONDS, LSOF_PROCESSES, LSOF_PIDS = 2.0, 4, 4000  # 4,000 pids are 32 kB; 128 KiB is the most
ARGS_SECONDS = 0.05  # reading a command line can be made to hang
FIRST_SECONDS, AGAIN_SECONDS = 3.0, 0.3  # to wait for NSS: about someone new, about someone known
REFRESH_SECONDS = 60  # to believe what NSS said
COMPLAINT_SECONDS = 60  # between two lines that complain of the same
FACT_BYTES = 512  # of each fact from the process table
VALUE_CHARACTERS, LINE_OCTETS = 256, 998  # of a value; of a header's line (RFC 5322, 2.1.1)
LINE_BYTES = 4000  # of a line in the log: below PIPE_BUF, so that a pipe takes all of it or nothing
MOST_REMEMBERED = 10_000  # entries in each memory; the longest unused is forgotten first
MOST_FILE_BYTES, MOST_WARNED = 1 << 20, 1000  # of a list of users; entries to look up for a warning
MOST_FILES = 65536  # open at once; lsof closes as many one by one before it begins

# linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h, in.h, in6.h; asm-generic/unistd.h
SO_ORIGINAL_DST, IP_PKTINFO, IP_PKTOPTIONS, IPV6_MULTICAST_IF = 80, 8, 9, 17
PIDFD_OPEN, PIDFD_GETFD = 434, 438
# linux/capability.h, prctl.h, exportfs.h; malloc.h of glibc
CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE = 2, 19
CAPS_TO_SEE_OTHERS = 1 << CAP_DAC_READ_SEARCH | 1 << CAP_SYS_PTRACE  # what their processes have open
LINUX_CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
FILEID_KERNFS, M_ARENA_MAX = 0xFE, -8

LINUX = sys.platform.startswith("linux")
LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL: calls keep the interpreter's lock
SET_STACK_LIMITS = getattr(ctypes.pythonapi, "PyUnstable_ThreadState_SetStackProtection", None)
ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p
ENTRY = re.compile(r"""@?[^\s\x00-\x1f\x7f\ud800-\udfff@:#*"]
                       (?:[^\s\x00-\x1f\x7f\ud800-\udfff:#*"]|[ ])*(?<![ ])""", re.VERBOSE)


# ------------------------------------------------------------------------------------- the milter
class SysuserMilter(Base):  # type: ignore[misc]
    """One session of the MTA with a client; several messages may come through it.

    connect asks the kernel whose the client's socket is, and claims it. hello confirms that while
    the client waits for the answer (envfrom, if the client says no EHLO): a client that goes on was
    still connected. envrcpt has the process described, while he waits, too. eom decides, acts and
    logs; header does, where there are too many.
    """

    # Set once, in "prepare", for all sessions.
    lookup: Lookup
    directory: Directory
    blocked: UserList
    allowed: Optional[UserList] = None
    limits: Limits
    describer: Describer
    # The sessions by the socket of the MTA's that each took for its own: one each, or nobody knows
    # whose a message is.
    claims: dict[Any, list[SysuserMilter]] = {}
    claims_lock = threading.Lock()

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Know nothing of a client."""
        self.client: Optional[str] = None  # address and port, as the log has them
        self.owner = unknown("error")
        self.claimed: Any = None  # the cookie of the MTA's end
        self.confirmed, self.ended = False, False
        self.rivals: list[SysuserMilter] = []  # sessions that claim the same socket
        self.facts: Facts = {"why": "error"}  # of the process
        self.account: Optional[Account] = None  # the owner as NSS had him at the first recipient
        self.sender, self.recipients, self.queue_id = "", 0, None
        self.commands, self.headers = 0, 0
        self.forged: list[str] = []
        self.hidden = False  # whether a header of our name stands behind a bare CR

    def negotiate(self, opts: list[int]) -> int:
        """Ask the MTA for the server's end (pymilter's own symlist fails on Python 3)."""
        # pymilter carries one thread state from worker thread to worker thread. Python 3.14 keeps
        # the stack limits of the first, and ends the process when it finds itself outside of them
        # (cpython gh-139653). Limits that every stack lies above switch that check off.
        if SET_STACK_LIMITS:
            this_state = ctypes.c_void_p(ctypes.pythonapi.PyThreadState_Get())
            SET_STACK_LIMITS(this_state, ctypes.c_void_p(4096), ctypes.c_size_t(1 << 20))
        if opts[0] & Milter.SETSYMLIST:
            self._ctx.setsymlist(Milter.M_CONNECT, "{daemon_addr} {daemon_port}")
        return int(Base.negotiate(self, opts))

    def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
        """Ask the kernel who has connected. The MTA waits for this before it greets the client."""
        THIS_THREAD.session = self  # pymilter keeps one thread state for each session
        self.close()  # a session whose client is announced once more begins anew
        self.begin()
        if isinstance(hostaddr, str) or (hostaddr and not hostaddr[1]):
            self.owner = REMOTE  # the MTA's own emulation, for mail from sendmail(1)
        elif hostaddr is None:
            self.owner = unknown("closed")  # gone before the MTA asked for its address
        else:
            self.client = ("[%s]:%d" if ":" in hostaddr[0] else "%s:%d") % tuple(hostaddr[:2])
            self.owner = self.find_owner(endpoint(hostaddr[0], hostaddr[1]))
        if self.owner.uid is not None:
            self.claimed = self.owner.cookie
            with self.claims_lock:
                self.rivals = self.claims.get(self.claimed, [])
                for rival in self.rivals:
                    rival.rivals = rival.rivals + [self]
                self.claims[self.claimed] = self.rivals + [self]
        return int(Milter.CONTINUE)

    def find_owner(self, client: Endpoint) -> ClientSocket:
        """Find the client's socket."""
        try:
            port = int(self.getsymval("{daemon_port}") or 0)
            server = endpoint(self.getsymval("{daemon_addr}") or "", port)
        except ValueError:
            server = None
        try:
            return self.lookup.find_client_socket(client, server)
        except (OSError, psutil.Error) as error:
            complain("the owner of a connection could not be asked for", str(error))
            return unknown("error")

    def hello(self, hostname: str) -> int:
        """Confirm the owner: behind EHLO's answer a client can send all the rest at once, and reset."""
        self.try_to_confirm()
        return self.answer()

    def answer(self) -> int:
        """Go on; at each hundredth command make room, since the client may leave no pause between them."""
        self.commands += 1
        if self.commands % 100 == 0:
            make_room()
        return int(Milter.CONTINUE)

    def try_to_confirm(self) -> None:
        """Confirm the owner if that can be done now; at the end it is tried again."""
        if self.owner.uid is not None:
            with contextlib.suppress(OSError, psutil.Error):
                self.confirm(self.owner)

    def envfrom(self, sender: str, *parameters: str) -> int:
        """Begin a message, forget the last; confirm the owner for a client that said no EHLO."""
        self.sender, self.recipients, self.queue_id = sender, 0, None
        self.headers, self.forged, self.hidden, self.account = 0, [], False, None
        self.try_to_confirm()
        return self.answer()

    # The MTA waits for the answer to a recipient, a header and a command that it does not know. Did it
    # not, a client could let it write half a command, or have the next one there for as long as he
    # likes; see make_room.
    def envrcpt(self, recipient: str, *parameters: str) -> int:
        """Count a recipient; with the first, have the process described, and the user looked up."""
        self.recipients += 1
        if self.account is None and self.owner.uid is not None:
            if "pid" not in self.facts:
                self.facts = self.describer.describe(self.owner)
            self.account = self.directory.account(self.owner.uid)
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
        """Note a header that only we may write, also behind a bare CR, which some take for a line's end.

        A message with more headers than any honest one has is refused at once.
        """
        self.headers += 1
        if self.headers > MOST_HEADERS:
            return self.eom()
        if len(self.forged) <= MOST_FORGED and name.strip().lower() == header_name.lower():
            self.forged.append(name)
        if "\r" in value or "\r" in name:
            ours = rf"[\r\n]{re.escape(header_name)}[\x00-\x20]*:"
            self.hidden |= bool(re.search(ours, f"{name}:{value}", re.IGNORECASE))
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        """Decide, act and log, the message being complete; or refused before it is."""
        sender, verdict = Sender(None, "error"), Verdict("tempfail", "unidentified", UNIDENTIFIED)
        try:
            sender = self.identify()
            verdict = self.judge(sender)
        except Exception:
            report_exception(*sys.exc_info())
            with contextlib.suppress(Exception):  # if that fails, too, it stays tempfail: nothing is lost
                verdict = self.judge_by_memory()
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
        self.ended = True
        with self.claims_lock:
            others = [session for session in self.claims.pop(self.claimed, []) if session is not self]
            if others:
                self.claims[self.claimed] = others
        return int(Milter.CONTINUE)

    def confirm(self, owner: ClientSocket) -> str:
        """Say why the owner cannot be believed, or "" once he can be: then for good, without rivals.

        Between accept(2) and the look at the kernel, a client can reset and let another user's
        connection take its four endpoints. While the MTA's end lives, the client's end cannot
        change hands. So the MTA's end must still be the one that was looked at, by its cookie, and
        it must be this session's: the MTA must have read from it since. From the end of a newer
        connection the MTA reads nothing until it has announced that connection, too. Then two
        sessions claim the end, and bytes that were read before prove nothing for either. (One
        session of the MTA can announce a connection twice, by XCLIENT or where the milter is listed
        twice; the message then has one queue id in both, from DATA on.)
        """
        rivals = self.unexplained_rivals()
        if self.confirmed and not rivals:
            return ""
        self.confirmed = False
        cookie, mta_bytes_read = self.lookup.look_again(owner)
        if cookie is None:
            return "closed"
        if cookie != owner.cookie:
            return "reused"
        if not rivals and mta_bytes_read > owner.mta_bytes_read:
            self.confirmed = True
            return ""
        # Until DATA, a rival may still be the same session of the MTA's.
        if rivals and (self.queue_id or all(rival.ended for rival in rivals)):
            self.begin_anew(owner, mta_bytes_read)
        return "reused"

    def begin_anew(self, owner: ClientSocket, mta_bytes_read: int) -> None:
        """Believe nothing that the MTA has read until now, and forget the rivals that have ended."""
        self.owner = owner._replace(mta_bytes_read=mta_bytes_read)
        with self.claims_lock:
            self.rivals = [rival for rival in self.rivals if not rival.ended]

    def unexplained_rivals(self) -> list[SysuserMilter]:
        """Give the rivals that are not known to be the same session of the MTA's.

        The DATA of one that is can reach us shortly after this one's: that is waited for.
        """
        deadline = time.monotonic() + (RIVAL_SECONDS if self.queue_id else 0.0)
        while True:
            found = [rival for rival in self.rivals if rival.queue_id != self.queue_id or not rival.queue_id]
            if all(rival.ended for rival in found) or time.monotonic() >= deadline:
                return found
            time.sleep(0.002)

    def identify(self) -> Sender:
        """Say who sent the message; or why that is not known, and who it may have been."""
        owner = self.owner
        if owner.uid is None:
            return Sender(None, "" if owner is REMOTE else owner.why)
        facts = self.facts
        account = self.account or self.directory.account(owner.uid)
        other = None
        if facts.get("holder", owner.uid) != owner.uid:
            holder = self.directory.account(facts["holder"])
            other = holder if holder.uid != account.uid else None
        why = self.why_not_named(owner, account, facts)
        if why:
            return Sender(None, why, {}, account, other)
        return Sender(account, str(facts.get("why", "")), facts, None, other)

    def why_not_named(self, owner: ClientSocket, account: Account, facts: Facts) -> str:
        """Say in a word why the owner must not be named, or ""."""
        try:
            why = self.confirm(owner) or account.why
            if owner.uid == 0 and not why and not owner.process:
                why = why_not_root(owner.client.port, facts)
            return why
        except (OSError, psutil.Error) as error:
            complain("the owner of a connection could not be asked for", str(error))
            return "error"

    def judge(self, sender: Sender) -> Verdict:
        """Say what becomes of the message."""
        refused = self.refusal_of_headers()
        if refused:
            return refused
        if self.owner is REMOTE:
            return Verdict("pass")
        blocked, allowed = self.blocked.now(), self.allowed.now() if self.allowed else None
        for suspect in sender.suspects():
            refused = refusal_of(suspect, blocked, allowed)
            if refused:
                return refused
        if sender.account is None:
            return unidentified(sender.why)
        if unidentified_action != "accept" and may_be_listed(sender.account, blocked):
            return unidentified("error")
        return self.limits.verdict(sender.account, self.recipients) or passed()

    def judge_by_memory(self) -> Verdict:
        """Say what becomes of a message where "judge" failed: no fault of ours lets a blocked user pass."""
        refused = self.refusal_of_headers()
        if not refused and self.owner.uid is not None:
            suspect = self.account or Account(self.owner.uid, self.owner.uid)
            allowed = self.allowed.entries if self.allowed else None
            refused = refusal_of(suspect, self.blocked.entries, allowed)
        return refused or unidentified("error")

    def refusal_of_headers(self) -> Optional[Verdict]:
        """Refuse headers that are too many, or forged in a way that cannot be removed; None: they are not."""
        if self.headers > MOST_HEADERS:
            return Verdict("reject", "headers", f"More than {MOST_HEADERS} headers")
        if len(self.forged) > MOST_FORGED:
            return Verdict("reject", "forged", f"More than {MOST_FORGED} {header_name} headers")
        if self.hidden:
            return Verdict("reject", "forged", f"A {header_name} header behind a bare CR")
        return None

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
        pairs += [("from", self.sender.strip("<>")), ("rcpts", self.recipients)]
        pairs += [("action", verdict.action)]
        pairs += [("reason", verdict.reason)] if verdict.reason else []
        pairs += [("lookup", sender.why)] if sender.why else []
        for key, account in ("maybe", sender.maybe), ("holder", sender.holder):
            pairs += [(key, account.name or account.uid)] if account else []
        say(INFO, f"{quote(self.getsymval('i'))}: {' '.join(key_values(pairs))}")


def make_room() -> None:
    """Have libmilter start another thread. To be called by a session that may keep its own for long.

    Where libmilter has a pool of threads (worker.c, in Debian's build), it can give several sessions
    to one thread that is still idle. The thread takes one, and stays with it while it has a command;
    the others wait until any thread looks for work, which one does that was started for a new
    connection, be it closed at once.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        probe.connect(listening_path())


@functools.lru_cache(maxsize=1)
def listening_path() -> str:
    """Give the path of the socket that libmilter listens on; OSError."""
    if not handed_over():
        return socketname
    with socket.socket(fileno=os.dup(HANDED_OVER)) as given:
        return str(given.getsockname())


THIS_THREAD = threading.local()


def report_exception(kind: Any, error: Any, trace: Any) -> None:
    """Log a traceback.

    Where pymilter cannot decode some bytes, it calls this, as sys.excepthook, and not the callback.
    If that was the name behind EHLO, the owner is confirmed here instead.
    """
    session = getattr(THIS_THREAD, "session", None)
    if kind is UnicodeDecodeError and session and not session.confirmed:
        session.try_to_confirm()
    if complain(f"a callback failed: {kind.__name__}") and kind is not UnicodeDecodeError:
        for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
            say(ERROR, "  " + line.encode("ascii", "backslashreplace").decode())


# ---------------------------------------------------------------------------------- values, the log
class Endpoint(NamedTuple):
    """One end of a TCP connection; a v4-mapped address is the four bytes it stands for."""

    address: bytes
    port: int


class ClientSocket(NamedTuple):
    """The client's end of a connection: whose it is, and how the MTA's end is found again."""

    uid: Optional[int]  # of whoever made it; None: not known
    why: str = ""  # one word, where uid is None
    inode: int = 0  # 0: no process has it open any more
    cgroup: int = 0
    cookie: Any = None  # of the MTA's end, which is one connection's and no other's; see Diag
    client: Endpoint = Endpoint(b"", 0)
    mta_end: Endpoint = Endpoint(b"", 0)
    interface: int = 0  # the index of the device that the MTA's end is bound to; 0: none
    mta_bytes_read: int = 0  # that the MTA had read from the connection when this was asked
    process: Optional[psutil.Process] = None  # that has it; only where there is no sock_diag


REMOTE = ClientSocket(None, "remote")  # what the client of another host has, or no client at all


def unknown(why: str) -> ClientSocket:
    """Stand for a socket of this host whose owner is not known; why: one word."""
    return ClientSocket(None, why)


class Account(NamedTuple):
    """A user as the directory service (NSS) knows it."""

    kernel_uid: int  # as the kernel gave it
    uid: int  # of the account; for a delegated uid that of the user it was delegated to
    name: Optional[str] = None  # None: no such user, or not known yet
    gids: frozenset[int] = frozenset()
    answered: bool = False  # whether NSS has said so
    why: str = ""  # one word, where this may be the wrong account


Facts = dict[str, Any]  # of one process: FIELDS, and "holder", a uid; or "why" they are unknown


class Sender(NamedTuple):
    """Who sent a message, and with what."""

    account: Optional[Account]  # None: not known
    why: str  # one word, where something is not known
    facts: Facts = {}
    maybe: Optional[Account] = None  # who was seen, and could not be confirmed
    holder: Optional[Account] = None  # who has the socket, if that is somebody else

    def suspects(self) -> list[Account]:
        """Give whom the lists are asked about: the sender, else all who may be him."""
        accounts = (self.account,) if self.account else (self.maybe, self.holder)
        return [account for account in accounts if account]

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
    lines, room = [""], LINE_OCTETS - taken
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
            room = LINE_OCTETS - 1
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n\t".join(lines)


def remember(memory: dict[Any, Any], key: Any, value: Any, most: int = MOST_REMEMBERED) -> None:
    """Put an entry into a bounded memory; what was put there the longest ago is forgotten first."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:
        del memory[next(iter(memory))]


@functools.lru_cache(maxsize=1)
def log_target() -> tuple[int, bool]:
    """Give the descriptor to log to, and whether the journal reads it (systemd.exec(5)).

    A pipe or terminal is opened anew: then no write waits for whoever reads it, and no other
    program that writes to it notices.
    """
    status = os.fstat(2)
    journalled = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            return os.open("/proc/self/fd/2", flags), journalled
    return 2, journalled


def say(level: int, text: str) -> None:
    """Write one line, with its level for journald (sd-daemon(3)), else with time and level."""
    with contextlib.suppress(OSError):  # a full disk or pipe must not reach the mail
        descriptor, journalled = log_target()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        stamp = f"<{level}>" if journalled else f"{now} {LEVELS[level]} "
        data = escape((stamp + text).encode("utf-8", "backslashreplace"), rb"[\x00-\x1f\x7f]")
        if select.select([], [descriptor], [], 0)[1]:  # else nobody reads: the line is lost
            os.write(descriptor, data[:LINE_BYTES] + b"\n")


COMPLAINTS: dict[str, tuple[float, int]] = {}  # by text: when it was logged, how often it was not


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


# --------------------------------------------------------------------- lookup: whose a connection is
# linux/netlink.h, sock_diag.h, rtnetlink.h; net/flow.h
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 0x1, 0x300, 2, 3
NETLINK_ROUTE, NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 0, 4, 20
RTM_GETROUTE, RTA_DST, RTN_LOCAL, RTN_ANYCAST = 26, 1, 2, 4
LOOPBACK = 1  # LOOPBACK_IFINDEX: the index of lo, in every network namespace
NETLINK_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: size, kind, flags, number, port
FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}  # by the length of an address
# What RTM_GETROUTE says of an address that no route leads to, or whose family the kernel lacks.
NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP,
            errno.EAFNOSUPPORT}


class Diag(NamedTuple):
    """What the kernel says of one socket (struct inet_diag_msg and attributes)."""

    state: int
    source: Endpoint
    destination: Endpoint
    uid: int
    inode: int
    cookie: int  # the kernel's number of this one socket, never used again
    cgroup: int  # inode number of the cgroup v2 directory; 0: the kernel does not say (before 5.8)
    read: int  # bytes that were received and that a process has taken; 0 before Linux 4.1
    received: int  # 0 before Linux 4.1
    sent: int  # 0 before Linux 4.19
    interface: int  # the index of the device that it is bound to; 0: none

    def can_be_behind(self, mta_end: Diag) -> bool:
        """Tell whether a socket that dialled the same can be the client of the MTA's end."""
        return self.received <= mta_end.sent and (self.inode > 0 or self.state != FIN_WAIT2)


def endpoint(address: str, port: int) -> Endpoint:
    """Read an address as MTAs write it ("IPv6:::1", "[::1]", "fe80::1%eth0"); ValueError."""
    return Endpoint(packed(address), port)


@functools.lru_cache(maxsize=1024)
def packed(address: str) -> bytes:
    """Give an address as its four or sixteen bytes; ValueError if it is none."""
    ip = ipaddress.ip_address(re.sub(r"^\[?(?i:IPv6:)?|\]$|%.*$", "", address))
    return (getattr(ip, "ipv4_mapped", None) or ip).packed


class KernelLookup:
    """Ask the kernel through netlink: sock_diag(7), and rtnetlink(7) for what is local.

    It takes no privilege. The two sockets are opened once, so that a milter that is short of
    descriptors still knows its clients.
    """

    name = "sock_diag"

    def __init__(self, what_was_dialled: Callable[[Diag], Union[Endpoint, str]]) -> None:
        """Open the sockets; what_was_dialled: by a redirected client, or why that is not known."""
        self.what_was_dialled, self.lock, self.number = what_was_dialled, threading.Lock(), 0
        self.buffer = ctypes.create_string_buffer(32768)
        self.sock_diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        self.rtnetlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)

    def find_client_socket(self, client: Endpoint, server: Optional[Endpoint]) -> ClientSocket:
        """Say whose the client's end is.

        server: None where the MTA did not say. Raises OSError if the kernel refuses to answer.
        """
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
        """Say whose the client's end is, which NAT hides: by what it dialled before that was changed.

        NAT changes a source port, too, where two connections would else be the same. It may then be
        that of somebody who dialled the same and was not redirected. So of all sockets that dialled
        it and have not received more than the MTA has sent, none may be another user's. The client's
        is among them: one that was closed with nothing left to send would show at the MTA's end.
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

    def look_again(self, owner: ClientSocket) -> tuple[Any, int]:
        """Give the cookie of the MTA's end now, and what was read from it; None if it is closed."""
        mta_end = self.find(owner.mta_end, owner.client, owner.interface)
        return (mta_end.cookie, mta_end.read) if mta_end else (None, 0)

    def find(self, source: Endpoint, destination: Endpoint, interface: int = 0) -> Optional[Diag]:
        """Ask for one socket by both ends; None if there is none.

        One that is bound to a device is found under its index only, any other under each.
        """
        question = diag_request(source, destination, interface or LOOPBACK)
        try:
            diag = read_diag(self.ask(self.sock_diag, SOCK_DIAG_BY_FAMILY, question)[0])
        except FileNotFoundError:
            return None
        found = diag.source, diag.destination, diag.state in STATES
        return diag if found == (source, destination, True) else None  # it may offer a listener

    def find_on_any_device(self, source: Endpoint, destination: Endpoint) -> Optional[Diag]:
        """Look for one socket by both ends in the list; None if there is none, or several.

        Of those with the same ends, bound to a device or not, "find" sees one, whatever its state.
        """
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
        """Send one request; give the body of its answer, or of each for NLM_F_DUMP; OSError, as it says.

        It goes through ctypes, which keeps the interpreter's lock: the answer is there when send(2)
        returns, and to give the lock up costs several times as much under load.
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
        # The MTA asks about an accepted connection. This end has no inode, so it is of a later one.
        return unknown("reused")
    return ClientSocket(client_end.uid, "", client_end.inode, client_end.cgroup, mta_end.cookie,
                        mta_end.destination, mta_end.source, mta_end.interface, mta_end.read)


def whole_end(server: Optional[Endpoint], client: Endpoint,
              pairs: Callable[[], Iterable[Any]]) -> Optional[Endpoint]:
    """Give the MTA's end; where the MTA does not say all of it, the one that has this peer, or None.

    pairs: gives both ends of each socket.
    """
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
# ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING: a message may be under way
STATES = {1, 4, 5, 8, 9, 11}
ESTABLISHED, FIN_WAIT2 = 1, 5
STATES_MASK = sum(1 << state for state in STATES)
# struct inet_diag_req_v2: family, protocol, attributes, states, ports, addresses, device, cookie
DIAG_REQUEST = struct.Struct("=BBBxI2s2s16s16sIQ")
# struct inet_diag_msg: family, state, ports, addresses, device, cookie, bytes not read, uid, inode
DIAG = struct.Struct("=BB2x2s2s16s16sIQ4xI4xII")
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
TCP_INFO = struct.Struct("=128xQ64xQ")  # of struct tcp_info: bytes received (Linux 4.1), sent (4.19)


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
        size, kind = ATTRIBUTE.unpack_from(body, at)
        if kind == INET_DIAG_CGROUP_ID:
            cgroup = int.from_bytes(body[at + 4:at + size], sys.byteorder)
        elif kind == INET_DIAG_INFO:
            info = body[at + 4:at + size]
        at += max((size + 3) & ~3, 4)
    received, sent = TCP_INFO.unpack_from(info.ljust(TCP_INFO.size, b"\0"))
    if family == socket.AF_INET:
        near, far = near[:4], far[:4]
    elif near.startswith(b"\0" * 10 + b"\xff\xff"):  # v4-mapped, and so is the other end
        near, far = near[12:], far[12:]
    source = Endpoint(near, int.from_bytes(near_port, "big"))
    destination = Endpoint(far, int.from_bytes(far_port, "big"))
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
        return ClientSocket(holder.uids().effective, cookie=(client, pid), client=client,
                            mta_end=cast(Endpoint, server), process=holder)

    def look_again(self, owner: ClientSocket) -> tuple[Any, int]:
        """Look for the holder once more. What the MTA has read is not known: it counts as more."""
        return self.find_client_socket(owner.client, owner.mta_end).cookie, owner.mta_bytes_read + 1


Lookup = Union[KernelLookup, PsutilLookup]


def own_addresses() -> set[Any]:
    """Give the addresses of this host's interfaces."""
    return {ipaddress.ip_address(one.address.split("%")[0])
            for nics in psutil.net_if_addrs().values() for one in nics
            if one.family in (socket.AF_INET, socket.AF_INET6)}


def choose_lookup(what_was_dialled: Callable[[Diag], Union[Endpoint, str]]) -> tuple[Lookup, str]:
    """Try the kernel on a connection of our own; give what works, and what is wrong, or "".

    Where users have taken every port, the kernel is believed untried: they could keep the milter
    from starting. Raises OSError if there can be no connection for another reason.
    """
    if not LINUX:
        return PsutilLookup(), "there is no sock_diag here"
    try:
        lookup = KernelLookup(what_was_dialled)
        lookup.dump(1, 1)
        local = lookup.is_local(packed("127.0.0.1"))
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
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return sum(int(line.split()[2]) for line in file)
    except FileNotFoundError:  # a kernel without user namespaces
        return ALL_UIDS


def too_few_uids() -> str:
    """Say that this user namespace is of no use to us, or ""."""
    few = "this user namespace maps too few uids to tell users apart (PrivateUsers= in the unit?)"
    return few if mapped_uids() < ENOUGH_UIDS else ""


def why_not_root(port: int, facts: Facts) -> str:
    """Say why root must not be named for a socket that root made, or "".

    Root's programs leave sockets to processes of others, who can disconnect them and dial with
    them. A listener still has its server's port. Whoever has an accepted one is looked for by those
    who describe the process; "holder" says whether that is anyone but root.
    """
    # The ports that the kernel gives to clients by itself.
    low, high = map(int, read_file("/proc/sys/net/ipv4/ip_local_port_range").split())
    if not low <= port <= high:
        return "handed-down"
    if "holder" not in facts:
        return str(facts.get("why", "error"))
    return "" if facts["holder"] == 0 else "handed-down"


# --------------------------------------------------------- policy: who that is, and what he may do
class Waits(NamedTuple):
    """Seconds to wait for an answer."""

    new: float  # where there is none yet
    changed: float  # where there is one, to an older state of things
    old: float  # where there is one that is a minute old; for whoever asks first


SENDER_WAITS = Waits(FIRST_SECONDS, AGAIN_SECONDS, AGAIN_SECONDS)
LIST_WAITS = Waits(FIRST_SECONDS, FIRST_SECONDS, 0.0)


class Directory:
    """What the directory service (NSS) says, remembered. One thread asks it.

    Known things are answered from memory, and asked about anew behind the answer, once a minute and
    when a file of accounts changes. For something new the session that asks waits, and no other.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answers: dict[Any, tuple[Any, float, Any]] = {}  # with their time, and the state then
        self.asked: dict[Any, threading.Event] = {}
        self.questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def account(self, uid: int) -> Account:
        """Say who has a uid."""
        found, current = self.ask(look_up_account, uid, state_of_files(), SENDER_WAITS)
        account: Account = found or Account(uid, uid)
        if current:
            return account
        # NSS is silent: by his uid, his groups of before and /etc/subuid's name he can be blocked.
        return said_by_subuid(account._replace(name=None, answered=False))

    def ask(self, function: Callable[..., Any], key: Any, state: Any, waits: Waits) -> tuple[Any, bool]:
        """Give NSS's answer (None: none yet), and whether it is one to the state as it is.

        function is called with the key, with its last answer, and whether the state is another since.
        """
        question, now = (function, key), time.monotonic()
        answer, answered_at, state_then = self.answers.get(question, (None, now, None))
        fresh = state == state_then
        if fresh and now - answered_at < REFRESH_SECONDS:
            return answer, True
        wait = waits.old if fresh else waits.new if answer is None else waits.changed
        self._wait(question, state, wait, fresh)
        answer, _, latest = self.answers.get(question, (None, now, state_then))
        if latest not in (state, state_then):  # another had asked before the state changed
            return self.ask(function, key, state, waits)
        return answer, latest == state

    def _wait(self, question: Any, state: Any, wait: float, fresh: bool) -> None:
        with self.lock:
            is_first = question not in self.asked
            if is_first:
                self.asked[question] = threading.Event()
                self.questions.put((question, state))
            event = self.asked[question]
        make_room()
        in_time = event.wait(wait if is_first or not fresh else 0.0)
        if not in_time and not fresh and question[0] is look_up_account:
            complain("the directory service (NSS) is slow: users who are new here are given by number")
            with self.lock:  # nobody waits: a flood of uids that are new holds up no others
                self.asked.pop(question, None)

    def _work(self) -> None:
        while True:
            question, state = self.questions.get()
            event = self.asked.get(question)
            if event:  # else nobody waits any more
                self._answer(question, state)
                event.set()
                with self.lock:
                    self.asked.pop(question, event).set()  # whoever asked meanwhile

    def _answer(self, question: Any, state: Any) -> None:
        function, key = question
        last, _, state_then = self.answers.get(question, (None, 0.0, state))
        try:
            answer = function(key, last, state != state_then)
        except Exception as error:
            complain("the directory service (NSS) could not be asked", str(error))
            return
        remember(self.answers, question, (answer, time.monotonic(), state))


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


def look_up_account(uid: int, last: Optional[Account], changed: bool) -> Account:
    """Ask NSS for the account with a uid, or the one it is delegated to, and for its groups.

    last: what was answered before; changed: whether a file has changed since. Raises OSError,
    ValueError.
    """
    account, delegates = account_of(uid, uid), delegated_to(uid)
    if delegates and (account.name or len(delegates) > 1):
        return account._replace(why="error")
    if delegates:
        account = account_of_delegate(account, delegates[0])
    if last and last.name and (account.name is None or account.why):
        # NSS is down, or a file shows that the account is gone: neither unblocks its groups.
        return account._replace(gids=last.gids) if changed else last
    return account


def account_of_delegate(account: Account, delegate: str) -> Account:
    """Ask NSS for the account, by name or number, that a uid without an account is delegated to."""
    if delegate.isdigit():
        return account_of(account.kernel_uid, int(delegate))
    entry = account_by_name(delegate)
    if entry is None:
        return said_by_subuid(account._replace(answered=False))
    return account_of(account.kernel_uid, entry.pw_uid)


def account_of(kernel_uid: int, uid: int) -> Account:
    """Ask NSS for the account of a uid and its groups; without a name if there is none."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account(kernel_uid, uid, answered=True)
    gids = set(os.getgrouplist(entry.pw_name, entry.pw_gid))
    with contextlib.suppress(OSError), open("/etc/passwd", "rb") as file:  # a uid can have two names
        for name, gid in re.findall(rb"^([^:\n]+):[^:\n]*:%d:(\d+):" % uid, file.read(), re.MULTILINE):
            gids.update(os.getgrouplist(os.fsdecode(name), int(gid)))
    return Account(kernel_uid, uid, entry.pw_name, frozenset(gids), True)


def account_by_name(name: Any) -> Optional[pwd.struct_passwd]:
    """Ask NSS for the account of a name; None if there is none."""
    try:
        return pwd.getpwnam(name)
    except (KeyError, TypeError, ValueError):
        return None


def look_up_entry(entry: str, last: Optional[int]) -> Optional[int]:
    """Ask NSS for the uid of a name, or the gid of "@group"."""
    return look_up_group(entry[1:], last) if entry.startswith("@") else look_up_name(entry, last)


def look_up_name(name: str, last: Optional[int]) -> Optional[int]:
    """Ask NSS for the uid of a name; the last one, if a directory may be down."""
    entry = account_by_name(name)
    if entry or last is None:
        return entry.pw_uid if entry else None
    return last if account_of(last, last).name in (None, name) else None  # or is somebody else's now


def look_up_group(name: str, last: Optional[int]) -> Optional[int]:
    """Ask NSS for the gid of a group; if it does not find it, the last one."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return last


def delegated_to(uid: int) -> list[str]:
    """Give the users (names or numbers) a uid is delegated to; [] if to root only."""
    lowest, ranges = delegated_ranges(state_of("/etc/subuid"))
    if uid < lowest:
        return []
    delegates = sorted({name for first, count, name in ranges if first <= uid < first + count})
    return delegates if set(delegates) - {"root", "0"} else []


@functools.lru_cache(maxsize=1)
def delegated_ranges(state: Any) -> tuple[int, list[tuple[int, int, str]]]:
    """Read /etc/subuid (subuid(5)): the lowest uid; of each range the first uid, how many, the user.

    state: of the file when it was read.
    """
    text = ""
    if state:
        with open("/etc/subuid", encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    lines = re.findall(r"^\s*([^:\n]*):([0-9]+):([0-9]+)\s*$", text, re.MULTILINE)
    ranges = [(int(first), int(count), name) for name, first, count in lines]
    return min([first for first, _, _ in ranges], default=0), ranges


def said_by_subuid(account: Account) -> Account:
    """Add what /etc/subuid alone says of a uid: a name he may be blocked by, and no more."""
    with contextlib.suppress(OSError, ValueError):
        delegates = delegated_to(account.kernel_uid)
        if delegates:
            return account._replace(name=delegates[0] if len(delegates) == 1 else None, why="error")
    return account


class Entries(NamedTuple):
    """A list of users as it is at a moment."""

    uids: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    gids: frozenset[int] = frozenset()
    unresolved: frozenset[str] = frozenset()  # entries that NSS does not know


class UserList:
    """A setting and a file of users as one list."""

    def __init__(self, directory: Directory, setting: str, entries: list[Any],
                 path: Optional[str] = None, trusted_uid: int = 0) -> None:
        self.directory, self.setting, self.path, self.trusted_uid = directory, setting, path, trusted_uid
        self.fixed = [unquoted(entry) for entry in entries]
        self.listed, self.entries = self.fixed, Entries()
        self.lock, self.state, self.problem = threading.Lock(), None, ""
        self.made_of: Any = None
        self.warned: set[str] = set()

    def now(self) -> Entries:
        """Give the list as it is now.

        Where it or a file of accounts has changed, this waits for the names, 3 s at most.
        """
        with self.lock:
            if self.path:
                self._reread(self.path)
            if not self.listed:
                return Entries()
            state = state_of_files(), self.listed
            numbers, _ = self.directory.ask(self.look_up, None, state, LIST_WAITS)
            if self.made_of != (self.listed, numbers):
                self.made_of = self.listed, numbers
                self.entries = self._make(numbers or {})
            return self.entries

    def _make(self, numbers: dict[str, Optional[int]]) -> Entries:
        uids, names, gids, unresolved = set(), set(), set(), set()
        for entry in map(str, self.listed):
            number = int(entry) if entry.isdigit() else numbers.get(entry)
            if number is None:
                unresolved.add(entry)
            else:
                (gids if entry.startswith("@") else uids).add(number)
            if not entry.startswith("@"):
                names.add(entry)  # also digits: a user can be called that
        return Entries(frozenset(uids), frozenset(names), frozenset(gids), frozenset(unresolved))

    def look_up(self, _: None, last: Optional[dict[str, Optional[int]]], changed: bool) -> dict[str, Optional[int]]:
        """Ask NSS for the uid or gid of each name that is listed; None if it has none."""
        numbers: dict[str, Optional[int]] = {}
        for entry in map(str, self.listed):
            if not entry.isdigit():
                numbers[entry] = look_up_entry(entry, (last or {}).get(entry))
        for entry in [entry for entry, number in numbers.items() if number is None]:
            self.warn(entry, "is not found; it is looked for again every minute")
        return numbers

    def warn(self, entry: str, what: str) -> None:
        """Log something about an entry, once."""
        if entry not in self.warned:
            self.warned.add(entry)
            where = self.setting if entry in map(str, self.fixed) else self.path
            say(WARNING, f"{where}: {quote(entry)} {what}")

    def warn_of_doubles(self) -> None:
        """Say of digits in quotes that there is a user of that name, too."""
        for entry in self.listed[:MOST_WARNED]:
            if isinstance(entry, str) and entry.isdigit() and account_by_name(entry):
                self.warn(entry, "is a uid and also the name of a user; both are meant")

    def _reread(self, path: str) -> None:
        state, listed, problem = state_of(path), self.listed, ""
        if state and state == self.state:
            return
        try:
            listed = self.fixed + read_entries(path, self.trusted_uid)
        except (OSError, ValueError) as error:
            problem, state = str(error), state if isinstance(error, ValueError) else None
            if problem != self.problem:
                state_of_list = "cannot be read" if self.made_of is None else "the last good list stays in force"
                say(ERROR, f"{self.setting}_file: {state_of_list}: {quote(problem)}")
        # A file written in this very moment may change again without its time stamp telling.
        rested = state and abs(time.time() - state[-1] / 1e9) > 1
        self.state, self.problem = state if rested else None, problem
        if listed != self.listed:
            self.listed = listed


def is_listed(account: Account, entries: Entries) -> bool:
    """Tell whether a list has an account: by uid (also the kernel's), by name or by group."""
    return (not entries.uids.isdisjoint((account.uid, account.kernel_uid))
            or account.name in entries.names or not entries.gids.isdisjoint(account.gids))


def may_be_listed(account: Account, entries: Entries) -> bool:
    """Tell whether a list has an account, or may have it as NSS has not said who he is."""
    if is_listed(account, entries):
        return True
    unsaid = bool(entries.gids or entries.unresolved or (any(entries) and not account.answered))
    return unsaid and (account.name is None or not account.answered)


def refusal_of(account: Account, blocked: Entries, allowed: Optional[Entries]) -> Optional[Verdict]:
    """Refuse a user whom the lists do not let send, for now if NSS has not said; None: they do."""
    if is_listed(account, blocked):
        return refusal("blocked", account.name or account.uid)
    if allowed is None or is_listed(account, allowed):
        return None
    if may_be_listed(account, allowed):
        return unidentified("error", "tempfail")
    return refusal("not-allowed", account.name or account.uid)


def whole(value: Any) -> bool:
    """Tell whether it is a whole number that is not negative; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def entry_problems(entries: Iterable[Any]) -> Iterator[str]:
    """Say what is wrong with the entries of a list of users."""
    for entry in entries:
        number = int(entry) if isinstance(entry, str) and re.fullmatch("[0-9]{1,10}", entry) else entry
        is_uid = whole(number) and number < 1 << 32
        is_name = isinstance(entry, str) and ENTRY.fullmatch(entry) and not entry.isdigit()  # not "²"
        if not is_uid and not is_name:
            yield f"{entry!r} is not a user name, a numeric uid or \"@group\""


def unquoted(entry: Any) -> Any:
    r"""Give an entry that was pasted from the log, quoted and with \xNN, as it was."""
    if not isinstance(entry, str) or not re.fullmatch(r'@?"(?:[^"\\]|\\x[0-9a-f]{2})+(?<!\.\.\.)"', entry):
        return entry
    data = entry.replace('"', "").encode("utf-8", "surrogatepass")
    data = re.sub(rb"\\x(..)", lambda code: bytes([int(code[1], 16)]), data)
    return data.decode("utf-8", "surrogateescape")


def read_entries(path: str, trusted_uid: int) -> list[Any]:
    """Read a file of users, which root or that uid must own; OSError, ValueError."""
    entries = []
    for number, line in enumerate(read_trusted(path, trusted_uid).split("\n"), 1):
        entry = unquoted(re.sub(r'^(\s*@?"[^"]*")?([^#]*).*$', r"\1\2", line).strip())
        for problem in entry_problems([entry] if entry else []):
            raise ValueError(f"{path}, line {number}: {problem}")
        entries += [entry] if entry else []
    return entries


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


class Limits:
    """Recipients of each uid in the last hour, in steps of a minute."""

    def __init__(self, limits: dict[Any, Optional[int]]) -> None:
        self.everyone, self.lock = limits.get("*"), threading.Lock()
        self.counts: dict[int, dict[int, int]] = {}
        self.limits = {}
        for key, limit in limits.items():
            entry = account_by_name(key)
            if entry or whole(key):
                self.limits[entry.pw_uid if entry else key] = limit

    def used(self, uid: int, minute: int) -> int:
        """Count what a uid addressed in this minute and the sixty before: no hour is missed."""
        counts = self.counts.get(uid, {})
        for old in [then for then in counts if then < minute - 60]:
            del counts[old]
        return sum(counts.values())

    def verdict(self, account: Account, recipients: int) -> Optional[Verdict]:
        """Count a message, unless it is refused; None if its user is not over his limit."""
        limit, minute = self.limits.get(account.uid, self.everyone), int(time.monotonic() // 60)
        if limit is None:
            return None
        with self.lock:
            used = self.used(account.uid, minute)
            over = used + recipients > limit
            if not over or blocked_action not in REFUSALS:
                counts = self.counts.get(account.uid, {})
                counts[minute] = counts.get(minute, 0) + recipients
                remember(self.counts, account.uid, counts)
        name = quote(account.name or account.uid)
        if over:
            complain(f"user={name} is over the limit of {limit} recipients an hour", level=WARNING)
            action = "tempfail" if blocked_action in REFUSALS else blocked_action
            return Verdict(action, "limit", f"User {name} is over the limit of {limit} recipients an hour")
        if used < 0.8 * limit <= used + recipients:
            say(WARNING, f"user={name} has addressed {used + recipients} of {limit} recipients an hour")
        return None


def passed() -> Verdict:
    """Let a message through, tagged if a header is wanted."""
    return Verdict("tag" if header_fields else "pass")


def refusal(reason: str, user: Any) -> Verdict:
    """Do what blocked_action says."""
    return Verdict(blocked_action, reason, f"User {quote(user)} is blocked from sending mail")


def unidentified(why: str, accept: str = "accept") -> Verdict:
    """Do what unidentified_action says, but refuse nothing for good where the fault is ours.

    accept: what to do where it says that.
    """
    action = accept if unidentified_action == "accept" else unidentified_action
    if action == "accept":
        return passed()
    if action == "reject" and why in OUR_FAULTS:
        action = "tempfail"
    return Verdict(action, "unidentified", UNIDENTIFIED)


# ------------------------------------------------------- description: which process has the socket
# The helper is asked in this form, and with nothing else: number, kind, uid, inode, cgroup. It
# answers in JSON: the number, and facts about one process or an address and a port.
QUESTION = struct.Struct("=QBIQQ")
WHO_HAS, WHAT_WAS_DIALLED = 1, 2


class Describer:
    """Have processes described by whoever may see them: the helper, or else sudo lsof.

    The helper is asked one thing at a time. While an answer is overdue, nobody waits for it.
    """

    def __init__(self, channel: Optional[socket.socket], by_lsof: Optional[bool]) -> None:
        """Make one; by_lsof: whether sudo allows it; None: asked when the helper has ended."""
        self.channel, self.by_lsof = channel, by_lsof
        self.lock, self.number, self.owes, self.asked = threading.Lock(), 0, False, 0.0
        self.running: list[subprocess.Popen[bytes]] = []  # calls of lsof, also those past their time
        self.started = 0.0  # the last of them, on the monotonic clock
        if channel:
            threading.Thread(target=self._watch, args=(channel,), daemon=True).start()

    def describe(self, owner: ClientSocket) -> Facts:
        """Say which process has a socket, and what it is; {"why": word} if that is not known."""
        try:
            if owner.process:
                return describe_psutil(owner.process)
            if owner.inode == 0:
                return {"why": "gone"}
            if self.channel:
                return self._ask_helper(WHO_HAS, owner.uid or 0, owner.inode, owner.cgroup)
            return self._ask_lsof(owner) if self.by_lsof else {"why": "no-helper"}
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
        return str(facts["why"]) if facts.get("why") in ("busy", "timeout") else "redirected"

    def _ask_helper(self, kind: int, uid: int, inode: int, cgroup: int) -> Facts:
        deadline = time.monotonic() + HELPER_SECONDS
        if not self.lock.acquire(blocking=False):
            make_room()
            if not self.lock.acquire(timeout=HELPER_SECONDS):
                return {"why": "busy"}
        try:
            channel = self.channel
            if channel is None:
                return {"why": "no-helper"}
            # Whoever asked before gave up too early for this answer: it is waited for until it is overdue.
            if self.owes and self._receive(channel, min(deadline, self.asked + HELPER_SECONDS)) is None:
                return {"why": "timeout"}
            self.number, self.asked = self.number + 1, time.monotonic()
            channel.send(QUESTION.pack(self.number, kind, uid, inode, cgroup), socket.MSG_DONTWAIT)
            self.owes = True
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
                number, holder = facts.pop("number"), facts.get("holder", 0)
                if not whole(number) or not whole(holder) or holder >= 1 << 32:
                    raise ValueError
                if "address" in facts:
                    packed(facts["address"])
                    struct.pack("=H", facts["port"])
            except (ValueError, KeyError, TypeError, RecursionError, struct.error):
                complain("the helper gave an answer that is none")
                continue
            if number == self.number:  # else it was late
                self.owes = False
                return facts
        return None

    def _watch(self, channel: socket.socket) -> None:
        poll = select.poll()
        poll.register(channel, 0)  # nothing but its end
        poll.poll()
        self.channel = None
        self.by_lsof = lsof_allowed() if self.by_lsof is None else self.by_lsof
        programs = "come through lsof" if self.by_lsof else "and root stay unknown"
        say(ERROR, f"the helper has ended: users are still identified, programs {programs}; restart the milter")

    def _ask_lsof(self, owner: ClientSocket) -> Facts:
        processes = lsof_candidates(owner.uid)
        if not processes:  # an empty list would mean every process
            return {"why": "not-found"}
        if owner.uid == 0 and len(processes) > LSOF_PIDS:  # another holder may be among those left out
            return {"why": "busy"}
        arguments, deadline = lsof_arguments(list(processes)[:LSOF_PIDS]), time.monotonic() + LSOF_SECONDS
        make_room()
        lsof = self._start_lsof(arguments)
        # While the last call that was started may still end in time, there may be a place.
        while lsof is None and time.monotonic() < min(deadline, self.started + LSOF_SECONDS):
            time.sleep(0.01)
            lsof = self._start_lsof(arguments)
        return read_lsof(lsof, owner, processes) if lsof else {"why": "busy"}

    def _start_lsof(self, arguments: list[str]) -> Optional[subprocess.Popen[bytes]]:
        """Call lsof; None if as many calls as may be are under way."""
        with self.lock:
            self.running = [lsof for lsof in self.running if lsof.poll() is None]
            if len(self.running) == LSOF_PROCESSES:
                return None
            self.started, pipe = time.monotonic(), subprocess.PIPE
            self.running.append(subprocess.Popen(
                lsof_command + arguments, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, cwd="/",
                env={**os.environ, "LC_ALL": "C"}))
            return self.running[-1]


def fork_helper(user: Optional[pwd.struct_passwd]) -> socket.socket:
    """Fork the helper: the milter's uid, and the privilege it takes to see open files."""
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
        highest = max(map(int, os.listdir("/proc/self/fd" if LINUX else "/dev/fd")))
        os.closerange(far.fileno() + 1, 1 + highest)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it ends when the milter does
        if LINUX:
            LIBC.prctl(PR_SET_KEEPCAPS, 1)
        become(user)
        set_capabilities(CAPS_TO_SEE_OTHERS)
        if LINUX:
            LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the uid would forget this
        if os.getppid() == parent:
            serve(far, Finder(wanted_facts()))
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


def wanted_facts() -> tuple[str, ...]:
    """Give the fields that a setting asks for."""
    return tuple(field for field in FIELDS if field in header_fields or field in log_fields)


class BusyError(Exception):
    """A search has used up its budget."""


class Finder:
    """Find the process that has a socket open; runs in the helper, for one question at a time.

    Links read in /proc/PID/fd are the only evidence; memory only says where to look first.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self.wanted = tuple(wanted)
        self.recent: dict[int, list[int]] = {}  # by uid: processes that had a socket of his lately
        self.paused_until: dict[Any, float] = {}  # by user: a time on the monotonic clock
        self.cgroups = cgroup_mount()
        self.uid, self.target, self.cgroup = 0, "", 0  # of the socket that is looked for
        self.deadline, self.links, self.denied = 0.0, 0, False

    def answer(self, kind: int, uid: int, inode: int, cgroup: int) -> Facts:
        """Describe the process that has a socket, or say what an accepted one's client dialled.

        {"why": word} if that is not known.
        """
        now = time.monotonic()
        # Others may have crowded root's cgroup, so root pauses in that one only.
        payer = self.payer(uid) if uid else (uid, cgroup)
        if self.paused_until.get(payer, 0.0) > now:
            return {"why": "busy"}
        self.paused_until = {user: until for user, until in self.paused_until.items() if until > now}
        self.deadline, self.links, self.denied = now + SEARCH_SECONDS, SEARCH_LINKS, False
        processor_then = time.process_time()
        self.uid, self.target, self.cgroup = uid, f"socket:[{inode}]", cgroup
        try:
            for _ in range(3):  # what has it may end, or move it, and another may have it still
                found = self.find_holder()
                if found is None:
                    return {"why": "not-permitted" if self.denied else "not-found"}
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    return (self.dialled if kind == WHAT_WAS_DIALLED else self.describe)(*found)
        except BusyError:
            # Where the machine is slow, and not the search long, the user has not to pause for it.
            if self.links < 0 or time.process_time() - processor_then > SEARCH_SECONDS / 2:
                self.paused_until[payer] = time.monotonic() + PAUSE_SECONDS
            return {"why": "busy"}
        except (OSError, struct.error):
            pass
        return {"why": "gone"}

    def payer(self, uid: int) -> Any:
        """Give the user whose time a search costs: whoever has many uids delegated pays as one."""
        with contextlib.suppress(OSError, ValueError):
            return min(delegated_to(uid), default=uid)
        return uid

    def describe(self, pid: int, link: str) -> Facts:
        """Say what the process is that has the socket behind a link; OSError if it has it no more."""
        # What is read here is of one process, even if its number is given to another now.
        directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)
        try:
            if os.readlink(link, dir_fd=directory) != self.target:
                raise FileNotFoundError
            holder = os.fstat(directory).st_uid  # of one that has ended this is 0; what follows then fails
            facts = read_process(directory, self.wanted, link.rpartition("fd/")[0])
            if self.uid == 0:  # all its uids must be root's, and nobody else may have the socket, too
                holder = max(uids_of("status", directory)) or self.find_other_holder()
            return {"pid": pid, **facts, "holder": holder}
        finally:
            os.close(directory)

    def dialled(self, pid: int, link: str) -> Facts:
        """Say what the client of the accepted socket behind a link dialled; OSError as above."""
        with copy_of_socket(pid, int(os.path.basename(link))) as copy:
            if f"socket:[{os.fstat(copy.fileno()).st_ino}]" != self.target:
                raise FileNotFoundError  # the number of the process or descriptor is another's now
            return original_destination(copy)

    def find_holder(self) -> Optional[tuple[int, str]]:
        """Find a process that has the socket, and the link below its directory, or None."""
        recent = self.recent.get(self.uid, [])
        for pid, table in self.tables_by_likelihood(recent):
            link = self.link_to_target(pid, table)
            if link:
                remember(self.recent, self.uid, list(dict.fromkeys([pid] + recent))[:8])
                return pid, link
        return None

    def tables_by_likelihood(self, recent: list[int]) -> Iterator[tuple[int, str]]:
        """Give processes and, below their directories, descriptor tables; the user's own first."""
        own: dict[int, bool] = {}  # by pid: whether it is the user's
        sources = (lambda: recent, lambda: cgroup_pids(self.cgroups, self.cgroup), psutil.pids)
        for source in sources:
            for pid in source():
                if pid not in own:
                    self.charge(1)
                    own[pid] = owner_of(pid) == self.uid
                    if own[pid]:
                        yield pid, "fd"
        for pid in filter(own.get, own):
            yield from ((pid, table) for table in thread_tables(pid))
        yield from ((pid, "fd") for pid in own if not own[pid])

    def find_other_holder(self) -> int:
        """Give a uid other than root's that has root's socket, too; 0 if there is none.

        It is looked for in the socket's cgroup; where that is not known, everywhere.
        """
        for pid in cgroup_pids(self.cgroups, self.cgroup) or psutil.pids():
            try:
                uid = owner_of(pid) or max(uids_of(f"/proc/{pid}/status"))  # a setuid program's real one
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if uid and any(self.link_to_target(pid, table) for table in ["fd", *thread_tables(pid)]):
                return uid
        return 0

    def link_to_target(self, pid: int, table: str) -> Optional[str]:
        """Give the link to the socket in a descriptor table; None if none is to be seen."""
        try:
            directory = os.open(f"/proc/{pid}/{table}", os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:
            self.denied = True
            return None
        except (FileNotFoundError, ProcessLookupError):
            return None  # it has ended; what else goes wrong must not hide a holder
        try:
            if os.fstat(directory).st_size > self.links:  # how many there are, since Linux 6.2
                raise BusyError
            for descriptor in reversed(os.listdir(directory)):  # what was opened last stands last
                self.charge(1)
                try:
                    if os.readlink(descriptor, dir_fd=directory) == self.target:
                        return f"{table}/{descriptor}"
                except OSError:
                    pass  # closed meanwhile, or not to be seen
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
        finally:
            os.close(directory)
        return None

    def charge(self, links: int) -> None:
        """Take links off the budget of this search; BusyError if it is used up."""
        self.links -= links
        if self.links < 0 or time.monotonic() > self.deadline:
            raise BusyError


def owner_of(pid: int) -> Optional[int]:
    """Give the effective uid of a process; None if it has ended."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def uids_of(path: str, directory: Optional[int] = None) -> list[int]:
    """Give the real, effective and saved uid in /proc/PID/status; OSError."""
    uids = re.search(r"^Uid:\t(\d+)\t(\d+)\t(\d+)", read_file(path, directory), re.MULTILINE)
    if uids is None:
        raise FileNotFoundError
    return [int(uid) for uid in uids.groups()]


def thread_tables(pid: int) -> list[str]:
    """Give the tables of a process's other threads, which need not be its first one's."""
    threads: list[str] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        if os.stat(f"/proc/{pid}/task").st_nlink > 3:
            threads = os.listdir(f"/proc/{pid}/task")
    return [f"task/{thread}/fd" for thread in threads if thread != str(pid)]


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
    facts: Facts = {"pid": process.pid}
    if LINUX:
        directory = os.open(f"/proc/{process.pid}", os.O_PATH | os.O_DIRECTORY)
        try:
            facts.update(read_process(directory, set(wanted_facts()) - {"args"}))
        finally:
            os.close(directory)
    else:
        facts.update(program=process.name(), exe=process.exe(), dir=process.cwd())
    if not process.is_running():
        raise psutil.NoSuchProcess(process.pid)
    return facts


def unit_of(cgroups: str) -> Optional[str]:
    """Find the first .service or .scope in /proc/PID/cgroup; users make others below."""
    lines = [line for line in cgroups.split("\n") if re.match(r"0::|\d+:name=systemd:", line)]
    paths = [line.split(":", 2)[2] for line in lines]
    for part in "/".join(paths).split("/"):
        if part.endswith((".service", ".scope")):
            return part
    return next((path for path in paths if path.strip("/")), None)


def read_file(path: str, directory: Optional[int] = None) -> str:
    """Read a small file of the process table, its bytes kept as surrogates."""
    descriptor = os.open(path, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(descriptor, 65536).decode("utf-8", "surrogateescape")
    finally:
        os.close(descriptor)


def read_args(directory: int) -> Optional[str]:
    """Read a command line in a child that is killed when late; None if it was, or has none."""
    near, far = socket.socketpair()
    with near, far:
        child = os.fork()
        if child == 0:
            try:
                words = read_file("cmdline", directory)[:FACT_BYTES].replace("\0", " ")
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
            os.waitpid(child, 0)  # before Linux 5.3 one that hangs cannot be killed


def copy_of_socket(pid: int, descriptor: int) -> socket.socket:
    """Take a copy of a socket of a process (pidfd_getfd(2)); OSError, also before Linux 5.6."""
    pidfd = checked(LIBC.syscall(PIDFD_OPEN, pid, 0))
    try:
        return socket.socket(fileno=checked(LIBC.syscall(PIDFD_GETFD, pidfd, descriptor, 0)))
    finally:
        os.close(pidfd)


def original_destination(accepted: socket.socket) -> Facts:
    """Say what the client of an accepted socket dialled before a NAT rule changed it; OSError.

    Only what came in through lo was sent by this network namespace. Clients of another namespace
    can be given an address of this host, too, and have port and destination in common with a client
    that is here. The kernel notes the interface where multicast keeps its own.
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
    with contextlib.suppress(OSError), open("/proc/self/mounts", "rb") as mounts:
        for _, place, kind, *_ in map(bytes.split, mounts):
            with contextlib.suppress(OSError):  # in a directory closed to us, or below another mount
                if kind == b"cgroup2":
                    os.stat(os.path.join(place, b"cgroup.controllers"))
                    return os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    return None


def cgroup_pids(mount: Optional[int], cgroup: int) -> list[int]:
    """List the processes of a cgroup by its id (open_by_handle_at(2)); [] if that fails."""
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


def lsof_candidates(uid: Optional[int]) -> dict[int, psutil.Process]:
    """Give whom lsof is asked about, by pid: the owner's processes; for root's sockets all.

    They are held on to, so that another process that gets the number of one is noticed.
    """
    processes = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            if uid in (0, owner_of(pid)):
                processes[pid] = psutil.Process(pid)
    return processes


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
            # sudo passes TERM on; killed, it would leave lsof running. Others start with TERM blocked.
            lsof.send_signal(signal.SIGTERM if by_sudo else signal.SIGKILL)
        return {"why": "timeout"}
    holders = [pid for pid in lsof_holders(output, owner.inode) if pid in processes]
    if not holders:
        refused = re.search(rb"password is required|not allowed|may not run|sudoers|no new priv|account",
                            complaint)
        return {"why": "timeout" if lsof.returncode < 0 else "not-permitted" if refused else "not-found"}
    uids = [processes[pid].uids() for pid in holders]
    holder = max(map(max, uids)) if owner.uid == 0 else uids[0].effective  # a setuid program's real uid, too
    return {**describe_psutil(processes[holders[0]]), "holder": holder}


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


# --------------------------------------------------------------- settings: every rule in one place
def take_settings_file(values: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Override settings by those of settings_file; give where each stands, and what is wrong."""
    path, sources, problems = values["settings_file"], {}, []
    try:
        lines = settings_lines(path)
    except (OSError, ValueError) as error:
        return sources, [f"settings_file = {path!r}: {error}"]
    for where, line in lines:
        name, value, problem = read_setting(line)
        if not problem and name in sources:
            problem = f"is there twice, see {sources[name]}"
        if problem:
            problems.append(f"{where}: {shown(line)}: {problem}")
        else:
            values[name], sources[name] = value, where
    return sources, problems


def settings_lines(path: Any) -> list[tuple[str, str]]:
    """Read the lines of settings_file, each with where it stands; OSError, ValueError."""
    if path_problem(path):
        raise ValueError(path_problem(path))
    try:
        lines = read_trusted(path, os.geteuid()).split("\n") if path else []
    except FileNotFoundError:
        if os.path.lexists(path):  # a link that leads nowhere, perhaps in this unit only (ProtectHome=)
            raise
        return []
    return [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, 1)
            if re.match(r"\s*[^\s#]", line)]


def read_setting(line: str) -> tuple[str, Any, str]:
    """Read a line of settings_file, never executed; or say what is wrong."""
    name, equals, text = (part.strip() for part in line.partition("="))
    if not equals or name not in DEFAULTS or name == "settings_file":
        return name, None, "must be name = value, with the name of a setting (and not of this file)"
    try:
        value = ast.literal_eval(text)
        shown(value)  # ValueError if a number has too many digits to be written
        return name, value, ""
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return name, None, "must be a plain value on one line: a text, a number, None, a list or a mapping"


def settings_problems(values: dict[str, Any], sources: dict[str, str]) -> Iterator[str]:
    """Check all settings; yield a sentence a problem: where, setting, value, rule."""
    number = f"must be a whole number of seconds from 0 to {LONGEST_TIMEOUT}"
    name = "must be 1 to 76 printable ASCII characters, no blank, no colon (RFC 5322)"
    is_name = isinstance(values["header_name"], str) and re.fullmatch(r"[!-9;-~]{1,76}", values["header_name"])
    user = account_by_name(values["run_as_user"])
    problems = {
        "socketname": socket_problem(values["socketname"], user),
        "timeout": "" if whole(values["timeout"]) and values["timeout"] <= LONGEST_TIMEOUT else number,
        "run_as_user": user_problem(values["run_as_user"], user),
        "blocked_mailusers_file": file_problem(values["blocked_mailusers_file"], user),
        "blocked_action": choice_problem(values["blocked_action"], BLOCKED_ACTIONS),
        "unidentified_action": choice_problem(values["unidentified_action"], UNIDENTIFIED_ACTIONS),
        "header_name": "" if is_name else name,
        "header_fields": fields_problem(values["header_fields"]),
        "log_fields": fields_problem(values["log_fields"])}
    for setting, problem in [*problems.items(), *list_problems(values)]:
        where = f"{sources[setting]}: " if setting in sources else ""
        if problem:
            yield f"{where}{setting} = {shown(values[setting])}: {problem}"


def shown(value: Any) -> str:
    """Write a value as it stands in the settings, short enough for a line of the log."""
    text = repr(value)
    return text if len(text) <= 1000 else text[:1000] + "..."


def path_problem(path: Any) -> str:
    """Check a setting that is a path, or None."""
    well = path is None or re.fullmatch(r"/[^\0]*", str(path))
    return "" if well else "must be an absolute path, or None"


def socket_problem(path: Any, user: Optional[pwd.struct_passwd]) -> str:
    """Check the socket's path and directory."""
    if path_problem(path or "") or not path.isprintable() or len(os.fsencode(path)) > 107:
        return "must be an absolute path of at most 107 bytes, all printable"
    if "LISTEN_FDS" in os.environ:
        return ""  # the service manager has the socket
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        return f"there is no directory {directory}"
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        return "there is something at that path that is not a socket"
    if user is None or may_write(directory, user):
        return ""
    with contextlib.suppress(OSError):
        if is_served(path):  # it was made for this user, by the service manager
            return ""
    return f"user {user.pw_name} may not write to {directory}"


def may_write(directory: str, user: pwd.struct_passwd) -> bool:
    """Ask the kernel, in a child that becomes the user, whether he may make files in a directory."""
    child = os.fork()
    if child == 0:
        try:
            become(user)
            os._exit(not os.access(directory, os.W_OK | os.X_OK))
        finally:  # that the milter may not become the user is told elsewhere
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def user_problem(run_as: Any, user: Optional[pwd.struct_passwd]) -> str:
    """Check run_as_user."""
    if run_as is not None and user is None:
        return "there is no such user"
    if user and os.geteuid() not in (0, user.pw_uid):
        return f"started under uid {os.geteuid()}, which is neither root nor that user"
    return ""


def file_problem(path: Any, user: Optional[pwd.struct_passwd]) -> str:
    """Check the block list's file."""
    if path is None or path_problem(path):
        return path_problem(path)
    try:
        read_entries(path, user.pw_uid if user else os.geteuid())
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def choice_problem(value: Any, choices: tuple[str, ...]) -> str:
    """Check a setting that is one of several words."""
    return "" if value in choices else "must be one of " + ", ".join(map(repr, choices))


def fields_problem(fields: Any) -> str:
    """Check header_fields or log_fields."""
    if not isinstance(fields, list) or any(field not in FIELDS for field in fields):
        return "must be a list of " + ", ".join(FIELDS)
    return "names a field twice" if len(set(fields)) < len(fields) else ""


def list_problems(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the settings of which several parts can be wrong."""
    for name in "blocked_mailusers", "allowed_mailusers":
        if isinstance(values[name], list):
            yield from ((name, problem) for problem in entry_problems(map(unquoted, values[name])))
        elif values[name] is not None or name == "blocked_mailusers":
            yield name, 'must be a list, like ["bob"]'
    yield "lsof_command", command_problem(values["lsof_command"])
    yield from (("hourly_limits", problem) for problem in limits_problems(values["hourly_limits"]))


def command_problem(command: Any) -> str:
    """Check lsof_command."""
    well = isinstance(command, list) and all(isinstance(word, str) and word for word in command)
    return "" if well and "\0" not in "".join(command) else "must be a list of words, or []"


def limits_problems(limits: Any) -> Iterator[str]:
    """Check hourly_limits."""
    if not isinstance(limits, dict):
        yield 'must be like {"*": 200, "root": None}'
        return
    for key, limit in limits.items():
        if key != "*" and not whole(key) and account_by_name(key) is None:
            yield f"there is no user {key!r}"
        if limit is not None and not whole(limit):
            yield f"{key!r}: a limit is a whole number of recipients, or None"


# ---------------------------------------------------------------------------------------- --check
HELPER_CURE = "start the milter as root, or allow it both CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
LSOF_CURE = "install lsof, and the rule of sudoers.example; not needed where the milter is started as root"
KERNEL_CURE = "modprobe tcp_diag; in a unit, allow AF_NETLINK and set no PrivateUsers=; see README, Troubleshooting"
FAILED: list[str] = []  # what --check found that stops the milter


def report(what: str, problem: str = "", cure: str = "", fatal: bool = False) -> None:
    """Print one line of --check; problem: what is not well, or ""; cure: what to do."""
    if fatal:
        FAILED.append(what)
    state = "FAIL" if fatal else "warn" if problem else "ok  "
    print(f"{state}  {what}" + (f": {problem}" if problem else ""))
    if problem and cure:
        print(f"      -> {cure}")


def check(sources: dict[str, str], problems: list[str]) -> int:
    """Show on one screen whether this will work; give the exit status."""
    for problem in problems:
        report("setting", problem, fatal=True)
    if problems:
        return EX_CONFIG
    report("settings, and the socket's directory")
    for name, default in DEFAULTS.items():
        if globals()[name] != default:
            source = sources.get(name, "the script")
            print(f"      {name} = {globals()[name]!r}, from {source}; as delivered: {default!r}")
    check_postfix()
    try:
        check_lookups(account_by_name(run_as_user))
        delegated_to(0)  # now as the user the milter will be
        check_lists()
    except (OSError, ValueError) as error:
        cure = "allow CAP_SETUID and CAP_SETGID, and let that user read what the line names"
        report("as run_as_user", str(error), cure, True)
    return EX_CONFIG if FAILED else 0


def check_lists() -> None:
    """Look whether NSS knows all who are listed; OSError, ValueError if the file cannot be read."""
    listed = {"blocked_mailusers": blocked_mailusers, "allowed_mailusers": allowed_mailusers or []}
    if blocked_mailusers_file:
        listed[blocked_mailusers_file] = read_entries(blocked_mailusers_file, os.geteuid())
    for where, entries in listed.items():
        for entry in map(str, map(unquoted, entries)):
            if not entry.isdigit() and look_up_entry(entry, None) is None:
                report(f"{where}: {quote(entry)}", "is not found", "mend the name, unless it is to come")


def postconf(*arguments: str) -> tuple[list[str], str]:
    """Ask Postfix for its settings; give the lines, and what is wrong where it does not answer."""
    command = shutil.which("postconf", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")
    if command is None:
        return [], "postconf is not there to ask"
    try:
        ran = subprocess.run([command, *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                             timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    said = quote(ran.stderr.strip())
    return ran.stdout.decode("utf-8", "replace").splitlines(), f"postconf says {said}" if ran.returncode else ""


def check_postfix() -> None:
    """Look whether Postfix uses this socket, and lets no one here make up a client's address."""
    lines, problem = postconf("-x")
    if problem:
        report("Postfix", problem, "with Postfix, mend what it says; with Sendmail, see README, Sendmail")
        return
    settings = {}
    for line in lines + postconf("-Px")[0]:  # of services in master.cf, as SERVICE/TYPE/NAME
        name, _, value = line.partition(" = ")
        settings[name.strip()] = value.strip()
    check_smtpd_milters(settings)
    early = settings.get("smtpd_forbid_unauth_pipelining", "") not in ("", "no")
    report("Postfix: smtpd_forbid_unauth_pipelining", "" if early else "is off, or this Postfix does not have it",
           "postconf -e smtpd_forbid_unauth_pipelining=yes")
    for name, value in filter(all, settings.items()):
        check_clients(name, value, name.split("/")[-1])


def check_clients(name: str, value: str, kind: str) -> None:
    """Look whether a setting, of this kind, lets clients pass for others, or keeps them from us."""
    made_up = kind.endswith("_upstream_proxy_protocol") or (
        kind == "smtpd_authorized_xclient_hosts" and may_be_local(value))
    if made_up:
        report(f"Postfix: {name} = {value}", "users of this host can choose the client's endpoints",
               "allow it to addresses only that users of this host cannot have, on a port of its own")
    if kind == "smtpd_proxy_filter":
        report(f"Postfix: {name} = {value}", "milters see no message that comes in there",
               "give local clients a listener with content_filter instead; see README, Content filters")


def check_smtpd_milters(settings: dict[str, str]) -> None:
    """Look whether smtpd_milters names this socket, once, and so that a chrooted smtpd finds it."""
    spool, problem = settings.get("queue_directory", "/"), "it does not"
    for name, value in settings.items():
        if name.split("/")[-1] == "smtpd_milters":
            paths = re.findall(r"unix:([^\s,{}]+)", value)
            ours = [path for path in paths if os.path.join(spool, path) == socketname]
            problem = milters_problem(ours, spool) if ours else problem
    mapped = settings.get("smtpd_milter_maps") if problem == "it does not" else None
    line = f"smtpd_milters = {{ unix:{os.path.relpath(socketname, spool)}, default_action=accept }}"
    report("Postfix: smtpd_milters names this socket", problem,
           f"look whether smtpd_milter_maps does: {mapped}" if mapped else
           f"postconf -e '{line}', beside what is there now")


def milters_problem(paths: list[str], spool: str) -> str:
    """Say what is wrong with the way smtpd_milters names this socket, or ""."""
    if len(paths) > 1:
        return "twice"
    if paths[0].startswith("/") and any(map(is_chrooted_smtpd, postconf("-M")[0])):
        return f"by its whole path, but smtpd is chrooted to {spool} in master.cf"
    return ""


def is_chrooted_smtpd(service: str) -> bool:
    """Tell whether a line of master.cf is an smtpd in a chroot ("-": no, since Postfix 3.0)."""
    fields = service.split()
    return fields[7:8] == ["smtpd"] and fields[4] == "y"


def may_be_local(hosts: str) -> bool:
    """Tell whether a list of hosts can include this host; a table or a name can."""
    try:
        networks = [ipaddress.ip_network(re.sub(r"[\[\]]", "", word), strict=False)
                    for word in re.split(r"[\s,]+", hosts) if word]
    except ValueError:
        return True
    own = own_addresses() | {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")}
    return any(network.is_loopback or address in network for network in networks for address in own)


def check_lookups(user: Optional[pwd.struct_passwd]) -> None:
    """Try each way of looking up, in the uid the milter will have, on another user's connection."""
    lookup, problem = choose_lookup(lambda mta_end: "redirected")
    useless = too_few_uids() or not isinstance(lookup, KernelLookup)
    report("users: the kernel (sock_diag)", too_few_uids() or problem, KERNEL_CURE, bool(useless))
    if useless:
        return
    assert isinstance(lookup, KernelLookup)
    made = os.geteuid() == 0
    stranger = connection_made() if made else connection_found(lookup)
    privileged = os.geteuid() == 0 or sees_others()
    channel = fork_helper(user) if privileged else None
    become(user)
    set_capabilities(0)
    report("programs: cgroup v2, to find them as fast on a crowded machine as on an empty one",
           "" if cgroup_mount() is not None else "not mounted, all processes are searched",
           "with thousands of processes, mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")
    owner = check_owner(lookup, stranger, made)
    if channel is None:
        check_without_helper(owner)
    elif owner:
        check_program("programs: the helper", Describer(channel, False), owner, HELPER_CURE)


def check_without_helper(owner: Optional[ClientSocket]) -> None:
    """Try sudo lsof, and say what only the helper can do."""
    problem = why_no_lsof()
    if owner and not problem:
        check_program("programs: sudo lsof", Describer(None, True), owner, LSOF_CURE)
    else:
        report("programs: sudo lsof", problem, LSOF_CURE)
    report("programs: the helper", "not there; clients that a NAT rule redirects stay unknown, and so "
           "does root without sudo lsof", HELPER_CURE)


Stranger = Optional[tuple[Endpoint, Endpoint, int]]  # another user's connection: both ends, his uid


def check_owner(lookup: KernelLookup, stranger: Stranger, made: bool) -> Optional[ClientSocket]:
    """Find the owner of another user's connection, made for this or not; None if that fails."""
    if stranger is None:
        report("users and programs of others", "not tried, no other user has a connection now",
               "run this as root" + (", with CAP_SETUID" if os.geteuid() == 0 else ""))
        return None
    for _ in range(5):  # one that was found can end meanwhile
        began = time.perf_counter()
        owner = lookup.find_client_socket(*stranger[:2])
        took = (time.perf_counter() - began) * 1e6
        if owner.uid == stranger[2]:
            report(f"users: another user's connection, {took:.0f} us")
            return owner
        stranger = (None if made else connection_found(lookup)) or stranger
    found = "taken for another host's" if owner is REMOTE else owner.why or "wrong uid"
    report("users: another user's connection", f"not found ({found})",
           "run this again; in a unit or container, give it the host's network and users", fatal=made)
    return None


def check_program(way: str, describer: Describer, owner: ClientSocket, cure: str) -> None:
    """Find the program of a connection as the milter will."""
    began = time.perf_counter()
    facts = describer.describe(owner)
    took = (time.perf_counter() - began) * 1e6
    if "why" in facts:
        report(way, facts["why"], cure)
    else:
        report(f"{way}, {took:.0f} us: {quote(facts.get('program', facts.get('pid')))}")


def why_no_lsof() -> str:
    """Say why programs do not come through sudo lsof, or ""."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, IndexError):
        version = subprocess.run([lsof_command[0], "--version"], stdin=subprocess.DEVNULL, capture_output=True,
                                 timeout=5, check=False)
        if b"sudo-rs" in version.stdout + version.stderr:
            return "this is sudo-rs, which has no regular expressions: the rule never matches; start as root"
    return "" if lsof_allowed() else "not allowed"


def connection_found(lookup: KernelLookup) -> Stranger:
    """Give a connection that another user has to this host; None if there is none."""
    for diag in lookup.dump(0, 0):
        other = diag.inode and diag.uid not in (0, os.geteuid())
        if other and lookup.find(diag.destination, diag.source):
            return diag.source, diag.destination, diag.uid
    return None


def connection_made() -> Stranger:
    """Have a user connect to this process; None if it may not become another."""
    # In a container that does not map all uids, 65534 stands for the others.
    name = "nobody" if mapped_uids() == ALL_UIDS else "daemon"
    listener, (near, far) = socket.create_server(("127.0.0.1", 0)), os.pipe()
    if os.fork() == 0:
        try:
            become(pwd.getpwnam(name))
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
        listener.accept()[0].detach()  # one that is not accepted is nobody's, see client_socket
    listener.detach()
    return (endpoint("127.0.0.1", int(port)), server, pwd.getpwnam(name).pw_uid) if port else None


# ------------------------------------------------------------------------------- privilege, start
def set_capabilities(wanted: int) -> None:
    """Keep, of the capabilities this process has, only those of a mask; OSError."""
    mask = wanted & capabilities()
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    # struct __user_cap_data_struct: effective, permitted, inheritable; then the same above 31
    if LINUX and LIBC.capset(header, struct.pack("=6I", mask, mask, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def capabilities() -> int:
    """Give the permitted capabilities of this process as a mask; 0 where there are none to read."""
    status = read_file("/proc/self/status") if LINUX else ""
    match = re.search(r"^CapPrm:\s*([0-9a-f]+)", status, re.MULTILINE)
    return int(match.group(1), 16) if match else 0


def sees_others() -> bool:
    """Tell whether this process may see what files other users' processes have open."""
    return capabilities() & CAPS_TO_SEE_OTHERS == CAPS_TO_SEE_OTHERS


def become(user: Optional[pwd.struct_passwd]) -> None:
    """Drop groups, gid and uid for good; None: stay. RuntimeError if there is a way back."""
    if user is None or (os.geteuid() == user.pw_uid and user.pw_uid):
        return
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    if os.getresuid() != (user.pw_uid,) * 3 or os.getresgid() != (user.pw_gid,) * 3:
        raise RuntimeError("could not drop root for good")


def handed_over() -> str:
    """Give libmilter's name for the service manager's socket (sd_listen_fds(3)), or "".

    ValueError if what it hands over is not one listening unix socket for this process.
    """
    count, pid = os.environ.get("LISTEN_FDS"), os.environ.get("LISTEN_PID")
    if count is None and pid is None:
        return ""
    if pid != str(os.getpid()):
        raise ValueError(f"LISTEN_PID = {pid!r}: must be {os.getpid()}, this process, as the service manager sets it")
    if count != "1":
        raise ValueError(f"LISTEN_FDS = {count!r}: must be 1, from a socket unit with one ListenStream=")
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(HANDED_OVER)) as given:
        kind = given.family, given.type, given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if kind == (socket.AF_UNIX, socket.SOCK_STREAM, 1):
            return f"fd:{HANDED_OVER}"
    raise ValueError(f"descriptor {HANDED_OVER} of LISTEN_FDS: must be a unix stream socket that listens")


def start_problem() -> str:
    """Say why the milter cannot start here although its settings are well, or ""."""
    if too_few_uids():
        return too_few_uids()
    try:
        if handed_over() or not os.path.lexists(socketname):
            return ""
        if is_served(socketname):
            return f"another milter is already serving {socketname}"
        os.unlink(socketname)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{socketname}: {error}"
    return ""


def is_served(path: str) -> bool:
    """Tell whether somebody listens on a unix socket; OSError if that cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)  # one that does not accept is still there
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):  # left over, or none
            probe.connect(path)
            return True
    return False


def prepare(user: Optional[pwd.struct_passwd], lookup: Lookup) -> str:
    """Fork the helper, drop privilege, set up what sessions share; give the ways of looking up."""
    privileged = sees_others()
    by_lsof = None if os.geteuid() == 0 else lsof_allowed()
    channel = None if by_lsof and not privileged else fork_helper(user)
    become(user)
    if user:  # None is to stay as started: psutil needs the privilege where there is no sock_diag
        set_capabilities(0)
    # Threads begin below, and none may take these: the main thread waits for them, see "run".
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    programs = "the helper" if privileged else "sudo lsof" if channel is None else (
        "the helper without the privilege to see other users' processes")
    ways = f"version {VERSION}: users from {lookup.name}; programs through {programs}"
    say(INFO, ways)
    SysuserMilter.lookup, SysuserMilter.describer = lookup, Describer(channel, by_lsof)
    prepare_policy()
    return ways


def prepare_policy() -> None:
    """Set up the lists and limits that sessions share."""
    shared, lists = SysuserMilter, Directory()  # a long list must not hold up a sender
    shared.directory, shared.limits = Directory(), Limits(hourly_limits)
    shared.blocked = UserList(lists, "blocked_mailusers", blocked_mailusers, blocked_mailusers_file,
                              os.geteuid())
    if allowed_mailusers is not None:
        shared.allowed = UserList(lists, "allowed_mailusers", allowed_mailusers)
    for users in filter(None, (shared.blocked, shared.allowed)):
        users.now()
        users.warn_of_doubles()
    if shared.blocked.problem:  # root could read the file, run_as_user cannot
        end(EX_CONFIG)
    limited = blocked_mailusers or blocked_mailusers_file or hourly_limits or shared.allowed
    if limited and unidentified_action == "accept":
        say(WARNING, "unidentified_action is accept: a blocked user who arranges to be unknown is not refused")


def run() -> NoReturn:
    """Serve the MTA until told to stop."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    problem = start_problem()
    try:
        lookup, lack = choose_lookup(lambda mta_end: SysuserMilter.describer.what_was_dialled(mta_end))
    except OSError as error:  # it may pass: no reason to do without sock_diag until the next start
        problem = problem or f"a connection to 127.0.0.1, to try sock_diag on: {error}"
    if problem:
        say(ERROR, problem)
        end(EX_FAILED)
    if lack:
        holders = ": psutil is used, which names the holder of a socket for its owner"
        say(WARNING, lack + (holders if isinstance(lookup, PsutilLookup) else ""))
    if hasattr(LIBC, "mallopt"):  # glibc: else each thread has a heap of its own, and memory creeps up
        LIBC.mallopt(M_ARENA_MAX, 1)
    ways = prepare(account_by_name(run_as_user), lookup)
    os.umask(0o177)  # the socket's mode, as bind(2) takes it
    os.chdir("/")
    sys.excepthook = report_exception
    Milter.factory = SysuserMilter
    Milter.set_flags(Milter.ADDHDRS | Milter.CHGHDRS | Milter.QUARANTINE | Milter.SETSYMLIST)
    Milter.set_exception_policy(Milter.CONTINUE)  # what pymilter cannot decode goes on, unidentified
    address = handed_over() or "unix:" + socketname
    threading.Thread(target=serve_mta, args=(address,), daemon=True).start()
    threading.Thread(target=announce, args=(address, ways), daemon=True).start()
    told = signal.sigwait(STOP_SIGNALS)
    stop(EX_RESTART if told == signal.SIGHUP else 0)


def stop(status: int) -> NoReturn:
    """End as told, and take the socket away unless the service manager keeps it."""
    say(INFO, {EX_RESTART: "stopped, to be started again"}.get(status, "stopped"))
    if not handed_over():
        with contextlib.suppress(OSError):
            os.unlink(socketname)
    end(status)


def serve_mta(address: str) -> None:
    """Have libmilter serve sessions until it fails."""
    try:
        Milter.runmilter("milter_sysuser", address, timeout or LONGEST_TIMEOUT, rmsock=False)
    except Milter.error as error:
        cure = ": where libmilter does not take the service manager's socket, as Debian's does, " \
               "disable milter_sysuser.socket" if handed_over() else ""
        say(ERROR, f"{socketname}: {error}{cure}")
        end(EX_FAILED)
    stop(0)  # libmilter waits for the same signals, and had one before the main thread did


def announce(address: str, ways: str) -> None:
    """Tell the service manager that sessions can begin (sd_notify(3)), when they can."""
    with socket.socket(socket.AF_UNIX) as probe:
        while address.startswith("unix:") and probe.connect_ex(socketname):
            time.sleep(0.02)
    say(INFO, f"listening on {address.replace('unix:', '')}")
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.connect("\0" + name[1:] if name[0] == "@" else name)
                manager.send(f"READY=1\nSTATUS={ways}".encode())
        except OSError as error:
            say(ERROR, f"NOTIFY_SOCKET: {error}")


def end(status: int) -> NoReturn:
    """End at once: libmilter's own stop hangs under load (it destroys a mutex in use)."""
    if status == EX_CONFIG:
        with contextlib.suppress(ValueError, OSError):
            drop_waiting()
    os._exit(status)


def drop_waiting() -> None:
    """Let the MTA not wait on the service manager's socket until somebody mends the setting.

    Nobody can connect any more, and who has connected is dropped, until there is nobody: OSError.
    """
    if handed_over():
        given = socket.socket(fileno=HANDED_OVER)
        given.shutdown(socket.SHUT_RDWR)
        while True:
            given.accept()[0].close()


def main() -> int:
    """Read and check the settings, then do what the command line says."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tag local mail with the system user and program that sent it.\n"
                    f"Settings: in {settings_file}; the top of the script explains each.",
        epilog="example:\n  %(prog)s --check && systemctl restart milter_sysuser\n\nexit status:\n"
               "  0   told to stop (TERM, INT)\n"
               "  1   could not start or go on: the last line of the log says why\n"
               "  75  told to start again with the settings of now (HUP)\n"
               "  78  a wrong setting; or Python, pymilter or psutil is missing or too old")
    parser.add_argument("--check", action="store_true", help="check the settings and show what works here")
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args()
    for number in range(3):  # one that was closed must not become a socket of ours
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number
    log_target()  # now, while it may still be opened anew
    if MISSING:
        sys.stderr.write(f"milter_sysuser: {MISSING}: install pymilter 1.0.5 or newer and psutil "
                         "(Debian 12 or newer: python3-milter python3-psutil)\n")
        end(EX_CONFIG)
    sources, problems = take_settings_file(globals())
    problems += settings_problems(globals(), sources)
    if arguments.check:
        return check(sources, problems)
    for problem in problems:
        say(ERROR, problem)
    if problems:
        end(EX_CONFIG)
    run()


if __name__ == "__main__":
    sys.exit(main())
