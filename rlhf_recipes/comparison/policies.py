"""Which policies are compared, and on which prompts; settled before any model is loaded."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import data, rewards, terminal
from rlhf_recipes.errors import UserError
from rlhf_recipes.rewards import Rewards
from rlhf_recipes.runs import Made, disk, finished, run_folder
from rlhf_recipes.runs.contents import contents
from rlhf_recipes.runs.manifest import MANIFEST, read_manifest

BASE, REWARD = "base", "reward"
FROM_RUN = "the run's reward model"
STAGES = ("sft", "dpo", "ppo")
"""Stages that make a policy, in the order they are shown."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HHH = Path(__file__).parent / "hhh.jsonl"
"""The project's own prompts: what is asked, and which of helpful, honest and harmless it tries."""
CATEGORY = "category"


@dataclass(frozen=True)
class Policy:
    """One policy to compare."""

    name: str
    stage: Made | None = None  # of the run, an adapter on its base
    source: str | None = None  # or a model of its own: a folder or a hub id; neither: the run's base
    fingerprint: str = BASE  # equal weights, equal fingerprint, as far as can be seen before they are loaded
    optimized: frozenset[str] = frozenset()  # the rewards it was trained on, by what identifies them

    @property
    def slug(self) -> str:
        """The name as that of a file."""
        return re.sub(r"[^\w.+=,-]", "_", self.name)


@dataclass(frozen=True)
class Reward:
    """One reward of the run: its own reward model, or what a policy of it was trained on."""

    name: str  # as a judge
    measure: str  # as a measure of answers
    marks: frozenset[str]  # what identifies it, or the members of an ensemble
    sources: Rewards  # it alone
    contents: str  # equal contents, equal scores, as far as can be seen
    ensemble: tuple[str, float] = ("mean", 1.0)  # of several reward models: `reward.ensemble`, `reward.spread_coef`
    weight: float = 0.0  # in what is called `reward`, the sum that PPO optimised; without PPO the reward model alone


@dataclass(frozen=True)
class Compared:
    """What a comparison is of: policies, and the stages and rewards that they are measured by."""

    policies: list[Policy]
    baseline: str
    sft: Made | None = None  # the KL is taken to it, and the best of n is picked from its answers
    reward_model: Made | None = None  # the run's
    best_of: list[int] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)

    def optimized(self, name: str) -> frozenset[str]:
        """What a policy was trained on; the best of n was picked by it."""
        trained = {policy.name: policy.optimized for policy in self.policies}
        return trained[name] if name in trained else frozenset(m for r in self.rewards if r.weight for m in r.marks)


def resolve(cfg: DictConfig) -> Compared:
    """The policies that the config asks for; by default the base and all finished stages of the run.

    Raises:
        UserError: a policy that is no stage, folder or hub id, a stage that is not finished, a baseline that is not
            among them, or nothing to compare; all faults in one message.
    """
    run = run_folder(cfg)
    there = [name for name in STAGES if _is_finished(run / name)]
    reward_model = finished(cfg, "rm") if _is_finished(run / "rm") else None
    wanted = cfg.eval.policies if cfg.eval.policies is not None else [BASE, *there]
    faults, policies = [], []
    if cfg.eval.policies is None and not there:
        faults.append(
            f"{run} has no finished policy yet. Make one first: make sft, or name models: eval.policies=[...]"
        )
    for name in dict.fromkeys(wanted):
        try:
            policies.append(_policy(cfg, run, name, reward_model))
        except UserError as error:
            faults.append(str(error))
    sft = finished(cfg, "sft") if "sft" in there else None
    baseline = cfg.eval.baseline or ("sft" if sft else BASE)
    names = [policy.name for policy in policies]
    if not faults and baseline not in names:
        if cfg.eval.baseline is None and cfg.eval.policies is not None:
            policies.insert(0, _policy(cfg, run, baseline, reward_model))
        else:
            faults.append(f"eval.baseline={baseline} is none of the policies: {', '.join(names)}")
    if faults:
        raise UserError("\n".join(faults))
    found, best_of = _rewards(policies, reward_model), sorted(set(cfg.eval.best_of or []))
    if best_of and (sft is None or not any(reward.weight for reward in found)):
        missing = "SFT stage to draw from" if sft is None else "reward to pick by (a reward model, or that of PPO)"
        terminal.say(f"No best of n: {run} has no {missing}. eval.best_of=null asks for none.")
        best_of = []
    return Compared(policies, baseline, sft, reward_model, best_of, found)


