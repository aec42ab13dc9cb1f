"""How torch keeps the memory of a GPU that it was given: in segments that grow.

Caches that grow token by token and batches of all lengths leave holes in segments of a fixed size, and holes are taken
too: QLoRA on an 8B model took 16.4 GiB, in segments that grow 10.8, at the same speed (torchtune, issue 1185).
"""

import os
import platform

from rlhf_recipes.machine import on_wsl

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = "expandable_segments:True"


def grow_segments() -> None:
    """Have segments grow, unless the environment says how torch is to allocate. To be called before the GPU is used.

    Not on WSL, where the first allocation may fail (pytorch/pytorch issue 192330), and Linux alone has them.
    """
    if platform.system() == "Linux" and not on_wsl() and not any(name in os.environ for name in VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = GROWING
