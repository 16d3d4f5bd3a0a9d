# SPDX-License-Identifier: MIT
"""The real script, spoken to in the milter protocol, about real connections of real users."""

from __future__ import annotations

import contextlib
import pathlib
import random
import re
import resource
import socket
import struct
import types
from typing import Any, Callable, Iterator

import psutil
import pytest

import mta

NAME = "X-Sender-Process-Info"
CLIENT = """
import socket, sys
sock = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
sock.connect((sys.argv[1], int(sys.argv[2])))
sock.sendall(b"EHLO me")
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""
UNKNOWN = ("addheader", NAME, "user=? program=?")


class Connection:
    """A TCP connection of a user to a server of the test, which has accepted it."""

    def __init__(self, user: str, dial: str = "127.0.0.1", listen: str = "") -> None:
        listen = listen or dial
        family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        with socket.create_server((listen, 0), family=family, dualstack_ipv6=listen == "::") as listener:
            self.server_port = listener.getsockname()[1]
            self.process = mta.as_user(user, [mta.PYTHON, "-SEc", CLIENT, dial, str(self.server_port)])
            self.accepted, peer = listener.accept()
        self.address, self.port = peer[:2]
        assert self.process.stdout.readline() == f"{self.port}\n", self.process.stderr.read()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()
        self.accepted.close()

    def announce(self, wire: mta.Wire, **options: Any) -> list[tuple]:
        """Tell the milter of this client as Postfix does, with what options say otherwise."""
        server = self.accepted.getsockname()[0]
        replies = wire.connect(**{"address": self.address, "port": self.port, "daemon_addr": server,
                                  "daemon_port": str(self.server_port), **options})
        with contextlib.suppress(BlockingIOError):
            self.accepted.recv(100, socket.MSG_DONTWAIT)  # an MTA reads when the milter has seen the client
        return replies


@pytest.fixture(scope="module")
def milter(users: types.SimpleNamespace) -> Iterator[mta.Milter]:
    """Run one milter for all tests here; mst-bob is blocked."""
    with mta.Milter(blocked_mailusers=["mst-bob"]) as milter:
        yield milter
        assert milter.process.poll() is None, milter.log()


@pytest.fixture
def wire(milter: mta.Milter) -> Iterator[mta.Wire]:
    """Open one connection to it."""
    with mta.Wire(milter.socketname) as wire:
        yield wire


def tag(replies: list[tuple]) -> str:
    """Give the value of the one header that was added, the message having been let through."""
    assert replies[-1] == ("continue",), replies
    (added,) = [reply for reply in replies if reply[0] == "addheader"]
    assert added[1] == NAME
    return added[2]


# --- who it is ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dial, listen, options", [
    ("127.0.0.1", "", {}), ("127.0.0.1", "", {"daemon_addr": "[127.0.0.1]"}),
    ("127.0.0.1", "", {"daemon_addr": ""}), ("127.0.0.1", "", {"daemon_port": ""}),
    ("127.0.0.1", "", {"daemon_addr": "", "daemon_port": ""}), ("127.0.0.1", "0.0.0.0", {"daemon_addr": "0.0.0.0"}),
    ("127.0.0.1", "", {"daemon_addr": "0.0.0.0", "daemon_port": ""}), ("127.0.0.1", "", {"daemon_addr": "nonsense"}),
    ("127.0.0.1", "", {"daemon_port": "smtp"}), ("127.9.8.7", "", {}), ("127.9.8.7", "0.0.0.0", {"daemon_addr": "0.0.0.0"}),
    ("::1", "", {}), ("::1", "", {"daemon_addr": "IPv6:::1"}), ("::1", "", {"daemon_addr": "[::1]", "address": "IPv6:::1"}),
    ("::1", "::", {"daemon_addr": "::"}), ("::1", "::", {"daemon_addr": "IPv6:::"}), ("::1", "", {"daemon_addr": ""}),
    ("::1", "", {"daemon_port": ""}), ("127.0.0.1", "::", {}), ("127.0.0.1", "::", {"daemon_addr": "::"}),
    ("127.0.0.1", "::", {"daemon_addr": ""}), ("::ffff:127.0.0.1", "127.0.0.1", {}),
    ("::ffff:127.0.0.1", "127.0.0.1", {"daemon_addr": "0.0.0.0"}),
    ("::ffff:127.0.0.1", "::", {"daemon_addr": "IPv6:::ffff:127.0.0.1"}),
    ("127.0.0.1", "", {"address": "::ffff:127.0.0.1", "daemon_addr": "::ffff:127.0.0.1"})],
    ids=lambda value: str(value) or "same")
def test_the_user_is_named_however_the_mta_writes_the_ends(dial: str, listen: str, options: dict,
                                                           wire: mta.Wire) -> None:
    """v4, v6, v4-mapped on either side; the server's end given, missing, a wildcard, or no address."""
    if ":" in dial + listen and not mta.has_ipv6():
        pytest.skip("no IPv6 here")
    with Connection("mst-alice", dial, listen) as connection:
        assert connection.announce(wire, **options) == [("continue",)]
        assert tag(wire.message()).startswith("user=mst-alice program=")


