# SPDX-License-Identifier: MIT
"""Being restarted: a socket that the service manager keeps, the exit statuses it goes by, and no gap under load."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pwd
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import time
import types
from typing import Any, Callable, Iterator, NamedTuple

import psutil
import pytest

import mta
from test_faults import Load, Row, assert_all_well, senders  # noqa: F401, a fixture

README = mta.SCRIPT.parent / "README.md"
HOLD_SECONDS = 2  # what a start that fails may hold smtpd up
PAUSE = 0.2  # seconds between two connections of a load that is not at full size: untagged mail takes all processors

# Hand a descriptor over as the service manager does: as number 3, with LISTEN_FDS and LISTEN_PID; "" sets none.
HAND_OVER = """
import os, sys
descriptor, count, pid = sys.argv[1:4]
if descriptor:
    os.dup2(int(descriptor), 3)
else:
    os.closerange(3, 10)
os.environ.update({name: value for name, value in (("LISTEN_FDS", count), ("LISTEN_PID", pid)) if value})
if pid == "own":
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[4], sys.argv[4:])
"""


class Manager:
    """The service manager's part: a listening unix socket of postfix's, which outlives the milters that it is given to.

    at  a Postfix or a directory, as for mta.Milter
    """

    def __init__(self, at: Any) -> None:
        self.at, self.milters = at, []
        self.path = at.socketname if isinstance(at, mta.Postfix) else f"{at}/milter.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        os.chown(self.path, pwd.getpwnam("postfix").pw_uid, -1)
        os.chmod(self.path, 0o600)
        self.listener.listen(4096)

    def milter(self, *given: Any, count: str = "1", pid: str = "own", **options: Any) -> mta.Milter:
        """Make a milter that is given the listener, or something else, or (None) no descriptor; not started."""
        fds = [one.fileno() for one in given or [self.listener] if one]
        options = {"prefix": [mta.PYTHON, "-c", HAND_OVER, *(map(str, fds or [""])), count, pid], "fds": fds, **options}
        self.milters.append(mta.Milter(self.at, **{"socketname": self.path, **options}))
        return self.milters[-1]

    def start(self, **options: Any) -> mta.Milter:
        """Start a milter and wait until it serves."""
        milter = self.milter(**options).start(wait=False)
        milter.wait_lines("listening on fd:3", timeout=20)
        return milter

    def connects(self) -> bool:
        """Say whether a connection to the socket is taken, if only into its queue."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(self.path) == 0

    def stop(self) -> None:
        """End the milters and close the socket."""
        for milter in self.milters:
            if milter.process and milter.process.poll() is None:
                milter.kill()
        self.listener.close()


@pytest.fixture
def postfix(root: None) -> Iterator[mta.Postfix]:
    """Start a Postfix of the test's own."""
    with mta.Postfix() as instance:
        yield instance


@pytest.fixture
def manager(root: None) -> Iterator[Manager]:
    """Make a service manager without a Postfix, in a directory of postfix's own."""
    at = mta.Milter()
    os.chown(at.directory, pwd.getpwnam("postfix").pw_uid, -1)
    made = Manager(at.directory)
    yield made
    made.stop()
    at.stop()


# --- the socket -------------------------------------------------------------------------------------------------

def test_postfix_is_served_on_the_service_managers_socket(postfix: mta.Postfix, users: types.SimpleNamespace) -> None:
    """Started as root or as postfix; the log says where it listens, and the socket's file stays as it is."""
    manager = Manager(postfix)
    before = os.stat(manager.path)
    try:
        for user in None, "postfix":
            postfix.forget_messages()
            milter = manager.start(user=user, lsof_command=[])
            assert mta.run_as("mst-alice", mta.smtp(postfix.port)).returncode == 0
            assert postfix.wait_messages(1)[0]["X-Sender-Process-Info"].startswith("user=mst-alice ")
            assert milter.stop() == 0
            after = os.stat(manager.path)
            assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)
            assert not milter.lines("ERROR") and not milter.lines("Traceback"), milter.log()
    finally:
        manager.stop()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_connections_wait_for_the_next_milter(ending: signal.Signals, postfix: mta.Postfix,
                                              users: types.SimpleNamespace) -> None:
    """Between two milters a client is not greeted, and then its message is tagged."""
    manager = Manager(postfix)
    try:
        milter = manager.start()
        milter.process.send_signal(ending)
        milter.process.wait(20)
        clients = [mta.as_user(name, mta.smtp(postfix.port)) for name in ("mst-alice", "mst-bob")]
        mta.wait_for(lambda: waiting(manager.path) == 2, what="both in the queue")
        assert all(client.poll() is None for client in clients) and not postfix.messages()
        manager.start()
        assert [client.communicate(timeout=30)[0][:3] for client in clients] == ["220", "220"]
        tags = sorted(str(message["X-Sender-Process-Info"]) for message in postfix.wait_messages(2))
        assert [tag.split()[0] for tag in tags] == ["user=mst-alice", "user=mst-bob"]
    finally:
        manager.stop()


