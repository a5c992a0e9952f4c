"""Faces are found however they are held, and pictures without one are cropped to their middle."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icportrait.errors import RuntimeNotAvailable
from icportrait.pictures import faces, finder
from icportrait.pictures.__main__ import main
from icportrait.pictures.faces import Crop, find_crop
from icportrait.pictures.finder import Face, find_faces
from icportrait.pictures.imaging import decode_picture
from icportrait.pictures.prepare import prepare
from tests.conftest import EXAMPLES, ROOT

# Where the faces are in the examples, from looking at them: forehead to chin.
FACES = {"astronaut.jpg": (178, 62, 270, 176), "hopper.jpg": (177, 112, 357, 340)}
PHOTOGRAPHS = pytest.mark.parametrize("file", FACES)


def example(file):
    return decode_picture((EXAMPLES / file).read_bytes(), "profile")


def iou(a, b):
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, across) * max(0, down)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def turned(x, y, radians):
    """Turn a point of a 512 px picture clockwise about the picture's middle."""
    return 256 + x * math.cos(radians) - y * math.sin(radians), 256 + x * math.sin(radians) + y * math.cos(radians)


def largest(picture):
    found = find_faces(picture)
    assert found, "no face was found"
    return found[0].box


def scene(*pasted):
    """Put pictures at places in a wide, plain one."""
    whole = Image.new("RGB", (800, 600), (90, 110, 90))
    for picture, place in pasted:
        whole.paste(picture, place)
    return whole