def test_the_program_is_what_the_user_runs(wire: mta.Wire, sees_others: None) -> None:
    """The process that holds the socket, by its comm."""
    with Connection("mst-alice") as connection:
        connection.announce(wire)
        assert tag(wire.message()) == f"user=mst-alice program={psutil.Process(connection.process.pid).name()}"


def test_a_blocked_user_is_refused_at_the_end_of_the_message(wire: mta.Wire) -> None:
    """In the words of the contract, and nothing is added or changed."""
    with Connection("mst-bob") as connection:
        connection.announce(wire)
        assert wire.message(headers=[(NAME, "user=root")]) == [
            ("replycode", "550 5.7.1 User mst-bob is blocked from sending mail")]


@pytest.mark.parametrize("client", [
    {"address": "192.0.2.99", "port": 43210}, {"address": "2001:db8::9", "port": 43210},
    {"address": "127.0.0.1", "port": 0}, {"address": "::1", "port": 0}, {"address": "/run/x.sock", "family": "L"}],
    ids=lambda client: f"{client['address']} {client.get('port', '')}")
def test_remote_and_emulated_clients_pass_without_a_header(client: dict, wire: mta.Wire, milter: mta.Milter) -> None:
    """A forged one is removed all the same; the log says pass, and nothing of users."""
    if client["address"] == "2001:db8::9" and not mta.kernel_has_ipv6():
        pytest.skip("no IPv6 here")
    queue_id = f"4ZPASS{client['address'].replace('/', '')}{client.get('port')}"
    assert wire.connect(**client, daemon_addr="127.0.0.1", daemon_port="25") == [("continue",)]
    assert wire.message(headers=[(NAME, "user=root")], queue_id=queue_id) == [("chgheader", 1, NAME, ""), ("continue",)]
    (line,) = milter.wait_lines(queue_id)
    assert line.endswith("from=from@example.org rcpts=1 action=pass") and "user=" not in line


@pytest.mark.parametrize("client", [
    {"family": "U"}, {"address": "127.0.0.1", "port": 1, "daemon_addr": "127.0.0.1", "daemon_port": "2"},
    {"address": "127.0.0.1", "port": 1}, {"address": "127.0.0.1", "port": 1, "daemon_addr": "127.0.0.1",
                                          "daemon_port": "99999"}],
    ids=["no address", "no such connection", "no such connection, server not said", "no such port"])
def test_a_local_client_that_the_kernel_does_not_know_is_unidentified(client: dict, wire: mta.Wire) -> None:
    """Never remote, never root."""
    assert wire.connect(**client) == [("continue",)]
    assert wire.message() == [UNKNOWN, ("continue",)]


