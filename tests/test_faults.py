# SPDX-License-Identifier: MIT
"""Load and faults: whatever breaks, no mail is lost, doubled or wrongly named, and nothing leaks."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import subprocess
from typing import Any, Iterator, NamedTuple

import psutil
import pytest

import mta

USERS = [f"mst-load{n}" for n in range(1, 6)]
CONNECTIONS = 20  # of each user, at once
SUDOERS = pathlib.Path("/etc/sudoers.d/milter-sysuser-test")

# Send messages over many connections at once, to a number or (0) until standard input ends; print what became of each.
CLIENT = r'''
import collections, json, os, socket, sys, threading, time
port, name, connections, most, each, pause = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), float(sys.argv[6])
todo, sent, uncertain, deferred, times = collections.deque(), [], [], [], []
stop, lock, deadline, made = threading.Event(), threading.Lock(), time.monotonic() + 1800, 0
def more():
    """Give the next message's id, None if there is none."""
    global made
    with lock:
        if todo:
            return todo.popleft()
        if stop.is_set() or most and made == most:
            return None
        made += 1
        return "%s-%06d" % (name, made)
def session(ident):
    """Send messages, the first of them ident, over one connection; give the one it ended with unsent."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 60) as sock, sock.makefile("rb") as lines:
        def reply():
            while True:
                line = lines.readline()
                if not line:
                    raise EOFError
                if line[3:4] == b" ":
                    return line[:3].decode()
        def say(text, *wanted):
            sock.sendall(text.replace("\n", "\r\n").encode())
            return [reply() for _ in wanted] == list(wanted)
        try:
            if reply() != "220" or not say("EHLO load\n", "250"):
                return ident
            for _ in range(each):
                if not say("MAIL FROM:<%s@example.org>\nRCPT TO:<to@example.org>\nDATA\n" % name, "250", "250", "354"):
                    return ident
                try:
                    ok = say("Subject: %s\n\nbody\n.\n" % ident, "250")
                except (OSError, EOFError):
                    uncertain.append(ident)  # it may have been taken before the answer was lost
                    return None
                if not ok:
                    return ident
                sent.append(ident)
                times.append([ident, began, time.monotonic()])
                ident = more()
                if ident is None:
                    break
            else:
                return ident
            say("QUIT\n", "221")
        except (OSError, EOFError):
            return ident
def work():
    ident = more()
    while ident is not None and time.monotonic() < deadline:
        before = len(sent)
        try:
            left = session(ident)
        except OSError:
            left = ident  # Postfix is down
        if left == ident:
            deferred.append(ident)
            time.sleep(0.05)
        time.sleep(pause)
        ident = more() if left is None else left
    if ident is not None:
        deferred.append(ident + " never")
threads = [threading.Thread(target=work) for _ in range(connections)]
for thread in threads:
    thread.start()
if not most:
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
for thread in threads:
    thread.join()
print(json.dumps([sent, uncertain, deferred, times]), flush=True)
os._exit(0)
'''


class Row(NamedTuple):
    """What became of the messages of a load, by number."""

    sent: int  # that Postfix said it has taken
    uncertain: int  # whose connection was lost before the answer: may be there, once
    delivered: int
    tagged: int  # with the name or uid of the sender
    program: int  # of these, with the program known
    unnamed: int  # user=?
    untagged: int  # the milter was down
    wrong: int
    lost: int
    doubled: int  # taken twice
    again: int  # delivered again by a Postfix that was stopped before it could note the delivery


class Load:
    """Five users sending to a Postfix over a hundred connections at once.

    most  messages of each user; 0: until finish()
    each  messages in one connection
    pause seconds between two connections: while no milter delays it, a load without any takes both processors

    After finish(), .times has when each message's connection began and when it was taken (monotonic), by the message's
    name, and .untagged the names of those without a header.
    """

    def __init__(self, postfix: mta.Postfix, most: int = 0, each: int = 1, pause: float = 0) -> None:
        self.postfix, self.inbox = postfix, postfix.directory / "mail/inbox/new"
        postfix.forget_messages()
        self.times: dict[str, tuple[float, float]] = {}
        self.untagged: list[str] = []
        self.clients = [mta.as_user(user, [mta.PYTHON, "-c", CLIENT, *map(str, (
            postfix.port, user, CONNECTIONS, most, each, pause))]) for user in USERS]

    def delivered(self) -> int:
        """Count the messages delivered so far."""
        return len(os.listdir(self.inbox)) if self.inbox.exists() else 0

    def wait(self, more: int = 40, timeout: float = 60) -> None:
        """Wait until that many more messages were delivered."""
        goal = self.delivered() + more
        mta.wait_for(lambda: self.delivered() >= goal, timeout, f"{more} more messages")

    def queued(self) -> bool:
        """Say whether Postfix still has messages to deliver; they move from incoming to active.

        A file without the execute bit is none yet: its client has gone before the message was complete (qmgr(8)).
        """
        def complete(entry: os.DirEntry) -> bool:
            try:
                return bool(entry.stat().st_mode & 0o100)
            except FileNotFoundError:
                return False
        return any(complete(entry) for name in ("incoming", "active")
                   for entry in os.scandir(self.postfix.directory / "queue" / name))

    def finish(self, timeout: float = 900) -> Row:
        """Have the clients come to an end, wait for the last delivery, and count."""
        outcomes = [json.loads(client.communicate(timeout=1800)[0]) for client in self.clients]
        sent, uncertain, deferred, times = (sum(lists, []) for lists in zip(*outcomes))
        self.times = {ident: (began, taken) for ident, began, taken in times}
        assert not [ident for ident in deferred if ident.endswith("never")], deferred
        self.postfix.run("postqueue", "-f")  # a reload can lose qmgr's call to work, until it looks by itself (300 s)
        mta.wait_for(lambda: not self.queued(), timeout, "the last delivery")
        return self.count(sent, uncertain)

    def count(self, sent: list[str], uncertain: list[str]) -> Row:
        """Compare what was delivered with what was sent."""
        times: collections.Counter[str] = collections.Counter()
        kinds: collections.Counter[str] = collections.Counter()
        queue_ids: dict[str, set[str]] = collections.defaultdict(set)
        uids = {user: str(pwd.getpwnam(user).pw_uid) for user in USERS}
        for entry in os.scandir(self.inbox):
            with open(entry, encoding="ascii") as file:
                text = file.read()
            ident = re.search(r"^Subject: (\S+)$", text, re.M)[1]
            queue_ids[ident].add(re.search(r"\bid (\w+)", text)[1])
            tags = re.findall(r"^X-Sender-Process-Info: user=(\S+) program=(\S+)$", text, re.M)
            user = ident.rpartition("-")[0]
            times[ident] += 1
            if not tags:
                kinds["untagged"] += 1
                self.untagged.append(ident)
            elif len(tags) == 1 and tags[0][0] in (user, uids[user]) and tags[0][1] in ("python3", "?"):
                kinds["tagged"] += 1
                kinds["program"] += tags[0][1] != "?"
            else:
                kinds["unnamed" if [tag[0] for tag in tags] == ["?"] else "wrong"] += 1
        return Row(len(sent), len(uncertain), sum(times.values()), kinds["tagged"], kinds["program"], kinds["unnamed"],
                   kinds["untagged"], kinds["wrong"] + len(set(times) - set(sent) - set(uncertain)),
                   len(set(sent) - set(times)), sum(len(ids) - 1 for ids in queue_ids.values()),
                   sum(times.values()) - sum(map(len, queue_ids.values())))

    def stop(self) -> None:
        """End the clients, whatever they are at."""
        for client in self.clients:
            client.kill()
            client.communicate()


class Mail:
    """A Postfix, and a milter that can be exchanged for one with other options."""

    def __init__(self, postfix: mta.Postfix) -> None:
        self.postfix, self.milter = postfix, mta.Milter(postfix).start()

    def use(self, **options: Any) -> None:
        """Start the milter anew, with these options."""
        self.milter.kill()
        self.milter = mta.Milter(self.postfix, **options).start()

    def restart(self) -> None:
        """Start the milter anew as it was, as the service manager does."""
        self.milter.kill()
        self.milter.start()

    def complaints(self) -> str:
        """Give the lines of the milter's log that are not about a message."""
        return "\n".join(line for line in self.milter.lines() if "action=" not in line)

    def prlimit(self, limit: str) -> None:
        """Set a limit of the running milter."""
        subprocess.run(["prlimit", "--pid", str(self.milter.pid), limit], check=True, **mta.identity("postfix"))


