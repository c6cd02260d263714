//! SQLite with FTS5 in one file: the destination when no Elasticsearch is named.
