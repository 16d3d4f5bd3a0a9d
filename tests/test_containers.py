# SPDX-License-Identifier: MIT
"""Clients in containers of this host: other network namespaces, whose sockets the helper can see.

Everything is in namespaces of the tests' own: the host, where Postfix, the milter and a bridge are, and guests on it, made
as docker, podman and LXC make theirs, with and without a user namespace, in cgroups of those names.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import pwd
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from typing import Any, Iterator, Optional, Sequence

import pytest

import mta
from mta import PYTHON, Milter, has_ipv6, smtp
from test_redirect import Inside, Namespace

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

HEADER = "X-Sender-Process-Info"
NETWORKS = ["172.17.0.0/16", "fd00:17::/64"]
FAMILIES = {"ip": types.SimpleNamespace(prefix="172.17.0.", server="172.17.0.1"),
            "ip6": types.SimpleNamespace(prefix="fd00:17::", server="fd00:17::1")}
FIRST_UID = 100000  # what a mapped container's root is outside of it; see mta.USER_NAMESPACE
ID = secrets.token_hex(32)  # as docker and podman name containers; two runs at once have different ones
OF_BOB = ["setpriv", "--reuid=mst-bob", "--regid=mst-bob", "--init-groups", "unshare", "--user", "--map-root-user"]

# A connection within a namespace that has both ends' addresses: what a guest has whose ends they are.
DECOY = """
import socket, sys
(near, port), (far, service) = [(sys.argv[n], int(sys.argv[n + 1])) for n in (1, 3)]
listener = socket.create_server((far, service), family=socket.AF_INET6 if ":" in far else socket.AF_INET)
client = socket.create_connection((far, service), source_address=(near, port))
print("ready", flush=True)
sys.stdin.read()
"""
RESET = """
import socket, struct, sys
(near, port), (far, service) = [(sys.argv[n], int(sys.argv[n + 1])) for n in (1, 3)]
client = socket.create_connection((far, service), source_address=(near, port))
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
client.close()
print("reset", flush=True)
sys.stdin.read()
"""
# Root makes a socket; the process that sends with it is another user's, and root keeps it.
HANDED_DOWN = """
import os, socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])))
if os.fork() == 0:
    os.setgroups([])
    os.setgid(33)
    os.setuid(33)
    lines = client.makefile("rb")
    print("ready", flush=True)
    sys.stdin.readline()
    for text in ("", "HELO client", "MAIL FROM:<from@example.org>", "RCPT TO:<to@example.org>", "DATA",
                 "Subject: handed down\\r\\n\\r\\nbody\\r\\n."):
        if text:
            client.sendall(text.encode() + b"\\r\\n")
        print(lines.readline().decode(), end="", flush=True)
    os._exit(0)
os.wait()
"""
ACCEPT = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("ready", flush=True)
client, address = listener.accept()
print(address[1], flush=True)
sys.stdin.readline()
print(client.recv(100).decode(), flush=True)
sys.stdin.read()
"""
CONNECT = """
import socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])))
client.sendall(b"EHLO")
print("connected", flush=True)
sys.stdin.read()
"""
ALL_AT_ONCE = """
import socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])))
client.sendall(b"EHLO client\\r\\nMAIL FROM:<from@example.org>\\r\\nRCPT TO:<to@example.org>\\r\\nDATA\\r\\n"
               b"Subject: hasty\\r\\n\\r\\nbody\\r\\n.\\r\\nQUIT\\r\\n")
client.recv(100)
"""