def waiting(path: str) -> int:
    """Count the connections to a unix socket that nobody has accepted."""
    shown = subprocess.run(["ss", "-Hxln", "src", path], capture_output=True, text=True, check=True).stdout
    return int(shown.split()[2])


def test_the_helper_has_no_copy_of_the_service_managers_socket(manager: Manager) -> None:
    """Else connections would wait on it although nobody serves it."""
    milter = manager.start()
    link = f"socket:[{os.fstat(manager.listener.fileno()).st_ino}]"
    (helper,) = milter.helper_pids()
    held = {pid: [os.readlink(entry) for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
            for pid in (milter.pid, helper)}
    assert link in held[milter.pid] and link not in held[helper]


def test_without_the_variables_a_descriptor_3_means_nothing(manager: Manager) -> None:
    """The script makes its own socket, as the setting has it, and removes it at its end."""
    own = f"{manager.path}.own"
    milter = manager.milter(count="", pid="", socketname=own).start()
    milter.wait_lines(f"listening on {own}")
    assert milter.accepts() and milter.stop() == 0
    assert not os.path.exists(own) and os.path.exists(manager.path)


@pytest.mark.parametrize("socketname", ["/no/such/directory/milter.sock", "/etc/passwd", "/usr/milter.sock"])
def test_the_path_in_the_settings_does_not_count_where_the_socket_is_handed_over(socketname: str,
                                                                                 manager: Manager) -> None:
    """Nor is anything made or removed there."""
    there = os.path.exists(socketname)
    milter = manager.start(socketname=socketname)
    with mta.Wire(manager.path) as wire:
        assert wire.connect("192.0.2.9", 1) == [("continue",)]
    milter.process.terminate()
    assert milter.process.wait(20) == 0 and os.path.exists(socketname) == there


def closed() -> None:
    """Give no descriptor at all."""


def no_socket() -> Any:
    """Give another kind of file."""
    return open(os.devnull, encoding="ascii")


def not_listening() -> socket.socket:
    """Give a unix socket that is bound to nothing."""
    return socket.socket(socket.AF_UNIX)


def datagram() -> socket.socket:
    """Give a unix socket of a kind that never listens."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def tcp() -> socket.socket:
    """Give a listener that is not a unix socket."""
    return socket.create_server(("127.0.0.1", 0))


def packets() -> socket.socket:
    """Give a listener that the MTA cannot connect to."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind("")  # an abstract name of the kernel's choice
    sock.listen()
    return sock


@pytest.mark.parametrize("count, pid, said", [
    ("1", "1", "LISTEN_PID = '1': must be "), ("1", "", "LISTEN_PID = None: must be "),
    ("1", "me", "LISTEN_PID = 'me': must be "), ("", "own", "LISTEN_FDS = None: must be 1"),
    ("2", "own", "LISTEN_FDS = '2': must be 1"), ("0", "own", "LISTEN_FDS = '0': must be 1"),
    ("one", "own", "LISTEN_FDS = 'one': must be 1")])
def test_variables_that_are_not_for_one_socket_and_this_process_are_one_sentence(count: str, pid: str, said: str,
                                                                                 manager: Manager) -> None:
    """And exit status 1; the service manager's socket is left as it is."""
    milter = manager.milter(count=count, pid=pid)
    assert milter.run() == 1
    (line,) = milter.lines()
    assert f" ERROR {said}" in line and manager.connects()


@pytest.mark.parametrize("make", [closed, no_socket, not_listening, datagram, tcp, packets])
def test_a_descriptor_that_is_no_listening_unix_socket_is_one_sentence(make: Callable, manager: Manager) -> None:
    """And exit status 1; nothing is made in its place."""
    given = make()
    milter = manager.milter(given, socketname=f"{manager.path}.own")
    assert milter.run() == 1
    (line,) = milter.lines()
    assert " ERROR descriptor 3 of LISTEN_FDS: must be a unix stream socket that listens" in line
    assert not os.path.exists(f"{manager.path}.own")
    if given:
        given.close()


def test_at_start_it_says_that_the_sockets_file_is_gone(manager: Manager) -> None:
    """A cleaner has removed it: only the service manager can make it again, and mail passes meanwhile."""
    assert not manager.start().lines("WARNING")
    manager.milters[-1].kill()
    os.unlink(manager.path)
    (line,) = manager.start().wait_lines("WARNING")
    assert f"{manager.path} is not the service manager's socket any more" in line
    assert "systemctl stop milter_sysuser.socket milter_sysuser; systemctl start milter_sysuser" in line


# Stands before libmilter's own, which it finds by its path.
REFUSE = r"""
#include <dlfcn.h>
#include <string.h>
int smfi_setconn(char *conn) {
    int (*real)(char *) = dlsym(dlopen(LIBMILTER, RTLD_LAZY), "smfi_setconn");
    return strncmp(conn, "fd:", 3) == 0 ? -1 : real(conn);
}
"""


def test_a_libmilter_that_takes_no_descriptor_serves_the_service_managers_socket(
        manager: Manager, tmp_path: pathlib.Path) -> None:
    """As all but Debian's: RHEL's, or one's own."""
    library = tmp_path / "refuse.so"
    module = subprocess.run([mta.PYTHON, "-c", "import milter; print(milter.__file__)"], capture_output=True, text=True)
    linked = subprocess.run(["ldd", module.stdout.strip()], capture_output=True, text=True, check=True).stdout
    path = re.search(r"libmilter\S* => (\S+)", linked)[1]
    subprocess.run(["gcc", "-shared", "-fPIC", f'-DLIBMILTER="{path}"', "-o", library, "-xc", "-"],
                   input=REFUSE, text=True, check=True)
    milter = manager.start(env={"LD_PRELOAD": str(library)})
    with mta.Wire(manager.path) as wire:
        assert wire.connect("192.0.2.9", 1) == [("continue",)]
    assert milter.stop() == 0 and os.path.exists(manager.path) and not milter.lines("WARNING")


# --- a start that fails -----------------------------------------------------------------------------------------

def refuse_in_time(manager: Manager, milter: mta.Milter) -> float:
    """Start a milter that ends with 78; give the seconds until a waiting connection has ended and none is taken."""
    with socket.socket(socket.AF_UNIX) as waits:
        waits.settimeout(20)
        waits.connect(manager.path)
        began = time.monotonic()
        assert milter.run() == 78, milter.log()
        with contextlib.suppress(ConnectionError):
            assert waits.recv(1) == b""
        mta.wait_for(lambda: not manager.connects(), what="connections to be refused")
        return time.monotonic() - began


def test_a_wrong_setting_does_not_hold_the_mta_up(manager: Manager) -> None:
    """Whoever waits on the service manager's socket is let go, and nobody can wait any more, though it stays open."""
    milter = manager.milter(timeout=-1)
    assert refuse_in_time(manager, milter) < HOLD_SECONDS
    assert milter.lines("timeout = -1: ")


def test_a_list_that_only_root_may_read_does_not_hold_the_mta_up(manager: Manager) -> None:
    """It is noticed late, as run_as_user."""
    path = pathlib.Path(manager.path).with_name("blocked")
    path.write_text("mst-bob\n")
    path.chmod(0o600)
    assert refuse_in_time(manager, manager.milter(blocked_mailusers_file=str(path))) < HOLD_SECONDS


def test_a_missing_package_does_not_hold_the_mta_up(manager: Manager) -> None:
    """As while it is being upgraded."""
    milter = manager.milter()
    milter.command.insert(milter.command.index(str(milter.script)), "-S")
    assert refuse_in_time(manager, milter) < HOLD_SECONDS
    assert "install pymilter" in milter.log()


def test_after_a_wrong_setting_postfix_goes_on_without_the_milter(postfix: mta.Postfix) -> None:
    """A client that came before the start is greeted within two seconds of it: default_action=accept applies."""
    manager = Manager(postfix)
    try:
        client = mta.as_user("nobody", mta.smtp(postfix.port))
        mta.wait_for(lambda: waiting(manager.path), what="smtpd in the queue")
        began = time.monotonic()
        assert manager.milter(header_name="").run() == 78
        assert client.stdout.readline().startswith("220")
        assert time.monotonic() - began < HOLD_SECONDS
        assert client.communicate(timeout=30) and client.returncode == 0
        assert "X-Sender-Process-Info" not in postfix.wait_messages(1)[0]
    finally:
        manager.stop()


# --- told to end ------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("handed_over", [False, True], ids=["own socket", "handed over"])


@pytest.fixture
def start(manager: Manager, make_milter: Callable) -> Callable[[bool], mta.Milter]:
    """Start a milter on the service manager's socket, or on its own, and wait until it has served a session."""
    def started(handed_over: bool) -> mta.Milter:
        milter = manager.start() if handed_over else make_milter().start()
        mta.Wire(milter.socketname).quit()
        return milter
    return started


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGHUP, 75)],
                         ids=lambda value: getattr(value, "name", None))
