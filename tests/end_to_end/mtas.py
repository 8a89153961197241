"""Real MTAs and MDAs that deliver into one spool while POP3 sessions delete from it.

`test_mtas` runs short campaigns. A long one, which kills the server in QUIT again and again and
prints one line for each deliverer, its name, counts and violations:

    python -m tests.end_to_end.mtas --seconds 600 [NAME...]

Each mail has a number. At the end each number was either deleted by a QUIT, once, or is in the
spool, once, with the header and the body that were sent. A QUIT that was not answered has deleted
all that was marked or nothing. Run as root, the deliverers are another user than the server, and
the spool folder is as Debian's: 2775 root:mail.

Over 400 lines since the deliverers are of use here only.
"""

from __future__ import annotations

import argparse
import grp
import os
import poplib
import pwd
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import ClassVar, Final

from tests.end_to_end.harness import DEADLINE, Folder, Twistd

SECRET: Final = "a shared secret of theirs"
SENDER: Final = "alice@example.org"
AT_ONCE: Final = 4
"""Deliveries at the same time."""
UNPACKED: Final = "POPDROP_TEST_UNPACKED"
"""Names a folder in which packages are unpacked, each in a folder of its name."""


class Missing(Exception):
    """What is missing for a deliverer, in words for a skipped test."""


class Scope(ExitStack):
    """Stands in for a test case where there is none."""

    def addCleanup(self, call: Callable[..., object], *args: object) -> None:
        """As that of a test case."""
        self.callback(call, *args)


def find(package: str, path: str) -> Path:
    """A file of a Debian package that is unpacked or installed. Raises `Missing`."""
    roots = [Path("/")]
    if unpacked := os.environ.get(UNPACKED):
        roots.insert(0, Path(unpacked) / package)
    for root in roots:
        if (root / path).exists():
            return root / path
    raise Missing(f"needs Debian package {package}, installed or unpacked (CONTRIBUTING.md)")


# The mails


def header(number: int) -> bytes:
    """The header that the sender of mail `number` wrote."""
    return (
        b"From: <%b>\nSubject: mail %d\nMessage-ID: <%d@test.example.org>\n"
        b"Date: Sun, 22 Nov 2026 10:00:00 +0000\nTo: <bob@example.org>\n"
        % (SENDER.encode(), number, number)
    )


def body(number: int) -> bytes:
    """The body of mail `number`, LF line ends; no line that mboxo could not give back."""
    random = Random(number)
    words = [b"word", b".", b"..", b"From here", b" From there", b"", b"x" * 70, b"\xe4\xf6\xfc"]
    lines = random.choices(words, k=5000 if number % 10 == 0 else random.randrange(40))
    return b"".join(line + b"\n" for line in [*lines, b"end"])


def text(number: int) -> bytes:
    """Mail `number` as it is handed over."""
    return header(number) + b"\n" + body(number)


def with_from_line(number: int) -> bytes:
    """Mail `number` for deliverers that expect a From_ line."""
    return b"From %b Sun Nov 22 10:00:00 2026\n" % SENDER.encode() + text(number)


def number_in(octets: bytes) -> int:
    """Which mail has this header. Raises `ValueError`."""
    found = re.findall(rb"(?m)^Message-ID: <([0-9]+)@test\.example\.org>\n", octets)
    if len(found) != 1:
        raise ValueError(f"not one of our mails: {octets[:400]!r}")
    return int(found[0])


def damage(octets: bytes) -> str:
    """What is wrong with a mail, LF line ends, From_ quoting undone; nothing, when all is well."""
    head, _, rest = octets.partition(b"\n\n")
    try:
        number = number_in(head + b"\n")
    except ValueError as error:
        return str(error)
    if rest != body(number):
        return f"mail {number} has another body"
    lines = header(number).splitlines()
    theirs = [line for line in head.split(b"\n") if line in lines]
    return "" if sorted(theirs) == sorted(lines) else f"mail {number} has another header"


