//! What of the process's surroundings decides a default: one value, so that tests can set it.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;

/// Where the service keeps its state.
const SYSTEM_STATE: &str = "/var/lib/waybill";

/// The surroundings of a process.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `$STATE_DIRECTORY`, which systemd sets; a colon separates several.
    pub state_directory: Option<OsString>,
    /// `$XDG_STATE_HOME`.
    pub xdg_state_home: Option<OsString>,
    /// `$HOME`.
    pub home: Option<OsString>,
    /// `$HTTPS_PROXY` or `$https_proxy`; may hold a password.
    pub https_proxy: Option<String>,
    /// `$HTTP_PROXY` or `$http_proxy`.
    pub http_proxy: Option<String>,
    /// `$ALL_PROXY` or `$all_proxy`.
    pub all_proxy: Option<String>,
    /// `$NO_PROXY` or `$no_proxy`.
    pub no_proxy: Option<String>,
    /// The effective user is root, or the one to whom `/var/lib/waybill` belongs.
    pub is_system: bool,
    /// Where relative paths of the command line start.
    pub current_dir: PathBuf,
    /// The machine's time zone, an IANA name, where it can be told.
    pub timezone: Option<String>,
    /// Standard output is a terminal.
    pub stdout_is_terminal: bool,
    /// Standard error is a terminal.
    pub stderr_is_terminal: bool,
}

impl Environment {
    /// This process's own.
    pub fn of_process() -> Environment {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let either = |upper: &str, lower: &str| {
            set(upper).or_else(|| set(lower)).and_then(|value| value.into_string().ok())
        };
        Environment {
            https_proxy: either("HTTPS_PROXY", "https_proxy"),
            http_proxy: either("HTTP_PROXY", "http_proxy"),
            all_proxy: either("ALL_PROXY", "all_proxy"),
            no_proxy: either("NO_PROXY", "no_proxy"),
            state_directory: set("STATE_DIRECTORY"),
            xdg_state_home: set("XDG_STATE_HOME"),
            home: set("HOME"),
            is_system: is_system(),
            current_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            timezone: TimeZone::system().iana_name().map(str::to_owned),
            stdout_is_terminal: std::io::stdout().is_terminal(),
            stderr_is_terminal: std::io::stderr().is_terminal(),
        }
    }

    /// Where state lies unless it is configured: `$STATE_DIRECTORY`, else `/var/lib/waybill` for
    /// root and for its owner, else `$XDG_STATE_HOME/waybill`, else `~/.local/state/waybill`. `None`
    /// where a user has neither.
    pub fn default_state_dir(&self) -> Option<PathBuf> {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        if let Some(list) = &self.state_directory {
            let first = list.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
            let first = PathBuf::from(OsString::from_vec(first.to_vec()));
            if first.is_absolute() {
                return Some(first);
            }
        }
        if self.is_system {
            return Some(PathBuf::from(SYSTEM_STATE));
        }
        // The XDG specification says that a relative path there is to be ignored.
        let xdg = self.xdg_state_home.as_ref().map(Path::new).filter(|path| path.is_absolute());
        let home = self.home.as_ref().map(Path::new).filter(|path| path.is_absolute());
        xdg.map(Path::to_owned)
            .or_else(|| home.map(|home| home.join(".local/state")))
            .map(|base| base.join("waybill"))
    }
}

fn is_system() -> bool {
    let user = rustix::process::geteuid();
    user.is_root()
        || std::fs::metadata(SYSTEM_STATE).is_ok_and(|folder| folder.uid() == user.as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_directory_follows_the_documented_order() {
        let mut env = Environment {
            state_directory: Some("/srv/state:/srv/other".into()),
            xdg_state_home: Some("/xdg".into()),
            home: Some("/home/me".into()),
            is_system: true,
            ..Environment::default()
        };
        assert_eq!(env.default_state_dir(), Some(PathBuf::from("/srv/state")));
        env.state_directory = None;
        assert_eq!(env.default_state_dir(), Some(PathBuf::from("/var/lib/waybill")));
        env.is_system = false;
        assert_eq!(env.default_state_dir(), Some(PathBuf::from("/xdg/waybill")));
        env.xdg_state_home = Some("relative".into());
        assert_eq!(env.default_state_dir(), Some(PathBuf::from("/home/me/.local/state/waybill")));
        env.home = None;
        assert_eq!(env.default_state_dir(), None);
    }
}
