"""The benchmarks: both sides compute the same, each with its own cache, and a failing case leaves a row and a file."""

import json

import pytest
import torch

from benchmarks import gpu, gpu_cases, plot
from benchmarks.allocations import largest_allocation
from benchmarks.counts import DeviceWork
from benchmarks.gpu_bench import work_per_token
from benchmarks.models import (
    Context,
    Decoding,
    Shape,
    SidesDiffer,
    check_equal,
    generate,
    llama_config,
    new_cache,
    new_tokens,
    our_model,
    shallow_twins,
    sharing_weights,
    twins,
)
from benchmarks.one_layer import OneLayer
from benchmarks.report import Report, row_of
from benchmarks.timing import Timing

from support.benchmarks import TRIAL, run_gpu_benchmark
from support.golden import cache_of
from support.versions import needs_dynamo


SHAPE = Shape(hidden=256, layers=4, heads=2, intermediate=352, vocab=512, window=64)
KINDS = ("library", "growing", "static")
FLOORS = (1e9, 1e9)
SIDES_OF = {  # of rows that do not compare ours with Llama
    "read": {"ours", "plain"},
    "step_kernels": {"ours", "llama", "ours_library", "llama_growing"},
    "compiled_llama": {"llama"},
    **dict.fromkeys(("generate_kernels", "generate_plain", "compiled"), {"ours"}),
}


