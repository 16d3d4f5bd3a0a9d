# SPDX-License-Identifier: MIT
"""The parts that tests, try and bench share: throw-away Postfix instances, the milter as a process, clients.

Nothing here touches the system's own mail: every instance has its own directories and loopback port, has no
smtp(8) client, and discards what is not for its one domain.
"""

from __future__ import annotations

import ast
import ctypes
import email
import email.message
import functools
import grp
import json
import os
import pathlib
import pwd
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import psutil

PYTHON = "/usr/bin/python3"  # Debian's packages are this interpreter's, whichever comes first in PATH
SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "milter_sysuser.py"
README = SCRIPT.parent / "README.md"
DOMAIN = "example.org"  # the one domain that a test instance delivers
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PORTS: set[int] = set()  # that free_port() has given; who asked for several binds none before he has all
CAPABILITIES = {"CAP_DAC_READ_SEARCH": 2, "CAP_SYS_PTRACE": 19}  # linux/capability.h


def runs_programs(place: str) -> bool:
    """Say whether programs there can be run, setgid ones too, as far as its mount goes."""
    return not os.statvfs(place).f_flag & (os.ST_NOSUID | os.ST_NOEXEC)


# Other users must reach what is made here, and run it; a socket's name has room for 107 bytes.
os.umask(0o022)
tempfile.tempdir = os.environ["TMPDIR"] = next(filter(runs_programs, ("/tmp", "/var/tmp")), "/tmp")


# --- waiting, ports, privilege ---------------------------------------------------------------------------------

def ended(pid: int) -> bool:
    """Say whether a process has ended, be it at this moment; a zombie that nobody reaps has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], Any], timeout: float = 10, what: str = "the condition") -> Any:
    """Poll until condition() is true and return its value; raise AssertionError naming `what` after timeout s."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain for {what}")
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Find a TCP port free on every address and below the ephemeral range, so that no client takes it meanwhile."""
    while True:
        port = random.randrange(10000, 30000)
        if port in PORTS:
            continue
        try:
            for family, address in (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"):
                if family == socket.AF_INET6 and not has_ipv6():
                    continue
                with socket.socket(family) as sock:
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    sock.bind((address, port))
            PORTS.add(port)
            return port
        except OSError:
            continue


def has_ipv6() -> bool:
    """Say whether ::1 can be bound here; many containers have no IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def kernel_has_ipv6() -> bool:
    """Say whether there are IPv6 sockets, for v4-mapped addresses at least; ::1 may be switched off."""
    try:
        socket.socket(socket.AF_INET6).close()
        return True
    except OSError:
        return False


def leave_chroot() -> None:
    """Make a chroot's directory the root of a mount namespace of its own, where the tests' namespaces can be made.

    In a plain chroot the kernel lets no user make a user namespace, and unshare(1) cannot set the propagation of "/".
    To enter a mount namespace, if only one's own, leads to its root (setns(2)), which tells whether this is a chroot.
    Without the privilege, or /proc, nothing changes.
    """
    libc, own = ctypes.CDLL(None), "/proc/self/ns/mnt"
    if not os.path.exists(own):
        return
    root, here, space = (os.open(path, os.O_RDONLY) for path in ("/", ".", own))
    try:
        if libc.setns(space, 0):
            return
        if os.path.samestat(os.stat("/"), os.fstat(root)):
            os.fchdir(here)
            return
        os.fchdir(root)
        if not libc.unshare(0x20000):  # CLONE_NEWNS
            outside = os.getcwd().encode()
            libc.mount(None, b"/", None, 0x84000, None)  # MS_REC | MS_SLAVE: nothing of this is seen outside
            libc.mount(outside, outside, None, 0x5000, None)  # MS_BIND | MS_REC
            os.chdir(outside)
            libc.mount(b".", b"/", None, 0x2000, None)  # MS_MOVE
        os.chroot(".")
        os.chdir(SCRIPT.parent)
    finally:
        for descriptor in root, here, space:
            os.close(descriptor)


def missing_capabilities() -> list[str]:
    """Name the capabilities that reading other users' /proc/PID/fd takes and that this process lacks."""
    status = pathlib.Path("/proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*(\w+)", status, re.M)[1], 16)
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]


def can_see_others() -> bool:
    """Say whether this process may see which process of another user holds a socket."""
    return not missing_capabilities()


