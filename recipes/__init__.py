"""The stages, one short script each; run one as `python -m recipes.<stage> key=value ...` or by its make target."""

import sys

if sys.platform == "win32":
    sys.exit(
        "RLHF Recipes runs on Linux and macOS, and on Windows in WSL: https://learn.microsoft.com/windows/wsl/install"
    )
