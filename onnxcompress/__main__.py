"""``python -m onnxcompress``: the command line where no script is on the path."""

import sys

from onnxcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
