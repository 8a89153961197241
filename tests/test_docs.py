"""What README.md and docs/ tell a reader to type is accepted, and does what they say.

Every command line of `twistd popdrop` and of `popdrop` is parsed. Blocks behind a mark, `.. test:
NAME` or `<!-- test: NAME -->`, are run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from twisted.internet.task import Clock
from twisted.scripts.twistd import ServerOptions
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from popdrop import errors, listeners, record, session, throttle
from popdrop.cli.main import popdrop
from popdrop.errors import ConfigError
from popdrop.policy import network, networks, variation
from popdrop.spec import parse
from popdrop.stores.mbox.findings import KINDS
from popdrop.stores.mbox.store import MboxFactory
from popdrop.stores.template import FIELDS
from popdrop.tap import Options
from tests.end_to_end.harness import DEADLINE, ROOT, Twistd, environment
from tests.olddbs import gdbm

PASSWORD = "correct horse"

ANY_PORT = """
from popdrop import tap
free = lambda text: text.replace("{plain}", "0").replace("{tls}", "0")
tap.LOOPBACK_LISTENERS = tuple(map(free, tap.LOOPBACK_LISTENERS))
from twisted.scripts.twistd import run
run()
"""
"""`twistd`, but where the ports of the documents are in use it must run, too."""

_BLOCK = re.compile(
    r"^(?:(?:\.\. |<!-- )test: (?P<mark>\w+)(?: -->)?\n)?"
    r"(?:(?P<fence>```)|(?P<indent> *)\.\. code-block:: )(?P<language>\w+)\n",
    re.MULTILINE,
)
_LITERAL = re.compile(r"`(--[a-z][a-z0-9-]*)")
_OPTION_ROLE = re.compile(r":option:`(--[a-z0-9-]+) <twistd popdrop (--[a-z0-9-]+)>`")

ELSEWHERE = {"--ssl-reqd"}
"""Options that the text names and that are curl's or another plugin's."""


@dataclass(frozen=True)
class Block:
    """One block of code; `lines` are commands and what they print, without indentation."""

    page: str
    mark: str
    language: str
    lines: tuple[str, ...]

    def steps(self) -> Iterator[tuple[str, list[str]]]:
        """Each command with the lines that it prints."""
        step: tuple[str, list[str]] | None = None
        for line in self.lines:
            if self.language == "sh" or line.startswith(("$ ", "# ")):
                if step is not None:
                    yield step
                step = (line if self.language == "sh" else line[2:], [])
            elif step is not None:
                step[1].append(line)
        if step is not None:
            yield step


def pages() -> list[Path]:
    """The README and every page of the manual."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.rst"))]


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Every block of code in `text`."""
    for found in _BLOCK.finditer(text):
        rest = text[found.end() :]
        if found["fence"]:
            body = rest.partition("\n```")[0]
        else:
            inside = re.match(rf"(?:{found['indent']} +\S.*\n|[ \t]*\n)*", rest)
            body = textwrap.dedent(inside[0] if inside else "").strip("\n")
        lines = tuple(body.replace("\\\n", " ").splitlines())
        yield Block(page, found["mark"] or "", found["language"], lines)


def blocks(mark: str | None = None) -> list[Block]:
    """All blocks of shell commands, or those with `mark`."""
    found = [
        block
        for path in pages()
        for block in blocks_of(str(path.relative_to(ROOT)), path.read_text("utf-8"))
        if block.language in ("sh", "console")
    ]
    return [block for block in found if mark is None or block.mark == mark]


def words_of(line: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell, what `<` reads from left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in ("&&", "|", "<", ">", ">>", ";"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """Every use of `program` in a block: the page, and the words behind the program's name."""
    for block in blocks():
        for line, _ in block.steps():
            for words in words_of(line):
                if words and Path(words[0]).name == program:
                    yield block.page, words[1:]


