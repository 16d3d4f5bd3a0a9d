# SPDX-License-Identifier: MIT
"""Whatever a client floods the milter with, no other session waits for it, and nobody who is blocked gets by."""

from __future__ import annotations

import json
import select
import time
import types
from typing import Any, Iterator

import pytest

import mta

REFUSAL = "550 5.7.1 User mst-bob is blocked from sending mail"
# One process of a blocked user: a flood of a kind, and other sessions of his that time their answers meanwhile.
FLOOD = r'''
import json, random, select, socket, sys, time
port, kind, sessions, size, rounds = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
MAIL, RCPT, HELLO = b"MAIL FROM:<bob@example.org>\r\n", b"RCPT TO:<to@example.org>\r\n", b"EHLO me\r\n"

class Session:
    def __init__(self):
        self.sock, self.got, self.connected = socket.socket(), b"", False
        self.sock.settimeout(60)

    def connect(self):
        self.connected = True
        self.sock.connect(("127.0.0.1", port))

    def reply(self):
        """Read one reply, give its last line."""
        while True:
            line, end, rest = self.got.partition(b"\r\n")
            if not end:
                part = self.sock.recv(65536)
                if not part:
                    return "closed"
                self.got += part
                continue
            self.got = rest
            if line[3:4] != b"-":
                return line.decode()

    def say(self, *commands):
        for command in commands:
            self.sock.sendall(command)
            self.reply()
        return self

    def hello(self):
        self.connect()
        self.reply()
        return self.say(HELLO)

    def message(self, content):
        """Bring a message as far as its last line."""
        self.hello().say(MAIL, RCPT, b"DATA\r\n").sock.sendall(content)
        return self

def flooders():
    """Bring sessions to where the flood begins; give what each says then, and how often, one answer for each."""
    if kind == "beginnings":
        return [(Session(), HELLO, 1) for _ in range(sessions)]
    if kind == "headers":
        return [(Session().message(b"a:\r\n" * size + b"\r\nbody\r\n"), b".\r\n", 1) for _ in range(sessions)]
    if kind == "body":
        return [(Session().message(b"\r\n" + (b"x" * 900 + b"\r\n") * size), b".\r\n", 1) for _ in range(sessions)]
    made = [Session().hello() for _ in range(sessions)]
    if kind == "recipients":
        return [(session.say(MAIL), RCPT * size, 1) for session in made]
    if kind in ("cut", "unknown"):  # Postfix writes what fills its buffer, up to within a command; nothing follows
        command, before = (RCPT, 30) if kind == "cut" else (b"XX\r\n", 670)
        for session in made:
            session.say(MAIL).sock.sendall(command * before)
            for _ in range(before):
                session.reply()
        return [(session, command * 30, 1) for session in made]
    command = {"ends": b"QUIT\r\n", "noop": b"NOOP\r\n", "ehlo": HELLO, "rset": (MAIL + b"RSET\r\n") * size}[kind]
    return [(session, command, size if kind in ("noop", "ehlo") else 1) for session in made]

def other_sessions():
    """Bring other sessions to where each will wait; give when that is, in s from the flood's beginning, and for what."""
    made = []
    for _ in range(4):
        made.append(("MAIL", Session().hello(), MAIL))
        made.append(("end", Session().message(b"X-Sender-Process-Info: user=root\r\n\r\nbody\r\n"), b".\r\n"))
        made.append(("greeting", Session(), b""))
    at = sorted(random.choice((0.0, 0.004, random.random() / 50)) for _ in made)
    return [(when, *one) for when, one in zip(at, random.sample(made, len(made)))]

class Round:
    def __init__(self):
        self.others = other_sessions()
        self.poll, self.waiting, self.floods = select.poll(), {}, {}
        self.waits, self.refusals = {"MAIL": 0.0, "end": 0.0, "greeting": 0.0}, []
        for session, text, times in flooders():
            self.floods[session.sock.fileno()] = [session, text, text, times]

    def run(self):
        began = time.monotonic()
        for number, (session, *_) in self.floods.items():
            session.sock.setblocking(False)
            if not session.connected:
                session.sock.connect_ex(("127.0.0.1", port))
            self.poll.register(number, select.POLLIN | select.POLLOUT)
        while self.others or self.waiting or time.monotonic() < began + 0.3:
            while self.others and time.monotonic() >= began + self.others[0][0]:
                self.begin_to_wait(*self.others.pop(0)[1:])
            for number, events in self.poll.poll(1 if self.others else 20):
                if number in self.waiting:
                    self.answered(number)
                else:
                    self.flood(number, events)
        for session, *_ in self.floods.values():
            session.sock.close()
        return {**self.waits, "replies": self.refusals}

    def begin_to_wait(self, what, session, text):
        if not session.connected:
            session.connect()
        session.sock.sendall(text)
        self.waiting[session.sock.fileno()] = what, session, time.monotonic()
        self.poll.register(session.sock, select.POLLIN)

    def answered(self, number):
        what, session, then = self.waiting.pop(number)
        self.poll.unregister(number)
        self.waits[what] = max(self.waits[what], time.monotonic() - then)
        if what == "end":
            self.refusals.append(session.reply())
        session.sock.close()

    def flood(self, number, events):
        session, left, text, times = self.floods[number]
        try:
            if events & ~select.POLLOUT:
                if not session.sock.recv(1 << 20):
                    raise ConnectionError
                if not left and times > 1:
                    left, times = text, times - 1
            if left:
                left = left[session.sock.send(left[:65536]):]
        except BlockingIOError:
            pass
        except OSError:
            self.poll.unregister(number)
            return
        self.floods[number][1:] = left, text, times
        self.poll.modify(number, select.POLLIN | (select.POLLOUT if left else 0))

for _ in range(rounds):
    print(json.dumps(Round().run()), flush=True)
'''


