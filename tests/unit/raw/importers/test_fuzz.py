"""Random inputs to every importer: sound ones come out right, damaged ones are right or a typed error; counts add up.

`FUZZ_INPUTS=100000 pytest tests/unit/raw/importers/test_fuzz.py` tries more inputs than the 2,000 of a test run.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from crane_core.errors import CraneError
from crane_core.raw.importers import (
    Imported,
    cells,
    check_mapping,
    import_amazon,
    import_mapped,
    import_mmrec,
    import_movielens,
    mapped,
)
from crane_core.raw.importers.cells import Cells
from tests.worlds.sources import LOG, MOVIES, RATED
from tests.worlds.tables import Row, Written, damages, logs, odd_columns

INPUTS = int(os.environ.get("FUZZ_INPUTS", "2000"))
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def some(share: float) -> settings:
    """Settings that try a share of the inputs."""
    return settings(
        max_examples=max(1, int(share * INPUTS)), deadline=None, suppress_health_check=CHECKS, database=None
    )


def bring(written: Written, data: bytes, **log: Any) -> tuple[Imported, list[tuple[str, Row]]]:
    """Import a log and return what came out, each row with its day."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / written.name).write_bytes(data)
        mapping = {"dataset": "d", "interactions": {**written.log, **log}}
        (folder / "m.yaml").write_text(yaml.safe_dump(mapping))
        imported = import_mapped(folder / "m.yaml", folder / "raw")
        check_sums(imported, folder / "raw")
        return imported, list(rows_of(folder / "raw"))


def check_typed(error: CraneError) -> None:
    """Check that an error tells what was found and what to do, and blames no defect of ours."""
    assert error.found and error.remedy
    assert "defect of the importer" not in error.remedy, error


def check_foretold(mapping: Path, raw: Path) -> None:
    """Check and import a small input: a check without a problem goes before an import that does not stop."""
    try:
        problems = check_mapping(mapping).problems
    except CraneError as error:
        problems = [error.as_dict()]
    assert all(each["found"] and each["remedy"] for each in problems)
    try:
        check_sums(import_mapped(mapping, raw), raw)
    except CraneError as error:
        check_typed(error)
        assert problems, f"the check did not find: {error}"
    else:
        assert not problems, f"the check found {problems}, but the import does not stop"


def rows_of(raw: Path) -> Iterator[tuple[str, Row]]:
    for path in sorted((raw / "interactions").rglob("*.parquet")):
        table = pq.read_table(path, partitioning=None)
        table = table.set_column(2, "event_time", table["event_time"].cast(pa.int64()))
        for user, item, micros, weight, label in zip(
            *(table[n].to_pylist() for n in table.column_names[:5]), strict=True
        ):
            yield path.parent.name.removeprefix("dt="), Row(user, item, micros, weight, label)


def check_sums(imported: Imported, raw: Path) -> None:
    """What was read is what was written and what was set aside, and what was written is there."""
    for counts in imported.counts.values():
        assert counts["rows"] == counts["written"] + sum(counts["set_aside"].values())
        if "lines" in counts:
            held = counts["rows"] + sum(counts.get(name, 0) for name in ("headers", "blank", "continued"))
            assert counts["lines"] == held
    assert sum(pq.read_metadata(path).num_rows for path in (raw / "interactions").rglob("*.parquet")) == (
        imported.num_interactions
    )


def check_sound(written: Written) -> None:
    imported, found = bring(written, written.data)
    expected = Counter((row.day(written.log["zone"]), row) for row in written.rows)
    assert Counter(found) == expected
    assert imported.counts["interactions"]["rows"] == len(written.rows)


@pytest.mark.slow
@some(0.5)
@given(logs())
def test_a_sound_log_comes_out_as_it_is(written: Written) -> None:
    check_sound(written)


