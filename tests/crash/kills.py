"""SIGKILL at the system calls of a QUIT, and of the recovery after it, on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.crash.points import ANSWER, WRITES, Row, creates, role, sample
from tests.crash.scene import SCENES, SECRET, Place, Scene, Stage, Told, Violation, answer
from tests.crash.strace import Call, Strace
from tests.end_to_end.harness import DEADLINE, Twistd

NAMES = [*WRITES, ANSWER]

TRIES = 5
"""To kill at one point."""

Point = tuple[str, Call]
"""A call to kill at, with words for its kind."""


def deadly(place: Place, calls: Iterable[Call]) -> list[Point]:
    """The calls that change a file or a lock of the mail's, and the one that answers."""
    return [
        (f"{call.name} {role(place, call)}", call)
        for call in calls
        if role(place, call) and (call.name != "openat" or creates(call))
    ]


def points_of(scenes: Iterable[Scene], folders: bool = False) -> dict[str, list[Point]]:
    """Those of each scene's QUIT, by one run without a fault."""
    found = {}
    with Stage() as stage:
        place = Place(stage, folders)
        server = place.serve()
        for scene in scenes:
            Told(place, scene, server).quit()  # makes folders that are missing
            told = Told(place, scene, server)
            strace = Strace(place.trace, server.process.pid, NAMES)
            said = told.quit()
            found[scene.name] = deadly(place, strace.calls())
            if told.check(server, said) != "after":
                raise Violation(f"{scene.name}: {said!r} without a fault")
    return found


def kill(
    place: Place, server: Twistd, point: Point, command: Callable[[], bytes], thread: int = 0
) -> tuple[bytes, bool]:
    """Give a command and kill the server at a call, of this thread if it matters.

    The answer, and whether it was killed at that call: a call of the C library's own may come
    between, such as a look at the machine's memory, and then it was at another or not at all.
    """
    kind, call = point
    fault = f"{call.name}:signal=KILL:when={call.nth}"
    strace = Strace(place.trace, server.process.pid, NAMES, fault, thread)
    try:
        said = answer(command)
        if not said:
            server.process.wait(DEADLINE)
    finally:
        calls = strace.calls()
        server.stop()
    last = [(k, each.nth) for k, each in deadly(place, calls) if each.name == call.name]
    return said, not said and (kind, call.nth) in last


def tries(point: Point) -> Iterator[int]:
    """Until the point is hit, for whoever breaks off then; a `Violation` after the last."""
    yield from range(TRIES)
    raise Violation(f"not killed at {words(point)} in {TRIES} tries")


def words(point: Point) -> str:
    kind, call = point
    return f"{kind}, {call.name} {call.nth} ({call.text})"


def check(
    told: Told, server: Twistd, said: bytes, point: Point, row: Row, hit: bool = True
) -> None:
    """After the last start; what is wrong goes into the row. One that missed does not count."""
    try:
        how = told.check(server, said)
        if hit:
            row.count(how)
    except (Violation, OSError, EOFError) as fault:
        row.tried += 1
        row.violations.append(f"{words(point)}: {fault}")


def in_parallel(jobs: int, work: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(each) for each in work]:
            future.result()


class Kills:
    """SIGKILL at a system call of a QUIT; the server's next start, or the next login, recovers."""

    def __init__(self, limit: int = 0) -> None:
        """At most so many points in all; 0 is every one."""
        self.limit = limit

    def run(self, scenes: Iterable[Scene] = SCENES, jobs: int = 2) -> list[Row]:
        """One row a scene."""
        scenes = list(scenes)
        points = points_of(scenes)
        chosen = points
        if self.limit:
            pairs = {name: [(p[0], p) for p in each] for name, each in points.items()}
            chosen = sample(pairs, self.limit)
        rows = [Row("kill", scene.name, len(points[scene.name])) for scene in scenes]
        in_parallel(
            jobs,
            [
                partial(self._scene, scene, chosen[scene.name], row)
                for scene, row in zip(scenes, rows, strict=True)
                if chosen[scene.name]
            ],
        )
        return rows

    def _scene(self, scene: Scene, points: list[Point], row: Row) -> None:
        with Stage() as stage:
            place = Place(stage)
            server = place.serve()
            Told(place, scene, server).quit()  # as above
            for point in points:
                for _ in tries(point):
                    told = Told(place, scene, server)
                    said, hit = kill(place, server, point, told.client.quit)
                    if scene.arrives == "crash":
                        told.arrive()
                    server = place.serve()
                    check(told, server, said, point, row, hit)
                    if hit:
                        break


STATES = {
    "published": "fsync folder",
    "moved": "fsync spool",
    "moved and synced": "ftruncate spool",
    "cut off": "ftruncate journal",
}
"""How far the update has got at the first kill, and its kind of call, the first behind the rename.
"""

AGAIN = Scene("every second", (0, 2, 4, 6), arrives="crash")


class KillsAgain:
    """SIGKILL at a system call of the login that recovers from an earlier kill.

    New mail comes after each kill.
    """

    def __init__(self, limit: int = 0) -> None:
        """So many points of each state, different ones; 0 is every one."""
        self.limit = limit

    def run(self, scene: Scene = AGAIN, jobs: int = 2) -> list[Row]:
        """One row a state."""
        points = points_of([scene], folders=True)[scene.name]
        rename = next(n for n, (kind, _) in enumerate(points) if kind.startswith("rename"))
        rows = []
        work = []
        for state, kind in STATES.items():
            first = next(each for each in points[rename:] if each[0] == kind)
            rows.append(Row("again", state))
            work.append(partial(self._state, scene, first, rows[-1]))
        in_parallel(jobs, work)
        return rows

    def _state(self, scene: Scene, first: Point, row: Row) -> None:
        with Stage() as stage:
            place = Place(stage, folders=True)
            server = self._unfinished(place, scene, place.serve(), first)[1]
            client = server.client()
            place.thread(server)  # what the start does in it is over then
            strace = Strace(place.trace, server.process.pid, NAMES)
            client.apop("bob", SECRET)
            points = deadly(place, strace.calls())
            client.quit()
            row.points = len(points)
            chosen = points
            if self.limit:
                # Spread evenly, and in each state over other ones.
                count = len(points)
                shift = list(STATES).index(row.scene) * count // len(STATES)
                places = [(n * count + shift) // self.limit for n in range(self.limit)]
                chosen = [chosen[number] for number in places]
            for point in chosen:
                for _ in tries(point):
                    told, server = self._unfinished(place, scene, server, first)
                    client = server.client()
                    # Those who look up accounts open files as well.
                    thread = server.process.pid if point[1].name == ANSWER else place.thread(server)
                    login = partial(client.apop, "bob", SECRET)
                    hit = kill(place, server, point, login, thread)[1]
                    client.close()
                    told.arrive()
                    server = place.serve()
                    check(told, server, b"", point, row, hit)
                    if hit:
                        break

    def _unfinished(
        self, place: Place, scene: Scene, server: Twistd, first: Point
    ) -> tuple[Told, Twistd]:
        """After the first kill: what must hold in the end, and a new server."""
        for _ in tries(first):
            told = Told(place, scene, server)
            said, hit = kill(place, server, first, told.client.quit)
            if hit:
                told.arrive()
            server = place.serve()
            if hit:
                break
            told.check(server, said)
        return told, server
