"""The operators and types that the full TensorRT product's ONNX parser takes, as its documentation has them.

Facts of github.com/onnx/onnx-tensorrt, docs/operators.md for TensorRT 10.15 (opset 9 to 24), the newest one that is at
hand, and of what the release notes of 11.0 to 11.4 add to it. The parser of TensorRT-RTX is asked itself, by
``python -m engines``; the full product doesn't install without its vendor's index.

Types have ONNX's names. DOUBLE is in no list: the parser narrows it to FLOAT and clamps it. INT64 is a type like any
other. UINT8 is only ever a network's input or output, and the 8- and 4-bit types only what a float was quantised to.
"""

from __future__ import annotations

SOURCE = "onnx-tensorrt, docs/operators.md for TensorRT 10.15"

OPSETS = range(9, 26)
"""TensorRT 11's opset guide: 9 to 25."""

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NO_BFLOAT16 = frozenset({"FLOAT", "FLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}
_FP8, _FP4 = "FLOAT8E4M3FN", "FLOAT4E2M1"
_QUANTISED = frozenset({"INT8", "INT4", _FP8, _FP4})


def _names(operators: str) -> list[str]:
    return operators.split()


def _each(types: frozenset[str], operators: str) -> dict[str, frozenset[str]]:
    return dict.fromkeys(_names(operators), types)


SUPPORTED: dict[str, frozenset[str]] = {
    **_each(
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LRN LSTM "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization "
        "PRelu RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike "
        "Reciprocal Resize RotaryEmbedding Round Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt "
        "Tan Tanh ThresholdedRelu",
    ),
    **_each(
        _NO_BFLOAT16,
        "BlackmanWindow DeformConv HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign",
    ),
    **_each(
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul "
        "Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    **_each(
        _ANY,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence "
        "Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    **_each(frozenset({"BOOL"}), "And Not Or Xor"),
    **_each(_ANY | {"UINT8"}, "Cast CastLike"),
    **_each(_ANY | {_FP8, _FP4, "INT4"}, "Constant ConstantOfShape"),
    # One side is a float, the other what it is quantised to.
    **_each(_FLOATS | _QUANTISED, "QuantizeLinear DequantizeLinear"),
    "Attention": _FLOATS | {"INT8", _FP8},
    "Gelu": _NUMBERS | {"INT8"},
    "GridSample": _FLOATS,  # BFLOAT16 since 11.2
    "Mean": _NUMBERS | {_FP8},
    "STFT": frozenset({"FLOAT"}),
    "TensorScatter": _FLOATS | {"INT32"},
}
"""Operators of ONNX's own domain, and the types of the values that they compute with."""

AUXILIARY = frozenset({"INT32", "INT64", "BOOL"})
"""Types of what isn't computed with: shapes, axes, indices, conditions."""

UNSUPPORTED = frozenset(
    _names(
        "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress "
        "ConcatFromSequence ConvInteger Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool "
        "MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement "
        "QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase "
        "SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat "
        "StringNormalizer StringSplit TfIdfVectorizer Unique"
    )
)
"""Operators that are documented as unsupported.

An operator in neither list isn't documented, or is without its types (DFT since 11.2, Swish since 11.0), or can't be in
a graph of opset 20 and later. It isn't taken for supported.
"""

RESIZE_COORDINATES = frozenset(
    {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
)
LARGEST_TOP_K = 3839

UNTRUSTED: dict[str, str] = {
    "GridSample": "silently wrong results are reported of TensorRT 10.13 and later (NVIDIA/TensorRT issue 4646, "
    "pytorch/TensorRT issue 4074); gather at integer indices",
    "ScatterElements": "TensorRT-RTX 1.7 can't parse its reductions, and TensorRT 8.6 is reported to leave one out "
    "silently (NVIDIA/TensorRT issue 3750); gather instead",
}
"""Documented as supported, and refused by us, with the reason and a way around it."""
