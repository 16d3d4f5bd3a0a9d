# SPDX-License-Identifier: MIT
"""The pure layer: what is written into headers, replies and log lines, and what is read from the kernel and lsof."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import struct
import sys
import types
from typing import Any, Optional

import pytest
from hypothesis import example, given, settings, strategies as st

import mta

sys.path.append(str(mta.SCRIPT.parent))
import milter_sysuser as ms  # noqa: E402

QUICK = settings(max_examples=200, deadline=None, database=None)
FIELD = re.compile(r'([a-z]+)=(?:([A-Za-z0-9._+@/:-]+)|(\?)|"((?:[ !#-\[\]-~]|\\x[0-9a-f]{2})*)")(?: |\Z)')
ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
Parsed = list[tuple[str, Optional[bytes], bool]]

hostile = st.one_of(st.binary(max_size=600), st.text(max_size=600), st.sampled_from(
    [b'" user=root program="', b"\\", b'\\"', b"\r\nX-Sender-Process-Info: user=root", b"\x1b[31m", b"?", b'"?"', b"",
     b"a" * 256, b"a" * 257, b'"' * 128, b'"' * 129, b" " * 256, b"\x00" * 64, b"\x00" * 65, "é" * 200, "\ud800x",
     "\udc80", "\u2028", "\x85", "%s%n%d", "...", b"x" * 253 + b"\\\\"])).map(
         lambda v: v if isinstance(v, (bytes, str)) else bytes(v))


def octets(value: "bytes | str") -> bytes:
    """Give the bytes that a value from the process table stood for."""
    if isinstance(value, bytes):
        return value
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


def parse(line: str) -> Parsed:
    """Read a header's or log line's fields back: (key, bytes or None for unknown, whether it was cut)."""
    found: Parsed = []
    at = 0
    while at < len(line):
        match = FIELD.match(line, at)
        assert match, f"not a field: {line[at:]!r}"
        key, bare, unknown, quoted = match.groups()
        data = None if unknown else (bare if bare is not None else quoted).encode("ascii")
        cut = quoted is not None and quoted.endswith("...") and len(quoted) > ms.VALUE_CHARACTERS - 10
        if quoted is not None:
            data = ESCAPE.sub(lambda m: bytes([int(m[1], 16)]), data[:-3] if cut else data)
        found.append((key, data, cut))
        at = match.end()
    return found


# --- writing --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, written", [
    (None, "?"), ("?", '"?"'), ("", '""'), (b"", '""'), (0, "0"), (4711, "4711"), ("stefan", "stefan"),
    ("/usr/bin/php8.2+x@y:z_-", "/usr/bin/php8.2+x@y:z_-"), ("a b", '"a b"'), ('a"b', r'"a\x22b"'), ("a\\b", r'"a\x5cb"'),
    ("a=b", '"a=b"'), ("\r\n\t\0\x1b\x7f", r'"\x0d\x0a\x09\x00\x1b\x7f"'), ("é", r'"\xc3\xa9"'), (b"\xff", r'"\xff"'),
    ("\udcff", r'"\xff"'), ("\ud800", r'"\xed\xa0\x80"'), ("x" * 256, "x" * 256),
    ("x" * 257, '"' + "x" * 253 + '..."'), ('"' * 200, '"' + r"\x22" * 63 + '..."'),
    ("é" * 200, '"' + r"\xc3\xa9" * 31 + r"\xc3" + '..."')])
def test_a_value_is_written_as_the_readme_says(value: Any, written: str) -> None:
    """Bare where that is safe, quoted and escaped elsewhere, cut after 256 characters, "?" for unknown."""
    assert ms.quote(value) == written


@QUICK
@given(hostile)
def test_a_quoted_value_is_printable_ascii_of_at_most_256_characters(value: "bytes | str") -> None:
    """No control byte, no line end, no other alphabet gets through, whatever it was."""
    written = ms.quote(value)
    assert re.fullmatch(r"[ -~]+", written)
    assert len(written) <= ms.VALUE_CHARACTERS + 2 * written.startswith('"')


@QUICK
@given(st.lists(st.tuples(st.sampled_from(ms.FIELDS), st.none() | hostile), max_size=8))
def test_fields_read_back_as_what_was_written_and_imitate_no_other(pairs: list[tuple[str, Any]]) -> None:
    """A line of fields says exactly the values that went in, apart from the cut, which shows."""
    read = parse(" ".join(ms.key_values(pairs)))
    assert [key for key, _, _ in read] == [key for key, _ in pairs]
    for (_, value), (_, data, cut) in zip(pairs, read):
        if value is None or not cut:
            assert data == (None if value is None else octets(value))
        else:
            assert data is not None and octets(value).startswith(data) and len(data) < len(octets(value))


@QUICK
@given(st.binary(max_size=300))
def test_a_reply_with_a_hostile_name_stays_one_valid_line(name: bytes) -> None:
    """A user name from a directory service cannot end the reply, nor make one that libmilter refuses."""
    account = ms.Account(1, 1, os.fsdecode(name).replace("\0", "") or None)
    text = ms.refusal_of(account, ms.Entries(uids=frozenset({1})), None).text
    assert re.fullmatch(r"[ -~]+", text) and len(text) < 510  # RFC 5321, 4.5.3.1.5


@QUICK
@given(st.integers(1, 76), st.lists(st.tuples(st.sampled_from(ms.FIELDS), hostile), max_size=8))
def test_no_line_of_the_header_passes_998_octets(name: int, pairs: list[tuple[str, Any]]) -> None:
    """Folded between fields only, and unfolded it is what it was (RFC 5322, 2.2.3)."""
    words = ms.key_values(pairs)
    lines = ("x" * name + ": " + ms.fold(words, name + 2)).split("\n")
    assert all(len(line) <= 998 for line in lines)
    assert all(line.startswith("\t") and line.strip() for line in lines[1:])
    assert " ".join("\n".join(lines).replace("\n\t", " ")[name + 2:].split(" ")) == " ".join(words)


@pytest.mark.parametrize("name", [3, 76])
def test_a_line_is_filled_to_998_octets_and_not_one_more(name: int) -> None:
    """Counted with the header's name on the first line and the tab on the others."""
    first, later = 998 - name - 2, 998 - 1
    for more, lines in (0, 2), (1, 3):
        words = ["x" * 400, "x" * (first - 401), "y" * 400, "y" * (later - 401 + more)]
        assert len(ms.fold(words, name + 2).split("\n")) == lines
        words = ["x" * 400, "x" * (first - 401 + more), "z"]
        assert len(ms.fold(words, name + 2).split("\n")) == 2
        assert all(len(line) <= 998 - (name + 2 if n == 0 else 0)
                   for n, line in enumerate(ms.fold(words, name + 2).split("\n")))


