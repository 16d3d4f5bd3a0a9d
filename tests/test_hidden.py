# SPDX-License-Identifier: MIT
"""Sockets that hide another from the kernel's exact answer: the client is known all the same, or nobody is named."""

from __future__ import annotations

import socket
import types
from typing import Iterator

import pytest

import mta

BLOCKED = [("replycode", "550 5.7.1 User mst-bob is blocked from sending mail")]
ADDRESSES = {"IPv4": "127.0.0.1", "IPv6": "::1"}
# The client's end, and others with the same ends. SYN_SENT: its TTL filter keeps it from hearing of the refusal.
CLIENT = r'''
import socket, sys
dial, port, *kinds = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
family = socket.AF_INET6 if ":" in dial else socket.AF_INET
def made(*options):
    sock = socket.socket(family)
    for level, name, value in ((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), *options):
        sock.setsockopt(level, name, value)
    return sock
LO = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
DEAF = (41, 73, 255) if ":" in dial else (0, 21, 255)  # IPV6_MINHOPCOUNT, IP_MINTTL
client = made(*[LO] * ("bound later" not in kinds))
client.bind((dial, 0))
client.connect((dial, port))
if "bound later" in kinds:
    client.setsockopt(*LO)
others = []
for kind in kinds:
    if kind == "SYN_SENT":
        others.append(made(DEAF, *[(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)] * bool(others)))
        others[-1].bind(client.getsockname()[:2])
        others[-1].setblocking(False)
        others[-1].connect_ex((dial, port))
client.sendall(b"EHLO me")
print(client.getsockname()[1], flush=True)
sys.stdin.readline()
for other in others:
    other.close()
sys.stdin.read()
'''


@pytest.fixture(scope="module")
def milter(users: types.SimpleNamespace) -> Iterator[mta.Milter]:
    """Run one milter for all tests here; mst-bob is blocked, and who is not known passes."""
    with mta.Milter(blocked_mailusers=["mst-bob"]) as milter:
        yield milter


@pytest.mark.parametrize("family", ADDRESSES)
@pytest.mark.parametrize("kinds", [["SYN_SENT"], ["bound later", "SYN_SENT"], []], ids=" and ".join)
def test_a_client_that_another_socket_of_his_hides_is_known(family: str, kinds: list[str], milter: mta.Milter) -> None:
    """The one with the same ends that stands first in the kernel's table is no connection."""
    if family == "IPv6" and not mta.has_ipv6():
        pytest.skip("no IPv6 here")
    dial = ADDRESSES[family]
    with socket.create_server((dial, 0), family=socket.AF_INET6 if family == "IPv6" else socket.AF_INET) as listener:
        port = listener.getsockname()[1]
        client = mta.as_user("mst-bob", [mta.PYTHON, "-c", CLIENT, dial, str(port), *kinds])
        accepted, address = listener.accept()
    with accepted, mta.Wire(milter.socketname) as wire:
        assert client.stdout.readline() == f"{address[1]}\n", client.stderr.read()
        wire.connect(*address[:2], daemon_addr=dial, daemon_port=str(port))
        client.stdin.write("\n")
        client.stdin.flush()
        accepted.recv(100)
        wire.helo()
        assert wire.message(headers=[("X-Sender-Process-Info", "user=root")]) == BLOCKED, milter.log()
    client.communicate()
