"""GPU acceptance, as far as it needs no GPU: ONNX Runtime behind static buffers stands in for a plan."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines import acceptance, ladder
from engines.__main__ import main
from engines.acceptance import Acceptance, installed_products
from engines.acceptance_report import as_markdown, write_report
from engines.checks import CHECKS, Check, Subject, check_engine, differing_bytes
from engines.ladder import EAGER, Rung, climb
from export.verification import TOLERANCES, Figure, torch_outputs
from icportrait.contract import ENGINES, Array, engine_specs
from icportrait.errors import PlanError, RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.nn import Checkpoint, engine_modules
from icportrait.runtime import eager
from icportrait.runtime.cuda import Gpu
from icportrait.runtime.ort import OrtEngine
from icportrait.runtime.tensorrt.products import FLAVOURS, Flavour
from tests.tiny import SMALL

SPECS = engine_specs(SMALL)
BUCKETS = {name: tuple(sorted({1, 2, spec.batch.max})) for name, spec in SPECS.items()}


class Buffered:
    """An ONNX graph that runs whole buckets from and into static buffers, as a plan does."""

    def __init__(self, directory: Path, name: str) -> None:
        self.spec = SPECS[name]
        self._engine = OrtEngine(directory / f"{name}.onnx", self.spec, threads=1)
        self.version = self._engine.version
        largest = self.spec.batch.max
        self.inputs = self.spec.dummy_inputs(largest)
        self.outputs = {
            tensor.name: np.zeros(tensor.shape(batch=largest), tensor.dtype.numpy) for tensor in self.spec.outputs
        }

    def warm_up(self) -> None:
        """Do nothing."""

    def fill_outputs(self, byte: int) -> None:
        for array in self.outputs.values():
            array.view(np.uint8).fill(byte)

    def run(self, inputs: Mapping[str, Any], *, directly: bool = False) -> dict[str, Array]:
        batch = self.spec.check_inputs(inputs)["batch"]
        for name, array in inputs.items():
            self.inputs[name][:batch] = array
        size = min(bucket for bucket in BUCKETS[self.spec.name] if bucket >= batch)
        given = {name: array[:size] for name, array in self.inputs.items()}
        for name, array in self.compute(given, directly).items():
            self.outputs[name][:size] = array
        return {name: array[:batch].copy() for name, array in self.outputs.items()}

    def compute(self, inputs: dict[str, Array], directly: bool) -> dict[str, Array]:
        return self._engine.run(inputs)


class Wrong(Buffered):
    """An engine whose last output is twice what it should be; a picture or a flow is another."""

    def compute(self, inputs: dict[str, Array], directly: bool) -> dict[str, Array]:
        outputs = super().compute(inputs, directly)
        last = list(outputs)[-1]
        return outputs | {last: outputs[last] * np.array(2, outputs[last].dtype)}


class WrongFlow(Buffered):
    """An engine whose matches are the positions beside; its ``F_ref`` is warped by them, or isn't."""

    module: Any = None

    def compute(self, inputs: dict[str, Array], directly: bool) -> dict[str, Array]:
        outputs = super().compute(inputs, directly)
        outputs["flow_0"] = np.roll(outputs["flow_0"], 1, axis=-1)
        if self.module is None:
            return outputs
        flows = {name: array for name, array in outputs.items() if name.startswith("flow_")}
        moved = torch_outputs(self.module, self.spec, inputs, flows)
        return outputs | {name: array for name, array in moved.items() if name.startswith("f_ref_")}


class Unwritten(Buffered):
    """Leaves the last value of the last row as it was."""

    def compute(self, inputs: dict[str, Array], directly: bool) -> dict[str, Array]:
        outputs = super().compute(inputs, directly)
        for name, array in outputs.items():
            array.reshape(len(array), -1)[-1, -1] = self.outputs[name][: len(array)].reshape(len(array), -1)[-1, -1]
        return outputs


class StaleReplay(Buffered):
    """An engine whose graph holds the inputs that it was recorded with."""

    recorded: dict[int, dict[str, Array]] | None = None

    def compute(self, inputs: dict[str, Array], directly: bool) -> dict[str, Array]:
        if directly:
            return super().compute(inputs, directly)
        self.recorded = self.recorded or {}
        size = len(next(iter(inputs.values())))
        known = self.recorded.setdefault(size, {name: array.copy() for name, array in inputs.items()})
        return super().compute(known, directly)


class Leaking(Buffered):
    """The last row of a batch moves one value of the first one, by less than any tolerance sees."""

    def compute(self, inputs: dict[str, Array], directly: bool) -> dict[str, Array]:
        outputs = super().compute(inputs, directly)
        latent = inputs["canvas_latent"]
        if len(latent) > 1:
            outputs["noise_pred"].flat[0] += np.float32(1e-5) * latent[-1].flat[0]
        return outputs


