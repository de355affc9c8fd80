"""`python -m sftmix COMMAND` and `torchrun -m sftmix COMMAND`, from any directory: the same as the command `sftmix`."""

import os
import sys


def _leave_out_working_directory() -> None:
    """Take the working directory off sys.path, where `python -m` puts it first, so that it is searched as by `sftmix`.

    It stays where it holds this package: a checkout that is not installed.
    """
    here, package = os.getcwd(), os.path.dirname(os.path.abspath(__file__))
    is_first = sys.path[:1] == [here] and not getattr(sys.flags, "safe_path", False)  # of Python 3.11 and later
    if is_first and not os.path.samefile(here, os.path.dirname(package)):
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()
    from sftmix.cli import main  # here, since it imports more

    sys.exit(main())
