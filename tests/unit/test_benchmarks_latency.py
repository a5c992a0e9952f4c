"""The latency benchmark's figures, without a server: what is computed of what was measured, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client.errors import InvalidRequest

from benchmarks.__main__ import main
from benchmarks.ladder_names import OURS, RUNGS
from benchmarks.latency_run import table
from benchmarks.machine import cpu_fields, instruction_set, machine
from benchmarks.pages.latency import latency_sections
from benchmarks.regressions import compared, compared_with_any
from benchmarks.regressions import table as regression_table
from benchmarks.report import conditions_here
from benchmarks.request_alone import PARTS, parts_of
from benchmarks.settings import LatencySettings
from benchmarks.spread import ratio, spread
from icportrait.errors import IcPortraitError
from tests.conftest import ROOT

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2 GHz
flags\t\t: fpu {flags}

processor\t: 1
model name\t: Another
flags\t\t: none
"""


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse4_2 avx avx2 avx512f avx512_bf16 amx_bf16", "AMX with bf16"),
        ("avx2 avx512f avx512_bf16", "AVX-512 with bf16"),
        ("avx2 avx512f", "AVX-512"),
        ("avx avx2 f16c", "AVX2"),
    ],
)
def test_a_cpu_is_named_by_the_best_instructions_that_all_kernels_may_use(flags: str, name: str) -> None:
    fields = cpu_fields(CPUINFO.format(flags=flags))
    assert fields["model name"] == "Some CPU @ 2 GHz"
    assert instruction_set(fields["flags"]) == name


def test_the_conditions_have_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags="avx2"))
    monkeypatch.setattr("benchmarks.machine.CPUINFO", tmp_path / "cpuinfo")
    here = conditions_here(LatencySettings(export=tmp_path))["machine"]
    assert here == machine() and (here["cpu"], here["instruction_set"]) == ("Some CPU @ 2 GHz", "AVX2")
    monkeypatch.setattr("benchmarks.machine.CPUINFO", tmp_path / "none")
    assert machine()["instruction_set"] == machine()["cpu"] or machine()["cpu"]


def test_the_parts_of_a_request_are_the_whole_and_each_lies_between_its_marks() -> None:
    metadata = {
        "stage_ms": {"preprocess": 30.0, "conditioning": 50.0, "denoise": 400.0, "decode": 60.0, "postprocess": 5.0},
        "encode_ms": 22.0,
        "warp_ms": 25.0,
        "engine_ms": 415.0,
    }
    parts = parts_of(metadata, {"vae_encoder": 20.0, "vae_decoder": 57.0}, 560.0)
    assert parts == {
        "whole": 560.0,
        "caller_and_door": 15.0,
        "pictures": 35.0,
        "vae_encoder": 20.0,
        "warping_network": 25.0,
        "unet": 390.0,
        "vae_decoder": 57.0,
        # 2 on the way to the loop, 3 around the warping, 10 between steps, 3 to the decoder and back
        "triton_and_python": 18.0,
    }
    assert sum(parts[name] for name in PARTS) == parts["whole"]


def test_a_spread_has_a_quantile_only_where_its_count_carries_it() -> None:
    figures = spread([float(value) for value in range(1, 11)])
    assert (figures["count"], figures["p50"], figures["p90"], figures["p99"]) == (10, 5.5, None, None)
    assert 1 <= figures["p50_low"] < 5.5 < figures["p50_high"] <= 10
    assert spread([1.0] * 35)["p90"] is None and spread([1.0] * 36)["p90"] == 1.0
    assert spread([1.0] * 367)["p99"] is None and spread([1.0] * 368)["p99"] == 1.0


def test_a_medians_interval_covers_the_median_of_what_was_drawn_from() -> None:
    rng = np.random.default_rng(5)
    found = [spread(list(rng.lognormal(0.0, 0.3, 20)), seed) for seed in range(300)]
    covered = sum(each["p50_low"] <= 1.0 <= each["p50_high"] for each in found)
    assert 0.91 <= covered / 300 <= 0.985


