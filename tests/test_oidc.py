"""The checker of bearer tokens, against an identity provider on loopback."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.portal import IRealm, Portal
from twisted.internet import reactor as the_reactor
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import deferLater
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import Interface, implementer
from zope.interface.verify import verifyObject

from popdrop.accounts import issuer, oidc, tokens, webclient
from popdrop.accounts.checkers import Chain
from popdrop.accounts.oidc import OidcChecker, from_spec
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoVerifierOfThisKind,
    PopdropError,
    TemporaryFailure,
)
from popdrop.interfaces import IBearerToken, IMaildrop
from popdrop.options import Options
from popdrop.realm import Realm
from popdrop.tap import Popdrop
from popdrop.values import Account, Owner, Verified
from tests.idp import Provider
from tests.test_layers import ROOT
from tests.test_tokens import ISSUER, jwk, jwks, pem, private, said, token, told

reactor: Any = the_reactor


@implementer(IBearerToken)
class Bearer:
    """What a session makes of OAUTHBEARER."""

    def __init__(self, octets: bytes, username: bytes = b"") -> None:
        self.token, self.username = octets, username


class Hops:
    """A pool without threads."""

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        return maybeDeferred(work, *args)


class Later:
    """The reactor, some time from now."""

    def __init__(self) -> None:
        self.offset = 0.0

    def seconds(self) -> float:
        return float(reactor.seconds()) + self.offset

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


def now(**changes: Any) -> dict[str, Any]:
    """Claims that are good at the moment."""
    return said(exp=int(time.time()) + 300, iat=int(time.time()) - 10) | changes


def good(**changes: Any) -> bytes:
    return token(now(**changes))


class Folder:
    """Files of a test's own."""

    def __init__(self, case: Any) -> None:
        self.path = Path(os.path.abspath(case.mktemp()))
        self.path.mkdir(0o700)

    def file(self, name: str, octets: bytes, mode: int = 0o600) -> str:
        path = self.path / name
        path.write_bytes(octets)
        path.chmod(mode)
        return str(path)


class CheckerCase(TestCase):
    """All that is logged is kept, and no refusal or log line may hold a piece of a token."""

    def setUp(self) -> None:
        self.folder = Folder(self)
        self.clock = Later()
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def checker(self, text: str) -> OidcChecker:
        return from_spec(text, self.clock, Hops())  # type: ignore[arg-type]

    def logged(self) -> str:
        return "\n".join(f"{formatEvent(event)} {event!r}" for event in self.events)

    async def login(self, checker: Any, octets: bytes, username: bytes = b"") -> bytes:
        verified = await checker.requestAvatarId(Bearer(octets, username))
        self.assertIsInstance(verified, Verified)
        self.assertTrue(verified.foreign)
        self.assertEqual(verified.account, Account(bytes(verified)))
        self.unseen(octets, "")
        return bytes(verified)

    async def refused(
        self, checker: Any, octets: bytes, kind: type[PopdropError], username: bytes = b""
    ) -> str:
        """Why: the word for the log."""
        try:
            name = await checker.requestAvatarId(Bearer(octets, username))
        except PopdropError as error:
            self.assertIs(type(error), kind)
            self.unseen(octets, told(error))
            return error.detail
        raise AssertionError(f"{name!r} is let in")

    def unseen(self, octets: bytes, text: str) -> None:
        text += self.logged()
        for piece in octets.split(b"."):
            self.assertNotIn(piece.decode("ascii"), text)


