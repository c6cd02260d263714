//! The table: medians of all runs, and the ratios that are promised.

use std::fmt;

use super::cases::{Case, Outcome};

/// All runs so far.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
}

struct Row {
    case: Case,
    program: &'static str,
    outcomes: Vec<Outcome>,
}

impl Report {
    /// Adds a run.
    pub fn add(&mut self, case: Case, program: &'static str, outcome: Outcome) {
        match self.rows.iter_mut().find(|row| row.case == case && row.program == program) {
            Some(row) => row.outcomes.push(outcome),
            None => self.rows.push(Row { case, program, outcomes: vec![outcome] }),
        }
    }

    fn row(&self, case: Case) -> Option<&Row> {
        self.rows.iter().find(|row| row.case == case && row.program == "waybill")
    }
}

impl Row {
    fn rate(&self) -> f64 {
        median(self.outcomes.iter().map(Outcome::rate))
    }

    fn megabytes(&self) -> f64 {
        median(self.outcomes.iter().map(|outcome| outcome.bytes as f64 / 1e6 / outcome.seconds))
    }

    /// CPU seconds per million lines of one program.
    fn cpu(&self, number: usize) -> f64 {
        let per_million = |outcome: &Outcome| 1e6 / outcome.lines as f64;
        median(self.outcomes.iter().map(|o| o.usage[number].1.cpu * per_million(o)))
    }

    /// The largest of all runs.
    fn peak(&self, number: usize) -> f64 {
        self.outcomes.iter().map(|outcome| outcome.usage[number].1.peak).fold(0.0, f64::max)
    }

    fn all_cpu(&self) -> f64 {
        (0..self.outcomes[0].usage.len()).map(|number| self.cpu(number)).sum()
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.rows.iter().map(|row| row.outcomes.len()).max().unwrap_or(0);
        writeln!(
            f,
            "Medians of {runs} runs; CPU in seconds per million lines; peak memory in MB.\n"
        )?;
        writeln!(f, "| case | lines/s | MB/s | CPU | peak |\n|---|---:|---:|---|---|")?;
        for row in &self.rows {
            let name = row.case.name();
            let suffix = if row.program == "against" { " (against)" } else { "" };
            let programs = row.outcomes[0].usage.iter().map(|(program, _)| *program).enumerate();
            let cpu: Vec<_> = programs
                .clone()
                .map(|(number, program)| format!("{program} {:.2}", row.cpu(number)))
                .collect();
            let peak: Vec<_> = programs
                .map(|(number, program)| format!("{program} {:.0}", row.peak(number)))
                .collect();
            let (rate, megabytes) = (row.rate(), row.megabytes());
            let (cpu, peak) = (cpu.join(", "), peak.join(", "));
            writeln!(f, "| {name}{suffix} | {rate:.0} | {megabytes:.0} | {cpu} | {peak} |")?;
        }
        writeln!(f)?;
        let mut ratio = |text: &str, of: Option<f64>, to: Option<f64>| match (of, to) {
            (Some(of), Some(to)) => writeln!(f, "- {text}: {:.2}", of / to),
            _ => Ok(()),
        };
        let rate = |case| self.row(case).map(Row::rate);
        let cpu = |case| self.row(case).map(Row::all_cpu);
        let sender = self.row(Case::Sink).map(|row| row.cpu(0));
        let openssl = self.row(Case::Openssl).map(|row| row.cpu(0));
        ratio("lines/s, both hops to syslog-ng", rate(Case::Sink), rate(Case::SyslogNg))?;
        ratio("CPU, syslog-ng to both hops", cpu(Case::SyslogNg), cpu(Case::Sink))?;
        ratio("CPU, sender to openssl s_client", sender, openssl)?;
        ratio("lines/s, nginx lines to plain ones", rate(Case::Nginx), rate(Case::Sink))?;
        ratio("lines/s, RFC 3164 lines to plain ones", rate(Case::Syslog), rate(Case::Sink))?;
        ratio("lines/s, with a receipts file to without", rate(Case::Receipts), rate(Case::Sink))?;
        ratio(
            "lines/s into Elasticsearch, both hops to the bare loader",
            rate(Case::Elasticsearch),
            rate(Case::Loader),
        )
    }
}