def test_a_listener_is_not_taken_for_a_client(wire: mta.Wire) -> None:
    """The kernel may answer with the listener on the client's port."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        wire.connect("127.0.0.1", listener.getsockname()[1], daemon_addr="127.0.0.1",
                     daemon_port=str(other.getsockname()[1]))
        assert wire.message() == [UNKNOWN, ("continue",)]


def test_connections_at_the_same_time_keep_their_users_apart(milter: mta.Milter) -> None:
    """One step of each in turn; the blocked one is refused again and again, the others never."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for user in ["mst-alice", "mst-bob", "nobody"] * 3:
            pairs.append((user, stack.enter_context(Connection(user)), stack.enter_context(mta.Wire(milter.socketname))))
        for step in (lambda c, w: c.announce(w), lambda c, w: w.mail(), lambda c, w: w.rcpt(),
                     lambda c, w: w.header("Subject", "x")):
            for _, connection, wire in pairs:
                step(connection, wire)
        for n in range(2):
            for user, _, wire in pairs:
                replies = wire.eom() if n == 0 else wire.message()
                if user == "mst-bob":
                    assert replies == [("replycode", "550 5.7.1 User mst-bob is blocked from sending mail")]
                else:
                    assert tag(replies).startswith(f"user={user} ")


# --- headers --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("client, said", [("mst-alice", "user=mst-alice "), ("192.0.2.99", "action=pass")])
def test_more_headers_than_an_honest_message_has_are_refused_at_once(client: str, said: str, milter: mta.Milter,
                                                                     wire: mta.Wire) -> None:
    """The log has its line, and the next message of the connection is treated like any other; a thousand are not too many."""
    with contextlib.ExitStack() as stack:
        if client == "192.0.2.99":
            wire.connect(client, 1)
        else:
            stack.enter_context(Connection(client)).announce(wire)
        for count, queue_id in (1000, "4ZMANY1"), (1001, "4ZMANY2"), (1000, "4ZMANY3"):
            wire.mail(), wire.rcpt()
            wire.macros("T", i=queue_id + client)
            wire.data()
            replies = [wire.header("Received" if n % 2 else NAME if n == 500 else "X", "x")[0] for n in range(count)]
            assert replies[:1000] == [("continue",)] * 1000
            if count > 1000:
                assert replies[1000:] == [("replycode", "550 5.7.1 More than 1000 headers")]
                wire.abort()
            else:
                assert wire.eom(queue_id + client)[0] == ("chgheader", 1, NAME, "")
            (line,) = milter.wait_lines(queue_id + client)
            assert line.endswith("rcpts=1 action=reject reason=headers") if count > 1000 else said in line


# --- bytes that are not UTF-8 ---------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["helo", "sender", "parameter", "recipient", "header name", "header value", "forged",
                                   "body", "all"])
def test_mail_with_bytes_that_are_not_utf8_is_tagged_like_any_other(where: str, wire: mta.Wire,
                                                                    milter: mta.Milter) -> None:
    """Every step is answered as it should be, and the log stays printable ASCII."""
    def bad(place: str, good: str) -> bytes:
        return b"\xff\xc3(\x80" if where in (place, "all") else good.encode()

    with Connection("mst-alice") as connection:
        connection.announce(wire)
        wire.helo(bad("helo", "me"))
        wire.mail(b"<" + bad("sender", "from") + b"@example.org>", b"BODY=" + bad("parameter", "8BITMIME"))
        wire.rcpt(b"<" + bad("recipient", "to") + b"@example.org>")
        wire.header(bad("header name", "Subject"), bad("header value", "x"))
        wire.header(NAME, bad("forged", "x"))
        wire.eoh()
        wire.body(bad("body", "x"))
        replies = wire.eom("4ZBYTES" + where.replace(" ", ""))
        assert replies[0] == ("chgheader", 1, NAME, "")
        assert tag(replies).startswith("user=mst-alice ")
    (line,) = milter.wait_lines("4ZBYTES" + where.replace(" ", "") + ":")
    assert re.fullmatch("[ -~]+", line)
    assert ("from=\"\\xff\\xc3(\\x80@example.org\"" in line) == (where in ("sender", "all"))


def test_a_host_name_that_is_not_utf8_is_served(wire: mta.Wire) -> None:
    """What pymilter cannot decode is unidentified, and passes where that is accepted."""
    with Connection("mst-alice") as connection:
        assert connection.announce(wire, host=b"\xff\xfe") == [("continue",)]
        assert tag(wire.message()).startswith("user=")


# --- what is negotiated ---------------------------------------------------------------------------------------

