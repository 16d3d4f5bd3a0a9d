# SPDX-License-Identifier: MIT
"""The milter behind a real Sendmail, with the lines that README.md gives for sendmail.mc."""

from __future__ import annotations

import pathlib
import smtplib
import socket
import subprocess
from typing import Iterator

import pytest

from mta import PYTHON, Milter, as_user, free_port, has_ipv6, run_as, smtp, tag, wait_for
from sendmail import Sendmail

HEADER = "X-Sender-Process-Info"
BACK = free_port()  # where a content filter would hand mail back


@pytest.fixture(scope="session")
def possible(users: object) -> None:
    """Skip where Sendmail cannot run."""
    if reason := Sendmail.missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def shared(possible: None) -> Iterator[Sendmail]:
    """Start one Sendmail on 127.0.0.1 and ::1; each test starts its own milter on its socket."""
    back = f"DAEMON_OPTIONS(`Name=MTA-back, Port={BACK}, Addr=127.0.0.1, InputMailFilters=')dnl"
    with Sendmail(listen=("127.0.0.1", "::1") if has_ipv6() else ("127.0.0.1",), lines=[back]) as one:
        yield one


@pytest.fixture
def sendmail(shared: Sendmail) -> Sendmail:
    """Give the shared Sendmail with no mail in it."""
    shared.forget_messages()
    return shared


def headers(sendmail: Sendmail, n: int = 1) -> list[list[str]]:
    """Wait for n messages and give the headers of our name of each."""
    return [message.get_all(HEADER, []) for message in sendmail.wait_messages(n)]


def replies(user: str, sendmail: Sendmail, *options: str) -> str:
    """Send a message as that user and give what Sendmail replied."""
    return run_as(user, smtp(sendmail.port, *options)).stdout


def submit(user: str, sendmail: Sendmail, *options: str, header: str = "Subject: test") -> int:
    """Send a message through sendmail(1) as that user and give its exit status."""
    argv = [sendmail.program, "-i", *options, "to@example.org"]
    return sendmail.run_as(user, argv, input=f"{header}\n\nbody\n").returncode


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_mail_by_smtp_is_tagged_with_user_and_program(address: str, sendmail: Sendmail) -> None:
    """Sendmail listens on this one address, over IPv4 and IPv6."""
    if address not in sendmail.listen:
        pytest.skip("no IPv6 here")
    with Milter(sendmail.directory):
        replies("mst-alice", sendmail, "--dial", address)
        assert headers(sendmail) == [[tag("mst-alice", "python3")]]


@pytest.mark.parametrize("listen, addresses", [("0.0.0.0", ("127.0.0.1", "127.0.0.5")), ("::", ("127.0.0.1", "::1"))])
def test_where_it_listens_on_all_addresses_mail_is_tagged_all_the_same(
        listen: str, addresses: tuple, possible: None) -> None:
    """The macro {daemon_addr} is 0.0.0.0 or :: there, which is not the server's end of any connection."""
    if listen == "::" and not has_ipv6():
        pytest.skip("no IPv6 here")
    with Sendmail(listen=(listen,)) as sendmail, Milter(sendmail.directory):
        for n, (user, address) in enumerate(zip(("mst-alice", "mst-bob"), addresses), 1):
            replies(user, sendmail, "--dial", address)
            assert headers(sendmail, n)[-1] == [tag(user, "python3")]


def test_a_client_that_sendmail_cannot_tell_from_another_is_unknown(possible: None) -> None:
    """Two clients with one address and port, to two addresses of one Sendmail that listens on all."""
    with Sendmail(listen=("0.0.0.0",)) as sendmail, Milter(sendmail.directory):
        with as_user("mst-alice", smtp(sendmail.port, "--wait", "--bind", "127.0.0.1")) as first:
            port = wait_for(lambda: [line for line in [first.stdout.readline()] if "connected" in line])[0].split()[1]
            replies("mst-bob", sendmail, "--dial", "127.0.0.5", "--bind", "127.0.0.1", "--bind-port", port)
            assert headers(sendmail) == [["user=? program=?"]]
            first.communicate("\n", timeout=30)
        assert headers(sendmail, 2)[-1] == [tag("mst-alice", "python3")]