class FileTests(CheckerCase):
    """`keys=FILE`."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.folder.file("keys.json", jwks(jwk(private("ES256"))))
        self.made = self.checker(f"oidc:{ISSUER}:keys={self.path}:audience=popdrop")

    async def test_good(self) -> None:
        verifyObject(ICredentialsChecker, self.made)
        self.assertEqual(list(self.made.credentialInterfaces), [IBearerToken])
        self.assertEqual(await self.login(self.made, good()), b"bob@example.org")

    async def test_again(self) -> None:
        """A token is good until it expires, as often as it is shown."""
        octets = good()
        for _ in range(3):
            self.assertEqual(await self.login(self.made, octets), b"bob@example.org")

    async def test_refused(self) -> None:
        for why, octets, username in (
            ("token-expired", good(exp=int(time.time()) - 61), b""),
            ("token-early", good(nbf=int(time.time()) + 3600), b""),
            ("token-audience", good(aud="web"), b""),
            ("token-key", token(now(), kid="other"), b""),
            ("token-signature", token(now(), private("other")), b""),
            ("token-foreign-name", good(), b"eve@example.org"),
            ("token-email-unverified", good(email_verified=False), b""),
            ("token-malformed", b"not a token", b""),
            ("token-malformed", b"", b""),
            ("token-malformed", b"x" * (tokens.TOKEN_OCTETS + 1), b""),
        ):
            if why == "token-malformed":
                error = await self.error(octets)
                self.assertEqual((type(error), error.detail), (BadCredentials, why))
            else:
                self.assertEqual(
                    await self.refused(self.made, octets, BadCredentials, username), why
                )

    async def error(self, octets: bytes) -> Any:
        try:
            await self.made.requestAvatarId(Bearer(octets))
        except PopdropError as error:
            return error
        return None

    async def test_next_checker(self) -> None:
        """Another issuer's token, and one that is no JWT, may be for the next in the chain."""
        for octets in (good(iss="https://other.example"), b"0123456789abcdef"):
            await self.refused(self.made, octets, NoVerifierOfThisKind)
        other = self.checker(
            f"oidc:https://other.example:keys={self.path}:audience=popdrop:claim=sub"
        )
        chain = Chain([self.made, other])
        self.assertEqual(list(chain.credentialInterfaces), [IBearerToken])
        octets = good(iss="https://other.example")
        self.assertEqual(await self.login(chain, octets), b"248289761001")
        self.assertEqual(await self.login(chain, good()), b"bob@example.org")
        await self.refused(chain, good(iss="https://third.example"), BadCredentials)
        # Who is refused here is not tried there.
        self.assertEqual(
            await self.refused(chain, good(aud="web"), BadCredentials), "token-audience"
        )

    async def test_portal(self) -> None:
        @implementer(IRealm)
        class Names:
            def requestAvatar(self, avatar: Any, mind: object, *kinds: Any) -> Any:
                return kinds[0], avatar, lambda: None

        portal = Portal(Names())
        portal.registerChecker(self.made)
        _, avatar, _ = await portal.login(Bearer(good()), None, Interface)
        self.assertEqual(avatar, b"bob@example.org")

    async def test_rules_of_the_account(self) -> None:
        """They stand above any token (decision 22): the realm looks them up."""
        known = {b"bob": Account(b"bob", disabled=True)}

        class Accounts:
            lookup = staticmethod(known.get)

        opened: list[Owner] = []

        class Store:
            async def open(self, owner: Owner) -> Any:
                opened.append(owner)
                return mock.Mock()

        made = self.checker(f"oidc:{ISSUER}:keys={self.path}:audience=popdrop:domain=example.org")
        portal = Portal(Realm(Store(), Hops(), [Accounts()]))  # type: ignore[arg-type,list-item]
        portal.registerChecker(made)
        for email, refusal in (("bob@example.org", "disabled"), ("eve@example.org", None)):
            asking = portal.login(Bearer(good(email=email)), None, IMaildrop)
            if refusal is None:
                self.assertIs((await asking)[0], IMaildrop)
            else:
                error = await self.assertFailure(asking, BadCredentials)
                self.assertEqual(error.detail, refusal)
        self.assertEqual([owner.user for owner in opened], ["eve"])

    async def test_new_file(self) -> None:
        self.folder.file("keys.json", jwks(jwk(private("RSA"), "new")))
        octets = token(now(), algorithm="RS256", kid="new")
        self.assertEqual(await self.refused(self.made, octets, BadCredentials), "token-key")
        self.clock.offset = issuer.LOOK_AGAIN
        self.assertEqual(await self.login(self.made, octets), b"bob@example.org")
        await self.refused(self.made, good(), BadCredentials)

    async def test_new_file_is_bad(self) -> None:
        for number, octets in enumerate((b"", b"{}", None), 1):
            if octets is None:
                os.unlink(self.path)
            else:
                self.folder.file("keys.json", octets)
            self.clock.offset = number * issuer.LOOK_AGAIN
            self.assertEqual(await self.login(self.made, good()), b"bob@example.org")
            self.assertEqual(self.logged().count("the keys read before stay"), number * 2)

    @given(st.binary(max_size=60), st.binary(max_size=20))
    @settings(deadline=None, derandomize=True)
    def test_garbage(self, octets: bytes, username: bytes) -> None:
        done = self.made.requestAvatarId(Bearer(octets, username))
        self.failureResultOf(done, BadCredentials)


