"""`uidl=`: what it may say, which ids of another server are used on, and that none comes twice."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import ConfigError
from popdrop.stores.uidl import is_hash, text_of, unique_ids
from popdrop.stores.uidlform import Base, UidlForm, Unnamed, base_of

BASE = Base(1795355835, 5, b"X-IMAPbase: 1795355835 0000000005\n")
ALL = "x-uidl[1-70],x-uid,hash"
RFC_1939 = re.compile(rb"[\x21-\x7e]{1,70}")


def digest(number: int) -> bytes:
    return bytes([number]) * 16


def hashed(number: int) -> bytes:
    return text_of(digest(number))


def ids(
    form: str, *headers: bytes, base: Base | None = BASE, known: Sequence[bytes] = ()
) -> list[bytes]:
    """The ids of messages with these headers; their digests are `digest(0)` and so on."""
    messages = [
        Unnamed(header, lambda number=number: digest(number))  # type: ignore[misc]
        for number, header in enumerate(headers)
    ]
    return list(UidlForm(form).ids(known, messages, base))


class WordsTests(SynchronousTestCase):
    def test_canonical(self) -> None:
        """One spelling for all that means the same."""
        for spellings, wanted in (
            (("hash",), "hash"),
            (("x-uidl", "x-uidl,hash", "x-uidl[11-32]"), "x-uidl[11-32],hash"),
            (("x-uid", "x-uid[%08Xu%08Xv],hash"), "x-uid[%08Xu%08Xv],hash"),
            (("x-uid[%v.%u],x-uidl",), "x-uid[%v.%u],x-uidl[11-32],hash"),
            (("x-uid[%v,%u],x-uidl[1-70]",), "x-uid[%v,%u],x-uidl[1-70],hash"),
        ):
            for text in spellings:
                self.assertEqual(UidlForm(text).text, wanted)
                self.assertEqual(UidlForm(wanted).text, wanted)

    def test_refused(self) -> None:
        """In a sentence that names the option and what would do."""
        for text, remedy in (
            ("", "x-uidl,hash"),
            ("X-UIDL", "x-uidl,hash"),
            ("x-uidl;hash", "x-uidl,hash"),
            ("x-uidl,", "leave it out"),
            (",hash", "x-uidl,hash"),
            ("hash,x-uidl", "put it last"),
            ("x-uidl,x-uidl", "twice"),
            ("hash,hash", "twice"),
            ("hash[1]", "takes no"),
            ("x-uidl[]", "x-uidl[1-70]"),
            ("x-uidl[0-70]", "x-uidl[1-70]"),
            ("x-uidl[1-71]", "x-uidl[1-70]"),
            ("x-uidl[9-8]", "x-uidl[1-70]"),
            ("x-uid[]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%v]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%%u]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%u%f]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%u %v]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%8Xu]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%{uid}]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%u\xe4]", "x-uid[%08Xu%08Xv]"),
            ("x-uid[%071u]", "70 characters"),
            ("x-uid[%u" + "x" * 61 + "]", "70 characters"),
        ):
            error = self.assertRaises(ConfigError, UidlForm, text)
            self.assertIn(f"uidl={text}: ", str(error))
            self.assertIn(remedy, str(error))
        self.assertEqual(len(ids("x-uid[%u" + "x" * 60 + "]", b"X-UID: 1\n")[0]), 61)

    def test_what_is_read(self) -> None:
        for text, headers, base in (
            ("hash", False, False),
            ("x-uidl", True, False),
            ("x-uid", True, True),
            ("x-uidl,x-uid", True, True),
        ):
            form = UidlForm(text)
            self.assertEqual((form.reads_headers, form.wants_base), (headers, base))


class XUidlTests(SynchronousTestCase):
    def test_found_anywhere_in_the_header(self) -> None:
        uid = b"&<W\"!3$+!!WE'!!>~@!!"
        for header in (
            b"X-UIDL: %s\nSubject: 1\n",
            b"Subject: 1\nx-uidl:%s",
            b"Subject: 1\r\nX-Uidl: \t%s \r\nA: b\r\n",
            b"X-UIDL: \nX-UIDL: too short\nX-UIDL: %s\nX-UIDL: anotherofthem\n",
        ):
            self.assertEqual(ids("x-uidl", header % uid), [uid])

    def test_not_found(self) -> None:
        for header in (
            b"",
            b"\tX-UIDL: abcdefghijklm\n",
            b"A: b\n X-UIDL: abcdefghijklm\n",
            b"AX-UIDL: abcdefghijklm\n",
            b"X-UIDL : abcdefghijklm\n",
            b"X-UIDL: abcdef\n ghijklm\n",
            b"X-UIDL: abcdef ghijklm\n",
            b"X-UIDL: abcdef\x7fghijklm\n",
            b"X-UIDL: abcdef\xe4ghijklm\n",
            b"X-UIDL: abcdef\0ghijklm\n",
        ):
            self.assertEqual(ids("x-uidl", header), [hashed(0)], header)

    def test_lengths(self) -> None:
        """qpopper's, or those that are said."""
        for form, taken in (
            ("x-uidl", range(11, 33)),
            ("x-uidl[1-70]", range(1, 71)),
            ("x-uidl[7-7]", range(7, 8)),
        ):
            for length in range(80):
                uid = b"A" * length
                self.assertEqual(
                    ids(form, b"X-UIDL: %s\n" % uid), [uid if length in taken else hashed(0)]
                )

    def test_never_in_the_form_of_a_hash(self) -> None:
        """Else a message could claim the id of another one, that comes later."""
        for uid in (hashed(7), hashed(7) + b"-2"):
            self.assertEqual(ids("x-uidl", b"X-UIDL: %s\n" % uid), [hashed(0)])
        for uid in (hashed(7).upper(), hashed(7)[:-1], hashed(7) + b"-0"):
            self.assertEqual(ids("x-uidl", b"X-UIDL: %s\n" % uid), [uid])


