//! End-to-end tests: one target with a module per promise, so that it links once and shares the real servers.

mod support;

mod dependencies;
mod files;
mod protocol_doc;
mod readme;
mod servers_smoke;
