//! What the tests share. Not every helper is used by every set of tests.

#[allow(dead_code)]
pub mod clients;
#[allow(dead_code)]
pub mod dns;
#[allow(dead_code)]
pub mod documents;
#[allow(dead_code)]
pub mod host;
#[allow(dead_code)]
pub mod network;
#[allow(dead_code)]
pub mod pages;
#[allow(dead_code)]
pub mod proxy;
#[allow(dead_code)]
pub mod registries;
#[allow(dead_code)]
pub mod servers;
#[allow(dead_code)]
pub mod store;
#[allow(dead_code)]
pub mod waybill;
