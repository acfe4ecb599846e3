"""Random interaction logs, and the many ways in which people write one down."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST, LAST = datetime(1991, 1, 1), datetime(2025, 12, 31)
ZONES = ("UTC", "Asia/Tokyo", "America/New_York", "Europe/Berlin", "Asia/Kathmandu", "Pacific/Apia")
RATES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
LABELS = (("0", "train", "Training"), ("1", "valid", "DEV"), ("2", "test", "TEST"))


@dataclass(frozen=True)
class Row:
    """One interaction as it must come out.

    Attributes:
        user, item: ids.
        micros: time, microseconds since 1970.
        weight, label: or None.
    """

    user: str
    item: str
    micros: int
    weight: float | None
    label: int | None

    def day(self, zone: str) -> str:
        """Return the day of the event in a zone."""
        return str((EPOCH + timedelta(microseconds=self.micros)).astimezone(ZoneInfo(zone)).date())


@dataclass(frozen=True)
class Written:
    """A log as somebody has written it.

    Attributes:
        rows: what must come out.
        name: of the file.
        data: its bytes.
        log: the section `interactions` of its mapping.
    """

    rows: tuple[Row, ...]
    name: str
    data: bytes
    log: dict[str, Any]


TEXT_IDS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"), blacklist_characters="\ufeff"), min_size=1, max_size=8
).filter(lambda text: text.strip(" "))
NUMBER_IDS = st.integers(1 - 2**53, 2**53 - 1).map(str)
INSTANTS = st.datetimes(FIRST, LAST).map(lambda time: (time.replace(tzinfo=UTC) - EPOCH) // timedelta(microseconds=1))
WEIGHTS = st.none() | st.floats(0, 1e6, width=32)


@st.composite
def logs(draw: st.DrawFn) -> Written:
    """A random log of up to eight rows in a random format."""
    numeric = draw(st.booleans())
    ids = NUMBER_IDS if numeric else TEXT_IDS
    rate = draw(st.sampled_from(list(RATES)))
    step = max(1, 10**6 // RATES[rate])
    size = draw(st.integers(1, 8))
    rows = tuple(
        Row(
            draw(ids),
            draw(ids),
            draw(INSTANTS) // step * step,
            draw(WEIGHTS),
            draw(st.none() | st.integers(0, 2)),
        )
        for _ in range(size)
    )
    write = draw(st.sampled_from([_delimited, _json, _parquet]))
    zone = draw(st.sampled_from(ZONES))
    return write(draw, rows, numeric, rate, zone)


def _log(name: str, zone: str, time: str, **settings: Any) -> dict[str, Any]:
    columns = {"user_id": "u", "item_id": "i", "event_time": "t", "weight": "w", "label": "l"}
    return {"files": [name], "columns": columns, "zone": zone, "time": time, **settings}


def _time(draw: st.DrawFn, rows: tuple[Row, ...], rate: str, zone: str) -> tuple[str, list[str]]:
    """The setting `time`, and each time as text."""
    form = draw(st.sampled_from(["number", "float", "Z", " UTC", "offset", "local", "format"]))
    instants = [EPOCH + timedelta(microseconds=row.micros) for row in rows]
    counts = [row.micros * RATES[rate] // 10**6 for row in rows]
    if form == "number":
        return rate, [str(count) for count in counts]
    if form == "float":
        return rate, [f"{count}.0" for count in counts]
    if form == "local":
        local = [instant.astimezone(ZoneInfo(zone)) for instant in instants]
        if all(time.fold == 0 for time in local):
            return "iso", [time.replace(tzinfo=None).isoformat(" ") for time in local]
    if form == "offset":
        return "iso", [instant.astimezone(ZoneInfo("Asia/Kathmandu")).isoformat() for instant in instants]
    if form == "format":
        return "%d.%m.%Y %H:%M:%S.%f%z", [instant.strftime("%d.%m.%Y %H:%M:%S.%f%z") for instant in instants]
    ending = form if form in ("Z", " UTC") else "Z"
    return "iso", [instant.replace(tzinfo=None).isoformat() + ending for instant in instants]


def _delimited(draw: st.DrawFn, rows: tuple[Row, ...], numeric: bool, rate: str, zone: str) -> Written:
    quoted = draw(st.booleans())
    separator = draw(st.sampled_from([",", ";", "\t", "|"] if quoted else ["\t", "::"]))
    comma = separator != "," and draw(st.booleans())
    if not quoted:
        rows = tuple(
            Row(row.user.replace(":", "_"), row.item.replace(":", "_"), row.micros, row.weight, row.label)
            for row in rows
        )
    time, times = _time(draw, rows, rate, zone)
    missing = draw(st.sampled_from(["", "NA", "null", r"\N"]))
    header = draw(st.booleans())
    table = [["u", "i", "t", "w", "l"]] if header else []
    for row, at in zip(rows, times, strict=True):
        weight = missing if row.weight is None else repr(row.weight).replace(".", "," if comma else ".")
        label = missing if row.label is None else draw(st.sampled_from(LABELS[row.label]))
        table.append([row.user, row.item, at, weight, label])
    end = draw(st.sampled_from(["\n", "\r\n"]))
    text = io.StringIO()
    if quoted:
        always = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        # Spreadsheets write separators without a value at the end of rows.
        ends = [[""] * draw(st.integers(0, 2)) for _ in table[1:]]
        padded = [table[0], *([*row, *more] for row, more in zip(table[1:], ends, strict=True))]
        csv.writer(text, delimiter=separator, quoting=always, lineterminator=end).writerows(padded)
    else:
        text.write("".join(separator.join(row) + end for row in table))
    told = quoted and separator in ",;|\t" and draw(st.booleans())
    if told:
        text = io.StringIO(f"sep={separator}{end}{text.getvalue()}")
    encoding, setting = draw(
        st.sampled_from([("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-8"), ("utf-16-le",) * 2])
    )
    data = text.getvalue().encode(encoding)
    packed = draw(st.booleans())
    name = f"log.{'csv' if quoted else 'tsv'}{'.gz' if packed else ''}"
    given = None if told else separator
    log = _log(name, zone, time, separator=given, header=header, encoding=setting, decimal="," if comma else ".")
    if not header:
        log["columns"] = {name: place for place, name in enumerate(log["columns"], 1)}
    return Written(rows, name, gzip.compress(data, 1) if packed else data, log)


def _json(draw: st.DrawFn, rows: tuple[Row, ...], numeric: bool, rate: str, zone: str) -> Written:
    time, times = _time(draw, rows, rate, zone)
    as_number = numeric and draw(st.booleans())
    as_float = as_number and draw(st.booleans())
    form: Callable[[str], Any] = (lambda text: float(int(text)) if as_float else int(text)) if as_number else str
    objects: list[dict[str, Any]] = []
    nested = draw(st.booleans())
    for row, at in zip(rows, times, strict=True):
        fields: dict[str, Any] = {"u": form(row.user), "i": form(row.item)}
        fields["t"] = json.loads(at) if time in RATES else at
        fields["w"], fields["l"] = row.weight, row.label
        # The first row has every field, so that the file has them.
        kept = fields if not objects else {name: value for name, value in fields.items() if value is not None}
        objects.append({"at": kept} if nested else kept)
    if draw(st.booleans()):
        text = json.dumps(objects, ensure_ascii=draw(st.booleans()), indent=draw(st.none() | st.integers(0, 2)))
        name = "log.json"
    else:
        ends = ["\n" * draw(st.integers(1, 2)) for _ in objects]
        text = "".join(json.dumps(each) + end for each, end in zip(objects, ends, strict=True))
        name = draw(st.sampled_from(["log.jsonl", "log.json"]))
    log = _log(name, zone, time)
    if nested:
        log["columns"] = {name: f"at.{field}" for name, field in log["columns"].items()}
    return Written(rows, name, text.encode(), log)


def _parquet(draw: st.DrawFn, rows: tuple[Row, ...], numeric: bool, rate: str, zone: str) -> Written:
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    kinds += [pa.int64(), pa.float64(), pa.decimal128(20, 0)] if numeric else [pa.binary()]
    arrays = []
    for ids in ([row.user for row in rows], [row.item for row in rows]):
        kind = draw(st.sampled_from(kinds))
        text = pa.array(ids, pa.string())
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            text = text.cast(pa.int64())
        arrays.append(text.dictionary_encode() if pa.types.is_dictionary(kind) else text.cast(kind))
    counts = pa.array([row.micros * RATES[rate] // 10**6 for row in rows], pa.int64())
    if draw(st.booleans()):
        arrays.append(counts.cast(pa.timestamp(rate, draw(st.sampled_from(ZONES)))))
        time = draw(st.sampled_from(["iso", "s", "ms", "%Y-%m-%d"]))
    else:
        arrays.append(counts)
        time = rate
    arrays.append(pa.array([row.weight for row in rows], draw(st.sampled_from([pa.float32(), pa.float64()]))))
    arrays.append(pa.array([row.label for row in rows], draw(st.sampled_from([pa.int8(), pa.int64(), pa.float64()]))))
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, names=list("uitwl")),
        buffer,
        use_deprecated_int96_timestamps=draw(st.booleans()),
        row_group_size=draw(st.integers(1, 8)),
    )
    return Written(rows, "log.parquet", buffer.getvalue(), _log("log.parquet", zone, time))


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A way to spoil a file: cut, changed, inserted or repeated bytes."""
    share, length = draw(st.floats(0, 1)), draw(st.integers(1, 9))
    junk = draw(
        st.binary(max_size=6)
        | st.sampled_from([b'"', b"\n", b"\r", b",", b"\t", b"\x00", b"\xff", b"1e999", b"{", b"null"])
    )
    kind = draw(st.sampled_from(["cut", "change", "insert", "repeat", "junk"]))

    def spoil(data: bytes) -> bytes:
        at = int(share * len(data))
        changed = {
            "cut": data[:at],
            "change": data[:at] + junk + data[at + len(junk) :],
            "insert": data[:at] + junk + data[at:],
            "repeat": data[:at] + data[max(0, at - length) : at] * 3 + data[at:],
            "junk": junk * length,
        }
        return changed[kind]

    return spoil