def test_nothing_costs_a_round_trip_but_what_a_client_must_not_get_ahead_of(wire: mta.Wire) -> None:
    """Steps that are not needed are not sent, the others are not answered; the server's port is asked for."""
    unwanted = {command for command, (bit, _) in mta.STEPS.items() if wire.protocol & bit}
    silent = {command for command, (_, bit) in mta.STEPS.items() if wire.protocol & bit}
    assert {"N", "B"} <= unwanted
    assert set(mta.STEPS) - unwanted - silent == {"C", "H", "M", "R", "L", "U", "E"}
    assert wire.symlist == {0: "{daemon_addr} {daemon_port}"}
    assert wire.actions & 0x131 == 0x131  # add and change headers, quarantine, choose macros


def test_an_mta_that_can_skip_nothing_is_served_too(milter: mta.Milter) -> None:
    """Every step (but one: none at all would mean version 1 of the protocol) is sent and answered."""
    with Connection("mst-alice") as connection, mta.Wire(milter.socketname, steps=mta.STEPS["N"][0]) as wire:
        assert connection.announce(wire) == wire.helo() == wire.mail() == wire.rcpt() == [("continue",)]
        assert wire.header("Subject", b"\xff") == wire.header(b"\xff", "x") == wire.body() == [("continue",)]
        assert tag(wire.eom()).startswith("user=mst-alice ")


def test_nothing_times_out_as_delivered(make_milter: Callable[..., mta.Milter], tmp_path: pathlib.Path) -> None:
    """Where default_action is accept, what takes longer than the timeout would pass unseen."""
    ms = tmp_path / "says.py"
    says = "Milter.runmilter = lambda name, socket, seconds, **more: say(INFO, f'waits for {seconds} s')\n\n\n"
    ms.write_text(mta.SCRIPT.read_text().replace('if __name__ == "__main__":', says + 'if __name__ == "__main__":'))
    milter = make_milter(script=ms)
    milter.start(wait=False).wait_lines("waits for 2147483 s")  # the longest: poll(2) takes milliseconds in an int


def test_half_a_packet_is_waited_for_as_long_as_the_timeout_says(make_milter: Callable[..., mta.Milter]) -> None:
    """One second is over when the connection is closed; as delivered it is not."""
    short, never = make_milter(timeout=1).start(), make_milter().start()
    with mta.Wire(short.socketname) as dropped, mta.Wire(never.socketname) as kept:
        for wire in kept, dropped:
            wire.sock.sendall(packet(b"H", b"localhost\0")[:3])
        assert dropped.sock.recv(1) == b""
        kept.sock.sendall(packet(b"H", b"localhost\0")[3:])
        assert kept.receive() == ("c", b"")


# --- hostile peers --------------------------------------------------------------------------------------------

def packet(command: bytes, data: bytes = b"") -> bytes:
    """Build one packet."""
    return struct.pack("!I", len(data) + 1) + command + data


OPTIONS = packet(b"O", struct.pack("!III", 6, mta.ALL_ACTIONS, mta.ALL_STEPS))
CONNECT = packet(b"C", b"localhost\x004\x00\x01127.0.0.1\0")
HOSTILE = {
    "nothing": b"", "a byte": b"\0", "no length": b"\0\0\0\0", "all ones": b"\xff" * 64, "two gigabytes": b"\x7f\xff\xff\xffO",
    "http": b"GET / HTTP/1.0\r\n\r\n", "short options": packet(b"O", b"\0\0\0\6"), "no options": CONNECT + packet(b"E"),
    "unknown command": OPTIONS + packet(b"\0") + packet(b"\xff"), "end first": OPTIONS + packet(b"E"),
    "options twice": OPTIONS * 2, "header first": OPTIONS + packet(b"L", b"a\0b\0"),
    "connect cut short": OPTIONS + packet(b"C", b"localhost\x004\x00"), "connect without data": OPTIONS + packet(b"C"),
    "bad family": OPTIONS + packet(b"C", b"localhost\0\xff\x00\x01x\0"), "bad address": OPTIONS + packet(
        b"C", b"localhost\x004\x00\x01999.1.1.1\0"), "odd macros": OPTIONS + packet(b"D", b"C{daemon_addr}\0"),
    "macros for nothing": OPTIONS + packet(b"D"), "macros without end": OPTIONS + packet(b"D", b"C{daemon_addr}\0x"),
    "mail without data": OPTIONS + CONNECT + packet(b"M"), "sender without end": OPTIONS + CONNECT + packet(b"M", b"x"),
    "header without value": OPTIONS + CONNECT + packet(b"M", b"<>\0") + packet(b"L", b"X-Sender-Process-Info\0"),
    "end twice": OPTIONS + CONNECT + packet(b"M", b"<>\0") + packet(b"E") * 2, "oversized": OPTIONS + packet(
        b"B", b"x" * (1 << 21)), "abort and quit": OPTIONS + packet(b"A") * 3 + packet(b"Q") * 3,
    "a thousand recipients": OPTIONS + CONNECT + packet(b"M", b"<>\0") + packet(b"R", b"<x>\0") * 1000,
}


