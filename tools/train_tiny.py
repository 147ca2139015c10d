"""Train checkpoints/tiny from a seed: corpus, SentencePiece model, weights, and the metrics beside them.

    python tools/train_tiny.py                 # about an hour on one core; an interrupted run resumes
    python tools/train_tiny.py --measure       # measure the existing checkpoint

The state of an unfinished run is saved to build/tiny every two minutes.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.package import ROOT
from tools.tiny.measure import measure, summary
from tools.tiny.train import WINDOW, train_checkpoint, write_metrics


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "checkpoints" / "tiny", help="folder of the checkpoint")
    add("--work", type=Path, default=ROOT / "build" / "tiny", help="folder for the state of an unfinished run")
    add("--seed", type=int, default=1, help="seed of corpus, weights and measurements (default: 1)")
    add("--steps", type=int, default=4600, help="training steps (default: 4600)")
    add("--rows", type=int, default=16, help=f"windows of {WINDOW} tokens per step (default: 16)")
    add("--rate", type=float, default=4e-3, help="peak learning rate (default: 0.004)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--measure", action="store_true", help="do not train: measure the checkpoint in --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.measure:
        run = {name: getattr(options, name) for name in ("seed", "steps", "rows", "rate")}
        train_checkpoint(options.out, options.work, **run)
    metrics = measure(options.out, options.seed)
    write_metrics(metrics, options.out)
    print(summary(metrics))


if __name__ == "__main__":
    main()
