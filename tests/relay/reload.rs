//! SIGHUP: a changed configuration is put in force while lines come in, a wrong one is refused, and no line is lost or
//! doubled by either.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::support::servers::{free_port, http, spawn_bound, wait_until};
use super::support::store::run;
use super::support::waybill::{Bench, Certificates, PATIENCE, Process, lines, numbered, waybill};

const TAKEN: &str = "the changed configuration is in force";
const REFUSED: &str = "the changed configuration is refused";

/// SIGHUP, and waits until the log has said once more what became of it.
#[track_caller]
fn hang_up(process: &Process, said: &str) {
    let times = || process.log().matches(said).count();
    let before = times();
    process.signal("-HUP");
    wait_until(said, PATIENCE, || times() > before);
}

/// Writes `file N` into app.log and `datagram N` into log.sock, pair by pair, until it is told to end.
struct Writer {
    over: AtomicBool,
    written: AtomicUsize,
}

impl Writer {
    fn run(&self, bench: &Bench) {
        let socket = UnixDatagram::unbound().expect("a socket");
        while !self.over.load(Ordering::Relaxed) {
            let number = self.written.load(Ordering::Relaxed);
            bench.append("app.log", format!("file {number}\n"));
            // Fails where nobody has the socket bound, if only for a moment.
            socket
                .send_to(format!("datagram {number}").as_bytes(), bench.path("log.sock"))
                .expect("the socket is bound all the while");
            self.written.store(number + 1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs it beside `work`; how many pairs were written.
    fn beside(bench: &Bench, work: impl FnOnce(&Writer)) -> usize {
        let writer = Writer { over: AtomicBool::new(false), written: AtomicUsize::new(0) };
        thread::scope(|scope| {
            let writing = scope.spawn(|| writer.run(bench));
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&writer)));
            writer.over.store(true, Ordering::Relaxed);
            writing.join().expect("the writer");
            worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        writer.written.load(Ordering::Relaxed)
    }

    /// Waits until so many pairs more were written.
    fn wait_for_more(&self, pairs: usize) {
        let before = self.written.load(Ordering::Relaxed);
        wait_until("more is written", PATIENCE, || {
            self.written.load(Ordering::Relaxed) >= before + pairs
        });
    }
}

fn sources(tag: &str) -> String {
    format!(
        "[[source]]\nfiles = 'app.log'\nname = 'app'\ntags = ['{tag}']\n\
         [[source]]\nunix_datagram = 'log.sock'\nname = 'socket'\ntags = ['{tag}']\n"
    )
}

fn tag(line: &Value) -> &str {
    line["tags"][0].as_str().expect("a tag")
}

/// The tags of both kinds of lines.
fn tags(bench: &Bench) -> BTreeSet<(String, String)> {
    let kind = |line: &Value| {
        line["message"].as_str().and_then(|text| text.split(' ').next()).unwrap_or("").to_owned()
    };
    bench.stored().iter().map(|line| (kind(line), tag(line).to_owned())).collect()
}

fn start(bench: &Bench, receiver: &super::support::waybill::Receiver) -> Process {
    bench.write("app.log", "");
    let sender = bench.sender(receiver, &["--config", "send.toml"]);
    wait_until("the socket is there", PATIENCE, || bench.path("log.sock").exists());
    sender
}

#[test]
fn new_lines_carry_a_changed_tag_and_none_is_lost_or_doubled() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("send.toml", sources("t0"));
    let mut sender = start(&bench, &receiver);
    let written = Writer::beside(&bench, |writer| {
        for round in 1..5 {
            writer.wait_for_more(50);
            bench.write("send.toml", "[[source]\nfiles = 'app.log'\n");
            hang_up(&sender, REFUSED);
            assert!(sender.log().contains("send.toml:1"), "{}", sender.log());
            let new = format!("t{round}");
            bench.write("send.toml", sources(&new));
            hang_up(&sender, TAKEN);
            let expected = ["file", "datagram"].map(|kind| (kind.to_owned(), new.clone()));
            wait_until("lines of both sources carry the new tag", PATIENCE, || {
                let found = tags(&bench);
                expected.iter().all(|pair| found.contains(pair))
            });
        }
    });
    bench.wait_for_lines(2 * written);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("file", written).chain(numbered("datagram", written)));
    // In the order of the file no line has an older tag than one before it.
    let stored = bench.stored();
    let of_file =
        stored.iter().filter(|line| line["message"].as_str().unwrap().starts_with("file"));
    let in_order: Vec<&str> = of_file.map(tag).collect();
    assert!(in_order.is_sorted(), "{in_order:?}");
    assert_eq!((in_order.first(), in_order.last()), (Some(&"t0"), Some(&"t4")));
}

