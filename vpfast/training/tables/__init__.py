"""The tables of the two papers, as printed and with vpfast's own numbers beside."""

from vpfast.training.tables import compression, mspn, page, shrvqvae
from vpfast.training.tables.measured import Entry, read_entries
from vpfast.training.tables.printed import Part, Table
from vpfast.training.tables.shrvqvae import TABLE_1_NAME

TABLES: dict[str, Table] = {table.name: table for table in (*mspn.TABLES, *shrvqvae.TABLES)}
"""By name: tables of predictions. Table 1 of S-HR-VQVAE is another kind, of codes: :mod:`.compression`."""

__all__ = ["TABLES", "TABLE_1_NAME", "Entry", "Part", "Table", "compression", "page", "read_entries"]
