# SPDX-License-Identifier: MIT
"""Mail from sendmail(1), as of PHP's mail(): it has its sender's name, lists and limits like mail by SMTP."""

from __future__ import annotations

import os
import pathlib
import re
import smtplib
import subprocess
import types
from typing import Any, Callable, Iterator, Optional

import pytest

import mta
import milter_sysuser as ms

HEADER = "X-Sender-Process-Info"
SOCKET = "{ unix:private/milter.sock, default_action=accept }"
DOORS = {"non_smtpd_milters": SOCKET}
TEXT = "Subject: test\n\nbody\n"
SMTP = "EHLO me\r\nMAIL FROM:<from@example.org>\r\nRCPT TO:<to@example.org>\r\nDATA\r\n" \
       "Subject: test\r\n\r\nbody\r\n.\r\nQUIT\r\n"


@pytest.fixture(scope="session")
def mounts(root: None) -> None:
    """Skip tests that call sendmail(1) where it cannot be shown another /etc/postfix than the system's."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace (CAP_SYS_ADMIN)")


@pytest.fixture(scope="module")
def shared(mounts: None, users: Any) -> Iterator[types.SimpleNamespace]:
    """Start the Postfix and milter that tests with default settings share."""
    with mta.Postfix(main_cf=DOORS) as postfix, mta.Milter(postfix) as milter:
        yield types.SimpleNamespace(postfix=postfix, milter=milter)


@pytest.fixture
def house(shared: types.SimpleNamespace) -> Iterator[types.SimpleNamespace]:
    """Give them with an empty mailbox; afterwards nothing may have been complained about."""
    shared.postfix.forget_messages()
    before = len(shared.milter.log())
    yield shared
    assert not re.search("ERROR|Traceback", shared.milter.log()[before:]), shared.milter.log()[before:]


def said(milter: mta.Milter, containing: str, n: int = 1) -> str:
    """Give the n-th line of the log about a message that contains a text, from its client= on."""
    return milter.wait_lines(containing, n)[n - 1].partition(": client=")[2]


def held(postfix: mta.Postfix, n: int = 1) -> list[str]:
    """Wait for n messages that are held, and give what is in their files; nothing may be left in maildrop."""
    def queue() -> list[str]:
        return [one["queue_id"] for one in postfix.postqueue() if one["queue_name"] == "hold"]
    mta.wait_for(lambda: len(queue()) == n, what=f"{n} held messages")
    mta.wait_for(lambda: not any((postfix.directory / "queue/maildrop").iterdir()), what="maildrop to be empty")
    return [postfix.run("postcat", "-qh", queue_id).stdout for queue_id in sorted(queue())]


# --- who is named ---------------------------------------------------------------------------------------------------

PHP = 'exit(mail("to@example.org", "test", "body", "From: from@example.org", "-ffrom@example.org") ? 0 : 1);'
CALLS = {
    "plain": (["sendmail", "-f", "from@example.org", "to@example.org"], TEXT),
    "-t": (["sendmail", "-t", "-f", "from@example.org"], "To: to@example.org\n" + TEXT),
    "-bs": (["sendmail", "-bs"], SMTP),
    "-G -i": (["sendmail", "-G", "-i", "-f", "from@example.org", "to@example.org"], TEXT),
    "mail()": (["php", "-n", "-d", "sendmail_path=/usr/sbin/sendmail -t -i", "-r", PHP], ""),
    "a Received line on top": (["sendmail", "-f", "from@example.org", "to@example.org"],
                               "Received: by mail.example.org (Postfix, from userid 0)\n\tid 4ZTEST; now\n" + TEXT),
    "lines before the first": (["sendmail", "-f", "from@example.org", "to@example.org"],
                               "\tid 4ZTEST; now\n (Postfix, from userid 0)\n" + TEXT),
    "our header": (["sendmail", "-f", "from@example.org", "to@example.org"],
                   f"{HEADER}: user=root program=cron\n{HEADER.lower()}: user=root\n{TEXT}"),
}


@pytest.mark.parametrize("call", CALLS)
def test_whoever_calls_sendmail_is_named(call: str, house: types.SimpleNamespace, users: Any) -> None:
    """By Postfix's own header, which is above all that the user writes; the program has ended by then."""
    argv, text = CALLS[call]
    sent = subprocess.run(mta.on_this_postfix(house.postfix, argv, "mst-alice"), input=text, text=True,
                          capture_output=True, cwd="/", env={"PATH": mta.SYSTEM_PATH}, timeout=60)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    (message,) = house.postfix.wait_messages(1)
    assert message.get_all(HEADER) == ["user=mst-alice program=?"]
    queue_id = re.search(r"\tid (\w+);", message["Received"])[1]
    assert said(house.milter, f"{queue_id}: ") == (
        f"? user=mst-alice uid={users.alice.pw_uid} program=? pid=? exe=? dir=? unit=? from=from@example.org rcpts=1 "
        "action=tag lookup=submitted")


