//! Transport to destination: authentication, sessions, receipts back.
