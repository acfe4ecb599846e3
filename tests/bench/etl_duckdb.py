"""The work of `etl.interactions` in DuckDB, for a temporal split without k-core: the peer of `bench_etl`.

python -m tests.bench.etl_duckdb RAW OUT THREADS MEMORY CONFIG
"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb

from crane_core.config import RunConfig


def main(raw: str, out: str, threads: str, memory: str, text: str) -> None:
    config = RunConfig.model_validate_json(text)
    etl = config.etl
    validation, test = etl.cutoffs(config.window)
    held_out = etl.validation_days + etl.test_days
    connection = duckdb.connect(str(Path(out) / "work.duckdb"))
    connection.execute(f"set threads = {threads}; set memory_limit = '{memory}'; set timezone = 'UTC'")
    connection.execute(f"set temp_directory = '{out}/spill'; set preserve_insertion_order = false")
    factors = " ".join(f"when '{name}' then {value}" for name, value in etl.event_weights.items())
    types = ", ".join(f"'{name}'" for name in etl.event_weights)
    connection.execute(
        f"""
        create view marked as
        select *, case
            when user_id is null or item_id is null then 'null_id'
            when trim(user_id) = '' or trim(item_id) = '' then 'empty_id'
            when event_time is null then 'null_event_time'
            when not isfinite(raw_weight) then 'non_finite_weight'
            when raw_weight < 0 then 'negative_weight'
            when event_type is not null and event_type not in ({types}) then 'unknown_event_type'
            when event_time >= timestamptz '{config.window.end}' then 'after_cutoff'
            when event_time >= (dt + 1)::timestamptz then 'after_arrival'
            when event_time < (dt - {etl.lookback_days})::timestamptz then 'too_late'
            when weight < {etl.min_weight} then 'below_min_weight'
        end as reason
        from (
            select user_id, item_id, event_time, event_type, dt::date as dt, weight as raw_weight,
                (coalesce(weight, 1) * case event_type {factors} else 1 end)::float as weight
            from read_parquet('{raw}/interactions/*/*.parquet', hive_partitioning = true)
            where dt::date < date '{config.window.end:%Y-%m-%d}'
        )
        """
    )
    connection.execute(
        """
        create table events as
        select user_id, item_id, event_time, event_type, weight, dt,
            case when row_number() over pair > 1 then
                case when event_time = lag(event_time) over pair then 'duplicate' else 'repeat' end
            end as reason
        from marked where reason is null
        window pair as (partition by user_id, item_id order by event_time, weight desc)
        """
    )
    for kind in ("user", "item"):
        seen = f"""
            select {kind}_id, min(greatest(dt, event_time::date + {held_out})) as entered
            from events where event_time < timestamptz '{validation}' group by 1
        """
        if kind == "user":
            numbered = f"select user_id, row_number() over (order by entered, user_id) - 1 from ({seen})"
            connection.execute(f"create table users(user_id, user_idx) as {numbered}")
        else:
            connection.execute(
                f"""
                create table items as
                select item_id, title, (row_number() over (order by entered is null, entered, item_id) - 1) as item_idx
                from ({seen}) full join (
                    select item_id, min(title) as title from '{raw}/items/*.parquet'
                    where trim(item_id) <> '' group by 1
                ) using (item_id)
                """
            )
    for table in ("users", "items", "interactions", "quarantine", "cold", "drift"):
        (Path(out) / table).mkdir()
    connection.execute(
        f"""
        create table placed as
        select user_idx::int as user_idx, item_idx::int as item_idx, user_id, item_id, event_time, weight,
            (case when event_time < timestamptz '{validation}' then 0
                  when event_time < timestamptz '{test}' then 1 else 2 end)::tinyint as split
        from events left join users using (user_id) left join items using (item_id) where reason is null
        """
    )
    # The last day beside those before it, over all usable events.
    cut = f"timestamptz '{config.window.end}' - interval 1 day"
    connection.execute(
        f"""
        create view recent as
        select event_time >= {cut} as is_day, floor(epoch(event_time - ({cut})) / 86400) as day,
            hour(event_time) as hour, floor(2 * log2(1 + weight)) as octave, event_type, hash(item_id) % 16 as items,
            user_id
        from events where event_time >= {cut} - interval {etl.drift_days} day
        """
    )
    style = "(format parquet, compression zstd)"
    columns = "user_idx, item_idx, event_time, weight, split"
    known = "user_idx is not null and item_idx is not null"
    writes = {
        "interactions": f"select {columns} from placed where {known} order by user_idx, item_idx",
        "cold": f"select * from placed where not ({known})",
        "users": "select user_idx::int as user_idx, user_id from users order by 1",
        "items": "select item_idx::int as item_idx, item_id, title from items order by 1",
        "drift": "select is_day, hour, octave, event_type, items, null as activity, count(*) as rows, min(day) as "
        "first from recent group by all union all select is_day, null, null, null, null, floor(log2(n)), sum(n), null "
        "from (select is_day, day, user_id, count(*) as n from recent group by all) group by 1, 6",
        "quarantine": "select user_id, item_id, event_time, weight, reason from marked where reason is not null "
        "union all select user_id, item_id, event_time, weight, reason from events where reason is not null",
    }
    for table, query in writes.items():
        connection.execute(f"copy ({query}) to '{out}/{table}/part-0.parquet' {style}")
    # What the job reads back: counts, a checksum over all rows, the spread over users and items.
    for table in writes:
        connection.execute(f"select count(*), sum(hash(t)::hugeint) from '{out}/{table}/*.parquet' t").fetchall()
    for kind in ("user", "item"):
        connection.execute(
            f"""
            select count(*), avg(n), quantile_cont(n, [0, 0.25, 0.5, 0.75, 0.9, 0.99, 1]) from
            (select count(*) as n from '{out}/interactions/*.parquet' where split = 0 group by {kind}_idx)
            """
        ).fetchall()


if __name__ == "__main__":
    main(*sys.argv[1:])