@BOTH
def test_each_signal_has_its_exit_status(number: signal.Signals, status: int, handed_over: bool, start: Callable) -> None:
    """At once, where no session is open; the helper ends as well, and a socket of its own is removed."""
    milter = start(handed_over)
    helpers = milter.helper_pids()
    began = time.monotonic()
    milter.process.send_signal(number)
    assert milter.process.wait(20) == status and time.monotonic() - began < 2
    mta.wait_for(lambda: all(map(mta.ended, helpers)), what="the helper's end")
    assert os.path.exists(milter.socketname) == handed_over
    assert milter.lines()[-1].endswith("INFO stopped" if status == 0 else "INFO stopped, to be started again")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGHUP, 75)],
                         ids=lambda value: getattr(value, "name", None))
@BOTH
def test_told_to_end_it_serves_its_sessions_first(number: signal.Signals, status: int, handed_over: bool,
                                                  start: Callable, users: types.SimpleNamespace) -> None:
    """To their end, with the program; one whose MTA has said nothing yet, too; and no others."""
    milter = start(handed_over)
    with mta.Clients("mst-alice", 2) as clients, socket.socket(socket.AF_UNIX) as silent:
        wires = clients.wires(milter)
        wire = next(wires)
        silent.connect(milter.socketname)
        mta.wait_for(lambda: not waiting(milter.socketname), what="its being accepted")
        milter.process.send_signal(number)
        if handed_over:
            mta.wait_for(lambda: milter.accepts() and waiting(milter.socketname), what="a connection that is left")
        else:
            mta.wait_for(lambda: not milter.accepts(), what="the path to be gone")
        for _ in range(2):
            assert wire.message()[-2][-1] == mta.tag("mst-alice", "python3")
        wire.quit()
        with pytest.raises(subprocess.TimeoutExpired):
            milter.process.wait(0.3)
        negotiate(silent)
        mta.wait_for(lambda: answered(silent), what="an answer")
        silent.close()
        assert milter.process.wait(5) == status
    assert not milter.lines("WARNING") and not milter.lines("ERROR"), milter.log()


