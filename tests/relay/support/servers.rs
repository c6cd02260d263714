//! Real servers for the tests: Elasticsearch and OpenSearch, nginx, syslog-ng.
//!
//! Each is killed when its value is dropped, and also when the test program dies. A program that is missing is a
//! visible skip: `start` answers `None` and the test returns. Nothing here waits a fixed time for a condition.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

// --- Skips, ports, conditions, processes ---------------------------------------------------------------------------

/// Says that this test could not run. `scripts/test` counts the lines in the file that the variable names.
pub fn skip(reason: &str) {
    let line = format!("SKIPPED: {}\n", reason.trim().replace('\n', " "));
    print!("{line}");
    if let Some(file) = std::env::var_os("WAYBILL_TEST_SKIPPED") {
        // One write of a short line in append mode: lines of parallel tests do not mix.
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&file)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        written.unwrap_or_else(|error| panic!("cannot note a skip in {}: {error}", file.display()));
    }
}

/// Whether only those tests are asked for that need no other program (`scripts/test --quick`).
/// Every `start` here answers `None` then; they are left out on purpose, so they count as skipped all the same.
pub fn quick() -> bool {
    std::env::var_os("WAYBILL_TEST_QUICK").is_some_and(|value| !value.is_empty())
}

/// A TCP port on 127.0.0.1 that nobody listens on and that this program has not handed out before.
///
/// It lies below the ephemeral range: a client that dials a dead port of that range again and again may be given it as
/// its own source port and meet itself, and outgoing connections of others could take it before a restart.
pub fn free_port() -> u16 {
    const LOW: u32 = 10_000;
    const SIZE: u32 = 10_000;
    static NEXT: OnceLock<AtomicU32> = OnceLock::new();
    // Several test programs may run at once; each starts somewhere else.
    let next = NEXT.get_or_init(|| AtomicU32::new(std::process::id().wrapping_mul(7919)));
    for _ in 0..SIZE {
        let port = LOW + next.fetch_add(1, Ordering::Relaxed) % SIZE;
        let port = u16::try_from(port).expect("the range ends below 65536");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {LOW} and {}", LOW + SIZE);
}

/// Polls a condition; panics with `what` when it does not come true in time.
#[track_caller]
pub fn wait_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {timeout:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Starts a program that receives SIGTERM when this test program dies, by whatever means.
///
/// The kernel sends that signal when the *thread* that forked ends, and a test's thread ends with its test. Therefore
/// one thread that never ends does all the forking.
pub fn spawn_bound(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::SyncSender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::sync_channel::<Job>(16);
        thread::spawn(move || {
            for (mut command, answer) in queue {
                let parent = std::process::id();
                // SAFETY: between fork and exec the closure calls prctl, getppid and _exit only, which are
                // async-signal-safe, and allocates nothing.
                unsafe {
                    command.pre_exec(move || {
                        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                        // The parent may have died before the call above.
                        if u32::try_from(libc::getppid()) != Ok(parent) {
                            libc::_exit(1);
                        }
                        Ok(())
                    });
                }
                // A test that gave up does not wait for the answer.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (answer, child) = mpsc::sync_channel(1);
    spawner
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .send((command, answer))
        .expect("the spawning thread never ends");
    child.recv().expect("the spawning thread answers each job")
}

/// Whether a program is on the PATH; the skip is noted where it is not.
pub fn have(program: &str, package: &str) -> bool {
    if quick() {
        skip(&format!("{program}: left out by --quick"));
        return false;
    }
    let found = search_path().into_iter().any(|folder| folder.join(program).is_file());
    if !found {
        skip(&format!("{program} is missing; install it: apt-get install {package}"));
    }
    found
}

/// Where a file of a Debian package lies: `/`, else the folder into which `scripts/test` unpacked it. The skip is noted
/// where it is in neither.
pub fn unpacked(name: &str, file: &str) -> Option<PathBuf> {
    let places = [PathBuf::from("/"), cache().join(name)];
    let found = places.into_iter().find(|root| root.join(file).is_file()).filter(|_| !quick());
    if found.is_none() {
        skip(&format!("{name} is missing; scripts/test fetches it"));
    }
    found
}

/// The PATH with the folders of daemons, which an ordinary user's lacks.
fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    folders
}

/// A program that may lie where an ordinary user's PATH does not lead.
pub fn daemon(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("PATH", std::env::join_paths(search_path()).expect("folders of a PATH hold no colon"));
    command
}

fn signal(pid: u32, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("a process id fits");
    // SAFETY: kill has no memory effects; the pid is that of a process we started.
    unsafe {
        libc::kill(pid, signal);
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The root of the repository, where `scripts`, `nginx` and `syslog-ng` lie.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where programs are kept that are fetched for the tests.
pub fn cache() -> PathBuf {
    std::env::var_os("WAYBILL_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || Path::new(&std::env::var_os("HOME").unwrap_or("/root".into())).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("waybill")
    })
}

// --- HTTP ------------------------------------------------------------------------------------------------------------

/// One HTTP/1.1 request over a connection of its own; `host_port` is `127.0.0.1:9200`.
pub fn http(
    host_port: &str,
    method: &str,
    path: &str,
    content_type: &str,
    body: &[u8],
) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(host_port)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    stream.set_write_timeout(Some(Duration::from_secs(120)))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host_port}\r\nconnection: close\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    // A server that refuses a body early closes; its answer is still to be read.
    let sent = stream.write_all(body);
    let mut answer = Vec::new();
    let mut piece = vec![0; 64 * 1024];
    // Elasticsearch 9 answers 413 and leaves the connection open, whatever the request said: the end is not waited for.
    while !is_whole(&answer) {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&piece[..length]),
            // A reset after an early answer, because not all of the body was read.
            Err(_) if !answer.is_empty() => break,
            Err(error) => return Err(sent.err().unwrap_or(error)),
        }
    }
    parse_answer(&answer).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "the answer is no whole HTTP response")
    })
}

