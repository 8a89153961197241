"""THE state machine of a POP3 session: command table, states, capabilities, effects.

Everything that affects the state of a session lives here: lines in, replies and effects out. No
input or output, no clock, no reactor. While an effect is in progress the shell feeds no line; that
one rule gives pipelining and ordering.

Sources: RFC 1939, 2449 (CAPA), 2595 (STLS), 3206 (response codes), 5034 (AUTH), 6856 (UTF8, LANG);
LAST is RFC 1460's. Over 400 lines, since a session's states are one subject.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from popdrop import policy as rules
from popdrop.credentials import ApopCredentials, Cleartext, Credentials, prepared_or_raw
from popdrop.errors import BadCredentials, PopdropError
from popdrop.listing import Listing
from popdrop.policy import Policy
from popdrop.sasl import (
    CHANNEL_BINDING,
    MECHANISMS,
    Accepted,
    ApopQuery,
    Exchange,
    Query,
    Refused,
    ScramQuery,
    Step,
    Surroundings,
    decoded,
    encoded,
)
from popdrop.values import PeerFacts, Tally
from popdrop.wire import COMMAND_LIMIT, SASL_LIMIT, Overlong, has_control, number

BAD_BEFORE_LOGIN: Final = 10
"""Unknown or malformed commands in AUTHORIZATION until the session is closed."""
BAD_IN_ALL: Final = 20
"""The same in the whole session; Dovecot has 20."""
QUESTIONS: Final = 10
"""Questions to the accounts until the session is closed: look-ups that no throttle sees."""
FAILED_LOGINS: Final = 4
"""Failed logins until the session is closed: enough for a client that falls back from APOP."""

_SPEAKABLE = re.compile(rb"[A-Za-z0-9._@+-]{1,64}").fullmatch
"""Names that may stand in a reply. Others are not echoed."""
_OTHER_PROTOCOL = re.compile(rb"(?i)(?:GET|POST|PUT|HEAD|EHLO|HELO|OPTIONS|CONNECT) ").match
"""A first line that shows a confused or forced client (the ALPACA attacks)."""


_EMPTY: Final = Listing(())
_NONE: Final[frozenset[int]] = frozenset()
_NOTHING_DONE: Final = Tally()
"""Of all sessions before their login; nothing is counted there."""


def _with(numbers: set[int] | frozenset[int], more: int) -> set[int]:
    """`numbers` and one more. A set is made for the first: most sessions idle without one."""
    if isinstance(numbers, set):
        numbers.add(more)
        return numbers
    return {more}


class State(enum.Enum):
    """RFC 1939 section 3."""

    AUTHORIZATION = "AUTHORIZATION"
    TRANSACTION = "TRANSACTION"
    UPDATE = "UPDATE"


@dataclass(frozen=True, slots=True)
class Login:
    """Verify these credentials and open the maildrop. Answered by `opened` or `refused`."""

    credentials: Credentials


@dataclass(frozen=True, slots=True)
class Ask:
    """Put a question to the accounts. Answered by `told`, or `refused` if they cannot be read."""

    query: Query


@dataclass(frozen=True, slots=True)
class Measure:
    """Fill in the sizes, and learn where the messages lie. Answered by `learned` or `failed`."""


@dataclass(frozen=True, slots=True)
class Identify:
    """Fill in the unique-ids. Answered by `learned` or `failed`."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Send message `index` (0-based), of its body only `lines`. `fetching` gives the first line."""

    index: int
    lines: int | None


@dataclass(frozen=True, slots=True)
class Commit:
    """Remove these messages (0-based), then close. Answered by `committed` or `failed`.

    `seen` were retrieved, and are not deleted.
    """

    deleted: frozenset[int]
    seen: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class StartTLS:
    """Send `reply`, throw away all that was read, start TLS, then call `secure`."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class Hangup:
    """Send `farewell` and close."""

    farewell: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reply that the log shall know of, in our own words."""

    reply: bytes
    reason: str


