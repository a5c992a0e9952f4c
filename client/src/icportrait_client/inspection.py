"""The state of servers: whether each takes requests, and its versions and limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from icportrait_client import wire
from icportrait_client.aio import AsyncPortraitClient
from icportrait_client.contract import load_contract
from icportrait_client.errors import PortraitError, ServerError
from icportrait_client.portraits import Metadata
from icportrait_client.servers import read_addresses
from icportrait_client.settings import OF_GRPC, ClientOptions, grpc_transport
from icportrait_client.sweep import WHOLE, YAWS
from icportrait_client.transport import MODEL_CONFIG, SERVER_LIVE, SERVER_METADATA, SERVER_READY


@dataclass(frozen=True)
class Health:
    """The health of one server."""

    address: str
    is_live: bool = False
    is_ready: bool = False
    """The server takes requests now."""
    answer_ms: float | None = None
    """Time that the question took, a new connection included; None where no answer came."""
    reason: str = ""
    """Why the server isn't ready, as far as that is known."""


@dataclass(frozen=True)
class Info:
    """A server's versions and limits."""

    address: str
    server: str
    version: str
    settings: dict[str, str]
    """Parameters in the configuration of the server's model, as the server writes them."""
    portrait: Metadata | None = field(default=None, repr=False)
    """The report on a portrait of one step, which names the engines; None where none was asked for."""


async def ask_health(servers: str | Sequence[str], options: ClientOptions, timeout_s: float) -> list[Health]:
    """Ask every server whether it takes requests.

    Args:
        servers: as for a client.
        options: as for a client.
        timeout_s: for each server.

    Raises:
        InvalidRequest: an argument isn't of its form.
        ServerUnavailable: a name of ``dns:///`` isn't known.
    """
    addresses = read_addresses(servers)
    transport = grpc_transport(addresses, options)
    found = []
    try:
        for address in await addresses.resolve():
            started_s = time.monotonic()
            try:
                is_live = wire.read_flag(await transport.unary(address, SERVER_LIVE, b"", timeout_s))
                answer_ms = (time.monotonic() - started_s) * 1e3
                is_ready = wire.read_flag(await transport.unary(address, SERVER_READY, b"", timeout_s))
            except (PortraitError, wire.WireError) as error:
                found.append(Health(address, reason=" ".join(str(error).split()).removeprefix(f"{address}: ")))
            else:
                reason = "" if is_ready else "the server takes no requests now"
                found.append(Health(address, is_live, is_ready, answer_ms, reason))
    finally:
        await transport.close()
    return found


async def ask_info(
    servers: str | Sequence[str], options: ClientOptions, timeout_s: float, with_portrait: bool
) -> list[Info]:
    """Ask every server for its versions and limits.

    Args:
        servers: as for a client.
        options: as for a client.
        timeout_s: for each question.
        with_portrait: ask also for a portrait of one step, because only an answer names engines and weights.

    Raises:
        PortraitError: a server doesn't answer.
    """
    addresses = read_addresses(servers)
    transport = grpc_transport(addresses, options)
    model, found = load_contract().model, []
    try:
        for address in await addresses.resolve():
            try:
                name, version = wire.read_server_metadata(
                    await transport.unary(address, SERVER_METADATA, b"", timeout_s)
                )
                settings = wire.read_model_parameters(
                    await transport.unary(address, MODEL_CONFIG, wire.named_request(model), timeout_s)
                )
            except wire.WireError as error:
                raise ServerError(f"{address}: the answer can't be read ({error})") from None
            report = None
            if with_portrait:
                # A client closes its transport.
                own = {name: value for name, value in options.items() if name not in OF_GRPC}
                own["transport"] = grpc_transport(addresses, options)
                report = await _portrait(address, cast(ClientOptions, own), timeout_s)
            found.append(Info(address, name, version, settings, report))
    finally:
        await transport.close()
    return found


def limits() -> dict[str, Any]:
    """Return the range or the choices of each option, by the contract that client and server share."""
    specs = load_contract().inputs.values()
    return {spec.name: spec.expected for spec in specs if spec.expected}


async def _portrait(address: str, options: ClientOptions, timeout_s: float) -> Metadata:
    picture = YAWS[0].read()
    async with AsyncPortraitClient(address, **options) as client:
        portrait = await client.generate(
            profile=picture,
            reference=picture,
            profile_box=WHOLE,
            reference_box=WHOLE,
            num_inference_steps=1,
            seed=0,
            timeout_s=timeout_s,
        )
    return portrait.metadata
