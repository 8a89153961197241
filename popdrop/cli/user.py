"""`popdrop user`: accounts, their passwords, their APOP secrets, and what narrows them."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Final

import click

from popdrop.accounts.database import KEEP, Keep, Refused, checked_name, shown
from popdrop.cli.common import (
    Command,
    Place,
    Worded,
    asked_words,
    checked,
    database_options,
    exclude,
    first_line,
    note_apop,
    octets,
    scope_of,
    scope_options,
    warn_past,
)
from popdrop.values import Network, Secret

GENERATED_OCTETS: Final = 24


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


@user.command(cls=Worded)
@database_options
@words_options
@scope_options
@click.argument("name")
def add(
    name: str,
    place: Place,
    apop: bool,
    both: bool,
    from_stdin: bool,
    generate: bool,
    expires: int | Keep | None,
    networks: tuple[Network, ...] | Keep,
    read_only: bool | Keep,
) -> None:
    """Add the account NAME. Makes the database when there is none."""
    exclude(apop=apop, both=both)
    exclude(stdin=from_stdin, generate=generate)
    canonical = checked_name(octets(name))
    if os.path.lexists(place.db) and place.open().has(canonical):
        raise Refused(f"{shown(canonical)}: there is such an account already; `passwd` changes it")
    words = _words(from_stdin, generate)
    if place.create():
        click.echo(f"Made the accounts database {os.path.realpath(place.db)}", err=generate)
    accounts = place.open()
    accounts.add(
        canonical,
        None if apop else words,
        words if apop or both else None,
        scope_of(expires, networks, read_only),
    )
    accounts.close()
    click.echo(f"Added {shown(canonical)} to {accounts.path}", err=generate)
    _conclude(canonical, words, apop or both, generate)


@user.command(cls=Worded)
@database_options
@words_options
@click.option(
    "--remove",
    type=click.Choice(["password", "apop"]),
    help="Remove the password, or the APOP secret, instead of setting it.",
)
@click.argument("name")
def passwd(
    name: str,
    place: Place,
    apop: bool,
    both: bool,
    from_stdin: bool,
    generate: bool,
    remove: str | None,
) -> None:
    """Change the password, or with --apop the APOP secret, of NAME."""
    exclude(apop=apop, both=both, remove=remove is not None)
    exclude(stdin=from_stdin, generate=generate, remove=remove is not None)
    accounts, canonical = place.account(name)
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


@user.command(cls=Worded)
@database_options
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("name")
def delete(name: str, place: Place, yes: bool) -> None:
    """Delete the account NAME. Its mail is not touched."""
    accounts, canonical = place.account(name)
    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete the account {shown(canonical)}?", abort=True)
    accounts.delete(canonical)
    accounts.close()
    click.echo(f"Deleted {shown(canonical)} from {accounts.path}; the mail was not touched")


@user.command(cls=Worded)
@database_options
@click.argument("old")
@click.argument("new")
def rename(old: str, new: str, place: Place) -> None:
    """Give the account OLD the name NEW. Its mail stays where it is: move it yourself.

    Passwords, APOP secret and app passwords come along. Nobody can log in as OLD any more.
    """
    accounts, canonical = place.account(old)
    accounts.rename(canonical, octets(new))
    accounts.close()
    click.echo(
        f"Renamed {shown(canonical)} to {shown(checked_name(octets(new)))} in {accounts.path};"
        " the mail was not touched"
    )


@user.command(cls=Worded)
@database_options
@scope_options
@click.argument("name")
def change(
    name: str,
    place: Place,
    expires: int | Keep | None,
    networks: tuple[Network, ...] | Keep,
    read_only: bool | Keep,
) -> None:
    """Change until when, from where, and whether only to read, NAME may log in."""
    if expires is KEEP and networks is KEEP and read_only is KEEP:
        raise click.UsageError(
            "Nothing to change: give --expires, --networks, --read-only or --read-write."
        )
    accounts, canonical = place.account(name)
    accounts.change(canonical, expires=expires, networks=networks, read_only=read_only)
    accounts.close()
    click.echo(f"Changed {shown(canonical)} in {accounts.path}")
    warn_past(expires)


@user.command(cls=Worded)
@database_options
@click.argument("name")
def disable(name: str, place: Place) -> None:
    """Let NAME log in no more; password and secret are kept."""
    accounts, canonical = place.account(name)
    accounts.disable(canonical)
    accounts.close()
    click.echo(f"Disabled {shown(canonical)} in {accounts.path}")


@user.command(cls=Worded)
@database_options
@click.argument("name")
def enable(name: str, place: Place) -> None:
    """Let NAME log in again after `disable`."""
    accounts, canonical = place.account(name)
    accounts.enable(canonical)
    accounts.close()
    click.echo(f"Enabled {shown(canonical)} in {accounts.path}")


@user.command(cls=Worded)
@database_options
@click.option(
    "--to",
    metavar="SOURCE",
    help="Where the new key is, as --key. A file is made when there is none. Default: a new"
    " random key in the place of the old one.",
)
def rekey(place: Place, to: str | None) -> None:
    """Seal all secrets anew, under a new key. A running server goes on without a pause.

    After --to, tell the server too: `--auth accounts:FILE:key=SOURCE`, and start it again.
    """
    accounts = place.open()
    count = accounts.rekey(to)
    accounts.close()
    click.echo(f"Sealed {count} secrets in {accounts.path} under a new key; back both up")
    if to is not None:
        click.echo(
            f"Start the server with `--auth accounts:{accounts.path}:key=SOURCE` from now on, and"
            " give --key here",
            err=True,
        )


def _words(from_stdin: bool, generate: bool) -> Secret:
    if generate:
        return Secret(secrets.token_urlsafe(GENERATED_OCTETS).encode("ascii"))
    if from_stdin:
        return checked(first_line())
    if not sys.stdin.isatty():
        raise click.UsageError("Standard input is no terminal: use --stdin or --generate.")
    return asked_words()


def _conclude(name: bytes, words: Secret, has_apop: bool, generate: bool) -> None:
    if has_apop:
        note_apop(name, words)
    if generate:
        click.echo(words.reveal().decode("ascii"))
