"""PPO with a learned critic as a thin subclass of TRL's GRPOTrainer, for one base model that holds all four roles.

TRL generates, calls the reward functions, clips the policy's ratio, checkpoints and logs. What is added here: the KL
penalty in the reward, the critic and its advantages, the reward and value adapters, and the trunk that all roles share.
"""

import dataclasses
import itertools
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from trl import GRPOTrainer

from rlhf_recipes import machine
from rlhf_recipes.backoff import back_off, in_chunks, until_it_fits
from rlhf_recipes.data.formats import end_with_the_turn, render_demonstration
from rlhf_recipes.data.lengths import check_batch
from rlhf_recipes.ensembles import Ensemble, spread
from rlhf_recipes.errors import UserError
from rlhf_recipes.evaluation.sampling import generating_by
from rlhf_recipes.finite import StopAtNonFinite
from rlhf_recipes.models import fingerprint
from rlhf_recipes.portions import prefill_chunk
from rlhf_recipes.ppo.advantages import (
    KLController,
    ReturnScale,
    clipped_value_loss,
    explained_variance,
    gae,
    last_token,
    masked_moments,
    token_rewards,
    whiten,
)
from rlhf_recipes.ppo.backends import continuous_batching, cuda_graphs
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.rollout import WIDTHS, Rollout
from rlhf_recipes.ppo.self_test import base_sums, self_test
from rlhf_recipes.rewards import RESUME, checked
from rlhf_recipes.roles import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    Episodes,
    Roles,
    check_adapter,
    check_padding,
    disable_dropout,
)
from rlhf_recipes.runs.manifest import read_manifest, refuse_other_bases

logger = logging.getLogger(__name__)

STATE_FILE = "ppo_state.json"