def test_forged_headers_are_removed_in_every_spelling_sendmail_accepts(sendmail: Sendmail) -> None:
    """It takes white space before the colon, and any case."""
    forged = [f"{name}: user=root" for name in (HEADER, HEADER + " ", HEADER + "\t", HEADER.lower(), HEADER.upper(),
                                                "x-sENDER-process-info \t ", HEADER + "\x0b", HEADER + "\x0c")]
    with Milter(sendmail.directory):
        replies("mst-alice", sendmail, *(word for line in [*forged, "X-Other : kept"] for word in ("--header", line)))
        message = sendmail.wait_messages(1)[0]
    ours = [(name, value) for name, value in message.items() if name.strip().lower() == HEADER.lower()]
    assert ours == [(HEADER, tag("mst-alice", "python3"))]
    assert message["X-Other"] == "kept" and "user=root" not in message.as_string()


def test_a_listener_with_no_filters_is_left_alone(sendmail: Sendmail) -> None:
    """InputMailFilters= in DAEMON_OPTIONS, for mail that a content filter hands back: its header stays."""
    with Milter(sendmail.directory):
        run_as("mst-bob", smtp(BACK, "--header", f"{HEADER}: user=mst-alice program=web"))
        assert headers(sendmail) == [["user=mst-alice program=web"]]


def test_a_blocked_user_and_one_over_the_limit_are_refused(sendmail: Sendmail) -> None:
    """The replies are the milter's own words."""
    with Milter(sendmail.directory, blocked_mailusers=["mst-alice"], hourly_limits={"mst-bob": 1}):
        assert "550 5.7.1 User mst-alice is blocked from sending mail" in replies("mst-alice", sendmail)
        assert "250 2.0.0" in replies("mst-bob", sendmail)
        assert ("450 4.7.1 User mst-bob is over the limit of 1 recipients an hour" in
                replies("mst-bob", sendmail))
        assert headers(sendmail) == [[tag("mst-bob", "python3")]]


def test_a_blocked_user_can_be_deferred(sendmail: Sendmail) -> None:
    """blocked_action tempfail."""
    with Milter(sendmail.directory, blocked_mailusers=["mst-alice"], blocked_action="tempfail"):
        assert "450 4.7.1 User mst-alice is blocked from sending mail" in replies("mst-alice", sendmail)


def test_quarantine_holds_the_tagged_message_until_it_is_released(sendmail: Sendmail) -> None:
    """blocked_action quarantine, and the commands that README.md gives."""
    with Milter(sendmail.directory, blocked_mailusers=["mst-alice"], blocked_action="quarantine"):
        assert "250 2.0.0" in replies("mst-alice", sendmail)
        replies("mst-bob", sendmail)
        assert headers(sendmail) == [[tag("mst-bob", "python3")]]
    assert list(sendmail.quarantined().values()) == ["User mst-alice is blocked from sending mail"]
    listed = sendmail.run_as("root", [sendmail.program, "-bp", "-Am", "-qQ"]).stdout
    assert "QUARANTINE: User mst-alice is blocked" in listed
    sendmail.run_as("root", [sendmail.program, "-Am", "-qQ", "-Q"])
    sendmail.run_as("root", [sendmail.program, "-Am", "-q"])
    assert headers(sendmail, 2)[-1] == [tag("mst-alice", "python3")]


def test_sendmail_1_comes_by_smtp_and_is_tagged_with_who_called_it(sendmail: Sendmail) -> None:
    """It submits to the daemon as the user who called it, and what that one forged is removed."""
    with Milter(sendmail.directory):
        assert submit("mst-alice", sendmail, header=f"{HEADER}: user=root") == 0
        assert headers(sendmail) == [[tag("mst-alice", "sendmail")]]


