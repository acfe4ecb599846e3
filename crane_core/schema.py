"""Column names and Arrow schemas: the one contract between raw data, Spark and torch.

Raw data, below `{raw}`:

    interactions/dt=YYYY-MM-DD/*.parquet    INTERACTIONS; `dt` is the day of arrival
    items/*.parquet                         ITEMS, the catalog; optional
    features/{modality}/*.parquet           FEATURES, one folder per modality; optional

Indices are row numbers from 0, separate for users and items.
"""

import pyarrow as pa

USER_ID = "user_id"
ITEM_ID = "item_id"
EVENT_TIME = "event_time"
WEIGHT = "weight"
LABEL = "label"
EVENT_TYPE = "event_type"
TITLE = "title"
VECTOR = "vector"
REASON = "reason"
USER_IDX = "user_idx"
ITEM_IDX = "item_idx"
SPLIT = "split"
STATE = "state"
BECAUSE = "because_item_id"
CATEGORY = "category"
AVAILABLE_FROM = "available_from"
AVAILABLE_UNTIL = "available_until"
IN_STOCK = "in_stock"

TRAIN, VALIDATION, TEST = 0, 1, 2
TRAINED, COLD, TOMBSTONE = "trained", "cold", "tombstone"
"""States of an id: with training rows; without; or without any data, but numbered by an earlier run."""

INTERACTIONS = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(EVENT_TIME, pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field(WEIGHT, pa.float32()),
        pa.field(LABEL, pa.int8()),
        pa.field(EVENT_TYPE, pa.string()),
    ]
)
"""Optional are `weight` (default 1), `label` (needed by `etl.split=label`: 0 train, 1 validation, 2 test) and
`event_type` (the key of `etl.event_weights`). Other columns are ignored, and named in the log and the manifest."""

ITEMS = pa.schema([pa.field(ITEM_ID, pa.string(), nullable=False), pa.field(TITLE, pa.string())])
ITEM_COLUMNS = pa.schema(
    [
        pa.field(CATEGORY, pa.string()),
        pa.field(AVAILABLE_FROM, pa.timestamp("us", tz="UTC")),
        pa.field(AVAILABLE_UNTIL, pa.timestamp("us", tz="UTC")),
        pa.field(IN_STOCK, pa.bool_()),
    ]
)
"""Optional columns of the catalog, for `export.rules`. An item may be had in `[available_from, available_until)`, which
are instants like those of events, unless `in_stock` is false. A null restricts nothing: no start, no end, in stock.
Further columns of text, flags, numbers or instants are carried to the export as they are. Others are ignored, and named
in the log and the manifest."""

FEATURES = pa.schema(
    [pa.field(ITEM_ID, pa.string(), nullable=False), pa.field(VECTOR, pa.list_(pa.float32()), nullable=False)]
)
"""`vector` may be a list of numbers of any type, or fixed-size binary (`features.binary`); all vectors of a modality
have one length. An item whose vector is null has none. A matrix `NAME.npy` with its items in `NAME.ids.txt`, one per
line, is read as well."""
