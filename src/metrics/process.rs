//! What both sides tell of themselves.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{Counter, Kind, Page};

/// Readings of a changed configuration.
#[derive(Debug, Default)]
pub struct Reloads {
    applied: Counter,
    refused: Counter,
    last_refused: AtomicBool,
}

impl Reloads {
    /// Counts one.
    pub fn count(&self, applied: bool) {
        if applied { &self.applied } else { &self.refused }.add(1);
        self.last_refused.store(!applied, Ordering::Relaxed);
    }

    /// Writes the families.
    pub fn write(&self, page: &mut Page) {
        let mut family = page.family(
            "waybill_config_reloads_total",
            Kind::Counter,
            "Readings of the configuration on SIGHUP, by what became of them.",
        );
        family.sample(&[("result", "applied")], self.applied.get());
        family.sample(&[("result", "refused")], self.refused.get());
        page.single(
            "waybill_config_last_reload_successful",
            Kind::Gauge,
            "Whether the last reading was not refused.",
            u8::from(!self.last_refused.load(Ordering::Relaxed)),
        );
    }
}

/// Which version runs.
pub fn write_build_info(page: &mut Page) {
    let mut family =
        page.family("waybill_build_info", Kind::Gauge, "Always 1; the version is a label.");
    family.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
}