def in_spool(octets: bytes) -> list[bytes]:
    """The mails of a spool: all lines that begin with `From ` and a blank are From_ lines here."""
    if not octets:
        return []
    first, *mails = re.split(rb"(?m)^From .*\n", octets)
    if first:
        raise ValueError(f"the spool begins with {first[:200]!r}")
    return [re.sub(rb"(?m)^>From ", b"From ", mail.removesuffix(b"\n")) for mail in mails]


# Deliverers


class Site:
    """The spool and who owns it."""

    def __init__(self, scope: object) -> None:
        self.folder = Folder(scope)
        self.root = os.geteuid() == 0
        # Debian always has it; Postfix looks recipients up.
        account = pwd.getpwnam("backup") if self.root else pwd.getpwuid(os.getuid())
        self.user, self.uid = account.pw_name, account.pw_uid
        self.gid = grp.getgrnam("mail").gr_gid if self.root else account.pw_gid
        self.folder.add(self.user, apop=SECRET)
        self.spool = self.folder.spool(self.user, b"")
        self.home = self.folder.path / "deliverer"
        self.home.mkdir(mode=0o755)
        if self.root:
            self.folder.path.chmod(0o711)
            os.chown(self.folder.spools, 0, self.gid)
            self.folder.spools.chmod(0o2775)
            self.give(self.spool, self.home)
        self.spool.chmod(0o660)

    def give(self, *paths: Path) -> None:
        """Make the deliverer's user own these."""
        for path in paths:
            os.chown(path, self.uid, self.gid)

    def run(
        self, command: list[str], octets: bytes = b"", environment: dict[str, str] | None = None
    ) -> bytes:
        """Run a command as the deliverer's user; its output. Raises `AssertionError`."""
        done = subprocess.run(
            command,
            input=octets,
            cwd=self.home,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
            **({"user": self.uid, "group": self.gid, "extra_groups": []} if self.root else {}),
        )
        if done.returncode:
            raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stdout!r}")
        return done.stdout


class Deliverer:
    """One that has delivered when its program ends."""

    name: ClassVar[str]

    def __init__(self, scope: object, site: Site) -> None:
        """Raises `Missing`."""
        self.site = site
        self.waits = 0
        """How often a delivery had to be put off."""
        self.start(scope)

    def start(self, scope: object) -> None:
        """Write what it needs. Raises `Missing`."""
        raise NotImplementedError

    def deliver(self, number: int) -> None:
        """Hand a mail over, from any thread."""
        raise NotImplementedError

    def settle(self, count: int) -> None:
        """Wait until all `count` mails are in the spool. Raises `AssertionError`."""


class Dotlockfile(Deliverer):
    """A shell script whose only lock is liblockfile's."""

    name = "dotlockfile"

    def start(self, scope: object) -> None:
        """See the base class."""
        lock = f"{self.site.spool}.lock"
        program = find("liblockfile-bin", "usr/bin/dotlockfile")
        spool = self.site.spool
        script = f"{program} -l -p -r -1 -i 1 {lock} && cat >>{spool} && {program} -u {lock}"
        self._command = ["/bin/sh", "-c", script]

    def deliver(self, number: int) -> None:
        """See the base class."""
        quoted = re.sub(rb"(?m)^From ", b">From ", text(number))
        from_line = with_from_line(number).partition(b"\n")[0] + b"\n"
        self.site.run(self._command, from_line + quoted + b"\n")


class Procmail(Deliverer):
    """With a local lock file, as /var/mail is delivered to."""

    name = "procmail"

    def start(self, scope: object) -> None:
        """See the base class."""
        rules = self.site.home / "procmailrc"
        rules.write_text(
            f"SHELL=/bin/sh\nUMASK=077\nLOCKSLEEP=1\nDEFAULT={self.site.spool}\n:0:\n$DEFAULT\n"
        )
        self.site.give(rules)
        self._command = [str(find("procmail", "usr/bin/procmail")), "-m", str(rules)]

    def deliver(self, number: int) -> None:
        """See the base class."""
        self.site.run(self._command, with_from_line(number))


