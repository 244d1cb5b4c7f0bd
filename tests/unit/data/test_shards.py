import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.records import Document
from sft_dist.data.shards import FORMAT_VERSION, Shards, row_dtype, write
from sft_dist.errors import DataError
from sft_dist.files import digest_of

ABOUT = {"eos_id": 0, "pad_id": 1, "tokenizer": "t", "template": "p"}


def documents(lengths, vocab_size=50, seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        targets = [False, *(draw.random(length - 1) < 0.5).tolist()]
        made.append(Document(draw.integers(0, vocab_size, length).tolist(), targets, f"f:{number}"))
    return made


ROWS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=9)


@given(ROWS, st.integers(18, 23), st.integers(1, 4), st.sampled_from([50, 70_000]))
@settings(max_examples=40, deadline=None)
def test_what_is_read_is_what_was_written(tmp_path_factory, lengths, seq_len, rows_per_shard, vocab_size):
    rows = [documents(row, vocab_size, seed) for seed, row in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("shards") / "train"
    manifest = write(folder, rows, seq_len=seq_len, rows_per_shard=rows_per_shard, vocab_size=vocab_size, **ABOUT)
    shards = Shards.open(folder, verify=True)
    assert shards.manifest == manifest
    batch = shards.rows(np.arange(len(rows)))
    for number, row in enumerate(rows):
        ids = [token for document in row for token in document.ids]
        pad = seq_len - len(ids)
        assert batch.lengths[number] == len(ids)
        assert batch.tokens[number].tolist() == ids + [1] * pad
        assert batch.targets[number].tolist() == [t for d in row for t in d.targets] + [False] * pad
        assert batch.positions[number].tolist() == [p for d in row for p in range(len(d.ids))] + list(range(pad))
        assert batch.documents[number].tolist() == [n for n, d in enumerate(row) for _ in d.ids] + [-1] * pad
    everything = [document for row in rows for document in row]
    tokens, targets = sum(len(d.ids) for d in everything), sum(d.num_targets for d in everything)
    assert shards.count(np.arange(len(rows))) == (tokens, targets) == (manifest.tokens, manifest.targets)
    assert shards.documents_per_row().tolist() == [len(row) for row in rows]
    assert shards.origins(range(len(rows))) == {number: [d.where for d in row] for number, row in enumerate(rows)}
    names, of_documents = shards.sources()
    assert (names, of_documents.tolist()) == (["f"], [0] * len(everything))


def test_shards_that_do_not_know_their_origins_are_read(tmp_path):
    folder = made(tmp_path)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values.pop("digest")
    values["files"] = {name: entry for name, entry in values["files"].items() if name.endswith(".rows")}
    path.write_text(json.dumps({**values, "digest": digest_of(values)}))
    shards = Shards.open(folder, verify=True)
    assert (shards.origins([0]), shards.sources()[0]) == ({}, [])


def made(tmp_path):
    folder = tmp_path / "train"
    write(folder, [documents([5, 3]), documents([8])], seq_len=8, rows_per_shard=1, vocab_size=50, **ABOUT)
    return folder


def test_rows_come_in_the_order_asked_for_across_shards(tmp_path):
    shards = Shards.open(made(tmp_path))
    forward, backward = shards.rows(np.array([0, 1, 1])), shards.rows(np.array([1, 1, 0]))
    assert (forward.tokens[::-1] == backward.tokens).all()


def test_stored_rows_are_the_bytes_of_the_files_in_the_order_asked_for(tmp_path):
    folder = tmp_path / "train"
    write(
        folder, [documents([n % 7 + 2], seed=n) for n in range(20)], seq_len=9, rows_per_shard=6, vocab_size=50, **ABOUT
    )
    shards = Shards.open(folder)
    numbers = np.array([7, 19, 0, 7, 18, 3, 12, 5])
    stored = shards.stored(numbers)
    assert (stored.tokens.dtype, stored.lengths.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    every = np.concatenate([np.fromfile(folder / f"{n:05d}.rows", row_dtype(9, "<u2")) for n in range(4)])
    assert stored.records.tobytes() == every[numbers].tobytes()
    assert (stored.take(slice(1, 3)).tokens == stored.tokens[1:3]).all()
    assert [shards.count(numbers[n : n + 1]) for n in range(8)] == list(
        zip(*map(list, shards.counts(numbers)), strict=True)
    )
    assert len(shards.stored(numbers[:0]).tokens) == 0


def test_a_row_that_does_not_exist_is_refused(tmp_path):
    shards = Shards.open(made(tmp_path))
    for number in (-1, 2):
        with pytest.raises(IndexError, match=rf"rows {number} to {number} of 2 in "):
            shards.stored(np.array([number]))


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sft_dist.data.shards._MAX_MAPS", 3)
    shards = Shards.open(made(tmp_path))
    assert (shards.rows(np.array([0, 1])).tokens == shards.rows(np.array([1, 0])).tokens[::-1]).all()
    assert len(shards._maps) <= 3


def test_numpy_reads_the_files_with_no_parsing(tmp_path):
    folder = made(tmp_path)
    records = np.memmap(folder / "00001.rows", dtype=row_dtype(8, "<u2"), mode="r")
    assert records["tokens"][0].tolist() == Shards.open(folder).rows(np.array([1])).tokens[0].tolist()


def test_every_flipped_byte_is_found(tmp_path):
    folder = made(tmp_path)
    for path in sorted(folder.glob("0000*")):
        content = bytearray(path.read_bytes())
        for place in range(len(content)):
            content[place] ^= 1
            path.write_bytes(content)
            with pytest.raises(DataError, match=f"{path.name}: its bytes are not the ones that were written"):
                Shards.open(folder, verify=True)
            is_rows = path.suffix == ".rows"
            told = f"{path.name}: {'row 0: ' if is_rows else ''}its bytes are not the ones that were written; prepare"
            with pytest.raises(DataError, match=told):
                Shards.open(folder).stored(np.arange(2)) if is_rows else Shards.open(folder).origins([1, 0])
            content[place] ^= 1
        path.write_bytes(content)
    Shards.open(folder, verify=True)


def test_each_damage_is_named_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no prepared shards there; run `sft-dist prepare RUN.yaml`"):
        Shards.open(tmp_path / "nowhere")
    folder = made(tmp_path)
    manifest = (folder / "manifest.json").read_text()
    for text, message in (
        (manifest[:50], "manifest.json: damaged"),
        (
            json.dumps({**json.loads(manifest), "format_version": 99}),
            f"format version 99, this program reads {FORMAT_VERSION}",
        ),
    ):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Shards.open(folder)
    (folder / "manifest.json").write_text(manifest)
    (folder / "00000.rows").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000.rows: 0 bytes, the manifest says 40; prepare again"):
        Shards.open(folder)
    (folder / "00000.rows").unlink()
    with pytest.raises(DataError, match=r"00000.rows: missing; prepare again"):
        Shards.open(folder)


def test_a_token_costs_two_bytes_and_a_quarter(tmp_path):
    folder = tmp_path / "train"
    write(folder, [documents([1024])] * 20, seq_len=1024, rows_per_shard=8, vocab_size=50_257, **ABOUT)
    assert sum(path.stat().st_size for path in folder.glob("0*")) / (20 * 1024) < 2.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1 << 20}, "does not hold 1 rows of"),
        ({"seq_len": 1 << 40}, "does not fit into a C int"),
        ({"seq_len": 0}, "rows of 0 tokens"),
        ({"rows": -1}, "-1 rows"),
        ({"rows": 1 << 50}, "00002.rows does not hold"),
        ({"rows_per_shard": "8"}, "'8' a shard"),
        ({"dtype": "|O"}, r"tokens of dtype '\|O'"),
        ({"files": {"../x": {"bytes": 2}}}, "00000.rows does not hold"),
        ({"rows": 1}, "00001.origins: not a file of 1 rows"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_a_forged_manifest_is_refused_before_its_sizes_are_used(tmp_path, change, message):
    path = made(tmp_path) / "manifest.json"
    values = {**json.loads(path.read_text()), **change}
    values.pop("digest")
    path.write_text(json.dumps({**values, "digest": digest_of(values)}))
    with pytest.raises(DataError, match=message):
        Shards.open(path.parent)
