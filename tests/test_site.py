# SPDX-License-Identifier: MIT
"""One limit for a user on all nodes: the README's recipe as it stands there, with the real rspamd and Redis.

Two nodes and a smarthost, each a Postfix with the milter, on addresses of loopback; rspamd and redis-server are
Debian's, with directories and ports of their own. Only what names the host's own things in the recipe is replaced.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pathlib
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import types
from typing import Iterator, Optional

import psutil
import pytest

import mta
from mta import recipe

HEADING = "One limit for a user on all nodes"
NODES = "127.0.0.2/31"
# What a test has otherwise than a host: no ports of the system's, no network, and a start in less than the 10 s that
# rspamd takes to compile its rules and its list of domains.
OWN = {
    "worker-normal.inc": "enabled = false;",
    "worker-controller.inc": "enabled = false;",
    "worker-proxy.inc": 'bind_socket = "127.0.0.1:{port}";',
    "fuzzy_check.conf": 'rule "rspamd.com" {{ servers = "127.0.0.1:1"; }}',
    "options.inc": 'disable_hyperscan = true; url_tld = "{place}/domains"; '
                   'control_socket = "{place}/db/rspamd.sock mode=0600"; dns {{ nameserver = ["127.0.0.1:1"]; }}',
}
# Stand in for the tools, which would ask the system's servers: the test does what systemctl is told.
TOOLS = {
    "redis-cli": 'exec /usr/bin/redis-cli -p {redis_port} "$@"',
    "rspamadm": 'exec /usr/bin/rspamadm {variables} "$@"',
    "systemctl": 'echo "$*" >>{place}/systemctl',
    "apt-get": '[ "$1 $2" = "install -y" ] && shift 2 && dpkg-query -W "$@" >/dev/null',
}


class Server:
    """A server in the foreground as its user, with its output in a file."""

    def __init__(self, user: str, command: list[str], port: int, log: pathlib.Path) -> None:
        self.user, self.command, self.port, self.log = user, command, port, log
        self.process: Optional[subprocess.Popen] = None

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            **mta.identity(self.user))
        mta.wait_for(lambda: self.accepts() or self.process.poll() is not None, 30, f"the port of {self.command}")
        assert self.process.poll() is None, f"{self.command} ended:\n{self.log.read_text()}"

    def accepts(self) -> bool:
        """Say whether it takes connections."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self, kill: bool = False) -> None:
        """End it, in order or at once; rspamd 3.12 gives connections 16 s, but none of ours matters."""
        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children()
        self.process.kill() if kill else self.process.terminate()
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            for child in children:
                if child.is_running():
                    child.kill()
            self.process.wait(30)


