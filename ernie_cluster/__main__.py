"""`python -m ernie_cluster` is `ernie-cluster`."""

import sys

from ernie_cluster.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
