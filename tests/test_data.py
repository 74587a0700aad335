"""Text to token windows."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kfac_prune import data
from kfac_prune.data import (
    Document,
    Windows,
    consecutive_windows,
    load_windows,
    read_documents,
    sample_windows,
    sequence_windows,
    token_stream,
)
from kfac_prune.errors import InputError
from kfac_prune.loading import load_tokenizer

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
STORIES = ["one two three", "two  two\nfour", "five"]


def byte_tokenizer(**special):
    """Every byte is a token: ids 0..255, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=8, **special)


@pytest.fixture(params=[None, "<s>"], ids=["no-bos", "bos"])
def tok(request):
    return byte_tokenizer(bos_token=request.param) if request.param else byte_tokenizer()


@pytest.fixture
def bos_tok():
    return byte_tokenizer(bos_token="<s>")


@pytest.fixture
def story_file(tmp_path):
    def write(kind):
        path = tmp_path / f"stories{kind}"
        if kind == ".txt":
            path.write_text("\n\n".join(STORIES), encoding="utf-8")
        elif kind == ".json":
            path.write_text(json.dumps(STORIES))
        else:
            rows = [{"id": 1, "text": STORIES[0]}, STORIES[1], {"text": STORIES[2]}]
            path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
        return str(path)

    return write


def document_ids(tok, texts):
    """The protocol's formula."""
    bos = [] if tok.bos_token_id is None else [tok.bos_token_id]
    return [i for text in texts for i in bos + tok(text, add_special_tokens=False)["input_ids"]]


# --- from text to stream


def test_running_text_is_the_files_tokens_without_bos(tok, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße\r\n\r\n  naïve \rend ".encode())
    with open(path, encoding="utf-8") as file:
        expected = tok(file.read(), add_special_tokens=False)["input_ids"]
    assert token_stream(tok, read_documents(str(path))).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "separator"), [(".txt", "\n\n"), (".jsonl", None), (".ndjson", None), (".json", None)], ids=str
)
def test_documents_begin_with_bos(tok, story_file, kind, separator):
    documents = read_documents(story_file(kind), separator=separator)
    assert documents == [Document(text, bos=True) for text in STORIES]
    stream = token_stream(tok, documents)
    assert stream.dtype == torch.int64
    assert stream.tolist() == document_ids(tok, STORIES)


def test_groups_of_documents_do_not_change_the_stream(bos_tok, monkeypatch):
    documents = [Document("a b", False), Document("c", True), Document("", True), Document("d", False)]
    whole = token_stream(bos_tok, documents)
    monkeypatch.setattr(data, "DOCUMENTS_PER_CALL", 3)
    assert torch.equal(token_stream(bos_tok, documents), whole)
    assert bos_tok.decode(whole) == "a b<s>c<s>d"
    assert token_stream(bos_tok, []).shape == (0,)


def test_tokenizing_warns_of_no_length(tok, story_file, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    token_stream(tok, read_documents(story_file(".txt")))  # longer than model_max_length
    assert caplog.records == []


@pytest.mark.parametrize("own", [True, False], ids=["own", "none"])
@pytest.mark.parametrize("cut", ["stream", "sequences"])
def test_a_tokenizer_is_saved_with_the_truncation_and_padding_that_it_came_with(tmp_path, own, cut):
    made = byte_tokenizer(pad_token="<pad>")
    if own:
        made.backend_tokenizer.enable_truncation(max_length=24, stride=2)
        made.backend_tokenizer.enable_padding(length=24, pad_id=made.pad_token_id, pad_token="<pad>")
    made.save_pretrained(tmp_path / "source")
    tokenizer = load_tokenizer(str(tmp_path / "source"))
    text = "a text of more bytes than the tokenizer would keep"
    if cut == "stream":
        assert len(token_stream(tokenizer, [Document(text, bos=False)])) == len(text)
    else:
        windows = sequence_windows(tokenizer, [text, "ab"], 30)
        assert windows.input_ids.shape == (2, 30)
        assert windows.tokens == 32
    tokenizer.save_pretrained(tmp_path / "saved")
    before, after = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("source", "saved"))
    assert (before["truncation"] is not None, before["padding"] is not None) == (own, own)
    assert before == after


def test_blank_documents_are_dropped(tmp_path):
    path = tmp_path / "blank.md"
    path.write_text("|a| \n|\t|b|")
    assert [d.text for d in read_documents(str(path), separator="|")] == ["a", "b"]


def test_field_names_the_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps([{"content": "a"}, "b"]), encoding="utf-8")
    assert [d.text for d in read_documents(str(path), field="content")] == ["a", "b"]


