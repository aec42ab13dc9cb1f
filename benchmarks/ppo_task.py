"""The PPO task that all tools of the comparison are given: base, prompts, reward model, and a judge of the results.

The prompts are made by a grammar, 25 tokens each in plain ChatML. The reward model likes cheerful words; it is trained
once, by `recipes.rm`, and written down in each tool's form. What a tool's policies have become is judged on held-out
prompts by that same reward model.
"""

import json
import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.evaluation.intervals import summarize

logger = logging.getLogger(__name__)

Conversation = list[dict[str, str]]

REPOSITORY = Path(__file__).parent.parent

PROMPT_TOKENS, NEW_TOKENS = 25, 24
EPISODES, MICRO_BATCH, PASSES = 32, 8, 2
STEPS = PASSES * EPISODES // MICRO_BATCH  # optimizer steps of an iteration: one for each micro-batch
RANK, ALPHA = 16, 32
LEARNING_RATE = 3e-4
KL_COEFFICIENT = 0.2  # LLaMA-Factory's, which cannot be set there; so it is everybody's
HELD_OUT = 64  # prompts
SAMPLES = 4  # completions of each that the judge reads; verdicts say how well the means are known

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)
"""No default system prompt: LLaMA-Factory and swift would write another one than the model's own template does."""

PEOPLE = (
    *("the old fisherman", "a young teacher", "the new baker", "my quiet neighbour", "the village doctor"),
    *("a tired painter", "the night watchman", "a lonely sailor", "the little girl", "our oldest gardener"),
)
ACTS = (
    *("spent a long morning", "found an old letter", "waited for the train", "walked home", "met a stranger"),
    *("looked for a lost cat", "began a new day", "heard a strange sound", "sat down to eat", "bought a small boat"),
)
PLACES = (
    *("in the harbour", "by the river", "on the hill", "near the market", "at the station", "under the bridge"),
    *("in a small garden", "behind the school", "on the empty road", "at the edge of town"),
)
ASKS = ("Describe in one sentence how", "Tell me in a few words how", "Write one short sentence about how")

CHEERFUL = ("happy", "bright", "delighted", "cheerful", "wonderful", "joyful", "smiling", "lovely", "warm", "grateful")
NEUTRAL = ("usual", "plain", "ordinary", "quiet", "common", "regular", "simple", "even", "modest", "steady")
GLOOMY = ("sad", "dark", "bitter", "gloomy", "terrible", "angry", "lonely", "cold", "afraid", "tired")
ANSWERS = (
    "It was a {} morning, and everyone felt {} and {}.",
    "A {} day began, {} and {} as never before.",
    "With a {} heart and a {} face, it became a {} day.",
    "The air was {}, the people were {}, and all seemed {}.",
)


@dataclass(frozen=True)
class Task:
    """Where the parts of the task lie."""

    folder: Path
    dtype: str  # of the base and the classifier: a name of torch's

    @property
    def base(self) -> Path:
        """The base, as transformers 5 reads it, with a pad token of its own."""
        return self.folder / "base"

    @property
    def reward_adapter(self) -> Path:
        """The reward model as a LoRA adapter with its head, for us."""
        return self.folder / "reward-adapter"

    @property
    def classifier(self) -> Path:
        """The same merged into a sequence classifier, for the rivals and the judge."""
        return self.folder / "classifier"

    @property
    def prompts(self) -> Path:
        """Conversations of one user turn, one a line: `{"prompt": [...]}`."""
        return self.folder / "prompts.jsonl"

    @property
    def held_out(self) -> Path:
        """The prompts of the judge, in the same form."""
        return self.folder / "held-out.jsonl"


def prepare(cache: Path, model: str, dtype: str) -> Task:
    """Make the task for a base model, a hub id or folder whose tokenizer knows ChatML; what is there is kept."""
    folder = cache / f"task-{Path(model).name.lower()}-{dtype}"
    task = Task(folder, dtype)
    if (folder / "ready").exists():
        return task
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_base(task, model)
    _write_data(task)
    _export_reward_model(task, train_on_rankings("rm", task, task.folder / "runs"))
    (folder / "ready").touch()
    return task


def _write_base(task: Task, model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=task.dtype)
    tokenizer.chat_template = CHATML
    # The tools disagree on where a reward model reads a sequence that ends in EOS if padding is EOS too: at the EOS, or
    # before it. With another pad token all read it at the EOS.
    tokenizer.pad_token = "<|endoftext|>"
    base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.pad_token_id
    base.config.eos_token_id = base.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(task.base)
    base.save_pretrained(task.base)


