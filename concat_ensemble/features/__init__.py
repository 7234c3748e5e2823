"""Features of frozen members: extraction, storage, tables and projections."""
