"""`popdrop user import` and `popdrop user export`: accounts from other servers, and to them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import click
from click.exceptions import Exit

from popdrop.accounts.database import (
    Incoming,
    Merged,
    Refused,
    checked_name,
    checked_words,
    shown,
)
from popdrop.accounts.importers import FORMATS, Found, Item, Trouble, Unreadable, Use, read, serving
from popdrop.accounts.rows import Entry
from popdrop.cli.common import STRONG_APOP_OCTETS, Place, database_options

ADD: Final = "add"
REPLACE: Final = "replace"
KEEP: Final = "keep"
REFUSE: Final = "refuse"

APOP_NOTE: Final = (
    "Note: accounts with an APOP secret are refused cleartext login (USER and PASS, AUTH PLAIN,"
    " AUTH LOGIN), also under TLS, unless the server runs with `--cleartext always` or"
    " `--apop-users allow`. Here: {count}."
)
SHORT_NOTE: Final = (
    "Warning: {count} of the APOP secrets have fewer than {octets} octets. Whoever records such a"
    " login can guess the secret off line."
)


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one entry of a file: `outcome` is one of the four words above.

    `entry` is what to merge, absent for `REFUSE`. `text` says why, or what is left out.
    """

    name: str
    outcome: str
    brings: str
    where: str
    text: str
    entry: Incoming | None = None

    @property
    def taken(self) -> bool:
        """Whether the account is imported."""
        return self.outcome in (ADD, REPLACE)

    def facts(self) -> dict[str, str]:
        """For JSON and tables."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "brings": self.brings,
            "where": self.where,
            "text": self.text,
        }


def _use_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for use, text in (
        (Use.BOTH, "Make a secret in clear both password and APOP secret."),
        (Use.PASSWORD, "Make a secret in clear the password, whatever it was."),
        (Use.APOP, "Make a secret in clear the APOP secret, whatever it was."),
    ):
        name = use.name.lower()
        command = click.option(f"--{name}", f"use_{name}", is_flag=True, help=text)(command)
    return command


@click.command("import")
@database_options
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="What the files are. `qpopper`: its gdbm, ndbm or Berkeley DB database; `authuser`:"
    " s/qmail's users/authuser; `spop3d`: solid-pop3d's ~/.spop3d; `passwd`: a passwd-file of"
    " Dovecot's, htpasswd or shadow; `list`: lines of NAME PASSWORD.",
)
@click.option("--name", help="Whose ~/.spop3d it is. Default: its owner's.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--replace", is_flag=True, help="Overwrite what accounts that exist have.")
@_use_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, an object an entry.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
def import_accounts(
    files: tuple[str, ...],
    place: Place,
    form: str,
    name: str | None,
    dry_run: bool,
    replace: bool,
    as_json: bool,
    use_apop: bool,
    use_password: bool,
    use_both: bool,
) -> None:
    """Take accounts over from other servers' files, all in one transaction or none.

    The files are only read. Exit status 1: something was not taken, and each is named.
    """
    if use_apop + use_password + use_both > 1:
        raise click.UsageError("--apop, --password and --both exclude each other.")
    if name is not None and len(files) > 1:
        raise click.UsageError("--name goes with one FILE.")
    use = Use.AS_IS
    for given, wanted in (
        (use_apop, Use.APOP),
        (use_password, Use.PASSWORD),
        (use_both, Use.BOTH),
    ):
        use = wanted if given else use
    rows = _rows(_items(files, form, name), use, _existing(place), replace)
    if dry_run:
        _show(rows, as_json)
    else:
        _merge(place, [row for row in rows if row.taken], replace)
        if as_json:
            _show(rows, as_json)
        else:
            _report(place, rows)
    _warn(rows)
    if not all(row.taken for row in rows):
        raise Exit(1)


def _items(files: Sequence[str], form: str, name: str | None) -> list[Item]:
    whose = None if name is None else name.encode("utf-8", "surrogateescape")
    try:
        return [item for file in files for item in read(file, form, whose)]
    except Unreadable as error:
        raise Refused(f"{error}; nothing was imported") from None


def _existing(place: Place) -> frozenset[bytes]:
    if not os.path.lexists(place.db):
        return frozenset()
    accounts = place.open()
    names = frozenset(accounts.names())
    accounts.close()
    return names


def _rows(items: Sequence[Item], use: Use, existing: frozenset[bytes], replace: bool) -> list[Row]:
    taken: dict[bytes, str] = {}
    rows = []
    for given in items:
        item = serving(given, use)
        if isinstance(item, Trouble):
            name = "" if item.name is None else shown(item.name)
            rows.append(Row(name, REFUSE, "", item.where, item.text))
            continue
        row = _row(item, existing, replace)
        if row.entry is not None:
            first = taken.setdefault(row.entry.name, item.where)
            if first != item.where:
                text = f"the same account as in {first}, which counts"
                row = Row(row.name, REFUSE, row.brings, row.where, text)
        rows.append(row)
    return rows


def _row(item: Found, existing: frozenset[bytes], replace: bool) -> Row:
    brings = _brings(item)
    try:
        name = checked_name(item.name)
        for secret in (item.password, item.apop):
            if secret is not None:
                checked_words(secret)
    except Refused as error:
        return Row(shown(item.name), REFUSE, brings, item.where, str(error))
    entry = Incoming(name, item.password, item.password_hash, item.apop, item.disabled)
    left = f"left out: {', '.join(item.remarks)}" if item.remarks else ""
    if name not in existing:
        return Row(shown(name), ADD, brings, item.where, left, entry)
    if replace:
        return Row(shown(name), REPLACE, brings, item.where, left, entry)
    text = "there is such an account already; --replace overwrites"
    return Row(shown(name), KEEP, brings, item.where, text)


def _brings(item: Found) -> str:
    words = (
        ("password", item.password),
        ("hash", item.password_hash),
        ("apop", item.apop),
        ("disabled", item.disabled or None),
    )
    return "+".join(word for word, there in words if there is not None)


def _merge(place: Place, rows: Sequence[Row], replace: bool) -> None:
    if not rows:
        return
    if place.create():
        click.echo(f"Made the accounts database {os.path.realpath(place.db)}", err=True)
    accounts = place.open()
    entries = [row.entry for row in rows if row.entry is not None]
    with _progress(len(entries)) as step:
        outcomes = accounts.merge(entries, replace, step)
    accounts.close()
    assert Merged.KEPT not in outcomes  # `merge` refuses what changed since `_existing`


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal: a password takes some 40 ms."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Hashing", total=total)
        yield lambda: bar.advance(task)


def _show(rows: Sequence[Row], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([row.facts() for row in rows], indent=2))
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        for row in rows:
            click.echo(_line(row))


def _line(row: Row) -> str:
    words = [row.outcome, row.name or "-", row.brings or "-", row.where]
    return " ".join(words) + (f": {row.text}" if row.text else "")


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {ADD: "green", REPLACE: "yellow", KEEP: "dim", REFUSE: "red"}
    table = Table()
    for title in ("Name", "Outcome", "Brings", "Where", "Why"):
        table.add_column(title)
    for row in rows:
        # Text and not str: a name may hold what looks like rich's mark-up.
        cells = (Text(cell) for cell in row.facts().values())
        table.add_row(*cells, style=styles[row.outcome])
    Console().print(table)


def _report(place: Place, rows: Sequence[Row]) -> None:
    for row in rows:
        if not row.taken or row.text:
            click.echo(_line(row), err=True)
    counts = {word: sum(row.outcome == word for row in rows) for word in (ADD, REPLACE)}
    left = len(rows) - sum(counts.values())
    path = os.path.realpath(place.db)
    click.echo(f"Added {counts[ADD]}, replaced {counts[REPLACE]}, left {left} in {path}")


def _warn(rows: Sequence[Row]) -> None:
    secrets = [
        row.entry.apop
        for row in rows
        if row.taken and row.entry is not None and row.entry.apop is not None
    ]
    short = sum(len(secret.reveal()) < STRONG_APOP_OCTETS for secret in secrets)
    if short:
        click.echo(SHORT_NOTE.format(count=short, octets=STRONG_APOP_OCTETS), err=True)
    if secrets:
        click.echo(APOP_NOTE.format(count=len(secrets)), err=True)


@click.command("export")
@database_options
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "passwd"]),
    default="json",
    show_default=True,
    help="JSON lines, an object an account; or a passwd-file as Dovecot's.",
)
@click.option("--with-hashes", is_flag=True, help="With the hashes of the passwords.")
def export_accounts(place: Place, form: str, with_hashes: bool) -> None:
    """Print all accounts: names, facts, and when asked for the hashes of their passwords.

    APOP secrets are never exported: back up the database and its key for those.
    """
    accounts = place.open()
    entries = accounts.entries()
    for entry in entries:
        hashed = None
        if with_hashes and entry.has_password:
            account = accounts.lookup(entry.name)
            if account is not None and account.password_hash is not None:
                hashed = account.password_hash.reveal().decode("ascii", "backslashreplace")
        click.echo(_json_line(entry, hashed) if form == "json" else _passwd_line(entry, hashed))
    accounts.close()


def _json_line(entry: Entry, hashed: str | None) -> str:
    facts: dict[str, object] = {
        "name": entry.name.decode("utf-8", "backslashreplace"),
        "password": entry.has_password,
        "apop": entry.has_apop,
        "disabled": entry.disabled,
        "read_only": entry.scope.read_only,
        "networks": [str(network) for network in entry.scope.networks],
        "expires": None if entry.scope.expires is None else _time(entry.scope.expires),
        "changed": _time(entry.changed),
    }
    if hashed is not None:
        facts["password_hash"] = hashed
    return json.dumps(facts, ensure_ascii=True)


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _passwd_line(entry: Entry, hashed: str | None) -> str:
    name = entry.name.decode("utf-8", "backslashreplace")
    if ":" in name:
        raise Refused(f"{shown(entry.name)}: no passwd-file can hold a colon; use --format json")
    if entry.scope.read_only or entry.scope.expires is not None:
        text = "no passwd-file says `read-only` or when it expires"
        click.echo(f"Warning: {shown(entry.name)}: {text}", err=True)
    if hashed is None:
        field = "*"
    elif hashed.startswith("{"):
        field = hashed
    else:
        field = ("{ARGON2ID}" if hashed.startswith("$argon2id$") else "{CRYPT}") + hashed
    # As passwd(1) locks an account: no password matches, to Dovecot neither.
    line = f"{name}:{'!' if entry.disabled else ''}{field}"
    if entry.scope.networks:
        line += f"::::::allow_nets={','.join(str(network) for network in entry.scope.networks)}"
    return line
