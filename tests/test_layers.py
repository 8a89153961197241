"""Who may import whom: an import goes only to a lower rank, never sideways.

The table is `RANKS`. A new module gets the lowest rank above everything that it imports; ranks up
to `PURE` know no reactor. Imports inside functions count, and those under `TYPE_CHECKING` too,
except in `interfaces`, which may name the types of anything.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).resolve().parent.parent

_TABLE = """
13  __main__
12  cli.main
11  cli.imports
10  cli.* testing worker
9   tap
8   workers demo factory
7   protocol realm options accounts.strcred
7   ops.relay
6   inthreads legacy throttle record listeners accounts.checkers ops.*
6   stores.mbox.fsck
6   accounts.oidc
5   stores.mbox.store stores.mbox.keepsake stores.mbox.mend
5   accounts.issuer accounts.backends
5   securing
4   proxied certs session threads stores.mbox.drop stores.mbox.recovery stores.maildir
4   stores.mbox.beside stores.mbox.check
4   accounts.rosters accounts.importers accounts.system accounts.checkpassword
4   accounts.passwdfile accounts.database
3   sasl policy selfmade config accounts.schema
3   stores.mbox.locks stores.mbox.recent stores.mbox.journal stores.mbox.index
3   stores.mbox.kinds stores.mbox.identity stores.mbox.marks
3  accounts.tokens ops.access ops.grants
5  ops.names
2  credentials wire spec sqlitefile accounts.keys sharedcounts ops.maps
2   stores.template stores.mbox.lengths stores.mbox.mmdf stores.mbox.spool stores.mbox.dotlockfile
2   stores.mbox.folders
1   interfaces accounts.secrets accounts.scram accounts.rows accounts.foreign
1   stores.mbox.scan stores.mbox.findings
1   stores.uidlform stores.mbox.status
0   stores.uidl stores.mbox.spans search
1   inherited
0   ops.wholefile
0   errors listing values places hot sending asowner notify accounts.dbmfiles accounts.webclient
6   accounts.helperclient
5   accounts.selfservice accounts.helperslot
3   accounts.helperspools handing
2   accounts.spoolslot
4   accounts.helper
3   accounts.doorman
2   accounts.pace
1   accounts.helperwire
0   accounts.supervisor deadlines accepting
6   cli.show
5   cli.common
"""
"""`a.*` stands for every module of `a` that has no rank of its own."""

PURE = 5
"""The highest rank whose modules must not bring in a reactor."""

APART = (
    ("popdrop.stores", ("popdrop.session", "popdrop.protocol", "popdrop.accounts")),
    ("popdrop.accounts", ("popdrop.stores",)),
)
"""Rooms that know nothing of each other, whatever the ranks."""


def read_table(text: str) -> dict[str, int]:
    """Names of modules without `popdrop.`, and their ranks. Each name stands there once."""
    ranks: dict[str, int] = {}
    for line in text.split("\n"):
        number, _, names = line.partition(" ")
        for name in names.split():
            if name in ranks:
                raise ValueError(f"{name} has two ranks")
            ranks[name] = int(number)
    return ranks


RANKS = read_table(_TABLE)


def rank(module: str) -> int | None:
    """The rank of `module`, a full name. `None` where the table does not know it."""
    short = module.removeprefix("popdrop.")
    family = short.rpartition(".")[0] + ".*"
    return RANKS.get(short, RANKS.get(family))


def name_of(path: Path) -> str:
    """The full name of the module in `path`, relative to the root. A package has its own."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Imports(ast.NodeVisitor):
    """Collects (line, full name) of what one module imports."""

    def __init__(self, module: str, package: bool) -> None:
        self.found: list[tuple[int, str]] = []
        self._package = module if package else module.rpartition(".")[0]
        self._types_free = module == "popdrop.interfaces"

    def visit_If(self, node: ast.If) -> None:
        if self._types_free and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self._package.split(".")
            stay = above[: len(above) - node.level + 1]
            base = ".".join([*stay, *filter(None, [base])])
        # Each name may be a module or only a name in one: `imports` finds out which.
        self.found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]


def imports(source: str, module: str, package: bool, known: frozenset[str]) -> dict[str, int]:
    """The modules out of `known` that `source` imports, with the line of the first time."""
    visitor = Imports(module, package)
    visitor.visit(ast.parse(source))
    found: dict[str, int] = {}
    for line, name in visitor.found:
        target = name
        while target and target not in known:
            target = target.rpartition(".")[0]
        if target and target != module:
            found.setdefault(target, line)
    return found


def modules() -> dict[str, Path]:
    """Every module of Popdrop by its full name."""
    files = sorted((ROOT / "popdrop").rglob("*.py"))
    return {name_of(path.relative_to(ROOT)): path for path in files}


def edges() -> Iterator[tuple[str, str, str]]:
    """Every import of one module of Popdrop by another: importer, imported, `file:line`."""
    all_modules = modules()
    known = frozenset(all_modules)
    for module, path in all_modules.items():
        package = path.name == "__init__.py"
        where = path.relative_to(ROOT)
        for target, line in imports(path.read_text(), module, package, known).items():
            yield module, target, f"{where}:{line}"


