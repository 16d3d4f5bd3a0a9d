# SPDX-License-Identifier: MIT
"""The doors by which local mail comes into a real Postfix, and the programs that come in by them."""

from __future__ import annotations

import base64
import grp
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import types
from typing import Any, Callable, Iterator, Sequence

import pytest

from mta import (DOMAIN, PYTHON, SYSTEM_PATH, Milter, Postfix, as_user, can_see_others, free_port, has_ipv6, identity,
                 run_as, smtp, tag, wait_for)

HEADER = "X-Sender-Process-Info"
MILTER = "{ unix:private/milter.sock, default_action=accept }"


# --- one Postfix with every door --------------------------------------------------------------------------------

def make_certificate(directory: pathlib.Path) -> dict[str, str]:
    """Make a certificate that is its own authority; give the smtpd parameters that name it."""
    paths = [f"{directory}/{name}.pem" for name in ("key", "certificate")]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-subj", f"/CN=mail.{DOMAIN}", "-keyout", paths[0], "-out", paths[1]],
                   check=True, capture_output=True)
    return dict(zip(("smtpd_tls_key_file", "smtpd_tls_cert_file"), paths))


def serve_auth(listener: socket.socket) -> None:
    """Let everyone in who says PLAIN, in the protocol of Dovecot's auth-client socket, until it is shut."""
    def one(sock: socket.socket) -> None:
        with sock, sock.makefile("rw") as lines:
            lines.write("VERSION\t1\t1\nMECH\tPLAIN\tplaintext\nSPID\t1\nCUID\t1\nCOOKIE\t0\nDONE\n")
            lines.flush()
            for line in lines:
                word, number, *rest = line.rstrip("\n").split("\t")
                if word == "AUTH":
                    response = next(item[5:] for item in rest if item.startswith("resp="))
                    name = base64.b64decode(response).split(b"\0")[1].decode()
                    lines.write(f"OK\t{number}\tuser={name}\n")
                    lines.flush()
    while True:
        try:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()
        except OSError:
            return


RELAY = """
import socket, sys, threading
def pump(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
while True:
    near = listener.accept()[0]
    far = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    threading.Thread(target=pump, args=(near, far), daemon=True).start()
    threading.Thread(target=pump, args=(far, near), daemon=True).start()
"""  # what a content filter is to the milter: a program of its own user that hands the mail on by SMTP


@pytest.fixture(scope="module")
def house(users: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.SimpleNamespace]:
    """Start a Postfix with ports like 25, 587 and 465, and with content filters that run as mst-bob."""
    tls = {**make_certificate(tmp_path_factory.mktemp("tls")), "smtpd_sasl_auth_enable": "yes",
           "smtpd_sasl_type": "dovecot", "smtpd_sasl_path": "private/auth", "smtpd_sasl_authenticated_header": "yes",
           "smtpd_tls_received_header": "yes"}
    filters = {name: free_port() for name in ("off", "on")}
    services = {
        "submission": {**tls, "smtpd_tls_security_level": "encrypt", "smtpd_recipient_restrictions":
                       "permit_sasl_authenticated, reject", "smtpd_relay_restrictions": ""},
        "smtps": {**tls, "smtpd_tls_wrappermode": "yes", "smtpd_recipient_restrictions":
                  "permit_sasl_authenticated, reject", "smtpd_relay_restrictions": ""},
        **{f"to-{name}": {"content_filter": f"scan:[127.0.0.1]:{port}"} for name, port in filters.items()},
        "back-off": {"content_filter": "", "smtpd_milters": ""}, "back-on": {"content_filter": ""},
        "back-no": {"content_filter": "", "receive_override_options": "no_milters"},
        "proxied": {"smtpd_proxy_filter": f"127.0.0.1:{filters['off']}"}}
    relays: list[subprocess.Popen] = []
    listener = socket.socket(socket.AF_UNIX)
    with Postfix(main_cf={"non_smtpd_milters": MILTER}, services=services,
                 master=["scan unix - - n - - smtp -o disable_dns_lookups=yes"]) as postfix, Milter(postfix) as milter:
        try:
            for name, port in filters.items():
                relays.append(as_user("mst-bob", [PYTHON, "-c", RELAY, str(port), str(postfix.ports[f"back-{name}"])]))
                assert relays[-1].stdout.readline() == "ready\n"
            listener.bind(f"{postfix.directory}/queue/private/auth")
            os.chmod(f"{postfix.directory}/queue/private/auth", 0o666)
            listener.listen()
            serving = threading.Thread(target=serve_auth, args=(listener,), daemon=True)
            serving.start()
            yield types.SimpleNamespace(postfix=postfix, milter=milter)
            listener.shutdown(socket.SHUT_RDWR)  # closed, it would go on to accept on whatever has its number next
            serving.join()
        finally:
            listener.close()
            for relay in relays:
                relay.kill()
                relay.communicate()