@BOTH
def test_connections_that_have_just_been_made_when_it_is_told_to_end_are_not_lost(handed_over: bool, start: Callable,
                                                                                 manager: Manager) -> None:
    """This milter serves them yet, accepted or not, or leaves them to the next."""
    milter = start(handed_over)
    with contextlib.ExitStack() as stack:
        early = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
        for sock in early:
            sock.connect(milter.socketname)
        milter.process.terminate()
        for sock in early:
            negotiate(sock)
        mta.wait_for(lambda: sum(map(answered, early)) == 200 - (waiting(milter.socketname) if handed_over else 0),
                     what="all that do not wait for the next milter")
    assert milter.process.wait(20) == 0


def negotiate(sock: socket.socket) -> None:
    """Begin a session, as Postfix does."""
    packet = struct.pack("!III", 6, mta.ALL_ACTIONS, mta.ALL_STEPS)
    sock.sendall(struct.pack("!I", len(packet) + 1) + b"O" + packet)


def answered(sock: socket.socket) -> bool:
    """Say whether the milter has answered on a connection; an error if it has hung up."""
    if not select.select([sock], [], [], 0)[0]:
        return False
    assert sock.recv(5, socket.MSG_PEEK)[4:] == b"O"
    return True


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_second_signal_ends_it_at_once(first: signal.Signals, second: signal.Signals, start: Callable) -> None:
    """And to be started again only if nobody has told it to stop."""
    milter = start(False)
    with mta.Wire(milter.socketname) as wire:
        wire.connect("192.0.2.9", 1)
        milter.process.send_signal(first)
        mta.wait_for(lambda: not os.path.exists(milter.socketname), what="it to begin to end")
        began = time.monotonic()
        milter.process.send_signal(second)
        assert milter.process.wait(20) == (75 if first == second == signal.SIGHUP else 0)
        assert time.monotonic() - began < 2
    assert milter.lines(" WARNING 1 sessions are still open")


