"""Real POP3 clients as children, and a corpus of mails that have harmed clients and servers.

Each client gives the mails it has stored as octets, without what it is documented to add. Over 400
lines since each client has its own configuration language.
"""

from __future__ import annotations

import fcntl
import os
import poplib
import re
import select
import shutil
import ssl
import struct
import subprocess
import termios
import time
from base64 import encodebytes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from twisted.trial.unittest import SkipTest

from popdrop import certs
from tests.end_to_end.harness import DEADLINE, Folder, Twistd

SECRET = "a shared secret of hers"
PASSWORD = "hunter2"
HEADER = b"From: <alice@example.org>\nTo: <bob@example.org>\nSubject: %s\nMessage-ID: <%s@x.test>\n"


@dataclass(frozen=True)
class Mail:
    """One mail: `text` is what clients are to store, with LF line ends.

    `crlf` says that it lies in the spool with CRLF, `spool_fields` are header fields that other
    programs have written into the spool, which are not sent.
    """

    name: bytes
    text: bytes
    crlf: bool = False
    spool_fields: bytes = b""

    @property
    def stored(self) -> bytes:
        """As a deliverer writes it: From_ line, quoted, without the separator behind it."""
        text = re.sub(rb"(?m)^(>*From )", rb">\1", self.text)
        head, empty, body = text.partition(b"\n\n")
        text = head + b"\n" + self.spool_fields + empty[1:] + body
        if self.crlf:
            text = text.replace(b"\n", b"\r\n")
        return b"From alice@example.org Sun Nov 22 10:00:00 2026\n" + text

    @property
    def longest_line(self) -> int:
        """In octets."""
        return max(map(len, self.text.split(b"\n")))

    @property
    def sent(self) -> bytes:
        """As it goes over the wire, un-stuffed: every line ends in CRLF."""
        return self.text.replace(b"\n", b"\r\n")


def made(name: str, body: bytes, crlf: bool = False, spool_fields: bytes = b"") -> Mail:
    """A mail named `name`, without an empty line where `body` is empty too."""
    word = name.encode()
    return Mail(word, HEADER % (word, word) + b"\n" + body, crlf, spool_fields)