@pytest.fixture
def doors(house: types.SimpleNamespace) -> Iterator[types.SimpleNamespace]:
    """Give that Postfix and milter with an empty mailbox."""
    house.postfix.forget_messages()
    yield house
    assert "Traceback" not in house.milter.log()


def headers(postfix: Postfix, n: int = 1) -> list[list[str]]:
    """Wait for n messages and give the headers of our name of each."""
    return [message.get_all(HEADER, []) for message in postfix.wait_messages(n)]


# --- ports 25, 587 and 465 --------------------------------------------------------------------------------------

SMTPLIB = """
import smtplib, ssl, sys
kind, port = sys.argv[1], int(sys.argv[2])
context = ssl._create_unverified_context()
where = "127.0.0.1", port, "client"  # its own name: else it is looked up
session = smtplib.SMTP_SSL(*where, context=context) if kind == "smtps" else smtplib.SMTP(*where)
with session:
    session.ehlo()
    if kind == "submission":
        session.starttls(context=context)
        session.ehlo()
    if kind != "smtp":
        session.login("somebody.else", "secret")
    session.sendmail("from@example.org", ["to@example.org"], "Subject: smtplib\\n\\nbody\\n")
"""


@pytest.mark.parametrize("kind", ["smtp", "submission", "smtps"])
def test_every_port_names_the_system_user_whatever_sasl_says(kind: str, doors: types.SimpleNamespace) -> None:
    """Port 25; 587 with STARTTLS and AUTH; 465 with TLS at once: the SASL login is in Received only."""
    sent = run_as("mst-alice", [PYTHON, "-c", SMTPLIB, kind, str(doors.postfix.ports.get(kind, doors.postfix.port))])
    assert sent.returncode == 0, sent.stderr + doors.postfix.log()
    assert headers(doors.postfix) == [[tag("mst-alice", "python3")]]
    received = doors.postfix.messages()[0]["Received"]
    assert ("somebody.else" in received and "using TLS" in received) == (kind != "smtp")


def test_two_clients_with_one_local_port_on_two_services_are_told_apart(doors: types.SimpleNamespace) -> None:
    """The connection's own server port is part of the question."""
    ports = doors.postfix.port, doors.postfix.ports["back-on"]
    with as_user("mst-alice", smtp(ports[0], "--wait", "--bind", "127.0.0.1")) as alice:
        local = wait_for(lambda: [line for line in [alice.stdout.readline()] if "connected" in line])[0].split()[1]
        with as_user("mst-bob", smtp(ports[1], "--wait", "--bind", "127.0.0.1", "--bind-port", local)) as bob:
            wait_for(lambda: "connected" in bob.stdout.readline())
            alice.communicate("\n", timeout=30)
            assert headers(doors.postfix) == [[tag("mst-alice", "python3")]]
            bob.communicate("\n", timeout=30)
            assert headers(doors.postfix, 2)[1] == [tag("mst-bob", "python3")]


# --- doors without an SMTP client -------------------------------------------------------------------------------

def test_mail_that_is_put_back_into_the_queue_keeps_its_header(make_mail: Callable, users: Any) -> None:
    """postsuper -r, after a hold: nobody is looked up by a port that may be somebody else's by now."""
    mail = make_mail({"main_cf": {"non_smtpd_milters": MILTER}}, blocked_mailusers=["mst-alice"],
                     blocked_action="quarantine")
    assert run_as("mst-alice", smtp(mail.postfix.port)).returncode == 0
    held = wait_for(lambda: [one for one in mail.postfix.postqueue() if one["queue_name"] == "hold"])[0]["queue_id"]
    mail.postfix.run("postsuper", "-r", held)
    mail.postfix.run("postqueue", "-f")
    assert headers(mail.postfix) == [[tag("mst-alice", "python3")]]