class TestFinding:
    @PHOTOGRAPHS
    @pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
    def test_in_pictures_of_any_size(self, file, scale):
        picture = example(file)
        scaled = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        assert iou(np.array(largest(scaled)) / scale, FACES[file]) > 0.8

    @PHOTOGRAPHS
    @pytest.mark.parametrize("degrees", [-45, -20, 20, 45])
    def test_rolled(self, file, degrees):
        """Find rolled faces, of which the frontal cascade found none."""
        picture = example(file)
        x0, y0, x1, y1 = largest(picture.rotate(-degrees, Image.Resampling.BICUBIC, center=(256, 256)))
        face, turn = FACES[file], math.radians(degrees)
        x, y = (face[0] + face[2]) / 2 - 256, (face[1] + face[3]) / 2 - 256
        height = face[3] - face[1]
        assert math.dist(((x0 + x1) / 2, (y0 + y1) / 2), turned(x, y, turn)) < 0.15 * height
        assert y1 - y0 == pytest.approx(height, rel=0.25)

    def test_turned_to_the_side(self):
        """Find the faces of rendered heads: what is in front of the ears. The frontal cascade found none."""
        torch = pytest.importorskip("torch")
        from training.drawing import FIRST_EVALUATION_SEED, draw_identities, draw_views
        from training.heads import Part, render

        yaws = (-75, -50, 50, 75)
        seeds = [FIRST_EVALUATION_SEED + 12] * len(yaws)
        views = [draw_views(seeds[:1]).turned(yaw) for yaw in yaws]
        rendering = render(draw_identities(seeds), type(views[0]).cat(views))
        skin = rendering.head_mask & (rendering.part != Part.HAIR) & (rendering.canonical_point[..., 2] > 0)
        skin &= rendering.canonical_point[..., 1] > -1.08
        for yaw, image, seen in zip(yaws, rendering.image, skin, strict=True):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            rows, columns = torch.where(seen)
            truth = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert iou(largest(Image.fromarray(pixels)), [int(edge) for edge in truth]) > 0.5, yaw

    @PHOTOGRAPHS
    @pytest.mark.parametrize("margin", [0.0, 0.1])
    def test_that_fill_the_picture(self, file, margin):
        x0, y0, x1, y1 = FACES[file]
        grown = round(margin * (x1 - x0))
        close = example(file).crop((x0 - grown, y0 - grown, x1 + grown, y1 + grown))
        assert iou(largest(close), (grown, grown, grown + x1 - x0, grown + y1 - y0)) > 0.7

    @PHOTOGRAPHS
    @pytest.mark.parametrize("share", [1 / 3, 1 / 2])
    def test_that_the_picture_cuts_off(self, file, share):
        picture, (x0, y0, x1, y1) = example(file), FACES[file]
        cut = round(x0 + share * (x1 - x0))
        part = picture.crop((cut, 0, picture.width, picture.height))
        box = np.clip(largest(part), 0, [*part.size, *part.size])
        assert iou(box, (0, y0, x1 - cut, y1)) > 0.6

    @pytest.mark.parametrize("heights", [8, 12, 20])
    def test_small_ones(self, heights):
        scale = 600 / heights / (340 - 112)
        small = example("hopper.jpg").resize((round(512 * scale), round(600 * scale)), Image.Resampling.LANCZOS)
        truth = np.array(FACES["hopper.jpg"]) * scale + [450, 200, 450, 200]
        assert iou(largest(scene((small, (450, 200)))), truth) > 0.5

    def test_grey_pictures_and_what_is_beside_transparent(self):
        picture = example("astronaut.jpg")
        layers = picture.convert("RGBA")
        layers.putalpha(Image.new("L", picture.size, 0))
        layers.paste(picture.crop((120, 0, 340, 240)), (120, 0))
        for changed in (picture.convert("L"), layers):
            buffer = io.BytesIO()
            changed.save(buffer, "PNG")
            assert iou(largest(decode_picture(buffer.getvalue(), "profile")), FACES["astronaut.jpg"]) > 0.7

    @pytest.mark.parametrize("size", [(5000, 16), (16, 5000), (1, 5000), (41, 41), (3000, 200)])
    def test_none_in_a_picture_of_one_colour(self, size):
        assert find_faces(Image.new("RGB", size, (180, 140, 120))) == []

    def test_none_in_noise_and_patterns(self):
        rng, (rows, columns) = np.random.default_rng(0), np.indices((512, 512))
        pictures = [np.hypot(rows - 256, columns - 256) // 40 % 2 * 255, (rows // 32 + columns // 32) % 2 * 255]
        pictures += [rng.integers(0, 256, (side, side)) for side in (8, 64, 512)]
        for pixels in pictures:
            picture = Image.fromarray(pixels.astype(np.uint8)).convert("RGB").resize((512, 512))
            assert find_faces(picture) == []

    def test_none_beside_a_photographs_face(self):
        picture = example("astronaut.jpg")
        for box in ((272, 0, 512, 512), (0, 230, 512, 512)):
            assert find_faces(picture.crop(box)) == []

    def test_a_strips_copies_are_no_larger_than_others(self, monkeypatch):
        seen, session = [], finder._session()
        monkeypatch.setattr(finder, "_session", lambda: lambda pixels: seen.append(pixels.shape) or session(pixels))
        for size in ((400_000, 20), (5000, 16), (4000, 3000), (512, 512)):
            find_faces(Image.new("RGB", size))
        assert max(rows * columns for *_, rows, columns in seen) <= 1.3 * 384**2
        assert all(rows % 32 == columns % 32 == 0 for *_, rows, columns in seen)


class TestSeveral:
    @pytest.mark.parametrize("left_first", [True, False])
    def test_the_larger_is_first(self, left_first):
        large, small = (example("hopper.jpg").resize(size) for size in ((384, 450), (256, 300)))
        two = scene((large, (20, 80) if left_first else (396, 80)), (small, (500, 200) if left_first else (30, 200)))
        crop = find_crop(two, None, "profile_box")
        assert abs((crop.box[0] + crop.box[2]) / 2 - (221 if left_first else 597)) < 30
        assert crop.faces == 2
        assert crop.to_dict()["face"]["largest_of"] == 2

    def test_scores_weigh(self, monkeypatch):
        boxes = np.array([[0, 0, 100, 100], [200, 0, 290, 90]], np.float32)
        found = boxes, np.array([0.66, 0.95], np.float32), np.zeros((2, 5, 2), np.float32)
        nothing = tuple(values[:0] for values in found)
        looks = iter([found, nothing])
        monkeypatch.setattr(finder, "_look", lambda *_: next(looks))
        assert [face.box[0] for face in find_faces(Image.new("RGB", (400, 200)))] == [200, 0]

    def test_of_boxes_that_overlap_the_best_stays(self):
        boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [6, 0, 16, 10], [0, 20, 10, 30]], np.float32)
        scores = np.array([0.7, 0.9, 0.8, 0.95], np.float32)
        assert finder._best_of_overlapping(boxes, scores) == [3, 1]
        boxes[2] += [1, 0, 1, 0]  # 4 of 16 columns are shared, and not 5 of 15
        assert finder._best_of_overlapping(boxes, scores) == [3, 1, 2]
        assert finder._best_of_overlapping(boxes[:0], scores[:0]) == []


