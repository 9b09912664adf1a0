"""prepare_data as a whole: cache, held-out data, mixtures, streaming, memory, and what is refused."""

import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_data_support import byte_tokenizer, conversation, run_config, write_jsonl

from graftlm.errors import UserError
from graftlm.samples import IGNORED
from graftlm.training.config import SourceConfig
from graftlm.training.data import prepare_data, show_data
from graftlm.training.data.cache import ABANDONED_SECONDS, tokenizer_fingerprint
from graftlm.training.data.mixture import index_of_epoch, interleave, mixed_index
from graftlm.training.data.pipeline import HoldOutRule

TOKENIZER = byte_tokenizer()


def prepare(config, tokenizer=TOKENIZER):
    return prepare_data(config, tokenizer, progress=False)


def texts_of(dataset):
    return [TOKENIZER.decode(item["input_ids"].tolist()) for item in dataset]


@pytest.fixture
def texts(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": f"<{n}>" + "x" * (n % 17)} for n in range(200)])


@pytest.fixture
def chats(tmp_path):
    rows = [conversation(f"Question {n}?", f"Answer {n}." + "!" * (n % 9)) for n in range(120)]
    return write_jsonl(tmp_path / "chats.jsonl", rows)


def test_text_becomes_full_blocks_and_held_out_documents(texts, tmp_path):
    data = prepare(run_config(texts, cache=tmp_path, max_length=64, eval_fraction=0.1))
    assert data.task == "cpt"
    train, held = "".join(texts_of(data.train)), "".join(texts_of(data.evaluation))
    rule = HoldOutRule(0.1)
    expected = {False: "", True: ""}
    for n in range(200):
        expected[rule(n)] += f"<{n}>" + "x" * (n % 17) + "<|endoftext|>"
    assert (train, held) == (expected[False], expected[True])
    statistics = data.statistics
    assert statistics.held_out_documents == sum(map(rule, range(200))) > 0
    assert statistics.documents == 200 - statistics.held_out_documents
    assert statistics.tokens == sum(len(item["input_ids"]) for item in data.train)
    assert statistics.supervised_tokens == statistics.tokens - statistics.blocks
    assert statistics.evaluation_blocks == len(data.evaluation)
    other = prepare(run_config(texts, cache=tmp_path, max_length=64, eval_fraction=0.1, seed=1))
    assert "".join(texts_of(other.evaluation)) == held  # runs of any seed are evaluated on the same


def test_conversations_are_packed_or_padded(chats, tmp_path):
    packed = prepare(run_config(chats, cache=tmp_path, max_length=200))
    rows = prepare(run_config(chats, cache=tmp_path, max_length=200, packing=False))
    assert packed.task == rows.task == "sft"
    assert rows.statistics.blocks == rows.statistics.documents > packed.statistics.blocks
    assert packed.statistics.supervised_tokens == rows.statistics.supervised_tokens

    def learnt(data):
        return sorted(TOKENIZER.decode(item["labels"][item["labels"] != IGNORED].tolist()) for item in data.train)

    assert learnt(rows)[0].startswith("Answer") and learnt(rows)[0].endswith("<|im_end|>")
    assert "".join(learnt(packed)).count("Answer") == len(learnt(rows))
    assert set(packed.collator([packed.train[0], packed.train[1]])) == {"input_ids", "labels", "position_ids"}
    assert set(rows.collator([rows.train[0], rows.train[9]])) <= {"input_ids", "labels", "attention_mask"}


def test_every_token_counts_without_assistant_only_loss(chats, tmp_path):
    data = prepare(run_config(chats, cache=tmp_path, max_length=200, packing=False, assistant_only_loss=False))
    assert data.statistics.supervised_tokens == data.statistics.tokens - data.statistics.blocks


def test_truncation_is_counted(tmp_path):
    rows = [conversation("Q", "short"), conversation("Q", "long" * 40), conversation("Q" * 300, "lost")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    cut = prepare(run_config(path, cache=tmp_path, max_length=120, eval_fraction=0.0)).statistics
    assert (cut.documents, cut.truncated_documents, cut.dropped) == (2, 1, 1)
    assert cut.truncated_share == pytest.approx(1 / 3)
    dropped = prepare(run_config(path, cache=tmp_path, max_length=120, eval_fraction=0.0, truncation="drop"))
    assert (dropped.statistics.documents, dropped.statistics.dropped) == (1, 2)
    assert any("2 conversations dropped" in note for note in dropped.statistics.notes)


def test_refusals(texts, chats, tmp_path):
    def refused(*sources, **settings):
        with pytest.raises(UserError) as caught:
            prepare(run_config(*sources, cache=tmp_path / "cache", **settings))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be mixed" in refused(texts, chats)
    assert "task: sft" in refused(texts, task="sft")
    assert "task: cpt" in refused(chats, task="cpt")
    assert "no supervised token left" in refused(chats, max_length=8)
    assert "no supervised token left" in refused(chats, max_length=8, streaming=True, max_steps=1, **STEPS)
    (tmp_path / "empty.jsonl").write_text("")
    assert "no document in it" in refused(tmp_path / "empty.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(texts.read_text() + "{\n")
    assert f"{bad}:201: not valid JSON" in refused(bad)
    folders = [path for path in (tmp_path / "cache" / "blocks").iterdir() if path.suffix != ".lock"]
    assert all((folder / "counts.json").exists() for folder in folders)  # nothing half-written
    assert not any(folder.name[0] == "." for folder in folders)


STEPS = {"method": "full"}


def test_cache_is_found_again_and_follows_its_inputs(texts, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def entries(tokenizer=TOKENIZER, **settings):
        prepare(run_config(texts, cache=cache, **{"max_length": 64, **settings}), tokenizer)
        return len(list(cache.glob("blocks/*/train.arrow")))

    assert entries() == 1
    assert entries(learning_rate=1.0) == 1  # has no say in the data
    assert entries(max_length=32) == 2
    assert entries(byte_tokenizer(merges=(("x", "x"),))) == 3
    os.utime(texts, ns=(1, 1))
    assert entries() == 4
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "elsewhere"))
    prepare(run_config(texts, cache=""))
    assert list((tmp_path / "elsewhere").rglob("train.arrow"))


@pytest.mark.parametrize("name", ["train.arrow", "counts.json"])
def test_damaged_cache_is_named(texts, tmp_path, name):
    config = run_config(texts, cache=tmp_path / "cache", max_length=64)
    prepare(config)
    [file] = tmp_path.glob(f"cache/blocks/*/{name}")
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"damaged .* delete that folder"):
        prepare(config)


def test_tokenizer_fingerprint_ignores_padding_left_behind():
    tokenizer = byte_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "other"
    assert tokenizer_fingerprint(tokenizer) != before


def test_killed_while_caching(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("some words and some more\n\n" * 400_000)
    script = textwrap.dedent(
        f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_data_prepare import *
        prepare(run_config({str(path)!r}, cache={str(tmp_path / "cache")!r}))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 60
    while not list(tmp_path.glob("cache/blocks/.*/train.arrow")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in (tmp_path / "cache" / "blocks").iterdir() if path.suffix != ".lock"]
    assert len(left) == 1 and left[0].name.startswith(".")
    path.write_text("a shorter text")  # the same name for the folder needs the same file: it is another key
    data = prepare(run_config(path, cache=tmp_path / "cache"))
    assert texts_of(data.train) == ["a shorter text<|endoftext|>"]
    # What the killed process left of its own folder goes once it is old, when that folder is asked for again.
    from graftlm.training.data.cache import _remove_abandoned

    final = left[0].with_name(left[0].name.split(".")[1])
    _remove_abandoned(final)
    assert left[0].exists()
    for file in (left[0], *left[0].iterdir()):
        os.utime(file, (0, time.time() - 2 * ABANDONED_SECONDS))
    _remove_abandoned(final)
    assert not left[0].exists()


def test_the_same_bytes_read_otherwise_are_other_content(texts, tmp_path):
    """What --resume goes by: a .txt is one document, a .jsonl one a line."""
    copied, text = tmp_path / "copied.jsonl", tmp_path / "copied.txt"
    for path in (copied, text):
        path.write_bytes(texts.read_bytes())
    whole, same, other = (prepare(run_config(path, cache=tmp_path)).content() for path in (texts, copied, text))
    assert whole == same != other


def test_items_survive_a_loader_worker(texts, tmp_path):
    data = prepare(run_config(texts, cache=tmp_path, max_length=64, document_boundaries=True))
    again = pickle.loads(pickle.dumps(data.train))
    items = [[source[i] for i in range(len(source))] for source in (again, data.train)]
    assert items[1]
    for a, b in zip(*items, strict=True):
        assert {key: value.tolist() for key, value in a.items()} == {key: value.tolist() for key, value in b.items()}


def test_few_documents(tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("".join(chr(97 + n % 26) for n in range(1030)))
    data = prepare(run_config(one, cache=tmp_path, max_length=50, eval_fraction=0.1))
    assert len(data.evaluation) == 2 and len(data.train) == 19
    assert any("last 2 of 21 blocks" in note for note in data.statistics.notes)
    whole = "".join(texts_of(data.train)) + "".join(texts_of(data.evaluation))
    assert whole == one.read_text() + "<|endoftext|>"

    three = write_jsonl(tmp_path / "three.jsonl", [{"text": name * 100} for name in "abc"])
    data = prepare(run_config(three, cache=tmp_path, max_length=50, eval_fraction=1e-6))
    held = set("".join(texts_of(data.evaluation)).replace("<|endoftext|>", ""))
    assert len(held) == 1 and held.isdisjoint("".join(texts_of(data.train)).replace("<|endoftext|>", ""))
    assert any("34%" in note or "33%" in note for note in data.statistics.notes)

    tiny = tmp_path / "tiny.txt"
    tiny.write_text("hello")
    data = prepare(run_config(tiny, cache=tmp_path))
    assert data.evaluation is None and len(data.train) == 1


@pytest.mark.parametrize("usable", [[0], [3], [2, 3], [0, 40], [141, 143]])
def test_the_only_usable_document_is_not_held_back(tmp_path, usable):
    """The hash may have picked it (143 of these), or come closest to it; dropped ones have numbers too."""
    rows = [conversation("q" * 900 * (n not in usable), f"a{n}") for n in range(150)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = prepare(run_config(path, cache=tmp_path, max_length=64, eval_fraction=0.02))
    assert len(data.train) == 1
    assert len(data.evaluation or []) == len(usable) - 1
    both = texts_of(data.train) + texts_of(data.evaluation or [])
    assert sorted(both) == sorted(text for n in usable for text in both if f"a{n}<" in text)


def test_eval_data_is_capped_and_spread(texts, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("".join(f"{n:04d}" for n in range(1000)))
    config = run_config(texts, cache=tmp_path, max_length=40, eval_data=(SourceConfig(str(held)),), eval_max_blocks=5)
    data = prepare(config)
    shown = texts_of(data.evaluation)
    assert len(shown) == 5 and shown[0].startswith("0000") and shown[2].startswith("0500")
    assert data.statistics.held_out_documents == 0 and data.statistics.documents == 200
    assert prepare(run_config(texts, cache=tmp_path, eval_fraction=0.0)).evaluation is None


def test_mixture_shares_are_in_tokens(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 300}] * 60)
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "b" * 30}] * 400)
    sources = (SourceConfig(str(a), weight=3.0), SourceConfig(str(b), weight=1.0))
    data = prepare(run_config(*sources, cache=tmp_path, max_length=64, packing=False))
    shares = [source.share for source in data.statistics.sources]
    assert shares[0] == pytest.approx(0.75, abs=0.02) and sum(shares) == pytest.approx(1)
    tokens = {"a": 0, "b": 0}
    for text in texts_of(data.train):
        tokens[text[0]] += 1 if text[0] not in tokens else len(TOKENIZER(text)["input_ids"])
    assert [tokens["a"], tokens["b"]] == [source.tokens for source in data.statistics.sources]
    passes = [source.passes for source in data.statistics.sources]
    assert max(passes) == pytest.approx(1, abs=0.02) and min(passes) < 1
    assert any("an epoch uses" in note for note in data.statistics.notes)


def test_interleave_is_even_and_seeded():
    def streams():
        return [iter([3] * 1000), iter([5] * 1000), iter([1] * 5000)]

    weights = [1.0, 2.0, 1.0]
    order = list(interleave(streams(), weights, 7, lambda n: n))
    taken = np.zeros(3)
    for step, (source, size) in enumerate(order):
        taken[source] += size
        if step > 50:
            np.testing.assert_allclose(taken / taken.sum(), [0.25, 0.5, 0.25], atol=5 / taken.sum() + 1e-9)
    assert order == list(interleave(streams(), weights, 7, lambda n: n))
    sizes = [np.full(50, 10), np.full(80, 10)]
    index = mixed_index(sizes, [1, 1], 0)
    assert len({tuple(row) for row in index.tolist()}) == len(index) == 100 + len(index) % 2
    assert index.tolist() != mixed_index(sizes, [1, 1], 1).tolist()


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.2, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_later_epochs_go_on_where_the_first_ended(a, b, weight, seed):
    lengths = [a, b]
    first = mixed_index([np.full(n, 10) for n in lengths], [1.0, weight], seed)
    epochs = [index_of_epoch(first, lengths, seed, epoch) for epoch in range(12)]
    assert epochs[0].tolist() == first.tolist()
    for source, length in enumerate(lengths):
        walked = np.concatenate([index[index[:, 0] == source, 1] for index in epochs])
        for start in range(0, len(walked) - length + 1, length):  # everything once before anything a second time
            assert sorted(walked[start : start + length]) == list(range(length))
    assert all(index[:, 0].tolist() == first[:, 0].tolist() for index in epochs)


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_streaming_is_repeatable_and_trains_on_no_held_out_document(kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    settings = {"max_length": 150, "eval_fraction": 0.1}
    cached = prepare(run_config(path, cache=tmp_path, **settings))
    data = prepare(run_config(path, cache=tmp_path / "no", streaming=True, max_steps=5, **STEPS, **settings))
    assert isinstance(data.train, torch.utils.data.IterableDataset)
    once = texts_of(data.train.one_pass())
    assert once == texts_of(data.train.one_pass()) == texts_of(cached.train)
    assert texts_of(itertools.islice(data.train, 3 * len(once))) == 3 * once  # begins again, without an end
    assert texts_of(data.evaluation) == texts_of(cached.evaluation)
    assert data.statistics.tokens is None
    assert data.statistics.supervised_share == pytest.approx(cached.statistics.supervised_share, abs=0.02)
    assert not (tmp_path / "no").exists()

    def loader():
        return torch.utils.data.DataLoader(data.train, batch_size=2, collate_fn=data.collator)

    skipped = [batch["input_ids"].tolist() for batch in itertools.islice(skip_first_batches(loader(), 3), 197)]
    assert skipped == [batch["input_ids"].tolist() for batch in itertools.islice(loader(), 3, 200)]
    assert skipped


def test_without_weights_an_epoch_is_all_of_every_source(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 300}] * 60)
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "b" * 30}] * 400)
    data = prepare(run_config(SourceConfig(str(a)), SourceConfig(str(b)), cache=tmp_path, eval_fraction=0.0))
    assert [source.passes for source in data.statistics.sources] == [1, 1]
    assert sum(len(item["input_ids"]) for item in data.train) == 60 * 301 + 400 * 31
    with pytest.raises(UserError, match="some sources have a weight"):
        run_config(SourceConfig(str(a), weight=2.0), SourceConfig(str(b)), cache=tmp_path)


