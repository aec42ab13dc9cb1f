"""Peak memory of this process: resident, anonymous, and on the GPU."""

from __future__ import annotations

import re
import resource
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class PeakMemory:
    """The peaks since it was made, also where other jobs of a sweep went before in this process.

    Anonymous memory is sampled in the background; the kernel and CUDA keep the other peaks, and begin afresh here.
    Resident memory counts the clean pages of mapped weight files too; anonymous memory is what cannot be given back.
    """

    def __init__(self, every: float = 0.2) -> None:
        self._anonymous = 0
        self._stopped = threading.Event()
        with suppress(OSError):  # not Linux: the resident peak is that of the process
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's word for it: proc(5)
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()
        threading.Thread(target=self._watch, args=(every,), daemon=True).start()

    def peaks(self) -> dict[str, int]:
        """MB by kind: `rss`, `anonymous` (on Linux); where CUDA was used, `gpu`, and with its holes `reserved`."""
        self._sample()
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in kB elsewhere
        peaks = {"rss": _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
        if self._anonymous:
            peaks["anonymous"] = self._anonymous
        if (cuda := _cuda()) is not None:
            peaks["gpu"] = cuda.max_memory_allocated() // 2**20
            peaks["reserved"] = cuda.max_memory_reserved() // 2**20
        return peaks

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()

    def _watch(self, every: float) -> None:
        while not self._stopped.wait(every):
            self._sample()

    def _sample(self) -> None:
        self._anonymous = max(self._anonymous, _status("RssAnon"))


def _status(name: str) -> int:
    """A line of /proc/self/status in MB; 0 where there is none."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:  # not Linux
        return 0
    return int(found[1]) // 2**10 if found else 0


def _cuda() -> Any:
    """torch.cuda, where torch is imported and has used it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