def test_json_line_may_hold_a_unicode_line_separator(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('"a\u2028b"\r\n"c"', encoding="utf-8", newline="")
    assert [d.text for d in read_documents(str(path))] == ["a\u2028b", "c"]


def test_folder_is_read_by_name_and_skips_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/a.TXT", "a.txt", ".hidden/x.txt", ".x.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('"row"')
    found = read_documents(str(tmp_path))
    assert found == [Document("a.txt", False), Document("b/a.TXT", False), Document("row", True)]


def test_home_is_expanded_and_a_file_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "wikitext").write_text("local")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read_documents("~/wikitext") == read_documents("wikitext") == [Document("local", False)]


@pytest.mark.parametrize(
    ("name", "text", "separator", "expected"),
    [
        ("a.txt", "é" * 9, None, ["é" * 5]),  # the limit of 11 falls into a character
        ("a.txt", "a\r\n" * 9, None, ["a\n" * 5 + "a"]),
        ("a.txt", "abc|defg|hijklmn|op", "|", ["abc", "defg", "hijk"]),
        ("a.jsonl", '"abcdefghijk"\n"l"\nnot reached', None, ["abcdefghijk"]),
        ("a.json", '["abcdefgh", "ijklmn"]', None, ["abcdefgh", "ijk"]),
    ],
    ids=["character", "crlf", "separator", "jsonl", "json"],
)
def test_reading_stops_at_the_limit_and_says_so_once(tmp_path, monkeypatch, caplog, name, text, separator, expected):
    monkeypatch.setattr(data, "MAX_TEXT_BYTES", 11)
    caplog.set_level(logging.INFO, "kfac_prune")
    (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "b.txt").write_text("more")
    assert [d.text for d in read_documents(str(tmp_path), separator=separator)] == expected
    assert ["MiB of text are read" in message for message in caplog.messages] == [True]


def test_text_of_just_the_limit_is_read_whole(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data, "MAX_TEXT_BYTES", 11)
    caplog.set_level(logging.INFO, "kfac_prune")
    (tmp_path / "a.txt").write_bytes(b"ab\r\n" * 3 + b"cd")
    assert read_documents(str(tmp_path)) == [Document("ab\nab\nab\ncd", False)]
    assert caplog.messages == []


# --- the hub


def fake_datasets(monkeypatch, load, offline=False):
    fake = SimpleNamespace(load_dataset=load, config=SimpleNamespace(HF_DATASETS_OFFLINE=offline))
    monkeypatch.setitem(sys.modules, "datasets", fake)


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize(
    ("source", "name", "config"),
    [
        ("Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("wikitext", "wikitext", None),
    ],
    ids=["config", "plain"],
)
def test_hub_rows_are_documents(monkeypatch, source, name, config, offline):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "a"}, {"text": ""}, {"text": "b"}])

    fake_datasets(monkeypatch, load, offline)
    assert read_documents(source, split="test") == [Document("a", True), Document("b", True)]
    assert calls == [((name, config), {"split": "test", "streaming": not offline})]


def test_hub_failures_name_the_source(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no\nroute")

    fake_datasets(monkeypatch, load)
    with pytest.raises(InputError, match=r"^wikitext is no file or folder here, and .* gives: no route$"):
        read_documents("wikitext")


def test_hub_row_without_the_field(monkeypatch):
    fake_datasets(monkeypatch, lambda *_, **__: [{"text": "a"}, {"body": "b"}])
    with pytest.raises(InputError, match=r"^x/y:z, split train, row 2 has no field 'text'; its fields: 'body'"):
        read_documents("x/y:z")


def test_hub_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'wikitext:raw is no file.* pip install "kfac-prune\[datasets\]"'):
        read_documents("wikitext:raw")


@pytest.mark.parametrize(
    "source",
    ["", "./corpus", "../corpus", "/no/corpus", "~/no-corpus", "corpus.txt", "a/b.JSON", "a/b/c", "x.txt.gz", "a b"],
)
def test_a_missing_path_is_not_sent_to_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"^no such file or folder: "):
        read_documents(source)


