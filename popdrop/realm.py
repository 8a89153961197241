"""`Realm`: from a verified account to its maildrop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.mail.interfaces import IMailboxPOP3
from zope.interface import Interface, implementer

from popdrop.credentials import FAILED, acceptable_name
from popdrop.errors import BadCredentials
from popdrop.interfaces import IAccounts, IMaildrop, IStore
from popdrop.legacy import MaildropAsMailbox
from popdrop.policy import STRONGER, Mind, Policy, Rosters, account_refusal
from popdrop.threads import Pool
from popdrop.values import Account, Owner, Verified

Avatar = tuple[type[Interface], object, Callable[[], None]]


@implementer(IRealm)
class Realm:
    """Applies the account's own rules (decision 22), then opens the maildrop.

    `accounts` are asked for the facts where a foreign checker verified; `system` completes an
    account with those of the system account of its name. `rosters` gives the lists as they were
    read last. `clock` is in seconds since the epoch.
    """

    def __init__(
        self,
        store: IStore,
        pool: Pool,
        accounts: Sequence[IAccounts] = (),
        system: Callable[[Account], Account] = lambda account: account,
        policy: Policy | None = None,
        rosters: Callable[[], Rosters] = Rosters,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._pool = pool
        self._accounts = accounts
        self._system = system
        self._rosters = rosters
        self._clock = clock
        self._mind = Mind(policy or Policy())

    def requestAvatar(
        self, avatarId: bytes | tuple[()], mind: object, *interfaces: type[Interface]
    ) -> Deferred[Avatar]:
        """An `IMaildrop`, or an `IMailboxPOP3` over it. Raises `PopdropError`."""
        whose = mind if isinstance(mind, Mind) else self._mind
        return Deferred.fromCoroutine(self._avatar(avatarId, whose, interfaces))

    async def _avatar(
        self, avatar: bytes | tuple[()] | str, mind: Mind, interfaces: Sequence[type[Interface]]
    ) -> Avatar:
        if IMaildrop not in interfaces and IMailboxPOP3 not in interfaces:
            raise NotImplementedError("only IMaildrop and IMailboxPOP3 are given")
        if isinstance(avatar, str):
            avatar = avatar.encode("utf-8")
        if not isinstance(avatar, bytes) or not acceptable_name(avatar):
            raise BadCredentials(FAILED, "name")
        if isinstance(avatar, Verified) and not avatar.foreign and len(self._accounts) < 2:
            known = [avatar.account]
        else:
            known = await self._pool.run(self._look_up, avatar)
        account = self._allowed(known, mind)
        mind.verified(account)
        name = account.name.decode("utf-8")
        owner = Owner(
            name, name.rpartition("@")[2] if "@" in name else "", account.home, account.uid
        )
        drop = await self._store.open(owner)

        def logout() -> None:
            drop.release()

        if IMaildrop in interfaces:
            return IMaildrop, drop, logout
        try:
            await drop.identify()  # that interface asks for ids where it cannot wait
        except BaseException:
            drop.release()
            raise
        return IMailboxPOP3, MaildropAsMailbox(drop), logout

    def _allowed(self, known: Sequence[Account], mind: Mind) -> Account:
        """The first account, if the rules of all let it in. Raises `BadCredentials`."""
        for each in known:
            refusal = account_refusal(
                mind.policy, each, mind.cleartext, mind.peer, self._clock(), self._rosters()
            )
            if refusal is not None:
                told = refusal == "apop-account" and mind.policy.wording == "strict"
                raise BadCredentials(STRONGER if told else FAILED, refusal)
        account = known[0]
        if any(each.read_only for each in known):
            account = account._replace(scope=replace(account.scope, read_only=True))
        return account

    def _look_up(self, avatar: bytes) -> list[Account]:
        """Whose maildrop it is, and all of ours of that name: the rules of all of them hold.

        Another database may have verified than the one that says that he is disabled. The first is
        what was verified if that was one of ours; else the first of ours, or what was reported,
        completed by the other and by the system.
        """
        name = bytes(avatar)
        ours = [found for each in self._accounts if (found := each.lookup(name)) is not None]
        if isinstance(avatar, Verified) and not avatar.foreign:
            return [avatar.account, *ours]
        reported = avatar.account if isinstance(avatar, Verified) else Account(name)
        if not ours:
            return [reported if reported.uid is not None else self._system(reported)]
        # What the checker knows of him holds as well as what we do.
        account = ours[0]._replace(
            disabled=ours[0].disabled or reported.disabled, app=reported.scope
        )
        if account.uid is None:
            account = account._replace(
                uid=reported.uid, gid=reported.gid, home=reported.home, shell=reported.shell
            )
        return [account, *ours[1:]]
