"""What a person sees: a bar or plain lines, a summary, tables, and of warnings only what is news."""

import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from rlhf_recipes import terminal
from rlhf_recipes.evaluation import Changes, Interval
from rlhf_recipes.runs import Stage

ROOT = Path(__file__).parents[1]


def run(code, at_a_terminal=False):
    """Run code in a process of its own, as a recipe does; its output, and what it wrote to stderr."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom rlhf_recipes import terminal\nterminal.quiet()\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    # where CI is set, transformers hands its logs on to the root logger from the start, beside printing them
    environment = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("TQDM_")}
    if not at_a_terminal:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "120", "rows", "30"], stdin=theirs, check=True)
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0, seen.decode()
    return seen.decode(), ""


# A training of one second with any of TRL's trainers, on a random Llama.
TRAIN = """
    import sys, tempfile
    sys.path.insert(0, "tests")
    import torch
    from conftest import WORDS
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1,
    )
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(config).save_pretrained(folder)
    row = {"prompt": "w1 w2", "completion": " w3", "chosen": " w3 w4", "rejected": " w5"}

    def train(stage, cls, config_class, columns, model_class=LlamaForCausalLM, lora={}, **options):
        data = Dataset.from_list([{c: row[c] for c in columns.split()}] * 64)
        kwargs = {"args": config_class(
            output_dir=folder + "/out", bf16=False, report_to="none", per_device_train_batch_size=4, max_steps=20,
            logging_steps=1, **options,
        )}
        if cls is GRPOTrainer:
            kwargs["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
        trainer = cls(
            model_class.from_pretrained(folder), train_dataset=data, processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear", **lora), **kwargs,
        )
        terminal.progress(trainer, stage)
        trainer.train()
"""
STAGES = {
    "sft": 'train("sft", SFTTrainer, SFTConfig, "prompt completion", eval_strategy="no")',
    "rm": 'train("rm", RewardTrainer, RewardConfig, "prompt chosen rejected", LlamaForSequenceClassification, '
    'dict(task_type="SEQ_CLS", modules_to_save=["score"]))',
    "dpo": 'train("dpo", DPOTrainer, DPOConfig, "prompt chosen rejected")',
    "ppo": 'train("ppo", GRPOTrainer, GRPOConfig, "prompt", num_generations=2, max_completion_length=4)',
}
FIGURES = {
    "sft": "loss .*, accuracy",
    "rm": "loss .*, accuracy .*, margin",
    "dpo": "loss .*, margin",
    "ppo": "reward .*",
}


def test_in_a_log_every_trainer_gives_ten_lines_with_its_figures_and_no_warnings():
    output, errors = run(TRAIN + "\n    for call in (" + ",".join(map(repr, STAGES.values())) + "): exec(call)")
    assert errors == ""
    for stage, figures in FIGURES.items():
        lines = [line for line in output.splitlines() if line.startswith(stage)]
        assert len(lines) == 10, output
        assert re.fullmatch(rf"{stage}: step 2 of 20, {figures}.*, [\d.]+ steps/s, [\d.]+ s left", lines[0])
        assert re.fullmatch(rf"{stage}: step 20 of 20, .*, [\d.]+ s in all", lines[-1])
    assert len(output.splitlines()) == 40


def test_at_a_terminal_a_stage_is_one_bar_with_rate_and_figures():
    output, _ = run(TRAIN + f"\n    {STAGES['rm']}", at_a_terminal=True)
    assert output.count("\n") == 1, output  # one line on the screen, written over and over
    last = output.rstrip("\r\n").split("\r")[-1]
    assert re.fullmatch(
        r"rm 100% \|█{20}\| 20/20 \[00:0\d<00:00, *[\d.]+step/s, loss \S+, accuracy \S+, margin \S+\]\s*", last
    )


def test_the_rate_counts_from_the_step_that_was_resumed_from(capsys):
    from transformers import TrainerControl, TrainerState

    from rlhf_recipes.terminal.bar import Progress

    state, control = TrainerState(global_step=89, max_steps=100), TrainerControl()
    progress = Progress("sft", bar=False)
    progress.on_train_begin(None, state, control)
    time.sleep(0.2)
    state.global_step = 90
    progress.on_step_end(None, state, control)
    progress.on_step_begin(None, state, control)
    output = capsys.readouterr().out
    assert re.fullmatch(r"sft: step 90 of 100, [345]\.\d steps/s, [23]\.\d s left\n", output)  # 1 in .2 s, not 90


def test_known_warnings_are_silent_and_others_take_one_line():
    output, errors = run("""
        import logging, warnings
        warnings.warn("`gradient_checkpointing_enable` is deprecated and will be removed in v6.", FutureWarning)
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then ...")
        warnings.warn("news")
        kernels = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning(kernels, "No module named 'kernels'")
        logging.getLogger("trl.trainer").warning("more news")
        logging.getLogger("rlhf_recipes.data").info("64 rows")
        logging.getLogger("other").info("chatter")
    """)
    assert output == ""
    lines = errors.splitlines()
    assert re.fullmatch(r"UserWarning: news \(<string>:\d+\)", lines[0])
    assert lines[1:] == ["warning from trl: more news", "64 rows"]


def test_a_load_report_is_silent_for_the_score_head_alone():
    report = (
        "\x1b[1mLlamaForSequenceClassification LOAD REPORT\x1b[0m from: x\n"
        "Key | Status | \n----+--------+-\n{}score.weight | \x1b[31mMISSING\x1b[0m | \n\nNotes:\n- MISSING: ..."
    )
    expected, news = (report.format(f"{row} | \n") for row in ("lm_head.weight | UNEXPECTED", "norm.weight | MISSING"))
    _, errors = run(f"""
        from transformers.utils import logging
        logging.get_logger("transformers.modeling_utils").warning({expected!r})
        logging.get_logger("transformers.modeling_utils").warning({news!r})
    """)
    assert errors.count("LOAD REPORT") == 1 and "norm.weight" in errors


def test_importing_the_terminal_imports_no_torch():
    code = "import sys, rlhf_recipes.terminal; sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_summary_tells_what_where_how_good_how_long_how_large_and_what_next(tmp_path, capsys):
    cfg = {"run": "mine", "runs_dir": str(tmp_path), "overwrite": False, "seed": 0}
    with Stage.open(cfg, "sft", data_fingerprint={}, overrides=["run=mine", "model=x", "training.beta=1"]) as stage:
        stage.finish({}, save=lambda folder: Path(folder, "adapter_model.safetensors").write_bytes(bytes(1_500_000)))
        stage.manifest |= {"seconds": 75.0, "peak_memory": {"rss": 1812, "anonymous": 310}}
        figures = {"loss": 0.52341, "accuracy": (0.671, 0.018), "scale": {"mean": 1.0}, "best": None}
        figures["reliability"] = [{"confidence": 0.55, "accuracy": 0.5, "pairs": 12}]  # a table, for the report
        figures |= {"kept": "best of 5 looks"}
        changes = Changes(
            {"base": {"gold": Interval(0.1, 0.01)}, "sft": {"gold": Interval(0.671, 0.018)}},
            [
                {"prompt": "Who sings?", "base": "Kit.", "sft": "Kit."},
                {"prompt": "Who swims?", "base": "Sing Sing", "sft": "Ned swims."},
            ],
        )
        terminal.summary(stage, "SFT adapter", figures, changes)
    expected = f"""
        mine/sft is finished
          made      SFT adapter, 1.5 MB
          where     {tmp_path}/mine/sft/
          how good  loss 0.523, accuracy 0.67 ± 0.02, kept best of 5 looks
          how long  1 min 15 s
          memory    1,812 MB resident, 310 MB anonymous at the peak
          next      make rm ppo ARGS="run=mine model=x"

        held-out prompts         gold
        base              0.10 ± 0.01
        sft               0.67 ± 0.02
        Rough intervals (2 prompts)
        sft is the best of 5 looks at held-out data, which flatters its figures there a little

          ?      Who swims?
          base   Sing Sing
          sft    Ned swims.
          ?      Who sings?
          base   Kit.
          sft    Kit.
    """
    assert capsys.readouterr().out == textwrap.dedent(expected)