def test_streamed_mixture(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 50}] * 200) for name in "ab"]
    sources = (SourceConfig(str(paths[0]), weight=3.0), SourceConfig(str(paths[1]), weight=1.0))
    data = prepare(run_config(*sources, cache=tmp_path, max_length=32, streaming=True, max_steps=5, **STEPS))
    letters = [text.replace("<|endoftext|>", "")[0] for text in texts_of(data.train.one_pass())]
    assert letters.count("a") / len(letters) == pytest.approx(0.75, abs=0.01)
    assert set(letters[:4]) == {"a", "b"}


@pytest.mark.parametrize("first", [True, False])
def test_a_stream_without_a_block_is_named(tmp_path, first):
    """It would end every pass after the others' first blocks."""
    good = write_jsonl(tmp_path / "good.jsonl", [conversation("q", f"answer {n}") for n in range(99)])
    none = write_jsonl(tmp_path / "none.jsonl", [conversation("q" * 500, "a")] * 9)
    paths = (none, good) if first else (good, none)
    settings = {"max_length": 64, "eval_fraction": 0.0, "streaming": True, "max_steps": 5, **STEPS}
    with pytest.raises(UserError, match=r"none\.jsonl: no supervised token left, 9 of 9"):
        prepare(run_config(*paths, cache=tmp_path, **settings))