class PPOTrainer(GRPOTrainer):
    """Trainer for PPO (arXiv 1707.06347) with a KL penalty to the reference, as in InstructGPT (arXiv 2203.02155).

    Example:

    ```python
    from rlhf_recipes import PPOConfig, PPOTrainer

    trainer = PPOTrainer(
        model=PeftModel.from_pretrained(base, "my-sft-adapter"),  # or a model id with a `peft_config`
        args=PPOConfig("out", beta=0.05),
        reward_adapter="my-reward-adapter",                       # and/or `reward_funcs`, as in any TRL trainer
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()
    ```

    Args:
        model: a PEFT model whose adapter `default` is the policy (the reference is a frozen copy of it), or a model or
            model id together with `peft_config` (the reference is the model itself).
        reward_funcs: TRL's: functions, model ids or sequence classifiers. Not needed where there is a `reward_adapter`.
        args: a `PPOConfig`.
        reward_adapter: folder of a reward model trained as a LoRA adapter with a `score` head on this base; or folders
            of several, an ensemble that `reward_ensemble` combines. In `reward_weights` it comes first, as one.
        ptx_dataset: rows for the SFT loss, in any of TRL's formats; needed where `ptx_coef` is not 0.

    Raises:
        UserError: no adapter to train, an adapter that does not fit, or a combination that cannot work.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    _rollout: Rollout  # the episodes being scored; there is none while training on a rollout batch

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        reward_adapter: str | Path | Sequence[str | Path] | None = None,
        ptx_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        args = args or PPOConfig("ppo")
        if not isinstance(model, PeftModel) and peft_config is None:
            raise UserError(
                "PPOTrainer trains adapters: pass a PeftModel, or a `peft_config` such as "
                "LoraConfig(target_modules='all-linear', task_type='CAUSAL_LM')"
            )
        check_adapter(model.peft_config.get(POLICY) if isinstance(model, PeftModel) else peft_config)
        _refuse_what_the_policy_did_not_write(train_dataset, kwargs)
        if isinstance(processing_class, PreTrainedTokenizerBase) and train_dataset is not None:
            end_with_the_turn(processing_class, next(iter(train_dataset), {}))
        if args.ptx_coef and ptx_dataset is None:
            raise UserError(
                f"ptx_coef={args.ptx_coef} needs a ptx_dataset: the demonstrations whose SFT loss it weighs"
            )
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs is not None else []
        one = [reward_adapter] if isinstance(reward_adapter, str | Path) else reward_adapter
        adapters = [Path(folder) for folder in one or ()]
        funcs = [func if isinstance(func, str | nn.Module) else checked(func) for func in funcs]
        if adapters:
            funcs = [self.reward_model, *funcs]
        if isinstance(train_dataset, Sized) and (left := check_batch(len(train_dataset), args.prompts_per_iteration)):
            logger.info(left)
        _settle_evaluations(args, eval_dataset)
        if isinstance(model, PeftModel):
            # TRL casts what is trainable to bf16 on a quantized base; the adapter has to stay as it was loaded
            model.requires_grad_(False)
        beta, args.beta = args.beta, 0.0  # TRL's own KL term, in the loss, stays off
        super().__init__(
            model=model,
            reward_funcs=funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.beta = beta
        for folder in adapters:
            check_padding(folder, self._tokenizer)
        self.aux_loss_enabled = False  # that of a mixture of experts: its routers are frozen, as all of the base is
        changed = {"top_p": args.top_p < 1, "top_k": args.top_k > 0, "min_p": args.min_p}
        changed["repetition_penalty"] = args.repetition_penalty != 1
        if any(changed.values()):
            logger.warning(
                "%s: completions are sampled from another distribution than the policy's, which they are scored by: "
                "the ratio and the KL penalty are biased",
                ", ".join(f"{name}={getattr(args, name)}" for name, is_set in changed.items() if is_set),
            )
        self.roles = self._assign_roles(adapters)
        self.kl = KLController(beta, args.kl_target, args.kl_horizon)
        self.return_scale = ReturnScale()
        self.stop_reason: str | None = None
        self.ptx_dataset: Any = ptx_dataset if args.ptx_coef else None
        self._scores: Tensor = torch.empty(0)
        self._logps_now: Tensor | None = None  # of the last policy forward, kept for metrics
        self._pass_kl: defaultdict[int, list[float]] = defaultdict(list)  # KL to the generating policy, by pass
        self._stop_passes = False
        self._seconds: defaultdict[str, float] = defaultdict(float)  # by phase, since the last rollout
        self.reward_adapters = adapters
        self.self_test: dict[str, float | None] | None = None  # its figures, from the first rollout on
        self.self_test_at_start: dict[str, float | None] | None = None  # those before the first step, in a resume too
        self._rollout_batch_size, self._score_batch_size = args.rollout_batch_size, args.per_device_train_batch_size
        self.add_callback(_BetweenIterations(self))
        back_off(self)
        self.finite = StopAtNonFinite(self)

    def _assign_roles(self, reward_adapters: list[Path]) -> Roles:
        """Add reference, reward and value to the policy, and settle what trains."""
        args, model = self.args, self.model
        if stages := {folder: made["base"] for folder in reward_adapters if (made := read_manifest(folder))}:
            refuse_other_bases(stages, fingerprint(model))
        roles = Roles(model, args.trunk, args.frozen_top)
        self.base_sums = base_sums(roles)
        roles.add_copy(REFERENCE, POLICY)
        if reward_adapters:
            roles.hold(REWARD, reward_adapters, Ensemble(args.reward_ensemble, args.reward_spread_coef))
        if args.value_init == "reward" and reward_adapters:
            roles.add_copy(VALUE, REWARD)
            roles.add_head(VALUE).load_state_dict(roles.heads[REWARD].state_dict())
        elif args.value_init in ("reward", "sft"):
            roles.add_copy(VALUE, POLICY)
            roles.add_head(VALUE)
        else:
            roles.hold(VALUE, [Path(args.value_init)])
        roles.train(POLICY, *([] if args.freeze_value else [VALUE]))
        shared = roles.find_trunk()
        if shared < roles.frozen_layers:
            logger.warning(
                "%d of %d frozen layers are equal in all adapters and shared; the others differ in scaling, or an "
                "earlier stage trained them (its `trunk` was smaller)",
                shared,
                roles.frozen_layers,
            )
        disable_dropout(model)  # with dropout, the ratio would not start at 1
        # the critic's gradients are reduced by hand, since its passes do not go through the wrapped model
        ignored = [name for name, _ in model.named_parameters() if f".{VALUE}." in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        return roles

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        """TRL's, whose order depends on seed and epoch alone: a resume in a later epoch sees the same prompts."""
        sampler = super()._get_train_sampler(dataset)
        sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    # ---- rollout: generate, score, compute advantages

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        generate = super()._generate_single_turn

        def sample(prompt_ids: list[list[int]]) -> list[list[int]]:
            chunk = prefill_chunk(len(prompt_ids), max(map(len, prompt_ids)), self.accelerator.device.type)
            self.generation_config.prefill_chunk_size = self.generation_kwargs.get("prefill_chunk_size", chunk)
            return list(generate(prompt_ids, None, {}, *args, **kwargs)[0])

        with self._timed("generate"):
            if images or multimodal_fields:
                return generate(prompt_ids, images, multimodal_fields, *args, **kwargs)
            rows = len(prompt_ids)
            size = self._rollout_batch_size or rows
            with generating_by(self.model.get_base_model(), self.generation_config):  # not by the model's own
                if self.use_transformers_continuous_batching:
                    settings = self.generation_config, self.continuous_batching_config
                    answers, fitted = until_it_fits(
                        rows, size, lambda size: continuous_batching(self.model, prompt_ids, *settings, size)
                    )
                    completions = [answer.generated_tokens for answer in answers]
                else:
                    with cuda_graphs(self.model, self.generation_config) if self.args.cuda_graphs else nullcontext():
                        chunks, fitted = in_chunks(rows, size, lambda chunk: sample(prompt_ids[chunk]))
                    completions = list(itertools.chain(*chunks))
        self._rollout_batch_size = None if fitted >= rows else fitted
        return completions, None

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        generated = super()._generate(prompts)
        self._rollout = self._rolled_out(prompt_ids=generated[0], completion_ids=generated[1])
        return generated

    @torch.no_grad()
    def _rolled_out(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Rollout:
        """Pad as TRL does, compute the trunk once, and score the sampled tokens under policy and reference."""
        pad_id, multiple = self._tokenizer.pad_token_id, self.pad_to_multiple_of
        rollout = Rollout.padded(prompt_ids, completion_ids, pad_id, self.accelerator.device, multiple)
        rollout.sort(self.args.per_device_train_batch_size, multiple or WIDTHS)
        with self._timed("score"), self.accelerator.autocast():
            if self.roles.trunk_layers:
                rollout.trunk = self._compute(rollout, lambda ids, mask, _: self.roles.trunk_states(ids, mask))
            scored = [x.unbind(-1) for x in self._compute(rollout, self._logps_and_kl)]
        rollout.logps, rollout.ref_logps, rollout.kl = map(rollout.join, zip(*scored, strict=True))
        for whose, x in {"policy's": rollout.logps, "reference's": rollout.ref_logps}.items():
            self.finite.refuse(f"a log-probability of the {whose}", x, rollout.input_ids, rollout.mask)
        self.finite.refuse("the KL to the reference", rollout.kl, rollout.input_ids, rollout.mask)
        return rollout

    def _logps_and_kl(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Of each completion token (b, t, 3): log-probability under policy and reference, and their KL."""
        adapters = POLICY, REFERENCE
        logps = []
        with self.roles.decoder_outputs() as outputs:
            for adapter in adapters:
                with self.roles.active(adapter):
                    logps.append(self._token_logps(self.model, input_ids, attention_mask, completion_length)[0])
        mask = attention_mask[:, -completion_length:].bool()
        return torch.stack([*logps, self.roles.exact_kl(adapters, outputs, mask, self.temperature)], dim=-1)

    def _compute(self, rollout: Rollout, compute: Callable[[Tensor, Tensor, int], Any]) -> list[Any]:
        """`compute(input_ids, attention_mask, completion_length)` of each micro-batch, with the trunk given."""
        results = []
        for micro_batch, trunk in zip(rollout.micro_batches, rollout.trunk, strict=True):
            ids, mask = rollout.inputs(micro_batch)
            length = micro_batch.of_completions(rollout.mask).size(1)

            def part(rows: slice, ids: Tensor = ids, mask: Tensor = mask, trunk: Any = trunk, n: int = length) -> Any:
                with self.roles.trunk_given(None if trunk is None else trunk[rows]):
                    return compute(ids[rows], mask[rows], n)

            parts, self._score_batch_size = in_chunks(len(ids), self._score_batch_size, part)
            results.append(torch.cat(parts))
        return results

    def _token_logps(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        *,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies (b, t) of the completion's tokens, under the active adapter.

        On a GPU TRL's fused LM head does it without holding the logits. On a CPU, and on MPS, that head scores the
        prompt too, and computes everything again in the backward pass; there the model is asked for the completion's
        logits alone.

        Args:
            temperature: that of the sampling if None, the only one that TRL's head knows.
        """
        temperature = self.temperature if temperature is None else temperature
        if self.accelerator.device.type not in ("cpu", "mps") and temperature == self.temperature:
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, completion_length, compute_entropy=torch.is_grad_enabled()
            )
            return logps, entropies
        with self.accelerator.autocast():
            return self.roles.token_logps(
                input_ids,
                attention_mask,
                completion_length,
                model=model,
                temperature=temperature,
                entropy_grad=self._entropy_bonus_enabled,
            )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        if not torch.is_grad_enabled():  # TRL asks for the old log-probabilities, which are there already
            return self._rollout.logps, None, None
        logps, entropies = self._token_logps(model, input_ids, attention_mask, logits_to_keep)
        self._logps_now = logps.detach()
        return logps, entropies, None

    def reward_model(self, **kwargs: Any) -> list[float]:
        """Scores of the current episodes by the reward adapter or adapters: a reward function as TRL knows them."""
        members = self.roles.members(REWARD)
        with torch.no_grad(), self.accelerator.autocast():
            scores = torch.stack([self._member_scores(member) for member in members])
        if len(members) > 1:
            metrics = self._metrics["train" if self.model.training else "eval"]
            for member, row in zip(members, scores, strict=True):
                metrics[f"members/{member}"].append(self._mean(row))
            metrics["members/spread"].append(self._mean(spread(scores)))
        return self.roles.combine(REWARD, scores).tolist()

    def _member_scores(self, member: str) -> Tensor:
        """Scores (b,) of the current episodes by one reward adapter."""

        def scores(input_ids: Tensor, attention_mask: Tensor, _: int) -> Tensor:
            return self.roles.scores(input_ids, attention_mask, self._tokenizer.pad_token_id, member)

        with self.roles.active(member):
            return self._rollout.join(self._compute(self._rollout, scores))

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: list[Any], completion_ids: Any) -> Tensor:
        with self._timed("reward"):
            # (episodes of all processes, functions)
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        if rewards.isinf().any():
            row, function = rewards.isinf().nonzero()[0].tolist()
            name, completion = self.reward_func_names[function], completions[row % len(completions)]
            raise UserError(
                f"reward `{name}` is {rewards[row, function].item()} for the completion {completion!r:.200} "
                f"at step {self.state.global_step}. {RESUME}"
            )
        if self.model.training and rewards.isnan().all():
            raise self._nothing_scored()
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        scores[rewards.isnan().all(dim=1)] = torch.nan
        own = len(self._rollout.mask)
        self._scores = scores[self.accelerator.process_index * own :][:own]
        return rewards

    def _values(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Values (b, t) of the states before each completion token, in units of `return_scale`.

        The `value` adapter has to be active.
        """
        with self.accelerator.autocast():
            hidden = self.roles.hidden_states(input_ids, attention_mask)[:, -completion_length - 1 : -1]
        return self.roles.scalars(VALUE, hidden)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.self_test is None:
            self.self_test = self_test(self, [row["prompt"] for row in inputs])
            self.self_test_at_start = self.self_test_at_start or self.self_test
        started = time.perf_counter()
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        counts = {name: len(values) for name, values in metrics.items()}
        batch = super()._generate_and_score_completions(inputs)
        rollout = self._rollout
        metrics.pop("frac_reward_zero_std", None)  # speaks of groups, which PPO has none of

        kl_per_episode = self._mean((rollout.kl * rollout.mask).sum(dim=1))
        metrics["kl"].append(kl_per_episode)
        scores, ended = self._shaped_scores(rollout)
        metrics["eos_share"].append(self._mean(ended.float()))
        if mode == "eval":
            # by the initial coefficient: an adaptive one would make evaluations incomparable
            metrics["objective"].append(self._mean(scores) - self.args.beta * kl_per_episode)
            for name, values in metrics.items():
                # TRL takes the mean over batches: each value stands once for every episode, as batches differ in size
                values[counts.get(name, 0) :] *= len(rollout.mask)
        else:
            batch = self._training_batch(rollout, scores, batch)
            tokens = self.accelerator.gather(rollout.mask.sum()).sum().item()
            metrics["tokens_per_second"].append(tokens / (time.perf_counter() - started))
            self._begin_iteration(kl_per_episode)
        del self._rollout
        return batch

    def _training_batch(self, rollout: Rollout, scores: Tensor, batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's batch with what the critic and the policy train on, by micro-batch."""
        self._rescale_critic(rollout, scores)
        trunk = {"trunk": rollout.trunk} if self.roles.trunk_layers else {}
        advantages, unseen = self._advantages(rollout, scores)
        if self.state.global_step == 0 and self.args.value_pretraining_passes and not self.args.freeze_value:
            self._fit_head(advantages["values"], advantages["returns"], rollout.mask)
            self._pretrain_critic(rollout.split(batch | advantages) | trunk)
            advantages, seen = self._advantages(rollout, scores)
            logger.info(
                "critic pretrained in %d passes over the first %d episodes: it explains %.2f of the variance of their "
                "returns (%.2f before)",
                self.args.value_pretraining_passes,
                self.args.generation_batch_size,
                seen,
                unseen,
            )
        self._metrics["train"]["explained_variance"].append(unseen)
        self._metrics["train"]["kl_coef"].append(self.kl.coef)
        self._show_advantages(advantages["advantages"].sum(dim=1))
        batch = rollout.split(batch | advantages) | trunk
        batch["micro_batch_tokens"] = [mask.sum() for mask in batch["completion_mask"]]
        if self.ptx_dataset is not None:
            batch |= self._demonstrations([len(micro_batch.rows) for micro_batch in rollout.micro_batches])
        return batch

    @torch.no_grad()
    def _rescale_critic(self, rollout: Rollout, scores: Tensor) -> None:
        """Take the returns of a rollout batch into the critic's units; what it predicts stays the same (PopArt)."""
        rewards, scored = self._token_rewards(rollout, scores)
        self._metrics["train"]["reward_with_kl"].append(self._mean(rewards.sum(dim=1)))
        returns = gae(rewards, torch.zeros_like(rewards), rollout.mask, self.args.gamma, lam=1.0)
        mean, variance = masked_moments(returns, scored, self._sum)
        old, head = dataclasses.replace(self.return_scale), self.roles.heads[VALUE]
        self.return_scale.update(mean.item(), variance.item())
        head.weight.mul_(old.std / self.return_scale.std)
        head.bias.copy_(self.return_scale.normalized(old.restored(head.bias)))

    def _token_rewards(self, rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (b, t), KL penalty included, and the mask (b, t) of episodes that some function could score."""
        rewards = token_rewards(
            scores.nan_to_num(nan=0.0), rollout.logps, rollout.ref_logps, rollout.mask, self.kl.coef
        )
        if self.args.whiten_rewards:
            rewards = whiten(rewards, rollout.mask, self._sum, shift_mean=False)
        return rewards, rollout.mask & ~scores.isnan()[:, None]

    @torch.no_grad()
    def _advantages(self, rollout: Rollout, scores: Tensor) -> tuple[dict[str, Tensor], float]:
        """What training needs of a rollout batch (b, t): advantages, old log-probabilities, and in units of
        `return_scale` returns and old values; and the explained variance of the returns."""
        args, mask = self.args, rollout.mask
        with self._timed("score"), self.roles.active(VALUE):
            values = self.return_scale.restored(rollout.join(self._compute(rollout, self._values))) * mask
        self.finite.refuse("a value of the critic", values, rollout.input_ids)
        rewards, scored = self._token_rewards(rollout, scores)  # an episode that nothing scored teaches nothing
        advantages = gae(rewards, values, mask, args.gamma, args.lam) * scored
        returns = torch.where(scored, gae(rewards, values, mask, args.gamma, args.value_lam) + values, values)
        if args.whiten_advantages:
            advantages = whiten(advantages, scored, self._sum)
        return {
            "advantages": advantages,
            "returns": self.return_scale.normalized(returns),
            "values": self.return_scale.normalized(values),
            "old_per_token_logps": rollout.logps,
        }, explained_variance(values, returns, scored, self._sum)

    @torch.no_grad()
    def _fit_head(self, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Scale and shift the critic's head so that its values (b, t) fit the returns (b, t) by least squares.

        A critic that begins at a reward model, in a reward of another scale or with a constant in it, begins there.
        """
        (mean, variance), (target, spread) = (masked_moments(x, mask, self._sum) for x in (values, returns))
        covariance = (masked_moments(values + returns, mask, self._sum)[1] - variance - spread) / 2
        slope = covariance / variance if variance > 1e-6 else torch.ones_like(variance)
        head = self.roles.heads[VALUE]
        head.weight.mul_(slope)
        head.bias.mul_(slope).add_(target - slope * mean)

    def _pretrain_critic(self, batch: dict[str, Any]) -> None:
        """Train the critic alone on the first rollout batch, before the policy's first step, whose schedule waits.

        Source: value pretraining of VC-PPO (arXiv 2503.01491), on episodes that PPO needs anyway.
        """
        args, parameters = self.args, self.roles.trained[VALUE]
        optimizer = torch.optim.AdamW(parameters, lr=args.value_learning_rate, weight_decay=args.weight_decay)
        steps = itertools.product(range(args.value_pretraining_passes), range(args.steps_per_generation))
        with self._timed("value"), self.roles.active(VALUE):
            for step, (_, index) in enumerate(steps, start=1):
                inputs = {name: x[index] if isinstance(x, list) else x for name, x in batch.items()}
                for parameter, gradient in zip(parameters, self._value_gradients(inputs), strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                if step % args.gradient_accumulation_steps == 0:
                    self._reduce_critic()
                    norm = self._clip_critic()
                    self.finite.refuse_norm("the gradient norm of the critic's pretraining", norm)
                    if math.isfinite(norm):
                        optimizer.step()
                    self.finite.count()
                    optimizer.zero_grad()

    def _value_gradients(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Gradients of the critic's parameters for a micro-batch, in as many parts as memory asks for."""
        scaler = self.accelerator.scaler  # of fp16; else there is none
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0

        def gradients(rows: slice) -> tuple[Tensor, ...]:
            part = {name: x[rows] if isinstance(x, Tensor) and x.ndim else x for name, x in inputs.items()}
            with self.roles.trunk_given(part.get("trunk")):
                loss = scale * self._value_loss(part, clip=None)
                parameters = self.roles.trained[VALUE]
                return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

        parts, self._score_batch_size = in_chunks(len(inputs["prompt_ids"]), self._score_batch_size, gradients)
        return [torch.stack(part).sum(dim=0) / scale for part in zip(*parts, strict=True)]

    def _demonstrations(self, sizes: list[int]) -> dict[str, Any]:
        """For each micro-batch as many demonstrations as it has episodes; drawn by step, so a resume draws the same."""
        draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        rows = torch.randint(len(self.ptx_dataset), (self.accelerator.num_processes, sum(sizes)), generator=draw)
        batches = []
        for own in rows[self.accelerator.process_index].split(sizes):
            rendered = [render_demonstration(self.ptx_dataset[i], self._tokenizer) for i in own.tolist()]
            firsts = [max(learned.index(True), 1) for _, learned in rendered]  # nothing says the first token of a text
            prompts = [ids[:first] for (ids, _), first in zip(rendered, firsts, strict=True)]
            completions = [ids[first:] for (ids, _), first in zip(rendered, firsts, strict=True)]
            pad_id, device = self._tokenizer.pad_token_id, self.accelerator.device
            batch = Episodes.padded(prompts, completions, pad_id, device)
            for mask, (_, learned), first in zip(batch.mask, rendered, firsts, strict=True):
                mask[: len(learned) - first] = torch.tensor(learned[first:], device=device)
            batches.append(batch)
        return {
            "ptx_ids": [batch.input_ids for batch in batches],
            "ptx_attention_mask": [batch.attention_mask for batch in batches],
            "ptx_mask": [batch.mask for batch in batches],
            "ptx_tokens": torch.stack([batch.mask.sum() for batch in batches]).sum(),
        }

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and (self._step + 1) % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._buffered_inputs = None  # was the last of the rollout batch: its trunk is not kept through the next
        # a micro-batch comes as lists of one: see Rollout.split
        return {name: x[0] if isinstance(x, list) else x for name, x in inputs.items() if name != "micro_batch"}

    def _shaped_scores(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Scores (b,) after clipping and the penalty for a missing EOS, and which episodes (b,) ended in EOS."""
        rows = torch.arange(len(rollout.mask), device=rollout.mask.device)
        last = rollout.input_ids[:, -rollout.completion_length :][rows, last_token(rollout.mask)]
        ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
        scores = self._scores.clone()
        if self.args.reward_clip is not None:
            scores = scores.clamp(-self.args.reward_clip, self.args.reward_clip)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~ended
        return scores, ended

    def _show_advantages(self, advantages: Tensor) -> None:
        """Put the episodes' advantages (b,) in the completions table, where GRPO has just put its zeros."""
        table, rows = self._logs["advantages"], self.accelerator.gather(advantages).tolist()
        for _ in range(min(len(rows), len(table))):
            table.pop()
        table.extend(rows)

    def _begin_iteration(self, kl_per_episode: float) -> None:
        """Stop if the policy ran away, and move the KL coefficient."""
        for phase, seconds in self._seconds.items():  # of the iteration before, and of this one's rollout
            self._metrics["train"][f"time/{phase}"].append(seconds)
        self._seconds.clear()
        self._pass_kl.clear()
        self._stop_passes = False
        if self.args.kl_budget is not None and kl_per_episode > self.args.kl_budget:
            self.stop_reason = (
                f"stopped at step {self.state.global_step}: the KL to the reference is {kl_per_episode:.3g} nats per "
                f"sequence, over kl_budget={self.args.kl_budget:g}. Raise beta, or lower learning_rate."
            )
            logger.warning(self.stop_reason)
            self.control.should_training_stop = True
        self.kl.update(kl_per_episode, self.args.generation_batch_size)

    # ---- training: the critic's pass, the SFT loss, then TRL's clipped policy loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        value_loss = torch.zeros((), device=self.accelerator.device)
        if self._critic_learns():
            # backward before the next switch of adapters: checkpointing recomputes with the active one
            with self._timed("value"), self.roles.active(VALUE), self.roles.trunk_given(inputs.get("trunk")):
                value_loss = self._value_loss(inputs, self.args.cliprange_value)
                self.accelerator.backward(value_loss)
            if self.accelerator.sync_gradients:
                self._reduce_critic()  # before gradients are unscaled (fp16): all processes skip a step, or none does
            per_step = value_loss.detach() * self.current_gradient_accumulation_steps
            self._metrics["train"]["value_loss"].append(self._mean(per_step))
        if self._passes_are_over():
            return value_loss.detach().requires_grad_()  # a leaf: its backward moves nothing
        if self.ptx_dataset is not None:
            self.accelerator.backward(self._ptx_loss(model, inputs))
        with self._timed("policy"), self.roles.trunk_given(inputs.get("trunk")), self._entropy_share(inputs):
            loss = super()._compute_loss(model, inputs)
            self._note_ratio(inputs)
        return loss

    @contextmanager
    def _entropy_share(self, inputs: dict[str, Any]) -> Iterator[None]:
        """TRL's entropy bonus is a mean over what is computed at once: of a part of a micro-batch, the part's share."""
        share = (inputs["completion_mask"].sum() / inputs["micro_batch_tokens"]).item()
        taken = self.entropy_coef * (1 - share)
        self.entropy_coef -= taken
        yield
        self.entropy_coef += taken  # added, since TRL may have adapted it inside

    def _value_loss(self, inputs: dict[str, Any], clip: float | None) -> Tensor:
        """Clipped value loss in units of `return_scale`: a mean over the rollout batch, as TRL's policy loss is."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        values = self._values(input_ids, attention_mask, inputs["completion_ids"].size(1))
        loss = clipped_value_loss(values, inputs["values"], inputs["returns"], clip)
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return (loss * inputs["completion_mask"]).sum() / (tokens * self._share_of_rollout)

    def _ptx_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """SFT loss on the demonstrations that came with the episodes; a mean over those of the whole rollout batch.

        Source: InstructGPT (arXiv 2203.02155), equation 2.
        """
        ids, attention_mask, mask = (inputs[f"ptx_{name}"] for name in ("ids", "attention_mask", "mask"))
        with self._timed("ptx"):
            with self.accelerator.autocast():
                states = self.roles.trunk_states(ids, attention_mask)
            with self.roles.trunk_given(states):
                logps, _ = self._token_logps(model, ids, attention_mask, mask.size(1), temperature=1.0)
        loss = -(logps * mask).sum() / (inputs["ptx_tokens"] * self._share_of_rollout)
        self._metrics["train"]["ptx_loss"].append(self._mean(loss.detach()) * self.current_gradient_accumulation_steps)
        return self.args.ptx_coef * loss

    @property
    def _share_of_rollout(self) -> float:
        """What an optimizer step sees of a rollout batch: losses are means over that."""
        return self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def _note_ratio(self, inputs: dict[str, Any]) -> None:
        """Log the ratio of new to old policy and its KL over the micro-batch just computed."""
        mask = inputs["completion_mask"].bool()
        log_ratio = (self._logps_now - inputs["old_per_token_logps"])[mask]
        kl = self._mean(torch.expm1(log_ratio) - log_ratio)
        self._pass_kl[self._pass].append(kl)
        self._metrics["train"]["ratio"].append(self._mean(log_ratio.exp()))
        self._metrics["train"]["kl_to_old_policy"].append(kl)

    def _critic_learns(self) -> bool:
        """Whether the current pass over the rollout batch trains the critic."""
        passes = self.args.value_num_iterations
        return not self.args.freeze_value and (passes is None or self._pass % self.num_iterations < passes)

    def _passes_are_over(self) -> bool:
        """Whether an earlier pass over this rollout batch ended beyond `target_kl`; looked at between passes only."""
        before = self._pass_kl.get(self._pass - 1)
        if self.args.target_kl is not None and before and self._pass % self.num_iterations:
            self._stop_passes = self._stop_passes or sum(before) / len(before) > self.args.target_kl
        return self._stop_passes

    @property
    def _pass(self) -> int:
        """The number of the current pass over a rollout batch, counted from the start of training."""
        return int(self._step // self.args.steps_per_generation)

    # ---- optimizer: one for both, each with its own learning rate and gradient clipping

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """TRL's optimizer for the policy, or the caller's, with one more parameter group for the critic."""
        trained = dict(self.roles.trained)
        self.roles.train(POLICY)
        optimizer = super().create_optimizer(model)
        self.roles.train(*trained)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if VALUE in trained and not known & set(map(id, trained[VALUE])):
            rate = {"lr": self.args.value_learning_rate, "weight_decay": self.args.weight_decay}
            optimizer.add_param_group({"params": trained[VALUE], **rate})
        return optimizer

    def _reduce_critic(self) -> None:
        """Average the critic's gradients over processes."""
        for parameter in self.roles.trained.get(VALUE, ()):
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _clip_critic(self) -> float:
        """Clip the critic's gradients on their own, and return their norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.roles.trained[VALUE], self.args.value_max_grad_norm))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.accelerator.clip_grad_norm_(self.roles.trained[POLICY], self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # gradients are unscaled (fp16) from here on
        if any(p.grad is not None for p in self.roles.trained.get(VALUE, ())):
            value_norm = self._clip_critic()
            self.finite.refuse_norm("the gradient norm of the critic", value_norm, self.finite.rows_of_step)
            self._metrics["train"]["value_grad_norm"].append(value_norm)
        return norm

    # ---- evaluation, checkpoints

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation, with equal noise each time."""
        with machine.random_state_kept():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; over the KL budget the `objective` of an evaluation, reward - beta KL, is -inf.

        Raises:
            UserError: no completion of an evaluation got a score.
        """
        objective, kl = map(self._metrics["eval"].get, ("objective", "kl"))
        if objective and all(map(math.isnan, objective)):
            raise self._nothing_scored()
        if self.args.kl_budget is not None and kl and fmean(kl) > self.args.kl_budget:
            self._metrics["eval"]["objective"] = [-math.inf]
        super().log(logs, start_time)

    def _nothing_scored(self) -> UserError:
        names = ", ".join(f"`{name}`" for name in self.reward_func_names)
        return UserError(
            f"no completion got a score at step {self.state.global_step}: {names} gave None or NaN for every one, and "
            f"nothing can be learned from that. {RESUME}"
        )

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Generate and score; there is no loss to speak of."""
        self._prepare_inputs(inputs)
        return None, None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.roles.save_scalar(VALUE, folder / VALUE, self.return_scale.mean, self.return_scale.std)
            state = {
                "kl_coef": self.kl.coef,
                "return_scale": dataclasses.asdict(self.return_scale),
                "value_bias": self.roles.heads[VALUE].bias.item(),
                "stop_reason": self.stop_reason,
                "self_test": self.self_test_at_start,
            }
            (folder / STATE_FILE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # the Trainer's own way activates adapters one by one, which freezes the critic, and knows no heads
        folder = Path(resume_from_checkpoint)
        self.roles.load(POLICY, folder)
        state = json.loads((folder / STATE_FILE).read_text())
        self.roles.load(VALUE, folder / VALUE, bias=state["value_bias"])
        self.kl.coef = state["kl_coef"]
        self.return_scale = ReturnScale(**state["return_scale"])
        self.self_test_at_start = state["self_test"]
        self.stop_reason = self.stop_reason or state["stop_reason"]  # the best checkpoint was saved before the stop

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- small things

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(x, reduction="sum")

    def _mean(self, x: Tensor) -> float:
        """Mean over all elements, and over processes."""
        return self.accelerator.gather(x.float().nanmean()).mean().item()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.model.training:
            self._seconds[phase] += time.perf_counter() - started


def _settle_evaluations(args: PPOConfig, eval_dataset: Any) -> None:
    """Without held-out prompts nothing is evaluated.

    Raises:
        UserError: several sets of them.
    """
    if isinstance(eval_dataset, dict):
        raise UserError(
            f"eval_dataset: one set of held-out prompts, not several ({', '.join(eval_dataset)}): GRPOTrainer gives "
            "the figures of all sets the same names, and the best checkpoint would be that of the last set"
        )
    if eval_dataset is None and args.eval_strategy != "no":
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        logger.warning("no eval_dataset: no held-out prompts are scored, and the last checkpoint counts, not the best")


def _refuse_what_the_policy_did_not_write(rows: Any, given: dict[str, Any]) -> None:
    """Every token of a completion is taken for the policy's own, in the KL, the values, the advantages and the loss."""
    if taken := [name for name in ("tools", "environment_factory", "rollout_func") if given.get(name)]:
        raise UserError(
            f"{' and '.join(taken)}: completions would hold tokens that the policy did not write, and PPOTrainer "
            "trains on every token of a completion. TRL's GRPOTrainer masks them."
        )
    if images := {"image", "images"}.intersection(getattr(rows, "column_names", None) or ()):
        raise UserError(
            f"the prompts have {' and '.join(sorted(images))}, which PPOTrainer would generate from, but not score "
            "with: leave the column out, or use TRL's GRPOTrainer"
        )


class _BetweenIterations(TrainerCallback):
    """Lets checkpoints and evaluations fall between iterations: no rollout batch has to be saved, resumes are exact."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Round steps up to whole iterations; fractions of the training are resolved by now."""
        unit = args.steps_per_iteration
        for name, strategy in (("eval_steps", args.eval_strategy), ("save_steps", args.save_strategy)):
            steps = getattr(state, name)
            if strategy != "steps" or not steps:
                continue
            if steps % unit:
                setattr(state, name, math.ceil(steps / unit) * unit)
                logger.warning(
                    "%s=%g rounded up to %g, a whole number of iterations", name, steps, getattr(state, name)
                )
            if args.load_best_model_at_end:
                unit = getattr(state, name)  # what is saved has been evaluated

    def on_optimizer_step(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Zero the head's gradients: the Trainer zeroes those of the model, and the head is not in the model."""
        self.trainer.roles.heads[VALUE].zero_grad()
