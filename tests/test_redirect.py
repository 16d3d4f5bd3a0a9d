# SPDX-License-Identifier: MIT
"""Clients that dialled another host and were redirected to the MTA by a NAT rule, and containers behind NAT.

Everything is in network namespaces of the tests' own, which end with their processes: the host, where Postfix and the
milter are; a guest behind it, as a container is; and the world beyond. The host's rules are nftables'.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from typing import Any, Iterator, Optional

import pytest

import mta
from mta import PYTHON, Milter, Postfix, has_ipv6, smtp, tag

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

HEADER = "X-Sender-Process-Info"
FAMILIES = {
    "ip": types.SimpleNamespace(own="192.0.2.1", inside="10.77.0.1", guest="10.77.0.2", loopback="127.0.0.1",
                                far="203.0.113.9", other="203.0.113.10"),
    "ip6": types.SimpleNamespace(own="2001:db8:2::1", inside="fd77::1", guest="fd77::2", loopback="::1",
                                 far="2001:db8::9", other="2001:db8::10")}

LINKS = """\
link set lo up
link add g0 type veth peer name g0 netns {guest}
link add w0 type veth peer name w0 netns {world}
address add 10.77.0.1/24 dev g0
address add 192.0.2.1/24 dev w0
link set g0 up
link set w0 up
route add default via 192.0.2.2
"""
LINKS6 = """\
address add fd77::1/64 dev g0 nodad
address add 2001:db8:2::1/64 dev w0 nodad
route add default via 2001:db8:2::2
"""
GUEST = """\
link set lo up
address add 10.77.0.2/24 dev g0
link set g0 up
route add default via 10.77.0.1
"""
GUEST6 = """\
address add fd77::2/64 dev g0 nodad
route add default via fd77::1
"""
WORLD = """\
link set lo up
address add 192.0.2.2/24 dev w0
link set w0 up
address add 203.0.113.9/32 dev lo
address add 203.0.113.10/32 dev lo
"""
WORLD6 = """\
address add 2001:db8:2::2/64 dev w0 nodad
address add 2001:db8::9/128 dev lo nodad
address add 2001:db8::10/128 dev lo nodad
"""
SERVER = """
import socket, sys
listener = socket.create_server(("", 25), family=int(sys.argv[1]), dualstack_ipv6=int(sys.argv[1]) == socket.AF_INET6)
print("ready", flush=True)
clients = []
while True:
    clients.append(listener.accept()[0])
    if clients[-1].getsockname()[0].endswith("9"):
        clients[-1].sendall(b"220 elsewhere\\r\\n")
"""  # the far server greets, the other one does not
HOLD = """
import socket, sys
sock = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(("", int(sys.argv[2])))
sock.connect((sys.argv[1], 25))
if sys.argv[1].endswith("9"):
    sock.recv(100)
print("connected", flush=True)
sys.stdin.read()
"""
HASTY = r"""
import socket, sys
sock = socket.create_connection((sys.argv[1], 25))
sock.sendall(b"EHLO client\r\nMAIL FROM:<from@example.org>\r\nRCPT TO:<to@example.org>\r\nDATA\r\n"
             b"Subject: hasty\r\n\r\nbody\r\n.\r\n")
sock.setblocking(False)
try:
    while sys.argv[2] == "more":
        sock.send(b"NOOP\r\n" * 1000)
except BlockingIOError:
    pass  # nothing is taken any more: what is left, and that it has closed, waits for room
