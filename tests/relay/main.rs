//! End-to-end tests: one target with a module per promise, so that it links once and shares the real servers.

mod support;

mod files;
mod servers_smoke;
mod syslog_network;
