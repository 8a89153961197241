"""`popdrop user`: accounts, their passwords and their APOP secrets."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

import click
from click.exceptions import Abort, Exit

from popdrop.accounts.database import (
    KEEP,
    AccountsDatabase,
    Keep,
    Refused,
    checked_name,
    checked_words,
    shown,
)
from popdrop.accounts.rows import Entry
from popdrop.credentials import prepared
from popdrop.errors import BadCredentials
from popdrop.places import default_database
from popdrop.values import Secret

STRONG_APOP_OCTETS = 16
GENERATED_OCTETS = 24
_LINE_OCTETS = 4096

APOP_RULE = (
    "Note: {name} has an APOP secret now. Cleartext login (USER and PASS, AUTH PLAIN, AUTH LOGIN)"
    " is refused to this account, also under TLS, unless the server runs with"
    " `--cleartext always` or `--apop-users allow`."
)
SHORT_APOP = (
    f"Warning: fewer than {STRONG_APOP_OCTETS} octets. Whoever records an APOP login can guess"
    " the secret off line; `--generate` makes one that cannot be guessed."
)

Command = Callable[..., Any]


def _default_db() -> str:
    return default_database(os.environ, os.geteuid())


db_option = click.option(
    "--db",
    metavar="FILE",
    default=_default_db,
    help="The accounts database. Default: $XDG_STATE_HOME/popdrop/accounts.db, or as root"
    " /var/lib/popdrop/accounts.db.",
)


def words_options(command: Command) -> Command:
    """The options of commands that take a new password."""
    for option in (
        click.option("--generate", is_flag=True, help="Make a long random one and print it once."),
        click.option("--stdin", "from_stdin", is_flag=True, help="Read it from standard input."),
        click.option("--both", is_flag=True, help="Set password and APOP secret to the same."),
        click.option("--apop", is_flag=True, help="Set the APOP secret, not the password."),
    ):
        command = option(command)
    return command


@click.group()
def user() -> None:
    """Accounts: who may log in, and with what."""


@user.command()
@db_option
@words_options
@click.argument("name")
def add(name: str, db: str, apop: bool, both: bool, from_stdin: bool, generate: bool) -> None:
    """Add the account NAME. Makes the database when there is none."""
    _exclude(apop=apop, both=both)
    _exclude(stdin=from_stdin, generate=generate)
    canonical = checked_name(_octets(name))
    if os.path.lexists(db) and _open(db).has(canonical):
        raise Refused(f"{shown(canonical)}: there is such an account already; `passwd` changes it")
    words = _words(from_stdin, generate)
    if AccountsDatabase.create(db):
        click.echo(f"Made the accounts database {os.path.realpath(db)}", err=generate)
    accounts = _open(db)
    accounts.add(canonical, None if apop else words, words if apop or both else None)
    accounts.close()
    click.echo(f"Added {shown(canonical)} to {accounts.path}", err=generate)
    _conclude(canonical, words, apop or both, generate)


@user.command()
@db_option
@words_options
@click.option(
    "--remove",
    type=click.Choice(["password", "apop"]),
    help="Remove the password, or the APOP secret, instead of setting it.",
)
@click.argument("name")
def passwd(
    name: str,
    db: str,
    apop: bool,
    both: bool,
    from_stdin: bool,
    generate: bool,
    remove: str | None,
) -> None:
    """Change the password, or with --apop the APOP secret, of NAME."""
    _exclude(apop=apop, both=both, remove=remove is not None)
    _exclude(stdin=from_stdin, generate=generate, remove=remove is not None)
    accounts, canonical = _account(db, name)
    words = Secret(b"")
    password: Secret | Keep | None = KEEP
    secret: Secret | Keep | None = KEEP
    if remove == "password":
        password = None
    elif remove == "apop":
        secret = None
    else:
        words = _words(from_stdin, generate)
        password = KEEP if apop else words
        secret = words if apop or both else KEEP
    accounts.change(canonical, password=password, apop=secret)
    accounts.close()
    click.echo(f"Changed {shown(canonical)} in {accounts.path}", err=generate)
    _conclude(canonical, words, apop or both, generate)


@user.command()
@db_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("name")
def delete(name: str, db: str, yes: bool) -> None:
    """Delete the account NAME. Its mail is not touched."""
    accounts, canonical = _account(db, name)
    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete the account {shown(canonical)}?", abort=True)
    accounts.delete(canonical)
    accounts.close()
    click.echo(f"Deleted {shown(canonical)} from {accounts.path}; the mail was not touched")


@user.command()
@db_option
@click.argument("name")
def disable(name: str, db: str) -> None:
    """Let NAME log in no more; password and secret are kept."""
    accounts, canonical = _account(db, name)
    accounts.disable(canonical)
    accounts.close()
    click.echo(f"Disabled {shown(canonical)} in {accounts.path}")


@user.command()
@db_option
@click.argument("name")
def enable(name: str, db: str) -> None:
    """Let NAME log in again after `disable`."""
    accounts, canonical = _account(db, name)
    accounts.enable(canonical)
    accounts.close()
    click.echo(f"Enabled {shown(canonical)} in {accounts.path}")


@user.command("list")
@db_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
def list_accounts(db: str, as_json: bool) -> None:
    """List all accounts: a table on a terminal, else one plain line each. No secrets."""
    accounts = _open(db)
    entries = accounts.entries()
    accounts.close()
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in entries], indent=2))
    elif sys.stdout.isatty():
        _print_table(entries)
    else:
        for entry in entries:
            facts = _facts(entry)
            name = facts.pop("name")
            cells = (f"{key}={_word(value)}" for key, value in facts.items())
            click.echo(f"{name} {' '.join(cells)}")


def _facts(entry: Entry) -> dict[str, str | bool]:
    changed = datetime.fromtimestamp(entry.changed, UTC)
    return {
        "name": shown(entry.name),
        "password": entry.has_password,
        "apop": entry.has_apop,
        "disabled": entry.disabled,
        "changed": changed.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _word(value: str | bool) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _print_table(entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in ("Name", "Password", "APOP", "Disabled", "Changed (UTC)"):
        table.add_column(title)
    for entry in entries:
        cells = [_word(value) for value in _facts(entry).values()]
        # Text and not str: a name may hold what looks like rich's mark-up.
        table.add_row(*(Text(cell) for cell in cells), style="dim" if entry.disabled else None)
    Console().print(table)


def _open(db: str) -> AccountsDatabase:
    return AccountsDatabase(db)


def _account(db: str, name: str) -> tuple[AccountsDatabase, bytes]:
    """The open database and the canonical name of an account in it. Raises `Refused`."""
    accounts = _open(db)
    try:
        canonical = prepared(_octets(name))
    except BadCredentials:
        canonical = b""
    if not accounts.has(canonical):
        raise Refused(f"{shown(_octets(name))}: no such account in {accounts.path}")
    return accounts, canonical


def _octets(argument: str) -> bytes:
    return argument.encode("utf-8", "surrogateescape")


def _exclude(**given: bool) -> None:
    names = [f"--{option}" for option, is_given in given.items() if is_given]
    if len(names) > 1:
        raise click.UsageError(f"{' and '.join(names)} exclude each other.")


def _words(from_stdin: bool, generate: bool) -> Secret:
    if generate:
        return Secret(secrets.token_urlsafe(GENERATED_OCTETS).encode("ascii"))
    if from_stdin:
        line = sys.stdin.buffer.readline(_LINE_OCTETS)
        return _checked(line.removesuffix(b"\n").removesuffix(b"\r"))
    if not sys.stdin.isatty():
        raise click.UsageError("Standard input is no terminal: use --stdin or --generate.")
    try:
        first = getpass.getpass("New password:")
        again = getpass.getpass("Retype new password:")
    except (EOFError, UnicodeDecodeError):
        raise Abort from None
    if first != again:
        _fail("Mismatch - password unchanged.")
    return _checked(_octets(first))


def _checked(words: bytes) -> Secret:
    return Secret(checked_words(Secret(words)))


def _fail(line: str) -> NoReturn:
    click.echo(line, err=True)
    raise Exit(1)


def _conclude(name: bytes, words: Secret, has_apop: bool, generate: bool) -> None:
    if has_apop:
        if len(words.reveal()) < STRONG_APOP_OCTETS:
            click.echo(SHORT_APOP, err=True)
        click.echo(APOP_RULE.format(name=shown(name)), err=True)
    if generate:
        click.echo(words.reveal().decode("ascii"))