@pytest.mark.slow
@some(0.3)
@given(logs(), damages(), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_damaged_log_is_right_or_a_typed_error(
    written: Written, spoil: Callable[[bytes], bytes], most: float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / written.name).write_bytes(spoil(written.data))
        mapping = {"dataset": "d", "interactions": {**written.log, "max_set_aside": most}}
        (folder / "m.yaml").write_text(yaml.safe_dump(mapping))
        check_foretold(folder / "m.yaml", folder / "raw")


LOG_COLUMNS = {"user_id": "u", "item_id": "i", "event_time": "t"}
ODD = odd_columns()


def in_every_role(column: str) -> Iterator[dict[str, Any]]:
    """Mappings of `e.parquet` that take a column for everything it can be."""
    table = {"files": ["e.parquet"], "max_set_aside": 1.0}
    log = {"interactions": {**table, "columns": LOG_COLUMNS, "time": "s"}}
    for role, time in itertools.product([*LOG_COLUMNS, "weight", "label", "event_type"], ["s", "iso", "%Y-%m-%d"]):
        if role == "event_time" or time == "s":
            yield {"interactions": {**table, "columns": {**LOG_COLUMNS, role: column}, "time": time}}
    for role in ("user_id", "item_id"):
        yield {"interactions": {**log["interactions"], "columns": {**LOG_COLUMNS, role: column}, "numeric": [role]}}
    for kind in ("text", "number", "time", "flag"):
        yield {**log, "items": {**table, "columns": {"item_id": "i", "x": column}, "types": {"x": kind}}}
    for kind in ("vectors", "categories", "numbers"):
        yield {**log, "features": {"m": {**table, "kind": kind, "columns": {"item_id": "i", "vector": column}}}}
    yield {**log, "features": {"m": {**table, "columns": {"item_id": column, "vector": "v"}}}}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ODD))
def test_a_column_of_any_type_is_right_or_a_typed_error_in_every_role(tmp_path: Path, name: str) -> None:
    others = {"u": ["a", "b", "c"], "i": ["x", "y", "z"], "t": [1433221332] * 3, "v": [[1.0]] * 3}
    pq.write_table(pa.table({**others, "x": ODD[name]}), tmp_path / "e.parquet")
    columns = ("x", "x.n") if "struct" in name else ("x",)
    for number, mapping in enumerate(mapping for column in columns for mapping in in_every_role(column)):
        (tmp_path / "m.yaml").write_text(yaml.safe_dump({"dataset": "d", **mapping}))
        check_foretold(tmp_path / "m.yaml", tmp_path / f"raw{number}")


REVIEW = {"rating": 5.0, "user_id": "A1", "parent_asin": "B1", "timestamp": 1588687728923, "title": "good"}
PRODUCT = {"parent_asin": "B1", "title": "Blue kettle", "features": ["steel"], "description": [], "categories": None}


def write_others(folder: Path) -> dict[str, Callable[[Path], Imported]]:
    """Write a small source for each importer of a known format; return how each is imported."""
    (folder / "Cat.jsonl").write_text("".join(json.dumps({**REVIEW, "user_id": f"A{n}"}) + "\n" for n in range(3)))
    (folder / "meta_Cat.jsonl").write_text(
        "".join(json.dumps({**PRODUCT, "parent_asin": f"B{n}"}) + "\n" for n in range(3))
    )
    (folder / "tiny.inter").write_text(LOG)
    (folder / "items.tsv").write_text('itemID\tname\n1\tThe "B" side\n0\tA\n')
    np.save(folder / "text_feat.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    (folder / "ml-100k.inter").write_text(RATED)
    (folder / "ml-100k.item").write_text(MOVIES)
    return {
        "Cat.jsonl": lambda raw: import_amazon(folder / "Cat.jsonl", raw),
        "meta_Cat.jsonl": lambda raw: import_amazon(folder / "Cat.jsonl", raw),
        "tiny.inter": lambda raw: import_mmrec(folder, raw),
        "items.tsv": lambda raw: import_mmrec(folder, raw),
        "text_feat.npy": lambda raw: import_mmrec(folder, raw),
        "ml-100k.inter": lambda raw: import_movielens(folder, raw),
        "ml-100k.item": lambda raw: import_movielens(folder, raw),
    }


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3), max_size=2)
)


