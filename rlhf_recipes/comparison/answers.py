"""What policies answer and what it measures, kept in the run's folder: what is there already is not drawn again."""

import gc
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rlhf_recipes import evaluation, models, terminal
from rlhf_recipes.comparison.policies import BASE, FROM_RUN, Compared, Policy, Reward, best_of_name
from rlhf_recipes.ensembles import Ensemble
from rlhf_recipes.evaluation import Sample, scoring
from rlhf_recipes.evaluation.sampling import as_seen_by
from rlhf_recipes.evaluation.scoring import Scores
from rlhf_recipes.models import load_policy
from rlhf_recipes.rewards import RESUME
from rlhf_recipes.roles import POLICY, REWARD, Roles
from rlhf_recipes.runs import disk
from rlhf_recipes.runs.manifest import differences, flat, refuse_other_bases

logger = logging.getLogger(__name__)

KL_TO_SFT, KL_TO_BASE = "KL to SFT", "KL to base"


@dataclass
class Answers:
    """What one policy answered, `samples` completions of each prompt in a row, and what was measured of them."""

    name: str
    made: list[Sample]
    measured: dict[str, Scores] | None = None  # by measure, a value for each sample; None: not yet
    key: dict[str, Any] = field(default_factory=dict)  # what they depend on: with another, they are drawn again

    @property
    def lengths(self) -> list[float]:
        """Tokens of each completion."""
        return [float(len(s.completion_ids)) for s in self.made]

    def scores(self, measure: str) -> Scores:
        """The values of a measure; none where it was not measured."""
        return (self.measured or {}).get(measure, [])

    def write(self, file: Path) -> None:
        """Keep them for the next time."""
        disk.write(file, json.dumps(disk.plain(asdict(self))))

    @classmethod
    def read(cls, file: Path) -> "Answers | None":
        """Those that were kept; None if there are none."""
        try:
            kept = json.loads(file.read_text())
            return cls(kept["name"], [Sample(**s) for s in kept["made"]], kept["measured"], kept["key"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%r): drawn again", file, error)
            return None


class RunModels:
    """The run's base with its policies and reward model as adapters, loaded at the first use."""

    def __init__(self, cfg: DictConfig, compared: Compared, asked: Sequence[Mapping[str, Any]]):
        self.cfg, self.compared = cfg, compared
        self.asked = Dataset.from_list([dict(row) for row in asked])
        self.adapters: dict[str, str | None] = {BASE: None}  # by policy

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return models.load_tokenizer(self.cfg.model, self.asked)

    @cached_property
    def roles(self) -> Roles:
        """The base with an adapter for each stage; raises UserError where they were made on another base."""
        stages = {policy.name: policy.stage for policy in self.compared.policies if policy.stage is not None}
        if self.compared.sft is not None:
            stages = {"sft": self.compared.sft} | stages
        first, *rest = stages or [BASE]
        roles = Roles(load_policy(self.cfg, stages[first].path if stages else None), trunk=0)
        if stages:
            self.adapters[first] = POLICY
        for number, name in enumerate(rest):
            self.adapters[name] = f"policy_{number}"
            roles.add_saved(f"policy_{number}", stages[name].path)
        for reward in self.compared.rewards:
            if reward.sources.adapters:
                roles.hold(_role(reward), reward.sources.adapters, Ensemble(*reward.ensemble))
            reward.sources.functions = [
                models.load_classifier(self.cfg, by) if isinstance(by, str) else by for by in reward.sources.functions
            ]
        made_on = {made.path: made.manifest["base"] for made in stages.values()}
        refuse_other_bases(made_on, models.fingerprint(roles.model))
        roles.model.eval()
        return roles

    def free(self) -> None:
        """Let the base go, so that another model finds room."""
        self.__dict__.pop("roles", None)
        _release()


def collect(
    cfg: DictConfig, compared: Compared, run: RunModels, asked: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Answers]:
    """The answers of all policies by name, best of n included: those that are kept, and else drawn and measured now.

    Models of their own are drawn first and let go, so that no two bases are in memory.
    """
    common, most = _key(cfg, run, asked), max(compared.best_of, default=0)
    wanted = {policy.name: common | {"policy": _fingerprint(cfg, policy)} for policy in compared.policies}
    wanted |= {best_of_name(n): common | {"policy": f"best of {n}, of a pool of {most}"} for n in compared.best_of}
    files = {policy.name: folder / f"{policy.slug}.json" for policy in compared.policies}
    files |= {best_of_name(n): folder / f"{best_of_name(n)}.json" for n in compared.best_of}
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: _kept(files[name], key) for name, key in wanted.items()}
    done = {name: answers for name, answers in found.items() if answers is not None}
    for policy in compared.policies:
        if policy.name not in done and policy.source is not None:
            done[policy.name] = Answers(policy.name, _drawn_alone(cfg, policy.source, asked), key=wanted[policy.name])
            done[policy.name].write(files[policy.name])
    for policy in compared.policies:
        if policy.name not in done:
            done[policy.name] = Answers(policy.name, _drawn(cfg, run, policy.name, asked), key=wanted[policy.name])
            done[policy.name].write(files[policy.name])
        if done[policy.name].measured is None:
            measured, failed = _measured(cfg, run, policy, done[policy.name].made)
            done[policy.name].measured = measured
            if not failed:
                done[policy.name].write(files[policy.name])
    for best in _best(cfg, run, asked, [n for n in compared.best_of if best_of_name(n) not in done]):
        best.key = wanted[best.name]
        best.write(files[best.name])
        done[best.name] = best
    return {name: done[name] for name in wanted if name in done}


