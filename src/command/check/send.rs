//! The sender's side.

use super::{Report, local, receive, receiver};
use crate::cli;
use crate::config::{ConnectionConfig, Environment, Listen, load_send};

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
    for source in &config.sources {
        local::source(report, source)?;
    }
    match &config.connection {
        ConnectionConfig::Dial(dial) => {
            for endpoint in &dial.to {
                let has_chain_key = config.chain_key_file.is_some();
                receiver::check(report, endpoint, dial, has_chain_key).await?;
            }
        }
        ConnectionConfig::Listen(listening) => {
            if let Listen::Unix(path) = &listening.listen {
                local::socket(report, None, path)?;
            }
            if let Some(tls) = &listening.tls {
                local::certificate(report, "tls", None, tls, None)?;
            }
            receive::tokens(report, &listening.tokens, "receiver")?;
        }
    }
    Ok(())
}
