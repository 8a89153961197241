"""The mbox store, and the factory for `--store mbox:...`: where spools lie and how they are opened.

What is done with one that is open, `drop` knows.
"""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from twisted.logger import Logger
from zope.interface import implementer

from popdrop import search
from popdrop.errors import Busy, ConfigError, PopdropError, TemporaryFailure
from popdrop.interfaces import IBlockingStore, IStoreFactory
from popdrop.stores.mbox.drop import NO_FOLDER, TRY_LATER, MboxDrop, is_missing, told
from popdrop.stores.mbox.folders import former, private_folder, remember
from popdrop.stores.mbox.index import Indexes
from popdrop.stores.mbox.journal import BadKey, Journal, Journals, Leftover, Recovered
from popdrop.stores.mbox.kinds import FORMS, Form
from popdrop.stores.mbox.locks import KINDS, DotLock, SessionLock, SpoolLocks, hold, sweep
from popdrop.stores.mbox.recent import Recent
from popdrop.stores.mbox.recovery import MboxForm
from popdrop.stores.mbox.spool import NO_RIGHT, Spool, key_of, open_spool, take_spool
from popdrop.stores.template import Template
from popdrop.stores.uidl import STRIPPED
from popdrop.stores.uidlform import HASH_ONLY, UidlForm
from popdrop.values import Owner

log = Logger()

OPENINGS: Final = ("auto", "direct", "helper", "helper-all")
"""Values of `open=`: `helper` where that can be, else `direct`; nobody; the privileged helper,
those whose login it has verified; or all."""


def recover(
    journal: Journal, path: str, spool: Spool | None, kinds: tuple[str, ...], form: Form
) -> list[Recovered]:
    """Under the session lock: end what a crash has left unfinished; what was done.

    Takes the spool locks of `kinds`; the spool is of `form`. Raises `Busy`, what
    `Journal.recover` does, and `OSError`.
    """
    if spool is None:
        lock = DotLock(path)
        if "dot" in kinds and not lock.take():
            raise Busy("spool")
        try:
            return journal.recover(None, MboxForm(form), lock.refresh)
        finally:
            lock.release()
    if not spool.writable:
        raise TemporaryFailure(TRY_LATER, f"{path}: a journal waits, and the spool is read-only")
    with SpoolLocks(spool.fd, path, kinds, True) as locks:
        if not spool.is_at_path():
            raise Busy("spool")
        done = journal.recover(spool.fd, MboxForm(form), locks.refresh)
        spool.opened = spool.stat()
    return done


