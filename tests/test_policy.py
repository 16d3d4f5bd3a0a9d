# SPDX-License-Identifier: MIT
"""Who is stopped, and when: the block list and its file, the actions, the hourly limits, a directory that is down."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from typing import Any, Callable, Iterator, Optional

import pytest

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

GROUP = "mst-suspended"
STAYS = "the last good list stays in force"


# --- a message of any uid, through the milter protocol ----------------------------------------------------------

class Session:
    """A TCP connection that a uid made, announced to the milter: .send() passes a message through it."""

    def __init__(self, milter: mta.Milter, uid: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        os.seteuid(uid)  # the kernel notes the effective uid of whoever makes a socket
        try:
            self.client = socket.create_connection(self.listener.getsockname())
        finally:
            os.seteuid(0)
        self.server = self.listener.accept()[0]
        self.client.sendall(b"EHLO")
        self.wire = mta.Wire(milter.socketname)
        self.wire.connect(*self.client.getsockname(), daemon_addr="127.0.0.1",
                          daemon_port=str(self.listener.getsockname()[1]))
        self.server.recv(100)  # as an MTA does, after the milter has seen the client

    def send(self, recipients: int = 1, **message: Any) -> str:
        """Pass a message; give its header's value, or the reply that refused it."""
        replies = self.wire.message(recipients=["<to@example.org>"] * recipients, **message)
        assert replies[-1][0] in ("continue", "replycode"), replies
        return next((r[1] for r in replies if r[0] == "replycode"), None) or next(
            r[2] for r in replies if r[0] in ("addheader", "insheader"))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wire.sock.close()
        for sock in self.client, self.server, self.listener:
            sock.close()


def send(milter: mta.Milter, uid: int, recipients: int = 1, **message: Any) -> str:
    """Send one message as a uid; give its header's value, or the reply that refused it."""
    with Session(milter, uid) as session:
        return session.send(recipients, **message)


def refused(name: Any) -> str:
    """Give the reply that a blocked user gets."""
    return f"550 5.7.1 User {name} is blocked from sending mail"


def replace(path: pathlib.Path, data: "str | bytes", mode: int = 0o644) -> None:
    """Put a file in place by rename, as editors and mv do."""
    new = path.with_suffix(".new")
    new.write_bytes(data if isinstance(data, bytes) else data.encode())
    new.chmod(mode)
    new.rename(path)


@pytest.fixture
def place() -> Iterator[pathlib.Path]:
    """Make a directory that the milter's user may enter (pytest's own ones are root's)."""
    with tempfile.TemporaryDirectory(prefix="mst-place.") as name:
        pathlib.Path(name).chmod(0o755)
        yield pathlib.Path(name)


@pytest.fixture
def subuid() -> Iterator[pathlib.Path]:
    """Give /etc/subuid, to be written to; afterwards it is as it was."""
    path = pathlib.Path("/etc/subuid")
    before = path.read_bytes() if path.exists() else None
    mode = path.stat().st_mode if path.exists() else 0o644
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            replace(path, before, mode)


@pytest.fixture(scope="module")
def group(users: types.SimpleNamespace) -> Iterator[None]:
    """Make the group mst-suspended, with mst-bob in it."""
    run = dict(check=False, capture_output=True, env={"PATH": mta.SYSTEM_PATH})
    subprocess.run(["groupadd", "--force", GROUP], **run)
    subprocess.run(["usermod", "--append", "--groups", GROUP, "mst-bob"], **{**run, "check": True})
    yield
    subprocess.run(["groupdel", GROUP], **run)


# --- the file -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def listed(users: types.SimpleNamespace, group: None) -> Iterator[mta.Milter]:
    """Start a milter with a block list's file: .path."""
    milter = mta.Milter()
    milter.path = milter.directory / "blocked"
    milter.path.write_text("")
    milter.__init__(milter.directory, blocked_mailusers_file=str(milter.path), blocked_mailusers=["mst-nobody-yet"])
    milter.temporary = True
    with milter:
        yield milter


@pytest.fixture
def blocked_file(listed: mta.Milter) -> Iterator[pathlib.Path]:
    """Give the path of the block list's file, which is a good one that blocks nobody, now and afterwards."""
    def restore() -> None:
        if listed.path.is_dir() and not listed.path.is_symlink():
            listed.path.rmdir()
        replace(listed.path, "# nobody\n")
    restore()
    yield listed.path
    restore()


@pytest.mark.parametrize("line, entry", [
    ("adm#1", "adm#1"), ('"adm#1"', "adm#1"), ("adm#1 # a comment", "adm#1"), ('"a #b" #c', "a #b"), ('"#x"', "#x"),
    ("@adm#1", "@adm#1"), ("#adm", None), ("adm ##", "adm"), ("a##b", "a##b"), ("adm#", "adm")])
def test_a_hash_between_two_letters_is_the_names(line: str, entry: Optional[str], tmp_path: pathlib.Path) -> None:
    """Whoever is called adm is not blocked for whoever is called adm#1; quotes are as the log writes them."""
    path = tmp_path / "blocked"
    path.write_text(line + "\n")
    assert ms.read_entries(str(path), os.getuid()) == ([entry] if entry else [])


@pytest.mark.parametrize("line", ['"adm"1', '"adm" 1', 'adm"', '"adm', 'a"d"m', "9" * 5000])
def test_what_is_no_entry_of_a_list_is_said_with_its_line(line: str, tmp_path: pathlib.Path) -> None:
    """It is not taken for another one."""
    path = tmp_path / "blocked"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"blocked, line 1: .* is not a user name, a numeric uid or \"@group\""):
        ms.read_entries(str(path), os.getuid())


@pytest.mark.parametrize("line, who", [
    ("{alice.pw_name}", "alice"), ("{alice.pw_uid}", "alice"), ("@{alice.pw_name}", "alice"), ("@" + GROUP, "bob"),
    ("  {alice.pw_name}\t# hacked, ticket 4711", "alice"), ("{alice.pw_name}\r", "alice"),
    ("{alice.pw_name}# no blank", "alice"), ("{alice.pw_name}#", "alice"), ('"{alice.pw_name}" # quoted', "alice"),
    ('"{alice.pw_name}"#no blank', "alice"), ('@"' + GROUP + '"\t#', "bob")])
def test_the_file_holds_names_uids_groups_and_comments(line: str, who: str, listed: mta.Milter,
                                                       blocked_file: pathlib.Path,
                                                       users: types.SimpleNamespace) -> None:
    """The one it names is refused, the other is not."""
    replace(blocked_file, "# since Monday:\n\n" + line.format(**vars(users)) + "\n#mst-alice\n#mst-bob")
    other = users.bob if who == "alice" else users.alice
    assert send(listed, getattr(users, who).pw_uid) == refused(f"mst-{who}")
    assert send(listed, other.pw_uid).startswith(f"user={other.pw_name} ")


def test_a_change_counts_for_the_next_message_of_a_connection_that_is_open(
        listed: mta.Milter, blocked_file: pathlib.Path, users: types.SimpleNamespace) -> None:
    """Renamed into place, appended to, written over: each time the very next message."""
    with Session(listed, users.alice.pw_uid) as session:
        for turn in range(10):
            replace(blocked_file, f"mst-bob\nmst-alice  # {turn}\n")
            assert session.send() == refused("mst-alice")
            blocked_file.write_text("mst-bob\n")
            assert session.send().startswith("user=mst-alice ")
            with blocked_file.open("a") as file:
                file.write("mst-alice\n")
            assert session.send() == refused("mst-alice")
            blocked_file.write_text("mst-bob\nmst-alicf\n")  # same size, same inode
            assert session.send().startswith("user=mst-alice ")


