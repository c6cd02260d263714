use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::process::Command;

use futures_util::FutureExt;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::record::OFFSET_MAX;
use crate::record::framing::encode_spool_record;

fn budget() -> Arc<Budget> {
    Arc::new(Budget::new(1 << 30))
}

fn open(dir: &Path) -> Spool {
    Spool::open(dir, budget()).expect("open")
}

/// A writer without its thread, so that a test decides when and onto what it commits.
fn bare(dir: &Path) -> (Spool, Writer) {
    files::make_directory(dir).expect("directory");
    let live = SegmentId::mint();
    let mark = Watermark { segment: live, offset: 0, synced: 0, ended: false };
    let shared = Arc::new(Shared {
        dir: dir.to_owned(),
        queue: Queue::default(),
        table: Mutex::new(Table { runs: vec![table::Run::live(live)] }),
        watermark: watch::Sender::new(mark),
        budget: budget(),
        waits: AtomicU64::new(0),
    });
    let writer = Writer::new(shared.clone(), live);
    (Spool { shared, writer: None, full: Throttle::default() }, writer)
}

/// Commits one record, counted as an append would.
fn commit(spool: &Spool, writer: &mut Writer, payload: &[u8]) -> io::Result<()> {
    let bytes = encoded(payload);
    writer.commit(&bytes)?;
    spool.shared.budget.take(bytes.len() as u64);
    Ok(())
}

fn encoded(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_spool_record(&mut bytes, 7, b"", payload);
    bytes
}

/// All payloads that a spool would send, and the bad ranges between them.
fn read_all(spool: &Spool) -> (Vec<Vec<u8>>, Vec<(u64, u64)>) {
    let (mut payloads, mut bad) = (Vec::new(), Vec::new());
    for segment in spool.segments() {
        let mut at = segment.start;
        loop {
            match spool.read(segment.id, at, 100).expect("read") {
                Chunk::Records(bytes) => {
                    for record in Framing::SPOOL.records(&bytes, at, false) {
                        payloads.push(record.payload.to_vec());
                    }
                    at += bytes.len() as u64;
                }
                Chunk::Bad { end } => {
                    bad.push((at, end));
                    at = end;
                }
                Chunk::Wait | Chunk::End => break,
            }
        }
    }
    (payloads, bad)
}

fn spool_files(dir: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(dir).expect("directory");
    entries.map(|entry| entry.expect("entry").path()).collect()
}

#[tokio::test]
async fn records_come_back_in_order_after_a_restart() {
    let dir = TempDir::new().expect("dir");
    let spool = open(dir.path());
    let live = spool.watermark().segment;
    for number in 0..1000 {
        spool.append(number, b"", format!("line {number}").as_bytes()).await;
    }
    spool.flush().await.expect("synced");
    let (lines, bad) = read_all(&spool);
    assert_eq!((lines.len(), lines[999].as_slice(), bad), (1000, &b"line 999"[..], vec![]));
    drop(spool);

    let spool = open(dir.path());
    assert_eq!(read_all(&spool).0, lines);
    let segments = spool.segments();
    assert_eq!((segments.len(), segments[0].id), (2, live));
    assert!(segments[0].end.is_some() && segments[1].end.is_none());
    assert_ne!(segments[1].id, live, "each start opens a new segment");
}

#[test]
fn what_is_not_synced_is_not_read() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    commit(&spool, &mut writer, b"synced").expect("commit");
    let path = spool_files(dir.path()).pop_first().expect("file");
    let end = spool.watermark().offset;
    let file = fs::OpenOptions::new().append(true).open(path).expect("file");
    io::Write::write_all(&mut &file, &encoded(b"not synced")).expect("write");
    assert_eq!(spool.read(spool.watermark().segment, end, 100).expect("read"), Chunk::Wait);
    assert_eq!(read_all(&spool).0, [b"synced"]);
}

