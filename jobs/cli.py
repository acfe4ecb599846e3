"""`crane`, the console script: the pipeline for a person at a terminal.

Results go to stdout (with `--json` as one JSON line), progress and errors to stderr. Exit codes as for the jobs:
0 done, 2 configuration, 3 data, 4 artifact, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig, Runtime
from crane_core.config_file import load_config
from crane_core.errors import EXIT_OK, EXIT_UNEXPECTED, ConfigError, CraneError
from crane_core.storage.artifacts import check_run_id
from jobs.commands import capacity, place
from jobs.runner import redacted

STOPPED_BY_HAND = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE
"""What a shell says of a command that a signal ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = _parser().parse_args(argv)
    # A terminated command unwinds as an interrupted one does, and takes its jobs along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return arguments.command(arguments)
    except CraneError as error:
        if arguments.json:
            problem = {"error": type(error).__name__, "message": error.found, "remedy": error.remedy}
            print(redacted(json.dumps(problem)))
        print(redacted(f"crane: {error.found}\nRemedy: {error.remedy}"), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has what it wanted, as `head` does. Python would complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        print("crane: stopped. The same command goes on from the last finished stage.", file=sys.stderr)
        return STOPPED_BY_HAND


def _demo(arguments: argparse.Namespace) -> int:
    from jobs.commands.demo import demo, show

    show(demo(arguments.data, arguments.config, arguments.set, arguments.home))
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> int:
    from jobs.commands.demo import run_id
    from jobs.commands.local import PROMOTE, RETRAIN, run_stages
    from jobs.commands.steps import Steps

    overrides = [
        *arguments.set,
        *([f"runtime.raw={_absolute(arguments.raw)}"] if arguments.raw else []),
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
    names = [*RETRAIN, *(PROMOTE if arguments.promote else ())]
    if arguments.until and arguments.until not in names:
        raise ConfigError(f"--until {arguments.until!r} is no stage of this run.", f"Use one of {', '.join(names)}.")
    if arguments.until:
        names = names[: names.index(arguments.until) + 1]
    steps = Steps()
    log = place.HOME / "logs" / f"{run}.log"
    results = run_stages(names, config, flags, log, steps)
    states = {label: result["status"] for label, result in results.items()}
    _result(
        arguments,
        {"run": run, "store": arguments.store, "stages": states, "seconds": round(steps.seconds, 1)},
        [f"run  {run}", *(f"{label:<22} {state}" for label, state in states.items())],
    )
    return EXIT_OK


def _absolute(place: str) -> str:
    """A folder wherever the jobs are started; a URI as it is."""
    return place if "://" in place else str(Path(place).absolute())


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

    answer = recommend(served(_store(arguments), _runtime(arguments)), arguments.user, arguments.k)
    _result(arguments, answer, _lines(answer["items"], "score"))
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
    if store is None and (place.HOME / "last.json").exists():
        store = place.default_store()
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
    from jobs.runner import start_logging

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
    answer = {**vars(imported), "start": str(imported.start), "end": str(imported.end)}
    _result(arguments, answer, [f"{key:<17} {value}" for key, value in answer.items()])
    return EXIT_OK


def _experiments(arguments: argparse.Namespace) -> int:
    from jobs.commands.experiments import experiments

    answer = experiments(
        arguments.data,
        arguments.only,
        arguments.seeds,
        arguments.budget_minutes,
        arguments.trials,
        arguments.out,
        arguments.config,
        arguments.set,
        arguments.threads,
        arguments.model,
    )
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
    results = run_stages(names, config, flags, place.HOME / "logs" / f"{log}.log", Steps())
    _result(arguments, results[names[0]], [f"{key:<9} {value}" for key, value in results[names[0]].items()])
    return EXIT_OK


def _ledger(arguments: argparse.Namespace) -> int:
    from jobs.commands.query import verify_ledger

    answer = verify_ledger(_store(arguments), _runtime(arguments))
    _result(arguments, answer, [f"{key:<9} {value}" for key, value in answer.items()])
    return EXIT_OK


def _store(arguments: argparse.Namespace) -> Any:
    from jobs.runner import open_store

    store = open_store(arguments.store or place.default_store())
    if not store.run_ids():
        raise ConfigError(f"{store.storage.uri} is no store with a run.", "Correct --store, or make a run first.")
    return store


def _runtime(arguments: argparse.Namespace) -> Runtime:
    return Runtime(registry=arguments.registry)


def _lines(items: list[dict[str, Any]], figure: str) -> list[str]:
    return [
        f"{item['rank']:3d}  {item[figure]:8.4f}  {item['item_id']:<12} {item['title'] or ''}".rstrip()
        for item in items
    ]


def _result(arguments: argparse.Namespace, answer: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(answer) if arguments.json else "\n".join(lines), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crane", description="A daily pipeline to a promoted recommender.")
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="the result as one JSON line")
    stored = argparse.ArgumentParser(add_help=False)
    stored.add_argument("--store", help="artifact store; that of the last demo when absent")
    stored.add_argument("--registry", help="MLflow URI; the file in the store when absent")

    def command(name: str, work: Any, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[shared, *parents])
        added.set_defaults(command=work)
        return added

    demo = command("demo", _demo, "Build, judge and serve a recommender through Airflow.")
    demo.add_argument("--data", type=Path, help="folder in MMRec layout; MovieLens 100K when absent")
    demo.add_argument("--config", help="preset or YAML file; the preset that fits the data when absent")
    demo.add_argument("--set", action="append", default=[], metavar="section.field=value")

    demo.add_argument("--home", type=Path, default=place.HOME, help="folder for everything (default: %(default)s)")

    run = command("run", _run, "Run the stages of a run here, one after the other, without Airflow.")
    run.add_argument("--store", required=True, help="artifact store")
    run.add_argument("--run", help="run id; made of window and configuration when absent")
    run.add_argument("--raw", help="raw data, a folder or s3://bucket/prefix; {store}/raw when absent")
    run.add_argument("--config", help="preset or YAML file")
    run.add_argument("--set", action="append", default=[], metavar="section.field=value")
    run.add_argument("--start", help="first instant of the window, ISO 8601")
    run.add_argument("--end", help="first instant after the window, ISO 8601")
    run.add_argument("--promote", action="store_true", help="also judge, export and report")
    run.add_argument("--until", help="last stage to run, for example etl.features", metavar="STAGE")

    command("runs", _runs, "List the runs of a store.", stored)

    recommend = command("recommend", _recommend, "What the champion recommends to a user.", stored)
    recommend.add_argument("--user", required=True, metavar="ID")
    recommend.add_argument("-k", type=int, default=10, help="how many items")

    similar = command("similar", _similar, "Which items are like an item.", stored)
    similar.add_argument("--item", required=True, metavar="ID")
    similar.add_argument("-k", type=int, default=10, help="how many items")

    promote = command("promote", _promote, "Judge a run; if it passes, make it champion and export it.", stored)
    promote.add_argument("--run", required=True)

    rollback = command("rollback", _rollback, "Make an earlier version champion again.", stored)
    rollback.add_argument("--to", default="previous", metavar="VERSION|previous")

    ledger = command("ledger", _ledger, "Check the ledger of promotions against itself and the registry.", stored)
    ledger.add_argument("what", choices=("verify",))

    doctor = command("doctor", _doctor, "What works on this machine, and how to mend the rest.", stored)
    doctor.add_argument("--deep", action="store_true", help="also start Spark")

    planned = command("plan", _plan, "Memory, storage and seconds that a run of a given size takes, stage by stage.")
    for name in ("users", "items", "interactions"):
        planned.add_argument(f"--{name}", type=int, required=True, metavar="N")
    planned.add_argument(
        "--modalities",
        nargs="+",
        type=capacity.modality,
        required=True,
        metavar="NAME:WIDTH",
        help="for example text:384",
    )

    study = command(
        "experiments", _experiments, "Compare variants of the model on a dataset, or search for a better one."
    )
    study.add_argument("--data", type=Path, required=True, help="folder in MMRec layout with features")
    study.add_argument("--only", nargs="+", metavar="NAME", help="some of the experiments, or search")
    study.add_argument(
        "--model", default="crane", metavar="NAME", help="whose recipe the search is for (default: crane)"
    )
    study.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each variant is trained with each")
    study.add_argument("--budget-minutes", type=float, metavar="N", help="start no work that would end later")
    study.add_argument("--trials", type=int, default=30, help="recipes a search tries in all (default: %(default)s)")
    study.add_argument("--out", type=Path, help="folder for everything; one below .crane when absent")
    study.add_argument("--config", help="preset or YAML file with the default recipe; the shipped one when absent")
    study.add_argument("--set", action="append", default=[], metavar="section.field=value")
    study.add_argument("--threads", type=int, default=1, help="threads of torch and faiss (default: %(default)s)")

    importing = command("import", _import, "Bring a dataset into the raw layout.")
    importing.add_argument("format", choices=("amazon", "mapped", "mmrec", "movielens"))
    importing.add_argument(
        "source",
        type=Path,
        help="reviews of an Amazon category, its metadata beside them; mapping file of CSV, TSV, JSON lines or "
        "Parquet files; folder in MMRec layout, or the wheel that carries MovieLens",
    )
    importing.add_argument("raw", type=Path, help="folder to make")

    encoding = command("encode", _encode, "Make item features from raw text or pictures (pip extra `encode`).")
    encoding.add_argument("raw", type=Path, help="folder of the raw data, with a catalog items/*.parquet")
    encoding.add_argument("--modality", required=True, metavar="NAME", help="the features are features/NAME")
    encoding.add_argument("--model", required=True, help="sentence-transformers model, a name of the hub or a folder")
    source = encoding.add_mutually_exclusive_group(required=True)
    source.add_argument("--columns", nargs="+", metavar="COLUMN", help="text columns of the catalog")
    source.add_argument("--pictures", type=Path, metavar="FOLDER", help="of ITEM_ID.jpg, .jpeg, .png or .webp")
    source.add_argument(
        "--picture-column", default="", metavar="COLUMN", help="column of the catalog, paths of pictures below RAW"
    )
    encoding.add_argument("--batch-size", type=int, default=64, help="items at once (default: %(default)s)")
    encoding.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    encoding.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")

    generating = command("generate", _generate, "Generate a log and features with a known truth, at any size.")
    generating.add_argument("raw", type=Path, help="folder to make")
    generating.add_argument("--rows", type=int, default=1_000_000, help="rows of the log (default: %(default)s)")
    generating.add_argument("--users", type=int, help="a twentieth of the rows when absent")
    generating.add_argument("--items", type=int, help="a hundredth of the rows when absent")
    generating.add_argument("--days", type=int, default=30, help="arrival days (default: %(default)s)")
    generating.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