class Maildrop(Deliverer):
    """Courier's maildrop, from the package of its own."""

    name = "maildrop"

    def start(self, scope: object) -> None:
        """See the base class."""
        rules = self.site.home / "mailfilter"
        rules.write_text(f'LOCKSLEEP=1\nto "{self.site.spool}"\n')
        rules.chmod(0o600)
        self.site.give(rules)
        self._command = [str(find("maildrop", "usr/bin/maildrop")), "-f", SENDER, str(rules)]

    def deliver(self, number: int) -> None:
        """See the base class."""
        home = {"HOME": str(self.site.home), "LOGNAME": self.site.user}
        self.site.run(self._command, text(number), home)


class Exim(Deliverer):
    """The appendfile transport, with locks as shipped but for a shorter wait between tries.

    Exim gives up root's rights for a configuration of another place, so it runs as the user
    itself. The name of its own account is built in, and is made up here.
    """

    name = "exim"

    def start(self, scope: object) -> None:
        """See the base class."""
        home, site = self.site.home, self.site
        program = find("exim4-daemon-light", "usr/sbin/exim4")
        self._log = home / "spool" / "mainlog"
        self._log.parent.mkdir()
        configuration = home / "exim.conf"
        configuration.write_text(
            f"exim_path = {program}\nexim_user = {site.uid}\nexim_group = {site.gid}\n"
            f"keep_environment = LD_PRELOAD : ^NSS_WRAPPER_\ndeliver_drop_privilege = true\n"
            f"never_users =\nprimary_hostname = mta.example.org\nqualify_domain = example.org\n"
            f"local_interfaces =\nmessage_logs = false\n"
            f"spool_directory = {home}/spool\nlog_file_path = {home}/spool/%slog\n"
            f"begin routers\nspool:\n  driver = accept\n  transport = spool\n"
            f"begin transports\nspool:\n  driver = appendfile\n  file = {site.spool}\n"
            f"  mode = 0660\n  lock_interval = 1s\n"
            f"begin retry\n*  *  F,1d,1s\n"
        )
        for kind, entry in (("passwd", ":/:/bin/false"), ("group", "")):
            accounts = Path("/etc", kind).read_text()
            middle = f"{site.uid}:{site.gid}:" if kind == "passwd" else f"{site.gid}:"
            (home / kind).write_text(f"Debian-exim:x:{middle}{entry}\n{accounts}")
        site.give(configuration, self._log.parent, home / "passwd", home / "group")
        self._environment = {
            "LD_PRELOAD": "libnss_wrapper.so",
            "NSS_WRAPPER_PASSWD": str(home / "passwd"),
            "NSS_WRAPPER_GROUP": str(home / "group"),
        }
        self._command = [str(program), "-C", str(configuration)]
        if b"LD_PRELOAD" in site.run(["/bin/true"], b"", self._environment):
            raise Missing("needs Debian package libnss-wrapper")

    def _exim(self, *arguments: str, octets: bytes = b"") -> bytes:
        return self.site.run([*self._command, *arguments], octets, self._environment)

    def deliver(self, number: int) -> None:
        """See the base class."""
        self._exim("-odi", "-i", "-f", SENDER, f"{self.site.user}@example.org", octets=text(number))

    def settle(self, count: int) -> None:
        """See the base class."""
        end = time.monotonic() + DEADLINE
        while int(self._exim("-bpc")):
            if time.monotonic() > end:
                raise AssertionError(f"Exim cannot deliver:\n{self._log.read_text()}")
            self._exim("-qff")
        log = self._log.read_text()
        self.waits = len(re.findall(r"(?m)^\S+ \S+ \S+ == ", log))
        if re.search(r"(?m)^\S+ \S+ \S+ \*\* ", log) or log.count(" Completed\n") != count:
            raise AssertionError(f"Exim has not delivered {count}:\n{log}")


