"""The choice of a runtime for ``make serve``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from icportrait.deploy import choice
from icportrait.deploy.choice import choose
from icportrait.errors import RuntimeNotAvailable
from icportrait.presets import DEMO_128, SD15_512
from icportrait.runtime.cuda import Gpu
from icportrait.runtime.tensorrt.products import Flavour

GPU = Gpu("NVIDIA Test", "8.9", 8 * 10**9, 8 * 10**9, "13.0")


def gpu_of(capability: str | None) -> Callable[[], Gpu]:
    def find() -> Gpu:
        if capability is None:
            raise RuntimeNotAvailable("no NVIDIA GPU was found (test)")
        return replace(GPU, compute_capability=capability)

    return find


@pytest.mark.parametrize(
    ("capability", "is_installed", "has_backend", "torch_has_gpu", "expected", "reason"),
    [
        ("8.9", True, False, True, "tensorrt-rtx", "runs its plans"),
        ("9.0", True, False, True, "torch", "tensorrt-rtx: no kernels for compute capability 9.0"),
        ("9.0", True, True, True, "tensorrt", "runs its plans"),
        ("9.0", True, False, True, "torch", "tensorrt: the tritonserver here has no backend for it"),
        ("8.9", False, True, True, "torch", "tensorrt-rtx: not installed; tensorrt: not installed"),
        ("9.0", True, False, False, "onnxruntime", "torch: it finds no GPU"),
        (None, True, True, True, "onnxruntime", "no NVIDIA GPU was found (test)"),
    ],
)
def test_the_first_that_can_run_is_taken_and_the_others_are_named(
    capability: str | None,
    is_installed: bool,
    has_backend: bool,
    torch_has_gpu: bool,
    expected: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(flavour: Flavour) -> SimpleNamespace:
        if not is_installed:
            raise RuntimeNotAvailable(f"{flavour.name} is not installed here")
        return SimpleNamespace(ComputeCapability=SimpleNamespace(SM89=1))

    monkeypatch.setattr(Flavour, "load", load)
    found, why = choose(DEMO_128, gpu_of(capability), lambda: torch_has_gpu, lambda: has_backend)
    assert found == expected and reason in why and "\n" not in why


def test_without_a_gpu_a_large_preset_gets_what_measured_best_on_a_cpu() -> None:
    assert choose(SD15_512, gpu_of(None))[0] == "openvino"


def test_the_command_prints_arguments_of_make_and_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "choose", lambda preset: ("torch", "because of the test"))
    for arguments, expected in (([], "RUNTIME=torch PRECISION=fp16\n"), (["--precision", "bf16"], "RUNTIME=torch\n")):
        assert choice.main(["--preset", "demo-128", *arguments]) == 0
        assert capsys.readouterr() == (expected, "runtime torch: because of the test\n")
    assert choice.main(["--preset", "demo-128", "--out", str(tmp_path / "new" / "choice")]) == 0
    assert (tmp_path / "new" / "choice").read_text() == "RUNTIME=torch PRECISION=fp16\n"