# --- the faults: generators that prepare, break under load, mend under load, and clean up -----------------------------

Fault = Iterator[None]


def milter_killed(mail: Mail, path: pathlib.Path) -> Fault:
    """The milter is killed outright and started again."""
    yield
    mail.milter.kill()
    yield
    mail.milter.start()


def milter_terminated(mail: Mail, path: pathlib.Path) -> Fault:
    """The milter is told to stop, and started again."""
    yield
    assert mail.milter.stop() == 0
    yield
    mail.milter.start()


def helper_killed(mail: Mail, path: pathlib.Path) -> Fault:
    """The helper is killed; the milter goes on without."""
    yield
    os.kill(mail.milter.helper_pids()[0], signal.SIGKILL)
    mail.milter.wait_lines("the helper has ended")
    yield
    yield
    mail.restart()


def postfix_reloaded(mail: Mail, path: pathlib.Path) -> Fault:
    """Postfix reads its configuration again."""
    yield
    mail.postfix.reload()
    yield


def postfix_restarted(mail: Mail, path: pathlib.Path) -> Fault:
    """Postfix is stopped and started again."""
    yield
    mail.postfix.run("postfix", "stop")
    mail.postfix.start()
    yield


def sudo_lsof(mail: Mail, path: pathlib.Path) -> pathlib.Path:
    """Start the milter as postfix, with an lsof through sudo that hangs while there is the file given."""
    for program in "sudo", "lsof":
        if not shutil.which(program):
            pytest.skip(f"no {program} here")
    hang, lsof = path / "hang", path / "lsof"
    lsof.write_text(f'#!/bin/sh\n[ ! -e {hang} ] || exec sleep 4\nexec {shutil.which("lsof")} "$@"\n')
    lsof.chmod(0o755)
    SUDOERS.write_text("Defaults:postfix !mail_no_user, !mail_no_perms, !mail_badpass, !mail_always, !syslog\n"
                       f"postfix ALL=(root) NOPASSWD: {lsof}\n")
    SUDOERS.chmod(0o440)
    mail.use(user="postfix", lsof_command=["sudo", "-n", str(lsof)])
    return hang


