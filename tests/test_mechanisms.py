"""AUTH in a session and in the shell: offers, questions to the accounts, failures, checkers."""

from __future__ import annotations

import gc
import hmac
import weakref
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.portal import Portal
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from popdrop.accounts.checkers import AccountsChecker, Answers, Chain
from popdrop.credentials import (
    BearerToken,
    CramCredentials,
    ExternalCredentials,
    ScramCredentials,
)
from popdrop.errors import (
    BadCredentials,
    NoSuchUser,
    NoVerifierOfThisKind,
    PopdropError,
    TemporaryFailure,
)
from popdrop.interfaces import IAnswers, IBearerToken, IExternal, IScramCredentials
from popdrop.listing import Listing
from popdrop.policy import CLEARTEXT, Policy, mechanism_is_open
from popdrop.protocol import ASKED_SECONDS, POP3Protocol
from popdrop.realm import Realm
from popdrop.sasl import MECHANISMS, ApopQuery, ScramQuery
from popdrop.session import (
    FAILED_LOGINS,
    QUESTIONS,
    Ask,
    Hangup,
    Login,
    Refusal,
    Result,
    Session,
    StartTLS,
)
from popdrop.values import Account, PeerFacts, ScramVerifier, Secret, Verified
from popdrop.wire import Overlong
from tests.doubles import NoPool, Server, Transport
from tests.scram import Client, ScramAccounts, unreadable, verifier

EVERY = tuple(MECHANISMS)
FAR = PeerFacts(address="192.0.2.7")
NEAR = PeerFacts(address="127.0.0.1")
TLS = PeerFacts(address="192.0.2.7", bindings={"tls-exporter": b"E" * 32}, certificate_name="bob")
FAILURE = b"-ERR [AUTH] Authentication failed.\r\n"


def challenge_of(result: Result) -> bytes:
    assert isinstance(result, bytes) and result.startswith(b"+ "), result
    return b64decode(result[2:-2], validate=True)


def text(result: Result) -> bytes:
    if isinstance(result, Refusal):
        return result.reply
    assert isinstance(result, bytes), result
    return result


class Nonces:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bytes:
        self.count += 1
        return b"%032x" % self.count


def fresh(peer: PeerFacts = NEAR, secured: bool = False, policy: Policy | None = None) -> Session:
    policy = policy or Policy(mechanisms=EVERY, cleartext="always", stls="offer")
    session = Session(b"", policy, secured, Nonces())
    session.met(peer)
    return session


def kept(query: ScramQuery, password: bytes = b"secret") -> ScramVerifier:
    return verifier(password, query.algorithm)


class OfferTests(SynchronousTestCase):
    def test_table(self) -> None:
        """Who may try what: a row is a mechanism, a column a connection."""
        columns = (("far", False, FAR), ("near", False, NEAR), ("TLS", True, TLS))
        for mechanisms, expected in (
            ((b"SCRAM-SHA-1", b"SCRAM-SHA-256", b"CRAM-MD5"), (True, True, True)),
            ((b"SCRAM-SHA-1-PLUS", b"SCRAM-SHA-256-PLUS"), (False, False, True)),
            ((b"EXTERNAL",), (False, False, True)),
            ((b"OAUTHBEARER", b"XOAUTH2"), (False, True, True)),
            ((b"PLAIN", b"LOGIN"), (False, True, True)),
        ):
            for mechanism in mechanisms:
                found = tuple(
                    mechanism_is_open(Policy(), mechanism, secured, peer)
                    for _, secured, peer in columns
                )
                self.assertEqual(found, expected, mechanism)

    def test_cleartext_words(self) -> None:
        """They are about passwords: SCRAM and CRAM-MD5 do not show any."""
        for word in CLEARTEXT:
            policy = Policy(cleartext=word)
            self.assertTrue(mechanism_is_open(policy, b"SCRAM-SHA-256", False, FAR))
            self.assertTrue(mechanism_is_open(policy, b"CRAM-MD5", False, FAR))
            for mechanism in (b"PLAIN", b"LOGIN"):
                self.assertEqual(
                    mechanism_is_open(policy, mechanism, False, FAR), word in ("default", "always")
                )
            self.assertFalse(mechanism_is_open(policy, b"XOAUTH2", False, FAR))

    def test_strictest_reading(self) -> None:
        """Before the peer is known; without a binding; without a name in the certificate."""
        for mechanism in (b"EXTERNAL", b"SCRAM-SHA-1-PLUS"):
            for peer in (None, PeerFacts(), PeerFacts(certificate_name="", bindings={})):
                self.assertFalse(mechanism_is_open(Policy(), mechanism, True, peer))
            self.assertFalse(mechanism_is_open(Policy(), mechanism, False, TLS))
        required = Policy(stls="require", cleartext="always")
        for mechanism in EVERY:
            self.assertFalse(mechanism_is_open(required, mechanism, False, NEAR))

    def test_capa_and_auth_agree(self) -> None:
        """What CAPA lists can be begun, what it does not list cannot, unless it is hidden."""
        hidden = frozenset({b"LOGIN", b"CRAM-MD5"})
        policy = Policy(mechanisms=EVERY, hidden=hidden)
        for secured, peer in ((False, FAR), (False, NEAR), (True, TLS), (True, FAR)):
            rows = text(fresh(peer, secured, policy).line(b"CAPA")).split(b"\r\n")
            listed = next(row.split(b" ")[1:] for row in rows if row.startswith(b"SASL "))
            self.assertEqual(
                text(fresh(peer, secured, policy).line(b"AUTH")).split(b"\r\n")[1:-2], listed
            )
            self.assertEqual(listed, [m for m in EVERY if m in listed], "the strongest first")
            self.assertEqual(hidden.intersection(listed), set())
            for mechanism in EVERY:
                answer = text(fresh(peer, secured, policy).line(b"AUTH " + mechanism.lower()))
                may = mechanism in listed or (
                    mechanism in hidden and mechanism_is_open(policy, mechanism, secured, peer)
                )
                self.assertEqual(answer.startswith(b"+ "), may, (mechanism, answer))

    def test_none(self) -> None:
        session = fresh(TLS, True, Policy(mechanisms=()))
        self.assertNotIn(b"SASL", text(session.line(b"CAPA")))
        for mechanism in EVERY:
            self.assertTrue(text(session.line(b"AUTH " + mechanism)).startswith(b"-ERR"))


