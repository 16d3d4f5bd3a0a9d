# SPDX-License-Identifier: MIT
"""What the header and the log say of a sender: the fields that are asked for, of processes both ordinary and hostile."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from typing import Any, Callable, Iterator, Optional

import pytest

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

FIELDS = ["user", "uid", "program", "pid", "exe", "args", "dir", "unit"]
HEADER = "X-Sender-Process-Info"
PAIR = re.compile(r'(?:^|\s)([a-z]+)=(?:([A-Za-z0-9._+@/:-]+)|(\?)|"((?:[ !#-\[\]-~]|\\["\\]|\\x[0-9a-f]{2})*)")(?=\s|$)')
ESCAPE = re.compile(rb'\\(?:x([0-9a-f]{2})|(["\\]))')


def values(text: str) -> dict[str, Optional[bytes]]:
    """Read key=value fields back into bytes, None for "?"; AssertionError if there is anything else in it."""
    assert not PAIR.sub("", text).strip(), text
    found = {}
    for key, bare, unknown, quoted in PAIR.findall(text):
        assert key not in found, text
        found[key] = None if unknown else ESCAPE.sub(
            lambda m: bytes([int(m[1], 16)]) if m[1] else m[2], (bare or quoted).encode())
    return found


def logged(line: str) -> dict[str, Optional[bytes]]:
    """Read the fields of a message's line in the log."""
    return values(line.split(": ", 1)[1])


@pytest.fixture(scope="module")
def everything(users: types.SimpleNamespace) -> Iterator[types.SimpleNamespace]:
    """Start a Postfix (.postfix) with a milter (.milter) that says all it knows, in both places."""
    with mta.Postfix() as postfix, mta.Milter(postfix, header_fields=FIELDS, log_fields=FIELDS) as milter:
        yield types.SimpleNamespace(postfix=postfix, milter=milter)


@pytest.fixture
def site() -> Iterator[pathlib.Path]:
    """Make a directory that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="mst-site.") as name:
        pathlib.Path(name).chmod(0o755)
        yield pathlib.Path(name)


def sent(mail: types.SimpleNamespace, argv: list, user: str = "mst-alice", **options: Any) -> types.SimpleNamespace:
    """Run a client as that user; give its pid and the .header and .log values of its one message."""
    mail.postfix.forget_messages()
    before = len(mail.milter.lines("action="))
    with mta.as_user(user, argv, **options) as client:
        said, wrong = client.communicate(timeout=60)
        assert client.returncode == 0, f"{said}{wrong}"
    header = mail.postfix.wait_messages(1)[0][HEADER]
    line = mail.milter.wait_lines("action=", before + 1)[-1]
    return types.SimpleNamespace(pid=str(client.pid).encode(), line=line, text=header, log=logged(line),
                                 header=header and values(header))


def sent_with_args(mail: types.SimpleNamespace, argv: list, **options: Any) -> types.SimpleNamespace:
    """The same, once more while no arguments are said: they are not waited for long, and a busy machine may be late."""
    def one() -> Optional[types.SimpleNamespace]:
        found = sent(mail, argv, **options)
        return found if found.header.get("args") or found.log.get("args") else None
    return mta.wait_for(one, what="the arguments")


def test_each_field_says_what_it_is_called(everything: types.SimpleNamespace, users: types.SimpleNamespace,
                                           site: pathlib.Path, sees_others: None) -> None:
    """In the order of the settings, the same in the header and the log."""
    client = ["sh", "-c", 'exec "$@"', "sh", *mta.smtp(everything.postfix.port)]
    found = sent_with_args(everything, client, cwd=site)
    assert list(found.header) == FIELDS and [key for key in found.log if key in FIELDS] == FIELDS
    assert found.header == {key: found.log[key] for key in FIELDS}
    expected = {"user": b"mst-alice", "uid": b"%d" % users.alice.pw_uid, "program": b"python3", "pid": found.pid,
                "exe": os.fsencode(os.path.realpath(mta.PYTHON)), "dir": os.fsencode(site)}
    assert {key: found.header[key] for key in expected} == expected
    assert found.header["args"].startswith(mta.PYTHON.encode() + b" -c \nimport argparse, socket, sys\n")


@pytest.mark.parametrize("header, log", [(["args"], ["user"]), (["unit", "user"], ["args", "pid"]), (["dir"], [])])
def test_only_the_fields_asked_for_are_said(header: list[str], log: list[str], make_mail: Callable,
                                            users: types.SimpleNamespace) -> None:
    """In that order; the command line, which can hold secrets, in no other place."""
    mail = make_mail(header_fields=header, log_fields=log)
    said = "args" in header + log and mta.can_see_others()
    found = (sent_with_args if said else sent)(mail, mta.smtp(mail.postfix.port))
    assert list(found.header) == header
    assert [key for key in found.log if key in FIELDS] == log
    assert ("argparse" in found.text, "argparse" in found.line) == (
        ("args" in header, "args" in log) if mta.can_see_others() else (False, False))


def test_what_is_not_asked_for_is_not_read() -> None:
    """A command line costs a process of its own, and can be made to hang."""
    process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    assert set(ms.read_process(process, ("exe", "dir"))) == {"exe", "dir"}
    os.close(process)


def test_the_command_line_is_not_said_by_default(mail: types.SimpleNamespace, users: types.SimpleNamespace) -> None:
    """Nor anything of it."""
    found = sent(mail, mta.smtp(mail.postfix.port, "--header", "X-Secret: hunter2"))
    assert "hunter2" not in found.text + mail.milter.log() and "args" not in found.text + found.line


def test_without_fields_there_is_no_header_and_a_forged_one_is_removed(make_mail: Callable,
                                                                       users: types.SimpleNamespace) -> None:
    """The log goes on saying who it was."""
    mail = make_mail(header_fields=[])
    found = sent(mail, mta.smtp(mail.postfix.port, "--header", f"{HEADER}: user=root program=mutt", "--header", "X-Other: 1"))
    assert found.header is None and mail.postfix.messages()[0]["X-Other"] == "1"
    assert found.log["user"] == b"mst-alice" and found.log["action"] == b"pass"


def test_what_is_unknown_is_a_question_mark(make_mail: Callable, users: types.SimpleNamespace, proc_shown: None) -> None:
    """A milter that may not look at others' processes knows the user and nothing else."""
    mail = make_mail(header_fields=FIELDS, lsof_command=[],
                     prefix=["setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"])
    found = sent(mail, mta.smtp(mail.postfix.port))
    assert found.text.replace("\n\t", " ") == (f"user=mst-alice uid={users.alice.pw_uid} program=? pid=? exe=? args=? dir=? unit=?")
    assert found.log["lookup"] == b"not-permitted"