/// I2: a crash leaves any prefix of the file, and what is recovered is a prefix of the records,
/// though a payload looks like a record itself.
#[test]
fn a_crash_at_every_byte_leaves_a_prefix_of_whole_records() {
    let embedded = encoded(b"a record in a payload");
    let trap = [&embedded[..], b" and more"].concat();
    let payloads = [&b"one"[..], b"", &trap, b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", b"last"];
    let bytes: Vec<u8> = payloads.iter().flat_map(|payload| encoded(payload)).collect();
    let name = files::file_name(SegmentId::mint(), 0, files::Kind::Records);
    // Cut inside the trap's own record right behind the embedded one, nothing tells them apart.
    let blind = encoded(b"one").len() + encoded(b"").len() + SPOOL_HEADER_BYTES + embedded.len();
    for cut in (0..=bytes.len()).filter(|&cut| cut != blind) {
        let dir = TempDir::new().expect("dir");
        fs::write(dir.path().join(&name), &bytes[..cut]).expect("write");
        let spool = open(dir.path());
        let (read, bad) = read_all(&spool);
        assert_eq!(bad, [], "cut at {cut}");
        assert_eq!(read, payloads[..read.len()], "cut at {cut}");
        let next = payloads.get(read.len()).map_or(0, |payload| encoded(payload).len());
        let kept: usize = read.iter().map(|payload| encoded(payload).len()).sum();
        assert!(cut == kept || cut < kept + next, "cut at {cut} lost a whole record");
        // The cut itself is durable and stays.
        drop(spool);
        let again = open(dir.path());
        assert_eq!(read_all(&again).0, read);
    }
}

/// A power cut may lose a page in the middle of an unsynced group.
#[test]
fn a_hole_before_good_records_is_a_reported_loss_and_the_rest_is_kept() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    let payloads: Vec<Vec<u8>> = (0..2000).map(|n| format!("line {n}").into_bytes()).collect();
    for payload in &payloads {
        spool.append_last(0, b"", payload);
    }
    writer.commit(&spool.shared.queue.take(Vec::new()).expect("group").bytes).expect("commit");
    let path = spool_files(dir.path()).pop_first().expect("file");
    let file = fs::OpenOptions::new().write(true).open(path).expect("file");
    file.write_all_at(&[0; 4096], 8192).expect("hole");
    drop((spool, writer));

    let (read, bad) = read_all(&open(dir.path()));
    assert_eq!(bad.len(), 1);
    assert!(bad[0].0 <= 8192 && bad[0].1 >= 12288 && bad[0].1 < 12288 + 64, "{bad:?}");
    let size = encoded(b"line 1000").len();
    assert!(read.len() >= 2000 - (4096 + 2 * size) / encoded(b"line 1").len());
    assert_eq!(read.first(), payloads.first());
    assert_eq!(read.last(), payloads.last());
    assert!(read.iter().all(|line| payloads.contains(line)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// One flipped bit costs the record that it hit, no other, and gives no wrong one.
    #[test]
    fn a_flipped_bit_costs_one_record(
        payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 2..12),
        position in any::<proptest::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let dir = TempDir::new().expect("dir");
        let (spool, mut writer) = bare(dir.path());
        let mut starts = vec![0];
        for payload in &payloads {
            commit(&spool, &mut writer, payload).expect("commit");
            starts.push(spool.watermark().offset);
        }
        let path = spool_files(dir.path()).pop_first().expect("file");
        let mut bytes = fs::read(&path).expect("file");
        // Not in the last record: there it is a torn tail.
        let at = position.index(starts[payloads.len() - 1] as usize);
        bytes[at] ^= 1 << bit;
        fs::write(&path, &bytes).expect("write");
        let hit = starts.iter().rposition(|&start| start <= at as u64).expect("0 is a start");

        let mut expected = payloads.clone();
        expected.remove(hit);
        let damage = vec![(starts[hit], starts[hit + 1])];
        // While running, and after a restart.
        prop_assert_eq!(read_all(&spool), (expected.clone(), damage.clone()));
        drop((spool, writer));
        prop_assert_eq!(read_all(&open(dir.path())), (expected, damage));
    }
}

/// A length that grew by a multiple of its neighbours' size led over them all.
#[test]
fn a_flipped_length_does_not_hide_the_records_it_spans() {
    for (bit, count) in [(6, 4), (6, 3), (5, 8)] {
        let dir = TempDir::new().expect("dir");
        let mut bytes = encoded(&[b'x'; 14]).repeat(count);
        bytes[0] ^= 1 << bit;
        let name = files::file_name(SegmentId::mint(), 0, files::Kind::Records);
        fs::write(dir.path().join(name), &bytes).expect("write");
        let (read, bad) = read_all(&open(dir.path()));
        assert_eq!((read.len(), bad), (count - 1, vec![(0, 32)]), "bit {bit}, {count} records");
    }
}

#[test]
fn files_roll_over_and_release_unlinks_only_what_is_covered() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    writer.file_bytes = 100;
    let mut ends = Vec::new();
    for number in 0..12 {
        commit(&spool, &mut writer, &[b'x'; 32]).expect("commit");
        ends.push((number, spool.watermark().offset));
    }
    let live = spool.watermark().segment;
    let (size, end) = (50, 600);
    assert_eq!(ends[11].1, end);
    assert_eq!(spool_files(dir.path()).len(), 6, "two records fill a file");
    assert_eq!(read_all(&spool).0.len(), 12);

    spool.release(live, 3 * size - 1).expect("release");
    assert_eq!(spool_files(dir.path()).len(), 5, "only the first file is covered");
    assert_eq!(spool.segments()[0].start, 2 * size);
    assert_eq!(spool.read(live, 0, 100).expect("read"), Chunk::Bad { end: 2 * size });
    spool.release(live, size).expect("release");
    assert_eq!(spool.shared.budget.used(), end - 3 * size + 1, "a position never moves back");

    spool.release(live, u64::MAX).expect("release");
    assert_eq!(spool_files(dir.path()).len(), 1, "the live file stays");
    assert_eq!(spool.shared.budget.used(), 0);
    drop((spool, writer));

    let spool = open(dir.path());
    assert_eq!(spool.segments()[0], SpoolSegment { id: live, start: 10 * size, end: Some(end) });
    spool.release(live, end).expect("release");
    assert_eq!(spool_files(dir.path()).len(), 0);
    assert_eq!(spool.read(live, 10 * size, 100).expect("read"), Chunk::End);
    assert_eq!(spool.shared.budget.used(), 0);
}

