"""Devices by name: what data sheets and price lists say of them, and what share of it is reached.

Every figure has its source, field by field, in `Hardware.sources`. Rates are of one device, dense
(without sparsity), in bf16. What is reached of them:

``compute_share``
    Of the FLOP/s, by the large products of a prefill: 0.72 of A100, 0.65 of H100.
``memory_share``
    Of the bytes/s, by reading weights in decode steps: 0.8 of both (NVIDIA's performance models,
    aiconfigurator, count 0.8 as well).
``peer_share``
    Of the link between neighbours, by the all-reduces of a prefill: 0.375 of both.

These are fitted to Splitwise's and DistServe's measurements (`cost.roofline_timer`). Other GPUs are
taken to be like H100 where nothing else is said.

A user's own devices come from a file: `cost.catalogue`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pdserve.core.capacity import DEVICE_POOL, HOST_POOL, PoolRule

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device, and its share of the machine it is in.

    ``flops``: dense bf16 FLOP/s. ``bytes_per_s``: of its memory. ``memory_bytes``: what software
    sees of it. ``pool``: what of that a worker uses. ``peer_bytes_per_s``: of the link to a
    neighbour in the machine, one way, of which an all-reduce gets ``peer_share``; 0 if there is
    none. ``max_devices``: of one machine. ``network``: its way out of the machine, a name of
    `cost.links`. ``host_speed``: of one thread of the host, against that of an A100's machine.
    ``runtime``: a name of `cost.roofline_timer.RUNTIMES`.
    ``tdp_w``: the most it may draw; ``cap_w``: a limit set below that; ``idle_w``: without work but
    with a model loaded; ``host_w``: its share of the most that the rest of the machine draws.
    ``price_per_hour``: in US dollars, on demand, one device with its share of the machine.
    """

    flops: float
    bytes_per_s: float
    memory_bytes: float
    compute_share: float
    memory_share: float
    pool: PoolRule = DEVICE_POOL
    peer_bytes_per_s: float = 0.0
    peer_share: float = 0.375
    max_devices: int = 8
    network: str
    host_speed: float = 1.0
    runtime: str = "graphs"
    tdp_w: float
    cap_w: float | None = None
    idle_w: float
    host_w: float
    price_per_hour: float
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def limit_w(self) -> float:
        """The most it draws."""
        return self.tdp_w if self.cap_w is None else min(self.cap_w, self.tdp_w)


_SHARES = {
    "compute_share": "fitted: see the head of cost/hardware.py",
    "memory_share": "fitted: see the head of cost/hardware.py",
    "pool": "core.capacity.DEVICE_POOL",
    "peer_share": "fitted: see the head of cost/hardware.py",
}
_HOST = "fitted: Llama-2-70B decodes in 43 ms on 4 or 8 A100, in 30 ms on as many H100"

_A100 = Hardware(
    flops=3.12e14,
    bytes_per_s=2.039e12,
    memory_bytes=80 * GIB,
    compute_share=0.72,
    memory_share=0.8,
    peer_bytes_per_s=300e9,
    network="ib-200",
    tdp_w=400.0,
    idle_w=80.0,
    host_w=412.5,
    price_per_hour=2.21,
    sources=_SHARES
    | {
        "flops": "NVIDIA A100 80GB SXM data sheet",
        "bytes_per_s": "NVIDIA A100 80GB SXM data sheet",
        "memory_bytes": "81920 MiB: nvidia-smi",
        "peer_bytes_per_s": "NVIDIA A100 data sheet: NVLink 600 GB/s both ways",
        "max_devices": "DGX A100",
        "network": "DGX A100: one 200 Gbit/s adapter for each device; Splitwise, table I",
        "host_speed": "the measure",
        "tdp_w": "NVIDIA A100 80GB SXM data sheet",
        "idle_w": "some 52 W, and 28 W as long as software holds the device (arXiv:2605.23918 "
        "measured 26 to 50 W for that on A100 and H100)",
        "host_w": "DGX A100 data sheet: 6.5 kW at most, less 8 x 400 W, by 8",
        "price_per_hour": "Splitwise's artifact, notebooks/utils.py: 2.21 per GPU-hour",
    },
)
_H100 = Hardware(
    flops=9.89e14,
    bytes_per_s=3.35e12,
    memory_bytes=81559 * 1024 * 1024,
    compute_share=0.65,
    memory_share=0.8,
    peer_bytes_per_s=450e9,
    network="ib-400",
    host_speed=1.4,
    tdp_w=700.0,
    idle_w=120.0,
    host_w=575.0,
    price_per_hour=4.76,
    sources=_SHARES
    | {
        "flops": "NVIDIA H100 SXM data sheet: 1979 TFLOP/s with sparsity",
        "bytes_per_s": "NVIDIA H100 SXM data sheet",
        "memory_bytes": "81559 MiB: nvidia-smi",
        "peer_bytes_per_s": "NVIDIA H100 data sheet: NVLink 900 GB/s both ways",
        "max_devices": "DGX H100",
        "network": "DGX H100: one 400 Gbit/s adapter for each device; Splitwise, table I",
        "host_speed": _HOST,
        "tdp_w": "NVIDIA H100 SXM data sheet",
        "idle_w": "some 70 W, and 50 W as long as software holds the device: as A100",
        "host_w": "DGX H100 data sheet: 10.2 kW at most, less 8 x 700 W, by 8",
        "price_per_hour": "Splitwise's artifact, notebooks/utils.py: 4.76 per GPU-hour",
    },
)
_COREWEAVE = "CoreWeave's price list, February 2026, a machine of 8 by 8"
_LIKE_H100 = {
    "pool": "core.capacity.DEVICE_POOL",
    "compute_share": "taken to be that of H100",
    "memory_share": "taken to be that of H100",
    "peer_share": "taken to be that of H100",
    "idle_w": "taken to be the share of the TDP that H100 has",
}

