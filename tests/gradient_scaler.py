"""fp16's loss scale on a CPU."""

import torch
from accelerate import Accelerator
from accelerate.optimizer import patch_optimizer_step


def scale_gradients(accelerator: Accelerator) -> None:
    """What accelerate sets up for fp16 on a GPU, with torch's own GradScaler; once its optimizers are prepared."""
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for optimizer in accelerator._optimizers:
        optimizer.scaler, optimizer._accelerate_step_called = scaler, False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)
    accelerator.unscale_gradients = lambda _=None: [scaler.unscale_(o.optimizer) for o in accelerator._optimizers]
