"""How hypothesis tries properties: the same examples in each run, however slow the machine is.

A property that fails for one example in a million would otherwise fail somebody's run, some day,
for nothing that he has changed. `POPDROP_TEST_RANDOM=1` tries others in each run, to look for such
an example; it then stands as `@example` in the test.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "popdrop",
    deadline=None,
    derandomize="POPDROP_TEST_RANDOM" not in os.environ,
    database=None,
    # The time that examples take to make says more about the machine than about the test.
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("popdrop")
