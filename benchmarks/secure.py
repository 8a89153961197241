"""The servers with a TLS port beside the plain one, and a certificate of a chosen sort of key."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers import Dovecot, DovecotTuned, Peer, Popdrop
from benchmarks.process import free_port, start

HERE = Path(__file__).resolve().parent.parent

KEYS = {
    "RSA-2048": ("rsa:2048",),
    "ECDSA P-256": ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
}
"""What `openssl req -newkey` is given, by name."""


class Secure(Peer):
    """Also listens on a TLS port, with a certificate of the sort of key that `sort` names."""

    sort = ""
    tls_port = 0

    @property
    def pem(self) -> Path:
        """Key and certificate."""
        return self.folder / "tls.pem"

    def prepare(self, users: Sequence[str]) -> None:
        self.tls_port = free_port()
        command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", "-days", "90"]
        certificate = Path(f"{self.pem}.crt")
        command += ["-newkey", *KEYS[self.sort], "-keyout", str(self.pem), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        self.pem.write_bytes(self.pem.read_bytes() + certificate.read_bytes())
        super().prepare(users)


class SecurePopdrop(Secure, Popdrop):
    """Popdrop with `--listen tls:`."""

    def prepare(self, users: Sequence[str]) -> None:
        super().prepare(users)
        listen = f"tls:{self.pem}:{self.tls_port}:interface=127.0.0.1"
        self.more_options = (*self.more_options, "--listen", listen)


class SecureDovecot(Secure, Dovecot):
    """Dovecot with Debian's settings of TLS: `ssl = yes`. It ends TLS in its login processes."""

    def prepare(self, users: Sequence[str]) -> None:
        self.tls = f"ssl = yes\nssl_cert = <{self.pem}\nssl_key = <{self.pem}\n"
        super().prepare(users)


class SecureDovecotTuned(SecureDovecot, DovecotTuned):
    """Its login process lives on, and so the tickets that it has given stay good."""


class SecureCanned(Secure):
    """Twisted's own TLS with ready-made answers: what no POP3 server in Twisted goes below."""

    key = "canned-twisted"
    title = "Canned Twisted"
    maildrops = False

    def spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.canned"]
        command += [str(self.port), str(self.tls_port), str(self.pem)]
        return start(command, self.core, log=self.log, cwd=HERE)

    def place(self, source: Path, user: str) -> None:
        pass

    def version(self) -> str:
        return f"Twisted {version('twisted')}"


SERVERS: dict[str, type[Secure]] = {
    kind.key: kind for kind in (SecurePopdrop, SecureDovecotTuned, SecureDovecot, SecureCanned)
}
"""By key."""
