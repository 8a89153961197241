"""`Realm`: from a verified account to its maildrop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.mail.interfaces import IMailboxPOP3
from zope.interface import Interface, implementer

from popdrop.credentials import FAILED, acceptable_name
from popdrop.errors import BadCredentials
from popdrop.interfaces import IAccounts, IMaildrop, IStore
from popdrop.legacy import MaildropAsMailbox
from popdrop.policy import Mind, Policy, account_refusal
from popdrop.threads import Pool
from popdrop.values import Account, Owner, Verified

Avatar = tuple[type[Interface], object, Callable[[], None]]


@implementer(IRealm)
class Realm:
    """Applies the account's own rules (decision 22), then opens the maildrop.

    `accounts` are asked for the facts where a foreign checker verified; `system` gives the same
    for a system account of that name.
    """

    def __init__(
        self,
        store: IStore,
        pool: Pool,
        accounts: Sequence[IAccounts] = (),
        system: Callable[[bytes], Account] = Account,
        policy: Policy | None = None,
    ) -> None:
        self._store = store
        self._pool = pool
        self._accounts = accounts
        self._system = system
        self._mind = Mind(policy or Policy())

    def requestAvatar(
        self, avatarId: bytes | tuple[()], mind: object, *interfaces: type[Interface]
    ) -> Deferred[Avatar]:
        """An `IMaildrop`, or an `IMailboxPOP3` over it. Raises `PopdropError`."""
        known = mind if isinstance(mind, Mind) else self._mind
        return Deferred.fromCoroutine(self._avatar(avatarId, known, interfaces))

    async def _avatar(
        self, avatar: bytes | tuple[()] | str, mind: Mind, interfaces: Sequence[type[Interface]]
    ) -> Avatar:
        if IMaildrop not in interfaces and IMailboxPOP3 not in interfaces:
            raise NotImplementedError("only IMaildrop and IMailboxPOP3 are given")
        if isinstance(avatar, str):
            avatar = avatar.encode("utf-8")
        if not isinstance(avatar, bytes) or not acceptable_name(avatar):
            raise BadCredentials(FAILED, "name")
        if isinstance(avatar, Verified):
            account = avatar.account
        else:
            account = await self._pool.run(self._look_up, avatar)
        refusal = account_refusal(mind.policy, account, mind.cleartext)
        if refusal is not None:
            raise BadCredentials(FAILED, refusal)
        mind.verified(account.name)
        # The whole name, domain included, is the user: two domains never share a path.
        owner = Owner(account.name.decode("utf-8"), "", account.home, account.uid)
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

    def _look_up(self, name: bytes) -> Account:
        for accounts in self._accounts:
            account = accounts.lookup(name)
            if account is not None:
                return account
        return self._system(name)
