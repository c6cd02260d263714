//! End-to-end tests: one target with a module per promise, so that it links once and shares the real servers.

mod support;

mod certificates;
mod configuration;
mod crash;
mod demo;
mod dependencies;
mod disk;
mod elasticsearch;
mod files;
mod http_intake;
mod metrics;
mod nginx;
mod parsing;
mod protocol_doc;
mod readme;
mod refusals;
mod reload;
mod rotation;
mod servers_smoke;
mod sockets;
mod state;
mod supervisor;
mod syslog_network;
mod syslog_ng;
mod systemd;
mod tokens;
mod versions;
mod wire;