def ip(*batches: Sequence[str], enter: Sequence[str] = ()) -> None:
    """Have ip(8) do all that in the namespace of that command prefix."""
    for family, lines in ("-4", batches[0]), ("-6", batches[1] if has_ipv6() else []):
        done = subprocess.run([*enter, "ip", family, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True,
                              text=True, timeout=60)
        if "not supported" in done.stderr or "Unknown device type" in done.stderr:
            pytest.skip(f"no bridge or veth here: {done.stderr.strip()}")
        assert done.returncode == 0, (lines, done.stderr)


class Guest:
    """A container: a network namespace and processes in a cgroup, on the host's bridge if it has a number.

    number   the last part of its addresses
    cgroup   its cgroup; None: the one that everything is in
    prefix   a command that makes its user namespace, if it has one
    """

    def __init__(self, host: Namespace, number: int = 0, cgroup: Optional[pathlib.Path] = None,
                 prefix: Sequence[str] = ()) -> None:
        self.moved = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs && exec "$@"', "sh"] if cgroup else []
        self.process = subprocess.Popen([*self.moved, *prefix, "unshare", "--net", "sh", "-c", "echo ready; exec cat"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not self.process.stdout.readline():
            pytest.skip(f"no such container here: {self.process.communicate()[1].strip()}")
        self.pid = self.process.pid
        self.as_root = ["nsenter", f"--target={self.pid}", "--net"]
        self.enter = [*self.moved, *self.as_root, *(["--user"] if prefix else [])]
        ip(["link set lo up"], [], enter=self.as_root)
        if number:
            ip([f"link add g{self.pid} type veth peer name eth0 address 02:42:ac:11:00:{number:02x} netns {self.pid}",  # as docker's
                f"link set g{self.pid} master br0 up"],
               [], enter=host.enter)
            self.take(number, "eth0")
            ip(["link set eth0 up"], [], enter=self.as_root)
            mta.wait_for(lambda: "state forwarding" in host.run("ip", "-d", "link", "show", f"g{self.pid}").stdout,
                         20, "the bridge to forward what it sends")

    def take(self, number: int, device: str) -> None:
        """Give it the addresses with that number."""
        ip([f"address add 172.17.0.{number}/16 dev {device}"], [f"address add fd00:17::{number}/64 dev {device} nodad"],
           enter=self.as_root)

    def drop(self, number: int) -> None:
        """Take the addresses with that number from it."""
        ip([f"address del 172.17.0.{number}/16 dev eth0"], [f"address del fd00:17::{number}/64 dev eth0"], enter=self.as_root)

    def start(self, argv: Sequence[str], uid: int = 0) -> subprocess.Popen:
        """Start a command in it under that uid of its own; its standard streams are text pipes."""
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        return subprocess.Popen([*self.enter, *user, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd="/")

    @contextlib.contextmanager
    def holding(self, code: str, *arguments: Any, uid: int = 0) -> Iterator[subprocess.Popen]:
        """Have a snippet of Python run in it that says when it is ready, and waits."""
        with self.start([PYTHON, "-c", code, *map(str, arguments)], uid) as process:
            try:
                assert process.stdout.readline(), process.stderr.read()
                yield process
            finally:
                process.kill()

    def stop(self) -> None:
        """End it."""
        self.process.communicate()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class Net(types.SimpleNamespace):
    """The .host, and in it a .postfix and its .milter; .guests by name."""

    def smtp(self, family: str, *options: str) -> list[str]:
        """Give the command of a client that dials the host."""
        return smtp(self.postfix.port, "--dial", FAMILIES[family].server, *options)

    def send(self, guest: Guest, family: str, *options: str, uid: int = 33) -> str:
        """Send a message from a guest and give the replies."""
        output, errors = guest.start(self.smtp(family, *options), uid).communicate(timeout=60)
        assert not errors, errors
        return output

    def headers(self, n: int = 1) -> list[list[str]]:
        """Wait for n messages and give the headers of our name of each."""
        return [message.get_all(HEADER, []) for message in self.postfix.wait_messages(n)]

    def line(self) -> str:
        """Give the last line of the log about a message."""
        return self.milter.lines("action=")[-1]


@contextlib.contextmanager
def cgroup(path: str) -> Iterator[Optional[pathlib.Path]]:
    """Make a cgroup, and those above it; None where that cannot be."""
    made: list[pathlib.Path] = []
    root = mta.cgroup_v2()
    try:
        if root is None:
            yield None
            return
        for part in reversed([root / path, *(root / path).parents]):
            if not part.exists():
                part.mkdir()
                made.append(part)
        yield root / path
    finally:
        for part in reversed(made):
            mta.wait_for(lambda: not (part / "cgroup.procs").read_text(), 20, f"{part} to be empty")
            with contextlib.suppress(OSError):  # somebody else has made one in it meanwhile
                part.rmdir()


@pytest.fixture(scope="module")
def subuid(users: Any) -> Iterator[pathlib.Path]:
    """Give /etc/subuid, in which nothing is delegated; afterwards it is as it was."""
    path = pathlib.Path("/etc/subuid")
    before = path.read_bytes() if path.exists() else b""
    path.write_text("")
    try:
        yield path
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give a script that waits longer for its helper, so that nobody is unknown because the machine is loaded."""
    text, n = re.subn("^(HELPER_SECONDS|SEARCH_SECONDS, SEARCH_LINKS) = [0-9.]+", r"\1 = 2.0", mta.SCRIPT.read_text(), flags=re.M)
    assert n == 2
    path = tmp_path_factory.mktemp("patient") / "milter_sysuser.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def network(subuid: Any, sees_others: None, patient: pathlib.Path) -> Iterator[Net]:
    """Make the host, its bridge, the guests, Postfix and a milter."""
    with contextlib.ExitStack() as stack:
        host = Namespace()
        stack.callback(host.stop)
        # An address of its own, as docker's has: else it takes the lowest of its ports', which changes with each guest.
        ip(["link set lo up", "link add br0 address 02:42:ac:11:00:01 type bridge", "link set br0 up",
            "address add 172.17.0.1/16 dev br0"],
           ["address add fd00:17::1/64 dev br0 nodad"], enter=host.enter)
        mapped = mta.user_namespace(65536)
        if mapped is None:
            pytest.skip("no user namespace here")
        guests = {name: stack.enter_context(Guest(host, number, stack.enter_context(cgroup(path)), prefix))
                  for name, number, path, prefix in (
                      ("docker", 5, f"system.slice/docker-{ID}.scope", []),
                      ("podman", 6, f"machine.slice/libpod-{ID}.scope/container", mapped),
                      ("lxc", 7, f"lxc.payload.{ID[:8]}/system.slice/apache2.service", mapped))}
        other = "{ unix:private/other.sock, default_action=accept }"
        postfix = stack.enter_context(Inside(host.enter, addresses="all", services={"other": {"smtpd_milters": other}}, main_cf={
            "smtpd_forbid_unauth_pipelining": "no",  # as before 3.9
            "mynetworks": "127.0.0.0/8 172.17.0.0/16 [::1]/128 [fd00:17::]/64"}))
        milter = stack.enter_context(Milter(postfix, prefix=host.enter, script=patient, container_networks=NETWORKS,
                                            blocked_mailusers=["mst-bob", 1033, FIRST_UID + 1033]))
        yield Net(host=host, guests=guests, postfix=postfix, milter=milter)


@pytest.fixture
def net(network: Net) -> Iterator[Net]:
    """Give the host with an empty mailbox."""
    network.postfix.forget_messages()
    yield network
    assert "Traceback" not in network.milter.log()


# --- who is named -----------------------------------------------------------------------------------------------

UNITS = {"docker": f"docker-{ID}.scope", "podman": f"libpod-{ID}.scope", "lxc": f"lxc.payload.{ID[:8]}"}


@pytest.mark.parametrize("guest, first", [("docker", 0), ("podman", FIRST_UID), ("lxc", FIRST_UID)])
def test_a_containers_client_is_named_by_the_kernels_uid(guest: str, first: int, family: str, net: Net) -> None:
    """Whatever the host calls that uid; the unit is the container's."""
    net.send(net.guests[guest], family)
    assert net.headers() == [[f"user={first + 33} program=python3"]]
    unit = f" unit={UNITS[guest]} " if mta.cgroup_v2() else " unit="
    assert f" user={first + 33} uid={first + 33} program=python3 " in net.line() and unit in net.line()
    assert net.line().endswith(" action=tag")


def test_a_client_with_a_socket_for_both_families_is_named(net: Net) -> None:
    """It has IPv4 as IPv6 has it, as Java does."""
    if not mta.kernel_has_ipv6():
        pytest.skip("no IPv6 here")
    client = net.guests["podman"].start(smtp(net.postfix.port, "--dial", "::ffff:172.17.0.1"), 33)
    assert "250 2.0.0 Ok" in client.communicate(timeout=60)[0]
    assert net.headers() == [[f"user={FIRST_UID + 33} program=python3"]]


def test_root_of_a_container_is_a_number(family: str, net: Net) -> None:
    """Uid 0 where it has no user namespace; never root."""
    for n, (guest, uid) in enumerate({"docker": 0, "podman": FIRST_UID}.items(), 1):
        net.send(net.guests[guest], family, uid=0)
        assert net.headers(n)[-1] == [f"user={uid} program=python3"]
        assert f" user={uid} uid={uid} program=python3 " in net.line() and "root" not in net.line()


def test_a_socket_that_a_containers_root_has_handed_down_is_nobodys(family: str, net: Net) -> None:
    """As on the host: a process of another user in the container has it, too."""
    with net.guests["docker"].holding(HANDED_DOWN, FAMILIES[family].server, net.postfix.port) as client:
        assert "250 2.0.0 Ok" in client.communicate("\n", timeout=60)[0]
    assert net.headers() == [["user=? program=?"]]
    assert " user=? uid=? " in net.line() and net.line().endswith(" lookup=handed-down maybe=0 holder=33")


def test_a_uid_that_is_delegated_is_the_user_it_was_delegated_to(net: Net, subuid: pathlib.Path) -> None:
    """As docker's userns-remap has it, or a user whose range it is; refused if that one is blocked."""
    subuid.write_text(f"mst-alice:{FIRST_UID}:1000\nmst-bob:{FIRST_UID + 1000}:1000\n")
    try:
        net.send(net.guests["podman"], "ip")
        assert net.headers() == [["user=mst-alice program=python3"]]
        assert f" user=mst-alice uid={FIRST_UID + 33} " in net.line()
        assert "550 5.7.1 User mst-bob is blocked" in net.send(net.guests["podman"], "ip", uid=1100)
    finally:
        subuid.write_text("")


def test_a_uid_that_is_listed_is_refused(family: str, net: Net) -> None:
    """By its number, as the kernel has it."""
    for guest, uid in {"docker": 1033, "podman": FIRST_UID + 1033}.items():
        assert f"550 5.7.1 User {uid} is blocked from sending mail" in net.send(net.guests[guest], family, uid=1033)
    assert "250 2.0.0 Ok" in net.send(net.guests["lxc"], family, uid=33)
    net.headers()  # is delivered before the next test


def test_every_message_of_a_connection_is_named(family: str, net: Net) -> None:
    """Also those after the first."""
    net.send(net.guests["lxc"], family, "--messages", "3")
    assert net.headers(3) == [[f"user={FIRST_UID + 33} program=python3"]] * 3


def test_hosts_users_are_named_as_ever(family: str, net: Net) -> None:
    """At the bridge's address, too."""
    client = net.host.as_user("mst-alice", net.smtp(family))
    assert "250 2.0.0 Ok" in client.communicate(timeout=60)[0]
    assert net.headers() == [["user=mst-alice program=python3"]]


# --- who is not ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [5, 6])
def test_a_decoy_in_a_namespace_that_a_user_made_names_nobody(number: int, family: str, net: Net) -> None:
    """It has the very same endpoints; the container's client is named as ever."""
    port, ends = str(mta.free_port()), FAMILIES[family]
    with Guest(net.host, prefix=OF_BOB) as own:
        for address in 1, number:
            own.take(address, "lo")
        with own.holding(DECOY, f"{ends.prefix}{number}", port, ends.server, net.postfix.port):
            net.send(net.guests["docker" if number == 5 else "podman"], family, "--bind-port", port)
    assert net.headers() == [[f"user={33 if number == 5 else FIRST_UID + 33} program=python3"]]


def test_a_client_in_a_namespace_that_a_user_made_is_nobodys(family: str, net: Net) -> None:
    """As an unprivileged LXC guest, which a setuid program connects to the bridge: it could have any decoy."""
    with Guest(net.host, 9, prefix=OF_BOB) as own:
        net.send(own, family, uid=0)
    assert net.headers() == [["user=? program=?"]]
    assert " user=? uid=? " in net.line() and net.line().endswith(" action=tag lookup=container")


def test_two_sockets_with_the_same_ends_are_nobodys(family: str, net: Net) -> None:
    """In namespaces that both count, as a privileged container can make them."""
    port, ends = str(mta.free_port()), FAMILIES[family]
    with Guest(net.host, 8) as guest, Guest(net.host) as decoy:
        for address in 1, 8:
            decoy.take(address, "lo")
        with decoy.holding(DECOY, f"{ends.prefix}8", port, ends.server, net.postfix.port):
            net.send(guest, family, "--bind-port", port)
    assert net.headers() == [["user=? program=?"]]
    assert net.line().endswith(" action=tag lookup=container")


def test_a_decoy_beside_a_client_whose_socket_cannot_be_seen_names_nobody(family: str, net: Net) -> None:
    """Not the one either who made it: his own client is in a namespace that does not count."""
    port, ends = str(mta.free_port()), FAMILIES[family]
    with Guest(net.host, 9, prefix=OF_BOB) as own, Guest(net.host, prefix=OF_BOB) as decoy:
        for address in 1, 9:
            decoy.take(address, "lo")
        with decoy.holding(DECOY, f"{ends.prefix}9", port, ends.server, net.postfix.port):
            net.send(own, family, "--bind-port", port, uid=0)
    assert net.headers() == [["user=? program=?"]]
    assert "mst-" not in net.line()


def test_a_port_that_another_container_uses_again_is_never_the_first_ones(family: str, net: Net) -> None:
    """It resets before the look, and another container gets its address and dials from the same port."""
    port, ends = str(mta.free_port()), FAMILIES[family]
    with Guest(net.host, 8) as first, Guest(net.host, 10, prefix=mta.user_namespace(65536)) as second:
        net.send(first, family)  # so that it is known
        os.kill(net.milter.pid, signal.SIGSTOP)
        try:
            with first.holding(RESET, f"{ends.prefix}8", port, ends.server, net.postfix.port, uid=33):
                pass
            first.drop(8)
            second.take(8, "eth0")
            net.host.run("ip", "neighbour", "flush", "all")
            client = second.start(net.smtp(family, "--bind", f"{ends.prefix}8", "--bind-port", port), 33)
            time.sleep(0.2)
        finally:
            os.kill(net.milter.pid, signal.SIGCONT)
        output, errors = client.communicate(timeout=60)
    assert not errors
    assert net.headers(2)[1] in ([f"user={FIRST_UID + 33} program=python3"], ["user=? program=?"])


def test_a_container_that_gets_anothers_address_is_named_at_once(family: str, net: Net) -> None:
    """What was known of the address is not believed."""
    with Guest(net.host, 8) as first:
        net.send(first, family)
    with Guest(net.host, 8, prefix=mta.user_namespace(65536)) as second:
        net.send(second, family)
    assert net.headers(2) == [["user=33 program=python3"], [f"user={FIRST_UID + 33} program=python3"]]


def test_a_container_that_has_ended_leaves_its_client_unknown(family: str, net: Net) -> None:
    """Its last message is complete, and nobody is there to be described."""
    with Guest(net.host, 8) as guest:
        (helper,) = net.milter.helper_pids()
        os.kill(helper, signal.SIGSTOP)
        try:
            client = guest.start([PYTHON, "-c", ALL_AT_ONCE, FAMILIES[family].server, str(net.postfix.port)], 33)
            client.communicate(timeout=60)
        finally:
            guest.stop()
            os.kill(helper, signal.SIGCONT)
    assert net.headers() == [["user=? program=?"]]
    assert re.search(" lookup=(container|timeout|closed)$", net.line())


def test_without_the_helper_a_containers_client_is_unknown(family: str, net: Net) -> None:
    """Started without the privilege to look into other users' processes, and without lsof."""
    nobody_looks = [*net.host.enter, "setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"]
    with Milter(prefix=nobody_looks, lsof_command=[], container_networks=NETWORKS, unidentified_action="reject",
                socketname=f"{net.postfix.directory}/queue/private/other.sock") as milter:
        client = net.guests["docker"].start(smtp(net.postfix.ports["other"], "--dial", FAMILIES[family].server), 33)
        assert "450 4.7.1 Sender process could not be identified" in client.communicate(timeout=60)[0]
        assert milter.wait_lines("action=")[0].endswith(" action=tempfail reason=unidentified lookup=container")


@pytest.mark.parametrize("networks", [[], ["172.18.0.0/16", "fd00:18::/64"]])
def test_an_address_that_is_in_no_such_network_is_another_hosts(networks: list[str], family: str, net: Net) -> None:
    """No header, as without the setting."""
    with Milter(prefix=net.host.enter, container_networks=networks,
                socketname=f"{net.postfix.directory}/queue/private/other.sock") as milter:
        client = net.guests["docker"].start(smtp(net.postfix.ports["other"], "--dial", FAMILIES[family].server), 33)
        assert "250 2.0.0 Ok" in client.communicate(timeout=60)[0]
        assert " action=pass" in milter.wait_lines("action=")[0]
    assert net.headers() == [[]]


# --- what the MTA says --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("server, outcome, lookup", [
    ("203.0.113.5", "pass", ""), ("127.0.0.1", "tag", " lookup=closed"), ("", "tag", " lookup=closed")])
def test_an_address_that_has_no_connection_here_names_nobody(server: str, outcome: str, lookup: str, net: Net) -> None:
    """At another host's MTA it is another host's client; at this one's it has left, or is made up (XCLIENT)."""
    with mta.Wire(net.milter.socketname) as wire:
        wire.connect("172.17.0.5", 43210, **({"daemon_addr": server, "daemon_port": "25"} if server else {}))
        assert wire.message()[:-1] == ([("addheader", HEADER, "user=? program=?")] if outcome == "tag" else [])
    assert net.line().endswith(f" action={outcome}{lookup}")


def test_a_containers_client_is_named_where_the_mta_says_a_wildcard(family: str, net: Net) -> None:
    """As Sendmail does."""
    port, server = mta.free_port(), FAMILIES[family].server
    with subprocess.Popen([*net.host.enter, PYTHON, "-c", ACCEPT, server, str(port)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as listening:
        try:
            assert listening.stdout.readline() == "ready\n"
            with net.guests["podman"].holding(CONNECT, server, port, uid=33), mta.Wire(net.milter.socketname) as wire:
                wire.connect(f"{FAMILIES[family].prefix}6", int(listening.stdout.readline()),
                             daemon_addr="0.0.0.0" if family == "ip" else "::", daemon_port=str(port))
                listening.stdin.write("read\n")
                listening.stdin.flush()
                assert listening.stdout.readline() == "EHLO\n"
                assert wire.message()[0] == ("addheader", HEADER, f"user={FIRST_UID + 33} program=python3")
        finally:
            listening.kill()


# --- the search ---------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def search_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have searches that a loaded machine does not cut short."""
    monkeypatch.setattr(ms, "SEARCH_SECONDS", 20.0)


@contextlib.contextmanager
def connected(net: Net, guest: Guest, number: int) -> Iterator[bytes]:
    """Have a client of uid 33 connected to Postfix; give both ends as the helper is told them."""
    command = smtp(net.postfix.port, "--dial", "172.17.0.1", "--wait")
    with guest.start(command, 33) as client:
        greeting, line = client.stdout.readline(), client.stdout.readline()
        assert line.startswith("connected "), (greeting, line, client.stderr.read(), net.postfix.log()[-2000:])
        port = int(line.split()[1])
        try:
            yield b"".join(ms.V4_MAPPED + socket.inet_aton(f"172.17.0.{last}") + struct.pack("!H", of)
                           for last, of in ((number, port), (1, net.postfix.port)))
        finally:
            client.kill()


def answer(finder: ms.Finder, ends: bytes) -> dict:
    """Ask for a client's socket."""
    return finder.answer(ms.WHOSE_IN_CONTAINERS, 0, 0, 0, ends)


def test_a_namespace_that_was_seen_is_found_without_looking_at_all_processes(
        net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another container that was there by then take it; one that has ended does."""
    finder = ms.Finder(["program"])
    with connected(net, net.guests["docker"], 5) as ends:
        assert answer(finder, ends)["uid"] == 33
    monkeypatch.setattr(finder.namespaces, "walk", lambda: pytest.fail("all processes"))
    for name, number, first in ("docker", 5, 0), ("lxc", 7, FIRST_UID):
        with connected(net, net.guests[name], number) as ends:
            assert answer(finder, ends)["uid"] == first + 33


def test_a_client_that_is_in_no_namespace_is_looked_for_everywhere_once_a_second(
        net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a virtual machine's on the bridge; each address by itself."""
    finder, walks, now = ms.Finder(["program"]), [], time.monotonic()
    monkeypatch.setattr(finder.namespaces, "walk", lambda: walks.append(1) or {})
    monkeypatch.setattr(ms.time, "monotonic", lambda: now)
    ends = [ms.V4_MAPPED + bytes((172, 17, 3, last)) + bytes(20) for last in range(3)]
    for _ in range(10):
        assert [answer(finder, one) for one in ends] == [{"why": "container"}] * 3
    assert len(walks) == 3
    now += ms.ABSENT_SECONDS
    assert answer(finder, ends[0]) == {"why": "container"} and len(walks) == 4


def test_a_process_that_leaves_its_namespace_meanwhile_shows_nothing(
        net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read may be of a namespace that its user has made."""
    finder, namespaces = ms.Finder(["program"]), []
    counts = ms.namespace_that_counts

    def leaves(pid: int) -> int:
        namespaces.append(counts(pid))
        return 0 if len(namespaces) % 2 == 0 else namespaces[-1]
    with connected(net, net.guests["docker"], 5) as ends:
        monkeypatch.setattr(ms, "namespace_that_counts", leaves)
        assert answer(finder, ends) == {"why": "container"} and namespaces
        monkeypatch.setattr(ms, "namespace_that_counts", counts)
        finder.namespaces.absent.clear()
        assert answer(finder, ends)["uid"] == 33


def test_a_namespace_with_more_addresses_than_are_read_costs_only_itself(net: Net) -> None:
    """Its routes fill the file; others are found."""
    with Guest(net.host, 8) as guest:
        batch = "\n".join(f"route add 10.{n // 256}.{n % 256}.0/24 dev eth0" for n in range(2000))
        subprocess.run([*guest.as_root, "ip", "-batch", "-"], input=batch, text=True, check=True, timeout=60)
        finder = ms.Finder(["program"])
        with connected(net, net.guests["docker"], 5) as ends:
            assert answer(finder, ends)["uid"] == 33
        with connected(net, guest, 8) as ends:
            assert answer(finder, ends) == {"why": "container"}


ENDS = ms.V4_MAPPED + bytes((172, 17, 0, 5)) + struct.pack("!H", 43210), ms.V4_MAPPED + bytes((172, 17, 0, 1)) + struct.pack("!H", 25)
ENDS6 = bytes.fromhex("fd000017" + "0" * 23 + "5") + struct.pack("!H", 43210), bytes.fromhex("fd000017" + "0" * 23 + "1") + struct.pack("!H", 25)
HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
NEAR, FAR = ("050011AC:A8CA 010011AC:0019" if sys.byteorder == "little" else "AC110005:A8CA AC110001:0019").split()
ROW = f"   1: {NEAR} {FAR} 01 00000000:00000000 02:00000014 00000000    33        0 4711 2 00000000 20 4 0 10 -1\n"


def read_rows(text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the client's socket found in a namespace whose table of IPv4 is this."""
    namespaces = ms.Namespaces(lambda links: None)
    monkeypatch.setattr(ms, "namespace_that_counts", lambda pid: 7)
    monkeypatch.setattr(namespaces, "walk", lambda: {7: 1})
    monkeypatch.setattr(namespaces, "addresses", lambda pid: {ENDS[0][:16]})
    monkeypatch.setattr(namespaces, "read", lambda pid, name, most: text.encode() if name == "tcp" else b"")
    return namespaces.find(*ENDS)


OTHER = ROW.replace(NEAR, NEAR[:-1] + "B")
WELL = [HEAD + ROW, HEAD + OTHER + ROW, HEAD + ROW.replace(" 01 ", " 08 "), HEAD + ROW + ROW.replace(" 01 ", " 06 "),
        HEAD + f"   1: {FAR} {NEAR} 01 00000000:00000000 02:00000014 00000000     1        0 4712 2 0\n" + ROW]
ODD = ["", HEAD, HEAD + OTHER, HEAD + ROW.replace(" 01 ", " 06 "), HEAD + ROW.replace(" 01 ", " 02 "),
       HEAD + ROW.replace(" 01 ", " 0A "), HEAD + ROW.replace(" 01 ", " 1 "), HEAD + ROW.replace(" 01 ", " xx "),
       HEAD + ROW.replace("   33  ", "   -1  "), HEAD + ROW.replace("   33  ", "  "), HEAD + ROW.replace(" 4711 ", " 0x12 "),
       HEAD + ROW.replace(" 4711 ", "  "), HEAD + ROW + ROW.replace(" 4711 ", " 4712 "), HEAD + ROW.replace("\n", ""),
       HEAD + ROW.replace(": ", " "), HEAD + ROW.replace("00000000:00000000 ", ""), ROW.lower()]


@pytest.mark.parametrize("text", WELL)
def test_the_row_with_both_ends_in_order_is_the_clients(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a state in which a message may be under way."""
    assert read_rows(text, monkeypatch) == (33, 4711, 1)


@pytest.mark.parametrize("text", ODD)
def test_a_row_that_is_odd_or_not_the_only_one_is_nobodys(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel may write one day."""
    assert read_rows(text, monkeypatch) is None


@pytest.mark.parametrize("size", range(len(ROW)))
def test_a_row_that_is_cut_is_nobodys(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any place."""
    assert read_rows(HEAD + ROW[:size], monkeypatch) is None


def test_a_row_of_ipv6_is_read_in_words() -> None:
    """Each as the processor has it."""
    words = "170000FD0000000000000000050000" + "00" if sys.byteorder == "little" else "FD000017000000000000000000000005"
    namespaces = ms.Namespaces(lambda links: None)
    names: list[str] = []

    def read(pid: int, name: str, most: int) -> bytes:
        names.append(name)
        far = words.replace("05000000", "01000000") if sys.byteorder == "little" else words[:-1] + "1"
        return (HEAD + ROW.replace(NEAR, f"{words}:A8CA").replace(FAR, f"{far}:0019")).encode()
    namespaces.read = read  # type: ignore[method-assign, assignment]
    assert namespaces.rows(1, *ENDS6) == [(b"01", b"33", b"4711")] and names == ["tcp6"]


# --- --check ------------------------------------------------------------------------------------------------------

CHECK = "containers: a connection in another network namespace"


def checked(milter: Milter) -> list[str]:
    """Run --check; give what it says of containers."""
    assert milter.run() == 0, milter.log()
    return [line for line in milter.lines() if re.match("....  containers", line)]


def test_check_finds_a_connection_in_a_namespace_that_it_makes(
        make_milter: Any, sees_others: None, patient: pathlib.Path) -> None:
    """And says how long it takes; without the setting it says nothing."""
    for _ in range(2):  # of the first no process is left
        (line,) = checked(make_milter(args=["--check"], script=patient, container_networks=NETWORKS))
        assert re.fullmatch(rf"ok    {CHECK}, \d+ us", line)
    assert checked(make_milter(args=["--check"])) == []


@pytest.mark.parametrize("options, said", [
    ({"prefix": ["setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"]}, "warn  containers"),
    ({"prefix": ["setpriv", "--bounding-set=-sys_admin"]}, "warn  containers.*: was not tried"), ({"user": "postfix"}, "warn  containers")])
def test_check_says_that_containers_stay_unknown(options: dict, said: str, make_milter: Any, users: Any) -> None:
    """Where there is no helper with the privilege, or no namespace can be made to try it."""
    milter = make_milter(args=["--check"], container_networks=NETWORKS, **options)
    (line,) = checked(milter)
    assert re.match(said, line) and milter.lines()[milter.lines().index(line) + 1].startswith("      -> ")
