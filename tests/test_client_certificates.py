"""Client certificates and channel bindings, by handshakes in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto
from twisted.trial.unittest import SynchronousTestCase

from popdrop.certs import (
    END_POINT,
    EXPORTER,
    Bindings,
    Certificates,
    Keyring,
    certificate_name,
    tls_facts,
)
from popdrop.errors import ConfigError
from popdrop.values import PeerFacts

SERVERS = trustme.CA()
CLIENTS = trustme.CA()
ONE_TWO, ONE_THREE = SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION


def certificate(
    names: list[str] = [],  # noqa: B006
    emails: list[str] = [],  # noqa: B006
    hosts: list[str] = [],  # noqa: B006
    algorithm: Any = hashes.SHA256(),  # noqa: B008
) -> tuple[x509.Certificate, Any]:
    """Self-signed: a common name for each of `names`; `None` as algorithm makes it Ed25519."""
    key: Any = (
        ed25519.Ed25519PrivateKey.generate()
        if algorithm is None
        else ec.generate_private_key(ec.SECP256R1())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    alternatives: list[x509.GeneralName] = [x509.RFC822Name(email) for email in emails]
    alternatives += [x509.DNSName(host) for host in hosts]
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
    return builder.sign(key, algorithm), key


def pem(made: tuple[x509.Certificate, Any]) -> bytes:
    return made[0].public_bytes(serialization.Encoding.PEM) + made[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def step(act: Callable[[], object]) -> None:
    try:
        act()
    except SSL.WantReadError:
        pass


def hand_over(source: SSL.Connection, target: SSL.Connection) -> None:
    target.bio_write(source.bio_read(1 << 20))


class HandshakeCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.makedirs(self.folder)
        self.authority = self.write("clients.pem", CLIENTS.cert_pem.bytes())

    def write(self, name: str, octets: bytes) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(octets)
        os.chmod(path, 0o600)
        return path

    def server_pem(self, host: str = "a.example") -> str:
        issued = SERVERS.issue_cert(host)
        return self.write(f"{host}.pem", issued.private_key_and_cert_chain_pem.bytes())

    def shake(
        self,
        certificates: Certificates,
        version: int = ONE_THREE,
        own: trustme.LeafCert | None = None,
        host: bytes = b"a.example",
        session: Any = None,
        context: SSL.Context | None = None,
    ) -> tuple[SSL.Connection, SSL.Connection]:
        """Server and client after the handshake and one octet in each direction."""
        server = certificates.serverConnectionForTLS(None)  # type: ignore[arg-type]
        server.set_accept_state()
        if context is None:
            context = self.context(version, own)
        client = SSL.Connection(context, None)
        client.set_tlsext_host_name(host)
        if session is not None:
            client.set_session(session)
        client.set_connect_state()

        def pump() -> None:
            for source, target in ((client, server), (server, client)):
                step(
                    lambda source=source, target=target: target.bio_write(source.bio_read(1 << 20))
                )

        for _ in range(4):
            step(client.do_handshake)
            pump()
            step(server.do_handshake)
            pump()
        for source, target in ((client, server), (server, client)):
            source.send(b"x")
            pump()
            self.assertEqual(target.recv(9), b"x")
        return server, client

    def context(self, version: int, own: trustme.LeafCert | None) -> SSL.Context:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(version)
        if own is not None:
            context.use_certificate(x509.load_pem_x509_certificate(own.cert_chain_pems[0].bytes()))
            octets = own.private_key_pem.bytes()
            context.use_privatekey(crypto.load_privatekey(crypto.FILETYPE_PEM, octets))
        return context

    def facts(self, server: SSL.Connection) -> PeerFacts:
        return tls_facts(mock.Mock(getHandle=lambda: server), PeerFacts("192.0.2.1"))


class BindingTests(HandshakeCase):
    def test_both_sides_have_the_same(self) -> None:
        """RFC 9266, RFC 5929 section 4.1; another connection has another exporter."""
        found = Certificates(self.server_pem())
        exporters = set()
        for version in (ONE_THREE, ONE_TWO):
            for _ in range(2):
                server, client = self.shake(found, version)
                bindings = self.facts(server).bindings
                self.assertTrue(bindings)
                shown = client.get_peer_certificate(as_cryptography=True)
                assert shown is not None
                octets = shown.public_bytes(serialization.Encoding.DER)
                self.assertEqual(bindings[END_POINT], hashlib.sha256(octets).digest())
                exported = client.export_keying_material(b"EXPORTER-Channel-Binding", 32, b"")
                if version == ONE_THREE:
                    self.assertEqual(set(bindings), {EXPORTER, END_POINT})
                    self.assertEqual(bindings[EXPORTER], exported)
                    exporters.add(exported)
                else:
                    self.assertEqual(set(bindings), {END_POINT})
                    self.assertEqual(len(bindings), 1)
        self.assertEqual(len(exporters), 2)

    def test_unknown_names(self) -> None:
        server, _ = self.shake(Certificates(self.server_pem()))
        bindings = self.facts(server).bindings
        for name in ("tls-unique", "", "TLS-EXPORTER"):
            self.assertNotIn(name, bindings)

    def test_the_certificate_that_was_sent(self) -> None:
        """With several, the one that the client's name has chosen."""
        for host in ("a.example", "b.example"):
            os.makedirs(os.path.join(self.folder, "several"), exist_ok=True)
            issued = SERVERS.issue_cert(host)
            self.write(f"several/{host}.pem", issued.private_key_and_cert_chain_pem.bytes())
        found = Certificates(os.path.join(self.folder, "several"))
        seen = set()
        for host in (b"a.example", b"b.example"):
            server, client = self.shake(found, host=host)
            shown = client.get_peer_certificate(as_cryptography=True)
            assert shown is not None
            self.assertEqual(
                self.facts(server).bindings[END_POINT], shown.fingerprint(hashes.SHA256())
            )
            seen.add(self.facts(server).bindings[END_POINT])
        self.assertEqual(len(seen), 2)

    def test_hash_of_the_signature(self) -> None:
        """MD5 and SHA-1 count as SHA-256; Ed25519 has no hash of its own, so no binding."""
        for algorithm, name in (
            (hashes.SHA256(), "sha256"),
            (hashes.SHA384(), "sha384"),
            (hashes.SHA512(), "sha512"),
        ):
            made = certificate(["a.example"], hosts=["a.example"], algorithm=algorithm)
            server, _ = self.shake(Certificates(self.write("one.pem", pem(made))))
            octets = made[0].public_bytes(serialization.Encoding.DER)
            expected = hashlib.new(name, octets).digest()
            self.assertEqual(self.facts(server).bindings[END_POINT], expected)
        made = certificate(["a.example"], algorithm=None)
        connection = mock.Mock(get_certificate=lambda as_cryptography: made[0])
        self.assertEqual(list(Bindings(connection, "TLSv1.2")), [])
        self.assertFalse(Bindings(connection, "TLSv1.2"))
        for weak in (hashes.SHA1(), hashes.MD5()):
            old = mock.Mock(signature_hash_algorithm=weak, fingerprint=lambda by: by.name)
            connection = mock.Mock(get_certificate=lambda as_cryptography, old=old: old)
            self.assertEqual(Bindings(connection, "TLSv1.2")[END_POINT], "sha256")

    def test_nothing_is_computed_unasked(self) -> None:
        connection = mock.Mock()
        self.assertTrue(Bindings(connection, "TLSv1.3"))
        self.assertEqual(connection.mock_calls, [])