class BlockTests(SynchronousTestCase):
    """How blocks are found."""

    def test_rst(self) -> None:
        text = ".. test: run\n.. code-block:: console\n\n   $ one\n   said\n\n   $ two\n\nText.\n"
        (block,) = blocks_of("x", text)
        self.assertEqual((block.mark, next(block.steps())), ("run", ("one", ["said", ""])))
        self.assertEqual([command for command, _ in block.steps()], ["one", "two"])

    def test_markdown(self) -> None:
        (block,) = blocks_of("x", "<!-- test: run -->\n```sh\none \\\n  more\ntwo\n```\nText.\n")
        self.assertEqual(block, Block("x", "run", "sh", ("one    more", "two")))


class MentionTests(SynchronousTestCase):
    """What is mentioned exists, and what exists is mentioned."""

    def known(self) -> set[str]:
        own = {f"--{name}" for name in Options().longOpt}
        twistd = {f"--{name}" for name in ServerOptions().longOpt}
        found = {name.rstrip("=") for name in own | twistd}

        def walk(command: click.Command) -> None:
            for parameter in command.params:
                found.update(parameter.opts)
            for below in getattr(command, "commands", {}).values():
                walk(below)

        walk(popdrop)
        return found | ELSEWHERE

    def test_options_in_the_text(self) -> None:
        known = self.known()
        seen = 0
        for path in pages():
            for name in _LITERAL.findall(path.read_text("utf-8")):
                seen += 1
                self.assertIn(name, known, path)
        self.assertGreater(seen, 50)

    def test_option_links(self) -> None:
        for path in pages():
            for shown, target in _OPTION_ROLE.findall(path.read_text("utf-8")):
                self.assertEqual(shown, target, path)

    def test_reference_is_complete(self) -> None:
        factory = MboxFactory()
        fields = ["{" + name + "}" for name in FIELDS]
        kinds = {f"``{kind}:" for kind in listeners.EXAMPLES}
        expected = {
            "store": [*(f"``{name}=``" for name in factory.keywords), *fields],
            "listen": kinds,
            "session-log": [f"``{reason}``" for reason in ("bad-credentials", "in-use", "quit")],
            "limits": [str(session.FAILED_LOGINS), f"{session.BAD_BEFORE_LOGIN}, "],
        }
        for name, words in expected.items():
            text = (ROOT / "docs" / "reference" / f"{name}.rst").read_text("utf-8")
            for word in words:
                self.assertIn(word, text, name)

    def test_tables(self) -> None:
        """What the pages take from the program holds all of it."""
        sys.path.insert(0, str(ROOT / "docs" / "_ext"))
        self.addCleanup(sys.path.remove, str(ROOT / "docs" / "_ext"))
        import popdrop_tables as tables

        text = {name: "\n".join(lines()) for name, lines in tables.DIRECTIVES.items()}
        for option in Options().longOpt:
            self.assertIn(f".. option:: --{option.rstrip('=')}", text["popdrop-options"])
        for keyword, command in session.COMMANDS.items():
            self.assertTrue(command.syntax.startswith(keyword.decode("ascii")))
            self.assertIn(f"``{command.syntax}``", text["popdrop-commands"])
        for kind in record.KINDS:
            self.assertIn(f"``{kind}``\n", text["popdrop-log-samples"])
        for key in throttle.DEFAULTS:
            self.assertIn(f"``{key}=``", text["popdrop-throttle-keys"])
        for code in (errors.InUse.code, errors.BadCredentials.code, errors.TemporaryFailure.code):
            self.assertIn(f"``[{code.decode('ascii')}]``", text["popdrop-codes"])
        self.assertIn("      STLS\n", text["popdrop-capabilities"])
        for name, kind in KINDS.items():
            self.assertIn(f"``{name}``\n     - {kind.severity.value}\n", text["popdrop-fsck-kinds"])

    def test_links(self) -> None:
        text = (ROOT / "README.md").read_text("utf-8")
        targets = re.findall(r"\]\(([^)#:]+)\)", text)
        self.assertGreater(len(targets), 3)
        for target in targets:
            self.assertTrue((ROOT / target).exists(), target)


