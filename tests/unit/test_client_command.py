"""The commands ``batch``, ``health``, ``info`` and ``verify``; ``generate`` and ``sweep`` have files of their own."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client import InvalidRequest
from icportrait_client import marks as marks_module
from icportrait_client.batch import Pair, read_pairs
from icportrait_client.cli import main
from icportrait_client.marks import Manifest, Marks, read_marks
from icportrait_client.testing import Call, FakePortraitServer

from icportrait import __version__
from icportrait.gateway import c2pa_signing
from icportrait.gateway.c2pa_signing import Credentials, Ingredient
from icportrait.pictures.imaging import encode_picture
from tests.certificates import make_chain
from tests.conftest import EXAMPLES

WAIT_S = 60
PIXELS = np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8)
FORMATS = pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
PROFILE, REFERENCE = EXAMPLES / "hopper.jpg", EXAMPLES / "astronaut.jpg"


@pytest.fixture
def server() -> Iterator[FakePortraitServer]:
    with FakePortraitServer() as server:
        yield server


@pytest.fixture
def run(server: FakePortraitServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str | Path) -> tuple[int, str, str]:
        code = main([*map(str, words), "--url", server.address])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def pair_folder(folder: Path, names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / f"{name}-profile.jpg").symlink_to(PROFILE)
        (folder / f"{name}_reference.JPG").symlink_to(REFERENCE)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text.replace("P,", f"{PROFILE},").replace("R,", f"{REFERENCE},"))
    return path


# batch


def test_a_folder_of_pairs_becomes_a_folder_of_portraits(run: Any, server: FakePortraitServer, tmp_path: Path) -> None:
    pairs, out = pair_folder(tmp_path / "pairs", "abc"), tmp_path / "out"
    code, text, _ = run("batch", pairs, "-o", out, "--seed", "7", "--format", "jpeg", "--json")
    assert code == 0
    assert {name: json.loads(text)[name] for name in ("made", "skipped", "failed", "total")} == {
        "made": 3,
        "skipped": 0,
        "failed": 0,
        "total": 3,
    }
    assert files(out) == ["a.jpg", "b.jpg", "batch.jsonl", "c.jpg"]
    assert {call.inputs["seed"] for call in server.calls} == {7}
    assert server.calls[0].inputs["profile"] == PROFILE.read_bytes()
    notes = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]
    assert {note["name"]: note["files"] for note in notes} == {name: [f"{name}.jpg"] for name in "abc"}
    assert notes[0]["metadata"]["seed"] == 7


def test_a_second_run_makes_what_is_missing_or_changed_only(
    run: Any, server: FakePortraitServer, tmp_path: Path
) -> None:
    pairs, out = pair_folder(tmp_path / "pairs", "abcd"), tmp_path / "out"
    assert run("batch", pairs, "-o", out)[0] == 0
    (out / "b.png").unlink()
    (pairs / "c-profile.jpg").unlink()
    (pairs / "c-profile.jpg").symlink_to(REFERENCE)
    with (out / "batch.jsonl").open("a") as notes:
        notes.write('{"name": "d", "requ')  # cut when the machine went down
    server.calls.clear()
    code, text, _ = run("batch", pairs, "-o", out)
    assert (code, len(server.calls)) == (0, 2)
    assert [re.split(r"\s{2,}", line) for line in text.splitlines()] == [
        ["made", "2"],
        ["there before", "2"],
        ["failed", "0"],
    ]
    server.calls.clear()
    assert run("batch", pairs, "-o", out, "--steps", "3")[0] == 0
    assert len(server.calls) == 4


def test_rows_have_names_and_options_of_their_own(run: Any, server: FakePortraitServer, tmp_path: Path) -> None:
    rows = "profile,reference,name,seed,num_portraits,profile_box\nP,R,x,1,,\nP,R,y,2,2,0 0 0.5 1\n"
    assert run("batch", write_csv(tmp_path / "rows.csv", rows), "-o", tmp_path / "out", "--steps", "3")[0] == 0
    assert files(tmp_path / "out") == ["batch.jsonl", "x.png", "y-1.png", "y-2.png"]
    sent = {call.inputs["seed"]: call.inputs for call in server.calls}
    assert (sent[1]["num_inference_steps"], sent[2]["num_inference_steps"]) == (3, 3)
    assert sent[2]["profile_box"] == (0, 0, 0.5, 1)
    assert "profile_box" not in sent[1]


def test_pairs_that_would_write_one_file_are_refused(run: Any, server: FakePortraitServer, tmp_path: Path) -> None:
    rows = "profile,reference,name,num_portraits\nP,R,a,2\nP,R,a-2,\n"
    code, _, err = run("batch", write_csv(tmp_path / "rows.csv", rows), "-o", tmp_path / "out")
    assert (code, server.calls) == (1, [])
    assert "error: name: 'a' and 'a-2' would both write a-2.png; give them other names" in err


def test_failures_are_listed_with_their_error_and_tried_again(
    run: Any, server: FakePortraitServer, tmp_path: Path
) -> None:
    rows = "profile,reference,name\nP,R,good\nP,no/such.jpg,lost\nP,R,unlucky\n"
    pairs = write_csv(tmp_path / "rows.csv", rows)
    command = ("batch", pairs, "-o", tmp_path / "out", "--concurrency", "1")

    def answer(call: Call) -> bytes:
        if len(server.calls) == 2:
            raise ValueError("unlucky")
        return PROFILE.read_bytes()

    server.answer = answer
    code, text, _ = run(*command)
    assert code == 3
    assert f"listed in {tmp_path / 'out' / 'failed.csv'}" in text
    with (tmp_path / "out" / "failed.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["name"], row["error"]) for row in found] == [("lost", "InvalidRequest"), ("unlucky", "ServerError")]
    assert "no/such.jpg' can't be read (No such file or directory)" in found[0]["text"]
    pairs.write_text(pairs.read_text().replace("no/such.jpg", str(REFERENCE)))
    assert run(*command)[0] == 0
    assert files(tmp_path / "out") == ["batch.jsonl", "good.png", "lost.png", "unlucky.png"]


def test_what_all_pairs_would_meet_ends_the_run(run: Any, server: FakePortraitServer, tmp_path: Path) -> None:
    server.fail("UNAUTHENTICATED", "UNAUTHENTICATED: no valid API key", times=99)
    code, text, err = run(
        "batch", pair_folder(tmp_path / "pairs", "abcdef"), "-o", tmp_path / "out", "--concurrency", "2"
    )
    assert (code, text) == (1, "")
    assert err == (
        f"0 of 6 portraits are in {tmp_path / 'out'}; run again for the rest\n"
        f"error: {server.address}: no valid API key\n"
    )
    assert len(server.calls) <= 2


def test_a_batch_that_is_interrupted_cancels_and_is_finished_later(
    run: Any, server: FakePortraitServer, tmp_path: Path
) -> None:
    pairs, out = pair_folder(tmp_path / "pairs", "abcde"), tmp_path / "out"
    pause = threading.Event()

    def answer(call: Call) -> bytes:
        if len(server.calls) == 3:
            server.delay_s = WAIT_S
        return PROFILE.read_bytes()

    server.answer = answer
    script = "import sys; from icportrait_client.cli import main; sys.exit(main())"
    words = ["batch", str(pairs), "-o", str(out), "--concurrency", "1", "--seed", "7"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words, "--url", server.address],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(server.calls) < 4:
            assert process.poll() is None
            pause.wait(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == f"3 of 5 portraits are in {out}; run again for the rest\nerror: interrupted\n"
    while not server.cancelled:
        pause.wait(0.01)
    assert files(out) == ["a.png", "b.png", "batch.jsonl", "c.png", "failed.csv"]
    server.delay_s, server.answer = 0, None
    server.calls.clear()
    assert run(*words)[0] == 0
    assert len(server.calls) == 2
    assert files(out) == ["a.png", "b.png", "batch.jsonl", "c.png", "d.png", "e.png"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("profile,name\na.jpg,b\n", "no column reference, expected profile and reference"),
        ("profile,reference,sede\na,b,1\n", "column 'sede', expected name, profile, reference or an option"),
        ("profile,reference,seed\na,b,x\n", "line 2: seed: 'x', expected 0..9223372036854775807"),
        ("profile,reference,seed\na,b,-1\n", "line 2: seed: -1, expected 0..9223372036854775807"),
        ("profile,reference\na\n", "line 2: expected 2 columns"),
        ("profile,reference\na,\n", "line 2: reference is empty, expected a picture's path"),
        ("profile,reference,name\na,b,../x\n", "name: '../x', expected a file's name"),
        ("profile,reference\na.jpg,b\na.png,c\n", "name: 'a' is there twice"),
        ("profile,reference\n", "no pairs"),
    ],
)
def test_a_wrong_list_is_found_before_anything_is_sent(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        read_pairs(tmp_path / "rows.csv")


def test_paths_in_a_list_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\ufeffprofile,reference\npictures/anna.jpg,/light.jpg\n")
    assert read_pairs(tmp_path / "rows.csv") == [Pair("anna", tmp_path / "pictures/anna.jpg", Path("/light.jpg"))]


def test_a_picture_without_its_partner_is_named(tmp_path: Path) -> None:
    folder = pair_folder(tmp_path / "pairs", "ab")
    (folder / "b_reference.JPG").unlink()
    with pytest.raises(InvalidRequest, match=r"pairs': b: expected a profile and a reference, and found one of them"):
        read_pairs(folder)


# generate


def test_every_preview_is_kept_in_a_folder(run: Any, server: FakePortraitServer, tmp_path: Path) -> None:
    pictures = ("--profile", PROFILE, "--reference", REFERENCE, "-o", tmp_path / "out.png")
    assert run("generate", *pictures, "--preview-dir", tmp_path / "previews", "--steps", "12")[0] == 0
    assert files(tmp_path / "previews") == ["out-step-05.png", "out-step-10.png"]
    assert run("generate", *pictures, "--preview-dir", tmp_path / "all", "--steps", "3", "--preview-every", "1")[0] == 0
    assert files(tmp_path / "all") == ["out-step-1.png", "out-step-2.png"]


# health and info


def test_health_tells_each_servers_own(
    run: Any, server: FakePortraitServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run("health")
    assert code == 0
    assert re.fullmatch(rf"{server.address}  ready  [\d.]+ ms\n", text)
    server.is_ready = False
    code, text, _ = run("health")
    assert (code, text) == (3, f"{server.address}  not ready  the server takes no requests now\n")
    assert main(["health", "--url", f"{server.address},127.0.0.1:1", "--json"]) == 3
    first, second = json.loads(capsys.readouterr().out)
    assert (first["is_live"], first["is_ready"]) == (True, False)
    assert (second["is_live"], second["answer_ms"]) == (False, None)
    assert second["reason"].startswith("no server answers")


def test_info_tells_versions_and_limits(run: Any, server: FakePortraitServer) -> None:
    code, text, _ = run("info")
    assert code == 0
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if line)
    assert (rows["server"], rows["engine"], rows["numerics_id"]) == (server.address, "fake", "fake")
    assert (rows["slots"], rows["num_inference_steps"]) == ("64", "1..150")
    assert server.calls[-1].inputs["num_inference_steps"] == 1
    server.calls.clear()
    code, text, _ = run("info", "--no-portrait", "--json")
    (found,) = json.loads(text)["servers"]
    assert (code, found["server"], found["metadata"], server.calls) == (0, "fake", None, [])
    assert found["settings"] == {"slots": "64"}


def test_info_of_a_server_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--url", "127.0.0.1:1", "--timeout", "5"]) == 1
    assert capsys.readouterr().err.startswith("error: 127.0.0.1:1: no server answers")


# verify


@pytest.fixture(scope="module")
def signed() -> Iterator[dict[str, bytes]]:
    """Return a signed portrait of each format."""
    chain = make_chain()
    c2pa_signing.begin(Credentials(chain.certificates, chain.key, "es256", None))
    inputs = Ingredient("profile"), Ingredient("reference")
    yield {name: c2pa_signing.encode_and_sign(PIXELS, name, inputs).file for name in ("png", "jpeg", "webp")}
    c2pa_signing.begin(None)


@FORMATS
def test_the_mark_of_every_portrait_is_read(output_format: str) -> None:
    marks = read_marks(encode_picture(PIXELS, output_format))
    assert marks == Marks("trainedAlgorithmicMedia")
    assert marks.is_generated


@FORMATS
def test_a_signed_portrait_says_what_made_it(output_format: str, signed: dict[str, bytes]) -> None:
    marks = read_marks(signed[output_format])
    assert marks.is_generated
    manifest = marks.manifest
    assert manifest
    assert (manifest.state, manifest.source_type) == ("Valid", "trainedAlgorithmicMedia")
    assert manifest.generator == f"IC-Portrait Server {__version__}"
    assert manifest.ingredients == ("profile", "reference")
    assert manifest.signer


@FORMATS
def test_a_manifest_is_found_without_the_package(
    output_format: str, signed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks_module.importlib.util, "find_spec", lambda _: None)
    assert read_marks(signed[output_format]) == Marks("trainedAlgorithmicMedia", Manifest())


def test_a_changed_portrait_is_no_longer_vouched_for(signed: dict[str, bytes]) -> None:
    changed = bytearray(signed["jpeg"])
    changed[-40] ^= 1
    marks = read_marks(bytes(changed))
    assert marks.manifest and marks.manifest.problems
    assert not marks.is_generated


@pytest.mark.parametrize(
    ("xmp", "term"),
    [
        (b'<d x:DigitalSourceType="https://cv.iptc.org/newscodes/digitalsourcetype/algorithmicMedia"/>', True),
        (
            b'<x:DigitalSourceType rdf:resource="http://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic"/>',
            True,
        ),
        (b"<x:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture</x:D>", False),
        (b"<dc:title>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</dc:title>", False),
    ],
)
def test_other_writers_forms_of_the_mark(tmp_path: Path, xmp: bytes, term: bool) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "x.jpg", xmp=xmp)
    assert read_marks((tmp_path / "x.jpg").read_bytes()).is_generated == term


def test_verify_prints_a_verdict_for_each_picture(
    signed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("signed.png").write_bytes(signed["png"])
    Path("photo.jpg").write_bytes(PROFILE.read_bytes())
    Path("text.jpg").write_text("no picture")
    assert main(["verify", "signed.png"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert (first, lines[0]) == ("signed.png: marked as generated", "  IPTC  trainedAlgorithmicMedia")
    assert re.match(
        rf"  C2PA  valid, trainedAlgorithmicMedia, by IC-Portrait Server {__version__}, signed by ", lines[1]
    )
    assert main(["verify", "signed.png", "photo.jpg", "text.jpg", "no.jpg"]) == 3
    out = capsys.readouterr().out
    assert "photo.jpg: not marked as generated\ntext.jpg: can't be read as a picture" in out
    assert "no.jpg: can't be read (No such file or directory)" in out
    assert main(["verify", "--json", "signed.png", "no.jpg"]) == 3
    known, unknown = json.loads(capsys.readouterr().out)
    assert (known["is_generated"], known["manifest"]["state"]) == (True, "Valid")
    assert (unknown["is_generated"], "can't be read" in unknown["error"]) == (False, True)


def test_a_broken_manifest_outweighs_the_other_mark() -> None:
    marks = Marks("trainedAlgorithmicMedia", Manifest("Valid", source_type="trainedAlgorithmicMedia"))
    assert marks.is_generated
    assert marks.manifest
    assert not replace(marks, manifest=replace(marks.manifest, state="Invalid")).is_generated
