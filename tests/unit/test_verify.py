import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sft_dist import verify
from sft_dist.data.mixture import BLOCK
from sft_dist.ledger import keys, recomputed
from sft_dist.state import TrainState
from tests.unit.data.test_mixture import mixture, sets  # noqa: F401 (a fixture)
from tests.unit.saved_runs import SHAPES, folder_of, forge, fragments, resealed

N = 23  # rows of the first set


def certified(shards, order, *, begin=0, end, skipped=(), names=("rows",), period=None):
    """The checks of a run that was fed exactly what its order says."""
    counts = verify.usage(order, shards.num_rows, begin, end, skipped)
    ledger = recomputed(verify._counted(shards, counts), keys(0, shards.seq_len))
    state = TrainState(step=1, begin=begin, rows_consumed=end, skipped=skipped, ledger=ledger)
    return list(verify.fed(state, shards, order, 0, names, period))


def permuted(ordinals):
    """An order of 23 rows in which each epoch is another permutation."""
    epoch, place = np.divmod(np.asarray(ordinals), N)
    return (place * (1 + epoch % 5) + epoch) % N


@pytest.mark.parametrize(
    ("begin", "end", "skipped"), [(0, 60, ()), (11, 34, ()), (11, 80, ((20, 31),)), (0, 5, ()), (0, N, ((0, N - 1),))]
)
def test_a_stream_is_even_wherever_it_begins_and_ends(sets, begin, end, skipped):  # noqa: F811
    checks = certified(sets[0], permuted, begin=begin, end=end, skipped=skipped)
    assert [check.is_right for check in checks] == [True] * 3, checks


def test_an_order_that_prefers_a_row_is_uneven_though_it_was_followed(sets):  # noqa: F811
    checks = certified(sets[0], lambda ordinals: np.maximum(permuted(ordinals), 1), end=60)
    assert [(check.name, check.is_right) for check in checks] == [("fed", True), ("epochs", False), ("skipped", True)]
    assert "over whole epochs 0 to 6 times: the order is uneven" in checks[1].text


@pytest.mark.parametrize("end", [1, 500, BLOCK // 2, BLOCK, 3 * BLOCK + 77])
def test_a_mixture_is_even_though_it_ends_within_a_block(sets, end):  # noqa: F811
    mixed = mixture(sets)
    checks = certified(mixed.joined, mixed.rows, end=end, names=mixed.names, period=BLOCK)
    assert [check.is_right for check in checks] == [True] * 5, checks


@pytest.fixture
def exported(run, tmp_path):
    """The masters of step 2 as an export has them."""
    out = tmp_path / "out"
    out.mkdir()
    weights = {f.name: f.values["master"].view(SHAPES[f.name]).bfloat16() for f in fragments(2)}
    save_file(weights, out / "model.safetensors")
    return run / "checkpoints", out, weights


def test_an_export_is_compared_with_the_masters(exported):
    folder, out, weights = exported
    check = verify.export(out, 2, torch.bfloat16, folder)
    assert (check.is_right, check.text) == (True, f"{out}: 2 weights are the fp32 masters of step 2, in bfloat16")
    assert verify.export(out, 3, torch.bfloat16, folder).text.endswith(
        "2 weights are not the masters of step 3: ['bias', 'weight']"
    )
    weights["bias"][1] += 0.01
    save_file(weights, out / "model.safetensors")
    assert verify.export(out, 2, torch.bfloat16, folder).text.endswith(
        "1 weights are not the masters of step 2: ['bias']"
    )
    save_file({"weight": weights["weight"]}, out / "model.safetensors")
    assert not verify.export(out, 2, torch.bfloat16, folder).is_right
    shutil.rmtree(folder / "step-00000002")
    check = verify.export(out, 2, torch.bfloat16, folder)
    assert (check.is_right, check.text) == (None, f"{out}: is of step 2, whose checkpoint is no longer kept")


def test_no_memory_is_asked_for_by_the_word_of_a_forged_manifest(exported):
    folder, out, _ = exported
    path = folder_of(folder.parent, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    shard, numel = next(iter(manifest["tensors"]["shards"])), 1 << 40
    size = manifest["tensors"]["shards"][shard]["begin"] + 12 * numel
    resealed(path, forge("tensors", "parameters", [["weight", numel, ["master", "exp_avg", "exp_avg_sq"]]]))
    resealed(path, forge("tensors", "shards", shard, "runs", [[0, 0, numel]]))
    resealed(path, forge("files", shard, {"bytes": size, "blocks": ["0"] * -(-size // (1 << 20))}))
    check = verify.export(out, 2, torch.bfloat16, folder)
    assert not check.is_right
    assert check.text.endswith(f"{size} were written")
