"""`python -m sftmix COMMAND` and `torchrun -m sftmix COMMAND`, from any directory: the same as the command `sftmix`."""

import contextlib
import os
import sys

if __name__ == "__main__":
    # `python -m` puts the working directory first on sys.path. Off it, it is searched as by `sftmix`; it stays where it
    # holds this package: a checkout that is not installed.
    with contextlib.suppress(FileNotFoundError):  # the working directory was removed, which the command says
        here, package = os.getcwd(), os.path.dirname(os.path.abspath(__file__))
        is_first = sys.path[:1] == [here] and not sys.flags.safe_path
        if is_first and not os.path.samefile(here, os.path.dirname(package)):
            del sys.path[0]
    from sftmix.cli import main  # here, since it imports more

    sys.exit(main())