class JwksCase(CheckerCase):
    def setUp(self) -> None:
        super().setUp()
        self.provider = Provider(self)
        self.provider.serve({"keys": [jwk(private("ES256"))]})
        self.made = self.jwks()

    def jwks(self, more: str = "") -> OidcChecker:
        url = self.provider.url("keys")
        return self.checker(f"oidc:{ISSUER}:jwks={url}:audience=popdrop{more}")

    async def is_fetched(self, after: float, octets: bytes | None = None) -> bool:
        """Whether a good login at this second asks the provider."""
        before = self.provider.requests
        self.clock.offset = after
        self.assertEqual(await self.login(self.made, octets or good()), b"bob@example.org")
        return self.provider.requests > before


class JwksTests(JwksCase):
    """`jwks=URL`."""

    async def test_good(self) -> None:
        self.assertEqual(self.provider.requests, 0)
        self.assertEqual(await self.login(self.made, good()), b"bob@example.org")
        self.assertEqual(self.provider.requests, 1)
        sent = self.provider.headers[0]
        self.assertNotIn(b"authorization", sent)
        self.assertNotIn(b"accept-encoding", sent)

    async def test_not_asked_for_nonsense(self) -> None:
        for octets in (b"opaque", good(iss="https://evil.example")):
            await self.refused(self.made, octets, NoVerifierOfThisKind)
        self.assertEqual(self.provider.requests, 0)

    async def test_age(self) -> None:
        self.assertTrue(await self.is_fetched(0))
        self.assertFalse(await self.is_fetched(issuer.USUAL_AGE - 60))
        self.assertTrue(await self.is_fetched(issuer.USUAL_AGE + 60))

    async def test_max_age(self) -> None:
        begin = 0.0
        for words, age in (
            ("public, max-age=7200, must-revalidate", 7200.0),
            ("MAX-AGE=7200", 7200.0),
            ("max-age=1", issuer.SHORTEST_AGE),
            ("no-store", issuer.SHORTEST_AGE),
            ("no-cache, max-age=7200", issuer.SHORTEST_AGE),
            ("max-age=999999999", issuer.LONGEST_AGE),
            ("max-age=99999999999999999999", issuer.LONGEST_AGE),
            ("max-age=-5", issuer.USUAL_AGE),
        ):
            self.provider.serve({"keys": [jwk(private("ES256"))]}, cache_control=words)
            self.made = self.jwks()
            self.assertTrue(await self.is_fetched(begin), words)
            self.assertFalse(await self.is_fetched(begin + age - 60), words)
            self.assertTrue(await self.is_fetched(begin + age + 60), words)
            begin += age + 120

    async def test_rotation(self) -> None:
        """A new key is there at once, if the last fetch was a minute ago; the old one is gone."""
        await self.is_fetched(0)
        self.provider.serve({"keys": [jwk(private("RSA"), "k2")]})
        octets = token(now(), algorithm="RS256", kid="k2")
        self.assertTrue(await self.is_fetched(issuer.AGAIN, octets))
        self.assertEqual(await self.refused(self.made, good(), BadCredentials), "token-key")

    async def test_unknown_key_ids(self) -> None:
        """Whoever makes some up has the keys fetched once a minute and no more."""
        await self.is_fetched(0)
        for minute in (1, 2):
            self.clock.offset = minute * issuer.AGAIN
            for number in range(5):
                octets = token(now(), kid=f"none{number}")
                self.assertEqual(await self.refused(self.made, octets, BadCredentials), "token-key")
            self.assertEqual(self.provider.requests, 1 + minute)

    async def test_wrong_signature_fetches_nothing(self) -> None:
        await self.is_fetched(0)
        self.clock.offset = 2 * issuer.AGAIN
        await self.refused(self.made, token(now(), private("other")), BadCredentials)
        self.assertEqual(self.provider.requests, 1)

    async def test_logins_at_once(self) -> None:
        """One fetch serves all; one that is given up takes nothing from the others."""
        many = [self.made.requestAvatarId(Bearer(good())) for _ in range(5)]
        many[0].cancel()
        await self.assertFailure(many[0], CancelledError)
        for one in many[1:]:
            self.assertEqual(await one, b"bob@example.org")
        self.assertEqual(self.provider.requests, 1)

    async def test_all_given_up(self) -> None:
        many = [self.made.requestAvatarId(Bearer(good())) for _ in range(2)]
        for one in many:
            one.cancel()
            await self.assertFailure(one, CancelledError)
        self.assertEqual(await self.login(self.made, good()), b"bob@example.org")
        self.assertEqual(self.provider.requests, 1)

    async def test_private_authority(self) -> None:
        authority = trustme.CA()
        secure = Provider(self, authority)
        secure.serve({"keys": [jwk(private("ES256"))]})
        ca = self.folder.file("ca.pem", authority.cert_pem.bytes(), 0o644)
        text = f"oidc:{ISSUER}:jwks={secure.url()}:audience=popdrop"
        made = self.checker(f"{text}:ca={ca}")
        self.assertEqual(await self.login(made, good()), b"bob@example.org")
        # Neither the system's authorities nor another one know that certificate.
        other = self.folder.file("other.pem", trustme.CA().cert_pem.bytes())
        for more in ("", f":ca={other}"):
            why = await self.refused(self.checker(text + more), good(), TemporaryFailure)
            self.assertIn("certificate verify failed", why)

    async def test_name_in_the_certificate(self) -> None:
        authority = trustme.CA()
        secure = Provider(self)
        secure._context = None
        await secure.stop()
        from tests.idp import context

        secure._context = context(authority.issue_cert("id.example.org"))
        secure.port = 0
        secure.start()
        ca = self.folder.file("ca.pem", authority.cert_pem.bytes())
        made = self.checker(f"oidc:{ISSUER}:jwks={secure.url()}:audience=popdrop:ca={ca}")
        why = await self.refused(made, good(), TemporaryFailure)
        self.assertIn("VerificationError", why)
        self.assertEqual(secure.requests, 0)


