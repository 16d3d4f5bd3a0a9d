"""Fixtures: two users, one shared Postfix with the milter behind it, and factories for tests that need their own."""

from __future__ import annotations

import fcntl
import os
import pathlib
import pwd
import shutil
import signal
import tempfile
import types
from typing import Any, Callable, Iterator, Mapping, Optional

import pytest

import mta

USERS = "mst-alice", "mst-bob"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --long; a test sees it as the fixture `long`."""
    parser.addoption("--long", action="store_true", help="the loads and faults at full size")


def pytest_configure(config: pytest.Config) -> None:
    """Leave a chroot, and clean up on TERM as on an interrupt."""
    mta.leave_chroot()
    # Tests fork the helper from pytest, which has threads; the script forks it before it has any (Python 3.12).
    config.addinivalue_line("filterwarnings", "ignore:This process .* is multi-threaded:DeprecationWarning")
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Say whether the loads and faults are to run at full size."""
    return request.config.getoption("--long")


@pytest.fixture(scope="session")
def root() -> None:
    """Skip tests that need root where it is not there."""
    if os.geteuid() != 0:
        pytest.skip("not root")


@pytest.fixture(scope="session", autouse=True)
def quiet_sudo() -> Iterator[None]:
    """Keep sudo from mailing the system's root about the refusals that tests provoke, and from waiting for the DNS."""
    rule = pathlib.Path("/etc/sudoers.d/mst-quiet")
    if not os.access(rule.parent, os.W_OK):
        yield
        return
    rule.touch(0o440)
    rule.write_text("Defaults !mail_no_user, !mail_no_perms, !mail_no_host, !mail_badpass, !fqdn\n")
    try:
        yield
    finally:
        rule.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def users(root: None) -> Iterator[types.SimpleNamespace]:
    """Make the users mst-alice and mst-bob: .alice and .bob, as the passwd database has them."""
    system = os.open("/etc", os.O_RDONLY)  # whose users they are, and which is there before and after
    try:
        fcntl.flock(system, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pytest.exit("these tests are running already, and share their users", returncode=1)
    try:
        yield types.SimpleNamespace(**{name[4:]: mta.add_user(name) for name in USERS})
    finally:
        for name in USERS:
            mta.remove_user(name)
        os.close(system)


@pytest.fixture(scope="session")
def sees_others() -> None:
    """Skip tests that show the program of another user where the kernel does not let root see it."""
    if missing := mta.missing_capabilities():
        pytest.skip(f"no {' and no '.join(missing)}: other users' processes cannot be seen")


@pytest.fixture(scope="session")
def proc_shown(root: None) -> None:
    """Skip tests of a milter that is not started as root where /proc shows it no process of others."""
    if mta.run_as("postfix", ["test", "-d", "/proc/1"]).returncode:
        pytest.skip("/proc is mounted with hidepid: only root sees others' processes")


@pytest.fixture(scope="session")
def sudo_works(proc_shown: None) -> None:
    """Skip tests that need sudo and lsof where they are of no use."""
    if shutil.which("sudo") is None or not os.path.exists("/usr/bin/lsof"):
        pytest.skip("sudo or lsof is not installed")
    if "NoNewPrivs:\t1" in pathlib.Path("/proc/self/status").read_text():
        pytest.skip("no_new_privs: sudo does not work here")


@pytest.fixture
def container(root: None) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Give the options of a milter in an unprivileged container with that many uids, which are the host's from 100000."""
    with tempfile.TemporaryDirectory(prefix="milter-test.") as name:
        os.chmod(name, 0o755)
        os.chown(name, 100000 + pwd.getpwnam("postfix").pw_uid, -1)

        def options(uids: int) -> dict[str, Any]:
            prefix = mta.user_namespace(uids)
            if prefix is None:
                pytest.skip("no user namespace with a map of uids can be made here")
            return {"prefix": prefix, "socketname": f"{name}/milter.sock"}
        yield options


@pytest.fixture(scope="session")
def ipv6() -> None:
    """Skip tests that dial ::1 where there is no IPv6."""
    if not mta.has_ipv6():
        pytest.skip("no IPv6 here")


@pytest.fixture(params=["ip", "ip6"])
def family(request: pytest.FixtureRequest) -> str:
    """Say which address family, as nftables calls it."""
    if request.param == "ip6" and not mta.has_ipv6():
        pytest.skip("no IPv6 here")
    return request.param


@pytest.fixture(scope="session")
def shared_mail(root: None) -> Iterator[types.SimpleNamespace]:
    """Start the Postfix (.postfix) and milter (.milter) that tests with default settings share."""
    with mta.Postfix() as postfix, mta.Milter(postfix) as milter:
        yield types.SimpleNamespace(postfix=postfix, milter=milter)


@pytest.fixture
def mail(shared_mail: types.SimpleNamespace) -> Iterator[types.SimpleNamespace]:
    """Give the shared Postfix and milter, with an empty mailbox; afterwards no traceback may be in the log."""
    shared_mail.postfix.forget_messages()
    tracebacks = shared_mail.milter.log().count("Traceback")
    yield shared_mail
    assert shared_mail.milter.log().count("Traceback") == tracebacks, shared_mail.milter.log()


@pytest.fixture
def make_mail(root: None) -> Iterator[Callable[..., types.SimpleNamespace]]:
    """Start a Postfix and milter of the test's own: make_mail({options of Postfix}, options of Milter and settings)."""
    running: list = []

    def make(postfix: Optional[Mapping[str, Any]] = None, **milter: Any) -> types.SimpleNamespace:
        running.append(mta.Postfix(**postfix or {}))
        running.append(mta.Milter(running[-1], **milter).start())
        return types.SimpleNamespace(postfix=running[-2].start(), milter=running[-1])

    yield make
    for one in reversed(running):
        one.stop()


@pytest.fixture
def make_milter(root: None) -> Iterator[Callable[..., mta.Milter]]:
    """Give a milter without a Postfix, for the wire protocol: make_milter(options and settings), not started."""
    made: list[mta.Milter] = []

    def make(at: Any = None, **options: Any) -> mta.Milter:
        made.append(mta.Milter(at, **options))
        return made[-1]

    yield make
    for milter in made:
        milter.stop()
