"""Vizgen's file of cells, as MERSCOPE and its post-processing tool (VPT) write it."""

import pyarrow as pa

#: A row a cell and plane, MultiPolygons (WKB) in µm.
CELLS_SCHEMA = pa.schema(
    [
        ("ID", pa.int64()),
        ("EntityID", pa.int64()),
        ("ZIndex", pa.int64()),
        ("Geometry", pa.binary()),
        ("Type", pa.string()),
        ("ZLevel", pa.float64()),
        ("Name", pa.string()),
        ("ParentID", pa.int64()),
        ("ParentType", pa.string()),
    ]
)
