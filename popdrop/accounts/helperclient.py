"""The network process's side of the privileged helper: starts it, asks it, ends it.

`HelperProcess` is what one server has; its supervisor is started in `privilegedStartService`, while
the rights are there. `Slot` is one connection, of one process that serves; `HelperChecker` asks
over it on behalf of one `helper:` string. Nothing here needs a thread. Over 400 lines for the care
that its start takes.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer
from zope.interface.interface import InterfaceClass

import popdrop
from popdrop.accounts import doorman, helper, supervisor
from popdrop.accounts.helperslot import NOT_NOW, Slot
from popdrop.accounts.helperwire import (
    CHALLENGE_OCTETS,
    DIGEST_OCTETS,
    LONGEST,
    NAME_OCTETS,
    SECRET_OCTETS,
    Answer,
    Down,
    Hello,
    Kind,
    Request,
    decode_reply,
    encode_down,
)
from popdrop.accounts.spoolslot import CHANNELS, SpoolSlot
from popdrop.credentials import FAILED, acceptable_name
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    PermanentFailure,
    PopdropError,
    TemporaryFailure,
)
from popdrop.values import Secret, Verified

log = Logger()

START_SECONDS: Final = 30.0
"""Seconds that the helper has for its start."""
STOP_SECONDS: Final = supervisor.PATIENCE + 5.0
"""Seconds that a stop waits for the end of the supervisor."""
_FAILURES: Final[dict[Kind, type[PopdropError]]] = {
    Kind.NO_SUCH_USER: NoSuchUser,
    Kind.NO_VERIFIER: NoVerifierOfThisKind,
    Kind.BAD: BadCredentials,
    Kind.TEMPORARY: TemporaryFailure,
    Kind.PERMANENT: PermanentFailure,
}
_TEXTS: Final = {
    Kind.TEMPORARY: NOT_NOW,
    Kind.PERMANENT: "Authentication is not possible, ask the administrator.",
}


@dataclass(frozen=True, slots=True)
class SelfService:
    """Where and for whom `popdrop popauth` of users is served.

    `path` is that of the socket, `database` that of the accounts, `key` where their key comes from
    (`keys.py`), `min_uid` the lowest uid.
    """

    path: str
    database: str
    key: str | None
    min_uid: int


@dataclass(frozen=True, slots=True)
class SpoolRules:
    """Which spools the helper opens for this process (`open=helper`), and how.

    `opener` is the function that makes what opens them, as `module:name`; it is given `template`,
    the path of `--store`, `owner`, the system account whose they all are or `None`, and `min_uid`,
    the lowest uid. `anybody`: also for names whose login the helper has not verified.
    """

    opener: str
    template: str
    owner: str | None
    min_uid: int
    anybody: bool = False


@implementer(ICredentialsChecker)
class HelperChecker:
    """Verifies what one `helper:` string describes, by asking the helper.

    Policy facts of the account come from elsewhere: it is given as a foreign one (decision 22).
    """

    takes_cram = False  # the helper is sent APOP's digests only

    def __init__(self, process: HelperProcess, source: int, kinds: Iterable[str]) -> None:
        self._process = process
        self._source = source
        known: dict[str, InterfaceClass] = {
            "password": IUsernamePassword,
            "apop": IUsernameHashedPassword,
        }
        self.credentialInterfaces = tuple(known[kind] for kind in sorted(kinds))

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """Fires with a foreign `Verified`.

        Fails with `NoSuchUser`, `NoVerifierOfThisKind`, `BadCredentials`, `TemporaryFailure`,
        `PermanentFailure`. Credentials that the helper could not be sent are not sent.
        """
        return Deferred.fromCoroutine(self._verify(credentials))

    async def _verify(self, credentials: Any) -> Verified:
        answer = await self._process.ask(self._request(credentials))
        if answer.kind is Kind.GOOD:
            account = answer.account
            assert account is not None
            if not acceptable_name(account.name):
                raise PermanentFailure(_TEXTS[Kind.PERMANENT], "a name that cannot be used")
            return Verified(account, foreign=True)
        failure = _FAILURES[answer.kind]
        raise failure(_TEXTS.get(answer.kind, FAILED), answer.detail)

    def _request(self, credentials: Any) -> Request:
        name: bytes = credentials.username
        if not 0 < len(name) <= NAME_OCTETS:
            raise NoSuchUser(FAILED)
        if IUsernamePassword.providedBy(credentials):
            password: bytes = credentials.password
            if len(password) > SECRET_OCTETS:
                raise NoVerifierOfThisKind(FAILED)
            return Request(Kind.PASSWORD, self._source, 0, name, Secret(password))
        # CRAM-MD5's credentials are IUsernameHashedPassword, too, and no program knows those.
        challenge = getattr(credentials, "challenge", b"")
        digest = getattr(credentials, "digest", b"")
        if (
            getattr(credentials, "mechanism", None) != "APOP"
            or len(digest) != DIGEST_OCTETS
            or not 0 < len(challenge) <= CHALLENGE_OCTETS
        ):
            raise NoVerifierOfThisKind(FAILED)
        return Request(Kind.APOP, self._source, 0, name, Secret(digest), challenge)


class HelperProcess:
    """The supervisor with its helper, as a child of this process.

    `texts` are what stands behind `helper:`, in order. Making one asks a child that ends at once
    what they can verify, and raises `ConfigError` where one is wrong: this process never loads a
    backend itself. `slots` is the number of processes that serve.
    """

    def __init__(
        self,
        texts: Sequence[str],
        self_service: SelfService | None = None,
        registry: str | None = None,
        slots: int = 1,
    ) -> None:
        self._texts = list(texts)
        self._self_service = self_service
        self._registry = registry or helper.REGISTRY
        self._count = slots
        self._child: subprocess.Popen[bytes] | None = None
        self._lifeline: socket.socket | None = None
        self._listener: socket.socket | None = None
        self.spool_rules: SpoolRules | None = None
        self.slots: list[Slot] = []
        self.current: Slot | None = None
        self._inherited = False
        self.kinds = self._describe()

    @classmethod
    def inherited(cls, handed: Mapping[str, Any]) -> Self:
        """In a process that serves: the one of its parent's, by what its `hand_on` gave."""
        made = cls([])
        made.kinds = [frozenset(kinds) for kinds in handed["kinds"]]
        connection = socket.socket(fileno=handed["slot"])
        channels = [socket.socket(fileno=number) for number in handed["channels"]]
        spools = SpoolSlot(channels) if channels else None
        made.slots = [Slot(connection, Hello(handed["pid"], handed["uid"]), spools)]
        made.current = made.slots[0]
        made._inherited = True
        return made

    def hand_on(self, number: int) -> dict[str, Any]:
        """What `inherited` takes, for the slot of this 0-based number.

        Its descriptors are `slot` and `channels`.
        """
        slot = self.slots[number]
        return {
            "kinds": [sorted(kinds) for kinds in self.kinds],
            "slot": slot.fileno(),
            "channels": [] if slot.spools is None else slot.spools.filenos(),
            "pid": slot.hello.pid,
            "uid": slot.hello.uid,
        }

    def checkers(self) -> list[HelperChecker]:
        """One for each string, in order."""
        return [HelperChecker(self, place, kinds) for place, kinds in enumerate(self.kinds)]

    @property
    def supervisor_pid(self) -> int | None:
        """Of the child, as long as there is one."""
        return None if self._child is None else self._child.pid

    @property
    def started(self) -> bool:
        """Whether there is a supervisor, of ours or of our parent's."""
        return self._child is not None or self._inherited

    def ask(self, request: Request) -> Deferred[Answer]:
        """As `Slot.ask`, over the slot of this process."""
        if self.current is None:
            return fail(TemporaryFailure(NOT_NOW, "the helper has not been started"))
        return self.current.ask(request)

    @property
    def opens_spools(self) -> bool:
        """Whether it opens spools for this process, which was started by another."""
        return self.current is not None and self.current.spools is not None

    def open_spool(self, name: bytes) -> int | None:
        """As `SpoolSlot.open`, over the slot of this process; from any thread but the reactor's."""
        slot = self.current
        if slot is None or slot.spools is None:
            raise TemporaryFailure(NOT_NOW, "there is no helper that opens spools")
        return slot.spools.open(name)

    def _config(self) -> dict[str, Any]:
        return {
            "path": module_path(),
            "modules": {
                "supervisor": supervisor.__name__,
                "helper": helper.__name__,
                "selfservice": "popdrop.accounts.selfservice",
            },
            "registry": self._registry,
            "backends": self._texts,
        }

    def _describe(self) -> list[frozenset[str]]:
        if not self._texts:
            return []
        text = supervisor.config_file(supervisor.as_json({**self._config(), "describe": True}))
        try:
            done = subprocess.run(  # noqa: S603 - our own words
                supervisor.command("helper"),
                stdin=text,
                stdout=subprocess.PIPE,
                env=supervisor.environment(),
                cwd="/",
                timeout=START_SECONDS,
                check=False,
            )
            told = json.loads(done.stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError):
            raise ConfigError(
                f"--auth helper:{self._texts[0]}: the helper cannot be started; what it says is"
                " on standard error"
            ) from None
        finally:
            os.close(text)
        if "error" in told:
            raise ConfigError(told["error"])
        return [frozenset(kinds) for kinds in told["kinds"]]

    def start(self, uid: int, gid: int) -> None:
        """Start the supervisor and wait for its helper. Blocks; raises `ConfigError`.

        `uid` and `gid` are those that this process is going to have: the accounts are theirs.
        """
        pairs: list[tuple[socket.socket, socket.socket]] = []
        each = 0 if self.spool_rules is None else CHANNELS
        try:
            for _ in range(1 + self._count * (1 + each)):
                pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            self._listener = self._listen()
            self._spawn([there for _, there in pairs], uid, gid)
        except BaseException:
            for here, _ in pairs:
                here.close()
            raise
        finally:
            for _, there in pairs:
                there.close()
            if self._listener is not None:
                self._listener.close()
                self._listener = None
        self._lifeline = pairs[0][0]
        ends = [here for here, _ in pairs[1:]]
        connections, channels = ends[: self._count], ends[self._count :]
        try:
            self.slots = [
                Slot(connection, _await_hello(connection), _spools(channels, place, each))
                for place, connection in enumerate(connections)
            ]
        except BaseException:
            for end in ends:
                end.close()
            self.end_now()
            raise
        for connection in connections:
            connection.setblocking(False)
        self.current = self.slots[0]
        if os.geteuid() != 0:
            log.warn(
                "the helper runs without root's rights, as uid {uid}: it keeps the checkers in a"
                " process of their own, and can do no more than the server",
                uid=os.geteuid(),
            )

    def _spawn(self, ends: list[socket.socket], uid: int, gid: int) -> None:
        listeners = [] if self._listener is None else [self._listener.fileno()]
        more: dict[str, Any] = {}
        if self._self_service is not None:
            more = {
                "database": self._self_service.database,
                "key": self._self_service.key,
                "credentials": os.environ.get("CREDENTIALS_DIRECTORY"),
                "min_uid": self._self_service.min_uid,
                "owner": [uid, gid],
            }
        rules = self.spool_rules
        config = {
            **self._config(),
            "spools": None if rules is None else asdict(rules),
            "path": _safe_path(module_path(), uid),
            "parent": os.getpid(),
            "lifeline": ends[0].fileno(),
            "slots": [end.fileno() for end in ends[1 : 1 + self._count]],
            "channels": [end.fileno() for end in ends[1 + self._count :]],
            "listeners": listeners,
            # Up to the field with the reason, which the supervisor fills in.
            "down": bytes(encode_down(Down(""))[:-2]).hex(),
            **({"min_uid": 0} | more),
        }
        text = supervisor.config_file(supervisor.as_json(config))
        try:
            self._child = subprocess.Popen(  # noqa: S603 - our own words
                supervisor.command("supervisor"),
                stdin=text,
                env=supervisor.environment(),
                cwd="/",
                pass_fds=[*(end.fileno() for end in ends), *listeners],
                start_new_session=True,
                umask=0o077,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"--auth helper: {sys.executable} does not start: {error}") from None
        finally:
            os.close(text)

    def _listen(self) -> socket.socket | None:
        return None if self._self_service is None else doorman.listen(self._self_service.path)

    def attach(self, reactor: Any) -> None:
        """Let logins begin: from now on `reactor` serves the connection."""
        if self.current is not None:
            self.current.attach(reactor)

    async def stop(self, reactor: Any) -> None:
        """End the helper, and wait until it has: it ends since nobody can ask it any more."""
        self._let_go()
        until = reactor.seconds() + STOP_SECONDS
        while self._child is not None and self._child.poll() is None:
            if reactor.seconds() > until:
                log.error("helper supervisor pid {pid} does not end", pid=self._child.pid)
                break
            await deferLater(reactor, 0.01)
        self._child = None

    def end_now(self) -> None:
        """As `stop`, where there is no reactor. Blocks. Idempotent."""
        self._let_go()
        if self._child is not None:
            try:
                self._child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.error("helper supervisor pid {pid} does not end", pid=self._child.pid)
            self._child = None

    def _let_go(self) -> None:
        for slot in self.slots:
            slot.close()
        self.slots = []
        self.current = None
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None


