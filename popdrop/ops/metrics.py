"""Figures for a monitoring system, in a file of the Prometheus text format.

For the textfile collector of node_exporter, and any other program that reads the format:
https://prometheus.io/docs/instrumenting/exposition_formats/. The end of certificates so far.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from twisted.logger import Logger

from popdrop.ops import wholefile

log = Logger()


def certificates(ends: Iterable[tuple[str, float]], refused: int) -> str:
    """The lines about certificates: the file of each with its end as Unix time, in seconds.

    `refused` is the number of files and folders that hold a pair that cannot be used.
    """
    rows = [
        "# HELP popdrop_certificate_not_after_seconds When the certificate in this file ends.",
        "# TYPE popdrop_certificate_not_after_seconds gauge",
    ]
    rows += [
        f'popdrop_certificate_not_after_seconds{{file="{_escaped(file)}"}} {end:.0f}'
        for file, end in sorted(ends)
    ]
    rows += [
        "# HELP popdrop_certificates_refused Certificates that cannot be used, as the log says.",
        "# TYPE popdrop_certificates_refused gauge",
        f"popdrop_certificates_refused {refused}",
    ]
    return "".join(f"{row}\n" for row in rows)


def _escaped(value: str) -> str:
    text = value.encode("utf-8", "replace").decode("utf-8")  # a path need not be UTF-8
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class MetricsFile:
    """The file `path`, replaced as a whole."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._written = ""
        self._failed = ""

    def write(self, text: str) -> None:
        """Have the file say `text`. Blocking; a failure is logged once."""
        if text == self._written and os.path.exists(self.path):
            return
        try:
            wholefile.put(self.path, text)
        except OSError as error:
            why = error.strerror or str(error)
            if why != self._failed:
                log.error(
                    "--metrics {path}: cannot be written: {why}; name a file in a folder that the"
                    " user may write to whom Popdrop runs as",
                    path=self.path,
                    why=why,
                )
            self._failed = why
            return
        self._written, self._failed = text, ""