@BOTH
def test_a_session_that_does_not_end_is_cut_off(handed_over: bool, manager: Manager, make_milter: Callable) -> None:
    """After the seconds that the script names, and the log says so."""
    milter = manager.milter() if handed_over else make_milter()
    milter.script.write_text(milter.script.read_text().replace("STOP_SECONDS = 10.0", "STOP_SECONDS = 1.0"))
    milter.start(wait=not handed_over).wait_lines("listening on")
    with mta.Wire(milter.socketname) as wire:
        wire.connect("192.0.2.9", 1)
        began = time.monotonic()
        milter.process.terminate()
        assert milter.process.wait(20) == 0 and 0.9 < time.monotonic() - began < 3
    assert [line.split(" ", 2)[2] for line in milter.lines()[-2:]] == [
        "WARNING 1 sessions are still open: their mail passes as without a milter", "INFO stopped"]


@pytest.fixture
def loop(tmp_path: pathlib.Path) -> Iterator[Callable[[mta.Milter], subprocess.Popen]]:
    """Run the README's shell loop, without systemd, on a milter: its script, its log."""
    text = re.search(r"^    (setsid sh -c 'while [^\n]*\n(?: +.*\n)+?)\n", README.read_text(), re.M)[1]
    running: list[psutil.Process] = []

    def run(milter: mta.Milter) -> subprocess.Popen:
        log = milter.directory / "milter.log"
        command = re.sub(r"(python3 )?/usr/local/sbin/milter_sysuser.py", f"{mta.PYTHON} {milter.script}", text)
        command = "exec " + command.replace("/var/log/milter_sysuser.log", str(log)).rstrip().rstrip("&")
        assert str(milter.script) in command and str(log) in command
        started = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, **milter.options)
        running.append(psutil.Process(started.pid))
        return started
    yield run
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def milter_below(shell: subprocess.Popen) -> int:
    """Wait for the milter that the loop runs now, and give its pid."""
    def found() -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(shell.pid).children()
            return [child.pid for child in children if "milter_sysuser.py" in str(child.cmdline())]
        return []
    return int(mta.wait_for(found, what="the loop's milter")[0])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_the_readmes_loop_starts_it_again_with_the_settings_of_now(number: signal.Signals, loop: Callable,
                                                                   make_milter: Callable, users: Any) -> None:
    """After HUP as after a fault; with new settings in the file, and then until it is told to stop."""
    conf = mta.Milter()
    path = conf.directory / "milter.conf"
    milter = make_milter(conf.directory, settings_file=str(path))
    milter.temporary = True
    path.write_text('header_name = "X-First"\n')
    shell = loop(milter)
    mta.wait_for(milter.accepts, 20, "the first milter")
    with mta.Clients("mst-alice", 2) as clients:
        wires = clients.wires(milter)
        with next(wires) as wire:
            assert ("addheader", "X-First", mta.tag("mst-alice", "python3")) in [
                (kind, *rest[-2:]) for kind, *rest in wire.message()]
        path.write_text('header_name = "X-Second"\n')
        first = milter_below(shell)
        os.kill(first, number)
        milter.wait_lines("listening on", 2, 20)
        mta.wait_for(milter.accepts, 20, "the second milter")
        with next(wires) as wire:
            assert ("addheader", "X-Second", mta.tag("mst-alice", "python3")) in [
                (kind, *rest[-2:]) for kind, *rest in wire.message()]
    assert milter_below(shell) != first
    os.kill(milter_below(shell), signal.SIGTERM)
    assert shell.wait(20) is not None
    assert not milter.accepts()