class ReadsBeyond(Buffered):
    """A row depends on the rows that the bucket has beyond the batch: the last of the buffers, whatever it holds."""

    def run(self, inputs: Mapping[str, Any], *, directly: bool = False) -> dict[str, Array]:
        outputs = super().run(inputs, directly=directly)
        if self.spec.check_inputs(inputs)["batch"] == self.spec.batch.max - 1:
            next(iter(outputs.values())).flat[0] += 1
        return outputs


def checked(subject: Subject, small_checkpoint: Checkpoint) -> list[Check]:
    spec = subject.spec
    reference = partial(torch_outputs, engine_modules(small_checkpoint)[spec.name], spec)
    return list(check_engine(subject, reference, TOLERANCES["fp32"][spec.name], BUCKETS[spec.name], seed=7))


def failures(subject: Subject, small_checkpoint: Checkpoint) -> set[tuple[str, int | None]]:
    return {(check.name, check.batch) for check in checked(subject, small_checkpoint) if not check.passed}


# Checks


@pytest.mark.parametrize("name", ENGINES)
def test_a_right_engine_passes_every_check_at_every_bucket(
    name: str, small_export: Path, small_checkpoint: Checkpoint
) -> None:
    found = checked(Buffered(small_export, name), small_checkpoint)
    assert [check.text for check in found if not check.passed] == []
    expected = [(bucket, check) for bucket in BUCKETS[name] for check in CHECKS if (bucket, check) != (1, "neighbours")]
    assert [(check.batch, check.name) for check in found] == expected
    assert {check.engine for check in found} == {name}


@pytest.mark.parametrize("name", ENGINES)
def test_a_wrong_engine_is_found(name: str, small_export: Path, small_checkpoint: Checkpoint) -> None:
    assert failures(Wrong(small_export, name), small_checkpoint) == {("values", bucket) for bucket in BUCKETS[name]}


def test_a_wrong_flow_is_found_and_drowns_nothing_else(small_export: Path, small_checkpoint: Checkpoint) -> None:
    engine = WrongFlow(small_export, "warping_network")
    engine.module = engine_modules(small_checkpoint)["warping_network"]
    failed = [check for check in checked(engine, small_checkpoint) if not check.passed]
    assert [(check.name, check.batch) for check in failed] == [("values", 1), ("values", 2)]
    assert all(check.figure and check.figure.tensor == "flow_0" for check in failed)


def test_residuals_that_do_not_follow_their_flow_are_found(small_export: Path, small_checkpoint: Checkpoint) -> None:
    failed = [c for c in checked(WrongFlow(small_export, "warping_network"), small_checkpoint) if not c.passed]
    assert {check.name for check in failed} == {"values"}
    assert all(check.figure and check.figure.tensor.startswith("f_ref_") for check in failed)


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_leaves_unwritten_is_found(name: str, small_export: Path, small_checkpoint: Checkpoint) -> None:
    found = failures(Unwritten(small_export, name), small_checkpoint)
    assert {("written", bucket) for bucket in BUCKETS[name]} <= found


def test_an_unwritten_float_is_no_number_and_fails_its_tolerance(
    small_export: Path, small_checkpoint: Checkpoint
) -> None:
    found = checked(Unwritten(small_export, "unet"), small_checkpoint)
    values = [check for check in found if check.name == "values"]
    assert values and all(check.figure and math.isnan(check.figure.value) and not check.passed for check in values)


def test_a_graph_that_replays_old_inputs_is_found(small_export: Path, small_checkpoint: Checkpoint) -> None:
    found = failures(StaleReplay(small_export, "unet"), small_checkpoint)
    assert {("replay", bucket) for bucket in BUCKETS["unet"]} <= found


def test_rows_that_leak_into_each_other_are_found(small_export: Path, small_checkpoint: Checkpoint) -> None:
    found = failures(Leaking(small_export, "unet"), small_checkpoint)
    assert found == {("neighbours", bucket) for bucket in BUCKETS["unet"] if bucket > 1}


def test_a_bucket_that_is_not_full_is_checked(small_export: Path, small_checkpoint: Checkpoint) -> None:
    largest = SPECS["unet"].batch.max
    assert failures(ReadsBeyond(small_export, "unet"), small_checkpoint) == {("neighbours", largest)}


def test_equal_nans_are_equal_bytes_and_signed_zeros_are_not() -> None:
    nan, zero = np.array([math.nan]), np.zeros(1)
    assert differing_bytes({"x": nan}, {"x": nan.copy()}).passed
    assert differing_bytes({"x": zero}, {"x": -zero}) == Figure("x", "differing bytes", 1, 0)
    assert differing_bytes({"x": zero, "y": nan}, {"x": zero, "y": zero}).tensor == "y"


