"""`popdrop.tap`: options and what they put together."""

from __future__ import annotations

import os
import shutil
import tempfile

import trustme
from twisted.application.service import IService, IServiceMaker
from twisted.internet.defer import Deferred
from twisted.plugin import getPlugins
from twisted.scripts.twistd import ServerOptions
from twisted.trial.unittest import SynchronousTestCase

from popdrop import tap
from popdrop.accounts.database import AccountsDatabase
from popdrop.tap import Options, Popdrop, makeService

LOOPBACK = ("--listen", "tcp:0:interface=127.0.0.1")


WRONG_OPTIONS = (
    (("--cleartext", "sometimes"), "--cleartext takes one of default, never"),
    (("--stls", "require", "--listen", "stdio:"), "--stls require: stdio: cannot begin TLS"),
    (
        ("--listen", "stdio:", "--listen-policy", "stls=offer"),
        "--listen-policy stls=offer: stdio: cannot begin TLS",
    ),
    (("--listen-policy", "stls=maybe"), "--listen-policy stls=maybe: stls= takes one of"),
    (("--listen-policy", "x", "--listen-policy", "y"), "--listen-policy x,y: x is not known"),
    (
        ("--listen-policy", "apop-only", "--auth", "checkpassword:/bin/true"),
        "--listen-policy apop-only: no --auth can verify APOP",
    ),
    (("--stls", "maybe"), "--stls takes one of offer, require, off"),
    (("--apop-users", "maybe"), "--apop-users takes one of refuse, allow"),
    (("--nonsense",), "nonsense"),
    (("--listen", "tpc:110"), "--listen tpc:110"),
    (("--listen", "tcp:eleven"), "--listen tcp:eleven"),
    (("--starttls", "/nonexistent.pem"), "/nonexistent.pem"),
    (("--starttls", "/nonexistent.pem", "--stls", "off"), "--starttls"),
    (("--listen", "tls:/nonexistent.pem:995"), "/nonexistent.pem"),
    (("--auth", "nonsense:x"), "--auth nonsense:x"),
    (("--auth", "anonymous"), "--auth anonymous"),
    (("--auth", "memory:bob"), "--auth memory:bob: takes pairs"),
    (("--auth", "memory:"), "--auth memory:: takes pairs"),
    (("--auth", "file:/nonexistent"), "--auth file:/nonexistent: No such file"),
    (("--auth", "passwd:/nonexistent"), "/nonexistent: No such file"),
    (("--auth", "passwd"), "name one file, as passwd:/etc/popdrop/passwd"),
    (("--auth", "passwd:a:b"), "name one file"),
    (("--auth", "passwd:a:hash=md5"), "hash= is not known; it takes scheme="),
    (("--auth", "passwd:/dev/null:scheme=rot13"), "scheme=rot13: no such scheme"),
    (("--auth", "passwd:/dev/null"), "/dev/null: not a regular file"),
    (("--auth", "checkpassword"), "name the program with its whole path"),
    (("--auth", "checkpassword:true"), "name the program with its whole path"),
    (("--auth", "checkpassword:/nonexistent -x"), "/nonexistent: no program"),
    (("--auth", "checkpassword:/etc/passwd"), "/etc/passwd: no program"),
    (("--auth", "checkpassword:/bin/true:apop=maybe"), "apop= takes one of no, yes, only"),
    (("--auth", "checkpassword:/bin/true:user=me"), "user= takes one of same, login, rep"),
    (("--auth", "checkpassword:/bin/true:A=b"), "write \\= where it belongs"),
    (("--auth", "pam:../x"), "../x: no name of a PAM service"),
    (("--auth", "pam:a:b"), "name one service"),
    (("--apop-only", "--auth", "checkpassword:/bin/true"), "checkpassword:PROG:apop=yes"),
    (("--apop-only", "--auth", "pam:login"), "no --auth can verify APOP"),
    (("--auth", "helper:"), "helper:pam:pop3"),
    (("--auth", "helper:nonsense:x"), "--auth helper:nonsense:x: no such checker"),
    (("--auth", "helper:pam:../x"), "--auth helper:pam:../x: ../x: no name"),
    (("--popauth-socket", "popauth"), "--popauth-socket popauth"),
    (("--popauth-socket", "/x", "--auth", "file:/dev/null"), "accounts:FILE"),
    (("--store", "nonsense:/x"), "--store nonsense:/x"),
    (("--store", "mbox:/x/{user}:nonsense=1"), "nonsense"),
    (("--store", "mbox"), "mbox"),
    (("--throttle", "memory:nonsense=1"), "--throttle"),
    (("--throttle", "shared:/nowhere/at/all"), "--throttle"),
    (("--lock-timeout", "long"), "--lock-timeout takes a number of seconds"),
    (("--min-uid", "x"), "--min-uid takes a number"),
    (
        ("--sasl", "PLAIN,NTLM,,GSSAPI"),
        "unknown: (nothing), GSSAPI, NTLM; known are ",
    ),
    (("--sasl", "EXTERNAL"), "--sasl EXTERNAL: needs --client-ca FILE"),
    (("--sasl", "plain,xoauth2"), "--sasl XOAUTH2: needs an --auth"),
    (("--client-ca", "/x.pem", "--stls", "off"), "--client-ca /x.pem: no listener has TLS"),
    (("--client-ca", "/nonexistent.pem"), "--client-ca /nonexistent.pem: there is no"),
    (("--idle-timeout", "60"), "--allow-short-idle"),
    (("--idle-timeout", "0", "--allow-short-idle"), "--idle-timeout: 0 would end each session"),
    (("--login-timeout", "0"), "--login-timeout: 0 would end each session"),
    (("--session-log", "nonsense"), "--session-log"),
    (("--local-net", "10.0.0.0/99"), "--local-net 10.0.0.0/99"),
    (("--hostname", "a b"), "--hostname"),
    (("--demo", "--auth", "accounts:x"), "--auth"),
    (("argument",), "argument"),
    (("--wording", "loud"), "--wording takes one of vague, strict"),
    (("--wording", "strict", "--auth", "file:/dev/null"), "--wording strict: asks who has an APOP"),
    (("--auth-file", "/nonexistent/x"), "--auth-file /nonexistent/x: No such file"),
    (("--user-names", "upper"), "--user-names upper: upper is not known"),
    (("--login-cache", "long"), "--login-cache takes a number of seconds"),
    (("--auth", "accounts:/x:key=nonsense"), "key=nonsense: not known"),
)
"""Options, and what the one line of the refusal says."""


class TapCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, self.folder)

    def make(self, *words: str) -> Popdrop:
        options = Options()
        options.parseOptions(["--state-dir", self.folder, *words])
        service = makeService(options)
        self.addCleanup(service.discard)
        return service

    def refused(self, *words: str) -> str:
        ended = self.assertRaises(SystemExit, self.make, *words)
        text = ended.args[0]
        assert isinstance(text, str)
        self.assertEqual(len(text.splitlines()), 1, text)
        return text


class OptionTests(TapCase):
    def test_the_plugin_is_found(self) -> None:
        makers = [maker for maker in getPlugins(IServiceMaker) if maker.tapname == "popdrop"]
        self.assertEqual([maker.module for maker in makers], ["popdrop.tap"])

    def test_wrong_options(self) -> None:
        """One line that names the option."""
        for words, told in WRONG_OPTIONS:
            base = () if words[0] == "--listen" else LOOPBACK
            self.assertIn(told, self.refused(*base, *words))

    def test_listen_policy_needs_its_listener(self) -> None:
        told = self.refused("--listen-policy", "stls=off", *LOOPBACK)
        self.assertIn("--listen-policy stls=off: stands behind the --listen", told)

    def test_listen_policy_of_tls_has_no_stls(self) -> None:
        self.make()  # for the self-made certificate
        text = f"tls:{self.folder}/self-made.pem:0:interface=127.0.0.1"
        told = self.refused("--listen", text, "--listen-policy", "stls=require")
        self.assertIn("--listen-policy stls=require", told)
        self.assertIn("begins with TLS", told)

    def test_stls_of_one_listener(self) -> None:
        """There is a certificate where one listener wants it; stdio may be let off."""
        own = ("--listen-policy", "stls=require")
        service = self.make(*LOOPBACK, *LOOPBACK, *own, "--stls", "off")
        self.assertEqual([each.policy.stls for each in service._factories], ["off", "require"])
        self.assertIsNotNone(service._factories[1].tls)
        without = ("--listen", "stdio:", "--listen-policy", "stls=off")
        service = self.make(*LOOPBACK, *without, "--stls", "require")
        self.assertEqual([each.policy.stls for each in service._factories], ["require", "off"])
        service = self.make(*LOOPBACK, *LOOPBACK, "--listen-policy", "stls=off")
        self.assertEqual([each.policy.stls for each in service._factories], ["offer", "off"])

    def test_apop_only_holds_on_every_listener(self) -> None:
        words = ("--apop-only", *LOOPBACK, "--listen-policy", "cleartext=always")
        self.assertEqual(self.make(*words)._factories[0].policy.cleartext, "never")

    def test_state_dir_that_cannot_be(self) -> None:
        blocked = os.path.join(self.folder, "file")
        with open(blocked, "w"):
            pass
        text = self.refused(*LOOPBACK, "--state-dir", blocked)
        self.assertIn(f"--state-dir {blocked}", text)

    def test_apop_only_needs_a_checker_that_can(self) -> None:
        path = os.path.join(self.folder, "plain")
        with open(path, "w") as file:
            file.write("bob:secret\n")
        self.make(*LOOPBACK, "--auth", f"file:{path}")
        self.make(*LOOPBACK, "--apop-only", "--auth", f"file:{path}")
        database = os.path.join(self.folder, "accounts.db")
        AccountsDatabase.create(database)
        os.unlink(database + ".key")
        self.assertIn("--apop-only", self.refused(*LOOPBACK, "--apop-only"))

    def mechanisms(self, *words: str) -> tuple[list[str], set[str]]:
        """Those of a service, and those of them that CAPA does not tell of."""
        policy = self.make(*LOOPBACK, *words)._factories[0].policy
        return [m.decode() for m in policy.mechanisms], {m.decode() for m in policy.hidden}

    def test_mechanisms(self) -> None:
        """What the checkers can verify, the strongest first; sealed verifiers need their key."""
        able = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-1"]
        rest = ["CRAM-MD5", "PLAIN", "LOGIN"]
        hidden = {"CRAM-MD5", "LOGIN"}
        self.assertEqual(self.mechanisms(), (able + rest, hidden))
        authority = os.path.join(self.folder, "authority.pem")
        trustme.CA().cert_pem.write_to_path(authority)
        found = self.mechanisms("--client-ca", authority)
        self.assertEqual(found, ([*able, "EXTERNAL", *rest], hidden))
        self.assertEqual(
            self.mechanisms("--sasl", "plain, CRAM-MD5 ,plain"), (["PLAIN", "CRAM-MD5"], set())
        )
        self.assertEqual(self.mechanisms("--sasl", "none"), ([], set()))
        self.assertEqual(self.mechanisms("--apop-only")[0], [])
        passwords = os.path.join(self.folder, "plain")
        with open(passwords, "w") as file:
            file.write("bob:secret\n")
        self.assertEqual(self.mechanisms("--auth", f"file:{passwords}")[0], rest)
        # These hand on APOP's digest and have no word for another.
        for text in ("checkpassword:/bin/true:apop=yes", "helper:checkpassword:/bin/true:apop=yes"):
            self.assertEqual(self.mechanisms("--auth", text)[0], ["PLAIN", "LOGIN"], text)
            told = self.refused(*LOOPBACK, "--auth", text, "--sasl", "CRAM-MD5")
            self.assertIn("--sasl CRAM-MD5: needs an --auth that can verify it", told)
        both = ("--auth", "checkpassword:/bin/true:apop=yes", "--auth", f"file:{passwords}")
        self.assertEqual(self.mechanisms(*both)[0], rest)
        os.unlink(os.path.join(self.folder, "accounts.db.key"))
        self.assertEqual(self.mechanisms()[0], ["PLAIN", "LOGIN"])

    def test_defaults(self) -> None:
        """Without options: the state folder is filled, and loopback alone is listened on."""
        service = self.make()
        self.assertTrue(IService.providedBy(service))
        self.assertEqual(
            sorted(os.listdir(self.folder)), ["accounts.db", "accounts.db.key", "self-made.pem"]
        )
        self.assertEqual(os.stat(os.path.join(self.folder, "accounts.db")).st_mode & 0o777, 0o600)
        texts = service.listening_on()
        self.assertEqual(len(texts), 4)
        for text in texts:
            self.assertTrue("127.0.0.1" in text or "\\:\\:1" in text, text)

    def test_root_serves_no_strangers(self) -> None:
        """Started as root without --uid: loopback, or one line (decision 18)."""
        self.patch(tap.os, "geteuid", lambda: 0)
        self.assertIn("--uid popdrop", self.refused("--listen", "tcp:0"))
        self.make(*LOOPBACK)
        self.make("--listen", "tcp6:0:interface=\\:\\:1")
        self.patch(tap.os, "geteuid", lambda: 1000)
        self.make("--listen", "tcp:0")

    def test_root_by_another_name(self) -> None:
        """`--uid 0`, and `--euid`, which leaves the way back open."""
        self.patch(tap.os, "geteuid", lambda: 0)
        for words, told in (
            (["--uid", "0"], "started as root"),
            (["--uid", "0", "--gid", "8"], "started as root"),
            (["--uid", "1234", "--gid", "8", "--euid"], "--euid"),
        ):
            parent = ServerOptions()
            parent.parseOptions(
                [*words, "popdrop", "--listen", "tcp:0", "--state-dir", self.folder]
            )
            with self.assertRaises(SystemExit) as caught:
                makeService(parent.subOptions)
            self.assertIn(told, str(caught.exception))

    def test_ready_after_a_reload_means_that_all_has_been_read(self) -> None:
        """And a server that stops is not ready, whatever signal comes."""
        service = self.make(*LOOPBACK)
        told: list[str] = []
        self.patch(tap.notify, "tell", lambda words: told.append(words.partition("\n")[0]))
        looks: list[Deferred[None]] = []

        def look() -> Deferred[None]:
            looks.append(Deferred())
            return looks[-1]

        self.patch(service, "_look_at_files", look)
        service.reload()
        self.assertEqual(told, ["RELOADING=1"])
        looks[0].callback(None)
        self.assertEqual(told, ["RELOADING=1", "READY=1"])
        service.reload()
        service._stopping = True
        looks[1].callback(None)
        service.reload()
        self.assertEqual((told[2:], len(looks)), (["RELOADING=1"], 2))

    def test_demo_leaves_nothing(self) -> None:
        options = Options()
        options.parseOptions(["--demo"])
        service = makeService(options)
        folder = options["state-dir"]
        self.assertTrue(os.path.exists(os.path.join(folder, "mail", "demo")))
        service.discard()
        self.assertFalse(os.path.exists(folder))
