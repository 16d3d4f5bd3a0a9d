# SPDX-License-Identifier: MIT
"""Settings and starting: what is wrong is one clear line each, all at once, before anything else happens."""

from __future__ import annotations

import ast
import glob
import itertools
import os
import pathlib
import pwd
import re
import socket
import subprocess
import sys
import tempfile
import types
from typing import Any, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

DEFAULTS = {name: rule.default for name, rule in ms.RULES.items()}
FIELDS = "must be a list of user, uid, program, pid, exe, args, dir, unit, none of them twice"
WRONG: dict[str, list[tuple[Any, str]]] = {  # setting -> (value, what is said of it)
    "socketname": [("milter.sock", "must be an absolute path"), ("/no/such/directory/sock", "no directory /no/such/dir"),
                   (None, "must be an absolute path"), ("/tmp/" + "x" * 103, "at most 107 bytes"), ("", "absolute path"),
                   ("/tmp/a\0b", "must be an absolute path"), (b"/tmp/sock", "absolute path"),
                   ("/tmp/\ud800", "all printable"), ("/tmp/a\nb", "all printable")],
    "timeout": [(True, "whole number of seconds from 0"), (-1, "whole number"), ("600", "whole number"),
                (1.5, "whole number"), (None, "whole number"), (1 << 31, "to 2147483")],
    "run_as_user": [("no-such-user-here", "there is no such user"), (0, "no such user"), ("", "no such user"),
                    ("post\0fix", "no such user"), (["postfix"], "no such user"), (True, "no such user")],
    "blocked_mailusers": [("bob", "must be a list"), (None, "must be a list"), ([True], "True is not a user name"),
                          (["two\twords"], "'two\\twords' is not"), ([-1], "-1 is not"), (["@"], "'@' is not"),
                          ({"bob"}, "must be a list"), ([["bob"]], "['bob'] is not"), (["²"], "'²' is not")],
    "blocked_mailusers_file": [("blocked", "must be an absolute path"), ("/no/such/file", "No such file"),
                               ("/dev/null", "not a regular file"), (["/etc/passwd"], "absolute path"), ("/etc", "/etc"),
                               (0, "absolute path"), ("/tmp/a\0b", ""), ("/etc/passwd", "line 1")],
    "allowed_mailusers": [("bob", "must be a list"), ([True], "True is not a user name"), ({"bob"}, "must be a list")],
    "settings_file": [("milter.conf", "must be an absolute path"), ("/etc", "Is a directory"), (7, "absolute path")],
    "blocked_action": [("refuse", "one of 'reject', 'tempfail', 'quarantine', 'log'"), ("accept", "one of"),
                       (None, "one of"), (["reject"], "one of")],
    "unidentified_action": [("log", "one of 'accept', 'tempfail', 'quarantine', 'reject'"), (True, "one of")],
    "hourly_limits": [(200, "must be like"), ({"*": True}, "'*': a limit is a whole number"), ({"*": -1}, "whole number"),
                      ({"*": "200"}, "whole number"), ({"no such:user": 1}, "there is no user 'no such:user'"),
                      ({"root": 1.5}, "'root': a limit"), ([("*", 200)], "must be like"), ({True: 1}, "no user True"),
                      ({None: 1}, "no user None"), ({"@root": 1}, "no user '@root'"), ({"4711": 1}, "no user '4711'")],
    "daily_limits": [(200, "must be like"), ({"*": -1}, "whole number"), ({1.5: 1}, "no user 1.5")],
    "container_networks": [("172.17.0.0/16", "must be a list"), (["172.17.0.1/16"], "'172.17.0.1/16' is not a network"),
                           (["fd00:17::1/64"], "no host bits set"), (["127.0.0.0/8"], "no loopback in it"),
                           (["0.0.0.0/0"], "no loopback"), (["::/0"], "no loopback"), (["::1"], "no loopback"),
                           (["::ffff:172.17.0.0/112"], "is not a network"), (["docker0"], "'docker0' is not a network"),
                           ([2886795264], "2886795264 is not"), ([b"1234"], "b'1234' is not"), (None, "must be a list"),
                           ([["172.17.0.0/16"]], "is not a network"), (["172.17.0.0/33"], "is not a network")],
    "header_name": [("X Sender", "printable ASCII"), ("X-Sender:", "no colon"), ("", "1 to 76"), ("X" * 77, "1 to 76"),
                    ("Sündër", "ASCII"), (None, "1 to 76"), ("X-A\nX-B", "printable"), (b"X", "1 to 76")],
    "header_fields": [("user", FIELDS), (["user", "nonsense"], FIELDS), (["user", "user"], "twice"), (None, FIELDS),
                      ([True], FIELDS), ([["user"]], FIELDS), (("user",), FIELDS)],
    "log_fields": [("uid", FIELDS), (["User"], FIELDS), (["pid", "pid"], "twice"), ({"user"}, FIELDS)],
    "lsof_command": [("sudo lsof", "must be a list of words"), ([1], "list of words"), (None, "list of words"),
                     ([""], "list of words"), (["a\0b"], "list of words")],
}
BATCHES = [dict(zip(WRONG, column)) for column in itertools.zip_longest(*WRONG.values())]
BATCHES = [{name: case for name, case in batch.items() if case} for batch in BATCHES]


