# SPDX-License-Identifier: MIT
"""The helper that a milter started as root has: what it may, what it answers, how it ends, and what its end costs."""

from __future__ import annotations

import json
import os
import pathlib
import pwd
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, Iterator, Optional

import psutil
import pytest

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

BOTH = 1 << ms.CAP_SYS_PTRACE | 1 << ms.CAP_DAC_READ_SEARCH
ENDED = "the helper has ended"
OWNER = ms.Owner(1000, "", 4711, 42)


def status(pid: int) -> dict[str, str]:
    """Read /proc/PID/status."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> dict[int, str]:
    """Say what a process has open."""
    return {int(number): os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}


def program(name: str) -> str:
    """Give what a header says of a program here."""
    return name if mta.can_see_others() else "?"


def send_one(milter: mta.Milter) -> str:
    """Pass a message through a connection of mst-alice's; give its header's value."""
    with mta.Clients("mst-alice") as clients:
        return clients.send(milter)[0]


@pytest.fixture(scope="module")
def milter(users: Any) -> Iterator[mta.Milter]:
    """Start a milter as root, for tests that leave its helper alive."""
    with mta.Milter(blocked_mailusers=["mst-bob"]) as started:
        yield started


# --- privilege --------------------------------------------------------------------------------------------------

AMBIENT = ["setpriv", "--reuid=postfix", "--regid=postfix", "--clear-groups",
           "--inh-caps=+sys_ptrace,+dac_read_search", "--ambient-caps=+sys_ptrace,+dac_read_search"]


@pytest.mark.parametrize("prefix", [[], AMBIENT], ids=["as root", "with ambient capabilities"])
def test_no_capability_is_in_the_milter_and_two_are_in_the_helper(prefix: list[str], make_milter: Any,
                                                                  sees_others: None) -> None:
    """The process that faces the mail may nothing; the helper may look at other users' processes."""
    milter = make_milter(prefix=prefix)
    milter.options["cwd"] = "/tmp"
    milter.start()
    user, (helper,) = pwd.getpwnam("postfix"), milter.helper_pids()
    for pid, capabilities in (milter.pid, 0), (helper, BOTH):
        found = status(pid)
        assert found["Uid"].split() == [str(user.pw_uid)] * 4
        assert found["Gid"].split() == [str(user.pw_gid)] * 4
        assert found["Groups"] == ""
        assert [int(found["Cap" + name], 16) for name in ("Prm", "Eff", "Inh", "Amb")] == [capabilities] * 2 + [0, 0]
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert status(helper)["NoNewPrivs"] == "1"


@pytest.mark.parametrize("redirection", ["7</etc/passwd 8</etc", "<&- >&-", "<&- >&- 2>&-"])
def test_the_helper_has_its_channel_and_nothing_that_was_left_open(redirection: str, make_milter: Any,
                                                                   sees_others: None) -> None:
    """What the caller left open is closed; what it closed is not mistaken for the channel."""
    milter = make_milter()
    milter.command = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *milter.command]
    milter.start()
    (helper,) = milter.helper_pids()
    opened = descriptors(helper)
    assert [opened.pop(number) for number in (0, 1)] == ["/dev/null"] * 2
    assert opened.pop(2) in (f"{milter.directory}/milter.log", "/dev/null")
    mounts = [name for name in opened.values() if not re.fullmatch(r"socket:\[\d+\]", name)]
    assert mounts == [str(root) for root in [mta.cgroup_v2()] if root] and len(opened) == len(mounts) + 1
    assert milter.wait_lines("listening") if "2>&-" not in redirection else True
    assert not milter.lines(ENDED)


# --- questions --------------------------------------------------------------------------------------------------

class Helper:
    """The real helper, its milter's end of the channel in our hands."""

    def __init__(self) -> None:
        before = set(psutil.Process().children())
        self.channel = ms.fork_helper(pwd.getpwnam("postfix"))
        self.channel.settimeout(20)
        (self.process,) = set(psutil.Process().children()) - before

    def ask(self, number: int, uid: int, inode: int, cgroup: int = 0) -> dict[str, Any]:
        """Ask, and read the next answer."""
        self.channel.send(ms.QUESTION.pack(number, uid, inode, cgroup))
        return json.loads(self.channel.recv(65536))

    def works(self, number: int) -> bool:
        """Say whether it still answers, about a socket that this process has; on a crowded machine it may be busy."""
        def answer() -> Optional[dict[str, Any]]:
            found = self.ask(number, 4711, os.fstat(self.channel.fileno()).st_ino)  # a uid of no process
            assert found.pop("number") == number
            return None if found.get("why") == "busy" else found
        found = mta.wait_for(answer, 20, "the helper to have time")
        return found.get("pid") == os.getpid() if mta.can_see_others() else found == {"why": "not-permitted"}


