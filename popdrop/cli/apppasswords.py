"""`popdrop user app-password`: passwords of single programs, which can be taken back one by one."""

from __future__ import annotations

import sys
from typing import Final

import click

from popdrop.accounts.database import Keep, shown
from popdrop.accounts.rows import AppPassword
from popdrop.cli.common import (
    Place,
    Worded,
    database_options,
    limits,
    line,
    moment,
    print_json,
    print_table,
    scope_of,
    scope_options,
)
from popdrop.cli.show import app_facts
from popdrop.values import Network

_TITLES: Final = ("Label ", "Created (UTC)", "Last use (UTC)", "Limits ")


@click.group("app-password")
def app_password() -> None:
    """Passwords of single programs, made here, which can be taken back one by one."""


@app_password.command(cls=Worded)
@database_options
@scope_options
@click.argument("name")
@click.argument("label")
def add(
    name: str,
    label: str,
    place: Place,
    expires: int | Keep | None,
    networks: tuple[Network, ...] | Keep,
    read_only: bool | Keep,
) -> None:
    """Make an app password for NAME, told apart by LABEL, and print it this one time.

    Whatever narrows the account narrows its app passwords, too.
    """
    accounts, canonical = place.account(name)
    words = accounts.add_app_password(canonical, label, scope_of(expires, networks, read_only))
    accounts.close()
    click.echo(
        f"Added the app password {label} of {shown(canonical)} to {accounts.path};"
        " it is not shown again",
        err=True,
    )
    click.echo(words.reveal().decode("ascii"))


@app_password.command("list", cls=Worded)
@database_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
@click.argument("name")
def list_app_passwords(name: str, place: Place, as_json: bool) -> None:
    """List the app passwords of NAME and their last use, to the hour. No secrets."""
    accounts, canonical = place.account(name)
    found = accounts.app_passwords(canonical)
    accounts.close()
    if as_json:
        print_json([app_facts(each) for each in found])
    elif sys.stdout.isatty():
        print_table(_TITLES, ((_cells(each), False) for each in found))
    elif found:
        click.echo("\n".join(line(app_facts(each)) for each in found))


@app_password.command(cls=Worded)
@database_options
@click.argument("name")
@click.argument("label")
def delete(name: str, label: str, place: Place) -> None:
    """Take the app password LABEL of NAME back, at once."""
    accounts, canonical = place.account(name)
    accounts.delete_app_password(canonical, label)
    accounts.close()
    click.echo(f"Deleted the app password {label} of {shown(canonical)} from {accounts.path}")


def _cells(each: AppPassword) -> list[str]:
    used = "never" if each.used is None else moment(each.used, short=True)
    return [each.label, moment(each.created, short=True), used, limits(each.scope)]
