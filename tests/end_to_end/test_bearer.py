"""Tokens of an identity provider, shown by real clients to a real server."""

from __future__ import annotations

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.end_to_end.clients import Mpop, Site, Way, made, need, private, run, spool_of
from tests.end_to_end.harness import DEADLINE
from tests.test_tokens import ISSUER, jwk, jwks, said, token
from tests.test_tokens import private as private_key

MAILS = tuple(made(f"mail-{n}", b"Text %d\n.\n" % n) for n in range(1, 4))
TEXTS = [mail.text for mail in MAILS]
MECHANISMS = ("OAUTHBEARER", "XOAUTH2")


def fresh(seconds: int = 600, **changes: Any) -> str:
    """A token that expires so many seconds from now."""
    moment = int(time.time())
    return token(said(exp=moment + seconds, iat=moment - 700) | changes).decode()


class KeyServer(ThreadingHTTPServer):
    """Serves the keys, and counts."""

    daemon_threads = True

    def __init__(self, case: Any) -> None:
        outer = self
        self.count = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.count += 1
                octets = jwks(jwk(private_key("ES256")))
                self.send_response(200)
                self.send_header("Content-Length", str(len(octets)))
                self.end_headers()
                self.wfile.write(octets)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        case.addCleanup(thread.join)
        case.addCleanup(self.server_close)
        case.addCleanup(self.shutdown)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/keys"


class BearerTests(SynchronousTestCase):
    def site(self, source: str) -> Site:
        site = Site(self, "--auth", f"oidc:{ISSUER}:{source}:audience=popdrop:domain=example.org")
        site.folder.spool("bob", spool_of(MAILS))
        return site

    def keys(self) -> str:
        folder = Path(os.path.abspath(self.mktemp()))
        folder.mkdir()
        path = folder / "keys.json"
        path.write_bytes(jwks(jwk(private_key("ES256"))))
        return f"keys={path}"

    def mpop(self, site: Site, mechanism: str, octets: str, user: str = "bob") -> Mpop:
        show = private(site.new_folder() / "token", octets)
        client = Mpop(
            site,
            Way(mechanism, "implicit"),
            "mda",
            f"user {user}",
            "password",
            f'passwordeval "cat {show}"',
            "keep on",
        )
        return client

    def curl(self, site: Site, octets: str) -> bytes:
        command = [need("curl", "curl"), "-q", "-sS", "--max-time", str(DEADLINE)]
        command += ["--cacert", site.certificate, "--user", "bob:", "--oauth2-bearer", octets]
        port = site.port(Way("OAUTHBEARER", "implicit"))
        return run(site.new_folder(), [*command, f"pop3s://localhost:{port}/1"])

    def test_mpop(self) -> None:
        site = self.site(self.keys())
        for mechanism in MECHANISMS:
            self.assertEqual(self.mpop(site, mechanism, fresh()).fetch(), TEXTS)
            site.logged_in_by(Way(mechanism, "implicit"))

    def test_curl(self) -> None:
        site = self.site(self.keys())
        self.assertEqual(self.curl(site, fresh()), MAILS[0].sent)
        site.logged_in_by(Way("OAUTHBEARER", "implicit"))

    def test_fetched_keys(self) -> None:
        server = KeyServer(self)
        site = self.site(f"jwks={server.url}")
        for mechanism in MECHANISMS:
            self.assertEqual(self.mpop(site, mechanism, fresh()).fetch(), TEXTS)
        self.assertEqual(server.count, 1)

    def test_refused(self) -> None:
        """The log says why, the client is told nothing, and nobody writes the token down."""
        site = self.site(self.keys())
        seen = []
        for why, octets, user in (
            ("token-expired", fresh(-61), "bob"),
            ("token-audience", fresh(aud="web"), "bob"),
            ("token-foreign-name", fresh(), "alice"),
        ):
            for mechanism in MECHANISMS:
                failing = self.mpop(site, mechanism, octets, user)
                error = self.assertRaises(AssertionError, failing.fetch)
                self.assertNotIn(why, str(error))
                site.server.wait_for(f"reason={why}")
            seen.append(octets)
        log = site.server.stop()
        for piece in ".".join(seen).split("."):
            self.assertNotIn(piece, log)
