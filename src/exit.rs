//! Every exit code.