# --- content filters --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("after, user, program", [("off", "mst-alice", "python3"), ("on", "mst-bob", "python3")])
def test_behind_a_content_filter_the_header_depends_on_the_listener_it_comes_back_to(
        after: str, user: str, program: str, doors: types.SimpleNamespace) -> None:
    """Milter off there: the sender's header stays. Left on: the truth about that hop, which is the filter's."""
    assert run_as("mst-alice", smtp(doors.postfix.ports[f"to-{after}"])).returncode == 0
    assert headers(doors.postfix) == [[tag(user, program)]]


def test_no_milters_leaves_a_listener_alone_as_well(doors: types.SimpleNamespace) -> None:
    """receive_override_options = no_milters; a header that came with the message stays."""
    run_as("mst-bob", smtp(doors.postfix.ports["back-no"], "--header", f"{HEADER}: user=mst-alice program=web"))
    assert headers(doors.postfix) == [["user=mst-alice program=web"]]


def test_a_before_queue_filter_hides_the_message_from_the_milter(doors: types.SimpleNamespace) -> None:
    """smtpd_proxy_filter: Postfix shows milters no message there, so no header and no log line."""
    seen = len(doors.milter.lines("action="))
    assert run_as("mst-alice", smtp(doors.postfix.ports["proxied"])).returncode == 0
    assert headers(doors.postfix) == [[]]
    assert len(doors.milter.lines("action=")) == seen


# --- what else listens ------------------------------------------------------------------------------------------

POSTSCREEN = ["smtpd pass - - n - - smtpd", "dnsblog unix - - n - 0 dnsblog", "tlsproxy unix - - n - 0 tlsproxy"]


@pytest.mark.parametrize("access", ["permit_mynetworks", ""], ids=["local clients let through", "everybody tested"])
def test_behind_postscreen_the_client_is_named(access: str, users: Any) -> None:
    """It hands the connection on to smtpd, at once or after it has waited for whoever talks before the greeting."""
    port = free_port()
    settings = {"postscreen_access_list": access, "postscreen_greet_wait": "1s", "postscreen_cache_map": ""}
    with Postfix(main_cf=settings, master=[f"{port} inet n - n - 1 postscreen", *POSTSCREEN]) as postfix, \
            Milter(postfix):
        for n, user in enumerate(("mst-alice", "mst-bob"), 1):
            assert run_as(user, smtp(port)).returncode == 0, postfix.log()
            assert headers(postfix, n)[-1] == [tag(user, "python3")]
        wait_for(lambda: ("PASS NEW" if not access else "ALLOWLISTED") in postfix.log().replace("WHITE", "ALLOW"))


UNIX_CLIENT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
lines = sock.makefile("rw", newline="\\r\\n")
print(lines.readline())
for line in ["HELO client", "MAIL FROM:<from@example.org>", "RCPT TO:<to@example.org>", "DATA",
             "Subject: unix\\r\\n\\r\\nbody\\r\\n.", "QUIT"]:
    lines.write(line + "\\r\\n")
    lines.flush()
    print(lines.readline())
"""


@pytest.mark.parametrize("action, reply", [("accept", "250 2.0.0 Ok: queued"), ("reject", "550 5.7.1 Sender process")])
def test_on_a_unix_socket_of_the_mtas_the_client_is_unknown(action: str, reply: str, make_mail: Callable,
                                                            users: Any) -> None:
    """The MTA has no address to announce; unidentified_action applies."""
    mail = make_mail({"master": ["smtpsock unix n - n - - smtpd"]}, unidentified_action=action)
    path = f"{mail.postfix.directory}/queue/public/smtpsock"
    may_enter = {**identity("mst-alice"), "extra_groups": [grp.getgrnam("postdrop").gr_gid]}
    sent = subprocess.run([PYTHON, "-c", UNIX_CLIENT, path], capture_output=True, text=True, timeout=60, **may_enter)
    assert reply in sent.stdout, sent.stdout + sent.stderr
    assert mail.milter.wait_lines("action=")[0].endswith(" lookup=closed")
    if action == "accept":
        assert headers(mail.postfix) == [["user=? program=?"]]


# --- one connection, announced more than once -------------------------------------------------------------------

XCLIENT = """
import smtplib, sys
with smtplib.SMTP("127.0.0.1", int(sys.argv[1]), "client") as session:
    session.ehlo()
    for name in "one", "two", "three", "four", "five":
        assert session.docmd("XCLIENT NAME=" + name + ".example.org")[0] == 220
        session.ehlo()
        session.sendmail("from@example.org", ["to@example.org"], "Subject: " + name + "\\n\\nbody\\n")
