"""The command line of `twistd popdrop`."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.strcred import AuthOptionMixin
from twisted.python import usage

import popdrop
from popdrop.inthreads import LOCK_TIMEOUT
from popdrop.ops.grants import LONGEST
from popdrop.policy import APOP_USERS, CLEARTEXT, STLS, WORDINGS
from popdrop.sasl import MECHANISMS

SHORTEST_IDLE: Final = 600
"""Seconds, RFC 1939 section 3."""
MOST_WORKERS: Final = 32
"""Half of the processes that may share a table of the throttle's: a new one may come before the
place of a dead one is found to be free."""
MOST_MINUTES: Final = int(LONGEST / 60)
DEFAULT_STORE: Final = "mbox:/var/mail/{user}"
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?").fullmatch


class OwnKind(NamedTuple):
    """A kind of `--auth` that `twistd popdrop` alone has: no plugin. Names are `strcred`'s."""

    authType: str
    argStringFormat: str
    authHelp: str


OWN_KINDS: Final = (
    OwnKind(
        "helper",
        "pam:SERVICE, passwd:FILE or checkpassword:PROG...",
        """What stands behind it is asked by a process of its own, which keeps the rights of
the start when --uid gives them away, as helper:pam:pop3. All behind the first
colon is taken as it is.""",
    ),
    OwnKind(
        "oidc",
        "ISSUER:KEY=VALUE...",
        """Tokens of an OpenID provider, for OAUTHBEARER and XOAUTH2. ISSUER is its URL, in
which : is written \\:. Needs the extra `oidc`: pip install 'popdrop[oidc]'. The
reference of --auth in the documentation lists the keys.""",
    ),
)
"""Listed by `--help-auth` beside the plugins."""


def machine_name() -> str:
    """The machine's own name, `localhost` if that is no host name."""
    name = socket.gethostname()
    return name if _HOSTNAME(name) else "localhost"


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


def _mechanisms(text: str) -> tuple[bytes, ...]:
    """The mechanisms of `--sasl`, in upper case and in this order."""
    if text.lower() == "none":
        return ()
    words = [word.strip().upper() for word in text.split(",")]
    known = [name.decode("ascii") for name in MECHANISMS]
    unknown = sorted(set(words).difference(known))
    if unknown:
        raise ValueError(
            f"--sasl {text}: unknown: {', '.join(word or '(nothing)' for word in unknown)};"
            f" known are {', '.join(known)}; or none"
        )
    return tuple(word.encode("ascii") for word in dict.fromkeys(words))


