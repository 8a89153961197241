"""What the real libwrap says: a JSON object a line in, a list of verdicts a line out.

In: `allow` and `deny`, the texts of both files; `daemon`; `clients`, pairs of name and address.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    library = ctypes.CDLL("libwrap.so.0")
    paths = {}
    for table in ("allow", "deny"):
        paths[table] = str(folder / table).encode()
        ctypes.c_char_p.in_dll(library, f"hosts_{table}_table").value = paths[table]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        for table in paths:
            (folder / table).write_text(asked[table], newline="")
        verdicts = [
            library.hosts_ctl(asked["daemon"].encode(), name.encode(), address.encode(), b"unknown")
            for name, address in asked["clients"]
        ]
        print(json.dumps([bool(verdict) for verdict in verdicts]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
