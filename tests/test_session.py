"""`popdrop.session`: the state machine, on values alone."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.credentials import ApopCredentials, Cleartext
from popdrop.errors import BadCredentials, InUse, TemporaryFailure
from popdrop.listing import Listing
from popdrop.policy import Policy
from popdrop.session import (
    BAD_BEFORE_LOGIN,
    BAD_IN_ALL,
    COMMANDS,
    FAILED_LOGINS,
    Commit,
    Fetch,
    Hangup,
    Identify,
    Login,
    Refusal,
    Result,
    Session,
    StartTLS,
)
from popdrop.values import PeerFacts
from popdrop.wire import COMMAND_LIMIT, SASL_LIMIT, Overlong

CHALLENGE = b"<1896.697170952@dbc.mtview.ca.us>"
LOCAL = PeerFacts(address="127.0.0.1")
FAR = PeerFacts(address="192.0.2.7")


def text(result: Result) -> bytes:
    """The octets of a reply."""
    if isinstance(result, Refusal):
        return result.reply
    if isinstance(result, bytes):
        return result
    assert isinstance(result, Iterator), result
    return b"".join(result)


def fresh(policy: Policy | None = None, secured: bool = False, peer: PeerFacts = LOCAL) -> Session:
    session = Session(CHALLENGE, policy or Policy(stls="offer"), secured)
    session.met(peer)
    return session


def opened(sizes: list[int], ids: list[bytes] | None = None) -> Session:
    session = fresh()
    assert isinstance(session.line(b"USER bob"), bytes)
    assert isinstance(session.line(b"PASS secret"), Login)
    session.opened(Listing(sizes, ids))
    return session


class AuthorizationTests(SynchronousTestCase):
    def test_greeting(self) -> None:
        """The challenge stands right before the line end (RFC 1939 section 4)."""
        self.assertEqual(fresh().greeting(), b"+OK Popdrop ready " + CHALLENGE + b"\r\n")
        self.assertNotIn(b"<", Session(b"", Policy(), False).greeting())

    def test_user_pass(self) -> None:
        session = fresh()
        self.assertEqual(session.line(b"USER bob"), b"+OK Password required for bob.\r\n")
        login = session.line(b"PASS  two  blanks ")
        assert isinstance(login, Login) and isinstance(login.credentials, Cleartext)
        self.assertEqual(login.credentials.username, b"bob")
        self.assertEqual(login.credentials.password, b" two  blanks ")
        self.assertEqual(
            session.opened(Listing([100, 23])), b"+OK bob has 2 message(s) (123 octets).\r\n"
        )

    def test_pass_needs_a_new_user_each_time(self) -> None:
        session = fresh()
        self.assertTrue(text(session.line(b"PASS x")).startswith(b"-ERR"))
        session.line(b"USER bob")
        session.line(b"PASS wrong")
        session.refused(BadCredentials("Authentication failed."))
        self.assertTrue(text(session.line(b"PASS x")).startswith(b"-ERR"))

    def test_names_are_echoed_only_if_harmless(self) -> None:
        for name in (b"a[b", b"b\xc3\xb6b", b"%n%s", b"x" * 65):
            self.assertEqual(fresh().line(b"USER " + name), b"+OK Password required.\r\n")

    def test_apop(self) -> None:
        """The example of RFC 1939 section 7."""
        login = fresh().line(b"APOP mrose c4c9334bac560ecc979e58001b3e22fb")
        assert isinstance(login, Login) and isinstance(login.credentials, ApopCredentials)
        self.assertTrue(login.credentials.checkPassword(b"tanstaaf"))
        self.assertFalse(login.credentials.checkPassword(b"tanstaag"))

    def test_no_apop_without_a_challenge(self) -> None:
        session = Session(b"", Policy(), True)
        self.assertTrue(text(session.line(b"APOP bob " + b"0" * 32)).startswith(b"-ERR"))

    def test_cleartext_words(self) -> None:
        """qpopper's five words, by who may say USER (behaviour: `--cleartext`)."""
        for word, far_plain, far_tls, near_plain in (
            ("default", True, True, True),
            ("always", True, True, True),
            ("never", False, False, False),
            ("local", False, False, True),
            ("tls", False, True, True),
        ):
            policy = Policy(cleartext=word)
            for peer, secured, allowed in (
                (FAR, False, far_plain),
                (FAR, True, far_tls),
                (LOCAL, False, near_plain),
            ):
                session = fresh(policy, secured, peer)
                answer = text(session.line(b"USER bob"))
                self.assertEqual(answer.startswith(b"+OK"), allowed, (word, peer, secured))
                capa = text(session.line(b"CAPA"))
                self.assertEqual(b"\r\nUSER\r\n" in capa, allowed)
                self.assertEqual(b"\r\nSASL PLAIN\r\n" in capa, allowed)
                plain = session.line(b"AUTH PLAIN " + b64encode(b"\0bob\0x"))
                self.assertEqual(isinstance(plain, Login), allowed)

    def test_before_the_peer_is_known_nobody_is_local(self) -> None:
        session = Session(CHALLENGE, Policy(), False)
        self.assertTrue(text(session.line(b"USER bob")).startswith(b"-ERR [AUTH]"))
        untrusted = fresh(peer=PeerFacts(address="127.0.0.1", address_trusted=False))
        self.assertTrue(text(untrusted.line(b"USER bob")).startswith(b"-ERR [AUTH]"))

    def test_transaction_commands_before_login(self) -> None:
        for line in (b"STAT", b"LIST", b"RETR 1", b"DELE 1", b"NOOP", b"RSET", b"UIDL", b"TOP 1 1"):
            self.assertTrue(text(fresh().line(line)).startswith(b"-ERR"), line)

    def test_four_failures_close(self) -> None:
        session = fresh()
        for _ in range(FAILED_LOGINS - 1):
            session.line(b"APOP bob x")
            answer = session.refused(BadCredentials("Authentication failed."))
            self.assertEqual(answer, b"-ERR [AUTH] Authentication failed.\r\n")
        session.line(b"APOP bob x")
        last = session.refused(BadCredentials("Authentication failed."))
        self.assertIsInstance(last, Hangup)

    def test_trouble_of_ours_is_no_failure(self) -> None:
        session = fresh()
        for _ in range(FAILED_LOGINS + 2):
            session.line(b"APOP bob x")
            self.assertEqual(session.refused(InUse("busy")), b"-ERR [IN-USE] busy\r\n")

    def test_other_protocols_are_closed_at_once(self) -> None:
        for line in (b"GET / HTTP/1.1", b"POST /x HTTP/1.0", b"EHLO x", b"helo x"):
            answer = fresh().line(line)
            self.assertIsInstance(answer, Hangup)

    def test_quit_before_login(self) -> None:
        answer = fresh().line(b"quit")
        assert isinstance(answer, Hangup)
        self.assertTrue(answer.farewell.startswith(b"+OK"))