@pytest.fixture(scope="module")
def mail(users: types.SimpleNamespace) -> Iterator[types.SimpleNamespace]:
    """Start a Postfix as the README has it, but for limits that would end a flood, and a milter that blocks mst-bob."""
    limits = {"smtpd_recipient_limit": "60000", "smtpd_junk_command_limit": "1000000",
              "smtpd_forbid_unauth_pipelining": "yes", "message_size_limit": "20000000"}
    with mta.Postfix(main_cf=limits, discard=True) as postfix, mta.Milter(
            postfix, blocked_mailusers=["mst-bob"], unidentified_action="quarantine") as milter:
        yield types.SimpleNamespace(postfix=postfix, milter=milter)


def flood(mail: types.SimpleNamespace, kind: str, sessions: int, size: int, rounds: int, most: float) -> None:
    """Have mst-bob flood that often; his other sessions wait that many seconds at most, and their mail is refused."""
    arguments = map(str, (mail.postfix.port, kind, sessions, size, rounds))
    ran = mta.run_as("mst-bob", [mta.PYTHON, "-c", FLOOD, *arguments], timeout=1200)
    assert ran.returncode == 0, ran.stderr
    seen: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines()]
    worst = max(seen, key=lambda one: max(one["MAIL"], one["end"], one["greeting"]))
    assert len(seen) == rounds
    assert max(worst["MAIL"], worst["end"], worst["greeting"]) <= most, worst
    assert {reply for one in seen for reply in one["replies"]} == {REFUSAL}
    assert "SMFIC" not in mail.postfix.log()  # "can't read SMFIC_MAIL reply packet header", and the message passes


@pytest.mark.parametrize("kind, sessions, size, rounds, in_long", [
    ("headers", 5, 60000, 12, 100), ("recipients", 5, 50000, 3, 20), ("body", 5, 10000, 2, 20), ("noop", 5, 5000, 2, 20),
    ("ehlo", 5, 5000, 2, 20), ("rset", 5, 2000, 2, 20), ("ends", 100, 0, 1, 10), ("beginnings", 100, 0, 2, 20),
    ("cut", 16, 0, 8, 100), ("cut", 90, 0, 1, 20), ("unknown", 16, 0, 4, 20)])
def test_no_session_waits_for_a_flood(kind: str, sessions: int, size: int, rounds: int, in_long: int,
                                      mail: types.SimpleNamespace, long: bool) -> None:
    """Neither for a greeting, nor for the answer to MAIL, nor for the end of its message."""
    flood(mail, kind, sessions, size, in_long if long else rounds, 0.5)


def test_no_session_waits_for_a_great_flood(mail: types.SimpleNamespace, long: bool) -> None:
    """Twelve messages with 480,000 headers each, for which others once waited until the milter was given up."""
    flood(mail, "headers", 12, *(480000, 20) if long else (60000, 1), 3)


def test_no_session_waits_for_others_whose_lookups_take_long(users: types.SimpleNamespace) -> None:
    """Where libmilter gives it to a thread that waits for lsof, another thread takes it."""
    with mta.Milter(user="postfix", lsof_command=["/bin/sh", "-c", "exec sleep 1.5"]) as milter:
        for _ in range(2):
            with mta.Clients("mst-alice", 30) as clients:
                slow, quick = list(clients.wires(milter)), [mta.Wire(milter.socketname) for _ in range(6)]
                for wire in slow:
                    wire.helo(), wire.mail()
                began = time.monotonic()
                for n, wire in enumerate(slow):
                    wire.send("R", wire.strings("<to@example.org>"))
                    if n % 5 == 0:
                        quick[n // 5].send("H", wire.strings("me"))
                waiting = [wire.sock for wire in quick]
                while waiting:
                    for sock in select.select(waiting, [], [], 10)[0]:
                        waiting.remove(sock)
                assert time.monotonic() - began <= 0.5
                for wire in slow + quick:
                    wire.sock.close()


def test_a_message_of_too_many_headers_is_refused_and_logged_and_the_next_one_is_not(mail: types.SimpleNamespace) -> None:
    """Of the same connection; the line has the queue id and the user, as any other."""
    code = ("import smtplib, sys; client = smtplib.SMTP('127.0.0.1', int(sys.argv[1]))\n"
            "for count in 1200, 900, 1200, 900:\n"
            "    try: print(client.sendmail('a@example.org', 'b@example.org', 'X: y\\r\\n' * count + '\\r\\nbody\\r\\n'))\n"
            "    except smtplib.SMTPDataError as refusal: print(refusal.smtp_code, refusal.smtp_error.decode())")
    ran = mta.run_as("mst-alice", [mta.PYTHON, "-c", code, str(mail.postfix.port)])
    assert ran.stdout.splitlines() == ["550 5.7.1 More than 1000 headers", "{}"] * 2, ran.stderr
    lines = [line.split(maxsplit=3)[3] for line in mail.milter.wait_lines("user=mst-alice", 4)]
    assert [line.rpartition(" action=")[2] for line in lines] == ["reject reason=headers", "tag"] * 2
    assert all(len(line.partition(":")[0]) > 9 and " rcpts=1 " in line for line in lines), lines
