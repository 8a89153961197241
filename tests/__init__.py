"""Tests of Popdrop, for trial."""

import os
import sys

# Not in servers and helpers that take a backend or a client from here: it takes its time.
if "twisted.trial" in sys.modules:
    from tests import properties as properties

    # What other users are to reach is made with the usual modes, whoever runs the tests.
    os.umask(0o022)