def cgroup_v2() -> Optional[pathlib.Path]:
    """Give a place where cgroup v2 is mounted and not covered by another mount; None if there is none."""
    mounts = [line.split() for line in pathlib.Path("/proc/self/mounts").read_text().splitlines()]
    places = (pathlib.Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2")
    return next((place for place in places if (place / "cgroup.controllers").exists()), None)


# A seccomp filter under which socket(AF_NETLINK, ...) fails with an errno, for a command: its arguments are these.
NO_NETLINK = """
import ctypes, os, struct, sys
arch, number = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[os.uname().machine]
code = [(0x20, 0, 0, 4), (0x15, 0, 5, arch), (0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16),
        (0x15, 0, 1, 16), (0x06, 0, 0, 0x00050000 | int(sys.argv[1])), (0x06, 0, 0, 0x7FFF0000)]
filter = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(filter)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.addressof(program), 0, 0):
    sys.exit("no seccomp: " + os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def without_netlink(refusal: int) -> Optional[list[str]]:
    """Give a prefix for commands under which a netlink socket fails with that errno; None where it does not work."""
    prefix = [PYTHON, "-c", NO_NETLINK, str(refusal)]
    tried = subprocess.run([*prefix, PYTHON, "-c", "import socket; socket.socket(socket.AF_NETLINK)"],
                           capture_output=True, text=True)
    return prefix if f"[Errno {refusal}]" in tried.stderr else None


# A user namespace in which so many uids and gids, from 0 up, are the host's from 100000 up; its root runs a command.
USER_NAMESPACE = """
import ctypes, os, sys
ready, go = os.pipe()
child = os.fork()
if child == 0:  # who writes the maps has to stay outside
    os.close(go)
    if os.read(ready, 1):
        for name in "uid_map", "gid_map":
            with open("/proc/%d/%s" % (os.getppid(), name), "w") as file:
                file.write("0 100000 " + sys.argv[1])
    os._exit(0)
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit("no user namespace")
os.write(go, b"x")
if os.waitpid(child, 0)[1]:
    sys.exit("no uid map")
os.setgroups([])
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def user_namespace(uids: int) -> Optional[list[str]]:
    """Give a prefix for commands in a container with that many uids, the host's from 100000; None if there can be none."""
    prefix = [PYTHON, "-c", USER_NAMESPACE, str(uids)]
    return None if subprocess.run([*prefix, "true"], capture_output=True).returncode else prefix


def tag(user: str, program: str) -> str:
    """Give the header of a message of that user and program; the program is unknown where none can be seen."""
    return f"user={user} program={program if can_see_others() else '?'}"


# --- users ----------------------------------------------------------------------------------------------------

def add_user(name: str, home: bool = False) -> pwd.struct_passwd:
    """Make a system user for a test; one left over from an aborted run is taken as it is."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        subprocess.run(["useradd", "--create-home" if home else "--no-create-home", "--shell", "/bin/sh",
                        "--key", "UID_MIN=50000", "--key", "UID_MAX=59999", name],  # not what a chroot's host has
                       check=True, capture_output=True, env={"PATH": SYSTEM_PATH})
        return pwd.getpwnam(name)


def remove_user(name: str) -> None:
    """Remove a test's user and home; --force because processes of another root directory may have its number."""
    subprocess.run(["userdel", "--force", "--remove", name], check=False, capture_output=True,
                   env={"PATH": SYSTEM_PATH})


def identity(name: str) -> dict:
    """Give subprocess's arguments for running as that user, with its groups."""
    user = pwd.getpwnam(name)
    return {"user": user.pw_uid, "group": user.pw_gid, "cwd": "/",
            "extra_groups": os.getgrouplist(name, user.pw_gid)}


def as_user(name: str, argv: Sequence[str], **kw: Any) -> subprocess.Popen:
    """Start argv as that user; its standard streams are text pipes unless said otherwise."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(argv), **{**identity(name), **pipes, **kw})


def run_as(name: str, argv: Sequence[str], **kw: Any) -> subprocess.CompletedProcess:
    """Run argv as that user to its end (60 s at most) and capture what it prints."""
    return subprocess.run(list(argv), **{**identity(name), "capture_output": True, "text": True,
                                         "timeout": 60, **kw})


def on_this_postfix(postfix: Postfix, argv: Sequence[str], user: Any = "root") -> list[str]:
    """Give a command that runs argv, as a user or uid, where /etc/postfix (for sendmail(1)) is this instance's."""
    groups = ["--clear-groups"] if isinstance(user, int) else ["--init-groups"]
    gid = user if isinstance(user, int) else pwd.getpwnam(user).pw_gid
    return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/postfix && exec "$@"', f"{postfix.directory}/etc",
            "setpriv", "--reuid", str(user), "--regid", str(gid), *groups, "--", *argv]


def submit(postfix: Postfix, user: Any, text: "str | bytes", *args: str, **kw: Any) -> subprocess.CompletedProcess:
    """Hand a message to sendmail(1) as a user or uid, for to@example.org unless args say something else."""
    argv = on_this_postfix(postfix, ["sendmail", *(args or ("-i", f"to@{DOMAIN}"))], user)
    return subprocess.run(argv, **{"input": text, "text": isinstance(text, str), "capture_output": True, "cwd": "/",
                                   "env": {"PATH": SYSTEM_PATH}, "timeout": 60, **kw})


# --- what is started and stopped ------------------------------------------------------------------------------