/// Whether all that the head announces is there; without a length, only the end of the connection tells.
fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = memchr::memmem::find(answer, b"\r\n\r\n") else {
        return false;
    };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let body = &answer[end + 4..];
    match head.lines().find_map(|line| line.strip_prefix("content-length:")) {
        Some(length) => length.trim().parse().is_ok_and(|length| body.len() >= length),
        None => {
            head.contains("transfer-encoding: chunked")
                && body.ends_with(b"0\r\n\r\n")
                && unchunk(body).is_some()
        }
    }
}

fn parse_answer(answer: &[u8]) -> Option<(u16, String)> {
    let end = memchr::memmem::find(answer, b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?.to_ascii_lowercase();
    let body = &answer[end + 4..];
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).map(str::trim);
    let chunked =
        head.lines().any(|line| line.starts_with("transfer-encoding:") && line.contains("chunked"));
    let body = match length {
        _ if chunked => unchunk(body)?,
        // A cut answer must not pass for a whole one.
        Some(length) => body.get(..length.parse().ok()?)?.to_vec(),
        None => body.to_vec(),
    };
    Some((status, String::from_utf8_lossy(&body).into_owned()))
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = memchr::memmem::find(rest, b"\r\n")?;
        let size = std::str::from_utf8(&rest[..line]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}

// --- Elasticsearch ---------------------------------------------------------------------------------------------------

/// A real Elasticsearch or OpenSearch node, started by `scripts/elasticsearch`.
pub struct Elasticsearch {
    version: String,
    host_port: String,
    /// `None` for a server that is not ours (`WAYBILL_TEST_ELASTICSEARCH`).
    folder: Option<TempDir>,
}

impl Elasticsearch {
    /// Starts a node of its own: `7.17`, `8.17`, `9.2`, `opensearch-2.19` or `opensearch-3.8`.
    pub fn start(version: &str) -> Option<Elasticsearch> {
        Self::start_with(version, &[])
    }

    /// The same with further options of `scripts/elasticsearch start`, such as `--http-max-content-length`.
    pub fn start_with(version: &str, options: &[&str]) -> Option<Elasticsearch> {
        if quick() {
            skip(&format!("Elasticsearch {version}: left out by --quick"));
            return None;
        }
        let folder = tempfile::Builder::new()
            .prefix("waybill-elasticsearch-")
            .tempdir()
            .expect("a temporary folder can be made");
        let url = run_start(version, folder.path(), options)?;
        Some(Elasticsearch {
            version: version.to_owned(),
            host_port: host_port(&url),
            folder: Some(folder),
        })
    }

    /// The node that most tests share; each uses index names of its own. `None` where it cannot run, noted once per
    /// test that asks.
    pub fn shared_8_17() -> Option<&'static Elasticsearch> {
        static SHARED: OnceLock<Option<Elasticsearch>> = OnceLock::new();
        let mut first = false;
        let shared = SHARED.get_or_init(|| {
            first = true;
            match std::env::var("WAYBILL_TEST_ELASTICSEARCH") {
                Ok(url) if !url.is_empty() && !quick() => Some(Elasticsearch {
                    version: "WAYBILL_TEST_ELASTICSEARCH".to_owned(),
                    host_port: host_port(&url),
                    folder: None,
                }),
                // A static is never dropped; the script's `--die-with` ends the node and removes its folder.
                _ => Elasticsearch::start("8.17"),
            }
        });
        if shared.is_none() && !first {
            skip("Elasticsearch 8.17 cannot run, as said before");
        }
        shared.as_ref()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.host_port)
    }

    /// `127.0.0.1:PORT`, for a proxy in front.
    pub fn host_port(&self) -> &str {
        &self.host_port
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    /// SIGKILL: what the node had acknowledged must come back with `restart`.
    pub fn kill_hard(&self) {
        self.signal(libc::SIGKILL);
        // The port is refused only once the process is gone.
        wait_until("the killed node to be gone", Duration::from_secs(30), || {
            TcpStream::connect(&self.host_port).is_err()
        });
    }

    /// Starts the killed node again: same folder, same port. Returns when it answers.
    pub fn restart(&self) {
        let port = self.host_port.rsplit(':').next().expect("host:port").to_owned();
        run_start(&self.version, self.own_folder(), &["--port", &port])
            .expect("what started before has everything that it needs");
    }

    /// SIGSTOP: connections are accepted by the kernel and nothing answers.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    /// The end of the node's log.
    pub fn log(&self) -> String {
        self.folder.as_ref().map_or_else(String::new, |folder| {
            tail(&read_lossy(&folder.path().join("node.log")), 100)
        })
    }

    /// One request with a JSON body (`Value::Null` for none). The answer is `Null` where it is no JSON.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        self.request_bytes(method, path, "application/json", &body)
    }

    /// `_bulk` with lines that are ready, the last one ended by a newline.
    #[track_caller]
    pub fn bulk(&self, lines: &str) -> (u16, Value) {
        self.request_bytes("POST", "/_bulk", "application/x-ndjson", lines.as_bytes())
    }

    #[track_caller]
    fn request_bytes(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> (u16, Value) {
        let (status, text) = http(&self.host_port, method, path, content_type, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}\n{}", self.log()));
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// How many documents the indices that match hold, after a refresh. No index is no documents.
    #[track_caller]
    pub fn count(&self, pattern: &str) -> u64 {
        let (status, _) = self.request("POST", &format!("/{pattern}/_refresh"), &Value::Null);
        if status == 404 {
            return 0;
        }
        let mut count = None;
        wait_until(&format!("all shards of {pattern} answer"), Duration::from_secs(120), || {
            // A shard that is about to start answers 503: that is no number.
            let (status, answer) = self.request("GET", &format!("/{pattern}/_count"), &Value::Null);
            let whole = status == 200 && answer["_shards"]["failed"] == 0;
            count = if whole { answer["count"].as_u64() } else { None };
            count.is_some()
        });
        count.expect("the condition came true")
    }

    /// The ids of all documents, sorted. Ids repeat where several indices hold them.
    #[track_caller]
    pub fn all_ids(&self, pattern: &str) -> Vec<String> {
        let mut ids = Vec::new();
        self.scroll(pattern, false, |hit| {
            ids.push(hit["_id"].as_str().expect("an id is text").to_owned())
        });
        ids.sort();
        ids
    }

    /// All documents, `_source` by id.
    #[track_caller]
    pub fn all_documents(&self, pattern: &str) -> BTreeMap<String, Value> {
        let mut documents = BTreeMap::new();
        self.scroll(pattern, true, |mut hit| {
            let id = hit["_id"].as_str().expect("an id is text").to_owned();
            let twice = documents.insert(id, hit["_source"].take());
            assert!(twice.is_none(), "the id {} stands in two indices of {pattern}", hit["_id"]);
        });
        documents
    }

    /// The scroll API is the one that all five servers share and that needs no sortable id.
    #[track_caller]
    fn scroll(&self, pattern: &str, source: bool, mut each: impl FnMut(Value)) {
        let (status, _) = self.request("POST", &format!("/{pattern}/_refresh"), &Value::Null);
        if status == 404 {
            return;
        }
        let query = json!({"sort": ["_doc"], "_source": source, "size": 10_000});
        let (mut status, mut page) =
            self.request("POST", &format!("/{pattern}/_search?scroll=2m"), &query);
        loop {
            assert_eq!(status, 200, "reading {pattern}: {page}");
            assert_eq!(
                page["_shards"]["failed"], 0,
                "reading {pattern} missed shards: {}",
                page["_shards"]
            );
            let Value::Array(hits) = page["hits"]["hits"].take() else {
                panic!("no hits in the answer: {page}")
            };
            let cursor = json!({"scroll_id": page["_scroll_id"]});
            if hits.is_empty() {
                self.request("DELETE", "/_search/scroll", &cursor);
                return;
            }
            hits.into_iter().for_each(&mut each);
            let mut next = cursor;
            next["scroll"] = json!("2m");
            (status, page) = self.request("POST", "/_search/scroll", &next);
        }
    }

    fn own_folder(&self) -> &Path {
        let folder = self
            .folder
            .as_ref()
            .expect("only a node that the tests started can be stopped and started");
        folder.path()
    }

    fn signal(&self, number: libc::c_int) {
        let file = self.own_folder().join("pid");
        let pid = read_lossy(&file).trim().parse().expect("the script leaves the process id");
        signal(pid, number);
    }
}

impl Drop for Elasticsearch {
    fn drop(&mut self) {
        if self.folder.is_some() {
            if thread::panicking() {
                eprintln!("--- the log of Elasticsearch {}:\n{}", self.version, self.log());
            }
            // Killed already, perhaps: then nobody has this process id and the folder names one that is gone.
            if TcpStream::connect(&self.host_port).is_ok() {
                self.signal(libc::SIGKILL);
                wait_until("the node to be gone", Duration::from_secs(30), || {
                    TcpStream::connect(&self.host_port).is_err()
                });
            }
        }
    }
}

fn host_port(url: &str) -> String {
    url.trim().trim_start_matches("http://").trim_end_matches('/').to_owned()
}

/// Runs the script; its URL, or `None` and a noted skip where a program or a JDK is missing.
fn run_start(version: &str, folder: &Path, options: &[&str]) -> Option<String> {
    let script = root().join("scripts/elasticsearch");
    let output = Command::new(&script)
        .args([
            "start",
            version,
            "--die-with",
            &std::process::id().to_string(),
            "--remove",
            "--dir",
        ])
        .arg(folder)
        .args(options)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {}: {error}", script.display()));
    let messages = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Some(77) => {
            // The reason is the last that the script says; before it stands how far it came.
            let reason =
                messages.rfind("scripts/elasticsearch: ").map_or(&*messages, |at| &messages[at..]);
            skip(reason);
            None
        }
        _ => {
            panic!("scripts/elasticsearch start {version} failed ({}):\n{messages}", output.status)
        }
    }
}

