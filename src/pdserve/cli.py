"""The command line: ``pdserve serve | worker | pull | bench | sim | calibrate | replay | top |
role | drain | undrain | restart | explain``.

Errors of ``core.errors`` become one line on stderr and exit status 2. With ``--json`` a command
prints one JSON document on stdout and nothing else. Each command imports what it needs when it
runs, so that ``pdserve --help`` is quick and a worker process loads no web server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pdserve import __version__
from pdserve.command_parser import CommandParser
from pdserve.compiled import are_machines_compiled
from pdserve.config import OPTIONS, Resolved, resolve
from pdserve.core.errors import PdserveError
from pdserve.options import flag_of

if TYPE_CHECKING:
    from pdserve.serve.deployment import Deployment

    _Commands: TypeAlias = argparse._SubParsersAction[CommandParser]

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Gives the exit status."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if typed == ["worker"]:  # not for people: what serve and worker --join start
            return _run_worker()
        parsed = parse(typed)
        status: int = parsed.run(parsed)
    except PdserveError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    return status


def parse(typed: Sequence[str]) -> argparse.Namespace:
    """What these words ask for. Raises `ConfigError` for what no command takes."""
    return _parser(typed).parse_args(typed)


def whole_parser() -> argparse.ArgumentParser:
    """Every command with all of its flags."""
    return _parser(("bench", "sim", "plan", "calibrate"))


def _parser(typed: Sequence[str]) -> argparse.ArgumentParser:
    """For these words: commands that are not among them have no flags, whose import would take
    longer than all the rest."""
    parser = CommandParser(
        prog="pdserve",
        description="Serve large language models with prefill and decode on different workers.",
    )
    compiled = ", machines compiled" if are_machines_compiled() else ""
    parser.add_argument("--version", action="version", version=f"pdserve {__version__}{compiled}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_worker(commands, typed)
    pull = commands.add_parser("pull", help="fetch a model, and convert it if it is GGUF")
    pull.add_argument(
        "model", help="smollm2-135m, OWNER/NAME of the Hugging Face hub, or a .gguf file"
    )
    pull.add_argument("--json", action="store_true", help="print one JSON document")
    pull.set_defaults(run=_run_pull)
    _add_bench(commands, typed)
    _add_sim(commands, typed)
    _add_plan(commands, typed)
    _add_calibrate(commands, typed)
    replay = commands.add_parser("replay", help="check a recording made with serve --record")
    replay.add_argument("folder", type=Path, help="the folder given to --record")
    replay.add_argument(
        "--routes",
        action="store_true",
        help="also simulate the run with its own times, and compare where its requests went",
    )
    replay.add_argument("--json", action="store_true", help="print one JSON document")
    replay.set_defaults(run=_run_replay)
    top = commands.add_parser("top", help="watch a running server")
    _add_server(top)
    top.add_argument("--interval", type=float, default=1.0, help="seconds between looks")
    top.add_argument("--once", action="store_true", help="look once and end")
    top.add_argument("--json", action="store_true", help="print one JSON document; implies --once")
    top.set_defaults(run=_run_top)
    explain = commands.add_parser("explain", help="why a request went where it went")
    explain.add_argument("request", help="its id, as the answer or X-Request-Id has it")
    explain.add_argument("--json", action="store_true", help="print one JSON document")
    _add_server(explain)
    explain.set_defaults(run=_run_explain)
    _add_operations(commands)
    return parser


def _add_server(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8000", help="where it listens")
    command.add_argument("--api-key", default=os.environ.get("PDSERVE_API_KEY"))


def _add_operations(commands: _Commands) -> None:
    role = commands.add_parser("role", help="move a worker to another pool")
    role.add_argument("worker", help="its id, as /cluster and top show it")
    role.add_argument("role", choices=("prefill", "decode", "mixed"))
    drain = commands.add_parser(
        "drain", help="send a worker nothing new; ends when it holds no request, lease or KV"
    )
    drain.add_argument("worker", help="its id")
    undrain = commands.add_parser("undrain", help="let a drained worker take work again")
    undrain.add_argument("worker", help="its id")
    restart = commands.add_parser(
        "restart", help="drain workers one after the other and replace their processes"
    )
    restart.add_argument("worker", nargs="*", help="their ids (default: all)")
    for command in (role, drain, undrain, restart):
        _add_server(command)
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(run=_run_operation, operation=command.prog.rsplit(" ", 1)[-1])


def _add_worker(commands: _Commands, typed: Sequence[str]) -> None:
    worker = commands.add_parser(
        "worker",
        help="make this host part of a server's cluster",
        description="Start a worker here for a server on another host (or on this one).",
        epilog="docs/hosts.md leads through it.",
    )
    if "worker" in typed:
        from pdserve.serve.join_arguments import add_arguments

        add_arguments(worker)
    worker.set_defaults(run=_run_join)


def _add_bench(commands: _Commands, typed: Sequence[str]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Send a load to an OpenAI-compatible server and show how it was served.",
        epilog="docs/benchmarking.md says what each figure means.",
    )
    if "bench" in typed:
        from pdserve.bench.arguments import add_arguments

        add_arguments(bench)
    bench.set_defaults(run=_run_bench)


def _add_sim(commands: _Commands, typed: Sequence[str]) -> None:
    sim = commands.add_parser(
        "sim",
        help="simulate a cluster under a load",
        description="Run the server's own router and workers in virtual time.",
        epilog="docs/simulator.md says what each flag and figure means, and how far to trust it.",
    )
    if "sim" in typed:
        from pdserve.sim.arguments import add_arguments

        add_arguments(sim)
    sim.set_defaults(run=_run_sim)


def _add_plan(commands: _Commands, typed: Sequence[str]) -> None:
    plan = commands.add_parser(
        "plan",
        help="find the cluster for a trace: split or not, how many of which",
        description="Search clusters in the simulator: the cheapest for a rate, or the most for a "
        "budget.",
        epilog="docs/planning.md leads from a trace to a purchase order, and says how sure it is.",
    )
    if "plan" in typed:
        from pdserve.sim.plan.arguments import add_arguments

        add_arguments(plan)
    plan.set_defaults(run=_run_plan)


def _add_calibrate(commands: _Commands, typed: Sequence[str]) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="measure a live server for the simulator",
        description="Start a server, measure its steps and links, and write them as a profile.",
        epilog="docs/calibration.md says what is measured and how far to trust it.",
    )
    if "calibrate" in typed:
        from pdserve.calibrate.arguments import add_arguments

        add_arguments(calibrate)
    calibrate.set_defaults(run=_run_calibrate)


def _add_serve(commands: _Commands) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        description="Serve a model over an OpenAI-compatible API.",
        epilog="Each option can also be set in the [serve] table of the --config file, as "
        "max_model_len = 4096, or in the environment, as PDSERVE_MAX_MODEL_LEN=4096.",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file with a [serve] table")
    for name, option in OPTIONS.items():
        default = "" if option.default in (None, ()) else f" (default: {option.default})"
        is_switch = option.metadata.get("switch", False)
        serve.add_argument(
            flag_of(name),
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=option.metadata["help"].replace("%", "%%") + default,
        )
    serve.set_defaults(run=_run_serve)


def _run_serve(parsed: argparse.Namespace) -> int:
    from pdserve.serve.deployment import deploy
    from pdserve.serve.server import serve

    flags = {name: getattr(parsed, name) for name in OPTIONS}
    resolved = resolve(flags, os.environ, parsed.config)
    deployment = deploy(resolved.config)
    for_people = resolved.config.log_format == "text"
    if for_people:
        _print_config(resolved, deployment)

    def ready(url: str) -> None:
        if for_people:
            _print_ready(url, deployment)
        else:
            print(json.dumps({"event": "ready", "url": url}), flush=True)

    return serve(deployment, ready)


def _print_config(resolved: Resolved, deployment: Deployment) -> None:
    from rich.table import Table

    from pdserve.page import page

    table = Table(title="pdserve", title_justify="left", show_header=False, box=None)
    for name, value, source in resolved.rows():
        if value != "-" or source != "default":
            table.add_row(name, value, "" if source == "default" else f"({source})")
    for name, value in deployment.rows():
        table.add_row(name, value, "", style="bold")
    page().print(table)
    sys.stdout.flush()


def _print_ready(url: str, deployment: Deployment) -> None:
    config = deployment.config
    needs_key = config.api_key or config.classes.class_of_key or config.edge.api_keys_file
    key = " -H 'Authorization: Bearer '$PDSERVE_API_KEY" if needs_key else ""
    body = json.dumps(
        {"model": deployment.card.name, "prompt": "The capital of France is", "max_tokens": 16}
    )
    here = url.replace("://0.0.0.0:", "://localhost:")  # the name that certificates are for
    print(
        f"\nready at {url}\ntry it:\n"
        f"  curl {here}/v1/completions{key} \\\n"
        f"    -H 'Content-Type: application/json' \\\n    -d '{body}'\n",
        flush=True,
    )


def _run_join(parsed: argparse.Namespace) -> int:
    from pdserve.serve.host import bring_worker
    from pdserve.serve.join_arguments import resolve_join

    return bring_worker(resolve_join(parsed, os.environ))


def _run_worker() -> int:
    from pdserve.serve.worker_main import main as worker_main

    return worker_main()


def _run_pull(parsed: argparse.Namespace) -> int:
    from pdserve.weights.pull import resolve

    folder = resolve(parsed.model)
    if parsed.json:
        print(json.dumps({"model": parsed.model, "path": str(folder)}))
    else:
        print(f"{parsed.model} is in {folder}")
    return 0


def _run_bench(parsed: argparse.Namespace) -> int:
    from pdserve.bench.command import run

    return run(parsed)


def _run_sim(parsed: argparse.Namespace) -> int:
    from pdserve.sim.command import run

    return run(parsed)


def _run_plan(parsed: argparse.Namespace) -> int:
    from pdserve.serve.client import Client
    from pdserve.sim.plan.command import run
    from pdserve.sim.plan.live import Recorded

    def fetch(url: str, api_key: str | None) -> Recorded:
        client = Client(url, api_key, flag="--live")
        return Recorded(client.cluster(), client.traffic())

    return run(parsed, fetch)


def _run_calibrate(parsed: argparse.Namespace) -> int:
    from pdserve.calibrate.command import run

    return run(parsed)


def _run_replay(parsed: argparse.Namespace) -> int:
    from dataclasses import asdict

    from pdserve.serve.replay import replay

    outcomes = replay(parsed.folder)
    equal = all(outcome.difference is None for outcome in outcomes)
    document = {"equal": equal, "files": [asdict(outcome) for outcome in outcomes]}
    if parsed.routes:
        from pdserve.calibrate.parity import compare, described
        from pdserve.serve.recorded import read_run

        parity = compare(read_run(parsed.folder))
        document["routes"] = {**asdict(parity), "same": parity.same}
    if parsed.json:
        print(json.dumps(document))
        return 0 if equal else 1
    for outcome in outcomes:
        verdict = "equal" if outcome.difference is None else f"DIFFERS\n{outcome.difference}"
        print(f"{outcome.file}: {outcome.num_inputs} inputs: {verdict}")
    if parsed.routes:
        print(described(parity))
    return 0 if equal else 1


def _run_explain(parsed: argparse.Namespace) -> int:
    from pdserve.serve.client import Client
    from pdserve.serve.explain import explain

    document = Client(parsed.url, parsed.api_key).timeline(parsed.request)
    if parsed.json:
        print(json.dumps(document))
    else:
        explain(document)
    return 0


def _run_operation(parsed: argparse.Namespace) -> int:
    from pdserve.serve.client import Client
    from pdserve.serve.operations import operate

    client = Client(parsed.url, parsed.api_key)
    done = operate(client, parsed, say=lambda text: None if parsed.json else print(text))
    if parsed.json:
        print(json.dumps({"workers": done}))
    return 0


def _run_top(parsed: argparse.Namespace) -> int:
    from pdserve.serve.client import Client
    from pdserve.serve.top import once, watch

    client = Client(parsed.url, parsed.api_key)
    if parsed.json:
        print(json.dumps(client.cluster()))
    elif parsed.once:
        once(client)
    else:
        watch(client, parsed.interval)
    return 0