def sudo_failing(mail: Mail, path: pathlib.Path) -> Fault:
    """Started as postfix, sudo's rule is taken away."""
    sudo_lsof(mail, path)
    yield
    SUDOERS.write_text(SUDOERS.read_text().splitlines()[0] + "\n")
    yield
    yield
    mail.use()


def lsof_hanging(mail: Mail, path: pathlib.Path) -> Fault:
    """Started as postfix, lsof hangs, as root: the milter may not kill it."""
    hang = sudo_lsof(mail, path)
    yield
    hang.touch()
    yield
    hang.unlink()
    yield
    mail.use()


def need_mounts() -> None:
    """Skip where a process cannot have mounts of its own."""
    if subprocess.run(["unshare", "--mount", "mount", "-t", "proc", "proc", "/proc"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here, as in most containers")


def hidepid(mail: Mail, path: pathlib.Path) -> Fault:
    """The /proc that the milter and its helper see is remounted with hidepid=2."""
    if missing := mta.missing_capabilities():
        pytest.skip(f"no {' and no '.join(missing)}: the milter's /proc cannot be changed")
    need_mounts()
    mail.use(prefix=["unshare", "--mount", "sh", "-c", 'mount -t proc proc /proc; exec "$@"', "sh"])
    yield
    assert os.stat(f"/proc/{mail.milter.pid}/root/proc").st_dev != os.stat("/proc").st_dev  # never the system's own
    subprocess.run(["nsenter", "-t", str(mail.milter.pid), "-m", "-r", "mount", "-o", "remount,hidepid=2", "/proc"],
                   check=True)
    yield
    yield
    mail.use()


def descriptors_used_up(mail: Mail, path: pathlib.Path) -> Fault:
    """The milter may not open any more files than it has."""
    yield
    mail.prlimit(f"--nofile={len(os.listdir(f'/proc/{mail.milter.pid}/fd'))}")
    yield
    mail.restart()


def processes_used_up(mail: Mail, path: pathlib.Path) -> Fault:
    """The milter may not make any more threads."""
    yield
    mail.prlimit("--nproc=1")
    yield
    mail.restart()


def disk_full(mail: Mail, path: pathlib.Path) -> Fault:
    """What the milter logs cannot be written."""
    mail.use(prefix=["sh", "-c", 'exec "$@" 2>/dev/full', "sh"])
    yield
    yield
    yield
    mail.use()


def directory_slow(mail: Mail, path: pathlib.Path) -> Fault:
    """Each question who has a uid takes 10 s."""
    from test_policy import SLOW, SWITCH
    if not shutil.which("gcc"):
        pytest.skip("no gcc: no directory service that is slow")
    need_mounts()
    (path / "nsswitch.conf").write_text("passwd: slow files\ngroup: files\n")
    (path / "slow.c").write_text(SLOW)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", path / "libnss_slow.so.2", path / "slow.c"], check=True)
    mail.use(prefix=["unshare", "--mount", "sh", "-c", f'{SWITCH} && exec "$@"', str(path)],
             env={"NSS_SLOW": str(path), "LD_LIBRARY_PATH": str(path)})
    (path / "slow").touch()
    yield
    yield
    (path / "slow").unlink()
    yield
    mail.use()


MILTER_IS_DOWN = {milter_killed, milter_terminated, descriptors_used_up, processes_used_up}  # untagged is all it may be
UNNAMED = {descriptors_used_up}  # the kernel cannot be asked without a descriptor
FAULTS = [milter_killed, milter_terminated, helper_killed, postfix_reloaded, postfix_restarted, sudo_failing,
          lsof_hanging, hidepid, descriptors_used_up, processes_used_up, disk_full, directory_slow]


# --- fixtures -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def senders(root: None) -> Iterator[None]:
    """Make the five users."""
    try:
        for user in USERS:
            mta.add_user(user)
        yield
    finally:
        for user in USERS:
            mta.remove_user(user)


@pytest.fixture(scope="module")
def shared(senders: None) -> Iterator[Mail]:
    """Start the Postfix of this module; its log goes to syslog, as postlogd can hang a Postfix reloaded under load."""
    with mta.Postfix(main_cf={"maillog_file": ""}) as postfix:
        mail = Mail(postfix)
        yield mail
        mail.milter.kill()


@pytest.fixture
def mail(shared: Mail) -> Mail:
    """Give Postfix and a milter that run, whatever the last test has left."""
    if shared.milter.process.poll() is not None or not shared.milter.accepts():
        shared.use()
    return shared


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, list[Row]]]:
    """Collect the counts of each load, and show them at the end."""
    rows: dict[str, list[Row]] = {}
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + " ".join([f"{'fault':20}", "times", *(f"{name:>9}" for name in Row._fields)]))
        for fault, found in rows.items():
            print(" ".join([f"{fault:20}", f"{len(found):5}", *(f"{sum(n):9}" for n in zip(*found))]))


