"""What samples the rollouts where `generate` does not: continuous batching and vLLM, without a change to any weight.

TRL casts the whole model to bf16 for the one, and merges the adapter into the base for the other. Adapters have to stay
float32 here, and the base, which four roles share, as it is to the last bit.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from rlhf_recipes.roles import POLICY

TOKENS_PER_STEP = 1024
"""Of a step of continuous batching, prompts included: transformers' 8192 make attention masks of gigabytes."""


@torch.no_grad()
def continuous_batching(
    model: PeftModel,
    prompt_ids: list[list[int]],
    generation_config: GenerationConfig,
    config: ContinuousBatchingConfig,
    rows: int,
) -> list[list[int]]:
    """Completions of prompts by transformers' continuous batching, `rows` sequences at a time, in the prompts' order.

    The paged cache has room for just these sequences; `config` may set its limits otherwise.

    Raises:
        MemoryError, torch.OutOfMemoryError: the cache, or a step, does not fit.
    """
    config = copy.copy(config)
    longest = max(map(len, prompt_ids)) + generation_config.max_new_tokens
    limits = {
        "max_requests_per_batch": rows,
        "max_batch_tokens": max(rows, TOKENS_PER_STEP),
        "num_blocks": rows * -(-longest // config.page_size),
    }
    for name, limit in limits.items():
        if getattr(config, name) is None:
            setattr(config, name, limit)
    was_training = model.training
    manager = model.get_base_model().init_continuous_batching(generation_config, config)
    done: dict[str, Any] = {}
    try:
        manager.warmup()
        # all before the start, unlike `generate_batch`: who shares a step with whom does not depend on timing, so the
        # same random state draws the same completions
        requests = manager.add_requests(prompt_ids, max_new_tokens=generation_config.max_new_tokens)
        manager.start()
        while len(done) < len(requests) and (manager.is_running() or not manager.output_router.output_queue.empty()):
            if output := manager.get_result(timeout=1):
                done[output.request_id] = output
    finally:
        manager.stop(hard_stop=len(done) < len(prompt_ids))  # whoever is interrupted does not wait for the batch
        manager.destroy()
        model.train(was_training)
    failure = manager.background_thread_status.fatal_error
    errors = [output.error for output in done.values() if output.error]
    if failure or errors or len(done) < len(requests):
        raise failure or RuntimeError(f"continuous batching failed: {(errors or ['it ended early'])[0]}")
    return [done[request].generated_tokens for request in requests]


@torch.no_grad()
def merged_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters with the policy's adapter merged in, one by one under the base's own names: vLLM's weights.

    PEFT merges each layer, whose weights are put back from a copy: merging and unmerging, as TRL does it, would round
    the base a little further with every rollout batch.
    """
    tuned = {
        id(parameter): layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for parameter in layer.get_base_layer().parameters()
    }
    for name, parameter in model.get_base_model().named_parameters():
        if model.prefix in name:  # of an adapter
            continue
        layer = tuned.get(id(parameter))
        if layer is None:
            yield name, parameter.data
            continue
        before = [(p, p.data.clone()) for p in layer.get_base_layer().parameters()]
        layer.merge(adapter_names=[POLICY])
        merged = parameter.data.clone()
        layer.unmerge()
        for changed, data in before:
            changed.data.copy_(data)
        yield name.replace(".base_layer", ""), merged