@pytest.fixture
def helper(root: None) -> Iterator[Helper]:
    """Start a helper; it must end when the channel is closed."""
    helper = Helper()
    yield helper
    helper.channel.close()
    helper.process.wait(20)


def test_a_question_has_one_size(helper: Helper) -> None:
    """Anything shorter or longer gets no answer, and the next question gets its own."""
    for size in 1, 7, ms.QUESTION.size - 1, ms.QUESTION.size + 1, 2 * ms.QUESTION.size, 60000:
        helper.channel.send(b"\xff" * size)
    assert helper.works(1)


@pytest.mark.parametrize("numbers", [
    (0, 0, 0), (0, 2 ** 32 - 1, 2 ** 64 - 1, 2 ** 64 - 1), (2 ** 64 - 1, 65534, 1, 1), (3, 1000, 2 ** 63, 2 ** 63)])
def test_numbers_of_nothing_find_nothing(helper: Helper, numbers: tuple[int, ...]) -> None:
    """The answer repeats the number, and says that there is nothing, or that it may not look."""
    answer = helper.ask(*numbers)
    assert answer == {"number": numbers[0], "why": answer["why"]}
    assert answer["why"] in ("not-found", "busy") if mta.can_see_others() else ("not-found", "not-permitted", "busy")
    assert helper.works(7)


def test_descriptors_that_come_with_a_question_are_not_taken(helper: Helper, sees_others: None) -> None:
    """SCM_RIGHTS gives the helper nothing."""
    assert helper.works(0)  # it has opened what it needs
    before = descriptors(helper.process.pid)
    socket.send_fds(helper.channel, [ms.QUESTION.pack(1, 0, 1, 0)], [0, 1, 2])
    assert json.loads(helper.channel.recv(65536))["number"] == 1
    assert descriptors(helper.process.pid) == before


def test_a_flood_of_questions_whose_answers_nobody_reads_is_survived(helper: Helper) -> None:
    """Answers that have no room are dropped, and it goes on."""
    question = ms.QUESTION.pack(1, 4711, os.fstat(helper.channel.fileno()).st_ino, 0)  # of no user: found in ours
    for _ in range(700):  # the two queues have room for some 280 each
        helper.channel.send(question)
    helper.channel.settimeout(0)
    try:
        while True:
            helper.channel.recv(65536)
    except BlockingIOError:
        helper.channel.settimeout(20)
    helper.channel.send(ms.QUESTION.pack(2, 4711, 0, 0))
    while json.loads(helper.channel.recv(65536))["number"] != 2:
        pass
    assert helper.works(3)


# --- its end ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stopped", [False, True], ids=["", "while it is stopped"])
@pytest.mark.parametrize("how", ["TERM", "KILL", "SEGV"])
def test_the_helper_ends_with_the_milter(how: str, stopped: bool, make_milter: Any) -> None:
    """However the milter ends, no process with a capability is left."""
    milter = make_milter().start()
    (helper,) = milter.helper_pids()
    if stopped:
        os.kill(helper, signal.SIGSTOP)
    milter.process.send_signal(getattr(signal, "SIG" + how))
    mta.wait_for(lambda: milter.process.poll() is not None or milter.accepts() and None, 20, "the milter's end")
    mta.wait_for(lambda: mta.ended(helper), 20, "the helper's end")
    assert milter.process.returncode == (0 if how == "TERM" else -getattr(signal, "SIG" + how))


@pytest.mark.parametrize("how", ["TERM", "INT", "HUP"])
def test_a_signal_to_the_group_does_not_end_the_helper_before_the_milter(how: str, milter: mta.Milter) -> None:
    """Service managers and terminals signal all processes; the milter alone decides."""
    (helper,) = milter.helper_pids()
    os.kill(helper, getattr(signal, "SIG" + how))
    assert send_one(milter) == f"user=mst-alice program={program('python3')}"
    assert milter.helper_pids() == [helper]


def test_without_the_helper_users_are_still_named_and_blocked(make_milter: Any, users: Any) -> None:
    """One clear error; questions under way are settled at once; programs are unknown and say why."""
    milter = make_milter(blocked_mailusers=["mst-bob"], lsof_command=[]).start()
    (helper,) = milter.helper_pids()
    os.kill(helper, signal.SIGSTOP)
    with mta.Clients("mst-alice", 3) as alice, mta.Clients("mst-alice") as later, mta.Clients("mst-bob", 2) as bob:
        wires = list(alice.wires(milter))
        os.kill(helper, signal.SIGKILL)
        milter.wait_lines(ENDED)
        assert [mta.outcome(wire) for wire in wires] == ["user=mst-alice program=?"] * 3
        assert later.send(milter) == ["user=mst-alice program=?"]
        assert bob.send(milter) == ["550 5.7.1 User mst-bob is blocked from sending mail"] * 2
    assert len(milter.wait_lines("lookup=no-helper", 6)) == 6
    assert [" ERROR " in line for line in milter.lines() if " INFO " not in line and " WARNING " not in line] == [True]
    assert "programs stay unknown; restart the milter" in milter.lines(ENDED)[0]


