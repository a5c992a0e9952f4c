"""Four simulated GPUs behind one gateway, and one, at the same rate for each: p99, and the gateway's share."""

from __future__ import annotations

from benchmarks.devices import measure_rates
from benchmarks.settings import DevicesSettings
from tests.scale.tables import TABLES

LEAST = 3.6
"""Rate of four devices by the rate of one."""
SETTINGS = DevicesSettings(slower=2.0, rate_per_s=2.0, duration_s=30.0, rounds=1)


def test_four_devices_serve_four_times_as_much_with_the_same_p99() -> None:
    found = measure_rates(SETTINGS)
    one, four = found["1"], found[str(SETTINGS.devices)]
    TABLES.add(
        "Several devices",
        *(
            {
                "devices": count,
                "requests a second": each["rate_per_s"],
                "by one device's": round(each["rate_per_s"] / one["rate_per_s"], 2),
                "requests": each["requests"],
                "failed": each["failed"],
                "p50, ms": round(each["p50_ms"]),
                "p99, ms": round(each["sample_p99_ms"]),
                "sent": "late" if each["fell_behind"] else "in time",
                "gateway, of a core": f"{each['gateway_share']:.0%}",
            }
            for count, each in found.items()
        ),
        note=f"{SETTINGS.profile} at {SETTINGS.slower:g} times its time, simulated; small pictures, 5 to 30 steps",
    )
    assert not one["failed"] and not four["failed"]
    assert four["sample_p99_ms"] <= one["sample_p99_ms"]
    assert four["rate_per_s"] >= LEAST * one["rate_per_s"]