class XUidTests(SynchronousTestCase):
    def test_templates(self) -> None:
        """UW's and Dovecot's digits are lower-case, though Dovecot's template says `X`."""
        for form, wanted in (
            ("x-uid[%08Xv%08Xu]", b"6b02f4bb0000000a"),
            ("x-uid", b"0000000a6b02f4bb"),
            ("x-uid[%v.%u]", b"1795355835.10"),
            ("x-uid[UID%u-%v]", b"UID10-1795355835"),
            ("x-uid[%Xu.%03u.%%]", b"a.010.%"),
            ("x-uid[%02v-%u]", b"1795355835-10"),
        ):
            base = Base(1795355835, 10, b"")
            self.assertEqual(ids(form, b"X-UID: 10       \r\n", base=base), [wanted])

    def test_what_is_no_uid(self) -> None:
        for header in (
            b"",
            b"X-UID: \n",
            b"X-UID: 0\n",
            b"X-UID: -1\n",
            b"X-UID: 1a\n",
            b"X-UID: 1 2\n",
            b"X-UID: 6\n",
            b"X-UID: 99999999999\n",
            b"X-UID: \xb2\n",
            b"X-UIDL: 1\n",
        ):
            self.assertEqual(ids("x-uid", header), [hashed(0)], header)
        self.assertEqual(ids("x-uid", b"X-UID: 1\n", base=None), [hashed(0)])

    def test_ascending_only(self) -> None:
        """As servers give them out: another one was in the mail when it came."""
        headers = [b"X-UID: %d\n" % uid for uid in (2, 1, 2, 99, 4, 3, 5)]
        self.assertEqual(
            ids("x-uid[%u]", *headers),
            [b"2", hashed(1), hashed(2), hashed(3), b"4", hashed(5), b"5"],
        )

    def test_first_word_first(self) -> None:
        both = b"X-UIDL: abcdefghijklm\nX-UID: 3\n"
        self.assertEqual(ids("x-uid[%u],x-uidl", both), [b"3"])
        self.assertEqual(ids("x-uidl,x-uid[%u]", both), [b"abcdefghijklm"])
        self.assertEqual(
            ids("x-uidl,x-uid[%u]", both, b"X-UID: 3\n"), [b"abcdefghijklm", hashed(1)]
        )
        self.assertEqual(ids("x-uid[%u],x-uidl", both, both), [b"3", b"abcdefghijklm"])

    def test_base(self) -> None:
        for header, wanted in (
            (b"X-IMAPbase: 12 0000000034\n", (12, 34, b"X-IMAPbase: 12 0000000034\n")),
            (b"A: b\nx-imap: 12 34\n", (12, 34, b"X-IMAPbase: 12 34\n")),
            (b"X-IMAP: 12 34 a\n  b\nC: d\n", (12, 34, b"X-IMAPbase: 12 34 a\n  b\n")),
            (b"X-IMAPbase: 12 34\r\nA: b\r\n", (12, 34, b"X-IMAPbase: 12 34\r\n")),
            (b"X-IMAPbase: 1\nX-IMAPbase: 12 34", (12, 34, b"X-IMAPbase: 12 34\n")),
            (b"X-IMAPbase: 4294967295 0\n", (4294967295, 0, b"X-IMAPbase: 4294967295 0\n")),
            (b"", None),
            (b"X-IMAPbase: 0 1\n", None),
            (b"X-IMAPbase: 4294967296 1\n", None),
            (b"X-IMAPbase: 1 4294967296\n", None),
            (b"X-IMAPbase: 12\n", None),
            (b"X-IMAPbase: 12 34x\n", None),
            (b"X-IMAPbase: -12 34\n", None),
            (b"A: b\n X-IMAPbase: 12 34\n", None),
        ):
            self.assertEqual(base_of(header), wanted, header)


