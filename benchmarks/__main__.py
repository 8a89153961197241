"""`python -m benchmarks`: start the servers, drive them, print the table."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import report, tools
from benchmarks.bench import LONG, SHORT, Bench, Sizes
from benchmarks.generator import Generator, Run
from benchmarks.mailutils import Mailutils
from benchmarks.peers import Canned, Dovecot, DovecotTuned, Peer, Popdrop
from benchmarks.popa3d import Popa3d
from benchmarks.process import Failed, Machine, NotApplicable, cores
from benchmarks.scenarios import SCENARIOS, Scenario

PEERS = ("popdrop", "dovecot-tuned", "dovecot-stock", "popa3d", "mailutils", "canned")
CLASSES: dict[str, type[Peer]] = {
    cls.key: cls for cls in (Popdrop, Dovecot, DovecotTuned, Popa3d, Mailutils)
}

DESCRIPTION = """\
Measure Popdrop and its peers in one run, side by side, and write a Markdown table.

Every server runs on loopback, pinned to one core, with a configuration and spools of its own in a
temporary folder; the load generator (C, built with cc) has the other core. Figures are medians of
several runs; the peers take turns in each, so that a busy moment hits them alike. A peer that is
not installed is left out, and the table says so. README.md explains each figure.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"peers: {', '.join(PEERS)}\nscenarios:\n"
        + "\n".join(f"  {scenario.key:14} {scenario.title}" for scenario in SCENARIOS),
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="under 5 minutes (default)")
    form.add_argument("--long", action="store_true", help="larger spools, 7 runs: 30 minutes")
    parser.add_argument("--peers", metavar="A,B", help="only these (default: all that are quick)")
    parser.add_argument("--scenarios", metavar="A,B", help="only these (default: all)")
    large = parser.add_mutually_exclusive_group()
    large.add_argument("--large-octets", type=_count, metavar="N", help="size of the large spool")
    large.add_argument("--large-messages", type=_count, metavar="N", help="or its messages")
    parser.add_argument("--runs", type=_count, metavar="N", help="runs of each figure")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/var/tmp"),
        help="where spools are served from: a real disk, 3 GB free (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")
    parser.add_argument("--keep", action="store_true", help="leave the servers' folders and logs")
    return parser


def _chosen(text: str | None, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"unknown: {name}; known: {', '.join(known)}")
    return names


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return number


def _sizes(given: argparse.Namespace) -> Sizes:
    sizes = LONG if given.long else SHORT
    if given.runs:
        sizes = replace(sizes, runs=given.runs)
    if given.large_octets:
        sizes = replace(sizes, large=given.large_octets)
    return replace(sizes, large_messages=given.large_messages)


