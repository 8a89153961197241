"""Certificates from files, and TLS as clients meet it: on loopback, with Python's own client."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import stat
import warnings
from datetime import UTC, datetime, timedelta
from unittest import mock

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa, x25519
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.defer import inlineCallbacks
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from popdrop import certs
from popdrop.certs import Certificates, Keyring, self_made, tls_facts
from popdrop.errors import ConfigError
from popdrop.securing import TLSFactory
from popdrop.values import PeerFacts

AUTHORITY = trustme.CA()
TIMEOUT = 120


def chain_pem(issued: trustme.LeafCert) -> bytes:
    return b"".join(blob.bytes() for blob in issued.cert_chain_pems)


def certbot(folder: str, *names: str, **kwargs) -> trustme.LeafCert:
    """A certificate for `names` in certbot's layout."""
    os.makedirs(folder, exist_ok=True)
    issued = AUTHORITY.issue_cert(*names, **kwargs)
    write(os.path.join(folder, "fullchain.pem"), chain_pem(issued))
    write(os.path.join(folder, "privkey.pem"), issued.private_key_pem.bytes())
    return issued


def write(path: str, octets: bytes, mode: int = 0o600) -> str:
    with open(path, "wb") as file:
        file.write(octets)
    os.chmod(path, mode)
    return path


def client_context(**attributes) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


def names_of(certificates: Certificates, hostname: str) -> set[str]:
    """The names in the certificate that a client asking for `hostname` is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    client = shake(certificates, context, hostname)
    shown = x509.load_der_x509_certificate(client.getpeercert(binary_form=True))
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName))


def shake(certificates: Certificates, context: ssl.SSLContext, hostname: str) -> ssl.SSLObject:
    """A handshake in memory. Raises what the client raises."""
    server = certificates.serverConnectionForTLS(None)
    server.set_accept_state()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=hostname)
    while True:
        try:
            client.do_handshake()
            return client
        except ssl.SSLWantReadError:
            server.bio_write(outgoing.read())
        try:
            server.do_handshake()
        except (SSL.WantReadError, SSL.Error):
            pass
        incoming.write(server.bio_read(1 << 20))


class Link:
    """A handshake in memory to its end, with the tickets that come after it."""

    def __init__(
        self,
        certificates: Certificates,
        context: ssl.SSLContext,
        session: ssl.SSLSession | None = None,
        hostname: str | None = "a.example",
    ) -> None:
        self.server = certificates.serverConnectionForTLS(None)
        self.server.set_accept_state()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=hostname, session=session
        )
        for _ in range(4):
            with contextlib.suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
            self.pump()
            with contextlib.suppress(SSL.WantReadError):
                self.server.do_handshake()
            self.pump()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.client.read(1)

    def pump(self) -> None:
        """Carry to each side what the other has sent."""
        if octets := self._outgoing.read():
            self.server.bio_write(octets)
        with contextlib.suppress(SSL.WantReadError):
            self._incoming.write(self.server.bio_read(1 << 20))


class Clock:
    """The time of day, moved by a test."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **times: float) -> None:
        self.now += timedelta(**times)


class FileCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.makedirs(self.folder)

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def complaint(self, *args: object, **kwargs: object) -> str:
        with self.assertRaises(ConfigError) as caught:
            Certificates(*args, **kwargs)
        text = str(caught.exception)
        self.assertNotIn("\n", text)
        return text


