"""Bases, tokenizers and adapters as a config asks for them: what is loaded, what trains, what all stages share."""

import contextlib
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf_recipes import models
from rlhf_recipes.config import compose
from rlhf_recipes.data.formats import render, render_prompt
from rlhf_recipes.errors import UserError
from rlhf_recipes.roles import HEAD_KEY, POLICY, REFERENCE, Roles, read_adapter

CHAT = [{"role": "user", "content": "w1 w2"}]
ANSWER = [{"role": "assistant", "content": "w3 w4"}]
PLAIN_ROWS = Dataset.from_list([{"prompt": "w1"}])
CHAT_ROWS = Dataset.from_list([{"prompt": CHAT}])
NF4 = ["quantization=nf4"]


@pytest.fixture
def base(tmp_path, tiny_llama, tokenizer):
    """Folder of the tiny Llama with its tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config(base, *overrides, recipe="sft"):
    return compose(recipe, [f"model.name_or_path={base}", "lora.r=4", *overrides])


# ---- tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A function that saves a tokenizer with what is given, and gives the `model` section that names its folder."""

    def save(tokenizer, *overrides, **attributes):
        tokenizer.save_pretrained(tmp_path / "tok")
        file = tmp_path / "tok" / "tokenizer_config.json"
        kept = json.loads(file.read_text()) | attributes
        file.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))
        (tmp_path / "tok" / "special_tokens_map.json").unlink(missing_ok=True)
        return config(tmp_path / "tok", *overrides).model

    return save


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_what_has_no_pad_token_or_pads_with_its_eos_pads_with_an_unused_special_token(
    tokenizer, tokenizer_folder, pad_token, caplog
):
    loaded = models.load_tokenizer(tokenizer_folder(tokenizer, pad_token=pad_token), PLAIN_ROWS)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<pad>", 0)
    assert not caplog.records


@pytest.mark.parametrize("preset", ["smollm2-135m", "smollm2-360m"])
def test_smollm2_is_padded_with_another_token_than_its_eos(chatml, tokenizer_folder, preset):
    chatml.add_special_tokens({"extra_special_tokens": ["<|endoftext|>", "<repo_name>"]})  # as in its vocabulary
    pad = compose("sft", [f"model={preset}"]).model.pad_token
    loaded = models.load_tokenizer(tokenizer_folder(chatml, f"model.pad_token='{pad}'"), CHAT_ROWS)
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_a_tokenizer_whose_only_special_token_is_eos_pads_with_it_and_says_what_that_hides(
    gpt2_like, tokenizer_folder, caplog
):
    loaded = models.load_tokenizer(tokenizer_folder(gpt2_like), PLAIN_ROWS)
    assert loaded.pad_token == loaded.eos_token == "<eos>"
    assert "cannot see whether an answer ends" in caplog.text and "model.pad_token=" in caplog.text


def test_padding_takes_a_token_meant_for_it_before_a_reserved_one_and_none_of_the_template(chatml):
    chatml.add_special_tokens({"extra_special_tokens": ["<|tool|>", "<|reserved_0|>", "<|right_pad_id|>"]})
    assert models.unused_token(chatml) == "<|right_pad_id|>"
    chatml.chat_template += "<|right_pad_id|>"
    assert models.unused_token(chatml) == "<|reserved_0|>"


def test_a_pad_token_of_its_own_is_kept(tokenizer, tokenizer_folder):
    assert models.load_tokenizer(tokenizer_folder(tokenizer), PLAIN_ROWS).pad_token == "<pad>"


def test_pad_and_eos_can_be_set_to_tokens_of_the_vocabulary(tokenizer, tokenizer_folder):
    cfg = tokenizer_folder(tokenizer, "model.pad_token=w7", "model.eos_token=w8", pad_token=None)
    loaded = models.load_tokenizer(cfg, PLAIN_ROWS)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (10, 11)  # w0 is 3


