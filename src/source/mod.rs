//! Where bytes come from: files that others write, sockets, standard input.

pub mod files;
