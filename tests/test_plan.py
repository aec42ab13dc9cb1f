"""`make plan`: the parts are what the real model holds, the prediction moves as it should, and its advice fits."""

import functools
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from recipes import plan as recipe
from rlhf_recipes import machine, models
from rlhf_recipes.backoff import in_chunks
from rlhf_recipes.config import CONF, compose
from rlhf_recipes.errors import OutOfMemory, UserError, ran_out_of_memory
from rlhf_recipes.plan import shortage
from rlhf_recipes.plan.command import CONTEXT, FRAGMENTS, Asked, advice, parse, with_overrides
from rlhf_recipes.plan.dry_run import dry_run, without_data
from rlhf_recipes.plan.overrides import _moves, overrides_that_fit
from rlhf_recipes.plan.passes import Passes, adapters
from rlhf_recipes.plan.shapes import PRESETS, model_config
from rlhf_recipes.plan.stages import PARTS, Plan, base_dtype, phases, plan, training_arguments

PROMPT = 48
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}

# as published with the weights
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides for a Llama of 9 layers, of which there is a config and nothing else, and for small and few passes."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(**LLAMA, num_hidden_layers=9).save_pretrained(folder)
    return [f"model.name_or_path={folder}", "model.dtype=bfloat16", "training.gradient_checkpointing=false"]


@pytest.fixture(scope="module")
def text(small):
    """The same for SFT, the reward model and DPO."""
    return [*small, "training.max_length=64", "evaluation.prompts=0"]


@pytest.fixture(scope="module")
def episodes(small):
    """The same for PPO."""
    return [*small, "training.max_completion_length=16", "training.rollout_batch_size=2"]


@pytest.fixture(scope="module")
def sft(text):
    """A function that plans the training of SFT."""

    @functools.cache
    def planned(*overrides):
        return phases("sft", compose("sft", [*text, *overrides]), only=["training"])[0]

    return planned


@pytest.fixture(scope="module")
def ppo(episodes):
    """A function that plans a phase of PPO."""

    @functools.cache
    def planned(*overrides, only="policy pass"):
        return phases("ppo", compose("ppo", [*episodes, *overrides]), prompt_length=PROMPT, only=[only])[0]

    return planned


# ---- shapes


def test_every_preset_of_a_model_has_its_shape():
    presets = {file.stem for file in (CONF / "model").glob("*.yaml")} - {"other"}
    named = {compose("sft", [f"model={preset}"]).model.name_or_path for preset in presets}
    assert named - {models.EMBEDDED} == PRESETS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_published(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(compose("sft", [f"model.name_or_path={name}"]).model))
    assert model.num_parameters() == PARAMETERS[name]


def test_an_unknown_model_is_refused_as_in_the_recipes(tmp_path):
    with pytest.raises(UserError, match=r"model\.name_or_path=\S+ cannot be loaded"):
        plan("sft", compose("sft", [f"model.name_or_path={tmp_path}/none"]))


# ---- parts


def test_weights_and_adapters_are_those_of_the_real_model():
    cfg = compose("sft", ["model.dtype=float32"])  # the embedded base
    real = models.new_adapter(models.load_base(cfg), cfg)
    lora = sum(p.nbytes for name, p in real.named_parameters() if "lora_" in name)
    [found] = phases("sft", cfg, only=["training"])
    whole = sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
    assert found.parts["weights"] == whole - lora
    assert found.parts["adapters"] == found.parts["gradients"] == lora
    assert found.parts["optimizer"] == 2 * lora


def test_nf4_weights_are_those_of_a_really_quantized_model():
    cfg = compose("sft", ["model.dtype=bfloat16", "quantization=nf4"])
    real, seen = models.load_base(cfg), {}
    for module in real.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen[tensor.data_ptr()] = tensor.nbytes
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                seen[tensor.data_ptr()] = tensor.nbytes
    planned = phases("sft", cfg, only=["training"])[0].parts["weights"]
    assert planned == pytest.approx(sum(seen.values()), rel=0.02)  # bitsandbytes shares its code books


