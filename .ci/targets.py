"""Assert what the quickstart promises: held-out accuracy and F1, the score before training, and the time it took."""

import json
import sys
from pathlib import Path

run_dir, seconds = Path(sys.argv[1]), int(sys.argv[2])
lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
measured = [line for line in lines if "validation_accuracy" in line]
before, after = measured[0], measured[-1]
for name, line in (("before", before), ("after", after)):
    print(f"{name} (step {line['step']}): accuracy {line['validation_accuracy']:.4f}, F1 {line['validation_f1']:.4f}")
print(f"quickstart, after installation: {seconds} s")
assert before["step"] == 0, "nothing was measured before training"
assert before["validation_accuracy"] < 0.9, "the untrained model must not know the answers"
assert after["validation_accuracy"] >= 0.98, after
assert after["validation_f1"] >= 0.93, after
assert seconds <= 180, f"{seconds} s; the promise is 180"
