//! Where a setting was typed, and what is wrong with it.
//!
//! A person mends a configuration in one go only if every fault is told at once: checks collect
//! [`Problem`]s and end with one [`ConfigError`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::record::escape_path;

/// Where a value comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// The command line: the flag or argument as help names it.
    Flag(&'static str),
    /// A configuration file.
    File {
        /// Its path as typed.
        file: Arc<Path>,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The key with its table, such as `source.type`; empty for the file as a whole.
        key: String,
    },
    /// Nowhere: it is missing.
    Missing,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Flag(flag) => f.write_str(flag),
            Place::File { file, line, column, key } => {
                write!(f, "{}:{line}:{column}", escape_path(file))?;
                if key.is_empty() { Ok(()) } else { write!(f, ": {key}") }
            }
            Place::Missing => f.write_str("configuration"),
        }
    }
}

/// A value and where it was typed.
#[derive(Clone, PartialEq, Debug)]
pub struct At<T> {
    /// What was typed, parsed.
    pub value: T,
    /// Where.
    pub place: Place,
}

impl<T> At<T> {
    /// A value of the command line.
    pub fn flag(flag: &'static str, value: T) -> At<T> {
        At { value, place: Place::Flag(flag) }
    }

    /// Another value of the same place.
    pub(super) fn map<U>(self, to: impl FnOnce(T) -> U) -> At<U> {
        At { value: to(self.value), place: self.place }
    }
}

/// One fault.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Where it was typed.
    pub place: Place,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// Why there is no configuration.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {}: {reason}", escape_path(.file))]
    Unreadable {
        /// Its path as typed.
        file: PathBuf,
        /// The operating system's reason.
        reason: String,
    },
    /// Everything that is wrong, in order.
    #[error("{}", lines(.0))]
    Faults(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// Faults of a file by line; those without a place come last.
fn in_order(mut problems: Vec<Problem>) -> Vec<Problem> {
    problems.sort_by_key(|problem| match &problem.place {
        Place::Flag(_) => (0, 0, 0),
        Place::File { line, column, .. } => (1, *line, *column),
        Place::Missing => (2, 0, 0),
    });
    problems
}

/// Collects faults and warnings while a configuration is checked.
#[derive(Debug, Default)]
pub(super) struct Findings {
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Findings {
    pub(super) fn problem(&mut self, place: &Place, message: impl Into<String>) {
        self.problems.push(Problem { place: place.clone(), message: message.into() });
    }

    /// `key` has no value; silent where it was typed and refused.
    pub(super) fn missing(&mut self, key: &str, message: &str) {
        let refused =
            |place: &Place| matches!(place, Place::File { key: found, .. } if found == key);
        if !self.problems.iter().any(|problem| refused(&problem.place)) {
            self.problem(&Place::Missing, message);
        }
    }

    pub(super) fn warning(&mut self, place: &Place, message: &str) {
        self.warnings.push(format!("{place}: {message}"));
    }

    /// The value with the warnings, or every fault.
    pub(super) fn finish<T>(self, value: Option<T>) -> Result<(T, Vec<String>), ConfigError> {
        match value {
            Some(value) if self.problems.is_empty() => Ok((value, self.warnings)),
            _ => Err(ConfigError::Faults(in_order(self.problems))),
        }
    }
}
