"""`jisu` and `python -m jisu`."""

from __future__ import annotations

import os
import sys

# Libraries may ask their servers for news; nothing here ever needs the network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # TVM's runtime would import torch, for seconds, to take its tensors faster; a saved program meets none.
    "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
}


def main() -> None:
    """Run the command line on `sys.argv` and leave with its exit code.

    0: done. 1: an error that jisu raises on purpose, or the system's refusal of a file. 2: wrong usage. 3: an internal
    error. 130: interrupted.
    """
    os.environ.update(ENVIRONMENT)
    try:
        from jisu.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before or after a command, which handle it themselves
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
