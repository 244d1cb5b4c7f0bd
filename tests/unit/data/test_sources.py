import gzip
import json
import struct
import sys
import tracemalloc
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import sources, token_files
from sft_dist.data.sources import columns_missing, digest, files, kind_of, rows, slices
from sft_dist.errors import DataError
from sft_dist.schema import SourceConfig

BOM = b"\xef\xbb\xbf"


def in_two_frames(data):
    packer = zstandard.ZstdCompressor(write_checksum=True)
    return packer.compress(data[:3]) + packer.compress(data[3:])


PACK = {"": bytes, ".gz": gzip.compress, ".zst": in_two_frames}


def source(path, **more):
    return SourceConfig(path=str(path), **more)


def everything(path, slice_bytes=1 << 20, *, eos_id=None, is_headed=True, **more):
    """(place, value or reason) of every row over all the slices."""
    found = []
    for piece in slices(source(path, **more), slice_bytes):
        found += rows(piece, source(path, **more), eos_id=eos_id, is_headed=is_headed)
    return [(where.removeprefix(f"{path}:"), getattr(row, "reason", row)) for where, row in found]


def megatron_pair(folder, sequences, documents, *, code=4, dtype="<i4", **forged):
    """A .bin and .idx as Megatron writes them; `forged` replaces fields of the header."""
    path = folder / "set.bin"
    arrays = [np.array(ids, dtype) for ids in sequences]
    path.write_bytes(b"".join(array.tobytes() for array in arrays))
    sizes = np.array([len(array) for array in arrays], "<i4")
    pointers = (np.cumsum(sizes) - sizes).astype("<i8") * np.dtype(dtype).itemsize
    fields = {"version": 1, "code": code, "count": len(sizes), "boundaries": len(documents), **forged}
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", *fields.values())
    body = header + sizes.tobytes() + pointers.tobytes() + np.array(documents, "<i8").tobytes()
    path.with_suffix(".idx").write_bytes(body)
    return path


