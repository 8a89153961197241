"""The Markdown table: both absolute figures, their ratio, the targets, and what else was known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import median

from benchmarks.bench import Figure
from benchmarks.generator import Run
from benchmarks.peers import Peer
from benchmarks.scenarios import Scenario

BASE = "dovecot-tuned"
OURS = "popdrop"
BOUND = 0.9
"""A generator that uses more of its core than this was the bottleneck."""

Results = Mapping[tuple[str, str], Sequence[Run]]
"""Runs by scenario key and peer key."""


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _cell(figure: Figure, runs: Sequence[Run]) -> tuple[float | None, str]:
    if not runs:
        return None, "-"
    values = [figure.value(run) for run in runs]
    middle = median(values)
    if isnan(middle):  # not measured with this server
        return None, "-"
    text = _number(middle, figure.digits)
    if figure.may_bind and median(run.generator for run in runs) > BOUND:
        text += "*"
    return middle, text


def _target(figure: Figure, ours: float | None, ratio: float | None) -> tuple[str, str, str]:
    if figure.limit is not None:
        text = f"at most {figure.limit:g}"
        return "-", text, "-" if ours is None else _verdict("limit", ours <= figure.limit)
    texts = ["-" if x is None else f"{x:.2f}" for x in (figure.release, figure.goal)]
    wanted = figure.release if figure.release is not None else figure.goal
    if ratio is None or wanted is None:
        return texts[0], texts[1], "-"
    met = ratio <= wanted if figure.less_is_better else ratio >= wanted
    word = "release" if figure.release is not None else "goal"
    return texts[0], texts[1], _verdict(word, met)


def _verdict(word: str, met: bool) -> str:
    return f"{word} {'met' if met else 'missed'}"


def table(scenarios: Sequence[Scenario], peers: Sequence[Peer], results: Results) -> str:
    """The rows of all figures. A ratio is Popdrop's figure divided by Dovecot tuned's."""
    heads = ["Work", *(peer.title for peer in peers), "Ratio", "Release", "Goal", "Verdict"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 2) + "---|"]
    for scenario in scenarios:
        for figure in scenario.figures:
            found = {p.key: _cell(figure, results.get((scenario.key, p.key), ())) for p in peers}
            ours = found.get(OURS, (None, ""))[0]
            base = found.get(BASE, (None, ""))[0]
            if figure.base is not None and base is not None:
                base = median(map(figure.base, results[scenario.key, BASE]))
            ratio = ours / base if ours is not None and base else None
            cells = [found[peer.key][1] for peer in peers]
            shown = "-" if ratio is None else f"{ratio:.2f}"
            sign = "less" if figure.less_is_better else "more"
            row = [f"{figure.title} ({sign})", *cells, shown, *_target(figure, ours, ratio)]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def document(
    body: str,
    versions: Sequence[str],
    machine: str,
    load: str,
    form: str,
    notes: Sequence[str],
) -> str:
    """The whole report."""
    lines = [
        "# POP3 servers side by side",
        "",
        f"- Machine: {machine}",
        f"- Other load: {load}",
        f"- Servers: {'; '.join(versions)}",
        f"- Form: {form}",
        "",
        body,
        "",
        "`less`, `more`: which is better. Ratio: Popdrop's figure divided by Dovecot tuned's; the",
        "targets are the same ratio, or `at most` so much for Popdrop's own figure. `*`: the",
        "generator used over 90 % of its core, so the server may be faster than the figure.",
        "Canned C is no mail server: it shows where generator and kernel end. QUIT is timed, its",
        "safety is not tested: the row does not say if a server killed in the middle loses mail,",
        "and leaving out what prevents that makes it quicker.",
    ]
    if notes:
        lines += ["", "Notes:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
