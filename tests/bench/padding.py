"""Count what length buckets save: padding of micro-batches, and how long ranks wait for the slowest.

    .venv/bin/python tests/bench/padding.py

Nothing is timed: three epochs of 10,007 clips of 15 to 40 frames, every micro-batch padded to its longest clip, four ranks.
"""

from __future__ import annotations

import numpy as np

from t2v_ds.data.order import Order

CLIPS, RANKS = 10_007, 4


def main() -> None:
    """Print the table."""
    random = np.random.default_rng(0)
    kinds = {"uniform": random.integers(15, 41, CLIPS), "mostly short": np.clip(14 + random.geometric(0.09, CLIPS), 15, 40)}
    print("| lengths | batch, micro-batch | steps in a bucket | padding, % | slowest of 4 ranks / mean |")
    print("|---|---|---:|---:|---:|")
    for kind, lengths in kinds.items():
        for batch, micro in ((8, 2), (64, 8), (256, 16)):
            for buckets in (0, 4, 16, 64):
                steps = 3 * CLIPS // batch
                _, numbers = Order(CLIPS, 1, buckets=buckets, lengths=lengths, batch=batch).places(range(batch * steps))
                clips = lengths[numbers].reshape(-1, micro)
                padded = clips.max(axis=1) * micro
                cost = padded.reshape(steps, RANKS, -1).sum(axis=2)
                print(
                    f"| {kind} | {batch}, {micro} | {buckets or 'off'} | {100 * (1 - clips.sum() / padded.sum()):.1f} | "
                    f"{cost.max(axis=1).sum() / cost.mean(axis=1).sum():.2f} |"
                )


if __name__ == "__main__":
    main()