def _is_finished(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and manifest["status"] == "finished"


def _policy(cfg: DictConfig, run: Path, name: str, reward_model: Made | None) -> Policy:
    if name == BASE:
        return Policy(BASE)
    if name in STAGES or (not Path(name).is_absolute() and (run / name / MANIFEST).exists()):
        stage = finished(cfg, name)
        seen = _optimized(stage.manifest, reward_model)
        return Policy(name, stage=stage, fingerprint=stage.fingerprint, optimized=seen)
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"eval.policies: the folder {name} holds no model and no adapter (no config.json)")
        manifest, its_run = read_manifest(folder), next((p for p in folder.parents if (p / "rm").is_dir()), folder)
        model = Made.read(its_run / "rm") if manifest and _is_finished(its_run / "rm") else None
        seen = _optimized(manifest, model) if manifest else frozenset()
        return Policy(name, source=name, fingerprint=disk.fingerprint_weights(folder), optimized=seen)
    if HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return Policy(name, source=name, fingerprint=name)
    stages = sorted(str(p.parent.relative_to(run)) for p in run.rglob(MANIFEST)) if run.is_dir() else []
    raise UserError(
        f"eval.policies: {name} is no policy. There are {', '.join([BASE, *(s for s in stages if s != 'rm')])}; "
        "other models by their folder or hub id"
    )


def _optimized(manifest: Mapping[str, Any], reward_model: Made | None) -> frozenset[str]:
    """What a stage was trained on, by its manifest.

    DPO learns the very pairs that a reward model of the same data has learned: that one is no witness of its own.
    """
    if manifest["stage"] == "dpo" and reward_model is not None and manifest["data"] == reward_model.manifest["data"]:
        return frozenset([rewards.mark(reward_model.path)])
    return rewards.optimized(manifest, None if reward_model is None else reward_model.path)


def _rewards(policies: Sequence[Policy], reward_model: Made | None) -> list[Reward]:
    """The run's reward model and what its policies were trained on; `ppo` says what their sum is called `reward`.

    A source that is gone is told, and not measured.
    """
    folder = None if reward_model is None else reward_model.path
    sections = {p.name: p.stage.manifest["config"].get("reward") for p in policies if p.stage is not None}
    ordered = [sections[name] for name in sorted(sections, key=lambda name: name != "ppo") if sections[name]]
    if folder is not None:
        ordered.append({"model": rewards.RUN, "functions": None, "url": None, "weights": None})
    found: dict[frozenset[str], Reward] = {}
    whole = True
    for number, section in enumerate(ordered):
        for source in rewards.sources(section, folder):
            marks = frozenset(source.marks)
            if marks in found:
                continue
            try:
                alone = rewards.from_config(OmegaConf.create(source.section), folder)
            except UserError as error:
                terminal.say(f"{source.name} is not measured: {error}")
                whole = whole and number > 0
                continue
            named = ", ".join(source.marks.values())
            measures = {reward.measure for reward in found.values()}
            measure = next(m for m in (f"rewards/{source.name}", f"rewards/{named}") if m not in measures)
            own = folder is not None and marks == {rewards.mark(folder)}
            found[marks] = Reward(
                FROM_RUN if own else named,
                measure,
                marks,
                alone,
                disk.hash_value([sorted(marks), contents({f"reward.{k}": v for k, v in source.section.items()})]),
                (section.get("ensemble", "mean"), section.get("spread_coef", 1.0)),
                source.weight if number == 0 else 0.0,
            )
    parts = [reward for reward in found.values() if reward.weight]
    if not whole:
        return [replace(reward, weight=0.0) for reward in found.values()]
    single = parts if len(parts) == 1 and parts[0].weight == 1 else []  # it is the sum
    return [replace(reward, measure=REWARD) if reward in single else reward for reward in found.values()]


def prompts(cfg: DictConfig) -> list[dict[str, Any]]:
    """The prompts to answer, with what else their rows hold.

    Raises:
        UserError: there is no such file, a row has no prompt, or the data have no held-out prompts.
    """
    if cfg.eval.prompts is None:
        asked = data.heldout_prompts(cfg)
        if asked is None:
            raise UserError(
                "there are no held-out prompts to answer: set evaluation.prompts above 0, or eval.prompts=hhh"
            )
        return [dict(row) for row in asked]
    file = HHH if cfg.eval.prompts == "hhh" else Path(cfg.eval.prompts)
    if not file.is_file():
        raise UserError(f"eval.prompts={cfg.eval.prompts}: no such file; `hhh` is the set that ships with the project")
    rows = [_prompt(file, number, line) for number, line in enumerate(file.read_text().splitlines(), 1) if line.strip()]
    if not rows:
        raise UserError(f"eval.prompts={cfg.eval.prompts}: the file holds no prompt")
    return rows[: cfg.evaluation.prompts or None]


def _prompt(file: Path, number: int, line: str) -> dict[str, Any]:
    """A row of a prompts file; a plain prompt is the user's turn of a conversation."""
    try:
        row = json.loads(line)
        prompt = row["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}, line {number}: want {{"prompt": ..., "category": ...}}, found {line[:80]!r}'
        ) from error
    kept = {CATEGORY: str(row[CATEGORY])} if row.get(CATEGORY) else {}
    return {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt} | kept


def text(prompt: Any) -> str:
    """A prompt as a person or a judge reads it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)


def best_of_name(n: int) -> str:
    """What the best of n answers of SFT is called, as a policy."""
    return f"best-of-{n}"


def best_of_kl(n: int) -> float:
    """The most that the best of n answers can be away from the policy they come from, in nats.

    Source: Stiennon et al. (arXiv 2009.01325), appendix G.3; an upper bound by Beirami et al. (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
