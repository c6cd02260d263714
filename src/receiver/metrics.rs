//! What a receiver counts, for `--metrics`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use super::Receiver;
use crate::metrics::{Counter, Kind, Lag, Lags, Page, PerLabel, Reloads, Report, write_build_info};
use crate::protocol::{Receipt, Verdict};
use crate::tls::ServerCertificate;
use crate::transport::Listener;

/// What is counted of one sender, by its name in the tokens file.
#[derive(Debug, Default)]
struct Counters {
    stored: Counter,
    already: Counter,
    skipped: Counter,
    parked: Counter,
    deferred: Counter,
    received_bytes: Counter,
    resent_bytes: Counter,
    connections: Counter,
    open: AtomicU64,
    lags: Lags,
}

/// What a receiver counts while its process lives, whatever configuration is in force.
#[derive(Debug, Default)]
pub struct Metrics {
    senders: PerLabel<Counters>,
    /// By HTTP status.
    refused: Mutex<BTreeMap<u16, u64>>,
    /// Readings of a changed configuration.
    pub reloads: Reloads,
    /// The one in force, with what its listener shows.
    receiver: Mutex<InForce>,
}

type InForce = (Weak<Receiver>, Option<Arc<ServerCertificate>>);

/// Counts for one connection.
#[derive(Debug)]
pub(super) struct Meter {
    counters: Arc<Counters>,
    lag: Arc<Lag>,
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.counters.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Meter {
    /// A frame came, of so many uncompressed bytes of lines.
    pub(super) fn received(&self, bytes: u64, resent: bool) {
        self.counters.received_bytes.add(bytes);
        if resent {
            self.counters.resent_bytes.add(bytes);
        }
        self.lag.grow(bytes, Instant::now());
    }

    /// A receipt goes out.
    pub(super) fn answered(&self, receipt: &Receipt) {
        for run in &receipt.runs {
            let counter = match &run.verdict {
                Verdict::Stored => &self.counters.stored,
                Verdict::Already => &self.counters.already,
                Verdict::Skipped => &self.counters.skipped,
                Verdict::Parked { .. } => &self.counters.parked,
                Verdict::Deferred { .. } => &self.counters.deferred,
            };
            counter.add(run.lines);
        }
        self.lag.settle(receipt.to.saturating_sub(receipt.from), Instant::now());
    }
}

impl Metrics {
    pub(super) fn connected(&self, sender: &str) -> Meter {
        let counters = self.senders.of(sender);
        counters.connections.add(1);
        counters.open.fetch_add(1, Ordering::Relaxed);
        let lag = counters.lags.open();
        Meter { counters, lag }
    }

    /// A request was refused before any WebSocket byte.
    pub(super) fn refused(&self, status: u16) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.entry(status).or_default() += 1;
    }

    /// This one is in force now.
    pub(super) fn set_receiver(&self, receiver: &Arc<Receiver>, listener: Option<&Listener>) {
        let mut known = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        *known = (Arc::downgrade(receiver), listener.and_then(|l| l.certificate().cloned()));
    }

    fn receiver(&self) -> Option<(Arc<Receiver>, Option<Arc<ServerCertificate>>)> {
        let known = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        Some((known.0.upgrade()?, known.1.clone()))
    }
}

impl Report for Metrics {
    fn write(&self, page: &mut Page) {
        let senders = self.senders.all();
        write_build_info(page);
        let mut lines = page.family(
            "waybill_lines_total",
            Kind::Counter,
            "Lines whose receipt went out, by its verdict.",
        );
        for (sender, counters) in &senders {
            for (verdict, counter) in [
                ("stored", &counters.stored),
                ("already", &counters.already),
                ("skipped", &counters.skipped),
                ("parked", &counters.parked),
            ] {
                lines.sample(&[("sender", sender), ("verdict", verdict)], counter.get());
            }
        }
        type Of = fn(&Counters) -> &Counter;
        let counters: [(&str, &str, Of); 4] = [
            (
                "waybill_deferred_lines_total",
                "Lines that were put off; each time counts.",
                |counters| &counters.deferred,
            ),
            (
                "waybill_received_bytes_total",
                "Bytes of lines received, uncompressed, with those sent again.",
                |counters| &counters.received_bytes,
            ),
            (
                "waybill_resent_bytes_total",
                "Bytes of lines that their sender had sent before.",
                |counters| &counters.resent_bytes,
            ),
            (
                "waybill_connections_total",
                "Connections of senders that showed a valid token.",
                |counters| &counters.connections,
            ),
        ];
        for (name, help, counter) in counters {
            let mut family = page.family(name, Kind::Counter, help);
            for (sender, counters) in &senders {
                family.sample(&[("sender", sender)], counter(counters).get());
            }
        }
        let mut family = page.family("waybill_connections", Kind::Gauge, "Open connections.");
        for (sender, counters) in &senders {
            family.sample(&[("sender", sender)], counters.open.load(Ordering::Relaxed));
        }
        let now = Instant::now();
        let lags: Vec<_> =
            senders.iter().map(|(sender, counters)| (sender, counters.lags.waiting(now))).collect();
        let mut family = page.family(
            "waybill_lag_bytes",
            Kind::Gauge,
            "Bytes of lines received and not answered yet.",
        );
        for (sender, (bytes, _)) in &lags {
            family.sample(&[("sender", sender)], bytes);
        }
        let mut family = page.family(
            "waybill_lag_seconds",
            Kind::Gauge,
            "How long ago the oldest of these bytes was received.",
        );
        for (sender, (_, since)) in &lags {
            family.sample(&[("sender", sender)], since.as_secs_f64());
        }
        let mut family = page.family(
            "waybill_refused_requests_total",
            Kind::Counter,
            "Requests to connect that were refused, by HTTP status.",
        );
        for (status, count) in &*self.refused.lock().unwrap_or_else(PoisonError::into_inner) {
            family.sample(&[("status", &status.to_string())], count);
        }
        if let Some((receiver, certificate)) = self.receiver() {
            let (free, max) = (receiver.memory.available_permits(), receiver.memory_bytes_max);
            page.single(
                "waybill_memory_bytes",
                Kind::Gauge,
                "Bytes of lines of all connections that wait for the destination.",
                max - free,
            );
            page.single(
                "waybill_memory_limit_bytes",
                Kind::Gauge,
                "How many they may be; then nothing is read.",
                max,
            );
            page.single(
                "waybill_destination_ready",
                Kind::Gauge,
                "Whether the destination takes documents.",
                u8::from(receiver.health.is_ready(receiver.memory_in_use())),
            );
            page.certificate(certificate.and_then(|certificate| certificate.not_after()));
        }
        self.reloads.write(page);
    }

    fn not_ready(&self) -> Option<&'static str> {
        match self.receiver() {
            Some((receiver, _)) => receiver.not_ready(),
            None => Some("starting or stopping"),
        }
    }
}