def problems(milter: mta.Milter) -> list[str]:
    """Run it; give the errors it logged, having said nothing else and ended as on a wrong configuration."""
    assert milter.run() == 78, milter.log()
    assert all(" ERROR " in line for line in milter.lines()), milter.log()
    return [line.split(" ERROR ", 1)[1] for line in milter.lines()]


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    """Make a directory that users other than root can reach."""
    with tempfile.TemporaryDirectory(prefix="milter-test.") as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"{len(batch)} settings")
def test_every_wrong_setting_is_one_line_naming_setting_value_and_rule(batch: dict, make_milter: Callable,
                                                                       directory: pathlib.Path) -> None:
    """All of them at once, and none that is well."""
    (directory / "private").mkdir()
    os.chown(directory / "private", pwd.getpwnam("postfix").pw_uid, -1)
    lines = problems(make_milter(directory, **{name: value for name, (value, _) in batch.items()}))
    for name, (value, rule) in batch.items():
        own = [line for line in lines if line.startswith(f"{name} = {value!r}: ")]
        assert len(own) == 1 and rule in own[0], (name, value, lines)
    assert len(lines) == len(batch), lines


def test_the_settings_stand_in_the_script_as_delivered() -> None:
    """What --check compares them with is what the block says, in its order; each has its four parts."""
    block = mta.SCRIPT.read_text().partition("= settings\n")[2].partition("= end of settings")[0]
    delivered = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(block).body}
    assert DEFAULTS == delivered and list(DEFAULTS) == list(delivered)
    assert not [text for text in block.split("\n\n")[1:] if "The trap:" not in text or "Example:" not in text.replace("\n#", "")]


def test_several_wrong_entries_of_one_list_are_each_named(make_milter: Callable) -> None:
    """The administrator mends them in one go."""
    lines = problems(make_milter(blocked_mailusers=["root", "a:b", 7, True], hourly_limits={"*": -1, "no:pe": 1},
                                 container_networks=["10.0.3.0/24", "10.0.4.1/24", "::1/128", "fd00:17::/64"]))
    assert [line.rpartition("]: ")[2][:8] for line in lines if line.startswith("container_")] == ["'10.0.4.", "'::1/128"]
    assert [line.rpartition("]: ")[2][:5] for line in lines if line.startswith("blocked_")] == ["'a:b'", "True "]
    assert sum(line.startswith("hourly_limits") for line in lines) == 2


def test_check_reports_the_same_problems(make_milter: Callable) -> None:
    """--check finds them, and its exit status says so."""
    milter = make_milter(args=["--check"], timeout=True, header_name="")
    assert milter.run() == 78
    assert milter.lines("timeout = True: ") and milter.lines("header_name = '': ")


def test_settings_at_the_edge_of_what_is_allowed_are_taken(make_milter: Callable) -> None:
    """Empty lists, zeroes and the longest name; nothing of it is an error."""
    milter = make_milter(timeout=0, blocked_mailusers=[0, "4294967295", "@root"], blocked_action="log", header_fields=[],
                         hourly_limits={"*": None, "root": 0, 4711: 5}, header_name="X" * 76, log_fields=[],
                         lsof_command=[]).start()
    assert not milter.lines("ERROR")
    with mta.Wire(milter.socketname) as wire:
        assert wire.connect("192.0.2.9", 1) == [("continue",)]
        assert wire.message() == [("continue",)]


