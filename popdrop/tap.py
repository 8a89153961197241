"""`twistd popdrop`: options, and the service they describe. Where everything is put together.

The only module that knows concrete classes of all kinds. Over 400 lines since they meet nowhere
else.
"""

from __future__ import annotations

import gc
import os
import pwd
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Any, Final, cast

from twisted.application.service import Service
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.portal import Portal
from twisted.cred.strcred import InvalidAuthArgumentString, InvalidAuthType, makeChecker
from twisted.internet.defer import (
    Deferred,
    DeferredList,
    gatherResults,
    maybeDeferred,
    succeed,
)
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.plugin import getPlugins
from twisted.python.failure import Failure

import popdrop
from popdrop import certs, inherited, listeners, notify, record, throttle
from popdrop.accepting import outlive_shortage
from popdrop.accounts import backends, helperclient, oidc
from popdrop.accounts.checkers import (
    AccountsChecker,
    Answers,
    BackendChecker,
    Chain,
    Recent,
)
from popdrop.accounts.database import AccountsDatabase, SystemFacts
from popdrop.accounts.rosters import RosterFiles
from popdrop.asowner import give
from popdrop.demo import Demo
from popdrop.errors import ConfigError
from popdrop.factory import POP3Factory
from popdrop.handing import OPENER
from popdrop.interfaces import (
    IAccounts,
    IBearerToken,
    IBlockingStore,
    IExternal,
    IScramCredentials,
    IStore,
    IStoreFactory,
)
from popdrop.inthreads import InThreads
from popdrop.ops import grants, metrics, relay
from popdrop.ops.gate import HOSTS_ALLOW, HOSTS_DENY, Gate
from popdrop.options import Options, machine_name
from popdrop.places import default_state_dir
from popdrop.policy import (
    LOOPBACK,
    Policy,
    Timing,
    Variation,
    folding,
    network,
    networks,
    variation,
)
from popdrop.protocol import POP3Protocol
from popdrop.realm import Realm
from popdrop.sasl import MECHANISMS
from popdrop.spec import parse, quoted
from popdrop.threads import Pool
from popdrop.values import Network
from popdrop.workers import Handed, Workers

log = Logger()

STORE_THREADS: Final = 16
"""Maildrops opened, read from disk or rewritten at once; more wait their turn."""
LOOKUP_THREADS: Final = 4
"""Account look-ups at once, apart from the store's, so that a slow disk stops no login."""
LOOK_SECONDS: Final = 60.0
"""Seconds between two looks at the files of certificates and lists of names."""
ENDINGS: Final = ("", "-wal", "-shm", ".key")
"""Of the files that make an accounts database."""
GARBAGE_OBJECTS: Final = 10_000
"""New objects after which garbage is looked for: sessions make little of it, in cycles."""
SWITCH_SECONDS: Final = 0.001
"""How long a thread that scans a spool may keep the interpreter from the reactor; Python's own
interval is 5 ms, and a turn of the reactor may have to wait for it several times."""
LOOK_EVERY: Final = 1.0
"""Seconds until the modes of the accounts database are looked at again: 17 us a look."""
HIDDEN: Final = frozenset({b"CRAM-MD5", b"LOGIN"})
"""Mechanisms that CAPA tells of only when `--sasl` names them. LOGIN is PLAIN in worse words. Only
accounts with an APOP secret can use CRAM-MD5, and clients that see it (curl, fetchmail) then try
nothing else."""
HASH_THREADS: Final = 2
"""Argon2 hashes in flight: 19 MiB and a core each."""
HASH_NICE: Final = 10
"""Nice value of these threads: sessions that are logged in go before logins."""
AUTH_THREADS: Final = 8
"""Logins at once that wait for PAM and for checkpassword programs. Hashes have their own cap."""
FOR_WORKERS: Final = ("tcp", "tcp6", "tls", "ssl", "unix", "systemd")
"""Kinds of listeners that several processes can accept from (decision 33)."""
EVERYWHERE: Final = Variation()
"""Of a listener without a `--listen-policy`."""
NO_APOP: Final = (
    "no --auth can verify APOP, and nobody could log in; use accounts:FILE with its key beside it,"
    " passwd:FILE:scheme=plain, or checkpassword:PROG:apop=yes"
)
LOOPBACK_LISTENERS: Final = (
    "tcp:{plain}:interface=127.0.0.1",
    "tcp6:{plain}:interface=\\:\\:1",
    "tls:{pem}:{tls}:interface=127.0.0.1",
    "tls:{pem}:{tls}:interface=\\:\\:1",
)
"""Both families, ports an ordinary user may have, nobody from outside."""


class StartError(SystemExit, Exception):
    """Ends twistd with one line and status 1, in the foreground and as a daemon alike.

    As a `SystemExit` it prints no traceback; as an `Exception` it is what a daemon tells the
    process that waits for its start.
    """

    def __init__(self, line: str) -> None:
        super().__init__(line)
        # By now standard error is the log; this line is for whoever typed the command.
        sys.stderr = sys.__stderr__