class JwksFailureTests(JwksCase):
    """A provider that is down, slow or odd: nobody is let in, and nobody is told he is wrong."""

    async def test_down(self) -> None:
        await self.provider.stop()
        why = await self.refused(self.made, good(), TemporaryFailure)
        self.assertIn(f"no keys from {self.provider.url('keys')}: Connection", why)
        self.provider.start()
        # Not asked again at once.
        await self.refused(self.made, good(), TemporaryFailure)
        self.assertEqual(self.provider.requests, 0)
        self.assertTrue(await self.is_fetched(issuer.RETRY))

    async def test_odd_answers(self) -> None:
        keys = {"keys": [jwk(private("ES256"))]}
        packed = gzip.compress(json.dumps(keys).encode())
        evil = Provider(self)
        evil.serve(keys)

        def breaks_off(request: Any) -> Any:
            request.setHeader(b"content-length", b"1000")
            request.write(b'{"keys": ')
            request.transport.loseConnection()
            return 1

        for words, arrange in (
            ("status 500", lambda: self.provider.status(500)),
            ("status 404", lambda: self.provider.status(404)),
            ("status 302", lambda: self.provider.status(302, location=evil.url())),
            ("status 307", lambda: self.provider.status(307, location=evil.url())),
            ("neither", lambda: self.provider.serve(b"<html>")),
            ("no key", lambda: self.provider.serve({"keys": []})),
            ("over 65536", lambda: self.provider.serve(b" " * 65537)),
            ("over 65536", lambda: self.provider.serve(b" " * 10_000_000)),
            ("compressed", lambda: self.provider.serve(packed, content_encoding="gzip")),
            ("broke off", lambda: setattr(self.provider, "answer", breaks_off)),
        ):
            arrange()
            why = await self.refused(self.jwks(), good(), TemporaryFailure)
            self.assertIn(words, why)
        self.assertEqual(evil.requests, 0)

    async def test_just_small_enough(self) -> None:
        octets = jwks(jwk(private("ES256")))
        self.provider.serve(octets + b" " * (webclient.ANSWER_OCTETS - len(octets)))
        self.assertEqual(await self.login(self.made, good()), b"bob@example.org")

    async def test_without_length(self) -> None:
        def answer(request: Any) -> Any:
            request.clientproto = b"HTTP/1.0"
            request.write(jwks(jwk(private("ES256"))))
            request.finish()
            return 1

        self.provider.answer = answer
        self.assertEqual(await self.login(self.made, good()), b"bob@example.org")

    async def test_slow(self) -> None:
        self.patch(webclient, "ANSWER_SECONDS", 0.2)
        self.provider.hang()
        why = await self.refused(self.made, good(), TemporaryFailure)
        self.assertIn("no answer within", why)

        def drips(request: Any) -> Any:
            request.write(b" ")
            return 1

        self.provider.answer = drips
        why = await self.refused(self.jwks(), good(), TemporaryFailure)
        self.assertIn("no answer within", why)

    async def test_old_keys_while_down(self) -> None:
        await self.is_fetched(0)
        await self.provider.stop()
        for after in (issuer.USUAL_AGE + 60, issuer.STALE_AGE - 60):
            self.assertFalse(await self.is_fetched(after))
        self.clock.offset = issuer.STALE_AGE + 60
        await self.refused(self.made, good(), TemporaryFailure)
        self.provider.start()
        self.assertTrue(await self.is_fetched(issuer.STALE_AGE + 60 + issuer.RETRY))

    async def test_down_is_asked_once_a_minute(self) -> None:
        await self.is_fetched(0)
        self.provider.status(503)
        self.assertTrue(await self.is_fetched(2 * issuer.USUAL_AGE))
        self.assertFalse(await self.is_fetched(2 * issuer.USUAL_AGE + issuer.AGAIN / 2))
        self.assertTrue(await self.is_fetched(2 * issuer.USUAL_AGE + issuer.AGAIN + 1))

    async def test_bad_set_leaves_the_old_keys(self) -> None:
        await self.is_fetched(0)
        self.provider.serve({"keys": []})
        self.assertTrue(await self.is_fetched(2 * issuer.USUAL_AGE))
        self.assertIn("holds no key", self.logged())