# --- sources that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n", "a.txt holds no text"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.json", b"[]", "a.json holds no text"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8 text: invalid start byte at byte 3; convert"),
        ("a.txt", b"ab\xc3", "a.txt is not UTF-8 text: .* at byte 2"),
        ("a.txt.gz", b"\x1f\x8b\x08", "a.txt.gz is not UTF-8 text: .* at byte 1; .*compressed"),
        ("a.jsonl", b'"abc"\n"\xff"', "a.jsonl is not UTF-8 text: .* at byte 7"),
        ("a.json", b"", "a.json, line 1, column 1 is not valid JSON"),
        ("a.json", b'["a",\n "b"\n "c"]', r"a.json, line 3, column 2 is not valid JSON \(Expecting ',' delimiter\)"),
        ("a.jsonl", b'"a"\n\n{"text": \n', r"a.jsonl, line 3, column 9 is not valid JSON \(Expecting value\)"),
        ("a.json", b'{"text": "a"}', "a.json holds dict: give a list"),
        ("a.json", b'["a", {"title": "b", "body": ""}]', "item 2 has no field 'text'; its fields: 'title', 'body'"),
        ("a.jsonl", b"{}", "line 1 has no field 'text'; its fields: none"),
        ("a.jsonl", b'{"text": null}', "line 1, field 'text', is NoneType: give a string"),
        ("a.jsonl", b'"a"\n[1]', "line 2 is list: give a string or an object with a string field 'text'"),
        ("a.jsonl", b'"ab\\ud800"', "line 1 has a lone surrogate at character 2"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_documents(str(path))
    assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(data, "open", refuse, raising=False)
    with pytest.raises(InputError, match=r"cannot read .*a\.txt: Permission denied; check"):
        read_documents(str(tmp_path))


def test_folder_without_usable_file(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89")
    with pytest.raises(InputError, match=r"holds no file that can be read: it needs one of \.txt, .*\.json"):
        read_documents(str(tmp_path))


def test_json_list_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_JSON_BYTES", 2**20)
    (tmp_path / "a.json").write_text(" " * 2**20 + "[]")
    with pytest.raises(InputError, match=r"a\.json has over 1 MiB, too much for a JSON list: use JSON lines"):
        read_documents(str(tmp_path))


def test_a_separator_that_does_not_occur_is_told(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone text", encoding="utf-8")
    assert [d.text for d in read_documents(str(path), separator="|")] == [
        "one text"
    ]  # without the mark of its encoding
    assert "a.txt is one document: the separator '|' is not in it" in caplog.text


def test_empty_separator(story_file):
    with pytest.raises(InputError, match="separator is empty"):
        read_documents(story_file(".txt"), separator="")


# --- from stream to windows


def test_random_windows_are_the_protocols():
    stream = torch.arange(1000)
    torch.manual_seed(3)
    starts = torch.randint(0, 1000 - 7, (31,))
    assert torch.equal(
        sample_windows(stream, 31, 7, seed=3).input_ids, torch.stack([stream[s : s + 7] for s in starts.tolist()])
    )


def test_random_windows_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample_windows(torch.arange(9), 1, 2, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("length", "warns"), [(12, False), (11, True), (4, True)], ids=str)
def test_overlap_is_reported(caplog, length, warns):
    windows = sample_windows(torch.arange(length), 4, 3, seed=0)
    assert windows.input_ids.shape == (4, 3)
    expected = f"the text gives {length} tokens; 4 windows of 3 overlap much (apart they need 12)"
    assert [m.startswith(expected) for m in caplog.messages] == [True] * warns


def test_consecutive_windows_are_the_first():
    assert consecutive_windows(torch.arange(7), 2, 3).input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("consecutive", [False, True], ids=["random", "consecutive"])
def test_load_windows_is_the_whole_road(tok, story_file, consecutive):
    windows = load_windows(story_file(".json"), tok, samples=2, seqlen=5, seed=7, consecutive=consecutive)
    stream = torch.tensor(document_ids(tok, STORIES))
    expected = stream[:10].view(2, 5) if consecutive else sample_windows(stream, 2, 5, 7).input_ids
    assert torch.equal(windows.input_ids, expected)
    assert windows.attention_mask is None


def test_no_seed_is_seed_0(bos_tok, story_file):
    one, two = (load_windows(story_file(".txt"), bos_tok, samples=2, seqlen=5, seed=seed) for seed in (None, 0))
    assert torch.equal(one.input_ids, two.input_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3, "seqlen": 34}, r"stories\.txt gives 34 tokens; 3 windows of 34 .* at least 35: .*--seqlen"),
        (
            {"samples": 5, "seqlen": 7, "consecutive": True},
            r"stories\.txt gives 34 tokens; 5 windows of 7 .* at least 35: .*--samples",
        ),
        ({"samples": 0, "seqlen": 8}, "--samples is 0: at least 1"),
        ({"samples": 1, "seqlen": 1}, "--seqlen is 1: .* at least 2"),
    ],
    ids=["random", "consecutive", "samples", "seqlen"],
)
def test_windows_that_cannot_be_cut(bos_tok, story_file, options, message):
    with pytest.raises(InputError, match=message):
        load_windows(story_file(".txt"), bos_tok, **options)