@pytest.mark.slow
@some(0.15)
@given(st.data(), damages())
def test_other_formats_are_right_or_a_typed_error(data: st.DataObject, spoil: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        importers = write_others(folder)
        file = data.draw(st.sampled_from(list(importers)))
        if file != "tiny.inter" and file != "items.tsv" and file != "text_feat.npy":
            (folder / "tiny.inter").unlink()
        else:
            (folder / "ml-100k.inter").unlink()
        if file.endswith("jsonl") and data.draw(st.booleans()):
            sound = json.loads((folder / file).read_text().splitlines()[0])
            field = data.draw(st.sampled_from(sorted(sound)))
            with (folder / file).open("a") as lines:
                lines.write(json.dumps({**sound, field: data.draw(VALUES)}) + "\n")
        else:
            (folder / file).write_bytes(spoil((folder / file).read_bytes()))
        try:
            imported = importers[file](folder / "raw")
        except CraneError as error:
            check_typed(error)
        else:
            check_sums(imported, folder / "raw")


WORDS = st.sampled_from(
    ["csv", "none", '"', ",", "s", "iso", "%d", "utf-16", "rot13", "Mars", "item_id", "u", "", "*", "..", "é"]
)
LEAVES = WORDS | VALUES
FIELDS = st.sampled_from(
    [*mapped.MappedLog.model_fields, *mapped.MappedItems.model_fields, "ids", "kind", "most", "values"]
)
SECTIONS = st.dictionaries(
    FIELDS, LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(WORDS, LEAVES, max_size=3), max_size=4
)


@pytest.mark.slow
@some(0.05)
@given(SECTIONS, st.none() | SECTIONS, st.dictionaries(WORDS, SECTIONS, max_size=2), st.text(max_size=9))
def test_a_mapping_of_anything_is_right_or_a_typed_error(
    log: dict[str, Any], items: dict[str, Any] | None, features: dict[str, Any], junk: str
) -> None:
    sound = {"files": ["log.csv"], "columns": {"user_id": "u", "item_id": "i", "event_time": "t"}, "time": "s"}
    table = {"files": ["log.csv"], "columns": {"item_id": "i", "vector": "t"}, "kind": "numbers"}
    mapping = {"dataset": "d", "interactions": sound | log}
    mapping |= {"items": {"files": ["log.csv"], "columns": {"item_id": "i"}} | items} if items is not None else {}
    mapping |= {"features": {name: table | entry for name, entry in features.items()}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "log.csv").write_text("u,i,t\na,x,1433221332\nb,y,1433221333\n")
        text = yaml.safe_dump(mapping)
        (folder / "m.yaml").write_text(text if len(junk) < 5 else text.replace("files", junk, 1))
        check_foretold(folder / "m.yaml", folder / "raw")


IDS = st.sampled_from(["i1", "i2", "i3", "", " ", "1.0", "1", "u1", "é", None])
NUMBERS = st.none() | st.sampled_from([1.0, float("nan"), float("inf"), 1e300, -0.0])
WORD_CELLS = st.sampled_from(["", "NA", "Tea", "Tea|Pot", "a|b|c", "[]"])
CONTENT = {
    "vectors": st.none() | st.lists(NUMBERS, max_size=2),
    "categories": st.none()
    | st.sampled_from(["", "NA", "Tea", "Tea|Pot", "a|b|c", "[]"])
    | st.lists(st.text(max_size=2)),
    "numbers": NUMBERS | st.sampled_from(["1", "x", ""]),
}


@pytest.mark.slow
@some(0.1)
@given(st.data(), st.sampled_from(list(CONTENT)), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_check_finds_what_stops_the_import_of_features(data: st.DataObject, kind: str, most: float) -> None:
    rows = data.draw(st.lists(st.fixed_dictionaries({"i": IDS, "v": CONTENT[kind]}), max_size=4))
    log = data.draw(st.lists(st.tuples(IDS, IDS, st.sampled_from(["2020-01-01", "", "0001-01-01", "x"])), max_size=3))
    events = [dict(zip("uit", row, strict=True)) for row in log]
    columns = {"user_id": "u", "item_id": "i", "event_time": "t"}
    mapping: dict[str, Any] = {"interactions": {"files": ["ev.jsonl"], "columns": columns, "max_set_aside": most}}
    table = {"files": ["f.jsonl"], "columns": {"item_id": "i", "vector": "v"}, "max_set_aside": most}
    mapping["features"] = {"m": {**table, "kind": kind, **({"most": 2} if kind == "categories" else {})}}
    mapping["items"] = {"files": ["f.jsonl"], "columns": {"item_id": "i"}}
    if kind == "vectors" and data.draw(st.booleans()):
        mapping["features"]["m"] |= {"files": ["f.npy"], "ids": "ids.txt"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
        (folder / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        matrix = data.draw(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=len(rows), max_size=len(rows)))
        np.save(folder / "f.npy", np.array(matrix, dtype=np.float64).reshape(len(rows), 2))
        (folder / "ids.txt").write_text("".join(f"{row['i'] or ''}\n" for row in rows))
        (folder / "m.yaml").write_text(yaml.safe_dump({"dataset": "d", **mapping}))
        check_foretold(folder / "m.yaml", folder / "raw")


def drop_a_row(patch: pytest.MonkeyPatch) -> None:
    write = mapped.write_log

    def losing(target: Path, batches: Iterator[pa.RecordBatch], zone: str) -> int:
        return write(target, (batch.slice(1) if batch.num_rows > 1 else batch for batch in batches), zone)

    patch.setattr(mapped, "write_log", losing)


def drop_a_row_before_it_is_counted(patch: pytest.MonkeyPatch) -> None:
    read = mapped.read_chunks

    def losing(path: Path, layout: Any, columns: Any, account: Any) -> Iterator[Any]:
        for chunk in read(path, layout, columns, account):
            if len(chunk) > 1:
                account.rows -= 1
                account.text_rows -= bool(account.lines)
                account.blank += bool(account.lines)
                shorter = {name: values[1:] for name, values in chunk.columns.items()}
                chunk = type(chunk)(chunk.path, shorter, chunk.lines[1:], chunk.unit)
            yield chunk

    patch.setattr(mapped, "read_chunks", losing)


def round_an_id(patch: pytest.MonkeyPatch) -> None:
    convert = cells.ids

    def rounding(values: Any, *rest: Any) -> Cells:
        found = convert(values, *rest)
        if not isinstance(values, pa.Array) or not pa.types.is_integer(values.type):
            return found
        return Cells(values.cast(pa.float32(), safe=False).cast(pa.int64(), safe=False).cast(pa.string()), found.bad)

    patch.setattr(cells, "ids", rounding)


def shift_a_day(patch: pytest.MonkeyPatch) -> None:
    write = mapped.write_log
    patch.setattr(mapped, "write_log", lambda target, batches, zone: write(target, batches, "UTC"))


def shift_an_instant(patch: pytest.MonkeyPatch) -> None:
    convert = mapped.instants

    def shifting(values: Any, clock: Any, missing: Any) -> Cells:
        found = convert(values, clock, missing)
        is_text = not isinstance(values, pa.Array) and any("T" in str(value) for value in values)
        return (
            Cells(pc.add(found.values, pa.scalar(86_400_000_000, pa.duration("us"))), found.bad) if is_text else found
        )

    patch.setattr(mapped, "instants", shifting)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", [drop_a_row, drop_a_row_before_it_is_counted, round_an_id, shift_a_day, shift_an_instant]
)
def test_a_planted_defect_is_found(plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    found = settings(
        max_examples=400, phases=[Phase.generate], deadline=None, suppress_health_check=CHECKS, database=None
    )(given(logs())(check_sound))
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises((AssertionError, CraneError, ExceptionGroup)):
            found()