@QUICK
@given(st.binary(max_size=300))
def test_escaping_leaves_printable_ascii_only(data: bytes) -> None:
    """A traceback, which shows what strangers sent, cannot colour a terminal or break a line."""
    assert re.fullmatch(rb"[ -~]*", ms.escape(data, rb"[^ -~]"))


# --- addresses ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, address", [
    ("127.0.0.1", "127.0.0.1"), ("[127.0.0.1]", "127.0.0.1"), ("::1", "::1"), ("IPv6:::1", "::1"), ("ipv6:::1", "::1"),
    ("[IPv6:::1]", "::1"), ("[::1]", "::1"), ("::ffff:127.0.0.1", "127.0.0.1"), ("IPv6:::ffff:10.1.2.3", "10.1.2.3"),
    ("fe80::1%eth0", "fe80::1"), ("[fe80::1%eth0]", "fe80::1"), ("IPv6:fe80::1%2", "fe80::1"), ("0.0.0.0", "0.0.0.0"),
    ("::", "::")])
def test_an_address_is_read_as_mtas_write_it(text: str, address: str) -> None:
    """With and without brackets, tag and zone; a v4-mapped one is the four bytes it stands for."""
    assert ms.endpoint(text, 25) == ms.Endpoint(ipaddress.ip_address(address).packed, 25)