@pytest.fixture(scope="module")
def pair() -> dict[str, torch.nn.Module]:
    return dict(zip(("ours", "llama"), twins(SHAPE, torch.float32), strict=True))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """One thread, as in TRIAL; the other options of a process (log level, compiler cache) are not for these tests'."""
    monkeypatch.setattr(gpu, "start", lambda arguments: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(tmp_path) -> gpu.Bench:
    arguments = gpu.parse([*TRIAL, "--out", str(tmp_path / "gpu.json")])
    return gpu.Bench("tiny", "cpu", Report("gpu", arguments), FLOORS, gpu_cases.Clock(minutes=1.0))


def rows_in_file(bench: gpu.Bench) -> list[dict]:
    return json.loads(bench.report.path.read_text(encoding="utf-8"))["rows"]


@needs_dynamo  # its compiled case
def test_the_gpu_benchmark_measures_every_kind_of_case_on_a_cpu(tmp_path):
    """A trial run has all rows and none has failed; its plot can be drawn, also beside a row that has."""
    rows = run_gpu_benchmark(tmp_path)
    cases = [case for case in gpu_cases.trial() if not gpu_cases.missing(case)]
    assert [row["case"] for row in rows] == [f"tiny/{case}" for case in cases]
    assert not [row for row in rows if row["verdict"] == "FAILED"]
    for row in rows[1:]:
        expected = SIDES_OF.get(row["kind"], {"ours", "llama"})
        if row["context"] > 256 and row["kind"] in ("eager", "step_kernels", "compiled"):
            expected = expected | {"plain_rotary"}
        assert row["ms"].keys() == expected and row["floor_ms"] > 0, row["case"]
    limits = {row["case"].removeprefix("tiny/"): row.get("limits") for row in rows}
    assert limits["read/b1/4k+64"]["ours / plain"]["at_most"] is None
    assert limits["read/b1/16k"]["ours / plain"].keys() == {"value", "at_most", "verdict"}
    assert limits["step_kernels/b1/16k"].keys() == {"device, ours / plain_rotary"} and not limits["step_kernels/b1/1k"]
    assert limits["prefill/b1/16k"]["largest tensor / token"] == {"value": 176, "at_most": 511, "verdict": "ok"}
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert list(result.get("skipped", {})) == [f"tiny/{case}" for case in gpu_cases.trial() if case not in cases]
    failed = {"case": "tiny/eager/b1/4k", "kind": "eager", "model": "tiny", "batch": 1, "verdict": "FAILED"}
    plot.plot_gpu({**result, "rows": [*rows, failed]}, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_each_kind_of_case_has_its_method_and_each_case_runs_once():
    for shape in gpu_cases.SHAPES:
        cases = [case for _, cases in gpu_cases.plan([shape], quick=False) for case in cases]
        assert cases and all(hasattr(gpu.Bench, case.kind) for case in cases)
        assert len(set(cases)) == len(cases)
    kinds = {case.kind for case in gpu_cases.MAIN + gpu_cases.REST}
    assert {case.kind for case in gpu_cases.trial()} == kinds - {"compiled_llama"}  # see trial


def test_the_second_model_precedes_the_last_cases_of_the_first():
    names = [name for name, _ in gpu_cases.plan(gpu_cases.DEFAULT_SHAPES, quick=False)]
    assert names == ["20b", "7b", "overhead", "20b"]
    assert gpu_cases.REST[-1].kind == "four_bit"


@torch.no_grad()
def test_one_layer_is_compared_with_the_definition(bench, monkeypatch):
    """A missing correction is noticed."""
    layer = OneLayer(bench.models["ours"], 1024)
    assert 0 < layer.check("read") < 0.02
    monkeypatch.setattr(layer, "ours", layer.plain)
    with pytest.raises(SidesDiffer, match="^read: "):
        layer.check("read")


@torch.no_grad()
def test_the_largest_tensor_of_a_call_is_found():
    """As the scores, (H, L, L), or all logits; a view of what exists, such as an expanded row of a weight, is none."""
    model, length = our_model(SHAPE, torch.float32), 600
    ids, largest = new_tokens(model, 1, length), length * SHAPE.intermediate
    assert largest_allocation(lambda: model(ids, logits_to_keep=1)) == largest
    assert largest_allocation(lambda: model(ids)) == length * SHAPE.vocab
    model.set_attn_implementation("eager")
    assert largest_allocation(lambda: model(ids, logits_to_keep=1)) == SHAPE.heads * length**2
    assert largest_allocation(lambda: model.lm_head.weight.t()[:1].expand(10**6, -1)) == 0


def test_the_work_of_a_token_is_what_more_tokens_add():
    """The prompt's kernel took 5 ms longer in the longer call, which is no token's."""
    shorter = DeviceWork(104.0, 12, [("prompt", 10, 100.0), ("step", 2, 4.0)])
    longer = DeviceWork(125.0, 20, [("prompt", 10, 105.0), ("step", 10, 20.0)])
    assert work_per_token(shorter, longer, 4) == DeviceWork(4.0, 2, [("step", 2, 4.0)])


def test_a_number_beyond_its_limit_makes_a_row_miss():
    timing = Timing({"ours": 1.0, "llama": 2.0}, {"llama": 2.0}, {"llama": (1.9, 2.1)}, rounds=3)
    for value, verdict in ((1.2, "ok"), (1.4, "MISSED")):
        row, text = row_of("case", timing, "llama", at_least=1.5, limits={"a": (value, 1.3), "b": (9.0, None)})
        assert row["verdict"] == row["limits"]["a"]["verdict"] == verdict
        assert f"a {value} <= 1.3 {verdict}" in text and row["limits"]["b"] == {"value": 9.0, "at_most": None}


def test_a_failing_case_is_a_row_in_the_file_and_the_next_one_runs(bench):
    """On a rented GPU the run ended at its third case, for sides that differed, and left no file."""
    weight = bench.models["llama"].lm_head.weight
    bench.models["llama"].lm_head.weight = torch.nn.Parameter(-weight)
    cases = [gpu_cases.Case(kind, 1, 1) for kind in ("equality", "eager", "prefill", "captured")]
    for number, case in enumerate(cases, start=1):
        bench.run(case)
        assert len(rows_in_file(bench)) == number
    *failed, captured = rows_in_file(bench)
    assert [row["verdict"] for row in failed] == ["FAILED"] * 3
    assert all(row["error"].startswith("SidesDiffer: tiny/") and "ms" not in row for row in failed)
    assert captured["verdict"] is None and captured["ms"].keys() == {"ours", "llama"}  # each is compared with itself


def test_any_error_is_a_row_and_not_the_end(bench):
    bench.models["llama"].lm_head = torch.nn.Linear(1, 1)
    bench.run(gpu_cases.Case("prefill", 1, 1))
    (row,) = rows_in_file(bench)
    assert row["verdict"] == "FAILED" and row["error"].startswith("RuntimeError: ") and row["context"] == 64


def test_a_failed_case_shows_in_the_exit_code(tmp_path, monkeypatch):
    def fail(self, case: gpu_cases.Case, length: int) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(gpu.Bench, "prefill", fail)
    words = ["--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path / "gpu.json"), "--only"]
    assert gpu.main([*words, "prefill/b1/1k"]) == 1
    assert gpu.main([*words, "equality"]) == 0


def test_cases_beyond_the_time_are_skipped_and_listed(tmp_path):
    file = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--shapes", "tiny", "--quick", "--minutes", "0", "--out", str(file)]
    assert gpu.main(words) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert not result["rows"] and len(result["skipped"]) == len(gpu_cases.trial())


# Equality


@torch.no_grad()
def test_float32_copies_of_the_first_layers_show_what_bfloat16_hides():
    """A wrong base of the rotary embedding: within the rounding errors of deep bfloat16 models, but not of float32."""
    shape = SHAPE._replace(layers=12)
    ours, llama = twins(shape, torch.bfloat16)
    config = llama_config(shape)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 9000.0}
    wrong = sharing_weights(ours, type(llama), config)
    ids = new_tokens(ours, 1, shape.window)
    assert check_equal(*(model(ids).logits for model in shallow_twins(ours, llama)), "right") < 1e-5
    check_equal(ours(ids).logits, wrong(ids).logits, "hidden", shape.layers)
    with pytest.raises(SidesDiffer, match="shown: the two sides differ by"):
        check_equal(*(model(ids).logits for model in shallow_twins(ours, wrong)), "shown")


def test_float32_copies_share_what_the_models_share():
    """Otherwise two copies of the 20B's head and embedding would not fit beside the models."""
    first, second = shallow_twins(*twins(SHAPE, torch.bfloat16))
    assert len(first.model.layers) == 2 and first.dtype == torch.float32
    for name, parameter in first.named_parameters():
        assert parameter.data_ptr() == second.get_parameter(name).data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("layers", [2, 24])
def test_the_bound_in_half_precision_follows_the_depth(layers):
    """Rounding errors of the same operations in another order stay within half of it; unrelated logits do not."""
    ours, llama = twins(SHAPE._replace(layers=layers), torch.bfloat16)
    first, second = (model(new_tokens(ours, 2, 32)).logits for model in (ours, llama))
    bound = 4 * torch.finfo(torch.bfloat16).eps * layers**0.5
    assert 0 < check_equal(first, second, "rounding", layers) < bound / 2
    with pytest.raises(SidesDiffer):
        check_equal(first, second.roll(1, 1), "other tokens", layers)
    with pytest.raises(SidesDiffer):
        check_equal(first * float("nan"), second, "NaN", layers)


# Contexts


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "llama"])
def test_the_default_cache_is_the_one_that_generate_makes(pair, name):
    model = pair[name]
    made = model.generate(new_tokens(model, 1, 4), max_new_tokens=2, return_dict_in_generate=True)
    assert type(new_cache(model, "default", 8)) is type(cache_of(made))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "llama"])
