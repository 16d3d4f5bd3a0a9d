# SPDX-License-Identifier: MIT
"""The README's recipes: each is run as it stands there, on a Postfix of its own, and does what it says."""

from __future__ import annotations

import ast
import collections
import os
import pathlib
import random
import re
import shutil
import subprocess
import tempfile
import types
from typing import Any, Callable, Iterator, NamedTuple, Optional

import pytest

import mta
from mta import recipe

HEADER = "X-Sender-Process-Info"
# Stands in for journald: the milter's log, less the levels that journald takes off.
JOURNALCTL = r"""#!/bin/sh
case "$*" in
    "-u milter_sysuser -o cat" | "-u milter_sysuser -o cat --since today" | "-u milter_sysuser -o cat --since yesterday" | \
    "-u milter_sysuser -o cat --since 1 hour ago") exec sed 's/^<[0-9]>//' "$MILTER_LOG" ;;
    "-t postfix/pickup -o cat --since yesterday") exec sed -n 's,.* postfix/pickup[^:]*: ,,p' "$MAIL_CONFIG/../maillog" ;;
    "-u milter_sysuser -p warning -q -o cat --since 1 hour ago") exec sed -n 's/^<[0-4]>//p' "$MILTER_LOG" ;;
    *) echo "journalctl $*: what is that?" >&2; exit 2 ;;
esac
"""


def setting(heading: str) -> dict[str, Any]:
    """Give the settings that a recipe's only block assigns."""
    block, = recipe(heading)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(block).body}