def test_a_blocked_name_that_does_not_exist_is_a_warning(make_milter: Callable) -> None:
    """A directory that is down at boot stops nothing."""
    milter = make_milter(blocked_mailusers=["no-such-user-here", "root", "@no-such-group"]).start()
    lines = milter.wait_lines("not found", 2)
    assert len(lines) == 2 and all(" WARNING blocked_mailusers: " in line for line in lines)
    assert "no-such-user-here is not found" in lines[0] and "@no-such-group is not found" in lines[1]


def test_a_limit_of_a_user_who_does_not_exist_is_a_warning(make_milter: Callable) -> None:
    """He may have been removed since: no reason not to start; the other limits hold."""
    milter = make_milter(hourly_limits={"no-such-user": 5, "root": None, 4711: 5, "nobody": 0}).start()
    (line,) = milter.lines("no-such-user")
    assert " WARNING hourly_limits: no-such-user is not found" in line
    with mta.Clients("nobody") as clients:
        assert clients.send(milter)[0].startswith("450 4.7.1 User nobody is over the limit of 0 ")


@pytest.mark.parametrize("setting, value", [
    ("timeout", "0x{digits}"), ("timeout", "'{nines}'"), ("run_as_user", "0x{digits}"), ("run_as_user", "'{nines}'"),
    ("blocked_mailusers", "[0x{digits}]"), ("blocked_mailusers", "['{nines}']"), ("allowed_mailusers", "['{nines}']"),
    ("blocked_mailusers_file", "0x{digits}"), ("hourly_limits", "{{'*': 0x{digits}}}"),
    ("hourly_limits", "{{'{nines}': 1}}"), ("hourly_limits", "{{0x{digits}: 1}}"), ("hourly_limits", "{{'*': '{nines}'}}"),
    ("header_fields", "[0x{digits}]"), ("lsof_command", "[0x{digits}]"), ("header_name", "0x{digits}")])
def test_a_number_of_5000_digits_in_the_script_is_a_problem_with_a_name(setting: str, value: str,
                                                                        make_milter: Callable) -> None:
    """Python itself refuses to write or read one that is not hexadecimal."""
    milter = make_milter()
    text = value.format(digits="f" * 5000, nines="9" * 5000)
    milter.script.write_text(re.sub(f"^{setting} = .*", f"{setting} = {text}", milter.script.read_text(), flags=re.M))
    (line,) = problems(milter)
    assert line.startswith(f"{setting} = ") and len(line) < 3000


@pytest.mark.parametrize("settings", [{"blocked_mailusers": ["root"]}, {"hourly_limits": {"*": 9}}], ids=str)
def test_a_list_that_the_unidentified_can_pass_is_warned_about(settings: dict, make_milter: Callable) -> None:
    """Only where something is set that unidentified_action accept leaves open."""
    assert make_milter(**settings).start().lines("WARNING unidentified_action is accept")
    assert not make_milter(unidentified_action="tempfail", **settings).start().lines("WARNING")


# --- the file of settings -------------------------------------------------------------------------------------

@pytest.fixture
def conf(directory: pathlib.Path) -> pathlib.Path:
    """Give the path of a settings file, which is not there yet."""
    return directory / "milter.conf"


def served_header(milter: mta.Milter) -> tuple[str, str]:
    """Give the name and the value of the header that a local client's message gets."""
    with mta.Clients("nobody") as clients:
        (wire,) = clients.wires(milter)
        with wire:
            return next(reply[-2:] for reply in wire.message() if reply[0] in ("addheader", "insheader"))