def makeService(options: Options) -> Popdrop:
    """The service that `options` describe. A wrong option ends the program with one line."""
    from twisted.internet import reactor

    try:
        return Popdrop(options, reactor)
    except ConfigError as error:
        raise SystemExit(f"popdrop: {error}") from None


def _credentials_of(mechanism: bytes) -> Any:
    """The interface of the credentials that a SASL mechanism ends in."""
    if mechanism.startswith(b"SCRAM-"):
        return IScramCredentials
    return {
        b"EXTERNAL": IExternal,
        b"OAUTHBEARER": IBearerToken,
        b"XOAUTH2": IBearerToken,
        b"CRAM-MD5": IUsernameHashedPassword,
    }.get(mechanism, IUsernamePassword)


def _is_local(listener: listeners.Listener) -> bool:
    """Whether only this machine can reach it."""
    text = listener.text[len("haproxy:") if listener.scheme == "haproxy" else 0 :]
    spec = parse("--listen", text)
    if listener.descriptor is not None:
        return inherited.is_local(listener.descriptor)
    if spec.kind.lower() == "unix" or listener.is_pipe:
        return True
    interface = spec.kwargs.get("interface", "")
    try:
        return ip_address(interface).is_loopback
    except ValueError:
        return False


def _set_options(port: Any) -> bool:
    """Set on a listening TCP socket what its connections inherit (tcp(7)); `False`: it has none."""
    listening = getattr(port, "socket", None)
    if listening is None or listening.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return True


def _allow_many_files() -> None:
    # A session needs three: its socket, its spool and its session lock.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leave_no_core() -> None:
    # It would hold passwords and the key of the sealed secrets.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"  # it has been removed


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _private_folder(option: str, path: str) -> tuple[str, bool]:
    """The folder, made if it is not there, and whether it was."""
    path = os.path.abspath(path)
    made = not os.path.exists(path)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, "not writable")
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: {error.strerror}; name a folder that this user may write to"
        ) from None
    return path, made