def test_the_meter_counts_what_is_alive_and_not_what_was():
    with dry_run(frozenset({1000})) as meter:
        kept = torch.empty(100)
        meter.begin()
        _ = torch.empty(50, dtype=torch.float16), torch.empty(2, 1000)
        del _
        view = kept[:10]
        torch.empty(3)
        assert meter.taken() == {"activations": 100, "logits": 8000}
        assert meter.live.total() == 400 and view.untyped_storage()._cdata in meter.sizes


def test_a_pass_takes_what_autograd_really_keeps(tiny_llama):
    """What a forward pass leaves for the backward pass, counted by hooks on a real one."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ids, mask = torch.randint(len(WORDS), (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[0, 0] = 0  # padding, as in any batch: the mask is not left out
    real = get_peft_model(tiny_llama(), lora)
    own = {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = real(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.device("meta"):
        empty = get_peft_model(type(tiny_llama())(tiny_llama().config), lora)
    with dry_run() as meter:
        without_data(empty)
        meter.begin()
        mask = torch.ones(ids.shape, dtype=torch.long)
        planned = empty(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False).logits
        taken = meter.live.total() - meter.before.total() - planned.nbytes
    assert taken == pytest.approx(sum(kept.values()), rel=0.1) and logits.shape == planned.shape


def test_few_layers_drawn_out_say_what_the_whole_depth_says(text, episodes):
    for stage, more in (("dpo", [*text, "training.gradient_checkpointing=true"]), ("ppo", episodes)):
        cfg = compose(stage, [*more, "trunk=0.56", "frozen_top=0.23", "quantization=nf4"])
        dtype = base_dtype(cfg, "cuda")
        args = training_arguments(stage, cfg, dtype)
        for phase in ("training",) if stage == "dpo" else ("policy pass", "rollouts, last token"):
            whole = Passes(stage, cfg, args, dtype, "cuda", PROMPT, below=5, above=2, top=2).measure([phase])[phase]
            [found] = phases(stage, cfg, prompt_length=PROMPT, only=[phase])
            drawn_out = sum(found.parts[part] for part in ("activations", "logits", "cache"))
            assert drawn_out == pytest.approx(sum(whole.values()), rel=0.02)


# ---- how the prediction moves


def test_nf4_takes_less_for_weights_and_as_much_for_the_rest(sft):
    without, quantized = sft(), sft("quantization=nf4")
    assert quantized.parts["weights"] < 0.9 * without.parts["weights"]  # the embeddings stay as they are
    assert quantized.parts["optimizer"] == without.parts["optimizer"]


def test_checkpointing_takes_fewer_activations(sft):
    assert sft("training.gradient_checkpointing=true").parts["activations"] < 0.3 * sft().parts["activations"]


def test_activations_grow_with_the_micro_batch_and_weights_do_not(sft):
    one, two = (sft(f"training.per_device_train_batch_size={rows}") for rows in (4, 8))
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.1)
    assert two.kept == one.kept


def test_a_higher_trunk_trains_less_and_keeps_fewer_activations(ppo):
    low, high = ppo("trunk=0.5"), ppo("trunk=0.9")
    for part, share in (("activations", 0.4), ("gradients", 0.25), ("optimizer", 0.25), ("adapters", 0.7)):
        assert high.parts[part] < share * low.parts[part], part
    assert ppo("trunk=0").parts["trunk"] == 0 < high.parts["trunk"] == low.parts["trunk"]


def test_layers_frozen_on_top_train_nothing_and_keep_what_their_input_needs(ppo):
    """Gradients run through them to the window below; their adapters are not those of the reference."""
    window, upper, none = ppo("trunk=0.34", "frozen_top=0.34"), ppo("trunk=0.67"), ppo("trunk=0.34")
    for part in ("gradients", "optimizer"):
        assert window.parts[part] == upper.parts[part] == pytest.approx(none.parts[part] / 2), part
    assert window.parts["adapters"] == none.parts["adapters"] > upper.parts["adapters"]
    assert upper.parts["activations"] < window.parts["activations"] < none.parts["activations"]


def test_no_trunk_is_advised_that_leaves_no_layer_to_train(episodes):
    cfg = compose("ppo", [*episodes, "trunk=0.25", "frozen_top=0.5", "quantization=nf4"])
    args = training_arguments("ppo", cfg, torch.bfloat16)
    kept = Plan("ppo", "policy pass", dict.fromkeys(PARTS, 0) | {"weights": 2})
    assert all("trunk" not in move for move in _moves("ppo", kept, cfg, args, limit=1))


def test_the_trunk_is_there_but_while_sequences_are_generated(ppo):
    states = 128 * (PROMPT + 16) * 256 * 2  # episodes, tokens, hidden size, bytes
    for phase, copies in {"rollouts, last token": 0, "scoring": 1, "policy pass": 1}.items():
        assert ppo(only=phase).parts["trunk"] == copies * states


def test_the_cache_is_that_of_all_sequences_that_are_generated_at_once(ppo):
    kv = 2 * 9 * 2 * 64 * 2  # keys and values, layers, heads, their size, bytes
    for rows in (2, 8):
        found = ppo(f"training.rollout_batch_size={rows}", only="rollouts, last token")
        assert found.parts["cache"] == pytest.approx(rows * (PROMPT + 16) * kv, rel=0.01)


def test_eight_bit_and_frozen_adapters_take_smaller_states(sft, ppo):
    assert ppo("training.freeze_value=true").parts["gradients"] * 2 == ppo().parts["gradients"]
    assert sft("training.optim=adamw_8bit").parts["optimizer"] < 0.3 * sft().parts["optimizer"]
    assert sft("training.optim=paged_adamw_32bit").parts["optimizer"] == 0


def test_without_a_limit_there_is_nothing_to_plan_for():
    with pytest.raises(UserError, match=r"training\.max_length=null"):
        plan("sft", compose("sft", ["training.max_length=null"]))


# ---- the command


def made_to_fit(stage, overrides, share, phase):
    """Overrides that bring a phase down to a share of its peak, and are enough."""

    def planned(overrides):
        return phases(stage, compose(stage, overrides), prompt_length=PROMPT, only=[phase])

    before = planned(overrides)
    limit = int(share * before[0].peak)
    extra = overrides_that_fit(before, overrides, limit, prompt_length=PROMPT)
    assert planned(with_overrides(overrides, extra))[0].peak <= limit
    return extra


def test_what_does_not_fit_gets_overrides_under_which_the_plan_says_it_fits(text):
    overrides = [*text, "training.per_device_train_batch_size=16", "training.gradient_accumulation_steps=4"]
    assert made_to_fit("sft", overrides, 0.7, "training") == {
        "training.per_device_train_batch_size": "8",
        "training.gradient_accumulation_steps": "8",
    }


def test_a_rollout_batch_stays_what_it_is_when_its_micro_batches_shrink(episodes):
    changed = with_overrides(episodes, made_to_fit("ppo", episodes, 0.8, "policy pass"))
    before, after = (training_arguments("ppo", compose("ppo", o), torch.bfloat16) for o in (episodes, changed))
    assert after.per_device_train_batch_size < before.per_device_train_batch_size
    for same in ("generation_batch_size", "steps_per_iteration"):
        assert getattr(after, same) == getattr(before, same)


def test_the_search_jumps_to_the_rows_that_fit_and_then_plans_all_other_phases_at_once(text, monkeypatch):
    """Each plan takes seconds: one for each halving and one for each phase would be most of the time."""
    asked = []

    def linear(stage, cfg, *, only, **lengths):
        asked.append(only)
        rows = {"training": cfg.training.per_device_train_batch_size, "evaluation": 5, "samples, KL": 5}
        return [Plan(stage, name, dict.fromkeys(PARTS, 0) | {"activations": 100 * rows[name]}) for name in only]

    overrides = [*text, "training.per_device_train_batch_size=64", "training.gradient_accumulation_steps=1"]
    phases = ["training", "evaluation", "samples, KL"]
    found = linear("sft", compose("sft", overrides), only=phases)
    monkeypatch.setattr("rlhf_recipes.plan.overrides.phases", linear)
    extra = overrides_that_fit(found, overrides, limit=800)
    assert extra["training.per_device_train_batch_size"] == "8"
    assert asked[1:] == [["training"]]
    extra = overrides_that_fit(found, overrides, limit=400)
    assert extra is None  # nothing helps the others here
    assert asked[2:4] == [["training"], ["evaluation", "samples, KL"]]


def test_weights_that_are_too_many_are_quantized_first_and_too_many_still_are_told(sft, text):
    found = sft()
    assert next(iter(overrides_that_fit([found], text, found.kept - 1))) == "quantization"
    assert overrides_that_fit([found], text, found.kept // 4) is None


def test_the_line_to_copy_gives_all_stages_what_they_share_and_each_its_own():
    asked = Asked(["model=a", "trunk=0.5"], {"sft": [], "rm": ["training.x=2"], "dpo": [], "ppo": []}, card=8)
    tried = {"rm": {"training.x": "1", "trunk": "0.75"}, "ppo": {"quantization": "nf4"}, "dpo": None}
    assert advice(asked, tried).splitlines() == [
        "dpo: fits with nothing that was tried; take a smaller model or larger card.",
        "rm, ppo: fits by this line (planned again, not measured):",
        '  make sft rm ppo ARGS="model=a trunk=0.75 quantization=nf4" RM_ARGS="training.x=1"',
    ]


def test_overrides_reach_their_stages():
    asked = parse(["card=12", "run=a", "--rm", "x=1", "y=2", "--ppo", "--sft", "z=3", "prompt=4"], "")
    assert asked.overrides("rm") == ["run=a", "x=1", "y=2"] and asked.overrides("ppo") == ["run=a"]
    assert asked.overrides("sft") == ["run=a", "z=3", "prompt=4"] and asked.prompt == 512
    assert asked.limit == int((12 * 0.95 - 0.6) * 2**30)


@pytest.mark.parametrize("wrong", ["card=large", "card=0", "prompt=-1"])
def test_card_and_prompt_are_positive_numbers(wrong):
    with pytest.raises(UserError, match=r"card \(GB\) and prompt \(tokens\)"):
        parse([wrong], "")


def test_a_typo_is_told_as_in_the_recipes_and_before_torch_is_imported():
    code = "import sys, recipes.plan\ntry:\n    recipes.plan.main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "card=12", "--ppo", "training.lerning_rate=1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "did you mean training.learning_rate" in done.stderr
    assert done.stdout == "False\n"


def test_the_table_has_a_line_for_each_stage_and_no_weights_are_loaded(small, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(models, "load_base", refuse)
    peaks = recipe.plan(Asked(small, {stage: [] for stage in ("sft", "rm", "dpo", "ppo")}, card=24, prompt=16))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["GB", "sft", "rm", "dpo", "ppo"] and len(peaks) == 4
    assert all(" yes " in line for line in lines[1:5])


def test_where_there_is_a_card_the_plan_counts_on_what_is_free_on_it(capsys, monkeypatch):
    """A T4 of nominally 16 GB has 14.7, and a desktop holds some of it."""
    monkeypatch.setattr(machine, "card", lambda: machine.Card("Tesla T4", (7, 5), int(14.7 * 2**30), int(13.1 * 2**30)))
    parts = dict.fromkeys(PARTS, 0) | {"weights": int(12.3 * 2**30)}
    monkeypatch.setattr("rlhf_recipes.plan.stages.phases", lambda stage, *_, **__: [Plan(stage, "training", parts)])
    asked = Asked([], {stage: [] for stage in ("sft", "rm", "dpo", "ppo")}, prompt=16)
    recipe.plan(asked)
    output = capsys.readouterr().out
    assert "Of this card's 14.7 GB, 13.1 are free now and 12.4 are counted on" in output and output.count(" yes ") == 4
    assert asked.on(None).limit is None
    assert replace(asked, card=8.0).on(machine.card()).limit == int((8 * 0.95 - 0.6) * 2**30), "another was asked for"


def test_each_reward_model_and_each_guard_is_one_more_adapter():
    several = ["reward.model=[run,runs/a/rm]", "guard=reward_model", "guard.model=[runs/b/rm,runs/c/rm]"]
    held = ["default", "ref", "value", "reward", "reward_1", "guard", "guard_1"]
    assert adapters("ppo", compose("ppo", several)) == held
    assert adapters("dpo", compose("dpo", several[1:])) == ["default", "ref", "guard", "guard_1"]
    assert adapters("ppo", compose("ppo")) == ["default", "ref", "value", "reward"]


# ---- a run that ended for want of memory


def train_and_raise(error, cfg):
    @shortage.told_when_full
    def train(cfg, stage):
        raise error

    train(cfg, SimpleNamespace(name="sft"))


@pytest.fixture
def ended(text, monkeypatch):
    """A function that gives the message of an SFT run that ended so, on a card of some GB."""

    def message(card, error):
        known = None if card is None else machine.Card("card", (8, 9), int(card * 2**30), 0)
        monkeypatch.setattr(machine, "card", lambda: known)
        monkeypatch.setattr(shortage, "typed_overrides", lambda: [*text])
        with pytest.raises(UserError) as found:
            train_and_raise(error, compose("sft", [*text]))
        return str(found.value)

    return message


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), OutOfMemory("not one sequence fits.")],
)
def test_it_says_what_the_plan_says_and_gives_a_line_under_which_it_fits(ended, sft, error):
    full = sft().peak / 2**30
    card = (0.8 * full + CONTEXT) / (1 - FRAGMENTS)  # four fifths of what it takes are left for it
    reason, figures, _, line = ended(card, error).splitlines()
    assert reason in ("out of memory (CUDA out of memory).", "not one sequence fits.")
    assert f"sft takes {full:.2f} GB at its peak (training: " in figures
    assert line.startswith("  make sft ARGS=") and "training.per_device_train_batch_size=" in line


def test_where_the_plan_says_that_it_fits_it_names_what_the_plan_cannot_know(ended):
    assert "another program" in ended(80, OutOfMemory("full."))


def test_without_a_known_card_it_gives_the_figures_alone(ended):
    assert len(ended(None, OutOfMemory("full.")).splitlines()) == 2


def test_what_cannot_be_planned_still_says_why_the_run_ended(ended, monkeypatch):
    monkeypatch.setattr(shortage, "_figures", lambda *_: (1 / 0 for _ in "x"))
    assert ended(80, OutOfMemory("full.")) == "full.\n`make plan` cannot tell what it takes: division by zero"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), True),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"), False),
        (ValueError("a reward function says: out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_whichever_library_says_so(error, full, monkeypatch):
    monkeypatch.setattr(shortage, "_figures", lambda *_: [])
    assert ran_out_of_memory(error) is full
    if full:  # in each of the three places that look
        with pytest.raises(UserError, match="one sequence at a time"):
            in_chunks(1, 1, lambda rows: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match=r"^out of memory \(.+\)\."):
            train_and_raise(error, compose("sft"))


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError):
        train_and_raise(KeyError("a bug"), compose("sft"))
