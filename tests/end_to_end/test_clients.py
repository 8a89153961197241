"""Real clients fetch and delete: what they store is the mail, what they leave is untouched."""

from __future__ import annotations

import os
import poplib
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.protocol import ClientCreator
from twisted.internet.ssl import Certificate, optionsForClientTLS
from twisted.mail.pop3 import AdvancedPOP3Client
from twisted.python.failure import Failure
from twisted.trial.unittest import SkipTest, SynchronousTestCase, TestCase

from tests.end_to_end.clients import (
    CORPUS,
    RAW_CORPUS,
    WAYS,
    Fetchmail,
    Mail,
    Mpop,
    Site,
    Way,
    by_curl,
    by_poplib,
    curl_deletes,
    made,
    mutt,
    need,
    poplib_login,
    spool_of,
)

TEXTS = [mail.text for mail in CORPUS]
USER, APOP = Way("USER"), Way("APOP")
FIVE = tuple(made(f"mail-{n}", b"From %d\n.\n" % n * 50, crlf=n == 4) for n in range(1, 6))


class ClientCase(SynchronousTestCase):
    """A site where `bob` and `alice` have the same spool."""

    maxDiff = 2000

    def serve(self, octets: bytes, *options: str) -> Site:
        site = Site(self, *options)
        self.octets = octets
        for name in ("bob", "alice"):
            site.folder.spool(name, octets)
        self.before = {way: os.stat(site.spool(way)) for way in (USER, APOP)}
        return site

    def serve_corpus(self) -> Site:
        return self.serve(spool_of(CORPUS, cut_off=True))

    def check(self, found: list[bytes], expected: list[bytes], about: object) -> None:
        """Equal, with a short word about the first difference."""
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            if one != other:
                place = next(
                    (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                    min(len(one), len(other)),
                )
                start = max(place - 40, 0)
                self.fail(
                    f"{about}: mail {number + 1} differs at octet {place}:"
                    f" {one[start : place + 40]!r} is not {other[start : place + 40]!r}"
                )
        self.assertEqual(len(found), len(expected), about)

    def untouched(self, site: Site) -> None:
        """Reading has changed no spool and left nothing behind."""
        self.left(site, USER, self.octets)
        self.left(site, APOP, self.octets)

    def left(self, site: Site, way: Way, octets: bytes) -> None:
        """The spool is the same file with the same mode, and holds exactly this."""
        after, before = os.stat(site.spool(way)), self.before[Way(way.mechanism)]
        self.check([site.spool(way).read_bytes()], [octets], "spool")
        self.assertEqual((after.st_ino, after.st_mode), (before.st_ino, before.st_mode))
        self.assertEqual(sorted(p.name for p in site.folder.spools.iterdir()), ["alice", "bob"])


class FetchTests(ClientCase):
    def test_poplib(self) -> None:
        self.patch(poplib, "_MAXLINE", 1 << 20)
        mails = (*RAW_CORPUS, *CORPUS)
        site = self.serve(spool_of(mails, cut_off=True))
        for way in WAYS:
            self.check(by_poplib(site, way), [mail.sent for mail in mails], way)
            site.logged_in_by(way)
        self.untouched(site)

    def test_curl(self) -> None:
        mails = (*RAW_CORPUS, *CORPUS)
        site = self.serve(spool_of(mails, cut_off=True))
        for way in WAYS:
            self.check(by_curl(site, way, len(mails)), [mail.sent for mail in mails], way)
            # curl says USER only to servers without SASL.
            site.logged_in_by(way, "APOP" if way.mechanism == "APOP" else "PLAIN")
        self.untouched(site)

    def test_fetchmail(self) -> None:
        mails = [mail for mail in CORPUS if mail.longest_line < Fetchmail.LONGEST_LINE]
        site = self.serve(spool_of(mails, cut_off=True))
        texts = [mail.text for mail in mails]
        for way in WAYS:
            if way == Way("APOP", "stls"):
                continue  # fetchmail never asks for TLS when it is told to use APOP
            self.check(Fetchmail(site, way, "keep fetchall").fetch(), texts, way)
            site.logged_in_by(way)
        self.untouched(site)

    def test_mpop(self) -> None:
        site = self.serve_corpus()
        plain = tuple(Way("PLAIN", tls) for tls in ("none", "stls", "implicit"))
        for way in (*WAYS, *plain):
            found = Mpop(site, way, "maildir", "keep on").fetch()
            self.check(sorted(found), sorted(TEXTS), way)
            site.logged_in_by(way)
        for delivery in ("mbox", "mda"):
            found = Mpop(site, APOP, delivery, "keep on").fetch()
            self.check(found, TEXTS, delivery)
        self.untouched(site)

    def test_mutt(self) -> None:
        site = self.serve_corpus()

        def keys(inbox: Path) -> str:
            copy = f"<tag-prefix><copy-message><kill-line>{inbox}<enter>"
            return f"<tag-pattern>~A<enter>{copy}<quit>"

        for way in WAYS:
            self.check(sorted(mutt(site, way, keys)), sorted(TEXTS), way)
        self.untouched(site)
        # It logs in several times each.
        log = site.server.stop()
        for way in WAYS:
            tls = "-" if way.tls == "none" else "TLSv1.3"
            words = rf'login user="{way.user}" .*mechanism={way.mechanism} tls={tls}'
            self.assertRegex(log, words)


class DeleteTests(ClientCase):
    """After each client exactly the mails it did not delete are left, octet for octet."""

    def rest(self, *numbers: int, mails: tuple[Mail, ...] = FIVE) -> bytes:
        return spool_of([mails[number - 1] for number in numbers])

    def test_poplib(self) -> None:
        site = self.serve(spool_of(FIVE))
        client = poplib_login(site, Way("APOP", "stls"))
        client.dele(2)
        client.dele(1)
        client.rset()
        client.dele(4)
        client.dele(2)
        client.quit()
        self.left(site, APOP, self.rest(1, 3, 5))
        self.left(site, USER, self.octets)

    def test_curl(self) -> None:
        site = self.serve(spool_of(FIVE))
        curl_deletes(site, USER, 5)
        curl_deletes(site, USER, 2)
        self.left(site, USER, self.rest(1, 3, 4))
        curl_deletes(site, USER, 1)
        self.left(site, USER, self.rest(3, 4))

    def test_fetchmail(self) -> None:
        """All, the first ones, and all but a large one in the middle."""
        texts = [mail.text for mail in FIVE]
        site = self.serve(spool_of(FIVE))
        client = Fetchmail(site, APOP, "fetchall no keep fetchlimit 2")
        self.check(client.fetch(), texts[:2], "fetchlimit")
        self.left(site, APOP, self.rest(3, 4, 5))
        client = Fetchmail(site, Way("USER", "stls"), "fetchall no keep")
        self.check(client.fetch(), texts, "no keep")
        self.left(site, USER, b"")
        self.assertEqual(client.fetch(), [])
        large = (*FIVE[:2], made("large", b"x\n" * 10_000), *FIVE[3:])
        site.spool(USER).write_bytes(spool_of(large))
        client = Fetchmail(site, USER, "fetchall no keep limit 10000")
        self.check(client.fetch(), texts[:2] + texts[3:], "limit")
        self.left(site, USER, self.rest(3, mails=large))

    def test_fetchmail_knows_what_it_has_seen(self) -> None:
        """It goes by the unique-ids: of mail it kept only the new one comes."""
        site = self.serve(spool_of(FIVE[:3]))
        client = Fetchmail(site, APOP, "keep", "uidl")
        self.check(client.fetch(), [mail.text for mail in FIVE[:3]], "first run")
        self.assertEqual(client.fetch(), [])
        # Another program deletes one, marks one as read, and a new one comes.
        read = Mail(FIVE[2].name, FIVE[2].text, spool_fields=b"Status: RO\n")
        site.spool(APOP).write_bytes(spool_of([FIVE[0], read, FIVE[4]]))
        self.check(client.fetch(), [FIVE[4].text], "third run")

    def test_mpop(self) -> None:
        texts = [mail.text for mail in FIVE]
        large = (*FIVE[:2], made("large", b"x\n" * 10_000), *FIVE[3:])
        site = self.serve(spool_of(large))
        client = Mpop(site, Way("APOP", "stls"), "mda", "keep off", "skipsize 10000")
        self.check(client.fetch(), texts[:2] + texts[3:], "skipsize")
        self.left(site, APOP, self.rest(3, mails=large))
        client = Mpop(site, USER, "mbox", "keep off")
        self.check(client.fetch(), [mail.text for mail in large], "keep off")
        self.left(site, USER, b"")

    def test_mpop_knows_what_it_has_seen(self) -> None:
        site = self.serve(spool_of(FIVE[:3]))
        client = Mpop(site, APOP, "mda", "keep on", "only_new on")
        self.check(client.fetch(), [mail.text for mail in FIVE[:3]], "first run")
        self.assertEqual(client.fetch(), [])
        read = Mail(FIVE[2].name, FIVE[2].text, spool_fields=b"Status: RO\n")
        site.spool(APOP).write_bytes(spool_of([FIVE[0], read, FIVE[4]]))
        self.check(client.fetch(), [FIVE[4].text], "third run")

    def test_mutt(self) -> None:
        site = self.serve(spool_of(FIVE))
        mutt(site, APOP, lambda inbox: "<delete-pattern>~s mail-[24]<enter><quit>")
        self.left(site, APOP, self.rest(1, 3, 5))


class TwistedClientTests(TestCase):
    """Twisted's own client, which goes by CAPA and by the challenge of the greeting."""

    class Client(AdvancedPOP3Client):
        MAX_LENGTH = 1 << 20

        def __init__(self) -> None:
            self.gone: Deferred[None] = Deferred()

        def connectionLost(self, reason: Failure) -> None:
            super().connectionLost(reason)
            self.gone.callback(None)

    def setUp(self) -> None:
        self.site = Site(self)
        for name in ("bob", "alice"):
            self.site.folder.spool(name, spool_of(CORPUS, cut_off=True))

    async def fetch(self, way: Way) -> list[bytes]:
        from twisted.internet import reactor

        creator = ClientCreator(reactor, self.Client)
        client = await creator.connectTCP("127.0.0.1", self.site.port(way))
        if way.tls == "stls":
            trust = Certificate.loadPEM(Path(self.site.certificate).read_bytes())
            await client.startTLS(optionsForClientTLS("localhost", trustRoot=trust))
        await client.login(way.user.encode(), way.secret.encode())
        sizes = await client.listSize()
        mails = [b"\n".join(await client.retrieve(number)) + b"\n" for number in range(len(sizes))]
        self.assertEqual(sizes, [len(mail.replace(b"\n", b"\r\n")) for mail in mails])
        await client.quit()
        await client.gone
        return mails

    async def test_fetch(self) -> None:
        for way in (Way("APOP"), Way("APOP", "stls")):
            self.assertEqual(await self.fetch(way), TEXTS)
            self.site.logged_in_by(way)


class SetUpTests(SynchronousTestCase):
    def test_a_missing_client_skips(self) -> None:
        failure = self.assertRaises(SkipTest, need, "no-such-client", "no-such-package")
        self.assertEqual(str(failure), "needs Debian package no-such-package")
