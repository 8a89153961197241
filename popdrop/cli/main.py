"""The group of all subjects: `popdrop SUBJECT ...`."""

from __future__ import annotations

from typing import Any

import click

import popdrop as package
from popdrop.accounts.database import Refused
from popdrop.cli.apppasswords import app_password
from popdrop.cli.fsck import fsck
from popdrop.cli.imports import export_accounts, import_accounts
from popdrop.cli.popauth import popauth
from popdrop.cli.relay import relay
from popdrop.cli.show import list_accounts, show_account
from popdrop.cli.user import user
from popdrop.errors import ConfigError, PopdropError


class OneLine(click.Group):
    """A group whose commands fail with one line and exit status 1, never with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, with our errors made presentable."""
        try:
            return super().invoke(ctx)
        except (ConfigError, Refused) as error:
            raise click.ClickException(str(error)) from None
        except PopdropError as error:
            raise click.ClickException(error.detail or error.text) from None


@click.group(cls=OneLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package.__version__, message="%(prog)s %(version)s")
def popdrop() -> None:
    """Look after a Popdrop POP3 server.

    The server itself is started with `twistd popdrop`.
    """


for command in (list_accounts, show_account, app_password, import_accounts, export_accounts):
    user.add_command(command)
popdrop.add_command(fsck)
popdrop.add_command(popauth)
popdrop.add_command(relay)
popdrop.add_command(user)
