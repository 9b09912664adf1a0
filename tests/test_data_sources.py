"""Rows of files, folders and the Hub, what they mean, and what is said when they are wrong."""

import gzip
import io
import json
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_support import conversation, write_jsonl

from graftlm.errors import UserError
from graftlm.training.config import SourceConfig
from graftlm.training.data import json_rows, readers
from graftlm.training.data.formats import columns_of, detect_format, iterate_documents
from graftlm.training.data.sources import iterate_rows, list_files, source_identity
from graftlm.training.data.statistics import Counts, not_read


def rows_of(path, **settings):
    return list(iterate_rows(SourceConfig(str(path), **settings)))


def documents_of(path, **settings):
    source = SourceConfig(str(path), **settings)
    rows = rows_of(path, **settings)
    return list(iterate_documents(iter(rows), source, detect_format(rows[0], source)))


EXPECTED = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
EXPECTED_ROW = {"messages": EXPECTED, "tools": [{"name": "f"}]}
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
    monkeypatch.setattr(json_rows, "CHUNK", 7)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * n} for n in range(5)], indent=2))
    rows = list(readers._read_json(path))
    assert [len(row.fields["text"]) for row in rows] == list(range(5))
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "5", "8", "11", "14"]
    path.write_text("\n " + path.read_text())
    assert [row.where.rsplit(":", 1)[1] for row in readers._read_json(path)] == ["3", "6", "9", "12", "15"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', ":2: empty line"),
        ('{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        ('{"text": "a"}\n["b"]\n', ":2: a JSON object is needed"),
        ('[{"text": "a"},\n {"text": "b"}', ":2: not valid JSON"),
        ('[{"text": "a"}\n {"text": "b"}]', ":2: not valid JSON"),
        ('[{"text": "a"}]\n{}', ":2: text after the closing"),
        ('\n{"text": "a"}\n', ":1: empty line"),
        ('{\n "text": "a"\n}\n', ":1: the object goes on in the next line; write every object on a line of its own"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000 + "\n", ":2: JSON nested too deeply"),
        ('[{"text": "a"},\n' + "[" * 100_000, ":2: JSON nested too deeply"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}\n", ":1: JSON with too long a number"),
        ('[{"text": "a", "n": ' + "1" * 5000 + "}]", ":1: JSON with too long a number"),
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


def test_zst_needs_its_library(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        rows_of(tmp_path / "a.jsonl.zst")


def test_zst_of_several_frames_whole_and_torn(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    lines = "".join(json.dumps({"text": f"{n} ü " + "x" * (n % 99)}) + "\n" for n in range(9000)).encode()
    frame = zstandard.compress(lines)
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    for data, frames in ((frame, 1), (frame + frame, 2), (frame + skippable + frame, 2), (b"", 0)):
        path.write_bytes(data)
        assert len(rows_of(path)) == 9000 * frames
    for torn in (frame[: len(frame) // 2], frame + frame[:-1], frame[:3]):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=r"a\.jsonl\.zst: torn or not zstd \(it ends in the middle"):
            rows_of(path)
    path.write_bytes(b"not packed at all")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: torn or not zstd"):
        rows_of(path)
    assert readers.kind_of(path) == "binary"
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    path.write_bytes(packer.compress(lines) + packer.flush())
    assert len(rows_of(path)) == 9000


def test_packed_parquet_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet\.gz: parquet is compressed within and not read from \.gz; unpack"):
        rows_of(tmp_path / "a.parquet.gz")


def test_of_parquet_only_the_wanted_columns_are_decoded(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{**EXPECTED_ROW, "blob": b"x"}]), path)
    [row] = iterate_rows(SourceConfig(str(path)), columns=columns_of("messages", SourceConfig("")))
    assert set(row.fields) == {"messages", "tools"}
    [row] = iterate_rows(SourceConfig(str(path)), columns=columns_of("text", SourceConfig("")))
    assert set(row.fields) == {"messages", "tools", "blob"}  # the error about the missing one says what there is


def test_what_lies_beside_tables(tmp_path):
    rows = [conversation("Q", "A")]
    for name in ("README.md", "LICENSE", "notes.md", "data/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# A card")
    write_jsonl(tmp_path / "data/train.jsonl", rows)
    counts = Counts()
    assert [row.fields for row in iterate_rows(SourceConfig(str(tmp_path)), counts)] == rows
    assert counts.files_about_tables == 3
    assert not_read(counts) == "3 README, LICENSE or .md files beside tables left out"
    assert [file.name for file in list_files(SourceConfig(str(tmp_path)))] == ["train.jsonl"]


def test_json_beside_a_readme_holds_rows(tmp_path):
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / "licenses.json").write_text(json.dumps([conversation("Q", "A")]))
    assert [row.fields for row in rows_of(tmp_path)] == [conversation("Q", "A")]
    (tmp_path / "guide.md").write_text("# A book")  # now the .json is a settings file among texts
    assert [row.fields["text"][:3] for row in rows_of(tmp_path)] == ["# A", "# A", '[{"']


def test_a_table_that_is_not_read_is_refused_wherever_it_lies(tmp_path):
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / "data.csv").write_text("text\nhello\n")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"data\.csv: \.csv is not read; .*from_csv.* leave it out with pattern"):
        rows_of(tmp_path)
    assert len(rows_of(tmp_path, pattern="*.jsonl")) == 3


def test_a_table_that_is_not_read_among_sources_is_left_out_and_counted(tmp_path):
    for name in ("README.md", "main.py", "tests/data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a, b\n")
    counts = Counts()
    assert len(list(iterate_rows(SourceConfig(str(tmp_path)), counts))) == 2
    assert not_read(counts).startswith("1 tables left out (.csv")


def test_the_file_that_decided_the_format_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [conversation("Q", "A")])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(
        UserError, match=r"b\.jsonl:1: no column messages \(format messages, by .*a\.jsonl:1\); found text"
    ):
        documents_of(tmp_path)