class TLSTests(SynchronousTestCase):
    def test_stls(self) -> None:
        session = fresh(peer=FAR)
        self.assertIn(b"\r\nSTLS\r\n", text(session.line(b"CAPA")))
        self.assertIsInstance(session.line(b"STLS"), StartTLS)
        session.secure()
        self.assertNotIn(b"STLS", text(session.line(b"CAPA")))
        self.assertTrue(text(session.line(b"STLS")).startswith(b"-ERR"))

    def test_user_before_stls_is_forgotten(self) -> None:
        session = fresh()
        session.line(b"USER bob")
        session.line(b"STLS")
        session.secure()
        self.assertTrue(text(session.line(b"PASS x")).startswith(b"-ERR"))

    def test_stls_takes_no_argument(self) -> None:
        self.assertTrue(text(fresh().line(b"STLS x")).startswith(b"-ERR"))
        self.assertTrue(text(fresh(Policy(stls="off")).line(b"STLS")).startswith(b"-ERR"))

    def test_required(self) -> None:
        """Before TLS only CAPA, STLS, QUIT, LANG and UTF8 work (decision 31)."""
        session = fresh(Policy(stls="require", cleartext="always"))
        for line in (b"USER bob", b"PASS x", b"APOP bob x", b"AUTH PLAIN", b"AUTH"):
            answer = session.line(line)
            self.assertEqual(text(answer), b"-ERR [AUTH] TLS required but not negotiated\r\n", line)
            assert isinstance(answer, Refusal)
            self.assertEqual(answer.reason, "tls-required")
        capa = text(session.line(b"CAPA"))
        self.assertNotIn(b"\r\nUSER\r\n", capa)
        self.assertNotIn(b"SASL", capa)
        self.assertIn(b"\r\nSTLS\r\n", capa)
        self.assertTrue(text(session.line(b"UTF8")).startswith(b"+OK"))
        self.assertIsInstance(session.line(b"STLS"), StartTLS)
        session.secure()
        self.assertTrue(text(session.line(b"USER bob")).startswith(b"+OK"))


