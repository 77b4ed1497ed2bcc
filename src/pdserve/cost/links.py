"""Links by name, as a cluster's specification has them (``4xa100:mixed@roce-100``).

Line rates are those of the standards; what of them a transfer of KV gets is measured by others, and
said in `Link.source`. An adapter ``per_device`` is one that every device of a worker has for itself
(InfiniBand in the machines of all vendors here); others are one for a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.cost.machine import LinkSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One adapter. ``bytes_per_s``: its line, one way. ``share``: what of it a transfer of KV gets.
    ``fixed_s``: what is visible of a transfer whatever its size."""

    bytes_per_s: float
    share: float
    fixed_s: float
    per_device: bool = False
    source: str = ""

    def of_worker(self, num_devices: int) -> LinkSpec:
        """The end of a worker with so many devices."""
        adapters = num_devices if self.per_device else 1
        return LinkSpec(bytes_per_s=self.bytes_per_s * self.share * adapters, fixed_s=self.fixed_s)


GBIT = 1e9 / 8

LINKS: Mapping[str, Link] = {
    "ib-200": Link(
        bytes_per_s=200 * GBIT,
        share=0.87,
        fixed_s=8e-3,
        per_device=True,
        source="HDR; 87 GB/s over 4 adapters: Mooncake, FAST 2025, sec. 5.4.1; 8 ms visible of a "
        "layer-wise transfer: Splitwise, sec. VI-A",
    ),
    "ib-400": Link(
        bytes_per_s=400 * GBIT,
        share=0.475,
        fixed_s=5e-3,
        per_device=True,
        source="NDR; 190 GB/s over 8 adapters: Mooncake, FAST 2025, sec. 5.4.1; 5 ms: Splitwise, "
        "sec. VI-A",
    ),
    "roce-100": Link(
        bytes_per_s=100 * GBIT,
        share=0.87,
        fixed_s=8e-3,
        source="taken to be as ib-200, with a line of half the rate, one for a worker",
    ),
    "eth-100": Link(
        bytes_per_s=100 * GBIT,
        share=0.4,
        fixed_s=10e-3,
        source="TCP; Mooncake's is 2.4 times as fast as TCP on the same 4 adapters of 200 Gbit/s "
        "(FAST 2025, sec. 5.4.1); fixed_s as measured of pdserve's own, twice that of one host",
    ),
    "eth-25": Link(
        bytes_per_s=25 * GBIT,
        share=0.8,
        fixed_s=10e-3,
        source="TCP; llm-d counts 2.5 GB/s of 25 Gbit/s; fixed_s as of eth-100",
    ),
    "nvlink": Link(
        bytes_per_s=450e9,
        share=0.8,
        fixed_s=2e-3,
        per_device=True,
        source="workers of one host with NVLink 4 (NVIDIA H100 data sheet: 900 GB/s both ways); "
        "share and fixed_s are assumed",
    ),
    "shm": Link(
        bytes_per_s=5e9,
        share=1.0,
        fixed_s=3e-3,
        source="pdserve's own, two workers on one host: copies and checks some 5 GB/s beside a "
        "core that computes",
    ),
    "tcp-loopback": Link(
        bytes_per_s=1e9,
        share=1.0,
        fixed_s=5e-3,
        source="pdserve's own over TCP on one host: a fifth of what shared memory does",
    ),
}
