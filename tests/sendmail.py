# SPDX-License-Identifier: MIT
"""A throw-away Sendmail, the part beside Postfix in mta.py.

Debian's sendmail and postfix packages exclude each other, so Sendmail is fetched and unpacked, not installed. The
libraries it needs can be installed beside Postfix: tests/run has the list.
"""

from __future__ import annotations

import contextlib
import email
import email.message
import fcntl
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from typing import Any, Optional, Sequence

import psutil

from mta import DOMAIN, SYSTEM_PATH, Instance, free_port, identity, runs_programs, wait_for

SENDMAIL_FILES = pathlib.Path("/var/cache/milter-test/sendmail")

# An administrator's sendmail.mc has Debian's first and last lines, DAEMON_OPTIONS and INPUT_MAIL_FILTER; the rest
# makes a small host of it: one directory, no DNS, no load limits, and all mail in one place.
SENDMAIL_MC = """\
include(`@files@/usr/share/sendmail/cf/debian/autoconf.m4')dnl
define(`confTRUSTED_USER', `root')dnl
OSTYPE(`debian')dnl
DOMAIN(`debian-mta')dnl
undefine(`ALIAS_FILE')undefine(`confCONTROL_SOCKET_NAME')undefine(`confHOST_STATUS_DIRECTORY')dnl
define(`STATUS_FILE', `@directory@/status')dnl
define(`confPID_FILE', `@directory@/sendmail.pid')dnl
define(`QUEUE_DIR', `@directory@/queue')dnl
define(`confSERVICE_SWITCH_FILE', `/etc/mail/service.switch')dnl
define(`confDOMAIN_NAME', `mail.@domain@')dnl
define(`confDONT_PROBE_INTERFACES', `True')dnl
define(`confTO_IDENT', `0')dnl
define(`confQUEUE_LA', `100000')define(`confREFUSE_LA', `100000')define(`confDELAY_LA', `0')dnl
define(`confDELIVERY_MODE', `@delivery@')dnl
FEATURE(`no_default_msa')dnl
FEATURE(`accept_unresolvable_domains')dnl
FEATURE(`accept_unqualified_senders')dnl
FEATURE(`promiscuous_relay')dnl
@daemons@
@filter@
@lines@
MAILER(`local')dnl
MAILER(`smtp')dnl
LOCAL_RULE_0
R$* < @ $* > $*\t$#keep $@ here $: $1 < @ $2 > $3
R$+\t$#keep $@ here $: $1
MAILER_DEFINITIONS
Mkeep, P=@directory@/keep, F=DFMPSlmn, S=0, R=0, T=DNS/RFC822/X-Unix, U=root:root, A=keep $i $u
"""

# Debian's submit.mc: sendmail(1) hands its mail to the daemon by SMTP. mail stands for the user smmsp.
SUBMIT_MC = """\
include(`@files@/usr/share/sendmail/cf/debian/autoconf.m4')dnl
OSTYPE(`debian')dnl
define(`confRUN_AS_USER', `mail')define(`confTRUSTED_USER', `mail')dnl
define(`MSP_QUEUE_DIR', `@directory@/client')dnl
define(`STATUS_FILE', `@directory@/client/status')dnl
define(`confPID_FILE', `@directory@/client/sendmail.pid')dnl
define(`confHOST_STATUS_DIRECTORY', `')dnl
define(`confSERVICE_SWITCH_FILE', `/etc/mail/service.switch')dnl
define(`confDOMAIN_NAME', `mail.@domain@')dnl
define(`RELAY_MAILER_ARGS', `TCP $h @port@')dnl
define(`confQUEUE_LA', `100000')dnl
FEATURE(`accept_unresolvable_domains')dnl
FEATURE(`msp', `@msp@')dnl
"""

KEEP = """\
#!/bin/sh
# keep QUEUEID RECIPIENT...: store the message in the form in which it is delivered
umask 022
id=$1; shift
{ printf 'Delivered-To: %s\\n' "$@"; cat; } >"@directory@/mail/.$id.$$" &&
mv "@directory@/mail/.$id.$$" "@directory@/mail/$id.$$"
"""

# In namespaces that end with the process: a host name with a dot (without one Sendmail sleeps a minute), /etc/hosts
# instead of the DNS, /etc/mail (a setgid sendmail reads its configuration nowhere else), /dev/log.
SENDMAIL_START = """\
set -e
cd "@directory@"
hostname mail.@domain@
mount --bind hosts /etc/hosts
mount --bind etc /etc/mail
if [ -e /usr/sbin/sendmail ]; then mount --bind sendmail /usr/sbin/sendmail; fi
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero random urandom full tty; do : >dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /proc/self/fd dev/fd
ln -s "@directory@/log.socket" dev/log
mount --move dev /dev
exec "@directory@/daemon" -bD
"""