class Postfix(Deliverer):
    """local(8) under a master of its own: no network, no system log, no aliases.

    Locks as shipped. A mail that cannot be delivered is tried again after a second.
    """

    name = "postfix"

    def start(self, scope: object) -> None:
        """See the base class."""
        master = find("postfix", "usr/lib/postfix/sbin/master")
        if not self.site.root:
            raise Missing("Postfix needs root's rights")
        self._home = self.site.folder.path / "postfix"
        self._log = self._home / "log"
        self._accepted = 0
        package = master.parents[4]
        self._write(package)
        self._environment = {
            "PATH": "/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(package / "usr/lib/postfix"),
        }
        self._sendmail = [str(package / "usr/sbin/sendmail"), "-C", str(self._home / "conf")]
        self._master = subprocess.Popen(
            # It ends by itself when nobody is left to end it.
            [str(master), "-d", "-c", str(self._home / "conf"), "-e", "7200"],
            cwd=self._home,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self._home / "errors").open("wb"),
            start_new_session=True,
        )
        scope.addCleanup(self._stop)  # type: ignore[attr-defined]
        self._until(lambda: "daemon started" in self._said())

    def _write(self, package: Path) -> None:
        """`package` is the root of what it installs."""
        home, site = self._home, self.site
        # Two accounts of nobody's, which Debian always has: Postfix wants them to differ.
        owner, group = pwd.getpwnam("list"), grp.getgrnam("uucp")
        for name in ("", "conf", "data", "queue", "queue/pid"):
            (home / name).mkdir(mode=0o755)
        os.chown(home / "data", owner.pw_uid, -1)
        queues = "active bounce corrupt defer deferred flush hold incoming private saved trace"
        for name in queues.split():
            (home / "queue" / name).mkdir(mode=0o700)
            os.chown(home / "queue" / name, owner.pw_uid, -1)
        for name, mode in (("maildrop", 0o730), ("public", 0o710)):
            (home / "queue" / name).mkdir()
            os.chown(home / "queue" / name, owner.pw_uid, group.gr_gid)
            (home / "queue" / name).chmod(mode)
        (home / "conf/main.cf").write_text(
            f"compatibility_level = 3.6\nqueue_directory = {home}/queue\n"
            f"data_directory = {home}/data\nmeta_directory = {home}/conf\n"
            f"daemon_directory = {package}/usr/lib/postfix/sbin\n"
            f"command_directory = {package}/usr/sbin\n"
            f"shlib_directory = {package}/usr/lib/postfix\n"
            f"mail_owner = {owner.pw_name}\nsetgid_group = {group.gr_name}\n"
            "import_environment = MAIL_CONFIG MAIL_LOGTAG TZ LANG=C LD_LIBRARY_PATH"
            " POSTLOG_SERVICE POSTLOG_HOSTNAME\n"
            "export_environment = TZ MAIL_CONFIG LANG LD_LIBRARY_PATH\n"
            "myhostname = mta.example.org\nmydestination = example.org\n"
            "inet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nmynetworks = 127.0.0.1/32\n"
            "alias_maps =\nalias_database =\nforward_path =\nbiff = no\n"
            f"mail_spool_directory = {site.folder.spools}\nmailbox_size_limit = 0\n"
            f"maillog_file = {home}/log\nmaillog_file_prefixes = {home}\n"
            "queue_run_delay = 1s\nminimal_backoff_time = 1s\nmaximal_backoff_time = 1s\n"
            f"local_destination_concurrency_limit = {AT_ONCE}\n"
            f"initial_destination_concurrency = {AT_ONCE}\n"
        )
        (home / "conf/master.cf").write_text(
            "postlog unix-dgram n - n - 1 postlogd\n"
            "pickup unix n - n 60 1 pickup\n"
            "cleanup unix n - n - 0 cleanup\n"
            "qmgr unix n - n 300 1 qmgr\n"
            "rewrite unix - - n - - trivial-rewrite\n"
            "bounce unix - - n - 0 bounce\n"
            "defer unix - - n - 0 bounce\n"
            "trace unix - - n - 0 bounce\n"
            "local unix - n n - - local\n"
            "error unix - - n - - error\n"
            "retry unix - - n - - error\n"
        )

    def _said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def _until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not true():
            if self._master.poll() is not None or time.monotonic() > end:
                errors = (self._home / "errors").read_text()
                raise AssertionError(f"Postfix does not work: {errors}\n{self._said()}")
            time.sleep(0.02)

    def deliver(self, number: int) -> None:
        """See the base class."""
        subprocess.run(
            [*self._sendmail, "-i", "-f", SENDER, f"{self.site.user}@example.org"],
            input=text(number),
            env=self._environment,
            cwd=self._home,
            timeout=DEADLINE,
            check=True,
        )

    def settle(self, count: int) -> None:
        """See the base class."""

        def all_gone() -> bool:
            if "status=bounced" in self._said():
                raise AssertionError(f"Postfix gave a mail up:\n{self._said()}")
            return self._said().count(": removed\n") == count

        self._until(all_gone)
        self.waits = self._said().count("status=deferred")
        if self._said().count("status=sent") != count:
            raise AssertionError(f"Postfix has not delivered {count}:\n{self._said()}")

    def _stop(self) -> None:
        if self._master.poll() is None:
            self._master.terminate()
        self._master.wait(DEADLINE)
        end = time.monotonic() + DEADLINE
        while True:  # its children end by themselves
            try:
                os.killpg(self._master.pid, signal.SIGKILL if time.monotonic() > end else 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)


