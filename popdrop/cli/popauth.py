"""`popdrop popauth`: qpopper's program for APOP secrets, with its words, prompts and rules.

What it calls an entry is an account that has an APOP secret; passwords are none of its business.
Root and the database's owner change the database themselves. Everybody else can only change his own
secret, and asks the server for it (`accounts/selfservice.py`).
"""

from __future__ import annotations

import getpass
import os
import pwd
import string
import sys
from collections.abc import Callable
from typing import Final, NoReturn

import click
from click.core import ParameterSource
from click.exceptions import Exit

from popdrop.accounts.database import AccountsDatabase, checked_name, shown
from popdrop.accounts.helperwire import Kind, Malformed, SelfAnswer, SelfRequest
from popdrop.accounts.selfservice import self_service
from popdrop.cli.common import (
    APOP_RULE,
    Place,
    Worded,
    canonical_name,
    checked,
    database_options,
    fail,
    first_line,
    octets,
)
from popdrop.places import POPAUTH_SOCKET
from popdrop.values import Secret

REFUSALS: Final = 2
"""How often a weak secret is refused, before it is taken all the same."""
SHORTEST: Final = {1: 6, 2: 5, 3: 4}
"""Octets that are enough, by the kinds of ASCII characters: lower case, upper case, digits."""
SHORTEST_WITH_OTHERS: Final = 4
_KINDS: Final = tuple(
    kind.encode("ascii") for kind in (string.ascii_lowercase, string.ascii_uppercase, string.digits)
)

ALL: Final = "ALL"
NON_NUMERIC: Final = "at least one non-numeric character"
LONGER: Final = "a longer password"
UNCHANGED: Final = "Password unchanged."

Ask = Callable[[str], bytes]


@click.command(cls=Worded, context_settings={"help_option_names": ["-help", "-h", "--help"]})
@database_options
@click.option(
    "--socket",
    metavar="PATH",
    default=POPAUTH_SOCKET,
    envvar="POPDROP_POPAUTH_SOCKET",
    show_default=True,
    show_envvar=True,
    help="Where the server listens for users: its `--popauth-socket`.",
)
@click.option(
    "-list",
    "listed",
    is_flag=False,
    flag_value=ALL,
    metavar="[NAME|ALL]",
    help="List the names of all entries, or NAME if it is one.",
)
@click.option("-delete", "deleted", metavar="NAME", help="Delete an entry.")
@click.option("-user", "named", metavar="NAME", help="Add an entry, or change its secret.")
@click.option(
    "-init", is_flag=True, help="Make the database, or after a question remove all entries."
)
@click.pass_context
def popauth(
    ctx: click.Context,
    place: Place,
    init: bool,
    named: str | None,
    deleted: str | None,
    listed: str | None,
    socket: str,
) -> None:
    """APOP secrets as by qpopper's popauth. Without an option: change your own.

    Secrets are asked for at the terminal; where standard input is none, each line of it answers
    one question.
    """
    if listed is not None and named is not None:
        listed, named = named, None
    given = [each for each in (init or None, named, deleted, listed) if each is not None]
    if len(given) > 1:
        raise click.UsageError("Give one of -init, -user, -delete, -list, or none.")
    if not given:
        chosen = ctx.get_parameter_source("db") is not ParameterSource.DEFAULT
        _own(place, socket, chosen)
    elif init:
        _initialize(place)
    elif named is not None:
        _demand_rights(place, "perform the requested function")
        _change(place, checked_name(octets(named)))
    elif deleted is not None:
        _demand_rights(place, "delete entries")
        _delete(place, deleted)
    else:
        _demand_rights(place, "perform the requested function")
        _list(place, listed or ALL)


def weakness(words: bytes) -> str | None:
    """What a better secret than `words` would have, by qpopper's rule; `None`: good enough."""
    present = [kind for kind in _KINDS if set(kind) & set(words)]
    others = set(words) - set(b"".join(_KINDS))
    if present == [_KINDS[-1]] and not others:
        return NON_NUMERIC
    enough = SHORTEST_WITH_OTHERS if others else SHORTEST[len(present)]
    return None if len(words) >= enough else LONGER


def _initialize(place: Place) -> None:
    if not _is_absent(place.db):
        _demand_rights(place, "init the database")
    elif place.create():
        return
    accounts = place.open()
    click.echo("Really initialize POP authorization DB? ", nl=False)
    if not first_line().startswith((b"y", b"Y")):
        raise Exit(1)
    count = accounts.drop_apop()
    accounts.close()
    click.echo(f"Removed {count} APOP secrets from {accounts.path}; passwords stay", err=True)


