# SPDX-License-Identifier: MIT
"""A local user who would rather not be named: whatever it does, the answer is right or honestly unknown."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import itertools
import json
import os
import pathlib
import pwd
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import types
from typing import Any, Callable, Iterator, Optional

import psutil
import pytest

import mta

NAMES = itertools.count(1)
FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')
HOST = next((a.address for nics in psutil.net_if_addrs().values() for a in nics
             if a.family == socket.AF_INET and not a.address.startswith("127.")), None)
LINK = next((a.address for nics in psutil.net_if_addrs().values() for a in nics if a.address.startswith("fe80:")), None)

# What every attacking program begins with: its arguments are a port, the name it writes into MAIL FROM, and its own.
PROGRAM = r'''
import ctypes, json, os, signal, socket, struct, subprocess, sys, threading, time
PORT, NAME, ARGS = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
LIBC = ctypes.CDLL(None, use_errno=True)
signal.alarm(60)
os.register_at_fork(after_in_child=lambda: signal.alarm(60))

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def dial(address="127.0.0.1", bind=None, port=0, sock=None):
    "Connect; bind: the client's own address, or None."
    sock = sock or socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if bind or port:
        sock.bind((bind or "", port))
    sock.connect(socket.getaddrinfo(address, PORT, sock.family, socket.SOCK_STREAM)[0][4])
    return sock

def talk(read, write, headers=(), body="body", until=None):
    "Send one message as an honest client does, and print the reply that decides; until: go no further than this."
    def say(text=None):
        if text is not None:
            write((text + "\r\n").encode("utf-8", "surrogateescape"))
        while (line := read()) and line[3:4] == b"-":
            pass
        return line.decode("utf-8", "replace").strip()
    say()
    for command in "EHLO client", f"MAIL FROM:<{NAME}@example.org>", "RCPT TO:<to@example.org>", "DATA":
        reply = say(command)
    if command != until:
        if reply[:1] == "3":
            reply = say("\r\n".join([f"Subject: {NAME}", *headers, "", body, "."]))
        say("QUIT")
    print(reply, flush=True)

def send(sock, **options):
    talk(sock.makefile("rb").readline, sock.sendall, **options)

def hasty(sock):
    "Send a whole message without waiting for a single reply."
    sock.sendall((f"EHLO client\r\nMAIL FROM:<{NAME}@example.org>\r\nRCPT TO:<to@example.org>\r\nDATA\r\n"
                  f"Subject: {NAME}\r\n\r\nbody\r\n.\r\nQUIT\r\n").encode())

def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

def unread(near, far):
    "Count the bytes that have arrived at the end with port `near` and not been read."
    for line in open("/proc/net/tcp").readlines()[1:]:
        _, local, remote, _, queues = line.split()[:5]
        if (int(local[-4:], 16), int(remote[-4:], 16)) == (near, far):
            return int(queues[-8:], 16)
    return 0

def disconnect(sock):
    "Take a socket's peer away; it can dial again, and is its maker's as before."
    check(LIBC.connect(sock.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16))
    return sock

def as_root_alone(sock):
    "Be a setuid-root program that holds the socket and nobody else does: two of cat carry what is said."
    talk_to = subprocess.Popen([ARGS[0]], stdin=subprocess.PIPE, stdout=sock)
    listen_to = subprocess.Popen([ARGS[0]], stdin=sock, stdout=subprocess.PIPE)
    sock.close()
    def write(data):
        talk_to.stdin.write(data)
        talk_to.stdin.flush()
    return listen_to.stdout.readline, write

def announce(what="ready"):
    "Tell the test, and go on when it says so."
    print(what, flush=True)
    sys.stdin.readline()
'''


class Site(types.SimpleNamespace):
    """A Postfix that lets clients write early, with the milter; .one is the port of a service with one process.

    .fresh is one where each client gets a new process: such a one reads on after a reset, others mostly do not.
    """

    def start(self, code: str, *args: str, user: str = "mst-alice", port: Optional[int] = None,
              **options: Any) -> subprocess.Popen:
        """Start a client program as that user; .name is what it writes into MAIL FROM."""
        name = f"m{next(NAMES)}"
        command = [mta.PYTHON, "-c", PROGRAM + code, str(port or self.postfix.port), name, *args]
        client = mta.as_user(user, command, **options)
        client.name = name
        return client

    def attack(self, code: str, *args: str, **options: Any) -> types.SimpleNamespace:
        """Run a client program to its end: what the log says of its message, and .reply, the last it printed."""
        client = self.start(code, *args, **options)
        output, errors = client.communicate(timeout=60)
        assert client.returncode == 0, output + errors
        return self.said(client.name, reply=output.splitlines()[-1])

    def said(self, name: str, **more: Any) -> types.SimpleNamespace:
        """Read the one log line about a message."""
        line = self.milter.wait_lines(f"from={name}@example.org", timeout=20)[0]
        values = {"lookup": None, "holder": None, "maybe": None, "reason": None, **dict(FIELD.findall(line)), **more}
        return types.SimpleNamespace(**values)

    def block(self, *entries: str) -> None:
        """Put a new block list in place, as an administrator does."""
        new = self.blocked.with_suffix(".new")
        new.write_text("".join(f"{entry}\n" for entry in entries))
        new.rename(self.blocked)

    def connections(self) -> int:
        """Count the clients that smtpd has accepted."""
        return self.postfix.log().count(": connect from ")

    def wait_idle(self) -> None:
        """Wait until every client that smtpd has accepted is done with."""
        mta.wait_for(lambda: self.connections() <= self.postfix.log().count(": disconnect from "), 60, "smtpd")

    def raw(self, name: str) -> tuple[bytes, bytes]:
        """Give a delivered message as it is: header, body."""
        def find() -> Optional[bytes]:
            texts = [p.read_bytes() for p in (self.postfix.directory / "mail/inbox/new").glob("*")]
            return next((text for text in texts if f"\nSubject: {name}\n".encode() in text), None)
        header, _, body = mta.wait_for(find, 20, f"the message {name}").partition(b"\n\n")
        return header + b"\n", body


@pytest.fixture(scope="module")
def site(users: types.SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start the Postfix and the milter that all attacks are made on; args is logged too, being the most dangerous."""
    one, services = mta.free_port(), {"fresh": {"max_use": "1"}, "front": {"smtpd_authorized_xclient_hosts": "127.0.0.1"}}
    certificate = tmp_path_factory.mktemp("tls") / "pem"
    if shutil.which("openssl"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout",
                        certificate, "-out", f"{certificate}.crt"], check=True, capture_output=True)
        services["tls"] = {"max_use": "1", "smtpd_tls_wrappermode": "yes", "smtpd_tls_security_level": "may",
                           "smtpd_tls_key_file": str(certificate), "smtpd_tls_cert_file": f"{certificate}.crt"}
    postfix = mta.Postfix(addresses="all", master=[f"{one} inet n - n - 1 smtpd -o max_use=1"],
                          main_cf={"smtpd_forbid_unauth_pipelining": "no", "smtputf8_enable": "no",
                                   "cleanup_replace_stray_cr_lf": "no"},
                          services=services)
    blocked = postfix.directory / "blocked"
    blocked.write_text("")
    fields = ["user", "uid", "program", "pid", "exe", "args", "dir", "unit"]
    with postfix, mta.Milter(postfix, log_fields=fields, blocked_mailusers_file=str(blocked)) as milter:
        yield Site(postfix=postfix, milter=milter, one=one, fresh=postfix.ports["fresh"], blocked=blocked)


@pytest.fixture(autouse=True)
def nothing_left(site: Site) -> Iterator[None]:
    """Begin with nobody blocked; a fault of the milter's own during an attack is a failure."""
    tracebacks = site.milter.log().count("Traceback")
    yield
    site.block()
    assert site.milter.log().count("Traceback") == tracebacks, site.milter.log()


@pytest.fixture
def is_alice(site: Site) -> Any:
    """Give a function that makes an attack twice: mst-alice is named, and where she is blocked she is refused."""
    def make(code: str, *args: str, program: Optional[str] = "python3", **options: Any) -> types.SimpleNamespace:
        free = site.attack(code, *args, **options)
        assert (free.user, free.action) == ("mst-alice", "tag"), free
        if program and mta.can_see_others():
            assert free.program == program, free
        site.block("mst-alice")
        again = site.attack(code, *args, **options)
        assert again.reply == "550 5.7.1 User mst-alice is blocked from sending mail", again
        return free
    return make