def from_options(
    auth: Sequence[str], service: SelfService | None, slots: int = 1
) -> HelperProcess | None:
    """The helper that the strings of `--auth` and the self-service call for, or none.

    `slots` is the number of processes that serve. Raises `ConfigError`.
    """
    texts = [text.partition(":")[2] for text in auth if text.partition(":")[0] == "helper"]
    if not all(texts):
        raise ConfigError("--auth helper: say what it is to check by, as helper:pam:pop3")
    if service is not None and not os.path.isabs(service.path):
        raise ConfigError(f"--popauth-socket {service.path}: give the whole path, from / on")
    if not texts and service is None:
        return None
    return HelperProcess(texts, service, slots=slots)


def module_path() -> list[str]:
    """Where this process finds its modules; no folder that is only the current one."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(popdrop.__file__)))
    found = [entry for entry in sys.path if os.path.isabs(entry)]
    # Else it was found by the entry for the current folder, which is the first.
    return found if ours in found else [ours, *found]


def _safe_path(path: list[str], uid: int) -> list[str]:
    """Without folders that the user to come, or anybody, may write to, where the helper is root's.

    A helper that is started anew looks for its modules there: whoever has taken the server over
    would only have to put one there. Popdrop's own folder stays, with a warning.
    """
    if os.geteuid() != 0 or uid == 0:
        return path
    safe = []
    for entry in path:
        try:
            facts = os.stat(entry)
        except OSError:
            continue  # not there now, and nobody's to be made
        if facts.st_uid != uid and not facts.st_mode & 0o002:
            safe.append(entry)
        elif os.path.exists(os.path.join(entry, "popdrop", "accounts", "helper.py")):
            safe.append(entry)
            log.warn(
                "uid {uid} or anybody may write to {folder}, from which the helper takes its"
                " program: give it to root",
                uid=uid,
                folder=entry,
            )
    return safe


def _spools(channels: list[socket.socket], place: int, each: int) -> SpoolSlot | None:
    """Those of the slot at `place`: the helper counts in the same way."""
    return SpoolSlot(channels[place * each : (place + 1) * each]) if each else None


def _await_hello(connection: socket.socket) -> Hello:
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    until = time.monotonic() + START_SECONDS
    while waiting.poll(max(0.0, until - time.monotonic()) * 1000):
        record = connection.recv(LONGEST + 1)
        reply = decode_reply(record) if record else None
        if isinstance(reply, Hello):
            log.info("helper pid {pid} serves with uid {uid}", pid=reply.pid, uid=reply.uid)
            return reply
        why = reply.reason if isinstance(reply, Down) else "its supervisor ended"
        raise ConfigError(
            f"--auth helper: the helper ended at its start ({why}); what it says is on standard"
            " error"
        )
    raise ConfigError(f"--auth helper: the helper did not start within {START_SECONDS:g} s")
