"""The commands of `crane` and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from jobs.commands import capacity, paths
from jobs.entry_points import FlagParser

Command = Callable[[argparse.Namespace], int]
"""Runs a command and returns its exit code."""


def command_line(work: Mapping[str, Command]) -> FlagParser:
    """Return the parser of all commands; it sets `command` to the function of the one that is given.

    Args:
        work: name of a command to its function.
    """
    parser = FlagParser(prog="crane", description="A daily pipeline to a promoted recommender.")
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = FlagParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="the result as one JSON line")
    stored = FlagParser(add_help=False)
    stored.add_argument("--store", help="artifact store; that of the last demo when absent")
    stored.add_argument("--registry", help="MLflow URI; the file in the store when absent")

    def command(name: str, text: str, *parents: FlagParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[shared, *parents])
        added.set_defaults(command=work[name])
        return added

    demo = command("demo", "Build, judge and serve a recommender through Airflow.")
    demo.add_argument("--data", type=Path, help="folder in MMRec layout; MovieLens 100K when absent")
    demo.add_argument("--config", help="preset or YAML file; the preset that fits the data when absent")
    demo.add_argument("--set", action="append", default=[], metavar="section.field=value")

    demo.add_argument("--home", type=Path, default=paths.HOME, help="folder for everything (default: %(default)s)")

    run = command("run", "Run the stages of a run here, one after the other, without Airflow.")
    run.add_argument("--store", required=True, help="artifact store")
    run.add_argument("--run", help="run id; made of window and configuration when absent")
    run.add_argument("--raw", help="raw data, a folder or s3://bucket/prefix; {store}/raw when absent")
    run.add_argument("--config", help="preset or YAML file")
    run.add_argument("--set", action="append", default=[], metavar="section.field=value")
    run.add_argument("--start", help="first instant of the window, ISO 8601")
    run.add_argument("--end", help="first instant after the window, ISO 8601")
    run.add_argument("--promote", action="store_true", help="also judge, export and report")
    run.add_argument("--until", help="last stage to run, for example etl.features", metavar="STAGE")

    command("runs", "List the runs of a store.", stored)

    recommend = command("recommend", "What the champion recommends to a user, or to whoever met some items.", stored)
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", metavar="ID", help="a user of the data")
    who.add_argument("--items", nargs="+", metavar="ID", help="items that somebody has met")
    recommend.add_argument("--times", nargs="+", metavar="TIME", help="when, ISO 8601, one for each of --items")
    recommend.add_argument("--category", help="only items of this category of the catalog")
    recommend.add_argument("-k", "--k", type=int, default=10, help="how many items")

    similar = command("similar", "Which items are like an item.", stored)
    similar.add_argument("--item", required=True, metavar="ID")
    similar.add_argument("-k", type=int, default=10, help="how many items")

    promote = command("promote", "Judge a run; if it passes, make it champion and export it.", stored)
    promote.add_argument("--run", required=True)

    rollback = command("rollback", "Make an earlier version champion again.", stored)
    rollback.add_argument("--to", default="previous", metavar="VERSION|previous")

    ledger = command("ledger", "Check the ledger of promotions against itself and the registry, or repair.", stored)
    ledger.add_argument(
        "what", choices=("verify", "repair"), help="repair: go back to a champion that can be served, by a new line"
    )

    prune = command("prune", "Remove the runs and artifacts of a store that nothing needs.", stored)
    prune.add_argument(
        "--keep-days", type=int, required=True, metavar="N", help="keep windows that ended within N days of the newest"
    )
    prune.add_argument(
        "--keep-versions", type=int, default=5, metavar="N", help="champions to keep (default: %(default)s)"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")

    doctor = command("doctor", "What works on this machine, and how to mend the rest.", stored)
    doctor.add_argument("--deep", action="store_true", help="also start Spark")

    planned = command("plan", "Memory, storage and seconds that a run of a given size takes, stage by stage.")
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

    study = command("experiments", "Compare variants of the model on a dataset, or search for a better one.")
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

    importing = command("import", "Bring a dataset into the raw layout, or check what a mapping would bring.")
    importing.add_argument(
        "format",
        choices=("amazon", "mapped", "mmrec", "movielens", "check"),
        help="of the source; `check MAPPING` reads a sample, shows what each column is taken for, and writes nothing",
    )
    importing.add_argument(
        "source",
        type=Path,
        help="reviews of an Amazon category, its metadata beside them; mapping file of CSV, TSV, JSON lines or "
        "Parquet files; folder in MMRec layout, or the wheel that carries MovieLens",
    )
    importing.add_argument("raw", type=Path, nargs="?", help="folder to make; none for check")

    encoding = command("encode", "Make item features from raw text or pictures (pip extra `encode`).")
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

    generating = command("generate", "Generate a log and features with a known truth, at any size.")
    generating.add_argument("raw", type=Path, help="folder to make")
    generating.add_argument("--rows", type=int, default=1_000_000, help="rows of the log (default: %(default)s)")
    generating.add_argument("--users", type=int, help="a twentieth of the rows when absent")
    generating.add_argument("--items", type=int, help="a hundredth of the rows when absent")
    generating.add_argument("--days", type=int, default=30, help="arrival days (default: %(default)s)")
    generating.add_argument("--seed", type=int, default=0)
    return parser
