//! `waybill import`: another shipper's positions become Waybill's.
//!
//! The table goes to standard output, what was done to standard error.

use std::fmt::Write as _;
use std::io::Write as _;

use crate::cli;
use crate::config::{Environment, load_import};
use crate::exit::Exit;
use crate::import::{self, Registry, Report};
use crate::telemetry;

/// Imports, or with `--dry-run` only says what would be done.
pub fn run(args: cli::Import, environment: &Environment) -> anyhow::Result<Exit> {
    let base = &environment.current_dir;
    let filebeat = args.from_filebeat.iter().map(|path| Registry::Filebeat(base.join(path)));
    let logstash = args.from_logstash.iter().map(|path| Registry::Logstash(base.join(path)));
    let registries: Vec<Registry> = filebeat.chain(logstash).collect();
    let (file, dry_run) = (args.config.clone(), args.dry_run);
    let loaded = load_import(args.layer(environment)?, file.as_deref(), environment)?;
    let config = super::begin(loaded);
    let report = import::run(&config, &registries, dry_run)?;
    let mut out = anstream::stdout().lock();
    out.write_all(table(&report).as_bytes())?;
    out.flush()?;
    let state_dir = config.state_dir.display();
    let taken = match report.taken {
        1 => "1 position".to_owned(),
        taken => format!("{taken} positions"),
    };
    let done = match dry_run {
        true => format!("dry run, nothing was written: {taken} to import"),
        false => format!("{taken} imported into {state_dir}"),
    };
    anstream::eprintln!("{}", telemetry::escaped(&done));
    Ok(if report.failed { Exit::Failed } else { Exit::Done })
}

fn table(report: &Report) -> String {
    let mut text = format!("{:>14} {:>14} {:>14}  FILE\n", "POSITION", "SIZE", "LEFT");
    for line in &report.lines {
        let numbers = match line.start {
            Some(start) => [start.position, start.size, start.size - start.position]
                .map(|number| number.to_string()),
            None => ["-", "-", "-"].map(str::to_owned),
        };
        let [position, size, left] = numbers;
        let path = telemetry::escaped(&line.path);
        let _ = write!(text, "{position:>14} {size:>14} {left:>14}  {path}");
        if let Some(note) = &line.note {
            let _ = write!(text, "  ({})", telemetry::escaped(note));
        }
        text.push('\n');
    }
    text
}
