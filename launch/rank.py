"""How a process that was a rank ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def leave_after(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end this process with its code, 1 after an exception; skips the destructors of process groups, which can hang
    when a peer is gone."""
    try:
        code = main()
    except SystemExit as end:  # --help, or an option that is none
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