Reply = bytes | Iterator[bytes]
Effect = Login | Ask | Measure | Identify | Fetch | Commit | StartTLS | Hangup
Result = Reply | Refusal | Effect


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the command table.

    `least` and `most` count the arguments; with `rest` the one argument is all behind the first
    blank, blanks included. `before_tls` commands work where STLS is required and has not been
    given yet. `measured` ones ask for sizes. `capability` is what CAPA says of the command now, ""
    for nothing.
    """

    keyword: str
    do: Callable[..., Result]
    least: int
    most: int
    states: tuple[State, ...]
    syntax: str
    summary: str
    source: str
    rest: bool = False
    before_tls: bool = False
    measured: bool = False
    capability: Callable[[Session], str] | None = None


def _no_nonce() -> bytes:
    raise RuntimeError("this session was given no nonces")


class Session:
    """One session. `challenge` is the APOP challenge, `b""` where APOP is off.

    `nonce` gives 128 random bits as hexadecimal digits, others at each call.
    """

    __slots__ = (
        "_asking",
        "_bad",
        "_challenge",
        "_deleted",
        "_deleted_octets",
        "_error_challenge",
        "_exchange",
        "_failures",
        "_first",
        "_last",
        "_listing",
        "_named",
        "_nonce",
        "_peer",
        "_policy",
        "_questions",
        "_read_only",
        "_secured",
        "_seen",
        "_state",
        "_success_challenge",
        "_waiting",
        "tally",
        "user",
    )

    def __init__(
        self,
        challenge: bytes,
        policy: Policy,
        secured: bool,
        nonce: Callable[[], bytes] = _no_nonce,
    ) -> None:
        self._challenge = challenge
        self._policy = policy
        self._secured = secured
        self._nonce = nonce
        self._peer: PeerFacts | None = None
        self._state = State.AUTHORIZATION
        self._first = True
        self._bad = 0
        self._failures = 0
        self._exchange: Exchange | None = None
        self._asking: Callable[[object], Result] | None = None
        self._questions = 0
        self._error_challenge: bytes | None = None
        self._success_challenge: bytes | None = None
        self._named = False
        self._waiting: Callable[[], Result] | None = None
        self._listing = _EMPTY
        self._read_only = False
        self._deleted: set[int] | frozenset[int] = _NONE
        self._deleted_octets = 0
        self._seen: set[int] | frozenset[int] = _NONE
        self._last = 0
        self.user: bytes | None = None
        """The name as the client gave it last; raw."""
        self.tally = _NOTHING_DONE

    # What the shell tells

    def greeting(self) -> bytes:
        """The first line (RFC 1939 section 4), the challenge right before its end."""
        if self._challenge:
            return b"+OK Popdrop ready " + self._challenge + b"\r\n"
        return b"+OK Popdrop ready\r\n"

    def met(self, peer: PeerFacts) -> None:
        """What is known of the peer; until this is called every rule takes its strictest form."""
        self._peer = peer

    @property
    def line_limit(self) -> int:
        """Octets that the next line may have, its CRLF included."""
        return COMMAND_LIMIT if self._exchange is None else SASL_LIMIT

    @property
    def secured(self) -> bool:
        """Whether TLS protects the connection."""
        return self._secured

    @property
    def logged_in(self) -> bool:
        """Whether a maildrop is open."""
        return self._state is State.TRANSACTION

    def line(self, line: bytes) -> Result:
        """One line from the client, without its end."""
        if self._exchange is not None:
            return self._response(line)
        if self._first:
            self._first = False
            if _OTHER_PROTOCOL(line):
                return Hangup(b"", "other-protocol")
        if has_control(line):
            return self._malformed("control character in a command")
        word, blank, rest = line.partition(b" ")
        command = COMMANDS.get(word) or COMMANDS.get(word.upper())
        if command is None:
            return self._malformed("unknown command")
        if self._state not in command.states:
            return self._out_of_place()
        if not command.before_tls and rules.tls_is_missing(self._policy, self._secured):
            return Refusal(b"-ERR [AUTH] TLS required but not negotiated\r\n", "tls-required")
        if command.rest:
            return command.do(self, rest) if blank else self._malformed("argument missing")
        arguments = rest.split(b" ") if blank else []
        if not command.least <= len(arguments) <= command.most or b"" in arguments:
            return self._malformed("wrong arguments")
        if command.measured and not self._listing.measured:
            self._waiting = partial(command.do, self, *arguments)
            return Measure()
        return command.do(self, *arguments)

    def overlong(self, kind: Overlong) -> Result:
        """A line over `line_limit` came and was thrown away."""
        exchange, self._exchange = self._exchange, None
        if isinstance(exchange, Accepted):
            return Hangup(b"-ERR authentication cancelled\r\n", "sasl-cancelled")
        if kind is Overlong.ENDLESS:
            return Hangup(b"-ERR line too long\r\n", "endless-line")
        return self._malformed("line too long")

    # What the shell reports back

    def opened(self, listing: Listing, read_only: bool = False) -> bytes:
        """The login succeeded and the maildrop is held. A `read_only` session deletes nothing."""
        self._state = State.TRANSACTION
        self.tally = Tally()
        self._read_only = read_only
        self._listing = listing
        self._count()
        name = self._speakable(b"maildrop")
        welcome = b"+OK %s has %d message(s) (%d octets).\r\n" % (
            name,
            len(listing),
            listing.octets,
        )
        challenge, self._success_challenge = self._success_challenge, None
        if challenge is None:
            return welcome
        self._exchange = Accepted(welcome)
        return encoded(challenge)

    def told(self, answer: object) -> Result:
        """The answer to `Ask`: what waited for it goes on."""
        asking, self._asking = self._asking, None
        if asking is None:
            raise RuntimeError("nothing was asked")
        return asking(answer)

    def refused(self, error: PopdropError) -> bytes | Hangup:
        """The login failed, or a question. Bad credentials count, temporary trouble does not.

        Bearer tokens are refused by a challenge (RFC 7628 section 3.2.2), and the reply follows the
        client's answer.
        """
        self._asking = None
        challenge, self._error_challenge = self._error_challenge, None
        self._success_challenge = None
        reply = error.line() + b"\r\n"
        if isinstance(error, BadCredentials):
            if challenge is not None:
                self._exchange = Refused(error)
                return encoded(challenge)
            self._failures += 1
            if self._failures >= FAILED_LOGINS:
                return Hangup(reply, "too-many-failures")
        return reply

    def learned(self, listing: Listing) -> Result:
        """Sizes or unique-ids are there: the command that waited for them is answered."""
        self._listing = listing
        waiting, self._waiting = self._waiting, None
        return waiting() if waiting else b""

    def fetching(self, fetch: Fetch) -> bytes:
        """The message is on its way: the line that goes before it."""
        octets = self._listing.size(fetch.index)
        if fetch.lines is not None:
            self.tally.top += 1
            return b"+OK\r\n"
        self.tally.retr += 1
        self.tally.retr_octets += octets
        self._seen = _with(self._seen, fetch.index)
        self._last = max(self._last, fetch.index + 1)
        return b"+OK %d octets\r\n" % octets

    def committed(self) -> Hangup:
        """The deleted messages are gone, on disk."""
        self.tally.deleted = len(self._deleted)
        self.tally.deleted_octets = self._deleted_octets
        self._count()
        return self._farewell("quit")

    def failed(self, error: PopdropError) -> bytes | Hangup:
        """An effect other than `Login` came to nothing. At QUIT nothing was removed."""
        reply = error.line() + b"\r\n"
        if self._state is State.UPDATE:
            self._deleted = _NONE
            self._deleted_octets = 0
            self._count()
            return Hangup(reply, "commit-failed")
        return reply

    def secure(self) -> None:
        """TLS has begun: what was said before it is forgotten (RFC 2595 section 4)."""
        self._secured = True
        self.user = None
        self._named = False
        self._exchange = None
        self._first = False

    # Common answers

    def _malformed(self, reason: str) -> Result:
        self._bad += 1
        limit = BAD_BEFORE_LOGIN if self._state is State.AUTHORIZATION else BAD_IN_ALL
        if self._bad >= limit:
            return Hangup(b"-ERR too many bad commands\r\n", "too-many-bad-commands")
        return Refusal(b"-ERR " + reason.encode("ascii") + b"\r\n", reason)

    def _out_of_place(self) -> bytes:
        if self._state is State.AUTHORIZATION:
            return b"-ERR log in first\r\n"
        return b"-ERR not after login\r\n"

    def _speakable(self, otherwise: bytes) -> bytes:
        return self.user if self.user and _SPEAKABLE(self.user) else otherwise

    def _farewell(self, reason: str) -> Hangup:
        host = self._policy.hostname.encode("ascii", "replace")
        return Hangup(b"+OK Pop server at " + host + b" signing off.\r\n", reason)

    def _count(self) -> None:
        self.tally.left = len(self._listing) - len(self._deleted)
        self.tally.left_octets = self._listing.octets - self._deleted_octets

    def _rows(self, first: bytes, rows: Iterable[bytes]) -> Iterator[bytes]:
        yield first
        yield from rows
        yield b".\r\n"

    def _index(self, word: bytes) -> int | bytes:
        """The 0-based index of a message-number, or the reply that refuses it."""
        given = number(word)
        if given is None:
            return b"-ERR a message-number is wanted\r\n"
        if not 1 <= given <= len(self._listing):
            return b"-ERR no such message\r\n"
        if given - 1 in self._deleted:
            return b"-ERR message %d is deleted\r\n" % given
        return given - 1

    # AUTHORIZATION

    def _cleartext_is_open(self) -> bool:
        return rules.cleartext_is_open(self._policy, self._secured, self._peer)

    def _cleartext_refusal(self) -> Refusal:
        text = b"You must use TLS/SSL or stronger authentication such as APOP"
        if self._policy.cleartext != "tls":
            text = b"You must use stronger authentication such as APOP"
        return Refusal(b"-ERR [AUTH] " + text + b" to connect to this server\r\n", "cleartext")

    def _do_user(self, name: bytes) -> Result:
        self.user = name
        self._named = self._cleartext_is_open()
        if not self._named:
            return self._cleartext_refusal()
        if rules.user_is_asked_about(self._policy):
            self._named = False
            self._asking = self._about_user
            return self._ask(ApopQuery(self._canonical(name)))
        return self._password_wanted(name)

    def _about_user(self, has_apop: object) -> Result:
        if has_apop:
            return Refusal(b"-ERR [AUTH] " + rules.STRONGER.encode() + b"\r\n", "apop-account")
        self._named = True
        return self._password_wanted(self.user or b"")

    def _password_wanted(self, name: bytes) -> bytes:
        if _SPEAKABLE(name):
            return b"+OK Password required for " + name + b".\r\n"
        return b"+OK Password required.\r\n"

    def _do_pass(self, password: bytes) -> Result:
        if self.user is None or not self._named:
            return b"-ERR USER first\r\n"
        self._named = False
        if not self._cleartext_is_open():
            return self._cleartext_refusal()
        return self._log_in(Cleartext(self.user, password, "USER"))

    def _do_apop(self, name: bytes, digest: bytes) -> Result:
        if not self._challenge:
            return b"-ERR APOP is not available\r\n"
        self.user = name
        self._named = False
        return self._log_in(ApopCredentials(name, self._challenge, digest))

    def _canonical(self, name: bytes) -> bytes:
        """As accounts have it. Prepared before it is folded, so that no second spelling of a name
        escapes the folding, and here, so that none is another user to the throttle."""
        return self._policy.folding(prepared_or_raw(name))

    def _log_in(self, credentials: Credentials) -> Login:
        """`user` stays as the client gave it, for the log; the account's name is another matter."""
        if credentials.username:  # a bearer token may bring its own
            credentials.username = self._canonical(credentials.username)
        if isinstance(credentials, Cleartext) and self._peer is not None:
            trusted = self._peer.address if self._peer.address_trusted else None
            credentials.client = trusted or ""
        return Login(credentials)

    def _mechanisms(self) -> list[bytes]:
        """Those that are offered now."""
        policy = self._policy
        return [m for m in policy.mechanisms if m not in policy.hidden and self._is_open(m)]

    def _is_open(self, mechanism: bytes) -> bool:
        return rules.mechanism_is_open(self._policy, mechanism, self._secured, self._peer)

    def _do_auth(self, *arguments: bytes) -> Result:
        if not arguments:
            rows = b"".join(name + b"\r\n" for name in self._mechanisms())
            return b"+OK\r\n" + rows + b".\r\n"
        name = arguments[0].upper()
        if name not in self._policy.mechanisms or name not in MECHANISMS:
            return b"-ERR unsupported mechanism\r\n"
        if not self._is_open(name):
            if name in (b"PLAIN", b"LOGIN"):
                return self._cleartext_refusal()
            return b"-ERR this mechanism is not available on this connection\r\n"
        self._named = False
        around = Surroundings(
            self._nonce,
            self._policy.hostname,
            self._peer or PeerFacts(),
            any(m.endswith(b"-PLUS") and self._is_open(m) for m in self._policy.mechanisms),
        )
        exchange = MECHANISMS[name](name.decode("ascii"), around)
        if len(arguments) == 1:
            return self._advance(exchange, partial(exchange.step, None))
        self._exchange = exchange
        return self._response(b"" if arguments[1] == b"=" else arguments[1])

    def _response(self, line: bytes) -> Result:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            raise RuntimeError("no exchange is in progress")
        if isinstance(exchange, Refused):
            return self.refused(exchange.error)
        if isinstance(exchange, Accepted):
            # It is logged in already: one that does not believe us gets no session of it.
            if line:
                return Hangup(b"-ERR authentication cancelled\r\n", "sasl-cancelled")
            return exchange.welcome
        if line == b"*":
            return b"-ERR authentication cancelled\r\n"
        try:
            response = decoded(line)
        except BadCredentials:
            return self._malformed("invalid base64")
        return self._advance(exchange, partial(exchange.step, response))

    def _ask(self, query: Query) -> Result:
        self._questions += 1
        if self._questions > QUESTIONS:
            return Hangup(b"-ERR too many exchanges\r\n", "too-many-exchanges")
        return Ask(query)

    def _resume(self, exchange: Exchange, answer: object) -> Result:
        return self._advance(exchange, partial(exchange.told, answer))

    def _advance(self, exchange: Exchange, go_on: Callable[[], Step]) -> Result:
        try:
            step = go_on()
        except BadCredentials as error:
            answer = self.refused(error)
            if not isinstance(answer, bytes):
                return answer
            bound = error.detail == CHANNEL_BINDING
            return Refusal(answer, CHANNEL_BINDING if bound else "malformed-response")
        if isinstance(step, bytes):
            self._exchange = exchange
            return encoded(step)
        self.user = step.username
        if isinstance(step, ScramQuery):
            self._asking = partial(self._resume, exchange)
            return self._ask(ScramQuery(self._canonical(step.username), step.algorithm))
        self._error_challenge = exchange.error_challenge
        self._success_challenge = exchange.success_challenge
        return self._log_in(step)

    def _do_stls(self) -> Result:
        if self._secured:
            return b"-ERR TLS is already active\r\n"
        if self._policy.stls == "off":
            return b"-ERR STLS is not available\r\n"
        return StartTLS(b"+OK Begin TLS negotiation\r\n")

    def _do_utf8(self) -> Result:
        # Mail goes out as it is stored, and names are UTF-8, with this command and without it.
        return b"+OK UTF8 enabled\r\n"

    # Any state

    def _do_lang(self, *tag: bytes) -> Result:
        if not tag:
            return b"+OK Language listing follows\r\ni-default Default\r\nen English\r\n.\r\n"
        wanted = tag[0].lower()
        if wanted in (b"*", b"i-default"):
            return b"+OK i-default Default language\r\n"
        if wanted == b"en" or wanted.startswith(b"en-"):
            return b"+OK en English\r\n"
        return b"-ERR no such language\r\n"

    def _do_capa(self) -> Result:
        lines = [c.capability(self) for c in COMMANDS.values() if c.capability is not None]
        lines += ["RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "EXPIRE NEVER"]
        if self._state is State.TRANSACTION:
            lines.append("IMPLEMENTATION " + self._policy.implementation)
        text = "".join(line + "\r\n" for line in lines if line)
        return b"+OK Capability list follows\r\n" + text.encode("ascii", "replace") + b".\r\n"

    def _capa_user(self) -> str:
        missing = rules.tls_is_missing(self._policy, self._secured)
        return "USER" if not self.logged_in and not missing and self._cleartext_is_open() else ""

    def _capa_sasl(self) -> str:
        mechanisms = [] if self.logged_in else self._mechanisms()
        return "SASL " + b" ".join(mechanisms).decode("ascii") if mechanisms else ""

    def _capa_stls(self) -> str:
        offered = self._policy.stls != "off" and not self._secured and not self.logged_in
        return "STLS" if offered else ""

    def _do_quit(self) -> Result:
        if self._state is not State.TRANSACTION:
            return self._farewell("quit-before-login")
        self._state = State.UPDATE
        seen = frozenset() if self._read_only else frozenset(self._seen - self._deleted)
        return Commit(frozenset(self._deleted), seen)

    # TRANSACTION

    def _do_noop(self) -> Result:
        return b"+OK\r\n"

    def _do_stat(self) -> Result:
        count = len(self._listing) - len(self._deleted)
        return b"+OK %d %d\r\n" % (count, self._listing.octets - self._deleted_octets)

    def _do_list(self, *word: bytes) -> Result:
        if word:
            index = self._index(word[0])
            if isinstance(index, bytes):
                return index
            return b"+OK %d %d\r\n" % (index + 1, self._listing.size(index))
        count = len(self._listing) - len(self._deleted)
        octets = self._listing.octets - self._deleted_octets
        first = b"+OK %d messages (%d octets)\r\n" % (count, octets)
        return self._rows(first, self._listing.size_rows(frozenset(self._deleted)))

    def _do_uidl(self, *word: bytes) -> Result:
        index = self._index(word[0]) if word else 0
        if isinstance(index, bytes):
            return index
        if not self._listing.identified:
            self._waiting = partial(self._do_uidl, *word)
            return Identify()
        if not word:
            return self._rows(b"+OK\r\n", self._listing.uid_rows(self._deleted))
        return b"+OK %d %s\r\n" % (index + 1, self._listing.uid(index))

    def _do_retr(self, word: bytes) -> Result:
        index = self._index(word)
        return index if isinstance(index, bytes) else Fetch(index, None)

    def _do_top(self, word: bytes, lines: bytes) -> Result:
        index = self._index(word)
        if isinstance(index, bytes):
            return index
        count = number(lines)
        return b"-ERR a number of lines is wanted\r\n" if count is None else Fetch(index, count)

    def _do_dele(self, word: bytes) -> Result:
        index = self._index(word)
        if isinstance(index, bytes):
            return index
        if self._read_only:
            return b"-ERR [SYS/PERM] this login may not delete\r\n"
        self._deleted = _with(self._deleted, index)
        self._deleted_octets += self._listing.size(index)
        return b"+OK message %d deleted\r\n" % (index + 1)

    def _do_rset(self) -> Result:
        self._deleted = _NONE
        self._deleted_octets = 0
        # qpopper's RSET takes back what was retrieved, too.
        self._seen = _NONE
        self._last = 0
        return b"+OK\r\n"

    def _do_last(self) -> Result:
        return b"+OK %d\r\n" % self._last


_before, _inside = (State.AUTHORIZATION,), (State.TRANSACTION,)
_both = _before + _inside
_s = Session
_ROWS: Final = (
    Command("USER", _s._do_user, 1, 1, _before, "USER name", "Name the account.", "RFC 1939",
        capability=_s._capa_user),
    Command(
        "PASS", _s._do_pass, 1, 1, _before, "PASS password",
        "Log in; blanks belong to the password.", "RFC 1939", rest=True,
    ),
    Command(
        "APOP", _s._do_apop, 2, 2, _before, "APOP name digest",
        "Log in by the MD5 of challenge and secret.", "RFC 1939",
    ),
    Command(
        "AUTH", _s._do_auth, 0, 2, _before, "AUTH [mechanism [initial-response]]",
        "Log in by SASL; alone it lists the mechanisms.", "RFC 5034", capability=_s._capa_sasl,
    ),
    Command(
        "STLS", _s._do_stls, 0, 0, _before, "STLS", "Begin TLS.", "RFC 2595", before_tls=True,
        capability=_s._capa_stls
    ),
    Command(
        "UTF8", _s._do_utf8, 0, 0, _before, "UTF8", "Ask for UTF-8 in mail and names.",
        "RFC 6856", before_tls=True, capability=lambda _: "UTF8 USER",
    ),
    Command(
        "LANG", _s._do_lang, 0, 1, _both, "LANG [tag]", "List or set the language of replies.",
        "RFC 6856", before_tls=True, capability=lambda _: "LANG",
    ),
    Command(
        "CAPA", _s._do_capa, 0, 0, _both, "CAPA", "List the capabilities.", "RFC 2449",
        before_tls=True,
    ),
    Command(
        "QUIT", _s._do_quit, 0, 0, _both, "QUIT",
        "Remove the messages marked as deleted and close.", "RFC 1939", before_tls=True,
    ),
    Command("STAT", _s._do_stat, 0, 0, _inside, "STAT", "Count and octets.", "RFC 1939"),
    Command(
        "LIST", _s._do_list, 0, 1, _inside, "LIST [message]", "Scan listings: octets as sent.",
        "RFC 1939", measured=True,
    ),
    Command("UIDL", _s._do_uidl, 0, 1, _inside, "UIDL [message]", "Unique-ids.", "RFC 1939",
        capability=lambda _: "UIDL"),
    Command("RETR", _s._do_retr, 1, 1, _inside, "RETR message", "Send a message.", "RFC 1939",
        measured=True),
    Command(
        "TOP", _s._do_top, 2, 2, _inside, "TOP message lines",
        "Send the header and so many lines of the body.", "RFC 1939", measured=True,
        capability=lambda _: "TOP",
    ),
    Command(
        "DELE", _s._do_dele, 1, 1, _inside, "DELE message", "Mark as deleted.", "RFC 1939",
        measured=True,
    ),
    Command("RSET", _s._do_rset, 0, 0, _inside, "RSET", "Unmark all.", "RFC 1939"),
    Command("NOOP", _s._do_noop, 0, 0, _inside, "NOOP", "Do nothing.", "RFC 1939"),
    Command(
        "LAST", _s._do_last, 0, 0, _inside, "LAST",
        "The highest message-number retrieved, 0 after RSET.", "RFC 1460",
    ),
)  # fmt: skip


COMMANDS: Final = {row.keyword.encode("ascii"): row for row in _ROWS}
"""Every command, by its keyword in upper case. CAPA's and the reference page's only source."""
