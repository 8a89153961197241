"""Door signs of Popdrop's stores; the rooms are elsewhere and imported when they are used.

A third party's store is one more file like this one: an object that provides
`popdrop.interfaces.IStoreFactory`.
"""

from twisted.plugin import IPlugin
from zope.interface import implementer

from popdrop.interfaces import IStoreFactory


@implementer(IPlugin, IStoreFactory)
class _Mbox:
    kind = "mbox"
    help = "mbox:TEMPLATE: spools of one file a user, as mbox:/var/mail/{user}."

    def make(self, reactor: object, state_dir: str, *args: str, **kwargs: str) -> object:
        from popdrop.stores.mbox.store import MboxFactory

        return MboxFactory().make(reactor, state_dir, *args, **kwargs)


mbox = _Mbox()
