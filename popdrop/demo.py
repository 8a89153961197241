"""`--demo`: a throw-away maildrop with a handful of realistic mails."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from base64 import b64encode
from dataclasses import dataclass
from email.utils import formatdate
from time import asctime, gmtime
from typing import Final

from popdrop.accounts.database import AccountsDatabase
from popdrop.values import Secret

USER: Final = "demo"

_BODIES: Final[tuple[tuple[str, str, bytes], ...]] = (
    (
        "alice@example.org",
        "Subject: Lunch on Thursday\nContent-Type: text/plain; charset=us-ascii\n",
        b"Shall we meet at the old place at noon?\n\n-- \nAlice\n",
    ),
    (
        "list-owner@example.net",
        "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe_aus_K=C3=B6ln?=\nMIME-Version: 1.0\n"
        "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n",
        "Viele Grüße vom Rhein, auch an Zoë und Björn.\n".encode(),
    ),
    (
        "reports@example.com",
        "Subject: The figures, attached\nMIME-Version: 1.0\n"
        'Content-Type: multipart/mixed; boundary="=_figures"\n',
        b"--=_figures\nContent-Type: text/plain; charset=us-ascii\n\nAs promised.\n\n"
        b'--=_figures\nContent-Type: text/csv; name="figures.csv"\n'
        b"Content-Transfer-Encoding: base64\n"
        b'Content-Disposition: attachment; filename="figures.csv"\n\n'
        + b"\n".join(
            b64encode(b"".join(b"%d;%d\n" % (i, i * i) for i in range(j, j + 8)))
            for j in range(0, 64, 8)
        )
        + b"\n--=_figures--\n",
    ),
    (
        "carol@example.org",
        "Subject: A line with one dot\nContent-Type: text/plain; charset=us-ascii\n",
        b"A lone dot ends a message on the wire, unless the server takes care:\n.\n"
        b"If you can read this line, it did.\n",
    ),
    (
        "dave@example.org",
        "Subject: Quoted\nContent-Type: text/plain; charset=us-ascii\n",
        b"The next line begins with a word that separates mails in a spool.\n\n"
        b">From here on all is well.\n",
    ),
)


def write_spool(path: str, now: float) -> int:
    """Write an mboxrd spool, mode 0600, dated `now` (seconds since the epoch).

    Returns how many mails it holds.
    """
    parts = []
    for number, (sender, fields, body) in enumerate(_BODIES):
        when = now - 3600 * (len(_BODIES) - number)
        header = (
            f"From {sender} {asctime(gmtime(when))}\n"
            f"Received: from mail.example.org by localhost; {formatdate(when)}\n"
            f"From: <{sender}>\nTo: <{USER}@localhost>\nDate: {formatdate(when)}\n"
            f"Message-ID: <{number}.{int(when)}@demo.invalid>\n{fields}\n"
        )
        parts.append(header.encode("ascii") + body + b"\n")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as spool:
        spool.write(b"".join(parts))
    return len(_BODIES)


@dataclass(frozen=True)
class Demo:
    """A throw-away state folder with a spool and an account; `secret` is the account's."""

    folder: str
    secret: str
    count: int

    @classmethod
    def make(cls, now: float) -> Demo:
        """Make one, its mails dated `now` (seconds since the epoch)."""
        folder = tempfile.mkdtemp(prefix="popdrop-demo-")
        spools = os.path.join(folder, "mail")
        os.mkdir(spools, 0o700)
        count = write_spool(os.path.join(spools, USER), now)
        secret = secrets.token_hex(16)
        path = os.path.join(folder, "accounts.db")
        AccountsDatabase.create(path)
        database = AccountsDatabase(path)
        words = Secret(secret.encode("ascii"))
        database.add(USER.encode("ascii"), words, words)
        database.close()
        return cls(folder, secret, count)

    @property
    def store(self) -> str:
        """What `--store` would be given."""
        return "mbox:" + os.path.join(self.folder, "mail").replace(":", "\\:") + "/{user}"

    def words(self, port: int, tls_port: int, certificate: str) -> str:
        """Two commands to paste, and how other programs log in."""
        login = f"--login-options 'AUTH=+APOP' --user {USER}:{self.secret}"
        return (
            f"\nPopdrop serves {self.count} mails of {USER}, until you press Ctrl-C."
            " Try in another terminal:\n\n"
            f"  curl {login} pop3://127.0.0.1:{port}/1\n"
            f"  curl --cacert {certificate} {login} pop3s://127.0.0.1:{tls_port}/\n\n"
            f"In a mail program: user {USER}, the secret behind the colon, and APOP or SCRAM."
            " A plain\npassword is refused to an account that has an APOP secret.\n\n"
        )

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