def test_files_of_a_folder_and_a_glob_and_a_typo(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "c.parquet", "d.txt.zst", "e.md.gz", "notes.md", "t.bin"):
        (tmp_path / name).touch()
    names = [path.name for path in files(source(tmp_path))]
    assert names == ["a.jsonl.gz", "b.jsonl", "c.parquet", "d.txt.zst"]
    assert [path.name for path in files(source(tmp_path / "b*"))] == ["b.jsonl"]
    assert [path.name for path in files(source(tmp_path, format="nanogpt"))] == ["t.bin"]
    assert [path.name for path in files(source(tmp_path / "*", format="megatron"))] == ["t.bin"]
    assert [path.name for path in files(source(tmp_path / "t", format="megatron"))] == ["t.bin"]
    assert files(source("hf:some/set")) == []
    with pytest.raises(DataError, match=r"no such file; did you mean .*b\.jsonl\?"):
        files(source(tmp_path / "b.json"))
    with pytest.raises(DataError, match="no such file; paths are relative to the current directory"):
        files(source(tmp_path / "nowhere" / "x"))


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.npy", "a.bin", "a.xyz.gz", "a"])
def test_a_file_of_unknown_format_is_never_opened(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(DataError, match=r"unknown format .*pickled objects is never opened\); name it with format:"):
        kind_of(path, source(path))


def test_tables_and_token_files_are_not_read_compressed(tmp_path):
    with pytest.raises(DataError, match=r"parquet is read in place, not out of \.gz; decompress"):
        kind_of(tmp_path / "a.parquet.gz", source("a.parquet.gz"))


def test_the_digest_stands_for_the_content(tmp_path):
    path = megatron_pair(tmp_path, [[1, 2]], [0, 1])
    before = digest(path)
    index = path.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    assert digest(path) != before
    assert len(digest(path)) == len(digest(index)) == 32


@given(
    lines=st.lists(
        st.sampled_from([b'{"a": 1}', b'{"a": "\xc3\xa9\r"}', b"", b"\r", b"\xff", b"{", b"[1]\r", b"0" * 40])
    ),
    ending=st.sampled_from([b"", b"\n"]),
    start=st.sampled_from([b"", BOM]),
    slice_bytes=st.integers(1, 90),
    scan_bytes=st.integers(1, 50),
)
def test_slices_together_are_the_file_line_numbers_included(
    tmp_path_factory, lines, ending, start, slice_bytes, scan_bytes
):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(start + b"\n".join(lines) + ending)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_SCAN_BYTES", scan_bytes)
        patch.setattr(sources, "_PIECE_BYTES", 16)
        pieces = slices(source(path), slice_bytes)
        cut = everything(path, slice_bytes)
    assert cut == everything(path)
    assert [int(place) for place, _ in cut] == [n for n, line in enumerate(lines, 1) if line.strip()]
    assert [piece.begin for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    for piece in pieces[1:]:
        line_ends = [at for at in range(piece.begin) if path.read_bytes()[at : at + 1] == b"\n"]
        assert piece.first_line == len(line_ends) + 1
        multiple = piece.begin // slice_bytes * slice_bytes  # no line starts between the multiple and the cut
        assert multiple > 0
        assert not [at for at in line_ends if multiple <= at + 1 < piece.begin]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", BOM + b'{"t": "x"}\r\n\r\n["\\u00e9"]', [("1", {"t": "x"}), ("3", ["é"])]),
        ("a.json", BOM + b' [ 1 , {"t": "y"} ] \n', [("#1", 1), ("#2", {"t": "y"})]),
        ("a.json", b"[]", []),
        ("a.csv", BOM + b'\nt,u\r\n"a\rb\nc",d\n\ne\n', [("3", {"t": "a\rb\nc", "u": "d"}), ("6", {"t": "e"})]),
        (
            "a.tsv",
            BOM + b't\tu\n"a\rb\td\r\n\ne\tf\t\n',
            [("2", {"t": '"a\rb', "u": "d"}), ("4", {"t": "e", "u": "f"})],
        ),
        ("a.txt", BOM + b"a\r\n b\n\n\nc", [("1", "a\nb"), ("5", "c")]),
        ("a.tsv", b"t\nb\tc\n\xff\nd\n", [("2", "invalid_csv"), ("3", "invalid_utf8"), ("4", {"t": "d"})]),
        ("a.tsv", b"\n\n", []),
    ],
)
def test_each_format_plain_and_compressed(tmp_path, packing, name, content, expected):
    path = tmp_path / (name + packing)
    path.write_bytes(PACK[packing](content))
    assert everything(path) == expected
    assert everything(path, 3) == expected
    (tmp_path / f"empty{path.suffix}").write_bytes(b"")
    assert slices(source(tmp_path / f"empty{path.suffix}", format="csv"), 10) == []


def test_numbered_columns_and_other_delimiters(tmp_path):
    (tmp_path / "a").write_text("a;b\nc;d\n")
    assert everything(tmp_path / "a", delimiter=";") == [("2", {"a": "c", "b": "d"})]
    assert everything(tmp_path / "a", 1, delimiter="\t", is_headed=False) == [("1", {0: "a;b"}), ("2", {0: "c;d"})]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"a": {"b": 1, "b": 1}}', "duplicate_key", "the key 'b' is there twice"),
        (b'{"a": NaN}', "invalid_json", "NaN is no JSON value"),
        (b"[-Infinity]", "invalid_json", "-Infinity is no JSON value"),
        (b"\xc3(", "invalid_utf8", "byte 0 of the line"),
        (b"[" * 100_000, "invalid_json", "recursion"),
        (b'{"a":1}{"b":2}', "invalid_json", "Extra data"),
        (b'{"a":"' + b"x" * 3000 + b'"}', "line_too_long", "more than 2,000 bytes"),
    ],
)
def test_a_damaged_line_is_dropped_and_the_next_one_read(tmp_path, monkeypatch, line, reason, detail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"a": 1}\n')
    if reason == "line_too_long":
        monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2000)
        monkeypatch.setattr(sources, "_PIECE_BYTES", 100)
    (piece,) = slices(source(path), 1 << 20)
    (where, drop), after = rows(piece, source(path))
    assert (drop.reason, drop.where) == (reason, where) == (reason, f"{path}:1")
    assert detail in drop.detail
    assert after == (f"{path}:2", {"a": 1})