@implementer(IBlockingStore)
class MboxStore:
    """Maildrops that are mbox files.

    `template` gives the path (`Template`); session locks lie in `state_dir`/locks. `kind` is one
    of `kinds.FORMS`, `locks` are those of `locks.KINDS` to use, joined by commas. `owner` names
    the system account whose spools these are: `None` means the user's own account, and `any` that
    it is not looked at; a spool of our own is always accepted. `max_messages` and `max_octets` (as
    stored) bound a maildrop, 0 does not. `bare_cr`: `space` sends a CR that ends no line as a
    blank. `journal_dir` is a folder for journals that cannot be made beside their spools; then, or
    without it, they lie in `state_dir`/journal. `uidl` is that of `UidlForm`. `update_status`
    writes `Status: RO` to what was retrieved, and needs `strip_headers`. `opening` is one of
    `OPENINGS`: who opens a spool that this process has no right to. Raises `ConfigError`.

    `opener` is then set by who makes the store: it blocks, takes the octets of a canonical name,
    and gives a descriptor or `None` for a spool that is not there. It raises the two failures.
    """

    def __init__(
        self,
        template: str,
        state_dir: str,
        kind: str = "mboxrd",
        locks: str = "fcntl,dot",
        strip_headers: bool = True,
        owner: str | None = None,
        max_messages: int = 0,
        max_octets: int = 0,
        bare_cr: str = "keep",
        journal_dir: str = "",
        uidl: str = HASH_ONLY,
        update_status: bool = False,
        opening: str = "direct",
    ) -> None:
        if kind not in FORMS:
            raise ConfigError(f"kind={kind}: must be {_or(FORMS)}")
        chosen = locks.split(",")
        if not set(chosen) <= set(KINDS) or len(set(chosen)) < len(chosen):
            raise ConfigError(f"locks={locks}: must be fcntl, dot, or fcntl,dot")
        self._template = Template(template)
        self._folder = os.path.join(state_dir, "locks")
        self._owner = owner
        self._owner_uid = None if owner in (None, "any") else _uid_of(str(owner))
        self.form = FORMS[kind]
        self.locks: tuple[str, ...] = tuple(name for name in KINDS if name in chosen)
        if update_status and not strip_headers:
            raise ConfigError("update-status=yes: needs strip-headers=yes, or sizes would change")
        self.uidl = UidlForm(uidl)
        self.update_status = update_status
        self.strip = STRIPPED if strip_headers else frozenset()
        if bare_cr not in ("keep", "space"):
            raise ConfigError(f"bare-cr={bare_cr}: must be keep or space")
        self.spaced = bare_cr == "space"
        if opening not in OPENINGS:
            raise ConfigError(f"open={opening}: must be {_or(OPENINGS)}")
        self.suits_helper = owner != "any" and "{home}" not in template
        if opening in ("helper", "helper-all") and not self.suits_helper:
            what = "owner=any" if owner == "any" else "{home}"
            raise ConfigError(
                f"open={opening}: not with {what}: the helper opens a spool for one user, in a"
                " folder that the server may write to; name both, as mbox:/var/mail/{user}"
            )
        self.opening = opening
        self.template, self.owner = template, owner
        self.opener: Callable[[bytes], int | None] | None = None
        self.max_messages = max_messages
        self.max_octets = max_octets
        self.recent = Recent()
        form = f"{kind} {sorted(self.strip)} {self.uidl.text}"
        self.indexes = Indexes(state_dir, form.encode())
        self.folders = ((journal_dir, private_folder(journal_dir)),) if journal_dir else ()
        """Folders, besides the state folder, that must be the server's, and whether made now."""
        self._state_dir = state_dir
        self.journals = Journals(state_dir, folder=journal_dir, former=former(state_dir))

    def open(self, owner: Owner) -> MboxDrop:
        """As `IBlockingStore.open`. Raises `Busy`, `NoSuchOwner` and the two failures."""
        path = self._template.path(owner)
        with told(path):
            session = self._hold(path)
            spool = None
            try:
                spool = self._spool(path, owner)
                # A spool that is as this process has seen it needs no look at its journal: it
                # would have been forgotten if an update of ours had failed, and over another
                # process's journal nothing is written.
                if spool is None or not self.recent.get(path, key_of(spool.opened)):
                    self._recover(path, spool)
                return MboxDrop(self, session, spool)
            except BaseException:
                if spool:
                    spool.close()
                session.release()
                raise

    def _spool(self, path: str, owner: Owner) -> Spool | None:
        """Opened by ourselves where we may write it, else by `opener`; `None` if there is none."""
        uids = self._uids(owner)
        if self.opener is None:
            return open_spool(path, uids)
        try:
            spool = open_spool(path, uids)
        except OSError as error:
            if error.errno not in NO_RIGHT:
                raise
        else:
            # By default the helper is not asked for more than the spool's mode gives.
            if spool is None or spool.writable or self.opening == "auto":
                return spool
            spool.close()
        fd = self.opener(owner.user.encode("utf-8"))
        return None if fd is None else take_spool(fd, path, uids)

    def _recover(self, path: str, spool: Spool | None) -> None:
        """Under the session lock: end what a crash has left unfinished, if anything was."""
        journal = self.journals.of(path)
        if not journal.pending():
            return
        done = recover(journal, path, spool, self.locks, self.form)
        for each in done:
            log.warn(
                "{path}: recovered from a crash: {outcome}{aside}",
                path=path,
                outcome=each.outcome.value,
                aside=f", kept as {each.aside}" if each.aside else "",
            )

    def tidy(self) -> None:
        """As `IBlockingStore.tidy`: journals of a crash, stale and half-made dot-locks.

        Says, too, if the `fast` extra is broken: this is done once, at the start.

        Where all spools lie in one folder; those in home folders wait for a login.
        """
        if search.IN_USE.fault:
            log.warn(
                "stringzilla {fault}: the standard library does its work; install it again "
                "(pip install 'popdrop[fast]') or remove it",
                fault=search.IN_USE.fault,
            )
        self.indexes.sweep()
        self._make_key()
        for path, _ in self.folders:
            try:
                remember(self._state_dir, path)
            except OSError as error:
                log.warn(
                    "journal-dir={path} is not on record, keep the option: {why}",
                    path=path,
                    why=error.strerror,
                )
        folder = os.path.dirname(self._template.text)
        for each in list(self.journals.elsewhere) + ([] if "{" in folder else [folder]):
            with suppress(FileNotFoundError):
                for leftover in self.journals.leftovers(each):
                    self._tidy_one(leftover)
        if "{" not in folder:
            if is_missing(folder):
                log.warn("{path}: {what}", path=self._template.text, what=NO_FOLDER)
            with suppress(OSError):
                count = sweep(folder)
                if count:
                    log.info(
                        "{count} half-made locks removed from {path}", count=count, path=folder
                    )
            if "dot" in self.locks:
                self._tidy_locks(folder)

    def _tidy_locks(self, folder: str) -> None:
        """Break the stale dot-locks, among them those of a killed process of ours.

        Else deliverers would wait for them, Postfix 500 s, or until their users log in.
        """
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".lock")]
        except OSError:
            return  # said when somebody logs in
        for name in names:
            path = os.path.join(folder, name.removesuffix(".lock"))
            with suppress(OSError, PopdropError, Busy):
                held = DotLock(path).look(time.time())
                if held is None or not held.stale:
                    continue
                spool = open_spool(path, None)
                if spool is None:
                    continue
                try:
                    with SpoolLocks(spool.fd, path, self.locks, spool.writable):
                        log.info("{path}.lock of {who}: was stale", path=path, who=held.holder)
                finally:
                    spool.close()

    def _make_key(self) -> None:
        """Now, while there is space: the first deletion may be on a full disk (decision 1)."""
        try:
            self.journals.key()
            self.journals.sweep()
        except BadKey as error:
            log.error("no message can be deleted: {detail}", detail=error.detail)
        except OSError as error:
            log.error(
                "no message can be deleted: {path}: {why}",
                path=self.journals.key_path,
                why=error.strerror,
            )

    def _tidy_one(self, leftover: Leftover) -> None:
        path = leftover.spool
        if leftover.kind == "orphan" or path is None:
            log.warn("{path}: kept from a crash, for you to look at", path=leftover.path)
            return
        try:
            with told(path):
                session = self._hold(path)
                spool = None
                try:
                    spool = open_spool(path, None)
                    self._recover(path, spool)
                finally:
                    if spool:
                        spool.close()
                    session.release()
        except Busy:
            return  # whoever has it has seen to it, or the next login will
        except PopdropError as error:
            if self.opener is not None:
                # Who is to be asked for is known at his login only.
                log.warn("{path}: waits for its user's login", path=leftover.path)
                return
            log.error("{path}: {detail}", path=leftover.path, detail=error.detail or error.text)

    def _hold(self, path: str) -> SessionLock:
        return hold(self._folder, path)

    def _uids(self, owner: Owner) -> frozenset[int] | None:
        """Whose files are accepted as the owner's spool; `None` is anybody's."""
        if self._owner == "any":
            return None
        wanted = owner.uid if self._owner is None else self._owner_uid
        return frozenset({os.geteuid()} if wanted is None else {os.geteuid(), wanted})


