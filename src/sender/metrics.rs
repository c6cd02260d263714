//! What a sender counts, for `--metrics` and for its summary.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Summary;
use super::window::Counted;
use crate::metrics::{Counter, Kind, Lags, Page, PerLabel, Reloads, Report, write_build_info};
use crate::spool::Budget;
use crate::tls::ServerCertificate;

/// What is counted of one source. Lines count once, when their receipt is final.
#[derive(Debug, Default)]
pub struct Counters {
    /// Lines newly stored.
    pub stored: Counter,
    /// Lines that were there already.
    pub already: Counter,
    /// Empty lines and NUL runs.
    pub skipped: Counter,
    /// Lines in the dead letter.
    pub parked: Counter,
    /// Lines put off by the receiver; those that are put off again count again.
    pub deferred: Counter,
    /// Uncompressed bytes sent, resends included.
    pub sent_bytes: Counter,
    /// Bytes sent again.
    pub resent_bytes: Counter,
    /// Bytes that positions moved over by receipts.
    pub receipted_bytes: Counter,
    /// Bytes reported lost.
    pub lost_bytes: Counter,
    /// Datagrams that the kernel dropped, as far as it counts them: of UDP.
    pub dropped_datagrams: Arc<Counter>,
    /// What waits for its receipt.
    pub lags: Lags,
}

impl Counters {
    /// Counts a receipt.
    pub fn count(&self, counted: &Counted) {
        self.stored.add(counted.stored);
        self.already.add(counted.already);
        self.skipped.add(counted.skipped);
        self.parked.add(counted.parked);
    }
}

/// What a sender counts while its process lives, whatever configuration is in force.
#[derive(Debug)]
pub struct Metrics {
    /// By source.
    pub sources: PerLabel<Counters>,
    /// Connections that stand, on which a receiver has said `welcome`.
    pub connected: AtomicU64,
    /// Connections on which a receiver said `welcome`.
    pub connections: Counter,
    /// Attempts that came to no `welcome`.
    pub connection_failures: Counter,
    /// Readings of a changed configuration.
    pub reloads: Reloads,
    kept_bytes: (AtomicU64, AtomicU64),
    /// What had no receipt when sending ended.
    pub left_bytes: AtomicU64,
    /// The state is open and sockets are bound, as far as they can be.
    pub ready: AtomicBool,
    budget: Arc<Budget>,
    /// What receivers are shown that dial.
    certificate: Mutex<Option<Arc<ServerCertificate>>>,
}

impl Metrics {
    /// With nothing counted yet.
    pub fn new(budget: Arc<Budget>) -> Metrics {
        Metrics {
            sources: PerLabel::default(),
            connected: AtomicU64::new(0),
            connections: Counter::default(),
            connection_failures: Counter::default(),
            reloads: Reloads::default(),
            kept_bytes: Default::default(),
            left_bytes: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            budget,
            certificate: Mutex::default(),
        }
    }

    /// The certificate that is in force; none where the sender dials.
    pub fn set_certificate(&self, certificate: Option<Arc<ServerCertificate>>) {
        *self.certificate() = certificate;
    }

    fn certificate(&self) -> MutexGuard<'_, Option<Arc<ServerCertificate>>> {
        self.certificate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in copies of deleted files, and how many they may be.
    pub fn set_kept(&self, bytes: u64, max: u64) {
        self.kept_bytes.0.store(bytes, Ordering::Relaxed);
        self.kept_bytes.1.store(max, Ordering::Relaxed);
    }

    /// What was done by now.
    pub fn summary(&self, complete: bool) -> Summary {
        let mut summary = Summary::default();
        for (_, counters) in self.sources.all() {
            summary.stored += counters.stored.get();
            summary.already += counters.already.get();
            summary.skipped += counters.skipped.get();
            summary.parked += counters.parked.get();
            summary.sent_bytes += counters.sent_bytes.get();
            summary.resent_bytes += counters.resent_bytes.get();
            summary.lost_bytes += counters.lost_bytes.get();
            summary.lost_datagrams += counters.dropped_datagrams.get();
        }
        summary.left_bytes = self.left_bytes.load(Ordering::Relaxed);
        summary.complete = complete && summary.parked == 0 && summary.lost_bytes == 0;
        summary
    }
}

