//! The sender's side.

use socket2::Type;

use super::local::Peer;
use super::{Report, local, receive, receiver};
use crate::cli;
use crate::config::{ConnectionConfig, Environment, load_send};
use crate::sender::receiver_refusal;

pub(super) async fn check(
    args: cli::Send,
    environment: &Environment,
    report: &mut Report,
) -> anyhow::Result<()> {
    let file = args.config.clone();
    let layer = args.layer(environment);
    let loaded = layer.and_then(|layer| load_send(layer, file.as_deref(), environment));
    let Some(config) = report.configuration(loaded)? else { return Ok(()) };
    local::folder(report, "state", &config.state_dir)?;
    let runs = local::sender_runs(report, &config.state_dir)?;
    for source in &config.sources {
        local::source(report, source, runs)?;
    }
    if let Some(address) = config.metrics {
        local::port(report, Some("metrics"), address, Type::STREAM, runs)?;
    }
    match &config.connection {
        ConnectionConfig::Dial(dial) => {
            for endpoint in &dial.to {
                receiver::check(report, endpoint, dial, &config).await?;
            }
        }
        ConnectionConfig::Listen(listening) => {
            local::listen(report, &listening.listen, runs)?;
            if let Some(tls) = &listening.tls {
                local::certificate(report, None, tls, Peer::Waybill(None))?;
            }
            receive::tokens(report, &listening.tokens, "receiver", receiver_refusal)?;
        }
    }
    Ok(())
}
