# SPDX-License-Identifier: MIT
"""The README's systemd units: clean, hardened, and the lookups work inside their limits, set without systemd."""

from __future__ import annotations

import json
import os
import pathlib
import pwd
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import types
from typing import Any, Callable, Iterator

import pytest

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

README = mta.SCRIPT.parent / "README.md"
EXPOSURE = 2.5  # the most that systemd-analyze security may say
Unit = dict[str, list[str]]
DEFAULTS = {name: rule.default for name, rule in ms.RULES.items()}

# Load, as systemd does, seccomp filters for: the system calls, the address families, memory written and executed.
SECCOMP = r'''
import ctypes, json, os, resource, sys
limits = json.loads(sys.argv[1])
lib = ctypes.CDLL("libseccomp.so.2")
lib.seccomp_init.restype = ctypes.c_void_p
class Compare(ctypes.Structure):  # struct scmp_arg_cmp
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]
EQUAL, MASKED_EQUAL, ALLOW, ERRNO = 4, 7, 0x7fff0000, 0x00050000
def load(default, action, rules):
    context = ctypes.c_void_p(lib.seccomp_init(default))
    for name, *compare in rules:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            rc = lib.seccomp_rule_add_array(context, action, number, len(compare), (Compare * len(compare))(*compare))
            assert rc == 0, (name, rc)
    assert lib.seccomp_load(context) == 0
if limits["no_write_execute"]:
    load(ALLOW, ERRNO | 1, [("mmap", Compare(2, MASKED_EQUAL, 6, 6)), ("mprotect", Compare(2, MASKED_EQUAL, 4, 4)),
                            ("pkey_mprotect", Compare(2, MASKED_EQUAL, 4, 4))])
load(ALLOW, ERRNO | 97, [("socket", Compare(0, EQUAL, family)) for family in range(64)
                         if family not in limits["families"]])
os.umask(limits["umask"])
most = min(limits["files"], resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1024), most))
load(ERRNO | 1, ALLOW, [(name,) for name in limits["calls"]])
os.execv(sys.argv[2], sys.argv[2:])
'''


def read_unit(name: str = "milter_sysuser.service") -> str:
    """Give a unit from the README's fence of that name."""
    return re.search(rf"^```ini {re.escape(name)}\n(\[Unit\]\n.*?)^```", README.read_text(), re.M | re.S)[1]


def parse(text: str) -> Unit:
    """Give the values of each key, in order; systemd's comments are lines of their own."""
    unit: Unit = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.M):
        unit.setdefault(key, []).append(value)
    return unit


def system_calls(filters: list[str]) -> list[str]:
    """Resolve SystemCallFilter= lines, the first an allow list, as systemd.exec(5) says."""
    listing = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    sets = {block.split()[0]: [line.strip() for line in block.splitlines()[1:] if line.strip()[:1] not in ("", "#")]
            for block in re.split(r"\n\n(?=@)", listing) if block.startswith("@")}

    def expand(word: str) -> set[str]:
        return set().union(*map(expand, sets[word])) if word[0] == "@" else {word}
    allowed = expand("@default")
    for line in filters:
        calls = set().union(*map(expand, line.lstrip("~").split()))
        allowed = allowed - calls if line[0] == "~" else allowed | calls
    return sorted(allowed)


def mounts(unit: Unit, private: pathlib.Path) -> str:
    """Write the shell commands that make the unit's mounts; private stands for its ReadWritePaths."""
    def read_only(path: str) -> str:
        return f"mount --rbind {path} {path}; mount -o remount,bind,ro {path}"
    lines = ["set -e"]
    if unit.get("ProtectSystem") == ["strict"]:
        lines += [read_only(path) for path in ("/etc", "/usr", "/var", "/opt", "/srv")]
        lines += [f"mount --bind {private} {private}; mount -o remount,bind,rw {private}"]
    if unit.get("ProtectHome") == ["yes"]:
        lines += [f"mount -t tmpfs -o mode=0 none {path}" for path in ("/home", "/root")]
    if unit.get("PrivateTmp") == ["yes"]:
        lines += ["mount -t tmpfs none /tmp"]
    if unit.get("ProtectKernelTunables") == ["yes"]:
        lines += [read_only("/proc/sys"), read_only("/sys")]
    if unit.get("ProtectControlGroups") == ["yes"]:
        lines += ["while read -r _ at kind _; do case $kind,$at in cgroup2,/sys/*) mount -o remount,bind,ro $at; esac; "
                  "done </proc/self/mounts"]
    return "; ".join([*lines, 'exec "$@"'])