def throw(socketname: str, data: bytes) -> None:
    """Send bytes, hang up, and wait until the milter has hung up too."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(socketname)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass


def usage(milter: mta.Milter) -> tuple[int, int]:
    """Count its threads and descriptors."""
    process = psutil.Process(milter.pid)
    return process.num_threads(), process.num_fds()


@pytest.fixture
def steady(milter: mta.Milter) -> Iterator[Callable[[], None]]:
    """Compare threads and descriptors before and after a test, and let a client be served in the end."""
    def served() -> None:
        with Connection("mst-alice") as connection, mta.Wire(milter.socketname) as wire:
            connection.announce(wire)
            assert tag(wire.message()).startswith("user=mst-alice ")

    for _ in range(4):
        served()
    mta.wait_for(lambda: psutil.Process(milter.pid).num_threads() < 30, what="the end of the threads of tests before")
    threads, descriptors = usage(milter)
    yield served
    served()
    mta.wait_for(lambda: usage(milter) <= (threads + 4, descriptors + 4) and usage(milter)[1] <= descriptors + 4, 20,
                 f"{threads} threads and {descriptors} descriptors as before, not {usage(milter)}")
    assert milter.process.poll() is None


def test_malformed_packets_disturb_nobody(milter: mta.Milter, steady: Callable[[], None]) -> None:
    """Truncated, oversized, out of order: the peer that sends them is dropped, the next is served."""
    tracebacks = milter.log().count("Traceback")
    for data in HOSTILE.values():
        throw(milter.socketname, data)
        with mta.Wire(milter.socketname) as wire:
            wire.connect("192.0.2.99", 1)
            assert wire.message() == [("continue",)]
    steady()
    assert milter.log().count("Traceback") == tracebacks, milter.log()


def test_random_packets_disturb_nobody(milter: mta.Milter, steady: Callable[[], None], long: bool) -> None:
    """Random bytes, and random packets with true lengths after a true greeting."""
    random.seed(2)
    for n in range(10000 if long else 200):
        data = random.randbytes(random.randrange(60))
        if n % 2:
            data = OPTIONS + CONNECT * (n % 4 > 1) + b"".join(
                packet(random.choice([b"A", b"B", b"C", b"D", b"E", b"H", b"K", b"L", b"M", b"N", b"R", b"T", b"U"]),
                       random.randbytes(random.randrange(20))) for _ in range(8))
        throw(milter.socketname, data)
    steady()


def test_connections_dropped_at_every_stage_leave_nothing(milter: mta.Milter, steady: Callable[[], None],
                                                          long: bool) -> None:
    """Threads and descriptors are as before."""
    steps = [lambda w: w.connect("127.0.0.1", 1), lambda w: w.helo(), lambda w: w.mail(), lambda w: w.rcpt(),
             lambda w: w.header("Subject", "x"), lambda w: w.body(), lambda w: w.send("E"), lambda w: w.quit()]
    for _ in range(500 if long else 10):
        for stage in range(len(steps) + 1):
            with mta.Wire(milter.socketname) as wire:
                for step in steps[:stage]:
                    step(wire)


def test_thousands_of_idle_connections_do_not_keep_it_from_serving(milter: mta.Milter,
                                                                   steady: Callable[[], None]) -> None:
    """2,000 peers that negotiate and then say nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(2000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(mta.Wire(milter.socketname))
            steady()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