// --- nginx -----------------------------------------------------------------------------------------------------------

/// Debian's nginx with a configuration of the test's own.
pub struct Nginx {
    process: Daemon,
    configuration: PathBuf,
}

impl Nginx {
    /// `text` is a whole configuration (`events {}`, `http { … }`) without `pid`, `daemon` and a main `error_log`.
    /// Relative paths in it lie in `folder()`. Returns once the daemon has bound its sockets.
    pub fn start(text: &str) -> Option<Nginx> {
        Self::start_in(tempfile::tempdir().expect("a temporary folder can be made"), text)
    }

    /// The same in a folder that holds certificates, sockets or password files already.
    pub fn start_in(folder: TempDir, text: &str) -> Option<Nginx> {
        if !have("nginx", "nginx") {
            return None;
        }
        let configuration = folder.path().join("nginx.conf");
        write_nginx(&configuration, text);
        // Checked first, so that a mistake is shown as nginx explains it.
        let (status, said) = run_nginx(folder.path(), &["-t"]);
        assert!(status.success(), "nginx refuses the configuration:\n{said}");
        let mut command = nginx_command(folder.path());
        command.args(["-g", "daemon off;"]);
        let process = Daemon::start("nginx", folder, command);
        let pid = process.folder().join("nginx.pid");
        let nginx = Nginx { process, configuration };
        nginx.process.wait_for(
            "nginx to write its pid file, which it does once its sockets are bound",
            || !read_lossy(&pid).is_empty() && !nginx.workers().is_empty(),
        );
        Some(nginx)
    }

