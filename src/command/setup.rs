//! `waybill setup`: the index template and the dead-letter index.

use std::io::Write;

use crate::cli;
use crate::config::{At, Environment, Loaded, LogConfig, load_elasticsearch};
use crate::destination::elasticsearch;
use crate::exit::Exit;

/// Puts them there, or prints the requests for an administrator.
pub async fn run(args: cli::Setup, environment: Environment) -> anyhow::Result<Exit> {
    let mut layer = args.elasticsearch.layer(&environment);
    layer.dead_letter_index = Some(At::flag("--dead-letter-index", args.dead_letter_index));
    let (config, warnings) = load_elasticsearch(layer)?;
    let config = super::begin(Loaded { config, log: LogConfig::default(), warnings });
    if args.print {
        let mut out = std::io::stdout().lock();
        out.write_all(elasticsearch::render(&config, &args.index).as_bytes())?;
        out.flush()?;
    } else {
        elasticsearch::setup(&config, &args.index).await?;
        anstream::eprintln!("the index template and {} are there", config.dead_letter_index);
    }
    Ok(Exit::Done)
}
