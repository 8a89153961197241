"""Sphinx directives `popdrop-...`: the tables of `popdrop_tables`, made at each build."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import popdrop_tables
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def _directive(name: str, lines: Callable[[], Iterator[str]]) -> type[SphinxDirective]:
    class Generated(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # the program may have changed, the page has not
            holder = nodes.Element()
            self.state.nested_parse(StringList(list(lines()), source=f"<{name}>"), 0, holder)
            return holder.children

    return Generated


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    for name, lines in popdrop_tables.DIRECTIVES.items():
        app.add_directive(name, _directive(name, lines))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