#[test]
fn a_source_whose_socket_waits_for_its_folder_comes_and_goes() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("send.toml", sources("one"));
    let mut sender = start(&bench, &receiver);
    let waiting = "[[source]]\nunix_datagram = 'run/late.sock'\n";
    // It comes, goes, and comes again; another configuration leaves it as it is.
    for text in [
        sources("one") + waiting,
        sources("one"),
        sources("one") + waiting,
        sources("two") + waiting,
    ] {
        bench.write("send.toml", text);
        hang_up(&sender, TAKEN);
    }
    assert_eq!(sender.log().matches("its directory is missing").count(), 2, "{}", sender.log());
    std::fs::create_dir(bench.path("run")).expect("a folder");
    wait_until("the socket is bound", PATIENCE, || bench.path("run/late.sock").exists());
    let socket = UnixDatagram::unbound().expect("a socket");
    socket.send_to(b"late", bench.path("run/late.sock")).expect("send");
    bench.wait_for_lines(1);
    bench.write("send.toml", sources("two"));
    hang_up(&sender, TAKEN);
    assert!(!bench.path("run/late.sock").exists(), "its socket is let go");
    assert!(sender.stop().success());
    bench.assert_lines(["late".to_owned()]);
}

#[test]
fn sources_come_and_go_and_what_cannot_be_bound_is_refused() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("send.toml", sources("one"));
    let mut sender = start(&bench, &receiver);
    let taken = UnixDatagram::bind(bench.path("taken.sock")).expect("bind");
    let written = Writer::beside(&bench, |writer| {
        writer.wait_for_more(20);
        let more = "[[source]]\nunix_datagram = 'taken.sock'\n";
        bench.write("send.toml", sources("two") + more);
        hang_up(&sender, REFUSED);
        assert!(sender.log().contains("another process is listening"), "{}", sender.log());
        let more = "[[source]]\nunix_stream = 'new.sock'\n[[source]]\nfiles = 'late.log'\n";
        bench.write("send.toml", sources("one") + more);
        bench.write("late.log", lines("late", 10));
        hang_up(&sender, TAKEN);
        let mut stream = UnixStream::connect(bench.path("new.sock")).expect("it is bound");
        stream.write_all(lines("stream", 100).as_bytes()).expect("write");
        drop(stream);
        wait_until("the new sources are read", PATIENCE, || {
            let messages = bench.messages();
            messages.contains(&"stream 99".to_owned()) && messages.contains(&"late 9".to_owned())
        });
        writer.wait_for_more(20);
        bench.write("send.toml", sources("one"));
        hang_up(&sender, TAKEN);
        assert!(!bench.path("new.sock").exists(), "its socket is let go");
        writer.wait_for_more(20);
    });
    drop(taken);
    // The same path under another mode is bound anew.
    bench.write(
        "send.toml",
        sources("one").replace("name = 'socket'", "name = 'socket'\nmode = '0600'"),
    );
    hang_up(&sender, TAKEN);
    let socket = UnixDatagram::unbound().expect("a socket");
    socket.send_to(format!("datagram {written}").as_bytes(), bench.path("log.sock")).expect("send");
    bench.wait_for_lines(2 * written + 111);
    assert!(sender.stop().success());
    let sockets = numbered("datagram", written + 1).chain(numbered("stream", 100));
    bench.assert_lines(numbered("file", written).chain(sockets).chain(numbered("late", 10)));
}