def attachment(octets: int) -> bytes:
    """About so many octets of base64; the same ones each time."""
    return encodebytes(Random(octets).randbytes(octets * 3 // 4))


CORPUS = (
    made("plain", b"This is a mail.\n"),
    made("eightbit", bytes(range(0xA0, 0x100)) + b"\n" + "Grüße, Łódź, 東京\n".encode()),
    made("dots-first", b".\n..\n...\n.hidden\n. \nlast\n"),
    made("dots-last", b"text\n\n.\n.\n"),
    made("crlf", b"one\n.\n\ntwo\n", crlf=True),
    made("from", b"\nFrom here on:\n>From there\n>>From everywhere\n From \nfrom \nFrom:\n"),
    made("attachment", attachment(300_000)),
    made("empty", b""),
    made("empty-lines", b"\n\n\ntext\n\n\n"),
    made("long-lines", b"x" * 20_000 + b"\n" + b"." * 20_000 + b"\n" + b"y" * 8_191 + b"\nend\n"),
    made("blanks", b" \t \n\t.\n--\x20\ntext \t\n"),
    made("flags", b"This was read.\n", spool_fields=b"Status: RO\nX-Status: A\nX-UID: 12\n"),
    made("look-alike", b"Status: this is body\nContent-Length: 5\n\nFrom: <body@example.org>\n"),
    made("twin", b"There are two of me.\n"),
    made("twin", b"There are two of me.\n"),
    made("cut-off", b"The deliverer has not ended this line\n"),
)
"""The last one lies in the spool without its last line end."""

RAW_CORPUS = (
    made("nul", b"a\0b\0\0\n\0\n\0.\n.\0\n"),
    made("control", bytes(set(range(1, 32)) - {10, 13}) + b"\x7f\n"),
)
"""What only clients can store that do not take lines for C strings."""


def spool_of(mails: Iterable[Mail], cut_off: bool = False) -> bytes:
    """The spool that holds these, the last line end and separator missing if `cut_off`."""
    octets = b"".join(mail.stored + b"\n" for mail in mails)
    return octets[:-2] if cut_off else octets


@dataclass(frozen=True)
class Way:
    """A way to log in. `tls` is `none`, `stls` or `implicit`."""

    mechanism: str
    tls: str = "none"

    @property
    def user(self) -> str:
        return "alice" if self.mechanism in ("APOP", "CRAM-MD5") else "bob"

    @property
    def secret(self) -> str:
        return SECRET if self.user == "alice" else PASSWORD


WAYS = tuple(
    Way(mechanism, tls) for tls in ("none", "stls", "implicit") for mechanism in ("USER", "APOP")
)


class Site:
    """A server with a plain port, a TLS port, `bob` who has a password, `alice` who has APOP."""

    def __init__(self, case: object, *options: str) -> None:
        self.case = case
        self.folder = Folder(case)
        self.folder.add("bob", password=PASSWORD)
        self.folder.add("alice", apop=SECRET)
        self.certificate = certs.self_made(str(self.folder.state), "localhost")
        here = "0:interface=127.0.0.1"
        self.server = Twistd(
            case, self.folder, *options, listen=(f"tcp:{here}", f"tls:{self.certificate}:{here}")
        )
        self._folders = 0

    def port(self, way: Way) -> int:
        return self.server.ports[way.tls == "implicit"]

    def spool(self, way: Way) -> Path:
        return self.folder.spools / way.user

    def new_folder(self) -> Path:
        """An empty folder for one run of a client."""
        self._folders += 1
        path = self.folder.path / f"client-{self._folders}"
        path.mkdir(mode=0o700)
        return path

    def logged_in_by(self, way: Way, mechanism: str = "") -> None:
        """Wait until the server has logged a login of this way and no other."""
        found = self.server.wait_for(r'login user="(\w+)" .*mechanism=([\w-]+) tls=(\S+)')
        tls = "-" if way.tls == "none" else "TLSv1.3"
        expected = (way.user, mechanism or way.mechanism, tls)
        if found.groups() != expected:
            raise AssertionError(f"logged in by {found.groups()}, not {expected}")

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)


def need(command: str, package: str) -> str:
    """The command's path; skips the test where the Debian package is not installed."""
    path = shutil.which(command)
    if path is None:
        raise SkipTest(f"needs Debian package {package}")
    return path


def run(
    folder: Path, command: list[str], good: tuple[int, ...] = (0,), octets: bytes = b""
) -> bytes:
    """Run a client with a home of its own; its standard output. Another status is a failure."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(folder), "LC_ALL": "C"},
        input=octets,
        capture_output=True,
        timeout=DEADLINE,
    )
    if done.returncode not in good:
        raise AssertionError(
            f"{command} ended with {done.returncode}:\n{done.stdout!r}\n{done.stderr!r}"
        )
    return done.stdout


def private(path: Path, text: str, mode: int = 0o600) -> str:
    """Write a file that clients insist nobody else may read."""
    path.write_text(text)
    path.chmod(mode)
    return str(path)


# Python's poplib


def poplib_login(site: Site, way: Way) -> poplib.POP3:
    client: poplib.POP3
    if way.tls == "implicit":
        client = poplib.POP3_SSL(
            "localhost", site.port(way), context=site.trusting(), timeout=DEADLINE
        )
    else:
        client = poplib.POP3("localhost", site.port(way), timeout=DEADLINE)
    if way.tls == "stls":
        client.stls(site.trusting())
    if way.mechanism == "APOP":
        client.apop(way.user, way.secret)
    else:
        client.user(way.user)
        client.pass_(way.secret)
    return client


def by_poplib(site: Site, way: Way) -> list[bytes]:
    """All mails as sent, CRLF included. STAT and LIST have to agree with what came."""
    client = poplib_login(site, way)
    count, octets = client.stat()
    sizes = [int(row.split()[1]) for row in client.list()[1]]
    mails = [
        b"".join(line + b"\r\n" for line in client.retr(number + 1)[1]) for number in range(count)
    ]
    client.quit()
    if sizes != [len(mail) for mail in mails] or octets != sum(sizes):
        raise AssertionError(f"STAT {octets}, LIST {sizes}, RETR {[len(m) for m in mails]}")
    return mails


# curl


def _curl(site: Site, way: Way) -> list[str]:
    command = [need("curl", "curl"), "-q", "-sS", "--max-time", str(DEADLINE)]
    command += ["--user", f"{way.user}:{way.secret}", "--cacert", site.certificate]
    if way.mechanism == "APOP":
        command += ["--login-options", "AUTH=+APOP"]
    elif way.mechanism != "USER":
        command += ["--login-options", f"AUTH={way.mechanism}"]
    if way.tls == "stls":
        command.append("--ssl-reqd")
    return command


def _url(site: Site, way: Way) -> str:
    scheme = "pop3s" if way.tls == "implicit" else "pop3"
    return f"{scheme}://localhost:{site.port(way)}/"


def by_curl(site: Site, way: Way, count: int, *options: str) -> list[bytes]:
    """The first `count` mails as sent, in one session."""
    folder = site.new_folder()
    url = _url(site, way)
    command = [*_curl(site, way), *options]
    for number in range(1, count + 1):
        command += ["--output", str(folder / str(number)), url + str(number)]
    run(folder, command)
    return [(folder / str(number)).read_bytes() for number in range(1, count + 1)]


def curl_deletes(site: Site, way: Way, number: int) -> None:
    """Delete one mail, as curl's manual page does it."""
    command = [*_curl(site, way), "--request", f"DELE {number}", "--head"]
    run(site.new_folder(), [*command, _url(site, way)])


# fetchmail


class Fetchmail:
    """One fetchmail with its memory of what it has seen."""

    LONGEST_LINE = 8_000
    """In octets: 6.4 itself puts three wrong ones into lines that are longer than its buffer."""

    def __init__(self, site: Site, way: Way, options: str, server_options: str = "") -> None:
        self._command = need("fetchmail", "fetchmail")
        self._folder = folder = site.new_folder()
        self._inbox = folder / "inbox"
        self._inbox.mkdir()
        deliver = private(
            folder / "deliver",
            f'#!/bin/sh\nexec cat > "{self._inbox}/$(ls "{self._inbox}" | wc -l)"\n',
            0o700,
        )
        trust = f"sslcertck sslcertfile '{site.certificate}'"
        tls = {"none": "sslproto ''", "stls": "sslproto 'TLS1.2+'", "implicit": "ssl"}[way.tls]
        protocol = "APOP" if way.mechanism == "APOP" else "POP3"
        self._rc = private(
            folder / "rc",
            "set invisible\nset no bouncemail\n"
            f"poll localhost service {site.port(way)} protocol {protocol}"
            f" timeout {DEADLINE} {server_options}\n"
            f"  username '{way.user}' password '{way.secret}' no rewrite\n"
            f"  {tls} {'' if way.tls == 'none' else trust}\n"
            f"  mda '{deliver}' {options}\n",
        )

    def fetch(self) -> list[bytes]:
        """What comes in one run; status 1 says that there was no mail, 13 that not all came."""
        command = [self._command, "--fetchmailrc", self._rc, "--verbose", "--nosyslog"]
        command += ["--idfile", str(self._folder / "ids")]
        command += ["--pidfile", str(self._folder / "pid")]
        run(self._folder, command, good=(0, 1, 13))
        paths = sorted(self._inbox.iterdir(), key=lambda path: int(path.name))
        mails = [path.read_bytes() for path in paths]
        for path in paths:
            path.unlink()
        return mails


# mpop


class Mpop:
    """One mpop with its memory of what it has seen. `delivery` is `maildir`, `mbox` or `mda`."""

    def __init__(self, site: Site, way: Way, delivery: str, *lines: str) -> None:
        self._command = need("mpop", "mpop")
        self._folder = folder = site.new_folder()
        self._inbox = folder / "inbox"
        self._delivery = delivery
        argument = str(self._inbox)
        if delivery == "maildir":
            for name in ("", "new", "cur", "tmp"):
                (self._inbox / name).mkdir()
        elif delivery == "mda":
            self._inbox.mkdir()
            argument = private(
                folder / "deliver",
                f'#!/bin/sh\nexec cat > "{self._inbox}/$(ls "{self._inbox}" | wc -l)"\n',
                0o700,
            )
        self._rc = private(
            folder / "rc",
            "\n".join(
                [
                    "defaults",
                    "account site",
                    "host localhost",
                    f"port {site.port(way)}",
                    f"user {way.user}",
                    f"password {way.secret}",
                    f"auth {way.mechanism.lower()}",
                    f"tls {'off' if way.tls == 'none' else 'on'}",
                    f"tls_starttls {'on' if way.tls == 'stls' else 'off'}",
                    f"tls_trust_file {site.certificate}",
                    f"timeout {DEADLINE}",
                    "received_header off",
                    f"delivery {delivery} {argument}",
                    f"uidls_file {folder}/uidls",
                    *lines,
                    "",
                ]
            ),
        )

    def fetch(self) -> list[bytes]:
        """What comes in one run; in no certain order from a Maildir."""
        run(self._folder, [self._command, "--file", self._rc, "site"])
        if self._delivery == "mbox":
            octets = self._inbox.read_bytes() if self._inbox.exists() else b""
            self._inbox.unlink(missing_ok=True)
            return mbox_texts(octets)
        if self._delivery == "mda":
            paths = sorted(self._inbox.iterdir(), key=lambda path: int(path.name))
        else:  # names in a Maildir need not sort in the order of delivery
            paths = list((self._inbox / "new").iterdir())
        mails = [path.read_bytes() for path in paths]
        for path in paths:
            path.unlink()
        return mails


def mbox_texts(octets: bytes) -> list[bytes]:
    """The mails of an mboxrd file that another program wrote."""
    parts = re.split(rb"(?m)^From .*\n", octets)
    if parts.pop(0):
        raise AssertionError(f"begins without a From_ line: {octets[:100]!r}")
    return [re.sub(rb"(?m)^>(>*From )", rb"\1", part.removesuffix(b"\n")) for part in parts]


# mutt


def in_terminal(folder: Path, command: list[str]) -> bytes:
    """Run a full-screen program without anybody at its keyboard; what it has drawn."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(folder),
        "TERM": "vt100",
        "LC_ALL": "C.UTF-8",
    }
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    drawn = b""
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end:
            if not select.select([master], [], [], 1)[0]:
                continue
            try:
                drawn += os.read(master, 65536)
            except OSError:  # EIO: the program has closed its terminal
                break
        else:
            raise AssertionError(f"{command} waits for somebody: {drawn[-2000:]!r}")
        if child.wait(DEADLINE):
            raise AssertionError(f"{command} ended with {child.returncode}: {drawn[-2000:]!r}")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        os.close(master)
    return drawn


def mutt(site: Site, way: Way, keys: Callable[[Path], str]) -> list[bytes]:
    """Open the maildrop in mutt, press `keys`, and give what it copied to the folder they name."""
    command = need("mutt", "mutt")
    folder = site.new_folder()
    inbox = folder / "inbox"
    rc = private(
        folder / "rc",
        "\n".join(
            [
                f'set pop_pass="{way.secret}"',
                f'set pop_authenticators="{way.mechanism.lower()}"',
                f"set ssl_starttls={'yes' if way.tls == 'stls' else 'no'}",
                f"set ssl_force_tls={'no' if way.tls == 'none' else 'yes'}",
                f'set certificate_file="{site.certificate}"',
                "set mbox_type=Maildir delete=yes quit=yes confirmappend=no confirmcreate=no",
                "unset wait_key move mark_old beep resolve header_cache message_cachedir",
                "set pop_checkinterval=0 sleep_time=0 copy_decode_weed=no",
                # Its cursor goes back to the first mail after the first thing that is typed.
                f'push "1<enter>{keys(inbox)}"',
                "",
            ]
        ),
    )
    scheme = "pops" if way.tls == "implicit" else "pop"
    url = f"{scheme}://{way.user}@localhost:{site.port(way)}/"
    in_terminal(folder, [command, "-n", "-F", rc, "-f", url])
    paths = [path for name in ("new", "cur") for path in (inbox / name).glob("*")]
    # It writes its own Content-Length and Lines at the end of the header.
    added = re.compile(rb"\A((?:.+\n)*?)Content-Length: \d+\n(?:Lines: \d+\n)?\n")
    return [added.sub(rb"\1\n", path.read_bytes(), count=1) for path in paths]