DELIVERERS: Final[dict[str, type[Deliverer]]] = {
    each.name: each for each in (Postfix, Exim, Procmail, Maildrop, Dotlockfile)
}


# The campaign


class Campaign:
    """Sessions, deliveries and kills on one spool, and the account of every mail."""

    def __init__(self, scope: object, kind: type[Deliverer], seed: int = 1) -> None:
        """Raises `Missing`."""
        self._scope = scope
        self._random = Random(f"{kind.name} {seed}")
        self._site = Site(scope)
        self._deliverer = kind(scope, self._site)
        self._server = Twistd(scope, self._site.folder)
        self._ordered = threading.Semaphore(0)
        self._next = 0
        self._ending = False
        self._guard = threading.Lock()
        self._delivered: set[int] = set()
        self._deleted: Counter[int] = Counter()
        self._unanswered: set[int] = set()
        self._answer_time = 0.02
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()

    # Deliveries

    def _work(self) -> None:
        while True:
            self._ordered.acquire()
            with self._guard:
                if self._ending:
                    return
                self._next += 1
                number = self._next
            try:
                self._deliverer.deliver(number)
            except (AssertionError, subprocess.SubprocessError) as error:
                self.violations.append(f"mail {number} was not taken: {error}")
            else:
                self._delivered.add(number)

    # Sessions

    def _kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self._server.kill()

    def _quit(self, client: poplib.POP3, kill: bool) -> bool:
        """Whether QUIT was answered with +OK."""
        begun = time.monotonic()
        client.sock.sendall(b"QUIT\r\n")  # type: ignore[attr-defined]
        if kill:
            self.counts["kills"] += 1
            self._kill_after(self._random.uniform(0, 1.2 * self._answer_time))
        try:
            answer = client.file.readline()  # type: ignore[attr-defined]
        except ConnectionError:
            answer = b""
        if not kill:
            self._answer_time += (time.monotonic() - begun - self._answer_time) / 4
        if answer.startswith(b"-ERR"):
            self.counts["refused"] += 1
        client.close()
        return bool(answer.startswith(b"+OK"))

    def _listing(self, client: poplib.POP3) -> dict[int, int]:
        """The place of each mail; what a QUIT without an answer has done is seen here."""
        places: dict[int, int] = {}
        for place in range(1, client.stat()[0] + 1):
            number = number_in(b"".join(line + b"\n" for line in client.top(place, 0)[1]))
            if number in places:
                self.violations.append(f"mail {number} is there twice")
            if self._deleted[number]:
                self.violations.append(f"mail {number} came back")
            places[number] = place
        there = self._unanswered & places.keys()
        if there and there != self._unanswered:
            self.violations.append(f"of {sorted(self._unanswered)} only {sorted(there)} are left")
        self._deleted.update(self._unanswered - there)
        self._unanswered.clear()
        return places

    def _session(self, kill: bool) -> None:
        random = self._random
        client = self._server.client()
        client.apop(self._site.user, SECRET)
        places = self._listing(client)
        chosen = random.sample(sorted(places), random.randint(min(1, len(places)), len(places)))
        for number in chosen:
            octets = b"".join(line + b"\n" for line in client.retr(places[number])[1])
            if wrong := damage(octets):
                self.violations.append(wrong)
            client.dele(places[number])
        self.counts["sessions"] += 1
        if self._quit(client, kill and bool(chosen)):
            self._deleted.update(chosen)
        else:
            self._unanswered = set(chosen)
            self.counts["unanswered"] += 1
        if self._server.process.poll() is not None:
            self._server = Twistd(self._scope, self._site.folder)

    def _breathe(self) -> None:
        """Deliverers that sleep between their tries would seldom meet a gap between sessions."""
        seen, end = len(self._delivered), time.monotonic() + 0.3
        while len(self._delivered) == seen and time.monotonic() < end:
            time.sleep(0.005)

    def _alternate(self, mails: int, kills: int, end: float) -> None:
        ordered = 0
        while ordered < mails or self.counts["kills"] < kills or time.monotonic() < end:
            # A few come during each session, however fast or slow it is.
            while ordered < self._next + self._random.randint(0, 2 * AT_ONCE):
                ordered += 1
                self._ordered.release()
            self._session(bool(kills) and self._random.random() < 0.4)
            self._breathe()
            if not self._deleted and self.counts["sessions"] > 50 * mails:
                raise AssertionError("nothing gets into the spool")
        while self._next < ordered:
            self._session(False)
            self._breathe()

    def run(self, mails: int, kills: int = 0, seconds: float = 0.0) -> None:
        """At least so many mails and kills, and for so long."""
        end = time.monotonic() + seconds
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(AT_ONCE)]
        for worker in workers:
            worker.start()
        try:
            self._alternate(mails, kills, end)
        finally:
            self._ending = True
            self._ordered.release(AT_ONCE)
            for worker in workers:
                worker.join(DEADLINE)
        if any(worker.is_alive() for worker in workers):
            raise AssertionError("a delivery hangs")
        self._deliverer.settle(len(self._delivered))
        self._account()

    def _account(self) -> None:
        """One session that deletes nothing, then look at what there is."""
        client = self._server.client()
        client.apop(self._site.user, SECRET)
        self._listing(client)
        client.quit()
        log = self._server.stop()
        if "Traceback" in log:
            self.violations.append(log)
        left: Counter[int] = Counter()
        for octets in in_spool(self._site.spool.read_bytes()):
            if wrong := damage(octets):
                self.violations.append(f"in the spool: {wrong}")
            else:
                left[number_in(octets)] += 1
        for number, count in sorted((self._deleted + left).items()):
            if count != 1 or number not in self._delivered:
                self.violations.append(
                    f"mail {number}: {self._deleted[number]} times deleted,"
                    f" {left[number]} times in the spool"
                )
        for number in sorted(self._delivered - (self._deleted + left).keys()):
            self.violations.append(f"mail {number} is lost")
        found = sorted(path.name for path in self._site.folder.spools.iterdir())
        if found != [self._site.user]:
            self.violations.append(f"left in the spool folder: {found}")
        self.counts["delivered"] = len(self._delivered)
        self.counts["deleted"] = self._deleted.total()

    def summary(self) -> str:
        """One line."""
        words = ("delivered", "sessions", "deleted", "kills", "unanswered", "refused")
        told = ", ".join(f"{self.counts[word]} {word}" for word in words)
        put_off = f"{self._deliverer.waits} deliveries put off"
        return f"{self._deliverer.name}: {told}, {put_off}, {len(self.violations)} violations"


def main(arguments: list[str]) -> int:
    """The long campaign; 1 if there was a violation, 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.mtas", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DELIVERERS))
    parser.add_argument("--seconds", type=float, default=600, help="in all (600)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    names = options.names or list(DELIVERERS)
    if unknown := set(names) - set(DELIVERERS):
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    status = 0
    # Or nobody would end the children.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in names:
        with Scope() as scope:
            try:
                campaign = Campaign(scope, DELIVERERS[name], options.seed)
            except Missing as missing:
                sys.stdout.write(f"{name}: {missing}\n")
                status = 1
                continue
            campaign.run(mails=1, kills=1, seconds=options.seconds / len(names))
            sys.stdout.write("\n".join([campaign.summary(), *campaign.violations]) + "\n")
            sys.stdout.flush()
            status |= bool(campaign.violations)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