class SessionTests(SynchronousTestCase):
    def test_login(self) -> None:
        for initial in (b" " + b64encode(b"bob"), b""):
            session = fresh()
            answer = session.line(b"auth login" + initial)
            if not initial:
                self.assertEqual(challenge_of(answer), b"Username:")
                answer = session.line(b64encode(b"bob"))
            self.assertEqual(challenge_of(answer), b"Password:")
            login = session.line(b64encode(b"secret"))
            assert isinstance(login, Login)
            self.assertTrue(login.credentials.checkPassword(b"secret"))  # type: ignore[union-attr]

    def test_cram(self) -> None:
        """Another challenge each time, and the digest of one is none of the next."""
        session = fresh()
        challenges = []
        for _ in range(2):
            challenges.append(challenge_of(session.line(b"AUTH CRAM-MD5")))
            login = session.line(b64encode(b"bob " + digest(b"secret", challenges[0])))
            assert isinstance(login, Login)
            found = login.credentials.checkPassword(b"secret")  # type: ignore[union-attr]
            self.assertEqual(found, len(challenges) == 1)
            session.refused(BadCredentials("Authentication failed."))
        self.assertNotEqual(*challenges)

    def test_scram(self) -> None:
        """The server's proof goes as a challenge, an empty line ends it (behaviour 10.16)."""
        for initial in (False, True):
            session, client = fresh(), Client("SCRAM-SHA-256", "bob", "secret")
            first = b64encode(client.first())
            if initial:
                ask = session.line(b"AUTH SCRAM-SHA-256 " + first)
            else:
                self.assertEqual(session.line(b"AUTH SCRAM-SHA-256"), b"+ \r\n")
                ask = session.line(first)
            assert isinstance(ask, Ask)
            self.assertEqual(ask.query, ScramQuery(b"bob", "SHA-256"))
            self.assertEqual(session.user, b"bob")
            final = client.final(challenge_of(session.told(kept(ask.query))))
            login = session.line(b64encode(final))
            assert isinstance(login, Login) and isinstance(login.credentials, ScramCredentials)
            client.finish(challenge_of(session.opened(Listing([5]))))
            self.assertEqual(session.line(b""), b"+OK bob has 1 message(s) (5 octets).\r\n")
            self.assertEqual(session.line(b"STAT"), b"+OK 1 5\r\n")

    def test_scram_refused(self) -> None:
        """The server shows nothing of what it knows, whatever the reason (behaviour 2)."""
        session = fresh()
        client, query = self.begun(session)
        final = client.final(challenge_of(session.told(kept(query))))
        self.assertIsInstance(session.line(b64encode(final)), Login)
        answer = session.refused(BadCredentials("Authentication failed.", "disabled"))
        self.assertEqual(answer, FAILURE)
        self.assertEqual(session.line(b""), fresh().line(b""))
        # What is left of it does not come with the next login.
        session.line(b"USER bob")
        self.assertIsInstance(session.line(b"PASS secret"), Login)
        self.assertTrue(text(session.opened(Listing([5]))).startswith(b"+OK bob"))

    def test_scram_with_a_server_that_is_not_believed(self) -> None:
        for line in (b"*", b"YWJj", b"QUIT", b"!", b"="):
            session = fresh()
            client, query = self.begun(session)
            final = client.final(challenge_of(session.told(kept(query))))
            session.line(b64encode(final))
            session.opened(Listing([5]))
            answer = session.line(line)
            assert isinstance(answer, Hangup)
            self.assertEqual(answer.reason, "sasl-cancelled")
        session = fresh()
        client, query = self.begun(session)
        session.line(b64encode(client.final(challenge_of(session.told(kept(query))))))
        session.opened(Listing([5]))
        self.assertIsInstance(session.overlong(Overlong.LINE), Hangup)

    def begun(self, session: Session, password: str = "secret") -> tuple[Client, ScramQuery]:
        client = Client("SCRAM-SHA-1", "bob", password)
        ask = session.line(b"AUTH SCRAM-SHA-1 " + b64encode(client.first()))
        assert isinstance(ask, Ask), ask
        return client, ask.query

    def test_scram_failures_are_logins(self) -> None:
        session = fresh()
        client, query = self.begun(session, "wrong")
        final = client.final(challenge_of(session.told(kept(query))))
        self.assertIsInstance(session.line(b64encode(final)), Login)
        self.assertEqual(session.refused(BadCredentials("Authentication failed.")), FAILURE)
        self.assertEqual(session.line_limit, fresh().line_limit)

    def test_accounts_that_cannot_be_read(self) -> None:
        """The exchange is forgotten; it is nobody's failure."""
        session = fresh()
        for _ in range(FAILED_LOGINS + 1):
            self.begun(session)
            answer = session.refused(unreadable())
            assert isinstance(answer, bytes)
            self.assertTrue(answer.startswith(b"-ERR [SYS/TEMP]"))
            self.assertRaises(RuntimeError, session.told, verifier(b"secret", "SHA-1"))
            self.assertTrue(text(session.line(b"CAPA")).startswith(b"+OK"))

    def test_questions_are_limited(self) -> None:
        session = fresh()
        for _ in range(QUESTIONS):
            _, query = self.begun(session)
            session.told(kept(query))
            session.line(b"*")
        answer = session.line(b"AUTH SCRAM-SHA-1 " + b64encode(b"n,,n=bob,r=x"))
        self.assertIsInstance(answer, Hangup)

    def test_y_is_refused_where_plus_is_offered(self) -> None:
        response = b"AUTH SCRAM-SHA-1 " + b64encode(b"y,,n=bob,r=x")
        answer = fresh(TLS, True).line(response)
        self.assertEqual(answer, Refusal(FAILURE, "channel-binding"))
        self.assertIsInstance(fresh().line(response), Ask)
        without = Policy(mechanisms=(b"SCRAM-SHA-1",))
        self.assertIsInstance(fresh(TLS, True, without).line(response), Ask)

    def test_bearer_failures(self) -> None:
        """A challenge, whatever the client answers, and the reply (RFC 7628 section 3.2.2)."""
        begin = b"AUTH OAUTHBEARER " + b64encode(b"n,,\1auth=Bearer abc\1\1")
        error = BadCredentials("Authentication failed.")
        session = fresh()
        for answer in (b64encode(b"\1"), b"*", b"QUIT!"):
            self.assertIsInstance(session.line(begin), Login)
            told = session.refused(error)
            assert isinstance(told, bytes)
            self.assertEqual(challenge_of(told), b'{"status":"invalid_token"}')
            self.assertEqual(session.line(answer), FAILURE)
        self.assertIsInstance(session.line(begin), Login)
        session.refused(error)
        self.assertIsInstance(session.line(b""), Hangup, "four failures close")
        session = fresh()
        session.line(begin)
        told = session.refused(TemporaryFailure("later"))
        self.assertEqual(told, b"-ERR [SYS/TEMP] later\r\n")
        session.line(b"USER bob")
        session.line(b"PASS x")
        self.assertEqual(session.refused(error), FAILURE)

    def test_external(self) -> None:
        login = fresh(TLS, True).line(b"AUTH EXTERNAL =")
        assert isinstance(login, Login)
        self.assertEqual(login.credentials.username, b"bob")
        self.assertEqual(text(fresh(TLS, True).line(b"AUTH EXTERNAL " + b64encode(b"al"))), FAILURE)

    def test_stls_in_an_exchange(self) -> None:
        """It is data there; cancelled and under TLS, nothing goes on (STARTTLS attacks)."""
        for begin in (b"AUTH PLAIN", b"AUTH LOGIN", b"AUTH CRAM-MD5", b"AUTH SCRAM-SHA-1"):
            session = fresh()
            challenge_of(session.line(begin))
            self.assertNotIsInstance(session.line(b"STLS"), StartTLS)
            if session.line_limit != fresh().line_limit:
                session.line(b"*")
            self.assertIsInstance(session.line(b"STLS"), StartTLS)
            session.secure()
            session.met(TLS)
            answer = session.line(b64encode(b"\0bob\0secret"))
            self.assertTrue(text(answer).startswith(b"-ERR unknown command"), answer)
            self.assertIsNone(session.user)

    def test_the_session_goes_on(self) -> None:
        """After `*` and bad base64, at each step of each mechanism; QUIT is data."""
        for mechanism in EVERY:
            for steps in range(4):
                for line, allowed in ((b"*", 0), (b"YQ==YQ==", 1), (b"QUIT", 0), (b"QUIT!", 1)):
                    session = fresh(TLS, True)
                    if not advance(session, mechanism, steps):
                        continue
                    answer = session.line(line)
                    if isinstance(answer, Login):
                        self.assertEqual((mechanism, steps, line), (b"LOGIN", 1, b"QUIT"))
                        continue
                    if line == b"QUIT" and isinstance(answer, bytes) and answer[:2] == b"+ ":
                        answer = session.line(b"*")
                    self.assertTrue(text(answer).startswith(b"-ERR"), (mechanism, steps, line))
                    self.assertEqual(session._bad, allowed)
                    self.assertTrue(text(session.line(b"CAPA")).startswith(b"+OK"))