/// Under the name that it had: what it listened on before goes on.
#[test]
fn a_source_that_cannot_move_stays_where_it_is() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let at = |address: &str| format!("[[source]]\nname = 'posts'\nhttp_intake = '{address}'\n");
    bench.write("send.toml", at(&format!("127.0.0.1:{port}")));
    let mut sender = bench.sender(&receiver, &["--config", "send.toml"]);
    sender.wait_for_log("listening for HTTP posts");
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let taken = taken.local_addr().expect("an address").to_string();
    // Documentation addresses (RFC 5737) are nobody's, with the port that we hold ourselves too.
    let [elsewhere, same_port] = [free_port(), port].map(|port| format!("192.0.2.9:{port}"));
    for address in [taken, elsewhere, same_port] {
        bench.write("send.toml", at(&address));
        hang_up(&sender, REFUSED);
    }
    let host = format!("127.0.0.1:{port}");
    let (status, text) = http(&host, "POST", "/", "text/plain", b"kept\n").expect("an answer");
    assert_eq!(status, 200, "{text}");
    let moved = format!("127.0.0.1:{}", free_port());
    bench.write("send.toml", at(&moved));
    hang_up(&sender, TAKEN);
    let (status, text) = http(&moved, "POST", "/", "text/plain", b"moved\n").expect("an answer");
    assert_eq!(status, 200, "{text}");
    bench.wait_for_lines(2);
    assert!(sender.stop().success());
    bench.assert_lines(["kept".to_owned(), "moved".to_owned()]);
}

/// What was read of standard input before the reload is half of a line.
#[test]
fn a_line_on_standard_input_is_not_cut_by_a_reload() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let file = |tag: &str| format!("[[source]]\nstdin = true\ntags = ['{tag}']\n");
    bench.write("send.toml", file("one"));
    let log = bench.path("sender.log");
    let mut command = bench.send_command(&receiver.url(), &["--config", "send.toml"]);
    command.stdin(Stdio::piped()).stderr(std::fs::File::create(&log).expect("a log"));
    let mut sender = spawn_bound(command).expect("waybill send");
    let mut input = sender.stdin.take().expect("piped");
    input.write_all(b"first\nhalf").expect("write");
    bench.wait_for_lines(1);
    bench.write("send.toml", file("two"));
    let id = sender.id().to_string();
    assert!(
        std::process::Command::new("kill").args(["-HUP", &id]).status().expect("kill").success()
    );
    let said = || std::fs::read_to_string(&log).expect("the log");
    wait_until(TAKEN, PATIENCE, || said().contains(TAKEN));
    input.write_all(b" and half\nlast").expect("write");
    drop(input);
    let status = sender.wait().expect("it ends");
    assert!(status.success(), "{}", said());
    bench.assert_lines(["first", "half and half", "last"].map(str::to_owned));
    let stored = bench.stored();
    let of = |text| stored.iter().find(|line| line["message"] == text).map(tag);
    assert_eq!((of("first"), of("last")), (Some("one"), Some("two")));
}

#[test]
fn a_receiver_takes_a_changed_configuration_while_lines_arrive() {
    let bench = Bench::new();
    bench.write("receive.toml", "");
    let (store, config) = (bench.path("store.sqlite"), bench.path("receive.toml"));
    let mut receiver = bench.receiver_with(move |command| {
        command.arg("--store").arg(&store).arg("--config").arg(&config);
    });
    bench.write("send.toml", sources("one"));
    let mut sender = start(&bench, &receiver);
    let former = free_port();
    let written = Writer::beside(&bench, |writer| {
        for text in [
            "credit = '4MiB'\n".to_owned(),
            // The same file under another setting: it is closed and opened again.
            "credit = '4MiB'\n[store]\nkeep_days = 300\n".to_owned(),
            format!("metrics = '127.0.0.1:{former}'\n[store]\nkeep_days = 300\n"),
        ] {
            writer.wait_for_more(50);
            bench.write("receive.toml", "credit = 'much'\n");
            hang_up(receiver.process(), REFUSED);
            assert!(receiver.log().contains("receive.toml:1"), "{}", receiver.log());
            let connected = sender.log().matches("INFO connected").count();
            bench.write("receive.toml", text);
            hang_up(receiver.process(), TAKEN);
            wait_until("the sender is back", PATIENCE, || {
                sender.log().matches("INFO connected").count() > connected
            });
        }
    });
    TcpStream::connect(("127.0.0.1", former)).expect("metrics are served now");
    bench.wait_for_lines(2 * written);
    assert!(sender.stop().success());
    assert!(receiver.stop().success());
    bench.assert_lines(numbered("file", written).chain(numbered("datagram", written)));
}

