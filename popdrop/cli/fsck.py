"""`popdrop fsck`: what is wrong with spools, and with what lies beside them; and to mend it."""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import click
from click.exceptions import Exit

from popdrop.places import default_state_dir
from popdrop.stores.mbox.findings import Finding, Severity, Watch, printable, unwatched
from popdrop.stores.mbox.fsck import Fsck, Result, Settings
from popdrop.stores.mbox.kinds import FORMS
from popdrop.stores.mbox.locks import KINDS
from popdrop.stores.mbox.mend import Failed

CLEAN, REPAIRED, LEFT, FAILED = 0, 1, 4, 8
"""Exit statuses, those of fsck(8)."""

BIG: Final = 64 << 20
"""Octets of a spool whose look takes long enough for a progress bar."""

_STATUS: Final = {"clean": CLEAN, "repaired": REPAIRED, "left": LEFT}
_STYLES: Final = {"error": "bold red", "warning": "yellow", "note": "dim", "done": "green"}
_SKIPPED: Final = ".lock"


class _Text:
    """Lines for people; coloured on a terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def result(self, result: Result, repair: bool) -> None:
        """What was found in one spool, what was done, and what that comes to."""
        path = printable(result.path)
        for each in result.found:
            if each.severity is not Severity.NOTE or not self._quiet:
                self._say(_line(each, path), each.severity.value)
        for done in result.done:
            self._say(f"{path}: {printable(done)}", "done")
        for each in result.left if result.done else ():
            self._say(f"left: {_line(each, path)}", each.severity.value)
        if result.refused:
            words = "not mended" if repair else "--repair will not mend it"
            self._say(f"{path}: {words}: {result.refused}", "error")
        for what, kept in (("copy", result.copy), ("report", result.report)):
            if kept:
                self._say(f"{path}: {what}: {printable(kept)}", "")
        if result.status != "clean" or not self._quiet:
            self._say(f"{path}: {self._words(result, repair)}", "")

    def _words(self, result: Result, repair: bool) -> str:
        words = {"clean": "clean", "repaired": "repaired", "left": "not clean"}[result.status]
        mendable = any(each.mendable for each in result.left) and not result.refused
        if result.left and not repair and mendable:
            words += "; --repair mends it"
        elif result.left and not mendable:
            words += "; nothing that --repair could mend"
        messages = f"{result.messages} message{'s' * (result.messages != 1)}"
        return f"{words} ({messages}, {result.octets} octets)"

    def failed(self, path: str, words: str) -> None:
        """It could not be done."""
        click.echo(f"Error: {printable(words)}", err=True)

    def skipped(self, path: str) -> None:
        """It is no spool."""
        if not self._quiet:
            self._say(f"{printable(path)}: skipped, for it bears the name of a dot-lock", "note")

    def _say(self, line: str, style: str) -> None:
        if not sys.stdout.isatty():
            click.echo(line)
            return
        from rich.console import Console
        from rich.text import Text

        Console().print(Text(line, _STYLES.get(style, "")), soft_wrap=True)


class _Json:
    """An object a line: one for each finding, and one for each spool behind its findings."""

    def result(self, result: Result, repair: bool) -> None:
        """As `_Text.result`."""
        path = printable(result.path)
        for each in result.found:
            self._say(
                spool=path,
                kind=each.kind,
                severity=each.severity.value,
                mendable=each.mendable,
                path=printable(each.path or result.path),
                line=each.line,
                offset=each.offset,
                text=printable(each.text),
            )
        self._say(
            spool=path,
            status=result.status,
            messages=result.messages,
            octets=result.octets,
            done=[printable(each) for each in result.done],
            left=[each.kind for each in result.left],
            refused=result.refused or None,
            copy=printable(result.copy) or None,
            report=printable(result.report) or None,
        )

    def failed(self, path: str, words: str) -> None:
        """As `_Text.failed`."""
        self._say(spool=printable(path), status="failed", text=printable(words))

    def skipped(self, path: str) -> None:
        """As `_Text.skipped`."""
        self._say(spool=printable(path), status="skipped")

    def _say(self, **fields: object) -> None:
        click.echo(json.dumps(fields))


def _line(finding: Finding, path: str) -> str:
    where = printable(finding.path) if finding.path else path
    line = "" if finding.line is None else f":{finding.line}"
    offset = "" if finding.offset is None else f" (offset {finding.offset})"
    return f"{where}{line}: {finding.severity.value}: {printable(finding.text)}{offset}"


@contextmanager
def _progress(path: str, wanted: bool) -> Iterator[Watch]:
    """A bar on standard error, on a terminal and for a big spool."""
    size = 0
    with suppress(OSError):
        size = os.stat(path).st_size
    if not wanted or size < BIG or not sys.stderr.isatty():
        yield unwatched
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bars:
        task = bars.add_task("", total=size)
        now = ""

        def watch(doing: str, octets: int) -> None:
            nonlocal now
            if doing != now:
                now = doing
                bars.reset(task, description=doing, total=size)
            bars.advance(task, octets)

        yield watch


class _Statuses(click.Command):
    """A command of which exit status 1 has another meaning than that it was stopped."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped; run the same command again to go on.", err=True)
            raise Exit(FAILED) from None