def digest(secret: bytes, challenge: bytes) -> bytes:
    return hmac.digest(secret, challenge, "md5").hex().encode()


def advance(session: Session, mechanism: bytes, steps: int) -> bool:
    """Go so many steps into an exchange; `False`: it is not so long."""
    name = mechanism.decode()
    answer = session.line(b"AUTH " + mechanism)
    client = None
    if name.startswith("SCRAM"):
        bound = ("tls-exporter", b"E" * 32) if name.endswith("PLUS") else None
        client = Client(name, "bob", "secret", bound)
    for step in range(steps):
        if client is not None and step == 0:
            answer = session.line(b64encode(client.first()))
            assert isinstance(answer, Ask)
            answer = session.told(kept(answer.query))
        elif mechanism == b"LOGIN" and step == 0:
            answer = session.line(b64encode(b"bob"))
        else:
            return False
    return True


class Pool:
    """Runs at once, or when the test lets it."""

    def __init__(self) -> None:
        self.hold: Deferred[None] | None = None

    def run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        if self.hold is None:
            return maybeDeferred(work, *args, **kwargs)
        return Deferred.fromCoroutine(self._later(self.hold, work, *args))

    async def _later(self, hold: Deferred[None], work: Callable[..., Any], *args: Any) -> Any:
        await hold
        return work(*args)