class KeyringDouble:
    """No certificate is read: the documents name those of somebody else's machine."""

    def get(self, path: str, **more: Any) -> object:
        return object()


class CommandLineTests(SynchronousTestCase):
    """Every command line in the documents is one that the program takes."""

    def test_twistd(self) -> None:
        known = ServerOptions().longOpt
        seen = 0
        for page, words in commands("twistd"):
            seen += 1
            while words[0] != "popdrop":
                name, equals, _ = words.pop(0).removeprefix("--").partition("=")
                if f"{name}=" in known:
                    del words[: 0 if equals else 1]
                else:
                    self.assertIn(name, [*known, "-n"], page)
            options = Options()
            options.parseOptions(words[1:])
            self.check(page, options)
        self.assertGreater(seen, 15)

    def check(self, page: str, options: Options) -> None:
        proxies = networks("--trusted-proxies", ",".join(options["trusted-proxies"]))
        for text in options["listen-policy"].values():
            variation("--listen-policy", text)
        for text in options["listen"]:
            try:
                listeners.from_spec(object(), text, KeyringDouble(), proxies)
            except ConfigError as error:
                self.fail(f"{page}: {error}")
        # A file is made, so it must not be the one of the page.
        text = options["throttle"].replace("shared:/run/popdrop/", f"shared:{self.mktemp()}")
        throttle.from_spec(text, Clock()).close()
        for text in options["local-net"]:
            network("--local-net", text)
        for text in options["session-log"]:
            self.assertIn(parse("--session-log", text).kind, record.KINDS, page)
        store = parse("--store", options["store"].replace("$PWD", "/srv"))
        self.assertEqual(store.kind, "mbox", page)
        keywords = dict(store.kwargs)
        if "journal-dir" in keywords:
            # It is made, so it must not be the one of the page.
            self.assertTrue(os.path.isabs(keywords["journal-dir"]), page)
            keywords["journal-dir"] = os.path.realpath(self.mktemp())
        MboxFactory().make(None, "/nowhere", *store.args, **keywords)

    def test_popdrop(self) -> None:
        seen = 0
        for page, words in commands("popdrop"):
            seen += 1
            command: click.Command = popdrop
            while isinstance(command, click.Group):
                self.assertIn(words[0], command.commands, page)
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words)
        self.assertGreater(seen, 10)


class Documented(Twistd):
    """`twistd` as a document has it, but on free ports."""

    def __init__(self, case: SynchronousTestCase, words: list[str], folder: Path) -> None:
        self.begin(case, [sys.executable, "-c", ANY_PORT, *words], folder)


def need_curl() -> None:
    if shutil.which("curl") is None:
        raise SkipTest("curl is missing: install the Debian package curl")


