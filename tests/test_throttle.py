"""The rules of decision 24, driven by a clock, wherever the counts are kept."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.errors import ConfigError
from popdrop.interfaces import IThrottle, ITicket
from popdrop.sharedcounts import Numbers
from popdrop.throttle import DEFAULTS, Memory, Off, Shared, Throttle, from_spec, network


def v4(host: str = "192.0.2.1", port: int = 40000) -> IPv4Address:
    return IPv4Address("TCP", host, port)


def v6(host: str = "2001:db8::1", port: int = 40000) -> IPv6Address:
    return IPv6Address("TCP", host, port)


LOCAL = UNIXAddress("/run/pop3")
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    # The same properties of both kinds, so each in two classes.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


def limits(**given: int) -> Numbers:
    """The defaults, but for these."""
    return Numbers(**{key.replace("-", "_"): DEFAULTS[key] for key in DEFAULTS} | given)


def named(throttle: Throttle) -> list[int]:
    """How many addresses, users and pairs are remembered."""
    parts = (throttle._addresses, throttle._users, throttle._known)
    if isinstance(throttle, Memory):
        return [len(part) for part in parts]
    return [sum(map(bool, part.keys)) for part in parts]


def counted(throttle: Throttle) -> tuple[int, int, int]:
    """Connections in all, those by address, and those by user."""
    parts = (throttle._connections, throttle._entered)
    if isinstance(throttle, Memory):
        sums = [sum(part.values()) for part in parts]
    else:
        sums = [sum(map(part.live, range(part.places))) for part in parts]
    return throttle._connected, *sums


def under_way(throttle: Throttle) -> list[int]:
    """Attempts of each address and user."""
    parts = (throttle._addresses, throttle._users)
    if isinstance(throttle, Memory):
        return [count.under_way for part in parts for count in part.values()]
    return [part.live(place) for part in parts for place in range(part.places) if part.keys[place]]


class Case(SynchronousTestCase):
    kind = "memory"

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_000_000)

    def made(self, numbers: Numbers, clock: Clock) -> Throttle:
        if self.kind == "memory":
            return Memory(clock, numbers)
        throttle, descriptor = Shared.anonymous(numbers, clock.seconds)
        self.addCleanup(throttle.close)
        self.addCleanup(os.close, descriptor)
        return throttle

    def throttle(self, **given: int) -> Throttle:
        return self.made(limits(**given), self.clock)

    def failed(self, throttle, peer, user=b"bob", proof=None) -> float:
        """One wrong login; the seconds after which the shell answers it."""
        throttle.attempt(peer, user, proof).close("bad")
        return throttle.delay(peer, user)


class SpecTests(Case):
    def test_memory_takes_all_keys(self) -> None:
        text = "memory:total=1:per-address=2:per-user=3:fade=4:tracked=5"
        throttle = from_spec(text, self.clock)
        assert isinstance(throttle, Memory)
        self.assertEqual([throttle.admit(v4()) for _ in range(2)], [True, False])

    def test_off(self) -> None:
        throttle = from_spec("off", self.clock)
        verifyObject(IThrottle, throttle)
        self.assertEqual(throttle.floor, 0)
        self.assertTrue(all(throttle.admit(v4()) for _ in range(5000)))
        ticket = throttle.attempt(v4(), b"bob", None)
        verifyObject(ITicket, ticket)
        ticket.close("bad")
        self.assertEqual(throttle.delay(v4(), b"bob"), 0)

    def test_mistakes_name_option_and_remedy(self) -> None:
        for text in (
            "memori",
            "memory:10",
            "memory:totl=1",
            "memory:total=0",
            "memory:total=-1",
            "memory:total=1_0",
            "memory:total=",
            "memory:total=1:total=2",
            "off:total=1",
            "shared",
            "shared:",
            "shared:total=1",
            "shared:/a:/b",
            "",
        ):
            error = self.assertRaises(ConfigError, from_spec, text, self.clock)
            self.assertIn(f"--throttle {text}".strip(), str(error))
            self.assertNotIn("\n", str(error))

    def test_an_unknown_key_is_answered_with_all_keys(self) -> None:
        error = self.assertRaises(ConfigError, from_spec, "memory:users=3", self.clock)
        for key in ("total=", "per-address=", "per-user=", "fade=", "tracked="):
            self.assertIn(key, str(error))

    def test_each_process_has_its_own_proof_key(self) -> None:
        keys = {self.throttle().proof_key, self.throttle().proof_key, Off().proof_key}
        self.assertEqual([len(key) for key in keys], [32, 32, 32])


class LimitsTests(Case):
    def test_there_is_a_floor_of_one_second(self) -> None:
        throttle = self.throttle()
        verifyObject(IThrottle, throttle)
        self.assertEqual(throttle.floor, 1)
        self.assertEqual(throttle.delay(v4(), b"bob"), 1)

    def test_default_limits(self) -> None:
        throttle = self.throttle()
        self.assertEqual(sum(throttle.admit(v4()) for _ in range(60)), 50)
        others = sum(throttle.admit(v4(f"10.0.{i // 250}.{i % 250}")) for i in range(1000))
        self.assertEqual(others, 950)


class ConnectionTests(Case):
    def test_the_place_of_one_who_left_is_free(self) -> None:
        throttle = self.throttle(per_address=1)
        self.assertTrue(throttle.admit(v4()))
        self.assertFalse(throttle.admit(v4(port=2)))
        throttle.leave(v4())
        self.assertTrue(throttle.admit(v4(port=3)))

    def test_ipv6_counts_by_64(self) -> None:
        throttle = self.throttle(per_address=2)
        self.assertTrue(throttle.admit(v6("2001:db8::1")))
        self.assertTrue(throttle.admit(v6("2001:db8:0:0:ffff::2")))
        self.assertFalse(throttle.admit(v6("2001:db8::3")))
        self.assertTrue(throttle.admit(v6("2001:db8:0:1::3")))

    def test_a_mapped_address_is_the_ipv4_address(self) -> None:
        throttle = self.throttle(per_address=1)
        self.assertTrue(throttle.admit(v6("::ffff:192.0.2.1")))
        self.assertFalse(throttle.admit(v4("192.0.2.1")))
        self.assertTrue(throttle.admit(v6("::ffff:192.0.2.2")))

    def test_loopback_is_limited_too(self) -> None:
        throttle = self.throttle(per_address=1)
        self.assertTrue(throttle.admit(v4("127.0.0.1")))
        self.assertFalse(throttle.admit(v4("127.0.0.1")))

    def test_a_user_has_so_many(self) -> None:
        throttle = self.throttle(per_user=2)
        self.assertEqual([throttle.enter(b"bob") for _ in range(3)], [True, True, False])
        self.assertTrue(throttle.enter(b"alice"))
        throttle.quit(b"bob")
        self.assertEqual([throttle.enter(b"bob") for _ in range(2)], [True, False])
        for user in (b"bob", b"alice", b"bob"):
            throttle.quit(user)
        self.assertEqual(counted(throttle), (0, 0, 0))
        self.assertTrue(all(Off().enter(b"bob") for _ in range(100)))

    def test_peers_without_address_have_the_total_limit_only(self) -> None:
        throttle = self.throttle(total=3, per_address=1)
        self.assertEqual([throttle.admit(LOCAL) for _ in range(4)], [True, True, True, False])

    def test_network(self) -> None:
        self.assertEqual(network("fe80::1%eth0"), "fe80::/64")
        self.assertEqual(network("2001:DB8:0:0:1::1"), "2001:db8::/64")
        self.assertEqual(network("192.0.2.1"), "192.0.2.1")
        self.assertEqual(network("not:an:address"), "not:an:address")

    @PROPERTY
    @given(
        st.lists(
            st.sampled_from(
                [v4(), v4("192.0.2.2"), v6(), v6("2001:db8::2"), v6("2001:db8:1::"), LOCAL]
            )
        )
    )
    def test_admit_and_leave_return_to_zero(self, peers) -> None:
        throttle = self.made(limits(total=6, per_address=2, tracked=10), Clock())
        inside = [peer for peer in peers if throttle.admit(peer)]
        self.assertLessEqual(len(inside), 6)
        by_address = Counter(network(p.host) for p in inside if p is not LOCAL)
        self.assertTrue(all(count <= 2 for count in by_address.values()))
        for peer in inside:
            throttle.leave(peer)
        self.assertEqual(counted(throttle), (0, 0, 0))


class DelayTests(Case):
    def test_steps(self) -> None:
        throttle = self.throttle()
        users = [b"u%d" % i for i in range(7)]
        self.assertEqual(
            [self.failed(throttle, v4(), user) for user in users], [1, 2, 4, 8, 15, 15, 15]
        )
        self.assertEqual(self.failed(throttle, v4("192.0.2.9"), b"u8"), 1)

    def test_an_open_ticket_counts_as_a_failure(self) -> None:
        throttle = self.throttle()
        tickets = [throttle.attempt(v4(), b"u%d" % i, None) for i in range(4)]
        self.assertEqual(throttle.delay(v4(), b"u0"), 8)
        for ticket in tickets:
            ticket.close("void")
        self.assertEqual(throttle.delay(v4(), b"u0"), 1)

    def test_the_delay_is_the_same_just_before_and_after_closing(self) -> None:
        throttle = self.throttle()
        for expected in (1, 2, 4):
            ticket = throttle.attempt(v4(), b"u%d" % expected, None)
            self.assertEqual(throttle.delay(v4(), b"x"), expected)
            ticket.close("bad")
            self.assertEqual(throttle.delay(v4(), b"x"), expected)

    def test_closing_twice_counts_once(self) -> None:
        throttle = self.throttle()
        ticket = throttle.attempt(v4(), b"bob", None)
        ticket.close("bad")
        ticket.close("bad")
        ticket.close("good")
        self.assertEqual(self.failed(throttle, v4(), b"bob"), 2)

    def test_an_unknown_outcome_is_a_mistake_of_ours(self) -> None:
        ticket = self.throttle().attempt(v4(), b"bob", None)
        self.assertRaises(ValueError, ticket.close, "fine")

    def test_the_same_wrong_secret_does_not_raise_the_delay(self) -> None:
        throttle = self.throttle()
        self.assertEqual([self.failed(throttle, v4(), proof=b"1" * 32) for _ in range(9)], [1] * 9)
        self.assertEqual(self.failed(throttle, v4(), proof=b"2" * 32), 2)
        self.assertEqual(self.failed(throttle, v4(), proof=b"1" * 32), 2)
        self.assertEqual(self.failed(throttle, v4("192.0.2.2"), proof=b"1" * 32), 1)
        self.assertEqual(self.failed(throttle, v4("192.0.2.2"), proof=b"3" * 32), 2)

    def test_the_same_wrong_secret_in_parallel_counts_once(self) -> None:
        throttle = self.throttle()
        tickets = [throttle.attempt(v4(), b"bob", b"1" * 32) for _ in range(5)]
        for ticket in tickets:
            ticket.close("bad")
        self.assertEqual(throttle.delay(v4(), b"bob"), 1)

    def test_attempts_without_a_proof_all_count(self) -> None:
        throttle = self.throttle()
        self.assertEqual([self.failed(throttle, v4()) for _ in range(3)], [1, 2, 4])

    def test_failures_fade_one_by_one(self) -> None:
        throttle = self.throttle(fade=500)
        for i in range(20):
            self.failed(throttle, v4(), b"u%d" % i)
        seen = []
        for _ in range(6):
            self.clock.advance(100)
            seen.append(throttle.delay(v4(), b"x"))
        self.assertEqual(seen, [8, 4, 2, 1, 1, 1])
        self.assertEqual(self.failed(throttle, v4(), b"x"), 1)

    def test_a_clock_that_goes_back_forgets_nothing(self) -> None:
        throttle = self.throttle()
        self.failed(throttle, v4())
        self.clock.rightNow -= 5000
        self.assertEqual(self.failed(throttle, v4()), 2)

    def test_good_and_void_do_not_count(self) -> None:
        throttle = self.throttle()
        for outcome in ("good", "void") * 10:
            throttle.attempt(v4(), b"bob", None).close(outcome)
        self.assertEqual(self.failed(throttle, v4()), 1)

    def test_a_success_does_not_wash_off_failures(self) -> None:
        """Else a guesser with an account of his own would log in between guesses."""
        throttle = self.throttle()
        for i in range(3):
            self.failed(throttle, v4(), b"u%d" % i)
        throttle.attempt(v4(), b"mallory", None).close("good")
        self.assertEqual(self.failed(throttle, v4(), b"u9"), 8)

    def test_by_64_and_mapped(self) -> None:
        throttle = self.throttle()
        self.failed(throttle, v6("2001:db8::1"), b"a")
        self.assertEqual(self.failed(throttle, v6("2001:db8::2"), b"b"), 2)
        self.failed(throttle, v4(), b"a")
        self.assertEqual(self.failed(throttle, v6("::ffff:192.0.2.1"), b"b"), 2)

    def test_no_delay_by_address_without_address(self) -> None:
        throttle = self.throttle()
        self.assertEqual([self.failed(throttle, LOCAL, b"u%d" % i) for i in range(9)], [1] * 9)


class UserTests(Case):
    def storm(self, throttle, count: int, user: bytes = b"bob") -> None:
        for i in range(count):
            self.failed(throttle, v4(f"10.1.{i // 250}.{i % 250}"), user)

    def test_a_second_for_five_failures_and_four_at_most(self) -> None:
        throttle = self.throttle()
        seen = []
        for i in range(30):
            seen.append(self.failed(throttle, v4(f"10.1.0.{i}")))
        expected = [1] * 4 + [2] * 5 + [3] * 5 + [4] * 5 + [5] * 11
        self.assertEqual(seen, expected)

    def test_case_and_length_of_a_name_do_not_help(self) -> None:
        throttle = self.throttle()
        self.storm(throttle, 10, b"BOB")
        self.assertEqual(throttle.delay(v4(), b"bob"), 3)
        self.storm(throttle, 10, b"x" * 64 + b"tail")
        self.assertEqual(throttle.delay(v4(), b"x" * 64), 3)

    def test_an_address_that_logged_in_within_30_days_is_spared(self) -> None:
        throttle = self.throttle()
        throttle.attempt(v4(), b"bob", None).close("good")
        self.clock.advance(30 * 86400 - 1)
        self.storm(throttle, 100)
        self.assertEqual(self.failed(throttle, v4()), 1)
        self.assertEqual(self.failed(throttle, v4("192.0.2.2")), 5)
        self.clock.advance(1)
        self.assertGreater(self.failed(throttle, v4()), 2)

    def test_to_know_one_user_spares_with_that_user_only(self) -> None:
        throttle = self.throttle()
        throttle.attempt(v4(), b"alice", None).close("good")
        self.storm(throttle, 100)
        self.assertEqual(self.failed(throttle, v4()), 5)

    def test_it_fades(self) -> None:
        throttle = self.throttle(fade=600)
        self.storm(throttle, 100)
        self.clock.advance(600)
        self.assertEqual(self.failed(throttle, v4()), 1)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([v4(), v4("192.0.2.2"), v6(), LOCAL]),
        st.sampled_from([b"bob", b"alice", b""]),
        st.sampled_from([None, b"1" * 32, b"2" * 32]),
        st.sampled_from(["good", "bad", "void", "open"]),
        st.floats(0, 2000),
    ),
    max_size=60,
)


class PropertyTests(Case):
    @PROPERTY
    @given(EVENTS)
    def test_no_attempt_waits_and_no_failure_waits_long(self, events) -> None:
        """A success is answered at once, whatever went before: awaiting the ticket never yields."""
        clock = Clock()
        throttle = self.made(limits(total=10, per_address=5, tracked=3), clock)
        for peer, user, proof, outcome, pause in events:
            clock.advance(pause)

            async def attempt(peer=peer, user=user, proof=proof):
                return await throttle.attempt(peer, user, proof)

            ticket = self.successResultOf(Deferred.fromCoroutine(attempt()))
            self.assertTrue(1 <= throttle.delay(peer, user) <= 19)
            if outcome != "open":
                ticket.close(outcome)
            self.assertTrue(1 <= throttle.delay(peer, user) <= 19)

    @PROPERTY
    @given(EVENTS)
    def test_tables_are_bounded_and_counts_of_open_tickets_go_to_zero(self, events) -> None:
        clock = Clock()
        throttle = self.made(limits(total=10, per_address=5, tracked=2), clock)
        tickets = []
        for peer, user, proof, outcome, pause in events:
            clock.advance(pause)
            tickets.append((throttle.attempt(peer, user, proof), outcome))
        for ticket, outcome in tickets:
            ticket.close("bad" if outcome == "open" else outcome)
        self.assertTrue(all(count <= 2 for count in named(throttle)))
        self.assertEqual(sum(under_way(throttle)), 0)

    @PROPERTY
    @given(EVENTS)
    def test_successes_alone_leave_no_counts(self, events) -> None:
        clock = Clock()
        throttle = self.made(limits(total=10, per_address=5, tracked=100), clock)
        tickets = [throttle.attempt(peer, user, proof) for peer, user, proof, _, _ in events]
        for ticket in tickets:
            ticket.close("good")
        self.assertEqual(named(throttle)[:2], [0, 0])


class ForgettingTests(Case):
    def test_the_oldest_goes_first(self) -> None:
        throttle = self.throttle(tracked=2)
        self.failed(throttle, v4("192.0.2.1"), b"a")
        self.failed(throttle, v4("192.0.2.2"), b"b")
        self.failed(throttle, v4("192.0.2.1"), b"c")
        self.failed(throttle, v4("192.0.2.3"), b"d")
        self.assertEqual(throttle.delay(v4("192.0.2.1"), b"x"), 2)
        self.assertEqual(self.failed(throttle, v4("192.0.2.2"), b"e"), 1)

    def test_sixteen_wrong_secrets_are_remembered(self) -> None:
        throttle = self.throttle()
        for i in range(17):
            self.failed(throttle, v4(), proof=b"%032d" % i)
        self.clock.advance(600)
        self.assertEqual([self.failed(throttle, v4(), proof=b"%032d" % i) for i in (16, 1)], [1, 1])
        self.assertEqual([self.failed(throttle, v4(), proof=b"%032d" % i) for i in (0, 17)], [1, 2])

    def test_a_ticket_can_be_awaited_under_any_loop(self) -> None:
        throttle = self.throttle()

        async def attempt():
            return await throttle.attempt(v4(), b"bob", None)

        self.assertTrue(verifyObject(ITicket, asyncio.run(attempt())))


class MemoryTests(Case):
    def test_what_has_faded_makes_room(self) -> None:
        throttle = self.throttle(fade=600)
        for i in range(100):
            self.failed(throttle, v4(f"10.0.0.{i}"), b"u%d" % i, b"%032d" % i)
        self.clock.advance(601)
        for i in range(100):
            self.failed(throttle, v4(f"10.0.1.{i}"), b"v%d" % i)
        self.assertEqual(named(throttle)[:2], [100, 100])


class SharedConnectionTests(ConnectionTests):
    kind = "shared"


class SharedDelayTests(DelayTests):
    kind = "shared"


class SharedUserTests(UserTests):
    kind = "shared"


class SharedPropertyTests(PropertyTests):
    kind = "shared"


class SharedForgettingTests(ForgettingTests):
    kind = "shared"


class SharedLimitsTests(LimitsTests):
    kind = "shared"
