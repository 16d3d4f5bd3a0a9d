# SPDX-License-Identifier: MIT
"""Sockets that hide another from the kernel's exact answer: the client is known all the same, or nobody is named."""

from __future__ import annotations

import pwd
import socket
import subprocess
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


# In a network namespace of its own: each pair of sockets of a user's that can have the same ends, one of them the
# client; prints how many could be had, and those where the client was not found to be his.
PAIRS = r'''
import itertools, os, socket, sys
sys.path.insert(0, sys.argv[1])
import milter_sysuser as ms
lookup, uid = ms.KernelLookup(lambda mta_end: "redirected"), int(sys.argv[2])
LISTENER = {"127.0.0.1": socket.AF_INET, "192.0.2.77": socket.AF_INET, "::1": socket.AF_INET6}

def made(family, device, late, *options):
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for option in (*options, *[(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)] * bool(device and not late)):
        sock.setsockopt(*option)
    return sock

def arrange(address, port, mapped, device, late, other_device, other_late, client_first):
    """Connect the client, and have another socket with its ends in SYN_SENT."""
    family = socket.AF_INET6 if mapped else LISTENER[address]
    name, deaf = "::ffff:" * mapped + address, (41, 73, 255) if address == "::1" else (0, 21, 255)  # the TTL filters
    client, other = made(family, device, late), made(family, other_device, other_late, deaf)
    client.settimeout(0.1)
    other.setblocking(False)
    for sock in (client, other) if client_first else (other, client):
        sock.bind((name, 40001))
        sock.connect((name, port)) if sock is client else sock.connect_ex((name, port))
    for sock, to, when in (client, device, late), (other, other_device, other_late):
        if to and when:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, to)
    return client, other

def found(address, *how):
    """Say whose the client is; None if there can be no such pair."""
    with socket.create_server((address, 0), family=LISTENER[address]) as listener:
        port, (near, far), (ready, go) = listener.getsockname()[1], os.pipe(), os.pipe()
        if os.fork() == 0:
            os.close(go)
            os.setuid(uid)
            try:
                held = arrange(address, port, *how)
                os.write(far, b"x")
                os.read(ready, 1)
            finally:
                os._exit(0)
        os.close(far)
        try:
            if not os.read(near, 1):
                return None
            with listener.accept()[0] as accepted:
                ends = ms.endpoint(*accepted.getpeername()[:2]), ms.endpoint(address, port)
                return lookup.find_client_socket(*ends)
        finally:
            os.close(go), os.close(near), os.close(ready)
            os.wait()

DEVICES = (None, 0), (b"lo\0", 0), (b"lo\0", 1), (b"mst0\0", 0), (b"mst0\0", 1)  # 1: bound when it is connected
pairs = {(address, mapped, *one, *other, first): found(address, mapped, *one, *other, first)
         for address, one, other, first in itertools.product(LISTENER, DEVICES, DEVICES, (True, False))
         for mapped in ((False, True) if address != "::1" else (False,))
         if one != (b"mst0\0", 0) or address == "192.0.2.77"}  # what is bound to it does not reach loopback
had = {how: owner for how, owner in pairs.items() if owner is not None}
print(len(had), [how for how, owner in had.items() if owner.uid != uid])
'''


def test_no_pair_of_sockets_hides_the_client(root: None) -> None:
    """Bound to a device or not, before or after, IPv4, IPv6 or mapped, whichever came first."""
    lay = "ip link set lo up && ip link add mst0 type veth peer name mst1 && ip addr add 192.0.2.77/24 dev mst0 && " \
          "ip link set mst0 up && ip link set mst1 up"
    if subprocess.run(["unshare", "--net", "sh", "-c", lay], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace with a veth device")
    nobody = str(pwd.getpwnam("nobody").pw_uid)
    ran = subprocess.run(["unshare", "--net", "sh", "-c", f'{lay} && exec "$@"', "sh", mta.PYTHON, "-c", PAIRS,
                          str(mta.SCRIPT.parent), nobody], capture_output=True, text=True, check=False)
    had, _, hidden = ran.stdout.strip().partition(" ")
    assert int(had or 0) >= 80, (had, ran.stderr)
    assert hidden == "[]", hidden