def limited(unit: Unit, private: pathlib.Path) -> list[str]:
    """Give the command that runs another within the unit's limits, as far as that can be had without systemd."""
    user, capabilities = pwd.getpwnam(unit["User"][0]), ["-all"] + [
        "+" + name.lower()[4:] for name in unit["CapabilityBoundingSet"][0].split()]
    families = [getattr(socket, name) for name in unit["RestrictAddressFamilies"][0].split()]
    limits = {"calls": system_calls(unit["SystemCallFilter"]), "families": families, "umask": int(unit["UMask"][0], 8),
              "files": int(unit["LimitNOFILE"][0]), "no_write_execute": unit.get("MemoryDenyWriteExecute") == ["yes"]}
    ambient = ["-all"] + ["+" + name.lower()[4:] for name in unit["AmbientCapabilities"][0].split()]
    return ["unshare", "--mount", "sh", "-c", mounts(unit, private), "sh",
            "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups",
            "--bounding-set=" + ",".join(capabilities), "--inh-caps=" + ",".join(ambient),
            "--ambient-caps=" + ",".join(ambient), "--no-new-privs", mta.PYTHON, "-c", SECCOMP, json.dumps(limits)]


@pytest.fixture(scope="module")
def systemd() -> None:
    """Skip where systemd's own checker cannot run."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")


@pytest.fixture(scope="module")
def limits(systemd: None, root: None, sees_others: None) -> None:
    """Skip where the unit's limits cannot be set."""
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"],
                           capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespaces here, as in most containers: {tried.stderr.strip()}")


@pytest.fixture(scope="module")
def postfix(root: None) -> Iterator[mta.Postfix]:
    """Start a Postfix outside of /tmp, which the unit hides."""
    with tempfile.TemporaryDirectory(prefix="milter-test.", dir="/var/spool") as directory:
        with mta.Postfix(directory) as postfix:
            yield postfix


@pytest.fixture
def start(postfix: mta.Postfix, limits: None) -> Iterator[Any]:
    """Start the script within the limits of the README's unit, some of its lines replaced."""
    started = []

    def start(**replaced: list[str]) -> mta.Milter:
        unit = {**parse(read_unit()), **replaced}
        private = pathlib.Path(postfix.socketname).parent
        started.append(mta.Milter(postfix, prefix=limited(unit, private)))
        return started[-1].start()
    postfix.forget_messages()
    yield start
    for milter in started:
        milter.stop()


def header_of(postfix: mta.Postfix) -> str:
    """Send one message as mst-alice and give the header it got."""
    sent = mta.run_as("mst-alice", mta.smtp(postfix.port))
    assert sent.returncode == 0, sent.stdout
    return str(postfix.wait_messages(1)[0]["X-Sender-Process-Info"])


@pytest.fixture
def unit_file(tmp_path: pathlib.Path, systemd: None) -> pathlib.Path:
    """Give the README's service unit as a file, without the socket unit."""
    file = tmp_path / "milter_sysuser.service"
    file.write_text(read_unit())
    return file


def test_the_install_line_puts_both_units_and_nothing_else_into_place(tmp_path: pathlib.Path) -> None:
    """It needs no editor, and makes again what is there."""
    install = README.read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    line = re.search(r"^    (awk .*)$", install, re.M)[1].replace("/etc/systemd/system/", f"{tmp_path}/")
    for _ in range(2):
        subprocess.run(["sh", "-ec", line], cwd=README.parent, check=True)
    names = ["milter_sysuser.service", "milter_sysuser.socket"]
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: read_unit(name) for name in names}


def test_the_settings_that_the_readme_shows_are_a_settings_file(tmp_path: pathlib.Path, root: None) -> None:
    """As it stands there."""
    text = README.read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    conf = tmp_path / "milter_sysuser.conf"
    conf.write_text("".join(line[4:] + "\n" for line in text.splitlines() if line.startswith("    ")))
    sources, problems = ms.take_settings_file({**DEFAULTS, "settings_file": str(conf)})
    assert sources and not problems


