"""Standard benchmarks by lm-eval, on the policies as they lie in memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_recipes import terminal
from rlhf_recipes.errors import UserError

if TYPE_CHECKING:
    from rlhf_recipes.comparison.answers import RunModels

NEEDED = "eval.benchmarks needs lm-eval: .venv/bin/pip install 'lm-eval[hf]'"


def tasks(cfg: DictConfig) -> Any:
    """lm-eval's list of tasks; None where no benchmark is asked for.

    Raises:
        UserError: lm-eval is not installed, or it has no such task.
    """
    if not cfg.eval.benchmarks:
        return None
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(NEEDED) from error
    own = cfg.eval.benchmark_tasks
    known = TaskManager(include_path=own, include_defaults=own is None)  # lm-eval's own thousands take a while to list
    missing = [name for name in cfg.eval.benchmarks if not known.match_tasks([name])]
    if missing and own is not None:
        known = TaskManager(include_path=own)
        missing = [name for name in missing if not known.match_tasks([name])]
    if missing:
        raise UserError(f"eval.benchmarks: lm-eval has no task {', '.join(missing)}; `lm-eval ls tasks` lists them")
    return known


def measure(cfg: DictConfig, run: RunModels, known: Any) -> dict[str, dict[str, dict[str, float]]]:
    """lm-eval's figures by policy, task and metric; standard errors under `<metric>_stderr`.

    Models of their own are left out: lm-eval measures them by itself.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    found = {}
    roles = run.roles
    for policy in run.compared.policies:
        if policy.source is not None:
            continue
        terminal.say(f"{policy.name}: {', '.join(cfg.eval.benchmarks)} by lm-eval ...")
        with roles.active(run.adapters[policy.name]):
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=roles.model, tokenizer=run.tokenizer, batch_size=cfg.evaluation.batch_size),
                tasks=list(cfg.eval.benchmarks),
                task_manager=known,
                limit=cfg.eval.benchmark_limit,
                random_seed=cfg.seed,
                numpy_random_seed=cfg.seed,
                torch_random_seed=cfg.seed,
                fewshot_random_seed=cfg.seed,
            )
        found[policy.name] = {
            task: {
                name.replace(",none", ""): value for name, value in figures.items() if isinstance(value, int | float)
            }
            for task, figures in results["results"].items()
        }
    return found
