"""Train the demo checkpoint: a five-million-parameter Llama that writes Python.

Reads the standard library of the running interpreter, fits a byte-level BPE on it, trains for a fixed wall time on the
CPU, and writes a folder that loads like any Hugging Face checkpoint. Two runs differ, because time decides the steps.
"""

import argparse
import bisect
import contextlib
import copy
import itertools
import math
import os
import platform
import random
import re
import shlex
import shutil
import sys
import sysconfig
import time
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = """examples:
  python recipes/tiny_llama.py --out /tmp/tiny-llama --minutes 2
  python recipes/tiny_llama.py --out recipes/tiny-llama --minutes 45 --compile
On a machine with other work, OMP_WAIT_POLICY=passive in the environment makes it several times faster.
"""

BOS, EOS, BOS_ID, EOS_ID = "<s>", "</s>", 0, 1
PROMPTS = ("def ", "class ", "<s>import ")

# Tests, vendored packages, and tables that a program wrote.
SKIPPED_FOLDERS = set("__pycache__ dist-packages encodings idle_test pydoc_data site-packages test tests".split())
SKIPPED_FILES = re.compile(r"(^|/)_sysconfigdata.*\.py$|^config-.*/|^html/entities\.py$|^msilib/(schema|sequence)\.py$")
HELD_OUT_ONE_IN = 20
MEASURE_EVERY = 120.0  # seconds
AFTER_BLANK = re.compile(r"(?<= )(?=\S)")  # a prompt may end here, where the BPE joins the blank to what follows
OPENERS = ("def", "class", "import", "from")  # what a prompt begins with, more often than not
AFTER_OPENER = re.compile(rf"\b(?:{'|'.join(OPENERS)}) (?=\S)")


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; sizes in tokens, times in seconds."""

    seconds: float
    vocab_size: int = 4096
    context: int = 512
    batch: int = 4
    peak_learning_rate: float = 3e-3
    warm_up: float = 0.02  # part of the run
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    cut_rate: float = 0.04  # of blanks, see random_cuts
    opener_rate: float = 0.25  # of openers to be cut after, and of windows to begin with one


@dataclass(frozen=True)
class Score:
    """Held-out result: nats per token, over `num_tokens` predictions in `num_bytes` of text."""

    loss: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; it depends on the tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of source; comparable between tokenizers."""
        return self.loss * self.num_tokens / (math.log(2) * self.num_bytes)


@dataclass
class Run:
    """What is being trained, and where it stands; each step changes it."""

    recipe: Recipe
    train_texts: list[str]
    held_out_texts: list[str]
    tokenizer: Tokenizer
    model: LlamaForCausalLM
    order: random.Random
    started: float
    steps: int = 0
    tokens: int = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started  # wall seconds


def main() -> None:
    """Read the corpus, fit the tokenizer, train, save, report."""
    run = make_run(args := parse_arguments())
    print(f"{len(run.train_texts)} files to train on, {len(run.held_out_texts)} held out")
    try:
        train(run, args.compile)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was written") from None
    score = save_checkpoint(run, args.out)
    print(f"held-out loss {score.loss:.4f}, perplexity {score.perplexity:.3f}, {score.bits_per_byte:.4f} bits per byte")


def parse_arguments() -> argparse.Namespace:
    """Command line; `--help` shows examples."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=45.0, help="training time (default 45)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step; needs a C++ compiler")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g} is not positive")
    if args.out.exists() and not (args.out / "config.json").is_file():
        parser.error(f"--out {args.out} exists and is no checkpoint (no config.json); name another folder")
    return args


def make_run(args: argparse.Namespace) -> Run:
    """Everything up to the first step."""
    torch.manual_seed(0)
    recipe = Recipe(seconds=60 * args.minutes)
    train_texts, held_out_texts = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size)
    model = LlamaForCausalLM(model_config(recipe))  # type: ignore[no-untyped-call]
    return Run(recipe, train_texts, held_out_texts, tokenizer, model, random.Random(0), time.monotonic())


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Hand-written files under `root`, to train on and held out; a hash of its name places each."""
    texts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or SKIPPED_FILES.search(name.as_posix()):
            continue
        is_held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_ONE_IN == 0
        with tokenize.open(path) as file:
            texts[is_held_out].append(file.read())
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Fit a byte-level BPE; it adds no special token to what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(recipe: Recipe) -> LlamaConfig:
    """Shape of the model; no padding id yet, which would freeze the embedding of </s>."""
    return LlamaConfig(  # type: ignore[no-untyped-call]
        vocab_size=recipe.vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def encode_stream(tokenizer: Tokenizer, texts: list[str], cuts: Callable[[str], list[int]]) -> Tensor:
    """Each text between <s> and </s>, end to end, encoded in the pieces that `cuts` makes: [tokens] int64."""
    ids: list[int] = []
    for text in texts:
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts(text), len(text)])]
        encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
        ids += [BOS_ID, *(i for encoding in encodings for i in encoding.ids), EOS_ID]
    return torch.tensor(ids)