# --- processes that say of themselves what they like --------------------------------------------------------------

HOSTILE = b'a"\n\x1b[31m\xff user=root program=cron \xed\xa0\x80\\ \xe2\x80\xa8\r'  # quotes, lines, a colour, surrogates


def test_a_hostile_process_is_quoted(everything: types.SimpleNamespace, users: types.SimpleNamespace,
                                     site: pathlib.Path, sees_others: None) -> None:
    """Its name, arguments, directory and executable: one line, nothing but ASCII, no field that it made up."""
    directory = os.path.join(os.fsencode(site), HOSTILE)
    os.mkdir(directory)
    executable = os.path.join(directory, HOSTILE)
    shutil.copy(os.path.realpath(mta.PYTHON), executable)
    argv = [HOSTILE + b" x", b"-c", mta.SMTP_CLIENT.encode(), b"%d" % everything.postfix.port]
    found = sent_with_args(everything, argv, executable=executable, cwd=directory)
    for fields in found.header, found.log:
        assert fields["user"] == b"mst-alice" and fields["program"] == HOSTILE[:15]
        assert (fields["exe"], fields["dir"]) == (executable, directory)
        assert fields["args"].startswith(HOSTILE + b" x -c \nimport")
    assert found.line.isascii() and found.line.isprintable()
    assert re.sub(r"\n\t", "", found.text).isprintable() and found.text.isascii()