def test_a_ratio_is_of_pairs_so_that_a_machine_that_slows_down_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    speed = np.linspace(1, 3, 40)
    base, other = speed * rng.uniform(0.99, 1.01, 40), 1.5 * speed * rng.uniform(0.99, 1.01, 40)
    found = ratio(list(other), list(base))
    assert 1.48 < found["low"] <= found["median"] <= found["high"] < 1.52


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rounds": 5}, "rounds: 5, expected 6 or more"),
        ({"rungs": ("gateway", "gateway")}, "rungs: gateway gateway, expected some of recomputing, .*, each once"),
        ({"runtimes": ("tensorrt",)}, "runtimes: tensorrt, expected some of onnxruntime, openvino"),
        ({"runtime": "torch"}, "runtime: torch, expected one of onnxruntime, openvino"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"seconds": 0.0}, "seconds: 0"),
    ],
)
def test_a_wrong_setting_is_told_with_what_was_expected(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        LatencySettings(export=Path("export"), **values)


def test_a_folder_that_is_no_export_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", "--export", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path) in error and error.count("\n") == 1


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Any]:
    """Return figures as ``measure_latency`` does, drawn and not measured."""
    rng = np.random.default_rng(0)

    def drawn(median: float) -> list[float]:
        return list(median * rng.uniform(0.9, 1.1, 12))

    whole = {"whole": spread(drawn(100)), **{part: spread(drawn(14)) for part in PARTS}}
    limit = {"per_s": 100.0, "gateway_cpu_ms_each": 3.0, "per_s_of_a_core": 333.3, "megabytes_each": 0.1}
    limit |= {"megabytes_per_s": 10.0, "megabytes_per_s_of_a_core": 33.3, "count": 100}
    rungs: dict[str, Any] = {
        name: {"what": what, "ms": spread(drawn(1000)), "ours_by_this": ratio(drawn(1), drawn(2))}
        for name, what in RUNGS.items()
    }
    rungs["compiled"] = {"what": RUNGS["compiled"], "left_out": "no <C++> compiler"}
    return {
        "peak": {"gflops": 120.0, "gb_per_s": 13.8},
        "engines": [
            {
                "engine": "unet",
                "batch": 2,
                "runtime": "onnxruntime-1",
                "ms": spread(drawn(40)),
                "gflop": 4.0,
                "megabytes": 12.0,
                "floor_ms": 33.3,
                "share_of_floor": 0.83,
                "ratio_to_first": ratio(drawn(1), drawn(1)),
            }
        ],
        "requests": [
            {
                "options": {"num_inference_steps": 20, "guidance_scale": 1.5},
                "ms": whole,
                "by_engines": ratio(drawn(1.2), drawn(1)),
                "share": {part: round(whole[part]["p50"] / whole["whole"]["p50"], 4) for part in PARTS},
            }
        ],
        "ladder": rungs,
        "gateway": {"callers": 16, "portraits": limit},
        "conditions": {
            **conditions_here(LatencySettings(export=tmp_path)),
            "preset": "demo-128",
            "precision": "fp32",
            "model_version": "0123abcd",
        },
    }


def test_the_table_and_the_page_show_every_figure_and_what_was_left_out(figures: dict[str, Any]) -> None:
    lines, page = table(figures), "".join(latency_sections(figures))
    assert "0123abcd" in lines and figures["conditions"]["machine"]["instruction_set"] in lines
    for text in (lines, page):
        for name in (*RUNGS, "unet", "onnxruntime-1", "portraits"):
            assert name in text
        for part in PARTS:
            assert part in text or part.replace("_", " ") in text
        median = figures["ladder"]["eager"]["ms"]["p50"]
        assert f"{median:.1f} (" in text
    assert "left out: no <C++> compiler" in lines and "left out: no &lt;C++&gt; compiler" in page
    assert f"{figures['ladder'][OURS]['ms']['p50']:.1f}" in lines


def test_shares_of_the_floor_that_cannot_be_are_told(figures: dict[str, Any]) -> None:
    for share, told in ((1.0, False), (1.01, True)):
        figures["engines"][0]["share_of_floor"] = share
        for text in (table(figures), "".join(latency_sections(figures))):
            assert ("1 of 1 shares are over 100 %" in text) == told


def test_equal_figures_make_equal_pages(figures: dict[str, Any], tmp_path: Path) -> None:
    sections = latency_sections(figures)
    assert sections == latency_sections(figures) and "".join(sections).count("<svg") == 2


def changed(figures: dict[str, Any], rung: str, factor: float) -> dict[str, Any]:
    """Return a run in which the server's ratio to a rung is another."""
    run: dict[str, Any] = json.loads(json.dumps(figures))
    ours = run["ladder"][rung]["ours_by_this"]
    run["ladder"][rung]["ours_by_this"] = {name: factor * value for name, value in ours.items()}
    return run