def test_a_line_of_100_megabytes_is_never_held(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.truncate(100 << 20)
        file.seek(0, 2)
        file.write(b"\nt\nx\n")
    tracemalloc.start()
    assert everything(path) == [("1", "line_too_long"), ("3", {"t": "x"})]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sources.MAX_LINE_BYTES + (8 << 20)


def test_damaged_elements_of_a_json_list_are_dropped(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1, "a": [2, 3]}, {"a": NaN}, {"a": 1}]')
    assert everything(tmp_path / "a.json") == [("#1", "duplicate_key"), ("#2", "invalid_json"), ("#3", {"a": 1})]


def test_damaged_csv_rows_are_dropped(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text\n"a"b\n\xff\nc\nd,e\n')
    expected = [("2", "invalid_csv"), ("3", "invalid_utf8"), ("4", {"text": "c"}), ("5", "invalid_csv")]
    assert everything(tmp_path / "a.csv") == expected


def test_a_text_is_cut_at_titles_or_blank_lines_or_where_it_gets_too_long(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b" = T = \n\n a\n \n b\n\xff\n = U = \n \n c")
    assert everything(path) == [("6", "invalid_utf8"), ("1", "= T =\na\nb\n= U =\nc")]
    path.write_bytes(b"a\n b\n\nc")
    assert everything(path) == [("1", "a\nb"), ("4", "c")]
    path.write_bytes(b"a" * 9 + b"\n" + b"b" * 9 + b"\nc\n")
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 12)
    assert everything(path) == [("1", "a" * 9 + "\n" + "b" * 9), ("3", "c")]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data[:200] + b"\x00" * 40 + data[240:]])
def test_a_damaged_compressed_file_is_an_error_with_the_records_before(tmp_path, packing, damage):
    lines = [json.dumps({"t": str(n**9)}) for n in range(400)]
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(damage(PACK[packing]("\n".join(lines).encode())))
    (piece,) = slices(source(path), 10)
    found = []
    with pytest.raises(DataError, match=r"damaged or cut short .* records were read; download or compress") as caught:
        found.extend(iter(rows(piece, source(path))))
    assert f"{path}: " in str(caught.value)
    assert f"after {len(found)} records" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON: .*; mend the file"),
        ("a.json", "[1, 2", "not JSON: Expecting ',' or ']'"),
        ("a.json", "[1, ]", "not JSON: Expecting value"),
        ("a.json", "[1] 2", "not JSON: Extra data"),
        ("a.json", "[" * 100_000, "not JSON: maximum recursion"),
        ("a.json", b"[\xff]", "not JSON: 'utf-8'"),
        ("a.json", "{}", "a list of records is expected, this is dict; use jsonl"),
        ("a.csv", 'text\nb\n"c\nd\n', "a quote opened after line 2 never closes; mend it"),
        ("a.csv", 'text\n"' + "c" * 3000, "a quote opened after line 1 never closes; mend it"),
        ("a.tsv", b"\xff\nb\n", r"the header cannot be read \(invalid_utf8: .*; mend line 1"),
        ("a.parquet", "PAR1 not", "not parquet .*; copy it again, or name another format"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(sources, "_MAX_FIELD_CHARACTERS", 2000)
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        everything(path)


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match=r"no column 'text'; the columns are 'txt', 'b'; did you mean 'txt'\?"):
        columns_missing("a.csv", ["txt", "b"], ["b", "text"])
    with pytest.raises(DataError, match="no column 'text'; the columns are 'q'; name the right ones"):
        columns_missing("a.csv", ["q"], [0, "text"])


