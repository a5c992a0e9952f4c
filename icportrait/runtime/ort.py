"""ONNX Runtime behind the ``Engine`` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from icportrait.contract import Array, ModelSpec, TensorSpec
from icportrait.errors import CheckpointError, RuntimeNotAvailable
from icportrait.runtime.portions import run_in_portions

_SPIN_US = 20
"""Time for which a thread waits awake for the next operator of a run."""


class OrtEngine:
    """An ONNX graph in an inference session on the CPU."""

    def __init__(self, path: Path, spec: ModelSpec, threads: int = 0, rows_at_once: int = 0) -> None:
        """Load the graph and compare its inputs and outputs with the specification.

        Args:
            path: the ONNX file; its external data, if any, lies beside it.
            spec: what the graph must take and give.
            threads: threads for one operator; 0 takes one per physical core.
            rows_at_once: of a batch, the most that one run computes; 0 takes the largest batch.

        Raises:
            CheckpointError: the file is missing, or its names, types or fixed sizes aren't the specification's.
        """
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise RuntimeNotAvailable(f'runtime onnxruntime is not installed ({error}); run "make setup"') from error
        if not path.is_file():
            raise CheckpointError(f'{path} is missing; make it with "python -m export"')
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Several engines share the cores, each in its own process: a thread that spins for long steals their time.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Quantised graphs run as they are written; fusing them fails for fp8.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.spec = spec
        self._rows = range(1, min(rows_at_once or spec.batch.max, spec.batch.max) + 1)
        self.version = f"onnxruntime-{ort.__version__}"
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._output_names = [output.name for output in spec.outputs]
        _compare(path, spec.inputs, self._session.get_inputs())
        _compare(path, spec.outputs, self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        return run_in_portions(self.spec, inputs, self._rows, self._run)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(self._output_names, dict(inputs))
        return dict(zip(self._output_names, outputs, strict=True))


def _compare(path: Path, specs: tuple[TensorSpec, ...], nodes: list) -> None:  # type: ignore[type-arg]
    found = {node.name: node for node in nodes}
    expected = [spec.name for spec in specs]
    if list(found) != expected:
        raise CheckpointError(f"{path}: tensors are {', '.join(found)}, expected {', '.join(expected)}; export again")
    for spec in specs:
        node = found[spec.name]
        if node.type != (expected_type := f"tensor({spec.dtype.onnx.lower()})"):
            raise CheckpointError(f"{path}: {spec.name} is {node.type}, expected {expected_type}; export again")
        for axis, size in zip(spec.axes, node.shape, strict=True):
            if not axis.is_dynamic and size != axis.min:
                raise CheckpointError(f"{path}: {spec.name}: {axis.name} is {size}, expected {axis}; export again")
