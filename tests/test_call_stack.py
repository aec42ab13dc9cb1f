"""Calls at any depth cost the same: no chunk of Python's stack is mapped and unmapped in a loop."""

import sys
from collections.abc import Callable

import pytest

from rlhf_recipes.call_stack import roomy

resource = pytest.importorskip("resource")

CALLS = 300
DEPTHS = range(250)  # frames of 100 bytes each and more: over a chunk of 16 KiB


def leaf(a: int) -> int:
    """Has a frame large enough to be the first of a new chunk at some of the depths."""
    b = c = d = e = f = g = h = i = j = k = a
    return a + b + c + d + e + f + g + h + i + j + k


def faults_at(depth: int) -> int:
    """Pages that the system had to give, while a loop at this depth made calls."""
    if depth:
        return faults_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for number in range(CALLS):
        leaf(number)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def worst(run: Callable[[Callable[[], int]], int]) -> int:
    """The most faults at any depth, of a second loop: the first maps what stays."""
    return max(min(run(lambda depth=depth: faults_at(depth)) for _ in range(2)) for depth in DEPTHS)


def test_a_loop_of_calls_takes_no_memory_at_any_depth() -> None:
    assert worst(lambda loop: roomy(loop)()) < CALLS // 10


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="mended in patch releases of 3.13 and 3.14")
@pytest.mark.skipif(sys.platform != "linux", reason="how memory is mapped and counted")
def test_without_room_some_depth_maps_a_chunk_for_each_call() -> None:
    assert worst(lambda loop: loop()) >= CALLS


def test_it_passes_arguments_results_and_errors() -> None:
    assert roomy(divmod)(7, 2) == (3, 1)
    assert roomy(leaf).__name__ == "leaf"
    with pytest.raises(ZeroDivisionError):
        roomy(divmod)(1, 0)
