"""Each mechanism of AUTH by real clients, and by one of ours where there is none.

Clients with channel binding are rare: the -PLUS mechanisms are spoken by scramp over pyOpenSSL.
"""

from __future__ import annotations

import os
import socket
import time
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL, crypto
from twisted.trial.unittest import SynchronousTestCase

from tests.end_to_end.clients import (
    Fetchmail,
    Mpop,
    Site,
    Way,
    by_curl,
    made,
    private,
    spool_of,
)
from tests.end_to_end.harness import DEADLINE
from tests.scram import ALL, Client
from tests.test_tokens import ISSUER, jwk, jwks, said, signing, token

MAILS = tuple(made(f"mail-{n}", b"From %d\n.\n" % n * 5) for n in range(1, 4))
TEXTS = [mail.text for mail in MAILS]
SENT = [mail.sent for mail in MAILS]
WAYS_OF_TLS = ("none", "stls", "implicit")
LISTED = "SCRAM-SHA-256-PLUS,SCRAM-SHA-1-PLUS,SCRAM-SHA-256,SCRAM-SHA-1,CRAM-MD5,PLAIN,LOGIN"
TLS_1_2 = SSL.TLS1_2_VERSION


class Speaker:
    """A client over plain TCP, STLS or TLS that sends what it likes and knows its TLS."""

    def __init__(
        self,
        case: object,
        site: Site,
        tls: str = "none",
        version: int | None = None,
        certificate: trustme.LeafCert | None = None,
    ) -> None:
        here = ("127.0.0.1", site.port(Way("USER", tls)))
        self._socket = socket.create_connection(here, DEADLINE)
        case.addCleanup(self._socket.close)  # type: ignore[attr-defined]
        # pyOpenSSL needs a socket that blocks without a limit of Python's.
        self._socket.setblocking(True)
        self.tls: SSL.Connection | None = None
        self._buffer = b""
        if tls == "implicit":
            self.handshake(version, certificate)
        self.greeting = self.line()
        if tls == "stls":
            assert self.ask(b"STLS").startswith(b"+OK")
            self.handshake(version, certificate)

    def close(self) -> None:
        self._socket.close()

    def handshake(self, version: int | None, certificate: trustme.LeafCert | None) -> None:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        if version is not None:
            context.set_max_proto_version(version)
        if certificate is not None:
            key = certificate.private_key_pem.bytes()
            context.use_certificate(
                x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes())
            )
            context.use_privatekey(crypto.load_privatekey(crypto.FILETYPE_PEM, key))
        self.tls = SSL.Connection(context, self._socket)
        self.tls.set_connect_state()
        self.tls.do_handshake()

    def send(self, octets: bytes) -> None:
        (self.tls or self._socket).sendall(octets)

    def line(self) -> bytes:
        """The next line without its end, `b""` where the server has closed."""
        while b"\r\n" not in self._buffer:
            try:
                more = (self.tls or self._socket).recv(65536)
            except (SSL.ZeroReturnError, SSL.SysCallError):
                return b""
            if not more:
                return b""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def ask(self, line: bytes) -> bytes:
        self.send(line + b"\r\n")
        return self.line()

    def capa(self) -> list[bytes]:
        rows = [self.ask(b"CAPA")]
        while rows[-1] != b".":
            rows.append(self.line())
        return rows

    def mechanisms(self) -> list[str]:
        """Those of CAPA."""
        found = [row for row in self.capa() if row.startswith(b"SASL ")]
        return found[0].decode().split()[1:] if found else []

    def binding(self, name: str) -> tuple[str, bytes]:
        assert self.tls is not None
        if name == "tls-exporter":
            return name, self.tls.export_keying_material(b"EXPORTER-Channel-Binding", 32, b"")
        shown = self.tls.get_peer_certificate(as_cryptography=True)
        assert shown is not None and isinstance(shown.signature_hash_algorithm, hashes.SHA256)
        return name, shown.fingerprint(hashes.SHA256())

    def scram(
        self,
        mechanism: str,
        user: str,
        password: str,
        binding: tuple[str, bytes] | None = None,
    ) -> bytes:
        """A whole exchange, the server's own proof verified; the last reply."""
        client = Client(mechanism, user, password, binding)
        answer = self.ask(b"AUTH " + mechanism.encode() + b" " + b64encode(client.first()))
        if not answer.startswith(b"+ "):
            return answer
        answer = self.ask(b64encode(client.final(b64decode(answer[2:]))))
        if not answer.startswith(b"+ "):
            return answer
        client.finish(b64decode(answer[2:]))
        return self.ask(b"")