"""


def test_a_client_that_is_announced_again_under_another_name_is_named(make_mail: Callable, users: Any) -> None:
    """XCLIENT NAME= leaves its address and port as they are."""
    mail = make_mail({"main_cf": {"smtpd_authorized_xclient_hosts": "127.0.0.1"}})
    sent = run_as("mst-alice", [PYTHON, "-c", XCLIENT, str(mail.postfix.port)])
    assert sent.returncode == 0, sent.stderr + mail.postfix.log()
    assert headers(mail.postfix, 5) == [[tag("mst-alice", "python3")]] * 5


def test_where_the_milter_is_listed_twice_each_message_is_named_once(make_mail: Callable, users: Any) -> None:
    """The second one removes the first one's header as it does any other's, and writes its own."""
    mail = make_mail({"main_cf": {"smtpd_milters": f"{MILTER}, {MILTER}"}}, blocked_mailusers=["mst-bob"])
    assert run_as("mst-alice", smtp(mail.postfix.port, "--messages", "20")).returncode == 0
    assert headers(mail.postfix, 20) == [[tag("mst-alice", "python3")]] * 20
    assert "550 5.7.1 User mst-bob is blocked" in run_as("mst-bob", smtp(mail.postfix.port)).stdout


def test_where_the_milter_is_listed_twice_neither_session_takes_the_other_for_a_stranger(
        make_mail: Callable, users: Any, sees_others: None) -> None:
    """One of them waits for a helper that hangs, and takes note of the message later than the other."""
    mail = make_mail({"main_cf": {"smtpd_milters": f"{MILTER}, {MILTER}"}}, unidentified_action="reject")
    (helper,) = mail.milter.helper_pids()
    os.kill(helper, signal.SIGSTOP)
    try:
        assert run_as("mst-alice", smtp(mail.postfix.port)).returncode == 0, mail.milter.log()
    finally:
        os.kill(helper, signal.SIGCONT)
    assert len(mail.milter.wait_lines(" user=mst-alice ", 2)) == 2


# --- only local clients, and other milters ----------------------------------------------------------------------

def test_smtpd_milter_maps_keeps_remote_mail_away_from_the_milter(make_mail: Callable, users: Any,
                                                                  tmp_path: pathlib.Path) -> None:
    """127.0.0.2 stands for a remote client: as main.cf.example says, only the addresses in the table see the milter."""
    table = tmp_path / "milter_local.cidr"
    table.write_text(f"127.0.0.1/32 {MILTER}\n::1/128 {MILTER}\n")
    mail = make_mail({"main_cf": {"smtpd_milters": "", "smtpd_milter_maps": f"cidr:{table}"}})
    local = ["127.0.0.1", *["::1"] * has_ipv6()]
    for n, address in enumerate(local, 1):
        run_as("mst-alice", smtp(mail.postfix.port, "--dial", address))
        assert headers(mail.postfix, n)[-1] == [tag("mst-alice", "python3")]
    run_as("mst-alice", smtp(mail.postfix.port, "--bind", "127.0.0.2"))
    assert headers(mail.postfix, len(local) + 1)[-1] == []
    assert len(mail.milter.lines("action=")) == len(local)


SIGNER = """
import sys, Milter
class Signer(Milter.Base):
    def __init__(self): self.names = []
    def header(self, name, value):
        self.names.append(name)
        return Milter.CONTINUE
    def eom(self):
        self.addheader("DKIM-Signature", "h=" + ":".join(self.names))
        return Milter.CONTINUE
