"""Nobody learns who has an account: all failures read the same, whatever the mechanism.

How long they take is measured by `python -m benchmarks.enumeration`, and is no test.
"""

from __future__ import annotations

import re
from base64 import b64decode

from benchmarks.mechanisms import AT_ONCE, CLEARTEXT, MECHANISMS, Client
from popdrop.accounts.database import AccountsDatabase
from tests.end_to_end.test_server import ServerCase

FAILED = b"-ERR [AUTH] Authentication failed."
"""The one text, with the code of RFC 3206."""

SECRETS = {"bob": "hunter2", "carol": "sesame", "daemon": "of uid 1", "alice": "both kinds"}


class Hasty:
    """A client that waits for no answer."""

    def __init__(self, client: Client) -> None:
        self.greeting = client.greeting
        self._client = client

    def ask(self, command: bytes) -> bytes:
        self._client.send(command)
        return b""


def shape(line: bytes) -> bytes:
    """A challenge without its random octets, but with their lengths."""
    text = b64decode(line[2:], validate=True)
    text = re.sub(rb"(?<=[<.])[0-9a-f]{32}", b"NONCE", text)
    return re.sub(rb"((?:^|,)[rsv]=)([^,]*)", lambda match: match[1] + b"%d" % len(match[2]), text)


class EnumerationCase(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        database = AccountsDatabase(str(self.folder.accounts))
        for name in ("bob", "alice"):
            database.delete(name.encode())
        database.close()
        for name, secret in SECRETS.items():
            apop = None if name == "bob" else secret
            self.folder.add(name, password=secret, apop=apop)
        database = AccountsDatabase(str(self.folder.accounts))
        database.disable(b"carol")
        database.close()

    @staticmethod
    def without(user: bytes, answers: list[bytes]) -> list[bytes]:
        """The answers without the name that the client itself has typed, and what is random."""
        plain = [line.replace(b" for " + user + b".", b" for NAME.") for line in answers]
        return [shape(line) if line.startswith(b"+ ") else line for line in plain]

    def answers(self, name: str, user: bytes, secret: bytes) -> list[bytes]:
        with Client(self.server.port) as client:
            found = MECHANISMS[name](client, user, secret)
            # What a client may learn is also whether the connection stays.
            found.append(client.ask(b"NOOP"))
        return self.without(user, found)


class TextTests(EnumerationCase):
    def test_all_failures_read_the_same(self) -> None:
        server = self.serve("--cleartext", "tls")
        cases = {
            "unknown": (b"nobody-here", b"hunter2", "bad-credentials"),
            "unknown, like a file": (b"..", b"hunter2", "bad-credentials"),
            "unknown, of the system": (b"root", b"x", "bad-credentials"),
            "wrong": (b"bob", b"wrong", "bad-credentials"),
            "wrong, disabled": (b"carol", b"wrong", "bad-credentials"),
            "disabled": (b"carol", b"sesame", "disabled"),
            "uid below --min-uid": (b"daemon", b"of uid 1", "uid-floor"),
            "wrong, below --min-uid": (b"daemon", b"wrong", "bad-credentials"),
        }
        for name in MECHANISMS:
            seen = {}
            for case, (user, secret, reason) in cases.items():
                seen[case] = self.answers(name, user, secret)
                self.assertEqual(seen[case][-2:], [FAILED, b"-ERR log in first"], (name, case))
                line = server.wait_for(r" failure user=.*")[0]
                why = re.search(r"reason=(\S+)", line)
                assert why is not None
                # The log may tell; it is the administrator's.
                self.assertEqual(why[1], reason, (name, case))
            self.assertEqual(len(set(map(tuple, seen.values()))), 1, (name, seen))

    def test_an_account_that_is_for_apop_only(self) -> None:
        """Refused with the right password as with a wrong one."""
        self.serve("--cleartext", "tls")
        for name in MECHANISMS:
            if name in CLEARTEXT:
                for secret in (b"both kinds", b"wrong"):
                    self.assertEqual(self.answers(name, b"alice", secret)[-2], FAILED, name)
        self.assertTrue(self.answers("APOP", b"alice", b"both kinds")[0].startswith(b"+OK"))

    def test_the_right_secret_is_seen(self) -> None:
        """That all of the above fail is not the mechanisms' own fault."""
        self.folder.add("dave", password="p w", apop="p w")
        self.serve("--apop-users", "allow")
        self.folder.spool("dave", b"")
        for name in MECHANISMS:
            answer = self.answers(name, b"dave", b"p w")
            self.assertTrue(answer[-2].startswith(b"+OK dave"), (name, answer))

    def test_user_says_ok_to_everybody(self) -> None:
        self.serve()
        for name in (b"bob", b"carol", b"daemon", b"nobody-here", b"..", b"root", b"a" * 60):
            with Client(self.server.port) as client:
                answer = self.without(name, [client.ask(b"USER " + name)])
                self.assertEqual(answer, [b"+OK Password required for NAME."], name)
        # A name that is not repeated is none that anybody has.
        for name in (b"%n", b"a" * 65, b"\xff\xfe"):
            with Client(self.server.port) as client:
                self.assertEqual(client.ask(b"USER " + name), b"+OK Password required.", name)

    def test_after_any_number_of_failures(self) -> None:
        """CVE-2005-0198: a wrong secret stays wrong, and the connection ends alike for all."""
        self.serve()
        for name in MECHANISMS:
            seen = []
            for user in (b"bob", b"nobody-here", b"carol"):
                answers = []
                with Client(self.server.port) as client:
                    for i in range(11):
                        try:
                            answers += MECHANISMS[name](client, user, b"wrong %d" % i)
                        except OSError:
                            break
                self.assertNotIn(b"+OK " + user, b"\n".join(answers))
                self.assertIn(FAILED, answers)
                # Behind the last answer there is nothing: the server has closed.
                while answers[-1] == b"":
                    answers.pop()
                seen.append(self.without(user, answers))
            self.assertEqual(seen[0], seen[1], name)
            self.assertEqual(seen[0], seen[2], name)


class LogTests(EnumerationCase):
    def test_a_failure_is_logged_before_it_is_answered(self) -> None:
        """Also that of a client which does not wait for the answer."""
        server = self.serve("--throttle", "memory")
        for name in sorted(AT_ONCE):
            with Client(server.port) as client:
                MECHANISMS[name](Hasty(client), b"bob", b"wrong")
                line = server.wait_for(r" failure user=\"bob\".*")[0]
                self.assertIn("reason=bad-credentials", line)
        log = server.stop()
        self.assertEqual(log.count(" failure user="), 3)
