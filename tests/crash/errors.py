"""Errors at the system calls of a login, a QUIT and a recovery, on a real server that lives on."""

from __future__ import annotations

import poplib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from random import Random
from typing import NamedTuple

from tests.crash.points import READS, WRITES, Row, role, sample
from tests.crash.scene import (
    SECRET,
    Place,
    Scene,
    Stage,
    Told,
    Violation,
    answer,
    check_answer,
    look,
)
from tests.crash.strace import Call, Strace

NAMES = [*WRITES, *READS]

ERRORS: dict[str, tuple[str, ...]] = {
    "fcntl": ("ENOLCK", "EIO", "EINTR"),
    "pread64": ("EIO", "ESTALE", "EINTR"),
    "newfstatat": ("EIO", "ESTALE", "EACCES"),
    "getdents64": ("EIO", "ESTALE"),
}
WRITE_ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EINTR", "EFBIG", "ESTALE")

SCENES = (
    Scene("middle", (2, 3)),
    Scene("first, new mail", (0,), arrives="session"),
    Scene("tail", (5, 6), arrives="crash"),
    Scene("all", (0, 1, 2, 3, 4, 5, 6)),
    Scene("journal elsewhere", (1, 4), elsewhere=True),
)


class Point(NamedTuple):
    """An error at a call, once, or `lasting`: at it and all later ones of its name."""

    call: Call
    error: str
    lasting: bool

    @property
    def fault(self) -> str:
        call = self.call
        return f"{call.name}:error={self.error}:when={call.nth}{'+' * self.lasting}"

    def __str__(self) -> str:
        return f"{self.fault} ({self.call.text})"


def points_of(place: Place, calls: Iterable[Call]) -> Iterator[tuple[str, Point]]:
    """Every error of every call, with words for its kind."""
    for call in calls:
        for error in ERRORS.get(call.name, WRITE_ERRORS):
            for lasting in (False, True):
                # With EINTR for ever Python would try for ever, and the reactor is woken by a
                # write to a pipe: there is no such disk, and no such pipe.
                if not (lasting and (error == "EINTR" or call.name == "write")):
                    yield f"{call.name} {role(place, call)}", Point(call, error, lasting)


class Phase:
    """What is done under faults. One server for all points; carol is logged in all the while."""

    name = ""

    def __init__(self, stage: Stage, scene: Scene) -> None:
        self.scene = scene
        self.place = Place(stage)
        self.server = self.place.serve()
        Told(self.place, scene, self.server).quit()
        self.told: Told | None = None
        self.thread = self.place.thread(self.server)
        self.carol = self.place.login(self.server, "carol")
        self.session: poplib.POP3 | None = None

    def prepare(self) -> None:
        """Up to where the faults begin."""

    def act(self) -> bytes:
        """Under faults; the answer."""
        raise NotImplementedError

    def check(self, said: bytes) -> str:
        """When the faults are over: what came of it. Raises `Violation`."""
        raise NotImplementedError

    def find(self) -> list[Call]:
        """The calls of the mail's without faults."""
        self.prepare()
        strace = Strace(self.place.trace, self.server.process.pid, NAMES)
        said = self.act()
        calls = [call for call in strace.calls() if role(self.place, call)]
        if not said.startswith(b"+OK"):
            raise Violation(f"{said!r} without a fault")
        self.check(said)
        return [call for call in calls if call.thread == self.thread]

    def try_one(self, point: Point, row: Row) -> None:
        """One point; what is wrong goes into the row."""
        self.prepare()
        strace = Strace(self.place.trace, self.server.process.pid, NAMES, point.fault, self.thread)
        try:
            said = self.act()
        finally:
            trace = strace.detach()
        if "(INJECTED)" not in trace:
            row.count("not hit")
            return
        try:
            check_answer(said)
            row.count(f"{said.split()[0].decode()} {self.check(said)}")
            self._others()
        except (Violation, OSError, EOFError, poplib.error_proto) as fault:
            row.tried += 1
            row.violations.append(f"{point}: {fault!r}")

    def _others(self) -> None:
        if self.server.process.poll() is not None:
            raise Violation("the server has ended")
        if len(self.carol.retr(1)[1]) != 6:
            raise Violation("another session does not get its mail")


