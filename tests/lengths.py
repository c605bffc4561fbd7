"""How long drawn tests draw: a few examples, the same each time, or new ones for FUZZ_SECONDS each (`make test-fuzz`)."""

import inspect
import os
import time

from hypothesis import HealthCheck, settings

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
BATCH = 10  # examples between two looks at the clock


def options(examples: int, **more) -> settings:
    """hypothesis' settings of one call of a test: at length, of a batch."""
    return settings(
        max_examples=BATCH if SECONDS else examples,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        **more,
    )


def for_long(test, *arguments, **named):
    """Call a test once, or until FUZZ_SECONDS have passed: hypothesis counts examples and no time. Each call draws anew."""
    end = time.monotonic() + SECONDS
    test(*arguments, **named)
    while time.monotonic() < end:
        test(*arguments, **named)


def drawn(examples: int):
    """Decorator of a test that @given fills: so many examples, or what fits into FUZZ_SECONDS.

    What fails is shown with `@reproduce_failure`, which gives the example again.
    """

    def decorate(test):
        test = options(examples)(test)
        if not SECONDS:
            return test

        def repeated(*arguments, **named):
            for_long(test, *arguments, **named)

        repeated.__name__, repeated.__doc__, repeated.__module__ = test.__name__, test.__doc__, test.__module__
        repeated.__signature__ = inspect.signature(test)  # what pytest gives: without what is drawn
        return repeated

    return decorate