class FileTests(FileCase):
    def test_interface(self) -> None:
        certbot(self.folder, "a.example")
        verifyObject(IOpenSSLServerConnectionCreator, Certificates(self.folder))

    def test_one_file_in_either_order(self) -> None:
        issued = AUTHORITY.issue_cert("a.example")
        key, chain = issued.private_key_pem.bytes(), chain_pem(issued)
        for octets in (key + chain, chain + key):
            path = write(self.path("one.pem"), octets)
            found = Certificates(path)
            self.assertEqual(names_of(found, "a.example"), {"a.example"})
            self.assertEqual(found.files, (path,))

    def test_a_pair_with_a_chain_is_sent_whole(self) -> None:
        middle = AUTHORITY.create_child_ca()
        issued = middle.issue_cert("a.example")
        leaf, *rest = [blob.bytes() for blob in issued.cert_chain_pems]
        files = (
            write(self.path("cert.pem"), leaf),
            write(self.path("key.pem"), issued.private_key_pem.bytes()),
            write(self.path("chain.pem"), b"".join(rest)),
        )
        found = Certificates(files[0], key=files[1], chain=files[2])
        self.assertEqual(set(found.files), set(files))
        shake(found, client_context(), "a.example")
        with self.assertRaises(ssl.SSLCertVerificationError):
            shake(Certificates(files[0], key=files[1]), client_context(), "a.example")

    def test_the_leaf_is_the_one_that_fits_the_key(self) -> None:
        issued = AUTHORITY.create_child_ca().issue_cert("a.example")
        backwards = b"".join(blob.bytes() for blob in reversed(issued.cert_chain_pems))
        path = write(self.path("one.pem"), issued.private_key_pem.bytes() + backwards)
        shake(Certificates(path), client_context(), "a.example")

    def test_folder_layouts(self) -> None:
        issued = certbot(self.path("certbot"), "a.example")
        os.makedirs(self.path("secret"))
        write(self.path("secret", "tls.crt"), chain_pem(issued))
        write(self.path("secret", "tls.key"), issued.private_key_pem.bytes())
        os.makedirs(self.path("pem"))
        write(self.path("pem", "x.pem"), issued.private_key_and_cert_chain_pem.bytes())
        write(self.path("pem", "ca.pem"), AUTHORITY.cert_pem.bytes())
        for name in ("certbot", "secret", "pem"):
            self.assertEqual(names_of(Certificates(self.path(name)), "x"), {"a.example"})

    def test_missing(self) -> None:
        text = self.complaint(self.path("none.pem"))
        self.assertIn(f"--starttls {self.path('none.pem')}: ", text)
        self.assertIn("name an existing one", text)

    def test_the_option_is_named(self) -> None:
        text = self.complaint(self.path("none.pem"), option="--listen tls:none.pem:995")
        self.assertTrue(text.startswith("--listen tls:none.pem:995: "), text)

    def test_half_of_a_pair(self) -> None:
        certbot(self.folder, "a.example")
        os.unlink(self.path("privkey.pem"))
        self.assertIn(self.path("privkey.pem"), self.complaint(self.folder))

    def test_not_readable(self) -> None:
        certbot(self.folder, "a.example")
        opened = open

        def refuse(path, *args, **kwargs):
            if str(path).endswith("privkey.pem"):
                raise PermissionError(13, "Permission denied")
            return opened(path, *args, **kwargs)

        with mock.patch("builtins.open", refuse):
            text = self.complaint(self.folder)
        self.assertIn(self.path("privkey.pem"), text)
        self.assertIn("chmod 0640", text)

    def test_key_of_another_certificate(self) -> None:
        certbot(self.folder, "a.example")
        other = AUTHORITY.issue_cert("a.example")
        write(self.path("privkey.pem"), other.private_key_pem.bytes())
        text = self.complaint(self.folder)
        self.assertIn("does not belong to", text)
        self.assertIn(self.path("fullchain.pem"), text)

    def test_empty_folder(self) -> None:
        self.assertIn("certbot", self.complaint(self.folder))

    def test_nothing_but_rubbish(self) -> None:
        issued = AUTHORITY.issue_cert("a.example")
        path = write(self.path("one.pem"), b"rubbish")
        self.assertIn("no readable certificate", self.complaint(path))
        write(path, chain_pem(issued))
        self.assertIn("no private key", self.complaint(path))
        key = issued.private_key_pem.bytes()
        write(path, chain_pem(issued) + key.replace(key[40:60], b"!" * 20))
        self.assertIn("damaged", self.complaint(path))
        write(path, chain_pem(issued).replace(b"MII", b"MIJ") + key)
        self.assertIn("no readable certificate", self.complaint(path))

    def test_key_with_a_password(self) -> None:
        issued = AUTHORITY.issue_cert("a.example")
        key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
        locked = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
        path = write(self.path("one.pem"), chain_pem(issued) + locked)
        self.assertIn("openssl pkey", self.complaint(path))

    def test_key_of_no_use(self) -> None:
        key = x25519.X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path = write(self.path("one.pem"), chain_pem(AUTHORITY.issue_cert("a.example")) + key)
        self.assertIn("of no use for TLS", self.complaint(path))

    def test_key_too_small_for_openssl(self) -> None:
        key = rsa.generate_private_key(65537, 1024)
        with mock.patch.object(certs.ec, "generate_private_key", lambda curve: key):
            octets = certs._make("a.example", datetime.now(UTC))
        text = self.complaint(write(self.path("small.pem"), octets))
        self.assertIn("key too small", text)
        self.assertIn(self.path("small.pem"), text)

    def test_expired_is_a_warning(self) -> None:
        past = datetime.now(UTC) - timedelta(days=1)
        certbot(self.folder, "a.example", not_after=past)
        with mock.patch.object(certs, "log") as log:
            found = Certificates(self.folder)
        self.assertEqual(log.warn.call_args.kwargs["path"], self.path("fullchain.pem"))
        self.assertEqual(names_of(found, "a.example"), {"a.example"})

    def test_a_key_that_everybody_may_read_is_a_warning(self) -> None:
        certbot(self.folder, "a.example")
        with mock.patch.object(certs, "log") as log:
            Certificates(self.folder)
            self.assertEqual(log.warn.call_count, 0)
            os.chmod(self.path("fullchain.pem"), 0o644)
            Certificates(self.folder)
            self.assertEqual(log.warn.call_count, 0)
            os.chmod(self.path("privkey.pem"), 0o644)
            Certificates(self.folder)
        self.assertEqual(log.warn.call_args.kwargs["path"], self.path("privkey.pem"))

    def test_a_keyring_reads_once(self) -> None:
        certbot(self.path("a"), "a.example")
        certbot(self.path("b"), "b.example")
        ring = Keyring()
        first = ring.get(self.path("a"), option="--starttls x")
        shutil.rmtree(self.path("a"))
        self.assertIs(ring.get(self.path("a"), option="--listen y"), first)
        self.assertIsNot(ring.get(self.path("b")), first)


