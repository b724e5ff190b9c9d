"""The benchmark suite: what it says of figures, and that it says it of every provider, measured or not."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import architectures, limits, memory, plot, providers, report, results, run
from benchmarks.cases.accelerate import of_torchvision, zoo
from benchmarks.cases.conv2d import GROUPS, MEMORY_GOAL_MB
from benchmarks.cases.model import gan, inference
from benchmarks.goals import Goal, judge
from benchmarks.results import Row
from benchmarks.subject import Work, load, training
from benchmarks.timing import Effort, take_turns
from cvfast import _library, _peak
from cvfast.cli import app
from cvfast.testing import SPECS
from cvfast.testing.attention import case as attention_case
from cvfast.testing.attention import mask
from cvfast.testing.recurrent import cell_case, layer_case

EFFORT = Effort(0, 2, 2)
CASE = GROUPS["small"][0]


def row(case: str, provider: str, min_ms: float | None, group: str = "g", **more) -> Row:
    return Row("conv2d", group, case, "forward", 1, provider, min_ms=min_ms, **more)


ROWS = [
    row("a", "cvfast contiguous", 2.0, relative_error=1e-6, peak_share=0.9),
    row("a", "cvfast channels_last", 1.0, relative_error=2e-6, peak_share=1.8),
    row("a", "torch contiguous", 8.0),
    row("a", "torch channels_last", 4.0),
    row("a", "MNN", 1.5),
    row("a", "ncnn", None, note="not installed: pip install cvfast[peers]"),
    row("b", "cvfast contiguous", 3.0, relative_error=1e-7, peak_share=0.5),
    row("b", "torch contiguous", 3.0),
    row("b", "MNN", None, note="failed: broken"),
]


def bench(*arguments: str):
    """Runs python -m benchmarks.run in this process."""
    command = typer.Typer()
    command.command()(run.main)
    return CliRunner().invoke(command, arguments)


def work(direction: str = "forward") -> Work:
    return load("conv2d").work(CASE, direction, 1)


def test_the_best_formats_are_compared():
    cases = results.by_case(ROWS)
    assert results.ratio(cases["g", "forward", "a"]) == 4.0
    assert results.ratio(cases["g", "forward", "a"], ("MNN", "ncnn")) == 1.5
    assert results.ratio(cases["g", "forward", "b"], ("MNN",)) is None


@pytest.mark.parametrize(
    ("asked", "holds", "seen"),
    [
        ({"geomean": 2.0, "each": 1.0}, True, "geomean 2 (at least 2); least 1 (at least 1)"),
        ({"geomean": 2.01}, False, "geomean 2 (at least 2.01)"),
        ({"each": 1.1}, False, "least 1 (at least 1.1)"),
        ({"peak_share": 0.5}, True, "least share of peak 0.5 (at least 0.5)"),
        ({"error": 1e-6}, False, "largest error 2e-06 (at most 1e-06)"),
        ({"geomean": 1.2, "rivals": ("MNN",)}, None, "geomean 1.5 (at least 1.2), 1 not measured"),
        ({"geomean": 1.2, "rivals": ("OpenVINO",)}, None, "geomean: not measured"),
        ({"geomean": 2.0, "direction": "training"}, None, "geomean: not measured"),
    ],
)
def test_goals_are_judged(asked, holds, seen):
    (verdict,) = judge((Goal("text", ("g",), **{"direction": "forward", **asked}),), ROWS)
    assert (verdict.holds, verdict.seen) == (holds, seen)


def test_goals_of_several_groups_are_judged_by_group_or_together():
    times = {"cvfast contiguous": 1.0, "torch contiguous": 8.0, "torch channels_last": 9.0}
    rows = [*ROWS, *(row("c", provider, time, "h") for provider, time in times.items())]
    goal = Goal("text", ("g", "h"), "forward", geomean=3.0, each=1.0)
    assert [(v.groups, v.holds) for v in judge((goal,), rows)] == [(("g",), False), (("h",), True)]
    (verdict,) = judge((replace(goal, together=True),), rows)
    assert verdict.groups == ("g", "h") and verdict.holds
    assert verdict.seen == "geomean 3.17 (at least 3); least 1 (at least 1)"


def test_a_case_near_its_limit_reaches_what_is_asked():
    goal = Goal("text", ("g",), "forward", geomean=4.0, each=2.0)
    for share, holds, seen in (
        (0.95, True, "geomean 4 (at least 4); least 2 (at least 2)"),
        (0.94, False, "geomean 2 (at least 4); least 1 (at least 2)"),
    ):
        rows = [replace(r, limit_share=share) if r.case == "b" and r.provider in results.CVFAST else r for r in ROWS]
        (verdict,) = judge((goal,), rows)
        assert (verdict.holds, verdict.seen) == (holds, seen)


def test_limits_are_of_multiply_adds_exponentials_and_weights(monkeypatch):
    monkeypatch.setattr(limits, "_exponential_cost", lambda isa: 20.0)
    monkeypatch.setattr(limits, "_read_rate", lambda isa, size: 2.0)  # GB/s

    def least(operator: str, case, training: bool = False) -> float | None:
        return limits.least_ms(SPECS[operator], case.sample(torch.float32), 10.0, training)

    seen = 2 * 3 * (50 * 51 // 2)  # pairs
    causal = attention_case("causal", (2, 3, 50, 64), 50, is_causal=True)
    assert least("attention", causal) == pytest.approx(seen * (2 * 2 * 64 + 20) / 10e6)
    assert least("attention", causal, training=True) == pytest.approx(seen * (3 * 2 * 2 * 64 + 20) / 10e6)
    many = layer_case("lstm", "many", 7, 30, 16, 32)  # T, B, I, H
    weights, units = 4 * 32 * (16 + 32), 7 * 30 * 32
    assert least("lstm", many) == pytest.approx((7 * 30 * 2 * weights + 5 * units * 20) / 10e6)
    one = layer_case("gru", "one", 7, 1, 16, 32, bidirectional=True)
    assert least("gru", one) == pytest.approx(2 * 7 * 3 * 32 * 32 * 4 / 2e6)  # reading W_hh takes longer
    assert least("gru", one, training=True) == pytest.approx(2 * 2 * 7 * 3 * 32 * 32 * 4 / 2e6)
    assert least("lstm_cell", cell_case("lstm_cell", "cell", 1, 32, 32)) == pytest.approx(2 * 4 * 32 * 32 * 4 / 2e6)
    assert least("conv2d", CASE) is None


def test_a_limit_is_longer_than_nothing_and_shorter_than_the_call():
    (measured,) = run.measure(load("lstm").work(layer_case("lstm", "case", 8, 16, 64, 64), "forward", 1), "g", EFFORT,
                              tuple(p for p in providers.PROVIDERS if p.name == "cvfast contiguous"))  # fmt: skip
    assert 0.05 < measured.limit_share < 1


@pytest.mark.parametrize("name", run.SUBJECTS)
def test_the_goals_name_groups_that_there_are(name):
    subject = load(name)
    for goal in subject.goals:
        assert set(goal.groups) <= set(subject.cases(goal.direction))


def test_rows_survive_the_csv_file(tmp_path):
    results.write(ROWS, tmp_path / "rows.csv")
    assert results.read(tmp_path / "rows.csv") == ROWS


def test_calls_take_turns_and_slow_ones_sit_out_rounds():
    order = []
    calls = {"quick": lambda: order.append("quick"), "slow": lambda: (order.append("slow"), time.sleep(0.01))}
    turns = take_turns(calls, Effort(seconds=0.05, least=3, most=12), between=lambda: 1.0)
    assert len(turns.seconds["quick"]) == len(turns.between) == 12
    assert 3 <= len(turns.seconds["slow"]) <= 5
    assert min(turns.seconds["slow"]) >= 0.01
    assert "slow" in order[2:9] and "slow" in order[-2:]  # spread over the rounds


def test_each_round_begins_with_the_call_that_ended_the_last():
    order = []
    take_turns({name: lambda name=name: order.append(name) for name in "abc"}, Effort(0, 4, 4))
    assert "".join(order) == "abc" + "abc" + "cab" + "bca" + "abc"


def test_a_mask_is_judged_by_the_samples_that_are_judged():
    subject = load("attention")
    for shape in ((3, 1, 1, 5), (3, 5, 5), (1, 3, 5, 5), (5, 5)):
        case = attention_case("masked", (3, 3, 5, 4), 5, attn_mask=mask(*shape))
        judged = subject.work(case, "forward", 1)
        whole = judged.sample.to(torch.float64).call(SPECS["attention"].reference)
        torch.testing.assert_close(judged.exact, judged.judged(whole))


def test_a_call_of_20_ms_is_timed_20_times():
    assert Effort().repeats(0.02) == 20


@pytest.mark.parametrize("provider", providers.PROVIDERS, ids=lambda p: p.name)
def test_every_provider_measures_the_case_or_says_why_not(provider):
    (measured,) = run.measure(work(), "small", EFFORT, (provider,))
    if measured.min_ms is None:
        assert measured.note == providers.NOT_INSTALLED or provider.name == "torch.compile"
        return
    assert measured.repeats == 2 and measured.min_ms <= measured.median_ms
    assert measured.relative_error < 1e-4
    assert measured.peak_share > 0
    assert not measured.note


@pytest.mark.parametrize("direction", run.DIRECTIONS)
@pytest.mark.parametrize(
    ("name", "case"),
    [("lstm", layer_case("lstm", "small", 3, 2, 4, 5)), ("lstm_cell", cell_case("lstm_cell", "small", 2, 4, 5))],
    ids=["lstm", "lstm_cell"],
)
def test_operators_of_several_results_are_judged_by_the_first(name, case, direction):
    eager = tuple(provider for provider in providers.PROVIDERS if provider.name.endswith(" contiguous"))
    for measured in run.measure(load(name).work(case, direction, 1), "small", EFFORT, eager):
        assert measured.min_ms > 0 and measured.relative_error < 1e-5, measured


def test_a_missing_engine_is_reported_not_dropped(monkeypatch):
    monkeypatch.setattr(providers.Mnn, "module", "there_is_no_such_engine")
    (measured,) = run.measure(work(), "small", EFFORT, (providers.Mnn(),))
    assert measured.note == "not installed: pip install cvfast[peers]" and measured.min_ms is None
    assert report.notes([measured]) == ["MNN, forward: not installed: pip install cvfast[peers] (1 case(s))"]


class Wrong(providers.Eager):
    """Says what it is told to, whatever the case."""

    def __init__(self, name: str, output) -> None:
        super().__init__("torch", "contiguous")
        self.name, self.output = name, output

    def prepare(self, work):
        return replace(super().prepare(work), output=self.output)


def test_a_wrong_result_gets_no_time():
    (measured,) = run.measure(work(), "small", EFFORT, (Wrong("MNN", lambda: torch.zeros(1, 16, 8, 8)),))
    assert measured.min_ms is None and measured.note == "wrong result: relative error 1.0e+00"


def test_a_result_of_another_shape_gets_no_time():
    (measured,) = run.measure(work(), "small", EFFORT, (Wrong("MNN", lambda: torch.zeros(2, 0)),))
    assert measured.min_ms is None and measured.note == "wrong result: shape [2, 0], expected [1, 16, 8, 8]"


def test_an_engine_that_fails_is_reported():
    def fail():
        raise OverflowError("no room")

    (measured,) = run.measure(work(), "small", EFFORT, (Wrong("OpenVINO", fail),))
    assert measured.min_ms is None and measured.note == "failed: OverflowError: no room"


class Inaccurate(providers.Eager):
    """cvfast with an error of one in a thousand."""

    def prepare(self, work):
        prepared = super().prepare(work)
        return replace(prepared, output=lambda: prepared.output() * 1.001)


def test_inaccurate_cvfast_fails_the_run_after_the_figures_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(run.results, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "PROVIDERS", (Inaccurate("cvfast", "contiguous"),))
    with pytest.raises(typer.Exit) as stop:
        run.main(["conv2d"], group=["small"], direction=["forward"], threads="1", repeats=2)
    assert stop.value.exit_code == 1
    notes = [measured.note for measured in results.read(tmp_path / "conv2d.csv")]
    assert len(notes) == len(GROUPS["small"])
    assert notes[0].startswith("less accurate than torch: cvfast contiguous on 1x16x8x8")


def test_only_torch_and_cvfast_train():
    competitors = tuple(p for p in providers.PROVIDERS if p.name != "torch.compile")
    rows = run.measure(work("training"), "small", EFFORT, competitors)
    assert {r.provider for r in rows if r.min_ms is not None} == {*results.CVFAST, *results.TORCH}
    assert {r.note for r in rows if r.min_ms is None} == {"inference only"}


def test_training_forms_all_gradients():
    sample = work().sample
    grads = training(torch.nn.functional.conv2d, sample)()
    assert [g.shape for g in grads] == [t.shape for t in sample.tensors()]


def test_the_command_prints_tables_and_keeps_the_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    before = torch.get_num_threads()
    options = ["--group", "small", "--repeats", "1", "--threads", "1,2", "--direction", "forward"]
    names = [word for name in (*results.CVFAST, *results.TORCH) for word in ("--provider", name)]
    result = bench("conv2d", *options, *names)
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    for text in ("torch/cvfast", "geometric mean", "goals", "threads: times faster"):
        assert text in result.output
    for file, threads in (("conv2d.csv", 1), ("conv2d-2-threads.csv", 2)):
        rows = results.read(tmp_path / file)
        assert {r.threads for r in rows} == {threads} and len(rows) == 4 * len(GROUPS["small"])


def test_unknown_names_are_told():
    for arguments in (["conv9d"], ["--group", "huge"], ["--provider", "abacus"], ["--threads", "0"]):
        result = bench(*arguments)
        assert result.exit_code == 2 and arguments[-1] in result.output


def test_the_picture_is_drawn(tmp_path):
    assert plot.group_ratios(ROWS, "forward")["torch"] == {"g": pytest.approx(2.0)}
    plot.draw(ROWS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_peaks_fit_together():
    """Twice as many float32 as float64 in a vector; no product that anybody computes is faster than the peak."""
    best = _peak.isas()[-1]
    single, double = (max(_peak.burst(best, float64) for _ in range(100)) for float64 in (False, True))
    assert 1.5 < single / double < 2.5
    a = torch.randn(512, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = min(take_turns({"product": lambda: a @ a}, Effort(0, 10, 10)).seconds["product"])
    torch.set_num_threads(threads)
    assert 2 * 512**3 / seconds / 1e9 < 1.1 * single
    with pytest.raises(ValueError, match="'sse9'"):
        _library.C.multiply_adds("sse9", False, 1)


def test_peak_is_measured_outside_of_a_clone_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "--peak"])
    assert result.exit_code == 0, result.output
    for isa in _peak.isas():
        assert isa in result.output
    assert "GFLOP/s" in result.output and "GB/s" in result.output


@pytest.mark.skipif(not memory.STATM.exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_shapes():
    """1000 different shapes, forward and backward, in a process of their own."""
    assert memory.growth_mb("cvfast", 1000) <= MEMORY_GOAL_MB
    assert memory.growth_mb("torch", 200) > MEMORY_GOAL_MB  # which keeps kernels: growth is seen


SMALL_MODEL = inference("dcgan_generator", 2, 8, latent=8, width=4, image_size=8)
SMALL_STEP = gan(4, 8, width=4)


@pytest.mark.parametrize("provider", providers.PROVIDERS, ids=lambda p: p.name)
def test_every_provider_measures_a_model_or_says_why_not(provider):
    (measured,) = run.measure(load("model").work(SMALL_MODEL, "forward", 1), "g", EFFORT, (provider,))
    if measured.min_ms is None:
        assert measured.note == providers.NOT_INSTALLED or provider.name == "torch.compile"
        return
    assert measured.relative_error < 1e-4 and measured.gflops > 0 and not measured.note


@pytest.mark.parametrize("name", ["cnn", "show_attend_tell"])  # one input and output, and two of each
def test_accelerated_models_compete_with_torch_alone(name):
    subject = replace(load("accelerate"), groups={"zoo": [zoo(name)]})
    rows = run.measure_subject(
        subject, ["zoo"], ["forward", "training"], 1, EFFORT, providers.PROVIDERS, "cpu", Console()
    )
    assert [r.provider for r in rows] == [*results.CVFAST, *results.TORCH]
    assert all(r.min_ms > 0 and r.relative_error < 1e-5 and not r.note for r in rows)


@pytest.mark.skipif(not architectures.INSTALLED, reason="needs torchvision")
def test_torchvisions_architectures_are_named_and_made():
    assert len(set(architectures.names())) == len(architectures.names()) >= 60
    work = load("accelerate").work(of_torchvision("squeezenet1_1"), "forward", 1)
    assert 0.01 < work.exact.std() < 100


def test_a_training_step_is_measured_and_judged_by_its_gradients():
    competitors = tuple(p for p in providers.PROVIDERS if p.name in results.CVFAST + results.TORCH)
    work = load("model").work(SMALL_STEP, "training", 1)
    rows = run.measure(work, "g", EFFORT, competitors)
    assert all(r.min_ms > 0 and r.relative_error < 1e-5 for r in rows)
    assert len(work.exact) == sum(p.numel() for p in work.network.parameters())
    (compiled,) = run.measure(work, "g", EFFORT, (providers.Compiled(),))
    assert compiled.note == "inference only, of whole models"


def test_a_training_step_changes_every_part():
    work = load("model").work(SMALL_STEP, "training", 1)
    before = [p.clone() for p in work.model.parameters()]
    step, _ = work.calls("torch", "contiguous")
    model = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.ModuleDict))
    step()
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_torch_gets_its_own_layers():
    work = load("model").work(SMALL_MODEL, "forward", 1)
    assert {type(m) for m in work.model.modules() if "Conv" in type(m).__name__} == {torch.nn.ConvTranspose2d}
    assert work.network.state_dict().keys() == work.model.state_dict().keys()


def test_a_goal_stays_open_where_a_rival_did_not_compete():
    goal = Goal("text", ("g",), "forward", ("MNN", "OpenVINO"), each=1.0)
    (verdict,) = judge((goal,), ROWS[:5])
    assert verdict.holds is None and verdict.seen.endswith("OpenVINO did not compete")


def test_errors_of_a_rival_are_compared():
    rows = [row("a", "cvfast contiguous", 1.0, relative_error=2e-6), row("a", "MNN", 2.0, relative_error=1e-6)]
    (verdict,) = judge((Goal("text", ("g",), "forward", ("MNN",), less_error_than="MNN"),), rows)
    assert verdict.holds is False and verdict.seen == "error over MNN's 2 (at most 1)"


def test_a_run_of_some_cases_keeps_the_figures_of_the_others(tmp_path):
    results.write(ROWS, tmp_path / "figures.csv")
    again = replace(ROWS[0], min_ms=9.0)
    results.update([again], tmp_path / "figures.csv")
    assert results.read(tmp_path / "figures.csv") == [*(r for r in ROWS if r.case == "b"), again]


def test_the_command_measures_models(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    names = [word for name in (*results.CVFAST, *results.TORCH) for word in ("--provider", name)]
    result = bench("model", "--quick", "--group", "cnn-b1", *names)
    assert result.exit_code == 0, result.output
    assert "cnn-1x3x32x32" in result.output and "goals" in result.output
    assert [r.group for r in results.read(tmp_path / "model.csv")] == ["cnn-b1"] * 4