class MechanismCase(SynchronousTestCase):
    def serve(self, *options: str) -> Site:
        site = Site(self, *options)
        for name in ("bob", "alice"):
            site.folder.spool(name, spool_of(MAILS))
        return site


class RealClientTests(MechanismCase):
    def test_mpop(self) -> None:
        """GNU SASL's mechanisms, with TLS and without."""
        site = self.serve("--sasl", LISTED)
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-1", "CRAM-MD5", "PLAIN", "LOGIN", "APOP"):
            for tls in WAYS_OF_TLS:
                way = Way(mechanism, tls)
                found = Mpop(site, way, "mda", "keep on").fetch()
                self.assertEqual(found, TEXTS, way)
                site.logged_in_by(way)

    def test_mpop_chooses(self) -> None:
        """What it takes by itself from what CAPA tells of: the best it can do."""
        site = self.serve()
        for tls in ("stls", "implicit"):
            found = Mpop(site, Way("on", tls), "mda", "keep on").fetch()
            self.assertEqual(found, TEXTS, tls)
            site.server.wait_for(r'login user="bob" .*mechanism=(SCRAM-SHA-256|PLAIN) tls=TLS')

    def test_mpop_with_a_certificate(self) -> None:
        authority = trustme.CA()
        path = str(Path(self.mktemp()).absolute())
        authority.cert_pem.write_to_path(path)
        site = self.serve("--client-ca", path)
        issued = authority.issue_cert(common_name="bob")
        folder = site.new_folder()
        names = [
            private(folder / "cert", issued.cert_chain_pems[0].bytes().decode()),
            private(folder / "key", issued.private_key_pem.bytes().decode()),
        ]
        lines = [f"tls_cert_file {names[0]}", f"tls_key_file {names[1]}", "keep on"]
        for tls in ("stls", "implicit"):
            way = Way("EXTERNAL", tls)
            self.assertEqual(Mpop(site, way, "mda", *lines).fetch(), TEXTS, tls)
            site.logged_in_by(way)

    def test_curl(self) -> None:
        site = self.serve("--sasl", LISTED)
        for mechanism in ("CRAM-MD5", "PLAIN", "LOGIN", "APOP"):
            for tls in WAYS_OF_TLS:
                for options in ((), ("--sasl-ir",)):
                    way = Way(mechanism, tls)
                    self.assertEqual(by_curl(site, way, len(MAILS), *options), SENT, way)
                    site.logged_in_by(way)

    def test_fetchmail(self) -> None:
        site = self.serve("--sasl", LISTED)
        for mechanism, word in (("CRAM-MD5", "cram-md5"), ("USER", "password")):
            for tls in WAYS_OF_TLS:
                way = Way(mechanism, tls)
                client = Fetchmail(site, way, "keep fetchall", f"auth {word}")
                self.assertEqual(client.fetch(), TEXTS, way)
                site.logged_in_by(way)

    def test_clients_that_choose_cram_by_themselves(self) -> None:
        """curl and fetchmail, where CAPA does not tell of it: a password account gets its mail."""
        site = self.serve()
        for tls in WAYS_OF_TLS:
            way = Way("USER", tls)
            self.assertEqual(by_curl(site, way, len(MAILS)), SENT, way)
            site.logged_in_by(way, "PLAIN")
            self.assertEqual(Fetchmail(site, way, "keep fetchall").fetch(), TEXTS, way)
            site.logged_in_by(way)


@dataclass(frozen=True)
class TokenWay(Way):
    """By a bearer token."""

    token: str = ""

    @property
    def secret(self) -> str:
        return self.token