def outputs(columns, rows, **at):
    """Return the outputs of a network that sees nothing, but for one cell of the grid of stride 16."""
    values = {}
    for stride in (8, 16, 32):
        cells = (columns // stride) * (rows // stride)
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            values[f"{name}_{stride}"] = np.zeros((1, cells, width), np.float32)
    for name, value in at.items():
        values[f"{name}_16"][0, 2 * (columns // 16) + 3] = value
    return values


class TestDecoding:
    def test_a_cell_gives_box_score_and_landmarks(self):
        at = {"cls": 0.9, "obj": 0.4, "bbox": [0.5, 0.25, math.log(2), math.log(3)], "kps": [1, 0.5] * 5}
        boxes, scores, landmarks = finder._decoded(outputs(128, 96, **at), 128, 0.5)
        assert scores == pytest.approx([0.6])
        centre_x, centre_y = 16 * 3.5, 16 * 2.25
        np.testing.assert_allclose(boxes, [[centre_x - 16, centre_y - 24, centre_x + 16, centre_y + 24]], rtol=1e-5)
        np.testing.assert_allclose(landmarks, np.full((1, 5, 2), [16 * 4, 16 * 2.5]))

    @pytest.mark.parametrize(("least", "count"), [(0.59, 1), (0.61, 0)])
    def test_what_scores_less_is_none(self, least, count):
        assert len(finder._decoded(outputs(128, 96, cls=0.9, obj=0.4), 128, least)[1]) == count

    @pytest.mark.parametrize(("mouth", "degrees"), [((0, 10), 0), ((-10, 10), 45), ((10, 10), -45), ((-10, 0), 90)])
    def test_roll_is_positive_where_the_head_leans_to_the_right(self, mouth, degrees):
        x, y = mouth
        landmarks = np.array([[-3, 0], [3, 0], [0, 5], [x - 2, y], [x + 2, y]], np.float32)
        assert finder._roll_degrees(landmarks) == pytest.approx(degrees)

    def test_a_photograph_that_is_turned_clockwise_leans_to_the_right(self):
        picture = example("astronaut.jpg")
        rolls = [find_faces(picture.rotate(-degrees, expand=True))[0].roll_degrees for degrees in (-20, 0, 20)]
        assert rolls[0] < rolls[1] - 5 and rolls[2] > rolls[1] + 5


class TestCrop:
    @PHOTOGRAPHS
    def test_it_frames_head_and_shoulders(self, file):
        picture, face = example(file), FACES[file]
        crop = find_crop(picture, None, "profile_box")
        x0, y0, x1, y1 = crop.box
        side, height = x1 - x0, face[3] - face[1]
        assert crop.source == "face"
        assert side == y1 - y0
        assert min(x0, y0) >= 0
        assert x1 <= picture.width
        assert y1 <= picture.height
        assert side / height == pytest.approx(2.0, rel=0.1)
        assert abs((x0 + x1) / 2 - (face[0] + face[2]) / 2) < 0.05 * side
        assert y0 + 0.477 * side == pytest.approx((face[1] + face[3]) / 2, abs=0.05 * side)

    @pytest.mark.parametrize("corner", [(140, 0, 320, 180), (0, 60, 300, 320)])
    def test_near_the_edge_it_stays_in_the_picture(self, corner):
        picture = example("astronaut.jpg").crop(corner)
        crop = find_crop(picture, None, "profile_box")
        x0, y0, x1, y1 = crop.box
        assert crop.source == "face"
        assert x1 - x0 == y1 - y0 <= min(picture.size)
        assert min(x0, y0) >= 0
        assert x1 <= picture.width
        assert y1 <= picture.height

    @pytest.mark.parametrize(
        ("size", "box"), [((300, 200), (50, 0, 250, 200)), ((200, 301), (0, 50, 200, 250)), ((41, 41), (0, 0, 41, 41))]
    )
    def test_without_a_face_the_middle_is_taken(self, size, box):
        crop = find_crop(Image.new("RGB", size), None, "profile_box")
        assert crop == Crop(box, "centre", size)
        assert all(isinstance(edge, int) for edge in crop.box)
        assert list(crop.to_dict()) == ["source", "box"]

    @pytest.mark.parametrize(
        ("size", "face", "box"),
        [
            ((1000, 900), (400, 300, 560, 500), (280, 209, 680, 609)),
            ((1000, 300), (400, 50, 560, 250), (330, 0, 630, 300)),
            ((300, 1000), (70, 400, 230, 600), (0, 357, 300, 657)),
            ((1000, 900), (10, 10, 170, 210), (0, 0, 400, 400)),
            ((1000, 900), (830, 690, 990, 890), (600, 500, 1000, 900)),
            ((1000, 900), (400.2, 300.2, 560.2, 500.3), (280, 209, 681, 610)),
        ],
        ids=["inside", "wide", "tall", "upper left", "lower right", "between pixels"],
    )
    def test_a_face_is_grown_to_head_and_shoulders_as_far_as_the_picture_goes(self, monkeypatch, size, face, box):
        """Grow a face to 2 heights a side, a little more below, moved into the picture, and no larger than that."""
        found = Face(face, 0.9, 0.0)
        monkeypatch.setattr(faces, "find_faces", lambda picture: [found])
        assert find_crop(Image.new("RGB", size), None, "profile_box") == Crop(box, "face", size, found, 1)

    def test_a_given_box_needs_no_search(self, monkeypatch):
        monkeypatch.setattr(faces, "find_faces", lambda picture: pytest.fail("a face was sought"))
        crop = find_crop(example("astronaut.jpg"), (0, 0, 1, 1), "profile_box")
        assert (crop.source, crop.face, crop.faces) == ("given", None, 0)

    def test_it_says_which_face_it_is_about(self):
        crop = Crop((300, 200, 700, 600), "face", (1000, 800), Face((-5, 300.5, 600, 500), 0.91234, -12.345), 3)
        described = json.loads(json.dumps(crop.to_dict()))
        assert described == {
            "source": "face",
            "box": [0.3, 0.25, 0.7, 0.75],
            "face": {"box": [0, 0.375625, 0.6, 0.625], "score": 0.912, "largest_of": 3},
        }

    def test_its_reported_box_chooses_the_same_pixels_again(self):
        picture = example("hopper.jpg")
        crop = find_crop(picture, None, "profile_box")
        assert find_crop(picture, tuple(crop.to_dict()["box"]), "profile_box").box == crop.box


def test_the_command_says_which_face_was_found(tmp_path, capsys):
    assert main([str(EXAMPLES / "astronaut.jpg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  face 18") and "score 0.9" in lines[1] and "rolled by about" in lines[1]
    assert "(head and shoulders of that face)" in lines[2]
    face = example("hopper.jpg").resize((256, 300))
    scene((face, (20, 80)), (face.resize((200, 234)), (500, 200))).save(tmp_path / "two.png")
    assert main([str(tmp_path / "two.png")]) == 0
    assert "  largest of 2 faces (score times area) " in capsys.readouterr().out


def run_python(code, *arguments):
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


FOUND_AT_ONCE = """
import sys, threading
from PIL import Image
from icportrait.pictures import finder

made, session = [], finder._session
finder._session = lambda: made.append(session.cache_info().misses) or session()
pictures = [Image.open(path).convert("RGB") for path in sys.argv[1:]]
barrier, found = threading.Barrier(8), [None] * 8

def look(number):
    barrier.wait()
    found[number] = [finder.find_faces(picture) for picture in pictures]

threads = [threading.Thread(target=look, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(each == found[0] for each in found), found
assert session.cache_info().misses == 1 == session.cache_info().currsize
print(found[0])
"""


def test_threads_that_begin_at_once_and_processes_find_the_same():
    """Run a fresh process whose threads load the network at the same moment; twice, and this process."""
    files = [str(EXAMPLES / name) for name in FACES]
    first, second = (run_python(FOUND_AT_ONCE, *files) for _ in range(2))
    assert first == second
    pictures = [Image.open(file).convert("RGB") for file in files]
    assert first.strip() == str([find_faces(picture) for picture in pictures])
    with ThreadPoolExecutor(4) as threads:
        assert str(list(threads.map(find_faces, pictures * 4))[-2:]) == first.strip()


def test_a_pictures_process_loads_the_network_before_its_first_picture():
    code = "from icportrait.pictures import finder\nfrom icportrait.gateway import bounded\nbounded.begin()\n"
    assert run_python(code + "print(finder._session.cache_info().currsize)") == "1\n"


def test_a_face_is_found_within_a_pictures_memory():
    code = (
        "import sys\nfrom icportrait.gateway.bounded import begin, bounded\n"
        "from icportrait.pictures.prepare import prepare\n"
        "begin()\ndata = open(sys.argv[1], 'rb').read()\n"
        "print(bounded(prepare, 2.0, 64_000_000, data, 'profile', None, False, 512)[0].source)"
    )
    assert run_python(code, str(EXAMPLES / "astronaut.jpg")) == "face\n"


def test_without_onnx_runtime_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    finder._session.cache_clear()
    try:
        with pytest.raises(RuntimeNotAvailable, match=r"pip install 'icportrait\[serve\]'"):
            find_crop(Image.new("RGB", (64, 64)), None, "profile_box")
    finally:
        finder._session.cache_clear()


def test_prepared_pictures_say_their_face():
    crop, pixels = prepare((EXAMPLES / "astronaut.jpg").read_bytes(), "profile", None, False, 128)
    assert crop.face and crop.face.score > 0.9 and pixels.shape == (128, 128, 3)


def test_onnxruntime_reports_nothing_to_anybody(tmp_path: Path) -> None:
    """Check two folders, where telemetry would leave the device's number and events to be sent."""
    program = "from icportrait.pictures.finder import load; load()"
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment, timeout=120)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
