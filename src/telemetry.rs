//! tracing set-up and counters.
