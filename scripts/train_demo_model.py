"""Train the small language model that ships with the package, and write its calibration and held-out text.

The text is English that comes with CPython: the language topics of ``pydoc`` and the docstrings of the standard
library, whose files are parsed and never imported. The model is a Llama of 0.87 million parameters. Equal options
give an equal result under the same versions of Python, PyTorch and tokenizers and on the same kind of processor;
another CPython has other text. The defaults made the files that ship, in about half an hour on one core.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import random
import re
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parents[1] / "kfac_prune" / "assets"
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data"}
MIN_CHARS, MAX_CHARS = 80, 20_000  # of a docstring, and of a held-out text, where one could be a third of all
SHINGLE_WORDS, MAX_SHARED = 4, 0.2  # a near-copy shares over this fraction of its runs of so many words
CALIBRATION_BYTES, MIN_CALIBRATION_TOKENS = 350_000, 60_000
VOCABULARY, WINDOW = 1024, 256  # tokens
BOS, EOS = "<s>", "</s>"
SUMMARY = "Train the demo's language model, and write it with its calibration and held-out text."

README = """# Assets of the demo

- `demo_model/`: a Llama language model of {parameters:,} parameters (bfloat16) and its tokenizer (1024 tokens).
- `demo_calibration.jsonl`: a random sample of its training documents, {calibration:,} tokens.
- `demo_heldout.jsonl`: documents that it has not seen, nor near-copies of them, {heldout:,} tokens.

The model's loss on the held-out text is {loss:.4f} nats per token (perplexity {perplexity:.2f}), over consecutive
windows of 256 tokens, after {seen:,} training tokens.
All text is from the documentation and the docstrings of CPython {python} (PSF License 2.0, © Python Software
Foundation). Everything here is written by `python scripts/train_demo_model.py`; see there for the options.
"""


def read_documents() -> list[str]:
    """Every distinct topic and standard-library docstring, in the order of topics' and files' names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    found = dict.fromkeys(topics[name].strip() for name in sorted(topics))  # an ordered set
    for name, path in files:
        if not SKIPPED_FOLDERS.intersection(name.split("/")):
            found |= dict.fromkeys(text for text in docstrings(path) if len(text) >= MIN_CHARS)
    return list(found)