def test_parquet_is_cut_at_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"t": [f"t{n}" for n in range(10)], "u": list(range(10))}), path, row_group_size=3)
    pieces = slices(source(path), 1)
    assert [(piece.begin, piece.end, piece.first_line) for piece in pieces] == [
        (0, 1, 1),
        (1, 2, 4),
        (2, 3, 7),
        (3, 4, 10),
    ]
    assert everything(path, 1) == everything(path) == [(f"#{n + 1}", {"t": f"t{n}", "u": n}) for n in range(10)]
    (_, row), *_ = rows(pieces[1], source(path), check=lambda names: names[:1])
    assert row == {"t": "t3"}


def test_parquet_text_that_is_none_and_a_file_damaged_inside(tmp_path):
    path = tmp_path / "a.parquet"
    bad = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"t": bad}), path)
    assert everything(path) == [("#1", {"t": "a"}), ("#2", "invalid_utf8"), ("#3", {"t": "c"})]
    far = pa.array([0, 1 << 62], pa.int64()).view(pa.timestamp("ms"))
    pq.write_table(pa.table({"t": far}), path)
    assert [row for _, row in everything(path)][1] == "wrong_type"
    pq.write_table(pa.table({"t": ["x" * 99] * 50}), path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged after 0 rows .*; copy the file again"):
        everything(path)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("pyarrow", "a.parquet", "parquet"), ("zstandard", "a.jsonl.zst", "zstd"), ("datasets", "hf:no/such", "hub")],
)
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch, module, name, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name.rpartition("/")[2]).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"needs? the package {module}; pip install 'sft-dist\[{extra}\]'"):
        everything(name if name.startswith("hf:") else tmp_path / name)


def test_a_set_on_the_hub_is_cut_by_rows(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    expected = [(f"#{n + 1}", {"t": f"t{n}", "m": [{"role": "user"}]}) for n in range(300)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for _, row in expected))
    path = f"hf:{tmp_path / 'set'}"
    assert everything(path) == everything(path, 1000) == expected
    assert 1 < len(slices(source(path), 1000)) < 300
    assert digest(path, source(path)) == digest(path)
    (_, row), *_ = rows(slices(source(path), 1 << 20)[0], source(path), check=lambda names: ["t"])
    assert row == {"t": "t0"}
    assert sources.first_rows(source(path), 1) == [(f"{path}:#1", expected[0][1])]


def test_a_set_that_cannot_be_loaded_is_an_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    message = r"subset 'x', split 'test' cannot be loaded \(ConnectionError: no route to host\); check the id"
    with pytest.raises(DataError, match=message):
        slices(source("hf:some/set", subset="x", split="test"), 10)