@pytest.mark.parametrize("socket_unit", [True, False])
def test_systemd_finds_nothing_wrong_with_the_units(unit_file: pathlib.Path, socket_unit: bool) -> None:
    """Neither an error nor a warning, such as an unknown key, nor where the service misses the socket unit."""
    files = [str(unit_file)]
    if socket_unit:
        files.append(str(unit_file.with_suffix(".socket")))
        unit_file.with_suffix(".socket").write_text(read_unit("milter_sysuser.socket"))
    found = subprocess.run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *files],
                           capture_output=True, text=True)
    others = r"(/\S*/)?(?!milter_sysuser\.)[\w@.:\\-]+\.(service|socket|target|timer|mount|path|slice)(:\d+)?: "
    said = [line for line in (found.stdout + found.stderr).splitlines() if not re.match(others, line)]
    assert (found.returncode, said) == (0, [])


def test_the_unit_is_hardened(unit_file: pathlib.Path) -> None:
    """systemd-analyze security says 2.5 or less."""
    found = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit_file)],
                           capture_output=True, text=True)
    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", found.stdout)
    assert exposure and float(exposure[1]) <= EXPOSURE, found.stdout + found.stderr


def test_each_capability_and_each_exception_is_explained() -> None:
    """A comment of the unit names it."""
    text = read_unit()
    unit, comments = parse(text), " ".join(re.findall(r"^# (.*)$", text, re.M))
    exceptions = [word for key in ("CapabilityBoundingSet", "AmbientCapabilities", "RestrictAddressFamilies")
                  for word in unit[key][0].split()] + unit["SystemCallFilter"][-1].split()
    exceptions += [key for key in ("ProtectProc", "ProcSubset", "PrivateUsers", "PrivateNetwork") if key not in unit]
    assert not [word for word in exceptions if not re.search(rf"\b{word}\b", comments)]


def test_the_unit_starts_before_the_mta_and_again_unless_stopped_or_wrongly_set() -> None:
    """What depends on the script is as the script has it: its exit status, its user, its socket's directory."""
    unit = parse(read_unit())
    expected = {"Type": "notify", "NotifyAccess": "main", "Restart": "always", "SyslogFacility": "mail",
                "RestartPreventExitStatus": re.search(r"EX_CONFIG = .*(\d\d)  #", mta.SCRIPT.read_text())[1],
                "SyslogIdentifier": "milter_sysuser", "WantedBy": "multi-user.target", "SuccessExitStatus": "75",
                "ExecReload": unit["ExecStart"][0] + " --check", "Sockets": "milter_sysuser.socket",
                # 0 does not switch journald's limit off
                "LogRateLimitIntervalSec": "30s", "LogRateLimitBurst": "1000000"}
    assert {key: unit[key][0] for key in expected} == expected
    assert ms.STOP_SECONDS + 2 < int(unit["TimeoutStopSec"][0].rstrip("s")) < 90  # systemd's default
    assert unit["ExecReload"][1:] == ["/bin/kill -HUP $MAINPID"]
    assert {"postfix.service", "postfix@-.service", "sendmail.service"} <= set(unit["Before"][0].split())
    default = re.search(r'^run_as_user = "(\w+)"', mta.SCRIPT.read_text(), re.M)[1]
    assert unit["User"] == [default]
    directory = str(pathlib.Path(re.search(r'^socketname = "(.+)"', mta.SCRIPT.read_text(), re.M)[1]).parent)
    assert unit["ReadWritePaths"] == ["-" + directory] and unit["RequiresMountsFor"] == [directory]


def test_the_socket_unit_makes_what_the_script_would_make_itself() -> None:
    """The same path, for the same user alone, before the MTA."""
    unit, service = parse(read_unit("milter_sysuser.socket")), parse(read_unit())
    path = re.search(r'^socketname = "(.+)"', mta.SCRIPT.read_text(), re.M)[1]
    expected = {"ListenStream": path, "SocketUser": service["User"][0], "SocketMode": "0600",
                # before sockets.target it would make a circle with a directory that is mounted over the network
                "DefaultDependencies": "no", "Conflicts": "shutdown.target"}
    assert {key: unit[key][0] for key in expected} == expected and "WantedBy" not in unit
    assert set(service["Before"][0].split()) | {"shutdown.target"} == set(unit["Before"][0].split())
    assert service["Sockets"] == ["milter_sysuser.socket"]  # what starts it


def test_the_lookups_work_within_the_limits_of_the_unit(
        start: Any, postfix: mta.Postfix, users: types.SimpleNamespace) -> None:
    """User, program, exe and directory of another user's process are known, and nothing was complained about."""
    milter = start()
    assert header_of(postfix) == f"user=mst-alice program={pathlib.Path(mta.PYTHON).name}"
    line = milter.wait_lines("action=tag")[0]
    assert "=?" not in line.replace(" unit=?", ""), line
    assert not milter.lines("WARNING") and not milter.lines("ERROR"), milter.log()


