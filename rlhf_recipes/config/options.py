"""Every option of every recipe: which config class stands behind which key, and how a person is told about it."""

import difflib
import functools
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from omegaconf import MISSING

from rlhf_recipes.config import schema

TRAINING = {
    "sft": "trl.SFTConfig",
    "rm": "trl.RewardConfig",
    "dpo": "trl.DPOConfig",
    "ppo": "rlhf_recipes.ppo.config.PPOConfig",
}
RECIPES = TRAINING | {"eval": "transformers.TrainingArguments"}  # what one ARGS says of training, eval leaves alone

READS = {"sft": "sft", "rm": "preferences", "dpo": "preferences", "ppo": "prompts"}  # which part of `data`
GROUPS = ("model", "data", "quantization", "lora", "hardware", "reward", "rollouts", "guard", "judge", "experiment")
SECTIONS = ("reward", "guard", "eval", "judge")  # of the config, that only some recipes have
ONLY = {"reward": ("ppo",), "rollouts": ("ppo",), "guard": ("dpo", "ppo"), "eval": ("eval",), "judge": ("eval",)}
"""The recipes of a section or group that not all have."""

DASHBOARDS = ("tensorboard", "trackio", "wandb")


@dataclass
class Common:
    """The keys at the top of every recipe's config. Their values stand in conf/common.yaml."""

    run: str = field(metadata={"help": "Name of the run, whose stages are written to runs/<run>/<stage>/."})
    runs_dir: str = field(metadata={"help": "Folder of all runs."})
    overwrite: bool = field(metadata={"help": "Make a finished stage again."})
    seed: int = field(metadata={"help": "Seed of the data, the training and the sampling."})
    start: Literal["sft", "model"] = field(
        metadata={"help": "Where rm, dpo and ppo begin: at the run's SFT adapter, or at the model itself."}
    )
    trunk: float = field(
        metadata={
            "help": "Share of the decoder layers, from the bottom, that only SFT trains; rm, dpo and ppo compute them "
            "once. Higher: faster and smaller; 0 trains all layers everywhere."
        }
    )
    frozen_top: float = field(
        metadata={
            "help": "Share of the decoder layers, from the top, that only SFT trains: with trunk, the others train a "
            "window of layers."
        }
    )


@dataclass
class Model:
    """The base model and its tokenizer."""

    name_or_path: str = field(metadata={"help": "Hub id or folder of a causal language model, or `embedded`."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of the base's weights. `auto` takes the best that the device can do."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, as transformers names it, such as `sdpa` or `flash_attention_2`."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Chat template to use instead of the tokenizer's own: a Jinja file, or its text."},
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Padding token. Default: the tokenizer's own, or another special token where that is EOS."},
    )
    eos_token: str | None = field(
        default=None,
        metadata={"help": "Token that ends an answer. Default: the one that the chat template writes, or the EOS."},
    )


@dataclass
class Data:
    """What each stage reads. A source is {path, name, split, revision, columns, mapping, weight, max_rows}."""

    sft: Any = field(
        default=None, metadata={"help": "Source, or list of weighted sources, of the demonstrations for sft."}
    )
    preferences: Any = field(
        default=None, metadata={"help": "Source or sources of the preferences or rankings for rm and dpo."}
    )
    prompts: Any = field(default=None, metadata={"help": "Source or sources of the prompts for ppo."})
    heldout: float = field(
        default=0.1, metadata={"help": "Prompts held out of every training: their share, or their number."}
    )


@dataclass
class Reward:
    """Where PPO's reward comes from. Several sources are added up."""

    model: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Reward model: `run` (the run's), a folder or a hub id; or a list of reward adapters on this base, "
            "an ensemble. `runs/mine/rm/*` stands for those whose folders match."
        },
    )
    ensemble: Literal["mean", "worst", "mean_minus_std"] = field(
        default="mean", metadata={"help": "How the scores of several reward adapters become one."}
    )
    spread_coef: float = field(
        default=1.0, metadata={"help": "Weight of the members' spread in `mean_minus_std`. Higher: more cautious."}
    )
    functions: list[Any] | None = field(
        default=None,
        metadata={
            "help": "Python functions of TRL's signature, {path: `module:function` or `file.py:function`, weight}."
        },
    )
    url: str | None = field(default=None, metadata={"help": "HTTP endpoint that scores completions."})
    weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the model, functions and endpoint."}
    )
    min_accuracy: float = field(
        default=0.5,
        metadata={"help": "Refuse the run's reward model unless its accuracy is surely above this. 0 insists."},
    )


