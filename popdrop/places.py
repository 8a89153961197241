"""Where Popdrop keeps its own files when no option says otherwise."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping

SYSTEM_STATE_DIR = "/var/lib/popdrop"
POPAUTH_SOCKET = "/run/popdrop/popauth"
"""Where `popdrop popauth` looks for the server's self-service."""


def default_state_dir(environ: Mapping[str, str], euid: int) -> str:
    """The state folder: an absolute path; it need not exist.

    Root's is `/var/lib/popdrop`, anybody else's `$XDG_STATE_HOME/popdrop`, by default
    `~/.local/state/popdrop` (XDG Base Directory Specification: a relative value is ignored).
    """
    if euid == 0:
        return SYSTEM_STATE_DIR
    base = environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):
        return os.path.join(base, "popdrop")
    home = environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(euid).pw_dir
        except KeyError:
            return SYSTEM_STATE_DIR
    return os.path.join(home, ".local", "state", "popdrop")


def default_database(environ: Mapping[str, str], euid: int) -> str:
    """The accounts database: an absolute path; it need not exist."""
    return os.path.join(default_state_dir(environ, euid), "accounts.db")
