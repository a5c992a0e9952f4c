"""Paths where the full tests keep what they make; all of it goes when they end."""

from __future__ import annotations

from tests.exports import ROOT

BUILD = ROOT / "build" / "full"
STABLE_DIFFUSION, CHECKPOINT = BUILD / "stable-diffusion", BUILD / "adapted"
EXPORT, PLANS, REPOSITORY = BUILD / "export", BUILD / "plans", BUILD / "repository"
REFERENCE_PORTRAIT = BUILD / "reference.png"
