"""The passes of each stage as our trainers and TRL's make them, on a model of few layers whose tensors have no data."""

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate.utils import convert_outputs_to_fp32
from omegaconf import DictConfig
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.kernels import chunked_logprob

from rlhf_recipes.models import keep_gradients_off_inputs
from rlhf_recipes.plan.dry_run import Meter, dry_run, skeleton, without_data
from rlhf_recipes.plan.shapes import model_config
from rlhf_recipes.portions import prefill_chunk, rows_at_once
from rlhf_recipes.rewards import named_models
from rlhf_recipes.roles import GUARD, POLICY, REFERENCE, REWARD, VALUE, Roles, member

TILE = 32768  # columns of logits that TRL's fused LM head holds at once
IN_PLACE = ("_forward_tile", "_backward_tile", "_addmm_fp32")  # its functions that copy nothing on a GPU
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name changed


def adapters(stage: str, cfg: DictConfig) -> list[str]:
    """The adapters that a stage holds, the trained one first."""
    if stage not in ("ppo", "dpo"):
        return [POLICY]
    judged = [member(GUARD, i) for i in range(len(named_models(cfg.guard.model)))]
    if stage == "dpo":
        return [POLICY, REFERENCE, *judged]
    return [POLICY, REFERENCE, VALUE, *(member(REWARD, i) for i in range(len(named_models(cfg.reward.model)))), *judged]


