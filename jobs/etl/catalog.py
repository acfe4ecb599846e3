"""Read the delivered catalog: one row per item, with its title and the columns that are carried to the export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from crane_core.raw.checks import Footer, item_columns
from crane_core.raw.files import RawFile
from crane_core.schema import ITEM_ID, REASON, TITLE
from jobs.etl.events import stored_type
from jobs.etl.reading import read_files
from jobs.etl.session import readable
from jobs.etl.tables import column_of, lookup, quoted


@dataclass(frozen=True)
class Catalog:
    """The delivered catalog.

    Attributes:
        items: item_id and title, one row per item.
        columns: item_id and the columns that are carried, one row per item; None where there are none.
        bad: rows set aside, with their `reason`.
        num_read: rows read.
    """

    items: DataFrame
    columns: DataFrame | None
    bad: DataFrame
    num_read: int


def read_catalog(spark: SparkSession, footers: Sequence[Footer]) -> Catalog:
    """Read the catalog and set aside what is no item, or an item twice.

    Args:
        spark: the session.
        footers: of the catalog files.
    """
    kinds = item_columns(footers)
    num_read = sum(footer.num_rows for footer in footers)
    if footers:
        with readable():
            rows = _read_rows(spark, footers, kinds).localCheckpoint(eager=True)
            good, bad = clean_catalog(rows)
    else:
        good, bad = clean_catalog(spark.range(0).select(F.lit("").alias(ITEM_ID), F.lit("").alias(TITLE)))
    columns = good.drop(TITLE) if kinds else None
    return Catalog(good.select(ITEM_ID, TITLE), columns, bad.select(ITEM_ID, TITLE, REASON), num_read)


def clean_catalog(items: DataFrame) -> tuple[DataFrame, DataFrame]:
    """One row per item id, and the rows set aside: null_id, empty_id, duplicate_item.

    Of several rows of an item that with the least title is kept, of equal ones that with the least other columns; nulls
    are last.
    """
    order = [TITLE, *(name for name in items.columns if name not in (ITEM_ID, TITLE))]
    place = F.row_number().over(
        Window.partitionBy(ITEM_ID).orderBy(*(column_of(name).asc_nulls_last() for name in order))
    )
    reason = (
        F.when(F.col(ITEM_ID).isNull(), "null_id")
        .when(F.trim(ITEM_ID) == "", "empty_id")
        .when(place > 1, "duplicate_item")
    )
    marked = items.withColumn(REASON, reason)
    return marked.where(F.col(REASON).isNull()).drop(REASON), marked.where(F.col(REASON).isNotNull())


def with_columns(items: DataFrame, catalog: Catalog) -> DataFrame:
    """Add the columns that are carried; they are null for an item that the catalog does not list today."""
    if catalog.columns is None:
        return items
    return items.join(lookup(catalog.columns, catalog.num_read), ITEM_ID, "left").select(
        *items.columns, *(column_of(name) for name in catalog.columns.columns if name != ITEM_ID)
    )


def _read_rows(spark: SparkSession, footers: Sequence[Footer], kinds: dict[str, str]) -> DataFrame:
    """The rows of the files in common types. Files that hold the same types are read together, as they are stored."""
    groups: dict[tuple[tuple[str, str], ...], list[RawFile]] = {}
    for footer in footers:
        stored = tuple((name, stored_type(footer.types[name])) for name in kinds if name in footer.types)
        title = ((TITLE, "string"),) if TITLE in footer.types else ()
        groups.setdefault((*title, *stored), []).append(footer.file)
    tables = []
    for held, files in sorted(groups.items()):
        schema = ", ".join([f"{ITEM_ID} string", *(f"{quoted(name)} {stored}" for name, stored in held)])
        rows = read_files(spark, files, schema)
        columns = [
            _in_common(name, dict(held).get(name), kind).alias(name)
            for name, kind in {TITLE: "string", **kinds}.items()
        ]
        tables.append(rows.select(ITEM_ID, *columns))
    return reduce(DataFrame.unionByName, tables)


def _in_common(name: str, stored: str | None, kind: str) -> Column:
    """A column in the common type; null where the files do not have it."""
    if stored is None:
        return F.lit(None).cast(kind)
    if kind == "timestamp" and stored == "bigint":
        return F.timestamp_micros(F.floor(column_of(name) / 1000))
    if kind == "string" and name != TITLE:
        return F.make_valid_utf8(column_of(name))
    return column_of(name).cast(kind)