def test_long_values_are_cut_and_the_header_is_folded(everything: types.SimpleNamespace, users: types.SimpleNamespace,
                                                      site: pathlib.Path, sees_others: None) -> None:
    """Each to 256 characters that end in dots, never within an escape; no line passes 998 octets."""
    directory = os.path.join(os.fsencode(site), *[b"\xff" * 200] * 5)
    os.makedirs(directory)
    executable = os.path.join(directory, b"\xfe" * 255)
    shutil.copy(os.path.realpath(mta.PYTHON), executable)
    found = sent(everything, [b"\xfd" * 600, b"-c", mta.SMTP_CLIENT.encode(), b"%d" % everything.postfix.port],
                 executable=executable, cwd=directory)
    for field, start in ("exe", os.fsencode(site)), ("dir", os.fsencode(site)), ("args", b""):
        written = re.search(rf'{field}="([^"]*)"', found.text)[1]
        assert 252 < len(written) <= 256 and re.fullmatch(r"[ -\[\]-~]*(\\x[0-9a-f]{2})+\.\.\.", written)
        assert found.header[field].startswith(start) and found.header[field] == found.log[field]
    assert found.header["program"] == b"\xfe" * 15
    assert all(len(line) <= 998 for line in f"{HEADER}: {found.text}".split("\n"))


# --- PHP-FPM, units -----------------------------------------------------------------------------------------------

SEND_PHP = """<?php
$s = fsockopen('127.0.0.1', $_GET['port'] ?? getenv('PORT'));
foreach (['', "EHLO x\r\n", "MAIL FROM:<x@example.org>\r\n", "RCPT TO:<to@example.org>\r\n", "DATA\r\n",
          "Subject: x\r\n\r\nx\r\n.\r\n", "QUIT\r\n"] as $line) {
    fwrite($s, $line);
    do { $reply = fgets($s); } while ($reply !== false && $reply[3] == '-');
    echo $reply;
}
"""


def test_a_php_fpm_pool_is_named_with_its_user_and_dir_is_the_site(
        everything: types.SimpleNamespace, sees_others: None, users: types.SimpleNamespace, site: pathlib.Path) -> None:
    """Which of the customers, and which of his sites; the master is root, and a pool's worker makes the connection."""
    if not mta.Pools.program():
        pytest.skip("no php-fpm, or no cgi-fcgi to ask it")
    mail, before = everything.postfix, len(everything.milter.lines("action="))
    pools = {name: (f"mst-{user}", f"{site}/{user}.sock") for name, user in (("shop", "bob"), ("blog", "alice"))}
    with mta.Pools(site, pools) as fpm:
        for name, (user, _) in pools.items():
            mail.forget_messages()
            home = site / f"{name}.example.org"
            home.mkdir()
            (home / "send.php").write_text(SEND_PHP)
            answer = fpm.ask(name, home / "send.php", f"port={mail.port}")
            assert answer.rstrip().splitlines()[-1].startswith("221 "), answer
            found = values(mail.wait_messages(1)[0][HEADER])
            assert (found["user"], found["args"], found["dir"]) == (
                user.encode(), b"php-fpm: pool " + name.encode(), os.fsencode(home))
            assert found["program"].startswith(b"php-fpm")
            before += 1
            assert logged(everything.milter.wait_lines("action=", before)[-1])["args"] == found["args"]


@pytest.fixture
def cgroup() -> Iterator[pathlib.Path]:
    """Make a control group as systemd does for a service, with one below it as its user can."""
    root = mta.cgroup_v2()
    if root is None:
        pytest.skip("no cgroup v2 here")
    if re.search(r"^\d+:name=systemd:.*\.(service|scope)", pathlib.Path("/proc/self/cgroup").read_text(), re.M):
        pytest.skip("systemd's own hierarchy names the unit here")
    service = root / "mst-test.service"
    inner = service / "fake.scope"
    try:
        service.mkdir(exist_ok=True)
        inner.mkdir(exist_ok=True)
        (service / "cgroup.procs").read_text()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error.strerror}")
    yield inner
    inner.rmdir()
    service.rmdir()


def test_the_unit_is_the_service_and_not_what_it_made_below_itself(
        everything: types.SimpleNamespace, users: types.SimpleNamespace, cgroup: pathlib.Path, sees_others: None) -> None:
    """As the control group says; with its own root it is all the same."""
    everything.postfix.forget_messages()
    command = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec setpriv --reuid=mst-alice --regid=mst-alice --init-groups "$@"',
               str(cgroup), *mta.smtp(everything.postfix.port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "write error" in ran.stderr or "cannot create" in ran.stderr.lower():
        pytest.skip(f"no process can be put into a control group here: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stderr
    found = values(everything.postfix.wait_messages(1)[0][HEADER])
    assert (found["user"], found["unit"]) == (b"mst-alice", b"mst-test.service")