class SASLTests(SynchronousTestCase):
    def test_plain_with_initial_response(self) -> None:
        login = fresh().line(b"auth plain " + b64encode(b"\0bob\0 p w"))
        assert isinstance(login, Login) and isinstance(login.credentials, Cleartext)
        self.assertEqual(login.credentials.username, b"bob")
        self.assertEqual(login.credentials.password, b" p w")
        self.assertEqual(login.credentials.mechanism, "PLAIN")

    def test_plain_with_challenge(self) -> None:
        session = fresh()
        self.assertEqual(session.line_limit, COMMAND_LIMIT)
        self.assertEqual(session.line(b"AUTH PLAIN"), b"+ \r\n")
        self.assertEqual(session.line_limit, SASL_LIMIT)
        self.assertIsInstance(session.line(b64encode(b"bob\0bob\0x")), Login)
        self.assertEqual(session.line_limit, COMMAND_LIMIT)

    def test_refused_responses(self) -> None:
        for response in (b"\0bob\0", b"\0\0x", b"alice\0bob\0x", b"bob\0x", b"\0bob\0x\0", b""):
            session = fresh()
            session.line(b"AUTH PLAIN")
            answer = session.line(b64encode(response))
            self.assertTrue(text(answer).startswith(b"-ERR [AUTH]"), response)
            self.assertTrue(text(session.line(b"USER bob")).startswith(b"+OK"))

    def test_cancel_bad_base64_and_quit(self) -> None:
        for line in (b"*", b"YWJ", b"YQ==YQ==", b"Y Q=", b"YR==", b"====", b"QUIT!"):
            session = fresh()
            session.line(b"AUTH PLAIN")
            answer = session.line(line)
            self.assertTrue(text(answer).startswith(b"-ERR"), line)
            self.assertTrue(text(session.line(b"CAPA")).startswith(b"+OK"))

    def test_quit_inside_an_exchange_is_data(self) -> None:
        session = fresh()
        session.line(b"AUTH PLAIN")
        self.assertNotIsInstance(session.line(b"QUIT"), Hangup)

    def test_equals_sign_is_the_empty_response(self) -> None:
        self.assertTrue(text(fresh().line(b"AUTH PLAIN =")).startswith(b"-ERR [AUTH]"))

    def test_list_and_unknown(self) -> None:
        self.assertEqual(fresh().line(b"AUTH"), b"+OK\r\nPLAIN\r\n.\r\n")
        self.assertTrue(text(fresh().line(b"AUTH NTLM")).startswith(b"-ERR"))

    def test_overlong_response_ends_the_exchange(self) -> None:
        session = fresh()
        session.line(b"AUTH PLAIN")
        self.assertTrue(text(session.overlong(Overlong.LINE)).startswith(b"-ERR"))
        self.assertTrue(text(session.line(b"CAPA")).startswith(b"+OK"))