class Popdrop(Service):
    """Listeners, portal, store and pools, started and stopped in order."""

    name = "popdrop"

    def __init__(
        self,
        options: Options,
        reactor: Any,
        handed: Handed | None = None,
        ask_others: Callable[[bytes], None] | None = None,
    ) -> None:
        """`handed` is what a worker has from its parent, `None` in a process of its own.

        `ask_others` is for the other workers' `yield_to`.
        """
        self._options = options
        self._reactor = reactor
        self._handed = handed
        self._ask_others = ask_others
        self._holders: dict[bytes, POP3Protocol] = {}
        self._folder = _current_folder()
        self._workers: Workers | None = None
        self._table: int | None = None
        self._ports: list[IListeningPort] = []
        self._factories: list[POP3Factory] = []
        self._pools: list[Pool] = []
        self._listeners: list[listeners.Listener] = []
        self._demo: Demo | None = None
        self._keyring = certs.Keyring(options["client-ca"])
        self._databases: list[AccountsDatabase] = []
        self._helper: helperclient.HelperProcess | None = None
        self._tidy: Callable[[], None] | None = None
        self._looking: LoopingCall | None = None
        self._living: LoopingCall | None = None
        self._stopping = False
        path = None if handed is not None else options["metrics"]
        self._metrics = metrics.MetricsFile(os.path.abspath(path)) if path else None
        self.hostname = options["hostname"] or machine_name()
        try:
            self._assemble()
        except BaseException:
            self._forget_demo()
            raise

    # Putting together

    def _assemble(self) -> None:
        options, reactor = self._options, self._reactor
        parent: Any = options.parent or {}
        if self._leads and parent.get("chroot"):
            raise ConfigError("--workers: they would not find Python under --chroot; leave it out")
        if options["demo"]:
            self._make_demo()
        default = default_state_dir(os.environ, os.geteuid())
        self.state_dir, self._made_state_dir = _private_folder(
            "--state-dir", options["state-dir"] or default
        )
        self._make_pools()
        checkers = self._checkers()
        self._variations = {
            number: variation("--listen-policy", text)
            for number, text in options["listen-policy"].items()
        }
        tls = self._stls_certificates()
        kinds = {kind for checker in checkers for kind in checker.credentialInterfaces}
        self._takes_cram = any(
            IUsernameHashedPassword in checker.credentialInterfaces
            and getattr(checker, "takes_cram", True)
            for checker in checkers
        )
        policy = self._policy(kinds, tls is not None)
        self._make_counts_and_logs()
        portal = self._portal(checkers, kinds, policy)
        answers = self._answers()
        timing = Timing(options["login-timeout"], options["idle-timeout"], options["write-timeout"])
        self._gate = self._access()
        self._relay = relay.from_options(
            options,
            reactor,
            self._lookup_pool,
            self.state_dir,
            self._proxies(),
            leads=self._handed is None,
        )
        for number, listener in enumerate(self._parsed_listeners()):
            own = self._policy_of(number, listener, policy)
            self._listeners.append(listener)
            self._factories.append(self._factory(listener, own, portal, tls, timing, answers))
        self._refuse_root()
        if self._leads:
            self._table = throttle.common_table(options["throttle"])

    def _factory(
        self,
        listener: listeners.Listener,
        policy: Policy,
        portal: Portal,
        tls: object | None,
        timing: Timing,
        answers: Answers,
    ) -> POP3Factory:
        return POP3Factory(
            portal,
            policy,
            self._throttle,
            self._session_log,
            self._reactor,
            timing=timing,
            tls=tls,
            implicit_tls=listener.implicit_tls,
            trusted_address=listener.trusted_address,
            proxied=listener.scheme == "haproxy",
            emptied=self._end if listener.scheme == "stdio" else None,
            listener=listener.text,
            proof_key=self._throttle.proof_key,
            takeover=self._options["takeover"],
            holders=self._holders,
            ask_others=self._ask_others,
            answers=answers,
            gate=self._gate,
            relay=self._relay,
        )

    def _make_counts_and_logs(self) -> None:
        options, reactor = self._options, self._reactor
        handed = self._handed
        inherited = None if handed is None else handed.table
        self._throttle = throttle.from_spec(options["throttle"], reactor, self._owners(), inherited)
        moved = None if handed is None else handed.logs
        logs = [record.from_spec(text, moved) for text in options["session-log"] or ["plain"]]
        self._session_logs = logs
        self._session_log = record.Several(logs)

    @property
    def _leads(self) -> bool:
        """Whether others serve, and this process starts them."""
        return self._handed is None and self._options["workers"] > 0

    def _access(self) -> Gate | None:
        options = self._options
        allowed, denied = (
            tuple(network(f"--{name}", text) for text in options[name])
            for name in ("allow-net", "deny-net")
        )
        files = None
        if options["tcp-wrappers"]:
            paths = options["hosts-allow"] or HOSTS_ALLOW, options["hosts-deny"] or HOSTS_DENY
            files = os.path.abspath(paths[0]), os.path.abspath(paths[1])
        if not (allowed or denied or files):
            return None
        return Gate(self._reactor, allowed, denied, files)

    def _policy_of(self, number: int, listener: listeners.Listener, policy: Policy) -> Policy:
        """The rules of one listener: those of all, changed by its `--listen-policy`."""
        own = self._variations.get(number, EVERYWHERE)
        if own.apop_only and not policy.apop:
            raise ConfigError(f"--listen-policy apop-only: {NO_APOP}")
        policy = own(policy)
        if self._options["apop-only"]:
            policy = replace(policy, cleartext="never")
        return policy if listener.can_stls else replace(policy, stls="off")

    def _stls_of(self, number: int) -> str:
        """The word that holds for one listener: its own, or that of `--stls`."""
        own = self._variations.get(number, EVERYWHERE).stls
        return str(self._options["stls"]) if own is None else own

    def _portal(self, checkers: list[Any], kinds: set[Any], policy: Policy) -> Portal:
        options = self._options
        self._rosters = RosterFiles(
            options["auth-file"],
            options["nonauth-file"],
            bool(options["require-shell"]),
            policy.folding,
        )
        realm = Realm(
            self._store(),
            self._lookup_pool,
            self._accounts,
            self._system.completed,
            policy,
            self._rosters.current,
        )
        portal = Portal(realm)
        # One needs no chain: that it does not know somebody is a refusal like any other.
        chain = checkers[0] if len(checkers) == 1 else Chain(checkers)
        portal.registerChecker(cast("ICredentialsChecker", chain), *kinds)
        return portal

    def _answers(self) -> Answers:
        if self._options["wording"] == "strict" and not self._databases:
            raise ConfigError(
                "--wording strict: asks who has an APOP secret; add --auth accounts:FILE"
            )
        with_key = [database for database in self._databases if database.can_apop]
        return Answers(self._databases, with_key, self._lookup_pool)

    def _offers_apop(self, kinds: set[Any]) -> bool:
        apop = IUsernameHashedPassword in kinds
        if self._options["apop-only"] and not apop:
            raise ConfigError(f"--apop-only: {NO_APOP}")
        return apop

    def _owners(self) -> tuple[int, ...]:
        """Whose files are ours: at a start as root also those of the user to come."""
        parent: Any = self._options.parent or {}
        uid = parent.get("uid")
        return (os.geteuid(),) if uid is None else (os.geteuid(), int(uid))

    def _make_pools(self) -> None:
        self._store_pool = self._pool("popdrop-store", STORE_THREADS)
        self._lookup_pool = self._pool("popdrop-lookup", LOOKUP_THREADS)
        # What computes for long, or runs programs that do, is not kept to a worker's processor.
        anywhere = () if self._handed is None else self._handed.processors
        self._hash_pool = self._pool("popdrop-hash", HASH_THREADS, HASH_NICE, anywhere)
        self._auth_pool = self._pool("popdrop-auth", AUTH_THREADS, processors=anywhere)

    def _pool(
        self, name: str, threads: int, nice: int = 0, processors: Collection[int] = ()
    ) -> Pool:
        pool = Pool(self._reactor, name, threads, nice, processors)
        self._pools.append(pool)
        return pool

    def _mechanisms(self, kinds: set[Any]) -> tuple[bytes, ...]:
        """Those of `--sasl`, else all that a checker can verify, the strongest first."""
        if self._options["apop-only"]:
            return ()
        possible = [name for name in MECHANISMS if _credentials_of(name) in kinds]
        if b"CRAM-MD5" in possible and not self._takes_cram:
            possible.remove(b"CRAM-MD5")
        if self._options["client-ca"] is None and b"EXTERNAL" in possible:
            possible.remove(b"EXTERNAL")
        wanted: tuple[bytes, ...] | None = self._options["sasl"]
        for name in wanted or ():
            if name not in possible:
                needs = (
                    "--client-ca FILE" if name == b"EXTERNAL" else "an --auth that can verify it"
                )
                raise ConfigError(f"--sasl {name.decode('ascii')}: needs {needs}; or leave it out")
        return tuple(possible) if wanted is None else wanted

    def _policy(self, kinds: set[Any], can_stls: bool) -> Policy:
        options = self._options
        only = bool(options["apop-only"])
        return Policy(
            cleartext="never" if only else options["cleartext"],
            apop_users=options["apop-users"],
            wording=options["wording"],
            folding=folding("--user-names", options["user-names"] or ""),
            stls=options["stls"] if can_stls else "off",
            apop=self._offers_apop(kinds),
            mechanisms=self._mechanisms(kinds),
            hidden=HIDDEN if options["sasl"] is None else frozenset(),
            local=LOOPBACK + tuple(network("--local-net", t) for t in options["local-net"]),
            min_uid=options["min-uid"],
            hostname=self.hostname,
            implementation=f"Popdrop-{popdrop.__version__}",
        )

    def _checkers(self) -> list[Any]:
        self._system = SystemFacts()
        self._accounts: list[IAccounts] = []
        checkers: list[Any] = []
        texts = self._options["auth"] or [self._default_accounts()]
        self._helper = self._make_helper(texts)
        helped = iter([] if self._helper is None else self._helper.checkers())
        for text in texts:
            kind = text.partition(":")[0]
            if kind == "accounts":
                checkers.append(self._accounts_checker(text))
            elif kind == "helper":
                checkers.append(next(helped))
            else:
                checkers.append(self._foreign_checker(text))
        return checkers

    def _accounts_checker(self, text: str) -> AccountsChecker:
        spec = parse("--auth", text)
        unknown = spec.kwargs.keys() - {"key"}
        if unknown or len(spec.args) > 1:
            raise ConfigError(f"--auth {text}: write accounts:FILE or accounts:FILE:key=SOURCE")
        path = os.path.abspath((spec.args and spec.args[0]) or self._default_database())
        database = AccountsDatabase(path, look_every=LOOK_EVERY, key=spec.kwargs.get("key"))
        self._databases.append(database)
        self._accounts.append(database)
        seconds = self._options["login-cache"]
        return AccountsChecker(
            database,
            self._lookup_pool,
            self._hash_pool,
            database.can_apop,
            recent=Recent(seconds) if seconds else None,
        )

    def _make_helper(self, auth: list[str]) -> helperclient.HelperProcess | None:
        if self._handed is not None:
            helper = self._handed.helper
            return None if helper is None else helperclient.HelperProcess.inherited(helper)
        path = self._options["popauth-socket"]
        accounts = next((text for text in auth if text.partition(":")[0] == "accounts"), None)
        service = None
        if path is not None:
            if accounts is None:
                raise ConfigError("--popauth-socket: there is no --auth accounts:FILE to change")
            spec = parse("--auth", accounts)
            database = os.path.realpath((spec.args and spec.args[0]) or self._default_database())
            service = helperclient.SelfService(
                path, database, spec.kwargs.get("key"), self._options["min-uid"]
            )
        return helperclient.from_options(auth, service, self._options["workers"] or 1)

    def _default_database(self) -> str:
        return os.path.join(self.state_dir, "accounts.db")

    def _default_accounts(self) -> str:
        path = self._default_database()
        if AccountsDatabase.create(path):
            log.info("made {path}", path=path)
        return f"accounts:{quoted(path)}"

    def _foreign_checker(self, text: str) -> Any:
        if text.partition(":")[0] == "oidc":
            return oidc.from_spec(text, self._reactor, self._lookup_pool)
        backend = backends.make("--auth", text)
        if backend is not None:
            pool = self._hash_pool if backends.uses_processor(text) else self._auth_pool
            return BackendChecker(backend, pool)
        try:
            checker = makeChecker(text)  # type: ignore[no-untyped-call]
        except InvalidAuthType:
            raise ConfigError(
                f"--auth {text}: no such kind of checker; use accounts:FILE, or one that"
                " twistd popdrop --help-auth lists"
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
        count = len(options["listen"]) or 1
        if all(self._stls_of(number) == "off" for number in range(count)):
            if path is not None:
                raise ConfigError("--starttls is given, but --stls is off; leave one of them out")
            return None
        if path is None:
            return self._keyring.get(self._self_made(), option="the self-made certificate")
        return self._keyring.get(path, option=f"--starttls {path}")

    def _self_made(self) -> str:
        return certs.self_made(self.state_dir, self.hostname)

    def _proxies(self) -> tuple[Network, ...]:
        texts = self._options["trusted-proxies"]
        return tuple(each for text in texts for each in networks("--trusted-proxies", text))

    def _parsed_listeners(self) -> list[listeners.Listener]:
        texts = self._options["listen"]
        self._default_listeners = not texts
        proxies = self._proxies()
        if self._handed is not None:
            return [
                listeners.from_parent(self._reactor, text, self._keyring, number, trusted, proxies)
                for text, number, trusted in self._handed.listeners
            ]
        if not texts:
            pem = quoted(self._self_made())
            plain, tls = 1110, 1995
            if self._demo is not None and not (_is_free(plain) and _is_free(tls)):
                plain = tls = 0
            texts = [text.format(plain=plain, tls=tls, pem=pem) for text in LOOPBACK_LISTENERS]
        found = [listeners.from_spec(self._reactor, t, self._keyring, proxies) for t in texts]
        if proxies and not any(each.scheme == "haproxy" for each in found):
            raise ConfigError("--trusted-proxies: no listener takes PROXY headers; use haproxy:...")
        for each in found if self._leads else ():
            if each.text.lower().removeprefix("haproxy:").partition(":")[0] not in FOR_WORKERS:
                raise ConfigError(
                    f"--listen {each.text}: processes of --workers cannot share it; use one of"
                    f" {', '.join(FOR_WORKERS)}, haproxy, or leave --workers out"
                )
        under_tls = False
        for number, each in enumerate(found):
            stls, own = self._stls_of(number), self._variations.get(number, EVERYWHERE).stls
            if each.implicit_tls and own is not None:
                raise ConfigError(
                    f"--listen-policy stls={own}: {each.text} begins with TLS; leave stls= out"
                )
            if each.is_pipe and stls != "off" and (own or stls == "require"):
                option = "--stls require" if own is None else f"--listen-policy stls={own}"
                raise ConfigError(
                    f"{option}: stdio: cannot begin TLS, so nobody could log in there, or all"
                    " could without TLS; use another --listen, or put --listen-policy stls=off"
                    " behind it"
                )
            under_tls = under_tls or stls != "off" or each.implicit_tls
        if self._options["client-ca"] is not None and not under_tls:
            raise ConfigError(
                f"--client-ca {self._options['client-ca']}: no listener has TLS; leave --stls off"
                " out, or add --listen tls:..."
            )
        return found

    def _store(self) -> IStore:
        text = self._options["store"]
        spec = parse("--store", text)
        factories = {factory.kind: factory for factory in getPlugins(IStoreFactory)}
        factory = factories.get(spec.kind)
        if factory is None:
            kinds = ", ".join(sorted(factories)) or "none: is Popdrop installed?"
            raise ConfigError(f"--store {text}: no such kind; known are: {kinds}")
        store: Any = factory.make(self._reactor, self.state_dir, *spec.args, **spec.kwargs)
        opening = getattr(store, "opening", "direct")
        if opening not in ("direct", "auto") or (opening == "auto" and self._helper_could(store)):
            self._let_helper_open(store)
        self._store_folders = getattr(store, "folders", ())
        if IBlockingStore.providedBy(store):
            self._tidy = store.tidy
            return InThreads(
                store,
                self._store_pool,
                self._reactor,
                self._options["lock-timeout"],
            )
        return cast("IStore", store)

    def _helper_could(self, store: Any) -> bool:
        """Whether a spool that is its user's alone can be had from a helper that there is anyway.

        Which has root's rights and has verified all logins itself: by default it is asked then
        (decision 17). Nothing changes for spools that the server may read.
        """
        if self._handed is not None:
            return self._helper is not None and self._helper.opens_spools
        parent: Any = self._options.parent or {}
        return bool(
            os.geteuid() == 0
            and parent.get("uid")
            and self._options["auth"]
            and all(text.partition(":")[0] == "helper" for text in self._options["auth"])
            and store.suits_helper
        )

    def _let_helper_open(self, store: Any) -> None:
        """`open=helper`: have the helper open the spools that the server has no right to."""
        if self._handed is not None:
            assert self._helper is not None  # the parent has made sure
            store.opener = self._helper.open_spool
            return
        option = f"--store mbox:{store.template}:open={store.opening}"
        if os.geteuid() != 0:
            raise ConfigError(
                f"{option}: the helper needs root's rights; start as root, by twistd --uid popdrop"
                " --gid mail, or leave it out"
            )
        anybody = store.opening == "helper-all"
        for text in self._options["auth"] or ["accounts:"]:
            if not anybody and text.partition(":")[0] != "helper":
                raise ConfigError(
                    f"{option}: the helper opens spools for logins that it has verified itself, and"
                    f" not those of --auth {text.partition(':')[0]}; use --auth helper:... only, or"
                    " open=helper-all"
                )
        if self._helper is None:
            self._helper = helperclient.HelperProcess([], slots=self._options["workers"] or 1)
        self._helper.spool_rules = helperclient.SpoolRules(
            OPENER, store.template, store.owner, self._options["min-uid"], anybody
        )
        store.opener = self._helper.open_spool

    def _refuse_root(self) -> None:
        """Root serves strangers only after twistd has given the rights away (decision 18)."""
        parent: Any = self._options.parent or {}
        if os.geteuid() != 0 or self._options["demo"]:
            return
        if parent.get("euid"):
            raise ConfigError(
                "twistd --euid: the server could take root's rights again at any time; leave it out"
            )
        if parent.get("uid"):
            return
        if self._handed is not None:
            return  # the parent has been asked
        if all(map(_is_local, self._listeners)):
            log.warn(
                "running as root, so on loopback only; better: twistd --uid popdrop --gid mail"
            )
            return
        raise ConfigError(
            "started as root: name the user to serve as, for example"
            " twistd --uid popdrop --gid mail popdrop ..., or listen on 127.0.0.1 only"
        )

    def _check_rights(self) -> None:
        """Whether twistd has given away what it was told to, for good."""
        parent: Any = self._options.parent or {}
        kept = 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups())
        if parent.get("uid") and kept:
            self._let_go_of_ports()
            raise StartError(
                "popdrop: --uid: rights of root's are left (uid or a group is 0); name a user"
                " outside of group root, and --gid mail"
            )

    # Demo

    def _make_demo(self) -> None:
        options = self._options
        for name in ("auth", "listen"):
            if options[name]:
                raise ConfigError(f"--demo makes its own; leave --{name} out")
        self._demo = Demo.make(time.time())
        options["state-dir"] = self._demo.folder
        options["store"] = self._demo.store

    def _forget_demo(self) -> None:
        if self._demo is not None:
            self._demo.remove()
            self._demo = None

    def _tell_demo(self, made: Demo) -> None:
        def port(implicit: bool) -> int:
            for listener, bound in zip(self._listeners, self._ports, strict=True):
                if listener.implicit_tls is implicit:
                    return int(bound.getHost().port)  # type: ignore[attr-defined]
            return 0

        out = sys.__stdout__
        if out is not None:
            out.write(made.words(port(False), port(True), self._self_made()))
            out.flush()

    # Running

    @property
    def grace(self) -> float:
        """Seconds for commands in progress at a stop."""
        return float(self._options["grace"])

    def listening_on(self) -> list[str]:
        """The strings of all listeners."""
        return [listener.text for listener in self._listeners]

    def discard(self) -> None:
        """Let go of what was made for a service that is not to be started."""
        for database in self._databases:
            database.close()
        if self._relay is not None:
            self._relay.close()
        self._session_log.close()
        self._throttle.close()
        if self._table is not None:
            os.close(self._table)
            self._table = None
        if self._helper is not None:
            self._helper.end_now()
        self._forget_demo()

    def privilegedStartService(self) -> None:
        """Listen, while the rights of the start are still there."""
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        _allow_many_files()
        _leave_no_core()
        self._listen()
        self._open_doors()
        self._start_helper()
        self._hand_over()

    def _start_helper(self) -> None:
        """While the rights are there that it is to keep."""
        if self._helper is None or self._helper.started:
            return
        parent: Any = self._options.parent or {}
        uid, gid = parent.get("uid"), parent.get("gid")
        if uid is None:
            uid, gid = os.geteuid(), os.getegid()
        elif gid is None:
            gid = pwd.getpwuid(uid).pw_gid  # as twistd does
        self._or_end(partial(self._helper.start, uid, gid))

    def _listen(self) -> None:
        if self._ports:
            return
        pairs = list(zip(self._listeners, self._factories, strict=True))
        self._listeners, self._factories = [], []
        for listener, factory in pairs:
            outcome: list[Any] = []
            listeners.listen(listener, factory).addBoth(outcome.append)
            if not outcome:
                raise StartError(f"popdrop: --listen {listener.text}: did not listen at once")
            port = outcome[0]
            if not isinstance(port, Failure):
                self._listeners.append(listener)
                self._factories.append(factory)
                self._ports.append(port)
                if self._leads:
                    port.stopReading()  # the workers accept
                else:
                    outlive_shortage(port, self._reactor, listener.implicit_tls)
                factory.inherits_options = _set_options(port)
                continue
            if self._default_listeners and "\\:" in listener.text.rpartition("interface")[2]:
                continue  # a machine without IPv6
            self._let_go_of_ports()
            self._forget_demo()
            # A daemon's caller sees the first hundred octets of it only.
            log.error("{why}", why=str(port.value))
            raise StartError(f"popdrop: {port.value}")

    def _open_doors(self) -> None:
        """For the MTA, which asks who may relay."""
        if self._relay is not None:
            self._or_end(self._relay.listen)

    def _or_end(self, work: Callable[[], None]) -> None:
        """Do it, or end the program with one line, nothing left behind."""
        try:
            work()
        except ConfigError as error:
            self._let_go_of_ports()
            self._forget_demo()
            log.error("{why}", why=str(error))
            raise StartError(f"popdrop: {error}") from None

    def _end(self) -> None:
        """The one session that inetd has started this process for is over."""
        if all(listener.scheme == "stdio" for listener in self._listeners):
            self._reactor.callLater(0, self._stop_reactor)

    def _stop_reactor(self) -> None:
        with suppress(ReactorNotRunning):
            self._reactor.stop()

    def _let_go_of_ports(self) -> None:
        for port in self._ports:
            if IListeningPort.providedBy(port):
                port.stopListening()
        self._ports = []
        if self._relay is not None:
            self._relay.close_doors()

    def _hand_over(self) -> None:
        """Give what root has just made to the user that twistd will become, and nothing else."""
        parent: Any = self._options.parent or {}
        uid, gid = parent.get("uid"), parent.get("gid")
        if os.geteuid() != 0 or uid is None:
            return
        group = -1 if gid is None else gid
        self._session_log.hand_over(uid, group)
        self._throttle.hand_over(uid, group)
        made = [path for path, is_new in self._store_folders if is_new]
        # In a folder that is the user's already he chooses what is there: it has been written to
        # with his rights (`asowner`), and what root owns there is none of ours.
        if os.stat(self.state_dir).st_uid == 0:
            made.append(os.path.join(self.state_dir, certs.SELF_MADE))
            for database in self._databases:
                if os.path.dirname(database.path) == os.path.realpath(self.state_dir):
                    made += [database.path + ending for ending in ENDINGS]
            if self._made_state_dir or self._is_all_ours():
                # Of an earlier start as root without --uid. The folder last: until then nobody else
                # can put anything there.
                for folder, _, names in os.walk(self.state_dir, topdown=False):
                    made += [os.path.join(folder, name) for name in names] + [folder]
        for path in made:
            with suppress(FileNotFoundError):
                give(path, uid, group)
        self._check_folder(uid)
        for path, _ in self._store_folders:
            owner = os.lstat(path).st_uid
            if owner != uid:
                raise StartError(
                    f"popdrop: journal-dir={path}: belongs to uid {owner}; chown {uid} {path}"
                )

    def _is_all_ours(self) -> bool:
        """Whether the state folder holds nothing but what Popdrop and `popdrop user` make."""
        names = {
            certs.SELF_MADE,
            "locks",
            "journal",
            "journal.key",
            "journal.folders",
            "fsck",
            "index",
        }
        names.add(os.path.basename(self._throttle.path))
        names |= {os.path.basename(each.path) + e for each in self._databases for e in ENDINGS}
        names |= {grants.NAME + ending for ending in ENDINGS}
        return set(os.listdir(self.state_dir)) <= names

    def _check_folder(self, uid: int) -> None:
        found = os.stat(self.state_dir)
        if found.st_uid != uid:
            raise StartError(
                f"popdrop: --state-dir {self.state_dir}: belongs to uid {found.st_uid} and holds"
                f" other files; chown {uid} {self.state_dir}, or name a folder of Popdrop's own"
            )

    def startService(self) -> None:
        """Serve."""
        super().startService()  # type: ignore[no-untyped-call]
        self._check_rights()
        self._listen()
        self._open_doors()
        if self._relay is not None:
            self._or_end(self._relay.start)
        self._start_helper()
        if self._leads:
            self._start_workers()
        elif self._helper is not None:
            self._helper.attach(self._reactor)
        sys.setswitchinterval(SWITCH_SECONDS)
        # What is there now stays: no need to look through it again and again for garbage.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS)
        for pool in self._pools:
            pool.start()
        if self._tidy is not None and self._handed is None:
            self._store_pool.run(self._tidy).addErrback(
                lambda failure: log.failure("tidying up failed", failure=failure)
            )
        self._looking = LoopingCall(self._look_at_files)
        self._looking.clock = self._reactor
        self._looking.start(LOOK_SECONDS, now=False)
        self._lookup_pool.run(self._measure)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, self._hung_up)
        if self._handed is None:
            self._tell()
        seconds = notify.watchdog_seconds()
        if seconds is not None:
            # By the reactor's timer: what stops the reactor stops the signs of life.
            self._living = LoopingCall(self._live, seconds)
            self._living.clock = self._reactor
            self._living.start(seconds)
        self._reactor.callWhenRunning(notify.tell, notify.READY)

    def _live(self, seconds: float) -> None:
        """A sign of life, twice in the time that systemd waits for one. Somebody has to serve."""
        if self._workers is None or self._workers.live(2 * seconds):
            notify.tell(notify.ALIVE)

    def _start_workers(self) -> None:
        """With the rights that are left, as each later one."""
        helper = self._helper
        slots = [
            None if helper is None else helper.hand_on(number)
            for number in range(self._options["workers"])
        ]
        fds = [log.descriptor for log in self._session_logs if log.descriptor is not None]
        sockets = zip(self._listeners, self._ports, strict=True)
        seconds = notify.watchdog_seconds()
        handed = Handed(
            arguments=self._options.given,
            folder=self._folder,
            state_dir=self.state_dir,
            listeners=[
                (listener.text, port.fileno(), listener.trusted_address)  # type: ignore[attr-defined]
                for listener, port in sockets
            ],
            table=self._table,
            logs=dict(fds),
            alive=None if seconds is None else seconds / 2,
        )
        each = [handed._replace(helper=slot) for slot in slots]
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) == len(each):
            # Were there more, the kernel would know best which are free.
            each = [
                one._replace(processor=processor, processors=processors)
                for one, processor in zip(each, processors, strict=True)
            ]
        self._workers = Workers(self._reactor, each)
        self._or_end(self._workers.start)

    def _hung_up(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self.reload)

    def reload(self) -> Deferred[Any]:
        """SIGHUP: log files are opened anew, for logrotate; certificates and lists are looked at.

        No session is dropped. Fires when all has been read.
        """
        if self._stopping:
            # systemd must not hear that a server is ready which ends.
            return succeed(None)
        notify.tell(notify.reloading())
        log.info("opening the session logs anew")
        self._session_log.reopen()
        looks = [self._look_at_files()]
        if self._workers is not None:
            looks.append(self._workers.reload())
        done: Deferred[Any] = gatherResults(looks)
        return done.addCallback(lambda _: self._stopping or notify.tell(notify.READY))

    def yield_to(self, name: bytes) -> None:
        """Somebody logs in as `name` at another worker: `--takeover`."""
        holder = self._holders.get(name)
        if holder is not None:
            holder.give_way(self._options["takeover"])

    def _look_at_files(self) -> Deferred[Any]:
        if self._leads:
            # What is served is the workers'; only the ends of certificates are told here.
            refreshed = [] if self._metrics is None else [self._look_at_certificates]
            return self._look(refreshed)
        refreshed = [self._look_at_certificates, self._rosters.refresh]
        if self._gate is not None:
            refreshed.append(self._gate.refresh)
        return self._look(refreshed)

    def _look(self, refreshed: list[Callable[[], None]]) -> Deferred[Any]:
        looks = [self._lookup_pool.run(work) for work in refreshed]
        for look in looks:
            look.addErrback(lambda failure: log.failure("looking at files failed", failure=failure))
        return gatherResults(looks)

    def _look_at_certificates(self) -> None:
        self._keyring.refresh()
        self._measure()

    def _measure(self) -> None:
        if self._metrics is not None:
            ends = [(path, end.timestamp()) for path, end in self._keyring.ends().items()]
            self._metrics.write(metrics.certificates(ends, self._keyring.refused()))

    def _tell(self) -> None:
        served = zip(self._listeners, self._factories, self._ports, strict=True)
        for listener, factory, port in served:
            host = port.getHost() if IListeningPort.providedBy(port) else None
            where = getattr(host, "host", None)
            log.info(
                "POP3 on {where}, {how}",
                where=f"{where} port {host.port}" if where else listener.text,  # type: ignore[attr-defined]
                how="TLS" if listener.implicit_tls else f"STLS {factory.policy.stls}",
            )
        if self._demo is not None:
            self._tell_demo(self._demo)
            return
        for database in self._databases:
            if not database.names():
                log.warn(
                    "{path} holds no account; add one with: popdrop user add --db {path} NAME",
                    path=database.path,
                )

    async def _stop(self) -> None:
        self._stopping = True
        if self._handed is None and threading.current_thread() is threading.main_thread():
            # The reactor's own would complain that it is stopping already.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._signalled_again)
        notify.tell(notify.STOPPING)
        if self._looking is not None and self._looking.running:
            self._looking.stop()
        await self._stop_listening()
        grace = self._options["grace"]
        if self._workers is not None:
            await self._workers.stop(grace)
        stopping = [Deferred.fromCoroutine(factory.stop(grace)) for factory in self._factories]
        await gatherResults(stopping)
        if self._helper is not None:
            await self._helper.stop(self._reactor)
        for pool in self._pools:
            pool.stop()
        if self._living is not None and self._living.running:
            self._living.stop()
        self.discard()

    async def _stop_listening(self) -> None:
        """Whatever one port says: sessions are ended well, and deletions awaited."""
        ports = [port for port in self._ports if IListeningPort.providedBy(port)]
        doors = () if self._relay is None else (self._relay.close_doors,)
        for calls in ([port.stopListening for port in ports], doors):
            closing = DeferredList([maybeDeferred(call) for call in calls], consumeErrors=True)
            for well, told in await closing:
                if not well:
                    log.failure("a port was not closed well", failure=cast("Failure", told))

    def _signalled_again(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self.hurry)

    def hurry(self) -> None:
        """A second SIGTERM or SIGINT: whoever sent it does not want to wait for the grace."""
        log.info("asked to stop once more: what is in progress is cut off, but for deletions")
        for factory in self._factories:
            factory.hurry()
        if self._workers is not None:
            self._workers.hurry()

    def stopService(self) -> Deferred[None]:
        """Stop listening, let what is in progress end, then stop the threads."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())