STRUCT = pa.struct([("n", pa.string())])
ODD_VALUES: list[tuple[list[Any], list[pa.DataType]]] = [
    ([None, None, None], [pa.null()]),
    ([True, None, False], [pa.bool_()]),
    ([1, None, 3], [pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()]),
    ([1, None, 3], [pa.time32("s"), pa.time64("us"), pa.duration("s")]),
    ([float("inf"), float("nan"), -0.0], [pa.float64()]),
    ([Decimal(1), None, Decimal(2)], [pa.decimal128(38, 0)]),
    ([Decimal("1.5"), None, Decimal(2)], [pa.decimal32(5, 1)]),
    ([Decimal(10) ** 50, None, None], [pa.decimal256(60)]),
    (["a", None, "1"], [pa.string(), pa.large_string(), pa.string_view()]),
    ([b"a", None, b"\xff"], [pa.binary(), pa.large_binary(), pa.binary_view()]),
    ([b"0" * 16, None, b"\xff" * 16], [pa.binary(16), pa.uuid()]),
    (['{"a": 1}', None, "[1]"], [pa.json_()]),
    ([date(2020, 1, 1), None, date(1, 1, 1)], [pa.date32(), pa.date64()]),
    ([date(2020, 1, 1), None, date(9999, 12, 31)], [pa.date32()]),
    ([1433221332, None, 2**40], [pa.timestamp("s"), pa.timestamp("ms", "UTC")]),
    ([2**62, None, 0], [pa.timestamp("us", "UTC"), pa.timestamp("ns", "Asia/Tokyo")]),
    ([[1, None], None, []], [pa.list_(pa.int64())]),
    ([["a", None], None, []], [pa.list_(pa.string())]),
    ([[None], None, []], [pa.list_(pa.null())]),
    ([[1.5], None, []], [pa.large_list(pa.float64())]),
    ([[1, 2], None, None], [pa.list_(pa.int8(), 2)]),
    ([[[1]], None, [[]]], [pa.list_(pa.list_(pa.int64()))]),
    ([[True], None, []], [pa.list_(pa.bool_())]),
    ([[b"\xff"], None, []], [pa.list_(pa.binary())]),
    ([[datetime(2020, 1, 1)], None, []], [pa.list_(pa.timestamp("us"))]),
    ([[Decimal("1.5")], None, []], [pa.list_(pa.decimal128(5, 1))]),
    ([{"n": "a"}, None, {"n": None}], [STRUCT]),
    ([[{"n": "a"}], None, [None]], [pa.list_(STRUCT)]),
    ([[("a", 1)], None, []], [pa.map_(pa.string(), pa.int32())]),
]


def odd_columns() -> dict[str, pa.Array]:
    """Columns of three values of every type that a Parquet file can hold, one of them null and some extreme."""
    columns = [pa.array(values, kind) for values, kinds in ODD_VALUES for kind in kinds]
    columns.append(pa.array(["a", None, "1"]).dictionary_encode())
    return {f"{place} {column.type}": column for place, column in enumerate(columns)}
