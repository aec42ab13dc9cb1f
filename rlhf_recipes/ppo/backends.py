"""What samples the rollouts in place of plain `generate`, without a change to any weight.

TRL casts the whole model to bf16 for continuous batching. Adapters have to stay float32 here, and the base, which four
roles share, as it is to the last bit.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

TOKENS_PER_STEP = 1024
"""Of a step of continuous batching, prompts included: transformers' 8192 make attention masks of gigabytes."""


class DecodingStep:
    """What `generate` calls for each next token, as one CUDA graph instead of thousands of kernel launches.

    A graph replays on the same memory, so the cache has to be static. Prompts are read as usual, and so is the first
    token of a batch; the step of the second is captured, and replayed for all from then on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Any = None
        self.inputs: dict[str, Any] = {}
        self.replay: Callable[[], None] | None = None
        self.outputs: Any = None

    def __call__(self, *, cache: Any, **inputs: Any) -> Any:
        """Outputs of the model, valid until the next call."""
        if inputs["input_ids"].size(1) > 1 or cache is not self.cache:
            self.cache, self.replay = (cache if inputs["input_ids"].size(1) == 1 else None), None
            return self.model(cache=cache, **inputs)
        if self.replay is None:
            self.inputs = tree_map_only(Tensor, torch.clone, inputs)
            self.replay, self.outputs = capture(lambda: self.model(cache=cache, **self.inputs))
        for kept, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(given, Tensor):
                kept.copy_(given)
        self.replay()
        return self.outputs


def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a function, as a function that runs it, and the result, which each run writes anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


@contextmanager
def cuda_graphs(model: PeftModel, generation_config: GenerationConfig) -> Iterator[None]:
    """Inside, `generate` keeps a static cache, and decodes by a CUDA graph where it would call a compiled model."""
    base = model.get_base_model()
    step = DecodingStep(base)
    base.get_compiled_call = lambda compile_config: step
    base._valid_auto_compile_criteria = lambda *_: True
    before = generation_config.cache_implementation
    generation_config.cache_implementation = "static"
    try:
        yield
    finally:
        generation_config.cache_implementation = before
        del base.get_compiled_call, base._valid_auto_compile_criteria


@torch.no_grad()
def continuous_batching(
    model: PeftModel,
    prompt_ids: list[list[int]],
    generation_config: GenerationConfig,
    config: ContinuousBatchingConfig,
    rows: int,
) -> list[GenerationOutput]:
    """Answers to prompts by transformers' continuous batching, `rows` sequences at a time, in the prompts' order.

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
    return [done[request] for request in requests]
