"""House rules that a linter does not know: lengths, docstrings, words, news fragments."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementedBy

from tests.test_layers import name_of

ROOT = Path(__file__).resolve().parent.parent

LONG_MODULE = 400
"""Lines. A longer module says in its docstring why it has so many lines."""

LONG_FUNCTION = 60
"""Lines of a function with its decorators, without its docstring."""

TOP_LEVEL = frozenset(
    ("CHANGES.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml")
    + ("benchmarks", "contrib", "docs", "newsfragments", "popdrop", "tests", "twisted")
)
"""All that stands at the top; what .gitignore and a leading dot hide aside."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> Iterator[tuple[Path, str]]:
    """Python files under these folders, relative to the root, and their text."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), path.read_text()


def length(function: Function) -> int:
    """Lines of `function`: see `LONG_FUNCTION`."""
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    last = function.end_lineno or first
    lines = last - first + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def long_functions(text: str) -> list[str]:
    """Names of the functions that are too long, with their lines."""
    return [
        f"{node.name} has {length(node)} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, Function) and length(node) > LONG_FUNCTION
    ]


def long_module(text: str) -> bool:
    """Whether the module is long and does not say why."""
    said = ast.get_docstring(ast.parse(text)) or ""
    return len(text.splitlines()) > LONG_MODULE and "lines" not in said


def prints(text: str) -> list[int]:
    """The lines that call `print`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def undocumented(body: list[ast.stmt], within: str = "") -> list[str]:
    """Public classes, functions and methods of which no definition has a docstring.

    A test of `popdrop.testing` may say all in its name.
    """
    documented: dict[str, bool] = {}
    inner: list[str] = []
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith(("_", "test_")):
            continue
        name = f"{within}{node.name}"
        documented[name] = documented.get(name, False) or ast.get_docstring(node) is not None
        if isinstance(node, ast.ClassDef):
            inner += undocumented(node.body, f"{name}.")
    return [name for name, has in documented.items() if not has] + inner


def documented_above(module: str, name: str) -> bool:
    """Whether `name`, as `Class.method`, is declared by a base class or by an interface."""
    owner, _, method = name.rpartition(".")
    cls = importlib.import_module(module)
    for part in filter(None, owner.split(".")):
        cls = getattr(cls, part)
    if not isinstance(cls, type):
        return False
    return any(hasattr(base, method) for base in cls.__mro__[1:]) or any(
        method in interface for interface in implementedBy(cls).flattened()
    )


def ignored(path: Path) -> bool:
    """Whether `path`, relative to the root, is kept out of the history."""
    rules = [rule.strip("/") for rule in (ROOT / ".gitignore").read_text().split()]
    parts = [*path.parts, str(path), *(str(parent) for parent in path.parents)]
    return ".git" in parts or any(fnmatch.filter(parts, rule) for rule in rules)