def test_a_killed_milter_starts_again_within_the_limits_of_the_unit(
        start: Any, postfix: mta.Postfix, users: types.SimpleNamespace) -> None:
    """The socket that it left behind is cleaned up without root's help."""
    start().kill()
    assert pathlib.Path(postfix.socketname).exists()
    start()
    assert "user=mst-alice" in header_of(postfix)


@pytest.mark.parametrize("lines, said", [
    ({"RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6"]}, "psutil is used"),
    ({"CapabilityBoundingSet": ["CAP_DAC_READ_SEARCH"], "AmbientCapabilities": ["CAP_DAC_READ_SEARCH"]},
     "without the privilege"),
    ({"AmbientCapabilities": ["CAP_SYS_PTRACE"]}, "without the privilege"),
    ({"SystemCallFilter": ["@system-service", "~@privileged"]}, "capset"),
])
def test_a_limit_that_breaks_a_lookup_would_be_noticed_here(start: Any, lines: Unit, said: str) -> None:
    """The limits are really set: with one line too narrow the milter says what it lacks, or does not start."""
    try:
        log = start(**lines).log()
    except AssertionError as ended:
        log = str(ended)
    assert said in log


def test_systemd_is_told_that_it_is_ready_by_the_main_process_once_the_socket_is_there(
        postfix: mta.Postfix, root: None, tmp_path: pathlib.Path) -> None:
    """READY=1 comes from the pid that NotifyAccess=main accepts, and the socket then takes a connection."""
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        (tmp_path / "notify").chmod(0o666)
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        manager.settimeout(20)
        milter = mta.Milter(postfix, env={"NOTIFY_SOCKET": str(tmp_path / "notify")}).start(wait=False)
        try:
            data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(12))
            assert milter.accepts()
            assert (data.split(b"\n")[0], struct.unpack("3i", ancillary[0][2])[0]) == (b"READY=1", milter.pid)
        finally:
            assert milter.stop() == 0  # so that a stop is no failure


def test_when_journald_is_there_again_it_has_the_lines(
        root: None, make_milter: Callable[..., mta.Milter], tmp_path: pathlib.Path) -> None:
    """The stream that systemd gave the milter ends with journald. In between lines are lost, and mail is not."""
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    journald, stream = socket.socketpair()
    status = os.fstat(stream.fileno())
    milter = make_milter(prefix=["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /run && mkdir -p "
                                 f'/run/systemd/journal && mount --bind {tmp_path} /run/systemd/journal && exec "$@"',
                                 "sh"], env={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    milter.process = subprocess.Popen(milter.command, stdin=subprocess.DEVNULL, stderr=stream, **milter.options)
    stream.close()
    lines = journald.makefile("rb")
    assert any(line.startswith(b"<6>listening on ") for line in lines)
    lines.close()
    journald.close()
    for queue_id in "4ZNOBODY", "4ZLISTENS":
        with mta.Wire(milter.socketname) as wire:
            wire.connect()
            assert wire.message(queue_id=queue_id)[-1] == ("continue",)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again, mta.Wire(milter.socketname) as wire:
        again.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o666)
        again.settimeout(20)
        wire.connect()
        assert wire.message(queue_id="4ZHEARD")[-1] == ("continue",)
        fields = dict(line.split("=", 1) for line in again.recv(65536).decode().splitlines())
    assert fields.pop("MESSAGE").startswith("4ZHEARD: client=? ")
    assert fields == {"PRIORITY": "6", "SYSLOG_FACILITY": "2", "SYSLOG_IDENTIFIER": "milter_sysuser"}
    assert milter.stop() == 0


def test_a_log_pipe_whose_reader_has_gone_is_harmless(root: None, make_milter: Callable[..., mta.Milter]) -> None:
    """Mail is tagged or passed as before, and the milter ends as it is told."""
    reader, writer = os.pipe()
    milter = make_milter()
    milter.process = subprocess.Popen(milter.command, stdin=subprocess.DEVNULL, stderr=writer, **milter.options)
    os.close(writer)
    with open(reader, "rb") as lines:
        assert any(b" INFO listening on " in line for line in lines)
    with mta.Wire(milter.socketname) as wire:
        wire.connect()
        assert wire.message()[-1] == ("continue",)
    assert milter.stop() == 0