    /// Checks a configuration as `start` would read it; what nginx said, where it refuses it.
    pub fn check(folder: &Path, text: &str) -> Option<Result<(), String>> {
        if !have("nginx", "nginx") {
            return None;
        }
        write_nginx(&folder.join("nginx.conf"), text);
        let (status, said) = run_nginx(folder, &["-t"]);
        Some(if status.success() { Ok(()) } else { Err(said) })
    }

    /// Replaces the configuration and reloads; returns once no worker of the old one takes connections.
    pub fn reload(&self, text: &str) {
        write_nginx(&self.configuration, text);
        let (status, said) = run_nginx(self.folder(), &["-t"]);
        assert!(status.success(), "nginx refuses the configuration:\n{said}");
        let before = self.workers();
        signal(self.process.pid(), libc::SIGHUP);
        self.process.wait_for("nginx to replace its workers", || {
            let now = self.workers();
            !now.is_empty() && now.iter().all(|worker| !before.contains(worker))
        });
    }

    /// The files that the configuration names by relative paths, and the logs.
    pub fn folder(&self) -> &Path {
        self.process.folder()
    }

    /// The main error log.
    pub fn log(&self) -> String {
        read_lossy(&self.folder().join("error.log"))
    }

    /// SIGQUIT: lets requests end; WebSockets may hold it up, so it becomes SIGTERM after two seconds.
    pub fn stop(&mut self) {
        self.process.stop(&[(libc::SIGQUIT, 2), (libc::SIGTERM, 5)]);
    }