def files() -> Iterator[Path]:
    """Every file that belongs into the history, relative to the root."""
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored(here / name)]
        yield from (here / name for name in names if not ignored(here / name))


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project, relative to the root."""
    for path in files():
        try:
            yield path, (ROOT / path).read_text("utf-8")
        except UnicodeDecodeError:
            continue


def machine_words() -> re.Pattern[str]:
    """What is true on some machine only: where things lie there, where its packages come from.

    Put together from pieces, so that this file does not hold the words.
    """
    folders = [("", "work", ""), ("", "tmp", "v", ""), ("", "opt", "pypi")]
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("registry", "npmjs")]
    words = ["/".join(folder) for folder in folders] + [".".join(host) for host in hosts]
    return re.compile(r"(?<![\w}~*-])(?:" + "|".join(map(re.escape, words)) + ")")


class RuleTests(SynchronousTestCase):
    """The rules themselves, on made-up sources."""

    def test_length(self) -> None:
        body = "    pass\n" * 59
        self.assertEqual(long_functions(f"def f():\n{body}"), [])
        self.assertEqual(long_functions(f"def f():\n    '''Says\n    much.'''\n{body}"), [])
        self.assertEqual(long_functions(f"def f():\n{body}    pass\n"), ["f has 61 lines"])
        self.assertEqual(long_functions(f"@g\ndef f():\n{body}"), ["f has 61 lines"])

    def test_module(self) -> None:
        self.assertFalse(long_module("x = 1\n" * 400))
        self.assertTrue(long_module("x = 1\n" * 401))
        self.assertFalse(long_module("'''Many lines, since.'''\n" + "x = 1\n" * 401))

    def test_prints(self) -> None:
        self.assertEqual(prints("x = 1\nprint(x)\nfile.print(x)\n'print(x)'\n"), [2])

    def test_undocumented(self) -> None:
        source = (
            "def f(): pass\n"
            "def _g(): pass\n"
            "class A:\n    def m(self): pass\n    def n(self): 'Said.'\n    def _p(self): pass\n"
            "class _B:\n    def m(self): pass\n"
        )
        self.assertEqual(undocumented(ast.parse(source).body), ["f", "A", "A.m"])

    def test_documented_above(self) -> None:
        self.assertTrue(documented_above("popdrop.protocol", "POP3Protocol.dataReceived"))
        self.assertFalse(documented_above("popdrop.values", "Secret.reveal"))
        self.assertFalse(documented_above("popdrop.spec", "parse"))

    def test_machine_words(self) -> None:
        words = machine_words()
        host = ".".join(("files", "pythonhosted", "org"))
        for pieces in (("see ", "work", "main"), ("", "tmp", "v", "bin"), ("https:", "", host)):
            self.assertTrue(words.search("/".join(pieces)), pieces)
        for pieces in (("the work", "life"), ("a ", "workers", " path"), ("", "tmp", "vmail")):
            self.assertFalse(words.search("/".join(pieces)), pieces)
        for pieces in (("~", "work", "x"), ("framework", "x")):
            self.assertFalse(words.search("/".join(pieces)), pieces)

    def test_ignored(self) -> None:
        for path in (".git/config", "a/__pycache__/b.pyc", "docs/_build/x.html", "_trial_temp-1/x"):
            self.assertTrue(ignored(Path(path)), path)
        for path in ("popdrop/wire.py", ".ci/run", ".gitignore", "docs/conf.py"):
            self.assertFalse(ignored(Path(path)), path)


class HouseTests(SynchronousTestCase):
    """The project keeps the rules."""

    def test_nothing_else_at_the_top(self) -> None:
        """Whatever a tool or a test has left there would be committed with the next change."""
        ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
        strange = [
            path.name
            for path in ROOT.iterdir()
            if path.name not in TOP_LEVEL
            and not path.name.startswith(".")
            and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
        ]
        self.assertEqual(strange, [])

    def test_long_modules_say_why(self) -> None:
        found = sources("popdrop", "benchmarks", "twisted")
        self.assertEqual([str(path) for path, text in found if long_module(text)], [])

    def test_functions(self) -> None:
        found = sources("popdrop", "benchmarks", "twisted", "tests")
        wrong = [f"{path}: {what}" for path, text in found for what in long_functions(text)]
        self.assertEqual(wrong, [])

    def test_docstrings(self) -> None:
        wrong = []
        for path, text in sources("popdrop"):
            module = name_of(path)
            tree = ast.parse(text)
            if text and ast.get_docstring(tree) is None:
                wrong.append(module)
            wrong += [
                f"{module}.{name}"
                for name in undocumented(tree.body)
                if not documented_above(module, name)
            ]
        self.assertEqual(wrong, [])

    def test_only_the_command_line_prints(self) -> None:
        found = [(path, line) for path, text in sources("popdrop") for line in prints(text)]
        self.assertEqual([hit for hit in found if hit[0].parts[1] != "cli"], [])

    def test_nobody_parses_mail(self) -> None:
        """Others had their worst bugs there (CVE-2020-12100, CVE-2026-27859): octets are sent."""
        wrong = []
        for path, text in sources("popdrop"):
            for node in ast.walk(ast.parse(text)):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                # `formatdate` writes the demo's mail.
                wrong += [
                    (path, name)
                    for name in names
                    if re.match(r"(email|mailbox|mimetypes|quopri)\b(?!\.utils$)", name)
                ]
        self.assertEqual(wrong, [])

    def test_no_word_of_one_machine(self) -> None:
        words = machine_words()
        seen = 0
        wrong = []
        for path, text in texts():
            seen += 1
            wrong += [
                f"{path}:{number}: {line.strip()}"
                for number, line in enumerate(text.splitlines(), 1)
                if words.search(line)
            ]
        self.assertEqual(wrong, [])
        self.assertGreater(seen, 50)

    def test_no_package_in_twisted(self) -> None:
        """An `__init__.py` there would hide Twisted itself."""
        self.assertEqual(list((ROOT / "twisted").rglob("__init__.py")), [])

    def test_news_fragments(self) -> None:
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
        kinds = {kind["directory"] for kind in settings["type"]}
        wrong = []
        for path in (ROOT / settings["directory"]).iterdir():
            if path.name in settings["ignore"] or path.name.startswith("."):
                continue
            name = re.fullmatch(r"[a-z0-9][a-z0-9-]*\.([a-z]+)\.md", path.name)
            if name is None or name[1] not in kinds:
                wrong.append(
                    f"{path.name}: the name is not SUBJECT.KIND.md, KIND of {sorted(kinds)}"
                )
            text = path.read_text("utf-8")
            if not re.fullmatch(r"[^\s#*-].*\.\n", text, re.DOTALL):
                wrong.append(f"{path.name}: not sentences that end with a full stop and a line end")
        self.assertEqual(wrong, [])
