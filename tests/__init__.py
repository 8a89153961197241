"""Tests of Popdrop, for trial."""

import sys

# Not in servers and helpers that take a backend or a client from here: it takes its time.
if "twisted.trial" in sys.modules:
    from tests import properties as properties
