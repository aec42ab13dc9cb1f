"""Which policies are compared, and on which prompts; settled before any model is loaded."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import data
from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import Made, disk, finished, run_folder
from rlhf_recipes.runs.manifest import MANIFEST, read_manifest

BASE = "base"
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

    @property
    def slug(self) -> str:
        """The name as that of a file."""
        return re.sub(r"[^\w.+=,-]", "_", self.name)


@dataclass(frozen=True)
class Compared:
    """What a comparison is of: policies, and the stages that they are measured by."""

    policies: list[Policy]
    baseline: str
    sft: Made | None = None  # the KL is taken to it, and the best of n is picked from its answers
    reward_model: Made | None = None  # the run's
    best_of: list[int] = field(default_factory=list)


def resolve(cfg: DictConfig) -> Compared:
    """The policies that the config asks for; by default the base and all finished stages of the run.

    Raises:
        UserError: a policy that is no stage, folder or hub id, a stage that is not finished, a baseline that is not
            among them, or nothing to compare; all faults in one message.
    """
    run = run_folder(cfg)
    there = [name for name in STAGES if _is_finished(run / name)]
    wanted = cfg.eval.policies if cfg.eval.policies is not None else [BASE, *there]
    faults, policies = [], []
    if cfg.eval.policies is None and not there:
        faults.append(
            f"{run} has no finished policy yet. Make one first: make sft, or name models: eval.policies=[...]"
        )
    for name in dict.fromkeys(wanted):
        try:
            policies.append(_policy(cfg, run, name))
        except UserError as error:
            faults.append(str(error))
    sft = finished(cfg, "sft") if "sft" in there else None
    reward_model = finished(cfg, "rm") if _is_finished(run / "rm") else None
    baseline = cfg.eval.baseline or ("sft" if sft else BASE)
    names = [policy.name for policy in policies]
    if not faults and baseline not in names:
        if cfg.eval.baseline is None and cfg.eval.policies is not None:
            policies.insert(0, _policy(cfg, run, baseline))
        else:
            faults.append(f"eval.baseline={baseline} is none of the policies: {', '.join(names)}")
    if bad := [n for n in (cfg.eval.best_of or []) if n < 2]:
        faults.append(f"eval.best_of={bad}: a best of n wants n of 2 or more")
    if faults:
        raise UserError("\n".join(faults))
    best_of = sorted(set(cfg.eval.best_of or [])) if sft and reward_model else []
    return Compared(policies, baseline, sft, reward_model, best_of)


def _is_finished(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and manifest["status"] == "finished"


def _policy(cfg: DictConfig, run: Path, name: str) -> Policy:
    if name == BASE:
        return Policy(BASE)
    if (run / name / MANIFEST).exists() or name in STAGES:
        stage = finished(cfg, name)
        return Policy(name, stage=stage, fingerprint=stage.fingerprint)
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"eval.policies: the folder {name} holds no model and no adapter (no config.json)")
        return Policy(name, source=name, fingerprint=disk.fingerprint_weights(folder))
    if HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return Policy(name, source=name, fingerprint=name)
    stages = sorted(str(p.parent.relative_to(run)) for p in run.rglob(MANIFEST)) if run.is_dir() else []
    raise UserError(
        f"eval.policies: {name} is no policy. There are {', '.join([BASE, *(s for s in stages if s != 'rm')])}; "
        "other models by their folder or hub id"
    )


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