class NameTests(FileCase):
    """RFC 6066 section 3, RFC 7817."""

    def test_by_name(self) -> None:
        certbot(self.path("a.example"), "a.example", "pop.a.example")
        certbot(self.path("b.example"), "b.example", "*.b.example")
        write(self.path("README"), b"as certbot leaves one")
        found = Certificates(self.folder)
        a, b = {"a.example", "pop.a.example"}, {"b.example", "*.b.example"}
        for name, expected in (
            ("a.example", a),
            ("pop.a.example", a),
            ("POP.A.Example", a),
            ("b.example", b),
            ("mail.b.example", b),
            ("deep.mail.b.example", a),
            ("unknown.example", a),
            ("127.0.0.1", a),
        ):
            self.assertEqual(names_of(found, name), expected, name)

    def test_without_a_name(self) -> None:
        certbot(self.path("a.example"), "a.example")
        certbot(self.path("b.example"), "b.example")
        context = client_context(check_hostname=False)
        shown = Link(Certificates(self.folder), context, hostname=None).client.getpeercert()
        self.assertEqual(shown["subjectAltName"], (("DNS", "a.example"),))

    def test_the_folder_itself_comes_first(self) -> None:
        certbot(self.path("a.example"), "a.example")
        certbot(self.folder, "z.example")
        self.assertEqual(names_of(Certificates(self.folder), "unknown"), {"z.example"})

    def test_of_several_for_one_name_the_one_that_lasts_longest(self) -> None:
        now = datetime.now(UTC)
        for folder, days in (("a-0001", 50), ("a-0002", 60), ("a-0003", 40)):
            certbot(self.path(folder), "a.example", f"{folder}.a", not_after=now + timedelta(days))
        self.assertEqual(
            names_of(Certificates(self.folder), "a.example"), {"a.example", "a-0002.a"}
        )

    def test_the_default_is_valid_if_there_is_a_valid_one(self) -> None:
        certbot(self.path("a"), "a.example", not_after=datetime.now(UTC) - timedelta(1))
        certbot(self.path("b"), "b.example")
        self.assertEqual(names_of(Certificates(self.folder), "unknown"), {"b.example"})