def _write_data(task: Task) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.base)
    chance = random.Random(0)
    asked = [f"{ask} {who} {did} {where}." for ask, who, did, where in product(ASKS, PEOPLE, ACTS, PLACES)]
    chance.shuffle(asked)
    conversations = [[{"role": "user", "content": text}] for text in asked]
    encoded = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]
    fitting = [c for c, ids in zip(conversations, encoded, strict=True) if len(ids) == PROMPT_TOKENS]
    if len(fitting) < 2 * HELD_OUT:
        raise ValueError(f"only {len(fitting)} prompts have {PROMPT_TOKENS} tokens with this tokenizer")
    write_lines(task.held_out, [{"prompt": prompt} for prompt in fitting[:HELD_OUT]])
    write_lines(task.prompts, [{"prompt": prompt} for prompt in fitting[HELD_OUT:]])
    rankings = [_ranking(chance.choice(fitting[HELD_OUT:]), chance) for _ in range(400)]
    write_lines(task.folder / "rankings.jsonl", rankings)


def _ranking(prompt: Conversation, chance: random.Random) -> dict[str, Any]:
    """A prompt with four answers, ranked by how cheerful their words are."""
    answers = []
    for _ in range(4):
        words = [chance.choice((CHEERFUL, NEUTRAL, GLOOMY)) for _ in range(3)]
        text = chance.choice(ANSWERS).format(*(chance.choice(kind) for kind in words))
        answers.append((words.count(CHEERFUL) - words.count(GLOOMY), text))
    scores = sorted({score for score, _ in answers}, reverse=True)
    ranking = [scores.index(score) + 1 for score, _ in answers]
    return {"prompt": prompt, "responses": [text for _, text in answers], "ranking": ranking}


def train_on_rankings(recipe: str, task: Task, runs: Path, *overrides: str) -> Path:
    """Run `recipes.rm` or `recipes.dpo` on the task's rankings, and return the folder of what it made."""
    options = [
        f"data.preferences.path={task.folder / 'rankings.jsonl'}",
        f"data.prompts.path={task.prompts}",
        "training.max_steps=60",
        "training.learning_rate=5e-4",
        "training.per_device_train_batch_size=16",
        "training.gradient_accumulation_steps=1",
        f"evaluation.max_new_tokens={NEW_TOKENS}",
        "evaluation.batch_size=64",
    ]
    command = ["-m", f"recipes.{recipe}", *recipe_options(task, runs), *options, *overrides]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    return runs / "task" / recipe


def recipe_options(task: Task, runs: Path) -> list[str]:
    """What every recipe is told: this base in its dtype, no SFT stage, LoRA as everybody has it, files for data."""
    return [
        f"runs_dir={runs}",
        "run=task",
        "start=model",
        "data=files",
        "model=smollm2-135m",  # lest the embedded world's own settings hold, those of the default group
        f"model.name_or_path={task.base}",
        f"model.dtype={task.dtype}",
        f"lora.r={RANK}",
        f"lora.lora_alpha={ALPHA}",
        "training.gradient_checkpointing=false",
        "training.use_cpu=true",
    ]