@pytest.mark.parametrize(("code", "dtype"), [(1, "|u1"), (2, "|i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatron_documents_are_runs_of_sequences(tmp_path, code, dtype):
    path = megatron_pair(tmp_path, [[5, 6], [7], [127, 9, 1]], [0, 2, 2, 3], code=code, dtype=dtype)
    for slice_bytes in (1, 1 << 20):
        (_, first), (_, empty), (place, last) = everything(path, slice_bytes, format="megatron")
        assert first.dtype == np.uint32
        assert (first.tolist(), empty, place, last.tolist()) == ([5, 6, 7], "no_tokens", "#3", [127, 9, 1])
    index = path.with_suffix(".idx")
    assert len(everything(index, format="megatron")) == len(everything(path.with_suffix(""), format="megatron")) == 3
    index.write_bytes(index.read_bytes() + b"\0\0\0")  # the modes of a multimodal set
    assert len(everything(path, format="megatron")) == 3


def test_megatron_ids_that_are_no_tokens_are_dropped(tmp_path):
    path = megatron_pair(tmp_path, [[-1], [1 << 32], [0xFFFFFFFF]], [0, 1, 2, 3], code=5, dtype="<i8")
    (_, low), (_, high), (_, good) = everything(path, format="megatron")
    assert (low, high, good.tolist()) == ("invalid_token", "invalid_token", [0xFFFFFFFF])
    megatron_pair(tmp_path, [], [0])
    assert everything(path, format="megatron") == []


@pytest.mark.parametrize(
    ("documents", "forged", "message"),
    [
        ([0, 2], {"count": 1 << 62}, r"4,611,686,018,427,387,904 sequences .*; copy it again"),
        ([0, 2], {"boundaries": 3}, "need .* bytes, the file has .*; copy it again"),
        ([0, 2], {"code": 6}, "version 1 with dtype code 6; version 1 with integers .*: convert it"),
        ([0, 2], {"version": 2}, "version 2 with dtype code 4"),
        ([0, 3], {}, "document 1 is said to be sequences 0 to 3, .*: copy both again"),
        ([1, 0], {}, "document 1 is said to be sequences 1 to 0"),
    ],
)
def test_a_forged_megatron_index_is_an_error(tmp_path, documents, forged, message):
    path = megatron_pair(tmp_path, [[5, 6], [7]], documents, **forged)
    with pytest.raises(DataError, match=message):
        everything(path, format="megatron")


def test_a_megatron_pair_that_does_not_belong_together_is_an_error(tmp_path):
    path = megatron_pair(tmp_path, [[5, 6], [7]], [0, 2])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"sequence 2 is said to be bytes 8 to 12, and set.bin has 11 bytes; .*copy both"
    ):
        slices(source(path, format="megatron"), 10)
    path.with_suffix(".idx").write_bytes(b"x" * 40)
    with pytest.raises(DataError, match="not a Megatron index"):
        slices(source(path, format="megatron"), 10)
    path.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"needs set\.idx beside it"):
        slices(source(path, format="megatron"), 10)


@given(
    ids=st.lists(st.integers(0, 3), max_size=40),
    slice_bytes=st.integers(1, 60),
    longest=st.integers(1, 9),
    is_headed=st.booleans(),
    eos_id=st.sampled_from([0, None]),
)
def test_nanogpt_texts_end_with_the_end_token(tmp_path_factory, ids, slice_bytes, longest, is_headed, eos_id):
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    header = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) if is_headed else b""
    path.write_bytes(header + np.array(ids, "<u2").tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "MAX_TOKENS", longest)
        patch.setattr(token_files, "_SEARCH_TOKENS", 2)
        found = everything(path, slice_bytes, format="nanogpt", eos_id=eos_id)
    place, size = 0, 0
    assert [n for _, text in found for n in text.tolist()] == ids
    for at, text in found:
        assert at == f"#{place + 1}"
        place, size = place + len(text), len(text)
        assert text.dtype == np.uint32
        assert eos_id not in text[:-1]
        assert (eos_id is not None and text[-1] == eos_id) or size == longest or place == len(ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "3 bytes are no list of uint16; copy it again"),
        (struct.pack("<256i", 20240520, 1, 5, *[0] * 253), "version 1 and 5 tokens; .* 1,034 bytes .* this has 1,024"),
        (struct.pack("<256i", 20240520, 9, 0, *[0] * 253), "the header says version 9"),
    ],
)
def test_a_token_file_of_another_size_is_an_error(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        slices(source(tmp_path / "a.bin", format="nanogpt"), 10)


def test_the_first_rows_are_of_the_first_file_that_has_any(tmp_path):
    (tmp_path / "a.jsonl").touch()
    pq.write_table(pa.table({"t": list(range(9))}), tmp_path / "b.parquet", row_group_size=4)
    assert [row for _, row in sources.first_rows(source(tmp_path), 3)] == [{"t": 0}, {"t": 1}, {"t": 2}]
    assert sources.first_rows(source(tmp_path / "a.jsonl"), 3) == []
