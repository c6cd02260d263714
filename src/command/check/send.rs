//! The sender's side.

use super::{Report, local, receiver};
use crate::cli;
use crate::config::{Environment, load_send};

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
    for endpoint in &config.to {
        receiver::check(report, endpoint, &config.token_file, config.ca.as_deref()).await?;
    }
    Ok(())
}