def _key(cfg: DictConfig, run: RunModels, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all answers, and what was measured of them, depend on beside the policy."""
    compared = run.compared
    by = {"sft": compared.sft, "reward model": compared.reward_model}
    known = {
        "prompts": disk.hash_value([dict(row) for row in asked]),
        "seed": cfg.seed,
        "samples": cfg.evaluation.samples,
        "max_new_tokens": cfg.evaluation.max_new_tokens,
        "base": {"weights": models.weights_mark(cfg.model), "dtype": cfg.model.dtype},
        "chat template": disk.hash_value(run.tokenizer.chat_template),
        "quantization": {name: str(value) for name, value in cfg.quantization.items()},
        "rewards": {reward.measure: [reward.contents, reward.weight, *reward.ensemble] for reward in compared.rewards},
        **{name: made.fingerprint for name, made in by.items() if made is not None},
    }
    plain: dict[str, Any] = disk.plain(known)
    return plain


def _fingerprint(cfg: DictConfig, policy: Policy) -> str:
    """That of the policy; what a hub id stands for may have changed since, too."""
    if policy.source is None or Path(policy.source).is_dir():
        return policy.fingerprint
    return models.weights_mark(models.with_model(cfg, policy.source).model)


def _kept(file: Path, key: dict[str, Any]) -> Answers | None:
    answers = Answers.read(file)
    if answers is None or answers.key == key:
        return answers
    changed = "; ".join(differences(flat(answers.key), flat(key)))
    terminal.say(f"The answers of {answers.name} are of another comparison ({changed}): drawn again.")
    return None


def _sampled(cfg: DictConfig, model: Any, tokenizer: Any, asked: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    evaluated = cfg.evaluation
    options = {"samples": evaluated.samples, "seed": cfg.seed} | options
    return evaluation.sample(
        model,
        tokenizer,
        asked,
        max_new_tokens=evaluated.max_new_tokens,
        batch_size=evaluated.batch_size,
        **options,
    )


def _drawn(cfg: DictConfig, run: RunModels, name: str, asked: Sequence[Mapping[str, Any]]) -> list[Sample]:
    roles = run.roles
    terminal.say(f"{name}: answering {len(asked):,} prompts, {cfg.evaluation.samples} times each ...")
    with roles.active(run.adapters[name]):
        made: list[Sample] = _sampled(cfg, roles.model, run.tokenizer, asked)
    return made


def _drawn_alone(cfg: DictConfig, source: str, asked: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The answers of a model of its own, under its own tokenizer and chat template."""
    terminal.say(f"{source}: loading, and answering {len(asked):,} prompts ...")
    own, adapter = models.with_model(cfg, source), Path(source) / "adapter_config.json"
    if adapter.exists():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        model = load_policy(models.with_model(cfg, base), adapter.parent)
    else:
        model = models.load_base(own)
    tokenizer = models.load_tokenizer(own.model, Dataset.from_list([dict(row) for row in asked]))
    made: list[Sample] = _sampled(cfg, model, tokenizer, asked)
    del model
    _release()
    return made


def _measured(
    cfg: DictConfig, run: RunModels, policy: Policy, made: Sequence[Sample]
) -> tuple[dict[str, Scores], bool]:
    """Rewards and KL of each sample, as far as the run has what it takes; and whether a reward failed."""
    size, compared, roles = cfg.evaluation.batch_size, run.compared, run.roles
    seen = made if policy.source is None else [as_seen_by(run.tokenizer, s) for s in made]
    found, failed = _rewards(cfg, run, seen)
    if policy.source is not None:
        return found, failed  # of another tokenizer, maybe: no KL
    references = {KL_TO_SFT: "sft"} if compared.sft is not None else {}
    for name, reference in (references | {KL_TO_BASE: BASE}).items():
        adapters = {"policy": run.adapters[policy.name], "reference": run.adapters[reference]}
        found[name] = evaluation.kl(roles, run.tokenizer, made, size, **adapters)
    return found, failed


def _rewards(cfg: DictConfig, run: RunModels, made: Sequence[Sample]) -> tuple[dict[str, Scores], bool]:
    """The rewards of each sample by measure: `reward`, where it is a sum each of its parts, and any others.

    One that fails (a function that wants another column, an endpoint that is gone) is told, and left out.
    """
    found: dict[str, Scores] = {}
    for reward in run.compared.rewards:
        try:
            by = reward.sources, run.roles, run.tokenizer, made, cfg.evaluation.batch_size, _role(reward)
            (found[reward.measure],) = scoring.by_source(*by).values()
        except Exception as error:  # of whatever somebody else's function does
            terminal.say(f"{reward.name} is not measured: {str(error).removesuffix(RESUME)}")
    failed = len(found) < len(run.compared.rewards)
    parts = [reward for reward in run.compared.rewards if reward.weight]
    if parts and "reward" not in found and all(reward.measure in found for reward in parts):
        found["reward"] = scoring.total([found[r.measure] for r in parts], [r.weight for r in parts])
    return found, failed


def _role(reward: Reward) -> str:
    """What holds its adapters on the base: the role `reward` for the run's own, which others look for there."""
    return REWARD if reward.name == FROM_RUN else reward.measure.replace(".", "_")


def _best(cfg: DictConfig, run: RunModels, asked: Sequence[Mapping[str, Any]], wanted: Sequence[int]) -> list[Answers]:
    """For each n the answers with the highest reward among n of SFT; one pool serves all n."""
    if not wanted:
        return []
    most, samples = max(run.compared.best_of), cfg.evaluation.samples  # whatever is missing of them, one pool
    terminal.say(f"best of {', '.join(map(str, wanted))}: sampling {most} answers of sft for each one kept ...")
    with run.roles.active(run.adapters["sft"]):
        # another seed: the pool shall not hold the very answers that it is compared with
        pool = _sampled(cfg, run.roles.model, run.tokenizer, asked, samples=most * samples, seed=cfg.seed + 1)
    measured, _ = _rewards(cfg, run, pool)
    if "reward" not in measured:
        terminal.say("No best of n: there is no reward to pick by.")
        return []
    picked_by = [-math.inf if score is None else score for score in measured["reward"]]
    best = []
    for n in wanted:
        groups = [range(start, start + n) for start in range(0, len(pool), most)]
        rows = [max(group, key=lambda row: picked_by[row]) for group in groups]
        kept: dict[str, Scores] = {name: [scores[row] for row in rows] for name, scores in measured.items()}
        best.append(Answers(best_of_name(n), [pool[row] for row in rows], kept))
    return best


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