@pytest.fixture(scope="module")
def setuid_cat(site: Site) -> str:
    """Make a setuid-root program that carries bytes: a copy of cat that only the tests' directory has."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="milter-test."))
    try:
        directory.chmod(0o755)
        cat = shutil.copy("/bin/cat", directory / "cat")
        os.chmod(cat, 0o4755)
        status = mta.run_as("mst-alice", [cat, "/proc/self/status"]).stdout
        if "Uid:\t%d\t0\t" % mta.pwd.getpwnam("mst-alice").pw_uid not in status:
            pytest.skip(f"setuid programs do not work in {directory} (mounted nosuid, or no_new_privs)")
        yield str(cat)
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def stopped(site: Site) -> Iterator[None]:
    """Hold the milter, so that what happens meanwhile surely comes before its next step."""
    def all_stopped() -> bool:
        try:
            return all((task / "stat").read_text().rpartition(") ")[2][0] == "T"
                       for task in pathlib.Path(f"/proc/{site.milter.pid}/task").iterdir())
        except (FileNotFoundError, ProcessLookupError):  # one has just ended
            return False

    os.kill(site.milter.pid, signal.SIGSTOP)
    try:
        mta.wait_for(all_stopped, what="all threads to stop")  # one hears of it first, and tells the others
        yield
    finally:
        os.kill(site.milter.pid, signal.SIGCONT)


def line(client: subprocess.Popen, wanted: str) -> str:
    """Read a client's next line, which must begin with that."""
    text = client.stdout.readline()
    assert text.startswith(wanted), text + client.stdout.read() + client.stderr.read()
    return text.strip()


def go_on(client: subprocess.Popen) -> None:
    """Answer a client that has announced itself."""
    client.stdin.write("\n")
    client.stdin.flush()


# --- 1. local is what the kernel holds the client's end of ------------------------------------------------------

@pytest.mark.parametrize("bind, address", [
    ("127.9.8.7", "127.0.0.1"), ("127.0.0.1", "127.9.8.7"), (HOST, "127.0.0.1"), ("127.0.0.1", HOST), (HOST, HOST),
    (None, HOST), ("127.9.8.7", HOST), ("::ffff:127.0.0.1", "::ffff:127.0.0.1"), (None, "::ffff:127.9.8.7")])
def test_a_client_on_any_address_of_the_host_is_named(is_alice: Any, bind: Optional[str], address: str) -> None:
    """Whatever it binds and whatever it dials, the kernel holds its end."""
    if HOST is None and None in (address, bind):
        pytest.skip("this host has only loopback addresses")
    if ":" in address and not mta.kernel_has_ipv6():
        pytest.skip("no IPv6 here")
    is_alice("address, bind = ARGS; send(dial(address, bind or None))", address, bind or "")


@pytest.mark.parametrize("address", ["::1", LINK])
def test_a_client_over_ipv6_is_named(ipv6: None, is_alice: Any, address: Optional[str]) -> None:
    """::1, and a link-local address, whose sockets belong to one interface."""
    if address is None:
        pytest.skip("this host has no link-local address")
    is_alice("send(dial(ARGS[0]))", address)


@pytest.mark.parametrize("bind", ["", "127.9.8.7"])
def test_a_client_bound_to_a_device_is_named(is_alice: Any, bind: str) -> None:
    """SO_BINDTODEVICE takes no privilege and hides a socket from a request that does not name the device."""
    code = "import socket; socket.socket().setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'lo')"
    if mta.run_as("mst-alice", [mta.PYTHON, "-c", code]).returncode:
        pytest.skip("SO_BINDTODEVICE takes privilege here, as before Linux 5.7")
    is_alice("""
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
send(dial(bind=ARGS[0] or None, sock=sock))""", bind)


def test_a_client_that_speaks_multipath_tcp_is_named(is_alice: Any) -> None:
    """Its TCP socket is one that the kernel made on its behalf."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()  # IPPROTO_MPTCP
    except OSError as error:
        pytest.skip(f"no multipath TCP here: {error.strerror}")
    is_alice("send(dial(sock=socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)))")


def test_an_address_that_is_not_the_hosts_cannot_be_taken(site: Site) -> None:
    """IP_FREEBIND binds it, but the kernel does not let it dial."""
    client = site.start("""
sock = socket.socket()
sock.setsockopt(socket.SOL_IP, 15, 1)  # IP_FREEBIND
try:
    send(dial(bind="203.0.113.7", sock=sock))
except OSError as error:
    print(error.errno)""")
    assert client.communicate(timeout=60)[0].strip() in ("22", "101")  # EINVAL; ENETUNREACH without a route


# The MTA's end and mst-alice's, in a network namespace; prints both, and reads what she said when told.
ENDS = """
import json, os, pwd, signal, socket, struct, sys
bind, address, device, end = sys.argv[1:]
signal.alarm(50)
near, far = os.pipe()
family = socket.AF_INET6 if ":" in bind else socket.AF_INET
listener = socket.create_server(("::" if family == socket.AF_INET6 else "", 0), family=family)
if os.fork() == 0:
    signal.alarm(50), os.close(far)
    user = pwd.getpwnam("mst-alice")
    os.setgroups([]), os.setgid(user.pw_gid), os.setuid(user.pw_uid)
    sock = socket.socket(family)
    if device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
    sock.settimeout(20)
    sock.bind((bind, 0))
    sock.connect((address, listener.getsockname()[1]))
    sock.sendall(b"EHLO")
    if end == "resets":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    os.read(near, 1)  # until the other end is closed
    os._exit(0)
listener.settimeout(20)
accepted, client = listener.accept()
if end == "resets":
    while not struct.unpack_from("B", accepted.getsockopt(6, 11, 104))[0] == 7:  # TCP_INFO: until it has closed
        pass
print(json.dumps([client[:2], accepted.getsockname()[:2] if end != "resets" else [address, listener.getsockname()[1]]]), flush=True)
sys.stdin.readline()
if end != "resets":
    accepted.recv(100)
