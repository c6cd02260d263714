//! What the process says about itself, on standard error: log lines and the progress bar.
//!
//! Text for people, JSON for machines; under systemd, the journal's priorities instead of colours
//! and times. Text of outside origin (file names, a peer's reasons, lines) is escaped: it must
//! never steer a terminal (I8), nor break a line in two.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write as _};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{self, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogConfig, LogFormat, LogLevel};

/// Sets up logging for the process; a second call does nothing.
pub fn init(config: LogConfig) {
    let journal = is_journal();
    let filter = targets(config.level);
    let registry = tracing_subscriber::registry().with(filter);
    let result = match config.format {
        LogFormat::Json => registry
            .with(
                tracing_subscriber::fmt::layer()
                    .json()
                    .flatten_event(true)
                    .with_current_span(false)
                    .with_writer(Stderr),
            )
            .try_init(),
        LogFormat::Text => registry
            .with(
                tracing_subscriber::fmt::layer()
                    .event_format(Text { colour: !journal && colour_wanted(), journal })
                    .fmt_fields(format::debug_fn(|writer, field, value| {
                        write_field(writer, field.name(), value)
                    }))
                    .with_writer(Stderr),
            )
            .try_init(),
    };
    // Only a test that shares its process with another can come second.
    drop(result);
}

/// Says why the process ends, before or without [`init`].
pub fn report(message: &str) {
    let mark = if is_journal() { "<3>" } else { "" };
    let mut text = String::new();
    for line in message.lines() {
        text.push_str(mark);
        text.push_str("waybill: ");
        escape(&mut text, line);
        text.push('\n');
    }
    write_stderr(text.as_bytes());
}

/// Text with control characters as `\xNN` or `\u{NNNN}`, so that it cannot steer a terminal.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape(&mut out, text);
    out
}

fn escape(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            // Bidirectional overrides reorder what a person reads, without being controls.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(character.escape_unicode());
            }
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
}

fn targets(level: LogLevel) -> Targets {
    let (own, others) = match level {
        LogLevel::Error => (LevelFilter::ERROR, LevelFilter::ERROR),
        LogLevel::Warn => (LevelFilter::WARN, LevelFilter::WARN),
        LogLevel::Info => (LevelFilter::INFO, LevelFilter::WARN),
        LogLevel::Debug => (LevelFilter::DEBUG, LevelFilter::WARN),
        LogLevel::Trace => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    Targets::new().with_default(others).with_target("waybill", own)
}

/// Whether standard error is the journal's stream: systemd.exec(5) says to compare device and
/// inode, since the variable is inherited further than the stream.
fn is_journal() -> bool {
    let Some(stream) = std::env::var("JOURNAL_STREAM").ok() else { return false };
    let Ok(own) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", own.dev(), own.ino())
}

fn colour_wanted() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    !refused && !dumb && io::stderr().is_terminal()
}

/// One event per line: time, level, spans, message, fields.
struct Text {
    colour: bool,
    journal: bool,
}

impl<S, N> FormatEvent<S, N> for Text
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        let (priority, name, colour) = match level {
            Level::ERROR => (3, "ERROR", "\x1b[31m"),
            Level::WARN => (4, " WARN", "\x1b[33m"),
            Level::INFO => (6, " INFO", "\x1b[32m"),
            Level::DEBUG => (7, "DEBUG", "\x1b[34m"),
            Level::TRACE => (7, "TRACE", "\x1b[35m"),
        };
        if self.journal {
            write!(writer, "<{priority}>")?;
        } else if self.colour {
            write!(writer, "\x1b[2m{:.3}\x1b[0m {colour}{name}\x1b[0m", Timestamp::now())?;
        } else {
            write!(writer, "{:.3} {name}", Timestamp::now())?;
        }
        let mut separator = if self.journal { "" } else { " " };
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            write!(writer, "{separator}{}", span.name())?;
            let extensions = span.extensions();
            let fields = extensions.get::<tracing_subscriber::fmt::FormattedFields<N>>();
            if let Some(fields) = fields.filter(|fields| !fields.is_empty()) {
                write!(writer, "{{{}}}", fields.fields.trim_start())?;
            }
            write!(writer, ":")?;
            separator = " ";
        }
        // Each field brings its own space.
        let mut fields = String::new();
        context.format_fields(Writer::new(&mut fields), event)?;
        let fields = if separator.is_empty() { fields.trim_start() } else { &fields };
        writeln!(writer, "{fields}")
    }
}

