"""The least that PPO with four roles on one base and a shared trunk can cost: a loop with nothing around it.

No checkpoints, metrics, logs, masks for several processes or options: what a trainer takes more than this, it takes for
those. `benchmarks.ppo_vs_bare_loop` measures the two side by side.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

ROLES = ("default", "ref", "reward", "value")
CLIP, VALUE_CLIP, GAMMA, LAMBDA = 0.2, 0.2, 1.0, 0.95


class Loop:
    """Policy, reference, reward and value as adapters on one base whose lower layers are shared and frozen."""

    def __init__(self, base: Path, dtype: str, reward: Path, rank: int, alpha: int, trunk: int, rate: float) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config)
        for role in ROLES[1:]:
            self.model.add_adapter(role, config)
        self.decoder = model.model
        self.trunk = list(self.decoder.layers[:trunk])
        self.heads = {role: nn.Linear(model.config.hidden_size, 1, bias=False) for role in ROLES[2:]}
        names = dict(self.model.named_parameters())
        for name, parameter in names.items():
            source = next((name.replace(f".{role}.", ".default.") for role in ROLES[1:] if f".{role}." in name), name)
            parameter.data = names[source].data.float() if "lora_" in name else parameter.data
        saved = load_file(reward / "adapter_model.safetensors")
        head = saved.pop("base_model.model.score.weight")
        for role, module in self.heads.items():
            set_peft_model_state_dict(self.model, saved, adapter_name=role)
            module.weight.data.copy_(head)
        self.upper = {id(p) for layer in self.decoder.layers[trunk:] for p in layer.parameters()}
        # a bf16 linear layer on a slice copies its weight once for every row on a CPU
        model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.trained = [self._copied(role) for role in ("default", "value")]
        self.optimizer = torch.optim.AdamW([*self.trained[0], *self.trained[1]], lr=rate, weight_decay=0.0)
        self._act_as("default")

    def _copied(self, role: str) -> list[nn.Parameter]:
        """The role's own weights above the trunk, in storage of their own."""
        own = [p for name, p in self.model.named_parameters() if f".{role}." in name and id(p) in self.upper]
        for parameter in own:
            parameter.data = parameter.data.clone()
        return own + list(self.heads[role].parameters() if role in self.heads else ())

    def _act_as(self, role: str) -> None:
        self.model.set_adapter(role)
        self.model.requires_grad_(False)
        for parameters in self.trained:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def _as(self, role: str, trunk: Tensor | None) -> Iterator[None]:
        """One role active, and in place of the lower layers their output."""
        self._act_as(role)
        for layer in self.trunk if trunk is not None else ():
            layer.forward = lambda hidden, *_, first=layer is self.trunk[0], **__: trunk if first else hidden
        yield
        for layer in self.trunk if trunk is not None else ():
            del layer.forward

    def _logps(self, ids: Tensor, new: int) -> Tensor:
        logits = self.model(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits[:, :-1].float()
        return torch.log_softmax(logits, -1).gather(-1, ids[:, -new:, None])[..., 0]

    def _hidden(self, ids: Tensor, new: int) -> Tensor:
        """Hidden states before each new token, and after the last one."""
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -new - 1 :].float()

    @torch.no_grad()
    def _trunk_of(self, ids: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = self.trunk[-1].register_forward_hook(lambda _, __, output: kept.append(output))
        above = self.decoder.layers[len(self.trunk) :]
        for layer in above:
            layer.forward = lambda hidden, *_, **__: hidden
        self.decoder(input_ids=ids, use_cache=False)
        for layer in above:
            del layer.forward
        hook.remove()
        return kept[0]

    @torch.no_grad()
    def rollout(self, prompts: Tensor, new: int, micro_batch: int, beta: float) -> dict[str, Tensor]:
        """Generate for prompts (b, p) of equal length, score, and compute advantages and returns (b, new)."""
        self.model.eval()
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new}
        mask = torch.ones_like(prompts)
        ids = self.model.generate(prompts, attention_mask=mask, pad_token_id=self.tokenizer.pad_token_id, **options)
        parts: dict[str, list[Tensor]] = {"trunk": [], "logps": [], "ref": [], "score": [], "values": []}
        for chunk in ids.split(micro_batch):
            trunk = self._trunk_of(chunk)
            parts["trunk"].append(trunk)
            with self._as("default", trunk):
                parts["logps"].append(self._logps(chunk, new))
            with self._as("ref", trunk):
                parts["ref"].append(self._logps(chunk, new))
            with self._as("reward", trunk):
                parts["score"].append(self.heads["reward"](self._hidden(chunk, new)[:, -1])[:, 0])
            with self._as("value", trunk):
                parts["values"].append(self.heads["value"](self._hidden(chunk, new)[:, :-1])[..., 0])
        made = {name: torch.cat(rows) for name, rows in parts.items()}
        rewards = -beta * (made["logps"] - made["ref"])
        rewards[:, -1] += made["score"]
        advantages, running, following = torch.zeros_like(rewards), torch.zeros(len(ids)), torch.zeros(len(ids))
        for i in reversed(range(new)):
            delta = rewards[:, i] + GAMMA * following - made["values"][:, i]
            running, following = delta + GAMMA * LAMBDA * running, made["values"][:, i]
            advantages[:, i] = running
        returns = advantages + made["values"]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return made | {"ids": ids, "advantages": advantages, "returns": returns}

    def train(self, made: dict[str, Tensor], new: int, micro_batch: int, passes: int) -> None:
        """Passes over the rollout batch, with one optimizer step for each micro-batch."""
        self.model.train()
        for _ in range(passes):
            for rows in torch.randperm(len(made["ids"])).split(micro_batch):
                batch = {name: tensor[rows] for name, tensor in made.items()}
                with self._as("value", batch["trunk"]):
                    values = self.heads["value"](self._hidden(batch["ids"], new)[:, :-1])[..., 0]
                    clipped = batch["values"] + (values - batch["values"]).clamp(-VALUE_CLIP, VALUE_CLIP)
                    errors = [(v - batch["returns"]) ** 2 for v in (values, clipped)]
                    (0.5 * torch.maximum(*errors).mean()).backward()
                with self._as("default", batch["trunk"]):
                    ratio = (self._logps(batch["ids"], new) - batch["logps"]).exp()
                    gains = [r * batch["advantages"] for r in (ratio, ratio.clamp(1 - CLIP, 1 + CLIP))]
                    (-torch.minimum(*gains).mean()).backward()
                for parameters in self.trained:
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()


def main() -> None:
    """Run some iterations on the prompts of a file, all of one length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    parser.add_argument("--reward", type=Path, required=True, help="a reward model: LoRA adapter with a score head")
    parser.add_argument("--prompts", type=Path, required=True, help="conversations, one a line")
    parser.add_argument("--iterations", type=int, required=True)
    for name in ("episodes", "micro-batch", "passes", "new-tokens", "trunk", "rank", "alpha", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("rate", "beta"):
        parser.add_argument(f"--{name}", type=float, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = (options.base, options.dtype, options.reward)
    loop = Loop(*model, options.rank, options.alpha, options.trunk, options.rate)
    prompts = [json.loads(line)["prompt"] for line in options.prompts.read_text().splitlines()]
    encoded = loop.tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    for i in range(options.iterations):
        rows = torch.arange(i * options.episodes, (i + 1) * options.episodes) % len(encoded)
        made = loop.rollout(encoded[rows], options.new_tokens, options.micro_batch, options.beta)
        loop.train(made, options.new_tokens, options.micro_batch, options.passes)


if __name__ == "__main__":
    main()
