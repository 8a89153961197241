"""Exceptions that carry their POP3 response code.

The text of each is ours and constant per place: it may go on the wire as it is. Text of any other
exception never does.
"""

from __future__ import annotations

from typing import ClassVar

from twisted.cred.error import UnauthorizedLogin


class PopdropError(Exception):
    """Something a client is told with `-ERR [code] text` (RFC 2449 section 8, RFC 3206).

    `text` is printable ASCII and safe to send. `detail` is for the log alone: it may hold paths
    and offsets.
    """

    code: ClassVar[bytes | None] = None

    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.detail = detail

    @property
    def word(self) -> str:
        """The code as the log's `reason=` word: `in-use`, `sys/temp`."""
        return (self.code or b"error").decode("ascii").lower()

    def line(self) -> bytes:
        """The reply, without its line end."""
        code = b"" if self.code is None else b"[" + self.code + b"] "
        return b"-ERR " + code + self.text.encode("ascii", "replace")


class InUse(PopdropError):
    """Another session holds the maildrop (RFC 2449 section 8.1.2)."""

    code = b"IN-USE"


class LoginDelay(PopdropError):
    """The account logged in too short a time ago (RFC 2449 section 8.1.1)."""

    code = b"LOGIN-DELAY"


class TemporaryFailure(PopdropError):
    """Try again later, nothing was lost (RFC 3206 section 4)."""

    code = b"SYS/TEMP"


class PermanentFailure(PopdropError):
    """Trying again does not help, an administrator must act (RFC 3206 section 4)."""

    code = b"SYS/PERM"


class BadCredentials(PopdropError, UnauthorizedLogin):
    """The credentials are not good; which part of them is not said (RFC 3206 section 4)."""

    code = b"AUTH"


class NoSuchUser(BadCredentials):
    """This checker has no such account: the next one in a `Chain` may be asked."""


class NoVerifierOfThisKind(BadCredentials):
    """This checker knows the account but cannot verify such credentials: the next may."""


class NoSuchOwner(PermanentFailure):
    """The store has no place for such an owner."""


class Busy(Exception):
    """A lock is held by another; nothing was written. Raised by blocking stores, one try only.

    `lock` is `session` (another POP3 session holds the maildrop) or `spool` (a deliverer or a
    mail reader is at work).
    """

    def __init__(self, lock: str) -> None:
        super().__init__(lock)
        self.lock = lock


class ConfigError(Exception):
    """An option is wrong. The text names the option and the remedy, on one line."""
