//! Reads TOML key by key, each value with its place.
//!
//! Tables are walked by hand instead of by serde's derive: that stops at the first fault and knows
//! no place for faults that show later, such as a bad time zone. What nobody asked for is unknown
//! and refused, so that a misspelt key never passes unnoticed.

use std::cell::RefCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::problem::{At, ConfigError, Findings, Place};
use super::value::{self, ValueError};

/// A key that is so like a known one (by the letters that differ, 0 to 1) is probably that, misspelt.
const LIKE: f64 = 0.6;

/// A configuration file that has been read.
pub(super) struct File {
    path: Arc<Path>,
    /// Folder where its relative paths start.
    base: PathBuf,
    text: String,
    findings: RefCell<Findings>,
}

impl File {
    /// Reads the file; `current_dir` makes a relative path absolute.
    pub(super) fn open(path: &Path, current_dir: &Path) -> Result<File, ConfigError> {
        let absolute = current_dir.join(path);
        let text = std::fs::read_to_string(&absolute).map_err(|error| ConfigError::Unreadable {
            file: path.to_owned(),
            reason: error.to_string(),
        })?;
        let base = absolute.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(File { path: path.into(), base, text, findings: RefCell::default() })
    }

    /// Walks the file's root table with `read`, which must ask for every key it knows.
    pub(super) fn walk<T>(
        self,
        read: impl FnOnce(&mut Table<'_>) -> T,
    ) -> Result<(T, Findings), ConfigError> {
        let document = match DeTable::parse(&self.text) {
            Ok(document) => document,
            Err(error) => {
                let at = error.span().map_or(0, |span| span.start);
                let message = error.message().replace('\n', "; ");
                self.findings.borrow_mut().problem(&self.place(at, ""), message);
                let faults = self.findings.into_inner().finish::<()>(None);
                return Err(faults.expect_err("a problem was found"));
            }
        };
        let span = document.span();
        let mut table =
            Table { file: &self, prefix: "", span, entries: document.into_inner(), asked: vec![] };
        let value = read(&mut table);
        table.finish();
        Ok((value, self.findings.into_inner()))
    }

    fn place(&self, offset: usize, key: &str) -> Place {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Place::File {
            file: Arc::clone(&self.path),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            key: key.to_owned(),
        }
    }
}

/// A table under its reader; each key that is asked for counts as known.
pub(super) struct Table<'f> {
    file: &'f File,
    /// Names of the tables above, ending with a dot; empty at the root.
    prefix: &'static str,
    span: Range<usize>,
    entries: DeTable<'f>,
    asked: Vec<&'static str>,
}

impl<'f> Table<'f> {
    /// Where the table stands.
    pub(super) fn place(&self) -> Place {
        self.file.place(self.span.start, self.prefix.trim_end_matches('.'))
    }

