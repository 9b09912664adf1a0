"""Rows of files, folders and the Hub, what they mean, and what is said when they are wrong."""

import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_support import conversation, write_jsonl

from graftlm.errors import UserError
from graftlm.training.config import SourceConfig
from graftlm.training.data import readers
from graftlm.training.data.formats import detect_format, iterate_documents
from graftlm.training.data.sources import iterate_rows
from graftlm.training.data.statistics import Counts


def rows_of(path, **settings):
    return list(iterate_rows(SourceConfig(str(path), **settings)))


def documents_of(path, **settings):
    source = SourceConfig(str(path), **settings)
    rows = rows_of(path, **settings)
    return list(iterate_documents(iter(rows), source, detect_format(rows[0], source)))


ROWS = [{"text": "one\ntwo"}, {"text": "zwei ü"}, {"text": "3"}]


def test_every_file_type_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "c.json").write_text(lines)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert [row.fields for row in rows_of(file)] == ROWS, file


def test_array_of_objects_is_decoded_across_buffer_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 7)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * n} for n in range(5)], indent=2))
    rows = list(readers._read_json(path))
    assert [len(row.fields["text"]) for row in rows] == list(range(5))
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "5", "8", "11", "14"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', ":2: empty line"),
        ('{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        ('{"text": "a"}\n["b"]\n', ":2: a JSON object is needed"),
        ('[{"text": "a"},\n {"text": "b"}', ":2: not valid JSON"),
        ('[{"text": "a"}\n {"text": "b"}]', ":2: not valid JSON"),
        ('[{"text": "a"}]\n{}', ":2: text after the closing"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, text, where):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        rows_of(path)
    assert f"{path}{where}" in str(caught.value) and "\n" not in str(caught.value)


def test_torn_and_foreign_files_are_named(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "image.txt").write_bytes(b"\x00\x01")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=file.name):
            rows_of(file)
    with pytest.raises(UserError, match="no such file"):
        rows_of(tmp_path / "missing.txt")


def test_zst_needs_its_library(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    try:
        import zstandard
    except ImportError:
        with pytest.raises(UserError, match="pip install zstandard"):
            rows_of(tmp_path / "a.jsonl.zst")
    else:
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n'))
        assert len(rows_of(tmp_path / "a.jsonl.zst")) == 1


def test_folder_of_source_files(tmp_path):
    for name in ("b.py", "a.rs", "sub/c.md", ".git/config", "package.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "icon.png").write_bytes(b"\x89PNG\x00")
    (tmp_path / "old.c").write_bytes("Straße".encode("latin-1"))
    counts = Counts()
    rows = list(iterate_rows(SourceConfig(str(tmp_path)), counts))
    assert [row.fields["text"] for row in rows] == [
        f"text of {n}" for n in ("a.rs", "b.py", "package.json", "sub/c.md")
    ]
    assert counts.skipped_files == 2
    assert [row.fields["text"] for row in rows_of(tmp_path, pattern="*.py")] == ["text of b.py"]
    with pytest.raises(UserError, match="pattern"):
        rows_of(tmp_path, pattern="*.java")


def test_limit_counts_documents_not_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 4)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 10}, {"text": "y" * 10}, {"text": "z"}])
    source = SourceConfig(str(path), limit=2)
    pieces = list(iterate_documents(iterate_rows(source), source, "text"))
    assert len(pieces) > 4
    assert "".join(piece.text for piece in pieces) == "x" * 10 + "y" * 10


def test_a_long_text_beside_a_conversation_is_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 4)
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "text": "x" * 10}] * 2)
    source = SourceConfig(str(path))
    assert detect_format(rows_of(path)[0], source, prefer_text=False) == "messages"
    found = list(iterate_documents(iterate_rows(source), source, "messages"))
    assert [[one["content"] for one in document.messages] for document in found] == [["why?", "because"]] * 2


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n", max_size=80), st.integers(1, 12))
def test_pieces_join_to_the_text(text, size):
    parts = list(readers.pieces(io.StringIO(text, newline="").read, size))
    assert "".join(part for part, _ in parts) == text
    assert all(len(part) <= size for part, _ in parts)
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]


