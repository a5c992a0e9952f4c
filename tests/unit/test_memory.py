"""A server's need of memory, computed from its graphs; the choice where there is less; the refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import icportrait.deploy.preflight
from icportrait.contract import ENGINES
from icportrait.deploy.graph_memory import GraphMemory, graph_memory
from icportrait.deploy.machine_memory import Room
from icportrait.deploy.memory import fit, needs, shared_memory, summary
from icportrait.deploy.preflight import check_shared_memory, fit_memory, repository_policy
from icportrait.deploy.repository import assemble, main
from icportrait.errors import NotEnoughMemory
from icportrait.manifest import EngineMemory, Manifest
from icportrait.policy import POLICY_VARIABLE, ServingPolicy, cpu_defaults
from icportrait.presets import DEMO_128, SD15_512
from icportrait.runtime.load import compiled_folder, keeps_compiled
from icportrait.server import main as serve
from icportrait.serving.triton_models import ModelContext
from tests.trivial_engines import write_trivial_export

GB = 10**9
PLENTY = Room(10**15, "this machine")


def described(manifest: Manifest, weights_gb: float, row_gb: float) -> Manifest:
    """Return the manifest, with engines that each take so much."""
    runs = {2**power: int(2**power * row_gb * GB) for power in range(5)}
    memory = {name: EngineMemory(int(weights_gb * GB), runs) for name in ENGINES}
    return Manifest(**{**vars(manifest), "memory": memory})


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    write_trivial_export(directory, DEMO_128)
    return directory


@pytest.fixture
def manifest(export: Path) -> Manifest:
    return Manifest.read(export)


def total_gb(manifest: Manifest, **policy: object) -> float:
    return sum(need.memory for need in needs(manifest, ServingPolicy(**policy))) / GB


# One graph


def test_a_graph_holds_a_tensor_from_its_maker_to_its_last_reader(tmp_path: Path) -> None:
    """Read x (100) for a (1000), a for b (40), and a once more, by another name, for d (8)."""
    info = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(np.ones((7, 11), np.float16), "w"),
        helper.make_tensor("shape", TensorProto.INT64, [2], [0, -1]),
    ]
    nodes = [
        helper.make_node("Big", ["x"], ["a"], domain="test"),
        helper.make_node("Small", ["a", "w"], ["b"], domain="test"),
        helper.make_node("Reshape", ["a", "shape"], ["c"]),
        helper.make_node("Small", ["c"], ["d"], domain="test"),
        helper.make_node("Sum", ["b", "d"], ["y"]),
    ]
    inner = [info(name, TensorProto.FLOAT16, ["batch", size]) for name, size in (("a", 250), ("c", 250), ("d", 2))]
    inner.append(info("b", TensorProto.FLOAT, ["batch", 10]))
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.UINT8, ["batch", 100])], [info("y", TensorProto.FLOAT, ["batch", 10])],
        weights, value_info=inner,
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert graph_memory(tmp_path / "g.onnx") == GraphMemory(
        weights_bytes=4 * (7 * 11 + 2), row_bytes=100 + 4 * 250 + 4 * 10 + 4 * 2
    )


def test_sizes_that_the_exporter_left_out_are_found(tmp_path: Path) -> None:
    """Find the sizes of attention's scores, [batch, 2, 16, 16], behind a reshape whose shape is computed."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["q"]),
        helper.make_node("Transpose", ["q"], ["k"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"]),
        helper.make_node("MatMul", ["weights", "q"], ["y"]),
    ]
    unknown = [info(name, TensorProto.FLOAT, [None] * 4) for name in ("q", "k", "scores", "weights")]
    shape = ["batch", 2, 16, 1]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, shape)], [info("y", TensorProto.FLOAT, shape)],
        value_info=[info("shape", TensorProto.INT64, [4]), *unknown],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    scores = 4 * 2 * 16 * 16
    assert graph_memory(tmp_path / "g.onnx").row_bytes == 2 * scores + 4 * 2 * 16  # and x, which stays