def unpack_sendmail(target: pathlib.Path = SENDMAIL_FILES) -> pathlib.Path:
    """Fetch Debian's sendmail packages and unpack them, if that was not done before; give the directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            part = pathlib.Path(f"{target}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            fetch = ["apt-get", "-q", "download", "sendmail-bin", "sendmail-base", "sendmail-cf"]
            if subprocess.run(fetch, cwd=part, capture_output=True).returncode:  # the lists may be missing or old
                subprocess.run(["apt-get", "-q", "update"], check=True, capture_output=True, text=True)
                subprocess.run(fetch, cwd=part, check=True, capture_output=True, text=True)
            for package in part.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, part], check=True)
            part.rename(target)
    return target


class Sendmail(Instance):
    """A Sendmail of its own on a free port, that keeps all mail in one directory.

    directory  where it lives, as for Postfix. No directory above it may be writable by others, except sticky ones,
               all must be open to users who run sendmail(1), and the file system must allow setgid programs
    listen     the addresses it listens on, e.g. ("127.0.0.1", "::1"); "0.0.0.0" and "::" are the wildcards, of
               which :: takes IPv4 as well and goes with no other
    socketname the milter's socket; the default is the one that Milter(sendmail.directory) makes; "" is no milter
    flags      of the milter: F= lets mail pass without it, F=T defers it, F=R rejects it
    lines      further lines of sendmail.mc
    deliver    False leaves accepted mail in the queue, for loads
    """

    log_name = "maillog"

    def __init__(self, directory: Optional[os.PathLike] = None, listen: Sequence[str] = ("127.0.0.1",),
                 socketname: Optional[str] = None, flags: str = "F=", lines: Sequence[str] = (),
                 deliver: bool = True) -> None:
        self.temporary = directory is None
        self.directory = pathlib.Path(directory or tempfile.mkdtemp(prefix="milter-test.")).resolve()
        self.directory.mkdir(exist_ok=True)
        self.directory.chmod(0o755)
        self.listen = tuple(listen)
        self.port = free_port()
        self.socketname = f"{self.directory}/private/milter.sock" if socketname is None else socketname
        self.files = unpack_sendmail()
        self.process: Optional[subprocess.Popen] = None
        self.log_socket: Optional[socket.socket] = None
        self.values = {
            "directory": self.directory, "files": self.files, "domain": DOMAIN, "port": self.port,
            "delivery": "background" if deliver else "queueonly", "lines": "\n".join(lines) or "dnl",
            "daemons": "\n".join(map(self._daemon_line, range(len(self.listen)), self.listen)),
            "filter": self.filter_line(flags) if self.socketname else "dnl",
            "msp": "[IPv6:::1]" if self.listen[0] == "::1" else "[127.0.0.1]"}
        self._write()

    @staticmethod
    def missing() -> str:
        """Say why it cannot run here; "" if it can."""
        tried = subprocess.run(["unshare", "--uts", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev"],
                               capture_output=True, text=True)
        if tried.returncode:
            return f"Sendmail needs a mount namespace (CAP_SYS_ADMIN): {tried.stderr.strip()}"
        if not runs_programs(tempfile.gettempdir()):
            return f"{tempfile.gettempdir()} is mounted nosuid or noexec: sendmail(1) is a setgid program"
        try:
            unpack_sendmail()
        except subprocess.CalledProcessError as error:
            return f"Debian's sendmail packages could not be fetched: {error.stderr.strip()}"
        return ""

    def filter_line(self, flags: str = "F=") -> str:
        """Give the line that an administrator adds to sendmail.mc."""
        return f"INPUT_MAIL_FILTER(`milter_sysuser', `S=local:{self.socketname}, {flags}, T=S:1m;R:1m;E:5m')dnl"

    def _daemon_line(self, number: int, address: str) -> str:
        family = "inet6" if ":" in address else "inet"
        return f"DAEMON_OPTIONS(`Family={family}, Name=MTA-{number}, Port={self.port}, Addr={address}')dnl"

    def _fill(self, template: str) -> str:
        for name, value in self.values.items():
            template = template.replace(f"@{name}@", str(value))
        return template

    def _write(self) -> None:
        """Lay out the directory: programs as Debian installs them, the configuration made by m4."""
        mail, program = pwd.getpwnam("mail"), self.directory / "sendmail"
        for name, mode in ("etc", 0o755), ("dev", 0o755), ("queue", 0o700), ("mail", 0o755), ("client", 0o2770):
            self.directory.joinpath(name).mkdir(exist_ok=True)
            self.directory.joinpath(name).chmod(mode)
        os.chown(self.directory / "client", mail.pw_uid, mail.pw_gid)
        shutil.copy(self.files / "usr/libexec/sendmail/sendmail", program)
        os.chown(program, 0, mail.pw_gid)
        program.chmod(0o2755)
        # nsenter may look into a process that was not started setgid without CAP_SYS_PTRACE
        shutil.copy(self.files / "usr/libexec/sendmail/sendmail", self.directory / "daemon")
        names = f"localhost mail.{DOMAIN}"
        self.directory.joinpath("hosts").write_text(f"127.0.0.1 {names}\n::1 {names}\n")
        self.directory.joinpath("keep").write_text(self._fill(KEEP))
        self.directory.joinpath("keep").chmod(0o755)
        self.directory.joinpath("etc/service.switch").write_text("hosts files\naliases files\n")
        macros = self.files / "usr/share/sendmail/cf"
        for name, template in ("sendmail", SENDMAIL_MC), ("submit", SUBMIT_MC):
            source = self.directory / f"etc/{name}.mc"
            source.write_text(self._fill(template))
            made = subprocess.run(["m4", "-D_USE_ETC_MAIL_", f"-D_CF_DIR_={macros}/", macros / "m4/cf.m4", source],
                                  capture_output=True, text=True, check=True)
            source.with_suffix(".cf").write_text(made.stdout)

    def start(self) -> Sendmail:
        """Start it and wait until it listens; raise AssertionError with what it said if it does not."""
        pathlib.Path("/etc/mail").mkdir(exist_ok=True)  # the place to mount its own on
        self._open_log()
        with open(self.directory / "output", "wb") as output:
            self.process = subprocess.Popen(
                ["unshare", "--uts", "--mount", "sh", "-c", self._fill(SENDMAIL_START)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, env={"PATH": SYSTEM_PATH})
        try:
            wait_for(self._listens, 20, f"Sendmail to listen on {' and '.join(self.listen)}")
        except AssertionError as error:
            said = self.directory.joinpath("output").read_text() + self.log()
            self.stop()
            raise AssertionError(f"{error}\n{said}") from None
        return self

    def _listens(self) -> bool:
        """Say whether it listens, without a connection that the milter would see; AssertionError if it ended."""
        assert self.process.poll() is None, f"Sendmail ended with {self.process.poll()}"
        found = [c.laddr.ip for c in psutil.net_connections("tcp")
                 if c.status == psutil.CONN_LISTEN and c.laddr.port == self.port]
        return len(found) == len(self.listen)

    def stop(self) -> None:
        """Stop it with its children and remove a temporary directory."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.terminate()
                self.process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        if self.log_socket is not None:
            self.log_socket.shutdown(socket.SHUT_RD)
            self.log_socket = None
        if self.temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _open_log(self) -> None:
        """Listen where Sendmail's /dev/log points: it logs nowhere else."""
        path = self.directory / "log.socket"
        path.unlink(missing_ok=True)
        self.log_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.log_socket.bind(str(path))
        path.chmod(0o666)
        threading.Thread(target=self._write_log, args=(self.log_socket,), daemon=True).start()

    def _write_log(self, source: socket.socket) -> None:
        """Append each message, less its priority and time (`<22>Nov 20 19:00:00 `), until the socket is shut."""
        with source, open(self.directory / "maillog", "ab", buffering=0) as log:
            while data := source.recv(65536):
                log.write(data.partition(b">")[2][16:].rstrip(b"\0\n") + b"\n")

    def messages(self) -> list[email.message.Message]:
        """Give the messages delivered so far, oldest first; the envelope is in Return-Path and Delivered-To."""
        paths = [path for path in self.directory.joinpath("mail").iterdir() if not path.name.startswith(".")]
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        return [email.message_from_bytes(path.read_bytes()) for path in paths]

    def wait_messages(self, n: int, timeout: float = 20) -> list[email.message.Message]:
        """Wait until at least n messages were delivered, and give all."""
        wait_for(lambda: len(self.messages()) >= n, timeout, f"{n} messages")
        return self.messages()

    def forget_messages(self) -> None:
        """Forget what was delivered, for tests that share an instance."""
        for path in self.directory.joinpath("mail").iterdir():
            path.unlink()

    def quarantined(self) -> dict[str, str]:
        """Give the reason of every message in quarantine, by queue id (what mailq -qQ shows)."""
        return {path.name[2:]: next(line[1:] for line in path.read_text(errors="replace").splitlines()
                                    if line.startswith("q"))
                for path in self.directory.joinpath("queue").glob("hf*")}

    def run_as(self, name: str, argv: Sequence[str], **kw: Any) -> subprocess.CompletedProcess:
        """Run argv as that user where its /etc/mail and /usr/sbin/sendmail are; see .program for sendmail(1)."""
        inside = ["nsenter", f"--target={self.process.pid}", "--uts", "--mount", "--root"]
        user = ["setpriv", f"--reuid={name}", f"--regid={identity(name)['group']}", "--init-groups"]
        return subprocess.run([*inside, *user, *argv], **{"cwd": "/", "capture_output": True, "text": True,
                                                          "timeout": 60, **kw})

    @property
    def program(self) -> str:
        """The path of its sendmail(1), which hands its mail to the daemon by SMTP."""
        return f"{self.directory}/sendmail"
