"""What lies beside a spool: its locks, its journals, and who owns it. Nothing is changed here.

Folders are listed once for all spools: there may be as many of them as there are spools.
"""

from __future__ import annotations

import os
import pwd
import stat
import time
from collections import defaultdict
from contextlib import suppress

from popdrop.stores.mbox.findings import Finding
from popdrop.stores.mbox.journal import Files, Journals, Leftover
from popdrop.stores.mbox.locks import STALE_AFTER, TEMPORARY, DotLock, identity


class StateOwner(Files):
    """File calls that take the journals of the state folder's owner for ours.

    Root may look at the journals of a server that has given up its rights.
    """

    def __init__(self, state_dir: str) -> None:
        uid = os.geteuid()
        if uid == 0:
            with suppress(OSError):
                uid = os.stat(state_dir).st_uid
        self.geteuid = lambda: uid


class Neighbours:
    """What is in the folders of spools, and in those for journals that had no place there."""

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self._temporaries: dict[str, dict[str, list[str]]] = {}
        self._orphans: dict[str, dict[str, list[str]]] = {}
        self._elsewhere: dict[bytes, list[str]] | None = None

    def temporaries(self, path: str) -> list[str]:
        """Dot-locks in the making of the spool at `path`."""
        folder, name = os.path.split(path)
        if folder not in self._temporaries:
            known: dict[str, list[str]] = defaultdict(list)
            for each in os.listdir(folder or "."):
                stem, mark, _ = each.partition(TEMPORARY)
                if mark and each.startswith("."):
                    known[stem[1:]].append(os.path.join(folder, each))
            self._temporaries[folder] = known
        return sorted(self._temporaries[folder].get(name, ()))

    def orphans(self, path: str) -> list[str]:
        """Journals of the spool that were kept aside."""
        folder = os.path.dirname(path)
        found: list[str] = []
        for each in (folder, *self._journals.elsewhere):
            if each not in self._orphans:
                known: dict[str, list[str]] = defaultdict(list)
                for leftover in self._leftovers(each):
                    if leftover.kind == "orphan" and leftover.spool is not None:
                        known[leftover.spool].append(leftover.path)
                self._orphans[each] = known
            for name in (path, *self.other_paths(path)) if each != folder else (path,):
                found += self._orphans[each].get(name, ())
        return found

    def other_paths(self, path: str) -> list[str]:
        """Other paths of the same spool under which there are journals in other folders."""
        if self._elsewhere is None:
            self._elsewhere = defaultdict(list)
            for folder in self._journals.elsewhere:
                for leftover in self._leftovers(folder):
                    if leftover.spool is not None:
                        with suppress(OSError):
                            self._elsewhere[identity(leftover.spool)].append(leftover.spool)
        with suppress(OSError):
            return sorted(set(self._elsewhere.get(identity(path), ())) - {path})
        return []

    def _leftovers(self, folder: str) -> list[Leftover]:
        # To tell whose they are needs the key, and to ask for it would make it.
        if folder in self._journals.elsewhere and not os.path.lexists(self._journals.key_path):
            return []
        return self._journals.leftovers(folder)


def look_beside(
    path: str, neighbours: Neighbours, journals: Journals, kinds: tuple[str, ...]
) -> list[Finding]:
    """What is to be said of the files beside the spool at `path`. Raises `OSError`.

    `kinds` are the locks in use: nobody minds a dot-lock where they are fcntl alone.
    """
    found = []
    if "dot" in kinds:
        found += _dot_lock(path)
    now = time.time()
    for each in neighbours.temporaries(path):
        with suppress(FileNotFoundError):
            if is_left_over(each, now):
                text = "a dot-lock in the making, of a process that was killed"
                found.append(Finding("lock-temporary", text, path=each))
    found += _journals(path, neighbours, journals)
    for each in neighbours.orphans(path):
        text = "a journal that was kept aside: see whether the spool lacks mail of it, remove it"
        found.append(Finding("orphan", text, path=each))
    return found


def is_left_over(temporary: str, now: float) -> bool:
    """Whether a dot-lock in the making is ours and older than any that is still being made."""
    found = os.lstat(temporary)
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and found.st_mtime < now - STALE_AFTER
    )


def _dot_lock(path: str) -> list[Finding]:
    lock = DotLock(path)
    held = lock.look(time.time())
    if held is None:
        return []
    if held.fault:
        text = f"{held.fault}, so the spool can never be locked: remove it"
        return [Finding("lock-odd", text, path=lock.path)]
    if held.stale:
        return [Finding("lock-stale", f"stale dot-lock of {held.holder}", path=lock.path)]
    return [Finding("lock-held", f"dot-lock of {held.holder}", path=lock.path)]


def _journals(path: str, neighbours: Neighbours, journals: Journals) -> list[Finding]:
    found = []
    has_key = os.path.lexists(journals.key_path)
    for each in (path, *neighbours.other_paths(path)):
        journal = journals.of(each)
        if not journal.pending():
            continue
        if not has_key:
            text = f"a journal, and no {journals.key_path}: name the server's --state-dir"
            found.append(Finding("journal-foreign", text))
            continue
        for where, fault in journal.look():
            if fault:
                text = f"a journal that is not of this server and state folder: {fault}"
                found.append(Finding("journal-foreign", text, path=where))
            else:
                text = "an update that a crash has left unfinished"
                found.append(Finding("journal", text, path=where))
    return found


def look_at_rights(path: str, found: os.stat_result) -> list[Finding]:
    """What is to be said of the mode and the owner of a spool."""
    said = []
    rights = [
        word
        for bit, word in ((stat.S_IROTH, "read"), (stat.S_IWOTH, "write"))
        if found.st_mode & bit
    ]
    if rights:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        text = f"mode {mode} lets everybody {' and '.join(rights)} it: chmod o-rwx"
        said.append(Finding("mode", text))
    with suppress(KeyError, ValueError):
        named = pwd.getpwnam(os.path.basename(path)).pw_uid
        if found.st_uid not in (named, os.geteuid()):
            said.append(Finding("owner", f"belongs to uid {found.st_uid}, not {named}"))
    return said
