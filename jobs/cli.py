"""`crane`, the console script: the pipeline for a person at a terminal.

Results go to stdout (with `--json` as one JSON line), progress and errors to stderr. Exit codes as for the jobs:
0 done, 2 configuration, 3 data, 4 artifact, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig, Runtime
from crane_core.config_file import load_config
from crane_core.errors import EXIT_DATA, EXIT_OK, EXIT_UNEXPECTED, ConfigError, CraneError, UnexpectedError, error_of
from crane_core.storage.artifacts import check_run_id
from jobs.commands import capacity, paths
from jobs.commands.command_line import Command, command_line
from jobs.logs import redacted, shown

STOPPED_BY_HAND = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE
"""Exit codes that a shell gives a command which a signal has ended."""
AGAIN = "What was finished is kept: the same command goes on from there."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # A terminated command unwinds as an interrupted one does, and takes its jobs along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments = command_line(_commands()).parse_args(argv)
        return arguments.command(arguments)
    except BrokenPipeError:
        # The reader of the output has closed it, as `head` does. Python would complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        print("crane: stopped. The same command goes on from the last finished stage.", file=sys.stderr)
        return STOPPED_BY_HAND
    except Exception as exception:
        return _fail(exception, "--json" in argv)


def _fail(exception: Exception, as_json: bool) -> int:
    """Print an error; keep the traceback of an unexpected exception; return the exit code."""
    log = "" if isinstance(exception, CraneError) else _keep_traceback(exception)
    error = error_of(exception, f"This is a defect of crane: report this line with {log}. {AGAIN}")
    told = shown(error)
    if as_json:
        print(json.dumps(told))
    kind = f"{told['error']}: " if isinstance(error, UnexpectedError) else ""
    print(f"crane: {kind}{told['found']}\nRemedy: {told['remedy']}", file=sys.stderr)
    return error.exit_code


def _keep_traceback(exception: Exception) -> str:
    """Append a traceback to the log of the commands, or print it where that cannot be written; say where it is."""
    text = redacted("".join(traceback.format_exception(exception)))
    log = paths.HOME / "logs" / "crane.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}\n{text}\n")
    except OSError:
        print(text, file=sys.stderr)
        return "the traceback above, on stderr"
    return f"the last traceback in {log}"


def _commands() -> dict[str, Command]:
    """Return the functions of the commands by name."""
    return {
        "demo": _demo,
        "run": _run,
        "runs": _runs,
        "recommend": _recommend,
        "similar": _similar,
        "promote": _promote,
        "rollback": _rollback,
        "ledger": _ledger,
        "prune": _prune,
        "doctor": _doctor,
        "plan": _plan,
        "experiments": _experiments,
        "import": _import,
        "encode": _encode,
        "generate": _generate,
    }


def _demo(arguments: argparse.Namespace) -> int:
    from jobs.commands.demo import demo, show

    show(demo(arguments.data, arguments.config, arguments.set, arguments.home))
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> int:
    from jobs.commands.demo import run_id
    from jobs.commands.local import PROMOTE, retrain_steps, run_stages
    from jobs.commands.steps import Steps

    overrides = [
        *arguments.set,
        *([f"runtime.raw={absolute(arguments.raw)}"] if arguments.raw else []),
        *([f"window.start={arguments.start}"] if arguments.start else []),
        *([f"window.end={arguments.end}"] if arguments.end else []),
    ]
    config = load_config(arguments.config, overrides)
    run = arguments.run or run_id("run", config)
    check_run_id(run)
    flags = ["--store", arguments.store, "--run", run]
    if arguments.config:
        flags += ["--config", arguments.config]
    for override in overrides:
        flags += ["--set", override]
    names = [*retrain_steps(config), *(PROMOTE if arguments.promote else ())]
    if arguments.until and arguments.until not in names:
        raise ConfigError(
            f"--until {arguments.until!r} is no stage of this run.", f"Give --until one of {', '.join(names)}."
        )
    if arguments.until:
        names = names[: names.index(arguments.until) + 1]
    steps = Steps()
    log = paths.HOME / "logs" / f"{run}.log"
    results = run_stages(names, config, flags, log, steps)
    states = {label: result["status"] for label, result in results.items()}
    verdict = results.get("ml.promote", {})
    told = {key: verdict[key] for key in ("decision", "reason", "remedy") if verdict.get(key)}
    _result(
        arguments,
        {"run": run, "store": arguments.store, "stages": states, "seconds": round(steps.seconds, 1), **told},
        [
            *(f"{label:<22} {state}" for label, state in states.items()),
            f"run       {run}",
            *(f"{key:<9} {value}" for key, value in told.items()),
        ],
    )
    return EXIT_OK


def absolute(folder: str) -> str:
    """Return the absolute path of a folder, and a URI as it is."""
    return folder if "://" in folder else str(Path(folder).absolute())


def _runs(arguments: argparse.Namespace) -> int:
    from jobs.commands.query import runs

    found = runs(_store(arguments), _runtime(arguments))
    lines = [f"{'run':<40} {'window end':<11} {'stages':<7} {'version':<8} {'alias':<20} recall@20"]
    for run in found:
        recall = f"{run['recall@20']:.4f}" if run["recall@20"] is not None else "-"
        stages = f"{len(run['stages'])}/{run['num_stages']}"
        aliases = ",".join(run["aliases"]) or "-"
        version = run["model_version"] or "-"
        lines.append(f"{run['run']:<40} {run['end'][:10]:<11} {stages:<7} {version:<8} {aliases:<20} {recall}")
    _result(arguments, {"runs": found}, lines)
    return EXIT_OK


def _recommend(arguments: argparse.Namespace) -> int:
    from jobs.commands.query import recommend, served

    if arguments.items is None and arguments.times is not None:
        raise ConfigError("--times is given without --items.", "Give --items ID ID and as many --times, or --user ID.")
    store = _store(arguments)
    champion = served(store, _runtime(arguments))
    if arguments.items is None and arguments.category is None:
        answer = recommend(champion, arguments.user, arguments.k)
        _result(arguments, answer, _lines(answer["items"], "score"))
        return EXIT_OK
    from jobs.commands.newcomers import recommend_by_history, recommend_in_category

    if arguments.items is None:
        answer = recommend_in_category(champion, store, arguments.user, arguments.category, arguments.k)
        _result(arguments, answer, _lines(answer["items"], "score"))
        return EXIT_OK
    answer = recommend_by_history(champion, arguments.items, arguments.times, arguments.k, arguments.category)
    heading = ["nothing is known of these items; what is popular now:"] if answer["fallback"] else []
    if answer["unknown_items"] and not answer["fallback"]:
        heading = [f"not known, and left out: {', '.join(answer['unknown_items'])}"]
    _result(arguments, answer, [*heading, *_lines(answer["items"], "score")])
    return EXIT_OK


def _similar(arguments: argparse.Namespace) -> int:
    from jobs.commands.query import served, similar

    answer = similar(served(_store(arguments), _runtime(arguments)), arguments.item, arguments.k)
    heading = f"like {answer['title'] or answer['item']}"
    _result(arguments, answer, [heading, *_lines(answer["items"], "similarity")])
    return EXIT_OK


def _doctor(arguments: argparse.Namespace) -> int:
    from jobs.commands.doctor import diagnose

    store = arguments.store
    if store is None and (paths.HOME / "last.json").exists():
        store = paths.default_store()
    checks = diagnose(store, _runtime(arguments), arguments.deep)
    lines = []
    for check in checks:
        lines.append(f"{check['status']:<7} {check['name']:<9} {check['found']}")
        if check["remedy"]:
            lines.append(f"{'':17} Remedy: {check['remedy']}")
    healthy = all(check["status"] != "broken" for check in checks)
    _result(arguments, {"healthy": healthy, "checks": checks}, lines)
    return EXIT_OK if healthy else EXIT_UNEXPECTED


def _plan(arguments: argparse.Namespace) -> int:
    found = capacity.plan(arguments.users, arguments.items, arguments.interactions, arguments.modalities)
    print(json.dumps(found) if arguments.json else "\n".join(capacity.lines(found)))
    return EXIT_OK


def _import(arguments: argparse.Namespace) -> int:
    from crane_core.raw import importers
    from crane_core.raw.importers import Imported

    if (arguments.format == "check") != (arguments.raw is None):
        raise ConfigError(
            f"crane import {arguments.format} was given {'no folder' if arguments.raw is None else arguments.raw}.",
            "Type crane import check MAPPING, or crane import mapped MAPPING RAW and so on for the other formats.",
        )
    if arguments.format == "check":
        checked = importers.check_mapping(arguments.source)
        _result(arguments, checked.as_dict(), checked.lines())
        return EXIT_DATA if checked.problems else EXIT_OK
    importer: dict[str, Callable[[Path, Path], Imported]] = {
        "amazon": importers.import_amazon,
        "mapped": importers.import_mapped,
        "mmrec": importers.import_mmrec,
        "movielens": importers.import_movielens,
    }
    return _imported(arguments, importer[arguments.format](arguments.source, arguments.raw))


def _encode(arguments: argparse.Namespace) -> int:
    import torch

    from crane_core.raw.encoding import EncoderSpec, encode
    from jobs.logs import start_logging

    start_logging()
    torch.set_num_threads(arguments.threads)
    pictures = str(arguments.pictures.absolute()) if arguments.pictures else ""
    spec = EncoderSpec(arguments.model, tuple(arguments.columns or ()), pictures, arguments.picture_column)
    encoded = encode(arguments.raw, arguments.modality, spec, arguments.batch_size, arguments.device)
    _result(arguments, vars(encoded), [f"{key:<9} {value}" for key, value in vars(encoded).items()])
    return EXIT_OK


def _generate(arguments: argparse.Namespace) -> int:
    from crane_core.raw.generator import GeneratorSettings, generate

    settings = GeneratorSettings(
        num_rows=arguments.rows,
        num_users=arguments.users or max(100, arguments.rows // 20),
        num_items=arguments.items or max(50, arguments.rows // 100),
        num_days=arguments.days,
        seed=arguments.seed,
    )
    return _imported(arguments, generate(settings, arguments.raw))


def _imported(arguments: argparse.Namespace, imported: Any) -> int:
    start, end = imported.instants()
    answer = {**vars(imported), "start": start, "end": end, "next": _next_command(imported)}
    nested = ("counts", "matched", "notes", "next")
    lines = [f"{key:<17} {value}" for key, value in answer.items() if key not in nested]
    for section, counts in imported.counts.items():
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "set_aside")
        aside = "".join(f", set aside {count} ({reason})" for reason, count in counts["set_aside"].items())
        lines.append(f"{section:<17} {told}{aside}")
    lines += [f"{section:<17} has {share:.1%} of the items of the log" for section, share in imported.matched.items()]
    lines += [f"note: {note}" for note in imported.notes]
    _result(arguments, answer, [*lines, f"next: {answer['next']}"])
    return EXIT_OK


def _next_command(imported: Any) -> str:
    """Return the command that trains on an import, or what it lacks."""
    start, end = imported.instants()
    settings = [f"--start {start} --end {end}"]
    settings += [f"--set etl.split={imported.split}"] if imported.split != "temporal" else []
    settings += [f"--set etl.time_zone={imported.time_zone}"] if imported.time_zone not in ("UTC", None) else []
    run = f"crane run --store STORE --raw {shlex.quote(imported.raw)} {' '.join(settings)} --promote"
    if imported.modalities:
        return run
    return f"crane encode {shlex.quote(imported.raw)} or a section features in the mapping, then {run}"


def _experiments(arguments: argparse.Namespace) -> int:
    from jobs.commands.experiments import Request, experiments

    names = ("data", "only", "seeds", "budget_minutes", "trials", "out", "config", "set", "threads", "model")
    answer = experiments(Request(*(getattr(arguments, name) for name in names)))
    if not arguments.json:
        for name, found in answer["experiments"].items():
            print(f"{name:<11} {found['answer']}")
        print(f"report      {answer['report']}")
    print(json.dumps(answer), flush=True)
    return EXIT_OK


def _promote(arguments: argparse.Namespace) -> int:
    config = load_config(None, [], _store(arguments).run(arguments.run)["config"])
    names = ("ml.promote", "ml.export", "ml.report")
    return _move(arguments, names, config, ["--run", arguments.run], arguments.run)


def _rollback(arguments: argparse.Namespace) -> int:
    return _move(arguments, ("ml.rollback",), None, ["--to", arguments.to], "rollback")


def _move(
    arguments: argparse.Namespace, names: Sequence[str], config: RunConfig | None, flags: list[str], log: str
) -> int:
    from jobs.commands.local import run_stages
    from jobs.commands.steps import Steps

    flags = ["--store", _store(arguments).storage.uri, *flags]
    if arguments.registry:
        flags += ["--set", f"runtime.registry={arguments.registry}"]
    results = run_stages(names, config, flags, paths.HOME / "logs" / f"{log}.log", Steps())
    answer = results[names[0]]
    _result(arguments, answer, [f"{key:<9} {value}" for key, value in answer.items() if value not in ("", [])])
    return EXIT_OK


def _ledger(arguments: argparse.Namespace) -> int:
    from jobs.commands.query import verify_ledger

    if arguments.what == "repair":
        return _move(arguments, ("ml.repair",), None, [], "repair")
    answer = verify_ledger(_store(arguments), _runtime(arguments))
    _result(arguments, answer, [f"{key:<9} {value}" for key, value in answer.items()])
    return EXIT_OK


def _prune(arguments: argparse.Namespace) -> int:
    from jobs.prune import prune

    overrides = ["window.start=1970-01-01", "window.end=1970-01-02", f"promote.keep_versions={arguments.keep_versions}"]
    if arguments.registry:
        overrides.append(f"runtime.registry={arguments.registry}")
    answer = prune(_store(arguments), load_config(None, overrides), arguments.keep_days, arguments.dry_run)
    lines = [
        f"{answer['status']}: {len(answer['runs'])} runs, {answer['num_artifacts']} artifacts, "
        f"{answer['bytes']} bytes; {answer['num_kept']} runs are kept",
        *(f"{stage:<18} {num_bytes:>15} bytes" for stage, num_bytes in answer["stages"].items()),
    ]
    _result(arguments, answer, lines)
    return EXIT_OK


def _store(arguments: argparse.Namespace) -> Any:
    from jobs.stores import open_store

    store = open_store(arguments.store or paths.default_store())
    if not store.run_ids():
        raise ConfigError(
            f"{store.storage.uri} is no store with a run.",
            "Give --store of a store with runs, or make one: crane demo, or crane run --store STORE.",
        )
    return store


def _runtime(arguments: argparse.Namespace) -> Runtime:
    return Runtime(registry=arguments.registry)


def _lines(items: list[dict[str, Any]], figure: str) -> list[str]:
    lines = []
    for item in items:
        line = f"{item['rank']:3d}  {item[figure]:8.4f}  {item['item_id']:<12} {item['title'] or ''}".rstrip()
        because = item.get("because_title") or item.get("because_item_id")
        lines.append(f"{line}  (because of {because})" if because else line)
    return lines


def _result(arguments: argparse.Namespace, answer: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(answer) if arguments.json else "\n".join(lines), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
