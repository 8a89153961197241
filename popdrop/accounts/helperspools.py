"""The helper's part of `open=helper`: whose spools it hands out, over which connections.

A spool of mode 0600 is its user's alone. The helper opens it with that user's rights and passes
the descriptor (SCM_RIGHTS, unix(7)). It is told a name and nothing else: where the spool lies and
whose it must be it knows from its own configuration, which is that of the start.

What a server that was taken over can get by it: the spools of those who log in at that time, which
it could read anyhow, and no other, unless `open=helper-all` has said so.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from array import array
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, NamedTuple

from popdrop.accounts import supervisor
from popdrop.accounts.helperwire import (
    LONGEST,
    Kind,
    Malformed,
    Opened,
    decode_opening,
    encode_opened,
)
from popdrop.credentials import acceptable_name
from popdrop.errors import PermanentFailure, PopdropError
from popdrop.values import Account

RECENTLY: Final = 300.0
"""Seconds after a login in which the spool is handed out: it is asked for at once, and while a
deliverer or another session holds the maildrop for the `--lock-timeout`."""
NAMES: Final = 10_000
"""Logins that are remembered, of each connection and name the last."""


class Guest(NamedTuple):
    """Who has logged in, `until` when that counts; an id is `None` where no checker told it."""

    until: float
    uid: int | None
    gid: int | None


class Met:
    """Whose login this helper has verified, by the connection. May be used from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guests: dict[tuple[socket.socket, bytes], Guest] = {}
        self._guard = threading.Lock()

    def note(self, slot: socket.socket, account: Account) -> None:
        """`account` has logged in over `slot`. One that is disabled has not."""
        if account.disabled:
            return
        with self._guard:
            now = self._clock()
            if len(self._guests) >= NAMES:
                left = {key: each for key, each in self._guests.items() if each.until > now}
                # Of more than so many in five minutes the oldest have their spools by now.
                self._guests = dict(list(left.items())[-NAMES // 2 :])
            key = (slot, account.name)
            self._guests.pop(key, None)
            self._guests[key] = Guest(now + RECENTLY, account.uid, account.gid)

    def find(self, slot: socket.socket, name: bytes) -> Guest | None:
        """The login of `name` over `slot`, if that was just now."""
        with self._guard:
            guest = self._guests.get((slot, name))
        return guest if guest is not None and guest.until > self._clock() else None


class Spools:
    """Threads that open spools, one for each connection that asks for them.

    `config["spools"]` are `helperclient.SpoolRules` (`None`: nobody asks). What opens is looked up
    by its name: the accounts know no stores. `slots` are the connections of the logins; to each
    belong as many of `config["channels"]`, in the same order.
    """

    def __init__(self, config: dict[str, Any], slots: list[socket.socket], met: Met) -> None:
        self._met = met
        self._channels: list[tuple[socket.socket, socket.socket]] = []
        wanted = config["spools"]
        if wanted is None:
            return
        module, _, name = wanted["opener"].partition(":")
        self._anybody: bool = wanted["anybody"]
        self._open: Callable[[bytes, int | None, int | None], int | None]
        self._open = getattr(import_module(module), name)(
            wanted["template"], wanted["owner"], wanted["min_uid"]
        )
        each = len(config["channels"]) // len(slots)
        for place, number in enumerate(config["channels"]):
            self._channels.append((socket.socket(fileno=number), slots[place // each]))

    def start(self) -> None:
        """Serve, in threads that end with the process."""
        for channel, slot in self._channels:
            threading.Thread(target=self._serve, args=(channel, slot), daemon=True).start()

    def _serve(self, channel: socket.socket, slot: socket.socket) -> None:
        with channel:
            while True:
                try:
                    # No room is given for descriptors: the kernel closes those that come.
                    record, _, flags, _ = channel.recvmsg(LONGEST + 1)
                except OSError:
                    return
                if not record:
                    return
                try:
                    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                        raise Malformed("cut")
                    opening = decode_opening(record)
                except Malformed as error:
                    supervisor.tell(f"a message that is none ({error}): no spools by this way")
                    channel.shutdown(socket.SHUT_RDWR)
                    return
                descriptor, kind, detail = self._opened(slot, opening.name)
                answer = encode_opened(Opened(kind, opening.number, detail))
                _send(channel, answer, descriptor)

    def _opened(self, slot: socket.socket, name: bytes) -> tuple[int | None, Kind, str]:
        """Never raises; an error that is not the spool's is told without its text."""
        if not acceptable_name(name):
            return None, Kind.PERMANENT, "a name that cannot be used"
        guest = self._met.find(slot, name)
        if guest is None and not self._anybody:
            # Not for ever: the helper that verified the login may have ended since.
            return None, Kind.TEMPORARY, "this helper has not verified that login"
        uid, gid = (None, None) if guest is None else (guest.uid, guest.gid)
        try:
            descriptor = self._open(name, uid, gid)
        except PermanentFailure as error:
            return None, Kind.PERMANENT, error.detail
        except PopdropError as error:
            return None, Kind.TEMPORARY, error.detail
        except BaseException as error:
            supervisor.report(error)
            return None, Kind.TEMPORARY, f"{type(error).__name__} in the helper"
        return descriptor, Kind.MISSING if descriptor is None else Kind.HANDED, ""


def _send(channel: socket.socket, record: bytearray, descriptor: int | None) -> None:
    """Send it, and keep no copy of `descriptor`: its locks are those of who has it."""
    more = []
    if descriptor is not None:
        more = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
    try:
        channel.sendmsg([record], more, socket.MSG_NOSIGNAL)
    except OSError:
        pass  # gone; the next read tells
    finally:
        if descriptor is not None:
            os.close(descriptor)
