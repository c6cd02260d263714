//! Files: nothing lost and nothing twice, whatever happens to them.

use super::support::waybill::{Bench, lines};

#[test]
fn a_file_is_sent_once_and_a_second_run_sends_nothing() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 10_000));
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_eq!(bench.messages().len(), 10_000);
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.append("app.log", "one more\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_eq!(bench.messages().len(), 10_001);
}