headers = st.one_of(
    st.builds(b"X-UIDL: %s\n".__mod__, st.sampled_from([b"abcdefghijk", b"A" * 70, b"b", b""])),
    st.builds(b"X-UID: %d\n".__mod__, st.integers(0, 7)),
    st.builds(b"X-UIDL: %s\n".__mod__, st.integers(0, 3).map(hashed)),
    st.binary(max_size=30),
    st.just(b"X-UIDL: 0000000a6b02f4bb\nX-UID: 10\n"),
)
mails = st.lists(st.tuples(headers, st.integers(0, 3)))


class UniqueTests(SynchronousTestCase):
    """`ids`: whatever the headers say."""

    def run_form(
        self, known: Sequence[bytes], mails: list[tuple[bytes, int]], base: Base | None
    ) -> list[bytes]:
        messages = [
            Unnamed(header, lambda number=number: digest(number))  # type: ignore[misc]
            for header, number in mails
        ]
        return list(UidlForm(ALL).ids(known, messages, base))

    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(mails, mails, st.sampled_from([None, BASE, Base(1, 20, b"")]))
    def test_none_twice(
        self, old: list[tuple[bytes, int]], new: list[tuple[bytes, int]], base: Base | None
    ) -> None:
        """And each of RFC 1939's form; also where mail was appended to what has ids already."""
        known = self.run_form((), old, base)
        all_of_them = known + self.run_form(known, new, None)
        self.assertEqual(len(all_of_them), len(old) + len(new))
        self.assertEqual(len(set(all_of_them)), len(all_of_them))
        for uid in all_of_them:
            self.assertTrue(RFC_1939.fullmatch(uid))
        for (_, number), uid in zip(old + new, all_of_them, strict=True):
            if is_hash(uid):
                self.assertEqual(uid[:26], hashed(number))

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.integers(0, 100))
    def test_hashes_go_on(self, old: list[int], new: list[int], gone: int) -> None:
        """As if all had come at once; where a copy went, its number may be given again."""
        known = list(unique_ids(map(digest, old)))
        form = UidlForm()
        mails = [Unnamed(b"", lambda number=number: digest(number)) for number in new]  # type: ignore[misc]
        self.assertEqual(
            known + list(form.ids(known, mails)), list(unique_ids(map(digest, old + new)))
        )
        left = known[: gone % (len(known) + 1)] + known[gone % (len(known) + 1) + 1 :]
        again = left + list(form.ids(left, mails))
        self.assertEqual(len(set(again)), len(again))

    def test_second_of_two_gets_its_hash(self) -> None:
        header = b"X-UIDL: abcdefghijklm\n"
        self.assertEqual(
            ids("x-uidl", header, header, header), [b"abcdefghijklm", hashed(1), hashed(2)]
        )
        self.assertEqual(ids("x-uidl", header, known=[b"abcdefghijklm"]), [hashed(0)])

    def test_only_what_is_needed_is_hashed(self) -> None:
        def never() -> bytes:
            self.fail("hashed")

        form = UidlForm("x-uidl")
        messages = [Unnamed(b"X-UIDL: abcdefghijk%d\n" % i, never) for i in range(3)]
        self.assertEqual(len(list(form.ids((), messages))), 3)

    def test_many_copies(self) -> None:
        """In time that is in proportion: each number is tried once."""

        found = list(unique_ids([digest(1)] * 20_000))
        again = list(UidlForm().ids(found, [Unnamed(b"", lambda: digest(1))] * 20_000))
        self.assertEqual(again[-1], hashed(1) + b"-40000")
