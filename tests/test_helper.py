"""The privileged helper: its messages, its counts, and the processes themselves."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.cred.credentials import (
    CramMD5Credentials,
    IUsernameHashedPassword,
    IUsernamePassword,
)
from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest, SynchronousTestCase, TestCase

from popdrop.accounts import helper, helperclient, helperwire, pace
from popdrop.accounts.database import AccountsDatabase
from popdrop.accounts.helperclient import HelperProcess, SelfService
from popdrop.accounts.helperwire import (
    Answer,
    Down,
    Hello,
    Kind,
    Malformed,
    Request,
    SelfAnswer,
    SelfRequest,
)
from popdrop.accounts.selfservice import perform, self_service
from popdrop.credentials import ApopCredentials, Cleartext
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    PermanentFailure,
    TemporaryFailure,
)
from popdrop.values import Account, Scope, Secret
from tests.descriptors import descriptors, until_at_most
from tests.end_to_end.harness import DEADLINE, ROOT, environment
from tests.helper_backends import REGISTRY, Words

CHALLENGE = b"<1896.697170952@dbc.mtview.ca.us>"

secrets_ = st.builds(Secret, st.binary(max_size=512))
names = st.binary(min_size=1, max_size=64)
requests = st.one_of(
    st.builds(
        Request,
        st.just(Kind.PASSWORD),
        st.integers(0, 255),
        st.integers(0, 2**64 - 1),
        names,
        secrets_,
    ),
    st.builds(
        Request,
        st.just(Kind.APOP),
        st.integers(0, 255),
        st.integers(0, 2**64 - 1),
        names,
        st.builds(Secret, st.binary(min_size=32, max_size=32)),
        st.binary(min_size=1, max_size=400),
    ),
)
ids = st.none() | st.integers(0, 2**32 - 1)
paths = st.none() | st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=200
)
networks = st.ip_addresses().map(ip_network) | st.sampled_from(
    [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]
)
scopes = st.builds(
    Scope,
    st.booleans(),
    st.lists(networks, max_size=20).map(tuple),
    st.none() | st.integers(-(2**63), 2**63 - 1),
)
accounts = st.builds(
    lambda name, uid, gid, home, shell, disabled, scope: Account(
        name, uid=uid, gid=gid, home=home, shell=shell, disabled=disabled, scope=scope
    ),
    *(names, ids, ids, paths, paths, st.booleans(), scopes),
)


def plain(request: Request) -> tuple[object, ...]:
    return (
        request.kind,
        request.source,
        request.number,
        request.name,
        request.proof.reveal(),
        request.challenge,
    )


class WireTests(SynchronousTestCase):
    @settings(deadline=None, derandomize=True)
    @given(requests)
    def test_requests(self, request: Request) -> None:
        """Whatever octets there are in a field, TAB, LF, NUL and `:` among them, none ends it."""
        record = helperwire.encode_request(request)
        self.assertLessEqual(len(record), helperwire.LONGEST)
        self.assertEqual(plain(helperwire.decode_request(record)), plain(request))

    @settings(deadline=None, derandomize=True)
    @given(accounts, st.integers(0, 2**64 - 1))
    def test_answers(self, account: Account, number: int) -> None:
        answer = Answer(Kind.GOOD, number, account)
        record = helperwire.encode_answer(answer)
        self.assertLessEqual(len(record), helperwire.LONGEST)
        self.assertEqual(helperwire.decode_reply(record), answer)

    def test_injection(self) -> None:
        """CVE-2008-1218: what another protocol would take for the end of a field."""
        for octets in (b"\t", b"\n", b"\r\n", b"\0", b":", b"\tuid=0", b"bob\n\1\1\0"):
            request = Request(Kind.PASSWORD, 0, 7, b"bob" + octets, Secret(octets + b"words"))
            record = helperwire.encode_request(request)
            self.assertEqual(plain(helperwire.decode_request(record)), plain(request))

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.binary(max_size=5000))
    def test_garbage(self, record: bytes) -> None:
        for decode in (
            helperwire.decode_request,
            helperwire.decode_reply,
            helperwire.decode_self_request,
            helperwire.decode_self_answer,
        ):
            with contextlib.suppress(Malformed):
                decode(record)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(requests, st.data())
    def test_damage(self, request: Request, data: st.DataObject) -> None:
        """A message that is cut, or longer than its fields, is none."""
        record = bytes(helperwire.encode_request(request))
        cut = data.draw(st.integers(0, len(record) - 1))
        self.assertRaises(Malformed, helperwire.decode_request, record[:cut])
        more = data.draw(st.binary(min_size=1, max_size=9))
        self.assertRaises(Malformed, helperwire.decode_request, record + more)

    def test_what_is_none(self) -> None:
        bob = Request(Kind.PASSWORD, 0, 1, b"bob", Secret(b"x"))
        good = helperwire.encode_request(bob)
        self.assertEqual(helperwire.decode_request(good).name, b"bob")
        for place, octet in (
            (0, 2),
            (0, 0),
            (1, 0),
            (1, 3),
            (1, 0x80),
            (1, 0xF1),
            (11, 9),
            (12, 0),
        ):
            wrong = bytearray(good)
            wrong[place] = octet
            self.assertRaises(Malformed, helperwire.decode_request, wrong)
        self.assertRaises(Malformed, helperwire.decode_reply, good)
        down = helperwire.encode_down(Down("signal 9"))
        self.assertRaises(Malformed, helperwire.decode_request, down)
        self.assertRaises(Malformed, helperwire.decode_reply, bytes(down).replace(b"l", b"\n"))

    def test_bounds(self) -> None:
        for request in (
            Request(Kind.PASSWORD, 0, 1, b"", Secret(b"x")),
            Request(Kind.PASSWORD, 0, 1, b"n" * 65, Secret(b"x")),
            Request(Kind.PASSWORD, 0, 1, b"n", Secret(b"x" * 513)),
            Request(Kind.APOP, 0, 1, b"n", Secret(b"x" * 31), CHALLENGE),
            Request(Kind.APOP, 0, 1, b"n", Secret(b"x" * 32), b""),
            Request(Kind.APOP, 0, 1, b"n", Secret(b"x" * 32), b"c" * 401),
        ):
            self.assertRaises(ValueError, helperwire.encode_request, request)
        for account in (
            Account(b"n" * 65),
            Account(b"n", uid=2**32),
            Account(b"n", gid=-1),
            Account(b"n", home="/" * 1025),
            Account(b"n", shell="/bin\0/sh"),
        ):
            answer = Answer(Kind.GOOD, 1, account)
            self.assertRaises(ValueError, helperwire.encode_answer, answer)

    def test_notices(self) -> None:
        hello = Hello(4711, 0)
        self.assertEqual(helperwire.decode_reply(helperwire.encode_hello(hello)), hello)
        down = Down("exit status 78")
        self.assertEqual(helperwire.decode_reply(helperwire.encode_down(down)), down)
        for kind in (Kind.BAD, Kind.TEMPORARY, Kind.NO_SUCH_USER):
            answer = Answer(kind, 2**64 - 1, detail="why")
            self.assertEqual(helperwire.decode_reply(helperwire.encode_answer(answer)), answer)

    def test_detail_is_printable_and_short(self) -> None:
        answer = Answer(Kind.BAD, 1, detail="a\nb\x1b[2J\xe9" + "x" * 500)
        told = helperwire.decode_reply(helperwire.encode_answer(answer))
        assert isinstance(told, Answer)
        self.assertEqual(told.detail, ("a?b?[2J?" + "x" * 500)[:200])

    def test_secrets_are_not_shown(self) -> None:
        request = Request(Kind.PASSWORD, 0, 1, b"bob", Secret(b"hunter2"))
        self.assertNotIn("hunter2", repr(request))
        wish = SelfRequest(Kind.SET, Secret(b"hunter2"), Secret(b"hunter3"))
        self.assertNotIn("hunter", repr(wish))

    def test_wipe(self) -> None:
        record = helperwire.encode_request(Request(Kind.PASSWORD, 0, 1, b"bob", Secret(b"hunter2")))
        length = len(record)
        helperwire.wipe(record)
        self.assertEqual(record, bytes(length))

    @settings(deadline=None, derandomize=True)
    @given(st.none() | st.binary(max_size=512), st.binary(min_size=1, max_size=512))
    def test_self_service(self, old: bytes | None, new: bytes) -> None:
        request = SelfRequest(Kind.SET, None if old is None else Secret(old), Secret(new))
        told = helperwire.decode_self_request(helperwire.encode_self_request(request))
        assert told.new is not None
        self.assertEqual(told.new.reveal(), new)
        self.assertEqual(None if told.old is None else told.old.reveal(), old)

    def test_self_answers(self) -> None:
        for answer in (
            SelfAnswer(Kind.HAS_REPLY, has=True),
            SelfAnswer(Kind.HAS_REPLY, has=False),
            SelfAnswer(Kind.DONE),
            SelfAnswer(Kind.WRONG),
            SelfAnswer(Kind.NONE),
            SelfAnswer(Kind.LATER),
            SelfAnswer(Kind.REFUSED, detail="no"),
            SelfAnswer(Kind.FAILED, detail="broken"),
        ):
            record = helperwire.encode_self_answer(answer)
            self.assertEqual(helperwire.decode_self_answer(record), answer)


class PaceTests(SynchronousTestCase):
    """How often a name may be tried, with a clock of the test's."""

    def setUp(self) -> None:
        self.now = 1000.0
        self.pace = pace.Pace(lambda: self.now)

    def fails(self, name: bytes, times: int) -> None:
        for _ in range(times):
            self.assertIsNotNone(self.pace.begin(name))
            self.pace.end(name, Kind.BAD)

    def test_failures_space_the_next_ones(self) -> None:
        self.fails(b"bob", int(pace.BURST))
        waits = [self.pace.begin(b"bob") for _ in range(8)]
        spaces = [n * pace.SPACING for n in range(6)]
        self.assertEqual(waits, [*spaces, None, None])
        self.assertEqual(self.pace.begin(b"alice"), 0)

    def test_many_at_once_gain_nothing(self) -> None:
        """Tries that have no outcome yet count as failures."""
        waits = [self.pace.begin(b"bob") for _ in range(int(pace.BURST) + 3)]
        self.assertEqual(waits.count(0), pace.BURST + 1)

    def test_success_costs_nothing(self) -> None:
        for kind in (Kind.GOOD, Kind.TEMPORARY, Kind.PERMANENT, Kind.NO_VERIFIER):
            for _ in range(100):
                self.assertEqual(self.pace.begin(b"bob"), 0)
                self.pace.end(b"bob", kind)

    def test_success_forgives_nothing(self) -> None:
        """Else whoever sees logins go through could guess between them."""
        self.fails(b"bob", int(pace.BURST))
        self.assertEqual(self.pace.begin(b"bob"), 0)
        self.pace.end(b"bob", Kind.GOOD)
        self.assertEqual(self.pace.begin(b"bob"), pace.SPACING)

    def test_unknown_names_count_as_known_ones(self) -> None:
        for _ in range(int(pace.BURST)):
            self.pace.begin(b"nobody")
            self.pace.end(b"nobody", Kind.NO_SUCH_USER)
        self.pace.begin(b"nobody")
        self.assertEqual(self.pace.begin(b"nobody"), pace.SPACING)

    def test_time_forgives(self) -> None:
        self.fails(b"bob", int(pace.BURST) + 1)
        self.now += pace.FORGIVEN * 5
        self.assertEqual([self.pace.begin(b"bob") for _ in range(4)], [0] * 4)

    def test_memory_is_bounded(self) -> None:
        for number in range(pace.NAMES + 500):
            name = b"name%d" % number
            for _ in range(3):
                self.pace.begin(name)
        budget = self.pace._budget
        self.assertLessEqual(len(budget._levels), pace.NAMES)

    def test_a_flood_of_names_washes_nothing_away(self) -> None:
        self.fails(b"bob", int(pace.BURST))
        for number in range(2 * pace.NAMES):
            self.fails(b"name%d" % number, 1)
        self.pace.begin(b"bob")
        self.assertEqual(self.pace.begin(b"bob"), pace.SPACING)

    def test_one_account_has_one_count(self) -> None:
        """SASLprep (RFC 4013) makes one name of these, and name services may not look at case."""
        names = ("bob", "BOB", "\uff42ob", "b\u00adob", "bo\u00adb\u00ad")
        self.assertEqual({helper.counted(name.encode()) for name in names}, {b"bob"})
        self.assertNotEqual(helper.counted(b"bob"), helper.counted(b"rob"))
        self.assertEqual(helper.counted(b"\xff"), b"\xff")