def test_a_settings_file_overrides_the_script(conf: pathlib.Path, make_milter: Callable) -> None:
    """Comments, blank lines, blanks and line ends of other systems do no harm; the script has what it does not name."""
    conf.write_text('# ours\n\n   \t\n  header_name="X-Sent-By"   # not X-Sender\nheader_fields\t= ["uid"]\r\n'
                    'log_fields = ["uid"]\n   # timeout = 1\nhourly_limits = {"nobody": 0x10, "*": None}')
    milter = make_milter(settings_file=str(conf), header_name="X-Other", log_fields=["user"], blocked_action="tempfail",
                         blocked_mailusers=["nobody"]).start()
    with mta.Clients("nobody") as clients:
        assert clients.send(milter) == ["450 4.7.1 User nobody is blocked from sending mail"]  # the script's
    assert f" uid={pwd.getpwnam('nobody').pw_uid} from=" in milter.wait_lines("action=")[0]
    conf.write_text(conf.read_text() + "\nblocked_mailusers = []\n")
    milter.kill()
    assert served_header(milter.start()) == ("X-Sent-By", f"uid={pwd.getpwnam('nobody').pw_uid}")


@pytest.mark.parametrize("content", [None, "", "\n\n", "# nothing\n#timeout = -1"], ids=repr)
def test_a_settings_file_that_is_missing_or_empty_changes_nothing(content: Any, conf: pathlib.Path,
                                                                  make_milter: Callable) -> None:
    """Nor is it complained about."""
    if content is not None:
        conf.write_text(content)
    milter = make_milter(settings_file=str(conf)).start()
    assert served_header(milter)[0] == "X-Sender-Process-Info"
    assert not milter.lines("ERROR") and not milter.lines("WARNING")


def test_as_postfix_a_settings_file_of_roots_or_his_own_counts(conf: pathlib.Path, make_milter: Callable) -> None:
    """Whoever starts it is trusted, and root is; another is not."""
    conf.write_text('header_name = "X-Sent-By"\n')
    for owner in "root", "postfix":
        os.chown(conf, pwd.getpwnam(owner).pw_uid, -1)
        milter = make_milter(user="postfix", settings_file=str(conf)).start()
        assert served_header(milter)[0] == "X-Sent-By"
    os.chown(conf, pwd.getpwnam("nobody").pw_uid, -1)
    (line,) = problems(make_milter(user="postfix", settings_file=str(conf)))
    assert f"{conf} must belong to root or uid {pwd.getpwnam('postfix').pw_uid}" in line


def test_every_problem_of_a_settings_file_is_one_line_with_its_place(conf: pathlib.Path, make_milter: Callable) -> None:
    """File, line, what stands there, and the rule; all at once, also those of the script."""
    wrong = [('tiemout = 5', "with the name of a setting"), ('settings_file = "/etc/other.conf"', "not of this file"),
             ('timeout', "must be name = value"), ('= 5', "must be name = value"), ('[settings]', "name = value"),
             ('blocked_action = reject', "a plain value"), ('log_fields = ["user",', "a plain value"),
             ('header_name =', "a plain value"), ("run_as_user = open('/etc/passwd')", "a plain value"),
             ('timeout: 5', "must be name = value"), ('DEFAULTS = {}', "with the name of a setting"),
             ('blocked_mailusers = ["a", "b"] + ["c"]', "a plain value"), ('header_name = "X\ufffd', "a plain value"),
             ('header_fields = ' + '[' * 500, "a plain value"), ('export timeout=5', "with the name of a setting")]
    conf.write_text("# line 1\n" + "".join(line + "\n" for line, _ in wrong))
    lines = problems(make_milter(settings_file=str(conf), timeout=-1))
    assert lines.pop() == "timeout = -1: must be a whole number of seconds from 0 to 2147483"
    for number, ((text, rule), line) in enumerate(zip(wrong, lines, strict=True), 2):
        assert line.startswith(f"{conf}, line {number}: {text!r}: ") and rule in line, line


def test_a_value_that_breaks_a_rule_is_named_with_its_place(conf: pathlib.Path, make_milter: Callable) -> None:
    """As a literal it is well; the setting, its value and its rule are said as for the script's, after its place."""
    conf.write_text('timeout = True\n# now\nblocked_mailusers = ["root", "a:b", -1]\nheader_fields = {}\n')
    assert problems(make_milter(settings_file=str(conf), lsof_command="lsof")) == [
        f"{conf}, line 1: timeout = True: must be a whole number of seconds from 0 to 2147483",
        *(f"{conf}, line 3: blocked_mailusers = ['root', 'a:b', -1]: {entry} is not a user name, a numeric uid or "
          '"@group"' for entry in ("'a:b'", "-1")),
        f"{conf}, line 4: header_fields = {{}}: {FIELDS}",
        "lsof_command = 'lsof': must be a list of words, or []"]


