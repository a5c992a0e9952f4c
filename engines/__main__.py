"""TensorRT engines from exported ONNX: ``python -m engines build | inspect | accept``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.build_config import COMPUTE_CAPABILITIES, LAYOUTS, BuildConfig
from icportrait.contract import ENGINES, engine_specs
from icportrait.disk import check_room
from icportrait.errors import IcPortraitError, RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.runtime.device_engine import BUCKETS
from icportrait.runtime.tensorrt.products import FLAVOURS, TENSORRT_RTX, Flavour

NO_GPU = 3
"""Exit status of ``accept`` on a machine without an NVIDIA GPU."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build plans")
    inspect = commands.add_parser("inspect", help="show what TensorRT's parser makes of the graphs")
    for command in (build, inspect):
        command.add_argument("--onnx", type=Path, required=True, help="directory of an export")
        command.add_argument(
            "--target", choices=FLAVOURS, default=TENSORRT_RTX.name, help="product (default: %(default)s)"
        )
        command.add_argument("--engine", choices=ENGINES, action="append", help="only this one; repeatable")
    accept = commands.add_parser("accept", help="build, check and time everything on this machine's NVIDIA GPU")
    accept.add_argument(
        "--onnx",
        type=Path,
        default=Path("build/export/demo-128-fp16-opset23"),
        help="directory of an export (default: %(default)s)",
    )
    accept.add_argument("--target", choices=(*FLAVOURS, "torch"), help="product (default: all that run here)")
    accept.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu-acceptance"),
        help="directory for the report and the plans (default: %(default)s)",
    )
    build.add_argument("--out", type=Path, required=True, help="directory for the plans")
    build.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="X.Y",
        help=f"GPUs to compile for ahead of time (default: those of {' '.join(COMPUTE_CAPABILITIES)} that can)",
    )
    build.add_argument("--buckets", type=int, nargs="+", default=list(BUCKETS), help="batches (default: %(default)s)")
    build.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of the batches (default: %(default)s)")
    build.add_argument("--opt-level", type=int, choices=range(6), metavar="0..5", help="effort of the builder")
    build.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel times to read and add to")
    build.add_argument("--workspace", type=_gigabytes, metavar="GB", help="largest scratch memory of a kernel")
    build.add_argument("--allow-mixed", action="store_true", help="build although much is in another precision")
    build.add_argument("--allow-warnings", action="store_true", help="build although TensorRT warns of the graph")
    build.add_argument("--allow-unfused", action="store_true", help="build although an attention isn't fused")
    args = parser.parse_args(argv)
    try:
        if args.command == "accept":
            return _accept(args)
        flavour, manifest = FLAVOURS[args.target], Manifest.read(args.onnx)
        if args.command == "build":
            _build(args, flavour, manifest)
        else:
            _inspect(args, flavour, manifest)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _gigabytes(text: str) -> int:
    return int(float(text) * 1e9)  # of a NaN a ValueError, which argparse tells


def _build(args: argparse.Namespace, flavour: Flavour, manifest: Manifest) -> None:
    from engines.building import build_engine

    config = BuildConfig(
        layout=args.layout,
        buckets=tuple(args.buckets),
        compute_capabilities=tuple(args.compute_capability) if args.compute_capability else None,
        optimization_level=args.opt_level,
        workspace_bytes=args.workspace,
        timing_cache=args.timing_cache,
    )
    specs = engine_specs(manifest.preset, manifest.precision)
    names = args.engine or ENGINES
    # A plan is about as large as its graph: most of either is weights.
    need_bytes = sum(len(config.plans(specs[name])) * manifest.engines[name].size_bytes for name in names)
    check_room("the plans", args.out, need_bytes, [f"{name}.*plan" for name in names])
    for name in names:
        for plan in build_engine(
            flavour,
            args.onnx,
            manifest,
            specs[name],
            config,
            args.out,
            allow_mixed=args.allow_mixed,
            allow_warnings=args.allow_warnings,
            allow_unfused=args.allow_unfused,
        ):
            print(
                f"  {name}: {plan.plan_bytes / 1e6:.0f} MB for {', '.join(plan.compute_capabilities)}, "
                f"{len(plan.profiles)} profiles, {plan.build_seconds:.0f} s, "
                f"peak memory {plan.peak_memory_bytes / 1e9:.1f} GB",
                flush=True,
            )


def _inspect(args: argparse.Namespace, flavour: Flavour, manifest: Manifest) -> None:
    from engines.inspection import inspect, table
    from engines.network import parse

    for name in args.engine or ENGINES:
        manifest.check_files(name, args.onnx)
        parsed = parse(flavour, manifest.files(name, args.onnx)[0])
        print(table(name, inspect(parsed), parsed.warnings), flush=True)


def _accept(args: argparse.Namespace) -> int:
    """Return 0 where all checks passed, 1 where one failed, 3 without a GPU.

    The GPU is asked for first, before torch is loaded.
    """
    from icportrait.runtime.cuda import find_gpu

    try:
        gpu = find_gpu()
    except RuntimeNotAvailable as error:
        print(f"nothing to accept: {error}", file=sys.stderr)
        return NO_GPU
    Manifest.read(args.onnx)
    print(f"{gpu.name}, compute capability {gpu.compute_capability}", flush=True)
    try:
        import torch

        from engines.acceptance import accept, products_for
        from engines.acceptance_report import write_report
    except ImportError as error:
        raise RuntimeNotAvailable(f'engines are compared with torch ({error}); run "make setup"') from error
    products = products_for(args.target, gpu.compute_capability, torch.cuda.is_available())
    acceptances = accept(products, args.onnx, args.out)
    report = write_report(acceptances, args.out)
    passed = all(acceptance.passed for acceptance in acceptances)
    print(f"{'passed' if passed else 'FAILED'}: {report}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