class Instance:
    """What is started with "with", writes a log into its directory, and is stopped whatever happens."""

    directory: pathlib.Path
    log_name: str

    def start(self) -> Any:
        """Start it, and give it back when it serves."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop it."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def log(self) -> str:
        """Give the text of its log."""
        path = self.directory / self.log_name
        return path.read_text(errors="backslashreplace") if path.exists() else ""


# --- Postfix --------------------------------------------------------------------------------------------------

MASTER_CF = """\
cleanup   unix n - n - 0 cleanup
qmgr      unix n - n 300 1 qmgr
pickup    unix n - n 60 1 pickup
rewrite   unix - - n - - trivial-rewrite
bounce    unix - - n - 0 bounce
defer     unix - - n - 0 bounce
trace     unix - - n - 0 bounce
proxymap  unix - - n - - proxymap
anvil     unix - - n - 1 anvil
tlsmgr    unix - - n 1000? 1 tlsmgr
showq     unix n - n - - showq
error     unix - - n - - error
retry     unix - - n - - error
discard   unix - - n - - discard
virtual   unix - n n - - virtual
postlog   unix-dgram n - n - 1 postlogd
"""
QUEUE_DIRECTORIES = {"maildrop": 0o730, "public": 0o710,  # postfix-files; the others 0700
                     **dict.fromkeys("private active bounce corrupt defer deferred flush hold incoming saved trace"
                                     .split(), 0o700)}


class Postfix(Instance):
    """A Postfix of its own on a free port of loopback, that delivers example.org into one Maildir.

    directory  where it lives; None makes a temporary one, removed by stop()
    main_cf    parameters to add or replace, e.g. {"smtpd_milters": ""}
    master     further lines of master.cf
    services   further smtpd services, each on a port of its own: name -> {parameter: value}; see .ports
    addresses  inet_interfaces: "all" also listens on the host's other addresses
    discard    throw accepted mail away instead of delivering it, for loads
    """

    log_name = "maillog"

    def __init__(self, directory: Optional[os.PathLike] = None, main_cf: Optional[Mapping[str, str]] = None,
                 master: Sequence[str] = (), services: Optional[Mapping[str, Mapping[str, str]]] = None,
                 addresses: str = "loopback-only", discard: bool = False) -> None:
        self.temporary = directory is None
        self.directory = pathlib.Path(directory or tempfile.mkdtemp(prefix="milter-test."))
        self.directory.mkdir(exist_ok=True)
        self.directory.chmod(0o755)
        self.port = free_port()
        self.ports = {name: free_port() for name in services or {}}
        nobody, owner = pwd.getpwnam("nobody"), pwd.getpwnam("postfix")
        for name in "etc", "queue", "queue/pid", "mail":
            (self.directory / name).mkdir(exist_ok=True)
        os.chown(self.directory / "mail", nobody.pw_uid, -1)
        for name in ["data", *(f"queue/{name}" for name in QUEUE_DIRECTORIES)]:
            (self.directory / name).mkdir(exist_ok=True)
            os.chown(self.directory / name, owner.pw_uid, grp.getgrnam("postdrop").gr_gid)
            (self.directory / name).chmod(QUEUE_DIRECTORIES.get(name[6:], 0o700))
        self._write_config({**self._parameters(addresses, discard, nobody), **(main_cf or {})}, master,
                           services or {})

    def _parameters(self, addresses: str, discard: bool, nobody: pwd.struct_passwd) -> dict[str, str]:
        """Give main.cf: nothing leaves this host, nothing asks the DNS, nothing waits."""
        return {
            "compatibility_level": "3.6",
            "queue_directory": f"{self.directory}/queue",
            "data_directory": f"{self.directory}/data",
            "maillog_file": f"{self.directory}/maillog",
            "maillog_file_prefixes": str(self.directory),
            "myhostname": f"mail.{DOMAIN}", "mydestination": "", "alias_maps": "", "local_recipient_maps": "",
            "mynetworks": "127.0.0.0/8 [::1]/128",
            "inet_interfaces": addresses,
            "inet_protocols": "all" if has_ipv6() else "ipv4",
            "virtual_mailbox_domains": DOMAIN,
            "virtual_mailbox_base": f"{self.directory}/mail",
            "virtual_mailbox_maps": "static:inbox/",
            "virtual_uid_maps": f"static:{nobody.pw_uid}", "virtual_gid_maps": f"static:{nobody.pw_gid}",
            "virtual_transport": "discard:" if discard else "virtual",
            "default_transport": "discard:", "relay_transport": "discard:", "local_transport": "discard:",
            "disable_dns_lookups": "yes", "smtpd_peername_lookup": "no", "append_dot_mydomain": "no",
            "smtpd_milters": "{ unix:private/milter.sock, default_action=accept }",
            "enable_long_queue_ids": "yes", "default_process_limit": "500", "in_flow_delay": "0",
            "smtpd_error_sleep_time": "0", "smtpd_soft_error_limit": "1000", "smtpd_hard_error_limit": "1000",
            "smtpd_client_connection_count_limit": "0", "fast_flush_domains": "", "biff": "no",
        }

    def _write_config(self, main_cf: Mapping[str, str], master: Sequence[str],
                      services: Mapping[str, Mapping[str, str]]) -> None:
        """Write main.cf and master.cf."""
        lines = [f"{self.port} inet n - n - - smtpd"]
        for name, overrides in services.items():
            lines.append(f"{self.ports[name]} inet n - n - - smtpd -o syslog_name=postfix/{name}")
            lines += [f"  -o {{ {key} = {value} }}" for key, value in overrides.items()]
        etc = self.directory / "etc"
        etc.joinpath("main.cf").write_text("".join(f"{key} = {value}\n" for key, value in main_cf.items()))
        etc.joinpath("master.cf").write_text("\n".join([*lines, MASTER_CF.rstrip(), *master]) + "\n")
        os.utime(etc / "main.cf", (0, 0))  # dict_load_file_xt() waits 2 s for a new file to rest

    @property
    def socketname(self) -> str:
        """The socket that smtpd_milters points at."""
        return f"{self.directory}/queue/private/milter.sock"

    def run(self, tool: str, *args: str, **kw: Any) -> subprocess.CompletedProcess:
        """Run one of Postfix's own commands (postconf, postqueue, sendmail, ...) on this instance."""
        env = {"PATH": SYSTEM_PATH, "MAIL_CONFIG": f"{self.directory}/etc"}
        return subprocess.run([tool, *args], env=env, **{"capture_output": True, "text": True, "timeout": 60, **kw})

    def start(self) -> Postfix:
        """Start it; raise AssertionError with what it said if it does not."""
        # not `postfix start`, which looks through the files of the system's own Postfix as well
        started = self.run(self.run("postconf", "-h", "daemon_directory").stdout.strip() + "/master", "-w")
        assert started.returncode == 0, started.stderr + self.log()
        return self

    def stop(self) -> None:
        """Stop it and remove a temporary directory."""
        if (self.directory / "queue/pid/master.pid").exists():
            self.run("postfix", "stop")
        if self.temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def reload(self) -> None:
        """Read the configuration again: smtpd processes finish their client and end."""
        assert self.run("postfix", "reload").returncode == 0, self.log()

    def postqueue(self) -> list[dict]:
        """List the queue: one dict a message, as postqueue -j prints it."""
        return [json.loads(line) for line in self.run("postqueue", "-j").stdout.splitlines()]

    def messages(self) -> list[email.message.Message]:
        """Give the messages delivered so far, oldest first."""
        paths = sorted((self.directory / "mail/inbox/new").glob("*"), key=lambda path: path.stat().st_mtime_ns)
        return [email.message_from_bytes(path.read_bytes()) for path in paths]

    def wait_messages(self, n: int, timeout: float = 20) -> list[email.message.Message]:
        """Wait until at least n messages were delivered, and give all."""
        wait_for(lambda: len(self.messages()) >= n, timeout, f"{n} messages")
        return self.messages()

    def forget_messages(self) -> None:
        """Empty the Maildir, for tests that share an instance."""
        shutil.rmtree(self.directory / "mail/inbox", ignore_errors=True)


