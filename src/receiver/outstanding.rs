//! What one connection has sent and no receipt has covered yet: the receiver's side of the credit.

use std::collections::BTreeMap;

use crate::protocol::Receipt;

/// Bytes and frames without a receipt. Counted when a frame is taken and when its receipts leave,
/// so that it is never more than what the sender counts.
#[derive(Debug, Default)]
pub(super) struct Outstanding {
    bytes: u64,
    lines: u64,
    frames: usize,
    /// By handle and offset of the first record.
    open: BTreeMap<(u32, u64), Open>,
}

#[derive(Debug, Default)]
struct Open {
    bytes: u64,
    lines: u64,
    /// More than one where the same range came again before its receipt.
    frames: usize,
}

impl Outstanding {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Records of any kind.
    pub(super) fn lines(&self) -> u64 {
        self.lines
    }

    pub(super) fn frames(&self) -> usize {
        self.frames
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// A frame of so many uncompressed bytes and records came.
    pub(super) fn add(&mut self, handle: u32, offset: u64, bytes: u64, lines: u64) {
        let open = self.open.entry((handle, offset)).or_default();
        open.bytes += bytes;
        open.lines += lines;
        open.frames += 1;
        self.bytes += bytes;
        self.lines += lines;
        self.frames += 1;
    }

    /// A receipt leaves; it covers a frame or a part of one.
    pub(super) fn settle(&mut self, receipt: &Receipt) {
        let covered = receipt.to.saturating_sub(receipt.from);
        let range = (receipt.handle, 0)..=(receipt.handle, receipt.from);
        let Some((&key, open)) = self.open.range_mut(range).next_back() else { return };
        let bytes = covered.min(open.bytes);
        open.bytes -= bytes;
        self.bytes -= bytes;
        let lines = match open.bytes {
            0 => open.lines,
            _ => receipt.runs.iter().map(|run| run.lines).sum::<u64>().min(open.lines),
        };
        open.lines -= lines;
        self.lines -= lines;
        if open.bytes == 0 {
            self.frames -= open.frames;
            self.open.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn receipt(handle: u32, from: u64, to: u64) -> Receipt {
        Receipt { handle, from, to, runs: Vec::new() }
    }

    #[test]
    fn a_frame_answered_in_parts_counts_until_its_last_part() {
        let mut outstanding = Outstanding::default();
        outstanding.add(1, 100, 50, 1);
        outstanding.add(1, 150, 50, 1);
        outstanding.settle(&receipt(1, 120, 150));
        assert_eq!((outstanding.bytes(), outstanding.frames()), (70, 2));
        outstanding.settle(&receipt(1, 100, 120));
        assert_eq!((outstanding.bytes(), outstanding.frames()), (50, 1));
        outstanding.settle(&receipt(2, 150, 200));
        assert!(!outstanding.is_empty(), "another segment's receipt");
        outstanding.settle(&receipt(1, 150, 200));
        assert!(outstanding.is_empty());
    }

    proptest! {
        #[test]
        fn receipts_in_any_order_settle_everything(
            sizes in proptest::collection::vec(1_u64..100, 1..20),
            order in any::<u64>(),
        ) {
            let mut outstanding = Outstanding::default();
            let mut receipts = Vec::new();
            let mut at = 7;
            for size in sizes {
                outstanding.add(3, at, size, 2);
                let middle = at + size / 2;
                for (from, to) in [(at, middle), (middle, at + size)] {
                    if from < to {
                        receipts.push(receipt(3, from, to));
                    }
                }
                at += size;
            }
            let length = receipts.len() as u64;
            receipts.sort_by_key(|receipt| (receipt.from ^ order).wrapping_mul(order | 1) % (length * 31));
            for receipt in receipts {
                outstanding.settle(&receipt);
            }
            prop_assert!(outstanding.is_empty());
            prop_assert_eq!((outstanding.bytes(), outstanding.lines()), (0, 0));
        }
    }
}
