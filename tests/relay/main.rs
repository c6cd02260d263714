//! End-to-end tests: one target with a module per promise, so that it links once and shares the real servers.

mod support;

mod crash;
mod files;
mod rotation;
mod servers_smoke;
mod sockets;
mod state;