@pytest.mark.parametrize("line, rule", [
    ("hourly_limits = {'nobody': 0x" + "f" * 5000 + "}", "a mapping"), ("timeout = " + "9" * 5000, "a mapping"),
    ("timeout = " + repr("x" * 5000), "from 0 to 2147483"), ("timeout = " + "[" * 100000, "a mapping"),
    ("timeout = " + "-" * 100000 + "1", "a mapping"), ("timeout = " + "1+" * 50000 + "1", "a mapping"),
    ("blocked_mailusers = " + repr(["bob"] * 999 + ["a:b"]), "'a:b' is not a user name, a numeric uid or \"@group\""),
], ids=lambda text: text[:16])
def test_however_long_a_value_is_its_place_and_its_rule_are_said(line: str, rule: str, conf: pathlib.Path,
                                                                 make_milter: Callable) -> None:
    """A line of the log has an end."""
    conf.write_text(f"\n{line}\n")
    (said,) = problems(make_milter(settings_file=str(conf)))
    assert said.startswith(f"{conf}, line 2: ") and line[:17] in said and said.endswith(rule)


def test_a_setting_that_is_there_twice_is_told_with_both_places(conf: pathlib.Path, make_milter: Callable) -> None:
    """Neither is right until one of them has gone."""
    conf.write_text("timeout = 5\nblocked_mailusers = []\ntimeout = 5\n")
    (line,) = problems(make_milter(settings_file=str(conf)))
    assert line == f"{conf}, line 3: 'timeout = 5': is there twice, see {conf}, line 1"


@pytest.mark.parametrize("value", [
    "__import__('os').mkdir({path!r})", "open({path!r}, 'w')", "f'{{open({path!r}, \"w\")}}'",
    "[x for x in [open({path!r}, 'w')]]", "(lambda: open({path!r}, 'w'))()", "0\nopen({path!r}, 'w')",
    "exec(\"open({path!r}, 'w')\")", "`touch {path}`", "$(touch {path})"])
@pytest.mark.parametrize("args", [[], ["--check"]], ids=["start", "check"])
def test_a_settings_file_is_never_executed(value: str, args: list[str], conf: pathlib.Path,
                                           make_milter: Callable) -> None:
    """What a value would make if it were is not there."""
    made = conf.with_name("made")
    conf.write_text(f"timeout = {value.format(path=str(made))}\n")
    milter = make_milter(settings_file=str(conf), args=args)
    assert milter.run() == 78
    assert milter.lines("must be") and not made.exists() and "Traceback" not in milter.log()


def make_fifo(path: pathlib.Path) -> None:
    """Make it a FIFO: opening one waits for a writer."""
    os.mkfifo(path, 0o644)


def make_socket(path: pathlib.Path) -> None:
    """Make it a socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def written(data: bytes, mode: int = 0o644, owner: str = "root") -> Callable[[pathlib.Path], None]:
    """Make it a file of that user."""
    def write(path: pathlib.Path) -> None:
        path.write_bytes(data)
        path.chmod(mode)
        os.chown(path, pwd.getpwnam(owner).pw_uid, -1)
    return write


GOOD = b"timeout = 5\n"
UNTRUSTED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "writable by the group": (written(GOOD, 0o664), "must belong to root"),
    "writable by all": (written(GOOD, 0o646), "must belong to root"),
    "run_as_user's own": (written(GOOD, 0o644, "postfix"), "must belong to root"),
    "another user's": (written(GOOD, 0o600, "nobody"), "must belong to root"),
    "2 MB": (written(GOOD + b"#" * (2 << 20)), "is larger than 1048576 bytes"),
    "not UTF-8": (written(GOOD + b"# \xe4\n"), "is not UTF-8"), "FIFO": (make_fifo, "is not a regular file"),
    "directory": (pathlib.Path.mkdir, "Is a directory"), "socket": (make_socket, "No such device"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels"),
    "link to a FIFO": (lambda path: (make_fifo(path.with_suffix(".fifo")), path.symlink_to(path.with_suffix(".fifo"))),
                       "is not a regular file"),
    "below a file": (lambda path: (path.parent.rmdir(), path.parent.touch()), "Not a directory"),
}


@pytest.mark.parametrize("why", UNTRUSTED)
def test_a_settings_file_that_cannot_be_trusted_or_read_is_one_line(why: str, directory: pathlib.Path,
                                                                    make_milter: Callable) -> None:
    """It is not believed in part, nor passed over."""
    conf = directory / "place/milter.conf"
    conf.parent.mkdir()
    make, rule = UNTRUSTED[why]
    make(conf)
    (line,) = problems(make_milter(settings_file=str(conf)))
    assert line.startswith(f"settings_file = {str(conf)!r}: ") and rule in line


def test_a_settings_file_that_whoever_starts_it_may_not_read_is_one_line(conf: pathlib.Path,
                                                                         make_milter: Callable) -> None:
    """As postfix, a file that is for root's eyes is no reason to start with other settings."""
    written(GOOD, 0o600)(conf)
    (line,) = problems(make_milter(user="postfix", settings_file=str(conf)))
    assert line.startswith(f"settings_file = {str(conf)!r}: ") and "Permission denied" in line


