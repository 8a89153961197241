"""Self-service of `popdrop popauth`: a user sets his own APOP secret, as by qpopper's popauth.

The process of `main` serves one connection with the rights of the accounts' owner. Who the user is
it was told by the helper, and the helper by the kernel. `self_service` is the other side.
"""

from __future__ import annotations

import hmac
import os
import pwd
import signal
import socket
import sys
from typing import Any, Final

from popdrop.accounts import supervisor
from popdrop.accounts.database import AccountsDatabase, Refused
from popdrop.accounts.doorman import WRONG_STATUS
from popdrop.accounts.helperwire import (
    LONGEST,
    Kind,
    Malformed,
    SelfAnswer,
    SelfRequest,
    decode_self_answer,
    decode_self_request,
    encode_self_answer,
    encode_self_request,
    wipe,
)
from popdrop.credentials import acceptable_name, prepared
from popdrop.errors import BadCredentials, ConfigError, PopdropError
from popdrop.values import Secret

LIFETIME: Final = 20
"""Seconds that a connection has, from its beginning to its end."""
CLIENT_PATIENCE: Final = 30.0
"""Seconds until the client gives up."""


def self_service(path: str, request: SelfRequest) -> SelfAnswer:
    """Ask the server behind the socket `path`. Blocking; raises `ConfigError`, `Malformed`.

    `HAS` is answered by `HAS_REPLY`. `SET` is answered by `DONE`; by `WRONG` where the old secret
    is not the one there is, or was not given; by `NONE` where one was given and there is none.
    Either by `REFUSED`, `LATER` or `FAILED`.
    """
    record = encode_self_request(request)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(CLIENT_PATIENCE)
        try:
            connection.connect(path)
            try:
                connection.sendmsg([record], [], socket.MSG_NOSIGNAL)
            except BrokenPipeError:
                pass  # turned away before it was asked
            try:
                received = connection.recv(LONGEST + 1)
            except ConnectionResetError:
                # Turned away before it was read; what was answered is there all the same.
                received = connection.recv(LONGEST + 1)
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror or 'no answer'}; is the server running, with"
                f" --popauth-socket {path}?"
            ) from None
        finally:
            wipe(record)
    if not received:
        return SelfAnswer(Kind.FAILED, detail="the server gave no answer; its log says why")
    return decode_self_answer(received)


def perform(accounts: AccountsDatabase, name: bytes, request: SelfRequest) -> SelfAnswer:
    """Do what the user `name` asks for himself. Raises `Refused`, `ConfigError`, `PopdropError`."""
    account = accounts.lookup(name)
    has = account is not None and account.has_apop
    if request.kind is Kind.HAS:
        return SelfAnswer(Kind.HAS_REPLY, has=has)
    assert request.new is not None
    if account is not None and account.disabled:
        return SelfAnswer(Kind.REFUSED, detail="this account is disabled")
    if account is None or not has:
        if request.old is not None:
            return SelfAnswer(Kind.NONE)
        if account is None:
            accounts.add(name, apop=request.new)
        else:
            accounts.set_apop(name, request.new)
        return SelfAnswer(Kind.DONE)
    if account.apop_secret is None:
        return SelfAnswer(Kind.FAILED, detail="the secret there is cannot be opened")
    if request.old is None or not _same(account.apop_secret, request.old):
        return SelfAnswer(Kind.WRONG)
    accounts.set_apop(name, request.new)
    return SelfAnswer(Kind.DONE)


def _same(known: Secret, given: Secret) -> bool:
    try:
        words = prepared(given.reveal())
    except BadCredentials:
        words = b""
    return hmac.compare_digest(known.reveal(), words)


def _answer(config: dict[str, Any], record: bytes) -> SelfAnswer:
    try:
        request = decode_self_request(record)
    except Malformed as error:
        return SelfAnswer(Kind.REFUSED, detail=str(error))
    try:
        name = os.fsencode(pwd.getpwuid(config["caller"]).pw_name)
    except KeyError:
        return SelfAnswer(Kind.REFUSED, detail="the caller's uid has no name")
    if not acceptable_name(name):
        return SelfAnswer(Kind.REFUSED, detail="the caller's name cannot be one of an account")
    try:
        accounts = AccountsDatabase(config["database"], key=config["key"])
        try:
            return perform(accounts, name, request)
        finally:
            accounts.close()
    except Refused as error:
        return SelfAnswer(Kind.REFUSED, detail=str(error))
    except (ConfigError, PopdropError) as error:
        reason = error.detail if isinstance(error, PopdropError) else str(error)
        os.write(2, f"popdrop self-service: {reason}\n".encode())
        return SelfAnswer(Kind.FAILED, detail="the accounts cannot be changed now")


def main(config: dict[str, Any]) -> None:
    """The process of one connection, from `supervisor.BOOT`."""
    sys.excepthook = lambda kind, error, where: supervisor.report(error)
    if os.geteuid() == 0:
        # Here and not before the exec: the interpreter may be where only root can read. Nothing of
        # the user's has been read yet.
        uid, gid = config["owner"]
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if config["credentials"] is not None:
        os.environ["CREDENTIALS_DIRECTORY"] = config["credentials"]
    supervisor.settle(config["parent"])
    supervisor.quiet_input()
    signal.alarm(LIFETIME)  # by default SIGALRM kills
    with socket.socket(fileno=config["connection"]) as connection:
        record = connection.recv(LONGEST + 1)
        answer = _answer(config, record)
        connection.send(encode_self_answer(answer), socket.MSG_NOSIGNAL)
    sys.exit(WRONG_STATUS if answer.kind is Kind.WRONG else 0)
