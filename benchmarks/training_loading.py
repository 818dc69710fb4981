"""Memory of a training worker that loads its rows, for training sets of 1,024 to 65,536 rows of 8,192 tokens.

    python benchmarks/training_loading.py [--rows 1024 4096 16384 65536] [--tokens 8192]

Three processes for each size: one writes the node's file of rows and opens it, one opens the file that is there, as the
other workers of a node do, and one does the same for rows packed to 16,384 tokens. `Opening` includes the order of an
epoch and a first batch of 8 rows, collated. Memory is what the process itself holds (anonymous pages, at their peak for
the writer), minus what it held after its imports; pages of the file belong to the node's page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS_PER_SHARD = 512


def write_set(folder: Path, num_rows: int, num_tokens: int) -> None:
    """Write a training set of random ids, of which the last 512 of each row are trained."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from aft_ray.records import TRAIN, TRAINING_SET

    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(num_rows // ROWS_PER_SHARD):
        ids = draw.integers(0, 128_000, (ROWS_PER_SHARD, num_tokens), dtype=np.int32)
        labels = ids.copy()
        labels[:, :-512] = -100
        columns = {
            "example_id": [f"p-{number}-{place}" for place in range(ROWS_PER_SHARD)],
            "prompt_id": ["p"] * ROWS_PER_SHARD,
            "variant": ["aft"] * ROWS_PER_SHARD,
            "split": [TRAIN] * ROWS_PER_SHARD,
            "input_ids": list(ids),
            "labels": list(labels),
            "num_tokens": [num_tokens] * ROWS_PER_SHARD,
        }
        empty = pa.nulls(ROWS_PER_SHARD, pa.string())
        arrays = [pa.array(columns[f.name], f.type) if f.name in columns else empty for f in TRAINING_SET]
        pq.write_table(pa.Table.from_arrays(arrays, schema=TRAINING_SET), folder / f"shard-{number:05d}.parquet")


def held() -> int:
    """Return the bytes of memory that this process alone holds."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("Anonymous")).split()[1])


def load(folder: Path, pack_length: int | None) -> dict[str, float]:
    """Load the rows as a worker does; return the seconds it took and the MiB that the process then holds."""
    import datasets  # noqa: F401  # the memory of the libraries does not count
    import pyarrow.dataset  # noqa: F401
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from aft_ray.storage import Folder
    from aft_ray.training.examples import batch_order
    from aft_ray.training.rows import lengths_in, rows_on_this_node

    before, peak, is_over = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.05):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    rows = rows_on_this_node(Folder.at(folder), {"benchmark": str(folder)}, "aft", pack_length)
    order = batch_order(lengths_in(rows).tolist(), 8, 1, 0)
    batch = [{name: rows[place][name] for name in ("input_ids", "labels")} for place in order[:8]]
    DataCollatorForLanguageModeling(pad_token_id=0)(batch)
    seconds = time.monotonic() - started
    is_over.set()
    watcher.join()
    return {"seconds": seconds, "peak": (max(peak, held()) - before) / 2**20, "holds": (held() - before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(Path(arguments.load[0]), json.loads(arguments.load[1]))))
        return
    print(f"rows of {arguments.tokens} tokens; MiB that the process holds, seconds")
    print(f"{'rows':>6} | {'writes and opens':>21} | {'opens':>14} | {'packs and opens':>21} | {'opens packed':>14}")
    for num_rows in arguments.rows:
        cells = []
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "training_set"
            write_set(folder, num_rows, arguments.tokens)
            for pack_length in (None, 2 * arguments.tokens):
                for is_first in (True, False):
                    command = [sys.executable, __file__, "--load", str(folder), json.dumps(pack_length)]
                    environment = {**os.environ, "AFT_RAY_CACHE": place}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    found = json.loads(done.stdout)
                    held_most = f"peak {found['peak']:5.0f}, " if is_first else ""
                    cells.append(f"{held_most}{found['holds']:4.0f}, {found['seconds']:5.1f} s")
                for file in (Path(place) / "rows").glob("*"):
                    file.unlink()
        print(f"{num_rows:>6} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
