"""Door signs of Popdrop's stores and checkers; the rooms are imported when they are used.

A third party's store is one more file like this one: an object that provides
`popdrop.interfaces.IStoreFactory`.
"""

from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.strcred import ICheckerFactory
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


@implementer(IPlugin, ICheckerFactory)
class _Checker:
    """A kind of `--auth`, here and in other programs of Twisted's."""

    def __init__(self, kind: str, arguments: str, text: str, apop: bool) -> None:
        self.authType = kind
        self.argStringFormat = arguments
        self.authHelp = text
        both = (IUsernamePassword, IUsernameHashedPassword)
        self.credentialInterfaces = both if apop else both[:1]

    def generateChecker(self, argstring: str = "") -> object:
        from popdrop.accounts.strcred import checker

        return checker(self.authType, argstring)


accounts = _Checker(
    "accounts",
    "FILE[:key=SOURCE]",
    """
Popdrop's own accounts, made by `popdrop user add`: passwords and APOP secrets.
FILE is the database, as /var/lib/popdrop/accounts.db.
""",
    apop=True,
)
checkpassword = _Checker(
    "checkpassword",
    "PROG[:ARG...][:apop=yes|only][:user=login|reported]",
    """
Runs PROG ARG... for each login, by the interface of
https://cr.yp.to/checkpwd/interface.html, as qmail does. Leave out the program
that PROG runs in the end: that is one of Popdrop's. A single argument is split at
blanks, as in 'checkpassword:/bin/checkpassword -x'.

  apop=yes       PROG can verify APOP too; apop=only: it can verify nothing else
  user=reported  if PROG sets USER to another name, that is whose mail it is
  user=login     the name of the login is, whatever USER says
""",
    apop=True,
)
passwd = _Checker(
    "passwd",
    "FILE[:scheme=plain|NAME]",
    """
A file of lines name:hash, with or without further fields: as /etc/passwd or
/etc/shadow, of htpasswd, of Dovecot with its {SCHEME}. It is read anew when it
has changed.

  scheme=plain   a field without {SCHEME} is the password itself; APOP works then
  scheme=NAME    it is a hash of this scheme, in libpass's or Dovecot's words
""",
    apop=True,
)
pam = _Checker(
    "pam",
    "[SERVICE]",
    """
System accounts, by the PAM service SERVICE [popdrop]. Needs the extra `pam`:
pip install 'popdrop[pam]'. Most modules want root's rights.
""",
    apop=False,
)