class ClientCertificateTests(HandshakeCase):
    def test_asked_for_and_not_needed(self) -> None:
        found = Certificates(self.server_pem(), client_ca=self.authority)
        own = CLIENTS.issue_cert(common_name="bob")
        for version in (ONE_THREE, ONE_TWO):
            server, client = self.shake(found, version, own)
            self.assertEqual(self.facts(server).certificate_name, "bob")
            asked = [name.organizationName for name in client.get_client_ca_list()]
            self.assertEqual(len(asked), 1)
            server, _ = self.shake(found, version)
            self.assertIsNone(self.facts(server).certificate_name)
            self.assertIsNotNone(self.facts(server).tls_version)

    def test_not_asked_for(self) -> None:
        own = CLIENTS.issue_cert(common_name="bob")
        server, client = self.shake(Certificates(self.server_pem()), own=own)
        self.assertIsNone(self.facts(server).certificate_name)
        self.assertEqual(client.get_client_ca_list(), [])

    def test_of_others(self) -> None:
        """Another authority, the one that signed our own certificate, nobody at all."""
        found = Certificates(self.server_pem(), client_ca=self.authority)
        for stranger in (trustme.CA(), SERVERS):
            own = stranger.issue_cert(common_name="bob")
            for version in (ONE_THREE, ONE_TWO):
                self.assertRaises(SSL.Error, self.shake, found, version, own)

    def test_expired(self) -> None:
        found = Certificates(self.server_pem(), client_ca=self.authority)
        yesterday = datetime.now(UTC) - timedelta(days=1)
        own = CLIENTS.issue_cert(common_name="bob", not_after=yesterday)
        self.assertRaises(SSL.Error, self.shake, found, ONE_TWO, own)

    def test_every_certificate_of_a_folder(self) -> None:
        """A name of SNI leads to another context; it asks and verifies as the first one."""
        os.makedirs(os.path.join(self.folder, "several"))
        for host in ("a.example", "b.example"):
            issued = SERVERS.issue_cert(host)
            self.write(f"several/{host}.pem", issued.private_key_and_cert_chain_pem.bytes())
        path = os.path.join(self.folder, "several")
        found = Keyring(self.authority).get(path, option="--starttls")
        for host in (b"a.example", b"b.example", b"c.example"):
            own = CLIENTS.issue_cert(common_name="bob")
            server, _ = self.shake(found, own=own, host=host)
            self.assertEqual(self.facts(server).certificate_name, "bob")
            stranger = SERVERS.issue_cert(common_name="bob")
            self.assertRaises(SSL.Error, self.shake, found, ONE_TWO, stranger, host)

    def test_resumed_sessions_keep_the_name(self) -> None:
        found = Certificates(self.server_pem(), client_ca=self.authority)
        for version in (ONE_THREE, ONE_TWO):
            context = self.context(version, CLIENTS.issue_cert(common_name="bob"))
            _, client = self.shake(found, context=context)
            server, client = self.shake(found, context=context, session=client.get_session())
            self.assertTrue(SSL._lib.SSL_session_reused(client._ssl))  # type: ignore[attr-defined]
            self.assertEqual(self.facts(server).certificate_name, "bob")

    def test_a_renewed_authority(self) -> None:
        """Read again like a certificate; tickets of the old one are worth nothing."""
        found = Certificates(self.server_pem(), client_ca=self.authority)
        self.assertIn(self.authority, found.files)
        context = self.context(ONE_TWO, CLIENTS.issue_cert(common_name="bob"))
        _, client = self.shake(found, context=context)
        renewed = trustme.CA()
        self.write("clients.pem", renewed.cert_pem.bytes())
        found.refresh()
        with self.assertRaises(SSL.Error):
            self.shake(found, context=context, session=client.get_session())
        own = renewed.issue_cert(common_name="bob")
        server, _ = self.shake(found, own=own)
        self.assertEqual(self.facts(server).certificate_name, "bob")
        self.write("clients.pem", b"nothing")
        found.refresh()
        server, _ = self.shake(found, own=own)
        self.assertEqual(self.facts(server).certificate_name, "bob")

    def test_complaints(self) -> None:
        for path, told in (
            (os.path.join(self.folder, "none.pem"), "there is no file"),
            (self.write("empty.pem", b"nothing"), "no readable certificate"),
        ):
            with self.assertRaises(ConfigError) as caught:
                Certificates(self.server_pem(), client_ca=path)
            self.assertIn(f"--client-ca {path}: ", str(caught.exception))
            self.assertIn(told, str(caught.exception))