# Ladder


class Timed:
    """The ladder's part of the runner. A run takes as many milliseconds as its bucket has rows, directly ten more."""

    def __init__(self) -> None:
        self.spec, self.buckets, self.ms, self.given = SPECS["unet"], (1, 2, 4), 0.0, 0
        self.stream = SimpleNamespace(time_ms=self._time, synchronize=lambda: None)

    def _time(self, work: Any) -> float:
        work()
        return self.ms

    def run(self, inputs: Mapping[str, Array]) -> None:
        self.given = self.spec.check_inputs(inputs)["batch"]

    def execute(self, batch: int) -> None:
        assert batch == self.given
        self.ms = float(batch)

    def execute_directly(self, batch: int) -> None:
        assert batch == self.given
        self.ms = batch + 10.0


def test_rungs_are_measured_in_order_and_torch_without_cuda_is_not(
    small_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder.torch.cuda, "is_available", lambda: False)
    engine: Any = Timed()
    rungs = list(climb(engine, engine_modules(small_checkpoint)["unet"], seed=3))
    assert [(rung.name, rung.batch, rung.ms) for rung in rungs] == [
        (EAGER, 1, None),
        ("torch compiled", 1, None),
        ("TensorRT", 1, 11.0),
        ("TensorRT with CUDA graphs", 1, 1.0),
        ("TensorRT with CUDA graphs", 2, 2.0),
        ("TensorRT with CUDA graphs", 4, 4.0),
    ]
    assert "has no CUDA here" in rungs[0].missing
    assert rungs[0].rows_per_s is None and rungs[3].speedup(rungs) is None


def test_a_speedup_counts_rows() -> None:
    rungs = [Rung(EAGER, 1, 20.0), Rung("TensorRT with CUDA graphs", 4, 10.0)]
    assert rungs[1].rows_per_s == pytest.approx(400)
    assert rungs[1].speedup(rungs) == pytest.approx(8)


# Report