class RefreshTests(FileCase):
    """A renewed certificate is served without a restart (C-19: others served the expired one)."""

    def test_renewed(self) -> None:
        folder = os.path.join(self.folder, "live")
        certbot(folder, "old.example.org")
        keyring = Keyring()
        certificates = keyring.get(folder)
        self.assertEqual(names_of(certificates, "any"), {"old.example.org"})
        keyring.refresh()
        self.assertEqual(names_of(certificates, "any"), {"old.example.org"})
        certbot(folder, "new.example.org")
        keyring.refresh()
        self.assertEqual(names_of(certificates, "any"), {"new.example.org"})

    def test_another_name_in_a_folder(self) -> None:
        certbot(os.path.join(self.folder, "live", "a.example.org"), "a.example.org")
        certificates = Certificates(os.path.join(self.folder, "live"))
        certbot(os.path.join(self.folder, "live", "b.example.org"), "b.example.org")
        certificates.refresh()
        self.assertEqual(names_of(certificates, "b.example.org"), {"b.example.org"})

    def test_a_broken_pair_keeps_the_old_one(self) -> None:
        """With one line in the log, however often it is looked at."""
        folder = os.path.join(self.folder, "live")
        certbot(folder, "old.example.org")
        certificates = Certificates(folder)
        lines: list[str] = []
        self.patch(certs.log, "error", lambda text, **fields: lines.append(fields["error"]))
        write(os.path.join(folder, "privkey.pem"), b"half a k")
        for _ in range(3):
            certificates.refresh()
            self.assertEqual(names_of(certificates, "any"), {"old.example.org"})
        self.assertEqual(len(lines), 1)
        self.assertIn("privkey.pem", lines[0])
        certbot(folder, "new.example.org")
        certificates.refresh()
        self.assertEqual(names_of(certificates, "any"), {"new.example.org"})

    def test_links_of_certbot(self) -> None:
        """`live` holds links into `archive`, and a renewal sets them one by one."""
        live = self.path("live", "a.example")
        os.makedirs(live)
        for number in (1, 2):
            certbot(self.path("archive"), "a.example", f"{number}.a.example")
            for name in ("fullchain", "privkey"):
                kept = self.path("archive", f"{name}{number}.pem")
                os.rename(self.path("archive", f"{name}.pem"), kept)

        def link(name: str, number: int) -> None:
            fresh = os.path.join(live, "fresh")
            os.symlink(f"../../archive/{name}{number}.pem", fresh)
            os.rename(fresh, os.path.join(live, f"{name}.pem"))

        link("fullchain", 1)
        link("privkey", 1)
        found = Certificates(self.path("live"))
        self.assertEqual(names_of(found, "a.example"), {"a.example", "1.a.example"})
        self.patch(certs, "log", mock.Mock())
        link("privkey", 2)
        found.refresh()
        self.assertEqual(names_of(found, "a.example"), {"a.example", "1.a.example"})
        self.assertTrue(found.refused)
        link("fullchain", 2)
        found.refresh()
        self.assertEqual(names_of(found, "a.example"), {"a.example", "2.a.example"})
        self.assertFalse(found.refused)

    def test_a_folder_that_was_empty_when_it_was_seen(self) -> None:
        certbot(self.path("live", "a.example"), "a.example")
        os.makedirs(self.path("live", "b.example"))
        found = Certificates(self.path("live"))
        certbot(self.path("live", "b.example"), "b.example")
        found.refresh()
        self.assertEqual(names_of(found, "b.example"), {"b.example"})

    def test_a_change_while_the_files_are_read(self) -> None:
        """What was read is out of date at once, and the next look notices it."""
        certbot(self.folder, "old.example")
        context_of = Certificates._context_of

        def slowly(*args: object) -> SSL.Context:
            certbot(self.folder, "new.example")
            return context_of(*args)

        with mock.patch.object(Certificates, "_context_of", slowly):
            found = Certificates(self.folder)
        self.assertEqual(names_of(found, "any"), {"old.example"})
        found.refresh()
        self.assertEqual(names_of(found, "any"), {"new.example"})

    def test_unchanged_files_are_not_read(self) -> None:
        certbot(self.folder, "a.example")
        found = Certificates(self.folder)
        with mock.patch.object(Certificates, "_read") as read:
            found.refresh()
        self.assertEqual(read.call_count, 0)

    def test_a_broken_pair_is_told_of_once_a_day(self) -> None:
        certbot(self.folder, "a.example")
        clock = Clock()
        found = Certificates(self.folder, clock=clock)
        lines: list[str] = []
        self.patch(certs.log, "error", lambda text, **fields: lines.append(fields["error"]))
        whole = self.path("privkey.pem")
        os.rename(whole, self.path("aside"))
        for _ in range(3 * 24):
            found.refresh()
            clock.advance(hours=1)
        self.assertEqual(len(lines), 3)
        os.rename(self.path("aside"), whole)
        found.refresh()
        self.assertFalse(found.refused)
        os.unlink(whole)
        found.refresh()
        self.assertEqual(len(lines), 4)

    def test_a_session_goes_on(self) -> None:
        """With the context of its beginning, while the next is served with another."""
        certbot(self.folder, "old.example")
        found = Certificates(self.folder)
        link = Link(found, client_context(), hostname="old.example")
        certbot(self.folder, "new.example")
        found.refresh()
        self.assertEqual(names_of(found, "any"), {"new.example"})
        link.client.write(b"NOOP")
        link.pump()
        self.assertEqual(link.server.recv(10), b"NOOP")
        link.server.send(b"+OK")
        link.pump()
        self.assertEqual(link.client.read(10), b"+OK")