@QUICK
@given(st.text(max_size=60) | st.sampled_from(["", "localhost", "1", "127.1", "[", "IPv6:", "%", "1.2.3.4\n", "/var/x"]))
def test_what_is_no_address_is_a_value_error(text: str) -> None:
    """Nothing else comes out of reading one, whatever the MTA sends."""
    try:
        assert len(ms.endpoint(text, 1).address) in (4, 16)
    except ValueError:
        pass


# --- the kernel's answer --------------------------------------------------------------------------------------

def body(source: str, sport: int, destination: str, dport: int, uid: int = 1001, inode: int = 4711,
         attributes: bytes = b"", state: int = 1) -> bytes:
    """Build the body of one answer as the kernel does (struct inet_diag_msg, attributes)."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    ends = [socket.inet_pton(family, address).ljust(16, b"\0") for address in (source, destination)]
    return (struct.pack("=BBBB", family, state, 0, 0) + struct.pack(">HH", sport, dport) + ends[0] + ends[1]
            + struct.pack("=IQ", 0, 99) + struct.pack("=IIIII", 0, 2, 0, uid, inode) + attributes)


def attribute(kind: int, data: bytes) -> bytes:
    """Build a netlink attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


@pytest.mark.parametrize("address, stored", [
    ("127.0.0.1", b"\x7f\0\0\1"), ("::1", b"\0" * 15 + b"\1"), ("::ffff:127.0.0.1", b"\x7f\0\0\1")])
def test_a_socket_is_read_from_the_kernels_answer(address: str, stored: bytes) -> None:
    """State, both ends, owner, inode, cookie, cgroup and what was read of the bytes received, past attributes that are not known."""
    attributes = (attribute(8, b"\0") + attribute(21, struct.pack("=Q", 44)) + attribute(5, b"cubic\0")
                  + attribute(2, bytes(128) + struct.pack("=Q", 7) + bytes(96)))
    diag = ms.read_diag(body(address, 43210, address, 25, attributes=attributes, state=8))
    assert diag[:3] == (8, ms.Endpoint(stored, 43210), ms.Endpoint(stored, 25))
    assert (diag.uid, diag.inode, diag.cookie, diag.cgroup, diag.read) == (1001, 4711, 99, 44, 5)


def test_a_kernel_without_the_newer_attributes_gives_none_of_them() -> None:
    """Before 5.8 there is no cgroup, before 4.1 no count of bytes."""
    diag = ms.read_diag(body("::1", 1, "::1", 2, attributes=attribute(2, bytes(128))))
    assert (diag.cgroup, diag.read) == (0, 0)


def test_the_kernels_refusal_is_an_os_error_with_its_number() -> None:
    """Of one question and of a list alike; "no such connection" is a socket that is not there."""
    lookup, nobody = ms.KernelLookup(lambda mta_end: "redirected"), ms.endpoint("127.0.0.1", 1)
    assert lookup.find(nobody, nobody) is None
    for flags in 0, ms.NLM_F_DUMP:
        with pytest.raises(OSError) as refusal:
            lookup.ask(lookup.sock_diag, ms.SOCK_DIAG_BY_FAMILY, b"", flags)
        assert refusal.value.errno == errno.EINVAL
    assert lookup.dump(1, 1) == []


@pytest.mark.parametrize("size", [0, 4, 60, 71])
def test_an_answer_that_is_cut_short_is_an_os_error(size: int) -> None:
    """It is never read as a socket of root's."""
    with pytest.raises(OSError):
        ms.read_diag(body("::1", 1, "::1", 2)[:size])


def test_a_request_names_both_ends_states_and_interface() -> None:
    """The layout of struct inet_diag_req_v2, with the family of the addresses."""
    request = ms.diag_request(ms.endpoint("::1", 43210), ms.endpoint("::2", 25), 7)
    assert request[0] == socket.AF_INET6 and request[1] == socket.IPPROTO_TCP and len(request) == 56
    assert struct.unpack(">HH16s16s", request[8:44]) == (43210, 25, bytes(15) + b"\1", bytes(15) + b"\2")
    assert struct.unpack("=IQ", request[44:]) == (7, 0xFFFFFFFFFFFFFFFF)
    assert ms.diag_request(ms.endpoint("::ffff:127.0.0.1", 1), ms.endpoint("127.0.0.1", 2), 0)[0] == socket.AF_INET


