"""`popdrop relay`: who may relay mail after a POP3 login, and an end to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

import click

from popdrop.accounts.database import Refused, shown
from popdrop.cli.common import Fact, line, moment, print_json, print_table
from popdrop.ops.grants import Grant, Grants
from popdrop.places import default_state_dir
from popdrop.values import Network, network_of

_TITLES: Final = ("Client", "Until (UTC)", "Account ")


def _default_folder() -> str:
    return default_state_dir(os.environ, os.geteuid())


_folder: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--state-dir",
    "folder",
    metavar="DIR",
    default=_default_folder,
    help="The state folder of the server. Default: $XDG_STATE_HOME/popdrop, or as root"
    " /var/lib/popdrop.",
)


@click.group()
def relay() -> None:
    """The relay window (POP-before-SMTP): who may relay mail now.

    It is opened by logins where the server runs with `--relay`.
    """


@relay.command("list")
@_folder
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
def list_grants(folder: str, as_json: bool) -> None:
    """List clients that may relay now: a table on a terminal, else one plain line each."""
    grants = Grants(folder)
    found = grants.all()
    grants.close()
    if as_json:
        print_json([_facts(grant) for grant in found])
    elif sys.stdout.isatty():
        print_table(_TITLES, (([str(v) for v in _facts(grant).values()], False) for grant in found))
    elif found:
        click.echo("\n".join(line(_facts(grant)) for grant in found))


@relay.command("end")
@_folder
@click.argument("client")
def end_grant(folder: str, client: str) -> None:
    """Close the window for CLIENT, an address, or for all in a network.

    The next login from there opens it again; `popdrop user disable` is against that. An MTA that
    reads a file hears of it within ten seconds.
    """
    whose = _network(client)
    grants = Grants(folder)
    ended = [each.client for each in grants.all() if _overlap(whose, _network(each.client))]
    for each in ended:
        grants.end(each)
    grants.close()
    if not ended:
        raise Refused(f"{client}: may not relay now; popdrop relay list shows who may")
    for each in ended:
        click.echo(f"{each} may not relay any more.")


def _network(text: str) -> Network:
    """An address or a network; a v4-mapped one is of IPv4. Raises `Refused`."""
    try:
        return network_of(text.partition("%")[0])
    except ValueError:
        raise Refused("no address; write it as 192.0.2.7, 2001:db8::7 or 2001:db8::/64") from None


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def _facts(grant: Grant) -> dict[str, Fact]:
    """The keys of JSON and of plain lines; they are here to stay."""
    return {
        "client": grant.client,
        "until": moment(int(grant.until)),
        "account": shown(grant.account),
    }