class TokenTests(MechanismCase):
    """OAUTHBEARER and XOAUTH2, with tokens that an issuer has signed."""

    def setUp(self) -> None:
        keys = Path(self.mktemp()).absolute()
        keys.write_bytes(jwks(jwk(signing("ES256"))))
        self.source = f"oidc:{ISSUER}:keys={keys}:audience=popdrop:claim=preferred_username"
        self.site = self.serve("--auth", self.source)
        moment = int(time.time())
        self.good = token(said(iat=moment - 10, exp=moment + 3600)).decode()
        self.old = token(said(iat=moment - 7200, exp=moment - 3600)).decode()

    def test_mpop(self) -> None:
        for mechanism in ("OAUTHBEARER", "XOAUTH2"):
            for tls in WAYS_OF_TLS:
                way = TokenWay(mechanism, tls, self.good)
                self.assertEqual(Mpop(self.site, way, "mda", "keep on").fetch(), TEXTS, way)
                self.site.logged_in_by(way)
            failure = self.assertRaises(
                AssertionError,
                Mpop(self.site, TokenWay(mechanism, "stls", self.old), "mda", "keep on").fetch,
            )
            self.assertIn("uthentication failed", str(failure))

    def test_curl(self) -> None:
        """It takes XOAUTH2 only where there is nothing better."""
        only = self.serve("--auth", self.source, "--sasl", "XOAUTH2")
        for mechanism, site in (("OAUTHBEARER", self.site), ("XOAUTH2", only)):
            for tls in WAYS_OF_TLS:
                for options in ((), ("--sasl-ir",)):
                    way = Way(mechanism, tls)
                    words = ("--oauth2-bearer", self.good, *options)
                    self.assertEqual(by_curl(site, way, len(MAILS), *words), SENT, way)
                    site.logged_in_by(way)

    def test_refused(self) -> None:
        """The challenge tells why, in JSON; the client's answer brings the reply."""
        for user, shown in (("bob", self.old), ("alice", self.good), ("bob", "forged")):
            speaker = Speaker(self, self.site, "stls")
            response = b64encode(f"n,a={user},\1auth=Bearer {shown}\1\1".encode())
            answer = speaker.ask(b"AUTH OAUTHBEARER " + response)
            self.assertEqual(b64decode(answer[2:]), b'{"status":"invalid_token"}')
            self.assertEqual(speaker.ask(b"AQ=="), b"-ERR [AUTH] Authentication failed.")
            self.assertTrue(speaker.ask(b"QUIT").startswith(b"+OK"))
        log = self.site.server.stop()
        for secret in (self.good, self.old, "forged"):
            self.assertNotIn(secret, log)


class BindingTests(MechanismCase):
    def test_scram(self) -> None:
        """All four by scramp; both bindings; TLS 1.2 has but one of them."""
        site = self.serve()
        for tls in WAYS_OF_TLS:
            for version in (None, TLS_1_2) if tls != "none" else (None,):
                for mechanism in ALL:
                    names: list[str | None] = [None]
                    if mechanism.endswith("-PLUS"):
                        names = ["tls-exporter", "tls-server-end-point"]
                    for name in names:
                        speaker = Speaker(self, site, tls, version)
                        if name is not None and tls == "none":
                            self.assertNotIn(mechanism, speaker.mechanisms())
                            continue
                        self.assertIn(mechanism, speaker.mechanisms())
                        bound = None if name is None else speaker.binding(name)
                        answer = speaker.scram(mechanism, "bob", "hunter2", bound)
                        good = not (version == TLS_1_2 and name == "tls-exporter")
                        expected = b"+OK bob has 3" if good else b"-ERR [AUTH]"
                        self.assertTrue(answer.startswith(expected), (mechanism, name, answer))
                        speaker.ask(b"QUIT")

    def test_another_channel(self) -> None:
        """A man in the middle hands the exchange on: his channel is not the client's."""
        site = self.serve()
        for name in ("tls-exporter", "tls-server-end-point"):
            middle, honest = Speaker(self, site, "implicit"), Speaker(self, site, "implicit")
            bound = honest.binding("tls-exporter") if name == "tls-exporter" else (name, b"x" * 32)
            answer = middle.scram("SCRAM-SHA-256-PLUS", "bob", "hunter2", bound)
            self.assertEqual(answer, b"-ERR [AUTH] Authentication failed.")
            site.server.wait_for('failure user="bob" .*reason=channel-binding')
        client = Client("SCRAM-SHA-256", "bob", "hunter2", ("tls-exporter", b"y" * 32))
        first = client.first()
        self.assertTrue(first.startswith(b"y,,"))
        answer = middle.ask(b"AUTH SCRAM-SHA-256 " + b64encode(first))
        self.assertEqual(answer, b"-ERR [AUTH] Authentication failed.")

    def test_wrong_and_unknown(self) -> None:
        site = self.serve()
        for user, password in (("bob", "wrong"), ("eve", "hunter2"), ("alice", "hunter2")):
            speaker = Speaker(self, site)
            for mechanism in ("SCRAM-SHA-1", "SCRAM-SHA-256"):
                answer = speaker.scram(mechanism, user, password)
                self.assertEqual(answer, b"-ERR [AUTH] Authentication failed.")


