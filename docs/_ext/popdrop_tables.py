"""What the reference says of options, commands and log lines, read from the program itself.

Plain functions that give reStructuredText as lists of lines. No Sphinx here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from popdrop import errors, record, throttle
from popdrop.listing import Listing
from popdrop.policy import Policy
from popdrop.session import COMMANDS, Session, State
from popdrop.stores.mbox.findings import KINDS
from popdrop.tap import Options
from popdrop.values import PeerFacts, SessionRecord, Tally

REMOTE = PeerFacts(
    address="192.0.2.7",
    port=40112,
    local_port=995,
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_256_GCM_SHA384",
)
_STATES = ((State.AUTHORIZATION, "before"), (State.TRANSACTION, "after"))
_CAPA_CASES = (
    ("Port 110, client from elsewhere, before TLS", Policy(stls="offer"), False, False),
    ("The same with ``--stls require``", Policy(stls="require"), False, False),
    ("Under TLS", Policy(stls="offer"), True, False),
    ("Under TLS with ``--apop-only``", Policy(cleartext="never", mechanisms=()), True, False),
    ("After login", Policy(stls="offer", implementation="Popdrop-VERSION"), True, True),
)


def options() -> Iterator[str]:
    """Every option of `twistd popdrop`, by name, as `option` directives."""
    found: dict[str, tuple[bool, object, str]] = {}
    for long, _, text in Options.optFlags:
        found[long] = (False, None, text)
    for long, _, default, text, *_ in Options.optParameters:
        found[long] = (True, default, text)
    for name, method in inspect.getmembers(Options, inspect.isfunction):
        if name.startswith("opt_"):
            takes = len(inspect.signature(method).parameters) > 1
            found[name[4:].replace("_", "-")] = (takes, None, inspect.getdoc(method) or "")
    found.setdefault("help", (False, None, "Print the options."))
    yield ".. program:: twistd popdrop"
    for long in sorted(found):
        takes, default, text = found[long]
        yield ""
        yield f".. option:: --{long}{' VALUE' if takes else ''}"
        yield ""
        yield "   " + _literal_braces(text.strip())
        if default not in (None, ""):
            yield (
                f"   Default: ``{default:g}``."
                if isinstance(default, float)
                else (f"   Default: ``{default}``.")
            )


def _literal_braces(text: str) -> str:
    return text.replace("*", "\\*").replace("`", "``")


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]], widths: str) -> Iterator[str]:
    yield ".. list-table::"
    yield "   :header-rows: 1"
    yield f"   :widths: {widths}"
    yield ""
    for row in (header, *rows):
        for number, cell in enumerate(row):
            yield f"   {'* -' if number == 0 else '  -'} {cell}"


def commands() -> Iterator[str]:
    """Every POP3 command."""

    def rows() -> Iterator[tuple[str, ...]]:
        for command in COMMANDS.values():
            states = " and ".join(word for state, word in _STATES if state in command.states)
            yield (
                f"``{command.syntax}``",
                states,
                "yes" if command.before_tls else "no",
                command.summary,
                command.source,
            )

    header = ("Command", "Login", "Before required TLS", "What it does", "Source")
    return _table(header, rows(), "30 12 12 46 14")


def capabilities() -> Iterator[str]:
    """What CAPA answers in the usual situations: asked of the session itself."""
    for title, policy, secured, inside in _CAPA_CASES:
        session = Session(b"<challenge>", policy, secured)
        session.met(REMOTE)
        if inside:
            session.opened(Listing(()))
        answer = session.line(b"CAPA")
        if not isinstance(answer, bytes):
            raise TypeError("CAPA gave no plain reply")
        yield title
        yield ""
        yield "   ::"
        yield ""
        for line in answer.decode("ascii").splitlines():
            yield "      " + line
        yield ""


def codes() -> Iterator[str]:
    """Every response code that the server sends."""

    def rows() -> Iterator[tuple[str, ...]]:
        seen = set()
        for _, kind in inspect.getmembers(errors, inspect.isclass):
            code = getattr(kind, "code", None)
            if not code or code in seen or "code" not in vars(kind):
                continue
            seen.add(code)
            text = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
            yield f"``[{code.decode('ascii')}]``", text + "."

    return _table(("Code", "Meaning"), rows(), "20 80")


def throttle_keys() -> Iterator[str]:
    """The keywords of `--throttle memory` and `shared`, and their defaults."""
    meanings = {
        "total": "connections at once, in all",
        "per-address": "connections at once from one IPv4 address or one IPv6 /64",
        "per-user": "connections at once that have logged in as one user, or wait to",
        "fade": "seconds after which failures are forgotten",
        "tracked": "addresses, users and pairs of both that are remembered; the oldest go first",
    }

    def rows() -> Iterator[tuple[str, ...]]:
        for key, default in throttle.DEFAULTS.items():
            yield f"``{key}=``", str(default), meanings[key]

    return _table(("Keyword", "Default", "Meaning"), rows(), "20 15 65")


def log_samples() -> Iterator[str]:
    """Lines of every kind of session log, made by the code that makes them."""
    found = Tally(left=3, left_octets=9120)
    done = Tally(retr=3, retr_octets=9120, deleted=2, deleted_octets=6001, left=1, left_octets=3119)
    listener = "tls:/etc/letsencrypt/live:995"
    records = (
        SessionRecord(
            "failure", REMOTE, b"bob", "USER", "bad-credentials", 0.034, Tally(), listener
        ),
        SessionRecord("login", REMOTE, b"bob", "APOP", "ok", 1.134, found, listener),
        SessionRecord("end", REMOTE, b"bob", None, "quit", 1.25, done, listener),
    )
    for kind, emitter in record.KINDS.items():
        yield f"``{kind}``"
        yield ""
        yield "   ::"
        yield ""
        for each in records:
            line = emitter(each)
            if line is not None:
                # What differs at each build is made the same.
                line = re.sub(r"\bpid \d+", "pid 4711", line)
                line = re.sub(r'"time":"[^"]*"', '"time":"2026-01-06T12:00:00.000Z"', line)
                yield "      " + line
        yield ""


def fsck_kinds() -> Iterator[str]:
    """Every kind of finding of `popdrop fsck`."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, kind in KINDS.items():
            mended = "yes" if kind.mendable else "no"
            yield (
                f"``{name}``",
                kind.severity.value,
                mended,
                kind.meaning.replace("From_", "``From_``"),
            )

    return _table(("Kind", "Severity", "Mended", "Meaning"), rows(), "20 13 11 56")


DIRECTIVES = {
    "popdrop-options": options,
    "popdrop-commands": commands,
    "popdrop-capabilities": capabilities,
    "popdrop-codes": codes,
    "popdrop-throttle-keys": throttle_keys,
    "popdrop-log-samples": log_samples,
    "popdrop-fsck-kinds": fsck_kinds,
}