"""


class Namespace:
    """A network namespace, which is there as long as its process, and that as long as this one."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
        self.enter = ["nsenter", f"--target={self.process.pid}", "--net"]
        if not self.process.stdout.readline():
            pytest.skip(f"no network namespace here: {self.process.communicate()[1].strip()}")

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess:
        """Run a command in it to its end."""
        return subprocess.run([*self.enter, *argv], capture_output=True, text=True, timeout=60, **options)

    def as_user(self, name: str, argv: Any) -> subprocess.Popen:
        """Start a command in it as that user; its standard streams are text pipes."""
        user = ["setpriv", f"--reuid={name}", f"--regid={pwd.getpwnam(name).pw_gid}", "--init-groups"]
        return subprocess.Popen([*self.enter, *user, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd="/")

    def stop(self) -> None:
        """End its process."""
        self.process.communicate()


class Inside(Postfix):
    """A Postfix in the namespace of that command prefix."""

    def __init__(self, enter: list[str], **options: Any) -> None:
        self.enter = enter
        super().__init__(**options)

    def run(self, tool: str, *args: str, **kw: Any) -> subprocess.CompletedProcess:
        """Run one of Postfix's commands there."""
        return super().run(*self.enter, tool, *args, **kw)


class Net(types.SimpleNamespace):
    """The namespaces .host, .guest and .world, and in the host's a .postfix and its .milter."""

    def rules(self, text: str) -> None:
        """Give the host these rules of nftables and no others."""
        done = self.host.run("nft", "-f", "-", input="flush ruleset\n" + text)
        if "No such file or directory" in done.stderr:
            pytest.skip(f"the kernel has no NAT: {done.stderr.splitlines()[0]}")
        assert done.returncode == 0, done.stderr

    def chain(self, family: str, hook: str, priority: int, rule: str) -> str:
        """Write a table with one NAT rule; {port} is Postfix's, {own} and the like an address of the family."""
        addresses = {name: f"[{address}]" if ":" in address and "daddr" not in rule else address
                     for name, address in vars(FAMILIES[family]).items()}
        return (f"table {family} {hook} {{\nchain {hook} {{\ntype nat hook {hook} priority {priority}\n"
                f"{rule.format(port=self.postfix.port, **addresses)}\n}}\n}}\n")

    def redirect(self, family: str, nat: str = "redirect to :{port}", match: str = "") -> None:
        """Redirect what the host's users send to port 25 of others to Postfix."""
        self.rules(self.chain(family, "output", -100, f"{match} tcp dport 25 {nat}"))

    def start(self, user: str, *options: str, at: Optional[Namespace] = None, port: int = 25) -> subprocess.Popen:
        """Start a client of that user, on the host unless said otherwise."""
        return (at or self.host).as_user(user, smtp(port, *options))

    @contextlib.contextmanager
    def held(self, user: str, address: str, port: str) -> Iterator[None]:
        """Have that user of the host connected from that port to port 25 of a server."""
        with self.host.as_user(user, [PYTHON, "-c", HOLD, address, port]) as client:
            try:
                assert client.stdout.readline(), client.stderr.read()
                yield
            finally:
                client.kill()

    def send(self, user: str, *options: str, **where: Any) -> str:
        """Send a message as that user and give the replies."""
        client = self.start(user, *options, **where)
        output, errors = client.communicate(timeout=60)
        assert not errors, errors
        return output

    def headers(self, n: int = 1) -> list[list[str]]:
        """Wait for n messages and give the headers of our name of each."""
        return [message.get_all(HEADER, []) for message in self.postfix.wait_messages(n)]


@pytest.fixture(scope="module")
def network(users: Any) -> Iterator[Net]:
    """Make the namespaces, with Postfix, a milter that blocks mst-bob, and a server beyond."""
    if not shutil.which("nft") or not shutil.which("ip"):
        pytest.skip("nftables or iproute2 is not installed")
    with contextlib.ExitStack() as stack:
        host, guest, world = spaces = [Namespace() for _ in range(3)]
        for space in spaces:
            stack.callback(space.stop)
        pids = {"guest": guest.process.pid, "world": world.process.pid}
        for space, lines, more in (host, LINKS, LINKS6), (guest, GUEST, GUEST6), (world, WORLD, WORLD6):
            for options, text in ((), lines), (("-6",), more if has_ipv6() else ""):
                done = space.run("ip", *options, "-batch", "-", input=text.format(**pids))
                if "not supported" in done.stderr or "Unknown device type" in done.stderr:
                    pytest.skip(f"no veth here: {done.stderr.strip()}")
                assert done.returncode == 0, done.stderr
        server = stack.enter_context(subprocess.Popen(
            [*world.enter, PYTHON, "-c", SERVER, str(int(socket.AF_INET6 if has_ipv6() else socket.AF_INET))],
            stdout=subprocess.PIPE, text=True))
        stack.callback(server.kill)
        assert server.stdout.readline() == "ready\n"
        unhelped = "{ unix:private/unhelped.sock, default_action=accept }"
        postfix = stack.enter_context(Inside(host.enter, addresses="all",
                                             main_cf={"smtpd_forbid_unauth_pipelining": "no"},  # as before 3.9
                                             services={"unhelped": {"smtpd_milters": unhelped}}))
        milter = stack.enter_context(Milter(postfix, prefix=host.enter, blocked_mailusers=["mst-bob"]))
        yield Net(host=host, guest=guest, world=world, postfix=postfix, milter=milter)


@pytest.fixture
def net(network: Net) -> Iterator[Net]:
    """Give the namespaces with no rules and an empty mailbox."""
    network.rules("")
    network.postfix.forget_messages()
    yield network
    assert "Traceback" not in network.milter.log()


# --- redirected clients -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("nat", ["redirect to :{port}", "dnat to {loopback}:{port}"])
def test_a_client_that_is_redirected_is_named(nat: str, family: str, net: Net) -> None:
    """It dialled another host's port 25; the log's client= is its own address."""
    net.redirect(family, nat)
    net.send("mst-alice", "--dial", FAMILIES[family].far)
    assert net.headers() == [[tag("mst-alice", "python3") if mta.can_see_others() else "user=? program=?"]]
    assert FAMILIES[family].own in net.milter.lines("action=")[-1]


def test_a_client_that_is_redirected_to_an_address_of_another_interface_than_lo_is_unknown(
        family: str, net: Net) -> None:
    """The MTA's end is then the same as that of a guest behind NAT, which may have a port in common with a user."""
    net.redirect(family, "dnat to {own}:{port}")
    net.send("mst-alice", "--dial", FAMILIES[family].far)
    assert net.headers() == [["user=? program=?"]]
    assert net.milter.lines("action=")[-1].endswith(" lookup=redirected")


def test_whoever_has_the_same_port_to_another_server_is_not_named(family: str, net: Net, sees_others: None) -> None:
    """mst-bob's connection is not redirected."""
    addresses, port = FAMILIES[family], str(mta.free_port())
    net.redirect(family, match=f"{family} daddr {FAMILIES[family].far}")
    with net.held("mst-bob", addresses.other, port):
        net.send("mst-alice", "--dial", addresses.far, "--bind-port", port)
    assert net.headers() == [["user=mst-alice program=python3"]]
    assert f":{port}" in net.milter.lines("action=")[-1]


@pytest.mark.parametrize("server", ["far", "other"])
def test_whoever_has_the_port_that_nat_gave_a_client_is_not_named(server: str, family: str, net: Net) -> None:
    """NAT gives one where two connections would be the same; mst-bob has it to the same server, not redirected.

    A user can have NAT do so, by two connections from one port to two servers. The second rule makes it certain.
    """
    addresses, port, bob = FAMILIES[family], str(mta.free_port()), pwd.getpwnam("mst-bob").pw_uid
    net.rules(net.chain(family, "output", -100, f"skuid != {bob} tcp dport 25 redirect to :{{port}}")
              + net.chain(family, "postrouting", 100, f"tcp dport {{port}} snat to {{own}}:{port}"))
    with net.held("mst-bob", getattr(addresses, server), port):
        net.send("mst-alice", "--dial", getattr(addresses, server))
    assert net.headers() == [["user=? program=?"]]
    line = net.milter.lines("action=")[-1]
    assert f":{port}" in line and "mst-" not in line and re.search(" lookup=(reused|redirected)$", line)


@pytest.mark.parametrize("said, why", [("all", "closed"), ("more", "reused")])
def test_a_redirected_client_that_has_left_is_unknown(
        said: str, why: str, family: str, net: Net, sees_others: None) -> None:
    """It says everything before it is greeted and closes; its orphan does not tell what it has received.

    If it says more than the MTA's end can take, its close has not been sent when it is looked for.
    """
    port, bob = str(mta.free_port()), pwd.getpwnam("mst-bob").pw_uid
    net.rules(net.chain(family, "output", -100, f"skuid != {bob} tcp dport 25 redirect to :{{port}}")
              + net.chain(family, "postrouting", 100, f"tcp dport {{port}} snat to {{own}}:{port}"))
    os.kill(net.milter.pid, signal.SIGSTOP)
    try:
        with net.held("mst-bob", FAMILIES[family].other, port):
            hasty = net.host.as_user("mst-alice", [PYTHON, "-c", HASTY, FAMILIES[family].other, said])
            assert hasty.communicate(timeout=60) == ("", "")
            os.kill(net.milter.pid, signal.SIGCONT)
            assert net.headers() == [["user=? program=?"]]
    finally:
        os.kill(net.milter.pid, signal.SIGCONT)
    line = net.milter.lines("action=")[-1]
    assert "mst-" not in line and line.endswith(f" lookup={why}")


def test_a_blocked_user_who_is_redirected_is_refused(family: str, net: Net, sees_others: None) -> None:
    """By the rule that hosts have: everyone but the MTA."""
    net.redirect(family, match=f"skuid != {pwd.getpwnam('postfix').pw_uid}")
    assert "550 5.7.1 User mst-bob is blocked" in net.send("mst-bob", "--dial", FAMILIES[family].far)
    assert "250 2.0.0 Ok" in net.send("mst-alice", "--dial", FAMILIES[family].far)
    assert net.headers() == [["user=mst-alice program=python3"]]


def test_whoever_the_rule_exempts_is_not_redirected(family: str, net: Net) -> None:
    """The MTA itself gets out; that the rule works is what other tests rest on."""
    net.redirect(family, match=f"skuid != {pwd.getpwnam('mst-alice').pw_uid}")
    with net.held("mst-alice", FAMILIES[family].far, str(mta.free_port())):
        pass
    assert not net.postfix.messages()


def test_a_client_that_is_redirected_is_unknown_without_the_helper(family: str, net: Net) -> None:
    """Started without the privilege to look into other users' processes, and without lsof."""
    nobody_looks = [*net.host.enter, "setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"]
    net.rules(net.chain(family, "output", -100, f"tcp dport 25 redirect to :{net.postfix.ports['unhelped']}"))
    with Milter(prefix=nobody_looks, lsof_command=[],
                socketname=f"{net.postfix.directory}/queue/private/unhelped.sock") as milter:
        net.send("mst-alice", "--dial", FAMILIES[family].far)
        assert net.headers() == [["user=? program=?"]]
        assert milter.wait_lines("action=")[0].endswith(" action=tag lookup=redirected")
        net.send("mst-alice", "--dial", FAMILIES[family].loopback, port=net.postfix.ports["unhelped"])
        assert net.headers(2)[1] == ["user=mst-alice program=?"]


def test_a_helper_that_hangs_holds_a_redirected_client_up_no_longer_than_the_deadline(
        family: str, net: Net, sees_others: None) -> None:
    """The greeting waits for it, once."""
    net.redirect(family)
    (helper,) = net.milter.helper_pids()
    os.kill(helper, signal.SIGSTOP)
    try:
        began = time.monotonic()
        net.send("mst-alice", "--dial", FAMILIES[family].far)
        assert time.monotonic() - began < ms.HELPER_SECONDS + 2
    finally:
        os.kill(helper, signal.SIGCONT)
    assert net.headers() == [["user=? program=?"]]
    assert net.milter.lines("action=")[-1].endswith(" lookup=timeout")


def test_without_a_nat_rule_a_client_is_named_as_ever(family: str, net: Net) -> None:
    """On every address of the host."""
    for n, address in enumerate((FAMILIES[family].loopback, FAMILIES[family].own), 1):
        net.send("mst-alice", "--dial", address, port=net.postfix.port)
        assert net.headers(n)[-1] == [tag("mst-alice", "python3")]


# --- guests -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("server", ["far", "other"])
def test_a_guest_behind_nat_is_never_given_a_user_of_the_host(server: str, family: str, net: Net) -> None:
    """It has the host's address, and the port that mst-alice has to the very server that it dialled."""
    addresses, port = FAMILIES[family], str(mta.free_port())
    net.rules(net.chain(family, "prerouting", -100, "iif g0 tcp dport 25 redirect to :{port}")
              + net.chain(family, "input", 100, "iif g0 tcp dport {port} snat to {own}"))
    with net.held("mst-alice", getattr(addresses, server), port):
        net.send("nobody", "--dial", getattr(addresses, server), "--bind-port", port, at=net.guest)
    assert net.headers() == [["user=? program=?"]]
    line = net.milter.lines("action=")[-1]
    assert f"{addresses.own}{']' * (family == 'ip6')}:{port}" in line
    assert "mst-" not in line and line.endswith(" lookup=redirected")


@pytest.mark.parametrize("redirected", [False, True])
def test_a_guest_under_its_own_address_is_another_host(redirected: bool, family: str, net: Net) -> None:
    """As a container on a bridge is: no header."""
    if redirected:
        net.rules(net.chain(family, "prerouting", -100, "iif g0 tcp dport 25 redirect to :{port}"))
        net.send("nobody", "--dial", FAMILIES[family].far, at=net.guest)
    else:
        net.send("nobody", "--dial", FAMILIES[family].inside, at=net.guest, port=net.postfix.port)
    assert net.headers() == [[]]
    assert " action=pass" in net.milter.lines(FAMILIES[family].guest)[-1]


# --- the helper's answer ----------------------------------------------------------------------------------------

@pytest.fixture
def accepted() -> Iterator[ms.Diag]:
    """Give the accepted end of a connection that this process has, as the kernel describes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far = listener.accept()[0]
        with far:
            ends = ms.endpoint(*far.getsockname()), ms.endpoint(*near.getsockname())
            yield ms.KernelLookup(lambda mta_end: "redirected").find(*ends, ms.LOOPBACK)


@pytest.mark.parametrize("number", ["PIDFD_OPEN", "PIDFD_GETFD", "SO_ORIGINAL_DST", "IP_PKTOPTIONS"])
def test_a_kernel_that_lacks_what_it_takes_leaves_a_redirected_client_unknown(
        number: str, root: None, accepted: ms.Diag, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call (ENOSYS) or socket option (ENOPROTOOPT) that is not there; the helper lives on."""
    monkeypatch.setattr(ms, number, 4000)
    helper = ms.fork_helper(pwd.getpwnam("postfix"))
    describer = ms.Describer(helper)
    with helper.channel:
        for _ in range(2):
            began = time.monotonic()
            assert describer.what_was_dialled(accepted) == "redirected"
            assert time.monotonic() - began < ms.HELPER_SECONDS


def test_a_holder_that_ends_before_its_socket_is_copied_leaves_the_client_unknown(
        root: None, accepted: ms.Diag, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found, and gone."""
    copies: list[int] = []

    def copy(pid: int, descriptor: int) -> socket.socket:
        copies.append(pid)
        raise ProcessLookupError
    monkeypatch.setattr(ms, "copy_of_socket", copy)
    assert ms.Finder([]).answer(ms.WHAT_WAS_DIALLED, accepted.uid, accepted.inode, accepted.cgroup) == {"why": "gone"}
    assert 1 <= len(copies) <= 3


def test_a_descriptor_that_is_another_socket_by_now_is_not_asked(
        root: None, accepted: ms.Diag, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number was given to another socket between finding and copying."""
    monkeypatch.setattr(ms, "copy_of_socket", lambda pid, descriptor: socket.socket())
    monkeypatch.setattr(ms, "original_destination", lambda copy: pytest.fail("asked"))
    assert ms.Finder([]).answer(ms.WHAT_WAS_DIALLED, accepted.uid, accepted.inode, accepted.cgroup) == {"why": "gone"}