def packages() -> frozenset[str]:
    """Packages whose `__init__` imports nothing of Popdrop: they need no rank."""
    found = frozenset(name for name, path in modules().items() if path.name == "__init__.py")
    return found - {importer for importer, _, _ in edges()}


def brings_reactor(statement: str) -> bool:
    """Whether `statement`, run in a fresh interpreter, installs a reactor."""
    code = f"import sys\n{statement}\nprint('twisted.internet.reactor' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"{statement}\n{done.stderr}")
    return done.stdout.split()[-1] == "True"


class ReaderTests(SynchronousTestCase):
    """The reading of imports, on made-up modules."""

    KNOWN = frozenset({"popdrop", "popdrop.a", "popdrop.b", "popdrop.c", "popdrop.c.d"})

    def read(self, source: str, module: str = "popdrop.a", package: bool = False) -> list[str]:
        return sorted(imports(source, module, package, self.KNOWN))

    def test_forms(self) -> None:
        for source in (
            "import popdrop.b",
            "import popdrop.b as x",
            "from popdrop import b",
            "from popdrop.b import name",
            "from . import b",
            "from .b import name",
            "def f():\n    from popdrop.b import name",
            "if x:\n    import popdrop.b",
            "if x:\n    pass\nelif y:\n    import popdrop.b",
            "if TYPE_CHECKING:\n    import popdrop.b",
            "try:\n    import popdrop.b\nexcept ImportError:\n    pass",
        ):
            self.assertEqual(self.read(source), ["popdrop.b"], source)

    def test_deeper(self) -> None:
        self.assertEqual(self.read("from popdrop.c import d"), ["popdrop.c.d"])
        self.assertEqual(self.read("from .. import b", "popdrop.c.d"), ["popdrop.b"])
        self.assertEqual(self.read("from . import d", "popdrop.c", True), ["popdrop.c.d"])

    def test_name_of_the_package(self) -> None:
        self.assertEqual(self.read("from popdrop import __version__"), ["popdrop"])

    def test_left_out(self) -> None:
        for source in ("import os.path", "from twisted.internet import defer", "import popdrops.b"):
            self.assertEqual(self.read(source), [], source)

    def test_types_of_interfaces(self) -> None:
        source = "if TYPE_CHECKING:\n    import popdrop.b\nelse:\n    import popdrop.c"
        self.assertEqual(self.read(source, "popdrop.interfaces"), ["popdrop.c"])

    def test_rank(self) -> None:
        self.assertEqual(rank("popdrop.tap"), 9)
        self.assertEqual((rank("popdrop.cli.main"), rank("popdrop.cli.anything")), (12, 10))
        self.assertIsNone(rank("popdrop.no_such_module"))
        self.assertRaises(ValueError, read_table, "1 a\n2 a")


class LayerTests(SynchronousTestCase):
    def test_every_module_has_a_rank(self) -> None:
        lost = [m for m in modules() if rank(m) is None and m not in packages()]
        self.assertEqual(
            lost, [], f"give it the lowest rank above its imports, in {Path(__file__).name}, _TABLE"
        )

    def test_downwards_only(self) -> None:
        bare = packages()
        seen = 0
        wrong = []
        for importer, imported, where in edges():
            if imported in bare:
                continue
            seen += 1
            above, below = rank(importer), rank(imported)
            if above is None or below is None or below >= above:
                wrong.append(f"{where}: {importer} ({above}) imports {imported} ({below})")
        self.assertEqual(wrong, [], "\n" + "\n".join(wrong))
        self.assertGreater(seen, 50)

    def test_rooms_apart(self) -> None:
        wrong = []
        for room, others in APART:
            for importer, imported, where in edges():
                if f"{importer}.".startswith(f"{room}.") and any(
                    f"{imported}.".startswith(f"{other}.") for other in others
                ):
                    wrong.append(f"{where}: {importer} imports {imported}")
        self.assertEqual(wrong, [])

    def test_low_ranks_bring_no_reactor(self) -> None:
        low = [m for m in modules() if (r := rank(m)) is not None and r <= PURE]
        self.assertIn("popdrop.session", low)
        self.assertFalse(brings_reactor("import " + ", ".join(low)))

    def test_a_reactor_would_be_seen(self) -> None:
        self.assertTrue(brings_reactor("import twisted.internet.reactor"))

    def test_plugins_bring_little(self) -> None:
        """`twistd --help` reads the plugin files: no reactor, and of Popdrop only ranks 0-1."""
        names = sorted(p.stem for p in (ROOT / "twisted" / "plugins").glob("popdrop_*.py"))
        self.assertIn("popdrop_plugin", names)
        high = {m for m in modules() if (r := rank(m)) is not None and r > 1}
        # The installed Twisted is a package of its own: the folder is added as Twisted does.
        statement = (
            "import twisted.plugins\n"
            "twisted.plugins.__path__.append('twisted/plugins')\n"
            + "".join(f"import twisted.plugins.{name}\n" for name in names)
            + f"assert not set(sys.modules) & {high!r}, set(sys.modules) & {high!r}"
        )
        self.assertFalse(brings_reactor(statement))