#[test]
fn a_file_that_somebody_removed_or_cut_is_a_reported_loss() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    writer.file_bytes = 100;
    for _ in 0..8 {
        commit(&spool, &mut writer, &[b'x'; 32]).expect("commit");
    }
    let paths: Vec<_> = spool_files(dir.path()).into_iter().collect();
    fs::remove_file(&paths[1]).expect("remove");
    fs::OpenOptions::new().write(true).open(&paths[2]).expect("open").set_len(60).expect("cut");
    assert_eq!(read_all(&spool).1, [(100, 200), (200, 300)]);
    drop((spool, writer));
    // After a restart the cut file's whole record is known to be good.
    assert_eq!(read_all(&open(dir.path())).1, [(100, 200), (250, 260), (260, 300)]);
}

#[tokio::test]
async fn a_full_budget_blocks_and_receipts_make_room() {
    let dir = TempDir::new().expect("dir");
    let spool = Spool::open(dir.path(), Arc::new(Budget::new(120))).expect("open");
    spool.append(0, b"", &[b'a'; 32]).await;
    spool.append(0, b"", &[b'b'; 32]).await;
    let payload = [b'c'; 32];
    let mut third = Box::pin(spool.append(0, b"", &payload));
    assert_eq!(third.as_mut().now_or_never(), None, "the budget is full");
    assert_eq!(spool.waits(), 1);

    let live = spool.watermark().segment;
    spool.flush().await.expect("synced");
    spool.release(live, 50).expect("release");
    third.await;
    spool.flush().await.expect("synced");
    assert_eq!(read_all(&spool).0.len(), 3);
}

