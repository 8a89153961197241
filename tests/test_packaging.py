"""What is built, what is in it, and what works once it is installed. Nothing is downloaded.

Everything is built in a copy of the checkout. The environments it is installed into see the
packages of the one that runs the tests, but not its Popdrop.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from functools import cache
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import popdrop
from tests.test_house import ROOT, files

PLUGINS = {"twisted/plugins/popdrop_plugin.py", "twisted/plugins/popdrop_specs.py"}

GUARD = 300
"""Seconds after which a child process is taken for stuck."""

TWISTD = "from twisted.scripts.twistd import run\nrun()\n"
"""The script that an installation of Twisted has; ours comes from another environment."""


def run(*command: str | Path, cwd: Path) -> str:
    """What the command says on both outputs; it fails the test unless it ends well."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    environ |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "HOME": str(cwd)}
    environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "200", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}")
    return done.stdout


def project_files(*folders: str) -> set[str]:
    """Files that belong into the history, all or those in these folders, relative to the root."""
    return {str(path) for path in files() if not folders or path.parts[0] in folders}


def copied(folder: Path) -> Path:
    """The checkout again in `folder`, with what use leaves behind in one."""
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("twisted/plugins/dropin.cache", "popdrop/__pycache__/stray.pyc", "dist/stray"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def environment(folder: Path, with_pip: bool) -> Path:
    """A fresh virtual environment in `folder`: its Python."""
    venv.create(folder, with_pip=with_pip, symlinks=True)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # A plain path: `.pth` files in that folder, as of an editable Popdrop, are not read from here.
    paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(own.rstrip("\n"), "borrowed.pth").write_text("\n".join([*paths, ""]))
    (folder / "bin" / "twistd").write_text(TWISTD)
    return python


@cache
def built(folder: Path) -> tuple[Path, Path]:
    """The sdist of a copy of the checkout, and the wheel that is built from the sdist."""
    hatchling = (sys.executable, "-m", "hatchling", "build", "-d", folder / "out")
    run(*hatchling, "-t", "sdist", cwd=copied(folder / "copy"))
    (sdist,) = (folder / "out").glob("*.tar.gz")
    (folder / "unpacked").mkdir()
    run("tar", "-xf", sdist, cwd=folder / "unpacked")
    run(*hatchling, "-t", "wheel", cwd=folder / "unpacked" / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = (folder / "out").glob("*.whl")
    return sdist, wheel


class PackagingCase(SynchronousTestCase):
    """Folders, and one build for all tests of a run."""

    _first: Path | None = None

    def folder(self) -> Path:
        """An empty folder."""
        folder = Path(self.mktemp()).absolute()
        folder.mkdir(parents=True)
        return folder

    def built(self) -> tuple[Path, Path]:
        """See the function of that name."""
        PackagingCase._first = PackagingCase._first or self.folder()
        return built(PackagingCase._first)

    def works(self, python: Path, cwd: Path) -> None:
        """Popdrop as installed beside `python`: the plugin is listed, the commands answer."""
        twistd = (python, python.parent / "twistd")
        self.assertRegex(run(*twistd, "--help", cwd=cwd), r"(?m)^ +popdrop +A POP3 server")
        self.assertIn("--store", run(*twistd, "popdrop", "--help", cwd=cwd))
        version = f"popdrop {popdrop.__version__}\n"
        self.assertEqual(run(python.parent / "popdrop", "--version", cwd=cwd), version)
        self.assertEqual(run(python, "-m", "popdrop", "--version", cwd=cwd), version)


class ContentTests(PackagingCase):
    """What is in the archives."""

    def test_wheel(self) -> None:
        _, wheel = self.built()
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        information = {name for name in names if ".dist-info/" in name}
        self.assertEqual(names - information, project_files("popdrop") | PLUGINS)
        self.assertIn("popdrop/py.typed", names)
        self.assertTrue(any(name.endswith("/licenses/LICENSE") for name in information))

    def test_metadata(self) -> None:
        _, wheel = self.built()
        base = f"popdrop-{popdrop.__version__}"
        self.assertEqual(wheel.name, f"{base}-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            metadata = archive.read(f"{base}.dist-info/METADATA").decode()
            scripts = archive.read(f"{base}.dist-info/entry_points.txt").decode()
        self.assertIn("\nRequires-Python: >=3.11\n", metadata)
        self.assertRegex(metadata, r"\nRequires-Dist: twisted\[tls\]>=[0-9.]+\n")
        self.assertIn("popdrop = popdrop.__main__:main", scripts)

    def test_sdist(self) -> None:
        """All that the tests and the checks need, and nothing that use left behind."""
        sdist, _ = self.built()
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        self.assertEqual(names - project_files(), {"PKG-INFO"})
        needed = project_files("popdrop", "tests", ".ci") | PLUGINS
        self.assertEqual(needed - names, set())
        self.assertLessEqual({"README.md", "CHANGES.md", "LICENSE", "pyproject.toml"}, names)


class InstallTests(PackagingCase):
    """What works afterwards."""

    def test_wheel(self) -> None:
        """Installed, it works; uninstalled, Twisted does not know it any more."""
        _, wheel = self.built()
        folder = self.folder()
        python = environment(folder / "env", with_pip=True)
        pip = (python, "-m", "pip")
        run(*pip, "install", "--no-deps", "--ignore-installed", wheel, cwd=folder)
        where = run(python, "-c", "import popdrop; print(popdrop.__file__)", cwd=folder)
        self.assertTrue(where.startswith(str(folder)), where)
        self.works(python, folder)
        run(*pip, "uninstall", "--yes", "popdrop", cwd=folder)
        left = [str(path) for path in (folder / "env").rglob("*popdrop*")]
        self.assertEqual([path for path in left if not path.endswith(".pyc")], [])
        found = run(python, python.parent / "twistd", "--help", cwd=folder)
        self.assertNotRegex(found, r"(?m)^ +popdrop ")

    def test_editable(self) -> None:
        folder = self.folder()
        copy = copied(folder / "copy")
        python = environment(folder / "env", with_pip=True)
        options = ("--no-deps", "--no-build-isolation", "--ignore-installed")
        run(python, "-m", "pip", "install", *options, "-e", copy, cwd=folder)
        self.works(python, folder)
        (copy / "popdrop" / "__init__.py").write_text('__version__ = "0.0.7"\n')
        self.assertEqual(run(python.parent / "popdrop", "--version", cwd=folder), "popdrop 0.0.7\n")

    def test_checkout(self) -> None:
        """Nothing installed: `python -m` sees the folder it is started in."""
        folder = self.folder()
        copy = copied(folder / "copy")
        python = environment(folder / "env", with_pip=False)
        self.assertIn("--store", run(python, "-m", "twisted", "popdrop", "--help", cwd=copy))
        self.assertRegex(run(python, "-m", "popdrop", "--help", cwd=copy), r"(?m)^ +user ")
        nothing = run(python, python.parent / "twistd", "--help", cwd=folder)
        self.assertIsNone(re.search(r"(?m)^ +popdrop ", nothing))
