"""All that pytest-trio needs: from here on every trio run of the test process has a ring."""

import trio_uring

trio_uring.install(trio_uring.RingConfig(mode="require"))
