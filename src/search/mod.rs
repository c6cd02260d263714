//! Queries of `waybill search`, for the embedded store and for Elasticsearch alike.