# --- cgroups and lsof -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, unit", [
    ("0::/system.slice/php8.2-fpm.service\n", "php8.2-fpm.service"),
    ("0::/user.slice/user-1001.slice/session-3.scope\n", "session-3.scope"),
    ("0::/user.slice/user-1001.slice/user@1001.service/app.slice/evil.service\n", "user@1001.service"),
    ("12:cpu:/x.service\n1:name=systemd:/system.slice/cron.service\n0::/\n", "cron.service"),
    ("12:cpu:/other.service\n0::/system.slice/cron.service\n", "cron.service"),
    ("0::/system.slice/docker-0123.scope\n", "docker-0123.scope"), ("0::/docker/0123\n", "/docker/0123"),
    ("0::/machine.slice/libpod-0123.scope/container\n", "libpod-0123.scope"), ("0::/lxc/101/ns/x.service\n", "lxc/101"),
    ("0::/lxc.payload.web/system.slice/apache2.service\n", "lxc.payload.web"),
    ("0::/user.slice/user-1001.slice/session-3.scope/lxc.payload.web/x.service\n", "session-3.scope"),
    ("0::/x/u/a\x0b0::/system.slice/cron.service\n", "cron.service"), ("0::/\n", None), ("", None), ("nonsense\n", None)])
def test_the_unit_is_the_first_from_the_root(text: str, unit: Optional[str]) -> None:
    """A unit that a user made below its own is not named; elsewhere the whole path is."""
    assert ms.unit_of(text) == unit


@QUICK
@given(st.text(st.characters(blacklist_characters="\n\0")))
def test_no_name_of_a_users_own_cgroup_changes_the_unit(name: str) -> None:
    """Line separators of other alphabets, colons and slashes included."""
    text = f"0::/user.slice/user-1001.slice/user@1001.service/{name}\n"
    assert ms.unit_of(text) == "user@1001.service"


@pytest.mark.parametrize("output, pids", [
    (b"p10\nf3\nd4711\n", [10]), (b"p10\nf3\nd1\np11\nf3\nd4711\n", [11]), (b"p10\nf3\nd4711\np11\nf3\nd4711\n", [10, 11]),
    (b"p10\nf3\nd47110\n", []), (b"p10\nf3\n", []), (b"", []), (b"d4711\n", []), (b"px\nd4711\n", []),
    (b"p10\nf3\nd0x4711\n", []), (b"p10\r\nd4711\n", []), (b"p10\nc\nf3\nd4711", [10])])
def test_lsofs_output_is_read_by_field(output: bytes, pids: list[int]) -> None:
    """The processes that have exactly this inode; lines that are missing or strange name nobody."""
    assert ms.lsof_holders(output, 4711) == pids


@QUICK
@given(st.lists(st.tuples(st.sampled_from(b"pfdcLn"), st.binary(max_size=9) | st.just(b"4711")), max_size=9))
def test_no_output_of_lsof_is_an_error(lines: list[tuple[int, bytes]]) -> None:
    """Whatever it says, only pids that it named come out of it."""
    output = b"\n".join(bytes([letter]) + text for letter, text in lines)
    for pid in ms.lsof_holders(output, 4711):
        assert b"p%d" % pid in re.sub(rb"(?m)^p0*(?=\d)", b"p", output)


def test_lsof_is_asked_about_numbers_only() -> None:
    """Its arguments cannot hold a word of anybody's."""
    assert ms.lsof_arguments([1, 4711])[-2:] == ["1,4711", "-Fpd"]
    with pytest.raises(ValueError):
        ms.lsof_arguments(["1 -D"])  # type: ignore[list-item]


# --- deciding -------------------------------------------------------------------------------------------------

ALICE = ms.Account(1001, 1001, "alice", frozenset({100, 7}), True)


@pytest.mark.parametrize("entries, listed", [
    (ms.Entries(), False), (ms.Entries(uids=frozenset({1001})), True), (ms.Entries(uids=frozenset({1002})), False),
    (ms.Entries(names=frozenset({"alice"})), True), (ms.Entries(names=frozenset({"Alice", "alic"})), False),
    (ms.Entries(gids=frozenset({7, 8})), True), (ms.Entries(gids=frozenset({1001})), False)])