@implementer(ICredentialsChecker)
class Tokens:
    """`good` is a token of whoever shows it."""

    credentialInterfaces = (IBearerToken,)

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        if credentials.token == b"good":
            return succeed(Verified(Account(credentials.username)))
        return fail(BadCredentials("Authentication failed."))


class Site(Server):
    """`bob` and `alice` by SCRAM and by certificate, over the doubles."""

    def __init__(self, throttle: str = "off") -> None:
        super().__init__(
            policy=Policy(mechanisms=EVERY, cleartext="always", hostname="mail.example.org"),
            throttle=throttle,
        )
        self.accounts = ScramAccounts(bob="secret", alice="other")
        self.pool = Pool()
        checker = AccountsChecker(self.accounts, self.pool, self.pool, True)  # type: ignore[arg-type]
        portal = Portal(Realm(self.store, NoPool(), policy=self.factory.policy))  # type: ignore[arg-type]
        portal.registerChecker(checker, IScramCredentials, IExternal)
        portal.registerChecker(self.checker)
        self.factory.portal = portal
        self.factory.answers = Answers([self.accounts], [self.accounts], self.pool)  # type: ignore[arg-type]

    def answered(self, transport: Transport) -> bytes:
        """The last line."""
        return transport.value().split(b"\r\n")[-2]

    def scram(
        self, protocol: POP3Protocol, transport: Transport, user: str, password: str
    ) -> bytes:
        """A whole exchange; the last line of the server."""
        client = Client("SCRAM-SHA-256", user, password)
        protocol.dataReceived(b"AUTH SCRAM-SHA-256 " + b64encode(client.first()) + b"\r\n")
        self.clock.advance(ASKED_SECONDS)
        first = self.answered(transport)
        if not first.startswith(b"+ "):
            return first
        protocol.dataReceived(b64encode(client.final(b64decode(first[2:]))) + b"\r\n")
        final = self.answered(transport)
        if final.startswith(b"+ "):
            client.finish(b64decode(final[2:]))
            protocol.dataReceived(b"\r\n")
        return self.answered(transport)


