"""Short forms of the campaigns on a real server: `python -m tests.crash.server --long` is more."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.crash.points import Row
from tests.crash.server import SAMPLE, campaign


class CampaignTests(SynchronousTestCase):
    def hold(self, name: str) -> list[Row]:
        rows = campaign(name, SAMPLE[name])
        wrong = [f"{row.scene}: {each}" for row in rows for each in row.violations]
        self.assertEqual(wrong, [], "\n".join(wrong))
        return rows

    def outcomes(self, rows: list[Row]) -> set[str]:
        return {outcome for row in rows for outcome in row.outcomes}

    def test_kill(self) -> None:
        rows = self.hold("kill")
        self.assertEqual(self.outcomes(rows), {"before", "after"})

    def test_kill_again(self) -> None:
        """The first kill came behind the commit: nothing of it is ever undone."""
        rows = self.hold("again")
        self.assertEqual(self.outcomes(rows), {"after"})

    def test_errors(self) -> None:
        rows = self.hold("errors")
        answered = {"+OK after", "-ERR before", "-ERR after", "+OK unchanged", "-ERR unchanged"}
        self.assertEqual(self.outcomes(rows), answered)