def test_a_context_starts_with_the_same_content_every_time(pair, name):
    """Whatever the kind of cache, after a reset, and after the cache was dropped for another side."""
    expected = Decoding(pair[name], Context(pair[name], 2, 64)).first_step()
    for kind in KINDS:
        side = Decoding(pair[name], Context(pair[name], 2, 64, kind))
        for _ in range(2):
            torch.testing.assert_close(side.first_step(), expected)
            side.sample(16)
        side.context.drop()
        side.sample(3)  # and the first step, which is not timed
        assert side.context.position == 64 - side.context.room + 4
        torch.testing.assert_close(side.first_step(), expected)


@torch.no_grad()
def test_a_side_is_timed_while_no_other_holds_a_cache(bench):
    """Two caches of 16k tokens, 20 GB each, do not fit beside the 20B into 80 GB."""
    sides = bench.decodings(gpu_cases.Case("eager", 1, 1), 64, {name: (name, "default") for name in ("ours", "llama")})
    assert all(side.context.cache is None for side in sides.values())
    for name in ("ours", "llama", "ours"):
        bench.alone(sides, name, sides[name].step)
        assert [key for key, side in sides.items() if side.context.cache is not None] == [name]


@torch.no_grad()
def test_a_timed_step_does_not_grow_the_buffers(pair):
    """A growing cache copies the prompt at the first step, which `sample` runs before it starts the clock."""
    side = Decoding(pair["ours"], Context(pair["ours"], 1, 64))
    side.sample(1)
    layer = side.context.cache.layers[0]
    address = layer.buffers[0].data_ptr()
    side.sample(15)
    assert layer.buffers[0].data_ptr() == address and layer.buffers[0].shape[2] == 64


def test_generate_gives_as_many_tokens_as_are_asked_for():
    """Also where a token is the end of the text, which would end the timed work early."""
    model = our_model(SHAPE, torch.float32)
    ids = new_tokens(model, 2, 5)
    model.generation_config.eos_token_id = list(range(SHAPE.vocab))
    assert generate(model, ids, 7).shape == (2, 7)