HARDWARE: Mapping[str, Hardware] = {
    "a100": _A100,
    "h100": _H100,
    "h100cap": replace(
        _H100,
        compute_share=0.65 / 1.3,
        cap_w=350.0,
        sources=dict(_H100.sources)
        | {
            "cap_w": "Splitwise, table V: GPUs capped to 50 % (the machine to 70 %)",
            "compute_share": "of H100 by 1.3: Splitwise's perf_model.csv has prompt times of 1.3 "
            "times, and token times of 1.0 times, those without the cap",
        },
    ),
    "h200": replace(
        _H100,
        bytes_per_s=4.8e12,
        memory_bytes=143771 * 1024 * 1024,
        price_per_hour=6.305,
        sources=dict(_H100.sources)
        | _LIKE_H100
        | {
            "flops": "NVIDIA H200 SXM data sheet",
            "bytes_per_s": "NVIDIA H200 SXM data sheet",
            "memory_bytes": "143771 MiB: nvidia-smi",
            "tdp_w": "NVIDIA H200 SXM data sheet",
            "price_per_hour": _COREWEAVE + ": 50.44",
        },
    ),
    "b200": Hardware(
        flops=2.25e15,
        bytes_per_s=8.0e12,
        memory_bytes=180e9,
        compute_share=0.65,
        memory_share=0.8,
        peer_bytes_per_s=900e9,
        network="ib-400",
        host_speed=1.4,
        tdp_w=1000.0,
        idle_w=170.0,
        host_w=787.5,
        price_per_hour=8.6,
        sources=_LIKE_H100
        | {
            "flops": "NVIDIA HGX B200 data sheet: 4.5 PFLOP/s with sparsity",
            "bytes_per_s": "NVIDIA HGX B200 data sheet",
            "memory_bytes": "DGX B200 data sheet: 1440 GB of 8",
            "peer_bytes_per_s": "NVIDIA HGX B200 data sheet: NVLink 1.8 TB/s both ways",
            "max_devices": "DGX B200",
            "network": "DGX B200: one 400 Gbit/s adapter for each device",
            "host_speed": "taken to be that of H100",
            "tdp_w": "NVIDIA HGX B200 data sheet",
            "host_w": "DGX B200 data sheet: 14.3 kW at most, less 8 x 1 kW, by 8",
            "price_per_hour": _COREWEAVE + ": 68.80",
        },
    ),
    "l40s": Hardware(
        flops=3.62e14,
        bytes_per_s=8.64e11,
        memory_bytes=46068 * 1024 * 1024,
        compute_share=0.65,
        memory_share=0.8,
        peer_bytes_per_s=32e9,
        network="roce-100",
        host_speed=1.4,
        tdp_w=350.0,
        idle_w=100.0,
        host_w=150.0,
        price_per_hour=2.25,
        sources=_LIKE_H100
        | {
            "flops": "NVIDIA L40S data sheet: 733 TFLOP/s with sparsity",
            "bytes_per_s": "NVIDIA L40S data sheet",
            "memory_bytes": "46068 MiB: nvidia-smi",
            "peer_bytes_per_s": "NVIDIA L40S data sheet: PCIe 4 x16, 64 GB/s both ways, no NVLink",
            "max_devices": "usual servers of PCIe cards",
            "network": "assumed",
            "host_speed": "taken to be that of H100",
            "tdp_w": "NVIDIA L40S data sheet",
            "idle_w": "some 35 W, and 66 W as long as software holds the device: as A100",
            "host_w": "assumed: 1.2 kW of a server with 8",
            "price_per_hour": _COREWEAVE + ": 18.00",
        },
    ),
    "mi300x": Hardware(
        flops=1.307e15,
        bytes_per_s=5.3e12,
        memory_bytes=192 * GIB,
        compute_share=0.4,
        memory_share=0.7,
        peer_bytes_per_s=448e9,
        network="ib-400",
        host_speed=1.4,
        tdp_w=750.0,
        idle_w=130.0,
        host_w=500.0,
        price_per_hour=2.59,
        sources=_LIKE_H100
        | {
            "flops": "AMD Instinct MI300X data sheet: 1307.4 TFLOP/s",
            "bytes_per_s": "AMD Instinct MI300X data sheet",
            "memory_bytes": "AMD Instinct MI300X data sheet: 192 GB (in GiB)",
            "compute_share": "assumed below H100: published GEMM rates are 500 to 620 TFLOP/s",
            "memory_share": "assumed below H100: published stream rates are 0.75 to 0.8",
            "peer_bytes_per_s": "AMD Instinct MI300X platform data sheet: 896 GB/s both ways to 7",
            "max_devices": "AMD Instinct MI300X platform",
            "network": "Azure ND MI300X v5: one 400 Gbit/s adapter for each device",
            "host_speed": "taken to be that of H100",
            "tdp_w": "AMD Instinct MI300X data sheet",
            "host_w": "assumed: 4 kW of a server with 8",
            "price_per_hour": "DigitalOcean's list price, October 2026, gpu-mi300x1-192gb",
        },
    ),
    "cpu-server": Hardware(
        flops=4.7e14,
        bytes_per_s=6.14e11,
        memory_bytes=1536 * GIB,
        compute_share=0.2,
        memory_share=0.6,
        max_devices=1,
        network="eth-100",
        host_speed=1.4,
        runtime="kernels",
        tdp_w=700.0,
        idle_w=250.0,
        host_w=250.0,
        price_per_hour=12.7,
        sources={
            "flops": "2 Xeon Platinum 8488C of 48 cores: AMX does 2048 bf16 FLOP a cycle and core "
            "(Intel's optimization manual), at 2.4 GHz",
            "bytes_per_s": "2 x 8 channels of DDR5-4800 (Intel ARK)",
            "memory_bytes": "Amazon EC2 r7i.metal-48xl",
            "compute_share": "assumed: some 90 TFLOP/s of two sockets, since AMX lowers the clock",
            "memory_share": "assumed: half of the reads cross the sockets",
            "pool": "as of a device: the machine serves one worker",
            "max_devices": "one worker has both sockets",
            "network": "assumed",
            "host_speed": "taken to be that of H100's machine, which has the same processors",
            "tdp_w": "Intel ARK: 350 W a socket",
            "idle_w": "assumed",
            "host_w": "assumed: memory, fans, power supplies",
            "price_per_hour": "Amazon EC2 r7i.metal-48xl on demand: 12.70",
        },
    ),
    "cpu": Hardware(
        flops=3.84e11,
        bytes_per_s=3.05e10,
        memory_bytes=4 * GIB,
        compute_share=0.98,
        memory_share=0.97,
        pool=HOST_POOL,
        max_devices=1,
        network="shm",
        runtime="kernels",
        tdp_w=5.0,
        idle_w=1.0,
        host_w=3.0,
        price_per_hour=0.05,
        sources={
            "flops": "one core: 2 fused products of 32 pairs of bf16 (AVX-512) at 3 GHz",
            "bytes_per_s": "what one core draws of memory: docs/performance.md, measured",
            "memory_bytes": "a usual share of a virtual machine",
            "compute_share": "docs/performance.md: the engine against its ceilings",
            "memory_share": "docs/performance.md: the engine against its ceilings",
            "pool": "the live server's: core.capacity.HOST_POOL",
            "max_devices": "one worker, one core",
            "network": "workers of one host",
            "host_speed": "the measure",
            "tdp_w": "assumed: 320 W by 64 cores",
            "idle_w": "assumed",
            "host_w": "assumed: a core's share of a server",
            "price_per_hour": "Amazon EC2 c7a on demand: 0.0513 a core",
        },
    ),
}
"""By the name that a cluster's specification has, without ``-tpN``."""
