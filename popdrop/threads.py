"""Pools and hops: the only place where work changes thread.

Popdrop has pools of its own, since the reactor's is small and shared with name resolution. No
thread waits for a lock or a delay: those who must wait do so on reactor timers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.python.threadpool import ThreadPool

T = TypeVar("T")
P = ParamSpec("P")


class Pool:
    """A bounded number of threads for one kind of work."""

    def __init__(self, reactor: IReactorFromThreads, name: str, threads: int) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name=name)

    def start(self) -> None:
        """Threads are made as work comes, up to the bound."""
        self._pool.start()

    def stop(self) -> None:
        """Let the work in progress end, then the threads. Blocks until both have."""
        self._pool.stop()

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Do `work` in a thread and fire in the reactor.

        Cancelling stops the waiting, not the work: a thread cannot be interrupted.
        """
        done: Deferred[T] = Deferred()

        def fire(succeeded: bool, result: Any) -> None:
            if not done.called:
                if succeeded:
                    done.callback(result)
                else:
                    done.errback(result)

        def report(succeeded: bool, result: object) -> None:
            self._reactor.callFromThread(fire, succeeded, result)

        self._pool.callInThreadWithCallback(report, work, *args, **kwargs)
        return done
