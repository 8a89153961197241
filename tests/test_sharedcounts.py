"""One table of counts and several processes, some of which are killed."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from popdrop import sharedcounts
from popdrop.errors import ConfigError
from popdrop.sharedcounts import COLUMNS, Numbers, since_boot
from popdrop.throttle import Memory, Shared, from_spec
from tests.test_throttle import LOCAL, PROPERTY, counted, limits, named, v4, v6

ROOT = Path(__file__).parent.parent
DEADLINE = 120
"""Seconds after which a test gives up on a child; no result depends on it."""

CHILD = """
import os, sys, time
from twisted.internet.address import IPv4Address
from popdrop.throttle import Shared
from popdrop.sharedcounts import Numbers

path, numbers, what = sys.argv[1], Numbers(*map(int, sys.argv[2].split(","))), sys.argv[3]
shared = Shared.attach(int(path)) if path.isdigit() else Shared.open(path, numbers)
peer = lambda i: IPv4Address("TCP", "192.0.2.%d" % i, 1)

def hammer():
    i = os.getpid()
    while True:
        i = (i * 1103515245 + 12345) % 2**31
        peers, user = peer(i // 256 % 250), b"user%d" % (i // 65536 % 50)
        inside = shared.admit(peers)
        ticket = shared.attempt(peers, user, b"%d" % i * 4)
        entered = shared.enter(user)
        shared.delay(peers, user)
        ticket.close(("good", "bad", "void")[i // 1024 % 3])
        if entered:
            shared.quit(user)
        if inside:
            shared.leave(peers)
        if i % 4 == 0:
            time.sleep(0.0001)  # the others must have their turn

if what == "hammer":
    print("ready", flush=True)
    hammer()
for word in what.split(","):
    verb, _, count = word.partition("=")
    for i in range(int(count or 1)):
        if verb == "admit":
            assert shared.admit(peer(1))
        elif verb == "enter":
            assert shared.enter(b"bob")
        elif verb == "attempt":
            kept = globals().setdefault("kept", [])
            kept.append(shared.attempt(peer(1), b"u%d" % i, None))
        elif verb == "bad":
            shared.attempt(peer(1), b"u%d" % i, None).close("bad")
        elif verb == "proof":
            shared.attempt(peer(1), b"bob", b"1" * 32).close("bad")
        elif verb == "inside":
            shared._table.__enter__()
print("ready", shared.proof_key.hex(), flush=True)
sys.stdin.read()
shared.close()
"""


class Case(SynchronousTestCase):
    numbers = limits(total=40, tracked=64, per_address=5, per_user=3)

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.path = self.folder / "throttle"
        self.children: list[subprocess.Popen[str]] = []
        self.addCleanup(self.end_all)

    def open(self, numbers: Numbers | None = None) -> Shared:
        shared = Shared.open(str(self.path), numbers or self.numbers)
        self.addCleanup(shared.close)
        return shared

    def child(self, what: str, descriptor: int | None = None) -> subprocess.Popen[str]:
        """Another process that does this, and then waits."""
        where = str(self.path if descriptor is None else descriptor)
        words = [where, ",".join(map(str, self.numbers)), what]
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            pass_fds=() if descriptor is None else (descriptor,),
        )
        self.children.append(child)
        assert child.stdout is not None
        self.said = child.stdout.readline()
        self.assertTrue(self.said.startswith("ready"), self.said)
        return child

    def kill(self, child: subprocess.Popen[str]) -> None:
        child.kill()
        child.wait(DEADLINE)

    def end_all(self) -> None:
        for child in self.children:
            child.kill()
            child.wait(DEADLINE)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def refusal(self, numbers: Numbers | None = None) -> str:
        error = self.assertRaises(ConfigError, Shared.open, str(self.path), numbers or self.numbers)
        self.assertNotIn("\n", str(error))
        self.assertIn(f"--throttle shared:{self.path}: ", str(error))
        return str(error).partition(f"shared:{self.path}: ")[2]


class FileTests(Case):
    def test_mode_and_names(self) -> None:
        """Only its owner may read it, and neither address nor user is named in it."""
        shared = self.open()
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        shared.admit(v4("192.0.2.77"))
        shared.enter(b"a-rare-name")
        for outcome in ("good", "bad"):
            shared.attempt(v4("192.0.2.77"), b"a-rare-name", b"1" * 32).close(outcome)
        octets = self.path.read_bytes()
        for word in (b"192.0.2.77", bytes([192, 0, 2, 77]), b"a-rare-name", b"1" * 8):
            self.assertNotIn(word, octets)
        self.assertEqual(os.listdir(self.folder), ["throttle"])

    def test_size_is_what_was_announced(self) -> None:
        for numbers in (self.numbers, limits(), limits(tracked=1, total=1), limits(tracked=17)):
            self.open(numbers).close()
            self.assertEqual(self.path.stat().st_size, sharedcounts.size_of(numbers))

    def test_the_spec(self) -> None:
        text = f"shared:{self.path}:total=7:per-user=1"
        shared = from_spec(text, Clock())
        self.addCleanup(shared.close)
        assert isinstance(shared, Shared)
        self.assertEqual(shared.path, str(self.path))
        self.assertEqual([shared.enter(b"bob") for _ in range(2)], [True, False])
        self.assertEqual(sum(shared.admit(v4(f"10.0.0.{i}")) for i in range(9)), 7)

    def test_failures_survive_a_restart_and_connections_do_not(self) -> None:
        first = self.open()
        key = first.proof_key
        first.admit(v4())
        for i in range(3):
            first.attempt(v4(), b"u%d" % i, None).close("bad")
        first.attempt(v4(), b"bob", None)
        first.close()
        first.close()
        second = self.open()
        self.assertEqual(counted(second), (0, 0, 0))
        self.assertEqual(second.delay(v4(), b"x"), 4)
        self.assertEqual(second.proof_key, key)

    def test_an_earlier_boot_is_forgotten(self) -> None:
        first = self.open()
        first.attempt(v4(), b"bob", None).close("bad")
        key = first.proof_key
        first.close()
        self.patch(sharedcounts, "boot_id", lambda: b"b" * 16)
        second = self.open()
        self.assertEqual(named(second), [0, 0, 0])
        self.assertNotEqual(second.proof_key, key)

    def test_other_numbers(self) -> None:
        """Refused while it is in use, else made anew."""
        first = self.open()
        other = self.numbers._replace(total=41)
        self.assertEqual(
            self.refusal(other),
            "in use with total=40:per-address=5:per-user=3:fade=600:tracked=64;"
            " give the same to all servers",
        )
        first.close()
        self.assertEqual(self.open(other)._total, 41)
        self.assertIn("total=41", self.refusal())

    def test_files_that_are_not_ours(self) -> None:
        for octets in (b"", b"\0" * 8192, b"From alice\n", b"SQLite format 3\0" * 999):
            self.path.write_bytes(octets)
            self.path.chmod(0o600)
            self.assertIn("not a table of Popdrop's throttle; name a file", self.refusal())
            self.assertEqual(self.path.read_bytes(), octets)

    def test_damage(self) -> None:
        self.open().close()
        whole = self.path.read_bytes()
        for octets in (
            whole[:100],
            whole[:5000],
            whole + b"\0" * 8,
            whole[:40] + b"\xff" + whole[41:],
            whole[:130] + b"\xff\xff" + whole[132:],
        ):
            self.path.write_bytes(octets)
            self.assertIn("damaged; stop the servers", self.refusal())
        self.path.write_bytes(whole)
        self.open()

    def test_a_later_version(self) -> None:
        self.open().close()
        self.patch(sharedcounts, "VERSION", 2)
        self.assertIn("made by another version of Popdrop", self.refusal())

    def test_modes_links_and_kinds(self) -> None:
        self.open().close()
        self.path.chmod(0o640)
        self.assertIn("chmod 600", self.refusal())
        self.path.chmod(0o600)
        self.path.rename(self.folder / "elsewhere")
        self.path.symlink_to("elsewhere")
        self.assertIn("symbolic link", self.refusal())
        self.path.unlink()
        self.path.mkdir()
        self.assertIn("directory", self.refusal().lower())
        self.path.rmdir()
        os.mkfifo(self.path, 0o600)
        self.assertIn("not a regular file", self.refusal())
        self.path = self.folder / "nowhere" / "throttle"
        self.assertIn("name a file in a folder of Popdrop's own", self.refusal())

    def test_owners(self) -> None:
        self.open().close()
        mine = os.geteuid()
        error = self.assertRaises(
            ConfigError, Shared.open, str(self.path), self.numbers, owners=(mine + 1,)
        )
        self.assertIn(f"belongs to uid {mine}; chown {mine + 1} {self.path}", str(error))
        Shared.open(str(self.path), self.numbers, owners=(mine, mine + 1)).close()

    def test_what_root_made_is_handed_over(self) -> None:
        shared = self.open()
        shared.hand_over(4711, -1)
        shared.hand_over(4712, -1)
        # Once it is somebody's it stays his.
        self.assertEqual(self.path.stat().st_uid, os.geteuid() or 4711)

    def test_too_large(self) -> None:
        self.assertIn("over 1 GiB", self.refusal(limits(total=999_999_999)))
        self.assertFalse(self.path.exists())

    def test_no_more_than_there_are_columns(self) -> None:
        for _ in range(COLUMNS):
            self.open()
        self.assertIn(f"{COLUMNS} processes use it already", self.refusal())

    def test_nonsense_in_the_table_is_no_trap(self) -> None:
        """Whatever the disk makes of the numbers, calls answer within their limits."""
        shared = self.open()
        for filler in (b"\xff", b"\x7f", b"\xaa", b"\x01"):
            with self.path.open("r+b") as file:
                file.seek(4096)
                file.write(filler * (sharedcounts.size_of(self.numbers) - 4096))
            for i in range(30):
                peer = v4(f"192.0.2.{i}")
                admitted = shared.admit(peer)
                ticket = shared.attempt(peer, b"u%d" % i, b"1" * 32)
                self.assertTrue(1 <= shared.delay(peer, b"u%d" % i) <= 19)
                ticket.close("bad")
                self.assertTrue(1 <= shared.delay(peer, b"u%d" % i) <= 19)
                shared.enter(b"bob")
                shared.quit(b"bob")
                if admitted:
                    shared.leave(peer)


class TwoProcessesTests(Case):
    def test_failures_there_delay_here(self) -> None:
        shared = self.open()
        self.child("bad=3,proof=2")
        self.assertEqual(self.said.split()[1], shared.proof_key.hex())
        self.assertEqual(shared.delay(v4(), b"x"), 8)
        # The secret that was tried there is known here.
        shared.attempt(v4(), b"bob", b"1" * 32).close("bad")
        self.assertEqual(shared.delay(v4(), b"x"), 8)
        shared.attempt(v4(), b"bob", b"2" * 32).close("bad")
        self.assertEqual(shared.delay(v4(), b"x"), 15)

    def test_limits_hold_over_both(self) -> None:
        shared = self.open()
        self.child("admit=3,enter=2")
        self.assertEqual([shared.admit(v4("192.0.2.1")) for _ in range(3)], [True, True, False])
        self.assertEqual([shared.enter(b"bob") for _ in range(2)], [True, False])
        others = [shared.admit(v4(f"10.0.0.{i}")) for i in range(40)]
        self.assertEqual(sum(others), 40 - 5)
        self.assertEqual(counted(shared), (40, 40, 3))

    def test_the_killed_count_no_more(self) -> None:
        shared = self.open()
        child = self.child("admit=5,enter=3,attempt=4")
        self.assertFalse(shared.admit(v4("192.0.2.1")))
        self.assertFalse(shared.enter(b"bob"))
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 8)
        self.kill(child)
        self.assertTrue(shared.admit(v4("192.0.2.1")))
        self.assertTrue(shared.enter(b"bob"))
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 1)
        self.assertEqual(counted(shared), (1, 1, 1))

    def test_the_killed_are_noticed_without_being_asked_for(self) -> None:
        clock = Clock()
        clock.advance(since_boot())
        shared = Shared.open(str(self.path), self.numbers, clock.seconds)
        self.addCleanup(shared.close)
        child = self.child("attempt=4")
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 8)
        self.kill(child)
        clock.advance(sharedcounts.SWEEP_EVERY)
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 1)

    def test_the_one_who_ends_takes_its_counts_along(self) -> None:
        shared = self.open()
        child = self.child("admit=5,enter=3,bad=2")
        child.communicate("", DEADLINE)
        self.assertEqual(child.returncode, 0)
        self.assertEqual(counted(shared), (0, 0, 0))
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 2)

    def test_killed_with_the_lock(self) -> None:
        shared = self.open()
        child = self.child("bad=3,inside")
        self.kill(child)
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 4)
        self.assertEqual(shared._table.missed, 0)

    def test_stopped_with_the_lock(self) -> None:
        """Nobody waits for it for long; both count on."""
        shared = self.open()
        child = self.child("bad=3,inside")
        child.send_signal(signal.SIGSTOP)
        for i in range(50):
            shared.attempt(v4("192.0.2.1"), b"v%d" % i, None).close("void")
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 4)
        self.assertEqual(shared._table.missed, 101)
        self.kill(child)
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 4)
        self.assertEqual(shared._table.missed, 101)
        warnings = [event for event in self.flushed() if "does not move" in event]
        self.assertEqual(len(warnings), 1)

    def flushed(self) -> list[str]:
        return [str(event) for event in self.events]

    def run(self, result: object) -> None:  # type: ignore[override]
        from twisted.logger import globalLogPublisher

        self.events: list[object] = []
        globalLogPublisher.addObserver(self.events.append)  # type: ignore[arg-type]
        try:
            super().run(result)
        finally:
            globalLogPublisher.removeObserver(self.events.append)  # type: ignore[arg-type]

    def test_an_inherited_descriptor(self) -> None:
        shared, descriptor = Shared.anonymous(self.numbers)
        self.addCleanup(os.close, descriptor)
        self.addCleanup(shared.close)
        child = self.child("admit=5,bad=3", descriptor)
        self.assertEqual(self.said.split()[1], shared.proof_key.hex())
        self.assertFalse(shared.admit(v4("192.0.2.1")))
        self.assertEqual(shared.delay(v4(), b"x"), 4)
        self.kill(child)
        self.assertTrue(shared.admit(v4("192.0.2.1")))
        self.assertRaises(OSError, os.ftruncate, descriptor, 0)

    def test_a_descriptor_of_something_else(self) -> None:
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        self.assertRaises(ConfigError, Shared.attach, read)
        self.assertRaises(ConfigError, Shared.attach, 10_000)

    def test_a_fork_that_lives_on(self) -> None:
        """As a daemon comes to be: the parent ends and the child counts on."""
        path = str(self.path)
        program = (
            "import os, sys\n"
            "from popdrop.throttle import Shared\n"
            "from tests.test_throttle import limits, v4\n"
            f"numbers = limits(**{self.numbers._asdict()!r})\n"
            f"shared = Shared.open({path!r}, numbers)\n"
            "shared.admit(v4())\n"
            "if os.fork():\n"
            "    os._exit(0)\n"
            "shared.admit(v4())\n"
            "print(os.getpid(), flush=True)\n"
            "sys.stdin.read()\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.children.append(child)
        assert child.stdout is not None and child.stdin is not None
        self.assertTrue(child.stdout.readline().strip().isdigit())
        self.assertEqual(child.wait(DEADLINE), 0)
        shared = self.open()
        self.assertEqual([shared.admit(v4()) for _ in range(4)], [True] * 3 + [False])
        child.stdin.close()
        self.assertEqual(child.stdout.read(), "")
        self.assertTrue(shared.admit(v4()))


class KilledTests(Case):
    def test_killed_at_any_moment(self) -> None:
        """The table stays usable and forgets the dead: 20 processes, killed while they count."""
        shared = self.open()
        chance = random.Random(1)
        steady = self.child("hammer")
        for _ in range(10):
            pair = [self.child("hammer"), self.child("hammer")]
            for _ in range(chance.randrange(400)):
                shared.attempt(v6(), b"somebody", None).close("void")
            for child in pair:
                self.kill(child)
        self.kill(steady)
        # The last that was killed in a call is swept out by the next one that is refused, or so.
        with shared._table:
            shared._table.sweep()
        self.assertEqual(counted(shared), (0, 0, 0))
        for part in (shared._addresses, shared._users):
            self.assertEqual(sum(map(part.live, range(part.places))), 0)
            failures = part.failures.tolist()
            self.assertTrue(all(0 <= each <= part.most for each in failures))
        for i in range(5):
            shared.attempt(v4("203.0.113.1"), b"w%d" % i, None).close("bad")
        self.assertEqual(shared.delay(v4("203.0.113.1"), b"x"), 15)
        self.assertEqual([shared.admit(v4()) for _ in range(6)], [True] * 5 + [False])


class ForgettingTests(Case):
    def test_many_addresses_that_fail_once_push_out_no_other(self) -> None:
        shared = self.open(limits(tracked=160))
        for _ in range(2):
            for i in range(40):
                peer = v4(f"192.0.2.{i}")
                shared.attempt(peer, b"u%d" % i, None).close("bad")
        for i in range(5000):
            shared.attempt(v4(f"10.{i // 250}.0.{i % 250}"), b"v%d" % i, None).close("bad")
        delays = [shared.delay(v4(f"192.0.2.{i}"), b"x") for i in range(40)]
        # A row of 16 neighbours could by chance be full of the forty; with these keys it would be
        # one in 10^9.
        self.assertEqual(delays, [2] * 40)

    def test_an_open_attempt_whose_place_is_taken(self) -> None:
        shared = self.open(limits(tracked=1))
        first = shared.attempt(v4("192.0.2.1"), b"a", None)
        second = shared.attempt(v4("192.0.2.2"), b"b", None)
        self.assertEqual(shared.delay(v4("192.0.2.2"), b"x"), 1)
        first.close("bad")
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 1)
        second.close("void")
        self.assertEqual(shared.delay(v4("192.0.2.1"), b"x"), 1)
        for part in (shared._addresses, shared._users):
            self.assertEqual(sum(map(part.live, range(part.places))), 0)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "leave", "enter", "quit", "attempt", "close", "delay"]),
        st.sampled_from([v4(), v4("192.0.2.2"), v6(), LOCAL]),
        st.sampled_from([b"bob", b"Bob", b"alice", b""]),
        st.sampled_from([None, b"1" * 32, b"2" * 32]),
        st.sampled_from(["good", "bad", "bad", "void"]),
        # All within `fade`: memory forgets wrong secrets of addresses that have faded.
        st.floats(0, 9),
    ),
    max_size=60,
)


class ModelTests(SynchronousTestCase):
    """Both kinds answer alike."""

    @PROPERTY
    @given(OPERATIONS, st.data())
    def test_as_memory(self, operations, data) -> None:
        clock = Clock()
        clock.advance(1_000)
        numbers = limits(total=6, per_address=3, per_user=2, tracked=64)
        memory = Memory(clock, numbers)
        first, descriptor = Shared.anonymous(numbers, clock.seconds)
        second = Shared.attach(descriptor, clock.seconds)
        os.close(descriptor)
        try:
            self.compare(clock, memory, (first, second), operations, data)
        finally:
            first.close()
            second.close()

    def compare(self, clock, memory, processes, operations, data) -> None:
        inside, entered, tickets = [], [], []
        for verb, peer, user, proof, outcome, pause in operations:
            clock.advance(pause)
            here = data.draw(st.sampled_from(processes))
            if verb == "admit":
                expected = memory.admit(peer)
                self.assertEqual(here.admit(peer), expected)
                if expected:
                    inside.append((peer, here))
            elif verb == "leave" and inside:
                peer, here = inside.pop()
                memory.leave(peer)
                here.leave(peer)
            elif verb == "enter":
                expected = memory.enter(user)
                self.assertEqual(here.enter(user), expected)
                if expected:
                    entered.append((user, here))
            elif verb == "quit" and entered:
                user, here = entered.pop()
                memory.quit(user)
                here.quit(user)
            elif verb == "attempt":
                pair = memory.attempt(peer, user, proof), here.attempt(peer, user, proof)
                tickets.append(pair)
            elif verb == "close" and tickets:
                for ticket in tickets.pop():
                    ticket.close(outcome)
            self.assertEqual(here.delay(peer, user), memory.delay(peer, user))
            self.assertEqual(counted(here), counted(memory))
            self.assertEqual(named(here), named(memory))