@pytest.mark.parametrize("who, user", [("root", "root"), (58585, "58585"), ("postfix", "postfix")])
def test_root_and_uids_without_an_account_are_named_too(who: Any, user: str, house: types.SimpleNamespace) -> None:
    """By name or number; mail of Postfix's own user is not taken for mail that is put back into the queue."""
    sent = mta.submit(house.postfix, who, TEXT, "-f", "from@example.org", "to@example.org")
    assert sent.returncode == 0, sent.stderr
    assert house.postfix.wait_messages(1)[0].get_all(HEADER) == [f"user={user} program=?"]


@pytest.mark.parametrize("main_cf", [
    {"enable_long_queue_ids": "no"}, {"hash_queue_names": "incoming"},
    {"enable_long_queue_ids": "no", "hash_queue_names": "incoming,deferred", "hash_queue_depth": "3"},
    {"mail_name": "Our (own) Mail, from here", "myhostname": "x" * 60 + "." + "y" * 60 + ".example.org"},
    {"header_checks": "regexp:{{/^Subject:/ PREPEND X-Seen: yes}}", "always_add_missing_headers": "yes"}],
    ids=["short ids", "hashed", "short ids, hashed deep", "other names", "header_checks of other headers"])
def test_the_queue_file_is_found_and_read_as_postfix_is_set(main_cf: dict[str, str], make_mail: Callable, mounts: None,
                                                            users: Any) -> None:
    """hash_queue_names, enable_long_queue_ids, mail_name, myhostname."""
    mail = make_mail({"main_cf": {**DOORS, **main_cf}})
    for n, user in enumerate(("mst-alice", "mst-bob"), 1):
        assert mta.submit(mail.postfix, user, TEXT).returncode == 0
        assert mail.postfix.wait_messages(n)[-1].get_all(HEADER) == [f"user={user} program=?"]


def test_a_socket_elsewhere_leaves_the_queue_to_postconf(make_milter: Callable, mounts: None, users: Any) -> None:
    """As run_as_user from the start, without any privilege, behind a cleanup that is chrooted."""
    with mta.Postfix() as postfix:
        milter = make_milter(user="postfix", env={"PATH": mta.SYSTEM_PATH, "MAIL_CONFIG": f"{postfix.directory}/etc"})
        milter.start()
        postfix.run("postconf", "-e", f"non_smtpd_milters = unix:{milter.socketname}")
        postfix.reload()
        assert mta.submit(postfix, "mst-alice", TEXT).returncode == 0
        assert postfix.wait_messages(1)[0].get_all(HEADER) == ["user=mst-alice program=?"]


def test_a_chrooted_cleanup_is_read_like_any(make_mail: Callable, mounts: None, users: Any) -> None:
    """Its file lies where it lies for us."""
    mail = make_mail({"main_cf": DOORS, "master": ["cleanup unix n - y - 0 cleanup"]})
    assert mta.submit(mail.postfix, "mst-alice", TEXT).returncode == 0
    assert mail.postfix.wait_messages(1)[0].get_all(HEADER) == ["user=mst-alice program=?"], mail.postfix.log()


EARLIER = """
import sys, Milter
class Earlier(Milter.Base):
    def eom(self):
        self.chgfrom("changed@example.org")
        for n in range(40):
            self.addrcpt("more%d@example.org" % n)
        for n in range(3):
            self.addheader("X-Top-%d" % n, "one\\n\\ttwo", 0)
        self.addheader("X-Second", "here", 1)
        self.addheader("X-Last", "here")
        self.chgheader("Subject", 1, "changed")
        self.replacebody("another\\n")
        return Milter.CONTINUE
Milter.factory = Earlier
Milter.set_flags(Milter.ADDHDRS | Milter.CHGHDRS | Milter.CHGFROM | Milter.ADDRCPT | Milter.CHGBODY)
Milter.runmilter("earlier", "unix:" + sys.argv[1], 30)
"""