def test_sizes_are_checked_before_the_text_is_read():
    with pytest.raises(InputError, match="--samples"):
        load_windows("missing.txt", None, samples=0, seqlen=2)


@pytest.mark.parametrize(
    ("model", "text", "separator"),
    [("wikitext2-llama", "wikitext2_train.txt", None), ("babyllama-tok361", "tinystories_train.txt", "\n\n")],
    ids=["text", "stories"],
)
def test_reference_calibration_windows(tmp_path, model, text, separator):
    if not (REFERENCE / "models" / model / "tokenizer.json").is_file():
        pytest.skip("the reference models and texts are not beside this checkout (../shared/reference)")
    tok = AutoTokenizer.from_pretrained(REFERENCE / "models" / model)
    with open(REFERENCE / "text" / text, encoding="utf-8") as file:
        content = file.read(200_000)
    (tmp_path / "copy.txt").write_text(content, encoding="utf-8")
    if separator is None:
        ids = torch.tensor(tok(content, add_special_tokens=False, verbose=False)["input_ids"])
    else:
        ids = torch.tensor(document_ids(tok, content.split(separator)))
    torch.manual_seed(0)
    expected = torch.stack([ids[s : s + 256] for s in torch.randint(0, len(ids) - 256, (128,))])
    windows = load_windows(str(tmp_path / "copy.txt"), tok, samples=128, seqlen=256, seed=0, separator=separator)
    assert torch.equal(windows.input_ids, expected)


# --- the windows themselves


@pytest.fixture
def masked():
    return Windows(torch.arange(15).view(5, 3), torch.arange(15).view(5, 3) % 4 != 3)


def test_length_and_tokens(masked):
    assert (len(masked), masked.tokens) == (5, 12)
    assert Windows(masked.input_ids).tokens == 15


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "mask"])
def test_batches_partition_the_windows(masked, size, with_mask):
    windows = masked if with_mask else Windows(masked.input_ids)
    batches = list(windows.batches(size))
    assert [len(b.index) for b in batches] == [min(size, 5 - i) for i in range(0, 5, size)]
    assert torch.cat([b.index for b in batches]).tolist() == list(range(5))
    for b in batches:
        width = b.input_ids.shape[1]
        assert torch.equal(b.input_ids, windows.input_ids[b.index, :width])
        if not with_mask:
            assert b.attention_mask is None
            assert width == windows.input_ids.shape[1]
            continue
        mask = masked.attention_mask[b.index]
        assert torch.equal(b.attention_mask, mask[:, :width])
        assert not mask[:, width:].any()
        assert mask[:, width - 1].any() or not mask.any()  # no column more than is needed


def test_split_sets_the_last_windows_apart(masked):
    first, last = masked.split(2)
    assert (len(first), len(last)) == (3, 2)
    assert torch.equal(torch.cat([first.input_ids, last.input_ids]), masked.input_ids)
    assert torch.equal(torch.cat([first.attention_mask, last.attention_mask]), masked.attention_mask)


def test_hash_is_of_the_content(masked):
    ids, mask = masked.input_ids, masked.attention_mask
    assert masked.sha256() == Windows(ids.T.contiguous().T, mask.clone()).sha256()
    others = [Windows(ids), Windows(ids + 1, mask), Windows(ids, ~mask), Windows(ids.view(3, 5), mask.view(3, 5))]
    assert len({masked.sha256(), *(w.sha256() for w in others)}) == 5
    # Fixed, since stored results are found again by it.
    assert (
        Windows(torch.tensor([[1, -2]])).sha256() == "78b78b1d54c906dea477befc35f97241b13d1ecb39ca119567a3816a6ee444e4"
    )


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, r"\[N, T\] int64 tensor, not \[3\] torch.int64"),
        (torch.zeros(2, 3), None, r"not \[2, 3\] torch.float32"),
        (torch.zeros(0, 3, dtype=torch.int64), None, r"non-empty .* not \[0, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool), r"\[2, 3\] bool, not \[2, 2\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), r"\[2, 3\] bool, not \[2, 3\] torch.float32"),
    ],
    ids=["1d", "float", "empty", "mask-shape", "mask-dtype"],
)
def test_windows_are_validated(ids, mask, message):
    with pytest.raises(InputError, match=message):
        Windows(ids, mask)


@pytest.mark.parametrize("count", [-1, 0, 5])
def test_split_leaves_windows_on_both_sides(masked, count):
    with pytest.raises(InputError, match=f"cannot set {count} of 5 windows apart: between 1 and 4"):
        masked.split(count)


def test_batch_size_is_validated_at_the_call(masked):
    with pytest.raises(InputError, match="batch size is 0"):
        masked.batches(0)