class CheckedTests(SynchronousTestCase):
    """What a backend's answer becomes."""

    def ask(self, name: bytes, password: bytes = b"x", kinds: tuple[str, ...] = ("password",)):
        backend: Any = Words("", frozenset(kinds))
        return helper.checked(backend, Request(Kind.PASSWORD, 0, 5, name, Secret(password)))

    def test_outcomes(self) -> None:
        good = self.ask(b"bob", b"bob")
        self.assertEqual((good.kind, good.number), (Kind.GOOD, 5))
        expected = Account(b"bob", uid=4711, gid=815, home="/home/bob", shell="/bin/sh")
        self.assertEqual(good.account, expected)
        for name, kind, detail in (
            (b"bob", Kind.BAD, "bad-words"),
            (b"nobody", Kind.NO_SUCH_USER, ""),
            (b"keyless", Kind.NO_VERIFIER, ""),
            (b"temporary", Kind.TEMPORARY, "the reason why"),
            (b"permanent", Kind.PERMANENT, "another reason"),
        ):
            answer = self.ask(name)
            self.assertEqual((answer.kind, answer.detail), (kind, detail))

    def test_names_are_checked_here(self) -> None:
        """The network process is not relied on for it: no such name comes to a backend."""
        for name in (b"../x", b"a/b", b".", b"..", b"relus.lock", b"a\0b", b"-x", b"a\nb", b"\xff"):
            answer = self.ask(name, name[::-1])
            self.assertEqual(answer.kind, Kind.NO_SUCH_USER, name)

    def test_a_kind_that_the_backend_has_not(self) -> None:
        self.assertEqual(self.ask(b"bob", b"bob", ()).kind, Kind.NO_VERIFIER)

    def test_an_error_is_told_without_its_text(self) -> None:
        told: list[bytes] = []
        self.patch(os, "write", lambda number, octets: told.append(octets))
        answer = self.ask(b"broken")
        self.assertEqual(
            (answer.kind, answer.detail), (Kind.TEMPORARY, "RuntimeError in a checker")
        )
        self.assertIn(b"RuntimeError at helper.py:", told[0])
        self.assertNotIn(b"hunter2", b"".join(told))

    def test_a_name_or_path_that_cannot_be(self) -> None:
        class Odd:
            kinds = frozenset({"password"})
            account = Account(b"bob")

            def check(self, credentials: object) -> Account:
                return self.account

        odd: Any = Odd()
        for account in (
            Account(b"../bob"),
            Account(b"bob", uid=-1),
            Account(b"b", home="/" * 2000),
        ):
            odd.account = account
            answer = helper.checked(odd, Request(Kind.PASSWORD, 0, 5, b"bob", Secret(b"")))
            self.assertEqual(answer.kind, Kind.PERMANENT)


