"""A graph with something that the full TensorRT product doesn't document as supported fails with its node's name."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import export.graphs
from export.__main__ import main
from export.tensorrt_operators import SUPPORTED, UNSUPPORTED, UNTRUSTED
from export.tensorrt_support import check_operators
from icportrait.contract import ModelSpec
from icportrait.errors import VerificationError
from icportrait.nn import Checkpoint, save_checkpoint
from tests.exports import shared_export

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
DOUBLE, INT64, UINT8 = TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT8
FP8 = ml_dtypes.float8_e4m3fn


def node(operator: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), name="culprit", **attributes)


def check(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    dtype: int = FLOAT,
    axes: tuple[int | str, ...] = ("batch", 4, 6, 8),
    opset: int = 23,
) -> None:
    """Write nodes from ``x`` to ``y``, each named, and check them."""
    tensor = helper.make_tensor_value_info("x", dtype, axes)
    output = onnx.ValueInfoProto(name="y")
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", [tensor], [output], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    check_operators(path, opset)


def quantised(kind: type, dtype: int = HALF, zero: int = 0) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Make a convolution whose activation and weights are quantised."""
    weights = {
        "scale": np.array(0.1, helper.tensor_dtype_to_np_dtype(dtype)),
        "zero": np.array(zero).astype(kind),
        "kernel": np.ones((4, 4, 3, 3)).astype(kind),
    }
    nodes = [
        node("QuantizeLinear", "x scale zero", "xq"),
        node("DequantizeLinear", "xq scale zero", "xd"),
        node("DequantizeLinear", "kernel scale zero", "kd"),
        node("Conv", "xd kd"),
    ]
    return nodes, weights


def attention(queries: str = "heads", **attributes: object) -> list[onnx.NodeProto]:
    split = node("Reshape", "x shape", "heads")
    return [split, node("Attention", f"{queries} heads heads", **attributes)]


def group_norm(kind: type) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    nodes = [node("GroupNormalization", "x weight weight", "normed", num_groups=2), node("Sigmoid", "normed")]
    return nodes, {"weight": np.ones(4).astype(kind)}


HEADS = {"shape": np.array([0, 4, -1, 16])}


@pytest.mark.parametrize(
    ("nodes", "weights", "dtype"),
    [
        ([node("Conv", "x kernel")], {"kernel": np.ones((2, 4, 1, 1), np.float32)}, FLOAT),
        (*group_norm(np.float16), HALF),
        (*group_norm(ml_dtypes.bfloat16), BF16),
        (*quantised(np.int8), HALF),
        (*quantised(FP8), HALF),
        (*quantised(FP8, FLOAT), FLOAT),
        (*quantised(np.int8, BF16), BF16),
        (attention(), HEADS, BF16),
        ([node("Cast", "x", to=FLOAT)], {}, UINT8),
        ([node("Gather", "x index", axis=1)], {"index": np.array([0, 2])}, HALF),
        ([node("ReduceL2", "x axes")], {"axes": np.array([1])}, FLOAT),
    ],
)
def test_what_is_documented_passes(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], dtype: int, tmp_path: Path
) -> None:
    check(tmp_path / "g.onnx", nodes, weights, dtype)


@pytest.mark.parametrize("operator", ["GridSample", "ScatterElements"])
def test_what_gives_wrong_results_silently_is_refused_with_its_reason(operator: str, tmp_path: Path) -> None:
    """Check two operators that are documented as supported."""
    other = "grid" if operator == "GridSample" else "index x"
    weights = {"grid": np.zeros((1, 2, 2, 2), np.float32), "index": np.zeros((1, 4, 6, 8), np.int64)}
    with pytest.raises(VerificationError, match=rf"node culprit \({operator}\): .* isn't to be trusted: .* issue"):
        check(tmp_path / "g.onnx", [node(operator, f"x {other}")], weights, axes=(1, 4, 6, 8))
    assert operator in SUPPORTED and operator in UNTRUSTED