/// Where a receiver listens and whom it dials, and whether a sender dials or listens.
#[test]
fn both_sides_take_changed_addresses_and_change_who_dials() {
    let bench = Bench::new();
    Certificates::make(&bench.path(""));
    bench.token("test");
    let mut mint = waybill();
    mint.args(["token", "central", "--tokens"]).arg(bench.path("receivers.toml"));
    bench.write("central.token", run(mint).ok().stdout);
    let [first, second, dialled] = [free_port(), free_port(), free_port()];
    let receive = |listen: u16, dial: &str| {
        let text = format!(
            "listen = '127.0.0.1:{listen}'\ntokens = 'tokens.toml'\n\
             [store]\nfile = 'store.sqlite'\n{dial}"
        );
        bench.write("receive.toml", text);
    };
    let dial = |ca: &str| {
        format!(
            "[[dial]]\nsender = 'test'\nurl = 'wss://localhost:{dialled}/'\n\
             token_file = 'central.token'\nca = '{ca}'\n"
        )
    };
    let send = |way: &str, tag: &str| {
        bench.write("send.toml", format!("state_dir = 'state'\n{way}\n{}", sources(tag)));
    };
    let to = |port: u16| format!("to = ['ws://127.0.0.1:{port}/']\ntoken_file = 'test.token'");
    let start = |side: &str| {
        let mut command = waybill();
        command.args([side, "--config"]).arg(bench.path(&format!("{side}.toml")));
        command.current_dir(bench.path(""));
        Process::start(side, command, bench.path(&format!("{side}.log")))
    };
    receive(first, "");
    let mut receiver = start("receive");
    receiver.wait_for_log(" listening");
    bench.write("app.log", "");
    send(&to(first), "t0");
    let mut sender = start("send");
    wait_until("the socket is there", PATIENCE, || bench.path("log.sock").exists());
    let written = Writer::beside(&bench, |writer| {
        let arrive = || {
            let now = writer.written.load(Ordering::Relaxed);
            bench.wait_for_lines(2 * now + 2);
        };
        arrive();
        receive(second, "");
        hang_up(&receiver, TAKEN);
        TcpStream::connect(("127.0.0.1", first)).expect_err("the former address is let go");
        sender.wait_for_log("does not answer");
        send(&to(second), "t0");
        hang_up(&sender, TAKEN);
        arrive();

        receive(second, &dial("ca.pem"));
        hang_up(&receiver, TAKEN);
        receiver.wait_for_log("does not answer");
        let listen = format!(
            "listen = '127.0.0.1:{dialled}'\ntls_cert = 'server.pem'\ntls_key = 'server.key'\n\
             tokens = 'receivers.toml'"
        );
        send(&listen, "t0");
        hang_up(&sender, TAKEN);
        let dialled = || receiver.log().matches(" dialled sender=").count();
        wait_until("it is dialled", PATIENCE, || dialled() == 1);
        arrive();

        // The connection stands, and the next one is made as before.
        let certificate = ["BEGIN", "END"].map(|word| format!("-----{word} CERTIFICATE-----"));
        bench.write("broken.pem", certificate.join("\nAAAA\n"));
        for ca in ["missing.pem", "broken.pem"] {
            receive(second, &dial(ca));
            hang_up(&receiver, REFUSED);
            assert!(receiver.log().contains(ca), "{}", receiver.log());
        }
        arrive();
        assert_eq!(dialled(), 1, "{}", receiver.log());
        send(&listen, "t1");
        hang_up(&sender, TAKEN);
        wait_until("it is dialled anew", PATIENCE, || dialled() == 2);
        arrive();
    });
    bench.wait_for_lines(2 * written);
    assert!(sender.stop().success());
    assert!(receiver.stop().success());
    bench.assert_lines(numbered("file", written).chain(numbered("datagram", written)));
}