def lose(protocol: POP3Protocol) -> None:
    protocol.connectionLost(Failure(ConnectionDone()))


class ShellTests(SynchronousTestCase):
    def test_scram(self) -> None:
        site = Site()
        protocol, transport = site.connect()
        self.assertRegex(site.scram(protocol, transport, "bob", "secret"), rb"\A\+OK bob has 2")
        record = site.records.records[-1]
        self.assertEqual((record.event, record.mechanism), ("login", "SCRAM-SHA-256"))

    def test_commands_wait_for_the_accounts(self) -> None:
        """What comes behind a question is read after its answer."""
        site = Site()
        site.pool.hold = Deferred()
        protocol, transport = site.connect()
        client = Client("SCRAM-SHA-1", "bob", "secret")
        transport.clear()
        protocol.dataReceived(
            b"AUTH SCRAM-SHA-1 " + b64encode(client.first()) + b"\r\n*\r\nCAPA\r\n"
        )
        self.assertEqual(transport.value(), b"")
        site.pool.hold.callback(None)
        lines = transport.value().split(b"\r\n")
        self.assertTrue(lines[0].startswith(b"+ "))
        self.assertEqual(lines[1], b"-ERR authentication cancelled")
        self.assertTrue(lines[2].startswith(b"+OK Capability"))

    def test_failures_look_alike(self) -> None:
        """Wrong password and unknown name: the same lines, of the same lengths, one record."""
        seen = []
        for user, password in (("bob", "wrong"), ("eve", "wrong"), ("eve", "secret")):
            site = Site()
            protocol, transport = site.connect()
            transport.clear()
            site.scram(protocol, transport, user, password)
            seen.append([len(line) for line in transport.value().split(b"\r\n")])
            self.assertTrue(transport.value().endswith(FAILURE))
            self.assertEqual(
                [(r.event, r.reason, r.mechanism) for r in site.records.records],
                [("failure", "bad-credentials", "SCRAM-SHA-256")],
            )
        self.assertEqual(seen[0], seen[1])
        self.assertEqual(seen[0], seen[2])

    def test_a_challenge_says_nothing_of_who_exists(self) -> None:
        """The same salt each time, for unknown names too; another for another name."""
        salts = {}
        for user in ("bob", "eve", "eva"):
            found = set()
            for _ in range(3):
                site = Site()
                protocol, transport = site.connect()
                response = b64encode(b"n,,n=" + user.encode() + b",r=x")
                protocol.dataReceived(b"AUTH SCRAM-SHA-256 " + response + b"\r\n")
                first = b64decode(site.answered(transport)[2:])
                found.add(first.partition(b",s=")[2])
            self.assertEqual(len(found), 1)
            salts[user] = found.pop()
        self.assertEqual(len(set(salts.values())), 3)

    def test_a_password_changed_between_proof_and_login(self) -> None:
        site = Site()
        protocol, transport = site.connect()
        client = Client("SCRAM-SHA-256", "bob", "secret")
        protocol.dataReceived(b"AUTH SCRAM-SHA-256 " + b64encode(client.first()) + b"\r\n")
        final = client.final(b64decode(site.answered(transport)[2:]))
        site.accounts.passwords[b"bob"] = b"changed"
        protocol.dataReceived(b64encode(final) + b"\r\n")
        self.assertTrue(transport.value().endswith(FAILURE))

    def test_accounts_that_cannot_be_read(self) -> None:
        for trouble, answer in (
            (unreadable(), rb"-ERR \[SYS/TEMP\] Accounts cannot be read now, try again later\."),
            (ValueError("secret detail"), rb"-ERR \[SYS/TEMP\] internal error, see log [0-9a-f]+"),
        ):
            site = Site()
            site.accounts.trouble = trouble
            protocol, transport = site.connect()
            line = site.scram(protocol, transport, "bob", "secret")
            self.assertRegex(line, rb"\A" + answer + rb"\Z")
            self.assertEqual(site.records.records[-1].event, "failure")
            site.accounts.trouble = None
            self.assertIn(b"+OK bob", site.scram(protocol, transport, "bob", "secret"))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_external(self) -> None:
        site = Site()
        for name, answer in (("bob", b"+OK bob has"), ("eve", b"-ERR [AUTH]")):
            protocol, transport = site.connect()
            protocol.dataReceived(b"\r\n")
            protocol._session.secure()
            protocol._session.met(PeerFacts(certificate_name=name))
            protocol.dataReceived(b"AUTH EXTERNAL =\r\n")
            self.assertTrue(site.answered(transport).startswith(answer), name)
            lose(protocol)

    def test_bearer_tokens(self) -> None:
        """A refusal waits, says why in JSON, and `-ERR` follows the client's answer."""
        site = Site("memory")
        checker = Tokens()
        site.factory.portal.registerChecker(checker, IBearerToken)
        for mechanism, response in (
            (b"OAUTHBEARER", b"n,a=bob,\1auth=Bearer %s\1\1"),
            (b"XOAUTH2", b"user=bob\1auth=Bearer %s\1\1"),
        ):
            protocol, transport = site.connect()
            protocol.dataReceived(b"AUTH " + mechanism + b"\r\n")
            protocol.dataReceived(b64encode(response % b"forged") + b"\r\nAQ==\r\n")
            self.assertEqual(site.answered(transport), b"+ ", "answered at once")
            site.clock.advance(30)
            lines = transport.value().split(b"\r\n")
            self.assertIn(b'"status"', b64decode(lines[-3][2:]))
            self.assertEqual(lines[-2] + b"\r\n", FAILURE)
            good = b64encode(response % b"good")
            protocol.dataReceived(b"AUTH " + mechanism + b" " + good + b"\r\n")
            self.assertIn(b"+OK bob has 2", transport.value())
            lose(protocol)
        found = [(r.event, r.reason, r.mechanism) for r in site.records.records]
        self.assertEqual(
            [each for each in found if each[0] != "end"],
            [
                ("failure", "bad-credentials", "OAUTHBEARER"),
                ("login", "ok", "OAUTHBEARER"),
                ("failure", "bad-credentials", "XOAUTH2"),
                ("login", "ok", "XOAUTH2"),
            ],
        )

    def test_failures_then_a_wrong_password(self) -> None:
        """1 to 10 failures by each mechanism, over sessions, never end in +OK (CVE-2005-0198)."""
        for mechanism in ("PLAIN", "LOGIN", "CRAM-MD5", "SCRAM-SHA-1", "EXTERNAL", "USER"):
            site = Site("memory")
            for number in range(1, 11):
                protocol, transport = site.connect()
                for _ in range(number):
                    transport.clear()
                    self.fail_by(site, protocol, transport, mechanism)
                    site.clock.advance(30)
                    self.assertNotIn(b"+OK ", transport.value().replace(b"+OK Password", b""))
                    if transport.disconnecting:  # after four
                        lose(protocol)
                        protocol, transport = site.connect()
                self.assertFalse(protocol._session.logged_in)
                lose(protocol)
            failures = [r for r in site.records.records if r.event == "failure"]
            self.assertEqual(len(failures), 55)
            self.assertEqual(site.store.opened, [])

    def fail_by(
        self, site: Site, protocol: POP3Protocol, transport: Transport, mechanism: str
    ) -> None:
        def say(words: bytes) -> None:
            protocol.dataReceived(b64encode(words) + b"\r\n")

        if mechanism == "USER":
            protocol.dataReceived(b"USER bob\r\nPASS wrong\r\n")
        elif mechanism == "SCRAM-SHA-1":
            client = Client(mechanism, "bob", "wrong")
            protocol.dataReceived(b"AUTH SCRAM-SHA-1\r\n")
            say(client.first())
            site.clock.advance(ASKED_SECONDS)
            say(client.final(b64decode(site.answered(transport)[2:])))
        elif mechanism == "EXTERNAL":
            protocol._met = True
            protocol._session.secure()
            protocol._session.met(PeerFacts(certificate_name="eve"))
            protocol.dataReceived(b"AUTH EXTERNAL =\r\n")
        else:
            protocol.dataReceived(b"AUTH " + mechanism.encode() + b"\r\n")
            if mechanism == "PLAIN":
                say(b"\0bob\0wrong")
            elif mechanism == "LOGIN":
                say(b"bob")
                say(b"wrong")
            else:
                challenge = b64decode(site.answered(transport)[2:])
                say(b"bob " + digest(b"wrong", challenge))

    def test_aborted_exchanges_leave_nothing(self) -> None:
        """At each step of each mechanism, by `*`, by a lost connection, or both (CVE-2016-8652)."""
        site = Site("memory:total=5")
        held: list[weakref.ref[POP3Protocol]] = []
        ways = [(m, s) for m in EVERY for s in range(3)]
        for number in range(1000):
            mechanism, steps = ways[number % len(ways)]
            protocol, transport = site.connect()
            protocol._session.secure()
            protocol._session.met(TLS)
            advance(protocol._session, mechanism, steps)
            if number % 2:
                protocol.dataReceived(b"*\r\n")
            lose(protocol)
            held.append(weakref.ref(protocol))
        del protocol, transport
        gc.collect()
        self.assertEqual([each for each in held if each() is not None], [])
        self.assertEqual(site.factory.protocols, set())
        self.assertEqual(site.clock.getDelayedCalls(), [])
        protocol, transport = site.connect()
        self.assertIn(b"+OK bob", site.scram(protocol, transport, "bob", "secret"))

    def test_the_time_of_a_question_tells_nothing(self) -> None:
        """Whether the look-up took no time or some: the challenge comes at one moment."""
        for took in (0.0, ASKED_SECONDS / 2):
            site = Site("memory")
            site.pool.hold = Deferred()
            protocol, transport = site.connect()
            protocol.dataReceived(b"AUTH SCRAM-SHA-1 " + b64encode(b"n,,n=bob,r=x") + b"\r\n")
            transport.clear()
            site.clock.advance(took)
            site.pool.hold.callback(None)
            site.clock.advance(ASKED_SECONDS * 0.9 - took)
            self.assertEqual(transport.value(), b"")
            site.clock.advance(ASKED_SECONDS * 0.2)
            self.assertTrue(transport.value().startswith(b"+ "))

    def test_a_client_that_leaves_during_the_question(self) -> None:
        for answered in (False, True):
            site = Site()
            site.pool.hold = Deferred()
            protocol, _ = site.connect()
            protocol.dataReceived(b"AUTH SCRAM-SHA-1 " + b64encode(b"n,,n=bob,r=x") + b"\r\n")
            lose(protocol)
            if answered and not site.pool.hold.called:
                site.pool.hold.callback(None)
            self.assertEqual(site.factory.protocols, set())
            self.assertEqual(site.clock.getDelayedCalls(), [])

    def test_bad_base64_fails_only_its_own(self) -> None:
        """CVE-2025-59028: twenty logins in progress, one of them talks nonsense."""
        site = Site()
        site.pool.hold = Deferred()
        logins = []
        for number in range(20):
            protocol, transport = site.connect()
            client = Client("SCRAM-SHA-256", "bob" if number % 2 else "alice", "wrong")
            protocol.dataReceived(b"AUTH SCRAM-SHA-256 " + b64encode(client.first()) + b"\r\n")
            logins.append((protocol, transport, client))
        hold, site.pool.hold = site.pool.hold, None
        hold.callback(None)
        logins[7][0].dataReceived(b"YQ==YQ==\r\n")
        self.assertEqual(site.answered(logins[7][1]), b"-ERR invalid base64")
        for number, (protocol, transport, client) in enumerate(logins):
            if number != 7:
                final = client.final(b64decode(site.answered(transport)[2:]))
                protocol.dataReceived(b64encode(final) + b"\r\n")
                site.clock.advance(0)
                self.assertEqual(site.answered(transport) + b"\r\n", FAILURE)
        self.assertIn(b"+OK bob", site.scram(*logins[7][:2], "bob", "secret"))


class CheckerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.accounts = ScramAccounts(bob="secret")
        self.checker = AccountsChecker(self.accounts, Pool(), Pool(), True)  # type: ignore[arg-type]

    def outcome(self, checker: Any, credentials: Any) -> object:
        result: list[Any] = []
        maybeDeferred(checker.requestAvatarId, credentials).addBoth(result.append)
        return type(result[0].value) if isinstance(result[0], Failure) else result[0]

    def scram(self, user: str, password: str) -> ScramCredentials:
        session, client = fresh(), Client("SCRAM-SHA-1", user, password)
        ask = session.line(b"AUTH SCRAM-SHA-1 " + b64encode(client.first()))
        assert isinstance(ask, Ask)
        known = self.accounts.scram(ask.query.username, ask.query.algorithm)
        answer = session.line(b64encode(client.final(challenge_of(session.told(known)))))
        login = session.line(b"") if isinstance(answer, bytes) else answer
        assert isinstance(login, Login) and isinstance(login.credentials, ScramCredentials)
        return login.credentials

    def test_interfaces(self) -> None:
        """Without a key nothing but passwords and certificates (decision 21)."""
        verifyObject(IAnswers, Answers([], [], Pool()))  # type: ignore[arg-type]
        self.assertIn(IScramCredentials, self.checker.credentialInterfaces)
        without = AccountsChecker(self.accounts, Pool(), Pool(), False)  # type: ignore[arg-type]
        self.assertEqual(set(without.credentialInterfaces), {IUsernamePassword, IExternal})
        self.assertIn(IUsernameHashedPassword, self.checker.credentialInterfaces)
        self.assertNotIn(IBearerToken, self.checker.credentialInterfaces)

    def test_scram(self) -> None:
        self.assertEqual(self.outcome(self.checker, self.scram("bob", "secret")), b"bob")
        self.assertIs(self.outcome(self.checker, self.scram("bob", "wrong")), BadCredentials)
        self.assertIs(self.outcome(self.checker, self.scram("eve", "wrong")), NoSuchUser)

    def test_an_account_without_verifier(self) -> None:
        shown = self.scram("bob", "wrong")
        for account in (Account(b"bob"), Account(b"bob", lacks_scram=True)):
            self.patch(self.accounts, "lookup", lambda name, account=account: account)
            self.assertIs(self.outcome(self.checker, shown), NoVerifierOfThisKind)

    def test_same_work_for_everybody(self) -> None:
        asked: list[bytes] = []
        self.accounts.before = asked.append
        for user in ("bob", "eve"):
            shown = self.scram(user, "wrong")
            asked.clear()
            self.outcome(self.checker, shown)
            self.assertEqual(asked, [user.encode()])

    def test_certificate(self) -> None:
        for name, expected in (
            (b"bob", b"bob"),
            (b"eve", NoSuchUser),
            (b"", BadCredentials),
            (b"BOB", NoSuchUser),
        ):
            self.assertEqual(self.outcome(self.checker, ExternalCredentials(name)), expected)

    def test_chain(self) -> None:
        """A second database is asked when the first does not know the name."""
        other = ScramAccounts(alice="secret")
        chain = Chain([self.checker, AccountsChecker(other, Pool(), Pool(), True)])  # type: ignore[arg-type]
        self.assertEqual(self.outcome(chain, ExternalCredentials(b"alice")), b"alice")
        self.assertIs(self.outcome(chain, BearerToken(b"bob", b"x")), BadCredentials)
        cram = CramCredentials(b"bob", b"<1@x>", digest(b"", b"<1@x>"))
        self.assertIs(self.outcome(chain, cram), BadCredentials)

    def test_whether_there_is_an_apop_secret(self) -> None:
        class Accounts:
            def lookup(self, name: bytes) -> Account | None:
                return {
                    b"with": Account(b"with", apop_secret=Secret(b"shared")),
                    b"without": Account(b"without"),
                }.get(name)

        answers = Answers([Accounts()], [], Pool())  # type: ignore[list-item,arg-type]
        for name, wanted in ((b"with", True), (b"without", False), (b"nobody", False)):
            result: list[object] = []
            Deferred.fromCoroutine(answers.answer(ApopQuery(name))).addBoth(result.append)
            self.assertEqual(result, [wanted], name)
        # The rules of all databases hold, as in the realm.
        both = Answers([ScramAccounts(**{"with": "x"}), Accounts()], [], Pool())  # type: ignore[list-item,arg-type]
        second: list[object] = []
        Deferred.fromCoroutine(both.answer(ApopQuery(b"with"))).addBoth(second.append)
        self.assertEqual(second, [True])

    def test_answers(self) -> None:
        """The first database that has the name, else the first one's made-up verifier."""
        other = ScramAccounts(alice="other", bob="another")
        answers = Answers([self.accounts, other], [self.accounts, other], Pool())  # type: ignore[arg-type]
        for name, source in ((b"bob", self.accounts), (b"alice", other), (b"eve", self.accounts)):
            result: list[Any] = []
            query = ScramQuery(name, "SHA-256")
            Deferred.fromCoroutine(answers.answer(query)).addBoth(result.append)
            expected = source.scram(name, "SHA-256")
            self.assertEqual(result[0].stored_key.reveal(), expected.stored_key.reveal(), name)
        again: list[Any] = []
        query = ScramQuery("ali\u00adce".encode(), "SHA-256")
        Deferred.fromCoroutine(answers.answer(query)).addBoth(again.append)
        expected = other.scram(b"alice", "SHA-256")
        self.assertEqual(again[0].stored_key.reveal(), expected.stored_key.reveal())
        other.trouble = unreadable()
        failed: list[Any] = []
        Deferred.fromCoroutine(answers.answer(ScramQuery(b"bob", "SHA-1"))).addBoth(failed.append)
        self.assertIsInstance(failed[0].value, PopdropError)