class Campaign:
    """One run of the program: peers, notes and results."""

    def __init__(self, bench: Bench, folder: Path, core: int) -> None:
        self.bench = bench
        self.folder = folder
        self.core = core
        self.notes: list[str] = []
        self.peers: list[Peer] = []
        self.results: dict[tuple[str, str], list[Run]] = {}
        self.ours_failed = False

    def _make(self, key: str) -> Peer:
        password = secrets.token_hex(12)
        if key == Canned.key:
            return Canned(self.folder, self.core, password, self.bench.sizes.messages)
        return CLASSES[key](self.folder, self.core, password)

    def start(self, key: str, stack: ExitStack) -> None:
        """Start one peer, or note why not."""
        peer = self._make(key)
        stack.callback(peer.stop)
        try:
            peer.start(self.bench.users())
            self.bench.furnish(peer)
        except (tools.Missing, Failed, OSError) as problem:
            self._note(peer, f"left out: {problem}", isinstance(problem, tools.Missing))
            return
        self.peers.append(peer)
        if os.geteuid() == 0 and peer.owner is None and key == Popdrop.key:
            self.notes.append("Popdrop ran as root: its Python cannot be read by `nobody`.")

    def _note(self, peer: Peer, text: str, missing: bool = False) -> None:
        self.ours_failed |= peer.key == Popdrop.key and not missing
        note = f"{peer.title}: {' '.join(text.split())}"
        if note not in self.notes:
            self.notes.append(note)
            _say(note)

    def measure(self, scenario: Scenario) -> None:
        """All runs of one scenario; the peers take turns."""
        _say(scenario.title)
        able = [p for p in self.peers if scenario.auth is None or scenario.auth in p.auth]
        for number in scenario.rounds(self.bench):
            for peer in [peer for peer in able if scenario.takes(peer, number)]:
                try:
                    run = scenario.measure(self.bench, peer, number)
                except (Failed, OSError) as problem:
                    able.remove(peer)
                    self.results.pop((scenario.key, peer.key), None)
                    if not isinstance(problem, NotApplicable):
                        self._note(peer, f"{scenario.key}: {problem}")
                    continue
                if number >= 0:
                    self.results.setdefault((scenario.key, peer.key), []).append(run)


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _load_line(others: list[float], before: Machine, began: float) -> str:
    stolen = (Machine.now().stolen - before.stolen) / (time.monotonic() - began)
    middle = sorted(others)[len(others) // 2] if others else 0.0
    worst = max(others, default=0.0)
    average = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{middle:.2f} cores by other processes in the middle run, {worst:.2f} in the worst; "
        f"{stolen:.2f} cores stolen by the hypervisor; load average at the end {average}"
    )


def _write_json(path: Path, results: dict[tuple[str, str], list[Run]]) -> None:
    rows = [
        {"scenario": scenario, "peer": peer, "runs": [vars(run) for run in runs]}
        for (scenario, peer), runs in results.items()
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 1 if Popdrop failed in anything, else 0."""
    parser = _parser()
    given = parser.parse_args(argv)
    keys = _chosen(given.peers, PEERS, parser)
    names = _chosen(given.scenarios, [scenario.key for scenario in SCENARIOS], parser)
    sizes = _sizes(given)
    if given.peers is None and not given.long:
        keys = [key for key in keys if key not in CLASSES or not CLASSES[key].slow]
    scenarios = [scenario for scenario in SCENARIOS if scenario.key in names]
    if any(scenario.after_open for scenario in scenarios) and "open" not in names:
        scenarios = [scenario for scenario in SCENARIOS if scenario.key in [*names, "open"]]
    # Ended by a signal, the servers must end too: SystemExit runs the stack below.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began, before = time.monotonic(), Machine.now()
    try:
        server_core, generator_core = cores()
        _say("spools and programs")
        bench = Bench(Generator(generator_core), sizes)
    except (Failed, tools.Missing) as problem:
        parser.error(str(problem))
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="popdrop-bench-", dir=given.folder))
        folder.chmod(0o755)
        if given.keep:
            _say(f"logs will stay in {folder}")
        else:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        campaign = Campaign(bench, folder, server_core)
        for key in keys:
            campaign.start(key, stack)
        for scenario in scenarios:
            campaign.measure(scenario)
        versions = list(dict.fromkeys(peer.version() for peer in campaign.peers))
    form = f"{'long' if given.long else 'short'}, medians of {sizes.runs}, {_minutes(began)}"
    if bench.large is not None:
        size = bench.large.stat().st_size / 1e6
        form += f"; the large spool has {bench.large_messages:,} messages, {size:,.0f} MB"
    text = report.document(
        report.table(scenarios, campaign.peers, campaign.results),
        versions,
        tools.machine(),
        _load_line(bench.generator.others, before, began),
        form,
        campaign.notes,
    )
    print(text)
    if given.output:
        given.output.write_text(text)
    if given.json:
        _write_json(given.json, campaign.results)
    return 1 if campaign.ours_failed else 0


def _minutes(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:.1f} minutes"


if __name__ == "__main__":
    raise SystemExit(main())