def test_the_readmes_loop_ends_with_a_wrong_setting(loop: Callable, make_milter: Callable) -> None:
    """Which stays wrong: it is said once."""
    milter = make_milter(timeout=-1)
    assert loop(milter).wait(20) is not None
    assert len(milter.lines("timeout = -1: ")) == 1


def test_what_is_logged_at_start_is_not_on_standard_output(make_milter: Callable) -> None:
    """It is for standard error alone: what reads the one gets no line of the other."""
    milter = make_milter(prefix=["sh", "-c", 'exec "$@" >"$0.out"', ""])
    milter.command[3] = str(milter.directory / "log")
    milter.start().wait_lines("listening on ")
    assert (milter.directory / "log.out").read_text() == ""


# --- no gap under load ------------------------------------------------------------------------------------------

class Kills(NamedTuple):
    """What became of the messages of a load while the milter was killed again and again."""

    row: Row
    kills: int
    open_then: int  # untagged, their connection was open at a kill: it can have been the milter's
    untagged: int  # untagged, their connection began after a kill and their message was taken before the next one
    waited: int  # tagged, though their connection began while no milter was ready
    down: float  # seconds from a kill until the next milter was ready, the median


def under_kills(load: Load, kill_and_start: Callable[[], float], kills: int, seconds: float) -> Kills:
    """Kill the milter that often, each time so many seconds after the last or (0) after some more messages."""
    times: list[tuple[float, float]] = []
    downs: list[tuple[float, float]] = []
    load.wait()
    for _ in range(kills):
        due = time.monotonic() + seconds
        before = time.monotonic()
        ended = kill_and_start()
        times.append((before, ended))
        downs.append((before, time.monotonic()))
        if seconds:
            mta.wait_for(lambda: time.monotonic() >= due, seconds + 1, "the next kill's time")
        else:
            load.wait()
    load.wait(200)
    row = load.finish()
    untagged = set(load.untagged)
    spans = {ident: load.times[ident] for ident in untagged if ident in load.times}
    assert set(spans) == untagged, "untagged, and its client does not know that it was taken"
    open_then = {ident for ident, (began, taken) in spans.items()
                 if any(began <= after and before <= taken for before, after in times)}
    waited = sum(1 for ident, (began, _) in load.times.items() if ident not in untagged
                 and any(before <= began <= after for before, after in downs))
    down = statistics.median(after - before for before, after in downs)
    return Kills(row, kills, len(open_then), len(untagged - open_then), waited, down)


@pytest.fixture(scope="module")
def loaded(senders: None) -> Iterator[mta.Postfix]:  # noqa: F811
    """Start the Postfix for the loads; its log goes to syslog, as it would for a real one."""
    with mta.Postfix(main_cf={"maillog_file": ""}) as instance:
        yield instance


@pytest.fixture(scope="module")
def counted(request: pytest.FixtureRequest) -> Iterator[dict[str, Kills]]:
    """Collect the counts of the loads with kills, and show them at the end."""
    found: dict[str, Kills] = {}
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        names = ("sent", "tagged", "unnamed", "untagged", "wrong", "lost", "doubled")
        print("\n\n" + " ".join([f"{'killed under load':20}", "kills", *(f"{name:>9}" for name in names),
                                 " open then", "of their own", "waited", "down/s"]))
        for name, kills in found.items():
            print(" ".join([f"{name:20}", f"{kills.kills:5}", *(f"{getattr(kills.row, name):9}" for name in names),
                            f"{kills.open_then:10} {kills.untagged:12} {kills.waited:6} {kills.down:6.2f}"]))


class Polite(NamedTuple):
    """What became of the messages of a load while the milter was told to end, and started, again and again."""

    row: Row
    restarts: int
    unserved: int  # sessions that did not find the socket
    median: float  # seconds from the signal to its end
    longest: float


