# SPDX-License-Identifier: MIT
"""The README's recipes: each is run as it stands there, on a Postfix of its own, and does what it says."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import tempfile
import types
from typing import Any, Callable, Iterator

import pytest

import mta

README = mta.SCRIPT.parent / "README.md"
HEADER = "X-Sender-Process-Info"
# Stands in for journald: the milter's log, less the levels that journald takes off; Postfix's log for the other tag.
JOURNALCTL = r"""#!/bin/sh
case "$*" in
    "-u milter_sysuser -o cat" | "-u milter_sysuser -o cat --since today") exec sed 's/^<[0-9]>//' "$MILTER_LOG" ;;
    "-t postfix/pickup _UID=$(id -u postfix) -o cat") exec sed -n 's/^.* postfix\/pickup\[[0-9]*\]: //p' "$POSTFIX_LOG" ;;
    *) echo "journalctl $*: what is that?" >&2; exit 2 ;;
esac
"""


def recipe(heading: str) -> list[str]:
    """Give the code blocks of a recipe in the README, each without its indent."""
    text = README.read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    found = dict(re.findall(r"^### (.*)\n((?:(?!### ).*\n?)*)", text, re.M))
    assert heading in found, f"README.md has no recipe {heading!r}, only {sorted(found)}"
    blocks = re.findall(r"(?:^|(?<=\n\n))(?: {4}.*\n|\n(?= {4}))+", found[heading])
    return [re.sub(r"^ {4}", "", block, flags=re.M) for block in blocks]


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

    def run(mail: types.SimpleNamespace, commands: str, **names: str) -> str:
        for old, new in names.items():
            old = {"blocked": "/etc/milter_sysuser.blocked", "queue_id": "4Zb9Xk1c2Tz3", "nodes": "192.0.2.0/28",
                   "bob": "bob"}[old]
            assert old in commands, f"{old} is not in {commands}"
            commands = commands.replace(old, new)
        env = {"PATH": f"{tmp_path}:{mta.SYSTEM_PATH}", "MAIL_CONFIG": f"{mail.postfix.directory}/etc", "LC_ALL": "C",
               "MILTER_LOG": f"{mail.milter.directory}/milter.log", "POSTFIX_LOG": f"{mail.postfix.directory}/maillog"}
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
    """There is none in the README that this file does not run."""
    text = README.read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (.*)", text, re.M)
    assert headings and not [heading for heading in headings if f'"{heading}"' not in pathlib.Path(__file__).read_text()]


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
    instead = re.search(r"`(sed [^`]* FILE)` in the place", README.read_text())[1].replace("FILE", '"$MILTER_LOG"')
    commands = recipe("Find who sent a message")[0].replace("journalctl -u milter_sysuser -o cat", instead)
    answer = administrator(mail, commands, queue_id=queue_id)
    assert answer.count("\n") == 1 and answer.startswith(f"{queue_id}: client=") and " user=mst-bob " in answer


def test_the_top_senders_are_counted(make_logged: Callable, administrator: Callable, users: types.SimpleNamespace) -> None:
    """By recipients; an address that looks like a field counts for nobody else; refused mail counts, remote does not."""
    mail = make_logged(blocked_mailusers=["nobody"])
    to = [word for number in range(3) for word in ("--to", f"to{number}@example.org")]
    assert mta.run_as("mst-alice", mta.smtp(mail.postfix.port, "--messages", "2", *to)).returncode == 0
    trick = '" user=root rcpts=9999 action=tag "@example.org'
    assert mta.run_as("mst-bob", mta.smtp(mail.postfix.port, "--mail-from", trick, "--messages", "4")).returncode == 0
    mta.run_as("nobody", mta.smtp(mail.postfix.port))
    mail.milter.wait_lines("action=", 7)
    with open(mail.milter.directory / "milter.log", "a") as log:  # as it logs mail of other hosts
        log.write("<6>4ZTEST: client=192.0.2.7:4711 from=x@example.org rcpts=50 action=pass\n")
    commands, = recipe("List the top senders of the day")
    assert administrator(mail, commands).splitlines() == ["6 2 mst-alice", "4 4 mst-bob", "1 1 nobody"]


@pytest.fixture
def blocked_file() -> Iterator[pathlib.Path]:
    """Make an empty block list where the milter's user may read it."""
    with tempfile.TemporaryDirectory(prefix="mst-place.") as name:
        os.chmod(name, 0o755)
        path = pathlib.Path(name, "milter_sysuser.blocked")
        path.touch(0o644)
        yield path