    /// The folder where relative paths start.
    pub(super) fn base(&self) -> &'f Path {
        &self.file.base
    }

    /// Whether the key is there and was not asked for yet.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// A string that `parse` turns into a value.
    pub(super) fn text<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<At<T>> {
        let (value, place) = self.take(key)?;
        match value.get_ref() {
            DeValue::String(text) => self.parsed(&place, text, parse),
            other => self.wrong_type(&place, "a string", other),
        }
    }

    /// A path, made absolute from the file's own folder.
    pub(super) fn path(&mut self, key: &'static str) -> Option<At<PathBuf>> {
        let base = &self.file.base;
        self.text(key, |text| match text {
            "" => Err(ValueError("a path must not be empty".to_owned())),
            _ => Ok(base.join(text)),
        })
    }

    /// A size: a number of bytes, or text with a unit.
    pub(super) fn size(&mut self, key: &'static str) -> Option<At<u64>> {
        let (value, place) = self.take(key)?;
        match value.get_ref() {
            DeValue::String(text) => self.parsed(&place, text, value::size),
            DeValue::Integer(number) => self.parsed(&place, &number.to_string(), value::size),
            other => self.wrong_type(&place, "a size such as \"64MiB\"", other),
        }
    }

    /// A whole number within bounds.
    pub(super) fn integer(
        &mut self,
        key: &'static str,
        bounds: std::ops::RangeInclusive<u32>,
    ) -> Option<At<u32>> {
        let (value, place) = self.take(key)?;
        let DeValue::Integer(number) = value.get_ref() else {
            return self.wrong_type(&place, "a whole number", value.get_ref());
        };
        let parsed = u32::from_str_radix(number.as_str(), number.radix()).ok();
        match parsed.filter(|number| bounds.contains(number)) {
            Some(value) => Some(At { value, place }),
            None => {
                let message = format!("must be from {} to {}", bounds.start(), bounds.end());
                self.file.findings.borrow_mut().problem(&place, message);
                None
            }
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str) -> Option<At<bool>> {
        let (value, place) = self.take(key)?;
        match value.get_ref() {
            DeValue::Boolean(value) => Some(At { value: *value, place }),
            other => self.wrong_type(&place, "true or false", other),
        }
    }

    /// An array of strings, or one string that stands for an array of one.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Vec<At<T>> {
        let Some((value, place)) = self.take(key) else { return Vec::new() };
        match value.get_ref() {
            DeValue::String(text) => self.parsed(&place, text, parse).into_iter().collect(),
            DeValue::Array(items) => self.strings(key, items, parse),
            other => self.wrong_type(&place, "an array of strings", other).into_iter().collect(),
        }
    }

    /// A table of strings, such as labels, in order of its keys.
    pub(super) fn strings_by_key(
        &mut self,
        key: &'static str,
        check: impl Fn(&str) -> Result<String, ValueError>,
    ) -> Vec<At<(String, String)>> {
        let Some((value, place)) = self.take(key) else { return Vec::new() };
        let DeValue::Table(entries) = value.get_ref() else {
            return self
                .wrong_type(&place, "a table such as { env = \"prod\" }", value.get_ref())
                .into_iter()
                .collect();
        };
        let mut pairs = Vec::new();
        for (name, value) in entries.iter() {
            let place = self.place_of(name.span().start, key);
            match value.get_ref() {
                DeValue::String(text) => {
                    let pair = |name: &str| check(name).map(|name| (name, text.to_string()));
                    pairs.extend(self.parsed(&place, name.get_ref(), pair));
                }
                other => pairs.extend(self.wrong_type(&place, "a string", other)),
            }
        }
        pairs
    }

    /// A table below this one, read by `read`; `prefix` is its name with a dot.
    pub(super) fn table<T>(
        &mut self,
        key: &'static str,
        prefix: &'static str,
        read: impl FnOnce(&mut Table<'f>) -> T,
    ) -> Option<T> {
        let (value, place) = self.take(key)?;
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(entries) => Some(self.below(prefix, span, entries, read)),
            other => self.wrong_type(&place, "a table", &other),
        }
    }

    /// An array of tables below this one: `[[key]]`.
    pub(super) fn tables<T>(
        &mut self,
        key: &'static str,
        prefix: &'static str,
        read: impl Fn(&mut Table<'f>) -> T,
    ) -> Vec<T> {
        let Some((value, place)) = self.take(key) else { return Vec::new() };
        let expected = format!("an array of tables: write [[{key}]]");
        let items = match value.into_inner() {
            DeValue::Array(items) => items,
            DeValue::Table(_) => {
                let message = format!(
                    "write [[{key}]] instead of [{key}], with two brackets on either side: each is \
                     one of several"
                );
                self.file.findings.borrow_mut().problem(&place, message);
                return Vec::new();
            }
            other => return self.wrong_type(&place, &expected, &other).into_iter().collect(),
        };
        let mut tables = Vec::new();
        for item in items {
            let span = item.span();
            match item.into_inner() {
                DeValue::Table(entries) => tables.push(self.below(prefix, span, entries, &read)),
                other => tables.extend(self.wrong_type(&place, &expected, &other)),
            }
        }
        tables
    }

    fn below<T>(
        &self,
        prefix: &'static str,
        span: Range<usize>,
        entries: DeTable<'f>,
        read: impl FnOnce(&mut Table<'f>) -> T,
    ) -> T {
        let mut table = Table { file: self.file, prefix, span, entries, asked: vec![] };
        let value = read(&mut table);
        table.finish();
        value
    }

    fn finish(mut self) {
        self.asked.sort_unstable();
        let allowed = self.asked.join(", ");
        for key in self.entries.keys() {
            let place = self.place_of(key.span().start, key.get_ref());
            let message = match nearest(key.get_ref(), &self.asked) {
                Some(near) => format!("unknown key; did you mean {near}? Allowed here: {allowed}"),
                None => format!("unknown key; allowed here: {allowed}"),
            };
            self.file.findings.borrow_mut().problem(&place, message);
        }
    }

    fn take(&mut self, key: &'static str) -> Option<(Spanned<DeValue<'f>>, Place)> {
        self.asked.push(key);
        let (name, value) = self.entries.remove_entry(key)?;
        let place = self.place_of(name.span().start, key);
        Some((value, place))
    }

    fn place_of(&self, offset: usize, key: &str) -> Place {
        self.file.place(offset, &format!("{}{}", self.prefix, key.escape_debug()))
    }

    fn strings<T>(
        &self,
        key: &'static str,
        items: &DeArray<'_>,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Vec<At<T>> {
        let mut values = Vec::new();
        for item in items.iter() {
            let place = self.place_of(item.span().start, key);
            match item.get_ref() {
                DeValue::String(text) => values.extend(self.parsed(&place, text, &parse)),
                other => values.extend(self.wrong_type(&place, "a string", other)),
            }
        }
        values
    }

    fn parsed<T>(
        &self,
        place: &Place,
        text: &str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<At<T>> {
        match parse(text) {
            Ok(value) => Some(At { value, place: place.clone() }),
            Err(error) => {
                self.file.findings.borrow_mut().problem(place, error.to_string());
                None
            }
        }
    }

    fn wrong_type<T>(&self, place: &Place, expected: &str, found: &DeValue<'_>) -> Option<T> {
        let found = match found {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a decimal number",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        let message = format!("must be {expected}, not {found}");
        self.file.findings.borrow_mut().problem(place, message);
        None
    }
}

/// The known key that was probably meant.
fn nearest(typed: &str, known: &[&'static str]) -> Option<&'static str> {
    let likeness = |key: &str| strsim::normalized_damerau_levenshtein(typed, key);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(nearest) >= LIKE).then_some(*nearest)
}