@pytest.fixture
def administrator(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Run commands of the README on a mail system: what names its own things in them is replaced."""
    shim = tmp_path / "journalctl"
    shim.write_text(JOURNALCTL)
    shim.chmod(0o755)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/told\n')
    systemctl.chmod(0o755)

    def run(mail: types.SimpleNamespace, commands: str, **names: str) -> str:
        for old, new in names.items():
            old = {"blocked": "/etc/milter_sysuser.blocked", "conf": "/etc/milter_sysuser.conf",
                   "queue_id": "4Zb9Xk1c2Tz3", "nodes": "192.0.2.0/28", "bob": "bob"}[old]
            assert old in commands, f"{old} is not in {commands}"
            commands = commands.replace(old, new)
        env = {"PATH": f"{tmp_path}:{mta.SYSTEM_PATH}", "MAIL_CONFIG": f"{mail.postfix.directory}/etc", "LC_ALL": "C",
               "MILTER_LOG": f"{mail.milter.directory}/milter.log"}
        ran = subprocess.run(["bash", "-o", "pipefail", "-ec", commands], env=env, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, f"{commands}\n{ran.stdout}{ran.stderr}"
        os.utime(mail.postfix.directory / "etc/main.cf", (0, 0))  # or Postfix lets a new main.cf rest for 2 s
        return ran.stdout

    return run


@pytest.fixture
def make_logged(make_mail: Callable) -> Callable[..., types.SimpleNamespace]:
    """Start a Postfix and a milter that logs as it does under journald."""
    return lambda postfix=None, **milter: make_mail(postfix, journal=True, **milter)


def test_every_recipe_is_tested() -> None:
    """There is none in the README that this file or test_site.py does not run."""
    text = mta.README.read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (.*)", text, re.M)
    tests = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    assert headings and not [heading for heading in headings if f'"{heading}"' not in tests]


def test_each_promise_has_the_tests_that_are_said_to_prove_it() -> None:
    """The names in tests/README.md are those of tests, and of files that have some."""
    here = pathlib.Path(__file__).parent
    table = (here / "README.md").read_text().partition("\n## What proves the promises\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 13
    for row in rows:
        for part in row.split(";"):
            file, *names = re.findall("`(.*?)`", part)
            found = re.findall(r"^def test_(\w+)", (here / file).read_text(), re.M)
            assert found and set(names) <= set(found), set(names) - set(found)


def test_what_leaves_waits_in_an_emergency_and_what_a_user_handed_in_before_can_be_found_and_deleted(
        make_mail: Callable, administrator: Callable, submission: None, users: types.SimpleNamespace) -> None:
    """By Postfix's own log of sendmail(1), with no milter there yet; one who writes such a line into an address is not found."""
    with mta.Postfix(main_cf={"smtpd_milters": "", "virtual_mailbox_domains": "example.com"}) as elsewhere:
        main_cf = {"default_transport": f"smtp:[127.0.0.1]:{elsewhere.port}", "disable_dns_lookups": "yes"}
        mail = make_mail({"main_cf": main_cf, "master": ["smtp unix - - n - - smtp"]})
        hold, let_go, count, delete = recipe("A site sends spam now")
        administrator(mail, hold)
        bob = f": uid={users.bob.pw_uid} "
        for user, sender in ("mst-bob", "x@example.org"), ("mst-alice", f'"{bob}"@example.org'):
            assert submit(mail, user, "away@example.com", sender).returncode == 0
        waiting = mta.wait_for(lambda: [message["queue_name"] for message in mail.postfix.postqueue()] == ["deferred"] * 2 and
                               mail.postfix.postqueue(), what="both to wait")
        assert all("deferred transport" in message["recipients"][0]["delay_reason"] for message in waiting)
        found = administrator(mail, count)
        assert sorted(found.split()) == sorted(["1", "1", *(f"uid={user.pw_uid}" for user in (users.bob, users.alice))]), found
        administrator(mail, delete.replace("uid=1007", f"uid={users.bob.pw_uid}"))
        left, = mail.postfix.postqueue()
        assert "uid=" in left["sender"]
        administrator(mail, let_go)
        elsewhere.wait_messages(1)


def test_the_sender_of_a_queue_id_is_found(make_logged: Callable, administrator: Callable, users: types.SimpleNamespace) -> None:
    """One line of the log, of just that message, though others quote its id."""
    mail = make_logged()
    said = mta.run_as("mst-bob", mta.smtp(mail.postfix.port)).stdout
    queue_id = re.search(r"queued as (\w+)", said)[1]
    mta.run_as("mst-alice", mta.smtp(mail.postfix.port, "--mail-from", f"{queue_id}@example.org"))
    mail.milter.wait_lines("action=", 2)
    commands, = recipe("Find who sent a message")
    answer = administrator(mail, commands, queue_id=queue_id)
    assert answer.count("\n") == 1 and answer.startswith(f"{queue_id}: client=") and " user=mst-bob " in answer


def test_a_file_serves_in_the_place_of_the_journal(make_mail: Callable, administrator: Callable,
                                                   users: types.SimpleNamespace) -> None:
    """With the filter from the README its lines begin with the queue id, too; no sender can make one up."""
    mail = make_mail()
    said = mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--mail-from", '" INFO 4FAKE: client="@example.org')).stdout
    queue_id = re.search(r"queued as (\w+)", said)[1]
    mail.milter.wait_lines("action=", 1)
    instead = re.search(r"`(sed [^`]* FILE)` in the place", mta.README.read_text())[1].replace("FILE", '"$MILTER_LOG"')
    commands = recipe("Find who sent a message")[0].replace("journalctl -u milter_sysuser -o cat", instead)
    answer = administrator(mail, commands, queue_id=queue_id)
    assert answer.count("\n") == 1 and answer.startswith(f"{queue_id}: client=") and " user=mst-bob " in answer


# --- recipes that read the log: on the milter's own lines, and on thousands that the tests make ------------------

FIELDS, TOP = "Read the log in a script", "List the top senders, directories and units of the day"
MAIL = "Mail root what needs somebody, and who was refused"
REFUSALS = "reject", "tempfail", "quarantine"


class Line(NamedTuple):
    """One message, as the milter logs it; values as they are, None where they are not known."""

    user: Optional[str]
    uid: Optional[int]
    dir: Optional[str]
    unit: Optional[str]
    sender: str
    rcpts: int
    action: str
    reason: str

    def text(self, number: int) -> str:
        """Write it as the log does."""
        values = {"user": self.user, "uid": self.uid, "program": "php", "pid": 4711, "exe": "/usr/bin/php",
                  "dir": self.dir, "unit": self.unit, "from": self.sender, "rcpts": self.rcpts,
                  "action": self.action, **({"reason": self.reason} if self.reason else {})}
        fields = " ".join(f"{name}={quoted(value)}" for name, value in values.items())
        return f"4Z{number:06X}: client=127.0.0.1:{number % 50000 + 1024} {fields}"


def quoted(value: Any) -> str:
    r"""Write a value as the log does: bare, or in double quotes, where what is not printable, " and \ are \xNN."""
    if value is None:
        return "?"
    if re.fullmatch(r"[A-Za-z0-9._+@/:-]+", str(value)):
        return str(value)
    data = str(value).encode()
    return '"' + "".join(chr(b) if 0x20 <= b < 0x7F and b not in b'"\\' else f"\\x{b:02x}" for b in data) + '"'


def made_log(lines: int = 3000) -> tuple[list[Line], str]:
    """Make up messages of users who would rather be somebody else, and the log that has them and other lines."""
    rng = random.Random(20)
    users = {"alice": 1001, "bob": 1002, r"DOM\John Doe": 1003, r"DOM\John Roe": 1004, "www-data": 33,
             'x" user=alice rcpts=9 action=reject ': 1005, "1006": 1006, "j\u00f6rg": 1007, None: None}
    senders = ["a@example.org", "", "alice user=bob@example.org", '"@example.org', "b\\",
               '" user=alice uid=1001 dir=/ rcpts=9999 action=reject reason=limit "@example.org',
               'x" from=y rcpts=500 action=tempfail\n4ZFAKE: client=127.0.0.1:1 user=alice rcpts=70 action=tag']
    places = ["/", "/home/a b", '/srv/" rcpts=7 action=reject user=alice', None, "/srv/shop7"]
    units = ["php8.2-fpm.service", "session-3.scope", None, "user@1001.service"]
    verdicts = [("tag", ""), ("tag", ""), ("reject", "blocked"), ("tempfail", "limit"), ("quarantine", "limit"),
                ("log", "limit"), ("reject", "forged")]
    made, text = [], ["milter_sysuser 2.0 started", "WARNING: user=alice is over the limit rcpts=5 action=reject"]
    for number in range(lines):
        user = rng.choice([*users, "alice"])
        made.append(Line(user, users[user], rng.choice(places), rng.choice(units), rng.choice(senders),
                         rng.randint(1, 60), *rng.choice(verdicts if user != "bob" else verdicts[:3])))
        text.append(made[-1].text(number))
        if number % 50 == 0:
            sender = quoted(rng.choice(senders))
            text.append(f"4Y{number:06X}: client=192.0.2.7:4711 from={sender} rcpts=50 action=pass")
        if number % 70 == 0:
            text.append("4ZTEST: user=alice is over four fifths of the limit, rcpts=9 action=tempfail reason=limit")
    return made, "".join(f"<6>{line}\n" for line in text)


@pytest.fixture(params=["mawk", "gawk"])
def reader(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Callable[..., str]:
    """Run commands of the README on a log, with one of Debian's two awks; what they install is in tmp_path."""
    if not (awk := shutil.which(request.param, path=mta.SYSTEM_PATH)):
        pytest.skip(f"{request.param} is not installed")
    for name in "bin", "cron.hourly":
        (tmp_path / name).mkdir()
    shim = tmp_path / "bin/journalctl"
    shim.write_text(JOURNALCTL)
    shim.chmod(0o755)
    (tmp_path / "bin/awk").symlink_to(awk)

    def run(commands: str, log: str = "") -> str:
        """Run them; with a log, that is what journalctl shows."""
        if log:
            (tmp_path / "log").write_text(log)
        for old, new in {"/usr/local/bin": "bin", "/etc/cron.": "cron."}.items():
            commands = commands.replace(old, f"{tmp_path}/{new}")
        env = {"PATH": f"{tmp_path}/bin:{mta.SYSTEM_PATH}", "LC_ALL": "C.UTF-8", "MILTER_LOG": f"{tmp_path}/log"}
        ran = subprocess.run(["sh", "-ec", commands], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert ran.returncode == 0 and not ran.stderr, f"{commands}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    run(recipe(FIELDS)[0])
    return run


def test_each_field_is_read_whatever_stands_in_the_quotes(reader: Callable) -> None:
    """Fields come out as they are written, in the order in which they were asked for; other lines are passed over."""
    made, log = made_log()
    answer = reader("journalctl -u milter_sysuser -o cat | milter-fields from user rcpts reason nothing", log)
    wanted = [f"{quoted(m.sender)}\t{quoted(m.user)}\t{m.rcpts}\t{m.reason}\t" for m in made]
    assert [line for line in answer.splitlines() if "\t\t50\t\t" not in line] == wanted
    assert len(answer.splitlines()) == len(wanted) + 60  # mail of other hosts, which has no user


def test_the_top_senders_directories_and_units_are_counted(reader: Callable) -> None:
    """By recipients, ten of each; two users with nearly the same name are two; remote mail counts for nobody."""
    made, log = made_log()
    answer = reader(recipe(TOP)[0], log).splitlines()
    print("\n".join(answer))
    for field in "user", "dir", "unit":
        recipients, messages = collections.Counter(), collections.Counter()
        for line in made:
            name = f"{field}={quoted(getattr(line, field))}"
            recipients[name] += line.rcpts
            messages[name] += 1
        found = [line for line in answer if f" {field}=" in line and line.split(" ", 2)[2] in messages]
        assert sorted(found) == sorted(f"{recipients[name]} {messages[name]} {name}" for name, _ in
                                       recipients.most_common(10))
        assert [int(line.split()[0]) for line in found] == sorted(recipients.values(), reverse=True)[:10]
    assert {r'user="DOM\x5cJohn Doe"', r'user="DOM\x5cJohn Roe"'} <= {line.split(" ", 2)[2] for line in answer}


def test_the_top_senders_are_counted_in_the_milters_own_log(make_logged: Callable, reader: Callable,
                                                            users: types.SimpleNamespace) -> None:
    """An address that looks like a field counts for nobody else; refused mail counts, remote does not."""
    mail = make_logged(blocked_mailusers=["nobody"])
    to = [word for number in range(3) for word in ("--to", f"to{number}@example.org")]
    assert mta.run_as("mst-alice", mta.smtp(mail.postfix.port, "--messages", "2", *to)).returncode == 0
    trick = '" user=root rcpts=9999 action=tag "@example.org'
    assert mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--mail-from", trick, "--messages", "4")).returncode == 0
    mta.run_as("nobody", mta.smtp(mail.postfix.port))
    mail.milter.wait_lines("action=", 7)
    remote = "<6>4ZTEST: client=192.0.2.7:4711 from=x@example.org rcpts=50 action=pass\n"  # mail of another host
    answer = reader(recipe(TOP)[0], mail.milter.log() + remote).splitlines()
    assert answer[:3] == ["6 2 user=mst-alice", "4 4 user=mst-bob", "1 1 user=nobody"]


def test_root_is_mailed_what_needs_somebody(make_logged: Callable, reader: Callable, users: types.SimpleNamespace) -> None:
    """A user at four fifths of his limit and over it, each once, then his refusals; in a quiet hour nothing is printed."""
    mail = make_logged(hourly_limits={"mst-bob": 5}, unidentified_action="tempfail")
    reader(recipe(MAIL)[0])
    assert reader("/etc/cron.hourly/milter-mail", mail.milter.log()) == ""
    mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--messages", "8"))
    mail.milter.wait_lines("action=", 8)
    *warnings, refused = reader("/etc/cron.hourly/milter-mail", mail.milter.log()).splitlines()
    assert warnings == ["user=mst-bob has addressed 4 of 5 recipients an hour",
                        "user=mst-bob is over the limit of 5 recipients an hour"]
    assert refused.split() == ["3", "mst-bob", "limit", "tempfail"]


def test_root_is_mailed_who_was_refused(reader: Callable) -> None:
    """How often, by user, reason and action, in the hour that has passed; where nobody was, nothing is printed."""
    made, log = made_log()
    reader(recipe(MAIL)[0], log)
    answer = reader("/etc/cron.hourly/milter-mail")
    print(answer)
    refused = collections.Counter(f"{quoted(m.user)}\t{m.reason}\t{m.action}" for m in made if m.action in REFUSALS)
    found = [line.lstrip().split(" ", 1) for line in answer.splitlines()]
    assert {name: int(times) for times, name in found} == refused
    assert [int(times) for times, _ in found] == sorted(refused.values(), reverse=True)
    assert reader("/etc/cron.hourly/milter-mail", "<6>milter_sysuser started\n") == ""


@pytest.fixture
def blocked_file() -> Iterator[pathlib.Path]:
    """Give a place for a block list, where the milter's user may read it."""
    with tempfile.TemporaryDirectory(prefix="mst-place.") as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name, "milter_sysuser.blocked")


def submit(mail: types.SimpleNamespace, user: str, to: str = "to@example.org",
           sender: str = "from@example.org") -> subprocess.CompletedProcess:
    """Send a message by sendmail(1) as a user, with that Postfix in the place of the system's."""
    command = ('mount --bind "$0" /etc/postfix && exec setpriv --reuid="$1" --regid="$1" --init-groups '
               '/usr/sbin/sendmail -f "$2" "$3"')
    return subprocess.run(["unshare", "--mount", "sh", "-c", command, f"{mail.postfix.directory}/etc", user, sender, to],
                          input="Subject: by sendmail\n\nbody\n", capture_output=True, text=True, timeout=60, cwd="/",
                          env={"PATH": mta.SYSTEM_PATH})


@pytest.fixture
def submission() -> None:
    """Skip where a user cannot be shown another /etc/postfix, which sendmail(1) insists on."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces: sendmail(1) cannot be used on another Postfix than the system's")


def test_a_ban_closes_both_doors_and_the_queue_and_an_unban_opens_them(
        make_logged: Callable, administrator: Callable, blocked_file: pathlib.Path, submission: None,
        tmp_path: pathlib.Path, users: types.SimpleNamespace) -> None:
    """SMTP, sendmail(1) and the queue are closed to one user and to nobody else; what was held meanwhile is let go."""
    conf = blocked_file.with_name("milter_sysuser.conf")
    main_cf = {"defer_transports": "virtual", "non_smtpd_milters": "$smtpd_milters"}
    mail = make_logged({"main_cf": main_cf}, settings_file=str(conf))
    once, ban, queue, unban = recipe("Ban a user now")
    administrator(mail, once, blocked=str(blocked_file), conf=str(conf))
    assert (tmp_path / "told").read_text() == "reload milter_sysuser\n"
    blocked_file.write_text("mst-eve\n")
    administrator(mail, once, blocked=str(blocked_file), conf=str(conf))  # pasted again
    assert blocked_file.read_text() == "mst-eve\n" and conf.read_text().count("blocked_mailusers_file") == 1
    mail.milter.stop()
    mail.milter.start()
    smtp = mta.smtp(mail.postfix.port)

    def queued(name: str) -> set[str]:
        return {message["queue_id"] for message in mail.postfix.postqueue() if message["queue_name"] == name}
    for user in "mst-alice", "mst-bob":
        assert mta.run_as(user, smtp).returncode == 0
        submitted = submit(mail, user)
        assert submitted.returncode == 0, submitted.stderr
    mta.wait_for(lambda: len(queued("deferred")) == 4, what="four messages in the queue")
    administrator(mail, ban, blocked=str(blocked_file), bob="mst-bob")
    assert "User mst-bob is blocked" in mta.run_as("mst-bob", smtp).stdout
    assert submit(mail, "mst-bob").returncode == 0
    mta.wait_for(lambda: len(queued("hold")) == 1, what="what sendmail(1) took to be held")
    administrator(mail, queue, bob="mst-bob")
    alices = {re.match(r"<6>(\w+): ", line)[1] for line in mail.milter.lines(" user=mst-alice ")}
    assert queued("deferred") == alices and len(alices) == 2 and not queued("hold")
    assert mta.run_as("mst-alice", smtp).returncode == 0
    assert submit(mail, "mst-bob").returncode == 0
    held = mta.wait_for(lambda: queued("hold"), what="it to be held again")
    administrator(mail, unban, blocked=str(blocked_file), bob="mst-bob")
    mta.wait_for(lambda: held <= queued("deferred"), what="what was held to be let go")
    assert mta.run_as("mst-bob", smtp).returncode == 0
    assert submit(mail, "mst-bob").returncode == 0
    mta.wait_for(lambda: len(queued("deferred")) == 6 and not queued("hold"), what="both to be in the queue")


def test_only_what_was_queued_is_deleted_from_the_queue(tmp_path: pathlib.Path) -> None:
    """A refused message has a queue id that the next one can get; only what was held is let go; senders change nothing."""
    line = "{}: client=127.0.0.1:1 user={} uid=1 program=php pid=2 exe=? dir=/ unit=? from={} rcpts=1 action={}\n"
    log = tmp_path / "log"
    log.write_text("".join(line.format(*fields) for fields in (
        ("A1", "bob", "x@example.org", "tag"), ("A2", "bob", "x@example.org", "reject reason=blocked"),
        ("A3", "bob", '"x action=reject y@example.org"', "tag"), ("A4", "bobby", "x@example.org", "tag"),
        ("A5", "bob", "x@example.org", "tempfail reason=limit"), ("A6", "bob", "x@example.org", "quarantine reason=limit"),
        ("A7", "alice", '" user=bob "', "tag"))))
    for block, found in (2, ["A1", "A3", "A6"]), (3, ["A6"]):
        commands = f"journalctl() {{ cat {log}; }}; postsuper() {{ cat; }}; sed() {{ [ $1 = -i ] || command sed \"$@\"; }}\n"
        ran = subprocess.run(["sh", "-c", commands + recipe("Ban a user now")[block]], capture_output=True, text=True, timeout=60)
        assert ran.stdout.split() == found and not ran.stderr


def test_one_sites_mail_is_deleted_where_all_run_as_one_user(tmp_path: pathlib.Path) -> None:
    """By the directory; another's message that says it in an address stays."""
    line = ("{}: client=127.0.0.1:1 user=www-data uid=33 program=php pid=2 exe=/usr/bin/php dir={} unit=? from={} "
            "rcpts=1 action=tag\n")
    log = tmp_path / "log"
    log.write_text("".join(line.format(*fields) for fields in (
        ("B1", "/srv/site2/uploads", "x@example.org"), ("B2", "/srv/site22/uploads", "x@example.org"),
        ("B3", "/srv/site3", '"x dir=/srv/site2/uploads y@example.org"'), ("B4", "/srv/site2", '"x y@example.org"'))))
    old, new = "user=bob .*", re.search(r"put `([^`]*)`\s+in the place\s+of\s+`user=bob \.\*`", mta.README.read_text())[1]
    block = recipe("Ban a user now")[2]
    assert old in block
    commands = f"journalctl() {{ cat {log}; }}; postsuper() {{ cat; }}\n" + block.replace(old, new)
    ran = subprocess.run(["sh", "-c", commands], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["B1", "B4"] and not ran.stderr


def test_everyone_is_limited_but_one(make_mail: Callable, users: types.SimpleNamespace) -> None:
    """The 201st recipient is refused, and the one who is exempt goes on."""
    limits = setting("Limit everyone to 200 recipients an hour and 1,000 a day")
    assert set(limits) == {"hourly_limits", "daily_limits"} and all("root" in each for each in limits.values())
    for each in limits.values():
        each["mst-alice"] = each.pop("newsletter")
    mail = make_mail(**limits)
    for user, reply in ("mst-bob", "450 4.7.1 User mst-bob is over the limit of 200 recipients an hour"), ("mst-alice", ""):
        many = [word for number in range(100) for word in ("--to", f"to{number}@example.org")]
        assert mta.run_as(user, mta.smtp(mail.postfix.port, "--messages", "2", *many)).returncode == 0
        said = mta.run_as(user, mta.smtp(mail.postfix.port))
        assert reply in said.stdout and bool(reply) == bool(said.returncode)


def test_log_only_adds_no_header(make_mail: Callable, users: types.SimpleNamespace) -> None:
    """Nothing local is in the mail, not even what somebody made up; the log knows."""
    mail = make_mail(header_fields=[])
    mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--header", f"{HEADER}: user=root program=cron"))
    assert HEADER not in mail.postfix.wait_messages(1)[0]
    mail.milter.wait_lines(" user=mst-bob ")


def test_mail_that_leaves_the_site_has_no_header(make_mail: Callable, administrator: Callable, tmp_path: pathlib.Path,
                                                 users: types.SimpleNamespace) -> None:
    """A local recipient sees it, one elsewhere does not."""
    with mta.Postfix(main_cf={"smtpd_milters": "", "virtual_mailbox_domains": "example.com"}) as elsewhere:
        main_cf = {"default_transport": f"smtp:[127.0.0.1]:{elsewhere.port}", "disable_dns_lookups": "yes"}
        mail = make_mail({"main_cf": main_cf, "master": ["smtp unix - - n - - smtp"]})
        mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--to", "away@example.com"))
        assert elsewhere.wait_messages(1)[0][HEADER]
        elsewhere.forget_messages()
        commands, = recipe("Remove the header from mail that leaves the site")
        administrator(mail, commands)
        mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--to", "away@example.com", "--to", "to@example.org"))
        assert mail.postfix.wait_messages(1)[0][HEADER].startswith("user=mst-bob ")
        assert HEADER not in elsewhere.wait_messages(1)[0]


def test_a_smarthost_keeps_the_tags_of_its_web_nodes(make_mail: Callable, administrator: Callable,
                                                     users: types.SimpleNamespace) -> None:
    """What comes from a web node's address stays; the same from elsewhere is a forgery and goes."""
    mail = make_mail()
    commands, = recipe("Keep the tags of your own web nodes on a smarthost")
    client = mta.smtp(mail.postfix.port, "--header", f"{HEADER}: user=shop7 program=php-fpm8.2")
    mta.run_as("mst-bob", [*client, "--bind", "127.0.0.2"])
    assert mail.postfix.wait_messages(1)[0][HEADER].startswith("user=mst-bob ")
    administrator(mail, commands, nodes="127.0.0.2/32")
    for address, tags in ("127.0.0.2", ["user=shop7 program=php-fpm8.2"]), ("127.0.0.1", [mta.tag("mst-bob", "python3")]):
        mail.postfix.forget_messages()
        mta.run_as("mst-bob", [*client, "--bind", address])
        assert mail.postfix.wait_messages(1)[0].get_all(HEADER) == tags


# Says what becomes of a connection to an address and port, as some user: USER ADDRESS PORT, ...
DIAL = r'''
import errno, os, pwd, socket, sys
listener = socket.create_server(("127.0.0.1", 10025))
for user, address, port in zip(*[iter(sys.argv[1:])] * 3):
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setuid(pwd.getpwnam(user).pw_uid)
        with socket.socket() as client:
            client.settimeout(0.5)
            result = client.connect_ex((address, int(port)))
        os.write(1, f"{user} {port} {errno.errorcode.get(result, 'connected')}\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
'''


def test_the_firewall_lets_the_filter_reach_its_listener_and_postfix_other_hosts(tmp_path: pathlib.Path,
                                                                                users: types.SimpleNamespace) -> None:
    """And nobody else; with mst-alice in the place of the filter's user, and no other host that would answer."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    text = mta.README.read_text().partition("\n### Content filters")[2]
    table = re.search(r"^    table inet mail \{\n(?:    .*\n)+", text, re.M)[0]
    assert '"amavis"' in table
    (tmp_path / "table").write_text(table.replace('"amavis"', '"mst-alice"'))
    setup = ("ip link set lo up && ip link add mst8 type veth peer name mst9 && ip address add 192.0.2.1/24 dev mst8 && "
             f'ip link set mst8 up && ip link set mst9 up && nft -f {tmp_path}/table && exec "$@"')
    dials = [(user, *to) for to in (("127.0.0.1", "10025"), ("192.0.2.2", "25")) for user in ("mst-alice", "mst-bob", "postfix")]
    said = subprocess.run(["unshare", "--net", "sh", "-c", setup, "sh", mta.PYTHON, "-c", DIAL, *sum(dials, ())],
                          capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines() == [
        "mst-alice 10025 connected", "mst-bob 10025 ECONNREFUSED", "postfix 10025 ECONNREFUSED",
        "mst-alice 25 ECONNREFUSED", "mst-bob 25 ECONNREFUSED", "postfix 25 EAGAIN"], said.stderr