class AgeTests(FileCase):
    """A certificate that ends soon is a warning, and a figure."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.lines: list[str] = []
        self.patch(certs.log, "warn", self.warn)

    def warn(self, text: str, **fields: object) -> None:
        self.lines.append(text.format(**fields))

    def read(self, folder: str, days: float, life: float = 200) -> Certificates:
        ends = self.clock.now + timedelta(days)
        certbot(folder, "a.example", not_before=ends - timedelta(life), not_after=ends)
        return Certificates(folder, clock=self.clock)

    def test_21_days_before(self) -> None:
        found = self.read(self.folder, 21.5)
        found.refresh()
        self.assertEqual(self.lines, [])
        self.clock.advance(days=1)
        for _ in range(3):
            found.refresh()
        self.assertEqual(len(self.lines), 1)
        self.assertIn("ends in 20 days", self.lines[0])
        self.assertIn(self.path("fullchain.pem"), self.lines[0])
        self.clock.advance(days=1)
        for _ in range(3):
            found.refresh()
        self.assertEqual(len(self.lines), 2)
        self.clock.advance(days=20)
        found.refresh()
        self.assertEqual(len(self.lines), 3)
        self.assertIn("only: renew it", self.lines[2])

    def test_at_the_start(self) -> None:
        self.read(self.folder, 20)
        self.assertEqual(len(self.lines), 1)

    def test_a_renewed_one_is_quiet(self) -> None:
        found = self.read(self.folder, 10)
        self.read(self.folder, 90)
        self.lines.clear()
        self.clock.advance(days=2)
        found.refresh()
        self.assertEqual(self.lines, [])

    def test_short_lives(self) -> None:
        """For 45 days, renewed with 15 left: those of Let's Encrypt from 2028 on."""
        self.read(self.path("a"), 11, life=45)
        self.assertEqual(self.lines, [])
        self.read(self.path("b"), 10, life=45)
        self.assertEqual(len(self.lines), 1)

    def test_one_that_nobody_is_shown_may_end(self) -> None:
        for name, days in (("a.example", 5), ("a.example-0001", 80)):
            ends = self.clock.now + timedelta(days)
            certbot(self.path(name), "a.example", not_after=ends)
        first = self.path("0")
        certbot(first, "first.example")
        found = Certificates(self.folder, clock=self.clock)
        self.assertEqual(self.lines, [])
        left = {path: end - self.clock.now for path, end in found.ends.items()}
        days = {path: round(each / timedelta(1)) for path, each in left.items()}
        self.assertEqual(days[self.path("a.example-0001", "fullchain.pem")], 80)
        self.assertEqual(
            sorted(days),
            sorted(
                os.path.join(each, "fullchain.pem") for each in (self.path("a.example-0001"), first)
            ),
        )

    def test_figures(self) -> None:
        ring = Keyring()
        self.assertEqual(ring.ends(), {})
        for name, days in (("a", 50), ("b", 40), ("c", -1)):
            self.read(self.path(name), days)
            ring.get(self.path(name))
        now = datetime.now(UTC)
        found = {path: (end - now) / timedelta(1) for path, end in ring.ends().items()}
        wanted = {self.path(n, "fullchain.pem"): d for n, d in (("a", 50), ("b", 40), ("c", -1))}
        self.assertEqual({path: round(days) for path, days in found.items()}, wanted)
        self.assertEqual(ring.refused(), 0)
        self.patch(certs.log, "error", lambda text, **fields: None)
        write(self.path("b", "privkey.pem"), b"half a k")
        ring.refresh()
        self.assertEqual(ring.refused(), 1)


class TicketTests(FileCase):
    """Sessions are resumed by tickets (RFC 5077, RFC 8446 section 2.2)."""

    def setUp(self) -> None:
        super().setUp()
        certbot(self.folder, "a.example")
        self.clock = Clock()

    def resumed(self, found: Certificates, between, after: Certificates | None = None) -> set[bool]:
        """Whether sessions that began before `between` are resumed after it, in both versions."""
        seen = []
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context = client_context(maximum_version=version)
            first = Link(found, context).client
            self.assertFalse(first.session_reused)
            self.assertTrue(first.session.has_ticket)
            seen.append((context, first.session))
        between()
        return {
            Link(after or found, context, session).client.session_reused
            for context, session in seen
        }

    def test_over_a_renewal(self) -> None:
        found = Certificates(self.folder, clock=self.clock)
        self.assertEqual(self.resumed(found, lambda: None), {True})

        def renew() -> None:
            certbot(self.folder, "a.example", "new.example")
            self.clock.advance(hours=23)
            found.refresh()

        self.assertEqual(self.resumed(found, renew), {True})
        self.assertEqual(names_of(found, "any"), {"a.example", "new.example"})

    def test_the_keys_live_a_day(self) -> None:
        found = Certificates(self.folder, clock=self.clock)

        def wait() -> None:
            self.clock.advance(hours=24)
            found.refresh()

        self.assertEqual(self.resumed(found, wait), {False})
        self.assertEqual(self.resumed(found, lambda: None), {True})

    def test_not_over_a_change_of_the_client_authority(self) -> None:
        """A client that the new one did not sign must not come in by an old ticket."""
        path = write(self.path("ca.crt"), AUTHORITY.cert_pem.bytes())
        found = Certificates(self.folder, client_ca=path, clock=self.clock)

        def change() -> None:
            write(path, trustme.CA().cert_pem.bytes())
            found.refresh()

        self.assertEqual(self.resumed(found, lambda: None), {True})
        self.assertEqual(self.resumed(found, change), {False})

    def test_not_by_another_server(self) -> None:
        """Keys are made at the start and written nowhere."""
        found, other = Certificates(self.folder), Certificates(self.folder)
        self.assertEqual(self.resumed(found, lambda: None, other), {False})