fn write_field(writer: &mut Writer<'_>, name: &str, value: &dyn fmt::Debug) -> fmt::Result {
    let mut raw = String::new();
    write!(raw, "{value:?}")?;
    let mut text = String::with_capacity(raw.len());
    escape(&mut text, &raw);
    match name {
        "message" => write!(writer, " {text}"),
        // Already logged by the crate that bridges `log`; tells a person nothing.
        _ if name.starts_with("log.") => Ok(()),
        _ => write!(writer, " {name}={text}"),
    }
}

/// Standard error, which the progress bar leaves free while a line is written.
struct Stderr;

impl MakeWriter<'_> for Stderr {
    type Writer = Stderr;

    fn make_writer(&self) -> Stderr {
        Stderr
    }
}

impl io::Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_stderr(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_stderr(bytes: &[u8]) {
    // Nobody is left to tell when standard error is gone.
    let write = || drop(io::stderr().lock().write_all(bytes));
    match &*bar() {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// The bar on the terminal, if there is one.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn bar() -> MutexGuard<'static, Option<ProgressBar>> {
    BAR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Progress of `--once` on a terminal: bytes, lines, rate, time left. At most one is shown.
#[derive(Debug)]
pub struct Progress {
    enabled: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Shows a bar if `enabled`, once it is known that there is something to send.
    pub fn new(enabled: bool) -> Progress {
        Progress { enabled, bar: None }
    }

    /// What there is to send, as far as it was found.
    pub fn set_total(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(bytes);
        } else if self.enabled && bytes > 0 {
            self.show(bytes);
        }
    }

    fn show(&mut self, total_bytes: u64) {
        let style = ProgressStyle::with_template(
            "{bar:24} {bytes}/{total_bytes}  {msg}  {bytes_per_sec}  {eta} left",
        );
        let shown = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr())
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            .with_message("0 lines");
        shown.enable_steady_tick(Duration::from_millis(250));
        *bar() = Some(shown.clone());
        self.bar = Some(shown);
    }

    /// What has been receipted so far.
    pub fn set(&self, bytes: u64, lines: u64) {
        let Some(bar) = &self.bar else { return };
        // A file that grows meanwhile is sent as far as it reaches.
        if bar.length().is_some_and(|total| bytes > total) {
            bar.set_length(bytes);
        }
        bar.set_position(bytes);
        bar.set_message(if lines == 1 { "1 line".to_owned() } else { format!("{lines} lines") });
    }

    /// Takes the bar away; dropping does the same.
    pub fn finish(&self) {
        if let Some(shown) = &self.bar {
            shown.finish_and_clear();
            *bar() = None;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Capture(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Capture {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(text: Text, log: impl FnOnce()) -> String {
        let capture = Capture::default();
        let sink = capture.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(text)
            .fmt_fields(format::debug_fn(|writer, field, value| {
                write_field(writer, field.name(), value)
            }))
            .with_writer(move || sink.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let bytes = capture.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    #[test]
    fn outside_text_cannot_steer_the_terminal_or_make_a_line() {
        let evil = "x\x1b[2J\ny\u{9b}z\u{202e}";
        let line = logged(Text { colour: false, journal: false }, || {
            let span = tracing::info_span!("connection", peer = %evil);
            let _entered = span.enter();
            tracing::warn!(reason = %evil, quoted = evil, "got {evil}");
        });
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        assert!(!line.trim_end().chars().any(char::is_control), "{line:?}");
        assert!(!line.contains('\u{202e}'), "{line:?}");
        assert!(line.contains("got x\\x1b[2J\\ny"), "{line:?}");
        assert!(line.contains("connection{peer=x"), "{line:?}");
    }

    #[test]
    fn the_journal_gets_priorities_and_no_time() {
        let line = logged(Text { colour: false, journal: true }, || {
            tracing::error!(port = 1, "no");
            tracing::info!("yes");
        });
        assert_eq!(line, "<3>no port=1\n<6>yes\n");
    }

    #[test]
    fn levels_of_libraries_stay_low() {
        let filter = targets(LogLevel::Debug);
        assert!(filter.would_enable("waybill::sender", &Level::DEBUG));
        assert!(!filter.would_enable("hyper", &Level::INFO));
    }

    #[test]
    fn a_disabled_bar_shows_nothing() {
        let mut progress = Progress::new(false);
        progress.set_total(10);
        progress.set(20, 1);
        progress.finish();
        assert!(bar().is_none());
    }
}