@given(st.lists(st.one_of(st.text(), st.sampled_from(sorted(DEFAULTS)).flatmap(
    lambda name: st.one_of(st.text(), st.integers().map(repr), st.lists(st.text()).map(repr)).map(
        lambda value: f"{name} = {value}")))))
def test_each_line_of_a_settings_file_is_taken_or_named_and_none_is_both(lines: list[str]) -> None:
    """Whatever stands in it, nothing but settings changes."""
    text = "\n".join(lines).encode("utf-8", "replace")
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        values = {**DEFAULTS, "settings_file": file.name}
        sources, said = ms.take_settings_file(values)
    meant = [line for line in text.decode().split("\n") if line.strip() and not line.lstrip().startswith("#")]
    taken = list(sources.values())
    assert len(taken) + len(said) == len(meant) and set(values) == set(DEFAULTS)
    assert all(line.startswith(f"{file.name}, line ") for line in taken + said)


# --- who and where --------------------------------------------------------------------------------------------

def test_a_user_that_is_neither_root_nor_run_as_user_is_told_so(make_milter: Callable,
                                                                users: types.SimpleNamespace) -> None:
    """It could not drop to run_as_user, and must not serve under a third one."""
    milter = make_milter(user="mst-alice", run_as_user="postfix")
    os.chown(os.path.dirname(milter.socketname), pwd.getpwnam("postfix").pw_uid, -1)
    assert [line for line in problems(milter) if "run_as_user = 'postfix'" in line and str(users.alice.pw_uid) in line]


@pytest.mark.parametrize("run_as_user", [None, "mst-alice"])
def test_an_ordinary_user_can_run_it_as_himself(run_as_user: Any, make_milter: Callable,
                                                users: types.SimpleNamespace) -> None:
    """Named or not."""
    milter = make_milter(user="mst-alice", run_as_user=run_as_user).start()
    assert os.stat(milter.socketname).st_uid == users.alice.pw_uid
    assert not milter.lines("ERROR")


def test_a_root_that_may_not_become_run_as_user_is_one_line(make_milter: Callable) -> None:
    """A container without CAP_SETUID."""
    milter = make_milter(prefix=["setpriv", "--bounding-set=-setuid,-setgid"])
    assert milter.run() == 1
    (line,) = milter.lines()
    assert "ERROR could not start as postfix: " in line and "Operation not permitted" in line


def test_a_directory_that_run_as_user_may_not_write_to_is_a_problem(make_milter: Callable,
                                                                    directory: pathlib.Path) -> None:
    """Said before root is given up."""
    (line,) = problems(make_milter(socketname=f"{directory}/sock"))
    assert "socketname" in line and f"user postfix may not write to {directory}" in line


