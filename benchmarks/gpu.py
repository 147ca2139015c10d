"""Full-size InternLM on one GPU: decode, generate and prefill of ours and transformers' Llama, against the floors.

Random bfloat16 weights are created on the device; ours and Llama share them, so that the 20B with 16k tokens of keys
and values fits into 80 GB. Needs only torch and transformers, no checkpoint and no network.

    python benchmarks/gpu.py                                     # 20B, 7B, the rest of 20B, as --minutes allows
    python benchmarks/gpu.py --shapes 20b --quick                # the heart of the table
    python benchmarks/gpu.py --shapes 20b --only compiled        # a subset
    python benchmarks/gpu.py --device cpu --shapes tiny --quick  # the same code on a CPU, to try it out

Cases run in order of importance. One that fails becomes a row with its error, and the next one runs; those that would
exceed --minutes are skipped and listed. The file is written after every case. Which cases there are: gpu_cases.py.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_cases import DEFAULT_SHAPES, SHAPES, Clock, plan
from benchmarks.report import QUICK_RESULTS, Report, parser, start, wanted
from benchmarks.timing import copy_bandwidth, matrix_rate


def measure_floors(report: Report, device: str) -> tuple[float, float]:
    """Copy bandwidth in bytes/s and bfloat16 matrix rate in FLOP/s, at sizes that exceed every cache."""
    on_gpu = device.startswith("cuda")
    bandwidth = copy_bandwidth(device, megabytes=2048 if on_gpu else 64)
    rate = matrix_rate(torch.bfloat16, device, size=8192 if on_gpu else 512)
    report.note(copy_gb_per_s=bandwidth / 1e9, matrix_tflops=rate / 1e12)
    print(f"floors: copy {bandwidth / 1e9:.0f} GB/s, bfloat16 matrix product {rate / 1e12:.3g} TFLOP/s")
    return bandwidth, rate


def run_cases(arguments: argparse.Namespace, report: Report, clock: Clock) -> None:
    floors, bench = measure_floors(report, arguments.device), None
    for name, cases in plan(arguments.shapes, arguments.quick):
        chosen = [case for case in cases if wanted(f"{name}/{case}", arguments)]
        if not chosen:
            continue
        if bench is None or bench.name != name:
            if bench is not None:  # before the next models need the memory
                bench.models.clear()
                bench.free()
            bench = Bench(name, arguments.device, report, floors, clock)
        for case in chosen:
            reason = bench.reason_to_skip(case)
            if reason:
                print(f"{name}/{case}: skipped, {reason}", flush=True)
                report.content.setdefault("skipped", {})[f"{name}/{case}"] = reason
            else:
                bench.run(case)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda", help='torch device (default "cuda")')
    made.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES, help="which models")
    made.add_argument("--minutes", type=float, default=8.0, help="start no case that would end after this")
    return made.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a case failed."""
    arguments = parse(words)
    clock = Clock(arguments.minutes)
    start(arguments)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu: skipped, torch sees no CUDA device (--device cpu --shapes tiny runs the same code on a CPU)")
        return 0
    report = Report("gpu", arguments, arguments.device)
    if not arguments.out and not arguments.device.startswith("cuda"):
        report.path = QUICK_RESULTS / "gpu.json"  # not a GPU's result, whatever the shapes
    elif not arguments.out and not report.quick:
        gpu = report.content["environment"]["gpu"].lower().replace(" ", "-")
        report.path = report.path.with_name(f"gpu-{gpu}.json")
    run_cases(arguments, report, clock)
    report.finish(remark=f"; {clock.passed():.0f} s")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