class SelfMadeTests(FileCase):
    def certificate(self, path: str) -> x509.Certificate:
        with open(path, "rb") as file:
            return x509.load_pem_x509_certificate(file.read())

    def test_it_serves_its_names(self) -> None:
        path = self_made(self.folder, "mail.example")
        context = ssl.create_default_context(cafile=path)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        for name in ("mail.example", "localhost", "127.0.0.1", "::1"):
            shake(Certificates(path), context, name)
        with self.assertRaises(ssl.SSLCertVerificationError):
            shake(Certificates(path), context, "other.example")

    def test_private_and_alone(self) -> None:
        old = os.umask(0)
        try:
            path = self_made(self.folder, "mail.example")
        finally:
            os.umask(old)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(os.listdir(self.folder), [os.path.basename(path)])

    def test_p256_for_825_days(self) -> None:
        made = self.certificate(self_made(self.folder, "mail.example"))
        self.assertEqual(made.public_key().curve.name, "secp256r1")
        self.assertEqual(made.not_valid_after_utc - made.not_valid_before_utc, timedelta(825))

    def test_made_once(self) -> None:
        first = self.certificate(self_made(self.folder, "mail.example"))
        self.assertEqual(self.certificate(self_made(self.folder, "renamed.example")), first)

    def test_made_again_when_expired(self) -> None:
        long_ago = datetime.now(UTC) - timedelta(days=900)
        old = write(self.path(certs.SELF_MADE), certs._make("mail.example", long_ago))
        before = self.certificate(old)
        path = self_made(self.folder, "mail.example")
        self.assertEqual(path, old)
        self.assertGreater(self.certificate(path).not_valid_after_utc, datetime.now(UTC))
        self.assertNotEqual(self.certificate(path), before)
        self.assertEqual(os.listdir(self.folder), [os.path.basename(path)])

    def test_another_process_was_faster(self) -> None:
        make = certs._make

        def slowly(hostname: str, now: datetime) -> bytes:
            write(self.path(certs.SELF_MADE), make("theirs.example", now))
            return make(hostname, now)

        with mock.patch.object(certs, "_make", slowly):
            path = self_made(self.folder, "ours.example")
        self.assertEqual(names_of(Certificates(path), "x"), {"theirs.example", "localhost"})
        self.assertEqual(os.listdir(self.folder), [os.path.basename(path)])

    def test_odd_host_names(self) -> None:
        now = datetime.now(UTC)
        for hostname, expected in (
            ("localhost", ["localhost"]),
            ("", ["localhost"]),
            ("bücher.example", ["xn--bcher-kva.example", "localhost"]),
            ("a" * 63 + ".example", ["a" * 63 + ".example", "localhost"]),
            ("x" * 300, ["localhost"]),
            ("192.0.2.1", ["localhost"]),
        ):
            made = x509.load_pem_x509_certificate(certs._make(hostname, now))
            names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            self.assertEqual(names.get_values_for_type(x509.DNSName), expected)
        self.assertIn("192.0.2.1", map(str, names.get_values_for_type(x509.IPAddress)))

    def test_no_folder(self) -> None:
        with self.assertRaises(ConfigError) as caught:
            self_made(self.path("none"), "mail.example")
        self.assertIn("mode 0700", str(caught.exception))

    def test_a_damaged_one_is_not_overwritten(self) -> None:
        path = write(self.path(certs.SELF_MADE), b"rubbish")
        with self.assertRaises(ConfigError) as caught:
            self_made(self.folder, "mail.example")
        self.assertIn(path, str(caught.exception))
        with open(path, "rb") as file:
            self.assertEqual(file.read(), b"rubbish")