def test_a_directory_out_of_run_as_users_reach_is_one_line(make_milter: Callable, directory: pathlib.Path) -> None:
    """Its own mode is well, its parent's is not."""
    inner = directory / "inner"
    inner.mkdir()
    os.chown(inner, pwd.getpwnam("postfix").pw_uid, -1)
    directory.chmod(0o700)
    milter = make_milter(socketname=f"{inner}/sock")
    assert milter.run() != 0
    (line,) = milter.lines("ERROR")
    assert str(inner) in line and "Traceback" not in milter.log()


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link to nothing", "link to a socket"])
def test_what_is_not_a_socket_is_never_removed(kind: str, make_milter: Callable) -> None:
    """Whatever stands at the path stays there."""
    milter = make_milter()
    path = pathlib.Path(milter.socketname)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{path}.stale")
        {"file": lambda: path.write_text("precious"), "directory": path.mkdir, "fifo": lambda: os.mkfifo(path),
         "link to nothing": lambda: path.symlink_to("/no/such/file"),
         "link to a socket": lambda: path.symlink_to(f"{path}.stale")}[kind]()
        before = os.lstat(path)
        (line,) = problems(milter)
    assert f"socketname = '{path}': there is something at that path that is not a socket" in line
    assert os.lstat(path) == before and os.path.lexists(f"{path}.stale")


# --- the socket that is there already -------------------------------------------------------------------------

def test_a_second_start_leaves_the_first_its_socket(make_milter: Callable) -> None:
    """It says so in one line and exits; the first goes on serving."""
    first = make_milter().start()
    inode = os.stat(first.socketname).st_ino
    second = make_milter(socketname=first.socketname)
    assert second.run() not in (0, None)
    (line,) = second.lines()
    assert "ERROR" in line and "another milter is already serving" in line and first.socketname in line
    assert os.stat(first.socketname).st_ino == inode
    with mta.Wire(first.socketname) as wire:
        assert wire.connect("192.0.2.9", 1) == [("continue",)]


def test_a_socket_left_over_from_a_kill_is_cleaned_up(make_milter: Callable) -> None:
    """The next start just works."""
    milter = make_milter().start()
    milter.kill()
    assert os.path.exists(milter.socketname) and not milter.accepts()
    milter.start()
    assert milter.accepts()