class Site:
    """The two nodes (.nodes), the smarthost (.smarthost), .rspamd and .redis, to be set up by the recipe."""

    def __init__(self, place: pathlib.Path) -> None:
        self.place = place
        self.smarthost = mta.Postfix(place / "smarthost", discard=True)
        master = ["smtp unix - - n - - smtp"]
        relay = {"default_transport": f"smtp:[127.0.0.1]:{self.smarthost.port}", "virtual_mailbox_domains": ""}
        self.nodes = [mta.Postfix(place / address, {**relay, "smtp_bind_address": address}, master)
                      for address in ("127.0.0.2", "127.0.0.3")]
        self.postfixes = [self.smarthost, *self.nodes]
        self.milters = [mta.Milter(postfix) for postfix in self.postfixes]
        for name, owner in {"etc": "root", "etc/local.d": "root", "etc/override.d": "root", "bin": "root",
                            "db": "_rspamd", "redis": "redis"}.items():
            (place / name).mkdir()
            os.chown(place / name, pwd.getpwnam(owner).pw_uid, grp.getgrnam(owner).gr_gid)
        self.redis = self._redis()
        self.rspamd = self._rspamd()
        self.replaced = {"/etc/rspamd": f"{place}/etc", "192.0.2.0/28": NODES,
                         "127.0.0.1:11332": f"127.0.0.1:{self.rspamd.port}",
                         'servers = "127.0.0.1"': f'servers = "127.0.0.1:{self.redis.port}"'}

    def _redis(self) -> Server:
        """Give Redis with Debian's configuration, elsewhere."""
        port, config = mta.free_port(), self.place / "redis/redis.conf"
        ours = {"port": port, "dir": config.parent, "pidfile": '""', "logfile": '""', "daemonize": "no"}
        text = pathlib.Path("/etc/redis/redis.conf").read_text()
        for name, value in ours.items():
            text = re.sub(rf"^{name} .*", f"{name} {value}", text, flags=re.M)
        config.write_text(text)
        os.chown(config, pwd.getpwnam("redis").pw_uid, -1)  # who rewrites it
        return Server("redis", ["/usr/bin/redis-server", str(config)], port, self.place / "redis.log")

    def _rspamd(self) -> Server:
        """Give rspamd with Debian's configuration, local.d and override.d elsewhere, and write the tools."""
        port, place = mta.free_port(), self.place
        variables = [f"--var={name}={place}/{directory}" for name, directory in
                     (("LOCAL_CONFDIR", "etc"), ("DBDIR", "db"), ("RUNDIR", "db"), ("LOGDIR", "db"))]
        (place / "domains").write_text("com\norg\n")
        for name, text in OWN.items():
            (place / "etc/override.d" / name).write_text(text.format(port=port, place=place) + "\n")
        for name, text in TOOLS.items():
            text = text.format(redis_port=self.redis.port, variables=" ".join(variables), place=place)
            (place / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (place / "bin" / name).chmod(0o755)
        command = ["/usr/bin/rspamd", "-f", "-c", "/etc/rspamd/rspamd.conf", *variables]
        return Server("_rspamd", command, port, place / "rspamd.log")

    def start(self) -> None:
        """Start all but rspamd, which the recipe starts once it has its files."""
        self.redis.start()
        for milter in self.milters:
            milter.start(wait=False)
        for postfix in self.postfixes:
            postfix.start()
        for milter in self.milters:
            mta.wait_for(milter.accepts, 20, "the milter's socket")

    def stop(self) -> None:
        """Stop all that runs."""
        with contextlib.ExitStack() as all_of_them:  # whatever one of them says
            for one in self.redis, self.rspamd, *self.milters, *self.postfixes:
                all_of_them.callback(one.stop)

    def restart(self) -> None:
        """Stop and start all that can be, and what has been killed."""
        self.stop()
        self.start()
        self.rspamd.start()

    def run(self, commands: str) -> str:
        """Run commands of the recipe on the smarthost, and what they have systemctl do; give what they print."""
        for old, new in self.replaced.items():
            commands = commands.replace(old, new)
        env = {"PATH": f"{self.place}/bin:{mta.SYSTEM_PATH}", "LC_ALL": "C",
               "MAIL_CONFIG": f"{self.smarthost.directory}/etc"}
        ran = subprocess.run(["bash", "-ec", commands], env=env, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, f"{commands}\n{ran.stdout}{ran.stderr}"
        os.utime(self.smarthost.directory / "etc/main.cf", (0, 0))  # or Postfix lets a new main.cf rest for 2 s
        told = self.place / "systemctl"
        if told.exists():
            assert told.read_text() == "restart rspamd\n"
            told.unlink()
            self.rspamd.stop()
            self.rspamd.start()
        return ran.stdout

    def send(self, user: str, number: int, to: int, *options: str) -> None:
        """Have a user send a message to so many by SMTP on a node, and wait until it has left or waits there."""
        node = self.nodes[number]
        said = mta.run_as(user, mta.smtp(node.port, *recipients(to), *options)).stdout
        queue_id = re.search(r"queued as (\w+)", said)[1]  # the node takes it in any case
        mta.wait_for(lambda: all(m["queue_name"] == "deferred" for m in node.postqueue() if m["queue_id"] == queue_id),
                     what=f"the node to be done with {queue_id}")

    def waiting(self, node: int) -> list[str]:
        """Give why recipients of messages wait in a node's queue, one reason for each."""
        return [to["delay_reason"] for message in self.nodes[node].postqueue() for to in message["recipients"]]

    def counts(self, user: str) -> list[float]:
        """Give a user's counts of the hour and the day, as the recipe shows them; [] where there are none."""
        return [float(line) for line in self.run(self.shown("for key in", user)).split()]

    def wait_counts(self, user: str, *wanted: float) -> None:
        """Wait until a user's counts are these, less what has leaked; rspamd counts a message after it has answered."""
        try:
            mta.wait_for(lambda: self.counts(user) == near(*wanted))
        except AssertionError:
            assert self.counts(user) == near(*wanted)

    def fill(self, user: str) -> None:
        """Have a user send as much as he may in an hour, half of it on each node."""
        for node in 0, 1:
            self.send(user, node, 100)
            assert not self.waiting(node)
        self.wait_counts(user, 200, 200)

    def reset(self, user: str, which: str = "") -> None:
        """Forget a user's counts as the recipe does; or those that a filter of the keys (hour, day) lets through."""
        self.run(self.shown("redis-cli del", user).replace(f"$(keys {user})", f"$(keys {user} {which})"))

    @staticmethod
    def shown(line: str, user: str) -> str:
        """Give the recipe's function that names a user's counts, and the command that begins so."""
        keys, end, rest = recipe(HEADING)[1].partition("\n}\n")
        found, = [command for command in rest.splitlines() if command.startswith(line)]
        assert "bob" in found
        return f"{keys}{end}{found.replace('bob', user)}\n"

    def flush(self) -> None:
        """Try again what waits on the nodes, and wait until it is gone."""
        for node in self.nodes:
            assert node.run("postqueue", "-f").returncode == 0
        mta.wait_for(lambda: not any(node.postqueue() for node in self.nodes), what="the nodes' queues to be empty")


@pytest.fixture(scope="module")
def site(users: types.SimpleNamespace) -> Iterator[Site]:
    """Set up the site once, by the recipe."""
    for program, package in ("rspamd", "rspamd"), ("redis-server", "redis-server"):
        if shutil.which(program, path=mta.SYSTEM_PATH) is None:
            pytest.skip(f"{package} is not installed, or not in this release")
    with tempfile.TemporaryDirectory(prefix="mst-site.") as place:
        os.chmod(place, 0o755)
        site = Site(pathlib.Path(place))
        try:
            site.start()
            site.run(recipe(HEADING)[0])
            yield site
        finally:
            site.stop()


@pytest.fixture
def counted(site: Site) -> Iterator[Site]:
    """Give the site as it is set up, without a count; afterwards nothing waits on a node."""
    for server in site.redis, site.rspamd:
        if not server.accepts():  # a test that failed has left it so
            server.start()
    site.run("redis-cli flushall")
    yield site
    for postfix in site.postfixes:
        postfix.run("postsuper", "-d", "ALL")


def near(*wanted: float) -> object:
    """Give what equals these counts, of which a few have leaked meanwhile: one of the hour's in 18 s."""
    return pytest.approx(wanted, abs=3)


def recipients(number: int) -> list[str]:
    """Give the options of mta.smtp for so many recipients."""
    return [word for n in range(number) for word in ("--to", f"to{n}@example.org")]


def test_a_user_is_refused_at_the_sum_of_all_nodes(counted: Site) -> None:
    """The 451 is the smarthost's: the mail waits on the node, whichever that is; another user's does not."""
    counted.fill("mst-alice")
    for node in 0, 1:
        counted.send("mst-alice", node, 10)
        assert len(counted.waiting(node)) == 10
        assert all('451 4.7.1 Ratelimit "user_hour" exceeded' in reason for reason in counted.waiting(node))
    counted.send("mst-bob", 0, 10)
    assert len(counted.waiting(0)) == 10
    counted.wait_counts("mst-bob", 10, 10)
    counted.wait_counts("mst-alice", 200, 200)  # what was refused does not count
    counted.reset("mst-alice")
    counted.flush()
    counted.wait_counts("mst-alice", 20, 20)


def test_a_count_of_the_day_outlives_those_of_its_hours(counted: Site) -> None:
    """1,000 recipients a day are enough, though no hour has had more than 200."""
    for batch in range(5):
        counted.send("mst-alice", batch % 2, 200)
        counted.wait_counts("mst-alice", 200, 200 * (batch + 1))
        counted.reset("mst-alice", "| head -n 1")
    counted.send("mst-alice", 0, 10)
    assert len(counted.waiting(0)) == 10
    assert all('451 4.7.1 Ratelimit "user_day" exceeded' in reason for reason in counted.waiting(0))


def test_who_also_writes_to_postmaster_is_counted(counted: Site) -> None:
    """As delivered, rspamd would count nothing of such a message."""
    counted.send("mst-alice", 0, 9, "--to", "postmaster@example.org")
    counted.wait_counts("mst-alice", 10, 10)


def test_two_users_with_nearly_the_same_name_are_two(counted: Site) -> None:
    """A name in quotes is read to its end; root is not counted."""
    for user in r'"DOM\x5cJohn Doe"', r'"DOM\x5cJohn Roe"', "root":
        header = f"X-Sender-Process-Info: user={user} program=php"  # as a node of such a user would say
        client = mta.smtp(counted.smarthost.port, "--bind", "127.0.0.2", "--header", header, *recipients(10))
        assert mta.run_as("root", client).returncode == 0
        counted.wait_counts(f"'{user}'", *(() if user == "root" else (10, 10)))


def test_a_header_forged_elsewhere_counts_for_nobody(counted: Site) -> None:
    """The smarthost takes what is no node's with its own milter, and rspamd does not see it."""
    forged = "X-Sender-Process-Info: user=mst-alice program=php"
    options = ["--bind", "127.0.0.9", "--header", forged, "--messages", "5", *recipients(50)]
    assert mta.run_as("mst-bob", mta.smtp(counted.smarthost.port, *options)).returncode == 0
    counted.send("mst-bob", 0, 10, "--header", forged)  # nor on a node, for another than who sent it
    counted.wait_counts("mst-bob", 10, 10)
    assert counted.counts("mst-alice") == []


def test_counts_outlast_a_restart_of_everything(counted: Site) -> None:
    """Redis, killed, has them in its file; what waits on a node goes when they are forgotten."""
    counted.fill("mst-alice")
    counted.send("mst-alice", 0, 10)
    assert len(counted.waiting(0)) == 10
    counted.redis.stop(kill=True)
    counted.restart()
    counted.wait_counts("mst-alice", 200, 200)
    counted.send("mst-alice", 1, 10)
    assert len(counted.waiting(0)) == len(counted.waiting(1)) == 10
    counted.reset("mst-alice")
    counted.flush()


def pass_while_down(counted: Site, server: Server) -> None:
    """Send more than the limit while a server is down: it passes, uncounted; when it is back, so is the limit."""
    counted.fill("mst-alice")
    server.stop()
    counted.send("mst-alice", 0, 50)
    assert not counted.waiting(0)
    server.start()
    counted.wait_counts("mst-alice", 200, 200)


def test_while_redis_is_down_mail_passes_uncounted(counted: Site) -> None:
    """At once, even of who is over the limit; when Redis is back, so is the limit."""
    pass_while_down(counted, counted.redis)
    counted.send("mst-alice", 1, 10)
    assert len(counted.waiting(1)) == 10
    # rspamd uploads its scripts again when Redis says it has none; of two messages at that moment one may not count.
    counted.send("mst-bob", 1, 10)
    counted.wait_counts("mst-bob", 10, 10)


def test_while_rspamd_is_down_mail_passes_uncounted(counted: Site) -> None:
    """The smarthost's default_action=accept."""
    pass_while_down(counted, counted.rspamd)