class RenegotiationTests(FileCase):
    def test_refused(self) -> None:
        """RFC 5746's hole and CVE-2011-1473: a TLS 1.2 client asks for a second handshake."""
        certbot(self.folder, "a.example")
        server = Certificates(self.folder).serverConnectionForTLS(None)
        server.set_accept_state()
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        client = SSL.Connection(context, None)
        client.set_connect_state()

        def step(act) -> None:
            try:
                act()
            except SSL.WantReadError:
                pass

        def pump() -> None:
            for source, target in ((client, server), (server, client)):
                try:
                    target.bio_write(source.bio_read(1 << 20))
                except SSL.WantReadError:
                    pass

        for _ in range(4):
            step(client.do_handshake)
            pump()
            step(server.do_handshake)
            pump()
        self.assertEqual(client.get_protocol_version_name(), "TLSv1.2")
        client.renegotiate()
        with self.assertRaises(SSL.Error) as caught:
            for _ in range(4):
                step(client.do_handshake)
                pump()
                step(lambda: server.recv(1))
                pump()
        self.assertIn("no renegotiation", str(caught.exception))


class Talker(Protocol):
    """Greets; starts TLS when told to; else says what TLS it is under."""

    def connectionMade(self) -> None:
        self.transport.write(b"+OK\r\n")

    def dataReceived(self, data: bytes) -> None:
        if data == b"STLS\r\n":
            self.transport.write(b"+OK begin\r\n")
            self.transport.startTLS(self.factory.certificates)
        else:
            facts = tls_facts(self.transport, PeerFacts())
            self.transport.write(f"{(facts.tls_version, facts.tls_cipher)}\r\n".encode())


class SocketCase(TestCase):
    """A real server; clients block, and so run in threads."""

    def setUp(self) -> None:
        self.folder = self.mktemp()
        certbot(os.path.join(self.folder, "a"), "a.example")
        certbot(os.path.join(self.folder, "b"), "b.example")
        certificates = Certificates(self.folder)
        factory = ServerFactory.forProtocol(Talker)
        factory.certificates = certificates
        wrapped = TLSFactory(certificates, factory, reactor)
        self.ports = []
        for each in (wrapped, factory):
            port = reactor.listenTCP(0, each, interface="127.0.0.1")
            self.addCleanup(port.stopListening)
            self.ports.append(port.getHost().port)

    def plain(self, port: int) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), TIMEOUT)

    def talk(self, context: ssl.SSLContext, name: str = "a.example", session=None):
        """(version, ALPN name, names in the certificate, answer, session, resumed)."""
        with (
            self.plain(self.ports[0]) as raw,
            context.wrap_socket(raw, server_hostname=name, session=session) as client,
        ):
            lines = client.makefile("rwb")
            self.assertEqual(lines.readline(), b"+OK\r\n")
            lines.write(b"NOOP\r\n")
            lines.flush()
            answer = lines.readline().decode()
            names = {value for _, value in client.getpeercert()["subjectAltName"]}
            return (
                client.version(),
                client.selected_alpn_protocol(),
                names,
                answer,
                client.session,
                client.session_reused,
            )