    /// SIGKILL, workers first: they would go on serving without their master.
    pub fn kill_hard(&mut self) {
        signal(self.process.pid(), libc::SIGSTOP);
        for worker in self.workers() {
            signal(worker, libc::SIGKILL);
        }
        self.process.stop(&[(libc::SIGKILL, 10)]);
    }

    /// Starts it again after `stop` or `kill_hard`.
    pub fn restart(&mut self) {
        let pid = self.folder().join("nginx.pid");
        let _ = fs::remove_file(&pid);
        let mut command = nginx_command(self.folder());
        command.args(["-g", "daemon off;"]);
        self.process.restart(command);
        self.process.wait_for("nginx to write its pid file", || !read_lossy(&pid).is_empty());
    }

    /// Workers that take connections: those that shut down have that in their title.
    fn workers(&self) -> Vec<u32> {
        let pid = self.process.pid();
        children(pid)
            .into_iter()
            .filter(|child| {
                read_lossy(&PathBuf::from(format!("/proc/{child}/cmdline")))
                    .starts_with("nginx: worker process")
            })
            .filter(|child| {
                !read_lossy(&PathBuf::from(format!("/proc/{child}/cmdline")))
                    .contains("shutting down")
            })
            .collect()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if self.process.child.is_some() {
            self.kill_hard();
        }
    }
}