def test_failures_come_first_and_figures_have_their_conditions(tmp_path: Path) -> None:
    good = Check("unet", 2, "values", Figure("noise_pred", "relative RMS error", 1e-6, 1e-4))
    nan = Check("unet", 4, "values", Figure("noise_pred", "relative RMS error", math.nan, 1e-4))
    crashed = Check("all", None, "run", error="BrokenProcessPool: | it ended")
    rungs = [Rung(EAGER, 1, 20.0), Rung("torch compiled", 1, None, "no compiler"), Rung("TensorRT", 1, 10.0)]
    conditions: dict[str, str | int] = {"gpu": "NVIDIA Test", "repeats": 30}
    found = [
        Acceptance("tensorrt-rtx", conditions, [good, nan], rungs),
        Acceptance("tensorrt", {"seed": 5}, [crashed]),
    ]
    text = as_markdown(found)
    assert "Checks: FAILED: 2 of 3." in text
    first, rest = text.split("## tensorrt-rtx")
    assert "is nan, allowed 0.0001" in first and "BrokenProcessPool: \\| it ended" in first and "1e-06" not in first
    assert rest.index("FAILED") < rest.index("passed")
    assert "gpu NVIDIA Test, repeats 30." in rest
    assert "| TensorRT | 1 | 10.000 | 100.0 | x 2.00 |" in rest
    assert "Not measured: torch compiled, batch 1: no compiler." in rest and "| torch compiled |" not in rest

    write_report(found, tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"] is False
    product = report["products"][0]
    assert [check["passed"] for check in product["checks"]] == [False, True]
    assert product["checks"][0]["value"] is None and product["checks"][1]["value"] == 1e-6
    assert [rung["ms"] for rung in product["ladder"]] == [20.0, None, 10.0]
    assert all(rung["gpu"] == "NVIDIA Test" and rung["repeats"] == 30 for rung in product["ladder"])


def test_a_product_without_checks_has_not_passed() -> None:
    assert not Acceptance("tensorrt").passed


# One product, with stand-ins for what needs a GPU


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(flavour: Flavour, onnx: Path, manifest: Manifest, name: str, plans: Path, stream: object) -> Any:
        if name == "vae_encoder":
            raise PlanError("it can't be built")
        engine: Any = (Wrong if name == "vae_decoder" else Buffered)(onnx, name)
        engine.buckets = BUCKETS[name]
        return engine

    def rungs(engine: Any, module: object, seed: int, name: str) -> Iterator[Rung]:
        yield Rung(f"TensorRT of {engine.spec.name}", 1, 2.0)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(acceptance, "find_gpu", lambda: Gpu("NVIDIA Test", "9.0", 1, 1, "13.0"))
    monkeypatch.setattr(acceptance, "Stream", lambda: None)
    monkeypatch.setattr(acceptance, "share_scratch", lambda engines: None)
    monkeypatch.setattr(acceptance, "DeviceEngine", lambda spec, executor, stream: executor)
    monkeypatch.setattr(acceptance, "_build_and_load", load)
    monkeypatch.setattr(acceptance, "climb", rungs)
    yield
    eager._source_checkpoint.cache_clear()  # its modules were brought to another precision


def test_an_engine_that_fails_ends_nothing_else(no_gpu_needed: None, small_export: Path, tmp_path: Path) -> None:
    found = acceptance._accept_product("tensorrt-rtx", small_export, tmp_path, 11)
    failed = [(check.engine, check.name, check.batch) for check in found.checks if not check.passed]
    wrong = [("vae_decoder", "values", bucket) for bucket in BUCKETS["vae_decoder"]]
    assert failed == [("vae_encoder", "build", None), *wrong, ("unet", "ladder", None)]
    assert {check.engine for check in found.checks if check.passed} >= {"warping_network", "unet"}
    assert [rung.name for rung in found.ladder] == ["TensorRT of unet"]
    assert found.checks[-1].text == "out of memory"
    assert found.conditions["gpu"] == "NVIDIA Test" and found.conditions["driver_cuda_version"] == "13.0"
    assert found.conditions["product_version"] == FLAVOURS["tensorrt-rtx"].version()
    assert found.conditions["seed"] == 11 and found.conditions["preset"] == SMALL.name


def test_the_reference_has_the_exports_rounded_weights(no_gpu_needed: None, small_export: Path) -> None:
    manifest = replace(Manifest.read(small_export), precision="fp16")
    modules = acceptance._torch_modules(manifest)
    assert {parameter.dtype for module in modules.values() for parameter in module.parameters()} == {torch.float16}
    spec = engine_specs(SMALL, "fp16")["warping_network"]
    outputs = torch_outputs(modules["warping_network"], spec, spec.dummy_inputs(1))
    assert outputs["f_ref_00"].dtype == np.float32  # computed in fp32
    assert next(modules["warping_network"].parameters()).dtype == torch.float16


# The command


def test_a_machine_without_a_gpu_says_so_in_one_line_and_at_once(tmp_path: Path) -> None:
    """Check that nothing heavy is imported, and that no export is needed."""
    program = (
        "import sys, icportrait.runtime.cuda as cuda\n"
        "from icportrait.errors import RuntimeNotAvailable\n"
        "def find_gpu(): raise RuntimeNotAvailable('no NVIDIA GPU was found (test)')\n"
        "cuda.find_gpu = find_gpu\n"
        "from engines.__main__ import main\n"
        f"status = main(['accept', '--onnx', {str(tmp_path / 'none')!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "assert not {'torch', 'onnx', 'polygraphy', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "nothing to accept: no NVIDIA GPU was found (test)\n"
    assert (done.returncode, done.stdout) == (3, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("error", "status"), [("", 0), ("it failed", 1)])
def test_the_exit_status_is_the_reports(
    error: str, status: int, small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check("unet", 1, "values", Figure("noise_pred", "relative RMS error", 0, 1), error)
    gpu = SimpleNamespace(name="NVIDIA Test", compute_capability="8.9")
    monkeypatch.setattr("icportrait.runtime.cuda.find_gpu", lambda: gpu)
    monkeypatch.setattr(acceptance, "accept", lambda products, onnx, out: [Acceptance("tensorrt-rtx", {}, [check])])
    arguments = ["accept", "--onnx", str(small_export), "--out", str(tmp_path), "--target", "tensorrt-rtx"]
    assert main(arguments) == status
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is (status == 0)


def test_what_ends_a_products_process_is_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Let the process end by an export that is missing."""
    (found,) = acceptance.accept(["tensorrt-rtx"], tmp_path / "none", tmp_path / "out")
    assert not found.passed
    assert "CheckpointError" in found.checks[0].text and "manifest.json is missing" in found.checks[0].text
    assert f"seed {found.conditions['seed']}" in capsys.readouterr().out


def test_only_installed_products_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Flavour("tensorrt", "tensorrt_of_another_world", "tensorrt==0", compiles_without_gpu=False)
    monkeypatch.setitem(FLAVOURS, "tensorrt", absent)
    assert [flavour.name for flavour in installed_products(None)] == ["tensorrt-rtx"]
    with pytest.raises(RuntimeNotAvailable, match="tensorrt: not installed; install it with: pip install tensorrt==0"):
        installed_products("tensorrt")