def test_a_change_that_keeps_size_and_times_counts(root: None, tmp_path: pathlib.Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that cp -p and rsync -t set back is not what tells a change, nor the inode."""
    path = tmp_path / "blocked"
    monkeypatch.setattr(ms.time, "time", lambda real=ms.time.time: real() + 10)  # it has rested for 10 s
    block_list, before = ms.UserList(ms.Directory(), "blocked_mailusers", [], str(path)), 0
    for name in "mst-alice", "mst-alicf", "mst-alice":
        while not path.exists() or path.stat().st_ctime_ns == before:  # until the file system's clock has ticked
            path.write_text(name)
            os.utime(path, (1e9, 1e9))
        before = path.stat().st_ctime_ns
        assert block_list.now().names == {name}


def test_a_file_that_has_not_changed_is_not_read_again(root: None, tmp_path: pathlib.Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """One stat(2) a message is all it costs, also where its time lies in the future."""
    path, read = tmp_path / "blocked", []
    path.write_text("mst-alice\n")
    os.utime(path, (1e10, 1e10))
    monkeypatch.setattr(ms, "read_entries", lambda *a, real=ms.read_entries: read.append(a) or real(*a))
    monkeypatch.setattr(ms.time, "time", lambda real=ms.time.time: real() + 10)  # it has rested for 10 s
    block_list = ms.UserList(ms.Directory(), "blocked_mailusers", [], str(path))
    for _ in range(20):
        assert "mst-alice" in block_list.now().names
    assert len(read) == 1


def missing(path: pathlib.Path) -> None:
    """Remove it."""
    path.unlink()


def unreadable(path: pathlib.Path) -> None:
    """Let root alone read it."""
    replace(path, "mst-bob\n", 0o600)


def contains(data: bytes) -> Callable[[pathlib.Path], None]:
    """Put that into it."""
    return lambda path: replace(path, b"mst-bob\n" + data)


def fifo(path: pathlib.Path) -> None:
    """Make it a FIFO: opening one waits for a writer."""
    path.unlink()
    os.mkfifo(path, 0o644)


def symlink_to_fifo(path: pathlib.Path) -> None:
    """Make it a symbolic link to a FIFO."""
    target = path.with_suffix(".fifo")
    target.unlink(missing_ok=True)
    os.mkfifo(target, 0o644)
    path.unlink()
    path.symlink_to(target)


def a_directory(path: pathlib.Path) -> None:
    """Make it a directory."""
    path.unlink()
    path.mkdir()


def foreign(path: pathlib.Path) -> None:
    """Let it belong to a user who may not say who sends mail."""
    replace(path, "mst-bob\n")
    os.chown(path, pwd.getpwnam("mst-bob").pw_uid, -1)


def writable(mode: int) -> Callable[[pathlib.Path], None]:
    """Let others write to it."""
    return lambda path: replace(path, "mst-bob\n", mode)


WRONG = {
    "missing": missing, "unreadable": unreadable, "not UTF-8": contains(b"mst-\xff\n"), "NUL": contains(b"mst\0alice\n"),
    "a tab inside": contains(b"mst\talice\n"), "quotes that do not end": contains(b'"mst-alice\n'), "a Unicode blank": contains("mst\u2003alice\n".encode()),
    "a Unicode line end": contains("mst\u2028alice\n".encode()), "a colon": contains(b"mst:alice\n"),
    "a number that is none": contains("\u00b2\n".encode()), "a number too long": contains(b"1" * 5000 + b"\n"),
    "FIFO": fifo, "link to a FIFO": symlink_to_fifo, "directory": a_directory, "foreign": foreign,
    "group-writable": writable(0o664), "world-writable": writable(0o646), "oversized": contains(b"#" * (1 << 20)),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_file_gone_wrong_keeps_the_last_good_list_whole_and_says_so_once(
        why: str, listed: mta.Milter, blocked_file: pathlib.Path, users: types.SimpleNamespace) -> None:
    """Who was blocked stays so, nobody else is, and a repair counts at once."""
    replace(blocked_file, "mst-alice\n")
    said = len(listed.lines(STAYS))
    assert send(listed, users.alice.pw_uid) == refused("mst-alice")
    assert len(listed.lines(STAYS)) == said
    WRONG[why](blocked_file)
    for _ in range(3):
        assert send(listed, users.alice.pw_uid) == refused("mst-alice")
        assert send(listed, users.bob.pw_uid).startswith("user=mst-bob ")
    assert len(listed.lines(STAYS)) == said + 1, listed.log()
    if blocked_file.is_dir():
        blocked_file.rmdir()
    replace(blocked_file, "mst-bob\n")
    assert send(listed, users.alice.pw_uid).startswith("user=mst-alice ")
    assert send(listed, users.bob.pw_uid) == refused("mst-bob")


@pytest.mark.parametrize("why", [why for why in WRONG if why != "unreadable"])
def test_a_file_that_is_wrong_at_start_is_a_settings_problem(why: str, tmp_path: pathlib.Path,
                                                             users: types.SimpleNamespace) -> None:
    """The problem is said, in one line that names the setting and the file."""
    path = tmp_path / "blocked"
    path.write_text("")
    WRONG[why](path)
    values = {**vars(ms), "socketname": str(tmp_path / "sock")}
    values["blocked_mailusers_file"] = str(path)
    said = [problem for problem in ms.settings_problems(values, {}) if problem.startswith("blocked_mailusers_file")]
    assert len(said) == 1 and "\n" not in said[0] and str(path) in said[0]


@pytest.mark.parametrize("why", ["missing", "unreadable"])
def test_a_file_that_the_milter_cannot_read_ends_it_with_78(why: str, make_milter: Callable, place: pathlib.Path) -> None:
    """Root's sight of it does not count: the milter rereads it as run_as_user."""
    path = place / "blocked"
    path.write_text("mst-bob\n")
    WRONG[why](path)
    milter = make_milter(blocked_mailusers_file=str(path))
    milter.start(wait=False)
    mta.wait_for(lambda: milter.process.poll() is not None or milter.lines("listening"), what="its end")
    assert milter.process.poll() == 78, milter.log()
    assert "blocked_mailusers_file" in milter.log()


def test_a_list_that_cannot_be_looked_up_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands as it was written."""
    said: list[str] = []
    monkeypatch.setattr(ms, "complain", lambda *words: said.append(" ".join(words)))
    monkeypatch.setattr(ms.pwd, "getpwnam", lambda name: 1 // 0)
    now = ms.UserList(ms.Directory(), "blocked_mailusers", [1001, "bob"]).now()
    assert said[0].startswith("the directory service (NSS) could not be asked ") and "zero" in said[0]
    assert now.uids == {1001} and now.names == {"1001", "bob"}


def test_an_entry_that_is_not_found_is_said(listed: mta.Milter, blocked_file: pathlib.Path,
                                            users: types.SimpleNamespace) -> None:
    """A ban with a slip of the pen is not a silent one."""
    replace(blocked_file, "mst-alcie\n")
    send(listed, users.alice.pw_uid)
    listed.wait_lines("mst-alcie")


def test_a_list_of_the_largest_size_holds_nobody_up(root: None, tmp_path: pathlib.Path) -> None:
    """A hundred thousand uids are one list in less than the time that a connection waits for its description."""
    path = tmp_path / "blocked"
    path.write_text("".join(f"{uid}\n" for uid in range(100000, 240000)))
    block_list = ms.UserList(ms.Directory(), "blocked_mailusers", [], str(path))
    spent = ms.time.thread_time()
    assert 239999 in block_list.now().uids
    assert ms.time.thread_time() - spent < 3  # CPU time of one thread; quadratic code takes minutes


def test_a_change_that_could_not_be_read_at_once_is_read_later(root: None, tmp_path: pathlib.Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for want of a descriptor, at a time when the file is not so new that it is read again anyway."""
    path = tmp_path / "blocked"
    path.write_text("1001\n")
    block_list = ms.UserList(ms.Directory(), "blocked_mailusers", [], str(path))
    assert block_list.now().uids == {1001}
    replace(path, "1001\n1002\n")
    later, read = time.time() + 10, ms.read_entries
    monkeypatch.setattr(ms.time, "time", lambda: later)
    errors = iter([OSError(errno.EMFILE, "Too many open files")])

    def read_entries(*arguments: Any) -> Any:
        for error in errors:
            raise error
        return read(*arguments)
    monkeypatch.setattr(ms, "read_entries", read_entries)
    assert block_list.now().uids == {1001}
    assert block_list.now().uids == {1001, 1002}


def test_changes_while_the_directory_hangs_are_not_undone_when_it_answers(root: None, tmp_path: pathlib.Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: what counts is the last one."""
    path, go = tmp_path / "blocked", threading.Event()
    path.write_text("mst-0\n")
    monkeypatch.setattr(ms, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(ms, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(ms.pwd, "getpwnam", lambda name, real=pwd.getpwnam: go.wait(30) and real(name))
    directory = ms.Directory()
    block_list = ms.UserList(directory, "blocked_mailusers", [], str(path))
    for number in range(6):
        replace(path, f"mst-{number}\n")
        assert block_list.now().names == {f"mst-{number}"}
    go.set()
    mta.wait_for(lambda: not directory.asked, what="the last answer")
    assert block_list.now().names == {"mst-5"}


# --- the actions --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def postfix(root: None) -> Iterator[mta.Postfix]:
    """Start a Postfix for milters with different actions."""
    with mta.Postfix() as instance:
        yield instance


@pytest.mark.parametrize("action, reply", [("reject", "550 5.7.1"), ("tempfail", "450 4.7.1")])
def test_a_blocked_user_is_refused_with_his_name(action: str, reply: str, postfix: mta.Postfix,
                                                 users: types.SimpleNamespace) -> None:
    """The reply says who, for good or for now; the next user's mail is delivered."""
    postfix.forget_messages()
    with mta.Milter(postfix, blocked_mailusers=["mst-bob"], blocked_action=action) as milter:
        said = mta.run_as("mst-bob", mta.smtp(postfix.port)).stdout
        assert f"{reply} User mst-bob is blocked from sending mail" in said.splitlines()
        assert mta.run_as("mst-alice", mta.smtp(postfix.port)).returncode == 0
        assert postfix.wait_messages(1)[0]["X-Sender-Process-Info"].startswith("user=mst-alice ")
        assert f"action={action} reason=blocked" in milter.wait_lines("user=mst-bob")[0]
    assert len(postfix.messages()) == 1


def test_quarantine_puts_a_blocked_users_mail_on_hold(postfix: mta.Postfix, users: types.SimpleNamespace) -> None:
    """It is in the hold queue as postqueue shows it, tagged; released, it is delivered with its header."""
    postfix.forget_messages()
    with mta.Milter(postfix, blocked_mailusers=["mst-bob"], blocked_action="quarantine") as milter:
        assert mta.run_as("mst-bob", mta.smtp(postfix.port)).returncode == 0
        queued = mta.wait_for(postfix.postqueue, what="the message in the queue")
        line = milter.wait_lines("user=mst-bob")[0]
        assert [message["queue_name"] for message in queued] == ["hold"]
        assert f" {queued[0]['queue_id']}: client=" in line and "action=quarantine reason=blocked" in line
        assert f"{queued[0]['queue_id']}!" in postfix.run("postqueue", "-p").stdout
        assert "User mst-bob is blocked from sending mail" in postfix.log()
    assert postfix.run("postsuper", "-H", queued[0]["queue_id"]).returncode == 0
    postfix.run("postqueue", "-f")
    assert postfix.wait_messages(1)[0]["X-Sender-Process-Info"].startswith("user=mst-bob ")


def test_log_is_a_dry_run(postfix: mta.Postfix, users: types.SimpleNamespace) -> None:
    """The mail is tagged and delivered, and the log says what would have been done."""
    postfix.forget_messages()
    with mta.Milter(postfix, blocked_mailusers=["mst-bob"], blocked_action="log") as milter:
        assert mta.run_as("mst-bob", mta.smtp(postfix.port)).returncode == 0
        assert postfix.wait_messages(1)[0]["X-Sender-Process-Info"].startswith("user=mst-bob ")
        assert "action=log reason=blocked" in milter.wait_lines("user=mst-bob")[0]


# --- who alone may send -------------------------------------------------------------------------------------------

def replies_to(milter: mta.Milter, uid: int) -> list[tuple]:
    """Send one message as a uid; give all replies at its end."""
    with Session(milter, uid) as session:
        return session.wire.message()


def unknown(milter: mta.Milter) -> list[tuple]:
    """Send one message of a client whose owner is unknown, as it has gone; give the replies at its end."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address, port = gone.getsockname()[:2], listener.getsockname()[1]
        gone.close()
        with mta.Wire(milter.socketname) as wire:
            wire.connect(*address, daemon_addr="127.0.0.1", daemon_port=str(port))
            return wire.message()


@pytest.fixture(scope="module")
def allowing(users: types.SimpleNamespace, group: None) -> Iterator[mta.Milter]:
    """Start a milter that lets mst-alice, the uids 60600 to 60602 and mst-suspended send, and blocks some of these."""
    milter = mta.Milter()
    milter.path = milter.directory / "blocked"
    milter.path.write_text("60602\n")
    milter.__init__(milter.directory, allowed_mailusers=["mst-alice", 60600, "60601", "60602", "@" + GROUP],
                    blocked_mailusers=[60601, 60699], blocked_mailusers_file=str(milter.path))
    milter.temporary = True
    with milter:
        yield milter


@pytest.mark.parametrize("who", ["alice", "bob", 60600])
def test_who_is_allowed_by_name_uid_or_group_sends(who: Any, allowing: mta.Milter,
                                                   users: types.SimpleNamespace) -> None:
    """Tagged as ever."""
    uid = who if isinstance(who, int) else getattr(users, who).pw_uid
    assert send(allowing, uid).startswith(f"user={who if isinstance(who, int) else f'mst-{who}'} ")


@pytest.mark.parametrize("name", ["nobody", "root"])
def test_everyone_else_is_refused_as_if_blocked(name: str, allowing: mta.Milter) -> None:
    """Root, too; the log says that it is for want of an entry."""
    assert send(allowing, pwd.getpwnam(name).pw_uid) == refused(name)
    assert " action=reject reason=not-allowed" in allowing.wait_lines(f" user={name} ")[-1]


def test_a_uid_without_an_account_is_refused_for_now_where_a_group_is_allowed(allowing: mta.Milter) -> None:
    """It may be of a directory that is down, and in the group."""
    assert send(allowing, 60603) == f"450 4.7.1 {ms.UNIDENTIFIED}"
    assert " action=tempfail reason=unidentified" in allowing.wait_lines(" user=60603 ")[-1]


@pytest.mark.parametrize("uid", [60601, 60602, 60699])
def test_who_is_blocked_is_so_although_he_is_allowed(uid: int, allowing: mta.Milter) -> None:
    """By the setting or by the file; of both reasons, this is the one that is logged."""
    assert send(allowing, uid) == refused(uid)
    assert " action=reject reason=blocked" in allowing.wait_lines(f" user={uid} ")[-1]


def test_the_file_of_blocked_users_is_reread_for_those_allowed(allowing: mta.Milter,
                                                               users: types.SimpleNamespace) -> None:
    """Whoever is struck from it sends again."""
    replace(allowing.path, "mst-alice\n")
    assert send(allowing, users.alice.pw_uid) == refused("mst-alice")
    assert send(allowing, 60602).startswith("user=60602 ")
    replace(allowing.path, "60602\n")
    assert send(allowing, users.alice.pw_uid).startswith("user=mst-alice ")


@pytest.mark.parametrize("action, last, logged", [
    ("accept", ("continue",), "action=tag"), ("quarantine", ("continue",), "action=quarantine reason=unidentified"),
    ("tempfail", ("replycode", f"450 4.7.1 {ms.UNIDENTIFIED}"), "action=tempfail reason=unidentified"),
    ("reject", ("replycode", f"550 5.7.1 {ms.UNIDENTIFIED}"), "action=reject reason=unidentified")])
def test_an_unknown_owner_is_not_everyone_else(action: str, last: tuple, logged: str, make_milter: Callable) -> None:
    """What becomes of him is for unidentified_action to say; where that is accept, the log warns at start."""
    milter = make_milter(allowed_mailusers=["root"], unidentified_action=action).start()
    assert unknown(milter)[-1] == last
    assert " user=? " in milter.wait_lines(logged)[0]
    assert len(milter.lines("WARNING unidentified_action is accept")) == (action == "accept")


@pytest.mark.parametrize("action", ["tempfail", "quarantine", "log"])
def test_not_allowed_follows_the_action_for_blocked_users(action: str, make_milter: Callable) -> None:
    """Refused for now, held, or passed and said."""
    milter = make_milter(allowed_mailusers=["root"], blocked_action=action).start()
    replies = replies_to(milter, 60604)
    text = "User 60604 is blocked from sending mail"
    kinds = [reply[0] for reply in replies]
    assert kinds == {"tempfail": ["replycode"], "quarantine": ["quarantine", "addheader", "continue"],
                     "log": ["addheader", "continue"]}[action]
    assert action == "log" or text in replies[0][1]
    assert action != "tempfail" or replies == [("replycode", f"450 4.7.1 {text}")]
    assert f" action={action} reason=not-allowed" in milter.wait_lines("user=60604")[0]


def test_an_empty_list_of_allowed_users_allows_nobody(make_milter: Callable, users: types.SimpleNamespace) -> None:
    """Of this host: mail from others is not its business."""
    milter = make_milter(allowed_mailusers=[]).start()
    for name, uid in ("root", 0), ("mst-alice", users.alice.pw_uid), (60605, 60605):
        assert send(milter, uid) == refused(name)
    with mta.Wire(milter.socketname) as wire:
        wire.connect("192.0.2.9", 1)
        assert wire.message() == [("continue",)]


def test_an_allowed_user_who_does_not_exist_is_a_warning(make_milter: Callable) -> None:
    """It names the setting."""
    make_milter(allowed_mailusers=["root", "mst-no-such-user"]).start().wait_lines(
        "WARNING allowed_mailusers: mst-no-such-user is not found")


@pytest.mark.parametrize("unidentified_action", ["accept", "reject"])
@pytest.mark.parametrize("name", [None, "mst-eve"], ids=["uid", "delegated"])
def test_whoever_may_turn_out_to_be_allowed_is_refused_for_now_only(name: Any, unidentified_action: str,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """His own uid or one that was delegated to him, as long as NSS has not said what groups he is in."""
    monkeypatch.setattr(ms, "unidentified_action", unidentified_action)
    milter = ms.SysuserMilter()
    milter.owner = ms.ClientSocket(700000007, "", 1)
    milter.blocked = types.SimpleNamespace(now=ms.Entries)
    milter.allowed = types.SimpleNamespace(now=lambda: ms.Entries(gids=frozenset([42500])))
    account = ms.Account(700000007, 700000007, name, doubt="error" if name else "")
    verdict = milter.judge(ms.Sender(None, "error", {}, account) if name else ms.Sender(account, ""))
    assert (verdict.action, verdict.reason) == ("tempfail", "unidentified")
    said = account._replace(name="mst-eve", answered=True, doubt="")
    assert milter.judge(ms.Sender(said, "")).reason == "not-allowed"
    milter.limits = ms.Limits({}, {})
    assert milter.judge(ms.Sender(said._replace(gids=frozenset([42500])), "")).action == "tag"


# --- the limits ---------------------------------------------------------------------------------------------------

def over(name: Any, limit: int) -> str:
    """Give the reply that a user over the limit gets."""
    return f"450 4.7.1 User {name} is over the limit of {limit} recipients an hour"


@pytest.fixture(scope="module")
def limited(users: types.SimpleNamespace) -> Iterator[mta.Milter]:
    """Start a milter with limits: 10 for mst-alice, none for mst-bob and 60500, 5 for everyone else."""
    with mta.Milter(hourly_limits={"*": 5, "mst-alice": 10, "mst-bob": None, 60500: None, 60501: 0}) as milter:
        yield milter


def test_a_limit_counts_recipients_and_not_what_it_refuses(limited: mta.Milter, users: types.SimpleNamespace) -> None:
    """By name: 7 of 10, then 4 are too many, 3 still pass, and then nothing does."""
    uid = users.alice.pw_uid
    assert send(limited, uid, 7).startswith("user=mst-alice ")
    for _ in range(3):
        assert send(limited, uid, 4) == over("mst-alice", 10)
    assert not limited.lines("user=mst-alice has addressed")
    assert send(limited, uid, 3).startswith("user=mst-alice ")
    assert send(limited, uid) == over("mst-alice", 10)
    assert "rcpts=1 action=tempfail reason=limit" in limited.wait_lines("user=mst-alice", 6)[-1]


@pytest.mark.parametrize("uid", [60400, 60401])
def test_the_star_is_for_each_user_who_is_not_named(uid: int, limited: mta.Milter) -> None:
    """Each has a count of his own; one without a name is given by number."""
    assert send(limited, uid, 5).startswith(f"user={uid} ")
    assert send(limited, uid) == over(uid, 5)


@pytest.mark.parametrize("uid", [0, 1])
def test_none_is_no_limit_and_nought_is_nothing(uid: int, limited: mta.Milter, users: types.SimpleNamespace) -> None:
    """None exempts from "*", by name and by number."""
    who = (users.bob.pw_uid, 60500)[uid]
    with Session(limited, who) as session:
        assert all(session.send(20).startswith("user=") for _ in range(3))
    assert send(limited, 60501) == over(60501, 0)


def test_a_warning_is_logged_once_at_four_fifths(limited: mta.Milter) -> None:
    """Before it is too late, and not for every message from there on."""
    with Session(limited, 60402) as session:
        for count, warned in (3, 0), (1, 1), (1, 1), (1, 1):
            session.send(count)
            assert len(limited.lines("WARNING user=60402 has addressed 4 of 5 recipients an hour")) == warned


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Collect what is logged, with its level; nothing was complained about before."""
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(ms, "say", lambda level, text: lines.append((level, text)))
    monkeypatch.setattr(ms, "COMPLAINTS", {})
    return lines


def test_refusals_for_a_limit_are_a_warning_at_once_and_then_a_count_a_minute(
        said: list[tuple[int, str]], clock: types.SimpleNamespace) -> None:
    """Each user's for himself: the first is said, the others are counted."""
    limits, alice, bob = ms.Limits({"*": 10}, {}), ms.Account(1001, 1001, "alice"), ms.Account(1002, 1002)
    over = "user=%s is over the limit of 10 recipients an hour"
    for count, warned in (7, []), (1, ["user=alice has addressed 8 of 10 recipients an hour"]), (2, []):
        said.clear()
        assert limits.verdict(alice, count) is None
        assert said == [(ms.WARNING, text) for text in warned]
    said.clear()
    for second in range(120):
        assert limits.verdict(alice, 1).reason == "limit"
        if second in (10, 20):
            assert limits.verdict(bob, 11).reason == "limit"
        clock.now += 1
    assert said == [(ms.WARNING, text) for text in (over % "alice", over % 1002, over % "alice" + " (59 more before)")]
    said.clear()
    clock.now += 60
    assert limits.verdict(bob, 11).reason == "limit"
    assert said == [(ms.WARNING, over % 1002 + " (1 more before)")]


@pytest.mark.parametrize("limit, counts, warned", [
    (5, [3, 1, 1], [4]), (5, [4, 1], [4]), (5, [5], [5]), (1, [1], [1]), (100, [79, 1, 20], [80]), (100, [79, 2], [81]),
    (0, [0], []), (3, [2, 1], [3])])
def test_the_warning_comes_when_four_fifths_are_reached(limit: int, counts: list[int], warned: list[int],
                                                        said: list[tuple[int, str]]) -> None:
    """Once, with what has been addressed by then."""
    limits = ms.Limits({"*": limit}, {})
    assert [limits.verdict(ms.Account(1001, 1001), count) for count in counts] == [None] * len(counts)
    assert said == [(ms.WARNING, f"user=1001 has addressed {used} of {limit} recipients an hour") for used in warned]


def test_journalctl_finds_the_warnings_by_their_level(make_milter: Callable) -> None:
    """At four fifths and at the refusal; the messages' own lines have another level."""
    with make_milter(hourly_limits={"*": 5}, journal=True) as milter:
        send(milter, 60406, 4)
        for _ in range(3):
            assert send(milter, 60406, 2) == over(60406, 5)
        milter.wait_lines("action=", 4)
        assert [line for line in milter.lines("<4>") if "unidentified_action" not in line] == [
            "<4>user=60406 has addressed 4 of 5 recipients an hour",
            "<4>user=60406 is over the limit of 5 recipients an hour"]
        assert all(line.startswith("<6>") for line in milter.lines("action="))


def test_many_connections_have_one_limit(limited: mta.Milter) -> None:
    """Twelve messages whose ends arrive together, on as many connections, have five recipients between them."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(limited, 60403)) for _ in range(12)]
        answers: list[str] = []
        threads = [threading.Thread(target=lambda s=s: answers.append(s.send())) for s in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == sorted([over(60403, 5)] * 7 + [a for a in answers if a.startswith("user=60403 ")])


@pytest.mark.parametrize("action", ["quarantine", "log", "tempfail"])
def test_over_the_limit_follows_the_action(action: str, make_milter: Callable, users: types.SimpleNamespace) -> None:
    """Held or passed, it counts on and carries its header; refused, it is for now even where that is for good."""
    with make_milter(hourly_limits={"*": 2}, blocked_action=action) as milter:
        with Session(milter, users.bob.pw_uid) as session:
            session.send(2)
            for _ in range(2):
                replies = session.wire.message()
                kinds = [reply[0] for reply in replies]
                assert ("quarantine" in kinds, "addheader" in kinds) == (action == "quarantine", action != "tempfail")
        said = [re.search(r" action=(\w+(?: reason=\w+)?)", line)[1] for line in milter.wait_lines("action=", 3)]
        assert said == ["tag"] + [f"{action} reason=limit"] * 2


def test_a_delegated_uid_has_no_limit_of_its_own(limited: mta.Milter, subuid: pathlib.Path) -> None:
    """What a user sends under a uid of his /etc/subuid range counts as his."""
    subuid.write_text("60404:700000000:65536\n")
    assert send(limited, 700000007, 4).startswith("user=60404 ")
    assert send(limited, 700000008, 2) == over(60404, 5)


def test_what_is_delegated_to_root_is_nobody_elses(make_milter: Callable, users: types.SimpleNamespace,
                                                   subuid: pathlib.Path) -> None:
    """As for LXD, whose containers may have an account's uid, too: root can take any."""
    subuid.write_text(f"root:{users.alice.pw_uid}:1\nroot:700000000:65536\n0:{users.bob.pw_uid}:1\n"
                      "mst-bob:700000100:1\n")
    with make_milter(blocked_mailusers=["root"]) as milter:
        assert send(milter, users.alice.pw_uid).startswith("user=mst-alice ")
        assert send(milter, users.bob.pw_uid).startswith("user=mst-bob ")
        assert send(milter, 700000001).startswith("user=700000001 ")
    with make_milter() as milter:  # whether it is root's or the user's, nobody can tell
        assert send(milter, 700000100) == "user=? program=?"


def test_in_a_container_users_are_named_and_blocked_but_for_who_stands_for_others(
        make_milter: Callable, container: Callable, users: types.SimpleNamespace) -> None:
    """An unprivileged one: nobody's uid is also what the kernel gives for every uid of the host that is not the container's."""
    milter = make_milter(blocked_mailusers=["mst-bob", 65534], **container(65536)).start()
    assert send(milter, 100000 + users.alice.pw_uid).startswith("user=mst-alice ")
    assert send(milter, 100000 + users.bob.pw_uid) == refused("mst-bob")
    for uid in 100000 + 65534, users.alice.pw_uid:
        assert send(milter, uid) == "user=? program=?"
    assert len(milter.wait_lines("lookup=error", 2)) == 2
    assert not milter.lines("ERROR")


def test_in_a_container_with_few_users_it_does_not_start(make_milter: Callable, container: Callable) -> None:
    """It would not tell them apart."""
    milter = make_milter(**container(65535))
    assert milter.run() == ms.EX_FAILED
    (line,) = milter.lines()
    assert "ERROR this user namespace maps too few uids to tell users apart" in line


def test_a_flood_of_users_does_not_push_the_block_list_out_of_memory(
        group: None, make_milter: Callable, users: types.SimpleNamespace, tmp_path: pathlib.Path) -> None:
    """Who has many uids delegated can be many; the group of the list is asked for again as well."""
    script = tmp_path / "forgets.py"
    source, most = mta.SCRIPT.read_text(), "MOST_REMEMBERED = 10_000"
    assert most in source
    script.write_text(source.replace(most, "MOST_REMEMBERED = 5"))
    milter = make_milter(script=script, blocked_mailusers=["@" + GROUP]).start()
    assert send(milter, users.bob.pw_uid) == refused("mst-bob")
    for uid in range(60400, 60410):
        assert send(milter, uid).startswith(f"user={uid} ")
    assert send(milter, users.bob.pw_uid) == refused("mst-bob")


@pytest.mark.parametrize("said_at", ["closed", "open"])
def test_a_delegated_uid_is_blocked_by_its_number(said_at: str) -> None:
    """Whether the owner is to be believed in the end or not: the number in the list is what the kernel said."""
    milter = ms.SysuserMilter()
    milter.owner = ms.ClientSocket(700000007, "", 1)
    milter.blocked = types.SimpleNamespace(now=lambda: ms.Entries(frozenset([700000007])))
    account = ms.Account(700000007, 60404, "alice", frozenset([60404]), True)
    sender = ms.Sender(account, "") if said_at == "open" else ms.Sender(None, "closed", {}, account)
    assert milter.judge(sender).reason == "blocked"


def test_delegations_that_cannot_be_read_are_said(make_milter: Callable, subuid: pathlib.Path) -> None:
    """Nobody knows then whose a uid is: users are given by number, the log and --check say why."""
    subuid.touch()
    subuid.chmod(0o600)
    with make_milter() as milter:
        assert send(milter, 60405).startswith("user=60405 ")
        milter.wait_lines("ERROR the directory service (NSS) could not be asked: \"[Errno 13] Permission denied: '/etc/subuid'\"")
    check = make_milter(args=["--check"])
    assert check.run() == ms.EX_CONFIG
    assert re.search("^FAIL  start as run_as_user: .*Permission denied.*/etc/subuid", check.log(), re.M)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Give a clock to turn: .now, in seconds."""
    clock = types.SimpleNamespace(now=5000.0 * 60)
    monkeypatch.setattr(ms.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize("offset", [0, 1, 30, 59.9])
def test_no_period_of_an_hour_has_more_than_the_limit(offset: float, clock: types.SimpleNamespace) -> None:
    """One recipient a minute with a limit of 30: never more than 30 in any hour, and it goes on afterwards."""
    limits, passed = ms.Limits({"*": 30}, {}), []
    clock.now += offset
    for _ in range(300):
        if limits.verdict(ms.Account(1001, 1001), 1) is None:
            passed.append(clock.now)
        clock.now += 47
    assert max(sum(1 for other in passed if then <= other < then + 3600) for then in passed) == 30
    assert len(passed) > 90


def test_memory_for_limits_is_bounded_and_the_longest_silent_goes(clock: types.SimpleNamespace,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends a message a minute is not forgotten however many others there are."""
    monkeypatch.setattr(ms, "blocked_action", "log")
    limits = ms.Limits({"*": 1000}, {})
    for uid in range(30000):
        clock.now += 0.1
        assert limits.verdict(ms.Account(uid, 100000 + uid), 1) is None
        if uid % 600 == 0:
            assert limits.verdict(ms.Account(7, 7), 1) is None
    assert len(limits.counts) <= 2 * ms.MOST_REMEMBERED
    assert limits.used(7, 60) == 50 and limits.used(100000, 60) == 0
    for _ in range(100000):
        clock.now += 7
        limits.verdict(ms.Account(7, 7), 1)
    assert len(limits.counts[7, 60]) <= 62


# --- a directory that is slow or down -----------------------------------------------------------------------------

SLOW = r'''
#include <errno.h>
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Note the question in $NSS_SLOW/log; wait up to 30 s while there is a file $NSS_SLOW/slow or slow-WHAT; fail if there
   is one named fail-WHAT. */
static enum nss_status slow(const char *what, const char *name) {
    char path[4096], own[4096];
    snprintf(path, sizeof path, "%s/log", getenv("NSS_SLOW"));
    FILE *log = fopen(path, "a");
    if (log) { fprintf(log, "begin %s %s\n", what, name); fclose(log); }
    snprintf(path, sizeof path, "%s/slow", getenv("NSS_SLOW"));
    snprintf(own, sizeof own, "%s/slow-%s", getenv("NSS_SLOW"), what);
    for (int i = 0; i < 3000 && (access(path, F_OK) == 0 || access(own, F_OK) == 0); i++) usleep(10000);
    snprintf(path, sizeof path, "%s/log", getenv("NSS_SLOW"));
    if ((log = fopen(path, "a"))) { fprintf(log, "end %s %s\n", what, name); fclose(log); }
    snprintf(own, sizeof own, "%s/fail-%s", getenv("NSS_SLOW"), what);
    return access(own, F_OK) == 0 ? NSS_STATUS_UNAVAIL : NSS_STATUS_NOTFOUND;
}
enum nss_status _nss_slow_getpwnam_r(const char *name, struct passwd *p, char *b, size_t n, int *e) {
    return slow("name", name);
}
enum nss_status _nss_slow_getpwuid_r(uid_t uid, struct passwd *p, char *b, size_t n, int *e) {
    char text[20];
    snprintf(text, sizeof text, "%u", uid);
    return slow("uid", text);
}
enum nss_status _nss_slow_getgrnam_r(const char *name, struct group *g, char *b, size_t n, int *e) {
    return slow("group", name);
}
/* Give the groups that $NSS_SLOW/nested has for a user, in lines of name and gid: no other question shows them. */
enum nss_status _nss_slow_initgroups_dyn(const char *name, gid_t first, long *used, long *size, gid_t **groups,
                                         long limit, int *e) {
    char path[4096], member[100];
    unsigned gid;
    if (slow("groups", name) == NSS_STATUS_UNAVAIL) return NSS_STATUS_UNAVAIL;
    snprintf(path, sizeof path, "%s/nested", getenv("NSS_SLOW"));
    FILE *nested = fopen(path, "r");
    if (!nested) return NSS_STATUS_NOTFOUND;
    while (fscanf(nested, "%99s %u", member, &gid) == 2) {
        if (strcmp(member, name)) continue;
        if (*used == *size) *groups = realloc(*groups, (*size *= 2) * sizeof **groups);
        (*groups)[(*used)++] = gid;
    }
    fclose(nested);
    return NSS_STATUS_SUCCESS;
}
'''
# Switch to the directory's nsswitch.conf, and away from nscd, which answers as the host has it.
SWITCH = ('mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf && '
          '{ [ ! -d /run/nscd ] || mount -t tmpfs none /run/nscd; }')
MOUNT = f'{SWITCH} && mount --bind "$0/users" /var/lib/extrausers && exec "$@"'
PEOPLE = {"mst-eve": 42401, "mst-mallory": 42402, "mst-trent": 42403}  # known to the directory only


class Directory:
    """A directory service for one milter: libnss-extrausers' files, behind a module that can be made slow."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.slow_file, self.log = path, path / "slow", path / "log"
        path.chmod(0o777)
        (path / "users").mkdir()
        (path / "nsswitch.conf").write_text("passwd: slow files extrausers\ngroup: slow files extrausers\n")
        (path / "slow.c").write_text(SLOW)
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", path / "libnss_slow.so.2", path / "slow.c"], check=True)
        self.people, self.members = dict(PEOPLE), ["mst-trent"]
        self.groups = {"mst-nested": 42501, "domain users": 42502}  # that list no members
        self.log.touch()
        self.log.chmod(0o666)  # the milter's user writes to it
        self.up()

    def up(self) -> None:
        """Let it answer."""
        lines = [f"{name}:x:{uid}:{uid}::/:/bin/sh\n" for name, uid in self.people.items()]
        groups = [f"mst-fired:x:42500:{','.join(self.members)}\n"]
        groups += [f"{name}:x:{gid}:\n" for name, gid in self.groups.items()]
        replace(self.path / "users/group", "".join(groups))
        replace(self.path / "users/passwd", "".join(lines))

    def down(self) -> None:
        """Let it know nobody."""
        for name in "passwd", "group":
            (self.path / "users" / name).unlink()

    @contextlib.contextmanager
    def slow(self, what: str = "") -> Iterator[None]:
        """Let every question, or one function's, take 30 s, or until the end of this block."""
        path = self.path / f"slow-{what}" if what else self.slow_file
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Let one function fail until the end of this block (UNAVAIL)."""
        path = self.path / f"fail-{what}"
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    def asked(self, what: str) -> int:
        """Count how often something was asked for ("begin uid 42401", "end uid 42401")."""
        return self.log.read_text().splitlines().count(what)

    def options(self) -> dict[str, Any]:
        """Give the options of a milter that uses it."""
        return {"prefix": ["unshare", "--mount", "sh", "-c", MOUNT, str(self.path)],
                "env": {"NSS_SLOW": str(self.path), "LD_LIBRARY_PATH": str(self.path)}}


@pytest.fixture
def directory(users: types.SimpleNamespace, place: pathlib.Path) -> Directory:
    """Make a directory service."""
    if not os.path.isdir("/var/lib/extrausers"):
        pytest.skip("no libnss-extrausers: no directory service to take away")
    if not shutil.which("gcc"):
        pytest.skip("no gcc: no directory service that is slow")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces: /etc/nsswitch.conf cannot be another one for the milter")
    return Directory(place)


@pytest.fixture
def served(directory: Directory, make_milter: Callable) -> Callable[..., mta.Milter]:
    """Start a milter on that directory, with a block list's file (.path) that has these lines.

    first: seconds that a session waits for NSS about someone new, where that wait is not what is tested
    """
    def start(*lines: str, refresh: float = 60, first: float = 3.0, **settings: Any) -> mta.Milter:
        path = directory.path / "blocked"
        replace(path, "".join(line + "\n" for line in lines))
        script = directory.path / "script.py"
        source = mta.SCRIPT.read_text()
        for times, value in (r"(REFRESH_SECONDS =) 60\b", refresh), (r"(\bFIRST_SECONDS(?:, \w+)? =) 3\.0\b", first):
            source, found = re.subn(times, rf"\1 {value}", source)
            assert found == 1
        script.write_text(source)
        milter = make_milter(script=script, blocked_mailusers_file=str(path), **directory.options(), **settings)
        milter.path = path
        return milter.start()
    return start


def test_a_name_is_asked_for_once_a_minute(directory: Directory, served: Callable) -> None:
    """Ten messages, ten connections, one question."""
    milter = served()
    for _ in range(10):
        assert send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve ")
    assert directory.asked(f"begin uid {PEOPLE['mst-eve']}") == 1


def test_a_slow_directory_gives_the_number_and_holds_nobody_up(directory: Directory, served: Callable,
                                                               users: types.SimpleNamespace) -> None:
    """Someone new waits 3 s and is a number, whoever is known has his name at once; later the others have theirs."""
    milter = served("mst-mallory")
    assert send(milter, users.alice.pw_uid).startswith("user=mst-alice ")
    with directory.slow():
        for uid in 42600, 42601:  # their own sessions wait 3 s each
            assert send(milter, uid).startswith(f"user={uid} ")
        began = ms.time.monotonic()
        assert send(milter, users.alice.pw_uid).startswith("user=mst-alice ")
        assert ms.time.monotonic() - began < 2, "someone who is known was held up"
        assert send(milter, PEOPLE["mst-mallory"]) == refused(PEOPLE["mst-mallory"])
        assert directory.asked("begin uid 42600") == 1 and directory.asked("end uid 42600") == 0
    mta.wait_for(lambda: send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory"), what="the name")


def test_without_a_list_a_slow_directory_gives_the_number(directory: Directory, served: Callable) -> None:
    """The user is known all the same, as his uid."""
    milter = served(first=1.0)
    with directory.slow():
        assert send(milter, PEOPLE["mst-eve"]).startswith(f"user={PEOPLE['mst-eve']} ")
        assert directory.asked(f"end uid {PEOPLE['mst-eve']}") == 0
    mta.wait_for(lambda: send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve "), what="the name")


@pytest.mark.parametrize("fault", ["slow", "down"])
def test_a_change_while_the_directory_fails_unblocks_nobody(fault: str, directory: Directory, served: Callable) -> None:
    """Users who have not sent before are still refused, and the one who is added is so by uid; a group's who have."""
    milter = served("mst-mallory", "@mst-fired", first=1.0 if fault == "slow" else 3.0)
    assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
    with contextlib.ExitStack() as stack:
        if fault == "slow":
            stack.enter_context(directory.slow())
        else:
            directory.down()
        with milter.path.open("a") as file:
            file.write("42401\n")
        for name, uid in PEOPLE.items():
            assert send(milter, uid) == refused(name if name == "mst-trent" else uid), uid
    if fault == "down":
        directory.up()


def test_a_directory_that_stays_down_unblocks_nobody(directory: Directory, served: Callable) -> None:
    """Names, a group's members and the list itself are asked for anew, in vain, and stay as they were."""
    milter = served("mst-mallory", "@mst-fired", refresh=0.2)
    assert send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory")
    assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
    directory.down()
    asked = directory.asked("end name mst-mallory")

    def refuses() -> bool:
        """Have both refused, and say whether the directory has been asked three times meanwhile."""
        assert send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory")
        assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
        return directory.asked("end name mst-mallory") >= asked + 3
    mta.wait_for(refuses, what="the list to be resolved anew")
    directory.up()
    mta.wait_for(lambda: send(milter, PEOPLE["mst-trent"]) == refused("mst-trent"), what="the name")


@pytest.mark.parametrize("fault", ["slow", "down"])
def test_a_delegated_uid_is_blocked_while_the_directory_fails(fault: str, directory: Directory, served: Callable,
                                                              subuid: pathlib.Path) -> None:
    """The file says whose it is, be it known already or new; of a user who is not blocked, nothing is said."""
    subuid.write_text("mst-mallory:700000000:65536\nmst-eve:800000000:65536\n")
    milter = served("mst-mallory", refresh=0.2, first=1.0 if fault == "slow" else 3.0)
    assert send(milter, 700000001) == refused("mst-mallory")
    with contextlib.ExitStack() as stack:
        if fault == "slow":
            stack.enter_context(directory.slow())
        else:
            directory.down()
        later = ms.time.monotonic() + 0.5  # than what is known is believed
        mta.wait_for(lambda: send(milter, 700000001) != refused("mst-mallory") or ms.time.monotonic() > later)
        for uid in 700000001, 700000002:
            assert send(milter, uid) == refused("mst-mallory"), uid
        assert send(milter, 800000001) == "user=? program=?"
    directory.up()
    mta.wait_for(lambda: send(milter, 800000001).startswith("user=mst-eve "), what="the name")


def test_whoever_nss_has_not_answered_for_is_not_refused_for_good(directory: Directory, served: Callable) -> None:
    """450 while it is slow, whoever he turns out to be; then the one is let through and the other is not."""
    milter = served(allowed_mailusers=["root", "mst-eve", "@mst-fired"], first=1.0)
    with directory.slow():
        assert send(milter, PEOPLE["mst-eve"]).startswith(f"user={PEOPLE['mst-eve']} ")  # is allowed by that uid
        for name in "mst-trent", "mst-mallory":
            assert send(milter, PEOPLE[name]) == f"450 4.7.1 {ms.UNIDENTIFIED}"
            assert " action=tempfail reason=unidentified" in milter.wait_lines(f"user={PEOPLE[name]} ")[-1]
    mta.wait_for(lambda: send(milter, PEOPLE["mst-trent"]).startswith("user=mst-trent "), what="the one allowed")
    mta.wait_for(lambda: send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory"), what="the other's name")
    assert not [line for line in milter.lines("action=reject") if "user=mst-mallory" not in line]


def test_a_list_of_allowed_users_outlives_a_directory_that_goes_down(directory: Directory, served: Callable) -> None:
    """Who was allowed stays so; someone never seen before is refused for now."""
    milter = served(allowed_mailusers=["@mst-fired", "mst-eve"], refresh=0.2)
    for name in "mst-trent", "mst-eve":
        assert send(milter, PEOPLE[name]).startswith(f"user={name} ")
    directory.down()
    asked = directory.asked("end name mst-eve")

    def passes() -> bool:
        """Have both pass, and say whether the directory has been asked three times meanwhile."""
        for name in "mst-trent", "mst-eve":
            assert send(milter, PEOPLE[name]).startswith(f"user={name} ")
        return directory.asked("end name mst-eve") >= asked + 3
    mta.wait_for(passes, what="the list to be resolved anew")
    assert send(milter, PEOPLE["mst-mallory"]) == "450 4.7.1 " + ms.UNIDENTIFIED


def test_names_and_members_are_resolved_anew(directory: Directory, served: Callable) -> None:
    """Who leaves a group, or has got a blocked user's old uid, is free, though another entry is never found."""
    milter = served("mst-mallory", "@mst-fired", "mst-no-such-user", refresh=0.2)
    assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
    assert send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory")
    directory.people = {"mst-heir": PEOPLE["mst-mallory"], "mst-trent": PEOPLE["mst-trent"], "mst-eve": PEOPLE["mst-eve"]}
    directory.members = ["mst-eve"]
    directory.up()
    for name, uid in ("mst-trent", PEOPLE["mst-trent"]), ("mst-heir", PEOPLE["mst-mallory"]):
        mta.wait_for(lambda: send(milter, uid).startswith(f"user={name} "), what=f"{name}'s freedom")
    mta.wait_for(lambda: send(milter, PEOPLE["mst-eve"]) == refused("mst-eve"), what="the new member")


def test_the_first_message_after_a_quiet_time_meets_the_groups_as_they_are(directory: Directory, served: Callable) -> None:
    """A list that was resolved before the last minute is not the one that decides."""
    milter = served("@mst-fired", refresh=0.1)
    assert send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve ")
    directory.members = ["mst-eve"]
    directory.up()
    quiet = ms.time.monotonic() + 0.3
    mta.wait_for(lambda: ms.time.monotonic() > quiet, what="a quiet time")
    assert send(milter, PEOPLE["mst-eve"]) == refused("mst-eve")


def test_a_group_of_thousands_is_refused_from_the_first_message_on(directory: Directory, served: Callable) -> None:
    """Its members are never listed, which takes seconds; whoever sends is asked for his groups."""
    crowd = {f"mst-member{n}": 43000 + n for n in range(3000)}
    directory.people.update(crowd)
    directory.members = list(crowd)
    directory.up()
    milter = served("@mst-fired", refresh=0.2)
    assert send(milter, 45999) == refused("mst-member2999")
    assert send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve ")
    asked = directory.asked("end uid 45999")

    def refuses() -> bool:
        """Have one refused who is known, and say whether the directory has been asked for him anew three times."""
        assert send(milter, 45999) == refused("mst-member2999")
        return directory.asked("end uid 45999") >= asked + 3
    mta.wait_for(refuses, what="the groups to be asked for anew")
    assert send(milter, 43000) == refused("mst-member0")


def test_a_group_that_lists_no_members_is_refused(directory: Directory, served: Callable) -> None:
    """As with nested groups, and with a directory that does not list any: only the user's own groups show it."""
    (directory.path / "nested").write_text("mst-eve 42501\n")
    milter = served("@mst-nested")
    assert send(milter, PEOPLE["mst-eve"]) == refused("mst-eve")
    assert send(milter, PEOPLE["mst-trent"]).startswith("user=mst-trent ")


@pytest.mark.parametrize("by", ["list", "file"])
@pytest.mark.parametrize("entry", ["@domain users", '@"domain users"', "DOM\\John Doe", '"DOM\\x5cJohn Doe"'])
def test_names_with_blanks_and_backslashes_are_entries(entry: str, by: str, directory: Directory, served: Callable) -> None:
    """Of users and of groups, as the directory has them or as the log quotes them."""
    directory.people["DOM\\John Doe"] = 42404
    directory.up()
    (directory.path / "nested").write_text("mst-trent 42502\n")
    milter = served(entry, "mst-mallory") if by == "file" else served(blocked_mailusers=[entry])
    user = entry.startswith("@")
    assert send(milter, 42404).startswith('user="DOM\\x5cJohn Doe" ' if user else refused('"DOM\\x5cJohn Doe"'))
    assert send(milter, PEOPLE["mst-trent"]).startswith(refused("mst-trent") if user else "user=mst-trent ")
    assert not milter.lines("ERROR")


def test_a_name_pasted_from_the_log_is_an_entry(directory: Directory, served: Callable) -> None:
    """With the quotes that it has there."""
    directory.people["DOM\\John Doe"] = 42404
    directory.up()
    milter = served()
    send(milter, 42404)
    (name,) = re.findall('user=("[^"]*")', milter.wait_lines("action=tag")[0])
    assert name == '"DOM\\x5cJohn Doe"'
    replace(milter.path, f"{name}\n")
    assert send(milter, 42404) == refused(name)


def test_digits_that_are_a_users_name_block_user_and_uid(directory: Directory, served: Callable) -> None:
    """Which of the two was meant, nobody can tell; the settings say that both are."""
    directory.people["1234567"] = 42405
    directory.up()
    milter = served("1234567", "7654321")
    assert send(milter, 42405) == send(milter, 1234567) == refused(1234567)
    assert send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve ")


def pass_message(session: Session) -> None:
    """Send a message through a milter that may end meanwhile."""
    with contextlib.suppress(OSError, EOFError, AssertionError), session:
        session.send()


FUNCTIONS = "uid", "name", "group", "groups"  # getpwuid, getpwnam, getgrnam, initgroups


@pytest.mark.parametrize("what", FUNCTIONS)
def test_one_function_that_hangs_holds_up_only_who_is_new(what: str, directory: Directory, served: Callable,
                                                          users: types.SimpleNamespace) -> None:
    """Ten of someone known pass meanwhile, also where all is asked anew and a file of accounts has changed."""
    milter = served("mst-mallory", "mst-ghost", "@mst-fired", refresh=0.2)
    assert send(milter, users.alice.pw_uid).startswith("user=mst-alice ")
    assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
    with directory.slow(what):
        new = threading.Thread(target=pass_message, args=(Session(milter, PEOPLE["mst-eve"]),))
        new.start()
        mta.wait_for(lambda: directory.asked(f"begin {what} mst-eve") or directory.asked(f"begin uid {PEOPLE['mst-eve']}"),
                     what="the question")
        os.utime("/etc/passwd")
        waits: list[float] = []
        headers: list[str] = []

        def one(session: Session) -> None:
            began = time.monotonic()
            headers.append(session.send())
            waits.append(time.monotonic() - began)
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(Session(milter, users.alice.pw_uid)) for _ in range(10)]
            crowd = [threading.Thread(target=one, args=(session,)) for session in sessions]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()
        assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
        new.join()
    assert len(headers) == 10 and all(header.startswith("user=mst-alice ") for header in headers)
    assert max(waits) < 2, waits  # 0.3 s in themselves; the module would have kept them 30 s
    assert not [line for line in milter.lines("user=mst-trent ") if "action=tag" in line]


@pytest.mark.parametrize("what", FUNCTIONS)
def test_the_milter_ends_while_a_function_hangs(what: str, directory: Directory, served: Callable) -> None:
    """Told to, within two seconds, in the middle of a question."""
    milter = served("mst-mallory", "@mst-fired", refresh=0.2)
    with directory.slow(what):
        new = threading.Thread(target=pass_message, args=(Session(milter, PEOPLE["mst-eve"]),))
        new.start()
        mta.wait_for(lambda: directory.asked(f"begin {what} mst-eve") or directory.asked(f"begin uid {PEOPLE['mst-eve']}"),
                     what="the question")
        began = time.monotonic()
        milter.process.terminate()
        assert milter.process.wait(10) == 0
        assert time.monotonic() - began < 2
        new.join()


def test_one_that_hangs_stands_before_no_other(directory: Directory, served: Callable) -> None:
    """A name and a group that are listed behind one that hangs are found."""
    milter = served("mst-mallory", refresh=0.2)
    (directory.path / "nested").write_text("mst-eve 42501\n")
    with directory.slow("name"):
        with milter.path.open("a") as file:
            file.write("mst-ghost\nmst-trent\n@mst-nested\n")
        assert send(milter, PEOPLE["mst-trent"]) == refused("mst-trent")
        assert send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory")
        mta.wait_for(lambda: send(milter, PEOPLE["mst-eve"]) == refused("mst-eve"), what="the group behind it")


@pytest.mark.parametrize("how", ["fail-groups", "no-group"])
def test_a_directory_that_gives_fewer_groups_unblocks_nobody(how: str, directory: Directory, served: Callable) -> None:
    """Whether the user's groups fail alone or his group is not found: he stays in it; one warning at each change."""
    nested = directory.path / "nested"
    nested.write_text("mst-eve 42501\nmst-trent 42501\n")
    milter = served("@mst-nested", refresh=0.2)
    assert send(milter, PEOPLE["mst-eve"]) == refused("mst-eve")
    with contextlib.ExitStack() as stack:
        if how == "fail-groups":
            stack.enter_context(directory.failing("groups"))
        else:
            nested.unlink()
            replace(directory.path / "users/group", "mst-other:x:42999:\n")
        asked = directory.asked("end groups mst-eve")

        def refuses() -> bool:
            assert send(milter, PEOPLE["mst-eve"]) == refused("mst-eve")
            return directory.asked("end groups mst-eve") >= asked + 4
        mta.wait_for(refuses, what="the groups to be asked for anew")
        (line,) = milter.wait_lines("WARNING the directory service (NSS) lacks what it had")
    nested.write_text("mst-eve 42501\nmst-trent 42501\n")
    directory.up()
    mta.wait_for(lambda: send(milter, PEOPLE["mst-eve"]) == refused("mst-eve") and milter.lines("has again what it had"),
                 what="the second warning")


def test_a_directory_that_gives_fewer_groups_refuses_nobody_for_good(directory: Directory, served: Callable) -> None:
    """Who was in an allowed group is let through; who was not seen before is refused for now."""
    nested = directory.path / "nested"
    nested.write_text("mst-eve 42501\nmst-trent 42501\n")
    milter = served(allowed_mailusers=["@mst-nested"], refresh=0.2)
    assert send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve ")
    assert send(milter, PEOPLE["mst-mallory"]) == refused("mst-mallory")
    nested.unlink()
    replace(directory.path / "users/group", "mst-other:x:42999:\n")
    mta.wait_for(lambda: milter.lines("lacks what it had") or not send(milter, PEOPLE["mst-eve"]), what="the warning")
    assert send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve ")
    for name in "mst-trent", "mst-mallory":
        assert send(milter, PEOPLE[name]) == f"450 4.7.1 {ms.UNIDENTIFIED}"


def test_who_leaves_a_group_that_lists_nobody_is_free(directory: Directory, served: Callable) -> None:
    """If the directory gives other groups of his still, it is not down."""
    nested = directory.path / "nested"
    nested.write_text("mst-eve 42501\nmst-eve 42502\n")
    milter = served("@mst-nested", refresh=0.2)
    assert send(milter, PEOPLE["mst-eve"]) == refused("mst-eve")
    nested.write_text("mst-eve 42502\n")
    mta.wait_for(lambda: send(milter, PEOPLE["mst-eve"]).startswith("user=mst-eve "), what="his freedom")


@pytest.mark.parametrize("lines, name", [
    ("{name}:{uid}:1\n", True), ("{uid}:{uid}:1\n", True), ("root:{uid}:1\n", True), ("root:{uid}:1\n{name}:{uid}:1\n", True),
    ("9" * 5000 + ":1:1\nmst-bob:" + "9" * 5000 + ":1\nmst-bob:1:" + "9" * 5000 + "\n", True),
    ("mst-bob:{uid}:1\n", False), ("root:{uid}:1\nmst-bob:{uid}:1\n", False)])
def test_a_range_of_the_users_own_takes_nothing_away(lines: str, name: bool, make_milter: Callable, subuid: pathlib.Path,
                                                     users: types.SimpleNamespace) -> None:
    """As podman and lxd advise; root can take any uid anyway. One of somebody else's makes it unknown."""
    subuid.write_text(lines.format(name="mst-alice", uid=users.alice.pw_uid))
    with make_milter() as milter:
        assert send(milter, users.alice.pw_uid).startswith("user=mst-alice " if name else "user=? ")


def test_etc_passwd_is_read_once_for_each_state(tmp_path: pathlib.Path) -> None:
    """However many lines it has, and however many uids are asked for."""
    path = tmp_path / "passwd"
    path.write_text("".join(f"user{n}:x:{n}:{n}::/:/bin/sh\n" for n in range(10000)) + "again:x:5:6::/:\n" + "bad\nx:y\n")
    read = ms.local_file(str(path))
    assert read[0]["user9999"] == 9999 and read[1][5] == {"user5": 5, "again": 6}
    assert ms.local_file(str(path)) is read
    replace(path, "other:x:5:5::/:\n")
    assert ms.local_file(str(path)) == ({"other": 5}, {5: {"other": 5}})


# --- accounts that change -------------------------------------------------------------------------------------------

def system(*command: str) -> None:
    """Run one of the system's commands for accounts."""
    subprocess.run(command, check=True, capture_output=True, env={"PATH": mta.SYSTEM_PATH})


def settle() -> None:
    """Wait until nothing waits for an answer to a question of the start."""
    settled = time.monotonic() + ms.FIRST_SECONDS
    mta.wait_for(lambda: time.monotonic() > settled, what="the start to be over")


@pytest.fixture
def gone(users: types.SimpleNamespace) -> Iterator[int]:
    """Make the user mst-gone, and give his uid, which mst-heir can get."""
    yield mta.add_user("mst-gone").pw_uid
    for name in "mst-gone", "mst-heir":
        mta.remove_user(name)


def test_who_gets_a_deleted_users_uid_is_named_with_the_next_message(gone: int, make_milter: Callable) -> None:
    """And is not refused for him who had it before."""
    milter = make_milter(blocked_mailusers=["mst-gone"]).start()
    settle()
    assert send(milter, gone) == refused("mst-gone")
    mta.remove_user("mst-gone")
    system("useradd", "--no-create-home", "--uid", str(gone), "mst-heir")
    assert send(milter, gone).startswith("user=mst-heir ")
    assert not milter.lines("user=mst-gone")[1:]


def test_who_leaves_a_group_of_the_host_is_free_and_so_is_his_heir(gone: int, make_milter: Callable) -> None:
    """Although it names nobody then: /etc/group shows who is in it, and never fails."""
    milter = make_milter(blocked_mailusers=["@mst-later"], allowed_mailusers=["mst-gone"]).start()
    try:
        system("groupadd", "mst-later")
        system("usermod", "--append", "--groups", "mst-later", "mst-gone")
        assert send(milter, gone) == refused("mst-gone")
        system("gpasswd", "--delete", "mst-gone", "mst-later")
        assert send(milter, gone).startswith("user=mst-gone ")
        system("usermod", "--append", "--groups", "mst-later", "mst-gone")
        assert send(milter, gone) == refused("mst-gone")
        mta.remove_user("mst-gone")
        system("useradd", "--no-create-home", "--uid", str(gone), "mst-heir")
        assert send(milter, gone) == refused("mst-heir")  # who is not allowed, for good
        assert "action=reject reason=not-allowed" in milter.wait_lines("user=mst-heir")[0]
        assert not milter.lines("lacks what it had")
    finally:
        subprocess.run(["groupdel", "mst-later"], check=False, capture_output=True, env={"PATH": mta.SYSTEM_PATH})


def test_what_nss_lacks_is_forgotten_when_nobody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that was taken out of the list, and a user who does not send again, are no failing directory."""
    now, said = types.SimpleNamespace(time=1000.0), []
    monkeypatch.setattr(ms.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(ms, "say", lambda level, text: said.append(text))
    monkeypatch.setattr(ms, "LACKING", {})
    ms.note_lack("@gone", True)
    ms.note_lack("groups of alice", False)
    assert ms.LACKING and len(said) == 1 and "lacks what it had (@gone)" in said[0]
    now.time += 2 * ms.REFRESH_SECONDS + 1
    ms.note_lack("groups of alice", False)
    assert not ms.LACKING and said[1].endswith("has again what it had")


def test_a_long_list_of_a_directorys_names_leaves_room_for_senders(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone new is asked for while hundreds of names are looked up."""
    monkeypatch.setattr(ms.pwd, "getpwnam", lambda name: time.sleep(0.05) or nobody(name))
    monkeypatch.setattr(ms, "say", lambda *words: None)
    directory = ms.Directory()
    users = ms.UserList(directory, "blocked_mailusers", [f"mst-{n}" for n in range(300)])
    threading.Thread(target=users.now, daemon=True).start()
    mta.wait_for(lambda: len(directory.asked) > 20, what="the list's questions")
    assert directory.account(0).name == "root"


def nobody(key: Any) -> Any:
    """Find nothing, as pwd does where a directory has nothing."""
    raise KeyError(key)


def test_two_sessions_that_find_a_new_list_both_get_it(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it stays: the one that is slower does not leave the older one behind."""
    users = ms.UserList(ms.Directory(), "blocked_mailusers", ["1001"])
    users.now()
    make, held = ms.make_entries, threading.Event()
    monkeypatch.setattr(ms, "make_entries", lambda listed, numbers: (
        make(listed, numbers) if "1002" in listed else held.wait(10) and make(listed, numbers)))
    users.listed = ["1003"]
    slow = threading.Thread(target=users.now)
    slow.start()
    users.listed = ["1001", "1002"]
    assert users.now().uids == {1001, 1002}
    held.set()
    slow.join()
    assert users.now().uids == {1001, 1002}


def test_a_listed_group_that_is_made_later_is_refused_with_the_next_message(gone: int, make_milter: Callable) -> None:
    """Also if it is made anew with another gid."""
    milter = make_milter(blocked_mailusers=["@mst-later"]).start()
    settle()
    assert send(milter, gone).startswith("user=mst-gone ")
    try:
        for gid in 59001, 59002:
            system("groupadd", "--gid", str(gid), "mst-later")
            system("usermod", "--append", "--groups", "mst-later", "mst-gone")
            assert send(milter, gone) == refused("mst-gone")
            system("groupdel", "mst-later")
        assert send(milter, gone).startswith("user=mst-gone ")
    finally:
        subprocess.run(["groupdel", "mst-later"], check=False, capture_output=True, env={"PATH": mta.SYSTEM_PATH})