class Quit(Phase):
    """A QUIT that deletes."""

    name = "quit"

    def prepare(self) -> None:
        self.told = Told(self.place, self.scene, self.server)

    def act(self) -> bytes:
        assert self.told
        return self.told.quit()

    def check(self, said: bytes) -> str:
        assert self.told
        if self.scene.arrives == "crash":
            self.told.arrive()
        return self.told.check(self.server, said)


class Login(Phase):
    """A login with nothing to recover."""

    name = "login"

    def prepare(self) -> None:
        self.facts = self.place.fill(self.scene)

    def act(self) -> bytes:
        self.client = self.server.client()
        return answer(partial(self.client.apop, "bob", SECRET))

    def check(self, said: bytes) -> str:
        texts = [each.sent for each in self.scene.before]
        if said.startswith(b"+OK"):
            if look(self.client).texts != texts:
                raise Violation("the session under the fault sees something else")
            self.client.quit()
        else:
            self.client.close()
        again = self.place.login(self.server)
        if look(again).texts != texts:
            raise Violation("the next session sees something else")
        again.quit()
        if self.place.spool().read_bytes() != self.scene.octets:
            raise Violation("the spool was changed")
        if self.place.facts() != self.facts or self.place.left():
            raise Violation(f"facts changed, or left behind: {sorted(self.place.left())}")
        return "unchanged"


class Recovery(Quit):
    """A login that ends what a QUIT has left unfinished."""

    name = "recover"

    def prepare(self) -> None:
        super().prepare()
        assert self.told
        # The cut fails: the first ftruncate is that of the spool.
        fault = "ftruncate:error=EIO:when=1"
        strace = Strace(self.place.trace, self.server.process.pid, NAMES, fault, self.thread)
        said = self.told.quit()
        strace.detach()
        if self.scene.arrives == "crash":
            self.told.arrive()
        if not said.startswith(b"-ERR [SYS/TEMP]"):
            raise Violation(f"{said!r} under EIO")

    def act(self) -> bytes:
        self.session = self.server.client()
        return answer(partial(self.session.apop, "bob", SECRET))

    def check(self, said: bytes) -> str:
        assert self.told and self.session
        if said.startswith(b"+OK"):
            self.session.quit()
        else:
            self.session.close()
        return self.told.check(self.server, b"+OK" if said.startswith(b"+OK") else b"")


class Errors:
    """All phases of all scenes; at most `limit` points of each phase, 0 is all."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit

    def run(self, scenes: Iterable[Scene] = SCENES) -> list[Row]:
        """One row a scene and phase."""
        rows = []
        phases: list[Callable[[Stage, Scene], Phase]] = [Quit, Login, Recovery]
        for scene in scenes:
            for make in phases:
                # What cuts nothing off in the spool's middle has nothing to recover.
                if make is Recovery and scene.name == "all":
                    continue
                if make is Login and scene.elsewhere:
                    continue
                with Stage() as stage:
                    rows.append(self._phase(make(stage, scene)))
        return rows

    def _phase(self, phase: Phase) -> Row:
        row = Row(phase.name, phase.scene.name)
        points = list(points_of(phase.place, phase.find()))
        row.points = len(points)
        chosen = [point for _, point in points]
        if self.limit:
            # Else each call would be tried with its first error only.
            Random(f"{row.campaign} {row.scene}").shuffle(points)
            chosen = sample({"": points}, self.limit)[""]
        for point in chosen:
            phase.try_one(point, row)
        said = phase.server.stop()
        if "Traceback" in said:
            row.violations.append(said[said.index("Traceback") :])
        return row
