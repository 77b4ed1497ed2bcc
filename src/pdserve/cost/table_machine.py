"""Machines of Splitwise's evaluation, out of its table: eight GPUs that serve one model together.

What the table does not have is of the paper and of its simulator (Mutinifni/splitwise-sim): 8 x 80
GiB of memory, of which weights take their size in fp16 and KV all the rest; prices of 2.21 and 4.76
per GPU and hour; a machine's power of 24.8 and 44 units, 30.8 with a cap (a unit is taken as 100 W;
nothing else is known of how it depends on load, so it does not); links that give each flow 200
GiB/s whatever else they carry. KV of a token is ``2 * hidden * layers * 2`` bytes there for every
model; with ``gqa`` it is what the model really has.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.errors import UnknownNameError
from pdserve.cost.machine import LinkSpec, MachineModel, Power
from pdserve.cost.table import (
    PerfTable,
    SplitwiseSimTimer,
    TableTimer,
    linear_model,
    mean_error,
    range_of,
)

DEVICES = 8
MEMORY_BYTES = DEVICES * 80 << 30
FLOW_BYTES_PER_S = 200.0 * (1 << 30)
CAP_FACTOR = 1.3
"""Of the prompt time under the cap, where the table has no rows of its own for it."""
UNIT_W = 100.0


@dataclass(frozen=True, slots=True)
class TableHardware:
    """``rows``: the table's name of it; ``stands_in``: whose rows do, a cap's worth slower in
    prompts, if there are none. ``gpu_price`` per hour; ``power_units`` of a machine."""

    rows: str
    gpu_price: float
    power_units: float
    stands_in: str = ""


@dataclass(frozen=True, slots=True)
class TableModel:
    """``rows``: the table's name of it. ``gqa_share``: of the heads, those that have KV."""

    rows: str
    num_layers: int
    hidden: int
    weight_bytes: int
    gqa_share: float = 1.0


HARDWARE = {
    "a100": TableHardware("a100-80gb", 2.21, 24.8),
    "h100": TableHardware("h100-80gb", 4.76, 44.0),
    "h100cap": TableHardware("h100-80gb-pcap", 4.76, 30.8, stands_in="h100-80gb"),
}
MODELS = {
    "bloom-176b": TableModel("bloom-176b", 70, 14336, 329_000_000_000),
    "llama-2-70b": TableModel("llama2-70b", 80, 8192, 135_000_000_000, gqa_share=8 / 64),
}


def machine_of_table(
    table: PerfTable,
    hardware: str,
    model: str,
    *,
    as_splitwisesim: bool = False,
    gqa: bool = True,
    block_size: int = 16,
) -> MachineModel:
    """A machine of ``hardware`` (a100, h100 or h100cap) that serves ``model``.

    ``as_splitwisesim``: the table is read as SplitwiseSim does. Raises `ConfigError` if the
    hardware, the model or the table's rows of them are unknown.
    """
    device, shape = _known(hardware, model)
    name, factor = device.rows, 1.0
    if device.stands_in and not table.has(shape.rows, name, DEVICES):
        name, factor = device.stands_in, CAP_FACTOR
    rows = table.rows(shape.rows, name, DEVICES)
    token_bytes = 2 * shape.hidden * shape.num_layers * 2
    if gqa:
        token_bytes = round(token_bytes * shape.gqa_share)
    watts = device.power_units * UNIT_W
    num_blocks = (MEMORY_BYTES - shape.weight_bytes) // (token_bytes * block_size)
    return MachineModel(
        name=hardware,
        model=model,
        steps=(
            SplitwiseSimTimer(rows, prompt_factor=factor)
            if as_splitwisesim
            else TableTimer(rows, prompt_factor=factor)
        ),
        linear=linear_model(rows, prompt_factor=factor),
        num_layers=shape.num_layers,
        token_kv_bytes=token_bytes,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_tokens=num_blocks * block_size,
        link=LinkSpec(bytes_per_s=FLOW_BYTES_PER_S, shared=False),
        power=Power(idle_w=watts, prompt_w=watts, decode_w=watts),
        price_per_hour=device.gpu_price * DEVICES,
        num_devices=DEVICES,
        measured=range_of(rows),
        error=mean_error(rows, prompt_factor=factor),
        source=f"a table of measurements: {shape.rows} on {DEVICES} x {name}",
    )


def _known(hardware: str, model: str) -> tuple[TableHardware, TableModel]:
    device, shape = HARDWARE.get(hardware), MODELS.get(model)
    if device is None:
        raise UnknownNameError("measured hardware", hardware, HARDWARE)
    if shape is None:
        raise UnknownNameError("measured model", model, MODELS)
    return device, shape