def test_a_socket_that_may_not_be_cleaned_up_is_one_line(make_milter: Callable, directory: pathlib.Path) -> None:
    """Another user's, in a directory like /tmp, and nobody serves it."""
    directory.chmod(0o1777)
    milter = make_milter(user="postfix", socketname=f"{directory}/milter.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(milter.socketname)
    os.chmod(milter.socketname, 0o777)
    assert milter.run() == 1
    (line,) = milter.lines()
    assert f"ERROR {milter.socketname}: " in line and "Operation not permitted" in line


def test_without_a_connection_to_try_the_kernel_on_it_starts_later(make_milter: Callable) -> None:
    """Loopback may come up yet: a start without sock_diag would last until the next one, and name holders."""
    prefix = ["unshare", "--net"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces")
    milter = make_milter(prefix=prefix)
    assert milter.run() == 1
    (line,) = milter.lines()
    assert "ERROR a connection to 127.0.0.1, to try sock_diag on: " in line and "unreachable" in line


# A user holds every port that clients are given, for as long as the command lives: its arguments are uid, command...
HOLD_PORTS = """
import os, socket, sys, time
os.seteuid(int(sys.argv[1]))
held = [socket.socket(family) for family in (socket.AF_INET, socket.AF_INET6) for _ in range(10)]
for n, sock in enumerate(held):
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("", 40000 + n % 10))
os.seteuid(0)
command = os.getpid()
if os.fork() == 0:
    while os.getppid() == command:
        time.sleep(0.1)
    os._exit(0)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def test_users_who_take_every_port_do_not_keep_it_from_starting(make_milter: Callable) -> None:
    """It says that the kernel could not be tried on a connection of its own, and serves."""
    script = 'ip link set lo up && sysctl -qw net.ipv4.ip_local_port_range="40000 40009" && exec "$@"'
    prefix = ["unshare", "--net", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces")
    milter = make_milter(prefix=[*prefix, mta.PYTHON, "-c", HOLD_PORTS, str(pwd.getpwnam("nobody").pw_uid)])
    milter.start()
    assert "sock_diag could not be tried, all ports are taken" in milter.wait_lines("WARNING")[0]
    with mta.Wire(milter.socketname) as wire:
        wire.connect("192.0.2.99", 1)
        assert wire.message() == [("continue",)]


def test_a_socket_of_another_kind_is_left_alone(make_milter: Callable) -> None:
    """Some other program's: a datagram socket that is in use."""
    milter = make_milter()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(milter.socketname)
        assert milter.run() != 0
        (line,) = milter.lines()
        assert "ERROR" in line and milter.socketname in line
        assert os.path.exists(milter.socketname)


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_service_manager_is_told_when_the_socket_accepts(abstract: bool, make_milter: Callable,
                                                             directory: pathlib.Path) -> None:
    """READY=1 comes once, and not before a connection can be made."""
    name = f"{directory}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        manager.bind("\0" + name if abstract else name)
        if not abstract:
            os.chmod(name, 0o777)
        milter = make_milter(env={"NOTIFY_SOCKET": "@" + name if abstract else name}).start(wait=False)
        ready, status = manager.recv(1000).decode().split("\n")
        assert ready == "READY=1" and milter.accepts()
    assert status.startswith(f"STATUS=version {ms.VERSION}: users from sock_diag; programs through the helper")
    assert milter.lines(f"INFO {status[7:]}"), "the log has the same words"


def test_a_service_manager_that_is_gone_stops_nothing(make_milter: Callable) -> None:
    """It is one line in the log, and no traceback."""
    milter = make_milter(env={"NOTIFY_SOCKET": "/no/such/socket"}).start()
    milter.wait_lines("ERROR NOTIFY_SOCKET: ")
    with mta.Wire(milter.socketname) as wire:
        assert wire.connect("192.0.2.9", 1) == [("continue",)]
    assert milter.stop() == 0
    assert not milter.lines("Traceback")


# --- what it takes to run -------------------------------------------------------------------------------------

def link_packages(directory: pathlib.Path, which: str) -> None:
    """Put links to installed packages there."""
    code = "import psutil; print(psutil.__path__[0])"
    found = subprocess.run([mta.PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    for path in glob.glob(f"{pathlib.Path(found).parent}/{which}"):
        (directory / os.path.basename(path)).symlink_to(path)


def run_script(packages: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the script where only the packages in a directory are installed."""
    return subprocess.run([mta.PYTHON, "-S", str(mta.SCRIPT), *arguments], capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"})


@pytest.mark.parametrize("missing, there", [("Milter", "psutil*"), ("psutil", "[Mm]ilter*")])
def test_a_missing_package_is_one_line_that_names_it(missing: str, there: str, directory: pathlib.Path) -> None:
    """And says what to install, instead of a traceback."""
    link_packages(directory, there)
    for option, words in ("--version", "3."), ("--help", "exit status:"):
        ran = run_script(directory, option)
        assert words in ran.stdout and (ran.returncode, ran.stderr) == (0, "")
    ended = run_script(directory)
    assert ended.returncode == 78 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and f"'{missing}'" in ended.stderr and "pymilter" in ended.stderr


def test_a_pymilter_that_is_too_old_is_one_line(directory: pathlib.Path) -> None:
    """One whose strict decoding keeps forged headers from the milter's sight; help is to be had all the same."""
    link_packages(directory, "psutil*")
    (directory / "Milter.py").write_text("class Base:\n    pass\n\n\ndef noreply(callback):\n    return callback\n")
    assert "exit status:" in run_script(directory, "--help").stdout
    for arguments in [], ["--check"]:
        ended = run_script(directory, *arguments)
        assert ended.returncode == 78 and ended.stdout == ""
        assert ended.stderr.count("\n") == 1 and "pymilter is older than 1.0.5" in ended.stderr


def test_a_python_that_is_too_old_is_one_line() -> None:
    """As far as a newer one can show: the line comes before anything else, and an older one can read the file."""
    code = f"import runpy, sys; sys.version_info = (3, 8, 18); runpy.run_path({str(mta.SCRIPT)!r}, run_name='__main__')"
    ended = subprocess.run([mta.PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode != 0 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "needs Python 3.9 or newer" in ended.stderr
    ast.parse(mta.SCRIPT.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("args, status, said", [(["--version"], 0, "3."), (["--help"], 0, "--check"),
                                                (["--nonsense"], 2, "usage:"), (["positional"], 2, "usage:")])
def test_the_command_line_is_what_the_help_says(args: list[str], status: int, said: str, make_milter: Callable) -> None:
    """Nothing else is taken, and nothing is started."""
    milter = make_milter(args=args)
    assert milter.run() == status
    assert said in milter.log() and not os.path.exists(milter.socketname)