def test_sendmail_1_of_a_blocked_user_is_refused_unless_it_is_queued(sendmail: Sendmail) -> None:
    """A queue run submits as the queue's own user: the header says so, and Received has who called sendmail(1)."""
    with Milter(sendmail.directory, blocked_mailusers=["mst-alice"]) as milter:
        assert submit("mst-alice", sendmail) == 69  # EX_UNAVAILABLE
        assert "action=reject reason=blocked" in milter.lines("user=mst-alice")[0]
        assert submit("mst-alice", sendmail, "-odq") == 0
        sendmail.run_as("root", [sendmail.program, "-Ac", "-q"])
        message = sendmail.wait_messages(1)[0]
    assert message.get_all(HEADER) == [tag("mail", "sendmail")]  # mail stands for Debian's smmsp
    assert "(from mst-alice@localhost)" in message.get_all("Received")[-1]


STARTTLS = """
import smtplib, ssl, sys
with smtplib.SMTP("127.0.0.1", int(sys.argv[1]), "client") as session:
    session.starttls(context=ssl._create_unverified_context())
    for number in range(2):
        session.sendmail("from@example.org", ["to@example.org"], "Subject: tls\\n\\nbody\\n")
"""


def test_after_starttls_mail_is_tagged_with_user_and_program(possible: None, tmp_path: pathlib.Path) -> None:
    """Every message of the session."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=mail.example.org",
                    "-keyout", key, "-out", certificate], check=True, capture_output=True)
    key.chmod(0o600)
    lines = [f"define(`confSERVER_CERT', `{certificate}')dnl", f"define(`confSERVER_KEY', `{key}')dnl",
             f"define(`confCACERT', `{certificate}')dnl", f"define(`confCACERT_PATH', `{tmp_path}')dnl"]
    with Sendmail(lines=lines) as sendmail, Milter(sendmail.directory):
        with smtplib.SMTP("127.0.0.1", sendmail.port, "client") as session:
            session.ehlo()
            if not session.has_extn("starttls"):
                pytest.skip(f"Sendmail has no TLS here: {sendmail.log()}")
        assert run_as("mst-alice", [PYTHON, "-c", STARTTLS, str(sendmail.port)]).returncode == 0, sendmail.log()
        assert headers(sendmail, 2) == [[tag("mst-alice", "python3")]] * 2


# --- the socket in the wrong place or with the wrong mode: the lines that README.md's Troubleshooting quotes -----

def stale_socket(path: str) -> None:
    """Leave a socket behind that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


@pytest.mark.parametrize("flags, reply", [("F=", "250 2.0.0"), ("F=T", "451 4.3.2 Please try again later")])
def test_mail_passes_or_waits_without_a_milter_and_the_log_says_why(flags: str, reply: str, possible: None) -> None:
    """The flag decides: F= lets the mail pass untagged, F=T defers it."""
    with Sendmail(flags=flags) as sendmail:
        path = sendmail.socketname
        said = sendmail.directory.joinpath("output").read_text()
        assert f"WARNING: Xmilter_sysuser: local socket name {path} missing" in said
        private = pathlib.Path(path).parent
        for step, line in (lambda: None, f"local socket name {path} unsafe"), \
                (lambda: private.mkdir(0o755) or stale_socket(path),
                 f"error connecting to filter: Connection refused by {path}"), \
                (lambda: private.chmod(0o775), f"local socket name {path} unsafe"):
            step()
            seen = len(sendmail.log())
            assert reply in replies("mst-alice", sendmail)
            wait_for(lambda: f"Milter (milter_sysuser): {line}" in sendmail.log()[seen:], what=line)
        assert all(not found for found in headers(sendmail, 3 if flags == "F=" else 0))


@pytest.mark.parametrize("mode, word", [(0o775, "Group"), (0o757, "World")])
def test_sendmail_does_not_start_where_others_can_write_to_the_sockets_directory(
        mode: int, word: str, possible: None) -> None:
    """It says which."""
    sendmail = Sendmail()
    private = pathlib.Path(sendmail.socketname).parent
    private.mkdir()
    private.chmod(mode)
    stale_socket(sendmail.socketname)
    with pytest.raises(AssertionError) as caught:
        sendmail.start()
    assert f"local socket name {sendmail.socketname} unsafe: {word} writable directory" in str(caught.value)
