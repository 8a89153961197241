"""Postfix, Exim, procmail, maildrop and dotlockfile deliver while sessions delete.

Each mail is at the end deleted once or in the spool once, undamaged, also when the server is
killed in QUIT. `mtas` says how, and has the long form.
"""

from __future__ import annotations

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.end_to_end import mtas


class CampaignTests(SynchronousTestCase):
    def deliver(self, name: str) -> None:
        """The server is killed twice."""
        try:
            campaign = mtas.Campaign(self, mtas.DELIVERERS[name])
        except mtas.Missing as missing:
            raise SkipTest(str(missing)) from None
        campaign.run(mails=20, kills=2)
        self.assertEqual(campaign.violations, [], campaign.summary())
        self.assertGreaterEqual(campaign.counts["delivered"], 20)
        self.assertGreater(campaign.counts["deleted"], 0)

    def test_postfix(self) -> None:
        self.deliver("postfix")

    def test_exim(self) -> None:
        self.deliver("exim")

    def test_procmail(self) -> None:
        self.deliver("procmail")

    def test_maildrop(self) -> None:
        self.deliver("maildrop")

    def test_dotlockfile(self) -> None:
        self.deliver("dotlockfile")


class AccountTests(SynchronousTestCase):
    """What the campaigns would say if something were wrong."""

    def spool(self, *numbers: int) -> bytes:
        lines = [mtas.with_from_line(number).split(b"\n", 1) for number in numbers]
        return b"".join(
            first + b"\n" + rest.replace(b"\nFrom here", b"\n>From here") + b"\n"
            for first, rest in lines
        )

    def test_spool(self) -> None:
        numbers = [1, 10, 3, 3]
        self.assertEqual(mtas.in_spool(self.spool(*numbers)), [*map(mtas.text, numbers)])
        self.assertEqual(mtas.in_spool(b""), [])
        self.assertRaises(ValueError, mtas.in_spool, self.spool(1)[1:])

    def test_damage(self) -> None:
        good = mtas.text(10)
        traced = b"Received: by mta.example.org; Sun, 22 Nov 2026 10:00:00 +0000\n" + good
        self.assertEqual(mtas.damage(good), "")
        self.assertEqual(mtas.damage(traced), "")
        for wrong, said in (
            (good[:-1], "body"),
            (good + b"\n", "body"),
            (good.replace(b"word", b"work", 1), "body"),
            (good + mtas.text(11), "body"),
            (good.replace(b"Subject: mail 10\n", b""), "header"),
            (good.replace(b"Subject: mail 10\n", b"Subject: mail 10\n" * 2), "header"),
            (good.partition(b"\n\n")[2], "not one of our mails"),
        ):
            self.assertIn(said, mtas.damage(wrong))