def test_long_texts_are_cut_at_paragraphs(tmp_path):
    paragraph = "word " * 200 + "\n\n"
    path = tmp_path / "long.txt"
    path.write_text(paragraph * 300)
    rows = rows_of(path)
    assert len(rows) > 1 and rows[0].first and rows[-1].last and not rows[0].last
    assert all(row.fields["text"].endswith("\n\n") for row in rows[:-1])
    assert "".join(row.fields["text"] for row in rows) == paragraph * 300


def test_hub_rows_are_streamed(monkeypatch):
    asked = {}

    def load_dataset(path, name, *, split, streaming):
        asked.update(path=path, name=name, split=split, streaming=streaming)
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = rows_of("hub:owner/name", name="small", split="test", limit=2)
    assert [row.fields for row in rows] == ROWS[:2]
    assert asked == {"path": "owner/name", "name": "small", "split": "test", "streaming": True}


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hub:owner/name.*doesn't exist"):
        rows_of("hub:owner/name")


EXPECTED = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": EXPECTED}),
        ("prompt_completion", {"prompt": "Q", "completion": "A"}),
        ("prompt_completion", {"prompt": EXPECTED[:1], "completion": EXPECTED[1:]}),
        ("alpaca", {"instruction": "Q", "input": "", "output": "A"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}),
    ],
)
def test_formats_become_messages(tmp_path, name, row):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert detect_format(rows_of(path)[0], SourceConfig(str(path))) == name
    assert documents_of(path)[0].messages == EXPECTED
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet")[0].messages == EXPECTED


def test_alpaca_input_and_system(tmp_path):
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief"}
    messages = documents_of(write_jsonl(tmp_path / "a.jsonl", [row]))[0].messages
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be brief"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no assistant"),
        ({"messages": [{"role": "bot", "content": "Q"}]}, "unknown role 'bot'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "no content"),
        ({"messages": [{"content": "Q"}]}, "role and content"),
        ({"messages": [EXPECTED[0], {"role": "assistant", "content": "x \ud83d y"}]}, "'\\ud83d' is half of a"),
        ({"messages": EXPECTED, "tools": [{"name": "\udc00"}]}, "'\\udc00' is half of a"),
        ({"text": "a"}, "no column messages; found text"),
    ],
)
def test_bad_conversations_name_file_and_line(tmp_path, row, word):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation("Q", "A"), row])
    with pytest.raises(UserError) as caught:
        documents_of(path)
    assert f"{path}:2: " in str(caught.value) and word in str(caught.value)


@pytest.mark.parametrize("role", ["narrator", ["human"], {"a": 1}, None])
def test_bad_sharegpt_role(role, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": [{"from": role, "value": "x"}]}])
    with pytest.raises(UserError) as caught:
        documents_of(path)
    assert f"a.jsonl:1: turn 1: unknown role {role!r}" in str(caught.value)


@pytest.mark.parametrize("column", ["instruction", "input"])
def test_alpaca_with_a_number(column, tmp_path):
    row = {"instruction": "Q", "input": "1", "output": "A"} | {column: 5}
    with pytest.raises(UserError, match=rf"a\.jsonl:1: column {column} is int, not text"):
        documents_of(write_jsonl(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize("text", ["half \ud83d a pair", "\udc00", "ends \ud83d"])
def test_half_of_a_character(text, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "\U0001f600, whole"}, {"text": text}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: '\\u....' is half of a character"):
        documents_of(path)


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weights_that_share_nothing_out(weight):
    with pytest.raises(UserError, match=r"data.weight: .* of a must be above 0 and finite"):
        SourceConfig("a", weight=weight)


def test_unknown_columns_are_listed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "a", "title": "b"}])
    with pytest.raises(UserError, match="found body, title"):
        documents_of(path)
    assert documents_of(path, text_field="body")[0].text == "a"
    with pytest.raises(UserError, match="is int, not text"):
        documents_of(write_jsonl(tmp_path / "b.jsonl", [{"text": 3}]))


def test_empty_texts_keep_their_number(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": " \n"}, {"text": "c"}])
    assert [(d.text, d.index) for d in documents_of(path)] == [("a", 0), ("c", 2)]
