"""Text to token windows: documents are read, tokenised into one stream, and windows are cut out of the stream.

L is the number of tokens in the stream, N the number of windows, T the number of tokens in a window.
"""

import codecs
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from kfac_prune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEXT_BYTES = 16 * 2**20  # of UTF-8, per source
MAX_TOKENS = 2**31  # in a set of windows: 16 GiB
MAX_JSON_BYTES = 16 * MAX_TEXT_BYTES  # a .json list can only be parsed whole, which costs a few times its size
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
LINES_SUFFIXES = (".jsonl", ".ndjson")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".json")
FILE_SUFFIXES = (*FOLDER_SUFFIXES, ".gz", ".csv", ".parquet")  # a source ending so is never taken for a hub name
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:\S+)?")
#: One calibration window in so many is held out where weights are trained or corrected: no step sees it, and it decides
#: what is kept.
HELD_OUT = 10
DOCUMENTS_PER_CALL = 1000  # bounds the memory of the tokeniser's encodings

logger = logging.getLogger("kfac_prune")


class Document(NamedTuple):
    """A text and whether the model should see a beginning-of-sequence token before it."""

    text: str
    bos: bool


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """Some rows of a set of windows."""

    index: Tensor  # [B] int64, the rows' positions in the whole set
    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor | None  # [B, T] bool, True = a real token; None = no padding

    def on(self, device: torch.device) -> "tuple[Tensor, Tensor | None]":
        """Token ids and mask, on a device."""
        mask = self.attention_mask
        return self.input_ids.to(device), None if mask is None else mask.to(device)


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows."""

    input_ids: Tensor  # [N, T] int64
    attention_mask: Tensor | None = None  # [N, T] bool, True = a real token; None = no padding

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        ids, mask = self.input_ids, self.attention_mask
        if ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
            raise InputError(f"windows must be a non-empty [N, T] int64 tensor, not {list(ids.shape)} {ids.dtype}")
        if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
            raise InputError(f"attention_mask must be {list(ids.shape)} bool, not {list(mask.shape)} {mask.dtype}")

    def __len__(self) -> int:
        """The number of windows."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """The number of unmasked tokens."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def _rows(self, rows: slice | Sequence[int] | Tensor) -> "tuple[Tensor, Tensor | None]":
        return self.input_ids[rows], None if self.attention_mask is None else self.attention_mask[rows]

    def _trimmed(self, rows: slice) -> "tuple[Tensor, Tensor | None]":
        ids, mask = self._rows(rows)
        if mask is None or not mask.any():
            return ids, mask
        length = int(mask.any(0).nonzero().max()) + 1
        return ids[:, :length], mask[:, :length]

    def batches(self, batch_size: int) -> Iterator[WindowBatch]:
        """The windows in order, `batch_size` at a time, without the columns on the right that pad all of a batch.

        The last batch may be smaller.
        """
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}: it must be at least 1")
        index = torch.arange(len(self))
        cuts = (slice(start, start + batch_size) for start in range(0, len(self), batch_size))
        return (WindowBatch(index[rows], *self._trimmed(rows)) for rows in cuts)

    def chosen(self, rows: Sequence[int] | Tensor) -> "Windows":
        """Some windows, by their numbers."""
        return Windows(*self._rows(rows))

    def every(self, step: int, first: int, stop: int | None = None) -> "Windows":
        """Each `step`-th window from number `first` on, before number `stop`."""
        return Windows(*self._rows(slice(first, stop, step)))

    def split(self, count: int) -> "tuple[Windows, Windows]":
        """The first N - count windows and the last `count`."""
        if not 1 <= count < len(self):
            raise InputError(f"cannot set {count} of {len(self)} windows apart: between 1 and {len(self) - 1} can be")
        first = len(self) - count
        return Windows(*self._rows(slice(first))), Windows(*self._rows(slice(first, None)))

    def sha256(self) -> str:
        """Content hash of ids and mask: the same on every platform and device."""
        digest = hashlib.sha256(f"{list(self.input_ids.shape)} {self.attention_mask is not None}".encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        if self.attention_mask is not None:
            digest.update(self.attention_mask.cpu().numpy().astype("u1").tobytes())
        return digest.hexdigest()


def held_out(count: int) -> int:
    """How many of so many windows, or batches of them, are held out."""
    return max(count // HELD_OUT, 1)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _decode(data: bytes, path: str, offset: int = 0, final: bool = True) -> str:
    """UTF-8 to text; unless `final`, an incomplete last character is left out. `offset`: where in the file data is."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final)
    except UnicodeDecodeError as error:
        where = f"{path} is not UTF-8 text: {error.reason} at byte {offset + error.start}"
        raise InputError(f"{where}; convert it to UTF-8 (compressed files are not read)") from error


def _parse_json(text: str, path: str, line: int = 1) -> Any:
    """Parse what begins at `line` of the file."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{where} is not valid JSON ({error.msg}); correct or remove it") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of over 4300 digits
        reason = "its brackets nest too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise InputError(f"{path}, line {line} cannot be read as JSON: {reason}; correct or remove it") from error


def _text_of(row: Any, field: str, where: str) -> str:
    """The text of a row, which is a string or a mapping with a string field."""
    text = row
    if isinstance(row, dict):
        if field not in row:
            fields = ", ".join(map(repr, row)) or "none"
            raise InputError(f"{where} has no field {field!r}; its fields: {fields}; name the text's with --text-field")
        text = row[field]
        where = f"{where}, field {field!r},"
    if not isinstance(text, str):
        raise InputError(f"{where} is {type(text).__name__}: give a string or an object with a string field {field!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which no tokeniser takes
        raise InputError(f"{where} has a lone surrogate at character {error.start}; correct or remove it") from error
    return text


def _json_rows(path: str) -> Iterator[tuple[str, Any]]:
    """(place, row) for each item of a .json list, or each line of JSON lines that is not blank."""
    with _opened(path) as file:
        if path.lower().endswith(LINES_SUFFIXES):
            offset = 0
            for number, line in enumerate(file, 1):
                if text := _decode(line, path, offset).rstrip():
                    yield f"{path}, line {number}", _parse_json(text, path, number)
                offset += len(line)
            return
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InputError(f"{path} has over {MAX_JSON_BYTES / 2**20:g} MiB, too much for a JSON list: use JSON lines")
    rows = _parse_json(_decode(data, path), path)
    if not isinstance(rows, list):
        raise InputError(f"{path} holds {type(rows).__name__}: give a list of strings or of objects, or JSON lines")
    yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))


