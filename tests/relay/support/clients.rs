//! WebSocket clients that are not ours, in the tests' cache: Python's `websockets` and Node's `ws`.
//!
//! They are installed at their first use, each in a folder that is named for its version. A program that is missing is
//! a visible skip.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use super::servers::{cache, have, skip};

const WEBSOCKETS: &str = "15.0.1";
const WS: &str = "8.18.3";

/// An interpreter that has `websockets`.
pub fn python() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    if !have("python3", "python3-venv") {
        return None;
    }
    let folder = installed(&FOLDER, &format!("python-websockets-{WEBSOCKETS}"), |folder| {
        said(Command::new("python3").args(["-m", "venv"]).arg(folder).output())?;
        let mut pip = Command::new(folder.join("bin/python"));
        pip.args(["-m", "pip", "--disable-pip-version-check", "install"]);
        said(pip.arg(format!("websockets=={WEBSOCKETS}")).output())
    })?;
    Some(folder.join("bin/python"))
}

/// A folder with a `node_modules` that has `ws`; scripts that import it must lie there or have a link to it.
pub fn node_modules() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    if !have("node", "nodejs") || !have("npm", "npm") {
        return None;
    }
    let folder = installed(&FOLDER, &format!("node-ws-{WS}"), |folder| {
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--prefix"]).arg(folder);
        said(npm.arg(format!("ws@{WS}")).output())
    })?;
    Some(folder.join("node_modules"))
}

/// The folder in the cache, made where it is not there. It gets its name when it is whole, so that several test programs
/// may make it at a time.
fn installed(
    known: &'static OnceLock<Option<PathBuf>>,
    name: &str,
    install: impl FnOnce(&Path) -> Result<(), String>,
) -> Option<PathBuf> {
    let folder = cache().join("clients").join(name);
    let made = known.get_or_init(|| {
        if folder.is_dir() {
            return Some(folder.clone());
        }
        let made = cache().join("clients").join(format!("{name}.{}", std::process::id()));
        let _ = fs::create_dir_all(&made);
        let outcome = install(&made).and_then(|()| match fs::rename(&made, &folder) {
            Err(error) if !folder.is_dir() => Err(error.to_string()),
            _ => Ok(()),
        });
        let _ = fs::remove_dir_all(&made);
        if let Err(reason) = &outcome {
            eprintln!("{name}: {reason}");
        }
        outcome.ok().map(|()| folder.clone())
    });
    if made.is_none() {
        skip(&format!(
            "{name} cannot be installed; the reason stands in the log of the first test"
        ));
    }
    made.clone()
}

fn said(output: std::io::Result<Output>) -> Result<(), String> {
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => {
            Err(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
        }
    }
}