def test_what_milters_before_ours_have_changed_hides_nobody(make_mail: Callable, mounts: None, users: Any) -> None:
    """Headers above Postfix's own, recipients, the sender: all that the queue file is patched for."""
    mail = make_mail({"main_cf": {"non_smtpd_milters": f"unix:private/earlier.sock, {SOCKET}"}})
    path = f"{mail.postfix.directory}/queue/private/earlier.sock"
    with mta.as_user("postfix", [mta.PYTHON, "-c", EARLIER, path]) as earlier:
        try:
            mta.wait_for(lambda: os.path.exists(path))
            assert mta.submit(mail.postfix, "mst-alice", TEXT).returncode == 0
            message = mail.postfix.wait_messages(41)[0]
        finally:
            earlier.kill()
    assert message["X-Top-0"] and message["Subject"] == "changed"
    assert message.get_all(HEADER) == ["user=mst-alice program=?"], mail.milter.log()


# --- a hacked web host ----------------------------------------------------------------------------------------------

SITE_PHP = """<?php
require '/usr/share/php/libphp-phpmailer/autoload.php';
$mail = new PHPMailer\\PHPMailer\\PHPMailer(true);
if ($_GET['port']) {
    $mail->isSMTP();
    [$mail->Host, $mail->Port, $mail->SMTPAutoTLS, $mail->Helo] = ['127.0.0.1', $_GET['port'], false, 'me'];
}
$mail->setFrom('from@example.org');
$mail->addAddress('to@example.org');
[$mail->Subject, $mail->Body] = ['test', 'body'];
$mail->send();
echo 'sent';
"""
FPM = """[global]
error_log = {0}/log
daemonize = no
[www]
user = www-data
group = www-data
listen = {0}/web.sock
pm = static
pm.max_children = 1
"""
APACHE = """ServerName localhost
ServerRoot {0}
PidFile {0}/pid
ErrorLog {0}/log
Listen 127.0.0.1:{1}
User www-data
Group www-data
StartServers 1
LoadModule mpm_prefork_module /usr/lib/apache2/modules/mod_mpm_prefork.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule php_module {2}
DocumentRoot {0}
SetHandler application/x-httpd-php
"""


@pytest.fixture(params=["php-fpm", "mod_php"])
def site(request: pytest.FixtureRequest, shared: types.SimpleNamespace) -> Iterator[Callable[[int], str]]:
    """Run a site as www-data, whose uploads have a script that sends by SMTP to a port or, for 0, by mail()."""
    modules = sorted(pathlib.Path("/usr/lib/apache2/modules").glob("libphp*.so"))
    servers = sorted(pathlib.Path("/usr/sbin").glob("php-fpm*"))
    there = modules if request.param == "mod_php" else servers
    if not there or not os.path.exists("/usr/share/php/libphp-phpmailer"):
        pytest.skip("apache2 with mod_php, php-fpm or libphp-phpmailer is not installed")
    port = mta.free_port()
    with mta.tempfile.TemporaryDirectory(prefix="milter-test.") as name:
        uploads = pathlib.Path(name, "htdocs/wp-content/uploads")
        uploads.mkdir(parents=True)
        uploads.joinpath("send.php").write_text(SITE_PHP)
        os.chmod(name, 0o755)
        conf = pathlib.Path(name, "conf")
        if request.param == "mod_php":
            conf.write_text(APACHE.format(name, port, modules[-1]))
            server = ["/usr/sbin/apache2", "-DFOREGROUND", "-f", str(conf)]
            ask = ["curl", "-sS", f"http://127.0.0.1:{port}/htdocs/wp-content/uploads/send.php?port="]
        else:
            conf.write_text(FPM.format(name))
            server = [str(servers[-1]), "-y", str(conf)]
            ask = ["cgi-fcgi", "-bind", "-connect", f"{name}/web.sock"]

        def send(by: int) -> str:
            env = {"PATH": mta.SYSTEM_PATH, "REQUEST_METHOD": "GET", "SCRIPT_FILENAME": f"{uploads}/send.php",
                   "QUERY_STRING": f"port={by}"}
            argv = [*ask[:-1], ask[-1] + str(by)] if ask[0] == "curl" else ask
            answer = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
            assert answer.stdout.endswith("sent"), answer.stdout + answer.stderr + pathlib.Path(name, "log").read_text()
            return str(uploads)
        with subprocess.Popen(mta.on_this_postfix(shared.postfix, server), stdin=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env={"PATH": mta.SYSTEM_PATH},
                              start_new_session=True) as process:  # at its end apache signals its whole group
            try:
                mta.wait_for(lambda: os.path.exists(f"{name}/web.sock") or
                             not mta.socket.socket().connect_ex(("127.0.0.1", port)), 20, "the web server")
                yield send
            finally:
                process.terminate()


