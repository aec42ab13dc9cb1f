"""Peak memory of a stage, also where another one went before it in the same process."""

import gc
import sys

import numpy as np
import pytest

from rlhf_recipes.runs.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel keeps one peak for the whole process")
def test_the_peak_of_a_job_is_its_own_and_not_that_of_a_larger_job_before_it():
    first = PeakMemory()
    taken = np.ones(400 * 2**17)  # 400 MB
    large = first.peaks()
    first.stop()
    del taken
    gc.collect()
    second = PeakMemory()
    small = second.peaks()
    second.stop()
    assert large.keys() == small.keys() == {"rss", "anonymous"}
    assert all(large[kind] - small[kind] > 300 for kind in large)


def test_the_gpus_peaks_begin_afresh_too(monkeypatch):
    class Cuda:
        peak = 9 * 2**20

        def is_initialized(self):
            return True

        def reset_peak_memory_stats(self):
            self.peak = 2**20

        def max_memory_allocated(self):
            return self.peak

        max_memory_reserved = max_memory_allocated

    import torch

    monkeypatch.setattr(torch, "cuda", Cuda())
    watched = PeakMemory()
    watched.stop()
    assert watched.peaks()["gpu"] == 1
