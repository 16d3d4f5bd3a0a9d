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
FAMILIES = {"ip": types.SimpleNamespace(prefix="172.17.0.", length=16), "ip6": types.SimpleNamespace(prefix="fd00:17::", length=64)}
FIRST_UID = 100000  # what a mapped container's root is outside of it; see mta.USER_NAMESPACE
ID = secrets.token_hex(32)  # as docker and podman name containers; two runs at once have different ones


def ip(*batches: Sequence[str], enter: Sequence[str] = ()) -> None:
    """Have ip(8) do all that in the namespace of that command prefix."""
    for family, lines in ("-4", batches[0]), ("-6", batches[1] if has_ipv6() else []):
        done = subprocess.run([*enter, "ip", family, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True,
                              text=True, timeout=60)
        if "not supported" in done.stderr or "Unknown device type" in done.stderr:
            pytest.skip(f"no bridge or veth here: {done.stderr.strip()}")
        assert done.returncode == 0, (lines, done.stderr)


class Guest:
    """A container: a network namespace and processes in a cgroup.

    number   the last part of its addresses
    cgroup   its cgroup, below the mount; None: the one that everything is in
    prefix   a command that makes its user namespace, if it has one
    within   further namespaces to enter from outside
    """

    def __init__(self, host: Namespace, number: int, cgroup: Optional[pathlib.Path] = None,
                 prefix: Sequence[str] = (), within: Sequence[str] = ()) -> None:
        self.cgroup = cgroup
        self.process = subprocess.Popen([*self.moved(), *prefix, "unshare", "--net", "sh", "-c", "echo ready; exec cat"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not self.process.stdout.readline():
            pytest.skip(f"no such container here: {self.process.communicate()[1].strip()}")
        self.enter = [*self.moved(), "nsenter", f"--target={self.process.pid}", "--net", *within]
        self.join(host, number)

    def moved(self) -> list[str]:
        """Give a prefix that moves a command into the cgroup."""
        return ["sh", "-c", f'echo $$ >{self.cgroup}/cgroup.procs && exec "$@"', "sh"] if self.cgroup else []

    def join(self, host: Namespace, number: int) -> None:
        """Connect it to the host's bridge."""
        name = f"g{self.process.pid}"
        ip([f"link add {name} type veth peer name eth0 netns {self.process.pid}", f"link set {name} master br0 up"], [],
           enter=host.enter)
        ip(["link set lo up", "link set eth0 up", f"address add 172.17.0.{number}/16 dev eth0"],
           [f"address add fd00:17::{number}/64 dev eth0 nodad"], enter=self.enter[:-1] if "--user" in self.enter else self.enter)

    def start(self, argv: Sequence[str], uid: Optional[int] = None) -> subprocess.Popen:
        """Start a command in it under that uid of its own; its standard streams are text pipes."""
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid is not None else []
        return subprocess.Popen([*self.enter, *user, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd="/")

    def stop(self) -> None:
        """End it."""
        self.process.communicate()


class Net(types.SimpleNamespace):
    """The .host, and in it a .postfix and its .milter; .guests by name."""

    def send(self, guest: Guest, family: str, *options: str, uid: int = 33) -> str:
        """Send a message from a guest and give the replies."""
        client = guest.start(smtp(self.postfix.port, "--dial", f"{FAMILIES[family].prefix}1", *options), uid)
        output, errors = client.communicate(timeout=60)
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
            part.rmdir()


@pytest.fixture(scope="module")
def network(users: Any, sees_others: None) -> Iterator[Net]:
    """Make the host, its bridge, the guests, Postfix and a milter."""
    with contextlib.ExitStack() as stack:
        host = Namespace()
        stack.callback(host.stop)
        ip(["link set lo up", "link add br0 type bridge", "link set br0 up", "address add 172.17.0.1/16 dev br0"],
           ["address add fd00:17::1/64 dev br0 nodad"], enter=host.enter)
        mapped = mta.user_namespace(65536)
        if mapped is None:
            pytest.skip("no user namespace here")
        guests = {}
        for name, number, path, prefix, within in (
                ("docker", 5, f"system.slice/docker-{ID}.scope", (), ()),
                ("podman", 6, f"machine.slice/libpod-{ID}.scope/container", mapped, ("--user",)),
                ("lxc", 7, f"lxc.payload.web-{ID[:8]}/system.slice/apache2.service", mapped, ("--user",))):
            guests[name] = Guest(host, number, stack.enter_context(cgroup(path)), prefix, within)
            stack.callback(guests[name].stop)
        postfix = stack.enter_context(Inside(host.enter, addresses="all", main_cf={"mynetworks": "127.0.0.0/8 172.17.0.0/16 [fd00:17::]/64"}))
        milter = stack.enter_context(Milter(postfix, prefix=host.enter, container_networks=NETWORKS))
        yield Net(host=host, guests=guests, postfix=postfix, milter=milter)


@pytest.fixture
def net(network: Net) -> Iterator[Net]:
    """Give the host with an empty mailbox."""
    network.postfix.forget_messages()
    yield network
    assert "Traceback" not in network.milter.log()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Say which kind of address."""
    if request.param == "ip6" and not has_ipv6():
        pytest.skip("no IPv6 here")
    return request.param


@pytest.mark.parametrize("guest, uid, unit", [
    ("docker", 33, f"docker-{ID}.scope"), ("podman", FIRST_UID + 33, f"libpod-{ID}.scope"), ("lxc", FIRST_UID + 33, f"lxc.payload.web-{ID[:8]}")])
def test_a_containers_client_is_named(guest: str, uid: int, unit: str, family: str, net: Net) -> None:
    """By the kernel's uid as a number."""
    net.send(net.guests[guest], family)
    assert net.headers() == [[f"user={uid} program=python3"]]
    print(net.line())
    assert f" user={uid} uid={uid} program=python3 " in net.line() and f" unit={unit} " in net.line()
