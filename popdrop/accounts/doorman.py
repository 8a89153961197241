"""The door of the self-service: local users come, and the kernel says who they are.

`popdrop popauth` of a user connects to a Unix socket. The helper knows the caller by SO_PEERCRED
(unix(7)), and hands the connection to a process with the rights of the accounts' owner
(`selfservice.py`): with root's rights nothing is read of what a user sends, and no file is opened
that the server's user could have put in another's place.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import stat
import struct
import subprocess
from typing import Any, Final

from popdrop.accounts import supervisor
from popdrop.accounts.helperwire import Kind, SelfAnswer, encode_self_answer
from popdrop.accounts.pace import Budget
from popdrop.errors import ConfigError

SELF_BURST: Final = 10.0
"""Connections of one uid to the self-service at once, and then one in `FORGIVEN` seconds."""
SELF_WRONG: Final = 2.0
"""How many connections more a wrong old secret counts for."""
SELF_PROCESSES: Final = 8
SELF_OF_ONE: Final = 2
"""Self-services at once, in all and of one uid: one may end while the next begins."""
WRONG_STATUS: Final = 3
"""Exit status of a self-service that was given a wrong old secret."""

_HANDED_ON: Final = ("path", "modules", "database", "key", "credentials", "owner")
_PEERCRED: Final = struct.Struct("iII")


class Doorman:
    """Lets users in to the self-service: knows who they are, and how often they came.

    It reads nothing of what they send. Each is given a process of its own, with the rights of the
    accounts' owner and the connection, which ends with it.
    """

    def __init__(self, config: dict[str, Any], selector: selectors.BaseSelector) -> None:
        self._config = config
        self._selector = selector
        self._budget = Budget(SELF_BURST)
        self._at_work: dict[subprocess.Popen[bytes], int] = {}

    def accept(self, listener: socket.socket) -> None:
        """One connection."""
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            facts = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            _, uid, _ = _PEERCRED.unpack(facts)
            if uid == 0 or uid < self._config["min_uid"]:
                self._turn_away(connection, SelfAnswer(Kind.REFUSED, detail="not for this user"))
            elif (
                list(self._at_work.values()).count(uid) >= SELF_OF_ONE
                or len(self._at_work) >= SELF_PROCESSES
                or not self._budget.spend(uid)
            ):
                self._turn_away(connection, SelfAnswer(Kind.LATER))
            else:
                self._serve(connection, uid)

    def _turn_away(self, connection: socket.socket, answer: SelfAnswer) -> None:
        try:
            connection.sendmsg(
                [encode_self_answer(answer)], [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            )
        except OSError:
            pass

    def _serve(self, connection: socket.socket, uid: int) -> None:
        config = {
            **{name: self._config[name] for name in _HANDED_ON},
            "parent": os.getpid(),
            "connection": connection.fileno(),
            "caller": uid,
        }
        text = supervisor.config_file(supervisor.as_json(config))
        try:
            process = subprocess.Popen(  # noqa: S603 - our own words
                supervisor.command("selfservice"),
                stdin=text,
                env=supervisor.environment(),
                cwd="/",
                pass_fds=(connection.fileno(),),
                umask=0o077,
            )
            watch = os.pidfd_open(process.pid)
        except (OSError, subprocess.SubprocessError) as error:
            supervisor.report(error)
            self._turn_away(connection, SelfAnswer(Kind.LATER))
            return
        finally:
            os.close(text)
        self._at_work[process] = uid

        def ended(descriptor: int) -> None:
            self._selector.unregister(descriptor)
            os.close(descriptor)
            del self._at_work[process]
            if process.wait() == WRONG_STATUS:
                self._budget.spend(uid, SELF_WRONG)

        self._selector.register(watch, selectors.EVENT_READ, ended)


def listen(path: str) -> socket.socket:
    """Listen for local users at `path`. Raises `ConfigError`.

    The folder is made, mode 0755, where there is none. Nobody else may write to it: he could put
    a socket of his own there, and be told the users' secrets.
    """
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        facts = os.stat(folder)
        if facts.st_mode & 0o022 or facts.st_uid not in (0, os.geteuid()):
            raise ConfigError(
                f"--popauth-socket {path}: others may write to its folder; name one of root's own,"
                " as /run/popdrop/popauth"
            )
        _remove_left_over(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path)
            os.chmod(path, 0o666)  # noqa: S103 - everybody may ask; who it is the kernel says
            listener.listen(16)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"--popauth-socket {path}: {error.strerror or error}") from None
    return listener


def _remove_left_over(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"--popauth-socket {path}: there is a file of this name; remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as attempt:
        attempt.setblocking(False)
        outcome = attempt.connect_ex(path)
    if outcome != errno.ECONNREFUSED:
        raise ConfigError(f"--popauth-socket {path}: another server listens there; stop it")
    os.unlink(path)
