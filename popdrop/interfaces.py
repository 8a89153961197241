"""Every zope Interface of Popdrop, and only interfaces.

Asynchronous methods are declared `-> Awaitable[T]`: a coroutine function and a function that
returns a `Deferred` both conform.
"""

from __future__ import annotations

from collections.abc import Awaitable, Collection
from typing import TYPE_CHECKING

from twisted.cred.credentials import ICredentials
from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IAddress

    from popdrop.accounts.rows import AppPassword
    from popdrop.listing import Listing
    from popdrop.sasl import Query
    from popdrop.values import (
        Account,
        Owner,
        PeerFacts,
        ScramVerifier,
        Secret,
        SessionRecord,
        Source,
    )


class IStore(Interface):
    """Where maildrops are kept, as the reactor sees it."""

    def open(owner: Owner) -> Awaitable[IMaildrop]:
        """Take exclusive hold and photograph.

        Raises `InUse`, `NoSuchOwner`, `TemporaryFailure`, `PermanentFailure`.
        """


class IMaildrop(Interface):
    """One maildrop, held by one session."""

    listing: Listing = Attribute(
        "Count and octets (as sent), fixed for the session; each size once `measure` has fired, ids"
        " once `identify` has."
    )

    def measure() -> Awaitable[None]:
        """Fill in the sizes that the listing does not hold yet, and learn where messages lie.

        Only where `listing.measured` says that they are lacking; before `ready` and `fetch`.
        """

    def identify() -> Awaitable[None]:
        """Fill in the ids that the listing does not hold yet. Once; in a thread."""

    def ready(index: int, lines: int | None, ahead: int = 0) -> bytes | None:
        """All of a small message at once, if that needs no waiting; else `None`.

        As `fetch`, but never blocks: the message is short and its pages are in memory. At most
        `ahead` messages more may be asked for at once, so that the next may be read along.
        """

    def fetch(index: int, lines: int | None) -> Awaitable[IBlocks]:
        """Message `index` (0-based) as wire-ready blocks; `lines` limits the body (TOP)."""

    wants_seen: bool = Attribute(
        "Whether `commit` is to be told which messages were retrieved, also where none is deleted."
    )

    def commit(deleted: Collection[int], seen: Collection[int] = ()) -> Awaitable[None]:
        """Remove exactly these (0-based), all or nothing, and be on disk when this fires.

        `seen` were retrieved: a store may mark them as read. Where it cannot nothing is raised.
        """

    def release() -> Awaitable[None]:
        """Let go. Idempotent, never fails, legal at any moment, after commit or without.

        Nobody has to wait for it; it fires when the maildrop is free for the next session.
        """


class IBlocks(Interface):
    """One message on its way out, dot-stuffed, ended by `.` CRLF."""

    def read() -> Awaitable[bytes]:
        """The next block, `b""` at the end."""

    def close() -> None:
        """No more blocks are wanted. Idempotent."""


class IBlockingStore(Interface):
    """What mbox and Maildir implement: plain blocking Python, called in threads."""

    def open(owner: Owner) -> IBlockingMaildrop:
        """One try, no waiting: raises `Busy` when another holds a lock."""

    def tidy() -> None:
        """Once after the start: remove what a killed process of ours may have left."""


class IBlockingMaildrop(Interface):
    """One maildrop of a blocking store. Calls come one after another, from any thread."""

    listing: Listing = Attribute("As `IMaildrop.listing`.")
    quick_release: bool = Attribute(
        "Whether `release` does no more than close descriptors that hold nothing unwritten, so that"
        " it may be called in the reactor."
    )

    wants_seen: bool = Attribute("As `IMaildrop.wants_seen`; without it `seen` is never given.")

    def identify() -> None:
        """As `IMaildrop.identify`: replaces `listing` by one with ids. May raise `Busy`."""

    def measure() -> None:
        """As `IMaildrop.measure`: replaces `listing` by one with sizes. May raise `Busy`."""

    def source(index: int) -> Source:
        """Where message `index` (0-based) lies. Does no input or output."""

    def reach(index: int, count: int, octets: int) -> int:
        """Octets from where message `index` lies to the end of the `count` messages behind it.

        Of fewer, where the maildrop ends, or the `unchanged` of message `index` does not speak for
        those that follow. 0 where each message is a file. More than `octets` are of no use: what
        begins so far behind need not be looked at. As cheap as `source` for each of the messages.
        """

    def commit(deleted: Collection[int], seen: Collection[int] = ()) -> None:
        """Remove these (0-based). Raises `Busy` before any write; all or nothing; on disk.

        `seen` as in `IMaildrop.commit`; where only they are given the errors may be raised.
        """

    def release() -> None:
        """Let go. Idempotent, never raises."""


