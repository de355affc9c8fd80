"""`python -m sftmix COMMAND` and `torchrun -m sftmix COMMAND`, from any directory: the same as the command `sftmix`."""

import sys

from sftmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
