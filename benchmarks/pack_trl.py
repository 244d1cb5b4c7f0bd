"""One measurement of TRL's `pack_dataset`, run by `pack.py` in a Python that has TRL; prints one line of JSON.

python benchmarks/pack_trl.py LENGTHS.npy SEQ_LEN STRATEGY BATCH_SIZE
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars
from memory import begin_peak, peak_mib
from trl import pack_dataset


def main(path: str, seq_len: int, strategy: str, batch_size: int) -> None:
    disable_progress_bars()
    lengths = np.load(path)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = pa.LargeListArray.from_arrays(offsets, np.zeros(int(offsets[-1]), dtype=np.int32))
    dataset = Dataset(pa.table({"input_ids": tokens}))
    before, began = begin_peak(), time.process_time()
    map_kwargs = {"batch_size": batch_size or len(lengths), "keep_in_memory": True}
    packed = pack_dataset(dataset, seq_len, strategy, map_kwargs)
    result = {
        "cpu_seconds": time.process_time() - began,
        "rows": len(packed),
        "tokens": int(sum(len(chunk.flatten()) for chunk in packed.data["input_ids"].chunks)),
        "extra_mib": peak_mib() - before,
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "datasets", "pyarrow", "numpy")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
