"""`popdrop.threads`: work in threads, results in the reactor."""

from __future__ import annotations

import os
import threading
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, gatherResults
from twisted.trial.unittest import TestCase

from popdrop.threads import Pool


class PoolTests(TestCase):
    def pool(self, threads: int) -> Pool:
        pool = Pool(reactor, "test", threads)  # type: ignore[arg-type]
        pool.start()
        self.addCleanup(pool.stop)
        return pool

    async def test_result_comes_in_the_reactor(self) -> None:
        here = threading.get_ident()
        pool = self.pool(2)
        there = await pool.run(threading.get_ident)
        self.assertNotEqual(there, here)
        self.assertEqual(threading.get_ident(), here)
        self.assertEqual(await pool.run(int, "11", base=2), 3)

    async def test_threads_may_be_nicer_than_the_reactor(self) -> None:
        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        usual = niceness()
        pool = Pool(reactor, "nice", 1, 1)  # type: ignore[arg-type]
        pool.start()
        self.addCleanup(pool.stop)
        self.assertEqual(await pool.run(niceness), min(usual + 1, 19))
        self.assertEqual(await self.pool(1).run(niceness), usual)
        self.assertEqual(niceness(), usual)

    async def test_threads_let_the_reactor_go_first(self) -> None:
        def policy() -> int:
            return os.sched_getscheduler(threading.get_native_id())

        usual = policy()
        self.assertEqual(await self.pool(1).run(policy), os.SCHED_BATCH)
        self.assertEqual(policy(), usual)

    async def test_failure(self) -> None:
        with self.assertRaises(ZeroDivisionError):
            await self.pool(1).run(lambda: 1 // 0)

    async def test_all_threads_are_used_and_no_more(self) -> None:
        """Work waits behind long work only when every thread is busy."""
        pool = self.pool(3)
        meeting = threading.Barrier(3)
        await gatherResults([pool.run(meeting.wait, 60) for _ in range(3)])
        seen = await gatherResults([pool.run(threading.get_ident) for _ in range(200)])
        self.assertLessEqual(len(set(seen)), 3)

    async def test_short_works_share_a_thread(self) -> None:
        pool = self.pool(8)
        for _ in range(50):
            await pool.run(lambda: None)
        self.assertEqual(sum(t.name.startswith("test-") for t in threading.enumerate()), 1)

    async def test_threads_that_are_not_needed_end(self) -> None:
        pool = self.pool(4)
        meeting = threading.Barrier(4)
        await gatherResults([pool.run(meeting.wait, 60) for _ in range(4)])
        while True:
            await pool.run(lambda: None)
            if sum(t.name.startswith("test-") for t in threading.enumerate()) == 1:
                break

    async def test_any_mix_is_done(self) -> None:
        """More work than threads, some of it given up: all that is wanted is done, at any size."""
        for threads in (1, 2, 5):
            pool = self.pool(threads)
            for count in (1, threads, 3 * threads, 40):
                done: list[int] = []
                waiting = [pool.run(done.append, number) for number in range(count)]
                for each in waiting[1::3]:
                    each.addErrback(lambda failure: failure.trap(CancelledError))
                    each.cancel()
                await gatherResults(waiting)
                self.assertLessEqual({n for n in range(count) if n % 3 != 1}, set(done))

    async def test_work_behind_long_work_gets_a_thread(self) -> None:
        pool = self.pool(2)
        release = threading.Event()
        long = pool.run(release.wait, 60)
        self.assertEqual(await pool.run(lambda: "short"), "short")
        release.set()
        self.assertTrue(await long)

    async def test_cancelled(self) -> None:
        """The waiting ends, the work goes on, and its late result harms nobody."""
        pool = self.pool(1)
        begun, release, ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            release.wait(60)
            ended.set()

        waiting = pool.run(work)
        begun.wait(60)
        waiting.cancel()
        with self.assertRaises(CancelledError):
            await waiting
        release.set()
        await pool.run(lambda: None)
        self.assertTrue(ended.is_set())

    async def test_cancelled_before_it_began(self) -> None:
        """Work that nobody waits for is not done: 6000 abandoned logins cost no hashes."""
        pool = self.pool(1)
        release, done = threading.Event(), []
        pool.run(release.wait, 60)
        waiting = [pool.run(done.append, number) for number in range(100)]
        for each in waiting[:-1]:
            each.addErrback(lambda failure: failure.trap(CancelledError))
            each.cancel()
        release.set()
        await waiting[-1]
        self.assertEqual(done, [99])

    async def test_work_before_the_start_waits_for_it(self) -> None:
        pool = Pool(reactor, "test", 1)  # type: ignore[arg-type]
        early = pool.run(lambda: 1)
        pool.start()
        self.addCleanup(pool.stop)
        self.assertEqual(await early, 1)

    def test_stop_reports_what_was_in_progress(self) -> None:
        pool = Pool(reactor, "test", 1)  # type: ignore[arg-type]
        pool.start()
        results: list[Any] = []
        pool.run(lambda: 1).addCallback(results.append)
        pool.stop()
        self.assertEqual(results, [1])
        self.assertFalse([t for t in threading.enumerate() if t.name.startswith("test-")])
