"""What the user can put right, in one line. Apart from _common, for tools that run without mmengine."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def fail(error: BaseException) -> NoReturn:
    """End with the error in one line on stderr and exit status 1, or raise it where a traceback is asked for."""
    if os.environ.get('SK_PLUGINS_TRACEBACK'):
        raise error
    print(f'{Path(sys.argv[0]).name}: error: {" ".join(str(error).split())}', file=sys.stderr)
    print('(set SK_PLUGINS_TRACEBACK=1 for the traceback)', file=sys.stderr)
    raise SystemExit(1) from None


def run(
    main: Callable[[], object], *errors: type[BaseException], fail: Callable[[BaseException], NoReturn] = fail
) -> None:
    """Call a tool's main; ``errors`` are its user's, and ``fail`` says them."""
    try:
        main()
    except errors as error:
        fail(error)