def test_the_log_has_the_directory_of_the_script_that_sent(site: Callable[[int], str], house: types.SimpleNamespace,
                                                           sees_others: None) -> None:
    """Where all sites run as one user: by SMTP (PHPMailer) dir= finds the hacked one, by mail() there is the user."""
    uploads = site(house.postfix.port)
    house.postfix.wait_messages(1)
    line = said(house.milter, f" dir={uploads} ")
    assert re.search(r"user=www-data uid=\d+ program=(php-fpm\S*|apache2) .* action=tag$", line), line
    site(0)
    message = house.postfix.wait_messages(2)[1]
    assert message.get_all(HEADER) == ["user=www-data program=?"]
    assert message.get_all("X-PHP-Originating-Script") in (None, ["33:PHPMailer.php"])


# --- whom it is not turned into -------------------------------------------------------------------------------------

FORGED = "Received: by mail.example.org (Postfix, from userid 0)\n"
CHECKS = {
    "removed": r"regexp:{{/^Received: by .*from userid/ IGNORE}}",
    "the uid removed": r"regexp:{{/^(Received: by \S+ \(\S+), from userid [0-9]+(\).*)/ REPLACE $$1$$2}}",
    "another above it": r"regexp:{{/^Received: by .*from userid/ PREPEND X-Received: yes}}",
}


@pytest.mark.parametrize("checks", CHECKS)
def test_where_header_checks_change_postfixs_line_the_sender_is_unknown(
        checks: str, make_mail: Callable, mounts: None, users: Any) -> None:
    """A line that the user wrote then comes first, or the mail looks like Postfix's own: nobody is named."""
    mail = make_mail({"main_cf": {**DOORS, "header_checks": CHECKS[checks]}}, unidentified_action="quarantine",
                     blocked_mailusers=["mst-alice"])
    texts = [TEXT, FORGED + TEXT, FORGED + "\tid 4ZTEST; Sat, 1 Jan 2028 00:00:00 +0000\n" + TEXT,
             FORGED.replace(", from userid 0", "") + "\tid 4ZTEST; now\n" + TEXT, f"{HEADER}: user=root\n{TEXT}"]
    for text in texts:
        assert mta.submit(mail.postfix, "mst-alice", text).returncode == 0
    for content in held(mail.postfix, len(texts)):
        assert f"{HEADER}: user=? program=?\n" in content and "user=root" not in content
        looks_own = re.match(r"Received: by \S+ \(Postfix\)\n\tid (?!4ZTEST)", content)
        assert bool(looks_own) == (checks == "the uid removed")
    for n in range(len(texts)):
        assert said(mail.milter, "client=?", n + 1).endswith("action=quarantine reason=unidentified lookup=error")
    assert len(mail.milter.lines("ERROR who called sendmail(1) is not known")) == 1
    assert not mail.postfix.messages()


def test_postfixs_own_mail_passes_and_is_never_held(make_mail: Callable, mounts: None, users: Any) -> None:
    """Bounces and notices that internal_mail_filter_classes shows to milters: nobody's, and without a header."""
    own = {**DOORS, "internal_mail_filter_classes": "bounce, notify", "notify_classes": "bounce",
           "bounce_notice_recipient": f"notice@{mta.DOMAIN}", "virtual_mailbox_maps": "inline:{{to@example.org=inbox/} "
           "{notice@example.org=inbox/} {mst-alice@example.org=inbox/}}"}
    mail = make_mail({"main_cf": own}, allowed_mailusers=["mst-alice"], unidentified_action="quarantine",
                     hourly_limits={"*": 1})
    sent = mta.submit(mail.postfix, "mst-alice", TEXT, "-f", "mst-alice@example.org", "no-one@example.org")
    assert sent.returncode == 0
    bounces = mail.postfix.wait_messages(2)
    assert all("MAILER-DAEMON" in message["From"] and message[HEADER] is None for message in bounces)
    assert not [one for one in mail.postfix.postqueue() if one["queue_name"] == "hold"]
    own_lines = [line.partition("client=")[2] for line in mail.milter.wait_lines("action=pass", 2)]
    assert all(re.fullmatch(r"\? from=\S+ rcpts=1 action=pass", line) for line in own_lines), own_lines


def test_a_client_whose_port_xclient_does_not_say_is_from_afar(make_mail: Callable) -> None:
    """As a proxy before Postfix announces it: that is not sendmail(1), though its port is 0, too."""
    mail = make_mail({"main_cf": DOORS, "services": {"front": {"smtpd_authorized_xclient_hosts": "127.0.0.1"}}},
                     unidentified_action="reject")
    with smtplib.SMTP("127.0.0.1", mail.postfix.ports["front"], "me") as session:
        session.ehlo()
        assert session.docmd("XCLIENT ADDR=192.0.2.77 PORT=[UNAVAILABLE]")[0] == 220
        session.ehlo()
        session.sendmail("from@example.org", ["to@example.org"], TEXT)
    assert mail.postfix.wait_messages(1)[0][HEADER] is None
    assert said(mail.milter, "client=") == "? from=from@example.org rcpts=1 action=pass"