class VersionTests(SocketCase):
    @inlineCallbacks
    def test_13_and_12_and_their_facts(self):
        for version, name in (("TLSv1_3", "TLSv1.3"), ("TLSv1_2", "TLSv1.2")):
            context = client_context(maximum_version=ssl.TLSVersion[version])
            shown, _, _, answer, *_ = yield deferToThread(self.talk, context)
            self.assertEqual(shown, name)
            self.assertIn(name, answer)
            self.assertRegex(answer, "AES|CHACHA20")

    @inlineCallbacks
    def test_11_is_refused_by_an_alert(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context = client_context(
                minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1
            )
        context.set_ciphers("ALL:@SECLEVEL=0")
        with self.assertRaises(ssl.SSLError) as caught:
            yield deferToThread(self.talk, context)
        self.assertEqual(caught.exception.reason, "TLSV1_ALERT_PROTOCOL_VERSION")

    @inlineCallbacks
    def test_cbc_is_refused(self):
        context = client_context(maximum_version=ssl.TLSVersion.TLSv1_2)
        context.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-RSA-AES128-SHA256:AES128-SHA")
        with self.assertRaises(ssl.SSLError) as caught:
            yield deferToThread(self.talk, context)
        self.assertIn("HANDSHAKE_FAILURE", caught.exception.reason)

    @inlineCallbacks
    def test_the_order_is_the_servers(self):
        """With TLS 1.3 the quickest; with 1.2 it is the same whichever the client names first."""
        context = client_context(minimum_version=ssl.TLSVersion.TLSv1_3)
        first = context.get_ciphers()[0]["name"]
        self.assertEqual(first, "TLS_AES_256_GCM_SHA384")
        *_, answer, _, _ = yield deferToThread(self.talk, context)
        self.assertIn("TLS_AES_128_GCM_SHA256", answer)
        chosen = set()
        names = ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"]
        for order in (names, names[::-1]):
            context = client_context(maximum_version=ssl.TLSVersion.TLSv1_2)
            context.set_ciphers(":".join(order))
            *_, answer, _, _ = yield deferToThread(self.talk, context)
            chosen.add(answer)
        self.assertEqual(len(chosen), 1)

    @inlineCallbacks
    def test_sessions_are_resumed(self):
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context = client_context(maximum_version=version)
            *_, session, resumed = yield deferToThread(self.talk, context)
            self.assertFalse(resumed)
            self.assertTrue(session.has_ticket)
            *_, resumed = yield deferToThread(self.talk, context, "a.example", session)
            self.assertTrue(resumed)


class ALPNTests(SocketCase):
    """RFC 7301 section 3.2; the ALPACA attacks."""

    @inlineCallbacks
    def offer(self, *protocols: str, name: str = "a.example"):
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context = client_context(maximum_version=version)
            if protocols:
                context.set_alpn_protocols(protocols)
            _, chosen, *_ = yield deferToThread(self.talk, context, name)
        return chosen

    @inlineCallbacks
    def test_pop3_is_chosen(self):
        self.assertEqual((yield self.offer("pop3")), "pop3")
        self.assertEqual((yield self.offer("imap", "pop3", "http/1.1")), "pop3")
        self.assertEqual((yield self.offer("pop3", name="b.example")), "pop3")

    @inlineCallbacks
    def test_none_is_fine(self):
        self.assertIs((yield self.offer()), None)

    @inlineCallbacks
    def test_others_get_alert_120_and_do_no_harm(self):
        for name in ("a.example", "b.example"):
            for protocols in (("http/1.1",), ("imap", "smtp", "POP3", "pop3s")):
                with self.assertRaises(ssl.SSLError) as caught:
                    yield self.offer(*protocols, name=name)
                self.assertIn("alert no application protocol", str(caught.exception))
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual((yield self.offer("pop3")), "pop3")


class RobustnessTests(SocketCase):
    @inlineCallbacks
    def test_names(self):
        for name in ("a.example", "b.example"):
            _, _, names, *_ = yield deferToThread(self.talk, client_context(), name)
            self.assertEqual(names, {name})

    def shout(self, octets: bytes) -> bytes:
        """Everything the TLS port answers to this until it closes."""
        with self.plain(self.ports[0]) as raw:
            raw.sendall(octets)
            raw.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while part := raw.recv(4096):
                    answer += part
            except ConnectionResetError:
                pass
            return answer

    @inlineCallbacks
    def test_plain_text_on_the_tls_port_does_no_harm(self):
        for octets in (b"USER bob\r\nPASS x\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 70000, b""):
            answer = yield deferToThread(self.shout, octets)
            self.assertNotIn(b"+OK", answer)
        self.assertEqual(self.flushLoggedErrors(), [])
        yield deferToThread(self.talk, client_context())

    def stls(self) -> tuple[str, str]:
        with self.plain(self.ports[1]) as raw:
            lines = raw.makefile("rb")
            lines.readline()
            raw.sendall(b"NOOP\r\n")
            before = lines.readline().decode()
            raw.sendall(b"STLS\r\n")
            lines.readline()
            with client_context().wrap_socket(raw, server_hostname="b.example") as client:
                client.sendall(b"NOOP\r\n")
                return before, client.makefile("rb").readline().decode()

    @inlineCallbacks
    def test_start_tls_from_the_same_source(self):
        before, after = yield deferToThread(self.stls)
        self.assertEqual(before, "(None, None)\r\n")
        self.assertTrue(after.startswith("('TLSv1.3', 'TLS_"), after)

    def test_no_facts_before_the_handshake_and_without_handle(self) -> None:
        certbot(os.path.join(self.folder, "c"), "c.example")
        connection = Certificates(self.folder).serverConnectionForTLS(None)
        connection.set_accept_state()
        facts = PeerFacts("192.0.2.1")
        self.assertIs(tls_facts(mock.Mock(getHandle=lambda: connection), facts), facts)
        self.assertIs(tls_facts(object(), facts), facts)