Milter.factory = Signer
Milter.set_flags(Milter.ADDHDRS)
Milter.runmilter("signer", sys.argv[1], 60)
"""


@pytest.mark.parametrize("order, signed", [("milter signer", True), ("signer milter", False)])
def test_a_signer_sees_the_header_only_if_it_comes_after_the_milter(order: str, signed: bool, make_mail: Callable,
                                                                     users: Any) -> None:
    """What comes after also lets a forged header be signed that the milter then removes."""
    milters = ", ".join("{ unix:private/%s.sock, default_action=tempfail }" % name for name in order.split())
    mail = make_mail({"main_cf": {"smtpd_milters": milters}})
    path = f"{mail.postfix.directory}/queue/private/signer.sock"
    with subprocess.Popen([PYTHON, "-c", SIGNER, path], **identity("postfix")) as signer:
        try:
            wait_for(lambda: os.path.exists(path), what="the signer's socket")
            client = smtp(mail.postfix.port, "--header", f"{HEADER}: user=root")
            wait_for(lambda: run_as("mst-alice", client).returncode == 0, what="the signer")
        finally:
            signer.kill()
    message = mail.postfix.wait_messages(1)[0]
    assert message.get_all(HEADER) == [tag("mst-alice", "python3")]
    assert message["DKIM-Signature"].count(HEADER) == 1  # first: ours. second: the forged one, which is gone
    assert message["DKIM-Signature"].endswith(HEADER) == signed


# --- programs ---------------------------------------------------------------------------------------------------

PERL = """
use Net::SMTP;
my $smtp = Net::SMTP->new("127.0.0.1", Port => $ARGV[0], Timeout => 30) or die;
$smtp->mail("from\\@example.org") && $smtp->to("to\\@example.org") && $smtp->data("Subject: perl\\n\\nbody\\n") or die;
$smtp->quit;
"""
NODE = """
const lines = ["EHLO client", "MAIL FROM:<from@example.org>", "RCPT TO:<to@example.org>", "DATA",
               "Subject: node\\r\\n\\r\\nbody\\r\\n.", "QUIT"];
const sock = require("net").connect(process.argv[1], "127.0.0.1");
sock.on("data", data => { if (/^\\d{3} .*\\r\\n$/m.test(data) && lines.length) sock.write(lines.shift() + "\\r\\n"); });
"""
BASH = r"""
exec 3<>/dev/tcp/127.0.0.1/$0 || exit
reply() { while read -r line <&3; do [ "${line:3:1}" = - ] || { [[ $line = [23]* ]]; return; }; done; false; }
reply
for word in 'EHLO client' 'MAIL FROM:<from@example.org>' 'RCPT TO:<to@example.org>' \
    DATA $'Subject: bash\r\n\r\nbody\r\n.'
