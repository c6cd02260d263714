//! The sender's durable memory: segment rows and receipted positions.