def status(pid: int, field: str) -> list[str]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split()[1:]
    raise KeyError(field)


@contextlib.contextmanager
def watched(*pids: int) -> Iterator[list[int]]:
    """Descriptors that become readable when these processes end (pidfd_open(2))."""
    watches = [os.pidfd_open(pid) for pid in pids]
    try:
        yield watches
    finally:
        for watch in watches:
            os.close(watch)


def all_end(watches: list[int]) -> bool:
    """Whether all of these processes end."""
    return all(select.select([watch], [], [], DEADLINE)[0] for watch in watches)


class ProcessCase(TestCase):
    timeout = DEADLINE

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def start(self, *texts: str, **more: Any) -> HelperProcess:
        process = HelperProcess(texts or [f"words:{self.folder}"], registry=REGISTRY, **more)
        process.start(os.geteuid(), os.getegid())
        process.attach(reactor)
        self.addCleanup(process.stop, reactor)
        self.process = process
        return process

    def pids(self) -> tuple[int, int]:
        """Of supervisor and helper."""
        current, above = self.process.current, self.process.supervisor_pid
        assert current is not None and above is not None
        return above, current.hello.pid

    async def login(self, name: bytes, password: bytes, source: int = 0) -> Any:
        checker = self.process.checkers()[source]
        return await checker.requestAvatarId(Cleartext(name, password))

    async def until(self, path: Path) -> None:
        while not path.exists():
            await deferLater(reactor, 0.01)

    async def fails(self, waiting: Any, kind: type[Exception]) -> Any:
        try:
            await waiting
        except kind as error:
            self.assertIs(type(error), kind)
            return error
        raise AssertionError(f"no {kind.__name__}")