do printf '%s\r\n' "$word" >&3; reply || exit; done
"""  # ends as soon as its message is taken, without QUIT
PHP = r"""<?php
function reply($s) { do { $l = fgets($s, 512); } while (substr($l, 3, 1) == "-"); return (int)$l; }
function say($s, $text) {
    fwrite($s, "$text\r\n");
    $code = reply($s);
    if ($code >= 400 || !$code) { exit("$text: $code\n"); }
}
$port = (int)($argv[1] ?? $_SERVER["QUERY_STRING"]);
$s = fsockopen("127.0.0.1", $port, $errno, $error, 30);
reply($s);
say($s, "EHLO client");
say($s, "STARTTLS");
stream_context_set_option($s, ["ssl" => ["verify_peer" => false, "verify_peer_name" => false]]);
stream_socket_enable_crypto($s, true, STREAM_CRYPTO_METHOD_TLS_CLIENT) || exit("TLS\n");
say($s, "EHLO client");
say($s, "AUTH PLAIN " . base64_encode("\0shop\0secret"));
say($s, "MAIL FROM:<from@example.org>");
say($s, "RCPT TO:<to@example.org>");
say($s, "DATA");
say($s, "Subject: php\r\n\r\nbody\r\n.");
say($s, "QUIT");
echo "sent";
"""  # as PHPMailer does it: EHLO, STARTTLS, EHLO again, AUTH
MESSAGE = "From: from@example.org\nTo: to@example.org\nSubject: test\n\nbody\n"
PROGRAMS: dict[str, Callable[[Postfix], Sequence[str]]] = {
    "bash": lambda postfix: ["bash", "-c", BASH, str(postfix.port)],
    "curl": lambda postfix: ["curl", "-sS", f"smtp://127.0.0.1:{postfix.port}", "--mail-from", "from@example.org",
                             "--mail-rcpt", "to@example.org", "-T", "-"],
    "msmtp": lambda postfix: ["msmtp", "--host=127.0.0.1", f"--port={postfix.port}", "--from=from@example.org",
                              "to@example.org"],
    "node": lambda postfix: ["node", "-e", NODE, str(postfix.port)],
    "perl": lambda postfix: ["perl", "-e", PERL, str(postfix.port)],
    "php": lambda postfix: ["php", "-r", PHP[5:], str(postfix.ports["submission"])],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_named(program: str, doors: types.SimpleNamespace) -> None:
    """As people run them, by the name that the process table has, and in the log by their file as well."""
    if not shutil.which(program, path=SYSTEM_PATH):
        pytest.skip(f"{program} is not installed")
    sent = run_as("mst-alice", PROGRAMS[program](doors.postfix), input=MESSAGE, env={"PATH": SYSTEM_PATH, "HOME": "/"})
    assert sent.returncode == 0, sent.stderr
    names = [program, "MainThread"] if program == "node" else [program]  # Node names its threads, the recent ones
    assert headers(doors.postfix) in [[[tag("mst-alice", name)]] for name in names]
    if can_see_others():
        path = os.path.realpath(shutil.which(program, path=SYSTEM_PATH))
        assert f" exe={path} " in doors.milter.wait_lines("action=tag")[-1]


def test_processes_that_live_for_milliseconds_are_named(doors: types.SimpleNamespace) -> None:
    """Fifty, as cron starts them, of two users at the same time; each ends when its message is taken."""
    seen = len(doors.milter.lines("action="))
    loop = "for n in {1..25}; do bash -c \"$0\" $1 & [ $((n % 5)) != 0 ] || wait; done; wait"
    with as_user("mst-alice", ["bash", "-c", loop, BASH, str(doors.postfix.port)]) as alice:
        assert run_as("mst-bob", ["bash", "-c", loop, BASH, str(doors.postfix.port)]).returncode == 0
        alice.communicate(timeout=60)
    users = sorted(found[0].partition(" ")[0] for found in headers(doors.postfix, 50))
    assert users == 25 * ["user=mst-alice"] + 25 * ["user=mst-bob"]
    lines = doors.milter.wait_lines("action=", seen + 50)[seen:]
    slow = "lookup=not-permitted", "lookup=timeout", "lookup=busy"  # the machine, not the process's short life
    assert [line for line in lines if " program=bash " not in line and not line.endswith(slow)] == []


# --- the socket in the wrong place or with the wrong mode: the lines that README.md's Troubleshooting quotes -----

def spoil(socketname: str, fault: str) -> None:
    """Take the milter's socket away, leave one that nobody serves, or shut smtpd out of it."""
    pathlib.Path(socketname).unlink(missing_ok=True)
    if fault != "No such file or directory":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(socketname)
        os.chmod(socketname, 0o600 if fault == "Permission denied" else 0o666)


@pytest.mark.parametrize("action, reply", [("accept", "250 2.0.0"), ("tempfail", "451 4.7.1 Service unavailable")])
def test_mail_passes_or_waits_without_a_milter_and_the_log_says_why(action: str, reply: str, users: Any) -> None:
    """default_action decides: accept lets the mail pass untagged, tempfail defers it."""
    faults = "No such file or directory", "Connection refused", "Permission denied"
    with Postfix(main_cf={"smtpd_milters": MILTER.replace("accept", action)}) as postfix:
        for fault in faults:
            spoil(postfix.socketname, fault)
            assert reply in run_as("mst-alice", smtp(postfix.port)).stdout
            line = f"warning: connect to Milter service unix:private/milter.sock: {fault}"
            wait_for(lambda: line in postfix.log(), what=line)
        assert not any(headers(postfix, 3 if action == "accept" else 0))