# --- the milter -----------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=16)  # hundreds of milters are started from one text
def settings_in(source: str) -> dict[str, tuple[int, int]]:
    """Find the first and last line of what is assigned in the script's text, by name."""
    return {node.targets[0].id: (node.lineno, node.end_lineno) for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}


def edit_settings(source: str, settings: Mapping[str, Any]) -> str:
    """Replace settings in the script's text, as an administrator does; raise KeyError on an unknown one."""
    lines, spans = source.splitlines(keepends=True), settings_in(source)
    for name in sorted(settings, key=lambda name: -spans[name][0]):  # last first: earlier spans stay right
        lines[spans[name][0] - 1:spans[name][1]] = [f"{name} = {settings[name]!r}\n"]
    return "".join(lines)


class Milter(Instance):
    """The milter as a process: an edited copy of the script, its standard error in a file.

    at        a Postfix (its directory and socket are used) or a directory; None: a temporary one, removed by stop()
    user      start it as that user; None: as root
    prefix    a command that runs it, e.g. ["setpriv", "--bounding-set=-sys_ptrace"]
    args      arguments of the script, e.g. ["--check"]
    journal   tell it, as systemd does, that its standard error is the journal
    fds       descriptors that it inherits
    settings  what to change at the top of the file; settings_file is None unless given, whatever this host has
    """

    log_name = "milter.log"  # its standard error, and output

    def __init__(self, at: "Postfix | os.PathLike | None" = None, *, user: Optional[str] = None,
                 prefix: Sequence[str] = (), args: Sequence[str] = (), env: Optional[Mapping[str, str]] = None,
                 script: os.PathLike = SCRIPT, journal: bool = False, fds: Sequence[int] = (),
                 **settings: Any) -> None:
        source = pathlib.Path(script).read_text()
        edit_settings(source, settings)  # a wrong name leaves nothing behind
        self.temporary = at is None
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="milter-test.") if at is None
                                      else at.directory if isinstance(at, Postfix) else at)
        self.directory.chmod(0o755)
        private = self.directory / ("queue/private" if isinstance(at, Postfix) else "private")
        if not private.exists():
            private.mkdir(0o755)
            os.chown(private, pwd.getpwnam(user or settings.get("run_as_user", "postfix") or "root").pw_uid, -1)
        config = self.directory / "etc"  # the Postfix's, or an empty one: without, postconf waits 1 s at each start
        if not config.exists():
            config.mkdir()
            for name in "main.cf", "master.cf":
                (config / name).touch()
                os.utime(config / name, (0, 0))
        self.settings = {"socketname": f"{private}/milter.sock", "settings_file": None, **settings}
        self.script = self.directory / "milter_sysuser.py"
        self.script.write_text(edit_settings(source, self.settings))
        self.script.chmod(0o755)
        log = self.directory / "milter.log"
        log.write_text("")
        stream = {"JOURNAL_STREAM": f"{log.stat().st_dev}:{log.stat().st_ino}"} if journal else {}
        self.command = [*prefix, PYTHON, str(self.script), *args]
        self.options = {"env": {**{k: v for k, v in os.environ.items() if k != "JOURNAL_STREAM"}, **stream,
                                "MAIL_CONFIG": str(config), **(env or {})}, "pass_fds": fds,
                        **(identity(user) if user else {"cwd": "/"})}
        self.process: Optional[subprocess.Popen] = None

    @property
    def socketname(self) -> str:
        """The socket it listens on."""
        return self.settings["socketname"]

    @property
    def pid(self) -> int:
        """The milter's own process, or the prefix's where that does not exec."""
        assert self.process is not None, "not started"
        return self.process.pid

    def start(self, wait: bool = True) -> Milter:
        """Start it and wait until its socket accepts a connection; AssertionError with its log if it ends."""
        with open(self.directory / "milter.log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            **self.options)
        if wait:
            wait_for(lambda: self.accepts() or self.process.poll() is not None, 20, "the milter's socket")
            assert self.process.poll() is None, f"the milter ended with {self.process.poll()}:\n{self.log()}"
        return self

    def run(self, timeout: float = 30) -> int:
        """Start it and wait for its end (--check, wrong settings); give its exit status."""
        self.start(wait=False)
        return self.process.wait(timeout)

    def accepts(self) -> bool:
        """Say whether its socket takes connections: the path alone may be a stale one."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(self.socketname)
                return True
            except OSError:
                return False

    def stop(self, timeout: float = 20) -> Optional[int]:
        """Send TERM and give the exit status (None if it was never started); remove a temporary directory."""
        try:
            if self.process is None:
                return None
            self.process.terminate()
            try:
                return self.process.wait(1)
            except subprocess.TimeoutExpired:  # the test has left a session open
                self.process.terminate()
                return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            if self.temporary:
                shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> int:
        """Kill it outright; give the exit status."""
        self.process.kill()
        return self.process.wait(20)

    def lines(self, containing: str = "") -> list[str]:
        """Give the lines of its log that contain a text."""
        return [line for line in self.log().splitlines() if containing in line]

    def wait_lines(self, containing: str, n: int = 1, timeout: float = 10) -> list[str]:
        """Wait until n lines of its log contain a text, and give them."""
        try:
            return wait_for(lambda: found if len(found := self.lines(containing)) >= n else None, timeout)
        except AssertionError:
            raise AssertionError(f"no {n} lines with {containing!r} in {timeout} s:\n{self.log()}") from None

    def helper_pids(self) -> list[int]:
        """Give the pids of its children: the privileged helper, a running lsof."""
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]


# --- the milter protocol --------------------------------------------------------------------------------------

ALL_ACTIONS, ALL_STEPS = 0x1FF, 0x1FFFFF  # what Postfix offers: mfdef.h, SMFIF_* and SMFIP_*
# command: (the bit that says it is not wanted, the bit that says it gets no reply)
STEPS = {"C": (0x1, 0x1000), "H": (0x2, 0x2000), "M": (0x4, 0x4000), "R": (0x8, 0x8000), "T": (0x200, 0x10000),
         "L": (0x20, 0x80), "N": (0x40, 0x40000), "B": (0x10, 0x80000), "U": (0x100, 0x20000), "E": (0, 0)}
REPLIES = {"+": "addrcpt", "-": "delrcpt", "2": "addrcpt_par", "a": "accept", "b": "replbody", "c": "continue",
           "d": "discard", "e": "chgfrom", "f": "connfail", "h": "addheader", "i": "insheader", "m": "chgheader",
           "p": "progress", "q": "quarantine", "r": "reject", "s": "skip", "t": "tempfail", "y": "replycode",
           "4": "shutdown"}
FINAL = {"accept", "continue", "discard", "connfail", "reject", "skip", "tempfail", "replycode", "shutdown"}


class Wire:
    """The MTA's end of the milter protocol, version 6, as Postfix speaks it.

    Every step returns the milter's replies, the deciding one last: [("continue",)], or at the end of a message
    [("addheader", "X-...", "..."), ("continue",)]. A step that the milter does not want, or that it negotiated not
    to answer, returns []. An insheader or chgheader has its index first. Strings are UTF-8 with surrogateescape.
    """

    def __init__(self, socketname: str, timeout: float = 20, actions: int = ALL_ACTIONS,
                 steps: int = ALL_STEPS) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self.sock.connect(socketname)
        self.send("O", struct.pack("!III", 6, actions, steps))
        command, data = self.receive()
        assert command == "O", command
        self.version, self.actions, self.protocol = struct.unpack("!III", data[:12])
        self.symlist: dict[int, str] = {}  # stage (M_CONNECT is 0) -> the macros the milter asks for
        data = data[12:]
        while data:
            text, _, rest = data[4:].partition(b"\0")
            self.symlist[struct.unpack("!I", data[:4])[0]], data = text.decode(), rest

    def send(self, command: str, data: bytes = b"") -> None:
        """Send one packet."""
        self.sock.sendall(struct.pack("!I", len(data) + 1) + command.encode() + data)

    def receive(self) -> tuple[str, bytes]:
        """Receive one packet; EOFError if the milter hung up."""
        data = self._exactly(struct.unpack("!I", self._exactly(4))[0])
        return chr(data[0]), data[1:]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (part := self.sock.recv(size - len(data))):
                raise EOFError("the milter closed the connection")
            data += part
        return data

    def step(self, command: str, data: bytes = b"") -> list[tuple]:
        """Send a command unless the milter does not want it, and collect the replies if it gives any."""
        unwanted, silent = STEPS[command]
        if self.protocol & unwanted:
            return []
        self.send(command, data)
        replies: list[tuple] = []
        while not self.protocol & silent:
            code, answer = self.receive()
            index = struct.unpack("!I", answer[:4]) if code in "im" else ()
            texts = answer[4 if index else 0:].split(b"\0")[:-1]
            replies.append((REPLIES[code], *index, *(text.decode("utf-8", "surrogateescape") for text in texts)))
            if replies[-1][0] in FINAL:
                break
        return replies

    @staticmethod
    def strings(*values: "str | bytes") -> bytes:
        """Join NUL-terminated strings; bytes go as they are."""
        return b"".join((v if isinstance(v, bytes) else v.encode("utf-8", "surrogateescape")) + b"\0" for v in values)

    def macros(self, command: str, **values: "str | bytes") -> None:
        """Send macros for a command; a name without braces as it is (i), longer ones as {name}."""
        pairs = [x for k, v in values.items() for x in (k if len(k) == 1 else "{%s}" % k, v)]
        self.send("D", command.encode() + self.strings(*pairs))

    def connect(self, address: str = "", port: int = 0, host: "str | bytes" = "localhost", family: str = "",
                **macros: "str | bytes") -> list[tuple]:
        """Announce a client: family 4, 6, L (unix) or U (unknown), guessed from the address if not given."""
        family = family or ("6" if ":" in address else "4" if address else "U")
        if macros:
            self.macros("C", **macros)
        rest = b"" if family == "U" else struct.pack("!H", port) + self.strings(address)
        return self.step("C", self.strings(host) + family.encode() + rest)

    def helo(self, name: "str | bytes" = "localhost") -> list[tuple]:
        """Say HELO."""
        return self.step("H", self.strings(name))

    def mail(self, sender: "str | bytes" = "<from@example.org>", *args: "str | bytes") -> list[tuple]:
        """Say MAIL FROM."""
        return self.step("M", self.strings(sender, *args))

    def rcpt(self, recipient: "str | bytes" = "<to@example.org>", *args: "str | bytes") -> list[tuple]:
        """Say RCPT TO."""
        return self.step("R", self.strings(recipient, *args))

    def data(self) -> list[tuple]:
        """Say DATA."""
        return self.step("T")

    def header(self, name: "str | bytes", value: "str | bytes") -> list[tuple]:
        """Pass one header; with SMFIP_HDR_LEADSPC the value keeps its leading space, as the MTA would send it."""
        return self.step("L", self.strings(name, value))

    def eoh(self) -> list[tuple]:
        """End the headers."""
        return self.step("N")

    def body(self, chunk: bytes = b"body\r\n") -> list[tuple]:
        """Pass a part of the body, 65535 bytes at most."""
        return self.step("B", chunk)

    def eom(self, queue_id: str = "4ZTEST") -> list[tuple]:
        """End the message; the queue id goes along as macro i."""
        self.macros("E", i=queue_id)
        return self.step("E")

    def message(self, sender: "str | bytes" = "<from@example.org>",
                recipients: Sequence["str | bytes"] = ("<to@example.org>",),
                headers: Sequence[tuple] = (("Subject", "test"),), queue_id: str = "4ZTEST") -> list[tuple]:
        """Pass a whole message; give the replies at its end, or those of the step that ended it before."""
        steps: list[Callable[[], list[tuple]]] = [lambda: self.mail(sender)]
        steps += [lambda r=r: self.rcpt(r) for r in recipients]
        steps += [self.data, *(lambda h=h: self.header(*h) for h in headers), self.eoh, self.body]
        for step in steps:
            if (replies := step()) and replies[-1][0] not in ("continue", "skip"):
                return replies
        return self.eom(queue_id)

    def abort(self) -> None:
        """Abort the message (RSET); gets no reply."""
        self.send("A")

    def quit(self) -> None:
        """End the session in order."""
        self.send("Q")
        self.sock.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()


class Clients:
    """Connections to a listener of ours that one process of a user holds, each to be announced to a milter once."""

    def __init__(self, user: str, number: int = 1) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.settimeout(30)
        self.port = self.listener.getsockname()[1]
        code = ("import socket, sys; port, n = map(int, sys.argv[1:])\n"
                "held = [socket.create_connection(('127.0.0.1', port)) for _ in range(n)]\n"
                "for sock in held: sock.sendall(b'EHLO')\n"
                "print(len(held), flush=True); sys.stdin.read()")
        self.process = as_user(user, [PYTHON, "-c", code, str(self.port), str(number)])
        assert self.process.stdout.readline(), self.process.stderr.read()
        self.accepted = [self.listener.accept() for _ in range(number)]

    def wires(self, milter: Milter) -> Iterator[Wire]:
        """Announce the connections to the milter, one after the other."""
        for sock, address in self.accepted:
            wire = Wire(milter.socketname)
            wire.connect(*address, daemon_addr="127.0.0.1", daemon_port=str(self.port))
            sock.recv(100)  # as an MTA does, after the milter has seen the client
            yield wire

    def send(self, milter: Milter) -> list[str]:
        """Pass one message through each, one after the other; give their headers' values or refusals."""
        return [outcome(wire) for wire in self.wires(milter)]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()
        for sock in self.listener, *(sock for sock, _ in self.accepted):
            sock.close()


def outcome(wire: Wire) -> str:
    """Pass a message and hang up; give its header's value, or the reply that refused it."""
    with wire:
        replies = wire.message()
    return next(reply[-1] for reply in reversed(replies) if reply[0] in ("addheader", "insheader", "replycode"))


# --- PHP-FPM, as a web host has it ------------------------------------------------------------------------------

class Pools:
    """A PHP-FPM whose master is root's, with a pool for each user: {pool: (user, where it listens)}; lines for all."""

    def __init__(self, directory: pathlib.Path, pools: Mapping[str, tuple[str, str]], lines: str = "",
                 options: Sequence[str] = ()) -> None:
        self.pools = pools
        text = "".join(f"[{name}]\nuser = {user}\ngroup = {user}\nlisten = {place}\npm = static\n"
                       f"pm.max_children = 1\n{lines}" for name, (user, place) in pools.items())
        conf = directory / "fpm.conf"
        conf.write_text(f"[global]\nerror_log = {directory}/fpm.log\ndaemonize = no\n{text}")
        self.process = subprocess.Popen([self.program(), "-n", *options, "-y", conf], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @staticmethod
    def program() -> Optional[str]:
        """Find PHP-FPM, if there is something to ask it with, too."""
        found = sorted(str(path) for path in pathlib.Path("/usr/sbin").glob("php-fpm*"))
        return found[-1] if found and shutil.which("cgi-fcgi") else None

    def ask(self, pool: str, file: os.PathLike, query: str) -> str:
        """Have a pool run a file, and give what that prints."""
        def listens() -> bool:
            place = self.pools[pool][1]
            address: Any = place if "/" in place else (place.split(":")[0], int(place.split(":")[1]))
            with socket.socket(socket.AF_UNIX if "/" in place else socket.AF_INET) as sock:
                return not sock.connect_ex(address)
        wait_for(listens, 20, "php-fpm")
        done = subprocess.run(["cgi-fcgi", "-bind", "-connect", self.pools[pool][1]], capture_output=True, text=True,
                              timeout=60, check=True, env={"PATH": SYSTEM_PATH, "REQUEST_METHOD": "GET",
                                                           "SCRIPT_FILENAME": str(file), "QUERY_STRING": query})
        return done.stdout

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait(20)


# --- an SMTP client for other users ---------------------------------------------------------------------------

SMTP_CLIENT = r'''
import argparse, socket, sys
p = argparse.ArgumentParser()
p.add_argument("port", type=int)
p.add_argument("--dial", default="127.0.0.1")
p.add_argument("--bind")                              # the client's own address
p.add_argument("--bind-port", type=int, default=0)
p.add_argument("--messages", type=int, default=1)     # in one connection
p.add_argument("--mail-from", default="from@example.org")
p.add_argument("--to", action="append")
p.add_argument("--header", action="append", default=[])
p.add_argument("--wait", action="store_true")         # print "connected", then go on when a line comes in
o = p.parse_args()
sock = socket.socket(socket.AF_INET6 if ":" in o.dial else socket.AF_INET)
if o.bind or o.bind_port:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((o.bind or ("::" if ":" in o.dial else "0.0.0.0"), o.bind_port))
sock.settimeout(30)
sock.connect((o.dial, o.port))
lines = sock.makefile("rb")
def reply():
    while True:
        line = lines.readline().decode("utf-8", "replace").rstrip("\r\n")
        if line[3:4] != "-":
            print(line or "closed", flush=True)
            return line[:1] in ("2", "3")
def say(text):
    sock.sendall(text.encode("utf-8", "surrogateescape") + b"\r\n")
    return reply()
reply()
if o.wait:
    print("connected", sock.getsockname()[1], flush=True)
    sys.stdin.readline()
ok = say("EHLO client.example.org")
for n in range(o.messages):
    ok = say("MAIL FROM:<%s>" % o.mail_from) and ok
    for to in o.to or ["to@example.org"]:
        ok = say("RCPT TO:<%s>" % to) and ok
    if say("DATA"):
        text = ["Subject: message %d" % n] + o.header + ["", "body", "."]
        ok = say("\r\n".join(text)) and ok
    else:
        ok = False
        say("RSET")
say("QUIT")
sys.exit(0 if ok else 1)
'''


def smtp(port: int, *options: str) -> list[str]:
    """Give the command that runs SMTP_CLIENT, for as_user or run_as; it prints every reply's last line."""
    return [PYTHON, "-c", SMTP_CLIENT, str(port), *options]


# --- the README -----------------------------------------------------------------------------------------------

def recipe(heading: str) -> list[str]:
    """Give the code blocks of a recipe in the README, each without its indent."""
    text = README.read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    found = dict(re.findall(r"^### (.*)\n((?:(?!### ).*\n?)*)", text, re.M))
    assert heading in found, f"README.md has no recipe {heading!r}, only {sorted(found)}"
    blocks = re.findall(r"(?:^|(?<=\n\n))(?: {4}.*\n|\n(?= {4}))+", found[heading])
    return [re.sub(r"^ {4}", "", block, flags=re.M) for block in blocks]


# --- tests/try ------------------------------------------------------------------------------------------------

def first_mail() -> int:
    """Send one message by SMTP and one by sendmail(1), as nobody, through a Postfix of its own; show what they got."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda caught, frame: sys.exit(128 + caught))  # and clean up
    with Postfix(main_cf={"non_smtpd_milters": "$smtpd_milters"}) as postfix, Milter(postfix) as milter:
        doors = {"SMTP to 127.0.0.1": lambda: run_as("nobody", smtp(postfix.port, "--mail-from", f"nobody@{DOMAIN}"))}
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0:
            doors["sendmail(1)"] = lambda: submit(postfix, "nobody", "Subject: test\n\nbody\n", "-f", f"nobody@{DOMAIN}",
                                                  f"to@{DOMAIN}")
        else:
            print("sendmail(1) is left out: without a mount namespace (CAP_SYS_ADMIN) it would use this host's mail.\n")
        for n, (door, send) in enumerate(doors.items(), 1):
            sent = send()
            if sent.returncode:
                print(f"The message was not accepted:\n{sent.stdout}{sent.stderr}\n{milter.log()}{postfix.log()}")
                return 1
            (line,) = milter.wait_lines("action=", n)[n - 1:]
            print(f"User nobody sent a message by {door}. It was delivered with the header\n\n    X-Sender-Process-Info: "
                  f"{postfix.wait_messages(n)[n - 1]['X-Sender-Process-Info']}\n\nand the milter logged\n\n    {line}\n")
        header = postfix.messages()[0]["X-Sender-Process-Info"]
    if (missing := missing_capabilities()) and "program=?" in str(header):
        options = " ".join(f"--cap-add={name[4:]}" for name in missing)
        print(f"The program is unknown because looking at other users' processes takes {' and '.join(missing)},\n"
              f"which this container does not have. Allow it, for example: docker run {options}")
    return 0 if header else 1


if __name__ == "__main__" and sys.argv[1:] == ["try"]:
    try:
        leave_chroot()
        sys.exit(first_mail())
    except AssertionError as problem:
        sys.exit(f"tests/try: {problem}")
