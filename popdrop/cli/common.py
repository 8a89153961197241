"""What the commands about accounts share: which database, new passwords, facts, and how both show.

No option and no argument takes a secret: every user of the machine can see command lines.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import Any, Final, NoReturn

import click
from click.exceptions import Abort, Exit

from popdrop.accounts.database import (
    KEEP,
    AccountsDatabase,
    Keep,
    Refused,
    checked_words,
    shown,
)
from popdrop.credentials import prepared
from popdrop.errors import BadCredentials, ConfigError
from popdrop.places import default_database
from popdrop.policy import networks
from popdrop.values import Network, Scope, Secret

STRONG_APOP_OCTETS: Final = 16
LINE_OCTETS: Final = 4096

APOP_RULE: Final = (
    "Note: {name} has an APOP secret now. Cleartext login (USER and PASS, AUTH PLAIN, AUTH LOGIN)"
    " is refused to this account, also under TLS, unless the server runs with"
    " `--cleartext always` or `--apop-users allow`."
)
SHORT_APOP: Final = (
    f"Warning: fewer than {STRONG_APOP_OCTETS} octets. Whoever records an APOP login can guess"
    " the secret off line; `--generate` makes one that cannot be guessed."
)

TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
"""How times are written (RFC 3339, UTC)."""
_SHORT: Final = "%Y-%m-%d %H:%M"
_TIMES: Final = ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%MZ", TIME)


Command = Callable[..., Any]
Fact = str | bool | int | list[str] | None


@dataclass(frozen=True, slots=True)
class Place:
    """Which accounts database, and where its key is: `None` for the file beside it."""

    db: str
    key: str | None

    def open(self) -> AccountsDatabase:
        """The database there. Raises `ConfigError`."""
        return AccountsDatabase(self.db, key=self.key)

    def create(self) -> bool:
        """Make it. `False`: there is one. Raises `ConfigError`."""
        return AccountsDatabase.create(self.db, self.key)

    def account(self, name: str) -> tuple[AccountsDatabase, bytes]:
        """The open database and the canonical name of an account in it. Raises `Refused`."""
        accounts = self.open()
        canonical = canonical_name(name)
        if not accounts.has(canonical):
            raise Refused(f"{shown(octets(name))}: no such account in {accounts.path}")
        return accounts, canonical


def _default_db() -> str:
    return default_database(os.environ, os.geteuid())


db_option = click.option(
    "--db",
    metavar="FILE",
    default=_default_db,
    envvar="POPDROP_DB",
    show_envvar=True,
    help="The accounts database. Default: $XDG_STATE_HOME/popdrop/accounts.db, or as root"
    " /var/lib/popdrop/accounts.db.",
)
key_option = click.option(
    "--key",
    metavar="SOURCE",
    envvar="POPDROP_KEY",
    show_envvar=True,
    help="Where the key of the sealed secrets is: file:PATH, credential:NAME or"
    " command:PROGRAM ARGUMENTS, as the server's `--auth accounts:FILE:key=SOURCE`."
    " Default: FILE.key beside the database.",
)


def database_options(command: Command) -> Command:
    """`--db` and `--key`, which `command` takes as one argument `place`."""

    @wraps(command)
    def with_place(*arguments: Any, db: str, key: str | None, **options: Any) -> Any:
        return command(*arguments, place=Place(db, key or None), **options)

    return db_option(key_option(with_place))


class Worded(click.Command):
    """A command that does not repeat arguments too many: one of them may be a password."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, but for that."""
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            raise click.UsageError(
                "Too many arguments. A password is never given as an argument, where others can"
                " see it: it is asked for at the terminal, or read from standard input.",
                ctx,
            )
        return rest


def _expiry(ctx: click.Context, param: click.Parameter, text: str | None) -> int | Keep | None:
    """Seconds since the epoch; `None` for never."""
    if text is None:
        return KEEP
    if text == "never":
        return None
    for form in _TIMES:
        try:
            return int(datetime.strptime(text, form).replace(tzinfo=UTC).timestamp())
        except ValueError:
            continue
    raise click.BadParameter(
        "write it as 2027-01-31, 2027-01-31T18:30 (both UTC), or never", ctx, param
    )