@pytest.mark.parametrize(
    ("nodes", "weights", "dtype", "why"),
    [
        ([node("Det", "x")], {}, FLOAT, r"node culprit \(Det\): the operator is documented as unsupported \(onnx-tens"),
        ([node("Swish", "x")], {}, FLOAT, r"culprit \(Swish\): the operator is not documented as supported"),
        ([node("Mish", "x")], {}, BF16, r"culprit \(Mish\): x is BFLOAT16, supported are FLOAT, FLOAT16"),
        ([node("Relu", "x")], {}, DOUBLE, r"culprit \(Relu\): x is DOUBLE, supported are BFLOAT16, FLOAT, FLOAT16, I"),
        ([node("Cast", "x", to=DOUBLE)], {}, FLOAT, r"culprit \(Cast\): y is DOUBLE, supported are"),
        ([node("Mul", "x scale")], {"scale": np.array(2.0)}, DOUBLE, r"culprit \(Mul\): x is DOUBLE"),
        ([node("Relu", "x")], {}, TensorProto.FLOAT8E4M3FN, r"culprit \(Relu\): x is FLOAT8E4M3FN, supported are"),
        ([node("Clip", "x")], {}, INT64, r"culprit \(Clip\): x is INT64, supported are BFLOAT16, FLOAT, FLOAT16"),
        ([node("Add", "x x")], {}, UINT8, r"culprit \(Add\): x is UINT8, supported are"),
        (
            [helper.make_node("Cast", ["x"], ["levels"], to=UINT8, name="first"), node("Cast", "levels", to=FLOAT)],
            {},
            FLOAT,
            r"node first \(Cast\): levels is UINT8, which only a network's input or output can be",
        ),
        (*quantised(np.uint8), HALF, r"culprit \(QuantizeLinear\): zero is UINT8, supported are .*INT8"),
        (*quantised(np.int8, zero=3), HALF, r"culprit \(QuantizeLinear\): zero is no constant 0"),
        (*quantised(ml_dtypes.float8_e5m2), HALF, r"culprit \(QuantizeLinear\): zero is FLOAT8E5M2, supported are"),
        (attention("x"), HEADS | {"shape": np.array([0, 4, 48])}, FLOAT, r"\(Attention\): heads has 3 axes, expected"),
        (attention(softcap=5.0), HEADS, FLOAT, r"culprit \(Attention\): softcap is 5.0, supported is 0"),
        (
            [node("Resize", "x none scales", mode="cubic")],
            {"none": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
            FLOAT,
            r"culprit \(Resize\): mode is cubic, supported is linear or nearest",
        ),
        (
            [helper.make_node("Shape", ["x"], ["axes"], start=3), node("ReduceMax", "x axes")],
            {},
            FLOAT,
            r"culprit \(ReduceMax\): axes: axes must be a constant",
        ),
        (
            [node("TopK", "x k", "y indices", sorted=0)],
            {"k": np.array([2])},
            FLOAT,
            r"culprit \(TopK\): sorted is 0, supported is 1",
        ),
    ],
)
def test_what_is_not_documented_fails_with_its_nodes_name(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], dtype: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=why):
        check(tmp_path / "g.onnx", nodes, weights, dtype, opset=24)


def test_a_double_behind_a_group_norm_is_found(tmp_path: Path) -> None:
    """Find a type behind a group norm, where ONNX's inference ends."""
    nodes, weights = group_norm(np.float32)
    nodes[1] = helper.make_node("Sigmoid", ["normed"], ["s"], name="fine")
    with pytest.raises(VerificationError, match=r"node culprit \(Cast\): y is DOUBLE"):
        check(tmp_path / "g.onnx", [*nodes, node("Cast", "s", to=DOUBLE)], weights)


def test_the_zero_point_may_be_a_constant_node(tmp_path: Path) -> None:
    def zero(value: int) -> onnx.NodeProto:
        return node("Constant", "", "zero", value=numpy_helper.from_array(np.array(value).astype(FP8)))

    nodes, weights = quantised(FP8)
    del weights["zero"]
    check(tmp_path / "good.onnx", [zero(0), *nodes], weights, HALF)
    with pytest.raises(VerificationError, match=r"\(QuantizeLinear\): zero is no constant 0"):
        check(tmp_path / "bad.onnx", [zero(1), *nodes], weights, HALF)


def test_a_node_in_a_subgraph_is_found(tmp_path: Path) -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        inner = helper.make_node(operator, ["x"], [name], name=f"inner_{name}")
        return helper.make_graph([inner], name, [], [onnx.ValueInfoProto(name=name)])

    def conditional(operator: str) -> list[onnx.NodeProto]:
        branches = {"then_branch": branch("a", "Relu"), "else_branch": branch("b", operator)}
        return [node("If", "which", **branches)]

    which = {"which": np.array(True)}
    check(tmp_path / "good.onnx", conditional("Neg"), which)
    with pytest.raises(VerificationError, match=r"node inner_b \(Det\): the operator is documented as unsupported"):
        check(tmp_path / "bad.onnx", conditional("Det"), which)


def test_a_node_without_a_name_is_named_by_what_it_gives(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"the node that gives y \(Det\)"):
        check(tmp_path / "g.onnx", [helper.make_node("Det", ["x"], ["y"])])


def test_an_operator_of_another_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"culprit \(Relu\): it is of domain com\.example, expected ONNX's own"):
        check(tmp_path / "g.onnx", [node("Relu", "x", domain="com.example")])


def test_an_opset_that_tensorrt_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"opset is 26, and TensorRT takes 9 to 25"):
        check_operators(tmp_path / "g.onnx", 26)


def test_every_listed_operator_is_onnxs() -> None:
    """Look each name up, because a misspelt name would never be met."""
    assert not SUPPORTED.keys() & UNSUPPORTED
    assert UNTRUSTED.keys() <= SUPPORTED.keys()
    for operator in (*SUPPORTED, *UNSUPPORTED):
        assert not onnx.defs.get_schema(operator, 24, "").deprecated


def test_an_export_with_an_unsupported_operator_fails_and_leaves_no_manifest(
    tmp_path: Path,
    small_checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Export a first engine whose graph was exported before, with a node more."""
    save_checkpoint(small_checkpoint, tmp_path / "checkpoint")

    def with_a_double(_: object, spec: ModelSpec, directory: Path, *__: object) -> list[Path]:
        model = onnx.load(shared_export("small-fp16") / f"{spec.name}.onnx")
        model.graph.node.append(helper.make_node("Cast", [model.graph.input[0].name], ["d"], to=DOUBLE, name="added"))
        onnx.save(model, directory / f"{spec.name}.onnx")
        return [directory / f"{spec.name}.onnx"]

    monkeypatch.setattr(export.graphs, "export_graph", with_a_double)
    out = tmp_path / "out"
    options = ["--precision", "fp16", "--opset", "23"]
    assert main(["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(out), *options]) == 1
    assert "node added (Cast): d is DOUBLE" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
