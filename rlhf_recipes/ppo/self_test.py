"""What a PPO run stands on, tried on a few rows before the first rollout: what fails here would go wrong in silence.

sampler   log-probabilities that tokens were sampled with, against those that they are scored with (nats a token)
ratio     distance from 1 of the ratio between the training pass and the scoring pass
kl        of the policy to its reference (nats a token); 0, as long as the policy has taken no step
trunk     output of the model over the shared trunk, against that of a whole pass (a fraction)
reward    scores on the shared base, against those of the reward adapter as PEFT loads it (standard deviations)
base      share of the base's tensors that changed when the roles were added
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from rlhf_recipes import machine
from rlhf_recipes.backoff import in_chunks
from rlhf_recipes.errors import UserError
from rlhf_recipes.evaluation.sampling import generating_by
from rlhf_recipes.ppo.backends import continuous_batching, cuda_graphs
from rlhf_recipes.roles import (
    HEAD_FILE,
    HEAD_KEY,
    POLICY,
    REWARD,
    Episodes,
    Roles,
    last_real_token,
    on_a_causal_model,
    read_adapter_config,
)

if TYPE_CHECKING:
    from rlhf_recipes.ppo.rollout import Rollout
    from rlhf_recipes.ppo.trainer import PPOTrainer

logger = logging.getLogger(__name__)

ROWS, PROMPT_TOKENS, NEW_TOKENS = 4, 64, 16
ALONE = "alone"
"""Name of the adapter that PEFT loads for comparison; it is gone afterwards."""
TRUNK_TOLERANCE = 1e-2
TOLERANCES = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""How far rounding takes log-probabilities and scores, and more; what is wrong differs by 0.5 and much more."""
REFUSED = 5
"""What is off by more than so many tolerances ends the run."""
WRONG = {
    "sampler": "log-probabilities of the sampler differ from the scored ones by {:.2g} nats a token",
    "ratio": "the training pass and the scoring pass differ: their ratio is off 1 by {:.2g}",
    "kl": "the KL of the policy to its reference is {:.2g} nats a token, though it has taken no step",
    "reward": "scores on the shared base differ from those of the reward adapter under plain PEFT by {:.2g}",
    "base": "{:.0%} of the base's tensors changed when the roles were added",
}


def self_test(trainer: PPOTrainer, prompts: Sequence[Any]) -> dict[str, float | None]:
    """Try a trainer on a few prompts, as its rows hold them, and log one line; the random state stays as it is.

    Where the trunk is wrong, the trainer goes without it from here on.

    Returns:
        The figures that the module's docstring explains, the worst of all processes, None for what does not apply, and
        `seconds`.

    Raises:
        UserError: something is wrong beyond any rounding.
    """
    started, training, size = time.perf_counter(), trainer.model.training, trainer._score_batch_size
    device = trainer.accelerator.device
    try:
        trainer.model.eval()
        with machine.random_state_kept():
            torch.manual_seed(trainer.args.seed)
            own = _figures(trainer, prompts[:ROWS])
    finally:
        trainer.model.train(training)
        trainer._score_batch_size = size  # what fits is for whole micro-batches to find out
    known = torch.tensor([math.inf if x is None or math.isnan(x) else x for x in own.values()], device=device)
    worst = trainer.accelerator.gather(known[None]).amax(dim=0).tolist()
    figures = {name: None if own[name] is None else x for name, x in zip(own, worst, strict=True)}
    _judge(trainer, figures, time.perf_counter() - started)
    return figures | {"seconds": time.perf_counter() - started}