# --- lists: what is refused is held ---------------------------------------------------------------------------------

@pytest.mark.parametrize("action", ["reject", "tempfail", "quarantine", "log"])
def test_a_blocked_users_mail_is_held_or_logged(action: str, make_mail: Callable, mounts: None, users: Any) -> None:
    """Refused, it would come back to a sender that the user makes up; for now, it would be tried again every minute."""
    mail = make_mail({"main_cf": DOORS}, blocked_mailusers=["mst-alice"], blocked_action=action)
    assert mta.submit(mail.postfix, "mst-alice", TEXT, "-f", "victim@example.org", "to@example.org").returncode == 0
    line = said(mail.milter, "from=victim@example.org")
    done = "log" if action == "log" else "quarantine"
    assert line.endswith(f"rcpts=1 action={done} reason=blocked lookup=submitted")
    if action != "log":
        assert f"{HEADER}: user=mst-alice program=?\n" in held(mail.postfix)[0]
        assert not mail.postfix.messages()
        (queue_id,) = [one["queue_id"] for one in mail.postfix.postqueue()]
        assert mail.postfix.run("postsuper", "-H", queue_id).returncode == 0
        mail.postfix.run("postqueue", "-f")
    (message,) = mail.postfix.wait_messages(1)
    assert message["To"] is None and message.get_all(HEADER) == ["user=mst-alice program=?"]


def test_whoever_is_not_allowed_is_held_and_others_pass(make_mail: Callable, mounts: None, users: Any) -> None:
    """allowed_mailusers, by user and by group."""
    mail = make_mail({"main_cf": DOORS}, allowed_mailusers=["@mst-bob"])
    for user in "mst-alice", "mst-bob":
        assert mta.submit(mail.postfix, user, TEXT).returncode == 0
    assert "user=mst-alice" in held(mail.postfix)[0]
    assert said(mail.milter, "user=mst-alice").endswith("action=quarantine reason=not-allowed lookup=submitted")
    assert mail.postfix.wait_messages(1)[0].get_all(HEADER) == ["user=mst-bob program=?"]


def test_one_line_in_the_file_shuts_both_doors(make_mail: Callable, mounts: None, users: Any) -> None:
    """blocked_mailusers_file, read again at the next message."""
    with mta.tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = pathlib.Path(place, "blocked")
        path.write_text("")
        mail = make_mail({"main_cf": DOORS}, blocked_mailusers_file=str(path))
        assert mta.submit(mail.postfix, "mst-bob", TEXT).returncode == 0
        mail.postfix.wait_messages(1)
        path.write_text("mst-bob\n")
        assert mta.submit(mail.postfix, "mst-bob", TEXT).returncode == 0
        assert "550 5.7.1 User mst-bob is blocked" in mta.run_as("mst-bob", mta.smtp(mail.postfix.port)).stdout
        assert "user=mst-bob" in held(mail.postfix)[0]


@pytest.mark.parametrize("action", ["accept", "tempfail", "quarantine", "reject"])
def test_an_unknown_sender_follows_unidentified_action_but_for_refusals(action: str, mounts: None, users: Any,
                                                                        make_milter: Callable) -> None:
    """Here run_as_user may not read the queue; of that the log complains once a minute."""
    milter = make_milter(user="nobody", run_as_user="nobody", unidentified_action=action)
    with mta.Postfix(main_cf={"non_smtpd_milters": f"unix:{milter.socketname}"}) as postfix:
        milter.options["env"].update(PATH=mta.SYSTEM_PATH, MAIL_CONFIG=f"{postfix.directory}/etc")
        os.chmod(milter.start().socketname, 0o666)
        for _ in range(2):
            assert mta.submit(postfix, "mst-alice", TEXT).returncode == 0
        if action == "accept":
            assert [m.get_all(HEADER) for m in postfix.wait_messages(2)] == [["user=? program=?"]] * 2
        else:
            assert all(f"{HEADER}: user=? program=?\n" in content for content in held(postfix, 2))
    end = "tag" if action == "accept" else "quarantine reason=unidentified"
    assert said(milter, "client=?", 2).endswith(f"rcpts=1 action={end} lookup=error")
    assert len(milter.lines("ERROR who called sendmail(1) is not known: ")) == 1