def _export_reward_model(task: Task, trained: Path) -> None:
    """Write the reward model once as an adapter and once merged, with scores of spread 1 on the base's own answers.

    The recipes take mean and spread off the scores in PPO. A classifier's head has no bias to do so; so the spread goes
    into the head's weight, and the mean stays, for all tools alike.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spread = json.loads((trained / "metrics.json").read_text())["scale"]["std"]
    task.reward_adapter.mkdir()
    shutil.copy(trained / "adapter_config.json", task.reward_adapter)
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors = {key: value / spread if key.endswith("score.weight") else value for key, value in tensors.items()}
    save_file(tensors, task.reward_adapter / "adapter_model.safetensors")
    (task.reward_adapter / "head.json").write_text(json.dumps({"mean": 0.0, "std": 1.0}))

    classifier = AutoModelForSequenceClassification.from_pretrained(task.base, num_labels=1, dtype=torch.float32)
    merged = PeftModel.from_pretrained(classifier, task.reward_adapter).merge_and_unload()
    merged.to(getattr(torch, task.dtype)).save_pretrained(task.classifier)
    AutoTokenizer.from_pretrained(task.base).save_pretrained(task.classifier)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_prompts(path: Path) -> list[Conversation]:
    """The conversations of a prompts file."""
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def prompts_for_rival(task: Task, iterations: int) -> list[Conversation]:
    """As many prompts as the iterations take: some tools have no other way to be told how many episodes to make."""
    return list(islice(cycle(read_prompts(task.prompts)), iterations * EPISODES))


@dataclass(frozen=True)
class Verdict:
    """What a policy is worth on the held-out prompts."""

    reward: float  # mean score by the common reward model
    kl: float  # to the base, in nats per completion: summed over the vocabulary at every position, not estimated
    reward_half_width: float = float("nan")  # of the 95% interval over prompts
    kl_half_width: float = float("nan")
    k3: float = float("nan")  # the same KL estimated from the sampled tokens: its tail is heavy

    @property
    def objective(self) -> float:
        """What all tools maximize: the reward less the KL coefficient times the KL."""
        return self.reward - KL_COEFFICIENT * self.kl


class Judge:
    """Judges policies by what they answer to the held-out prompts, with the same noise for all."""

    def __init__(self, task: Task) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        self.task = task
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        tokenizer = AutoTokenizer.from_pretrained(task.base)
        base = AutoModelForCausalLM.from_pretrained(task.base, dtype=task.dtype)
        classifier = AutoModelForSequenceClassification.from_pretrained(task.classifier, dtype=task.dtype)
        # on a CPU, a bf16 linear layer on a slice copies its weight once for every row: the LM head, in `generate`
        base.lm_head.register_forward_pre_hook(lambda _, args: tuple(x.contiguous() for x in args))
        prompts = [prompt for prompt in read_prompts(task.held_out) for _ in range(SAMPLES)]
        self.policy: Any = get_peft_model(base, config).eval()
        self.classifier: Any = classifier.eval()
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.ids: Any = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]  # all of one length: no padding

    def verdict_on(self, snapshot: Path | None, *, again: bool = False) -> Verdict:
        """Of a policy on disk, or of the base: kept beside it, and read from there unless it is wanted `again`."""
        file = snapshot.with_suffix(".json") if snapshot else self.task.folder / "base-verdict.json"
        if again or not file.exists():
            file.write_text(json.dumps(vars(self.verdict(snapshot))))
        return Verdict(**json.loads(file.read_text()))

    def verdict(self, adapter: Path | None) -> Verdict:
        """Of the policy with these LoRA weights; without any, of the base."""
        import torch
        from peft.utils import set_peft_model_state_dict
        from safetensors.torch import load_file

        if adapter is not None:
            set_peft_model_state_dict(self.policy, load_file(adapter))
        torch.manual_seed(0)
        with torch.inference_mode():
            measured = [self._measure(some) for some in self.ids.split(4 * EPISODES)]
        rewards, kls, k3s = (torch.cat(parts).tolist() for parts in zip(*measured, strict=True))
        by_prompt = summarize({"reward": rewards, "kl": kls}, SAMPLES)
        (reward, reward_half_width), (kl, kl_half_width) = by_prompt["reward"], by_prompt["kl"]
        verdict = Verdict(reward, kl, reward_half_width, kl_half_width, fmean(k3s))
        logger.info("%s: reward %.2f, KL %.2f nats (k3 %.2f)", adapter or "the base", reward, kl, verdict.k3)
        return verdict

    def _measure(self, prompts: Any) -> tuple[Any, Any, Any]:
        """Reward, exact KL to the base and its k3 estimate (b,) of a completion of each prompt (b, p)."""
        import torch

        sampled = self.policy.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sequences, steps = sampled.sequences, len(sampled.logits)
        mask = sequences != self.pad
        rewards = self.classifier(input_ids=sequences, attention_mask=mask).logits[:, 0].float()
        with self.policy.disable_adapter():
            logits = [
                self.policy(input_ids=some, attention_mask=there, logits_to_keep=steps + 1).logits[:, :-1]
                for some, there in zip(sequences.split(EPISODES), mask.split(EPISODES), strict=True)
            ]
        kls, k3s = [], []
        for row, base_logits in enumerate(logits for part in logits for logits in part):
            logps, base_logps = (
                x.float().log_softmax(-1) for x in (torch.stack([s[row] for s in sampled.logits]), base_logits)
            )
            there = mask[row, prompts.size(1) :]
            kls.append(((logps.exp() * (logps - base_logps)).sum(-1) * there).sum())
            chosen = sequences[row, prompts.size(1) :, None]
            logp, base_logp = logps.gather(-1, chosen)[:, 0], base_logps.gather(-1, chosen)[:, 0]
            k3s.append(((torch.expm1(base_logp - logp) + logp - base_logp) * there).sum())
        return rewards, torch.stack(kls), torch.stack(k3s)