/// Every path that Debian's build would take from /var lies in the folder.
fn write_nginx(file: &Path, text: &str) {
    let mut whole = String::from("pid nginx.pid;\nerror_log error.log info;\n");
    // Workers of a root master run as nobody, who may not enter a temporary folder.
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } == 0 && !text.contains("\nuser ") {
        whole.push_str("user root;\n");
    }
    whole.push_str(text);
    // Only what the text leaves open: nginx refuses a directive given twice.
    let folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .into_iter()
        .filter(|name| !text.contains(&format!("{name}_temp_path")))
        .map(|name| format!("\n  {name}_temp_path {name}_temp;"))
        .collect::<String>();
    whole = whole.replacen("http {", &format!("http {{{folders}"), 1);
    fs::write(file, whole).expect("a configuration can be written");
}

fn nginx_command(folder: &Path) -> Command {
    let mut command = daemon("nginx");
    // Relative paths in a configuration are relative to the prefix.
    command.arg("-p").arg(folder).args(["-e", "error.log", "-c", "nginx.conf"]);
    command
}

fn run_nginx(folder: &Path, arguments: &[&str]) -> (ExitStatus, String) {
    let output = nginx_command(folder)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("nginx was found on the PATH");
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

fn children(pid: u32) -> Vec<u32> {
    read_lossy(&PathBuf::from(format!("/proc/{pid}/task/{pid}/children")))
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}

// --- syslog-ng -------------------------------------------------------------------------------------------------------

/// Debian's syslog-ng with a configuration of the test's own.
pub struct SyslogNg {
    process: Daemon,
    configuration: PathBuf,
}

impl SyslogNg {
    /// `text` is a whole configuration with its `@version`; `@FOLDER@` in it stands for `folder()`. Returns once the
    /// daemon answers on its control socket, which it does once its sources are open.
    pub fn start(text: &str) -> Option<SyslogNg> {
        Self::start_in(tempfile::tempdir().expect("a temporary folder can be made"), text)
    }

    pub fn start_in(folder: TempDir, text: &str) -> Option<SyslogNg> {
        if !have("syslog-ng", "syslog-ng-core") {
            return None;
        }
        if let Err(said) = check_syslog_ng(folder.path(), text) {
            panic!("syslog-ng refuses the configuration:\n{said}");
        }
        let configuration = folder.path().join("syslog-ng.conf");
        let command = syslog_ng_command(folder.path());
        let process = Daemon::start("syslog-ng", folder, command);
        let syslog_ng = SyslogNg { process, configuration };
        syslog_ng.wait_for_control();
        Some(syslog_ng)
    }

    /// Checks a configuration as `start` would read it; what syslog-ng said, where it refuses it.
    pub fn check(folder: &Path, text: &str) -> Option<Result<(), String>> {
        have("syslog-ng", "syslog-ng-core").then(|| check_syslog_ng(folder, text))
    }

    /// The same with no modules but those in this folder.
    pub fn check_with_modules(
        folder: &Path,
        text: &str,
        modules: &Path,
    ) -> Option<Result<(), String>> {
        let option = format!("--module-path={}", modules.display());
        let check = || check_syslog_ng_with(folder, text, &[&option]);
        have("syslog-ng", "syslog-ng-core").then(check)
    }

    /// Replaces the configuration and reloads; returns once the new one is in force.
    pub fn reload(&self, text: &str) {
        if let Err(said) = check_syslog_ng(self.folder(), text) {
            panic!("syslog-ng refuses the configuration:\n{said}");
        }
        fs::write(&self.configuration, text.replace("@FOLDER@", &self.folder().to_string_lossy()))
            .expect("a configuration can be written");
        // The answer comes after the reload, unlike that of SIGHUP.
        let (status, said) = self.control("reload");
        assert!(status.success(), "syslog-ng-ctl reload: {said}");
    }

    /// A command of syslog-ng-ctl, such as `stats` or `reopen`.
    pub fn control(&self, command: &str) -> (ExitStatus, String) {
        let output = daemon("syslog-ng-ctl")
            .arg(command)
            .arg(format!("--control={}", self.folder().join("syslog-ng.ctl").display()))
            .stdin(Stdio::null())
            .output()
            .expect("syslog-ng-ctl comes with syslog-ng");
        let said = [output.stdout, output.stderr].concat();
        (output.status, String::from_utf8_lossy(&said).into_owned())
    }

    pub fn folder(&self) -> &Path {
        self.process.folder()
    }

    /// What the daemon wrote to its standard error.
    pub fn log(&self) -> String {
        self.process.output()
    }

    pub fn stop(&mut self) {
        self.process.stop(&[(libc::SIGTERM, 10)]);
    }

    pub fn kill_hard(&mut self) {
        self.process.stop(&[(libc::SIGKILL, 10)]);
    }

    /// Starts it again after `stop` or `kill_hard`, with its persistent state.
    pub fn restart(&mut self) {
        let _ = fs::remove_file(self.folder().join("syslog-ng.ctl"));
        let command = syslog_ng_command(self.folder());
        self.process.restart(command);
        self.wait_for_control();
    }

    fn wait_for_control(&self) {
        self.process.wait_for("syslog-ng to answer on its control socket", || {
            self.control("stats").0.success()
        });
    }
}

fn check_syslog_ng(folder: &Path, text: &str) -> Result<(), String> {
    check_syslog_ng_with(folder, text, &[])
}

fn check_syslog_ng_with(folder: &Path, text: &str, arguments: &[&str]) -> Result<(), String> {
    let file = folder.join("syslog-ng.conf");
    fs::write(&file, text.replace("@FOLDER@", &folder.to_string_lossy()))
        .expect("a configuration can be written");
    let output = syslog_ng_command(folder)
        .arg("--syntax-only")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("syslog-ng was found on the PATH");
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn syslog_ng_command(folder: &Path) -> Command {
    let mut command = daemon("syslog-ng");
    command
        .args(["-F", "--no-caps", "--stderr"])
        .arg("-f")
        .arg(folder.join("syslog-ng.conf"))
        .arg("-R")
        .arg(folder.join("syslog-ng.persist"))
        .arg("-p")
        .arg(folder.join("syslog-ng.pid"))
        .arg("-c")
        .arg(folder.join("syslog-ng.ctl"));
    command
}

// --- Daemons ---------------------------------------------------------------------------------------------------------

/// A process in the foreground with a folder of its own; its output goes to a file there.
struct Daemon {
    name: &'static str,
    folder: TempDir,
    child: Option<Mutex<Child>>,
}

impl Daemon {
    fn start(name: &'static str, folder: TempDir, command: Command) -> Daemon {
        let mut daemon = Daemon { name, folder, child: None };
        daemon.restart(command);
        daemon
    }

    fn restart(&mut self, mut command: Command) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let output = self.folder.path().join("output.log");
        let output =
            File::options().create(true).append(true).open(output).expect("a log can be written");
        command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a descriptor can be doubled"))
            .stderr(output);
        let child = spawn_bound(command)
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.name));
        self.child = Some(Mutex::new(child));
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn output(&self) -> String {
        read_lossy(&self.folder.path().join("output.log"))
    }

    fn pid(&self) -> u32 {
        let child = self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name));
        child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).id()
    }

    fn ended(&self) -> Option<ExitStatus> {
        let child = self.child.as_ref()?;
        child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .try_wait()
            .expect("a child can be waited for")
    }

    #[track_caller]
    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        wait_until(what, Duration::from_secs(30), || {
            if let Some(status) = self.ended() {
                panic!(
                    "{} ended ({status}) while the test waited for {what}:\n{}",
                    self.name,
                    self.output()
                );
            }
            condition()
        });
    }

    /// Sends each signal and waits so many seconds for it to work; SIGKILL in the end.
    fn stop(&mut self, signals: &[(libc::c_int, u64)]) {
        let Some(child) = self.child.take() else {
            return;
        };
        let mut child = child.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        for &(number, seconds) in signals {
            signal(child.id(), number);
            let deadline = Instant::now() + Duration::from_secs(seconds);
            while Instant::now() < deadline {
                if child.try_wait().expect("a child can be waited for").is_some() {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop(&[(libc::SIGKILL, 10)]);
        if thread::panicking() {
            eprintln!("--- the output of {}:\n{}", self.name, tail(&self.output(), 100));
            let log = self.folder.path().join("error.log");
            if log.exists() {
                eprintln!("--- the error log of {}:\n{}", self.name, tail(&read_lossy(&log), 100));
            }
        }
    }
}
