"""`popdrop user list` and `popdrop user show`: what accounts have. Never a secret."""

from __future__ import annotations

import sys
from typing import Final

import click

from popdrop.accounts import scram
from popdrop.accounts.database import shown
from popdrop.accounts.rows import AppPassword, Entry
from popdrop.cli.common import (
    Fact,
    Place,
    Worded,
    database_options,
    limits,
    line,
    moment,
    print_json,
    print_table,
    scope_facts,
    word,
)
from popdrop.policy import Policy
from popdrop.values import Account

_TITLES: Final = ("Name ", "Password", "APOP", "Apps", "Limits ", "Changed (UTC)")


@click.command("list", cls=Worded)
@database_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
def list_accounts(place: Place, as_json: bool) -> None:
    """List all accounts: a table on a terminal, else one plain line each. No secrets."""
    accounts = place.open()
    entries = accounts.entries()
    accounts.close()
    if as_json:
        print_json([entry_facts(entry) for entry in entries])
    elif sys.stdout.isatty():
        print_table(_TITLES, ((_cells(entry), entry.disabled) for entry in entries))
    elif entries:
        click.echo("\n".join(map(_plain, entries)))


@click.command("show", cls=Worded)
@database_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.argument("name")
def show_account(name: str, place: Place, as_json: bool) -> None:
    """Show all that is known of NAME: how it can log in, and what narrows it. No secrets."""
    accounts, canonical = place.account(name)
    entry = accounts.entry(canonical)
    programs = accounts.app_passwords(canonical)
    account = accounts.lookup(canonical)
    accounts.close()
    facts = entry_facts(entry)
    facts["mechanisms"] = mechanisms(entry)
    system = None if account is None else _system(account)
    notes = list(_notes(entry, account))
    if as_json:
        print_json(
            {
                **facts,
                "app_password_list": [app_facts(each) for each in programs],
                "system": system,
                "notes": notes,
            }
        )
        return
    rows = [(key.replace("_", "-"), word(key, value)) for key, value in facts.items()]
    rows += [("app-password", line(app_facts(each))) for each in programs]
    rows.append(("system", "none" if system is None else line(system)))
    rows += [("note", note) for note in notes]
    if sys.stdout.isatty():
        print_table(
            ("", f"{shown(canonical)} "), (([key, value], False) for key, value in rows[1:])
        )
    else:
        click.echo("\n".join(f"{key}: {value}" for key, value in rows))


def entry_facts(entry: Entry) -> dict[str, Fact]:
    """The keys of JSON and of plain lines for an account; they are here to stay."""
    return {
        "name": shown(entry.name),
        "password": entry.has_password,
        "apop": entry.has_apop,
        "disabled": entry.disabled,
        "changed": moment(entry.changed),
        "app_passwords": entry.app_passwords,
        **scope_facts(entry.scope),
    }


def app_facts(each: AppPassword) -> dict[str, Fact]:
    """The same for an app password. The label comes last: it may hold blanks."""
    return {
        "created": moment(each.created),
        "used": None if each.used is None else moment(each.used),
        **scope_facts(each.scope),
        "label": each.label,
    }


def mechanisms(entry: Entry) -> list[str]:
    """By what the account can log in, as far as its verifiers go.

    `USER` is USER and PASS. What a server offers is narrower: it depends on its options.
    """
    found = []
    if entry.has_password or entry.app_passwords:
        found += ["USER", "PLAIN", "LOGIN"]
    if entry.has_password:
        names = {kind: f"SCRAM-{algorithm}" for algorithm, kind in scram.KINDS.items()}
        found += [name for kind, name in names.items() if kind in entry.kinds]
    if entry.has_apop:
        found += ["APOP", "CRAM-MD5"]
    return found


def _cells(entry: Entry) -> list[str]:
    return [
        shown(entry.name),
        word("", entry.has_password),
        word("", entry.has_apop),
        str(entry.app_passwords),
        limits(entry.scope, entry.disabled),
        moment(entry.changed, short=True),
    ]


def _plain(entry: Entry) -> str:
    facts = entry_facts(entry)
    name = facts.pop("name")
    return f"{name} {line(facts)}"


def _system(account: Account) -> dict[str, Fact] | None:
    if account.uid is None:
        return None
    return {
        "uid": account.uid,
        "home": account.home,
        "shell": account.shell,
        "under_uid_floor": account.uid < Policy().min_uid,
    }


def _notes(entry: Entry, account: Account | None) -> list[str]:
    """What an administrator who looks here may be wondering about."""
    notes = []
    if entry.disabled:
        notes.append("disabled: no login at all; `popdrop user enable` undoes it")
    if entry.has_apop and (entry.has_password or entry.app_passwords):
        notes.append(
            "it has an APOP secret, so cleartext login (USER and PASS, AUTH PLAIN, AUTH LOGIN) is"
            " refused unless the server runs with `--cleartext always` or `--apop-users allow`"
        )
    if account is None:
        return notes
    if account.apop_sealed:
        notes.append(
            "the APOP secret does not open: the key is missing or another one; restore it, or set"
            " the secret anew"
        )
    if entry.has_password and not entry.kinds >= scram.ALL_KINDS:
        notes.append("no SCRAM yet: it is made at the next login by password, or by `passwd`")
    if account.uid is not None and account.uid < Policy().min_uid:
        notes.append(
            f"the system account has uid {account.uid}: no login under the server's `--min-uid`,"
            f" {Policy().min_uid} by default, and never with uid 0"
        )
    return notes
