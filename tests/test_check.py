# SPDX-License-Identifier: MIT
"""--check: one screen that says whether this installation will work, and what to do where it will not."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import shutil
import socket
import subprocess
import types
from typing import Any, Callable, Iterator, Mapping, Optional

import pytest

import mta

RULE = pathlib.Path("/etc/sudoers.d/zz-milter-test")
LOGGED = r"[-\d]+ [:\d]+ (ERROR|WARNING) "  # what the start logs, too
FORM = re.compile(rf"(ok  |warn|FAIL)  .+|      -> .+|      \w+ = .+, from .+; as delivered: .+|{LOGGED}.+")
SETTINGS_WELL = "ok    settings, and the socket's directory"


class Checked(types.SimpleNamespace):
    """What --check said: .status, .lines; .line(words) is the one that begins with ok, warn or FAIL and these."""

    def line(self, what: str) -> str:
        """Give the one line about something."""
        (line,) = [line for line in self.lines if line[6:].startswith(what)]
        return line

    def cure(self, what: str) -> str:
        """Give what it says to do about something."""
        return self.lines[self.lines.index(self.line(what)) + 1]


@pytest.fixture(scope="module")
def postfix(root: None) -> Iterator[mta.Postfix]:
    """Give an instance that is only configured; its settings are changed with .write()."""
    instance = mta.Postfix()
    yield instance
    instance.stop()


@pytest.fixture
def check(postfix: mta.Postfix, users: Any) -> Callable[..., Checked]:
    """Run --check: check({main.cf}, {master.cf's smtpd}, options of Milter and settings)."""
    def run(main_cf: Optional[Mapping[str, str]] = None, smtpd: Optional[Mapping[str, str]] = None,
            env: Optional[Mapping[str, str]] = None, **options: Any) -> Checked:
        postfix._write_config({**postfix._parameters("loopback-only", False, mta.pwd.getpwnam("nobody")),
                               "smtpd_forbid_unauth_pipelining": "yes", **(main_cf or {})}, (),
                              {"other": smtpd} if smtpd else {})
        (postfix.directory / "milter.log").unlink(missing_ok=True)
        milter = mta.Milter(postfix, args=["--check"], **options,
                            env={"PATH": mta.SYSTEM_PATH, "MAIL_CONFIG": f"{postfix.directory}/etc", **(env or {})})
        found = Checked(status=milter.run(), lines=milter.log().splitlines())
        assert all(map(FORM.fullmatch, found.lines)), found.lines
        assert len(found.lines) <= 24, "more than one screen"
        for line, after in zip(found.lines, [*found.lines[1:], ""]):
            logged = re.match(LOGGED, line)  # says it itself
            assert line.startswith(("ok", " ")) or logged or after.startswith("      -> "), f"no cure: {line}"
        return found

    postfix.ports["other"] = mta.free_port()
    return run


@pytest.fixture
def rule(sudo_works: None) -> Iterator[None]:
    """Install sudoers.example."""
    shutil.copy(mta.SCRIPT.with_name("sudoers.example"), RULE)
    RULE.chmod(0o440)
    yield
    RULE.unlink()


# --- looking up -------------------------------------------------------------------------------------------------

def test_as_root_all_is_well(check: Any, sees_others: None) -> None:
    """It makes a process of another user, and names it through the helper; each way has its time."""
    found = check({"non_smtpd_milters": "$smtpd_milters"})
    assert found.status == 0
    assert [line[:4] for line in found.lines if line[0] != " " and "cgroup" not in line] == ["ok  "] * 8
    assert found.lines[0] == SETTINGS_WELL
    assert re.fullmatch(r"ok    users: a connection made for this, \d+ us", found.line("users: a connection"))
    assert re.fullmatch(r"ok    programs: the helper, \d+ us: python3", found.line("programs: the helper"))


def test_an_lsof_that_does_not_see_the_program_is_a_warning(check: Any, proc_shown: None) -> None:
    """As it is without privilege; what the helper alone can do is said, too."""
    found = check(prefix=["setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"], lsof_command=["/usr/bin/lsof"])
    assert found.status == 0
    assert re.fullmatch(r"warn  programs: sudo lsof, \d+ us: \?: is not found \(\S+\)", found.line("programs: sudo lsof"))
    assert found.line("programs: the helper").startswith("warn")


def test_under_postfixs_uid_with_the_rule_lsof_names_programs(check: Any, rule: None, sees_others: None) -> None:
    """What the helper alone can do is said."""
    found = check(user="postfix")
    assert found.status == 0
    assert re.fullmatch(r"ok    programs: sudo lsof, \d+ us: python3", found.line("programs: sudo lsof"))
    assert found.line("programs: the helper").startswith("warn")  # root, and whoever a firewall redirects, need it


def test_under_postfixs_uid_without_the_rule_programs_are_a_warning(check: Any) -> None:
    """With its cure, and no failure."""
    found = check(user="postfix", lsof_command=["sudo", "-n", "/nonexistent/lsof"])
    assert found.status == 0
    assert found.line("programs: the helper").startswith("warn") and "start the milter as root" in found.cure("programs: the helper")
    assert found.line("programs: sudo lsof").startswith("warn")
    assert "sudoers.example" in found.cure("programs: sudo lsof")


def test_without_the_capabilities_the_program_is_a_warning_with_its_cure(check: Any, proc_shown: None) -> None:
    """As in a default container."""
    found = check(prefix=["setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"], lsof_command=[])
    assert found.status == 0
    assert found.line("users: a connection").startswith("ok")
    assert "without the privilege to see other users' processes" in found.line("programs: the helper")
    assert found.line("programs: the helper").startswith("warn") and found.line("programs: sudo lsof").startswith("warn")
    assert "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH" in found.cure("programs: the helper")


def test_a_kernel_that_does_not_answer_is_a_failure(check: Any) -> None:
    """Status 78: users cannot be found."""
    prefix = mta.without_netlink(errno.EPERM)
    if prefix is None:
        pytest.skip("no seccomp filter here to take netlink away")
    found = check(prefix=prefix)
    assert found.status == 78
    assert found.line("users: the kernel") == "FAIL  users: the kernel (sock_diag): sock_diag: Operation not permitted"
    assert "AF_NETLINK" in found.cure("users: the kernel")


def test_a_user_namespace_is_a_failure(check: Any) -> None:
    """All others' uids are one there, as under PrivateUsers=."""
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespace can be made here")
    found = check(prefix=["unshare", "-Ur"], run_as_user=None)
    assert found.status == 78
    assert "maps too few uids" in found.line("start as run_as_user")
    assert "PrivateUsers=" in found.line("start as run_as_user")


def test_a_container_with_all_its_users_is_well(check: Any, container: Callable) -> None:
    """Unprivileged LXC maps 65,536 uids: the user of whom the check makes a connection is not the one that stands for others."""
    found = check(**container(65536))
    assert found.status == 0
    assert found.line("users: a connection").startswith("ok")
    assert found.line("programs: the helper").endswith(": python3")


@pytest.mark.parametrize("user, status", [("postfix", 78), (None, 0)])
def test_a_root_that_may_not_become_another_user_is_no_traceback(user: Optional[str], status: int, check: Any) -> None:
    """A container without CAP_SETUID: no process of another user can be made, and no privilege dropped."""
    found = check(prefix=["setpriv", "--bounding-set=-setuid,-setgid"], run_as_user=user)
    assert found.status == status
    assert "CAP_SETUID" in found.cure("start as run_as_user" if user else "users: a connection")


@pytest.mark.parametrize("commands, state", [
    ("true", "warn"),
    ("mkdir a && mount -t cgroup2 none a", "ok  "),
    ("mkdir -p a/b && mount -t cgroup2 none a/b && mount -t tmpfs none a", "warn"),
    ("mkdir a && mount -t cgroup2 none a && mount -t tmpfs none a", "warn"),
    ("mkdir -m 700 a && mkdir a/b b && mount -t cgroup2 none a/b && mount -t cgroup2 none b", "ok  ")],
    ids=["absent", "there", "hidden", "covered", "in a closed directory, and elsewhere"])
def test_cgroup_v2_is_found_where_it_is_mounted(commands: str, state: str, check: Any) -> None:
    """Without it users and programs are found all the same."""
    alone = "umount -a -l -t cgroup2; mount -t tmpfs none /sys/fs/cgroup && cd /sys/fs/cgroup"
    prefix = ["unshare", "--mount", "sh", "-c", f'( {alone} && {commands}; ) >&2 && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace, or no cgroup v2, can be had here")
    found = check(prefix=prefix)
    assert found.status == 0
    assert found.line("programs: cgroup v2").startswith(state), found.lines
    assert found.line("users: a connection").startswith("ok")
    if mta.can_see_others():
        assert found.line("programs: the helper").endswith("python3")


# --- settings ---------------------------------------------------------------------------------------------------

def test_wrong_settings_are_all_named_with_status_78(check: Any) -> None:
    """And nothing is tried with them."""
    found = check(timeout=-1, blocked_action="bounce", header_fields="user")
    assert found.status == 78
    assert len(found.lines) == 3 and all(re.match(LOGGED, line) for line in found.lines)
    for name in "timeout = -1", "blocked_action = 'bounce'", "header_fields = 'user'":
        assert any(f" ERROR {name}: " in line for line in found.lines)


def test_a_directory_that_the_milter_may_not_write_to_is_a_failure(check: Any, tmp_path: pathlib.Path) -> None:
    """Found before mail depends on it."""
    found = check(socketname=f"{tmp_path}/milter.sock")
    assert found.status == 78
    assert found.lines[0].endswith(f"user postfix may not write to {tmp_path}")


def test_nothing_is_left_of_it(check: Any, postfix: mta.Postfix) -> None:
    """No socket is made; one of a running milter stays."""
    check()
    assert not os.path.exists(postfix.socketname)
    with mta.Milter(postfix) as milter:
        assert check().status == 0
        assert milter.accepts()


# --- Postfix ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("main_cf, smtpd, state", [
    ({}, {}, "ok"), ({"smtpd_milters": "unix:private/milter.sock"}, {}, "ok"),
    ({"smtpd_milters": "unix:other.sock, { unix:private/milter.sock, default_action=accept }"}, {}, "ok"),
    ({"smtpd_milters": "$mine", "mine": "unix:private/milter.sock"}, {}, "ok"),
    ({"smtpd_milters": "unix:$queue_directory/private/milter.sock"}, {}, "ok"),
    ({"smtpd_milters": ""}, {"smtpd_milters": "unix:private/milter.sock"}, "ok"),
    ({"smtpd_milters": "", "mine": "unix:private/milter.sock"}, {"smtpd_milters": "$mine"}, "ok"),
    ({"smtpd_milters": ""}, {}, "warn"), ({"smtpd_milters": "unix:private/milter.sock2"}, {}, "warn"),
    ({"smtpd_milters": "", "non_smtpd_milters": "unix:private/milter.sock"}, {}, "warn"),
    ({"smtpd_milters": "inet:127.0.0.1:8891"}, {}, "warn")])
def test_postfix_is_asked_whether_it_uses_this_socket(main_cf: dict, smtpd: dict, state: str, check: Any) -> None:
    """In main.cf or for one service; the cure can be pasted."""
    found = check(main_cf, smtpd)
    assert found.status == 0
    assert found.line("Postfix: smtpd_milters").startswith(state)
    if state == "warn":
        assert "smtpd_milters = { unix:private/milter.sock, default_action=accept }" in found.cure("Postfix: smtpd_milters")


@pytest.mark.parametrize("milters, state", [
    ("$smtpd_milters", "ok"), ("inet:127.0.0.1:8891, unix:private/milter.sock", "ok"), ("", "warn"), ("inet:127.0.0.1:8891", "warn")])
def test_postfix_is_asked_whether_it_shows_the_milter_what_sendmail_1_sends(milters: str, state: str, check: Any) -> None:
    """Else half of the door is open, and nothing says so."""
    found = check({"smtpd_milters": "unix:private/milter.sock", "non_smtpd_milters": milters})
    assert found.line("Postfix: non_smtpd_milters").startswith(state)
    if state == "warn":
        assert "postconf -e 'non_smtpd_milters = $smtpd_milters'" in found.cure("Postfix: non_smtpd_milters")


def test_where_a_map_chooses_milters_no_setting_is_advised_against_it(check: Any) -> None:
    """As in main.cf.example."""
    found = check({"smtpd_milters": "", "smtpd_milter_maps": "cidr:/etc/postfix/milter_local.cidr"})
    assert found.cure("Postfix: smtpd_milters").endswith(
        "look whether smtpd_milter_maps does: cidr:/etc/postfix/milter_local.cidr")


@pytest.mark.parametrize("value, state", [("yes", "ok"), ("no", "warn")])
def test_postfix_is_asked_whether_it_drops_hasty_clients(value: str, state: str, check: Any) -> None:
    """Which closes a race that the milter alone cannot."""
    found = check({"smtpd_forbid_unauth_pipelining": value})
    if not found.line("Postfix: smtpd_forbid").startswith("ok") and value == "yes":
        pytest.skip("this Postfix does not have it")
    assert found.line("Postfix: smtpd_forbid").startswith(state)
    if state == "warn":
        assert found.cure("Postfix: smtpd_forbid").endswith("postconf -e smtpd_forbid_unauth_pipelining=yes")


XCLIENT, PROXY = "smtpd_authorized_xclient_hosts", "smtpd_upstream_proxy_protocol"


@pytest.mark.parametrize("main_cf, smtpd, warned", [
    ({}, {}, ""), ({XCLIENT: "198.51.100.1"}, {}, XCLIENT), ({XCLIENT: "127.0.0.1"}, {}, XCLIENT),
    ({XCLIENT: "$mynetworks"}, {}, XCLIENT), ({PROXY: "haproxy"}, {}, PROXY), ({XCLIENT: ""}, {}, ""),
    ({}, {XCLIENT: "127.0.0.1"}, f"inet/{XCLIENT}"), ({}, {PROXY: "haproxy"}, f"inet/{PROXY}")])
def test_who_may_make_up_clients_is_warned_about(main_cf: dict, smtpd: dict, warned: str, check: Any) -> None:
    """XCLIENT and PROXY in main.cf and in master.cf, whoever may use them."""
    found = check(main_cf, smtpd)
    warnings = [line for line in found.lines if "choose the client's endpoints" in line]
    assert len(warnings) == bool(warned)
    assert not warned or f"{warned} = " in warnings[0]


def test_without_postconf_the_rest_is_still_checked(check: Any) -> None:
    """Sendmail has none."""
    prefix = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /usr/sbin/postconf && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces: postconf cannot be taken away")
    found = check(prefix=prefix)
    assert found.status == 0
    assert found.line("Postfix") == "warn  Postfix: there is no postconf to ask"
    assert found.line("users: a connection").startswith("ok")


def test_postconf_is_found_where_path_does_not_lead(check: Any, tmp_path: pathlib.Path) -> None:
    """As after su without "-"."""
    assert check(env={"PATH": f"{tmp_path}:/usr/bin:/bin"}).line("Postfix: smtpd_milters").startswith("ok")


def test_what_postconf_complains_of_is_said(check: Any, tmp_path: pathlib.Path) -> None:
    """A Postfix that was installed without a configuration has no main.cf."""
    found = check(env={"MAIL_CONFIG": str(tmp_path)})
    assert found.status == 0
    assert re.match("warn  Postfix: postconf says .*main.cf: No such file", found.line("Postfix"))


def test_a_socket_that_is_named_twice_is_warned_about(check: Any) -> None:
    """Each message would be counted and logged twice."""
    found = check({"smtpd_milters": "unix:private/milter.sock, { unix:private/milter.sock, default_action=accept }"})
    assert found.line("Postfix: smtpd_milters") == "warn  Postfix: smtpd_milters: names this socket twice"
    assert "smtpd_milters = { unix:private/milter.sock, default_action=accept }" in found.cure("Postfix: smtpd_milters")


@pytest.mark.parametrize("chroot, state", [("y", "warn"), ("n", "ok")])
def test_a_whole_path_that_a_chrooted_smtpd_does_not_find_is_warned_about(chroot: str, state: str, check: Any,
                                                                         postfix: mta.Postfix) -> None:
    """It looks for it below its queue directory: mail would pass untagged."""
    write = postfix._write_config

    def chrooted(*arguments: Any) -> None:
        write(*arguments)
        master = postfix.directory / "etc/master.cf"
        master.write_text(master.read_text().replace("inet n - n - - smtpd", f"inet n - {chroot} - - smtpd"))
    postfix._write_config = chrooted
    try:
        found = check({"smtpd_milters": f"unix:{postfix.socketname}"})
        assert found.line("Postfix: smtpd_milters").startswith(state)
        assert check({"smtpd_milters": "unix:private/milter.sock"}).line("Postfix: smtpd_milters").startswith("ok")
    finally:
        postfix._write_config = write
    if state == "warn":
        assert "chrooted" in found.line("Postfix: smtpd_milters")
        assert "smtpd_milters = { unix:private/milter.sock," in found.cure("Postfix: smtpd_milters")


def test_a_sudo_without_regular_expressions_is_warned_about(check: Any, tmp_path: pathlib.Path) -> None:
    """sudo-rs would never match the rule, and complain at each call."""
    for parent in tmp_path, *tmp_path.parents[:2]:
        parent.chmod(0o755)
    sudo = tmp_path / "sudo"
    sudo.write_text('#!/bin/sh\necho sudo-rs 0.2.8; test "$1" = --version\n')  # as it: the rule does not match
    sudo.chmod(0o755)
    found = check(user="postfix", lsof_command=[str(sudo), "-n", "/usr/bin/lsof"])
    assert found.status == 0
    assert found.line("programs: sudo lsof") == "warn  programs: sudo lsof: is not allowed: programs and root are unknown"
    assert "sudo-rs" in found.cure("programs: sudo lsof") and "start as root" in found.cure("programs: sudo lsof")


def test_listed_and_limited_users_who_do_not_exist_are_warned_about(check: Any) -> None:
    """All of them, each with its setting; the start says it too, and starts."""
    found = check(blocked_mailusers=["mst-nobody", "root"], hourly_limits={"mst-gone": 5, "*": 9, "root": None, 4711: 1})
    assert found.status == 0
    said = [line for line in found.lines if "is not found" in line]
    assert len(said) == 2 and all(re.match(LOGGED, line) for line in said)
    assert " hourly_limits: mst-gone is not found: " in said[0]
    assert " blocked_mailusers: mst-nobody is not found; " in said[1]


def test_what_differs_from_the_settings_as_delivered_is_shown(check: Any, tmp_path: pathlib.Path) -> None:
    """And whether the script or settings_file has it."""
    file = tmp_path / "milter_sysuser.conf"
    file.write_text("# ours\nhourly_limits = {'*': 9}\n")
    found = check(settings_file=str(file), timeout=5)
    assert "      timeout = 5, from the script; as delivered: 0" in found.lines
    assert f"      hourly_limits = {{'*': 9}}, from {file}, line 2; as delivered: {{}}" in found.lines
    assert not [line for line in found.lines if line.startswith("      header_name")]


def test_a_kernel_that_lets_nobody_be_traced_is_named(check: Callable[..., Checked]) -> None:
    """Redirected clients are then unknown."""
    yama = "/proc/sys/kernel/yama"
    for scope in 3, 2:
        found = check(prefix=["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {yama[:-5]} && mkdir {yama} && "
                              f'echo {scope} >{yama}/ptrace_scope && exec "$@"', "sh"])
        said = [line for line in found.lines if "what clients dialled" in line]
        assert said == ([found.line("kernel.yama.ptrace_scope = 3: ")] if scope == 3 else [])


@pytest.mark.parametrize("instead", ["nothing", "another's", "another's that has ended"])
def test_a_socket_whose_file_is_not_its_own_any_more_is_named(check: Callable[..., Checked], postfix: mta.Postfix,
                                                             instead: str) -> None:
    """A cleaner has removed it, or another milter has made its own there; in order again, nothing is said."""
    path = pathlib.Path(postfix.socketname)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as keeper, socket.socket(socket.AF_UNIX) as other:
        keeper.bind(str(path))
        keeper.listen()
        assert not [line for line in check().lines if line.startswith(f"warn  {path}")]
        path.unlink()
        if instead.startswith("another's"):
            other.bind(str(path))
            other.listen()
        if instead.endswith("ended"):
            other.close()
        found = check()
        assert "is not the socket any more" in found.line(str(path)) and "systemctl stop" in found.cure(str(path))
    path.unlink(missing_ok=True)
    assert not [line for line in check().lines if line.startswith(f"warn  {path}")]