@pytest.fixture(scope="module")
def polite(request: pytest.FixtureRequest) -> Iterator[dict[str, Polite]]:
    """Collect the counts of the loads with polite restarts, and show them at the end."""
    found: dict[str, Polite] = {}
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        names = ("sent", "tagged", "unnamed", "untagged", "wrong", "lost", "doubled")
        print("\n\n" + " ".join([f"{'told to end':20}", "restarts", *(f"{name:>9}" for name in names),
                                 " unserved  median/s longest/s"]))
        for name, ends in found.items():
            print(" ".join([f"{name:20}", f"{ends.restarts:8}", *(f"{getattr(ends.row, name):9}" for name in names),
                            f"{ends.unserved:9} {ends.median:9.3f} {ends.longest:9.3f}"]))


def test_no_message_passes_untagged_while_the_milter_is_restarted(loaded: mta.Postfix, counted: dict[str, Kills],
                                                                  long: bool) -> None:
    """But those whose session a killed milter had: one message each, whose connection was open at the kill.

    The listener stays with the service manager, here this test, which starts the milter as soon as it has ended.
    """
    manager = Manager(loaded)
    load = None
    try:
        milter = manager.start()

        def kill_and_start() -> float:
            """Kill the milter once it serves; give the time by when it had ended. Start it again, and wait for that."""
            assert milter.process.poll() is None, f"it ended by itself: {milter.lines()[-3:]}"
            starts = len(milter.lines("listening on fd:3"))
            milter.kill()
            ended = time.monotonic()
            milter.start(wait=False)
            milter.wait_lines("listening on fd:3", starts + 1, 20)
            return ended
        load = Load(loaded, pause=0 if long else PAUSE)
        counted["socket handed over"] = kills = under_kills(load, kill_and_start, 60 if long else 3, 1 if long else 0)
        assert not milter.lines("Traceback") and not milter.lines("ERROR"), milter.log()[-3000:]
    finally:
        if load:
            load.stop()
        manager.stop()
    assert_all_well(kills.row)
    assert kills.untagged == 0 and kills.row.unnamed == 0, kills
    assert kills.waited > 0, kills


@BOTH
def test_a_polite_restart_loses_no_session(handed_over: bool, senders: None, polite: dict[str, Polite],  # noqa: F811
                                           long: bool) -> None:
    """Told to end again and again under load. Nothing at all passes untagged where the service manager has the socket.

    Where the milter's own is gone meanwhile, that passes, untagged, which does not find it.
    """
    with mta.Postfix() as postfix:
        manager = Manager(postfix) if handed_over else None
        milter, load = manager.start() if manager else mta.Milter(postfix).start(), None
        seconds = []
        try:
            load = Load(postfix, pause=0 if long else PAUSE)
            for number in [signal.SIGTERM, signal.SIGHUP] * (30 if long else 3):
                load.wait()
                starts = len(milter.lines("listening on"))
                began = time.monotonic()
                milter.process.send_signal(number)
                assert milter.process.wait(20) == (0 if number == signal.SIGTERM else 75)
                seconds.append(time.monotonic() - began)
                milter.start(wait=False).wait_lines("listening on", starts + 1, 20)
            load.wait()
            row = load.finish()
        finally:
            if load:
                load.stop()
            manager.stop() if manager else milter.kill()
        unserved = postfix.log().count("connect to Milter service")
        polite["socket handed over" if handed_over else "socket of its own"] = Polite(
            row, len(seconds), unserved, statistics.median(seconds), max(seconds))
        assert_all_well(row)
        assert row.unnamed == 0 and row.untagged == unserved and not (handed_over and unserved), (row, unserved)
        assert "can't read" not in postfix.log() and not milter.lines("WARNING") and not milter.lines("ERROR")


def test_without_the_service_managers_socket_mail_passes_untagged_meanwhile(
        loaded: mta.Postfix, counted: dict[str, Kills], long: bool) -> None:
    """For comparison; nothing is lost, doubled or wrongly named here either."""
    pathlib.Path(loaded.socketname).unlink(missing_ok=True)
    milter, load = mta.Milter(loaded).start(), None

    def kill_and_start() -> float:
        """Kill the milter and start it again; give the time by when it had ended."""
        milter.kill()
        ended = time.monotonic()
        milter.start()
        return ended
    try:
        load = Load(loaded, pause=0 if long else PAUSE)
        counted["socket of its own"] = kills = under_kills(load, kill_and_start, 60 if long else 3, 1 if long else 0)
    finally:
        if load:
            load.stop()
        milter.kill()
    assert_all_well(kills.row)