def _text_documents(path: str, separator: str | None) -> Iterator[Document]:
    """A text file as one running text, or cut at every `separator` into documents."""
    limit = 2 * MAX_TEXT_BYTES + 4  # twice, since CR LF becomes LF: what is longer stays longer than MAX_TEXT_BYTES
    with _opened(path) as file:
        data = file.read(limit)
    text = _decode(data, path, final=len(data) < limit).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if separator is None:
        yield Document(text, bos=False)
    else:
        if separator not in text:
            logger.warning("%s is one document: the separator %r is not in it", path, separator)
        yield from (Document(piece, bos=True) for piece in text.split(separator))


def _file_documents(path: str, separator: str | None, field: str) -> Iterator[Document]:
    if path.lower().endswith((*LINES_SUFFIXES, ".json")):
        yield from (Document(_text_of(row, field, where), bos=True) for where, row in _json_rows(path))
    else:
        yield from _text_documents(path, separator)


def _folder_files(folder: str) -> list[str]:
    """The readable files below a folder, by name; hidden ones are left out."""
    names = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = sorted(name.as_posix() for name in names if name.suffix.lower() in FOLDER_SUFFIXES)
    if not files:
        raise InputError(f"{folder} holds no file that can be read: it needs one of {', '.join(FOLDER_SUFFIXES)}")
    return [os.path.join(folder, name) for name in files]


def _hub_documents(source: str, field: str, split: str) -> Iterator[Document]:
    """The rows of a hub data set, name[:config]."""
    try:
        import datasets
    except ImportError as error:
        remedy = 'to read it as a hub data set, pip install "kfac-prune[datasets]"'
        raise InputError(f"{source} is no file or folder here; {remedy}") from error
    name, _, config = source.partition(":")
    try:
        # Streaming spares downloading what is not read; offline, only the non-streaming road finds the local cache.
        streaming = not datasets.config.HF_DATASETS_OFFLINE
        for number, row in enumerate(datasets.load_dataset(name, config or None, split=split, streaming=streaming), 1):
            yield Document(_text_of(row, field, f"{source}, split {split}, row {number}"), bos=True)
    except InputError:
        raise
    except Exception as error:  # a wrong name, config or split and a failing network each have their own types there
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source} is no file or folder here, and as a hub data set gives: {reason}") from error


def _documents(source: str, separator: str | None, field: str, split: str) -> Iterator[Document]:
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        for file in _folder_files(path):
            yield from _file_documents(file, separator, field)
    elif os.path.exists(path):
        yield from _file_documents(path, separator, field)
    elif source.startswith((".", "/", "~")) or source.lower().endswith(FILE_SUFFIXES) or not HUB_NAME.fullmatch(source):
        raise InputError(f"no such file or folder: {source!r}; check the path (a hub data set is named NAME[:CONFIG])")
    else:
        yield from _hub_documents(source, field, split)


