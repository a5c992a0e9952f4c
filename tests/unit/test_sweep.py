"""``icportrait sweep`` with a client that answers each reference with a colour of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from icportrait_client import Metadata, Portrait, PortraitClient, ServerUnavailable
from icportrait_client.cli import main
from icportrait_client.sweep import CALLS_AT_ONCE, LIGHTS, ROWS, YAWS, strip, sweep
from PIL import Image, PngImagePlugin

SIDE = 48
LABEL, GAP = SIDE // 6, SIDE // 8
LARGE = 2 * SIDE + LABEL
SIZE = (LARGE + GAP + 8 * SIDE, 2 * (SIDE + LABEL))
REFERENCES = [reference for row in ROWS for reference in row]
NUMBER = {reference.read(): number for number, reference in enumerate(REFERENCES)}
XMP = "<x:xmpmeta>made by a model</x:xmpmeta>"


def colour(number: int) -> tuple[int, int, int]:
    return (10 + 14 * number, 250 - 14 * number, 90)


def encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


class FakeClient:
    """Answers with ``colour`` of the reference; its server cuts the right half out of the profile."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.before_answer = lambda count: None
        self._lock = threading.Lock()

    def generate(self, **request: Any) -> Portrait:
        with self._lock:
            self.requests.append(request)
            count = len(self.requests)
        self.before_answer(count)
        mark = PngImagePlugin.PngInfo()
        mark.add_itxt("XML:com.adobe.xmp", XMP)
        image = encoded(Image.new("RGB", (SIDE, SIDE), colour(NUMBER[request["reference"]])), pnginfo=mark)
        crops = {"profile": {"box": [0.5, 0.0, 1.0, 1.0], "source": "given"}}
        return Portrait((image,), Metadata.read({"seed": request["seed"], "crops": crops}))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(PortraitClient, "generate", lambda _, **request: fake.generate(**request))
    return fake


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Draw two squares side by side: red and blue."""
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))
    picture.save(tmp_path / "profile.png")
    return tmp_path / "profile.png"


def cell(row: int, column: int) -> tuple[int, int]:
    """Return the middle of a portrait in the strip."""
    return LARGE + GAP + column * SIDE + SIDE // 2, row * (SIDE + LABEL) + LABEL + SIDE // 2


def test_the_strip_shows_the_profiles_crop_and_every_portrait_in_its_place(client: FakeClient, profile: Path) -> None:
    picture = strip(profile, sweep(client.generate, profile, {"seed": 1}))
    assert picture.size == SIZE
    for row in range(2):
        for column in range(8):
            assert picture.getpixel(cell(row, column)) == colour(8 * row + column)
    shown = picture.crop((0, LABEL, LARGE, SIZE[1]))
    assert shown.getcolors() == [(LARGE * LARGE, (0, 0, 255))], "the right half, which the server used"


def test_every_cell_has_its_label(client: FakeClient, profile: Path) -> None:
    assert [reference.label for reference in (LIGHTS[0], YAWS[-1])] == ["light -70°", "yaw +35°"]
    picture = strip(profile, sweep(client.generate, profile, {"seed": 1})).convert("L")
    labels = [
        picture.crop((x - SIDE // 2, y - SIDE // 2 - LABEL, x + SIDE // 2, y - SIDE // 2))
        for x, y in (cell(row, column) for row in range(2) for column in range(8))
    ]
    assert all(label.getextrema()[0] < 128 < label.getextrema()[1] for label in labels)
    assert len({label.tobytes() for label in labels}) == 16


def test_the_profile_is_shown_upright(client: FakeClient, profile: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turn by half to show
    with Image.open(profile) as picture:
        picture.save(tmp_path / "turned.png", exif=exif)
    picture = strip(tmp_path / "turned.png", sweep(client.generate, profile, {"seed": 1}))
    assert picture.getpixel((LARGE // 2, SIZE[1] // 2)) == (255, 0, 0)


def test_the_requests_differ_in_the_reference_alone(client: FakeClient, profile: Path, tmp_path: Path) -> None:
    options = "--seed 7 --steps 3 --guidance-scale 2 --guidance-interval 0.2 0.6 --mask-ratio 0.5"
    options += " --scheduler ddim --priority 2 --deadline-ms 9000 --profile-box 0 0 0.5 1"
    arguments = ["sweep", f"--profile={profile}", "--out", str(tmp_path / "o.png"), *options.split()]
    assert main(arguments) == 0
    assert {NUMBER[request.pop("reference")] for request in client.requests} == set(range(16))
    assert client.requests == 16 * [
        {
            "profile": profile.read_bytes(),
            "seed": 7,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "guidance_interval": [0.2, 0.6],
            "mask_ratio": 0.5,
            "scheduler": "ddim",
            "priority": 2,
            "deadline_ms": 9000,
            "profile_box": [0.0, 0.0, 0.5, 1.0],
            "reference_box": (0.0, 0.0, 1.0, 1.0),
            "output_format": "png",
        }
    ]


def test_one_seed_is_drawn_for_all_and_told(
    client: FakeClient, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.png"
    assert main(["sweep", "--profile", str(profile), "-o", str(out)]) == 0
    (seed,) = {request["seed"] for request in client.requests}
    printed, progress = capsys.readouterr()
    rows = [line.split() for line in printed.splitlines()]
    assert rows[0] == [str(out), f"{out.stat().st_size / 1000:.1f}", "kB"]
    assert (rows[1][:2], rows[1][-1]) == (["16", "portraits"], "s")
    assert rows[2] == ["seed", str(seed)]
    assert progress.splitlines() == [f"{count:2} of 16 portraits" for count in range(1, 17)]


def test_metadata_as_json(
    client: FakeClient, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.png"
    assert main(["sweep", "--profile", str(profile), "-o", str(out), "--json", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [str(out)]
    told = [{reference.kind: reference.degrees, "seed": 3} for reference in REFERENCES]
    assert [{key: value for key, value in each.items() if key != "crops"} for each in printed["portraits"]] == told


@pytest.mark.parametrize(
    ("name", "written"), [("o.png", "PNG"), ("o.jpg", "JPEG"), ("o.webp", "WEBP"), ("o", "PNG"), (None, "PNG")]
)
def test_the_strip_is_marked_as_generated_in_every_format(
    client: FakeClient, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--profile", str(profile), *(["-o", name] if name else [])]) == 0
    with Image.open(tmp_path / (name or "sweep.png")) as picture:
        assert (picture.format, picture.size) == (written, SIZE)
        assert picture.info["xmp"] == XMP.encode()


def test_several_requests_are_under_way_at_once(client: FakeClient, profile: Path) -> None:
    together = threading.Barrier(CALLS_AT_ONCE, timeout=10)
    client.before_answer = lambda count: together.wait() and None
    assert list(sweep(client.generate, profile, {"seed": 1})) == REFERENCES


def test_after_an_error_nothing_more_is_sent_or_written(
    client: FakeClient, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def fail_once(count: int) -> None:
        if count == 1:
            raise ServerUnavailable("host:1: full\ntry later")
        over.wait(10)

    client.before_answer = fail_once
    assert main(["sweep", "--profile", str(profile), "-o", str(tmp_path / "o.png")]) == 1
    sent = len(client.requests)
    over.set()
    assert sent <= CALLS_AT_ONCE + 1
    assert capsys.readouterr() == ("", "error: host:1: full try later\n")
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "no/such.jpg"], "profile: 'no/such.jpg' can't be read (No such file or directory)"),
        (["-o", "no/such/o.png"], "--output: 'no/such/o.png', expected a file's path in a directory that exists"),
        (["--url", "http://localhost:8001"], "url: 'http://localhost:8001', expected host:port"),
        (["--timeout", "0"], "timeout_s: 0, expected a number of seconds above 0"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    client: FakeClient, profile: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["sweep", "--profile", str(profile), *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not client.requests


def test_an_option_out_of_range_is_told_in_one_line(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--profile", str(profile), "--steps", "500"]) == 1
    assert capsys.readouterr() == ("", "error: num_inference_steps: 500, expected 1..150\n")


def test_a_profile_that_only_the_server_could_read(
    client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd").write_bytes(b"\xff\xd8\xff no picture")
    assert main(["sweep", "--profile", str(tmp_path / "odd"), "-o", str(tmp_path / "o.png")]) == 1
    assert "\nerror: profile: the server could read it, this computer can't (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: --profile"),
        (["--profile=a", "--num-portraits", "2"], "error: unrecognized arguments: --num-portraits 2"),
        (["--profile=a", "--reference=b"], "error: unrecognized arguments: --reference=b"),
        (["--profile=a", "-o", "o.gif"], "error: --output: suffix is .gif, expected one of png, jpeg, webp, or the fo"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from icportrait_client.cli import main\n"
        "try: main(['sweep', '--help'])\n"
        "finally: print(sorted({'numpy', 'PIL', 'grpc', 'tritonclient'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert "(default: sweep.png)" in done.stdout
    assert done.stdout.endswith("[]\n")
