"""`twistd popdrop`: options, and the service they describe. Where everything is put together.

The only module that knows concrete classes of all kinds.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, Final, cast

from twisted.application.service import Service
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.portal import Portal
from twisted.cred.strcred import InvalidAuthArgumentString, InvalidAuthType, makeChecker
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.plugin import getPlugins
from twisted.python import usage

import popdrop
from popdrop import certs, demo, listeners, record, throttle
from popdrop.accounts.checkers import AccountsChecker, Chain
from popdrop.accounts.database import AccountsDatabase, SystemFacts
from popdrop.errors import ConfigError
from popdrop.interfaces import IAccounts, IBlockingStore, IStore, IStoreFactory
from popdrop.inthreads import LOCK_TIMEOUT, InThreads
from popdrop.places import default_state_dir
from popdrop.policy import APOP_USERS, CLEARTEXT, LOOPBACK, STLS, Policy, network
from popdrop.protocol import POP3Factory, POP3Protocol, Timing
from popdrop.realm import Realm
from popdrop.spec import parse
from popdrop.threads import Pool
from popdrop.values import Account, Secret

log = Logger()

STORE_THREADS: Final = 16
"""Maildrops opened, read from disk or rewritten at once; more wait their turn."""
LOOKUP_THREADS: Final = 4
"""Account look-ups at once, apart from the store's, so that a slow disk stops no login."""
LOOK_EVERY: Final = 1.0
"""Seconds until the modes of the accounts database are looked at again: 17 us a look."""
HASH_THREADS: Final = 2
"""Argon2 hashes in flight: 19 MiB and a core each."""
SHORTEST_IDLE: Final = 600
"""Seconds, RFC 1939 section 3."""
DEFAULT_STORE: Final = "mbox:/var/mail/{user}"
LOOPBACK_LISTENERS: Final = (
    "tcp:{plain}:interface=127.0.0.1",
    "tcp6:{plain}:interface=\\:\\:1",
    "tls:{pem}:{tls}:interface=127.0.0.1",
    "tls:{pem}:{tls}:interface=\\:\\:1",
)
"""Both families, ports an ordinary user may have, nobody from outside."""
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?").fullmatch


class StartError(SystemExit, Exception):
    """Ends twistd with one line and status 1, in the foreground and as a daemon alike.

    As a `SystemExit` it prints no traceback; as an `Exception` it is what a daemon tells the
    process that waits for its start.
    """

    def __init__(self, line: str) -> None:
        super().__init__(line)
        # By now standard error is the log; this line is for whoever typed the command.
        sys.stderr = sys.__stderr__


def _word(option: str, words: tuple[str, ...]) -> Callable[[str], str]:
    def known(text: str) -> str:
        if text not in words:
            raise ValueError(f"--{option} takes one of {', '.join(words)}")
        return text

    return known


def _seconds(option: str) -> Callable[[str], float]:
    def known(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text):
            raise ValueError(f"--{option} takes a number of seconds, as 30")
        return float(text)

    return known