def test_a_tokenizer_without_eos_is_refused_with_what_to_set(tokenizer, tokenizer_folder):
    cfg = tokenizer_folder(tokenizer, eos_token=None)
    with pytest.raises(UserError, match=r"no EOS token.*model\.eos_token="):
        models.load_tokenizer(cfg, PLAIN_ROWS)


def test_a_tokenizer_without_eos_takes_one_that_is_set(tokenizer, tokenizer_folder):
    cfg = tokenizer_folder(tokenizer, "model.eos_token=w8", eos_token=None, pad_token=None)
    loaded = models.load_tokenizer(cfg, PLAIN_ROWS)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (11, 0)


def test_tokens_that_are_not_in_the_vocabulary_are_all_told_in_one_message(tokenizer, tokenizer_folder):
    cfg = tokenizer_folder(tokenizer, "model.pad_token='[PAD]'", "model.eos_token='</s>'")
    with pytest.raises(UserError, match=r"model.eos_token='</s>' is not in.*model.pad_token='\[PAD\]' is not in"):
        models.load_tokenizer(cfg, PLAIN_ROWS)


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A model's chat template, as TRL keeps it where it does, the EOS of its tokenizer, and what a turn ends with.
FAMILIES = {
    "gemma": ("<eos>", "<end_of_turn>"),
    "phi3": ("<|endoftext|>", "<|end|>"),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>"),  # of the base, without its preset
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "llama3": ("<|end_of_text|>", "<|eot_id|>"),
    "smollm2": ("<|im_end|>", "<|im_end|>"),
}
MARKS = ["<bos>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|start_header_id|>", "<|end_header_id|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_in_every_stage_with_the_token_that_the_models_template_ends_it_with(
    chatml, tokenizer_folder, family
):
    """SFT learns it, reward model and DPO read it, sampling stops at it; of a conversation, all of its own turns."""
    import trl

    from rlhf_recipes import data, reward_model

    eos, turn = FAMILIES[family]
    file = Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja"
    chatml.chat_template = SMOLLM2 if family == "smollm2" else file.read_text()
    chatml.add_special_tokens({"eos_token": eos, "bos_token": "<bos>", "pad_token": "<|pad|>"})
    chatml.add_special_tokens({"extra_special_tokens": [*MARKS, turn]})
    whole = [*CHAT, *ANSWER, {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    rows = Dataset.from_list([{"messages": whole}])
    tokenizer = models.load_tokenizer(tokenizer_folder(chatml), rows)
    assert tokenizer.eos_token == turn  # a rollout and a sample stop at it

    think = "<think>\n\n</think>\n\n" if family == "qwen3" else ""  # which that template writes in the last turn
    (row,) = data.demonstrations(rows, tokenizer)
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == f"w3 w4{turn}{think}w6{turn}"

    prompt = Dataset.from_list([{"prompt": whole[:3], "chosen": whole[3:], "rejected": ANSWER}])
    opening = render_prompt(prompt[0], tokenizer)
    (compared,), (scored,) = data.comparisons(prompt, tokenizer), reward_model.tokenize(prompt, tokenizer)
    assert compared["prompt_ids"] == opening and tokenizer.decode(compared["chosen_ids"]) == f"{think}w6{turn}"
    assert scored["chosen_ids"] == opening + compared["chosen_ids"]
    assert scored["rejected_ids"] == opening + compared["rejected_ids"]
    assert row["input_ids"] == scored["chosen_ids"]


def test_an_eos_token_that_the_template_never_writes_is_refused(chatml, tokenizer_folder):
    chatml.add_special_tokens({"extra_special_tokens": ["<|endoftext|>"]})
    cfg = tokenizer_folder(chatml, "model.eos_token='<|endoftext|>'")
    with pytest.raises(UserError, match=r"ends an answer with '<\|im_end\|>'.*leave model\.eos_token out"):
        models.load_tokenizer(cfg, CHAT_ROWS)
    assert models.load_tokenizer(cfg, PLAIN_ROWS).eos_token == "<|endoftext|>"  # where no template is used


def test_a_template_that_cannot_write_an_answer_is_refused(chatml, tokenizer_folder):
    chatml.chat_template = "{{ raise_exception('no answers here') }}"
    with pytest.raises(UserError, match=r"cannot write a question and its answer \(no answers here\)"):
        models.load_tokenizer(tokenizer_folder(chatml), CHAT_ROWS)


def test_plain_text_needs_no_chat_template(tokenizer, tokenizer_folder, caplog):
    assert models.load_tokenizer(tokenizer_folder(tokenizer), PLAIN_ROWS).chat_template is None
    assert not caplog.records


@pytest.mark.parametrize(
    "rows", [CHAT_ROWS, Dataset.from_list([{"messages": CHAT + ANSWER}])], ids=["prompt", "messages"]
)
def test_conversations_without_a_chat_template_get_the_plain_one_and_it_is_said(
    tokenizer, tokenizer_folder, rows, caplog
):
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        loaded = models.load_tokenizer(tokenizer_folder(tokenizer), rows)
    assert "has no chat template" in caplog.text and "model.chat_template" in caplog.text
    text = loaded.apply_chat_template(CHAT + ANSWER, tokenize=False)
    assert re.fullmatch(r"User: w1 w2\n\nAssistant: w3 w4<eos>\s*", text)


def test_a_template_of_ones_own_is_text_or_a_file(tokenizer, tokenizer_folder, tmp_path, caplog):
    template = "{% for m in messages %}w5 {{ m.content }} {% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    for given in (f'model.chat_template="{template}"', f"model.chat_template={tmp_path / 'mine.jinja'}"):
        loaded = models.load_tokenizer(tokenizer_folder(tokenizer, given), CHAT_ROWS)
        assert loaded.apply_chat_template(CHAT, tokenize=False) == "w5 w1 w2 "
    assert not caplog.records


def test_a_template_file_that_is_not_there_is_refused(tokenizer, tokenizer_folder):
    cfg = tokenizer_folder(tokenizer, "model.chat_template=absent.jinja")
    with pytest.raises(UserError, match=r"model.chat_template.*absent.jinja"):
        models.load_tokenizer(cfg, CHAT_ROWS)


@pytest.fixture
def gpt2_like():
    """A byte-level BPE tokenizer that joins a space to the word after it, as nearly all of them do."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(kinds.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "User: Which colour is the sky?\n\nAssistant: It is blue, blue as ever.\n\n"
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def conversation(turns):
    messages = [{"role": "system", "content": "Be brief."}]
    for i in range(turns):
        messages += [
            {"role": "user", "content": f"Which colour is sky {i}?"},
            {"role": "assistant", "content": "It is blue."},
        ]
    return messages


@pytest.mark.parametrize("turns", [1, 3])
def test_in_the_plain_template_a_prompt_is_the_beginning_of_prompt_and_answer_in_text_and_in_tokens(gpt2_like, turns):
    """Else SFT teaches tokens that a rollout can never go on with."""
    gpt2_like.chat_template = models.PLAIN_CHAT_TEMPLATE
    messages = conversation(turns)
    opening, whole = (
        gpt2_like.apply_chat_template(part, tokenize=False, add_generation_prompt=generate)
        for part, generate in ((messages[:-1], True), (messages, False))
    )
    assert whole.startswith(opening) and whole[len(opening) :].strip() == "It is blue.<eos>"
    opening_ids, whole_ids = (gpt2_like(text)["input_ids"] for text in (opening, whole))
    assert whole_ids[: len(opening_ids)] == opening_ids


def test_with_the_plain_template_the_reward_model_reads_the_tokens_that_sft_taught(gpt2_like):
    gpt2_like.chat_template = models.PLAIN_CHAT_TEMPLATE
    row = {"prompt": conversation(2)[:-1], "completion": conversation(2)[-1:]}
    prompt_ids, completion_ids = render(row, gpt2_like)
    whole = gpt2_like.apply_chat_template(conversation(2), tokenize=False)
    taught = gpt2_like(whole[: whole.rindex("<eos>") + len("<eos>")])["input_ids"]
    assert prompt_ids == render_prompt(row, gpt2_like)
    assert prompt_ids + completion_ids == taught


# ---- base


@pytest.mark.parametrize(
    ("override", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_base_is_loaded_in_the_type_asked_for_and_frozen(base, override, dtype):
    model = models.load_base(config(base, f"model.dtype={override}"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    precision = models.precision(config(base, f"model.dtype={override}"))
    assert (precision["bf16"], precision["fp16"]) == (dtype == torch.bfloat16, dtype == torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is bf16 or fp16")
@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_is_slow_in_bf16_is_told_of(base, fast, monkeypatch, caplog):
    monkeypatch.setattr("rlhf_recipes.machine.multiplies_bf16", lambda: fast)
    models.load_base(compose("sft", [f"model.name_or_path={base}", "model.dtype=bfloat16"]))
    assert ("model.dtype=float32 is faster" in caplog.text) is not fast


def test_without_a_gpu_auto_is_float32(base):
    assert models.dtype(config(base).model) == torch.float32
    assert models.precision(config(base)) == {"bf16": False, "fp16": False, "use_cpu": True}


def test_nf4_packs_the_linear_layers_of_the_decoder_and_computes_in_the_type_asked_for(base):
    import bitsandbytes as bnb

    for classifier in (False, True):
        model = models.load_base(config(base, *NF4, "model.dtype=bfloat16"), classifier=classifier)
        packed = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        assert len(packed) == 4 * 7 and all(".layers." in n for n in packed)
        assert {m.weight.quant_type for m in packed.values()} == {"nf4"}
        assert {m.compute_dtype for m in packed.values()} == {torch.bfloat16}


def test_an_nf4_base_computes_the_same_in_training_and_in_evaluation_and_after_it():
    """On a CPU with AVX512-BF16, bitsandbytes repacks its weights at the first pass in evaluation mode, with scales
    rounded to bf16, for good: a resumed run would not end where a whole one does, and SFT's figures would differ from
    stage to stage."""
    model = models.load_base(compose("sft", NF4))  # its layers are wide enough to be repacked, the tiny Llama's are not
    ids = torch.arange(5, 69).view(4, 16)
    with torch.no_grad():
        training = model.train()(input_ids=ids).logits
        evaluation = model.eval()(input_ids=ids).logits
        afterwards = model.train()(input_ids=ids).logits
    assert torch.equal(training, evaluation) and torch.equal(training, afterwards)


def test_int8_packs_the_linear_layers_of_the_decoder(base):
    import bitsandbytes as bnb

    model = models.load_base(config(base, "quantization=int8"))
    packed = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len(packed) == 4 * 7 and all(".layers." in n for n in packed)


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(base, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (base / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig\n\n\n"
        "class Theirs(LlamaConfig):\n    model_type = 'theirs'\n"
    )
    file = base / "config.json"
    theirs = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | theirs))
    models.load_tokenizer(config(base).model, PLAIN_ROWS)
    with pytest.raises(ValueError, match="trust_remote_code"):
        models.load_base(config(base))
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(ValueError):  # it has no model of its own
        models.load_base(config(base, "model.trust_remote_code=true"))
    assert (tmp_path / "ran").exists()


def test_a_model_that_is_not_there_is_refused_plainly(tmp_path):
    with pytest.raises(UserError, match=r"model.name_or_path.*absent"):
        models.load_tokenizer(config(tmp_path / "absent").model, PLAIN_ROWS)


# ---- fingerprint


def test_a_base_has_one_fingerprint_in_every_type_and_quantization_and_with_any_head(base):
    found = {
        name: models.fingerprint(models.load_base(config(base, *overrides), classifier=classifier))
        for name, overrides, classifier in (
            ("float32", [], False),
            ("bfloat16", ["model.dtype=bfloat16"], False),
            ("float16", ["model.dtype=float16"], False),
            ("nf4", NF4, False),
            ("int8", ["quantization=int8"], False),
            ("classifier", [], True),
            ("nf4 classifier", NF4, True),
        )
    }
    assert len(set(found.values())) == 1, found
    cfg = config(base)
    assert models.fingerprint(models.load_policy(cfg, None)) == found["float32"]
    assert models.fingerprint(models.load_reward_model(cfg, None)) == found["float32"]


def test_another_base_has_another_fingerprint(base, tiny_llama):
    prints = {models.fingerprint(tiny_llama(**kwargs)) for kwargs in ({}, {"seed": 1}, {"layers": 3})}
    assert len(prints) == 3


# ---- adapters


def lora(model, adapter=POLICY):
    return {n: p for n, p in model.named_parameters() if "lora_" in n and f".{adapter}." in n}


@pytest.fixture
def sft(base, tmp_path):
    """Folder of an SFT adapter on the base: no tensor of it is what a new adapter would have."""
    model = models.new_adapter(models.load_base(config(base)), config(base))
    torch.manual_seed(7)
    for parameter in lora(model).values():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


@pytest.mark.parametrize("overrides", [[], NF4, ["model.dtype=bfloat16"]], ids=["fp32", "nf4", "bf16"])
def test_equal_seeds_give_equal_adapters_on_the_causal_model_and_on_the_classifier(base, overrides):
    """Where the chain starts at the model itself, the lower layers of policy and reward model must be equal."""
    cfg = config(base, *overrides)
    policy = models.load_policy(cfg, None)
    torch.rand(3)  # the random state outside does not count
    again, reward = models.load_policy(cfg, None), models.load_reward_model(cfg, None)
    assert len(lora(policy)) == 4 * 7 * 2
    for other in (again, reward):
        assert lora(other).keys() == lora(policy).keys()
        assert all(torch.equal(p, lora(other)[n]) for n, p in lora(policy).items())
    other_seed = models.load_policy(config(base, *overrides, "seed=1"), None)
    assert not all(torch.equal(p, lora(other_seed)[n]) for n, p in lora(policy).items())


def test_a_target_module_that_is_not_in_the_model_is_refused_though_others_are(base):
    cfg = config(base, "lora.target_modules=[q_proj,v_prj]")
    with pytest.raises(UserError, match=r"the model has no v_prj; its linear layers are .*q_proj, .*v_proj"):
        models.new_adapter(models.load_base(cfg), cfg)


def test_a_new_adapter_does_nothing_yet(base):
    cfg = config(base)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(models.load_policy(cfg, None)(input_ids=ids).logits, models.load_base(cfg)(input_ids=ids).logits)


@pytest.mark.parametrize("overrides", [[], NF4], ids=["fp32", "nf4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_all_linear_layers_get_an_adapter_but_never_a_head(base, overrides, tied, tiny_llama):
    if tied:
        model = tiny_llama()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(base)
    cfg = config(base, *overrides)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for model in (models.load_policy(cfg, None), models.load_reward_model(cfg, None)):
        targets = {n.split(".lora_")[0] for n in lora(model)}
        assert {t.rsplit(".", 1)[1] for t in targets} == linear and len(targets) == 4 * 7


def test_a_policy_is_loaded_from_its_folder_frozen_and_ready_to_train(base, sft):
    policy = models.load_policy(config(base), sft)
    saved = read_adapter(sft)
    assert all(torch.equal(p, saved[n.replace(f".{POLICY}.", ".")]) for n, p in lora(policy).items())
    assert not any(p.requires_grad for p in policy.parameters())


def test_an_adapter_of_another_base_is_refused(base, sft, tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaConfig(vocab_size=43, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match=f"{sft}"):
        models.load_policy(config(tmp_path / "wider"), sft)
    with pytest.raises(UserError, match=f"{sft}"):
        models.load_reward_model(config(tmp_path / "wider"), sft)


@pytest.mark.parametrize(
    "overrides",
    [[], NF4, ["quantization=int8"], ["model.dtype=bfloat16"]],
    ids=["fp32", "nf4", "int8", "bf16"],
)
def test_a_reward_model_starts_from_the_sft_adapter_with_a_new_score_head_in_float32(base, sft, overrides):
    cfg = config(base, *overrides, recipe="rm")
    model = models.load_reward_model(cfg, sft)
    assert not any(p.requires_grad for p in model.parameters())
    saved = read_adapter(sft)
    held = lora(model)
    assert len(held) == len(saved)
    assert all(torch.equal(p, saved[n.replace(f".{POLICY}.", ".")]) for n, p in held.items())

    models.thaw(model, 0.5)
    heads = {n: p for n, p in model.named_parameters() if "score" in n and p.requires_grad}
    assert [n.split("score.")[1] for n in heads] == [f"modules_to_save.{POLICY}.weight"]
    head = next(iter(heads.values()))
    assert head.dtype == torch.float32 and head.shape == (1, 32) and head.std() > 0


def test_a_reward_model_keeps_what_sft_trained_in_full_but_an_lm_head(base, tmp_path):
    policy = models.load_policy(config(base, "lora.modules_to_save=[embed_tokens,lm_head]"), None)
    trained = Roles(policy, trunk=0).parameters(POLICY)
    name = next(n for n in trained if "embed_tokens" in n)
    trained[name].data.add_(1)
    policy.save_pretrained(tmp_path / "sft")
    reward = Roles(models.load_reward_model(config(base, recipe="rm"), tmp_path / "sft"), trunk=0)
    assert torch.equal(reward.parameters(POLICY)[name], trained[name])


@pytest.mark.parametrize("overrides", [[], NF4, ["model.dtype=bfloat16"]], ids=["fp32", "nf4", "bf16"])
@pytest.mark.parametrize(("trunk", "frozen"), [(0, 0), (0.5, 2), (0.75, 3), (0.9, 3)])
def test_exactly_the_layers_above_the_trunk_train_in_float32(base, sft, overrides, trunk, frozen):
    cfg = config(base, *overrides)
    for model, heads in ((models.load_policy(cfg, sft), 0), (models.load_reward_model(cfg, sft), 1)):
        models.thaw(model, trunk)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        upper = {n for n in lora(model) if int(n.split(".layers.")[1].split(".")[0]) >= frozen}
        assert upper == {n for n in trainable if "lora_" in n}
        assert len(upper) == (4 - frozen) * 7 * 2 and len(trainable) == len(upper) + heads
        assert {p.dtype for p in trainable.values()} == {torch.float32}


# ---- one training step of TRL's own trainers


PAIRS = [{"prompt": f"w{i} w{i + 1}", "chosen": " w3 w4", "rejected": " w7"} for i in range(8)]


def trained(kind, cfg, sft, tokenizer, output_dir, checkpointing, trunk=0.5):
    """A model after one step as the recipe takes it, its trainer, and the layers that a gradient reached."""
    from trl import DPOConfig, RewardConfig

    from rlhf_recipes import data, reward_model
    from rlhf_recipes.preferences import PairDPOTrainer, PairRewardTrainer

    options = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": checkpointing,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        **models.precision(cfg),
    }
    if kind == "rm":
        model = models.load_reward_model(cfg, sft)
        rows = reward_model.tokenize(Dataset.from_list(PAIRS), tokenizer)
        trainer = PairRewardTrainer(model, RewardConfig(**options), train_dataset=rows, processing_class=tokenizer)
    else:
        model = models.load_policy(cfg, sft)
        rows = data.comparisons(Dataset.from_list(PAIRS), tokenizer)
        trainer = PairDPOTrainer(model, DPOConfig(**options), train_dataset=rows, processing_class=tokenizer)
    roles = models.thaw(model, trunk)
    reached = set()
    for i, layer in enumerate(roles.layers):
        layer.self_attn.q_proj.register_full_backward_hook(lambda *_, i=i: reached.add(i))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return model, trainer, moved, reached


@pytest.mark.parametrize("overrides", [[], NF4], ids=["fp32", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_a_step_moves_what_is_above_the_trunk_and_no_gradient_goes_below(
    base, sft, tokenizer, tmp_path, kind, checkpointing, overrides
):
    cfg = config(base, *overrides)
    model, trainer, moved, reached = trained(kind, cfg, sft, tokenizer, tmp_path / "out", checkpointing)
    assert trainer.model.is_gradient_checkpointing == checkpointing
    assert reached == {2, 3}
    upper = {n for n in lora(model) if ".layers.2." in n or ".layers.3." in n}
    score = {n for n in moved if "score" in n}
    assert moved == upper | score
    assert len(score) == (kind == "rm")


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_weights_after_a_step_with_checkpointing_equal_those_without(base, sft, tokenizer, tmp_path, kind):
    cfg = config(base)
    results = [
        dict(trained(kind, cfg, sft, tokenizer, tmp_path / "out", c)[0].named_parameters()) for c in (False, True)
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, msg=name)


@pytest.mark.parametrize("overrides", [[], NF4], ids=["fp32", "nf4"])
def test_dpo_starts_where_the_reference_is(base, sft, tokenizer, tmp_path, overrides):
    """TRL casts a trainable adapter to bf16 on a quantized base and leaves the reference: they would differ at once."""
    model, trainer, _, _ = trained("dpo", config(base, *overrides), sft, tokenizer, tmp_path / "out", False)
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)  # -log sigmoid(0), at the first step
    saved = read_adapter(sft)
    reference = lora(model, REFERENCE)
    assert len(reference) == len(saved)
    assert all(torch.equal(p, saved[n.replace(f".{REFERENCE}.", ".")]) for n, p in reference.items())


def test_the_saved_reward_model_holds_its_head_and_loads_in_plain_peft(base, sft, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    cfg = config(base)
    model, trainer, _, _ = trained("rm", cfg, sft, tokenizer, tmp_path / "out", False)
    trainer.save_model(str(tmp_path / "rm"))
    assert torch.equal(read_adapter(tmp_path / "rm")[HEAD_KEY], model.base_model.model.score.weight)
    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    again = PeftModel.from_pretrained(again, tmp_path / "rm").eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# nf4 stands in test_recipes.py: on a CPU bitsandbytes repacks the weights for inference, and not those of 16 rows
@pytest.mark.parametrize(
    "overrides", [[], ["quantization=int8"], ["model.dtype=bfloat16"]], ids=["fp32", "int8", "bf16"]
)
def test_a_trained_reward_model_can_be_asked_for_scores(base, sft, tokenizer, tmp_path, overrides):
    """Outside the trainer there is no autocast: a float32 head meets the base's own type."""
    from rlhf_recipes import reward_model

    model, _, _, _ = trained("rm", config(base, *overrides), sft, tokenizer, tmp_path / "out", False)
    pairs = reward_model.tokenize(Dataset.from_list(PAIRS), tokenizer)
    chosen, rejected = reward_model.pair_scores(model, pairs, tokenizer, 4)
    assert chosen.isfinite().all() and len(chosen) == len(rejected) == 8


def test_what_is_loaded_for_the_embedded_base_is_the_worlds_own():
    cfg = compose("sft")
    tokenizer = models.load_tokenizer(cfg.model, PLAIN_ROWS)
    assert AutoTokenizer.from_pretrained(models.source(cfg.model)).get_vocab() == tokenizer.get_vocab()
    assert models.load_base(cfg).config.vocab_size == len(tokenizer)