def submit(mail: types.SimpleNamespace, user: str) -> subprocess.CompletedProcess:
    """Send a message by sendmail(1) as a user, with that Postfix in the place of the system's."""
    command = ('mount --bind "$0" /etc/postfix && exec setpriv --reuid="$1" --regid="$1" --init-groups '
               '/usr/sbin/sendmail -f from@example.org to@example.org')
    return subprocess.run(["unshare", "--mount", "sh", "-c", command, f"{mail.postfix.directory}/etc", user],
                          input="Subject: by sendmail\n\nbody\n", capture_output=True, text=True, timeout=60, cwd="/",
                          env={"PATH": mta.SYSTEM_PATH})


@pytest.fixture
def submission() -> None:
    """Skip where a user cannot be shown another /etc/postfix, which sendmail(1) insists on."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces: sendmail(1) cannot be used on another Postfix than the system's")


def test_a_ban_closes_three_doors_and_an_unban_opens_them(
        make_logged: Callable, administrator: Callable, blocked_file: pathlib.Path, submission: None,
        users: types.SimpleNamespace) -> None:
    """SMTP, sendmail(1) and the queue are closed to one user and to nobody else."""
    main_cf = {"defer_transports": "virtual", "authorized_submit_users": "static:anyone"}
    mail = make_logged({"main_cf": main_cf}, blocked_mailusers_file=str(blocked_file))
    smtp = mta.smtp(mail.postfix.port)
    for user in "mst-alice", "mst-bob":
        assert mta.run_as(user, smtp).returncode == 0
        submitted = submit(mail, user)
        assert submitted.returncode == 0, submitted.stderr
    mta.wait_for(lambda: len(q := mail.postfix.postqueue()) == 4 and all(
        m["queue_name"] == "deferred" for m in q), what="four messages in the queue")
    ban, sendmail, queue, unban = recipe("Ban a user now")
    administrator(mail, ban, blocked=str(blocked_file), bob="mst-bob")
    administrator(mail, sendmail, bob="mst-bob")
    administrator(mail, queue, bob="mst-bob")
    assert "User mst-bob is blocked" in mta.run_as("mst-bob", smtp).stdout
    assert "not allowed to submit mail" in submit(mail, "mst-bob").stderr
    left = {message["queue_id"] for message in mail.postfix.postqueue()}
    alices = {re.match(r"<6>(\w+): ", line)[1] for line in mail.milter.lines(" user=mst-alice ")}
    alices |= set(re.findall(rf"postfix/pickup\[\d+\]: (\w+): uid={users.alice.pw_uid} ", mail.postfix.log()))
    assert left == alices and len(left) == 2
    assert mta.run_as("mst-alice", smtp).returncode == 0 and submit(mail, "mst-alice").returncode == 0
    administrator(mail, unban, blocked=str(blocked_file), bob="mst-bob")
    assert mta.run_as("mst-bob", smtp).returncode == 0
    assert submit(mail, "mst-bob").returncode == 0


def test_everyone_is_limited_but_one(make_mail: Callable, users: types.SimpleNamespace) -> None:
    """The 201st recipient is refused, and the one who is exempt goes on."""
    limits = setting("Limit everyone to 200 recipients an hour, except one")["hourly_limits"]
    limits["mst-alice"] = limits.pop("newsletter")
    mail = make_mail(hourly_limits=limits)
    for user, reply in ("mst-bob", "450 4.7.1 User mst-bob is over the limit of 200 recipients an hour"), ("mst-alice", ""):
        many = [word for number in range(100) for word in ("--to", f"to{number}@example.org")]
        assert mta.run_as(user, mta.smtp(mail.postfix.port, "--messages", "2", *many)).returncode == 0
        said = mta.run_as(user, mta.smtp(mail.postfix.port))
        assert reply in said.stdout and bool(reply) == bool(said.returncode)


def test_log_only_adds_no_header(make_mail: Callable, users: types.SimpleNamespace) -> None:
    """Nothing local is in the mail, not even what somebody made up; the log knows."""
    mail = make_mail(**setting("Log only"))
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
