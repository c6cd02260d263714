//! What was typed: clap types.