def test_a_user_is_listed_by_uid_name_or_group(entries: Any, listed: bool) -> None:
    """The number of a group is not the number of a user."""
    assert ms.is_listed(ALICE, entries) is listed and not ms.is_unsaid(ALICE, entries)


def test_a_delegated_uid_is_listed_by_its_number_too() -> None:
    """Either the account or the number that the kernel gave."""
    for uid in 165600, 1001:
        assert ms.is_listed(ALICE._replace(kernel_uid=165600), ms.Entries(uids=frozenset({uid})))


def test_a_directory_that_has_not_answered_clears_nobody() -> None:
    """While a name or a group may yet match, he may be listed."""
    unnamed = ms.Account(1001, 1001)
    assert ms.is_unsaid(unnamed, ms.Entries(names=frozenset({"alice"})))
    assert ms.is_unsaid(unnamed, ms.Entries(gids=frozenset({100})))
    assert ms.is_unsaid(unnamed, ms.Entries(uids=frozenset({1002})))
    assert not ms.is_unsaid(unnamed, ms.Entries())
    assert not ms.is_unsaid(unnamed._replace(answered=True), ms.Entries(names=frozenset({"alice"})))
    assert not ms.is_listed(unnamed, ms.Entries(names=frozenset({"alice"}), gids=frozenset({100})))


@pytest.mark.parametrize("blocked, allowed, reason", [
    ({"alice"}, None, "blocked"), ({"bob"}, None, ""), (set(), {"alice"}, ""), (set(), {"bob"}, "not-allowed"),
    (set(), set(), "not-allowed"), ({"alice"}, {"alice"}, "blocked")])
def test_who_is_on_no_list_of_those_allowed_is_refused(blocked: set, allowed: Optional[set], reason: str) -> None:
    """And the block list applies to those who are."""
    lists = [None if names is None else ms.Entries(names=frozenset(names)) for names in (blocked, allowed)]
    refused = ms.refusal_of(ALICE, *lists)
    assert (refused.reason if refused else "") == reason


@pytest.fixture(scope="module")
def ephemeral_port() -> int:
    """Give a port of the range that the kernel gives to clients."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        return int(file.read().split()[0])


@pytest.mark.parametrize("facts, why", [
    ({"pid": 1, "holder_uid": 0}, ""), ({"holder_uid": 33}, "handed-down"), ({"why": "not-permitted"}, "not-permitted"),
    ({"why": "no-helper"}, "no-helper"), ({"why": "busy"}, "busy"), ({"why": "gone"}, "gone"),
    ({"why": "not-found"}, "not-found"), ({}, "error")])
def test_root_is_named_only_if_the_holder_was_seen_and_is_root(facts: dict, why: str, ephemeral_port: int) -> None:
    """Where nobody may look, or a search failed, root is not named."""
    assert ms.why_not_root(ephemeral_port, facts) == why


def test_root_is_not_named_for_a_port_that_no_client_is_given(ephemeral_port: int) -> None:
    """A listener that was turned into a client keeps its server's port."""
    assert ms.why_not_root(ephemeral_port - 1, {"holder_uid": 0}) == "handed-down"


@pytest.mark.parametrize("action, why, verdict", [
    ("reject", "closed", "reject"), ("reject", "reused", "reject"), ("reject", "handed-down", "reject"),
    *(("reject", why, "tempfail") for why in ("error", "busy", "timeout", "no-helper", "not-permitted")),
    ("quarantine", "error", "quarantine"), ("tempfail", "closed", "tempfail"), ("accept", "error", "tag")])