class IntrospectionTests(CheckerCase):
    """`introspect=URL` (RFC 7662)."""

    OPAQUE = b"mF_9.B5f-4.1JqM"

    def setUp(self) -> None:
        super().setUp()
        self.provider = Provider(self)
        self.provider.serve(now(active=True))
        self.secret = self.folder.file("secret", b"s3 cr:et\n")
        self.made = self.introspect(":audience=popdrop")

    def introspect(self, more: str = "") -> OidcChecker:
        return self.checker(
            f"oidc:{ISSUER}:introspect={self.provider.url()}:client-id=pop drop"
            f":secret-file={self.secret}{more}"
        )

    async def test_good(self) -> None:
        self.assertEqual(await self.login(self.made, self.OPAQUE), b"bob@example.org")
        self.assertEqual(
            self.provider.forms, [{b"token": [self.OPAQUE], b"token_type_hint": [b"access_token"]}]
        )
        scheme, words = self.provider.headers[0][b"authorization"].split(b" ")
        # Encoded as in a form first (RFC 6749 section 2.3.1): a colon may be in either.
        self.assertEqual((scheme, base64.b64decode(words)), (b"Basic", b"pop+drop:s3+cr%3Aet"))
        self.assertNotIn("s3 cr", self.logged() + repr(vars(self.made._source)))

    async def test_name(self) -> None:
        made = self.introspect(":claim=username")
        self.provider.serve({"active": True, "username": "bob"})
        self.assertEqual(await self.login(made, self.OPAQUE, b"bob"), b"bob")
        why = await self.refused(made, self.OPAQUE, BadCredentials, b"eve")
        self.assertEqual(why, "token-foreign-name")

    async def test_refused(self) -> None:
        for why, changes in (
            ("token-audience", {"aud": "web"}),
            ("token-issuer", {"iss": "https://evil.example"}),
            ("token-expired", {"exp": 1}),
            ("token-claim", {"email": 5}),
        ):
            self.provider.serve(now(active=True, **changes))
            made = self.introspect(":audience=popdrop")
            self.assertEqual(await self.refused(made, self.OPAQUE, BadCredentials), why)

    async def test_inactive(self) -> None:
        self.provider.serve({"active": False})
        why = await self.refused(self.made, self.OPAQUE, NoVerifierOfThisKind)
        self.assertEqual(why, "token-inactive")
        # That is not kept: a token may be told of before it works.
        self.provider.serve(now(active=True))
        self.assertEqual(await self.login(self.made, self.OPAQUE), b"bob@example.org")

    async def test_anothers_token_is_not_shown(self) -> None:
        await self.refused(self.made, good(iss="https://other.example"), NoVerifierOfThisKind)
        await self.refused(self.made, b"x" * (tokens.TOKEN_OCTETS + 1), BadCredentials)
        self.assertEqual(self.provider.requests, 0)
        self.assertEqual(await self.login(self.made, good()), b"bob@example.org")

    async def test_kept(self) -> None:
        await self.login(self.made, self.OPAQUE)
        self.provider.serve({"active": False})
        await self.login(self.made, self.OPAQUE)
        # The client's name is looked at all the same, and another token is another one.
        await self.refused(self.made, self.OPAQUE, BadCredentials, b"eve@example.org")
        self.assertEqual(self.provider.requests, 1)
        await self.refused(self.made, self.OPAQUE + b"x", NoVerifierOfThisKind)
        self.clock.offset = issuer.ANSWER_AGE + 1
        await self.refused(self.made, self.OPAQUE, NoVerifierOfThisKind)
        self.assertEqual(self.provider.requests, 3)

    async def test_kept_until_it_expires(self) -> None:
        end = int(time.time()) + 3
        self.provider.serve(now(active=True, exp=end))
        made = self.introspect(":leeway=0")
        moment = [float(end - 1)]
        made._now = lambda: moment[0]
        await self.login(made, self.OPAQUE)
        moment[0] = float(end)
        why = await self.refused(made, self.OPAQUE, BadCredentials)
        self.assertEqual((why, self.provider.requests), ("token-expired", 1))

    async def test_kept_in_bounds(self) -> None:
        self.patch(issuer, "ANSWERS", 2)
        for octets in (b"token1", b"token2", b"token3", b"token2", b"token1"):
            await self.login(self.made, octets)
        self.assertEqual(
            [form[b"token"][0] for form in self.provider.forms],
            [b"token1", b"token2", b"token3", b"token1"],
        )

    async def test_failures(self) -> None:
        for words, arrange in (
            ("status 401", lambda: self.provider.status(401)),
            ("status 302", lambda: self.provider.status(302, location="http://127.0.0.1/")),
            ("no introspection response", lambda: self.provider.serve(b"{}")),
            ("no introspection response", lambda: self.provider.serve(self.OPAQUE)),
            ("over 65536", lambda: self.provider.serve(b" " * 100_000)),
        ):
            arrange()
            self.assertIn(words, await self.refused(self.made, self.OPAQUE, TemporaryFailure))
        await self.provider.stop()
        await self.refused(self.made, self.OPAQUE, TemporaryFailure)

    async def test_answer_that_is_not_http(self) -> None:
        """Its text is in the library's exception; it is not in ours."""

        def answer(request: Any) -> Any:
            request.transport.write(self.OPAQUE + b" " + self.OPAQUE + b"\r\n\r\n")
            request.transport.loseConnection()
            return 1

        self.provider.answer = answer
        await self.refused(self.made, self.OPAQUE, TemporaryFailure)

    async def test_given_up(self) -> None:
        self.provider.hang()
        asking = self.made.requestAvatarId(Bearer(self.OPAQUE))
        while not self.provider.requests:
            await deferLater(reactor, 0.01)
        asking.cancel()
        await self.assertFailure(asking, CancelledError)
        while self.provider._site.protocols:
            await deferLater(reactor, 0.01)

    async def test_so_many_at_a_time(self) -> None:
        self.patch(issuer, "QUESTIONS", 2)
        made = self.introspect()
        self.provider.hang()
        many = [made.requestAvatarId(Bearer(b"token%d" % number)) for number in range(4)]
        while self.provider.requests < 2:
            await deferLater(reactor, 0.01)
        self.provider.serve(now(active=True))
        for one in many[:3]:  # the third waits and is given up, too
            one.cancel()
            await self.assertFailure(one, CancelledError)
        self.assertEqual(await many[3], b"bob@example.org")
        asked = [form[b"token"][0] for form in self.provider.forms]
        # The first two came at the same time, over connections of their own.
        self.assertEqual([*sorted(asked[:2]), *asked[2:]], [b"token0", b"token1", b"token3"])


