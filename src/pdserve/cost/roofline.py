"""A simulated worker from data sheets: `machine_of` a hardware and a model.

Hardware is written as ``h100`` or ``h100-tp8``: so many devices in tensor parallelism. Without a
number it is the least power of two, up to a whole machine, on which the weights take at most
`WEIGHT_SHARE` of the memory; if there is none, the whole machine, if they fit at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pdserve.core.capacity import longest_request, pool_blocks, pool_bytes
from pdserve.core.errors import ConfigError
from pdserve.core.layout import INT8, KV_DTYPES, SCALE_BYTES, KvLayout, pool_dtype
from pdserve.core.step import StepShape
from pdserve.cost.catalogue import CATALOGUE, TP_NAME, Catalogue, find
from pdserve.cost.hardware import Hardware
from pdserve.cost.machine import MachineModel, Power
from pdserve.cost.models import KnownModel
from pdserve.cost.roofline_timer import ACTIVATION_BYTES, RUNTIMES, RooflineTimer, nearest
from pdserve.cost.shape import ModelShape

WEIGHT_SHARE = 0.6
DECODE_BASE_SHARE = 0.29
DECODE_MEMORY_SHARE = 0.73
"""A device that decodes draws the first share of its TDP, and the second times the share of its
memory's rate that it uses. Splitwise's perf_model.csv, mean power of A100 over requests that nearly
only decode: 0.43, 0.59, 0.74 of the TDP for Llama-2-70B on 8, 4, 2 of them (0.20, 0.40, 0.62 of the
memory's rate) and 0.63 for BLOOM-176B on 8 (0.45). A prompt draws all that the device may."""
HOST_IDLE_SHARE = 0.5
"""Of what the rest of a machine draws at most, what it draws while its devices idle. Assumed: fans
slow down, memory and network do not."""
BUSY_BATCH = (32, 1024)
"""Sequences and their length, of the decode step that `Power.decode_w` is stated for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where a worker's pool is. ``memory_bytes``: of all its devices, or what is free on a host
    (None: as the catalogue says), which ``num_workers`` share. ``num_blocks``: of the pool, if that
    is known."""

    memory_bytes: int | None = None
    num_workers: int = 1
    num_blocks: int | None = None


OWN_ROOM = Room()


def machine_of(
    hardware_name: str,
    model_name: str,
    *,
    tp: int | None = None,
    block_size: int = 16,
    weight_dtype: str = "auto",
    kv_dtype: str = "auto",
    link: str = "",
    runtime: str = "",
    max_step_tokens: int = 2048,
    room: Room = OWN_ROOM,
    model: KnownModel | None = None,
    catalogue: Catalogue = CATALOGUE,
) -> MachineModel:
    """The worker ``hardware_name`` that serves ``model_name``, all of it from data sheets.

    ``tp`` overrides what the name says. ``weight_dtype`` and ``kv_dtype``: ``auto`` (bf16) or
    ``int8``, which is read as half the bytes and computed as bf16. ``link`` and ``runtime``: not
    the hardware's own. ``max_step_tokens``: of the largest step, whose activations need memory.
    ``room`` overrides what the pool is reckoned from. ``model``: one not in the catalogue. Raises
    `ConfigError`: an unknown name, or a model that does not fit, with the bytes needed and there.
    """
    known = model or find(catalogue.models, model_name, "model")
    base, written_tp = split_name(hardware_name, catalogue)
    hardware = catalogue.hardware[base]
    shape = _stored(known.shape, weight_dtype, kv_dtype)
    devices = _num_devices(catalogue.hardware, base, model_name, shape, tp or written_tp)
    num_blocks = room.num_blocks or pool_blocks(
        _pool_bytes(room, hardware, devices, shape, max_step_tokens),
        _block_bytes(shape, devices, block_size, kv_dtype),
        f"{model_name} on {devices} x {base} needs more devices (-tpN), or larger ones",
    )
    timer = roofline(shape, hardware, devices, runtime)
    return MachineModel(
        name=f"{base}-tp{devices}" if hardware.max_devices > 1 else base,
        model=model_name,
        steps=timer,
        linear=nearest(timer, num_blocks * block_size),
        num_layers=shape.num_layers,
        token_kv_bytes=round(shape.token_kv_bytes),
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_tokens=longest_request(known.max_model_tokens, num_blocks, block_size),
        link=find(catalogue.links, link or hardware.network, "link").of_worker(devices),
        power=_power(hardware, shape, devices, timer),
        price_per_hour=hardware.price_per_hour * devices,
        num_devices=devices,
        source=f"data sheets of {base}, {known.source}, runtime {runtime or hardware.runtime}",
    )


def roofline(
    shape: ModelShape, hardware: Hardware, devices: int, runtime: str = ""
) -> RooflineTimer:
    """Of a model on so many devices. Raises `ConfigError` for an unknown runtime."""
    return RooflineTimer(
        shape, hardware, devices, find(RUNTIMES, runtime or hardware.runtime, "runtime")
    )


def split_name(name: str, catalogue: Catalogue = CATALOGUE) -> tuple[str, int | None]:
    """``h100-tp8`` as (``h100``, 8); ``h100`` as (``h100``, None). Raises `ConfigError`."""
    match = TP_NAME.fullmatch(name)
    base = name if match is None else match[1]
    find(catalogue.hardware, base, "hardware")
    return base, None if match is None else int(match[2])


def slo_floor(
    machine: MachineModel, prompt_tokens: int, context_tokens: int
) -> tuple[float, float]:
    """The least TTFT and TPOT, in seconds, that a machine can give anybody: a prompt of that length
    on an idle worker, and a decode step of a sequence of ``context_tokens`` alone."""
    prompt = StepShape(prompt_tokens, prompt_tokens * prompt_tokens)
    alone = StepShape(num_decoding=1, context_tokens=context_tokens)
    return machine.steps.step_s(prompt), machine.steps.step_s(alone)


def check_slo(
    machines: Iterable[MachineModel],
    *,
    prompt_tokens: int,
    context_tokens: int,
    ttft_s: float | None,
    tpot_s: float | None,
) -> None:
    """Raises `ConfigError` with the bound if no machine could ever keep this SLO, for a request
    with the median (or the shortest) prompt of the load."""
    floors = [(slo_floor(each, prompt_tokens, context_tokens), each.name) for each in machines]
    least_ttft_s, first = min((floor[0], name) for floor, name in floors)
    least_tpot_s, second = min((floor[1], name) for floor, name in floors)
    if ttft_s is not None and ttft_s < least_ttft_s:
        raise ConfigError(
            f"no machine here can keep a TTFT of {ttft_s * 1e3:.4g} ms: the fastest, {first}, "
            f"takes {least_ttft_s * 1e3:.4g} ms for a prompt of {prompt_tokens} tokens, with "
            "nothing else to do; ask for more, or for faster hardware or more devices a worker"
        )
    if tpot_s is not None and tpot_s < least_tpot_s:
        raise ConfigError(
            f"no machine here can keep a TPOT of {tpot_s * 1e3:.4g} ms: the fastest, {second}, "
            f"takes {least_tpot_s * 1e3:.4g} ms for a token of one sequence alone; ask for more, "
            "or for hardware with faster memory or more devices a worker"
        )


# --- inside -----------------------------------------------------------------------------------


def _block_bytes(shape: ModelShape, devices: int, block_size: int, kv_dtype: str) -> int:
    """Of a worker's pool, by the layout of live ones. Devices beyond the KV heads hold copies."""
    layout = KvLayout(
        num_layers=shape.num_layers,
        num_kv_heads=max(shape.num_kv_heads, devices),
        head_dim=shape.head_dim,
        block_size=block_size,
        dtype=pool_dtype("bf16", kv_dtype),
        numerics="",
        weights_digest="",
    )
    return layout.pool_bytes(1)


def _stored(shape: ModelShape, weight_dtype: str, kv_dtype: str) -> ModelShape:
    """The shape with its numbers as they are stored; ``auto``: as the catalogue has them."""
    for name, dtype in (("weight", weight_dtype), ("kv", kv_dtype)):
        if dtype not in KV_DTYPES:
            raise ConfigError(f"{name}_dtype is {dtype!r}; it is one of {', '.join(KV_DTYPES)}")
    kv_bytes = (shape.head_dim + SCALE_BYTES) / shape.head_dim if kv_dtype == INT8 else 2.0
    weight_bytes = 1.0 if weight_dtype == INT8 else shape.weight_bytes
    return replace(shape, weight_bytes=weight_bytes, kv_bytes=kv_bytes)


def _pool_bytes(
    room: Room, hardware: Hardware, devices: int, shape: ModelShape, max_step_tokens: int
) -> int:
    return pool_bytes(
        hardware.pool,
        room.memory_bytes or int(hardware.memory_bytes * devices),
        num_workers=room.num_workers,
        weight_bytes=shape.memory_bytes,
        step_bytes=_step_bytes(shape, max_step_tokens),
    )


def _step_bytes(shape: ModelShape, tokens: int) -> int:
    """Activations of a step, of all devices together: the residual stream and a copy of it, and the
    widest inner product of a layer; the logits of a token are small beside that."""
    widest = shape.mlp_matrices * shape.intermediate_size
    return tokens * (2 * shape.hidden_size + widest) * ACTIVATION_BYTES


def _num_devices(
    known: Mapping[str, Hardware], base: str, model: str, shape: ModelShape, wanted: int | None
) -> int:
    hardware = known[base]
    weights, memory = shape.memory_bytes, hardware.memory_bytes
    whole = hardware.max_devices
    if wanted is not None and not 1 <= wanted <= whole:
        raise ConfigError(
            f"{base}-tp{wanted} cannot be: a machine of {base} has 1 to {whole} devices"
        )
    chosen = wanted
    if chosen is None:
        chosen = 1
        while chosen < whole and weights > WEIGHT_SHARE * memory * chosen:
            chosen = min(2 * chosen, whole)
    there = hardware.pool.share * memory * chosen
    if weights > there:
        fits = [name for name, each in known.items() if _fits(weights, each, each.max_devices)]
        remedy = (
            "use more devices (-tpN)"
            if _fits(weights, hardware, whole)
            else (
                f"it would fit on a machine of {', '.join(fits)}" if fits else "use a smaller model"
            )
        )
        raise ConfigError(
            f"{model} does not fit on {chosen} x {base}: its weights take {_gb(weights)}, and "
            f"{_gb(there)} of memory can be used; {remedy}"
        )
    return chosen


def _fits(weights: float, hardware: Hardware, devices: int) -> bool:
    return weights <= hardware.pool.share * hardware.memory_bytes * devices


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.4g} GB"


def _power(hardware: Hardware, shape: ModelShape, devices: int, timer: RooflineTimer) -> Power:
    """Of a worker. See `DECODE_BASE_SHARE`; the rest of the machine draws all it can at work."""
    batch, length = BUSY_BATCH
    context = batch * length
    busy = StepShape(num_decoding=batch, context_tokens=context)
    read = shape.memory_bytes + context * shape.token_kv_bytes
    used = read / (timer.step_s(busy) * hardware.bytes_per_s * devices)
    decode_w = hardware.tdp_w * (DECODE_BASE_SHARE + DECODE_MEMORY_SHARE * used)
    limit_w = hardware.limit_w
    return Power(
        idle_w=devices * (hardware.idle_w + HOST_IDLE_SHARE * hardware.host_w),
        prompt_w=devices * (limit_w + hardware.host_w),
        decode_w=devices * (min(limit_w, decode_w) + hardware.host_w),
    )
