//! Elasticsearch 7.17, 8, 9 and OpenSearch 2, 3 by plain `_bulk`.