def weight_sums(parameters: Iterable[Tensor]) -> list[int]:
    """A number for each tensor, quantized or not, that changes with its bits: the sum of some of them as integers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 2**16)]
        sums.append(int(some.view(integers[some.element_size()]).sum(dtype=torch.int64)))
    return sums


@torch.no_grad()
def _figures(trainer: PPOTrainer, prompts: Sequence[Any]) -> dict[str, float | None]:
    roles, parameters = trainer.roles, [parameter for parameter, _ in trainer.base_sums]
    before, now = [total for _, total in trainer.base_sums], weight_sums(parameters)
    changed = sum(a != b for a, b in zip(before, now, strict=True)) / len(before)

    tokens = trainer._tokenize_prompts(list(prompts))[0]
    prompt_ids = [list(ids)[-PROMPT_TOKENS // (row + 1) :] for row, ids in enumerate(tokens)]  # of several lengths
    size = trainer._rollout_batch_size or ROWS
    parts, _ = in_chunks(len(prompt_ids), size, lambda rows: _sampled(trainer, prompt_ids[rows]))
    completion_ids = [ids for completions, _ in parts for ids in completions]
    sampled = [logps for _, by_sampler in parts for logps in by_sampler]
    trunk = _trunk_difference(trainer, prompt_ids[:2], completion_ids[:2])
    if trunk is not None and not trunk <= TRUNK_TOLERANCE:  # rounding in bf16; a wrong one differs by all of it
        logger.warning("the shared trunk changes this model's output (by %.2g): going without it", trunk)
        roles.trunk_layers = 0
    rollout = trainer._rolled_out(prompt_ids, completion_ids)

    def trained(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        return trainer._token_logps(trainer.model, input_ids, attention_mask, completion_length)[0].detach()

    trainer.model.train()
    with torch.enable_grad():
        logps = rollout.join(trainer._compute(rollout, trained))
    trainer.model.eval()
    ratio = (logps - rollout.logps)[rollout.mask].exp()

    rewards = [
        (_shared_scores(trainer, rollout, member) - _scores_alone(trainer, rollout, folder)).abs()
        for member, folder in zip(roles.members(REWARD), trainer.reward_adapters, strict=False)
    ]
    if weight_sums(parameters) != now:
        logger.warning("the first pass changed weights of the base: rewards and KL before it spoke of another model")
    return {
        "sampler": _mean_difference(sampled, rollout.logps, rollout.mask),
        "ratio": (ratio - 1).abs().max().item(),
        "kl": None if trainer.state.global_step else rollout.kl.abs().max().item(),
        "trunk": trunk,
        "reward": torch.stack(rewards).max().item() if rewards else None,
        "base": changed,
    }


def _judge(trainer: PPOTrainer, figures: dict[str, float | None], seconds: float) -> None:
    """One line where all is well, a warning, or an error."""
    args = trainer.args
    tolerance = TOLERANCES[_precision(trainer)]
    found = {name: x for name, x in figures.items() if name in WRONG and x is not None}
    allowed = dict.fromkeys(found, tolerance) | {"base": 0.0}
    wrong = {name: WRONG[name].format(x) for name, x in found.items() if x > allowed[name]}
    mild = {name for name in wrong if found[name] <= REFUSED * allowed[name]}
    mild |= {"kl"}  # whoever changes the policy by hand may mean it
    if args.top_p < 1 or args.top_k or args.min_p or args.repetition_penalty != 1:
        mild |= {"sampler"}  # it was asked for
    if refused := [text for name, text in wrong.items() if name not in mild]:
        raise UserError(
            f"self-test before the first rollout: {'; '.join(refused)}. Rounding explains {tolerance:g} at most: what "
            "PPO would learn from is wrong. Nothing was trained. Try trunk=0, rollouts=generate or model.dtype=float32 "
            "to see where it comes from."
        )
    if wrong:
        logger.warning("self-test: %s (rounding explains %g at most)", "; ".join(wrong.values()), tolerance)
        return
    said = ", ".join(f"{name} {x:.1g}" for name, x in figures.items() if x is not None)
    also = "; left out: the KL (the policy has moved: the run was resumed)" if figures["kl"] is None else ""
    logger.info("self-test in %.1f s, all well: %s%s", seconds, said, also)


def _precision(trainer: PPOTrainer) -> torch.dtype:
    """The coarsest type that the model computes in; 4-bit kernels round as bf16 does."""
    args, model = trainer.args, trainer.model.get_base_model()
    if args.bf16 or model.dtype == torch.bfloat16 or getattr(model, "is_quantized", False):
        return torch.bfloat16
    return torch.float16 if args.fp16 or model.dtype == torch.float16 else torch.float32


def _sampled(trainer: PPOTrainer, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Short completions by what samples the rollouts, and each token's log-probability there."""
    base, config = trainer.model.get_base_model(), copy.deepcopy(trainer.generation_config)
    config.max_new_tokens = min(NEW_TOKENS, config.max_new_tokens or NEW_TOKENS)
    config.min_new_tokens = None  # benchmarks set it
    config.return_dict_in_generate = config.output_scores = True
    with generating_by(base, config):
        if trainer.use_transformers_continuous_batching:
            settings = copy.copy(trainer.continuous_batching_config)
            settings.return_logprobs = True
            answers = continuous_batching(trainer.model, prompt_ids, config, settings, len(prompt_ids))
            return [a.generated_tokens for a in answers], [a.logprobs for a in answers]
        prompts = Episodes.padded(prompt_ids, [[]] * len(prompt_ids), trainer._tokenizer.pad_token_id, base.device)
        graphs = cuda_graphs(trainer.model, config) if trainer.args.cuda_graphs else nullcontext()
        with graphs, trainer.accelerator.autocast():
            made = trainer.model.generate(
                input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=config
            )
    tokens = made.sequences[:, prompts.input_ids.size(1) :]
    logps = torch.stack(made.scores, dim=1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ended = torch.isin(tokens, torch.tensor(trainer.eos_token_ids, device=tokens.device)).long()
    lengths = (ended.cumsum(1) - ended == 0).sum(dim=1).tolist()  # EOS included
    rows = zip(tokens.tolist(), logps.tolist(), lengths, strict=True)
    completions, by_sampler = zip(*((ids[:n], scores[:n]) for ids, scores, n in rows), strict=True)
    return list(completions), list(by_sampler)


def _mean_difference(sampled: list[list[float]], scored: Tensor, mask: Tensor) -> float:
    by_sampler = torch.zeros_like(scored)
    for row, logps in zip(by_sampler, sampled, strict=True):
        row[: len(logps)] = torch.tensor(logps)
    return (by_sampler - scored)[mask].abs().mean().item()


def _trunk_difference(
    trainer: PPOTrainer, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> float | None:
    roles = trainer.roles
    if not roles.trunk_layers:
        return None
    rows = Episodes.padded(prompt_ids, completion_ids, trainer._tokenizer.pad_token_id, trainer.accelerator.device)
    inputs, real = (rows.input_ids, rows.attention_mask), rows.attention_mask.bool()
    with trainer.accelerator.autocast():
        whole = roles.hidden_states(*inputs).float()[real]
        with roles.trunk_given(roles.trunk_states(*inputs)):
            return ((roles.hidden_states(*inputs).float()[real] - whole).norm() / whole.norm()).item()


def _shared_scores(trainer: PPOTrainer, rollout: Rollout, member: str) -> Tensor:
    """Scores (b,) of episodes by a reward role, as PPO takes them."""

    def scores(input_ids: Tensor, attention_mask: Tensor, _: int) -> Tensor:
        return trainer.roles.scores(input_ids, attention_mask, trainer._tokenizer.pad_token_id, member)

    with trainer.accelerator.autocast(), trainer.roles.active(member):
        return rollout.join(trainer._compute(rollout, scores))


def _scores_alone(trainer: PPOTrainer, rollout: Rollout, folder: Path) -> Tensor:
    """Scores (b,) of the same batches, in whole passes, by the adapter as PEFT adds and loads it."""
    model, peft_class, scores = trainer.model, type(trainer.model), []
    scale = json.loads((folder / HEAD_FILE).read_text()) if (folder / HEAD_FILE).exists() else {}
    tensors = load_peft_weights(str(folder), device="cpu")
    head = tensors.pop(HEAD_KEY).float().to(model.device)
    peft_class.add_adapter(model, ALONE, on_a_causal_model(read_adapter_config(folder)))
    try:
        adapter = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}
        set_peft_model_state_dict(model, adapter, adapter_name=ALONE)
        peft_class.set_adapter(model, ALONE, inference_mode=True)
        for ids, mask in map(rollout.inputs, rollout.micro_batches):
            with trainer.accelerator.autocast():
                hidden = trainer.roles.hidden_states(ids, mask)
            last = hidden[
                torch.arange(len(ids), device=ids.device), last_real_token(ids, trainer._tokenizer.pad_token_id)
            ]
            scores.append((last.float() @ head.T)[:, 0])
    finally:
        trainer.roles.activate(POLICY)
        peft_class.delete_adapter(model, ALONE)
    return (rollout.join(scores) - scale.get("mean", 0.0)) / scale.get("std", 1.0)


def base_sums(roles: Roles) -> list[tuple[nn.Parameter, int]]:
    """The base's parameters with their `weight_sums`, before roles are added to the policy."""
    adapter = {id(parameter) for parameter in roles.parameters(POLICY).values()}
    base = [parameter for parameter in roles.model.parameters() if id(parameter) not in adapter]
    return list(zip(base, weight_sums(base), strict=True))