@pytest.mark.parametrize("lines, reason", [([f"{HEADER}: user=root"] * 101, "More than 100"),
                                           ([f"X-A: b\r{HEADER}: user=root"], "behind a bare CR")])
def test_forged_headers_that_cannot_be_removed_have_the_message_held(lines: list[str], reason: str, make_mail: Callable,
                                                                    mounts: None, users: Any) -> None:
    """By SMTP such a message is refused."""
    mail = make_mail({"main_cf": {**DOORS, "cleanup_replace_stray_cr_lf": "no"}})
    text = "".join(line + "\n" for line in lines) + TEXT
    assert mta.submit(mail.postfix, "mst-alice", text.encode()).returncode == 0
    assert len(held(mail.postfix)) == 1 and not mail.postfix.messages()
    assert said(mail.milter, "client=?").endswith("action=quarantine reason=forged lookup=submitted")


# --- limits: both doors together ------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting, period", [("hourly_limits", "an hour"), ("daily_limits", "a day")])
def test_both_doors_have_one_count(setting: str, period: str, make_mail: Callable, mounts: None, users: Any) -> None:
    """Two by SMTP and three by sendmail(1), of five; then either is over the limit, and the other user is not."""
    mail = make_mail({"main_cf": DOORS}, **{setting: {"*": 5}})
    two = ["--to", "to@example.org", "--to", "to2@example.org"]
    assert mta.run_as("mst-alice", mta.smtp(mail.postfix.port, *two)).returncode == 0
    recipients = [f"to{n}@example.org" for n in range(3)]
    text = f"To: {', '.join(recipients)}\n{TEXT}"
    assert mta.submit(mail.postfix, "mst-alice", text, "-t").returncode == 0
    mail.postfix.wait_messages(5)
    assert mta.submit(mail.postfix, "mst-alice", TEXT).returncode == 0
    assert said(mail.milter, "reason=limit").endswith("rcpts=1 action=quarantine reason=limit lookup=submitted")
    assert "user=mst-alice" in held(mail.postfix)[0]
    over = f"450 4.7.1 User mst-alice is over the limit of 5 recipients {period}"
    assert over in mta.run_as("mst-alice", mta.smtp(mail.postfix.port)).stdout
    assert mta.submit(mail.postfix, "mst-bob", TEXT).returncode == 0
    assert len(mail.postfix.wait_messages(6)) == 6
    warnings = [line.partition(" WARNING ")[2] for line in mail.milter.lines(" WARNING user=")]
    assert warnings == [f"user=mst-alice has addressed 5 of 5 recipients {period}",
                        f"user=mst-alice is over the limit of 5 recipients {period}"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Give a clock to turn: .now, in seconds; nothing is logged meanwhile."""
    clock = types.SimpleNamespace(now=1000.0 * 86400)
    monkeypatch.setattr(ms.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(ms, "say", lambda level, text: None)
    return clock


ALICE = ms.Account(1001, 1001, "alice")


@pytest.mark.parametrize("offset", [0, 1800, 3599])
def test_no_day_has_more_than_the_limit(offset: int, clock: types.SimpleNamespace) -> None:
    """Whenever it begins; the next day it goes on."""
    limits, passed = ms.Limits({}, {"*": 50}), []
    clock.now += offset
    for _ in range(400):
        if limits.verdict(ALICE, 1) is None:
            passed.append(clock.now)
        clock.now += 997
    assert max(sum(1 for other in passed if then <= other < then + 86400) for then in passed) == 50
    assert len(passed) > 200 - 50


def test_what_one_limit_refuses_counts_for_neither(clock: types.SimpleNamespace) -> None:
    """Ten an hour and fifteen a day: after the hour five are left of the day."""
    limits = ms.Limits({"*": 10}, {"*": 15})
    assert limits.verdict(ALICE, 10) is None
    assert limits.verdict(ALICE, 1).text == "User alice is over the limit of 10 recipients an hour"
    clock.now += 7200
    assert limits.verdict(ALICE, 6).text == "User alice is over the limit of 15 recipients a day"
    assert limits.verdict(ALICE, 5) is None
    assert limits.verdict(ALICE, 1).text == "User alice is over the limit of 15 recipients a day"
    clock.now += 26 * 3600
    assert limits.verdict(ALICE, 10) is None


def test_each_setting_has_its_own_exceptions(clock: types.SimpleNamespace) -> None:
    """None is no limit, in that setting only; whoever has none is not counted."""
    limits = ms.Limits({"*": 5, 1001: None}, {1001: 7})
    assert limits.verdict(ALICE, 7) is None and limits.verdict(ALICE, 1).reason == "limit"
    other = ms.Account(1002, 1002, "bob")
    assert limits.verdict(other, 5) is None and limits.verdict(other, 1).reason == "limit"
    assert set(limits.counts) == {(1001, 3600), (1002, 60)}


def test_a_days_memory_is_bounded(clock: types.SimpleNamespace) -> None:
    """25 steps each, of 20,000 counts at most."""
    limits = ms.Limits({"*": 10 ** 9}, {"*": 10 ** 9})
    for _ in range(200):
        clock.now += 1800
        limits.verdict(ALICE, 1)
    assert len(limits.counts[1001, 3600]) <= 26
    for uid in range(11000):
        limits.verdict(ms.Account(uid, uid), 1)
    assert len(limits.counts) == 2 * ms.MOST_REMEMBERED


def test_a_limit_for_a_user_who_does_not_exist_is_a_warning(make_milter: Callable, users: Any) -> None:
    """And counts once there is one, by his name."""
    with make_milter(hourly_limits={"mst-gone": 1}, daily_limits={"mst-lost": 1}) as milter:
        assert milter.lines("WARNING hourly_limits: mst-gone is not found")
        assert milter.lines("WARNING daily_limits: mst-lost is not found")
    limits = ms.Limits({"mst-gone": 1}, {})
    assert limits.verdict(ms.Account(59999, 59999, "mst-gone"), 2).reason == "limit"


# --- bad input ------------------------------------------------------------------------------------------------------

def record(kind: str, data: "str | bytes" = b"") -> bytes:
    """Write one record as Postfix does."""
    data = data.encode() if isinstance(data, str) else data
    size, digits = len(data), b""
    while True:
        digits += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
        size >>= 7
        if not size:
            return kind.encode() + digits + data


ENVELOPE = record("C", " " * 95) + record("T", "1 2") + record("A", "rewrite_context=local") + record("S", "x" * 300)
QUEUE_ID = "4ZTESTz1"


def top(first: str = "Received: by mail (Postfix, from userid 1001)", second: str = f"\tid {QUEUE_ID}; now") -> bytes:
    """Begin the message with these lines, as pickup(8) does."""
    return record("M") + record("N", first) + record("N", second)


TOP = top()
REST = record("N", TEXT) + record("X") + record("E")


@pytest.fixture
def queue(tmp_path: pathlib.Path) -> Callable[[bytes], Optional[ms.ClientSocket]]:
    """Read the submitter from a queue file with this content."""
    (tmp_path / "incoming").mkdir()

    def read(content: bytes) -> Optional[ms.ClientSocket]:
        (tmp_path / "incoming" / QUEUE_ID).write_bytes(content)
        return ms.read_submitter(QUEUE_ID, str(tmp_path))
    return read


UNKNOWN = ms.ClientSocket(None, "error")


def test_a_queue_file_that_ends_early_is_nobodys(queue: Callable) -> None:
    """At each byte of it; a header that is complete is enough."""
    content = ENVELOPE + TOP + REST
    enough = len(ENVELOPE + TOP)
    for size in range(len(content)):
        assert queue(content[:size]) == (UNKNOWN if size < enough else ms.ClientSocket(1001)), size


POINTER = "%15d"


@pytest.mark.parametrize("content", [
    b"", b"\0" * 1000, b"N" + b"\xff" * 5000, ENVELOPE + b"R\xff\xff\xff\x7f" + TOP, ENVELOPE + REST,
    record("p", POINTER % 17) * 3, record("p", POINTER % 0) + record("p", "junk"), record("p", POINTER % -5),
    record("p", POINTER % (1 << 50)), record("M") + record("p", POINTER % 2),
    ENVELOPE + top(second="\tid 4ZTESTz2; now") + REST, ENVELOPE + top(second=f" id {QUEUE_ID}; now") + REST,
    ENVELOPE + top(second=f"X: \tid {QUEUE_ID}; now") + REST, ENVELOPE + top("Received: by mail (Postfix)") + REST,
    ENVELOPE + top("Received: from mail (Postfix, from userid 1001)") + REST,
    ENVELOPE + top("Received: by mail (Postfix, from userid -1)") + REST,
    ENVELOPE + top("X: Received: by mail (Postfix, from userid 1001)") + REST,
    ENVELOPE + record("M") + record("N", "X: y") + TOP[2:] + REST])
def test_a_queue_file_that_is_none_is_nobodys(content: bytes, queue: Callable) -> None:
    """And is read in no time: records longer than the file, pointers in a circle or to nowhere."""
    assert queue(content) == UNKNOWN


def test_postfixs_own_mail_is_told_by_its_envelope(queue: Callable) -> None:
    """post_mail(3) marks it with an attribute, which postdrop(1) takes from users."""
    own = record("A", "log_message_origin=local")
    plain = top("Received: by mail (Postfix)")
    assert queue(ENVELOPE + own + plain + REST) is ms.REMOTE
    assert queue(ENVELOPE + record("F", own + plain) + plain + REST) == UNKNOWN
    assert queue(ENVELOPE + own + TOP + REST) == ms.ClientSocket(1001)


def test_only_files_of_messages_are_read(tmp_path: pathlib.Path, queue: Callable) -> None:
    """No path for an id, no link, no FIFO (which would keep us waiting), no directory."""
    assert queue(ENVELOPE + TOP + REST) == ms.ClientSocket(1001)
    path = tmp_path / "incoming" / QUEUE_ID
    for name in f"../incoming/{QUEUE_ID}", f"./{QUEUE_ID}", "", "None", QUEUE_ID + "\n", "4ZGONEz1", QUEUE_ID + "\0":
        queue(ENVELOPE + top(second=f"\tid {name}; now") + REST)
        assert ms.read_submitter(name, str(tmp_path)) == UNKNOWN
    path.rename(tmp_path / "elsewhere")
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path), path.mkdir):
        make()
        assert ms.read_submitter(QUEUE_ID, str(tmp_path)) == UNKNOWN
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert ms.read_submitter(QUEUE_ID, "") == UNKNOWN and ms.read_submitter(QUEUE_ID, "/no/such") == UNKNOWN


def test_a_file_that_is_not_ours_is_nobodys(make_milter: Callable) -> None:
    """Not the mail owner's; the mail goes on, and of ten such messages one complaint is logged."""
    milter = make_milter(user="postfix")
    for name in "incoming", "maildrop":
        (milter.directory / name).mkdir()
    with milter:
        path = milter.directory / "incoming" / QUEUE_ID
        path.write_bytes(ENVELOPE + TOP + REST)
        for _ in range(10):
            with mta.Wire(milter.socketname) as wire:
                wire.connect("127.0.0.1", 0)
                assert wire.message(queue_id=QUEUE_ID)[0] == ("addheader", HEADER, "user=? program=?")
        os.chown(path, mta.pwd.getpwnam("postfix").pw_uid, -1)
        with mta.Wire(milter.socketname) as wire:
            wire.connect("127.0.0.1", 0)
            assert wire.message(queue_id=QUEUE_ID)[0] == ("addheader", HEADER, "user=1001 program=?")
        assert len(milter.lines("ERROR who called sendmail(1) is not known")) == 1


def test_a_fault_of_ours_keeps_nothing_in_maildrop(make_milter: Callable, tmp_path: pathlib.Path) -> None:
    """Where deciding fails a blocked user's mail is held, not deferred."""
    script = tmp_path / "broken.py"
    script.write_text(mta.SCRIPT.read_text().replace("sender = self.identify()", "sender = self.no_such()"))
    milter = make_milter(user="postfix", script=script, blocked_mailusers=[1001], unidentified_action="tempfail")
    for name in "incoming", "maildrop":
        (milter.directory / name).mkdir()
    with milter:
        path = milter.directory / "incoming" / QUEUE_ID
        path.write_bytes(ENVELOPE + TOP + REST)
        os.chown(path, mta.pwd.getpwnam("postfix").pw_uid, -1)
        for queue_id, reason in (QUEUE_ID, "blocked"), ("4ZGONEz1", "unidentified"):
            with mta.Wire(milter.socketname) as wire:
                wire.connect("127.0.0.1", 0)
                replies = wire.message(queue_id=queue_id)
            assert replies[-1] == ("continue",) and "quarantine" in [reply[0] for reply in replies]
            assert f"action=quarantine reason={reason}" in milter.wait_lines(f"{queue_id}: client=?")[0]


# --- --check --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("user, state, end", [("postfix", "ok  ", ""), ("nobody", "warn", ": cannot be read")])
def test_check_says_whether_the_queue_can_be_read(user: str, state: str, end: str, root: None) -> None:
    """As the user that the milter will be."""
    with mta.Postfix() as postfix:
        os.chmod(f"{postfix.directory}/queue/private", 0o777)
        milter = mta.Milter(postfix, args=["--check"], run_as_user=user)
        milter.run()
        assert f"{state}  users: of sendmail(1), from {postfix.directory}/queue/incoming{end}" in milter.lines()