def test_a_link_is_read_as_its_own_name_says(tmp_path):
    (tmp_path / "blob").write_text('{"text": "a"}\n')
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "blob")
    rows, text = (source_identity(SourceConfig(str(tmp_path / name))) for name in ("a.jsonl", "a.txt"))
    assert rows != text


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
    assert counts.skipped_files == 1 and counts.not_utf8 == [str(tmp_path / "old.c")]
    assert (
        not_read(counts)
        == f"1 binary files skipped, 1 files skipped that are not UTF-8 (convert them), the first {tmp_path / 'old.c'}"
    )
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


def test_hub_without_a_name():
    with pytest.raises(UserError, match="hub:: no dataset is named; write hub:OWNER/NAME"):
        rows_of("hub:")


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hub:owner/name.*doesn't exist"):
        rows_of("hub:owner/name")


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


def test_content_in_parts_is_one_text(tmp_path):
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "\n?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]}
    for path in (write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        assert [message["content"] for message in documents_of(path)[0].messages] == ["Q\n?", "Q"]


def calling(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [EXPECTED[0], {"role": "assistant", "content": None, "tool_calls": [call]}, EXPECTED[1]],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": arguments}}}],
    }


def test_nones_that_parquet_puts_in_are_taken_out(tmp_path):
    rows = [calling("weather", {"city": "Paris"}), calling("add", {"a": 1, "b": 2})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_lines = documents_of(write_jsonl(tmp_path / "a.jsonl", rows))
    for document, same in zip(documents_of(tmp_path / "a.parquet"), from_lines, strict=True):
        assert (document.messages, document.tools) == (same.messages, same.tools)
    given = documents_of(write_jsonl(tmp_path / "b.jsonl", [calling("find", {"limit": None})]))[0]
    assert given.messages[1]["tool_calls"][0]["function"]["arguments"] == {"limit": None}  # meant so, in .jsonl


def test_arguments_and_tools_written_as_json_become_objects(tmp_path):
    row = calling("weather", json.dumps({"city": "Paris"}))
    row["tools"] = [json.dumps(tool) for tool in calling("weather", {})["tools"]]
    document = documents_of(write_jsonl(tmp_path / "a.jsonl", [row]))[0]
    assert document.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert document.tools == calling("weather", {})["tools"]
    flat = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": ""}]}
    document = documents_of(write_jsonl(tmp_path / "b.jsonl", [{"messages": [EXPECTED[0], flat]}]))[0]
    assert document.messages[1] == flat | {"tool_calls": [{"name": "weather", "arguments": {}}], "content": ""}


def test_answers_of_a_prompt_are_history(tmp_path):
    row = {"prompt": [*EXPECTED, EXPECTED[0]], "completion": [EXPECTED[1]]}
    path = write_jsonl(tmp_path / "a.jsonl", [row, {"prompt": EXPECTED, "completion": [EXPECTED[0]]}])
    assert documents_of(path, limit=1)[0].first_answer == 3
    with pytest.raises(UserError, match=r"a\.jsonl:2: no assistant message in the completion"):
        documents_of(path)


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
        ({"text": "a"}, "no column messages (format messages, by "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: content has a part that is no text",
        ),
        ({"messages": [{"role": "assistant", "content": []}]}, "message 1 has no content"),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
            "write it as tool_calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, "message 1: tool_calls must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call has no name"),
        (calling("f", "{"), "message 2: arguments of f: not valid JSON"),
        (calling("f", "[1]"), "message 2: arguments of f are a JSON list, not an object"),
        ({"messages": EXPECTED, "tools": "hello"}, "column tools: not valid JSON"),
        ({"messages": EXPECTED, "tools": {"a": 1}}, "column tools is no list of JSON schemas"),
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
