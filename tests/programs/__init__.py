"""Programs that stand for checkpassword and its like; tests put them into a folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

HERE = Path(__file__).parent


def checkpassword(folder: Path, users: Path) -> Path:
    """The program of `checkpassword.c`, which looks into the file `users`."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise SkipTest("needs the Debian packages gcc and libc6-dev")
    program = folder / "checkpassword"
    where = f'-DUSERS="{users}"'
    source = HERE / "checkpassword.c"
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", where, "-o", program, source], check=True)
    return program


def script(folder: Path, name: str, text: str | None = None) -> Path:
    """An executable of the Python file of that name here, or of `text`, for any user."""
    program = folder / name
    text = (HERE / f"{name}.py").read_text() if text is None else text
    program.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{text}")
    program.chmod(0o755)
    return program