def test_a_fault_of_ours_is_never_a_permanent_refusal(action: str, why: str, verdict: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client did may be."""
    monkeypatch.setattr(ms, "unidentified_action", action)
    assert ms.unidentified(why).action == verdict


# --- entries of a list of users -------------------------------------------------------------------------------

@pytest.mark.parametrize("entry", ["bob", "www-data", 1004, 0, "1004", "@suspended", "jörg", "user$", "DOM\\user", "a.b",
                                   "two words", "@domain users", "DOM\\John Doe"])
def test_an_entry_is_a_name_a_number_or_a_group(entry: Any) -> None:
    """As directories have them, including Samba's; names may contain blanks."""
    assert not list(ms.entry_problems([entry]))


@pytest.mark.parametrize("entry", ["", "@", "a\tb", " a", "a ", "a\n", "a\0", "a:b", "*", True, -1, 1.5, None,
                                   ["a"], b"a", "\x1b[31m", "@@x", "²", 1 << 32, "4294967296", 'a"b', '"cut..."',
                                   pytest.param("9" * 5000, id="5000 digits"), "\ud800", "a\u2003b"])
def test_what_is_none_is_said_to_be_none(entry: Any) -> None:
    """In words that show it, safe for a terminal."""
    (problem,) = ms.entry_problems([entry])
    assert re.fullmatch(r"[ -~²]+", problem)


@QUICK
@given(st.text(max_size=40))
@example("DOM\\John Doe")
@example('a"b')
def test_a_name_pasted_from_the_log_is_understood(name: str) -> None:
    """With its quotes, whatever bytes it has; or left as it is, which is no name."""
    written = ms.quote(name)
    if written.startswith('"') and len(written) > 2 and not written.endswith('..."'):
        assert ms.unquoted(written) == name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        assert ms.unquoted("@" + written)[1:] == ms.unquoted(written)


@QUICK
@given(st.lists(st.text(max_size=12) | st.text("0123456789²٣@ ", max_size=12) | st.integers(-1, 1 << 33), max_size=4))
@example(["²"])
@example(["@\ud800", "\ud800", "\udc80"])
def test_every_entry_that_is_taken_can_be_looked_up(entries: list[Any]) -> None:
    """One strange entry must not take the whole list with it."""
    taken = [entry for entry in entries if not list(ms.entry_problems([entry]))]
    users = ms.UserList(ms.Directory(), "blocked_mailusers", taken)
    now = users.now()
    assert len(now.uids | now.names | now.gids | now.unresolved) >= bool(taken)


def nobody(key: Any) -> Any:
    """Find nothing, as pwd and grp do where a directory is down."""
    raise KeyError(key)


@pytest.mark.parametrize("last, name_now, uid", [
    (None, None, None), (1001, None, 1001), (1001, "gone", 1001), (1001, "heir", None)])
def test_a_name_that_is_not_found_keeps_its_uid_unless_that_is_another_users(
        last: Optional[int], name_now: Optional[str], uid: Optional[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is down unblocks nobody."""
    monkeypatch.setattr(ms.pwd, "getpwnam", nobody)
    monkeypatch.setattr(ms.pwd, "getpwuid", lambda uid: types.SimpleNamespace(pw_name=name_now) if name_now else nobody(uid))
    assert ms.look_up_entry("gone", last) == uid


def test_a_group_that_is_not_found_keeps_its_gid() -> None:
    """As above."""
    assert ms.look_up_entry("@no-such-group", 4711) == 4711
    assert ms.look_up_entry("@no-such-group", None) is None
    assert ms.look_up_entry("@root", None) == 0


def test_a_user_who_is_not_found_keeps_his_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """And his name, unless that was in /etc/passwd, which shows that it is gone."""
    monkeypatch.setattr(ms.pwd, "getpwuid", nobody)
    assert ms.look_up_account(700001, ALICE) == ALICE
    assert ms.look_up_account(700001, ALICE._replace(local=True)) == ms.Account(700001, 700001, None, ALICE.gids, True, local=True)


def test_who_has_a_range_of_his_own_uid_keeps_his_name_and_groups_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As podman and lxd advise, here by number: it delegates the uid to nobody else."""
    monkeypatch.setattr(ms.pwd, "getpwuid", nobody)
    monkeypatch.setattr(ms, "local_file", lambda path: ({}, {700001: {"700001": 1}} if path == "/etc/subuid" else {}))
    assert ms.look_up_account(700001, ALICE) == ALICE


def test_an_account_has_all_its_groups() -> None:
    """The primary one and the others, as getgrouplist(3) says."""
    assert 0 in ms.look_up_account(0, None).gids