@dataclass
class Guard(Reward):
    """A second scorer, which training never sees, with the sources of a reward: it tells when the two part."""

    gold: bool = field(default=False, metadata={"help": "The embedded world's truth."})
    prompts: int = field(default=100, metadata={"help": "Held-out prompts to answer at each evaluation."})
    samples: int = field(
        default=2, metadata={"help": "Completions of each prompt. More: a smaller fall is seen, and it takes longer."}
    )
    tolerance: float = field(
        default=0.05,
        metadata={
            "help": "How far the score may fall below its best, in its own unit (a reward model's is the spread of its "
            "scores on SFT samples). Higher: later, and fewer false alarms."
        },
    )
    root_kl_step: float = field(
        default=0.0,
        metadata={
            "help": "PPO: look where the root of the KL has moved by this since the last look, else at every second "
            "evaluation. 0: at each."
        },
    )
    stop: bool = field(
        default=False, metadata={"help": "Stop when the score has turned down, and finish with the best checkpoint."}
    )


@dataclass
class Evaluation:
    """The table at the end of each stage: completions of held-out prompts, before and after."""

    prompts: int = field(default=100, metadata={"help": "Held-out prompts to answer. 0: no table."})
    samples: int = field(default=1, metadata={"help": "Completions of each prompt. More: narrower intervals."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens after which a completion is cut."})
    batch_size: int = field(default=16, metadata={"help": "Completions sampled at once. Lower: less memory."})


@dataclass
class Eval:
    """What `make eval` compares, and on what."""

    policies: list[str] | None = field(
        default=None,
        metadata={
            "help": "Policies to compare: `base`, stages of the run (`sft`, `ppo`, `ppo/training.beta=0.1`), folders, "
            "hub ids. null: the base and every finished stage."
        },
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Policy that the others have to beat. null: `sft`, or `base` without it."}
    )
    best_of: list[int] | None = field(
        default=None, metadata={"help": "Also the best of so many SFT answers, by the reward of PPO. null: none."}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to answer: `hhh` (helpful, honest, harmless; ships with the project), or a JSONL file of "
            "{prompt, category}. null: the held-out prompts of data."
        },
    )
    reward_bench: str | None = field(
        default=None,
        metadata={"help": "Pairs to measure the reward model on, by category: a file or hub id in RewardBench's form."},
    )
    benchmarks: list[str] | None = field(
        default=None,
        metadata={"help": "Benchmarks of lm-eval by task name, such as truthfulqa_mc2 (pip install lm-eval[hf])."},
    )
    benchmark_tasks: str | None = field(default=None, metadata={"help": "Folder of lm-eval tasks of your own."})
    benchmark_limit: int | None = field(default=None, metadata={"help": "Questions of each task. null: all."})


@dataclass
class Judge:
    """Who says which of two answers is better, beside the run's reward model and, in the embedded world, the truth."""

    url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint, such as http://localhost:8000/v1."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Model that judges: its name at the endpoint, or without url a folder or hub id."},
    )
    key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the endpoint's key."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Another reward model: an adapter on the run's base, or a sequence classifier."}
    )
    function: str | None = field(
        default=None, metadata={"help": "Python function that scores, `module:function` or `file.py:function`."}
    )
    question: str = field(
        default="Which answer is more helpful, more honest and less harmful?",
        metadata={"help": "What an endpoint or a model is asked of two answers."},
    )
    concurrency: int = field(default=8, metadata={"help": "Questions at an endpoint at once."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds to wait for an answer of an endpoint."})
    retries: int = field(default=3, metadata={"help": "Further tries after nonsense, a time-out or a server error."})


# Options that a recipe sets itself, and what to use instead.
DECIDED = {
    "training.hub_token": "it would be written into the run's folder; set the environment variable HF_TOKEN instead",
    "training.output_dir": "the run decides it: use run=<name> or runs_dir=<folder>",
    "training.resume_from_checkpoint": "a stage that was broken off resumes by itself; overwrite=true starts it afresh",
    "training.save_only_model": "a stage that is broken off cannot resume without optimizer and random state",
    "training.logging_nan_inf_filter": "a loss that is NaN or infinite ends the stage, and is not filtered",
    "training.model_init_kwargs": "use the keys of model and quantization",
    "training.trust_remote_code": "use model.trust_remote_code",
    "training.chat_template_path": "use model.chat_template",
    "training.eos_token": "use model.eos_token",
    "training.assistant_only_loss": "of a conversation the assistant's turns alone are learned, whatever the template; "
    "training.completion_only_loss=false learns all of it",
    "training.dataset_text_field": "use data.sft.columns.text",
    "training.remove_unused_columns": "each recipe sets it by the columns that it reads",
    "training.pad_token": "use model.pad_token",
    "training.trunk": "use trunk",
    "training.frozen_top": "use frozen_top",
    "training.reward_weights": "use reward.weights",
    "training.reward_ensemble": "use reward.ensemble",
    "training.reward_spread_coef": "use reward.spread_coef",
    "lora.task_type": "each recipe sets it by what it trains",
    "lora.peft_type": "it is LORA",
    "lora.inference_mode": "each recipe sets it",
    "lora.base_model_name_or_path": "use model.name_or_path",
    "lora.revision": "use model.revision",
}

_OTHER_LOSS = "it belongs to a loss that PPO does not have"
_NO_LABELS = "there are no labels: held-out prompts are answered and scored"
_SHARDED = (
    "the passes through several roles of one base do not work on a sharded model; on several GPUs each holds it, by "
    "`accelerate launch --multi_gpu`. For models that no card holds: OpenRLHF (DeepSpeed) or verl (FSDP, Megatron)"
)
_VLLM = "vLLM cannot be installed beside the tested versions (docs/ppo.md); use rollouts=continuous_batching"
NOT_IN_PPO = {
    "scale_rewards": "advantages come from a critic, not from groups; see whiten_advantages and whiten_rewards",
    "multi_objective_aggregation": "rewards are summed by reward_weights",
    "importance_sampling_level": "PPO's ratio is per token",
    "loss_type": "PPO's clipped loss is `dapo`: a mean over all tokens of the rollout batch",
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _OTHER_LOSS),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _OTHER_LOSS),
    "label_smoothing_factor": _OTHER_LOSS,
    "mask_truncated_completions": "use missing_eos_penalty",
    "off_policy_mask_threshold": "use target_kl",
    "use_bias_correction_kl": "the KL penalty is part of the reward",
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        "the reference is the SFT model throughout",
    ),
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "it replaces the model's forward, which the shared trunk relies on",
    ),
    "disable_dropout": "dropout is always off, so that the ratio starts at 1",
    "neftune_noise_alpha": "with noise in the embeddings the ratio would not start at 1",
    "max_tool_calling_iterations": "completions with tools cannot be trained on",
    "log_multimodal": "completions with images cannot be trained on",
    "use_transformers_paged": "use use_transformers_continuous_batching",
    "auto_find_batch_size": "where memory runs out, micro-batches are made smaller by themselves, with the same result",
    "average_tokens_across_devices": "losses are means over the rollout batch of all devices",
    "data_seed": "use seed",
    "dataloader_drop_last": "an incomplete rollout batch is always left out",
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "use shuffle_dataset"),
    "include_num_input_tokens_seen": "`num_tokens` in the log counts prompts and completions",
    **dict.fromkeys(
        (
            *("label_names", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
            *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
        ),
        _NO_LABELS,
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "ds3_gather_for_generation"), _SHARDED),
    "use_vllm": _VLLM,
    **{
        f"vllm_{name}": _VLLM
        for name in (
            *("mode", "model_impl", "enable_sleep_mode", "structured_outputs_regex", "server_base_url", "server_host"),
            *("server_port", "server_timeout", "group_port", "gpu_memory_utilization", "max_model_length"),
            *("tensor_parallel_size", "importance_sampling_correction", "importance_sampling_mode"),
            *("importance_sampling_clip_max", "importance_sampling_clip_min", "importance_sampling_cap"),
        )
    },
}
"""Fields of PPOConfig, inherited from TRL, that do nothing in PPO or break it, and why: refused, and not listed."""

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` (or how they begin) that take from the base's weights what they put in the adapter."""

# What --help shows besides the options that the recipe's own config sets.
MOST_USED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "max_length",
    "beta",
    "report_to",
)


def sections(recipe: str) -> dict[str, Mapping[str, schema.Option]]:
    """The options of a recipe by section; the section of the keys at the top is called ''."""
    paths = {
        "": f"{__name__}.Common",
        "model": f"{__name__}.Model",
        "data": f"{__name__}.Data",
        **{section: f"{__name__}.{section.title()}" for section in SECTIONS if recipe in ONLY[section]},
        "evaluation": f"{__name__}.Evaluation",
        "quantization": "transformers.BitsAndBytesConfig",
        "lora": "peft.LoraConfig",
        "training": RECIPES[recipe],
    }
    found = {section: schema.options(path) for section, path in paths.items()}
    if recipe == "ppo":
        found["training"] = {name: o for name, o in found["training"].items() if name not in NOT_IN_PPO}
    return found


@functools.cache
def options(recipe: str) -> Mapping[str, schema.Option]:
    """The options of a recipe by full key, such as `training.learning_rate`."""
    return {
        f"{section}.{name}" if section else name: option
        for section, fields in sections(recipe).items()
        for name, option in fields.items()
    }


def ours(section: str) -> bool:
    """Whether a section is the project's own, so that its defaults are stated here and not by a library."""
    return section not in ("quantization", "lora", "training")


def groups(recipe: str) -> list[str]:
    """The config groups of a recipe."""
    return [group for group in GROUPS if recipe in ONLY.get(group, (recipe,))]


def required(recipe: str) -> list[str]:
    """The options that need a value: the project's own without a default."""
    return [key for key, option in options(recipe).items() if ours(_section(key)) and option.value == MISSING]


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def belongs(key: str, others: Sequence[str], recipe: str) -> str:
    """Why an option or a group of other recipes is refused in this one."""
    kind = "a group" if key in GROUPS else "an option"
    targets = ", ".join(f"{other.upper()}_ARGS" for other in others)
    return f"{kind} of {' and '.join(others)}, not of {recipe}: give it in {targets}, not in ARGS"


def unknown(recipe: str, key: str) -> str:
    """Why a key is refused, with the nearest valid one."""
    section, _, name = key.rpartition(".")
    if (recipe, section) == ("ppo", "training") and name in NOT_IN_PPO:
        return f"no meaning in PPO: {NOT_IN_PPO[name]}"
    elsewhere = [other for other in RECIPES if key in options(other) or key in sections(other)]
    if elsewhere:
        return belongs(key, elsewhere, recipe)
    known = [*options(recipe), *GROUPS]
    leaf = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    near = same or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    leaves = {other.rpartition(".")[2]: other for other in known}
    near = near or [leaves[other] for other in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    return f"no such option; did you mean {' or '.join(near)}?" if near else "no such option"


def adapter_faults(values: Mapping[str, Any]) -> list[str]:
    """What keeps a LoRA adapter from standing beside others on one base. `values` are options of LoraConfig."""
    found, init, bias = [], values.get("init_lora_weights"), values.get("bias", "none")
    if bias != "none":
        found.append(
            f"bias={bias}: it trains the base's own biases, and all roles share the base; bias=none, or "
            "lora_bias=true, whose biases are the adapter's"
        )
    if str(init).lower().startswith(CHANGE_THE_BASE):
        found.append(
            f"init_lora_weights={init}: it changes the base's weights, and all roles and stages share the base; use "
            "true, gaussian, orthogonal or mica (use_rslora and use_dora are other ways to learn faster). PEFT makes a "
            "plain adapter of one that was trained so by "
            "`model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)`"
        )
    return found


def conflicts(values: Mapping[str, Any]) -> list[str]:
    """Combinations that cannot work, found before anything is loaded. `values` are those that were set, by full key."""
    four_bits, eight_bits = (values.get(f"quantization.load_in_{bits}bit", False) for bits in (4, 8))
    found = []
    if four_bits and eight_bits:
        found.append("quantization: load_in_4bit and load_in_8bit exclude each other; quantization=nf4 or int8")
    for key in values:
        if key.startswith("quantization.bnb_4bit_") and not four_bits:
            found.append(f"{key}: only with 4 bits; add quantization=nf4")
        if key in ("quantization.llm_int8_threshold", "quantization.llm_int8_has_fp16_weight") and not eight_bits:
            found.append(f"{key}: only with 8 bits; add quantization=int8")
    if values.get("training.fp16") and values.get("training.bf16"):
        found.append("training.fp16 and training.bf16 exclude each other")
    adapter = {key.removeprefix("lora."): value for key, value in values.items() if key.startswith("lora.")}
    found += [f"lora.{fault}" for fault in adapter_faults(adapter)]
    if (values.get("training.gradient_checkpointing_kwargs") or {}).get("use_reentrant") and values.get("trunk"):
        found.append(
            "training.gradient_checkpointing_kwargs: use_reentrant=true gives no gradients above frozen layers; leave "
            "it out, or set trunk=0"
        )
    attention = str(values.get("model.attn_implementation") or "sdpa")
    paged = attention in ("sdpa", "eager", "paged|eager") or "flash" in attention
    if values.get("training.use_transformers_continuous_batching") and not paged:
        found.append(
            f"model.attn_implementation={attention}: continuous batching needs sdpa, eager or flash_attention_2"
        )
    chosen = values.get("training.report_to") or []
    for dashboard in [chosen] if isinstance(chosen, str) else chosen:
        known = schema.keys("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK")
        if dashboard not in ("all", "none", *known):
            found.append(f"training.report_to={dashboard}: expected one of {', '.join(known)}, all, none")
        if dashboard in DASHBOARDS and find_spec(dashboard) is None:
            found.append(f"training.report_to={dashboard}: it is not installed: .venv/bin/pip install {dashboard}")
    if values.get("frozen_top", 0) >= 1 - values.get("trunk", 0) > 0:
        found.append(f"frozen_top={values['frozen_top']}: must be below 1 together with trunk")
    if "reward.model" in values and not any(values.get(f"reward.{source}") for source in ("model", "functions", "url")):
        found.append("reward: it comes from nowhere; set reward.model, reward.functions or reward.url")
    ppo = "reward.model" in values
    evaluates = values.get("training.eval_strategy", "steps" if ppo else "no") != "no"
    if any(values.get(f"guard.{source}") for source in ("gold", "model", "functions", "url")):
        from rlhf_recipes.guard.turning import PROMPTS

        if values.get("guard.prompts", PROMPTS) < PROMPTS:
            found.append(
                f"guard.prompts={values['guard.prompts']}: at least {PROMPTS}, since fewer do not tell a fall from "
                "noise; guard=none for no guard"
            )
        if values.get("guard.samples", 1) < 1:
            found.append(f"guard.samples={values['guard.samples']}: at least 1")
        if not evaluates:
            found.append("guard: it looks at every evaluation, and there are none; add training.eval_strategy=steps")
    if ppo and evaluates and values.get("evaluation.prompts") == 0:
        found.append(
            "evaluation.prompts=0: PPO has no held-out prompts to score while it trains; add training.eval_strategy=no"
        )
    return found


# ---------------------------------------------------------------------------------------------------- telling a person


def _shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    text = str(value).replace("'", "") if isinstance(value, list | dict) else str(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def overview(recipe: str, story: str, values: Mapping[str, Any], groups: Mapping[str, list[str]]) -> str:
    """The text of --help: what the recipe does, its groups, and the options that matter first with their values."""
    width = max(80, min(shutil.get_terminal_size().columns, 120))
    lines = [
        story.strip(),
        "",
        f'  make {recipe} ARGS="key=value ..."      python -m recipes.{recipe} key=value ...',
        "",
    ]
    lines.append("Choices, one of each (group=choice):")
    for group, choices in groups.items():
        lines += textwrap.wrap(", ".join(choices), width, initial_indent=f"  {group:13} ", subsequent_indent=" " * 16)
    lines += ["", "Options (key=value), with their values here:"]
    first = [f"training.{name}" for name in MOST_USED]
    for key, option in options(recipe).items():
        if ours(_section(key)) or key in values or key in first:
            default = option.default if option.value == MISSING else option.value
            lines.append(f"  {key} = {_shown(values.get(key, default))}")
            sentence = option.help.partition(". ")[0].rstrip(".") + "."
            lines += textwrap.wrap(sentence, width, initial_indent="      ", subsequent_indent="      ")
    count = len(options(recipe))
    lines += [
        "",
        f"All {count} options:  python -m recipes.{recipe} --options [word]",
        "Also:  --cfg job prints the config;  -m key=a,b runs a sweep;  --info and --hydra-help are Hydra's.",
    ]
    return "\n".join(lines) + "\n"


def reference(recipe: str, word: str) -> str:
    """The text of --options: every option whose name or help holds `word`, with type, default, values and help."""
    width = max(80, min(shutil.get_terminal_size().columns, 120))
    lines = []
    for key, option in options(recipe).items():
        if word.lower() in f"{key} {option.help}".lower():
            default = f" = {_shown(option.default)}" if option.default else ""
            lines.append(f"{key}: {option.annotation}{default}")
            notes = [f"Not to be set: {DECIDED[key]}."] if key in DECIDED else []
            notes += [f"One of: {', '.join(option.choices)}."] if option.choices else []
            for text in (option.help, *notes):
                lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines or [f"No option of {recipe} has {word!r} in its name or help."]) + "\n"