class TransactionTests(SynchronousTestCase):
    def test_stat_list(self) -> None:
        session = opened([120, 200, 30])
        self.assertEqual(session.line(b"STAT"), b"+OK 3 350\r\n")
        self.assertEqual(session.line(b"LIST 2"), b"+OK 2 200\r\n")
        self.assertEqual(
            text(session.line(b"LIST")),
            b"+OK 3 messages (350 octets)\r\n1 120\r\n2 200\r\n3 30\r\n.\r\n",
        )

    def test_empty_maildrop(self) -> None:
        session = opened([])
        self.assertEqual(session.line(b"STAT"), b"+OK 0 0\r\n")
        self.assertEqual(text(session.line(b"LIST")), b"+OK 0 messages (0 octets)\r\n.\r\n")
        self.assertIsInstance(session.line(b"UIDL"), Identify)
        self.assertEqual(text(session.learned(Listing([], []))), b"+OK\r\n.\r\n")

    def test_deleted_messages_vanish(self) -> None:
        session = opened([120, 200, 30], [b"a", b"b", b"c"])
        self.assertEqual(session.line(b"DELE 2"), b"+OK message 2 deleted\r\n")
        self.assertEqual(session.line(b"STAT"), b"+OK 2 150\r\n")
        self.assertEqual(
            text(session.line(b"LIST")), b"+OK 2 messages (150 octets)\r\n1 120\r\n3 30\r\n.\r\n"
        )
        self.assertEqual(text(session.line(b"UIDL")), b"+OK\r\n1 a\r\n3 c\r\n.\r\n")
        for line in (b"LIST 2", b"UIDL 2", b"RETR 2", b"TOP 2 0", b"DELE 2"):
            self.assertEqual(session.line(line), b"-ERR message 2 is deleted\r\n")
        self.assertEqual(session.line(b"RSET"), b"+OK\r\n")
        self.assertEqual(session.line(b"STAT"), b"+OK 3 350\r\n")

    def test_uidl(self) -> None:
        """`UIDL n` gives number and id, with single blanks (RFC 1939 section 7)."""
        session = opened([1, 2])
        self.assertIsInstance(session.line(b"UIDL 2"), Identify)
        listing = Listing([1, 2], [b"first", b"second"])
        self.assertEqual(session.learned(listing), b"+OK 2 second\r\n")
        self.assertEqual(text(session.line(b"UIDL")), b"+OK\r\n1 first\r\n2 second\r\n.\r\n")

    def test_retr_top(self) -> None:
        session = opened([120, 200])
        fetch = session.line(b"RETR 2")
        self.assertEqual(fetch, Fetch(1, None))
        assert isinstance(fetch, Fetch)
        self.assertEqual(session.fetching(fetch), b"+OK 200 octets\r\n")
        self.assertEqual(session.line(b"TOP 1 0"), Fetch(0, 0))
        self.assertEqual(session.tally.retr_octets, 200)

    def test_last(self) -> None:
        session = opened([1, 2, 3])
        self.assertEqual(session.line(b"LAST"), b"+OK 0\r\n")
        session.fetching(Fetch(1, None))
        session.fetching(Fetch(0, None))
        self.assertEqual(session.line(b"LAST"), b"+OK 2\r\n")
        session.line(b"RSET")
        self.assertEqual(session.line(b"LAST"), b"+OK 0\r\n")

    def test_numbers(self) -> None:
        session = opened([1])
        self.assertEqual(session.line(b"RETR 01"), Fetch(0, None))
        for word in (
            b"0",
            b"2",
            b"-1",
            b"+1",
            b"1_0",
            b"x",
            b"4294967297",
            b"9" * 200,
            b"\xd9\xa1",
        ):
            for command in (b"RETR ", b"LIST ", b"UIDL ", b"DELE "):
                self.assertTrue(text(session.line(command + word)).startswith(b"-ERR"), word)
        self.assertTrue(text(session.line(b"TOP 1 -1")).startswith(b"-ERR"))
        self.assertEqual(session.line(b"STAT"), b"+OK 1 1\r\n")

    def test_a_second_login_changes_nothing(self) -> None:
        session = opened([1, 2])
        for line in (b"USER eve", b"PASS x", b"APOP eve x", b"AUTH PLAIN", b"STLS", b"UTF8"):
            self.assertTrue(text(session.line(line)).startswith(b"-ERR"), line)
        self.assertEqual(session.line(b"STAT"), b"+OK 2 3\r\n")

    def test_quit_commits(self) -> None:
        session = opened([10, 20, 30])
        session.line(b"DELE 1")
        session.line(b"DELE 3")
        self.assertEqual(session.line(b"QUIT"), Commit(frozenset({0, 2})))
        answer = session.committed()
        self.assertTrue(answer.farewell.startswith(b"+OK"))
        self.assertEqual((session.tally.deleted, session.tally.deleted_octets), (2, 40))
        self.assertEqual((session.tally.left, session.tally.left_octets), (1, 20))

    def test_quit_says_what_was_retrieved(self) -> None:
        """By RETR, and not what is deleted; TOP shows a part only, and RSET takes all back."""
        session = opened([10, 20, 30, 40])
        for index, lines in ((0, None), (1, None), (2, 5)):
            session.fetching(Fetch(index, lines))
        session.line(b"DELE 2")
        self.assertEqual(session.line(b"QUIT"), Commit(frozenset({1}), frozenset({0})))
        session = opened([10, 20])
        session.fetching(Fetch(0, None))
        session.line(b"RSET")
        session.fetching(Fetch(1, None))
        self.assertEqual(session.line(b"QUIT"), Commit(frozenset(), frozenset({1})))

    def test_failed_commit(self) -> None:
        session = opened([10, 20])
        session.line(b"DELE 1")
        session.line(b"QUIT")
        answer = session.failed(TemporaryFailure("not now"))
        assert isinstance(answer, Hangup)
        self.assertEqual(answer.farewell, b"-ERR [SYS/TEMP] not now\r\n")
        self.assertEqual((session.tally.deleted, session.tally.left), (0, 2))

    def test_failed_fetch_goes_on(self) -> None:
        session = opened([10])
        session.line(b"RETR 1")
        answer = session.failed(TemporaryFailure("not now"))
        self.assertEqual(answer, b"-ERR [SYS/TEMP] not now\r\n")
        self.assertEqual(session.line(b"NOOP"), b"+OK\r\n")

    def test_capa(self) -> None:
        before, after = text(fresh().line(b"CAPA")), text(opened([]).line(b"CAPA"))
        for name in (
            b"TOP",
            b"UIDL",
            b"RESP-CODES",
            b"AUTH-RESP-CODE",
            b"PIPELINING",
            b"UTF8 USER",
        ):
            for capa in (before, after):
                self.assertIn(b"\r\n" + name + b"\r\n", capa)
        self.assertIn(b"\r\nIMPLEMENTATION Popdrop", after)
        self.assertNotIn(b"IMPLEMENTATION", before)
        for name in (b"\r\nUSER\r\n", b"SASL", b"STLS"):
            self.assertNotIn(name, after)