#[tokio::test]
async fn one_record_fits_into_any_budget_and_a_stop_goes_over_it() {
    let dir = TempDir::new().expect("dir");
    let spool = Spool::open(dir.path(), Arc::new(Budget::new(1))).expect("open");
    assert!(spool.try_append(0, b"", b"first"));
    assert!(!spool.try_append(0, b"", b"second"));
    assert!(spool.room().now_or_never().is_none());
    spool.append_last(0, b"", b"in hand");
    spool.flush().await.expect("synced");
    assert_eq!(read_all(&spool).0, [&b"first"[..], b"in hand"]);
}

#[tokio::test]
async fn a_row_that_must_end_gets_a_new_segment() {
    let dir = TempDir::new().expect("dir");
    let spool = open(dir.path());
    let first = spool.watermark().segment;
    let mut watermark = spool.subscribe();
    spool.append(0, b"", b"yesterday").await;
    spool.end_segment();
    watermark.wait_for(|mark| mark.segment != first).await.expect("open");
    // An empty segment has nothing to end.
    let second = spool.watermark().segment;
    spool.end_segment();
    spool.append(0, b"", b"today").await;
    spool.flush().await.expect("synced");
    let segments = spool.segments();
    assert_eq!(segments[0], SpoolSegment { id: first, start: 0, end: Some(27) });
    assert_eq!(segments[1], SpoolSegment { id: second, start: 0, end: None });
    assert_eq!(read_all(&spool).0, [&b"yesterday"[..], b"today"]);
}

#[test]
fn a_segment_receipted_before_it_ended_leaves_nothing_behind() {
    let dir = TempDir::new().expect("dir");
    let spool = open(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async {
        let first = spool.watermark().segment;
        let mut watermark = spool.subscribe();
        spool.append(0, b"", b"line").await;
        spool.flush().await.expect("synced");
        spool.release(first, spool.watermark().offset).expect("release");
        assert_eq!(spool_files(dir.path()).len(), 1);
        spool.end_segment();
        watermark.wait_for(|mark| mark.segment != first).await.expect("open");
        assert_eq!(spool_files(dir.path()).len(), 0);
    });
}

/// The kernel forgets a failed sync: the same file must not be trusted again (`fdatasync` of
/// `/dev/null` fails, its writes do not).
#[test]
fn a_failed_sync_moves_the_records_to_a_fresh_segment() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    commit(&spool, &mut writer, b"synced").expect("commit");
    let first = spool.watermark();
    let real = writer.replace_file(Path::new("/dev/null"));
    // What reached the disk in spite of the error is there after a crash.
    real.write_all_at(&encoded(b"in doubt"), first.offset).expect("write");
    commit(&spool, &mut writer, b"in doubt").expect_err("sync fails");
    assert_eq!(spool.watermark(), first, "nothing moved");

    commit(&spool, &mut writer, b"in doubt").expect("commit");
    let second = spool.watermark();
    assert_ne!(second.segment, first.segment);
    assert_eq!(spool.segments()[0].end, Some(first.offset));
    assert_eq!(read_all(&spool).0, [&b"synced"[..], b"in doubt"]);
    drop((spool, writer));

    let spool = open(dir.path());
    assert_eq!(read_all(&spool).0, [&b"synced"[..], b"in doubt"], "not twice (I3)");
    for segment in spool.segments() {
        spool.release(segment.id, u64::MAX).expect("release");
    }
    assert_eq!(spool_files(dir.path()).len(), 0, "the end marker goes with its segment");
}

#[test]
fn a_failed_first_sync_leaves_no_empty_segment() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    writer.open_file().expect("file");
    writer.replace_file(Path::new("/dev/null"));
    commit(&spool, &mut writer, b"line").expect_err("sync fails");
    commit(&spool, &mut writer, b"line").expect("commit");
    assert_eq!(spool.segments().len(), 1);
    assert_eq!(read_all(&spool).0, [b"line"]);
}

#[test]
fn a_full_device_keeps_what_was_accepted() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    commit(&spool, &mut writer, b"before").expect("commit");
    let first = spool.watermark();
    let real = writer.replace_file(Path::new("/dev/full"));
    let error = commit(&spool, &mut writer, b"waits").expect_err("no space");
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    writer.put_file(real);
    commit(&spool, &mut writer, b"waits").expect("commit");
    assert_ne!(spool.watermark().segment, first.segment, "a file with records can be unlinked");
    assert_eq!(read_all(&spool).0, [&b"before"[..], b"waits"]);
}

