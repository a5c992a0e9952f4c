"""API keys: who is let in, how often, and what a wrong file says."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
from pathlib import Path

import pytest

from icportrait.errors import IcPortraitError, TooMuch, Unauthenticated
from icportrait.gateway.access import Access, new_key
from icportrait.gateway.api import Caller

NOON_S = 43_200.0


class Clock:
    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def section(key: str, name: str = "studio", more: str = "") -> str:
    return f'[keys.{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{more}\n'


def access(tmp_path: Path, text: str, clock: Clock | None = None, day_clock: Clock | None = None) -> Access:
    (tmp_path / "keys.toml").write_text(text)
    return Access(tmp_path / "keys.toml", clock or Clock(), day_clock or Clock(NOON_S))


def test_without_a_file_everybody_is_let_in_and_has_no_name() -> None:
    assert Access().enter(None, "peer") == Caller(name="", priorities=None)


def test_a_key_is_let_in_under_its_name_with_its_priorities(tmp_path: Path) -> None:
    keys = access(tmp_path, section("open sesame", more="priorities = [1, 3]") + section("other", "backup"))
    assert keys.enter("Bearer open sesame", "peer") == Caller(name="studio", priorities=frozenset({1, 3}))
    assert keys.enter("bearer other", "peer") == Caller(name="backup", priorities=None)


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer wrong", "Basic open", "open", "Bearer ö"])
def test_what_is_no_key_is_refused_and_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: str | None
) -> None:
    keys = access(tmp_path, section("open"))
    with caplog.at_level(logging.DEBUG), pytest.raises(Unauthenticated, match="no valid API key"):
        keys.enter(value, "peer")
    assert "wrong" not in caplog.text


def test_a_new_key_fits_its_section(tmp_path: Path) -> None:
    key, text = new_key("fresh")
    assert key not in text
    assert access(tmp_path, text).enter(f"Bearer {key}", "peer").name == "fresh"


def test_a_rate_lets_a_burst_through_and_says_when_the_next_one_goes(tmp_path: Path) -> None:
    clock = Clock()
    keys = access(tmp_path, section("k", more="requests_per_s = 4.0\nburst = 2"), clock)
    keys.enter("Bearer k", "peer")
    keys.enter("Bearer k", "peer")
    with pytest.raises(TooMuch, match=r"key 'studio' allows 4 requests a second; retry_after_ms: 250$"):
        keys.enter("Bearer k", "peer")
    clock.now_s = 0.25
    keys.enter("Bearer k", "peer")
    with pytest.raises(TooMuch):
        keys.enter("Bearer k", "peer")
    clock.now_s = 100.0
    for _ in range(2):
        keys.enter("Bearer k", "peer")
    with pytest.raises(TooMuch):
        keys.enter("Bearer k", "peer")


def test_to_identify_is_not_counted(tmp_path: Path) -> None:
    keys = access(tmp_path, section("k", more="requests_per_s = 1.0"))
    for _ in range(5):
        assert keys.identify("Bearer k", "peer").name == "studio"
    keys.enter("Bearer k", "peer")
    with pytest.raises(TooMuch):
        keys.enter("Bearer k", "peer")


def test_a_quota_is_of_a_day_and_each_key_has_its_own(tmp_path: Path) -> None:
    day_clock = Clock(NOON_S)
    keys = access(tmp_path, section("k", more="requests_per_day = 1") + section("l", "other"), day_clock=day_clock)
    keys.enter("Bearer k", "peer")
    with pytest.raises(TooMuch, match=r"key 'studio' allows 1 requests a day; retry_after_ms: 43200000$"):
        keys.enter("Bearer k", "peer")
    keys.enter("Bearer l", "peer")
    day_clock.now_s = 86_400.0
    keys.enter("Bearer k", "peer")


def test_a_changed_file_counts_and_a_broken_one_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    keys = access(tmp_path, section("old"), clock)
    (tmp_path / "keys.toml").write_text(section("new"))
    os.utime(tmp_path / "keys.toml", ns=(1, 1))
    keys.enter("Bearer old", "peer")
    clock.now_s = 1.0
    keys.enter("Bearer new", "peer")
    with pytest.raises(Unauthenticated):
        keys.enter("Bearer old", "peer")
    for broken, moment_s in (("[keys", 2.0), (None, 4.0)):
        caplog.clear()
        if broken is None:
            (tmp_path / "keys.toml").unlink()
        else:
            (tmp_path / "keys.toml").write_text(broken)
        for clock.now_s in (moment_s, moment_s + 1):
            keys.enter("Bearer new", "peer")
        assert caplog.text.count("the keys read before it still count") == 1


def test_a_file_of_the_same_age_and_size_is_read_again(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys.toml"
    keys = access(tmp_path, section("old"), clock)
    before = path.stat()
    path.write_text(section("new"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    clock.now_s = 1.0
    assert keys.enter("Bearer new", "peer").name == "studio"


def test_a_file_that_could_not_be_read_once_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Run out of descriptors at the moment when a key is withdrawn."""
    clock = Clock()
    keys = access(tmp_path, section("old"), clock)
    (tmp_path / "keys.toml").write_text(section("new"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for clock.now_s in (1.0, 2.0):
            keys.enter("Bearer old", "peer")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caplog.text.count("Too many open files") == 1
    clock.now_s = 3.0
    keys.enter("Bearer new", "peer")
    with pytest.raises(Unauthenticated):
        keys.enter("Bearer old", "peer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[keys", "keys.toml: "),
        ("", r"keys.toml: keys: expected a section \[keys.NAME\]"),
        ("[door]\na = 1", "keys.toml: door: no such setting"),
        ("[keys]\na = 1", r"keys.a: expected a section \[keys.a\]"),
        ("[keys.a]\n", "keys.a.sha256: expected 64 hexadecimal digits"),
        (section("k", more="rate = 1"), "keys.studio.rate: no such setting, expected some of sha256, priorities"),
        (section("k", more="priorities = 1"), "keys.studio.priorities: expected a list"),
        (section("k", more="priorities = [10]"), r"keys.studio.priorities: \[10\], expected some of 0..9"),
        (section("k", more="priorities = [[1]]"), "keys.studio.priorities: expected some of 0..9"),
        (section("k", more="requests_per_s = 0"), "keys.studio.requests_per_s: 0, expected a number over 0"),
        (section("k", more="requests_per_day = nan"), "keys.studio.requests_per_day: nan, expected a number over 0"),
        (section("k", more="requests_per_s = 5e-324"), "keys.studio.requests_per_s: 5e-324, expected a number over 0"),
        (section("k", more="burst = 0.5"), "keys.studio.burst: 0.5, expected a whole number"),
        (section("k") + section("k", "b"), r"keys.b.sha256: it is that of keys.studio too, .* \(icportrait-server key"),
        (section("k", more=f"burst = 0x{5000 * 'f'}"), "keys.toml: .* digits"),
        (section("k", more=f"requests_per_s{20_000 * '.a'} = 1"), "keys.toml: .* recursion"),
    ],
)
def test_a_wrong_file_names_the_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(IcPortraitError, match=message):
        access(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IcPortraitError, match=r"keys\.toml"):
        Access(tmp_path / "keys.toml")
