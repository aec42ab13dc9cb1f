"""Peak memory of this process: resident, anonymous, and on the GPU."""

from __future__ import annotations

import re
import resource
import sys
import threading
from pathlib import Path


class PeakMemory:
    """Samples anonymous memory in the background; the kernel and CUDA keep the other two peaks themselves.

    Resident memory counts the clean pages of mapped weight files too; anonymous memory is what cannot be given back.
    """

    def __init__(self, every: float = 0.2) -> None:
        self._anonymous = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(every,), daemon=True).start()

    def peaks(self) -> dict[str, int]:
        """MB by kind: `rss`, `anonymous` (on Linux); where CUDA was used, `gpu`, and with its holes `reserved`."""
        self._sample()
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in kB elsewhere
        peaks = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
        if self._anonymous:
            peaks["anonymous"] = self._anonymous
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            peaks["gpu"] = torch.cuda.max_memory_allocated() // 2**20
            peaks["reserved"] = torch.cuda.max_memory_reserved() // 2**20
        return peaks

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()

    def _watch(self, every: float) -> None:
        while not self._stopped.wait(every):
            self._sample()

    def _sample(self) -> None:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:  # not Linux
            return
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            self._anonymous = max(self._anonymous, int(found[1]) // 2**10)
