# SPDX-License-Identifier: MIT
"""Real mail of real users through a real Postfix: who is named, who is refused, what is logged."""

from __future__ import annotations

import email.message
import errno
import os
import pwd
import re
import socket
import socketserver
import stat
import subprocess
import threading
import types
from typing import Any, Iterator, Sequence

import psutil
import pytest

import mta

NAME = "X-Sender-Process-Info"
LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) INFO (?P<id>\w+): client=(?P<client>\S+) user=(?P<user>\S+) uid=(?P<uid>\S+)"
    r" program=(?P<program>\S+) pid=(?P<pid>\S+) exe=(?P<exe>\S+) dir=(?P<dir>\S+) unit=(?P<unit>\S+)"
    r" from=(?P<sender>\S+) rcpts=(?P<rcpts>\d+) action=(?P<action>[a-z]+)(?: reason=(?P<reason>[a-z]+))?"
    r"(?: lookup=(?P<lookup>[a-z-]+))?")


class Policy(socketserver.ThreadingTCPServer):
    """A policy service that lets everyone pass and notes what ss says of each client at that moment, by sender."""

    allow_reuse_address = daemon_threads = True

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}
        super().__init__(("127.0.0.1", mta.free_port()), PolicyHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class PolicyHandler(socketserver.StreamRequestHandler):
    """SMTPD_POLICY_README: name=value lines, an empty one, and the same back."""

    def handle(self) -> None:
        """Answer requests until Postfix hangs up."""
        request: dict[str, str] = {}
        for line in self.rfile:
            key, _, value = line.decode().strip().partition("=")
            if key:
                request[key] = value
                continue
            ports = ["sport", "=", f":{request['client_port']}", "and", "dport", "=", f":{request['server_port']}"]
            self.server.seen[request["sender"]] = subprocess.run(  # type: ignore[attr-defined]
                ["ss", "-tnpeH", *ports], capture_output=True, text=True, check=True, timeout=20).stdout
            self.wfile.write(b"action=dunno\n\n")


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    """Run the policy service."""
    with Policy() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def postfix(users: types.SimpleNamespace, policy: Policy) -> Iterator[mta.Postfix]:
    """Run one Postfix; bare has no milter, other another one, watched asks the policy service, front takes XCLIENT."""
    other = {"smtpd_milters": "unix:other/milter.sock", "milter_default_action": "accept"}
    services = {"other": other, "bare": {"smtpd_milters": ""}, "front": {"smtpd_authorized_xclient_hosts": "127.0.0.1"},
                "watched": {"smtpd_data_restrictions": "check_policy_service inet:127.0.0.1:%d" % policy.server_address[1]}}
    with mta.Postfix(main_cf={"non_smtpd_milters": "$smtpd_milters"}, services=services) as running:
        yield running


@pytest.fixture(scope="module")
def shared(postfix: mta.Postfix) -> Iterator[mta.Milter]:
    """Run the milter that tests with default settings share."""
    with mta.Milter(postfix, prefix=["setpriv", "--groups", "0,4,8"]) as milter:  # as a root login has some
        yield milter


@pytest.fixture
def milter(postfix: mta.Postfix, shared: mta.Milter) -> Iterator[mta.Milter]:
    """Give the shared milter and an empty mailbox; afterwards no traceback may be in its log."""
    if shared.process.poll() is not None:  # others were run in its place
        shared.script.write_text(mta.edit_settings(mta.SCRIPT.read_text(), shared.settings))
        shared.start()
    postfix.forget_messages()
    yield shared
    assert not shared.lines("Traceback"), shared.log()


def send(user: str, port: int, *options: str) -> subprocess.CompletedProcess:
    """Send mail as a user; all of it must be accepted."""
    sent = mta.run_as(user, mta.smtp(port, *options))
    assert sent.returncode == 0, sent.stdout + sent.stderr
    return sent


def queue_id(message: email.message.Message) -> str:
    """Give the queue id that the message's first Received header has."""
    return re.search(r"with E?SMTP id (\w+)", message.get_all("Received")[0])[1]


def fields(milter: mta.Milter, containing: str) -> dict[str, str]:
    """Give the fields of the one line of the log that contains a text; its form must be exact."""
    (line,) = milter.wait_lines(containing)
    match = LINE.fullmatch(line)
    assert match, line
    return match.groupdict()


# --- who is named ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("user", ["mst-alice", "mst-bob"])
@pytest.mark.parametrize("dial", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_the_user_is_in_the_header_and_the_log(dial: str, user: str, postfix: mta.Postfix, milter: mta.Milter) -> None:
    """v4, v6 and v4-mapped; the log line has the delivered message's queue id."""
    if ":" in dial and not mta.has_ipv6():
        pytest.skip("no IPv6 here")
    send(user, postfix.port, "--dial", dial, "--mail-from", f"{user}@example.org", "--to", "a@example.org")
    (message,) = postfix.wait_messages(1)
    line = fields(milter, queue_id(message))
    assert message.get_all(NAME) == [f"user={line['user']} program={line['program']}"]
    assert line["user"] == user and line["uid"] == str(pwd.getpwnam(user).pw_uid)
    assert re.fullmatch(r'"\[::1\]:\d+"' if dial == "::1" else r"127\.0\.0\.1:\d+", line["client"])
    assert (line["sender"], line["rcpts"], line["action"]) == (f"{user}@example.org", "1", "tag")
    assert line["program"] == ("python3" if mta.can_see_others() else "?")


def test_the_log_line_describes_the_process(postfix: mta.Postfix, milter: mta.Milter, sees_others: None) -> None:
    """Its pid, executable and directory are those of the program that sent."""
    with mta.as_user("mst-alice", mta.smtp(postfix.port, "--wait", "--to", "a@example.org", "--to", "b@example.org"),
                     cwd="/usr") as client:
        mta.wait_for(lambda: client.stdout.readline().startswith("connected"))
        exe = psutil.Process(client.pid).exe()
        client.communicate("\n", timeout=30)
    line = fields(milter, queue_id(postfix.wait_messages(1)[0]))
    assert (line["pid"], line["exe"], line["dir"]) == (str(client.pid), exe, "/usr")
    assert (line["rcpts"], line["reason"], line["lookup"]) == ("2", None, None)


CLIENTS = {
    "python3": [mta.PYTHON, "-c", "import smtplib, sys; s = smtplib.SMTP('127.0.0.1', int(sys.argv[1]), 'me', 30); "
                "s.sendmail('python3@example.org', ['to@example.org'], 'Subject: x\\r\\n\\r\\nbody'); s.quit()", "PORT"],
    "curl": ["curl", "-sS", "--url", "smtp://127.0.0.1:PORT", "--mail-from", "curl@example.org", "--mail-rcpt",
             "to@example.org", "-T", "-"],
    "swaks": ["swaks", "-s", "127.0.0.1", "-p", "PORT", "-f", "swaks@example.org", "-t", "to@example.org", "-h", "me",
              "--body", "body"],
    "php": ["php", "-n", "-r", "$s = fsockopen('127.0.0.1', PORT); foreach (['HELO me', 'MAIL FROM:<php@example.org>', "
            "'RCPT TO:<to@example.org>', 'DATA', \"Subject: x\\r\\n\\r\\nbody\\r\\n.\", 'QUIT'] as $line) "
            "{ fgets($s); fwrite($s, $line . \"\\r\\n\"); } fgets($s);"],
    "telnet": ["telnet", "127.0.0.1", "PORT"],
}


def type_in(client: subprocess.Popen, lines: Sequence[str]) -> None:
    """Talk SMTP through a terminal program, one line after each reply, and wait until it has ended."""
    watchdog = threading.Timer(30, client.kill)
    watchdog.start()
    try:
        for line in lines:
            while not re.match(r"\d{3} ", reply := client.stdout.readline()):
                assert reply, f"ended before {line!r}: {client.stderr.read()}"
            client.stdin.write(line + "\n")
            client.stdin.flush()
        client.communicate()
    finally:
        watchdog.cancel()


def test_real_clients_are_named_as_ss_names_them(postfix: mta.Postfix, milter: mta.Milter, policy: Policy) -> None:
    """Python, curl, swaks, PHP and telnet at once; users always, programs where they can be seen."""
    port = str(postfix.ports["watched"])
    running = {name: mta.as_user("mst-alice", [word.replace("PORT", port) for word in words])
               for name, words in CLIENTS.items()}
    type_in(running["telnet"], ["HELO me", "MAIL FROM:<telnet@example.org>", "RCPT TO:<to@example.org>", "DATA",
                                "Subject: x\n\nbody\n.", "QUIT"])
    for name, client in running.items():
        if name == "telnet":
            continue
        output = client.communicate("Subject: x\r\n\r\nbody\r\n" if name == "curl" else None, timeout=30)
        assert client.returncode == 0, output
    headers = {message["Return-Path"]: message[NAME] for message in postfix.wait_messages(len(CLIENTS))}
    for name in CLIENTS:
        ours, theirs = fields(milter, f"from={name}@example.org"), policy.seen[f"{name}@example.org"]
        assert re.search(r"uid:(\d+)", theirs)[1] == ours["uid"]
        assert ours["user"] == "mst-alice"
        if mta.can_see_others():
            assert re.search(r'users:\(\("([^"]+)",pid=(\d+)', theirs).groups() == (ours["program"], ours["pid"])
            assert ours["program"] == name
        assert headers[f"<{name}@example.org>"] == f"user=mst-alice program={ours['program']}"


def test_every_message_of_a_connection_is_tagged_and_nothing_stays(postfix: mta.Postfix, milter: mta.Milter) -> None:
    """Queue id, sender, recipients and forged headers are each message's own, after RSET and a second HELO as well."""
    forged = f"{NAME}: user=root\n" * 60  # more than a hundred in one message would be refused
    with mta.as_user("mst-bob", CLIENTS["telnet"][:2] + [str(postfix.port)]) as client:
        to, text = "RCPT TO:<to@example.org>", "Subject: x\n\nbody\n."
        type_in(client, ["EHLO one", "MAIL FROM:<one@example.org>", to, to.replace("to@", "too@"), "DATA", forged + text,
                         "MAIL FROM:<>", to, "DATA", forged + text, "MAIL FROM:<given-up@example.org>", to, to, "RSET",
                         "HELO two", "MAIL FROM:<three@example.org>", to, "DATA", text, "QUIT"])
    messages = {queue_id(message): message for message in postfix.wait_messages(4)}  # one for each recipient
    found = [fields(milter, name) for name in messages]
    assert sorted((line["sender"], line["rcpts"]) for line in found) == [
        ('""', "1"), ("one@example.org", "2"), ("three@example.org", "1")]
    assert {line["user"] for line in found} == {"mst-bob"} and not milter.lines("given-up")
    for message in messages.values():
        assert [value.split()[0] for value in message.get_all(NAME)] == ["user=mst-bob"]


# --- who is not looked up -------------------------------------------------------------------------------------

def test_mail_from_elsewhere_passes_without_a_header(postfix: mta.Postfix, milter: mta.Milter) -> None:
    """A remote client (by XCLIENT, which only a front end may use); a forged header is removed."""
    with mta.as_user("mst-alice", CLIENTS["telnet"][:2] + [str(postfix.ports["front"])]) as client:
        type_in(client, ["EHLO one", "XCLIENT ADDR=192.0.2.77 PORT=4711", "EHLO two", "MAIL FROM:<far@example.org>",
                         "RCPT TO:<c@example.org>", "DATA", f"Subject: x\n{NAME}: user=root\n\nbody\n.", "QUIT"])
    (message,) = postfix.wait_messages(1)
    assert NAME not in message
    (line,) = milter.wait_lines("from=far@example.org")
    assert line.endswith(": client=192.0.2.77:4711 from=far@example.org rcpts=1 action=pass")


# --- bad input ------------------------------------------------------------------------------------------------

RAW = r"""
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 30) as sock, sock.makefile("rb") as lines:
    for step in [b"", *bytes.fromhex(sys.argv[2]).split(b"|")]:
        try:
            sock.sendall(step + b"\r\n" if step else b"")
            while (line := lines.readline())[3:4] == b"-":
                pass
        except ConnectionError:
            line = b""
        print(line[:3].decode() or "gone")
        if not line:
            break
"""


def raw(port: int, data: bytes) -> list[str]:
    """Have mst-alice send bytes, the parts between bars after a reply each; give the replies' codes."""
    return mta.run_as("mst-alice", [mta.PYTHON, "-SEc", RAW, str(port), data.hex()], check=True).stdout.split()


@pytest.mark.parametrize("data", [
    b"HELO \xff\xfe|MAIL FROM:<a@example.org>|RCPT TO:<to@example.org>|DATA|Subject: x\r\n\r\nbody\r\n.|QUIT",
    b"HELO me|MAIL FROM:<\xff@example.org>|RCPT TO:<to@example.org>|DATA|Subject: x\r\n\r\nbody\r\n.|QUIT",
    b"HELO me|MAIL FROM:<a@example.org>|RCPT TO:<\xc3(@example.org>|DATA|Subject: x\r\n\r\nbody\r\n.|QUIT",
    b"HELO me|MAIL FROM:<a@example.org>|RCPT TO:<to@example.org>|DATA|X-\xff\xfe: \x80\r\nX-Y: \xc3(\r\n\r\n\xff\r\n.|QUIT",
    b"HELO me|MAIL FROM:<a@example.org>|RCPT TO:<to@example.org>|DATA|no header at all\r\n.|QUIT",
    b"HELO me|MAIL FROM:<a@example.org>|RCPT TO:<to@example.org>|DATA|.|QUIT", b"\xff\xfe\x00|QUIT", b"QUIT", b"HELO me"],
    ids=["helo", "sender", "recipient", "headers", "no header", "empty", "garbage", "quit", "hang up"])
def test_a_client_is_served_as_postfix_alone_would_serve_it(data: bytes, postfix: mta.Postfix,
                                                            milter: mta.Milter) -> None:
    """The same replies with and without the milter; what was accepted is delivered, tagged or not."""
    with_milter, without = raw(postfix.port, data), raw(postfix.ports["bare"], data)
    assert with_milter == without
    accepted = data.count(b"|DATA|") if "354" in without else 0
    messages = postfix.wait_messages(2 * accepted)
    assert len(messages) == 2 * accepted
    assert [message[NAME].split()[0] for message in messages if NAME in message] == ["user=mst-alice"] * accepted


def test_clients_that_say_nothing_disturb_nobody(postfix: mta.Postfix, milter: mta.Milter) -> None:
    """Some close at once, some stay: mail of others goes on."""
    silent = [socket.create_connection(("127.0.0.1", postfix.port), 30) for _ in range(10)]
    for sock in silent[:5]:
        sock.close()
    send("mst-alice", postfix.port)
    assert postfix.wait_messages(1)[0][NAME].startswith("user=mst-alice ")
    for sock in silent[5:]:
        assert sock.recv(3) == b"220"
        sock.close()


# --- the service ----------------------------------------------------------------------------------------------

def test_root_is_given_up_for_good(milter: mta.Milter) -> None:
    """Every uid and gid is the MTA's, no group and no capability is left."""
    status = dict(line.split(":\t", 1) for line in open(f"/proc/{milter.pid}/status", encoding="ascii") if ":\t" in line)
    user = pwd.getpwnam("postfix")
    assert status["Uid"].split() == [str(user.pw_uid)] * 4 and status["Gid"].split() == [str(user.pw_gid)] * 4
    assert status["Groups"].split() == [] and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_only_the_mtas_user_can_connect(users: types.SimpleNamespace) -> None:
    """Whatever the directory's mode and the umask it was started with."""
    with mta.Milter(prefix=["sh", "-c", 'umask 0; exec "$@"', "sh"]) as milter:
        status = os.stat(milter.socketname)
        assert status.st_uid == pwd.getpwnam("postfix").pw_uid and stat.S_IMODE(status.st_mode) == 0o600
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({milter.socketname!r})"
        assert "PermissionError" in mta.run_as("mst-alice", [mta.PYTHON, "-c", code]).stderr
        assert mta.run_as("postfix", [mta.PYTHON, "-c", code]).returncode == 0


def test_term_ends_it_with_status_0_and_mail_goes_on(postfix: mta.Postfix, milter: mta.Milter) -> None:
    """Its helper ends as well; a message that was under way is delivered."""
    children = milter.helper_pids()
    with mta.as_user("mst-alice", mta.smtp(postfix.port, "--wait")) as client:
        mta.wait_for(lambda: client.stdout.readline().startswith("connected"))
        assert milter.stop() == 0
        output, _ = client.communicate("\n", timeout=60)
    assert client.returncode == 0, output
    assert len(postfix.wait_messages(1)) == 1
    mta.wait_for(lambda: all(map(mta.ended, children)), what="the helper's end")
    assert milter.lines()[-1].endswith(" INFO stopped")


# --- other ways to run it: each with a milter of its own on the same Postfix ----------------------------------

@pytest.fixture
def replaced(postfix: mta.Postfix, shared: mta.Milter) -> Iterator[Any]:
    """Stop the shared milter and run others in its place: replaced(options of Milter)."""
    running: list[mta.Milter] = []

    def replace(**options: Any) -> mta.Milter:
        running.append(mta.Milter(postfix, **options).start())
        return running[-1]

    shared.stop()
    postfix.forget_messages()
    yield replace
    for milter in running:
        milter.stop()
        assert not milter.lines("Traceback"), milter.log()


@pytest.fixture(scope="module")
def kin(users: types.SimpleNamespace) -> Iterator[None]:
    """Make mst-twin, another name for mst-bob's uid, and groups: mst-team has mst-bob, mst-twins has mst-twin."""
    def run(*words: str) -> None:
        subprocess.run(words, check=False, capture_output=True, env={"PATH": mta.SYSTEM_PATH})

    def forget_twin() -> None:  # userdel would take mst-bob's processes and mail with it
        run("sed", "-i", "/^mst-twin:/d", "/etc/passwd", "/etc/shadow", "/etc/subuid", "/etc/subgid")

    forget_twin()  # of a run that was killed: with another uid
    run("useradd", "--no-create-home", "--non-unique", "--uid", str(users.bob.pw_uid), "--gid", "nogroup", "mst-twin")
    for group, member in ("mst-team", "mst-bob"), ("mst-twins", "mst-twin"):
        run("groupadd", group)
        run("gpasswd", "--add", member, group)
    yield
    for group in "mst-team", "mst-twins":
        run("groupdel", group)
    forget_twin()


@pytest.mark.parametrize("entry", ["mst-bob", int, "@mst-bob", "@mst-team", "mst-twin", "@mst-twins"],
                         ids=["name", "uid", "primary group", "group", "name that shares the uid",
                              "group of a name that shares the uid"])
def test_a_blocked_user_is_refused(entry: Any, postfix: mta.Postfix, replaced: Any, users: types.SimpleNamespace,
                                   kin: None) -> None:
    """However he is listed; others are not, and his mail is not delivered."""
    milter = replaced(blocked_mailusers=["no-such-user", users.bob.pw_uid if entry is int else entry])
    refused = mta.run_as("mst-bob", mta.smtp(postfix.port, "--mail-from", "bob@example.org"))
    assert "550 5.7.1 User mst-bob is blocked from sending mail" in refused.stdout.splitlines()
    send("mst-alice", postfix.port, "--mail-from", "alice@example.org")
    line = fields(milter, "from=bob@example.org")
    assert (line["user"], line["action"], line["reason"]) == ("mst-bob", "reject", "blocked")
    assert [message[NAME].split()[0] for message in postfix.wait_messages(1)] == ["user=mst-alice"]


def test_under_the_mtas_uid_users_are_named_and_refused(postfix: mta.Postfix, replaced: Any,
                                                        users: types.SimpleNamespace) -> None:
    """Never having been root; the program of others stays unknown where no rule lets lsof see it."""
    milter = replaced(user="postfix", lsof_command=[], blocked_mailusers=["mst-bob"])
    assert "550 5.7.1 User mst-bob" in mta.run_as("mst-bob", mta.smtp(postfix.port)).stdout
    send("mst-alice", postfix.port)
    (message,) = postfix.wait_messages(1)
    assert message[NAME] == "user=mst-alice program=?"
    assert fields(milter, queue_id(message))["lookup"] in ("no-helper", "not-permitted", "not-found")  # the last: hidepid
    assert milter.stop() == 0


def test_under_journald_a_line_begins_with_its_level(postfix: mta.Postfix, replaced: Any) -> None:
    """And has no time: journald has its own."""
    milter = replaced(journal=True, blocked_mailusers=["no-such-user"])
    send("mst-alice", postfix.port)
    (line,) = milter.wait_lines(queue_id(postfix.wait_messages(1)[0]))
    assert re.match(r"<6>\w+: client=127\.0\.0\.1:\d+ user=mst-alice uid=\d+ program=", line)
    assert all(re.match("<[46]>", line) for line in milter.lines()) and milter.lines("<4>blocked_mailusers: ")


def test_where_stderr_is_not_the_journals_a_line_has_its_time(replaced: Any) -> None:
    """A unit that sends it to a file instead leaves JOURNAL_STREAM to its children."""
    lines = replaced(env={"JOURNAL_STREAM": "9:4711"}).lines()
    assert lines and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ ", line) for line in lines)


@pytest.fixture(scope="module")
def without_netlink() -> list[str]:
    """Give a prefix for commands that takes netlink away from them; skip where it does not work."""
    prefix = mta.without_netlink(errno.EAFNOSUPPORT)
    if prefix is None:
        pytest.skip("no seccomp filter here to take netlink away")
    return prefix


def test_without_netlink_and_privilege_nobody_is_named(postfix: mta.Postfix, replaced: Any,
                                                       without_netlink: list[str]) -> None:
    """What psutil may not see stays unknown, and is not this process."""
    milter = replaced(prefix=without_netlink)
    send("mst-alice", postfix.port)
    (message,) = postfix.wait_messages(1)
    assert message[NAME] == "user=? program=?"
    assert fields(milter, queue_id(message))["lookup"] == "not-permitted"


def test_without_netlink_psutil_finds_the_user_and_the_program(postfix: mta.Postfix, replaced: Any,
                                                               without_netlink: list[str], sees_others: None) -> None:
    """The fallback for systems without sock_diag: said in the log, and right for who holds his own socket."""
    (postfix.directory / "queue/other").mkdir()  # where smtpd may look for it
    milter = replaced(prefix=without_netlink, run_as_user=None, blocked_mailusers=["mst-bob"],
                      socketname=f"{postfix.directory}/queue/other/milter.sock")
    os.chown(milter.socketname, pwd.getpwnam("postfix").pw_uid, -1)
    assert "psutil" in milter.lines("WARNING sock_diag")[0]
    for dial in ["127.0.0.1", "::ffff:127.0.0.1"] + ["::1"] * mta.has_ipv6():
        send("mst-alice", postfix.ports["other"], "--dial", dial)
    assert "550 5.7.1 User mst-bob is blocked" in mta.run_as("mst-bob", mta.smtp(postfix.ports["other"])).stdout
    assert {message[NAME] for message in postfix.wait_messages(2 + mta.has_ipv6())} == {"user=mst-alice program=python3"}