class Passes:
    """A stage's passes, one method each, over `below` layers of trunk, `above` trained ones and `top` frozen ones.

    Args:
        args: the stage's training arguments.
        dtype: of the base.
        device: `cuda` or `cpu`, whose kernels count; the tensors say `cpu` in both cases, so that no GPU is needed.
        prompt_length: tokens of the prompts of what is sampled.
    """

    def __init__(
        self,
        stage: str,
        cfg: DictConfig,
        args: Any,
        dtype: torch.dtype,
        device: str,
        prompt_length: int,
        below: int,
        above: int,
        top: int = 0,
    ) -> None:
        self.stage, self.cfg, self.args, self.dtype, self.device = stage, cfg, args, dtype, device
        self.prompt_length = prompt_length
        self.trained = [POLICY, *[VALUE] * (stage == "ppo" and not args.freeze_value)]
        config = model_config(cfg.model)
        self.hidden, self.vocabulary = config.get_text_config().hidden_size, config.get_text_config().vocab_size
        self.wide = frozenset({self.vocabulary, self.vocabulary % TILE, TILE})
        self.model = skeleton(cfg, config, dtype, below + above + top, classifier=stage == "rm")
        with torch.device("meta"):
            self.roles = Roles(self.model, trunk=0)
            for adapter in adapters(stage, cfg)[1:]:
                self.roles.add_copy(adapter, POLICY)
            if stage == "ppo":
                self.roles.add_head(VALUE)
        self.roles.frozen_layers, self.roles.trunk_layers = below, below if stage == "ppo" else 0
        self.roles.frozen_top = self.roles.layers[below + above :]
        self.meter: Meter

    def measure(self, names: Container[str] | None = None) -> dict[str, dict[str, int]]:
        """Bytes by part at the peak of some of the phases, beyond weights, adapters, gradients and optimizer."""
        with dry_run(self.wide) as self.meter, _kernels(self.device):
            for module in (self.model, *self.roles.heads.values()):
                without_data(module)
            self.roles.train(*self.trained)
            for parameters in self.roles.trained.values():
                for parameter in parameters:  # as they are from the second micro-batch of a step on
                    parameter.grad = torch.zeros_like(parameter)
            self.model.train()
            if self.args.gradient_checkpointing:
                if self.roles.frozen_layers:
                    keep_gradients_off_inputs(self.model)
                self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            taken = {}
            for phase, run in self.phases().items():
                if names is None or phase in names:
                    self.meter.begin()
                    run()
                    taken[phase] = self.meter.taken()
            return taken

    def phases(self) -> dict[str, Callable[[], None]]:
        """What the stage does, in order."""
        args, evaluation = self.args, self.cfg.evaluation
        rows = args.per_device_train_batch_size
        if self.stage == "ppo":
            rollout = args.rollout_batch_size or args.generation_batch_size
            found = {
                "rollouts, prompts": lambda: self.read_prompts(rollout),
                "rollouts, last token": lambda: self.last_token(rollout, args.max_completion_length),
                "scoring": torch.no_grad()(lambda: self.episodes(POLICY, rows)),
                **({} if args.freeze_value else {"value pass": lambda: self.episodes(VALUE, rows)}),
                "policy pass": lambda: self.episodes(POLICY, rows),
            }
        else:
            evaluated = args.per_device_eval_batch_size
            found = {
                "training": lambda: self.micro_batch(rows),
                "evaluation": torch.no_grad()(lambda: self.micro_batch(evaluated)),
            }
        if evaluation.prompts or self.stage == "rm":
            found["samples, prompts"] = lambda: self.read_prompts(evaluation.batch_size)
            found["samples, last token"] = lambda: self.last_token(evaluation.batch_size, evaluation.max_new_tokens)
        if evaluation.prompts and self.stage != "rm":
            found["samples, KL"] = lambda: self.score(evaluation.batch_size, evaluation.max_new_tokens)
        return found

    # ---- forward and backward

    def micro_batch(self, rows: int) -> None:
        """One of SFT, or of pairs."""
        ids, mask = _tokens(rows if self.stage == "sft" else 2 * rows, self.args.max_length)
        loss = self.loss(ids, mask)
        if self.stage == "dpo" and not self.args.precompute_ref_log_probs:
            with torch.no_grad(), self.roles.active(REFERENCE):
                self.loss(ids, mask)
        if torch.is_grad_enabled():
            loss.backward()

    def loss(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As far as memory goes."""
        with self.autocast():
            if self.stage == "rm":
                return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().sum()
            return self.fused_logps(ids, mask, ids.size(1) - 1).sum()

    def episodes(self, role: str, rows: int) -> None:
        """A micro-batch of PPO under the policy or the value adapter, with the trunk given."""
        completion = self.args.max_completion_length
        ids, mask = _tokens(rows, self.prompt_length + completion)
        states = torch.empty(*ids.shape, self.hidden, dtype=self.dtype) if self.roles.trunk_layers else None
        self.meter.begin()  # those of the whole rollout batch are counted elsewhere
        with self.roles.active(role), self.roles.trunk_given(states):
            if role == VALUE:
                with self.autocast():
                    hidden = self.roles.hidden_states(ids, mask)[:, -completion - 1 : -1]
                result = self.roles.scalars(VALUE, hidden)
                del hidden
            elif self.device == "cuda":
                with self.autocast():
                    result = self.fused_logps(ids, mask, completion)
            else:
                forward = convert_outputs_to_fp32(self.autocast()(self.model.forward))  # as accelerate wraps it
                result = self.roles.token_logps(ids, mask, completion, model=forward)[0]
            if torch.is_grad_enabled():
                result.sum().backward()

    def fused_logps(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """Log-probabilities of the last `length` tokens by TRL's LM head, which holds one tile of logits at a time."""
        hidden = self.roles.hidden_states(ids, mask)[:, -length - 1 : -1]
        head = self.model.get_output_embeddings()
        outputs = ("log_probs", "entropy", "is_top1") if self.stage == "sft" else ("log_probs",)
        targets = ids[:, -length:].reshape(-1)
        return chunked_logprob.ChunkedLogProbFunction.apply(
            hidden.reshape(-1, self.hidden), head.weight, head.bias, targets, 1.0, TILE, None, 1.0, outputs
        )[0]

    def autocast(self) -> torch.autocast:
        """Mixed precision as the Trainer sets it."""
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    # ---- generation

    @torch.no_grad()
    def read_prompts(self, rows: int) -> None:
        """The first pass of `generate`, or the last of those that read the prompts by chunks: the cache is there."""
        chunk = prefill_chunk(rows, self.prompt_length, self.device) or self.prompt_length
        self.draw(*self.beyond(rows, self.prompt_length - chunk, chunk))

    @torch.no_grad()
    def last_token(self, rows: int, completion: int) -> None:
        """The last pass of `generate`, when the cache is full and each layer's part is copied in turn."""
        self.draw(*self.beyond(rows, self.prompt_length + completion - 1, 1))

    def beyond(self, rows: int, before: int, new: int) -> tuple[Tensor, Any]:
        """Logits after `new` tokens that follow on `before` ones in the cache, and the cache."""
        ids, mask = _tokens(rows, new)
        cache = None
        if before:
            _, cache = self.next_token(ids, mask)
            for layer in _filled(cache):
                kept = (layer.keys, layer.values)
                layer.keys, layer.values = (x.new_empty(*x.shape[:2], before, x.shape[3]) for x in kept)
            del kept
            self.meter.restart()
        return self.next_token(ids, _tokens(rows, before + new)[1], cache)

    @torch.no_grad()
    def score(self, rows: int, completion: int) -> None:
        """The pass over samples for their KL, which has logits."""
        length = self.prompt_length + completion
        rows = rows_at_once(rows, length, self.device, logits=completion * self.vocabulary)
        self.roles.token_logps(*_tokens(rows, length), completion)

    def draw(self, logits: Tensor, cache: Any) -> None:
        """A token from logits (rows, vocabulary) as `generate` draws it, with the cache counted apart."""
        scores = logits.to(torch.float32, copy=True)
        torch.multinomial(torch.softmax(scores / 1.0, dim=-1), 1)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in _filled(cache))
        self.meter.peak.update({"cache": size, "activations": -size})

    def next_token(self, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits of the next token, and the cache."""
        output = self.model.get_base_model()(
            input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE: cache}
        )
        return output.logits[:, -1], output[CACHE]


def _tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, length)."""
    return torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)


def _filled(cache: Any) -> list[Any]:
    """The layers of a cache that hold something: those that there are of the config's."""
    return [layer for layer in cache.layers if layer.keys is not None]


@contextmanager
def _kernels(device: str) -> Iterator[None]:
    """On a GPU, TRL's LM head works on its tile in place, in Triton; elsewhere torch makes copies of the tile."""
    with ExitStack() as patched:
        for name in IN_PLACE if device == "cuda" else ():
            patched.enter_context(mock.patch.object(chunked_logprob, name, lambda *args, **kwargs: None))
        yield
