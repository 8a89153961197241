"""Pools and hops: the only place where work changes thread.

Popdrop has pools of its own, since the reactor's is small and shared with name resolution. No
thread waits for a lock or a delay: those who must wait do so on reactor timers.

The pool is written here and not `twisted.python.threadpool`: with 16 calls in flight on one core a
round trip cost 38 us of CPU there and costs 6 here, where results that come together enter the
reactor together; a login makes three of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure

T = TypeVar("T")
P = ParamSpec("P")

PATIENCE: Final = 0.05
"""Seconds that work may wait before one more thread is made for it.

Where all work is short one thread serves it, and takes the interpreter from the reactor less often
than many would: 0.68 ms of CPU a session against 0.85. Where a disk is slow there are sixteen
after 0.8 s.
"""


_Work = tuple["Deferred[Any]", Callable[[], Any]]


class Pool:
    """A bounded number of threads for one kind of work."""

    def __init__(
        self,
        reactor: Any,
        name: str,
        threads: int,
        nice: int = 0,
        processors: Collection[int] = (),
    ) -> None:
        """`reactor` provides `IReactorFromThreads` and `IReactorTime`.

        `nice` is added to the threads' own nice value (on Linux each thread has one, sched(7)), so
        that long computations leave the processor to the reactor when there is one for both.
        `processors` are those the threads may run on; none: where their maker may.
        """
        self._reactor = reactor
        self._name = name
        self._most = threads
        self._nice = nice
        self._processors = processors
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._free = 0  # threads that wait and for which no work is in the queue
        self._made = 0
        self._backlog = 0  # work in the queue for which there is no thread
        self._started = False
        self._timer: IDelayedCall | None = None
        self._done: list[tuple[Deferred[Any], Any]] = []
        self._guard = threading.Lock()

    def start(self) -> None:
        """From now on threads are made as work comes, up to the bound. Not before a fork."""
        with self._guard:
            self._started = True
            if self._backlog:
                self._backlog -= 1
                self._add_thread()
                self._look_later()

    def stop(self) -> None:
        """Let the work in progress end, then the threads. Blocks until both have.

        What they still have to report is reported from here, to whoever waits in the reactor.
        """
        with self._guard:
            self._started = False
            threads = list(self._threads)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()
        self._threads.clear()
        self._free = 0
        self._fire()

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Do `work` in a thread and fire in the reactor.

        Cancelling stops the waiting, and the work if it has not begun: a thread cannot be
        interrupted.
        """
        done: Deferred[T] = Deferred()
        with self._guard:
            if self._free:
                self._free -= 1
            elif self._started and not self._threads:
                self._add_thread()
            else:
                self._backlog += 1
                self._look_later()
        if args or kwargs:
            self._queue.put((done, lambda: work(*args, **kwargs)))
        else:
            self._queue.put((done, work))
        return done

    def _look_later(self) -> None:
        if self._started and self._timer is None and len(self._threads) < self._most:
            self._timer = self._reactor.callLater(PATIENCE, self._look)

    def _look(self) -> None:
        """Work has waited for some time: the threads there are do not keep up with it."""
        with self._guard:
            self._timer = None
            if self._backlog and self._started and len(self._threads) < self._most:
                self._backlog -= 1
                self._add_thread()
            if self._backlog:
                self._look_later()

    def _add_thread(self) -> None:
        self._made += 1
        name = f"{self._name}-{self._made}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _settle(self) -> None:
        """What holds for this thread alone: on Linux each has its own (sched(7))."""
        if hasattr(os, "SCHED_BATCH"):
            # The reactor lets go of the interpreter's lock for each system call. A thread of the
            # usual kind that waits for it runs at once, in the reactor's place; such a one when
            # the reactor waits. A session of APOP took 0.65 ms and not 0.73, with TLS 1.6 and not
            # 1.85.
            with suppress(OSError):  # where a service may not
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        if self._nice:
            thread = threading.get_native_id()
            usual = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(usual + self._nice, 19))
        if self._processors:
            with suppress(OSError):  # those the process had at its start may be gone (cpuset(7))
                os.sched_setaffinity(0, self._processors)

    def _work(self) -> None:
        self._settle()
        ends = False
        while (item := self._queue.get()) is not None:
            done, work = item
            result: Any = None
            # Where nobody waits any more, nothing is done: a login given up costs no hash.
            wanted = not done.called
            if wanted:
                try:
                    result = work()
                except BaseException:
                    result = Failure()  # type: ignore[no-untyped-call]
            with self._guard:
                first = wanted and not self._done
                if wanted:
                    self._done.append((done, result))
                if self._backlog:
                    self._backlog -= 1
                elif self._free and self._started:
                    # One that waits is enough: what was slow is over.
                    self._threads.remove(threading.current_thread())
                    ends = True
                else:
                    self._free += 1
            if first:
                self._reactor.callFromThread(self._fire)
            if ends:
                return
            del item, done, work, result  # an idle thread keeps nothing alive

    def _fire(self) -> None:
        with self._guard:
            finished, self._done = self._done, []
        for done, result in finished:
            if not done.called:
                done.callback(result)
