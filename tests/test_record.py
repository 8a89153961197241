"""Lines of the session log, and the sinks that take them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import LogLevel, globalLogPublisher
from twisted.trial.unittest import SkipTest, SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop import __version__, record
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    InUse,
    LoginDelay,
    PermanentFailure,
    TemporaryFailure,
)
from popdrop.interfaces import ISessionLog
from popdrop.record import Several, escaped, from_spec
from popdrop.values import PeerFacts, SessionRecord, Tally
from tests.descriptors import descriptors
from tests.end_to_end.harness import DEADLINE

PEER = PeerFacts(
    "192.0.2.1",
    port=40000,
    local_port=110,
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_256_GCM_SHA384",
)
PLAIN = PeerFacts("2001:db8::1", port=40000, local_port=110)
NOBODY = PeerFacts()
TALLY = Tally(3, 4711, 1, 99, 2, 1234, 5, 6789)
HOSTILE = b"x\rroot logged in\x1b[2J \"'\\\xff"


def made(event: str, **kwargs) -> SessionRecord:
    facts = {
        "peer": PEER,
        "user": b"bob",
        "mechanism": "APOP",
        "reason": {"login": "ok", "failure": "bad-credentials", "end": "quit"}[event],
        "duration": 0.25,
        "tally": TALLY,
        "listener": "tcp:110",
    }
    return SessionRecord(event=event, **{**facts, **kwargs})


class EscapingTests(SynchronousTestCase):
    def test_examples(self) -> None:
        for octets, expected in (
            (b"bob", "bob"),
            (b"bob+tag@mail.example", "bob+tag@mail.example"),
            (b"", ""),
            (None, "-"),
            (b"a b", "a\\x20b"),
            (b"a\r\nb\0", "a\\x0d\\x0ab\\x00"),
            (b"\x1b[2J\x7f", "\\x1b[2J\\x7f"),
            (b"\"'\\", "\\x22\\x27\\x5c"),
            ("é".encode(), "\\xc3\\xa9"),
            (b"x" * 64, "x" * 64),
            (b"x" * 65, "x" * 64),
            (b"\xff" * 100, "\\xff" * 64),
        ):
            self.assertEqual(escaped(octets), expected)

    @settings(deadline=None, derandomize=True)
    @given(st.binary(max_size=80))
    def test_printable_reversible_and_without_quotes(self, octets) -> None:
        text = escaped(octets)
        self.assertRegex(text, r"\A[!-~]*\Z")
        self.assertFalse(set(text) & set("\"' "))
        back = re.sub(r"\\x(..)", lambda found: chr(int(found[1], 16)), text)
        self.assertEqual(back.encode("latin-1"), octets[:64])


class PlainTests(SynchronousTestCase):
    def test_lines(self) -> None:
        who = 'user="bob" address=192.0.2.1 mechanism=APOP tls=TLSv1.3'
        for each, expected in (
            (made("login"), f"login {who} reason=ok seconds=0.250"),
            (
                made("failure", peer=PLAIN, mechanism="PLAIN", reason="apop-account"),
                'failure user="bob" address=2001:db8::1 mechanism=PLAIN tls=-'
                " reason=apop-account seconds=0.250",
            ),
            (
                made("end"),
                f"end {who} reason=quit retr=3/4711 top=1/99 deleted=2/1234 left=5/6789"
                " seconds=0.250",
            ),
            (
                made("failure", peer=NOBODY, user=None, mechanism=None),
                'failure user="-" address=- mechanism=- tls=- reason=bad-credentials seconds=0.250',
            ),
        ):
            self.assertEqual(record.plain(each), expected)


class JSONTests(SynchronousTestCase):
    def test_fields(self) -> None:
        with mock.patch.object(record.time, "time", lambda: 1790000000.0625):
            line = record.as_json(made("end"))
        self.assertNotIn("\n", line)
        self.assertEqual(
            json.loads(line),
            {
                "time": "2026-09-21T14:13:20.062Z",
                "event": "end",
                "address": "192.0.2.1",
                "port": 40000,
                "local_port": 110,
                "listener": "tcp:110",
                "tls": "TLSv1.3",
                "cipher": "TLS_AES_256_GCM_SHA384",
                "mechanism": "APOP",
                "user": "bob",
                "reason": "quit",
                "seconds": 0.25,
                "retr": 3,
                "retr_octets": 4711,
                "top": 1,
                "top_octets": 99,
                "deleted": 2,
                "deleted_octets": 1234,
                "left": 5,
                "left_octets": 6789,
            },
        )

    def test_unknown_is_null(self) -> None:
        found = json.loads(record.as_json(made("failure", peer=NOBODY, user=None, mechanism=None)))
        for name in ("user", "mechanism", "address", "port", "tls", "cipher"):
            self.assertIs(found[name], None)


class QpopperTests(SynchronousTestCase):
    """The words of qpopper 4, in pop_pass.c and pop_updt.c."""

    def test_lines(self) -> None:
        for each, expected in (
            (
                made("login"),
                f'(v{__version__}) POP login by user "bob" at (192.0.2.1) 192.0.2.1',
            ),
            (
                made("failure"),
                "[AUTH] Failed attempted login to bob from host (192.0.2.1) 192.0.2.1",
            ),
            (made("end"), "Stats: bob 2 1234 5 6789 192.0.2.1 192.0.2.1"),
            (
                made("end", mechanism=None, reason="idle-timeout"),
                "Stats: bob 2 1234 5 6789 192.0.2.1 192.0.2.1",
            ),
            (
                made("end", mechanism=None, reason="quit-before-login"),
                "Possible probe of account bob from host 192.0.2.1 (192.0.2.1)",
            ),
            (made("end", user=None, mechanism=None, reason="quit-before-login"), None),
        ):
            self.assertEqual(record.qpopper(each), expected)

    def test_who_is_locked_out_is_not_reported_as_a_guesser(self) -> None:
        for reason in (
            *(kind("").word for kind in (InUse, LoginDelay, TemporaryFailure, PermanentFailure)),
            "sys-temp",
            "abandoned",
            "tls-required",
        ):
            line = record.qpopper(made("failure", reason=reason))
            self.assertNotIn("Failed attempted login", line)
            self.assertIn(reason, line)
        for reason in (BadCredentials("").word, "bad-credentials", "apop-account", "cleartext"):
            line = record.qpopper(made("failure", reason=reason))
            self.assertIn("Failed attempted login", line)


class SqmailTests(SynchronousTestCase):
    def line(self, event: str, **kwargs) -> str | None:
        with mock.patch.object(record.os, "getpid", lambda: 4711):
            return record.sqmail(made(event, **kwargs))

    def test_lines(self) -> None:
        start = "qmail-popup: pid 4711 "
        for event, facts, expected in (
            ("login", {}, "Accept::AUTH::Apop P:POP3S S:192.0.2.1:unknown ?~ 'bob'"),
            (
                "login",
                {"mechanism": "USER", "peer": PLAIN},
                "Accept::AUTH::User P:POP3 S:2001:db8::1:unknown ?~ 'bob'",
            ),
            (
                "login",
                {"mechanism": "SCRAM-SHA-256", "peer": PeerFacts("::1", local_port=995)},
                "Accept::AUTH::Auth P:POP3S S:::1:unknown ?~ 'bob'",
            ),
            (
                "failure",
                {"peer": NOBODY, "user": None, "mechanism": None},
                "Reject::AUTH::User P:POP3 S:unknown:unknown ?~ 'unknown'",
            ),
            (
                "failure",
                {"peer": PLAIN, "reason": "tls-required"},
                "Reject::STLS::Any P:POP3 S:2001:db8::1:unknown ?~ 'unknown'",
            ),
        ):
            self.assertEqual(self.line(event, **facts), start + expected)

    def test_nothing_at_the_end_and_for_the_locked_out(self) -> None:
        self.assertIs(self.line("end"), None)
        self.assertIs(self.line("failure", reason="in-use"), None)


class HostileTests(SynchronousTestCase):
    def test_one_printable_line_with_nothing_of_the_clients(self) -> None:
        for emitter in record.KINDS.values():
            for event in ("login", "failure", "end"):
                line = emitter(made(event, user=HOSTILE, mechanism='X"\r\nY'))
                if line is None:
                    continue
                self.assertRegex(line, r"\A[ -~]+\Z")
                self.assertNotIn("root logged in", line)
                self.assertNotIn('X"', line)

    @settings(deadline=None, derandomize=True)
    @given(st.binary(max_size=300), st.sampled_from(sorted(record.KINDS)))
    def test_any_name_leaves_the_shape_of_the_line(self, user, kind) -> None:
        for event in ("login", "failure", "end"):
            line = record.KINDS[kind](made(event, user=user))
            if line is None:
                continue
            if kind == "json":
                self.assertEqual(json.loads(line)["user"], escaped(user))
                continue
            bob = record.KINDS[kind](made(event))
            self.assertEqual(len(line.split(" ")), len(bob.split(" ")))


class SinkCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.makedirs(self.folder)
        self.file = os.path.join(self.folder, "sessions.log")

    def open(self, text: str):
        sessions = from_spec(text)
        verifyObject(ISessionLog, sessions)
        self.addCleanup(sessions.close)
        return sessions

    def lines(self, path: str | None = None) -> list[str]:
        with open(path or self.file) as file:
            return file.read().splitlines()

    def logged(self) -> list[dict]:
        """A list that fills with what is logged from now on."""
        events: list[dict] = []

        def observe(event) -> None:
            if event.get("log_namespace") == "popdrop.record":
                events.append(event)

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        return events


class SpecTests(SinkCase):
    def test_mistakes_name_option_and_remedy(self) -> None:
        for text, part in (
            ("jsn", "known: plain, json, qpopper, sqmail;"),
            ("json:fd=x", "no open descriptor"),
            ("json:fd=-1", "no open descriptor"),
            ("json:fd=99999999999999999999", "no open descriptor"),
            ("json:fd=999", "no open descriptor"),
            ("json:sessions.log", "./sessions.log"),
            ("json:log:log", "one sink"),
            ("json:fid=3", "one sink"),
            ("json:/nowhere/at/all", "create its folder"),
            (f"json:{self.folder}/", "cannot be opened"),
        ):
            with self.assertRaises(ConfigError) as caught:
                from_spec(text)
            line = str(caught.exception)
            self.assertIn(f"--session-log {text}: ", line)
            self.assertIn(part, line)
            self.assertNotIn("\n", line)

    def test_a_pipe_that_nobody_reads_is_no_wait(self) -> None:
        os.mkfifo(self.file)
        with self.assertRaises(ConfigError):
            from_spec(f"json:{self.file}")


class TwistedLogTests(SinkCase):
    def test_one_event_with_fields(self) -> None:
        events = self.logged()
        for text in ("plain", "qpopper:log"):
            self.open(text).event(made("login", user=HOSTILE))
        self.assertEqual([event["log_level"] for event in events], [LogLevel.info] * 2)
        self.assertEqual(events[0]["session_event"], "login")
        self.assertEqual(events[0]["user"], escaped(HOSTILE))
        self.assertEqual(events[0]["address"], "192.0.2.1")
        self.assertTrue(events[1]["line"].startswith(f"(v{__version__}) POP login"))
        for event in events:
            self.assertNotIn(HOSTILE, event.values())

    def test_a_failure_is_a_warning(self) -> None:
        events = self.logged()
        self.open("plain:log").event(made("failure"))
        self.assertEqual([event["log_level"] for event in events], [LogLevel.warn])

    def test_nothing_for_no_line(self) -> None:
        events = self.logged()
        self.open("sqmail").event(made("end"))
        self.assertEqual(events, [])


class FileTests(SinkCase):
    def test_append_and_private(self) -> None:
        with open(self.file, "w") as file:
            file.write("before\n")
        os.chmod(self.file, 0o640)
        sessions = self.open(f"json:{self.file}")
        sessions.event(made("login"))
        sessions.event(made("end"))
        sessions.close()
        before, login, end = self.lines()
        self.assertEqual(before, "before")
        self.assertEqual([json.loads(each)["event"] for each in (login, end)], ["login", "end"])
        self.assertEqual(stat.S_IMODE(os.stat(self.file).st_mode), 0o640)

    def test_a_new_file_is_private(self) -> None:
        old = os.umask(0)
        try:
            self.open(f"json:{self.file}")
        finally:
            os.umask(old)
        self.assertEqual(stat.S_IMODE(os.stat(self.file).st_mode), 0o600)

    def test_times(self) -> None:
        with mock.patch.object(record.socket, "gethostname", lambda: "mail"):
            for kind in ("plain", "qpopper", "sqmail"):
                sessions = self.open(f"{kind}:{self.file}")
                sessions.event(made("login"))
                sessions.close()
        plain, qpopper, sqmail = self.lines()
        self.assertRegex(plain, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z login user=")
        stamp = rf"\A[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d mail popdrop\[{os.getpid()}\]: "
        self.assertRegex(qpopper, stamp + r"\(v")
        self.assertRegex(sqmail, stamp + r"qmail-popup: pid")

    def test_the_stamp_of_syslog(self) -> None:
        moment = time.mktime((2026, 3, 7, 9, 5, 1, 0, 0, -1))
        self.assertTrue(record._syslog_stamp(moment).startswith("Mar  7 09:05:01 "))

    def test_reopen_after_rotation(self) -> None:
        sessions = self.open(f"json:{self.file}")
        sessions.event(made("login"))
        self.assertTrue(self.wait_for(lambda: self.lines()))
        os.rename(self.file, self.file + ".1")
        sessions.event(made("failure"))
        sessions.reopen()
        sessions.event(made("end"))
        sessions.close()
        old = [json.loads(each)["event"] for each in self.lines(self.file + ".1")]
        self.assertEqual(old, ["login", "failure"])
        self.assertEqual([json.loads(each)["event"] for each in self.lines()], ["end"])

    def wait_for(self, condition) -> bool:
        end = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def test_the_old_file_stays_when_the_new_cannot_be_opened(self) -> None:
        events = self.logged()
        sessions = self.open(f"json:{self.file}")
        os.rename(self.file, self.file + ".1")
        os.mkdir(self.file)
        sessions.reopen()
        sessions.event(made("end"))
        sessions.close()
        self.assertEqual(len(self.lines(self.file + ".1")), 1)
        self.assertEqual([event["why"] for event in events], [os.strerror(errno.EISDIR)])

    def test_closing_is_idempotent_and_nothing_comes_after(self) -> None:
        for use in (True, False):
            sessions = self.open(f"json:{self.file}")
            if use:
                sessions.event(made("login"))
            sessions.close()
            sessions.close()
            sessions.event(made("end"))
            sessions.reopen()
        self.assertEqual(len(self.lines()), 1)

    def test_no_descriptor_and_no_thread_is_left(self) -> None:
        count, threads = descriptors(), set(threading.enumerate())
        for _ in range(5):
            sessions = self.open(f"json:{self.file}")
            sessions.event(made("login"))
            sessions.reopen()
            sessions.close()
        self.assertLessEqual(descriptors(), count)
        self.assertLessEqual(set(threading.enumerate()), threads)

    def test_no_thread_before_the_first_line(self) -> None:
        """A daemon forks after the options were read, and threads do not survive that."""
        before = set(threading.enumerate())
        sessions = self.open(f"json:{self.file}")
        self.assertLessEqual(set(threading.enumerate()), before)
        sessions.event(made("login"))
        self.assertEqual(len(set(threading.enumerate()) - before), 1)

    def test_two_processes_do_not_mix_lines(self) -> None:
        code = (
            "import sys; from tests.test_record import from_spec, made\n"
            "sessions = from_spec(sys.argv[1])\n"
            "for _ in range(300): sessions.event(made('end'))\n"
            "sessions.close()"
        )
        root = os.path.dirname(os.path.dirname(os.path.abspath(record.__file__)))
        text = f"json:{os.path.abspath(self.file)}"
        writers = [subprocess.Popen([sys.executable, "-c", code, text], cwd=root) for _ in "ab"]
        self.assertEqual([writer.wait(DEADLINE) for writer in writers], [0, 0])
        self.assertEqual([json.loads(each)["event"] for each in self.lines()], ["end"] * 600)


class RootTests(SynchronousTestCase):
    """Root's start, with a log in a folder of the server's user."""

    def test_a_link_gives_away_nothing_of_roots(self) -> None:
        if os.geteuid() != 0:
            raise SkipTest("needs root's rights, to have files of two users")
        above = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, above)
        os.chmod(above, 0o755)
        folder, victim = os.path.join(above, "log"), os.path.join(above, "victim")
        with open(victim, "w"):
            pass
        os.chmod(victim, 0o600)
        for uid in (12345, 0):
            os.mkdir(folder)
            os.chown(folder, uid, uid)
            path = os.path.join(folder, "sessions")
            os.symlink(victim, path)
            with contextlib.suppress(ConfigError):
                self.start(path, 12345 if uid else 0)
            self.assertEqual(os.stat(victim).st_uid, 0)
            os.unlink(path)
            self.start(path, 12345)
            self.assertEqual((os.stat(path).st_uid, os.stat(path).st_gid), (12345, 12345))
            shutil.rmtree(folder)

    def start(self, path: str, uid: int) -> None:
        log = from_spec(f"plain:{path}")
        self.addCleanup(log.close)
        log.hand_over(uid, uid)


class DescriptorTests(SinkCase):
    def test_the_bare_line(self) -> None:
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        sessions = self.open(f"qpopper:fd={writing}")
        os.close(writing)
        sessions.event(made("end"))
        sessions.reopen()
        sessions.close()
        expected = b"Stats: bob 2 1234 5 6789 192.0.2.1 192.0.2.1\n"
        self.assertEqual(os.read(reading, 1000), expected)
        self.assertEqual(os.read(reading, 1000), b"")


class TroubleTests(SinkCase):
    def test_a_write_error_is_told_once_a_minute_and_harms_nobody(self) -> None:
        events = self.logged()
        sessions = self.open("json:/dev/full")
        for _ in range(50):
            sessions.event(made("end"))
        sessions.close()
        self.assertEqual([event["why"] for event in events], [os.strerror(errno.ENOSPC)])

    def test_the_next_complaint_counts_those_between(self) -> None:
        events = self.logged()
        complaints = record._Complaints()
        moment = 1000.0
        with mock.patch.object(record.time, "monotonic", lambda: moment):
            for _ in range(5):
                complaints.add("x", OSError())
            moment += 60
            complaints.add("x", OSError())
        self.assertEqual([event["lost"] for event in events], [1, 5])

    def test_an_emitter_that_raises_harms_nobody(self) -> None:
        events = self.logged()
        sessions = self.open("plain")
        sessions.event(made("end", duration="not a number"))
        self.assertEqual([event["why"] for event in events], ["ValueError"])

    def test_a_stalled_disk_stalls_nobody_and_what_is_lost_is_told(self) -> None:
        events = self.logged()
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        sessions = self.open(f"json:fd={writing}")
        os.close(writing)
        with mock.patch.object(record, "QUEUE_LINES", 20):
            for _ in range(200):
                sessions.event(made("end"))
        self.assertEqual(["keep up" in event["what"] for event in events], [True])
        got = bytearray()

        def read() -> None:
            while part := os.read(reading, 4096):
                got.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        sessions.close()
        reader.join()
        count = len([json.loads(each) for each in got.decode().splitlines()])
        self.assertTrue(20 <= count < 200, count)

    def test_after_half_a_line_a_new_one_begins(self) -> None:
        events = self.logged()
        sessions = self.open(f"json:{self.file}")
        write = os.write
        first = True

        def half(fd: int, octets: bytes) -> int:
            nonlocal first
            if first:
                first = False
                return write(fd, octets[:10])
            return write(fd, octets)

        with mock.patch.object(record.os, "write", half):
            sessions.event(made("login"))
            sessions.event(made("end"))
            sessions.close()
        torn, whole = self.lines()
        self.assertEqual(len(torn), 10)
        self.assertEqual(json.loads(whole)["event"], "end")
        self.assertEqual([event["lost"] for event in events], [1])


class SeveralTests(SinkCase):
    def test_each_gets_each(self) -> None:
        other = self.file + ".too"
        several = Several([self.open(f"json:{self.file}"), self.open(f"plain:{other}")])
        verifyObject(ISessionLog, several)
        several.event(made("login"))
        several.reopen()
        several.close()
        self.assertEqual((len(self.lines()), len(self.lines(other))), (1, 1))