def _uid_of(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(f"owner={name}: there is no such system account") from None


@implementer(IStoreFactory)
class MboxFactory:
    """`--store mbox:TEMPLATE[:key=value...]`."""

    kind = "mbox"
    help = (
        "mbox:TEMPLATE, one spool file a user, as mbox:/var/mail/{user}. The path may hold "
        "{user}, {domain}, {home}, {hash1}, {hash2} (qpopper's hash-spool). Keywords: "
        "kind=mboxrd|mboxo|mboxcl|mboxcl2|mmdf|auto (mboxrd un-quotes >From lines; mboxcl, mboxcl2 "
        "and auto believe a Content-Length that is true), locks=fcntl,dot, strip-headers=yes|no "
        "(Status and the like are not sent), owner=NAME|any (default: the user), "
        "bare-cr=keep|space (what a CR that ends no line is sent as), "
        "uidl=x-uidl|x-uid|hash (unique-ids of the old server, in header fields), "
        "update-status=yes|no (no: Status fields are left alone), "
        "max-messages=N, max-octets=N (0, the default: no limit), journal-dir=FOLDER (for journals "
        "that find no space beside the spool), open=auto|direct|helper|helper-all (who opens "
        "spools of mode 0600: nobody, or the privileged helper)."
    )
    keywords: Final = (
        "kind",
        "locks",
        "strip-headers",
        "owner",
        "bare-cr",
        "uidl",
        "update-status",
        "max-messages",
        "max-octets",
        "journal-dir",
        "open",
    )

    def make(self, reactor: object, state_dir: str, *args: str, **kwargs: str) -> MboxStore:
        """As `IStoreFactory.make`."""
        if len(args) != 1:
            raise ConfigError("mbox: takes one path, as mbox:/var/mail/{user}; quote a : by \\:")
        for name in kwargs:
            if name not in self.keywords:
                allowed = ", ".join(self.keywords)
                raise ConfigError(f"mbox: {name}= is not known; there are {allowed}")
        return MboxStore(
            args[0],
            state_dir,
            kind=kwargs.get("kind", "mboxrd"),
            locks=kwargs.get("locks", "fcntl,dot"),
            strip_headers=_choice("strip-headers", "yes", kwargs),
            update_status=_choice("update-status", "no", kwargs),
            owner=kwargs.get("owner"),
            uidl=kwargs.get("uidl", HASH_ONLY),
            max_messages=_count("max-messages", kwargs),
            max_octets=_count("max-octets", kwargs),
            bare_cr=kwargs.get("bare-cr", "keep"),
            journal_dir=kwargs.get("journal-dir", ""),
            opening=kwargs.get("open", "auto"),
        )


def _or(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def _choice(name: str, default: str, kwargs: dict[str, str]) -> bool:
    text = kwargs.get(name, default)
    if text not in ("yes", "no"):
        raise ConfigError(f"{name}={text}: must be yes or no")
    return text == "yes"


def _count(name: str, kwargs: dict[str, str]) -> int:
    text = kwargs.get(name, "0")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ConfigError(f"{name}={text}: must be a number, 0 for no limit")
    return int(text)