/// Lines that were stored, and whose receipts the sender did not live to see, are sent again under their old row: a new
/// tag is for new lines.
#[test]
fn a_changed_tag_doubles_no_spooled_line_after_a_crash() {
    const LINES: usize = 20_000;
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("send.toml", sources("one"));
    let mut sender = start(&bench, &receiver);
    let socket = UnixDatagram::unbound().expect("a socket");
    for number in 0..LINES {
        socket
            .send_to(format!("datagram {number}").as_bytes(), bench.path("log.sock"))
            .expect("send");
    }
    let payloads = lines("datagram", LINES).len() - LINES;
    wait_until("everything is spooled", PATIENCE, || {
        bench.bytes_below("state/spool") >= (payloads + LINES * 18) as u64
    });
    // No position is saved, as if every receipt had come too late.
    std::fs::create_dir(bench.path("state/positions.new")).expect("a folder in the way");
    receiver.start();
    bench.wait_for_lines(LINES);
    sender.kill_hard();
    std::fs::remove_dir(bench.path("state/positions.new")).expect("remove");
    std::fs::remove_file(bench.path("log.sock")).expect("the dead socket's file");
    bench.write("send.toml", sources("two"));
    let mut sender = start(&bench, &receiver);
    socket.send_to(b"new", bench.path("log.sock")).expect("send");
    bench.wait_for_lines(LINES + 1);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("datagram", LINES).chain(["new".to_owned()]));
    let stored = bench.stored();
    let new = stored.iter().find(|line| line["message"] == "new").expect("the new line");
    assert_eq!(tag(new), "two");
}

/// A configuration that comes through a FIFO: whoever reads it is met on the way.
struct Fifo(PathBuf);

impl Fifo {
    fn new(path: PathBuf) -> Fifo {
        let fifo = Fifo(path);
        fifo.renew();
        fifo
    }

    /// Another one in its place: a reader of the former keeps that.
    fn renew(&self) {
        let new = self.0.with_extension("new");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &new, fifo, mode, 0).expect("mkfifo");
        fs::rename(&new, &self.0).expect("renamed");
    }

    /// Its writing end, once somebody waits for what it says.
    fn met(&self) -> File {
        let mut end = None;
        wait_until("the configuration is read", PATIENCE, || {
            let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
            end = File::options().write(true).custom_flags(nonblock).open(&self.0).ok();
            end.is_some()
        });
        end.expect("open")
    }
}

/// Both sides catch signals before they do anything else.
#[test]
fn a_signal_while_the_first_configuration_is_read_is_heeded() {
    let bench = Bench::new();
    bench.token("test");
    let send = "to = ['ws://127.0.0.1:1/']\ntoken_file = 'test.token'\nstate_dir = 'state'\n\
                [[source]]\nfiles = 'app.log'\n";
    let receive = "listen = '127.0.0.1:0'\ntokens = 'tokens.toml'\n\
                   [store]\nfile = 'store.sqlite'\n";
    for (side, text) in [("send", send), ("receive", receive)] {
        let fifo = Fifo::new(bench.path(&format!("{side}.toml")));
        let start = || {
            let mut command = waybill();
            command.args([side, "--config"]).arg(&fifo.0).current_dir(bench.path(""));
            Process::start(side, command, bench.path(&format!("{side}.log")))
        };
        let tell = |mut end: File| {
            fifo.renew();
            end.write_all(text.as_bytes()).expect("the configuration is taken");
        };
        let mut hung_up = start();
        let end = fifo.met();
        hung_up.signal("-HUP");
        tell(end);
        tell(fifo.met());
        hung_up.wait_for_log("the configuration has not changed");
        assert!(hung_up.stop().success(), "{}", hung_up.log());

        let mut stopped = start();
        let end = fifo.met();
        stopped.signal("-TERM");
        tell(end);
        assert!(stopped.wait().success(), "{}", stopped.log());
    }
}