def _networks(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> tuple[Network, ...] | Keep:
    if text is None:
        return KEEP
    if text == "any":
        return ()
    try:
        found = networks("", text)
    except ConfigError:
        found = ()
    if not found:
        raise click.BadParameter("write networks as 192.0.2.0/24,2001:db8::/32, or any", ctx, param)
    return found


def _read_only(ctx: click.Context, param: click.Parameter, value: bool | None) -> bool | Keep:
    return KEEP if value is None else value


def scope_options(command: Command) -> Command:
    """Options that narrow what a login may do; `KEEP` where one is not given."""
    for option in (
        click.option(
            "--read-only/--read-write",
            "read_only",
            default=None,
            callback=_read_only,
            help="Whether its sessions can delete nothing.",
        ),
        click.option(
            "--networks",
            callback=_networks,
            metavar="NET,NET...|any",
            help="Log in only from these networks.",
        ),
        click.option(
            "--expires",
            callback=_expiry,
            metavar="DATE|never",
            help="No login from this moment on: YYYY-MM-DD or YYYY-MM-DDTHH:MM, UTC.",
        ),
    ):
        command = option(command)
    return command


def scope_of(
    expires: int | Keep | None, allowed: tuple[Network, ...] | Keep, read_only: bool | Keep
) -> Scope:
    """The scope of something new. Says so where it has ended already."""
    warn_past(expires)
    return Scope(
        False if isinstance(read_only, Keep) else read_only,
        () if isinstance(allowed, Keep) else allowed,
        None if isinstance(expires, Keep) else expires,
    )


def warn_past(expires: int | Keep | None) -> None:
    """Say so where a moment has passed already."""
    if isinstance(expires, int) and expires <= datetime.now(UTC).timestamp():
        click.echo(f"Note: {moment(expires)} is past: no login from now on.", err=True)


def octets(argument: str) -> bytes:
    """What the shell gave."""
    return argument.encode("utf-8", "surrogateescape")


def canonical_name(name: str) -> bytes:
    """The name of an account as it is stored; empty for what cannot be one."""
    try:
        return prepared(octets(name))
    except BadCredentials:
        return b""


def exclude(**given: bool) -> None:
    """Raise `UsageError` where more than one of these options is given."""
    names = [f"--{option.replace('_', '-')}" for option, is_given in given.items() if is_given]
    if len(names) > 1:
        raise click.UsageError(f"{' and '.join(names)} exclude each other.")


def first_line() -> bytes:
    """One line of standard input without its end."""
    line = sys.stdin.buffer.readline(LINE_OCTETS)
    return line.removesuffix(b"\n").removesuffix(b"\r")


def asked_words() -> Secret:
    """A new password, asked for twice at the terminal. Raises `Refused`."""
    try:
        first = getpass.getpass("New password:")
        again = getpass.getpass("Retype new password:")
    except (EOFError, UnicodeDecodeError):
        raise Abort from None
    if first != again:
        fail("Mismatch - password unchanged.")
    return checked(octets(first))


def checked(words: bytes) -> Secret:
    """A new password as it is stored. Raises `Refused`."""
    return Secret(checked_words(Secret(words)))


def fail(line: str) -> NoReturn:
    """End with one line and exit status 1."""
    click.echo(line, err=True)
    raise Exit(1)


def note_apop(name: bytes, words: Secret) -> None:
    """What somebody should know who has given `name` an APOP secret."""
    if len(words.reveal()) < STRONG_APOP_OCTETS:
        click.echo(SHORT_APOP, err=True)
    click.echo(APOP_RULE.format(name=shown(name)), err=True)


def moment(seconds: int, short: bool = False) -> str:
    """A time in UTC: in ISO 8601, or `short`, to the minute, for a table."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(_SHORT if short else TIME)
    except (ValueError, OverflowError, OSError):
        return "damaged"


def scope_facts(scope: Scope) -> dict[str, Fact]:
    """The keys of JSON and of plain lines for a scope."""
    return {
        "read_only": scope.read_only,
        "networks": [str(network) for network in scope.networks],
        "expires": None if scope.expires is None else moment(scope.expires),
    }


def limits(scope: Scope, disabled: bool = False) -> str:
    """What narrows a login, in words, for a table."""
    words = ["disabled"] if disabled else []
    if scope.read_only:
        words.append("read only")
    if scope.expires is not None:
        words.append(f"until {moment(scope.expires, short=True)}")
    if scope.networks:
        words.append("from " + ", ".join(map(str, scope.networks)))
    return "; ".join(words)


_NONE: Final = {"networks": "any", "expires": "never", "used": "never"}
"""The words for what is not set."""


def word(key: str, value: Fact) -> str:
    """A fact as one word of a line or cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(value) or _NONE.get(key, "none")
    return _NONE.get(key, "none") if value is None else str(value)


def line(facts: Mapping[str, Fact]) -> str:
    """Facts as one plain line, for grep and awk."""
    return " ".join(f"{key.replace('_', '-')}={word(key, value)}" for key, value in facts.items())


def print_json(value: object) -> None:
    """As JSON, for programs."""
    click.echo(json.dumps(value, indent=2))


def print_table(titles: Iterable[str], rows: Iterable[tuple[list[str], bool]]) -> None:
    """A table for a terminal, without colours where $NO_COLOR is set.

    A title that ends with a blank is of a column that may be folded. The second part of a row says
    whether it is dimmed.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in titles:
        # Text and not str, here and below: a name may hold what looks like rich's mark-up.
        heading = Text(title.rstrip())
        table.add_column(heading, overflow="fold", no_wrap=not title.endswith(" "))
    for cells, dimmed in rows:
        table.add_row(*(Text(cell) for cell in cells), style="dim" if dimmed else None)
    Console().print(table)