class CertificateTests(MechanismCase):
    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.path = str(Path(self.mktemp()).absolute())
        self.authority.cert_pem.write_to_path(self.path)
        self.site = self.serve("--client-ca", self.path)

    def test_offers(self) -> None:
        """Only where TLS has verified a certificate that names somebody (CVE-2019-3814)."""
        named = self.authority.issue_cert(common_name="bob")
        nameless = self.authority.issue_cert("www.example.org")
        for certificate, offered in ((named, True), (nameless, False), (None, False)):
            for tls in ("stls", "implicit"):
                speaker = Speaker(self, self.site, tls, certificate=certificate)
                self.assertEqual("EXTERNAL" in speaker.mechanisms(), offered)
                answer = speaker.ask(b"AUTH EXTERNAL " + b64encode(b"bob"))
                self.assertEqual(answer.startswith(b"+OK bob has 3"), offered, answer)
                if not offered:
                    # Asked for, not needed: everybody else logs in as ever.
                    answer = speaker.scram("SCRAM-SHA-256", "bob", "hunter2")
                    self.assertTrue(answer.startswith(b"+OK bob"), answer)
                speaker.ask(b"QUIT")
        self.assertNotIn("EXTERNAL", Speaker(self, self.site).mechanisms())

    def test_names(self) -> None:
        """The certificate's name alone decides; nobody may be somebody else."""
        for name, authzid, good in (
            ("bob", b"=", True),
            ("bob", b64encode(b"bob"), True),
            ("bob", b64encode(b"alice"), False),
            ("eve", b"=", False),
            ("BOB", b"=", False),
        ):
            issued = self.authority.issue_cert(common_name=name)
            speaker = Speaker(self, self.site, "implicit", certificate=issued)
            answer = speaker.ask(b"AUTH EXTERNAL " + authzid)
            expected = b"+OK bob has 3" if good else b"-ERR [AUTH] Authentication failed."
            self.assertTrue(answer.startswith(expected), (name, authzid, answer))
            speaker.ask(b"QUIT")

    def test_another_authority(self) -> None:
        """Its certificates end the handshake, whatever they say."""
        issued = trustme.CA().issue_cert(common_name="bob")
        with self.assertRaises(SSL.Error):
            speaker = Speaker(self, self.site, "implicit", TLS_1_2, issued)
            speaker.ask(b"AUTH EXTERNAL =")

    def test_a_changed_authority(self) -> None:
        """The file is read again; certificates of the old authority end the handshake then."""
        old, new = self.authority, trustme.CA()
        before = old.issue_cert(common_name="bob")
        speaker = Speaker(self, self.site, "implicit", certificate=before)
        self.assertTrue(speaker.ask(b"AUTH EXTERNAL =").startswith(b"+OK"))
        speaker.ask(b"QUIT")
        new.cert_pem.write_to_path(self.path)
        os.kill(self.site.server.process.pid, 1)
        self.site.server.wait_for("read .* again")
        speaker = Speaker(
            self, self.site, "implicit", certificate=new.issue_cert(common_name="bob")
        )
        self.assertTrue(speaker.ask(b"AUTH EXTERNAL =").startswith(b"+OK"))
        with self.assertRaises(SSL.Error):
            Speaker(self, self.site, "implicit", TLS_1_2, before).ask(b"CAPA")