def test_a_ratio_is_lost_where_it_is_worse_by_more_than_intervals_and_limit_allow(figures: dict[str, Any]) -> None:
    for factor, lost in ((1.0, []), (1.10, []), (0.5, []), (1.4, ["gateway by eager"])):
        ratios = compared(figures, changed(figures, "eager", factor))
        assert [ratio.name for ratio in ratios if ratio.is_lost] == lost, factor
    wide = changed(figures, "eager", 1.4)
    wide["ladder"]["eager"]["ours_by_this"]["low"] = 0.1
    assert not any(ratio.is_lost for ratio in compared(figures, wide)), "its interval doesn't support the loss"
    text = regression_table(compared(figures, changed(figures, "eager", 1.4)))
    (line,) = [line for line in text.splitlines() if "LOST" in line]
    assert line.startswith("gateway by eager") and " 40.0%" in line
    assert "a request by its engines, 20 steps, guidance 1.5" in text and "compiled" not in text


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("conditions", "machine", "instruction_set"), "AVX-512", "instruction set: AVX-512, expected"),
        (("conditions", "machine", "cores"), 99, "cores: 99, expected"),
        (("conditions", "preset"), "sd15-512", "preset: sd15-512, expected demo-128"),
        (("conditions", "arguments", "num_inference_steps"), 2, "num_inference_steps: 2, expected 20"),
    ],
)
def test_runs_that_cannot_be_compared_are_told_apart(
    figures: dict[str, Any], path: tuple[str, ...], value: object, text: str
) -> None:
    other = json.loads(json.dumps(figures))
    place = other
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(IcPortraitError, match=text):
        compared(figures, other)


def test_the_first_comparable_run_is_compared_with(figures: dict[str, Any]) -> None:
    other = json.loads(json.dumps(figures))
    other["conditions"]["machine"]["instruction_set"] = "another"
    assert compared_with_any([other, changed(figures, "bls", 0.6)], figures) == compared(
        changed(figures, "bls", 0.6), figures
    )
    with pytest.raises(IcPortraitError, match=r"no run to compare with: instruction set: .*; commit one"):
        compared_with_any([other, other], figures)


def test_runs_without_a_common_ratio_are_no_comparison(figures: dict[str, Any]) -> None:
    other = json.loads(json.dumps(figures)) | {"ladder": {}, "requests": []}
    with pytest.raises(IcPortraitError, match="no ratio in common"):
        compared(figures, other)


def test_a_committed_run_that_is_none_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text('{"ladder": {}}')
    for name in ("run.json", "none.json"):
        arguments = ["latency", "--export", str(tmp_path), "--compare-with", str(tmp_path / name)]
        assert main(arguments) == 1
        assert f"{name}: no run of the latency benchmark" in capsys.readouterr().err


def test_a_run_is_written_shown_and_compared(
    tmp_path: Path, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.latency_run.measure_latency", lambda *_: figures)
    out, page = tmp_path / "out" / "latency.json", tmp_path / "page" / "latency.html"
    command = ["latency", "--export", str(tmp_path), "--out", str(out), "--report", str(page)]
    assert main(command) == 0
    assert json.loads(out.read_text()) == json.loads(json.dumps(figures))
    assert "Latency of demo-128, fp32, 0123abcd" in page.read_text() and "recomputing" in page.read_text()
    (tmp_path / "before.json").write_text(json.dumps(changed(figures, "bls", 0.6)))
    assert main([*command, "--compare-with", str(tmp_path / "before.json")]) == 1
    assert "error: slower by more than 15%: gateway by bls\n" in capsys.readouterr().err


@pytest.mark.parametrize("instructions", ["avx2", "avx512", "avx512-bf16"])
def test_the_figures_in_the_readme_are_the_committed_ones(instructions: str) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    run = json.loads((results / f"latency-demo-128-{instructions}.json").read_text(encoding="utf-8"))
    for line in readme_lines(run):
        assert line in text, f"benchmarks/README.md lacks {line!r}; write what the committed run says"


def readme_lines(run: dict[str, Any]) -> list[str]:
    """Return the rows of the README's tables that a run has the figures of."""
    lines = []
    for name, rung in run["ladder"].items():
        by, ms = rung["ours_by_this"], rung["ms"]
        ratio_text = "" if name == OURS else f"{by['median']:.2f} ({by['low']:.2f} to {by['high']:.2f})"
        lines.append(f"| `{name}` | {ms['p50']:.0f} | {ratio_text} |")
    for part in ("whole", *PARTS):
        cells = [f"{request['ms'][part]['p50']:.1f}" for request in run["requests"]]
        lines.append(f"| {part.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines
