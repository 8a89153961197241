"""A spool, what a client deletes of it, and what may be there afterwards (I1 to I10)."""

from __future__ import annotations

import os
import poplib
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.strace import Strace
from tests.end_to_end.harness import Folder, Twistd, mail

SECRET = "a shared secret of his"
NAMES = ("bob", "carol")
MODE = 0o660

_KNOWN = re.compile(
    r"(locks|journal|index|journal\.key|journal\.folders|accounts\.db.*|self-made\.pem)\Z"
)
_REFUSED = re.compile(rb"-ERR \[(SYS/TEMP|SYS/PERM|IN-USE)\] (?!internal error)")


class Violation(AssertionError):
    """Mail was lost or doubled, a false answer was given, or something was left behind."""


class Stage(ExitStack):
    """Stands in for a test case outside of one."""

    addCleanup = ExitStack.callback


class Mail(NamedTuple):
    """`stored` with its From_ line and the empty line behind it, `sent` as lines of RETR."""

    stored: bytes
    sent: list[bytes]


def _plain(number: int, lines: int) -> Mail:
    stored = mail(number, b"%d %s\n" % (number, b"x" * 60) * lines)
    return Mail(stored, stored.split(b"\n")[1:-2])


def _marked(number: int) -> Mail:
    """With fields that mail readers write, which are not sent."""
    stored, sent = _plain(number, 2)
    return Mail(stored.replace(b"\nTo: ", b"\nStatus: RO\nX-UID: 7\nTo: "), sent)


def _odd(number: int) -> Mail:
    stored = mail(number, b".\n..\n>From here\nFrom there\n.end\n")
    head = stored.split(b"\n")[1:6]
    return Mail(stored, [*head, b".", b"..", b"From here", b"From there", b".end"])


def mails(lines: int) -> list[Mail]:
    """Seven; those with 0-based numbers 3 and 4 are equal to the octet."""
    twin = _plain(3, lines)
    return [
        _plain(0, lines),
        _marked(1),
        _odd(2),
        twin,
        twin,
        _plain(5, lines),
        _plain(6, lines),
    ]


@dataclass(frozen=True)
class Scene:
    """`deleted` are 0-based; `arrives` says when mail comes: "", "session" or "crash".

    `elsewhere`: no journal can be made beside the spool.
    """

    name: str
    deleted: tuple[int, ...]
    lines: int = 30
    arrives: str = ""
    elsewhere: bool = False

    @property
    def before(self) -> list[Mail]:
        return mails(self.lines)

    @property
    def octets(self) -> bytes:
        return b"".join(each.stored for each in self.before)


SCENES = (
    Scene("first", (0,), arrives="crash"),
    Scene("middle", (2, 3)),
    Scene("tail", (5, 6), arrives="crash"),
    Scene("tail, new mail", (5, 6), arrives="session"),
    Scene("all", (0, 1, 2, 3, 4, 5, 6)),
    Scene("all, mail later", (0, 1, 2, 3, 4, 5, 6), arrives="crash"),
    Scene("every second", (0, 2, 4, 6), arrives="crash"),
    Scene("large", (0, 5), lines=20_000),
    Scene("journal elsewhere", (1, 4), arrives="crash", elsewhere=True),
)


class Found(NamedTuple):
    """What a session saw: unique-ids, and messages as lines."""

    ids: list[bytes]
    texts: list[list[bytes]]


def look(client: poplib.POP3) -> Found:
    ids = [line.split()[1] for line in client.uidl()[1]]
    return Found(ids, [client.retr(number + 1)[1] for number in range(len(ids))])


def renumbered(ids: Sequence[bytes]) -> list[bytes]:
    """The ids after some messages are gone: copies are numbered anew (decision 14)."""
    seen: Counter[bytes] = Counter()
    result = []
    for each in ids:
        base = each.partition(b"-")[0]
        seen[base] += 1
        result.append(base if seen[base] == 1 else b"%s-%d" % (base, seen[base]))
    return result


class Steady(Twistd):
    """With one thread for the spools, however slow the machine is, and one heap.

    A call is known by its number in its thread, which must not depend on how many there are. And
    the C library reads /proc/sys/vm/overcommit_memory before it makes another heap smaller.
    """

    def begin(self, case: object, words: list[str], *others: Any, **options: Any) -> None:
        one = "from popdrop import threads; threads.PATIENCE = 1e6; "
        words = ["/usr/bin/env", "MALLOC_ARENA_MAX=1", *words[:2], one + words[2], *words[3:]]
        super().begin(case, words, *others, **options)


class Place:
    """The folders of one server, and bob's and carol's spools in them.

    `folders`: each user has a folder for his spool, so that a recovery waits for his login.
    """

    def __init__(self, case: object, folders: bool = False) -> None:
        self.case = case
        self.folders = folders
        self.folder = Folder(case)
        for name in NAMES:
            self.folder.add(name, apop=SECRET)
            self.home(name).mkdir(mode=0o700, exist_ok=True)
            self.spool(name).touch(MODE)
        self.spool("carol").write_bytes(mail(1) + mail(2))
        self.trace = self.folder.path / "trace"

    def home(self, name: str) -> Path:
        return self.folder.spools / name if self.folders else self.folder.spools

    def spool(self, name: str = "bob") -> Path:
        return self.home(name) / ("mbox" if self.folders else name)

    def serve(self, *options: str, preload: Path | None = None) -> Twistd:
        template = "{user}/mbox" if self.folders else "{user}"
        if not any(option.startswith("--store") for option in options):
            options = ("--store", f"mbox:{self.folder.spools}/{template}", *options)
        return Steady(self.case, self.folder, "--lock-timeout", "2", *options, preload=preload)

    def login(self, server: Twistd, name: str = "bob") -> poplib.POP3:
        client = server.client()
        self.case.addCleanup(client.close)  # type: ignore[attr-defined]
        client.apop(name, SECRET)
        return client

    def thread(self, server: Twistd) -> int:
        """The one that works on spools. It stays, since short work needs no more."""
        client = server.client()
        strace = Strace(self.trace, server.process.pid, ["fcntl"])
        client.apop("carol", SECRET)
        calls = strace.calls()
        client.quit()
        spool = str(self.spool("carol"))
        self.spool("carol").touch()  # what has not changed is not opened again
        return next(call.thread for call in calls if spool in call.paths)

    def fill(self, scene: Scene) -> tuple[int, ...]:
        """A fresh spool; its facts."""
        spool = self.spool()
        spool.unlink(missing_ok=True)
        spool.write_bytes(scene.octets)
        spool.chmod(MODE)
        block = self.blocker()
        if scene.elsewhere:
            block.mkdir(exist_ok=True)
        elif block.is_dir():
            block.rmdir()
        return self.facts()

    def blocker(self) -> Path:
        return self.home("bob") / f".{self.spool().name}.popdrop.new"

    def facts(self) -> tuple[int, ...]:
        found = os.lstat(self.spool())
        return (found.st_ino, found.st_mode, found.st_uid, found.st_gid, found.st_nlink)

    def arrive(self, octets: bytes) -> None:
        with self.spool().open("ab") as spool:
            spool.write(octets)

    def left(self) -> set[str]:
        """What is in the spool's folder and the state folder and should not be."""
        spools = {self.spool().name} | (set() if self.folders else set(NAMES))
        names = set(os.listdir(self.home("bob"))) - spools
        if self.blocker().is_dir():
            names.discard(self.blocker().name)
        names |= {name for name in os.listdir(self.folder.state) if not _KNOWN.match(name)}
        journals = self.folder.state / "journal"
        return names | (set(os.listdir(journals)) if journals.is_dir() else set())


class Told:
    """A session that deletes, up to its QUIT, and what must hold after it."""

    def __init__(self, place: Place, scene: Scene, server: Twistd) -> None:
        self.place = place
        self.scene = scene
        self.facts = place.fill(scene)
        self.client = place.login(server)
        self.seen = look(self.client)
        if self.seen.texts != [each.sent for each in scene.before]:
            raise Violation("the first session does not see what was delivered")
        for number in scene.deleted:
            self.client.dele(number + 1)
        self.arrived: list[Mail] = []
        if scene.arrives == "session":
            self.arrive()

    def arrive(self) -> None:
        self.arrived.append(_plain(90 + len(self.arrived), 1))
        self.place.arrive(self.arrived[-1].stored)

    def quit(self) -> bytes:
        """The answer, nothing if there was none."""
        return answer(self.client.quit)

    def check(self, server: Twistd, answer: bytes) -> str:
        """Log in again and look; `before` or `after`. Raises `Violation`."""
        found, how = self._in_session(server, answer)
        place, scene = self.place, self.scene
        expected = [m.stored for n, m in enumerate(scene.before) if n in self._numbers(how)]
        octets = b"".join([*expected, *(each.stored for each in self.arrived)])
        if place.spool().read_bytes() != octets:
            raise Violation(f"the file does not hold what {how} says")
        if place.facts() != self.facts:
            raise Violation(f"inode, mode, owner or links: {self.facts}, now {place.facts()}")
        if place.left():
            raise Violation(f"left behind: {sorted(place.left())}")
        if len(set(found.ids)) != len(found.ids):
            raise Violation("two messages of one id")
        return how

    def _numbers(self, how: str) -> list[int]:
        gone = self.scene.deleted if how == "after" else ()
        return [number for number in range(len(self.seen.ids)) if number not in gone]

    def _in_session(self, server: Twistd, answer: bytes) -> tuple[Found, str]:
        client = self.place.login(server)
        if Path(f"{self.place.spool()}.lock").exists():
            raise Violation("a stale dot-lock outlived the login")
        found = look(client)
        client.quit()
        late = [each.sent for each in self.arrived]
        count = len(found.ids) - len(late)
        for how in ("after",) if answer.startswith(b"+OK") else ("before", "after"):
            numbers = self._numbers(how)
            texts = [self.seen.texts[number] for number in numbers] + late
            ids = renumbered([self.seen.ids[number] for number in numbers])
            if found.texts == texts and found.ids[:count] == ids:
                return found, how
        sizes = [sum(map(len, text)) for text in found.texts]
        raise Violation(f"answered {answer!r}, then found messages of {sizes} octets")


def answer(command: object) -> bytes:
    """What a command of `poplib` is answered; nothing if the connection was lost."""
    try:
        reply = command()  # type: ignore[operator]
    except poplib.error_proto as refusal:
        line = refusal.args[0]
        return line if isinstance(line, bytes) and line != b"-ERR EOF" else b""
    except OSError:
        return b""
    assert isinstance(reply, bytes)
    return reply


def check_answer(line: bytes) -> None:
    """A clear answer: +OK, or -ERR with a code and words of ours (I5)."""
    if not line.startswith(b"+OK") and not _REFUSED.match(line):
        raise Violation(f"answered {line!r}")