def _change(place: Place, name: bytes) -> None:
    """By one who need not know the old secret."""
    accounts = place.open()
    _announce(name)
    words = _new_words(_asker())
    is_new = not accounts.has(name)
    had = not is_new and accounts.entry(name).has_apop
    if is_new:
        accounts.add(name, apop=words)
    else:
        accounts.set_apop(name, words)
    accounts.close()
    if not had:
        click.echo(APOP_RULE.format(name=shown(name)), err=True)


def _delete(place: Place, name: str) -> None:
    accounts = place.open()
    if not accounts.drop_apop(canonical_name(name)):
        _die(f"User '{shown(octets(name))}' not found in apop database")
    accounts.close()


def _list(place: Place, wanted: str) -> None:
    accounts = place.open()
    names = _entries(accounts)
    accounts.close()
    if wanted != ALL:
        names = [name for name in names if name == canonical_name(wanted)]
        if not names:
            _die("no such entry in POP authorization DB")
    if names:
        click.echo("\n".join(map(shown, names)))


def _entries(accounts: AccountsDatabase) -> list[bytes]:
    return [entry.name for entry in accounts.entries() if entry.has_apop]


def _own(place: Place, socket: str, chosen: bool) -> None:
    """The caller's own secret. `chosen`: he has named a database."""
    uid = os.geteuid()
    try:
        name = os.fsencode(pwd.getpwuid(uid).pw_name)
    except KeyError:
        _die(f"Sorry, don't know who uid {uid} is.")
    if _has_rights(place) and (uid == 0 or chosen or not os.path.lexists(socket)):
        _change(place, checked_name(name))
    else:
        _ask_server(socket, name)


def _ask_server(socket: str, name: bytes) -> None:
    has = _answer(socket, SelfRequest(Kind.HAS)).has
    _announce(name)
    ask = _asker()
    old = Secret(ask("Old password:")) if has else None
    new = _new_words(ask, old)
    answer = _answer(socket, SelfRequest(Kind.SET, old, new))
    if answer.kind is Kind.WRONG:
        _die("Sorry, password entered incorrectly")
    if answer.kind is not Kind.DONE:
        _die("the entry has changed meanwhile; try again")
    if not has:
        click.echo(APOP_RULE.format(name=shown(name)), err=True)


def _answer(socket: str, request: SelfRequest) -> SelfAnswer:
    """What the server says. Ends the program where it refuses."""
    try:
        answer = self_service(socket, request)
    except Malformed:
        _die(f"{socket}: no answer that makes sense; ask the administrator")
    if answer.kind in (Kind.REFUSED, Kind.FAILED):
        _die(answer.detail or "refused; ask the administrator")
    if answer.kind is Kind.LATER:
        _die("too many tries; try again in some minutes")
    return answer


def _asker() -> Ask:
    """Asks at the terminal, or takes lines of standard input. An end of input is no answer."""
    if not sys.stdin.isatty():
        return lambda prompt: first_line()

    def ask(prompt: str) -> bytes:
        try:
            return octets(getpass.getpass(prompt))
        except (EOFError, UnicodeDecodeError):
            click.echo(err=True)
            return b""

    return ask


def _new_words(ask: Ask, old: Secret | None = None) -> Secret:
    """A new secret. Ends the program where there is none."""
    words = b""
    hint: str | None = None
    for _ in range(REFUSALS + 1):
        if hint is not None:
            click.echo(f"Please use {hint}.")
        words = ask("New password:")
        if not words or (old is not None and words == old.reveal()):
            fail(UNCHANGED)
        hint = weakness(words)
        if hint is None:
            break
    new = checked(words)
    if ask("Retype new password:") != words:
        fail("Mismatch - password unchanged.")
    return new


def _announce(name: bytes) -> None:
    click.echo(f"Changing only APOP password for {shown(name)}.", err=True)


def _has_rights(place: Place) -> bool:
    """Whether the caller is root, or owns the database."""
    if os.geteuid() == 0:
        return True
    try:
        return os.stat(place.db).st_uid == os.geteuid()
    except OSError:
        return False


def _is_absent(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _demand_rights(place: Place, what: str) -> None:
    if not _has_rights(place):
        _die(f"Only superuser or the owner of {place.db} can {what}")


def _die(text: str) -> NoReturn:
    fail(f"popauth: {text}")