# A repository's


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_a_repositorys_manifest_has_every_engines_need(export: Path, tmp_path: Path, runtime: str) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy(runtime=runtime))
    for model in ("denoise", "vae_encoder", "vae_decoder"):
        memory = Manifest.read(tmp_path / "repository" / model / "1").memory
        assert tuple(memory) == ENGINES
        assert list(memory["unet"].run_bytes) == [1, 2, 4, 8, 16] and list(memory["vae_decoder"].run_bytes) == [
            1,
            2,
            4,
            8,
        ]
        assert memory["unet"].run_bytes[16] == 16 * memory["unet"].run_bytes[1] > 0
    assert Manifest.read(export).memory == {}


def test_every_process_is_added_up(manifest: Manifest) -> None:
    found = needs(described(manifest, 1.0, 0.1), ServingPolicy(rows_at_once=1))
    assert sorted(need.model for need in found) == ["denoise", "tritonserver", "vae_decoder", "vae_encoder"]
    by_model = {need.model: need.memory for need in found}
    assert by_model["denoise"] > by_model["vae_decoder"] + GB  # two engines
    assert by_model["vae_encoder"] == by_model["vae_decoder"] + ServingPolicy().cache_bytes
    assert all(need.address_space > need.memory for need in found)


def test_more_rows_take_more_and_openvino_weights_for_each_bucket(manifest: Manifest) -> None:
    large = described(manifest, 1.0, 0.1)
    rows = [total_gb(large, runtime="onnxruntime", rows_at_once=count) for count in (1, 2, 4)]
    assert rows[1] - rows[0] == pytest.approx(4 * 0.125) and rows[2] - rows[1] == pytest.approx(4 * 0.25)
    buckets = [total_gb(large, runtime="openvino", rows_at_once=count) for count in (1, 2)]
    assert buckets[1] - buckets[0] == pytest.approx(4 * (1.0 + 0.25))
    assert total_gb(large, rows_at_once=4, deterministic=True) == pytest.approx(rows[2]), "it runs whole batches"
    deterministic = total_gb(large, runtime="openvino", rows_at_once=2, deterministic=True)
    assert deterministic == pytest.approx(buckets[0])


def test_what_openvino_cannot_keep_holds_its_weights_twice(manifest: Manifest) -> None:
    large, policy = described(manifest, 1.0, 0.1), ServingPolicy(runtime="openvino", rows_at_once=1)
    kept, unkept = (
        {need.model: need.memory for need in needs(large, policy, keeps_compiled)} for keeps_compiled in (True, False)
    )
    assert unkept["denoise"] - kept["denoise"] == GB  # two engines, of which the first start compiles one at a time
    assert unkept["vae_decoder"] == kept["vae_decoder"]


def test_a_repository_keeps_what_is_compiled_beside_what_its_name_links_to(export: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "repository").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk.compiled" / "another's").mkdir(parents=True)
    assemble(export, tmp_path / "repository", ServingPolicy(runtime="openvino"))
    manifest = Manifest.read(export)
    assert keeps_compiled(tmp_path / "repository", manifest) and keeps_compiled(tmp_path / "disk", manifest)
    assert (tmp_path / "disk.compiled" / "another's").is_dir()
    shutil.copytree(tmp_path / "disk", tmp_path / "copy")
    assert not keeps_compiled(tmp_path / "copy", manifest)
    assert not compiled_folder(Path("/"), manifest, "unet").exists()


def test_a_process_of_torchs_holds_the_whole_checkpoint(manifest: Manifest) -> None:
    large, empty = described(manifest, 1.0, 0.0), described(manifest, 0.0, 0.0)
    assert total_gb(large, runtime="torch") - total_gb(empty, runtime="torch") == pytest.approx(3 * 4)


def test_onnx_runtime_holds_weights_twice_and_maps_the_engines_files(manifest: Manifest) -> None:
    policy = ServingPolicy(runtime="onnxruntime")
    with_weights, without = (needs(described(manifest, weights, 0.0), policy) for weights in (1.0, 0.0))
    for need, bare in zip(with_weights, without, strict=True):
        engines = {"tritonserver": 0, "denoise": 2}.get(need.model, 1)
        assert need.memory - bare.memory == need.address_space - bare.address_space == engines * 2 * GB
    files = {name: file.size_bytes for name, file in manifest.engines.items()}
    encoder, decoder = (
        next(need.address_space - need.memory for need in without if need.model == name)
        for name in ("vae_encoder", "vae_decoder")
    )
    assert encoder - decoder == files["vae_encoder"] - files["vae_decoder"] != 0


