//! Measures Waybill from end to end; run by `scripts/bench`, which says what is measured.
//!
//! Every run ends with a count at the destination. One that is wrong fails the bench: a number
//! that was reached by losing lines is none.

mod cases;
mod lines;
mod load;
mod process;
mod report;
mod sink;
mod tls_sink;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};

use cases::{Bench, Case};
use report::Report;

/// What was typed.
struct Options {
    runs: usize,
    lines: u64,
    elasticsearch_lines: u64,
    cases: Vec<Case>,
    waybill: PathBuf,
    against: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scripts/bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["sink"] => sink::run(),
        ["tls-sink", certificate, key, bytes] => {
            tls_sink::run(Path::new(certificate), Path::new(key), bytes.parse()?)
        }
        ["load", url, index, file] => load::run(url, index, Path::new(file)),
        ["lines", kind, lines, file] => {
            lines::write(lines::Kind::parse(kind)?, lines.parse()?, Path::new(file))
        }
        options => measure(&Options::parse(options)?),
    }
}

impl Options {
    fn parse(mut arguments: &[&str]) -> anyhow::Result<Options> {
        let mut options = Options {
            runs: 5,
            lines: 1_000_000,
            elasticsearch_lines: 300_000,
            cases: Case::ALL.to_vec(),
            waybill: std::env::current_exe()?.with_file_name("../waybill"),
            against: None,
        };
        while let [name, rest @ ..] = arguments {
            let [value, rest @ ..] = rest else { bail!("{name} wants a value") };
            match *name {
                "--runs" => options.runs = value.parse()?,
                "--lines" => options.lines = value.parse()?,
                "--elasticsearch-lines" => options.elasticsearch_lines = value.parse()?,
                "--only" => {
                    options.cases =
                        value.split(',').map(Case::parse).collect::<anyhow::Result<_>>()?;
                }
                "--waybill" => options.waybill = PathBuf::from(value),
                "--against" => options.against = Some(PathBuf::from(value)),
                _ => bail!("unknown option {name}; see scripts/bench --help"),
            }
            arguments = rest;
        }
        ensure!(options.runs > 0 && options.lines > 0, "at least one run of one line");
        Ok(options)
    }
}

/// All cases in turn, then all again: what disturbs the machine for a while disturbs them alike.
fn measure(options: &Options) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("waybill-bench-").tempdir()?;
    let mut bench = Bench::new(folder.path(), options.lines, options.elasticsearch_lines)?;
    let mut programs = vec![("waybill", options.waybill.as_path())];
    programs.extend(options.against.as_deref().map(|path| ("against", path)));
    let mut report = Report::default();
    for run in 1..=options.runs {
        for &case in &options.cases {
            // A program that is measured against another one comes first in every second run.
            let mut order = programs.clone();
            if run % 2 == 0 {
                order.reverse();
            }
            let order = if case.has_waybill() { order.as_slice() } else { &programs[..1] };
            for &(name, program) in order {
                let result = bench
                    .run(case, program)
                    .with_context(|| format!("case {} ({name})", case.name()))?;
                let Some(result) = result else { continue };
                eprintln!(
                    "run {run} of {}: {:<12} {name:<8} {:>9.0} lines/s",
                    options.runs,
                    case.name(),
                    result.rate()
                );
                report.add(case, name, result);
            }
        }
    }
    print!("{report}");
    Ok(())
}