class BadCommandTests(SynchronousTestCase):
    def test_wrong_arguments(self) -> None:
        for line in (
            b"STAT x", b"LIST 1 1", b"RETR", b"RETR 1 1", b"TOP 1", b"TOP 1 1 1", b"NOOP x",
            b"QUIT x", b"DELE  1", b"DELE 1 ", b"RSET x", b"CAPA x", b"LIST ", b"UIDL  1",
        ):  # fmt: skip
            answer = opened([1]).line(line)
            self.assertIsInstance(answer, Refusal, line)
            self.assertTrue(text(answer).startswith(b"-ERR"), line)
        for line in (b"USER", b"USER a b", b"PASS", b"APOP bob", b"APOP a b c", b"AUTH a b c"):
            self.assertTrue(text(fresh().line(line)).startswith(b"-ERR"), line)

    def test_control_characters(self) -> None:
        for line in (b"NOOP\0", b"USER bob\0x", b"PASS a\tb", b"\0", b"USER x\rroot"):
            answer = fresh().line(line)
            self.assertEqual(text(answer), b"-ERR control character in a command\r\n")

    def test_nothing_is_echoed(self) -> None:
        answer = text(fresh().line(b"<script>alert(1)</script> %n%s"))
        self.assertEqual(answer, b"-ERR unknown command\r\n")

    def test_old_commands(self) -> None:
        for line in (b"RPOP bob", b"XTND XMIT", b"EUIDL", b"MDEF x(y)"):
            self.assertTrue(text(fresh().line(line)).startswith(b"-ERR"))

    def test_limits(self) -> None:
        session = fresh()
        answers = [session.line(b"FOO") for _ in range(BAD_BEFORE_LOGIN)]
        self.assertTrue(all(isinstance(a, Refusal) for a in answers[:-1]))
        self.assertIsInstance(answers[-1], Hangup)
        session = opened([1])
        answers = [session.line(b"FOO") for _ in range(BAD_IN_ALL)]
        self.assertTrue(all(isinstance(a, Refusal) for a in answers[:-1]))
        self.assertIsInstance(answers[-1], Hangup)

    def test_out_of_place_commands_do_not_count(self) -> None:
        session = fresh()
        for _ in range(BAD_IN_ALL * 2):
            self.assertTrue(text(session.line(b"NOOP")).startswith(b"-ERR"))

    def test_overlong(self) -> None:
        self.assertTrue(text(fresh().overlong(Overlong.LINE)).startswith(b"-ERR"))
        self.assertIsInstance(fresh().overlong(Overlong.ENDLESS), Hangup)

    def test_lang(self) -> None:
        listed = text(fresh().line(b"LANG"))
        self.assertIn(b"\r\nen ", listed)
        self.assertIn(b"\r\ni-default ", listed)
        self.assertTrue(text(fresh().line(b"LANG en")).startswith(b"+OK en "))
        self.assertTrue(text(fresh().line(b"LANG tlh")).startswith(b"-ERR"))

    words = st.one_of(
        st.sampled_from(
            [*COMMANDS, b"auth", b"=", b"1", b"2", b"0", b"99", b"PLAIN", b"*", b"bob"]
        ),
        st.binary(max_size=12),
    )

    @settings(deadline=None, max_examples=500)
    @given(st.lists(st.lists(words, max_size=4).map(b" ".join), max_size=40))
    def test_whatever_comes_each_line_has_one_honest_answer(self, lines: list[bytes]) -> None:
        """Replies are single well-formed lines or multi-lines; no octet of ours is raw client's."""
        session = opened([5, 7])
        for line in lines:
            line = line.replace(b"\n", b"")
            result = session.line(line)
            if isinstance(result, Commit | Hangup):
                return
            if isinstance(result, Identify):
                result = session.learned(Listing([5, 7], [b"a", b"b"]))
            if isinstance(result, Fetch):
                result = session.fetching(result)
            reply = text(result)
            self.assertRegex(reply, rb"\A(?:\+OK|-ERR)(?: [\x20-\x7e]*)?\r\n")
            first, _, rest = reply.partition(b"\r\n")
            self.assertLessEqual(len(first), 510)
            self.assertTrue(not rest or rest.endswith(b".\r\n"))


class DigestTests(SynchronousTestCase):
    def test_upper_case_digest(self) -> None:
        digest = hashlib.md5(CHALLENGE + b"secret").hexdigest().upper().encode()
        login = fresh().line(b"APOP bob " + digest)
        assert isinstance(login, Login) and isinstance(login.credentials, ApopCredentials)
        self.assertTrue(login.credentials.checkPassword(b"secret"))
