//! End-to-end tests: one target with a module per promise, so that it links once and shares the real servers.

mod support;

mod certificates;
mod check;
mod configuration;
mod crash;
mod demo;
mod dependencies;
mod dialled;
mod disk;
mod elasticsearch;
mod files;
mod fleet;
mod http_intake;
mod network;
mod nginx;
mod package;
mod parsing;
mod protocol_doc;
mod readme;
mod receivers;
mod refusals;
mod rotation;
mod servers_smoke;
mod sockets;
mod state;
mod supervisor;
mod syslog_network;
mod syslog_ng;
mod text;
mod tokens;
mod versions;
mod wire;