def random_cuts(text: str, recipe: Recipe, order: random.Random) -> list[int]:
    """Places after a few blanks, most of them after an opener, so that a prompt may end with one."""
    blanks = {m.start() for m in AFTER_BLANK.finditer(text) if order.random() < recipe.cut_rate}
    return sorted(blanks | {m.end() for m in AFTER_OPENER.finditer(text) if order.random() < recipe.opener_rate})


def training_batches(run: Run) -> Iterator[Tensor]:
    """Yield [batch, context + 1] int64 without end, epoch after epoch.

    An epoch is all files with new cuts, in windows in random order. A part of them, `opener_rate`, is moved on to the
    next line that begins with an opener: a prompt has it at position 0, where a window would seldom have one.
    """
    order, recipe = run.order, run.recipe
    openers = torch.tensor([run.tokenizer.token_to_id(word) for word in OPENERS])
    while True:
        texts = order.sample(run.train_texts, len(run.train_texts))
        stream = encode_stream(run.tokenizer, texts, lambda text: random_cuts(text, recipe, order))
        last = len(stream) - recipe.context - 1
        lines = torch.isin(stream[: last + 1], openers).nonzero().flatten().tolist()
        starts = list(range(0, last + 1, recipe.context))
        for i in order.sample(range(len(starts)), round(recipe.opener_rate * len(starts))):
            starts[i] = lines[min(bisect.bisect(lines, starts[i]), len(lines) - 1)]
        order.shuffle(starts)
        for first in range(0, len(starts) - recipe.batch + 1, recipe.batch):
            chosen = starts[first : first + recipe.batch]
            yield torch.stack([stream[i : i + recipe.context + 1] for i in chosen])


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats; matmuls in bfloat16, the loss in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms.

    One learning rate serves both (scale of updates: https://arxiv.org/abs/2502.16982, section 2.2).
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed_tokens" in name]
    muon = torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def train(run: Run, is_compiled: bool) -> None:
    """Step until the time is over; measure on the way."""
    recipe, batches, optimizers = run.recipe, training_batches(run), make_optimizers(run.model, run.recipe)
    loss_of = torch.compile(next_token_loss) if is_compiled else next_token_loss
    held_out = encode_stream(run.tokenizer, run.held_out_texts, lambda _: [])[: 32 * recipe.context + 1]
    next_measure, average, held_out_loss = MEASURE_EVERY, 0.0, math.nan
    with tqdm(total=round(recipe.seconds), bar_format="{l_bar}{bar}|{n:.0f}/{total}s{postfix}") as bar:
        while run.elapsed < recipe.seconds:
            loss = train_step(run, optimizers, loss_of, next(batches))
            average += (loss - average) * max(0.02, 1 / run.steps)
            if run.elapsed >= next_measure:
                held_out_loss = mean_loss(run.model, held_out, recipe.context)
                next_measure += MEASURE_EVERY
            status = f"step {run.steps} train {average:.3f} held-out {held_out_loss:.3f}"
            bar.set_postfix_str(f"{status} {run.tokens / run.elapsed:.0f} tokens/s", refresh=False)
            bar.update(min(run.elapsed, recipe.seconds) - bar.n)


def train_step(
    run: Run,
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    windows: Tensor,  # [batch, context + 1] int64
) -> float:
    """One update, at a rate linear up to the peak and down to zero; returns the loss before it."""
    fraction, warm_up = min(1.0, run.elapsed / run.recipe.seconds), run.recipe.warm_up
    rate = run.recipe.peak_learning_rate * min(fraction / warm_up, (1 - fraction) / (1 - warm_up))
    loss = loss_of(run.model, windows)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.max_gradient_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    run.steps += 1
    run.tokens += windows[:, 1:].numel()
    return loss.item()


@torch.inference_mode()
def mean_loss(model: nn.Module, stream: Tensor, context: int) -> float:
    """Nats per token of all but the first token, in windows that do not share targets."""
    total, full = 0.0, (len(stream) - 1) // context * context
    x, y = stream[:full].view(-1, context), stream[1 : full + 1].view(-1, context)
    pairs = [(x[i : i + 8], y[i : i + 8]) for i in range(0, len(x), 8)]
    if full < len(stream) - 1:
        pairs.append((stream[None, full:-1], stream[None, full + 1 :]))
    for x, y in pairs:
        logits = model(input_ids=x, use_cache=False).logits
        total += nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    return total / (len(stream) - 1)


def save_checkpoint(run: Run, out: Path) -> Score:
    """Write the folder beside `out`, measure what was written, then put it in place."""
    seconds = run.elapsed
    with replaced_folder(out) as folder:
        write_model(folder, run)
        saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        stream = encode_stream(run.tokenizer, run.held_out_texts, lambda _: [])
        num_bytes = sum(len(text.encode()) for text in run.held_out_texts)
        score = Score(mean_loss(saved, stream, run.recipe.context), len(stream) - 1, num_bytes)
        samples = "\n".join(f"```python\n{sample(saved, run.tokenizer, prompt)}\n```\n" for prompt in PROMPTS)
        card = MODEL_CARD.format(
            facts=facts(run, score, seconds), command=shlex.join(["python", *sys.argv]), samples=samples
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return score


@contextlib.contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `out` when the block succeeds."""
    new = out.with_name(f".{out.name}.new.{os.getpid()}")
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_model(folder: Path, run: Run) -> None:
    """bfloat16 weights in two shards, the tokenizer's files, config.json and generation_config.json."""
    half = copy.deepcopy(run.model).bfloat16()
    half.config.pad_token_id = EOS_ID
    half.generation_config = GenerationConfig.from_model_config(half.config)
    half.save_pretrained(folder, max_shard_size="6MB", safe_serialization=True)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=run.tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=run.recipe.context
    ).save_pretrained(folder)
    path = folder / "config.json"  # The older name of the field is the one that every reader knows.
    path.write_text(path.read_text(encoding="utf-8").replace('"dtype":', '"torch_dtype":'), encoding="utf-8")


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt and 64 tokens drawn at temperature 0.6 from the most probable 90 %."""
    torch.manual_seed(2)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    options = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(output[0].tolist()))


def facts(run: Run, score: Score, seconds: float) -> str:
    """Rows of the model card's table."""
    config, train_bytes = run.model.config, sum(len(text.encode()) for text in run.train_texts)
    return f"""| parameters | {run.model.num_parameters():,}, embeddings tied |
| shape | {config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads, \
{config.num_key_value_heads} key-value heads, context {config.max_position_embeddings}, {config.vocab_size} pieces |
| corpus | standard library of Python {platform.python_version()}, \
{train_bytes:,} bytes in {len(run.train_texts)} files |
| training | {seconds / 60:.1f} minutes, {run.steps:,} steps, {run.tokens:,} tokens, \
{run.tokens / seconds:,.0f} tokens/s on {torch.get_num_threads()} CPU threads |
| held-out | {len(run.held_out_texts)} files, {score.num_bytes:,} bytes, {score.num_tokens:,} tokens |
| held-out loss | {score.loss:.4f} nats per token |
| held-out perplexity | {score.perplexity:.3f} |
| held-out bits per byte | {score.bits_per_byte:.4f} |"""


MODEL_CARD = """---
license: apache-2.0
library_name: transformers
tags: [llama, python, demo]
---

# tiny-llama

A small Llama that continues Python source, so that the runtime can be tried, tested and measured
without a download. It knows the manner of the standard library and nothing else.

| | |
|---|---|
{facts}

Measured on the saved bfloat16 weights, computed in float32, over whole held-out files in windows
of the context's length. Optimizers: Muon (matrices) and AdamW (embedding, norms), decaying to zero.

```
{command}
```

Continuations of `def `, `class ` and `<s>import `, at temperature 0.6:

{samples}
## Licence

Weights and recipe: Apache-2.0. Trained on the Python standard library, which is under the
Python Software Foundation License Version 2; a continuation may repeat parts of it.
"""

if __name__ == "__main__":
    main()
