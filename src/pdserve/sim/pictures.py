"""A run in pictures: latencies, pools over time, what each worker did, power."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.core.request import Role
from pdserve.plot.axis import even_axis, tight_axis
from pdserve.plot.cdf import cdfs_svg
from pdserve.plot.chart import COLOURS, Chart
from pdserve.plot.gantt import gantt_svg
from pdserve.sim.report import Report
from pdserve.sim.worker_figures import Kind

_LATENCIES = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2e_s": "E2E",
    "second_token_gap_s": "second token",
}
_KINDS = tuple(kind.name.lower() for kind in Kind)
ROUTER = "router"
_COLOURS = {
    Role.PREFILL.value: COLOURS[Kind.PREFILL],
    Role.MIXED.value: COLOURS[Kind.MIXED],
    Role.DECODE.value: COLOURS[Kind.DECODE],
    ROUTER: COLOURS[4],
}


def pictures(report: Report) -> dict[str, str]:
    """SVG by name: ``ttft`` and so on as far as there are values, ``queue``, ``decoding``,
    ``blocks``, ``workers`` and ``power``."""
    return latency_pictures(report) | pool_pictures(report) | work_pictures(report)


def latency_pictures(report: Report) -> dict[str, str]:
    """Cumulative distributions in milliseconds, one curve for each class of service."""
    tallies = report.requests.by_name()
    found = {}
    for key, title in _LATENCIES.items():
        name = key.removesuffix("_s")
        curves = {}
        for class_name, tally in tallies.items():
            points = [(1e3 * value, share) for value, share in getattr(tally, key).points()]
            if points:
                curves[class_name] = points
        if curves:
            bounds = {
                class_name: dict(tally.slo.bounds_ms)[name]
                for class_name, tally in tallies.items()
                if tally.slo is not None and name in dict(tally.slo.bounds_ms)
            }
            num = sum(getattr(tally, key).num for tally in tallies.values())
            found[name] = cdfs_svg(f"{title} (n = {num})", curves, bounds, "ms")
    if report.requests.gaps_s.num:
        points = [(1e3 * value, share) for value, share in report.requests.gaps_s.points()]
        title = f"ITL (n = {report.requests.gaps_s.num})"
        found["itl"] = cdfs_svg(title, {"": points}, {}, "ms")
    return found


def pool_pictures(report: Report) -> dict[str, str]:
    """By pool: requests that wait, sequences that decode, the share of KV blocks in use."""
    pools = report.pools
    times_s = list(pools.times_s)
    if len(times_s) < 2:
        return {}
    roles = [role for role in (Role.PREFILL, Role.MIXED, Role.DECODE) if role in pools.sums]

    def by_role(name: str) -> dict[str, list[float]]:
        return {role.value: pools.series(role, name) for role in roles}

    queues = {ROUTER: pools.queued()} | by_role("waiting")
    used = {role.value: pools.used_share(role) for role in roles}
    found = {
        "queue": _over_time("requests that wait", times_s, queues),
        "decoding": _over_time("sequences that decode", times_s, by_role("decoding")),
        "blocks": _over_time("KV blocks in use", times_s, used, percent=True),
    }
    if report.workers.num_role_changes or report.workers.losses:
        found["pools"] = _over_time("workers in each pool", times_s, by_role("workers"))
    return found


def work_pictures(report: Report) -> dict[str, str]:
    """What each worker did, and the power of all of them."""
    activity = report.activity
    num = activity.num_stretches
    if not num:
        return {}
    workers = sorted(activity.busy_s, key=_by_number)
    rows = {str(worker): activity.shares(worker) for worker in workers}
    found = {
        "workers": gantt_svg("what each worker did", rows, _KINDS, activity.stretch_s),
    }
    kilowatts = [watts / 1e3 for watts in activity.power_w(report.workers.work)]
    if max(kilowatts):
        times_s = [activity.stretch_s * (index + 0.5) for index in range(num)]
        x, y = tight_axis(0.0, times_s[-1]), even_axis(0.0, max(kilowatts))
        chart = Chart("power of all workers (kW)", x, y, x_unit="s")
        chart.curve(list(zip(times_s, kilowatts, strict=True)))
        found["power"] = chart.svg()
    return found


def _over_time(
    title: str,
    times_s: Sequence[float],
    curves: dict[str, list[float]],
    *,
    percent: bool = False,
) -> str:
    most = max(max(values) for values in curves.values())
    x, y = tight_axis(times_s[0], times_s[-1]), even_axis(0.0, most or 1.0)
    chart = Chart(title, x, y, x_unit="s", percent=percent)
    for name, values in curves.items():
        chart.curve(list(zip(times_s, values, strict=True)), name, _COLOURS[name])
    return chart.svg()


def _by_number(worker: str) -> tuple[str, int]:
    """``prefill-2`` before ``prefill-10``, and prefill before decode."""
    role, _, number = worker.rpartition("-")
    order = {"prefill": "0", "mixed": "1", "decode": "2"}
    return order.get(role, role), int(number) if number.isdigit() else 0