class AttackTests(MechanismCase):
    def test_aborted_exchanges_leave_nothing(self) -> None:
        """CVE-2016-8652, a thousand times over: `*`, then gone, at each step."""
        site = self.serve("--throttle", "memory:total=50")
        descriptors = Path(f"/proc/{site.server.process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        for number in range(1000):
            speaker = Speaker(self, site)
            mechanism = ("SCRAM-SHA-256", "CRAM-MD5", "LOGIN", "PLAIN")[number % 4]
            client = Client(mechanism, "bob", "hunter2") if mechanism[:5] == "SCRAM" else None
            answer = speaker.ask(b"AUTH " + mechanism.encode())
            for _ in range(number // 4 % 3):
                if client is not None:
                    first = answer == b"+ "
                    words = client.first() if first else client.final(b64decode(answer[2:]))
                    answer = speaker.ask(b64encode(words))
                elif mechanism == "LOGIN" and answer == b"+ " + b64encode(b"Username:"):
                    answer = speaker.ask(b64encode(b"bob"))
            self.assertTrue(answer.startswith(b"+ "), answer)
            if number % 2:
                self.assertEqual(speaker.ask(b"*"), b"-ERR authentication cancelled")
            speaker.close()
        speaker = Speaker(self, site)
        self.assertTrue(speaker.scram("SCRAM-SHA-1", "bob", "hunter2").startswith(b"+OK bob"))
        self.assertTrue(speaker.ask(b"QUIT").startswith(b"+OK"))
        speaker.close()
        # A database and its spool stay open for the next one, in each of 4 and 16 threads.
        self.assertLess(len(list(descriptors.iterdir())), before + 50)
        self.assertNotIn("Traceback", site.server.stop())

    def test_bad_base64_fails_only_its_own(self) -> None:
        """CVE-2025-59028: nineteen other logins in progress are not disturbed."""
        site = self.serve()
        begun = []
        for _ in range(20):
            speaker, client = Speaker(self, site), Client("SCRAM-SHA-256", "bob", "hunter2")
            answer = speaker.ask(b"AUTH SCRAM-SHA-256 " + b64encode(client.first()))
            begun.append((speaker, client, answer))
        self.assertEqual(begun[7][0].ask(b"YQ==YQ=="), b"-ERR invalid base64")
        for number, (speaker, client, answer) in enumerate(begun):
            if number != 7:
                answer = speaker.ask(b64encode(client.final(b64decode(answer[2:]))))
                client.finish(b64decode(answer[2:]))
                self.assertTrue(speaker.ask(b"").startswith(b"+OK bob"))
                self.assertTrue(speaker.ask(b"QUIT").startswith(b"+OK"))
        answer = begun[7][0].scram("SCRAM-SHA-256", "bob", "hunter2")
        self.assertTrue(answer.startswith(b"+OK bob"))


class OfferTests(MechanismCase):
    def test_default(self) -> None:
        site = self.serve()
        plain = ["SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]
        self.assertEqual(Speaker(self, site).mechanisms(), plain)
        secured = Speaker(self, site, "stls").mechanisms()
        self.assertEqual(secured, ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS", *plain])

    def test_listed(self) -> None:
        site = self.serve("--sasl", "login,Scram-Sha-1,cram-md5", "--cleartext", "never")
        speaker = Speaker(self, site)
        self.assertEqual(speaker.mechanisms(), ["SCRAM-SHA-1", "CRAM-MD5"])
        self.assertTrue(speaker.ask(b"AUTH LOGIN").startswith(b"-ERR [AUTH]"))
        self.assertEqual(speaker.ask(b"AUTH PLAIN"), b"-ERR unsupported mechanism")

    def test_none(self) -> None:
        for options in (("--sasl", "none"), ("--apop-only",)):
            speaker = Speaker(self, self.serve(*options), "stls")
            self.assertEqual(speaker.mechanisms(), [])
            for mechanism in (*ALL, "PLAIN", "LOGIN", "CRAM-MD5", "EXTERNAL"):
                answer = speaker.ask(b"AUTH " + mechanism.encode())
                self.assertEqual(answer, b"-ERR unsupported mechanism")