impl Report for Metrics {
    fn write(&self, page: &mut Page) {
        let sources = self.sources.all();
        write_build_info(page);
        let mut lines = page.family(
            "waybill_lines_total",
            Kind::Counter,
            "Lines whose receipt came, by its verdict.",
        );
        for (source, counters) in &sources {
            for (verdict, counter) in [
                ("stored", &counters.stored),
                ("already", &counters.already),
                ("skipped", &counters.skipped),
                ("parked", &counters.parked),
            ] {
                lines.sample(&[("source", source), ("verdict", verdict)], counter.get());
            }
        }
        type Of = fn(&Counters) -> &Counter;
        let counters: [(&str, &str, Of); 6] = [
            (
                "waybill_deferred_lines_total",
                "Lines that the receiver put off; each time counts.",
                |counters| &counters.deferred,
            ),
            (
                "waybill_sent_bytes_total",
                "Bytes of lines sent, uncompressed, with those sent again.",
                |counters| &counters.sent_bytes,
            ),
            (
                "waybill_resent_bytes_total",
                "Bytes of lines sent again, since no receipt had come.",
                |counters| &counters.resent_bytes,
            ),
            (
                "waybill_receipted_bytes_total",
                "Bytes of lines that positions moved over.",
                |counters| &counters.receipted_bytes,
            ),
            (
                "waybill_lost_bytes_total",
                "Bytes reported lost before they were receipted.",
                |counters| &counters.lost_bytes,
            ),
            (
                "waybill_dropped_datagrams_total",
                "UDP datagrams that the kernel dropped before they were read.",
                |counters| &counters.dropped_datagrams,
            ),
        ];
        for (name, help, counter) in counters {
            let mut family = page.family(name, Kind::Counter, help);
            for (source, counters) in &sources {
                family.sample(&[("source", source)], counter(counters).get());
            }
        }
        let now = Instant::now();
        let lags: Vec<_> =
            sources.iter().map(|(source, counters)| (source, counters.lags.waiting(now))).collect();
        let mut family = page.family(
            "waybill_lag_bytes",
            Kind::Gauge,
            "Bytes between the position and the end of what was read or spooled.",
        );
        for (source, (bytes, _)) in &lags {
            family.sample(&[("source", source)], bytes);
        }
        let mut family = page.family(
            "waybill_lag_seconds",
            Kind::Gauge,
            "How long ago the oldest byte without a receipt was seen first by this process.",
        );
        for (source, (_, since)) in &lags {
            family.sample(&[("source", source)], since.as_secs_f64());
        }
        let gauge = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let connections = self.connections.get();
        for (name, kind, help, value) in [
            (
                "waybill_connected",
                Kind::Gauge,
                "Connections to receivers that stand.",
                gauge(&self.connected),
            ),
            (
                "waybill_connections_total",
                Kind::Counter,
                "Connections on which a receiver said welcome.",
                connections,
            ),
            (
                "waybill_reconnects_total",
                Kind::Counter,
                "Connections after the first.",
                connections.saturating_sub(1),
            ),
            (
                "waybill_connection_failures_total",
                Kind::Counter,
                "Attempts to connect that came to no welcome.",
                self.connection_failures.get(),
            ),
            (
                "waybill_spool_bytes",
                Kind::Gauge,
                "Bytes in the spool of sockets and standard input that wait for a receipt.",
                self.budget.used(),
            ),
            (
                "waybill_spool_limit_bytes",
                Kind::Gauge,
                "How many they may be; then sockets are not read.",
                self.budget.max(),
            ),
            (
                "waybill_kept_bytes",
                Kind::Gauge,
                "Bytes in copies of deleted files that wait for a receipt.",
                gauge(&self.kept_bytes.0),
            ),
            (
                "waybill_kept_limit_bytes",
                Kind::Gauge,
                "How many they may be; what is beyond is lost with this process.",
                gauge(&self.kept_bytes.1),
            ),
        ] {
            page.single(name, kind, help, value);
        }
        page.certificate(self.certificate().as_ref().and_then(|shown| shown.not_after()));
        self.reloads.write(page);
    }

    fn not_ready(&self) -> Option<&'static str> {
        (!self.ready.load(Ordering::Relaxed)).then_some("starting or stopping")
    }
}