def read_documents(
    source: str, *, separator: str | None = None, field: str = "text", split: str = "train"
) -> list[Document]:
    """Read a source's documents, at most MAX_TEXT_BYTES of text; blank documents are dropped.

    Args:
        source: A text file, JSON lines, a .json list, a folder of those, or a hub data set as name[:config].
        separator: What stands between two documents of a text file; None: a text file is one running text without BOS.
        field: The field of a JSON object or hub row that holds the text.
        split: The split of a hub data set.
    """
    if separator == "":
        raise InputError(r'the separator is empty: give what stands between documents, such as "\n\n", or none')
    documents, left = [], MAX_TEXT_BYTES
    for document in _documents(source, separator, field, split):
        if not document.text.strip():
            continue
        data = document.text.encode()
        if len(data) > left:
            logger.info("%s: only its first %g MiB of text are read", source, MAX_TEXT_BYTES / 2**20)
            text = data[:left].decode(errors="ignore")  # drops a character that the cut falls into
            documents += [document._replace(text=text)] if text.strip() else []
            break
        documents.append(document)
        left -= len(data)
    if not documents:
        raise InputError(f"{source} holds no text: give one that is not empty")
    return documents


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], **options: Any) -> list[list[int]]:
    """Every text's tokens. A fast tokenizer keeps truncation and padding of a call, and would be saved with them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = None if backend is None else (backend.truncation, backend.padding)
    rows: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    if backend is not None and before != (backend.truncation, backend.padding):
        truncation, padding = before or (None, None)
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()
    return rows


def token_stream(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document]) -> Tensor:
    """Tokens of all documents, concatenated: [L] int64. BOS, if the tokenizer has one, goes before those that ask."""
    bos = [tokenizer.bos_token_id] if any(d.bos for d in documents) and tokenizer.bos_token_id is not None else []
    parts = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(documents), DOCUMENTS_PER_CALL):
        group = documents[start : start + DOCUMENTS_PER_CALL]
        rows = _token_ids(tokenizer, [document.text for document in group], add_special_tokens=False)
        ids = [i for document, row in zip(group, rows, strict=True) for i in (bos + row if document.bos else row)]
        parts.append(torch.tensor(ids, dtype=torch.int64))
    return torch.cat(parts)


def _check_size(count: int, seqlen: int) -> None:
    if count < 1:
        raise InputError(f"--samples is {count}: at least 1 window is needed")
    if seqlen < 2:
        raise InputError(f"--seqlen is {seqlen}: a window needs at least 2 tokens, one to predict from the other")
    if count * seqlen > MAX_TOKENS:
        raise InputError(f"{count} windows of {seqlen} are {count * seqlen} tokens; at most {MAX_TOKENS} are used")


def sample_windows(stream: Tensor, count: int, seqlen: int, seed: int, *, name: str = "the text") -> Windows:
    """`count` >= 1 windows of `seqlen` >= 2 tokens of stream [L], at starts drawn uniformly from 0 .. L - seqlen - 1.

    Equal arguments give equal windows. `name` is what messages call the stream.
    """
    _check_size(count, seqlen)
    tokens = len(stream)
    gives = f"{name} gives {tokens} tokens; {count} windows of {seqlen}"
    if tokens <= seqlen:
        raise InputError(f"{gives} at random starts need at least {seqlen + 1}: add text, or lower --seqlen")
    if tokens < count * seqlen:
        logger.warning("%s overlap much (apart they need %d): add text, or lower --samples", gives, count * seqlen)
    starts = torch.randint(0, tokens - seqlen, (count,), generator=torch.Generator().manual_seed(seed))
    return Windows(stream.unfold(0, seqlen, 1)[starts])  # a view [L - T + 1, T], then a copy of [N, T]


def consecutive_windows(stream: Tensor, count: int, seqlen: int, *, name: str = "the text") -> Windows:
    """The first `count` windows of `seqlen` tokens, without overlap; the rest as in `sample_windows`."""
    _check_size(count, seqlen)
    tokens, need = len(stream), count * seqlen
    if tokens < need:
        gives = f"{name} gives {tokens} tokens; {count} windows of {seqlen} need at least {need}"
        raise InputError(f"{gives}: add text, or lower --samples / --seqlen")
    return Windows(stream[:need].view(count, seqlen))


def sequence_windows(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], seqlen: int) -> Windows:
    """One row per text: with the tokenizer's special tokens, cut to `seqlen` tokens, padded on the right."""
    _check_size(len(texts), seqlen)
    rows = _token_ids(tokenizer, list(texts), truncation=True, max_length=seqlen)
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(row) for row in ids])
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=fill)
    return Windows(padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))


def load_windows(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    seqlen: int,
    seed: int | None = None,
    consecutive: bool = False,
    separator: str | None = None,
    field: str = "text",
    split: str = "train",
) -> Windows:
    """Read, tokenise and cut: `samples` >= 1 windows of `seqlen` >= 2 tokens.

    `source`, `separator`, `field` and `split` are those of `read_documents`. The windows stand at random starts drawn
    with `seed` (None is 0), or, if `consecutive`, are the first ones without overlap, and the seed has no effect.
    """
    _check_size(samples, seqlen)  # before the seconds that reading and tokenising take
    stream = token_stream(tokenizer, read_documents(source, separator=separator, field=field, split=split))
    if consecutive:
        return consecutive_windows(stream, samples, seqlen, name=source)
    return sample_windows(stream, samples, seqlen, seed or 0, name=source)