def _number(option: str) -> Callable[[str], int]:
    def known(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(f"--{option} takes a number, as 11")
        return int(text)

    return known


class Options(usage.Options):
    """The command line of `twistd popdrop`."""

    synopsis = "[options]"
    longdesc = (
        "A POP3 server for mail spools. Without options it serves /var/mail on loopback, port 1110"
        " with STLS and port 1995 with TLS, with accounts and a self-made certificate in the state"
        " folder. Try --demo. Accounts are made with `popdrop user add`."
    )
    optFlags = [
        ["demo", None, "Serve a throw-away maildrop and print two commands that read it."],
        ["allow-short-idle", None, "Allow an --idle-timeout below the 600 s of RFC 1939."],
        ["apop-only", None, "No login but by APOP: neither USER/PASS nor AUTH."],
    ]
    optParameters: list[list[Any]] = [
        ["store", None, DEFAULT_STORE, "Where maildrops are, KIND:ARGUMENTS."],
        ["state-dir", None, None, "Folder for accounts, locks and the self-made certificate."],
        ["starttls", None, None, "Certificate of STLS: a PEM file or a folder. [self-made]"],
        ["stls", None, "offer", f"STLS: {', '.join(STLS)}.", _word("stls", STLS)],
        [
            "cleartext",
            None,
            "tls",
            f"Passwords without TLS: {', '.join(CLEARTEXT)}; as qpopper's clear-text-password.",
            _word("cleartext", CLEARTEXT),
        ],
        [
            "apop-users",
            None,
            "refuse",
            "May accounts with an APOP secret log in by password too: refuse, allow.",
            _word("apop-users", APOP_USERS),
        ],
        ["min-uid", None, 11, "System accounts below are refused.", _number("min-uid")],
        ["throttle", None, "memory", "off, or memory[:KEY=NUMBER...]: attempts and connections."],
        [
            "lock-timeout",
            None,
            LOCK_TIMEOUT,
            "Seconds to wait for a mail program's lock.",
            _seconds("lock-timeout"),
        ],
        ["idle-timeout", None, 600.0, "Seconds, after login.", _seconds("idle-timeout")],
        ["login-timeout", None, 60.0, "Seconds from connect to login.", _seconds("login-timeout")],
        [
            "takeover",
            None,
            0.0,
            "Seconds of idleness after which a session yields to a new one of its user; 0: never.",
            _seconds("takeover"),
        ],
        ["grace", None, 30.0, "Seconds for commands in progress at a stop.", _seconds("grace")],
        ["hostname", None, None, "This server's name. [the machine's]"],
    ]
    _several = ("listen", "auth", "session-log", "local-net")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name in self._several:
            self[name] = []

    def opt_listen(self, text: str) -> None:
        """Listen here, a strports string: tcp:110, tls:PEM:995, tcp6:110, ... Repeatable."""
        self["listen"].append(text)

    def opt_auth(self, text: str) -> None:
        """Verify logins so: accounts:FILE, or a checker of Twisted's. Repeatable, in order."""
        self["auth"].append(text)

    def opt_session_log(self, text: str) -> None:
        """Log sessions as plain, json, qpopper or sqmail[:SINK]. Repeatable. [plain]"""
        self["session-log"].append(text)

    def opt_local_net(self, text: str) -> None:
        """A network that counts as local beside loopback, for --cleartext. Repeatable."""
        self["local-net"].append(text)

    def opt_version(self) -> None:
        """Print Popdrop's version."""
        sys.stdout.write(f"Popdrop {popdrop.__version__}\n")
        raise SystemExit(0)

    def parseOptions(self, options: Any = None) -> None:
        """Twisted prints all of --help before an error; here the error stands alone."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as error:
            words = " ".join(str(error).split()).removeprefix("Parameter type enforcement failed: ")
            raise SystemExit(f"popdrop: {words}; see twistd popdrop --help") from None

    def parseArgs(self, *arguments: str) -> None:
        """There are none."""
        if arguments:
            raise usage.UsageError(f"{arguments[0]}: only options are taken")

    def postOptions(self) -> None:
        """What can be told before anything is opened."""
        if self["idle-timeout"] < SHORTEST_IDLE and not self["allow-short-idle"]:
            raise usage.UsageError(
                f"--idle-timeout {self['idle-timeout']:g}: RFC 1939 wants {SHORTEST_IDLE} s at"
                " least; add --allow-short-idle to have it all the same"
            )
        if self["hostname"] is not None and not _HOSTNAME(self["hostname"]):
            raise usage.UsageError(f"--hostname {self['hostname']}: not a host name")


def makeService(options: Options) -> Popdrop:
    """The service that `options` describe. A wrong option ends the program with one line."""
    from twisted.internet import reactor

    try:
        return Popdrop(options, reactor)
    except ConfigError as error:
        raise SystemExit(f"popdrop: {error}") from None


def _is_loopback(listen: str) -> bool:
    interface = parse("--listen", listen).kwargs.get("interface", "")
    try:
        return ip_address(interface).is_loopback
    except ValueError:
        return False


def _machine_name() -> str:
    name = socket.gethostname()
    return name if _HOSTNAME(name) else "localhost"


def _private_folder(option: str, path: str) -> str:
    path = os.path.abspath(path)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, "not writable")
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: {error.strerror}; name a folder that this user may write to"
        ) from None
    return path


class Popdrop(Service):
    """Listeners, portal, store and pools, started and stopped in order."""

    name = "popdrop"

    def __init__(self, options: Options, reactor: Any) -> None:
        self._options = options
        self._reactor = reactor
        self._ports: list[IListeningPort] = []
        self._factories: list[POP3Factory] = []
        self._pools: list[Pool] = []
        self._listeners: list[listeners.Listener] = []
        self._demo_dir: str | None = None
        self._keyring = certs.Keyring()
        self._databases: list[AccountsDatabase] = []
        self._tidy: Callable[[], None] | None = None
        self.hostname = options["hostname"] or _machine_name()
        try:
            self._assemble()
        except BaseException:
            self._forget_demo()
            raise

    # Putting together

    def _assemble(self) -> None:
        options, reactor = self._options, self._reactor
        if options["demo"]:
            self._make_demo()
        default = default_state_dir(os.environ, os.geteuid())
        self.state_dir = _private_folder("--state-dir", options["state-dir"] or default)
        self._store_pool = self._pool("popdrop-store", STORE_THREADS)
        self._lookup_pool = self._pool("popdrop-lookup", LOOKUP_THREADS)
        self._hash_pool = self._pool("popdrop-hash", HASH_THREADS)
        checkers = self._checkers()
        tls = self._stls_certificates()
        chain = Chain(checkers)
        kinds = {kind for checker in checkers for kind in checker.credentialInterfaces}
        apop = IUsernameHashedPassword in kinds
        if options["apop-only"] and not apop:
            raise ConfigError("--apop-only: no --auth can verify APOP; use --auth accounts:FILE")
        policy = self._policy(apop, tls is not None)
        self._throttle = throttle.from_spec(options["throttle"], reactor)
        logs = [record.from_spec(text) for text in options["session-log"] or ["plain"]]
        self._session_log = record.Several(logs)
        realm = Realm(
            self._store(), self._lookup_pool, self._accounts, self._system_account, policy
        )
        portal = Portal(realm)
        portal.registerChecker(cast("ICredentialsChecker", chain), *kinds)
        timing = Timing(options["login-timeout"], options["idle-timeout"])
        holders: dict[bytes, POP3Protocol] = {}
        for listener in self._parsed_listeners():
            self._listeners.append(listener)
            self._factories.append(
                POP3Factory(
                    portal,
                    replace(policy, stls="off") if listener.implicit_tls else policy,
                    self._throttle,
                    self._session_log,
                    reactor,
                    timing=timing,
                    tls=tls,
                    implicit_tls=listener.implicit_tls,
                    trusted_address=listener.trusted_address,
                    listener=listener.text,
                    proof_key=self._throttle.proof_key,
                    takeover=options["takeover"],
                    holders=holders,
                )
            )
        self._refuse_root()

    def _pool(self, name: str, threads: int) -> Pool:
        pool = Pool(self._reactor, name, threads)
        self._pools.append(pool)
        return pool

    def _policy(self, apop: bool, can_stls: bool) -> Policy:
        options = self._options
        only = bool(options["apop-only"])
        return Policy(
            cleartext="never" if only else options["cleartext"],
            apop_users=options["apop-users"],
            stls=options["stls"] if can_stls else "off",
            apop=apop,
            mechanisms=() if only else (b"PLAIN",),
            local=LOOPBACK + tuple(network("--local-net", t) for t in options["local-net"]),
            min_uid=options["min-uid"],
            hostname=self.hostname,
            implementation=f"Popdrop-{popdrop.__version__}",
        )

    def _system_account(self, name: bytes) -> Account:
        entry = self._system.of(name)
        if entry is None:
            return Account(name)
        return Account(name, uid=entry.pw_uid, gid=entry.pw_gid, home=entry.pw_dir)

    def _checkers(self) -> list[Any]:
        self._system = SystemFacts()
        self._accounts: list[IAccounts] = []
        checkers: list[Any] = []
        for text in self._options["auth"] or [self._default_accounts()]:
            kind, _, argument = text.partition(":")
            if kind == "accounts":
                path = os.path.abspath(argument or self._default_database())
                database = AccountsDatabase(path, look_every=LOOK_EVERY)
                self._databases.append(database)
                self._accounts.append(database)
                checkers.append(
                    AccountsChecker(database, self._lookup_pool, self._hash_pool, database.can_apop)
                )
            else:
                checkers.append(self._foreign_checker(text))
        return checkers

    def _default_database(self) -> str:
        return os.path.join(self.state_dir, "accounts.db")

    def _default_accounts(self) -> str:
        path = self._default_database()
        if AccountsDatabase.create(path):
            log.info("made {path}", path=path)
        return f"accounts:{path}"

    def _foreign_checker(self, text: str) -> Any:
        try:
            checker = makeChecker(text)  # type: ignore[no-untyped-call]
        except InvalidAuthType:
            raise ConfigError(
                f"--auth {text}: no such kind of checker; use accounts:FILE, or one that"
                " twistd web --help-auth lists"
            ) from None
        except (InvalidAuthArgumentString, TypeError, ValueError) as error:
            raise ConfigError(f"--auth {text}: {' '.join(str(error).split())}") from None
        usable = {IUsernamePassword, IUsernameHashedPassword}
        if not usable.intersection(checker.credentialInterfaces):
            raise ConfigError(f"--auth {text}: verifies nothing that POP3 has; use accounts:FILE")
        return checker

    def _stls_certificates(self) -> object | None:
        options = self._options
        path = options["starttls"]
        if options["stls"] == "off":
            if path is not None:
                raise ConfigError("--starttls is given, but --stls is off; leave one of them out")
            return None
        if path is None:
            return self._keyring.get(self._self_made(), option="the self-made certificate")
        return self._keyring.get(path, option=f"--starttls {path}")

    def _self_made(self) -> str:
        return certs.self_made(self.state_dir, self.hostname)

    def _parsed_listeners(self) -> list[listeners.Listener]:
        texts = self._options["listen"]
        self._default_listeners = not texts
        if not texts:
            quoted = self._self_made().replace("\\", "\\\\").replace(":", "\\:")
            texts = [text.format(plain=1110, tls=1995, pem=quoted) for text in LOOPBACK_LISTENERS]
        return [listeners.from_spec(self._reactor, text, self._keyring) for text in texts]

    def _store(self) -> IStore:
        text = self._options["store"]
        spec = parse("--store", text)
        factories = {factory.kind: factory for factory in getPlugins(IStoreFactory)}
        factory = factories.get(spec.kind)
        if factory is None:
            kinds = ", ".join(sorted(factories)) or "none: is Popdrop installed?"
            raise ConfigError(f"--store {text}: no such kind; known are: {kinds}")
        store = factory.make(self._reactor, self.state_dir, *spec.args, **spec.kwargs)
        if IBlockingStore.providedBy(store):
            self._tidy = store.tidy
            return InThreads(
                store,
                self._store_pool,
                self._reactor,
                self._options["lock-timeout"],
            )
        return cast("IStore", store)

    def _refuse_root(self) -> None:
        """Root serves strangers only after twistd has given the rights away (decision 18)."""
        parent: Any = self._options.parent or {}
        if os.geteuid() != 0 or self._options["demo"] or parent.get("uid") is not None:
            return
        if all(_is_loopback(each.text) for each in self._listeners):
            log.warn(
                "running as root, so on loopback only; better: twistd --uid popdrop --gid mail"
            )
            return
        raise ConfigError(
            "started as root: name the user to serve as, for example"
            " twistd --uid popdrop --gid mail popdrop ..., or listen on 127.0.0.1 only"
        )

    # Demo

    def _make_demo(self) -> None:
        options = self._options
        for name in ("auth", "listen"):
            if options[name]:
                raise ConfigError(f"--demo makes its own; leave --{name} out")
        self._demo_dir = tempfile.mkdtemp(prefix="popdrop-demo-")
        options["state-dir"] = self._demo_dir
        spools = os.path.join(self._demo_dir, "mail")
        os.mkdir(spools, 0o700)
        self._demo_count = demo.write_spool(os.path.join(spools, demo.USER), time.time())
        options["store"] = "mbox:" + spools.replace(":", "\\:") + "/{user}"
        self._demo_secret = secrets.token_hex(16)
        path = os.path.join(self._demo_dir, "accounts.db")
        AccountsDatabase.create(path)
        database = AccountsDatabase(path)
        words = Secret(self._demo_secret.encode("ascii"))
        database.add(demo.USER.encode("ascii"), words, words)
        database.close()

    def _forget_demo(self) -> None:
        if self._demo_dir is not None:
            shutil.rmtree(self._demo_dir, ignore_errors=True)
            self._demo_dir = None

    def _tell_demo(self) -> None:
        def port(implicit: bool) -> int:
            for listener, bound in zip(self._listeners, self._ports, strict=False):
                if listener.implicit_tls is implicit:
                    return int(bound.getHost().port)  # type: ignore[attr-defined]
            return 0

        login = f"--login-options 'AUTH=+APOP' --user {demo.USER}:{self._demo_secret}"
        text = (
            f"\nPopdrop serves {self._demo_count} mails of {demo.USER}, until you press Ctrl-C."
            " Try in another terminal:\n\n"
            f"  curl {login} pop3://127.0.0.1:{port(False)}/1\n"
            f"  curl --cacert {self._self_made()} {login} pop3s://127.0.0.1:{port(True)}/\n\n"
        )
        out = sys.__stdout__
        if out is not None:
            out.write(text)
            out.flush()

    # Running

    def listening_on(self) -> list[str]:
        """The strings of all listeners."""
        return [listener.text for listener in self._listeners]

    def discard(self) -> None:
        """Let go of what was made for a service that is not to be started."""
        for database in self._databases:
            database.close()
        self._session_log.close()
        self._forget_demo()

    def privilegedStartService(self) -> None:
        """Listen, while the rights of the start are still there."""
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        self._listen()
        self._hand_over()

    def _listen(self) -> None:
        if self._ports:
            return
        pairs = list(zip(self._listeners, self._factories, strict=True))
        self._listeners = []
        for listener, factory in pairs:
            outcome: list[Any] = []
            listeners.listen(listener, factory).addBoth(outcome.append)
            if not outcome:
                raise StartError(f"popdrop: --listen {listener.text}: did not listen at once")
            port = outcome[0]
            if IListeningPort.providedBy(port):
                self._listeners.append(listener)
                self._ports.append(port)
                continue
            if self._default_listeners and "\\:" in listener.text.rpartition("interface")[2]:
                continue  # a machine without IPv6
            self._let_go_of_ports()
            self._forget_demo()
            raise StartError(f"popdrop: {port.value}")

    def _let_go_of_ports(self) -> None:
        for port in self._ports:
            port.stopListening()
        self._ports = []

    def _hand_over(self) -> None:
        """Give what root made in the state folder to the user that twistd will become."""
        parent: Any = self._options.parent or {}
        uid, gid = parent.get("uid"), parent.get("gid")
        if os.geteuid() != 0 or uid is None:
            return
        for folder, _, files in os.walk(self.state_dir):
            for path in [folder, *(os.path.join(folder, name) for name in files)]:
                if os.lstat(path).st_uid == 0:
                    os.chown(path, uid, -1 if gid is None else gid, follow_symlinks=False)

    def startService(self) -> None:
        """Serve."""
        super().startService()  # type: ignore[no-untyped-call]
        self._listen()
        for pool in self._pools:
            pool.start()
        if self._tidy is not None:
            self._store_pool.run(self._tidy).addErrback(
                lambda failure: log.failure("tidying up failed", failure=failure)
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, self._hung_up)
        self._tell()

    def _hung_up(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self.reload)

    def reload(self) -> None:
        """SIGHUP: log files are opened anew, for logrotate. No session is dropped."""
        log.info("opening the session logs anew")
        self._session_log.reopen()

    def _tell(self) -> None:
        for listener, port in zip(self._listeners, self._ports, strict=True):
            host = port.getHost()
            where = getattr(host, "host", None)
            log.info(
                "POP3 on {where}, {how}",
                where=f"{where} port {host.port}" if where else listener.text,  # type: ignore[attr-defined]
                how="TLS" if listener.implicit_tls else f"STLS {self._factories[0].policy.stls}",
            )
        if self._demo_dir is not None:
            self._tell_demo()
            return
        for database in self._databases:
            if not database.names():
                log.warn(
                    "{path} holds no account; add one with: popdrop user add --db {path} NAME",
                    path=database.path,
                )

    async def _stop(self) -> None:
        for port in self._ports:
            await (port.stopListening() or _nothing())
        for factory in self._factories:
            await factory.stop(self._options["grace"])
        for pool in self._pools:
            pool.stop()
        self.discard()

    def stopService(self) -> Deferred[None]:
        """Stop listening, let what is in progress end, then stop the threads."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())


def _nothing() -> Deferred[None]:
    done: Deferred[None] = Deferred()
    done.callback(None)
    return done
