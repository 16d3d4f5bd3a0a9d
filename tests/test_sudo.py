# SPDX-License-Identifier: MIT
"""The way to the program through sudo lsof: what the rule admits, what one lookup costs, and what is without the rule."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from typing import Any, Callable, Iterator, Sequence

import psutil
import pytest

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

EXAMPLE = mta.SCRIPT.with_name("sudoers.example")
RULE = pathlib.Path("/etc/sudoers.d/zz-milter-test")  # sudo reads no name with a dot
LSOF = "/usr/bin/lsof"
ALLOWED = ms.lsof_arguments([1, 4194304])


def sudo(*words: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """Run sudo as postfix, as the milter would."""
    return mta.run_as("postfix", ["sudo", "-n", *options, *words])


@pytest.fixture(scope="module")
def sudoers(sudo_works: None) -> Iterator[Callable[[str], None]]:
    """Install a rule until the module's end: sudoers(text)."""
    version = subprocess.run(["sudo", "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (1, 9, 10):
        pytest.skip("sudo is older than 1.9.10: no regular expressions")
    if sudo(LSOF, *ALLOWED, options=["-l"]).returncode == 0:
        pytest.skip("postfix may run lsof here already")

    def install(text: str) -> None:
        temporary = RULE.with_name("zz-milter.test")  # has a dot: not read while it is written
        temporary.write_text(text)
        temporary.chmod(0o440)
        temporary.rename(RULE)

    yield install
    RULE.unlink(missing_ok=True)


@pytest.fixture
def rule(sudoers: Callable[[str], None]) -> Iterator[None]:
    """Install sudoers.example."""
    sudoers(EXAMPLE.read_text())
    yield
    RULE.unlink()


@pytest.fixture
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.SimpleNamespace]:
    """Give a command that notes each call in .calls and then is another: wrapper.make(name, what to do then)."""
    directory = pathlib.Path(tmp_path_factory.mktemp("wrapper"))
    for parent in directory, *directory.parents[:2]:
        parent.chmod(0o755)
    calls = directory / "calls"
    calls.touch()
    calls.chmod(0o666)

    def make(name: str, then: str) -> str:
        path = directory / name
        path.write_text(f'#!/bin/sh\necho $$ "$@" >>{calls}\n{then}\n')
        path.chmod(0o755)
        return str(path)

    yield types.SimpleNamespace(make=make, calls=lambda: calls.read_text().splitlines())
    for line in calls.read_text().splitlines():  # what may be left hanging
        pid = int(line.split()[0])
        with contextlib.suppress(psutil.NoSuchProcess):
            if "sleep" in psutil.Process(pid).name():
                psutil.Process(pid).kill()


# --- the rule ---------------------------------------------------------------------------------------------------

def test_sudoers_example_parses_and_first_says_what_it_grants(tmp_path: pathlib.Path) -> None:
    """visudo accepts it; who pastes it has read what it gives; no wildcard form is there to paste."""
    if shutil.which("visudo") is None:
        pytest.skip("sudo is not installed")
    copy = shutil.copy(EXAMPLE, tmp_path / "rule")
    checked = subprocess.run(["visudo", "-c", "-f", str(copy)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    comment, text = EXAMPLE.read_text().split("\n\n", 1)
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "What it grants:" in comment and "1.9.10" in comment
    (arguments,) = re.findall(rf"{LSOF} (\S.*)", text)
    assert arguments.startswith("^-") and arguments.endswith("$") and ".*" not in arguments
    assert not re.search(rf"^[^#]*{LSOF} [^^]", EXAMPLE.read_text(), re.M)


@pytest.mark.parametrize("pids", [[1], [4194304], [1, 2, 4194304], range(1000000, 1000000 + ms.LSOF_PIDS)],
                         ids=["one", "the highest", "several", "as many as are asked about"])
def test_the_milters_own_call_is_admitted(pids: Sequence[int], rule: None) -> None:
    """Asked with -l, and run."""
    arguments = ms.lsof_arguments(pids)
    assert sudo(LSOF, *arguments, options=["-l"]).returncode == 0
    said = sudo(LSOF, *arguments).stderr.splitlines()
    assert [line for line in said if "unable to resolve host" not in line] == []  # a host name that nobody knows


def change(old: str, *new: str) -> list[str]:
    """Give the allowed arguments with one of them replaced."""
    at = ALLOWED.index(old)
    return [*ALLOWED[:at], *new, *ALLOWED[at + 1:]]


PIDS = ALLOWED[4]
REFUSED = {
    "no arguments": [], "every process": change(PIDS, ""), "no pids": change("-p"), "a leading zero": change(PIDS, "01"),
    "eight digits": change(PIDS, "12345678"), "a trailing comma": change(PIDS, "1,"), "an empty one": change(PIDS, "1,,2"),
    "an exclusion": change(PIDS, "^1"), "a sign": change(PIDS, "+1"), "a blank": change(PIDS, "1, 2"),
    "a newline in the pids": change(PIDS, "1\n"), "a newline before more": change("-Fpd", "-Fpd\n-D", "b/x"),
    "other digits": change(PIDS, "\u0661"), "a path": change(PIDS, "/etc/shadow"), "a wildcard": change(PIDS, "*"),
    "one more argument": [*ALLOWED, "/etc/shadow"], "an empty last one": [*ALLOWED, ""],
    "one before": ["-D", "b/tmp/x", *ALLOWED], "one after": [*ALLOWED, "-D", "b/tmp/x"], "repeat": [*ALLOWED, "-r"],
    "another order": [*ALLOWED[-1:], *ALLOWED[:-1]], "no -a": [word for word in ALLOWED if word != "-a"],
    "no -n": change("-nPw", "-Pw"), "all files": [word for word in ALLOWED if word != "-iTCP"],
    "other fields": change("-Fpd", "-Fpdn"), "all fields": change("-Fpd", "-F"), "udp": change("-iTCP", "-iUDP"),
    "upper case": change("-p", "-P"), "help": ["-h"], "a list of users": change("-p", "-u"),
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_any_other_argument_is_refused(arguments: list[str], rule: None) -> None:
    """When asked with -l as when run."""
    assert sudo(LSOF, *arguments, options=["-l"]).returncode != 0
    run = sudo(LSOF, *arguments)
    assert run.returncode != 0 and run.stdout == "" and run.stderr.startswith("sudo: "), run


@pytest.mark.parametrize("arguments", [
    ["-nPw -a", *ALLOWED[2:]], [*ALLOWED[:1], "-a -iTCP", *ALLOWED[3:]], [*ALLOWED[:2], "-iTCP -p", *ALLOWED[4:]],
    [*ALLOWED[:3], f"-p {PIDS}", "-Fpd"], [*ALLOWED[:4], f"{PIDS} -Fpd"], [" ".join(ALLOWED)]])
def test_words_run_together_get_nothing_from_lsof(arguments: list[str], rule: None) -> None:
    """sudo compares the words joined by blanks, and so cannot tell these apart; lsof can."""
    run = sudo(LSOF, *arguments)
    assert run.returncode != 0 and run.stdout == "" and "lsof: " in run.stderr, run


@pytest.mark.parametrize("options", [
    ["-u", "nobody"], ["-g", "root"], ["-u", "root", "-g", "adm"], ["-D", "/tmp"], ["-R", "/tmp"], ["-E"], ["-s"], ["-i"],
    ["-C", "9"], ["-T", "100"], ["LD_PRELOAD=/x"], ["LSOFDEVCACHE=/tmp/x"], ["-e"]])
def test_no_other_user_place_or_environment_is_admitted(options: list[str], rule: None) -> None:
    """Only root, as sudo makes it, with sudo's own time limit."""
    run = sudo(LSOF, *ALLOWED, options=options)
    assert run.returncode != 0 and run.stdout == "" and "sudo: " in run.stderr, run


@pytest.mark.parametrize("command", [["sudo", "-n", LSOF], ["sudo", LSOF], ["sudo", "-u", "root", "-n", LSOF]])
def test_the_rule_is_asked_for_with_the_options_that_lsof_command_has(command: list[str], rule: None,
                                                                      tmp_path: pathlib.Path) -> None:
    """And not found once it is gone."""
    code = "import ast, sys, milter_sysuser as ms; ms.lsof_command = ast.literal_eval(sys.argv[1]); print(ms.lsof_allowed())"
    argv = [mta.PYTHON, "-B", "-c", code, repr(command)]
    env = {"PATH": mta.SYSTEM_PATH, "PYTHONPATH": str(tmp_path)}
    shutil.copyfile(mta.SCRIPT, tmp_path / mta.SCRIPT.name)
    for parent in tmp_path, *tmp_path.parents[:2]:
        parent.chmod(0o755)
    assert mta.run_as("postfix", argv, env=env).stdout == "True\n"
    RULE.write_text("# none\n")
    assert mta.run_as("postfix", argv, env=env).stdout == "False\n"


@pytest.mark.parametrize("cure", [True, False], ids=["with its line", "without"])
def test_a_locked_account_calls_lsof_by_the_rules_line_for_it(cure: bool, sudoers: Any) -> None:
    """As postfix is from Postfix 3.11 on; here another user, with the rule as it is but for the name."""
    text, line = EXAMPLE.read_text().replace("postfix", "mst-locked"), "Defaults:mst-locked !pam_acct_mgmt\n"
    assert line in text
    try:
        mta.add_user("mst-locked")
        sudoers(text if cure else text.replace(line, ""))
        assert "account" not in mta.run_as("mst-locked", ["sudo", "-n", LSOF, *ALLOWED]).stderr
        subprocess.run(["usermod", "--lock", "--expiredate", "1", "mst-locked"], check=True, capture_output=True,
                       env={"PATH": mta.SYSTEM_PATH})
        for options in [], ["-l"]:
            ran = mta.run_as("mst-locked", ["sudo", "-n", *options, LSOF, *ALLOWED])
            assert ("account validation failure" in ran.stderr) is not cure, ran
    finally:
        mta.remove_user("mst-locked")


# --- the milter with the rule -----------------------------------------------------------------------------------

def test_the_program_is_named_through_sudo(rule: None, make_mail: Any, users: Any, sees_others: None) -> None:
    """Behind a real Postfix, started under its uid; the start line says which way."""
    mail = make_mail(user="postfix")
    assert mail.milter.lines("programs through sudo lsof")
    assert not mail.milter.helper_pids()
    sent = mta.run_as("mst-alice", mta.smtp(mail.postfix.port))
    assert sent.returncode == 0, sent.stdout
    (message,) = mail.postfix.wait_messages(1)
    assert message.get_all("X-Sender-Process-Info") == ["user=mst-alice program=python3"]
    (line,) = mail.milter.wait_lines("action=tag")
    assert " dir=?" in line and " exe=?" in line  # not to be read under postfix's uid
    assert "lookup=" not in line


def test_each_lookup_is_one_call_that_names_the_owners_processes(rule: None, sudoers: Any, wrapper: Any, users: Any,
                                                                 make_milter: Any, sees_others: None) -> None:
    """And no other user's; its arguments are the ones of the rule."""
    counted = wrapper.make("lsof", f'exec {LSOF} "$@"')
    sudoers(EXAMPLE.read_text().replace(LSOF, counted))
    milter = make_milter(user="postfix", lsof_command=["sudo", "-n", counted]).start()
    with mta.Clients("mst-alice", 3) as alice:
        assert alice.send(milter) == ["user=mst-alice program=python3"] * 3
        calls = [line.split()[1:] for line in wrapper.calls()]
        assert len(calls) == 3
        for call in calls:
            asked = [int(pid) for pid in call[4].split(",")]
            assert call == ms.lsof_arguments(asked)
            # where nobody reaps the zombies of earlier tests, they are among them
            assert [pid for pid in asked if not mta.ended(pid)] == [alice.process.pid]


def test_a_socket_that_none_of_the_owners_processes_has_is_not_found(rule: None, make_milter: Any, users: Any) -> None:
    """lsof that finds nothing is told from sudo that refuses: both give exit status 1."""
    milter = make_milter(user="postfix").start()
    with mta.Clients("mst-alice"):  # a candidate, with another socket
        os.seteuid(users.alice.pw_uid)
        try:
            held = mta.socket.socket()
        finally:
            os.seteuid(0)
        listener = mta.socket.create_server(("127.0.0.1", 0))
        with held, listener:
            held.connect(listener.getsockname())
            held.sendall(b"EHLO")
            accepted, _ = listener.accept()
            wire = mta.Wire(milter.socketname)
            wire.connect(*held.getsockname(), daemon_addr="127.0.0.1", daemon_port=str(listener.getsockname()[1]))
            accepted.recv(100)
            assert mta.outcome(wire) == "user=mst-alice program=?"
            accepted.close()
    assert len(milter.wait_lines("lookup=not-found")) == 1


def test_root_is_not_named_where_another_users_process_has_roots_socket(rule: None, make_milter: Any, users: Any,
                                                                       sees_others: None) -> None:
    """Every holder counts, not only the first that lsof lists."""
    milter = make_milter(user="postfix").start()

    def send(holder: str) -> str:
        with mta.socket.create_server(("127.0.0.1", 0)) as listener:
            with mta.socket.create_connection(listener.getsockname()) as held:
                held.sendall(b"EHLO")
                accepted, _ = listener.accept()
                process = mta.as_user(holder, ["cat"], pass_fds=[held.fileno()])
                wire = mta.Wire(milter.socketname)
                wire.connect(*held.getsockname(), daemon_addr="127.0.0.1", daemon_port=str(listener.getsockname()[1]))
                accepted.recv(100)
                header = mta.outcome(wire)
                process.communicate()
                accepted.close()
        return header
    # lsof asks about all processes, which may take it too long on a crowded machine
    mta.wait_for(lambda: send("root").startswith("user=root program="), 60, "root to be named")
    mta.wait_for(lambda: send("mst-bob") == "user=? program=?" and milter.lines("lookup=handed-down"), 60, "lsof")
    assert "holder=mst-bob" in milter.lines("lookup=handed-down")[0]


def test_when_the_helper_dies_programs_come_through_lsof(rule: None, wrapper: Any, make_milter: Any, users: Any,
                                                         sees_others: None) -> None:
    """Where the rule is there as well, which is asked then and not before; one error says so."""
    milter = make_milter(lsof_command=[wrapper.make("sudo", 'exec /usr/bin/sudo "$@"'), "-n", LSOF]).start()
    assert milter.lines("programs through the helper")
    assert not wrapper.calls()
    os.kill(milter.helper_pids()[0], signal.SIGKILL)
    (line,) = milter.wait_lines("the helper has ended")
    assert "programs come through lsof" in line
    with mta.Clients("mst-alice") as alice:
        assert alice.send(milter) == ["user=mst-alice program=python3"]


# --- a lsof that hangs ------------------------------------------------------------------------------------------

def running(wrapper: Any) -> list[int]:
    """Give the calls that have not ended."""
    return [pid for pid in (int(line.split()[0]) for line in wrapper.calls()) if not mta.ended(pid)]


def test_a_hanging_lsof_costs_a_bounded_time_and_few_processes(sudoers: Any, wrapper: Any, make_milter: Any,
                                                               users: Any) -> None:
    """Nor can it be ended; abandoned ones count; blocking goes on; it works again when they have ended."""
    hanging = wrapper.make("lsof", f'test -e "$0.well" && exec {LSOF} "$@"\ntrap "" TERM\nexec sleep 600')
    sudoers(EXAMPLE.read_text().replace(LSOF, hanging).replace("TIMEOUT=2s ", ""))
    milter = make_milter(user="postfix", lsof_command=["sudo", "-n", hanging], blocked_mailusers=["mst-bob"]).start()
    try:
        for count in 100, 10:  # the second burst finds the first one's processes still there
            with mta.Clients("mst-alice", count) as alice, mta.Clients("mst-bob") as bob:
                began = time.monotonic()
                burst = list(alice.wires(milter))
                assert [mta.outcome(wire) for wire in burst] == ["user=mst-alice program=?"] * count
                assert bob.send(milter) == ["550 5.7.1 User mst-bob is blocked from sending mail"]
                assert time.monotonic() - began < 60
            assert len(wrapper.calls()) == len(running(wrapper)) == ms.LSOF_PROCESSES
        assert len(milter.lines("lookup=timeout")) == ms.LSOF_PROCESSES and milter.lines("lookup=busy")
    finally:
        pathlib.Path(hanging + ".well").touch()
        for pid in running(wrapper):
            os.kill(pid, signal.SIGKILL)

    def works() -> bool:
        with mta.Clients("mst-alice") as alice:
            return alice.send(milter) == ["user=mst-alice program=" + ("python3" if mta.can_see_others() else "?")]
    mta.wait_for(works, 30, "a lookup after the hanging ones have ended")


def test_the_rules_own_time_limit_ends_a_call(sudoers: Any, wrapper: Any) -> None:
    """Whoever called it, and whether or not that one is still there."""
    hanging = wrapper.make("lsof", "exec sleep 600")
    sudoers(EXAMPLE.read_text().replace(LSOF, hanging))
    assert sudo(hanging, *ALLOWED).returncode != 0
    assert len(wrapper.calls()) == 1 and not running(wrapper)


def test_a_late_lsof_is_ended_although_it_runs_as_root(sudoers: Any, wrapper: Any, make_milter: Any, users: Any) -> None:
    """By a signal that sudo passes on; to kill sudo would leave it running."""
    hanging = wrapper.make("lsof", "exec sleep 600")
    sudoers(EXAMPLE.read_text().replace(LSOF, hanging).replace("TIMEOUT=2s ", ""))
    milter = make_milter(user="postfix", lsof_command=["sudo", "-n", hanging]).start()
    with mta.Clients("mst-alice") as alice:
        assert alice.send(milter) == ["user=mst-alice program=?"]
    assert len(milter.wait_lines("lookup=timeout")) == len(wrapper.calls()) == 1
    mta.wait_for(lambda: not running(wrapper), 20, "the end of what sudo ran")


def test_a_late_lsof_that_is_called_without_sudo_is_ended(proc_shown: None, wrapper: Any, make_milter: Any,
                                                          users: Any) -> None:
    """It does not outlive its time either."""
    hanging = wrapper.make("lsof", "exec sleep 600")
    milter = make_milter(user="postfix", lsof_command=[hanging]).start()
    with mta.Clients("mst-alice") as alice:
        assert alice.send(milter) == ["user=mst-alice program=?"]
    assert len(milter.wait_lines("lookup=timeout")) == len(wrapper.calls()) == 1
    mta.wait_for(lambda: not running(wrapper), 20, "the end of what hangs")


def test_a_sudo_that_hangs_at_the_start_is_ended(wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the start goes on without it."""
    hanging = wrapper.make("sudo", "exec sleep 600")
    monkeypatch.setattr(ms, "lsof_command", [hanging, "-n", LSOF])
    began = time.monotonic()
    assert not ms.lsof_allowed()
    assert time.monotonic() - began < 60 and len(wrapper.calls()) == 1
    mta.wait_for(lambda: not running(wrapper), 20, "the end of what hangs")


# --- the milter without the rule --------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"lsof_command": []}, {"lsof_command": ["/nonexistent/sudo", LSOF]}],
                         ids=["no rule", "switched off", "no sudo"])
def test_with_neither_way_users_are_right_and_the_program_says_why_not(settings: dict[str, Any], sudoers: Any,
                                                                       make_mail: Any, users: Any) -> None:
    """The start line says it too."""
    mail = make_mail(user="postfix", blocked_mailusers=["mst-bob"], **settings)
    assert mail.milter.lines("without the privilege to see other users' processes")
    assert not mail.milter.helper_pids()  # one without privilege would see no more than the milter does
    assert mta.run_as("mst-alice", mta.smtp(mail.postfix.port)).returncode == 0
    assert "550 5.7.1 User mst-bob is blocked" in mta.run_as("mst-bob", mta.smtp(mail.postfix.port)).stdout
    (message,) = mail.postfix.wait_messages(1)
    assert message.get_all("X-Sender-Process-Info") == ["user=mst-alice program=?"]
    assert "lookup=not-permitted" in mail.milter.wait_lines("action=tag")[0]
    assert not mail.milter.helper_pids()


def test_without_the_rule_sudo_is_asked_once_and_never_tried(sudoers: Any, wrapper: Any, make_milter: Any,
                                                            users: Any) -> None:
    """Each refused try would be logged and mailed to root."""
    counted = wrapper.make("sudo", 'exec /usr/bin/sudo "$@"')
    milter = make_milter(user="postfix", lsof_command=[counted, "-n", LSOF]).start()
    with mta.Clients("mst-alice", 5) as alice:
        assert alice.send(milter) == ["user=mst-alice program=?"] * 5
    assert [line.split()[1:4] for line in wrapper.calls()] == [["-n", "-l", "-n"]]


def test_a_rule_that_is_taken_away_is_noticed(rule: None, make_milter: Any, users: Any) -> None:
    """What sudo refuses is not permitted."""
    milter = make_milter(user="postfix").start()
    RULE.write_text("# none\n")
    with mta.Clients("mst-alice") as alice:
        assert alice.send(milter) == ["user=mst-alice program=?"]
    assert milter.wait_lines("lookup=not-permitted")
