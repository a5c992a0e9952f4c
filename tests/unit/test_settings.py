"""Settings from a file, the environment and flags, and how an error says where a value came from."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from icportrait.errors import IcPortraitError
from icportrait.gateway.settings import Settings, add_flags, read_settings


def settings(*flags: str, **environment: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return read_settings(parser.parse_args(flags), environment)


def file_of(folder: Path, text: str) -> str:
    path = folder / "server.toml"
    path.write_text(text)
    return str(path)


def test_without_anything_the_defaults_hold() -> None:
    assert settings() == Settings()
    assert Settings().host == "127.0.0.1"


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    config = file_of(tmp_path, "grpc_port = 1\nhttp_port = 2\nmetrics_port = 3\nslots = 4\n")
    found = settings("--config", config, "--grpc-port", "10", ICPORTRAIT_HTTP_PORT="20", ICPORTRAIT_GRPC_PORT="30")
    assert (found.grpc_port, found.http_port, found.metrics_port, found.slots) == (10, 20, 3, 4)


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    assert settings(ICPORTRAIT_CONFIG=file_of(tmp_path, "slots = 4")).slots == 4


def test_variables_that_name_no_setting_are_let_pass() -> None:
    assert settings(ICPORTRAIT_SERVICE_HOST="10.0.0.1", ICPORTRAIT_PORT="tcp://10.0.0.1:8001") == Settings()


@pytest.mark.parametrize(
    ("flags", "environment", "text"),
    [
        (["--slots", "many"], {}, "slots: 'many' from --slots, expected a whole number"),
        (["--slots", "0"], {}, "slots: 0 from --slots, expected 1 or more"),
        ([], {"ICPORTRAIT_GRPC_PORT": "70000"}, "grpc_port: 70000 from ICPORTRAIT_GRPC_PORT, expected 1..65535"),
        (["--picture-memory-bytes", str(10**20)], {}, f"from --picture-memory-bytes, expected {2**28}..{2**40}"),
        ([], {"ICPORTRAIT_HOST": ""}, "host: '' from ICPORTRAIT_HOST, expected text"),
        (["--stop-timeout-s", "nan"], {}, "stop_timeout_s: nan from --stop-timeout-s, expected 0 or more"),
        (["--grpc-port", "8000"], {}, r"expected three different ports"),
        (["--tls-key", "/none"], {}, "tls_certificate, tls_key: only one is given"),
        (["--api-keys", "/none"], {}, "api_keys: /none isn't a file"),
        (["--c2pa-key", __file__], {}, "c2pa_certificate, c2pa_key: only one is given"),
        (["--c2pa-certificate", "/none", "--c2pa-key", __file__], {}, "c2pa_certificate: /none isn't a file"),
        (["--devices", "0,1,0"], {}, "devices: '0,1,0', expected numbers or UUIDs, each once"),
        (["--devices", "0,,1"], {}, "devices: '0,,1', expected numbers or UUIDs, each once, as in 0,1,2,3"),
        (["--devices", "0,00"], {}, "devices: '0,00', expected numbers or UUIDs, each once"),
        (["--devices", "cuda:0"], {}, "devices: 'cuda:0', expected numbers or UUIDs, each once"),
        (["--c2pa-algorithm", "rsa"], {}, "c2pa_algorithm: 'rsa', expected es256, es384"),
        (["--c2pa-timestamp-url", "tsa.org"], {}, "c2pa_timestamp_url: 'tsa.org', expected http://"),
        (["--c2pa-timestamp-url", "http://tsa.org"], {}, "c2pa_timestamp_url: given without c2pa_certificate"),
    ],
)
def test_an_error_names_the_setting_and_where_it_came_from(
    flags: list[str], environment: dict[str, str], text: str
) -> None:
    with pytest.raises(IcPortraitError, match=text):
        settings(*flags, **environment)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("slotz = 3", r"server.toml: slotz: no such setting; is slots meant\?"),
        ("slots = 1.5", "slots: 1.5 in .*server.toml, expected a whole number"),
        ("slots = true", "slots: True in .*server.toml, expected a whole number"),
        ("host = 3", "host: 3 in .*server.toml, expected text"),
        ("slots = [", "server.toml: can't be read as TOML"),
        (f"host = 0x{5000 * 'f'}", "host: int of too many digits or levels in "),
        (f"slots{20_000 * '.a'} = 1", "slots: dict of too many digits or levels in "),
    ],
)
def test_an_error_in_the_file_names_it(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(IcPortraitError, match=error):
        settings("--config", file_of(tmp_path, text))


def test_what_is_printed_gives_the_same_settings_back(tmp_path: Path) -> None:
    found = settings("--repository", "/some where", "--slots", "3", "--body-timeout-s", "1.5")
    assert settings("--config", file_of(tmp_path, found.to_toml())) == found


def test_only_what_is_given_goes_before_the_repositorys_policy() -> None:
    assert settings().policy == {}
    assert settings("--slots", "3", "--cache-bytes", "0").policy == {"slots": "3", "cache_bytes": "0"}


def test_devices_are_numbers_or_uuids_and_without_them_there_is_one_engine() -> None:
    assert settings().engines == (None,)
    assert settings("--devices", "2, 0").engines == ("2", "0")
    assert settings("--devices", "GPU-8932f937-d72c,MIG-GPU-1/7/0").engines == ("GPU-8932f937-d72c", "MIG-GPU-1/7/0")


def test_the_doors_limits_are_settings() -> None:
    assert settings("--connections", "5").limits.connections == 5
