//! `waybill setup`: the index templates and the dead-letter index.

use std::io::Write;

use crate::cli;
use crate::config::{At, Environment, Loaded, LogConfig, load_elasticsearch};
use crate::destination::elasticsearch;
use crate::exit::Exit;

/// Puts them there, or prints the requests for an administrator, which needs no server.
pub async fn run(args: cli::Setup, environment: Environment) -> anyhow::Result<Exit> {
    if args.print {
        let text = elasticsearch::render(&args.index, &args.dead_letter_index);
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
        return Ok(Exit::Done);
    }
    let mut layer = args.elasticsearch.layer(&environment);
    layer.dead_letter_index = Some(At::flag("--dead-letter-index", args.dead_letter_index));
    let (config, warnings) = load_elasticsearch(layer)?;
    let config = super::begin(Loaded { config, log: LogConfig::default(), warnings });
    elasticsearch::setup(&config, &args.index).await?;
    for request in elasticsearch::setup_requests(&args.index, &config.dead_letter_index) {
        anstream::eprintln!("{} is there", request.path);
    }
    Ok(Exit::Done)
}