def test_a_stopped_helper_is_waited_for_once(milter: mta.Milter) -> None:
    """A connection waits 0.3 s at most; after a timeout nobody waits; late answers describe nobody."""
    (helper,) = milter.helper_pids()
    waited = len(milter.lines("lookup=timeout"))
    with mta.Clients("mst-alice", 100) as alice, mta.Clients("mst-bob") as bob:
        os.kill(helper, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert alice.send(milter) == ["user=mst-alice program=?"] * 100
            assert bob.send(milter) == ["550 5.7.1 User mst-bob is blocked from sending mail"]
            assert time.monotonic() - began < 100 * ms.HELPER_SECONDS / 2
            assert len(milter.wait_lines("lookup=timeout", waited + 101)) == waited + 101
        finally:
            os.kill(helper, signal.SIGCONT)
    mta.wait_for(lambda: send_one(milter) == f"user=mst-alice program={program('python3')}", 20, "the helper's answer")
    assert not milter.lines(ENDED)


# --- answers ----------------------------------------------------------------------------------------------------

class Fake:
    """A describer whose helper is this test."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far.settimeout(20)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # else it is the host's, which may be any size
        self.describer = ms.Describer(near, False, ms.Workers(1, 1))

    def asked(self) -> int:
        """Read a question; give its number."""
        return ms.QUESTION.unpack(self.far.recv(100))[0]

    def answer(self, number: Any, **facts: Any) -> None:
        """Answer a question."""
        self.far.send(json.dumps({"number": number, **facts}).encode())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Give a describer without a helper; its complaints stay out of the output."""
    monkeypatch.setattr(ms, "complain", ms.Complaints())
    fake = Fake()
    yield fake
    fake.far.close()
    mta.wait_for(lambda: fake.describer.channel is None, what="the reader's end")


def test_answers_to_connections_that_are_idle_do_not_fill_the_channel(fake: Fake) -> None:
    """Who does not go on with a message fetches nothing."""
    questions = []
    for _ in range(3000):
        questions.append(fake.describer.ask(OWNER))
        fake.far.send(json.dumps({"number": fake.asked(), "program": "p"}).encode(), socket.MSG_DONTWAIT)
    assert fake.describer.wait(questions[0]) == fake.describer.wait(questions[-1]) == {"program": "p"}


def test_a_question_long_unanswered_keeps_nobody_from_waiting(fake: Fake) -> None:
    """Its connection goes on sending messages."""
    never = fake.describer.ask(OWNER)._replace(deadline=time.monotonic())
    fake.asked()
    question = fake.describer.ask(OWNER)._replace(deadline=time.monotonic() + 60)
    assert fake.describer.wait(never) == {"why": "timeout"}
    threading.Timer(0.1, fake.answer, [fake.asked()], {"program": "right"}).start()
    assert fake.describer.wait(question) == {"program": "right"}


def test_answers_go_to_the_question_whose_number_they_repeat(fake: Fake) -> None:
    """In whatever order they come."""
    questions = [fake.describer.ask(OWNER) for _ in range(5)]
    numbers = [fake.asked() for _ in questions]
    assert len(set(numbers)) == 5
    for number in reversed(numbers):
        fake.answer(number, program=f"p{number}")
    assert [fake.describer.wait(question)["program"] for question in questions] == [f"p{n}" for n in numbers]


def test_lsof_is_not_run_for_whom_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that have ended hold nobody up; one that is still there has its answer for a later message."""
    asked, go_on = [], threading.Event()
    monkeypatch.setattr(ms, "ask_lsof", lambda owner: asked.append(owner.inode) or go_on.wait(60) and {"program": "p"})
    monkeypatch.setattr(ms, "LSOF_SECONDS", 0.1)
    describer = ms.Describer(None, True, ms.Workers(1, 10))
    first, late, ended = (describer.ask(OWNER._replace(inode=inode)) for inode in (1, 2, 3))
    assert describer.wait(late) == {"why": "timeout"}
    monkeypatch.setattr(ms, "LSOF_SECONDS", 60)
    last = describer.ask(OWNER._replace(inode=4))
    describer.forget(ended)
    go_on.set()
    assert describer.wait(last) == describer.wait(first) == describer.wait(late) == {"program": "p"}
    assert asked == [1, 2, 4]


def test_a_late_answer_describes_nobody(fake: Fake) -> None:
    """The connection that gave up stays unknown; the next gets its own answer only."""
    first = fake.describer.ask(OWNER)
    assert fake.describer.wait(first) == {"why": "timeout"}
    second = fake.describer.ask(OWNER)._replace(deadline=time.monotonic() + 60)
    assert fake.describer.wait(second) == {"why": "timeout"}
    assert time.monotonic() < second.deadline - 30, "waited for, although the first was late"
    fake.describer.forget(first)
    fake.describer.forget(second)
    third = fake.describer.ask(OWNER)._replace(deadline=time.monotonic() + 60)
    late, later, number = (fake.asked() for _ in range(3))
    fake.answer(late, program="late")
    fake.answer(later, program="later")
    threading.Timer(0.1, fake.answer, [number], {"program": "right"}).start()
    assert fake.describer.wait(third) == {"program": "right"}, "not waited for, although the helper answers again"
    fake.answer(number, program="twice")
    fourth = fake.describer.ask(OWNER)
    fake.answer(fake.asked(), program="fourth")
    assert fake.describer.wait(fourth) == {"program": "fourth"}


@pytest.mark.parametrize("nonsense", [
    b"nonsense", b"\xff\xfe\x00", b"{", b"null", b"[]", b"4711", b'"number"', b"{}", b'{"number": null}',
    b'{"number": []}', b'{"number": "1"}', b'{"number": 4711, "program": "wrong"}', b'{"number": -1}',
    b'{"number": 1e400}', b'{"number": 1, "program": "wrong", "holders": ["root"]}', b"[" * 20000,
    b'{"number": 1, "program": "wrong", "holders": [-1]}', b'{"number": 1, "program": "wrong", "holders": 0}',
    b'{"number": 1, "program": "wrong", "holders": [4294967296]}', b'{"number":' + b"9" * 5000 + b"}"])
def test_nonsense_is_no_answer(fake: Fake, nonsense: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It describes nothing, and the answer that follows still does."""
    question = fake.describer.ask(OWNER)
    number = fake.asked()
    assert number == 1
    fake.far.send(nonsense)
    fake.answer(number, program="right")
    assert fake.describer.wait(question) == {"program": "right"}


@pytest.mark.parametrize("nonsense", [b"nonsense", b'{"number": 4711}'])
def test_nonsense_without_end_is_not_listened_to_for_ever(fake: Fake, nonsense: bytes) -> None:
    """A connection's deadline holds, however fast it comes."""
    class Mad:  # a channel that is never empty, as no process could fill it
        ended = threading.Event()

        def recv(self, size: int, flags: int) -> bytes:
            return b"" if self.ended.is_set() else nonsense
    describer, question = fake.describer, fake.describer.ask(OWNER)
    real, describer.channel = describer.channel, Mad()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(describer.wait(question)))
    waiting.start()
    waiting.join(30)
    Mad.ended.set()
    waiting.join()
    describer.channel = real
    assert found == [{"why": "timeout"}]
    assert time.monotonic() < question.deadline + 29, "listened to until it ended"