def test_address_space_holds_openvinos_mapped_weights_for_each_bucket(manifest: Manifest) -> None:
    policy = ServingPolicy(runtime="openvino", rows_at_once=4)
    by_model = [
        {need.model: need.address_space - need.memory for need in needs(described(manifest, weights, 0.0), policy)}
        for weights in (1.0, 0.0)
    ]
    assert by_model[0]["vae_decoder"] - by_model[1]["vae_decoder"] == 3 * GB  # of 1, 2 and 4 rows
    assert by_model[0]["denoise"] - by_model[1]["denoise"] == 2 * 3 * GB


# What fits


def test_with_enough_memory_nothing_is_changed(manifest: Manifest) -> None:
    policy = ServingPolicy(runtime="openvino")
    assert fit(described(manifest, 1.0, 0.1), policy, PLENTY)[0] == policy


def test_rows_are_given_up_before_slots(manifest: Manifest) -> None:
    large, policy = described(manifest, 1.0, 0.5), ServingPolicy()
    chosen = []
    for rows in (16, 8, 4, 2, 1):
        need_gb = total_gb(large, rows_at_once=rows)
        fitted, found = fit(large, policy, Room(int(need_gb * GB) + 1, "this machine"))
        assert sum(need.memory for need in found) == pytest.approx(need_gb * GB)
        chosen.append((fitted.rows_at_once, fitted.slots))
    assert chosen == [(16, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    fitted, _ = fit(large, policy, Room(int(total_gb(large, rows_at_once=1, slots=4) * GB) + 1, "this machine"))
    assert (fitted.rows_at_once, fitted.slots) == (1, 4)


def test_too_little_is_refused_with_both_numbers(manifest: Manifest) -> None:
    large, policy = described(manifest, 3.0, 0.5), ServingPolicy(runtime="openvino")
    least_gb = total_gb(large, runtime="openvino", rows_at_once=1, slots=2)
    with pytest.raises(NotEnoughMemory) as refusal:
        fit(large, policy, Room(8 * GB, "control group /portraits"))
    text = str(refusal.value)
    assert f"demo-128 on openvino needs {least_gb:.1f} GB of memory" in text and "denoise" in text
    assert "control group /portraits has 8.0 GB left; end other programs, allow it more" in text and "\n" not in text


def test_address_space_is_each_process_own(manifest: Manifest) -> None:
    large, policy = described(manifest, 3.0, 0.5), ServingPolicy(runtime="openvino")
    with pytest.raises(NotEnoughMemory, match=r"denoise needs [\d.]+ GB of address space, and ulimit -v allows 8.0 GB"):
        fit(large, policy, Room(10**15, "this machine", address_bytes=8 * GB))
    fit(large, policy, Room(10**15, "this machine", address_bytes=10**12))


def test_a_summary_says_what_runs_and_both_numbers(manifest: Manifest) -> None:
    large = described(manifest, 1.0, 0.1)
    deterministic = ServingPolicy(runtime="openvino", deterministic=True)
    assert "16 slots, 1 row at once: " in summary(deterministic, [], PLENTY)
    fitted, found = fit(large, ServingPolicy(runtime="openvino", rows_at_once=1), PLENTY)
    total = sum(need.memory for need in found) / GB
    assert summary(fitted, found, Room(20 * GB, "this machine")) == (
        f"openvino with 16 slots, 1 row at once: needs up to {total:.1f} GB of the 20.0 GB that this machine has left"
    )


# Shared memory


def test_a_containers_usual_64_mb_of_shared_memory_are_enough(export: Path, tmp_path: Path) -> None:
    for preset in (DEMO_128, SD15_512):
        needed = shared_memory(write_trivial_export(tmp_path, preset), ServingPolicy())
        batches = preset.max_vae_batch * 2 * preset.image_size**2 * 3
        assert batches < needed < 64 * 2**20


def test_too_little_shared_memory_is_refused_with_both_numbers(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy())
    policy = ServingPolicy(max_queued_slots=10_000)
    needed = shared_memory(Manifest.read(tmp_path / "repository" / "denoise" / "1"), policy)
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(icportrait.deploy.preflight.shutil, "disk_usage", lambda _: usage._replace(free=needed - 2**20))
    with pytest.raises(NotEnoughMemory) as refusal:
        check_shared_memory(tmp_path / "repository", policy)
    text = str(refusal.value)
    assert f"{needed / 2**20 - 1:.0f} MB left" in text and f"up to {needed / 2**20:.0f} MB" in text
    assert "--shm-size" in text and "\n" not in text
    check_shared_memory(tmp_path / "repository", ServingPolicy())
    half = ServingPolicy(max_queued_slots=5_000)
    check_shared_memory(tmp_path / "repository", half)
    with pytest.raises(NotEnoughMemory):
        check_shared_memory(tmp_path / "repository", half, engines=3)
    check_shared_memory(tmp_path, policy)  # no repository of ours


# Start-up


def test_a_server_that_does_not_fit_is_refused_in_one_line(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy())
    monkeypatch.setattr(icportrait.deploy.preflight, "room", lambda: Room(GB // 10, "this machine"))
    arguments = [f"--{name}-port={port}" for name, port in (("grpc", 17001), ("http", 17002), ("metrics", 17003))]
    assert serve(["--repository", str(tmp_path / "repository"), *arguments]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: demo-128 on onnxruntime needs ") and "this machine has 0.1 GB left" in error


def test_engines_that_share_a_machine_share_its_memory(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy())
    policy = repository_policy(tmp_path / "repository")
    needed = sum(need.memory for need in needs(Manifest.read(tmp_path / "repository" / "denoise" / "1"), policy))
    monkeypatch.setattr(icportrait.deploy.preflight, "room", lambda: Room(2 * needed, "this machine"))
    fitted, said = fit_memory(tmp_path / "repository", policy, engines=2)
    assert fitted == policy and said.endswith("each of 2 engines on this machine has left")
    monkeypatch.setattr(icportrait.deploy.preflight, "room", lambda: Room(2 * needed - 2, "this machine"))
    fitted, _ = fit_memory(tmp_path / "repository", policy, engines=2)
    assert fitted.rows_at_once < policy.rows_at_once


def test_what_start_up_chose_goes_before_what_the_repository_says(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(export, tmp_path / "repository", ServingPolicy(slots=8))
    config = {"name": "denoise", "input": [], "parameters": {"slots": {"string_value": "8"}}}
    arguments = {
        "model_config": json.dumps(config),
        "model_repository": str(tmp_path / "repository" / "denoise"),
        "model_version": "1",
    }
    assert ModelContext(arguments).policy == ServingPolicy(slots=8)
    monkeypatch.setenv(POLICY_VARIABLE, json.dumps({"slots": "4", "rows_at_once": "2"}))
    assert ModelContext(arguments).policy == ServingPolicy(slots=4, rows_at_once=2)


# Which runtime


def test_the_command_takes_the_presets_runtime(tmp_path: Path) -> None:
    for preset, runtime, rows in ((DEMO_128, "onnxruntime", 16), (SD15_512, "openvino", 1)):
        write_trivial_export(tmp_path / "export", preset)
        repository = tmp_path / preset.name
        assert main(["--export", str(tmp_path / "export"), "--out", str(repository)]) == 0
        policy = repository_policy(repository)
        assert (policy.runtime, policy.rows_at_once) == (runtime, rows)
        assert ServingPolicy(**cpu_defaults(preset, "fp16")).runtime == runtime
        assert ServingPolicy(**cpu_defaults(preset, "int8")).runtime == "onnxruntime"
    assert main(["--export", str(tmp_path / "export"), "--out", str(tmp_path / "torch"), "--runtime", "torch"]) == 0
    assert repository_policy(tmp_path / "torch").rows_at_once == 16, "on a GPU batches are worth having"