class NameTests(SynchronousTestCase):
    def test_names(self) -> None:
        """One mail address, else one common name, that could be an account's (CVE-2019-3814)."""
        for names, emails, hosts, expected in (
            (["bob"], [], [], "bob"),
            (["bob"], ["carol@example.org"], [], "carol@example.org"),
            (["bob"], [], ["www.example.org"], "bob"),
            ([], ["carol@example.org"], ["www.example.org"], "carol@example.org"),
            (["b\u00f6b"], [], [], "b\u00f6b"),
            ([], [], [], None),
            ([], [], ["www.example.org"], None),
            (["bob", "alice"], [], [], None),
            (["bob"], ["carol@example.org", "dan@example.org"], [], None),
            (["../bob"], [], [], None),
            (["bob\0"], [], [], None),
            (["bob.lock"], [], [], None),
            (["bob\n"], [], [], None),
            (["x" * 64], [], [], "x" * 64),
            ([], ["x" * 60 + "@example.org"], [], None),
        ):
            made, _ = certificate(names, emails, hosts)
            self.assertEqual(certificate_name(made), expected, (names, emails, hosts))

    def test_unreadable(self) -> None:
        broken = mock.Mock()
        broken.extensions.get_extension_for_class.side_effect = ValueError("malformed")
        self.assertIsNone(certificate_name(broken))