def _number(option: str) -> Callable[[str], int]:
    def known(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(f"--{option} takes a number, as 11")
        return int(text)

    return known


def _minutes(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= MOST_MINUTES:
        raise ValueError(f"--relay-minutes takes a number up to {MOST_MINUTES}, as 2")
    return float(text)


def _bits(text: str) -> int:
    if text not in ("64", "128"):
        raise ValueError("--relay-ipv6 takes 64 or 128")
    return int(text)


def _workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,2}", text) or int(text) > MOST_WORKERS:
        raise ValueError(f"--workers takes a number from 0 to {MOST_WORKERS}")
    return int(text)


class Options(AuthOptionMixin, usage.Options):
    """The command line of `twistd popdrop`."""

    synopsis = "[options]"
    longdesc = (
        "A POP3 server for mail spools. Without options it serves /var/mail on loopback, port 1110"
        " with STLS and port 1995 with TLS, with accounts and a self-made certificate in the state"
        " folder. Try --demo. Accounts are made with `popdrop user add`."
    )
    optFlags = [
        ["demo", None, "Serve a throw-away maildrop and print two commands that read it."],
        ["require-shell", None, "System accounts need a shell of /etc/shells."],
        ["allow-short-idle", None, "Allow an --idle-timeout below the 600 s of RFC 1939."],
        ["tcp-wrappers", None, "Ask hosts.allow and hosts.deny who may connect."],
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
        [
            "wording",
            None,
            "vague",
            "How accounts with an APOP secret are refused passwords: vague, as a wrong one;"
            " strict, at USER with the reason.",
            _word("wording", WORDINGS),
        ],
        ["user-names", None, None, "What is done to names: lower, trim-domain, default-domain=D."],
        ["auth-file", None, None, "A file of names, a line each: nobody else may log in."],
        ["nonauth-file", None, None, "A file of names, a line each, that may not log in."],
        [
            "login-cache",
            None,
            0.0,
            "Seconds for which a good password need not be hashed again; 0: never.",
            _seconds("login-cache"),
        ],
        [
            "sasl",
            None,
            None,
            "Mechanisms of AUTH, with commas between, as CAPA is to list them. [all possible]",
            _mechanisms,
        ],
        ["client-ca", None, None, "PEM file: client certificates that it signed may log in."],
        ["min-uid", None, 11, "System accounts below are refused.", _number("min-uid")],
        [
            "throttle",
            None,
            "memory",
            "off, or memory[:KEY=NUMBER...] or shared:PATH[:KEY=NUMBER...]: attempts and"
            " connections.",
        ],
        [
            "lock-timeout",
            None,
            LOCK_TIMEOUT,
            "Seconds to wait for a mail program's lock.",
            _seconds("lock-timeout"),
        ],
        ["idle-timeout", None, 600.0, "Seconds, after login.", _seconds("idle-timeout")],
        [
            "write-timeout",
            None,
            300.0,
            "Seconds for which a client may leave its answers unread.",
            _seconds("write-timeout"),
        ],
        ["login-timeout", None, 60.0, "Seconds from connect to login.", _seconds("login-timeout")],
        [
            "takeover",
            None,
            0.0,
            "Seconds of idleness after which a session yields to a new one of its user; 0: never.",
            _seconds("takeover"),
        ],
        [
            "workers",
            None,
            0,
            f"Processes that serve, {MOST_WORKERS} at most, beside the one that starts them."
            " 0: that one alone serves. As many as processors: each keeps to one.",
            _workers,
        ],
        ["grace", None, 30.0, "Seconds for commands in progress at a stop.", _seconds("grace")],
        ["hosts-allow", None, None, "Its file for --tcp-wrappers. [/etc/hosts.allow]"],
        ["hosts-deny", None, None, "Its file for --tcp-wrappers. [/etc/hosts.deny]"],
        [
            "relay-minutes",
            None,
            None,
            "Minutes for which a login lets its client relay, see --relay. [2]",
            _minutes,
        ],
        [
            "relay-ipv6",
            None,
            None,
            "Bits of an IPv6 address that are one client for --relay: 128 or 64. [128]",
            _bits,
        ],
        ["metrics", None, None, "A file for the ends of certificates, as Prometheus reads it."],
        ["popauth-socket", None, None, "Unix socket where users set their own APOP secret."],
        ["hostname", None, None, "This server's name. [the machine's]"],
    ]
    supportedInterfaces = (IUsernamePassword, IUsernameHashedPassword)
    _several = (
        "listen",
        "auth",
        "session-log",
        "local-net",
        "allow-net",
        "deny-net",
        "trusted-proxies",
        "relay",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: list[str] = []
        """The words that were parsed, for processes that serve with the same options."""
        for name in self._several:
            self[name] = []
        self["listen-policy"] = {}

    def opt_listen(self, text: str) -> None:
        """Listen here, a strports string: tcp:110, tls:PEM:995, tcp6:110, ... Repeatable."""
        self["listen"].append(text)

    def opt_listen_policy(self, text: str) -> None:
        """Rules of the --listen before it alone: stls=WORD,cleartext=WORD,apop-only. Repeatable."""
        if not self["listen"]:
            raise usage.UsageError(
                f"--listen-policy {text}: stands behind the --listen whose rules it changes"
            )
        policies = self["listen-policy"]
        number = len(self["listen"]) - 1
        policies[number] = f"{policies[number]},{text}" if number in policies else text

    def opt_auth(self, text: str) -> None:
        """Verify logins so, as accounts:FILE; --help-auth lists the kinds. Repeatable, in order."""
        self["auth"].append(text)

    def opt_help_auth(self) -> None:
        """List the kinds of --auth."""
        super().opt_help_auth()  # type: ignore[no-untyped-call]

    def opt_help_auth_type(self, kind: str) -> None:
        """Explain one kind of --auth."""
        for own in OWN_KINDS:
            if own.authType == kind:
                text = "".join(f"  {line}\n" for line in own.authHelp.splitlines())
                self.authOutput.write(
                    f"Usage: --auth {kind}[:ArgString]\n"
                    f"ArgString format: {own.argStringFormat}\n\n{text}\n"
                )
                raise SystemExit(0)
        super().opt_help_auth_type(kind)  # type: ignore[no-untyped-call]

    def _checkerFactoriesForOptHelpAuth(self) -> Iterator[Any]:
        yield from OWN_KINDS
        yield from super()._checkerFactoriesForOptHelpAuth()  # type: ignore[no-untyped-call]

    def opt_session_log(self, text: str) -> None:
        """Log sessions as plain, json, qpopper or sqmail[:SINK]. Repeatable. [plain]"""
        self["session-log"].append(text)

    def opt_local_net(self, text: str) -> None:
        """A network that counts as local beside loopback, for --cleartext. Repeatable."""
        self["local-net"].append(text)

    def opt_allow_net(self, text: str) -> None:
        """A network whose clients may connect; all others may not. Repeatable."""
        self["allow-net"].append(text)

    def opt_deny_net(self, text: str) -> None:
        """A network whose clients may not connect, whatever --allow-net says. Repeatable."""
        self["deny-net"].append(text)

    def opt_trusted_proxies(self, text: str) -> None:
        """Only these addresses and networks, with commas, may send PROXY headers. Repeatable."""
        self["trusted-proxies"].append(text)

    def opt_relay(self, text: str) -> None:
        """Let clients relay after a login: socketmap:ENDPOINT, tcp-table:ENDPOINT, file:PATH."""
        self["relay"].append(text)

    def opt_version(self) -> None:
        """Print Popdrop's version."""
        sys.stdout.write(f"Popdrop {popdrop.__version__}\n")
        raise SystemExit(0)

    def parseOptions(self, options: Any = None) -> None:
        """Twisted prints all of --help before an error; here the error stands alone."""
        self.given = [str(word) for word in options or []]
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
        for name in ("login-timeout", "idle-timeout"):
            if self[name] <= 0:
                raise usage.UsageError(f"--{name}: 0 would end each session; write 1 or more")
        if self["write-timeout"] < 1:
            raise usage.UsageError("--write-timeout: nobody reads as fast; write 1 or more")
        if self["workers"] and self["demo"]:
            raise usage.UsageError("--demo serves from one process; leave --workers out")
        for name, needed in (
            ("hosts-allow", "tcp-wrappers"),
            ("hosts-deny", "tcp-wrappers"),
            ("relay-minutes", "relay"),
            ("relay-ipv6", "relay"),
        ):
            if self[name] is not None and not self[needed]:
                raise usage.UsageError(f"--{name} is given without --{needed}; add it")
        if self["hostname"] is not None and not _HOSTNAME(self["hostname"]):
            raise usage.UsageError(f"--hostname {self['hostname']}: not a host name")