class SpecTests(SynchronousTestCase):
    """The string."""

    def setUp(self) -> None:
        self.folder = Folder(self)
        self.keys = self.folder.file("keys.pem", pem(private("ES256")))
        self.secret = self.folder.file("secret", b"secret")

    def made(self, text: str) -> OidcChecker:
        return from_spec(text, reactor, Hops())  # type: ignore[arg-type]

    def fault(self, text: str) -> str:
        error = self.assertRaises(ConfigError, self.made, text)
        self.assertNotIn("\n", str(error))
        self.assertTrue(str(error).startswith("--auth oidc:"), error)
        return str(error)

    def test_words(self) -> None:
        made = self.made(
            f"oidc:https://id.example.org:8443/r:keys={self.keys}:audience=api://mail,popdrop"
            ":claim=https://example.org/name:domain=@example.org:scope=pop mail:leeway=5"
            ":algorithms=RS256,ES256"
        )
        self.assertEqual(
            made._rules,
            tokens.Rules(
                "https://id.example.org:8443/r",
                frozenset({"api://mail", "popdrop"}),
                "https://example.org/name",
                "example.org",
                frozenset({"pop", "mail"}),
                frozenset({"RS256", "ES256"}),
                5.0,
            ),
        )

    def test_defaults(self) -> None:
        made = self.made(f"oidc:{ISSUER}:keys={self.keys}:audience=popdrop")
        self.assertEqual(made._rules, tokens.Rules(ISSUER, frozenset({"popdrop"})))
        self.assertEqual((made._rules.claim, made._rules.leeway), ("email", 60.0))

    def test_urls(self) -> None:
        for written, url in (
            ("https://id.example.org", "https://id.example.org"),
            ("https\\://id.example.org", "https://id.example.org"),
            ("https\\://id.example.org\\:8443/x", "https://id.example.org:8443/x"),
            ("https://id.example.org:8443", "https://id.example.org:8443"),
            ("http://127.0.0.1:80/keys", "http://127.0.0.1:80/keys"),
            ("http://[::1]:8080/keys?a=b", "http://[::1]:8080/keys?a=b"),
            ("http://localhost/a=b", "http://localhost/a=b"),
        ):
            made = self.made(f"oidc:{ISSUER}:jwks={written}:audience=popdrop")
            self.assertEqual(made._source._keys._url, url)  # type: ignore[union-attr]
            self.assertEqual(made._rules.issuer, ISSUER)

    def test_audience_is_needed(self) -> None:
        for source in (f"keys={self.keys}", "jwks=https://id.example.org/keys"):
            fault = self.fault(f"oidc:{ISSUER}:{source}")
            self.assertIn("any other service", fault)
        self.made(
            f"oidc:{ISSUER}:introspect=https://id.example.org/i:client-id=p"
            f":secret-file={self.secret}"
        )

    def test_faults(self) -> None:
        https = "https://id.example.org/x"
        pipe = str(self.folder.path / "pipe")
        os.mkfifo(pipe)
        ask = f"introspect={https}"
        for words, text in (
            ("name one issuer", ""),
            ("name one issuer", f"keys={self.keys}:audience=a"),
            ("name one issuer", f"{ISSUER}:more:keys={self.keys}:audience=a"),
            ("give one of", f"{ISSUER}:audience=a"),
            ("give one of", f"{ISSUER}:keys={self.keys}:jwks={https}:audience=a"),
            ("colour= is unknown", f"{ISSUER}:keys={self.keys}:audience=a:colour=red"),
            ("client-id= is not used with keys=", f"{ISSUER}:keys={self.keys}:client-id=a"),
            ("algorithms= is not used with", f"{ISSUER}:{ask}:algorithms=RS256"),
            ("audience= is empty", f"{ISSUER}:keys={self.keys}:audience="),
            ("audience= is missing", f"{ISSUER}:keys={self.keys}"),
            ("algorithms=HS256: not taken", f"{ISSUER}:keys=x:audience=a:algorithms=RS256,HS256"),
            ("algorithms=none: not taken", f"{ISSUER}:keys=x:audience=a:algorithms=none"),
            ("leeway= takes", f"{ISSUER}:keys=x:audience=a:leeway=601"),
            ("leeway= takes", f"{ISSUER}:keys=x:audience=a:leeway=-1"),
            ("use https", f"{ISSUER}:jwks=http://id.example.org/keys:audience=a"),
            ("use https", f"{ISSUER}:jwks=http://127.0.0.1.example.org/keys:audience=a"),
            ("use https", f"{ISSUER}:introspect=http://10.0.0.1/:audience=a"),
            ("user name", f"{ISSUER}:jwks=https\\://u@id.example.org/:audience=a"),
            ("not a URL", f"{ISSUER}:jwks=file\\:///etc/passwd:audience=a"),
            ("not a URL", f"{ISSUER}:jwks=keys.json:audience=a"),
            ("not a URL", f"{ISSUER}:jwks=https\\://id\\:x/:audience=a"),
            ("not a URL", f"{ISSUER}:jwks=https://id.example.org/a b:audience=a"),
            ("client-id=, too", f"{ISSUER}:{ask}:secret-file={self.secret}"),
            ("secret-file=, too", f"{ISSUER}:{ask}:client-id=p"),
            ("No such file", f"{ISSUER}:keys=/nonexistent:audience=a"),
            ("Is a directory", f"{ISSUER}:keys={self.folder.path}:audience=a"),
            ("not a regular file", f"{ISSUER}:keys={pipe}:audience=a"),
            ("neither", f"{ISSUER}:keys={self.secret}:audience=a"),
            ("No such file", f"{ISSUER}:jwks={https}:audience=a:ca=/nonexistent"),
            ("no certificate", f"{ISSUER}:jwks={https}:audience=a:ca={self.secret}"),
        ):
            self.assertIn(words, self.fault(f"oidc:{text}"))

    def test_secret_file(self) -> None:
        for words, octets, mode in (
            ("chmod 600", b"secret", 0o640),
            ("chmod 600", b"secret", 0o604),
            ("empty", b"", 0o600),
            ("empty", b"\nsecret", 0o600),
            ("over", b"s" * 100_000, 0o600),
        ):
            path = self.folder.file("bad", octets, mode)
            fault = self.fault(
                f"oidc:{ISSUER}:introspect=https://id.example.org/:client-id=p:secret-file={path}"
            )
            self.assertIn(words, fault)

    def test_damaged_authority(self) -> None:
        ca = self.folder.file("ca", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n")
        fault = self.fault(f"oidc:{ISSUER}:jwks=https://id.example.org/:audience=a:ca={ca}")
        self.assertIn("cannot be read", fault)

    def test_extra_is_missing(self) -> None:
        for module, source in (
            ("jwt", f"keys={self.keys}"),
            ("jwt", "jwks=https://id.example.org/"),
            ("treq.client", "jwks=https://id.example.org/"),
        ):
            with mock.patch.dict(sys.modules, {module: None}):
                fault = self.fault(f"oidc:{ISSUER}:{source}:audience=a")
            self.assertIn("pip install popdrop[oidc]", fault)
            self.assertIn(module.partition(".")[0], fault)

    def test_keywords_are_all(self) -> None:
        self.assertEqual(len(oidc.KEYWORDS), len(set(oidc.KEYWORDS)))


class ReferenceTests(SynchronousTestCase):
    """docs/reference/oidc.rst holds all there is."""

    def test_complete(self) -> None:
        page = (ROOT / "docs" / "reference" / "oidc.rst").read_text("utf-8")
        sources = "".join(Path(module.__file__).read_text() for module in (oidc, issuer, tokens))
        reasons = set(re.findall('"(token-[a-z-]+)"', sources))
        self.assertGreater(len(reasons), 15)
        for reason in reasons:
            self.assertIn(f"``{reason}``", page)
        self.assertEqual(set(re.findall("``(token-[a-z-]+)``", page)), reasons)
        for name in oidc.KEYWORDS:
            self.assertRegex(page, f"   \\* - ``{name}=")
        for name in tokens.ALGORITHMS:
            self.assertIn(name, page)


class ServiceTests(SynchronousTestCase):
    def test_option(self) -> None:
        folder = Folder(self)
        keys = folder.file("keys.pem", pem(private("ES256")))
        options = Options()
        options.parseOptions(
            [
                "--state-dir",
                str(folder.path / "state"),
                "--listen",
                "tcp:0:interface=127.0.0.1",
                "--auth",
                f"oidc:{ISSUER}:keys={keys}:audience=popdrop",
            ]
        )
        service = Popdrop(options, reactor)
        self.addCleanup(service.discard)
        (factory,) = service._factories
        self.assertIn(IBearerToken, factory.portal.listCredentialsInterfaces())

    def test_wrong_option(self) -> None:
        folder = Folder(self)
        options = Options()
        options.parseOptions(
            ["--state-dir", str(folder.path / "state"), "--auth", f"oidc:{ISSUER}:keys=/none"]
        )
        self.assertRaises(ConfigError, Popdrop, options, reactor)

    def test_nothing_is_imported_without(self) -> None:
        code = (
            "import sys, popdrop.tap\n"
            "print([name for name in ('jwt', 'treq', 'twisted.web.client') if name in sys.modules])"
        )
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        self.assertEqual(said.stdout, "[]\n")
