//! The page that Prometheus reads: its text format, version 0.0.4.
//!
//! Written by hand: `prometheus-client` writes OpenMetrics only, which `promtool check metrics`
//! does not take, and `metrics-exporter-prometheus` brings a recorder for the whole process and a
//! server of its own.

use std::fmt::{Display, Write as _};

use jiff::Timestamp;

/// What a family of samples is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Grows until the process ends; its name ends with `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A page under way.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
}

impl Page {
    /// Opens a family: its samples follow. Each name comes once.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> Family<'_> {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family { name, text: &mut self.text }
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, name: &'static str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// When the certificate ends that the other side is shown; nothing where none is.
    pub fn certificate(&mut self, end: Option<Timestamp>) {
        if let Some(end) = end {
            self.single(
                "waybill_certificate_expiry_timestamp_seconds",
                Kind::Gauge,
                "When the certificate ends that the other side is shown, in seconds since 1970.",
                end.as_second(),
            );
        }
    }

    /// The whole page.
    pub fn into_text(self) -> String {
        self.text
    }
}

/// Samples of one name.
#[derive(Debug)]
pub struct Family<'p> {
    name: &'static str,
    text: &'p mut String,
}

impl Family<'_> {
    /// One sample. Values of labels may be any text.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(self.name);
        for (number, (label, text)) in labels.iter().enumerate() {
            self.text.push_str(if number == 0 { "{" } else { "," });
            self.text.push_str(label);
            self.text.push_str("=\"");
            escape(self.text, text);
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

fn escape(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_cannot_break_out_of_its_quotes_or_line() {
        let mut page = Page::default();
        let mut family = page.family("waybill_lines_total", Kind::Counter, "Lines.");
        family.sample(&[("source", "a\"b\\c\nd"), ("verdict", "stored")], 7);
        page.single("waybill_connected", Kind::Gauge, "Connected.", 1);
        assert_eq!(
            page.into_text(),
            "# HELP waybill_lines_total Lines.\n\
             # TYPE waybill_lines_total counter\n\
             waybill_lines_total{source=\"a\\\"b\\\\c\\nd\",verdict=\"stored\"} 7\n\
             # HELP waybill_connected Connected.\n\
             # TYPE waybill_connected gauge\n\
             waybill_connected 1\n"
        );
    }
}