def test_a_stream_is_shown_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "once"}])
    config = run_config(path, cache=tmp_path, eval_fraction=0.0, streaming=True, max_steps=5, **STEPS)
    console = Console(file=io.StringIO(), width=200)
    show_data(config, TOKENIZER, count=9, out=console)
    assert [f"block {n}" in console.file.getvalue() for n in (1, 2)] == [True, False]


def test_streaming_without_a_document_to_hold_back(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("x" * 500)
    with pytest.raises(UserError, match="eval_data"):
        prepare(run_config(path, cache=tmp_path, max_length=50, streaming=True, max_steps=5, **STEPS))


def test_show_data(chats, tmp_path):
    out = Console(file=io.StringIO(), width=100, color_system=None)
    show_data(run_config(chats, cache=tmp_path, max_length=200), TOKENIZER, count=1, out=out)
    printed = out.file.getvalue()
    assert printed.count("── document ──") > 1
    assert "»Answer 0.<|im_end|>«" in printed
    assert "<|im_start|>user\nQuestion 0?<|im_end|>" in printed
    assert "supervised tokens" in printed and "%" in printed
    colour = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    show_data(run_config(chats, cache=tmp_path, max_length=200), TOKENIZER, count=1, out=colour)
    assert "\x1b[1;32mAnswer 0." in colour.file.getvalue() and "»" not in colour.file.getvalue()
    # On a terminal that is asked for none (NO_COLOR), colours go and bold stays.
    plain = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", no_color=True)
    show_data(run_config(chats, cache=tmp_path, max_length=200), TOKENIZER, count=1, out=plain)
    assert "»Answer 0.<|im_end|>«" in plain.file.getvalue()


def test_no_bar_lands_in_a_file(chats, tmp_path, capsys):
    """As `2> log` would have it."""
    prepare_data(run_config(chats, cache=tmp_path / "cache", max_length=200), TOKENIZER, progress=True)
    assert capsys.readouterr().err == ""


GROWTH = """
import dataclasses, sys, threading
import psutil
sys.path.insert(0, sys.argv[1])
from test_data_prepare import *

def used():
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 2**20  # mapped files are the page cache's

peak = 0.0
def watch():
    global peak
    while True:
        peak = max(peak, used())
        time.sleep(0.005)

whole = run_config(sys.argv[2], cache=sys.argv[3], eval_fraction=0.0)
streamed = dataclasses.replace(whole, streaming=True, max_steps=1, method="full")
prepare(dataclasses.replace(whole, data=(SourceConfig(sys.argv[2], limit=2000),)))  # imports, buffers
before = used()
threading.Thread(target=watch, daemon=True).start()
for config in (whole, streamed)[: int(sys.argv[4])]:
    train = prepare(config).train
    tokens = sum(len(item["input_ids"]) for item in (train.one_pass() if config.streaming else train))
    print(tokens, peak - before)
"""


def peak_growth(path, tmp_path, ways):
    """Tokens, and the memory (MB) a process gains while it prepares and reads `path`: cached, then (2) streamed."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", GROWTH, os.path.dirname(__file__), str(path), str(tmp_path / "cache"), str(ways)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()[-ways:]]


def write_lines(path, megabytes):
    line = "The quick brown fox jumps over the lazy dog, and then the dog wakes up. "
    with open(path, "w") as file:
        for number in range(megabytes * 2**20 // (len(line) + 24)):
            file.write('{"text": "' + line + f'{number:09d}"}}\n')
    return path


def check_growth(tmp_path, megabytes, bound, ways):
    for tokens, growth in peak_growth(write_lines(tmp_path / "text.jsonl", megabytes), tmp_path, ways):
        assert tokens > 0.7 * megabytes * 2**20  # one a byte: as Python objects they would take 8 times as much
        assert growth < bound


def test_memory_does_not_grow_with_the_text(tmp_path):
    check_growth(tmp_path, 6, 48, ways=1)


@pytest.mark.slow
def test_memory_does_not_grow_with_much_text(tmp_path):
    check_growth(tmp_path, 60, 48, ways=2)