@pytest.fixture
def scratch(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a directory that every user can enter; afterwards sudo's rule is gone."""
    for directory in tmp_path, *tmp_path.parents[:2]:
        directory.chmod(0o755)
    tmp_path.chmod(0o777)
    yield tmp_path
    SUDOERS.unlink(missing_ok=True)


def assert_all_well(row: Row) -> None:
    """Nothing lost, nothing doubled, nobody wrongly named."""
    assert (row.wrong, row.lost, row.doubled) == (0, 0, 0), row
    assert row.sent <= row.delivered - row.again <= row.sent + row.uncertain, row


# --- tests ----------------------------------------------------------------------------------------------------------

def test_a_hundred_connections_at_once_are_each_tagged_with_their_user(
        mail: Mail, table: dict[str, list[Row]], long: bool) -> None:
    """Five users; every message is delivered exactly once and names exactly its sender."""
    load = Load(mail.postfix, 20000 if long else 200, each=10)
    try:
        row = load.finish()
    finally:
        load.stop()
    table["none"] = [row]
    assert_all_well(row)
    assert row.sent == row.tagged == (100000 if long else 1000)
    assert row.program > 0 or not mta.can_see_others()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_mail_is_neither_lost_nor_doubled_nor_wrongly_named_by_a(
        fault: Any, mail: Mail, table: dict[str, list[Row]], scratch: pathlib.Path, long: bool) -> None:
    """Under load, with mail before, during and after the fault; the milter is itself again afterwards."""
    rows = table.setdefault(fault.__name__, [])
    for turn in range(20 if long else 1):
        steps = fault(mail, scratch)
        next(steps)  # prepare
        load = Load(mail.postfix)
        try:
            load.wait()
            next(steps)  # break
            load.wait()
            next(steps, None)  # mend
            load.wait(400 if long else 40)
            rows.append(load.finish())
            assert rows[-1].tagged > 0
            assert not mail.milter.lines("Traceback"), mail.complaints()
            next(steps, None)  # clean up
        finally:
            load.stop()
        assert_all_well(rows[-1])
        assert not rows[-1].untagged or fault in MILTER_IS_DOWN, rows[-1]
        assert not rows[-1].again or fault is postfix_restarted, rows[-1]
        assert not rows[-1].unnamed or fault in UNNAMED, rows[-1]
        after = Load(mail.postfix, 1)
        assert after.finish().tagged == len(USERS), mail.complaints()


def drop(milter: mta.Milter, listener: socket.socket, stage: int) -> None:
    """Connect as an MTA does for a client that exists, and hang up at a stage of the dialogue, from 0 to 10."""
    address, port = listener.getsockname()
    with socket.create_connection((address, port)) as client, listener.accept()[0]:
        if stage == 0:
            assert milter.accepts()
            return
        with mta.Wire(milter.socketname) as wire:
            steps = [lambda: wire.connect(*client.getsockname(), daemon_addr=address, daemon_port=str(port)),
                     wire.helo, wire.mail, wire.rcpt, wire.data, lambda: wire.header("Subject", "test"), wire.eoh,
                     wire.body, lambda: wire.send("E")]
            for step in steps[:stage - 1]:
                step()


def test_nothing_leaks_when_connections_are_dropped_at_every_stage(shared: Mail, long: bool) -> None:
    """After 2,000 (100,000) of them there are as many descriptors and threads as before, and no more memory."""
    shared.use()
    process = psutil.Process(shared.milter.pid)
    descriptors = process.num_fds()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for n in range(12000 if long else 550):  # until what is remembered is full
            drop(shared.milter, listener, n % 11)
        threads, memory = process.num_threads(), process.memory_info().rss
        for n in range(100000 if long else 2000):
            drop(shared.milter, listener, n % 11)
    mta.wait_for(lambda: process.num_fds() <= descriptors, 60, f"{descriptors} descriptors as before")  # a leak stays
    assert process.num_threads() <= threads + 4  # libmilter keeps some idle
    assert process.memory_info().rss - memory < 4 << 20
    assert not shared.milter.lines("a callback failed"), shared.complaints()


def test_a_fault_in_every_connection_is_one_line_and_then_a_count(make_milter: Any, tmp_path: pathlib.Path) -> None:
    """Here a client's name that is not UTF-8, which pymilter cannot take; the count comes after two seconds."""
    source, script = mta.SCRIPT.read_text(), tmp_path / "script.py"
    assert "COMPLAINT_SECONDS = 60" in source
    script.write_text(source.replace("COMPLAINT_SECONDS = 60", "COMPLAINT_SECONDS = 2"))
    milter = make_milter(script=script).start()

    def fail() -> None:
        with mta.Wire(milter.socketname) as wire:
            wire.connect("192.0.2.1", 4711, host=b"\xff")
    for _ in range(30):
        fail()
    assert milter.wait_lines("a callback failed")

    def again() -> list[str]:
        fail()
        return milter.lines("more before")
    counted = mta.wait_for(again, what="the count")
    assert int(re.search(r"\((\d+) more before\)", counted[0])[1]) > 1
    assert len(milter.lines("a callback failed")) <= 3