print("read", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def network(users: Any) -> Iterator[list[str]]:
    """Make a network of the test's own; give the prefix of commands that are run in it."""
    setup = "ip link set lo up && ip link add mst0 type veth peer name mst1 && ip link set mst0 up && ip link set mst1 up " \
            "&& ip route add local 10.9.0.0/16 dev lo && echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind " \
            "&& { [ ! -e /proc/sys/net/ipv6 ] || { echo 1 >/proc/sys/net/ipv6/conf/all/forwarding && ip -6 addr add " \
            "2001:db8:5::1/64 dev mst0 nodad && ip -6 route add local 2001:db8:3::/64 dev mst0; }; } && echo ready; cat"
    space = subprocess.Popen(["unshare", "--net", "sh", "-c", setup], text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if space.stdout.readline() != "ready\n":
            space.stdin.close()
            pytest.skip(f"no network namespaces, routes or veth here: {space.stderr.read()}")
        yield ["nsenter", f"--net=/proc/{space.pid}/ns/net"]
    finally:
        space.stdin.close()
        space.wait(20)


@pytest.mark.parametrize("end", ["stays", "resets"])
@pytest.mark.parametrize("bind, address, device", [
    ("10.9.1.1", "127.0.0.1", ""), ("2001:db8:3::5", "2001:db8:3::1", "mst0"), ("2001:db8:5::", "2001:db8:5::1", "mst0")],
    ids=["IPv4", "IPv6", "anycast, where the host is a router"])
def test_an_address_that_is_the_hosts_by_route_only_is_local(network: list[str], make_milter: Any, bind: str, address: str,
                                                             device: str, end: str) -> None:
    """No interface has it, and whether it can be bound says nothing; mst-alice is blocked and must not pass for remote."""
    if ":" in bind and not mta.kernel_has_ipv6():
        pytest.skip("no IPv6 here")
    milter = make_milter(prefix=network, blocked_mailusers=["mst-alice"]).start()
    ends = subprocess.Popen([*network, mta.PYTHON, "-c", ENDS, bind, address, device, end], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        text = ends.stdout.readline()
        assert text, ends.stderr.read()
        client, server = json.loads(text)
        with mta.Wire(milter.socketname) as wire:
            wire.connect(*client, daemon_addr=server[0], daemon_port=str(server[1]))
            go_on(ends)
            line(ends, "read")
            replies = wire.message()
    finally:
        ends.communicate()
    if end == "stays":
        assert replies[-1] == ("replycode", "550 5.7.1 User mst-alice is blocked from sending mail"), milter.log()
    else:
        assert ("addheader", NAME, "user=? program=?") in replies and "lookup=closed" in milter.log(), replies


def test_a_client_that_resets_before_it_is_accepted_does_not_pass_for_a_remote_one(site: Site) -> None:
    """Postfix no longer knows its address, and takes its message all the same."""
    holder = site.start("sock = dial(); send(sock, until='DATA'); announce()", port=site.one)
    line(holder, "354")
    line(holder, "ready")
    hasty = site.start("sock = dial(); hasty(sock); reset(sock)", port=site.one)
    assert hasty.wait(20) == 0
    holder.communicate("\n", timeout=20)
    said = site.said(hasty.name)
    assert (said.client, said.user, said.lookup, said.action) == ("?", "?", "closed", "tag")


DELEGATED = """
near, far = socket.socketpair()
child = os.fork()
if child == 0:
    near.close()
    check(LIBC.unshare(0x10000000))  # CLONE_NEWUSER
    far.send(b"x")
    assert far.recv(1)
    %s
    os._exit(0)
far.close()
near.recv(1)
for tool, number in ("newuidmap", os.getuid()), ("newgidmap", os.getgid()):
    kind = tool[3:6]
    first = next(line.split(":")[1] for line in open("/etc/sub" + kind) if line.startswith("mst-alice:"))
    subprocess.run([tool, str(child), "0", str(number), "1", "1", first, "65536"], check=True)
near.send(b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("code", ["os.setuid(601); send(dial())",
                                  "sock = socket.socket(); os.fchown(sock.fileno(), 601, 601); send(dial(sock=sock))"])
def test_a_delegated_uid_is_the_user_it_was_delegated_to(site: Site, is_alice: Any, code: str) -> None:
    """Through newuidmap a user dials under, or gives a socket to, a uid of its range in /etc/subuid."""
    if shutil.which("newuidmap") is None:
        pytest.skip("newuidmap is not installed (package uidmap)")
    subuid = pathlib.Path("/etc/subuid")
    if not subuid.exists() or "mst-alice:" not in subuid.read_text():
        pytest.skip("useradd delegates no uids here")
    tried = site.start(DELEGATED % "os.setuid(601)")
    _, errors = tried.communicate(timeout=60)
    if tried.returncode:
        pytest.skip(f"users may not take delegated uids here: {errors.splitlines()[-1]}")
    said = is_alice(DELEGATED % code, program=None)
    first = re.search(r"^mst-alice:(\d+)", subuid.read_text(), re.M)[1]
    assert int(said.uid) == int(first) + 600


# --- 2. a socket's maker is its owner ---------------------------------------------------------------------------

def test_a_child_that_inherited_the_socket_sends_as_its_maker(is_alice: Any) -> None:
    """The parent waits, holding the socket as well."""
    is_alice("""
sock = dial()
if os.fork() == 0:
    send(sock)
    os._exit(0)
os.wait()""")


def test_a_child_whose_parent_has_gone_sends_as_its_maker(is_alice: Any) -> None:
    """Nobody who dialled is there any more when the message is sent."""
    is_alice("""
sock, parent = dial(), os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    pass
send(sock)""")


def test_a_setuid_program_that_holds_the_socket_alone_is_not_its_maker(site: Site, is_alice: Any,
                                                                       setuid_cat: str) -> None:
    """Dialled while the milter is stopped, held by root's program alone when it looks; the log names both."""
    for entries, reply in ((), "250 "), (["mst-alice"], "550 5.7.1 User mst-alice is blocked"):
        site.block(*entries)
        with stopped(site):
            client = site.start("read_write = as_root_alone(dial()); print('held', flush=True); talk(*read_write)",
                                setuid_cat)
            line(client, "held")
        line(client, reply)
        said = site.said(client.name)
        assert said.user == "mst-alice"
        if mta.can_see_others():
            assert (said.program, said.holder) == ("cat", "root")


def test_a_socket_passed_to_another_users_process_is_still_its_makers(site: Site, is_alice: Any) -> None:
    """mst-bob's process sends the whole message; the log says who has it."""
    with tempfile.TemporaryDirectory(prefix="milter-test.") as directory, contextlib.ExitStack() as stack:
        os.chmod(directory, 0o777)
        receiver = """
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(ARGS[0])
    os.chmod(ARGS[0], 0o777)
    listener.listen()
    print("ready", flush=True)
    for turn in range(2):
        with listener.accept()[0] as giver:
            NAME, fds, _, _ = socket.recv_fds(giver, 100, 1)
            NAME = NAME.decode()
            read, write = os.pipe()
            os.dup2(write, 1)
            with socket.socket(fileno=fds[0]) as sock:
                send(sock)
            giver.sendall(os.read(read, 1000))
"""
        bob = stack.enter_context(site.start(receiver, directory + "/s", user="mst-bob"))
        line(bob, "ready")
        said = is_alice("""
with socket.socket(socket.AF_UNIX) as taker:
    sock = socket.socket()
    taker.connect(ARGS[0])
    dial(sock=sock)
    socket.send_fds(taker, [NAME.encode()], [sock.fileno()])
    sock.close()
    print(taker.recv(1000).decode().strip())""", directory + "/s", program=None)
        bob.communicate(timeout=20)
    if mta.can_see_others() and said.program != "?":
        assert said.holder in ("mst-bob", None), said


# A root master makes a socket and hands it to a worker, which has dropped to mst-alice for good.
WORKER = """
kind, port = ARGS[1], int(ARGS[2])
listener = socket.create_server(("127.0.0.1", port))
if kind == "accepted":
    caller = socket.create_connection(listener.getsockname())
    handed = listener.accept()[0]
    caller.close()
else:
    handed = listener
if os.fork() == 0:
    if kind == "accepted":
        listener.close()
    user = __import__("pwd").getpwnam("mst-alice")
    os.setgroups([]), os.setgid(user.pw_gid), os.setuid(user.pw_uid)
    %s
    os._exit(0)
handed.close(), listener.close()
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
HANDED = [("listener", "0"), ("listener", "fixed"), ("accepted", "0"), ("accepted", "fixed")]


def worker(site: Site, code: str, kind: str, port: str, cat: str = "") -> types.SimpleNamespace:
    """Run a root master whose worker does that with the socket it was handed, until its holders have been seen."""
    if sum(1 for _ in glob.iglob("/proc/[0-9]*/task/[0-9]*/fd/*")) > 50_000:
        pytest.skip("too full a machine: not all who may hold root's socket can be looked at in time")

    def once() -> Optional[types.SimpleNamespace]:
        number = str(mta.free_port()) if port == "fixed" else port
        said = site.attack(WORKER % code.replace("\n", "\n    "), cat, kind, number, user="root")
        assert said.user == "?", said
        return said if said.holder or not mta.can_see_others() else None
    return mta.wait_for(once, 30, "an answer about the holders of root's socket")


@pytest.mark.parametrize("kind, port", HANDED)
def test_a_worker_that_dials_with_its_masters_socket_is_not_root(site: Site, kind: str, port: str) -> None:
    """A listener or an accepted socket, disconnected, with a port of its own or one the kernel gives."""
    if (kind, port) != ("listener", "fixed") and not mta.can_see_others():
        pytest.skip("who holds a socket cannot be seen here, and its port tells nothing")
    code = "send(dial(sock=disconnect(handed)))"
    said = worker(site, code, kind, port)
    assert (said.user, said.lookup, said.action) == ("?", "handed-down", "tag")
    if mta.can_see_others():
        assert said.holder == "mst-alice"
        site.block("mst-alice")
        assert worker(site, code, kind, port).reply == "550 5.7.1 User mst-alice is blocked from sending mail"


def test_where_nobody_may_look_at_other_users_processes_root_is_not_named(users: Any, make_mail: Any) -> None:
    """Started under postfix's uid, and no rule for sudo: it could be root's socket in anybody's hands."""
    mail = make_mail(user="postfix", lsof_command=["sudo", "-n", "/usr/bin/no-such-lsof"])
    site = Site(postfix=mail.postfix, milter=mail.milter)
    code = WORKER % "send(dial(sock=disconnect(handed)))"
    for said in site.attack(code, "", "accepted", "0", user="root"), site.attack("send(dial())", user="root"):
        assert (said.user, said.action) == ("?", "tag") and said.lookup in ("not-permitted", "no-helper"), said
    assert site.attack("send(dial())").user == "mst-alice"


def test_a_worker_whose_masters_socket_is_held_by_a_setuid_program_is_not_root(
        site: Site, sees_others: None, setuid_cat: str) -> None:
    """Only that program is seen: the worker's own descriptor is under way in a socket while the milter looks."""
    said = worker(site, """
near, far = socket.socketpair(socket.AF_UNIX)
bystander = subprocess.Popen([ARGS[0]], stdin=subprocess.PIPE, pass_fds=[handed.fileno()])
dial(sock=disconnect(handed))
socket.send_fds(near, [b"x"], [handed.fileno()])
os.close(handed.detach())
time.sleep(0.5)  # longer than a search may take
with socket.socket(fileno=socket.recv_fds(far, 1, 1)[1][0]) as handed:
    send(handed)
bystander.kill()""", "accepted", "0", setuid_cat)
    assert said.user == "?", said


FPM = """
$libc = FFI::cdef("int connect(int, void *, int); long read(int, void *, long); long write(int, const char *, long); int *__errno_location();");
$unspec = FFI::new("char[16]");
$server = FFI::new("char[16]");
FFI::memcpy($server, pack("vnNx8", 2, (int) $_GET["port"], 0x7f000001), 16);
foreach (glob("/proc/self/fd/*") as $link)  // the pool's listener, whose inode the kernel lists with its port
    if (preg_match("/socket:.(\\d+)/", @readlink($link), $found)
        && preg_match("/:" . sprintf("%04X", $_GET["listener"]) . " 00000000:0000 0A .* $found[1] /", file_get_contents("/proc/net/tcp")))
        $fd = (int) basename($link);
$libc->connect($fd, $unspec, 16);
if ($libc->connect($fd, $server, 16) < 0) exit("errno " . $libc->__errno_location()[0]);
$buffer = FFI::new("char[4096]");
$name = $_GET["name"];
foreach (["", "EHLO x\\r\\n", "MAIL FROM:<$name@example.org>\\r\\n", "RCPT TO:<to@example.org>\\r\\n", "DATA\\r\\n",
          "Subject: $name\\r\\n\\r\\nbody\\r\\n.\\r\\n"] as $text) {
    if ($text) $libc->write($fd, $text, strlen($text));
    $reply = FFI::string($buffer, $libc->read($fd, FFI::addr($buffer), 4096));
}
echo $reply;
"""


def test_a_php_fpm_worker_that_dials_with_the_pools_listener_is_not_root(site: Site) -> None:
    """A real pool: root's master listens on TCP, the site runs as mst-alice and calls connect(2) through FFI."""
    program = mta.Pools.program()
    if program is None:
        pytest.skip("php-fpm or cgi-fcgi is not installed (packages php-fpm, libfcgi-bin)")
    if b"FFI" not in subprocess.run([program, "-m"], capture_output=True, check=True).stdout:
        pytest.skip("this PHP has no FFI")
    with tempfile.TemporaryDirectory(prefix="milter-test.") as directory:
        os.chmod(directory, 0o755)
        port, name, file = mta.free_port(), f"m{next(NAMES)}", pathlib.Path(directory, "index.php")
        file.write_text("<?php" + FPM)
        with mta.Pools(file.parent, {"site": ("mst-alice", f"127.0.0.1:{port}")}, "php_admin_value[ffi.enable] = 1\n",
                       ["-d", "extension=ffi"]) as fpm:
            output = fpm.ask("site", file, f"port={site.postfix.port}&name={name}&listener={port}")
    assert "queued as" in output, output
    said = site.said(name)
    assert (said.client, said.user, said.lookup) == (f"127.0.0.1:{port}", "?", "handed-down")


# --- 3. endpoints that change hands -----------------------------------------------------------------------------

HASTY = "sock = dial(port=int(ARGS[0])); hasty(sock); announce('sent'); %s"
NOT_ALICE = {"mst-alice", "?"}  # newer kernels (6.17) know whose an orphan was; others say nobody's


def hasty(site: Site, end: str, after: Any = None, port: Optional[int] = None) -> types.SimpleNamespace:
    """Have mst-alice send everything at once and leave, then `after`, before the milter looks for the first time.

    An smtpd that notices the reset before it reads drops the message; then all of it is tried again.
    """
    def once() -> Optional[types.SimpleNamespace]:
        source, other = mta.free_port(), None
        with stopped(site):
            accepted = site.connections()
            client = site.start(HASTY % end, str(source), port=port or site.fresh)
            line(client, "sent")
            mta.wait_for(lambda: site.connections() > accepted, 20, "smtpd to accept")
            client.communicate("\n", timeout=20)
            other = after(source) if after else None
        if other:
            other.communicate("\n", timeout=60)
        site.wait_idle()
        if not site.milter.lines(f"from={client.name}@"):
            return None
        return site.said(client.name, other=other and site.said(other.name) if other and other.sends else None)
    return mta.wait_for(once, 30, "a message that was read after the reset")


@pytest.mark.parametrize("end", ["sock.close()", "sock.shutdown(socket.SHUT_RDWR)", "reset(sock)", "os._exit(0)"])
def test_a_client_that_has_left_is_never_root(site: Site, end: str) -> None:
    """What the kernel says of a socket without an owner is uid 0 and inode 0."""
    said = hasty(site, end)
    assert said.user in NOT_ALICE and said.program == "?", said
    assert said.user == "mst-alice" or said.lookup in ("closed", "reused"), said


def victim(site: Site, code: str, port: Optional[int] = None, sends: bool = True) -> Any:
    """Give what mst-bob does next, from the same client port: connect, say so, go on when told (and send)."""
    def start(source: int) -> subprocess.Popen:
        other = site.start(code, str(source), user="mst-bob", port=port)
        line(other, "there")
        other.sends = sends
        return other
    return start


def test_a_victim_who_took_the_endpoints_before_the_lookup_is_not_named(site: Site) -> None:
    """mst-alice resets, mst-bob's connect takes the same four endpoints, then the milter looks."""
    said = hasty(site, "reset(sock)", victim(site, "sock = dial(port=int(ARGS[0])); announce('there'); send(sock)",
                                             site.fresh))
    assert (said.user, said.lookup) == ("?", "reused")
    assert said.other.user in ("mst-bob", "?")


@pytest.mark.parametrize("service", ["fresh", "one"])
def test_a_victim_who_speaks_first_and_is_not_yet_accepted_is_not_named(site: Site, service: str) -> None:
    """It has sent bytes, as the owner of the message must have; but the MTA has not accepted it."""
    port = getattr(site, service)
    said = hasty(site, "reset(sock)", victim(site, "sock = dial(port=int(ARGS[0])); hasty(sock); announce('there'); "
                                             "print(sock.makefile().read())", port), port)
    assert (said.user, said.lookup) == ("?", "reused"), said
    assert said.other.user in ("mst-bob", "?")


def test_a_victim_who_took_the_endpoints_after_the_lookup_is_not_named(site: Site) -> None:
    """mst-alice was looked up, and confirmed at MAIL; before the end of her message mst-bob has her port."""
    def once() -> bool:
        """Try it, and say whether her process was described before she left, which can be late on a busy machine."""
        source = mta.free_port()
        client = site.start("""
sock = dial(port=int(ARGS[0]))
send(sock, until="DATA")
announce()
sock.sendall(b"Subject: x\\r\\n\\r\\nbody\\r\\n.\\r\\n")
while unread(PORT, int(ARGS[0])):
    pass
reset(sock)""", str(source))
        line(client, "354")
        line(client, "ready")
        with stopped(site):
            client.communicate("\n", timeout=20)
            other = victim(site, "sock = dial(port=int(ARGS[0])); announce('there'); send(sock)")(source)
        other.communicate("\n", timeout=20)
        said = site.said(client.name)
        assert said.user == "mst-alice" and site.said(other.name).user in ("mst-bob", "?")
        return said.lookup is None
    mta.wait_for(once, 20, "a process that is described before it leaves")


@pytest.mark.parametrize("code", ["sock = socket.create_server(('127.0.0.1', int(ARGS[0]))); announce('there')",
                                  "server = socket.create_server(('127.0.0.1', 0)); PORT = server.getsockname()[1]; "
                                  "sock = dial(port=int(ARGS[0])); hasty(sock); announce('there')"])
def test_another_socket_on_the_same_port_is_not_taken_for_the_client(site: Site, code: str) -> None:
    """mst-bob's listener, or his connection to another server, has the port that mst-alice had."""
    said = hasty(site, "reset(sock)", victim(site, code, sends=False))
    assert (said.user, said.lookup) == ("?", "closed")


@pytest.fixture(scope="module")
def strict(users: types.SimpleNamespace) -> Iterator[Site]:
    """Give a site where nobody may address more than one recipient an hour; .forbid is a port where writing early is forbidden."""
    smtpd = {"max_use": "1", "smtpd_client_connection_count_limit": "0"}
    postfix = mta.Postfix(main_cf={"smtpd_forbid_unauth_pipelining": "no"}, services={
        "fresh": smtpd, "forbid": {**smtpd, "smtpd_forbid_unauth_pipelining": "yes"}})
    with postfix, mta.Milter(postfix, hourly_limits={"*": 1, "root": None}) as milter:
        yield Site(postfix=postfix, milter=milter)


POLITE = """
file, say = sock.makefile("rb"), lambda text: sock.sendall(text.replace("|", "\\r\\n").encode())
def reply():
    while (line := file.readline()) and line[3:4] == b"-":
        pass
envelope = (f"MAIL FROM:<{NAME}@example.org>|", "RCPT TO:<to@example.org>|")
text = f"Subject: {NAME}||body|"
reply()
if ARGS[0] != "HELO":
    say("EHLO client|"), reply()
if ARGS[0] == "BDAT":
    say(f"{''.join(envelope)}BDAT {len(text) + 3} LAST|{text}")
else:
    for command in *envelope, "DATA|":
        say(command), reply()
    say(text + ".|")
reset(sock)
"""


@pytest.mark.parametrize("service", ["fresh", "forbid"])
@pytest.mark.parametrize("how", ["DATA", "HELO", "BDAT"], ids=[
    "after the final dot", "after the final dot, without an EHLO", "with all that may follow the EHLO"])
def test_a_client_that_resets_with_its_last_byte_is_named_and_counted(strict: Site, service: str, how: str) -> None:
    """Its commands were waited for until then: by that time the milter has made sure whose they are."""
    def once() -> Optional[types.SimpleNamespace]:
        client = strict.start("sock = dial()\n" + POLITE, how, port=strict.postfix.ports[service])
        assert client.wait(20) == 0, client.stderr.read()
        strict.wait_idle()
        return strict.said(client.name) if strict.milter.lines(f"from={client.name}@") else None
    said = [mta.wait_for(once, 30, "a message that was read after the reset") for _ in range(5)]
    assert {(one.user, one.maybe) for one in said} == {("mst-alice", None)}, said
    assert {one.action for one in said[1:]} == {"tempfail"} and {one.reason for one in said[1:]} == {"limit"}, said


def test_a_name_behind_ehlo_that_is_not_utf8_hides_nobody(site: Site) -> None:
    """pymilter cannot pass it on, and behind the answer a client may send all the rest at once, and reset."""
    for _ in range(5):
        client = site.start(r"""
sock = dial()
lines, body = sock.makefile("rb"), b"Subject: x\r\n\r\nbody\r\n"
lines.readline()
sock.sendall(b"EHLO \xff\r\n")
while lines.readline()[3:4] == b"-":
    pass
lines.close()
sock.sendall(b"MAIL FROM:<%s@example.org>\r\nRCPT TO:<to@example.org>\r\nBDAT %d LAST\r\n" % (NAME.encode(), len(body)) + body)
reset(sock)""")
        _, errors = client.communicate(timeout=60)
        assert client.returncode == 0, errors
        assert site.said(client.name).user == "mst-alice"


RACER = """
import random, ssl
give = os.fdopen(int(ARGS[0]), "w", 1)
for turn in sys.stdin:
    number, port = turn.split()
    NAME = "ra" + number
    sock = dial(port=int(port))
    if ARGS[1] == "tls":
        sock = ssl._create_unverified_context().wrap_socket(sock)
    hasty(sock)
    give.write(f"{number} {port}\\n")
    time.sleep(random.choice((0, 0.0003, 0.001, 0.002, 0.004)) * random.random())
    reset(sock)
"""
TAKER = """
import ssl
for turn in os.fdopen(int(ARGS[0])):
    number, port = turn.split()
    NAME = "rb" + number
    for tries in range(5000):
        try:
            sock = dial(port=int(port))
            break
        except OSError:
            pass
    else:
        print("never"); continue
    try:
        if ARGS[1] == "tls":
            sock = ssl._create_unverified_context().wrap_socket(sock)
        if int(number[1:]) % 3:
            send(sock)
        else:
            hasty(sock)
            print(sock.makefile().read().splitlines()[-1:], flush=True)
    except OSError as error:
        print(error, flush=True)
    sock.close()
"""


@pytest.mark.parametrize("kind", ["idle", "busy", "tls"], ids=["idle", "busy", "busy, on a port that begins with TLS"])
def test_no_race_for_the_endpoints_names_the_victim(site: Site, long: bool, kind: str) -> None:
    """mst-alice resets at a random moment, mst-bob's connect takes her port; the names are never each other's."""
    if kind == "tls" and "tls" not in site.postfix.ports:
        pytest.skip("no certificate can be made without openssl")
    tries, port = 1000 if long else 30, site.postfix.ports["tls" if kind == "tls" else "fresh"]
    load = subprocess.Popen(["smtp-source", "-s", "8", "-m", "100000", "-t", "x@example.net",
                             f"127.0.0.1:{site.postfix.port}"], stdin=subprocess.DEVNULL) if kind != "idle" else None
    near, far = os.pipe()
    bob = site.start("signal.alarm(900)" + TAKER, str(near), kind, user="mst-bob", port=port, pass_fds=[near])
    alice = site.start("signal.alarm(900)" + RACER, str(far), kind, port=port, pass_fds=[far])
    os.close(near), os.close(far)
    try:
        for number in range(tries):
            alice.stdin.write(f"{kind[0]}{number} {mta.free_port()}\n")
            alice.stdin.flush()
            assert bob.stdout.readline(), bob.stderr.read()
    finally:
        alice.stdin.close()
        bob.wait(60), alice.wait(60)
        if load:
            load.kill()
            load.wait()
    site.wait_idle()
    said = {prefix: [site.said(found) for found in re.findall(rf"from=({prefix}{kind[0]}\d+)@", site.milter.log())]
            for prefix in ("ra", "rb")}
    print({prefix: {key: sum((s.user, s.lookup) == key for s in found) for key in {(s.user, s.lookup) for s in found}}
           for prefix, found in said.items()})
    assert {one.user for one in said["ra"]} <= {"mst-alice", "?"}
    assert {one.user for one in said["rb"]} <= {"mst-bob", "?"}
    assert any(one.user == "mst-bob" for one in said["rb"])
    assert kind == "tls" or any(one.lookup for one in said["ra"])  # one that resets in a handshake is mostly dropped


# --- 4. descriptors that hide -----------------------------------------------------------------------------------

@pytest.mark.parametrize("code", [
    pytest.param("sock = dial(); threading.Thread(target=send, args=(sock,)).start(); LIBC.syscall(EXIT, 0)",
                 id="the thread-group leader has exited"),
    pytest.param("def hide():\n    check(LIBC.unshare(0x400))  # CLONE_FILES\n    send(dial())\n"
                 "thread = threading.Thread(target=hide); thread.start(); thread.join()",
                 id="a thread has a descriptor table of its own"),
    pytest.param("check(LIBC.prctl(4, 0)); send(dial())", id="the process is not dumpable")])
def test_a_process_that_hides_its_descriptors_is_found(is_alice: Any, code: str) -> None:
    """The user is the kernel's answer; the program is searched for in every thread's table."""
    exit_number = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)
    if exit_number is None:
        pytest.skip(f"the number of exit(2) on {os.uname().machine} is not known here")
    is_alice(f"EXIT = {exit_number}\n" + code)


def test_a_process_in_another_pid_namespace_is_found(is_alice: Any) -> None:
    """It has another number there; the kernel's answer and /proc are the host's."""
    if mta.run_as("mst-alice", ["unshare", "-U", "--pid", "--fork", "true"]).returncode:
        pytest.skip("users may not make user and pid namespaces here")
    is_alice("""
check(LIBC.unshare(0x10000000 | 0x20000000))  # CLONE_NEWUSER | CLONE_NEWPID
if os.fork() == 0:
    assert os.getpid() == 1
    send(dial())
    os._exit(0)
os.wait()""")


# --- 5. the process that is described is the one that has the socket --------------------------------------------

@pytest.fixture(scope="module")
def script() -> Any:
    """Import the script."""
    spec = importlib.util.spec_from_file_location("milter_sysuser", mta.SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pid_that_was_reused_before_it_is_described_is_noticed(root: None, script: Any) -> None:
    """A process ends after it was found, and another gets its number."""
    last = pathlib.Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("the next pid cannot be chosen here (ns_last_pid)")
    for _ in range(200):  # other processes may take the number first
        first = subprocess.Popen(["sleep", "60"])
        process = os.open(f"/proc/{first.pid}", os.O_PATH | os.O_DIRECTORY)
        first.kill(), first.wait()
        try:
            last.write_text(str(first.pid - 1))
        except OSError as error:
            os.close(process)
            pytest.skip(f"the next pid cannot be chosen here: {error.strerror}")
        second = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        try:
            if second.pid == first.pid:
                try:
                    assert not script.read_process(process, frozenset({"program", "exe", "dir", "unit"})).get("program")
                except (OSError, psutil.Error):
                    pass
                return
        finally:
            os.close(process)
            second.communicate()
    pytest.skip("no process got the number of the one before in 200 tries")


def test_a_socket_that_closed_between_finding_and_describing_is_gone(root: None, script: Any,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is read again after the process was taken hold of."""
    finder, held = script.Finder(["program"]), socket.socket()
    inode, first = os.fstat(held.fileno()).st_ino, script.Finder.find_holder
    monkeypatch.setattr(script.Finder, "find_holder", lambda *args: (first(*args), held.close())[0])
    assert finder.answer(script.WHO_HAS, os.geteuid(), inode, 0) == {"why": "not-found"}


class Announced:
    """A look at the kernel during which another session announces the same end of the MTA's."""

    def __init__(self, milter: Any, read: int) -> None:
        self.milter, self.read = milter, read

    def look_again(self, mta_end: Any) -> Any:
        """Have the rival come, and let more have been read."""
        self.milter.claims[mta_end.cookie].append(self.rival)
        return mta_end._replace(read=self.read)


@pytest.mark.parametrize("how", ["stays", "comes and goes"])
def test_a_rival_who_comes_during_the_look_is_seen(how: str, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read by then may be his: it proves nothing."""
    monkeypatch.setattr(script, "RIVAL_SECONDS", 0.0)
    monkeypatch.setattr(script.SysuserMilter, "claims", {})
    end = script.Endpoint(b"\x7f\0\0\1", 25)
    diag = script.Diag(*(end if kind == "Endpoint" else 1 for kind in script.Diag.__annotations__.values()))
    one, rival = script.SysuserMilter(), script.SysuserMilter()
    for session in one, rival:
        session.owner = script.ClientSocket(1001, "", 1)._replace(mta_end=diag)
    one.claims[diag.cookie] = [one]
    look = Announced(one, diag.read + 20)
    look.rival = rival
    monkeypatch.setattr(script.SysuserMilter, "lookup", look, raising=False)
    if how == "comes and goes":
        first = look.look_again
        look.look_again = lambda mta_end: (first(mta_end), rival.close())[0]
    assert one.confirm() == "reused" and not one.confirmed


def test_a_rival_who_came_and_went_before_the_message_takes_no_name(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read between MAIL and the end of the message is enough, as it was between EHLO and MAIL."""
    monkeypatch.setattr(script.SysuserMilter, "claims", {})
    diag = script.Diag(1, *[script.Endpoint(b"\x7f\0\0\1", 25)] * 2, 1001, 1, 4711)
    read = iter(range(20, 200, 20))
    look = types.SimpleNamespace(look_again=lambda mta_end: mta_end._replace(read=next(read)))
    monkeypatch.setattr(script.SysuserMilter, "lookup", look, raising=False)
    one, rival = script.SysuserMilter(), script.SysuserMilter()
    for session in one, rival:
        session.owner = script.ClientSocket(1001, "", 1, mta_end=diag)
    one.claims[diag.cookie] = [one]
    one.hello("client")
    assert one.confirmed
    one.claims[diag.cookie].append(rival)
    rival.close()
    one.envfrom("from@example.org")
    assert not one.confirm()


@pytest.mark.parametrize("path", ["fd", "task"])
@pytest.mark.parametrize("refusal, why", [(errno.ENFILE, "gone"), (errno.EACCES, "not-permitted")], ids=["for want of files", "by a rule"])
def test_a_holder_who_cannot_be_looked_at_is_not_overlooked(
        path: str, refusal: int, why: str, root: None, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else root would be named for a socket that a stranger has, too."""
    with socket.create_server(("127.0.0.1", 0)) as held, mta.as_user("nobody", ["sleep", "60"]) as other:
        try:
            monkeypatch.setattr(script, "SEARCH_SECONDS", 60)  # root's sockets are looked for everywhere
            monkeypatch.setattr(script, "SEARCH_LINKS", 10**9)
            inode = os.fstat(held.fileno()).st_ino
            assert script.Finder(["program"]).answer(script.WHO_HAS, 0, inode, 0)["holder_uid"] == 0

            def short(real: Callable) -> Callable:
                def call(name: Any, *arguments: Any, **options: Any) -> Any:
                    if name == f"/proc/{other.pid}/{path}":
                        raise OSError(refusal, os.strerror(refusal))
                    return real(name, *arguments, **options)
                return call
            name = "open" if path == "fd" else "stat"
            monkeypatch.setattr(script.os, name, short(getattr(os, name)))
            assert script.Finder(["program"]).answer(script.WHO_HAS, 0, inode, 0) == {"why": why}
        finally:
            other.kill()


def test_a_process_that_ends_while_it_is_described_is_not_roots(sees_others: None, script: Any,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says of one that has ended looks like root's: it ends right after its link was read again."""
    nobody, real = pwd.getpwnam("nobody"), os.readlink
    listener = socket.create_server(("127.0.0.1", 0))
    code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print(1, flush=True); sys.stdin.read()"
    client = mta.as_user(nobody.pw_name, [mta.PYTHON, "-c", code, str(listener.getsockname()[1])])
    line(client, "1")
    accepted, address = listener.accept()
    lookup = script.KernelLookup(lambda mta_end: "redirected")
    owner = lookup.find_client_socket(script.endpoint(*address), script.endpoint(*listener.getsockname()))

    def readlink(path: Any, *, dir_fd: Optional[int] = None) -> str:
        target = real(path, dir_fd=dir_fd)
        if str(path).startswith("fd/"):
            client.kill()
            client.wait()
        return target
    monkeypatch.setattr(script.os, "readlink", readlink)
    assert owner.uid == nobody.pw_uid
    assert script.Finder(["program"]).answer(script.WHO_HAS, owner.uid, owner.inode, owner.cgroup)["why"] in ("gone", "not-found")
    client.communicate()
    accepted.close()
    listener.close()


# --- 7. headers that only the milter may write ------------------------------------------------------------------

NAME = "X-Sender-Process-Info"
FORGED = f"{NAME}: user=root program=forged"
DIAL = {"local": "sock = dial(); ", "remote": "sock = dial(); sock.recv(999); "
                                              "sock.sendall(b'XCLIENT ADDR=203.0.113.5 PORT=4711\\r\\n'); "}
HEADERS = {
    "one": [FORGED], "twenty": [FORGED] * 20, "a hundred": [FORGED] * 100,
    "any case": [FORGED.replace(NAME, name) for name in (NAME.upper(), NAME.lower(), "x-SENDER-process-INFO")],
    "folded": [f"{NAME}:\r\n user=root\r\n\tprogram=forged"], "empty": [f"{NAME}:", FORGED],
    "blank before the colon": [FORGED.replace(":", blank + ":") for blank in (" ", "\t", " \t ", "")],
    "odd bytes before the colon": [FORGED, *(FORGED.replace(":", odd + ":") for odd in ("\v", "\f", "\x1c", "\u00a0")), FORGED],
    "odd bytes in the value": [FORGED + "\udcff", FORGED + "\u212a"],
}


@pytest.mark.parametrize("client", ["local", "remote"])
@pytest.mark.parametrize("kind", HEADERS)
def test_forged_headers_are_gone(site: Site, kind: str, client: str) -> None:
    """Ours alone is in the header of a local client's mail, none in a remote one's."""
    sender = site.start(DIAL[client] + "send(sock, headers=json.loads(ARGS[0]))", json.dumps(HEADERS[kind]),
                        port=site.postfix.ports["front"])
    output, errors = sender.communicate(timeout=60)
    assert output.startswith("250 "), output + errors
    header, body = site.raw(sender.name)
    found = re.findall(rb"(?im)^x-sender-process-info[\s\x00-\x20]*:.*(?:\n[ \t].*)*", header)
    assert found == [] if client == "remote" else len(found) == 1 and b"user=mst-alice" in found[0], header
    assert b"forged" not in header


def test_the_same_text_in_the_body_or_an_attached_message_is_left_alone(site: Site) -> None:
    """Only the message's own header is ours, and none whose name is only nearly that."""
    alike = f"{NAME[:-5]}: user=root", f"{NAME}2: user=root"
    inner = f"{FORGED}\r\nSubject: inner\r\n\r\n{FORGED}"
    sender = site.start("send(dial(), headers=ARGS[0].split('|'), body=ARGS[1])",
                        "|".join([*alike, "MIME-Version: 1.0", "Content-Type: multipart/mixed; boundary=b"]),
                        f"--b\r\n\r\n{FORGED}\r\n--b\r\nContent-Type: message/rfc822\r\n\r\n{inner}\r\n--b--")
    sender.communicate(timeout=60)
    header, body = site.raw(sender.name)
    assert header.count(NAME.encode() + b":") == 1 and body.count(FORGED.encode()) == 3
    assert all(line.encode() in header for line in alike)


@pytest.mark.parametrize("client", ["local", "remote"])
@pytest.mark.parametrize("header", [
    f"X-Kept: kept\r{FORGED}", f"X-Kept: kept\r\n\tkept\r{FORGED.lower()}", f"X-Kept:\r{FORGED}\rX-More: more",
    f"X-Kept: {'kept ' * 300}\r{NAME} \t: user=root"])
def test_a_forged_header_behind_a_bare_cr_is_refused(site: Site, header: str, client: str) -> None:
    """Some take that for a line's end, and would see it before ours."""
    sender = site.start(DIAL[client] + "send(sock, headers=[ARGS[0]])", header, port=site.postfix.ports["front"])
    assert sender.communicate(timeout=60)[0].strip() == f"550 5.7.1 A {NAME} header behind a bare CR"
    assert site.said(sender.name).reason == "forged"


@pytest.mark.parametrize("client, count", [("local", 101), ("remote", 101), ("local", 20_000)])
def test_more_than_a_hundred_forged_headers_are_refused(site: Site, client: str, count: int) -> None:
    """Removing thousands would take the MTA minutes; another user's mail goes on meanwhile."""
    sender = site.start(DIAL[client] + "send(sock, headers=[ARGS[0]] * int(ARGS[1]))", FORGED, str(count),
                        port=site.postfix.ports["front"])
    assert site.attack("send(dial())", user="mst-bob").user == "mst-bob"
    assert sender.communicate(timeout=60)[0].startswith("550 5.7.1 ")


def test_a_changed_header_name_is_protected_in_the_same_way(users: Any, make_mail: Any) -> None:
    """The name with a k in it: no other letter may be taken for one of its own."""
    mail = make_mail(header_name="X-Marked")
    headers = ["--header=X-Kept: " + FORGED, "--header=x-mar\u212aed: a", "--header=X-MARKED : b", "--header=x-marked:c"]
    assert mta.run_as("mst-alice", mta.smtp(mail.postfix.port, *headers[:1], *headers[2:])).returncode == 0
    message = mail.postfix.wait_messages(1)[0]
    assert message.get_all("X-Marked") == ["user=mst-alice program=python3"] or not mta.can_see_others()
    assert message["X-Kept"] == FORGED


# --- 8. what is unknown, and faults of our own ------------------------------------------------------------------

@pytest.mark.parametrize("action, last", [
    ("accept", ("continue",)), ("quarantine", ("continue",)),
    ("reject", ("replycode", "550 5.7.1 Sender process could not be identified")),
    ("tempfail", ("replycode", "450 4.7.1 Sender process could not be identified"))])
def test_unidentified_action_is_what_is_done(make_milter: Any, action: str, last: tuple) -> None:
    """A local address, and no such connection."""
    milter = make_milter(unidentified_action=action).start()
    with mta.Wire(milter.socketname) as wire:
        wire.connect("127.0.0.1", 9, daemon_addr="127.0.0.1", daemon_port="25")
        replies = wire.message()
    assert replies[-1] == last
    assert ("quarantine" in {reply[0] for reply in replies}) == (action == "quarantine")
    assert (("addheader", NAME, "user=? program=?") in replies) == (last == ("continue",))


def test_a_milter_short_of_descriptors_refuses_nothing_for_good(users: Any, make_milter: Any) -> None:
    """No file can be opened any more: the kernel is asked all the same, so that each client is told from the others."""
    most = 50
    milter = make_milter(unidentified_action="reject", prefix=["sh", "-c", f'ulimit -n {most}; exec "$@"', "sh"]).start()
    with mta.Clients("mst-alice") as clients, contextlib.ExitStack() as stack:
        wires = []
        while len(os.listdir(f"/proc/{milter.pid}/fd")) < most:
            wires.append(stack.enter_context(mta.Wire(milter.socketname)))
        ends = [("203.0.113.5", 4711), ("127.0.0.1", 9), clients.accepted[0][1]]
        for wire, (address, port) in zip(wires, ends):
            wire.connect(address, port, daemon_addr="127.0.0.1", daemon_port=str(clients.port))
        clients.accepted[0][0].recv(100)
        remote, gone, known = (wire.message() for wire in wires[:3])
    assert remote == [("continue",)]
    assert gone == [("replycode", "550 5.7.1 Sender process could not be identified")]  # there is no such client
    assert "lookup=closed" in milter.lines("client=127.0.0.1:9 ")[0]
    # a number where the files of accounts cannot be opened either
    assert re.match(f"user=(mst-alice|{users.alice.pw_uid}) ", known[0][2]) and known[-1] == ("continue",), known


def test_a_helper_that_does_not_answer_refuses_nothing_for_good(users: Any, make_milter: Any, sees_others: None) -> None:
    """Root cannot be named without it: that mail is to try again; others and clients of another host are served."""
    milter = make_milter(unidentified_action="reject").start()
    helper, = milter.helper_pids()
    os.kill(helper, signal.SIGSTOP)
    try:
        with mta.Clients("root") as root, mta.Clients("mst-alice") as alice, mta.Wire(milter.socketname) as wire:
            assert root.send(milter) == ["450 4.7.1 Sender process could not be identified"]
            assert alice.send(milter) == ["user=mst-alice program=?"]
            wire.connect("203.0.113.5", 4711, daemon_addr="127.0.0.1", daemon_port=str(alice.port))
            assert wire.message() == [("continue",)]
    finally:
        os.kill(helper, signal.SIGCONT)


def test_a_standard_error_that_nobody_reads_holds_no_mail(users: Any, make_milter: Any) -> None:
    """It is a pipe that another program has filled: a line is lost, and the next is written once there is room."""
    near, far = os.pipe()
    milter = make_milter(prefix=[mta.PYTHON, "-c", f"import os, sys; os.dup2({far}, 2); os.execv(sys.argv[1], sys.argv[1:])"])
    milter.options["pass_fds"] = [far]
    try:
        milter.start()
        with mta.Clients("mst-alice", 2) as clients:
            wires = clients.wires(milter)
            os.set_blocking(far, False)  # where the milter shares that, its writes fail
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(far, b"x" * 4096)
            os.set_blocking(far, True)
            with next(wires) as wire:
                wire.sock.settimeout(10)
                assert any(reply[0] == "addheader" for reply in wire.message(sender="<lost@example.org>"))
            os.set_blocking(near, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.read(near, 65536)
            with next(wires) as wire:
                wire.message(sender="<kept@example.org>")
            assert b"from=kept@example.org" in mta.wait_for(lambda: select.select([near], [], [], 0)[0] and os.read(near, 65536))
    finally:
        os.close(near), os.close(far)


@pytest.mark.parametrize("function, unidentified_action", [
    ("SysuserMilter.connect", "reject"), ("SysuserMilter.find_owner", "reject"), *[(function, "accept") for function in (
        "SysuserMilter.identify", "SysuserMilter.judge", "SysuserMilter.write_log", "SysuserMilter.act",
        "SysuserMilter.envfrom", "SysuserMilter.envrcpt", "SysuserMilter.header", "SysuserMilter.confirm",
        "SysuserMilter.why_not_named", "refusal_of", "is_listed", "Directory.account",
        "Describer.describe")]])
def test_a_fault_in_a_callback_is_logged_and_lets_no_blocked_user_pass(users: Any, make_milter: Any, function: str,
                                                                       unidentified_action: str,
                                                                       tmp_path: pathlib.Path) -> None:
    """Nor does a second fault, in what takes over; before the owner is found, the mail is unidentified."""
    script = tmp_path / "broken.py"
    fault = f"def broken(*arguments):\n    raise RuntimeError('broken')\n\n\n{function} = broken\n\n\n"
    script.write_text(mta.SCRIPT.read_text().replace('if __name__ == "__main__":', fault + 'if __name__ == "__main__":'))
    milter = make_milter(script=script, unidentified_action=unidentified_action, blocked_mailusers=["mst-bob"]).start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = mta.as_user("mst-bob", [mta.PYTHON, "-c", "import socket, sys; sock = socket.create_connection(("
                                         f"'127.0.0.1', {server.getsockname()[1]})); sock.send(b'x'); sys.stdin.read()"])
        with server.accept()[0] as accepted, mta.Wire(milter.socketname) as wire:
            address, port = accepted.getpeername()
            wire.connect(address, port, daemon_addr="127.0.0.1", daemon_port=str(server.getsockname()[1]))
            replies = wire.message()
        client.communicate()
    assert replies[-1][0] in ("reject", "tempfail", "replycode"), (replies, milter.log())
    assert "RuntimeError: broken" in milter.log()


# --- 9. nothing a user does to its own processes harms others ---------------------------------------------------

def test_however_many_ask_the_kernel_at_once_each_gets_its_own_answer(script: Any) -> None:
    """One socket serves all: no descriptor more, and no answer for another."""
    lookup, wrong = script.KernelLookup(lambda mta_end: "redirected"), []
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(16)]
        server = script.endpoint(*listener.getsockname())

        def ask(client: socket.socket) -> None:
            for _ in range(300):
                found = lookup.find(script.endpoint(*client.getsockname()), server, 1)
                if found is None or found.inode != os.fstat(client.fileno()).st_ino or lookup.is_local(bytes([192, 0, 2, 1])):
                    wrong.append(found)
        threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
        descriptors, interval = len(os.listdir("/proc/self/fd")), sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not wrong and len(os.listdir("/proc/self/fd")) == descriptors


def bob_is_served(site: Site) -> None:
    """Send as mst-bob: named, and not held up for longer than a description may take, whatever the machine does."""
    said = site.attack("began = time.monotonic(); send(dial()); print(time.monotonic() - began)", user="mst-bob")
    assert said.user == "mst-bob"
    assert float(said.reply) < 10, said


@pytest.mark.parametrize("load", [
    pytest.param("""
files = 20000 if resource.getrlimit(7)[1] >= 20000 else resource.getrlimit(7)[1]
resource.setrlimit(7, (files, files))  # RLIMIT_NOFILE
near, far = os.pipe()
for turn in range(7):
    if os.fork() == 0:
        break
for turn in range(files - 20):
    os.dup(near)
""", id="eight tables of 20,000 descriptors"),
    pytest.param("""
for turn in range(300):
    threading.Thread(target=time.sleep, args=(50,), daemon=True).start()
""", id="300 threads")])
def test_a_users_crowded_processes_harm_nobody(site: Site, load: str) -> None:
    """mst-alice stays named and refused, mst-bob's mail goes on."""
    site.block("mst-alice")
    code = "import resource\nparent = os.getpid()\n" + load + """
if os.getpid() != parent:
    time.sleep(50)
    os._exit(0)
announce("ready")
send(dial())
announce("sent")
os.killpg(0, 9)"""
    alice = site.start(code, start_new_session=True)
    line(alice, "ready")
    bob_is_served(site)
    go_on(alice)
    line(alice, "550 5.7.1 User mst-alice is blocked")
    line(alice, "sent")
    assert site.said(alice.name).user == "mst-alice"
    bob_is_served(site)
    alice.communicate("\n", timeout=20)


CROWD = """
import resource
files = min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
near, far = os.pipe()
for turn in range(files - 20):
    os.dup(near)
announce("crowded")
"""


@pytest.mark.parametrize("where", ["another cgroup", "the same cgroup"])
def test_three_tables_of_20000_descriptors_do_not_make_root_unknown(site: Site, sees_others: None, where: str) -> None:
    """Whether another user holds root's socket, too, is looked for in its cgroup only."""
    mount, cgroup = mta.cgroup_v2(), None
    if where == "another cgroup":
        if mount is None:
            pytest.skip("no cgroup v2 is mounted here")
        cgroup = mount / f"mst-{os.getpid()}"
        try:
            cgroup.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup can be made here: {error.strerror}")
    with contextlib.ExitStack() as stack:
        (helper,) = site.milter.helper_pids()
        with contextlib.suppress(PermissionError):  # the work is what must be in bounds, whatever else the machine does
            os.sched_setscheduler(helper, os.SCHED_RR, os.sched_param(1))
            stack.callback(os.sched_setscheduler, helper, os.SCHED_OTHER, os.sched_param(0))
        if cgroup:
            stack.callback(lambda: mta.wait_for(lambda: not (cgroup / "cgroup.procs").read_text() and cgroup.rmdir() is None))
        crowd = [stack.enter_context(site.start(CROWD)) for _ in range(3)]
        stack.callback(lambda: [one.kill() for one in crowd])
        for one in crowd:
            if cgroup:
                (cgroup / "cgroup.procs").write_text(str(one.pid))
            line(one, "crowded")

        def root_is_named() -> bool:
            return site.attack("send(dial())", user="root").user == "root"
        mta.wait_for(root_is_named, 60, "root to be named")  # not at once on a busy machine


FUSE = r'''
user, group = os.getuid(), os.getgid()
check(LIBC.unshare(0x10000000 | 0x20000))  # CLONE_NEWUSER | CLONE_NEWNS
for name, text in ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"):
    open("/proc/self/" + name, "w").write(text)
fuse = os.open(ARGS[0] + "/fuse", os.O_RDWR)
mount = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
check(LIBC.mount(b"none", (ARGS[0] + "/mnt").encode(), b"fuse", 0, mount))

def serve():
    "Answer for a file system with one file, whose content never comes (linux/fuse.h)."
    attr = lambda node: struct.pack("=6Q10I", node, 4096, 8, 0, 0, 0, 0, 0, 0, 0o40755 if node == 1 else 0o100755,
                                    1, 0, 0, 0, 4096, 0)
    while True:
        data = os.read(fuse, 1 << 18)
        opcode, unique, node = struct.unpack_from("=IQQ", data, 4)
        answer = {26: struct.pack("=4I2H2I2H8I", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, *[0] * 8),
                  1: struct.pack("=4Q2I", 2, 0, 60, 60, 0, 0) + attr(2), 3: struct.pack("=Q2I", 60, 0, 0) + attr(node),
                  14: struct.pack("=Q2I", 1, 0, 0)}.get(opcode)
        if opcode in (2, 36, 15):  # FORGET, INTERRUPT; READ is what blocks
            continue
        os.write(fuse, struct.pack("=IiQ", 16 + len(answer or b""), 0 if answer else -38, unique) + (answer or b""))

if os.fork() == 0:
    serve()
file = os.open(ARGS[0] + "/mnt/x", os.O_RDONLY)
os.set_inheritable(file, True)
os.execv(sys.executable, [sys.executable, "-c", HANG, str(PORT), NAME, str(file), "x" * 20000])
'''
HANG = PROGRAM + r'''
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
start = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[45])  # arg_start, proc(5)
end = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[46])
page = (start + 4095) & ~4095
assert page + 4096 <= end
assert LIBC.mmap(page, 4096, 1, 2 | 0x10, int(ARGS[0]), 0) == page  # PROT_READ, MAP_PRIVATE | MAP_FIXED
check(LIBC.madvise(ctypes.c_void_p(page), 4096, 1))  # MADV_RANDOM: no read-ahead, which could be killed
announce("ready")
send(dial())
announce("sent")
'''


def test_a_command_line_that_hangs_its_reader_harms_nobody(site: Site, sees_others: None) -> None:
    """A page of it is a file on the user's own FUSE mount, whose server never answers."""
    with tempfile.TemporaryDirectory(prefix="milter-test.") as directory:
        os.chmod(directory, 0o755)
        os.mkdir(directory + "/mnt")
        try:
            os.mknod(directory + "/fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
            os.chmod(directory + "/fuse", 0o666)
            os.close(os.open(directory + "/fuse", os.O_RDWR))
        except OSError as error:
            pytest.skip(f"no FUSE here: {error.strerror}")
        alice = site.start("HANG = " + repr(HANG) + "\n" + FUSE, directory, start_new_session=True)
        try:
            text = alice.stdout.readline()
            if not text.startswith("ready"):
                pytest.skip("users may not mount FUSE here: " + alice.stderr.read()[-200:])
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["cat", f"/proc/{alice.pid}/cmdline"], stdout=subprocess.DEVNULL, timeout=2, check=True)
                pytest.skip("reading that command line does not hang here, so there is nothing to withstand")
            site.block("mst-alice")
            go_on(alice)
            line(alice, "550 5.7.1 User mst-alice is blocked")
            line(alice, "sent")
            said = site.said(alice.name)
            assert (said.user, said.args) == ("mst-alice", "?")
            site.block()
            bob_is_served(site)
            mta.wait_for(lambda: site.attack("send(dial())", user="mst-bob").program == "python3", 20,
                         "the helper to name programs again")
        finally:
            os.killpg(alice.pid, signal.SIGKILL)
            alice.communicate()
