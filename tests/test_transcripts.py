"""Dialogues in `transcripts/`: for every one and every way to cut its octets, the same output."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.doubles import Server

FOLDER = Path(__file__).parent / "transcripts"


def messages() -> list[bytes]:
    return [
        b"Subject: one\n\n.\n..\nlast",
        b"Subject: two\r\n\r\nx\r\n\n",
        b"Subject: three\nX: y\n\nfirst\nsecond\nthird\n",
    ]


class Transcript:
    """What is sent and what is expected, in octets."""

    def __init__(self, path: Path) -> None:
        self.sent = b""
        self.expected = b""
        self.closes = False
        for row in path.read_text("ascii").splitlines():
            kind, _, words = row.partition(" ")
            if kind == "C:":
                self.sent += words.encode() + b"\r\n"
            elif kind == "C\\":
                self.sent += words.encode().decode("unicode_escape").encode("latin-1")
            elif kind == "S:":
                self.expected += words.encode() + b"\r\n"
            elif row == "CLOSED":
                self.closes = True
            else:
                raise ValueError(f"{path.name}: {row!r}")


def replay(pieces: list[bytes], hot: bool = True) -> tuple[bytes, bool, list[bytes]]:
    """Output with the challenge masked, whether the server closes, and what is left."""
    server = Server(messages())
    server.store.hot = hot
    server.store.block = 7
    protocol, transport = server.connect()
    for piece in pieces:
        protocol.dataReceived(piece)
    output = re.sub(rb"<[0-9a-f]{32}\.\d+@mail\.example\.org>", b"<CHALLENGE>", transport.value())
    return output, transport.disconnecting, server.store.messages


class TranscriptTests(SynchronousTestCase):
    transcripts = sorted(FOLDER.glob("*.txt"))

    def test_there_are_some(self) -> None:
        self.assertGreaterEqual(len(self.transcripts), 2)

    def test_as_written(self) -> None:
        for path in self.transcripts:
            transcript = Transcript(path)
            output, closes, _ = replay([transcript.sent])
            self.assertEqual(output.decode(), transcript.expected.decode(), path.name)
            self.assertEqual(closes, transcript.closes)

    def test_every_single_cut(self) -> None:
        for path in self.transcripts:
            transcript = Transcript(path)
            once = replay([transcript.sent])
            for place in range(1, len(transcript.sent)):
                pieces = [transcript.sent[:place], transcript.sent[place:]]
                self.assertEqual(replay(pieces), once, (path.name, place))

    def test_octet_by_octet_and_cold(self) -> None:
        for path in self.transcripts:
            sent = Transcript(path).sent
            pieces = [sent[i : i + 1] for i in range(len(sent))]
            for hot in (True, False):
                self.assertEqual(replay(pieces, hot), replay([sent]))

    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_any_cuts(self, data: st.DataObject) -> None:
        transcript = Transcript(data.draw(st.sampled_from(self.transcripts)))
        points = data.draw(st.sets(st.integers(1, len(transcript.sent) - 1), max_size=40))
        places = [0, *sorted(points), len(transcript.sent)]
        pieces = [transcript.sent[a:b] for a, b in itertools.pairwise(places)]
        hot = data.draw(st.booleans())
        self.assertEqual(replay(pieces, hot), replay([transcript.sent]))

    def test_deletions(self) -> None:
        """QUIT with its line end deletes, and only what was marked."""
        sent = Transcript(FOLDER / "session.txt").sent
        _, _, left = replay([sent])
        self.assertEqual(left, [messages()[0], messages()[2]])
        _, _, left = replay([sent[: sent.index(b"QUIT\r\n") + 5]])
        self.assertEqual(left, messages())