class RunTests(SynchronousTestCase):
    """Marked blocks, run."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="popdrop-docs-"))
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.environment = {**environment(self.folder), "PWD": str(self.folder)}

    def shell(self, line: str, given: str = "", status: int = 0) -> str:
        """What `line` prints; `popdrop` is this checkout's, and asks at standard input."""
        line = re.sub(r"^popdrop user (add|passwd)\b", r"popdrop user \1 --stdin", line)
        if "--generate" in line or "--remove" in line or line.count("--stdin") > 1:
            line = line.replace(" --stdin", "", 1)
        script = f'popdrop() {{ {shlex.quote(sys.executable)} -m popdrop "$@"; }}\n{line}\n'
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        self.assertEqual(done.returncode, status, f"{line}\n{done.stderr}")
        return done.stdout

    def server(self, line: str) -> Documented:
        """Start what a document says, in the test's folder."""
        words = shlex.split(line.rpartition("&&")[2].replace("$PWD", str(self.folder)))
        self.assertEqual(Path(words[0]).name, "twistd")
        return Documented(self, words[1:], self.folder)

    def test_demo(self) -> None:
        need_curl()
        found = blocks("demo")
        self.assertEqual(found[0].page, "README.md")
        lines = [line for block in found for line, _ in block.steps()]
        ends = {line.rpartition("&&")[2].rpartition("/")[2].strip() for line in lines}
        self.assertEqual(ends, {"twistd -n popdrop --demo"})
        server = self.server(lines[0])
        count = int(server.wait_for(r"serves (\d+) mails")[1])
        first = server.wait_for(r"^ +(curl .*)")[1]
        second = server.wait_for(r"^ +(curl .*)")[1]
        self.assertIn("pop3://", first)
        self.assertIn("Subject: Lunch on Thursday\n", self.shell(first).replace("\r\n", "\n"))
        self.assertIn("pop3s://", second)
        numbers = [row.split()[0] for row in self.shell(second).splitlines()]
        self.assertEqual(numbers, [str(number) for number in range(1, count + 1)])

    def test_accounts(self) -> None:
        """The lines of the guide, in order. The database is put where the test has its folder."""
        self.environment["XDG_STATE_HOME"] = str(self.folder)
        self.environment["POPDROP_DB"] = str(self.folder / "accounts.db")
        (self.folder / "carol.password").write_text(PASSWORD + "\n")
        found = blocks("accounts")
        self.assertTrue(found)
        for block in found:
            for line, _ in block.steps():
                self.assertNotIn(PASSWORD, self.shell(line, PASSWORD + "\n"))
        listed = self.shell("popdrop user list")
        self.assertRegex(listed, r"(?m)^carol password=yes apop=no disabled=no")
        self.assertRegex(listed, r"(?m)^dave password=no apop=yes disabled=no")
        self.assertNotRegex(listed, "bob|robert")

    def in_place(self, line: str) -> str:
        """`line` with the folders of the system in the test's, and no owner but the test."""
        for name in ("/var/lib/popdrop", "/var/backups/popdrop", "/etc/popdrop"):
            line = line.replace(name, str(self.folder) + name)
        return line.replace("-o popdrop -g popdrop ", "")

    def test_keys(self) -> None:
        """Backup, another key, and back: with the old database the old secrets open again."""
        if shutil.which("sqlite3") is None:
            raise SkipTest("sqlite3 is missing: install the Debian package sqlite3")
        for name in ("var/lib/popdrop", "etc/popdrop"):
            (self.folder / name).mkdir(0o700, parents=True)
            (self.folder / name).chmod(0o700)
        state = self.folder / "var/lib/popdrop"
        (state / "journal.key").write_bytes(b"x")
        self.environment["POPDROP_DB"] = str(state / "accounts.db")
        self.shell("popdrop user add --both bob", PASSWORD + "\n")
        key = (state / "accounts.db.key").read_bytes()
        for mark, count in (("backup", 3), ("rekey", 3), ("restore", 2)):
            lines = [line for block in blocks(mark) for line, _ in block.steps()]
            self.assertEqual(len(lines), count)
            for line in lines:
                self.shell(self.in_place(line))
            closed = "does not open" in self.shell("popdrop user show bob")
            self.assertEqual(closed, mark == "rekey")
            self.assertEqual((state / "accounts.db.key").read_bytes() == key, mark != "rekey")

    def test_popauth(self) -> None:
        self.environment["POPDROP_DB"] = str(self.folder / "accounts.db")
        (block,) = blocks("popauth")
        said = [self.shell(line, f"{PASSWORD}\n" * 2) for line, _ in block.steps()]
        self.assertEqual(said, ["", "", "bob\n", ""])
        self.assertEqual(self.shell("popdrop popauth -list"), "")

    def test_app_passwords(self) -> None:
        self.environment["POPDROP_DB"] = str(self.folder / "accounts.db")
        self.shell("popdrop user add bob", PASSWORD + "\n")
        (block,) = blocks("apps")
        said = [self.shell(line) for line, _ in block.steps()]
        for words in said[:2]:
            self.assertRegex(words, r"\A(?:[a-z2-7]{5}-){4}[a-z2-7]{6}\n\Z")
        self.assertIn("label=telephone", said[2])
        self.assertIn("networks=192.0.2.7/32", said[2])
        self.assertNotIn("telephone", self.shell("popdrop user app-password list bob"))

    def test_import(self) -> None:
        """The lines of the guide, with a database of gdbm's where qpopper would have it."""
        database, old = self.folder / "accounts.db", self.folder / "pop.auth"
        hidden = bytes(octet ^ 0xFF for octet in PASSWORD.encode()) + b"\0"
        gdbm(old, [(b"bob\0", hidden)])
        found = blocks("import")
        self.assertEqual(len(found), 3)
        said = []
        for block in found:
            for line, _ in block.steps():
                line = re.sub(r"(popdrop user [a-z]+)", rf"\1 --db {database}", line)
                said.append(self.shell(line.replace("/etc/pop.auth", str(old))))
        self.assertIn("add bob apop", said[0])
        self.assertIn("Added 1, replaced 0", said[1])
        self.assertIn("Added 0, replaced 1", said[2])
        written = (self.folder / "passwd-file").read_text()
        self.assertRegex(written, r"\Abob:\{ARGON2ID\}\$argon2id\$\S+\n\Z")
        self.assertNotIn(PASSWORD, "".join(said))

    def test_fsck(self) -> None:
        """With the folders, the moment and the size of the page: the last is of the host's name."""
        state, mail = self.folder / "state", self.folder / "mail"
        for folder in (state, mail):
            folder.mkdir(0o700)
        spool = mail / "bob"
        spool.write_bytes(
            b"lost text\n\nFrom carol@example.org Mon Jan  6 11:58:00 2025\n"
            b"Subject: lunch\n\nAt one?\n\0\0\0\nCarol"
        )
        spool.chmod(0o660)
        looked, mended = blocks("fsck")
        for block, status in ((looked, 4), (mended, 1)):
            ((line, expected),) = block.steps()
            line = line.replace("/var/lib/popdrop", str(state)).replace("/var/mail", str(mail))
            said = self.shell(line, status=status)
            said = said.replace(str(state), "/var/lib/popdrop").replace(str(mail), "/var/mail")
            said = re.sub(r"[0-9]{8}T[0-9]{6}Z-", "20250106T120000Z-", said)
            said = re.sub(r"\(2 messages, [0-9]+", "(2 messages, 357", said)
            self.compare(said, expected)

    def test_tutorial(self) -> None:
        """From the first command to the last, with the answers that the page shows."""
        need_curl()
        server: Documented | None = None
        page = "docs/tutorial/first-server.rst"
        for block in blocks():
            if block.page != page or block.mark not in ("shell", "server", "client"):
                continue
            for line, expected in block.steps():
                if block.mark == "server":
                    server = self.server(line)
                    server.wait_for(r"POP3 on ::1 port \d+, TLS|POP3 on 127\S+ port \d+, TLS")
                elif block.mark == "client":
                    assert server is not None
                    self.compare(self.shell(self.client(server, line)), expected)
                else:
                    self.shell(line, PASSWORD + "\n")
        self.assertEqual((self.folder / "first" / "mail" / "bob").read_bytes(), b"")

    def client(self, server: Documented, line: str) -> str:
        """A line of curl's with the password and the ports that the server has."""
        self.assertTrue(line.startswith("curl "))
        for documented, how in (("1110", "STLS offer"), ("1995", "TLS")):
            log = "\n".join(server.log)
            real = re.search(rf"POP3 on 127.0.0.1 port (\d+), {how}$", log, re.MULTILINE)
            assert real is not None
            line = line.replace(f"127.0.0.1:{documented}/", f"127.0.0.1:{real[1]}/")
        return line.replace("curl ", "curl -sS ").replace(
            "--user bob ", f"--user {shlex.quote('bob:' + PASSWORD)} "
        )

    def compare(self, said: str, expected: list[str]) -> None:
        if expected:
            self.assertEqual(said.splitlines(), expected)
