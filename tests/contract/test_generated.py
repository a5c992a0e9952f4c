"""Generated files that are committed are the files that the code generates."""

from __future__ import annotations

import pytest

from icportrait.deploy.repository import CLIENT_CONTRACT, TEMPLATE
from icportrait.deploy.triton_config import model_configs, to_pbtxt
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.request import client_contract_text

CONFIGS = model_configs(DEMO_128, "fp32", ServingPolicy())


@pytest.mark.parametrize("name", CONFIGS)
def test_committed_config_is_the_generated_one(name: str) -> None:
    committed = (TEMPLATE / name / "config.pbtxt").read_text()
    assert committed == to_pbtxt(CONFIGS[name]), 'run "make configs"'


def test_triton_repo_holds_these_models_and_no_other() -> None:
    assert {path.name for path in TEMPLATE.iterdir() if path.is_dir()} == set(CONFIGS)


def test_the_clients_contract_is_the_generated_one() -> None:
    assert CLIENT_CONTRACT.read_text() == client_contract_text(), 'run "make configs"'
