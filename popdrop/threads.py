"""Pools and hops: the only place where work changes thread.

Popdrop has pools of its own, since the reactor's is small and shared with name resolution. No
thread waits for a lock or a delay: those who must wait do so on reactor timers.

The pool is written here and not `twisted.python.threadpool`: with 16 calls in flight on one core a
round trip cost 38 us of CPU there and costs 6 here, where results that come together enter the
reactor together; a login makes three of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.python.failure import Failure

T = TypeVar("T")
P = ParamSpec("P")

_Work = tuple["Deferred[Any]", Callable[[], Any]]


class Pool:
    """A bounded number of threads for one kind of work."""

    def __init__(self, reactor: IReactorFromThreads, name: str, threads: int) -> None:
        self._reactor = reactor
        self._name = name
        self._most = threads
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._free = 0  # threads that wait and for which no work is in the queue
        self._backlog = 0  # work in the queue for which there is no thread
        self._started = False
        self._done: list[tuple[Deferred[Any], Any]] = []
        self._guard = threading.Lock()

    def start(self) -> None:
        """From now on threads are made as work comes, up to the bound. Not before a fork."""
        with self._guard:
            self._started = True
            while self._backlog and len(self._threads) < self._most:
                self._backlog -= 1
                self._add_thread()

    def stop(self) -> None:
        """Let the work in progress end, then the threads. Blocks until both have.

        What they still have to report is reported from here, to whoever waits in the reactor.
        """
        self._started = False
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
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
            # A thread is made only where none waits: few of them serve many short works, and the
            # fewer there are the less they take the interpreter from the reactor.
            if self._free:
                self._free -= 1
            elif self._started and len(self._threads) < self._most:
                self._add_thread()
            else:
                self._backlog += 1
        if args or kwargs:
            self._queue.put((done, lambda: work(*args, **kwargs)))
        else:
            self._queue.put((done, work))
        return done

    def _add_thread(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
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
                else:
                    self._free += 1
            if first:
                self._reactor.callFromThread(self._fire)
            del item, done, work, result  # an idle thread keeps nothing alive

    def _fire(self) -> None:
        with self._guard:
            finished, self._done = self._done, []
        for done, result in finished:
            if not done.called:
                done.callback(result)
