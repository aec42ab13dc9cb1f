"""Make the world's base model, a tiny Llama that has read the documents: `python -m rlhf_recipes.world.make_base`.

Takes about five minutes on two cores and writes configuration, weights (bf16) and tokenizer to `world/base/`.
"""

import argparse
import logging
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_recipes.world import BASE
from rlhf_recipes.world.documents import DOCUMENTS, document
from rlhf_recipes.world.facts import PROMPTS

SPECIAL = ("<pad>", "<eos>", "<unk>")
SHAPE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)
CONTEXT = 256
ROWS, ROW_LENGTH = 32, 64

logger = logging.getLogger(__name__)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and mark that the documents and prompts can hold; spaces come back in decoding."""
    rng = random.Random("vocabulary")
    cut = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    texts = [*PROMPTS, *(make(rng) for make in DOCUMENTS for _ in range(3000))]
    vocabulary = (*SPECIAL, *sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)}))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex(r"^(?=[\w<])"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with weights as drawn."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPE,
        )
    )


def batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> torch.Tensor:
    """Fresh documents, whole ones packed into rows that start with one: token ids, (ROWS, ROW_LENGTH)."""
    rows: list[list[int]] = [[]]
    while True:
        tokens = [*tokenizer.backend_tokenizer.encode(document(rng)).ids, tokenizer.eos_token_id]
        if len(rows[-1]) + len(tokens) > ROW_LENGTH:
            rows[-1] += [tokenizer.pad_token_id] * (ROW_LENGTH - len(rows[-1]))
            if len(rows) == ROWS:
                return torch.tensor(rows)
            rows.append([])
        rows[-1] += tokens[:ROW_LENGTH]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, lr: float, seed: int) -> None:
    """Next-token prediction on documents, no two of them the same but by chance."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(1, steps + 1):
        tokens = batch(tokenizer, rng)
        labels = tokens.masked_fill(tokens == tokenizer.pad_token_id, -100)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            logger.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - start)


def main() -> None:
    """Make tokenizer and model, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help=f"optimizer steps of {ROWS * ROW_LENGTH} tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    logger.info("%d words, %.2f M parameters", len(tokenizer), model.num_parameters() / 1e6)
    train(model, tokenizer, args.steps, args.lr, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