def docstrings(path: Path) -> Iterator[str]:
    """The dedented docstrings of a source file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield (ast.get_docstring(node) or "").strip()


def shingles(text: str) -> set[str]:
    """All runs of SHINGLE_WORDS words, without case, digits and punctuation."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def split(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Train and held-out documents, of which no one is nearly a copy of one on the other side.

    A document is held out where a hash of its text says so and nearly nothing of it occurs in another document; what
    then still repeats much of the held-out text is left out of both.
    """
    runs = {text: shingles(text) for text in documents}
    copies = Counter(run for each in runs.values() for run in each)

    def chosen(text: str) -> bool:
        unit = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64  # uniform in [0, 1)
        shared = sum(copies[run] > 1 for run in runs[text])
        return unit < fraction and len(text) <= MAX_CHARS and shared <= MAX_SHARED * len(runs[text])

    heldout = [text for text in documents if chosen(text)]
    seen = set().union(*(runs[text] for text in heldout))
    rest = [text for text in documents if not chosen(text)]
    return [text for text in rest if len(runs[text] & seen) <= MAX_SHARED * len(runs[text])], heldout


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens that does not add BOS by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    start = {"special_tokens": [BOS, EOS], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    core.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, **start))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, model_max_length=WINDOW)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[Tensor]:
    """Per document its tokens with BOS before them, [L] int64."""
    rows = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [torch.tensor([tokenizer.bos_token_id, *row]) for row in rows["input_ids"]]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model in float32."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sizes = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": VOCABULARY, "max_position_embeddings": WINDOW}
    blocks = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **blocks, tie_word_embeddings=True, bos_token_id=bos, eos_token_id=eos)
    model = LlamaForCausalLM(config)
    # Documents follow each other with BOS and no EOS, so BOS is what the model puts where a text ends.
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=[bos, eos])
    return model


def epochs(documents: Sequence[Tensor], batch: int, seed: int) -> Iterator[Tensor]:
    """Batches [batch, WINDOW] without end: an epoch joins the documents in a new order and cuts the stream."""
    shuffle = random.Random(seed)
    while True:
        stream = torch.cat(shuffle.sample(documents, len(documents)))
        windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)  # [N, T]
        windows = windows[torch.tensor(shuffle.sample(range(len(windows)), len(windows)))]
        yield from (rows for rows in windows.split(batch) if len(rows) == batch)


def token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token of ids [B, T], in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, documents: Sequence[Tensor]) -> float:
    """Mean loss over the consecutive windows of all documents together, in nats per token."""
    stream = torch.cat(list(documents))
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)  # [N, T]
    return sum(token_loss(model, rows).item() * len(rows) for rows in windows.split(16)) / len(windows)


def fit(model: LlamaForCausalLM, train: Sequence[Tensor], heldout: Sequence[Tensor], args: argparse.Namespace) -> None:
    """Train by AdamW with linear warm-up and cosine decay to zero; only matrices decay."""
    matrices, vectors = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    start, running = time.monotonic(), 0.0
    for step, ids in zip(range(1, args.steps + 1), epochs(train, args.batch, args.seed), strict=False):
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - args.warmup) / (args.steps - args.warmup))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / args.warmup) * cosine
        loss = token_loss(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % args.log_every == 0 or step == args.steps:
            spent = time.monotonic() - start
            done = f"step {step}/{args.steps}, train loss {running / ((step - 1) % args.log_every + 1):.4f}"
            pace = f"{step * ids.numel() / spent:.0f} tokens/s, {spent * (args.steps / step - 1) / 60:.1f} min left"
            print(f"{done}, held-out loss {heldout_loss(model, heldout):.4f}, {pace}", flush=True)
            running = 0.0


def json_lines(documents: Sequence[str], limit: float = math.inf) -> tuple[list[str], str]:
    """The documents that, each in its turn, still fit into `limit` bytes, and their JSON lines."""
    lines: dict[str, str] = {}
    for text in documents:
        line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
        if (size := len(line.encode())) <= limit:
            lines[text] = line
            limit -= size
    return list(lines), "".join(lines.values())


def install(new: Path, out: Path) -> None:
    """Rename everything in `new`, a folder inside `out`, into `out`; what it replaces takes its place in `new`."""
    for path in sorted(new.iterdir()):
        if (target := out / path.name).exists():
            target.rename(new / f"{path.name}.replaced")
        path.rename(target)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=SUMMARY, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that receives the files")
    parser.add_argument("--steps", type=int, default=6400, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.5, help="decoupled decay per step, times learning rate")
    parser.add_argument("--heldout", type=float, default=0.14, help="fraction of unique documents to hold out")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and calibration sample")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log-every", type=int, default=400, help="steps between two reports")
    args = parser.parse_args()
    if not 0 < args.warmup < args.steps:
        parser.error(f"--warmup is {args.warmup}: it must be above 0 and below --steps, {args.steps}")
    return args


def main() -> None:
    """Read, split, train, evaluate, write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train, heldout = split(read_documents(), args.heldout)
    sample, calibration = json_lines(random.Random(args.seed).sample(train, len(train)), CALIBRATION_BYTES)
    tokenizer = train_tokenizer(train)
    parts = {"train": train, "heldout": heldout, "calibration": sample}
    ids = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    counts = {name: sum(map(len, rows)) for name, rows in ids.items()}
    for name, texts in parts.items():
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)):,} characters, {counts[name]:,} tokens")
    if counts["calibration"] < MIN_CALIBRATION_TOKENS:
        raise SystemExit(f"{counts['calibration']} calibration tokens: at least {MIN_CALIBRATION_TOKENS} are needed")

    model = build_model(tokenizer)
    fit(model, ids["train"], ids["heldout"], args)
    for parameter in model.parameters():  # and no buffers: the rotary frequencies stay exact in a loaded model
        parameter.data = parameter.data.bfloat16().float()
    loss = heldout_loss(model, ids["heldout"])
    print(f"bfloat16 weights: held-out loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}")

    counts |= {"parameters": model.num_parameters(), "seen": args.steps * args.batch * WINDOW}
    readme = README.format(loss=loss, perplexity=math.exp(loss), python=platform.python_version(), **counts)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".new-") as folder:  # inside `out`, so that renaming works
        new = Path(folder)
        model.to(torch.bfloat16).save_pretrained(new / "demo_model")
        tokenizer.save_pretrained(new / "demo_model")
        (new / "demo_model" / "model.safetensors").chmod(0o644)  # which safetensors writes for its owner only
        (new / "demo_calibration.jsonl").write_text(calibration, encoding="utf-8")
        (new / "demo_heldout.jsonl").write_text(json_lines(heldout)[1], encoding="utf-8")
        (new / "README.md").write_text(readme, encoding="utf-8")
        install(new, args.out)


if __name__ == "__main__":
    main()
