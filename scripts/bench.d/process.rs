//! Programs that are measured: started, awaited, ended, and what they took.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

/// How long a program may take to say or to do what is waited for.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a program took from its start to its end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time, in seconds.
    pub cpu: f64,
    /// Peak resident memory, in MB.
    pub peak: f64,
}

/// A running program. It is killed when dropped.
pub struct Process {
    child: Option<Child>,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts a program whose standard error goes to `log`.
    pub fn start(
        program: impl AsRef<OsStr>,
        arguments: &[&str],
        log: &Path,
        stdin: Stdio,
    ) -> anyhow::Result<Process> {
        Process::begin(program.as_ref(), arguments, log, stdin, Stdio::null())
    }

    /// Starts a program that prints its port first.
    pub fn serve(
        program: impl AsRef<OsStr>,
        arguments: &[&str],
        log: &Path,
    ) -> anyhow::Result<(Process, u16)> {
        let stdout = Stdio::piped();
        let mut process = Process::begin(program.as_ref(), arguments, log, Stdio::null(), stdout)?;
        let stdout: ChildStdout =
            process.child.as_mut().and_then(|child| child.stdout.take()).context("a pipe")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let port = line.trim().parse();
        let port = port.with_context(|| format!("{} gave no port", process.name))?;
        Ok((process, port))
    }

    fn begin(
        program: &OsStr,
        arguments: &[&str],
        log: &Path,
        stdin: Stdio,
        stdout: Stdio,
    ) -> anyhow::Result<Process> {
        let name = Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned();
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only one system call is made, which allocates nothing.
        unsafe { command.pre_exec(die_with_parent) };
        let child = command
            .args(arguments)
            .env_remove("WAYBILL_TOKEN_FILE")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Process { child: Some(child), name, log: log.to_owned() })
    }

    /// Waits until the log has a line with this text, and gives the rest of that line.
    pub fn said(&mut self, text: &str) -> anyhow::Result<String> {
        until(|| {
            let log = std::fs::read_to_string(&self.log)?;
            if let Some((_, rest)) = log.split_once(text)
                && let Some((line, _)) = rest.split_once('\n')
            {
                return Ok(Some(line.to_owned()));
            }
            let child = self.child.as_mut().context("it runs")?;
            ensure!(child.try_wait()?.is_none(), "{} ended:\n{log}", self.name);
            Ok(None)
        })
    }

    /// Waits for its end, which must be a success.
    pub fn wait(mut self) -> anyhow::Result<Usage> {
        let (status, usage) = self.reap()?;
        if !status.success() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!("{}: {status}:\n{log}", self.name);
        }
        Ok(usage)
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(mut self) -> anyhow::Result<Usage> {
        self.signal(libc::SIGTERM);
        Ok(self.reap()?.1)
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        if self.child.is_some() {
            // What a killed program took is of no interest.
            let _ = self.reap();
        }
    }

    fn signal(&self, signal: libc::c_int) {
        if let Some(child) = &self.child {
            // SAFETY: a plain system call; the child is not reaped, so the id is still its own.
            unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        }
    }

    fn reap(&mut self) -> anyhow::Result<(ExitStatus, Usage)> {
        let id = self.child.as_ref().context("reaped once")?.id() as libc::pid_t;
        let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
        // SAFETY: both pointers are to live values of the types that wait4 fills.
        let reaped = unsafe { libc::wait4(id, &raw mut status, 0, usage.as_mut_ptr()) };
        ensure!(reaped == id, "{}: {}", self.name, std::io::Error::last_os_error());
        self.child = None;
        // SAFETY: all-zero bytes are a valid rusage, and wait4 has filled it.
        let usage = unsafe { usage.assume_init() };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
        let cpu = seconds(usage.ru_utime) + seconds(usage.ru_stime);
        // Linux counts in KiB.
        let peak = usage.ru_maxrss as f64 * 1024.0 / 1e6;
        Ok((ExitStatus::from_raw(status), Usage { cpu, peak }))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A bench that is killed leaves no programs behind.
fn die_with_parent() -> std::io::Result<()> {
    // SAFETY: a plain system call on the calling process.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Asks every few milliseconds until there is an answer.
pub fn until<T>(mut ask: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(start.elapsed() < PATIENCE, "nothing happened for {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