def _locks(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    if not set(chosen) <= set(KINDS) or len(set(chosen)) < len(chosen):
        raise click.BadParameter("must be fcntl, dot, or fcntl,dot")
    return tuple(name for name in KINDS if name in chosen)


def _uids(
    ctx: click.Context, parameter: click.Parameter, text: str | None
) -> frozenset[int] | None:
    if text in (None, "any"):
        return None
    name = str(text)
    try:
        uid = int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise click.BadParameter("there is no such system account") from None
    return frozenset({os.geteuid(), uid})


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what the server's are, and how long to wait."""
    for option in (
        click.option(
            "--backup-dir",
            metavar="DIR",
            help="Where copies and reports go. Default: fsck in the state folder.",
        ),
        click.option(
            "--owner",
            "uids",
            metavar="NAME",
            callback=_uids,
            help="Who must own the spools, `any` for anybody. Default: any.",
        ),
        click.option(
            "--lock-timeout",
            metavar="SECONDS",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            help="How long to wait for a lock.",
        ),
        click.option(
            "--locks",
            metavar="KINDS",
            callback=_locks,
            default=",".join(KINDS),
            show_default=True,
            help="The locks to take, as the server's `--store` has it.",
        ),
        click.option(
            "--state-dir",
            metavar="DIR",
            default=lambda: default_state_dir(os.environ, os.geteuid()),
            help="The server's state folder. Default: $XDG_STATE_HOME/popdrop, or as root"
            " /var/lib/popdrop.",
        ),
        click.option(
            "--kind",
            type=click.Choice(tuple(FORMS)),
            default="mboxrd",
            show_default=True,
            help="The kind of mbox, as the server's `--store` has it.",
        ),
    ):
        command = option(command)
    return command


@click.command(cls=_Statuses)
@click.option("--repair", is_flag=True, help="Mend what can be mended; a copy is kept first.")
@_server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing of clean spools, and no notes.")
@click.argument("spools", metavar="SPOOL...", nargs=-1, required=True)
def fsck(
    repair: bool,
    kind: str,
    state_dir: str,
    locks: tuple[str, ...],
    lock_timeout: float,
    uids: frozenset[int] | None,
    backup_dir: str | None,
    as_json: bool,
    quiet: bool,
    spools: tuple[str, ...],
) -> None:
    """Look through mbox spools for damage; with --repair mend it.

    Without --repair nothing is changed. A server may run meanwhile. Exit status: 0 clean,
    1 repaired, 4 something is left to do, 8 a spool could not be looked at or not be mended;
    the highest of all SPOOLs.
    """
    settings = Settings(
        state_dir=os.path.abspath(state_dir),
        kind=kind,
        locks=locks,
        uids=uids,
        lock_timeout=lock_timeout,
        backup_dir=backup_dir,
    )
    say: _Json | _Text = _Json() if as_json else _Text(quiet)
    worst = CLEAN
    checker = Fsck(settings)
    for each in spools:
        # As the server names it: journals that are not beside their spool are found by it.
        path = os.path.abspath(each)
        if path.endswith(_SKIPPED):
            say.skipped(path)
            continue
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                raise Failed(f"{path}: is a folder: name the spools in it, as {path}/*")
            with _progress(path, not as_json and not quiet) as watch:
                checker.watch = watch
                result = checker.mend(path) if repair else checker.look(path)
        except Failed as failed:
            say.failed(path, str(failed))
            worst = max(worst, FAILED)
        else:
            say.result(result, repair)
            worst = max(worst, _STATUS[result.status])
    raise Exit(worst)