class IStoreFactory(Interface):
    """The strcred of stores: a plugin that makes a store from a `--store` string."""

    kind: str = Attribute("Prefix in `--store`, as `mbox`.")
    help: str = Attribute("One paragraph for `--help`: the arguments and their defaults.")

    def make(reactor: object, state_dir: str, *args: str, **kwargs: str) -> object:
        """An `IStore` or an `IBlockingStore`. Raises `ConfigError`.

        `state_dir` is a folder of ours for locks and indexes.
        """


class IAccounts(Interface):
    """Where accounts are kept."""

    def lookup(name: bytes) -> Account | None:
        """Blocking. Raises `TemporaryFailure` or `PermanentFailure`, never guesses."""

    def app_password(name: bytes, words: bytes) -> AppPassword | None:
        """The app password of an account that `words` are. Blocking; raises as `lookup`."""

    def note_use(name: bytes, used: AppPassword, now: float) -> None:
        """An app password was used at `now`, in seconds since the epoch. Blocking."""

    def improve(account: Account, password: Secret) -> bool:
        """Store a password that was good just now as well as can be. Blocking.

        `False` where the account was changed meanwhile.
        """


class IScramAccounts(Interface):
    """Accounts that keep verifiers for SCRAM."""

    def scram(name: bytes, algorithm: str) -> ScramVerifier:
        """The verifier for `algorithm`, `SHA-1` or `SHA-256`. Blocking; raises as `lookup`.

        For a name without an account, or an account without a verifier, a made-up one, always the
        same for the same name, which no password satisfies: the challenge must not tell who exists.
        """


class IAnswers(Interface):
    """The accounts, as sessions may ask them before anybody has logged in."""

    def answer(query: Query) -> Awaitable[object]:
        """What its docstring promises. Raises `TemporaryFailure`."""


class IBackend(Interface):
    """A blocking checker: called in a thread, or by the privileged helper in its own process."""

    kinds: frozenset[str] = Attribute("`password`, `apop` or both.")

    def check(credentials: ICredentials) -> Account:
        """Who these credentials belong to; those of `USER`/`PASS` and the like, or of APOP.

        The account has a name, and where they are known uid, gid, home and shell. Raises
        `NoSuchUser` and `NoVerifierOfThisKind` where the next checker may be asked,
        `BadCredentials`, `TemporaryFailure`, `PermanentFailure`.
        """


class IScramCredentials(ICredentials):
    """A finished exchange of SCRAM (RFC 5802), up to the client's proof."""

    username: bytes = Attribute("The name as the client gave it.")
    algorithm: str = Attribute("`SHA-1` or `SHA-256`.")

    def check(verifier: ScramVerifier) -> bool:
        """Whether the client has shown that it knows the password. In constant time."""


class IBearerToken(ICredentials):
    """A token of OAUTHBEARER (RFC 7628) or XOAUTH2."""

    username: bytes = Attribute("The name that the client wants to be, maybe empty.")
    token: bytes = Attribute("The token. Never log it.")


class IExternal(ICredentials):
    """EXTERNAL (RFC 4422 appendix A): TLS has verified a client certificate."""

    username: bytes = Attribute("The name in the certificate.")


class ITicket(Interface):
    """One login attempt, open until it is closed. An open one counts as a failure."""

    def close(outcome: str) -> None:
        """`good`, `bad` or `void` (nobody's fault: `[IN-USE]`, `[SYS/...]`). Idempotent."""


class IThrottle(Interface):
    """Connection and attempt budget; per process or shared."""

    floor: float = Attribute(
        "Seconds after its receipt at which a failed login is answered at the earliest."
    )

    def admit(peer: IAddress) -> bool:
        """May this connection stay? Each `True` is paid back by one `leave`."""

    def attempt(peer: IAddress, user: bytes, proof: bytes | None) -> Awaitable[ITicket]:
        """A budgeted attempt. `proof` is an HMAC of user and secret, or `None` (decision 24)."""

    def delay(peer: IAddress, user: bytes) -> float:
        """Seconds after its receipt at which a failed login of these is answered."""

    def enter(user: bytes) -> bool:
        """May this verified user have one more connection? Each `True` is paid by one `quit`."""

    def quit(user: bytes) -> None:
        """The connection that `enter` let in is this user's no more."""

    def leave(peer: IAddress) -> None:
        """The connection that `admit` let in is gone."""


class IRelayWindow(Interface):
    """POP-before-SMTP: whoever has logged in may relay mail for a while."""

    def open_for(peer: PeerFacts, account: bytes) -> Deferred[None] | None:
        """After a login: fires when the MTA knows of it. Never fails.

        `None`: nothing is opened for such a client, or there is nothing to wait for.
        """


class ISessionLog(Interface):
    """A sink of session events."""

    def event(record: SessionRecord) -> None:
        """At each login, at each failure and at the end of a session. Never raises."""

    def close() -> None:
        """Let go of files. Idempotent."""