/// I9: a stop does not wait for ever for a disk, and tells what it lost.
#[tokio::test]
async fn a_stop_on_a_full_device_tells_what_is_lost() {
    let dir = TempDir::new().expect("dir");
    let (spool, mut writer) = bare(dir.path());
    writer.open_file().expect("file");
    writer.replace_file(Path::new("/dev/full"));
    spool.append_last(0, b"", b"one");
    spool.append_last(0, b"", b"two");
    spool.close();
    writer.run();
    let lost = spool.flush().await.expect_err("not written");
    assert!(matches!(lost, SpoolError::Lost { bytes: 42 }), "{lost}");
}

/// A receiver refuses a frame that ends at 2^40.
#[test]
fn a_segment_ends_before_2_to_the_40() {
    let mut record = Vec::new();
    encode_spool_record(&mut record, 0, b"", b"line");
    for (end, fits) in [(OFFSET_MAX - 1, true), (OFFSET_MAX, false)] {
        let dir = TempDir::new().expect("dir");
        let (spool, mut writer) = bare(dir.path());
        let first = spool.watermark().segment;
        writer.offset = end - record.len() as u64;
        spool.shared.budget.take(OFFSET_MAX);
        writer.commit(&record).expect("written");
        assert_eq!(spool.watermark().segment == first, fits, "to {end}");
    }
}

/// Counted by `scripts/test`, as in the end-to-end tests.
fn skip(reason: &str) {
    println!("SKIPPED: {reason}");
    if let Some(file) = std::env::var_os("WAYBILL_TEST_SKIPPED") {
        let file = File::options().create(true).append(true).open(file);
        let noted =
            file.and_then(|mut file| file.write_all(format!("SKIPPED: {reason}\n").as_bytes()));
        noted.expect("the skip can be noted");
    }
}

/// A tmpfs of 2 MiB, unmounted on drop.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount() -> Option<SmallDisk> {
        let dir = TempDir::new().expect("dir");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(dir.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(SmallDisk(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_reading_and_goes_on_by_itself() {
    let Some(disk) = SmallDisk::mount() else {
        skip("mounting a tmpfs needs root");
        return;
    };
    let ballast = disk.0.path().join("ballast");
    fs::write(&ballast, vec![0; 512 << 10]).expect("ballast");
    let spool = Arc::new(open(&disk.0.path().join("spool")));
    let payload = vec![b'x'; 1000];
    let mut sent = 0_u64;
    // Until the disk and then the queue are full: the source waits.
    while spool.append(sent, b"", &payload).now_or_never().is_some() {
        sent += 1;
        if spool.shared.queue.is_full() {
            break;
        }
    }
    let synced = spool.watermark().synced;
    assert!(synced < sent * 1018, "not all fits on the disk");
    fs::remove_file(&ballast).expect("ballast");
    // The rest does not fit either: room comes as receipts release files, or the disk grows.
    let grown = Command::new("mount")
        .args(["-o", "remount,size=64m"])
        .arg(disk.0.path())
        .status()
        .expect("remount");
    assert!(grown.success());
    spool.flush().await.expect("synced");
    let (read, bad) = read_all(&spool);
    assert_eq!((read.len() as u64, bad), (sent, vec![]));
}

#[test]
fn a_source_name_is_one_directory_whatever_it_holds() {
    let dir = |name: &str| directory(Path::new("/s"), name);
    assert_eq!(dir("nginx_1-a"), Path::new("/s/spool/nginx_1-a"));
    assert_eq!(dir("../../etc"), Path::new("/s/spool/%2E%2E%2F%2E%2E%2Fetc"));
    let (one, other) = ("a".repeat(400), format!("{}b", "a".repeat(399)));
    assert_ne!(dir(&one), dir(&other));
    assert_eq!(dir(&one).file_name().map(|name| name.len()), Some(255));
}