class ProcessTests(ProcessCase):
    async def test_logins(self) -> None:
        """Unknown users and every way to fail: the helper outlives all (CVE-2000-0990)."""
        self.start()
        below = self.pids()[1]
        verified = await self.login(b"bob", b"bob")
        self.assertEqual(verified, b"bob")
        self.assertTrue(verified.foreign)
        self.assertEqual((verified.account.uid, verified.account.home), (4711, "/home/bob"))
        for name, kind in (
            (b"bob", BadCredentials),
            (b"nobody", NoSuchUser),
            (b"keyless", NoVerifierOfThisKind),
            (b"temporary", TemporaryFailure),
            (b"permanent", PermanentFailure),
            (b"broken", TemporaryFailure),
            (b"n" * 65, NoSuchUser),
            (b"", NoSuchUser),
        ):
            await self.fails(self.login(name, b"wrong"), kind)
        error = await self.fails(self.login(b"temporary", b"x"), TemporaryFailure)
        self.assertEqual(error.text, "Authentication is not possible now, try again later.")
        self.assertEqual(error.detail, "the reason why")
        await self.fails(self.login(b"bob", b"x" * 513), NoVerifierOfThisKind)
        self.assertEqual(await self.login(b"bob", b"bob"), b"bob")
        self.assertEqual(self.pids()[1], below)

    async def test_apop(self) -> None:
        import hashlib

        self.start()
        (checker,) = self.process.checkers()
        self.assertEqual(
            set(checker.credentialInterfaces), {IUsernamePassword, IUsernameHashedPassword}
        )
        digest = hashlib.md5(CHALLENGE + b"ecila").hexdigest().encode()
        verified = await checker.requestAvatarId(ApopCredentials(b"alice", CHALLENGE, digest))
        self.assertEqual(verified.account.name, b"alice")
        wrong = ApopCredentials(b"alice", CHALLENGE, b"0" * 32)
        await self.fails(checker.requestAvatarId(wrong), BadCredentials)
        cram = CramMD5Credentials()
        cram.username = b"alice"
        for credentials in (
            ApopCredentials(b"alice", b"c" * 401, digest),
            ApopCredentials(b"alice", CHALLENGE, digest[:-1]),
            cram,
        ):
            await self.fails(checker.requestAvatarId(credentials), NoVerifierOfThisKind)

    async def test_several_sources(self) -> None:
        (self.folder / "words").write_text("the words\n")
        self.start(f"password:{self.folder}", f"reads:{self.folder}/words")
        first, second = self.process.checkers()
        self.assertEqual(first.credentialInterfaces, (IUsernamePassword,))
        await self.fails(second.requestAvatarId(Cleartext(b"bob", b"bob")), BadCredentials)
        self.assertEqual(await self.login(b"bob", b"bob", 0), b"bob")
        self.assertEqual(await self.login(b"bob", b"the words", 1), b"bob")

    async def test_many_at_once(self) -> None:
        """More than there are threads or room in the socket: each gets its own answer."""
        self.start()
        (checker,) = self.process.checkers()
        users = [b"user%d" % number for number in range(300)]
        logins = [
            checker.requestAvatarId(Cleartext(user, user[::-1] if n % 3 else b"wrong"))
            for n, user in enumerate(users)
        ]
        for n, (user, login) in enumerate(zip(users, logins, strict=True)):
            if n % 3:
                self.assertEqual(await login, user)
            else:
                await self.fails(login, BadCredentials)
        threads = [int(path.read_text().split()[1]) for path in self.folder.glob("user*.began")]
        self.assertEqual(len(threads), 300)
        self.assertLessEqual(max(threads), helper.THREADS + 1)

    async def test_killed_in_the_middle_of_a_call(self) -> None:
        """`[SYS/TEMP]` for what was under way; the next call is answered by a new helper."""
        self.start()
        waiting = self.login(b"waits", b"x")
        from twisted.internet.defer import ensureDeferred

        call = ensureDeferred(waiting)
        await self.until(self.folder / "waits.began")
        _, pid = self.pids()
        os.kill(pid, signal.SIGKILL)
        error = await self.fails(call, TemporaryFailure)
        self.assertEqual(error.detail, "the helper ended: signal 9")
        self.assertEqual(await self.login(b"bob", b"bob"), b"bob")
        self.assertNotEqual(self.pids()[1], pid)
        # And again: the pauses between them grow, but there is always a next one.
        os.kill(self.pids()[1], signal.SIGKILL)
        while True:
            try:
                self.assertEqual(await self.login(b"bob", b"bob"), b"bob")
            except TemporaryFailure:
                continue
            break
        self.flushLoggedErrors()

    async def test_cancelled(self) -> None:
        """The client has gone: its answer goes nowhere, and others get theirs."""
        self.start()
        (checker,) = self.process.checkers()
        call = checker.requestAvatarId(Cleartext(b"waits", b"x"))
        await self.until(self.folder / "waits.began")
        call.cancel()
        from twisted.internet.defer import CancelledError

        await self.fails(call, CancelledError)
        (self.folder / "go").touch()
        self.assertEqual(await self.login(b"bob", b"bob"), b"bob")
        current = self.process.current
        assert current is not None
        self.assertEqual(current._waiting, {})

    async def test_no_answer_in_time(self) -> None:
        self.patch(helperclient.Slot, "patience", 0.05)
        self.start()
        error = await self.fails(self.login(b"waits", b"x"), TemporaryFailure)
        self.assertIn("no answer within", error.detail)
        self.patch(helperclient.Slot, "patience", float(DEADLINE))
        self.assertEqual(await self.login(b"bob", b"bob"), b"bob")
        (self.folder / "go").touch()

    async def test_a_message_that_is_none_shuts_the_connection(self) -> None:
        process = self.start()
        above, below = self.pids()
        current = process.current
        assert current is not None
        with watched(above, below) as ends:
            current._socket.send(b"\1\1\0 what is this")
            error = await self.fails(self.login(b"bob", b"bob"), TemporaryFailure)
            self.assertIn("shut this connection", error.detail)
            await self.fails(self.login(b"bob", b"bob"), TemporaryFailure)
            await process.stop(reactor)
            self.assertTrue(all_end(ends))

    async def test_descriptors_cannot_be_pushed_in(self) -> None:
        process = self.start()
        current = process.current
        assert current is not None
        _, below = self.pids()
        record = helperwire.encode_request(Request(Kind.PASSWORD, 0, 1, b"bob", Secret(b"bob")))
        with open("/dev/null") as file, watched(below) as ends:
            socket.send_fds(current._socket, [record], [file.fileno()])
            error = await self.fails(self.login(b"bob", b"bob"), TemporaryFailure)
            self.assertIn("shut this connection", error.detail)
            await process.stop(reactor)
            self.assertTrue(all_end(ends))

    async def test_processes(self) -> None:
        """What they have: an environment of our words (CVE-2014-6271), few descriptors, no core."""
        self.patch(os, "environ", {**os.environ, "LD_PRELOAD": "", "POPDROP_X": "() { :;};"})
        await deferLater(reactor, 0)  # the reactor has opened what it needs
        ours = descriptors()
        process = self.start()
        started = descriptors()
        self.assertLessEqual(started - ours, 2)
        above, below = self.pids()
        for pid in (above, below):
            with contextlib.suppress(PermissionError):  # not ours to look at, if we are not root
                octets = Path(f"/proc/{pid}/environ").read_bytes()
                found = dict(each.split(b"=", 1) for each in octets.split(b"\0") if each)
                self.assertEqual(
                    found, {b"PATH": b"/usr/sbin:/usr/bin:/sbin:/bin", b"LC_ALL": b"C.UTF-8"}
                )
                limits = Path(f"/proc/{pid}/limits").read_text()
                self.assertRegex(limits, r"Max core file size +0 +0 ")
                self.assertEqual(os.readlink(f"/proc/{pid}/cwd"), "/")
                targets = {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)}
                self.assertIn("/dev/null", targets)
            # They are not dumpable: their files in /proc are root's.
            self.assertEqual(os.stat(f"/proc/{pid}/environ").st_uid, 0)
            self.assertNotIn(b"words", Path(f"/proc/{pid}/cmdline").read_bytes())
        before = None if os.geteuid() else descriptors(below)
        for number in range(60):
            await self.login(b"bob", b"bob")
            await self.fails(self.login(b"user%d" % number, b"wrong"), BadCredentials)
        if before is not None:
            await until_at_most(before, below)
        await until_at_most(started)
        await process.stop(reactor)
        await until_at_most(ours)

    async def test_stop(self) -> None:
        process = self.start()
        (checker,) = process.checkers()
        call = checker.requestAvatarId(Cleartext(b"waits", b"x"))
        await self.until(self.folder / "waits.began")
        with watched(*self.pids()) as ends:
            await gatherResults([self.fail_of(call), self.stop_of(process)])
            self.assertTrue(all_end(ends))
        self.assertFalse(process.started)
        await self.fails(checker.requestAvatarId(Cleartext(b"bob", b"bob")), TemporaryFailure)

    def fail_of(self, call: Any) -> Any:
        return self.assertFailure(call, TemporaryFailure)

    def stop_of(self, process: HelperProcess) -> Any:
        from twisted.internet.defer import ensureDeferred

        return ensureDeferred(process.stop(reactor))

    async def test_signals_of_a_service_manager_end_nothing(self) -> None:
        """It signals all processes; logins go on until the server itself ends."""
        self.start()
        for pid in self.pids():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        below = self.pids()[1]
        self.assertEqual(await self.login(b"bob", b"bob"), b"bob")
        self.assertEqual(self.pids()[1], below)

    async def test_the_supervisor_is_killed(self) -> None:
        """Nobody can start a helper any more: it ends, and every login says so at once."""
        self.start()
        above, below = self.pids()
        with watched(below) as ends:
            os.kill(above, signal.SIGKILL)
            self.assertTrue(all_end(ends))
        await self.fails(self.login(b"bob", b"bob"), TemporaryFailure)
        await self.fails(self.login(b"bob", b"bob"), TemporaryFailure)

    def test_the_network_process_is_killed(self) -> None:
        """SIGKILL leaves it no moment to say good-bye."""
        code = (
            "import sys, os, time\n"
            "from popdrop.accounts.helperclient import HelperProcess\n"
            f"process = HelperProcess(['words:'], registry={REGISTRY!r})\n"
            "process.start(os.geteuid(), os.getegid())\n"
            "print(process.supervisor_pid, process.current.hello.pid, flush=True)\n"
            "time.sleep(3600)\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(self.folder),
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        assert child.stdout is not None
        self.addCleanup(child.stdout.close)
        above, below = map(int, child.stdout.readline().split())
        with watched(above, below) as ends:
            child.kill()
            self.assertTrue(all_end(ends))

    def test_modules_from_where_the_user_may_write(self) -> None:
        """A helper that is started anew must not take them from there (decision 19)."""
        owners = {"/root": (0, 0o755), "/user": (4711, 0o755), "/any": (0, 0o1777)}

        def stat(path: str) -> SimpleNamespace:
            if path not in owners:
                raise FileNotFoundError(path)
            return SimpleNamespace(st_uid=owners[path][0], st_mode=owners[path][1])

        self.patch(os, "stat", stat)
        path = [*owners, "/gone"]
        # Without root's rights the helper can do no more than the user.
        self.patch(os, "geteuid", lambda: 4711)
        self.assertEqual(helperclient._safe_path(path, 4711), path)
        self.patch(os, "geteuid", lambda: 0)
        self.assertEqual(helperclient._safe_path(path, 0), path)
        self.assertEqual(helperclient._safe_path(path, 4711), ["/root"])
        self.assertEqual(helperclient._safe_path(path, 4712), ["/root", "/user"])
        owners["/user/popdrop/accounts/helper.py"] = (4711, 0o644)
        self.assertEqual(helperclient._safe_path(path, 4711), ["/root", "/user"])

    def test_wrong_strings(self) -> None:
        """Told before anything is started, by one line that names the string."""
        error = self.assertRaises(
            ConfigError, HelperProcess, ["words:", "nonsense:x"], registry=REGISTRY
        )
        self.assertIn("--auth helper:nonsense:x: no such checker", str(error))
        error = self.assertRaises(
            ConfigError, HelperProcess, ["words:", "wrong:x"], registry=REGISTRY
        )
        self.assertEqual(str(error), "--auth helper:wrong:x: that is wrong")
        error = self.assertRaises(ConfigError, HelperProcess, ["words:"], registry="nowhere:x")
        self.assertIn("no checkers", str(error))

    def test_options(self) -> None:
        from_options = helperclient.from_options
        self.assertIsNone(from_options(["accounts:/x"], None))
        for auth, service, told in (
            (["helper:"], None, "helper:pam:pop3"),
            (["accounts:/x"], SelfService("popauth", "/x", None, 11), "from / on"),
        ):
            error = self.assertRaises(ConfigError, from_options, auth, service)
            self.assertIn(told, str(error))


ASK = (
    "import sys\n"
    "from popdrop.accounts.helperwire import Kind, SelfRequest\n"
    "from popdrop.accounts.selfservice import self_service\n"
    "from popdrop.values import Secret\n"
    "old, new = (None if word == '-' else Secret(word.encode()) for word in sys.argv[2:4])\n"
    "kind = Kind.HAS if new is None else Kind.SET\n"
    "answer = self_service(sys.argv[1], SelfRequest(kind, old, new))\n"
    "print(answer.kind.name, answer.has, answer.detail)\n"
)


class SelfServiceTests(ProcessCase):
    """`popdrop popauth` of users, through the socket."""

    def setUp(self) -> None:
        super().setUp()
        self.folder.chmod(0o755)
        self.state = self.folder / "state"
        self.state.mkdir(mode=0o700)
        self.database = self.state / "accounts.db"
        AccountsDatabase.create(str(self.database))
        self.owner = (os.geteuid(), os.getegid())
        if os.geteuid() == 0:
            # As after `twistd --uid`: the accounts are not root's.
            self.owner = pwd.getpwnam("games")[2:4]
            for path in (self.state, *self.state.iterdir()):
                os.chown(path, *self.owner)
        self.path = str(self.folder / "run" / "popauth")

    def open_door(self, min_uid: int = 11) -> None:
        service = SelfService(self.path, str(self.database), None, min_uid)
        self.process = HelperProcess([], service)
        self.process.start(*self.owner)
        self.addCleanup(self.process.stop, reactor)

    def ask_as(self, user: str, old: str = "-", new: str = "-") -> str:
        """What `user` is told. Without root's rights everybody is ourselves."""
        command = [sys.executable, "-c", ASK, self.path, old, new]
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                raise SkipTest("setpriv is missing: install the Debian package util-linux")
            _, _, uid, gid, *_ = pwd.getpwnam(user)
            command = [
                "setpriv",
                *("--reuid", str(uid), "--regid", str(gid), "--clear-groups"),
                *command,
            ]
        done = subprocess.run(
            command,
            env=environment(self.folder),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def users(self) -> tuple[str, str]:
        if os.geteuid() == 0:
            return "backup", "nobody"
        own = pwd.getpwuid(os.geteuid()).pw_name
        return own, own

    def secret_of(self, name: str) -> bytes | None:
        accounts = AccountsDatabase(str(self.database))
        try:
            account = accounts.lookup(name.encode())
        finally:
            accounts.close()
        secret = None if account is None else account.apop_secret
        return None if secret is None else secret.reveal()

    def test_own_secret(self) -> None:
        """A user adds himself, and changes his own after giving the old one; nobody else's."""
        self.open_door()
        bob, alice = self.users()
        self.assertEqual(self.ask_as(bob), "HAS_REPLY False")
        self.assertEqual(self.ask_as(bob, "old", "new"), "NONE False")
        self.assertIsNone(self.secret_of(bob))
        self.assertEqual(self.ask_as(bob, "-", "the first secret"), "DONE False")
        self.assertEqual(self.secret_of(bob), b"the first secret")
        if alice != bob:
            self.assertEqual(self.ask_as(alice), "HAS_REPLY False")
            self.assertEqual(self.ask_as(alice, "-", "hers"), "DONE False")
            self.assertEqual(self.secret_of(alice), b"hers")
        self.assertEqual(self.secret_of(bob), b"the first secret")
        self.assertEqual(self.ask_as(bob), "HAS_REPLY True")
        self.assertEqual(self.ask_as(bob, "the first secret", "the second"), "DONE False")
        self.assertEqual(self.secret_of(bob), b"the second")
        owners = {os.stat(path).st_uid for path in self.state.iterdir()}
        self.assertEqual(owners, {self.owner[0]})

    def test_wrong_old_secret(self) -> None:
        """Each counts for three: soon there is no more trying."""
        self.open_door()
        bob, alice = self.users()
        self.assertEqual(self.ask_as(bob, "-", "the first secret"), "DONE False")
        told = [self.ask_as(bob, old, "mine now") for old in ("-", "x")]
        self.assertEqual(told, ["WRONG False"] * 2)
        # However slow this is: three are forgotten in 30 s only.
        while told[-1] == "WRONG False" and len(told) < 20:
            told.append(self.ask_as(bob, "y", "mine now"))
        self.assertEqual(told[-1], "LATER False")
        self.assertEqual(self.secret_of(bob), b"the first secret")
        if alice != bob:
            self.assertEqual(self.ask_as(alice), "HAS_REPLY False")

    def test_who_may_not(self) -> None:
        """uid 0 has `popdrop popauth -user`; system accounts have nothing."""
        floor = os.geteuid() + 1 if os.geteuid() else 11
        self.open_door(floor)
        for user in ("root", "daemon") if os.geteuid() == 0 else self.users():
            told = self.ask_as(user, "-", "mine")
            self.assertEqual(told, "REFUSED False not for this user")
        accounts = AccountsDatabase(str(self.database))
        self.assertEqual(accounts.names(), [])
        accounts.close()

    def test_rights_of_the_owner(self) -> None:
        """What only root may open is not opened for anybody (CVE-2005-1151)."""
        self.open_door(0)
        if os.geteuid() == 0:
            os.chown(self.database, 0, 0)
        else:
            self.database.chmod(0)
        told = self.ask_as(self.users()[0], "-", "mine")
        self.assertEqual(told, "FAILED False the accounts cannot be changed now")

    def test_garbage(self) -> None:
        self.open_door(0)
        bob, _ = self.users()
        code = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "s.connect(sys.argv[1])\n"
            "s.send(b'\\x01\\x41 set me, please')\n"
            "print(s.recv(4096)[1])\n"
        )
        self.patch(sys.modules[__name__], "ASK", code)
        self.assertEqual(self.ask_as(bob), str(int(Kind.REFUSED)))

    def test_perform(self) -> None:
        """The rules, without processes."""
        path = str(self.folder / "own" / "accounts.db")
        AccountsDatabase.create(path)
        accounts = AccountsDatabase(path)
        self.addCleanup(accounts.close)
        accounts.add(b"pw", password=Secret(b"a password"))
        accounts.add(b"off", apop=Secret(b"secret of off"))
        accounts.disable(b"off")
        accounts.add(b"on", apop=Secret(b"secret of on"))

        def wish(name: bytes, old: bytes | None, new: bytes) -> Kind:
            request = SelfRequest(Kind.SET, None if old is None else Secret(old), Secret(new))
            return perform(accounts, name, request).kind

        self.assertEqual(wish(b"off", b"secret of off", b"mine"), Kind.REFUSED)
        self.assertEqual(wish(b"on", None, b"mine"), Kind.WRONG)
        self.assertEqual(wish(b"on", b"", b"mine"), Kind.WRONG)
        self.assertEqual(wish(b"on", b"\xff\0", b"mine"), Kind.WRONG)
        self.assertEqual(wish(b"pw", None, b"mine"), Kind.DONE)
        kept = accounts.lookup(b"pw")
        assert kept is not None and kept.password_hash is not None
        assert kept.apop_secret is not None
        self.assertEqual(kept.apop_secret.reveal(), b"mine")

    def test_no_server(self) -> None:
        error = self.assertRaises(ConfigError, self_service, self.path, SelfRequest(Kind.HAS))
        self.assertIn(f"--popauth-socket {self.path}", str(error))

    def test_places_that_are_not_safe(self) -> None:
        (self.folder / "open").mkdir()
        (self.folder / "open").chmod(0o777)
        (self.folder / "file").touch()
        for name, told in (("open/popauth", "others may write"), ("file", "file of this name")):
            self.path = str(self.folder / name)
            error = self.assertRaises(ConfigError, self.open_door)
            self.assertIn(told, str(error))

    def test_left_over_socket(self) -> None:
        """A killed server leaves its socket; a running one keeps it."""
        os.mkdir(os.path.dirname(self.path))
        left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        left.bind(self.path)
        left.listen()
        error = self.assertRaises(ConfigError, self.open_door)
        self.assertIn("another server", str(error))
        left.close()
        self.open_door()
        self.assertEqual(self.ask_as(self.users()[0]), "HAS_REPLY False")