def test_what_a_nonsense_answer_says_of_the_user_is_not_used() -> None:
    """User and uid are the kernel's, whatever the helper says."""
    sender = ms.Sender(ms.Person(1000, "alice", 1000, True), 1000, {"user": "root", "uid": 0, "program": "p"}, "", ())
    assert ms.sender_values(sender, ["user", "uid", "program", "pid"]) == [
        ("user", "alice"), ("uid", 1000), ("program", "p"), ("pid", None)]


def test_a_helper_that_takes_no_questions_costs_nothing(fake: Fake) -> None:
    """When the channel is full, questions fail at once, and nothing is kept of them."""
    questions = [fake.describer.ask(OWNER) for _ in range(3000)]
    reasons = [fake.describer.wait(question)["why"] for question in questions]
    assert set(reasons) == {"timeout", "busy"} and reasons.count("busy") > 1000
    for question in questions:
        fake.describer.forget(question)
    assert not fake.describer.answers


def test_the_helpers_end_settles_every_question(fake: Fake) -> None:
    """Those under way, those that found the channel full, and those that come after."""
    questions = [fake.describer.ask(OWNER) for _ in range(3000)]
    fake.far.close()
    mta.wait_for(lambda: [] not in fake.describer.answers.values(), what="all to be settled")
    questions.append(fake.describer.ask(OWNER))
    assert {fake.describer.wait(question)["why"] for question in questions} == {"busy", "no-helper"}
    assert fake.describer.wait(questions[-1]) == {"why": "no-helper"}


def test_no_helper_is_asked_about_a_socket_that_nobody_has(fake: Fake) -> None:
    """An orphan's inode is 0, which other orphans share."""
    assert fake.describer.wait(fake.describer.ask(OWNER._replace(inode=0))) == {"why": "gone"}
    fake.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        fake.asked()
