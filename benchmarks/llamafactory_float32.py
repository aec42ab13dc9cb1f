"""LLaMA-Factory's launcher, in float32 throughout; run in that rival's environment.

    <environment>/bin/python benchmarks/llamafactory_float32.py arguments.json

Its PPO scores and trains under `torch.autocast`, whatever precision it is asked for, and on a CPU that is bf16. With
float32 for autocast's type, torch switches autocast off, with a warning.
"""

import torch
from llamafactory.train.tuner import run_exp

if __name__ == "__main__":
    torch.set_autocast_dtype("cpu", torch.float32)
    run_exp()
