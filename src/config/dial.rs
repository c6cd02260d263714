//! Senders that `waybill receive` dials, as typed and as checked.

use std::path::PathBuf;

use super::check;
use super::file::Table;
use super::problem::{At, Findings, Place};
use super::proxy::{self, ProxySetting};
use super::send::check_endpoint;
use super::value::{self, ValueError};
use super::{DialledSender, Endpoint, Environment};

/// One sender to dial, as typed in one place; paths are absolute.
#[derive(Clone, Debug)]
pub struct DialLayer {
    /// Where it was typed.
    pub place: Place,
    /// `--dial NAME=…`, `dial.sender`.
    pub sender: Option<At<String>>,
    /// `--dial …=URL`, `dial.url`.
    pub url: Option<At<Endpoint>>,
    /// `dial.token_file`.
    pub token_file: Option<At<PathBuf>>,
    /// `dial.ca`.
    pub ca: Option<At<PathBuf>>,
}

/// What holds for each sender that says nothing else.
pub(super) struct Defaults {
    pub(super) token_file: Option<At<PathBuf>>,
    pub(super) ca: Option<At<PathBuf>>,
    pub(super) proxy: Option<At<ProxySetting>>,
}

impl DialLayer {
    /// One `--dial NAME=URL`.
    pub fn flag(sender: String, url: Endpoint) -> DialLayer {
        DialLayer {
            place: Place::Flag("--dial"),
            sender: Some(At::flag("--dial", sender)),
            url: Some(At::flag("--dial", url)),
            token_file: None,
            ca: None,
        }
    }

    pub(super) fn read(table: &mut Table<'_>) -> DialLayer {
        DialLayer {
            place: table.place(),
            sender: table.text("sender", |name| match name {
                "" => Err(ValueError("name an entry of the tokens file".to_owned())),
                name => Ok(name.to_owned()),
            }),
            url: table.text("url", value::endpoint),
            token_file: table.path("token_file"),
            ca: table.path("ca"),
        }
    }
}

pub(super) fn check(
    layers: Vec<DialLayer>,
    defaults: Defaults,
    plain_allowed: bool,
    environment: &Environment,
    findings: &mut Findings,
) -> Vec<DialledSender> {
    // What stands for all is told once, and only where it is of use: the environment may name a
    // token file for another command.
    if layers.iter().any(|layer| layer.token_file.is_none()) {
        match &defaults.token_file {
            Some(at) => check::secret_file(at, findings),
            None => findings.missing(
                "token_file",
                "no token for the senders that are dialled: give --token-file FILE (or \
                 WAYBILL_TOKEN_FILE), or 'token_file' in the file; 'waybill token NAME --tokens \
                 FILE' at the sender makes one",
            ),
        }
    }
    if let Some(ca) = &defaults.ca {
        if layers.is_empty() {
            let message = "only a receiver that dials checks a certificate: give --dial NAME=URL";
            findings.problem(&ca.place, message);
        }
        check::pem_file(ca, "CERTIFICATE", findings);
    }
    if let Some(proxy) = defaults.proxy.as_ref().filter(|_| layers.is_empty()) {
        let message = "only a receiver that dials passes a proxy: give --dial NAME=URL";
        findings.problem(&proxy.place, message);
    }
    let proxy = defaults.proxy.map(|at| at.value);
    let mut senders: Vec<(Place, DialledSender)> = Vec::new();
    for DialLayer { place, sender, mut url, token_file, ca } in layers {
        if let Some(at) = &token_file {
            check::secret_file(at, findings);
        }
        if let Some(at) = &ca {
            check::pem_file(at, "CERTIFICATE", findings);
        }
        if let Some(at) = &mut url {
            check_endpoint(at, plain_allowed, findings);
            match proxy::choose(proxy.as_ref(), &at.value, environment) {
                Ok(proxy) => at.value.proxy = proxy,
                Err(message) => findings.problem(&at.place, message),
            }
        }
        let (Some(sender), Some(url)) = (sender, url) else {
            let message = "needs 'sender', an entry of the tokens file, and 'url'";
            findings.problem(&place, message);
            continue;
        };
        // Both connections would present one token, and take over from each other for ever.
        if let Some((first, _)) = senders.iter().find(|(_, other)| other.name == sender.value) {
            let message = format!("{:?} is dialled by {first} already", sender.value);
            findings.problem(&sender.place, message);
            continue;
        }
        let token_file = token_file.as_ref().or(defaults.token_file.as_ref());
        let dialled = DialledSender {
            name: sender.value,
            endpoint: url.value,
            // A missing one was found above.
            token_file: token_file.map(|at| at.value.clone()).unwrap_or_default(),
            ca: ca.or(defaults.ca.clone()).map(|at| at.value),
        };
        senders.push((place, dialled));
    }
    senders.into_iter().map(|(_, sender)| sender).collect()
}
